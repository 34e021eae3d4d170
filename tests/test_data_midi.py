"""MIDI files as piano rolls: there and back, and what is refused."""

import mido
import numpy as np
import pytest

from genjax.data import midi, open_source
from genjax.data.midi_files import roll_of
from genjax.errors import DataError

RNG = np.random.default_rng(0)


def piece(n=20):
    roll = RNG.integers(0, 2, (n, 88)).astype(np.uint8)
    roll[0, 40] = roll[-1, 40] = 1
    return roll


def test_a_roll_that_was_written_is_read_again(tmp_path):
    roll = piece()
    midi(roll, tmp_path / "a.mid")
    np.testing.assert_array_equal(roll_of(tmp_path / "a.mid", 1), roll)
    finer = roll_of(tmp_path / "a.mid", 4)
    np.testing.assert_array_equal(finer, np.repeat(roll, 4, axis=0))


def test_a_folder_of_pieces(tmp_path):
    (tmp_path / "songs" / "more").mkdir(parents=True)
    rolls = [piece(n) for n in (5, 9, 12, 7)]
    for index, roll in enumerate(rolls):
        where = tmp_path / "songs" / ("more" if index % 2 else "")
        midi(roll, where / f"{index}.{'MID' if index == 0 else 'mid'}")
    source = open_source(str(tmp_path / "songs"), frames_per_quarter=1)
    assert (source.spec.shape, source.spec.lengths, source.spec.step) == ((12, 88), True, "frame")
    found = {
        x[:n].tobytes()
        for batch in source.load()
        for x, n in zip(batch.x, batch.length, strict=True)
    }
    assert found == {roll.tobytes() for roll in rolls}
    assert "a frame is 1/1 of a quarter note" in "; ".join(source.notes)
    windows = open_source(str(tmp_path / "songs"), frames_per_quarter=1, context=4)
    assert windows.spec.shape == (4, 88)
    assert sum(int(batch.length.sum()) for batch in windows.load()) == 33


def test_one_file_is_cut_into_windows(tmp_path):
    midi(piece(40), tmp_path / "a.mid")
    source = open_source(str(tmp_path / "a.mid"), frames_per_quarter=1)
    assert sum(int(batch.length.sum()) for batch in source.load()) == 40
    assert source.files == (str(tmp_path / "a.mid"),)


def written(path, messages, **file):
    track = mido.MidiTrack(messages)
    mido.MidiFile(tracks=[track], **file).save(path)
    return path


def test_notes_of_every_kind(tmp_path):
    note = mido.Message
    path = written(
        tmp_path / "a.mid",
        [
            note("note_on", note=60, velocity=9, time=480),
            note("note_on", note=64, velocity=9, time=0),
            note("note_on", note=60, velocity=0, time=480),  # which ends it
            note("note_on", note=5, velocity=9, time=0),  # below a piano
            note("note_on", channel=9, note=50, velocity=9, time=0),  # a drum
            note("note_on", note=72, velocity=9, time=0),  # shorter than a frame
            note("note_off", note=72, time=1),
            note("note_on", note=61, velocity=9, time=479),  # never ends
            note("program_change", program=3, time=480),
        ],
        ticks_per_beat=480,
    )
    roll = roll_of(path, 1)  # which begins with the first note
    keys = {key + 21: np.flatnonzero(roll[:, key]).tolist() for key in np.flatnonzero(roll.any(0))}
    assert keys == {60: [0], 64: [0, 1, 2], 72: [1], 61: [2]}


