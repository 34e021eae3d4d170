"""Which hardware a network is traced for, where its fastest form depends on it."""

import contextlib
import contextvars
from collections.abc import Iterator

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
