"""Arguments in each other's place, or of another kind, end in one message."""

import jax
import numpy as np
import optax
import pytest

import genjax
from genjax import DataSpec, from_arrays, training, vae
from genjax.errors import ConfigError
from genjax.protocol import Trained
from genjax.runs.api import Run

X = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
SPEC = DataSpec((2,), "continuous")
SOURCE = from_arrays(X, np.arange(40) % 3)
MODEL = vae(SPEC, hidden=(4,), latent_dim=1)
TX = optax.sgd(0.1)
A_SPEC, A_MODEL, A_TRAINING = "a DataSpec, such as", "a Model, such as", "a Training: training"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: genjax.train(X, "vae"), "train takes a recipe's name, a Recipe or a Model first"),
        (lambda: vae(SOURCE), f"vae takes {A_SPEC} source.spec; got a Source"),
        (lambda: vae(X), f"vae takes {A_SPEC} source.spec; got a ndarray"),
        (lambda: vae(), "missing a required argument: 'spec'. By position it takes spec, all"),
        (lambda: vae(SPEC, 2), "vae: too many positional arguments. By position it takes spec"),
        (lambda: from_arrays(X, X, 3), "By position it takes x and y, all else by name"),
        (lambda: training(TX, MODEL), f"training takes {A_MODEL}"),
        (lambda: genjax.reflow(MODEL), "reflow takes a trained model: Trained(model, params, sta"),
        (lambda: genjax.two_stage(MODEL, MODEL), "two_stage takes a trained model"),
        (lambda: genjax.two_stage(Trained(MODEL, {}, {}), SPEC), f"two_stage takes {A_MODEL}"),
        (lambda: genjax.prior_of(SPEC), f"prior_of takes {A_MODEL}"),
        (lambda: genjax.latent_spec(SPEC), f"latent_spec takes {A_MODEL}"),
        (
            lambda: genjax.example_batch(SOURCE, jax.random.key(0), 3),
            f"example_batch takes {A_SPEC}",
        ),
        (lambda: genjax.ensemble(MODEL), f"ensemble takes {A_TRAINING}"),
        (lambda: genjax.shard(MODEL, genjax.make_mesh({"data": 1})), f"shard takes {A_TRAINING}"),
        (lambda: genjax.compiled(MODEL), f"compiled takes {A_TRAINING}"),
        (lambda: genjax.microbatch(MODEL, 2), f"microbatch takes {A_TRAINING}"),
        (lambda: genjax.scan_steps(MODEL), f"scan_steps takes {A_TRAINING}"),
        (lambda: genjax.repeat_steps(MODEL, 2), f"repeat_steps takes {A_TRAINING}"),
        (lambda: genjax.feed(MODEL, min), f"feed takes {A_TRAINING}"),
        (lambda: genjax.skip_nonfinite(MODEL), f"skip_nonfinite takes {A_TRAINING}"),
        (lambda: genjax.grid(beta=1.0), "An axis is a list of numbers, beta=[0.1, 0.2]; got 1.0"),
    ],
)
def test_an_argument_of_another_kind(call, said):
    with pytest.raises(ConfigError) as caught:
        call()
    assert said in str(caught.value)


def test_a_shape_is_a_tuple():
    with pytest.raises(ValueError, match=r"a tuple of sizes, such as \(3,\); got 3"):
        DataSpec(3, "continuous")


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_a_number_of_samples_of_a_conditional_model(n):
    model = vae(SOURCE.spec, hidden=(4,), latent_dim=1)
    run = Run(model, *model.init(jax.random.key(0)), 0)
    with pytest.raises(ConfigError, match="sample needs a whole number n >= 1"):
        run.sample(n)
    assert run.sample(np.int64(3)).shape == (3, 2)


def test_labels_may_come_second():
    assert SOURCE.spec == from_arrays(X, y=np.arange(40) % 3).spec
    assert SOURCE.spec.n_classes == 3
