"""Averages of the weights whose length is chosen after training (Karras 2024, arXiv 2312.02696,
section 3 and appendix C).

The average of length sigma_rel at step T weighs the weights θ_t of step t, 1 <= t <= T, by how much
of the power function p(τ) = (γ + 1) τ^γ / T^{γ + 1} lies in (t - 1, t]:

    w_t = (t^{γ + 1} - (t - 1)^{γ + 1}) / T^{γ + 1},

where sigma_rel is the standard deviation of p in units of T. It is kept up by

    average <- average + (1 - (1 - 1/t)^{γ + 1}) (θ_t - average).

Two of them, stored now and then (`runs/averages.py`), span many others: the one asked for later is
the combination of them whose p is nearest, among those that average polynomials exactly.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.errors import ConfigError
from genjax.protocol import PyTree
from genjax.settings import Within

if TYPE_CHECKING:
    import optax

SigmaRel = Annotated[float, Within(0.01, 0.25)]
DEGREE = 3  # of the polynomials that are averaged exactly, where enough is stored


class Powers(NamedTuple):
    """State of `track_powers`: `count` updates, and an average with the structure of the parameters
    for each sigma_rel.
    """

    count: jax.Array
    averages: tuple[PyTree, ...]


def gamma_of(sigma_rel: float) -> float:
    """γ, of (γ + 1) / ((γ + 2)² (γ + 3)) = sigma_rel².

    Example:
        >>> round(gamma_of(0.1), 2)
        6.94
    """
    s = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


def track_powers(sigma_rels: Iterable[float]) -> "optax.GradientTransformation":
    """Keep the averages of these lengths after each update; put it last in a chain, since it sees
    the final update.

    Args:
        sigma_rels: each in [0.01, 0.25]; Karras has 0.05 and 0.1.
    """
    import optax

    gammas = [gamma_of(sigma_rel) for sigma_rel in sigma_rels]

    def init(params: PyTree) -> Powers:
        # Copies: aliases of the parameters could not be donated.
        copies = tuple(jax.tree.map(jnp.copy, params) for _ in gammas)
        return Powers(jnp.zeros((), jnp.int32), copies)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Powers]:
        if params is None:
            raise ConfigError(
                "track_powers needs the parameters: call update(grads, state, params)."
            )
        t = (state.count + 1).astype(jnp.result_type(float))

        def averaged(gamma: float, kept: PyTree) -> PyTree:
            share = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / t))

            def one(average: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
                return average + share.astype(average.dtype) * (p + u - average)

            return jax.tree.map(one, kept, params, updates)

        pairs = zip(gammas, state.averages, strict=True)
        return updates, Powers(state.count + 1, tuple(averaged(*pair) for pair in pairs))

    return optax.GradientTransformation(init, update)


def powers_in(opt: Any) -> Powers | None:
    """What a `track_powers` anywhere in an optimiser's state keeps; None where there is none."""
    found = jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, Powers))
    return next((leaf for leaf in found if isinstance(leaf, Powers)), None)


# --- any other length -----------------------------------------------------------------------------


class Kept(NamedTuple):
    """Which average: its length, and the number of updates that it is of."""

    sigma_rel: float
    step: int


def weights_of(kept: Kept) -> np.ndarray:
    """w_t of an average, t = 1, ..., its step."""
    g, t = gamma_of(kept.sigma_rel) + 1, np.arange(1.0, kept.step + 1)
    with np.errstate(divide="ignore"):  # of the first, which is all that there is then
        return -np.expm1(g * np.log1p(-1 / t)) * (t / kept.step) ** g


def _products(a: Sequence[Kept], b: Sequence[Kept]) -> np.ndarray:
    """∫ p_i p_j of all pairs, [len(a), len(b)]."""

    def columns(of: Sequence[Kept]) -> tuple[np.ndarray, np.ndarray]:
        gammas = np.array([gamma_of(one.sigma_rel) for one in of])
        return gammas, np.array([float(one.step) for one in of])

    (ga, ta), (gb, tb) = columns(a), columns(b)
    ga, ta = ga[:, None], ta[:, None]
    least = np.minimum(ta, tb)
    shares = (least / ta) ** ga * (least / tb) ** gb
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * shares * least / (ta * tb)


def _moments(of: Sequence[Kept], last: int, degree: int) -> np.ndarray:
    """Σ_t w_t (t / last)^k for k = 0, ..., degree, [degree + 1, len(of)]."""
    columns = []
    for one in of:
        weights, t = weights_of(one), np.arange(1.0, one.step + 1) / last
        columns.append([np.dot(weights, t**k) for k in range(degree + 1)])
    return np.array(columns).T


def combination(wanted: Kept, kept: Sequence[Kept]) -> tuple[np.ndarray, float]:
    """What to multiply each average by so that their sum is the one that is wanted, and how far its
    p is from that of the sum: the norm of the difference over its own.

    min_x ∫ (Σ_i x_i p_i - p)²  such that polynomials of t up to degree min(3, n / 2 - 1) are
    averaged exactly, of n averages; the sum of x is always 1.

    Args:
        wanted: the length, and the step that the average is to be of.
        kept: what was stored, of that step and before.
    """
    degree = min(DEGREE, max(0, len(kept) // 2 - 1))
    products, with_wanted = _products(kept, kept), _products(kept, [wanted])[:, 0]
    norms = np.sqrt(np.diag(products))  # p of early steps are higher by far
    moments = _moments(kept, wanted.step, degree) / norms
    exact = _moments([wanted], wanted.step, degree)[:, 0]
    n, m = len(kept), degree + 1
    system = np.zeros((n + m, n + m))
    system[:n, :n] = products / np.outer(norms, norms)
    system[:n, n:], system[n:, :n] = moments.T, moments
    right = np.concatenate([with_wanted / norms, exact])
    x = np.linalg.lstsq(system, right, rcond=1e-14)[0][:n] / norms
    own = float(_products([wanted], [wanted])[0, 0])
    squared = float(x @ products @ x - 2 * with_wanted @ x) + own
    return x, float(np.sqrt(max(squared, 0.0) / own))
