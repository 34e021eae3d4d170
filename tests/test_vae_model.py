"""The variational autoencoder as a model: conditions, samples, what it encodes and decodes, shapes
and dtypes.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from statistics_checks import RARE
from vae_oracles import check_moments, f64, jit, linear_params, linear_vae, ppca, random_params

from genjax.families.vae import vae
from genjax.protocol import Batch, DataSpec

# --- conditions -----------------------------------------------------------------------------------


def conditional(params, net, effect):
    """The parameters of a VAE with rows added for a condition: what the condition adds to the first
    features.
    """
    own = jax.tree.map(np.asarray, params["vae"])
    first = {
        "mlp": (("encoder", "layers", 0), ("decoder", "layers", 0)),
        "conv": (("encoder", "last"), ("decoder", "first")),
    }
    for path in first[net]:
        layer = functools.reduce(lambda node, name: node[name], path, own)
        rows = effect((3, layer["kernel"].shape[1]))
        layer["kernel"] = np.concatenate([layer["kernel"], rows])
        layer["rows"] = rows
    return own


def split_rows(own):
    """Take the added rows out of the tree again: (parameters, rows by path)."""
    rows = {}

    def walk(node, path):
        if not isinstance(node, dict):
            return node
        if "rows" in node:
            rows[path] = node["rows"]
        return {name: walk(child, (*path, name)) for name, child in node.items() if name != "rows"}

    return walk(own, ()), rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "effect", "form"),
    [
        ("mlp", "none", "label"),
        pytest.param("mlp", "constant", "vector", marks=pytest.mark.slow),
        pytest.param("conv", "none", "vector", marks=pytest.mark.slow),
        ("conv", "constant", "label"),
    ],
)
def test_a_condition_without_effect_or_without_change_is_no_condition(x64, net, effect, form):
    shape = (4, 4, 1)
    settings = {"latent_dim": 2, "net": net, "hidden": (5,), "channels": (3,), "n_bound_samples": 3}
    plain = vae(DataSpec(shape, "binary"), **settings)
    given = vae(
        DataSpec(shape, "binary", **({"n_classes": 3} if form == "label" else {"cond_dim": 3})),
        **settings,
    )
    params, state = random_params(plain, seed=4)
    params = f64(params)
    rng = np.random.default_rng(26)
    make = np.zeros if effect == "none" else lambda size: rng.normal(size=size)
    own, rows = split_rows(conditional(params, net, make))
    labels = np.array([0, 2, 1, 1]) if effect == "none" else np.full(4, 2)
    cond = jnp.asarray(labels) if form == "label" else jnp.asarray(np.eye(3)[labels])
    if effect == "constant":  # in the plain model it is part of the bias
        plain_own = jax.tree.map(np.asarray, params["vae"])
        for path, extra in rows.items():
            layer = functools.reduce(lambda node, name: node[name], path, plain_own)
            layer["bias"] = layer["bias"] + extra[2]
        params = f64({"vae": plain_own})
    given_params = f64({"vae": own})
    expected_tree = jax.eval_shape(given.init, jax.random.key(0))[0]
    assert jax.tree.map(jnp.shape, given_params) == jax.tree.map(
        lambda leaf: leaf.shape, expected_tree
    )

    x = jnp.asarray(rng.integers(0, 2, size=(4, *shape)), jnp.float64)
    z, key = jnp.asarray(rng.normal(size=(4, 2))), jax.random.key(27)

    def everything(model, params, cond):
        batch = Batch(x, cond)
        return (
            model.losses["vae"](params, state, batch, key, 0)[0],
            model.bound(params, state, batch, key),
            model.sample(params, state, key, 4, cond),
            model.latent.encode(params, state, x, cond),
            model.latent.decode(params, state, z, cond),
        )

    one = jit(partial(everything, plain, cond=None))(params)
    other = jit(partial(everything, given))(given_params, cond=cond)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_labels_are_one_hot_vectors_and_make_a_difference():
    settings = {"latent_dim": 2, "hidden": (5,)}
    by_label = vae(DataSpec((4,), "binary", n_classes=3), **settings)
    by_vector = vae(DataSpec((4,), "binary", cond_dim=3), **settings)
    params, state = random_params(by_label)
    labels = jnp.array([0, 1, 2])
    x, z = jnp.ones((3, 4)), jnp.ones((3, 2))
    for name, argument in (("decode", z), ("encode", x), ("reconstruct", x)):
        one = jit(getattr(by_label.latent, name))(params, state, argument, labels)
        np.testing.assert_array_equal(
            jax.tree.leaves(one),
            jax.tree.leaves(
                jit(getattr(by_vector.latent, name))(params, state, argument, jnp.eye(3))
            ),
        )
        rows = np.asarray(jax.tree.leaves(one)[0])
        assert min(np.abs(rows[i] - rows[j]).max() for i in range(3) for j in range(i)) > 1e-2
    one, other = (
        jit(m.bound)(params, state, Batch(x, c), jax.random.key(0))
        for m, c in ((by_label, labels), (by_vector, jnp.eye(3)))
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 128])
def test_a_linear_cvae_has_the_evidence_of_its_class(x64, k):
    # x | c = W z + m + b_c + noise. The posterior mean is gain (x - m - b_c): the encoder's rows
    # for c are -gain b_c.
    p = ppca()
    params, state = linear_params(p)
    shift = np.random.default_rng(29).normal(size=(3, 6)) * 2
    own = params["vae"]
    encoder, decoder = own["encoder"]["layers"][0], own["decoder"]["layers"][0]
    encoder["kernel"] = jnp.concatenate(
        [encoder["kernel"], jnp.asarray(np.concatenate([-shift @ p.gain.T, np.zeros((3, 2))], 1))]
    )
    decoder["kernel"] = jnp.concatenate([decoder["kernel"], jnp.asarray(shift)])
    model = vae(
        DataSpec((6,), "continuous", n_classes=3), latent_dim=2, hidden=(), n_bound_samples=k
    )
    labels = np.arange(12) % 3
    value = jit(model.bound)(
        params, state, Batch(jnp.asarray(p.x[:12]), jnp.asarray(labels)), jax.random.key(30)
    )
    np.testing.assert_allclose(value, p.log_prob(p.x[:12] - shift[labels]), atol=1e-8, rtol=0)
    # Samples of a class have its mean.
    x = np.asarray(
        jit(model.sample, static_argnums=3)(
            params, state, jax.random.key(31), 6000, jnp.full(6000, 1)
        )
    )
    check_moments(x, p.offset + shift[1], p.weights @ p.weights.T + p.noise * np.eye(6))


# --- decoding, sampling, units --------------------------------------------------------------------


def test_a_linear_decoder_samples_its_gaussian(x64):
    p, n = ppca(), 20_000
    params, state = linear_params(p)
    model = linear_vae()
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, jax.random.key(32), n))
    check_moments(x, p.offset, p.weights @ p.weights.T + p.noise * np.eye(6))
    whitened = np.linalg.solve(
        np.linalg.cholesky(p.weights @ p.weights.T + p.noise * np.eye(6)), (x - p.offset).T
    )
    assert scipy.stats.kstest(whitened.ravel(), scipy.stats.norm.cdf).pvalue > RARE
    # Without the noise of p(x|z) only the span of W is left.
    means = np.asarray(
        jit(model.latent.sample_mean, static_argnums=3)(params, state, jax.random.key(33), n)
    )
    check_moments(means, p.offset, p.weights @ p.weights.T)
    outside = scipy.linalg.null_space(p.weights.T)
    assert np.abs((means - p.offset) @ outside).max() < 1e-10


def test_encode_decode_and_reconstruct_are_the_linear_maps_of_the_model(x64):
    p = ppca()
    params, state = linear_params(p)
    latent = linear_vae().latent
    mean, log_scale = latent.encode(params, state, jnp.asarray(p.x))
    np.testing.assert_allclose(mean, (p.x - p.offset) @ p.gain.T, atol=1e-12)
    np.testing.assert_allclose(
        log_scale, np.broadcast_to(0.5 * np.log(p.variance), mean.shape), atol=1e-12
    )
    z = np.random.default_rng(34).normal(size=(3, 2))
    np.testing.assert_allclose(
        latent.decode(params, state, jnp.asarray(z)), z @ p.weights.T + p.offset, atol=1e-12
    )
    want = (p.x - p.offset) @ p.gain.T @ p.weights.T + p.offset
    np.testing.assert_allclose(
        latent.reconstruct(params, state, jnp.asarray(p.x)), want, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "net"),
    [("binary", "conv"), ("discrete", "conv"), ("discrete", "mlp"), ("continuous", "mlp")],
)
def test_shapes_kinds_and_ranges(kind, net):
    spec = DataSpec((4, 4, 2), kind, levels=5 if kind == "discrete" else None)
    scale = (
        "element" if net == "conv" else "shared"
    )  # one of each, with a decoder of two outputs for conv
    model = vae(spec, latent_dim=3, net=net, hidden=(6,), channels=(4, 3), scale=scale)
    params, state = random_params(
        model, seed=5, size=2.0
    )  # wild, so that the ends of the range are reached
    x = jnp.asarray(np.random.default_rng(35).integers(0, 2, size=(6, 4, 4, 2)), jnp.float32)

    @jit
    def everything(params, key):
        latent = model.latent
        return (
            latent.encode(params, state, x),
            latent.decode(params, state, jnp.ones((7, 3))),
            latent.reconstruct(params, state, x),
            latent.sample_mean(params, state, key, 300),
            model.sample(params, state, key, 300),
            latent.decode(params, state, latent.encode(params, state, x)[0]),
        )

    (mean, log_scale), decoded, rebuilt, means, samples, twice = everything(
        params, jax.random.key(36)
    )
    np.testing.assert_array_equal(rebuilt, twice)
    assert mean.shape == log_scale.shape == (6, 3)
    assert decoded.shape == (7, 4, 4, 2)
    assert rebuilt.shape == (6, 4, 4, 2)
    assert means.shape == samples.shape == (300, 4, 4, 2)
    assert all(a.dtype == jnp.float32 for a in (mean, log_scale, decoded, rebuilt, means, samples))
    top = {"binary": 1, "discrete": 4}.get(kind)
    if top is None:
        assert float(jnp.abs(samples).max()) > 1
        return
    for values in (decoded, rebuilt, means, samples):
        assert float(values.min()) >= 0
        assert float(values.max()) <= top
    assert set(np.unique(samples)) == set(range(top + 1))
    assert not np.all(np.asarray(means) == np.round(means))


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_bfloat16_arithmetic_keeps_float32_parameters_and_losses(net):
    spec = DataSpec((4, 4, 1), "binary")
    narrow, wide = (
        vae(spec, latent_dim=2, net=net, hidden=(8,), channels=(4,), dtype=d)
        for d in ("bfloat16", "float32")
    )
    params, state = random_params(narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = Batch(jnp.ones((4, 4, 4, 1)))

    def value(p, m):
        loss, aux = m.losses["vae"](p, state, batch, jax.random.key(38), 0)
        return loss.sum(), (loss, aux)

    (_, (one, aux)), grads = jit(jax.value_and_grad(partial(value, m=narrow), has_aux=True))(params)
    other, _ = jit(wide.losses["vae"])(params, state, batch, jax.random.key(38), 0)
    assert {one.dtype, *(m.dtype for m in aux.metrics.values())} == {jnp.dtype("float32")}
    np.testing.assert_allclose(one, other, rtol=0.02)
    assert np.any(np.asarray(one) != np.asarray(other))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


# --- what a loss draws, and what latents are ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_a_loss_is_a_function_of_its_noise(x64, k):
    """What `noise` says that a loss draws gives its value: with it all is computed again."""
    p = ppca()
    params, state = linear_params(p, 0.3, 0.25)
    model = linear_vae(n_samples=k, gradient="stl")
    batch, key = Batch(jnp.asarray(p.x[:5])), jax.random.key(39)
    epsilon = np.asarray(model.noise["vae"](key, batch).epsilon)
    assert epsilon.shape == (k, 5, 2)
    mean, log_scale = map(np.asarray, model.latent.encode(params, state, batch.x))
    z = mean + np.exp(log_scale) * epsilon
    log_lik = [model.latent.log_likelihood(params, state, batch, jnp.asarray(one)) for one in z]
    log_q = scipy.stats.norm.logpdf(z, mean, np.exp(log_scale)).sum(-1)
    weights = np.asarray(log_lik) + scipy.stats.norm.logpdf(z).sum(-1) - log_q
    value, aux = jit(model.losses["vae"])(params, state, batch, key, 0)
    np.testing.assert_allclose(value, -np.log(np.exp(weights).mean(0)), rtol=1e-10)
    np.testing.assert_allclose(aux.metrics["log_likelihood"], np.mean(log_lik, 0), rtol=1e-10)


def test_a_loss_in_narrow_data_draws_what_it_draws_in_float32():
    model = linear_vae()
    x = jnp.ones((4, 6))
    one, other = (
        model.noise["vae"](jax.random.key(0), Batch(x.astype(dtype))).epsilon
        for dtype in ("bfloat16", "float32")
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "discrete", "continuous"])
def test_a_sample_is_drawn_from_a_latent_of_the_prior(kind):
    """And `draw` gives values of the data, as `sample` does."""
    spec = DataSpec((3, 2), kind, levels=4 if kind == "discrete" else None, n_classes=2)
    model = vae(spec, latent_dim=2, hidden=(4,))
    params, state = random_params(model)
    key_z, key_x = jax.random.split(jax.random.key(40))
    z, cond = jax.random.normal(key_z, (50, 2)), jnp.arange(50) % 2
    x = model.sample(params, state, jax.random.key(40), 50, cond)
    drawn = model.latent.draw(params, state, key_x, z, cond)
    np.testing.assert_array_equal(x, drawn)
    means = model.latent.sample_mean(params, state, key_z, 50, cond)
    np.testing.assert_array_equal(means, model.latent.decode(params, state, z, cond))
    assert (x.shape, x.dtype) == ((50, 3, 2), jnp.float32)
    if kind != "continuous":
        assert set(np.unique(x)) == set(range(spec.levels or 2))


def test_latents_are_described_as_data_are():
    spec = DataSpec((8, 8, 1), "binary", n_classes=3, class_names=("a", "b", "c"), name="pictures")
    latents = vae(spec, latent_dim=5, hidden=()).latent.spec
    assert (latents.shape, latents.kind) == ((5,), "continuous")
    assert latents.name == "latents of pictures"
    assert (latents.n_classes, latents.class_names) == (3, ("a", "b", "c"))
    assert vae(DataSpec((4,), "continuous", cond_dim=2), hidden=()).latent.spec.cond_dim == 2


def test_what_a_report_is_told():
    assert linear_vae().estimator == "ELBO, 1 sample"
    assert linear_vae(n_bound_samples=50).estimator == "importance-weighted bound, K=50"
    assert linear_vae().log_prob is None
    assert list(linear_vae().losses) == ["vae"]
