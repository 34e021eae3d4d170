"""Settings of an optimiser that do nothing beside the others are said."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.learning.optim import Optimizer
from genjax.runs.sweeps import run_sweep
from genjax.runs.train import about_settings, train
from genjax.zoo import ZOO
from genjax.zoo.recipe import Schedule
from genjax.zoo.sections import replace

PARAMS = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.asarray([1.0, -1.0])}
IDLE = {
    "final_fraction": ({"final_fraction": 0.1}, {"schedule": "cosine"}),
    "decay_fraction": ({"decay_fraction": 0.5, "schedule": "cosine"}, {"schedule": "wsd"}),
    "b1": ({"b1": 0.5, "algorithm": "rmsprop"}, {"algorithm": "adam"}),
    "b2": ({"b2": 0.9, "algorithm": "sgd"}, {"algorithm": "rmsprop"}),
    "decayed": ({"decayed": ("vector",), "algorithm": "adamw"}, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_without_effect_is_said_and_has_none(name):
    """And with the other one it has some, and is not said."""
    given, other = IDLE[name]

    def trained(settings):
        tx, params = Optimizer(learning_rate=0.1, **settings).build(4), PARAMS
        state = tx.init(params)
        for _ in range(4):
            with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
                updates, state = jax.jit(tx.update)(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    def without(settings):
        return {key: value for key, value in settings.items() if key != name}

    (line,) = Optimizer(**given).idle()
    assert line.startswith(f"{name} {given[name]} has no effect: ")
    jax.tree.map(np.testing.assert_array_equal, trained(given), trained(without(given)))
    assert Optimizer(**{**given, **other}).idle() == []
    pairs = zip(
        *(jax.tree.leaves(trained(f({**given, **other}))) for f in (dict, without)), strict=True
    )
    assert any((a != b).any() for a, b in pairs)


def test_a_label_of_a_models_own_has_a_rule_by_being_named():
    assert Optimizer(decayed=("matrix", "codes")).idle() == []


def test_no_row_of_the_zoo_has_settings_without_effect_and_training_says_those_of_a_player():
    assert {name: about_settings(row) for name, row in ZOO.items() if about_settings(row)} == {}
    players = {name: Optimizer(final_fraction=0.5) for name in ("generator", "discriminator")}
    row = dataclasses.replace(ZOO["gan"], optimizer=players, schedule=Schedule(snapshot_every=7))
    assert about_settings(row) == [
        "generator.final_fraction 0.5 has no effect: the schedule is constant",
        "discriminator.final_fraction 0.5 has no effect: the schedule is constant",
        "snapshot_every 7 has no effect: no sigma_rels are tracked",
    ]


@pytest.mark.slow
def test_evaluations_of_a_model_without_a_score_are_said_to_have_no_effect(tmp_path):
    row, said = replace(ZOO["gan-ring"], hidden=(4,), steps=2, evaluate_every=1), []
    train(row, tmp_path / "run", say=said.append)
    assert (
        said.count("evaluate_every 1 has no effect: gan-ring has no log-probability and no bound")
        == 1
    )


@pytest.mark.slow
def test_a_sweep_says_of_each_value_that_it_has_no_effect(tmp_path):
    row, said = replace(ZOO["vae"], hidden=(4,), latent_dim=1, steps=2, schedule="constant"), []
    run_sweep(row, {"final_fraction": [0.0, 0.2, 0.5]}, 1, tmp_path / "run", say=said.append)
    assert [line for line in said if "has no effect" in line] == [
        f"final_fraction {value} has no effect: the schedule is constant" for value in (0.2, 0.5)
    ]
