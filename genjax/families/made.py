"""Masked autoencoders: p(x) = Π_t p(x_σ(t) | x_σ(<t)) for the values of an event in an order σ, by
one dense network whose masks keep it so.

Germain 2015 (MADE), Uria 2014 (one network for several orders, whose densities are averaged; NADE
for one value after the other, as sampling does it here). The network is `nets/masked.py`'s
`MaskedMlp`.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax import nets
from genjax.checks import checked
from genjax.errors import ConfigError
from genjax.nets.functional import Net, functional
from genjax.parts.distributions import log_mean_exp
from genjax.parts.likelihoods import Emission
from genjax.parts.pixels import check_pixels, likelihood_of, pixel_emission
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Model, Params, State
from genjax.settings import Count, Depth, Dtype, Whole, Width, builder

PLAYER = "made"


class Masked(NamedTuple):
    """The pieces of a MADE. The functions below take it, and `p`, which is `params["made"]`.

    Attributes:
        spec: the data, events of D values.
        net: the network.
        emit: the distribution of one value.
        orders: σ, int32 [K, D]: which value comes at each step.
    """

    spec: DataSpec
    net: Net
    emit: Emission
    orders: np.ndarray

    @property
    def ranks(self) -> Array:
        """At which step each value comes, int32 [K, D]."""
        return jnp.asarray(np.argsort(self.orders, axis=1), jnp.int32)


class Noise(NamedTuple):
    """What the loss draws: the order that a batch is seen in, an int32 scalar."""

    order: Array


# --- orders ---------------------------------------------------------------------------------------


def orders_of(order: Any, n_orders: int, seed: int, size: int) -> np.ndarray:
    """K orders of D values, int32 [K, D].

    Raises:
        ConfigError: for an order that is no permutation, and for several raster orders.
    """
    if isinstance(order, str) and order == "random":
        rng = np.random.default_rng(seed)
        return np.stack([rng.permutation(size) for _ in range(n_orders)]).astype(np.int32)
    if n_orders > 1:
        raise ConfigError(
            f'n_orders={n_orders} is for order="random": there is one raster order, and an '
            "order of your own is one."
        )
    if isinstance(order, str):
        return np.arange(size, dtype=np.int32)[None]
    given = np.asarray(order)
    if given.shape != (size,) or not np.array_equal(np.sort(given), np.arange(size)):
        raise ConfigError(
            f"order must be a permutation, each of 0 to {size - 1} once; got {_shown(order)}."
        )
    return given.astype(np.int32)[None]


def _shown(order: Any) -> str:
    text = ", ".join(map(str, tuple(order)[:8]))
    return f"{len(order)} numbers, {text}{' ...' if len(order) > 8 else ''}"


# --- the density ----------------------------------------------------------------------------------


def values_of(model: Masked, x: Array) -> Array:
    """Events as normalised vectors, [B, D]."""
    return model.spec.normalize(x).reshape(x.shape[0], model.spec.size)


def log_density(model: Masked, p: Any, batch: Batch, rank: Array) -> Array:
    """ln p(x | c) in one order, [B] in nats."""
    c = model.spec.embed(batch.cond)
    found = model.net.apply(p, {}, values_of(model, batch.x), rank, c)[0]
    return model.emit.log_prob(batch.x.reshape(found.shape[:2]), found).sum(1)


def averaged(model: Masked, p: Any, batch: Batch) -> Array:
    """ln 1/K Σ_k p_k(x | c) over the orders, [B] in nats."""
    one = partial(log_density, model, p, batch)
    if len(model.orders) == 1:
        return one(model.ranks[0])
    return log_mean_exp(jax.lax.map(one, model.ranks))


def draw(model: Masked, key: Key, batch: Batch) -> Noise:
    """Which order a batch is seen in."""
    return Noise(jax.random.randint(key, (), 0, len(model.orders), jnp.int32))


# --- one value at a time --------------------------------------------------------------------------


def generate(model: Masked, p: Any, key: Key, n: int, cond: Any = None) -> Array:
    """x ~ p(x | c), [n, *shape]: each example in an order of its own, one value after the other.

    Every unit of the network is computed once, when the last value that it may see is known.
    """
    spec, c = model.spec, model.spec.embed(cond)
    key_order, key_values = jax.random.split(key)
    chosen = jax.random.randint(key_order, (n,), 0, len(model.orders), jnp.int32)
    orders, rows = jnp.asarray(model.orders)[chosen], jnp.arange(n)
    # Normalised values, and what is drawn, in the dtype of the parameters.
    dtype = jax.tree.leaves(p)[0].dtype

    def step(loop: Any, t: Array) -> tuple[Any, Array]:
        y, units = loop
        place = orders[:, t]
        found = model.net.apply(p, {}, y, units, place, c, method="at")[0]
        x = model.emit.sample(jax.random.fold_in(key_values, t), found)
        y = y.at[rows, place].set(spec.normalize(x).astype(dtype))
        return (y, model.net.apply(p, {}, y, units, t, c, method="after")[0]), x

    first = model.net.apply(p, {}, n, dtype, method="empty")[0]
    first = jax.tree.map(lambda leaf: leaf.astype(dtype), first)
    drawn = jax.lax.scan(step, first, jnp.arange(spec.size, dtype=jnp.int32))[1]
    x = jnp.zeros((n, spec.size), spec.dtype).at[rows[:, None], orders].set(drawn.T)
    return x.reshape(n, *spec.shape)


# --- assembly -------------------------------------------------------------------------------------


@builder
def made(
    spec: DataSpec,
    *,
    hidden: tuple[Width, ...] = (500, 500),
    order: Literal["raster", "random"] | tuple[Whole, ...] = "raster",
    n_orders: Depth = 1,
    order_seed: Whole = 0,
    direct: bool = True,
    activation: Literal["gelu", "relu", "silu", "softplus", "tanh"] = "relu",
    likelihood: Literal["auto", "bernoulli", "categorical", "logistics"] = "auto",
    n_components: Count = 10,
    dtype: Dtype = "float32",
) -> Model:
    """A masked autoencoder (MADE) of events of any shape; conditional if the spec has a condition.

    In an order σ, p_σ(x | c) = Π_t p(x_σ(t) | x_σ(<t), c), and with K = `n_orders` of them
    p(x | c) = 1/K Σ_k p_k(x | c), all by the same weights. The loss per example is -ln p_k(x | c)
    in nats, for one order that is drawn for each batch; for K = 1 that is -ln p(x | c), and else
    at least that, in expectation. `log_prob` averages over all orders, and is exact. Shapes: x [B,
    *shape], D values an event.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, made
        >>> model = made(DataSpec((3, 3, 1), "binary"), hidden=(8,), order="random", n_orders=2)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 3, 3, 1)

    Args:
        spec: binary or discrete data.
        hidden: widths of the hidden layers; empty means that each value is judged by a linear
            function of those before it.
        order: of the values: "raster", as they are stored; "random"; or a permutation of
            0 to D - 1.
        n_orders: K, random orders.
        order_seed: of the random orders.
        direct: whether a value also sees those before it directly, past the hidden layers.
        activation: between layers.
        likelihood: of a value: "bernoulli" for binary data, and for discrete data "categorical", a
            logit for each level, or "logistics", a mixture of discretised logistics. "auto" is
            "categorical" up to 32 levels.
        n_components: of that mixture.
        dtype: of the network's arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for data that are not binary or discrete, an order that is no permutation, and
            settings that do not fit the data or each other.
    """
    check_pixels(spec, "A masked autoencoder")
    orders = orders_of(order, n_orders, order_seed, spec.size)
    values = DataSpec((spec.size,), spec.kind, levels=spec.levels, step="value")
    emit = pixel_emission(values, likelihood_of(spec, likelihood), n_components)
    module = partial(
        nets.masked.MaskedMlp,
        spec.size,
        tuple(hidden),
        emit.n_outputs,
        cond_size=spec.cond_size,
        direct=direct,
        activation=activation,
    )
    model = Masked(spec, functional(module, dtype), emit, orders)

    def init(key: Key) -> tuple[Params, State]:
        return {PLAYER: model.net.init(key)[0]}, {PLAYER: {}}

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        rank = model.ranks[draw(model, key, batch).order]
        nats = log_density(model, params[PLAYER], batch, rank)
        return -nats, Aux(state, {"nats_per_value": -nats / spec.size})

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return averaged(model, params[PLAYER], batch)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(model, params[PLAYER], key, n, cond)

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={PLAYER: loss},
            sample=sample,
            log_prob=log_prob,
            estimator="exact",
            noise={PLAYER: partial(draw, model)},
        )
    )
