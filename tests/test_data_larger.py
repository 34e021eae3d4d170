"""Data larger than memory: rows that stay on the disk are those of the array that is read whole, in
the same batches, and whatever happens to the file meanwhile is one message.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from benchmarks import larger
from genjax.data import batch_indices, open_source, rows
from genjax.data.memory import from_arrays
from genjax.data.own import contents_of
from genjax.data.rows import Rows, moments
from genjax.data.source import rows_of
from genjax.errors import DataError
from genjax.families.vae import vae
from genjax.learning import loop
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import choose_feed, device_feed, fit
from genjax.learning.step import training
from genjax.protocol import Batch

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (300, 4, 4, 3), dtype=np.uint8)
ARRAYS = {
    "pictures": PICTURES,
    "greys": PICTURES[..., 0],
    "two values": np.where(PICTURES > 99, np.uint8(7), np.uint8(3)),
    "whole": RNG.integers(0, 1000, (300, 5), dtype=np.int32),
    "bool": PICTURES[:, 0, 0] > 99,
    "real": 7 + 3 * RNG.normal(size=(300, 5)).astype(np.float32),
    "double": 1e3 + RNG.normal(size=(300, 5)),
    "series": RNG.normal(size=(300, 6, 2)).astype(np.float32),
    "big-endian": RNG.normal(size=(300, 5)).astype(">f8"),
}
OPTIONS = {"series": {"step": "hour"}}


@pytest.fixture
def small(monkeypatch):
    """Everything is large: it stays on the disk, and chunks are of a few rows."""
    monkeypatch.setattr(rows, "LIMIT", 0)
    monkeypatch.setattr(rows, "CHUNK", 1000)


def saved(folder: Path, x: np.ndarray) -> str:
    path = folder / "x.npy"
    np.save(path, x)
    return str(path)


def both(path: str, monkeypatch, **options):
    """A file's source with rows on the disk, and read whole."""
    monkeypatch.setattr(rows, "LIMIT", 0)
    on_disk = open_source(path, **options)
    monkeypatch.setattr(rows, "LIMIT", 2**29)
    return on_disk, open_source(path, **options)


# --- the same data --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRAYS)
def test_the_source_is_that_of_the_array_read_whole(name, tmp_path, monkeypatch, small) -> None:
    options = OPTIONS.get(name, {})
    found, wanted = both(saved(tmp_path, ARRAYS[name]), monkeypatch, **options)
    pairs = zip(found.load(), wanted.load(), strict=True)
    for own, whole in pairs:
        assert isinstance(own.x, Rows)
        assert isinstance(whole.x, np.ndarray)
        assert own.x.dtype == whole.x.dtype
        assert own.x.nbytes == whole.x.nbytes
        np.testing.assert_array_equal(np.asarray(own.x), whole.x)
    for field in ("shape", "kind", "levels", "step", "n_classes"):
        assert getattr(found.spec, field) == getattr(wanted.spec, field)
    for field in ("shift", "scale"):
        one, other = getattr(found.spec, field), getattr(wanted.spec, field)
        assert (one is None) == (other is None)
        np.testing.assert_allclose(one or (), other or (), rtol=1e-12)
    assert found.notes == wanted.notes


def test_channels_first_and_all_splits_together(tmp_path, monkeypatch, small) -> None:
    path = saved(tmp_path, np.moveaxis(PICTURES, -1, 1))
    found, wanted = both(path, monkeypatch, channels="first")
    own, whole = rows_of(found.load(), "all").x, rows_of(wanted.load(), "all").x
    assert isinstance(own, Rows)
    assert own.shape[1:] == (4, 4, 3)
    np.testing.assert_array_equal(own, whole)


@pytest.mark.parametrize("key", [3, -1, slice(5, 9), slice(None, None, 7), [4, 4, 1]])
def test_rows_are_taken_as_those_of_an_array(key, tmp_path, small) -> None:
    found = rows.in_npy(saved(tmp_path, PICTURES)).take(np.arange(300)[::-1])
    np.testing.assert_array_equal(found[key], PICTURES[::-1][key])
    at = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(found[at], PICTURES[::-1][at])
    np.testing.assert_array_equal(found[:, :2], PICTURES[::-1][:, :2])
    np.testing.assert_array_equal(found[np.arange(300) < 5], PICTURES[::-1][:5])
    with pytest.raises(IndexError):
        found[300]


def test_rows_of_many_gaps_are_read_over_and_jumped(tmp_path, monkeypatch, small) -> None:
    monkeypatch.setattr(rows, "GAP", 100)
    found = rows.in_npy(saved(tmp_path, PICTURES))
    wanted = np.array([0, 1, 2, 4, 6, 40, 41, 43, 200, 299])
    np.testing.assert_array_equal(found.read(wanted), PICTURES[wanted])


