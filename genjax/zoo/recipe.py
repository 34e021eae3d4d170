"""A recipe: one row of the zoo as plain data, and how it becomes flags, JSON and back.

The settings of a family are its builder's keyword arguments, and those of a data set its loader's,
so there is one place where a setting is named, typed, explained and given a default.
"""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

from genjax.data import (
    SOURCES,
    Source,
    image_files,
    loader,
    midi_files,
    open_source,
    run_folder,
)
from genjax.errors import ConfigError, GenjaxError, unknown_name
from genjax.families.compose import latent_spec, two_stage
from genjax.learning.optim import Optimizer
from genjax.protocol import DataSpec, Model, Trained, Training
from genjax.settings import Count, Whole, Within, check_call, check_fields
from genjax.zoo.sections import parameters_of as parameters_of
from genjax.zoo.sections import replace as replace
from genjax.zoo.sections import sections_of


class _Seeds(Within):
    """Seeds have 32 bits, as those of `jax.random.key` do."""

    def __str__(self) -> str:
        return "from 0 to 2**32 - 1"


Seed = Annotated[int, _Seeds(0, 2**32 - 1)]
Buckets = Annotated[int, Within(1, 64)]
Steps = Annotated[Count, Within(high=2**31 - 1)]  # which are counted in int32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long to train and what to do on the way; every number of steps counts optimiser steps.

    Attributes:
        steps: optimiser steps of the whole run. A run goes on to more than it was to have if it is
            named with --out; without, another number names another folder.
        batch_size: examples per step.
        seed: of the initial weights, the noise and the order of the data.
        microbatches: accumulate the gradient over this many equal parts of a batch.
        skip_nonfinite: leave out steps whose result is NaN or infinite, and count them, instead of
            stopping.
        steps_per_call: optimiser steps in one dispatch to the device.
        log_every: write the metrics' means over this many steps.
        evaluate_every: evaluate on the validation split; 0 never. The best state by it is kept
            beside the newest.
        stop_after: end once so many evaluations in a row have brought no gain; 0 never.
        sample_every: write a picture of samples; 0 only at the end.
        checkpoint_every: save a checkpoint; the end of the run is always saved.
        keep_checkpoints: how many of the newest checkpoints to keep.
        snapshot_every: store the averages of `sigma_rels`, all of which are kept; 0 only at the
            end.
        place: where the training data live: on the "device", on the "host" (sent batch by batch),
            or "auto": the device up to 2 GiB, and the host where several processes train.
        augment: random changes of the images that are trained on, in their order, such as
            "flip,crop4": flip and vflip mirror every second one, cropN shifts by up to N pixels
            with the edge repeated, padN with zeros at the edge. Nothing unless given.
        buckets: sort sequences of unequal length into at most this many buckets, and pad each batch
            to the longest of its bucket only; 1 pads all to one length. Unless given, 8 where
            padding to one length costs 3 times the work.
    """

    steps: Steps = 2000
    batch_size: Count = 128
    seed: Seed = 0
    microbatches: Count = 1
    skip_nonfinite: bool = False
    steps_per_call: Steps = 50
    log_every: Count = 100
    evaluate_every: Whole = 500
    stop_after: Whole = 0
    sample_every: Whole = 500
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 3
    place: Literal["auto", "device", "host"] = "auto"
    augment: str = ""
    buckets: Buckets | None = None
    snapshot_every: Whole = 500

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size % self.microbatches:
            raise ConfigError(
                f"A batch of {self.batch_size} does not divide into {self.microbatches} equal "
                "microbatches."
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of the zoo: a family, its data, and every setting of a run.

    Attributes:
        name: the row's name.
        family: the builder, (spec, **model) -> Model, or (first: Trained, **model) -> Model.
        data: a name in `genjax.data.SOURCES`, the path of a file (`genjax.data.FILES`), or a run
            folder, whose model is then the first stage of this one.
        summary: what it is, in a few words.
        model: the builder's keyword arguments that differ from its defaults.
        data_options: the same for the data set's loader.
        optimizer: one for all players, or one for each player by name.
        schedule: how long to train.
        evaluation: builder arguments that `genjax evaluate` uses instead, such as more samples in a
            bound.
        tiny: builder arguments that make the model small enough for the tests' conformance gates.
        first: the row that makes the run which `data` names, for messages and --first.
        loaded_by: of a run whose data are not there any more, what made the source of them.
    """

    name: str
    family: Callable[..., Model]
    data: str
    summary: str = ""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer | Mapping[str, Optimizer] = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    first: str | None = None
    loaded_by: str | None = None

    def source(self) -> Source:
        """The data set; opening it reads no file of the zoo's own data sets, `source().load()`
        does.
        """
        return open_source(self.data, **self.data_options)

    def on(self, data: str) -> "Recipe":
        """The recipe on another data set, with those of its options that the other loader takes,
        too. What cuts windows only where it is asked to is asked by the user: a row's `context` is
        of its own stream, and would cut examples up.
        """
        bare = data.rstrip(os.sep)  # what completes names in a shell ends those of folders with it
        data = data if not bare or bare in SOURCES else bare
        if data == self.data:
            return self
        options = inspect.signature(loader(data)).parameters
        takes = {name for name in options if name != "path"}
        if "context" in takes and options["context"].default is None:
            takes.remove("context")
        kept = {name: value for name, value in self.data_options.items() if name in takes}
        return dataclasses.replace(self.apart(takes), data=data, data_options=kept, loaded_by=None)

    def apart(self, takes: Collection[str]) -> "Recipe":
        """The recipe for data whose loader has these options: with sequences of their own where
        they cannot be read as streams.
        """
        streams = self.data_options.get("order") == "stream" and "order" not in takes
        if not streams or "lanes" not in parameters_of(self.family):
            return self
        return dataclasses.replace(self, model={**self.model, "lanes": 0})

    @property
    def loader(self) -> Callable[..., Source]:
        """What makes the source of the data."""
        return LOADERS[self.loaded_by] if self.loaded_by else loader(self.data)

    @property
    def composed(self) -> bool:
        """Whether the builder takes a trained model in the place of a spec."""
        return next(iter(inspect.signature(self.family).parameters)) == "first"

    def build(self, on: DataSpec | Trained, **changes: Any) -> Model:
        """The model of such data, with some builder arguments changed.

        On a first stage a builder that takes one gets it; any other builds a density of its
        latents, which `two_stage` joins with it.

        Raises:
            ConfigError: for a first stage that does not fit, or none where the builder needs it.
        """
        settings = {**self.model, **changes}
        if self.composed:
            if not isinstance(on, Trained):
                raise ConfigError(
                    f"{self.name} is made of a trained model: give a run folder with --data."
                )
            return self.family(on, **settings)
        if isinstance(on, Trained):
            return two_stage(on, self.family(latent_spec(on.model), **settings))
        return self.family(on, **settings)

    def training(
        self, on: DataSpec | Trained, begin: Callable[[Model], Model] = lambda model: model
    ) -> Training:
        """The whole training procedure that the settings describe; `begin` may have the model
        begin with other parameters.
        """
        # Late: what settings there are is asked without it, and optax takes long to import.
        from genjax.learning.step import training
        from genjax.learning.transforms import microbatch, skip_nonfinite

        model, own = begin(self.build(on)), self.optimizer
        by_player = own if isinstance(own, Mapping) else dict.fromkeys(model.losses, own)
        steps, turns = self.schedule.steps, dict.fromkeys(by_player, 0)
        for player, times in model.turns or [(player, 1) for player in by_player]:
            turns[player] += times
        transforms = {
            player: one.build(steps, model.labels, player, turns[player])
            for player, one in by_player.items()
        }
        t = training(model, transforms)
        if self.schedule.microbatches > 1:
            t = microbatch(t, self.schedule.microbatches)
        return skip_nonfinite(t) if self.schedule.skip_nonfinite else t


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe as JSON-ready data, defaults included, so that a later default
    changes no old run.
    """
    sections = {
        name: {k: v for k, (_, v, _) in fields.items()}
        for name, fields in sections_of(recipe).items()
    }
    return json.loads(json.dumps({"recipe": recipe.name, "data": recipe.data, **sections}))


def unknown_recipe(name: str, rows: Mapping[str, Recipe]) -> ConfigError:
    """A `ConfigError` for a name that no row has: with the rows of a family of that name, as
    messages call it, or else the nearest ones.
    """
    of_family = [row.name for row in rows.values() if row.family.__name__ == name.replace("-", "_")]
    if of_family:
        return ConfigError(
            f"There is no recipe called {name!r}, but a family with: {', '.join(of_family)}."
        )
    return unknown_name("recipe", name, rows)


def from_dict(values: Mapping[str, Any], rows: Mapping[str, Recipe]) -> Recipe:
    """The recipe that `to_dict` wrote; families and loaders are looked up in the zoo's `rows`.

    Raises:
        ConfigError: for a row or setting that does not exist (any more).
    """
    if "recipe" not in values:
        raise ConfigError("This is not a configuration of a run: it has no entry 'recipe'.")
    name = values["recipe"]
    if not isinstance(name, str) or name not in rows:
        raise unknown_recipe(str(name)[:80], rows)
    row = rows[name]
    try:
        if not isinstance(values["data"], str):
            raise TypeError(f"data must be a text; got {values['data']!r:.80}")
        optimizer: Any = _as_tuples(values["optimizer"])
        if isinstance(row.optimizer, Mapping):
            by_player: dict[str, dict[str, Any]] = {player: {} for player in row.optimizer}
            for name, value in optimizer.items():
                player, field = name.split(".")
                by_player[player][field] = value
            optimizer = {player: Optimizer(**fields) for player, fields in by_player.items()}
        else:
            optimizer = Optimizer(**optimizer)
        gone = _gone(values)
        make = LOADERS[gone] if gone else loader(values["data"])
        found = dataclasses.replace(
            row,
            data=values["data"],
            loaded_by=gone,
            model=as_now(_as_tuples(values["model"])),
            data_options=_before(make) | _as_tuples(values["data_options"]),
            optimizer=optimizer,
            schedule=Schedule(**{"buckets": 1, **values["schedule"]}),  # 1 before there were any
        )
        sections_of(found)  # refuses settings that neither the builder nor the loader has
        check_call(make, found.data_options)
        return found
    except KeyError as error:
        raise ConfigError(
            f"This is not a configuration of the recipe {row.name!r}: it has no entry {error}."
        ) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"This is not a configuration of the recipe {row.name!r}: {error}."
        ) from error


def as_now(model: Mapping[str, Any]) -> dict[str, Any]:
    """A builder's settings as they are written now: `remat` was yes or no."""
    names = {True: "full", False: "none"}
    return {
        name: names[v] if isinstance(v, bool) and name == "remat" else v
        for name, v in model.items()
    }


# What reads folders, which nothing tells from others once they are not there any more.
LOADERS = {"run_folder": run_folder, "image_files": image_files, "midi_files": midi_files}


def _gone(values: Mapping[str, Any]) -> str | None:
    """Which of `LOADERS` made the source of a run whose folder of data is not there any more, by
    its options; None for data that are there, and for files, whose names tell.
    """
    try:
        loader(values["data"])
    except GenjaxError:
        if "first" in values:
            return "run_folder"
        for name, make in LOADERS.items():
            takes = set(inspect.signature(make).parameters) - {"path"}
            if takes and set(values["data_options"]) <= takes:
                return name
        raise
    return None


def _before(make: Callable[..., Source]) -> dict[str, Any]:
    """What loaders did before they had an option for it, for runs of that time."""
    takes = inspect.signature(make).parameters
    return {"standardize": "none"} if "standardize" in takes else {}


def _as_tuples(section: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where settings have tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in section.items()
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "section.name" -> value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def config_hash(values: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the settings as sorted JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
