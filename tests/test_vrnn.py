"""The VRNN as a model of sequences: padding, causality, which of prior and posterior is used where,
floors, bad input.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import state_space
from gates import assert_close, assert_same, named, optimised, quick
from rows import grown, widen

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.vrnn import MIN_SCALE, vrnn
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(5)
WORDS = DataSpec((4,), "tokens", levels=3, step="character", end=2, name="words")
LABELLED = DataSpec((4,), "tokens", levels=3, step="character", n_classes=2, name="labelled words")
ROLLS = DataSpec((5, 3), "binary", step="frame", lengths=True, name="rolls")
LONGER_ROLLS = DataSpec((8, 3), "binary", step="frame", lengths=True, name="longer rolls")
CURVES = DataSpec((4, 2), "continuous", step="point", cond_dim=2, name="curves")
OBJECTIVES = {
    "elbo": {"n_samples": 2, "n_bound_samples": 2},
    "iwae": {"objective": "iwae", "bound_estimator": "iwae", "n_samples": 3, "n_bound_samples": 3},
    "fivo": {"objective": "fivo", "bound_estimator": "fivo", "n_samples": 4, "n_bound_samples": 4},
}
every_objective = pytest.mark.parametrize("how", OBJECTIVES)


def setup(spec, **settings):
    """A tiny model, its parameters far from their init; in float64 where the test is."""
    return _setup(spec, jnp.result_type(float) == jnp.float64, **settings)


@functools.cache
def _setup(spec, wide, **settings):
    model = vrnn(spec, **{"latent_dim": 2, "d_hidden": 5, "hidden": (6,), **settings})
    params, state = model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 2 * leaf, grown(params))
    return model, widen(params) if wide else params, state


@pytest.mark.slow
@every_objective
def test_padding_changes_neither_values_nor_gradients(how, x64):
    model, params, state = setup(ROLLS, **OBJECTIVES[how])
    batch = widen(example_batch(ROLLS, KEY, 3))._replace(length=jnp.asarray([2, 5, 1]))
    counts = jnp.arange(5)[None] < batch.length[:, None]
    other = batch._replace(x=jnp.where(counts[..., None], batch.x, 1e6))

    def value_of(model):
        return quick(
            jax.value_and_grad(
                lambda p, batch: model.losses["vrnn"](p, state, batch, KEY, 0)[0].sum()
            )
        )

    value = value_of(model)
    wanted = value(params, batch)
    assert_same(value(params, other), wanted)
    longer, _, _ = setup(LONGER_ROLLS, **OBJECTIVES[how])
    padded = batch._replace(x=jnp.pad(batch.x, [(0, 0), (0, 3), (0, 0)], constant_values=7.0))
    assert_close(value_of(longer)(params, padded), wanted, rtol=1e-12)
    bound = quick(model.bound)
    assert_same(bound(params, state, other, KEY), bound(params, state, batch, KEY))
    terms = quick(model.extras.step_bound)(params, state, other, KEY)
    assert np.sum(np.asarray(terms) == 0) == 15 - 8


@pytest.mark.slow
@every_objective
def test_after_the_end_token_nothing_counts(how, x64):
    model, params, state = setup(WORDS, **OBJECTIVES[how])
    batch = Batch(jnp.asarray([[0, 1, 2, 2], [2, 2, 2, 2], [1, 0, 1, 0]], jnp.int32))
    other = Batch(jnp.asarray([[0, 1, 2, 0], [2, 1, 0, 1], [1, 0, 1, 0]], jnp.int32))
    bound = quick(model.bound)
    assert_same(bound(params, state, other, KEY), bound(params, state, batch, KEY))


@pytest.mark.slow
def test_no_term_of_the_bound_sees_its_future(x64):
    model, params, state = setup(DataSpec((5, 3), "binary", step="frame"), hidden=(6, 7))
    x = widen(example_batch(model.spec, KEY, 1)).x
    terms = quick(jax.jacrev(lambda x: model.extras.step_bound(params, state, Batch(x), KEY)[0]))
    size = np.abs(terms(x)[:, 0]).max(-1)
    np.testing.assert_array_equal(size[np.triu_indices(5, 1)], 0)
    assert size[np.tril_indices(5)].min() > 0
    mean, log_scale = model.latent.encode(params, state, x)
    assert mean.shape == log_scale.shape == (1, 5, 2)
    of_mean = quick(jax.jacrev(lambda x: model.latent.encode(params, state, x)[0][0].sum(-1)))
    size = np.abs(of_mean(x)[:, 0]).max(-1)
    np.testing.assert_array_equal(size[np.triu_indices(5, 1)], 0)


def test_latents_are_those_along_the_path_of_means():
    model, params, state = setup(CURVES)
    x, cond = jax.random.normal(KEY, (3, 4, 2)), jnp.ones((3, 2))
    last = params["vrnn"]["encoder"]["rest"]["layers"][0]
    moved = {**last, "bias": last["bias"] + jnp.asarray([1.0, 1.0, 0.0, 0.0])}
    encoder = {**params["vrnn"]["encoder"], "rest": {"layers": {0: moved}}}
    encode = quick(lambda p: model.latent.encode({"vrnn": p}, state, x, cond)[0])
    apart = encode({**params["vrnn"], "encoder": encoder}) - encode(params["vrnn"])
    np.testing.assert_allclose(apart[:, 0], 1, rtol=1e-4)
    assert np.abs(apart[:, 1:] - 1).min(axis=(0, 2)).min() > 1e-4  # by what the recurrence saw


@pytest.mark.slow
def test_the_loss_is_the_bound_and_beta_weighs_the_divergence(x64):
    batch = widen(example_batch(CURVES, KEY, 6))
    for how, settings in OBJECTIVES.items():
        model, params, state = setup(CURVES, **settings)
        loss, aux = quick(model.losses["vrnn"])(params, state, batch, KEY, 0)
        key = model.noise["vrnn"](KEY, batch).paths
        np.testing.assert_allclose(quick(model.bound)(params, state, batch, key), -loss, rtol=1e-12)
        np.testing.assert_allclose(aux.metrics[how], -loss, rtol=1e-12)
    one, params, state = setup(CURVES)
    three, _, _ = setup(CURVES, beta=3.0)
    metrics = quick(one.losses["vrnn"])(params, state, batch, KEY, 0)[1].metrics
    wanted = 3 * metrics["kl"] - metrics["log_likelihood"]
    np.testing.assert_allclose(
        quick(three.losses["vrnn"])(params, state, batch, KEY, 0)[0], wanted, rtol=1e-12
    )
    assert metrics["kl"].min() > 1e-2


# --- prior in free runs, posterior on what is given -----------------------------------------------


def lying(k, g, s):
    """The same posterior 50 further up: a free run must not notice, and whoever listens to it is
    far off.
    """
    model = state_space.model(3)
    params, state = state_space.weights(model, k, g, s)
    moved = jax.tree.map(jnp.copy, params)
    moved["vrnn"]["encoder"]["first"]["bias"] += jnp.asarray([50.0, 0.0])
    return model, params, moved, state


@pytest.mark.slow
def test_free_runs_use_the_prior_and_given_data_the_posterior(x64):
    model, params, moved, state = lying(*state_space.filtering())
    x = jnp.asarray(state_space.draw(3))[None]
    sample = optimised(model.sample, static_argnums=3)
    assert_same(sample(moved, state, KEY, 50), sample(params, state, KEY, 50))
    bound = quick(model.bound)
    before, after = (bound(p, state, Batch(x), KEY) for p in (params, moved))
    assert after[0] < before[0] - 1000
    generate = optimised(model.autoregressive.generate, static_argnums=3)
    prompt = jnp.tile(x, (50, 1, 1))
    # The latent variable of a prompt of one step is about 50 up, and the second x is what goes on
    # from there.
    got = generate(moved, state, KEY, 50, prompt=prompt, prompt_length=jnp.asarray(1))
    assert_same(got[:, 0], prompt[:, 0])
    expected = state_space.C[:, 0] * state_space.A[0, 0] * 50
    assert (np.abs(got[:, 1] - expected[None]) < 10).all()
    free = generate(moved, state, KEY, 50, prompt=prompt, prompt_length=jnp.asarray(0))
    assert_same(free, sample(params, state, KEY, 50))
    whole = generate(
        moved, state, KEY, 50, prompt=prompt, prompt_length=jnp.asarray([3] * 25 + [0] * 25)
    )
    assert_same(whole[:25], prompt[:25])
    assert_same(whole[25:], free[25:])


@pytest.mark.slow
def test_samples_have_the_covariance_of_the_state_space_model(x64):
    n = 40_000
    model = state_space.model(3)
    x = quick(model.sample, static_argnums=3)(
        *state_space.weights(model, *state_space.bootstrap()), KEY, n
    )
    x, (covariance, _) = np.asarray(x).reshape(n, -1), state_space.marginal(3)
    variance = np.diag(covariance)
    assert (np.abs(x.mean(0)) < 4.5 * np.sqrt(variance / n)).all()
    error = np.sqrt(
        (np.outer(variance, variance) + covariance**2) / n
    )  # of a Gaussian's sample covariance
    assert (np.abs(x.T @ x / n - covariance) < 4.5 * error).all()


@pytest.mark.slow
def test_samples_end_with_the_end_token_and_have_the_dtype_of_the_data():
    model, params, state = setup(WORDS)
    x = np.asarray(quick(model.sample, static_argnums=3)(params, state, KEY, 500))
    assert x.dtype == np.int32
    ended = np.cumsum(x == 2, axis=1) > 0
    assert (x[ended] == 2).all()
    assert 0 < ended[:, 0].mean() < 1
    longer = model.autoregressive.generate(params, state, KEY, 3, length=9)
    assert longer.shape == (3, 9)


@pytest.mark.slow
def test_conditions_matter_and_are_dropped_at_the_rate_that_was_asked_for():
    model, params, state = setup(LABELLED, cond_dropout=0.3)
    never, _, _ = setup(LABELLED, cond_dropout=1e-9)  # with the same parameters
    n = 3000
    batch = Batch(jnp.zeros((n, 4), jnp.int32), jnp.ones(n, jnp.int32))
    loss = [quick(m.losses["vrnn"])(params, state, batch, KEY, 0)[0] for m in (model, never)]
    rate = 1 - np.isclose(*loss, rtol=1e-5).mean()
    assert abs(rate - 0.3) < 3 * math.sqrt(0.3 * 0.7 / n)
    other = quick(never.losses["vrnn"])(
        params, state, batch._replace(cond=jnp.zeros(n, jnp.int32)), KEY, 0
    )[0]
    assert not np.isclose(other, loss[1], rtol=1e-5).any()


@pytest.mark.slow
def test_dropout_is_for_losses_only():
    model, params, state = setup(ROLLS, dropout=0.4)
    plain, _, _ = setup(ROLLS)
    batch = example_batch(ROLLS, KEY, 4)
    assert_same(
        quick(model.bound)(params, state, batch, KEY), quick(plain.bound)(params, state, batch, KEY)
    )
    loss, same = (quick(m.losses["vrnn"])(params, state, batch, KEY, 0)[0] for m in (model, plain))
    assert (loss != same).all()


# --- numbers that stay finite, bad input ----------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_random_inits_are_finite_with_their_gradients():
    spec = DataSpec((6, 2), "continuous", step="point")
    model = vrnn(spec, latent_dim=2, d_hidden=4, hidden=(4,))
    x = 10 * example_batch(spec, KEY, 2).x

    def run(key):
        params, state = model.init(key)
        params = jax.tree.map(lambda leaf: 3 * leaf, params)

        def value(p):
            return model.losses["vrnn"](p, state, Batch(x), key, 0)[0].sum()

        loss, gradient = jax.value_and_grad(value)(params)
        scale = model.latent.encode(params, state, x)[1]
        return loss, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), gradient), scale.min()

    loss, finite, scale = jax.jit(jax.vmap(run))(jax.random.split(KEY, 10_000))
    assert np.isfinite(loss).all()
    assert all(leaf.all() for leaf in named(finite).values())
    assert scale.min() >= math.log(MIN_SCALE) - 1e-6


@pytest.mark.parametrize(
    ("spec", "settings", "match"),
    [
        (DataSpec((4,), "continuous", name="points"), {}, "points has no steps"),
        (ROLLS, {"cell": "grru"}, r"no cell called 'grru'\. Did you mean gru"),
        (ROLLS, {"objective": "fivvo"}, "no objective called 'fivvo'"),
        (ROLLS, {"bound_estimator": "iwea"}, "no bound estimator called 'iwea'"),
        (ROLLS, {"resampling": "residual"}, "no resampling called 'residual'"),
        (ROLLS, {"activation": "rellu"}, "no activation called 'rellu'"),
        (ROLLS, {"dtype": "float8"}, "no dtype called 'float8'"),
        (ROLLS, {"latent_dim": -1}, "latent_dim must be at least 0; got -1"),
        (ROLLS, {"hidden": (8, 0)}, r"hidden\[1\] must be at least 1; got 0"),
        (ROLLS, {"beta": -1.0}, "beta must be at least 0; got -1.0"),
        (ROLLS, {"n_samples": 0}, "n_samples must be at least 1; got 0"),
        (ROLLS, {"cond_dropout": 1.5}, r"cond_dropout must be in \[0, 1\); got 1.5"),
        (ROLLS, {"objective": "iwae", "beta": 0.5}, "iwae has none. Leave beta at 1; got 0.5"),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(spec, settings, match):
    with pytest.raises(ConfigError, match=match):
        vrnn(spec, **settings)


@pytest.mark.slow
def test_prompts_that_do_not_fit():
    model, params, state = setup(ROLLS)
    generate = functools.partial(model.autoregressive.generate, params, state, KEY, 2)
    with pytest.raises(ConfigError, match="A prompt of 6 steps does not fit into 5"):
        generate(prompt=jnp.zeros((2, 6, 3)))
    with pytest.raises(
        ConfigError, match=r"The prompt must have the shape \[2, steps, 3\]; got \[2, 4, 2\]"
    ):
        generate(prompt=jnp.zeros((2, 4, 2)))
    with pytest.raises(
        ConfigError, match="prompt_length must be from 0 to the 4 steps of the prompt; got 5"
    ):
        generate(prompt=jnp.zeros((2, 4, 3)), prompt_length=5)
    with pytest.raises(ConfigError, match="The length must be at least 1; got 0"):
        generate(length=0)


def test_columns_of_the_data_are_none_of_the_latents():
    spec = DataSpec((4, 2), "continuous", step="hour", columns=("a", "b"))
    model = vrnn(spec, latent_dim=2, d_hidden=4, hidden=(4,))
    assert model.latent.spec.columns is None


def test_a_prompt_may_be_lists():
    spec = DataSpec((5,), "tokens", levels=3, step="token")
    model = vrnn(spec, latent_dim=2, d_hidden=4, hidden=(4,))
    params, state = model.init(jax.random.key(0))
    found = model.autoregressive.generate(params, state, jax.random.key(1), 1, prompt=[[1, 2]])
    np.testing.assert_array_equal(found[0, :2], [1, 2])
