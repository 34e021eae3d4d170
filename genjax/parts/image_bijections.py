"""Bijections of images, NHWC: squeezing, and levels that leave half of the channels behind.

Dinh 2017, section 3.6 (squeezing, multi-scale), Kingma & Dhariwal 2018.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from genjax.nets.functional import Net
from genjax.nets.patches import from_patches, to_patches
from genjax.parts.bijections import Bijection, Moved, prepared, rearranged
from genjax.parts.distributions import sum_event
from genjax.parts.monotone import Monotone
from genjax.protocol import Array, Key, Params


def squeezed() -> Bijection:
    """Blocks of 2x2 pixels as pixels with four times the channels."""
    return rearranged(partial(to_patches, size=2), partial(from_patches, size=2))


def split(rest: Bijection, net: Net, monotone: Monotone, shape: tuple[int, int, int]) -> Bijection:
    """An image (a, b), half of its channels each, as the vector of `rest`(a) and f(b; net(a, c)).

    What is left behind, b, is finished by a map whose parameters are a function of a: Kingma &
    Dhariwal's learned prior of it, and as a bijection the same density.

    Args:
        rest: of images with half of the channels, to vectors.
        net: (a, c) -> the parameters of the map of each entry of b.
        monotone: that map.
        shape: of the image, with an even number of channels.
    """
    height, width, depth = shape
    kept = depth // 2
    size = height * width * kept  # of a, and of b

    def init(key: Key) -> Params:
        return {"rest": rest.init(key), "left": net.init(key)[0]}

    def moved(
        move: Callable[[Array, Array], Moved], params: Params, a: Array, b: Array, c: Array | None
    ) -> Moved:
        value, each = move(b, net.apply(params["left"], {}, a, c)[0])
        return value, sum_event(each, 3)

    def forward(params: Params, x: Array, c: Array | None) -> Moved:
        a, b = x[..., :kept], x[..., kept:]
        left, log_det = moved(monotone.forward, params, a, b, c)
        z, log_det_rest = rest.forward(params["rest"], a, c)
        return _joined(z, left), log_det + log_det_rest

    def inverse(params: Params, z: Array, c: Array | None) -> Moved:
        a, log_det_rest = rest.inverse(params["rest"], z[:, :size], c)
        left = z[:, size:].reshape(-1, height, width, kept)
        b, log_det = moved(monotone.inverse, params, a, left, c)
        return jnp.concatenate([a, b], axis=-1), log_det + log_det_rest

    def prepare(params: Params, x: Array, c: Array | None, weight: Array) -> tuple[Params, Array]:
        a, b = x[..., :kept], x[..., kept:]
        left, _ = moved(monotone.forward, params, a, b, c)
        own, z = prepared(rest, params["rest"], a, c, weight)
        return {**params, "rest": own}, _joined(z, left)

    return Bijection(init, forward, inverse, None if rest.prepare is None else prepare)


def _joined(z: Array, left: Array) -> Array:
    return jnp.concatenate([z, left.reshape(left.shape[0], -1)], axis=-1)
