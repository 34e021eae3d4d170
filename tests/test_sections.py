"""A setting lives in a section and has a full name; its plain name will do where it means no other.
With a made-up recipe whose builder, loader, optimiser and schedule share names.
"""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pytest
from program import refused

import genjax.cli
from genjax.cli import _axes_in, _Sweep, _Train
from genjax.cli.flags import axes_of, parse_recipe
from genjax.data import SOURCES, Source, digits
from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.learning.optim import Optimizer
from genjax.protocol import DataSpec, Model
from genjax.runs.folder import default_folder
from genjax.runs.sweeps import check_axes
from genjax.settings import Count, Help, OneOf, Rate, Settings, builder
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, Schedule, from_dict, to_dict
from genjax.zoo.sections import SECTIONS, parameters_of, replace, settings_of

TEMPERATURES = {"cold": 1.0, "warm": 2.0}


class Functions(NamedTuple):
    """What no command line can write."""

    call: object


@dataclasses.dataclass(frozen=True)
class Shape(Settings):
    """The shape of things.

    Attributes:
        order: how the layers stand.
        widths: of the layers.
    """

    order: Literal["narrow", "wide"] = "narrow"
    widths: tuple[Count, ...] = (4, 8)


@builder
def made_up(
    spec: DataSpec,
    *,
    b1: Rate = 0.25,
    steps: Count = 3,
    loud: bool = False,
    mode: Literal["a", "b"] = "a",
    temperature: Annotated[str, OneOf(tuple(TEMPERATURES))] = "cold",
    prior: Literal["normal"] | Functions = "normal",
    fading: Annotated[Rate, Help("how fast it fades.")] = 0.5,
    shape: Shape = Shape(),
) -> Model:
    """A builder that avoids no name.

    Args:
        b1: not the optimiser's.
        steps: not the schedule's.
        loud: not the loader's.
        mode: not the sweep's.
        temperature: of the air.
        prior: of z.
        shape: of things.
    """
    return vae(spec, hidden=shape.widths, latent_dim=2, beta=b1)


def noisy_digits(
    order: int = 1, loud: bool = True, gain: float = 2.0, quiet: bool = False
) -> Source:
    """Digits.

    Args:
        order: of the digits.
        loud: not the builder's.
        gain: the loader's own.
        quiet: the loader's own, too.
    """
    return digits()


ROW = Recipe(
    name="made-up",
    family=made_up,
    data="noisy_digits",
    summary="a made-up recipe",
    optimizer=Optimizer(learning_rate=1e-2),
    schedule=Schedule(steps=10),
)
TWO = dataclasses.replace(
    ROW,
    name="two",
    optimizer={"gen": Optimizer(), "model": Optimizer(algorithm="sgd")},
)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(SOURCES, "noisy_digits", noisy_digits)
    monkeypatch.setitem(ZOO, "made-up", ROW)
    monkeypatch.setitem(ZOO, "two", TWO)


def parsed(flags: str, name: str = "made-up", command: str = "train") -> Recipe:
    options = {"train": _Train, "sweep": _Sweep}[command]
    return parse_recipe(command, [name, *flags.split()], options)[0]


# --- what settings there are ----------------------------------------------------------------------


def test_the_settings_of_a_builder_with_a_group():
    found = parameters_of(made_up)
    assert list(found) == [
        "b1", "steps", "loud", "mode", "temperature", "prior", "fading", "order", "widths"
    ]  # fmt: skip
    assert found["b1"] == (float, 0.25, "not the optimiser's.")
    # A group's fields are explained where they are declared, and a type that explains itself need
    # not be explained again.
    assert found["order"] == (Literal["narrow", "wide"], "narrow", "how the layers stand.")
    assert found["widths"] == (tuple[int, ...], (4, 8), "of the layers.")
    assert found["fading"] == (float, 0.5, "how fast it fades.")
    # Choices that stand in a table, and a union without what cannot be written.
    assert found["temperature"][0] == Literal["cold", "warm"]
    assert found["prior"][0] == Literal["normal"]


