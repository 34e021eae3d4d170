"""Convolutional models of images, a pixel at a time: p(x) = Π_t p(x_t | x_<t) over the pixels in
raster order, and over the channels of a pixel.

van den Oord 2016a (PixelCNN), van den Oord 2016b (the gated one, without a blind spot), Salimans
2017 (PixelCNN++: a mixture of discretised logistics, channels linear in each other). The networks
are in `nets/pixelcnn.py`, the distributions in `parts/pixels.py`, and what makes a model of them in
`parts/autoregressive.py`.
"""

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal

import jax.numpy as jnp

from genjax import nets
from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.parts.autoregressive import SequenceNet, autoregressive, recomputed
from genjax.parts.decoding import check_position, in_room
from genjax.parts.pixels import check_pixels, likelihood_of, pixel_emission
from genjax.protocol import Array, DataSpec, Key, Model, PyTree
from genjax.settings import (
    CondDropout,
    Count,
    Depth,
    Dtype,
    Rate,
    Within,
    builder,
    guided_by,
    used,
)

Columns = Annotated[int, Within(1, 1023)]  # of a window, whose mask is made as it stands
Scales = Annotated[int, Within(0, 8)]


def pixels_of(spec: DataSpec) -> DataSpec:
    """Images [H, W, C] as sequences of pixels [H W, C], in raster order."""
    height, width, channels = spec.shape
    return dataclasses.replace(spec, shape=(height * width, channels), step="pixel")


def outputs(
    spec: DataSpec,
    net: Net,
    dropout: Any,
    p: Any,
    x: Array,
    c: Array | None,
    dropped: Array | None,
    key: Key | None,
) -> Array:
    """The parameters of p(x_t | x_<t, c), [B, H W, n_outputs], of pixels x [B, H W, C]."""
    y = spec.normalize(x).reshape(-1, *spec.shape)
    found = net.apply(p, {}, y, c, dropped, key, dropout)[0]
    return found.reshape(*x.shape[:2], -1)


# --- one pixel at a time, with caches of rows -----------------------------------------------------


def begin(net: Net, p: Any, n: int, c: Array | None, dropped: Array | None) -> tuple[Array, PyTree]:
    """Outputs for the first pixel, and the caches after it."""
    position = jnp.zeros((), jnp.int32)
    rows = net.apply(p, {}, n, method="empty")[0]
    found, rows = net.apply(p, {}, rows, position, c, dropped, method="look")[0]
    return found, {"rows": rows, "position": position}


def advance(
    spec: DataSpec,
    net: Net,
    p: Any,
    carry: PyTree,
    x: Array,
    c: Array | None,
    dropped: Array | None,
) -> tuple[Array, PyTree]:
    """Outputs for the pixel after x [n, C], and the caches after it. What a layer makes of a pixel
    is computed once, and of the rows above only what a window reaches is kept.
    """
    at, context = carry["position"], spec.shape[0] * spec.shape[1]
    check_position(at + 1, context)
    rows = net.apply(p, {}, carry["rows"], spec.normalize(x), at, method="seen")[0]
    found, rows = net.apply(p, {}, rows, at + 1, c, dropped, method="look")[0]
    return in_room(found, at + 1, context), {"rows": rows, "position": at + 1}


# --- assembly -------------------------------------------------------------------------------------


def check_image(spec: DataSpec, size: int) -> None:
    """Refuse what is no image, and windows without a middle.

    Raises:
        ConfigError: see the text.
    """
    check_pixels(spec, "A PixelCNN")
    if len(spec.shape) != 3:
        raise ConfigError(
            f"A PixelCNN needs images of shape (height, width, channels); {spec.name} has events "
            f"of shape {spec.shape}: take made, which models values of any shape."
        )
    if size < 3 or size % 2 == 0:
        raise ConfigError(f"kernel_size must be odd, and at least 3; got {size}.")


def check_scales(spec: DataSpec, scales: int, gated: bool) -> None:
    """Refuse images that do not halve so often, and networks that do not halve them.

    Raises:
        ConfigError: with what to do.
    """
    if scales and not gated:
        raise ConfigError(
            f"scales={scales} is for gated networks: leave it at 0, or take gated=True."
        )
    height, width, _ = spec.shape
    if height % 2**scales or width % 2**scales:
        fit = max(s for s in range(scales) if height % 2**s == 0 and width % 2**s == 0)
        most = f"{fit} or less" if fit else "0"
        raise ConfigError(
            f"scales={scales} halves images {scales} times, and {spec.name} has {height} x {width} "
            f"pixels, which halve {fit} times: take scales={most}."
        )


