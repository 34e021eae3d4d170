"""Muon: which parameters it takes, the direction and the size of its steps."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from gates import quick, stack

from genjax import (
    DataSpec,
    cnf,
    diffusion,
    ensemble,
    example_batch,
    flow_matching,
    gan,
    nsf,
    pixelcnn,
    rnn,
    ssm,
    training,
    transformer,
    vae,
    vrnn,
)
from genjax.checks import leaves_by_name
from genjax.errors import ConfigError
from genjax.learning.labels import labels_of, layouts_of
from genjax.learning.muon import kinds_of
from genjax.learning.optim import Optimizer

SPEC = DataSpec((3,), "continuous")
RNG = np.random.default_rng(0)


def small():
    return vae(SPEC, latent_dim=2, hidden=(5,))


# --- Muon -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_muon_takes_and_what_is_adams():
    spec = DataSpec((4,), "tokens", levels=5, step="character")
    model = rnn(spec, d_hidden=6)
    params, _ = model.init(jax.random.key(0))
    kinds = jax.tree_util.tree_leaves_with_path(kinds_of(params["rnn"], model.labels, "rnn"))
    found = {jax.tree_util.keystr(p, simple=True, separator="/"): kind for p, kind in kinds}
    muon = {name for name, kind in found.items() if kind == "muon"}
    assert muon == {name for name in found if name.endswith("kernel") and "readout" not in name}
    assert muon
    assert any("table" in name for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 3, 2, 5)])
def test_the_first_step_is_an_orthogonal_matrix_of_adams_size(shape):
    """All singular values of five Newton-Schulz iterations lie near 1 (Jordan 2024: 0.7 to 1.2),
    and left and right vectors are the gradient's.
    """
    g = RNG.normal(size=shape).astype(np.float32)
    tx = Optimizer("muon", 1.0).build(10)
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(4)}
    grads = {"kernel": jnp.asarray(g), "bias": jnp.asarray([1.0, -2.0, 0.5, 3.0])}
    with jax.numpy_dtype_promotion("standard"):  # as a step has it: optax mixes kinds of numbers
        updates, _ = tx.update(grads, tx.init(params), params)
    matrix = -np.asarray(updates["kernel"]).reshape(-1, shape[-1])
    scale = 0.2 * np.sqrt(max(matrix.shape))
    u, _, vt = np.linalg.svd(g.reshape(-1, shape[-1]), full_matrices=False)
    core = u.T @ (matrix / scale) @ vt.T
    assert np.all((np.diag(core) > 0.6) & (np.diag(core) < 1.3))
    assert np.abs(core - np.diag(np.diag(core))).max() < 0.05
    # The rest is Adam's first step: the sign of the gradient.
    np.testing.assert_allclose(updates["bias"], -np.sign(grads["bias"]), rtol=1e-4)


LAYOUTS = {"1,1,1": [2, 2, 2], "1,2": [2, 4], "each": None, "": [6]}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_fused_or_stacked_takes_the_steps_that_optaxs_muon_gives_each_matrix(layout):
    """Over several steps, by `optax.contrib.muon` with the step sizes of its consistent RMS."""
    shape = (3, 4, 6) if layout == "each" else (4, 6)
    whole = {"net": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(6)}}
    labels = (("kernel$", f"matrix:{layout}"),) if layout else ()
    tx = Optimizer("muon", 0.1, b1=0.9).build(10, labels, "player")

    def parts(x):
        if layout == "each":
            return list(x)
        return jnp.split(x, np.cumsum(LAYOUTS[layout])[:-1], axis=-1)

    wanted = optax.contrib.muon(0.1, beta=0.9, consistent_rms=0.2)
    state, states = tx.init(whole), wanted.init(parts(whole["net"]["kernel"]))
    # The momenta are kept as the parameters are, so that older runs are read as they were.
    assert any(leaf.shape == shape for leaf in jax.tree.leaves(state))
    with jax.numpy_dtype_promotion("standard"):
        for seed in range(3):
            g = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
            updates, state = tx.update({"net": {"kernel": g, "bias": jnp.ones(6)}}, state, whole)
            each, states = wanted.update(parts(g), states, parts(g))
            found = parts(updates["net"]["kernel"])
            for one, other in zip(found, each, strict=True):
                np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def labelled(model):
    """What labels say of matrices behind the colon, by name; and which are embeddings. Layouts that
    do not divide an axis are refused by Muon's `init`, which is asked.
    """
    layouts, embeddings = {}, set()
    for player in model.losses:
        params = jax.eval_shape(model.init, jax.random.key(0))[0][player]
        found = leaves_by_name(layouts_of(params, model.labels, player))
        layouts |= {name.removesuffix("/kernel"): one for name, one in found.items() if one}
        kinds = leaves_by_name(labels_of(params, model.labels, player))
        embeddings |= {
            name.removesuffix("/kernel") for name, one in kinds.items() if one == "embedding"
        }
        jax.eval_shape(Optimizer("muon").build(10, model.labels, player).init, params)
    return layouts, embeddings


TOKENS = DataSpec((4,), "tokens", levels=5, step="token")
IMAGES = DataSpec((8, 8, 1), "continuous")
CLASSES = DataSpec((8, 8, 1), "binary", n_classes=3)
SMALL: dict[str, Any] = {"d_model": 8, "n_layers": 1, "n_heads": 4}
GPT = {**SMALL, "n_kv_heads": 2, "activation": "swiglu"}
SSM: dict[str, Any] = {"d_model": 8, "n_layers": 1}
WIDE = {"latent_dim": 2, "d_hidden": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (partial(transformer, TOKENS, **GPT), {"attention/qkv": "4,2,2", "feed_forward/up": "1,1"}),
        (partial(transformer, TOKENS, **GPT, d_hidden=3), {"attention/qkv": "4,2,2"}),  # [6, 8]
        (
            partial(rnn, TOKENS, cell="gru", d_embed=2, d_hidden=3),
            {"inputs": "1,1,1", "0": "1,1,1"},
        ),
        (
            partial(vrnn, TOKENS, cell="lstm", **WIDE, hidden=(4, 4)),
            {
                "layer/inputs": "1,1,1,1",
                "layer": "1,1,1,1",
                "z_inputs": "1,1,1,1",
                "prior/layers/2": "readout",
                "encoder/rest/layers/1": "readout",
                "decoder/rest/layers/1": "readout",
            },
        ),
        (
            partial(vrnn, TOKENS, cell="vanilla", **WIDE, hidden=()),
            {
                "layer/inputs": "1",
                "layer": "1",
                "z_inputs": "1",
                "prior/layers/0": "readout",
                "encoder/first": "readout",
                "encoder/second": "readout",
                "decoder/first": "readout",
                "decoder/second": "readout",
            },
        ),
        (partial(ssm, TOKENS, cell="s4d", **SSM), {"out/dense": "1,1"}),
        (partial(ssm, TOKENS, cell="lru", **SSM), {"out/dense": "1,1", "project/dense": "8,8"}),
        (partial(ssm, TOKENS, cell="mingru", **SSM), {"project/dense": "8,8"}),
        (partial(ssm, TOKENS, cell="mingru", **SSM, d_inner=3), {}),  # [6, 8]
        (partial(ssm, TOKENS, cell="mamba2", **SSM, d_state=3), {"project/dense": "16,3,3,4,16"}),
        (
            partial(ssm, TOKENS, cell="deltanet", **SSM, d_state=3),
            {"project/dense": "12,12,8,4,4,8"},
        ),
        (
            partial(diffusion, IMAGES, net="dit", **SMALL),
            {
                "attention/qkv": "1,1,1",
                "blocks/0/parameters": "1,1,1,1,1,1",
                "net/parameters": "1,1",
                "net/last": "readout",
            },
        ),
        (
            partial(flow_matching, IMAGES, hidden=(4,)),
            {"modulations/0": "1,1", "last": "readout"},
        ),
        (
            partial(vae, IMAGES, hidden=(4,)),
            {"encoder/layers/1": "readout", "decoder/layers/1": "readout"},
        ),
        (
            partial(vae, IMAGES, net="conv", channels=(4, 4)),
            {"encoder/last": "readout", "decoder/convs/1": "readout"},
        ),
        (
            partial(gan, IMAGES, net="dcgan", channels=(4, 4)),
            {"convs/1": "readout", "logit/layer": "readout"},
        ),
        (
            partial(nsf, DataSpec((2,), "continuous"), n_layers=2, hidden=(3,)),
            {"move/layers/0": "each", "move/last": "each", "lower": "each", "upper": "each"},
        ),
        (partial(cnf, SPEC, hidden=(4,)), {"map/modulations/0": "1,1", "map/last": "readout"}),
    ],
)
def test_families_say_which_of_their_matrices_are_several_and_which_is_the_last(build, wanted):
    found, _ = labelled(build())
    assert len(found) == len(wanted)
    for end, layout in wanted.items():
        (name,) = [name for name in found if name == end or name.endswith(f"/{end}")]
        assert found[name] == layout


@pytest.mark.slow
def test_scales_with_their_shifts_and_halves_of_gates_are_two_matrices():
    found, _ = labelled(flow_matching(IMAGES, net="unet"))
    assert found.pop("last") == "readout"
    assert found.pop("attention/qkv") == "1,1,1"
    assert len(found) > 5
    assert all(name.endswith("/parameters") and one == "1,1" for name, one in found.items())
    found, _ = labelled(
        pixelcnn(dataclasses.replace(CLASSES, n_classes=None), channels=4, n_layers=1, scales=1)
    )
    of = {name: one for name, one in found.items() if name.startswith("up_")}
    assert of == {"up_v/0": "1,1,1,1", "up_h/0": "1,1,1,1"}
    assert {one for name, one in found.items() if name not in of} == {"1,1"}
    assert len(found) == len(of) + 9


@pytest.mark.slow
def test_conditions_by_class_are_embeddings_and_vectors_are_matrices():
    projected = {"generator_cond": "batch_norm", "discriminator_cond": "projection"}
    of_gan = partial(gan, net="dcgan", channels=(4,), generator_norm="batch", **projected)
    of_pixels = partial(pixelcnn, channels=4, n_layers=1)
    by_vector = dataclasses.replace(CLASSES, n_classes=None, cond_dim=3)
    tables = {"embed/layer", "norms/0/scale", "norms/0/shift"}
    for build, wanted in ((of_gan, tables), (of_pixels, {"condition/0", "positions"})):
        assert labelled(build(CLASSES))[1] == wanted
        assert labelled(build(by_vector))[1] == wanted & {"positions"}
    assert labelled(of_pixels(by_vector))[0]["condition/0"] == "1,1,1,1"
    for net in ("mlp", "unet", "dit"):
        names = labelled(diffusion(CLASSES, net=net, hidden=(4,), d_model=8, n_layers=1))[1]
        assert names == {"net/embed/condition"}


@pytest.mark.slow
def test_networks_of_ones_own_have_no_labels_that_are_not_theirs():
    class Own(nnx.Module):
        def __init__(self, *, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])

        def __call__(self, z):
            return self.layers[1](self.layers[0](z))[..., None]

    found, _ = labelled(vae(SPEC, latent_dim=2, hidden=(5,), decoder=Own))
    assert found == {"encoder/layers/1": "readout"}


@pytest.mark.parametrize(
    ("layout", "shape"), [("4", (4, 6)), ("1,0", (4, 6)), ("x", (4, 6)), ("each", (4, 6))]
)
def test_a_layout_that_does_not_fit_is_refused(layout, shape):
    tx = Optimizer("muon").build(10, (("kernel$", f"matrix:{layout}"),), "player")
    with pytest.raises(ConfigError, match=rf"kernel \[4, 6\] is labelled 'matrix:{layout}'"):
        tx.init({"kernel": jnp.zeros(shape)})


@pytest.mark.slow
def test_muon_decays_what_is_named_by_the_step_size():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = Optimizer("muon", 0.1, weight_decay=0.5).build(10)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05 * np.ones((3, 2)), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


@cache
def programs(tx):
    t = training(small(), tx)
    return quick(t.init), quick(t.step)


def trained(tx, steps=3, key=0):
    init, step = programs(tx)
    ts, metrics = init(jax.random.key(key)), []
    for index in range(steps):
        batch = example_batch(SPEC, jax.random.key(100 + index), 8)
        ts, new = step(ts, batch)
        metrics.append(new)
    return ts, metrics


@pytest.mark.slow
def test_muon_learns_with_everything_else_around_it():
    tx = Optimizer(
        "muon",
        0.02,
        weight_decay=0.1,
        clip_norm=1.0,
        ema_decay=0.5,
        warmup_steps=2,
        schedule="cosine",
        rates=("vector=0.5",),
    ).build(200)
    ts, metrics = trained(tx, 60)
    assert float(metrics[-1]["vae/loss"]) < float(metrics[0]["vae/loss"])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(ts.params))
    # Of members, each takes its own.
    alone = [trained(tx, 3, key=seed)[0].params for seed in (0, 1)]
    t = ensemble(training(small(), tx))
    step = quick(t.step)
    together = quick(t.init)(jnp.stack([jax.random.key(0), jax.random.key(1)]))
    for index in range(3):
        together, _ = step(together, example_batch(SPEC, jax.random.key(100 + index), 8))
    for x, y in zip(*map(jax.tree.leaves, (together.params, stack(alone))), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def test_layers_of_a_learned_dequantization_are_one_by_one():
    spec = DataSpec((2,), "discrete", levels=4)
    model = nsf(spec, n_layers=2, hidden=(3,), dequantization="variational")
    params = jax.eval_shape(model.init, jax.random.key(0))[0]["flow"]
    found = leaves_by_name(layouts_of(params, model.labels, "flow"))
    names = [name for name in found if name.startswith("dequantizer") and "kernel" in name]
    shapes = leaves_by_name(params)
    assert names
    assert all(found[name] == "each" and shapes[name].shape[0] == 4 for name in names)
