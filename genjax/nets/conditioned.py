"""What the networks of diffusion and flow matching share, and the smallest of them: x_t and its
noise level in, an event out.

Each is called as net(x [n, *event], noise_level [n], cond [n, cond_size] | None, dropped bool [n] |
None) -> [n, *event]. The noise level is a number of order 1, such as log-SNR / 4; what the output
stands for (x0, ε, v ...) is the family's business. The noise level and the condition become one
vector e [n, d_embed], which scales and shifts what every layer makes (Perez 2018, FiLM). The last
layer is zero at first, and so is every scale and shift: a new network returns 0 whatever goes in.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genjax.errors import ConfigError
from genjax.nets.attention import attend
from genjax.nets.layers import Dense
from genjax.protocol import Array

_ZERO = nnx.initializers.zeros_init()
# The noise level varies by about 6: the slowest wave tells both ends apart, the fastest turns once
# in 3 nats of log-SNR.
FREQUENCIES = np.geomspace(0.25, 8.0, 16)


def waves(noise_level: Array, dtype: Any = None) -> Array:
    """φ(c) = (cos ω_k c, sin ω_k c) for c [n] and ω_k from 1/4 to 8 in equal ratios, [n, 32], of
    the dtype of the layers. The level itself is not narrow: its neighbours would be one number.
    """
    angles = noise_level[:, None] * jnp.asarray(FREQUENCIES, noise_level.dtype)[None]
    found = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return found.astype(dtype or noise_level.dtype)


def zero_linear(d_in: int, d_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer that starts as 0."""
    return nnx.Linear(d_in, d_out, kernel_init=_ZERO, rngs=rngs)


class Embedding(nnx.Module):
    """e = silu(W_2 silu(W_1 φ(c) + V cond)) [n, d], of a noise level c [n] and a condition [n,
    cond_size]; W have biases.

    Where `dropped` bool [n] is true, a learned vector stands for V cond, whatever the condition:
    that is how a network learns to do without it for classifier-free guidance (Ho & Salimans 2022,
    section 3). A net that is not `guided` has 0 there.
    """

    def __init__(self, d: int, cond_size: int = 0, guided: bool = False, *, rngs: nnx.Rngs) -> None:
        self.noise = nnx.Linear(2 * len(FREQUENCIES), d, rngs=rngs)
        self.condition = nnx.Linear(cond_size, d, use_bias=False, rngs=rngs) if cond_size else None
        self.dropped = nnx.Param(jnp.zeros(d, jnp.float32)) if cond_size and guided else None
        self.last = nnx.Linear(d, d, rngs=rngs)

    def __call__(
        self,
        noise_level: Array,
        cond: Array | None = None,
        dropped: Array | None = None,
        dtype: Any = None,
    ) -> Array:
        h = self.noise(waves(noise_level, dtype))
        if self.condition is not None:
            given = self.condition(jnp.asarray(cond))
            if dropped is not None:
                without = jnp.zeros((), given.dtype) if self.dropped is None else self.dropped[...]
                given = jnp.where(dropped[:, None], without.reshape(1, -1), given)
            h = h + given
        return jax.nn.silu(self.last(jax.nn.silu(h)))


def modulate(x: Array, parameters: Array) -> Array:
    """(1 + scale) x + shift for x [n, ..., d] and parameters [n, 2 d] = (scale, shift). Perez 2018,
    equation 2.
    """
    scale, shift = (
        p.reshape(p.shape[0], *[1] * (x.ndim - 2), -1) for p in jnp.split(parameters, 2, axis=-1)
    )
    return (1 + scale) * x + shift


class SelfAttention(nnx.Module):
    """W_out attend(W_qkv x) of x [n, T, d], every position to all; heads of d / n_heads dimensions.
    Vaswani 2017, section 3.2.

    `last_zero` lets it begin as 0, for sums that nothing else scales.
    """

    def __init__(self, d: int, n_heads: int, last_zero: bool = False, *, rngs: nnx.Rngs) -> None:
        self.n_heads = n_heads
        self.qkv = Dense(d, 3 * d, True, d**-0.5, rngs=rngs)
        self.out = Dense(d, d, True, 0.0 if last_zero else d**-0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        n, t, d = x.shape
        parts = (
            self.qkv(x.reshape(n * t, d))
            .reshape(n, t, 3, self.n_heads, -1)
            .transpose(2, 0, 3, 1, 4)
        )
        q, k, v = parts[0], parts[1], parts[2]
        y = attend(q[:, :, None], k, v, jnp.ones((t, t), bool))[:, :, 0]
        return self.out(y.transpose(0, 2, 1, 3).reshape(n * t, d)).reshape(n, t, d)


class DenoiserMlp(nnx.Module):
    """Dense layers: h ← silu((1 + s(e)) (W h + b) + m(e)) for each width of `hidden`, plus h where
    the width stays the same.

    Args:
        shape: of one event, flattened; an image is a vector here.
        hidden: widths, at least one.
        cond_size: the length of the condition; 0 for none.
        guided: whether a vector is learned that stands for a dropped condition.
        d_embed: the length of e.

    Raises:
        ConfigError: for no hidden layer, which would be a net that does not know of the noise.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: Sequence[int],
        cond_size: int = 0,
        guided: bool = False,
        d_embed: int = 128,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        if not hidden or min(hidden) < 1:
            raise ConfigError(
                "A denoising perceptron needs at least one hidden layer of a width >= 1; got "
                f"{tuple(hidden)}."
            )
        sizes = list(itertools.pairwise([math.prod(shape), *hidden]))
        self.embed = Embedding(d_embed, cond_size, guided, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in sizes])
        self.modulations = nnx.List([zero_linear(d_embed, 2 * b, rngs=rngs) for _, b in sizes])
        self.last = zero_linear(hidden[-1], math.prod(shape), rngs=rngs)

    def __call__(
        self, x: Array, noise_level: Array, cond: Array | None = None, dropped: Array | None = None
    ) -> Array:
        e = self.embed(noise_level, cond, dropped, x.dtype)
        h = x.reshape(x.shape[0], -1)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            y = jax.nn.silu(modulate(layer(h), modulation(e)))
            h = h + y if h.shape == y.shape else y
        return self.last(h).reshape(x.shape)
