"""Which allocator of memory a process runs under, and the environment that starts it under another.

XLA asks for a program's temporary memory anew at every dispatch. glibc takes large pieces fresh
from the kernel each time, and the first touch of each page is a fault: tens of thousands in a step
of tens of milliseconds. An allocator that keeps what was freed has none. Which one a process has is
settled when it starts, by its environment; nothing here imports jax.

For a program of one's own: env $(python -m genjax.profiling.allocators) python program.py
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from genjax.errors import ConfigError, unknown_name

SETTING = "GENJAX_ALLOCATOR"  # "default" leaves a process as it is; or the name of one
STARTED = "GENJAX_ALLOCATOR_STARTED"  # what the command line started itself under: never twice
# The files of each: Debian's and conda's names.
LIBRARIES = {
    "tcmalloc": ("libtcmalloc_minimal.so*", "libtcmalloc.so*"),
    "jemalloc": ("libjemalloc.so*",),
}
# Those that the command line takes by itself, the best first: what was measured to be faster
# (`python -m benchmarks pages`). The others only where GENJAX_ALLOCATOR names them.
BEST = ("tcmalloc",)
PACKAGES = {
    "tcmalloc": "apt install libtcmalloc-minimal4, or conda install gperftools",
    "jemalloc": "apt install libjemalloc2, or conda install jemalloc",
}
# What each needs beside being loaded. tcmalloc would report pieces of more than 1 GiB; jemalloc
# gives large pieces back to the kernel at once.
BESIDE = {
    "tcmalloc": {"TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": "0"},
    "jemalloc": {"MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:60000"},
}
# Words in the names of libraries that replace malloc, or watch it, and must not be joined by one.
OTHERS = ("malloc", "hoard", "asan", "msan", "tsan", "valgrind", "memray", "heaptrack")
# Device files of GPUs (NVIDIA, AMD, WSL) and TPUs.
DEVICES = ("nvidia[0-9]*", "kfd", "dxg", "accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")


def folders(env: Mapping[str, str], prefix: str = sys.prefix) -> list[Path]:
    """Where shared libraries lie: those of the environment first, then the system's."""
    named = [Path(name) for name in env.get("LD_LIBRARY_PATH", "").split(":") if name]
    own = [Path(base) / "lib" for base in (env.get("CONDA_PREFIX"), prefix) if base]
    roots = [Path("/usr/local/lib"), Path("/usr/lib"), Path("/usr/lib64")]
    return [*named, *own, *(found for root in roots for found in (*root.glob("*-linux-gnu"), root))]


def _header(path: str | Path) -> tuple[bytes, bytes] | None:
    """What an ELF file says of the processors it is for: word size and byte order, machine."""
    try:
        with open(path, "rb") as file:
            head = file.read(20)
    except OSError:
        return None
    return (head[4:6], head[18:20]) if head.startswith(b"\x7fELF") and len(head) == 20 else None


def installed(where: Iterable[Path], python: str = sys.executable) -> dict[str, str]:
    """The allocators of `LIBRARIES` that are in these folders, name -> path; only files that are
    for the processor that this Python is for, because the loader complains of others.
    """
    wanted, found = _header(python), {}
    where = list(where)
    for name, patterns in LIBRARIES.items():
        files = (
            path
            for pattern in patterns
            for folder in where
            for path in sorted(folder.glob(pattern))
        )
        right = next((path for path in files if wanted and _header(path) == wanted), None)
        # The loader splits a list at spaces and colons and has no way to write them.
        if right is not None and not set(" :") & set(str(right)):
            found[name] = str(right)
    return found


def accelerators(dev: Path = Path("/dev")) -> bool:
    """Whether there are device files of GPUs or TPUs."""
    return any(any(dev.glob(pattern)) for pattern in DEVICES)


def on_cpu(env: Mapping[str, str], devices: bool) -> bool:
    """Whether jax is going to compute on the CPU: it is told so, or finds nothing else."""
    asked = env.get("JAX_PLATFORMS") or env.get("JAX_PLATFORM_NAME")
    return asked == "cpu" if asked else not devices


def is_set(env: Mapping[str, str]) -> bool:
    """Whether somebody has chosen an allocator, or settings of glibc's, already."""
    preloaded = env.get("LD_PRELOAD", "").replace(":", " ").split()
    return (
        any(word in Path(path).name for path in preloaded for word in OTHERS)
        or any(name.startswith("MALLOC_") for name in env)
        or "glibc.malloc" in env.get("GLIBC_TUNABLES", "")
    )


