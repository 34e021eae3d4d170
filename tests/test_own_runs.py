"""Runs of models of one's own: kept in a folder, loaded with the model, told when it is missing."""

import jax
import numpy as np
import optax
import pytest
from flax import linen

import genjax
import genjax.cli
from genjax import ZOO, DataSpec
from genjax.errors import CheckpointError, ConfigError, DataError
from genjax.learning.optim import track_ema
from genjax.runs.lock import locked

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
POINTS = DataSpec((3,), "continuous")


class Net(linen.Module):
    width: int = 4

    @linen.compact
    def __call__(self, x, noise_level):
        h = jax.numpy.concatenate([x, noise_level[:, None]], axis=1)
        return linen.Dense(3)(jax.numpy.tanh(linen.Dense(self.width)(h)))


def model_of(width=4, spec=POINTS):
    return genjax.flow_matching(spec, net=Net(width), n_steps=2)


def trained(folder, optimizer=None):
    return genjax.train(
        model_of(), X, steps=4, steps_per_call=2, batch_size=8, out=folder, optimizer=optimizer
    )


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        optax.chain(optax.adam(0.1), track_ema(0.9)),
        optax.contrib.schedule_free_adamw(0.1),
        {"flow": optax.chain(optax.sgd(0.1), optax.chain(track_ema(0.5)))},
    ],
    ids=["adam", "average", "schedule-free", "nested"],
)
def test_a_run_of_an_own_network_is_loaded_with_the_model(tmp_path, optimizer):
    """With the weights that the run samples with, whatever optimiser made them."""
    model = model_of()
    if isinstance(optimizer, dict):
        optimizer = dict(zip(model.losses, optimizer.values(), strict=True))
    run = trained(tmp_path / "run", optimizer)
    found = genjax.load(tmp_path / "run", model=model)
    assert found.step == 4
    assert same(found.params, run.params)
    np.testing.assert_array_equal(found.sample(3, seed=2), run.sample(3, seed=2))
    if optimizer is not None:  # the average is not the weights
        newest = genjax.restore(tmp_path / "run", _like(model, optimizer))
        assert not same(newest.params, found.params)
    with pytest.raises(DataError, match="are not kept in its folder"):
        _ = found.source


def _like(model, optimizer):
    return jax.eval_shape(genjax.training(model, optimizer).init, jax.random.key(0))


@pytest.mark.slow
def test_what_cannot_be_loaded_is_told(tmp_path, capsys):
    folder = tmp_path / "run"
    trained(folder)
    with pytest.raises(ConfigError, match=r"genjax\.load\('.*run', model=\.\.\.\)"):
        genjax.load(folder)
    with pytest.raises(SystemExit):
        genjax.cli.main(["sample", str(folder)])
    assert "a folder cannot rebuild" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(
        CheckpointError, match=r"not of this model:(?s:.*)Dense_1/bias.*\[4\].*\[5\]"
    ):
        genjax.load(folder, model=model_of(5))
    other = DataSpec((3,), "continuous", scale=(2.0,), shift=(0.0,))
    for act in (
        lambda: genjax.load(folder, model=model_of(spec=other)),
        lambda: genjax.train(model_of(spec=other), X, steps=6, batch_size=8, out=folder),
    ):
        with pytest.raises(CheckpointError, match=r"data than this model is of:\n(?s:.*)scale"):
            act()
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        genjax.load(tmp_path / "none", model=model_of())
    with pytest.raises(ConfigError, match="no best one"):
        genjax.load(folder, "best", model=model_of())
    with pytest.raises(ConfigError, match="called 'worst'"):
        genjax.load(folder, "worst", model=model_of())


