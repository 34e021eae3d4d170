"""Sequences in arrays of one's own: with lengths, and as windows of one long series."""

import numpy as np
import pytest

import genjax.cli
from genjax.data import arrays, open_source
from genjax.data.source import Splits, rows_of
from genjax.errors import ConfigError, DataError
from genjax.protocol import Batch

RNG = np.random.default_rng(0)


def saved(folder, **given):
    path = str(folder / "mine.npz")
    np.savez(path, **given)
    return path


def test_sequences_with_lengths(tmp_path):
    x, lengths = RNG.normal(size=(40, 7, 2)), np.arange(40) % 7 + 1
    spec = arrays(path := saved(tmp_path, x=x, lengths=lengths), step="hour").spec
    assert (spec.shape, spec.kind, spec.step, spec.lengths) == ((7, 2), "continuous", "hour", True)
    assert len(spec.scale) == 2
    by_row = dict(zip((row.astype("f").tobytes() for row in x), lengths, strict=True))
    for batch in arrays(path, step="hour").load():
        for row, length in zip(batch.x, batch.length, strict=True):
            assert by_row[row.tobytes()] == length
    with pytest.raises(ConfigError, match=r"say what a step is called \(--step frame\)"):
        arrays(path)
    for bad in (lengths[:-1], lengths * 1.0, lengths[:, None]):
        with pytest.raises(DataError, match="lengths must be a whole number for each of 40"):
            arrays(saved(tmp_path, x=x, lengths=bad), step="hour")
    with pytest.raises(DataError, match="lengths must be from 1 to 7"):
        arrays(saved(tmp_path, x=x, lengths=lengths + 5), step="hour")


def test_numbers_and_symbols_as_sequences(tmp_path):
    plain = arrays(saved(tmp_path, x=RNG.normal(size=(40, 7))), step="frame").spec
    assert (plain.shape, len(plain.scale)) == ((7,), 1)
    whole = arrays(saved(tmp_path, x=RNG.integers(0, 5, (40, 7, 2))), step="frame").spec
    assert (whole.kind, whole.levels) == ("discrete", 5)


def test_a_long_series_is_cut_and_split_by_position(tmp_path):
    x = np.stack([np.arange(200.0), np.sin(np.arange(200.0))], axis=1)
    source = arrays(saved(tmp_path, x=x), context=8)
    assert (source.spec.shape, source.spec.step) == ((8, 2), "frame")
    train, valid, test = (batch.x[..., 0] for batch in source.load())
    assert train.max() < 160 <= valid.min()
    assert valid.max() < 180 <= test.min()
    for part in (train, valid, test):
        np.testing.assert_array_equal(np.diff(part, axis=1), 1)
    assert len(np.unique(test)) == test.size
    with pytest.raises(DataError, match=r"Take a --context of at most 20"):
        arrays(saved(tmp_path, x=x), context=30)
    assert arrays(saved(tmp_path, x=x), context=20).spec.shape == (20, 2)


@pytest.mark.slow
def test_a_series_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = 1000 + 50 * np.stack([np.sin(np.arange(400) / 5), np.cos(np.arange(400) / 5)], axis=1)
    np.save("wave.npy", x)
    small = "--d-hidden 8 --lanes 0 --steps 20 --batch-size 8 --evaluate-every 0 --out run"
    genjax.cli.main(f"train rnn --data wave.npy --context 16 {small}".split())
    genjax.cli.main(["sample", "run", "--n", "4"])
    with np.load("run/samples/sample_n4_seed0.npz") as file:
        drawn = file["x"]
    assert drawn.shape == (4, 16, 2)
    assert abs(drawn.mean() - 1000) < 100


def test_windows_are_split_as_asked_and_have_no_lengths(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(400, 2)))
    usual = open_source(str(tmp_path / "x.npy"), context=8).load()
    assert [len(part.x) for part in usual] == [157, 5, 5]
    held = {"valid_fraction": 0.4, "test_fraction": 0.3}
    parts = open_source(str(tmp_path / "x.npy"), context=8, **held).load()
    assert [len(part.x) for part in parts] == [57, 20, 15]
    x = np.random.default_rng(0).normal(size=(200, 7, 2))
    np.savez(tmp_path / "x.npz", x=x, lengths=np.arange(200) % 7 + 1)
    with pytest.raises(ConfigError, match="leave it out for examples with splits, labels or"):
        open_source(str(tmp_path / "x.npz"), context=8, step="hour")
    np.save(tmp_path / "ids.npy", np.arange(400) % 5)
    with pytest.raises(ConfigError, match="split by position"):
        open_source(str(tmp_path / "ids.npy"), kind="tokens", context=8, **held)


@pytest.mark.parametrize("context", [8, 30, 3])
def test_windows_that_are_scored_share_no_step(tmp_path, context):
    np.save(tmp_path / "x.npy", np.arange(800.0)[:, None])
    source = open_source(str(tmp_path / "x.npy"), context=context)
    splits = source.load()
    for split in ("train", "all"):
        found = rows_of(splits, split, source.apart).x
        assert len(np.unique(found)) == found.size
    one, next_to_apart = splits.train.x[[0, source.apart - 1]]
    assert next_to_apart[0] <= one[-1]  # a smaller distance would not do
    assert rows_of(splits, "test", source.apart).x is splits.test.x


def test_windows_of_a_stream_that_are_scored_follow_each_other():
    source = open_source("unicode_names", context=16)
    train = source.load().train.x
    found = rows_of(source.load(), "train", source.apart).x
    whole = np.concatenate([train[:, 0], train[-1, 1:]])
    np.testing.assert_array_equal(found.reshape(-1), whole[: found.size])
    assert found.size > len(whole) - 16


def test_splits_of_which_one_has_weights_are_all_scored():
    one = Batch(np.zeros((3, 1)), weight=np.asarray([0.0, 1.0, 2.0]))
    found = rows_of(Splits(one, Batch(np.ones((2, 1))), Batch(np.ones((1, 1)))), "all")
    np.testing.assert_array_equal(found.weight, [0, 1, 2, 1, 1, 1])
