"""One train step for every family.

train = training(vae(spec), optax.adam(1e-3))
many = ensemble(train)                   # vmap over keys: one program trains all members
fast = scan_steps(many)                  # k optimiser steps per dispatch
run = compiled(fast)                     # jit, with the state's buffers donated
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax

from genjax.checks import check_batch, check_key
from genjax.errors import ConfigError
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


def training(
    model: Model, tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
) -> Training:
    """The training procedure of any model: each step takes the turns of `model.turns`, one gradient
    and one update each.

    This is the one place where the mean over the batch is taken: Σ_i w_i loss_i with w = weight / Σ
    weight. The key of turn j of step s, of J turns a step, is `fold_in(ts.key, s J + j)`. Metrics
    are weighted means named "player/name"; "player/loss" is always there, and a player with several
    turns reports its last.

    Args:
        model: what a family's builder returned.
        tx: one optimiser for all players, or one for each player by name.

    Raises:
        ConfigError: if `tx` or `model.turns` name a player that has no loss, or leave one out.
    """
    players = tuple(model.losses)
    turns = model.turns or tuple((player, 1) for player in players)
    order = [player for player, times in turns for _ in range(times)]
    by_player = dict(tx) if isinstance(tx, Mapping) else dict.fromkeys(players, tx)
    if set(by_player) != set(players):
        raise ConfigError(
            f"Give one optimiser for each player ({', '.join(players)}); got them for: "
            f"{', '.join(by_player) or 'none'}."
        )
    for player, times in turns:
        if player not in players or times < 1:
            raise ConfigError(
                f"A turn must name a player ({', '.join(players)}) and a count >= 1; got "
                f"{(player, times)}."
            )
    for player in players:
        if player not in dict(turns):
            raise ConfigError(f"Player {player!r} has a loss but no turn; turns are {turns}.")

    def gradient(
        player: str,
        params: Params,
        state: State,
        batch: Batch,
        weight: Array,
        key: Key,
        step: Array,
    ) -> tuple[PyTree, State, Metrics]:
        def objective(own: PyTree) -> tuple[Array, tuple[State, Metrics]]:
            loss, aux = model.losses[player]({**params, player: own}, state, batch, key, step)
            metrics = {
                f"{player}/{name}": _dot(weight, value)
                for name, value in {**aux.metrics, "loss": loss}.items()
            }
            return metrics[f"{player}/loss"], (aux.state, metrics)

        grads, (state, metrics) = jax.grad(objective, has_aux=True)(params[player])
        return grads, state, metrics

    def init(key: Key) -> TrainState:
        check_key(key)
        if key.ndim:
            raise ConfigError(
                f"init needs one key; got keys of shape {list(key.shape)}. For many members, use "
                "`ensemble`."
            )
        key_model, key_train = jax.random.split(key)
        params, state = model.init(key_model)
        opt = {player: by_player[player].init(params[player]) for player in players}
        return TrainState(jnp.zeros((), jnp.int32), key_train, params, state, opt)

    def step_with(gradient: Gradient, ts: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(model.spec, batch)
        n = batch.x.shape[0]
        # A mean with equal weights is a sum times one number: a vector of them costs the whole step
        # 5 % on a CPU.
        weight = (
            jnp.asarray(1 / n, jnp.float32)
            if batch.weight is None
            else batch.weight / jnp.sum(batch.weight)
        )
        if batch.weight is not None:
            batch = _blank(batch, batch.weight > 0)
        metrics: Metrics = {}
        for index, player in enumerate(order):
            key = jax.random.fold_in(ts.key, ts.step * len(order) + index)
            grads, state, new = gradient(player, ts.params, ts.state, batch, weight, key, ts.step)
            with jax.numpy_dtype_promotion(
                "standard"
            ):  # optax's own arithmetic mixes whole and real numbers
                updates, opt = by_player[player].update(grads, ts.opt[player], ts.params[player])
            own = optax.apply_updates(ts.params[player], updates)
            ts = ts._replace(
                params={**ts.params, player: own}, state=state, opt={**ts.opt, player: opt}
            )
            metrics |= new
        return ts._replace(step=ts.step + 1), metrics

    def make(wrap: Callable[[Gradient], Gradient]) -> Training:
        # The wrapper given last is outermost: it splits the batch before those that were given
        # earlier see it.
        return Training(
            init, partial(step_with, wrap(gradient)), lambda more: make(lambda g: more(wrap(g)))
        )

    return make(lambda g: g)


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
    value = (
        value if value.dtype == jnp.float64 else value.astype(jnp.float32)
    )  # sums of few bits would lose them
    if not weight.ndim:
        return jnp.sum(value) * weight.astype(value.dtype)
    return jnp.sum(jnp.where(weight > 0, value, 0) * weight.astype(value.dtype))


def eval_params(ts: TrainState) -> Params:
    """The parameters to sample and evaluate with: each player's moving average where its optimiser
    tracks one.
    """
    return {player: averaged(ts.opt.get(player, ()), own) for player, own in ts.params.items()}
