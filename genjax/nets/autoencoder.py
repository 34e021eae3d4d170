"""The networks of a VAE, by name: encoder and decoder."""

from functools import partial
from typing import Any

from genjax.nets.conv import ConvDecoder, ConvEncoder
from genjax.nets.functional import Net, functional
from genjax.nets.mlp import MLP
from genjax.protocol import DataSpec

Widths = tuple[tuple[int, ...], tuple[int, ...]]


def pair(
    spec: DataSpec,
    net: str,
    widths: Widths,
    d_z: int,
    n_outputs: int,
    activation: str,
    dtype: str,
) -> tuple[Net, Net]:
    """Encoder and decoder; `widths` are those of an MLP and of a convolutional net."""
    (hidden, channels), e = widths, spec.cond_size
    if net == "mlp":
        make = partial(MLP, activation=activation)
        encoder = partial(make, spec.size + e, hidden, 2 * d_z)
        decoder = partial(make, d_z + e, hidden[::-1], spec.size * n_outputs)
        return functional(encoder, dtype), functional(decoder, dtype)
    shape: Any = spec.shape
    down, up = ConvEncoder, ConvDecoder
    encoder = partial(down, shape, channels, 2 * d_z, cond_size=e, activation=activation)
    d_out = shape[-1] * n_outputs if shape else 1  # an image without axes is refused
    decoder = partial(up, d_z + e, shape, channels[::-1], d_out, activation=activation)
    return functional(encoder, dtype), functional(decoder, dtype)


def labels(
    place: str, net: str, widths: Widths, ours: tuple[bool, ...]
) -> tuple[tuple[str, str], ...]:
    """`Model.labels` of the last layers, of z's distribution and of x's; of a network of one's own
    there are none.

    Args:
        place: where "encoder" and "decoder" are.
        net, widths: as of `pair`.
        ours: whether the encoder and the decoder are those of `pair`.
    """
    hidden, channels = widths
    last = (f"layers/{len(hidden)}",) * 2
    if net == "conv":
        last = ("last", f"convs/{len(channels) - 1}")
    found = zip(("encoder", "decoder"), last, ours, strict=True)
    return tuple(
        (f"^{place}/{role}/{name}/kernel$", "matrix:readout") for role, name, own in found if own
    )
