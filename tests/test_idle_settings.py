"""Settings that do nothing beside the others are said."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax import DataSpec, flow_matching
from genjax.cli.of_runs import _idle
from genjax.families.rnn import rnn
from genjax.learning.optim import Optimizer
from genjax.runs import samples
from genjax.runs.evaluate import evaluate
from genjax.runs.load import load
from genjax.runs.samples import Decoding
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


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"beams": 2}, ["seed 3 has no effect: a search with beams draws nothing"]),
        (
            {"temperature": 0.0, "top_k": 2, "repetition_penalty": 1.2},
            [
                "top_k 2 has no effect: temperature 0 takes the most probable token",
                "seed 3 has no effect: temperature 0 takes the most probable token",
            ],
        ),
        (
            {"top_k": 1, "temperature": 2.0},
            [
                "temperature 2.0 has no effect: top_k 1 takes the most probable token",
                "seed 3 has no effect: top_k 1 takes the most probable token",
            ],
        ),
        ({"top_k": 2, "temperature": 0.5}, []),
        ({"top_k": 4, "temperature": 0.5}, ["top_k 4 has no effect: there are 4 tokens"]),
    ],
)
def test_sampling_says_what_of_its_flags_has_no_effect_and_it_has_none(how, said):
    spec = DataSpec((5,), "tokens", levels=4, step="token")
    assert _idle(Decoding(**how), 3, spec) == said
    model = rnn(spec, d_embed=2, d_hidden=3)
    params, state = model.init(jax.random.key(0))
    idle = {line.split()[0] for line in said}

    def drawn(seed, **how):
        key = jax.random.key(seed)
        return samples.draw(model, params, state, key, 64, None, Decoding(**how))

    here = {name: value for name, value in how.items() if name not in idle}
    assert (drawn(3, **how) == drawn(3, **here)).all()
    assert (drawn(3, **how) == drawn(0, **how)).all() == ("seed" in idle)


@pytest.mark.slow
def test_an_adaptive_solver_chooses_its_own_steps():
    how = Decoding(solver="adaptive", n_steps=3, grid="karras")
    points = DataSpec((2,), "continuous")
    assert _idle(how, 1, points) == [
        "n_steps 3 has no effect: the solver adaptive chooses its own steps",
        "grid karras has no effect: the solver adaptive chooses its own steps",
    ]
    heun = Decoding(solver="heun", n_steps=3)
    assert _idle(how, 1, points, film=True) == _idle(heun, 1, points) == []
    model = flow_matching(points, hidden=(4,))
    params, state = model.init(jax.random.key(0))
    draws = [
        samples.draw(model, params, state, jax.random.key(1), 8, None, one)
        for one in (how, Decoding(solver="adaptive"))
    ]
    np.testing.assert_array_equal(*draws)


@pytest.mark.slow
def test_evaluation_of_a_model_without_a_score_says_that_batches_have_no_effect(tmp_path):
    row, said = replace(ZOO["gan-ring"], hidden=(4,), steps=2), []
    train(row, tmp_path / "run", say=str)
    evaluate(load(tmp_path / "run"), batch_size=7, say=said.append)
    assert "batch_size 7 has no effect: gan-ring has no log-probability and no bound" in said


@pytest.mark.slow
def test_a_sweep_says_of_each_value_that_it_has_no_effect(tmp_path):
    row, said = replace(ZOO["vae"], hidden=(4,), latent_dim=1, steps=2, schedule="constant"), []
    run_sweep(row, {"final_fraction": [0.0, 0.2, 0.5]}, 1, tmp_path / "run", say=said.append)
    assert [line for line in said if "has no effect" in line] == [
        f"final_fraction {value} has no effect: the schedule is constant" for value in (0.2, 0.5)
    ]
