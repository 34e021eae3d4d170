"""The program as a user runs it: the commands, what they say, and being stopped and killed."""

import functools
import json
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from program import BIN, arrays_in, environment, program, refused, start, state_like

import genjax.cli
from genjax.learning.checkpoint import Checkpoints
from genjax.runs import pictures
from genjax.zoo import ZOO

# Small, and with so many checkpoints that a signal is likely to hit a save.
TRAIN = shlex.split(
    "train vae --hidden 8 --latent-dim 2 --batch-size 32 --steps 300 --steps-per-call 10 "
    "--log-every 20 --evaluate-every 100 "
    "--sample-every 200 --checkpoint-every 10"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run that nobody stopped: its folder, and what the program said."""
    cwd = tmp_path_factory.mktemp("cli")
    out, err = program([*TRAIN, "--out", "run"], cwd)
    return cwd / "run", out, err


def state_bits(folder: Path, step: int | None = None) -> list[tuple[str, bytes]]:
    """Every leaf of a run's newest checkpoint, as bytes."""
    restored = Checkpoints(folder / "checkpoints").restore(state_like(folder), step)
    assert restored is not None
    state = restored.state._replace(key=jax.random.key_data(restored.state.key))
    leaves = jax.tree_util.tree_leaves_with_path((state, jax.tree.map(np.asarray, restored.note)))
    return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]


kept_bits = functools.cache(state_bits)  # of the run that nobody stopped


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k == "step" or pictures.is_metric(k)}
        for line in pictures.read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_run(folder: Path, expected: Path) -> None:
    assert metrics(folder) == metrics(expected)
    steps = Checkpoints(expected / "checkpoints").steps()
    assert Checkpoints(folder / "checkpoints").steps() == steps
    for step in steps:
        assert state_bits(folder, step) == kept_bits(expected, step)
    for picture in sorted((expected / "samples").glob("step_*.png")):
        assert (folder / "samples" / picture.name).read_bytes() == picture.read_bytes()


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from genjax.cli import main; main(['--help']); main(['--version'])\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'jax', 'jaxlib', 'numpy', 'flax', 'optax', 'orbax', 'tyro', 'rich', 'matplotlib', "
        "'sklearn', 'tensorboardX'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"
    assert re.fullmatch(r"\d+\.\d+\.\d+", out.splitlines()[-2])
    for command in genjax.cli.COMMANDS:
        assert f"\n  {command} " in out


