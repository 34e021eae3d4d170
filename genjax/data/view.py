"""What an event looks like to a person, decided in one place: text, an image, music ..."""

import dataclasses
from typing import Any, Literal

from genjax.data.music import KEYS
from genjax.protocol import DataSpec

# text: lines of characters. image: (height, width, 1 or 3). rows: an image that comes row by row,
# (height, width). points: in the plane. music: a piano roll of 88 keys. sequence: any other data
# with steps. nothing: none of these.
View = Literal["text", "image", "rows", "points", "music", "sequence", "nothing"]


def view_of(spec: DataSpec) -> View:
    """What events of such data look like.

    Example:
        >>> from genjax import DataSpec
        >>> view_of(DataSpec((8, 8, 1), "binary"))
        'image'
    """
    if spec.text:
        return "text"
    if len(spec.shape) == 3 and spec.shape[-1] in (1, 3):
        return "image"
    if spec.shape == (2,):
        return "points"
    if len(spec.shape) == 2 and spec.step == "row":
        return "rows"
    if len(spec.shape) == 2 and spec.kind == "binary" and spec.shape[1] == KEYS:
        return "music"
    return "nothing" if spec.step is None else "sequence"


def as_image(x: Any, spec: DataSpec) -> tuple[Any, DataSpec]:
    """Rows of images [..., height, width] as images [..., height, width, 1], and the spec of those;
    other data as they are.
    """
    if view_of(spec) != "rows":
        return x, spec
    return x[..., None], dataclasses.replace(spec, shape=(*spec.shape, 1), step=None)
