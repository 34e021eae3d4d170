"""A recipe: one row of the zoo as plain data, and how it becomes flags, JSON and back.

The settings of a family are its builder's keyword arguments, and those of a data set its loader's,
so there is one place where a setting is named, typed, explained and given a default.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import operator
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import docstring_parser

from genjax.data import Source, loader, open_source
from genjax.errors import ConfigError, unknown_name
from genjax.learning.optim import Optimizer
from genjax.learning.step import training
from genjax.learning.transforms import microbatch, skip_nonfinite
from genjax.protocol import DataSpec, Model, Training


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long to train and what to do on the way; every number of steps counts optimiser steps.

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: examples per step.
        seed: of the initial weights, the noise and the order of the data.
        microbatches: accumulate the gradient over this many equal parts of a batch.
        skip_nonfinite: leave out steps whose result is NaN or infinite, and count them, instead of
            stopping.
        steps_per_call: optimiser steps in one dispatch to the device.
        log_every: write the metrics' means over this many steps.
        evaluate_every: evaluate on the validation split; 0 never.
        sample_every: write a picture of samples; 0 only at the end.
        checkpoint_every: save a checkpoint; the end of the run is always saved.
        keep_checkpoints: how many of the newest checkpoints to keep.
        place: where the training data live: on the "device", on the "host" (sent batch by batch),
            or "auto": the device up to 2 GiB, and the host where several processes train.
    """

    steps: int = 2000
    batch_size: int = 128
    seed: int = 0
    microbatches: int = 1
    skip_nonfinite: bool = False
    steps_per_call: int = 50
    log_every: int = 100
    evaluate_every: int = 500
    sample_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    place: typing.Literal["auto", "device", "host"] = "auto"

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "microbatches",
            "steps_per_call",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.batch_size % self.microbatches:
            raise ConfigError(
                f"A batch of {self.batch_size} does not divide into {self.microbatches} equal "
                "microbatches."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to 2**32 - 1; got {self.seed}.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of the zoo: a family, its data, and every setting of a run.

    Attributes:
        name: the row's name.
        family: the builder, (spec, **model) -> Model.
        data: a name in `genjax.data.SOURCES`, or the path of a file (`genjax.data.FILES`).
        summary: what it is, in a few words.
        model: the builder's keyword arguments that differ from its defaults.
        data_options: the same for the data set's loader.
        optimizer: one for all players, or one for each player by name.
        schedule: how long to train.
        evaluation: builder arguments that `genjax evaluate` uses instead, such as more samples in a
            bound.
        tiny: builder arguments that make the model small enough for the tests' conformance gates.
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

    def source(self) -> Source:
        """The data set; opening it reads no file of the zoo's own data sets, `source().load()`
        does.
        """
        return open_source(self.data, **self.data_options)

    def on(self, data: str) -> "Recipe":
        """The recipe on another data set, with that loader's own settings; a conditional one stays
        so if the loader can be.
        """
        if data == self.data:
            return self
        conditional = (
            self.data_options.get("conditional")
            and "conditional" in inspect.signature(loader(data)).parameters
        )
        return dataclasses.replace(
            self, data=data, data_options={"conditional": True} if conditional else {}
        )

    def build(self, spec: DataSpec, **changes: Any) -> Model:
        """The model, with some builder arguments changed."""
        return self.family(spec, **{**self.model, **changes})

    def training(self, spec: DataSpec) -> Training:
        """The whole training procedure that the settings describe."""
        by_player = self.optimizer if isinstance(self.optimizer, Mapping) else None
        tx: Any = (
            {p: o.build(self.schedule.steps) for p, o in by_player.items()} if by_player else None
        )
        t = training(self.build(spec), tx or self.optimizer.build(self.schedule.steps))  # type: ignore[union-attr]
        if self.schedule.microbatches > 1:
            t = microbatch(t, self.schedule.microbatches)
        return skip_nonfinite(t) if self.schedule.skip_nonfinite else t


@functools.cache
def _described(thing: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The types and the help of what a function or a dataclass takes, by name, from its annotations
    and docstring.
    """
    docs = docstring_parser.parse(inspect.getdoc(thing) or "")
    help_of = {param.arg_name: " ".join((param.description or "").split()) for param in docs.params}
    return typing.get_type_hints(thing), help_of


def parameters_of(function: Callable[..., Any]) -> dict[str, tuple[Any, Any, str]]:
    """The keyword settings of a builder or loader: name -> (type, default, help), from its
    signature and docstring.

    Types that cannot be written on a command line (a record of functions) are left out of a union.
    """
    hints, help_of = _described(function)
    settings = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            continue
        settings[name] = (_writable(hints[name]), parameter.default, help_of.get(name, ""))
    return settings


def _writable(hint: Any) -> Any:
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    plain = [
        a for a in typing.get_args(hint) if not (isinstance(a, type) and hasattr(a, "_fields"))
    ]
    return functools.reduce(operator.or_, plain)


def replace(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with settings changed by name, wherever they belong: builder, loader, optimiser or
    schedule.

    Raises:
        ConfigError: for a name that is no setting of this recipe, with the nearest ones.
    """
    sections: dict[str, set[str]] = {
        name: set(fields) for name, fields in sections_of(recipe).items()
    }
    for name, value in changes.items():
        section = next((section for section, fields in sections.items() if name in fields), None)
        if section is None:
            raise unknown_name("setting", name, sorted(set().union(*sections.values())))
        current: Any = getattr(recipe, section)
        if isinstance(current, Optimizer | Schedule):
            new: Any = dataclasses.replace(current, **{name: value})
        elif section == "optimizer":
            player, field = name.split(".")
            new = {**current, player: dataclasses.replace(current[player], **{field: value})}
        else:
            new = {**current, name: value}
        recipe = dataclasses.replace(recipe, **{section: new})
    return recipe


def sections_of(recipe: Recipe) -> dict[str, dict[str, tuple[Any, Any, str]]]:
    """Every setting of a recipe: section -> name -> (type, value, help). Settings of a player are
    named "player.field".
    """

    def of_dataclass(value: Any, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
        hints, help_of = _described(type(value))
        return {
            prefix + f.name: (hints[f.name], getattr(value, f.name), help_of.get(f.name, ""))
            for f in dataclasses.fields(value)
        }

    def of_function(
        function: Callable[..., Any], given: Mapping[str, Any]
    ) -> dict[str, tuple[Any, Any, str]]:
        fields = parameters_of(function)
        for name in given:
            if name not in fields:
                raise unknown_name(f"setting of {function.__name__}", name, fields)
        return {
            name: (hint, given.get(name, default), text)
            for name, (hint, default, text) in fields.items()
        }

    if isinstance(recipe.optimizer, Mapping):
        optimizer = {
            k: v
            for player, o in recipe.optimizer.items()
            for k, v in of_dataclass(o, f"{player}.").items()
        }
    else:
        optimizer = of_dataclass(recipe.optimizer)
    return {
        "model": of_function(recipe.family, recipe.model),
        "data_options": of_function(loader(recipe.data), recipe.data_options),
        "optimizer": optimizer,
        "schedule": of_dataclass(recipe.schedule),
    }


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe as JSON-ready data, defaults included, so that a later default
    changes no old run.
    """
    sections = {
        name: {k: v for k, (_, v, _) in fields.items()}
        for name, fields in sections_of(recipe).items()
    }
    return json.loads(json.dumps({"recipe": recipe.name, "data": recipe.data, **sections}))


def from_dict(values: Mapping[str, Any], rows: Mapping[str, Recipe]) -> Recipe:
    """The recipe that `to_dict` wrote; families and loaders are looked up in the zoo's `rows`.

    Raises:
        ConfigError: for a row or setting that does not exist (any more).
    """
    if values.get("recipe") not in rows:
        raise unknown_name("recipe", str(values.get("recipe")), rows)
    row = rows[values["recipe"]]
    as_tuples = lambda section: {
        k: tuple(v) if isinstance(v, list) else v for k, v in section.items()
    }  # noqa: E731
    try:
        optimizer: Any = values["optimizer"]
        if isinstance(row.optimizer, Mapping):
            by_player: dict[str, dict[str, Any]] = {player: {} for player in row.optimizer}
            for name, value in optimizer.items():
                player, field = name.split(".")
                by_player[player][field] = value
            optimizer = {player: Optimizer(**fields) for player, fields in by_player.items()}
        else:
            optimizer = Optimizer(**optimizer)
        return dataclasses.replace(
            row,
            data=values["data"],
            model=as_tuples(values["model"]),
            data_options=as_tuples(values["data_options"]),
            optimizer=optimizer,
            schedule=Schedule(**values["schedule"]),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"This is not a configuration of the recipe {row.name!r}: {error}."
        ) from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "section.name" -> value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return flat


def config_hash(values: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the settings as sorted JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
