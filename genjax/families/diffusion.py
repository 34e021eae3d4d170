"""Diffusion models: noise is added to data along a path x_t = alpha(t) x0 + sigma(t) ε, and a
network learns to take it away.

Ho 2020 (DDPM), Song 2021 (score SDEs), Kingma 2021 (VDM: the bound, learned schedules), Salimans &
Ho 2022 (v), Karras 2022 (EDM), Hang 2023 (min-SNR), Ho & Salimans 2022 (classifier-free guidance).
The path and its conversions are in `parts/paths.py`, the bound in `parts/bounds.py`, the way back
from noise to data in `parts/solvers.py`, and what flow matching shares in `parts/noise_to_data.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import checked
from genjax.errors import ConfigError
from genjax.nets.denoiser import DenoiserNet, denoiser, labels
from genjax.nets.functional import Net
from genjax.parts.bounds import (
    end_nats,
    ending_at_values,
    init_schedule,
    learned_gamma,
    log_snr_of_values,
    prior_kl,
    squared,
    variational_bound,
)
from genjax.parts.noise_to_data import (
    NoiseToData,
    OdeLikelihood,
    Sampling,
    check_events,
    denoiser_of,
    dropped_conditions,
    ode_density,
    sample_with,
)
from genjax.parts.paths import (
    PREDICTIONS,
    Denoise,
    Path,
    Prediction,
    cosine,
    diffuse,
    edm,
    edm_prediction,
    expand,
    from_log_snr,
    input_scale,
    linear,
    log_snr,
)
from genjax.parts.weightings import (
    WEIGHTINGS,
    Times,
    Weighting,
    discrete_elbo_weight,
    discrete_times,
    log_normal_times,
    uniform_times,
)
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Metrics, Model, Params, State
from genjax.settings import CondDropout, Dtype, Finite, Often, Positive, builder, guided_by
from genjax.values import known

SCHEDULES: dict[str, Callable[[], Path]] = {"cosine": cosine, "linear": linear, "edm": edm}


# --- the model, as functions of its parameters p --------------------------------------------------


class DiffusionModel(NamedTuple):
    """What a diffusion model consists of. Its parameters p are {"net": ..., "schedule": ...}, the
    schedule only where it is learned.

    Attributes:
        spec: the data.
        net: (c_in x_t, log-SNR / 4, cond, dropped) -> y, [n, *shape].
        path: the path; of a learned schedule that at the beginning.
        learned: whether p has the schedule.
        prediction: what y is, from and to x0.
        sigma_data: the data's standard deviation on the normalised scale.
        times: (key, path, n, dtype) -> where the loss looks, t [n].
        weigh: of the squared error of y.
        whole: whether the loss is the whole bound: with its ends, not the weighted error alone.
        by_variance: whether the inner parameters of the schedule are learned by the variance.
        cond_dropout: how often training leaves out the condition.
        guided: whether it ever does.
    """

    spec: DataSpec
    net: Net
    path: Path
    learned: bool
    prediction: Prediction
    sigma_data: Any
    times: Times
    weigh: Weighting
    whole: bool
    by_variance: bool
    cond_dropout: Any
    guided: bool


class DiffusionNoise(NamedTuple):
    """What the loss draws for a batch.

    Attributes:
        t: times, [n].
        epsilon: the noise in x_t, [n, *shape].
        dropped: which examples go without their condition, bool [n]; None if none ever does.
        end: the noise in x_end, [n, *shape], where the loss is the whole bound; else None.
    """

    t: Array
    epsilon: Array
    dropped: Array | None
    end: Array | None


def init_params(model: DiffusionModel, key: Key) -> Any:
    """p of a new model."""
    params: dict[str, Any] = {"net": model.net.init(key)[0]}
    if model.learned:
        params["schedule"] = initial_schedule(model.spec)
    return params


def initial_schedule(spec: DataSpec) -> Any:
    """The parameters that a learned schedule begins with: the values of discrete data are just
    apart at its end.
    """
    if spec.kind == "continuous":
        return init_schedule()
    return init_schedule(log_snr_of_values(spec))


def path_of(model: DiffusionModel, p: Any) -> Path:
    """The path of a model with parameters p."""
    return from_log_snr(learned_gamma(p["schedule"])) if model.learned else model.path


def predict(
    model: DiffusionModel, p: Any, x_t: Array, t: Array, c: Array | None, dropped: Array | None
) -> Array:
    """y, [n, *shape], of x_t [n, *shape], t [n] and embedded conditions c [n, cond_size]."""
    path = path_of(model, p)
    scaled = expand(input_scale(path, t, model.sigma_data), x_t) * x_t
    return model.net.apply(p["net"], {}, scaled, log_snr(path, t) / 4, c, dropped)[0]


def denoise_of(model: DiffusionModel, p: Any, cond: Any, dropped: Array | None = None) -> Denoise:
    """(x_t [n, *shape], t [] or [n]) -> the estimate of E[x0 | x_t, cond], [n, *shape]."""
    c = model.spec.embed(cond, p)

    def denoise(x_t: Array, t: Array) -> Array:
        each = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), x_t.shape[:1])
        y = predict(model, p, x_t, each, c, dropped)
        return model.prediction.to_x0(path_of(model, p), y, x_t, each)

    return denoise


def x0_at_end(spec: DataSpec, denoise: Denoise, path: Path, x_end: Array, t_end: Array) -> Array:
    """x_end / alpha or, of values that are rounded, the estimate of x0."""
    return x_end / path.alpha(t_end) if spec.kind == "continuous" else denoise(x_end, t_end)


def draw(model: DiffusionModel, key: Key, batch: Batch) -> DiffusionNoise:
    """The randomness of the loss: the only place that splits its key."""
    x, n = batch.x, batch.x.shape[0]
    key_time, key_noise, key_cond, key_end = jax.random.split(key, 4)
    # A path that is learned begins and ends at fixed times, and those are all that is asked of it.
    t = model.times(key_time, model.path, n, x.dtype)
    epsilon = jax.random.normal(key_noise, x.shape, x.dtype)
    dropped = dropped_conditions(key_cond, model.cond_dropout, n, model.guided)
    end = jax.random.normal(key_end, x.shape, x.dtype) if model.whole else None
    return DiffusionNoise(t, epsilon, dropped, end)


def errors(
    model: DiffusionModel, p: Any, batch: Batch, noise: DiffusionNoise
) -> tuple[Array, Array]:
    """‖y - y_network(x_t, t)‖² and its weight w(t), each [n]."""
    path, x0, t = path_of(model, p), model.spec.normalize(batch.x), noise.t
    x_t = diffuse(path, x0, noise.epsilon, t)
    y = predict(model, p, x_t, t, model.spec.embed(batch.cond, p), noise.dropped)
    missed = y - model.prediction.from_x0(path, x0, x_t, t)
    scale = model.prediction.to_x0(path, jnp.ones_like(t), jnp.zeros_like(t), t)
    return squared(missed), model.weigh(path, t, scale, model.sigma_data)


def end_terms(
    model: DiffusionModel, p: Any, batch: Batch, dropped: Array | None, epsilon: Array
) -> tuple[Array, Array]:
    """What the bound has beside the errors on the way, in nats [n]: the KL to the prior where the
    path starts, and ln p(x | x_end), `epsilon` being the noise in x_end. Kingma 2021, section 3.5.
    """
    path, spec = path_of(model, p), model.spec
    denoise = denoise_of(model, p, batch.cond, dropped)
    log_lik = end_nats(denoise, path, spec, batch.x, epsilon)
    return prior_kl(path, spec.normalize(batch.x)), log_lik


def with_inner(p: Any, inner: Any) -> Any:
    """p with other inner parameters of the schedule, which decide on its form between its ends."""
    return {**p, "schedule": {**p["schedule"], "inner": inner}}


def variance_of(model: DiffusionModel, p: Any, batch: Batch, noise: DiffusionNoise) -> Array:
    """(w ‖y - y_network‖²)² / (range of log-SNR · D), [n], as a function of the schedule's inner
    parameters alone.

    The mean of what is squared does not depend on them in continuous time, so that the gradient of
    the square is that of the variance (Kingma 2021, section 5.3). It is divided by the mean of
    twice the value that a network of zeros has, to be of the size of the other gradients.
    """
    frozen = jax.lax.stop_gradient(p)
    here = with_inner(frozen, p["schedule"]["inner"])
    error, weight = errors(model, here, batch, noise)
    return jnp.square(weight * error) / (jnp.exp(frozen["schedule"]["ends"][1]) * model.spec.size)


def loss_of(
    model: DiffusionModel, p: Any, batch: Batch, noise: DiffusionNoise
) -> tuple[Array, Metrics]:
    """w(t) ‖y - y_network(x_t, t)‖², [n]; or with the ends of the bound added to it the whole
    negative bound at t, in nats.
    """
    here = p
    if model.by_variance:
        here = with_inner(p, jax.lax.stop_gradient(p["schedule"]["inner"]))
    error, weight = errors(model, here, batch, noise)
    value, metrics = weight * error, {"mse": error / model.spec.size}
    if noise.end is not None:
        kl, log_lik = end_terms(model, here, batch, noise.dropped, noise.end)
        metrics |= {"diffusion": value, "prior_kl": kl, "reconstruction": -log_lik}
        value = value + kl - log_lik
    if model.by_variance:
        square = variance_of(model, p, batch, noise)
        value = value + square - jax.lax.stop_gradient(square)
    return value, metrics


def noise_to_data(model: DiffusionModel) -> NoiseToData:
    """The same model as what solvers and the ODE's likelihood know of it."""
    return NoiseToData(
        spec=model.spec,
        path=lambda params: path_of(model, params["diffusion"]),
        denoise=lambda params, cond, dropped: denoise_of(model, params["diffusion"], cond, dropped),
        guided=model.guided,
        finish=partial(x0_at_end, model.spec),
    )


