"""Optimisers: the settings of one as plain data, and the optax transforms that optax lacks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax.checks import leaves_by_name
from genjax.errors import ConfigError, unknown_name
from genjax.learning.labels import LABELS, Labels, base_of, labels_of
from genjax.learning.powers import SigmaRel, track_powers
from genjax.protocol import PyTree
from genjax.settings import NonNegative, Positive, Rate, Whole, Within, check_fields, used

if TYPE_CHECKING:
    import optax


class TrackEmaState(NamedTuple):
    """State of `track_ema`: the average `ema` has the structure of the parameters; `count` is the
    number of updates.
    """

    count: jax.Array
    ema: PyTree


def track_ema(decay: float) -> "optax.GradientTransformation":
    """Keep ema <- d ema + (1 - d) params after each update; put it last in a chain, since it sees
    the final update.

    d = min(decay, (1 + count) / (10 + count)), so that the average forgets the initial values early
    on. The average starts at the initial parameters, as a copy: an alias of them could not be
    donated.

    Args:
        decay: in [0, 1); 0.999 averages over about the last 1,000 steps.
    """
    import optax

    def init(params: PyTree) -> TrackEmaState:
        return TrackEmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, TrackEmaState]:
        if params is None:
            raise ConfigError("track_ema needs the parameters: call update(grads, state, params).")
        count = state.count.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + count) / (10 + count))

        def average(ema: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
            # In this form an average of equal values stays exactly equal.
            return ema + (1 - d).astype(ema.dtype) * (p + u - ema)

        return updates, TrackEmaState(
            state.count + 1, jax.tree.map(average, state.ema, params, updates)
        )

    return optax.GradientTransformation(init, update)


def averaged(opt: Any, params: PyTree) -> PyTree:
    """The average that a `track_ema` anywhere in the optimiser's state keeps, or else the weights
    that a schedule-free optimiser evaluates with (Defazio 2024); `params` where there is neither.

    Of members, whose states have leading axes, each member's own. Where `optax.partition` or
    `optax.masked` gives an optimiser a part of the parameters, its average is of that part.
    """
    from optax import contrib

    def evaluated(own: jax.Array, z: Any, b1: Any) -> jax.Array:
        if _masked(z):
            return own
        # Members have one value of b1 each.
        b1 = jnp.reshape(b1, (*jnp.shape(b1), *[1] * (jnp.ndim(own) - jnp.ndim(b1))))
        return contrib.schedule_free_eval_params(_Free(b1, z), own)

    kinds = (TrackEmaState, contrib.ScheduleFreeState)
    found = jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, kinds))
    for free in (leaf for leaf in found if isinstance(leaf, contrib.ScheduleFreeState)):
        params = jax.tree.map(functools.partial(evaluated, b1=free.b1), params, free.z)
    for average in (leaf for leaf in found if isinstance(leaf, TrackEmaState)):
        params = _filled(average.ema, params)
    return params


def _filled(average: PyTree, params: PyTree) -> PyTree:
    """An average with the parameters themselves where the optimiser does not have them."""
    if not any(map(_masked, jax.tree.leaves(average, is_leaf=_masked))):
        return average
    return jax.tree.map(lambda own, one: own if _masked(one) else one, params, average)


def _masked(node: Any) -> bool:
    import optax

    return isinstance(node, optax.MaskedNode)


class _Free(NamedTuple):
    """What optax asks of a schedule-free optimiser's state, for one array."""

    b1: jax.Array
    z: jax.Array


