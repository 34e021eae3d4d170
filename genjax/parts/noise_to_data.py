"""What models share that go from noise to data along a path: settings, samples, the likelihood of
their ODE.

Diffusion and flow matching differ in what their networks learn. Given the estimate of E[x0 | x_t]
that comes out of that, `NoiseToData`, all else is the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import check_cond, check_key, check_real
from genjax.errors import ConfigError, DataError
from genjax.parts.guidance import guided
from genjax.parts.ode_likelihood import LIKELIHOOD_SOLVERS, likelihood_in_words, ode_log_prob
from genjax.parts.paths import Denoise, Path, coefficients, prior
from genjax.parts.solvers import GRIDS, SOLVERS
from genjax.protocol import Array, DataSpec, Denoiser, Key, Params, SampleFn, State, dtype_of
from genjax.settings import Finite, Often, OftenOrNot, OneOf, Settings, check_fields

# --- settings -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling(Settings):
    """How samples are made of noise.

    Attributes:
        solver: how samples go from noise to data, a name in `solvers.SOLVERS`.
        n_steps: how many steps it takes.
        grid: where they are, a name in `solvers.GRIDS`.
        guidance: the scale of classifier-free guidance of samples; None, the same as 1, costs half
            as much.
    """

    solver: Annotated[str, OneOf(tuple(SOLVERS))] = "heun"
    n_steps: Often = 50
    grid: Annotated[str, OneOf(tuple(GRIDS))] = "uniform"
    guidance: Finite | None = None


@dataclasses.dataclass(frozen=True)
class OdeLikelihood(Settings):
    """How the density of the ODE's samples is computed.

    Attributes:
        likelihood_solver: of the ODE in the likelihood, a name in
            `ode_likelihood.LIKELIHOOD_SOLVERS`.
        n_likelihood_steps: its steps there.
        n_probes: random vectors that estimate the divergence there (Hutchinson); 0 computes it
            exactly, one derivative for each dimension.
    """

    likelihood_solver: Annotated[str, OneOf(LIKELIHOOD_SOLVERS)] = "rk4"
    n_likelihood_steps: Often = 50
    n_probes: OftenOrNot = 0

    @property
    def in_words(self) -> str:
        """For reports: "rk4 in 100 steps, exact divergence"."""
        return likelihood_in_words(self.likelihood_solver, self.n_likelihood_steps, self.n_probes)


def check_events(spec: DataSpec, family: str) -> None:
    """Refuse data that are no vectors or images.

    Raises:
        ConfigError: for tokens and for sequences.
    """
    if spec.kind != "tokens" and spec.step is None:
        return
    found = "tokens" if spec.kind == "tokens" else "sequences"
    raise ConfigError(
        f"{family} models vectors and images; {spec.name} are {found}. Use a sequence family."
    )


def check_noised(spec: DataSpec, x_t: Any, t: Any, dropped: Any = None) -> None:
    """Refuse what is no noisy event, no time, or not one time or choice for each event.

    Raises:
        DataError, TypeError: with the shape that was wanted, or for values that are not finite.
    """
    check_real(x_t, (None, *spec.shape), f"x_t of {spec.name}")
    n = x_t.shape[0]
    check_real(t, (n,) if jnp.ndim(t) else (), "t")
    if dropped is not None and (jnp.shape(dropped) != (n,) or dropped.dtype != bool):
        raise DataError(f"`dropped` must be bool [{n}]; got {dropped.dtype}{list(dropped.shape)}.")


# --- a model --------------------------------------------------------------------------------------


def as_it_is(denoise: Denoise, path: Path, x_end: Array, t_end: Array) -> Array:
    """x_end: for paths that end in data."""
    return x_end


class NoiseToData(NamedTuple):
    """A model that goes from noise to data, as functions of its parameters.

    Attributes:
        spec: the data.
        path: (params) -> x_t = alpha(t) x0 + sigma(t) ε.
        denoise: (params, cond, dropped bool [n] | None) -> the estimate of E[x0 | x_t], for t []
            or [n] and the conditions given; x0 is on the normalised scale.
        guided: whether the model was trained with its condition left out at times.
        finish: (denoise, path, x_end, t_end) -> the normalised event that x_end, the end of a
            solver's way, stands for.
    """

    spec: DataSpec
    path: Callable[[Params], Path]
    denoise: Callable[[Params, Any, Array | None], Denoise]
    guided: bool
    finish: Callable[[Denoise, Path, Array, Array], Array] = as_it_is


def dropped_conditions(key: Key, rate: Any, n: int, guided: bool) -> Array | None:
    """Which examples go without their condition in training, bool [n]; None if none ever does."""
    return jax.random.bernoulli(key, rate, (n,)) if guided else None


def chosen(sampling: Sampling, **given: Any) -> Sampling:
    """The settings of samples with those in the place of its own that are not None.

    Raises:
        ConfigError: for a solver or grid that does not exist, or less than one step.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    how = dataclasses.replace(sampling, **changes)
    check_fields(how)
    return how


