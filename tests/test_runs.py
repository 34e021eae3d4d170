"""A run after a few steps: what is in its folder, that it is never overwritten, what `sample` makes
of it, and what `evaluate` says of it.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest
from gates import assert_same
from short_runs import contents, events, tiny
from tensorboardX.proto.event_pb2 import SessionLog

from genjax.errors import ConfigError
from genjax.evaluation.estimates import estimate, score_examples, scorer
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.step import eval_params
from genjax.runs import pictures
from genjax.runs.evaluate import evaluate
from genjax.runs.folder import read_spec
from genjax.runs.load import Loaded, load, sample
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.recipe import config_hash, from_dict, to_dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small conditional model of the digits after 40 steps."""
    folder = tmp_path_factory.mktemp("run") / "cvae"
    said: list[str] = []
    train(tiny("cvae"), folder, say=said.append)
    assert said == []
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


def test_a_run_folder_is_what_the_documentation_says(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        "checkpoints",
        "config.json",
        "curves.png",
        "data.json",
        "metrics.jsonl",
        "samples",
        "spec.json",
        "tensorboard",
    ]
    assert read_spec(folder) == tiny("cvae").source().spec
    config = json.loads((folder / "config.json").read_text())
    assert config == to_dict(tiny("cvae"))
    assert to_dict(from_dict(config, ZOO)) == config
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["20", "40"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "step_00000020.png",
        "step_00000040.png",
    ]
    for picture in [folder / "curves.png", *(folder / "samples").iterdir()]:
        assert matplotlib.image.imread(picture).std() > 0.01

    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 30, 40]
    window = {"step", "seconds", "vae/loss", "vae/elbo", "vae/kl", "vae/log_likelihood"}
    assert lines[1].keys() < lines[2].keys()
    rate = "speed/examples_per_second"
    assert all(line.pop(rate, 1.0) > 0 for line in lines)
    assert [set(line) for line in lines] == [
        window,
        {"step", "seconds", "valid/bound"},
        window | {"valid/bound"},
    ]
    assert lines[0]["seconds"] <= lines[1]["seconds"] <= lines[2]["seconds"]
    assert lines[0]["vae/loss"] == -lines[0]["vae/elbo"]


def test_tensorboard_shows_the_same_numbers(folder: Path) -> None:
    found = events(folder)
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].step, found[1].session_log.status) == (1, SessionLog.START)
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in found
        for value in event.summary.value
    }
    lines = pictures.read_metrics(folder / "metrics.jsonl")
    assert scalars == {
        (line["step"], name): float(np.float32(value))
        for line in lines
        for name, value in line.items()
        if name != "step"
    }
    assert all(abs(event.wall_time - time.time()) < 86400 for event in found if event.summary.value)


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing_but_says_so(folder: Path) -> None:
    before = contents(folder)
    said: list[str] = []
    state = train(tiny("cvae"), folder, say=said.append)
    assert int(state.step) == 40
    assert said == [f"all 40 steps of {folder} were done before; nothing is left to train"]
    after = contents(folder)
    new = set(after) - set(before)
    assert all(name.startswith("tensorboard/") for name in new)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"curves.png"}, "drawn again, of the same lines"


@pytest.mark.slow
def test_samples_are_a_function_of_the_key(loaded: Loaded) -> None:
    assert loaded.step == 40
    cond = np.repeat(np.arange(10, dtype=np.int32), 2)
    one, again, other = (sample(loaded, jax.random.key(seed), 20, cond) for seed in (0, 0, 1))
    assert one.shape == (20, 8, 8, 1)
    assert one.dtype == np.float32
    assert set(np.unique(one)) <= set(range(17))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    means = sample(loaded, jax.random.key(0), 20, cond, means=True)
    assert means.shape == one.shape
    assert not np.equal(means, np.round(means)).all()


