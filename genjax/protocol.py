"""The contract: a generative model is a handful of pure functions. Read this file first.

A family's builder, such as `vae(spec, ...)`, takes a `DataSpec` and returns a `Model`.
`training(model, tx)` turns a model and an optimiser into a `Training`, pure functions over one
`TrainState`. Everything else is composition over those functions: ensembles, sweeps, k steps a
dispatch, gradient accumulation, sharding, exact resume.

The rules that make it work:

* A one-player and a two-player family are the same thing. A VAE has one loss, a GAN two. The
  gradient of a player's loss is taken with respect to `params[player]` only, and each turn sees
  what the turn before it left. An entry of `params` that has no loss is frozen, or `follows` one.
* `state` is what is carried but not differentiated (batch statistics, codebooks, replay buffers).
  Its structure, shapes and dtypes never change, and it advances once for each turn of an optimiser
  step. Where a batch is split (`microbatch`), every part begins with the state that the turn began
  with; of what the parts leave, real numbers are averaged, weighted as the parts are, and anything
  else is that of the first part that counts. For a moving average of statistics that is the moving
  average of the parts' mean. A state for which this is wrong, such as the carry of streams, refuses
  parts in its loss. Weight averages belong to optimisation and live in `opt`; caches live inside
  `sample`.
* Losses run in training mode; `log_prob` and `bound` run in evaluation mode.
* Losses and metrics are per example, `[B]`, in nats where they are log-probabilities, summed over
  the event's dimensions. The mean over the batch, with `batch.weight`, is taken in one place,
  `learning/step.py`, which refuses values of any other shape.
* Randomness is data. Typed keys only (`jax.random.key`). A step's key is `fold_in(ts.key, ts.step)`
  (with J turns a step, turn j has `fold_in(ts.key, ts.step J + j)`), and the order of the data is a
  pure function of (seed, step), so resume is exact by construction.
* A loss sees the number of the optimiser step, for what changes as training goes on. Nothing else
  of the training procedure enters a loss.
* Conditioning is one optional argument: `batch.cond` and `sample(..., cond=)`. A model is
  conditional if and only if its spec describes a condition (`n_classes` or `cond_dim`).
* What goes in comes out: `sample` returns values of the same kind, range and dtype as `batch.x`
  (see `DataSpec.kind`).
* `log_prob` is exact and `bound` is a lower bound in expectation; they are two fields so that
  nobody mixes them up.
* Parameters and state are made in float32, with `jax_enable_x64` or without, and a model computes
  in the dtype of its parameters and data: in float32, until somebody widens both.
* Parameters are matched by name: a tree with a missing, surplus, renamed or re-shaped leaf is
  refused with the paths that differ, by every function of a model that was `checks.checked`.

What differs from the first sketch of this contract, and why: `Model` also carries its `spec`, so
that shapes are checked in one place for every family, and the name of its `estimator`, so that a
report can say what a figure is. What a family can do beside `sample` stands in typed records
(`Latent`, `Autoregressive`, `Denoiser`), since a bag of names was asked by inspecting signatures.
`Training` also carries `rewrap`, because accumulating gradients needs a way in between the gradient
and the optimiser, and `within`, because members that share a batch may take their steps alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from genjax.spec import KINDS as KINDS
from genjax.spec import DataSpec as DataSpec
from genjax.spec import Kind as Kind
from genjax.spec import dtype_of as dtype_of

Array = jax.Array
Key = jax.Array
PyTree = Any
Params = dict[str, Any]
State = dict[str, Any]
Metrics = dict[str, Array]


class Batch(NamedTuple):
    """Examples with a leading batch axis B: `x` [B, *shape], `cond` [B] or [B, cond_dim], `weight`
    [B] (None means all 1).

    A weight of 0 takes an example out of every mean exactly, which is how a last, partial batch is
    padded. `length` [B] is there exactly where the spec says `lengths`: how many of the steps of x
    count.

    Example:
        >>> import numpy as np
        >>> from genjax import Batch
        >>> Batch(np.zeros((4, 2), np.float32), weight=np.asarray([1, 1, 1, 0], np.float32)).x.shape
        (4, 2)
    """

    x: PyTree
    cond: PyTree | None = None
    weight: Array | None = None
    length: Array | None = None


class Aux(NamedTuple):
    """What a loss returns beside its value: the next `state`, and metrics per example, each [B].

    Example:
        >>> from genjax import Aux
        >>> Aux(state={}, metrics={"kl": [0.1, 0.3]}).metrics
        {'kl': [0.1, 0.3]}
    """

    state: State
    metrics: Metrics


class InitFn(Protocol):
    """New parameters and state of every player, by name, from a key."""

    def __call__(self, key: Key) -> tuple[Params, State]: ...


class LossFn(Protocol):
    """`step` is the number of the optimiser step, an int32 scalar, for schedules inside a loss."""

    def __call__(
        self, params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]: ...


class SampleFn(Protocol):
    """`n` samples [n, *shape] in the units of the data; `cond` [n, ...] where the spec has a
    condition.
    """

    def __call__(
        self, params: Params, state: State, key: Key, n: int, cond: PyTree | None = None
    ) -> PyTree: ...


class ScoreFn(Protocol):
    """`log_prob` and `bound`: nats per example, [B]."""

    def __call__(self, params: Params, state: State, batch: Batch, key: Key) -> Array: ...


class PrepareFn(Protocol):
    """Initialisation from data; `batch.weight` 0 takes an example out of it."""

    def __call__(
        self, params: Params, state: State, batch: Batch, key: Key
    ) -> tuple[Params, State]: ...


class NoiseFn(Protocol):
    """What a loss draws from its key for a batch, as a record of the family's own."""

    def __call__(self, key: Key, batch: Batch) -> Any: ...


