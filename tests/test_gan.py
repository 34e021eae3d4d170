"""Generative adversarial networks against known answers: objectives, penalties, dynamics, turns.

The oracles are optimal discriminators, which are functions of the two densities in closed form; the
linear critic; and the Dirac-GAN (Mescheder 2018), whose training is a linear dynamical system.
Generators are set by hand, so that what they make is a known normal or a point. Statements about
means hold within 4 standard errors.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from gan_oracles import DATA, MODEL, RATIO, expected, optimum
from gates import assert_close, assert_same, differ, quick

from genjax.families.gan import (
    OBJECTIVES,
    gan,
    input_gradient,
    one_centred_penalty,
    zero_centred_penalty,
)
from genjax.learning.optim import track_ema
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import compiled, feed, repeat_steps
from genjax.protocol import Batch, DataSpec, TrainState

KEY = jax.random.key(0)
POINT, PLANE = DataSpec((1,), "continuous", name="line"), DataSpec((2,), "continuous", name="plane")
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def random_params(model, seed=0, size=0.5):
    """Parameters and state that are all random, so that nothing is zero by accident; float64 where
    that is switched on.
    """
    rng = np.random.default_rng(seed)
    params, state = jax.eval_shape(model.init, KEY)
    params = jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape)), params)
    return params, jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.normal(size=leaf.shape)) + 0.5), state
    )


def linear(offset, slope=None, bias=0.0, kernel=0.0, **settings):
    """A GAN with G(z) = kernel z + offset and D(x) = slope·x + bias: its model, parameters and
    (empty) state.
    """
    offset = np.atleast_1d(np.asarray(offset, float))
    model = gan(DataSpec(offset.shape, "continuous"), latent_dim=len(offset), hidden=(), **settings)
    params, state = random_params(model)
    dtype = params["generator"]["last"]["bias"].dtype
    own = {
        "kernel": jnp.asarray(kernel * np.eye(len(offset)), dtype),
        "bias": jnp.asarray(offset, dtype),
    }
    params["generator"] = {**params["generator"], "last": own}
    if slope is not None:
        layer = {
            "kernel": jnp.asarray(np.reshape(slope, (-1, 1)), dtype),
            "bias": jnp.full((1,), bias, dtype),
        }
        layer = {
            leaf: layer[leaf] for leaf in params["discriminator"]["logit"]["layer"]
        }  # no bias where it has no effect
        params["discriminator"] = {**params["discriminator"], "logit": {"layer": layer}}
    return model, params, state


# --- objectives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "wasserstein"])
def test_the_best_table_of_logits_is_known_in_closed_form(x64, name):
    # The losses are convex in D, so that a point from which nothing leads down is a minimum.
    x = np.linspace(-3, 3, 24)
    p, q = DATA.pdf(x) / DATA.pdf(x).sum(), MODEL.pdf(x) / MODEL.pdf(x).sum()
    best, least = optimum(name, p, q)
    value = functools.partial(expected, name, p=p, q=q)
    rng = np.random.default_rng(1)
    ways = np.concatenate([rng.normal(size=(50, 24)), np.eye(24), -np.eye(24)])
    ways = np.concatenate([size * ways for size in (1e-3, 0.1, 3.0)])
    at_best, slope, around = quick(
        lambda d, w: (value(d), jax.grad(value)(d), jax.vmap(value)(d[None] + w))
    )(best, ways)
    np.testing.assert_allclose(at_best, least, rtol=0, atol=1e-13)
    if name != "hinge":  # which has a kink at its optimum
        np.testing.assert_allclose(slope, 0, atol=1e-14)
    assert float(around.min()) - least > 1e-12


@pytest.mark.parametrize("name", ["minimax", "nonsaturating", "relativistic"])
def test_the_best_quadratic_logit_for_two_normals_is_their_log_ratio(x64, name):
    x, step = np.linspace(
        -9, 9, 181, retstep=True
    )  # the trapezoid rule is exact to rounding for these
    start = int(OBJECTIVES[name].shift_invariant)  # a constant would have no effect there
    features, p, q = (
        jnp.asarray(x[:, None] ** np.arange(start, 3)[None, :]),
        step * DATA.pdf(x),
        step * MODEL.pdf(x),
    )
    value = lambda theta: expected(name, features @ theta, p, q)  # noqa: E731
    newton = jax.jit(
        lambda theta: theta - jnp.linalg.solve(jax.hessian(value)(theta), jax.grad(value)(theta))
    )
    theta = jnp.zeros(3 - start)
    for _ in range(12):
        theta = newton(theta)
    np.testing.assert_allclose(theta, RATIO[start:], rtol=0, atol=1e-8)
    assert float(value(theta)) == pytest.approx(optimum(name, p, q)[1], abs=1e-10)


def test_the_best_lipschitz_critic_measures_the_earth_movers_distance(x64):
    # Kantorovich and Rubinstein: the supremum over D with |D(x) - D(y)| <= |x - y|, as a linear
    # programme.
    x, step = np.linspace(-5, 5, 61, retstep=True)
    p, q = DATA.pdf(x) / DATA.pdf(x).sum(), MODEL.pdf(x) / MODEL.pdf(x).sum()
    value = functools.partial(expected, "wasserstein", p=p, q=q)
    costs = np.asarray(jax.grad(value)(jnp.zeros(61)))
    np.testing.assert_allclose(costs, q - p, atol=1e-15)
    slopes = np.diff(np.eye(61), axis=0)
    solved = scipy.optimize.linprog(
        costs,
        A_ub=np.vstack([slopes, -slopes]),
        b_ub=np.full(120, step),
        A_eq=np.eye(61)[:1],
        b_eq=[0.0],
        bounds=(None, None),
    )
    distance = scipy.stats.wasserstein_distance(x, x, p, q)
    assert solved.fun == pytest.approx(-distance, abs=1e-9)
    assert float(value(jnp.asarray(solved.x))) == pytest.approx(-distance, abs=1e-9)


def test_the_generators_losses_have_these_gradients(x64):
    real, fake = (jnp.asarray(v) for v in np.random.default_rng(2).normal(scale=3, size=(2, 50)))
    sigmoid = scipy.special.expit
    wanted = {
        "minimax": -sigmoid(fake),
        "nonsaturating": -sigmoid(-fake),
        "least_squares": fake - 1,
        "hinge": np.full(50, -1),
        "wasserstein": np.full(50, -1),
        "relativistic": -sigmoid(real - fake),
    }
    slopes = lambda o: jax.grad(lambda r, f: jnp.sum(o.generator(r, f)), (0, 1))  # noqa: E731
    found = quick(
        lambda r, f: {name: slopes(objective)(r, f) for name, objective in OBJECTIVES.items()}
    )(real, fake)
    for name, (by_real, by_fake) in found.items():
        np.testing.assert_allclose(by_fake, wanted[name], rtol=1e-12)
        np.testing.assert_allclose(
            by_real, -wanted[name] if name == "relativistic" else 0, rtol=1e-12
        )
    # The same direction, and sizes σ(D) to 1 - σ(D): the first vanishes where the discriminator is
    # sure, the second does not.
    np.testing.assert_allclose(
        found["minimax"][1] / found["nonsaturating"][1], np.exp(fake), rtol=1e-12
    )
    for name in ("minimax", "wasserstein"):  # of zero sum in all that the generator can change
        both = OBJECTIVES[name]
        total = [both.discriminator(real, f) + both.generator(real, f) for f in (fake, -fake)]
        np.testing.assert_allclose(*total, atol=1e-12)
    mirrored = OBJECTIVES["relativistic"]
    np.testing.assert_array_equal(
        mirrored.generator(real, fake), mirrored.discriminator(fake, real)
    )


@every_objective
def test_objectives_at_extreme_logits_and_at_none(name):
    objective, logits = OBJECTIVES[name], jnp.asarray([-1e4, 0.0, 1e4])
    loss = lambda r, f: jnp.stack(
        [jnp.sum(objective.discriminator(r, f)), jnp.sum(objective.generator(r, f))]
    )  # noqa: E731
    run = quick(lambda r, f: (loss(r, f), *jax.jacobian(loss, (0, 1))(r, f)))
    for real in logits:
        assert all(np.all(np.isfinite(v)) for v in run(jnp.full(3, real), logits))
    bit, at_zero = (
        math.log(2),
        {"least_squares": (0.5, 0.5), "hinge": (2, 0), "wasserstein": (0, 0)},
    )
    at_zero |= {
        "minimax": (2 * bit, -bit),
        "nonsaturating": (2 * bit, bit),
        "relativistic": (bit, bit),
    }
    np.testing.assert_allclose(
        run(jnp.zeros(3), jnp.zeros(3))[0], 3 * np.array(at_zero[name]), rtol=1e-6
    )
    # A shift of both logits, as by a bias, changes the critic's loss or a slope; or neither.
    real, fake = jnp.asarray([0.3, -0.5, 2.0]), jnp.asarray([0.1, -0.2, 0.4])
    before, after = run(real, fake), run(real + 1.5, fake + 1.5)
    same = np.allclose(before[0][0], after[0][0]) and np.allclose(before[1:], after[1:])
    assert same == objective.shift_invariant


@pytest.mark.slow
@every_objective
def test_the_familys_losses_are_those_of_the_table(x64, name):
    # With G(z) = offset and D(x) = slope·x + bias all is known, the gradients of both players too.
    slope, offset, bias = np.array([1.5, -0.5]), np.array([0.3, 0.8]), 0.2
    model, params, state = linear(offset, slope, bias, objective=name)
    objective = OBJECTIVES[name]
    bias *= not objective.shift_invariant
    x = np.random.default_rng(3).normal(size=(6, 2))
    real, fake = jnp.asarray(x @ slope + bias), jnp.full(6, offset @ slope + bias)
    batch = Batch(jnp.asarray(x))
    np.testing.assert_allclose(model.extras["logit"](params, state, batch.x), real, rtol=1e-12)

    def mean(params, player):
        value, aux = model.losses[player](params, state, batch, KEY, 0)
        return jnp.mean(value), (value, aux.metrics)

    run = jax.value_and_grad(mean, has_aux=True)
    (_, (value, metrics)), grads = quick(functools.partial(run, player="discriminator"))(params)
    np.testing.assert_allclose(value, objective.discriminator(real, fake), rtol=1e-12)
    np.testing.assert_allclose(metrics["real_logit"], real, rtol=1e-12)
    np.testing.assert_allclose(metrics["fake_logit"], fake, rtol=1e-12)
    by_real, by_fake = jax.grad(lambda r, f: jnp.mean(objective.discriminator(r, f)), (0, 1))(
        real, fake
    )
    layer = grads["discriminator"]["logit"]["layer"]
    np.testing.assert_allclose(
        layer["kernel"][:, 0], by_real @ x + np.sum(by_fake) * offset, rtol=1e-10, atol=1e-14
    )
    if not objective.shift_invariant:
        np.testing.assert_allclose(
            layer["bias"], [np.sum(by_real + by_fake)], rtol=1e-10, atol=1e-14
        )
    (_, (value, _)), grads = quick(functools.partial(run, player="generator"))(params)
    np.testing.assert_allclose(value, objective.generator(real, fake), rtol=1e-12)
    by_fake = jax.grad(lambda f: jnp.mean(objective.generator(real, f)))(fake)
    np.testing.assert_allclose(
        grads["generator"]["last"]["bias"], np.sum(by_fake) * slope, rtol=1e-10
    )


def alone(model, player):  # with one player's turn only: the other is frozen
    return model._replace(losses={player: model.losses[player]}, turns=())


@pytest.mark.slow
def test_a_trained_discriminator_is_the_log_ratio():
    # Real data N(0.5, 1.2²) against G(z) = 0.8 z - 0.7, new examples in each step.
    steps = 3000
    model = gan(POINT, latent_dim=1, hidden=(32, 32))
    params, _ = jax.eval_shape(model.init, KEY)
    generator = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params["generator"])
    layers, last = generator["layers"], generator["last"]
    layers[0]["kernel"][0, :2] = 1, -1  # relu(z) - relu(-z) = z, by way of two hidden layers
    layers[1]["kernel"][:2, :2] = np.eye(2)
    last["kernel"][:2, 0], last["bias"][:] = (0.8, -0.8), -0.7

    def batch_at(key, step):
        return Batch(0.5 + 1.2 * jax.random.normal(jax.random.fold_in(key, step), (512, 1)))

    rate = optax.cosine_decay_schedule(3e-3, steps)
    fit = compiled(
        repeat_steps(
            feed(training(alone(model, "discriminator"), optax.adam(rate)), batch_at), steps
        )
    )
    ts = fit.init(KEY)
    start = jax.tree.map(jnp.asarray, generator)  # its buffers are donated
    ts, metrics = fit.step(ts._replace(params={**ts.params, "generator": start}), jax.random.key(1))
    x = np.linspace(-2, 1.5, 36, dtype=np.float32)  # where both have examples to learn from
    found = quick(model.extras["logit"])(ts.params, ts.state, jnp.asarray(x[:, None]))
    off = np.abs(found - np.polyval(RATIO[::-1], x))
    assert off.max() < 0.15
    assert off.mean() < 0.05
    density = lambda d: d.pdf(np.linspace(-9, 9, 1801)) / 100  # noqa: E731
    last = np.asarray(metrics["discriminator/loss"][-500:])
    exact = optimum("nonsaturating", density(DATA), density(MODEL))[1]
    assert abs(last.mean() - exact) < 4 * last.std() / math.sqrt(500) + 2e-3
    assert_same(ts.params["generator"], generator)


# --- the linear critic and the Dirac-GAN ----------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 10.0, 1000.0])
def test_a_linear_wasserstein_critic_settles_where_the_penalty_balances_the_gap(x64, weight):
    # -slope·m + weight (|slope| - 1)² is least at slope = (1 + |m| / (2 weight)) m / |m|, so that
    # the gap tends to W₁ = |m| and |∇D| to 1 as the weight grows.
    m, offset = np.array([1.2, -0.9]), np.array([0.4, 0.1])
    distance, size = 1.5, 1 + 1.5 / (2 * weight)
    model, params, state = linear(
        offset, size * m / distance, objective="wasserstein", gradient_penalty=weight
    )
    spread = np.random.default_rng(4).normal(size=(4, 2))
    x = jnp.asarray(np.concatenate([spread, -spread]) + m + offset)

    def mean(kernel):
        own = {
            **params,
            "discriminator": {**params["discriminator"], "logit": {"layer": {"kernel": kernel}}},
        }
        value, aux = model.losses["discriminator"](own, state, Batch(x), KEY, 0)
        return jnp.mean(value), aux.metrics

    kernel = params["discriminator"]["logit"]["layer"]["kernel"]
    run = quick(jax.value_and_grad(mean, has_aux=True))
    (value, metrics), slope = run(kernel)
    np.testing.assert_allclose(
        slope, 0, atol=1e-8
    )  # the 1e-12 below the root is there at weight 1000
    gap = np.mean(metrics["real_logit"] - metrics["fake_logit"])
    assert gap == pytest.approx(distance * size, abs=1e-12)
    assert gap - distance == pytest.approx(distance**2 / (2 * weight), rel=1e-9)
    assert float(value) == pytest.approx(-distance - distance**2 / (4 * weight), abs=1e-8)
    others = np.random.default_rng(13).normal(scale=0.1, size=(5, 2, 1))
    assert all(run(kernel + other)[0][0] > value for other in others)


def dirac(name):
    """Mescheder 2018: data at 0, G = θ, D(x) = ψ x; the directions of descent of (ψ, θ) for a
    weight of R1.
    """
    objective, zero = OBJECTIVES[name], jnp.zeros((1, 1))
    logit = lambda psi, x: psi * x[:, 0]  # noqa: E731

    def field(point, weight):
        psi, theta = point

        def discriminator(psi):
            value = objective.discriminator(logit(psi, zero), logit(psi, theta.reshape(1, 1)))
            return jnp.sum(
                value + weight * zero_centred_penalty(functools.partial(logit, psi), zero)
            )

        def generator(theta):
            return jnp.sum(objective.generator(logit(psi, zero), logit(psi, theta.reshape(1, 1))))

        return -jnp.stack([jax.grad(discriminator)(psi), jax.grad(generator)(theta)])

    return field


# f'(0) of the loss as a function of ψ θ. Least squares has its equilibrium at D = ½, which ψ x does
# not reach.
SLOPES = {
    "minimax": 0.5,
    "nonsaturating": 0.5,
    "hinge": 1.0,
    "wasserstein": 1.0,
    "relativistic": 0.5,
}


@pytest.mark.parametrize("name", SLOPES)
def test_the_dirac_gan_has_these_eigenvalues(x64, name):
    slope, rate, jacobian = SLOPES[name], 0.1, quick(jax.jacobian(dirac(name)))
    for weight in (
        0.0,
        0.3,
        0.7,
        3.0,
    ):  # away from 2 f', where a double eigenvalue is the root of a rounding error off
        found = np.linalg.eigvals(jacobian(jnp.zeros(2), weight))
        root = np.emath.sqrt(weight**2 / 4 - slope**2)
        order = lambda v: np.sort_complex(np.round(np.asarray(v, complex), 10))  # noqa: E731
        np.testing.assert_allclose(
            order(found), order([-weight / 2 - root, -weight / 2 + root]), rtol=0, atol=1e-8
        )
        sizes = np.abs(1 + rate * found)  # of simultaneous gradient descent
        assert sizes.max() < 1 or not weight
        if not weight:
            np.testing.assert_allclose(sizes, math.sqrt(1 + (rate * slope) ** 2), rtol=1e-12)


def test_simultaneous_descent_leaves_the_dirac_equilibrium_and_r1_returns_to_it(x64):
    field = dirac("nonsaturating")
    descend = lambda p, w: jax.lax.scan(lambda p, _: (p + 0.1 * field(p, w), p), p, length=2000)[1]  # noqa: E731
    free, held = (
        np.linalg.norm(jax.jit(descend)(jnp.full(2, 0.01), weight), axis=1) for weight in (0.0, 0.5)
    )
    assert np.all(np.diff(free) > 0)
    assert free[400] / free[0] == pytest.approx(
        1.0025**200, rel=1e-3
    )  # as long as the field is linear
    assert free[-1] > 10 * free[0]
    assert held[-1] < 1e-12


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_training_step_is_two_turns_of_which_the_second_sees_the_first(weight):
    # The Jacobian of the step at the Dirac equilibrium. Turn by turn ψ' = (1 - h γ) ψ - h f' θ, θ'
    # = θ + h f' ψ'.
    model, params, state = linear([0.0], [0.0], r1=weight)
    rate, slope = 0.2, SLOPES["nonsaturating"]
    t = training(model, optax.sgd(rate))
    opt = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(t.init, KEY).opt
    )

    def step(point):
        critic = {"logit": {"layer": {"kernel": point[:1, None], "bias": jnp.zeros(1)}}}
        maker = {**params["generator"], "last": {"kernel": jnp.zeros((1, 1)), "bias": point[1:]}}
        own = {"discriminator": {**params["discriminator"], **critic}, "generator": maker}
        new = t.step(TrainState(jnp.int32(0), KEY, own, state, opt), Batch(jnp.zeros((3, 1))))[
            0
        ].params
        return jnp.stack(
            [
                new["discriminator"]["logit"]["layer"]["kernel"][0, 0],
                new["generator"]["last"]["bias"][0],
            ]
        )

    found = np.asarray(quick(jax.jacobian(step))(jnp.zeros(2)))
    kept = 1 - rate * weight
    np.testing.assert_allclose(
        found, [[kept, -rate * slope], [rate * slope * kept, 1 - (rate * slope) ** 2]], atol=1e-6
    )
    assert np.linalg.det(found) == pytest.approx(
        kept, abs=1e-6
    )  # in turns it circles at best; R1 makes it converge


# --- penalties ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_penalties_of_a_quadratic_discriminator(x64):
    rng = np.random.default_rng(5)
    x, b, root = rng.normal(size=(4, 2, 3)), rng.normal(size=6), rng.normal(size=(6, 6))
    matrix = root + root.T

    def own(x):
        flat = x.reshape(-1, 6)
        return 0.5 * jnp.sum(flat * (flat @ jnp.asarray(matrix)), axis=-1) + flat @ jnp.asarray(b)

    gradient = x.reshape(4, 6) @ matrix + b
    size = np.linalg.norm(gradient, axis=1)
    np.testing.assert_allclose(
        input_gradient(own, jnp.asarray(x)), gradient.reshape(4, 2, 3), rtol=1e-12
    )
    np.testing.assert_allclose(zero_centred_penalty(own, jnp.asarray(x)), size**2 / 2, rtol=1e-12)
    np.testing.assert_allclose(
        one_centred_penalty(own, jnp.asarray(x)), (size - 1) ** 2, rtol=1e-10
    )
    # At a gradient of 0 the norm has no derivative, and a discriminator may start there.
    flat_one = lambda a: one_centred_penalty(lambda x: a * x[:, 0, 0], jnp.asarray(x))  # noqa: E731
    np.testing.assert_allclose(flat_one(0.0), 1, atol=1e-5)
    assert np.all(np.isfinite(jax.jacobian(flat_one)(0.0)))


PENALTIES = ("r1", "r2", "gradient_penalty")


@pytest.mark.slow
@every_objective
def test_penalties_add_to_every_objective_in_proportion_to_their_weights(x64, name):
    x, slope = jnp.asarray(np.random.default_rng(6).normal(size=(5, 2))), np.array([1.5, -0.5])
    plain, params, state = linear([0.3, 0.8], slope, 0.2, 0.5, objective=name)

    def both(weights):
        model = gan(
            PLANE,
            latent_dim=2,
            hidden=(),
            objective=name,
            **dict(zip(PENALTIES, weights, strict=True)),
        )
        return [
            model.losses[player](params, state, Batch(x), KEY, 0)[0]
            for player in ("discriminator", "generator")
        ]

    weights = jnp.asarray([0.7, 2.0, 10.0])
    (loss, generator), (slopes, none) = quick(lambda w: (both(w), jax.jacobian(both)(w)))(weights)
    wanted = np.array([1.25, 1.25, (math.sqrt(2.5) - 1) ** 2])  # |slope|² = 2.5, everywhere
    np.testing.assert_allclose(slopes, np.tile(wanted, (5, 1)), rtol=1e-10)
    np.testing.assert_array_equal(none, 0)
    np.testing.assert_allclose(
        loss, plain.losses["discriminator"](params, state, Batch(x), KEY, 0)[0] + weights @ wanted
    )
    np.testing.assert_allclose(
        generator, plain.losses["generator"](params, state, Batch(x), KEY, 0)[0]
    )


def crossing(k, n):
    """D(x) = Σ_d leaky(x_d - k) of the plane, real examples at 0 and generated ones at 1: |∇D|² is
    2 beyond k, 0.08 before.
    """
    params, state = random_params(gan(PLANE, hidden=(2,)), size=0.0)
    params["discriminator"]["features"]["layers"][0]["layer"] = {
        "kernel": jnp.eye(2),
        "bias": jnp.full(2, -k),
    }
    params["discriminator"]["logit"]["layer"] = {"kernel": jnp.ones((2, 1))}
    params["generator"]["last"]["bias"] = jnp.ones(2)
    return params, state, Batch(jnp.zeros((n, 2)))


@pytest.mark.slow
def test_each_penalty_is_taken_at_its_own_points():
    n, far, near = 4000, math.sqrt(2), math.sqrt(0.08)
    _, state, batch = crossing(0.3, n)
    losses = [
        gan(PLANE, hidden=(2,), objective="wasserstein", **{name: 1.0}).losses["discriminator"]
        for name in PENALTIES
    ]

    @quick
    def penalties(params, key):
        found = [loss(params, state, batch, key) for loss in losses]
        return [
            value - aux.metrics["fake_logit"] + aux.metrics["real_logit"] for value, aux in found
        ]

    for seed, k in enumerate((0.3, 0.75)):
        at_real, at_fake, between = penalties(crossing(k, n)[0], jax.random.key(seed))
        np.testing.assert_allclose(at_real, near**2 / 2, rtol=1e-4)
        np.testing.assert_allclose(at_fake, far**2 / 2, rtol=1e-4)
        beyond = np.isclose(between, (far - 1) ** 2, rtol=1e-3)
        assert np.all(
            beyond | np.isclose(between, (near - 1) ** 2, rtol=1e-3)
        )  # both coordinates are on one side
        assert abs(beyond.mean() - (1 - k)) < 4 * math.sqrt(
            k * (1 - k) / n
        )  # uniform on the way from 0 to 1


@functools.cache
def whole(objective):
    """A GAN with every penalty: its losses of a batch as a function of parameters and data, and
    random parameters.
    """
    model = gan(
        PLANE,
        latent_dim=3,
        hidden=(6, 5),
        objective=objective,
        r1=0.7,
        r2=0.4,
        gradient_penalty=2.0,
    )
    params, state = random_params(model, 8)
    losses = lambda params, x: [
        loss(params, state, Batch(x), KEY)[0] for loss in model.losses.values()
    ]  # noqa: E731
    return losses, params


@pytest.mark.slow
def test_the_second_derivatives_of_the_penalties_are_right(x64):
    losses, params = whole("hinge")
    x = jnp.asarray(np.random.default_rng(9).normal(size=(7, 2)))
    total = lambda own: jnp.sum(losses({**params, "discriminator": own}, x)[0])  # noqa: E731
    own, value_and_grad = params["discriminator"], quick(jax.value_and_grad(total))
    rng, exact = np.random.default_rng(10), value_and_grad(own)[1]
    for _ in range(5):
        way = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), own)
        ahead, back = (
            value_and_grad(jax.tree.map(lambda p, d: p + size * d, own, way))[0]
            for size in (1e-6, -1e-6)
        )
        slope = sum(
            float(jnp.sum(g * d)) for g, d in zip(*map(jax.tree.leaves, (exact, way)), strict=True)
        )
        assert float(ahead - back) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_no_example_sees_another(x64):
    losses, params = whole("relativistic")
    x = np.random.default_rng(11).normal(size=(5, 2))
    other = x.copy()
    other[2] += 0.7
    run = quick(losses)
    for before, after in zip(
        run(params, jnp.asarray(x)), run(params, jnp.asarray(other)), strict=True
    ):
        assert np.flatnonzero(np.asarray(before) != np.asarray(after)).tolist() == [2]


# --- turns and partition --------------------------------------------------------------------------


def stateful(**settings):
    """A GAN of which both players have a state."""
    return gan(
        PLANE, latent_dim=3, hidden=(6,), generator_norm="batch", spectral_norm=True, **settings
    )


BATCH = Batch(np.random.default_rng(12).normal(size=(8, 2)).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("player", ["discriminator", "generator"])
def test_a_turn_changes_its_own_player_only(player):
    t = training(alone(stateful(), player), optax.adam(0.01))
    start = t.init(KEY)
    after, _ = quick(t.step)(start, BATCH)
    for new, old in ((after.params, start.params), (after.state, start.state)):
        assert {path.split("/")[0] for path in differ(new, old)} == {player}
        assert len(differ(new, old)) == len(jax.tree.leaves(old[player]))


@pytest.mark.slow
def test_turns_are_counted_and_optimisers_and_averages_are_each_players_own():
    # A discriminator that stands still: its power iterations are then known, two a turn (on real
    # and on generated examples).
    average = optax.chain(optax.adam(0.02), track_ema(0.9))
    model = stateful(discriminator_steps=3, r1=1.0)
    t = training(model, {"discriminator": optax.adam(0.0), "generator": average})
    start, step = t.init(KEY), quick(t.step)
    first, metrics = step(start, BATCH)
    second, _ = step(first, BATCH)
    assert (
        int(second.opt["discriminator"][0].count),
        int(second.opt["generator"][0][0].count),
    ) == (6, 2)
    assert set(metrics) == {
        f"discriminator/{name}" for name in ("loss", "real_logit", "fake_logit")
    } | {"generator/loss"}
    assert_same(second.params["discriminator"], start.params["discriminator"])
    assert len(differ(second.params, start.params)) == len(
        jax.tree.leaves(start.params["generator"])
    )
    kernel = np.asarray(
        start.params["discriminator"]["features"]["layers"][0]["layer"]["kernel"], float
    )
    u = np.asarray(start.state["discriminator"]["features"]["layers"][0]["u"], float)
    for _ in range(6):
        u = kernel.T @ (kernel @ u)
        u /= np.linalg.norm(u)
    np.testing.assert_allclose(
        first.state["discriminator"]["features"]["layers"][0]["u"], u, atol=1e-5
    )
    # The moving average is the generator's only, with d = (1 + count) / (10 + count): 0.1, then
    # 2/11.
    paths = [ts.params["generator"] for ts in (start, first, second)]
    wanted = jax.tree.map(lambda a, b, c: 2 / 11 * (0.1 * a + 0.9 * b) + 9 / 11 * c, *paths)
    evaluated, sample = (
        eval_params(second),
        quick(lambda params: model.sample(params, second.state, KEY, 5)),
    )
    assert_close(evaluated["generator"], wanted, rtol=1e-5)
    assert_same(evaluated["discriminator"], second.params["discriminator"])
    np.testing.assert_allclose(
        sample(evaluated), sample({"generator": wanted}), rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(sample(evaluated), sample(second.params), rtol=1e-3)
