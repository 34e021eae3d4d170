"""Images of digits and clothes: scikit-learn's digits, MNIST and Fashion-MNIST, as grey levels or
binarised.

`digit_rows` and `digit_pixels` are scikit-learn's digits once more, as sequences.
"""

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data.idx import parse_idx, read_bytes
from genjax.data.order import permutation
from genjax.data.source import Source, Splits, cast, validate
from genjax.errors import DataError, unknown_name
from genjax.protocol import Batch, DataSpec, Key

Binarize = Literal["none", "threshold", "dynamic"]

# The four files of an MNIST-like set, and the SHA-256 of their *decompressed* bytes: the same gzip
# data come in many wrappings.
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_SHA256 = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
_CLASSES = {
    "mnist": None,
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}
_SUBFOLDERS = {"mnist": ("mnist",), "fashion_mnist": ("fashion_mnist", "fashion-mnist")}
# Where Debian's package dataset-fashion-mnist puts its files; there is no such package of MNIST.
_SYSTEM = {"mnist": (), "fashion_mnist": (Path("/usr/share/datasets/fashion-mnist"),)}
_HOW = {
    "mnist": "Set GENJAX_DATA to a folder that has them, or give path=.",
    "fashion_mnist": "Set GENJAX_DATA to a folder that has them, give path=, or install Debian's "
    "dataset-fashion-mnist.",
}


def digits(conditional: bool = False, binarize: Binarize = "none") -> Source:
    """Scikit-learn's 1797 handwritten digits, 8 x 8 with 17 grey levels: 1257 / 180 / 360,
    stratified by class.

    The test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak
    1998). The split is fixed. With binarize="dynamic" the evaluator draws the validation and test
    sets with one fixed key.

    Args:
        conditional: give the digit as the condition, a label from 0 to 9.
        binarize: "none" keeps grey levels 0-16; "threshold" is v >= 8; "dynamic" draws 1 with
            probability v / 16 each time.

    Raises:
        ConfigError: for an unknown `binarize`.
    """
    grey = DataSpec(
        (8, 8, 1), "discrete", levels=17, n_classes=10 if conditional else None, name="digits"
    )

    def load() -> Splits:
        table = _digits_table()
        x, label = (
            table[:, :-1].astype(np.uint8).reshape(-1, 8, 8, 1),
            table[:, -1].astype(np.int32),
        )
        train, valid, test = np.split(_stratified(label), [1257, 1257 + 180])
        parts = (
            Batch(x[rows], label[rows] if conditional else None) for rows in (train, valid, test)
        )
        return validate(Splits(*parts), grey, "scikit-learn's digits")

    about = "1,257 train / 180 valid / 360 test images of 8 x 8, from scikit-learn, no download"
    return _image_source(grey, binarize, load, about)


def _digits_table() -> np.ndarray:
    """[1797, 65]: 64 pixels and the label, from scikit-learn's file.

    Without importing scikit-learn where that file is found: the import takes 1.5 s, a quarter of
    the way to a first step.
    """
    found = importlib.util.find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.exists():
            return np.loadtxt(file, delimiter=",", dtype=np.int32)
    import sklearn.datasets

    pixels, label = sklearn.datasets.load_digits(return_X_y=True)
    return np.column_stack([pixels, label])


def digit_rows(conditional: bool = False, binarize: Binarize = "none") -> Source:
    """The same 1797 digits as `digits` as sequences, from top to bottom: 8 rows of 8 pixels, with
    the same splits.

    Args:
        conditional: give the digit as the condition, a label from 0 to 9.
        binarize: "none" keeps grey levels 0-16; "threshold" is v >= 8; "dynamic" draws 1 with
            probability v / 16 each time.

    Raises:
        ConfigError: for an unknown `binarize`.
    """
    source = digits(conditional, binarize)

    def load() -> Splits:
        return Splits(*(batch._replace(x=batch.x[..., 0]) for batch in source.load()))

    spec = dataclasses.replace(source.spec, shape=(8, 8), step="row", name="digit_rows")
    return source._replace(
        spec=spec,
        load=load,
        description=source.description.replace("images of 8 x 8", "images as 8 rows"),
    )


