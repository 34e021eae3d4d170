"""The program as the suites run it: for real, in a process of its own, or in this one to hear its
complaint.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import genjax.cli
from genjax.runs.folder import read_config
from genjax.zoo import ZOO
from genjax.zoo.recipe import from_dict

BIN = Path(sys.executable).parent


def environment(devices: int = 1) -> dict[str, str]:
    """One device and no data, as most users have it, but compiled as fast as the other tests.
    (conftest.py names a cache of compiled programs for them to share.)
    """
    kept = {name: value for name, value in os.environ.items() if name != "GENJAX_DATA"}
    flags = kept["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**kept, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def start(args: list[str], cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "genjax", *args]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def program(args: list[str], cwd: Path, code: int = 0) -> tuple[str, str]:
    """Run the real program to its end; (standard output, standard error)."""
    process = start(args, cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def arrays_in(path: str | Path) -> dict[str, np.ndarray]:
    """What an .npz file holds; the file is closed again."""
    with np.load(path) as file:
        return dict(file)


def state_like(folder: Path) -> Any:
    """The shapes of a run's training state, as `Checkpoints.restore` takes them."""
    return _state_like(json.dumps(read_config(folder)))


@functools.cache  # the runs that a test compares have the same settings
def _state_like(config: str) -> Any:
    recipe = from_dict(json.loads(config), ZOO)
    return jax.eval_shape(recipe.training(recipe.source().spec).init, jax.random.key(0))


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the program in this process and return its complaint."""
    with pytest.raises(SystemExit) as stopped:
        genjax.cli.main(args)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return captured.err + captured.out