def test_the_shortest_names_that_mean_one_setting():
    settings = settings_of(ROW)
    assert {name for name in settings if "." in name} == {
        f"{section}.{name}"
        for name, sections in {
            "b1": ("model", "optimizer"),
            "steps": ("model", "schedule"),
            "loud": ("model", "data"),
            "order": ("model", "data"),
        }.items()
        for section in sections
    }
    assert {"mode", "gain", "quiet", "learning_rate", "batch_size", "schedule"} <= set(settings)
    assert settings["data.order"].path == "data_options.order"
    assert settings["gain"].full == "data.gain"
    # A player may even be called like a section: a full name means what it says.
    settings = settings_of(TWO)
    assert {"gen.b1", "optimizer.model.b1", "b1", "gen.b2", "model.b2"} <= set(settings)
    assert "model.b1" not in settings
    assert [settings[name].field for name in ("b1", "model.b2")] == ["model", "optimizer"]


# --- in Python ------------------------------------------------------------------------------------


def test_settings_are_replaced_by_full_names():
    changed = replace(
        ROW,
        **{"model.b1": 0.5, "optimizer.b1": 0.75, "data.order": 3, "schedule.seed": 1, "gain": 4.0},
    )
    assert changed.model == {"b1": 0.5}
    assert changed.optimizer.b1 == 0.75
    assert changed.data_options == {"order": 3, "gain": 4.0}
    assert changed.schedule == Schedule(steps=10, seed=1)
    changed = replace(TWO, **{"optimizer.model.b1": 0.5, "model.b1": 0.75, "gen.b1": 0.125})
    assert [changed.optimizer[p].b1 for p in ("gen", "model")] == [0.125, 0.5]
    assert changed.model == {"b1": 0.75}


def test_changes_that_fit_only_together():
    row = dataclasses.replace(ROW, schedule=Schedule(batch_size=12, microbatches=4))
    changed = replace(row, batch_size=10, microbatches=5)
    assert (changed.schedule.batch_size, changed.schedule.microbatches) == (10, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b1", r"Several settings are called 'b1'; .*: model\.b1, optimizer\.b1"),
        ("order", r"model\.order, data\.order"),
        ("schedule.step", r"no setting called 'schedule.step'. Did you mean .*schedule\.steps"),
        ("data.gian", r"Did you mean .*data\.gain"),
        ("model.learning_rate", "no setting called"),
    ],
)
def test_names_that_mean_none_or_several_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        replace(ROW, **{name: 1})


def test_shared_names_go_to_json_and_back():
    changed = replace(ROW, **{"model.b1": 0.5, "data.loud": False, "model.steps": 7})
    values = json.loads(json.dumps(to_dict(changed)))
    assert values["model"]["b1"] == 0.5
    assert values["optimizer"]["b1"] == 0.9
    assert from_dict(values, ZOO) == from_dict(to_dict(changed), ZOO)
    assert to_dict(from_dict(values, ZOO)) == values
    assert str(default_folder(changed, ROW)) == (
        "runs/made-up,data.loud=False,model.b1=0.5,model.steps=7"
    )


def test_a_config_from_before_some_settings_means_their_defaults():
    values = to_dict(ROW)
    for section, name in [("model", "fading"), ("optimizer", "rates"), ("schedule", "place")]:
        del values[section][name]
    assert to_dict(from_dict(values, ZOO)) == to_dict(ROW)


# --- on the command line --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--model.b1 0.5", {"model.b1": 0.5}),
        ("--optimizer.b1=0.5", {"optimizer.b1": 0.5}),
        ("--gain 4 --model.steps 5 --schedule.steps 6",
         {"data.gain": 4.0, "model.steps": 5, "schedule.steps": 6}),
        ("--data.gain 4 --optimizer.learning-rate 0.5", {"gain": 4.0, "learning_rate": 0.5}),
        ("--optimizer.learning_rate 0.5", {"learning_rate": 0.5}),
        ("--model.widths 2 3", {"widths": (2, 3)}),
        ("--batch-size 3 --schedule.batch-size 4", {"batch_size": 4}),  # the last counts
        ("--model.loud --no-quiet", {"model.loud": True}),
        ("--data.no-loud --quiet", {"data.loud": False, "quiet": True}),
        ("--no-data.loud --data.quiet", {"data.loud": False, "quiet": True}),
        ("--data.loud --data.no-quiet --model.no-loud", {}),
        ("--schedule cosine --optimizer.schedule linear", {"schedule": "linear"}),
    ],
)  # fmt: skip
def test_flags_by_full_and_by_plain_names(flags, changes):
    assert to_dict(parsed(flags)) == to_dict(replace(ROW, **changes))


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--gen.b1 0.5", {"gen.b1": 0.5}),
        ("--optimizer.gen.b1 0.5 --optimizer.model.b1 0.25",
         {"gen.b1": 0.5, "optimizer.model.b1": 0.25}),
        ("--model.b1 0.125", {"model.b1": 0.125}),
    ],
)  # fmt: skip
def test_flags_of_players(flags, changes):
    assert to_dict(parsed(flags, "two")) == to_dict(replace(TWO, **changes))


