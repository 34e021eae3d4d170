"""Terms of one's own in a loss."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from genjax.checks import check_per_example
from genjax.errors import ConfigError, unknown_name
from genjax.protocol import Array, Aux, Batch, Key, Model, Params, State

# What a term draws is not what the loss draws from the same key.
TERM = 0x7E57


def add_loss(
    model: Model,
    player: str,
    term: Callable[[Params, State, Batch, Key], Array],
    weight: Any = 1.0,
    name: str | None = None,
) -> Model:
    """The same model whose `player` has loss + weight · term, reported as metric `name`.

    Bounds, samples and all else stay what they are. The metric is without the weight.

    Args:
        model: what a builder returned.
        player: whose loss; the gradient is with respect to its parameters only.
        term: (params, state, batch, key) -> a value for each example, [B].
        weight: a number, which may be traced.
        name: of the metric; the function's own unless given.

    Raises:
        ConfigError: for a player that has no loss, or a term that takes something else; and at the
            first step for a term that is not [B], or that has the name of a metric that is there
            already.

    Example:
        >>> import genjax, jax.numpy as jnp
        >>> model = genjax.vae(genjax.DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
        >>> def small(params, state, batch, key):
        ...     return jnp.square(model.latent.encode(params, state, batch.x)[0]).sum(-1)
        >>> with_term = genjax.add_loss(model, "vae", small, weight=0.1)
    """
    if player not in model.losses:
        raise unknown_name("player", player, model.losses)
    try:
        inspect.signature(term).bind("params", "state", "batch", "key")
    except ValueError:  # of some callables it cannot be seen
        pass
    except TypeError:
        raise ConfigError(
            f"The term takes {inspect.signature(term)}; one that is added to a loss takes (params, "
            "state, batch, key)."
        ) from None
    before, called = model.losses[player], name or getattr(term, "__name__", "term")

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        value, aux = before(params, state, batch, key, step)
        if called in (*aux.metrics, "loss"):
            raise ConfigError(
                f"{player!r} has a metric {called!r} already: give the term another, name='...'."
            )
        added = jnp.asarray(term(params, state, batch, jax.random.fold_in(key, TERM)))
        check_per_example(value, {called: added}, value.shape[0], player)
        return value + weight * added, Aux(aux.state, {**aux.metrics, called: added})

    return model._replace(losses={**model.losses, player: loss})