class Latent(NamedTuple):
    """What a latent-variable model offers: p(x) = ∫ p(z) p(x | z) dz, with q(z | x).

    Attributes:
        spec: of the latents of one event: continuous, shape (d,), or (T, d) for sequences.
        encode: (params, state, x, cond=None) -> mean and log-scale of q(z | x), [B, *spec.shape].
        decode: (params, state, z, cond=None) -> the mean of p(x | z), [B, *shape].
        draw: (params, state, key, z, cond=None) -> x ~ p(x | z), as `sample` returns it.
        log_likelihood: (params, state, batch, z) -> ln p(x | z) in nats, [B].
        reconstruct: (params, state, x, cond=None) -> decode of the mean of q(z | x).
        sample_mean: (params, state, key, n, cond=None) -> decode of z ~ p(z), what papers show.
    """

    spec: DataSpec
    encode: Callable[..., tuple[Array, Array]]
    decode: Callable[..., Array] | None = None
    draw: Callable[..., Array] | None = None
    log_likelihood: Callable[..., Array] | None = None
    reconstruct: Callable[..., Array] | None = None
    sample_mean: Callable[..., Array] | None = None


class Autoregressive(NamedTuple):
    """What a model of sequences offers that is sampled step by step: p(x) = Π_t p(x_t | x_<t).

    `dropped` bool [n] says which examples go without their condition.

    Attributes:
        generate: (params, state, key, n, cond=None, *, prompt, prompt_length, length, ...) -> x;
            with `begin` as `parts.decoding.make_generate` has it.
        begin: (params, state, n, cond=None, dropped=None) -> outputs [n, n_outputs] for the first
            step, and a carry. None where steps have latent variables.
        advance: (params, state, carry, x [n, *event], cond=None, dropped=None) -> outputs for the
            step after x, and a carry.
        step_log_prob: (params, state, batch) -> ln p(x_t | x_<t) [B, T] in nats, 0 where padded.
        outputs: (params, state, x, cond=None, dropped=None) -> the parameters of p(x_t | x_<t),
            [B, T, n_outputs].
        stream: (params, carry | None, batch) -> step_log_prob of windows that go on from each
            other, and the carry.
        context: the longest sequence that there is room for; None for no limit.
        guided: whether `generate` takes a scale of guidance.
    """

    generate: Callable[..., Array]
    begin: Callable[..., tuple[Array, PyTree]] | None = None
    advance: Callable[..., tuple[Array, PyTree]] | None = None
    step_log_prob: Callable[..., Array] | None = None
    outputs: Callable[..., Array] | None = None
    stream: Callable[..., tuple[Array, PyTree]] | None = None
    context: int | None = None
    guided: bool = False


