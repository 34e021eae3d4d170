"""Recipes as plain data: every row of the zoo to JSON and back, its settings by name, and what they
are hashed to.
"""

import dataclasses
import json
from typing import Literal, get_args, get_origin

import pytest

from genjax.data import SOURCES
from genjax.errors import ConfigError
from genjax.learning.optim import Optimizer
from genjax.runs.folder import completed, default_folder
from genjax.zoo import ZOO
from genjax.zoo.recipe import Schedule, config_hash, flatten, from_dict, to_dict
from genjax.zoo.sections import OF_A_CONDITION, parameters_of, replace, sections_of, settings_of

every_row = pytest.mark.parametrize("name", ZOO)
TWO = dataclasses.replace(
    ZOO["vae"],
    name="two",
    optimizer={"gen": Optimizer(learning_rate=1e-4), "disc": Optimizer(algorithm="sgd", b1=0.5)},
)
# A user's own file is a data set too.
DATA = [*SOURCES, "mine.npz"]


def other(hint, value):
    """Another value that the setting could have."""
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1  # which a batch still divides into
    if isinstance(value, float):
        return value / 2 or 0.125
    if value is None and {int, float} & set(get_args(hint)):
        return 3 if int in get_args(hint) else 0.125
    if isinstance(value, tuple):
        kind = get_args(hint)[0]
        if kind is float:  # relative lengths of averages
            return (*value, 0.1)
        return (*value, "matrix=2" if kind is str else 3)
    return "another"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*ZOO.values(), TWO], ids=lambda recipe: recipe.name)
def test_json_and_back_changes_nothing(recipe):
    values = to_dict(recipe)
    again = from_dict(json.loads(json.dumps(values)), {recipe.name: recipe})
    assert to_dict(again) == values
    assert config_hash(to_dict(again)) == config_hash(values)
    # The settings and not only their text: the same types, so that lists of JSON are tuples again.
    for section, fields in sections_of(recipe).items():
        for name, (_, value, _) in fields.items():
            found = sections_of(again)[section][name][1]
            assert (found, type(found)) == (value, type(value)), name
    assert (again.family, again.summary, again.tiny) == (recipe.family, recipe.summary, recipe.tiny)


def test_every_default_is_written_down():
    values = to_dict(ZOO["vae"])
    assert values["model"].keys() == parameters_of(ZOO["vae"].family).keys()
    assert values["optimizer"].keys() == {field.name for field in dataclasses.fields(Optimizer)}
    assert values["schedule"].keys() == {field.name for field in dataclasses.fields(Schedule)}
    assert values["recipe"] == "vae"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*ZOO.values(), TWO], ids=lambda recipe: recipe.name)
def test_every_setting_changes_the_hash_and_comes_back(recipe):
    values = to_dict(recipe)
    hashes = {config_hash(values)}
    settings = settings_of(recipe)
    for name, setting in settings.items():
        changed = replace(recipe, **{name: other(setting.hint, setting.value)})
        hashes.add(config_hash(to_dict(changed)))
        before, after = flatten(values), flatten(to_dict(changed))
        differ = {path for path in before if before[path] != after[path]}
        if setting.path == "data_options.conditional":  # takes along what needs a condition
            differ -= {f"model.{one}" for one in OF_A_CONDITION}
        assert differ == {setting.path}
        assert to_dict(from_dict(to_dict(changed), {recipe.name: recipe})) == to_dict(changed)
    assert len(hashes) == len(settings) + 1
    for value in hashes:
        assert len(value) == 12
        int(value, 16)


def test_the_hash_does_not_depend_on_the_order_of_settings():
    values = to_dict(ZOO["vae"])
    backwards = {section: values[section] for section in reversed(values)}
    assert list(backwards) != list(values)
    assert config_hash(backwards) == config_hash(values)


def test_a_recipe_keeps_what_it_can_on_other_data():
    assert ZOO["cvae"].on("mine.npz").data_options == {"conditional": True}
    assert ZOO["cvae"].on("markov").data_options == {}  # it has no conditions
    assert ZOO["vae"].on("mine.npz").data_options == {}
    for name in ("digits", "fashion_mnist"):
        assert ZOO["vae-mnist"].on(name).data_options == {"binarize": "dynamic"}
    assert ZOO["vae-mnist"].on("mine.npz").data_options == {}
    assert ZOO["vae-mnist"].on("mnist") is ZOO["vae-mnist"]


def test_settings_are_replaced_wherever_they_belong():
    changed = replace(ZOO["cvae"], latent_dim=3, binarize="dynamic", learning_rate=0.5, steps=7)
    assert changed.model["latent_dim"] == 3
    assert changed.data_options == {"conditional": True, "binarize": "dynamic"}
    assert changed.optimizer.learning_rate == 0.5
    assert changed.schedule.steps == 7
    assert changed.source().spec.kind == "binary"
    assert changed.model["hidden"] == ZOO["cvae"].model["hidden"]
    assert ZOO["cvae"].schedule.steps != 7  # the row itself is untouched
    changed = replace(TWO, **{"gen.learning_rate": 0.5, "disc.b1": 0.25})
    assert (changed.optimizer["gen"].learning_rate, changed.optimizer["disc"].learning_rate) == (
        0.5,
        1e-3,
    )
    assert (changed.optimizer["gen"].b1, changed.optimizer["disc"].b1) == (0.9, 0.25)


