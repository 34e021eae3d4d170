"""Meshes and rules: how a training state and its batches lie on many devices.

    mesh = make_mesh({"data": 2, "fsdp": 4})
    sharded = shard(training(model, tx), mesh)           # the same step on 8 devices
    mesh = make_mesh({"data": 4, "tensor": 2})           # of a Transformer or a DiT
    split = shard(training(model, tx), mesh)

A mesh has some of four axes. `data` splits the batch and keeps the state whole on every device;
`fsdp` splits the batch too, and with it every array of the state (parameters, moments, averages);
`tensor` splits what the rules say, so that one example's arithmetic is shared; `member` splits the
members of an ensemble. Values equal those of one device to rounding: only the layout is named here,
and the compiler puts in the sums and gathers that it takes (Xu 2021, GSPMD).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genjax.errors import ConfigError, expect
from genjax.protocol import Key, Metrics, PyTree, Training, TrainState
from genjax.settings import is_size

AXES = {
    "member": "the members of an ensemble",
    "data": "the batch",
    "fsdp": "the batch and the state",
    "tensor": "what the rules say",
}
Rules = Sequence[tuple[str, PartitionSpec]] | Mapping[str, PartitionSpec]

# Of a block of attention and a perceptron, as the Transformer and the DiT have them: the heads and
# the hidden units are split, so that each half of a block needs one sum over the devices (Shoeybi
# 2019, section 3). Kernels have their longer axis last.
TENSOR_RULES: Rules = (
    (r"(qkv|up)/(kernel|bias)$", PartitionSpec("tensor")),
    (r"attention/out/kernel$", PartitionSpec("tensor", None)),
    (r"down/kernel$", PartitionSpec("tensor")),
)


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first devices: {"data": 2, "fsdp": 4} takes eight.

    Raises:
        ConfigError: for an axis that does not exist, a size below 1, more devices than there are,
            or, where there are several processes, fewer.

    Example:
        >>> from genjax import make_mesh
        >>> dict(make_mesh({"data": 1}).shape)
        {'data': 1}
    """
    for name, size in axes.items():
        if name not in AXES:
            known = ", ".join(f"{axis} ({what})" for axis, what in AXES.items())
            raise ConfigError(f"A mesh has no axis {name!r}. There are: {known}.")
        if size < 1:
            raise ConfigError(f"The axis {name} of a mesh must have at least 1 device; got {size}.")
    found = list(jax.devices() if devices is None else devices)
    need = math.prod(axes.values())
    if need > len(found):
        advice = f"Give a smaller one, such as data={len(found)}."
        if all(device.platform == "cpu" for device in found):
            advice = (
                f"XLA_FLAGS=--xla_force_host_platform_device_count={need} makes a CPU look like "
                f"{need} of them, to try it."
            )
        raise ConfigError(
            f"The mesh {describe(axes)} takes {need} devices; there are {len(found)}. {advice}"
        )
    if devices is None and need < len(found) and jax.process_count() > 1:
        raise ConfigError(
            f"The mesh {describe(axes)} takes {need} devices; the {jax.process_count()} processes "
            f"have {len(found)} between "
            f"them, and each must take part with all of its own. Give a mesh of {len(found)}, such "
            f"as data={len(found)}."
        )
    ordered = {name: axes[name] for name in AXES if name in axes}
    return Mesh(np.asarray(found[:need]).reshape(tuple(ordered.values())), tuple(ordered))


def parse_mesh(text: str) -> dict[str, int]:
    """The axes that "data=4,fsdp=2" names.

    Raises:
        ConfigError: for a text of another form.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not is_size(size) or name in axes:
            raise ConfigError(f"A mesh is written as data=4,fsdp=2, each axis once; got {text!r}.")
        axes[name] = int(size)
    return axes


def describe(axes: Mapping[str, int]) -> str:
    """A mesh's shape in words: data=4,fsdp=2."""
    return ",".join(f"{name}={size}" for name, size in axes.items())