# --- settings -------------------------------------------------------------------------------------


def path_named(spec: DataSpec, noise_schedule: str | Path) -> Path:
    """The path of a schedule; of "learned" that at the beginning."""
    if isinstance(noise_schedule, Path):
        return noise_schedule
    if noise_schedule == "learned":
        return from_log_snr(learned_gamma(initial_schedule(spec)))
    return ending_at_values(SCHEDULES[noise_schedule](), spec)


def no_noise(noise_schedule: str | Path, spec: DataSpec, whole: bool) -> bool:
    """Whether a path of one's own ends where there is no noise: samples need none, a score does.

    Raises:
        ConfigError: for a log-SNR that is infinite where the network sees it: where samples begin,
            and, of a bound that is trained for, or of values that are rounded, where they end.
    """
    if not isinstance(noise_schedule, Path):
        return False
    infinite = []
    for name in ("start", "end"):
        value = known(log_snr(noise_schedule, getattr(noise_schedule, name)))
        if value is not None and not np.isfinite(value):
            infinite.append(name)
    for name in infinite:
        if name == "start" or whole or spec.kind != "continuous":
            raise ConfigError(
                f"The log-SNR of this path is infinite at its {name}, where the network would see "
                f"it. Cut it off a little before: path._replace({name}=...)."
            )
    return "end" in infinite


