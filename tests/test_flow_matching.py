"""Flow matching against Gaussian data, whose velocity, density and least loss are known in closed
form.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flow_oracles import (
    COVARIANCE,
    MEAN,
    NODES,
    POINTS,
    WEIGHTS,
    D,
    closed_form,
    conditional,
    every_path,
    gaussian,
    gaussian_velocity,
    normal_batch,
    time_of,
)
from gates import optimised

from genjax.families.flow_matching import (
    LOSSES,
    PATHS,
    TIMES,
    flow_matching,
    line_velocity,
    noise_level,
)
from genjax.parts.likelihoods import dequantized_bound
from genjax.parts.paths import PREDICTIONS, diffuse, score_of, velocity_of
from genjax.protocol import Batch, DataSpec

# --- the velocity ---------------------------------------------------------------------------------


@every_path
def test_a_network_is_told_the_noise_level_of_every_time(name, x64):
    t = jnp.linspace(0, 1, 101)
    level = noise_level(PATHS[name](), t)
    np.testing.assert_allclose(time_of(name, level), t, atol=1e-10)
    assert (np.diff(level) < 0).all()
    assert 2.9 < float(level[0]) < 3.1
    assert -3.1 < float(level[-1]) < -2.9


@pytest.mark.slow
@every_path
def test_velocity_score_and_x0_of_gaussian_data_are_one(name, x64):
    path, x = PATHS[name](), jnp.asarray(np.random.default_rng(1).normal(size=(7, D)))
    model, params, state = gaussian(name)
    for t in (0.03, 0.4, 0.97):
        alpha, sigma = float(path.alpha(jnp.asarray(t))), float(path.sigma(jnp.asarray(t)))
        total = alpha**2 * COVARIANCE + sigma**2 * np.eye(D)
        score = -np.linalg.solve(total, (np.asarray(x) - alpha * MEAN).T).T
        x0 = MEAN + alpha * (np.asarray(x) - alpha * MEAN) @ np.linalg.solve(total, COVARIANCE)
        velocity = model.extras.velocity(params, state, x, t)
        found = model.denoiser.denoise(params, state, x, t)
        np.testing.assert_allclose(found, x0, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(score_of(path, found, x, t), score, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(
            PREDICTIONS["score"].to_x0(path, jnp.asarray(score), x, t), x0, rtol=1e-8, atol=1e-9
        )
        np.testing.assert_allclose(
            velocity_of(path, jnp.asarray(x0), x, t), velocity, rtol=1e-7, atol=1e-8
        )


@every_path
def test_the_velocity_of_a_line_is_its_derivative(name, x64):
    path, (x0, epsilon) = (
        PATHS[name](),
        jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 2, 2))),
    )
    t = jnp.asarray([0.0, 0.1, 0.5, 0.9, 1.0])
    _, wanted = jax.jvp(lambda t: diffuse(path, x0, epsilon, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(line_velocity(path, x0, epsilon, t), wanted, rtol=1e-12)


def least_losses(name, loss, times):
    """∫ w(t) p(t) trace Cov(alpha' x0 + sigma' ε | x_t) dt: what the best of all networks costs on
    Gaussian data.
    """
    path, variances, total = PATHS[name](), np.linalg.eigvalsh(COVARIANCE), 0.0
    for t, weight in zip(NODES, WEIGHTS, strict=True):
        t = jnp.asarray(t)
        (a, s), (da, ds) = (
            (path.alpha(t), path.sigma(t)),
            (jax.grad(path.alpha)(t), jax.grad(path.sigma)(t)),
        )
        left = np.asarray(
            [
                da * da * v + ds * ds - (a * da * v + s * ds) ** 2 / (a * a * v + s * s)
                for v in variances
            ]
        ).sum()
        scale = (s / (a * ds - da * s)) ** 2 if loss == "x0" else 1.0
        logit = np.log(float(t) / (1 - float(t)))
        density = (
            scipy.stats.norm.pdf(logit) / float(t * (1 - t)) if times == "logit_normal" else 1.0
        )
        total += weight * density * float(scale) * left
    return total


@pytest.mark.slow
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("times", list(TIMES))
@every_path
def test_the_least_loss_is_the_conditional_variance(name, times, loss, x64):
    """And any other velocity costs more, by the square of what it is off: the regression finds the
    conditional mean.
    """
    batch, key = normal_batch(40_000), jax.random.key(3)
    model, params, state = gaussian(name, loss=loss, times=times)
    value = np.asarray(model.losses["flow"](params, state, batch, key, 0)[0])
    assert abs(value.mean() - least_losses(name, loss, times)) < 4 * value.std() / math.sqrt(
        len(value)
    )
    if loss == "velocity":
        off = closed_form(name, lambda *args: gaussian_velocity(*args) + 0.3)
        other = flow_matching(POINTS, probability_path=name, net=off, times=times)
        more = np.asarray(other.losses["flow"](params, state, batch, key, 0)[0]) - value
        assert abs(more.mean() - D * 0.3**2) < 4 * more.std() / math.sqrt(len(more))


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "unet", "dit"])
def test_a_new_network_costs_what_a_velocity_of_zero_does(net):
    """E‖x0 - ε‖² = ‖x0‖² + D for every example: each is drawn many times with other noise."""
    spec = DataSpec((4, 4, 1), "continuous")
    model = flow_matching(
        spec, net=net, hidden=(4,), channels=(4, 4), d_model=8, n_layers=1, n_heads=1
    )
    params, state = model.init(jax.random.key(0))
    x = np.random.default_rng(4).normal(size=(2, 4, 4, 1)).astype(np.float32)
    batch = Batch(jnp.asarray(np.repeat(x, 500, axis=0)))
    value, aux = jax.jit(model.losses["flow"])(params, state, batch, jax.random.key(5), 0)
    np.testing.assert_allclose(aux.metrics["mse"], value / 16, rtol=1e-6)
    for found, one in zip(np.asarray(value).reshape(2, 500), x, strict=True):
        assert abs(found.mean() - (np.square(one).sum() + 16)) < 4 * found.std() / math.sqrt(500)


@pytest.mark.slow
@every_path
def test_the_loss_is_that_of_the_noise_that_it_says_it_draws(name, x64):
    """Recomputed from `noise` with the model's own velocity: pairs, times and dropped conditions
    are all there is to it.
    """
    model, params, state = conditional(probability_path=name, coupling="optimal", loss="x0")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    rng, key = np.random.default_rng(10), jax.random.key(6)
    batch = Batch(jnp.asarray(rng.normal(size=(30, 2))), jnp.arange(30) % 3)
    t, epsilon, dropped, u = model.noise["flow"](key, batch)
    assert u is None
    assert 0 < int(dropped.sum()) < 30
    path = model.denoiser.path(params)
    x_t = diffuse(path, batch.x, epsilon, t)
    x0 = model.denoiser.denoise(params, state, x_t, t, batch.cond, dropped)
    wanted = np.square(np.asarray(x0 - batch.x)).sum(1)
    found = jax.jit(model.losses["flow"])(params, state, batch, key, 0)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.slow
def test_noise_is_drawn_with_keys_that_do_not_change():
    """Whoever has an old run's key draws what that run drew."""
    spec = DataSpec((3,), "discrete", levels=5, n_classes=2)
    model = flow_matching(spec, hidden=(4,), cond_dropout=0.5)
    batch = Batch(jnp.ones((8, 3)), jnp.arange(8) % 2)
    noise = model.noise["flow"](jax.random.key(3), batch)
    key_noise, _, key_data, key_cond, key_time = jax.random.split(jax.random.key(3), 5)
    np.testing.assert_array_equal(noise.epsilon, jax.random.normal(key_noise, (8, 3)))
    np.testing.assert_array_equal(noise.u, jax.random.uniform(key_data, (8, 3)) - 0.5)
    np.testing.assert_array_equal(noise.dropped, jax.random.bernoulli(key_cond, 0.5, (8,)))
    np.testing.assert_array_equal(noise.t, jax.random.uniform(key_time, (8,)))


