"""Generative adversarial networks against known answers: losses, penalties, dynamics, turns.

Generators are set by hand, so that what they make is a known normal or a point, and critics are
linear. Statements about means hold within 4 standard errors.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gan_oracles import DATA, KEY, MODEL, PLANE, RATIO, every_objective, linear, optimum, random
from gates import assert_close, assert_same, differ, quick

from genjax.families.gan import gan
from genjax.learning.optim import track_ema
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import compiled, feed, repeat_steps
from genjax.parts.adversarial import OBJECTIVES
from genjax.protocol import Batch, DataSpec, TrainState

POINT = DataSpec((1,), "continuous", name="line")


# --- losses ---------------------------------------------------------------------------------------


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
    np.testing.assert_allclose(model.extras.logit(params, state, batch.x), real, rtol=1e-12)

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
    own = {player: model.losses[player]}
    return model._replace(losses=own, noise={player: model.noise[player]}, turns=())


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
    found = quick(model.extras.logit)(ts.params, ts.state, jnp.asarray(x[:, None]))
    off = np.abs(found - np.polyval(RATIO[::-1], x))
    assert off.max() < 0.15
    assert off.mean() < 0.05

    def density(d):
        return d.pdf(np.linspace(-9, 9, 1801)) / 100

    last = np.asarray(metrics["discriminator/loss"][-500:])
    exact = optimum("nonsaturating", density(DATA), density(MODEL))[1]
    assert abs(last.mean() - exact) < 4 * last.std() / math.sqrt(500) + 2e-3
    assert_same(ts.params["generator"], generator)


# --- linear critics -------------------------------------------------------------------------------


@pytest.mark.slow
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


SLOPE = 0.5  # f'(0) of the non-saturating loss as a function of ψ θ, as in test_adversarial.py


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_training_step_is_two_turns_of_which_the_second_sees_the_first(weight):
    # The Jacobian of the step at the Dirac equilibrium. Turn by turn ψ' = (1 - h γ) ψ - h f' θ, θ'
    # = θ + h f' ψ'.
    model, params, state = linear([0.0], [0.0], r1=weight)
    rate, slope = 0.2, SLOPE
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
    params, state = random(gan(PLANE, hidden=(2,)), size=0.0)
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
        found = [loss(params, state, batch, key, 0) for loss in losses]
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
    params, state = random(model, 8)

    def losses(params, x):
        return [loss(params, state, Batch(x), KEY, 0)[0] for loss in model.losses.values()]

    return losses, params


@pytest.mark.slow
def test_the_second_derivatives_of_the_penalties_are_right(x64):
    losses, params = whole("hinge")
    x = jnp.asarray(np.random.default_rng(9).normal(size=(7, 2)))

    def total(own):
        return jnp.sum(losses({**params, "discriminator": own}, x)[0])

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
    by_hand = sample({**evaluated, "generator": wanted})
    np.testing.assert_allclose(sample(evaluated), by_hand, rtol=1e-4, atol=1e-5)
    assert not np.allclose(sample(evaluated), sample(second.params), rtol=1e-3)
