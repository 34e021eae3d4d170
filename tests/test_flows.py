"""Coupling, autoregressive and spline flows as models: densities that integrate to one, the bound
of whole numbers, and what they do with a first batch.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flow_checks import events, moved, normal_loss
from gates import assert_same, optimised, quick
from statistics_checks import RARE
from vae_oracles import assert_mean, f64, jit, over_keys

from genjax import cnf, maf, nsf, realnvp, training
from genjax.data import Source, Splits, cast, example_batch
from genjax.errors import ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.labels import labels_of
from genjax.learning.loop import device_feed, fit
from genjax.parts.bijections import Bijection, unmoved
from genjax.parts.dequantization import Dequantization
from genjax.parts.flow_density import flow_model, flow_of
from genjax.protocol import Batch, DataSpec
from genjax.runs.train import about_tails

analytic_loss = normal_loss

PLANE = DataSpec((2,), "continuous", name="plane")
SPACE = DataSpec((3,), "continuous", name="space")
STANDARD = dataclasses.replace(PLANE, shift=(3.0, -1.0), scale=(0.5, 4.0))
SMALL = {"n_layers": 2, "hidden": (6,)}
FLOWS = {
    "realnvp": functools.partial(realnvp, **SMALL),
    "nice": functools.partial(realnvp, transform="additive", mix="random", **SMALL),
    "maf": functools.partial(maf, **SMALL),
    "iaf": functools.partial(maf, inverse=True, mix="linear", **SMALL),
    "nsf": functools.partial(nsf, bins=4, tail_bound=2.0, **SMALL),
    "nsf-ar": functools.partial(nsf, bins=4, tail_bound=2.0, structure="autoregressive", **SMALL),
    "cnf": functools.partial(cnf, hidden=(6,), n_steps=8, n_probes=0),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def grown(model, size=0.2):
    params, state = model.init(jax.random.key(0))
    return moved(params, size), state


def square(spec, half=9.0, side=400):
    """Points of a grid over [-half, half]² on the normalised scale, in the units of the data, and
    the area that each stands for.
    """
    line = np.linspace(-half, half, side)
    y = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    scale = np.prod(spec.scale or (1.0, 1.0))
    return spec.denormalize(jnp.asarray(y)), (line[1] - line[0]) ** 2 * scale


# --- densities ------------------------------------------------------------------------------------


@pytest.mark.slow
@every_flow
def test_the_density_integrates_to_one(x64, name):
    for spec in (PLANE, STANDARD):
        model = FLOWS[name](spec)
        params, state = grown(model)
        x, area = square(spec)
        nats = jit(model.log_prob)(params, state, Batch(x), jax.random.key(1))
        assert np.exp(nats).sum() * area == pytest.approx(1, abs=1e-3)
        assert np.std(nats) > 1


@pytest.mark.slow
@pytest.mark.parametrize("spec", [DataSpec((2,), "continuous", n_classes=3, name="classes")])
@pytest.mark.parametrize("name", ["realnvp", "nsf-ar"])
def test_so_does_that_of_every_class(x64, name, spec):
    model = FLOWS[name](spec)
    params, state = grown(model, 0.4)
    # Splines are sharper than those above, and take a finer grid: a part of it at a time.
    x, area = square(spec, half=10.0, side=1500)
    log_prob = optimised(model.log_prob)  # of 75 parts

    def density(part, label):
        cond = jnp.full(len(part), label, jnp.int32)
        return np.exp(log_prob(params, state, Batch(part, cond), jax.random.key(1)))

    densities = []
    for label in range(3):
        parts = [density(part, label) for part in jnp.split(x, 25)]
        densities.append(np.concatenate(parts))
        assert densities[-1].sum() * area == pytest.approx(1, abs=1e-3)
    apart = np.abs(densities[0] - densities[1]).sum() * area
    assert apart > 0.05


@pytest.mark.slow
@every_flow
def test_the_map_and_the_density_are_one_and_samples_are_of_it(x64, name):
    # So many steps that an ODE is solved back to where it began.
    model = FLOWS[name](STANDARD, **({"n_steps": 32} if name == "cnf" else {}))
    params, state = grown(model)
    x = STANDARD.denormalize(events((2,)))
    z, log_det = jit(model.extras.forward)(params, state, x)
    nats = scipy.stats.norm.logpdf(z).sum(1) + np.asarray(log_det)
    got = jit(model.log_prob)(params, state, Batch(x), jax.random.key(1))
    np.testing.assert_allclose(got, nats, atol=1e-10)
    back, log_det_back = jit(model.extras.inverse)(params, state, z)
    solved = {"rtol": 0, "atol": 1e-4 if name == "cnf" else 1e-8}
    np.testing.assert_allclose(back, x, **solved)
    np.testing.assert_allclose(log_det_back, -np.asarray(log_det), **solved)
    # What N(0, I) becomes by the inverse is what samples are.
    key = jax.random.key(3)
    noise = jax.random.normal(key, (5, 2))
    wanted, _ = model.extras.inverse(params, state, noise)
    drawn = jit(model.sample, static_argnums=3)(params, state, key, 5)
    np.testing.assert_allclose(drawn, wanted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["realnvp", "nsf"])
def test_samples_have_the_mean_that_the_density_has(x64, name):
    model = FLOWS[name](PLANE)
    params, state = grown(model, 0.5)
    x, area = square(PLANE, half=14.0)
    density = np.exp(jit(model.log_prob)(params, state, Batch(x), jax.random.key(1))) * area
    drawn = jit(model.sample, static_argnums=3)(params, state, jax.random.key(2), 4000)
    for figure in (lambda x: x, np.abs, np.cos):
        assert_mean(figure(np.asarray(drawn)), density @ figure(np.asarray(x)), slack=1e-3)


# --- fitting --------------------------------------------------------------------------------------

MEAN = np.asarray([1.0, -2.0, 0.5])
ROOT = np.asarray([[0.5, 0, 0], [0.8, 1.5, 0], [-0.3, 0.4, 0.2]])


def exact_sample(n=256):
    """Points whose mean and covariance are MEAN and ROOT ROOT' to the last bit but few."""
    x = np.random.default_rng(0).normal(size=(n, 3))
    x = x - x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / n)).T
    return jnp.asarray(MEAN + x @ ROOT.T, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("n_layers", [1, 2])
def test_an_affine_flow_of_normal_data_reaches_their_entropy(n_layers):
    """With shifts that are linear and constant scales a flow is a Gaussian, of which none has a
    better mean log-density than that with the points' own moments: -½ ln det(2πe Σ).
    """
    model = realnvp(SPACE, n_layers=n_layers, hidden=(), transform="additive", mix="linear")
    batch = Batch(exact_sample())
    t = training(model, optax.adam(optax.cosine_decay_schedule(0.05, 600)))

    @jit
    def trained(ts):
        return jax.lax.scan(lambda ts, _: t.step(ts, batch), ts, None, length=600)[0]

    ts = trained(quick(t.prepare)(quick(t.init)(jax.random.key(0)), batch))
    nats = quick(model.log_prob)(ts.params, ts.state, batch, jax.random.key(1)).mean()
    entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * ROOT @ ROOT.T)[1]
    assert -float(nats) == pytest.approx(entropy, abs=2e-4)


