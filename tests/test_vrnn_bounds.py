"""Bounds of the VRNN where the truth is known: against a Kalman filter, a VAE, a recurrent network
and sums over all x.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import state_space
from gates import assert_close, assert_same, quick
from rows import grown, widen

from genjax.data import example_batch
from genjax.families.rnn import rnn
from genjax.families.vae import vae
from genjax.families.vrnn import MIN_SCALE, vrnn
from genjax.parts.particles import (
    RESAMPLING,
    Sequential,
    ancestors,
    elbo_steps,
    particle_bound,
)
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(5)
N = 4000


def estimates(model, params, state, x, n=N, key=KEY):
    """n independent values of the bound of one x."""
    batch = Batch(jnp.broadcast_to(jnp.asarray(x), (n, *x.shape)))
    return np.asarray(quick(model.bound)(params, state, batch, key))


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


# --- a linear-Gaussian state space model: the truth is a Gaussian's -------------------------------


def smoothing_posterior(x):
    """p(z_t | z_{t-1}, x_{t..T}) of the state space model as [T, 1, 1] each: its slope in z_{t-1},
    its offset, its log-scale.

    From the back, x_{t..T} is worth exp(-½ precision z_t² + shift z_t).
    """
    a, q = state_space.A[0, 0], state_space.Q[0]
    precision = shift = 0.0
    slopes, offsets, log_scales = [], [], []
    for row in x[::-1]:
        # What comes after t, seen from z_t, z_{t+1} integrated out; then x_t itself.
        weight = 1 / (1 + q * precision)
        precision, shift = a * a * precision * weight, a * shift * weight
        precision += ((state_space.C[:, 0] ** 2) / state_space.R).sum()
        shift += (state_space.C[:, 0] * row / state_space.R).sum()
        variance = 1 / (1 / q + precision)
        slopes.append(variance * a / q)
        offsets.append(variance * shift)
        log_scales.append(0.5 * math.log(variance))
    return tuple(
        jnp.asarray(values[::-1])[:, None, None] for values in (slopes, offsets, log_scales)
    )


@pytest.mark.slow
def test_with_the_smoother_as_posterior_the_bound_is_the_kalman_log_likelihood(x64):
    steps, n = 5, 2000
    x = state_space.draw(steps)
    truth = state_space.log_prob(x[None])
    a, q, c, r = (
        jnp.asarray(m) for m in (state_space.A, state_space.Q, state_space.C, state_space.R)
    )

    def log_normal(x, mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance[None] + jnp.log(2 * jnp.pi * variance)[None])

    exact = Sequential(
        prior=lambda h: (h @ a.T, jnp.broadcast_to(0.5 * jnp.log(q)[None], h.shape)),
        posterior=lambda observed, h: (
            observed[0] * h + observed[1],
            jnp.broadcast_to(observed[2], h.shape),
        ),
        log_likelihood=lambda x, z, h: log_normal(x, z @ c.T, r).sum(-1),
        recur=lambda observed, z, carry: (z,),
    )
    observed = jax.tree.map(lambda v: jnp.broadcast_to(v, (steps, n, 1)), smoothing_posterior(x))
    xs, carry = jnp.broadcast_to(jnp.asarray(x)[:, None], (steps, n, 2)), (jnp.zeros((n, 1)),)
    # p(x, z) / q(z | x) is p(x), whatever z is.
    for k in (1, 3):
        bound = particle_bound(exact, xs, observed, jnp.ones((steps, n), bool), carry, KEY, k)
        np.testing.assert_allclose(bound, truth, rtol=1e-12)
    log_lik, kl = elbo_steps(exact, xs, observed, carry, KEY)
    values = np.asarray((log_lik - kl).sum(0))
    assert abs(values.mean() - truth) < 4 * standard_error(values)
    # With anything else it is below: here the posterior looks the wrong way.
    off = (*observed[:1], observed[1] + 0.5, observed[2])
    log_lik, kl = elbo_steps(exact, xs, off, carry, KEY)
    assert (log_lik - kl).sum(0).mean() < truth - 0.1


@pytest.mark.slow
def test_one_step_with_its_exact_posterior_gives_the_exact_log_likelihood(x64):
    x = state_space.draw(1)
    truth = state_space.log_prob(x[None])
    model = state_space.model(1, bound_estimator="iwae")
    params, state = state_space.weights(model, *state_space.filtering())
    np.testing.assert_allclose(estimates(model, params, state, x, 50), truth, rtol=1e-12)
    np.testing.assert_allclose(state_space.elbo(x, *state_space.filtering()), truth, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["elbo", "iwae"])
@pytest.mark.parametrize("proposal", [state_space.filtering, state_space.bootstrap])
def test_the_mean_bound_is_the_kalman_log_likelihood_minus_the_divergence(how, proposal, x64):
    x = state_space.draw(5)
    wanted = state_space.elbo(x, *proposal())
    assert wanted < state_space.log_prob(x[None]) - 0.1
    model = state_space.model(5, bound_estimator=how)
    values = estimates(model, *state_space.weights(model, *proposal()), x, 20_000)
    assert abs(values.mean() - wanted) < 4 * standard_error(values)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["iwae", "fivo"])
def test_bounds_grow_with_the_number_of_particles_towards_the_truth(how, x64):
    x = state_space.draw(8)
    truth = state_space.log_prob(x[None])
    means = []
    for k in (1, 4, 32):
        model = state_space.model(8, bound_estimator=how, n_bound_samples=k)
        values = estimates(model, *state_space.weights(model, *state_space.filtering()), x, 2000)
        means.append((values.mean(), standard_error(values)))
    for (low, error), (high, other) in itertools.pairwise(means):
        assert low + 3 * math.hypot(error, other) < high
    assert means[-1][0] < truth + 3 * means[-1][1]
    assert truth - means[-1][0] < 0.15 * (truth - means[0][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "resampling"), [("iwae", "systematic"), ("fivo", "systematic"), ("fivo", "multinomial")]
)
def test_the_particle_estimate_of_the_likelihood_is_unbiased(how, resampling, x64):
    """With the prior as proposal, the bootstrap filter: mean exp(ln p̂ - ln p) = 1."""
    x = state_space.draw(6)
    model = state_space.model(6, bound_estimator=how, n_bound_samples=16, resampling=resampling)
    values = estimates(
        model, *state_space.weights(model, *state_space.bootstrap()), x
    ) - state_space.log_prob(x[None])
    ratio = np.exp(values)
    assert standard_error(ratio) < 0.05
    assert abs(ratio.mean() - 1) < 3 * standard_error(ratio)
    assert values.mean() < -0.01


@pytest.mark.slow
def test_resampling_keeps_the_estimate_sharp_where_weights_would_degenerate(x64):
    x, spread = state_space.draw(40), {}
    for how in ("iwae", "fivo"):
        model = state_space.model(40, bound_estimator=how, n_bound_samples=16)
        values = estimates(model, *state_space.weights(model, *state_space.bootstrap()), x, 500)
        spread[how] = values.std()
    assert spread["fivo"] < 0.5 * spread["iwae"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", RESAMPLING)
def test_particles_are_chosen_in_proportion_to_their_weights(scheme, x64):
    k, n = 4, 50_000
    weight = np.asarray([0.5, 0.1, 0.0, 0.4])
    log_weight = jnp.broadcast_to(jnp.log(jnp.asarray(weight))[:, None] + 3.0, (k, n))
    chosen = np.asarray(ancestors(RESAMPLING[scheme](KEY, k, n), log_weight))
    counts = (chosen[None] == np.arange(k)[:, None, None]).sum(
        1
    )  # how often each was chosen, [k, n]
    error = counts.std(1) / math.sqrt(n)
    assert (np.abs(counts.mean(1) - k * weight) <= 4 * error + 1e-12).all()
    if scheme == "systematic":  # never further than one from its share
        assert (np.abs(counts - k * weight[:, None]) < 1).all()
    else:
        np.testing.assert_allclose(counts.var(1), k * weight * (1 - weight), rtol=0.05)


# --- a hidden Markov model: the truth is the forward algorithm's ----------------------------------

START = np.asarray([0.5, 0.3, 0.2])
MOVE = np.asarray([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
EMIT = np.asarray([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.05, 0.9, 0.05]])


def hidden_markov_model():
    """It as a model with latent variables: z_t ~ N(0, 1) whatever came before, and the state after
    s is where Φ(z_t) falls among the cumulated probabilities of moving from s. h_t is the state, 3
    before the first; the proposal is off on purpose.
    """
    cumulated = jnp.asarray(np.cumsum([*MOVE, START], axis=1)[:, :-1])
    emit = jnp.log(jnp.asarray(EMIT))

    def state(z, h):
        return (jax.scipy.stats.norm.cdf(z) > cumulated[h[:, 0].astype(int)]).sum(1)

    return Sequential(
        prior=lambda h: (jnp.zeros_like(h), jnp.zeros_like(h)),
        posterior=lambda observed, h: (0.3 * observed - 0.3, jnp.full_like(h, math.log(1.2))),
        log_likelihood=lambda x, z, h: emit[state(z, h), x],
        recur=lambda observed, z, carry: (state(z, carry[0])[:, None].astype(z.dtype),),
    )


@pytest.mark.slow
def test_the_particle_estimate_of_a_hidden_markov_model_is_unbiased_for_the_forward_algorithm(x64):
    x, n = np.asarray([0, 2, 2, 1, 0]), 20_000
    alpha = START * EMIT[:, x[0]]
    for symbol in x[1:]:
        alpha = alpha @ MOVE * EMIT[:, symbol]
    paths = itertools.product(range(3), repeat=len(x))
    joint = [
        START[s[0]] * MOVE[s[:-1], s[1:]].prod() * EMIT[s, x].prod() for s in map(np.asarray, paths)
    ]
    np.testing.assert_allclose(alpha.sum(), sum(joint), rtol=1e-12)
    xs = jnp.broadcast_to(jnp.asarray(x)[:, None], (len(x), n))
    observed, carry = xs[..., None].astype(float), (jnp.full((n, 1), 3.0),)
    for resampling in (None, *RESAMPLING.values()):
        values = particle_bound(
            hidden_markov_model(),
            xs,
            observed,
            jnp.ones(xs.shape, bool),
            carry,
            KEY,
            32,
            resampling,
        )
        ratio = np.exp(np.asarray(values)) / alpha.sum()
        assert standard_error(ratio) < 0.01
        assert abs(ratio.mean() - 1) < 3 * standard_error(ratio)
        assert np.log(ratio).mean() < -0.01


# --- special cases that are other families --------------------------------------------------------


def random(spec, **settings):
    """A model with latent variables that matter, its parameters away from their init; in float64
    where the test is.
    """
    model = vrnn(spec, **{"latent_dim": 2, "d_hidden": 5, "hidden": (6,), **settings})
    params, state = model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 2 * leaf, grown(params))
    return model, widen(params) if jnp.result_type(float) == jnp.float64 else params, state


WORDS = DataSpec((4,), "tokens", levels=3, step="character", end=2, name="words")
LABELLED = DataSpec((4,), "tokens", levels=3, step="character", n_classes=2, name="labelled words")
ROLLS = DataSpec((5, 3), "binary", step="frame", lengths=True, name="rolls")
CURVES = DataSpec((4, 2), "continuous", step="point", cond_dim=2, name="curves")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "cell"),
    [(WORDS, "vanilla"), (LABELLED, "lstm"), (CURVES, "gru")],
    ids=["words", "labels", "curves"],
)
def test_without_latent_variables_it_is_the_recurrent_network(spec, cell, x64):
    plain = rnn(spec, cell=cell, d_embed=5, d_hidden=5)
    params, nothing = plain.init(jax.random.key(0))
    p = widen(grown(params))["rnn"]
    same = {
        "vrnn": {
            "embed": p["embed"],
            "layer": p["layers"]["layers"][0],
            "decoder": {"layers": {0: p["readout"]}},
        }
    }
    batch = widen(example_batch(spec, KEY, 6))
    wanted = quick(plain.log_prob)({"rnn": p}, nothing, batch, KEY)
    for how in ("elbo", "iwae", "fivo"):
        model = vrnn(
            spec,
            cell=cell,
            latent_dim=0,
            d_hidden=5,
            hidden=(),
            bound_estimator=how,
            n_bound_samples=1 if how == "elbo" else 3,
        )
        first, state = model.init(jax.random.key(0))
        assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, same)
        np.testing.assert_allclose(quick(model.bound)(same, state, batch, KEY), wanted, rtol=1e-12)


@pytest.mark.slow
def test_one_step_is_a_conditional_variational_autoencoder(x64):
    """Linear networks, a standard normal prior: the VRNN of one step has the KL of the VAE, and its
    mean log-likelihood.
    """
    d, e, n = 3, 2, 20_000
    model, params, state = random(
        DataSpec((1, d), "binary", step="frame", n_classes=e), latent_dim=2, d_hidden=4, hidden=()
    )
    other = vae(DataSpec((d,), "binary", n_classes=e), latent_dim=2, hidden=())
    p = params["vrnn"]
    p["prior"] = jax.tree.map(jnp.zeros_like, p["prior"])
    p["prior"]["layers"][0]["bias"] = jnp.asarray([0, 0, *[state_space.raw(1.0)] * 2])

    def wide(layer):
        return layer["kernel"], layer.get("bias", 0.0)

    (embed, b_embed), condition = wide(p["embed"]["dense"]), p["embed"]["condition"]["kernel"]

    def first_h(label):
        (w, b), u = wide(p["layer"]["inputs"]), p["layer"]
        a = (p["embed"]["start"] + condition[label]) @ w + b
        gates = jnp.split(a, 3)
        r, z = jax.nn.sigmoid(gates[0]), jax.nn.sigmoid(gates[1])
        return (1 - z) * jnp.tanh(gates[2] + r * u["bias"])

    h = jnp.stack([first_h(label) for label in range(e)])
    (w_x, b_x), (w_h, _) = wide(p["encoder"]["first"]), wide(p["encoder"]["second"])
    (f_z, g_z), (v_z, b_z), (v_h, _) = (
        wide(p["z_features"]["layers"][0]),
        wide(p["decoder"]["first"]),
        wide(p["decoder"]["second"]),
    )
    encoder = {
        "kernel": jnp.concatenate([embed @ w_x, condition @ w_x + h @ w_h]),
        "bias": b_embed @ w_x + b_x,
    }
    decoder = {"kernel": jnp.concatenate([f_z @ v_z, h @ v_h]), "bias": g_z @ v_z + b_z}
    vae_params = {
        "vae": {
            "encoder": {"layers": {0: encoder}},
            "decoder": {"layers": {0: decoder}},
            "prior": {},
        }
    }
    x, cond = jnp.asarray([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), jnp.asarray([0, 1])
    mean, raw = other.latent.encode(vae_params, {"vae": {}}, x, cond)
    got = model.latent.encode(params, state, x[:, None], cond)
    np.testing.assert_allclose(got[0][:, 0], mean, rtol=1e-10)
    np.testing.assert_allclose(got[1][:, 0], np.log(np.log1p(np.exp(raw)) + MIN_SCALE), rtol=1e-10)
    # The VAE's scale is the exponential of the same output: move its bias so that they agree for
    # the first x.
    many = Batch(jnp.tile(x[:1], (n, 1)), jnp.zeros(n, jnp.int32))
    vae_params["vae"]["encoder"]["layers"][0]["bias"] += jnp.concatenate(
        [jnp.zeros(2), got[1][0, 0] - raw[0]]
    )
    terms = quick(other.losses["vae"])(vae_params, {"vae": {}}, many, KEY, 0)[1].metrics
    mine = quick(model.losses["vrnn"])(
        params, state, many._replace(x=many.x[:, None]), jax.random.key(8), 0
    )[1].metrics
    np.testing.assert_allclose(mine["kl"], terms["kl"], rtol=1e-9)
    difference = mine["log_likelihood"].mean() - terms["log_likelihood"].mean()
    error = math.hypot(*(standard_error(np.asarray(t["log_likelihood"])) for t in (mine, terms)))
    assert abs(difference) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("how", ["iwae", "fivo"])
def test_estimates_of_the_probabilities_of_all_sequences_sum_to_one(how):
    spec = DataSpec((3,), "tokens", levels=3, step="character", end=2)
    model, params, state = random(spec, bound_estimator=how, n_bound_samples=8)
    # A posterior near the prior, so that the weights, about p(x|z), have a variance to estimate an
    # error from.
    encoder, prior = params["vrnn"]["encoder"], params["vrnn"]["prior"]["layers"]
    encoder["first"] = {"kernel": 0.1 * encoder["first"]["kernel"], "bias": prior[0]["bias"]}
    encoder["second"]["kernel"], encoder["rest"]["layers"][0] = prior[0]["kernel"], prior[1]
    x = np.asarray(list(itertools.product(range(3), repeat=3)), np.int32)
    x = np.unique([np.where(np.cumsum([0, *(row[:-1] == 2)]) > 0, 2, row) for row in x], axis=0)
    batch = Batch(jnp.asarray(x))
    run = jax.jit(jax.vmap(lambda key: jnp.exp(model.bound(params, state, batch, key))))
    p = np.asarray(run(jax.random.split(KEY, 2000)))
    total = p.sum(1)
    assert abs(total.mean() - 1) < 3 * standard_error(total)
    assert standard_error(total) < 0.01
    # and they are the frequencies of what is sampled
    n, code = 20_000, lambda x: np.asarray(x) @ np.asarray([9, 3, 1])
    drawn = code(quick(model.sample, static_argnums=3)(params, state, KEY, n))
    frequency = (drawn[None] == code(x)[:, None]).mean(1)
    assert np.isclose(frequency.sum(), 1)
    mean = p.mean(0)
    error = np.sqrt(mean * (1 - mean) / n + (p.std(0) / math.sqrt(len(p))) ** 2)
    assert (np.abs(frequency - mean) < 4.5 * error).all()


@pytest.mark.slow
def test_identical_noise_gives_identical_bounds():
    model, params, state = random(ROLLS)
    batch = example_batch(ROLLS, KEY, 3)
    bound = quick(model.bound)
    assert_same(bound(params, state, batch, KEY), bound(params, state, batch, KEY))
    assert (
        bound(params, state, batch, KEY) != bound(params, state, batch, jax.random.key(6))
    ).all()
    assert_close(
        model.extras.step_bound(params, state, batch, KEY).sum(1),
        bound(params, state, batch, KEY),
        rtol=1e-5,
    )
