"""Continuous flows in float64: linear fields, whose flow is a matrix exponential, and probes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from flow_checks import events, log_det_of, moved, normal_loss
from vae_oracles import assert_mean, jit, over_keys

from genjax import cnf
from genjax.errors import ConfigError
from genjax.families.cnf import flow_along, with_log_det
from genjax.nets.functional import Net
from genjax.parts.dequantization import Dequantization
from genjax.parts.flow_density import flow_model
from genjax.protocol import Batch, DataSpec
from genjax.runs.evaluate import evaluate
from genjax.runs.load import load
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

analytic_loss = normal_loss
pytestmark = pytest.mark.usefixtures("x64")

SPACE = DataSpec((3,), "continuous", name="space")
A = np.asarray([[0.3, -0.8, 0.1], [0.5, -0.4, 0.7], [0.2, 0.6, -0.9]])
LINEAR = Net(lambda key: ({}, {}), lambda params, state, x, t, c: (x @ jnp.asarray(A).T, state))


def linear_flow(n_steps=40, n_probes=0):
    return flow_along(SPACE, LINEAR, "rk4", n_steps, n_probes, remat="none")


def grown(size=0.3, **settings):
    model = cnf(SPACE, **{"hidden": (5, 5), "n_steps": 8, **settings})
    params, state = model.init(jax.random.key(0))
    return model, moved(params, size), state


# --- linear fields --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["rk4", "adaptive"])
def test_a_linear_field_is_a_matrix_exponential_and_its_log_det_the_trace(solver):
    x, time = events((3,)), 1.5
    times = jnp.linspace(0, time, 101)
    z, log_det = jit(lambda x: with_log_det(lambda x, t: x @ A.T, x, times, solver))(x)
    atol = 1e-8 if solver == "rk4" else 1e-4
    np.testing.assert_allclose(z, x @ scipy.linalg.expm(time * A).T, rtol=0, atol=atol)
    np.testing.assert_allclose(log_det, time * np.trace(A), rtol=0, atol=atol)


def test_the_density_of_a_gaussian_is_its_own():
    """z = e^A x of N(0, I) makes x of N(0, (e^-A)(e^-A)')."""
    model = flow_model(SPACE, linear_flow(), Dequantization())
    params, state = model.init(jax.random.key(0))
    x, root = events((3,)), scipy.linalg.expm(-A)
    nats = jit(model.log_prob)(params, state, Batch(x), jax.random.key(1))
    wanted = scipy.stats.multivariate_normal(np.zeros(3), root @ root.T).logpdf(x)
    np.testing.assert_allclose(nats, wanted, rtol=0, atol=1e-6)
    key = jax.random.key(2)
    drawn = jit(model.sample, static_argnums=3)(params, state, key, 6)
    noise = np.asarray(jax.random.normal(key, (6, 3)))
    np.testing.assert_allclose(drawn, noise @ root.T, rtol=0, atol=1e-6)


# --- probes ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n_probes", [1, 2])
def test_probes_are_drawn_once_a_solve(n_probes):
    """Of a constant Jacobian A a vector v that stays the same gives v'Av exactly, which has few
    values; vectors drawn anew at each stage would give an average of them.
    """
    x, key = events((3,)), jax.random.key(7)
    _, log_det = jit(linear_flow(5, n_probes).forward)({}, x, None, key)
    v = np.asarray(jax.random.rademacher(key, (n_probes, *x.shape), x.dtype))
    each = np.einsum("pni,ij,pnj->pn", v, A, v)
    np.testing.assert_allclose(log_det, each.mean(0), rtol=0, atol=1e-12)
    assert np.std(each) > 0


@pytest.mark.slow
def test_the_estimate_is_unbiased_and_the_value_does_not_depend_on_it():
    exact, params, state = grown(n_probes=0)
    estimated, *_ = grown(n_probes=1)
    batch = Batch(events((3,)))
    wanted = jit(exact.log_prob)(params, state, batch, jax.random.key(1))
    found = over_keys(lambda key: estimated.log_prob(params, state, batch, key), 3, 2000)
    assert_mean(found, wanted)
    # The extras are exact in both.
    one, other = (jit(m.extras.forward)(params, state, batch.x) for m in (exact, estimated))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


# --- the map --------------------------------------------------------------------------------------


def test_the_inverse_of_a_linear_field_undoes_the_map():
    flow, x = linear_flow(200), events((3,))
    z, log_det = jit(flow.forward)({}, x, None, None)
    back, log_det_back = jit(flow.inverse)({}, z, None)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-8)
    np.testing.assert_allclose(log_det_back, -log_det, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_of_a_network_too_the_closer_the_more_steps_there_are():
    """A solver is no exact inverse of itself, so there is an error, which steps make smaller."""
    errors = []
    for n_steps in (8, 64):
        model, params, state = grown(n_steps=n_steps, n_probes=0)
        x = events((3,))
        z, log_det = jit(model.extras.forward)(params, state, x)
        back, log_det_back = jit(model.extras.inverse)(params, state, z)
        errors.append(max(np.abs(back - x).max(), np.abs(log_det + log_det_back).max()))
    assert errors[0] > 10 * errors[1]
    assert errors[1] < 1e-3
    each = log_det_of(lambda x: model.extras.forward(params, state, x)[0], x)
    np.testing.assert_allclose(log_det, each, rtol=0, atol=1e-3)
    assert np.abs(z - x).max() > 0.1


@pytest.mark.slow
def test_computing_again_for_less_memory_changes_no_gradient():
    batch, key, step = Batch(events((3,))), jax.random.key(1), jnp.int32(0)

    def gradient(remat):
        model, params, state = grown(remat=remat)
        loss = model.losses["flow"]
        return jit(jax.grad(lambda p: loss(p, state, batch, key, step)[0].sum()))(params)

    one, other = (jax.tree.leaves(gradient(remat)) for remat in ("none", "full"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        assert np.asarray(a).any()


@pytest.mark.slow
@pytest.mark.parametrize("n_classes", [None, 3])
def test_samples_take_the_way_back_and_see_their_class(n_classes):
    spec = DataSpec((3,), "continuous", n_classes=n_classes, name="space")
    model = cnf(spec, hidden=(5,), n_steps=32)
    params, state = model.init(jax.random.key(0))
    params, key = moved(params, 0.3), jax.random.key(1)
    cond = None if n_classes is None else jnp.asarray([0, 1, 2, 2], jnp.int32)
    drawn = jit(model.sample, static_argnums=3)(params, state, key, 4, cond)
    z, _ = model.extras.forward(params, state, drawn, cond)
    np.testing.assert_allclose(z, jax.random.normal(key, (4, 3)), rtol=0, atol=1e-3)
    if cond is not None:
        other = model.sample(params, state, key, 4, (cond + 1) % 3)
        assert (np.abs(np.asarray(other - drawn)).max(1) > 1e-3).all()


def test_an_average_of_estimated_probabilities_is_no_bound():
    spec = DataSpec((2,), "discrete", levels=3)
    with pytest.raises(ConfigError, match=r"Take n_probes=0, .* or n_bound_samples=1"):
        cnf(spec, hidden=(4,), n_bound_samples=2)
    assert cnf(spec, hidden=(4,), n_bound_samples=2, n_probes=0).bound is not None
    assert cnf(spec, hidden=(4,), n_probes=1).bound is not None


# --- the solver's error ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("learning_rate", "said"), [(3e-2, True), (1e-5, False)])
def test_a_value_that_is_the_solvers_error_is_said(tmp_path, learning_rate, said):
    """Trained in one step for each solution, a field learns to be solved badly in its favour."""
    settings = {"hidden": (16,), "n_steps": 1, "n_train": 500, "steps": 100, "batch_size": 64}
    settings |= {"sample_every": 0, "evaluate_every": 0, "learning_rate": learning_rate}
    recipe = replace(ZOO["cnf-ring"], **settings)
    with jax.enable_x64(False):
        train(recipe, tmp_path / "run")
        lines = []
        report = evaluate(load(tmp_path / "run"), n=100, say=lines.append)
    assert report["solver"]["n"] == 100
    assert (abs(report["solver"]["difference"]) > 0.1) == said
    assert any("is the solver's error. Train with more --n-steps" in line for line in lines) == said
