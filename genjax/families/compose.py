"""Models made of trained models. The only file of this folder that may import other families.

A composed builder takes a `Trained`, and keeps its parameters as entries of `params` that have no
loss: they are saved with the rest, and stay as they are.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax import nets
from genjax.checks import checked
from genjax.errors import ConfigError, expect
from genjax.families.flow_matching import Flow
from genjax.parts.distributions import normal_log_prob, normal_sample, sum_event
from genjax.parts.guidance import guided
from genjax.parts.noise_to_data import sample_with
from genjax.parts.ode_likelihood import LIKELIHOOD_SOLVERS
from genjax.parts.paths import Denoise, prior
from genjax.parts.solvers import GRIDS, SOLVERS
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    DataSpec,
    Denoiser,
    Key,
    Latent,
    LossFn,
    Model,
    Params,
    PyTree,
    ScoreFn,
    State,
    Trained,
    dtype_of,
)
from genjax.settings import Finite, Often, OneOf, builder


def copied(tree: PyTree) -> PyTree:
    """The same tree in buffers of its own, so that one can be donated and the other kept."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def seeing(model: Model, *names: str) -> Model:
    """The model as one that has further entries in `params`, which it does not see: its functions
    get those of these names.
    """

    def own(params: Params) -> Params:
        return {name: params[name] for name in names}

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> PyTree:
        return model.sample(own(params), state, key, n, cond)

    def of(score_fn: ScoreFn | None) -> ScoreFn | None:
        if score_fn is None:
            return None
        return lambda params, state, batch, key: score_fn(own(params), state, batch, key)

    return model._replace(sample=sample, log_prob=of(model.log_prob), bound=of(model.bound))


# --- reflow ---------------------------------------------------------------------------------------


class ReflowNoise(NamedTuple):
    """What the loss of `reflow` draws for a batch: t [n], the noise that the teacher's ODE begins
    with, [n, *shape], and which examples go without their condition, bool [n] or None.
    """

    t: Array
    epsilon: Array
    dropped: Array | None


def draw_reflow(flow: Flow, key: Key, batch: Batch) -> ReflowNoise:
    """The randomness of the loss: the only place that splits its key."""
    key_noise, key_cond, key_time = jax.random.split(key, 3)
    x, n = batch.x, batch.x.shape[0]
    epsilon = jax.random.normal(key_noise, x.shape, x.dtype)
    return ReflowNoise(flow.times(key_time, n, x.dtype), epsilon, flow.drop(key_cond, n))


def teacher_of(
    denoiser: Denoiser,
    params: Params,
    state: State,
    cond: Any,
    dropped: Array | None,
    guidance: Any,
    n: int,
) -> Denoise:
    """(x_t [n, *shape], t) -> the estimate of x0 by the first model, guided if asked. Where the
    condition was dropped, guided or not are the same.
    """
    given = partial(denoiser.denoise, params, state, cond=cond, dropped=dropped)
    if guidance is None:
        return given
    without = partial(denoiser.denoise, params, state, cond=cond, dropped=jnp.ones(n, bool))
    return guided(given, without, guidance)


