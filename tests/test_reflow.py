"""Reflow of Gaussian data, whose straight flow and the bend of the other are known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
from flow_oracles import NODES, POINTS, WEIGHTS, D, closed_form, conditional, gaussian_velocity
from gates import assert_same, differ

import genjax
from genjax.errors import ConfigError
from genjax.families.compose import reflow
from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.families.vae import vae
from genjax.learning.step import training
from genjax.parts.solvers import SOLVERS
from genjax.protocol import Batch, Trained

SD = 0.4  # of the data of these tests, N(1, SD²) in each dimension
STRAIGHT = {"straight": np.ones(())}


def mixed_velocity(p, path, x, t):
    """`straight` of the velocity of the straight flow ε -> 1 + SD ε, and the rest of the flow of
    independent pairs.
    """
    mean = np.ones(D)
    curved = gaussian_velocity(None, path, x, t, mean=mean, root=SD * np.eye(D))
    straight = (1 - SD) / ((1 - t) * SD + t) * (x - (1 - t)) - 1
    return p["straight"] * straight + (1 - p["straight"]) * curved


def reflowed():
    net = closed_form("conditional_ot", mixed_velocity, {"straight": jnp.zeros(())})
    model = flow_matching(POINTS, net=net)
    params, state = model.init(jax.random.key(0))
    return model, params, state, reflow(Trained(model, params, state), solver="rk4", n_steps=30)


@pytest.mark.slow
def test_the_loss_is_that_of_the_pairs_that_its_noise_becomes(x64):
    """Pairs by hand: the teacher's ODE from the noise that is drawn, and the line between the
    two.
    """
    model, params, state = conditional()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    second = reflow(Trained(model, params, state), solver="rk4", n_steps=7)
    both, state = second.init(jax.random.key(0))
    both = {**both, "flow": jax.tree.map(lambda leaf: 1.1 * leaf, both["flow"])}
    batch, key = Batch(jnp.zeros((40, 2)), jnp.arange(40) % 3), jax.random.key(6)
    t, epsilon, dropped = second.noise["flow"](key, batch)
    assert 0 < int(dropped.sum()) < 40
    teacher = functools.partial(
        model.denoiser.denoise, params, state, cond=batch.cond, dropped=dropped
    )
    path, times = model.denoiser.path(params), jnp.linspace(1.0, 0.0, 8)
    x0 = np.asarray(SOLVERS["rk4"](teacher, path, epsilon, times))
    over = np.asarray(t)[:, None]
    x_t = jnp.asarray((1 - over) * x0 + over * epsilon)
    velocity = model.extras.velocity(both, state, x_t, t, batch.cond, dropped)
    wanted = np.square(np.asarray(velocity - epsilon) + x0).sum(1)
    found = jax.jit(second.losses["flow"])(both, state, batch, key, 0)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.slow
def test_a_reflowed_model_samples_and_scores_as_the_flow_that_it_has(x64):
    """All but the loss is the first model's, of the entry "flow" alone."""
    model, params, state, second = reflowed()
    both, _ = second.init(jax.random.key(0))
    assert set(both) == {"flow", "teacher"}
    both["flow"] = STRAIGHT
    alone = {"flow": STRAIGHT}
    draw = second.sample(both, state, jax.random.key(1), 5)
    np.testing.assert_array_equal(draw, model.sample(alone, state, jax.random.key(1), 5))
    assert (draw != second.sample(params | both | params, state, jax.random.key(1), 5)).any()
    batch, key = Batch(jnp.ones((2, D))), jax.random.key(2)
    scores = [f(p, state, batch, key) for f, p in ((second.score, both), (model.score, alone))]
    np.testing.assert_array_equal(*scores)
    assert second.bound is None
    assert second.estimator == model.estimator
    with pytest.raises(ConfigError, match="teacher/straight: missing"):
        second.sample(alone, state, jax.random.key(1), 5)


def bend(t):
    """How far the velocity of independent pairs is from that of the line ε -> 1 + SD ε, over ε, on
    that line and on its own.
    """
    v = (1 - t) ** 2 * SD**2 + t**2
    rate = t - (1 - t) * SD**2
    return rate / v * ((1 - t) * SD + t) - (1 - SD), rate / np.sqrt(v) - (1 - SD)


@pytest.mark.slow
def test_reflow_costs_nothing_where_the_flow_is_straight_and_the_square_of_its_bend_where_it_is_not(
    x64,
):
    _, _, state, second = reflowed()
    batch = Batch(jnp.zeros((4000, D)))
    loss = jax.jit(second.losses["flow"])
    first, _ = second.init(jax.random.key(0))
    straight = loss({**first, "flow": STRAIGHT}, state, batch, jax.random.key(1), 0)[0]
    np.testing.assert_allclose(straight, 0, atol=1e-7)
    curved = np.asarray(loss(first, state, batch, jax.random.key(1), 0)[0])
    wanted = D * (WEIGHTS * bend(NODES)[0] ** 2).sum()
    assert wanted > 0.1
    assert abs(curved.mean() - wanted) < 4 * curved.std() / math.sqrt(len(curved))


