"""Which allocator the program starts itself under, and when it leaves everything as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np  # whose maps name libm
import pytest
from program import program, refused

from genjax.cli import start
from genjax.errors import ConfigError
from genjax.profiling import allocators
from genjax.profiling.allocators import better, in_use, installed

TC, JE = "/lib/libtcmalloc_minimal.so.4", "/lib/libjemalloc.so.2"
BOTH = {"jemalloc": JE, "tcmalloc": TC}
LINUX = sys.platform == "linux"


def test_the_best_that_is_installed_is_preloaded() -> None:
    env = better({"HOME": "/x"}, BOTH, "linux")
    assert env == {
        "HOME": "/x",
        "LD_PRELOAD": TC,
        allocators.STARTED: "tcmalloc",
        **allocators.BESIDE["tcmalloc"],
    }
    assert better(env, BOTH, "linux") is None  # never twice
    lost = {key: text for key, text in env.items() if key != "LD_PRELOAD"}
    assert better(lost, BOTH, "linux") is None  # not even where a wrapper drops LD_PRELOAD


@pytest.mark.parametrize(
    ("env", "platform", "devices"),
    [
        ({"GENJAX_ALLOCATOR": "default"}, "linux", False),
        ({"LD_PRELOAD": "/opt/libmimalloc.so"}, "linux", False),
        ({"LD_PRELOAD": "libgomp.so.1 libasan.so.8"}, "linux", False),
        ({"MALLOC_ARENA_MAX": "2"}, "linux", False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "linux", False),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "linux", False),
        ({"JAX_PLATFORMS": "tpu"}, "linux", False),
        ({"JAX_PLATFORM_NAME": "gpu"}, "linux", False),
        ({}, "linux", True),
        ({}, "darwin", False),
        ({}, "win32", False),
    ],
)
def test_a_process_is_left_as_it_is(env: dict[str, str], platform: str, devices: bool) -> None:
    assert better(env, BOTH, platform, devices) is None


@pytest.mark.parametrize("libraries", [{}, {"jemalloc": JE}])
def test_none_that_was_measured_is_installed(libraries: dict[str, str]) -> None:
    assert better({}, libraries, "linux") is None


@pytest.mark.parametrize(
    ("env", "devices"),
    [({"JAX_PLATFORMS": "cpu"}, True), ({"JAX_PLATFORMS": ""}, False), ({"LD_PRELOAD": ""}, False)],
)
def test_the_cpu_is_what_jax_computes_on(env: dict[str, str], devices: bool) -> None:
    found = better(env, BOTH, "linux", devices)
    assert found is not None
    assert found["LD_PRELOAD"] == TC


def test_what_was_preloaded_before_stays_first_and_settings_of_ones_own_stay() -> None:
    env = {"LD_PRELOAD": "libgomp.so.1", "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": "7"}
    found = better(env, BOTH, "linux")
    assert found is not None
    assert found["LD_PRELOAD"] == f"libgomp.so.1:{TC}"
    assert found["TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD"] == "7"


def test_an_allocator_may_be_named() -> None:
    found = better({"GENJAX_ALLOCATOR": "jemalloc"}, BOTH, "linux")
    assert found is not None
    assert found["LD_PRELOAD"] == JE
    with pytest.raises(ConfigError, match="Did you mean jemalloc"):
        better({"GENJAX_ALLOCATOR": "jemaloc"}, BOTH, "linux")
    with pytest.raises(ConfigError, match="not installed here: apt install libjemalloc2"):
        better({"GENJAX_ALLOCATOR": "jemalloc"}, {"tcmalloc": TC}, "linux")


def header(machine: bytes = b"") -> bytes:
    """The first bytes of this Python, or of one for another machine."""
    head = Path(sys.executable).read_bytes()[:20]
    return head[:18] + machine if machine else head


@pytest.mark.skipif(not LINUX, reason="ELF files are Linux's")
def test_only_libraries_of_this_processor_are_found(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "libtcmalloc_minimal_debug.so.4").write_bytes(header())
    (first / "libtcmalloc_minimal.so.4").write_bytes(header(b"\x00\x00"))
    (first / "libjemalloc.so.2").write_text("INPUT(-ljemalloc)")  # a script for the linker
    assert installed([first, tmp_path / "none"]) == {}
    (second / "libtcmalloc_minimal.so.4").write_bytes(header())
    assert installed([first, second]) == {"tcmalloc": str(second / "libtcmalloc_minimal.so.4")}
    spaced = tmp_path / "a folder"
    second.rename(spaced)  # which LD_PRELOAD cannot name
    assert installed([spaced]) == {}


def test_folders_of_the_environment_come_first() -> None:
    env = {"LD_LIBRARY_PATH": "/opt/a:", "CONDA_PREFIX": "/conda"}
    found = allocators.folders(env, "/venv")
    assert found[:3] == [Path("/opt/a"), Path("/conda/lib"), Path("/venv/lib")]


def test_devices_are_found_by_their_files(tmp_path: Path) -> None:
    for name in ("nvidiactl", "null", "vfio"):
        (tmp_path / name).touch()
    assert not allocators.accelerators(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert allocators.accelerators(tmp_path)


def test_what_a_process_has_is_read_from_its_maps() -> None:
    maps = f"7f00-7f01 r-xp 0 08:01 7 /usr/lib/libm.so.6\n7f02-7f03 r-xp 0 08:01 8 {JE}\n7f 0 0\n"
    assert in_use(maps, {}) == f"jemalloc ({JE})"
    assert in_use("", {}) == "the system's"
    assert in_use("", {"MALLOC_ARENA_MAX": "1"}) == "the system's with MALLOC_ARENA_MAX=1"


def test_bench_advises_where_something_can_be_done() -> None:
    started = better({}, BOTH, "linux")
    assert started is not None
    assert "env $(python -m genjax.profiling.allocators)" in str(allocators.advice(started, BOTH))
    assert "apt install libtcmalloc-minimal4" in str(allocators.advice({}, {}, "linux"))
    for env in ({"GENJAX_ALLOCATOR": "default"}, {"MALLOC_ARENA_MAX": "1"}):
        assert allocators.advice(env, {}, "linux") is None
    assert allocators.advice({}, {}, "darwin") is None
    assert allocators.advice({}, {}, "linux", devices=True) is None


# --- the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["train", "vae"], 1),
        (["bench", "vae"], 1),
        (["sweep", "vae"], 1),
        (["train", "vae", "--help"], 0),
        (["list"], 0),
        (["--help"], 0),
        ([], 0),
    ],
)
def test_commands_that_run_many_steps_start_anew(
    args: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(allocators, "better", lambda *where: {"A": "b"})
    fake = SimpleNamespace(
        modules={}, gettrace=lambda: None, executable="/py", orig_argv=["py", "-m", "genjax", *args]
    )
    monkeypatch.setattr(start, "sys", fake)
    monkeypatch.setattr(start.os, "execve", lambda *given: calls.append(given))
    start.restart(args)
    assert calls == [("/py", ["/py", "-m", "genjax", *args], {"A": "b"})] * expected
    fake.modules["jax"] = None
    start.restart(args)
    assert len(calls) == expected


def test_called_from_python_the_program_does_not_start_anew(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genjax.cli.restart", lambda args: pytest.fail("started anew"))
    assert "vea" in refused(["train", "vea"], capsys)


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="LD_PRELOAD is Linux's")
def test_bench_says_what_it_ran_under(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harmless library has an allocator's name."""
    assert np.__name__
    paths = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line)
    library = tmp_path / "libtcmalloc_minimal.so.4"
    shutil.copy(next(path for path in paths if "/libm.so" in path), library)
    for name in [one for one in os.environ if one.startswith("MALLOC_")] + ["LD_PRELOAD"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    args = ["bench", "vae", "--seconds", "0.1", "--hidden", "4", "--latent-dim", "2"]
    monkeypatch.setenv("GENJAX_ALLOCATOR", "")
    out, err = program(args, tmp_path)
    assert f"tcmalloc ({library})" in out
    assert "the same allocator for a program of your own: env $(" in out
    assert err == ""
    monkeypatch.setenv("GENJAX_ALLOCATOR", "default")
    assert "the system's" in program(args, tmp_path)[0]
    monkeypatch.setenv("GENJAX_ALLOCATOR", "tcmaloc")
    assert "Did you mean tcmalloc" in program(args, tmp_path, code=2)[1]


@pytest.mark.skipif(not LINUX, reason="LD_PRELOAD is Linux's")
def test_a_shell_gets_the_settings_as_env_takes_them(tmp_path: Path) -> None:
    (tmp_path / "libtcmalloc_minimal.so.4").write_bytes(header())
    command = [sys.executable, "-m", "genjax.profiling.allocators"]
    env = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == f"LD_PRELOAD={tmp_path}/libtcmalloc_minimal.so.4"
    chosen = {**env, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=chosen, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("genjax: error: This shell has chosen its allocator already")
