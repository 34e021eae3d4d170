"""The table of denoising networks, by name: the one place where the settings of diffusion and flow
matching become a net.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from genjax import nets
from genjax.nets.functional import Net, functional
from genjax.nets.own import Call, Network, check_net, own_net, trimmed
from genjax.nets.remat import rematerialised
from genjax.protocol import DataSpec
from genjax.settings import Count, Depth, Remat, Settings, Whole


@dataclasses.dataclass(frozen=True)
class DenoiserNet(Settings):
    """The network that goes from noisy events to what is predicted of them.

    Attributes:
        net: "mlp", "unet" or "dit" (both for images), or in Python a Flax module of one's own (x_t
            as the family scales it [n, *event], noise level [n], cond [n, cond_size] where there is
            one, dropped [n] where cond_dropout is above 0) -> y [n, *event], see `nets.own`; or any
            `Net`, which gets all four, None for what there is not. With dtype="bfloat16" a module
            of `nnx` gets the noise level in it, too, in steps of 0.004 near 1; in float32 with the
            `Net` that `functional(build, "bfloat16", wide=("noise_level",))` of
            `genjax.nets.functional` makes.
        hidden: for "mlp": widths of the layers.
        channels: for "unet": channels at each resolution, each half of the one before.
        n_blocks: for "unet": residual blocks at each resolution.
        patch: the side of a patch, which "unet" and "dit" see as one pixel with more channels; 1
            and 2 unless given.
        d_model: for "dit": the width.
        n_layers: for "dit": how many blocks.
        n_heads: of attention, for "unet" (0 for none) and "dit".
        scan_layers: for "dit": loop over the blocks instead of unrolling them. It compiles faster
            for many, with the same values.
        remat: of the blocks of "unet" and "dit", or of the whole net where it has none: what the
            way back computes again instead of keeping it, for less memory: nothing, all, or all but
            the results of matrix products (of those without a batch dimension).
    """

    net: Literal["mlp", "unet", "dit"] | Net | Network = "mlp"
    hidden: tuple[Count, ...] = (256, 256, 256)
    channels: tuple[Count, ...] = (32, 64)
    n_blocks: Depth = 1
    patch: Count | None = None
    d_model: Count = 128
    n_layers: Depth = 4
    n_heads: Whole = 4
    scan_layers: bool = False
    remat: Remat = "none"


def _mlp(spec: DataSpec, network: DenoiserNet, guided: bool) -> Callable[..., Any]:
    net = nets.conditioned.DenoiserMlp
    return partial(net, spec.shape, tuple(network.hidden), spec.cond_size, guided)


def _unet(spec: DataSpec, network: DenoiserNet, guided: bool) -> Callable[..., Any]:
    return partial(
        nets.unet.UNet,
        spec.shape,
        tuple(network.channels),
        spec.cond_size,
        guided,
        patch=network.patch or 1,
        n_blocks=network.n_blocks,
        n_heads=network.n_heads,
        remat=network.remat,
    )


def _dit(spec: DataSpec, network: DenoiserNet, guided: bool) -> Callable[..., Any]:
    sizes = (network.patch or 2, network.d_model, network.n_layers, network.n_heads)
    build = partial(nets.dit.DiT, spec.shape, *sizes, spec.cond_size, guided)
    return partial(build, scanned=network.scan_layers, remat=network.remat)


# (the data, the settings, guided) -> a builder of the module.
BUILDS: dict[str, Callable[[DataSpec, DenoiserNet, bool], Callable[..., Any]]] = {
    "mlp": _mlp,
    "unet": _unet,
    "dit": _dit,
}


def labels(spec: DataSpec, network: DenoiserNet, place: str) -> tuple[tuple[str, str], ...]:
    """`Model.labels` of these nets, whose parameters are at `place`: what is several matrices side
    by side, such as a scale and a shift, and the last layer. None of a network of one's own.
    """
    if not isinstance(network.net, str):
        return ()
    return (
        *nets.sequence.embedding_labels(spec),
        ("/qkv/kernel$", "matrix:1,1,1"),
        ("/blocks/[^/]+/parameters/kernel$", "matrix:1,1,1,1,1,1"),
        ("/(parameters|modulations/[^/]+)/kernel$", "matrix:1,1"),
        (f"^{place}/last/kernel$", "matrix:readout"),
    )


def denoiser(spec: DataSpec, network: DenoiserNet, guided: bool, dtype: str) -> Net:
    """(params, {}, x [n, *event], noise level [n], cond, dropped) -> y [n, *event]: the net that
    the settings name, or the one given there.

    Args:
        spec: the data.
        network: the settings.
        guided: whether a vector is learned that stands for a dropped condition.
        dtype: of the arithmetic.

    Raises:
        ConfigError: for settings that do not fit the data.
    """
    if not isinstance(network.net, str):
        inputs: list[tuple[str, tuple[int, ...]]] = [("x", spec.shape), ("noise_level", ())]
        inputs += [("cond", (spec.cond_size,))] if spec.conditional else []
        inputs += [("dropped", ())] if guided else []
        call = Call("the net of a denoiser", inputs, spec.shape)
        if isinstance(network.net, Net):
            check_net(network.net, call, ("x", "noise_level", "cond", "dropped"))
            return again(network.net, network.remat)
        return again(trimmed(own_net(network.net, call, dtype), guided), network.remat)
    build = BUILDS[network.net](spec, network, guided)
    net = functional(build, dtype, wide=("noise_level",))
    return again(net, network.remat) if network.net == "mlp" else net


def again(net: Net, remat: str) -> Net:
    """A net of which all is one block to compute again."""
    if remat == "none":
        return net
    return net._replace(apply=rematerialised(net.apply, remat))
