"""Flows of other libraries are trained on the same points in the same order, and reported."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common, flow_peers, report_exact
from benchmarks.peer_flows import Points, decay, rate
from genjax.learning.optim import Optimizer
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

PYTHONS = {name: os.environ.get(at, "") for name, at in flow_peers.VARIABLES.items()}
TINY = {"n_layers": 1, "hidden": (4,), "bins": 3, "batch_size": 8, "n_train": 600}
# A peer that is a Gaussian, in place of a library.
STAND_IN = """
import numpy as np
from peer_flows import serve

def make(case):
    log_prob = lambda x: -0.5 * (x**2).sum(1) - np.log(2 * np.pi)
    return {"version": "a Gaussian", "parameters": 0}, lambda batch, step: None, log_prob

serve(make)
"""


def small(**changes):
    return replace(ZOO["nsf-ring"], **{**TINY, "steps": 4, "steps_per_call": 2, **changes})


def test_whoever_asks_with_the_same_case_gets_the_same_batches(tmp_path: Path) -> None:
    case = flow_peers.case_of(small(), 3, tmp_path)
    assert json.loads(json.dumps(case)) == case
    one, other = Points(case), Points(case)
    both = np.concatenate([one.batches(2), one.batches(1)])
    np.testing.assert_array_equal(both, np.concatenate([other.batches(1), other.batches(2)]))
    assert (both != Points({**case, "seed": 4}).batches(3)).any()
    x = one.standard(one.train)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-5)


def test_the_schedule_of_a_peer_is_the_optimisers() -> None:
    recipe = small(steps=10)
    case = {"learning_rate": 3e-3, "ema_decay": 0.999, "steps": 10}
    assert isinstance(recipe.optimizer, Optimizer)
    assert recipe.optimizer.learning_rate == case["learning_rate"]
    wanted = [float(recipe.optimizer._rate(10, 1, np.asarray(step))) for step in range(10)]
    np.testing.assert_allclose([rate(case, step) for step in range(10)], wanted, rtol=1e-5)
    assert decay(case, 0) == 0.1
    assert decay(case, 10**6) == 0.999


@pytest.mark.slow
def test_a_peer_is_trained_in_turns_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gap of a known Gaussian is what it is, and genjax's is that of its own run."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    shutil.copy(Path(flow_peers.__file__).with_name("peer_flows.py"), tmp_path)
    (tmp_path / "peer_standin.py").write_text(STAND_IN)
    monkeypatch.setattr(flow_peers, "FOLDER", tmp_path)
    monkeypatch.setattr(flow_peers, "VARIABLES", {"standin": "GENJAX_STANDIN"})
    monkeypatch.setattr(flow_peers, "BLOCK", 2)
    monkeypatch.setenv("GENJAX_STANDIN", sys.executable)
    flow_peers.main(("nsf-ring",), (0,), **TINY, steps=6, steps_per_call=2)
    (row,) = common.read("flow_peers")["rows"]
    mine, theirs = row["libraries"]["genjax"], row["libraries"]["standin"]
    source = small().source()
    x, points = source.load().test.x, source.load().train.x
    z = (x - points.mean(0)) / points.std(0)
    nats = -0.5 * (z**2).sum(1) - np.log(2 * np.pi) - np.log(points.std(0)).sum()
    truth = np.asarray(source.log_prob(np.asarray(x, np.float64)))
    assert theirs["gap"]["mean"] == pytest.approx((truth - nats).mean(), abs=1e-4)
    difference, _ = theirs["genjax_more_by"][0]
    assert difference == pytest.approx(theirs["gap"]["mean"] - mine["gap"]["mean"], abs=1e-6)
    assert mine["steps_per_second"] > 0
    text = "\n".join(report_exact.parts())
    assert "| `nsf-ring` | standin (a Gaussian) | 0 |" in text


def test_without_a_peer_it_says_so_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for variable in flow_peers.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    flow_peers.main()
    assert not list(tmp_path.iterdir())
    assert "zuko is skipped: GENJAX_ZUKO_PYTHON is not set" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", PYTHONS)
def test_a_library_has_the_same_flow_and_learns(name: str, tmp_path: Path) -> None:
    """As many parameters as ours but for what is its own, and a likelihood that rises.

    zuko keeps L and U in one matrix of 4, where genjax has 10 numbers; flowjax has two of 4, each
    with a shift of 2, and the slopes at both ends of a spline, for 4 units and a bias.
    """
    if not PYTHONS[name]:
        pytest.skip(f"{flow_peers.VARIABLES[name]} is not set")
    recipe = small(steps=200, learning_rate=1e-2)
    case = flow_peers.case_of(recipe, 0, tmp_path)
    mine = flow_peers.ours(recipe, case)
    flow, process = flow_peers.peer(name, PYTHONS[name], case, tmp_path)
    more = {"zuko": 4 - 10, "flowjax": 12 - 10 + 2 * 5}[name]
    assert flow.about["parameters"] == mine.about["parameters"] + more
    before = flow.score().mean()
    assert flow.train(200) > 0
    assert flow.score().mean() > before + 0.1
    process.close()
