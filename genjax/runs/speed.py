"""What the log says of a run's speed: examples and steps of sequences a second, and on a known
accelerator the share of its peak.
"""

import math
from collections.abc import Callable, Mapping

import jax

from genjax.profiling.devices import datasheet_peak, product_flops
from genjax.profiling.measure import step_shapes
from genjax.protocol import DataSpec, Training
from genjax.runs.pictures import SPEED


def speed_of(
    t: Training,
    spec: DataSpec,
    batch_size: int,
    mesh: Mapping[str, int] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Callable[[float], dict[str, float]]:
    """(steps a second) -> the figures of a line: speed/examples_per_second; of sequences of one
    length speed/tokens_per_second, or what their steps are called; and speed/share_of_peak, FLOPs
    of products by the step's jaxpr over those of the device's data sheet in bfloat16, of all
    devices.

    Args:
        t: one optimiser step.
        mesh: the devices that share it; one unless given.
        say: is told where the share of the peak comes from.
    """
    factors = {f"{SPEED}examples_per_second": float(batch_size)}
    if spec.step and not spec.lengths:
        factors[f"{SPEED}{spec.step}s_per_second"] = float(batch_size * spec.shape[0])
    kind = jax.devices()[0].device_kind
    peak = datasheet_peak(kind)
    if peak is not None:
        devices = math.prod((mesh or {}).values())
        flops = product_flops(t.step, *step_shapes(t, spec, batch_size))
        factors[f"{SPEED}share_of_peak"] = flops / (devices * peak)
        say(
            f"speed/share_of_peak: {flops:.3g} FLOPs of products a step, by its jaxpr, of "
            f"{devices} x {peak / 1e12:.0f} TFLOP/s ({kind}, bfloat16, data sheet)"
        )
    return lambda steps_per_second: {
        name: steps_per_second * factor for name, factor in factors.items()
    }