def layout(state: PyTree, mesh: Mesh, rules: Rules | None = None) -> PyTree:
    """Where each array of a TrainState lies: a NamedSharding for every leaf.

    The first rule whose pattern is found in the leaf's path
    ("params/transformer/blocks/0/attention/qkv/kernel") gives the axes of the mesh along the leaf's
    last dimensions. An optimiser's arrays have their parameter's path and so its layout. Under
    `fsdp` the longest dimension that is left and can be divided is split too; under `member` the
    first one.

    Args:
        state: arrays, or their shapes from `jax.eval_shape`; with `member`, that of an ensemble.
        mesh: see `make_mesh`.
        rules: (regular expression, PartitionSpec), pairs or a mapping, the first that matches
            counts; `TENSOR_RULES` unless given, where the mesh has `tensor`.

    Raises:
        ConfigError: for a mesh of other axes, a rule that matches no parameter, names an axis that
            the mesh lacks, or splits a dimension that its axis does not divide.
    """
    _check_mesh(mesh)
    pairs = _pairs(rules, mesh)

    def one(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*_entries(_name(path), leaf, mesh, pairs)))

    found = jax.tree_util.tree_map_with_path(one, state)
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    names = [name for name in paths if name.startswith("params/")]
    used = [_rule(name, pairs) for name in names]
    for rule in pairs:
        if rule not in used:
            raise ConfigError(
                f"The rule {rule[0]!r} matches no parameter. There are, among others: "
                f"{', '.join(names[:5])}."
            )
    return found


def _pairs(rules: Rules | None, mesh: Mesh) -> tuple[tuple[str, PartitionSpec], ...]:
    """The rules as pairs, each of them over axes that the mesh has."""
    if rules is None:
        rules = TENSOR_RULES if "tensor" in mesh.shape else ()
    pairs = tuple(rules.items() if isinstance(rules, Mapping) else rules)
    for pattern, spec in pairs:
        for axis in (name for entry in spec if entry for name in _names(entry)):
            if axis not in mesh.shape:
                raise ConfigError(
                    f"The rule {pattern!r} splits over {axis!r}; the mesh is "
                    f"{describe(mesh.shape)}."
                )
    return pairs


def _rule(name: str, pairs: Sequence[tuple[str, PartitionSpec]]) -> tuple[str, Any] | None:
    """The first rule that matches a path."""
    return next((pair for pair in pairs if re.search(pair[0], name)), None)


def _entries(
    name: str, leaf: Any, mesh: Mesh, pairs: Sequence[tuple[str, PartitionSpec]]
) -> list[Any]:
    """The axes of the mesh along each dimension of one array."""
    if name == "step":  # which the members of an ensemble share
        return []
    entries: list[Any] = [None] * leaf.ndim
    if "member" in mesh.shape:
        _check_members(name, leaf, mesh.shape["member"])
        entries[0] = "member"
    begin = entries.count("member")
    pattern, spec = _rule(name, pairs) or ("", ())
    start = leaf.ndim - len(spec)
    fits = start >= begin and all(
        leaf.shape[start + i] % _size(mesh, entry) == 0 for i, entry in enumerate(spec)
    )
    if not fits and name.startswith("params/"):
        raise ConfigError(
            f"The rule {pattern!r} splits {name}, of shape {list(leaf.shape)}, as {tuple(spec)} "
            f"over a mesh {describe(mesh.shape)}, which does not divide it."
        )
    if fits:  # an optimiser may keep something of another shape for a parameter
        entries[start:] = spec
    if "fsdp" in mesh.shape and not any("fsdp" in _names(entry) for entry in entries):
        _split_longest(entries, leaf.shape, mesh.shape["fsdp"])
    return entries


def _split_longest(entries: list[Any], shape: Sequence[int], size: int) -> None:
    """Give "fsdp" the longest dimension that is left and that it divides, if there is one."""
    free = [
        i for i, entry in enumerate(entries) if entry is None and shape[i] and shape[i] % size == 0
    ]
    if free:
        entries[max(free, key=lambda i: shape[i])] = "fsdp"


