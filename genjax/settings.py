"""Settings: what their annotations say of them is checked in one place, and groups that several
builders share are declared once.

    @builder
    def vae(
        spec: DataSpec,
        *,
        latent_dim: Count = 16,
        activation: Literal["gelu", "relu"] = "gelu",
        beta: NonNegative = 1.0,
        network: DenoiserNet = DenoiserNet(),
    ) -> Model: ...

    vae(spec, latent_dim=0)       # refused: latent_dim must be at least 1; got 0.
    vae(spec, hidden=(64, 64))    # a field of DenoiserNet

A parameter whose default is a `Settings` record is a group: callers give its fields as keyword
arguments of their own, and the builder gets the record. `inspect.signature` and the docstring show
them all, the command line makes flags of them, and their help stands where they are declared.

Numbers may be traced, as a sweep does; what is traced has no value to check.
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from jax.core import Tracer

from genjax.errors import ConfigError, expect, unknown_name
from genjax.protocol import DataSpec, Trained

# Networks compute in float32, where what is smaller is 0 and what is larger, squared, is infinite.
SMALLEST, LARGEST = 2.0**-126, 1e18
MOST = 2**31 - 1  # sizes and steps are counted in int32


@dataclasses.dataclass(frozen=True)
class Within:
    """A number from `low` to `high`, the ends included unless `above` or `below` says otherwise."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: Any) -> bool:
        if not isinstance(value, int) and not math.isfinite(value):  # an int may be past any float
            return False
        over = value > self.low if self.above else value >= self.low
        if self.low == 0 and 0 < value < SMALLEST:
            return False
        under = value < self.high if self.below else value <= self.high
        return bool(over) and bool(under)

    def __str__(self) -> str:
        bounded = self.high not in (math.inf, MOST, LARGEST)
        if bounded and math.isfinite(self.low):
            begin, end = "(" if self.above else "[", ")" if self.below else "]"
            return f"in {begin}{self.low:g}, {self.high:g}{end}"
        if self.low not in (-math.inf, -LARGEST):
            return "positive" if self.above and self.low == 0 else f"at least {self.low:g}"
        return f"at most {self.high:g}" if bounded else "finite"

    def why_not(self, value: Any, whole: bool = False) -> str:
        """What a value that is not within should have been; of a `whole` number the side that it
        is on.
        """
        own_words = type(self) is not Within
        if own_words or (not isinstance(value, int) and not math.isfinite(value)):
            return str(self)
        limits = self.high in (MOST, LARGEST)  # of all numbers, which nobody needs to hear of
        if value > self.high and (whole or limits):
            return f"at most {'2**31 - 1' if self.high == MOST else f'{self.high:.10g}'}"
        if value < self.low and (whole or self.low == -LARGEST):
            return f"at least {self.low:.10g}"
        if 0 < value < SMALLEST:
            return f"{self}, and not 0 in float32"
        return str(self)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A name in a table: for choices that a module keeps as a dict, such as solvers."""

    names: Iterable[str]


@dataclasses.dataclass(frozen=True)
class Help:
    """The help text of a setting, for types that several builders share."""

    text: str


Count = Annotated[int, Within(1, MOST)]
Whole = Annotated[int, Within(0, MOST)]
Depth = Annotated[int, Within(1, 1000)]  # what is written out one after the other: layers, turns
Often = Annotated[int, Within(1, 10**6)]  # what is done one after the other: steps, draws
Width = Annotated[int, Within(1, 2**14)]  # of what is listed unit by unit: masked layers
OftenOrNot = Annotated[int, Within(0, 10**6)]
Rate = Annotated[float, Within(0, 1, below=True)]
Positive = Annotated[float, Within(0, LARGEST, above=True)]
NonNegative = Annotated[float, Within(0, LARGEST)]
Finite = Annotated[float, Within(-LARGEST, LARGEST)]

Dtype = Annotated[
    Literal["float32", "bfloat16"],
    Help("of the networks' arithmetic; parameters and losses stay float32."),
]
Remat = Annotated[
    Literal["none", "full", "dots", "dots_no_batch"],
    Help(
        "what the way back computes again instead of keeping it, for less memory: nothing, all "
        "insides of a block or a step, or all but the results of matrix products (of those without "
        "a batch dimension)."
    ),
]
CondDropout = Annotated[
    Rate,
    Help("how often training leaves out the condition, which guidance needs (Ho & Salimans 2022)."),
]


class Settings:
    """The base of a group: a frozen dataclass whose `Attributes:` are the help of its fields."""


def used(number: Any) -> bool:
    """Whether a number is not 0: a traced one, being swept, is meant to be used."""
    return isinstance(number, Tracer) or number != 0


def is_size(text: str) -> bool:
    """Whether a text is a whole number in plain digits, of a length that a size may have."""
    return text.isascii() and text.isdecimal() and len(text) <= len(str(MOST))


def is_number(text: str) -> bool:
    """Whether a text is a number as Python reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def guided_by(spec: DataSpec, cond_dropout: Any) -> bool:
    """Whether a model of such data is trained without its condition at times."""
    return spec.conditional and used(cond_dropout)


