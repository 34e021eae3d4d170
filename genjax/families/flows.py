"""Normalizing flows: an invertible map from data to noise whose Jacobian has a cheap determinant.

    ln p(x) = ln N(z; 0, I) + ln |det dz/dx|,  z = f(x)

Dinh 2015 (NICE) and 2017 (RealNVP), Kingma 2016 (inverse autoregressive), Papamakarios 2017 (masked
autoregressive), Durkan 2019 (neural spline flows). Events are vectors here, whatever their shape;
`glow` knows of images, and `cnf` is a flow in continuous time. The maps are in
`parts/bijections.py`, and what makes a model of one in `parts/flow_density.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np

from genjax import nets
from genjax.errors import ConfigError
from genjax.nets.functional import functional
from genjax.parts.bijections import (
    Bijection,
    actnorm,
    autoregressive,
    chain,
    coupling,
    flattened,
    inverted,
    linear,
    reordered,
    reversed_order,
    stacked,
)
from genjax.parts.dequantization import Dequantization
from genjax.parts.flow_density import flow_model, flow_of
from genjax.parts.monotone import Bins, Monotone, TailBound, additive, affine, spline
from genjax.parts.noise_to_data import check_events
from genjax.protocol import Array, DataSpec, Model
from genjax.settings import Depth, Dtype, Help, Width, builder

Activation = Annotated[
    Literal["gelu", "relu", "silu", "softplus", "tanh"], Help("between the layers of the networks.")
]
Mix = Annotated[
    Literal["reverse", "random", "linear"],
    Help(
        'the order of the numbers before each layer: "reverse" turns it round, "random" is a '
        'permutation that stays the same, "linear" is "reverse" and then a learned product L U.'
    ),
]

MONOTONE: dict[str, Callable[[], Monotone]] = {"affine": affine, "additive": additive}


# --- the maps -------------------------------------------------------------------------------------


def mixing(mix: str, d: int, n_layers: int) -> Callable[[Array], Bijection]:
    """(number of the layer) -> what `Mix` says, of vectors [n, d]."""
    if mix == "reverse":
        return lambda number: reversed_order()
    if mix == "linear":
        both = chain(order=reversed_order(), product=linear(d))
        return lambda number: both
    rng = np.random.default_rng(0)  # the same in every model of that size
    orders = jnp.asarray(np.stack([rng.permutation(d) for _ in range(n_layers)]), jnp.int32)
    return lambda number: reordered(orders[number])


def layered(spec: DataSpec, move: Bijection, n_layers: int, mix: str) -> Bijection:
    """Events to vectors, and then so many times: actnorm, another order, `move`."""
    norm, order = actnorm(spec.size), mixing(mix, spec.size, n_layers)

    def layer(number: Array) -> Bijection:
        return chain(norm=norm, mix=order(number), move=move)

    return chain(vector=flattened(spec.shape), layers=stacked(layer, n_layers))


def coupling_of(
    spec: DataSpec, monotone: Monotone, hidden: tuple[int, ...], activation: str, dtype: str
) -> Bijection:
    """A coupling layer of vectors; where their number is odd, the half that moves is the larger.

    Raises:
        ConfigError: for events of one number, of which no part can be kept.
    """
    if spec.size < 2:
        raise ConfigError(
            "A coupling layer keeps a part of an event and moves the rest, for which it needs two "
            f"numbers or more; {spec.name} has {spec.size}. Use maf, or nsf with "
            "structure='autoregressive'."
        )
    kept = spec.size // 2
    sizes = (kept, hidden, spec.size - kept, monotone.n_params, spec.cond_size)
    build = partial(nets.conditioners.ConditionerMLP, *sizes, activation=activation)
    return coupling(functional(build, dtype), monotone, spec.size)


def autoregressive_of(
    spec: DataSpec, monotone: Monotone, hidden: tuple[int, ...], activation: str, dtype: str
) -> Bijection:
    """An autoregressive layer of vectors."""
    sizes = (spec.size, hidden, monotone.n_params, spec.cond_size)
    build = partial(nets.conditioners.ConditionerMasked, *sizes, activation=activation)
    return autoregressive(functional(build, dtype), monotone, spec.size)


STRUCTURES: dict[str, Callable[..., Bijection]] = {
    "coupling": coupling_of,
    "autoregressive": autoregressive_of,
}


# --- the models -----------------------------------------------------------------------------------


@builder
def realnvp(
    spec: DataSpec,
    *,
    n_layers: Depth = 8,
    hidden: tuple[Width, ...] = (128, 128),
    activation: Activation = "gelu",
    transform: Literal["affine", "additive"] = "affine",
    mix: Mix = "reverse",
    dequantized: Dequantization = Dequantization(),
    dtype: Dtype = "float32",
) -> Model:
    """RealNVP, coupling layers that scale and shift one half of an event by functions of the other;
    with transform="additive" NICE. Conditional if the spec has a condition.

    The loss per example is -ln p(x) in nats. For continuous data `log_prob` is exact; for binary
    and discrete data, to which noise is added, `bound` is at most ln P(x) in expectation. Sampling
    is as fast as the density. Each layer begins with actnorm, which the first batch initialises
    (`prepare`). Events are flattened; with an odd number of dimensions the half that moves is the
    larger. `extras` is `flow_density.Invertible`. Shapes: x [B, *shape], z [B, D].

    Args:
        spec: the data; binary, discrete or continuous, of two dimensions or more, no sequences.
        n_layers: coupling layers.
        hidden: widths of the hidden layers of each one's network.
        transform: of the half that moves: "affine", x e^s + t with s within ±3, or "additive",
            x + t, which keeps volumes.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, example_batch, realnvp
        >>> spec = DataSpec((2,), "continuous")
        >>> model = realnvp(spec, n_layers=2, hidden=(8,))
        >>> params, state = model.init(jax.random.key(0))
        >>> batch = example_batch(spec, jax.random.key(1), 4)
        >>> z, log_det = model.extras.forward(params, state, batch.x)
        >>> z.shape, log_det.shape
        ((4, 2), (4,))
    """
    check_events(spec, "RealNVP")
    move = coupling_of(spec, MONOTONE[transform](), tuple(hidden), activation, dtype)
    flow = flow_of(layered(spec, move, n_layers, mix))
    return flow_model(spec, flow, dequantized, dtype)


@builder
def maf(
    spec: DataSpec,
    *,
    n_layers: Depth = 5,
    hidden: tuple[Width, ...] = (128, 128),
    activation: Activation = "gelu",
    inverse: bool = False,
    mix: Mix = "reverse",
    dequantized: Dequantization = Dequantization(),
    dtype: Dtype = "float32",
) -> Model:
    """A masked autoregressive flow: each number is scaled and shifted by functions of those before
    it; with inverse=True an inverse autoregressive flow. Conditional if the spec has a condition.

    The density takes one pass through each layer's network, and a sample D passes, one for each
    dimension; an inverse flow has it the other way round, so that it trains slowly and samples
    fast, by the same networks. The loss, `log_prob`, `bound`, `prepare` and `extras` are as
    `realnvp` has them. Shapes: x [B, *shape], z [B, D].

    Args:
        spec: the data; binary, discrete or continuous, no sequences.
        n_layers: autoregressive layers.
        hidden: widths of the hidden layers of each one's masked network (MADE).
        inverse: whether x is scaled and shifted by functions of the noise before it.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, maf
        >>> model = maf(DataSpec((3,), "continuous", cond_dim=2), n_layers=2, hidden=(8,))
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 4, jax.numpy.zeros((4, 2))).shape
        (4, 3)
    """
    check_events(spec, "A masked autoregressive flow")
    move = autoregressive_of(spec, affine(), tuple(hidden), activation, dtype)
    if inverse:
        move = inverted(move)
    flow = flow_of(layered(spec, move, n_layers, mix))
    return flow_model(spec, flow, dequantized, dtype)


@builder
def nsf(
    spec: DataSpec,
    *,
    structure: Literal["coupling", "autoregressive"] = "coupling",
    n_layers: Depth = 4,
    hidden: tuple[Width, ...] = (128, 128),
    activation: Activation = "gelu",
    bins: Bins = 8,
    tail_bound: TailBound = 4.0,
    mix: Mix = "linear",
    dequantized: Dequantization = Dequantization(),
    dtype: Dtype = "float32",
) -> Model:
    """A neural spline flow: numbers are moved by monotone rational-quadratic splines whose knots
    are functions of other numbers. Conditional if the spec has a condition.

    A spline covers [-tail_bound, tail_bound] of what actnorm has made of the data; numbers outside
    stay where they are, so that all data have a density. The loss, `log_prob`, `bound`, `prepare`
    and `extras` are as `realnvp` has them. In float32 the inverse of sharp splines is inexact: see
    benchmarks/NOTES.md for how much. Shapes: x [B, *shape], z [B, D].

    Args:
        spec: the data; binary, discrete or continuous, no sequences; for "coupling" of two
            dimensions or more.
        structure: "coupling", as in `realnvp`, or "autoregressive", as in `maf`.
        n_layers: layers of splines.
        hidden: widths of the hidden layers of each one's network.
        bins: pieces of a spline.
        tail_bound: where the splines end and straight lines go on.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, example_batch, nsf
        >>> spec = DataSpec((2,), "continuous")
        >>> model = nsf(spec, n_layers=2, hidden=(8,), bins=4)
        >>> params, state = model.init(jax.random.key(0))
        >>> batch = example_batch(spec, jax.random.key(1), 4)
        >>> model.log_prob(params, state, batch, jax.random.key(2)).shape
        (4,)
    """
    check_events(spec, "A neural spline flow")
    monotone = spline(bins, tail_bound)
    move = STRUCTURES[structure](spec, monotone, tuple(hidden), activation, dtype)
    flow = flow_of(layered(spec, move, n_layers, mix))
    return flow_model(spec, flow, dequantized, dtype, covers=tail_bound)
