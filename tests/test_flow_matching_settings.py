"""Which settings of flow matching are refused."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flow_oracles import CLASSES, POINTS, conditional

from genjax.errors import ConfigError
from genjax.families.flow_matching import flow_matching
from genjax.protocol import DataSpec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"probability_path": "straight"},
            r"no probability path called 'straight'.*There are: conditional_ot",
        ),
        ({"coupling": "optima"}, r"no coupling called 'optima'\. Did you mean optimal\?"),
        (
            {"times": "logit-normal"},
            r"no times called .* Did you mean logit_normal\?",
        ),
        ({"loss": "epsilon"}, "no loss called 'epsilon'"),
        ({"net": "cnn"}, "no net called 'cnn'"),
        ({"solver": "huen"}, r"no solver called 'huen'\. Did you mean heun\?"),
        ({"grid": "linear"}, "no grid called 'linear'"),
        ({"dtype": "float16"}, "no dtype called 'float16'"),
        (
            {"likelihood_solver": "ancestral"},
            "no likelihood solver called 'ancestral'. There are: euler, midpoint, heun, rk4, "
            "adaptive",
        ),
        ({"likelihood_solver": "rk5"}, r"no likelihood solver called 'rk5'"),
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"n_likelihood_steps": -2}, "n_likelihood_steps must be at least 1; got -2"),
        ({"n_probes": -1}, "n_probes must be at least 0; got -1"),
        ({"cond_dropout": 1.0}, r"cond_dropout must be in \[0, 1\); got 1.0"),
        ({"guidance": 2.0}, r"never trained without its condition: build it with cond_dropout"),
        ({"hidden": ()}, "at least one hidden layer"),
        ({"net": "unet"}, r"\(height, width, channels\)"),
        ({"net": "dit"}, r"\(height, width, channels\)"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        flow_matching(CLASSES, **settings)


@pytest.mark.slow
def test_data_and_requests_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"letters are tokens"):
        flow_matching(DataSpec((4,), "tokens", levels=3, name="letters"))
    with pytest.raises(ConfigError, match=r"rows are sequences"):
        flow_matching(DataSpec((4, 2), "continuous", step="row", name="rows"))
    with pytest.raises(ConfigError, match=r"would let noise tell of the condition"):
        flow_matching(DataSpec((2,), "continuous", cond_dim=1), coupling="optimal")
    model, params, state = conditional(0.0)
    generate = functools.partial(
        model.denoiser.generate, params, state, jax.random.key(0), 3, jnp.arange(3)
    )
    with pytest.raises(ConfigError, match="never trained without its condition"):
        generate(guidance=2.0)
    with pytest.raises(ConfigError, match="no solver called 'huen'"):
        generate(solver="huen")
    with pytest.raises(ConfigError, match="no grid called 'log'"):
        generate(grid="log")
    with pytest.raises(ConfigError, match="n_steps must be at least 1; got 0"):
        generate(n_steps=0)
    with pytest.raises(ConfigError, match="this model of points has none"):
        flow_matching(POINTS, guidance=1.5)
