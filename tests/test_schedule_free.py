"""The schedule-free optimiser (Defazio 2024) by the settings of a recipe; and schedules of which
two parts overlap.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_close
from optax import contrib

from genjax.errors import ConfigError
from genjax.learning.optim import Optimizer, averaged
from genjax.runs.train import about_settings, train
from genjax.zoo import ZOO
from genjax.zoo.recipe import Schedule
from genjax.zoo.sections import replace

PARAMS = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.asarray([1.0, -1.0])}


def trained(tx, steps=6, grads=lambda params: params):
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            updates, state = jax.jit(tx.update)(grads(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, averaged(state, params)


def test_it_is_optaxs_with_decay_of_everything():
    own = Optimizer("schedule-free", 0.1, weight_decay=0.3, decayed=("matrix", "vector"))
    theirs = contrib.schedule_free_adamw(0.1, b1=0.9, b2=0.999, weight_decay=0.3)
    assert_close(trained(own.build(6)), trained(theirs), rtol=1e-6)


def test_decay_and_step_sizes_go_by_label():
    still = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    decayed, _ = trained(Optimizer("schedule-free", 0.1, weight_decay=0.3).build(6), grads=still)
    assert_close(decayed["bias"], PARAMS["bias"], rtol=1e-6)
    assert (np.abs(decayed["kernel"]) < np.abs(PARAMS["kernel"])).all()
    slow, _ = trained(Optimizer("schedule-free", 0.1, rates=("matrix=0",)).build(6))
    assert_close(slow["kernel"], PARAMS["kernel"], rtol=1e-6)
    assert (np.abs(slow["bias"]) < np.abs(PARAMS["bias"])).all()


@pytest.mark.parametrize(
    "other", [{"schedule": "cosine"}, {"ema_decay": 0.9}, {"b1": 0.0}], ids=lambda one: str(one)
)
def test_what_it_takes_the_place_of_is_refused(other):
    with pytest.raises(ConfigError, match="takes the place of a schedule and of an average"):
        Optimizer("schedule-free", **other).build(10)


@pytest.mark.slow
def test_a_run_samples_and_evaluates_with_its_average(tmp_path):
    row = replace(ZOO["vae-ring"], hidden=(4,), latent_dim=1, steps=20, batch_size=8)
    row = replace(row, algorithm="schedule-free", schedule="constant", warmup_steps=3)
    row = replace(row, ema_decay=0.0)
    ts = train(row, tmp_path / "run")
    (player,) = ts.opt
    own, average = ts.params[player], averaged(ts.opt[player], ts.params[player])
    pairs = zip(*map(jax.tree.leaves, (own, average)), strict=True)
    assert any(not np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("fraction", "warmup"), [(1.0, 1), (0.9, 8), (0.5, 6), (0.5, 5)])
def test_a_decay_that_begins_before_the_peak_is_said(fraction, warmup):
    """And how far the step size comes."""
    wsd = Optimizer(schedule="wsd", decay_fraction=fraction, warmup_steps=warmup, learning_rate=1.0)
    most = max(float(wsd._rate(10, 1, jnp.asarray(count))) for count in range(10))
    row = dataclasses.replace(ZOO["vae-ring"], optimizer=wsd, schedule=Schedule(steps=10))
    said = about_settings(row)
    if most > 0.99:
        assert said == []
    else:
        assert said[0].endswith(f"overlap: the step size comes to {most:.2f} of learning_rate")
