"""Piano rolls: MATLAB files in their true format, what is refused of them, and rolls written as
MIDI and read back.

And the digits as sequences of rows.
"""

import hashlib

import jax
import mido
import numpy as np
import pytest
import scipy.io

from genjax import data
from genjax.checks import check_batch
from genjax.data import music
from genjax.errors import CheckpointError, ConfigError, DataError
from genjax.protocol import DataSpec, step_mask


def pieces(*lengths, seed=0):
    """Random rolls in a cell array, as MATLAB stores them."""
    rng = np.random.default_rng(seed)
    cells = np.empty((1, len(lengths)), object)
    for i, length in enumerate(lengths):
        cells[0, i] = (rng.random((length, 88)) < 0.1).astype(np.uint8)
    return cells


def three(**instead):
    return {
        "traindata": pieces(5, 9, 7),
        "validdata": pieces(11, seed=1),
        "testdata": pieces(4, 1, seed=2),
        **instead,
    }


def written(tmp_path, content, **options):
    path = tmp_path / "mine.mat"
    scipy.io.savemat(path, content, **options)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_rolls_are_read_and_padded(tmp_path, compressed):
    content = three()
    path = written(tmp_path, content, do_compression=compressed)
    source = data.open_source(path)
    assert data.loader(path) is data.rolls
    # The longest of all splits, which is in the validation set here.
    assert source.spec == DataSpec((11, 88), "binary", step="frame", lengths=True, name="mine")
    assert (
        source.description == f"3 train / 1 valid / 2 test pieces of up to 11 frames, from {path}"
    )
    for batch, key in zip(source.load(), ("traindata", "validdata", "testdata"), strict=True):
        assert (batch.x.dtype, batch.length.dtype) == (np.uint8, np.int32)
        for x, length, piece in zip(batch.x, batch.length, content[key][0], strict=True):
            assert length == len(piece)
            np.testing.assert_array_equal(x[:length], piece)
            assert not x[length:].any()
        prepared = source.prepare(jax.random.key(0), batch)
        check_batch(source.spec, prepared)
        np.testing.assert_array_equal(
            np.asarray(step_mask(source.spec, prepared)).sum(axis=1), batch.length
        )


def test_rolls_of_other_number_types(tmp_path):
    content = three(testdata=pieces(6))
    content["traindata"][0, 0] = content["traindata"][0, 0].astype(
        float
    )  # as MATLAB itself would have them
    content["validdata"][0, 0] = content["validdata"][0, 0].astype(bool)
    source = data.rolls(written(tmp_path, content))
    np.testing.assert_array_equal(
        source.load().train.x[0, :5], content["traindata"][0, 0].astype(np.uint8)
    )


def odd(cell):
    cells = pieces(5, 9)
    cells[0, 1] = cell
    return cells


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"x": np.zeros(3)},
            "cell arrays traindata, validdata, testdata; found x, so traindata, validdata, "
            "testdata is missing",
        ),
        ({key: three()[key] for key in ("traindata", "testdata")}, "so validdata is missing"),
        ({}, "found nothing"),
        (
            three(traindata=np.zeros((5, 9, 88))),
            r"traindata must be a cell array of matrices .*float64\[5, 9, 88\].*unequal length",
        ),
        (
            three(validdata=odd(np.zeros((9, 89)))),
            r"piece 1 of validdata must have the shape \[T, 88\].*found \[9, 89\]",
        ),
        (three(validdata=odd(np.zeros((88, 9)))), r"found \[88, 9\]"),
        (
            three(validdata=odd(np.zeros((0, 88)))),
            "piece 1 of validdata is empty: shape .*Leave such pieces out",
        ),
        (
            three(testdata=odd(np.full((9, 88), 2))),
            "piece 1 of testdata must hold 0 and 1 only; found values from 2 to 2",
        ),
        (
            three(testdata=odd(np.full((9, 88), np.nan))),
            "must hold 0 and 1 only; found values from nan",
        ),
        (
            three(testdata=odd("do re mi")),
            "piece 1 of testdata must be a matrix of numbers; found <U8",
        ),
        (three(testdata=np.empty((1, 0), object)), r"testdata (is empty|must be a cell array)"),
    ],
)
def test_rolls_refuse(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"mine\.mat: {message}|mine\.mat: .*{message}"):
        data.rolls(written(tmp_path, content))