def regression_on(
    times: str, weighting: str, n_times: int | None, p_mean: Any, p_std: Any
) -> tuple[Times, Weighting]:
    """Where the loss looks, and how it weights what it finds there."""
    weigh = WEIGHTINGS[weighting]
    if times == "log_normal":
        return partial(log_normal_times, p_mean, p_std), weigh
    if n_times is None:
        return uniform_times, weigh
    if weighting == "elbo":
        weigh = partial(discrete_elbo_weight, n_times)
    return partial(discrete_times, n_times), weigh


def check_fits(
    learned: bool,
    n_times: int | None,
    prediction: str | None,
    precondition: str,
    weighting: str,
    times: str,
) -> None:
    """Refuse settings that do not fit each other.

    Raises:
        ConfigError: see the text.
    """
    if precondition == "edm" and prediction is not None:
        raise ConfigError(
            "precondition='edm' decides what the network predicts; leave out "
            f"prediction={prediction!r}."
        )
    if learned and weighting != "elbo":
        raise ConfigError(
            "A learned schedule is learned by the bound: it needs weighting='elbo'; got "
            f"{weighting!r}."
        )
    if times == "log_normal" and (weighting == "elbo" or n_times is not None):
        raise ConfigError(
            "weighting='elbo' and n_times go with times='uniform'; got times='log_normal'."
        )


def bound_in_words(n_samples: int, n_times: int | None) -> str:
    """What `variational_bound` computes, for reports."""
    if n_times is not None:
        return f"variational bound, {min(n_samples, n_times)} of {n_times} steps"
    return f"variational bound, {n_samples} noise level{'s' * (n_samples > 1)}"


