"""What an event looks like to a person, decided in one place: text, an image, music ..."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from genjax.data.music import KEYS
from genjax.protocol import DataSpec

# text: lines of characters. image: (height, width, 1 to 4). rows: an image that comes row by row,
# (height, width). pixels: a square image of one channel that comes pixel by pixel. points: in the
# plane. vectors: of any other length. music: a piano roll of 88 keys. sequence: any other data with
# steps. nothing: none of these.
View = Literal[
    "text", "image", "rows", "pixels", "points", "vectors", "music", "sequence", "nothing"
]


def view_of(spec: DataSpec) -> View:
    """What events of such data look like.

    Example:
        >>> from genjax import DataSpec
        >>> view_of(DataSpec((8, 8, 1), "binary"))
        'image'
    """
    if spec.text:
        return "text"
    if len(spec.shape) == 3 and spec.shape[-1] <= 4 and spec.step is None:
        return "image"
    if spec.shape == (2,):
        return "points"
    if len(spec.shape) == 2 and spec.step == "row":
        return "rows"
    if len(spec.shape) == 1 and spec.step == "pixel" and math.isqrt(spec.size) ** 2 == spec.size:
        return "pixels"
    if len(spec.shape) == 2 and spec.kind == "binary" and spec.shape[1] == KEYS:
        return "music"
    if spec.step is not None:
        return "sequence"
    return "vectors" if len(spec.shape) == 1 else "nothing"


def no_picture(spec: DataSpec) -> str | None:
    """Why there is no picture of such data, in words; None where there is one."""
    if view_of(spec) != "nothing":
        return None
    return (
        f"no picture is drawn of {spec.name}: examples of shape {list(spec.shape)} are no images "
        "of 1 to 4 channels, no vectors and no sequences"
    )


def as_image(x: Any, spec: DataSpec) -> tuple[Any, DataSpec]:
    """What is an image in other clothes as an image of grey, colour or colour with transparency,
    and the spec of those; other data as they are.

    Rows of images [..., height, width] get a channel, and pixels [..., height width] rows, too; of
    two channels, the second stands to the right of the first.
    """
    if view_of(spec) == "pixels":
        side = math.isqrt(spec.size)
        x = x.reshape(*x.shape[:-1], side, side, 1)
        kind = "discrete" if spec.kind == "tokens" else spec.kind
        pixels = dataclasses.replace(spec, step=None, kind=kind, shift=None, scale=None)
        return x, _unscaled(pixels, (side, side, 1))
    if view_of(spec) == "rows":
        rows = dataclasses.replace(spec, step=None, shift=None, scale=None)
        return x[..., None], _unscaled(rows, (*spec.shape, 1))
    if view_of(spec) == "image" and spec.shape[-1] == 2:
        height, width, _ = spec.shape
        both = np.concatenate([x[..., 0], x[..., 1]], axis=-1)[..., None]
        return both, _unscaled(spec, (height, 2 * width, 1))
    return x, spec


def _unscaled(spec: DataSpec, shape: tuple[int, ...]) -> DataSpec:
    """The spec of what only is looked at."""
    return dataclasses.replace(spec, shape=shape, shift=None, scale=None)
