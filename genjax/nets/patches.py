"""Blocks of pixels as the channels of one pixel, and back."""

from genjax.protocol import Array


def to_patches(x: Array, size: int) -> Array:
    """Images [n, H, W, C] -> [n, H / size, W / size, size² C]: the pixels of a patch, row by row,
    as channels.
    """
    n, height, width, d = x.shape
    x = x.reshape(n, height // size, size, width // size, size, d).swapaxes(2, 3)
    return x.reshape(n, height // size, width // size, size * size * d)


def from_patches(x: Array, size: int) -> Array:
    """The inverse of `to_patches`."""
    n, rows, columns, _ = x.shape
    x = x.reshape(n, rows, columns, size, size, -1).swapaxes(2, 3)
    return x.reshape(n, rows * size, columns * size, -1)