def digit_pixels(conditional: bool = False) -> Source:
    """The same 1797 digits as `digits` as sequences of tokens, one of 17 grey levels for each of
    the 64 pixels, from left to right and from top to bottom, with the same splits.

    Args:
        conditional: give the digit as the condition, a label from 0 to 9.
    """
    source = digits(conditional)

    def load() -> Splits:
        return Splits(*(batch._replace(x=batch.x.reshape(-1, 64)) for batch in source.load()))

    spec = dataclasses.replace(
        source.spec, shape=(64,), kind="tokens", step="pixel", name="digit_pixels"
    )
    about = source.description.replace("images of 8 x 8", "images as 64 tokens")
    return Source(spec, load, cast(spec), description=about)


def mnist(
    conditional: bool = False,
    binarize: Binarize = "none",
    path: str | None = None,
    check_hash: bool = True,
) -> Source:
    """MNIST, handwritten digits, 28 x 28 with 256 grey levels: 55,000 / 5,000 / 10,000 (LeCun,
    Bottou, Bengio & Haffner 1998).

    The validation set is the last 5,000 of the training files (a twelfth, for variants of another
    size). With binarize="dynamic" the evaluator draws the validation and test sets with one fixed
    key.

    Args:
        conditional: give the digit as the condition, a label from 0 to 9.
        binarize: "none" keeps grey levels 0-255; "threshold" is v >= 128; "dynamic" draws 1 with
            probability v / 255 each time.
        path: the folder of the four IDX files, plain or .gz; without it, they are looked for in
            $GENJAX_DATA.
        check_hash: refuse files that are not the published ones; turn it off for variants of your
            own.

    Raises:
        ConfigError: for an unknown `binarize`. DataError, by `load`: for files that are missing,
            damaged or not MNIST's.
    """
    return _idx_source("mnist", conditional, binarize, path, check_hash)


def fashion_mnist(
    conditional: bool = False,
    binarize: Binarize = "none",
    path: str | None = None,
    check_hash: bool = True,
) -> Source:
    """Fashion-MNIST, clothes, 28 x 28 with 256 grey levels: 55,000 / 5,000 / 10,000 (Xiao, Rasul &
    Vollgraf 2017).

    Split and evaluated as `mnist` is. Without `path` the files are looked for in $GENJAX_DATA and
    then where the Debian package dataset-fashion-mnist puts them.

    Args:
        conditional: give the kind of clothing as the condition, a label from 0 to 9.
        binarize: "none" keeps grey levels 0-255; "threshold" is v >= 128; "dynamic" draws 1 with
            probability v / 255 each time.
        path: the folder of the four IDX files, plain or .gz; without it, $GENJAX_DATA and the
            Debian package's folder.
        check_hash: refuse files that are not the published ones; turn it off for variants of your
            own.

    Raises:
        ConfigError: for an unknown `binarize`. DataError, by `load`: for files that are missing,
            damaged or not the real ones.
    """
    return _idx_source("fashion_mnist", conditional, binarize, path, check_hash)


