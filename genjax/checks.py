"""What refuses what does not keep the contract: keys, conditions, batches, parameters, models.

`checked` holds a model's functions to `protocol.py` at trace time, where it costs nothing once
traced. `settings.py` does the same for the settings that a builder takes.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from genjax.errors import ConfigError
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    DataSpec,
    Key,
    LossFn,
    Model,
    Params,
    PrepareFn,
    PyTree,
    ScoreFn,
    State,
)


def check_key(key: Key) -> None:
    """Refuse anything but a typed PRNG key.

    Raises:
        TypeError: for an old-style uint32 key or something that is no key at all.
    """
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        found = (
            f"an array of {key.dtype}{list(key.shape)}"
            if hasattr(key, "dtype")
            else f"a {type(key).__name__}"
        )
        raise TypeError(
            f"Expected a typed PRNG key; got {found}. Make one with jax.random.key(seed), not "
            "PRNGKey(seed)."
        )


def check_cond(spec: DataSpec, cond: PyTree | None, n: int) -> None:
    """Check a condition against the spec: present exactly when the model is conditional, [n] labels
    or [n, cond_dim].

    Raises:
        ValueError: for a missing, superfluous or mis-shaped condition, or a label that is out of
            range (where the labels
            are concrete: inside a trace their values are not known).
        TypeError: for labels that are not whole numbers or vectors that are not real.
    """
    if not spec.conditional:
        if cond is not None:
            raise ValueError(
                f"A condition was given, but this model of {spec.name} is unconditional: leave "
                "`cond` out."
            )
        return
    wanted = (
        f"labels 0..{spec.n_classes - 1}, int [{n}]"
        if spec.n_classes
        else f"vectors, float [{n}, {spec.cond_dim}]"
    )
    if cond is None:
        raise ValueError(f"This model of {spec.name} is conditional: give `cond` ({wanted}).")
    cond = jnp.asarray(cond)
    shape = (n,) if spec.n_classes else (n, spec.cond_dim)
    if cond.shape != shape:
        raise ValueError(f"`cond` must be {wanted}; got shape {list(cond.shape)}.")
    right = jnp.issubdtype(cond.dtype, jnp.integer if spec.n_classes else jnp.floating)
    if not right:
        raise TypeError(f"`cond` must be {wanted}; got dtype {cond.dtype}.")
    if spec.n_classes and not isinstance(cond, Tracer) and n:
        labels = np.asarray(cond)  # in a trace, jax would trace even operations on constants
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= spec.n_classes:
            raise ValueError(f"`cond` must be {wanted}; got labels from {low} to {high}.")


def check_batch(spec: DataSpec, batch: Batch) -> None:
    """Check a batch's ranks, shapes and dtypes against the spec; it costs nothing once traced.

    Raises:
        ValueError, TypeError: see the text, which names what was expected and found.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            f"Expected a genjax.Batch(x, cond, weight, length); got {type(batch).__name__}."
        )
    x = batch.x
    if not hasattr(x, "shape") or x.ndim != len(spec.shape) + 1 or tuple(x.shape[1:]) != spec.shape:
        found = list(x.shape) if hasattr(x, "shape") else type(x).__name__
        raise ValueError(
            f"batch.x of {spec.name} must have shape [B, {', '.join(map(str, spec.shape))}]; got "
            f"{found}."
        )
    if spec.kind == "tokens" and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"batch.x of {spec.name} holds tokens and must be whole numbers; got {x.dtype}."
        )
    if spec.kind != "tokens" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"batch.x of {spec.name} is {spec.kind} and must be floating point; got {x.dtype}."
        )
    if batch.weight is not None and batch.weight.shape != (x.shape[0],):
        raise ValueError(
            f"batch.weight must have shape [{x.shape[0]}]; got {list(batch.weight.shape)}."
        )
    if spec.lengths != (batch.length is not None):
        found = (
            "it is missing: sequences of unequal length need it" if spec.lengths else "it was given"
        )
        raise ValueError(
            f"batch.length goes with a spec that says lengths=True; that of {spec.name} says "
            f"{spec.lengths}, and {found}."
        )
    if batch.length is not None and (
        batch.length.shape != (x.shape[0],) or not jnp.issubdtype(batch.length.dtype, jnp.integer)
    ):
        raise ValueError(
            f"batch.length must be int [{x.shape[0]}]; got "
            f"{batch.length.dtype}{list(batch.length.shape)}."
        )
    check_cond(spec, batch.cond, x.shape[0])


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf, for every leaf of a tree: "vae/encoder/layers/0/kernel"."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def mismatch(given: PyTree, wanted: PyTree, most: int = 8) -> list[str]:
    """How the names and shapes of a tree differ from what is wanted: a line for each leaf that is
    missing, surplus or of another shape, at most `most` of them; none if they agree.
    """
    found, needed = leaves_by_name(given), leaves_by_name(wanted)
    lines = [f"{name}: missing" for name in needed if name not in found]
    lines += [f"{name}: not of this model" for name in found if name not in needed]
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