class Denoiser(NamedTuple):
    """What a model offers that goes from noise to data along a path x_t = alpha(t) x0 + sigma(t) ε.

    Attributes:
        path: (params) -> the `parts.paths.Path`.
        denoise: (params, state, x_t, t, cond=None, dropped=None) -> the estimate of E[x0 | x_t],
            [n, *shape], on the normalised scale; `dropped` as in `Autoregressive`.
        generate: (params, state, key, n, cond=None, *, solver, n_steps, grid, guidance, every)
            -> x; see `parts.noise_to_data`.
        guided: whether `generate` takes a scale of guidance.
        guidance: the scale that its samples have unless told otherwise; None for none.
    """

    path: Callable[[Params], Any]
    denoise: Callable[..., Array]
    generate: Callable[..., Array]
    guided: bool = False
    guidance: Any = None


class Model(NamedTuple):
    """A generative model as a record of pure functions; a family's builder returns it through
    `checks.checked`.

    Attributes:
        spec: the data that it models.
        init: (key) -> (params, state): dicts with one entry per player.
        losses: for each player (params, state, batch, key, step) -> (loss [B], Aux), to be
            minimised, in training mode.
        sample: (params, state, key, n, cond=None) -> x [n, *shape], of the kind that `spec` says.
        log_prob: exact log p(x) or log p(x | cond) in nats, [B], in evaluation mode; None if there
            is none.
        bound: a lower bound (in expectation) of the same; None if there is none.
        probed: whether `log_prob` has noise, of mean 0, as where random probes estimate a
            divergence. The mean of its exponential is then above the density.
        estimator: what `log_prob` or `bound` computes, in words, for reports: "ELBO, 1 sample".
        turns: ((player, times), ...) within one step; empty means each player once, in the order of
            `losses`.
        follows: entry of params -> (player, decay): an average of that player's parameters, which
            begins as their copy and is decay average + (1 - decay) player after each optimiser
            step. It is in `params`, for losses to use, and is never differentiated. A decay may be
            a function of the step.
        prepare: (params, state, batch, key) -> (params, state): initialisation from data, run once
            on the first training batch before step 0; None if there is none.
        labels: ((pattern, label), ...): what a parameter is, for optimisers: "matrix", "vector",
            "embedding", "dynamics" ... The first pattern (a regular expression) that is found in
            the path "player/..." counts. A leaf that no pattern names is a "matrix" if it has more
            than one dimension, else a "vector". "matrix:2,1,1" says that it is several, which share
            its last axis so, "matrix:each" one for each entry of its first axis, and
            "matrix:readout" that it is the last before what the model gives.
        noise: player -> (key, batch) -> what its loss draws from that key; the loss itself uses it.
        latent, autoregressive, denoiser: what the model can do beside sampling, where it can.
        extras: what no record has, as a record of the family's own.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, vae
        >>> model = vae(DataSpec((2,), "continuous"), latent_dim=1, hidden=(4,))
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 3).shape
        (3, 2)
    """

    spec: DataSpec
    init: InitFn
    losses: Mapping[str, LossFn]
    sample: SampleFn
    log_prob: ScoreFn | None = None
    bound: ScoreFn | None = None
    probed: bool = False
    estimator: str = ""
    turns: tuple[tuple[str, int], ...] = ()
    follows: Mapping[str, tuple[str, float | Callable[[Array], Array]]] = {}
    prepare: PrepareFn | None = None
    labels: tuple[tuple[str, str], ...] = ()
    noise: Mapping[str, NoiseFn] = {}
    latent: Latent | None = None
    autoregressive: Autoregressive | None = None
    denoiser: Denoiser | None = None
    extras: Any = None

    @property
    def any_length(self) -> bool:
        """Whether sequences may be padded to another number of steps than `spec` says: where a
        model goes step by step, and `batch.length` says how many count.
        """
        return self.spec.lengths and self.autoregressive is not None

    @property
    def score(self) -> ScoreFn | None:
        """`log_prob` where there is one, else `bound`, else None."""
        return self.bound if self.log_prob is None else self.log_prob

    @property
    def score_name(self) -> str | None:
        """ "log_prob" or "bound", whichever `score` is; None for a model that has neither."""
        if self.log_prob is not None:
            return "log_prob"
        return None if self.bound is None else "bound"


