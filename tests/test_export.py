"""Weights and programs for others: each is read back, and is what the run has."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open

import genjax
from genjax.errors import DataError
from genjax.runs.export import export, flat_weights, read_weights
from genjax.runs.load import load

SMALL = {"steps": 2, "batch_size": 8, "evaluate_every": 0, "sample_every": 0, "say": str}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    genjax.train("cvae", out=folder, hidden=(4,), latent_dim=2, **SMALL)
    written = export(load(folder), folder / "export")
    assert [path.name for path in written] == [
        "weights.safetensors",
        "sample.stablehlo",
        "score.stablehlo",
    ]
    return folder


def test_weights_are_the_runs_under_their_names(exported):
    run, path = load(exported), exported / "export" / "weights.safetensors"
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
        names = set(file.keys())
    assert any(name.startswith("vae/encoder/") for name in names)
    assert json.loads(about["spec"])["shape"] == [8, 8, 1]
    assert json.loads(about["config"])["model"]["latent_dim"] == 2
    again = read_weights(path, run.params)
    for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_that_do_not_fit_are_named(exported, tmp_path):
    run, path = load(exported), exported / "export" / "weights.safetensors"
    other = {"vae": {**run.params["vae"], "more": np.zeros(3)}}
    with pytest.raises(DataError, match="vae/more: missing"):
        read_weights(path, other)
    fewer = {"vae": {"decoder": run.params["vae"]["decoder"]}}
    with pytest.raises(DataError, match="not of this model"):
        read_weights(path, fewer)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a safetensors file"):
        read_weights(tmp_path / "junk.safetensors", run.params)
    with pytest.raises(DataError, match="there is no such file"):
        read_weights(tmp_path / "none.safetensors", run.params)


def test_complex_numbers_are_pairs(tmp_path):
    tree = {"a": np.array([1 + 2j, 3 - 4j], np.complex64), "b": np.ones(2, np.float32)}
    flat, pairs = flat_weights(tree)
    assert pairs == ["a"]
    np.testing.assert_array_equal(flat["a"], [[1, 2], [3, -4]])


READ = """
import sys, jax, numpy as np
folder = sys.argv[1]
sample = jax.export.deserialize(bytearray(open(folder + "/sample.stablehlo", "rb").read()))
score = jax.export.deserialize(bytearray(open(folder + "/score.stablehlo", "rb").read()))
for n in (3, 7):
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), n))
    cond = np.arange(n, dtype=np.int32) % 10
    x = sample.call(keys, cond)
    nats = score.call(x, keys, cond)
    assert x.shape == (n, 8, 8, 1) and nats.shape == (n,) and bool(np.isfinite(nats).all())
np.savez(folder + "/read.npz", x=x, nats=nats)
assert not any(name.startswith("genjax") for name in sys.modules)
"""


@pytest.mark.slow
def test_programs_are_read_with_jax_alone(exported):
    folder = exported / "export"
    subprocess.run([sys.executable, "-c", READ, str(folder)], check=True, cwd="/", timeout=300)
    run = load(exported)
    keys = jax.random.split(jax.random.key(0), 7)
    with np.load(folder / "read.npz") as file:
        for index in (0, 6):
            cond = np.asarray([index % 10], np.int32)
            x = run.model.sample(run.params, run.state, keys[index], 1, cond)[0]
            np.testing.assert_allclose(file["x"][index], x, atol=1)  # a level, by rounding
            batch = genjax.Batch(file["x"][index][None], cond)
            nats = run.model.bound(run.params, run.state, batch, keys[index])[0]
            np.testing.assert_allclose(file["nats"][index], nats, rtol=1e-4)
