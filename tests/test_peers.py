"""The PyTorch twins of the benchmarks are the same models, and where there is no PyTorch the report
says so.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from benchmarks import common, peers, report

TORCH = os.environ.get("GENJAX_TORCH_PYTHON", "")


@pytest.fixture(autouse=True)
def _as_benchmarks_run() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.CASES)
def test_a_case_is_plain_data_and_its_medium_size_is_wider(name: str) -> None:
    small, medium = (peers.case_of(peers.recipe_of(name, size)) for size in peers.SIZES)
    assert json.loads(json.dumps(small))["batch_size"] == medium["batch_size"]
    assert 2 * small["parameters"] < medium["parameters"]


@pytest.mark.slow
def test_without_pytorch_the_report_says_what_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENJAX_TORCH_PYTHON", raising=False)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "CASES", {"vae": {"hidden": (8,), "latent_dim": 2, "batch_size": 4}})
    peers.main(0.05, sizes=("medium",))
    found = json.loads((tmp_path / "peers.json").read_text())
    (row,) = found["rows"]
    assert row["torch"] == {"skipped": peers.NO_TORCH}
    assert row["best"].endswith(f"steps a dispatch, {row['allocator']}") or "one" in row["best"]
    assert {label.rpartition(", ")[2] for label in row["ms"]} >= {"default"}
    assert row["steps_per_second"] > 0
    assert row["flops"] > 0
    assert found["geometric_means"] == {}
    assert f"skipped: {peers.NO_TORCH}" in "\n".join(report.peers_parts(found))


def test_each_side_counts_with_the_allocator_that_it_is_fastest_with() -> None:
    recipe = peers.recipe_of("vae", "small")
    cost = {"flops": 1.0}
    forms = {"one step a dispatch": 1, "50 steps a dispatch": 50}
    about = {"per_call": forms, "compile_seconds": 1.0, "cost": cost}
    ours = {f"{form}, {one}": float for form in forms for one in ("default", "tcmalloc")}
    theirs = {f"PyTorch, eager, {one}": float for one in ("default", "tcmalloc")}
    took = dict(zip((*ours, *theirs), (4.0, 3.0, 1.0, 2.0, 5.0, 6.0), strict=True))
    rounds = {label: [seconds] * 3 for label, seconds in took.items()}
    mine, twin = peers._Side(ours, about, []), peers._Side(theirs, {}, [])
    row = peers._row(recipe, "small", 1.0, mine, twin, rounds)
    assert (row["best"], row["allocator"]) == ("50 steps a dispatch, default", "default")
    assert row["best_one_step"] == "one step a dispatch, tcmalloc"
    assert row["torch"] == {"best": "PyTorch, eager, default", "allocator": "default"}
    assert row["ratio"]["median"] == 1 / 5
    assert row["ratio_one_step"]["median"] == 3 / 5


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason=peers.NO_TORCH)
@pytest.mark.parametrize("name", peers.CASES)
def test_a_twin_has_the_same_parameters_loss_and_gradient(name: str) -> None:
    """A twin counts its parameters when it starts; the rest is at equal parameters, data and
    noise.
    """
    recipe = peers.recipe_of(name, "small")
    case = peers.case_of(recipe)
    twin = peers.Twin(TORCH, case)
    assert twin.about["parameters"] == case["parameters"]
    assert max(peers.differences(recipe, twin).values()) < 1e-5
    twin.close()
