"""A prior that is a model: `prior_of` against the normal prior and against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from vae_oracles import (
    SHIFT,
    WIDEN,
    assert_mean,
    check_moments,
    f64,
    jit,
    linear_params,
    linear_vae,
    log_marginal,
    open_normal,
    over_keys,
    ppca,
)

from genjax.checks import checked
from genjax.errors import ConfigError
from genjax.families.cnf import cnf
from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.families.gan import gan
from genjax.families.vae import vae
from genjax.learning.step import training
from genjax.learning.transforms import repeat_steps
from genjax.parts.priors import prior_of
from genjax.protocol import Aux, Batch, DataSpec, Model

KEY = jax.random.key(0)
MEANS = np.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.0]])


def gaussian(d=2, score="log_prob", noisy=0.0, **condition):
    """N(mean + c·table + offset, I): `mean` and `table` are parameters, `offset` is in the state.
    A bound is ln p plus noise of mean 0.
    """
    spec = DataSpec((d,), "continuous", name="points", **condition)

    def init(key):
        own = {"mean": jnp.zeros(d), "table": jnp.zeros((max(spec.cond_size, 1), d))}
        return {"gauss": own}, {"gauss": {"offset": jnp.zeros(d)}}

    def mean_of(params, state, cond, n):
        own = params["gauss"]
        mean = jnp.broadcast_to(own["mean"] + state["gauss"]["offset"], (n, d))
        return mean if cond is None else mean + spec.embed(cond).astype(mean.dtype) @ own["table"]

    def log_prob(params, state, batch, key):
        mean = mean_of(params, state, batch.cond, len(batch.x))
        exact = jnp.sum(jax.scipy.stats.norm.logpdf(batch.x, mean), axis=1)
        return exact + noisy * jax.random.normal(key, exact.shape, exact.dtype)

    def loss(params, state, batch, key, step):
        return -log_prob(params, state, batch, key), Aux(state, {})

    def sample(params, state, key, n, cond=None):
        mean = mean_of(params, state, cond, n)
        return mean + jax.random.normal(key, (n, d), mean.dtype)

    return checked(Model(spec, init, {"gauss": loss}, sample, **{score: log_prob}))


def zeros(model):
    """Parameters and state that are all 0."""
    shapes = jax.eval_shape(model.init, KEY)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def params_with(prior, **moved):
    """The linear model's parameters, with those of a Gaussian prior that are 0 but for some."""
    params, _ = linear_params(ppca(), SHIFT, WIDEN)
    own, held = jax.tree.map(jnp.zeros_like, f64(prior.init(KEY)))
    params["vae"]["prior"] = {"gauss": {**own["gauss"], **jax.tree.map(jnp.asarray, moved)}}
    return params, {"vae": held}


