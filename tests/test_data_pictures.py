"""Folders and archives of pictures, and CIFAR's files, in their true formats; what is refused."""

import errno
import io
import os
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genjax.data import kept, open_source, rows
from genjax.data.image_files import image_files
from genjax.errors import DataError

MODULE = sys.modules[image_files.__wrapped__.__module__]  # the package has a function of that name
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(height=6, width=6, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(RNG.integers(0, 256, shape).astype(np.uint8))


def folder_of(path, classes=("cat", "dog"), n=6, ending="png", **kinds):
    for name in classes:
        (path / name).mkdir(parents=True)
        for index in range(n):
            picture(**kinds).save(path / name / f"{index}.{ending}")
    return str(path)


@pytest.mark.parametrize("ending", ["png", "PNG", "jpg", "webp", "gif", "bmp", "tif"])
def test_a_folder_of_every_format(tmp_path, ending):
    where = folder_of(tmp_path / "photos", ending=ending)
    source = open_source(where, conditional=True)
    assert source.spec.shape == (6, 6, 3)
    assert source.spec.class_names == ("cat", "dog")
    assert sum(len(batch.x) for batch in source.load()) == 12
    if ending in ("png", "PNG", "bmp", "tif"):  # those that lose nothing
        whole = {np.asarray(Image.open(path)).tobytes() for path in Path(where).rglob("*.*")}
        rows = np.concatenate([batch.x for batch in source.load()])
        assert {row.astype(np.uint8).tobytes() for row in rows} == whole


def packed(folder, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(Path(folder).rglob("*.png")):
                archive.write(file, file.relative_to(folder))
        return str(path)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        archive.add(folder, ".")
    return str(path)


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar", "photos.tar.gz", "photos.ZIP"])
def test_an_archive_is_the_folder(tmp_path, name):
    folder = folder_of(tmp_path / "photos")
    path = packed(folder, tmp_path / name.lower()) if name != "photos.ZIP" else ""
    if name == "photos.ZIP":
        path = str(Path(packed(folder, tmp_path / "photos.zip")).rename(tmp_path / name))
    one, other = open_source(folder, conditional=True), open_source(path, conditional=True)
    assert one.spec == other.spec
    for a, b in zip(one.load(), other.load(), strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.cond, b.cond)
    assert other.files == (path,)
    assert one.files == ()
    assert len(one.contents[1]) == 64


def test_folders_called_train_and_test_are_the_splits(tmp_path):
    for split, n in (("train", 8), ("val", 3), ("test", 4)):
        folder_of(tmp_path / "set" / split, n=n)
    source = open_source(str(tmp_path / "set"), conditional=True)
    assert [len(batch.x) for batch in source.load()] == [16, 6, 8]
    assert source.spec.class_names == ("cat", "dog")


def test_mixed_sizes_need_a_size(tmp_path):
    where = folder_of(tmp_path / "photos")
    picture(9, 12).save(tmp_path / "photos" / "cat" / "large.png")
    with pytest.raises(DataError, match=r"2 different sizes, from 6 x 6 to 12 x 9.*--size 32"):
        open_source(where)
    assert open_source(where, size=4).spec.shape == (4, 4, 3)
    padded = image_files(where, size=12, fit="pad").load()
    rows = np.concatenate([batch.x for batch in padded])
    # 12 x 9 on a square of 12: 3 rows are black, above and below.
    assert any((row[0] == 0).all() and (row[-1] == 0).all() for row in rows)


def save_sixteen(path):
    values = np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6)
    Image.fromarray(values).save(path)
    return (values // 257).astype(np.uint8)


def test_greys_palettes_sixteen_bits_and_transparency(tmp_path):
    (tmp_path / "grey").mkdir()
    wanted = save_sixteen(tmp_path / "grey" / "a.png")
    for name in "bc":
        picture(channels=1).save(tmp_path / "grey" / f"{name}.png")
    source = open_source(str(tmp_path / "grey"))
    assert source.spec.shape == (6, 6, 1)
    rows = np.concatenate([batch.x for batch in source.load()])
    assert any(np.array_equal(row[..., 0], wanted) for row in rows)
    (tmp_path / "mixed").mkdir()
    picture(channels=1).save(tmp_path / "mixed" / "grey.png")
    picture().convert("P").save(tmp_path / "mixed" / "palette.png")
    clear = Image.fromarray(np.zeros((6, 6, 4), np.uint8))
    clear.save(tmp_path / "mixed" / "clear.png")
    source = open_source(str(tmp_path / "mixed"))
    assert source.spec.shape == (6, 6, 3)
    rows = np.concatenate([batch.x for batch in source.load()])
    assert any((row == 255).all() for row in rows)  # what is transparent is white
    assert open_source(str(tmp_path / "mixed"), mode="rgba").spec.shape == (6, 6, 4)
    assert open_source(str(tmp_path / "mixed"), mode="grey").spec.shape == (6, 6, 1)


def test_a_photograph_is_turned_as_it_says(tmp_path):
    (tmp_path / "p").mkdir()
    tall = picture(8, 6)
    exif = tall.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    for name in "abc":
        tall.save(tmp_path / "p" / f"{name}.png", exif=exif)
    assert open_source(str(tmp_path / "p")).spec.shape == (6, 8, 3)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_so_is_one_of_16_bits(tmp_path, ending):
    (tmp_path / "p").mkdir()
    levels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    wide = Image.fromarray(levels)
    exif = wide.getexif()
    exif[0x0112] = 6
    for name in "abc":
        wide.save(tmp_path / "p" / f"{name}.{ending}", exif=exif)
    rows = np.concatenate([batch.x for batch in open_source(str(tmp_path / "p")).load()])
    wanted = np.rot90(levels, -1) * 255.0 // 65535
    np.testing.assert_array_equal(rows[..., 0], np.broadcast_to(wanted, (3, 8, 6)))


def test_a_bad_file_is_named_and_may_be_left_out(tmp_path):
    where = folder_of(tmp_path / "photos")
    bad = tmp_path / "photos" / "cat" / "bad.png"
    for content in (b"", b"no picture", Path(where, "cat", "0.png").read_bytes()[:60]):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"cat/bad\.png cannot be read.*--skip-bad"):
            open_source(where)
        source = open_source(where, skip_bad=True)
        assert "left out 1 files" in "; ".join(source.notes)
        assert sum(len(batch.x) for batch in source.load()) == 12


def test_the_second_time_nothing_is_decoded(tmp_path, monkeypatch):
    where = folder_of(tmp_path / "photos")
    first = open_source(where).load()
    monkeypatch.setattr(MODULE, "_picture", None)
    for a, b in zip(first, open_source(where).load(), strict=True):
        np.testing.assert_array_equal(a.x, b.x)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    picture().save(tmp_path / "photos" / "cat" / "0.png")  # a file that changed is seen
    changed = np.concatenate([batch.x for batch in open_source(where).load()])
    assert not np.array_equal(changed, np.concatenate([batch.x for batch in first]))


def test_a_cache_that_is_damaged_or_not_writable_costs_nothing(tmp_path, monkeypatch):
    where = folder_of(tmp_path / "photos")
    open_source(where)
    wanted = open_source(where).contents
    (kept,) = (tmp_path / "cache").rglob("*.npy")
    whole = kept.read_bytes()
    for damaged in (b"junk", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.write_bytes(damaged)
        assert open_source(where).contents == wanted
        assert kept.read_bytes() == whole
    kept.with_suffix(".json").write_text("{}")
    assert open_source(where).contents == wanted
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = open_source(where)
    assert source.contents == wanted
    assert "not kept for the next time" in " ".join(source.notes)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("splits", [False, True])
def test_more_pictures_than_memory_holds_are_the_same(tmp_path, monkeypatch, mixed, splits):
    for name in ("train", "test") if splits else ("all",):
        folder_of(tmp_path / "photos" / name)
    if mixed:
        picture(channels=1).save(next((tmp_path / "photos").rglob("3.png")))
    where = str(tmp_path / "photos")
    wanted = open_source(where, conditional=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(rows, "LIMIT", 500)
    for _ in range(2):  # decoded, and kept
        source = open_source(where, conditional=True)
        assert source.contents == wanted.contents
        assert source.spec == wanted.spec
        for a, b in zip(source.load(), wanted.load(), strict=True):
            assert isinstance(a.x, rows.Rows)
            np.testing.assert_array_equal(a.x, b.x)
            np.testing.assert_array_equal(a.cond, b.cond)
    assert not list((tmp_path / "other").rglob("*.part"))
    assert not list((tmp_path / "other").rglob("*.colour"))


def test_more_pictures_than_memory_holds_need_the_cache_folder(tmp_path, monkeypatch):
    where = folder_of(tmp_path / "photos")
    monkeypatch.setattr(rows, "LIMIT", 500)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be kept in .*XDG_CACHE_HOME=FOLDER genjax"):
        open_source(where)


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    where = folder_of(tmp_path / "photos")
    monkeypatch.setattr(rows, "LIMIT", 500)

    def full(file, shape):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept, "_header", full)
    with pytest.raises(DataError, match=r"No space left on device.*Make room there"):
        open_source(where)
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]


def test_a_bad_picture_among_more_than_memory_holds_is_named(tmp_path, monkeypatch):
    where = folder_of(tmp_path / "photos")
    monkeypatch.setattr(rows, "LIMIT", 500)
    (tmp_path / "photos" / "cat" / "5.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"cat/5\.png cannot be read.*--skip-bad"):
        open_source(where)
    source = open_source(where, skip_bad=True)
    assert sum(len(batch.x) for batch in source.load()) == 11
    assert "left out 1 files" in " ".join(source.notes)
    picture(9, 12).save(tmp_path / "photos" / "cat" / "5.png")
    with pytest.raises(DataError, match="2 different sizes"):
        open_source(where)


def test_classes_need_folders(tmp_path):
    where = folder_of(tmp_path / "photos", classes=("all",))
    with pytest.raises(DataError, match="conditional needs labels, which are the folders"):
        open_source(where, conditional=True)


@pytest.mark.parametrize(("labels", "ending"), [(1, "data_batch_1.bin"), (2, "train.bin")])
def test_cifar_is_read(tmp_path, labels, ending):
    x = RNG.integers(0, 256, (20, 3, 32, 32)).astype(np.uint8)
    y = RNG.integers(0, 10, (20, labels)).astype(np.uint8)
    rows = np.concatenate([y, x.reshape(20, -1)], axis=1)
    test = "test_batch.bin" if labels == 1 else "test.bin"
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / ending).write_bytes(rows.tobytes())
    (tmp_path / "cifar" / test).write_bytes(rows[:5].tobytes())
    source = open_source(str(tmp_path / "cifar"), conditional=True)
    assert source.spec.shape == (32, 32, 3)
    np.testing.assert_array_equal(source.load().test.x, np.moveaxis(x[:5], 1, -1))
    found = source.load().test.cond
    names = source.spec.class_names or tuple(map(str, range(10)))
    assert [names[label] for label in found] == [str(label) for label in y[:5, -1]]
    (tmp_path / "cifar" / test).write_bytes(rows[:5].tobytes()[:-1])
    with pytest.raises(DataError, match="no whole number of examples of 3,073"):
        open_source(str(tmp_path / "cifar"))


def test_what_is_no_archive_of_pictures(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_source(str(tmp_path / "empty"))
    for name in ("a.zip", "a.tar"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(DataError, match="cannot be read as a zip or tar"):
            open_source(str(tmp_path / name))
        with pytest.raises(DataError, match="there is no such file"):
            open_source(str(tmp_path / f"not{name}"))
    whole = Path(packed(folder_of(tmp_path / "photos"), tmp_path / "b.zip")).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[:-30])
    with pytest.raises(DataError, match="cannot be read as a zip or tar"):
        open_source(str(tmp_path / "b.zip"))


@pytest.mark.parametrize("name", ["../../a.png", "/etc/a.png", "b/../../a.png"])
def test_a_path_that_leaves_the_archive_is_told(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr(name, b"")
    with tarfile.open(tmp_path / "out.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    for path in ("out.zip", "out.tar"):
        with pytest.raises(DataError, match=rf"{path}: {name} lies outside the archive"):
            open_source(str(tmp_path / path))


def test_bombs_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "_LARGEST", 4000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * 100_000)
    with pytest.raises(DataError, match=r"a\.png:? would unpack to 100,000 bytes"):
        open_source(str(tmp_path / "bomb.zip"))
    (tmp_path / "p").mkdir()
    stream = io.BytesIO()
    Image.new("L", (100, 100)).save(stream, "PNG")
    (tmp_path / "p" / "large.png").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="100 x 100 pixels are too many"):
        open_source(str(tmp_path / "p"))


def test_pictures_that_are_held_out_are_not_trained_on(tmp_path):
    """Splits of which one is missing, or that something lies beside, are not merged."""
    two = folder_of(tmp_path / "two", classes=("train", "val"))
    with pytest.raises(DataError, match="train/, val/ are splits, and train/ or test/ is missing"):
        open_source(two)
    (tmp_path / "two" / "val").rename(tmp_path / "two" / "test")
    assert [len(part.x) for part in open_source(two).load()][2] == 6
    picture().save(tmp_path / "two" / "logo.png")
    with pytest.raises(DataError, match=r"beside them there are pictures\. Move these away"):
        open_source(two)
    every = folder_of(tmp_path / "every", classes=("train", "val", "validation", "test"))
    assert [len(part.x) for part in open_source(every).load()] == [6, 12, 6]
    # A class may be called so.
    vehicles = folder_of(tmp_path / "vehicles", classes=("car", "train"))
    assert open_source(vehicles, conditional=True).spec.class_names == ("car", "train")


def test_whole_numbers_beyond_16_bits_have_no_scale(tmp_path):
    for index in range(3):
        numbers = np.array([[-1000, 0], [3000, 70000]], np.int32)
        Image.fromarray(numbers).save(tmp_path / f"{index}.tif")
    with pytest.raises(DataError, match="from -1000 to 70000, are no 16 bits"):
        open_source(str(tmp_path))


def test_linked_folders_are_read_and_hidden_ones_are_not(tmp_path):
    """A class or a split may be a link; one that leads back is passed over, so that loops end."""
    for split in ("train", "test"):
        folder_of(tmp_path / "set" / split, classes=("cat",))
        folder_of(tmp_path / "elsewhere" / split, classes=("dog", ".ipynb_checkpoints"))
        (tmp_path / "set" / split / "dog").symlink_to(tmp_path / "elsewhere" / split / "dog")
        (tmp_path / "set" / split / "dog" / "back").symlink_to(tmp_path / "set")
        folder_of(tmp_path / "set" / split, classes=(".ipynb_checkpoints",))
    source = open_source(str(tmp_path / "set"), conditional=True)
    assert source.spec.class_names == ("cat", "dog")
    assert [len(batch.x) for batch in source.load()] == [11, 1, 12]
    (tmp_path / "links").mkdir()
    for split in ("train", "test"):  # and two links to one folder are two splits
        (tmp_path / "links" / split).symlink_to(tmp_path / "set" / "test")
    splits = open_source(str(tmp_path / "links"), conditional=True).load()
    assert [len(batch.x) for batch in splits] == [11, 1, 12]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_dark_picture_of_16_bits_has_the_scale_of_the_others(tmp_path, ending):
    dark, bright = np.full((4, 4), 200, np.uint16), np.full((4, 4), 40_000, np.uint16)
    bright[0, 0] = 65_535
    for index, values in enumerate((dark, bright, bright.astype(">u2"))):
        Image.fromarray(values).save(tmp_path / f"{index}.{ending}")
    rows = np.concatenate([batch.x for batch in open_source(str(tmp_path)).load()])
    assert sorted(rows[:, 1, 1, 0].tolist()) == [0, 155, 155]
    assert sorted(rows[:, 0, 0, 0].tolist()) == [0, 255, 255]


def test_pictures_of_32_bits_have_no_scale(tmp_path):
    for index in range(3):
        Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / f"{index}.tif")
    with pytest.raises(DataError, match="from 200 to 200, are no 16 bits without a sign"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("ending", ["tif", "gif", "webp", "png"])
def test_several_frames_are_no_picture(tmp_path, ending):
    where = folder_of(tmp_path / "photos", ending=ending)
    frames = [picture() for _ in range(3)]
    frames[0].save(
        tmp_path / "photos" / f"cat/many.{ending}", save_all=True, append_images=frames[1:]
    )
    with pytest.raises(DataError, match=r"cat/many\.\w+ .*has 3 frames: split it into one picture"):
        open_source(where)
    source = open_source(where, skip_bad=True)
    assert sum(len(batch.x) for batch in source.load()) == 12
    assert "left out 1 files that cannot be read" in source.notes


def test_a_photograph_with_a_preview_is_one_picture(tmp_path):
    """As telephones save them: a JPEG with a second one behind it."""
    for index in range(3):
        frames = [picture(), picture()]
        path = tmp_path / f"{index}.jpg"
        frames[0].save(path, "MPO", save_all=True, append_images=frames[1:])
    assert open_source(str(tmp_path)).spec.shape == (6, 6, 3)


def test_16_bits_that_hold_8_are_refused_before_they_are_black(tmp_path):
    for index in range(3):
        Image.fromarray(np.full((4, 4), 50 * index, np.uint16)).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"all 3 pictures are black.*save them with 8 bits"):
        open_source(str(tmp_path))


def test_a_link_within_the_folder_is_no_second_class(tmp_path):
    folder_of(tmp_path / "set")
    (tmp_path / "set" / "newest").symlink_to(tmp_path / "set" / "cat")
    source = open_source(str(tmp_path / "set"), conditional=True)
    assert source.spec.class_names == ("cat", "dog")


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    folder_of(tmp_path / "set")
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(DataError, match=r"dog: cannot be listed .Permission denied"):
        open_source(str(tmp_path / "set"))


def test_links_in_an_archive_are_what_they_lead_to(tmp_path):
    folder_of(tmp_path / "set")
    first = sorted((tmp_path / "set" / "cat").iterdir())[0]
    (tmp_path / "set" / "dog" / "link.png").symlink_to(Path("..") / "cat" / first.name)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "set", "set")
    assert sum(len(b.x) for b in open_source(str(tmp_path / "set.tar")).load()) == 13


def tiff_of_12_bits(values):
    """A TIFF of grey values [4, 4], two in three bytes."""
    pairs = values.reshape(-1, 2)
    packed = b"".join(((int(a) << 12) | int(b)).to_bytes(3, "big") for a, b in pairs)
    tags = ((256, 4), (257, 4), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4))
    tags = (*tags, (279, len(packed)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(packed)
    header = b"II*\0" + struct.pack("<I", start)
    return header + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_12_bits_are_scaled_by_what_12_bits_hold(tmp_path):
    values = np.full((4, 4), 2048)
    values[0], values[1] = 4095, 0
    for index in range(3):
        (tmp_path / f"{index}.tif").write_bytes(tiff_of_12_bits(values))
    x = open_source(str(tmp_path)).load().train.x
    assert (x[0, 0] == 255).all()
    assert (x[0, 1] == 0).all()
    assert (x[0, 2:] == 127).all()
