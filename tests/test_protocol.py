"""The contract: what a spec may say of its data, which steps of a sequence count, what a batch must
bring, and what a model's records hold.
"""

import dataclasses
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.checks import check_batch
from genjax.data import cast, example_batch
from genjax.evaluation.estimates import padded
from genjax.protocol import (
    Autoregressive,
    Batch,
    DataSpec,
    Denoiser,
    Latent,
    Model,
    Trained,
    step_mask,
)

NAMES = DataSpec((5,), "tokens", levels=3, vocabulary=("\n", "a", "b"), step="character", end=0)
ROLLS = DataSpec((4, 2), "binary", step="frame", lengths=True)

# --- specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"kind": "images"},
            "kind must be one of binary, discrete, continuous, tokens; got 'images'",
        ),
        ({"kind": "binary", "shape": (0, 2)}, r"positive sizes; got \(0, 2\)"),
        (
            {"kind": "discrete"},
            r"discrete data need levels >= 2 \(256 for bytes\); got levels=None",
        ),
        ({"kind": "tokens", "levels": 1}, "tokens data need levels >= 2"),
        (
            {"kind": "binary", "levels": 2},
            "levels is for discrete or token data; got levels=2 with kind='binary'",
        ),
        (
            {"kind": "binary", "n_classes": 2, "cond_dim": 3},
            "a label .n_classes. or a vector .cond_dim., not both",
        ),
        ({"kind": "binary", "n_classes": 0}, "n_classes must be at least 1; got 0"),
        ({"kind": "binary", "cond_dim": -1}, "cond_dim must be at least 1; got -1"),
    ],
)
def test_specs_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        DataSpec(**{"shape": (2, 2), **settings})


@pytest.mark.parametrize(
    ("kind", "levels"), [("binary", None), ("discrete", 17), ("continuous", None)]
)
def test_normalize_maps_the_range_of_the_data_to_minus_one_and_one(x64, kind, levels):
    spec = DataSpec((2,), kind, levels=levels)
    x = np.arange(levels or 2, dtype=np.float64)
    y = np.asarray(spec.normalize(jnp.asarray(x)))
    np.testing.assert_allclose(
        y, x if kind == "continuous" else np.linspace(-1, 1, len(x)), atol=1e-15
    )
    np.testing.assert_allclose(spec.denormalize(jnp.asarray(y)), x, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "levels", "top"),
    [("binary", None, 1), ("discrete", 17, 16), ("tokens", 5, 4), ("continuous", None, None)],
)
def test_the_largest_value(kind, levels, top):
    assert DataSpec((2,), kind, levels=levels).top == top


def test_conditions_as_vectors():
    labels = jnp.asarray([2, 0])
    by_label = DataSpec((2,), "binary", n_classes=3)
    np.testing.assert_array_equal(by_label.embed(labels), [[0, 0, 1], [1, 0, 0]])
    assert (by_label.cond_size, by_label.conditional) == (3, True)
    vectors = jnp.ones((2, 4))
    by_vector = DataSpec((2,), "binary", cond_dim=4)
    assert by_vector.embed(vectors) is vectors
    assert (by_vector.cond_size, by_vector.conditional) == (4, True)
    plain = DataSpec((2,), "binary")
    assert plain.embed(None) is None
    assert (plain.cond_size, plain.conditional) == (0, False)


@pytest.mark.parametrize(
    "spec", [NAMES, ROLLS, DataSpec((2,), "binary", n_classes=2, class_names=("a", "b"))]
)
def test_a_spec_comes_back_from_json_equal_and_hashable(spec):
    found = DataSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert found == spec
    assert hash(found) == hash(spec)


def test_sizes_and_dtypes():
    spec = DataSpec([3, 4, 2], "binary")  # as JSON gives it
    assert (spec.shape, spec.size, spec.text) == ((3, 4, 2), 24, False)
    assert spec.dtype == jnp.float32
    assert (NAMES.dtype, NAMES.text) == (jnp.int32, True)
    assert DataSpec((), "continuous").size == 1


# --- sequences ------------------------------------------------------------------------------------


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


@pytest.mark.slow
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


# --- records --------------------------------------------------------------------------------------


def nothing(*args):
    """A function of a model that is never called."""


def test_the_score_is_the_density_or_else_the_bound():
    model = Model(NAMES, nothing, {}, nothing)
    assert (model.score, model.score_name) == (None, None)
    bounded = model._replace(bound=max)
    assert (bounded.score, bounded.score_name) == (max, "bound")
    exact = bounded._replace(log_prob=min)
    assert (exact.score, exact.score_name) == (min, "log_prob")


def test_a_model_has_only_what_it_says():
    model = Model(NAMES, nothing, {}, nothing)
    for field in ("log_prob", "bound", "prepare", "latent", "autoregressive", "denoiser", "extras"):
        assert getattr(model, field) is None, field
    assert (model.turns, model.labels, dict(model.follows), dict(model.noise)) == ((), (), {}, {})


@pytest.mark.parametrize(
    ("record", "required"),
    [
        (Latent, {"spec", "encode"}),
        (Autoregressive, {"generate"}),
        (Denoiser, {"path", "denoise", "generate"}),
        (Trained, {"model", "params", "state"}),
    ],
)
def test_records_hold_functions_and_say_what_each_is(record, required):
    parameters = inspect.signature(record).parameters
    assert {name for name, one in parameters.items() if one.default is one.empty} == required
    if record is not Trained:
        entries = re.findall(r"^ {8}([\w, ]+): ", record.__doc__, re.MULTILINE)
        assert set(parameters) <= {name for entry in entries for name in entry.split(", ")}
