"""Data: the order of examples, sources, file formats, and densities held to their own samples."""

import functools
import gzip
import hashlib
import inspect
import itertools
import math
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from genjax import data
from genjax.data import images
from genjax.data.source import DATA_TAG
from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch, DataSpec, check_batch

DENSITIES = ("ring", "grid", "moons", "pinwheel", "checkerboard", "swiss_roll")
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def assert_uniform(counts, expected=None):
    """Chi-square; the seeds are fixed, so that a passing test stays one."""
    counts = np.asarray(counts, np.float64).ravel()
    expected = np.full_like(counts, counts.mean()) if expected is None else expected
    statistic = ((counts - expected) ** 2 / expected).sum()
    p = chi2.sf(statistic, counts.size - 1)
    assert p > 1e-4, f"chi-square {statistic:.1f} for {counts.size - 1} degrees of freedom, p = {p:.2g}"


def assert_same(a, b):
    """Bitwise equality of two batches, dtypes included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


# ---------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("n", "batch_size"), [(1, 1), (2, 1), (3, 2), (5, 5), (7, 3), (10, 4), (64, 64), (65, 17), (1257, 100)]
)
def test_every_epoch_visits_every_example_once(n, batch_size):
    epochs = 3
    steps = math.ceil(epochs * n / batch_size)
    stream = np.concatenate([data.batch_indices(n, batch_size, 5, step) for step in range(steps)])
    assert stream.dtype == np.int32
    orders = stream[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(n), (epochs, 1)))
    if n >= 10:
        assert len({tuple(order) for order in orders}) == epochs


@pytest.mark.parametrize(("n", "batch_size"), [(3, 2), (60_000, 64)])
def test_order_is_the_same_on_host_and_device(n, batch_size):
    steps = [0, 1, 2, 999, 123_456_789, 2**31 - 1]
    host = np.stack([data.batch_indices(n, batch_size, 7, step) for step in steps])
    assert isinstance(host, np.ndarray)
    traced = jnp.array(steps, jnp.int32)

    @jax.jit
    def everywhere(seed, steps):
        def indices(step):
            return data.batch_indices(n, batch_size, seed, step)

        return (
            jax.vmap(indices)(steps),
            jax.lax.scan(lambda carry, step: (carry, indices(step)), 0, steps)[1],
            jax.vmap(lambda step: data.batch_indices(n, batch_size, 7, step))(steps),
        )

    for device in everywhere(jnp.int32(7), traced):
        assert device.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(device), host)


def test_seeds_of_any_sign_agree_on_host_and_device():
    seeds = np.array([0, -1, 2**31, 2**32 - 1])
    device = jax.jit(jax.vmap(lambda seed: data.batch_indices(20, 9, seed, 4)))(seeds.astype(np.uint32))
    np.testing.assert_array_equal(np.asarray(device), np.stack([data.batch_indices(20, 9, int(seed), 4) for seed in seeds]))


@pytest.mark.parametrize("step", [0, 6, 3**19, 2**31 - 1, 2**31 + 5])
def test_large_steps_do_not_overflow(step):
    # The same stream taken one by one, at positions that Python counts exactly.
    n, batch_size = 1013, 1000
    batch = data.batch_indices(n, batch_size, 3, step)
    for i in (0, 1, 500, 999):
        assert batch[i] == data.batch_indices(n, 1, 3, step * batch_size + i)[0]


@functools.cache
def _orders(n, seeds, epochs):
    """[seeds, epochs, n]."""
    order = jax.vmap(jax.vmap(lambda seed, epoch: data.batch_indices(n, n, seed, epoch), (None, 0)), (0, None))
    return np.asarray(jax.jit(order)(jnp.arange(seeds), jnp.arange(epochs)))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 10, 33])
def test_every_example_is_equally_likely_at_every_position(n):
    orders = _orders(n, 200, 50)
    counts = np.stack([np.bincount(orders[..., i].ravel(), minlength=n) for i in range(n)])
    if n == 1:
        assert counts[0, 0] == 10_000
        return
    for i in range(n):
        assert_uniform(counts[i])
    # Neighbours within an epoch, and the same position in neighbouring epochs and seeds, are independent.
    pairs = np.bincount((orders[..., 0] * n + orders[..., 1]).ravel(), minlength=n * n).reshape(n, n)
    assert_uniform(pairs[~np.eye(n, dtype=bool)])
    assert_uniform(np.bincount((orders[:, :-1, 0] * n + orders[:, 1:, 0]).ravel(), minlength=n * n))
    assert_uniform(np.bincount((orders[:-1, :, 0] * n + orders[1:, :, 0]).ravel(), minlength=n * n))


@pytest.mark.parametrize("n", [3, 5])
def test_every_permutation_is_equally_likely(n):
    number = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    found = [number[tuple(order)] for order in _orders(n, 200, 50).reshape(-1, n).tolist()]
    assert_uniform(np.bincount(found, minlength=len(number)))


def test_permutation_is_fixed():
    # The splits of user data hang on this order: it must not change from one version to the next.
    assert data.permutation(10, seed=0).tolist() == [9, 6, 4, 1, 2, 5, 3, 8, 0, 7]
    np.testing.assert_array_equal(np.sort(data.permutation(5000, seed=1)), np.arange(5000))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 11, 0, 0), DataError, "batch_size=11 is more than the 10 examples"),
        ((0, 1, 0, 0), DataError, "the 0 examples"),
        ((10, 0, 0, 0), ConfigError, "batch_size must be at least 1; got 0"),
        ((10, 2, 0, -1), ConfigError, "counts from 0; got -1"),
        ((2**20, 2**12, 0, 0), ConfigError, re.escape("examples * batch_size < 2**32; got 1048576 * 4096")),
        ((2**31, 1, 0, 0), ConfigError, "2147483648"),
    ],
)
def test_order_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        data.batch_indices(*arguments)


# ---------------------------------------------------------------------------------------------------------- source


@pytest.fixture(scope="module")
def some_digits():
    """60 stored digits with labels and weights."""
    rows = jax.tree.map(lambda array: array[:60], data.digits(conditional=True).load().valid)
    return rows._replace(weight=np.linspace(0, 1, 60, dtype=np.float32))


def test_host_and_device_batches_are_bitwise_equal(some_digits):
    source = data.digits(conditional=True, binarize="dynamic")
    on_device = jax.tree.map(jnp.asarray, some_digits)
    batch, prepare = data.batch_at(source, 16, 3), jax.jit(data.prepare_at(source, 3))
    steps = jnp.arange(8)  # 60 examples: the batches of steps 3 and 7 straddle epochs
    scanned = jax.jit(lambda arrays: jax.lax.scan(lambda carry, step: (carry, batch(arrays, step)), 0, steps)[1])(on_device)
    # The seed, too, may be a vmapped axis.
    mapped = jax.jit(jax.vmap(lambda seed, step: data.batch_at(source, 16, seed)(on_device, step)))(jnp.full(8, 3), steps)
    scanned, mapped = jax.tree.map(np.asarray, (scanned, mapped))  # slicing JAX arrays would compile every slice
    for step in range(8):
        raw = data.host_batch(some_digits, 16, 3, step)
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
    assert_same(device, data.prepare_at(source, 3)(data.host_batch(some_digits, 16, 3, 3), 3))  # not jitted


def test_data_key_is_not_the_training_key():
    keys = []
    source = data.digits()._replace(prepare=lambda key, batch: keys.append(key) or batch)
    data.prepare_at(source, 0)(Batch(jnp.zeros((1, 2))), 3)
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), DATA_TAG), 3)
    assert (jax.random.key_data(keys[0]) == jax.random.key_data(expected)).all()
    training = jax.random.fold_in(jax.random.key(0), 3)
    assert (jax.random.key_data(keys[0]) != jax.random.key_data(training)).any()


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
LABELS = np.zeros(4, np.int32)
PLAIN, LABELLED = DataSpec((3,), "continuous"), DataSpec((3,), "continuous", n_classes=2)


def with_value(value, dtype=np.float32):
    x = np.zeros((4, 3), dtype)
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("batch", "spec", "message"),
    [
        (Batch(np.zeros((0, 3), np.float32)), PLAIN, "is empty"),
        (Batch(np.zeros((4, 2), np.float32)), PLAIN, re.escape("shape [3]; found [2]")),
        (Batch(with_value(np.nan)), PLAIN, re.escape("1 of 12 values are NaN or infinite, the first at index [2, 1]")),
        (Batch(with_value(-np.inf)), PLAIN, "NaN or infinite"),
        (Batch(with_value(0.5)), DataSpec((3,), "binary"), "whole numbers from 0 to 1: 1 of 12 values are not whole"),
        (Batch(with_value(2, np.uint8)), DataSpec((3,), "binary"), "range 0 to 1; found 0 to 2"),
        (Batch(with_value(-1, np.int32)), DataSpec((3,), "discrete", levels=4), "range 0 to 3; found -1 to 0"),
        (Batch(with_value(4, np.int32)), DataSpec((3,), "tokens", levels=4), re.escape("first at index [2, 1]")),
        (Batch(GOOD), LABELLED, "no condition; expected a label"),
        (Batch(GOOD), DataSpec((3,), "continuous", cond_dim=2), "no condition; expected a vector"),
        (Batch(GOOD, LABELS), PLAIN, "spec is unconditional"),
        (Batch(GOOD, LABELS[:3]), LABELLED, "labels of another length: 4 examples in x and 3 labels"),
        (Batch(GOOD, LABELS[:, None]), LABELLED, re.escape("condition of shape [4]; found [4, 1]")),
        (Batch(GOOD, LABELS + 2), LABELLED, "labels must be in the range 0 to 1; found 2 to 2"),
        (Batch(GOOD, LABELS - 1), LABELLED, "found -1 to -1"),
        (Batch(GOOD, with_value(np.nan)), DataSpec((3,), "continuous", cond_dim=3), "labels: 1 of 12 values are NaN"),
        (Batch(GOOD, None, np.ones(3, np.float32)), PLAIN, re.escape("one weight for each of 4 examples; found shape [3]")),
    ],
)
def test_validate_refuses(batch, spec, message):
    good = Batch(GOOD, LABELS if spec.n_classes else np.zeros((4, spec.cond_dim), np.float32) if spec.cond_dim else None)
    good = data.Splits(good, batch, good)
    with pytest.raises(DataError, match=f"^there: the valid split.*{message}"):
        data.validate(good, spec, "there")


# ---------------------------------------------------------------------------------------------------------- IDX


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 28, 28), (2, 3, 4, 5), (0, 3), ()])
@pytest.mark.parametrize("name", ["a.idx", "a.idx.gz"])
def test_idx_comes_back(tmp_path, shape, name):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data.write_idx(tmp_path / name, array)
    renamed = (tmp_path / name).rename(tmp_path / "no-suffix")  # gzip is told by its content
    assert (renamed.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    found = data.read_idx(renamed)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array)


def test_idx_in_several_gzip_members(tmp_path):
    data.write_idx(tmp_path / "plain", np.arange(200, dtype=np.uint8))
    raw = (tmp_path / "plain").read_bytes()
    (tmp_path / "two.gz").write_bytes(gzip.compress(raw[:50]) + gzip.compress(raw[50:]))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "two.gz"), np.arange(200))


HEADER = b"\0\0\x08\x01\0\0\0\x04"
NOISE = np.random.default_rng(0).bytes(200_000)  # does not compress, so that a cut comes after some output
ZIPPED = gzip.compress(b"\0\0\x08\x01\0\x03\x0d\x40" + NOISE, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file.*found nothing"),
        (b"PK\x03\x04....", "not an IDX file.*found 50 4b 03 04"),
        (b"\0\0\x0d\x01\0\0\0\x01....", "type code 0x08.*found 0x0d"),
        (b"\0\0\x08\x03\0\0\0\x01", "header of 16 bytes for 3 axes; found 8 bytes"),
        (HEADER + b"abc", re.escape("fewer values than its header says: expected 4 bytes for shape [4]; found 3")),
        (HEADER + b"abcde", re.escape("more values than its header says: expected 4 bytes for shape [4]; found 5")),
        (ZIPPED[:100_000], r"gzip data are cut short after [1-9]\d+ decompressed bytes"),
        (ZIPPED[:-4], "gzip data are cut short after 200008 decompressed bytes"),
        (ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], r"gzip data are corrupt after [1-9]\d+ decompressed bytes.*check"),
        (b"\x1f\x8b\x09" + ZIPPED[3:], "gzip data are corrupt after 0 decompressed bytes"),
    ],
)
def test_idx_refuses(tmp_path, content, message):
    path = tmp_path / "bad-file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"bad-file: .*{message}"):
        data.read_idx(path)


def test_idx_refuses_paths_and_dtypes(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such file"):
        data.read_idx(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read"):
        data.read_idx(tmp_path)
    with pytest.raises(DataError, match="written from uint8; got float32"):
        data.write_idx(tmp_path / "x", np.zeros(3, np.float32))


# ---------------------------------------------------------------------------------------------------------- images


def test_digits_are_split_by_class_and_all_there():
    from sklearn.datasets import load_digits

    splits = data.digits(conditional=True).load()
    assert [len(batch.x) for batch in splits] == [1257, 180, 360]
    label = load_digits().target
    for batch in splits:
        share = np.bincount(label) * len(batch.x) / 1797
        assert np.abs(np.bincount(batch.cond) - share).max() <= 1.5
    rows = np.concatenate([np.column_stack([batch.x.reshape(-1, 64), batch.cond]) for batch in splits])
    pixels = np.column_stack([load_digits().data, label])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], pixels[np.lexsort(pixels.T)])
    assert_same(splits, data.digits(conditional=True).load())
    assert data.digits().load().train.cond is None


def test_digits_prepared():
    grey, threshold, dynamic = (data.digits(binarize=how) for how in ("none", "threshold", "dynamic"))
    stored = grey.load().train
    key = jax.random.key(0)
    assert grey.spec == DataSpec((8, 8, 1), "discrete", levels=17, name="digits")
    assert threshold.spec == dynamic.spec == DataSpec((8, 8, 1), "binary", name="digits")
    assert data.digits(True, "dynamic").spec.n_classes == 10
    np.testing.assert_array_equal(np.asarray(grey.prepare(key, stored).x), stored.x.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(threshold.prepare(key, stored).x), (stored.x >= 8).astype(np.float32))
    image = stored.x[0]
    draw = jax.jit(lambda key: dynamic.prepare(key, Batch(np.broadcast_to(image, (2000, 8, 8, 1)))).x)
    drawn, again = np.asarray(draw(key)), np.asarray(draw(jax.random.key(1)))
    assert drawn.dtype == np.float32
    assert set(np.unique(drawn)) == {0, 1}
    p = image / 16
    assert (np.abs(drawn.mean(axis=0) - p) <= 4 * np.sqrt(p * (1 - p) / 2000)).all()  # exact where p is 0 or 1
    assert (drawn != again).any()
    with pytest.raises(ConfigError, match=r"no binarization called 'dynamik'\. Did you mean dynamic"):
        data.digits(binarize="dynamik")


@pytest.fixture
def mnist_folder(tmp_path, monkeypatch):
    """A folder with 36 + 5 tiny but true files, half of them gzipped; nothing on this machine is looked at."""
    monkeypatch.delenv("GENJAX_DATA", raising=False)
    monkeypatch.setattr(images, "_SYSTEM", {"mnist": (), "fashion_mnist": (tmp_path / "debian",)})
    folder = tmp_path / "here"
    folder.mkdir()
    write_mnist(folder)
    return folder


def write_mnist(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i, (name, n) in enumerate(zip(MNIST_FILES, (36, 36, 5, 5), strict=True)):
        array = rng.integers(0, 256, (n, 28, 28), np.uint8) if i % 2 == 0 else (np.arange(n) % 10).astype(np.uint8)
        data.write_idx(folder / (name + (".gz" if i < 2 else "")), array)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_is_read(mnist_folder, name):
    source = data.open_source(name, conditional=True, path=str(mnist_folder), check_hash=False)
    assert source.spec == DataSpec((28, 28, 1), "discrete", levels=256, n_classes=10, name=name)
    splits = source.load()
    assert [batch.x.shape for batch in splits] == [(33, 28, 28, 1), (3, 28, 28, 1), (5, 28, 28, 1)]
    assert splits.train.x.dtype == np.uint8
    assert splits.train.cond.dtype == np.int32
    stored = data.read_idx(mnist_folder / "train-images-idx3-ubyte.gz")
    np.testing.assert_array_equal(splits.valid.x[..., 0], stored[-3:])
    batch = source.prepare(jax.random.key(0), splits.test)
    check_batch(source.spec, batch)
    binary = data.open_source(name, binarize="threshold", path=str(mnist_folder), check_hash=False)
    np.testing.assert_array_equal(np.asarray(binary.prepare(jax.random.key(0), binary.load().test).x), splits.test.x >= 128)


def test_mnist_places(mnist_folder, monkeypatch, tmp_path):
    def found(name):
        return len(data.open_source(name, check_hash=False).load().train.x)

    with pytest.raises(DataError, match=r"files of mnist.*no place, as GENJAX_DATA is not set. Set GENJAX_DATA"):
        found("mnist")
    with pytest.raises(DataError, match=r"debian \(no such folder\).*install Debian's dataset-fashion-mnist"):
        found("fashion_mnist")
    monkeypatch.setenv("GENJAX_DATA", str(mnist_folder))
    assert found("mnist") == found("fashion_mnist") == 33
    mnist_folder.rename(tmp_path / "fashion-mnist")
    monkeypatch.setenv("GENJAX_DATA", str(tmp_path))
    assert found("fashion_mnist") == 33
    with pytest.raises(DataError, match=r"Looked in: \S+/mnist \(no such folder\); \S+ \(has no train-images"):
        found("mnist")
    (tmp_path / "fashion-mnist").rename(tmp_path / "debian")
    assert found("fashion_mnist") == 33
    # An explicit path is the only place: another data set must not step in silently.
    with pytest.raises(DataError, match="elsewhere"):
        data.fashion_mnist(path=str(tmp_path / "elsewhere")).load()
    (tmp_path / "debian" / MNIST_FILES[2]).unlink()
    with pytest.raises(DataError, match=r"debian \(has no t10k-images-idx3-ubyte\)"):
        found("fashion_mnist")


def test_mnist_hash(mnist_folder, monkeypatch):
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte.gz: not the published file of mnist: expected SHA-256 ba89\w+"
    ):
        data.mnist(path=str(mnist_folder)).load()

    def sha256(name):
        raw = (mnist_folder / name).read_bytes()
        return hashlib.sha256(gzip.decompress(raw) if name.endswith(".gz") else raw).hexdigest()

    names = sorted(path.name for path in mnist_folder.iterdir())
    by_name = {name.removesuffix(".gz"): sha256(name) for name in names}
    hashes = tuple(by_name[name] for name in MNIST_FILES)
    monkeypatch.setattr(images, "_SHA256", {"mnist": hashes, "fashion_mnist": ("0" * 64,) * 4})
    assert len(data.mnist(path=str(mnist_folder)).load().train.x) == 33
    with pytest.raises(DataError, match=f"expected SHA-256 {'0' * 64}.*found {hashes[0]}, which is a file of mnist"):
        data.fashion_mnist(path=str(mnist_folder)).load()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (MNIST_FILES[2], np.zeros((5, 27, 28), np.uint8), re.escape("test split must hold examples of shape [28, 28, 1]")),
        (
            MNIST_FILES[2],
            np.zeros((5, 784), np.uint8),
            re.escape("t10k-images-idx3-ubyte: expected 3 axes; found shape [5, 784]"),
        ),
        (MNIST_FILES[3], np.zeros((5, 1), np.uint8), "t10k-labels-idx1-ubyte: expected 1 axes"),
        (MNIST_FILES[3], np.zeros(6, np.uint8), "t10k-labels-idx1-ubyte: labels of another length: 5 images and 6 labels"),
        (MNIST_FILES[3], np.full(5, 10, np.uint8), "labels must be in the range 0 to 9; found 10 to 10"),
    ],
)
def test_mnist_refuses(mnist_folder, name, array, message):
    data.write_idx(mnist_folder / name, array)
    with pytest.raises(DataError, match=message):
        data.mnist(conditional=True, path=str(mnist_folder), check_hash=False).load()


# ---------------------------------------------------------------------------------------------------------- arrays


def npz(tmp_path, **arrays):
    path = str(tmp_path / "mine.npz")
    np.savez(path, **arrays)
    return path


FLOATS = np.random.default_rng(0).normal(size=(50, 3))


@pytest.mark.parametrize(
    ("x", "kind", "spec", "dtype"),
    [
        (np.full((50, 4, 5), 9, np.uint8), "auto", DataSpec((4, 5, 1), "discrete", levels=256, name="mine"), np.uint8),
        (np.full((50, 4, 5, 3), 9, np.uint8), "auto", DataSpec((4, 5, 3), "discrete", levels=256, name="mine"), np.uint8),
        (np.full((50, 4), 9), "auto", DataSpec((4,), "discrete", levels=10, name="mine"), np.uint8),
        (np.full((50, 4), 900), "auto", DataSpec((4,), "discrete", levels=901, name="mine"), np.int32),
        (np.ones((50, 4), bool), "auto", DataSpec((4,), "binary", name="mine"), np.uint8),
        (np.ones((50, 4), np.uint8), "binary", DataSpec((4,), "binary", name="mine"), np.uint8),
        (np.ones((50, 4)), "binary", DataSpec((4,), "binary", name="mine"), np.uint8),
        (np.ones((50, 4), bool), "discrete", DataSpec((4,), "discrete", levels=2, name="mine"), np.uint8),
        (FLOATS, "auto", DataSpec((3,), "continuous", name="mine"), np.float32),
        (np.full((50, 4), 9, np.uint8), "continuous", DataSpec((4,), "continuous", name="mine"), np.float32),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_arrays_kinds(tmp_path, x, kind, spec, dtype, suffix):
    path = str(tmp_path / f"mine.{suffix}")
    np.savez(path, x=x) if suffix == "npz" else np.save(path, x)
    source = data.open_source(path, kind=kind)
    assert source.spec == spec
    splits = source.load()
    assert [len(batch.x) for batch in splits] == [40, 5, 5]
    assert splits.train.x.dtype == dtype
    assert "40 train / 5 valid / 5 test" in source.description
    check_batch(spec, source.prepare(jax.random.key(0), splits.train))
    rows = np.concatenate([batch.x for batch in splits]).reshape(50, -1)
    stored = x.reshape(50, -1).astype(dtype)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], stored[np.lexsort(stored.T)])


@pytest.mark.parametrize("key", ["y", "labels", "cond"])
def test_arrays_conditions(tmp_path, key):
    label = np.arange(50) % 7
    x = np.stack([label, label], axis=1).astype(np.float32)
    source = data.arrays(npz(tmp_path, x=x, **{key: label}), conditional=True)
    assert source.spec.n_classes == 7
    batch = source.load().train
    assert batch.cond.dtype == np.int32
    np.testing.assert_array_equal(batch.x[:, 0], batch.cond)  # rows and labels stay together
    check_batch(source.spec, source.prepare(jax.random.key(0), batch))
    assert data.arrays(npz(tmp_path, x=x, **{key: label})).load().train.cond is None
    source = data.arrays(npz(tmp_path, x=x, **{key: FLOATS}), conditional=True)
    assert source.spec.cond_dim == 3
    check_batch(source.spec, source.prepare(jax.random.key(0), source.load().test))
    assert data.arrays(npz(tmp_path, x=x, **{key: FLOATS[:, 0]}), conditional=True).spec.cond_dim == 1


def test_arrays_given_splits(tmp_path):
    label = np.array([0, 1, 2, 3])
    given = {"x_train": FLOATS[:20], "x_test": FLOATS[20:24], "y_train": np.zeros(20, int), "y_test": label}
    source = data.arrays(npz(tmp_path, **given), conditional=True, valid_fraction=0.25)
    assert source.spec.n_classes == 4
    splits = source.load()
    assert [len(batch.x) for batch in splits] == [15, 5, 4]
    np.testing.assert_array_equal(splits.test.x, FLOATS[20:24].astype(np.float32))
    three = npz(tmp_path, **given, x_valid=FLOATS[24:27], y_valid=np.zeros(3, int), junk=np.array([{}], object))
    splits = data.arrays(three, conditional=True).load()  # an object array that is not needed is not touched
    np.testing.assert_array_equal(splits.train.x, FLOATS[:20].astype(np.float32))
    np.testing.assert_array_equal(splits.valid.x, FLOATS[24:27].astype(np.float32))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"z": FLOATS}, {}, r"expected the arrays x \[.*found z"),
        ({"x_train": FLOATS}, {}, "expected the arrays.*found x_train"),
        ({}, {}, "found nothing"),
        ({"x": np.zeros(5)}, {}, re.escape("x must be [N, D] or [N, H, W, C]; found shape [5]")),
        ({"x": np.float64(1)}, {}, re.escape("found shape []")),
        ({"x": np.zeros((0, 3))}, {}, "x is empty"),
        ({"x": np.zeros((5, 0))}, {}, "the examples are empty"),
        ({"x": with_value(np.nan)}, {}, r"1 of \d+ values are NaN or infinite"),
        ({"x": np.full((5, 2), 1e300)}, {}, "NaN or infinite"),
        ({"x": FLOATS[:2]}, {}, "2 examples are too few to split"),
        ({"x": np.array([["a"]] * 9)}, {}, "x must be an array of numbers; found <U1"),
        ({"x": FLOATS.astype(complex)}, {}, "numbers; found complex128"),
        ({"x": np.array([[{}]] * 9, object)}, {}, "holds Python objects, which are never unpickled"),
        ({"x": FLOATS}, {"kind": "discrete"}, "discrete data must be whole numbers; found float64"),
        ({"x": FLOATS}, {"kind": "binary"}, "must be whole numbers from 0 to 1"),
        ({"x": np.full((9, 2), 255, np.uint8)}, {"kind": "binary"}, "range 0 to 1; found 255 to 255"),
        ({"x": np.full((9, 2), -3)}, {}, "found -3 to -3"),
        ({"x": np.full((9, 2), 2**30)}, {}, re.escape("below 2**24")),
        ({"x": FLOATS}, {"conditional": True}, "expected one of y, labels, cond; found x"),
        ({"x": FLOATS, "y": np.zeros(49, int)}, {"conditional": True}, "another length: 50 examples in x and 49 in y"),
        ({"x": FLOATS, "y": np.int64(3)}, {"conditional": True}, "50 examples in x and 1 in y"),
        ({"x": FLOATS, "y": np.full(50, -1)}, {"conditional": True}, "labels must be in the range.*found -1 to -1"),
        ({"x": FLOATS, "y": np.zeros((50, 1), int)}, {"conditional": True}, "expected whole-number labels"),
        ({"x": FLOATS, "y": np.zeros((50, 1, 2))}, {"conditional": True}, "expected condition vectors"),
        ({"x": FLOATS, "y": np.full((50, 1), np.inf)}, {"conditional": True}, "labels: .*NaN or infinite"),
        ({"x_train": FLOATS, "x_test": FLOATS[:, :2]}, {}, "examples of one shape; found"),
        ({"x_train": FLOATS, "x_test": FLOATS, "y_train": LABELS}, {"conditional": True}, "in x_train and 4 in y_train"),
        (b"not an archive", {}, "not a .npz or .npy file: it starts with b'not an'"),
        (b"", {}, "not a .npz or .npy file"),
        (b"PK\x03\x04 but not a zip", {}, "damaged"),
        (b"\x93NUMPY\x01\x00\x04\x00????", {}, "damaged"),
    ],
)
def test_arrays_refuse(tmp_path, content, options, message):
    path = tmp_path / "mine.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(DataError, match=rf"mine\.npz: .*{message}"):
        data.open_source(path, **options)


def test_arrays_refuse_damage(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.npz: there is no such file"):
        data.arrays(str(tmp_path / "nowhere.npz"))
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match=r"folder\.npz: damaged, cannot be read.*directory"):
        data.arrays(str(tmp_path / "folder.npz"))
    whole = Path(npz(tmp_path, x=FLOATS)).read_bytes()
    for name, content in (("cut", whole[:300]), ("flipped", whole[:400] + bytes([whole[400] ^ 255]) + whole[401:])):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.npz: damaged"):
            data.arrays(str(tmp_path / f"{name}.npz"))
    np.save(tmp_path / "cut.npy", FLOATS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cut\.npy: damaged"):
        data.arrays(str(tmp_path / "cut.npy"))
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy: holds Python objects"):
        data.arrays(str(tmp_path / "objects.npy"))
    for fractions in ((0, 0.1), (0.1, 0), (0.5, 0.5)):
        with pytest.raises(ConfigError, match="valid_fraction and test_fraction must be positive with a sum below 1"):
            data.arrays("any.npz", valid_fraction=fractions[0], test_fraction=fractions[1])
    with pytest.raises(ConfigError, match="no kind of data called 'floats'"):
        data.arrays("any.npz", kind="floats")


# ---------------------------------------------------------------------------------------------------------- densities

HALF_WIDTH = {"ring": 1.2, "grid": 2.4, "moons": 2.4, "pinwheel": 3.2, "checkerboard": 2.0, "swiss_roll": 3.6}


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_exact(name):
    """It integrates to 1, its entropy is its own, and its samples follow it."""
    source = data.open_source(name)
    width, cells, fine = HALF_WIDTH[name], 8, 40
    axis = (np.arange(cells * fine) + 0.5) * (2 * width / (cells * fine)) - width
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).astype(np.float32)
    log_p = np.asarray(jax.jit(lambda rows: jax.lax.map(source.log_prob, rows))(jnp.asarray(points)), np.float64)
    area = (axis[1] - axis[0]) ** 2
    p = np.exp(log_p) * area
    assert p.sum() == pytest.approx(1, abs=1e-3)
    assert -(p * np.where(p > 0, log_p, 0)).sum() == pytest.approx(source.entropy, abs=2e-3)

    x = source.load().train.x
    scores = np.asarray(jax.jit(source.log_prob)(jnp.asarray(x)), np.float64)
    assert scores.shape == (20_000,)
    # numpy in, numpy out, in double precision.
    exact = source.log_prob(x[:500].astype(np.float64))
    assert isinstance(exact, np.ndarray)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(scores[:500], exact, rtol=1e-4, atol=1e-3)
    # (A constant density has a standard error of 0 and is exact to float32's rounding.)
    assert abs(scores.mean() + source.entropy) < 4 * scores.std() / math.sqrt(len(x)) + 1e-6

    cell = np.floor((x + width) / (2 * width / cells)).astype(int)
    assert cell.min() >= 0
    assert cell.max() < cells
    counts = np.bincount(cell[:, 0] * cells + cell[:, 1], minlength=cells**2)
    expected = p.reshape(cells, fine, cells, fine).sum(axis=(1, 3)).ravel() * len(x)
    rare = expected < 10
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    assert_uniform(counts[expected > 0], expected[expected > 0])


@pytest.mark.parametrize("name", DENSITIES)
def test_density_sources(name):
    source = data.open_source(name, n_train=30)
    splits = source.load()
    assert [batch.x.shape for batch in splits] == [(30, 2), (2000, 2), (10_000, 2)]
    assert all(batch.x.dtype == np.float32 for batch in splits)
    assert_same(splits, source.load())
    assert_same(splits.test, data.open_source(name).load().test)  # n_train does not move the other splits
    firsts = np.concatenate([batch.x[:30] for batch in splits])
    assert len(np.unique(firsts, axis=0)) == 90
    check_batch(source.spec, source.prepare(jax.random.key(0), splits.train))
    assert not np.isnan(source.log_prob(np.full((1, 2), 1e4, np.float32))).any()


@pytest.mark.parametrize("name", ["ring", "pinwheel", "checkerboard"])
def test_score_is_finite(name):
    source = data.open_source(name)
    score = jax.jit(jax.grad(lambda x: source.log_prob(x).sum()))(jnp.asarray(source.load().valid.x))
    assert np.isfinite(np.asarray(score)).all()


@pytest.mark.parametrize(("name", "n_classes"), [("ring", 8), ("grid", 25), ("moons", 2), ("pinwheel", 5)])
def test_density_classes(name, n_classes):
    source = data.open_source(name, conditional=True)
    assert source.spec.n_classes == n_classes
    batch = source.load().train
    assert_uniform(np.bincount(batch.cond, minlength=n_classes))
    check_batch(source.spec, source.prepare(jax.random.key(0), batch))
    np.testing.assert_array_equal(batch.x, data.open_source(name).load().train.x)
    if source.modes is not None:
        assert source.modes.shape == (n_classes, 2)
        z = (batch.x - source.modes[batch.cond]) / source.mode_std
        assert abs(z.mean()) < 0.03
        assert z.std() == pytest.approx(1, abs=0.02)
    if name == "moons":
        assert batch.x[batch.cond == 0, 1].mean() > 0.3 > -0.3 > batch.x[batch.cond == 1, 1].mean()
    if name == "pinwheel":
        # Untwisted, each arm points its own way.
        radius, angle = np.hypot(*batch.x.T), np.arctan2(batch.x[:, 1], batch.x[:, 0])
        off = (angle - 0.25 * np.exp(radius) - 2 * np.pi / 5 * batch.cond + np.pi) % (2 * np.pi) - np.pi
        assert np.median(np.abs(off)) < 0.15


def test_entropy_of_one_gaussian_and_of_many():
    # Eight Gaussians far apart: ln 8 nats more than one; all in one place: one Gaussian.
    one = math.log(2 * math.pi * math.e * 0.02**2)
    assert data.ring(radius=10.0).entropy == pytest.approx(one + math.log(8), abs=1e-6)
    assert data.ring(radius=1e-9).entropy == pytest.approx(one, abs=1e-6)
    assert data.checkerboard(half_width=4.0).entropy == pytest.approx(math.log(32))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ring", {"sd": 0.0}, "sd must be a positive number; got 0"),
        ("ring", {"radius": -1.0}, "radius must be"),
        ("grid", {"sd": math.nan}, "got nan"),
        ("moons", {"noise": 0.0}, "noise must be"),
        ("swiss_roll", {"noise": math.inf}, "got inf"),
        ("pinwheel", {"radial_sd": 0.0}, "radial_sd must be"),
        ("checkerboard", {"half_width": 0.0}, "half_width must be"),
        ("ring", {"n_train": 0}, "n_train must be at least 1; got 0"),
    ],
)
def test_densities_refuse(name, options, message):
    with pytest.raises(ConfigError, match=message):
        data.open_source(name, **options)


# ---------------------------------------------------------------------------------------------------------- names


def test_open_source_names_and_options():
    assert data.loader("ring") is data.ring
    assert data.loader("any/where.npz") is data.loader(Path("x.npy")) is data.arrays
    with pytest.raises(ConfigError, match=r"no data set called 'fashion-mnist'\. Did you mean fashion_mnist"):
        data.open_source("fashion-mnist")
    with pytest.raises(ConfigError, match=r"There are: digits, mnist.*a path ending in \.npz"):
        data.loader("zzz")
    with pytest.raises(ConfigError, match=r"'digits' does not take the option 'noise'. It takes: conditional, binarize\."):
        data.open_source("digits", noise=1)
    with pytest.raises(ConfigError, match=r"option 'path'. It takes: conditional, kind, valid_fraction, test_fraction\."):
        data.open_source("mine.npz", path="other.npz")


@pytest.mark.parametrize("make", [*data.SOURCES.values(), data.arrays], ids=lambda make: make.__name__)
def test_signatures_serve_the_command_line(make):
    hints = typing.get_type_hints(make)
    described = re.findall(r"^        (\w+): \S", inspect.getdoc(make).replace("\n    ", "\n        "), flags=re.MULTILINE)
    for name, parameter in inspect.signature(make).parameters.items():
        simple = hints[name] in (bool, int, float, str, str | None) or typing.get_origin(hints[name]) is typing.Literal
        assert simple, f"{name}: {hints[name]}"
        assert name in described
        assert parameter.default is not inspect.Parameter.empty or name == "path"


@pytest.mark.parametrize("name", data.SOURCES)
def test_spec_is_known_without_loading(name, monkeypatch):
    monkeypatch.delenv("GENJAX_DATA", raising=False)
    source = data.open_source(name)
    assert source.spec.name == name
    assert re.match(r"[\d,]+ train / [\d,]+ valid / [\d,]+ test", source.description)
