"""What a parameter is, for optimisers that treat kinds of parameters differently."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError
from genjax.protocol import PyTree

Labels = Iterable[tuple[str, str]]
# What every optimiser knows. A model may use others, which its optimiser must then be told of.
LABELS = ("matrix", "vector", "embedding", "dynamics")


def labels_of(params: PyTree, labels: Labels = (), player: str | None = None) -> PyTree:
    """The label of each parameter, in the structure of the parameters.

    The first pattern that is found in a leaf's path "player/..." counts. A leaf that no pattern
    names is a "matrix" if it has more than one dimension, else a "vector". What stands behind a
    colon is no part of a label; see `layouts_of`.

    Args:
        params: all players' parameters; or those of one, which is then named.
        labels: `Model.labels`: (regular expression, label).
        player: whose parameters they are.

    Raises:
        ConfigError: for a pattern that is no regular expression.

    Example:
        >>> import numpy as np
        >>> from genjax.learning.labels import labels_of
        >>> params = {"net": {"table": np.zeros((5, 2)), "kernel": np.zeros((2, 3))}}
        >>> labels_of(params, (("table$", "embedding"),))
        {'net': {'kernel': 'matrix', 'table': 'embedding'}}
    """
    return jax.tree.map(base_of, _labelled(params, labels, player))


def layouts_of(params: PyTree, labels: Labels = (), player: str | None = None) -> PyTree:
    """What a label says of each parameter behind its colon, "" where it says nothing.

    "matrix:2,1,1" is three matrices side by side, which share the last axis so; "matrix:each" one
    for each entry of the first axis, as where layers are stacked; "matrix:readout" the last layer,
    which Muon leaves to Adam, and which is a matrix to all else.

    Example:
        >>> import numpy as np
        >>> from genjax.learning.labels import labels_of, layouts_of
        >>> params, labels = {"qkv": np.zeros((2, 6))}, (("qkv$", "matrix:1,1,1"),)
        >>> labels_of(params, labels), layouts_of(params, labels)
        ({'qkv': 'matrix'}, {'qkv': '1,1,1'})
    """
    return jax.tree.map(lambda label: label.partition(":")[2], _labelled(params, labels, player))


def base_of(label: str) -> str:
    """A label without what it says behind a colon."""
    return label.partition(":")[0]


def _labelled(params: PyTree, labels: Labels, player: str | None) -> PyTree:
    patterns = [(_compiled(pattern), label) for pattern, label in labels]

    def label_of(path: Any, leaf: jax.Array) -> str:
        own = jax.tree_util.keystr(path, simple=True, separator="/")
        name = "/".join(part for part in (player, own) if part)
        found = (label for pattern, label in patterns if pattern.search(name))
        return next(found, "matrix" if jnp.ndim(leaf) > 1 else "vector")

    return jax.tree_util.tree_map_with_path(label_of, params)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"The label's pattern {pattern!r} is no regular expression: {error}."
        ) from None
