"""Diffusion models: noise is added to data along a path x_t = alpha(t) x0 + sigma(t) ε, and a
network learns to take it away.

Ho 2020 (DDPM), Song 2021 (score SDEs), Kingma 2021 (VDM: the bound, learned schedules), Salimans &
Ho 2022 (v), Karras 2022 (EDM), Hang 2023 (min-SNR), Ho & Salimans 2022 (classifier-free guidance).
The path and its conversions are in `paths.py`, the ways back from noise to data in `solvers.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax.checks import check_cond, checked
from genjax.errors import ConfigError, unknown_name
from genjax.nets.denoiser import BUILDS, denoiser
from genjax.nets.functional import Net
from genjax.parts.bounds import (
    end_nats,
    ending_at_values,
    init_schedule,
    learned_gamma,
    log_snr_of_values,
    prior_kl,
    snr_drop,
    squared,
    time_of_step,
    variational_bound,
)
from genjax.parts.guidance import generator
from genjax.parts.paths import (
    PREDICTIONS,
    Denoise,
    Path,
    Prediction,
    coefficients,
    cosine,
    diffuse,
    edm,
    expand,
    from_log_snr,
    linear,
    log_snr,
)
from genjax.parts.solvers import (
    GRIDS,
    LIKELIHOOD_SOLVERS,
    SOLVERS,
    likelihood_in_words,
    ode_log_prob,
)
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Model, Params, State

SCHEDULES: dict[str, Callable[[], Path]] = {"cosine": cosine, "linear": linear, "edm": edm}


# --- what a network sees and predicts -------------------------------------------------------------


def input_scale(path: Path, t: Array, sigma_data: Array | float) -> Array:
    """c_in = 1 / sqrt(alpha² sigma_data² + sigma²): with it, inputs have unit variance if data have
    sigma_data². Of t's shape.

    1 for a path that preserves the variance and sigma_data = 1; Karras 2022, table 1, has alpha =
    1.
    """
    return jax.lax.rsqrt(jnp.square(path.alpha(t) * sigma_data) + jnp.square(path.sigma(t)))


def edm_prediction(sigma_data: Array | float) -> Prediction:
    """F with x0 = c_skip x_t / alpha + c_out F: what is left to predict once the best linear guess
    is made.

    Karras 2022, table 1. With s = sigma / alpha: c_skip = sigma_data² / (s² + sigma_data²), c_out =
    s sigma_data / sqrt(s² + sigma_data²). The target has unit variance at every t, and x0 is x_t /
    alpha as s goes to 0.
    """

    def parts(path: Path, x_t: Array, t: Array | float) -> tuple[Array, Array]:
        alpha, sigma = coefficients(path, t, x_t)
        s, d = jnp.square(sigma / alpha), jnp.square(jnp.asarray(sigma_data, x_t.dtype))
        return d / (s + d) * x_t / alpha, jnp.sqrt(s * d / (s + d))

    def to_x0(path: Path, value: Array, x_t: Array, t: Array | float) -> Array:
        linear_guess, c_out = parts(path, x_t, t)
        return linear_guess + c_out * value

    def from_x0(path: Path, x0: Array, x_t: Array, t: Array | float) -> Array:
        linear_guess, c_out = parts(path, x_t, t)
        return (x0 - linear_guess) / c_out

    return Prediction(to_x0, from_x0)


# --- losses: how errors are weighted, and at which times ------------------------------------------


def unit_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """1: the squared error of what the network predicts. Ho 2020, equation 14, for ε."""
    return jnp.ones_like(t)


def elbo_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """-½ dSNR/dt of the squared error of x0, -½ d log-SNR/dt of that of ε: the variational bound.
    Kingma 2021, section 4.
    """
    rate = jax.jvp(partial(log_snr, path), (t,), (jnp.ones_like(t),))[1]
    length = jnp.asarray(path.start, t.dtype) - jnp.asarray(
        path.end, t.dtype
    )  # times are uniform on it
    return -0.5 * rate * length * jnp.exp(log_snr(path, t)) * jnp.square(scale)


def discrete_elbo_weight(
    n_times: int, path: Path, t: Array, scale: Array, sigma_data: Array | float
) -> Array:
    """T/2 (SNR(s) - SNR(t)) of the squared error of x0, s being the step before t. Kingma 2021,
    equation 14.
    """
    s = t - (path.start - path.end) / n_times
    return 0.5 * n_times * snr_drop(path, s, t) * jnp.square(scale)


def min_snr_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """min(SNR, 5) of the squared error of x0. Hang 2023, section 3.4."""
    return jnp.minimum(jnp.exp(log_snr(path, t)), 5) * jnp.square(scale)


def edm_weight(path: Path, t: Array, scale: Array, sigma_data: Array | float) -> Array:
    """(s² + sigma_data²) / (s sigma_data)² of the squared error of x0, s = sigma / alpha. Karras
    2022, table 1.
    """
    s = path.sigma(t) / path.alpha(t)
    return (1 / jnp.square(sigma_data) + 1 / jnp.square(s)) * jnp.square(scale)


# (path, t [n], scale [n], sigma_data) -> the weight [n] of the squared error of what the network
# predicts, where scale = dx0 / d(prediction): the weight of an error of x0, times scale².
Weighting = Callable[[Path, Array, Array, Array | float], Array]
WEIGHTINGS: dict[str, Weighting] = {
    "unit": unit_weight,
    "elbo": elbo_weight,
    "min_snr": min_snr_weight,
    "edm": edm_weight,
}


def uniform_times(key: Key, path: Path, n: int, dtype: Any) -> Array:
    """t [n] uniform from path.end to path.start."""
    end, start = jnp.asarray(path.end, dtype), jnp.asarray(path.start, dtype)
    return end + (start - end) * jax.random.uniform(key, (n,), dtype)


def log_normal_times(p_mean: Any, p_std: Any, key: Key, path: Path, n: int, dtype: Any) -> Array:
    """t [n] with ln(sigma / alpha) ~ N(p_mean, p_std²), within the path. Karras 2022, table 1."""
    log_ratio = p_mean + p_std * jax.random.normal(key, (n,), dtype)
    return jnp.clip(
        path.time_of_log_snr(-2 * log_ratio),
        jnp.asarray(path.end, dtype),
        jnp.asarray(path.start, dtype),
    )


def discrete_times(n_times: int, key: Key, path: Path, n: int, dtype: Any) -> Array:
    """t [n], each of the steps 1 .. n_times with the same probability."""
    return time_of_step(path, jax.random.randint(key, (n,), 1, n_times + 1).astype(dtype), n_times)


# --- the model ------------------------------------------------------------------------------------


def diffusion(
    spec: DataSpec,
    *,
    noise_schedule: Literal["cosine", "linear", "edm", "learned"] | Path = "cosine",
    n_times: int | None = None,
    prediction: Literal["epsilon", "x0", "v", "score", "velocity"] | None = None,
    precondition: Literal["none", "edm"] = "none",
    weighting: Literal["unit", "elbo", "min_snr", "edm"] = "unit",
    times: Literal["uniform", "log_normal"] | None = None,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    sigma_data: float = 1.0,
    schedule_gradient: Literal["variance", "bound"] = "variance",
    net: Literal["mlp", "unet", "dit"] | Net = "mlp",
    hidden: tuple[int, ...] = (256, 256, 256),
    channels: tuple[int, ...] = (32, 64),
    n_blocks: int = 1,
    patch: int | None = None,
    d_model: int = 128,
    n_layers: int = 4,
    n_heads: int = 4,
    cond_dropout: float = 0.0,
    solver: str = "heun",
    n_steps: int = 50,
    grid: str = "karras",
    guidance: float | None = None,
    n_bound_samples: int = 16,
    likelihood_solver: str = "rk4",
    n_likelihood_steps: int = 100,
    n_probes: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """A diffusion model; conditional if the spec has a condition.

    With x_t = alpha(t) x0 + sigma(t) ε, x0 the normalised event, a network sees c_in x_t and
    log-SNR(t) / 4 and predicts y: noise, x0, v ... The loss per example is w(t) ‖y - y_network(x_t,
    t)‖² at one random t for each example, w being the `weighting`; with "elbo" it is the whole
    negative bound in nats, at that t. Shapes: x_t [n, *shape], t [] or [n].

    `bound` is the variational bound with `n_bound_samples` noise levels for each example;
    `log_prob`, for continuous data, the likelihood of the probability-flow ODE (Song 2021, section
    4.3), from x as x_end: without the noise that the path ends with.

    Extras, in normalised units but for what `generate` returns:
        denoise: (params, state, x_t, t, cond=None, dropped=None) -> the estimate of E[x0 | x_t],
            [n, *shape]; `dropped` bool [n] says which examples go without their condition.
        path: the `Path`, or with a learned schedule (params) -> Path.
        generate: (params, state, key, n, cond=None, *, solver=None, n_steps=None, grid=None,
            guidance=None, every=False) -> x; what is not given is as in the builder. `every` gives
            all steps, [n_steps + 1, n, *shape], of which only the last is rounded to the values
            that discrete data have.

    Args:
        spec: the data; binary, discrete or continuous, and no sequences.
        noise_schedule: "cosine" and "linear" (in beta) preserve the variance, "edm" adds noise of
            sd t; "learned" is a monotone function with learned ends (Kingma 2021); in Python any
            `paths.Path`. The named ones end, or begin to learn where to end, where the noise just
            leaves the values of discrete data apart (`bounds.log_snr_of_values`).
        n_times: discrete time: train on, and bound, a chain of so many steps; None is continuous
            time.
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
            depend on in continuous time:
            that of the "variance" of the estimate, or plainly that of the "bound", which is noise.
        net: "mlp", "unet" or "dit" (both for images), or in Python any `Net` (c_in x_t, log-SNR /
            4, cond, dropped) -> y.
        hidden: for "mlp": widths of the layers.
        channels: for "unet": channels at each resolution, each half of the one before.
        n_blocks: for "unet": residual blocks at each resolution.
        patch: the side of a patch, which "unet" and "dit" see as one pixel with more channels; 1
            and 2 unless given.
        d_model: for "dit": the width.
        n_layers: for "dit": how many blocks.
        n_heads: of attention, for "unet" and "dit".
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        solver: how samples go from noise to data, a name in `solvers.SOLVERS`.
        n_steps: how many steps it takes.
        grid: where they are, a name in `solvers.GRIDS`.
        guidance: the scale of classifier-free guidance of samples; None, the same as 1, costs half
            as much.
        n_bound_samples: noise levels in `bound`, for each example.
        likelihood_solver: of the ODE in `log_prob`, a name in `solvers.LIKELIHOOD_SOLVERS`.
        n_likelihood_steps: its steps in `log_prob`.
        n_probes: random vectors that estimate the divergence in `log_prob` (Hutchinson); 0 computes
            it exactly, one derivative for each dimension.
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit each other or the data.
    """
    if spec.kind == "tokens" or spec.step is not None:
        found = "tokens" if spec.kind == "tokens" else "sequences"
        raise ConfigError(
            f"Diffusion models vectors and images; {spec.name} are {found}. Use a sequence family."
        )
    if likelihood_solver in SOLVERS and likelihood_solver not in LIKELIHOOD_SOLVERS:
        raise ConfigError(
            f"{likelihood_solver} gives no likelihood; those that do are: "
            f"{', '.join(LIKELIHOOD_SOLVERS)}."
        )
    learned = noise_schedule == "learned"
    if isinstance(noise_schedule, str) and noise_schedule not in (*SCHEDULES, "learned"):
        raise unknown_name("noise schedule", noise_schedule, (*SCHEDULES, "learned"))
    if times is None:
        times = "log_normal" if noise_schedule == "edm" and n_times is None else "uniform"
    chosen = {
        "prediction": ("v" if prediction is None else prediction, PREDICTIONS),
        "precondition": (precondition, ("none", "edm")),
        "weighting": (weighting, WEIGHTINGS),
        "times": (times, ("uniform", "log_normal")),
        "schedule_gradient": (schedule_gradient, ("variance", "bound")),
        "net": (net if isinstance(net, str) else "mlp", BUILDS),
        "likelihood_solver": (likelihood_solver, LIKELIHOOD_SOLVERS),
        "dtype": (dtype, ("float32", "bfloat16")),
    }
    for what, (name, names) in chosen.items():
        if name not in names:
            raise unknown_name(what, name, names)
    counts = {
        "n_times": 1 if n_times is None else n_times,
        "n_steps": n_steps,
        "n_bound_samples": n_bound_samples,
    }
    for label, number in (
        counts | {"n_likelihood_steps": n_likelihood_steps, "n_probes": n_probes + 1}
    ).items():
        if number < 1:
            least = 0 if label == "n_probes" else 1
            raise ConfigError(f"{label} must be at least {least}; got {number - 1 + least}.")
    for label, value in {"sigma_data": sigma_data, "p_std": p_std}.items():
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"{label} must be positive; got {value}.")
    if isinstance(cond_dropout, int | float) and not 0 <= cond_dropout < 1:
        raise ConfigError(f"cond_dropout must be in [0, 1); got {cond_dropout}.")
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

    guided = spec.conditional and (isinstance(cond_dropout, Tracer) or cond_dropout > 0)
    own = denoiser(
        spec,
        net,
        guided,
        dtype,
        hidden=hidden,
        channels=channels,
        n_blocks=n_blocks,
        patch=patch,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
    )
    fixed = noise_schedule
    if not isinstance(fixed, Path):
        fixed = ending_at_values(SCHEDULES.get(fixed, cosine)(), spec)
    highest = 13.3 if spec.kind == "continuous" else log_snr_of_values(spec)
    kind = edm_prediction(sigma_data) if precondition == "edm" else PREDICTIONS[prediction or "v"]
    weigh, draw_times = WEIGHTINGS[weighting], uniform_times
    if times == "log_normal":
        draw_times = partial(log_normal_times, p_mean, p_std)
    if n_times is not None:
        draw_times = partial(discrete_times, n_times)
        weigh = partial(discrete_elbo_weight, n_times) if weighting == "elbo" else weigh
    only_variance = learned and n_times is None and schedule_gradient == "variance"

    def init(key: Key) -> tuple[Params, State]:
        params: dict[str, Any] = {"net": own.init(key)[0]}
        return {"diffusion": params | ({"schedule": init_schedule(highest)} if learned else {})}, {
            "diffusion": {}
        }

    def path_of(p: Any) -> Path:
        return from_log_snr(learned_gamma(p["schedule"])) if learned else fixed

    def condition(cond: Any) -> Array | None:
        return jax.nn.one_hot(cond, spec.n_classes) if spec.n_classes else cond

    def predict(p: Any, x_t: Array, t: Array, c: Array | None, dropped: Array | None) -> Array:
        """What the network predicts, [n, *shape], for t [n]."""
        path = path_of(p)
        scaled = expand(input_scale(path, t, sigma_data), x_t) * x_t
        return own.apply(p["net"], {}, scaled, log_snr(path, t) / 4, c, dropped)[0]

    def denoise_of(p: Any, cond: Any, dropped: Array | None = None) -> Denoise:
        c = condition(cond)

        def denoise(x_t: Array, t: Array) -> Array:
            each = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), x_t.shape[:1])
            return kind.to_x0(path_of(p), predict(p, x_t, each, c, dropped), x_t, each)

        return denoise

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        p, x0, n = params["diffusion"], spec.normalize(batch.x), batch.x.shape[0]
        key_time, key_noise, key_cond, key_end = jax.random.split(key, 4)
        t = draw_times(key_time, path_of(p), n, x0.dtype)
        epsilon = jax.random.normal(key_noise, x0.shape, x0.dtype)
        dropped = jax.random.bernoulli(key_cond, cond_dropout, (n,)) if guided else None

        def errors(p: Any) -> tuple[Array, Array]:
            """The squared error of what the network predicts, and its weight, each [n]."""
            path = path_of(p)
            x_t = diffuse(path, x0, epsilon, t)
            missed = predict(p, x_t, t, condition(batch.cond), dropped) - kind.from_x0(
                path, x0, x_t, t
            )
            return squared(missed), weigh(
                path, t, kind.to_x0(path, jnp.ones_like(t), jnp.zeros_like(t), t), sigma_data
            )

        with_inner = lambda p, inner: {**p, "schedule": {**p["schedule"], "inner": inner}}  # noqa: E731
        frozen = jax.lax.stop_gradient(p)
        here = with_inner(p, frozen["schedule"]["inner"]) if only_variance else p
        error, weight = errors(here)
        value, metrics = weight * error, {"mse": error / spec.size}
        if weighting == "elbo":
            kl = prior_kl(path_of(here), x0)
            log_lik = end_nats(
                denoise_of(here, batch.cond, dropped), path_of(here), spec, batch.x, key_end
            )
            metrics |= {"diffusion": value, "prior_kl": kl, "reconstruction": -log_lik}
            value = value + kl - log_lik
        if only_variance:
            # Its mean does not depend on them, so that the gradient of the square is that of the
            # variance; divided by the mean of twice the value that a network of zeros has, to be of
            # the size of the other gradients.
            error, weight = errors(with_inner(frozen, p["schedule"]["inner"]))
            square = jnp.square(weight * error) / (
                jnp.exp(frozen["schedule"]["ends"][1]) * spec.size
            )
            value = value + square - jax.lax.stop_gradient(square)
        return value, Aux(state, metrics)

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        p = params["diffusion"]
        return variational_bound(
            denoise_of(p, batch.cond), path_of(p), spec, batch.x, key, n_bound_samples, n_times
        )

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        p = params["diffusion"]
        path = path_of(p)
        times = GRIDS["log_snr"](path, n_likelihood_steps)
        alpha = path.alpha(times[-1])  # x_end is alpha x
        nats = ode_log_prob(
            denoise_of(p, batch.cond),
            path,
            alpha * batch.x,
            times,
            key,
            n_probes,
            likelihood_solver,
        )
        return nats + spec.size * jnp.log(alpha)

    def denoise(
        params: Params,
        state: State,
        x_t: Array,
        t: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> Array:
        check_cond(spec, cond, x_t.shape[0])
        return denoise_of(params["diffusion"], cond, dropped)(x_t, t)

    def finish(estimate: Denoise, path: Path, x: Array, t: Array) -> Array:
        """x_end / alpha or, of values that are rounded, the estimate of x0."""
        return x / path.alpha(t) if spec.kind == "continuous" else estimate(x, t)

    generate = generator(
        spec,
        lambda params: path_of(params["diffusion"]),
        lambda params, cond, dropped: denoise_of(params["diffusion"], cond, dropped),
        finish,
        guided,
        solver,
        n_steps,
        grid,
        guidance,
    )

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(params, state, key, n, cond)

    exact = spec.kind == "continuous"
    if exact:
        estimator = f"probability-flow ODE, {likelihood_in_words(likelihood_solver, n_likelihood_steps, n_probes)}"
    elif n_times is None:
        estimator = f"variational bound, {n_bound_samples} noise level{'s' * (n_bound_samples > 1)}"
    else:
        estimator = f"variational bound, {min(n_bound_samples, n_times)} of {n_times} steps"
    extras: dict[str, Any] = {"denoise": denoise, "generate": generate, "path": fixed}
    if learned:
        extras["path"] = lambda params: path_of(params["diffusion"])
    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"diffusion": loss},
            sample=sample,
            log_prob=log_prob if exact else None,
            bound=bound,
            estimator=estimator,
            extras=extras,
        )
    )
