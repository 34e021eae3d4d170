"""Run folders: what each is called, what is no run, and that nothing is overwritten."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from short_runs import contents, tiny

from genjax.errors import CheckpointError, ConfigError, DataError
from genjax.protocol import DataSpec
from genjax.runs.folder import (
    check_spec,
    default_folder,
    keep_spec,
    nothing_trained,
    open_folder,
    read_config,
    read_spec,
    write_json,
)
from genjax.runs.load import load
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.recipe import to_dict
from genjax.zoo.sections import replace


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(
            ConfigError, match="exists and is not a run folder; nothing was written"
        ):
            open_folder(place, {})
    with pytest.raises(
        CheckpointError, match=r"Could not write .*config\.json: (Not a directory|File exists)"
    ):
        open_folder(tmp_path / "thesis.txt" / "below", {})
    assert contents(tmp_path) == {"thesis.txt": b"mine"}
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"recipe": "cva', r"config\.json is damaged: expected JSON"),
        ("[1]", r"config\.json is damaged: expected a JSON object, found list"),
        ("{}", r"config\.json: .* it has no entry 'recipe'"),
        ('{"recipe": "cvea"}', "no recipe called 'cvea'. Did you mean cvae"),
        ('{"recipe": "cvae"}', r"config\.json: .* of the recipe 'cvae': it has no entry 'data'"),
        ('{"recipe": "cvae", "sweep": {}}', "is a sweep of several members"),
    ],
)
def test_a_damaged_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_settings_that_do_not_fit_leave_no_folder_behind(tmp_path: Path) -> None:
    for error, changes in (
        (DataError, {"batch_size": 2000}),
        (ConfigError, {"warmup_steps": 40}),
        (ConfigError, {"net": "conv", "channels": ()}),
    ):
        with pytest.raises(error):
            train(tiny("vae", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints_cannot_be_sampled(tmp_path: Path) -> None:
    open_folder(tmp_path / "run", to_dict(tiny("cvae")))
    with pytest.raises(CheckpointError, match=r"has no checkpoint yet\. If a process trains there"):
        load(tmp_path / "run")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert contents(tmp_path) == {"new/report.json": b'{\n  "a": 1\n}\n'}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "vae"),
        ({"seed": 3}, "vae,seed=3"),
        ({"hidden": (8, 16), "learning_rate": 3e-4}, "vae,hidden=8_16,learning-rate=0.0003"),
    ],
)
def test_each_command_has_a_folder_of_its_own(changes: dict[str, Any], name: str) -> None:
    row = ZOO["vae"]
    assert default_folder(replace(row, **changes), row) == Path("runs") / name


def test_folders_of_other_data_of_sweeps_and_of_many_settings() -> None:
    row = ZOO["cvae"]
    ring = row.on("ring")
    assert default_folder(ring, row) == Path("runs/cvae,data=ring")
    assert default_folder(replace(ring, conditional=False), row) == Path(
        "runs/cvae,conditional=False,data=ring"
    )
    assert default_folder(row, row, "sweep-", learning_rate=[1e-3, 3e-4], seeds=2) == Path(
        "runs/sweep-cvae,learning-rate=0.001_0.0003,seeds=2"
    )
    many = {
        "seed": 1,
        "steps": 12345,
        "batch_size": 17,
        "log_every": 11,
        "evaluate_every": 13,
        "sample_every": 17,
        "beta": 0.123456,
        "learning_rate": 0.000123456,
    }
    names = {
        default_folder(replace(row, **many), row),
        default_folder(replace(row, **{**many, "seed": 2}), row),
    }
    assert len(names) == 2
    assert all(len(name.name) < 60 for name in names), (
        "a long list of settings is replaced by a hash of it"
    )


def test_settings_that_came_later_have_the_value_that_was_there_before(tmp_path: Path) -> None:
    values = to_dict(tiny("cvae"))
    old = {**values, "model": {k: v for k, v in values["model"].items() if k != "activation"}}
    write_json(tmp_path / "config.json", old)
    open_folder(tmp_path, values)
    assert json.loads((tmp_path / "config.json").read_text()) == old
    other = {**values, "model": {**values["model"], "activation": "tanh"}}
    with pytest.raises(ConfigError, match=r"model\.activation: there '\w+', now 'tanh'"):
        open_folder(tmp_path, other)
    gone = {**old, "model": {**old["model"], "gone": 3}}
    write_json(tmp_path / "config.json", gone)
    with pytest.raises(ConfigError, match=r"model\.gone: there 3, now '\(not set\)'"):
        open_folder(tmp_path, values)


def test_names_that_came_to_be_known_are_no_other_data(tmp_path):
    """Of classes and of columns, in a run from before they were kept; names that differ are."""
    before = DataSpec((2,), "continuous", n_classes=2)
    now = dataclasses.replace(before, columns=("a", "b"), class_names=("cat", "dog"))
    check_spec(now, before, tmp_path)
    with pytest.raises(DataError, match="columns was"):
        check_spec(dataclasses.replace(now, columns=("b", "a")), now, tmp_path)


def test_names_that_came_to_be_known_are_kept(tmp_path):
    """So that what goes on is of one spec with the checkpoints that it saves from then on."""
    before = DataSpec((2,), "continuous")
    now = dataclasses.replace(before, columns=("a", "b"))
    for spec in (before, now, now):
        keep_spec(tmp_path, spec)
    assert read_spec(tmp_path) == now


@pytest.mark.slow
def test_settings_whose_first_step_was_refused_do_not_hold_the_folder(tmp_path, monkeypatch):
    row = replace(ZOO["vae-ring"], hidden=(4,), latent_dim=1, steps=1)

    def refuse(*args, **kwargs):
        raise ConfigError("the batch does not fit")

    with monkeypatch.context() as first:
        first.setattr("genjax.runs.train.fit", refuse)
        with pytest.raises(ConfigError, match="does not fit"):
            train(row, tmp_path / "run")
    assert nothing_trained(tmp_path / "run")
    train(replace(row, batch_size=8), tmp_path / "run")
    assert read_config(tmp_path / "run")["schedule"]["batch_size"] == 8
    assert not nothing_trained(tmp_path / "run")
    with pytest.raises(ConfigError, match="batch_size: there 8, now 16"):
        train(replace(row, batch_size=16), tmp_path / "run")
