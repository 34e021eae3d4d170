"""The likelihood of samples that an ODE makes of noise, by the change of variables along its way.

Song 2021 (section 4.3 and appendix D.2), Chen 2018 (the instantaneous change of variables),
Hutchinson 1989 and Grathwohl 2018 (the divergence by probes). The steps are those of `solvers.py`.
"""

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError, unknown_name
from genjax.nets.remat import rematerialised
from genjax.parts.distributions import normal_log_prob, sum_event
from genjax.parts.paths import Denoise, Path, prior
from genjax.parts.solvers import (
    SOLVERS,
    TABLEAUS,
    TOLERANCE,
    Field,
    integrate,
    ode_field,
    runge_kutta_step,
)
from genjax.protocol import Array, Key, PyTree

LIKELIHOOD_SOLVERS = (*TABLEAUS, "adaptive")


def likelihood_in_words(solver: str, n_steps: int, probes: int) -> str:
    """How `ode_log_prob` computes, for reports: "rk4 in 100 steps, exact divergence"."""
    steps = solver if solver == "adaptive" else f"{solver} in {n_steps} steps"
    if not probes:
        return f"{steps}, exact divergence"
    return f"{steps}, divergence by {probes} random probe{'s' * (probes > 1)}"


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def with_divergence(field: Field, probes: Array | None) -> Field:
    """(x [n, *event], t) -> dx/dt and its divergence [n]: exact, one derivative a dimension, or by
    probes [P, n, *event].
    """

    def both(y: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
        x = y[0]
        rate, push = jax.linearize(lambda x: field(x, t), x)
        if probes is not None:
            along = jax.lax.map(lambda probe: sum_event(_flat(probe * push(probe))), probes)
            return rate, jnp.mean(along, axis=0)
        size = _flat(x).shape[1]

        def one(i: Array) -> Array:
            # Examples do not depend on each other, so one direction does for all of them.
            direction = (jnp.arange(size) == i).astype(x.dtype)
            pushed = push(jnp.broadcast_to(direction.reshape(1, *x.shape[1:]), x.shape))
            return _flat(pushed)[:, i]

        diagonal = jax.lax.map(one, jnp.arange(size), batch_size=min(64, size))
        return rate, jnp.sum(diagonal, axis=0)

    return both


def carried(
    field: Field,
    start: PyTree,
    times: Array,
    solver: str,
    tolerance: float = TOLERANCE,
    remat: str = "none",
) -> PyTree:
    """y at times[-1] of the ODE dy/dt = field(y, t) that begins with `start` at times[0].

    `solver` is one of LIKELIHOOD_SOLVERS; "adaptive" takes only the ends of `times` and keeps to
    the tolerance. `remat` says what of a step is computed again on the way back.
    """
    if solver == "adaptive":
        return integrate(field, start, times, tolerance, every=False)
    tableau = TABLEAUS[solver]

    def step(y: PyTree, at: tuple[Array, Array]) -> tuple[PyTree, None]:
        return runge_kutta_step(tableau, field, y, *at), None

    one = rematerialised(step, remat, loop=True)
    return jax.lax.scan(one, start, (times[:-1], times[1:]))[0]


def ode_log_prob(
    denoise: Denoise,
    path: Path,
    x: Array,
    times: Array,
    key: Key | None = None,
    probes: int = 0,
    solver: str = "rk4",
    tolerance: float = TOLERANCE,
) -> Array:
    """ln p(x) in nats [n] of the samples of the ODE that begins at N(0, sigma(start)² I); exact but
    for the solver's error.

    ln p(x) = ln N(x_start; 0, sigma(start)²) + ∫ div(dx/dt) dt from `end` to `start`, where x_start
    is x carried backwards through the ODE. Song 2021, equation 39. `denoise` must treat each
    example by itself.

    Args:
        denoise: E[x0 | x_t], differentiable.
        path: the path.
        x: [n, *event], taken to be at times[-1], whose density is that at the noise level there.
        times: [n_steps + 1], decreasing from path.start to path.end as for sampling; they are run
            through backwards.
        key: for probes.
        probes: 0 for the exact divergence, at the price of one derivative a dimension; or the
            number of Rademacher vectors, the same for all t, whose mean is an unbiased estimate of
            ln p(x).
        solver: one of LIKELIHOOD_SOLVERS; "adaptive" takes only the ends of `times`.
        tolerance: of "adaptive".

    Raises:
        ConfigError: for a solver that has no likelihood, or probes without a key.
    """
    if solver not in LIKELIHOOD_SOLVERS:
        if solver not in SOLVERS:
            raise unknown_name("solver", solver, LIKELIHOOD_SOLVERS)
        raise ConfigError(
            f"The solver {solver!r} has no likelihood; those that follow the ODE itself have: "
            f"{', '.join(LIKELIHOOD_SOLVERS)}."
        )
    if probes < 0:
        raise ConfigError(f"probes must be 0 (exact) or more; got {probes}.")
    if probes and key is None:
        raise ConfigError(
            "Probes are random and need a key: pass key=jax.random.key(seed), or probes=0 for the "
            "exact divergence."
        )
    drawn = None
    if key is not None and probes:
        drawn = jax.random.rademacher(key, (probes, *x.shape), x.dtype)
    field = with_divergence(ode_field(denoise, path, x.dtype), drawn)
    backwards = jnp.asarray(times, x.dtype)[::-1]
    start = (x, jnp.zeros(x.shape[0], x.dtype))
    x_start, gained = carried(field, start, backwards, solver, tolerance)
    log_scale = jnp.log(prior(path)).astype(x.dtype)
    return sum_event(normal_log_prob(_flat(x_start), 0.0, log_scale)) + gained
