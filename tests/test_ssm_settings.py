"""Settings of state space models: what is refused, what may be shared or swept."""

import jax
import jax.numpy as jnp
import pytest
from gates import assert_close, quick

from genjax.errors import ConfigError
from genjax.families.ssm import ssm
from genjax.protocol import DataSpec

KEY = jax.random.key(3)
WORDS = DataSpec((5,), "tokens", levels=3, step="symbol", name="words")
ROLLS = DataSpec((5, 3), "binary", step="frame", lengths=True, name="rolls")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"spec": DataSpec((4, 4, 1), "binary", name="digits")}, "A state space model models"),
        ({"spec": DataSpec((4,), "continuous", name="points")}, "points has no steps"),
        ({"cell": "mamba"}, "no cell called 'mamba'. Did you mean mamba2"),
        ({"cell": "mamba2", "d_inner": 10, "n_heads": 4}, "multiple of n_heads; got 10 and 4"),
        ({"cell": "deltanet", "d_model": 9}, "which is 9 unless given, .* got 9 and 4"),
        ({"cell": "s4d", "n_heads": 2}, "n_heads is for the cells mamba2, deltanet; the cell s4d"),
        ({"cell": "mingru", "d_state": 2}, "the cell mingru has none, got 2. Leave it out"),
        ({"cell": "lru", "conv": 4}, "conv is for the cells mingru, mamba2, deltanet"),
        ({"cell": "lru", "d_state": 5}, "d_state must be even; got 5"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min must be at most dt_max; got 0.2 and 0.1"),
        ({"dt_max": 1.0}, "dt_max must be in"),
        ({"chunk": 0}, "chunk must be at least 1; got 0"),
        ({"form": "parallel"}, "no form called 'parallel'"),
        ({"spec": ROLLS, "tie_weights": True}, "tie_weights is for sequences of tokens"),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(settings, match):
    with pytest.raises(ConfigError, match=match):
        ssm(**{"spec": WORDS, "d_model": 8, "n_layers": 1, **settings})


@pytest.mark.slow
def test_a_readout_may_be_the_table():
    model = ssm(WORDS, cell="mingru", d_model=8, n_layers=1, tie_weights=True)
    params, state = model.init(KEY)
    assert "dense" not in params["ssm"]["readout"]
    assert model.sample(params, state, KEY, 2).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["mingru", "mamba2"])
def test_the_range_of_the_first_timesteps_may_be_swept(cell):
    def first(dt):
        p = ssm(WORDS, cell=cell, d_model=4, n_layers=1, dt_max=dt).init(KEY)[0]["ssm"]
        return p["blocks"][0]["core"]["timestep"]

    found = quick(jax.vmap(first))(jnp.asarray([0.05, 0.9]))
    assert_close(found, jnp.stack([first(0.05), first(0.9)]), rtol=1e-5)
    assert (found[0] != found[1]).all()
