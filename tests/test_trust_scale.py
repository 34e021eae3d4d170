"""Standardised data: networks see (x - shift) / scale, and everything else is in the units of x.

With the same parameters, a model of a x + b says of a x + b what the model of x says of x: log-
probabilities differ by the logarithm of the volume, samples are a x + b, gradients are the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import quick

from genjax import (
    DataSpec,
    cnf,
    diffusion,
    flow_matching,
    gan,
    glow,
    maf,
    nsf,
    realnvp,
    rnn,
    ssm,
    transformer,
    vae,
    vrnn,
)
from genjax.data import arrays, example_batch
from genjax.errors import DataError
from genjax.families._skeleton import skeleton

POINTS = DataSpec((3,), "continuous")
IMAGES = DataSpec((4, 4, 2), "continuous")
FRAMES = DataSpec((5, 3), "continuous", step="frame")
VECTORS = DataSpec((3,), "continuous", cond_dim=2)
SHIFT, SCALE = (3.0, -2.0, 0.5), (4.0, 0.25, 1.5)
SMALL = {"hidden": (8,)}

MODELS = {
    "vae": (POINTS, lambda spec: vae(spec, latent_dim=2, n_bound_samples=3, **SMALL)),
    "vae-frames": (FRAMES, lambda spec: vae(spec, latent_dim=2, **SMALL)),
    "vae-scale": (POINTS, lambda spec: vae(spec, latent_dim=2, scale="element", **SMALL)),
    "vae-conv": (IMAGES, lambda spec: vae(spec, latent_dim=2, net="conv", channels=(4,))),
    "cvae": (VECTORS, lambda spec: vae(spec, latent_dim=2, **SMALL)),
    "gan": (POINTS, lambda spec: gan(spec, latent_dim=2, **SMALL)),
    "rnn": (FRAMES, lambda spec: rnn(spec, d_hidden=6, n_components=2)),
    "transformer": (
        FRAMES,
        lambda spec: transformer(spec, d_model=8, n_layers=1, n_heads=2, n_components=2),
    ),
    "vrnn": (FRAMES, lambda spec: vrnn(spec, d_hidden=6, latent_dim=2, hidden=(6,))),
    "diffusion": (POINTS, lambda spec: diffusion(spec, n_likelihood_steps=4, n_steps=3, **SMALL)),
    "diffusion-bound": (
        POINTS,
        lambda spec: diffusion(spec, weighting="elbo", n_bound_samples=2, n_steps=3, **SMALL),
    ),
    "flow_matching": (
        VECTORS,
        lambda spec: flow_matching(spec, n_likelihood_steps=4, n_steps=3, **SMALL),
    ),
    "realnvp": (POINTS, lambda spec: realnvp(spec, n_layers=2, **SMALL)),
    "maf": (VECTORS, lambda spec: maf(spec, n_layers=2, **SMALL)),
    "nsf": (POINTS, lambda spec: nsf(spec, n_layers=2, bins=4, **SMALL)),
    "cnf": (POINTS, lambda spec: cnf(spec, n_steps=4, **SMALL)),
    "glow": (IMAGES, lambda spec: glow(spec, n_levels=1, n_steps=1, channels=4)),
    "ssm": (FRAMES, lambda spec: ssm(spec, d_model=8, n_layers=1, n_components=2)),
    "skeleton": (POINTS, skeleton),
}


def grown(params):
    """Parameters away from their init, where some outputs are 0 whatever they are given."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [
        leaf + 0.05 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def of_scale(spec):
    shift, scale = (SHIFT, SCALE) if spec.shape[-1] == 3 else (SHIFT[:1], SCALE[:1])
    more = {}
    if spec.cond_dim:
        more = {"cond_shift": (1.0, -3.0), "cond_scale": (2.0, 0.5)}
    return dataclasses.replace(spec, shift=shift, scale=scale, **more)


QUICK = ("vae", "rnn", "skeleton")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="module", params=EVERY)
def pair(request):
    """A model, the same of standardised data, and parameters and state for both."""
    plain, make = MODELS[request.param]
    one = make(plain)
    params, state = one.init(jax.random.key(0))
    return one, make(of_scale(plain)), grown(params), state


def batches(one, other, n=6):
    batch = example_batch(one.spec, jax.random.key(5), n)
    spec = other.spec
    cond = batch.cond
    if cond is not None:
        cond = cond * np.asarray([spec.cond_scale], "f") + np.asarray([spec.cond_shift], "f")
    return batch, batch._replace(x=spec.denormalize(batch.x), cond=cond)


def of_both(pair, quantity):
    """quantity(model, batch) of both models, each with its own batch, by one program."""
    one, other, *_ = pair
    return quick(lambda a, b: (quantity(one, a), quantity(other, b)))(*batches(one, other))


