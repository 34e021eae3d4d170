"""What is a model of the values of an event, one after the other in an order σ, once there is a
network: p(x) = Π_t p(x_σ(t) | x_σ(<t)).

Uria 2014: one network for several orders, whose densities are averaged. A family gives the network
(`Ordered.net`); all else is the same for every one.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import checked
from genjax.errors import ConfigError
from genjax.nets.functional import Net
from genjax.parts.distributions import log_mean_exp
from genjax.parts.likelihoods import Emission
from genjax.parts.pixels import check_pixels, likelihood_of, pixel_emission
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Model, Params, State, dtype_of
from genjax.settings import Count, Depth, Settings, Whole


class Ordered(NamedTuple):
    """The pieces of such a model. The functions below take it, and `p`, the network's parameters.

    Attributes:
        spec: the data, events of D values.
        net: (y [n, D], rank [D], c) -> the parameters of each value's distribution [n, D, V], by
            the values of lower rank; and one value at a time the methods `empty`, `at` and `after`
            of `nets.masked.MaskedMlp`.
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


@dataclasses.dataclass(frozen=True)
class Ordering(Settings):
    """In which orders values come, and what the distribution of one is.

    Attributes:
        order: of the values: "raster", as they are stored; "random"; or a permutation of 0 to
            D - 1.
        n_orders: K, random orders.
        order_seed: of the random orders.
        likelihood: of a value: "bernoulli" for binary data, and for discrete data "categorical", a
            logit for each level, or "logistics", a mixture of discretised logistics. "auto" is
            "categorical" up to 32 levels.
        n_components: of that mixture.
    """

    order: Literal["raster", "random"] | tuple[Whole, ...] = "raster"
    n_orders: Depth = 1
    order_seed: Whole = 0
    likelihood: Literal["auto", "bernoulli", "categorical", "logistics"] = "auto"
    n_components: Count = 10

    def of(self, spec: DataSpec, who: str) -> tuple[np.ndarray, Emission]:
        """The orders [K, D], and the distribution of a value, for data of this spec.

        Raises:
            ConfigError: for data that are not binary or discrete, an order that is no permutation,
                and settings that do not fit the data or each other.
        """
        check_pixels(spec, who)
        orders = orders_of(self.order, self.n_orders, self.order_seed, spec.size)
        values = DataSpec((spec.size,), spec.kind, levels=spec.levels, step="value")
        likelihood = likelihood_of(spec, self.likelihood)
        return orders, pixel_emission(values, likelihood, self.n_components)


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


def values_of(model: Ordered, x: Array) -> Array:
    """Events as normalised vectors, [B, D]."""
    return model.spec.normalize(x).reshape(x.shape[0], model.spec.size)


def log_density(model: Ordered, p: Any, batch: Batch, rank: Array) -> Array:
    """ln p(x | c) in one order, [B] in nats."""
    c = model.spec.embed(batch.cond, p)
    found = model.net.apply(p, {}, values_of(model, batch.x), rank, c)[0]
    return model.emit.log_prob(batch.x.reshape(found.shape[:2]), found).sum(1)


def averaged(model: Ordered, p: Any, batch: Batch) -> Array:
    """ln 1/K Σ_k p_k(x | c) over the orders, [B] in nats."""
    one = partial(log_density, model, p, batch)
    if len(model.orders) == 1:
        return one(model.ranks[0])
    return log_mean_exp(jax.lax.map(one, model.ranks))


def draw(model: Ordered, key: Key, batch: Batch) -> Noise:
    """Which order a batch is seen in."""
    return Noise(jax.random.randint(key, (), 0, len(model.orders), jnp.int32))


# --- one value at a time --------------------------------------------------------------------------


def generate(model: Ordered, p: Any, key: Key, n: int, cond: Any = None) -> Array:
    """x ~ p(x | c), [n, *shape]: each example in an order of its own, one value after the other."""
    spec, c = model.spec, model.spec.embed(cond, p)
    key_order, key_values = jax.random.split(key)
    chosen = jax.random.randint(key_order, (n,), 0, len(model.orders), jnp.int32)
    orders, rows = jnp.asarray(model.orders)[chosen], jnp.arange(n)
    # Normalised values, and what is drawn, in the dtype of the parameters.
    dtype = dtype_of(p)

    def step(loop: Any, t: Array) -> tuple[Any, Array]:
        y, units = loop
        place = orders[:, t]
        found = model.net.apply(p, {}, y, units, place, c, method="at")[0]
        x = model.emit.sample(jax.random.fold_in(key_values, t), found)
        y = y.at[rows, place].set(spec.normalize(x).astype(dtype))
        units = model.net.apply(p, {}, y, units, t, place, c, method="after")[0]
        return (y, units), x

    first = model.net.apply(p, {}, n, dtype, method="empty")[0]
    first = jax.tree.map(lambda leaf: leaf.astype(dtype), first)
    drawn = jax.lax.scan(step, first, jnp.arange(spec.size, dtype=jnp.int32))[1]
    x = jnp.zeros((n, spec.size), spec.dtype).at[rows[:, None], orders].set(drawn.T)
    return x.reshape(n, *spec.shape)


# --- assembly -------------------------------------------------------------------------------------

# Biases of every value's distribution are no matrix, though they have two axes. What gives those
# distributions is left to Adam, as readouts are, and so is a table of conditions; both decay.
LABELS = (
    ("/(bias|output_bias)$", "vector"),
    ("/(last|direct|readout|condition/kernel)$", "embedding"),
)


def ordered(model: Ordered, player: str) -> Model:
    """The model; its loss sees one order, which is drawn for each batch, and `log_prob` all."""

    def init(key: Key) -> tuple[Params, State]:
        return {player: model.net.init(key)[0]}, {player: {}}

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        rank = model.ranks[draw(model, key, batch).order]
        nats = log_density(model, params[player], batch, rank)
        return -nats, Aux(state, {"nats_per_value": -nats / model.spec.size})

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return averaged(model, params[player], batch)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(model, params[player], key, n, cond)

    return checked(
        Model(
            spec=model.spec,
            init=init,
            losses={player: loss},
            sample=sample,
            log_prob=log_prob,
            estimator="exact",
            labels=LABELS,
            noise={player: partial(draw, model)},
        )
    )