@pytest.mark.slow
def test_a_run_is_sampled_with_its_averaged_weights(folder: Path, loaded: Loaded) -> None:
    recipe = tiny("cvae")
    like = jax.eval_shape(recipe.training(loaded.model.spec).init, jax.random.key(0))
    restored = Checkpoints(folder / "checkpoints").restore(like)
    assert restored is not None
    same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded.params, restored.state.params)
    assert not all(jax.tree.leaves(same)), (
        "ema_decay is set, so the averages must differ from the weights themselves"
    )
    assert_same(loaded.params, eval_params(restored.state))


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, r"is conditional: give `cond` \(labels 0\.\.9, int \[4\]\)"),
        (np.asarray([0, 1, 2, 10], np.int32), r"labels 0\.\.9, int \[4\]; got labels from 0 to 10"),
        (np.zeros(3, np.int32), r"int \[4\]; got shape \[3\]"),
        (np.zeros(4, np.float32), "got dtype float32"),
    ],
)
def test_conditions_that_do_not_fit(loaded: Loaded, cond: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(loaded, jax.random.key(0), 4, cond)


def test_means_of_a_family_without_them(loaded: Loaded) -> None:
    without = loaded._replace(model=loaded.model._replace(latent=None))
    with pytest.raises(
        ConfigError, match=r"has no means of p\(x\|z\) to show; sample without --means"
    ):
        sample(without, jax.random.key(0), 1, np.zeros(1, np.int32), means=True)


def test_a_report_says_what_its_figure_is(folder: Path, loaded: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    report = evaluate(
        loaded,
        "test",
        seed=3,
        batch_size=77,
        progress=lambda done, total: seen.append((done, total)),
    )
    source = loaded.recipe.source()
    arrays = source.load().test
    assert loaded.model.bound is not None
    score = scorer(loaded.model.bound, source.prepare)
    values = score_examples(score, loaded.params, loaded.state, arrays, jax.random.key(3), 77)
    expected = estimate(values)
    assert (report["mean"], report["standard_error"], report["n"]) == expected
    assert report["value"] == report["mean"]
    assert report["bits_per_dim"] == pytest.approx(-expected.mean / (64 * math.log(2)), rel=1e-12)
    assert seen[-1] == (360, 360)
    fixed = (
        "recipe",
        "data",
        "unit",
        "kind",
        "estimator",
        "split",
        "seed",
        "step",
        "training_seed",
        "config_hash",
    )
    assert [report[name] for name in fixed] == [
        "cvae",
        "digits",
        "nats per example",
        "lower bound on the log-probability",
        "ELBO, 1 sample",
        "test",
        3,
        40,
        0,
        config_hash(json.loads((folder / "config.json").read_text())),
    ]
    assert report["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "numpy", "genjax-zoo"} <= set(report["versions"])
    assert report["hardware"]["backend"] == "cpu"
    assert json.loads(json.dumps(report)) == report


def test_part_of_a_split_and_other_splits(loaded: Loaded) -> None:
    report = evaluate(loaded, "valid", n=5)
    assert (report["n"], report["split"]) == (5, "valid")
    with pytest.raises(ConfigError, match="There is no split 'dev'; there are: train, valid, test"):
        evaluate(loaded, "dev")
    with pytest.raises(
        ConfigError, match="--n must be at least 2, so that there is a standard error; got 0"
    ):
        evaluate(loaded, n=0)


def test_an_exact_model_says_so(loaded: Loaded) -> None:
    exact = loaded.model._replace(log_prob=loaded.model.bound, bound=None, estimator="exact")
    assert evaluate(loaded._replace(model=exact), n=3)["kind"] == "exact log-probability"


@pytest.mark.slow
def test_another_run_in_the_folder_is_refused_with_a_readable_difference(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        train(tiny("cvae", learning_rate=0.5, steps=50), folder)
    assert str(caught.value) == (
        f"{folder} holds a run with other settings; nothing was changed:\n"
        "  optimizer.learning_rate: there 0.001, now 0.5\n"
        "  schedule.steps: there 40, now 50\n"
        "Give the same settings to go on with it, or another folder with --out."
    )
    with pytest.raises(ConfigError, match=r"\n  recipe: there 'cvae', now 'vae-vamp'\n"):
        train(tiny("vae-vamp"), folder)
    assert contents(folder) == before
