"""Glow: levels, 1x1 convolutions, and what a first batch makes of it; float64 where it is tight."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flow_checks import assert_bijection, events, moved, normal_loss
from gates import assert_same, quick
from vae_oracles import assert_mean, f64, jit

from genjax import glow, training
from genjax.data import Source, Splits, cast, example_batch
from genjax.errors import ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import device_feed, fit
from genjax.parts.bijections import linear, matrix
from genjax.protocol import Batch, DataSpec

analytic_loss = normal_loss

SQUARE = DataSpec((4, 4, 1), "continuous", name="square")
FOUR = DataSpec((2, 2, 1), "continuous", name="four")
DIGITS = DataSpec((4, 4, 1), "discrete", levels=5, name="small digits")
SMALL = {"n_levels": 1, "n_steps": 2, "channels": 3}


@functools.cache
def small(spec, **settings):
    return glow(spec, **{**SMALL, "bins": 4, "tail_bound": 2.0, **settings})


def grown(model, size=0.2):
    params, state = model.init(jax.random.key(0))
    return moved(params, size), state


# --- 1x1 convolutions -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_product_along_channels_is_a_1x1_convolution(x64):
    """ln |det| = H W ln |det W|, and L U is the dense W."""
    one, x = linear(3), events((4, 2, 3))
    params = moved(one.init(jax.random.key(0)), 0.4)
    lower, upper = matrix(params)
    dense = np.asarray(lower @ upper)
    z, log_det = one.forward(params, x, None)
    convolved = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(dense.T)[None, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(z, convolved, rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_det, 4 * 2 * np.linalg.slogdet(dense)[1], atol=1e-12)


# --- the map --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "n_levels"),
    [("affine", 2), *(pytest.param(t, 2, marks=pytest.mark.slow) for t in ("additive", "spline"))],
)
def test_it_is_a_bijection_with_the_log_det_of_its_jacobian(x64, transform, n_levels):
    model = small(SQUARE, transform=transform, n_levels=n_levels)
    params, state = grown(model)
    z, log_det = assert_bijection(
        lambda x: model.extras.forward(params, state, x),
        lambda z: model.extras.inverse(params, state, z),
        events(SQUARE.shape),
    )
    assert z.shape == (4, 16)
    assert np.std(log_det) > 0 or transform == "additive"


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_levels_halve_the_image_and_leave_half_of_its_channels_behind(channels):
    spec = DataSpec((16, 8, channels), "continuous", name="images")
    model = glow(spec, n_levels=3, n_steps=2, channels=4)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    level, depth = params["flow"]["map"], channels
    for number in range(3):
        depth *= 4
        assert level["steps"]["norm"]["shift"].shape == (2, depth)
        assert level["steps"]["product"]["lower"].shape == (2, depth, depth)
        if number < 2:
            depth //= 2
            # A scale and a shift of every channel that is left behind.
            assert level["out"]["left"]["last"]["kernel"].shape == (3, 3, 4, 2 * depth)
            level = level["out"]["rest"]
    batch = example_batch(spec, jax.random.key(1), 2)
    shapes = jax.eval_shape(
        lambda key: model.extras.forward(*model.init(key), batch.x), jax.random.key(0)
    )
    assert shapes[0].shape == (2, 16 * 8 * channels)


@pytest.mark.slow
def test_the_last_levels_numbers_come_first():
    """A pixel that moves changes all numbers of the levels that see it, and no density but its own
    example's; of a flow that moves nothing the order of z can be read off.
    """
    model = small(SQUARE, n_levels=2, n_steps=1)
    params, state = model.init(jax.random.key(0))
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    z = np.asarray(model.extras.forward(params, state, x)[0][0])
    # Of each block of 2x2 pixels, turned round, the first two stay for the second level.
    blocks = np.asarray(x).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)[:, ::-1]
    assert sorted(z[:8]) == sorted(blocks[:, :2].ravel())
    np.testing.assert_array_equal(z[8:], blocks[:, 2:].ravel())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "n_classes"),
    [("spline", 2), pytest.param("affine", None, marks=pytest.mark.slow)],
)
def test_the_density_integrates_to_one(x64, transform, n_classes):
    """By weights of importance in four dimensions."""
    spec = DataSpec((2, 2, 1), "continuous", n_classes=n_classes, name="four")
    model = small(spec, transform=transform)
    params, state = grown(model)
    scale = 2.0
    x = scale * np.random.default_rng(0).normal(size=(40_000, 2, 2, 1))
    cond = None if n_classes is None else jnp.ones(len(x), jnp.int32)
    nats = jit(model.log_prob)(params, state, Batch(jnp.asarray(x), cond), jax.random.key(1))
    drawn_from = scipy.stats.norm.logpdf(x, scale=scale).reshape(len(x), -1).sum(1)
    weights = np.exp(np.asarray(nats) - drawn_from)
    assert_mean(weights, 1.0)
    assert weights.std() / math.sqrt(len(x)) < 0.02


# --- the first batch ------------------------------------------------------------------------------

WEIGHT = jnp.asarray([1.0, 0, 2, 1, 0.5, 1, 0, 3])


@pytest.mark.slow
def test_the_first_batch_is_standardised_but_for_what_has_no_weight():
    model = small(SQUARE, n_steps=1)
    t = training(model, optax.sgd(0.1))
    batch = example_batch(SQUARE, jax.random.key(1), 8)
    batch = batch._replace(x=5 + 3 * batch.x, weight=WEIGHT)
    spoiled = batch._replace(x=batch.x.at[1].set(jnp.nan).at[6].set(jnp.inf))
    first, prepare = quick(t.init)(jax.random.key(0)), quick(t.prepare)
    ts = prepare(first, spoiled)
    assert_same(ts.params, prepare(first, batch).params)
    z, _ = model.extras.forward(ts.params, ts.state, batch.x)
    z = np.asarray(z).reshape(8, 4, 4)  # pixels and channels after squeezing
    for power, wanted in ((1, 0), (2, 1)):
        each = np.average((z**power).mean(1), axis=0, weights=WEIGHT)
        np.testing.assert_allclose(each, wanted, atol=1e-4)


@pytest.mark.slow
def test_every_level_is_prepared_once_and_never_again_after_reload(tmp_path):
    arrays = Batch(np.asarray(7 + 3 * events(SQUARE.shape).repeat(4, 0), np.float32))
    source = Source(SQUARE, lambda: Splits(arrays, arrays, arrays), cast(SQUARE))
    model = small(SQUARE, n_levels=2)
    t = training(model, optax.adam(0.01))
    feed = device_feed(t, source, arrays, 8, 0)
    settings = {"key": jax.random.key(0), "steps": 4, "steps_per_call": 2}
    wanted = fit(feed, **settings, checkpoints=Checkpoints(tmp_path, keep=9), checkpoint_every=2)
    assert_same(fit(feed, **settings, checkpoints=Checkpoints(tmp_path)), wanted)
    level = wanted.params["flow"]["map"]
    for steps in (level["steps"], level["out"]["rest"]["steps"]):
        assert np.asarray(steps["norm"]["log_scale"]).all()
    # Twice would standardise what training moved away from that.
    again = quick(t.prepare)(wanted, Batch(arrays.x[:8]))
    norms = [ts.params["flow"]["map"]["steps"]["norm"]["shift"] for ts in (wanted, again)]
    assert np.abs(np.asarray(norms[0] - norms[1])).max() > 1e-3


# --- whole numbers --------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_of_whole_numbers_have_a_bound_that_more_draws_raise(x64):
    params, state = grown(small(DIGITS))
    batch = Batch(f64(example_batch(DIGITS, jax.random.key(1), 4).x))
    keys = jax.random.split(jax.random.key(2), 200)

    def mean(k):
        model = small(DIGITS, n_bound_samples=k)
        assert model.log_prob is None
        return float(jit(jax.vmap(lambda key: model.bound(params, state, batch, key)))(keys).mean())

    one, four, many = mean(1), mean(4), mean(16)
    assert one < four < many
    drawn = small(DIGITS).sample(params, state, jax.random.key(3), 5)
    assert set(np.unique(np.asarray(drawn))) <= set(range(5))


# --- what is asked of it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((6, 6, 1), r"multiples of 4; odd is 6 x 6\. Say n_levels=1, or use realnvp or nsf"),
        ((8, 7, 1), r"multiples of 4; odd is 8 x 7\. Pad the images, or use"),
    ],
)
def test_sides_that_cannot_be_halved_are_refused_and_the_remedy_works(shape, said):
    spec = DataSpec(shape, "continuous", name="odd")
    with pytest.raises(ConfigError, match=said):
        glow(spec, n_levels=2)
    if "n_levels=1" in said:
        assert glow(spec, n_levels=1).spec == spec


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec((4,), "continuous", name="flat"),
        DataSpec((5,), "tokens", levels=4, name="letters"),
        DataSpec((5, 2), "continuous", step="frame", name="frames"),
    ],
)
def test_what_is_no_image_is_refused(spec):
    with pytest.raises(ConfigError, match=rf"\(height, width, channels\); {spec.name} is "):
        glow(spec)