def check_guided(likelihood: str, cond_dropout: Any) -> None:
    """Refuse guidance where outputs are no logits.

    Raises:
        ConfigError: with what to do.
    """
    if likelihood == "logistics" and used(cond_dropout):
        raise ConfigError(
            "cond_dropout is for guidance, which mixes logits, and a mixture of logistics has "
            'none: leave cond_dropout at 0, or take likelihood="categorical".'
        )


def labels(spec: DataSpec, gated: bool) -> tuple[tuple[str, str], ...]:
    """What the parameters are, as `Model.labels` has it: the halves of gated layers, and four
    pixels of a larger image, are several matrices; of a condition by class a step sees some rows.
    """
    found = [("/positions$", "embedding")]
    if spec.n_classes:
        found.append((r"/condition/\d+/kernel$", "embedding"))
    if gated:
        found.append((r"/(vertical|horizontal|across)/\d+/kernel$", "matrix:1,1"))
        found.append((r"/(up_v|up_h|condition)/\d+/kernel$", "matrix:1,1,1,1"))
    return tuple(found)


def module_of(gated: bool, scales: int) -> Any:
    """What builds the network."""
    if gated:
        return partial(nets.pixelcnn.GatedPixelCNN, scales=scales)
    return nets.pixelcnn.PixelCNN


@builder
def pixelcnn(
    spec: DataSpec,
    *,
    gated: bool = True,
    likelihood: Literal["auto", "bernoulli", "categorical", "logistics"] = "auto",
    n_components: Count = 10,
    channels: Count = 64,
    n_layers: Depth = 5,
    kernel_size: Columns = 5,
    scales: Scales = 0,
    dropout: Rate = 0.0,
    cached: bool = True,
    cond_dropout: CondDropout = 0.0,
    dtype: Dtype = "float32",
) -> Model:
    """A PixelCNN of images; conditional if the spec has a condition.

    p(x | c) = Π_t Π_e p(x_te | x_<t, x_t,<e, c) over pixels t in raster order and their channels e.
    The network sees the pixels before t, and what it says of a channel is linear in the channels
    before it. The loss per example is -ln p(x | c) in nats, in training mode; `log_prob` is the
    same, negated, without dropout, and exact. Shapes: x [B, H, W, C]. `autoregressive` takes
    pixels as steps, [B, H W, C]: a prompt is the beginning of an image.

    With `likelihood="logistics"` it is what PixelCNN++ says of a pixel, for any number of levels;
    `scales` is its down- and upsampling.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, pixelcnn
        >>> model = pixelcnn(DataSpec((4, 4, 1), "discrete", levels=5), channels=4, n_layers=2)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 4, 4, 1)

    Args:
        spec: binary or discrete images.
        gated: two stacks of gated layers that see every earlier pixel within reach; without, one
            stack with a blind spot above and to the right.
        likelihood: of a value: "bernoulli" for binary data, and for discrete data "categorical", a
            logit for each level, or "logistics", a mixture of discretised logistics. "auto" is
            "categorical" up to 32 levels.
        n_components: of that mixture.
        channels: the width d of the layers.
        n_layers: how many, after the first.
        kernel_size: columns of a window, an odd number; it has (kernel_size + 1) / 2 rows, of which
            the last is the pixel's own. A pixel sees (n_layers + 1) (kernel_size - 1) / 2 columns
            to each side, and more with `scales`.
        scales: how often the image is halved on the way, and doubled again; with it there are
            `n_layers` at each size before and after the smaller one. For gated networks.
        dropout: rate, of what a layer adds.
        cached: sample with caches of rows; without, the whole network is computed for every pixel,
            with the same result.
        cond_dropout: how often training leaves out the condition, which guidance needs (Ho &
            Salimans 2022).
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for data that are no binary or discrete images, and for settings that do not
            fit them or each other.
    """
    check_image(spec, kernel_size)
    check_scales(spec, scales, gated)
    kind, steps = likelihood_of(spec, likelihood), pixels_of(spec)
    check_guided(kind, cond_dropout)
    emit = pixel_emission(steps, kind, n_components)
    module = module_of(gated, scales)
    guided = guided_by(spec, cond_dropout)
    sizes = (channels, n_layers, kernel_size, emit.n_outputs, spec.cond_size, guided)
    net = functional(partial(module, spec.shape, *sizes), dtype)
    of_all = partial(outputs, spec, net, dropout)
    stepwise = (partial(begin, net), partial(advance, spec, net))
    sequence = SequenceNet(
        lambda key: net.init(key)[0],
        of_all,
        *(stepwise if cached else recomputed(steps, of_all)),
        context=steps.shape[0],
        labels=labels(spec, gated),
    )
    return autoregressive(
        spec, emit, sequence, player="pixelcnn", cond_dropout=cond_dropout, steps=steps
    )
