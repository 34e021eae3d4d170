"""PixelCNN: what a pixel sees, exactly; probabilities that sum to one; samples that follow them,
with caches of rows and without.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from gates import quick
from known_losses import zero
from rows import widen
from test_autoregressive import every, p_value

from genjax.errors import ConfigError
from genjax.families.pixelcnn import pixelcnn
from genjax.nets.masked import MaskedConv, window
from genjax.parts.pixels import channel_logits
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(3)
BINARY = DataSpec((3, 3, 1), "binary", name="binary images")
CLASSES = DataSpec((3, 3, 1), "binary", n_classes=2, name="labelled images")
COLOURS = DataSpec((3, 5, 2), "discrete", levels=3, name="images of two channels")
TINY = {"channels": 4, "n_layers": 3, "kernel_size": 3}

slow = pytest.mark.slow
plain = pytest.param(False, marks=slow, id="plain")
both = pytest.mark.parametrize("gated", [pytest.param(True, id="gated"), plain])


def analytic_loss(row):
    """With all parameters 0 every value has the same distribution: uniform, or that of a mixture
    whose components are one: the logistic around 0, whose log-scale is -7 + softplus(7), in bins.
    """
    levels = row.spec.levels or 2

    def nats(batch):
        x = np.asarray(batch.x).reshape(len(batch.x), -1).astype(int)
        if row.recipe.model.get("likelihood") != "logistics":
            return np.full(len(x), x.shape[1] * math.log(levels))
        inner = (np.arange(levels - 1) + 0.5) * 2 / (levels - 1) - 1
        scale = math.exp(-7 + math.log1p(math.exp(7)))
        below = scipy.stats.logistic.cdf([-math.inf, *inner, math.inf], 0, scale)
        return -np.log(np.diff(below))[x].sum(1)

    return zero(row.params), {"pixelcnn": nats}


def grown(params, by=0.5):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + by * rng.normal(size=leaf.shape).astype(leaf.dtype), params
    )


@functools.cache
def built(spec, **options):
    model = pixelcnn(spec, **{**TINY, **options})
    with jax.enable_x64(False):  # whoever asks first
        return model, grown(quick(model.init)(jax.random.key(0))[0])


def drawn(model, params, n, cond=None, key=KEY):
    sample = quick(model.sample, static_argnums=3)
    return np.asarray(sample(params, {"pixelcnn": {}}, key, n, cond))


# --- what a pixel sees ----------------------------------------------------------------------------


def places(spec):
    return list(itertools.product(*map(range, spec.shape)))


def may_see(spec, gated):
    """[values, values]: of each value, which others it may depend on. Without gates, windows of
    3 x 2 widen by one column a row: what is further to the right than up is in the blind spot.
    """

    def sees(at, other):
        (i, j, c), (k, m, e) = at, other
        if (k, m) == (i, j):
            return e < c
        earlier = (k, m) < (i, j)
        return earlier and (gated or m - j <= i - k)

    return np.asarray([[sees(at, other) for other in places(spec)] for at in places(spec)])


def seen(model, params, spec):
    """[values, values] of whether the jacobian of a value's logits by another is not 0, exactly."""
    x = np.random.default_rng(0).integers(0, spec.levels, (6, *spec.shape))
    channels = spec.shape[-1]

    def logits(x):
        found = model.autoregressive.outputs(params, {"pixelcnn": {}}, x[None])
        return channel_logits(spec, channels, found, x.reshape(1, -1, channels))[0]

    jacobian = np.asarray(quick(jax.vmap(jax.jacfwd(logits)))(jnp.asarray(x, jnp.float64)))
    return np.abs(jacobian).max(axis=(0, 3)).reshape(spec.size, spec.size) != 0


