"""The settings of a recipe: found in signatures, sorted into sections, and changed by name.

A setting lives in one of four sections: `model` (the builder's keyword arguments), `data` (the
loader's), `optimizer` (of one player, "discriminator.b1", where there are several) and `schedule`.
Its full name says which, "optimizer.b1". The plain name, "b1", will do wherever no other setting of
the recipe answers to it, so no builder and no loader has to avoid a name.
"""

import dataclasses
import functools
import inspect
import operator
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from genjax.errors import ConfigError, unknown_name
from genjax.settings import Help, OneOf, checked_settings, groups_of

if TYPE_CHECKING:
    from genjax.zoo.recipe import Recipe

# What the fields of a Recipe, and so the sections of config.json, are called in a full name.
SECTIONS = {
    "model": "model",
    "data_options": "data",
    "optimizer": "optimizer",
    "schedule": "schedule",
}
# What a builder cannot do without a condition: a row that has them keeps its defaults without one.
OF_A_CONDITION = ("guidance", "cond_dropout", "generator_cond", "discriminator_cond")

Fields = dict[str, tuple[Any, Any, str]]  # name -> (type, value, help)


class Setting(NamedTuple):
    """One setting of a recipe.

    Attributes:
        field: the recipe's field that holds it, which is its section in config.json, too.
        name: its name there: "hidden", or "discriminator.b1" where each player has an optimiser.
        hint: its type, as a command line can write it.
        value: what it is set to.
        help: what it is, in words.
    """

    field: str
    name: str
    hint: Any
    value: Any
    help: str

    @property
    def full(self) -> str:
        """The name that is never ambiguous: "data.context"."""
        return f"{SECTIONS[self.field]}.{self.name}"

    @property
    def path(self) -> str:
        """Where it stands in config.json: "data_options.context"."""
        return f"{self.field}.{self.name}"


