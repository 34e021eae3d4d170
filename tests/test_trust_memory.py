"""Memory that runs out is one message, and lines that would take it are said before."""

import errno
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mido
import numpy as np
import pytest
from PIL import Image
from program import program, refused
from short_runs import tiny

import genjax.cli
from genjax.cli import failures
from genjax.data import open_source, text
from genjax.data.midi_files import roll_of
from genjax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MemoryExhausted,
    out_of_memory,
)
from genjax.learning.memory import explained, largest
from genjax.profiling import room
from genjax.runs.smaller import fitting, smaller
from genjax.runs.train import about_data
from genjax.zoo import ZOO
from genjax.zoo.sections import replace, settings_of

SHORT = "--steps 4 --batch-size 8 --hidden 4 --latent-dim 2 --evaluate-every 0 --sample-every 0"


def exhausted() -> Exception:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros((2**22, 2**22)).block_until_ready()
    return caught.value


def test_what_is_a_lack_of_memory():
    assert "64.0 TiB" in (out_of_memory(exhausted()) or "")
    with pytest.raises(MemoryError) as caught:
        np.zeros((2**22, 2**22))
    assert "with shape (4194304, 4194304)" in (out_of_memory(caught.value) or "")
    assert out_of_memory(MemoryError()) == "there is not enough memory"
    others = (ValueError("memory"), OSError(errno.ENOSPC, "No space left"), KeyError("x"))
    for other in (*others, CheckpointError("Could not save: RESOURCE_EXHAUSTED: disk")):
        assert out_of_memory(other) is None


def test_the_largest_array_is_named():
    def outer(tree, x):
        return jax.lax.scan(lambda c, _: (c + jnp.outer(x, x).sum(), None), 0.0, None, length=2)[0]

    x = np.ones(1000, np.float32)
    assert largest(jax.jit(outer), {"a": x[:3]}, x).startswith("float32[1000, 1000] of 3.8 MiB")
    big = {"net": {"w": np.ones(3_000_000, np.float32)}}
    assert largest(jax.jit(outer), big, x) == "float32[3000000] of 11.4 MiB, net/w"


def test_it_is_one_message_with_the_array_and_the_flags(tmp_path):
    recipe = tiny("vae")
    program = jax.jit(lambda x: jnp.outer(x, x).sum())
    with (
        pytest.raises(MemoryExhausted) as caught,
        fitting(recipe, tmp_path / "run"),
        explained(lambda: "in training", lambda: (program, (np.ones(1000, np.float32),))),
    ):
        raise exhausted()
    assert str(caught.value) == (
        "Out of memory in training: an array or program asked for 64.0 TiB at once. The largest "
        "array is float32[1000, 1000] of 3.8 MiB, a value on the way. What makes it smaller: "
        "--batch-size 8 (now 16); --microbatches 2; --place host, for large data; --latent-dim "
        "(now 2); --hidden (now 8); --channels (now 32 64)."
    )
    where = f"Other settings need another folder than {tmp_path}, which stays as it is."
    with pytest.raises(MemoryExhausted, match=where), fitting(recipe, tmp_path):
        raise MemoryError
    with pytest.raises(KeyError), fitting(recipe, tmp_path):
        raise KeyError("another error stays what it is")


@pytest.mark.parametrize("name", ["vae", "cgan", "gru", "transformer-names", "diffusion"])
def test_every_flag_of_that_message_is_one(name):
    recipe = ZOO[name]
    flags = re.findall(r"--([a-z-]+)", smaller(recipe))
    assert {"batch-size", "microbatches", "place"} < set(flags)
    assert {flag.replace("-", "_") for flag in flags} <= set(settings_of(recipe))
    half = re.search(r"--batch-size (\d+)", smaller(recipe))
    parts = re.search(r"--microbatches (\d+)", smaller(recipe))
    assert half is not None
    assert parts is not None
    replace(recipe, batch_size=int(half[1]))
    replace(recipe, microbatches=int(parts[1]))


@pytest.mark.parametrize("error", [MemoryError(), None])
@pytest.mark.parametrize("command", ["sample", "evaluate", "bench"])
def test_the_program_says_it_and_ends_with_2(monkeypatch, capsys, error, command):
    error = error or exhausted()

    def fail(args):
        raise error

    monkeypatch.setitem(genjax.cli.COMMANDS, command, fail)
    said = refused([command, "x"], capsys)
    assert said.startswith("genjax: error: Out of memory: ")
    assert said.strip().endswith(failures.SMALLER[command])
    assert len(said.strip().splitlines()) == 1


