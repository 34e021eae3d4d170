"""Networks against formulas written out: multilayer perceptrons, convolutional encoders and
decoders, what sequences have in front of them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_oracles import f64, jit, random_params

from genjax.data import example_batch
from genjax.nets.conv import ConvDecoder, ConvEncoder
from genjax.nets.functional import functional
from genjax.nets.mlp import MLP, flatten_with
from genjax.nets.sequence import EventEmbed, dropout
from genjax.protocol import DataSpec


def test_an_mlp_is_its_formula_and_does_not_care_how_rows_are_arranged(x64):
    net = functional(partial(MLP, 3, (5, 4), 2, activation="tanh"))
    params, state = random_params(net)
    params = f64(params)
    x = np.random.default_rng(41).normal(size=(6, 7, 3))
    layers = [jax.tree.map(np.asarray, params["layers"][i]) for i in range(3)]
    assert [layer["kernel"].shape for layer in layers] == [(3, 5), (5, 4), (4, 2)]
    h = x
    for i, layer in enumerate(layers):
        h = h @ layer["kernel"] + layer["bias"]
        h = np.tanh(h) if i < 2 else h

    def call(*inputs):
        return [net.apply(params, state, jnp.asarray(a))[0] for a in inputs]

    stacked, flat, one = jit(call)(x, x.reshape(42, 3), x[0, 0])
    np.testing.assert_allclose(stacked, h, rtol=1e-10)
    np.testing.assert_array_equal(stacked.reshape(42, 2), flat)
    np.testing.assert_allclose(one, h[0, 0], rtol=1e-10)


def test_flatten_with_appends_the_condition_last():
    x, cond = jnp.arange(12.0).reshape(2, 3, 2), jnp.full((2, 1), 9.0)
    np.testing.assert_array_equal(flatten_with(x, 2, None), x.reshape(2, 6))
    np.testing.assert_array_equal(
        flatten_with(x, 2, cond), np.concatenate([x.reshape(2, 6), cond], 1)
    )
    np.testing.assert_array_equal(flatten_with(x[..., 0], 1, None), x[..., 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "channels"), [((8, 8, 1), (2,)), ((8, 4, 3), (4, 3)), ((8, 8, 2), (2, 3, 4))]
)
def test_convolutional_nets_halve_and_double_once_per_entry(shape, channels):
    encoder = functional(partial(ConvEncoder, shape, channels, 5, cond_size=2))
    decoder = functional(partial(ConvDecoder, 6, shape, channels[::-1], 7))
    (ep, es), (dp, ds) = (jax.eval_shape(net.init, jax.random.key(0)) for net in (encoder, decoder))
    side = [size // 2 ** len(channels) for size in shape[:2]]
    assert ep["last"]["kernel"].shape == (side[0] * side[1] * channels[-1] + 2, 5)
    assert dp["first"]["kernel"].shape == (6, side[0] * side[1] * channels[-1])
    assert jax.eval_shape(encoder.apply, ep, es, jnp.ones((3, *shape)), jnp.ones((3, 2)))[
        0
    ].shape == (3, 5)
    assert jax.eval_shape(decoder.apply, dp, ds, jnp.ones((3, 6)))[0].shape == (3, *shape[:2], 7)


@pytest.mark.slow
def test_a_decoder_with_unit_kernels_repeats_and_an_encoder_with_them_picks_every_other_pixel():
    unit = np.zeros((3, 3, 1, 1), np.float32)
    unit[1, 1] = 1
    decoder = functional(partial(ConvDecoder, 4, (8, 8, 1), (1, 1), 1, activation="relu"))
    params = {
        "first": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "convs": {i: {"kernel": jnp.asarray(unit), "bias": jnp.zeros(1)} for i in range(2)},
    }
    image = decoder.apply(params, {}, jnp.array([[1.0, 2.0, 3.0, -4.0]]))[0]
    np.testing.assert_array_equal(image[0, ..., 0], np.kron([[1, 2], [3, 0]], np.ones((4, 4))))
    encoder = functional(partial(ConvEncoder, (4, 4, 1), (1,), 4, activation="relu"))
    params = {
        "convs": {0: {"kernel": jnp.asarray(unit), "bias": jnp.zeros(1)}},
        "last": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
    }
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    features = encoder.apply(params, {}, x)[0]
    # "SAME" padding of an even side with stride 2 adds nothing before and one row after, so kernels
    # centre on odd pixels.
    np.testing.assert_array_equal(features[0], x[0, 1::2, 1::2, 0].ravel())


# --- sequences ------------------------------------------------------------------------------------

NAMES = DataSpec((5,), "tokens", levels=3, vocabulary=("\n", "a", "b"), step="character", end=0)
ROLLS = DataSpec((4, 2), "binary", step="frame", lengths=True)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [NAMES, ROLLS], ids=["tokens", "vectors"])
def test_inputs_come_one_step_late_and_single_steps_agree(spec):
    net = functional(lambda rngs: EventEmbed(spec, 6, rngs=rngs))
    params, _ = net.init(jax.random.key(0))
    x = example_batch(spec, jax.random.key(1), 3).x
    whole, _ = net.apply(params, {}, x, None)
    first, _ = net.apply(params, {}, 3, None, method="initial")
    np.testing.assert_allclose(whole[:, 0], first, rtol=1e-6)
    for t in range(1, x.shape[1]):
        one, _ = net.apply(params, {}, x[:, t - 1], None, method="one")
        np.testing.assert_allclose(whole[:, t], one, rtol=1e-5, atol=1e-7)


def test_a_dropped_condition_leaves_no_trace():
    spec = DataSpec((4,), "tokens", levels=3, n_classes=2, step="token")
    net = functional(lambda rngs: EventEmbed(spec, 6, droppable=True, rngs=rngs))
    params, _ = net.init(jax.random.key(0))
    assert params["dropped"].shape == (6,)
    x = jnp.zeros((2, 4), jnp.int32)
    c = jax.nn.one_hot(jnp.asarray([0, 1]), 2)
    given, _ = net.apply(params, {}, x, c, jnp.asarray([False, False]))
    without, _ = net.apply(params, {}, x, c, jnp.asarray([True, True]))
    np.testing.assert_array_equal(given, net.apply(params, {}, x, c)[0])
    assert (np.asarray(given[0]) != np.asarray(given[1])).any()
    np.testing.assert_array_equal(without[0], without[1])


def test_dropout_keeps_the_mean_and_no_key_keeps_everything():
    x = jnp.ones((100, 100))
    assert dropout(None, x, 0.5) is x
    y = np.asarray(dropout(jax.random.key(0), x, 0.25))
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / y.size)
