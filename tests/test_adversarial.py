"""Objectives of two players and gradient penalties against known answers.

The oracles are optimal discriminators, which are functions of the two densities in closed form, and
the Dirac-GAN (Mescheder 2018), whose training is a linear dynamical system.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from gan_oracles import DATA, MODEL, RATIO, every_objective, expected, optimum
from gates import quick

from genjax.parts.adversarial import (
    OBJECTIVES,
    input_gradient,
    one_centred_penalty,
    zero_centred_penalty,
)

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


@pytest.mark.slow
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

    def value(theta):
        return expected(name, features @ theta, p, q)

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

    def slopes(o):
        return jax.grad(lambda r, f: jnp.sum(o.generator(r, f)), (0, 1))

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

    def loss(r, f):
        return jnp.stack(
            [jnp.sum(objective.discriminator(r, f)), jnp.sum(objective.generator(r, f))]
        )

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
    def flat_one(a):
        return one_centred_penalty(lambda x: a * x[:, 0, 0], jnp.asarray(x))

    np.testing.assert_allclose(flat_one(0.0), 1, atol=1e-5)
    assert np.all(np.isfinite(jax.jacobian(flat_one)(0.0)))


# --- the Dirac-GAN --------------------------------------------------------------------------------


def dirac(name):
    """Mescheder 2018: data at 0, G = θ, D(x) = ψ x; the directions of descent of (ψ, θ) for a
    weight of R1.
    """
    objective, zero = OBJECTIVES[name], jnp.zeros((1, 1))

    def logit(psi, x):
        return psi * x[:, 0]

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

        def order(v):
            return np.sort_complex(np.round(np.asarray(v, complex), 10))

        np.testing.assert_allclose(
            order(found), order([-weight / 2 - root, -weight / 2 + root]), rtol=0, atol=1e-8
        )
        sizes = np.abs(1 + rate * found)  # of simultaneous gradient descent
        assert sizes.max() < 1 or not weight
        if not weight:
            np.testing.assert_allclose(sizes, math.sqrt(1 + (rate * slope) ** 2), rtol=1e-12)


def test_simultaneous_descent_leaves_the_dirac_equilibrium_and_r1_returns_to_it(x64):
    field = dirac("nonsaturating")

    def descend(p, w):
        return jax.lax.scan(lambda p, _: (p + 0.1 * field(p, w), p), p, length=2000)[1]

    free, held = (
        np.linalg.norm(jax.jit(descend)(jnp.full(2, 0.01), weight), axis=1) for weight in (0.0, 0.5)
    )
    assert np.all(np.diff(free) > 0)
    assert free[400] / free[0] == pytest.approx(
        1.0025**200, rel=1e-3
    )  # as long as the field is linear
    assert free[-1] > 10 * free[0]
    assert held[-1] < 1e-12
