"""A U-Net for denoising images (Ronneberger 2015, Ho 2020), NHWC: residual blocks that know the
noise level, and attention.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from genjax.errors import ConfigError
from genjax.nets.conditioned import Embedding, SelfAttention, zero_linear
from genjax.nets.fast_conv import Conv, double, halve
from genjax.nets.layers import EPSILON, wide
from genjax.nets.patches import from_patches, to_patches
from genjax.nets.platforms import once
from genjax.nets.remat import rematerialised
from genjax.protocol import Array


def n_groups(d: int) -> int:
    """Into how many groups d channels are put: as many as there are with at least 4 channels each,
    but not more than 32.
    """
    return max(g for g in range(1, 33) if d % g == 0 and (g == 1 or d // g >= 4))


def group_norm(x: Array, groups: int, scale: Array, shift: Array) -> Array:
    """scale (x - mean) / sqrt(var + ε) + shift for x [n, H, W, C] and scale, shift [n, C]; mean and
    var are over the pixels and channels of each of `groups` runs of channels, for each example by
    itself. Wu & He 2018.

    Both moments come from one pass over the pixels, and so do their derivatives: a step of a U-Net
    takes 0.94 to 0.98 of the time. They are those of differences from a group's mean at the first
    pixel, which is at most sqrt(H W var) away from the mean of all, so that var is right whatever
    the mean is (Chan, Golub & LeVeque 1983). Sums over pixels come first, and those over the
    channels of a group after, as a product with a small matrix: on a CPU a loop over pixels that
    reads one number for several channels is not vectorised, with all that XLA fuses into it.
    """
    n, height, width, d = x.shape
    y = x.astype(wide(x.dtype)).reshape(n, height * width, d)
    same = np.kron(np.eye(groups), np.full((d // groups, d // groups), groups / d)).astype(y.dtype)

    def average(y: Array) -> Array:
        return jnp.matmul(y, same, precision="highest")

    y = y - jax.lax.stop_gradient(average(y[:, :1]))
    mean = average(jnp.mean(y, axis=1, keepdims=True))
    var = average(jnp.mean(jnp.square(y), axis=1, keepdims=True)) - jnp.square(mean)
    var = jnp.maximum(var, 0)  # rounding
    factor = jax.lax.rsqrt(var + EPSILON) * scale[:, None].astype(y.dtype)
    constant = shift[:, None].astype(y.dtype) - mean * factor
    return (y * factor + constant).astype(x.dtype).reshape(x.shape)


class AdaptiveGroupNorm(nnx.Module):
    """group_norm(x, 1 + s(e), m(e)), where (s, m) is a dense layer of e that starts at 0. Dhariwal
    & Nichol 2021, section 3.
    """

    def __init__(self, d: int, d_embed: int, *, rngs: nnx.Rngs) -> None:
        self.groups = n_groups(d)
        self.parameters = zero_linear(d_embed, 2 * d, rngs=rngs)

    def __call__(self, x: Array, e: Array) -> Array:
        scale, shift = jnp.split(self.parameters(e), 2, axis=-1)
        return group_norm(x, self.groups, 1 + scale, shift)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3, with a 1x1 convolution of x where the width
    changes; the last conv is 0 at first.
    """

    def __init__(self, d_in: int, d_out: int, d_embed: int, *, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([AdaptiveGroupNorm(d, d_embed, rngs=rngs) for d in (d_in, d_out)])
        self.one = Conv(d_in, d_out, (3, 3), rngs=rngs)
        self.two = Conv(d_out, d_out, (3, 3), kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.short = Conv(d_in, d_out, (1, 1), rngs=rngs) if d_in != d_out else None

    def __call__(self, x: Array, e: Array) -> Array:
        h = self.one(jax.nn.silu(self.norms[0](x, e)))
        h = self.two(jax.nn.silu(self.norms[1](h, e)))
        return h + (x if self.short is None else self.short(x))


class UNet(nnx.Module):
    """Down and up again through one resolution for each entry of `channels`, each half as wide as
    the one before.

    At each resolution on the way down `n_blocks` residual blocks, then a mean over 2x2; at the
    lowest one, attention over all pixels between two rows of blocks; on the way up a doubling by
    repetition, plus the outcome of the same resolution on the way down, and `n_blocks` residual
    blocks. With `patch` p, every p x p pixels are one with p² times the channels from the start and
    until the end, which makes a step about p² times as fast.

    Ho 2020 puts the two halves side by side, so that the convolution after them has twice the
    channels; with their sum a step of a net of widths (24, 48) with patches takes 0.7 times as
    long.

    Args:
        shape: (height, width, channels) of an image; sides must be multiples of patch ·
            2^(len(channels) - 1).
        channels: widths, the finest resolution first.
        cond_size, guided: see `nets.conditioned.DenoiserMlp`.
        patch: the side p of a patch.
        n_blocks: residual blocks at each resolution, on each way.
        n_heads: of the attention; they divide the last width. 0 for no attention.
        d_embed: the length of e; 4 channels[0] unless given.
        remat: what of a residual block is computed again on the way back; see `nets.remat`.

    Raises:
        ConfigError: for sizes that do not fit, naming those that do.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: Sequence[int],
        cond_size: int = 0,
        guided: bool = False,
        patch: int = 1,
        n_blocks: int = 1,
        n_heads: int = 1,
        d_embed: int | None = None,
        remat: str = "none",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(shape, channels, patch, n_blocks, n_heads)
        d = 4 * channels[0] if d_embed is None else d_embed

        def row(d_in: int, d_out: int) -> nnx.List:
            widths = [d_in] + [d_out] * (n_blocks - 1)
            return nnx.List([ResidualBlock(width, d_out, d, rngs=rngs) for width in widths])

        pairs, d_last = list(itertools.pairwise(channels)), channels[-1]
        self.patch, self.remat = patch, remat
        self.embed = Embedding(d, cond_size, guided, rngs=rngs)
        self.first = Conv(shape[2] * patch**2, channels[0], (3, 3), rngs=rngs)
        self.down = nnx.List([row(a, b) for a, b in [(channels[0], channels[0]), *pairs]])
        self.norm = AdaptiveGroupNorm(d_last, d, rngs=rngs) if n_heads else None
        self.attention = (
            SelfAttention(d_last, n_heads, last_zero=True, rngs=rngs) if n_heads else None
        )
        self.narrow = nnx.List([Conv(below, c, (1, 1), rngs=rngs) for c, below in pairs])
        self.up = nnx.List([row(c, c) for c in channels])
        self.last_norm = AdaptiveGroupNorm(channels[0], d, rngs=rngs)
        self.last = Conv(
            channels[0],
            shape[2] * patch**2,
            (3, 3),
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )

    def __call__(
        self, x: Array, noise_level: Array, cond: Array | None = None, dropped: Array | None = None
    ) -> Array:
        e = self.embed(noise_level, cond, dropped, x.dtype)
        h, skips = self.first(to_patches(once(x), self.patch)), []
        for level, row in enumerate(self.down):
            h = halve(h) if level else h
            for block in row:
                h = rematerialised(block, self.remat)(h, e)
            skips.append(h)
        if self.attention is not None and self.norm is not None:
            pixels = self.norm(h, e).reshape(h.shape[0], -1, h.shape[-1])
            h = h + self.attention(pixels).reshape(h.shape)
        for level in reversed(range(len(skips))):
            if level < len(skips) - 1:
                h = double(self.narrow[level](h)) + skips[level]
            for block in self.up[level]:
                h = rematerialised(block, self.remat)(h, e)
        return once(from_patches(self.last(jax.nn.silu(self.last_norm(h, e))), self.patch))


def check_sizes(
    shape: tuple[int, ...], channels: Sequence[int], patch: int, n_blocks: int, n_heads: int
) -> None:
    """Refuse what no U-Net can be made of.

    Raises:
        ConfigError: see `UNet`.
    """
    if len(shape) != 3:
        raise ConfigError(
            f"A U-Net needs events of shape (height, width, channels); got {shape}. Use net='mlp'."
        )
    if not channels or min(*channels, patch, n_blocks) < 1:
        raise ConfigError(
            "A U-Net needs one width >= 1 for each resolution, patch >= 1 and n_blocks >= 1; got "
            f"channels={tuple(channels)}, patch={patch}, n_blocks={n_blocks}."
        )
    fits = 0
    while fits < 32 and not any(side % (patch * 2**fits) for side in shape[:2]):
        fits += 1
    if fits < len(channels):
        times = len(channels) - 1
        advice = f"Give at most {fits} entries of channels" if fits else "Give another patch"
        raise ConfigError(
            f"{len(channels)} resolutions halve an image {times} times, and patches are {patch} "
            f"wide, so its sides must be multiples of {patch * 2**times}; got {shape[0]} x "
            f"{shape[1]}. {advice}, or pad the images."
        )
    if n_heads < 0 or (n_heads and channels[-1] % n_heads):
        raise ConfigError(
            f"n_heads must divide the last of channels, {channels[-1]}, or be 0; got {n_heads}."
        )