@pytest.mark.parametrize("sees", ["above", "before", "here", "row"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (3, 1), (2, 3), (3, 5)])
def test_a_masked_convolution_is_the_sum_over_what_it_sees(rows, columns, sees, x64):
    layer = MaskedConv(2, 3, rows, columns, sees, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...], np.float64)
    layer.kernel, layer.bias = nnx.Param(jnp.asarray(kernel)), nnx.Param(jnp.arange(3.0))
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(2, 4, 6, 2)), window(rows, columns, sees)
    wanted = np.zeros((2, 4, 6, 3)) + np.arange(3.0)
    for row, column, i, j in np.ndindex(4, 6, rows, columns):
        above, beside = row + i - (rows - 1), column + j - columns // 2
        if mask[i, j] and above >= 0 and 0 <= beside < 6:
            wanted[:, row, column] += x[:, above, beside] @ kernel[i, j]
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@both
def test_a_value_depends_on_every_earlier_one_and_exactly_on_no_other(gated, x64):
    model, params = built(COLOURS, gated=gated, channels=8)  # enough that no unit is always off
    wanted = may_see(COLOURS, gated)
    np.testing.assert_array_equal(seen(model, widen(params), COLOURS), wanted)
    assert gated or (wanted.sum() < may_see(COLOURS, True).sum())  # there is a blind spot


@slow
def test_with_smaller_images_between_it_is_the_same(x64):
    """One layer alone would not reach so far: what was halved does."""
    spec = dataclasses.replace(COLOURS, shape=(4, 4, 2))
    model, params = built(spec, channels=8, n_layers=1, scales=2)
    np.testing.assert_array_equal(seen(model, widen(params), spec), may_see(spec, True))
    near, params = built(spec, channels=8, n_layers=1)
    assert seen(near, widen(params), spec).sum() < may_see(spec, True).sum()


# --- probabilities --------------------------------------------------------------------------------


@pytest.mark.slow
@both
def test_the_probabilities_of_all_images_sum_to_one_for_each_class(gated, x64):
    model, params = built(CLASSES, gated=gated)
    x, score = widen(every(CLASSES)), quick(model.log_prob)
    found = []
    for label in (0, 1):
        batch = Batch(x, jnp.full(len(x), label, jnp.int32))
        found.append(np.exp(score(widen(params), {"pixelcnn": {}}, batch, KEY)))
        np.testing.assert_allclose(found[-1].sum(), 1, rtol=1e-12)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.slow
@both
def test_samples_follow_the_probabilities(gated):
    model, params = built(BINARY, gated=gated)
    x, n = every(BINARY), 4000
    p = np.exp(np.float64(quick(model.log_prob)(params, {"pixelcnn": {}}, Batch(x), KEY)))
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    same = drawn(model, params, n)[None] == np.asarray(x)[:, None]
    counts = same.reshape(len(x), n, -1).all(-1).sum(1)
    assert p_value(counts, n * p) > 1e-3
    assert p_value(counts, n * p[::-1]) < 1e-6  # it can tell


@pytest.mark.slow
def test_the_probabilities_of_all_images_sum_to_one_where_images_are_halved(x64):
    spec = dataclasses.replace(CLASSES, shape=(2, 4, 1))
    model, params = built(spec, scales=1, n_layers=1)
    x = widen(every(spec))
    batch = Batch(x, jnp.ones(len(x), jnp.int32))
    p = np.exp(quick(model.log_prob)(widen(params), {"pixelcnn": {}}, batch, KEY))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    assert np.ptp(p) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["categorical", "logistics"])
def test_the_colours_of_two_pixels_sum_to_one(likelihood, x64):
    spec = DataSpec((1, 2, 3), "discrete", levels=2, cond_dim=2)
    model, params = built(spec, likelihood=likelihood, n_components=2)
    x = widen(every(spec))
    batch = Batch(x, jnp.ones((len(x), 2)))
    p = np.exp(quick(model.log_prob)(widen(params), {"pixelcnn": {}}, batch, KEY))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-9)
    assert np.ptp(p) > 1e-3


# --- caches of rows -------------------------------------------------------------------------------


