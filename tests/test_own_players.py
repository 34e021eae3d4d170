"""A GAN's generator and discriminator of a user's own: losses, states, penalties, conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from gates import assert_close, differ, quick

import genjax
from genjax import DataSpec, example_batch, gan, training
from genjax.errors import ConfigError
from genjax.parts.adversarial import OBJECTIVES

POINTS = DataSpec((3,), "continuous")
CLASSES = DataSpec((3,), "continuous", n_classes=2)
BITS = DataSpec((2, 2, 1), "binary")
KEY = jax.random.key(0)


class Generator(linen.Module):
    """Of everything that it is given, with statistics of batches."""

    shape: tuple[int, ...] = (3,)

    @linen.compact
    def __call__(self, z, *rest, train):
        h = linen.Dense(8)(jnp.concatenate([z, *rest], axis=1))
        h = jnp.tanh(linen.BatchNorm(use_running_average=not train)(h))
        return linen.Dense(int(np.prod(self.shape)))(h).reshape(-1, *self.shape)


class Judge(linen.Module):
    @linen.compact
    def __call__(self, x, *rest):
        h = jnp.concatenate([x.reshape(len(x), -1), *rest], axis=1)
        return linen.Dense(1)(jnp.tanh(linen.Dense(8)(h)))[:, 0]


class Module(nnx.Module):
    """A generator with statistics of batches by nnx."""

    def __init__(self, *, rngs):
        self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, z, train):
        return self.norm(self.dense(z), use_running_average=not train)


class Coupled(linen.Module):
    """A discriminator with statistics of batches."""

    @linen.compact
    def __call__(self, x, train):
        return linen.Dense(1)(linen.BatchNorm(use_running_average=not train)(x))[:, 0]


def alone(model, player):
    return model._replace(losses={player: model.losses[player]}, turns=(), noise={})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "generator"),
    [(POINTS, Generator()), (CLASSES, Generator()), (BITS, Generator((2, 2, 1))), (POINTS, Module)],
    ids=["linen", "conditional", "bits", "nnx"],
)
def test_players_of_ones_own_take_turns_and_keep_their_statistics(spec, generator):
    model = gan(spec, latent_dim=4, generator=generator, discriminator=Judge(), r1=1.0)
    batch = example_batch(spec, jax.random.key(1), 8)
    for player in ("generator", "discriminator"):
        t = training(alone(model, player), optax.adam(1e-2))
        start = quick(t.init)(KEY)
        after, metrics = quick(t.step)(start, batch)
        assert np.isfinite(metrics[f"{player}/loss"])
        # Every kernel of its own moves, and every statistic, and nothing of the other.
        moved = set(differ(after.params, start.params))
        assert {path.split("/")[0] for path in moved} == {player}
        kernels = [path for path in differ_all(start.params[player]) if path.endswith("kernel")]
        assert {f"{player}/{path}" for path in kernels} <= moved
        statistics = differ(after.state, start.state)
        assert len(statistics) == (2 if player == "generator" else 0)
        assert all(path.startswith("generator/") for path in statistics)
    x = quick(model.sample, static_argnames="n")(
        after.params, after.state, KEY, n=8, cond=batch.cond
    )
    assert x.shape == batch.x.shape
    assert spec.kind == "continuous" or set(np.unique(x)) <= {0, 1}


def differ_all(tree):
    """The path of every leaf."""
    return differ(jax.tree.map(lambda leaf: leaf + 1, tree), tree)


@pytest.mark.slow
def test_the_losses_are_those_of_the_modules_by_hand():
    """With R1: the gradient of the module itself, one example at a time."""
    generator, judge = Generator(), Judge()
    model = gan(CLASSES, latent_dim=4, generator=generator, discriminator=judge, r1=0.7)
    batch = example_batch(CLASSES, jax.random.key(1), 6)
    params, state = quick(model.init)(KEY)
    c = CLASSES.embed(batch.cond)

    def own(player):
        return {"params": params[player], **state[player]}

    def fakes(player):
        z = model.noise[player](KEY, batch).z
        return generator.apply(own("generator"), z, c, train=True, mutable=["batch_stats"])

    def logit(x, c):
        return judge.apply(own("discriminator"), x, c)

    goal = OBJECTIVES["nonsaturating"]

    @quick
    def by_hand():
        slope = jax.vmap(jax.grad(lambda x, c: logit(x[None], c[None])[0]))(batch.x, c)
        real, (fake, _) = logit(batch.x, c), fakes("discriminator")
        judged = goal.discriminator(real, logit(fake, c)) + 0.35 * jnp.sum(slope**2, axis=1)
        fake, moved = fakes("generator")
        return judged, goal.generator(real, logit(fake, c)), moved

    judged, made, moved = by_hand()
    found, _ = quick(model.losses["discriminator"])(params, state, batch, KEY, 0)
    np.testing.assert_allclose(found, judged, rtol=1e-5)
    found, aux = quick(model.losses["generator"])(params, state, batch, KEY, 0)
    np.testing.assert_allclose(found, made, rtol=1e-5)
    assert_close(aux.state["generator"], moved, rtol=1e-5)
    # Samples are of the running statistics, not of those of the batch.
    z = jnp.ones((1, 4))
    sampled = model.extras.generate(params, state, z, batch.cond[:1])
    still = generator.apply(own("generator"), z, c[:1], train=False)
    np.testing.assert_allclose(sampled, still, rtol=1e-6)


@pytest.mark.slow
def test_one_player_of_ones_own_and_a_run_of_it():
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    for own in ({"generator": Generator()}, {"discriminator": Coupled()}):
        model = gan(POINTS, latent_dim=4, hidden=(4,), **own)
        run = genjax.train(model, x, steps=4, steps_per_call=2, batch_size=8)
        assert np.isfinite(run.sample(5)).all()


class NotTold(nnx.Module):
    def __init__(self, *, rngs):
        self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, z):
        return self.norm(self.dense(z))


class Dropping(nnx.Module):
    def __init__(self, *, rngs):
        self.dense, self.drop = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, z, train):
        return self.drop(self.dense(z), deterministic=not train)


class Column(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(x)


class Growing(linen.Module):
    """Its statistics have another shape after a call."""

    @linen.compact
    def __call__(self, z, train):
        kept = self.variable("batch_stats", "kept", jnp.zeros, (1,))
        if train:
            kept.value = jnp.concatenate([kept.value, kept.value])
        return linen.Dense(3)(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": NotTold}, r"keeps a state .*an argument `train`"),
        ({"generator": Dropping}, r"draws random numbers .*the generator of a GAN"),
        ({"generator": Growing()}, "changed the structure of its state"),
        ({"generator": Generator((4,))}, r"\(z \[n, 4\]\) -> \[n, 3\]; it returns \[n, 4\]"),
        ({"discriminator": Column()}, r"\(x \[n, 3\]\) -> \[n\]; it returns \[n, 1\]"),
        ({"discriminator": Coupled(), "r1": 1.0}, r"^r1: .*LayerNorm"),
        ({"generator": Generator(), "generator_norm": "batch"}, "^generator_norm: .*your own"),
        ({"discriminator": Judge(), "spectral_norm": True}, "^spectral_norm: .*your own"),
    ],
)
def test_players_that_do_not_fit_are_refused_as_the_model_is_built(options, message):
    with pytest.raises(ConfigError, match=message):
        gan(POINTS, latent_dim=4, **options)
