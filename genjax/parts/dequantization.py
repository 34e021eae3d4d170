"""Densities of whole numbers: values plus noise, and the bound on ln P(x) that they give.

P(x) = ∫ p(x + u) du over a level, so with u ~ q(u | x)

    ln P(x) >= E ln 1/K Σ_k p(x + u_k) / q(u_k | x)

for every K, and closer the larger it is. Theis 2016 (q uniform), Ho 2019 (q learned, and K).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax import nets
from genjax.errors import ConfigError
from genjax.nets.functional import functional
from genjax.parts.bijections import Bijection, chain, coupling, reversed_order, stacked
from genjax.parts.distributions import normal_log_prob, sum_event
from genjax.parts.monotone import affine
from genjax.protocol import Array, DataSpec, Key, Params
from genjax.settings import Count, Depth, Often, Settings


@dataclasses.dataclass(frozen=True)
class Dequantization(Settings):
    """How binary and discrete data become continuous, and how tight the bound is.

    Attributes:
        dequantization: what is added to binary and discrete values: "uniform" noise, or
            "variational", noise that a flow of its own learns to add.
        dequantizer_layers: for "variational": coupling layers of that flow.
        dequantizer_hidden: for "variational": widths of the hidden layers of its networks.
        n_bound_samples: for binary and discrete data: K of `bound`, draws of the noise.
    """

    dequantization: Literal["uniform", "variational"] = "uniform"
    dequantizer_layers: Depth = 4
    dequantizer_hidden: tuple[Count, ...] = (64,)
    n_bound_samples: Often = 1

    @property
    def in_words(self) -> str:
        """For reports: "variational dequantisation, K=16"."""
        return f"{self.dequantization} dequantisation, K={self.n_bound_samples}"


class Dequantizer(NamedTuple):
    """Continuous values for data, and how likely they are.

    Attributes:
        init: (key) -> params.
        draw: (key, x) -> noise, of x's shape; None for continuous data.
        apply: (params, x, c, noise) -> y [n, *shape] on the normalised scale, and ln q(u | x) [n]
            in nats, of u in the units of the data.
    """

    init: Callable[[Key], Params]
    draw: Callable[[Key, Array], Array | None]
    apply: Callable[[Params, Array, Array | None, Array | None], tuple[Array, Array]]


def _nothing(key: Key) -> Params:
    return {}


def as_it_is(spec: DataSpec) -> Dequantizer:
    """Continuous data need nothing."""

    def apply(
        params: Params, x: Array, c: Array | None, noise: Array | None
    ) -> tuple[Array, Array]:
        return spec.normalize(x), jnp.zeros(x.shape[0], x.dtype)

    return Dequantizer(_nothing, lambda key, x: None, apply)


def uniform(spec: DataSpec) -> Dequantizer:
    """y of x + u, u uniform on [-½, ½): ln q = 0."""

    def draw(key: Key, x: Array) -> Array:
        return jax.random.uniform(key, x.shape, x.dtype, -0.5, 0.5)

    def apply(
        params: Params, x: Array, c: Array | None, noise: Array | None
    ) -> tuple[Array, Array]:
        return spec.normalize(x + jnp.asarray(noise)), jnp.zeros(x.shape[0], x.dtype)

    return Dequantizer(_nothing, draw, apply)


def _noise_flow(spec: DataSpec, layers: int, hidden: tuple[int, ...], dtype: str) -> Bijection:
    """Of the noise of an event, [n, D], given that event and its condition, [n, D + E]."""
    d, kept, seen = spec.size, spec.size // 2, spec.size + spec.cond_size
    build = partial(
        nets.conditioners.ConditionerMLP, kept, hidden, d - kept, affine().n_params, seen
    )
    layer = chain(order=reversed_order(), move=coupling(functional(build, dtype), affine(), d))
    return stacked(lambda number: layer, layers)


def variational(
    spec: DataSpec, layers: int, hidden: tuple[int, ...], dtype: str = "float32"
) -> Dequantizer:
    """y of x + u with u = Φ(v) - ½, where v is the noise N(0, I) moved by a flow that sees x.

    Φ is the normal distribution function, so that the flow begins, as the identity, with uniform u
    and ln q = 0. ln q(u | x) = ln N(ε) - ln |det dv/dε| - ln N(v).
    """
    flow, size = _noise_flow(spec, layers, hidden, dtype), spec.size

    def draw(key: Key, x: Array) -> Array:
        return jax.random.normal(key, x.shape, x.dtype)

    def apply(
        params: Params, x: Array, c: Array | None, noise: Array | None
    ) -> tuple[Array, Array]:
        epsilon = jnp.asarray(noise).reshape(-1, size)
        seen = nets.mlp.flatten_with(spec.normalize(x), len(spec.shape), c)
        v, log_det = flow.inverse(params, epsilon, seen)
        log_ratio = normal_log_prob(epsilon, 0.0, 0.0) - normal_log_prob(v, 0.0, 0.0)
        u = jax.scipy.stats.norm.cdf(v) - 0.5
        return spec.normalize(x + u.reshape(x.shape)), sum_event(log_ratio) - log_det

    return Dequantizer(flow.init, draw, apply)


def dequantizer_of(spec: DataSpec, how: Dequantization, dtype: str = "float32") -> Dequantizer:
    """What the settings say for such data.

    Raises:
        ConfigError: for noise that is to be learned where none is needed, or for a single number,
            of which a coupling layer can keep no part.
    """
    learned = how.dequantization == "variational"
    if spec.kind == "continuous":
        if learned:
            raise ConfigError(
                f"{spec.name} is continuous, and needs no noise: leave out "
                "dequantization='variational'."
            )
        return as_it_is(spec)
    if not learned:
        return uniform(spec)
    if spec.size < 2:
        raise ConfigError(
            "dequantization='variational' is for events of two numbers or more; "
            f"{spec.name} has {spec.size}. Use 'uniform'."
        )
    hidden: Any = tuple(how.dequantizer_hidden)
    return variational(spec, how.dequantizer_layers, hidden, dtype)