def check_guidance(model: NoiseToData, scale: Any) -> None:
    """Refuse guidance, a scale that is not None, of a model that cannot be guided.

    Raises:
        ConfigError: with what is missing.
    """
    if scale is None or model.guided:
        return
    why = "has none: leave guidance out (--guidance None as a flag)"
    if model.spec.conditional:
        why = "was never trained without its condition: build it with cond_dropout=0.1"
    raise ConfigError(
        f"Guidance needs a condition and its absence; this model of {model.spec.name} {why}."
    )


def generate_along(
    model: NoiseToData,
    sampling: Sampling,
    params: Params,
    key: Key,
    n: int,
    cond: Any = None,
    every: bool = False,
) -> Array:
    """Samples x [n, *shape] in the units of the data, rounded to the values that discrete data
    have; with `every` all steps of the way, [n_steps + 1, n, *shape], of which only the last is
    rounded.
    """
    spec, path, denoise = model.spec, model.path(params), model.denoise(params, cond, None)
    if sampling.guidance is not None:
        without = model.denoise(params, cond, jnp.ones(n, bool))
        denoise = guided(denoise, without, sampling.guidance)
    key_start, key_solver = jax.random.split(key)
    start = prior(path) * jax.random.normal(key_start, (n, *spec.shape), dtype_of(params))
    times = GRIDS[sampling.grid](path, sampling.n_steps).astype(start.dtype)
    x = SOLVERS[sampling.solver](denoise, path, start, times, key_solver, every=every)
    last = spec.denormalize(model.finish(denoise, path, x[-1] if every else x, times[-1]))
    if spec.kind != "continuous":
        last = jnp.clip(jnp.round(last), 0, spec.top)
    return jnp.concatenate([spec.denormalize(x[:-1]), last[None]]) if every else last


def denoiser_of(model: NoiseToData, sampling: Sampling) -> Denoiser:
    """The record of what such a model offers.

    generate: (params, state, key, n, cond=None, *, solver=None, n_steps=None, grid=None,
    guidance=None, every=False) -> `generate_along`; what is not given there is as in `sampling`.

    Raises:
        ConfigError: for guidance of a model that cannot be guided, or settings that do not exist;
            so does generate.
    """
    check_guidance(model, sampling.guidance)

    def denoise(
        params: Params,
        state: State,
        x_t: Array,
        t: Array,
        cond: Any = None,
        dropped: Array | None = None,
    ) -> Array:
        check_noised(model.spec, x_t, t, dropped)
        check_cond(model.spec, cond, x_t.shape[0])
        return model.denoise(params, cond, dropped)(x_t, t)

    def generate(
        params: Params,
        state: State,
        key: Key,
        n: int,
        cond: Any = None,
        *,
        solver: str | None = None,
        n_steps: int | None = None,
        grid: str | None = None,
        guidance: Any = None,
        every: bool = False,
    ) -> Array:
        check_key(key)
        check_cond(model.spec, cond, n)
        how = chosen(sampling, solver=solver, n_steps=n_steps, grid=grid, guidance=guidance)
        check_guidance(model, how.guidance)
        return generate_along(model, how, params, key, n, cond, every)

    return Denoiser(model.path, denoise, generate, model.guided, sampling.guidance)


def sample_with(denoiser: Denoiser) -> SampleFn:
    """`generate` as the contract's `sample`: with the settings of the builder."""

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return denoiser.generate(params, state, key, n, cond)

    return sample


def ode_density(
    model: NoiseToData,
    likelihood: OdeLikelihood,
    grid: str,
    params: Params,
    x0: Array,
    cond: Any,
    key: Key,
) -> Array:
    """ln p(x0) of the ODE's samples in nats, [n], for x0 [n, *shape] on the normalised scale.

    It is that of x_end = alpha x0: without the noise that the path ends with. `key` is for probes,
    `grid` says where the steps are.
    """
    path = model.path(params)
    times = GRIDS[grid](path, likelihood.n_likelihood_steps)
    alpha, _ = coefficients(path, times[-1], x0)
    nats = ode_log_prob(
        model.denoise(params, cond, None),
        path,
        alpha * x0,
        times,
        key,
        likelihood.n_probes,
        likelihood.likelihood_solver,
    )
    return nats + model.spec.size * jnp.log(alpha)