@pytest.mark.parametrize(
    ("recipe", "name", "message"),
    [
        (ZOO["vae"], "latent_dims", "Did you mean latent_dim"),
        (ZOO["vae"], "learningrate", "Did you mean learning_rate"),
        (ZOO["vae"], "binarise", "Did you mean binarize"),
        (ZOO["vae"], "step", "Did you mean steps"),
        (TWO, "gen.learning_rat", "Did you mean gen.learning_rate"),
        (TWO, "learning_rate", "Did you mean (gen|disc).learning_rate"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(recipe, name, message):
    with pytest.raises(ConfigError, match=message):
        replace(recipe, **{name: 1})


def test_a_setting_that_the_family_or_data_set_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"setting of vae.*Did you mean latent_dim"):
        to_dict(dataclasses.replace(ZOO["vae"], model={"latent_dims": 3}))
    with pytest.raises(ConfigError, match="setting of ring"):
        to_dict(dataclasses.replace(ZOO["vae-ring"], data_options={"conditonal": True}))


def test_what_is_no_configuration_is_refused():
    values = to_dict(ZOO["vae"])
    with pytest.raises(ConfigError, match=r"no recipe called 'vea'.*Did you mean vae"):
        from_dict(values | {"recipe": "vea"}, ZOO)
    with pytest.raises(ConfigError, match="not a configuration of a run: it has no entry 'recipe'"):
        from_dict({}, ZOO)
    with pytest.raises(ConfigError, match=r"not a configuration of the recipe 'vae'.*optimizer"):
        from_dict({name: value for name, value in values.items() if name != "optimizer"}, ZOO)
    with pytest.raises(ConfigError, match="momentum"):
        from_dict(values | {"optimizer": {"momentum": 1}}, ZOO)


@every_row
@pytest.mark.parametrize("data", DATA)
def test_settings_have_a_name_each_and_are_explained(name, data):
    recipe = dataclasses.replace(ZOO[name], data=data, data_options={})
    settings = settings_of(recipe)
    assert len(settings) == sum(map(len, sections_of(recipe).values()))
    for short, setting in settings.items():
        assert short in (setting.name, setting.full)
        assert len(setting.help) > 3, f"{short} has no help"
        assert setting.hint is not None


@every_row
def test_settings_of_tests_and_evaluation_exist(name):
    row = ZOO[name]
    known = parameters_of(row.family)
    assert row.tiny.keys() | row.evaluation.keys() <= known.keys()
    assert (row.name, row.summary != "") == (name, True)


@pytest.mark.parametrize(
    "field",
    [
        "steps",
        "batch_size",
        "microbatches",
        "steps_per_call",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
    ],
)
def test_counts_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1; got 0"):
        Schedule(**{field: 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every": -1}, "evaluate_every must be at least 0; got -1"),
        ({"seed": 2**32}, r"seed must be from 0 to 2\*\*32 - 1; got 4294967296"),
        ({"steps": 10**400}, "steps must be at most"),  # which no float can hold
        ({"steps": 2.5}, "steps must be a whole number; got 2.5"),
        ({"skip_nonfinite": 1}, "skip_nonfinite must be true or false; got 1"),
        ({"place": "devise"}, "no place called 'devise'. Did you mean device"),
        ({"batch_size": 10, "microbatches": 4}, "A batch of 10 does not divide into 4"),
    ],
)
def test_a_schedule_is_held_to_its_types(changes, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**changes)
    with pytest.raises(ConfigError, match=message):
        replace(ZOO["vae"], **changes)


def test_a_run_folder_is_named_after_what_was_changed():
    row = ZOO["vae"]

    def folder(prefix="", **changes):
        return str(default_folder(replace(row, **changes), row, prefix))

    assert folder() == "runs/vae"
    assert folder("sweep-") == "runs/sweep-vae"
    assert folder(latent_dim=4) == "runs/vae,latent-dim=4"
    assert folder(hidden=(64, 32), learning_rate=0.01) == "runs/vae,hidden=64_32,learning-rate=0.01"
    assert folder(latent_dim=row.model["latent_dim"]) == "runs/vae"  # set to what it was
    mine = dataclasses.replace(row, data="some/where/mine.npz", data_options={})
    assert (
        default_folder(mine, row).parent.name == "runs"
    )  # no folder of its own for each part of a path
    long = replace(row, hidden=(128,) * 40)
    assert str(default_folder(long, row)) == f"runs/vae,{config_hash(to_dict(long))}"
    two = replace(TWO, **{"gen.learning_rate": 0.5})
    assert str(default_folder(two, TWO)) == "runs/two,gen.learning-rate=0.5"


@pytest.mark.parametrize(("before", "now"), [(True, "full"), (False, "none")])
def test_a_run_from_when_remat_was_yes_or_no_is_read(before, now):
    values = to_dict(ZOO["transformer"])
    values["model"]["remat"] = before
    assert to_dict(from_dict(values, ZOO))["model"]["remat"] == now
    assert completed(values)["model"]["remat"] == now  # so that it goes on


def test_a_folder_is_the_same_data_with_a_slash_and_without(tmp_path, monkeypatch):
    """A data set's own name means the data set, and with a slash the folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "digits"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert ZOO["vae"].on("run/").data == ZOO["vae"].on("run").data == "run"
    assert ZOO["vae"].on("digits/").data == "digits/"
