"""The examples in docstrings run and print what they say, and every public name has one."""

import doctest
import inspect

import jax
import pytest

import genjax
from genjax.families import _skeleton

PUBLIC = {name: getattr(genjax, name) for name in genjax.__all__}
PUBLIC["skeleton"] = _skeleton.skeleton
BUILDERS = {name for name, value in PUBLIC.items() if hasattr(value, "__wrapped__")}
WITH_EXAMPLE = sorted(name for name, value in PUBLIC.items() if ">>>" in (value.__doc__ or ""))


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_prints_what_it_says(name):
    # As a user has it: the strictness of the tests is not that of a session.
    finder = doctest.DocTestFinder(recurse=False)
    module = inspect.getmodule(inspect.unwrap(PUBLIC[name]))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in finder.find(PUBLIC[name], name, module=module, globs={}):
            found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
            assert found.failed == 0
            assert found.attempted > 0


def test_every_public_name_has_an_example():
    assert {row.family.__name__ for row in genjax.ZOO.values()} <= BUILDERS
    tables = {"ZOO", "TENSOR_RULES"}  # which are data, and have no docstring of their own
    assert set(PUBLIC) - set(WITH_EXAMPLE) == tables
