"""Random changes of images as they are trained on: what they do, when, and for whom."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_checks import assert_same, rows_at

import genjax.cli
from genjax import DataSpec, data
from genjax.data import augmentation, batch_at, open_source, prepare_at
from genjax.errors import ConfigError
from genjax.runs.stages import opened
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

SPEC = DataSpec((5, 6, 2), "continuous")
IMAGE = np.arange(1, 61, dtype=np.float32).reshape(5, 6, 2)


def changed(text, n=400, seed=0):
    x = jnp.broadcast_to(IMAGE, (n, *SPEC.shape))
    return np.asarray(augmentation(text, SPEC)(jax.random.key(seed), x))


@pytest.mark.parametrize(("text", "axis"), [("flip", 1), ("vflip", 0)])
def test_a_flip_mirrors_every_second_image(text, axis):
    found = changed(text)
    turned = (found == np.flip(IMAGE, axis)).all((1, 2, 3))
    plain = (found == IMAGE).all((1, 2, 3))
    assert (turned ^ plain).all()
    assert 140 < turned.sum() < 260


@pytest.mark.parametrize(("text", "mode"), [("crop1", "edge"), ("pad2", "constant")])
def test_all_shifts_are_equally_likely(text, mode):
    n = int(text[-1])
    wide = np.pad(IMAGE, ((n, n), (n, n), (0, 0)), mode=mode)
    cuts = {
        wide[i : i + 5, j : j + 6].tobytes(): (i, j)
        for i in range(2 * n + 1)
        for j in range(2 * n + 1)
    }
    counts = Counter(cuts[one.tobytes()] for one in changed(text, 2500))
    expected = 2500 / len(cuts)
    assert len(counts) == len(cuts) == (2 * n + 1) ** 2
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_changes_follow_each_other_and_are_a_function_of_the_key():
    np.testing.assert_array_equal(changed("flip,crop2"), changed(" flip , crop2 "))
    assert (changed("flip,crop2") != changed("flip,crop2", seed=1)).any()
    assert augmentation("", SPEC) is None


@pytest.mark.slow
def test_training_batches_are_changed_and_no_others():
    plain = data.digits(binarize="dynamic")
    source = plain._replace(augment=augmentation("flip,crop2", plain.spec))
    stored = source.load().train
    arrays = jax.tree.map(jnp.asarray, stored)
    on_device = jax.jit(batch_at(source, 16, 3))(arrays, 5)
    on_host = jax.jit(prepare_at(source, 3))(rows_at(source, stored, 16, 3, 5), 5)
    assert_same(on_device, on_host)
    before = batch_at(plain, 16, 3)(arrays, 5)
    assert (before.x != on_device.x).any()
    # What the data draw for themselves is the same: a change of order and place alone.
    only_flips = plain._replace(augment=augmentation("flip", plain.spec))
    flipped = batch_at(only_flips, 16, 3)(arrays, 5)
    np.testing.assert_array_equal(flipped.x.sum((1, 2, 3)), before.x.sum((1, 2, 3)))
    key = jax.random.key(0)
    assert_same(source.prepare(key, stored), plain.prepare(key, stored))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("flips", "'flips' is no change of images. Expected, with commas"),
        ("crop", "'crop' is no change"),
        ("crop-1", "'crop-1' is no change"),
        ("crop0", "crop0 must shift by 1 to 4 pixels of images of 5 x 6"),
        ("flip,pad5", "pad5 must shift by 1 to 4"),
    ],
)
def test_what_is_no_change(text, match):
    with pytest.raises(ConfigError, match=match):
        augmentation(text, SPEC)


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec((2,), "continuous"),
        DataSpec((8, 8), "binary", step="row"),
        DataSpec((4, 5, 2), "continuous", step="frame"),
    ],
)
def test_other_data_than_images_are_refused(spec):
    with pytest.raises(ConfigError, match=r"is for images .* Leave --augment out"):
        augmentation("flip", spec)


def test_the_command_refuses_before_there_is_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        genjax.cli.main(["train", "diffusion-2d", "--augment", "flip", "--out", "here"])
    assert "Leave --augment out" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


@pytest.mark.slow
def test_data_on_the_device_and_on_the_host_train_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--augment", "flip,crop1", "--batch-size", "8", "--checkpoint-every", "3"]
    rest = ["--steps-per-call", "3", "--log-every", "3", "--warmup-steps", "0"]
    for place in ("device", "host"):
        more = [*small, *rest, "--place", place, "--steps", "6", "--out", place]
        genjax.cli.main(["train", "vae", *more])
    lines = [
        [*map(json.loads, (tmp_path / place / "metrics.jsonl").read_text().splitlines())]
        for place in ("device", "host")
    ]
    for one, two in zip(*lines, strict=True):
        same = {name for name in one if "loss" in name or "log_prob" in name}
        assert same
        assert {name: one[name] for name in same} == {name: two[name] for name in same}


def test_changes_of_a_sources_own_are_kept():
    source = open_source("digits")

    def own(key, batch):
        return batch

    recipe, mine = ZOO["vae"], source._replace(augment=own)
    assert opened(recipe, mine).source.augment is own
    assert opened(recipe, source).source.augment is None
    with pytest.raises(ConfigError, match="has changes of its own: leave one out"):
        opened(replace(recipe, augment="flip"), mine)
