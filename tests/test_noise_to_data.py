"""What diffusion and flow matching share: groups of settings, the record of a denoiser, samples."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoising_oracles import LABELLED, PLANE, jit

from genjax.errors import ConfigError
from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.nets.denoiser import DenoiserNet, denoiser
from genjax.nets.functional import Net
from genjax.parts.noise_to_data import OdeLikelihood, Sampling, chosen
from genjax.parts.ode_likelihood import ode_log_prob
from genjax.parts.paths import Path, log_snr
from genjax.parts.solvers import GRIDS
from genjax.protocol import Batch, DataSpec

both = pytest.mark.parametrize("build", [diffusion, flow_matching])


# --- settings -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "huen"}, r"no solver called 'huen'\. Did you mean heun\?"),
        ({"solver": 2}, "solver must be a text; got 2"),
        ({"grid": "karas"}, r"no grid called 'karas'\. Did you mean karras\?"),
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"n_steps": 2.5}, "n_steps must be a whole number; got 2.5"),
        ({"guidance": float("inf")}, "guidance must be finite; got inf"),
        ({"guidance": "much"}, "guidance must be a number; got 'much'"),
        ({"likelihood_solver": "ddim"}, "no likelihood solver called 'ddim'"),
        ({"n_likelihood_steps": 0}, "n_likelihood_steps must be at least 1; got 0"),
        ({"n_probes": -1}, "n_probes must be at least 0; got -1"),
        ({"net": "cnn"}, "no net called 'cnn'"),
        ({"hidden": 64}, "hidden must be a sequence; got 64"),
        ({"hidden": (8, 0)}, r"hidden\[1\] must be at least 1; got 0"),
        ({"channels": (4, -1)}, r"channels\[1\] must be at least 1; got -1"),
        ({"n_blocks": 0}, "n_blocks must be at least 1; got 0"),
        ({"patch": 0}, "patch must be at least 1; got 0"),
        ({"d_model": 0}, "d_model must be at least 1; got 0"),
        ({"n_layers": 0}, "n_layers must be at least 1; got 0"),
        ({"n_heads": -1}, "n_heads must be at least 0; got -1"),
        ({"network": DenoiserNet()}, "no setting of .* called 'network'"),
        ({"n_step": 3}, r"no setting of .* called 'n_step'\. Did you mean n_steps"),
    ],
)
def test_groups_refuse_what_their_annotations_do_not_allow(build, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(PLANE, **settings)


@both
def test_groups_are_settings_of_the_builder_with_their_help(build):
    parameters = inspect.signature(build).parameters
    fields = [
        *DenoiserNet.__annotations__,
        *Sampling.__annotations__,
        *OdeLikelihood.__annotations__,
    ]
    assert set(fields) <= set(parameters)
    assert {"network", "sampling", "likelihood"}.isdisjoint(parameters)
    for name in fields:
        assert f"    {name}: " in build.__doc__, name
    defaults = {diffusion: ("karras", 100), flow_matching: ("uniform", 50)}[build]
    assert (parameters["grid"].default, parameters["n_likelihood_steps"].default) == defaults


def test_what_is_chosen_for_samples_is_held_to_the_same_rules():
    how = chosen(Sampling(n_steps=7), solver="ddim", grid=None)
    assert how == Sampling(solver="ddim", n_steps=7)
    with pytest.raises(ConfigError, match="no grid called 'fine'"):
        chosen(how, grid="fine")


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "unet", "dit"])
def test_settings_become_a_net_of_the_event(net):
    spec = DataSpec((4, 4, 1), "continuous", n_classes=2)
    network = DenoiserNet(net, hidden=(4,), channels=(4,), d_model=4, n_layers=1, n_heads=1)
    made = denoiser(spec, network, guided=True, dtype="float32")
    shapes = jax.eval_shape(made.init, jax.random.key(0))[0]
    assert shapes["embed"]["dropped"].ndim == 1
    x, level, cond = jnp.ones((3, 4, 4, 1)), jnp.ones(3), jnp.ones((3, 2))
    y = jax.eval_shape(lambda p: made.apply(p, {}, x, level, cond, None)[0], shapes)
    assert y.shape == (3, 4, 4, 1)
    own = Net(lambda key: ({}, {}), lambda p, s, x, level, cond, dropped: (x, s))
    assert denoiser(spec, DenoiserNet(own), guided=True, dtype="float32") is own


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.slow
@both
def test_the_record_says_what_a_model_can_do(build):
    """A path of params, an estimate for one time or for one of each example, guidance or none."""
    model = build(LABELLED, hidden=(4,), cond_dropout=0.1, n_steps=2)
    record = model.denoiser
    assert record.guided
    assert not build(LABELLED, hidden=(4,)).denoiser.guided
    assert not build(PLANE, hidden=(4,), cond_dropout=0.1).denoiser.guided
    params, state = model.init(jax.random.key(0))
    path = record.path(params)
    assert isinstance(path, Path)
    x_t, cond = jnp.ones((3, 2)), jnp.arange(3)
    one = record.denoise(params, state, x_t, jnp.asarray(0.3), cond)
    each = record.denoise(params, state, x_t, jnp.full(3, 0.3), cond)
    np.testing.assert_array_equal(one, each)
    with pytest.raises(ValueError, match="is conditional: give `cond`"):
        record.denoise(params, state, x_t, jnp.asarray(0.3))
    draw = jit(lambda f, key: f(params, state, key, 3, cond), static_argnums=0)
    key = jax.random.key(1)
    np.testing.assert_array_equal(draw(model.sample, key), draw(record.generate, key))


def test_a_learned_path_is_a_function_of_the_parameters():
    model = diffusion(PLANE, hidden=(4,), noise_schedule="learned", weighting="elbo")
    params, _ = model.init(jax.random.key(0))

    def end(p):
        return float(log_snr(model.denoiser.path(p), 0.0))

    assert end(params) == pytest.approx(13.3, rel=1e-5)
    params["diffusion"]["schedule"]["ends"] = jnp.asarray([-9.0, 2.0])
    assert end(params) == pytest.approx(9.0, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "settings", "grid"),
    [(flow_matching, {"grid": "karras"}, "karras"), (diffusion, {"grid": "karras"}, "log_snr")],
)
def test_the_steps_of_a_likelihood_are_where_the_builder_says(build, settings, grid):
    model = build(PLANE, hidden=(4,), n_likelihood_steps=3, **settings)
    params, state = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), params)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    x, path = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), model.denoiser.path(params)
    denoise = functools.partial(model.denoiser.denoise, params, state)

    def nats(grid):
        times = GRIDS[grid](path, 3)
        alpha = path.alpha(times[-1])
        return ode_log_prob(denoise, path, alpha * x, times) + 2 * jnp.log(alpha)

    found, wanted, other = jit(
        lambda: (
            model.log_prob(params, state, Batch(x), jax.random.key(0)),
            nats(grid),
            nats("uniform"),
        )
    )()
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert np.abs(found - other).max() > 1e-2