@pytest.mark.slow
def test_training_says_what_it_does_and_what_to_do_next(trained: tuple[Path, str, str]) -> None:
    folder, out, err = trained
    assert out.splitlines() == [
        "genjax train vae: variational autoencoder, on digits, for 300 steps, in run",
        "trained to step 300; see run/samples and run/curves.png",
        "next: genjax evaluate run   or   genjax sample run --n 64",
    ]
    lines = err.splitlines()
    pattern = r"vae  step (\d+)/300  \d+\.\d steps/s  \d+ s left(  .*)?"
    assert all(re.fullmatch(pattern, line) for line in lines), err
    assert re.fullmatch(
        r"vae  step 300/300 .*vae/loss \d+\.\d{3}  valid/bound -\d+\.\d{3}", lines[-1]
    )
    assert {
        "config.json",
        "data.json",
        "spec.json",
        "metrics.jsonl",
        "tensorboard",
        "best",
        "checkpoints",
        "samples",
        "curves.png",
    } == {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_the_installed_program_evaluates(trained: tuple[Path, str, str]) -> None:
    folder = trained[0]
    command = [
        str(BIN / "genjax"),
        "evaluate",
        "run",
        "--n",
        "50",
        "--n-samples",
        "7",
        "--seed",
        "5",
    ]
    done = subprocess.run(
        command, cwd=folder.parent, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    report = json.loads((folder / "report.json").read_text())
    assert (report["n"], report["seed"], report["split"]) == (50, 5, "test")
    assert report["estimator"] == "importance-weighted bound, K=7"
    assert (
        f"{report['mean']:.3f} ± {report['standard_error']:.3f} nats per example (lower bound"
        in done.stdout
    )
    assert f"{report['bits_per_dim']:.4f}" in done.stdout
    assert done.stdout.splitlines()[-1] == "written: run/report.json"


@pytest.mark.slow
def test_sampling(
    trained: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained[0]
    genjax.cli.main(["sample", str(folder), "--n", "9", "--seed", "2"])
    out = folder / "samples" / "sample_n9_seed2"
    assert capsys.readouterr().out == f"9 samples [9, 8, 8, 1] in {out}.npz and {out}.png\n"
    x = arrays_in(f"{out}.npz")["x"]
    assert x.shape == (9, 8, 8, 1)
    genjax.cli.main(
        ["sample", str(folder), "--n", "9", "--seed", "2", "--out", str(tmp_path / "again")]
    )
    np.testing.assert_array_equal(arrays_in(tmp_path / "again.npz")["x"], x)
    capsys.readouterr()
    assert "unconditional: leave `cond` out" in refused(
        ["sample", str(folder), "--cond", "3"], capsys
    )
    (tmp_path / "file").write_text("")
    text = refused(
        ["sample", str(folder), "--n", "1", "--out", str(tmp_path / "file" / "x")], capsys
    )
    assert re.search(r"Could not write .*file/x\.npz: (Not a directory|File exists)", text)


@pytest.mark.slow
def test_bench_prints_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    genjax.cli.main(
        [
            "bench",
            "vae",
            "--hidden",
            "8",
            "--latent-dim",
            "2",
            "--batch-size",
            "32",
            "--seconds",
            "0.2",
        ]
    )
    out = capsys.readouterr().out
    names = ("steps/s", "examples/s", "compile", "FLOPs per step", "share of peak")
    figure = {}
    for name in (*names, "temporary memory"):
        found = re.search(rf"│ {name} +│ ([-+.\de]+)", out)
        assert found, name
        figure[name] = float(found[1])
    assert all(value > 0 for value in figure.values())
    assert figure["examples/s"] == pytest.approx(32 * figure["steps/s"], rel=0.01)
    # Forward and backward: at least three products with the two 64 x 8 matrices for each example.
    assert figure["FLOPs per step"] > 3 * 2 * 2 * 64 * 8 * 32
    assert list(tmp_path.iterdir()) == []


def test_help_of_a_command_names_the_recipes_and_of_a_recipe_its_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for args in (["train", "--help"], ["bench", "-h"]):
        with pytest.raises(SystemExit) as stopped:
            genjax.cli.main(args)
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in ZOO)
    with pytest.raises(SystemExit) as stopped:
        genjax.cli.main(["sweep", "cvae", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    # One setting each of the builder, the loader, the optimiser, the schedule and the command.
    assert all(
        flag in out
        for flag in (
            "--latent-dim INT",
            "--conditional",
            "--learning-rate FLOAT",
            "--steps INT",
            "--seeds INT",
        )
    )
    assert "dimensions of z" in out


@pytest.mark.slow
def test_a_run_with_other_settings_is_refused_with_the_difference(
    trained: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained[0]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    text = refused([*TRAIN, "--out", str(folder), "--learning-rate", "0.5"], capsys)
    assert (
        "holds a run with other settings; nothing was changed:\n  optimizer.learning_rate: there "
        "0.001, now 0.5\n" in text
    )
    text = refused(["train", "cvae", "--out", str(folder)], capsys)
    assert "\n  recipe: there 'vae', now 'cvae'\n" in text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_interrupt_outside_training_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(genjax.cli.COMMANDS, "list", interrupt)
    with pytest.raises(SystemExit) as stopped:
        genjax.cli.main(["list"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith("genjax: interrupted")


@pytest.mark.slow
def test_sigterm_saves_exits_143_and_the_same_command_goes_on_to_the_same_bits(
    trained: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start([*TRAIN, "--out", "run"], tmp_path)
    wait_for(lambda: Checkpoints(folder / "checkpoints").steps(), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    found = re.search(
        r"^genjax: SIGTERM: saved at step (\d+) of 300; run the same command again to go on\.$",
        err,
        re.MULTILINE,
    )
    assert found, err
    step = int(found[1])
    assert Checkpoints(folder / "checkpoints").steps()[-1] == step < 300
    assert (folder / "curves.png").exists()
    out, _ = program([*TRAIN, "--out", "run"], tmp_path)
    assert f"going on from step {step} of 300 in run" in out
    assert_same_run(folder, trained[0])


@pytest.mark.slow
def test_kill_9_again_and_again_loses_nothing(
    trained: tuple[Path, str, str], tmp_path: Path
) -> None:
    """Every dispatch ends in a save, so most kills hit one; each life goes on from the last whole
    checkpoint.
    """
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder / "checkpoints")
    rng = random.Random(0)
    lives, died_at = 3, []
    for life in range(lives):
        before = checkpoints.steps()
        process = start([*TRAIN, "--out", "run"], tmp_path)
        wait_for(lambda before=before: checkpoints.steps() != before, process)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        died_at.append(checkpoints.steps()[-1])
        if life == 0:  # and one that was killed for certain in the middle of writing
            newest = folder / "checkpoints" / str(died_at[-1])
            half = folder / "checkpoints" / f"{died_at[-1] + 10}.part"
            subprocess.run(["cp", "-r", newest, half], check=True)
            (half / "_CHECKPOINT_METADATA").unlink()
    assert died_at == sorted(set(died_at))
    assert died_at[-1] < 300, "the run was too fast to be killed"
    out, _ = program([*TRAIN, "--out", "run"], tmp_path)
    assert f"going on from step {died_at[-1]} of 300" in out
    assert_same_run(folder, trained[0])
    assert not list((folder / "checkpoints").glob("*.part*"))


KILLED_IN_A_SAVE = r"""
import os, re, signal, sys
from orbax.checkpoint import v1 as ocp
from genjax.cli import main
whole = ocp.save
def save(path, *args, **kwargs):
    if re.search(r"/50\.[0-9a-f]+\.part$", path):
        os.makedirs(path)
        open(path + "/half", "w").write("half")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, *args, **kwargs)
ocp.save = save
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_save_and_a_damaged_checkpoint(
    trained: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_IN_A_SAVE, *TRAIN, "--out", "run"]
    died = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert list((folder / "checkpoints").glob("50.*.part/half"))
    assert Checkpoints(folder / "checkpoints").steps() == [20, 30, 40]
    # The newest whole one is damaged as well: one byte, in the largest file.
    largest = max(
        (path for path in (folder / "checkpoints" / "40").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    out, err = program([*TRAIN, "--out", "run"], tmp_path)
    assert "going on from step 30 of 300" in out
    assert (
        "A damaged checkpoint was passed over and is now called "
        f"{folder / 'checkpoints' / '40.damaged'}: " in err
    )
    assert_same_run(folder, trained[0])


@pytest.mark.slow
def test_a_loss_that_turns_non_finite_stops_the_program_and_keeps_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    args = shlex.split(
        "train vae --hidden 8 --steps 60 --steps-per-call 5 --checkpoint-every 5 --schedule linear "
        "--warmup-steps 40"
    )
    args += ["--algorithm", "sgd", "--weight-decay", "0", "--learning-rate", "1", "--out", "run"]
    _, err = program(args, tmp_path, code=2)
    found = re.search(
        r"genjax: error: At step (\d+) the loss of player 'vae' is (nan|inf), and training "
        r"stopped\.(.*)",
        err,
    )
    assert found, err
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert f"The last good checkpoint is that of step {steps[-1]}." in found[3]
    assert 0 < steps[-1] <= int(found[1])
    out, _ = program([*args[:-1], "skipping", "--skip-nonfinite"], tmp_path)
    assert "trained to step 60" in out
    lines = metrics(tmp_path / "skipping")
    assert sum(line.get("skipped", 0) for line in lines) > 0
    # What was trained with is finite; the validation bound of such wild weights need not be.
    assert all(
        np.isfinite(value)
        for line in lines
        for name, value in line.items()
        if name.startswith("vae/")
    )


@pytest.mark.slow
def test_a_sweep_is_one_program_with_a_table(tmp_path: Path) -> None:
    args = shlex.split(
        "sweep vae --hidden 8 --latent-dim 2 --schedule.steps 60 --log-every 20 --seeds 2 "
        "--optimizer.learning-rate 1e-3,3e-4"
    )
    out, _ = program(args, tmp_path)
    changed = "hidden=8,latent-dim=2,log-every=20,steps=60,learning-rate=0.001_0.0003,seeds=2"
    folder = tmp_path / "runs" / f"sweep-vae,{changed}"
    results = json.loads((folder / "results.json").read_text())
    assert len(results["results"]) == 2
    for line in results["results"]:
        assert re.search(
            rf"│ {line['settings']['learning_rate']:g} +│ {line['mean']:.4f} +│ {line['sd']:.4f} "
            r"+│ 0 +│",
            out,
        )
    assert "2 settings x 2 seeds as one program" in out
    assert (folder / "curves.png").stat().st_size > 1000
    program(["sample", str(folder)], tmp_path, code=2)


@pytest.mark.slow
def test_compiled_programs_are_kept_and_no_damage_to_them_or_want_of_room_matters(
    tmp_path: Path,
) -> None:
    args = shlex.split(
        "train vae --hidden 8 --latent-dim 2 --batch-size 32 --steps 20 --sample-every 0 "
        "--evaluate-every 0 --out"
    )
    env = {
        name: value for name, value in environment().items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    # A fast machine compiles this small step in less time than what is worth keeping.
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def train(out: str, cache: Path, **more: str) -> str:
        command = [sys.executable, "-m", "genjax", *args, out]
        given = {**env, "XDG_CACHE_HOME": str(cache), **more}
        done = subprocess.run(
            command, cwd=tmp_path, env=given, capture_output=True, text=True, check=True
        )
        return done.stderr

    off = train("off", tmp_path / "none", JAX_ENABLE_COMPILATION_CACHE="0")
    assert "Warning" not in off
    assert not list((tmp_path / "none").rglob("*-cache"))
    train("first", tmp_path / "cache")
    kept = list((tmp_path / "cache" / "genjax" / "xla").rglob("*-cache"))
    assert any("step" in path.name for path in kept)
    for path in kept:  # as a process that was killed while it wrote would leave it
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "Error reading persistent compilation cache entry" in train("second", tmp_path / "cache")
    (tmp_path / "file").write_text("")
    assert "Warning" not in train("third", tmp_path / "file")
    for other in ("first", "second", "third"):
        assert metrics(tmp_path / other) == metrics(tmp_path / "off")


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_rate_and_time_left(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    args = shlex.split("train vae --hidden 8 --steps 300 --sample-every 0 --out run")
    env = {**environment(), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "genjax", *args],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
    )
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # the other end was closed
        pass
    assert process.wait() == 0
    os.close(leader)
    assert process.stdout is not None
    process.stdout.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"vae .*300/300 \d+\.\d steps/s \d:\d\d:\d\d vae/loss \d+", text), text[-500:]
    assert "compiling" in text
