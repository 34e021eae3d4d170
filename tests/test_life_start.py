"""Runs that begin with the parameters of others, and runs side by side."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import optax
import pytest
from program import refused

import genjax
import genjax.cli
from genjax.checks import leaves_by_name
from genjax.errors import ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.step import training
from genjax.protocol import DataSpec
from genjax.runs import compare
from genjax.runs.init_from import renamed, started_from
from genjax.runs.stages import checkpoint_hash
from genjax.zoo import ZOO

SMALL = {
    "hidden": (8,),
    "latent_dim": 2,
    "batch_size": 16,
    "steps": 4,
    "steps_per_call": 2,
    "log_every": 2,
    "evaluate_every": 2,
    "sample_every": 0,
}


def trained(x, folder, said=None, what="vae", **changes):
    say = str if said is None else said.append
    return genjax.train(what, x, out=folder, say=say, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two runs that differ in a seed and a width."""
    place = tmp_path_factory.mktemp("runs")
    return trained(data, place / "a"), trained(data, place / "b", hidden=(6,), seed=3)


def named(run):
    return {name: np.asarray(leaf) for name, leaf in leaves_by_name(run.params).items()}


# --- --init-from ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_the_same_model_begins_with_all_of_it(runs, data, tmp_path):
    first, _ = runs
    said = []
    # So small a step that the parameters are still those that it began with.
    run = trained(
        data, tmp_path / "run", said, init_from=first.folder, seed=9, learning_rate=1e-30, steps=2
    )
    wanted = named(first)
    for name, leaf in named(run).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
    assert any(f"{len(wanted)} of {len(wanted)} arrays are those of" in line for line in said)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["init_from"]
    assert kept == {
        "folder": str(first.folder.absolute()),
        "step": 4,
        "hash": checkpoint_hash(first.folder, 4),
    }


@pytest.mark.slow
def test_a_run_of_another_width_takes_what_fits_and_says_what_does_not(runs, data, tmp_path):
    first, _ = runs
    said = []
    # The decoder's output has another width, but its bias has not.
    run = trained(
        data, tmp_path / "run", said, init_from=first.folder, hidden=(6,), learning_rate=1e-30
    )
    alone = trained(data, tmp_path / "alone", hidden=(6,), learning_rate=1e-30)
    text, old, own = "\n".join(said), named(first), named(alone)
    taken = 0
    for name, leaf in named(run).items():
        fits = name in old and old[name].shape == leaf.shape
        taken += fits
        wanted = old[name] if fits else own[name]  # which two steps of 1e-30 have moved
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-25, err_msg=name)
        if not fits:
            assert f"{name} ({list(old[name].shape)} there, {list(leaf.shape)} here)" in text
    assert 0 < taken < len(own)
    assert f"{taken} of {len(own)} arrays are those of" in text


@pytest.mark.slow
def test_what_goes_on_needs_the_other_run_no_more(runs, data, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(runs[0].folder, origin)
    even = {"optimizer.schedule": "constant"}  # one over two and one over four steps differ
    trained(data, tmp_path / "run", init_from=origin, steps=2, **even)
    whole = trained(data, tmp_path / "whole", init_from=origin, steps=4, **even)
    shutil.rmtree(origin)
    run = trained(data, tmp_path / "run", init_from=origin, steps=4, **even)
    assert run.step == 4
    for name, leaf in named(whole).items():
        np.testing.assert_array_equal(named(run)[name], leaf)
    with pytest.raises(ConfigError, match=r"init_from.folder: there .*, now '\(not set\)'"):
        trained(data, tmp_path / "run", steps=4, **even)
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        trained(data, tmp_path / "run", init_from=runs[1].folder, steps=4, **even)


@pytest.mark.slow
def test_entries_that_follow_begin_as_copies_of_what_was_taken(runs, tmp_path):
    first, _ = runs
    model = ZOO["vae"].build(first.spec, hidden=(8,), latent_dim=2)
    model = model._replace(follows={"slow": ("vae", 0.9)})
    start = started_from(first.folder, model, tmp_path / "new")
    params = training(start.begin(model), optax.sgd(0.1)).init(jax.random.key(5)).params
    for entry in ("vae", "slow"):
        for x, y in zip(*map(jax.tree.leaves, (params[entry], first.params["vae"])), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_initialisation_from_data_would_overwrite_what_was_taken(runs, tmp_path):
    first, _ = runs
    model = ZOO["vae"].build(first.spec, hidden=(8,), latent_dim=2)
    prepared = model._replace(prepare=lambda params, state, batch, key: (params, state))
    start = started_from(first.folder, prepared, tmp_path / "new")
    assert start.begin(prepared).prepare is None
    assert any("initialisation from the first batch is left out" in line for line in start.lines)


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({"n_classes": 2, "class_names": "ab"}, {"class_names": "ba"}, "classes are not those"),
        ({"columns": "abc"}, {"columns": "abd"}, "by number: 2 is 'c' there and 'd' here"),
        ({"columns": "abc"}, {"columns": None}, None),
        ({"kind": "binary"}, {"values": (1, 2)}, "binary values .* 0 is 0 there and 1 here, 1 is"),
        ({"kind": "tokens", "levels": 2, "vocabulary": "ab"}, {"vocabulary": "ac"}, "symbols are"),
        ({"kind": "tokens", "levels": 2, "vocabulary": "ab"}, {}, None),
    ],
)
def test_names_that_weights_do_not_follow_are_said(there, here, said):
    spec = DataSpec((3,), **{"kind": "continuous", **there})
    lines = renamed(spec, dataclasses.replace(spec, **here))
    assert len(lines) == (said is not None)
    assert said is None or re.search(said, lines[0])


