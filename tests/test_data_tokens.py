"""Token ids of one's own: streams in .bin and .npy files, sequences, and their vocabularies."""

import json
import pickle
import re
import shlex
import subprocess

import numpy as np
import pytest

import genjax.cli
from genjax.data import arrays, decode, open_source, table, token_stream
from genjax.errors import ConfigError, DataError

IDS = np.random.default_rng(0).integers(0, 7, 600)


def stream(folder, ids=IDS, name="mine.bin", dtype="<u2"):
    path = folder / name
    ids.astype(dtype).tofile(path)
    return str(path)


def saved(folder, name="mine.npz", **given):
    path = str(folder / name)
    np.savez(path, **given)
    return path


@pytest.mark.parametrize(("name", "dtype"), [("a.bin", "uint16"), ("a.BIN", "uint32")])
def test_a_stream_stays_on_the_disk_and_is_split_by_position(tmp_path, name, dtype):
    path = stream(tmp_path, name=name, dtype=dtype)
    source = open_source(path, context=8, dtype=dtype)
    spec = source.spec
    assert (spec.shape, spec.kind, spec.levels, spec.step) == ((8,), "tokens", 7, "token")
    train, valid, test = (batch.x for batch in source.load())
    np.testing.assert_array_equal(train[:, 0], IDS[:503])
    np.testing.assert_array_equal(valid.ravel(), IDS[510:534])
    np.testing.assert_array_equal(test.ravel(), IDS[540:596])
    owner = train
    while owner.base is not None and not isinstance(owner, np.memmap):
        owner = owner.base
    assert isinstance(owner, np.memmap)
    assert source.files == (path,)


def test_a_training_file_has_its_validation_file_beside_it(tmp_path):
    path = stream(tmp_path, name="train.bin")
    stream(tmp_path, IDS[:32], "val.bin")
    train, valid, test = (batch.x for batch in token_stream(path, context=16).load())
    assert len(train) == 585
    np.testing.assert_array_equal(np.concatenate([valid, test]).ravel(), IDS[:32])


VOCABULARIES = [
    list("abcdefg"),
    {"itos": list("abcdefg")},
    {"itos": {str(n): "abcdefg"[n] for n in range(7)}, "vocab_size": 7},
    {"stoi": {"abcdefg"[n]: n for n in range(7)}},
    {"abcdefg"[n]: n for n in reversed(range(7))},
]


@pytest.mark.parametrize("value", VOCABULARIES)
@pytest.mark.parametrize("name", ["vocabulary.json", "meta.json"])
def test_symbols_beside_the_ids_make_them_text(tmp_path, name, value):
    path = stream(tmp_path)
    (tmp_path / name).write_text(json.dumps(value))
    source = token_stream(path, context=8)
    assert source.files == (path, str(tmp_path / name))
    text = decode(source.load().train.x[0], source.spec)
    assert text == "".join("abcdefg"[n] for n in IDS[:8])
    with pytest.raises(ConfigError, match=r"--vocab-size 9 and .*, which has 7 tokens"):
        token_stream(path, context=8, vocab_size=9)


def test_symbols_that_are_no_text_still_say_how_many_there_are(tmp_path):
    path = stream(tmp_path)
    for value in (["ab", *"bcdefgh"], {"vocab_size": 8}):
        (tmp_path / "meta.json").write_text(json.dumps(value))
        source = token_stream(path, context=8)
        assert (source.spec.levels, source.spec.vocabulary) == (8, None)
        assert any("samples are ids" in note for note in source.notes)


def test_half_a_surrogate_is_no_symbol(tmp_path):
    path = stream(tmp_path)
    (tmp_path / "vocabulary.json").write_text(json.dumps(["\ud800", *"bcdefg"]))
    source = token_stream(path, context=8)
    assert (source.spec.levels, source.spec.vocabulary) == (7, None)


