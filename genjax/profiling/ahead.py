"""Compile a train step for accelerators that are not here: does it compile, does it fit, and how
fast could it be?

libtpu (the extra `tpu`) compiles for a topology by name on a machine without a TPU. For CUDA, whose
compiler needs the device, a step is lowered to StableHLO, which shows that every operation in it
exists there (but for cuDNN's attention, which takes a card to ask for).
"""

import importlib.util
import math
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from genjax.errors import ConfigError
from genjax.learning.sharding import describe, make_mesh, shard
from genjax.nets.platforms import traced_for
from genjax.profiling.devices import CHIPS, product_flops
from genjax.profiling.measure import placed, step_shapes, training_of
from genjax.profiling.room import program_memory
from genjax.protocol import Trained
from genjax.zoo.recipe import Recipe

# The usual slices. libtpu takes more, also such as no chip has (v5e:2x2x1).
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


class Compiled(NamedTuple):
    """A step compiled for one topology. Counts are of one device; nothing was run.

    Attributes:
        device: what kind of device.
        mesh: the axes it was split over.
        compile_seconds: on this machine.
        flops: floating-point operations of a step's products, by its jaxpr, in equal parts. (The
            compiler's own count has the body of a loop once, however often it runs.)
        bytes_accessed: bytes moved to and from memory, by the compiler.
        memory: bytes that a step needs: arguments, results that are not stored in them, and
            temporaries.
        capacity: bytes that a device has.
        optimal_seconds: the compiler's estimate of the least time of a step, see `least_seconds`;
            None where it has none.
        share_of_peak: flops / optimal_seconds, of the device's bfloat16 peak; None likewise.
    """

    device: str
    mesh: dict[str, int]
    compile_seconds: float
    flops: float
    bytes_accessed: float
    memory: int
    capacity: int
    optimal_seconds: float | None
    share_of_peak: float | None


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology, such as "v5e:2x2".

    Raises:
        ConfigError: for a topology that is not known, with those that are, and without libtpu.
    """
    known = ", ".join(
        f"{version}:{size}" for version, sizes in TOPOLOGIES.items() for size in sizes
    )
    version, _, size = topology.partition(":")
    if size not in TOPOLOGIES.get(version, ()):
        raise ConfigError(
            f"genjax knows no topology {topology!r}. It knows: {known}, and cuda (lowered only)."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "Compiling for TPUs needs libtpu, which no TPU is needed for: pip install "
            "'genjax-zoo[tpu]'."
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU's metadata server
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology, "tpu").devices)


def _check_size(axes: Mapping[str, int], topology: str, there: int) -> None:
    """Refuse a mesh of more devices than a topology has; the message names one that has so many."""
    need, version = math.prod(axes.values()), topology.partition(":")[0]
    if need <= there:
        return
    others = (f"{version}:{size}" for size in TOPOLOGIES[version])
    enough = next((other for other in others if len(devices_of(other)) >= need), None)
    raise ConfigError(
        f"The mesh {describe(axes)} takes {need} devices; {topology} has {there}. Give a smaller "
        f"mesh, such as data={there}{f', or --topology {enough}' if enough else ''}."
    )


def compile_for(
    recipe: Recipe,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    on: Trained | None = None,
) -> Compiled:
    """Compile one optimiser step of a recipe for a topology, data parallel over all its devices or
    as `mesh` says.

    Args:
        on: the first stage of a recipe that stands on one.

    Raises:
        ConfigError: see `devices_of` and `sharding.layout`, and for a mesh of more devices than
            the topology has.
    """
    devices = devices_of(topology)
    axes = dict(mesh or {"data": len(devices)})
    _check_size(axes, topology, len(devices))
    where = make_mesh(axes, devices)
    with traced_for("tpu"):
        t, spec = training_of(recipe, on)
        shapes = step_shapes(t, spec, recipe.schedule.batch_size)
        flops = product_flops(t.step, *shapes) / where.size
        t = shard(t, where)
        state, batch = placed(*shapes, where)
        begin = time.perf_counter()
        program = jax.jit(t.step, donate_argnums=0).lower(state, batch).compile()
        seconds = time.perf_counter() - begin
    found: Any = program.cost_analysis()
    kind = devices[0].device_kind
    peak, capacity = CHIPS[kind]
    optimal = least_seconds(float(found["optimal_seconds"]), flops / peak)
    return Compiled(
        device=kind,
        mesh=axes,
        compile_seconds=seconds,
        flops=flops,
        bytes_accessed=float(found["bytes accessed"]),
        memory=program_memory(program),
        capacity=capacity,
        optimal_seconds=optimal,
        share_of_peak=None if optimal is None else flops / optimal / peak,
    )


def least_seconds(estimate: float, at_peak: float) -> float | None:
    """The compiler's estimate of a step's time without its marks for what has no estimate, or None
    where it cannot be told.

    libtpu sums over operations, and adds -1 s for each that it has no time for, such as joining
    arrays by their addresses (seen with 0.0.42: an LSTM with four of those has -3.9998 s). So of an
    estimate with marks only the part below a second is known. Where that is less than the products
    alone take at the device's peak, the step takes longer than a second, or what has no time was
    most of it. A tenth less is let pass: libtpu expects more of some chips than their datasheets.

    Args:
        estimate: seconds, by the compiler.
        at_peak: seconds that the products take at the peak.

    Example:
        >>> round(least_seconds(-3.9998, 1e-5), 6)
        0.0002
        >>> least_seconds(1.3, 0.1)
        1.3
        >>> least_seconds(-2.99, 0.1) is None
        True
    """
    least = estimate if estimate > 0 else estimate % 1
    return least if least >= 0.9 * at_peak else None


def lowered_for_cuda(recipe: Recipe, on: Trained | None = None) -> int:
    """Lower one optimiser step of a recipe for CUDA; the bytes of its StableHLO. `on` as above."""
    with traced_for("gpu"):
        t, spec = training_of(recipe, on)
        shapes = step_shapes(t, spec, recipe.schedule.batch_size)
        exported = jax.export.export(jax.jit(t.step), platforms=["cuda"])(*shapes)
    return len(exported.mlir_module_serialized)
