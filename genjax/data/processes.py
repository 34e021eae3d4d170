"""Sequences from processes whose likelihood and entropy are known, so that a model's figures can be
held to the truth.

A Markov chain, a hidden Markov model and a linear-Gaussian state-space model, all stationary. Their
likelihoods are plain functions of the parameters in `jax.numpy`, in the dtype of what they are
given, for proofs of models as well: a recurrent VAE with linear Gaussian parts has the Kalman
filter's likelihood, one with discrete states that of the forward algorithm.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from genjax.data.drawn import drawn_source
from genjax.data.order import Examples
from genjax.data.source import Source
from genjax.errors import ConfigError
from genjax.protocol import Array, DataSpec
from genjax.settings import Within, checking

Symbols = Annotated[int, Within(2, 2**10)]
Emitted = Annotated[int, Within(2, 2**17)]
States = Annotated[int, Within(2, 2**5)]  # of which pairs are enumerated, for the entropy
Length = Annotated[int, Within(1, 2**14)]
Steps = Annotated[int, Within(1, 2**9)]  # whose covariance is a matrix, for the entropy

_N_HELD = 2_000  # validation and test sequences, each
_MOST = 2**27  # numbers that drawing a split may take at once
_BLOCKS = 2**16  # so many sequences are enumerated for the entropy of a hidden Markov model


@checking
def markov(n_symbols: Symbols = 4, length: Length = 64, n_train: Examples = 20_000) -> Source:
    """A Markov chain of order 1 over tokens: p(x) = π(x_1) Π_t P(x_t | x_{t-1}), with π = π P.

    The entropy of a whole sequence is H(π) + (T-1) h with the rate h of `markov_entropy_rate`; see
    `markov_parameters`.

    Args:
        n_symbols: how many symbols the chain has; the rows of P are drawn once, from a fixed seed.
        length: how many steps T a sequence has.
        n_train: how many training sequences to draw.

    Raises:
        ConfigError: for fewer than 2 symbols, or a size below 1.
    """
    initial, transition = markov_parameters(n_symbols)
    spec = _token_spec("markov", n_symbols, length)

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return _walk(rng, n, length, initial, transition)

    entropy = _entropy(initial) + (length - 1) * markov_entropy_rate(transition)
    return _source(spec, draw, lambda x: markov_log_prob(x, initial, transition), entropy, n_train)


@checking
def hmm(
    n_states: States = 3, n_symbols: Emitted = 4, length: Length = 32, n_train: Examples = 20_000
) -> Source:
    """A hidden Markov model: p(x) = Σ_z π(z_1) Π_t P(z_t | z_{t-1}) Π_t E(x_t | z_t), with π = π P.

    `log_prob` is exact, by the forward algorithm. The entropy is the middle of the bounds of
    `hmm_entropy`, and the
    description says how far apart they are: ±2e-5 nats a sequence for the defaults. See
        `hmm_parameters`.

    Args:
        n_states: how many hidden states there are; P and E are drawn once, from a fixed seed.
        n_symbols: how many symbols are emitted.
        length: how many steps T a sequence has.
        n_train: how many training sequences to draw.

    Raises:
        ConfigError: for fewer than 2 states or symbols, or a size below 1.
    """
    initial, transition, emission = hmm_parameters(n_states, n_symbols)
    spec = _token_spec("hmm", n_symbols, length)

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return _choose(rng, emission[_walk(rng, n, length, initial, transition)])

    low, high = hmm_entropy(initial, transition, emission, length)
    source = _source(
        spec,
        draw,
        lambda x: hmm_log_likelihood(x, initial, transition, emission),
        (low + high) / 2,
        n_train,
    )
    return source._replace(
        description=f"{source.description}; entropy known to ±{(high - low) / 2:.1g} nats"
    )


@checking
def lgssm(length: Steps = 32, n_train: Examples = 20_000) -> Source:
    """A linear-Gaussian state-space model, a damped rotation in the plane seen through noise:
    vectors [T, 2].

    z_1 ~ N(m0, P0), z_t ~ N(A z_{t-1}, Q), x_t ~ N(C z_t, R), with (m0, P0) stationary; see
    `lgssm_parameters`. `log_prob` is exact, by the Kalman filter; the entropy of a whole sequence
    is ½ ln det(2πe Σ), Σ the covariance of all T vectors.

    Args:
        length: how many steps T a sequence has.
        n_train: how many training sequences to draw.

    Raises:
        ConfigError: for a size below 1.
    """
    parameters = lgssm_parameters()
    spec = DataSpec((length, 2), "continuous", step="step", name="lgssm")

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        A, C, Q, R, m0, P0 = parameters
        q, r = np.linalg.cholesky(Q), np.linalg.cholesky(R)
        z = m0 + rng.standard_normal((n, 2)) @ np.linalg.cholesky(P0).T
        x = np.empty((n, length, 2))
        for t in range(length):
            x[:, t] = z @ C.T + rng.standard_normal((n, 2)) @ r.T
            z = z @ A.T + rng.standard_normal((n, 2)) @ q.T
        return x

    return _source(
        spec,
        draw,
        lambda x: kalman_log_likelihood(x, *parameters),
        lgssm_entropy(*parameters, length),
        n_train,
    )


# --- parameters ---------------------------------------------------------------------------------


@checking
def markov_parameters(n_symbols: Symbols = 4) -> tuple[np.ndarray, np.ndarray]:
    """(π [V], P [V, V]) of `markov`, float64; the rows of P are uniform on the simplex, drawn from
    a fixed seed.

    Raises:
        ConfigError: for fewer than 2 symbols.
    """
    transition = _rows(np.random.default_rng(0), n_symbols, n_symbols)
    return stationary(transition), transition


@checking
def hmm_parameters(
    n_states: States = 3, n_symbols: Emitted = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(π [K], P [K, K], E [K, V]) of `hmm`, float64, drawn from a fixed seed.

    P is 0.7 to stay and 0.3 for a step with probabilities uniform on the simplex; those of E are
    squared and normalised, which tells the states apart. So the past says a good deal of the
    future: for the defaults 0.14 nats a step.

    Raises:
        ConfigError: for fewer than 2 states or symbols.
    """
    rng = np.random.default_rng(1)
    transition = 0.7 * np.eye(n_states) + 0.3 * _rows(rng, n_states, n_states)
    emission = _rows(rng, n_states, n_symbols) ** 2
    return stationary(transition), transition, emission / emission.sum(axis=1, keepdims=True)


