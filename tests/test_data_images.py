"""Images: IDX files, the digits, and the files of MNIST and Fashion-MNIST."""

import dataclasses
import gzip
import hashlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from data_checks import assert_same

from genjax import data
from genjax.checks import check_batch
from genjax.data import images
from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch, DataSpec

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


# --- IDX ----------------------------------------------------------------------------------------


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
NOISE = np.random.default_rng(0).bytes(
    200_000
)  # does not compress, so that a cut comes after some output
ZIPPED = gzip.compress(b"\0\0\x08\x01\0\x03\x0d\x40" + NOISE, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file.*found nothing"),
        (b"PK\x03\x04....", "not an IDX file.*found 50 4b 03 04"),
        (b"\0\0\x0d\x01\0\0\0\x01....", "type code 0x08.*found 0x0d"),
        (b"\0\0\x08\x03\0\0\0\x01", "header of 16 bytes for 3 axes; found 8 bytes"),
        (
            HEADER + b"abc",
            re.escape("fewer values than its header says: expected 4 bytes for shape [4]; found 3"),
        ),
        (
            HEADER + b"abcde",
            re.escape("more values than its header says: expected 4 bytes for shape [4]; found 5"),
        ),
        (ZIPPED[:100_000], r"gzip data are cut short after [1-9]\d+ decompressed bytes"),
        (ZIPPED[:-4], "gzip data are cut short after 200008 decompressed bytes"),
        (
            ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:],
            r"gzip data are corrupt after [1-9]\d+ decompressed bytes.*check",
        ),
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
    with pytest.raises(DataError, match="is a folder; expected a file"):
        data.read_idx(tmp_path)
    with pytest.raises(DataError, match="written from uint8; got float32"):
        data.write_idx(tmp_path / "x", np.zeros(3, np.float32))


# --- images -------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_all_there(monkeypatch):
    from sklearn.datasets import load_digits

    splits = data.digits(conditional=True).load()
    assert [len(batch.x) for batch in splits] == [1257, 180, 360]
    label = load_digits().target
    for batch in splits:
        share = np.bincount(label) * len(batch.x) / 1797
        assert np.abs(np.bincount(batch.cond) - share).max() <= 1.5
    rows = np.concatenate(
        [np.column_stack([batch.x.reshape(-1, 64), batch.cond]) for batch in splits]
    )
    pixels = np.column_stack([load_digits().data, label])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], pixels[np.lexsort(pixels.T)])
    assert_same(splits, data.digits(conditional=True).load())
    assert data.digits().load().train.cond is None
    with monkeypatch.context() as patched:  # wherever scikit-learn keeps them
        patched.setattr("importlib.util.find_spec", lambda name: None)
        assert_same(splits, data.digits(conditional=True).load())


def test_digits_prepared():
    grey, threshold, dynamic = (
        data.digits(binarize=how) for how in ("none", "threshold", "dynamic")
    )
    stored = grey.load().train
    key = jax.random.key(0)
    assert grey.spec == DataSpec((8, 8, 1), "discrete", levels=17, name="digits")
    assert threshold.spec == dynamic.spec == DataSpec((8, 8, 1), "binary", name="digits")
    assert data.digits(True, "dynamic").spec.n_classes == 10
    np.testing.assert_array_equal(
        np.asarray(grey.prepare(key, stored).x), stored.x.astype(np.float32)
    )
    np.testing.assert_array_equal(
        np.asarray(threshold.prepare(key, stored).x), (stored.x >= 8).astype(np.float32)
    )
    image = stored.x[0]
    draw = jax.jit(
        lambda key: dynamic.prepare(key, Batch(np.broadcast_to(image, (2000, 8, 8, 1)))).x
    )
    drawn, again = np.asarray(draw(key)), np.asarray(draw(jax.random.key(1)))
    assert drawn.dtype == np.float32
    assert set(np.unique(drawn)) == {0, 1}
    p = image / 16
    assert (
        np.abs(drawn.mean(axis=0) - p) <= 4 * np.sqrt(p * (1 - p) / 2000)
    ).all()  # exact where p is 0 or 1
    assert (drawn != again).any()
    with pytest.raises(
        ConfigError, match=r"no binarization called 'dynamik'\. Did you mean dynamic"
    ):
        data.digits(binarize="dynamik")


