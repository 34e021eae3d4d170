"""A smallest complete family, to copy: a Gaussian with a mean and a scale for each element.

    p(x | c) = Π_i N(y_i; mean_i + (c W)_i, scale_i²) |dy_i / dx_i|,  y = (x - shift) / scale

A network never sees x but y = `spec.normalize(x)`; `spec.log_volume` is the logarithm of all
|dy/dx|, and `spec.denormalize` brings samples back. For data that are not standardised y is x.

What a family needs is all here: settings with their limits in the annotations, maths at module
level with explicit arguments, a builder that checks and assembles, and a docstring with an example
that the tests run. Copy it to `families/NAME.py`, give it a `Recipe` in `zoo/<group>.py`, and
`tests/test_NAME.py` with its proofs and its `analytic_loss`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from genjax.checks import checked
from genjax.errors import ConfigError
from genjax.parts.distributions import normal_log_prob, normal_sample, sum_event
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Model, Params, State
from genjax.settings import Positive, builder

PLAYER = "skeleton"


def mean_of(spec: DataSpec, own: Params, cond: Any) -> Array:
    """mean + c W for each condition, [n, *shape], or the mean, [1, *shape], without a condition."""
    c = spec.embed(cond, own)
    if c is None:
        return own["mean"][None]
    return own["mean"][None] + (c @ own["weight"]).reshape(-1, *spec.shape)


def log_density(spec: DataSpec, own: Params, batch: Batch) -> Array:
    """ln p(x | c) in nats, [B]."""
    mean = mean_of(spec, own, batch.cond)
    each = normal_log_prob(spec.normalize(batch.x), mean, own["log_scale"][None])
    return sum_event(each, len(spec.shape)) + spec.log_volume


@builder
def skeleton(spec: DataSpec, *, scale: Positive = 1.0) -> Model:
    """A Gaussian whose elements are independent; conditional if the spec has a condition.

    The loss per example is -ln p(x | c) in nats; `log_prob` is exact. Shapes: x [B, *shape].

    Args:
        spec: continuous data.
        scale: the standard deviation that training begins with.

    Raises:
        ConfigError: for data that are not continuous.

    Example:
        >>> import jax, genjax
        >>> from genjax.families._skeleton import skeleton
        >>> model = skeleton(genjax.DataSpec(shape=(2,), kind="continuous"))
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 3).shape
        (3, 2)
    """
    if spec.kind != "continuous":
        raise ConfigError(f"A Gaussian models continuous data; {spec.name} is {spec.kind}.")

    def init(key: Key) -> tuple[Params, State]:
        key_mean, key_weight = jax.random.split(key)
        own = {
            "mean": 0.01 * jax.random.normal(key_mean, spec.shape, jnp.float32),
            "log_scale": jnp.full(spec.shape, jnp.log(scale), jnp.float32),
        }
        if spec.conditional:
            own["weight"] = 0.01 * jax.random.normal(
                key_weight, (spec.cond_size, spec.size), jnp.float32
            )
        return {PLAYER: own}, {PLAYER: {}}

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        return -log_density(spec, params[PLAYER], batch), Aux(state, {})

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return log_density(spec, params[PLAYER], batch)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        own = params[PLAYER]
        mean = jnp.broadcast_to(mean_of(spec, own, cond), (n, *spec.shape))
        return spec.denormalize(normal_sample(key, mean, own["log_scale"][None]))

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={PLAYER: loss},
            sample=sample,
            log_prob=log_prob,
            estimator="exact",
        )
    )
