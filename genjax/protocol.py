"""The contract: a generative model is a handful of pure functions. Read this file first.

A family's builder, such as `vae(spec, ...)`, takes a `DataSpec` and returns a `Model`.
`train.training(model, tx)` turns a model and an optimiser into a `Training`, two functions over one
`TrainState`. Everything else is composition over those
two functions: ensembles, sweeps, k steps a dispatch, gradient accumulation, sharding, exact resume.

The rules that make it work:

* A one-player and a two-player family are the same thing. A VAE has one loss, a GAN two. The
  gradient of a player's loss is taken with respect to `params[player]` only, and each turn sees
  what the turn before it left. An entry of `params` that has no loss is frozen.
* `state` is what is carried but not differentiated (batch statistics, codebooks, replay buffers).
  Its structure, shapes and dtypes never change. Weight averages belong to optimisation and live in
  `opt`; caches live inside `sample`.
* Losses run in training mode; `log_prob` and `bound` run in evaluation mode.
* Losses and metrics are per example, `[B]`, in nats where they are log-probabilities, summed over
  the event's dimensions. The mean over the batch, with `batch.weight`, is taken in one place:
  `train.py`.
* Randomness is data. Typed keys only (`jax.random.key`). A step's key is `fold_in(ts.key, ts.step)`
  (with J turns a step, turn j has `fold_in(ts.key, ts.step J + j)`), and the order of the data is a
  pure function of (seed, step), so resume is exact by construction.
* Conditioning is one optional argument: `batch.cond` and `sample(..., cond=)`. A model is
  conditional if and only if its spec describes a condition (`n_classes` or `cond_dim`).
* What goes in comes out: `sample` returns values of the same kind, range and dtype as `batch.x`
  (see `DataSpec.kind`).
* `log_prob` is exact and `bound` is a lower bound in expectation; they are two fields so that
  nobody mixes them up.

What differs from the first sketch of this contract, and why: `Model` also carries its `spec`, so
that shapes are checked in one place (`checked`) for every family, and the name of its `estimator`,
so that a report can say what a figure is; `Training` also carries `rewrap`, because accumulating
gradients needs a way in between the gradient and the optimiser.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = jax.Array
Key = jax.Array
PyTree = Any
Params = dict[str, Any]
State = dict[str, Any]
Metrics = dict[str, Array]
Kind = Literal["binary", "discrete", "continuous", "tokens"]

KINDS: tuple[Kind, ...] = ("binary", "discrete", "continuous", "tokens")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a builder must know of its data; it is plain numbers and text, and travels with every
    checkpoint.

    Attributes:
        shape: the event's shape without the batch axis: (8, 8, 1) for an image (height, width,
            channels), (2,) for a point.
        kind: what the values are. `binary`: 0 or 1. `discrete`: whole numbers 0 .. levels-1 with an
            order, such as grey
            levels. `continuous`: real numbers. `tokens`: whole numbers 0 .. levels-1 without an
            order. `batch.x` holds binary, discrete and continuous values as float32 and tokens as
            int32, and `sample` returns the same.
        levels: how many values `discrete` or `tokens` data take (256 for bytes); None for the other
            kinds.
        n_classes: the model is conditional on a label 0 .. n_classes-1, int32 [B]; None if it is
            not.
        cond_dim: the model is conditional on a vector, float32 [B, cond_dim]; None if it is not.
        class_names: what each class is called, for messages and pictures; None calls it by its
            number.
        vocabulary: the symbol of each token, for `tokens` data that are text.
        step: the event is a sequence along its first axis, and this is what one step of it is
            called in reports:
            "character", "frame", "row". None for events that are no sequences.
        end: the token that ends a sequence. What follows it in `batch.x` is padding (more of the
            same token) and counts for nothing; the end token itself counts, so a model of such data
            models how long they are.
        lengths: sequences come with their lengths, `batch.length` int32 [B] from 1 to shape[0];
            steps after that count for
            nothing. Lengths are given, not modelled: for data that have no end token, such as
                music.
        name: what the data are called, for messages and pictures.
    """

    shape: tuple[int, ...]
    kind: Kind
    levels: int | None = None
    n_classes: int | None = None
    cond_dim: int | None = None
    class_names: tuple[str, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    step: str | None = None
    end: int | None = None
    lengths: bool = False
    name: str = "data"

    def __post_init__(self) -> None:
        # JSON gives lists back; a spec must stay hashable and equal to the one that was written.
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        for name in ("vocabulary", "class_names"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KINDS:
            raise ValueError(f"DataSpec.kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"DataSpec.shape must hold positive sizes; got {self.shape}.")
        whole = self.kind in ("discrete", "tokens")
        if whole and (self.levels is None or self.levels < 2):
            raise ValueError(
                f"{self.kind} data need levels >= 2 (256 for bytes); got levels={self.levels}."
            )
        if not whole and self.levels is not None:
            raise ValueError(
                f"levels is for discrete or token data; got levels={self.levels} with "
                f"kind={self.kind!r}."
            )
        if self.n_classes is not None and self.cond_dim is not None:
            raise ValueError("A condition is a label (n_classes) or a vector (cond_dim), not both.")
        for name in ("n_classes", "cond_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DataSpec.{name} must be at least 1; got {value}.")
        if self.class_names is not None and len(self.class_names) != self.n_classes:
            raise ValueError(
                f"{len(self.class_names)} class_names for n_classes={self.n_classes}: give one "
                "name for each."
            )
        self._check_sequence()

    def _check_sequence(self) -> None:
        if self.vocabulary is not None and (
            self.kind != "tokens" or len(self.vocabulary) != self.levels
        ):
            raise ValueError(
                f"A vocabulary names each of the levels of token data; got {len(self.vocabulary)} "
                "symbols with "
                f"kind={self.kind!r}, levels={self.levels}."
            )
        if (self.end is not None or self.lengths) and (self.step is None or not self.shape):
            raise ValueError(
                "end and lengths are for sequences: say what a step is called (step='character')."
            )
        if self.end is not None and (
            self.lengths or self.kind != "tokens" or not 0 <= self.end < (self.levels or 0)
        ):
            raise ValueError(
                "end must be a token, 0 <= end < levels, of data without lengths; got "
                f"end={self.end} with "
                f"kind={self.kind!r}, levels={self.levels}, lengths={self.lengths}."
            )

    @property
    def size(self) -> int:
        """The number of dimensions D of one event: the product of `shape`."""
        return math.prod(self.shape)

    @property
    def conditional(self) -> bool:
        """Whether a model of these data takes a condition."""
        return self.n_classes is not None or self.cond_dim is not None

    @property
    def cond_size(self) -> int:
        """The length of a condition as a vector (a label counts as one-hot); 0 for an unconditional
        model.
        """
        return self.n_classes or self.cond_dim or 0

    @property
    def text(self) -> bool:
        """Whether events are text: tokens that a vocabulary gives symbols to."""
        return self.vocabulary is not None

    @property
    def dtype(self) -> Any:
        """The dtype of `batch.x`: int32 for tokens, float32 for all else."""
        return jnp.int32 if self.kind == "tokens" else jnp.float32

    def normalize(self, x: Array) -> Array:
        """Values as a network wants them: binary and discrete ones mapped linearly to [-1, 1],
        continuous ones unchanged.
        """
        top = {"binary": 1, "discrete": (self.levels or 2) - 1}.get(self.kind)
        return x if top is None else x * (2 / top) - 1

    def denormalize(self, y: Array) -> Array:
        """The inverse of `normalize`, without rounding."""
        top = {"binary": 1, "discrete": (self.levels or 2) - 1}.get(self.kind)
        return y if top is None else (y + 1) * (top / 2)


class Batch(NamedTuple):
    """Examples with a leading batch axis B: `x` [B, *shape], `cond` [B] or [B, cond_dim], `weight`
    [B] (None means all 1).

    A weight of 0 takes an example out of every mean exactly, which is how a last, partial batch is
    padded. `length` [B] is there exactly where the spec says `lengths`: how many of the steps of x
    count.
    """

    x: PyTree
    cond: PyTree | None = None
    weight: Array | None = None
    length: Array | None = None


class Aux(NamedTuple):
    """What a loss returns beside its value: the next `state`, and metrics per example, each [B]."""

    state: State
    metrics: Metrics


class InitFn(Protocol):
    def __call__(self, key: Key) -> tuple[Params, State]: ...


class LossFn(Protocol):
    def __call__(
        self, params: Params, state: State, batch: Batch, key: Key
    ) -> tuple[Array, Aux]: ...


class SampleFn(Protocol):
    def __call__(
        self, params: Params, state: State, key: Key, n: int, cond: PyTree | None = None
    ) -> PyTree: ...


class ScoreFn(Protocol):
    """`log_prob` and `bound`: nats per example, [B]."""

    def __call__(self, params: Params, state: State, batch: Batch, key: Key) -> Array: ...


class Model(NamedTuple):
    """A generative model as a record of pure functions; a family's builder returns it through
    `checked`.

    Attributes:
        spec: the data that it models.
        init: (key) -> (params, state): dicts with one entry per player.
        losses: for each player (params, state, batch, key) -> (loss [B], Aux), to be minimised, in
            training mode.
        sample: (params, state, key, n, cond=None) -> x [n, *shape], of the kind that `spec` says.
        log_prob: exact log p(x) or log p(x | cond) in nats, [B], in evaluation mode; None if there
            is none.
        bound: a lower bound (in expectation) of the same; None if there is none.
        estimator: what `log_prob` or `bound` computes, in words, for reports: "ELBO, 1 sample".
        turns: ((player, times), ...) within one step; empty means each player once, in the order of
            `losses`.
        extras: other pure functions by name: encode, decode, reconstruct, score, denoise, energy.
    """

    spec: DataSpec
    init: InitFn
    losses: Mapping[str, LossFn]
    sample: SampleFn
    log_prob: ScoreFn | None = None
    bound: ScoreFn | None = None
    estimator: str = ""
    turns: tuple[tuple[str, int], ...] = ()
    extras: Mapping[str, Callable[..., Any]] = {}


class TrainState(NamedTuple):
    """All that a run carries, and all that a checkpoint holds. Create it under `jax.jit`, so that
    buffers are not shared.

    `step` counts optimiser steps (int32, a scalar that the members of an ensemble share), `key` is
    the root of the run's randomness, `opt` has one entry per player.
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
        self, player: str, params: Params, state: State, batch: Batch, weight: Array, key: Key
    ) -> tuple[PyTree, State, Metrics]: ...


class Training(NamedTuple):
    """A training procedure as two pure functions; every transform in `train.py` maps a Training to
    a Training.

    Attributes:
        init: (key) -> TrainState.
        step: (TrainState, Batch) -> (TrainState, metrics), metrics being means over the batch,
            named "player/name".
        rewrap: (wrap: Gradient -> Gradient) -> Training: the same procedure with its gradient
            function wrapped.
        within: (f: Training -> Training) -> Training: the same members, each with its own procedure
            transformed by f, whose metrics have the members' axis first. None where there are no
            members or they do not share what a step is given.
    """

    init: Callable[[Key], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    rewrap: Callable[[Callable[[Gradient], Gradient]], "Training"]
    within: Callable[[Callable[["Training"], "Training"]], "Training"] | None = None


def check_key(key: Key) -> None:
    """Refuse anything but a typed PRNG key.

    Raises:
        TypeError: for an old-style uint32 key or something that is no key at all.
    """
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        found = (
            f"an array of {key.dtype}{list(key.shape)}"
            if hasattr(key, "dtype")
            else f"a {type(key).__name__}"
        )
        raise TypeError(
            f"Expected a typed PRNG key; got {found}. Make one with jax.random.key(seed), not "
            "PRNGKey(seed)."
        )


def check_cond(spec: DataSpec, cond: PyTree | None, n: int) -> None:
    """Check a condition against the spec: present exactly when the model is conditional, [n] labels
    or [n, cond_dim].

    Raises:
        ValueError: for a missing, superfluous or mis-shaped condition, or a label that is out of
            range (where the labels
            are concrete: inside a trace their values are not known).
        TypeError: for labels that are not whole numbers or vectors that are not real.
    """
    if not spec.conditional:
        if cond is not None:
            raise ValueError(
                f"A condition was given, but this model of {spec.name} is unconditional: leave "
                "`cond` out."
            )
        return
    wanted = (
        f"labels 0..{spec.n_classes - 1}, int [{n}]"
        if spec.n_classes
        else f"vectors, float [{n}, {spec.cond_dim}]"
    )
    if cond is None:
        raise ValueError(f"This model of {spec.name} is conditional: give `cond` ({wanted}).")
    cond = jnp.asarray(cond)
    shape = (n,) if spec.n_classes else (n, spec.cond_dim)
    if cond.shape != shape:
        raise ValueError(f"`cond` must be {wanted}; got shape {list(cond.shape)}.")
    right = jnp.issubdtype(cond.dtype, jnp.integer if spec.n_classes else jnp.floating)
    if not right:
        raise TypeError(f"`cond` must be {wanted}; got dtype {cond.dtype}.")
    if spec.n_classes and not isinstance(cond, Tracer) and n:
        labels = np.asarray(cond)  # in a trace, jax would trace even operations on constants
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= spec.n_classes:
            raise ValueError(f"`cond` must be {wanted}; got labels from {low} to {high}.")


def check_batch(spec: DataSpec, batch: Batch) -> None:
    """Check a batch's ranks, shapes and dtypes against the spec; it costs nothing once traced.

    Raises:
        ValueError, TypeError: see the text, which names what was expected and found.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            f"Expected a genjax.Batch(x, cond, weight, length); got {type(batch).__name__}."
        )
    x = batch.x
    if not hasattr(x, "shape") or x.ndim != len(spec.shape) + 1 or tuple(x.shape[1:]) != spec.shape:
        found = list(x.shape) if hasattr(x, "shape") else type(x).__name__
        raise ValueError(
            f"batch.x of {spec.name} must have shape [B, {', '.join(map(str, spec.shape))}]; got "
            f"{found}."
        )
    if spec.kind == "tokens" and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"batch.x of {spec.name} holds tokens and must be whole numbers; got {x.dtype}."
        )
    if spec.kind != "tokens" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"batch.x of {spec.name} is {spec.kind} and must be floating point; got {x.dtype}."
        )
    if batch.weight is not None and batch.weight.shape != (x.shape[0],):
        raise ValueError(
            f"batch.weight must have shape [{x.shape[0]}]; got {list(batch.weight.shape)}."
        )
    if spec.lengths != (batch.length is not None):
        found = (
            "it is missing: sequences of unequal length need it" if spec.lengths else "it was given"
        )
        raise ValueError(
            f"batch.length goes with a spec that says lengths=True; that of {spec.name} says "
            f"{spec.lengths}, and {found}."
        )
    if batch.length is not None and (
        batch.length.shape != (x.shape[0],) or not jnp.issubdtype(batch.length.dtype, jnp.integer)
    ):
        raise ValueError(
            f"batch.length must be int [{x.shape[0]}]; got "
            f"{batch.length.dtype}{list(batch.length.shape)}."
        )
    check_cond(spec, batch.cond, x.shape[0])


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


