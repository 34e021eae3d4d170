"""What a train step keeps: the state is updated in place, and what is computed again gives the same
with less memory.
"""

import functools

import jax
import optax
import pytest
from gates import assert_close
from rows import B, setup

from genjax.data import example_batch
from genjax.families.diffusion import diffusion
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vrnn import vrnn
from genjax.learning.step import training
from genjax.learning.transforms import repeat_steps
from genjax.profiling.measure import state_bytes, step_program, step_shapes
from genjax.protocol import DataSpec

QUICK = {"xla_backend_optimization_level": 0}  # which changes no figure of memory


# It is what `training` and jax do, not a family: parameters alone, two players, a state.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vae", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gan-ring", "lstm-lanes"))]
)
def test_the_new_state_is_written_over_the_donated_one(name):
    """The compiled program reuses every byte of the state, in one step and in a loop of steps:
    nothing of it is there twice.
    """
    spec = setup(name).spec
    t = setup(name).recipe.training(setup(name).on)
    state, batch = step_shapes(t, spec, B)
    looped = jax.jit(repeat_steps(t, 3).step, donate_argnums=0).lower(state, batch).compile(QUICK)
    for program in (step_program(t, spec, B, QUICK), looped):
        assert program.memory_analysis().alias_size_in_bytes == state_bytes(state) > 0


T, N = 32, 16
AGAIN = {
    "vanilla": (functools.partial(rnn, cell="vanilla", d_embed=4, d_hidden=16, n_layers=2), {}),
    "lstm": (functools.partial(rnn, cell="lstm", d_embed=4, d_hidden=16), {}),
    "vrnn": (functools.partial(vrnn, latent_dim=2, d_hidden=16, hidden=(16,)), {}),
    "fivo": (
        functools.partial(
            vrnn, latent_dim=2, d_hidden=16, hidden=(16,), objective="fivo", n_samples=4
        ),
        {},
    ),
    "transformer": (
        functools.partial(transformer, d_model=16, n_layers=4, n_heads=4),
        {"scan_layers": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_computing_again_gives_the_same_in_less_memory(name):
    build, options = AGAIN[name]
    spec = DataSpec((T,), "tokens", levels=5, step="token")
    plain, again = build(spec, **options), build(spec, **options, remat="full")
    params, state = jax.jit(plain.init)(jax.random.key(0))
    batch = example_batch(spec, jax.random.key(1), N)
    assert_close(jax.jit(again.init)(jax.random.key(0)), (params, state), 0)

    def losses(model):
        (player,) = model.losses

        def total(params):
            value = model.losses[player](params, state, batch, jax.random.key(2), 0)[0]
            return value.mean(), value

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    assert_close(losses(again)(params), losses(plain)(params), 1e-5)
    needed = [
        step_program(training(model, optax.sgd(0.1)), spec, N, QUICK)
        .memory_analysis()
        .temp_size_in_bytes
        for model in (plain, again)
    ]
    assert needed[1] < 0.9 * needed[0]


IMAGES = DataSpec((8, 8, 1), "continuous")
DENOISERS = {
    "mlp": {"hidden": (32, 32)},
    "unet": {"channels": (4, 8), "n_heads": 0},
    "dit": {"d_model": 16, "n_layers": 4, "n_heads": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "remat"),
    [("mlp", "full"), ("unet", "dots"), ("dit", "full"), ("dit", "dots_no_batch")],
)
def test_a_denoiser_computed_again_or_in_a_loop_has_the_same_loss_and_gradient(net, remat):
    settings = {"net": net, **DENOISERS[net], "cond_dropout": 0.0, "guidance": None}
    plain = diffusion(IMAGES, **settings)
    params, state = jax.jit(plain.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)  # of which the last ones are 0 at first
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params, batch = jax.tree.unflatten(tree, moved), example_batch(IMAGES, jax.random.key(1), N)

    def gradient(model):
        (player,) = model.losses

        def total(params):
            return model.losses[player](params, state, batch, jax.random.key(2), 0)[0].mean()

        return jax.jit(jax.value_and_grad(total)).lower(params).compile(QUICK)

    def memory(model):
        program = step_program(training(model, optax.sgd(0.1)), IMAGES, N, QUICK)
        return program.memory_analysis().temp_size_in_bytes

    wanted = gradient(plain)(params)
    for looped in (False, True) if net == "dit" else (False,):
        again = diffusion(IMAGES, **settings, remat=remat, scan_layers=looped)
        assert_close(gradient(again)(params), wanted, 2e-4)
        if looped and remat == "full":
            kept = diffusion(IMAGES, **settings, scan_layers=True)
            assert memory(again) < 0.9 * memory(kept)