class Trained(NamedTuple):
    """A model with the parameters and the state that training left it: what a composed builder
    takes, and what a run folder holds.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, Trained, two_stage, flow_matching, latent_spec, vae
        >>> model = vae(DataSpec((2,), "continuous"), latent_dim=1, hidden=(4,))
        >>> first = Trained(model, *model.init(jax.random.key(0)))
        >>> two_stage(first, flow_matching(latent_spec(model), hidden=(4,))).spec.shape
        (2,)
    """

    model: Model
    params: Params
    state: State


class TrainState(NamedTuple):
    """All that a run carries, and all that a checkpoint holds. Create it under `jax.jit`, so that
    buffers are not shared.

    `step` counts optimiser steps (int32, a scalar that the members of an ensemble share), `key` is
    the root of the run's randomness, `opt` has one entry per player.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, training, vae
        >>> t = training(vae(DataSpec((2,), "continuous"), hidden=(4,)), optax.adam(1e-3))
        >>> ts = jax.jit(t.init)(jax.random.key(0))
        >>> int(ts.step), list(ts.params), list(ts.opt)
        (0, ['vae'], ['vae'])
    """

    step: Array
    key: Key
    params: Params
    state: State
    opt: dict[str, Any]


class Gradient(Protocol):
    """Gradient of one player's weighted loss: `weight` [B], or [] for all alike, sums to 1 over the
    step's batch, so gradients and metrics of disjoint parts just add.
    """

    def __call__(
        self,
        player: str,
        params: Params,
        state: State,
        batch: Batch,
        weight: Array,
        key: Key,
        step: Array,
    ) -> tuple[PyTree, State, Metrics]: ...


class Training(NamedTuple):
    """A training procedure as pure functions; every transform in `learning` maps a Training to a
    Training.

    Attributes:
        init: (key) -> TrainState.
        step: (TrainState, Batch) -> (TrainState, metrics), metrics being means over the batch,
            named "player/name".
        rewrap: (wrap: Gradient -> Gradient) -> Training: the same procedure with its gradient
            function wrapped.
        within: (f: Training -> Training, steps=0) -> Training: the same members, each with its own
            procedure transformed by f, whose metrics have the members' axis first. `steps` is how
            many axes f puts in front of what a member's step is given. None where there are no
            members, or none that f could reach.
        own_batches: whether the members' batches are their own, in the place of one that they
            share.
        prepare: (TrainState, what `step` is given) -> TrainState: initialisation from the first
            batch, to be run once, before the first step. None if the model has none.
        members: whether there are members, be they within reach or not.

    Example:
        >>> import jax, optax
        >>> from genjax import DataSpec, example_batch, training, vae
        >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,))
        >>> t = training(model, optax.adam(1e-3))
        >>> batch = example_batch(model.spec, jax.random.key(1), 8)
        >>> ts, metrics = jax.jit(t.step)(t.init(jax.random.key(0)), batch)
        >>> int(ts.step), "vae/loss" in metrics
        (1, True)
    """

    init: Callable[[Key], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    rewrap: Callable[[Callable[[Gradient], Gradient]], "Training"]
    within: Callable[..., "Training"] | None = None
    prepare: Callable[[TrainState, Any], TrainState] | None = None
    own_batches: bool = False
    members: bool = False


def step_mask(spec: DataSpec, batch: Batch) -> Array:
    """Which steps of each sequence count, bool [B, T]: up to its end token, itself included, or up
    to its length.

    The one place that knows of padding; a loss of sequences sums its steps where the mask is true.
    """
    n, t = batch.x.shape[:2]
    if spec.end is not None:
        ended = jnp.cumsum((batch.x == spec.end).astype(jnp.int32), axis=1)
        return jnp.concatenate([jnp.ones((n, 1), bool), ended[:, :-1] == 0], axis=1)
    if batch.length is not None:
        return jnp.arange(t, dtype=batch.length.dtype)[None] < batch.length[:, None]
    return jnp.ones((n, t), bool)


def without_padding(spec: DataSpec, batch: Batch) -> Batch:
    """The batch with 0 for what lies beyond a length, which counts for nothing, whatever it is: NaN
    would pass any weight of 0.
    """
    if not spec.lengths:
        return batch
    mask = step_mask(spec, batch).reshape(*batch.x.shape[:2], *[1] * len(spec.event))
    return batch._replace(x=jnp.where(mask, batch.x, 0))
