"""A run in the place of data: what is kept of it, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from program import arrays_in, program, refused

import genjax
from genjax.data import is_run, open_source
from genjax.errors import ConfigError, DataError
from genjax.learning.optim import Optimizer
from genjax.runs.load import load
from genjax.runs.stages import first_to_train, opened
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.recipe import Schedule, to_dict

SCHEDULE = Schedule(
    steps=4, batch_size=8, evaluate_every=0, sample_every=4, checkpoint_every=2, steps_per_call=2
)


def tiny(name, steps=4, **changes):
    row = ZOO[name]
    schedule = dataclasses.replace(SCHEDULE, steps=steps)
    model = {**row.model, **row.tiny}
    plain = Optimizer(learning_rate=1e-3)
    return dataclasses.replace(row, model=model, optimizer=plain, schedule=schedule, **changes)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A VAE of digits, and a density of its latents, in one folder."""
    folder = tmp_path_factory.mktemp("stages")
    train(tiny("vae"), folder / "runs" / "vae", say=str)
    prior = tiny("vae-flow-prior", data=str(folder / "runs" / "vae"))
    train(prior, folder / "runs" / "prior", say=str)
    return folder / "runs"


@pytest.mark.slow
def test_the_run_keeps_where_its_first_stage_was_and_its_settings(stages):
    config = json.loads((stages / "prior" / "config.json").read_text())
    assert config["first"]["folder"] == str(stages / "vae")
    assert config["first"]["step"] == 4
    assert len(config["first"]["hash"]) == 64
    kept = stages / "prior" / "first" / "config.json"
    assert kept.read_bytes() == (stages / "vae" / "config.json").read_bytes()
    run, first = load(stages / "prior"), load(stages / "vae")
    assert run.model.spec == first.model.spec
    assert run.data.data == "digits"
    for got, wanted in zip(
        run.params["first"]["vae"]["encoder"].values(),
        first.params["vae"]["encoder"].values(),
        strict=True,
    ):
        assert str(got) == str(wanted)


@pytest.mark.slow
def test_a_moved_run_samples_the_same_bits_without_its_first_stage(stages, tmp_path):
    program(
        ["sample", str(stages / "prior"), "--n", "4", "--out", str(tmp_path / "there")], tmp_path
    )
    moved = tmp_path / "elsewhere"
    shutil.copytree(stages / "prior", moved)
    (stages / "vae").rename(stages / "gone")
    try:
        out, _ = program(
            ["sample", str(moved), "--n", "4", "--out", str(tmp_path / "here")], tmp_path
        )
        assert "4 samples [4, 8, 8, 1]" in out
        program(["evaluate", str(moved), "--n", "4"], tmp_path)
    finally:
        (stages / "gone").rename(stages / "vae")
    one, other = (arrays_in(tmp_path / f"{name}.npz")["x"] for name in ("there", "here"))
    np.testing.assert_array_equal(one, other)
    report = json.loads((moved / "report.json").read_text())
    assert report["estimator"].startswith("joined bound, 1 sample")
    assert report["data"] == "digits"


@pytest.mark.slow
def test_going_on_is_the_same_run(stages):
    said = []
    prior = tiny("vae-flow-prior", data=str(stages / "vae"))
    train(prior, stages / "prior", say=said.append)
    assert "nothing is left to train" in said[0]