# --- checks ---------------------------------------------------------------------------------------


def check_setting(name: str, value: Any, hint: Any) -> None:
    """Hold one setting to its annotation.

    Raises:
        ConfigError: for a name that is no choice, a number out of range, or another type.
    """
    text = _fault(name, value, hint)
    if text is not None:
        raise text


def _fault(name: str, value: Any, hint: Any) -> ConfigError | None:
    """What is wrong with a value, or None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(value, Tracer):
        return None
    if origin is Annotated:
        return _fault(name, value, args[0]) or _limits(name, value, args[1:], args[0] is int)
    if origin is Literal:
        return None if _among(value, args) else unknown_name(_words(name), _short(value), args)
    if origin in (types.UnionType, typing.Union):
        return _fault_of_union(name, value, args)
    if origin is tuple:
        return _fault_of_tuple(name, value, args)
    if origin is not None or not isinstance(hint, type):  # a protocol or a callable, not checked
        return None
    return _fault_of_type(name, value, hint)


def _limits(name: str, value: Any, metadata: Iterable[Any], whole: bool) -> ConfigError | None:
    for limit in metadata:
        if isinstance(limit, Within) and not limit.holds(value):
            return ConfigError(f"{name} must be {limit.why_not(value, whole)}; got {value}.")
        if isinstance(limit, OneOf) and not _among(value, limit.names):
            return unknown_name(_words(name), _short(value), limit.names)
    return None


def _among(value: Any, choices: Iterable[Any]) -> bool:
    """Whether a value is a choice: an array is none, and cannot be compared to find out."""
    return not hasattr(value, "shape") and value in tuple(choices)


def _short(value: Any) -> str:
    return f"{value!s:.80}"


def _fault_of_union(name: str, value: Any, args: tuple[Any, ...]) -> ConfigError | None:
    faults = [_fault(name, value, one) for one in args]
    if None in faults:
        return None
    # Of the alternatives the one is named that the user seems to have meant: a name or a number.
    kinds = {str: Literal, int: Annotated, float: Annotated, tuple: tuple, list: tuple}
    fits = kinds.get(type(value), "another kind")  # None is the origin of NoneType
    meant = [
        fault for one, fault in zip(args, faults, strict=True) if typing.get_origin(one) is fits
    ]
    return meant[0] if meant else faults[0]


def _fault_of_tuple(name: str, value: Any, args: tuple[Any, ...]) -> ConfigError | None:
    if not isinstance(value, tuple | list):
        return ConfigError(f"{name} must be a sequence; got {value!r}.")
    faults = (_fault(f"{name}[{index}]", one, args[0]) for index, one in enumerate(value))
    return next((fault for fault in faults if fault is not None), None)


def _fault_of_type(name: str, value: Any, hint: type) -> ConfigError | None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    kind = getattr(getattr(value, "dtype", None), "kind", "?")
    scalar = getattr(value, "shape", None) == () and kind in "iufV"  # V: bfloat16
    real = whole or isinstance(value, float | np.floating) or scalar
    right = {int: whole, float: real, bool: isinstance(value, bool | np.bool_)}
    if right.get(hint, isinstance(value, hint)):
        return None
    called = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    wanted = called.get(hint, f"a {hint.__name__} (see {hint.__module__})")
    return ConfigError(f"{name} must be {wanted}; got {value!r}.")


def _words(name: str) -> str:
    return name.replace("_", " ")


def check_fields(record: Any) -> None:
    """Hold every field of a dataclass to its annotation, for its `__post_init__`.

    Raises:
        ConfigError: see `check_setting`.
    """
    hints = _hints(type(record))
    for field in dataclasses.fields(record):
        check_setting(field.name, getattr(record, field.name), hints[field.name])


@functools.cache
def _hints(thing: Any) -> dict[str, Any]:
    return typing.get_type_hints(thing, include_extras=True)


def check_call(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Hold keyword arguments to the annotations of the function that takes them.

    Raises:
        ConfigError: see `check_setting`.
    """
    hints = _hints(inspect.unwrap(function))
    for name, value in given.items():
        if name in hints:
            check_setting(name, value, hints[name])