def test_errors_of_the_system_have_no_traceback(monkeypatch, capsys):
    def fail(args):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/where")

    monkeypatch.setitem(genjax.cli.COMMANDS, "list", fail)
    assert "/some/where: Permission denied." in refused(["list"], capsys)


@pytest.mark.slow
def test_more_samples_than_fit_end_in_one_message(tmp_path):
    """jax alone ends the process where an array that did not fit is looked at."""
    x = np.random.default_rng(0).normal(size=(60, 3))
    np.save(tmp_path / "x.npy", x)
    program(["train", "vae", "--data", "x.npy", *SHORT.split(), "--out", "run"], tmp_path)
    _, err = program(["sample", "run", "--n", str(2**31 - 1)], tmp_path, code=2)
    assert "Out of memory for 2147483647 samples" in err
    assert "--n" in err


@pytest.mark.slow
def test_more_than_fits_in_training(tmp_path):
    command = "train vae-ring --hidden 3000000 --steps 2 --batch-size 4096 --out run"
    _, err = program(command.split(), tmp_path, code=2)
    assert re.search(r"memory.* largest array is float32\[.*3000000\]", err)
    assert "--batch-size 2048 (now 4096)" in err


# --- lines ----------------------------------------------------------------------------------------

LINES = "".join(f"line {'ab' * (i % 9)}\n" for i in range(300))


def lines_of(path: Path, more: str, **options):
    path.write_text(LINES + more, encoding="utf-8")
    return text(str(path), layout="lines", **options)


def test_a_line_far_longer_than_the_others_is_said_before_it_is_padded_to(tmp_path):
    source = lines_of(tmp_path / "a.txt", "x" * 20_000 + "\n")
    (said,) = about_data(source)
    assert "the longest line has 20,000 characters, 79 on average" in said
    assert "--max-length N" in said
    assert len(source.notes) == 2
    assert len(lines_of(tmp_path / "a.txt", "x" * 40 + "\n").notes) == 1


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_longer_lines_are_left_out_and_counted(tmp_path, unit):
    longer = ("Я" * 2000 + "\n") * 2
    source = lines_of(tmp_path / "a.txt", longer, unit=unit, max_length=21)
    assert source.spec.shape == (22,)
    assert f"lines of more than 21 {unit}s, which are left out: 2" in source.notes
    assert sum(len(split.x) for split in source.load()) == 300
    assert ("Я" in (source.spec.vocabulary or ())) is False
    source.load()


def test_lengths_that_leave_nothing_and_layouts_without_lines(tmp_path):
    with pytest.raises(DataError, match="every line is longer than max_length=3; the shortest"):
        lines_of(tmp_path / "a.txt", "", max_length=3)
    with pytest.raises(ConfigError, match="max_length is for lines"):
        text(str(tmp_path / "a.txt"), max_length=3)


def test_music_that_would_be_as_long_as_no_piece_is_refused(tmp_path):
    """A damaged time, or frames as short as none."""
    message, note = mido.Message, {"note": 60, "velocity": 64}
    for name, time in (("piece", 480), ("damaged", 2**27)):
        track = mido.MidiTrack([message("note_on", **note), message("note_off", **note, time=time)])
        mido.MidiFile(ticks_per_beat=480, tracks=[track]).save(tmp_path / f"{name}.mid")
    assert len(roll_of(tmp_path / "piece.mid")) == 4
    with pytest.raises(DataError, match=r"has 1,118,481 frames, and at most 1,048,576"):
        roll_of(tmp_path / "damaged.mid")
    for wrong in (1e-9, 1e18):
        with pytest.raises(ConfigError, match="frames_per_quarter"):
            open_source(tmp_path / "piece.mid", frames_per_quarter=wrong)


def test_pictures_of_a_size_that_no_memory_holds_are_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="size must be"):
        open_source(tmp_path, size=2**31 - 1)


def test_a_program_has_to_fit_on_one_device_of_several(monkeypatch):
    limit = {"bytes_limit": 80 * 2**30}
    card = SimpleNamespace(platform="gpu", device_kind="X", memory_stats=lambda: limit)
    monkeypatch.setattr(room, "jax", SimpleNamespace(local_devices=lambda: [card] * 8))

    def needs(gib):
        sizes = {"temp_size_in_bytes": 0, "output_size_in_bytes": 0, "alias_size_in_bytes": 0}
        found = SimpleNamespace(argument_size_in_bytes=gib * 2**30, **sizes)
        return SimpleNamespace(memory_analysis=lambda: found)

    room.check_program(needs(79), "A step")
    with pytest.raises(MemoryExhausted, match=r"needs 100.0 GiB .* the device \(X\) has 80.0 GiB"):
        room.check_program(needs(100), "A step")
    assert room.capacity() == (640 * 2**30, "8 devices (X)")