@pytest.mark.slow
def test_a_recipes_run_is_loaded_with_a_model_as_well(tmp_path):
    small = {"steps": 4, "batch_size": 8, "hidden": (4,), "latent_dim": 2, "evaluate_every": 2}
    run = genjax.train("vae", X, out=tmp_path / "run", say=str, sample_every=0, **small)
    for which in ("newest", "best"):
        wanted = genjax.load(tmp_path / "run", which)
        found = genjax.load(tmp_path / "run", which, model=run.model)
        assert found.step == wanted.step
        assert same(found.params, wanted.params)


def test_a_network_in_a_recipe_is_refused_with_what_to_do():
    recipe = ZOO["diffusion-2d"]
    with pytest.raises(
        ConfigError, match=r"net: a Net .*genjax\.diffusion\(source\.spec, \.\.\.\)"
    ):
        genjax.train(recipe, X, steps=4, net=Net())


@pytest.mark.slow
def test_ids_are_modelled_scored_and_go_on_from_ids():
    ids = np.random.default_rng(0).integers(0, 5, (60, 6))
    source = genjax.from_arrays(ids, kind="tokens")
    model = genjax.rnn(source.spec, d_embed=2, d_hidden=2)
    run = genjax.train(model, ids, steps=2, steps_per_call=2, batch_size=8)  # as the model's kind
    assert run.log_prob(ids[:4]).nats.shape == (4,)
    x = run.generate(3, prompt=[4, 0, 2])
    np.testing.assert_array_equal(x[:, :3], [[4, 0, 2]] * 3)
    np.testing.assert_array_equal(run.generate(3, prompt="4,0,2"), x)
    for bad in ([[1]], [1.5], 3):
        with pytest.raises(ConfigError, match=r"must be token ids \[m\]"):
            run.generate(3, prompt=bad)
    text = genjax.from_arrays(ids, kind="tokens", vocabulary="abcde")
    run = genjax.train(
        genjax.rnn(text.spec, d_embed=2, d_hidden=2), text, steps=2, steps_per_call=2, batch_size=8
    )
    assert all(one.startswith("ea") for one in run.texts(run.generate(3, prompt="ea")))
    with pytest.raises(ConfigError, match="must be a text"):
        run.generate(3, prompt=[1, 2])


@pytest.mark.slow
def test_sequences_of_vectors_are_taken_as_the_models():
    spec = DataSpec((5, 3), "continuous", step="frame")
    model = genjax.rnn(spec, d_embed=2, d_hidden=2)
    x = np.random.default_rng(0).normal(size=(60, 5, 3))
    run = genjax.train(model, x, steps=2, steps_per_call=2, batch_size=8)
    assert run.sample(2).shape == (2, 5, 3)


@pytest.mark.slow
def test_other_settings_and_fewer_steps_are_refused(tmp_path):
    trained(tmp_path)
    common = {"steps": 6, "steps_per_call": 2, "out": tmp_path}
    with pytest.raises(CheckpointError, match=r"other settings:\n  batch_size: there 8, now 16"):
        genjax.train(model_of(), X, batch_size=16, **common)
    with pytest.raises(CheckpointError, match=r"seed: there 0, now 1"):
        genjax.train(model_of(), X, batch_size=8, seed=1, **common)
    with pytest.raises(ConfigError, match="which is at step 4"):
        genjax.train(model_of(), X, batch_size=8, **common | {"steps": 2})
    with pytest.raises(ConfigError, match="mesh is for recipes"):
        genjax.train(model_of(), X, mesh="data=1")
    with pytest.raises(ConfigError, match="called 'batchsize'"):
        genjax.train(model_of(), X, batchsize=8)
    assert genjax.train(model_of(), X, batch_size=8, **common).step == 6


