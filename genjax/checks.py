"""What refuses what does not keep the contract: parameters, models, and what they are given.

`checked` holds a model's functions to `protocol.py` at trace time, where it costs nothing once
traced. `settings.py` does the same for the settings that a builder takes.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from genjax.errors import ConfigError, expect
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    DataSpec,
    Key,
    Latent,
    LossFn,
    Model,
    Params,
    PrepareFn,
    PyTree,
    ScoreFn,
    State,
    without_padding,
)
from genjax.values import check_batch as check_batch
from genjax.values import check_cond as check_cond
from genjax.values import check_events as check_events
from genjax.values import check_key as check_key
from genjax.values import check_real as check_real
from genjax.values import check_values as check_values
from genjax.values import known as known
from genjax.values import wide


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf, for every leaf of a tree: "vae/encoder/layers/0/kernel"."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def mismatch(
    given: PyTree, wanted: PyTree, surplus: str = "not of this model", most: int = 8
) -> list[str]:
    """How the names and shapes of a tree differ from what is wanted: a line for each leaf that is
    missing, surplus or of another shape, at most `most` of them; none if they agree.
    """
    found, needed = leaves_by_name(given), leaves_by_name(wanted)
    lines = [f"{name}: missing" for name in needed if name not in found]
    lines += [f"{name}: {surplus}" for name in found if name not in needed]
    for name, leaf in needed.items():
        shape = jnp.shape(found[name]) if name in found else leaf.shape
        if shape != leaf.shape:
            lines.append(f"{name}: expected shape {list(leaf.shape)}; found {list(shape)}")
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"... and {more} more"]


def by_name(given: PyTree, wanted: PyTree, what: str) -> PyTree:
    """The leaves of a tree in the structure that is wanted, matched by their paths.

    Keys that differ in kind only, such as "10" for 10, are the same name.

    Raises:
        ConfigError: for leaves that are missing, surplus or of another shape; it names them.
    """
    if lines := mismatch(given, wanted):
        raise ConfigError(
            f"{what} does not fit this model:\n  " + "\n  ".join(lines) + "\n"
            "Give what the model's own `init` returns, or a tree with the same names and shapes."
        )
    if jax.tree.structure(given) == jax.tree.structure(wanted):
        return given
    found = leaves_by_name(given)
    return jax.tree.unflatten(
        jax.tree.structure(wanted), [found[name] for name in leaves_by_name(wanted)]
    )


def check_kept(tree: PyTree, what: str) -> None:
    """Refuse arrays whose buffers were given away.

    Raises:
        ConfigError: with what to do.
    """
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    if any(leaf.is_deleted() for leaf in arrays if not isinstance(leaf, Tracer)):
        raise ConfigError(
            f"{what} was given to a step that donates it (`compiled` and `donate_argnums` do): the "
            "new state is written in its place, and it is gone. Go on with the state that the step "
            "returned: ts, metrics = t.step(ts, batch). One that is needed later is copied before: "
            "jax.tree.map(jnp.copy, ts)."
        )


def check_model(model: Model) -> None:
    """Refuse what can be seen of a model before it runs: averages and noise that name no player,
    and losses that do not take a step.

    Raises:
        ConfigError: see above.
    """
    expect("training", model, Model)
    players = tuple(model.losses)
    for player, loss in model.losses.items():
        _check_loss(player, loss)
    for entry, (player, decay) in model.follows.items():
        if player not in players:
            raise ConfigError(
                f"follows[{entry!r}] names the player {player!r}; those with a loss are: "
                f"{', '.join(players)}."
            )
        if entry in players:
            raise ConfigError(f"{entry!r} has a loss and cannot follow {player!r} as well.")
        if callable(decay):
            _check_takes_step(entry, decay)
        elif isinstance(decay, str | bool | None) or jnp.ndim(decay):
            raise ConfigError(
                f"The decay of follows[{entry!r}] is a number in [0, 1] or a function of the step; "
                f"got {decay!r}."
            )
        elif not isinstance(decay, Tracer) and not 0 <= decay <= 1:
            raise ConfigError(f"The decay of follows[{entry!r}] must be in [0, 1]; got {decay}.")
    for player in model.noise:
        if player not in players:
            raise ConfigError(
                f"noise names the player {player!r}; those with a loss are: {', '.join(players)}."
            )


def _check_takes_step(entry: str, decay: Callable[..., Any]) -> None:
    try:
        inspect.signature(decay).bind("step")
    except ValueError:  # of some callables it cannot be seen
        return
    except TypeError:
        raise ConfigError(
            f"The decay of follows[{entry!r}] takes {inspect.signature(decay)}; one that changes "
            "is a function of the step alone."
        ) from None


def _check_loss(player: str, loss: LossFn) -> None:
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # of some callables it cannot be seen
        return
    try:
        signature.bind("params", "state", "batch", "key", "step")
    except TypeError:
        raise ConfigError(
            f"The loss of {player!r} takes {signature}; a loss takes (params, state, batch, key, "
            "step). Add `step`, the number of the optimiser step, as its fifth argument."
        ) from None


def checked(model: Model) -> Model:
    """The same model with every argument checked at trace time, and every result held to the
    contract; entries that follow a player are made by `init`, and what lies beyond the length of a
    sequence is seen as 0.

    A builder ends with `return checked(Model(...))`, so that no family writes these checks itself.
    `n` of `sample` must be a Python whole number, because it is a shape.

    Raises:
        ConfigError: for `follows` or `noise` that name no player; and, when they are called, for
            parameters or a state that are not those of `init`, with the paths that differ.
    """
    check_model(model)
    spec = model.spec

    def init(key: Key) -> tuple[Params, State]:
        check_key(key)
        params, state = model.init(key)
        copies = {
            entry: jax.tree.map(jnp.copy, params[player])
            for entry, (player, _) in model.follows.items()
            if entry not in params
        }
        return {**params, **copies}, state

    @functools.cache
    def wanted() -> tuple[Params, State]:
        return jax.eval_shape(init, jax.random.key(0))

    def matched(params: Params, state: State) -> tuple[Params, State]:
        check_kept((params, state), "The state that these parameters are of")
        own, other = wanted()
        return by_name(params, own, "The tree of parameters"), by_name(state, other, "The state")

    def checked_batch(batch: Batch, key: Key) -> Batch:
        check_batch(spec, batch, model.any_length)
        check_key(key)
        return without_padding(spec, batch._replace(x=wide(batch.x), cond=wide(batch.cond)))

    def loss_of(player: str, loss_fn: LossFn) -> LossFn:
        def loss(
            params: Params, state: State, batch: Batch, key: Key, step: Array
        ) -> tuple[Array, Aux]:
            batch = checked_batch(batch, key)
            params, state = matched(params, state)
            value, aux = loss_and_aux(loss_fn(params, state, batch, key, step), player)
            check_per_example(value, aux.metrics, len(batch.x), player)
            _same_kind(aux.state, state)
            return value, aux

        return loss

    def score_of(name: str, score_fn: ScoreFn | None) -> ScoreFn | None:
        if score_fn is None:
            return None

        def score(params: Params, state: State, batch: Batch, key: Key) -> Array:
            batch = checked_batch(batch, key)
            params, state = matched(params, state)
            value = score_fn(params, state, batch, key)
            _per_example(value, len(batch.x), name)
            return value

        return score

    def prepare_of(prepare_fn: PrepareFn | None) -> PrepareFn | None:
        if prepare_fn is None:
            return None

        def prepare(params: Params, state: State, batch: Batch, key: Key) -> tuple[Params, State]:
            batch = checked_batch(batch, key)
            params, state = matched(params, state)
            after = prepare_fn(params, state, batch, key)
            _same_kind(after, (params, state))
            return after

        return prepare

    def sample(
        params: Params, state: State, key: Key, n: int, cond: PyTree | None = None
    ) -> PyTree:
        _check_draws(spec, key, n, cond)
        params, state = matched(params, state)
        x = model.sample(params, state, key, n, cond)
        _of_shape(x, (n, *spec.shape))
        if spec.kind == "tokens" and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ConfigError(
                f"Samples of tokens must be whole numbers, of type int32; sample gave {x.dtype}."
            )
        return x

    return model._replace(
        init=init,
        losses={player: loss_of(player, loss) for player, loss in model.losses.items()},
        sample=sample,
        log_prob=score_of("log_prob", model.log_prob),
        bound=score_of("bound", model.bound),
        prepare=prepare_of(model.prepare),
        latent=None if model.latent is None else _checked_latent(spec, model.latent),
    )


def check_whole(spec: DataSpec, family: str) -> None:
    """Refuse what a family cannot take that sees an event as a whole.

    Raises:
        ConfigError: for tokens, and for sequences of several lengths, whose padding would count.
    """
    if spec.kind == "tokens":
        raise ConfigError(
            f"{family} models binary, discrete or continuous data; got tokens. Use a sequence "
            "family."
        )
    if spec.lengths:
        raise ConfigError(
            f"{family} models whole events; the sequences of {spec.name} have several lengths, and "
            "it would model their padding. Use a sequence family: rnn, vrnn, transformer or ssm."
        )


def _check_draws(spec: DataSpec, key: Key, n: Any, cond: PyTree | None) -> None:
    """Refuse a key that is none, a number of samples that is no shape, and a wrong condition."""
    check_key(key)
    check_count(n)
    check_cond(spec, cond, n)


def check_count(n: Any) -> None:
    """Refuse a number of samples that is no shape.

    Raises:
        ConfigError: see above.
    """
    whole = isinstance(n, int | np.integer) and not isinstance(n, bool)
    if not whole or not 1 <= n < 2**31:
        raise ConfigError(
            "sample needs a whole number n >= 1 of samples, below 2**31 (it is a shape, so not "
            f"traced); got {n!r}."
        )


def _checked_latent(spec: DataSpec, latent: Latent) -> Latent:
    """The same record with what it is given looked at, where it has such a function at all."""
    codes = (None, *latent.spec.shape)

    def of_events(function: Any) -> Any:
        def run(params: Params, state: State, x: Array, cond: PyTree | None = None) -> Any:
            check_events(spec, x)
            check_cond(spec, cond, x.shape[0])
            return function(params, state, wide(x), cond)

        return run

    def decode(params: Params, state: State, z: Array, cond: PyTree | None = None) -> Array:
        check_real(z, codes, "z")
        check_cond(spec, cond, z.shape[0])
        return latent.decode(params, state, z, cond)  # type: ignore[misc]

    def draw(params: Params, state: State, key: Key, z: Array, cond: PyTree | None = None) -> Array:
        check_key(key)
        check_real(z, codes, "z")
        check_cond(spec, cond, z.shape[0])
        return latent.draw(params, state, key, z, cond)  # type: ignore[misc]

    def log_likelihood(params: Params, state: State, batch: Batch, z: Array) -> Array:
        check_batch(spec, batch)
        check_real(z, (batch.x.shape[0], *latent.spec.shape), "z")
        return latent.log_likelihood(params, state, batch, z)  # type: ignore[misc]

    def sample_mean(
        params: Params, state: State, key: Key, n: int, cond: PyTree | None = None
    ) -> Array:
        _check_draws(spec, key, n, cond)
        return latent.sample_mean(params, state, key, n, cond)  # type: ignore[misc]

    made = {
        "encode": of_events(latent.encode),
        "decode": decode,
        "draw": draw,
        "log_likelihood": log_likelihood,
        "reconstruct": of_events(latent.reconstruct),
        "sample_mean": sample_mean,
    }
    return latent._replace(
        **{name: function for name, function in made.items() if getattr(latent, name) is not None}
    )


def _same_kind(found: PyTree, wanted: PyTree) -> None:
    import chex  # late: what settings there are is asked without it

    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    except AssertionError as error:
        raise ConfigError(
            f"A state has to keep its names, shapes and dtypes; this one came back as another: "
            f"{error}"
        ) from None


def _of_shape(x: Array, shape: tuple[int, ...]) -> None:
    import chex

    chex.assert_shape(x, shape)


def _per_example(value: Array, n: int, what: str) -> None:
    if jnp.shape(value) != (n,):
        raise ConfigError(
            f"{what} must be per example, of shape [{n}]; got shape {list(jnp.shape(value))}. "
            "Means over the batch are taken by the training, once."
        )


def loss_and_aux(given: Any, player: str) -> tuple[Array, Aux]:
    """What a loss returned, if it is a loss with its Aux.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Aux):
        return given
    raise ConfigError(
        f"The loss of {player!r} must return (loss, genjax.Aux(state, metrics)), the loss being of "
        f"shape [B]; got {_kind_of(given)}."
    )


def _kind_of(given: Any) -> str:
    if isinstance(given, tuple) and not hasattr(given, "_fields"):
        return f"({', '.join(type(one).__name__ for one in given)})"
    return type(given).__name__


def check_per_example(value: Array, metrics: Mapping[str, Array], n: int, player: str) -> None:
    """Refuse a loss or metrics that are not one number for each of n examples.

    A mean that a loss takes itself would be divided by n once more, without a word.

    Raises:
        ConfigError: with the shape that was found.
    """
    _per_example(value, n, f"The loss of {player!r}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ConfigError(f"The loss of {player!r} must be real numbers; got {value.dtype}.")
    if "loss" in metrics:
        raise ConfigError(
            f"A metric of {player!r} is called 'loss', which is what its loss itself is reported "
            "as: give it another name."
        )
    for name, metric in metrics.items():
        _per_example(metric, n, f"The metric {name!r} of {player!r}")