def scale_by_label(
    factors: Mapping[str, float], labels: Labels = (), player: str | None = None
) -> "optax.GradientTransformation":
    """Multiply the update of each parameter by the factor of its label, 1 where it has none."""
    import optax

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        def scaled(update: jax.Array, label: str) -> jax.Array:
            factor = factors.get(label, 1.0)
            return update if factor == 1 else update * jnp.asarray(factor, update.dtype)

        return jax.tree.map(scaled, updates, labels_of(updates, labels, player)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


ALGORITHMS = ("adam", "adamw", "sgd", "rmsprop", "lion", "muon", "schedule-free")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
MOST_RATE = 1000.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of one player's optimiser; `build(steps)` makes the optax transform.

    Attributes:
        algorithm: the update rule; "muon" is Muon for matrices and adamw for everything else, see
            `muon.py`; "schedule-free" is adamw whose average takes the place of a schedule, and
            samples and evaluates (Defazio 2024, algorithm 1).
        learning_rate: the peak step size.
        schedule: how the step size falls from the peak to `final_fraction` of it over the run,
            after the warm-up; "wsd" (warm-up, stable, decay) keeps the peak until the last part of
            the run, `decay_fraction` of it, and then falls by 1 - sqrt (Hägele 2024, section 3).
        final_fraction: the step size that the schedule has fallen to when the run ends, as a
            fraction of the peak.
        decay_fraction: for "wsd": the part of the run, at its end, in which the step size falls.
        warmup_steps: steps over which the step size rises linearly, in equal parts of the peak from
            the first on.
        b1: decay of the first moment (the momentum of sgd; of "schedule-free" the share of the
            average in the weights that take the gradient, above 0).
        b2: decay of the second moment (rmsprop's decay).
        weight_decay: decoupled weight decay of what `decayed` names, for adamw, lion, muon and
            schedule-free.
        clip_norm: clip the gradient to this global norm; 0 does not clip.
        ema_decay: keep an exponential moving average of the weights, used to sample and evaluate; 0
            keeps none.
        decayed: the labels of the parameters that weight decay applies to; a "matrix" is what has
            more than one dimension, where the model says nothing else.
        rates: the step size of some labels as a factor of that of the others: "dynamics=0.1".
        sigma_rels: keep averages of the weights of these relative lengths, such as 0.05 0.1, of
            which one of any length can be made after training: `--sigma-rel` of sample and
            evaluate, see `powers.py`.
    """

    algorithm: Literal["adam", "adamw", "sgd", "rmsprop", "lion", "muon", "schedule-free"] = "adam"
    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    final_fraction: Annotated[float, Within(0, 1)] = 0.0
    warmup_steps: Whole = 0
    b1: Rate = 0.9
    b2: Rate = 0.999
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0
    ema_decay: Rate = 0.0
    decayed: tuple[str, ...] = ("matrix", "embedding")
    rates: tuple[str, ...] = ()
    decay_fraction: Annotated[float, Within(0, 1, above=True)] = 0.2
    sigma_rels: tuple[SigmaRel, ...] = ()

    def __post_init__(self) -> None:
        for name in ("decayed", "rates", "sigma_rels"):  # JSON gives lists back
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        _factors(self.rates)
        if len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ConfigError(f"sigma_rels are each given once; got {self.sigma_rels}.")
        self._check_size()

    def _check_size(self) -> None:
        """Refuse steps that no weight survives, where their size is known.

        Raises:
            ConfigError: see the text.
        """
        if isinstance(self.learning_rate, Tracer):
            return
        if self.learning_rate > MOST_RATE:
            raise ConfigError(
                f"learning_rate must be at most {MOST_RATE:g}; got {self.learning_rate}."
            )
        if isinstance(self.weight_decay, Tracer):
            return
        if self.learning_rate * self.weight_decay >= 1:
            raise ConfigError(
                "A step takes the share learning_rate * weight_decay of each weight away: below 1; "
                f"got {self.learning_rate} * {self.weight_decay}."
            )

    def idle(self) -> list[str]:
        """What is set to something else than it is by itself, and does nothing beside the other
        settings; a line each.
        """
        whys = {
            "final_fraction": (self.schedule == "constant", "the schedule is constant"),
            "decay_fraction": (self.schedule != "wsd", "it is of the schedule wsd"),
            "b1": (self.algorithm == "rmsprop", "rmsprop has no first moment"),
            "b2": (self.algorithm == "sgd", "sgd has no second moment"),
            # A label of a model's own needs a rule, which may be that it does not decay.
            "decayed": (
                not used(self.weight_decay) and set(self.decayed) <= set(LABELS),
                "weight_decay is 0",
            ),
        }
        own = {field.name: field.default for field in dataclasses.fields(self)}
        return [
            f"{name} {getattr(self, name)} has no effect: {why}"
            for name, (idle, why) in whys.items()
            if idle and getattr(self, name) != own[name]
        ]

    def overlap(self, steps: int) -> list[str]:
        """In a line, that in a run of so many steps the decay of "wsd" begins before the warm-up
        has come to the peak, if it does.
        """
        decay = self.decay_fraction * steps
        if self.schedule != "wsd" or self.warmup_steps <= steps - decay:
            return []
        most = float(self._multiplier(jnp.arange(self.warmup_steps + 1), steps).max())
        if most > 0.99:
            return []
        return [
            f"warmup_steps {self.warmup_steps} and the decay of wsd over the last {decay:g} of "
            f"{steps} steps overlap: the step size comes to {most:.2f} of learning_rate"
        ]

    def build(
        self, steps: int, labels: Labels = (), player: str | None = None, turns: int = 1
    ) -> "optax.GradientTransformation":
        """The optax transform for a run of `steps` optimiser steps. Float settings may be traced,
        as a sweep does.

        Args:
            steps: of the whole run, for the schedule.
            labels: `Model.labels`, whose patterns are found in paths "player/...".
            player: whose parameters are to be updated; needed with labels.
            turns: updates of that player within one optimiser step, see `Model.turns`.

        Raises:
            ConfigError: for a decay that the algorithm does not have, or of nothing, a warm-up as
                long as the run, or `decayed` and `rates` of a label that does not exist; and from
                the transform's `init`, for a parameter with a label that no rule covers.

        Example:
            >>> from genjax import training, vae, DataSpec
            >>> from genjax.learning.optim import Optimizer
            >>> model = vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
            >>> settings = Optimizer("adamw", 1e-3, weight_decay=0.1, schedule="cosine")
            >>> t = training(model, {"vae": settings.build(1000, model.labels, "vae")})
        """
        import optax

        labels = tuple(labels)
        if labels and player is None:
            raise ConfigError("Labels go by paths 'player/...': build(steps, labels, player).")
        factors = _factors(self.rates)
        for name in (*self.decayed, *factors):
            known = dict.fromkeys((*LABELS, *(base_of(label) for _, label in labels)))
            if name not in known:
                raise unknown_name("label", name, known)
        if self.warmup_steps and self.warmup_steps >= steps:
            raise ConfigError(
                f"warmup_steps must be below the run's {steps} steps; got {self.warmup_steps}."
            )
        parts = [self._rule(functools.partial(self._rate, steps, turns), labels, player)]
        if factors and self.algorithm != "schedule-free":
            parts.append(scale_by_label(factors, labels, player))
        if used(self.clip_norm):
            parts.insert(0, optax.clip_by_global_norm(_limit(self.clip_norm)))
        if used(self.ema_decay):
            parts.append(track_ema(self.ema_decay))
        if self.sigma_rels:
            parts.append(track_powers(self.sigma_rels))
        tx = optax.chain(*parts) if len(parts) > 1 else parts[0]
        covered = {*LABELS, *self.decayed, *factors}
        if not self.decayed and used(self.weight_decay):
            raise ConfigError(
                "decayed names no label, so that weight_decay would change nothing: set "
                "weight_decay to 0 for no decay at all, or name labels: decayed=('matrix',)."
            )
        decays = self.decayed != ("matrix", "embedding") and used(self.weight_decay)
        meant = [(name,) for name in factors] + ([self.decayed] if decays else [])
        if not labels and not meant:
            return tx
        return _checked(tx, functools.partial(_check_rules, covered, meant, labels, player))

    def _rule(
        self, schedule: Callable[[jax.Array], jax.Array], labels: Labels, player: str | None
    ) -> "optax.GradientTransformation":
        """The algorithm with its step size, by a schedule where it is not constant, and decay."""
        import optax

        rate: Any = self.learning_rate
        if self.schedule != "constant" or self.warmup_steps:
            rate = schedule
        if self.algorithm == "adam":
            rule = optax.adam(rate, self.b1, self.b2)
        elif self.algorithm == "sgd":
            rule = optax.sgd(rate, self.b1)
        elif self.algorithm == "rmsprop":
            rule = optax.rmsprop(rate, self.b2)
        elif self.algorithm == "schedule-free":
            return self._schedule_free(rate, labels, player)
        elif self.algorithm == "muon":
            from genjax.learning.muon import scale_by_muon_or_adam

            mask = functools.partial(self._mask, labels, player)
            return optax.chain(
                scale_by_muon_or_adam(self.b1, self.b2, labels, player),
                optax.add_decayed_weights(self.weight_decay, mask),
                optax.scale_by_learning_rate(rate),
            )
        else:
            mask = functools.partial(self._mask, labels, player)
            rules = {"adamw": optax.adamw, "lion": optax.lion}
            return rules[self.algorithm](
                rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=mask
            )
        if used(self.weight_decay):
            raise ConfigError(
                f"{self.algorithm} has no weight decay; use adamw, lion, muon or schedule-free, or "
                "leave weight_decay at 0."
            )
        return rule

    def _schedule_free(
        self, rate: Any, labels: Labels, player: str | None
    ) -> "optax.GradientTransformation":
        """As `optax.contrib.schedule_free_adamw`, with decay and step sizes by label."""
        import optax
        from optax import contrib

        if self.schedule != "constant" or used(self.ema_decay) or not used(self.b1):
            raise ConfigError(
                "schedule-free takes the place of a schedule and of an average of weights, and has "
                "a b1 above 0: it goes with schedule constant (and warmup_steps) and ema_decay 0; "
                f"got {self.schedule}, {self.ema_decay} and b1 {self.b1}."
            )
        base = optax.chain(
            optax.scale_by_rms(self.b2, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(
                self.weight_decay, functools.partial(self._mask, labels, player)
            ),
            optax.scale_by_learning_rate(rate),
            scale_by_label(_factors(self.rates), labels, player),
        )
        return contrib.schedule_free(base, rate, self.b1)

    def _mask(self, labels: Labels, player: str | None, params: PyTree) -> PyTree:
        """Which parameters decay."""
        return jax.tree.map(lambda label: label in self.decayed, labels_of(params, labels, player))

    def _rate(self, steps: int, turns: int, count: jax.Array) -> jax.Array:
        """The step size after `count` updates, so many turns a step, of a run of `steps` steps."""
        done = count // turns if turns > 1 else count  # a division is many instructions
        return self.learning_rate * self._multiplier(done, steps)

    def _multiplier(self, count: jax.Array, steps: int) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        done = jnp.clip((count - self.warmup_steps) / max(steps - self.warmup_steps, 1), 0.0, 1.0)
        cooling = jnp.clip(1 - (steps - count) / (self.decay_fraction * steps), 0.0, 1.0)
        shape = {
            "constant": 0.0 * done,
            "linear": done,
            "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * done),
            "wsd": jnp.sqrt(cooling),
        }[self.schedule]
        warm: Any = 1.0
        if self.warmup_steps:
            warm = jnp.minimum(1.0, (count + 1) / self.warmup_steps)
        return warm * (1 - (1 - self.final_fraction) * shape)


def _limit(clip_norm: Any) -> Any:
    """The largest norm: none where a member of a sweep has 0, which does not clip."""
    if not isinstance(clip_norm, Tracer):
        return clip_norm
    return jnp.where(clip_norm > 0, clip_norm, jnp.inf)


def _factors(rates: Iterable[str]) -> dict[str, float]:
    """The step sizes that "label=factor" texts say.

    Raises:
        ConfigError: for a text of another form, a factor below 0, or a label that comes twice.
    """
    factors: dict[str, float] = {}
    for text in rates:
        label, _, number = text.partition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not label or label in factors or not 0 <= factor <= MOST_RATE:
            raise ConfigError(
                "rates are written as dynamics=0.1, each label once and no factor below 0 or above "
                f"{MOST_RATE:g}; got {text!r}."
            )
        factors[label] = factor
    return factors


def _checked(
    tx: "optax.GradientTransformation", check: Callable[[PyTree], None]
) -> "optax.GradientTransformation":
    """The transform, whose `init` has the parameters checked first."""
    import optax

    def init(params: PyTree) -> Any:
        check(params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)


def _check_rules(
    covered: set[str],
    meant: list[tuple[str, ...]],
    labels: Labels,
    player: str | None,
    params: PyTree,
) -> None:
    """Refuse parameters with a label that no rule covers, and rules that find no parameter: one of
    the labels of each entry of `meant` has to be there.
    """
    there = leaves_by_name(labels_of(params, labels, player))
    for name, label in there.items():
        if label not in covered:
            raise ConfigError(
                f"The parameter {player}/{name} is labelled {label!r}, for which the optimiser "
                f"has no rule. Give it a step size, as rates=('{label}=1',) does, or name it "
                "in `decayed`, for weight decay."
            )
    for names in meant:
        if not set(names) & set(there.values()):
            raise ConfigError(
                f"No parameter of {player or 'this model'} is labelled {' or '.join(names)}: "
                "`rates` or `decayed` would change nothing. Its labels are "
                f"{', '.join(dict.fromkeys(there.values()))}."
            )