@pytest.mark.slow
def test_a_model_with_an_entry_that_follows_is_loaded_unchecked_or_not(tmp_path):
    def init(key):
        return {"a": {"w": jax.numpy.zeros(3)}}, {}

    def loss(params, state, batch, key, step):
        value = jax.numpy.square(params["a"]["w"][None] - batch.x).sum(-1)
        return value, genjax.Aux(state, {})

    def sample(params, state, key, n, cond=None):
        return jax.numpy.tile(params["a"]["w"], (n, 1))

    model = genjax.Model(POINTS, init, {"a": loss}, sample, follows={"average": ("a", 0.9)})
    run = genjax.train(model, X, steps=2, steps_per_call=2, batch_size=8, out=tmp_path)
    found = genjax.load(tmp_path, model=model)
    assert same(found.params, run.params)
    assert "average" in found.params


@pytest.mark.slow
def test_data_are_brought_to_the_model_or_refused():
    model = genjax.vae(genjax.DataSpec((3,), "continuous", n_classes=4), latent_dim=1, hidden=(4,))
    x, seen = np.random.default_rng(0).normal(size=(120, 3)), []

    def loss(params, state, batch, key, step):
        jax.debug.callback(lambda cond: seen.extend(cond.tolist()), batch.cond)
        return model.losses["vae"](params, state, batch, key, step)

    small = {"steps": 2, "batch_size": 8}
    genjax.train(
        model._replace(losses={"vae": loss}), {"x": x, "y": np.tile([0, 2, 3], 40)}, **small
    )
    jax.effects_barrier()
    assert set(seen) == {0, 2, 3}  # 2 was 1 before, and 3 was 2
    bits = genjax.vae(genjax.DataSpec((8, 8, 1), "binary"), latent_dim=1, hidden=(4,))
    with pytest.raises(DataError, match="is of another kind than the data of the run: kind is"):
        genjax.train(bits, "digits", **small)


@pytest.mark.slow
def test_columns_are_taken_by_their_names(tmp_path):
    path = tmp_path / "t.csv"
    rows = np.random.default_rng(0).normal(size=(60, 2)) * [1.0, 50.0]
    path.write_text("a,b\n" + "\n".join(f"{a},{b}" for a, b in rows) + "\n")
    small = {"steps": 2, "batch_size": 8, "hidden": (4,), "latent_dim": 1, "say": str}
    run = genjax.train("vae", str(path), sample_every=0, **small)

    class Table(dict):  # as far as pandas' is one here
        columns = property(lambda self: list(self))

        def __getitem__(self, names):
            return np.stack([dict.__getitem__(self, name) for name in names], axis=1)

    table = Table(b=rows[:, 1], a=rows[:, 0])
    np.testing.assert_array_equal(run.bound(table).nats, run.bound(rows).nats)
    with pytest.raises(DataError, match="has no column b, which the run was trained on; it has a"):
        run.bound(Table(a=rows[:, 0]))


@pytest.mark.slow
def test_a_folder_is_of_one_model_and_of_one_set_of_data(tmp_path):
    small = {"steps": 2, "batch_size": 8}
    run = genjax.train(
        "vae", X, out=tmp_path / "a", say=str, hidden=(4,), latent_dim=1, sample_every=0, **small
    )
    with pytest.raises(ConfigError, match="is the run of a recipe: give a model of one's own"):
        genjax.train(run.model, X, out=tmp_path / "a", **small)
    said, model = [], genjax.vae(DataSpec((2,), "continuous"), hidden=(4,), latent_dim=1)
    genjax.train(model, "ring", out=tmp_path / "b", say=said.append, **small)
    assert not said
    genjax.train(model, "ring", out=tmp_path / "b", say=said.append, **small)
    assert "all 2 steps were done before" in said[-1]
    genjax.train(model, "ring", out=tmp_path / "b", say=said.append, **small | {"steps": 4})
    assert "whether losses and optimizer are those of before cannot be seen" in said[-1]
    with pytest.raises(CheckpointError, match="was trained on ring, and these data are moons"):
        genjax.train(model, "moons", out=tmp_path / "b", **small | {"steps": 6})


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    with (
        locked(tmp_path / "run", pytest.fail),
        pytest.raises(CheckpointError, match=r"is in use: this very process.*another folder"),
    ):
        trained(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
