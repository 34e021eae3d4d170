"""What depends on the hardware that a network is traced for, and on there being several devices."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from genjax.protocol import Array

_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """What is traced now is for this: "cpu", "gpu" or "tpu". That of `traced_for`, of
    `jax.default_device` or, where neither says so, of jax's default backend.
    """
    asked = _asked.get()
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if asked is not None:
        return asked
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Trace for a platform that is not here, to compile for it. A function that was traced before
    with `jax.jit` is not traced anew.
    """
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def has_cudnn_attention() -> bool:
    """Whether what is traced now is for a card here that cuDNN's flash attention runs on: NVIDIA's
    since Ampere. Not within `traced_for`: what is compiled or exported for elsewhere has no card to
    ask, and such a kernel cannot be exported.
    """
    if _asked.get() is not None or platform() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "")
    major, _, minor = str(capability).partition(".")
    return major.isdecimal() and minor.isdecimal() and int(major) >= 8


def at_each(f: Callable[..., Any], *args: Any) -> Any:
    """What f makes of rows [n, ...], each by itself, at every entry of a leading axis of steps or
    samples: args [T, B, ...] -> [T, B, ...], trees of arrays.

    On a CPU all of them are rows of one call. Elsewhere B stays an axis: of rows T B, a mesh that
    divides the B examples could divide none, and each of its devices would compute all of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from genjax.nets.platforms import at_each
        >>> at_each(lambda x: x @ jnp.ones((4, 5)), jnp.ones((2, 3, 4))).shape
        (2, 3, 5)
    """
    if platform() != "cpu":
        return jax.vmap(f)(*args)
    lead = jax.tree.leaves(args)[0].shape[:2]
    rows = jax.tree.map(lambda leaf: leaf.reshape(lead[0] * lead[1], *leaf.shape[2:]), args)
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), f(*rows))


def beside(noise: Array, x: Array) -> Array:
    """noise [n, ...] itself, as something that lies where the examples x [n, ...] lie.

    A mesh divides what meets the examples of a batch. What is drawn and never meets them, such as a
    generator's latents, each of its devices would draw whole, and compute all that follows: 0.52 of
    a GAN's step on each of four. A choice that depends on x, and is always the same, is a meeting
    that no compiler sees through: a number may be NaN, which is not itself. On a CPU nothing is
    done; there it took 1.03 of a GAN's step.
    """
    if platform() == "cpu":
        return noise
    number = x.reshape(x.shape[0], -1)[:, :1].astype(noise.dtype)
    number = number.reshape(-1, *[1] * (noise.ndim - 1))
    return jnp.where(number == number, noise, jnp.zeros((), noise.dtype))


def once(x: Array) -> Array:
    """x itself, as something that XLA computes once.

    On a CPU, XLA computes what looks cheap to it again in each loop that reads it. Nine windows of
    an image are nine such loops, forth and back, and a normal draw looks cheap: a step of
    `edm-mnist` held 21 copies of it, and takes 0.93 of the time without. Loops of two passes are
    not merged with anything, and barriers of `jax.lax` are gone before that happens. Elsewhere
    nothing is done.
    """

    def looped(x: Array) -> Array:
        return jax.lax.fori_loop(0, 2, lambda i, y: jnp.where(i < 2, y, 0), x)

    return jax.lax.platform_dependent(x, cpu=looped, default=lambda x: x)