class LinearGaussian(NamedTuple):
    """z_1 ~ N(m0 [K], P0 [K, K]), z_t ~ N(A z_{t-1}, Q), x_t ~ N(C z_t, R): A, Q [K, K], C [D, K],
    R [D, D].
    """

    A: Any
    C: Any
    Q: Any
    R: Any
    m0: Any
    P0: Any


def lgssm_parameters() -> LinearGaussian:
    """Those of `lgssm`, float64: K = D = 2, A a rotation by half a radian times 0.95, P0 = A P0 A'
    + Q.
    """
    A = 0.95 * np.array([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    C = np.array([[1.0, 0.0], [0.5, 1.0]])
    Q, R = np.diag([0.1, 0.2]), np.array([[0.3, 0.1], [0.1, 0.2]])
    P0 = np.linalg.solve(np.eye(4) - np.kron(A, A), Q.ravel()).reshape(2, 2)
    return LinearGaussian(A, C, Q, R, np.zeros(2), P0)


def stationary(transition: np.ndarray) -> np.ndarray:
    """The distribution π [V] with π = π P, of a chain that has only one."""
    n = len(transition)
    equations = np.concatenate([transition.T - np.eye(n), np.ones((1, n))])
    return np.linalg.lstsq(equations, np.append(np.zeros(n), 1.0))[0]


# --- likelihoods and entropies ------------------------------------------------------------------


def markov_log_prob(x: Array, initial: Any, transition: Any) -> Array:
    """ln π(x_1) + Σ_t ln P(x_t | x_{t-1}) in nats [B], for tokens [B, T], π [V] and P [V, V]."""
    x = jnp.asarray(x).astype(jnp.int32)
    steps = jnp.log(jnp.asarray(transition))[x[:, :-1], x[:, 1:]]
    return jnp.log(jnp.asarray(initial))[x[:, 0]] + steps.sum(axis=1)


def markov_entropy_rate(transition: np.ndarray) -> float:
    """h = -Σ_i π_i Σ_j P_ij ln P_ij in nats a step, π being stationary (Cover & Thomas 2006,
    theorem 4.2.4).
    """
    return float(
        sum(
            weight * _entropy(row)
            for weight, row in zip(stationary(transition), transition, strict=True)
        )
    )


def hmm_log_likelihood(x: Array, initial: Any, transition: Any, emission: Any) -> Array:
    """ln Σ_z π(z_1) E(x_1 | z_1) Π_t P(z_t | z_{t-1}) E(x_t | z_t) in nats [B], by the forward
    algorithm in log-space.

    x is tokens [B, T]; π [K], P [K, K] and E [K, V] are probabilities. Zeros are allowed (the
    gradient is not defined there).
    """
    x = jnp.asarray(x).astype(jnp.int32)
    log_initial, log_transition, log_emission = (
        jnp.log(jnp.asarray(p)) for p in (initial, transition, emission)
    )
    emitted = log_emission.T[x.T]  # [T, B, K]

    def step(alpha: Array, log_e: Array) -> tuple[Array, None]:
        return jax.nn.logsumexp(alpha[:, :, None] + log_transition[None], axis=1) + log_e, None

    alpha, _ = jax.lax.scan(step, log_initial[None] + emitted[0], emitted[1:])
    return jax.nn.logsumexp(alpha, axis=1)


def hmm_entropy(
    initial: np.ndarray, transition: np.ndarray, emission: np.ndarray, length: int
) -> tuple[float, float]:
    """A lower and an upper bound of the entropy of x_1 .. x_T in nats; they are equal where all
    sequences can be enumerated.

    H(x_1..T) = Σ_t H(x_t | x_1..t-1), in which the terms to t = k are exact, by enumerating V**k
    sequences, and each later one is between H(x_k | x_1..k-1, z_1) and H(x_k | x_1..k-1) (Cover &
    Thomas 2006, theorem 4.5.1); π must be stationary.
    """
    n_symbols = emission.shape[1]
    k = max(1, min(length, int(math.log(_BLOCKS) / math.log(n_symbols))))
    block, given = [0.0], [0.0]  # H(x_1..t) and H(x_1..t | z_1) for t = 0 .. k
    # p(x_1..t, z_t | z_1) for every z_1 and sequence, [K, V**t, K]
    forward = np.eye(len(initial))[:, None, :]
    for t in range(k):
        forward = forward if t == 0 else forward @ transition
        forward = (forward[:, :, None, :] * emission.T[None, None]).reshape(
            len(initial), -1, len(initial)
        )
        probability = forward.sum(axis=-1)
        given.append(
            float(
                sum(
                    weight * _entropy(row) for weight, row in zip(initial, probability, strict=True)
                )
            )
        )
        block.append(_entropy(initial @ probability))
    rest = length - k
    return block[k] + rest * (given[k] - given[k - 1]), block[k] + rest * (block[k] - block[k - 1])


def lgssm_entropy(A: Any, C: Any, Q: Any, R: Any, m0: Any, P0: Any, length: int) -> float:
    """½ ln det(2πe Σ) in nats, Σ being the covariance of all T vectors: C P_s (A^{t-s})' C' + [s =
    t] R for s <= t.
    """
    d = len(C)
    joint = np.zeros((length, d, length, d))
    P = np.asarray(P0)
    for s in range(length):
        ahead = P  # Cov(z_s, z_t)
        for t in range(s, length):
            joint[s, :, t] = C @ ahead @ C.T + (R if s == t else 0)
            joint[t, :, s] = joint[s, :, t].T
            ahead = ahead @ A.T
        P = A @ P @ A.T + Q
    return 0.5 * float(
        np.linalg.slogdet(2 * math.pi * math.e * joint.reshape(length * d, length * d))[1]
    )


def kalman_log_likelihood(x: Array, A: Any, C: Any, Q: Any, R: Any, m0: Any, P0: Any) -> Array:
    """ln p(x) = Σ_t ln N(x_t; C m_t, C P_t C' + R) in nats [B], by the Kalman filter; see
    `LinearGaussian` for the model.

    x is [B, T, D], and the result has its dtype.
    """
    return _filter(x, LinearGaussian(A, C, Q, R, m0, P0))[0].sum(axis=0)


class Smoothed(NamedTuple):
    """p(z_1..T | x_1..T), which is Gaussian: `mean` [B, T, K]; and, the same for every x,
    `covariance` [T, K, K], that of z_t, and `cross` [T-1, K, K], Cov(z_{t+1}, z_t).
    """

    mean: Array
    covariance: Array
    cross: Array


def rts_smoother(x: Array, A: Any, C: Any, Q: Any, R: Any, m0: Any, P0: Any) -> Smoothed:
    """The posterior of the states given all of x [B, T, D], in its dtype (Rauch, Tung & Striebel
    1965).

    With J_t = P_t|t A' P_{t+1|t}^{-1}: m_t|T = m_t|t + J_t (m_{t+1|T} - m_{t+1|t}), P_t|T = P_t|t +
    J_t (P_{t+1|T} - P_{t+1|t}) J_t', and Cov(z_{t+1}, z_t | x) = P_{t+1|T} J_t'. It is a Markov
    chain, in both directions.
    """
    model = LinearGaussian(A, C, Q, R, m0, P0)
    _, predicted, filtered = _filter(x, model)
    A = jnp.asarray(A, jnp.asarray(x).dtype)

    def step(
        later: tuple[Array, Array], now: tuple[Array, Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Any]:
        (mean, P), (m, P_now, m_next, P_next) = later, now
        J = jnp.linalg.solve(P_next, A @ P_now).T
        smoothed = m + (mean - m_next) @ J.T, P_now + J @ (P - P_next) @ J.T
        return smoothed, (*smoothed, P @ J.T)

    last = filtered[0][-1], filtered[1][-1]
    before = filtered[0][:-1], filtered[1][:-1], predicted[0][1:], predicted[1][1:]
    _, (mean, covariance, cross) = jax.lax.scan(step, last, before, reverse=True)
    mean = jnp.concatenate([mean, last[0][None]])
    return Smoothed(mean.transpose(1, 0, 2), jnp.concatenate([covariance, last[1][None]]), cross)


def _filter(
    x: Array, model: LinearGaussian
) -> tuple[Array, tuple[Array, Array], tuple[Array, Array]]:
    """ln p(x_t | x_1..t-1) [T, B]; and mean [T, B, K] and covariance [T, K, K] of z_t given
    x_1..t-1, and given x_1..t.
    """
    x = jnp.asarray(x)
    A, C, Q, R, m0, P0 = (jnp.asarray(parameter, x.dtype) for parameter in model)

    def step(carry: tuple[Array, Array], x_t: Array) -> tuple[tuple[Array, Array], Any]:
        m, P = carry
        L = jnp.linalg.cholesky(C @ P @ C.T + R)
        error = x_t - m @ C.T
        white = solve_triangular(L, error.T, lower=True)  # [D, B]
        log_det = 2 * jnp.log(jnp.diagonal(L)).sum() + x_t.shape[1] * math.log(2 * math.pi)
        gain = cho_solve((L, True), C @ P).T  # [K, D]
        m_now, P_now = m + error @ gain.T, P - gain @ C @ P
        P_now = (P_now + P_now.T) / 2
        return (m_now @ A.T, A @ P_now @ A.T + Q), (
            -0.5 * ((white**2).sum(axis=0) + log_det),
            carry,
            (m_now, P_now),
        )

    start = jnp.broadcast_to(m0[None], (x.shape[0], m0.shape[0])), P0
    return jax.lax.scan(step, start, x.transpose(1, 0, 2))[1]


# --- helpers ------------------------------------------------------------------------------------


def _token_spec(name: str, n_symbols: int, length: int) -> DataSpec:
    return DataSpec((length,), "tokens", levels=n_symbols, step="token", name=name)


def _source(
    spec: DataSpec,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    log_prob: Callable[[Array], Array],
    entropy: float,
    n_train: int,
) -> Source:
    n, each = max(n_train, _N_HELD), max(spec.size, spec.levels or 0)
    if n * each > _MOST:
        raise ConfigError(
            f"Drawing {n} sequences of {spec.size} numbers takes {n * each} numbers at once, more "
            f"than {_MOST}: take a smaller n_train, fewer symbols or shorter ones."
        )

    def unlabelled(rng: np.random.Generator, n: int) -> tuple[np.ndarray, None]:
        return draw(rng, n), None

    sizes = n_train, _N_HELD, _N_HELD
    return drawn_source(spec, unlabelled, log_prob, entropy, sizes, "sequences of a known process")


def _rows(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """n distributions of `size` outcomes, uniform on the simplex: exponential numbers over their
    sum.
    """
    weight = -np.log1p(-rng.random((n, size)))
    return weight / weight.sum(axis=1, keepdims=True)


def _choose(rng: np.random.Generator, probability: np.ndarray) -> np.ndarray:
    """An outcome for each of the distributions [..., V], by inverting the distribution function."""
    below = np.cumsum(probability, axis=-1)[
        ..., :-1
    ]  # without the last, which rounding may leave under 1
    return (rng.random(probability.shape[:-1])[..., None] >= below).sum(axis=-1)


def _walk(
    rng: np.random.Generator, n: int, length: int, initial: np.ndarray, transition: np.ndarray
) -> np.ndarray:
    """n paths of a Markov chain, [n, length]."""
    path = np.empty((n, length), np.int64)
    path[:, 0] = _choose(rng, np.tile(initial, (n, 1)))
    for t in range(1, length):
        path[:, t] = _choose(rng, transition[path[:, t - 1]])
    return path


def _entropy(probability: np.ndarray) -> float:
    """-Σ p ln p, with 0 ln 0 = 0."""
    some = probability[probability > 0]
    return -float((some * np.log(some)).sum())
