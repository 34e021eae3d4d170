"""Generators and discriminators: perceptrons, DCGAN (Radford 2016) and residual nets (after Huang
2024). NHWC throughout.

A generator maps z [N, latent_dim] and a condition [N, E] (or None) to events [N, *shape] without a
last activation, a discriminator maps events to features [N, d_features]. What is made of the
features is the business of `Discriminator`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.nets.conv import check_image
from genjax.nets.fast_conv import Conv, ConvTranspose, double, halve
from genjax.nets.mlp import flatten_with
from genjax.nets.norm import BatchNorm, Plain, Spectral
from genjax.protocol import Array, DataSpec

_leaky = partial(jax.nn.leaky_relu, negative_slope=0.2)
# Radford 2016: zero-centred normal weights with standard deviation 0.02.
_NARROW = nnx.initializers.normal(0.02)


def _wrap(spectral: bool) -> Any:
    return Spectral if spectral else Plain


def _with_maps(x: Array, cond: Array | None) -> Array:
    """Images [N, H, W, C] with a condition [N, E] appended as E constant channels."""
    if cond is None:
        return x
    maps = jnp.broadcast_to(cond[:, None, None, :], (*x.shape[:3], cond.shape[-1]))
    return jnp.concatenate([x, maps], axis=-1)


class MLPGenerator(nnx.Module):
    """Dense layers with ReLU; with `norm` a batch normalisation before each, whose scale and shift
    know `norm_cond`.
    """

    def __init__(
        self,
        d_z: int,
        shape: tuple[int, ...],
        hidden: Sequence[int],
        *,
        concat: int = 0,
        norm: bool = False,
        norm_cond: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = [d_z + concat, *hidden]
        # A normalisation takes a bias before it away again.
        self.layers = nnx.List(
            [nnx.Linear(a, b, use_bias=not norm, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.last = nnx.Linear(sizes[-1], math.prod(shape), rngs=rngs)
        self.norms = nnx.List([BatchNorm(d, norm_cond, rngs=rngs) for d in hidden] if norm else [])
        self.shape, self.concat = tuple(shape), concat

    def __call__(self, z: Array, cond: Array | None, train: bool) -> Array:
        h = flatten_with(z, 1, cond if self.concat else None)
        for index, layer in enumerate(self.layers):
            h = layer(h)
            if self.norms:
                h = self.norms[index](h, cond, train)
            h = jax.nn.relu(h)
        return self.last(h).reshape(-1, *self.shape)


class MLPFeatures(nnx.Module):
    """Dense layers with leaky ReLU (slope 0.2)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: Sequence[int],
        *,
        concat: int = 0,
        spectral: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = [math.prod(shape) + concat, *hidden]
        wrap = _wrap(spectral)
        self.layers = nnx.List(
            [wrap(nnx.Linear(a, b, rngs=rngs), rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.ndim, self.concat, self.d_features = len(shape), concat, sizes[-1]

    def __call__(self, x: Array, cond: Array | None, train: bool) -> Array:
        h = flatten_with(x, self.ndim, cond if self.concat else None)
        for layer in self.layers:
            h = _leaky(layer(h, train))
        return h


class DCGANGenerator(nnx.Module):
    """A dense layer, then per entry of `channels` a 4x4 transposed convolution with stride 2, ReLU
    between them.
    """

    def __init__(
        self,
        d_z: int,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        *,
        concat: int = 0,
        norm: bool = True,
        norm_cond: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        self.start = (*check_image(shape, len(channels)), channels[0])
        self.first = nnx.Linear(d_z + concat, math.prod(self.start), kernel_init=_NARROW, rngs=rngs)
        sizes = [*channels, shape[2]]
        make = partial(ConvTranspose, kernel_size=(4, 4), stride=2, kernel_init=_NARROW, rngs=rngs)
        # A normalisation takes a bias before it away again.
        biased = [not norm] * (len(channels) - 1) + [True]
        self.convs = nnx.List(
            [
                make(*size, use_bias=b)
                for size, b in zip(itertools.pairwise(sizes), biased, strict=True)
            ]
        )
        self.norms = nnx.List(
            [BatchNorm(d, norm_cond, rngs=rngs) for d in channels] if norm else []
        )
        self.concat = concat

    def __call__(self, z: Array, cond: Array | None, train: bool) -> Array:
        x = self.first(flatten_with(z, 1, cond if self.concat else None)).reshape(-1, *self.start)
        for index, conv in enumerate(self.convs):
            if self.norms:
                x = self.norms[index](x, cond, train)
            x = conv(jax.nn.relu(x))
        return x


class DCGANFeatures(nnx.Module):
    """Per entry of `channels` a 4x4 convolution with stride 2 and leaky ReLU; `norm` puts a batch
    normalisation between.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        *,
        concat: int = 0,
        norm: bool = False,
        spectral: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        smallest = check_image(shape, len(channels))
        sizes, wrap = [shape[2] + concat, *channels], _wrap(spectral)
        # Weights of 0.02 would vanish without a normalisation behind them.
        init = {"kernel_init": _NARROW} if norm else {}
        make = partial(Conv, kernel_size=(4, 4), stride=2, rngs=rngs, **init)
        biased = [True] + [not norm] * (len(channels) - 1)
        layers = [
            make(*size, use_bias=b)
            for size, b in zip(itertools.pairwise(sizes), biased, strict=True)
        ]
        self.convs = nnx.List([wrap(layer, rngs=rngs) for layer in layers])
        self.norms = nnx.List([BatchNorm(d, rngs=rngs) for d in channels[1:]] if norm else [])
        self.d_features = math.prod(smallest) * channels[-1]
        self.concat = concat

    def __call__(self, x: Array, cond: Array | None, train: bool) -> Array:
        x = _with_maps(x, cond if self.concat else None)
        for index, conv in enumerate(self.convs):
            x = conv(x, train)
            if self.norms and index:
                x = self.norms[index - 1](x, None, train)
            x = _leaky(x)
        return x.reshape(x.shape[0], -1)


class _Residual(nnx.Module):
    """x + conv(act(conv(act(x)))), 3x3, with a 1x1 convolution on the short way where the width
    changes.
    """

    def __init__(
        self, d_in: int, d_out: int, *, norm: bool, norm_cond: int, wrap: Any, rngs: nnx.Rngs
    ) -> None:
        self.one = wrap(Conv(d_in, d_out, (3, 3), use_bias=not norm, rngs=rngs), rngs=rngs)
        self.two = wrap(Conv(d_out, d_out, (3, 3), rngs=rngs), rngs=rngs)
        short = partial(Conv, d_in, d_out, (1, 1), use_bias=False, rngs=rngs)
        self.short = wrap(short(), rngs=rngs) if d_in != d_out else None
        self.norms = nnx.List(
            [BatchNorm(d, norm_cond, rngs=rngs) for d in (d_in, d_out)] if norm else []
        )

    def __call__(self, x: Array, cond: Array | None, train: bool) -> Array:
        h = self.norms[0](x, cond, train) if self.norms else x
        h = self.one(_leaky(h), train)
        h = self.norms[1](h, cond, train) if self.norms else h
        h = self.two(_leaky(h), train)
        # The sum of two variables of variance 1 has variance 2; without a normalisation that would
        # double with each block.
        return (h + (x if self.short is None else self.short(x, train))) * math.sqrt(0.5)


class ResidualGenerator(nnx.Module):
    """A dense layer, then per entry of `channels` a residual block and a doubling by repetition,
    and a 3x3 convolution.
    """

    def __init__(
        self,
        d_z: int,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        *,
        concat: int = 0,
        norm: bool = False,
        norm_cond: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        self.start = (*check_image(shape, len(channels)), channels[0])
        self.first = nnx.Linear(d_z + concat, math.prod(self.start), rngs=rngs)
        sizes = [channels[0], *channels]
        make = partial(_Residual, norm=norm, norm_cond=norm_cond, wrap=Plain, rngs=rngs)
        self.blocks = nnx.List([make(a, b) for a, b in itertools.pairwise(sizes)])
        self.last = Conv(channels[-1], shape[2], (3, 3), rngs=rngs)
        self.concat = concat

    def __call__(self, z: Array, cond: Array | None, train: bool) -> Array:
        x = self.first(flatten_with(z, 1, cond if self.concat else None)).reshape(-1, *self.start)
        for block in self.blocks:
            x = double(block(x, cond, train))
        return self.last(_leaky(x))


class ResidualFeatures(nnx.Module):
    """A 3x3 convolution, then per entry of `channels` a residual block and a mean over 2x2."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        *,
        concat: int = 0,
        norm: bool = False,
        spectral: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        smallest = check_image(shape, len(channels))
        wrap = _wrap(spectral)
        self.first = wrap(Conv(shape[2] + concat, channels[0], (3, 3), rngs=rngs), rngs=rngs)
        sizes = [channels[0], *channels]
        make = partial(_Residual, norm=norm, norm_cond=0, wrap=wrap, rngs=rngs)
        self.blocks = nnx.List([make(a, b) for a, b in itertools.pairwise(sizes)])
        self.d_features = math.prod(smallest) * channels[-1]
        self.concat = concat

    def __call__(self, x: Array, cond: Array | None, train: bool) -> Array:
        x = self.first(_with_maps(x, cond if self.concat else None), train)
        for block in self.blocks:
            x = block(x, None, train)
            x = halve(x)
        return _leaky(x).reshape(x.shape[0], -1)


class Discriminator(nnx.Module):
    """Features h(x), and what is read off them: a logit [N] and, for an auxiliary task, predictions
    [N, E].

    logit = w·h + b, with `projection` + (V c)·h as well (Miyato & Koyama 2018, section 3, with V a
    linear layer).
    """

    def __init__(
        self,
        features: Any,
        *,
        projection: int = 0,
        auxiliary: int = 0,
        bias: bool = True,
        spectral: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.features = features(rngs=rngs)
        d, wrap = self.features.d_features, _wrap(spectral)
        self.logit = wrap(nnx.Linear(d, 1, use_bias=bias, rngs=rngs), rngs=rngs)
        embed = partial(nnx.Linear, projection, d, use_bias=False, rngs=rngs)
        self.embed = wrap(embed(), rngs=rngs) if projection else None
        self.auxiliary = nnx.Linear(d, auxiliary, rngs=rngs) if auxiliary else None

    def __call__(self, x: Array, cond: Array | None, train: bool) -> tuple[Array, Array | None]:
        h = self.features(x, cond, train)
        logit = self.logit(h, train)[..., 0]
        if self.embed is not None:
            logit = logit + jnp.sum(self.embed(cond, train) * h, axis=-1)
        return logit, None if self.auxiliary is None else self.auxiliary(h)


# net -> generator, features of the discriminator.
NETS: dict[str, tuple[type, type]] = {
    "mlp": (MLPGenerator, MLPFeatures),
    "dcgan": (DCGANGenerator, DCGANFeatures),
    "resnet": (ResidualGenerator, ResidualFeatures),
}


def generator(
    spec: DataSpec, net: str, widths: tuple[int, ...], latent_dim: int, norm: str, where: str
) -> Callable[..., Any]:
    """What makes the module; `where` it takes a condition."""
    e = spec.cond_size
    return partial(
        NETS[net][0],
        latent_dim,
        spec.shape,
        widths[::-1],
        concat=e if where == "concat" else 0,
        norm=norm == "batch",
        norm_cond=e if where == "batch_norm" else 0,
    )


def discriminator(
    spec: DataSpec,
    net: str,
    widths: tuple[int, ...],
    norm: str,
    where: str,
    spectral: bool,
    bias: bool,
) -> Callable[..., Any]:
    """The same of the discriminator."""
    e = spec.cond_size
    options = {"concat": e if where == "concat" else 0, "spectral": spectral}
    if net != "mlp":
        options["norm"] = norm == "batch"
    return partial(
        Discriminator,
        partial(NETS[net][1], spec.shape, widths, **options),
        projection=e if where == "projection" else 0,
        auxiliary=e if where == "auxiliary" else 0,
        bias=bias,
        spectral=spectral,
    )


def labels(
    spec: DataSpec, net: str, depth: int, ours: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """`Model.labels` of those players that are `ours`, with so many hidden layers: the last ones,
    and conditions by class, of which a batch has some rows only.
    """
    last = f"convs/{depth - 1}" if net == "dcgan" else "last"
    found = {
        "generator": [(f"{last}/kernel", "matrix:readout")],
        "discriminator": [("(logit/layer|auxiliary)/kernel", "matrix:readout")],
    }
    if spec.n_classes:
        found["generator"].append((r"(.*/)?norms/\d+/(scale|shift)/kernel", "embedding"))
        found["discriminator"].append(("embed/layer/kernel", "embedding"))
    return tuple(
        (f"^{player}/{pattern}$", label) for player in ours for pattern, label in found[player]
    )