def checked(model: Model) -> Model:
    """The same model with every argument checked at trace time, and every result held to the
    contract.

    A builder ends with `return checked(Model(...))`, so that no family writes these checks itself.
    `n` of `sample` must be a Python whole number, because it is a shape.
    """
    spec = model.spec

    def check_arguments(batch: Batch, key: Key) -> int:
        check_batch(spec, batch)
        check_key(key)
        return batch.x.shape[0]

    def loss_of(player: str, loss_fn: LossFn) -> LossFn:
        def loss(params: Params, state: State, batch: Batch, key: Key) -> tuple[Array, Aux]:
            n = check_arguments(batch, key)
            value, aux = loss_fn(params, state, batch, key)
            chex.assert_shape(
                value, (n,), custom_message=f"The loss of {player!r} must be per example."
            )
            for name, metric in aux.metrics.items():
                chex.assert_shape(
                    metric,
                    (n,),
                    custom_message=f"The metric {name!r} of {player!r} must be per example.",
                )
            chex.assert_trees_all_equal_shapes_and_dtypes(aux.state, state)
            return value, aux

        return loss

    def score_of(name: str, score_fn: ScoreFn | None) -> ScoreFn | None:
        if score_fn is None:
            return None

        def score(params: Params, state: State, batch: Batch, key: Key) -> Array:
            n = check_arguments(batch, key)
            value = score_fn(params, state, batch, key)
            chex.assert_shape(value, (n,), custom_message=f"{name} must be per example.")
            return value

        return score

    def init(key: Key) -> tuple[Params, State]:
        check_key(key)
        return model.init(key)

    def sample(
        params: Params, state: State, key: Key, n: int, cond: PyTree | None = None
    ) -> PyTree:
        check_key(key)
        if not isinstance(n, int) or n < 1:
            raise ValueError(
                "sample needs a whole number n >= 1 of samples (it is a shape, so not traced); "
                f"got {n!r}."
            )
        check_cond(spec, cond, n)
        x = model.sample(params, state, key, n, cond)
        chex.assert_shape(x, (n, *spec.shape))
        return x

    return model._replace(
        init=init,
        losses={player: loss_of(player, loss) for player, loss in model.losses.items()},
        sample=sample,
        log_prob=score_of("log_prob", model.log_prob),
        bound=score_of("bound", model.bound),
    )
