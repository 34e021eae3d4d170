"""Networks of a user's own: a Flax module in the place of one that is here.

Most families call their networks as functions of parameters and inputs alone. The players of a GAN
are told whether they train, and may keep statistics of batches. What else keeps a state, or draws
random numbers in its call, is refused, with what to do instead.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.protocol import Key, Params, State

EXAMPLES = 3  # in a batch to try a network on


@runtime_checkable
class Network(Protocol):
    """A `flax.linen` module (the object), or a `flax.nnx` module's class, or any function (rngs) ->
    `nnx.Module`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Call(NamedTuple):
    """How a family calls a network.

    Attributes:
        what: what the network is, for messages: "the net of a diffusion model".
        inputs: name and shape of each input without the batch axis, bool where the name is
            "dropped"; in their order.
        output: the shape of the result without the batch axis.
        trains: whether it is called with `train` True in losses and False elsewhere, if it takes
            such an argument; then it may have a state, which moves where it is True.
    """

    what: str
    inputs: Sequence[tuple[str, tuple[int, ...]]]
    output: tuple[int, ...]
    trains: bool = False

    def __str__(self) -> str:
        given = ", ".join(f"{name} {_shown(shape)}" for name, shape in self.inputs)
        return f"({given}) -> {_shown(self.output)}"


def _shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, ('n', *shape)))}]"


def own_net(network: Net | Network, call: Call, dtype: str = "float32") -> Net:
    """A `Net` of whatever a user gives, tried on inputs of the shapes that it will be called with.
    A `Net` is taken as it is, and must take `train` where the call has it.

    Args:
        network: see `Network`.
        call: how it is called.
        dtype: of the arithmetic of an `nnx` module; a `linen` module has its own.

    Raises:
        ConfigError: for what is no network; one that cannot be called so or returns another shape;
            and one that keeps statistics of batches or draws random numbers.
    """
    if isinstance(network, Net):
        return network
    name = getattr(network, "__name__", type(network).__name__)
    with _explained(name, call):
        net = _net_of(network, name, call, dtype)
        told = call.trains and _takes_train(network)
        params, state = jax.eval_shape(net.init, jax.random.key(0))
        if jax.tree.leaves(state) and not told:
            raise ConfigError(_with_state(name, call))
        found = _tried(net, name, call, told, params, state)
    _check_output(found, name, call)
    return net if told or not call.trains else _untold(net)


def check_net(net: Net, call: Call, names: Sequence[str]) -> None:
    """Refuse a `Net` of one's own that keeps a state or returns another shape, which might pass
    where values are broadcast. Of the inputs `names` those that the call lacks are None. A net may
    be of another dtype than float32, so that those mix here.

    Raises:
        ConfigError: see above, and for one that fails.
    """
    given = dict(zip((name for name, _ in call.inputs), _inputs(call), strict=True))
    inputs = [given.get(name) for name in names]
    with _explained("The Net", call), jax.numpy_dtype_promotion("standard"):
        params, state = jax.eval_shape(net.init, jax.random.key(0))
        if jax.tree.leaves(state):
            raise ConfigError(_with_state("The Net", call))
        found, _ = jax.eval_shape(lambda p: net.apply(p, {}, *inputs), params)
    _check_output(found, "The Net", call)