@builder
def reflow(
    first: Trained,
    *,
    solver: Annotated[str, OneOf(LIKELIHOOD_SOLVERS)] = "heun",
    n_steps: Often = 50,
    guidance: Finite | None = None,
) -> Model:
    """The same model, to be trained on pairs that its own ODE makes: noise, and where that noise
    went. Liu 2023.

    The flow that is learned from such pairs is straighter and needs fewer steps; its samples have
    the law of the first one's. The loss, that of the first model and in its units, draws noise and
    the condition's absence (`ReflowNoise`), and integrates the first model's ODE at every step; of
    the batch it takes the size and the conditions only. `params` has a second entry, "teacher",
    which has no loss and so stays as it is; the first, "flow", begins as a copy of it.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, Trained, flow_matching, reflow
        >>> model = flow_matching(DataSpec((2,), "continuous"), hidden=(8,))
        >>> second = reflow(Trained(model, *model.init(jax.random.key(0))), n_steps=4)
        >>> sorted(second.init(jax.random.key(1))[0])
        ['flow', 'teacher']

    Args:
        first: a flow-matching model, trained.
        solver: of the teacher's ODE, a deterministic one: a name in
            `ode_likelihood.LIKELIHOOD_SOLVERS`.
        n_steps: how many steps it takes, evenly spaced in t.
        guidance: the scale of classifier-free guidance of the teacher where the condition is there,
            which the new flow then has built in (its samples are not guided again unless
            `generate` is told to); None for none.

    Raises:
        ConfigError: for a model that is no flow, a solver that does not follow the ODE, no steps,
            or guidance of a model that cannot be guided.
    """
    model, flow, denoiser = first.model, first.model.extras, first.model.denoiser
    if not isinstance(flow, Flow) or denoiser is None:
        raise ConfigError(
            "reflow makes pairs of noise and data of a flow-matching model; this model is another."
        )
    if guidance is not None and not denoiser.guided:
        raise ConfigError(
            "Guidance needs a model that was trained with cond_dropout > 0, and a condition."
        )
    path = denoiser.path(first.params)
    times, noise = GRIDS["uniform"](path, n_steps), partial(draw_reflow, flow)

    def init(key: Key) -> tuple[Params, State]:
        trained = first.params["flow"]
        return {"flow": copied(trained), "teacher": copied(trained)}, copied(first.state)

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        t, epsilon, dropped = noise(key, batch)
        frozen, n = {"flow": params["teacher"]}, batch.x.shape[0]
        teacher = teacher_of(denoiser, frozen, state, batch.cond, dropped, guidance, n)
        start = prior(path).astype(epsilon.dtype) * epsilon
        x0 = jax.lax.stop_gradient(SOLVERS[solver](teacher, path, start, times))
        return flow.regress(params, state, x0, epsilon, t, batch.cond, dropped)

    # A flow that is a reflow itself has an entry for its teacher, which it does not look at.
    whole = seeing(model, *first.params)
    if guidance is not None and denoiser.guidance is not None:
        plain = partial(_unguided, denoiser.generate)
        own = denoiser._replace(generate=plain, guidance=None)
        whole = whole._replace(denoiser=own, sample=sample_with(own))
    return checked(whole._replace(init=init, losses={"flow": loss}, noise={"flow": noise}))


def _unguided(
    generate: Callable[..., Array], *args: Any, guidance: Any = None, **how: Any
) -> Array:
    """`Denoiser.generate` with the scale 1, which changes nothing, in the place of the one that the
    model was built with.
    """
    return generate(*args, guidance=1.0 if guidance is None else guidance, **how)


# --- two stages -----------------------------------------------------------------------------------

FIRST = "first"  # the entry of `params` and `state` that holds a frozen first stage


def latent_spec(first: Model) -> DataSpec:
    """The latents of a model as data: its `latent.spec`, with the condition that the model has.

    Raises:
        ConfigError: for a model without latents that can be decoded.

    Example:
        >>> from genjax import DataSpec, latent_spec, vae
        >>> latent_spec(vae(DataSpec((8, 8, 1), "binary"), latent_dim=3, hidden=(4,))).shape
        (3,)
    """
    expect("latent_spec", first, Model)
    latent = first.latent
    if latent is None or latent.draw is None or latent.log_likelihood is None:
        raise ConfigError(
            f"A second stage models the latents of the first; this model of {first.spec.name} has "
            "none that it can decode. Take a run of a VAE."
        )
    spec = first.spec
    names = ("n_classes", "cond_dim", "class_names", "cond_shift", "cond_scale")
    return dataclasses.replace(latent.spec, **{name: getattr(spec, name) for name in names})


class StageNoise(NamedTuple):
    """What the loss of a second stage draws: ε of z = mean + scale ε, and the key of the second's
    own loss.
    """

    epsilon: Array
    second: Key