def test_a_flag_of_the_command_comes_before_a_setting_of_that_name():
    recipe, _, options = parse_recipe("sweep", ["made-up", "--mode", "map"], _Sweep)
    assert (options.mode, recipe.model) == ("map", {})
    assert parsed("--model.mode b", command="sweep").model == {"mode": "b"}
    assert parsed("--mode b").model == {"mode": "b"}  # `train` has no such flag


def test_of_two_data_sets_the_last_counts_like_of_all_flags():
    assert parsed("--data ring --data=noisy_digits --gain 3").data == "noisy_digits"
    assert parsed("--data noisy_digits --data ring").data == "ring"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train made-up --b1 0.5",
         "--b1 may mean several settings; say which one: --model.b1, --optimizer.b1."),
        ("train made-up --steps=3", "--model.steps, --schedule.steps."),
        ("train made-up --no-loud", "--model.no-loud, --data.no-loud."),
        ("sweep made-up --b1 0.5,0.75", "--model.b1, --optimizer.b1."),
        ("train made-up --model.bone 3", "--model.bone"),
        ("train made-up --data.order many", "--data.order"),
        ("train made-up --temperature hot", "--temperature"),
        ("sweep made-up --data.order 1,2", "--data.order cannot be swept in one program"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused_in_one_message(
    args: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(args.split(), capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["made-up", "two", "cgan", "diffusion"])
def test_help_shows_each_flag_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        genjax.cli.main(["train", name, "--help"])
    out = capsys.readouterr().out
    shown = re.findall(r"^[│ ] --(\w[\w.-]*)", out, re.MULTILINE)
    assert len(shown) == len(set(shown))
    wanted = {short.replace("_", "-") for short in settings_of(ZOO[name])}
    names = (field.name.replace("_", "-") for field in dataclasses.fields(_Train))
    own = {"data", *names}
    assert set(shown) == wanted | own
    for section in SECTIONS.values():
        if any(setting.full.startswith(section) for setting in settings_of(ZOO[name]).values()):
            assert f" {section} options " in out
            assert f"Each may be called --{section}.NAME as well." in out


def test_axes_of_a_sweep_by_full_and_by_plain_names():
    args = "made-up --optimizer.b1 0.5,0.75 --optimizer.learning-rate=1e-3,3e-4 --fading 0.25,0.5"
    axes, others = _axes_in([*args.split(), "--seeds", "2"])
    assert others == ["made-up", "--seeds", "2"]
    found = axes_of(ROW, ROW, axes, _Sweep)
    assert found == {
        "optimizer.b1": [0.5, 0.75],
        "learning_rate": [1e-3, 3e-4],
        "fading": [0.25, 0.5],
    }
    check_axes(ROW, found)
    check_axes(ROW, {"optimizer.learning_rate": [0.5]})  # as in Python
    with pytest.raises(ConfigError, match="order cannot be swept"):
        check_axes(ROW, {"data.order": [1.0, 2.0]})


def kinds_in(hint):
    """The types that a union, or a tuple, is of."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union, tuple):
        return {kind for one in args if one is not ... for kind in kinds_in(one)}
    return {origin or hint}


def test_every_setting_of_the_zoo_can_be_written_on_a_command_line():
    """Records, cells and networks are for Python; one among them, and a row has no flags at all."""
    written = {int, float, str, bool, type(None), typing.Literal}
    for row in ZOO.values():
        for name, setting in settings_of(row).items():
            assert kinds_in(setting.hint) <= written, (row.name, name)


def test_a_cell_is_chosen_by_name(capsys):
    said = " ".join(refused(["train", "lstm", "--cell", "gruu"], capsys).split())
    assert "Expected one of ('vanilla', 'lstm', 'gru')" in said
    assert "Unrecognized options: --stepz" in refused(["train", "vrnn", "--stepz", "3"], capsys)