# --- samples and densities ------------------------------------------------------------------------


@pytest.mark.slow
@every_path
def test_noise_is_carried_to_its_place_in_the_data(name, x64):
    """For Gaussian data with a diagonal covariance the flow ends at mean + sd ε, for whatever ε it
    began with.
    """
    root = np.diag([0.3, 1.0, 2.0])
    net = closed_form(name, functools.partial(gaussian_velocity, root=root))
    model = flow_matching(POINTS, probability_path=name, net=net, solver="rk4", n_steps=60)
    generate = jax.jit(
        model.denoiser.generate, static_argnames=("n", "every", "n_steps", "solver", "grid")
    )
    path = generate({"flow": {}}, {"flow": {}}, jax.random.key(0), n=50, every=True)
    path = np.asarray(path)
    assert path.shape == (61, 50, D)
    np.testing.assert_allclose(path[-1], MEAN + path[0] @ root, atol=2e-5)
    np.testing.assert_allclose(
        path[-1],
        generate({"flow": {}}, {"flow": {}}, jax.random.key(0), n=50),
        rtol=1e-12,
        atol=1e-12,
    )
    few = generate(
        {"flow": {}},
        {"flow": {}},
        jax.random.key(0),
        n=50,
        solver="heun",
        n_steps=5,
        grid="cosine",
        every=True,
    )
    np.testing.assert_allclose(few[0], path[0], rtol=1e-12)
    assert 1e-4 < np.abs(few[-1] - path[-1]).max() < 0.5


