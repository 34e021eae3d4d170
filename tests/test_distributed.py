"""Several real processes on this machine that train one model: the values of one process, what each
holds, kills and restarts.

What jax does with the others when a process dies is in `genjax/learning/distributed.py`. No test
waits for it: every process that a test has started is killed when the test is done with it.
"""

import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from gates import assert_close
from program import environment, program, refused, state_like

from genjax.data import batch_indices
from genjax.errors import ConfigError
from genjax.learning import distributed
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import choose_feed
from genjax.learning.sharding import make_mesh
from genjax.learning.step import eval_params
from genjax.runs import pictures
from genjax.runs.folder import read_config, write_json
from genjax.runs.load import load
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.recipe import from_dict, to_dict

LIMIT = 600  # seconds; on a machine with nothing else to do everything here takes a few
TRAIN = shlex.split(
    "train vae --hidden 8 --latent-dim 2 --batch-size 16 --steps 100 --steps-per-call 5 "
    "--log-every 10 --evaluate-every 50 "
    "--sample-every 0 --checkpoint-every 20 --mesh data=2,fsdp=2 --distributed --out run"
)


@contextmanager
def cluster(
    args: Sequence[str], cwd: Path, devices: int = 2, n: int = 2
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A command as n processes with some devices each, joined on the loopback; none is left at the
    end.

    What each says is in out0, out1, ... of the folder.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = environment(devices) | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(n),
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(n):
            with (cwd / f"out{i}").open("wb") as out:
                env = common | {"JAX_PROCESS_ID": str(i)}
                command = [sys.executable, *args]
                started.append(
                    subprocess.Popen(
                        command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT
                    )
                )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def said(cwd: Path, i: int) -> str:
    """What process i said, without what the collectives of a CPU say."""
    lines = (cwd / f"out{i}").read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if not line.startswith("[Gloo]"))


def finish(processes: Sequence[subprocess.Popen[bytes]], cwd: Path, code: int = 0) -> None:
    for i, process in enumerate(processes):
        assert process.wait(LIMIT) == code, said(cwd, i)


