"""NADE: what a value sees in any order; probabilities that sum to one, and are the product of their
conditionals; samples that follow them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import quick
from known_losses import zero
from rows import widen
from test_autoregressive import every, p_value

from genjax.errors import ConfigError
from genjax.families.nade import nade
from genjax.nets.functional import functional
from genjax.nets.nade import Nade
from genjax.parts.orders import orders_of
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(3)
BINARY = DataSpec((3, 3, 1), "binary", name="binary images")
CLASSES = DataSpec((3, 3, 1), "binary", n_classes=2, name="labelled images")
STATE = {"nade": {}}
GIVEN = (4, 2, 8, 0, 1, 7, 3, 5, 6)
VARIANTS = {"raster": {}, "given": {"order": GIVEN}, "averaged": {"order": "random", "n_orders": 3}}


def analytic_loss(row):
    """With all parameters 0 every value is uniform."""
    nats = row.spec.size * math.log(row.spec.levels or 2)
    return zero(row.params), {"nade": lambda batch: np.full(len(batch.x), nats)}


@functools.cache
def built(variant, spec=BINARY, **options):
    model = nade(spec, hidden=7, **{**VARIANTS[variant], **options})
    with jax.enable_x64(False):  # whoever asks first
        params = quick(model.init)(jax.random.key(0))[0]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda leaf: leaf + 0.7 * rng.normal(size=leaf.shape).astype(leaf.dtype), params
    )


def by_hand(p, x, order, c=None):
    """ln p of one event of 0 and 1 as Larochelle & Murray write it, value by value in numpy."""
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    width = own["bias"].shape[0]
    added = np.zeros(width + len(x)) if c is None else c @ own["condition"]["kernel"]
    a, nats = own["bias"] + added[:width], 0.0
    for i in order:
        h = 1 / (1 + np.exp(-a))
        logit = own["output_bias"][i, 0] + added[width + i] + own["readout"][i, :, 0] @ h
        nats += -np.logaddexp(0, -logit if x[i] else logit)
        a = a + own["weight"][i] * (2 * x[i] - 1)
    return nats


# --- what a value sees ----------------------------------------------------------------------------


def test_in_every_order_a_value_sees_all_before_it_and_exactly_no_other(x64):
    size = 6
    net = functional(lambda rngs: Nade(size, 5, 2, rngs=rngs))
    p = widen(net.init(jax.random.key(0))[0])
    y = jnp.asarray(np.random.default_rng(0).normal(size=size))
    jacobian = quick(jax.jacfwd(lambda y, rank: net.apply(p, {}, y[None], rank)[0][0]))
    for order in orders_of("random", 3, 0, size):
        rank = np.argsort(order).astype(np.int32)
        seen = np.abs(jacobian(y, jnp.asarray(rank))).max(axis=1) != 0
        np.testing.assert_array_equal(seen, rank[None, :] < rank[:, None])


# --- probabilities --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["raster", "given"])
def test_every_probability_is_the_product_of_its_conditionals_and_they_sum_to_one(variant, x64):
    model, params = built(variant, CLASSES)
    x, params = widen(every(CLASSES)), widen(params)
    order = VARIANTS[variant].get("order", range(9))
    for label in (0, 1):
        batch = Batch(x, jnp.full(len(x), label, jnp.int32))
        found = np.asarray(quick(model.log_prob)(params, STATE, batch, KEY))
        c = np.asarray(CLASSES.embed(jnp.asarray([label])))[0]
        flat = np.asarray(x).reshape(len(x), 9)
        wanted = [by_hand(params["nade"], one, order, c) for one in flat]
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-12)


@pytest.mark.slow
def test_several_orders_are_averaged_and_training_sees_one_of_them(x64):
    model, params = built("averaged")
    x, params = widen(every(BINARY)), widen(params)
    flat = np.asarray(x).reshape(len(x), 9)
    orders = orders_of("random", 3, 0, 9)
    each = np.exp([[by_hand(params["nade"], one, order) for one in flat] for order in orders])
    p = np.exp(quick(model.log_prob)(params, STATE, Batch(x), KEY))
    np.testing.assert_allclose(p, each.mean(0), rtol=1e-12)
    number = int(model.noise["nade"](KEY, Batch(x)).order)
    loss = quick(model.losses["nade"])(params, STATE, Batch(x), KEY, 0)[0]
    np.testing.assert_allclose(np.exp(-np.asarray(loss)), each[number], rtol=1e-12)


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["raster", "averaged"])
def test_samples_follow_the_probabilities_of_their_class(variant):
    model, params = built(variant, CLASSES)
    x, n = every(CLASSES), 4000
    cond = jnp.ones(n, jnp.int32)
    score, sample = quick(model.log_prob), quick(model.sample, static_argnums=3)
    batch = Batch(x, jnp.ones(len(x), jnp.int32))
    p = np.exp(np.float64(score(params, STATE, batch, KEY)))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    drawn = np.asarray(sample(params, STATE, KEY, n, cond))
    counts = (drawn[None] == np.asarray(x)[:, None]).reshape(len(x), n, -1).all(-1).sum(1)
    assert p_value(counts, n * p) > 1e-3
    assert p_value(counts, n * p[::-1]) < 1e-6  # it can tell


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (DataSpec((4,), "continuous"), {}, "take vae, flow_matching or diffusion"),
        (DataSpec((8,), "tokens", levels=3, step="symbol"), {}, "take rnn or transformer"),
        (BINARY, {"order": (0, 1, 2)}, "permutation, each of 0 to 8 once; got 3 numbers"),
        (BINARY, {"n_orders": 2}, 'order="random"'),
        (BINARY, {"likelihood": "categorical"}, "take bernoulli"),
        (BINARY, {"hidden": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(spec, options, said):
    with pytest.raises(ConfigError, match=said):
        nade(spec, **options)