@pytest.mark.slow
def test_rolls_refuse_damage(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.mat: there is no such file"):
        data.rolls(str(tmp_path / "nowhere.mat"))
    whole = (
        (tmp_path / "mine.mat").read_bytes()
        if written(tmp_path, three(), do_compression=True)
        else b""
    )
    for content in (
        b"",
        b"not a file of MATLAB's" * 10,
        whole[: len(whole) // 2],
        whole[:400] + b"\0\0\0\0" + whole[404:],
    ):
        (tmp_path / "bad.mat").write_bytes(content)
        with pytest.raises(
            DataError,
            match=r"bad\.mat: (not a MATLAB file, or damaged \(|expected the cell arrays)",
        ):
            data.rolls(str(tmp_path / "bad.mat"))
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (tmp_path / "bad.mat").write_bytes(header.ljust(512, b"\0"))
    with pytest.raises(
        DataError,
        match=r"bad\.mat: a MATLAB file of version 7\.3, which cannot be read\. Save it with -v7",
    ):
        data.rolls(str(tmp_path / "bad.mat"))


def test_jsb(tmp_path, monkeypatch):
    """A file in the format of the published one, whose hash is made to count."""
    spec = DataSpec((160, 88), "binary", step="frame", lengths=True, name="jsb")
    assert data.open_source("jsb").spec == spec  # without a file
    monkeypatch.delenv("GENJAX_DATA", raising=False)
    with pytest.raises(DataError, match=r"file of jsb was not found \(poly_music/JSB_Chorales.mat"):
        data.jsb().load()
    folder = tmp_path / "poly_music"
    folder.mkdir()
    content = three(testdata=pieces(160, 25))
    (folder / "JSB_Chorales.mat").write_bytes(
        (written(tmp_path, content) and tmp_path / "mine.mat").read_bytes()
    )
    with pytest.raises(
        DataError,
        match=r"not the published file of jsb: .*a file of your own is opened by its path",
    ):
        data.jsb(path=str(tmp_path)).load()
    monkeypatch.setattr(
        music, "_SHA256", hashlib.sha256((folder / "JSB_Chorales.mat").read_bytes()).hexdigest()
    )
    monkeypatch.setenv("GENJAX_DATA", str(tmp_path))
    source = data.jsb()
    splits = source.load()
    assert [batch.x.shape for batch in splits] == [(3, 160, 88), (1, 160, 88), (2, 160, 88)]
    np.testing.assert_array_equal(splits.test.x[0], content["testdata"][0, 0])
    check_batch(spec, source.prepare(jax.random.key(0), splits.test))


# --- MIDI ---------------------------------------------------------------------------------------


def read_back(path, seconds_per_frame):
    """The roll in a MIDI file, from the times of its messages in seconds; and the file's length in
    seconds.
    """
    file = mido.MidiFile(path)
    frames = round(file.length / seconds_per_frame)
    roll = np.zeros((frames, 88), int)
    now, since = 0.0, {}
    for message in file:
        now += message.time
        if message.type == "note_on":
            assert message.note not in since
            since[message.note] = now
        if message.type == "note_off":
            start, stop = (
                round(time / seconds_per_frame) for time in (since.pop(message.note), now)
            )
            roll[start:stop, message.note - 21] = 1
    assert not since
    return roll, file.length


@pytest.mark.parametrize("frames_per_second", [2.0, 0.5, 7.5])
def test_midi_gives_the_roll_back(tmp_path, frames_per_second):
    roll = pieces(40)[0, 0]
    roll[:, [0, 87]] = 1  # A0 and C8 all the time
    roll[35:] = 0  # the end is silent, and still there
    path = tmp_path / "folder" / "piece.mid"
    data.midi(roll, path, frames_per_second)
    assert (
        path.read_bytes()[:14] == b"MThd\0\0\0\x06\0\0\0\x01\x01\xe0"
    )  # one track, 480 ticks a quarter
    found, length = read_back(path, 1 / frames_per_second)
    np.testing.assert_array_equal(found, roll)
    assert length == pytest.approx(40 / frames_per_second, rel=1e-5)
    data.midi(roll.astype(np.float32), tmp_path / "again.mid", frames_per_second)
    assert (tmp_path / "again.mid").read_bytes() == path.read_bytes()


def test_midi_holds_notes_and_ends_them_first(tmp_path):
    roll = np.zeros((4, 88))
    roll[0:2, 39] = 1  # middle C, then the D above it
    roll[2, 41] = 1
    data.midi(roll, tmp_path / "two.mid")
    notes = [
        (m.type, m.note, m.time)
        for m in mido.MidiFile(tmp_path / "two.mid").tracks[0]
        if not m.is_meta
    ]
    assert notes == [
        ("note_on", 60, 0),
        ("note_off", 60, 960),
        ("note_on", 62, 0),
        ("note_off", 62, 480),
    ]


def test_midi_refuses(tmp_path):
    for roll, message in (
        (np.zeros((3, 87)), r"must have the shape \[T, 88\]; got \[3, 87\]"),
        (np.zeros((2, 3, 88)), r"got \[2, 3, 88\]\. Write one piece at a time"),
        (np.full((3, 88), 0.5), "0 and 1 only"),
    ):
        with pytest.raises(DataError, match=message):
            data.midi(roll, tmp_path / "bad.mid")
    for rate in (0.0, -1.0, 0.01, 1e9, float("nan")):
        with pytest.raises(ConfigError, match=r"frames_per_second must be from 0\.06"):
            data.midi(np.zeros((3, 88)), tmp_path / "bad.mid", rate)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Could not write \S+bad\.mid"):
        data.midi(np.zeros((3, 88)), tmp_path / "file" / "bad.mid")
    assert not (tmp_path / "bad.mid").exists()


# --- digit rows ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("binarize", ["none", "threshold", "dynamic"])
def test_digit_rows_are_the_digits(binarize):
    rows, digits = data.digit_rows(True, binarize), data.digits(True, binarize)
    levels = 17 if binarize == "none" else None
    kind = "discrete" if binarize == "none" else "binary"
    assert rows.spec == DataSpec(
        (8, 8), kind, levels=levels, n_classes=10, step="row", name="digit_rows"
    )
    assert rows.description.startswith("1,257 train / 180 valid / 360 test images as 8 rows")
    key = jax.random.key(0)
    for batch, image in zip(rows.load(), digits.load(), strict=True):
        prepared = rows.prepare(key, batch)
        check_batch(rows.spec, prepared)
        np.testing.assert_array_equal(prepared.cond, image.cond)
        if binarize != "dynamic":
            np.testing.assert_array_equal(
                prepared.x, np.asarray(digits.prepare(key, image).x)[..., 0]
            )
    assert data.digit_rows().spec.n_classes is None
    with pytest.raises(ConfigError, match="no binarization called"):
        data.digit_rows(binarize="random")


def test_digit_pixels_are_the_digits():
    pixels, digits = data.digit_pixels(True), data.digits(True)
    assert pixels.spec == DataSpec(
        (64,), "tokens", levels=17, n_classes=10, step="pixel", name="digit_pixels"
    )
    key = jax.random.key(0)
    for batch, image in zip(pixels.load(), digits.load(), strict=True):
        prepared = pixels.prepare(key, batch)
        check_batch(pixels.spec, prepared)
        np.testing.assert_array_equal(prepared.cond, image.cond)
        np.testing.assert_array_equal(prepared.x, image.x.reshape(-1, 64))


@pytest.mark.slow
@pytest.mark.parametrize(("at", "bit"), [(144, 2), (209, 3), (236, 0)])
def test_a_file_that_crashes_its_reader_does_not_crash_this_process(tmp_path, at, bit):
    """One bit, at which scipy's reader goes by a null pointer: the process it is in ends with
    signal 11.
    """
    piece = np.zeros((2, 88), np.uint8)
    cells = np.empty((1, 2), object)
    cells[0, 0] = cells[0, 1] = piece
    path = tmp_path / "x.mat"
    names = ("traindata", "validdata", "testdata")
    scipy.io.savemat(path, dict.fromkeys(names, cells))
    assert music.rolls(str(path)).spec.shape == (2, 88)
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DataError, match="not a MATLAB file, or damaged"):
        music.rolls(str(path))