def check_model(model: Model) -> None:
    """Refuse what can be seen of a model before it runs: averages and noise that name no player,
    and losses that do not take a step.

    Raises:
        ConfigError: see above.
    """
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
        if isinstance(decay, int | float) and not 0 <= decay <= 1:
            raise ConfigError(f"The decay of follows[{entry!r}] must be in [0, 1]; got {decay}.")
    for player in model.noise:
        if player not in players:
            raise ConfigError(
                f"noise names the player {player!r}; those with a loss are: {', '.join(players)}."
            )


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
    contract; entries that follow a player are made by `init`.

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
        own, other = wanted()
        return by_name(params, own, "The tree of parameters"), by_name(state, other, "The state")

    def check_arguments(batch: Batch, key: Key) -> int:
        check_batch(spec, batch)
        check_key(key)
        return batch.x.shape[0]

    def loss_of(player: str, loss_fn: LossFn) -> LossFn:
        def loss(
            params: Params, state: State, batch: Batch, key: Key, step: Array
        ) -> tuple[Array, Aux]:
            n = check_arguments(batch, key)
            params, state = matched(params, state)
            value, aux = loss_fn(params, state, batch, key, step)
            check_per_example(value, aux.metrics, n, player)
            _same_kind(aux.state, state)
            return value, aux

        return loss

    def score_of(name: str, score_fn: ScoreFn | None) -> ScoreFn | None:
        if score_fn is None:
            return None

        def score(params: Params, state: State, batch: Batch, key: Key) -> Array:
            n = check_arguments(batch, key)
            params, state = matched(params, state)
            value = score_fn(params, state, batch, key)
            _per_example(value, n, name)
            return value

        return score

    def prepare_of(prepare_fn: PrepareFn | None) -> PrepareFn | None:
        if prepare_fn is None:
            return None

        def prepare(params: Params, state: State, batch: Batch, key: Key) -> tuple[Params, State]:
            check_arguments(batch, key)
            params, state = matched(params, state)
            after = prepare_fn(params, state, batch, key)
            _same_kind(after, (params, state))
            return after

        return prepare

    def sample(
        params: Params, state: State, key: Key, n: int, cond: PyTree | None = None
    ) -> PyTree:
        check_key(key)
        if not isinstance(n, int) or n < 1:
            raise ValueError(
                "sample needs a whole number n >= 1 of samples (it is a shape, so not traced); got "
                f"{n!r}."
            )
        check_cond(spec, cond, n)
        params, state = matched(params, state)
        x = model.sample(params, state, key, n, cond)
        _of_shape(x, (n, *spec.shape))
        return x

    return model._replace(
        init=init,
        losses={player: loss_of(player, loss) for player, loss in model.losses.items()},
        sample=sample,
        log_prob=score_of("log_prob", model.log_prob),
        bound=score_of("bound", model.bound),
        prepare=prepare_of(model.prepare),
    )


def _same_kind(found: PyTree, wanted: PyTree) -> None:
    import chex  # late: what settings there are is asked without it

    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)


def _of_shape(x: Array, shape: tuple[int, ...]) -> None:
    import chex

    chex.assert_shape(x, shape)


def _per_example(value: Array, n: int, what: str) -> None:
    if jnp.shape(value) != (n,):
        raise ConfigError(
            f"{what} must be per example, of shape [{n}]; got shape {list(jnp.shape(value))}. "
            "Means over the batch are taken by the training, once."
        )


def check_per_example(value: Array, metrics: Mapping[str, Array], n: int, player: str) -> None:
    """Refuse a loss or metrics that are not one number for each of n examples.

    A mean that a loss takes itself would be divided by n once more, without a word.

    Raises:
        ConfigError: with the shape that was found.
    """
    _per_example(value, n, f"The loss of {player!r}")
    for name, metric in metrics.items():
        _per_example(metric, n, f"The metric {name!r} of {player!r}")