@builder
def diffusion(
    spec: DataSpec,
    *,
    noise_schedule: Literal["cosine", "linear", "edm", "learned"] | Path = "cosine",
    n_times: Often | None = None,
    prediction: Literal["epsilon", "x0", "v", "score", "velocity"] | None = None,
    precondition: Literal["none", "edm"] = "none",
    weighting: Literal["unit", "elbo", "min_snr", "edm"] = "unit",
    times: Literal["uniform", "log_normal"] | None = None,
    p_mean: Finite = -1.2,
    p_std: Positive = 1.2,
    sigma_data: Positive = 1.0,
    schedule_gradient: Literal["variance", "bound"] = "variance",
    network: DenoiserNet = DenoiserNet(),
    cond_dropout: CondDropout = 0.0,
    sampling: Sampling = Sampling(grid="karras"),
    n_bound_samples: Often = 16,
    likelihood: OdeLikelihood = OdeLikelihood(n_likelihood_steps=100),
    dtype: Dtype = "float32",
) -> Model:
    """A diffusion model; conditional if the spec has a condition.

    With x_t = alpha(t) x0 + sigma(t) ε, x0 the normalised event, a network sees c_in x_t and
    log-SNR(t) / 4 and predicts y: noise, x0, v ... The loss per example is w(t) ‖y - y_network(x_t,
    t)‖² at one random t for each example, w being the `weighting`; with "elbo" it is the whole
    negative bound in nats, at that t. Shapes: x_t [n, *shape], t [] or [n].

    `bound` is the variational bound with `n_bound_samples` noise levels for each example, in nats;
    `log_prob`, for continuous data, the likelihood of the probability-flow ODE (Song 2021, section
    4.3), from x as x_end: without the noise that the path ends with.

    `denoiser` has the path, the estimate of E[x0 | x_t] and `generate`, which takes other settings
    of samples than the builder's (`parts.noise_to_data.denoiser_of`); `noise` gives a
    `DiffusionNoise`.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, diffusion
        >>> model = diffusion(DataSpec((2,), "continuous"), hidden=(8,), n_steps=4)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 3).shape
        (3, 2)

    Args:
        spec: the data; binary, discrete or continuous, and no sequences.
        noise_schedule: "cosine" and "linear" (in beta) preserve the variance, "edm" adds noise of
            sd t; "learned" is a monotone function with learned ends (Kingma 2021); in Python any
            `paths.Path` that begins with a finite log-SNR. The named ones end, or begin to learn
            where to end, where the noise just leaves the values of discrete data apart
            (`bounds.log_snr_of_values`).
        n_times: discrete time: train on, and bound, a chain of so many steps; None is continuous
            time. Samples of that chain are those of solver="ancestral" and grid="uniform" with as
            many `n_steps`; others go by noise levels that were not trained on, too.
        prediction: what the network predicts; "v" unless given.
        precondition: "edm": predict what c_skip x_t leaves over, at unit variance; `prediction` is
            then left out.
        weighting: of squared errors: "unit" of the prediction's, "elbo", "min_snr" or "edm".
        times: where the loss looks: "uniform" in t, or "log_normal" in sigma / alpha; that is the
            default with noise_schedule="edm".
        p_mean: mean of ln(sigma / alpha) with times="log_normal".
        p_std: its standard deviation.
        sigma_data: the data's standard deviation on the normalised scale, which inputs are scaled
            by.
        schedule_gradient: of the inner parameters of a learned schedule, which the bound does not
            depend on in continuous time: that of the "variance" of the estimate, or plainly that of
            the "bound", which is noise.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        n_bound_samples: noise levels in `bound`, for each example.
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit each other or the data.
    """
    check_events(spec, "Diffusion")
    learned = noise_schedule == "learned"
    if times is None:
        times = "log_normal" if noise_schedule == "edm" and n_times is None else "uniform"
    check_fits(learned, n_times, prediction, precondition, weighting, times)
    kind = edm_prediction(sigma_data) if precondition == "edm" else PREDICTIONS[prediction or "v"]
    draw_times, weigh = regression_on(times, weighting, n_times, p_mean, p_std)
    guided = guided_by(spec, cond_dropout)
    own = DiffusionModel(
        spec=spec,
        net=denoiser(spec, network, guided, dtype),
        path=path_named(spec, noise_schedule),
        learned=learned,
        prediction=kind,
        sigma_data=sigma_data,
        times=draw_times,
        weigh=weigh,
        whole=weighting == "elbo",
        by_variance=learned and n_times is None and schedule_gradient == "variance",
        cond_dropout=cond_dropout,
        guided=guided,
    )
    way, noise = noise_to_data(own), partial(draw, own)
    record = denoiser_of(way, sampling)

    def init(key: Key) -> tuple[Params, State]:
        return {"diffusion": init_params(own, key)}, {"diffusion": {}}

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        value, metrics = loss_of(own, params["diffusion"], batch, noise(key, batch))
        return value, Aux(state, metrics)

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        denoise, path = way.denoise(params, batch.cond, None), way.path(params)
        return variational_bound(denoise, path, spec, batch.x, key, n_bound_samples, n_times)

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        x0 = spec.normalize(batch.x)
        nats = ode_density(way, likelihood, "log_snr", params, x0, batch.cond, key)
        return nats + spec.log_volume

    silent = no_noise(noise_schedule, spec, own.whole)
    exact = spec.kind == "continuous" and not silent
    words = f"probability-flow ODE, {likelihood.in_words}"
    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"diffusion": loss},
            sample=sample_with(record),
            log_prob=log_prob if exact else None,
            bound=None if silent else bound,
            probed=likelihood.n_probes > 0,
            estimator=words if exact else bound_in_words(n_bound_samples, n_times),
            noise={"diffusion": noise},
            denoiser=record,
            labels=labels(spec, network, "diffusion/net"),
        )
    )
