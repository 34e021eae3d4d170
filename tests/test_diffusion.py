"""Diffusion models: their loss whatever is predicted, conditions, samples and likelihoods.

The bound, discrete time and learned schedules are in test_diffusion_bound.py, weights and times in
test_weightings.py, bad settings in test_diffusion_settings.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from denoising_oracles import LABELLED, PATHS, PLANE, Normal, assert_mean, guided_model, jit
from gates import optimised

from genjax.families.diffusion import diffusion, x0_at_end
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import scan_steps
from genjax.nets.functional import Net
from genjax.parts.guidance import guided
from genjax.parts.paths import (
    PREDICTIONS,
    coefficients,
    cosine,
    diffuse,
    edm_prediction,
    input_scale,
    log_snr,
)
from genjax.parts.weightings import WEIGHTINGS, uniform_times
from genjax.protocol import Batch, DataSpec

IMAGE = DataSpec((4, 4, 1), "discrete", levels=5, name="squares")
DATA = Normal(0.3, 0.6)
PREDICTED = [*PREDICTIONS, "edm"]


def f64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)


# --- the loss -------------------------------------------------------------------------------------


def speaking(name, path, sigma_data):
    """A network that predicts `name` and means, by it, the best denoiser of other data than there
    are.
    """

    def apply(params, state, scaled, level, cond=None, dropped=None):
        t = path.time_of_log_snr(4 * level)
        x_t = scaled / input_scale(path, t, sigma_data)[:, None]
        kind = edm_prediction(sigma_data) if name == "edm" else PREDICTIONS[name]
        return kind.from_x0(path, DATA.denoise(path)(x_t, t), x_t, t), state

    return Net(lambda key: ({}, {}), apply)


def spoken(name):
    return {"precondition": "edm"} if name == "edm" else {"prediction": name}


@pytest.mark.slow
@pytest.mark.parametrize(
    "weighting",
    ["elbo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("min_snr", "edm"))],
)
def test_weighted_losses_are_the_same_whatever_is_predicted(x64, weighting):
    assert WEIGHTINGS.keys() == {"unit", "elbo", "min_snr", "edm"}
    path, x = PATHS["cosine"], jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)))

    def loss(name):
        model = diffusion(
            PLANE,
            net=speaking(name, path, 0.8),
            sigma_data=0.8,
            weighting=weighting,
            **spoken(name),
        )
        return model.losses["diffusion"](
            *model.init(jax.random.key(0)), Batch(x), jax.random.key(3), 0
        )[0]

    every = [np.asarray(value) for value in jit(lambda: [loss(name) for name in PREDICTED])()]
    for name, value in zip(PREDICTED, every, strict=True):
        np.testing.assert_allclose(value, every[0], rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_loss_at_init_is_known(x64):
    """A new network returns 0, so its loss is the square of the target, at the times and with the
    noise that the key gives.
    """
    path, n, x0 = PATHS["cosine"], 5, jnp.asarray(np.random.default_rng(4).normal(size=(5, 2)))
    models = {
        name: diffusion(PLANE, hidden=(4,), sigma_data=0.8, **spoken(name)) for name in PREDICTED
    }
    params, state = jit(models["v"].init)(jax.random.key(0))
    key_time, key_noise, _, _ = jax.random.split(jax.random.key(5), 4)
    t, epsilon = (
        uniform_times(key_time, path, n, x0.dtype),
        jax.random.normal(key_noise, x0.shape, x0.dtype),
    )
    alpha, sigma = (np.asarray(c) for c in coefficients(path, t, x0))
    s2 = (sigma / alpha) ** 2
    target = {
        "x0": x0,
        "epsilon": epsilon,
        "v": alpha * epsilon - sigma * x0,
        "score": -epsilon / sigma,
        "velocity": np.pi / 2 * (alpha * epsilon - sigma * x0),
        # (x0 - c_skip x_t / alpha) / c_out
        "edm": (x0 - 0.64 / (s2 + 0.64) * (x0 + np.sqrt(s2) * epsilon))
        / np.sqrt(s2 * 0.64 / (s2 + 0.64)),
    }

    def loss(p):
        return {
            name: m.losses["diffusion"](p, state, Batch(x0), jax.random.key(5), 0)
            for name, m in models.items()
        }

    for name, (value, aux) in jit(loss)(f64(params)).items():
        np.testing.assert_allclose(
            value, (np.asarray(target[name]) ** 2).sum(1), rtol=1e-8, err_msg=name
        )
        np.testing.assert_allclose(aux.metrics["mse"], value / 2, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (LABELLED, {"cond_dropout": 0.5}),
        (PLANE, {"weighting": "elbo", "noise_schedule": "linear"}),
        (PLANE, {"weighting": "elbo", "noise_schedule": "learned"}),
    ],
)
def test_the_loss_is_that_of_the_noise_that_it_says_it_draws(x64, spec, settings):
    """Recomputed from `noise` and the model's own estimate of x0: for v, ‖v - v̂‖² = ‖x0 - x̂0‖² /
    sigma², and the whole bound is ½ |dSNR/dt| ‖x0 - x̂0‖² and its two ends.
    """
    model = diffusion(spec, hidden=(4,), **settings)
    params, state = model.init(jax.random.key(0))
    rng, key = np.random.default_rng(22), jax.random.key(23)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape)), params
    )
    batch = Batch(DATA.sample(24, (20, 2)), jnp.arange(20) % 3 if spec.conditional else None)
    t, epsilon, dropped, end = model.noise["diffusion"](key, batch)
    assert (dropped is None) == (not spec.conditional)
    path = model.denoiser.path(params)
    denoise = functools.partial(
        model.denoiser.denoise, params, state, cond=batch.cond, dropped=dropped
    )
    x_t = diffuse(path, batch.x, epsilon, t)
    square = np.square(np.asarray(denoise(x_t, t) - batch.x)).sum(1)
    wanted = square / np.square(np.asarray(path.sigma(t)))
    if "weighting" in settings:

        def snr(t):
            return jnp.exp(log_snr(path, t))

        on_the_way = -0.5 * jax.vmap(jax.grad(snr))(t) * (path.start - path.end) * square
        at_start = 0.5 * snr(jnp.asarray(path.start, float)) * np.square(batch.x).sum(1)
        last = jnp.asarray(path.end, float)
        scale = float(path.sigma(last) / path.alpha(last))
        estimate = np.asarray(denoise(diffuse(path, batch.x, end, last), last))
        log_lik = scipy.stats.norm(estimate, scale).logpdf(np.asarray(batch.x)).sum(1)
        wanted = on_the_way + at_start - log_lik
    else:
        assert end is None
    found = jit(model.losses["diffusion"])(params, state, batch, key, 0)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


# --- conditions and guidance ----------------------------------------------------------------------

CLASSES = Normal(0.0, 0.5).net(n_classes=3, shift=2.0)


def test_conditions_are_dropped_at_the_rate_that_was_asked_for(x64):
    """An example without its condition costs the same whatever its class is."""
    rate, n = 0.3, 4000
    model = diffusion(LABELLED, net=CLASSES, prediction="x0", cond_dropout=rate)
    batch = Batch(jnp.zeros((n, 2)), jnp.zeros(n, jnp.int32))
    loss = jit(
        lambda cond: model.losses["diffusion"](
            *model.init(jax.random.key(0)), batch._replace(cond=cond), jax.random.key(7), 0
        )[0]
    )
    dropped = np.asarray(loss(batch.cond)) == np.asarray(loss(batch.cond + 1))
    assert abs(dropped.mean() - rate) < 3 * math.sqrt(rate * (1 - rate) / n)


def test_without_dropout_no_condition_is_dropped(x64):
    model = diffusion(LABELLED, net=CLASSES, prediction="x0")
    batch = Batch(jnp.zeros((500, 2)), jnp.zeros(500, jnp.int32))
    loss = jit(
        lambda cond: model.losses["diffusion"](
            *model.init(jax.random.key(0)), batch._replace(cond=cond), jax.random.key(7), 0
        )[0]
    )
    assert (np.asarray(loss(batch.cond)) != np.asarray(loss(batch.cond + 1))).all()


@pytest.mark.slow
def test_guidance_of_scale_1_is_the_conditional_model_and_0_the_unconditional_one():
    model, params, state = guided_model()
    cond = jnp.asarray([0, 1, 2, 1])
    made = jit(
        lambda cond, scale: model.denoiser.generate(
            params, state, jax.random.key(9), 4, cond, guidance=scale
        )
    )

    def make(cond, guidance=None):
        return np.asarray(made(cond, guidance))

    np.testing.assert_allclose(
        make(cond, guidance=1.0), make(cond), rtol=1e-4
    )  # two programs, so to rounding
    np.testing.assert_array_equal(make(cond, guidance=0.0), make((cond + 1) % 3, guidance=0.0))
    assert (make(cond) != make((cond + 1) % 3)).any(1).all()
    # The unconditional model is the network with every condition dropped.
    x_t, t = jnp.ones((4, 2)), jnp.asarray(0.4)
    denoise = jit(functools.partial(model.denoiser.denoise, params, state, x_t, t))
    np.testing.assert_array_equal(
        denoise(cond, jnp.ones(4, bool)), denoise((cond + 1) % 3, jnp.ones(4, bool))
    )
    given, without = (lambda x, t, d=d: denoise(cond, jnp.full(4, d)) for d in (False, True))
    for scale, alone in ((1.0, given), (0.0, without)):
        np.testing.assert_array_equal(guided(given, without, scale)(x_t, t), alone(x_t, t))
    some = denoise(cond, jnp.asarray([True, False, True, False]))
    np.testing.assert_allclose(some[1::2], denoise(cond)[1::2], rtol=1e-6)
    np.testing.assert_allclose(some[::2], denoise(cond, jnp.ones(4, bool))[::2], rtol=1e-6)


@pytest.mark.slow
def test_a_sample_of_continuous_data_is_the_end_of_the_path_without_its_scale():
    path, x_end = cosine(0.2), jnp.ones((3, 2))
    t = jnp.asarray(path.end)
    x = x0_at_end(DataSpec((2,), "continuous"), lambda x, t: 0 * x, path, x_end, t)
    np.testing.assert_allclose(x, 1 / np.cos(0.1 * np.pi), rtol=1e-5)
    x = x0_at_end(DataSpec((2,), "binary"), lambda x, t: 0 * x, path, x_end, t)
    np.testing.assert_array_equal(x, 0)  # the estimate


def test_builder_sets_how_samples_are_made():
    model, params, state = guided_model()
    cond, key = jnp.asarray([0, 1, 2, 1]), jax.random.key(10)
    how = {"solver": "ddim", "n_steps": 2, "grid": "uniform", "guidance": 2.0}
    other = diffusion(LABELLED, hidden=(8,), cond_dropout=0.2, **how)

    def draw(make, **how):
        return np.asarray(jit(lambda key: make(params, state, key, 4, cond, **how))(key))

    got = draw(other.sample)
    np.testing.assert_array_equal(got, draw(model.denoiser.generate, **how))
    assert (got != draw(model.sample)).any()


# --- samples and likelihoods of normal data -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{}, {"solver": "ancestral", "n_steps": 200}, {"noise_schedule": "linear", "grid": "log_snr"}],
)
def test_samples_of_the_best_denoiser_have_the_law_of_the_data(how):
    model = diffusion(PLANE, net=DATA.net(), prediction="x0", **how)
    x = np.asarray(
        jit(lambda key: model.sample({"diffusion": {"net": {}}}, {"diffusion": {}}, key, 4000))(
            jax.random.key(11)
        )
    )
    assert scipy.stats.kstest(x.ravel(), scipy.stats.norm(*DATA).cdf).pvalue > 1e-4
    assert abs(np.corrcoef(x.T)[0, 1]) < 4 / math.sqrt(4000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_probes": 2},
        pytest.param({"noise_schedule": "linear"}, marks=pytest.mark.slow),
        pytest.param({"noise_schedule": "learned", "weighting": "elbo"}, marks=pytest.mark.slow),
    ],
)
def test_log_prob_of_the_best_denoiser_is_that_of_the_data(x64, settings):
    model = diffusion(PLANE, net=DATA.net(), prediction="x0", n_likelihood_steps=60, **settings)
    params, state = f64(model.init(jax.random.key(0)))
    x = DATA.sample(12, (8, 2))
    nats = jit(model.log_prob)(params, state, Batch(x), jax.random.key(13))
    # Every Rademacher vector gives the exact divergence here, as the Jacobian of the best denoiser
    # is diagonal.
    path = model.denoiser.path(params)
    np.testing.assert_allclose(nats, DATA.ode_log_prob(path, x), atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        nats,
        DATA.log_prob(x),
        atol=0.05 if settings.get("noise_schedule") == "learned" else 0.01,
        rtol=0,
    )


def test_conditional_log_prob_is_that_of_the_class(x64):
    model = diffusion(LABELLED, net=CLASSES, prediction="x0", n_likelihood_steps=60)
    params, state = model.init(jax.random.key(0))
    labels = np.asarray([0, 1, 2, 2])
    x = Normal(2.0, 0.5).sample(14, (4, 2))
    nats = jit(model.log_prob)(params, state, Batch(x, jnp.asarray(labels)), jax.random.key(15))
    path = model.denoiser.path(params)
    want = [
        Normal(2.0 * (1 + label), 0.5).ode_log_prob(path, row[None])[0]
        for label, row in zip(labels, x, strict=True)
    ]
    np.testing.assert_allclose(nats, want, rtol=1e-5)


@pytest.mark.slow
def test_bound_is_below_log_prob_in_expectation(x64):
    model = diffusion(PLANE, net=Normal(0.1, 0.7).net(), prediction="x0", n_likelihood_steps=60)
    params, state = model.init(jax.random.key(0))
    batch = Batch(DATA.sample(16, (400, 2)))
    gap = jit(
        lambda key: (
            model.log_prob(params, state, batch, key) - model.bound(params, state, batch, key)
        )
    )(jax.random.key(17))
    assert np.mean(gap) > -4 * np.std(gap) / math.sqrt(400)
    assert_mean(gap, 0.0, slack=1e-3)  # for the best denoiser of any normal data it is tight


@pytest.mark.slow
def test_a_small_model_learns_normal_data_to_its_entropy():
    """KL(data || model) of a correlated normal in the plane falls below 0.02 nats, and log p
    nowhere exceeds the truth.
    """
    factor = np.asarray([[0.8, 0.0], [0.5, 0.3]], np.float32)
    model = diffusion(PLANE, hidden=(64, 64), n_likelihood_steps=40, sigma_data=0.7)
    t = training(model, optax.adam(optax.cosine_decay_schedule(3e-3, 2000)))

    def step(ts, key):
        return t.step(ts, Batch(jax.random.normal(key, (256, 2)) @ factor.T))[0], None

    fit = optimised(lambda key: jax.lax.scan(step, t.init(key), jax.random.split(key, 2000))[0])
    ts = fit(jax.random.key(0))
    x = np.random.default_rng(18).normal(size=(1000, 2)) @ factor.T
    truth = scipy.stats.multivariate_normal([0, 0], factor @ factor.T).logpdf(x)
    batch = Batch(jnp.asarray(x, jnp.float32))
    for score in (model.log_prob, model.bound):
        gap = truth - np.asarray(
            jax.jit(score)(eval_params(ts), ts.state, batch, jax.random.key(19)), np.float64
        )
        error = gap.std() / math.sqrt(len(gap))
        assert -4 * error < gap.mean() < 0.02 + 4 * error


# --- kinds of data --------------------------------------------------------------------------------


_DIT = {"net": "dit", "d_model": 4, "n_layers": 1, "n_heads": 2}
_LEARNED = {"noise_schedule": "learned", "weighting": "elbo"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (DataSpec((3,), "binary"), {}),
        (PLANE, {"noise_schedule": "edm", "precondition": "edm", "sigma_data": 0.5}),
        pytest.param(IMAGE, {"net": "unet", "channels": (4,)}, marks=pytest.mark.slow),
        pytest.param(IMAGE, {**_DIT, "n_times": 6, "solver": "ancestral"}, marks=pytest.mark.slow),
        pytest.param(DataSpec((2, 2), "discrete", levels=256), _LEARNED, marks=pytest.mark.slow),
    ],
)
def test_samples_are_legal_and_the_whole_way_ends_in_them(spec, settings):
    model = diffusion(spec, **{"hidden": (4,), "n_steps": 3, **settings})
    params, state = jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(20)
    params = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), params
    )
    both = jit(
        lambda key: [
            model.denoiser.generate(params, state, key, 50, every=every) for every in (False, True)
        ]
    )
    x, way = (np.asarray(v) for v in both(jax.random.key(21)))
    assert x.dtype == way.dtype == np.float32
    assert x.shape == (50, *spec.shape)
    assert way.shape == (4, 50, *spec.shape)
    np.testing.assert_allclose(way[-1], x, rtol=1e-5, atol=1e-5)
    assert len(np.unique(x.reshape(50, -1), axis=0)) > 1
    if spec.kind != "continuous":
        top = (spec.levels or 2) - 1
        assert set(np.unique(x)) <= set(range(top + 1))
        assert not (way[:-1] == np.round(way[:-1])).all()
    start = np.asarray(spec.normalize(jnp.asarray(way[0])))
    sigma = float(80.0 if settings.get("noise_schedule") == "edm" else 1.0)
    assert abs(start.std() / sigma - 1) < 4 / math.sqrt(2 * start.size)


def test_what_a_report_is_told():
    assert diffusion(PLANE).estimator == "probability-flow ODE, rk4 in 100 steps, exact divergence"
    assert diffusion(PLANE, n_probes=1).estimator.endswith("divergence by 1 random probe")
    assert diffusion(IMAGE, n_bound_samples=32).estimator == "variational bound, 32 noise levels"
    assert (
        diffusion(IMAGE, n_times=1000, n_bound_samples=32).estimator
        == "variational bound, 32 of 1000 steps"
    )
    assert (
        diffusion(IMAGE, n_times=20, n_bound_samples=32).estimator
        == "variational bound, 20 of 20 steps"
    )
    assert diffusion(PLANE).log_prob is not None
    assert diffusion(IMAGE).log_prob is None
    assert diffusion(DataSpec((3,), "binary")).log_prob is None


@pytest.mark.slow
@pytest.mark.parametrize("n_steps", [1, 2])
def test_hyperparameters_may_be_traced(n_steps):
    """Every float setting can be an axis of a sweep."""

    def first(sigma_data, cond_dropout, p_mean):
        settings = {
            "sigma_data": sigma_data,
            "cond_dropout": cond_dropout,
            "p_mean": p_mean,
            "p_std": p_mean + 3,
        }
        model = diffusion(
            LABELLED, noise_schedule="edm", precondition="edm", hidden=(4,), **settings
        )
        t = scan_steps(training(model, optax.sgd(1e-2)))
        batch = Batch(jnp.ones((n_steps, 4, 2)), jnp.zeros((n_steps, 4), jnp.int32))
        return t.step(t.init(jax.random.key(0)), batch)[1]["diffusion/loss"]

    rates = jnp.asarray([0.3, 0.5])
    values = np.asarray(jit(jax.vmap(first))(rates, rates, -rates))
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == values.size