@pytest.mark.slow
def test_what_init_from_refuses(runs, data, tmp_path, capsys, monkeypatch):
    first, _ = runs
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not a run folder"):
        trained(data, tmp_path / "no", init_from=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"No array of .* has the name and the shape"):
        trained(data, tmp_path / "no", what="gan", evaluate_every=0, init_from=first.folder)
    with pytest.raises(ConfigError, match="is the run itself"):
        trained(data, first.folder, init_from=first.folder)
    with pytest.raises(ConfigError, match="init_from is for recipes"):
        genjax.train(first.model, data, steps=1, init_from=first.folder)
    assert not list(tmp_path.iterdir())
    said = refused(["train", "vae", "--init-from", "nowhere", "--out", "no"], capsys)
    assert "nowhere is not a run folder" in said
    assert Checkpoints(first.folder / "checkpoints").steps() == [4]


# --- genjax compare -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(runs):
    for run, n in zip(runs, (8, 4), strict=True):
        report = run.evaluate("test", n=n, seed=0)
        (run.folder / "report.json").write_text(json.dumps(report, default=float))
    return [run.folder for run in runs]


def test_settings_that_differ_and_no_others(runs):
    rows = {row[0]: row[1:] for row in compare.differing(compare.read([r.folder for r in runs]))}
    assert rows == {"model.hidden": ["8", "6"], "schedule.seed": ["0", "3"]}


def test_figures_are_those_of_the_reports_with_their_errors(evaluated):
    found = compare.read(evaluated)
    for row, folder in zip(compare.figures(found), evaluated, strict=True):
        report = json.loads((folder / "report.json").read_text())
        assert row[0] == folder.name
        assert row[2] == f"{report['mean']:.4f} ± {report['standard_error']:.4f}"
        assert row[3:] == [report["data"], "test", str(report["n"]), "4 (newest)", "report"]
    (said,) = [line for line in compare.incomparable(found) if "same n" in line]
    assert said == "report is not of the same n: 8; 4"


def test_the_command_writes_a_picture_and_overwrites_nothing(
    evaluated, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    args = ["compare", *map(str, evaluated)]
    genjax.cli.main(args)
    first = (tmp_path / "compare.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "model.hidden" in out
    assert "not to be compared: report is not of the same n: 8; 4" in out
    genjax.cli.main(args)
    assert "compare.png is there already, and stays: written as compare-2.png" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "compare.png").read_bytes() == first


def test_runs_of_one_name_are_told_apart_and_bad_folders_are_named(runs, tmp_path, capsys):
    a = runs[0].folder
    (tmp_path / "x").mkdir()
    shutil.copytree(a, tmp_path / "x" / "a")
    found = compare.read([a, tmp_path / "x" / "a"])
    assert [run.name for run in found] == [f"{a.parent.name}/a", "x/a"]
    assert compare.differing(found) == []
    pairs = zip(found, (0.99999991, 0.9999999), strict=True)
    near = [one._replace(settings={"b2": b2}) for one, b2 in pairs]
    assert compare.differing(near) == [["b2", "0.99999991", "0.9999999"]]
    data = tmp_path / "x" / "a" / "data.json"
    values = json.loads(data.read_text())
    values["files"] = [{**one, "sha256": 64 * "0"} for one in values["files"]]
    data.write_text(json.dumps(values))
    ((name, *_),) = compare.differing(compare.read([a, tmp_path / "x" / "a"]))
    assert name == "SHA-256 of the data"
    for args, message in (
        ([str(a)], "two run folders or more"),
        ([str(a), str(a)], "is given twice"),
        ([str(a), str(tmp_path / "nowhere")], "is not a run folder"),
    ):
        assert message in refused(["compare", *args], capsys)
    (tmp_path / "x" / "a" / "report.json").write_text('{"files": 7, "n": []}')
    both = compare.read([tmp_path / "x" / "a", runs[1].folder])
    assert all(isinstance(line, str) for line in compare.incomparable(both))
    (tmp_path / "x" / "a" / "report.json").write_text("[1")
    assert "report.json is damaged" in refused(
        ["compare", str(a), str(tmp_path / "x" / "a")], capsys
    )


def test_a_run_without_reports_shows_its_log(runs, tmp_path):
    shutil.copytree(runs[0].folder, tmp_path / "a")
    for path in (tmp_path / "a").glob("report*"):
        path.unlink()
    (run,) = compare.read([tmp_path / "a", runs[1].folder])[:1]
    ((name, figure, value, *_),) = compare.figures([run])
    best = max(line["valid/bound"] for line in run.lines if "valid/bound" in line)
    assert (name, figure) == ("a", "valid/bound")
    assert value == f"{best:.4f} (the best of 2, so too good)"