@pytest.mark.slow
@every_path
def test_log_prob_is_the_density_and_probes_estimate_it_without_bias(name, x64):
    batch = normal_batch(6, seed=1)
    wanted = scipy.stats.multivariate_normal(MEAN, COVARIANCE).logpdf(np.asarray(batch.x))
    model, params, state = gaussian(name, n_likelihood_steps=100)
    exact = np.asarray(jax.jit(model.log_prob)(params, state, batch, jax.random.key(0)))
    np.testing.assert_allclose(exact, wanted, atol=1e-4)
    assert model.estimator == "ODE, rk4 in 100 steps, exact divergence"
    model, *_ = gaussian(name, n_likelihood_steps=20, n_probes=2)
    few, *_ = gaussian(name, n_likelihood_steps=20)
    keys = jax.random.split(jax.random.key(1), 200)
    drawn = np.asarray(
        jax.jit(jax.vmap(lambda key: model.log_prob(params, state, batch, key)))(keys)
    )
    exact = np.asarray(few.log_prob(params, state, batch, keys[0]))
    assert (drawn.std(0) > 1e-3).all()
    assert (np.abs(drawn.mean(0) - exact) < 4 * drawn.std(0) / math.sqrt(len(keys))).all()
    assert model.estimator == "ODE, rk4 in 20 steps, divergence by 2 random probes"


@pytest.mark.slow
def test_a_translation_takes_one_euler_step(x64):
    """Pairs (ε + m, ε): the velocity is -m everywhere, its loss is 0, and one step carries noise
    all the way.
    """
    net = closed_form(
        "conditional_ot", lambda p, path, x, t: jnp.broadcast_to(-jnp.asarray(MEAN), x.shape)
    )
    model = flow_matching(POINTS, net=net, solver="euler", n_steps=1)
    epsilon = np.random.default_rng(5).normal(size=(20, D))
    pairs = jnp.asarray(epsilon + MEAN), jnp.asarray(epsilon)
    t = jnp.linspace(0.0, 1.0, 20)
    value, _ = model.extras.regress({"flow": {}}, {}, *pairs, t)
    np.testing.assert_allclose(value, 0, atol=1e-25)
    ends = np.asarray(model.denoiser.generate({"flow": {}}, {}, jax.random.key(1), 20, every=True))
    np.testing.assert_allclose(ends[1], ends[0] + MEAN, atol=1e-14)


