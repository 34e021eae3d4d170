"""Optimisers: the settings of one as plain data, and the optax transforms that optax lacks."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from genjax.errors import ConfigError, unknown_name
from genjax.protocol import PyTree


class TrackEmaState(NamedTuple):
    """State of `track_ema`: the average `ema` has the structure of the parameters; `count` is the
    number of updates.
    """

    count: jax.Array
    ema: PyTree


def track_ema(decay: float) -> optax.GradientTransformation:
    """Keep ema <- d ema + (1 - d) params after each update; put it last in a chain, since it sees
    the final update.

    d = min(decay, (1 + count) / (10 + count)), so that the average forgets the initial values early
    on. The average starts at the initial parameters, as a copy: an alias of them could not be
    donated.

    Args:
        decay: in [0, 1); 0.999 averages over about the last 1,000 steps.
    """

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
    """The average that a `track_ema` anywhere in the optimiser's state keeps; `params` where there
    is none.
    """
    states = [
        leaf
        for leaf in jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, TrackEmaState))
        if isinstance(leaf, TrackEmaState)
    ]
    return states[-1].ema if states else params


ALGORITHMS = ("adam", "adamw", "sgd", "rmsprop", "lion")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of one player's optimiser; `build(steps)` makes the optax transform.

    Attributes:
        algorithm: the update rule.
        learning_rate: the peak step size.
        schedule: how the step size falls from the peak to `final_fraction` of it over the run,
            after the warm-up.
        final_fraction: the step size that the schedule has fallen to when the run ends, as a
            fraction of the peak.
        warmup_steps: steps over which the step size rises linearly, in equal parts of the peak from
            the first on.
        b1: decay of the first moment (the momentum of sgd).
        b2: decay of the second moment (rmsprop's decay).
        weight_decay: decoupled weight decay of matrices and kernels (not of vectors), for adamw and
            lion.
        clip_norm: clip the gradient to this global norm; 0 does not clip.
        ema_decay: keep an exponential moving average of the weights, used to sample and evaluate; 0
            keeps none.
    """

    algorithm: Literal["adam", "adamw", "sgd", "rmsprop", "lion"] = "adam"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_fraction: float = 0.0
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transform for a run of `steps` optimiser steps. Float settings may be traced,
        as a sweep does.

        Raises:
            ConfigError: for an unknown algorithm or schedule, a decay that the algorithm does not
                have, or a warm-up as long as the run.
        """
        if self.algorithm not in ALGORITHMS:
            raise unknown_name("optimiser", self.algorithm, ALGORITHMS)
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        decays = self.algorithm in ("adamw", "lion")
        if not decays and (isinstance(self.weight_decay, Tracer) or self.weight_decay != 0):
            raise ConfigError(
                f"{self.algorithm} has no weight decay; use adamw or lion, or leave weight_decay "
                "at 0."
            )
        if self.warmup_steps and self.warmup_steps >= steps:
            raise ConfigError(
                f"warmup_steps must be below the run's {steps} steps; got {self.warmup_steps}."
            )
        rate: Any = self.learning_rate
        if self.schedule != "constant" or self.warmup_steps:
            rate = lambda count: self.learning_rate * self._multiplier(count, steps)  # noqa: E731
        decay = {
            "weight_decay": self.weight_decay,
            "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        }
        rules = {
            "adam": lambda: optax.adam(rate, self.b1, self.b2),
            "adamw": lambda: optax.adamw(rate, self.b1, self.b2, **decay),
            "sgd": lambda: optax.sgd(rate, self.b1),
            "rmsprop": lambda: optax.rmsprop(rate, self.b2),
            "lion": lambda: optax.lion(rate, self.b1, self.b2, **decay),
        }
        parts: list[optax.GradientTransformation] = [rules[self.algorithm]()]
        # A traced number cannot be compared with 0, and being swept it is meant to be used.
        if isinstance(self.clip_norm, Tracer) or self.clip_norm > 0:
            parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
        if isinstance(self.ema_decay, Tracer) or self.ema_decay > 0:
            parts.append(track_ema(self.ema_decay))
        return optax.chain(*parts) if len(parts) > 1 else parts[0]

    def _multiplier(self, count: jax.Array, steps: int) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = (
            jnp.minimum(1.0, (count + 1) / max(self.warmup_steps, 1)) if self.warmup_steps else 1.0
        )
        done = jnp.clip((count - self.warmup_steps) / max(steps - self.warmup_steps, 1), 0.0, 1.0)
        shape = {
            "constant": 0.0 * done,
            "linear": done,
            "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * done),
        }[self.schedule]
        return warm * (1 - (1 - self.final_fraction) * shape)
