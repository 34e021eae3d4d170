"""Settings are held to their annotations: every kind of annotation, traced values, groups, and what
a builder shows of itself.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.errors import ConfigError
from genjax.protocol import DataSpec
from genjax.settings import (
    CondDropout,
    Count,
    Dtype,
    Finite,
    Help,
    NonNegative,
    OneOf,
    Positive,
    Rate,
    Settings,
    Whole,
    Within,
    builder,
    check_setting,
    groups_of,
    guided_by,
    used,
)

SPEC = DataSpec((2,), "continuous")
TABLE = {"euler": 1, "heun": 2}
Name = Literal["shared", "element"]


class Record(NamedTuple):
    """A value of a class, such as a prior of one's own."""

    value: int


# --- one setting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        (Count, [1, 7, np.int64(3), 2**31 - 1]),
        (Whole, [0, 7]),
        (Rate, [0, 0.0, 0.5, np.float32(0.25), jnp.float32(0.5), 0.999]),
        (Positive, [1e-30, 3, 0.5]),
        (NonNegative, [0, 0.0, 2]),
        (Finite, [-3, 0.0, 1e18]),
        (Annotated[float, Within(0, 1)], [0, 1, 0.5]),
        (Annotated[float, Within(high=2)], [-100, 2]),
        (int, [-1, np.int32(2)]),
        (float, [1, 0.5, math.inf]),
        (bool, [True, np.bool_(False)]),
        (str, ["anything"]),
        (Name, ["shared", "element"]),
        (Annotated[str, OneOf(TABLE)], ["euler"]),
        (Dtype, ["float32", "bfloat16"]),
        (CondDropout, [0.1]),
        (tuple[Count, ...], [(), (1, 2), [3]]),
        (Name | Positive, ["shared", 0.5, 2, jnp.float32(1.0)]),
        (Name | Record, ["element", Record(3)]),
        (Finite | None, [None, -1.0]),
        (Record, [Record(1)]),
        (Callable[[int], int], [abs, "not checked"]),
        (Annotated[Count, Help("of what")], [1]),
    ],
)
def test_values_that_are_what_the_annotation_says(hint, values):
    for value in values:
        check_setting("it", value, hint)


@pytest.mark.parametrize(
    ("hint", "value", "match"),
    [
        (Count, 0, "it must be at least 1; got 0"),
        (Count, 2.0, "it must be a whole number; got 2.0"),
        (Count, True, "it must be a whole number; got True"),
        (Count, "3", "it must be a whole number; got '3'"),
        (Whole, -1, "it must be at least 0; got -1"),
        (Rate, 1.0, r"it must be in \[0, 1\); got 1.0"),
        (Rate, -0.1, r"it must be in \[0, 1\); got -0.1"),
        (Rate, math.nan, "got nan"),
        (Positive, 0.0, "it must be positive; got 0.0"),
        (Positive, math.inf, "it must be positive; got inf"),
        (NonNegative, -1e-9, "it must be at least 0"),
        (Finite, math.nan, "it must be finite; got nan"),
        (Count, 10**30, r"it must be at most 2\*\*31 - 1; got 1000"),
        (Positive, 1e-300, "it must be positive, and not 0 in float32; got 1e-300"),
        (Finite, 1e300, r"it must be at most 1e\+18; got 1e\+300"),
        (Finite, -1e300, r"it must be at least -1e\+18; got -1e\+300"),
        (float, np.bool_(True), "it must be a number; got"),
        (Finite, np.str_("1"), "it must be a number; got"),
        (Annotated[float, Within(0, 1, above=True)], 0, r"it must be in \(0, 1\]; got 0"),
        (Annotated[float, Within(high=2)], 3, "it must be at most 2; got 3"),
        (float, "fast", "it must be a number; got 'fast'"),
        (float, None, "it must be a number; got None"),
        (float, jnp.ones(3), "it must be a number; got"),
        (bool, 1, "it must be true or false; got 1"),
        (str, 3, "it must be a text; got 3"),
        (Name, "shard", "no it called 'shard'. Did you mean shared"),
        (Name, 3, "no it called '3'. There are: shared, element"),
        (Annotated[str, OneOf(TABLE)], "hoin", "no it called 'hoin'. Did you mean heun"),
        (Dtype, "float16", "no it called 'float16'. Did you mean"),
        (tuple[Count, ...], (4, 0), r"it\[1\] must be at least 1; got 0"),
        (tuple[Count, ...], 4, "it must be a sequence; got 4"),
        (Name | Positive, -1.0, "it must be positive; got -1.0"),  # a number was meant
        (Name | Positive, 0, "it must be positive; got 0"),
        (Name | Positive, "elemnt", "no it called 'elemnt'. Did you mean element"),  # or a name
        (Name | Record, 3.5, "no it called '3.5'"),
        (Finite | None, "high", "it must be a number; got 'high'"),
        (Finite | None, jnp.ones(3), "it must be a number; got"),
        (Record, 3, r"it must be a Record \(see .*test_settings\); got 3"),
    ],
)
def test_values_that_are_not(hint, value, match):
    with pytest.raises(ConfigError, match=match):
        check_setting("it", value, hint)


