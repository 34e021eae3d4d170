"""Models made of trained models. The only file of this folder that may import other families.

A composed builder takes a `Trained`, and keeps its parameters as entries of `params` that have no
loss: they are saved with the rest, and stay as they are.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import checked
from genjax.errors import ConfigError, unknown_name
from genjax.families.flow_matching import Flow
from genjax.parts.guidance import guided
from genjax.parts.ode_likelihood import LIKELIHOOD_SOLVERS
from genjax.parts.paths import Denoise, prior
from genjax.parts.solvers import GRIDS, SOLVERS
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    Denoiser,
    Key,
    Model,
    Params,
    PyTree,
    ScoreFn,
    State,
    Trained,
)


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


def reflow(
    first: Trained, *, solver: str = "heun", n_steps: int = 50, guidance: Any = None
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
            which the new flow then has built in; None for none.

    Raises:
        ConfigError: for a model that is no flow, a solver that does not follow the ODE, no steps,
            or guidance of a model that cannot be guided.
    """
    model, flow, denoiser = first.model, first.model.extras, first.model.denoiser
    if not isinstance(flow, Flow) or denoiser is None:
        raise ConfigError(
            "reflow makes pairs of noise and data of a flow-matching model; this model is another."
        )
    if solver not in LIKELIHOOD_SOLVERS:
        raise unknown_name("deterministic solver", solver, LIKELIHOOD_SOLVERS)
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

    whole = seeing(model, "flow")
    return checked(whole._replace(init=init, losses={"flow": loss}, noise={"flow": noise}))