def under(name: str, env: Mapping[str, str], libraries: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process under an allocator that is installed.

    Raises:
        ConfigError: for a name that does not exist, or one that is not installed.

    Example:
        >>> under("tcmalloc", {}, {"tcmalloc": "/lib/libtcmalloc.so.4"})["LD_PRELOAD"]
        '/lib/libtcmalloc.so.4'
    """
    if name not in LIBRARIES:
        raise unknown_name("allocator", name, ("default", *LIBRARIES))
    if name not in libraries:
        raise ConfigError(
            f"{SETTING}={name} asks for an allocator that is not installed here: {PACKAGES[name]}; "
            f"or unset {SETTING}."
        )
    before = env.get("LD_PRELOAD", "")
    preload = f"{before}:{libraries[name]}" if before else libraries[name]
    return {**BESIDE[name], **env, "LD_PRELOAD": preload}


def better(
    env: Mapping[str, str],
    libraries: Mapping[str, str],
    platform: str = sys.platform,
    devices: bool = False,
) -> dict[str, str] | None:
    """The environment in which to start this process once more, or None to leave it as it is.

    It is left alone where it is no Linux, where it was started anew before, where somebody has
    chosen an allocator already, where jax is to compute on something other than the CPU, where none
    is installed, and where GENJAX_ALLOCATOR=default.

    Args:
        env: the environment of this process.
        libraries: of `installed`.
        platform: as `sys.platform` has it.
        devices: whether there are GPUs or TPUs, of `accelerators`.

    Raises:
        ConfigError: where GENJAX_ALLOCATOR names one that does not exist or is not installed.
    """
    name = env.get(SETTING) or next((one for one in BEST if one in libraries), "default")
    if name == "default" or env.get(STARTED):
        return None
    found = under(name, env, libraries)
    if platform != "linux" or is_set(env) or not on_cpu(env, devices):
        return None
    return {**found, STARTED: name}


def here() -> tuple[dict[str, str], dict[str, str], str, bool]:
    """What `better` and `advice` take, of this process on this machine."""
    env = dict(os.environ)
    return env, installed(folders(env)), sys.platform, accelerators()


def in_use(maps: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """The allocator that this process has, in words: of the libraries that it has loaded, and the
    settings of glibc's own in its environment.

    Args:
        maps: the text of /proc/self/maps; read unless given.
        env: this process's unless given.

    Example:
        >>> in_use("7f00-7f01 r-xp 0 08:01 7 /usr/lib/libtcmalloc_minimal.so.4", {})
        'tcmalloc (/usr/lib/libtcmalloc_minimal.so.4)'
    """
    env = os.environ if env is None else env
    if maps is None:
        file = Path("/proc/self/maps")
        maps = file.read_text("utf-8", "replace") if file.exists() else ""
    paths = dict.fromkeys(
        line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")
    )
    for path in paths:
        name = Path(path).name
        if "malloc" in name and ".so" in name:
            return f"{name.removeprefix('lib').partition('malloc')[0]}malloc ({path})"
    settings = {key: value for key, value in env.items() if key.startswith("MALLOC_")}
    if "glibc.malloc" in env.get("GLIBC_TUNABLES", ""):
        settings["GLIBC_TUNABLES"] = env["GLIBC_TUNABLES"]
    set_to = "".join(f" {key}={value}" for key, value in settings.items())
    return f"the system's{' with' * bool(set_to)}{set_to}"


def advice(
    env: Mapping[str, str],
    libraries: Mapping[str, str],
    platform: str = sys.platform,
    devices: bool = False,
) -> str | None:
    """What to do about the allocator of a process of the command line, in a line: have one's own
    programs use it, too, or install one. None where it was chosen, or would change nothing.

    Args:
        env, libraries, platform, devices: as of `better`.
    """
    if env.get(STARTED):
        return (
            "the same allocator for a program of your own: "
            f"env $(python -m genjax.profiling.allocators) python ...; {SETTING}=default "
            "leaves everything as it is"
        )
    chosen = is_set(env) or env.get(SETTING) or any(name in libraries for name in BEST)
    if chosen or platform != "linux" or not on_cpu(env, devices):
        return None
    return f"steps with much temporary memory are faster with tcmalloc: {PACKAGES['tcmalloc']}"


def for_shells() -> str:
    """The settings with which a program of one's own has a better allocator, as `env` takes them.

    Raises:
        ConfigError: where there is none to be had, or where one is set already.
    """
    if sys.platform != "linux":
        raise ConfigError("Another allocator of memory is preloaded on Linux only.")
    env = {name: text for name, text in os.environ.items() if name not in (SETTING, STARTED)}
    if is_set(env):
        raise ConfigError(f"This shell has chosen its allocator already: {in_use(env=env)}.")
    found = installed(folders(env))
    name = next((one for one in BEST if one in found), None)
    if name is None:
        raise ConfigError(
            f"There is none of {', '.join(BEST)} to preload. Install one: {PACKAGES[BEST[0]]}."
        )
    return " ".join(f"{key}={text}" for key, text in under(name, {}, found).items())


if __name__ == "__main__":
    try:
        print(for_shells())
    except ConfigError as error:
        sys.exit(f"genjax: error: {error}")