def shard(
    t: Training, mesh: Mesh, rules: Rules | None = None, batch_spec: PartitionSpec | None = None
) -> Training:
    """The same step on many devices: the state lies as `layout` says, and a batch is split over
    `data` and `fsdp`.

    The result equals that of one device to rounding.

    Args:
        t: what to run; with a `member` axis, an ensemble.
        mesh: see `make_mesh`.
        rules: what `tensor` splits; see `layout`.
        batch_spec: of a batch's first dimensions, where they are others: PartitionSpec("member",
            "data") for an ensemble whose members have batches of their own.

    Raises:
        ConfigError: as `layout` does, and for a batch that its axes do not divide.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, make_mesh, shard, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,))
        >>> t = shard(training(model, optax.adam(1e-3)), make_mesh({"data": 1}))
        >>> ts = jax.jit(t.init)(jax.random.key(0))
        >>> int(jax.jit(t.step)(ts, example_batch(model.spec, jax.random.key(1), 8))[0].step)
        1
    """
    expect("shard", t, Training)
    _check_mesh(mesh)
    spec = batch_spec_of(mesh) if batch_spec is None else batch_spec

    def place(ts: TrainState) -> TrainState:
        return jax.lax.with_sharding_constraint(ts, layout(ts, mesh, rules))

    def init(key: Key) -> TrainState:
        return place(t.init(key))

    def step(ts: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        new, metrics = t.step(place(ts), _split(batch, mesh, spec))
        return place(new), metrics

    def prepare(ts: TrainState, batch: Any) -> TrainState:
        return place(t.prepare(place(ts), _split(batch, mesh, spec)))  # type: ignore[misc]

    members = t.within

    def within(f: Callable[[Training], Training], steps: int = 0) -> Training:
        several = PartitionSpec(*[None] * steps, *spec)
        return shard(members(f, steps), mesh, rules, several)  # type: ignore[misc]

    return t._replace(
        init=init,
        step=step,
        rewrap=lambda wrap: shard(t.rewrap(wrap), mesh, rules, batch_spec),
        within=None if members is None else within,
        prepare=None if t.prepare is None else prepare,
    )


def _split(batch: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """A batch over the devices of a mesh."""
    for leaf in jax.tree.leaves(batch):
        for size, entry in zip(leaf.shape, spec, strict=False):
            if size % _size(mesh, entry):
                raise ConfigError(
                    f"A batch of {size} does not divide over the {_size(mesh, entry)} devices of "
                    f"the mesh's {' x '.join(_names(entry))}. Take a multiple; if {size} counts "
                    "steps, or a whole data set, shard what is given one batch: "
                    "scan_steps(shard(t, mesh)), feed(shard(t, mesh), batch_at)."
                )
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, spec))


def batch_spec_of(mesh: Mesh) -> PartitionSpec:
    """Where a batch lies: its first dimension is split over `data` and `fsdp`, as far as the mesh
    has them.
    """
    return PartitionSpec(tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape) or None)


def _check_mesh(mesh: Mesh) -> None:
    if unknown := [axis for axis in mesh.shape if axis not in AXES]:
        raise ConfigError(
            f"The mesh has an axis {unknown[0]!r}; those of a training are {', '.join(AXES)}."
        )


def _check_members(name: str, leaf: Any, size: int) -> None:
    if leaf.ndim == 0:
        raise ConfigError(
            f"The mesh has {size} devices to share members; {name} has the shape [], as of a "
            "training without members. Share its batch with data in the place of member; only an "
            "ensemble has members: in Python shard(ensemble(t), mesh)."
        )
    if leaf.shape[0] % size:
        raise ConfigError(
            f"The mesh has {size} devices to share members; {name} has the shape "
            f"{list(leaf.shape)}, whose first dimension "
            f"should be members, a multiple of {size}. Shard an ensemble of so many."
        )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _size(mesh: Mesh, entry: Any) -> int:
    """How many parts an entry of a PartitionSpec makes of a dimension."""
    return math.prod(mesh.shape[axis] for axis in _names(entry))