def test_arrays_of_objects_say_that_they_are_never_unpickled(tmp_path):
    path = str(tmp_path / "mine.npy")
    np.save(path, np.array([[1], [2, 3]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"never unpickled. Save arrays of plain numbers"):
        arrays(path, kind="tokens", context=8)


def test_other_json_beside_the_ids(tmp_path):
    path = stream(tmp_path)
    for content in ("{", '{"author": "me"}', "[1, 2]"):
        (tmp_path / "meta.json").write_text(content)
        source = token_stream(path, context=8)
        assert source.spec.levels == 7
        said = any("meta.json cannot be read as JSON" in note for note in source.notes)
        assert said == (content == "{")
    (tmp_path / "meta.json").write_text("{")
    (tmp_path / "meta.pkl").write_bytes(b"")
    (note,) = (one for one in token_stream(path, context=8).notes if "meta.json" in one)
    assert "cannot be read as JSON" in note
    assert "meta.pkl is not read" in note
    for content, match in (("{", "cannot be read as JSON"), ('{"a": 3}', "expected a list of")):
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(DataError, match=match):
            token_stream(path, context=8)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_a_pickle_is_never_read(tmp_path):
    path = stream(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(_Trap()))
    source = token_stream(path, context=8, vocab_size=50_257)
    assert source.spec.levels == 50_257
    assert any("meta.pkl is not read" in note for note in source.notes)


def test_ids_outside_the_vocabulary_are_named_by_position(tmp_path):
    ids = IDS.copy()
    ids[545] = 9
    with pytest.raises(DataError, match=r"test part has the id 9 at position 5, .* from 0 to 6"):
        token_stream(stream(tmp_path, ids), context=8, vocab_size=7)
    x = IDS.reshape(-1, 6).copy()
    x[:, 2] = -1
    with pytest.raises(DataError, match=r"the id -1 at position \[0, 2\]"):
        arrays(saved(tmp_path, x=x), kind="tokens")
    path = saved(tmp_path, x=IDS.reshape(-1, 6))
    with pytest.raises(DataError, match=r"from 0 to 4\. .*\(--levels N\)"):
        arrays(path, kind="tokens", levels=5)


def test_what_is_no_stream(tmp_path):
    path = tmp_path / "mine.bin"
    zeros = np.stack([IDS, 0 * IDS], 1).astype("<u2").tobytes()
    for content, match in (
        (b"", "the file is empty"),
        (IDS.astype("<u2").tobytes()[:-1], "1,199 bytes are no whole number of uint16 ids"),
        (b"\x1f\x8b" + bytes(8), r"compressed by gzip: unpack it \(gunzip\)"),
        (b"\x93NUMPY\x01\x00", r"this is a .npy file: name it so"),
        (zeros, r'--data.dtype uint32 \(in Python dtype="uint32"\) reads those'),
        (b'{"text": "hello"}\r\n' * 99, r"this is text. Name it .txt, or .jsonl"),
        (IDS[:40].astype("<u2").tobytes(), "too short for a context of 8"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=match):
            token_stream(str(path), context=8)
    path.unlink()
    with pytest.raises(DataError, match="there is no such file"):
        token_stream(str(path))


WIDE = np.random.default_rng(1).integers(0, 199_000, 600)


@pytest.mark.parametrize(
    ("ids", "written", "dtype", "match"),
    [
        (IDS, "<i8", "uint16", "in 8 bytes .*uint16, or as uint32 and give --data.dtype uint32"),
        (IDS, "<i8", "uint32", "in 8 bytes"),
        (WIDE, "<i8", "uint16", "in 8 bytes"),
        (IDS, "<u4", "uint16", "every second number is 0, .* in 4 bytes: --data.dtype uint32"),
        (WIDE, "<u4", "uint16", "every second number is 3 or less, .* in 4 bytes"),
        (IDS, ">u2", "uint16", "big-endian. Save them little-endian: numpy's '<u2'"),
        (WIDE, ">u4", "uint32", "big-endian. Save them little-endian: numpy's '<u4'"),
    ],
)
def test_ids_of_another_width_or_order_are_not_trained_on(tmp_path, ids, written, dtype, match):
    with pytest.raises(DataError, match=match):
        token_stream(stream(tmp_path, ids, dtype=written), context=8, dtype=dtype)


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        (np.zeros(600, int), "uint32"),  # begins with padding
        (np.stack([WIDE % 2**15, IDS], 1).ravel(), "uint16"),  # pairs, each from a few and many
        (256 * IDS + (np.arange(600) == 70), "uint16"),
        (WIDE, "uint32"),
    ],
)
def test_unlikely_ids_of_the_width_that_was_said_are_read(tmp_path, ids, dtype):
    train = token_stream(stream(tmp_path, ids, dtype=dtype), context=8, dtype=dtype).load().train
    np.testing.assert_array_equal(train.x[:, 0], ids[: len(train.x)])


@pytest.mark.parametrize(
    ("magic", "dtype", "match"),
    [(20240520, "uint16", "llm.c"), (20240801, "uint32", "and give --data.dtype uint32")],
)
def test_a_header_before_the_ids_is_told_and_can_be_taken_off(tmp_path, magic, dtype, match):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(IDS)
    path = tmp_path / "FILE.bin"
    path.write_bytes(header.tobytes() + IDS.astype(dtype).tobytes())
    with pytest.raises(DataError, match=match) as caught:
        token_stream(str(path), context=8)
    (advised,) = re.findall(r"\((tail .*?)\)", str(caught.value))
    subprocess.run(advised, shell=True, cwd=tmp_path, check=True)
    train = token_stream(str(tmp_path / "ids.bin"), context=8, dtype=dtype).load().train
    np.testing.assert_array_equal(train.x[:, 0], IDS[:503])


def test_sequences_of_ids_with_classes(tmp_path):
    x, y = IDS.reshape(-1, 6), np.arange(100) % 3
    (tmp_path / "vocabulary.json").write_text(json.dumps(list("abcdefg")))
    source = arrays(saved(tmp_path, x=x, y=y), conditional=True, kind="tokens")
    spec = source.spec
    assert (spec.kind, spec.levels, spec.n_classes, spec.text) == ("tokens", 7, 3, True)
    by_row = dict(zip((bytes(row.astype("u1")) for row in x), y, strict=True))
    train = source.load().train
    assert [by_row[bytes(row)] for row in train.x] == train.cond.tolist()


def test_a_long_array_of_ids_is_a_stream(tmp_path):
    path = str(tmp_path / "mine.npy")
    np.save(path, IDS)
    train = arrays(path, context=8, kind="tokens").load().train.x
    np.testing.assert_array_equal(train[:, 0], IDS[:503])
    with pytest.raises(DataError, match=r"one long stream \[T\] with --context 64.*found \[600\]"):
        arrays(path, kind="tokens")
    with pytest.raises(DataError, match="--kind tokens --context 64"):
        arrays(path)
    np.save(path, IDS * 1.0)
    with pytest.raises(DataError, match="token ids must be whole numbers; found float64"):
        arrays(path, context=8, kind="tokens")
    for content in (b"", b"\x93NUMPY\x01\x00", b"words"):
        (tmp_path / "mine.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"damaged|not a \.npz or \.npy file"):
            arrays(path, context=8, kind="tokens")


def test_a_table_has_no_tokens(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n" + "1,2\n" * 9)
    with pytest.raises(ConfigError, match="--kind tokens is for token ids in"):
        table(str(tmp_path / "a.csv"), kind="tokens")


@pytest.mark.slow
@pytest.mark.parametrize("row", ["transformer", "gru"])
def test_a_stream_is_trained_on_and_sampled(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    stream(tmp_path)
    (tmp_path / "vocabulary.json").write_text(json.dumps(list("abcdefg")))
    small = "--data mine.bin --context 8 --steps 4 --batch-size 4 --warmup-steps 0 --out here"
    kind = {"transformer": "--d-model 16 --n-layers 1 --n-heads 2", "gru": "--lanes 4"}
    genjax.cli.main(["train", row, *small.split(), *kind[row].split()])
    genjax.cli.main(["sample", "here", "--n", "2", "--prompt", "abc"])
    assert "abc" in next((tmp_path / "here").glob("samples/*prompt*.txt")).read_text()


def test_a_batch_of_cifar_is_no_stream_of_ids(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "my pictures"
    folder.mkdir()
    records = rng.integers(0, 256, (40, 3073)).astype(np.uint8)
    records[:, 0] = np.arange(40) % 10
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records.tofile(folder / name)
    with pytest.raises(DataError, match=r"CIFAR's pictures.*--data") as caught:
        open_source(str(folder / "data_batch_1.bin"), vocab_size=2**16)
    (advised,) = shlex.split(str(caught.value).rpartition("--data ")[2])
    assert open_source(advised).spec.shape == (32, 32, 3)
