"""The generative adversarial network as a model: what reads a condition, what a loss draws, bad
input.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from gan_oracles import KEY, PLANE, normal, random
from gates import quick

from genjax.errors import ConfigError
from genjax.families.gan import gan
from genjax.learning.step import training
from genjax.parts.adversarial import OBJECTIVES, one_centred_penalty
from genjax.protocol import Batch, DataSpec

# --- what reads a condition -----------------------------------------------------------------------

CLASSES = DataSpec((2,), "continuous", n_classes=3)
# Of one length, so that one bias serves them all.
MEANS = 1.2 * np.array([[1.0, 0.0], [-0.6, 0.8], [0.0, -1.0]])


def test_a_generator_that_takes_its_condition_in_its_normalisations():
    spec = DataSpec((2,), "continuous", n_classes=3)
    model = gan(
        spec, latent_dim=4, hidden=(20,), generator_norm="batch", generator_cond="batch_norm"
    )
    params, state = random(model)
    assert params["generator"]["layers"][0]["kernel"].shape == (4, 20)  # and not beside z
    z, labels, generate = jnp.asarray(normal(3, 4)), np.arange(3), quick(model.extras.generate)
    assert (
        len(np.unique(np.asarray(generate(params, state, jnp.tile(z[:1], (3, 1)), labels)), axis=0))
        == 3
    )
    norm = params["generator"]["norms"][0]
    params["generator"]["norms"][0] = jax.tree.map(lambda leaf: jnp.tile(leaf[:1], (3, 1)), norm)
    np.testing.assert_array_equal(
        generate(params, state, z, labels), generate(params, state, z, labels[::-1])
    )


@pytest.mark.slow
def test_a_projection_discriminator_is_and_learns_the_ratio_of_normals_by_class(x64):
    # p(x | c) = N(m_c, I) and q = N(0, I): ln p/q = m_c·x - |m_c|²/2, set by hand and then found.
    model = gan(CLASSES, latent_dim=1, hidden=(), discriminator_cond="projection")
    params, state = random(model)

    def ratio(x, c):
        return scipy.stats.norm.logpdf(x, MEANS[c]).sum(1) - scipy.stats.norm.logpdf(x).sum(1)

    layer = {"kernel": jnp.full((2, 1), 0.3), "bias": jnp.full((1,), -(1.2**2) / 2)}
    known = {
        **params["discriminator"],
        "logit": {"layer": layer},
        "embed": {"layer": {"kernel": jnp.asarray(MEANS - 0.3)}},
    }
    x, labels = normal(30, 2, scale=2.0), np.arange(30) % 3
    found = model.extras.logit({**params, "discriminator": known}, state, jnp.asarray(x), labels)
    np.testing.assert_allclose(found, ratio(x, labels), rtol=1e-10, atol=1e-12)
    # Logistic regression by quadrature: its minimum is the ratio, since the ratio is of the
    # projection's form.
    grid = np.stack(np.meshgrid(np.linspace(-6, 6, 31), np.linspace(-6, 6, 31)), axis=-1).reshape(
        -1, 2
    )

    def mass(mean):
        return jnp.asarray(scipy.stats.norm.pdf(grid, mean).prod(1) * 0.4**2)

    start, unravel = jax.flatten_util.ravel_pytree(params["discriminator"])

    def logits(theta):
        own = {**params, "discriminator": unravel(theta)}
        return [
            model.extras.logit(own, state, jnp.asarray(grid), jnp.full(len(grid), c))
            for c in range(3)
        ]

    def value(theta):
        loss = OBJECTIVES["nonsaturating"].discriminator
        parts = [
            mass(MEANS[c]) * loss(d, -jnp.inf) + mass(0.0) * loss(jnp.inf, d)
            for c, d in enumerate(logits(theta))
        ]
        return sum(jnp.sum(part) for part in parts)

    fit = scipy.optimize.minimize(
        quick(jax.value_and_grad(value)), start, jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    for c, found in enumerate(logits(jnp.asarray(fit.x))):
        np.testing.assert_allclose(found, ratio(grid, c), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "vector"])
def test_the_auxiliary_loss_is_what_it_says(x64, kind):
    # G(z, c) = c V + b without z, D = w·x + b, and a prediction x A + a: all by hand.
    spec = CLASSES if kind == "label" else DataSpec((2,), "continuous", cond_dim=3)
    model = gan(spec, latent_dim=1, hidden=(), discriminator_cond="auxiliary", auxiliary_weight=0.7)
    params, state = random(model)
    kernel, head = params["generator"]["last"]["kernel"], params["discriminator"]["auxiliary"]
    params["generator"]["last"]["kernel"] = kernel.at[0].set(0)
    cond = np.array([0, 2, 1, 1, 0]) if kind == "label" else normal(5, 3, seed=5)
    c = np.eye(3)[cond] if kind == "label" else cond
    x = normal(5, 2)
    fake = c @ np.asarray(kernel)[1:] + np.asarray(params["generator"]["last"]["bias"])
    np.testing.assert_allclose(
        model.extras.generate(params, state, jnp.ones((5, 1)), cond), fake, rtol=1e-10
    )

    def auxiliary(x):
        guess = x @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        return (
            0.5 * ((guess - c) ** 2).sum(1)
            if kind == "vector"
            else -(scipy.special.log_softmax(guess, 1) * c).sum(1)
        )

    def logit(x):
        return model.extras.logit(params, state, jnp.asarray(x), cond)

    batch, objective = Batch(jnp.asarray(x), jnp.asarray(cond)), OBJECTIVES["nonsaturating"]
    found = {player: loss(params, state, batch, KEY, 0)[0] for player, loss in model.losses.items()}
    wanted = (
        objective.discriminator(logit(x), logit(fake)) + 0.7 * (auxiliary(x) + auxiliary(fake)) / 2
    )
    np.testing.assert_allclose(found["discriminator"], wanted, rtol=1e-10)
    wanted = objective.generator(logit(x), logit(fake)) + 0.7 * auxiliary(fake)
    np.testing.assert_allclose(found["generator"], wanted, rtol=1e-10)


# --- what a loss draws ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_a_loss_is_a_function_of_its_noise(penalty):
    """What `noise` says that a loss draws gives its value: with it all is computed again."""
    model = gan(PLANE, latent_dim=3, hidden=(4,), objective="wasserstein", gradient_penalty=penalty)
    params, state = random(model)
    batch = Batch(jnp.asarray(normal(5, 2), jnp.float32))
    generate, logit = (partial(f, params, state) for f in model.extras)
    value, aux = model.losses["discriminator"](params, state, batch, KEY, 0)
    drawn = model.noise["discriminator"](KEY, batch)
    fake = generate(drawn.z)
    assert fake.shape == (5, 2)
    np.testing.assert_allclose(aux.metrics["fake_logit"], logit(fake), rtol=1e-5)
    wanted = logit(fake) - logit(batch.x)
    if penalty:
        assert drawn.t.shape == (5, 1)
        between = batch.x + drawn.t * (fake - batch.x)
        wanted += penalty * one_centred_penalty(logit, between)
    else:
        assert drawn.t is None
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)
    value, _ = model.losses["generator"](params, state, batch, KEY, 0)
    drawn = model.noise["generator"](KEY, batch)
    np.testing.assert_allclose(value, -logit(generate(drawn.z)), rtol=1e-5, atol=1e-6)
    assert model.noise.keys() == model.losses.keys()


@pytest.mark.parametrize(("kind", "levels", "top"), [("discrete", 5, 4), ("binary", None, 1)])
def test_wild_generators_stay_within_the_values_of_the_data(kind, levels, top):
    model = gan(DataSpec((3,), kind, levels=levels), latent_dim=2, hidden=(8,))
    params, state = random(model, size=5.0)
    x = quick(model.extras.generate)(params, state, jnp.asarray(normal(200, 2)))
    np.testing.assert_allclose([x.min(), x.max()], [0, top], atol=1e-4)
    drawn = quick(model.sample, static_argnums=3)(params, state, KEY, 200)
    assert {0, top} <= set(np.unique(drawn).tolist()) <= set(range(top + 1))


def test_samples_are_what_the_generator_makes_of_normal_numbers():
    model = gan(PLANE, latent_dim=3, hidden=(4,))
    params, state = random(model)
    x = model.sample(params, state, KEY, 6)
    z = jax.random.normal(KEY, (6, 3))
    np.testing.assert_array_equal(x, model.extras.generate(params, state, z))


# --- bad input ------------------------------------------------------------------------------------

DIGITS = DataSpec((8, 8, 1), "binary", name="digits")
LABELS = DataSpec((8, 8, 1), "binary", n_classes=3)


@pytest.mark.parametrize(
    ("spec", "settings", "match"),
    [
        (PLANE, {"objective": "hing"}, "no objective called 'hing'. Did you mean hinge"),
        (PLANE, {"net": "dcgn"}, "no net called 'dcgn'. Did you mean dcgan"),
        (
            LABELS,
            {"generator_cond": "batchnorm"},
            "no generator cond called 'batchnorm'. Did you mean batch_norm",
        ),
        (
            LABELS,
            {"discriminator_cond": "project"},
            "no discriminator cond called 'project'. Did you mean projection",
        ),
        (PLANE, {"dtype": "bfloat"}, "no dtype called 'bfloat'. Did you mean bfloat16"),
        (PLANE, {"r1": -1.0}, "r1 must be at least 0; got -1.0"),
        (
            PLANE,
            {"gradient_penalty": -10},
            "gradient_penalty must be at least 0; got -10",
        ),
        (
            DIGITS,
            {"net": "dcgan", "discriminator_norm": "batch", "r1": 1.0, "gradient_penalty": 1.0},
            "r1 and gradient_pen",
        ),
        (
            PLANE,
            {"discriminator_norm": "batch"},
            "for convolutional nets; use net='dcgan' or 'resnet'",
        ),
        (LABELS, {"generator_cond": "batch_norm"}, "say generator_norm='batch' as well"),
        (
            LABELS,
            {"generator_cond": "batch_norm", "generator_norm": "batch", "hidden": ()},
            "a hidden layer",
        ),
        (PLANE, {"discriminator_cond": "projection"}, "plane has none. Take conditional data"),
        (
            PLANE,
            {"generator_cond": "batch_norm", "generator_norm": "batch"},
            "generator_cond='batch_norm' and",
        ),
        (PLANE, {"latent_dim": 0}, "latent_dim must be at least 1; got 0"),
        (PLANE, {"discriminator_steps": 0}, "discriminator_steps must be at least 1; got 0"),
        (DataSpec((5,), "tokens", levels=9), {}, "got tokens. Use a sequence family"),
        (
            DataSpec((30, 30, 1), "binary"),
            {"net": "dcgan"},
            "sides that are multiples of 4; got 30 x 30",
        ),
        (
            PLANE,
            {"net": "dcgan"},
            r"events of shape \(height, width, channels\); got \(2,\). Use net='mlp'",
        ),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(spec, settings, match):
    with pytest.raises(ConfigError, match=match):
        gan(spec, **settings)


def test_players_and_conditions_that_do_not_fit():
    model = gan(PLANE, latent_dim=1, hidden=())
    params, state = random(model)
    with pytest.raises(
        ConfigError, match=r"each player \(discriminator, generator\); got them for: generater"
    ):
        training(model, {"generater": optax.adam(1e-3)})
    labels, z, x = np.zeros(3, np.int32), jnp.zeros((3, 1)), jnp.zeros((3, 2))
    for function, *inputs in (
        (model.sample, KEY, 3),
        (model.extras.generate, z),
        (model.extras.logit, x),
    ):
        with pytest.raises(ValueError, match="unconditional: leave `cond` out"):
            function(params, state, *inputs, labels)