@pytest.mark.parametrize("each", [True, False])
def test_statistics_in_chunks_are_those_of_numpy(each, tmp_path, monkeypatch, small) -> None:
    x = 1e6 + RNG.normal(size=(300, 5)) * [1, 2, 3, 4, 5]
    one = rows.in_npy(saved(tmp_path, x)).take(RNG.permutation(300)[:200])
    axes = 0 if each else None
    mean, sd, largest = moments(one, each)
    whole = np.asarray(one)
    np.testing.assert_allclose(mean, np.atleast_1d(whole.mean(axes)), rtol=1e-14)
    np.testing.assert_allclose(sd, np.atleast_1d(whole.std(axes)), rtol=1e-10)
    np.testing.assert_array_equal(largest, np.atleast_1d(np.abs(whole).max(axes)))


def test_lengths_leave_the_padding_out_of_the_scale(monkeypatch, tmp_path, small) -> None:
    x, lengths = ARRAYS["series"], RNG.integers(1, 7, 300)
    mapped = np.load(saved(tmp_path, x), mmap_mode="r")
    found = from_arrays(mapped, lengths=lengths, step="hour")
    wanted = from_arrays(x, lengths=lengths, step="hour")
    assert isinstance(found.load().train.x, Rows)
    np.testing.assert_allclose(found.spec.shift, wanted.spec.shift, rtol=1e-12)
    np.testing.assert_allclose(found.spec.scale, wanted.spec.scale, rtol=1e-12)


def test_a_mapped_array_in_memory_has_the_same_contents(tmp_path, small) -> None:
    mapped = np.load(saved(tmp_path, PICTURES), mmap_mode="r")
    found, wanted = from_arrays(mapped), from_arrays(PICTURES)
    assert isinstance(found.load().train.x, Rows)
    assert found.contents == wanted.contents
    assert contents_of({"all": Batch(rows.in_npy(str(tmp_path / "x.npy")))}) == found.contents[1]


def test_a_permutation_in_pieces_is_the_same() -> None:
    from genjax.data import order

    n = order._PIECE + 1000
    found = order.permutation(n, seed=3, epoch=1)
    assert np.array_equal(np.sort(found), np.arange(n))
    # Position p of epoch e is example p of its permutation.
    step = (n + order._PIECE) // 500 + 1
    at = step * 500 - n
    np.testing.assert_array_equal(batch_indices(n, 500, 3, step), found[at : at + 500])


# --- training -------------------------------------------------------------------------------------


def feeds(tmp_path, monkeypatch):
    found, wanted = both(saved(tmp_path, PICTURES), monkeypatch)
    t = training(vae(found.spec, hidden=(4,), latent_dim=2), optax.adam(1e-3))
    on_disk = choose_feed(t, found, found.load().train, 16, seed=1, place="host")
    return on_disk, device_feed(t, wanted, wanted.load().train, 16, seed=1)


def bits(state) -> list[bytes]:
    leaves = jax.tree.leaves((state.step, state.params, state.opt))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


@pytest.mark.slow
@pytest.mark.bits
def test_training_and_resume_are_bitwise_those_in_memory(tmp_path, monkeypatch, small) -> None:
    on_disk, in_memory = feeds(tmp_path, monkeypatch)
    assert on_disk.ahead > 1
    assert on_disk.prefetch
    wanted = fit(in_memory, key=jax.random.key(0), steps=12, steps_per_call=3)
    settings = {"key": jax.random.key(0), "steps_per_call": 3}
    assert bits(fit(on_disk, steps=12, **settings)) == bits(wanted)
    kept = Checkpoints(tmp_path / "run")
    fit(on_disk, steps=6, checkpoints=kept, **settings)
    assert bits(fit(on_disk, steps=12, checkpoints=kept, **settings)) == bits(wanted)


def test_auto_keeps_rows_on_the_disk_beyond_the_limit(tmp_path, monkeypatch, small) -> None:
    found, _ = both(saved(tmp_path, PICTURES), monkeypatch)
    t = training(vae(found.spec, hidden=(4,), latent_dim=2), optax.adam(1e-3))
    arrays = found.load().train
    assert not choose_feed(t, found, arrays, 16, seed=1).prefetch  # which read them once
    monkeypatch.setattr(loop, "DEVICE_LIMIT", 1000)
    feed = choose_feed(t, found, arrays, 16, seed=1)
    assert feed.prefetch
    assert feed.steps_at(0, 50) == 50
    monkeypatch.setattr(loop, "SENT", 3 * 16 * 48)
    assert choose_feed(t, found, arrays, 16, seed=1).steps_at(0, 50) == 3


