"""nanoGPT's example for a CPU: a training step against its own arithmetic in PyTorch.

The setting is nanoGPT's for a CPU: 4 layers, 4 heads, width 128, context 64, batch 12, 65 symbols,
tied embeddings, no biases, gradients clipped at norm 1, AdamW. The twin, `torch_nanogpt.py`, runs
in an interpreter of its own, which $GENJAX_TORCH_PYTHON names.

genjax runs as `fit` runs it, 20 steps a dispatch, and also one at a time. The difference is memory:
a step has 40 MB of temporary arrays, which XLA asks the C library for anew in each dispatch, and
glibc gives areas above 32 MB back to the system at once. That makes 11,000 page faults, a quarter
of the time of a step.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import in_turns, ratio, summary, write
from benchmarks.processes import AskedProcess
from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.transformer import transformer
from genjax.learning.optim import Optimizer
from genjax.learning.step import training
from genjax.learning.transforms import compiled, scan_steps
from genjax.profiling.measure import stepper
from genjax.protocol import DataSpec

SPEC = DataSpec((64,), "tokens", levels=65, step="character", name="random characters")
MODEL: dict[str, Any] = {
    "d_model": 128,
    "n_layers": 4,
    "n_heads": 4,
    "position": "learned",
    "tie_weights": True,
}
OPTIMIZER = Optimizer("adamw", 1e-3, b2=0.99, weight_decay=0.1, clip_norm=1.0)
VARIANTS = ("eager", "fused", "compiled")


def ours(per_dispatch: int, batch_size: int = 12) -> Callable[[int], float]:
    """Seconds per step of genjax's training step, as a function of the number of steps, a multiple
    of `per_dispatch`.
    """
    one = training(transformer(SPEC, **MODEL), OPTIMIZER.build(2000))
    t = compiled(scan_steps(one) if per_dispatch > 1 else one)
    batch = example_batch(SPEC, jax.random.key(1), batch_size)
    if per_dispatch > 1:
        batch = jax.tree.map(lambda x: jnp.stack([x] * per_dispatch), batch)
    call = stepper(t.step, t.init(jax.random.key(0)), batch)

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps // per_dispatch):
            jax.block_until_ready(
                call()
            )  # as PyTorch does; two dispatches in flight are slower than one after the other
        return (time.perf_counter() - start) / steps

    return seconds


def compare(python: str, seconds: float = 30.0, block: int = 20) -> dict[str, Any]:
    """Milliseconds per step of all programs in turns of `block` steps, and genjax's ratio to each
    variant of the twin.
    """
    twin = AskedProcess([python, str(Path(__file__).with_name("torch_nanogpt.py"))])
    calls: dict[str, Callable[[int], float]] = {
        "genjax": ours(block),
        "genjax, one step a dispatch": ours(1),
    }
    calls |= {
        variant: lambda steps, variant=variant: float(twin.ask(f"{variant} {steps}"))
        for variant in VARIANTS
    }
    for call in calls.values():  # compile and warm up
        call(block)
    rounds = in_turns(calls, dict.fromkeys(calls, block), seconds)
    twin.close()
    best = min(VARIANTS, key=lambda name: statistics.median(rounds[name]))
    return {
        "torch": twin.greeting,
        "best_variant": best,
        "ms": {
            name: {key: 1000 * v if key != "rounds" else v for key, v in summary(t).items()}
            for name, t in rounds.items()
        },
        "ratio_to": {name: ratio(rounds["genjax"], rounds[name]) for name in VARIANTS},
    }


def main(seconds: float = 30.0) -> None:
    """Measure and write results/nanogpt.json."""
    python = os.environ.get("GENJAX_TORCH_PYTHON")
    if python is None:
        raise ConfigError(
            "Set GENJAX_TORCH_PYTHON to an interpreter that has torch and numpy: the PyTorch twin "
            "runs there."
        )
    results = compare(python, seconds)
    for name, ms in results["ms"].items():
        print(f"{name}: {ms['median']:.1f} ms a step ({ms['q1']:.1f} to {ms['q3']:.1f})")
    write("nanogpt", results)


if __name__ == "__main__":
    main()