def _image_source(grey: DataSpec, binarize: str, load: Callable[[], Splits], about: str) -> Source:
    """A source that stores grey levels, whatever `binarize` makes of them in `prepare`."""
    top = grey.top
    assert top is not None
    binary = dataclasses.replace(grey, kind="binary", levels=None)
    if binarize == "none":
        return Source(grey, load, cast(grey), description=about)

    def threshold(key: Key, batch: Batch) -> Batch:
        # v >= (top + 1) / 2, which is 8 of 0..16 and 128 of 0..255.
        return cast(binary)(key, batch._replace(x=jnp.asarray(batch.x) >= (top + 1) // 2))

    def dynamic(key: Key, batch: Batch) -> Batch:
        probability = jnp.asarray(batch.x).astype(jnp.float32) / top
        return cast(binary)(key, batch._replace(x=jax.random.bernoulli(key, probability)))

    prepares = {"none": cast(grey), "threshold": threshold, "dynamic": dynamic}
    if binarize not in prepares:
        raise unknown_name("binarization", binarize, prepares)
    return Source(binary, load, prepares[binarize], description=f"{about}; {binarize} binarisation")


def _stratified(label: np.ndarray) -> np.ndarray:
    """A fixed order in which every prefix has the classes in proportion: sorted by the relative
    rank within the class.
    """
    order = permutation(len(label), seed=0)
    rank = np.empty(len(label))
    for c in np.unique(label):
        members = order[label[order] == c]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(rank[order], kind="stable")]


def _idx_source(
    name: str, conditional: bool, binarize: str, path: str | None, check_hash: bool
) -> Source:
    classes = {"n_classes": 10, "class_names": _CLASSES[name]} if conditional else {}
    grey = DataSpec((28, 28, 1), "discrete", levels=256, **classes, name=name)

    def load() -> Splits:
        files = _find_files(name, path)
        train_x, train_y, test_x, test_y = (
            _read(name, i, file, check_hash) for i, file in enumerate(files)
        )
        n = len(train_x) - len(train_x) // 12  # 55,000 of the real 60,000
        parts = ((train_x[:n], train_y[:n]), (train_x[n:], train_y[n:]), (test_x, test_y))
        batches = (
            Batch(x[..., None], y.astype(np.int32) if conditional else None) for x, y in parts
        )
        for images, labels, file in ((train_x, train_y, files[1]), (test_x, test_y, files[3])):
            if len(images) != len(labels):
                raise DataError(
                    f"{file}: labels of another length: {len(images)} images and {len(labels)} "
                    "labels."
                )
        return validate(Splits(*batches), grey, str(files[0].parent))

    places = [path] if path is not None else ["$GENJAX_DATA", *map(str, _SYSTEM[name])]
    about = (
        "55,000 train / 5,000 valid / 10,000 test images of 28 x 28, from IDX files in "
        f"{' or '.join(places)}"
    )
    source = _image_source(grey, binarize, load, about)
    return source if check_hash else source._replace(files=_unchecked(name, path))


def _unchecked(name: str, path: str | None) -> tuple[str, ...]:
    """The files, where they are not held to the published hashes; none if they are not there yet,
    which `load` says.
    """
    try:
        return tuple(map(str, _find_files(name, path)))
    except DataError:
        return ()


def _find_files(name: str, path: str | None) -> list[Path]:
    """The four files in the first folder that has them all; an explicit path is the only folder
    that is looked in.
    """
    root = os.environ.get("GENJAX_DATA") or None if path is None else path
    roots = [] if root is None else [Path(root)]
    # Sub-folders first: they say which data set it is.
    folders = [root / sub for root in roots for sub in _SUBFOLDERS[name]] + roots
    folders += list(_SYSTEM[name]) if path is None else []
    looked = []
    for folder in folders:
        found = [
            next((f for f in (folder / file, folder / f"{file}.gz") if f.is_file()), None)
            for file in _FILES
        ]
        missing = [file for file, where in zip(_FILES, found, strict=True) if where is None]
        if not missing:
            return [where for where in found if where is not None]
        has_some = f"has no {', '.join(missing)}" if folder.is_dir() else "no such folder"
        looked.append(f"{folder} ({has_some})")
    places = "; ".join(looked) or "no place, as GENJAX_DATA is not set"
    raise DataError(
        f"The files of {name} were not found ({', '.join(_FILES)}; plain or .gz). Looked in: "
        f"{places}. {_HOW[name]}"
    )


def _read(name: str, i: int, file: Path, check_hash: bool) -> np.ndarray:
    """File number i of `_FILES`: checked against its hash, and for being images [N, H, W] or labels
    [N].
    """
    data = read_bytes(file)
    array = parse_idx(
        data, file
    )  # before the hash, because "cut short" says more than "another hash"
    found = hashlib.sha256(data).hexdigest()
    if check_hash and found != _SHA256[name][i]:
        owner = next((other for other, hashes in _SHA256.items() if found in hashes), None)
        raise DataError(
            f"{file}: not the published file of {name}: expected SHA-256 {_SHA256[name][i]} of the "
            "decompressed bytes, "
            f"found {found}{f', which is a file of {owner}' if owner else ''}. Fetch it again, or "
            "say check_hash=False."
        )
    ndim = 3 if "images" in _FILES[i] else 1
    if array.ndim != ndim:
        raise DataError(f"{file}: expected {ndim} axes; found shape {list(array.shape)}.")
    return array