@pytest.mark.slow
def test_reflow_learns_the_straight_flow_and_leaves_its_teacher_alone(x64):
    _, params, state, second = reflowed()
    t = training(second, optax.sgd(0.8))
    ts = jax.jit(t.init)(jax.random.key(0))
    assert_same(ts.params, {"flow": params["flow"], "teacher": params["flow"]})
    step = jax.jit(t.step)
    for _ in range(60):
        ts, metrics = step(ts, Batch(jnp.zeros((64, D))))
    assert float(metrics["flow/loss"]) < 1e-6
    assert float(ts.params["flow"]["straight"]) == pytest.approx(1, abs=1e-4)
    assert differ(ts.params, second.init(jax.random.key(0))[0]) == ["flow/straight"]
    # Straightness, E ∫ ‖v(x_t, t) - (x_1 - x_0)‖² dt along the flow's own paths (Liu 2023), and
    # what one Euler step makes.
    key, one = jax.random.key(3), {"solver": "euler", "n_steps": 1}
    for p, bent in ((params, D * (WEIGHTS * bend(NODES)[1] ** 2).sum()), ({"flow": STRAIGHT}, 0.0)):
        path = second.denoiser.generate(p, state, key, 2000, solver="rk4", n_steps=40, every=True)
        times = np.linspace(1, 0, 41)
        v = np.stack(
            [second.extras.velocity(p, state, x, t) for x, t in zip(path, times, strict=True)]
        )
        off = np.square(v - np.asarray(path[0] - path[-1])[None]).sum(-1)  # [times, n]
        each = scipy.integrate.simpson(off, x=-times, axis=0)
        assert abs(each.mean() - bent) < 4 * each.std() / math.sqrt(2000) + 1e-6
        step_off = np.abs(second.denoiser.generate(p, state, key, 2000, **one) - path[-1]).max()
        assert (step_off < 1e-6) == (bent == 0)


@pytest.mark.slow
def test_a_guided_teacher_is_followed_where_the_condition_is_there():
    model, params, state = conditional()
    cond = jnp.arange(200) % 3
    rng = np.random.default_rng(3)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), params["flow"]
    )
    both = {"flow": moved, "teacher": params["flow"]}

    def loss(s):
        return reflow(Trained(model, params, state), n_steps=4, guidance=s).losses["flow"]

    batch, key = Batch(jnp.zeros((200, 2)), cond), jax.random.key(4)
    plain, one, two = (np.asarray(loss(s)(both, state, batch, key, 0)[0]) for s in (None, 1.0, 2.0))
    np.testing.assert_allclose(one, plain, rtol=1e-5, atol=1e-6)
    same = np.isclose(two, plain, rtol=1e-5, atol=1e-6).mean()  # those whose condition was dropped
    assert abs(same - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 200)


def test_a_flow_that_has_guidance_built_in_is_not_guided_once_more():
    """Unless it is asked to be."""
    model, params, state = conditional(guidance=3.0)
    cond = jnp.arange(3)
    second = reflow(Trained(model, params, state), guidance=3.0)
    own = second.init(jax.random.key(0))
    key = jax.random.key(1)
    plain, twice = (
        model.denoiser.generate(params, state, key, 3, cond, guidance=s) for s in (1.0, 3.0)
    )
    np.testing.assert_array_equal(second.sample(*own, key, 3, cond), plain)
    np.testing.assert_array_equal(second.denoiser.generate(*own, key, 3, cond, guidance=3.0), twice)
    assert differ(plain, twice)


@pytest.mark.slow
def test_what_reflow_refuses():
    first = Trained(*conditional(0.0))
    for settings, message in (
        ({"guidance": 2.0}, "cond_dropout > 0"),
        ({"solver": "ancestral"}, "no solver called 'ancestral'"),
        ({"n_steps": 0}, "n_steps must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            reflow(first, **settings)
    for other in (vae(POINTS, hidden=(2,)), diffusion(POINTS, hidden=(2,))):
        with pytest.raises(ConfigError, match="flow-matching model; this model is another"):
            reflow(Trained(other, {}, {}))


def test_reflow_has_its_public_name():
    assert genjax.reflow is reflow


@pytest.mark.slow
def test_a_reflowed_flow_can_be_reflowed_again():
    model = flow_matching(POINTS, hidden=(4,), n_steps=2, n_likelihood_steps=2)
    once = reflow(Trained(model, *model.init(jax.random.key(0))), n_steps=2)
    params, state = once.init(jax.random.key(1))
    twice = reflow(Trained(once, params, state), n_steps=2)
    both, state = twice.init(jax.random.key(2))
    assert_same(both, {"flow": params["flow"], "teacher": params["flow"]})
    x = twice.sample(both, state, jax.random.key(3), 3)
    # It begins as the flow that it is made of.
    np.testing.assert_array_equal(x, once.sample(params, state, jax.random.key(3), 3))
    assert bool(jnp.isfinite(twice.log_prob(both, state, Batch(x), jax.random.key(4))).all())
