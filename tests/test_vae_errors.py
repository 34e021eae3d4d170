"""Bad input to the variational autoencoder: settings, batches, keys, conditions and specs that do
not fit are refused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_oracles import LINE, random_params

from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.nets.conv import check_image
from genjax.protocol import Batch, DataSpec

IMAGE = DataSpec((8, 8, 1), "binary", name="pictures")


@pytest.mark.parametrize(
    ("spec", "settings", "match"),
    [
        (
            IMAGE,
            {"likelihood": "bernouli"},
            "no likelihood called 'bernouli'. Did you mean bernoulli",
        ),
        (
            IMAGE,
            {"likelihood": "gaussian"},
            "pictures is binary, whose likelihood is bernoulli; got gaussian. Take that",
        ),
        (
            LINE,
            {"likelihood": "discretized_logistic"},
            "pPCA data is continuous, whose likelihood is gaussian",
        ),
        (IMAGE, {"prior": "vampp"}, "no prior called 'vampp'. Did you mean vamp"),
        (
            IMAGE,
            {"gradient": "reinforce"},
            "no gradient called 'reinforce'. There are: pathwise, stl, dreg",
        ),
        (IMAGE, {"net": "cnv"}, "no net called 'cnv'. Did you mean conv"),
        (IMAGE, {"activation": "rellu"}, "no activation called 'rellu'. Did you mean relu"),
        (IMAGE, {"dtype": "float8"}, "no dtype called 'float8'"),
        (LINE, {"scale": "per-pixel"}, "no scale called 'per-pixel'. There are: shared, element"),
        (LINE, {"scale": 0.0}, "scale must be positive; got 0.0"),
        (LINE, {"scale": -1}, "scale must be positive"),
        (
            DataSpec((6,), "discrete", levels=4, name="greys"),
            {"likelihood": "gaussian"},
            "greys is discrete, whose likelihood is discretized_logistic or categorical; got gauss",
        ),
        (LINE, {"beta_warmup_steps": -1}, "beta_warmup_steps must be at least 0; got -1"),
        (LINE, {"beta": -0.5}, "beta must be at least 0; got -0.5"),
        (LINE, {"latent_dims": 3}, "no setting of vae called 'latent_dims'. Did you mean latent_d"),
        (LINE, {"latent_dim": 0}, "latent_dim must be at least 1; got 0"),
        (LINE, {"latent_dim": 2.5}, "latent_dim must be a whole number; got 2.5"),
        (LINE, {"hidden": (8, 0)}, r"hidden\[1\] must be at least 1; got 0"),
        (LINE, {"prior": 3}, "prior"),
        (LINE, {"n_samples": 0}, "n_samples must be at least 1; got 0"),
        (LINE, {"n_bound_samples": -3}, "n_bound_samples must be at least 1; got -3"),
        (
            LINE,
            {"prior": "vamp", "n_pseudo_inputs": 0},
            "n_pseudo_inputs must be at least 1; got 0",
        ),
        (DataSpec((5,), "tokens", levels=9), {}, "got tokens. Use a sequence family"),
        (
            IMAGE,
            {"net": "conv", "channels": (2, 2, 2, 2)},
            "4 halvings need sides that are multiples of 16; got 8 x 8",
        ),
        (IMAGE, {"net": "conv", "channels": ()}, "at least one entry of channels"),
        (
            LINE,
            {"net": "conv"},
            r"events of shape \(height, width, channels\); got \(6,\). Use net='mlp'",
        ),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(spec, settings, match):
    with pytest.raises(ConfigError, match=match):
        vae(spec, **settings)


def test_images_that_do_not_halve():
    check_image((8, 4, 1), 2)
    with pytest.raises(
        ConfigError, match="3 halvings need sides that are multiples of 8; got 8 x 4"
    ):
        check_image((8, 4, 1), 3)
    with pytest.raises(ConfigError, match="got 6 x 8"):
        check_image((6, 8, 1), 2)


@functools.cache
def small(**condition):
    model = vae(DataSpec((2, 2), "binary", name="squares", **condition), latent_dim=2, hidden=())
    return model, *random_params(model)


X = np.ones((3, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("condition", "batch", "error", "match"),
    [
        (
            {},
            Batch(X[:, :1]),
            ValueError,
            r"batch.x of squares must have shape \[B, 2, 2\]; got \[3, 1, 2\]",
        ),
        ({}, Batch(X[0]), ValueError, r"must have shape \[B, 2, 2\]; got \[2, 2\]"),
        (
            {},
            Batch(X.astype(np.uint8)),
            TypeError,
            "is binary and must be floating point; got uint8",
        ),
        ({}, X, TypeError, r"Expected a genjax.Batch\(x, cond, weight, length\); got ndarray"),
        (
            {},
            Batch(X, weight=np.ones((2,), np.float32)),
            ValueError,
            r"batch.weight must have shape \[3\]; got \[2\]",
        ),
        (
            {},
            Batch(X, np.zeros(3, np.int32)),
            ValueError,
            "this model of squares is unconditional: leave `cond` out",
        ),
        (
            {"n_classes": 4},
            Batch(X),
            ValueError,
            r"is conditional: give `cond` \(labels 0..3, int \[3\]\)",
        ),
        ({"n_classes": 4}, Batch(X, np.array([0, 4, 1])), ValueError, "got labels from 0 to 4"),
        ({"n_classes": 4}, Batch(X, np.array([0, -1, 1])), ValueError, "got labels from -1 to 1"),
        (
            {"n_classes": 4},
            Batch(X, np.zeros(3, np.float32)),
            TypeError,
            r"labels 0..3, int \[3\]; got dtype float32",
        ),
        ({"n_classes": 4}, Batch(X, np.zeros(2, np.int32)), ValueError, r"got shape \[2\]"),
        (
            {"cond_dim": 4},
            Batch(X, np.zeros((3, 2), np.float32)),
            ValueError,
            r"vectors, float \[3, 4\]; got shape \[3, 2\]",
        ),
        ({"cond_dim": 4}, Batch(X, np.zeros((3, 4), np.int32)), TypeError, "got dtype int32"),
    ],
)
def test_batches_that_do_not_fit(condition, batch, error, match):
    model, params, state = small(**condition)
    key = jax.random.key(0)
    with pytest.raises(error, match=match):
        model.losses["vae"](params, state, batch, key, 0)
    with pytest.raises(error, match=match):
        model.bound(params, state, batch, key)


def test_keys_and_numbers_that_do_not_fit():
    model, params, state = small()
    old = jax.random.PRNGKey(0)
    for call in (
        lambda: model.init(old),
        lambda: model.sample(params, state, old, 2),
        lambda: model.bound(params, state, Batch(X), old),
        lambda: model.losses["vae"](params, state, Batch(X), old, 0),
    ):
        with pytest.raises(
            TypeError,
            match=r"typed PRNG key; got an array of uint32\[2\]. Make one with jax.random.key",
        ):
            call()
    with pytest.raises(TypeError, match="typed PRNG key; got a int"):
        model.sample(params, state, 0, 2)
    for n in (0, -1, 2.0):
        with pytest.raises(ValueError, match="whole number n >= 1 of samples"):
            model.sample(params, state, jax.random.key(0), n)
    with pytest.raises(ValueError, match="it is a shape, so not traced"):
        jax.jit(lambda n: model.sample(params, state, jax.random.key(0), n))(3)


def test_conditions_of_samples_and_codes_that_do_not_fit():
    plain, labelled = small(), small(n_classes=4)
    key = jax.random.key(0)
    for (model, params, state), cond, match in (
        (plain, np.zeros(3, np.int32), "unconditional: leave `cond` out"),
        (labelled, None, "is conditional: give `cond`"),
        (labelled, np.array([0, 1, 7]), "got labels from 0 to 7"),
    ):
        for call in (
            lambda: model.sample(params, state, key, 3, cond),
            lambda: model.latent.sample_mean(params, state, key, 3, cond),
            lambda: model.latent.encode(params, state, jnp.asarray(X), cond),
            lambda: model.latent.decode(params, state, jnp.ones((3, 2)), cond),
            lambda: model.latent.draw(params, state, key, jnp.ones((3, 2)), cond),
            lambda: model.latent.log_likelihood(params, state, Batch(X, cond), jnp.ones((3, 2))),
            lambda: model.latent.reconstruct(params, state, jnp.asarray(X), cond),
        ):
            with pytest.raises(ValueError, match=match):
                call()
