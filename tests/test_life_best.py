"""The best state of a run beside the newest, ending early, and going on to more steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import refused

import genjax
import genjax.cli
from genjax.errors import CheckpointError, ConfigError, Interrupted
from genjax.learning.checkpoint import Checkpoints
from genjax.protocol import TrainState
from genjax.runs.best import Best, ended_early, no_gain
from genjax.runs.train import say_best
from genjax.runs.train import train as train_in
from genjax.zoo import ZOO
from genjax.zoo.recipe import Schedule
from genjax.zoo.sections import replace

# Noise, which a network of this size learns by heart: the validation split is at its best early.
SMALL = {
    "hidden": (32,),
    "latent_dim": 4,
    "batch_size": 16,
    "learning_rate": 0.03,
    "steps": 120,
    "steps_per_call": 5,
    "evaluate_every": 10,
    "checkpoint_every": 20,
    "sample_every": 0,
    "log_every": 10,
}


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2, size=(60, 8)).astype(np.uint8))
    return str(path)


def trained(noise, folder, **changes):
    said = []
    settings = {**SMALL, **changes}
    run = genjax.train("vae", noise, out=folder, say=said.append, **settings)
    return run, "\n".join(said)


def curve(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["valid/bound"] for line in lines if "valid/bound" in line}


@pytest.fixture(scope="module")
def whole(noise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run, said = trained(noise, folder)
    return folder, run, said


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, (a.params, b.params)), strict=True)
    )


@pytest.mark.slow
def test_the_best_is_that_of_the_curve_and_not_the_newest(whole):
    folder, run, said = whole
    values = curve(folder)
    step = max(values, key=values.get)
    assert step < 120, "this run never overfits, and shows nothing"
    best = genjax.load(folder, which="best")
    assert (best.step, genjax.load(folder).step, run.step) == (step, 120, 120)
    assert not same(best, run)
    assert f"best on the validation split: {values[step]:.3f} nats at step {step}" in said
    (kept,) = Checkpoints(folder / "best").steps()
    assert kept == step


@pytest.mark.slow
def test_a_run_in_two_parts_keeps_the_same_best(whole, noise, tmp_path):
    folder, _, _ = whole
    recipe = replace(ZOO["vae"].on(noise), **SMALL)

    def stop(step, *rest):
        if step >= 70:
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        train_in(recipe, tmp_path / "run", stop, say=str)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 60
    train_in(recipe, tmp_path / "run", say=str)
    assert same(genjax.load(tmp_path / "run", "best"), genjax.load(folder, "best"))
    assert curve(tmp_path / "run") == curve(folder)


def ending(values, patience):
    """The step at which so many evaluations in a row were no better than the best before."""
    best, since = -np.inf, 0
    for step, value in values.items():
        best, since = (value, 0) if value > best else (best, since + 1)
        if since == patience:
            return step
    return None


@pytest.mark.slow
def test_a_run_ends_after_so_many_evaluations_without_gain(whole, noise, tmp_path):
    folder, _, _ = whole
    wanted = ending(curve(folder), 3)
    assert wanted is not None
    assert wanted < 120
    run, said = trained(noise, tmp_path / "once", stop_after=3)
    assert run.step == wanted
    assert f"ended at step {wanted} of 120: 3 evaluations in a row brought no gain" in said
    assert list((tmp_path / "once" / "samples").glob("*.png"))  # the last picture is there
    # The same command again trains nothing more, and says the same.
    again, said = trained(noise, tmp_path / "once", stop_after=3)
    assert again.step == wanted
    assert f"ended at step {wanted} of 120" in said
    # In two parts it ends at the same step.
    recipe = replace(ZOO["vae"].on(noise), **SMALL, stop_after=3)

    def stop(step, *rest):
        if step >= wanted - 5:
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        train_in(recipe, tmp_path / "twice", stop, say=str)
    state = train_in(recipe, tmp_path / "twice", say=str)
    assert int(state.step) == wanted
    # Without the limit it goes on, to where a run without one ends.
    longer, said = trained(noise, tmp_path / "once", stop_after=0)
    assert "goes on with schedule.stop_after 0, which was 3" in said
    assert longer.step == 120
    assert same(longer, genjax.load(folder))


@pytest.mark.slow
def test_a_run_goes_on_to_more_steps_and_never_to_fewer(noise, tmp_path):
    more = {"optimizer.schedule": "constant"}
    trained(noise, tmp_path / "run", steps=40, **more)
    run, said = trained(noise, tmp_path / "run", steps=60, **more)
    assert run.step == 60
    assert "goes on with schedule.steps 60, which was 40" in said
    assert "schedule of the step size" not in said
    # Where no step size falls over the run, it is the run that was 60 steps from the start.
    once, _ = trained(noise, tmp_path / "once", steps=60, **more)
    assert same(run, once)
    with pytest.raises(ConfigError, match=r"schedule.steps: there 60, now 50"):
        trained(noise, tmp_path / "run", steps=50, **more)
    assert genjax.load(tmp_path / "run").step == 60
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        trained(noise, tmp_path / "run", steps=80, seed=1, **more)


@pytest.mark.slow
def test_a_schedule_over_the_run_is_said_to_change(noise, tmp_path):
    trained(noise, tmp_path / "run", steps=20)
    _, said = trained(noise, tmp_path / "run", steps=30)
    assert "the cosine schedule of the step size is now over all steps" in said


def test_a_value_that_is_no_number_is_no_gain(noise, tmp_path):
    best = Best(tmp_path, {})
    assert np.isnan(best.offer(10, None, lambda: float("nan")))
    assert (best.step, best.value) == (0, -np.inf)


@pytest.mark.slow
def test_what_has_no_best_says_so(noise, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gan = {"steps": 2, "hidden": (4,), "latent_dim": 2, "batch_size": 8, "sample_every": 0}
    genjax.train("gan", noise, out="gan", say=str, **gan)
    with pytest.raises(ConfigError, match=r"no best checkpoint: this model has neither"):
        genjax.load("gan", which="best")
    assert "Leave --which out" in refused(["sample", "gan", "--which", "best"], capsys)
    with pytest.raises(ConfigError, match="--stop-after needs a figure"):
        genjax.train("gan", noise, out="other", say=str, stop_after=2, **gan)
    assert not (tmp_path / "other").exists()
    trained(noise, tmp_path / "never", steps=2, evaluate_every=0)
    with pytest.raises(CheckpointError, match="was trained with --evaluate-every 0"):
        genjax.load(tmp_path / "never", which="best")
    with pytest.raises(ConfigError, match="stop_after counts evaluations"):
        trained(noise, tmp_path / "no", evaluate_every=0, stop_after=1)
    with pytest.raises(ConfigError, match=r"'bets'.*Did you mean best"):
        genjax.load(tmp_path / "never", which="bets")


@pytest.mark.slow
def test_commands_take_the_best_under_names_of_their_own(whole, capsys, monkeypatch):
    folder, _, _ = whole
    monkeypatch.chdir(folder.parent)
    step = genjax.load(folder, "best").step
    for which in ("newest", "best"):
        args = ["whole", "--which", which]
        genjax.cli.main(["sample", *args, "--n", "64"])
        genjax.cli.main(["evaluate", *args, "--n-samples", "2"])
        genjax.cli.main(["export", *args])
    capsys.readouterr()
    reports = [json.loads((folder / f"report{end}.json").read_text()) for end in ("", "-best")]
    assert [(one["which"], one["step"]) for one in reports] == [("newest", 120), ("best", step)]
    assert reports[0]["mean"] != reports[1]["mean"]
    one, other = (
        np.load(folder / "samples" / f"sample_n64_seed0{end}.npz")["x"] for end in ("", "_best")
    )
    assert one.shape == other.shape
    assert (one != other).any()
    assert (folder / "export").is_dir()
    assert (folder / "export-best").is_dir()


def test_evaluations_that_never_were_are_not_counted():
    """Evaluations are at most one a dispatch: with 50 steps in one and 10 between evaluations, step
    100 is the first after 50.
    """
    schedule = Schedule(steps=1000, steps_per_call=50, evaluate_every=10, stop_after=3)
    assert not no_gain(schedule, 50, 100)
    assert not no_gain(schedule, 50, 150)
    assert no_gain(schedule, 50, 200)
    seldom = Schedule(steps=1000, steps_per_call=50, evaluate_every=100, stop_after=3)
    assert not no_gain(seldom, 100, 350)
    assert no_gain(seldom, 100, 400)


def test_a_damaged_best_is_set_aside_and_ends_nothing(tmp_path, caplog):
    params = {"net": {"w": jnp.ones(3)}}
    state = TrainState(jnp.asarray(40), jax.random.key(0), params, {"net": {}}, {"net": {}})
    saved = Checkpoints(tmp_path / "best", 1).save(state, {"valid": -1.0})
    next((saved / "state" / "d").iterdir()).write_bytes(b"damage")
    schedule = Schedule(steps=100, steps_per_call=5, evaluate_every=10, stop_after=3)
    assert not ended_early(tmp_path, schedule, 60)
    for _ in range(2):  # and again, before there is another best
        best = Best(tmp_path, {})
        assert "A damaged checkpoint was passed over and is now called" in caplog.text
        assert (best.step, best.value) == (40, -np.inf)
        assert (tmp_path / "best" / "40.damaged").is_dir()
        assert not ended_early(tmp_path, schedule, 60)
        assert ended_early(tmp_path, schedule, 70)
        say_best(best, schedule, 60, pytest.fail)  # there is none to speak of
    best.offer(40, state, lambda: -2.0)
    assert (best.step, best.value, best.checkpoints.steps()) == (40, -2.0, [40])
