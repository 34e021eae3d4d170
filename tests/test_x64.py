"""Where float64 is switched on, parameters are the same float32 numbers, and so is what is computed
of float32 data. (Parameters and data that were made float64 compute in it: other suites do.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import differ
from rows import B, batch, covering, optimizer, setup

from genjax.learning.step import training

KEY = jax.random.key(0)


def reals(tree):
    """The dtypes of a tree's real numbers."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    return {dtype.name for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}


@pytest.mark.slow
@covering
def test_all_is_float32_of_float32_data_and_begins_with_the_same_numbers(name):
    row, given, found = setup(name), batch(name), {}
    with jax.enable_x64(True):
        model = row.recipe.build(row.on)
        t, trees = training(model, optimizer()), jax.eval_shape(model.init, KEY)
        found["init"] = trees
        found["start"] = t.init(KEY)
        found["step"] = jax.eval_shape(t.step, found["start"], given)
        for player, loss in model.losses.items():
            found[player] = jax.eval_shape(loss, *trees, given, KEY, np.int32(0))
        for called in ("log_prob", "bound", "prepare"):
            if function := getattr(model, called):
                found[called] = jax.eval_shape(function, *trees, given, KEY)
        sample = functools.partial(model.sample, n=B)
        found["sample"] = jax.eval_shape(sample, *trees, key=KEY, cond=given.cond)
    start = found["start"]
    assert not differ((start.params, start.state), (row.params, row.state))
    assert found["sample"].dtype == given.x.dtype
    wrong = {what: reals(tree) for what, tree in found.items() if reals(tree) - {"float32"}}
    assert not wrong
