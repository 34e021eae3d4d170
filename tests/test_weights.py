"""Weights that are brought in by name."""

import jax
import numpy as np
import pytest

from genjax.checks import leaves_by_name
from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.learning.weights import import_weights, parameter_names
from genjax.protocol import DataSpec

MODEL = vae(DataSpec((2,), "continuous"), hidden=(3,), latent_dim=1)
KERNEL = "vae/encoder/layers/0/kernel"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape) for name, shape in parameter_names(MODEL).items()}


def start():
    return MODEL.init(jax.random.key(0))[0]


def test_every_array_comes_to_its_name_in_the_dtype_of_the_model():
    given = arrays()
    params = import_weights(start(), given)
    for name, leaf in leaves_by_name(params).items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, given[name].astype(np.float32))
    assert jax.tree.structure(params) == jax.tree.structure(start())


def test_a_kernel_of_pytorch_is_turned_round():
    given = arrays()
    given["fc.weight"] = given[KERNEL].T
    wanted = given.pop(KERNEL).astype(np.float32)
    params = import_weights(start(), given, {KERNEL: ("fc.weight", np.transpose)})
    np.testing.assert_array_equal(leaves_by_name(params)[KERNEL], wanted)


def test_all_that_does_not_fit_is_listed():
    given = arrays()
    given[KERNEL] = given[KERNEL].T
    given["vae/encoder/layers/0/bias"] = np.zeros(3, complex)
    del given["vae/encoder/layers/1/bias"]
    given["mask"] = np.zeros(1)
    with pytest.raises(ConfigError) as caught:
        import_weights(start(), given, {"vae/nothing": "mask"})
    text = str(caught.value)
    assert f"{KERNEL}: expected shape [2, 3]; '{KERNEL}' has [3, 2]; give (" in text
    assert "layers/0/bias: expected float32" in text
    assert "layers/1/bias: there is no array" in text
    assert "mask: an array that no parameter takes" in text
    assert "vae/nothing: not a parameter of this model" in text


@pytest.mark.parametrize("value", [1e300, np.nan])
def test_numbers_that_a_parameter_cannot_hold_are_refused(value):
    given = arrays()
    given[KERNEL] = given[KERNEL].astype(np.float64)
    given[KERNEL][0, 1] = value
    with pytest.raises(ConfigError, match=f"{KERNEL}: 1 of 6 numbers .* are not finite float32"):
        import_weights(start(), given)
