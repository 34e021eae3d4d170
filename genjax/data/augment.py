"""Images changed at random as they are trained on: flips and shifts, drawn on the device with the
key of each step.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genjax.data.view import view_of
from genjax.errors import ConfigError
from genjax.protocol import Array, DataSpec, Key

_FORMS = (
    "flip (left and right, every second image), vflip (top and bottom), cropN (shifted by up to N "
    "pixels, the edge repeated) or padN (the same with zeros at the edge)"
)


class Change(NamedTuple):
    """One change: what it is called, and by how many pixels it shifts."""

    name: str
    pixels: int = 0


def changes_in(text: str, spec: DataSpec) -> tuple[Change, ...]:
    """The changes that a text such as "flip,crop4" names, in their order.

    Raises:
        ConfigError: for what is none, a shift as large as the image, and data that are no images.

    Example:
        >>> changes_in("flip,crop2", DataSpec((8, 8, 1), "binary"))
        (Change(name='flip', pixels=0), Change(name='crop', pixels=2))
    """
    found = []
    for one in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(flip|vflip)|(crop|pad)([0-9]{1,6})", one)
        if match is None:
            raise ConfigError(
                f"augment={text!r}: {one!r} is no change of images. Expected, with commas between: "
                f"{_FORMS}."
            )
        found.append(Change(match[1] or match[2], int(match[3] or 0)))
    if found and view_of(spec) != "image":
        raise ConfigError(
            f"augment={text!r} is for images [height, width, channels]; {spec.name} has examples "
            f"of shape {list(spec.shape)}. Leave --augment out."
        )
    for name, pixels in found:
        if name in ("crop", "pad") and not 1 <= pixels < min(spec.shape[:2]):
            raise ConfigError(
                f"augment={text!r}: {name}{pixels} must shift by 1 to {min(spec.shape[:2]) - 1} "
                f"pixels of images of {spec.shape[0]} x {spec.shape[1]}."
            )
    return tuple(found)


def augmentation(text: str, spec: DataSpec) -> Callable[[Key, Array], Array] | None:
    """(key, x [B, height, width, channels]) -> x with every image changed by a draw of its own, a
    pure function; None for no changes.

    Args:
        text: names of changes with commas between: "flip", "vflip", "cropN", "padN".

    Raises:
        ConfigError: see `changes_in`.

    Example:
        >>> change = augmentation("flip,crop1", DataSpec((8, 8, 1), "binary"))
        >>> change(jax.random.key(0), jnp.zeros((2, 8, 8, 1))).shape
        (2, 8, 8, 1)
    """
    changes = changes_in(text, spec)
    if not changes:
        return None

    def augment(key: Key, x: Array) -> Array:
        for index, change in enumerate(changes):
            drawn = jax.random.fold_in(key, index)
            x = _shifted(drawn, x, change) if change.pixels else _flipped(drawn, x, change.name)
        return x

    return augment


def _flipped(key: Key, x: Array, name: str) -> Array:
    """Every second image mirrored."""
    turned = jax.random.bernoulli(key, shape=(len(x), 1, 1, 1))
    return jnp.where(turned, jnp.flip(x, axis=2 if name == "flip" else 1), x)


def _shifted(key: Key, x: Array, change: Change) -> Array:
    """Each image shifted by -n .. n pixels along both axes, all shifts equally likely."""
    n, (_, height, width, channels) = change.pixels, x.shape
    around = ((0, 0), (n, n), (n, n), (0, 0))
    wide = jnp.pad(x, around, mode="edge" if change.name == "crop" else "constant")
    corners = jax.random.randint(key, (len(x), 2), 0, 2 * n + 1)

    def cut(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(cut)(wide, corners)
