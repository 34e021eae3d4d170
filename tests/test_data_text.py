"""Text as data: the names of Unicode, files of characters and bytes, streams and lines, their
order, and what is refused.
"""

import gzip
import hashlib
import importlib
import inspect
import itertools
import re
import typing
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_checks import assert_same, rows_at

from genjax import data
from genjax.checks import check_batch
from genjax.errors import ConfigError, DataError
from genjax.protocol import DataSpec, step_mask

MODULE = importlib.import_module("genjax.data.text")  # the package has a function of this name
STREAMS = importlib.import_module("genjax.data.streams")


def tokens_of(windows):
    """The text under overlapping windows [N - T + 1, T]."""
    return np.concatenate([windows[:, 0], windows[-1, 1:]])


def written(tmp_path, content, name="my book.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- unicode_names ------------------------------------------------------------------------------


def test_unicode_names_are_the_same_on_every_python():
    every = MODULE._unicode_names()
    assert len(every) == len(set(every)) == 12_886
    whole = "\n".join(every)
    assert len(whole) == 354_743
    assert "".join(sorted(set(whole))) == "\n -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert max(map(len, every)) == 83
    assert (every[0], every[-1]) == ("SPACE", "CANCEL TAG")
    # This digest stands for the names and their order; the splits hang on it as well as on
    # `permutation`.
    assert hashlib.sha256(whole.encode()).hexdigest() == UNICODE_SHA256


UNICODE_SHA256 = "03ce3aea0397e841afdbafb4f732c6cb6fdca0bdb370d0a9cdbdbdcae33a3ee3"


def test_unicode_names_split_by_name_in_both_layouts():
    lines, stream = data.unicode_names(layout="lines"), data.unicode_names(context=20)
    assert lines.spec.shape == (84,)
    assert stream.spec.shape == (20,)
    assert lines.spec.vocabulary == stream.spec.vocabulary
    assert (lines.spec.levels, lines.spec.end, stream.spec.end, stream.spec.step) == (
        39,
        0,
        None,
        "character",
    )
    splits = [[data.decode(row, lines.spec) for row in batch.x] for batch in lines.load()]
    assert [len(names) for names in splits] == [10_308, 1_289, 1_289]
    assert sorted(itertools.chain(*splits)) == sorted(MODULE._unicode_names())
    windows = stream.load()
    text = data.decode(tokens_of(windows.train.x), stream.spec)
    assert text.split("\n") == splits[0]
    for batch, names in zip(
        windows[1:], splits[1:], strict=True
    ):  # but for the rest that fills no window
        assert "\n".join(names).startswith(data.decode(batch.x.ravel(), stream.spec))
        assert batch.x.size > len("\n".join(names)) - 20


def test_unicode_names_have_classes():
    classes = data.unicode_classes()
    counts = Counter(name.split()[0] for name in MODULE._unicode_names())
    assert len(set(classes)) == len(classes) == 62
    assert classes[-1] == "OTHER"
    assert {"LATIN", "GREEK", "ARABIC"} < set(classes)
    assert [counts[word] for word in classes[:-1]] == sorted(
        (c for c in counts.values() if c >= 40), reverse=True
    )
    source = data.unicode_names(conditional=True, layout="lines")
    assert (source.spec.n_classes, source.spec.class_names) == (62, classes)
    for batch in source.load():
        for row, label in zip(batch.x[:200], batch.cond, strict=False):
            word = data.decode(row, source.spec).split()[0]
            assert classes[label] == word if counts[word] >= 40 else label == 61
    check_batch(source.spec, source.prepare(jax.random.key(0), batch))
    assert data.unicode_names(layout="lines").load().test.cond is None


# --- text files ---------------------------------------------------------------------------------

POEM = "Größe, naïve ☃!\n" * 40


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_a_stream_is_split_by_position(tmp_path, unit):
    path = written(tmp_path, POEM)
    source = data.open_source(path, unit=unit, context=16)
    whole = POEM if unit == "character" else POEM.encode()
    n = len(whole)
    vocabulary = tuple(sorted(set(POEM))) if unit == "character" else tuple(map(chr, range(256)))
    assert source.spec == DataSpec(
        (16,), "tokens", len(vocabulary), vocabulary=vocabulary, step=unit, name="my book"
    )
    assert f"{n * 85 // 100:,} train / " in source.description
    splits = source.load()
    back = data.encode(POEM, vocabulary, "the poem")
    assert back.dtype == np.int32
    np.testing.assert_array_equal(tokens_of(splits.train.x), back[: n * 85 // 100])
    cut = n * 90 // 100
    for batch, part in ((splits.valid, back[n * 85 // 100 : cut]), (splits.test, back[cut:])):
        np.testing.assert_array_equal(batch.x.ravel(), part[: len(part) // 16 * 16])
    for batch in splits:
        assert batch.x.dtype == np.uint8
        check_batch(source.spec, source.prepare(jax.random.key(0), batch))


def test_training_windows_copy_nothing(tmp_path):
    x = data.text(written(tmp_path, POEM), context=16).load().train.x
    assert x.shape == (len(POEM) * 85 // 100 - 15, 16)
    assert x.strides == (1, 1)


def test_more_than_256_characters(tmp_path):
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) * 3
    source = data.text(written(tmp_path, many), context=8)
    train = source.load().train.x
    assert (source.spec.levels, train.dtype) == (300, np.int32)
    assert data.decode(tokens_of(train), source.spec) == many[:765]


def test_line_ends_and_byte_order_mark(tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbfab\r\ncd\r\n" * 1 + b"ba\r\ndc" * 20)
    assert data.text(path, context=2).spec.vocabulary == ("\n", "a", "b", "c", "d")
    assert (
        tokens_of(data.text(path, unit="byte", context=2).load().train.x)[:7].tobytes()
        == b"\xef\xbb\xbfab\r\n"
    )
    lines = data.text(path, unit="byte", layout="lines")
    assert {data.decode(row, lines.spec) for row in lines.load().train.x} <= {
        "ab",
        "cd",
        "ba",
        "dcba",
        "dc",
    }
    (tmp_path / "zipped.txt").write_bytes(gzip.compress(POEM.encode()))
    assert data.text(str(tmp_path / "zipped.txt"), context=4).spec.vocabulary == tuple(
        sorted(set(POEM))
    )


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["character", "byte"])
def test_lines_are_padded_with_their_end(tmp_path, unit):
    items = [f"{'☃' * (i % 5)}\titem {i}" for i in range(50)]
    path = written(tmp_path, "\n\n" + "\n".join(items[:30]) + "\n\n\n" + "\n".join(items[30:]))
    source = data.text(path, unit=unit, layout="lines")
    size = (lambda item: len(item.encode())) if unit == "byte" else len
    assert source.spec.shape == (max(map(size, items)) + 1,)
    assert source.spec.vocabulary is not None
    assert (
        source.spec.vocabulary[source.spec.end] == "\n"
    )  # not the first symbol: a tab comes before it
    splits = source.load()
    assert [len(batch.x) for batch in splits] == [40, 5, 5]
    found = []
    for batch in splits:
        prepared = source.prepare(jax.random.key(0), batch)
        check_batch(source.spec, prepared)
        texts = [data.decode(row, source.spec) for row in batch.x]
        counted = np.asarray(step_mask(source.spec, prepared).sum(axis=1))
        np.testing.assert_array_equal(
            counted, [size(text) + 1 for text in texts]
        )  # the end token counts, what follows does not
        assert all(
            (row[size(text) :] == source.spec.end).all()
            for row, text in zip(batch.x, texts, strict=True)
        )
        found += texts
    assert sorted(found) == sorted(items)
    assert_same(splits, data.text(path, unit=unit, layout="lines").load())


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "the file is empty"),
        (b"\xef\xbb\xbf", {}, "at least 2 different characters; found 0"),
        (b"aaaa", {}, "at least 2 different characters; found 1"),
        (b"caf\xe9 au lait", {}, r"not UTF-8: byte 0xe9 at offset 3 .*unit='byte'"),
        (b"\xef\xbb\xbfok\xff", {}, "byte 0xff at offset 5"),
        (
            "ab" * 630,
            {},
            "text of 1,260 characters is too short for a context of 64: its smallest split has 63. "
            "Take.* 63,",
        ),
        (
            b"ab" * 20,
            {"unit": "byte", "context": 3},
            "40 bytes is too short for a context of 3: its smallest split has 2",
        ),
        (b"ab" * 3, {"context": 1}, r"its smallest split has 0\. Take a longer text\."),
        (b"\n\n\n", {"layout": "lines"}, "at least 2 different characters"),
        (
            b"\n\r\n\n",
            {"layout": "lines", "unit": "byte"},
            "0 lines that are not empty are too few",
        ),
        (
            b"a\nb\n",
            {"layout": "lines"},
            "2 lines that are not empty are too few; expected one each for train, valid and test",
        ),
    ],
)
def test_text_refuses(tmp_path, content, options, message):
    with pytest.raises(DataError, match=rf"my book\.txt: .*{message}"):
        data.open_source(written(tmp_path, content), **options)


def test_text_of_just_the_right_length(tmp_path):
    assert [len(batch.x) for batch in data.text(written(tmp_path, "ab" * 640)).load()] == [
        1025,
        1,
        2,
    ]


def test_text_refuses_options(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: there is no such file"):
        data.text(str(tmp_path / "nowhere.txt"))
    path = written(tmp_path, POEM)
    for options, message in (
        ({"unit": "word"}, "no unit called 'word'"),
        ({"layout": "line"}, r"no layout called 'line'\. Did you mean lines"),
        ({"order": "shuffled"}, r"no order called 'shuffled'\. Did you mean shuffle"),
        ({"layout": "lines", "order": "stream"}, "order='stream' needs layout='stream'"),
        ({"context": 0}, "context must be at least 1; got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.text(path, **options)
    with pytest.raises(ConfigError, match="conditional needs layout='lines'"):
        data.unicode_names(conditional=True)
    with pytest.raises(ConfigError, match="no order called"):
        data.shakespeare(order="random")


def test_paths_choose_their_loader():
    assert data.loader("some/book.txt") is data.text
    assert data.loader("some/music.mat") is data.rolls
    with pytest.raises(DataError, match=r"zzz\.abc is not there; files end in \.npz, \.npy, "):
        data.loader("zzz.abc")
    with pytest.raises(
        ConfigError,
        match=r"'my\.txt' does not take the option 'kind'. It takes: unit, layout, context, order",
    ):
        data.open_source("my.txt", kind="binary")


def test_signature_serves_the_command_line():
    hints = typing.get_type_hints(data.text)
    for name in inspect.signature(data.text).parameters:
        plain = hints[name] in (str, int, str | None)
        assert plain or typing.get_origin(hints[name]) is typing.Literal
        assert re.search(rf"^    {name}: \S", inspect.getdoc(data.text), flags=re.MULTILINE)


# --- encode and decode --------------------------------------------------------------------------


def test_encode_and_decode():
    vocabulary = ("z", "☃", "\n", "a", "\U0001f600")  # in no order, and beyond 16 bits
    spec = DataSpec((6,), "tokens", 5, vocabulary=vocabulary, step="character", end=2)
    tokens = data.encode("a☃z\U0001f600", vocabulary, "the prompt")
    assert tokens.tolist() == [3, 1, 0, 4]
    assert data.decode(tokens, spec) == "a☃z\U0001f600"
    assert data.decode(jnp.array([3, 0, 2, 1, 2]), spec) == "az"
    assert data.decode([2, 3], spec) == data.decode([], spec) == ""
    assert data.encode("", vocabulary, "the prompt").shape == (0,)
    with pytest.raises(
        DataError,
        match=r"^the prompt: the character 'é' \(U\+00E9\) at position 2 is not .* whose 5 symbols",
    ):
        data.encode("☃aé?", vocabulary, "the prompt")
    with pytest.raises(DataError, match=r"'b' \(U\+0062\) at position 0"):
        data.encode("b", vocabulary, "the prompt")
    with pytest.raises(DataError, match=r"U\+DC80"):
        data.encode("\udc80", vocabulary, "the prompt")
    octets = DataSpec((6,), "tokens", 256, vocabulary=MODULE.BYTES, step="byte")
    assert data.encode("é", octets.vocabulary, "here").tolist() == [0xC3, 0xA9]
    assert data.decode([0x61, 0xC3, 0xA9, 0xE2, 0x98], octets) == "aé\ufffd"
    with pytest.raises(ConfigError, match="markov is no text: its spec has no vocabulary"):
        data.decode([0, 1], data.markov().spec)


# --- the order ----------------------------------------------------------------------------------


def test_a_lane_of_a_stream_reads_on():
    text = np.random.default_rng(0).integers(0, 250, 500).astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(text, 7)  # 494 of them
    order = STREAMS.stream_order(7)
    for lane in range(4):
        steps = range(17)  # 119 tokens: a lane of 123 has as many
        read = np.concatenate([windows[order(494, 4, 0, step)[lane]] for step in steps])
        np.testing.assert_array_equal(read, text[lane * 123 :][:119])


@pytest.mark.parametrize(
    ("n", "context", "batch_size"),
    [(1, 1, 1), (7, 3, 2), (1000, 64, 12), (2**26 - 1, 64, 12), (2**31 - 1, 2, 3)],
)
def test_order_of_a_stream_is_exact_on_host_and_device(n, context, batch_size):
    order = STREAMS.stream_order(context)
    steps = [0, 1, 2, n - 1, n, 999_983, 2**31 - 2, 2**31 - 1]
    steps = [step for step in steps if step < 2**31]
    exact = np.array(
        [
            [(b * (n // batch_size) + step * context) % n for b in range(batch_size)]
            for step in steps
        ]
    )
    host = np.stack([order(n, batch_size, 0, step) for step in steps])
    assert isinstance(host, np.ndarray)
    assert host.dtype == np.int32
    np.testing.assert_array_equal(host, exact)
    device = jax.jit(jax.vmap(lambda seed, step: order(n, batch_size, seed, step), (None, 0)))(
        3, jnp.array(steps, jnp.int32)
    )
    assert device.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(device), exact)


def test_order_of_a_stream_is_that_of_its_batches(tmp_path):
    source = data.text(written(tmp_path, POEM), context=16, order="stream")
    train = source.load().train
    batch = jax.jit(data.batch_at(source, 3, 0))
    for step in (0, 5, 10_000):
        host = rows_at(source, train, 3, 0, step)
        assert_same(
            data.prepare_at(source, 0)(host, step),
            batch(jax.tree.map(jnp.asarray, train), jnp.int32(step)),
        )
        start = (np.arange(3) * (len(train.x) // 3) + 16 * step) % len(train.x)
        np.testing.assert_array_equal(host.x, train.x[start])
    assert data.text(written(tmp_path, POEM), context=16).order is data.batch_indices


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 11, 0, 0), DataError, "batch_size=11 is more than the 10 windows"),
        ((10, 0, 0, 0), ConfigError, "batch_size must be at least 1; got 0"),
        ((2**26, 2, 0, 0), ConfigError, re.escape("windows * context < 2**32; got 67108864 * 64")),
    ],
)
def test_order_of_a_stream_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        STREAMS.stream_order(64)(*arguments)


# --- published files ----------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with the files of shakespeare and names: their formats and symbols, but other texts,
    whose hashes count.
    """
    rng = np.random.default_rng(0)
    monkeypatch.delenv("GENJAX_DATA", raising=False)
    play = "".join(rng.choice(MODULE._SHAKESPEARE, 4000))
    lengths = rng.permutation(np.arange(32_033) % 14 + 2)
    names = ["".join(map(chr, 97 + rng.integers(0, 26, length))) for length in lengths]
    for file, content, constant in (
        ("tinyshakespeare/input.txt", play, "_SHAKESPEARE_SHA256"),
        ("names/names.txt", "\n".join(names), "_NAMES_SHA256"),
    ):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(content)
        monkeypatch.setattr(MODULE, constant, hashlib.sha256(content.encode()).hexdigest())
    return tmp_path, play, names


@pytest.mark.slow
def test_published_texts_are_read(published, monkeypatch):
    folder, play, names = published
    monkeypatch.setenv("GENJAX_DATA", str(folder))
    source = data.open_source("shakespeare", context=32)
    splits = source.load()
    assert source.spec.levels == 65
    assert data.decode(tokens_of(splits.train.x), source.spec) == play[:3400]
    assert play[3600:].startswith(data.decode(splits.test.x.ravel(), source.spec))
    source = data.open_source("names")
    assert source.spec == DataSpec(
        (16,),
        "tokens",
        27,
        vocabulary=tuple("\nabcdefghijklmnopqrstuvwxyz"),
        step="character",
        end=0,
        name="names",
    )
    splits = source.load()
    assert [len(batch.x) for batch in splits] == [30_033, 1_000, 1_000]
    assert sorted(data.decode(row, source.spec) for batch in splits for row in batch.x) == sorted(
        names
    )
    check_batch(source.spec, source.prepare(jax.random.key(0), splits.test))


def test_published_texts_are_found(published, monkeypatch):
    folder, _, _ = published
    with pytest.raises(
        DataError,
        match=r"file of names was not found \(names/names.txt.*GENJAX_DATA is not set\. Set GENJAX",
    ):
        data.names().load()
    monkeypatch.setenv("GENJAX_DATA", str(folder / "nowhere"))
    with pytest.raises(
        DataError, match=r"file of shakespeare was not found.*Looked in \S+nowhere\."
    ):
        data.shakespeare().load()
    for path in (folder, folder / "names", folder / "names" / "names.txt"):
        assert len(data.names(path=str(path)).load().test.x) == 1000
    zipped = folder / "names.txt.gz"
    zipped.write_bytes(gzip.compress((folder / "names" / "names.txt").read_bytes()))
    (folder / "names" / "names.txt").unlink()
    assert (
        len(data.names(path=str(folder)).load().test.x)
        == len(data.names(path=str(zipped)).load().test.x)
        == 1000
    )
    with pytest.raises(DataError, match="was not found"):  # an explicit path is the only place
        data.shakespeare(path=str(folder / "names")).load()


def test_published_texts_are_the_published_ones(published):
    folder, _, _ = published
    file = folder / "names" / "names.txt"
    file.write_text(file.read_text() + "\nzz")
    with pytest.raises(
        DataError,
        match=r"names\.txt: not the published file of names: "
        r"expected SHA-256 \w{64} .*found \w{64}\.",
    ):
        data.names(path=str(folder)).load()