# --- the first batch ------------------------------------------------------------------------------

DIGITS = DataSpec((2, 2, 1), "discrete", levels=5, name="small digits")


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SPACE, DIGITS])
def test_the_first_batch_is_standardised_but_for_what_has_no_weight(spec):
    model = nsf(spec, n_layers=1, hidden=(4,))
    t = training(model, optax.sgd(0.1))
    batch = example_batch(spec, jax.random.key(1), 8)
    weight = jnp.asarray([1.0, 0, 2, 1, 0.5, 1, 0, 3])
    spoiled = batch._replace(x=batch.x.at[1].set(jnp.nan).at[6].set(jnp.inf), weight=weight)
    first, prepare = quick(t.init)(jax.random.key(0)), quick(t.prepare)
    ts = prepare(first, spoiled)
    assert_same(ts.params, prepare(first, batch._replace(weight=weight)).params)
    # One layer of splines that are the identity: what comes out is what actnorm made, but for the
    # noise, which another key draws.
    x = batch.x
    if spec.kind == "continuous":
        z, _ = model.extras.forward(ts.params, ts.state, x)
        np.testing.assert_allclose(np.average(z, axis=0, weights=weight), 0, atol=1e-5)
        np.testing.assert_allclose(np.average(z**2, axis=0, weights=weight), 1, rtol=1e-4)
    norm = ts.params["flow"]["map"]["layers"]["norm"]
    assert np.asarray(norm["log_scale"]).all()


@pytest.mark.slow
def test_it_is_in_the_checkpoint_and_never_made_again(tmp_path):
    arrays = Batch(np.asarray(7 + 3 * exact_sample(64)))
    source = Source(SPACE, lambda: Splits(arrays, arrays, arrays), cast(SPACE))
    model = realnvp(SPACE, n_layers=2, hidden=(4,))
    feed = device_feed(training(model, optax.adam(0.01)), source, arrays, 8, 0)
    settings = {"key": jax.random.key(0), "steps": 4, "steps_per_call": 2}
    wanted = fit(feed, **settings, checkpoints=Checkpoints(tmp_path, keep=9), checkpoint_every=2)
    last = max(Checkpoints(tmp_path).steps())
    assert last == 4
    assert_same(fit(feed, **settings, checkpoints=Checkpoints(tmp_path)), wanted)
    batch, key = Batch(arrays.x[:8]), jax.random.key(5)
    restored = Checkpoints(tmp_path).restore(jax.eval_shape(feed.training(1).init, key)).state
    loss = jit(model.losses["flow"])
    assert_same(
        loss(restored.params, restored.state, batch, key, 4)[0],
        loss(wanted.params, wanted.state, batch, key, 4)[0],
    )


