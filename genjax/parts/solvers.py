"""From noise to data along a path: solvers, the Langevin corrector and time grids.

A solver is a short scan over a plain callable, `denoise`: (x_t [n, *event], t []) -> E[x0 | x_t],
so whatever composes around that, guidance above all, works with every solver. Those that are
deterministic follow the probability-flow ODE, dx/dt = alpha'(t) x0 + sigma'(t) epsilon
(`paths.velocity_of`), whose solution has the law of the path at every t; `ode_likelihood.py` has
the density of what they make.

Ho 2020 (ancestral), Song 2020 (DDIM), Song 2021 (the ODE, predictor and corrector), Karras 2022
(Heun and its grid), Lu 2022 (DPM-Solver++).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError
from genjax.parts.paths import (
    Denoise,
    Path,
    coefficients,
    epsilon_of,
    log_snr,
    posterior,
    score_of,
    velocity_of,
)
from genjax.protocol import Array, Key, PyTree

Field = Callable[[PyTree, Array], PyTree]  # (y, t []) -> dy/dt


class Solver(Protocol):
    """x at times[0] carried to times[-1]: [n, *event], or with `every` x at all times, [n_steps +
    1, n, *event].

    `times` [n_steps + 1] decrease. The last may have sigma = 0, and `denoise` is never called
    there. The first should be path.start, with x ~ N(0, prior(path)²). A solver that draws noise
    raises ConfigError without a key; others ignore it.
    """

    def __call__(
        self,
        denoise: Denoise,
        path: Path,
        x: Array,
        times: Array,
        key: Key | None = None,
        every: bool = False,
    ) -> Array: ...


def _march(
    step: Callable[[Any, Any], Any],
    carry: Any,
    x_of: Callable[[Any], Array],
    inputs: Any,
    every: bool,
) -> Array:
    """`carry` through `step` for each of `inputs`: the last x, or all of them, the first
    included.
    """

    def body(carry: Any, at: Any) -> tuple[Any, Array | None]:
        carry = step(carry, at)
        return carry, x_of(carry) if every else None

    last, later = jax.lax.scan(body, carry, inputs)
    return x_of(last) if later is None else jnp.concatenate([x_of(carry)[None], later])


def _pairs(times: Array, x: Array) -> tuple[Array, Array]:
    times = jnp.asarray(times, x.dtype)
    return times[:-1], times[1:]


def _keys(what: str, key: Key | None, n: int) -> Array:
    if key is None:
        raise ConfigError(f"{what} draws noise and needs a key: pass key=jax.random.key(seed).")
    return jax.random.split(key, n)


# --- steps of its own -----------------------------------------------------------------------------


def ancestral(
    denoise: Denoise,
    path: Path,
    x: Array,
    times: Array,
    key: Key | None = None,
    every: bool = False,
) -> Array:
    """x_s ~ q(x_s | x_t, x0 = denoise(x_t, t)), for each next time s. Ho 2020, algorithm 2, with
    its smaller variance.

    Stochastic. Its law has an error of order 1 in the step.
    """
    t, s = _pairs(times, x)

    def step(x: Array, at: Any) -> Array:
        t, s, key = at
        mean, std = posterior(path, denoise(x, t), x, s, t)
        return mean + std * jax.random.normal(key, x.shape, x.dtype)

    return _march(step, x, lambda x: x, (t, s, _keys("The ancestral solver", key, len(t))), every)


def _to(path: Path, x0: Array, x: Array, t: Array, s: Array) -> Array:
    """x_s for the noise and the x0 of x_t: alpha_s x0 + sigma_s epsilon."""
    alpha, sigma = coefficients(path, s, x)
    return alpha * x0 + sigma * epsilon_of(path, x0, x, t)


def ddim(
    denoise: Denoise,
    path: Path,
    x: Array,
    times: Array,
    key: Key | None = None,
    every: bool = False,
) -> Array:
    """x_s = alpha_s x0 + sigma_s epsilon with x0 and epsilon of x_t. Song 2020, equation 12 with
    eta = 0. Order 1.
    """

    def step(x: Array, at: Any) -> Array:
        t, s = at
        return _to(path, denoise(x, t), x, t, s)

    return _march(step, x, lambda x: x, _pairs(times, x), every)


def dpmpp_2m(
    denoise: Denoise,
    path: Path,
    x: Array,
    times: Array,
    key: Key | None = None,
    every: bool = False,
) -> Array:
    """DDIM's step with x0 extrapolated from this step's and the last one's. Lu 2022, algorithm 2
    (DPM-Solver++(2M)). Order 2.

    x0 = D + h / (2 h') (D - D') with h half the change of the log-SNR; h' and D' are those of the
    step before. The first step, and one to sigma = 0, are DDIM's; so is the second where the first
    began at alpha = 0, with an infinite h'.
    """

    def step(carry: Any, at: Any) -> Any:
        x, before, h_before = carry
        t, s = at
        x0 = denoise(x, t)
        h = (log_snr(path, s) - log_snr(path, t)) / 2
        weight = jnp.where(jnp.isfinite(h), h / (2 * h_before), 0).astype(x.dtype)
        return _to(path, x0 + weight * (x0 - before), x, t, s), x0, h

    start = (x, jnp.zeros_like(x), jnp.asarray(jnp.inf, x.dtype))
    return _march(step, start, lambda carry: carry[0], _pairs(times, x), every)


# --- Runge-Kutta on the probability-flow ODE ------------------------------------------------------


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method of which each stage starts from the one before: k_i = f(y +
    c_i h k_{i-1}, t + c_i h).

    y + h Σ b_i k_i is the step. `last` has c and b of a step whose end the field must not be
    evaluated at, or None if the method never does.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    last: tuple[tuple[float, ...], tuple[float, ...]] | None = None


TABLEAUS = {
    "euler": Tableau((0,), (1,)),
    "midpoint": Tableau((0, 1 / 2), (0, 1)),
    "heun": Tableau((0, 1), (1 / 2, 1 / 2), last=((0, 0), (1, 0))),
    # Heun's third-order method on the way to sigma = 0: one step of it leaves the whole at order 4.
    "rk4": Tableau(
        (0, 1 / 2, 1 / 2, 1),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
        last=((0, 1 / 3, 2 / 3, 2 / 3), (1 / 4, 0, 3 / 4, 0)),
    ),
}


def _moved(y: PyTree, h: Array, k: PyTree) -> PyTree:
    return jax.tree.map(lambda y, k: y + h * k, y, k)


def runge_kutta_step(
    tableau: Tableau, field: Field, y: PyTree, t: Array, s: Array, last: Array | bool = False
) -> PyTree:
    """y at s from y at t; `last` says that the field must not be evaluated at s."""
    h = s - t
    nodes, weights = jnp.asarray(tableau.nodes, h.dtype), jnp.asarray(tableau.weights, h.dtype)
    if tableau.last is not None:
        nodes = jnp.where(last, jnp.asarray(tableau.last[0], h.dtype), nodes)
        weights = jnp.where(last, jnp.asarray(tableau.last[1], h.dtype), weights)
    k = field(y, t)
    end = _moved(y, h * weights[0], k)
    for i in range(1, len(tableau.nodes)):
        k = field(_moved(y, h * nodes[i], k), t + nodes[i] * h)
        end = _moved(end, h * weights[i], k)
    return end


def _least_time(path: Path, dtype: Any) -> Array:
    """The t nearest to data at which the noise in x_t is not lost to rounding: sigma / alpha = 3
    sqrt(eps). It may be < end.
    """
    least = jnp.asarray(3 * jnp.finfo(dtype).eps ** 0.5, dtype)
    return path.time_of_log_snr(-2 * jnp.log(least)).astype(dtype)


def ode_field(denoise: Denoise, path: Path, dtype: Any) -> Field:
    """dx/dt of the probability-flow ODE; at times nearer to sigma = 0 than can be, that at the
    nearest which can.
    """
    least = _least_time(path, dtype)

    def field(x: Array, t: Array) -> Array:
        t = jnp.maximum(t, least)
        return velocity_of(path, denoise(x, t), x, t)

    return field


def _runge_kutta(
    tableau: Tableau,
    denoise: Denoise,
    path: Path,
    x: Array,
    times: Array,
    key: Key | None = None,
    every: bool = False,
) -> Array:
    """The probability-flow ODE by `tableau`; Heun's step to sigma = 0 is Euler's. Karras 2022,
    algorithm 1, for Heun.
    """
    field = ode_field(denoise, path, x.dtype)

    def step(x: Array, at: Any) -> Array:
        t, s = at
        return runge_kutta_step(tableau, field, x, t, s, last=path.sigma(s) == 0)

    return _march(step, x, lambda x: x, _pairs(times, x), every)


euler: Solver = partial(_runge_kutta, TABLEAUS["euler"])
midpoint: Solver = partial(_runge_kutta, TABLEAUS["midpoint"])
heun: Solver = partial(_runge_kutta, TABLEAUS["heun"])
rk4: Solver = partial(_runge_kutta, TABLEAUS["rk4"])


def integrate(field: Field, y: PyTree, times: Array, tolerance: float, every: bool) -> PyTree:
    """y at times[-1], or at all of `times`, by Tsitouras' 5(4) pair with a step size that keeps to
    `tolerance`.
    """
    import diffrax

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(y, jnp.asarray(t))),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=y,
        saveat=diffrax.SaveAt(ts=times) if every else diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=4096,
    )
    return solution.ys if every else jax.tree.map(lambda leaf: leaf[0], solution.ys)


def adaptive_to(tolerance: float) -> Solver:
    """The ODE with steps as long as the local error stays below `tolerance` (absolute and relative,
    over the whole batch).

    Tsitouras 2011, by diffrax. Of `times` only the ends count, and with `every` the others say
    where x is wanted.
    """

    def solver(
        denoise: Denoise,
        path: Path,
        x: Array,
        times: Array,
        key: Key | None = None,
        every: bool = False,
    ) -> Array:
        return integrate(
            ode_field(denoise, path, x.dtype), x, jnp.asarray(times, x.dtype), tolerance, every
        )

    return solver


TOLERANCE = 1e-5
adaptive: Solver = adaptive_to(TOLERANCE)

SOLVERS: dict[str, Solver] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "midpoint": midpoint,
    "rk4": rk4,
    "adaptive": adaptive,
}


# --- Langevin corrector ---------------------------------------------------------------------------


def langevin(
    path: Path, n_steps: int = 1, snr: Array | float = 0.16
) -> Callable[[Denoise, Array, Array, Key], Array]:
    """A corrector (denoise, x [n, *event], t [], key) -> x: `n_steps` of Langevin's, which leave
    p(x_t) nearly as it is.

    x <- x + eta score(x) + sqrt(2 eta) z with eta = 2 (snr sigma(t))²; where sigma(t) = 0, x stays.
    Where x_t has the law N(m, v), the steps tend to N(m, v / (1 - eta / (2 v))). Song 2021,
    algorithms 4 and 5, has the mean norm of the noise over that of the score in place of sigma(t),
    which makes examples depend on each other, and 5, of a path that preserves the variance, eta
    times 1 - beta of a step, which is nearly 1.

    Raises:
        ConfigError: for n_steps below 1.
    """
    if n_steps < 1:
        raise ConfigError(f"n_steps must be at least 1; got {n_steps}.")

    def corrector(denoise: Denoise, x: Array, t: Array, key: Key) -> Array:
        clean = path.sigma(jnp.asarray(t)) == 0
        seen = jnp.maximum(jnp.asarray(t, x.dtype), _least_time(path, x.dtype))
        _, sigma = coefficients(path, seen, x)
        eta = 2 * jnp.square(jnp.asarray(snr, x.dtype) * sigma)

        def step(x: Array, key: Key) -> tuple[Array, None]:
            score = score_of(path, denoise(x, seen), x, seen)
            noise = jnp.sqrt(2 * eta) * jax.random.normal(key, x.shape, x.dtype)
            return x + eta * score + noise, None

        return jnp.where(clean, x, jax.lax.scan(step, x, jax.random.split(key, n_steps))[0])

    return corrector


def corrected(solver: Solver, n_steps: int = 1, snr: Array | float = 0.16) -> Solver:
    """`solver` with `n_steps` of Langevin's after each of its steps. Song 2021
    (predictor-corrector). Stochastic.

    The solver is run one step at a time, so DPM-Solver++(2M) has no step before, and is DDIM.
    """

    def with_corrector(
        denoise: Denoise,
        path: Path,
        x: Array,
        times: Array,
        key: Key | None = None,
        every: bool = False,
    ) -> Array:
        correct = langevin(path, n_steps, snr)
        t, s = _pairs(times, x)

        def step(x: Array, at: Any) -> Array:
            t, s, key = at
            key_solver, key_corrector = jax.random.split(key)
            x = solver(denoise, path, x, jnp.stack([t, s]), key_solver)
            return correct(denoise, x, s, key_corrector)

        return _march(step, x, lambda x: x, (t, s, _keys("A corrected solver", key, len(t))), every)

    return with_corrector


# --- time grids -----------------------------------------------------------------------------------

# The range of sigma / alpha that a grid covers where the path itself goes to 0 or to infinity:
# EDM's, Karras 2022, table 1.
RATIOS = (80.0, 0.002)

Grid = Callable[[Path, int], Array]


def _spaced(
    to: Callable[[Array], Array], back: Callable[[Array], Array], path: Path, n_steps: int
) -> Array:
    """Evenly spaced in `to` of the ratio sigma / alpha, from path.start to path.end, both exact.

    Where the path ends at sigma = 0 the spacing ends at 0.002 with one step less, and the last goes
    to 0, as Karras 2022 do.
    """
    _require_steps(n_steps)
    start, end = jnp.asarray(path.start), jnp.asarray(path.end)
    first, last = jnp.exp(-log_snr(path, start) / 2), jnp.exp(-log_snr(path, end) / 2)
    first = jnp.where(jnp.isinf(first), jnp.asarray(RATIOS[0], first.dtype), first)
    steps = jnp.where(last == 0, max(n_steps - 1, 1), n_steps).astype(first.dtype)
    last = jnp.where(last == 0, jnp.asarray(RATIOS[1], first.dtype), last)
    place = jnp.minimum(jnp.arange(n_steps + 1, dtype=first.dtype) / steps, 1)
    ratio = back(to(first) + place * (to(last) - to(first)))
    times = path.time_of_log_snr(-2 * jnp.log(ratio))
    return times.at[0].set(start.astype(times.dtype)).at[-1].set(end.astype(times.dtype))


def _require_steps(n_steps: int) -> None:
    if n_steps < 1:
        raise ConfigError(f"n_steps must be at least 1; got {n_steps}.")


def uniform(path: Path, n_steps: int) -> Array:
    """Evenly spaced in t: [n_steps + 1] from path.start to path.end. ConfigError for n_steps below
    1.
    """
    _require_steps(n_steps)
    return jnp.linspace(jnp.asarray(path.start), jnp.asarray(path.end), n_steps + 1)


def karras(path: Path, n_steps: int, rho: float = 7.0) -> Array:
    """Evenly spaced in (sigma / alpha)^(1 / rho): [n_steps + 1], denser towards data. Karras 2022,
    equation 5.
    """
    return _spaced(lambda ratio: ratio ** (1 / rho), lambda value: value**rho, path, n_steps)


def even_angles(path: Path, n_steps: int) -> Array:
    """Evenly spaced in arctan(sigma / alpha): the noise levels of the cosine path on any path;
    [n_steps + 1].
    """
    return _spaced(jnp.arctan, jnp.tan, path, n_steps)


def log_snr_grid(path: Path, n_steps: int) -> Array:
    """Evenly spaced in the log-SNR: [n_steps + 1]. Lu 2022."""
    return _spaced(jnp.log, jnp.exp, path, n_steps)


GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "karras": karras,
    "cosine": even_angles,
    "log_snr": log_snr_grid,
}