def wait_for(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until a run has a checkpoint of that step or a later one."""
    end = time.monotonic() + LIMIT
    while max(Checkpoints(folder / "checkpoints").steps(), default=0) < step:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


def bits(folder: Path) -> list[tuple[str, bytes]]:
    """Every leaf of a run's last checkpoint as bytes, restored in this one process."""
    restored = Checkpoints(folder / "checkpoints").restore(state_like(folder))
    assert restored is not None
    assert restored.passed_over == {}
    state = restored.state._replace(key=jax.random.key_data(restored.state.key))
    return [
        (jax.tree_util.keystr(path), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree.leaves_with_path(state)
    ]


def lines(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in line.items() if k == "step" or pictures.is_metric(k)}
        for line in pictures.read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_run(folder: Path, expected: Path) -> None:
    assert lines(folder) == lines(expected)
    assert bits(folder) == bits(expected)
    assert (
        Checkpoints(folder / "checkpoints").steps() == Checkpoints(expected / "checkpoints").steps()
    )
    assert not list((folder / "checkpoints").glob("*.part*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes with two devices each that nobody stopped."""
    cwd = tmp_path_factory.mktemp("cluster")
    with cluster(["-m", "genjax", *TRAIN], cwd) as processes:
        finish(processes, cwd)
    return cwd


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_process_0_alone_speaks(
    trained: Path, tmp_path: Path
) -> None:
    """To rounding: 1e-4 of the largest entry of each array, after 100 steps; the sums over devices
    have another order.
    """
    folder = trained / "run"
    recipe = from_dict(read_config(folder), ZOO)
    alone = train(recipe, tmp_path / "alone")
    together = load(folder)  # in this process, which is one
    assert together.step == 100
    assert_close(together.params, load(tmp_path / "alone").params)
    ours, theirs = lines(tmp_path / "alone"), lines(folder)
    assert [line.keys() for line in theirs] == [line.keys() for line in ours]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(other.values()), list(mine.values()), rtol=1e-4)
    assert int(alone.step) == 100
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert "trained to step 100" in said(trained, 0)
    assert "step 100/100" in said(trained, 0)
    assert "genjax: process 1 of 2 joins the others at 127.0.0.1:" in said(trained, 1)
    assert "step" not in said(trained, 1)


@pytest.mark.slow
def test_a_process_goes_on_alone_with_what_two_have_saved(trained: Path, tmp_path: Path) -> None:
    recipe = from_dict(read_config(trained / "run"), ZOO)
    shutil.copytree(trained / "run" / "checkpoints" / "80", tmp_path / "checkpoints" / "80")
    write_json(tmp_path / "config.json", to_dict(recipe))
    told: list[str] = []
    state = train(recipe, tmp_path, say=told.append)
    assert told == [f"going on from step 80 of 100 in {tmp_path}"]
    assert_close(eval_params(state), load(trained / "run").params)


@pytest.mark.slow
def test_killed_processes_go_on_bitwise_as_if_they_had_never_stopped(
    trained: Path, tmp_path: Path
) -> None:
    """kill -9 of process 1 (the other waits for it), later of process 0 (jax ends the other), each
    followed by a restart.
    """
    folder = tmp_path / "run"
    for victim, step in ((1, 20), (0, 60)):
        with cluster(["-m", "genjax", *TRAIN], tmp_path) as processes:
            wait_for(folder, step, processes[victim])
            processes[victim].kill()
            assert processes[victim].wait(LIMIT) == -signal.SIGKILL
            if victim == 0:
                assert processes[1].wait(LIMIT) != 0
        assert step <= max(Checkpoints(folder / "checkpoints").steps()) < 100
    with cluster(["-m", "genjax", *TRAIN], tmp_path) as processes:
        finish(processes, tmp_path)
    assert "going on from step" in said(tmp_path, 0)
    assert_same_run(folder, trained / "run")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_saving(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with cluster(["-m", "genjax", *TRAIN], tmp_path) as processes:
        wait_for(folder, 20, processes[1])
        processes[1].send_signal(signal.SIGINT)
        finish(processes, tmp_path, 128 + signal.SIGTERM)
    for i in range(2):
        assert "SIGTERM: saved at step" in said(tmp_path, i)
    with cluster(["-m", "genjax", *TRAIN], tmp_path) as processes:
        finish(processes, tmp_path)
    assert_same_run(folder, trained / "run")


@pytest.mark.slow
def test_each_process_reads_its_own_rows_and_holds_its_own_part_of_the_state(
    tmp_path: Path,
) -> None:
    (tmp_path / "only0").touch()
    member = Path(__file__).with_name("distributed_member.py")
    with cluster([str(member), str(tmp_path)], tmp_path) as processes:
        finish(processes, tmp_path)
    found = [json.loads((tmp_path / f"found{i}.json").read_text()) for i in range(2)]
    order = np.stack([batch_indices(60, 16, 5, step) for step in (3, 4)])
    x = (np.arange(120, dtype=np.float32).reshape(60, 2) / 60)[order]
    for i, one in enumerate(found):
        assert one["shape"] == [2, 16, 2]
        assert [part[:2] for part in one["parts"]] == [[8 * i, 8 * i + 4], [8 * i + 4, 8 * i + 8]]
        for begin, end, values in one["parts"]:
            np.testing.assert_array_equal(values, x[:, begin:end])
        assert sorted(one["read"]) == sorted(order[:, 8 * i : 8 * i + 8].ravel().tolist())
        for share in one["held"]:  # half, but for a few biases and counters that do not divide
            assert 1 / 2 <= share < 0.53
        assert one["equal"]
        assert one["told"] == {"from": 0}
        mesh, batch, told, check, shared = one["complaints"]
        assert mesh.startswith(
            "ConfigError: The mesh data=2 takes 2 devices; the 2 processes have 4 between them"
        )
        assert batch.startswith(
            "ConfigError: A batch of 6 does not divide over the 4 devices of the mesh's fsdp"
        )
        assert told == "DataError: no data on process 0"
        assert check == (
            "DataError: spoiled"
            if i == 1
            else "CheckpointError: it did not read back on process 1, which says why"
        )
        assert (shared == "none") == (i == 0)
    assert found[0]["sum"] == found[1]["sum"]
    assert "Process 1 does not see" in found[1]["complaints"][-1]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_cluster_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name
        for name in os.environ
        if name.startswith(("JAX_COORD", "JAX_NUM_", "JAX_PROC", "SLURM_", "OMPI_"))
    ]:
        monkeypatch.delenv(name)
    _, err = program(["train", "vae", "--distributed", "--processes", "2"], tmp_path, 2)
    assert (
        "no cluster that jax recognises; give --coordinator HOST:PORT, --process I too, or set"
        in err
    )
    assert not list(tmp_path.iterdir())


def test_flags_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "give --distributed as well" in refused(
        ["train", "vae", "--coordinator", "localhost:1234"], capsys
    )
    for wrong, text in {
        ("localhost", 2, 0): "written as host:port, such as 10.0.0.1:1234; got 'localhost'",
        ("1234", 2, 0): "written as host:port, such as 10.0.0.1:1234; got '1234'",
        ("localhost:1", 0, 0): "at least 1 process; got --processes 0",
        ("localhost:1", 2, 2): "numbered from 0 to 1; got --process 2",
    }.items():
        with pytest.raises(ConfigError, match=text):
            distributed.start(*wrong)
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ConfigError, match=r"\$JAX_PROCESS_ID must be a whole number; got 'first'"):
        distributed.start("localhost:1", 2)


def test_one_process_does_nothing_special() -> None:
    assert distributed.writes()
    assert not distributed.several()
    value = object()
    assert distributed.agreed(lambda: value) is value
    assert distributed.whole(value) is value


def test_rows_that_are_put_on_a_mesh_are_those_of_the_batch() -> None:
    source = ZOO["cvae"].source()
    t = ZOO["cvae"].training(source.spec)
    choose = functools.partial(choose_feed, t, source, source.load().train, 16, 3, "host")
    plain, rows = (
        choose().payload(7, 3),
        choose(mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2})).payload(7, 3),
    )
    assert jax.tree.structure(rows) == jax.tree.structure(plain)
    for leaf, wanted in zip(jax.tree.leaves(rows), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
        assert leaf.dtype == wanted.dtype
        assert {part.data.shape[:2] for part in leaf.addressable_shards} == {(3, 4)}
