"""What a compiled program does and needs, by the compiler's own analysis, with loops counted as often as they run."""

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

from genjax.measure import cost_of

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_DOT = re.compile(r"\bdot\([^%]*%([\w.\-]+),.*lhs_contracting_dims=\{([\d,]*)\}")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Cost(NamedTuple):
    """A compiled program.

    Attributes:
        flops: floating-point operations, matrix products in loops counted for every trip, the rest of a loop once.
        bytes_accessed: bytes read and written, as the compiler counts them, loops once.
        temporary_bytes: temporary memory at its peak.
        argument_bytes: memory of the arguments, such as the training state.
    """

    flops: float
    bytes_accessed: float
    temporary_bytes: int
    argument_bytes: int


def cost(program: Any) -> Cost:
    """The cost of a compiled program; nan and 0 where the backend does not tell."""
    flops, temporary = cost_of(program)
    memory = program.memory_analysis()
    return Cost(
        flops=flops + loop_flops(program.as_text()),
        bytes_accessed=float((program.cost_analysis() or {}).get("bytes accessed", math.nan)),
        temporary_bytes=temporary,
        argument_bytes=int(getattr(memory, "argument_size_in_bytes", 0) or 0),
    )


def loop_flops(text: str) -> float:
    """FLOPs of matrix products in loops beyond their first trip, from a program's text, which the compiler leaves out."""
    products, calls, entry = _read(text)
    with_trips, once = _times(calls, entry, True), _times(calls, entry, False)
    return sum(flops * (with_trips[name] - once[name]) for name, flops in products.items())


def _read(text: str) -> tuple[dict[str, float], dict[str, list[tuple[str, int]]], str]:
    """By computation: FLOPs of its own matrix products, and (computation, trips) of what it calls; and the entry's name."""
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
        trips = _TRIPS.search(found[2])
        called = _CALLED.findall(found[2])
        if branches := _BRANCHES.search(found[2]):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        calls[name] += [(one, int(trips[1]) if trips else 1) for one in called]
    return products, calls, entry


def _times(calls: dict[str, list[tuple[str, int]]], entry: str, trips: bool) -> dict[str, float]:
    """How often each computation runs for one run of the entry, loops for all their trips or once."""
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for called, n in calls.get(name, ()):
            visit(called, count * (n if trips else 1))

    visit(entry, 1.0)
    return times