# --- whole numbers --------------------------------------------------------------------------------

BYTES = DataSpec((3, 2, 1), "discrete", levels=256, name="bytes")


def uniform_over(spec):
    """A map under which dequantised values are uniform: z = Φ⁻¹(share of the way from the lowest
    to the highest).
    """
    low, width = -1 - 1 / spec.top, 2 + 2 / spec.top

    def forward(params, y, c):
        share = (y.reshape(y.shape[0], -1) - low) / width
        z = jax.scipy.stats.norm.ppf(share)
        log_slope = -math.log(width) - jax.scipy.stats.norm.logpdf(z)
        return z, log_slope.sum(1)

    def inverse(params, z, c):
        share = jax.scipy.stats.norm.cdf(z)
        return (low + width * share).reshape(-1, *spec.shape), unmoved(z)

    return flow_of(Bijection(lambda key: {}, forward, inverse))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("how", ["uniform", "variational"])
def test_a_uniform_model_of_bytes_takes_8_bits_a_value(x64, how, k):
    settings = Dequantization(how, n_bound_samples=k, dequantizer_layers=2)
    model = flow_model(BYTES, uniform_over(BYTES), settings)
    params, state = model.init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, *BYTES.shape)), jnp.float64)
    nats = jit(model.bound)(f64(params), state, Batch(x), jax.random.key(1))
    np.testing.assert_allclose(-nats / BYTES.size / math.log(2), 8.0, rtol=0, atol=1e-10)


PAIR = DataSpec((2,), "discrete", levels=3, name="pair")


@functools.cache
def of_pairs(how, k=1):
    return maf(PAIR, **SMALL, dequantization=how, dequantizer_hidden=(4,), n_bound_samples=k)


def chances():
    """P(x) = ∫ p(x + u) du of all nine pairs, by quadrature, and the parameters."""
    params, state = grown(of_pairs("variational"), 0.4)
    # Little, or so few draws fall where the noise is rare that their weights say nothing.
    noise = moved(of_pairs("variational").init(jax.random.key(0))[0]["flow"]["dequantizer"], 0.1)
    params = {"flow": {**params["flow"], "dequantizer": noise}}
    nodes, weights = np.polynomial.legendre.leggauss(24)
    u = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2) / 2
    area = np.outer(weights, weights).reshape(-1) / 4
    pairs = np.stack(np.meshgrid(range(3), range(3)), axis=-1).reshape(-1, 2)
    forward = jit(of_pairs("uniform").extras.forward)
    p = []
    for pair in pairs:
        z, log_det = forward(params, state, jnp.asarray(pair + u))
        p.append(area @ np.exp(scipy.stats.norm.logpdf(z).sum(1) + np.asarray(log_det)))
    return jnp.asarray(pairs, jnp.float64), np.asarray(p), params, state


@pytest.mark.slow
@pytest.mark.parametrize("how", ["uniform", "variational"])
def test_the_bound_is_below_the_probability_and_its_weights_are_it_in_expectation(x64, how):
    x, p, params, state = chances()
    if how == "uniform":
        params = {"flow": {**params["flow"], "dequantizer": {}}}

    def bounds(k, n=2000):
        model = of_pairs(how, k)
        return over_keys(lambda key: model.bound(params, state, Batch(x), key), 1, n)

    one, many = bounds(1), bounds(1600, 400)
    assert_mean(np.exp(one), p)
    error = one.std(0) / math.sqrt(len(one))
    assert (one.mean(0) < np.log(p) + 4 * error).all()
    assert (one.mean(0) < np.log(p) - 4 * error).any()
    assert (many.mean(0) > one.mean(0) + 1e-4).any()
    np.testing.assert_allclose(many.mean(0), np.log(p), atol=0.05)


@pytest.mark.slow
def test_rounded_samples_have_these_probabilities(x64):
    x, p, params, state = chances()
    drawn = jit(of_pairs("variational").sample, static_argnums=3)(
        params, state, jax.random.key(4), 20_000
    )
    inside = np.asarray(drawn)
    # The outermost values hold what is beyond them, too: only the one in the middle is compared.
    share = np.mean((inside == 1).all(1))
    middle = p[np.flatnonzero((np.asarray(x) == 1).all(1))[0]]
    assert scipy.stats.binomtest(round(share * 20_000), 20_000, middle).pvalue > RARE


