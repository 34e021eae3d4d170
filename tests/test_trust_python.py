"""Data have an identity in Python as on the command line: other data of a run are brought to its
classes, or refused, and nothing is changed by going on that is refused (trust, A1 and A4).
"""

import jax
import numpy as np
import optax
import pytest
from short_runs import tiny

import genjax
from genjax import from_arrays, vae
from genjax.errors import ConfigError, DataError
from genjax.runs.api import Run
from genjax.runs.folder import open_folder, read_config
from genjax.runs.other_data import brought_to
from genjax.runs.own_model import checkpoints_of
from genjax.zoo.recipe import to_dict

X = np.random.default_rng(2).normal(size=(60, 3))
Y = np.repeat([1, 2, 3, 4], 15)


@pytest.mark.parametrize("y", [Y, Y.astype(str), Y * 1.0, Y[:, None]])
def test_classes_of_other_data_in_memory_are_those_of_the_run(y):
    """By what they are called, however few of them there are."""
    spec = from_arrays(X, y=Y).spec
    source = brought_to(spec, from_arrays(X[30:], y=y[30:], standardize="none"), "x")
    labels = np.concatenate([batch.cond for batch in source.load()])
    assert np.bincount(labels).tolist() == [0, 0, 15, 15]
    assert source.spec.n_classes == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": X, "y": Y + 1}, "has classes that the run does not know: '5'"),
        ({"x": X}, "n_classes is None, the run has 4"),
        ({"x": X[:, :2], "y": Y}, r"shape is \(2,\), the run has \(3,\)"),
        ({"x": X > 0, "y": Y}, "kind is 'binary', the run has 'continuous'"),
    ],
)
def test_other_data_in_memory_of_another_kind_are_refused(given, said):
    spec = from_arrays(X, y=Y).spec
    with pytest.raises(DataError, match=said):
        brought_to(spec, from_arrays(**given), "x")


@pytest.mark.slow
def test_a_run_is_evaluated_on_the_classes_that_are_meant():
    small = {"steps": 2, "hidden": (4,), "latent_dim": 1, "batch_size": 8, "say": str}
    run = genjax.train("vae", from_arrays(X, y=Y), evaluate_every=0, sample_every=0, **small)
    with pytest.raises(DataError, match="classes that the run does not know: '5'"):
        run.evaluate(data=from_arrays(X, y=Y + 1))
    one, other = (run.evaluate(data=from_arrays(X[:30], y=y))["mean"] for y in (Y[:30], Y[30:]))
    assert one != other


def test_settings_are_not_changed_before_the_data_are_looked_at(tmp_path):
    recipe = tiny("vae")
    values = to_dict(recipe)
    open_folder(tmp_path, values)
    more = {**values, "schedule": {**values["schedule"], "steps": 10**6}}
    said = []

    def refuse():
        raise DataError("not those")

    with pytest.raises(DataError, match="not those"):
        open_folder(tmp_path, more, said.append, refuse)
    assert read_config(tmp_path) == values
    assert not said
    open_folder(tmp_path, more, said.append, lambda: None)
    assert read_config(tmp_path) == more


def test_going_on_with_a_model_of_ones_own_takes_the_same_data(tmp_path):
    one, other = (from_arrays(x, standardize="none") for x in (X, X[::-1].copy()))
    model = vae(one.spec, hidden=(4,), latent_dim=1)
    state = genjax.training(model, optax.sgd(0.1)).init(jax.random.key(0))
    checkpoints_of(tmp_path, model, one).save(state)
    for source in (one, None):
        restored = checkpoints_of(tmp_path, model, source).restore(state)
        assert restored is not None
    with pytest.raises(DataError, match=r"The data are not those that .* was trained on"):
        checkpoints_of(tmp_path, model, other).restore(state)


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 0},
        {"steps": -5},
        {"steps": 2.5},
        {"steps_per_call": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_of_a_model_of_ones_own(given):
    """No step a dispatch would never come to an end."""
    source = from_arrays(X)
    model = vae(source.spec, hidden=(4,), latent_dim=1)
    with pytest.raises(ConfigError, match=next(iter(given))):
        genjax.train(model, source, **given)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True, 2**32])
def test_a_seed_that_is_none_is_refused(seed):
    model = vae(genjax.DataSpec((3,), "continuous"), hidden=(4,), latent_dim=1)
    run = Run(model, *model.init(jax.random.key(0)), step=0)
    for call in (lambda: run.sample(2, seed=seed), lambda: run.bound(X[:2], seed=seed)):
        with pytest.raises(ConfigError, match="seed must be a whole number"):
            call()


def test_only_training_states_are_saved_and_restored(tmp_path):
    params = {"vae": np.zeros(3)}
    for call in (genjax.save, lambda it, folder: genjax.restore(folder, it)):
        with pytest.raises(ConfigError, match=r"Expected a training state.*got dict"):
            call(params, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cvae", pytest.param("diffusion", marks=pytest.mark.slow)])
def test_a_condition_that_data_in_memory_lack_is_said(name):
    said = []
    x = np.random.default_rng(0).normal(size=(60, 2))
    small = {"steps": 2, "hidden": (4,), "batch_size": 8, "warmup_steps": 0}
    run = genjax.train(name, x, say=said.append, **small)
    assert not run.spec.conditional
    assert f"no labels, so {name} is trained without a condition" in "\n".join(said)
