"""Muon (Jordan 2024): matrices take steps of orthogonal directions, everything else Adam's."""

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError
from genjax.learning.labels import Labels, labels_of, layouts_of
from genjax.protocol import PyTree

if TYPE_CHECKING:
    import optax

# The last layer is left to Adam, as embeddings are (Jordan 2024): by its name, or by its label
# "matrix:readout".
READOUT = re.compile(r"(^|/)readout(/|$)")
SHARES = re.compile(r"\d+(,\d+)*", re.ASCII)
# Of an orthogonal step times the root of the larger dimension: that of Adam's usual steps, so that
# one step size fits both (Liu 2025, equation 4).
RMS = 0.2


def scale_by_muon_or_adam(
    b1: Any, b2: Any, labels: Labels = (), player: str | None = None
) -> "optax.GradientTransformation":
    """Directions of steps, to be multiplied by the step size and subtracted.

    A matrix G [in, out] takes 0.2 sqrt(max(in, out)) U Vᵀ, where U S Vᵀ is the singular value
    decomposition of its momentum (with Nesterov's correction), by five Newton-Schulz iterations,
    whose singular values are near 1 and not 1. Kernels of convolutions [height, width, in, out] are
    matrices [height width in, out]. Where a label says that a network has fused several matrices,
    such as the gates of a recurrent layer, or stacked them, each is one. Vectors, embeddings,
    readouts and what has a label of its own take Adam's.

    Args:
        b1: the decay of both momenta.
        b2: the decay of Adam's second moment.
        labels, player: as of `labels_of`.
    """
    import optax
    from optax import contrib

    kinds = functools.partial(kinds_of, labels=tuple(labels), player=player)

    def dimensions(params: PyTree) -> PyTree:
        # What is not Muon's is masked, and no array.
        return jax.tree.map(_dimensions, params)

    muon = optax.chain(
        contrib.scale_by_muon(beta=b1, weight_dimension_numbers=dimensions), _scale_by_shape()
    )
    layouts = functools.partial(layouts_of, labels=tuple(labels), player=player)
    rules: Any = {"muon": _by_parts(muon, layouts), "adam": optax.scale_by_adam(b1, b2)}
    return optax.partition(rules, kinds)


def kinds_of(params: PyTree, labels: Labels = (), player: str | None = None) -> PyTree:
    """ "muon" or "adam" for each parameter of a player.

    Example:
        >>> import numpy as np
        >>> from genjax.learning.muon import kinds_of
        >>> kinds_of({"bias": np.zeros(2), "kernel": np.zeros((3, 2))})
        {'bias': 'adam', 'kernel': 'muon'}
    """

    def kind(path: Any, leaf: jax.Array, label: str, layout: str) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        last = layout == "readout" or READOUT.search(name)
        return "muon" if label == "matrix" and jnp.ndim(leaf) > 1 and not last else "adam"

    labels = tuple(labels)
    found = (of(params, labels, player) for of in (labels_of, layouts_of))
    return jax.tree_util.tree_map_with_path(kind, params, *found)


def _by_parts(
    tx: "optax.GradientTransformation", layouts: Callable[[PyTree], PyTree]
) -> "optax.GradientTransformation":
    """A chain that begins with Muon, over the matrices that parameters consist of. Its momenta are
    kept as the parameters are.
    """
    import optax

    def init(params: PyTree) -> Any:
        jax.eval_shape(functools.partial(_in_parts, layouts=layouts), params)  # refused now
        return tx.init(params)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        muon, others = state[0], state[1:]
        before: Any = (muon._replace(mu=_in_parts(muon.mu, layouts)), *others)
        found: Any = tx.update(_in_parts(updates, layouts), before)
        parts, after = found
        mu = _joined(after[0].mu, updates, layouts)
        return _joined(parts, updates, layouts), (after[0]._replace(mu=mu), *after[1:])

    return optax.GradientTransformation(init, update)


def _in_parts(tree: PyTree, layouts: Callable[[PyTree], PyTree]) -> list[list[jax.Array]]:
    """The matrices of each leaf.

    Raises:
        ConfigError: for a layout that is none, or does not fit the leaf.
    """
    named = jax.tree_util.tree_leaves_with_path(layouts(tree))
    return [
        _matrices(leaf, layout, jax.tree_util.keystr(path, simple=True, separator="/"))
        for leaf, (path, layout) in zip(jax.tree.leaves(tree), named, strict=True)
    ]


def _matrices(leaf: jax.Array, layout: str, name: str) -> list[jax.Array]:
    if not layout:
        return [leaf]
    shape: Any = leaf.shape
    if layout == "each" and len(shape) > 2:
        return list(leaf)
    shares = [int(one) for one in layout.split(",")] if SHARES.fullmatch(layout) else [0]
    whole = sum(shares)
    if min(shares) < 1 or shape[-1] % whole:
        raise ConfigError(
            f"{name} {list(shape)} is labelled 'matrix:{layout}': expected 'matrix:2,1,1', shares "
            "of its last axis that divide it, or 'matrix:each' with 3 axes or more."
        )
    cuts = [sum(shares[: i + 1]) * (shape[-1] // whole) for i in range(len(shares) - 1)]
    return jnp.split(leaf, cuts, axis=-1)


def _joined(
    parts: list[list[jax.Array]], like: PyTree, layouts: Callable[[PyTree], PyTree]
) -> PyTree:
    """The inverse of `_in_parts`."""
    leaves = [
        jnp.stack(one) if layout == "each" else jnp.concatenate(one, axis=-1)
        for one, layout in zip(parts, jax.tree.leaves(layouts(like)), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _dimensions(leaf: Any) -> Any:
    """Which axes of a kernel are what goes in: all but the last."""
    from optax import contrib

    last = jnp.ndim(leaf) - 1
    return contrib.MuonDimensionNumbers(tuple(range(last)), (last,))


def _scale_by_shape() -> "optax.GradientTransformation":
    import optax

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        def scaled(leaf: jax.Array) -> jax.Array:
            largest = max(leaf.size // leaf.shape[-1], leaf.shape[-1])
            return leaf * jnp.asarray(RMS * largest**0.5, leaf.dtype)

        return jax.tree.map(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