def test_what_is_no_music(tmp_path):
    for content in (b"", b"no music", b"MThd\x00\x00\x00\x06\x00\x01"):
        (tmp_path / "a.mid").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.mid: not a MIDI file, or damaged"):
            open_source(str(tmp_path / "a.mid"))
    with pytest.raises(DataError, match="there is no such file"):
        open_source(str(tmp_path / "none.mid"))
    silent = written(tmp_path / "silent.mid", [mido.Message("program_change", program=1)])
    with pytest.raises(DataError, match="has no notes"):
        open_source(str(silent))
    whole = (tmp_path / "b.mid", piece())
    midi(whole[1], whole[0])
    data = whole[0].read_bytes()
    whole[0].write_bytes(data[:30])
    with pytest.raises(DataError, match=r"b\.mid: not a MIDI file, or damaged"):
        open_source(str(whole[0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_source(str(tmp_path / "empty"))


def test_a_bad_file_is_named_and_may_be_left_out(tmp_path):
    (tmp_path / "songs").mkdir()
    for index in range(4):
        midi(piece(6), tmp_path / "songs" / f"{index}.mid")
    (tmp_path / "songs" / "bad.mid").write_bytes(b"MThd")
    with pytest.raises(DataError, match=r"bad\.mid: not a MIDI file"):
        open_source(str(tmp_path / "songs"))
    source = open_source(str(tmp_path / "songs"), skip_bad=True)
    assert "left out 1 files" in "; ".join(source.notes)


def parts_of(source):
    """The frames of each part of the split one after the other, without the padding."""
    return [
        np.concatenate([x[:n] for x, n in zip(batch.x, batch.length, strict=True)])
        for batch in source.load()
    ]


def numbered(number, n):
    """A piece of which every frame says which piece it is of, and at which place."""
    roll = np.zeros((n, 88), np.uint8)
    roll[:, number] = 1
    roll[np.arange(n), 20 + np.arange(n)] = 1
    return roll


def test_no_piece_has_windows_in_two_parts_of_the_split(tmp_path):
    (tmp_path / "songs").mkdir()
    for index in range(10):
        midi(numbered(index, 12), tmp_path / "songs" / f"{index}.mid")
    settings = {"frames_per_quarter": 1, "context": 4}
    source = open_source(str(tmp_path / "songs"), **settings)
    assert [len(batch.x) for batch in source.load()] == [24, 3, 3]
    of_each = [np.flatnonzero(frames[:, :20].any(0)).tolist() for frames in parts_of(source)]
    assert [len(pieces) for pieces in of_each] == [8, 1, 1]
    assert sorted(np.concatenate(of_each)) == list(range(10))


@pytest.mark.parametrize("n_pieces", [1, 2])
def test_few_pieces_are_split_by_position(tmp_path, n_pieces):
    (tmp_path / "songs").mkdir()
    for index in range(n_pieces):
        midi(numbered(index, 40), tmp_path / "songs" / f"{index}.mid")
    where = tmp_path / "songs" / ("0.mid" if n_pieces == 1 else "")
    for frames, begin, end in zip(
        parts_of(open_source(str(where), frames_per_quarter=1)),
        (0, 32, 36),
        (32, 36, 40),
        strict=True,
    ):
        wanted = [numbered(index, 40)[begin:end] for index in range(n_pieces)]
        np.testing.assert_array_equal(frames, np.concatenate(wanted))


def test_a_piece_too_short_to_split_is_told(tmp_path):
    midi(numbered(0, 2), tmp_path / "a.mid")
    with pytest.raises(DataError, match=r"a\.mid: 2 frames are too few to split; expected at l"):
        open_source(str(tmp_path / "a.mid"), frames_per_quarter=1)
    assert len(parts_of(open_source(str(tmp_path / "a.mid"), frames_per_quarter=2))) == 3


def test_pieces_in_linked_folders_are_read_and_in_hidden_ones_are_not(tmp_path):
    for folder, n in (("songs", 2), ("other", 2), ("songs/.trash", 1)):
        (tmp_path / folder).mkdir()
        for index in range(n):
            midi(piece(6), tmp_path / folder / f"{index}.mid")
    (tmp_path / "songs" / "more").symlink_to(tmp_path / "other")
    source = open_source(str(tmp_path / "songs"), frames_per_quarter=1)
    assert "from 4 MIDI files" in source.description
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "songs").symlink_to(tmp_path / "songs")
    assert open_source(str(tmp_path / "linked")).spec.shape[1] == 88  # it is no folder of pictures


def test_how_a_single_file_was_cut_is_part_of_what_it_is(tmp_path):
    midi(piece(40), tmp_path / "a.mid")
    found = [open_source(str(tmp_path / "a.mid"), frames_per_quarter=1, context=n) for n in (8, 4)]
    assert found[0].files == found[1].files
    assert found[0].contents != found[1].contents