def draw_stage(codes: DataSpec, key: Key, batch: Batch) -> StageNoise:
    """The randomness of the loss: the only place that splits its key."""
    key_z, key_second = jax.random.split(key)
    shape = (batch.x.shape[0], *codes.shape)
    dtype = nets.layers.wide(dtype_of(batch.x))
    return StageNoise(jax.random.normal(key_z, shape, dtype), key_second)


def two_stage(first: Trained, second: Model) -> Model:
    """The first stage's data with the second stage as the prior: p(x) = ∫ p_2(z) p_1(x | z) dz.

    The second stage is trained by its own loss on z ~ q_1(z | x), drawn anew at each visit. The
    first is frozen: it is an entry "first" of `params` and `state` that no loss changes, so that a
    checkpoint has all that sampling needs. `sample` decodes samples of the second, and so does
    `denoiser.generate`. `bound` joins both with one draw of z, in nats:

        ln p(x) >= E_q [ln p_1(x | z) + ln p_2(z) - ln q_1(z | x)],

    with the second's `log_prob`, or its bound. With N(0, I) as the second stage that is the bound
    of a VAE. Shapes: x [B, *shape], z [B, d].

    Rombach 2022 and Vahdat 2021, section 3; the latter train both stages at once.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, Trained, flow_matching, latent_spec, two_stage, vae
        >>> first = vae(DataSpec((4,), "binary"), latent_dim=2, hidden=(8,))
        >>> second = flow_matching(latent_spec(first), hidden=(8,), n_steps=2)
        >>> both = two_stage(Trained(first, *first.init(jax.random.key(0))), second)
        >>> params, state = both.init(jax.random.key(1))
        >>> both.sample(params, state, jax.random.key(2), 3).shape
        (3, 4)

    Args:
        first: a model with a `latent` that decodes, and what it was trained to.
        second: a model of `latent_spec(first.model)`.

    Raises:
        ConfigError: for a first stage without latents, a second of other data, and for either
            where it consists of two stages itself.
    """
    expect("two_stage", first, Trained)
    expect("two_stage", second, Model)
    if FIRST in first.params:
        raise ConfigError(
            "The first stage stands on a first stage itself, whose latents are all that it has: "
            "its own second stage would be left out. Take the run that it stands on."
        )
    model, wanted = first.model, latent_spec(first.model)
    _check_stage(second, wanted)
    latent: Any = model.latent
    draw_noise = partial(draw_stage, wanted)

    def init(key: Key) -> tuple[Params, State]:
        params, state = second.init(key)
        frozen = copied((first.params, first.state))
        return {**params, FIRST: frozen[0]}, {**state, FIRST: frozen[1]}

    def encoded(params: Params, state: State, batch: Batch, epsilon: Array) -> Batch:
        """z ~ q_1(z | x) as a batch of the second stage."""
        mean, log_scale = latent.encode(params[FIRST], state[FIRST], batch.x, batch.cond)
        z = jax.lax.stop_gradient(mean + jnp.exp(log_scale) * epsilon)
        return batch._replace(x=z, length=None)

    def loss_of(player: str) -> LossFn:
        def loss(
            params: Params, state: State, batch: Batch, key: Key, step: Array
        ) -> tuple[Array, Aux]:
            noise = draw_noise(key, batch)
            codes = encoded(params, state, batch, noise.epsilon)
            own = _without_first(params), _without_first(state)
            value, aux = second.losses[player](*own, codes, noise.second, step)
            return value, Aux({**aux.state, FIRST: state[FIRST]}, aux.metrics)

        return loss

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        key_z, key_second = jax.random.split(key)
        mean, log_scale = latent.encode(params[FIRST], state[FIRST], batch.x, batch.cond)
        z = normal_sample(key_z, mean, log_scale)
        log_q = sum_event(normal_log_prob(z, mean, log_scale), len(wanted.shape))
        log_x = latent.log_likelihood(params[FIRST], state[FIRST], batch, z)
        score: Any = second.score
        own = _without_first(params), _without_first(state)
        log_z = score(*own, batch._replace(x=z, length=None), key_second)
        return log_x + log_z - log_q

    def decoded(params: Params, state: State, key: Key, z: Array, cond: Any) -> Array:
        return latent.draw(params[FIRST], state[FIRST], key, z, cond)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        key_z, key_x = jax.random.split(key)
        z = second.sample(_without_first(params), _without_first(state), key_z, n, cond)
        return decoded(params, state, key_x, z, cond)

    def sample_mean(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        z = second.sample(_without_first(params), _without_first(state), key, n, cond)
        return latent.decode(params[FIRST], state[FIRST], z, cond)

    def prepare(params: Params, state: State, batch: Batch, key: Key) -> tuple[Params, State]:
        assert second.prepare is not None
        noise = draw_noise(key, batch)
        codes = encoded(params, state, batch, noise.epsilon)
        own = _without_first(params), _without_first(state)
        after, new = second.prepare(*own, codes, noise.second)
        return {**after, FIRST: params[FIRST]}, {**new, FIRST: state[FIRST]}

    return checked(
        second._replace(
            spec=model.spec,
            init=init,
            losses={player: loss_of(player) for player in second.losses},
            sample=sample,
            log_prob=None,
            bound=None if second.score is None else bound,
            estimator="" if second.score is None else f"joined bound, 1 sample; {second.estimator}",
            prepare=None if second.prepare is None else prepare,
            noise=dict.fromkeys(second.losses, draw_noise),
            latent=_latent_of_stage(latent, sample_mean),
            autoregressive=None,
            denoiser=None if second.denoiser is None else _lifted(second.denoiser, decoded),
            extras=None,
        )
    )


def _without_first(tree: Any) -> Any:
    """The second stage's own entries of params or state."""
    return {name: entry for name, entry in tree.items() if name != FIRST}


def _check_stage(second: Model, wanted: DataSpec) -> None:
    found = second.spec
    params, state = jax.eval_shape(second.init, jax.random.key(0))
    if FIRST in {*params, *state}:
        raise ConfigError(
            f"The parameters of the second stage have an entry {FIRST!r} already, which is where "
            "the first stage is to be. Rename that player. Of three stages, join the second and "
            "the third by a model of your own: this takes two."
        )
    for what in ("shape", "kind", "n_classes", "cond_dim"):
        given, needed = getattr(found, what), getattr(wanted, what)
        if given != needed:
            raise ConfigError(
                f"The second stage must model the latents of the first, whose {what} is {needed}; "
                f"its spec has {given}. Build it with `latent_spec` of the first stage."
            )


def _latent_of_stage(latent: Latent, sample_mean: Callable[..., Array]) -> Latent:
    """The first stage's latents as functions of the joined parameters."""

    def of_first(function: Callable[..., Any] | None) -> Any:
        if function is None:
            return None

        def lifted(params: Params, state: State, *args: Any, **kwargs: Any) -> Any:
            return function(params[FIRST], state[FIRST], *args, **kwargs)

        return lifted

    fields = ("encode", "decode", "draw", "log_likelihood", "reconstruct")
    return latent._replace(
        sample_mean=sample_mean, **{name: of_first(getattr(latent, name)) for name in fields}
    )


def _lifted(denoiser: Denoiser, decoded: Callable[..., Array]) -> Denoiser:
    """The second stage's way from noise to codes, ending in decoded events."""

    def path(params: Params) -> Any:
        return denoiser.path(_without_first(params))

    def denoise(params: Params, state: State, *args: Any, **kwargs: Any) -> Array:
        return denoiser.denoise(_without_first(params), _without_first(state), *args, **kwargs)

    def generate(
        params: Params, state: State, key: Key, n: int, cond: Any = None, **how: Any
    ) -> Array:
        key_z, key_x = jax.random.split(key)
        own = _without_first(params), _without_first(state)
        z = denoiser.generate(*own, key_z, n, cond, **how)
        if how.get("every"):  # [n_steps + 1, n, d]
            return jax.vmap(lambda z: decoded(params, state, key_x, z, cond))(z)
        return decoded(params, state, key_x, z, cond)

    return denoiser._replace(path=path, denoise=denoise, generate=generate)
