"""The contract's part about sequences: what a spec may say of them, which steps count, and what a
batch must bring.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.checks import check_batch
from genjax.data import cast, example_batch
from genjax.evaluation.estimates import padded
from genjax.nets.functional import functional
from genjax.nets.sequence import EventEmbed, dropout
from genjax.protocol import Batch, DataSpec, step_mask

NAMES = DataSpec((5,), "tokens", levels=3, vocabulary=("\n", "a", "b"), step="character", end=0)
ROLLS = DataSpec((4, 2), "binary", step="frame", lengths=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (3,), "kind": "tokens", "levels": 3, "vocabulary": ("a", "b")}, "2 symbols"),
        ({"shape": (3,), "kind": "binary", "vocabulary": ("a", "b")}, "kind='binary'"),
        ({"shape": (3,), "kind": "tokens", "levels": 3, "end": 0}, "step='character'"),
        ({"shape": (3,), "kind": "tokens", "levels": 3, "end": 3, "step": "token"}, "end=3"),
        ({"shape": (3, 2), "kind": "binary", "end": 0, "step": "frame"}, "end=0"),
        (
            {
                "shape": (3,),
                "kind": "tokens",
                "levels": 3,
                "end": 0,
                "lengths": True,
                "step": "token",
            },
            "lengths=True",
        ),
        ({"shape": (), "kind": "continuous", "lengths": True, "step": "row"}, "sequences"),
    ],
)
def test_a_spec_of_sequences_must_make_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        DataSpec(**fields)


def test_steps_count_up_to_the_end_token_or_the_length():
    x = jnp.asarray([[1, 2, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [2, 0, 1, 0, 2]], jnp.int32)
    wanted = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(step_mask(NAMES, Batch(x)), np.asarray(wanted, bool))
    rolls = Batch(jnp.zeros((3, 4, 2)), length=jnp.asarray([1, 4, 3]))
    np.testing.assert_array_equal(step_mask(ROLLS, rolls).sum(1), [1, 4, 3])
    plain = DataSpec((5,), "tokens", levels=3, step="token")
    assert step_mask(plain, Batch(x)).all()


def test_a_batch_brings_its_lengths_exactly_where_the_spec_says_so():
    x = jnp.zeros((3, 4, 2))
    check_batch(ROLLS, Batch(x, length=jnp.asarray([1, 2, 4], jnp.int32)))
    for spec, batch, message in (
        (ROLLS, Batch(x), "missing"),
        (
            DataSpec((4, 2), "binary", step="frame"),
            Batch(x, length=jnp.asarray([1, 2, 4])),
            "given",
        ),
        (ROLLS, Batch(x, length=jnp.asarray([1, 2])), r"int \[3\]"),
        (ROLLS, Batch(x, length=jnp.ones(3)), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            check_batch(spec, batch)


def test_lengths_travel_with_their_examples():
    batch = example_batch(ROLLS, jax.random.key(0), 200)
    assert set(np.asarray(batch.length).tolist()) == {1, 2, 3, 4}
    raw = Batch(np.asarray(batch.x, np.uint8), length=np.asarray(batch.length))
    check_batch(ROLLS, cast(ROLLS)(jax.random.key(0), raw))
    last = padded(raw, 198, 4)
    np.testing.assert_array_equal(last.length, [*raw.length[198:], raw.length[0], raw.length[0]])


@pytest.mark.parametrize("spec", [NAMES, ROLLS], ids=["tokens", "vectors"])
def test_inputs_come_one_step_late_and_single_steps_agree(spec):
    net = functional(lambda rngs: EventEmbed(spec, 6, rngs=rngs))
    params, _ = net.init(jax.random.key(0))
    x = example_batch(spec, jax.random.key(1), 3).x
    whole, _ = net.apply(params, {}, x, None)
    first, _ = net.apply(params, {}, 3, None, method="first")
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