@pytest.mark.slow
def test_what_is_added_may_be_learned():
    """Noise that suits the density: the variational bound of one draw comes closer than the uniform
    one, on data of one value, which a Gaussian can only cover as a box.
    """
    ones = Batch(jnp.ones((64, 2)))

    def reached(how):
        model = realnvp(PAIR, n_layers=2, hidden=(8,), dequantization=how)
        t = training(model, optax.adam(optax.cosine_decay_schedule(0.01, 1000)))

        @jit
        def trained(ts):
            return jax.lax.scan(lambda ts, _: t.step(ts, ones), ts, None, length=1000)[0]

        ts = trained(quick(t.prepare)(quick(t.init)(jax.random.key(0)), ones))
        return over_keys(lambda key: model.bound(ts.params, ts.state, ones, key), 1, 50).mean()

    uniform, learned = float(reached("uniform")), float(reached("variational"))
    assert uniform < 0
    assert learned < 1e-3
    assert learned > 0.5 * uniform


# --- what is asked of a builder -------------------------------------------------------------------

LINE = DataSpec((1,), "continuous", name="line")


@pytest.mark.slow
def test_one_number_is_a_flow_where_nothing_must_be_kept(x64):
    for model in (maf(LINE, **SMALL), nsf(LINE, structure="autoregressive", **SMALL)):
        params, state = grown(model, 0.5)
        x = jnp.linspace(-12, 12, 4001)
        nats = jit(model.log_prob)(params, state, Batch(x[:, None]), jax.random.key(0))
        assert np.exp(nats).sum() * float(x[1] - x[0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("make", [realnvp, nsf])
def test_one_number_is_too_few_for_coupling(make):
    with pytest.raises(ConfigError, match=r"two numbers or more; line has 1\. Use maf, or nsf"):
        make(LINE)


@pytest.mark.parametrize("make", [realnvp, maf, nsf, cnf])
@pytest.mark.parametrize(
    "spec",
    [
        DataSpec((5,), "tokens", levels=4, name="letters"),
        DataSpec((5, 2), "continuous", step="frame", name="frames"),
    ],
)
def test_sequences_are_for_other_families(make, spec):
    with pytest.raises(ConfigError, match=r"models vectors and images; .* Use a sequence family"):
        make(spec)


def test_settings_are_held_to_what_they_can_be():
    with pytest.raises(ConfigError, match=r"bins must be at least 2; got 1"):
        nsf(PLANE, bins=1)
    with pytest.raises(ConfigError, match=r"tail_bound must be in \[0.001, 1000\]"):
        nsf(PLANE, tail_bound=0.0)
    with pytest.raises(ConfigError, match=r"There is no mix called 'lineal'\. Did you mean linear"):
        realnvp(PLANE, mix="lineal")
    with pytest.raises(ConfigError, match="plane is continuous, and needs no noise: leave out"):
        realnvp(PLANE, dequantization="variational")
    one = DataSpec((1,), "discrete", levels=3, name="one")
    with pytest.raises(ConfigError, match=r"two numbers or more; one has 1\. Use 'uniform'"):
        maf(one, dequantization="variational")


def test_reports_say_what_a_figure_is():
    assert realnvp(PLANE).estimator == "exact"
    assert realnvp(PLANE).bound is None
    model = nsf(PAIR, n_bound_samples=16)
    assert model.log_prob is None
    assert model.estimator == "uniform dequantisation, K=16"
    said = cnf(PAIR, n_steps=8, dequantization="variational").estimator
    assert said == "variational dequantisation, K=1, ODE, rk4 in 8 steps, " + (
        "divergence by 1 random probe"
    )


def test_vectors_that_are_stacked_are_vectors_to_an_optimiser():
    model = nsf(PAIR, dequantization="variational")
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    labels = labels_of(params, model.labels)
    by_path = jax.tree_util.tree_leaves_with_path(labels)
    for path, label in by_path:
        name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        matrices = ("kernel", "lower", "upper")
        assert label == ("matrix" if name in matrices else "vector"), name
    assert len(by_path) > 10


def test_numbers_where_the_splines_have_ended_are_said_and_have_a_density():
    x = np.random.default_rng(0).normal(size=(300, 2)).clip(-3, 3)
    model = nsf(PLANE, tail_bound=4.0, **SMALL)
    assert about_tails(model, Batch(x)) == []
    x[0] = 1e3
    (line,) = about_tails(model, Batch(x))
    assert line.startswith("2 of 600 numbers lie more than 4 standard deviations from their mean")
    assert about_tails(realnvp(PLANE, **SMALL), Batch(x)) == []
    params, state = model.init(jax.random.key(0))
    nats = model.log_prob(params, state, Batch(jnp.asarray(x[:4], jnp.float32)), jax.random.key(1))
    assert bool(jnp.isfinite(nats).all())
