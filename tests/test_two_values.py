"""Binary data of two other values than 0 and 1: a run knows which of them is 1."""

import dataclasses

import numpy as np
import pytest

import genjax
import genjax.cli
from genjax.data import from_arrays
from genjax.errors import ConfigError, DataError
from genjax.runs.folder import check_spec
from genjax.runs.other_data import other_source

BITS = np.random.default_rng(0).integers(0, 2, (60, 4))
ONES = np.ones((9, 4), np.uint8)


def saved(path, x):
    np.savez(path, x=x)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the values 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    small = {"steps": 1, "batch_size": 4, "hidden": (4,), "latent_dim": 1, "sample_every": 0}
    path = saved(folder / "mine.npz", BITS + 1)
    genjax.train("vae", path, out=folder / "run", say=str, **small)
    return genjax.load(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("value", [1, 2])
def test_other_data_need_not_have_both(run, tmp_path, value):
    assert run.spec.values == (1, 2)
    path = saved(tmp_path / "other.npz", ONES * value)
    for source in (run._other(ONES * value), other_source(run._loaded, path)):
        assert set(np.unique(source.load().train.x)) == {value - 1}
    assert np.isfinite(run.bound(ONES * value).mean)


@pytest.mark.slow
def test_other_values_are_refused(run, tmp_path):
    message = "binary values must be 1 and 2 here; found 3"
    with pytest.raises(DataError, match=message):
        run.evaluate(data=saved(tmp_path / "other.npz", ONES + BITS[:9] + 1))
    with pytest.raises(DataError, match=message):
        run.bound(ONES * 3)
    with pytest.raises(DataError, match="has the values 0 and 1 as 0 and 1, the data of the run 1"):
        run.evaluate(data=from_arrays(BITS))


@pytest.mark.slow
def test_few_examples_are_told_what_evaluation_needs(run, tmp_path):
    for data in (ONES[:2], saved(tmp_path / "other.npz", ONES[:1])):
        with pytest.raises(DataError, match="too few examples to evaluate on: 3 at least"):
            run.evaluate(data=data)
    assert run.evaluate(data=ONES[:3])["n"] == 3
    assert len(run.bound(ONES[:1]).nats) == 1


@pytest.mark.slow
def test_samples_have_the_values_of_the_data(run, tmp_path):
    mean, _ = run.encode(run.sample(9))
    assert 1 < run.decode(mean).min() < run.decode(mean).max() < 2
    genjax.cli.main(["sample", str(run.folder), "--n", "9", "--out", str(tmp_path / "a")])
    assert set(np.unique(np.load(tmp_path / "a.npz")["x"])) == {1, 2}


@pytest.mark.slow
def test_a_run_from_before_they_were_kept_goes_on(run):
    check_spec(run.spec, dataclasses.replace(run.spec, values=None), run.folder)
    with pytest.raises(DataError, match=r"values was \(1, 3\), is \(1, 2\)"):
        check_spec(run.spec, dataclasses.replace(run.spec, values=(1, 3)), run.folder)


def test_two_values_may_be_said():
    assert from_arrays(ONES * 7, values="0,7").load().train.x.min() == 1
    for value, advice in ((7, "0,7"), (-3, "-3,0")):
        with pytest.raises(DataError, match=rf"found {value} only\. .*--values={advice}"):
            from_arrays(ONES.astype(int) * value, kind="binary")
    halves = from_arrays(BITS / 2 - 1, values="-1,-.5")
    assert halves.spec.values == (-1, -0.5)
    for wrong in ("1,1", "2,1", "1", "a,b", "1,nan", "0,1,2", ""):
        with pytest.raises(ConfigError, match="two different numbers with a comma between them"):
            from_arrays(ONES, values=wrong)
    with pytest.raises(ConfigError, match="are for binary data, and kind='discrete'"):
        from_arrays(ONES, values="0,1", kind="discrete")
    with pytest.raises(ValueError, match="values are two different numbers of binary data"):
        genjax.DataSpec((4,), "continuous", values=(0, 1))