@pytest.mark.slow
def test_a_first_stage_that_changed_since_is_told(stages, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(stages / "vae", copy / "vae")
    prior = tiny("vae-flow-prior", data=str(copy / "vae"))
    train(prior, copy / "prior", say=str)
    shutil.rmtree(copy / "vae")
    other = tiny("vae")
    other = dataclasses.replace(other, schedule=dataclasses.replace(other.schedule, seed=1))
    train(other, copy / "vae", say=str)
    with pytest.raises(ConfigError, match=r"first\.hash: there '\w{64}', now '\w{64}'"):
        train(prior, copy / "prior", say=str)


@pytest.mark.slow
def test_an_unfinished_run_is_refused(stages, tmp_path):
    shutil.copytree(stages / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    config["schedule"]["steps"] = 400
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is at step 4 of 400, and a first stage has to be"):
        opened(tiny("vae-flow-prior", data=str(tmp_path / "vae")))


@pytest.mark.slow
def test_a_run_without_latents_or_of_another_family_is_refused(stages, tmp_path):
    train(tiny("flow-matching-2d"), tmp_path / "runs" / "flow", say=str)
    flow = str(tmp_path / "runs" / "flow")
    with pytest.raises(ConfigError, match="models the latents of the first; this model of ring"):
        train(tiny("vae-flow-prior", data=flow), tmp_path / "runs" / "prior", say=str)
    with pytest.raises(ConfigError, match="of a flow-matching model; this model is another"):
        train(tiny("reflow-2d", data=str(stages / "vae")), tmp_path / "runs" / "re", say=str)
    assert not (tmp_path / "runs" / "prior").exists()
    train(tiny("reflow-2d", data=flow), tmp_path / "runs" / "re", say=str)
    assert set(load(tmp_path / "runs" / "re").params) == {"flow", "teacher"}


@pytest.mark.slow
def test_settings_of_the_first_stage_that_were_edited_are_refused(stages, tmp_path):
    """The parameters fit another activation as well, and the figures would be others."""
    shutil.copytree(stages / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "first" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"activation": "gelu"', '"activation": "relu"'))
    assert path.read_text() != text
    with pytest.raises(ConfigError, match=r"is not the one that .*prior was trained with"):
        load(tmp_path / "prior")
    path.write_text(text)
    assert load(tmp_path / "prior").step == 4


@pytest.mark.slow
def test_a_first_stage_that_is_there_keeps_its_own_settings(stages, tmp_path):
    """It may have been trained with others than the row's: it is left alone, or gone on with."""
    prior = dataclasses.replace(ZOO["vae-flow-prior"], data=str(tmp_path / "vae"))
    shutil.copytree(stages / "vae", tmp_path / "vae")
    assert first_to_train(prior) is None
    longer = tiny("vae", steps=6)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(to_dict(longer)))
    assert to_dict(first_to_train(prior)) == to_dict(longer)
    other = dataclasses.replace(prior, data=str(tmp_path / "runs" / "none"))
    assert first_to_train(other) is ZOO["vae"]


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "vae-flow-prior"
    said = refused(["train", name], capsys)
    assert "vae-flow-prior stands on runs/vae, which is not there. `genjax train vae` makes" in said
    assert "--first" in said
    assert "leave --first out" in refused(["train", "vae", "--first"], capsys)
    said = refused(["train", "vae-flow-prior", "--data", "digits", "--first"], capsys)
    assert "on digits stands on no other run" in said
    said = refused(["train", "flow-matching-2d", "--data", "runs/x", "--first"], capsys)
    assert "runs/x is not there, and of flow-matching-2d --first does not know what to" in said
    for command in ("bench", "compile"):
        assert "stands on runs/vae, which is not there" in refused([command, name], capsys)
    said = refused(["bench", name, "--data", "runs/my own"], capsys)
    assert "`genjax train vae --out 'runs/my own'` makes it, and" in said
    assert "`genjax train vae-flow-prior --data 'runs/my own' --first` trains both." in said
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_step_of_a_second_stage_is_measured(stages, tmp_path):
    run = ["vae-flow-prior", "--data", str(stages / "vae"), "--hidden", "4", "--batch-size", "8"]
    assert "steps/s" in program(["bench", *run, "--seconds", "0.1"], tmp_path)[0]
    assert "lowers for CUDA" in program(["compile", *run, "--topology", "cuda"], tmp_path)[0]


@pytest.mark.slow
def test_the_command_trains_what_is_missing_first(tmp_path):
    short = ["--steps", "2", "--evaluate-every", "0", "--hidden", "4", "--plain"]
    program(["train", "vae", "--steps", "2", "--out", "runs/v", "--plain"], tmp_path)
    out, _ = program(["train", "vae-flow-prior", "--data", "runs/v", *short], tmp_path)
    assert "on runs/v" in out


def test_a_run_folder_called_like_a_data_set_does_not_stand_in_its_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert not is_run(name)
        assert is_run(f"./{name}")
    assert open_source("digits").spec.shape == (8, 8, 1)
    recipe = ZOO["vae"]
    assert opened(recipe).source.spec == recipe.source().spec


def test_a_folder_of_something_else_below_runs_is_no_run(tmp_path):
    photos = tmp_path / "runs" / "cam1" / "photos"
    assert is_run(str(photos))  # still to be trained
    photos.mkdir(parents=True)
    (photos / ".lock").write_text("{}")
    assert is_run(str(photos))
    for index in range(5):
        Image.new("L", (4, 4), 50 * index).save(photos / f"{index}.png")
    assert not is_run(str(photos))
    assert not is_run(str(photos / "0.png"))
    assert open_source(str(photos)).spec.shape == (4, 4, 1)
    assert opened(dataclasses.replace(ZOO["vae"], data=str(photos), data_options={})).first is None


@pytest.mark.slow
def test_what_begins_with_another_run_keeps_its_own_first_stage(stages, tmp_path):
    """And with another teacher's: only what is trained is taken."""
    other = dataclasses.replace(tiny("vae"), schedule=dataclasses.replace(SCHEDULE, seed=7))
    train(other, tmp_path / "vae", say=str)
    said = []
    recipe = tiny("vae-flow-prior", data=str(tmp_path / "vae"))
    train(recipe, tmp_path / "prior", say=said.append, init_from=stages / "prior")
    run, first = load(tmp_path / "prior"), load(tmp_path / "vae")
    for got, wanted in zip(
        *map(jax.tree.leaves, (run.params["first"]["vae"], first.params["vae"])), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    n = len(jax.tree.leaves(run.params["flow"]))
    assert any(line.startswith(f"{n} of {n} arrays are those of") for line in said)
    # What is frozen there is no reason to begin with that run.
    with pytest.raises(ConfigError, match="No array of"):
        train(tiny("vae", data=str(tmp_path / "vae")), tmp_path / "b", init_from=stages / "prior")


@pytest.mark.slow
def test_runs_whose_folder_of_data_is_gone_still_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    small = {"steps": 2, "batch_size": 4, "hidden": (4,), "latent_dim": 2, "sample_every": 0}
    run = genjax.train("vae", "photos", out="elsewhere/run", say=str, **small)
    few = {"steps": 2, "batch_size": 4, "hidden": (4,), "sample_every": 0, "evaluate_every": 0}
    second = genjax.train("flow-matching-2d", "elsewhere/run", out="second", say=str, **few)
    wanted = run.sample(3), second.sample(3)
    (tmp_path / "photos").rename(tmp_path / "away")
    (tmp_path / "elsewhere").rename(tmp_path / "there")
    np.testing.assert_array_equal(genjax.load("there/run").sample(3), wanted[0])
    np.testing.assert_array_equal(genjax.load("second").sample(3), wanted[1])
    with pytest.raises(DataError, match="photos"):
        genjax.load("there/run").evaluate()
