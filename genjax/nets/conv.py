"""Small convolutional encoders and decoders for images, NHWC throughout."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from genjax.errors import ConfigError
from genjax.nets.fast_conv import Conv, double
from genjax.nets.mlp import ACTIVATIONS
from genjax.protocol import Array


def check_image(shape: tuple[int, ...], n_halvings: int) -> tuple[int, int]:
    """Height and width of an image after `n_halvings`; shapes that cannot be halved so often are
    refused.

    Raises:
        ConfigError: if `shape` is not (height, width, channels), a side is not a multiple of
            2^n_halvings, or there is no halving, which is a convolutional net without a
            convolution.
    """
    if n_halvings < 1:
        raise ConfigError(
            "A convolutional net needs at least one entry of channels; got none. Use net='mlp'."
        )
    if len(shape) != 3:
        raise ConfigError(
            f"A convolutional net needs events of shape (height, width, channels); got {shape}. "
            "Use net='mlp'."
        )
    factor = 2**n_halvings
    if shape[0] % factor or shape[1] % factor:
        raise ConfigError(
            f"{n_halvings} halvings need sides that are multiples of {factor}; got {shape[0]} x "
            f"{shape[1]}. "
            "Give fewer channels (one halving per entry) or pad the images."
        )
    return shape[0] // factor, shape[1] // factor


class ConvEncoder(nnx.Module):
    """Images [N, H, W, C] -> features [N, d_out]: per entry of `channels` one 3x3 convolution with
    stride 2.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        d_out: int,
        *,
        cond_size: int = 0,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ) -> None:
        smallest = check_image(shape, len(channels))
        sizes = [shape[2], *channels]
        self.convs = nnx.List(
            [Conv(a, b, (3, 3), 2, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.last = nnx.Linear(math.prod(smallest) * sizes[-1] + cond_size, d_out, rngs=rngs)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Array, cond: Array | None = None) -> Array:
        for conv in self.convs:
            x = self.activation(conv(x))
        h = x.reshape(x.shape[0], -1)
        return self.last(h if cond is None else jnp.concatenate([h, cond], axis=-1))


class ConvDecoder(nnx.Module):
    """Features [N, d_in] -> [N, H, W, d_out]: a dense layer, then per entry of `channels` a
    doubling and a 3x3 convolution.
    """

    def __init__(
        self,
        d_in: int,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        d_out: int,
        *,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ) -> None:
        self.start = (*check_image(shape, len(channels)), channels[0])
        self.first = nnx.Linear(d_in, self.start[0] * self.start[1] * self.start[2], rngs=rngs)
        sizes = [*channels, d_out]
        self.convs = nnx.List([Conv(a, b, (3, 3), rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.activation = ACTIVATIONS[activation]

    def __call__(self, h: Array) -> Array:
        x = self.first(h).reshape(h.shape[0], *self.start)
        for conv in self.convs:
            # Doubling by repetition and then a convolution has no checkerboard pattern (Odena
            # 2016), unlike a transposed one.
            x = conv(double(self.activation(x)))
        return x


class ConvClassifier(nnx.Module):
    """Images [N, H, W, C] -> features [N, d_features] and logits [N, n_classes]: a `ConvEncoder`,
    then a dense layer.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        d_features: int,
        n_classes: int,
        *,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ) -> None:
        self.encoder = ConvEncoder(shape, channels, d_features, activation=activation, rngs=rngs)
        self.last = nnx.Linear(d_features, n_classes, rngs=rngs)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Array) -> tuple[Array, Array]:
        h = self.activation(self.encoder(x))
        return h, self.last(h)
