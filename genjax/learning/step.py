"""One train step for every family.

    train = training(vae(spec), optax.adam(1e-3))
    many = ensemble(train)                   # vmap over keys: one program trains all members
    fast = scan_steps(many)                  # k optimiser steps per dispatch
    run = compiled(fast)                     # jit, with the state's buffers donated

    ts = run.init(jax.random.split(key, 8))
    if run.prepare is not None:              # a model that is initialised from data
        ts = run.prepare(ts, batches)
    ts, metrics = run.step(ts, batches)

`transforms.py`, `members.py` and `sharding.py` are functions Training -> Training of what is here.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genjax.checks import (
    by_name,
    check_batch,
    check_kept,
    check_key,
    check_model,
    check_per_example,
    loss_and_aux,
    mismatch,
)
from genjax.errors import ConfigError, GenjaxError, first_line
from genjax.learning.optim import averaged
from genjax.protocol import (
    Array,
    Batch,
    Gradient,
    Key,
    Metrics,
    Model,
    Params,
    PyTree,
    State,
    Training,
    TrainState,
)

Optimizers = optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
# No turn of a step has this number, so no loss draws what the preparation draws.
PREPARATION = np.uint32(2**32 - 1)


def training(model: Model, tx: Optimizers) -> Training:
    """The training procedure of any model: each step takes the turns of `model.turns`, one gradient
    and one update each.

    This is the one place where the mean over the batch is taken: Σ_i w_i loss_i with w = weight / Σ
    weight. The key of turn j of step s, of J turns a step, is `fold_in(ts.key, s J + j)`. Metrics
    are weighted means named "player/name"; "player/loss" is always there, and a player with several
    turns reports its last.

    After the last turn, once a step, every entry of `model.follows` moves: params[entry] <- d
    params[entry] + (1 - d) params[player], where d may be a function of the step. It has no
    optimiser state. Gradients are taken with respect to `params[player]` only, so what a loss does
    with an entry that follows needs no `stop_gradient`.

    `prepare(ts, batch)` is there where the model's is, to be called once, on the first batch,
    before step 0. It draws from a key of its own, and examples of weight 0 are blanked as in a
    step. Optimisers then begin anew, so that averages begin at the prepared parameters, and so do
    the entries that follow a player.

    Args:
        model: what a family's builder returned.
        tx: one optimiser for all players, or one for each player by name: any optax transform, also
            of those that take `value`, which is the player's mean loss of the step, but none that
            needs more, as a line search does.

    Raises:
        ConfigError: if `tx` or `model.turns` name a player that has no loss, or leave one out; for
            `follows` that name none; from `init`, for an optimiser that does not take the
            parameters; and, at the first step, for one that wants the loss as a function, as a line
            search does, or fails, for a loss or a metric that is not per example, [B], and for a
            state of another model or of other optimisers.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> t = training(model, optax.adam(1e-3))
        >>> ts = jax.jit(t.init)(jax.random.key(0))
        >>> ts, metrics = jax.jit(t.step)(ts, example_batch(model.spec, jax.random.key(1), 8))
        >>> int(ts.step), metrics["vae/loss"].shape
        (1, ())
    """
    check_model(model)
    by_player = _optimizers(model, tx)
    order = _order(model)

    def init(key: Key) -> TrainState:
        check_key(key)
        if key.ndim:
            raise ConfigError(
                f"init needs one key; got keys of shape {list(key.shape)}. For many members, use "
                "`ensemble`."
            )
        key_model, key_train = jax.random.split(key)
        params, state = model.init(key_model)
        params = with_followers(model, params)
        opt = {player: _begun(tx, params, player) for player, tx in by_player.items()}
        return TrainState(jnp.zeros((), jnp.int32), key_train, params, state, opt)

    def step_with(gradient: Gradient, ts: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_one(ts, by_player)
        check_batch(model.spec, batch, model.any_length)
        _check_optimizers(by_player, ts)
        batch, weight = _weighted(batch)
        metrics: Metrics = {}
        for index, player in enumerate(order):
            key = jax.random.fold_in(ts.key, ts.step * len(order) + index)
            grads, state, new = gradient(player, ts.params, ts.state, batch, weight, key, ts.step)
            value = new[f"{player}/loss"]
            updates, opt = _updates(by_player[player], grads, ts, player, value)
            own = optax.apply_updates(ts.params[player], updates)
            ts = ts._replace(
                params={**ts.params, player: own}, state=state, opt={**ts.opt, player: opt}
            )
            metrics |= new
        return ts._replace(step=ts.step + 1, params=_followed(model, ts.params, ts.step)), metrics

    def prepare(ts: TrainState, batch: Batch) -> TrainState:
        _check_one(ts, by_player)
        check_batch(model.spec, batch, model.any_length)
        batch, _ = _weighted(batch)
        key = jax.random.fold_in(ts.key, PREPARATION)
        params, state = model.prepare(ts.params, ts.state, batch, key)  # type: ignore[misc]
        copies = {
            entry: jax.tree.map(jnp.copy, params[player])
            for entry, (player, _) in model.follows.items()
        }
        opt = {player: _begun(tx, params, player) for player, tx in by_player.items()}
        return ts._replace(params={**params, **copies}, state=state, opt=opt)

    def make(wrap: Callable[[Gradient], Gradient]) -> Training:
        # The wrapper given last is outermost: it splits the batch before those that were given
        # earlier see it.
        return Training(
            init=init,
            step=partial(step_with, wrap(partial(_gradient, model))),
            rewrap=lambda more: make(lambda g: more(wrap(g))),
            prepare=None if model.prepare is None else prepare,
        )

    return make(lambda g: g)


def _check_one(ts: TrainState, players: Iterable[str]) -> None:
    """Refuse what is no state of one run of this model: that of members, of another model, or
    something else.

    Raises:
        ConfigError: see above.
    """
    if not isinstance(ts, TrainState):
        raise ConfigError(
            "A step takes the state that `init` or the step before returned, and a batch: "
            f"t.step(ts, batch); got a {type(ts).__name__} in its place."
        )
    check_kept(ts, "This state")
    if ts.key.ndim:
        raise ConfigError(
            f"This state is one of members, with keys of shape {list(ts.key.shape)}, and this "
            "training has none: take its step from `ensemble(t)` or `sweep`, as its init."
        )
    if any(player not in ts.params or player not in ts.opt for player in players):
        raise ConfigError(
            f"This state is one of another model: it trains {', '.join(ts.opt)}, and this model "
            f"{', '.join(players)}. Give what the `init` or the step of this training returned."
        )


def _check_optimizers(by_player: dict[str, optax.GradientTransformation], ts: TrainState) -> None:
    """Refuse a state of other optimisers: one that keeps nothing passes anything on as it came.

    Raises:
        ConfigError: with what is there and is not kept, or the other way round.
    """
    for player, tx in by_player.items():
        try:
            begun = jax.eval_shape(lambda p, tx=tx, player=player: _begun(tx, p, player), ts.params)
        except ConfigError:  # of one that looks at the values, which a trace has not
            continue
        lines = mismatch(ts.opt[player], begun, "not kept by this one", most=3)
        if lines:
            raise ConfigError(
                f"This state was made with another optimiser of {player!r} than the one that steps "
                "here:\n  " + "\n  ".join(lines) + "\nStep it with the one that it was made with, "
                f"or begin this one anew: ts._replace(opt={{**ts.opt, {player!r}: "
                f"tx.init(ts.params[{player!r}])}}), of members with jax.vmap(tx.init)."
            )


def _updates(
    tx: optax.GradientTransformation, grads: PyTree, ts: TrainState, player: str, value: Array
) -> tuple[PyTree, PyTree]:
    """What an optimiser makes of a gradient. Those that ask for it get the mean loss, as `value`.

    Raises:
        ConfigError: for one that asks for something else, such as a line search, or fails.
    """
    update, own = optax.with_extra_args_support(tx).update, (ts.opt[player], ts.params[player])
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes whole and real numbers
            try:
                return update(grads, *own, value=value)
            except TypeError as error:  # of one that says it takes any, as optax.contrib.sam does
                if "unexpected keyword argument 'value'" not in str(error):
                    raise
                return update(grads, *own)
    except GenjaxError:
        raise
    except Exception as error:  # whatever a transform of another's raises
        missing = "required" in str(error) and "argument" in str(error)
        if missing or "must be provided" in str(error):
            raise ConfigError(
                f"The optimiser of {player!r} asks for what a step does not have ({error}): it "
                "gives gradients, parameters and `value`, the mean loss. Take one that needs no "
                "more, such as optax.contrib.reduce_on_plateau or optax.polyak_sgd."
            ) from error
        raise ConfigError(
            f"The optimiser of {player!r} could not take a step ({first_line(error)}). It is given "
            f"the gradient of the mean loss by params[{player!r}], these parameters, `value`, that "
            "loss, and the state that its own `init` made. Take a transform that needs no more: "
            "optax.lookahead, whose parameters have a form of their own, and what clips each "
            "example's gradient do. An average of the weights, to sample and evaluate with, is "
            "kept by optax.chain(tx, genjax.learning.optim.track_ema(0.999))."
        ) from error


def _begun(tx: optax.GradientTransformation, params: Params, player: str) -> PyTree:
    """The state that an optimiser begins with.

    Raises:
        ConfigError: for one that does not take the parameters as they are.
    """
    own = params[player]
    try:
        return tx.init(own)
    except GenjaxError:
        raise
    except Exception as error:  # whatever a transform of another's raises
        entries = f" of {', '.join(map(str, own))}" if isinstance(own, Mapping) else ""
        raise ConfigError(
            f"The optimiser of {player!r} does not take its parameters ({first_line(error)}). They "
            f"are params[{player!r}], a tree{entries}: masks and labels are trees of its form, "
            "or functions of it."
        ) from error


def _optimizers(model: Model, tx: Optimizers) -> dict[str, optax.GradientTransformation]:
    """One optimiser for each player, in the order of the losses."""
    players = tuple(model.losses)
    given = dict(tx) if isinstance(tx, Mapping) else dict.fromkeys(players, tx)
    if set(given) != set(players):
        raise ConfigError(
            f"Give one optimiser for each player ({', '.join(players)}); got them for: "
            f"{', '.join(given) or 'none'}."
        )
    for player, one in given.items():
        if not (hasattr(one, "init") and hasattr(one, "update")):
            raise ConfigError(
                f"The optimiser of {player!r} must be a transform of optax, such as "
                f"optax.adam(1e-3); got {one!r:.80}."
            )
    return {player: given[player] for player in players}


def _order(model: Model) -> list[str]:
    """The player of each turn of a step."""
    players = tuple(model.losses)
    turns = model.turns or tuple((player, 1) for player in players)
    for player, times in turns:
        if player not in players or not isinstance(times, int) or times < 1:
            raise ConfigError(
                f"A turn must name a player ({', '.join(players)}) and a count >= 1; got "
                f"{(player, times)}."
            )
    for player in players:
        if player not in dict(turns):
            raise ConfigError(f"Player {player!r} has a loss but no turn; turns are {turns}.")
    return [player for player, times in turns for _ in range(times)]


def _gradient(
    model: Model,
    player: str,
    params: Params,
    state: State,
    batch: Batch,
    weight: Array,
    key: Key,
    step: Array,
) -> tuple[PyTree, State, Metrics]:
    """∂/∂params[player] of Σ_i weight_i loss_i, with the state after it and the metrics' sums."""

    def objective(own: PyTree) -> tuple[Array, tuple[State, Metrics]]:
        given = model.losses[player]({**params, player: own}, state, batch, key, step)
        loss, aux = loss_and_aux(given, player)
        check_per_example(loss, aux.metrics, batch.x.shape[0], player)
        metrics = {
            f"{player}/{name}": _dot(weight, value)
            for name, value in {**aux.metrics, "loss": loss}.items()
        }
        return metrics[f"{player}/loss"], (aux.state, metrics)

    grads, (state, metrics) = jax.grad(objective, has_aux=True)(params[player])
    return jax.tree.map(_way_up, grads), state, metrics


