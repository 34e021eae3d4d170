"""Which settings of diffusion models are refused, and what `generate` refuses."""

import functools

import jax
import jax.numpy as jnp
import pytest
from denoising_oracles import LABELLED, PLANE, Normal, guided_model

from genjax.errors import ConfigError
from genjax.families.diffusion import diffusion
from genjax.parts import paths
from genjax.protocol import DataSpec


@pytest.mark.parametrize(
    ("spec", "settings", "match"),
    [
        (
            PLANE,
            {"noise_schedule": "cosin"},
            "no noise schedule called 'cosin'. Did you mean cosine",
        ),
        (PLANE, {"prediction": "eps"}, "no prediction called 'eps'"),
        (
            PLANE,
            {"precondition": "karras"},
            "no precondition called 'karras'. There are: none, edm",
        ),
        (PLANE, {"weighting": "min-snr"}, "no weighting called 'min-snr'. Did you mean min_snr"),
        (PLANE, {"times": "lognormal"}, "no times called 'lognormal'. Did you mean log_normal"),
        (PLANE, {"net": "u-net"}, "no net called 'u-net'. Did you mean unet"),
        (PLANE, {"solver": "huen"}, "no solver called 'huen'. Did you mean heun"),
        (PLANE, {"grid": "karas"}, "no grid called 'karas'. Did you mean karras"),
        (
            PLANE,
            {"likelihood_solver": "ancestral"},
            "no likelihood solver called 'ancestral'. There are: euler, midpoint, heun, rk4",
        ),
        (
            PLANE,
            {"likelihood_solver": "rk5"},
            "no likelihood solver called 'rk5'. Did you mean rk4",
        ),
        (PLANE, {"schedule_gradient": "none"}, "no schedule gradient called 'none'"),
        (PLANE, {"dtype": "float8"}, "no dtype called 'float8'"),
        (PLANE, {"n_steps": 0}, "n_steps must be at least 1; got 0"),
        (PLANE, {"n_steps": -5}, "n_steps must be at least 1; got -5"),
        (PLANE, {"n_times": 0}, "n_times must be at least 1; got 0"),
        (PLANE, {"n_bound_samples": 0}, "n_bound_samples must be at least 1; got 0"),
        (PLANE, {"n_likelihood_steps": 0}, "n_likelihood_steps must be at least 1; got 0"),
        (PLANE, {"n_probes": -1}, "n_probes must be at least 0; got -1"),
        (PLANE, {"sigma_data": 0.0}, "sigma_data must be positive; got 0.0"),
        (PLANE, {"p_std": -1.0}, "p_std must be positive; got -1.0"),
        (LABELLED, {"cond_dropout": 1.0}, r"cond_dropout must be in \[0, 1\); got 1.0"),
        (
            LABELLED,
            {"guidance": 2.0},
            "of clusters was never trained without its condition: build it with cond_dropout=0.1",
        ),
        (
            PLANE,
            {"guidance": 2.0, "cond_dropout": 0.1},
            "Guidance needs a condition and its absence; .* of normal points has none",
        ),
        (PLANE, {"precondition": "edm", "prediction": "v"}, "leave out prediction='v'"),
        (PLANE, {"noise_schedule": "learned"}, "needs weighting='elbo'; got 'unit'"),
        (PLANE, {"weighting": "elbo", "times": "log_normal"}, "go with times='uniform'"),
        (PLANE, {"n_times": 10, "times": "log_normal"}, "go with times='uniform'"),
        (
            PLANE,
            {"noise_schedule": "edm", "weighting": "elbo"},
            "go with times='uniform'; got times='log_normal'",
        ),
        (PLANE, {"net": "unet"}, r"U-Net needs events of shape \(height, width, channels\)"),
        (PLANE, {"net": "dit"}, r"DiT needs events of shape \(height, width, channels\)"),
        (PLANE, {"hidden": ()}, "at least one hidden layer"),
        (DataSpec((5,), "tokens", levels=9), {}, "are tokens. Use a sequence family"),
        (DataSpec((5, 2), "continuous", step="frame"), {}, "are sequences. Use a sequence family"),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(spec, settings, match):
    with pytest.raises(ConfigError, match=match):
        diffusion(spec, **settings)


@pytest.mark.slow
def test_what_generate_refuses():
    model, params, state = guided_model()
    make = functools.partial(model.denoiser.generate, params, state, jax.random.key(0), 2)
    cond = jnp.asarray([0, 1])
    for how, match in (
        ({"solver": "huen"}, "no solver called 'huen'"),
        ({"grid": "karas"}, "no grid called 'karas'"),
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"n_steps": -2}, "n_steps must be at least 1; got -2"),
    ):
        with pytest.raises(ConfigError, match=match):
            make(cond, **how)
    with pytest.raises(ValueError, match="is conditional: give `cond`"):
        make()
    with pytest.raises(ValueError, match="is conditional: give `cond`"):
        model.denoiser.denoise(params, state, jnp.ones((2, 2)), jnp.asarray(0.5))
    plain = diffusion(LABELLED, net=Normal(0.0, 0.5).net(n_classes=3, shift=2.0), prediction="x0")
    with pytest.raises(ConfigError, match="was never trained without its condition"):
        plain.denoiser.generate(
            {"diffusion": {"net": {}}}, {"diffusion": {}}, jax.random.key(0), 2, cond, guidance=2.0
        )
    with pytest.raises(TypeError, match="typed PRNG key"):
        model.denoiser.generate(params, state, 0, 2, cond)


BITS = DataSpec((2,), "binary")


@pytest.mark.parametrize(
    ("spec", "path", "more", "where"),
    [
        (PLANE, paths.conditional_ot(), {}, "start"),
        (PLANE, paths.edm(sigma_min=0.0), {"weighting": "elbo"}, "end"),
        (BITS, paths.edm(sigma_min=0.0), {}, "end"),
    ],
)
def test_the_network_never_sees_an_infinite_log_snr(spec, path, more, where):
    with pytest.raises(ConfigError, match=f"is infinite at its {where}, where the network"):
        diffusion(spec, hidden=(4,), noise_schedule=path, **more)
    ends = path._replace(start=0.999, end=0.001)
    model = diffusion(spec, hidden=(4,), n_steps=2, noise_schedule=ends, **more)
    x = model.sample(*model.init(jax.random.key(0)), jax.random.key(1), 3)
    assert bool(jnp.isfinite(x).all())


def test_a_path_that_ends_without_noise_has_samples_and_no_score():
    path = paths.edm(sigma_min=0.0)
    model = diffusion(PLANE, hidden=(4,), n_steps=2, noise_schedule=path, precondition="edm")
    assert model.score is None
    x = model.sample(*model.init(jax.random.key(0)), jax.random.key(1), 3)
    assert bool(jnp.isfinite(x).all())