# --- the same as what is known --------------------------------------------------------------------


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 6])
@pytest.mark.slow
def test_a_model_of_the_normal_is_the_normal_prior(x64, k):
    """Draw by draw, with the KL by Monte Carlo; and its samples are those of the normal prior."""
    p, prior = ppca(), prior_of(gaussian())
    assert prior.exact
    assert prior.kl is None
    ours = linear_vae(prior=prior, n_samples=k, n_bound_samples=k)
    known = linear_vae(prior=open_normal(), n_samples=k, n_bound_samples=k)
    params, state = params_with(prior)
    plain, none = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))

    def everything(model, params, state):
        value, aux = model.losses["vae"](params, state, batch, KEY, 0)
        bound, x = model.bound(params, state, batch, KEY), model.sample(params, state, KEY, 4)
        return value, aux.metrics, bound, x

    found = jit(partial(everything, ours))(params, state)
    wanted = jit(partial(everything, known))(plain, none)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_parameters_and_state_of_the_model_are_part_of_those_of_the_vae():
    prior = prior_of(gaussian())
    params, state = linear_vae(prior=prior).init(KEY)
    own, held = prior.init(KEY)
    assert jax.tree.structure(params["vae"]["prior"]) == jax.tree.structure(own)
    assert jax.tree.structure(state) == jax.tree.structure({"vae": held})
    # The known priors have no state, as in checkpoints from before there was one.
    for name in ("normal", "vamp"):
        assert linear_vae(prior=name).init(KEY)[1] == {"vae": {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "gradient", ["pathwise", *(pytest.param(g, marks=pytest.mark.slow) for g in ("stl", "dreg"))]
)
def test_the_models_parameters_learn_through_its_density(x64, gradient):
    """∂/∂mean of -ln N(z; mean, I) is mean - z, for the z that the noise says."""
    p, prior = ppca(), prior_of(gaussian())
    model = linear_vae(prior=prior, gradient=gradient)
    params, state = params_with(prior, mean=np.array([0.3, -0.7]))
    state["vae"]["gauss"]["offset"] = jnp.asarray([0.1, 0.2])
    batch = Batch(jnp.asarray(p.x[:5]))

    def loss(params):
        value, aux = model.losses["vae"](params, state, batch, KEY, 0)
        return value.sum(), aux.state

    grads, after = jit(jax.grad(loss, has_aux=True))(params)
    mean, log_scale = model.latent.encode(params, state, batch.x)
    z = mean + np.exp(log_scale) * model.noise["vae"](KEY, batch).epsilon[0]
    found = grads["vae"]["prior"]["gauss"]["mean"]
    np.testing.assert_allclose(found, (np.array([0.4, -0.5]) - np.asarray(z)).sum(0), rtol=1e-9)
    jax.tree.map(np.testing.assert_array_equal, after, state)  # it is read and never changed


@pytest.mark.slow
def test_training_moves_the_prior_to_where_the_latents_are(x64):
    """With all else held, the best mean is that of z, which is that of the posterior means."""
    p, prior = ppca(), prior_of(gaussian())
    model = linear_vae(prior=prior)
    params, state = params_with(prior)
    own = params["vae"]
    bias = own["encoder"]["layers"][0]["bias"]
    own["encoder"]["layers"][0]["bias"] = bias.at[:2].add(4.0)
    labels = {name: "prior" if name == "prior" else "held" for name in own}
    rate = optax.cosine_decay_schedule(0.3, 200)
    rates = {"prior": optax.adam(rate), "held": optax.set_to_zero()}
    t = training(model, optax.multi_transform(rates, labels))
    ts = t.init(KEY)._replace(params=params, state=state)
    batch = Batch(jnp.asarray(p.x))
    ts, metrics = jit(repeat_steps(t, 200).step)(ts, batch)
    found = ts.params["vae"]["prior"]["gauss"]["mean"]
    wanted = 4 + SHIFT * np.sqrt(p.variance)
    np.testing.assert_allclose(found, wanted, atol=0.03)
    assert metrics["vae/kl"][-1] < metrics["vae/kl"][0] - 10
    jax.tree.map(np.testing.assert_array_equal, ts.params["vae"]["encoder"], own["encoder"])


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "k"),
    [
        ("label", 3),
        pytest.param("label", 1, marks=pytest.mark.slow),
        pytest.param("vector", 3, marks=pytest.mark.slow),
    ],
)
def test_a_conditional_prior_gets_the_condition_of_each_example(x64, form, k):
    p = ppca()
    condition = {"n_classes": 3} if form == "label" else {"cond_dim": 3}
    prior = prior_of(gaussian(**condition))
    model = vae(
        DataSpec((6,), "continuous", **condition),
        latent_dim=2,
        hidden=(),
        prior=prior,
        n_samples=k,
        gradient="stl",
    )
    params, state = params_with(prior, table=MEANS)
    for name, rows in (("encoder", 4), ("decoder", 6)):  # of the condition, without effect
        layer = params["vae"][name]["layers"][0]
        layer["kernel"] = jnp.concatenate([layer["kernel"], jnp.zeros((3, rows))])
    labels = np.array([0, 2, 1, 1, 0])
    cond = jnp.asarray(labels if form == "label" else np.eye(3)[labels])
    batch = Batch(jnp.asarray(p.x[:5]), cond)
    _, aux = jit(model.losses["vae"])(params, state, batch, KEY, 0)
    mean, log_scale = map(np.asarray, model.latent.encode(params, state, batch.x, cond))
    z = mean + np.exp(log_scale) * np.asarray(model.noise["vae"](KEY, batch).epsilon)
    log_q = scipy.stats.norm.logpdf(z, mean, np.exp(log_scale)).sum(-1)
    log_p = scipy.stats.norm.logpdf(z, MEANS[labels]).sum(-1)
    np.testing.assert_allclose(aux.metrics["kl"], (log_q - log_p).mean(0), rtol=1e-9)
    # Samples of a class are those of a prior around its mean.
    n = 4000
    cond = jnp.broadcast_to(cond[1], (n, *cond.shape[1:]))
    x = np.asarray(jit(model.sample, static_argnums=3)(params, state, KEY, n, cond))
    noise = p.noise * np.eye(6)
    check_moments(x, p.offset + p.weights @ MEANS[2], p.weights @ p.weights.T + noise)


@pytest.mark.slow
def test_an_unconditional_prior_leaves_the_condition_alone(x64):
    """And the evidence is that of the linear model with a moved prior."""
    p, prior = ppca(), prior_of(gaussian())
    params, state = params_with(prior, mean=np.array([1.0, -0.5]))
    for name, rows in (("encoder", 4), ("decoder", 6)):
        layer = params["vae"][name]["layers"][0]
        layer["kernel"] = jnp.concatenate([layer["kernel"], jnp.zeros((3, rows))])
    spec = DataSpec((6,), "continuous", n_classes=3)
    model = vae(spec, latent_dim=2, hidden=(), prior=prior, n_bound_samples=64)
    batch = Batch(jnp.asarray(p.x[:5]), jnp.asarray([0, 1, 2, 0, 1]))
    value = over_keys(lambda key: model.bound(params, state, batch, key), 1, 1000)
    offset = p.offset + p.weights @ np.array([1.0, -0.5])
    assert_mean(np.exp(value - log_marginal(p.x[:5], p.weights, offset, p.noise)), 1.0)


