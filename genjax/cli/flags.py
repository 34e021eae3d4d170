"""Flags from types: those of a recipe's settings, and what a setting may be called on the command
line.

The help shows a setting once, under its plain name where no other one answers to it. It may be
given by its full name as well: `--b1 0.5` and `--optimizer.b1 0.5` are one flag. The parser knows
the shown names only, so the others are rewritten before it reads them.
"""

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from genjax.errors import ConfigError

if TYPE_CHECKING:
    from genjax.zoo.recipe import Recipe
    from genjax.zoo.sections import Setting

    Settings = Mapping[str, Setting]  # by their flags, without the dashes

DATA_HELP = (
    "a data set's name; a file of your own (.npz, .npy, .csv, .tsv, .parquet, .txt, .jsonl, .bin, "
    ".mid, .mat, .zip, .tar), a folder of pictures or music; or a run folder"
)


def group(title: str, fields: Mapping[str, tuple[Any, Any, str]], about: str = "") -> Any:
    """A dataclass whose fields become flags: flag, without its dashes -> (type, default, help)."""
    import tyro

    made = []
    for flag, (hint, default, text) in fields.items():
        named = tyro.conf.arg(name=flag, help=text or None, prefix_name=False)
        made.append((field_of(flag), Annotated[hint, named], dataclasses.field(default=default)))
    return dataclasses.make_dataclass(title, made, frozen=True, namespace={"__doc__": about})


def field_of(flag: str) -> str:
    """The field of a `group` that holds the value of a flag."""
    return flag.replace("-", "_").replace(".", "__")


def recipe_named(command: str, args: Sequence[str]) -> str:
    """The NAME that begins the arguments of a command about a recipe; --help lists the names.

    Raises:
        ConfigError: if there is none.
    """
    from genjax.zoo.catalogue import known

    if args and not args[0].startswith("-"):
        return args[0]
    if not args or args[0] not in ("-h", "--help"):
        names = ", ".join(known())
        raise ConfigError(f"genjax {command} needs the name of a recipe. There are: {names}.")
    print(f"usage: genjax {command} NAME [flags]\n")
    print(f"`genjax {command} NAME --help` lists the flags of a recipe. There are:\n")
    for name, row in known().items():
        print(f"  {name:<20} {row['summary']}, on {row['data']}")
    raise SystemExit(0)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """For the part of a program that imports jax: a third of its time would go into Python's search
    for cycles, now and as the program ends, among what was imported and stays.
    """
    if "jax" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@quick_imports()
def parse_recipe(command: str, args: list[str], options: type) -> "tuple[Recipe, Recipe, Any]":
    """Read NAME and flags: the recipe as set, the zoo's row, and the command's own options.

    Raises:
        ConfigError: for a name or data set that does not exist, or a flag that several settings
            answer to. Unknown and ill-typed flags end in tyro's own message.
    """
    name = recipe_named(command, args)
    import tyro

    from genjax.zoo import ZOO
    from genjax.zoo.recipe import unknown_recipe
    from genjax.zoo.sections import SECTIONS, fields_of, replace

    if name not in ZOO:
        raise unknown_recipe(name, ZOO)
    row = ZOO[name]
    # Another data set has other settings, so it is looked for before the flags are made.
    recipe = row.on(value_of("--data", args) or row.data)
    settings = flags_of(recipe, options)
    # With its help given field by field the parser need not read any source.
    own = {_dashed(field): entry for field, entry in fields_of(options()).items()}
    first = group("Options", {"data": (str, recipe.data, DATA_HELP), **own})
    fields: list[Any] = [("options", Annotated[first, tyro.conf.arg(name="")])]
    for section, title in SECTIONS.items():
        entries = {
            flag: (setting.hint, setting.value, setting.help)
            for flag, setting in settings.items()
            if setting.field == section
        }
        made = group(title, entries, f"Each may be called --{title}.NAME as well." * bool(entries))
        fields.append((section, Annotated[made, tyro.conf.arg(name=title)]))
    text = f"{row.summary}, on {recipe.data}."
    # A docstring takes no name of a file that is no UTF-8.
    about = {"__doc__": text.encode("utf-8", "backslashreplace").decode()}
    whole = dataclasses.make_dataclass("Settings", fields, namespace=about, kw_only=True)
    rest = as_shown(args[1:], settings, options)
    parsed: Any = tyro.cli(whole, prog=f"genjax {command} {name}", args=rest)
    changes = {}
    for flag, setting in settings.items():
        value = getattr(getattr(parsed, setting.field), field_of(flag))
        if value != setting.value:
            changes[setting.full] = value
    return replace(recipe, **changes), row, parsed.options


