"""The strictest setting for every test: no silent broadcasting, no silent casts, warnings are errors, 8 fake CPU devices."""

import os

# Before jax is imported. The suite runs on a CPU whatever the machine has, and one file at a time compiles in each worker.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.pop("GENJAX_DATA", None)  # tests make what they read
os.environ["MPLBACKEND"] = "agg"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