def _way_up(gradient: Array) -> Array:
    """Of a complex number jax gives d/da - i d/db; the way up is its conjugate."""
    return jnp.conj(gradient) if jnp.iscomplexobj(gradient) else gradient


def _weighted(batch: Batch) -> tuple[Batch, Array]:
    """The batch with examples of weight 0 blanked, and weights that sum to 1.

    A mean with equal weights is a sum times one number: a vector of them costs the whole step 5 %
    on a CPU.
    """
    if batch.weight is None:
        return batch, jnp.asarray(1 / batch.x.shape[0], jnp.float32)
    weight = jnp.asarray(batch.weight)
    if weight.dtype != jnp.float64:
        weight = weight.astype(jnp.float32)  # a sum of few bits overflows
    return _blank(batch, weight > 0), weight / jnp.sum(weight)


def _blank(batch: Batch, kept: Array) -> Batch:
    """The batch with 0 in the place of examples that are not kept: in a gradient even 0 times NaN
    is NaN.
    """

    def blank(leaf: Array) -> Array:
        return jnp.where(kept.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    return batch._replace(x=jax.tree.map(blank, batch.x), cond=jax.tree.map(blank, batch.cond))


def _dot(weight: Array, value: Array) -> Array:
    """Σ weight value for a weight [B], or [] for all alike; a weight of 0 silences even a NaN, such
    as that of padding.
    """
    if value.dtype != jnp.float64:
        value = value.astype(jnp.float32)  # sums of few bits would lose them
    if not weight.ndim:
        return jnp.sum(value) * weight.astype(value.dtype)
    return jnp.sum(jnp.where(weight > 0, value, 0) * weight.astype(value.dtype))


# --- entries that follow a player -----------------------------------------------------------------


def with_followers(model: Model, params: Params) -> Params:
    """Parameters with a copy of its player for each entry that follows one and is not there yet.

    Raises:
        ConfigError: for one that `init` made and that is not like its player.
    """
    for entry, (player, _) in model.follows.items():
        own = params[player]
        if entry in params:
            own = by_name(params[entry], own, f"params[{entry!r}], which follows {player!r},")
        else:
            own = jax.tree.map(jnp.copy, own)  # an alias could not be donated
        params = {**params, entry: own}
    return params


def _followed(model: Model, params: Params, step: Array) -> Params:
    """Parameters after `step` with every entry that follows a player moved towards it.

    Raises:
        ConfigError: if an entry is not in the parameters.
    """
    for entry, (player, decay) in model.follows.items():
        if entry not in params:
            raise ConfigError(
                f"params has no entry {entry!r}, which follows {player!r}. Begin with the state "
                "that the training's own `init` returns."
            )
        d = jnp.asarray(decay(step) if callable(decay) else decay)
        moved = jax.tree.map(partial(_average, d), params[entry], params[player])
        params = {**params, entry: moved}
    return params


def _average(d: Array, average: Array, value: Array) -> Array:
    """d average + (1 - d) value, where 0 and 1 and an average of equal values are exact."""
    if not jnp.issubdtype(average.dtype, jnp.inexact):
        return jnp.where(d == 1, average, value)
    between = average + (1 - d).astype(average.dtype) * (value - average)
    return jnp.where(d == 0, value, jnp.where(d == 1, average, between))


def eval_params(ts: TrainState) -> Params:
    """The parameters to sample and evaluate with: each player's moving average where its optimiser
    tracks one. Entries without an optimiser, such as those that follow a player, are as they are.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, eval_params, training, vae
        >>> t = training(vae(DataSpec((2,), "continuous"), hidden=(4,)), optax.adam(1e-3))
        >>> list(eval_params(t.init(jax.random.key(0))))
        ['vae']
    """
    return {player: averaged(ts.opt.get(player, ()), own) for player, own in ts.params.items()}