def _check_output(found: Any, name: str, call: Call) -> None:
    shape = getattr(found, "shape", None)
    if shape != (EXAMPLES, *call.output):
        raise ConfigError(
            f"{name} must be {call}; it returns "
            f"{type(found).__name__ if shape is None else _shown(tuple(shape[1:]))}."
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ConfigError(f"{name} must return real numbers; it returns {found.dtype}.")


def _with_state(name: str, call: Call) -> str:
    without = "a normalisation without, such as LayerNorm, GroupNorm or RMSNorm."
    keeps = f"{name} keeps a state (statistics of batches?)"
    if not call.trains:
        return f"{keeps}, and {call.what} has none. Take {without}"
    return (
        f"{keeps}, and does not know when to move it. Give its call an argument `train`, as in "
        f"BatchNorm(..., use_running_average=not train); or take {without}"
    )


def _tried(net: Net, name: str, call: Call, told: bool, params: Params, state: State) -> Any:
    """The shape of what a network returns."""
    found = None
    for how in ({"train": True}, {"train": False}) if told else ({},):
        found, after = jax.eval_shape(
            lambda p, s, how=how: net.apply(p, s, *_inputs(call), **how), params, state
        )
        if _shapes(after) != _shapes(state):
            raise ConfigError(
                f"{name} changed the structure of its state in a call (does it use `sow`?): return "
                "the value instead."
            )
    return found


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _takes_train(network: Any) -> bool:
    """Whether a network's call has an argument `train`."""
    from flax import linen, nnx

    module: Any = network if inspect.isclass(network) else type(network)
    if not issubclass(module, linen.Module | nnx.Module):
        build: Any = functools.partial(network)
        module = type(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    return "train" in inspect.signature(module.__call__).parameters


def _untold(net: Net) -> Net:
    """A network that is not told whether it trains."""

    def apply(params: Params, state: State, *args: Any, train: bool) -> tuple[Any, State]:
        return net.apply(params, state, *args)

    return Net(net.init, apply)


def _inputs(call: Call) -> list[jax.Array]:
    kinds = {"dropped": jnp.bool_}
    return [
        jnp.zeros((EXAMPLES, *shape), kinds.get(name, jnp.float32)) for name, shape in call.inputs
    ]


def _net_of(network: Any, name: str, call: Call, dtype: str) -> Net:
    from flax import linen, nnx

    if inspect.isclass(network) and issubclass(network, linen.Module):
        raise ConfigError(f"{name} is a class: give an object of it, {name}(...).")
    if isinstance(network, linen.Module):
        return _in_float32(_linen(network, name, call))
    if isinstance(network, nnx.Module):
        raise ConfigError(
            f"{name} is a module that has its weights already, and a model makes its own from a "
            f"key: give the class, or a function: lambda rngs: {name}(..., rngs=rngs)."
        )
    if not callable(network):
        raise ConfigError(
            f"{call.what} must be a Flax module: an object of a linen.Module, the class of an "
            f"nnx.Module, or a function (rngs) -> nnx.Module; got {network!r:.80}."
        )
    build: Any = functools.partial(network)
    return _in_float32(functional(build, dtype))


def _in_float32(net: Net) -> Net:
    """The network with results of at least 32 bits, whatever it computes in, so that losses are."""

    def wide(leaf: Any) -> Any:
        narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(jnp.float32) if narrow else leaf

    def apply(params: Params, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        y, state = net.apply(params, state, *args, **kwargs)
        return jax.tree.map(wide, y), state

    return Net(net.init, apply)


def _linen(module: Any, name: str, call: Call) -> Net:
    """A `linen` module as two functions; its state is what is no parameter."""
    how = {"train": False} if call.trains and _takes_train(module) else {}

    def init(key: Key) -> tuple[Params, State]:
        found = dict(module.init(key, *_inputs(call), **how))
        params = found.pop("params", {})
        return params, found

    def apply(params: Params, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        variables = {"params": params, **state}
        if state and kwargs.get("train"):
            return module.apply(variables, *args, mutable=list(state), **kwargs)
        return module.apply(variables, *args, **kwargs), state

    return Net(init, apply)


@contextlib.contextmanager
def _explained(name: str, call: Call) -> Iterator[None]:
    """Whatever a user's network raises as it is tried, with how it is called."""
    try:
        yield
    except Exception as error:
        reason = str(error).split("\n")[0]
        drawn = "random state" in reason or "no `rngs` argument" in reason
        if drawn or type(error).__name__ == "InvalidRngError":
            raise ConfigError(
                f"{name} draws random numbers in its call (dropout?), and {call.what} is a "
                "function of its parameters and inputs alone. Leave them out: Dropout(rate, "
                "deterministic=True)."
            ) from error
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{name} is called as {call}, which failed: {type(error).__name__}: {reason}"
        ) from error


def given_only(net: Net) -> Net:
    """A network of one's own, which is called without the inputs that are None."""

    def apply(params: Params, state: State, *args: Any, **how: Any) -> tuple[Any, State]:
        return net.apply(params, state, *(arg for arg in args if arg is not None), **how)

    return Net(net.init, apply)


def trimmed(net: Net, guided: bool) -> Net:
    """A denoiser (x, noise level, cond, dropped) of one's own, which is called without the
    condition of an unconditional model, and without `dropped` where it is not guided.
    """
    own = given_only(net)

    def apply(
        params: Params, state: State, x: Any, level: Any, c: Any = None, dropped: Any = None
    ) -> tuple[Any, State]:
        if guided and dropped is None:
            dropped = jnp.zeros(x.shape[:1], jnp.bool_)
        return own.apply(params, state, x, level, c, dropped if guided else None)

    return Net(net.init, apply)


def separate(net: Net, width: int, conditional: bool) -> Net:
    """A decoder (z, cond) of one's own, for a family that has both in one vector."""

    def apply(params: Params, state: State, both: Any) -> tuple[Any, State]:
        given = (both[..., :width], both[..., width:]) if conditional else (both,)
        return net.apply(params, state, *given)

    return Net(net.init, apply)


def batch_statistics(net: Net) -> bool:
    """Whether a network keeps means and variances of batches, which couple its examples."""
    state = jax.eval_shape(net.init, jax.random.key(0))[1]
    names = {
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    }
    return {"mean", "var"} <= names


def judging(net: Net) -> Net:
    """A discriminator of one's own, which has a logit and no auxiliary task."""

    def apply(params: Params, state: State, *args: Any, **how: Any) -> tuple[Any, State]:
        logit, after = net.apply(params, state, *args, **how)
        return (logit, None), after

    return Net(net.init, apply)
