"""Step throughput: solo, scanned, many members by vmap and by map, in float32 and bfloat16."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.common import alternate, summary, write
from benchmarks.overhead import SIZES
from genjax.data import example_batch
from genjax.families.vae import vae
from genjax.learning.members import ensemble
from genjax.learning.step import training
from genjax.learning.transforms import compiled, repeat_steps
from genjax.profiling.measure import cost_of, matmul_peak, stepper
from genjax.protocol import DataSpec, Training

DTYPES = ("float32", "bfloat16")
SCANS = (1, 10, 100)
MEMBERS = (1, 4, 16)


def variants(t: Training) -> dict[str, tuple[Training, int, int]]:
    """name -> (training, optimiser steps per call, members)."""
    table = {"solo": (t, 1, 1)}
    for k in SCANS:
        table[f"scan k={k}"] = (repeat_steps(t, k), k, 1)
    for members in MEMBERS:
        for mode in ("vmap", "map"):
            table[f"{mode} x{members}"] = (ensemble(t, mode), 1, members)  # type: ignore[arg-type]
    return table


def main(seconds: float = 4.0) -> None:
    """Measure and write results/throughput.json."""
    rows: list[dict[str, Any]] = []
    peaks = {
        name: matmul_peak(dtype=dtype)
        for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16))
    }
    for size_name, size in SIZES.items():
        spec = DataSpec((size["side"], size["side"], 1), "binary", name="random bits")
        batch = jax.jit(partial(example_batch, spec), static_argnums=1)(
            jax.random.key(1), size["batch"]
        )
        for dtype in DTYPES:
            t = training(
                vae(spec, hidden=(size["width"],) * 2, latent_dim=size["latent"], dtype=dtype),
                optax.adam(1e-3),
            )  # type: ignore[arg-type]
            flops, _ = cost_of(
                jax.jit(t.step).lower(jax.eval_shape(t.init, jax.random.key(0)), batch).compile()
            )
            calls = {}
            for name, (variant, _, members) in variants(t).items():
                c = compiled(variant)
                key = (
                    jax.random.key(0)
                    if "x" not in name
                    else jax.random.split(jax.random.key(0), members)
                )
                calls[name] = stepper(c.step, c.init(key), batch)
            rounds = alternate(calls, seconds * len(calls))
            for name, (_, k, members) in variants(t).items():
                per_step = summary(rounds[name])["median"] / (k * members)
                rows.append(
                    {
                        "size": size_name,
                        "dtype": dtype,
                        "variant": name,
                        "ms_per_step_and_member": 1000 * per_step,
                        "member_steps_per_second": 1 / per_step,
                        "examples_per_second": size["batch"] / per_step,
                        "share_of_float32_peak": flops / per_step / peaks["float32"],
                        "spread": summary(rounds[name]),
                    }
                )
                print(
                    f"{size_name} {dtype} {name}: {1000 * per_step:.3f} ms per step and member",
                    flush=True,
                )
    write(
        "throughput",
        {"peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()}, "rows": rows},
    )
