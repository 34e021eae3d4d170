"""What is a model once there is a map from data to noise: loss, density or bound, samples.

A family gives the map (`Flow`); all else is the same for every normalizing flow.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import check_cond, checked
from genjax.parts.bijections import Bijection
from genjax.parts.dequantization import Dequantization, Dequantizer, dequantizer_of
from genjax.parts.distributions import normal_log_prob, sum_event
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Model, Params, State, dtype_of

PLAYER = "flow"
# Stacked layers have one more axis than what they stack.
LABELS = (
    (r"/(bias|shift|log_scale|log_diagonal)$", "vector"),
    (r"/(layers|steps)/(move|mix|product)/", "matrix:each"),
    (r"/dequantizer/move/", "matrix:each"),
    # Of a network that gives the velocity of all: a scale and a shift, and the last layer.
    (r"/map/modulations/[^/]+/kernel$", "matrix:1,1"),
    (r"/map/last/kernel$", "matrix:readout"),
)


class Flow(NamedTuple):
    """A map from normalised events y [n, *shape] to noise z [n, D], given conditions c [n, E].

    Attributes:
        init: (key) -> params.
        forward: (params, y, c, key | None) -> z, and ln |det dz/dy| [n]. A key is for a determinant
            that is estimated; without one it is exact.
        inverse: (params, z, c) -> y, and ln |det dy/dz|, exact.
        generate: (params, z, c) -> y alone.
        prepare: (params, y, c, weight) -> params; None where nothing is initialised from data.
        random: whether `forward` uses its key.
    """

    init: Callable[[Key], Params]
    forward: Callable[[Params, Array, Array | None, Key | None], tuple[Array, Array]]
    inverse: Callable[[Params, Array, Array | None], tuple[Array, Array]]
    generate: Callable[[Params, Array, Array | None], Array]
    prepare: Callable[[Params, Array, Array | None, Array], Params] | None = None
    random: bool = False


def flow_of(bijection: Bijection) -> Flow:
    """A bijection from events to vectors as a `Flow`."""

    def forward(params: Params, y: Array, c: Array | None, key: Key | None) -> tuple[Array, Array]:
        return bijection.forward(params, y, c)

    def generate(params: Params, z: Array, c: Array | None) -> Array:
        return bijection.inverse(params, z, c)[0]

    prepare = bijection.prepare

    def prepared(params: Params, y: Array, c: Array | None, weight: Array) -> Params:
        assert prepare is not None
        return prepare(params, y, c, weight)[0]

    nothing = prepare is None
    return Flow(bijection.init, forward, bijection.inverse, generate, None if nothing else prepared)


class Invertible(NamedTuple):
    """The `extras` of a normalizing flow: the map itself, in the units of the data.

    Binary and discrete values are taken as the real numbers that they are, without noise.

    Attributes:
        forward: (params, state, x, cond=None) -> z [n, D], and ln |det dz/dx| [n], exact; so that
            ln p(x) = ln N(z; 0, I) + ln |det dz/dx|.
        inverse: (params, state, z, cond=None) -> x [n, *shape], not rounded, and ln |det dx/dz|.
        covers: so many standard deviations from its mean a number of the data may be before the
            first layer's splines end; None where no layer begins with such splines.
    """

    forward: Callable[..., tuple[Array, Array]]
    inverse: Callable[..., tuple[Array, Array]]
    covers: float | None = None


class FlowNoise(NamedTuple):
    """What the loss draws for a batch.

    Attributes:
        dequantization: of the noise that is added to x, [B, *shape] (`Dequantizer.draw`); None for
            continuous data.
        map: for a determinant that is estimated; None for one that is exact.
    """

    dequantization: Array | None
    map: Key | None


class FlowModel(NamedTuple):
    """What a flow consists of; its parameters p are {"map": ..., "dequantizer": ...}."""

    spec: DataSpec
    flow: Flow
    dequantizer: Dequantizer


def draw(model: FlowModel, key: Key, batch: Batch) -> FlowNoise:
    """The randomness of the loss: the only place that splits its key."""
    key_data, key_map = jax.random.split(key)
    own = key_map if model.flow.random else None
    return FlowNoise(model.dequantizer.draw(key_data, batch.x), own)


def log_likelihood(model: FlowModel, p: Any, batch: Batch, noise: FlowNoise) -> Array:
    """ln p(x | c) in nats, [B]; of binary and discrete data ln p(x + u) - ln q(u | x), per level,
    which is at most ln P(x) in expectation.
    """
    c = model.spec.embed(batch.cond, p)
    added = noise.dequantization
    y, log_q = model.dequantizer.apply(p["dequantizer"], batch.x, c, added)
    z, log_det = model.flow.forward(p["map"], y, c, noise.map)
    nats = sum_event(normal_log_prob(z, 0.0, 0.0)) + log_det
    return nats - log_q + model.spec.log_volume


def log_mean(model: FlowModel, p: Any, batch: Batch, key: Key, k: int) -> Array:
    """ln 1/K Σ_k p(x + u_k) / q(u_k | x), [B] nats, one draw at a time."""

    def add(total: Array, key: Key) -> tuple[Array, None]:
        nats = log_likelihood(model, p, batch, draw(model, key, batch))
        return jnp.logaddexp(total, nats), None

    start = jnp.full(batch.x.shape[:1], -jnp.inf, batch.x.dtype)
    total, _ = jax.lax.scan(add, start, jax.random.split(key, k))
    return total - jnp.log(jnp.asarray(k, total.dtype))


def rounded(spec: DataSpec, x: Array) -> Array:
    """x as data are: the nearest value that there is, of binary and discrete data."""
    return x if spec.top is None else jnp.clip(jnp.round(x), 0, spec.top)


def invertible(model: FlowModel, covers: float | None = None) -> Invertible:
    """The map with its arguments checked, in the units of the data."""
    spec, flow = model.spec, model.flow

    def forward(params: Params, state: State, x: Array, cond: Any = None) -> tuple[Array, Array]:
        check_cond(spec, cond, x.shape[0])
        p = params[PLAYER]["map"]
        z, log_det = flow.forward(p, spec.normalize(x), spec.embed(cond, p), None)
        return z, log_det + spec.log_volume

    def inverse(params: Params, state: State, z: Array, cond: Any = None) -> tuple[Array, Array]:
        check_cond(spec, cond, z.shape[0])
        y, log_det = flow.inverse(params[PLAYER]["map"], z, spec.embed(cond, params))
        return spec.denormalize(y), log_det - spec.log_volume

    return Invertible(forward, inverse, covers)


def flow_model(
    spec: DataSpec,
    flow: Flow,
    how: Dequantization,
    dtype: str = "float32",
    words: str = "",
    covers: float | None = None,
    probed: bool = False,
) -> Model:
    """The model of such a map, with `log_prob` for continuous data and `bound` for other.

    Args:
        spec: the data.
        flow: the map.
        how: binary and discrete data become continuous.
        dtype: of the arithmetic of the network that dequantises.
        words: how the determinant is computed, for reports; nothing where it is exact.
        covers: see `Invertible`.
        probed: see `Model`.

    Raises:
        ConfigError: for dequantisation that does not fit the data.
    """
    model = FlowModel(spec, flow, dequantizer_of(spec, how, dtype))
    noise_of = partial(draw, model)

    def init(key: Key) -> tuple[Params, State]:
        key_map, key_data = jax.random.split(key)
        p = {"map": flow.init(key_map), "dequantizer": model.dequantizer.init(key_data)}
        return {PLAYER: p}, {PLAYER: {}}

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        nats = log_likelihood(model, params[PLAYER], batch, noise_of(key, batch))
        return -nats, Aux(state, {})

    def log_prob(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return log_likelihood(model, params[PLAYER], batch, noise_of(key, batch))

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        return log_mean(model, params[PLAYER], batch, key, how.n_bound_samples)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        z = jax.random.normal(key, (n, spec.size), dtype_of(params))
        y = flow.generate(params[PLAYER]["map"], z, spec.embed(cond, params))
        return rounded(spec, spec.denormalize(y))

    def prepare(params: Params, state: State, batch: Batch, key: Key) -> tuple[Params, State]:
        p, c = params[PLAYER], spec.embed(batch.cond, params)
        added = model.dequantizer.draw(key, batch.x)
        y, _ = model.dequantizer.apply(p["dequantizer"], batch.x, c, added)
        weight = jnp.ones(y.shape[0], y.dtype) if batch.weight is None else batch.weight
        assert flow.prepare is not None
        return {PLAYER: {**p, "map": flow.prepare(p["map"], y, c, weight)}}, state

    exact = spec.kind == "continuous"
    estimator = [words] if exact else [how.in_words, words]
    return checked(
        Model(
            spec=spec,
            init=init,
            losses={PLAYER: loss},
            sample=sample,
            log_prob=log_prob if exact else None,
            bound=None if exact else bound,
            probed=probed,
            estimator=", ".join(filter(None, estimator)) or "exact",
            prepare=None if flow.prepare is None else prepare,
            labels=LABELS,
            noise={PLAYER: noise_of},
            extras=invertible(model, covers),
        )
    )