def flags_of(recipe: "Recipe", options: type) -> "Settings":
    """The settings of a recipe by the flags that the help shows: plain names where they mean
    nothing else, neither another setting nor one of the command's own options.
    """
    from genjax.zoo.sections import settings_of

    own = _own(options)
    settings = {_dashed(name): setting for name, setting in settings_of(recipe).items()}
    return {
        _dashed(setting.full) if flag in own else flag: setting
        for flag, setting in settings.items()
    }


def axes_of(
    recipe: "Recipe", row: "Recipe", axes: Mapping[str, list[float]], options: type
) -> dict[str, list[float]]:
    """The axes of a sweep, given by flags, by the names that `replace` takes; what is no flag of
    a setting stays as it is.

    Raises:
        ConfigError: see `as_shown`; and for a setting that has another value than the zoo's `row`
            of these data has it, and values to sweep over as well.
    """
    from genjax.zoo.sections import settings_of

    settings, own = flags_of(recipe, options), settings_of(row)
    names = {setting.full: name for name, setting in settings_of(recipe).items()}
    found = {}
    for given, values in axes.items():
        (shown,) = as_shown([f"--{given}"], settings, options)
        setting = settings.get(shown[2:])
        name = given.replace("-", "_") if setting is None else names[setting.full]
        if setting is not None and setting.value != own[name].value:
            raise ConfigError(
                f"{shown} is given one value, {setting.value}, and several to sweep over: leave "
                "one of them out."
            )
        found[name] = values
    return found


def as_shown(args: Sequence[str], settings: "Settings", options: type) -> list[str]:
    """The arguments with every flag under the name that the help shows.

    Raises:
        ConfigError: for a plain name that several settings answer to, with their full ones.
    """
    plain: dict[str, list[str]] = {}
    full: dict[str, list[str]] = {}
    negated: dict[str, list[str]] = {}
    for flag, setting in settings.items():
        names = _dashed(setting.name), _dashed(setting.full)
        plain.setdefault(names[0], []).append(flag)
        full[names[1]] = [flag]
        for name in names if setting.hint is bool else ():
            for negation in {_negation(name), f"no-{name}"}:
                negated.setdefault(negation, []).append(_negation(flag))
    own = {name: [name] for name in _own(options)}
    meant = negated | plain | full | own
    return [_as_shown(arg, meant) if arg.startswith("--") else arg for arg in args]


def _as_shown(arg: str, meant: Mapping[str, Sequence[str]]) -> str:
    flag, equals, value = arg[2:].partition("=")
    names = meant.get(_dashed(flag), [flag])
    if len(names) > 1:
        listed = ", ".join(f"--{name}" for name in names)
        raise ConfigError(f"--{flag} may mean several settings; say which one: {listed}.")
    return f"--{names[0]}{equals}{value}"


def _own(options: type) -> set[str]:
    return {"data", *(_dashed(field.name) for field in dataclasses.fields(options))}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _negation(flag: str) -> str:
    """As the parser has it: --no-bias, --model.no-bias."""
    section, dot, name = flag.rpartition(".")
    return f"{section}{dot}no-{name}"


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value that the arguments give a flag, the last one as the parser has it; None if it is
    not among them.
    """
    found = None
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            found = args[index + 1]
        if arg.startswith(flag + "="):
            found = arg.split("=", 1)[1]
    return found