@pytest.fixture
def mnist_folder(tmp_path, monkeypatch):
    """A folder with 36 + 5 tiny but true files, half of them gzipped; nothing on this machine is
    looked at.
    """
    monkeypatch.delenv("GENJAX_DATA", raising=False)
    monkeypatch.setattr(images, "_SYSTEM", {"mnist": (), "fashion_mnist": (tmp_path / "debian",)})
    folder = tmp_path / "here"
    folder.mkdir()
    write_mnist(folder)
    return folder


def write_mnist(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i, (name, n) in enumerate(zip(MNIST_FILES, (36, 36, 5, 5), strict=True)):
        array = (
            rng.integers(0, 256, (n, 28, 28), np.uint8)
            if i % 2 == 0
            else (np.arange(n) % 10).astype(np.uint8)
        )
        data.write_idx(folder / (name + (".gz" if i < 2 else "")), array)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_is_read(mnist_folder, name):
    source = data.open_source(name, conditional=True, path=str(mnist_folder), check_hash=False)
    plain = dataclasses.replace(source.spec, class_names=None)
    assert plain == DataSpec((28, 28, 1), "discrete", levels=256, n_classes=10, name=name)
    assert (source.spec.class_names is None) == (name == "mnist")
    splits = source.load()
    assert [batch.x.shape for batch in splits] == [(33, 28, 28, 1), (3, 28, 28, 1), (5, 28, 28, 1)]
    assert splits.train.x.dtype == np.uint8
    assert splits.train.cond.dtype == np.int32
    stored = data.read_idx(mnist_folder / "train-images-idx3-ubyte.gz")
    np.testing.assert_array_equal(splits.valid.x[..., 0], stored[-3:])
    batch = source.prepare(jax.random.key(0), splits.test)
    check_batch(source.spec, batch)
    binary = data.open_source(name, binarize="threshold", path=str(mnist_folder), check_hash=False)
    np.testing.assert_array_equal(
        np.asarray(binary.prepare(jax.random.key(0), binary.load().test).x), splits.test.x >= 128
    )


def test_mnist_places(mnist_folder, monkeypatch, tmp_path):
    def found(name):
        return len(data.open_source(name, check_hash=False).load().train.x)

    with pytest.raises(
        DataError, match=r"files of mnist.*no place, as GENJAX_DATA is not set. Set GENJAX_DATA"
    ):
        found("mnist")
    with pytest.raises(
        DataError, match=r"debian \(no such folder\).*install Debian's dataset-fashion-mnist"
    ):
        found("fashion_mnist")
    monkeypatch.setenv("GENJAX_DATA", str(mnist_folder))
    assert found("mnist") == found("fashion_mnist") == 33
    mnist_folder.rename(tmp_path / "fashion-mnist")
    monkeypatch.setenv("GENJAX_DATA", str(tmp_path))
    assert found("fashion_mnist") == 33
    with pytest.raises(
        DataError, match=r"Looked in: \S+/mnist \(no such folder\); \S+ \(has no train-images"
    ):
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
        DataError,
        match="train-images-idx3-ubyte.gz: not the published file of mnist: "
        r"expected SHA-256 ba89\w+",
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
    with pytest.raises(
        DataError, match=f"expected SHA-256 {'0' * 64}.*found {hashes[0]}, which is a file of mnist"
    ):
        data.fashion_mnist(path=str(mnist_folder)).load()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            MNIST_FILES[2],
            np.zeros((5, 27, 28), np.uint8),
            re.escape("test split must hold examples of shape [28, 28, 1]"),
        ),
        (
            MNIST_FILES[2],
            np.zeros((5, 784), np.uint8),
            re.escape("t10k-images-idx3-ubyte: expected 3 axes; found shape [5, 784]"),
        ),
        (MNIST_FILES[3], np.zeros((5, 1), np.uint8), "t10k-labels-idx1-ubyte: expected 1 axes"),
        (
            MNIST_FILES[3],
            np.zeros(6, np.uint8),
            "t10k-labels-idx1-ubyte: labels of another length: 5 images and 6 labels",
        ),
        (
            MNIST_FILES[3],
            np.full(5, 10, np.uint8),
            "labels must be in the range 0 to 9; found 10 to 10",
        ),
    ],
)
def test_mnist_refuses(mnist_folder, name, array, message):
    data.write_idx(mnist_folder / name, array)
    with pytest.raises(DataError, match=message):
        data.mnist(conditional=True, path=str(mnist_folder), check_hash=False).load()
