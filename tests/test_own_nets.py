"""Networks of a user's own in the place of those that are here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from gates import quick

import genjax
from genjax import DataSpec, diffusion, example_batch, flow_matching, training, vae
from genjax.errors import ConfigError
from genjax.nets.functional import Net

POINTS = DataSpec((3,), "continuous")
CLASSES = DataSpec((3,), "continuous", n_classes=4)
BITS = DataSpec((4, 4, 1), "binary", n_classes=2)


class Linen(linen.Module):
    """(x, ...) -> [n, *shape], of everything that it is given."""

    shape: tuple[int, ...]

    @linen.compact
    def __call__(self, x, *rest):
        n = x.shape[0]
        parts = [x.reshape(n, -1), *(jnp.reshape(one, (n, -1)) for one in rest)]
        h = jnp.concatenate([part.astype(x.dtype) for part in parts], axis=1)
        h = jnp.tanh(linen.Dense(8)(h))
        return linen.Dense(int(np.prod(self.shape)))(h).reshape(n, *self.shape)


class Module(nnx.Module):
    def __init__(self, sizes=(4, 3), *, rngs):
        self.dense = nnx.Linear(*sizes, rngs=rngs)

    def __call__(self, x, noise_level):
        return self.dense(jnp.concatenate([x, noise_level[:, None]], axis=1))


def runs(model, player):
    """A step, a sample and a score of a model, all finite; and the shapes of its parameters."""
    t = training(model, optax.adam(1e-2))
    ts = quick(t.init)(jax.random.key(0))
    batch = example_batch(model.spec, jax.random.key(1), 8)
    new, metrics = quick(t.step)(ts, batch)
    assert np.isfinite(metrics[f"{player}/loss"])
    moved = [
        bool(jnp.any(a != b))
        for a, b in zip(*map(jax.tree.leaves, (ts.params, new.params)), strict=True)
    ]
    assert any(moved)
    x = quick(model.sample, static_argnames="n")(
        new.params, new.state, jax.random.key(2), n=8, cond=batch.cond
    )
    assert x.shape == batch.x.shape
    assert np.isfinite(x).all()
    return new


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "guided"), [(POINTS, False), (CLASSES, False), (CLASSES, True)])
@pytest.mark.parametrize("family", [diffusion, flow_matching])
def test_a_denoiser_is_called_with_what_there_is(family, spec, guided):
    model = family(spec, net=Linen((3,)), n_steps=2, cond_dropout=0.5 if guided else 0.0)
    new = runs(model, next(iter(model.losses)))
    # x, the noise level, the class, whether it was dropped.
    first = [leaf.shape for leaf in jax.tree.leaves(new.params) if leaf.ndim == 2]
    assert (3 + 1 + (4 if spec.conditional else 0) + guided, 8) in first


@pytest.mark.slow
@pytest.mark.parametrize("family", [diffusion, flow_matching])
def test_a_class_or_a_function_that_makes_an_nnx_module(family):
    model = family(POINTS, net=Module, n_steps=2)
    runs(model, next(iter(model.losses)))
    same = family(POINTS, net=lambda rngs: Module((4, 3), rngs=rngs), n_steps=2)
    for a, b in zip(
        *(jax.tree.leaves(one.init(jax.random.key(0))) for one in (model, same)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [POINTS, BITS], ids=["points", "conditional images"])
def test_an_encoder_and_a_decoder_of_ones_own(spec):
    encoder, decoder = Linen((4,)), Linen((*spec.shape, 1))
    model = vae(spec, latent_dim=2, encoder=encoder, decoder=decoder)
    new = runs(model, "vae")
    batch = example_batch(spec, jax.random.key(3), 5)
    bound = model.bound(new.params, new.state, batch, jax.random.key(4))
    assert bound.shape == (5,)
    # By hand: what the module says is the posterior, and the likelihood's outputs.
    p = new.params["vae"]
    given = [spec.normalize(batch.x)] + ([spec.embed(batch.cond)] if spec.conditional else [])
    raw = encoder.apply({"params": p["encoder"]}, *given)
    mean, log_scale = model.latent.encode(new.params, new.state, batch.x, batch.cond)
    np.testing.assert_allclose(mean, raw[:, :2], rtol=1e-6)
    np.testing.assert_allclose(log_scale, raw[:, 2:], rtol=1e-6)
    out = decoder.apply({"params": p["decoder"]}, mean, *given[1:])[..., 0]
    wanted = jax.nn.sigmoid(out) if spec.kind == "binary" else out
    found = model.latent.decode(new.params, new.state, mean, batch.cond)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    # One of them alone is taken as well.
    runs(vae(spec, latent_dim=2, encoder=encoder, hidden=(4,)), "vae")
    runs(vae(spec, latent_dim=2, decoder=decoder, hidden=(4,)), "vae")


@pytest.mark.slow
def test_a_model_with_a_network_of_ones_own_is_trained_as_any_other():
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    model = flow_matching(POINTS, net=Linen((3,)), n_steps=2)
    run = genjax.train(model, x, steps=4, steps_per_call=2, batch_size=8)
    assert run.sample(5).shape == (5, 3)


class Normalised(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, noise_level):
        return self.norm(x)


class Dropping(nnx.Module):
    def __init__(self, *, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, noise_level):
        return self.drop(x)


class LinenNormalised(linen.Module):
    @linen.compact
    def __call__(self, x, noise_level):
        return linen.BatchNorm(use_running_average=True)(x)


class LinenDropping(linen.Module):
    @linen.compact
    def __call__(self, x, noise_level):
        return linen.Dropout(0.5, deterministic=False)(x)


class Quiet(linen.Module):
    @linen.compact
    def __call__(self, x, noise_level):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=True)(x))


class OneInput(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Normalised, r"keeps a state .*LayerNorm"),
        (LinenNormalised(), r"keeps a state .*LayerNorm"),
        (Dropping, r"draws random numbers .*deterministic=True"),
        (LinenDropping(), r"draws random numbers .*deterministic=True"),
        (Linen((4,)), r"must be \(x \[n, 3\], noise_level \[n\]\) -> \[n, 3\]; it returns"),
        (OneInput(), r"is called as \(x \[n, 3\], noise_level \[n\]\) -> \[n, 3\], which failed"),
        (Linen, r"Linen is a class: give an object of it, Linen\("),
        (Module(rngs=nnx.Rngs(0)), r"has its weights already.*lambda rngs: Module"),
        (lambda rngs: 3, r"which failed|must be"),
        (len, r"which failed|must be"),
    ],
)
def test_what_is_no_network_for_it_is_refused_as_the_model_is_built(network, message):
    with pytest.raises(ConfigError, match=message):
        diffusion(POINTS, net=network)


@pytest.mark.slow
def test_the_advice_on_dropout_works():
    runs(diffusion(POINTS, net=Quiet(), n_steps=2), "diffusion")


def test_a_name_that_is_none_is_still_a_name():
    with pytest.raises(ConfigError, match=r"(?i)net.*'mpl'.*mlp"):
        diffusion(POINTS, net="mpl")


@pytest.mark.parametrize("encoder", [
    linen.Dense(4, dtype=jnp.bfloat16),
    lambda rngs: nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=rngs),
])  # fmt: skip
def test_whatever_a_network_computes_in_losses_are_float32(encoder):
    model = vae(POINTS, latent_dim=2, hidden=(4,), encoder=encoder)
    params, state = model.init(jax.random.key(0))
    batch = example_batch(POINTS, jax.random.key(1), 2)
    step = jnp.zeros((), jnp.int32)
    value, aux = model.losses["vae"](params, state, batch, jax.random.key(2), step)
    assert {leaf.dtype for leaf in (value, *aux.metrics.values())} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("output", "state", "message"),
    [
        ((1,), {}, r"The Net must be .* it returns \[n, 1\]"),
        ((), {}, r"it returns \[n\]"),
        ((3,), {"mean": np.zeros(3, np.float32)}, "The Net keeps a state"),
    ],
)
@pytest.mark.parametrize("family", [diffusion, flow_matching])
def test_a_net_that_does_not_fit_is_refused_as_the_model_is_built(family, output, state, message):
    """What is broadcast in a loss would be trained without a word."""
    net = Net(lambda key: ({}, state), lambda p, s, x, *rest: (jnp.zeros((len(x), *output)), s))
    with pytest.raises(ConfigError, match=message):
        family(CLASSES, net=net, cond_dropout=0.1)
