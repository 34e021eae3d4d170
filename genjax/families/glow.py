"""Glow: a normalizing flow of images, in levels that halve them.

Kingma & Dhariwal 2018, on the multi-scale architecture of Dinh 2017.
"""

from functools import partial
from typing import Literal

from genjax import nets
from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.parts.bijections import (
    Bijection,
    actnorm,
    chain,
    coupling,
    flattened,
    linear,
    reversed_order,
    stacked,
)
from genjax.parts.dequantization import Dequantization
from genjax.parts.flow_density import flow_model, flow_of
from genjax.parts.image_bijections import split, squeezed
from genjax.parts.monotone import Bins, Monotone, TailBound, additive, affine, spline
from genjax.protocol import DataSpec, Model
from genjax.settings import Count, Depth, Dtype, builder

Shape = tuple[int, int, int]


def halvings(height: int, width: int) -> int:
    """How often both sides can be halved."""
    count = 0
    while height % 2 == 0 and width % 2 == 0:
        height, width, count = height // 2, width // 2, count + 1
    return count


def check_images(spec: DataSpec, n_levels: int) -> None:
    """Refuse what cannot be squeezed so often.

    Raises:
        ConfigError: for events that are no images (height, width, channels), or tokens, and for
            sides that are no multiples of 2^n_levels.
    """
    image = len(spec.shape) == 3 and spec.step is None and spec.kind != "tokens"
    if not image:
        raise ConfigError(
            "Glow models images of shape (height, width, channels); "
            f"{spec.name} is {spec.kind} of shape {spec.shape}. Use realnvp or nsf for vectors, "
            "and a sequence family for sequences."
        )
    height, width, _ = spec.shape
    possible = halvings(height, width)
    if n_levels <= possible:
        return
    remedy = f"Say n_levels={possible}" if possible else "Pad the images"
    raise ConfigError(
        f"{n_levels} levels halve both sides as many times, so they must be multiples of "
        f"{2**n_levels}; {spec.name} is {height} x {width}. {remedy}, or use realnvp or nsf."
    )


def monotone_of(transform: str, bins: int, bound: float) -> Monotone:
    """The map that coupling layers apply, by name."""
    if transform == "spline":
        return spline(bins, bound)
    return affine() if transform == "affine" else additive()


def conditioner(
    spec: DataSpec, d_in: int, d_out: int, n_params: int, channels: int, dtype: str
) -> Net:
    """(image [n, H, W, d_in], c) -> [n, H, W, d_out, n_params]."""
    sizes = (d_in, channels, d_out, n_params, spec.cond_size)
    return functional(partial(nets.conditioners.ConditionerConv, *sizes), dtype)


def step_of(spec: DataSpec, depth: int, monotone: Monotone, channels: int, dtype: str) -> Bijection:
    """One step of flow on images of that depth: actnorm, a 1x1 convolution, coupling."""
    kept = depth // 2
    net = conditioner(spec, kept, depth - kept, monotone.n_params, channels, dtype)
    return chain(
        norm=actnorm(depth),
        order=reversed_order(),
        product=linear(depth),
        move=coupling(net, monotone, depth),
    )


def level(
    spec: DataSpec,
    shape: Shape,
    n_levels: int,
    n_steps: int,
    monotone: Monotone,
    channels: int,
    dtype: str,
) -> Bijection:
    """Squeezing, `n_steps` steps, and of what comes out one half to the next level, [n, D]."""
    height, width, depth = shape[0] // 2, shape[1] // 2, 4 * shape[2]
    step = step_of(spec, depth, monotone, channels, dtype)
    steps = stacked(lambda number: step, n_steps)
    if n_levels == 1:
        return chain(squeeze=squeezed(), steps=steps, out=flattened((height, width, depth)))
    half = depth // 2
    rest = level(spec, (height, width, half), n_levels - 1, n_steps, monotone, channels, dtype)
    net = conditioner(spec, half, half, affine().n_params, channels, dtype)
    out = split(rest, net, affine(), (height, width, depth))
    return chain(squeeze=squeezed(), steps=steps, out=out)


@builder
def glow(
    spec: DataSpec,
    *,
    n_levels: Depth = 2,
    n_steps: Depth = 8,
    channels: Count = 64,
    transform: Literal["affine", "additive", "spline"] = "affine",
    bins: Bins = 8,
    tail_bound: TailBound = 4.0,
    dequantized: Dequantization = Dequantization(),
    dtype: Dtype = "float32",
) -> Model:
    """Glow: levels of steps of actnorm, a learned 1x1 convolution W = L U P, where P reverses the
    channels, and coupling by a convolutional net; each level halves the image, and leaves half of
    its channels behind. Conditional if the spec has a condition.

    The loss per example is -ln p(x) in nats. For continuous images `log_prob` is exact; for binary
    and discrete ones, to which noise is added, `bound` is at most ln P(x) in expectation. Actnorm
    is initialised by the first batch (`prepare`). `extras` is `flow_density.Invertible`. Shapes:
    x [B, H, W, C], z [B, H W C], of which the last level's comes first.

    Args:
        spec: images; binary, discrete or continuous.
        n_levels: how many times the image is halved; its sides must be multiples of 2^n_levels.
        n_steps: steps of flow a level.
        channels: of the hidden layers of the coupling networks.
        transform: of the half that moves: "affine", x e^s + t with s within ±3, "additive", x + t,
            or "spline", as in `nsf`.
        bins: for "spline": its pieces.
        tail_bound: for "spline": where it ends and straight lines go on.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, example_batch, glow
        >>> spec = DataSpec((8, 8, 1), "discrete", levels=17)
        >>> model = glow(spec, n_steps=2, channels=8, n_bound_samples=2)
        >>> params, state = model.init(jax.random.key(0))
        >>> batch = example_batch(spec, jax.random.key(1), 4)
        >>> model.bound(params, state, batch, jax.random.key(2)).shape
        (4,)
    """
    check_images(spec, n_levels)
    monotone = monotone_of(transform, bins, tail_bound)
    height, width, depth = spec.shape
    whole = level(spec, (height, width, depth), n_levels, n_steps, monotone, channels, dtype)
    return flow_model(spec, flow_of(whole), dequantized, dtype)
