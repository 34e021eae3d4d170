"""A run as an object in Python: it is what the commands have, in the units of the data."""

import json

import jax
import numpy as np
import optax
import pytest
from program import arrays_in

import genjax
import genjax.cli
from genjax.errors import CheckpointError, ConfigError, DataError
from genjax.runs.api import Run

RNG = np.random.default_rng(0)
SMALL = {"steps": 4, "batch_size": 8, "hidden": (4,), "latent_dim": 2, "evaluate_every": 0}
QUIET = {"say": str, "sample_every": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    return genjax.train("cvae", out=folder, **SMALL, **QUIET)


def test_a_run_is_loaded_and_samples_as_the_command_does(run):
    found = genjax.load(str(run.folder))
    assert found.step == 4
    assert found.recipe == run.recipe
    assert "cvae on digits, step 4" in repr(found)
    x = found.sample(5, cond=3, seed=7)
    genjax.cli.main(["sample", str(run.folder), "--n", "5", "--cond", "3", "--seed", "7"])
    path = run.folder / "samples" / "sample_n5_seed7_cond3.npz"
    np.testing.assert_array_equal(x, arrays_in(path)["x"])


@pytest.mark.slow
def test_scores_are_those_of_the_command(run):
    report = run.evaluate(n=20, n_samples=1)
    batch = run.source.load().test
    x, y = batch.x[:20].astype(np.float32), batch.cond[:20]
    scores = run.bound(x, y)
    assert scores.nats.shape == (20,)
    assert scores.mean == pytest.approx(scores.nats.mean())
    assert abs(scores.mean - report["mean"]) < 1  # another key's noise
    np.testing.assert_array_equal(run.bound(x[..., 0], y).nats, scores.nats)
    with pytest.raises(ConfigError, match="has no log_prob; it has bound"):
        run.log_prob(x, y)
    with pytest.raises(ConfigError, match="conditional: give cond="):
        run.bound(x)
    with pytest.raises(DataError, match=r"x must be \[N, 8, 8, 1\]; got \[20, 7, 8\]"):
        run.bound(x[:, :7, :, 0], y)
    nothing = "must hold one example at least; got shape"
    for function, given in ((run.bound, x), (run.encode, x), (run.decode, np.zeros((1, 2)))):
        with pytest.raises(ConfigError, match=nothing):
            function(given[:0], y[:0])


def test_latents_go_there_and_back(run):
    batch = run.source.load().test
    mean, sd = run.encode(batch.x[:6], batch.cond[:6])
    assert mean.shape == sd.shape == (6, 2)
    assert (sd > 0).all()
    between = np.linspace(mean[0], mean[1], 5)
    pictures = run.decode(between, cond=int(batch.cond[0]))
    assert pictures.shape == (5, 8, 8, 1)


@pytest.mark.slow
def test_data_in_memory_need_no_file_and_no_folder():
    x = RNG.normal(100.0, 20.0, (80, 3)).astype(np.float32)
    run = genjax.train("vae", x, **SMALL, **QUIET)
    assert run.folder is None
    assert run.spec.scale is not None
    drawn = run.sample(200)
    assert abs(drawn.mean() - 100) < 30  # in the units of the data
    assert run.bound(x[:10]).nats.shape == (10,)
    assert run.evaluate("valid")["data"] == "data"
    assert run.evaluate(data=x[:20], n=10)["split"] == "all"


@pytest.mark.slow
def test_labels_in_memory_make_a_conditional_model(tmp_path):
    y = np.array(["cat", "dog"])[np.arange(80) % 2]
    source = genjax.from_arrays(RNG.normal(size=(80, 3)), y=y)
    run = genjax.train("vae", source, out=tmp_path / "run", **SMALL, **QUIET)
    assert run.spec.class_names == ("cat", "dog")
    assert run.sample(3, cond="dog").shape == (3, 3)
    again = genjax.load(tmp_path / "run")
    np.testing.assert_array_equal(again.sample(4, "cat"), run.sample(4, "cat"))
    with pytest.raises(DataError, match="were in memory and are not kept"):
        again.evaluate()
    same = genjax.train("vae", source, out=tmp_path / "run", **SMALL, **QUIET)
    assert same.step == 4
    other = genjax.from_arrays(RNG.normal(size=(80, 3)), y=y)
    with pytest.raises(DataError, match="not those that"):
        genjax.train("vae", other, out=tmp_path / "run", **SMALL, **QUIET)


@pytest.mark.slow
def test_a_model_of_ones_own():
    source = genjax.from_arrays(RNG.normal(size=(80, 2)))
    model = genjax.vae(source.spec, hidden=(4,), latent_dim=1)
    seen = []
    run = genjax.train(
        model, source, steps=6, batch_size=8, optimizer=optax.sgd(1e-3), log=seen.append
    )
    assert run.step == 6
    assert run.recipe is None
    assert seen[-1]["step"] == 6
    assert run.bound(source.load().test.x).nats.shape == (8,)
    with pytest.raises(ConfigError, match="needs data="):
        genjax.train(model)


def test_states_are_saved_and_restored(tmp_path):
    model = genjax.vae(genjax.DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
    t = genjax.training(model, optax.adam(1e-3))
    state = t.init(jax.random.key(0))
    genjax.save(state, tmp_path / "states")
    again = genjax.restore(tmp_path / "states", jax.eval_shape(t.init, jax.random.key(0)))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        genjax.restore(tmp_path / "none", state)


def test_a_state_of_another_training_is_not_saved_over(tmp_path):
    model = genjax.vae(genjax.DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
    t, folder = genjax.training(model, optax.adam(1e-3)), tmp_path / "states"
    state = t.init(jax.random.key(0))
    later = state._replace(step=state.step + 5)
    genjax.save(state, folder)
    genjax.save(later, folder)
    assert genjax.save(later, folder).name == "5"  # the same one may be saved again
    with pytest.raises(CheckpointError, match=r"has a state of step 5, .* give another folder"):
        genjax.save(state, folder)
    other = t.init(jax.random.key(1))._replace(step=later.step)
    with pytest.raises(CheckpointError, match=r"another state of step 5\. It is of another train"):
        genjax.save(other, folder)
    wider = genjax.vae(genjax.DataSpec((2,), "continuous"), hidden=(5,), latent_dim=1)
    wide = genjax.training(wider, optax.adam(1e-3)).init(jax.random.key(0))
    with pytest.raises(CheckpointError, match=r"(?s)is not of this model.*Give another folder"):
        genjax.save(wide._replace(step=later.step), folder)
    again = genjax.restore(folder, later)
    jax.tree.map(np.testing.assert_array_equal, again.params, later.params)
    # Of a damaged one nothing is known: what is restored then goes on.
    next(path for path in (folder / "5").rglob("*") if path.is_file()).write_bytes(b"")
    assert genjax.save(state._replace(step=state.step + 4), folder).name == "4"
    assert sorted(path.name for path in folder.iterdir()) == ["0", "4", "5.damaged"]


def test_what_does_not_exist_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean vae"):
        genjax.train("vea")
    with pytest.raises(ConfigError, match="no setting 'temperature'"):
        run.generate(4, temperature=2.0)
    with pytest.raises(ConfigError, match="is not a run folder"):
        genjax.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="called 'hiden'"):
        genjax.train("vae", hiden=(3,))


@pytest.mark.slow
def test_what_a_run_is_worth_is_what_the_command_says(tmp_path):
    run = genjax.train("vae", out=tmp_path / "run", **SMALL, **QUIET)
    report = run.evaluate(n=10)
    genjax.cli.main(["evaluate", str(run.folder), "--n", "10"])
    (path,) = run.folder.glob("report*.json")
    written = json.loads(path.read_text())
    assert "K=1000" in report["estimator"]  # the recipe says so
    for name in ("mean", "standard_error", "estimator", "n", "seed"):
        assert report[name] == written[name]
    assert "K=3" in run.evaluate(n=10, n_samples=3)["estimator"]
    with pytest.raises(ConfigError, match="has no bound with samples"):
        genjax.train("gan", steps=2, **QUIET).evaluate(n_samples=3)


@pytest.mark.slow
def test_a_truth_of_all_classes_stands_beside_no_score_of_one():
    small = {"steps": 2, "n_layers": 2, "hidden": (4,), "evaluate_every": 0}
    run = genjax.train("nsf-ring", **small, **QUIET)
    assert "true_log_prob" in run.evaluate(n=10)
    with pytest.raises(ConfigError, match="has no bound with samples"):
        run.evaluate(n=10, n_samples=3)  # its score is exact
    run = genjax.train("nsf-ring", conditional=True, **small, **QUIET)
    assert "true_log_prob" not in run.evaluate(n=10)


@pytest.mark.slow
def test_evaluation_keeps_what_was_set_otherwise():
    small = {"steps": 2, "hidden": (4,), "evaluate_every": 0, **QUIET}
    fine = genjax.train("flow-matching-2d", n_likelihood_steps=7, **small)
    assert "7 steps" in fine.evaluate(n=4)["estimator"]
    run = genjax.train("vae", n_bound_samples=9, latent_dim=2, **small)
    assert "K=9" in run.evaluate(n=4)["estimator"]


@pytest.mark.slow
def test_a_second_stage_says_whether_its_bound_has_samples(tmp_path):
    genjax.train("vae", out=tmp_path / "first", **SMALL, **QUIET)
    small = {"steps": 2, "hidden": (4,), "evaluate_every": 0, **QUIET}
    run = genjax.train("realnvp-ring", tmp_path / "first", n_layers=2, **small)
    assert run.evaluate(n=4)["kind"].startswith("lower bound")
    with pytest.raises(ConfigError, match="has no bound with samples"):
        run.evaluate(n=4, n_samples=3)


def test_masked_values_are_refused(run):
    x, cond = np.zeros((2, 8, 8, 1)), np.ma.masked_array([1, 2], [False, True])
    with pytest.raises(DataError, match="cond: 1 of 2 values of a masked array are masked"):
        run.bound(x, cond)
    with pytest.raises(DataError, match="x: 128 of 128 values of a masked array"):
        run.encode(np.ma.masked_array(x, True), [1, 2])
    with pytest.raises(DataError, match="z: 1 of 2 values"):
        run.decode(cond[None] * 1.0, 1)


def test_lengths_are_whole_numbers():
    spec = genjax.DataSpec((3, 2), "binary", step="frame", lengths=True)
    model = genjax.rnn(spec, d_hidden=2)
    run = Run(model, *model.init(jax.random.key(0)), step=0)
    x = np.zeros((2, 3, 2))
    assert run.log_prob(x, length=[1, 3]).nats.shape == (2,)
    for length in ([1.7, 3], [2.0, 3.0], [2**32 + 1, 3], ["1", "3"], [[1], [3]]):
        with pytest.raises(DataError, match=r"batch.length must be (int \[2\]|from 1 to 3); got"):
            run.log_prob(x, length=length)
