"""Masked autoencoders: what a value sees in any order, exactly; probabilities that sum to one;
samples that follow them.
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

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.made import made
from genjax.families.nade import nade
from genjax.nets.functional import functional
from genjax.nets.masked import MaskedMlp
from genjax.parts.likelihoods import Emission
from genjax.parts.orders import Ordered, draw, orders_of
from genjax.parts.pixels import pixel_emission
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(3)
BINARY = DataSpec((3, 3, 1), "binary", name="binary images")
CLASSES = DataSpec((3, 3, 1), "binary", n_classes=2, name="labelled images")
STATE = {"made": {}}
VARIANTS = {
    "raster": {"hidden": (12, 7)},
    "given": {"hidden": (7,), "order": (4, 2, 8, 0, 1, 7, 3, 5, 6)},
    "averaged": {"hidden": (12, 12), "order": "random", "n_orders": 3, "direct": False},
    "linear": {"hidden": (), "order": "random"},
}
variants = pytest.mark.parametrize(
    "variant",
    [v if v == "averaged" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS],
)


def analytic_loss(row):
    """With all parameters 0 every value is uniform."""
    nats = row.spec.size * math.log(row.spec.levels or 2)
    return zero(row.params), {"made": lambda batch: np.full(len(batch.x), nats)}


def grown(params, by=0.7):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + by * rng.normal(size=leaf.shape).astype(leaf.dtype), params
    )


@functools.cache
def built(variant, spec=BINARY, **options):
    model = made(spec, **{**VARIANTS[variant], **options})
    with jax.enable_x64(False):  # whoever asks first
        return model, grown(quick(model.init)(jax.random.key(0))[0])


# --- what a value sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(20,), (20, 9, 20), ()])
def test_in_every_order_a_value_sees_all_before_it_and_exactly_no_other(hidden, x64):
    """The jacobian, over several orders of one set of weights: what the masks let through."""
    size = 6
    options = {"direct": False, "activation": "tanh"}
    net = functional(lambda rngs: MaskedMlp(size, hidden, 2, **options, rngs=rngs))
    p = widen(grown(net.init(jax.random.key(0))[0]))
    y = jnp.asarray(np.random.default_rng(0).normal(size=(8, size)))

    @quick
    def jacobians(rank):
        def one(y):
            return net.apply(p, {}, y[None], rank)[0][0]

        return jax.vmap(jax.jacfwd(one))(y)

    for order in orders_of("random", 3, 0, size):
        rank = np.argsort(order).astype(np.int32)
        seen = np.abs(jacobians(jnp.asarray(rank))).max(axis=(0, 2)) != 0
        np.testing.assert_array_equal(seen, rank[None, :] < rank[:, None])


def test_orders_are_permutations_that_the_seed_chooses():
    orders = orders_of("random", 4, 1, 9)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(9), (4, 1)))
    assert len(np.unique(orders, axis=0)) == 4
    np.testing.assert_array_equal(orders, orders_of("random", 4, 1, 9))
    assert (orders != orders_of("random", 4, 2, 9)).any()


# --- probabilities --------------------------------------------------------------------------------


@pytest.mark.slow
@variants
def test_the_probabilities_of_all_images_sum_to_one_for_each_class(variant, x64):
    model, params = built(variant, CLASSES)
    x, score = widen(every(CLASSES)), quick(model.log_prob)
    found = []
    for label in (0, 1):
        batch = Batch(x, jnp.full(len(x), label, jnp.int32))
        found.append(np.exp(score(widen(params), STATE, batch, KEY)))
        np.testing.assert_allclose(found[-1].sum(), 1, rtol=1e-12)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["categorical", "logistics"])
@pytest.mark.parametrize("family", [made, nade])
def test_levels_and_channels_sum_to_one(family, likelihood, x64):
    spec = DataSpec((1, 2, 2), "discrete", levels=3, cond_dim=2)
    hidden = {made: (12, 7), nade: 7}[family]
    model = family(spec, hidden=hidden, likelihood=likelihood, n_components=2)
    with jax.enable_x64(False):
        params, state = quick(model.init)(jax.random.key(0))
    x = widen(every(spec))
    batch = Batch(x, jnp.ones((len(x), 2)))
    p = np.exp(quick(model.log_prob)(widen(grown(params)), state, batch, KEY))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-9)


@pytest.mark.slow
def test_several_orders_are_averaged_and_training_sees_one_of_them(x64):
    model, params = built("averaged")
    x, params = widen(every(BINARY)), widen(params)
    loss = quick(model.losses["made"])
    by_order = {}
    for seed in range(12):
        key = jax.random.key(seed)
        order = int(model.noise["made"](key, Batch(x)).order)
        by_order[order] = -np.asarray(loss(params, STATE, Batch(x), key, 0)[0])
    assert set(by_order) == {0, 1, 2}
    each = np.exp(np.stack([by_order[order] for order in range(3)]))
    np.testing.assert_allclose(each.sum(1), 1, rtol=1e-12)  # each order is a distribution
    assert np.abs(each[0] - each[1]).max() > 1e-3
    p = np.exp(quick(model.log_prob)(params, STATE, Batch(x), KEY))
    np.testing.assert_allclose(p, each.mean(0), rtol=1e-12)


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["raster", "averaged"])
def test_samples_follow_the_probabilities(variant):
    model, params = built(variant)
    x, n = every(BINARY), 4000
    p = np.exp(np.float64(quick(model.log_prob)(params, STATE, Batch(x), KEY)))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    drawn = np.asarray(quick(model.sample, static_argnums=3)(params, STATE, KEY, n))
    counts = (drawn[None] == np.asarray(x)[:, None]).reshape(len(x), n, -1).all(-1).sum(1)
    assert p_value(counts, n * p) > 1e-3
    assert p_value(counts, n * p[::-1]) < 1e-6  # it can tell


def pieces(variant, spec, hidden):
    """The model by hand, from the same settings."""
    order, n_orders = VARIANTS[variant].get("order", "raster"), VARIANTS[variant].get("n_orders", 1)
    values = DataSpec((spec.size,), spec.kind, levels=spec.levels, step="value")
    emit: Emission = pixel_emission(values, "bernoulli")
    direct = VARIANTS[variant].get("direct", True)
    net = functional(
        lambda rngs: MaskedMlp(
            spec.size, hidden, 1, cond_size=spec.cond_size, direct=direct, rngs=rngs
        )
    )
    return Ordered(spec, net, emit, orders_of(order, n_orders, 0, spec.size))


@pytest.mark.slow
@variants
def test_sampling_unit_by_unit_is_sampling_by_whole_passes(variant):
    """The same keys, and the whole network for every value, in each example's own order."""
    built_model, params = built(variant, CLASSES)
    n, cond = 6, jnp.asarray([0, 1] * 3)
    model = pieces(variant, CLASSES, VARIANTS[variant]["hidden"])
    p, c = params["made"], CLASSES.embed(cond)
    key_order, key_values = jax.random.split(KEY)
    chosen = np.asarray(jax.random.randint(key_order, (n,), 0, len(model.orders)))
    whole = quick(lambda y, rank: model.net.apply(p, {}, y, rank, c)[0])
    x, orders = np.zeros((n, 9), np.float32), model.orders[chosen]
    for t in range(9):
        y = jnp.asarray(2 * x - 1)
        each = np.stack([np.asarray(whole(y, rank)) for rank in model.ranks])
        outputs = each[chosen, np.arange(n), orders[:, t]]
        drawn = model.emit.sample(jax.random.fold_in(key_values, t), jnp.asarray(outputs))
        x[np.arange(n), orders[:, t]] = drawn
    found = quick(built_model.sample, static_argnums=3)(params, STATE, KEY, n, cond)
    np.testing.assert_array_equal(np.asarray(found).reshape(n, 9), x)
    assert draw(model, KEY, None).order.dtype == jnp.int32


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (DataSpec((4,), "continuous"), {}, "take vae, flow_matching or diffusion"),
        (DataSpec((8,), "tokens", levels=3, step="symbol"), {}, "take rnn or transformer"),
        (BINARY, {"order": (0, 1, 2)}, "permutation, each of 0 to 8 once; got 3 numbers"),
        (BINARY, {"order": (0,) * 9}, "permutation"),
        (BINARY, {"n_orders": 2}, 'order="random"'),
        (BINARY, {"likelihood": "categorical"}, "take bernoulli"),
        (BINARY, {"order": "spiral"}, "raster"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(spec, options, said):
    with pytest.raises(ConfigError, match=said):
        made(spec, **options)


def test_an_order_may_be_an_array_or_a_range():
    spec = DataSpec((3,), "discrete", levels=5)
    rng = np.random.default_rng(0)
    for order in (rng.permutation(3), jnp.asarray([2, 0, 1]), range(3)):
        model = made(spec, hidden=(4,), order=order)
        wanted = made(spec, hidden=(4,), order=tuple(int(i) for i in order))
        params, state = model.init(jax.random.key(0))
        batch = example_batch(spec, jax.random.key(1), 4)
        np.testing.assert_array_equal(
            model.log_prob(params, state, batch, jax.random.key(2)),
            wanted.log_prob(params, state, batch, jax.random.key(2)),
        )
    for order, text in (
        (range(4), "permutation"),
        ((0.0, 1, 2), r"order\[0\] must be a whole number"),
        (np.eye(3), "no order called"),
    ):
        with pytest.raises(ConfigError, match=text):
            made(spec, hidden=(4,), order=order)