# --- discrete data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "levels", "bits"),
    [("discrete", 256, 8.0), ("discrete", 17, math.log2(17)), ("binary", None, 1.0)],
)
def test_a_uniform_density_of_dequantised_data_has_the_bits_of_its_levels(kind, levels, bits, x64):
    spec, n = DataSpec((4, 4, 3), kind, levels=levels), levels or 2
    half = (
        n / (n - 1)
        # levels are 2 / (n - 1) wide on the normalised scale, and half of one goes beyond ±1 on
        # each side
    )

    def uniform(y):
        assert y.shape == (50, 4, 4, 3)
        assert np.abs(y).max() <= half
        return jnp.full(y.shape[0], -spec.size * math.log(2 * half))

    x = jnp.asarray(np.random.default_rng(6).integers(0, n, (50, 4, 4, 3)), float)
    nats = dequantized_bound(spec, uniform, x, jax.random.key(0))
    np.testing.assert_allclose(-nats / math.log(2) / spec.size, bits, rtol=1e-12)


@pytest.mark.slow
def test_the_bound_of_discrete_data_is_below_the_probability_of_their_levels(x64):
    """For a flow onto N(m, s²): its mean is E_u ln p(x + u) in closed form, and less than ln ∫ p(x
    + u) du = ln P(x).
    """
    spec, name = DataSpec((D,), "discrete", levels=5), "conditional_ot"
    root = np.diag([0.3, 0.5, 0.8])
    net = closed_form(name, functools.partial(gaussian_velocity, root=root))
    model = flow_matching(spec, probability_path=name, net=net, n_likelihood_steps=60)
    assert model.log_prob is None
    x, width = np.asarray([[0.0, 1, 4], [2, 2, 2]]), 0.5
    y, sd = x * width - 1, np.diag(root)
    squares = ((y - MEAN) ** 2 + width**2 / 12) / sd**2
    wanted = (-0.5 * squares - np.log(sd) - 0.5 * math.log(2 * math.pi) + math.log(width)).sum(1)
    levels = np.log(
        np.diff([scipy.stats.norm.cdf(y + e, MEAN, sd) for e in (-width / 2, width / 2)], axis=0)[0]
    ).sum(1)
    batch = Batch(jnp.asarray(np.repeat(x, 1000, axis=0)))
    found = np.asarray(
        jax.jit(model.bound)({"flow": {}}, {"flow": {}}, batch, jax.random.key(0))
    ).reshape(2, 1000)
    error = found.std(1) / math.sqrt(1000)
    assert (np.abs(found.mean(1) - wanted) < 4 * error + 1e-4).all()
    assert (found.mean(1) + 4 * error < levels).all()
    assert model.estimator == "dequantised once, ODE, rk4 in 60 steps, exact divergence"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [DataSpec((3,), "discrete", levels=4), DataSpec((3,), "binary")],
    ids=["discrete", "binary"],
)
def test_samples_of_discrete_data_are_rounded_and_the_way_there_is_not(spec):
    model = flow_matching(spec, hidden=(4,), n_steps=3)
    params, state = model.init(jax.random.key(0))
    path = np.asarray(model.denoiser.generate(params, state, jax.random.key(1), 40, every=True))
    assert path.shape == (4, 40, 3)
    assert set(np.unique(path[-1])) <= set(range(spec.levels or 2))
    assert (path[:-1] != np.round(path[:-1])).mean() > 0.99
    np.testing.assert_array_equal(path[-1], model.sample(params, state, jax.random.key(1), 40))


