"""Averages whose length is chosen after training: against closed forms, and in a run."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import refused
from short_runs import tiny

import genjax
import genjax.cli
from genjax.errors import CheckpointError, ConfigError, Interrupted
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.optim import Optimizer
from genjax.learning.powers import Kept, combination, gamma_of, powers_in, track_powers, weights_of
from genjax.runs.averages import snapshot_of
from genjax.runs.load import load
from genjax.runs.train import train

# γ = 2, for which the weights are fractions: (γ + 1) / ((γ + 2)² (γ + 3)) = 3 / 80.
SIGMA_OF_2 = (3 / 80) ** 0.5
SETTINGS = {
    "sigma_rels": (0.05, 0.1),
    "steps": 60,
    "steps_per_call": 5,
    "snapshot_every": 10,
    "checkpoint_every": 20,
    "sample_every": 0,
    "evaluate_every": 0,
}


def test_gammas_are_those_of_the_paper() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert gamma_of(SIGMA_OF_2) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_a_polynomial_is_averaged_exactly(power: int, x64: None) -> None:
    """θ_t = t^k, against Σ_t (t³ - (t - 1)³) t^k / T³ in whole numbers."""
    steps = 40
    tx = track_powers([SIGMA_OF_2])
    params = jnp.zeros(())  # which no average remembers
    state = tx.init(params)
    for t in range(1, steps + 1):
        updates, state = tx.update(jnp.asarray(float(t**power)) - params, state, params)
        params = params + updates
    exact = Fraction(sum((t**3 - (t - 1) ** 3) * t**power for t in range(1, steps + 1)), steps**3)
    assert float(state.averages[0]) == pytest.approx(float(exact), rel=1e-13)
    assert int(state.count) == steps


KEPT = [Kept(sigma, step) for step in (50, 100, 150, 200) for sigma in (0.05, 0.1)]


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.12, 0.2])
def test_any_length_averages_cubics_exactly(sigma_rel: float) -> None:
    """Whatever is made of what was stored, against the weights of the average itself."""
    shares, off = combination(Kept(sigma_rel, 200), KEPT)
    made, wanted = np.zeros(200), weights_of(Kept(sigma_rel, 200))
    for share, kept in zip(shares, KEPT, strict=True):
        made[: kept.step] += share * weights_of(kept)
    t = np.arange(1, 201) / 200
    for power in range(4):
        assert made @ t**power == pytest.approx(wanted @ t**power, rel=1e-10)
    found = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert found == pytest.approx(off, rel=0.1)  # which is that of p, without steps
    assert 0.001 < off < 0.3


@pytest.mark.parametrize("index", range(6, 8))
def test_what_is_stored_is_made_of_itself(index: int) -> None:
    shares, off = combination(KEPT[index], KEPT)
    np.testing.assert_allclose(shares, np.eye(8)[index], atol=1e-9)
    assert off < 1e-6


def test_an_average_needs_the_parameters() -> None:
    tx = track_powers([0.1])
    with pytest.raises(ConfigError, match="needs the parameters"):
        tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))


@pytest.mark.parametrize("sigma_rels", [(0.0,), (0.3,), (0.1, 0.1)])
def test_lengths_that_are_none_are_refused(sigma_rels: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="sigma_rels"):
        Optimizer(sigma_rels=sigma_rels)


# --- a run ----------------------------------------------------------------------------------------


def recipe_of(**changes: Any) -> Any:
    return tiny("vae", **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(recipe_of(), folder, say=str)


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_a_tracked_length_is_what_was_tracked(whole: tuple[Path, Any]) -> None:
    folder, state = whole
    assert Checkpoints(folder / "averages").steps() == [10, 20, 30, 40, 50, 60]
    tracked = powers_in(state.opt["vae"])
    assert tracked is not None
    for sigma_rel, average in zip((0.05, 0.1), tracked.averages, strict=True):
        run = load(folder, sigma_rel=sigma_rel)
        assert run.off < 1e-6
        for mine, its in zip(leaves(run.params["vae"]), leaves(average), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-7)
    plain = genjax.load(folder)
    other = genjax.load(folder, sigma_rel=0.07)
    pairs = zip(leaves(plain.params), leaves(other.params), strict=True)
    assert not all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.slow
@pytest.mark.bits
def test_a_run_in_two_parts_stores_the_same_averages(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, state = whole

    def stop(step: int, *rest: Any) -> None:
        if step >= 35:
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        train(recipe_of(), tmp_path / "run", stop, say=str)
    assert Checkpoints(tmp_path / "run" / "averages").steps() == [10, 20, 30]
    again = train(recipe_of(), tmp_path / "run", say=str)  # from step 20
    for mine, its in zip(leaves(again.opt), leaves(state.opt), strict=True):
        np.testing.assert_array_equal(mine, its)
    like = jax.eval_shape(lambda: snapshot_of(state))
    for step in (20, 30, 50):
        folders = (folder, tmp_path / "run")
        both = [Checkpoints(of / "averages").restore(like, step) for of in folders]
        one, other = (leaves(found.state.players) for found in both if found is not None)
        for mine, its in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, its)


@pytest.mark.slow
def test_the_program_takes_a_length(
    whole: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(whole[0])
    genjax.cli.main(["sample", folder, "--n", "4", "--sigma-rel", "0.07"])
    out = capsys.readouterr().out
    assert "the average of sigma_rel 0.07, to " in out
    assert "sample_n4_seed0_sigma0.07.npz" in out
    genjax.cli.main(["evaluate", folder, "--n", "8", "--n-samples", "2", "--sigma-rel", "0.07"])
    report = json.loads((whole[0] / "report-sigma0.07.json").read_text())
    assert report["sigma_rel"] == 0.07
    assert 0 < report["sigma_rel_off"] < 0.1
    text = refused(["sample", folder, "--sigma-rel", "0.012"], capsys)
    assert "cannot be made of what" in text
    assert "sigma_rel must be in [0.01, 0.25]; got 0.5" in refused(
        ["sample", folder, "--sigma-rel", "0.5"], capsys
    )


@pytest.mark.slow
def test_a_run_without_averages_says_how_to_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(recipe_of(sigma_rels=(), steps=5), folder, say=str)
    assert not (folder / "averages").exists()
    text = refused(["evaluate", str(folder), "--sigma-rel", "0.1"], capsys)
    assert "train with --sigma-rels 0.05 0.1" in text


@pytest.mark.slow
def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(recipe_of(steps=20), folder, say=str)
    for path in (folder / "averages" / "10" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=r"move .*averages/10 away to do without"):
        load(folder, sigma_rel=0.07)
