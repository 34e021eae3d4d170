"""Flow matching: a velocity field that carries noise to data, learned by regression on the lines
that join pairs of the two.

Lipman 2023 (flow matching), Liu 2023 (rectified flow, reflow), Albergo 2023 (interpolants),
Pooladian 2023 and Tong 2024 (couplings by optimal transport), Esser 2024 (logit-normal times), Ho &
Salimans 2022 (classifier-free guidance). As everywhere here, t = 0 is data and t = 1 noise; these
papers count the other way, and their velocity is the negative of ours.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax.checks import check_cond, checked
from genjax.errors import ConfigError, unknown_name
from genjax.nets.denoiser import BUILDS, denoiser
from genjax.nets.functional import Net
from genjax.parts.bounds import squared
from genjax.parts.guidance import generator
from genjax.parts.guidance import guided as guide
from genjax.parts.likelihoods import dequantize, dequantized_bound
from genjax.parts.pairing import COUPLINGS
from genjax.parts.paths import (
    PREDICTIONS,
    Denoise,
    Path,
    conditional_ot,
    diffuse,
    prior,
    rates,
    variance_preserving,
)
from genjax.parts.solvers import (
    GRIDS,
    LIKELIHOOD_SOLVERS,
    SOLVERS,
    likelihood_in_words,
    ode_log_prob,
)
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Model, Params, State

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


# --- discrete data --------------------------------------------------------------------------------


# --- the model ------------------------------------------------------------------------------------


def flow_matching(
    spec: DataSpec,
    *,
    probability_path: Literal["conditional_ot", "variance_preserving"] = "conditional_ot",
    coupling: Literal["independent", "optimal", "entropic"] = "independent",
    times: Literal["uniform", "logit_normal"] = "uniform",
    loss: Literal["velocity", "x0"] = "velocity",
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
    grid: str = "uniform",
    guidance: float | None = None,
    likelihood_solver: str = "rk4",
    n_likelihood_steps: int = 50,
    n_probes: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """A flow from N(0, I) to the data; conditional if the spec has a condition.

    With x_t = alpha(t) x0 + sigma(t) ε, x0 the normalised event (dequantised, if it is binary or
    discrete), the loss per example is w(t) ‖v(x_t, t) - (alpha' x0 + sigma' ε)‖² at one random t
    for each; it is no log-probability, and not in nats. Samples follow dx/dt = v from noise at t =
    1 to data at t = 0. Shapes: x_t [n, *shape], t [] or [n].

    `log_prob`, for continuous data, is the density of those samples by the change of variables
    along the ODE, exact but for the solver's error (Chen 2018, Lipman 2023); for binary and
    discrete data `bound` is that of dequantised data, per level (`dequantized_bound`), whose
    expectation is at most ln P(x).

    Extras, in normalised units but for what `generate` returns:
        denoise: (params, state, x_t, t, cond=None, dropped=None) -> the estimate of E[x0 | x_t],
            [n, *shape]; `dropped` bool [n] says which examples go without their condition.
        velocity: the same arguments -> v(x_t, t), [n, *shape].
        path: the `Path`.
        generate: (params, state, key, n, cond=None, *, solver=None, n_steps=None, grid=None,
            guidance=None, every=False) -> x; what is not given is as in the builder. `every` gives
            all steps, [n_steps + 1, n, *shape], of which only the last one is rounded to the values
            that discrete data have.
        drop: (key, n) -> which examples go without their condition in training, bool [n], or None
            if none ever does.
        regress: (params, state, x0, epsilon, key, cond=None, dropped=None) -> loss [n] and Aux, of
            pairs that are given.

    Args:
        spec: the data; binary, discrete or continuous, and no sequences.
        probability_path: "conditional_ot", straight lines x_t = (1 - t) x0 + t ε, or
            "variance_preserving", circles, x_t = cos(πt/2) x0 + sin(πt/2) ε.
        coupling: of noise and data within a batch: "independent", "optimal" (the assignment that is
            shortest in squares) or "entropic" (drawn from Sinkhorn's plan). Examples then depend on
            each other. With labels, noise is exchanged only
            within a class: otherwise it would tell of the class, and samples begin with noise that
                does not.
        times: where the loss looks: "uniform" in t, or "logit_normal".
        loss: the squared error of the "velocity", or of "x0" as estimated from it, which counts
            noisy times more.
        net: "mlp", "unet" or "dit" (both for images), or in Python any `Net` (x_t, noise level,
            cond, dropped) -> v.
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
        likelihood_solver: of the ODE in `log_prob` or `bound`, a name in
            `solvers.LIKELIHOOD_SOLVERS`.
        n_likelihood_steps: its steps there, on the same grid.
        n_probes: random vectors that estimate the divergence there (Hutchinson); 0 computes it
            exactly, one derivative for each dimension.
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit each other or the data.
    """
    if spec.kind == "tokens" or spec.step is not None:
        what = "tokens" if spec.kind == "tokens" else "sequences"
        raise ConfigError(
            f"Flow matching models binary, discrete or continuous events; {spec.name} are {what}. "
            "Use a sequence family."
        )
    if likelihood_solver in SOLVERS and likelihood_solver not in LIKELIHOOD_SOLVERS:
        raise ConfigError(
            f"{likelihood_solver} gives no likelihood; those that do are: "
            f"{', '.join(LIKELIHOOD_SOLVERS)}."
        )
    chosen = {
        "probability path": (probability_path, PATHS),
        "coupling": (coupling, COUPLINGS),
        "distribution of times": (times, TIMES),
        "loss": (loss, LOSSES),
        "net": (net if isinstance(net, str) else "mlp", BUILDS),
        "likelihood_solver": (likelihood_solver, LIKELIHOOD_SOLVERS),
        "dtype": (dtype, ("float32", "bfloat16")),
    }
    for what, (name, names) in chosen.items():
        if name not in names:
            raise unknown_name(what, name, names)
    for label, number in {"n_steps": n_steps, "n_likelihood_steps": n_likelihood_steps}.items():
        if number < 1:
            raise ConfigError(f"{label} must be at least 1; got {number}.")
    if n_probes < 0:
        raise ConfigError(f"n_probes must be 0 (exact) or more; got {n_probes}.")
    if isinstance(cond_dropout, int | float) and not 0 <= cond_dropout < 1:
        raise ConfigError(f"cond_dropout must be in [0, 1); got {cond_dropout}.")
    if coupling != "independent" and spec.cond_dim:
        raise ConfigError(
            f"coupling={coupling!r} would let noise tell of the condition, which is a vector in "
            f"{spec.name}: use 'independent'."
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
    way, weigh, draw_times, couple = (
        PATHS[probability_path](),
        LOSSES[loss],
        TIMES[times],
        COUPLINGS[coupling],
    )

    def init(key: Key) -> tuple[Params, State]:
        return {"flow": own.init(key)[0]}, {"flow": {}}

    def velocity_of(
        p: Any, cond: Any, dropped: Array | None = None
    ) -> Callable[[Array, Array], Array]:
        c = jax.nn.one_hot(cond, spec.n_classes) if spec.n_classes else cond

        def velocity(x_t: Array, t: Array) -> Array:
            each = jnp.broadcast_to(jnp.asarray(t, x_t.dtype), x_t.shape[:1])
            return own.apply(p, {}, x_t, noise_level(way, each), c, dropped)[0]

        return velocity

    def denoise_of(p: Any, cond: Any, dropped: Array | None = None) -> Denoise:
        velocity = velocity_of(p, cond, dropped)
        return lambda x_t, t: PREDICTIONS["velocity"].to_x0(way, velocity(x_t, t), x_t, t)

    def regress(
        params: Params,
        state: State,
        x0: Array,
        epsilon: Array,
        key: Key,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> tuple[Array, Aux]:
        t = draw_times(key, x0.shape[0], x0.dtype)
        missed = velocity_of(params["flow"], cond, dropped)(diffuse(way, x0, epsilon, t), t)
        missed = missed - line_velocity(way, x0, epsilon, t)
        error = squared(missed)
        return weigh(way, t) * error, Aux(state, {"mse": error / spec.size})

    def drop(key: Key, n: int) -> Array | None:
        return jax.random.bernoulli(key, cond_dropout, (n,)) if guided else None

    def loss_of(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        key_noise, key_pairs, key_data, key_cond, key_time = jax.random.split(key, 5)
        x0, n = dequantize(spec, batch.x, key_data), batch.x.shape[0]
        epsilon = jax.random.normal(key_noise, x0.shape, x0.dtype)
        alike = (
            batch.cond[:, None] == batch.cond[None, :]
            if spec.n_classes and batch.cond is not None
            else None
        )
        epsilon = epsilon[couple(key_pairs, x0, epsilon, alike)]
        return regress(params, state, x0, epsilon, key_time, batch.cond, drop(key_cond, n))

    def log_density(params: Params, cond: Any, x0: Array, key: Key) -> Array:
        at = GRIDS[grid](way, n_likelihood_steps)
        return ode_log_prob(
            denoise_of(params["flow"], cond), way, x0, at, key, n_probes, likelihood_solver
        )

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return log_density(params, batch.cond, batch.x, key)

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        key_data, key_probes = jax.random.split(key)
        density = lambda x0: log_density(params, batch.cond, x0, key_probes)  # noqa: E731
        return dequantized_bound(spec, density, batch.x, key_data)

    def denoise(
        params: Params,
        state: State,
        x_t: Array,
        t: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> Array:
        check_cond(spec, cond, x_t.shape[0])
        return denoise_of(params["flow"], cond, dropped)(x_t, t)

    def velocity(
        params: Params,
        state: State,
        x_t: Array,
        t: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> Array:
        check_cond(spec, cond, x_t.shape[0])
        return velocity_of(params["flow"], cond, dropped)(x_t, t)

    generate = generator(
        spec,
        lambda params: way,
        lambda params, cond, dropped: denoise_of(params["flow"], cond, dropped),
        lambda estimate, path, x, t: x,
        guided,
        solver,
        n_steps,
        grid,
        guidance,
    )

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(params, state, key, n, cond)

    extras: dict[str, Any] = {
        "denoise": denoise,
        "velocity": velocity,
        "path": way,
        "generate": generate,
        "drop": drop,
        "regress": regress,
    }
    exact = spec.kind == "continuous"
    estimator = f"ODE, {likelihood_in_words(likelihood_solver, n_likelihood_steps, n_probes)}"
    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"flow": loss_of},
            sample=sample,
            log_prob=log_prob if exact else None,
            bound=None if exact else bound,
            estimator=estimator if exact else f"dequantised once, {estimator}",
            extras=extras,
        )
    )


def reflow(
    model: Model,
    params: Params,
    state: State,
    *,
    solver: str = "heun",
    n_steps: int = 50,
    guidance: Any = None,
) -> Model:
    """The same model, to be trained on pairs that its own ODE makes: noise, and where that noise
    went. Liu 2023.

    The flow that is learned from such pairs is straighter and needs fewer steps; its samples have
    the law of the first one's. The loss draws noise and the condition's absence, and integrates the
    first model's ODE at every step; of the batch it takes the size and the conditions only.
    `params` has a second entry, "teacher", which has no loss and so stays as it is; the first,
    "flow", begins as a copy of it.

    Args:
        model: a flow-matching model.
        params: its trained parameters.
        state: its state.
        solver: of the teacher's ODE, a deterministic one: a name in `solvers.LIKELIHOOD_SOLVERS`.
        n_steps: how many steps it takes, evenly spaced in t.
        guidance: the scale of classifier-free guidance of the teacher where the condition is there,
            which the new flow then has built in; None for none.

    Raises:
        ConfigError: for a model that has no `regress`, a solver that does not follow the ODE, or no
            steps.
    """
    if "regress" not in model.extras:
        raise ConfigError(
            "reflow makes pairs of noise and data of a flow-matching model; this model is another."
        )
    if solver not in LIKELIHOOD_SOLVERS:
        raise unknown_name("deterministic solver", solver, LIKELIHOOD_SOLVERS)
    drop, regress, denoise = (model.extras[name] for name in ("drop", "regress", "denoise"))
    path: Any = model.extras["path"]
    if guidance is not None and drop(jax.random.key(0), 1) is None:
        raise ConfigError(
            "Guidance needs a model that was trained with cond_dropout > 0, and a condition."
        )
    times, teacher = GRIDS["uniform"](path, n_steps), params["flow"]

    def init(key: Key) -> tuple[Params, State]:
        copy = lambda: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), teacher)  # noqa: E731
        return {"flow": copy(), "teacher": copy()}, jax.tree.map(jnp.array, state)

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        key_noise, key_cond, key_time = jax.random.split(key, 3)
        n, cond, frozen = batch.x.shape[0], batch.cond, {"flow": params["teacher"]}
        epsilon, dropped = (
            jax.random.normal(key_noise, batch.x.shape, batch.x.dtype),
            drop(key_cond, n),
        )
        estimate: Denoise = lambda x, t: denoise(frozen, state, x, t, cond, dropped)  # noqa: E731
        if guidance is not None:
            without: Denoise = lambda x, t: denoise(frozen, state, x, t, cond, jnp.ones(n, bool))  # noqa: E731
            estimate = guide(
                estimate, without, guidance
            )  # where the condition was dropped, both are the same
        x0 = SOLVERS[solver](estimate, path, prior(path).astype(epsilon.dtype) * epsilon, times)
        return regress(params, state, jax.lax.stop_gradient(x0), epsilon, key_time, cond, dropped)

    return checked(model._replace(init=init, losses={"flow": loss}))