# --- couplings ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_optimal_pairs_of_a_batch_are_nearly_those_of_the_whole_distribution(x64):
    """On a line, optimal transport from N(0, 1) to N(m, s²) is m + s ε, whose straight flow then
    costs next to nothing.
    """
    spec, s = DataSpec((1,), "continuous"), 0.5
    net = closed_form(
        "conditional_ot", lambda p, path, x, t: (1 - s) / ((1 - t) * s + t) * (x - (1 - t)) - 1
    )
    batch = Batch(jnp.asarray(1 + s * np.random.default_rng(7).normal(size=(200, 1))))
    values = {}
    for coupling in ("independent", "entropic", "optimal"):
        model = flow_matching(spec, net=net, coupling=coupling)
        values[coupling] = float(
            optimised(model.losses["flow"])({"flow": {}}, {}, batch, jax.random.key(8), 0)[0].mean()
        )
    # Two samples of 200: W2² of one to N(0, 1) is about 0.02.
    assert values["optimal"] < 0.06 * values["independent"]
    assert values["optimal"] < values["entropic"] < 0.3 * values["independent"]


@pytest.mark.slow
def test_noise_is_exchanged_within_a_class_only(x64):
    """Classes far apart would otherwise take the noise on their own side: with a velocity of 0 the
    loss is ‖x0 - ε‖², whose mean over a class is |m|² + 2 only if its noise is N(0, I) still.
    """
    spec = DataSpec((2,), "continuous", n_classes=2)
    net = closed_form("conditional_ot", lambda p, path, x, t: jnp.zeros_like(x))
    labels = np.arange(100) % 2
    x = jnp.asarray(np.where(labels[:, None] == 1, 10.0, -10.0) * np.ones((1, 2)))
    model = flow_matching(spec, net=net, coupling="optimal")
    loss = jax.jit(
        lambda key: model.losses["flow"]({"flow": {}}, {}, Batch(x, jnp.asarray(labels)), key, 0)[0]
    )
    # An auction of 600 alike would take minutes.
    values = np.stack([loss(key) for key in jax.random.split(jax.random.key(0), 6)])
    for label in (0, 1):
        one = values[:, labels == label].ravel()
        assert abs(one.mean() - 202) < 4 * one.std() / math.sqrt(len(one))


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_guidance_of_scale_1_is_the_model_and_of_0_the_unconditional_one_bit_for_bit(x64):
    model, params, state = conditional(cond_dropout=0.5)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    cond, key = jnp.arange(30) % 3, jax.random.key(1)

    def draw(**how):
        return np.asarray(model.denoiser.generate(params, state, key, 30, cond, **how))

    plain = draw()
    np.testing.assert_array_equal(draw(guidance=1.0), plain)
    without = draw(guidance=0.0)
    np.testing.assert_array_equal(
        without, model.denoiser.generate(params, state, key, 30, (cond + 1) % 3, guidance=0.0)
    )
    # Euler's steps by hand, of the velocity without a condition and of a guided one: on straight
    # lines, both are linear in x0.
    start = np.asarray(model.denoiser.generate(params, state, key, 30, cond, every=True))[0]
    for scale, found in ((0.0, without), (2.0, draw(guidance=2.0))):
        x = jnp.asarray(start)
        for t in (1.0, 0.75, 0.5, 0.25):

            def v(dropped):
                return model.extras.velocity(params, state, x, t, cond, jnp.full(30, dropped))

            x = x - 0.25 * (scale * v(False) + (1 - scale) * v(True))
        np.testing.assert_allclose(found, x, atol=1e-9)
    built = conditional(guidance=2.0)[0]
    np.testing.assert_array_equal(built.sample(params, state, key, 30, cond), draw(guidance=2.0))


@pytest.mark.slow
def test_the_condition_is_dropped_as_often_as_asked():
    model, params, state = conditional()
    dropped = np.asarray(model.extras.drop(jax.random.key(0), 20_000))
    assert abs(dropped.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)
    assert conditional(0.0)[0].extras.drop(jax.random.key(0), 5) is None
    # A dropped example's loss is that of any other condition.
    rng = np.random.default_rng(0)
    x, cond = (
        jnp.asarray(rng.normal(size=(400, 2)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 400)),
    )

    def loss(cond):
        return np.asarray(
            model.losses["flow"](params, state, Batch(x, cond), jax.random.key(2), 0)[0]
        )

    same = (loss(cond) == loss((cond + 1) % 3)).mean()
    assert abs(same - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
