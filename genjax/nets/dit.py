"""A diffusion Transformer (DiT, Peebles & Xie 2023), NHWC: attention between patches of an image,
told of the noise level.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.errors import ConfigError
from genjax.nets.conditioned import Embedding, SelfAttention, modulate, zero_linear
from genjax.nets.layers import Dense, unit_rms, wide
from genjax.nets.patches import from_patches, to_patches
from genjax.nets.remat import rematerialised
from genjax.protocol import Array


def positions(rows: int, columns: int, d: int) -> Array:
    """Waves in both directions for each patch, [rows · columns, d], float32: a quarter of d each
    for the sine and cosine of row · ω_k and of column · ω_k, where ω_k = 100^(-4 k / d). Vaswani
    2017, section 3.5, in two dimensions; there it is 10000, for positions up to thousands.
    """
    frequencies = 100.0 ** (-jnp.arange(d // 4, dtype=jnp.float32) / (d // 4))
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    angles = [at.astype(jnp.float32)[:, None] * frequencies[None] for at in (row, column)]
    return jnp.concatenate(
        [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=-1
    )


def layer_norm(x: Array) -> Array:
    """(x - mean) / sqrt(var + ε) over the last axis, without a scale and shift of its own. Ba
    2016.
    """
    y = x.astype(wide(x.dtype))
    return unit_rms(y - jnp.mean(y, axis=-1, keepdims=True)).astype(x.dtype)


class Block(nnx.Module):
    """h ← h + g_1 attention(LN_1(h)), then h ← h + g_2 W_2 gelu(W_1 LN_2(h)), where LN_i(h) = (1 +
    s_i) layer_norm(h) + m_i.

    The six vectors g_i, s_i, m_i [n, d] are a dense layer of e that is 0 at first: adaLN-Zero of
    Peebles & Xie, section 3.2.
    """

    def __init__(self, d: int, n_heads: int, d_hidden: int, *, rngs: nnx.Rngs) -> None:
        self.attention = SelfAttention(d, n_heads, rngs=rngs)
        self.up = Dense(d, d_hidden, True, d**-0.5, rngs=rngs)
        self.down = Dense(d_hidden, d, True, d_hidden**-0.5, rngs=rngs)
        self.parameters = zero_linear(d, 6 * d, rngs=rngs)

    def __call__(self, h: Array, e: Array) -> Array:
        n, t, d = h.shape
        first, second, gate_one, gate_two = jnp.split(
            self.parameters(e), [2 * d, 4 * d, 5 * d], axis=-1
        )
        h = h + gate_one[:, None] * self.attention(modulate(layer_norm(h), first))
        y = self.up(modulate(layer_norm(h), second).reshape(n * t, d))
        return h + gate_two[:, None] * self.down(jax.nn.gelu(y)).reshape(n, t, d)


def through(blocks: Sequence[Block], h: Array, e: Array, scanned: bool, remat: str) -> Array:
    """h [n, T, d] after all blocks; in a loop the compiler sees one of them only."""
    graph = nnx.graphdef(blocks[0])

    def one(h: Array, parameters: Any) -> tuple[Array, None]:
        return nnx.merge(graph, parameters)(h, e), None

    one = rematerialised(one, remat, scanned)
    states = [nnx.state(block) for block in blocks]
    if scanned:
        return jax.lax.scan(one, h, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))[0]
    for parameters in states:
        h = one(h, parameters)[0]
    return h


class DiT(nnx.Module):
    """Patches of p x p pixels as vectors of d, plus their positions, through `n_layers` blocks and
    back to pixels.

    Args:
        shape: (height, width, channels) of an image; sides must be multiples of `patch`.
        patch: the side p of a patch.
        d: the width of the blocks, a multiple of 4 and of n_heads; the length of e too.
        n_layers: blocks.
        n_heads: heads of attention.
        cond_size, guided: see `nets.conditioned.DenoiserMlp`.
        d_hidden: the width of the layer between W_1 and W_2; 4 d unless given.
        scanned: whether the blocks are a loop instead of one after the other.
        remat: what of a block is computed again on the way back; see `nets.remat`.

    Raises:
        ConfigError: for sizes that do not fit.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        patch: int,
        d: int,
        n_layers: int,
        n_heads: int,
        cond_size: int = 0,
        guided: bool = False,
        d_hidden: int | None = None,
        scanned: bool = False,
        remat: str = "none",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        if len(shape) != 3:
            raise ConfigError(
                f"A DiT needs events of shape (height, width, channels); got {shape}. Use "
                "net='mlp'."
            )
        if min(patch, n_layers, n_heads, d) < 1 or any(side % patch for side in shape[:2]):
            raise ConfigError(
                "patch must divide both sides of the image, and n_layers and n_heads be at least "
                f"1; got patch={patch} for {shape[0]} x {shape[1]}, n_layers={n_layers}, "
                f"n_heads={n_heads}."
            )
        if d % 4 or d % n_heads:
            raise ConfigError(
                f"The width of a DiT must be a multiple of 4 and of n_heads; got {d} and {n_heads} "
                "heads."
            )
        self.scanned, self.remat = scanned, remat
        self.patch, self.grid = patch, (shape[0] // patch, shape[1] // patch)
        self.embed = Embedding(d, cond_size, guided, rngs=rngs)
        self.first = Dense(patch**2 * shape[2], d, True, (patch**2 * shape[2]) ** -0.5, rngs=rngs)
        self.blocks = nnx.List(
            [Block(d, n_heads, d_hidden or 4 * d, rngs=rngs) for _ in range(n_layers)]
        )
        self.parameters = zero_linear(d, 2 * d, rngs=rngs)
        self.last = Dense(d, patch**2 * shape[2], True, 0.0, rngs=rngs)

    def __call__(
        self, x: Array, noise_level: Array, cond: Array | None = None, dropped: Array | None = None
    ) -> Array:
        e = self.embed(noise_level, cond, dropped, x.dtype)
        patches = to_patches(x, self.patch)
        n, (rows, columns), d = x.shape[0], self.grid, e.shape[1]
        h = self.first(patches.reshape(n * rows * columns, -1)).reshape(n, rows * columns, d)
        h = h + positions(rows, columns, d).astype(h.dtype)[None]
        h = through(self.blocks, h, e, self.scanned, self.remat)
        y = self.last(modulate(layer_norm(h), self.parameters(e)).reshape(n * rows * columns, d))
        return from_patches(y.reshape(n, rows, columns, -1), self.patch)
