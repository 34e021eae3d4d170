"""The only place that splits and merges NNX modules: a module's builder in, two pure functions over
plain dicts out.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import by_name
from genjax.errors import ConfigError
from genjax.protocol import Key, Params, PyTree, State

if TYPE_CHECKING:
    from flax import nnx


class Net(NamedTuple):
    """A network as pure functions over plain nested dicts.

    Attributes:
        init: (key) -> (params, state), `state` being every variable that is not an `nnx.Param`,
            such as batch statistics.
        apply: (params, state, *args, **kwargs) -> (output, state). Leaves are matched by name with
            those of `init`; any other tree is refused, with the paths that differ.
    """

    init: Callable[[Key], tuple[Params, State]]
    apply: Callable[..., tuple[Any, State]]


def _cast(tree: Any, dtype: Any) -> Any:
    def cast(leaf: Any) -> Any:
        # Python numbers take on the dtype of what they meet, and other arguments (names, flags)
        # have none.
        real = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if real else leaf

    return jax.tree.map(cast, tree)


def _matched(given: PyTree, wanted: PyTree, what: str) -> PyTree:
    """The leaves of a tree in the structure that is wanted: `nnx.merge` takes them by position."""
    if jax.tree.structure(given) == jax.tree.structure(wanted):
        pairs = zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True)
        if all(leaf.shape == other.shape for leaf, other in pairs):
            return given  # nearly always, and it takes a while to spell out the names of many
    return by_name(given, wanted, what)


def _refuse(module: "nnx.Module", name: str) -> None:
    from flax import nnx

    shared = nnx.find_duplicates(module)
    if shared:
        paths = " and ".join(".".join(map(str, path)) for path in shared[0])
        raise ConfigError(
            f"{name} shares one variable between {paths}: tie weights by passing the value, not "
            "the reference."
        )
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if isinstance(variable, nnx.RngState):
            where = ".".join(map(str, path))
            raise ConfigError(
                f"{name} stores random state at {where}, which would hide randomness inside a "
                "model. Build the layer "
                "without rngs (nnx.Dropout(rate)) and pass the key as a call argument; write "
                "recurrence with jax.lax.scan."
            )


def functional(
    build: "Callable[..., nnx.Module]", dtype: str | None = None, wide: Collection[str] = ()
) -> Net:
    """Turn `build(*, rngs) -> nnx.Module` into a `Net`.

    Whether a call trains or evaluates is a call argument of the module; nothing of NNX leaves this
    function.

    Args:
        build: makes the module; every array that it creates must be an nnx.Variable.
        dtype: compute in this dtype, such as "bfloat16": parameters and floating-point arguments
            are cast on the way in and outputs to float32 on the way out, so parameters, statistics
            and losses stay float32. None changes nothing.
        wide: positional arguments of the module's methods, by name, that are not cast: what the
            module brings to a scale of its own first, before which narrow numbers are too coarse.

    Raises:
        ConfigError: for a module that stores rngs, shares a variable by reference, or (at the first
            call) uses `sow` or otherwise changes the structure of its state; and from `apply`, for
            leaves that are missing, surplus, renamed or of another shape.

    Example:
        >>> import jax
        >>> from genjax.nets.functional import functional
        >>> from genjax.nets.mlp import MLP
        >>> net = functional(lambda rngs: MLP(3, (8,), 2, rngs=rngs))
        >>> params, state = net.init(jax.random.key(0))
        >>> y, state = net.apply(params, state, jax.numpy.ones((5, 3)))
        >>> y.shape
        (5, 2)
    """
    from flax import nnx

    name = getattr(getattr(build, "func", build), "__name__", "the module")
    try:
        module = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    except ValueError as error:  # with NNX_GRAPH_MODE=false, flax itself refuses a shared variable
        if "aliasing" not in str(error):
            raise
        raise ConfigError(
            f"{name} shares one variable by reference: tie weights by passing the value instead."
        ) from error
    _refuse(module, name)
    graphdef, *wanted = nnx.split(module, nnx.Param, ...)
    wanted_params, wanted_state = map(nnx.to_pure_dict, wanted)

    def init(key: Key) -> tuple[Params, State]:
        _, params, state = nnx.split(build(rngs=nnx.Rngs(key)), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    # Traced once for each shape, however many losses, penalties, turns and transforms call it: the
    # trace, and its derivatives, are what a step spends most of its time on before it is compiled.
    # A Python value is as fixed as the method.
    @functools.partial(jax.jit, static_argnames=("method", "fixed", "tree"))
    def traced(
        params: Params,
        state: State,
        arrays: list[Any],
        method: str,
        fixed: tuple[Any, ...],
        tree: Any,
    ) -> Any:
        args, kwargs = jax.tree.unflatten(
            tree, [leaf if one is None else one for one, leaf in zip(arrays, fixed, strict=True)]
        )
        given = params = _matched(params, wanted_params, f"The tree of parameters of {name}")
        own = _matched(state, wanted_state, f"The state of {name}")
        if dtype is not None and dtype != "float32":
            given = _cast(params, dtype)
        module = nnx.merge(graphdef, given, own)
        if given is not params:
            names = [*inspect.signature(getattr(module, method)).parameters] if wide else []
            whole = [index for index, called in enumerate(names) if called in wide]
            args = [a if i in whole else _cast(a, dtype) for i, a in enumerate(args)]
            kwargs = _cast(kwargs, dtype)
        # Statistics stay float32 in narrow arithmetic, so a normalisation layer mixes the two.
        with (
            jax.numpy_dtype_promotion("standard")
            if given is not params
            else contextlib.nullcontext()
        ):
            output = getattr(module, method)(*args, **kwargs)
        after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))
        if jax.tree.structure(after) != jax.tree.structure(own):
            raise ConfigError(
                f"{name} changed the structure of its state in a call (does it use `sow`?): return "
                "the value instead."
            )
        if given is not params:
            output = _cast(output, jnp.float32)
            after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, own)
        # In the structure that was given, since that of a state never changes.
        return output, _matched(after, state, f"The state of {name}")

    def apply(
        params: Params, state: State, *args: Any, method: str = "__call__", **kwargs: Any
    ) -> tuple[Any, State]:
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [leaf if hasattr(leaf, "dtype") else None for leaf in leaves]
        fixed = tuple(None if hasattr(leaf, "dtype") else leaf for leaf in leaves)
        return traced(params, state, arrays, method=method, fixed=fixed, tree=tree)

    return Net(init, apply)
