"""Figures about samples of a run: that real data get what real data must get, that the judge is
good, and what is kept.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genjax
from genjax.data import open_source, rows
from genjax.data.rows import Rows
from genjax.errors import ConfigError
from genjax.evaluation import judge, quality
from genjax.protocol import Batch, DataSpec
from genjax.runs import sweeps
from genjax.runs.evaluate import evaluate
from genjax.runs.load import load
from genjax.runs.sweeps import run_sweep
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

SHORT = {
    "steps": 40,
    "steps_per_call": 10,
    "log_every": 20,
    "sample_every": 40,
    "checkpoint_every": 20,
    "batch_size": 16,
}
STEPS = 150  # of the judge: enough for a good one of digits, if not the best


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def quick_judge(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENJAX_CACHE", str(cache))
    monkeypatch.setattr(quality, "judge_of", partial(judge.judge_of, steps=STEPS))


def by_name(figures: list[quality.Figure]) -> dict[str, quality.Figure]:
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def test_points_of_the_truth_score_as_the_truth() -> None:
    source = open_source("ring")
    test = source.load().test.x
    fresh = np.random.default_rng(0)

    def truth(key: jax.Array, cond: np.ndarray | None, n: int) -> np.ndarray:
        assert cond is None
        return (
            source.modes[fresh.integers(8, size=n)] + 0.02 * fresh.standard_normal((n, 2))
        ).astype(np.float32)

    found = by_name(quality.figures_of(ZOO["gan-ring"], truth))
    assert set(found) == {"high-quality share", "modes covered", "FD[raw]", "sliced Wasserstein"}
    share = found["high-quality share"]
    assert (share.n, share.n_reference) == (len(test), len(test))
    expected = 1 - math.exp(-4.5)
    assert abs(share.value - expected) < 4 * math.sqrt(expected * (1 - expected) / share.n)
    assert found["modes covered"].value == found["modes covered"].real == 8
    for name in ("FD[raw]", "sliced Wasserstein"):
        assert found[name].value < 3 * found[name].real + 1e-3

    # One mode only: seven are missing, and what is there is good.
    one = by_name(
        quality.figures_of(
            ZOO["gan-ring"], lambda key, cond, n: np.tile(np.float32([[1, 0]]), (n, 1)), n=500
        )
    )
    assert (one["modes covered"].value, one["high-quality share"].value, one["FD[raw]"].n) == (
        1,
        1,
        500,
    )
    assert one["FD[raw]"].value > 0.5


@pytest.mark.slow
def test_real_digits_score_as_real_digits_and_shuffled_labels_do_not() -> None:
    train = open_source("digits", conditional=True).load().train

    def like(shift: int) -> quality.Sampler:
        def draw(key: jax.Array, cond: np.ndarray | None, n: int) -> np.ndarray:
            assert cond is not None
            own = [np.flatnonzero(train.cond == (label + shift) % 10) for label in cond]
            rows = [rows[index % len(rows)] for index, rows in enumerate(own)]
            return train.x[rows].astype(np.float32)

        return draw

    good = by_name(quality.figures_of(ZOO["cgan"], like(0)))
    assert next(iter(good)) == "class agreement"
    assert good["class agreement"].value > 0.9
    assert by_name(quality.figures_of(ZOO["cgan"], like(1)))["class agreement"].value < 0.1
    assert {
        "FD[cnn-v1]",
        "MMD²[cnn-v1]",
        "precision",
        "recall",
        "density",
        "coverage",
        "FD[raw]",
    } <= set(good)
    assert good["recall"].value > 0.8

    def noise(key: jax.Array, cond: np.ndarray | None, n: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 17, (n, 8, 8, 1)).astype(np.float32)

    bad = by_name(quality.figures_of(ZOO["cgan"], noise))
    assert bad["FD[cnn-v1]"].value > 3 * good["FD[cnn-v1]"].value
    assert bad["precision"].value < 0.2


@pytest.mark.slow
def test_the_judge_is_good_and_is_trained_once(cache: Path) -> None:
    said: list[str] = []
    source = open_source("digits", conditional=True)
    first = judge.judge_of(source, STEPS, said.append)
    assert first.accuracy.n == 360
    assert first.accuracy.mean > 0.93
    again = judge.judge_of(source, STEPS, said.append)
    assert len(said) <= 1  # another test may have trained it before
    x = source.load().test.x[:20].astype(np.float32)
    np.testing.assert_array_equal(first.features(x), again.features(x))
    assert first.features(x).shape == (20, judge.FEATURES)
    # Other data have another judge, and a damaged file is made again.
    (path,) = cache.glob("*.npz")
    path.write_bytes(path.read_bytes()[:1000])
    judge.judge_of(source, STEPS, said.append)
    assert said
    assert str(path) in said[-1]
    np.testing.assert_array_equal(judge.judge_of(source, STEPS).features(x), first.features(x))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("GENJAX_CACHE", str(blocked))
    assert judge.judge_of(open_source("digits", conditional=True), 1).accuracy.n == 360


def test_labels_are_found_where_the_recipe_does_not_use_them() -> None:
    for name, classes in (("gan", 10), ("cgan", 10), ("gan-grid", 25)):
        found = quality.labelled(ZOO[name])
        assert found is not None
        assert found.spec.n_classes == classes


@pytest.mark.slow
def test_a_run_without_a_likelihood_is_evaluated_by_its_samples(tmp_path: Path) -> None:
    recipe = replace(ZOO["gan-ring"], hidden=(8,), **SHORT)
    train(recipe, tmp_path / "gan")
    loaded = load(tmp_path / "gan")
    report = evaluate(loaded, "valid", n=300)
    assert json.loads(json.dumps(report)) == report
    assert report["kind"] == report["figures"][0]["name"] == "high-quality share"
    assert (report["n"], report["split"], report["unit"]) == (300, "valid", "of samples")
    assert report["value"] == report["mean"] == report["figures"][0]["value"]
    assert evaluate(loaded, "valid", n=300)["figures"] == report["figures"]
    # The samples are those of the averaged generator.
    x = np.asarray(loaded.model.sample(loaded.params, loaded.state, jax.random.key(0), 7))
    averaged = jax.tree.leaves(loaded.params["generator"])
    assert x.shape == (7, 2)
    assert all(np.isfinite(leaf).all() for leaf in averaged)


@pytest.mark.slow
def test_a_likelihood_stays_the_headline_beside_figures_about_samples(tmp_path: Path) -> None:
    recipe = replace(ZOO["vae-ring"], hidden=(8,), evaluate_every=0, **SHORT)
    train(recipe, tmp_path / "vae")
    report = evaluate(load(tmp_path / "vae"), "valid", n=50, about_samples=True)
    assert report["kind"] == "lower bound on the log-probability"
    assert [figure["name"] for figure in report["figures"]][:2] == [
        "high-quality share",
        "modes covered",
    ]
    assert "figures" not in evaluate(load(tmp_path / "vae"), "valid", n=50)


@pytest.mark.slow
def test_members_of_a_sweep_without_a_likelihood_are_compared_by_their_samples(
    tmp_path: Path,
) -> None:
    recipe = replace(ZOO["gan-ring"], hidden=(8,), **SHORT)
    results = run_sweep(recipe, {"r1": [0.1, 1.0]}, 2, tmp_path / "sweep")
    assert (results["metric"], results["unit"]) == ("valid/high-quality share", "of samples")
    for line in results["results"]:
        assert len(line["figures"]) == 2
        assert line["members"] == [member["high-quality share"] for member in line["figures"]]
    assert (
        json.loads((tmp_path / "sweep" / "results.json").read_text())["results"]
        == results["results"]
    )


@pytest.mark.slow
def test_a_member_that_diverged_leaves_the_others_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweeps._train_members

    def diverged(*args):
        state = whole(*args)
        return state._replace(params=jax.tree.map(lambda p: p.at[1].set(jnp.nan), state.params))

    monkeypatch.setattr(sweeps, "_train_members", diverged)
    monkeypatch.setattr(sweeps, "eval_params", lambda state: state.params)
    recipe = replace(ZOO["gan-ring"], hidden=(8,), **SHORT)
    results = run_sweep(recipe, {"r1": [0.1, 0.2]}, 1, tmp_path / "sweep")
    good, bad = results["results"]
    assert (good["not_finite"], bad["not_finite"]) == (0, 1)
    assert good["mean"] == good["figures"][0]["high-quality share"]
    assert (bad["mean"], bad["members"], bad["figures"]) == (None, [None], [{}])
    assert results["estimator"] == "within 3 sd of a mode"


def test_real_data_in_the_place_of_samples_are_other_examples() -> None:
    def nothing(key: jax.Array, cond: np.ndarray | None, n: int) -> np.ndarray:
        return np.zeros((n, 2), np.float32)

    def real(**how: Any) -> float | None:
        return by_name(quality.figures_of(ZOO["gan-ring"], nothing, **how))["FD[raw]"].real

    of_train = real(split="train", n=100)
    assert of_train is not None
    assert of_train > 1e-4  # the same examples would be at 0
    assert real(split="train") is None  # there are no others
    assert real(split="all") is None
    # Rows of one's own may lie in the order of classes.
    train = Batch(np.arange(100.0)[:, None])
    found = quality._others(train, 10, already=0)
    assert found is not None
    np.testing.assert_array_equal(found.x[:, 0], np.arange(0, 100, 10))
    later = quality._others(train, 10, already=10)
    assert later is not None
    np.testing.assert_array_equal(later.x[:, 0], np.arange(10, 100, 9))


@pytest.mark.slow
def test_few_images_and_images_in_memory_are_judged_as_far_as_can_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GENJAX_CACHE", str(tmp_path))
    digits = open_source("digits", conditional=True).load().train
    labelled = genjax.from_arrays(digits.x[:120], y=digits.cond[:120])
    small = {"steps": 2, "batch_size": 8, "hidden": (4,), "latent_dim": 2, "sample_every": 0}
    run = genjax.train("gan", labelled, say=str, **small)
    report = run.evaluate()  # the data are the run's, the judge learns from their labels
    assert report["kind"] == "class agreement"
    assert "need 20 examples; 12 are too few." in capsys.readouterr().out
    assert [one["name"] for one in report["figures"]][1:] == ["FD[raw]", "sliced Wasserstein"]
    names = {one["name"] for one in run.evaluate("all")["figures"]}
    assert {"FD[cnn-v1]", "MMD²[cnn-v1]", "recall", "FD[raw]"} <= names
    plain = genjax.train("gan", digits.x[:120], say=str, **small)
    assert plain.evaluate(data=digits.x[:20])["kind"] == "FD[raw]"  # no labels, no judge


@pytest.mark.slow
def test_a_judge_of_another_scale_is_another_judge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GENJAX_CACHE", str(tmp_path))
    digits = open_source("digits", conditional=True).load().train
    x = digits.x[:200].astype(np.float32) * 10 + 500
    for standardize in ("event", "none"):
        source = genjax.from_arrays(
            x, y=digits.cond[:200], kind="continuous", standardize=standardize
        )
        judge.judge_of(source, 10)
    assert len(list(tmp_path.glob("*.npz"))) == 2


@pytest.mark.slow
def test_a_judge_learns_of_images_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GENJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "LIMIT", 0)
    digits = open_source("digits", conditional=True).load().train
    np.save(tmp_path / "x.npy", digits.x[:200])
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = genjax.from_arrays(x, y=digits.cond[:200])
    assert isinstance(source.load().train.x, Rows)
    assert judge.judge_of(source, 1).features(digits.x[:3]).shape == (3, 128)


@pytest.mark.slow
def test_members_that_make_sequences_are_compared_by_their_values(tmp_path: Path) -> None:
    """Sequences of one length are figures of their values side by side."""
    np.save(tmp_path / "wave.npy", np.sin(np.arange(400.0) / 5)[:, None])
    recipe = replace(ZOO["gan"].on(str(tmp_path / "wave.npy")), hidden=(8,), context=8, **SHORT)
    results = run_sweep(recipe, {}, 2, tmp_path / "sweep", say=str)
    assert results["metric"] == "valid/FD[standardised]"
    assert (tmp_path / "sweep" / "results.json").is_file()
    said: list[str] = []

    def zeros(key: jax.Array, cond: np.ndarray | None, n: int) -> np.ndarray:
        return np.zeros((n, 8, 1), np.float32)

    one = quality.figures_of(recipe, zeros, "valid", n=1, say=said.append)
    assert [figure.name for figure in one] == ["sliced Wasserstein"]
    assert said == ["The Fréchet distance needs 2 examples; 1 is too few."]


def test_what_no_figure_fits_is_refused() -> None:
    x, weighted = np.zeros((2, 3)), Batch(np.zeros((2, 3)), weight=np.asarray([1.0, 2.0]))
    tokens = DataSpec((3,), "tokens", levels=4, step="token")
    several = DataSpec((3, 1), "continuous", step="hour", lengths=True)
    for spec, batch, said in (
        (tokens, Batch(x), "are tokens. Use the log-probability"),
        (several, Batch(x), "are sequences of several lengths"),
        (DataSpec((3,), "continuous"), weighted, "have weights that differ"),
    ):
        with pytest.raises(ConfigError, match=said):
            quality.check_figures(spec, batch)