# --- bounds ---------------------------------------------------------------------------------------


def test_a_prior_with_a_bound_only_is_not_exact_and_has_a_key_of_its_own(x64):
    """Its noise is neither that of z nor shared between the terms; the ELBO is what it says."""
    p, prior = ppca(), prior_of(gaussian(score="bound", noisy=1.0))
    assert not prior.exact
    model, known = linear_vae(prior=prior), linear_vae(prior=open_normal())
    params, state = params_with(prior)
    plain, none = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))

    def both(key):
        found = model.bound(params, state, batch, key)
        return found - known.bound(plain, none, batch, key), model.noise["vae"](key, batch).epsilon

    extra, epsilon = over_keys(both, 2, 3000)
    assert_mean(extra, 0.0)
    np.testing.assert_allclose(extra.std(0), 1.0, atol=0.06)
    for i in range(2):
        correlation = np.corrcoef(extra[:, 0], epsilon[:, 0, 0, i])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(len(extra))


def test_many_samples_need_a_density():
    prior = prior_of(gaussian(score="bound"))
    linear_vae(prior=prior, gradient="dreg")
    for name in ("n_samples", "n_bound_samples"):
        with pytest.raises(ConfigError, match=f"{name}=2 needs .* log-mean-exp of bounds is no bo"):
            linear_vae(prior=prior, **{name: 2})


def test_an_estimate_by_random_probes_is_no_density():
    """Its noise would raise a bound of several samples above ln p(x)."""
    points = DataSpec((2,), "continuous")
    for family in (cnf, diffusion, flow_matching):
        assert not prior_of(family(points, hidden=(2,), n_probes=1)).exact
        assert prior_of(family(points, hidden=(2,), n_probes=0)).exact


# --- bad input ------------------------------------------------------------------------------------


def test_models_that_make_no_prior():
    image = vae(DataSpec((4, 4, 1), "binary", name="digits"), hidden=())
    with pytest.raises(ConfigError, match=r"shape \(d,\); digits is binary of shape \(4, 4, 1\)"):
        prior_of(image)
    with pytest.raises(ConfigError, match="points has neither log_prob nor bound"):
        prior_of(gan(DataSpec((2,), "continuous", name="points"), hidden=()))


@pytest.mark.slow
def test_priors_of_another_size_or_condition():
    wide = linear_vae(prior=prior_of(gaussian(d=3)))
    params, state = zeros(wide)
    batch = Batch(jnp.ones((4, 6)))
    with pytest.raises(ConfigError, match=r"of 3 dimensions, and z has 2\. Say latent_dim=3"):
        wide.losses["vae"](params, state, batch, KEY, 0)
    with pytest.raises(ConfigError, match=r"must draw z of shape \[5, 2\]; got \[5, 3\]"):
        wide.sample(params, state, KEY, 5)
    plain = linear_vae(prior=prior_of(gaussian(n_classes=4)))
    params, state = zeros(plain)
    with pytest.raises(ConfigError, match=r"condition of size 4, and the model .* one of size 0"):
        plain.bound(params, state, batch, KEY)
    spec = DataSpec((6,), "continuous", n_classes=3)
    other = vae(spec, latent_dim=2, hidden=(), prior=prior_of(gaussian(n_classes=4)))
    params, state = zeros(other)
    with pytest.raises(ConfigError, match=r"condition of size 4, and the model .* one of size 3"):
        other.sample(params, state, KEY, 2, jnp.asarray([0, 1]))


def test_another_beginning():
    prior = prior_of(gaussian())
    trained = prior.init(KEY)
    trained[0]["gauss"]["mean"] = jnp.full(2, 7.0)
    model = linear_vae(prior=prior._replace(init=lambda key: trained))
    np.testing.assert_array_equal(model.init(KEY)[0]["vae"]["prior"]["gauss"]["mean"], 7.0)


def test_a_vector_that_is_standardised_already_is_not_so_twice():
    """A VAE hands its prior the condition as its networks see it; the model takes it in its own
    units.
    """
    prior_spec = {"cond_dim": 1, "cond_shift": (100.0,), "cond_scale": (10.0,)}
    model = gaussian(**prior_spec)
    params, state = model.init(KEY)
    params["gauss"]["table"] = params["gauss"]["table"] + 1.5
    z, c = jnp.ones((1, 2)), jnp.array([[110.0]])
    wanted = model.log_prob(params, state, Batch(z, c), KEY)
    seen = model.spec.embed(c)
    np.testing.assert_allclose(seen, [[1.0]])
    found = prior_of(model).log_prob(params, state, None, z[None], seen[None], KEY)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)