def test_names_are_said_in_words_where_they_are_looked_up():
    with pytest.raises(ConfigError, match="There is no bound estimator called 'elb'"):
        check_setting("bound_estimator", "elb", Literal["elbo", "iwae"])


@pytest.mark.parametrize("hint", [Count, Whole, Rate, Positive, Name | Positive, Finite | None])
def test_traced_values_pass_since_they_have_none_to_check(hint):
    def run(value):
        check_setting("it", value, hint)
        return value

    assert jax.jit(run)(-5.0) == -5.0  # out of every range, and no one can know
    np.testing.assert_array_equal(jax.vmap(run)(jnp.asarray([-1.0, 0.5])), [-1.0, 0.5])


def test_a_number_is_used_unless_it_is_zero_or_nobody_can_know():
    assert used(0.1)
    assert used(-1)
    assert not used(0.0)
    assert not used(0)
    seen = []
    jax.jit(lambda value: seen.append(used(value)))(0.0)
    assert seen == [True]
    labelled = DataSpec((2,), "binary", n_classes=3)
    assert guided_by(labelled, 0.1)
    assert not guided_by(labelled, 0.0)
    assert not guided_by(SPEC, 0.1)


# --- builders -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling(Settings):
    """How samples are made.

    Attributes:
        n_steps: how many steps.
        solver: which one, a name in
            `TABLE`.
    """

    n_steps: Count = 50
    solver: Annotated[str, OneOf(TABLE)] = "heun"

    def __post_init__(self):
        if self.solver == "euler" and self.n_steps < 10:
            raise ConfigError("Euler needs ten steps.")


LESS = Sampling(n_steps=20)


@builder
def toy(
    spec: DataSpec,
    *,
    width: Count = 3,
    sampling: Sampling = LESS,
    scale: Name | Positive = "shared",
    rest: Rate = 0.0,
) -> tuple:
    """A toy.

    Args:
        spec: the data.
        width: of a layer.
        scale: of the noise.
        rest: what is left.
    """
    return spec, width, sampling, scale, rest


def test_a_builder_gets_what_was_given_and_its_defaults():
    assert toy(SPEC) == (SPEC, 3, Sampling(20, "heun"), "shared", 0.0)
    found = toy(SPEC, width=5, scale=0.5, rest=0.25)
    assert found == (SPEC, 5, Sampling(20, "heun"), 0.5, 0.25)


def test_the_fields_of_a_group_are_keyword_arguments_of_their_own():
    assert toy(SPEC, solver="euler")[2] == Sampling(20, "euler")
    assert toy(SPEC, n_steps=4, width=1)[1:3] == (1, Sampling(4, "heun"))
    assert groups_of(toy) == {"sampling": Sampling(20)}
    assert Sampling() == Sampling(50)  # the group's own defaults are others', and untouched


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"rest": 1.0}, "rest must be in"),
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"solver": "hen"}, "no solver called 'hen'. Did you mean heun"),
        ({"solver": "euler", "n_steps": 5}, "Euler needs ten steps"),  # what the group says itself
        ({"widht": 3}, "no setting of toy called 'widht'. Did you mean width"),
        ({"sampling": Sampling(3)}, "no setting of toy called 'sampling'"),
    ],
)
def test_what_a_builder_refuses(settings, match):
    with pytest.raises(ConfigError, match=match):
        toy(SPEC, **settings)


def test_a_builder_may_be_built_inside_a_trace():
    assert float(jax.jit(lambda rest: toy(SPEC, rest=rest)[4])(0.5)) == 0.5
    traced = jax.eval_shape(lambda n: toy(SPEC, n_steps=n)[2].n_steps, jnp.int32(7))
    assert traced.dtype == jnp.int32


def test_the_signature_shows_the_fields_in_the_groups_place():
    parameters = inspect.signature(toy).parameters
    assert list(parameters) == ["spec", "width", "n_steps", "solver", "scale", "rest"]
    assert parameters["n_steps"].default == 20  # the builder's, not the group's
    assert parameters["n_steps"].annotation == Count
    assert parameters["solver"].default == "heun"
    assert all(
        parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[1:]
    )


def test_the_docstring_explains_the_fields_of_groups():
    text = inspect.getdoc(toy)
    assert text.startswith("A toy.")
    assert "How samples are made. Keyword arguments, too:" in text
    assert "n_steps: how many steps." in text
    assert "`TABLE`" in text
    assert toy.__name__ == "toy"
