"""Continuous normalizing flows: data become noise along an ODE whose field is learned by maximum
likelihood.

    dx/dt = f(x, t) from data at t = 0 to noise at t = 1,  d ln p(x_t) / dt = -div f(x_t, t)

Chen 2018, Grathwohl 2019 (FFJORD: the divergence by one random vector a solve).
"""

from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from genjax import nets
from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.parts.dequantization import Dequantization
from genjax.parts.flow_density import Flow, flow_model
from genjax.parts.noise_to_data import check_events
from genjax.parts.ode_likelihood import (
    LIKELIHOOD_SOLVERS,
    carried,
    likelihood_in_words,
    with_divergence,
)
from genjax.parts.solvers import Field
from genjax.protocol import Array, DataSpec, Key, Model, Params
from genjax.settings import Count, Dtype, Help, Often, OftenOrNot, OneOf, Remat, builder


def field_of(net: Net, params: Params, c: Array | None) -> Field:
    """(x [n, D], t []) -> dx/dt, for the conditions c."""
    return lambda x, t: net.apply(params, {}, x, jnp.asarray(t, x.dtype), c)[0]


def with_log_det(
    field: Field,
    x: Array,
    times: Array,
    solver: str,
    probes: Array | None = None,
    remat: str = "none",
) -> tuple[Array, Array]:
    """x [n, D] at times[0] carried to times[-1], and ln |det| of that [n], the integral of the
    divergence: exact, or by vectors [P, n, D] that stay the same along the way.
    """
    start = (x, jnp.zeros(x.shape[0], x.dtype))
    return carried(with_divergence(field, probes), start, times, solver, remat=remat)


def flow_along(
    spec: DataSpec, net: Net, solver: str, n_steps: int, n_probes: int, remat: str
) -> Flow:
    """The ODE as a map from events to vectors."""

    def times(x: Array, back: bool = False) -> Array:
        start, end = (1, 0) if back else (0, 1)
        return jnp.linspace(start, end, n_steps + 1, dtype=x.dtype)

    def forward(params: Params, y: Array, c: Array | None, key: Key | None) -> tuple[Array, Array]:
        x = y.reshape(-1, spec.size)
        probes = None
        if n_probes and key is not None:
            probes = jax.random.rademacher(key, (n_probes, *x.shape), x.dtype)
        return with_log_det(field_of(net, params, c), x, times(x), solver, probes, remat)

    def inverse(params: Params, z: Array, c: Array | None) -> tuple[Array, Array]:
        field = field_of(net, params, c)
        x, log_det = with_log_det(field, z, times(z, back=True), solver)
        return x.reshape(-1, *spec.shape), log_det

    def generate(params: Params, z: Array, c: Array | None) -> Array:
        x = carried(field_of(net, params, c), z, times(z, back=True), solver)
        return x.reshape(-1, *spec.shape)

    def init(key: Key) -> Any:
        return net.init(key)[0]

    return Flow(init, forward, inverse, generate, random=n_probes > 0)


def check_draws(spec: DataSpec, n_draws: int, n_probes: int) -> None:
    """Refuse an average of probabilities whose logarithms are estimates: the error of a probe would
    raise it, and it would be no bound.

    Raises:
        ConfigError: with what to do.
    """
    if spec.kind != "continuous" and n_draws > 1 and n_probes:
        raise ConfigError(
            f"n_bound_samples={n_draws} averages probabilities, which random probes would raise "
            "above a bound. Take n_probes=0, the exact divergence, or n_bound_samples=1."
        )


@builder
def cnf(
    spec: DataSpec,
    *,
    hidden: tuple[Count, ...] = (64, 64, 64),
    activation: Annotated[
        Literal["silu", "tanh", "softplus", "gelu"], Help("between layers; all are smooth.")
    ] = "silu",
    solver: Annotated[str, OneOf(LIKELIHOOD_SOLVERS)] = "rk4",
    n_steps: Often = 10,
    n_probes: OftenOrNot = 1,
    remat: Remat = "none",
    dequantized: Dequantization = Dequantization(),
    dtype: Dtype = "float32",
) -> Model:
    """A continuous flow (FFJORD): an ODE that carries data at t = 0 to noise at t = 1, trained by
    maximum likelihood through its solver. Conditional if the spec has a condition.

    The loss per example is -ln p(x) in nats, where ln |det dz/dx| is the integral of the field's
    divergence. `log_prob`, for continuous data, is exact but for the solver's error, and with
    `n_probes` > 0 an unbiased estimate. For binary and discrete data, to which noise is added, so
    is `bound`; with `n_probes` = 0 it averages the densities of `n_bound_samples` draws of the
    noise, and with probes takes one. `flow_matching` learns such an ODE without solving it.
    `extras` is `flow_density.Invertible`, with the exact divergence. Shapes: x [B, *shape], z
    [B, D].

    Args:
        spec: the data; binary, discrete or continuous, no sequences.
        hidden: widths of the hidden layers of the field's network.
        solver: of the ODE in training, density and samples, a name in
            `ode_likelihood.LIKELIHOOD_SOLVERS`.
        n_steps: its steps; "adaptive" chooses its own, the same for all examples of a batch, so
            that a value depends on the others as far as its tolerance goes. Too few steps are
            learned around: the loss falls below what is possible.
        n_probes: random vectors that estimate the divergence, the same all along the way
            (Hutchinson); 0 computes it exactly, one derivative for each dimension.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, cnf
        >>> model = cnf(DataSpec((2,), "continuous"), hidden=(8,), n_steps=4)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 3).shape
        (3, 2)
    """
    check_events(spec, "A continuous flow")
    check_draws(spec, dequantized.n_bound_samples, n_probes)
    build = partial(nets.field.FieldMLP, spec.size, tuple(hidden), spec.cond_size)
    net = functional(partial(build, activation=activation), dtype, wide=("t",))
    flow = flow_along(spec, net, solver, n_steps, n_probes, remat)
    words = likelihood_in_words(solver, n_steps, n_probes)
    return flow_model(spec, flow, dequantized, dtype, f"ODE, {words}", probed=n_probes > 0)
