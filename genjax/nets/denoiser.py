"""The table of denoising networks, by name: the one place where the settings of diffusion and flow
matching become a net.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from genjax.nets.conditioned import DenoiserMlp
from genjax.nets.dit import DiT
from genjax.nets.functional import Net, functional
from genjax.nets.unet import UNet
from genjax.protocol import DataSpec

# (shape, cond_size, guided, settings) -> a builder of the module. A patch is a pixel for a U-Net
# unless one is given.
BUILDS: dict[str, Callable[[tuple[int, ...], int, bool, dict[str, Any]], Callable[..., Any]]] = {
    "mlp": lambda shape, size, guided, s: partial(
        DenoiserMlp, shape, tuple(s["hidden"]), size, guided
    ),
    "unet": lambda shape, size, guided, s: partial(
        UNet,
        shape,
        tuple(s["channels"]),
        size,
        guided,
        patch=s["patch"] or 1,
        n_blocks=s["n_blocks"],
        n_heads=s["n_heads"],
    ),
    "dit": lambda shape, size, guided, s: partial(
        DiT, shape, s["patch"] or 2, s["d_model"], s["n_layers"], s["n_heads"], size, guided
    ),
}


def denoiser(spec: DataSpec, net: str | Net, guided: bool, dtype: str, **settings: Any) -> Net:
    """(params, {}, x [n, *event], noise level [n], cond, dropped) -> y [n, *event]: the net of that
    name, or the one given.

    Args:
        spec: the data.
        net: a name in BUILDS, or a net.
        guided: whether a vector is learned that stands for a dropped condition.
        dtype: of the arithmetic.
        **settings: hidden, channels, n_blocks, patch, d_model, n_layers, n_heads: as the families
            describe them.

    Raises:
        ConfigError: for settings that do not fit the data.
    """
    return (
        net
        if isinstance(net, Net)
        else functional(BUILDS[net](spec.shape, spec.cond_size, guided, settings), dtype)
    )
