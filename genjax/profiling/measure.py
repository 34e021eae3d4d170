"""What a step costs: seconds, compile seconds, FLOPs and memory of the compiled program, and the
machine's peak.
"""

import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from genjax.data import example_batch
from genjax.learning.sharding import batch_spec_of, layout, make_mesh, shard
from genjax.profiling.devices import datasheet_peak, product_flops
from genjax.profiling.room import check_program, check_training
from genjax.protocol import Batch, DataSpec, Trained, Training, TrainState
from genjax.settings import Within, check_setting
from genjax.zoo.recipe import Recipe

Seconds = Annotated[float, Within(0, 3600, above=True)]

# What is read of a compiled program's text.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_DOT = re.compile(r"\bdot\([^%]*%([\w.\-]+),.*lhs_contracting_dims=\{([\d,]*)\}")
_CONVOLUTION = re.compile(
    r"\bconvolution\([^%]*%[\w.\-]+, [^%]*%([\w.\-]+)\).*dim_labels=\w+_(\w+)->"
)
_DILATION = re.compile(r"lhs_dilate=([\dx]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class StepCost(NamedTuple):
    """The cost of one train step on this machine. Counts come from the compiled program (`flops`,
    of one device; on an accelerator, whose compiler calls libraries, they are its part of
    `product_flops`) or the step's jaxpr (`product_flops`, of all devices), times from running it.
    The shares are of a measured product, which `product` names, and of the data sheets' bfloat16
    where the device is known.
    """

    batch_size: int
    steps_per_second: float
    examples_per_second: float
    milliseconds: float
    compile_seconds: float
    flops: float
    temporary_bytes: int
    share_of_peak: float
    peak_gflops: float
    product: str
    product_flops: float
    share_of_datasheet: float | None
    steps_of_sequences: int


def training_of(recipe: Recipe, on: Trained | None = None) -> tuple[Training, DataSpec]:
    """A recipe's training and the spec of its batches: those of its source or, where it stands on a
    first stage, of that model's data.
    """
    if on is not None:
        return recipe.training(on), on.model.spec
    spec = recipe.source().spec
    return recipe.training(spec), spec


def step_shapes(t: Training, spec: DataSpec, batch_size: int) -> tuple[Any, Any]:
    """The shapes of a state and of a batch: all that compiling a step takes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(t.init, key), jax.eval_shape(
        partial(example_batch, spec, n=batch_size), key
    )


def placed(state: Any, batch: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The same shapes, which say how they lie on the devices of a mesh."""

    def one(leaf: Any, at: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    split = NamedSharding(mesh, batch_spec_of(mesh))
    return (
        jax.tree.map(one, state, layout(state, mesh)),
        jax.tree.map(lambda leaf: one(leaf, split), batch),
    )


def step_program(
    t: Training, spec: DataSpec, batch_size: int, options: dict[str, Any] | None = None
) -> Any:
    """One optimiser step, its state donated, as a compiled program; nothing is run. `options` are
    the compiler's.
    """
    return (
        jax.jit(t.step, donate_argnums=0).lower(*step_shapes(t, spec, batch_size)).compile(options)
    )


def state_bytes(state: Any) -> int:
    """The bytes of a training state, or of its shapes: what a step that donates it has to reuse."""

    def data(leaf: Any) -> Any:
        return (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    leaves = jax.tree.leaves(jax.eval_shape(lambda state: jax.tree.map(data, state), state))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def cost_of(program: Any) -> tuple[float, int]:
    """(FLOPs, bytes of temporary memory) of a compiled program; nan and 0 where the backend does
    not tell.

    The compiler's own count takes the body of a loop once; the matrix products and convolutions of
    its other trips are added, with the zeros around images, which it leaves out.
    """
    analysis = program.cost_analysis() or {}
    memory = program.memory_analysis()
    flops = float(analysis.get("flops", float("nan"))) + loop_flops(program.as_text())
    return flops, int(getattr(memory, "temp_size_in_bytes", 0) or 0)


def loop_flops(text: str) -> float:
    """FLOPs of matrix products and convolutions in loops beyond their first trip, from a program's
    text, which the compiler leaves out.
    """
    products, calls, entry = _read(text)
    with_trips, once = _times(calls, entry, True), _times(calls, entry, False)
    return sum(flops * (with_trips[name] - once[name]) for name, flops in products.items())


def _read(text: str) -> tuple[dict[str, float], dict[str, list[tuple[str, int]]], str]:
    """By computation: FLOPs of its own matrix products and convolutions, and (computation, trips)
    of what it calls; and the entry's name.
    """
    products: dict[str, float] = defaultdict(float)
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    shapes: dict[str, list[int]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, shapes = head[2], {}
            entry = name if head[1] else entry
            continue
        if not (found := _INSTRUCTION.match(line)):
            continue
        shape = _SHAPE.match(found[2])
        shapes[found[1]] = [int(size) for size in shape[1].split(",") if size] if shape else []
        if dot := _DOT.search(found[2]):
            contracted = [shapes[dot[1]][int(axis)] for axis in dot[2].split(",") if axis]
            products[name] += 2 * math.prod(shapes[found[1]]) * math.prod(contracted)
        if convolution := _CONVOLUTION.search(found[2]):
            kernel, axes = shapes[convolution[1]], convolution[2]
            taps = math.prod(kernel) / kernel[axes.index("o")]
            if dilated := _DILATION.search(found[2]):  # zeros between the numbers
                taps /= math.prod(int(size) for size in dilated[1].split("x"))
            products[name] += 2 * math.prod(shapes[found[1]]) * taps
        trips = _TRIPS.search(found[2])
        called = _CALLED.findall(found[2])
        if branches := _BRANCHES.search(found[2]):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        calls[name] += [(one, int(trips[1]) if trips else 1) for one in called]
    return products, calls, entry


def _times(calls: dict[str, list[tuple[str, int]]], entry: str, trips: bool) -> dict[str, float]:
    """How often each computation runs for one run of the entry, loops for all their trips or
    once.
    """
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for called, n in calls.get(name, ()):
            visit(called, count * (n if trips else 1))

    visit(entry, 1.0)
    return times


def seconds_per_call(
    call: Callable[[], Any], budget: float = 2.0, at_least: int = 5
) -> list[float]:
    """Seconds of each of many calls: as many as fit the budget in seconds, after one that warms
    up.
    """
    jax.block_until_ready(call())
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < at_least or time.perf_counter() - started < budget:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def matmul_peak(size: int = 2048, dtype: Any = jnp.float32, budget: float = 2.0) -> float:
    """The best rate of a product of square matrices of normal numbers on this machine, in FLOP/s:
    what shares of the peak refer to. (Of equal numbers a card's clock would be higher.)
    """
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    once = min(seconds_per_call(lambda: product(a, b), 0.0))
    n = math.ceil(0.02 / once)  # a card waits between products that are asked for one by one

    def several() -> Any:
        for _ in range(n):
            last = product(a, b)
        return last

    return 2 * size**3 * n / min(seconds_per_call(several, budget))


def stepper(
    step: Callable[[TrainState, Batch], Any], state: TrainState, batch: Any
) -> Callable[[], Any]:
    """A call that advances a state in place, for timing a step that donates it."""
    box = [state]

    def call() -> Any:
        box[0], metrics = step(box[0], batch)
        return metrics

    return call


def step_cost(
    recipe: Recipe,
    budget: float = 5.0,
    on: Trained | None = None,
    mesh: Mapping[str, int] | None = None,
) -> StepCost:
    """Measure one optimiser step per dispatch of a recipe, on random data of its spec and batch
    size.

    The time is the median over calls; the share of the peak is FLOPs / seconds over the rate of a
    large matrix product, in float32 on a CPU and in bfloat16 on an accelerator.

    Args:
        recipe: what to measure.
        budget: seconds to spend on the time.
        on: the first stage of a recipe that stands on one.
        mesh: the axes of the devices that share the step; one device unless given.

    Raises:
        ConfigError: for a budget that is no time to wait, and for a mesh that does not fit the
            devices or the batch.
        MemoryExhausted: for a step that does not fit; it is not run.
    """
    check_setting("seconds", budget, Seconds)
    t, spec = training_of(recipe, on)
    batch_size = recipe.schedule.batch_size
    shapes = step_shapes(t, spec, batch_size)
    asked = product_flops(t.step, *shapes)
    check_training(t, jax.random.key(0), spec, batch_size)
    if mesh is not None:
        devices = make_mesh(mesh)
        t, shapes = shard(t, devices), placed(*shapes, devices)
    start = time.perf_counter()
    program = jax.jit(t.step, donate_argnums=0).lower(*shapes).compile()
    compile_seconds = time.perf_counter() - start
    check_program(program, f"A step of {batch_size} examples")
    batch = jax.jit(partial(example_batch, spec), static_argnums=1)(jax.random.key(1), batch_size)
    state = jax.jit(t.init)(jax.random.key(0))
    if mesh is not None:
        where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        state, batch = jax.device_put((state, batch), where)
    in_use = math.prod((mesh or {}).values())
    flops, temporary = cost_of(program)
    size, dtype, parts = 2048, jnp.float32, in_use  # a CPU that is taken for several is one
    if jax.default_backend() != "cpu":
        parts = 1
        flops, size, dtype = asked / in_use, 8192, jnp.bfloat16
    peak = matmul_peak(size, dtype, min(2.0, budget))
    sheet = datasheet_peak(jax.devices()[0].device_kind)
    seconds = statistics.median(seconds_per_call(stepper(program, state, batch), budget))
    return StepCost(
        batch_size=batch_size,
        steps_per_second=1 / seconds,
        examples_per_second=batch_size / seconds,
        milliseconds=1000 * seconds,
        compile_seconds=compile_seconds,
        flops=flops,
        temporary_bytes=temporary,
        share_of_peak=parts * flops / seconds / peak,
        peak_gflops=peak / 1e9,
        product=f"{size} x {size} {jnp.dtype(dtype).name}",
        product_flops=asked,
        share_of_datasheet=asked / seconds / in_use / sheet if sheet else None,
        steps_of_sequences=batch_size * spec.shape[0] if spec.step else 0,
    )
