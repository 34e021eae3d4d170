"""A family costs what the README says: a file, a row, a test with its analytic loss, and nothing
else. The skeleton is added in just this way to a copy of the project, whose gates are then run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = """

from genjax.families.toy import toy  # noqa: E402

ROWS = (
    *ROWS,
    Recipe(
        name="toy-ring",
        family=toy,
        data="ring",
        summary="a Gaussian of eight Gaussians",
        schedule=Schedule(steps=100, batch_size=64),
    ),
)
"""
TEST = '''
"""The Gaussian of independent elements."""

import math

import jax
import numpy as np

MEMORISES = False  # one Gaussian is not eight points
SCANNED_TO_ROUNDING = 1e-6


def analytic_loss(row):
    """With mean 0 and scale 1 each element costs x squared over 2, and half of ln 2 pi."""

    def nats(batch):
        x = np.asarray(batch.x, np.float64).reshape(len(batch.x), -1)
        return 0.5 * np.square(x).sum(1) + x.shape[1] * 0.5 * math.log(2 * math.pi)

    zeros = jax.tree.map(np.zeros_like, row.params)
    return zeros, {"toy": nats}
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    copy = tmp_path_factory.mktemp("project")
    for folder in ("genjax", "tests"):
        # With what Python has compiled, but for what another worker is writing.
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    skeleton = (copy / "genjax/families/_skeleton.py").read_text()
    (copy / "genjax/families/toy.py").write_text(skeleton.replace("skeleton", "toy"))
    with (copy / "genjax/zoo/vae.py").open("a") as rows:
        rows.write(ROW)
    (copy / "tests/test_toy.py").write_text(TEST.lstrip())
    return copy


def run(project: Path, *args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(project)}
    env.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", *args]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_copy_of_the_skeleton_passes_every_gate(project):
    files = ["tests/test_gates.py", "tests/test_gates_of_training.py"]
    chosen = ["-k", "toy", "-m", "slow or not slow", "-n", "0", "-q"]
    said = run(project, "pytest", *files, *chosen, "-p", "no:cacheprovider")
    assert int(said.rsplit(" passed", 1)[0].split()[-1]) == 19  # all gates that it can pass


@pytest.mark.slow
def test_it_trains_and_is_listed(project):
    out = run(project, "genjax", "train", "toy-ring", "--out", "run", "--plain")
    assert "trained to step 100" in out
    assert "toy-ring" in run(project, "genjax", "list", "--json")
