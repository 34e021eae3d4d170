"""Sweeps: members of one program, compared on the validation split."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_runs import tiny

import genjax.cli
from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.evaluation.estimates import score_examples, scorer
from genjax.learning.members import sweep
from genjax.learning.optim import MOST_RATE, Optimizer
from genjax.learning.step import training
from genjax.runs import pictures
from genjax.runs.load import load
from genjax.runs.stages import opened
from genjax.runs.sweeps import check_axes, check_values, run_sweep
from genjax.runs.train import VALID_SEED
from genjax.zoo import ZOO


@pytest.mark.slow
def test_a_sweep_compares_its_members_on_the_validation_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    shutil.copytree(tmp_path / "sweep", tmp_path / "other")
    out = str(tmp_path / "curves.png")
    genjax.cli.main(["compare", str(tmp_path / "sweep"), str(tmp_path / "other"), "--out", out])
    told = capsys.readouterr().out
    assert "other is a sweep: the figures of its members are in its results.json" in told
    assert "never evaluated" not in told
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
        ({"sigma_rels": [0.05, 0.1]}, "--sigma-rels cannot be swept"),
    ],
)
def test_axes_that_cannot_be_swept(axes: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_axes(ZOO["vae"], axes)


def test_values_are_checked_beside_the_members_own() -> None:
    """A share of 1 or more of each weight in a step is refused, whichever axis it comes from."""
    recipe = ZOO["vae"]
    stage = opened(recipe, None)
    check_values(recipe, {"learning_rate": [1e-3, 2.0], "weight_decay": [0.0, 0.1]}, stage)
    with pytest.raises(ConfigError, match=r"below 1; got 0\.9 \* 1\.2"):
        check_values(recipe, {"learning_rate": [1e-3, 0.9], "weight_decay": [0.0, 1.2]}, stage)


def test_a_member_that_is_not_clipped_is_not() -> None:
    """0 does not clip, in a sweep as elsewhere."""
    model = ZOO["vae-ring"].build(ZOO["vae-ring"].source().spec, hidden=(4,))
    t = sweep(lambda c: training(model, Optimizer("sgd", clip_norm=c).build(10)), c=[0.0, 1e9])
    batch = example_batch(model.spec, jax.random.key(1), 8)
    ts, _ = t.step(t.init(jnp.stack([jax.random.key(0)] * 2)), batch)
    for leaf in jax.tree.leaves(ts.params):
        np.testing.assert_array_equal(leaf[0], leaf[1])
