"""The strictest setting for every test: no silent broadcasting, no silent casts, warnings are
errors, 8 fake CPU devices.
"""

import importlib.metadata
import os
import pathlib

import kept_programs

# Before jax is imported. The suite runs on a CPU whatever the machine has, and one file at a time
# compiles in each worker.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
# Both cores compile as it is: one program need not be split among threads.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# Compiling is most of the suite's time; this halves it with jax 0.10 and saves a tenth with 0.12.
# (`gates.optimised` undoes it, where bits are compared and where the score of a density of many
# terms comes out as NaN without optimisation.)
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.pop("GENJAX_DATA", None)  # tests make what they read
os.environ["GENJAX_ALLOCATOR"] = "default"  # its programs run as they are started
# Every program that a test starts would compile 2,000 modules, for 6 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["MPLBACKEND"] = "agg"
os.environ["JAX_COMPILATION_CACHE_DIR"] = kept_programs.folder()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _compiled_anew(request):
    """Where bits are compared (`bits`), programs are not taken from those that were kept."""
    if request.node.get_closest_marker("bits") is None:
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session", autouse=True)
def _programs_share_what_they_compile(tmp_path_factory):
    """The cache of the programs that tests start: one for all workers. (jax in this process has
    read its settings.)
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared / "compiled")


MANY_MAPS, TOO_MANY_MAPS = 30_000, 52_000
_next_look = 20  # in so many tests


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Linux allows a process 65,530 memory maps and a compiled program takes about ten: a worker
    would die in the end. What tests share is compiled anew when the caches are cleared, so that is
    done late, and maps are counted more often once there are many.
    """
    global _next_look
    yield
    _next_look -= 1
    maps = pathlib.Path("/proc/self/maps")
    if _next_look > 0 or not maps.exists():
        return
    found = maps.read_bytes().count(b"\n")
    if found > TOO_MANY_MAPS:
        jax.clear_caches()
    _next_look = 5 if found > MANY_MAPS else 20
