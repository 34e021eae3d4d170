"""Sweeps: members of one program, compared on the validation split."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from short_runs import tiny

from genjax.errors import ConfigError
from genjax.evaluation.estimates import score_examples, scorer
from genjax.learning.optim import MOST_RATE
from genjax.runs import pictures
from genjax.runs.load import load
from genjax.runs.sweeps import check_axes, run_sweep
from genjax.runs.train import VALID_SEED
from genjax.zoo import ZOO


@pytest.mark.slow
def test_a_sweep_compares_its_members_on_the_validation_split(tmp_path: Path) -> None:
    """A step size of nearly 0 learns nothing, a reasonable one something, and a huge one nothing
    finite.
    """
    recipe = tiny(
        "vae-ring", n_samples=1, sample_every=0, algorithm="sgd", schedule="constant", ema_decay=0.0
    )
    axes = {"learning_rate": [1e-30, 3e-3, MOST_RATE]}
    results = run_sweep(recipe, axes, 2, tmp_path / "sweep", say=lambda text: None)
    assert json.loads((tmp_path / "sweep" / "results.json").read_text()) == results
    assert (results["metric"], results["split"], results["seeds"], results["steps"]) == (
        "valid/bound",
        "valid",
        [0, 1],
        40,
    )
    none, some, huge = results["results"]
    assert [line["settings"]["learning_rate"] for line in results["results"]] == axes[
        "learning_rate"
    ]
    assert some["mean"] == pytest.approx(np.mean(some["members"]), rel=1e-12)
    assert some["sd"] == pytest.approx(np.std(some["members"], ddof=1), rel=1e-12)
    assert none["not_finite"] == some["not_finite"] == 0
    assert some["mean"] > none["mean"] + 0.1
    assert (huge["not_finite"], huge["mean"], huge["sd"]) == (2, None, None)

    # Members are ordered by settings, then seeds, and an untrained member is the model as its seed
    # initialises it.
    source = recipe.source()
    model = recipe.build(source.spec)
    assert model.bound is not None
    score, valid = scorer(model.bound, source.prepare), source.load().valid
    for seed, found in enumerate(none["members"]):
        start = recipe.training(source.spec).init(jax.random.key(seed))
        solo = score_examples(
            score, start.params, start.state, valid, jax.random.key(VALID_SEED)
        ).mean()
        assert found == pytest.approx(solo, rel=1e-5)

    lines = pictures.read_metrics(tmp_path / "sweep" / "metrics.jsonl")
    assert np.shape(lines[-1]["vae/loss"]) == (6,)
    with pytest.raises(ConfigError, match="is a sweep of several members"):
        load(tmp_path / "sweep")
    with pytest.raises(ConfigError, match=r"sweep\.seeds: there 2, now 3"):
        run_sweep(recipe, axes, 3, tmp_path / "sweep")
    said: list[str] = []
    again = run_sweep(recipe, axes, 2, tmp_path / "sweep", say=said.append)
    assert said[0].startswith("all 40 steps")
    assert again["results"] == results["results"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"latent_dim": [2.0, 4.0]},
            r"--latent-dim cannot be swept in one program: only real-valued .*learning_rate",
        ),
        ({"lerning_rate": [1.0]}, "--lerning-rate cannot be swept"),
        ({"learning_rate": []}, "--learning-rate has no values"),
    ],
)
def test_axes_that_cannot_be_swept(axes: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_axes(ZOO["vae"], axes)
