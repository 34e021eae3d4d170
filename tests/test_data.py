"""Data: batches on the host and on the device, what is refused of any source, and the sources'
names and options.
"""

import inspect
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_checks import LABELS, assert_same, rows_at, with_value

from genjax import data
from genjax.checks import check_batch
from genjax.data.source import DATA_TAG
from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch, DataSpec
from genjax.zoo.sections import parameters_of

# --- source --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_digits():
    """60 stored digits with labels and weights."""
    rows = jax.tree.map(lambda array: array[:60], data.digits(conditional=True).load().valid)
    return rows._replace(weight=np.linspace(0, 1, 60, dtype=np.float32))


@pytest.mark.slow
def test_host_and_device_batches_are_bitwise_equal(some_digits):
    source = data.digits(conditional=True, binarize="dynamic")
    on_device = jax.tree.map(jnp.asarray, some_digits)
    batch, prepare = data.batch_at(source, 16, 3), jax.jit(data.prepare_at(source, 3))
    steps = jnp.arange(8)  # 60 examples: the batches of steps 3 and 7 straddle epochs
    scanned = jax.jit(
        lambda arrays: jax.lax.scan(lambda carry, step: (carry, batch(arrays, step)), 0, steps)[1]
    )(on_device)
    # The seed, too, may be a vmapped axis.
    mapped = jax.jit(jax.vmap(lambda seed, step: data.batch_at(source, 16, seed)(on_device, step)))(
        jnp.full(8, 3), steps
    )
    scanned, mapped = jax.tree.map(
        np.asarray, (scanned, mapped)
    )  # slicing JAX arrays would compile every slice
    for step in range(8):
        raw = rows_at(source, some_digits, 16, 3, step)
        assert raw.x.dtype == np.uint8
        assert isinstance(raw.x, np.ndarray)
        host = prepare(raw, step)
        assert_same(host, jax.tree.map(lambda leaf: leaf[step], scanned))
        assert_same(host, jax.tree.map(lambda leaf: leaf[step], mapped))
        # Weights and labels travel with their rows.
        index = data.batch_indices(60, 16, 3, step)
        np.testing.assert_array_equal(np.asarray(host.weight), some_digits.weight[index])
        np.testing.assert_array_equal(np.asarray(host.cond), some_digits.cond[index])
    check_batch(source.spec, host)


@pytest.mark.parametrize("binarize", ["none", "threshold"])
def test_host_and_device_batches_without_draws(some_digits, binarize):
    source = data.digits(conditional=True, binarize=binarize)
    device = jax.jit(data.batch_at(source, 16, 3))(jax.tree.map(jnp.asarray, some_digits), 3)
    check_batch(source.spec, device)
    assert_same(
        device, data.prepare_at(source, 3)(rows_at(source, some_digits, 16, 3, 3), 3)
    )  # not jitted


def test_data_key_is_not_the_training_key():
    keys = []
    source = data.digits()._replace(prepare=lambda key, batch: keys.append(key) or batch)
    data.prepare_at(source, 0)(Batch(jnp.zeros((1, 2))), 3)
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), DATA_TAG), 3)
    assert (jax.random.key_data(keys[0]) == jax.random.key_data(expected)).all()
    training = jax.random.fold_in(jax.random.key(0), 3)
    assert (jax.random.key_data(keys[0]) != jax.random.key_data(training)).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        DataSpec((4, 4, 1), "binary"),
        DataSpec((3,), "discrete", levels=5, n_classes=3),
        DataSpec((2,), "continuous", cond_dim=2),
        DataSpec((6,), "tokens", levels=7),
    ],
)
def test_example_batch_fits_its_spec(spec):
    batch = jax.jit(data.example_batch, static_argnums=(0, 2))(spec, jax.random.key(0), 200)
    check_batch(spec, batch)
    assert batch.x.dtype == spec.dtype
    if spec.kind != "continuous":
        np.testing.assert_array_equal(np.unique(np.asarray(batch.x)), np.arange(spec.levels or 2))


GOOD = np.zeros((4, 3), np.float32)
PLAIN, LABELLED = DataSpec((3,), "continuous"), DataSpec((3,), "continuous", n_classes=2)


