"""Flow matching: a velocity field that carries noise to data, learned by regression on the lines
that join pairs of the two.

Lipman 2023 (flow matching), Liu 2023 (rectified flow), Albergo 2023 (interpolants), Pooladian 2023
and Tong 2024 (couplings by optimal transport), Esser 2024 (logit-normal times), Ho & Salimans 2022
(classifier-free guidance). As everywhere here, t = 0 is data and t = 1 noise; these papers count
the other way, and their velocity is the negative of ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import check_cond, checked
from genjax.errors import ConfigError
from genjax.nets.denoiser import DenoiserNet, denoiser, labels
from genjax.nets.functional import Net
from genjax.parts.bounds import squared
from genjax.parts.likelihoods import dequantized_bound
from genjax.parts.noise_to_data import (
    NoiseToData,
    OdeLikelihood,
    Sampling,
    check_events,
    check_noised,
    denoiser_of,
    dropped_conditions,
    ode_density,
    sample_with,
)
from genjax.parts.pairing import COUPLINGS
from genjax.parts.paths import (
    PREDICTIONS,
    Denoise,
    Path,
    conditional_ot,
    diffuse,
    rates,
    variance_preserving,
)
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Metrics, Model, Params, State
from genjax.settings import CondDropout, Dtype, builder, guided_by

PATHS: dict[str, Callable[[], Path]] = {
    "conditional_ot": conditional_ot,
    "variance_preserving": variance_preserving,
}
# Keeps the noise level that a network sees within ±3, where the log-SNR / 4 of both paths is
# infinite at the ends.
SOFTENING = 1 / 400


# --- the regression -------------------------------------------------------------------------------


def line_velocity(path: Path, x0: Array, epsilon: Array, t: Array) -> Array:
    """alpha'(t) x0 + sigma'(t) ε, [n, *event]: the velocity of x_t between a pair of data and
    noise. Lipman 2023.

    Its mean given x_t is the velocity of the flow (`paths.velocity_of`), so that is what the
    regression finds.
    """
    alpha_rate, sigma_rate = rates(path, t, x0)
    return alpha_rate * x0 + sigma_rate * epsilon


def noise_level(path: Path, t: Array) -> Array:
    """½ ln((alpha + δ) / (sigma + δ)), of t's shape: log-SNR / 4 but for the ends of the path,
    where it is ±3.
    """
    return 0.5 * (jnp.log(path.alpha(t) + SOFTENING) - jnp.log(path.sigma(t) + SOFTENING))


def uniform_times(key: Key, n: int, dtype: Any) -> Array:
    """t [n] uniform on [0, 1)."""
    return jax.random.uniform(key, (n,), dtype)


def logit_normal_times(key: Key, n: int, dtype: Any) -> Array:
    """t [n] with ln(t / (1 - t)) ~ N(0, 1): more of the middle, where there is most to learn. Esser
    2024.
    """
    return jax.nn.sigmoid(jax.random.normal(key, (n,), dtype))


TIMES: dict[str, Callable[[Key, int, Any], Array]] = {
    "uniform": uniform_times,
    "logit_normal": logit_normal_times,
}


def unit_weight(path: Path, t: Array) -> Array:
    """1: the squared error of the velocity, [n]."""
    return jnp.ones_like(t)


def x0_weight(path: Path, t: Array) -> Array:
    """(sigma / (alpha sigma' - alpha' sigma))², [n]: makes it the squared error of x0. On straight
    lines it is t².
    """
    return jnp.square(PREDICTIONS["velocity"].to_x0(path, jnp.ones_like(t), jnp.zeros_like(t), t))


LOSSES: dict[str, Callable[[Path, Array], Array]] = {"velocity": unit_weight, "x0": x0_weight}


# --- the model, as functions of its parameters p --------------------------------------------------


class FlowModel(NamedTuple):
    """What a flow-matching model consists of; its parameters p are those of the net.

    Attributes:
        spec: the data.
        net: (x_t, noise level, cond, dropped) -> v, [n, *shape].
        path: from data to noise.
        couple: (key, x0, epsilon, allowed) -> whose noise goes with which example, int [n].
        times: (key, n, dtype) -> where the loss looks, t [n].
        weigh: (path, t) -> the weight of the squared error of v, [n].
        cond_dropout: how often training leaves out the condition.
        guided: whether it ever does.
    """

    spec: DataSpec
    net: Net
    path: Path
    couple: Callable[[Key, Array, Array, Array | None], Array]
    times: Callable[[Key, int, Any], Array]
    weigh: Callable[[Path, Array], Array]
    cond_dropout: Any
    guided: bool


class FlowNoise(NamedTuple):
    """What the loss draws for a batch.

    Attributes:
        t: times, [n].
        epsilon: the noise in x_t, [n, *shape], as the coupling has given it to the examples.
        dropped: which examples go without their condition, bool [n]; None if none ever does.
        u: what is added to binary and discrete values, [n, *shape], uniform on [-½, ½); None for
            continuous data.
    """

    t: Array
    epsilon: Array
    dropped: Array | None
    u: Array | None


class Flow(NamedTuple):
    """The `extras` of a flow-matching model, on the normalised scale.

    Attributes:
        velocity: (params, state, x_t, t [] or [n], cond=None, dropped=None) -> v(x_t, t),
            [n, *shape].
        drop: (key, n) -> which examples go without their condition in training, bool [n], or None
            if none ever does.
        times: (key, n, dtype) -> where the loss looks, t [n].
        regress: (params, state, x0, epsilon, t [n], cond=None, dropped=None) -> loss [n] and Aux,
            of pairs that are given.
    """

    velocity: Callable[..., Array]
    drop: Callable[[Key, int], Array | None]
    times: Callable[[Key, int, Any], Array]
    regress: Callable[..., tuple[Array, Aux]]


def velocity_of(
    model: FlowModel, p: Any, cond: Any, dropped: Array | None = None
) -> Callable[[Array, Array], Array]:
    """(x_t [n, *shape], t [] or [n]) -> v(x_t, t) given the conditions, [n, *shape]."""
    c = model.spec.embed(cond, p)

    def velocity(x_t: Array, t: Array) -> Array:
        each = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), x_t.shape[:1])
        return model.net.apply(p, {}, x_t, noise_level(model.path, each), c, dropped)[0]

    return velocity


def denoise_of(model: FlowModel, p: Any, cond: Any, dropped: Array | None = None) -> Denoise:
    """(x_t [n, *shape], t [] or [n]) -> the estimate of E[x0 | x_t, cond], [n, *shape]."""
    velocity = velocity_of(model, p, cond, dropped)
    return lambda x_t, t: PREDICTIONS["velocity"].to_x0(model.path, velocity(x_t, t), x_t, t)


def dequantized(spec: DataSpec, x: Array, u: Array | None) -> Array:
    """x + u on the normalised scale, [n, *shape]; x itself for u = None."""
    return spec.normalize(x if u is None else x + u)


def draw(model: FlowModel, key: Key, batch: Batch) -> FlowNoise:
    """The randomness of the loss: the only place that splits its key."""
    spec, x, n = model.spec, batch.x, batch.x.shape[0]
    key_noise, key_pairs, key_data, key_cond, key_time = jax.random.split(key, 5)
    u = None
    if spec.kind != "continuous":
        u = jax.random.uniform(key_data, x.shape, x.dtype, -0.5, 0.5)
    epsilon = jax.random.normal(key_noise, x.shape, x.dtype)
    alike = None
    if spec.n_classes is not None and batch.cond is not None:
        alike = batch.cond[:, None] == batch.cond[None, :]
    partners = model.couple(key_pairs, dequantized(spec, x, u), epsilon, alike)
    dropped = dropped_conditions(key_cond, model.cond_dropout, n, model.guided)
    return FlowNoise(model.times(key_time, n, x.dtype), epsilon[partners], dropped, u)


def regression(
    model: FlowModel,
    p: Any,
    x0: Array,
    epsilon: Array,
    t: Array,
    cond: Any = None,
    dropped: Array | None = None,
) -> tuple[Array, Metrics]:
    """w(t) ‖v(x_t, t) - (alpha' x0 + sigma' ε)‖², [n], of pairs (x0, ε) [n, *shape] at t [n]."""
    x_t = diffuse(model.path, x0, epsilon, t)
    missed = velocity_of(model, p, cond, dropped)(x_t, t)
    error = squared(missed - line_velocity(model.path, x0, epsilon, t))
    return model.weigh(model.path, t) * error, {"mse": error / model.spec.size}


def flow_of(model: FlowModel) -> Flow:
    """The model's functions that `reflow` and tests of the flow itself need."""

    def velocity(
        params: Params,
        state: State,
        x_t: Array,
        t: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> Array:
        check_noised(model.spec, x_t, t, dropped)
        check_cond(model.spec, cond, x_t.shape[0])
        return velocity_of(model, params["flow"], cond, dropped)(x_t, t)

    def drop(key: Key, n: int) -> Array | None:
        return dropped_conditions(key, model.cond_dropout, n, model.guided)

    def regress(
        params: Params,
        state: State,
        x0: Array,
        epsilon: Array,
        t: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> tuple[Array, Aux]:
        value, metrics = regression(model, params["flow"], x0, epsilon, t, cond, dropped)
        return value, Aux(state, metrics)

    return Flow(velocity, drop, model.times, regress)


@builder
def flow_matching(
    spec: DataSpec,
    *,
    probability_path: Literal["conditional_ot", "variance_preserving"] = "conditional_ot",
    coupling: Literal["independent", "optimal", "entropic"] = "independent",
    times: Literal["uniform", "logit_normal"] = "uniform",
    loss: Literal["velocity", "x0"] = "velocity",
    network: DenoiserNet = DenoiserNet(),
    cond_dropout: CondDropout = 0.0,
    sampling: Sampling = Sampling(),
    likelihood: OdeLikelihood = OdeLikelihood(),
    dtype: Dtype = "float32",
) -> Model:
    """A flow from N(0, I) to the data; conditional if the spec has a condition.

    With x_t = alpha(t) x0 + sigma(t) ε, x0 the normalised event (dequantised, if it is binary or
    discrete), the loss per example is w(t) ‖v(x_t, t) - (alpha' x0 + sigma' ε)‖² at one random t
    for each; it is no log-probability, and not in nats. Samples follow dx/dt = v from noise at t =
    1 to data at t = 0. Shapes: x_t [n, *shape], t [] or [n].

    `log_prob`, for continuous data, is the density of those samples in nats by the change of
    variables along the ODE, exact but for the solver's error (Chen 2018, Lipman 2023); for binary
    and discrete data `bound` is that of dequantised data, per level (`dequantized_bound`), whose
    expectation is at most ln P(x). Its steps are on the grid that samples have.

    `denoiser` has the path, the estimate of E[x0 | x_t] and `generate`, which takes other settings
    of samples than the builder's (`parts.noise_to_data.denoiser_of`); `extras` is a `Flow`, and
    `noise` gives a `FlowNoise`.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, flow_matching
        >>> model = flow_matching(DataSpec((2,), "continuous"), hidden=(8,), n_steps=4)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 3).shape
        (3, 2)

    Args:
        spec: the data; binary, discrete or continuous, and no sequences.
        probability_path: "conditional_ot", straight lines x_t = (1 - t) x0 + t ε, or
            "variance_preserving", circles, x_t = cos(πt/2) x0 + sin(πt/2) ε.
        coupling: of noise and data within a batch: "independent", "optimal" (the assignment that is
            shortest in squares) or "entropic" (drawn from Sinkhorn's plan). Examples then depend on
            each other. With labels, noise is exchanged only within a class: otherwise it would tell
            of the class, and samples begin with noise that does not.
        times: where the loss looks: "uniform" in t, or "logit_normal".
        loss: the squared error of the "velocity", or of "x0" as estimated from it, which counts
            noisy times more.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit each other or the data.
    """
    check_events(spec, "Flow matching")
    if coupling != "independent" and spec.cond_dim:
        raise ConfigError(
            f"coupling={coupling!r} would let noise tell of the condition, which is a vector in "
            f"{spec.name}: use 'independent'."
        )
    guided = guided_by(spec, cond_dropout)
    own = FlowModel(
        spec=spec,
        net=denoiser(spec, network, guided, dtype),
        path=PATHS[probability_path](),
        couple=COUPLINGS[coupling],
        times=TIMES[times],
        weigh=LOSSES[loss],
        cond_dropout=cond_dropout,
        guided=guided,
    )
    way = NoiseToData(
        spec=spec,
        path=lambda params: own.path,
        denoise=lambda params, cond, dropped: denoise_of(own, params["flow"], cond, dropped),
        guided=guided,
    )
    record, flow, noise = denoiser_of(way, sampling), flow_of(own), partial(draw, own)

    def init(key: Key) -> tuple[Params, State]:
        return {"flow": own.net.init(key)[0]}, {"flow": {}}

    def regress(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        t, epsilon, dropped, u = noise(key, batch)
        x0 = dequantized(spec, batch.x, u)
        return flow.regress(params, state, x0, epsilon, t, batch.cond, dropped)

    def log_density(params: Params, x0: Array, cond: Any, key: Key) -> Array:
        return ode_density(way, likelihood, sampling.grid, params, x0, cond, key)

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return log_density(params, spec.normalize(batch.x), batch.cond, key) + spec.log_volume

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        key_data, key_probes = jax.random.split(key)
        return dequantized_bound(
            spec, lambda x0: log_density(params, x0, batch.cond, key_probes), batch.x, key_data
        )

    exact = spec.kind == "continuous"
    words = f"ODE, {likelihood.in_words}"
    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"flow": regress},
            sample=sample_with(record),
            log_prob=log_prob if exact else None,
            bound=None if exact else bound,
            probed=likelihood.n_probes > 0,
            estimator=words if exact else f"dequantised once, {words}",
            noise={"flow": noise},
            denoiser=record,
            labels=labels(spec, network, "flow"),
            extras=flow,
        )
    )
