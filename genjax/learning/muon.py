"""Muon (Jordan 2024): matrices take steps of orthogonal directions, everything else Adam's."""

import functools
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from genjax.learning.labels import Labels, labels_of
from genjax.protocol import PyTree

if TYPE_CHECKING:
    import optax

# The last layer before a distribution is left to Adam, as embeddings are (Jordan 2024).
READOUT = re.compile(r"(^|/)readout(/|$)")
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
    matrices [height width in, out]. Matrices that a network has fused, such as the gates of a
    recurrent layer, are one. Vectors, embeddings, readouts and what has a label of its own take
    Adam's.

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
    rules: Any = {"muon": muon, "adam": optax.scale_by_adam(b1, b2)}
    return optax.partition(rules, kinds)


def kinds_of(params: PyTree, labels: Labels = (), player: str | None = None) -> PyTree:
    """ "muon" or "adam" for each parameter of a player.

    Example:
        >>> import numpy as np
        >>> from genjax.learning.muon import kinds_of
        >>> kinds_of({"bias": np.zeros(2), "kernel": np.zeros((3, 2))})
        {'bias': 'adam', 'kernel': 'muon'}
    """

    def kind(path: Any, leaf: jax.Array, label: str) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matrix = label == "matrix" and jnp.ndim(leaf) > 1 and not READOUT.search(name)
        return "muon" if matrix else "adam"

    found = labels_of(params, labels, player)
    return jax.tree_util.tree_map_with_path(kind, params, found)


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
