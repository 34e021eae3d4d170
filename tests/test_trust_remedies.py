"""What a message advises works: every flag and command that a text names exists, and advice is
typed as it stands.
"""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from program import refused

import genjax
import genjax.cli
from genjax.cli.of_runs import SAMPLE_FLAGS
from genjax.data import FILES
from genjax.runs.samples import Decoding
from genjax.zoo import ZOO
from genjax.zoo.sections import settings_of

ROOT = Path(genjax.__file__).parent
PROGRAM = [sys.executable, "-c", "import genjax.cli; genjax.cli.main()"]
TINY = "--steps 2 --batch-size 8 --evaluate-every 0 --sample-every 0"


def run(command):
    genjax.cli.main(shlex.split(command))


def known_flags():
    """Every flag of every command, and what a parser adds to them."""
    flags = {"help", "version", "data", "json", "split", "samples", "n-samples", "seconds"}
    records = [genjax.cli._Train, genjax.cli._Sweep, genjax.cli._Bench, genjax.cli._Compile]
    for record in [*records, Decoding]:
        flags |= {field.name for field in dataclasses.fields(record)}
    flags |= set(SAMPLE_FLAGS)
    for recipe in ZOO.values():
        for data in (None, *(f"mine{ending}" for ending in FILES)):
            row = recipe if data is None else recipe.on(data)
            for name, setting in settings_of(row).items():
                negations = [f"no-{setting.name}"] * (setting.hint is bool)
                flags |= {name, setting.name, setting.full, *negations}
    return {flag.replace("_", "-") for flag in flags}


def texts():
    """Every text in the package, with its place; f-strings piece by piece."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def test_every_flag_that_a_text_names_exists():
    known = known_flags()
    pattern = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])(?![\w-]|\.\w)")
    unknown = [
        (place, flag)
        for place, text in texts()
        for flag in pattern.findall(text.replace("\n", " "))
        if flag not in known
    ]
    assert not unknown


@pytest.mark.slow
def test_every_command_that_a_text_names_exists():
    pattern = re.compile(r"`genjax ([a-z]+)")
    found = {name for _, text in texts() for name in pattern.findall(text)}
    assert found <= set(genjax.cli.COMMANDS)
    assert {"train", "sample", "evaluate"} <= found


@pytest.mark.parametrize("name", sorted({row.family.__name__ for row in ZOO.values()} - {*ZOO}))
def test_a_family_that_a_text_names_leads_to_its_rows(capsys, name):
    """Messages say "take vae, maf or flow_matching", and not every family has a row of its name."""
    said = refused(["train", name], capsys)
    rows = said.split("a family with: ")[1].strip().rstrip(".").split(", ")
    assert all(ZOO[row].family.__name__ == name for row in rows)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("x.npz", x=rng.integers(0, 256, (60, 8, 8)).astype(np.uint8))
    return tmp_path


SMALL = {
    "cvae": "--hidden 4 --latent-dim 2",
    "cgan": "--hidden 4 --latent-dim 2",
    "diffusion": "--hidden 4 --n-steps 2 --n-likelihood-steps 2",
    "flow-matching": "--hidden 4 --n-steps 2 --n-likelihood-steps 2",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cvae", *[pytest.param(name, marks=pytest.mark.slow) for name in list(SMALL)[1:]]]
)
def test_a_conditional_row_on_data_without_labels(here, capsys, name):
    command = f"train {name} --data x.npz {TINY} {SMALL[name]} --out 'my run'"
    said = refused(shlex.split(command), capsys)
    (flag,) = re.findall(r"\((--no-conditional)\)", said)
    run(f"{command} {flag}")
    *_, last = capsys.readouterr().out.splitlines()
    commands = re.findall(r"genjax ((?:evaluate|sample) .*?)(?=   or|$)", last)
    assert len(commands) == 2
    for advised in commands:
        run(advised)


@pytest.mark.slow
def test_the_commands_that_training_advises_work_for_a_gan_without_labels(here, capsys):
    run(f"train gan --data x.npz {TINY} --hidden 4 --latent-dim 2")
    *_, last = capsys.readouterr().out.splitlines()
    for advised in re.findall(r"genjax ((?:evaluate|sample) .*?)(?=   or|$)", last):
        run(advised)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "fix"),
    [
        ("train vae --data y.npz", "x.npz"),
        ("train vae --data nowhere/y.npz", "x.npz"),
    ],
)
def test_a_path_that_is_not_there_is_called_so(here, capsys, command, fix):
    said = refused(shlex.split(command), capsys)
    assert "Did you mean" not in said
    assert "there is no such file" in said
    name = command.split()[-1]
    run(f"{command.replace(name, fix)} {TINY} --hidden 4 --latent-dim 2")


@pytest.mark.parametrize("name", ["photos", "x.csv", "nowhere/photos", "x"])
def test_what_is_no_data_is_said_to_be_none(here, capsys, name):
    (here / "photos").mkdir()
    said = refused(["train", "vae", "--data", name], capsys)
    assert "Did you mean" not in said
    wanted = r"is not there|no such file|holds no pictures|There are: digits"
    assert re.search(wanted, said)


@pytest.mark.slow
def test_too_large_a_batch_says_what_fits(here, capsys):
    command = "train vae --data x.npz --steps 2 --hidden 4 --latent-dim 2 --batch-size"
    said = refused(shlex.split(f"{command} 4000"), capsys)
    (most,) = re.findall(r"at most (\d+)", said)
    run(f"{command} {most}")


@pytest.mark.slow
def test_streams_say_what_the_batch_must_be(here, capsys):
    Path("book.txt").write_text("the cat sat on the mat. " * 200)
    command = "train rnn --data book.txt --d-hidden 4 --context 8 --steps 2 --sample-every 0"
    said = refused(shlex.split(f"{command} --batch-size 4"), capsys)
    (lanes,) = re.findall(r"must hold (\d+)", said)
    run(f"{command} --batch-size {lanes} --out one")
    run(f"{command} --batch-size 4 --lanes 0 --order shuffle --out two")


@pytest.mark.slow
def test_a_folder_of_other_settings_says_how_to_go_on(here, capsys):
    command = f"train vae --data x.npz {TINY} --hidden 4 --latent-dim 2"
    run(f"{command} --out run")
    said = refused(shlex.split(f"{command} --beta 2 --out run"), capsys)
    assert "--out" in said
    run(f"{command} --beta 2 --out other")


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda", "nonsense"])
def test_a_platform_that_is_not_here_is_one_message(here, platform, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    command = [*PROGRAM, "train", "vae", "--steps", "2", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=300)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith(f"genjax: error: JAX_PLATFORMS={platform} asks for")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["list", "train vae --help", "--help"])
def test_a_pipe_that_is_closed_ends_quietly(here, command):
    line = f"{shlex.join(PROGRAM)} {command} | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