@pytest.mark.slow
@both
@pytest.mark.parametrize("size", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_sampling_with_caches_is_sampling_without(gated, size):
    spec = DataSpec((4, 5, 2), "discrete", levels=3, n_classes=2)
    cached, params = built(spec, gated=gated, kernel_size=size, cond_dropout=0.5)
    naive, _ = built(spec, gated=gated, kernel_size=size, cond_dropout=0.5, cached=False)
    cond = jnp.asarray([0, 1, 0, 1], jnp.int32)
    found = drawn(cached, params, 4, cond)
    np.testing.assert_array_equal(found, drawn(naive, params, 4, cond))
    assert len(np.unique(found)) == 3


@slow
@pytest.mark.parametrize(("size", "n_layers"), [(3, 2), (5, 1)])
def test_sampling_with_caches_is_sampling_without_where_images_are_halved(size, n_layers):
    spec = DataSpec((4, 8, 2), "discrete", levels=3, n_classes=2)
    options = {"kernel_size": size, "scales": 2, "n_layers": n_layers, "cond_dropout": 0.5}
    cached, params = built(spec, **options)
    naive, _ = built(spec, cached=False, **options)
    cond = jnp.asarray([0, 1, 0, 1], jnp.int32)
    found = drawn(cached, params, 4, cond)
    np.testing.assert_array_equal(found, drawn(naive, params, 4, cond))
    assert len(np.unique(found)) == 3


@slow
@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 5), ({"gated": False}, 5), ({"scales": 1, "n_layers": 2}, 6)],
    ids=["gated", "plain", "halved"],
)
def test_the_caches_give_the_outputs_of_the_whole_network_at_every_pixel(options, width, x64):
    spec = DataSpec((4, width, 2), "discrete", levels=3, n_classes=2)
    model, params = built(spec, kernel_size=5, cond_dropout=0.5, **options)
    own, params, state = model.autoregressive, widen(params), {"pixelcnn": {}}
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, *spec.shape)), jnp.float64)
    pixels = x.reshape(3, -1, 2)
    cond, dropped = jnp.asarray([0, 1, 1]), jnp.asarray([False, False, True])
    full = np.asarray(quick(own.outputs)(params, state, x, cond, dropped))
    begin, advance = quick(own.begin, static_argnums=2), quick(own.advance)
    outputs, carry = begin(params, state, 3, cond, dropped)
    for t in range(pixels.shape[1]):
        np.testing.assert_allclose(outputs, full[:, t], atol=1e-11)
        if t < pixels.shape[1] - 1:
            outputs, carry = advance(params, state, carry, pixels[:, t], cond, dropped)
    other = np.asarray(quick(own.outputs)(params, state, x, 1 - cond, dropped))
    differs = (other != full).any(axis=(1, 2))
    np.testing.assert_array_equal(differs, ~np.asarray(dropped))


@pytest.mark.slow
def test_the_beginning_of_an_image_is_a_prompt():
    model, params = built(BINARY)
    prompt = np.ones((4, 4, 1), np.float32)
    x = model.autoregressive.generate(params, {"pixelcnn": {}}, KEY, 4, prompt=prompt)
    assert x.shape == (4, 3, 3, 1)
    np.testing.assert_array_equal(np.asarray(x).reshape(4, 9, 1)[:, :4], prompt)


@pytest.mark.slow
def test_dropout_is_of_training_only():
    model, params = built(BINARY, dropout=0.5)
    batch, state = Batch(jnp.ones((2, 3, 3, 1))), {"pixelcnn": {}}
    loss = quick(model.losses["pixelcnn"])
    one, two = (loss(params, state, batch, jax.random.key(seed), 0)[0] for seed in (0, 1))
    assert (np.asarray(one) != np.asarray(two)).all()
    score = quick(model.log_prob)
    np.testing.assert_array_equal(
        *(score(params, state, batch, jax.random.key(seed)) for seed in (0, 1))
    )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (DataSpec((4, 4, 1), "continuous"), {}, "take vae, flow_matching or diffusion"),
        (DataSpec((8,), "tokens", levels=3, step="symbol"), {}, "take rnn or transformer"),
        (DataSpec((6,), "binary"), {}, "take made"),
        (BINARY, {"kernel_size": 4}, "odd"),
        (BINARY, {"likelihood": "logistics"}, "take bernoulli"),
        (BINARY, {"n_layers": 0}, "at least 1"),
        (BINARY, {"scales": 1}, "3 x 3 pixels, which halve 0 times: take scales=0"),
        (DataSpec((4, 12, 1), "binary"), {"scales": 3}, "take scales=2 or less"),
        (DataSpec((4, 4, 1), "binary"), {"scales": 1, "gated": False}, "gated=True"),
        (
            DataSpec((4, 4, 1), "discrete", levels=256, n_classes=2),
            {"cond_dropout": 0.1},
            'likelihood="categorical"',
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(spec, options, said):
    with pytest.raises(ConfigError, match=said):
        pixelcnn(spec, **options)