@pytest.mark.parametrize(
    ("batch", "spec", "message"),
    [
        (Batch(np.zeros((0, 3), np.float32)), PLAIN, "is empty"),
        (Batch(np.zeros((4, 2), np.float32)), PLAIN, re.escape("shape [3]; found [2]")),
        (
            Batch(with_value(np.nan)),
            PLAIN,
            re.escape("1 of 12 values are NaN or infinite, the first at index [2, 1]"),
        ),
        (Batch(with_value(-np.inf)), PLAIN, "NaN or infinite"),
        (
            Batch(with_value(0.5)),
            DataSpec((3,), "binary"),
            "whole numbers from 0 to 1: 1 of 12 values are not whole",
        ),
        (Batch(with_value(2, np.uint8)), DataSpec((3,), "binary"), "range 0 to 1; found 0 to 2"),
        (
            Batch(with_value(-1, np.int32)),
            DataSpec((3,), "discrete", levels=4),
            "range 0 to 3; found -1 to 0",
        ),
        (
            Batch(with_value(4, np.int32)),
            DataSpec((3,), "tokens", levels=4),
            re.escape("first at index [2, 1]"),
        ),
        (Batch(GOOD), LABELLED, "no condition; expected a label"),
        (Batch(GOOD), DataSpec((3,), "continuous", cond_dim=2), "no condition; expected a vector"),
        (Batch(GOOD, LABELS), PLAIN, "spec is unconditional"),
        (
            Batch(GOOD, LABELS[:3]),
            LABELLED,
            "labels of another length: 4 examples in x and 3 labels",
        ),
        (Batch(GOOD, LABELS[:, None]), LABELLED, re.escape("condition of shape [4]; found [4, 1]")),
        (Batch(GOOD, LABELS + 2), LABELLED, "labels must be in the range 0 to 1; found 2 to 2"),
        (Batch(GOOD, LABELS - 1), LABELLED, "found -1 to -1"),
        (
            Batch(GOOD, with_value(np.nan)),
            DataSpec((3,), "continuous", cond_dim=3),
            "labels: 1 of 12 values are NaN",
        ),
        (
            Batch(GOOD, None, np.ones(3, np.float32)),
            PLAIN,
            re.escape("one weight for each of 4 examples; found shape [3]"),
        ),
    ],
)
def test_validate_refuses(batch, spec, message):
    good = Batch(
        GOOD,
        LABELS
        if spec.n_classes
        else np.zeros((4, spec.cond_dim), np.float32)
        if spec.cond_dim
        else None,
    )
    good = data.Splits(good, batch, good)
    with pytest.raises(DataError, match=f"^there: the valid split.*{message}"):
        data.validate(good, spec, "there")


# --- names --------------------------------------------------------------------------------------


def test_open_source_names_and_options():
    assert data.loader("ring") is data.ring
    assert data.loader("any/where.npz") is data.loader(Path("x.npy")) is data.arrays
    with pytest.raises(
        ConfigError, match=r"no data set called 'fashion-mnist'\. Did you mean fashion_mnist"
    ):
        data.open_source("fashion-mnist")
    with pytest.raises(ConfigError, match=r"There are: digits, mnist.*a path ending in \.npz"):
        data.loader("zzz")
    with pytest.raises(
        ConfigError,
        match=r"'digits' does not take the option 'noise'. It takes: conditional, binarize\.",
    ):
        data.open_source("digits", noise=1)
    with pytest.raises(
        ConfigError,
        match=r"option 'path'. It takes: conditional, key, .*valid_fraction, test_fraction\.",
    ):
        data.open_source("mine.npz", path="other.npz")


@pytest.mark.parametrize(
    "make", [*data.SOURCES.values(), data.arrays], ids=lambda make: make.__name__
)
def test_signatures_serve_the_command_line(make):
    hints = {name: hint for name, (hint, *_) in parameters_of(make).items()}
    described = re.findall(
        r"^        (\w+): \S",
        inspect.getdoc(make).replace("\n    ", "\n        "),
        flags=re.MULTILINE,
    )
    for name, parameter in inspect.signature(make).parameters.items():
        if name == "path" and parameter.default is inspect.Parameter.empty:
            continue
        simple = (
            hints[name] in (bool, int, float, str, str | None, int | None)
            or typing.get_origin(hints[name]) is typing.Literal
        )
        assert simple, f"{name}: {hints[name]}"
        assert name in described
        assert parameter.default is not inspect.Parameter.empty or name == "path"


@pytest.mark.parametrize("name", data.SOURCES)
def test_spec_is_known_without_loading(name, monkeypatch):
    monkeypatch.delenv("GENJAX_DATA", raising=False)
    source = data.open_source(name)
    assert source.spec.name == name
    assert re.match(r"[\d,]+ train / [\d,]+ valid / [\d,]+ test", source.description)