@pytest.mark.slow
def test_scores_differ_by_the_volume_alone(pair):
    one, other, params, state = pair
    volume = np.log(np.broadcast_to(other.spec.scale, one.spec.shape)).sum()
    assert volume == pytest.approx(-other.spec.log_volume)
    for name in ("log_prob", "bound"):
        if getattr(one, name) is not None:

            def score(model, batch, name=name):
                return getattr(model, name)(params, state, batch, jax.random.key(1))

            plain, found = of_both(pair, score)
            np.testing.assert_allclose(found, plain - volume, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_losses_have_the_same_gradients(pair):
    one, other, params, state = pair
    key, step = jax.random.key(1), jnp.zeros((), jnp.int32)
    for player in one.losses:

        def gradient(model, batch, player=player):
            def mean(own):
                value, _ = model.losses[player]({**params, player: own}, state, batch, key, step)
                return value.mean(), value

            return jax.grad(mean, has_aux=True)(params[player])

        (grads, values), (grads_scaled, values_scaled) = of_both(pair, gradient)
        gap = np.asarray(values_scaled - values)
        assert np.ptp(gap) < 2e-3
        nats = -other.spec.log_volume
        assert np.isclose(gap.mean(), 0, atol=2e-3) or np.isclose(gap.mean(), nats, atol=2e-3)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_scaled), strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_samples_are_in_the_units_of_the_data(pair):
    one, other, params, state = pair

    def drawn(model, batch):
        return model.sample(params, state, jax.random.key(2), 6, batch.cond)

    x, y = of_both(pair, drawn)
    np.testing.assert_allclose(y, other.spec.denormalize(x), rtol=2e-3, atol=2e-3)
    if one.latent is not None and one.latent.decode is not None:
        z = jax.random.normal(jax.random.key(3), (6, *one.latent.spec.shape))

        def coded(model, batch):
            mean = model.latent.decode(params, state, z, batch.cond)
            return mean, model.latent.encode(params, state, batch.x, batch.cond)

        (mean, codes), (mean_scaled, codes_scaled) = of_both(pair, coded)
        np.testing.assert_allclose(mean_scaled, other.spec.denormalize(mean), rtol=1e-4, atol=1e-4)
        for a, b in zip(codes, codes_scaled, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


# --- what is decided about a user's own data ------------------------------------------------------


def saved(tmp_path, **given):
    path = str(tmp_path / "mine.npz")
    np.savez(path, **given)
    return path


def table(n=2000, seed=0):
    rng = np.random.default_rng(seed)
    columns = rng.normal(5e4, 2e4, n), rng.normal(1e-3, 5e-4, n), rng.integers(0, 2, n)
    return np.stack(columns, axis=1)


def test_a_table_has_a_pair_of_numbers_for_each_column(tmp_path):
    spec = arrays(saved(tmp_path, x=table())).spec
    train = arrays(saved(tmp_path, x=table())).load().train.x.astype(np.float64)
    np.testing.assert_allclose(spec.shift, train.mean(0), rtol=1e-5)
    np.testing.assert_allclose(spec.scale, train.std(0), rtol=1e-5)
    seen = np.asarray(spec.normalize(jnp.asarray(train, jnp.float32)))
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(seen.std(0), 1, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "size"), [("auto", 1), ("event", 1), ("element", 3), ("none", None)]
)
def test_images_have_one_pair_unless_told_otherwise(tmp_path, how, size):
    x = np.random.default_rng(0).uniform(0, 255, (60, 6, 6, 3))
    spec = arrays(saved(tmp_path, x=x), standardize=how).spec
    assert (None if spec.scale is None else len(spec.scale)) == size


def test_constant_columns_are_said(tmp_path):
    x = table()
    x[:, 1] = 7.25
    source = arrays(saved(tmp_path, x=x))
    assert source.spec.scale[1] == 1
    assert "constant: column 1" in "; ".join(source.notes)


def test_vectors_of_conditions_are_standardised_too(tmp_path):
    y = table()[:, :2]
    spec = arrays(saved(tmp_path, x=table(), y=y), conditional=True).spec
    seen = np.asarray(spec.embed(y.astype(np.float32)))
    np.testing.assert_allclose(seen.std(0), 1, rtol=0.1)
    plain = arrays(saved(tmp_path, x=table(), y=y), conditional=True, standardize="none").spec
    assert plain.cond_scale is None


def test_what_32_bits_cannot_tell_apart_is_refused(tmp_path):
    times = 1.6e9 + np.random.default_rng(0).normal(size=(100, 2))
    with pytest.raises(DataError, match=r"column 0 are up to 1\.6e\+09.*Subtract an offset"):
        arrays(saved(tmp_path, x=times))
    ids = 2**53 + 1 + np.arange(200).reshape(100, 2)
    with pytest.raises(DataError, match=r"column 0 are up to 9\.007e\+15.*Subtract an offset"):
        arrays(saved(tmp_path, x=ids * 1.0))
    for scale in (1e-38, 1e-42, 1e-50):
        with pytest.raises(DataError, match=r"cannot tell apart\. Divide them by a number such as"):
            arrays(saved(tmp_path, x=(times - 1.6e9) * scale))
    same = np.full((100, 2), 2.0**53 + 2)
    assert "constant: column 0, 1" in "; ".join(arrays(saved(tmp_path, x=same)).notes)
