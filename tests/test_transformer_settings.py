"""The Transformer's settings: what reaches the layers, and what is refused."""

import functools

import jax
import numpy as np
import pytest
from gates import quick

from genjax import DataSpec, example_batch, transformer
from genjax.errors import ConfigError

TOKENS = DataSpec((6,), "tokens", levels=3, step="symbol")
TINY = {"d_model": 8, "n_layers": 2, "n_heads": 2}


@pytest.mark.slow
def test_numbers_of_the_layers_reach_them_and_may_be_traced():
    """A sweep traces what is a real number."""
    model = transformer(TOKENS, **TINY)
    params = jax.tree.map(lambda leaf: 20 * leaf, model.init(jax.random.key(0))[0])
    batch = example_batch(TOKENS, jax.random.key(1), 4)

    def nats(**options):
        score = transformer(TOKENS, **TINY, **options).log_prob
        return score(params, {}, batch, jax.random.key(0))

    for name, usual, other in (("norm_eps", 1e-5, 0.5), ("rope_base", 1e4, 10.0)):
        traced = quick(lambda value, name=name: nats(**{name: value}))
        np.testing.assert_allclose(traced(usual), quick(nats)(), rtol=1e-5)
        changed = quick(functools.partial(nats, **{name: other}))()
        np.testing.assert_allclose(traced(other), changed, rtol=1e-5)
        assert np.abs(changed - traced(usual)).min() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "absolute"}, "no position called 'absolute'"),
        ({"norm": "batch"}, "no norm called"),
        ({"activation": "geglu"}, "no activation called 'geglu'"),
        ({"dtype": "float16"}, "no dtype called"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
        ({"rope_base": 0.0}, "rope_base must be positive"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"n_heads": 3}, "multiple of n_heads"),
        ({"n_heads": 4, "n_kv_heads": 3}, "multiple of n_heads"),
        ({"d_model": 6, "n_heads": 2}, "must be even; got 3"),
        (
            {"spec": DataSpec((4, 2), "binary", step="frame"), "tie_weights": True},
            "tie_weights is for sequences of tokens",
        ),
        ({"spec": DataSpec((4, 2), "binary")}, "in Python a DataSpec with `step`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        transformer(**{"spec": TOKENS, **TINY, **options})