@pytest.mark.slow
def test_no_more_is_made_ahead_than_is_said_and_the_threads_end(
    tmp_path, monkeypatch, small
) -> None:
    on_disk, _ = feeds(tmp_path, monkeypatch)
    steps, gaps = [], []

    def payload(step, k):
        steps.append(step)
        return on_disk.payload(step, k)

    def progress(step, *_):
        gaps.append(max(steps) - step)

    feed = on_disk._replace(payload=payload)
    fit(feed, key=jax.random.key(0), steps=20, steps_per_call=2, progress=progress)
    assert sorted(steps) == list(range(0, 20, 2))
    assert max(gaps) <= 2 * (feed.ahead - 1)
    assert not [one for one in threading.enumerate() if one.name.startswith("genjax-data")]


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_that_changes_while_it_is_read_is_one_message(tmp_path, monkeypatch, small) -> None:
    on_disk, _ = feeds(tmp_path, monkeypatch)
    path = tmp_path / "x.npy"

    def cut(step, *_):
        os.truncate(path, 1000)

    with pytest.raises(DataError, match=r"x\.npy changed while it was being read \(14,528 bytes"):
        fit(on_disk, key=jax.random.key(0), steps=50, steps_per_call=2, progress=cut)
    assert not [one for one in threading.enumerate() if one.name.startswith("genjax-data")]


def test_a_file_written_to_in_place_is_told(tmp_path, small) -> None:
    path = saved(tmp_path, PICTURES)
    found = rows.in_npy(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="of the same size, but written to"):
        found[0]


def test_a_file_cut_short_is_told_as_it_is_opened(tmp_path, small) -> None:
    path = saved(tmp_path, PICTURES)
    os.truncate(path, 5000)
    with pytest.raises(DataError, match=r"x\.npy: damaged, cannot be read as arrays"):
        open_source(path)


@pytest.mark.parametrize(
    ("value", "options", "said"),
    [
        (
            np.nan,
            {},
            r"train split: x in rows \d+ to \d+ of the file: 5 of .* at index .299, 0",
        ),
        (0.5, {"kind": "discrete"}, "discrete data must be whole numbers"),
        (-1.0, {"kind": "discrete"}, r"in rows \d+ to \d+ of the file must be in the range 0 to 8"),
    ],
)
def test_bad_values_are_found_in_whatever_chunk(value, options, said, tmp_path, small) -> None:
    x = RNG.integers(0, 9, (300, 5)).astype(np.float64)
    assert rows_of_training(tmp_path, x)[-1] == 299
    x[299] = value
    with pytest.raises(DataError, match=said):
        open_source(saved(tmp_path, x), **options)


def rows_of_training(folder: Path, x: np.ndarray) -> np.ndarray:
    """Which rows of the file are for training."""
    one = open_source(saved(folder, x)).load().train.x
    return np.sort(one.index)


# --- memory ---------------------------------------------------------------------------------------

# The peak is that of the memory map: ru_maxrss of a child begins with what its parent had.
CHILD = """
import pathlib, sys
import jax, optax
from genjax.data import open_source, rows
from genjax.families.vae import vae
from genjax.learning import loop
from genjax.learning.step import training

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

rows.LIMIT = loop.DEVICE_LIMIT = int(sys.argv[2])
jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4))))
source = open_source("digits")
t = training(vae(source.spec, hidden=(4,), latent_dim=2), optax.adam(1e-3))
feed = loop.choose_feed(t, source, source.load().train, 16, seed=0)
loop.fit(feed, key=jax.random.key(0), steps=20, steps_per_call=10)
before = peak()
source = open_source(sys.argv[1])
t = training(vae(source.spec, hidden=(4,), latent_dim=2), optax.adam(1e-3))
feed = loop.choose_feed(t, source, source.load().train, 16, seed=0)
loop.fit(feed, key=jax.random.key(0), steps=20, steps_per_call=10)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_the_peak_of_memory_is_far_below_the_file(tmp_path) -> None:
    path = tmp_path / "x.npy"
    made = np.lib.format.open_memmap(path, "w+", np.float32, (800_000, 64))  # 195 MiB
    for begin in range(0, len(made), 100_000):
        made[begin : begin + 100_000] = RNG.normal(size=(100_000, 64))
    made.flush()
    del made

    def grown(limit: int) -> float:
        command = [sys.executable, "-c", CHILD, str(path), str(limit)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout.split()[-1]) * 1024 / path.stat().st_size

    assert grown(2**20) < 0.6
    assert grown(2**40) > 1.5  # which the whole of it takes


@pytest.mark.slow
@pytest.mark.tools
def test_the_benchmark_of_data_larger_than_memory_runs() -> None:
    found = larger.measure(size=3072 * 500, steps=100, step_ms=0.1, n_pictures=20, n_rows=50)
    assert found["training"]["place"] == "device"  # as small as it is here
    assert found["training"]["peak"]["RssAnon"] > 0
    assert found["training"]["share"] == 0
    assert found["pictures"]["n"] == 20
    assert found["table"]["seconds"] > 0
    assert found["import_seconds"] > 0


def test_token_ids_in_a_mapped_array_stay_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LIMIT", 100)
    ids = RNG.integers(0, 5, (60, 6))
    np.save(tmp_path / "ids.npy", ids)
    source = from_arrays(np.load(tmp_path / "ids.npy", mmap_mode="r"), kind="tokens")
    assert source.spec.levels == 5
    assert isinstance(source.load().train.x, rows.Rows)
