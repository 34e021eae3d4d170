"""Weights from elsewhere, by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import leaves_by_name
from genjax.errors import ConfigError
from genjax.protocol import Model, Params

# The name of an array, or that and a function of the array, such as `numpy.transpose`.
Origin = str | tuple[str, Callable[[Any], Any]]
MOST = 20


def parameter_names(model: Model) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every parameter of a model, as `import_weights` knows them.

    Example:
        >>> from genjax import DataSpec, parameter_names, vae
        >>> names = parameter_names(vae(DataSpec((2,), "continuous"), hidden=(), latent_dim=1))
        >>> names["vae/encoder/layers/0/kernel"]
        (2, 2)
    """
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in leaves_by_name(params).items()}


def import_weights(
    params: Params, arrays: Mapping[str, Any], names: Mapping[str, Origin] | None = None
) -> Params:
    """Parameters with the values of arrays that are matched by name, in the dtypes of the old.

    PyTorch keeps the kernel of a dense layer as [d_out, d_in]; where `parameter_names` says
    [d_in, d_out], give the name together with `numpy.transpose`. What is needed of PyTorch's GPT-2
    and of its recurrent layers is written already: `genjax.runs.torch_weights`. With the parameters
    `genjax.Run(model, params, state, step=0)` samples and scores.

    Args:
        params: of the model, from its `init`.
        arrays: flat, name -> array; anything that numpy makes an array of.
        names: name of a parameter -> name of its array, or (that name, a function of the array).
            Parameters that are not in it have arrays of their own name. Two parameters may have one
            array.

    Raises:
        ConfigError: for parameters without an array, arrays that no parameter takes, and arrays of
            another shape, of values that a parameter cannot hold, or that are not finite: all of
            them are listed.

    Example:
        >>> import jax, numpy
        >>> from genjax import DataSpec, import_weights, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(), latent_dim=1, scale=1.0)
        >>> params, state = model.init(jax.random.key(0))
        >>> arrays = {"enc.weight": numpy.ones((2, 2)), "enc.bias": numpy.zeros(2),
        ...           "dec.weight": numpy.ones((2, 1)), "dec.bias": numpy.zeros(2)}
        >>> names = {"vae/encoder/layers/0/kernel": ("enc.weight", numpy.transpose),
        ...          "vae/encoder/layers/0/bias": "enc.bias",
        ...          "vae/decoder/layers/0/kernel": ("dec.weight", numpy.transpose),
        ...          "vae/decoder/layers/0/bias": "dec.bias"}
        >>> params = import_weights(params, arrays, names)
        >>> params["vae"]["encoder"]["layers"][0]["kernel"].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    wanted, names = leaves_by_name(params), dict(names or {})
    wrong = [f"{name}: not a parameter of this model" for name in names if name not in wanted]
    taken, found = set(), []
    for name, leaf in wanted.items():
        origin = names.get(name, name)
        source, change = (origin, np.asarray) if isinstance(origin, str) else origin
        if source not in arrays:
            wrong.append(f"{name}: there is no array {source!r} for it")
            continue
        taken.add(source)
        array = np.asarray(change(np.asarray(arrays[source])))
        wrong += _unlike(name, source, array, leaf)
        found.append((array, leaf))
    wrong += [f"{name}: an array that no parameter takes" for name in arrays if name not in taken]
    if wrong:
        more = [f"... and {len(wrong) - MOST} more"] if len(wrong) > MOST else []
        raise ConfigError(
            "These weights do not fit the model:\n  " + "\n  ".join([*wrong[:MOST], *more]) + "\n"
            "genjax.parameter_names(model) has the names and shapes that are wanted; give `names`, "
            "from each to the name of its array, and leave out arrays that belong to nothing."
        )
    leaves = [jnp.asarray(array, leaf.dtype) for array, leaf in found]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _unlike(name: str, source: str, array: np.ndarray, leaf: Any) -> list[str]:
    """What is wrong with an array in the place of a leaf: a line, or none."""
    if array.shape != leaf.shape:
        turned = array.ndim > 1 and array.T.shape == leaf.shape
        hint = f"; give ({source!r}, numpy.transpose)" if turned else ""
        return [
            f"{name}: expected shape {list(leaf.shape)}; {source!r} has {list(array.shape)}{hint}"
        ]
    if not jnp.can_cast(array.dtype, leaf.dtype, "same_kind"):
        return [f"{name}: expected {leaf.dtype}; {source!r} has {array.dtype}"]
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return []
    with np.errstate(over="ignore"):
        kept = array.astype(leaf.dtype)
    if wrong := int((~np.isfinite(kept)).sum()):
        return [
            f"{name}: {wrong} of {array.size} numbers of {source!r} are not finite {leaf.dtype}"
        ]
    return []
