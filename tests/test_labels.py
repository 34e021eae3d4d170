"""What a parameter is, and what optimisers make of it: decay and step sizes by label."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_same
from toy import SPEC, jitted, nothing, run

from genjax import DataSpec, made, nade, prior_of, realnvp, vae
from genjax.checks import checked, leaves_by_name
from genjax.errors import ConfigError
from genjax.learning.labels import labels_of, layouts_of
from genjax.learning.optim import Optimizer, averaged
from genjax.learning.step import training
from genjax.protocol import Aux, Batch, Model

PARAMS = {
    "net": {
        "blocks": {0: {"a_log": jnp.ones((4, 2)), "kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "table": jnp.ones((5, 2)),
        "codes": jnp.ones((2, 2)),
    },
    "other": {"a_log": jnp.ones((2, 2)), "scale": jnp.ones(())},
}
LABELS = (("^net/.*a_log$", "dynamics"), ("table$", "embedding"), ("codes$", "codes"))


def own(name="net"):
    return jax.tree.map(jnp.copy, PARAMS[name])


# --- labels ---------------------------------------------------------------------------------------


def test_the_first_pattern_found_in_the_path_counts_and_dimensions_are_the_default():
    found = labels_of(PARAMS, (*LABELS, ("net/", "never")))
    assert found == {
        "net": {
            "blocks": {0: {"a_log": "dynamics", "kernel": "never", "bias": "never"}},
            "table": "embedding",
            "codes": "codes",
        },
        "other": {"a_log": "matrix", "scale": "vector"},
    }
    assert labels_of(PARAMS)["net"]["blocks"][0] == {
        "a_log": "matrix",
        "kernel": "matrix",
        "bias": "vector",
    }


def test_a_players_own_parameters_have_the_same_labels():
    for player, params in PARAMS.items():
        assert labels_of(params, LABELS, player) == labels_of(PARAMS, LABELS)[player]
    assert labels_of(jnp.ones(3), (("^bare$", "dynamics"),), "bare") == "dynamics"


def test_shapes_have_labels_as_arrays_do():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert labels_of(shapes, LABELS) == labels_of(PARAMS, LABELS)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"pattern '\(' is no regular expression"):
        labels_of(PARAMS, (("(", "matrix"),))


# --- decay and step sizes -------------------------------------------------------------------------


def moved(optimizer, labels=LABELS, grads=0.0, params=None):
    """How far one step moves each parameter, in units of the step size."""
    params = own() if params is None else params
    tx = optimizer.build(10, labels, "net")
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(
            jax.tree.map(lambda p: jnp.full_like(p, grads), params), tx.init(params), params
        )
    return jax.tree.map(lambda u: float(-jnp.ravel(u)[0]) / optimizer.learning_rate, updates)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
def test_decay_applies_to_the_labels_that_are_named(algorithm):
    optimizer = Optimizer(algorithm, 0.1, weight_decay=0.5, rates=("codes=1",))
    block = moved(optimizer)["blocks"][0]
    assert block == {"a_log": 0, "kernel": pytest.approx(0.5), "bias": 0}
    found = moved(optimizer)
    assert (found["table"], found["codes"]) == (pytest.approx(0.5), 0)
    others = dataclasses.replace(optimizer, decayed=("vector", "dynamics", "codes"), rates=())
    found = moved(others)
    assert found["blocks"][0] == {
        "a_log": pytest.approx(0.5),
        "kernel": 0,
        "bias": pytest.approx(0.5),
    }
    assert (found["table"], found["codes"]) == (0, pytest.approx(0.5))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adam", "adamw", "lion", "sgd"])
def test_rates_are_factors_of_the_step_size(algorithm):
    decay = 0.5 if algorithm in ("adamw", "lion") else 0.0
    plain = Optimizer(algorithm, 0.1, weight_decay=decay, rates=("codes=1",))
    one = moved(plain, grads=2.0)
    rates = ("dynamics=0.25", "embedding=0", "codes=3")
    found = moved(dataclasses.replace(plain, rates=rates), grads=2.0)
    assert found["blocks"][0]["a_log"] == pytest.approx(0.25 * one["blocks"][0]["a_log"], rel=1e-6)
    assert found["table"] == 0
    assert found["codes"] == pytest.approx(3 * one["codes"], rel=1e-6)
    assert found["blocks"][0]["kernel"] == one["blocks"][0]["kernel"] != 0
    assert found["blocks"][0]["bias"] == one["blocks"][0]["bias"] != 0


@pytest.mark.slow
def test_an_average_follows_the_scaled_steps():
    optimizer = Optimizer("sgd", 0.1, b1=0.0, ema_decay=0.9, rates=("dynamics=0", "codes=1"))
    tx, params = optimizer.build(10, LABELS, "net"), own()
    with jax.numpy_dtype_promotion("standard"):
        updates, opt = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    ema = averaged(opt, params)
    assert_same(ema["blocks"][0]["a_log"], params["blocks"][0]["a_log"])
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(ema["table"], 0.1 * params["table"] + 0.9 * after["table"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(),
        Optimizer("adamw", weight_decay=0.1, clip_norm=1.0, ema_decay=0.9, schedule="cosine"),
        Optimizer("lion", weight_decay=0.1),
        Optimizer("sgd", warmup_steps=3),
    ],
    ids=lambda optimizer: optimizer.algorithm,
)
def test_labels_that_say_what_the_default_says_change_no_bit(optimizer):
    params = own("other")
    labels = (("a_log$", "embedding"), ("scale$", "dynamics"))
    transforms = [optimizer.build(10), optimizer.build(10, labels, "other")]
    found = []
    for tx in transforms:
        opt, now = tx.init(params), params
        for _ in range(3):
            with jax.numpy_dtype_promotion("standard"):
                updates, opt = tx.update(jax.tree.map(lambda p: p * 0.3, now), opt, now)
            now = optax.apply_updates(now, updates)
        found.append((now, opt))
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    assert_same(*found)


# --- in a training --------------------------------------------------------------------------------


def model(labels):
    """½ Σ (w - x)² with two leaves that have one gradient."""

    def init(key):
        return {"net": {"w": jnp.ones((3,)), "log_rate": jnp.ones((3,))}}, {"net": {}}

    def loss(params, state, batch, key, step):
        value = sum(0.5 * (leaf[None] - batch.x) ** 2 for leaf in params["net"].values())
        return value.sum(-1), Aux(state, {})

    return checked(Model(SPEC, init, {"net": loss}, nothing, labels=labels))


def test_a_models_labels_reach_its_optimiser_by_the_players_name():
    labelled = model((("^net/log_rate$", "dynamics"),))
    optimizer = Optimizer("sgd", 0.1, b1=0.0, rates=("dynamics=0.5",))
    t = training(labelled, {"net": optimizer.build(10, labelled.labels, "net")})
    first = jitted(t.init)(jax.random.key(0))
    got, _ = run(t, first, [Batch(jnp.zeros((8, 3)))])
    np.testing.assert_allclose(got.params["net"]["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(got.params["net"]["log_rate"], 0.95, rtol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


def test_a_label_that_no_rule_covers_is_refused_with_its_parameter_and_what_to_give():
    tx = Optimizer("adamw", weight_decay=0.1).build(10, LABELS, "net")
    with pytest.raises(ConfigError) as caught:
        tx.init(own())
    assert str(caught.value) == (
        "The parameter net/codes is labelled 'codes', for which the optimiser has no rule. Give it "
        "a step size, as rates=('codes=1',) does, or name it in `decayed`, for weight decay."
    )
    for settings in ({"rates": ("codes=1",)}, {"decayed": ("matrix", "codes")}):
        assert Optimizer(**settings).build(10, LABELS, "net").init(own())
    # What another player's parameters are is no matter of this one's.
    assert Optimizer().build(10, (("^net/codes", "codes"),), "other").init(own("other"))


@pytest.mark.parametrize("settings", [{"rates": ("dynamic=0.1",)}, {"decayed": ("dynamic",)}])
def test_a_label_that_does_not_exist_is_refused(settings):
    with pytest.raises(ConfigError, match=r"no label called 'dynamic'. Did you mean dynamics?"):
        Optimizer(**settings).build(10)


@pytest.mark.parametrize(
    "rates", [("dynamics",), ("dynamics=fast",), ("=1",), ("dynamics=-1",), ("dynamics=nan",)]
)
def test_rates_that_cannot_be_read_are_refused(rates):
    with pytest.raises(ConfigError, match=r"rates are written as dynamics=0.1, each label once"):
        Optimizer(rates=rates)
    with pytest.raises(ConfigError, match="each label once"):
        Optimizer(rates=("matrix=1", "matrix=2"))


def test_labels_need_their_player():
    with pytest.raises(ConfigError, match=r"paths 'player/...': build\(steps, labels, player\)"):
        Optimizer().build(10, LABELS)


def test_a_rule_for_a_label_that_no_parameter_has_is_refused():
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    for settings in (
        Optimizer(rates=("dynamics=0.1",)),
        Optimizer("adamw", weight_decay=0.1, decayed=("dynamics",)),
    ):
        with pytest.raises(ConfigError, match=r"No parameter of .* labelled dynamics(?s:.*)vector"):
            settings.build(10).init(params)
    Optimizer("adamw", weight_decay=0.1, decayed=("matrix", "dynamics")).build(10).init(params)


def test_a_decay_of_no_label_is_refused_in_words_and_none_is_no_decay():
    with pytest.raises(ConfigError, match=r"^decayed names no label.*set weight_decay to 0 for no"):
        Optimizer("adamw", weight_decay=0.1, decayed=()).build(10)
    Optimizer("adamw", decayed=()).build(10)


def leaves_of(model, player):
    params = jax.eval_shape(model.init, jax.random.key(0))[0][player]
    return leaves_by_name(labels_of(params, model.labels, player))


def test_biases_of_every_values_distribution_are_vectors_and_what_gives_it_is_left_to_adam():
    spec = DataSpec((2, 2, 1), "discrete", levels=3, n_classes=2)
    of_made, of_nade = (
        leaves_of(make(spec, hidden=h), n)
        for make, h, n in ((made, (4,), "made"), (nade, 4, "nade"))
    )
    assert of_made == {
        "bias": "vector",
        "condition/kernel": "embedding",
        "direct": "embedding",
        "last": "embedding",
        "layers/0/bias": "vector",
        "layers/0/kernel": "matrix",
    }
    assert of_nade == {
        "bias": "vector",
        "condition/kernel": "embedding",
        "output_bias": "vector",
        "readout": "embedding",
        "weight": "matrix",
    }


def test_pseudo_inputs_are_no_matrix():
    spec = DataSpec((4, 4, 1), "binary", n_classes=3)
    found = leaves_of(vae(spec, hidden=(4,), latent_dim=2, prior="vamp"), "vae")
    assert found["prior/x"] == found["prior/cond"] == "vector"


def test_a_prior_keeps_the_labels_of_its_model():
    flow = realnvp(DataSpec((2,), "continuous"), n_layers=2, hidden=(4,))
    own = leaves_of(flow, "flow")
    model = vae(DataSpec((4, 4, 1), "binary"), hidden=(4,), latent_dim=2, prior=prior_of(flow))
    found = leaves_of(model, "vae")
    assert {f"prior/flow/{name}": label for name, label in own.items()} == {
        name: label for name, label in found.items() if name.startswith("prior/")
    }
    assert found["encoder/layers/0/kernel"] == "matrix"
    params = jax.eval_shape(model.init, jax.random.key(0))[0]["vae"]
    layouts = leaves_by_name(layouts_of(params, model.labels, "vae"))
    stacked = [name for name, layout in layouts.items() if layout == "each"]
    assert stacked
    assert all(name.startswith("prior/flow/map/layers/") for name in stacked)