def checking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which holds what it is given to its annotations: for makers of data.

    Raises:
        ConfigError: see `check_setting`.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        check_call(function, signature.bind(*args, **given).arguments)
        return function(*args, **given)

    return checked


# --- builders -------------------------------------------------------------------------------------


def builder(build: Callable[..., Any]) -> Callable[..., Any]:
    """A family's builder, or a loader of data, with its settings checked by their annotations and
    its groups opened. What comes first, a spec or a path, is given by position or name.

    Raises:
        ConfigError: from the builder, for a setting that does not exist or is not what its
            annotation says, and for something else than a spec, or a trained model, to begin with.
    """
    groups = groups_of(build)
    signature = _flat(build, groups)
    first = next(iter(signature.parameters))

    @functools.wraps(build)
    def checked_build(*what: Any, **given: Any) -> Any:
        for name in given:
            if name not in signature.parameters:
                known = list(signature.parameters)[1:]
                raise unknown_name(f"setting of {build.__name__}", name, known)
        found = _bound(build.__name__, signature, what, given)
        of = found.pop(first)
        _check_first(build, first, of)
        return build(of, **checked_settings(build, found))

    checked_build.__signature__ = signature  # type: ignore[attr-defined]
    checked_build.__doc__ = _documented(build, groups)
    return checked_build


def _bound(name: str, signature: inspect.Signature, what: Any, given: Any) -> dict[str, Any]:
    """What was given, by name."""
    try:
        return dict(signature.bind(*what, **given).arguments)
    except TypeError as error:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        first = [one.name for one in signature.parameters.values() if one.kind is kind]
        raise ConfigError(
            f"{name}: {error}. By position it takes {' and '.join(first)}, all else by name."
        ) from None


def _check_first(build: Callable[..., Any], name: str, given: Any) -> None:
    """Refuse a source in the place of its spec, or a model in that of a trained one."""
    hint = _hints(inspect.unwrap(build)).get(name)
    if hint in (DataSpec, Trained):
        expect(build.__name__, given, hint)


def checked_settings(build: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a builder takes, those of its groups as records of theirs.

    Raises:
        ConfigError: for one that is not what its annotation says.
    """
    hints = _hints(inspect.unwrap(build))
    given = {name: _plain(value, hints.get(name)) for name, value in given.items()}
    check_call(build, given)
    own = {name: value for name, value in given.items() if name in hints}
    for name, default in groups_of(build).items():
        fields = {field.name for field in dataclasses.fields(default)}
        kinds = _hints(type(default))
        changes = {key: _plain(given[key], kinds[key]) for key in given if key in fields}
        own[name] = dataclasses.replace(default, **changes)
        check_fields(own[name])
    return own


def _plain(value: Any, hint: Any) -> Any:
    """A vector or a range as the tuple that a setting takes: of numbers, as a run folder keeps."""
    if not _takes_tuple(hint) or isinstance(value, Tracer):
        return value
    if isinstance(value, range):
        return tuple(value)
    return tuple(value.tolist()) if getattr(value, "ndim", 0) == 1 else value


def _takes_tuple(hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return True
    inner = (types.UnionType, typing.Union, Annotated)
    return typing.get_origin(hint) in inner and any(map(_takes_tuple, typing.get_args(hint)))


def groups_of(build: Callable[..., Any]) -> dict[str, Any]:
    """The groups of a builder: parameter -> the record that is its default."""
    parameters = inspect.signature(inspect.unwrap(build)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return {name: value for name, value in defaults.items() if isinstance(value, Settings)}


def _flat(build: Callable[..., Any], groups: Mapping[str, Any]) -> inspect.Signature:
    """The signature with the fields of each group in its place."""
    own = inspect.signature(build)
    found = []
    for name, parameter in own.parameters.items():
        if name not in groups:
            found.append(parameter)
            continue
        for field in dataclasses.fields(groups[name]):
            default = getattr(groups[name], field.name)
            kind = inspect.Parameter.KEYWORD_ONLY
            hint = field.type
            found.append(inspect.Parameter(field.name, kind, default=default, annotation=hint))
    return own.replace(parameters=found)


def _documented(build: Callable[..., Any], groups: Mapping[str, Any]) -> str:
    """The builder's docstring, with what the groups say of their fields below it."""
    parts = [inspect.getdoc(build) or ""]
    for default in groups.values():
        text = inspect.getdoc(type(default)) or ""
        title, _, fields = text.partition("Attributes:")
        parts.append(f"{title.splitlines()[0]} Keyword arguments, too:{fields.rstrip()}")
    return "\n\n".join(parts) + "\n"