@functools.cache
def _described(thing: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The types and the help of what a function or a dataclass takes, by name, from its annotations
    and docstring.
    """
    thing = inspect.unwrap(thing)
    hints = typing.get_type_hints(thing, include_extras=True)
    try:
        import docstring_parser
    except ImportError:  # where only the models are needed, such as a machine with a card
        return hints, {}
    # A dataclass has the fields of those that it extends, explained in their docstrings.
    explained = reversed(thing.__mro__) if isinstance(thing, type) else [thing]
    help_of = {
        param.arg_name: " ".join((param.description or "").split())
        for one in explained
        for param in docstring_parser.parse(inspect.getdoc(one) or "").params
    }
    return hints, help_of


def parameters_of(function: Callable[..., Any]) -> Fields:
    """The keyword settings of a builder or loader: name -> (type, default, help), from its
    signature and docstring. The fields of a group stand in the group's place.

    Types that cannot be written on a command line (a record of functions) are left out of a union.
    """
    hints, help_of = map(dict, _described(function))
    for group in groups_of(function).values():
        of_group = _described(type(group))
        hints |= of_group[0]
        help_of |= of_group[1]
    return {
        name: (
            _writable(hints[name]),
            parameter.default,
            help_of.get(name) or _help_in(hints[name]),
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty and not _python_only(hints[name])
    }


def _python_only(hint: Any) -> bool:
    """Whether a type is of what no text can say: a record, such as a prior, or a network."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return all(one is type(None) or _python_only(one) for one in typing.get_args(hint))
    return isinstance(hint, type) and (
        hasattr(hint, "_fields")
        or dataclasses.is_dataclass(hint)
        or getattr(hint, "_is_protocol", False)
    )


def _writable(hint: Any) -> Any:
    """The type without what only Python can write, and without annotations but for the choices."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        choices = [limit for limit in args[1:] if isinstance(limit, OneOf)]
        return Literal[tuple(choices[0].names)] if choices else _writable(args[0])
    if origin in (types.UnionType, typing.Union):
        plain = [one for one in args if not _python_only(one)]
        return functools.reduce(operator.or_, map(_writable, plain))
    if origin is tuple:
        return tuple[tuple(one if one is ... else _writable(one) for one in args)]
    return hint


def _help_in(hint: Any) -> str:
    """What a type says of itself, for settings that several builders share."""
    metadata = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((one.text for one in metadata if isinstance(one, Help)), "")


def _of_function(function: Callable[..., Any], given: Mapping[str, Any]) -> Fields:
    fields = parameters_of(function)
    for name in given:
        if name not in fields:
            raise unknown_name(f"setting of {function.__name__}", name, fields)
    return {
        name: (hint, given.get(name, default), text)
        for name, (hint, default, text) in fields.items()
    }


def fields_of(record: Any, prefix: str = "") -> Fields:
    """The fields of a dataclass: name -> (type, value, help)."""
    hints, help_of = _described(type(record))
    return {
        prefix + field.name: (
            _writable(hints[field.name]),
            getattr(record, field.name),
            help_of.get(field.name) or _help_in(hints[field.name]),
        )
        for field in dataclasses.fields(record)
    }


def sections_of(recipe: "Recipe") -> dict[str, Fields]:
    """Every setting of a recipe: field of the recipe -> name -> (type, value, help). Settings of a
    player are named "player.field".

    Raises:
        ConfigError: for a setting in the recipe that its builder or loader does not have.
    """
    optimizer: Fields = {}
    if isinstance(recipe.optimizer, Mapping):
        for player, one in recipe.optimizer.items():
            optimizer |= fields_of(one, f"{player}.")
    else:
        optimizer = fields_of(recipe.optimizer)
    return {
        "model": _of_function(recipe.family, recipe.model),
        "data_options": _of_function(recipe.loader, recipe.data_options),
        "optimizer": optimizer,
        "schedule": fields_of(recipe.schedule),
    }


def settings_of(recipe: "Recipe") -> dict[str, Setting]:
    """Every setting of a recipe by the shortest name that means no other one."""
    settings = [
        Setting(field, name, *entry)
        for field, entries in sections_of(recipe).items()
        for name, entry in entries.items()
    ]
    # A full name always means what it says, even where a player is called like a section.
    answers_to = Counter(setting.name for setting in settings)
    answers_to.update(setting.full for setting in settings)
    return {
        setting.name if answers_to[setting.name] == 1 else setting.full: setting
        for setting in settings
    }


def setting_called(name: str, settings: Mapping[str, Setting]) -> Setting:
    """The one of a recipe's settings that a plain or full name means.

    Raises:
        ConfigError: for a name that is none of them, with the nearest ones; or that of several,
            with their full names.
    """
    for short, setting in settings.items():
        if name in (short, setting.full):
            return setting
    same = [setting.full for setting in settings.values() if setting.name == name]
    if same:
        raise ConfigError(
            f"Several settings are called {name!r}; say which one is meant: {', '.join(same)}."
        )
    known = sorted(settings)
    if name.partition(".")[0] in SECTIONS.values():
        known += sorted(setting.full for setting in settings.values())
    raise unknown_name("setting", name, known)


def replace(recipe: "Recipe", **changes: Any) -> "Recipe":
    """The recipe with settings changed by name, wherever they belong: `replace(recipe, steps=10)`,
    or by their full names, `replace(recipe, **{"schedule.steps": 10})`. With `conditional=False`
    what needs a condition goes back to the builder's default.

    Raises:
        ConfigError: see `setting_called`; or for a value that is not what the builder, the
            optimiser or the schedule takes.
    """
    settings = settings_of(recipe)
    changed: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        setting = setting_called(name, settings)
        changed.setdefault(setting.field, {})[setting.name] = value
    if recipe.data_options.get("conditional") and not changed.get("data_options", {}).get(
        "conditional", True
    ):
        for setting in settings.values():
            if setting.field == "model" and setting.name in OF_A_CONDITION:
                default = parameters_of(recipe.family)[setting.name][1]
                changed.setdefault("model", {}).setdefault(setting.name, default)
    if recipe.first is not None:  # its builder would say so, but not before that run is trained
        checked_settings(recipe.family, changed.get("model", {}))
    # Each record is made once, with all of its changes: one of them alone may not fit the others.
    return dataclasses.replace(
        recipe,
        **{field: _changed(field, getattr(recipe, field), new) for field, new in changed.items()},
    )


def _changed(field: str, section: Any, changes: dict[str, Any]) -> Any:
    if dataclasses.is_dataclass(section):
        return dataclasses.replace(section, **changes)  # type: ignore[type-var]
    if field != "optimizer":
        return {**section, **changes}
    by_player: dict[str, dict[str, Any]] = {player: {} for player in section}
    for name, value in changes.items():
        player, _, setting = name.partition(".")
        by_player[player][setting] = value
    return {
        player: dataclasses.replace(section[player], **new) for player, new in by_player.items()
    }
