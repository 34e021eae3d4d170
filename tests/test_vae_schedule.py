"""The KL's weight as training goes on: step s of a VAE's warm-up over S has beta min(s / S, 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vae_oracles import SHIFT, WIDEN, f64, jit, linear_params, linear_vae, ppca, random_params

from genjax.families.vae import kl_weight, vae
from genjax.learning.step import training
from genjax.learning.transforms import repeat_steps, scan_steps
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(0)
# step -> share of beta, for a warm-up of 8 steps
SHARES = {0: 0.0, 2: 0.25, 4: 0.5, 8: 1.0, 9: 1.0, 10**6: 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_the_kl_has_this_weight_and_what_is_reported_does_not_change(x64, beta):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))
    loss = jit(linear_vae(beta=beta, beta_warmup_steps=8).losses["vae"])
    _, plain = jit(linear_vae().losses["vae"])(params, state, batch, KEY, 0)
    kl, log_lik = plain.metrics["kl"], plain.metrics["log_likelihood"]
    for step, share in SHARES.items():
        value, aux = loss(params, state, batch, KEY, jnp.int32(step))
        np.testing.assert_allclose(value, share * beta * kl - log_lik, rtol=1e-12)
        for name, metric in plain.metrics.items():
            np.testing.assert_array_equal(aux.metrics[name], metric, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])
def test_a_step_on_the_way_is_a_step_with_that_beta(x64, gradient):
    """Loss and gradient of many samples, whose weights beta enters, too."""
    settings = {"latent_dim": 2, "hidden": (3,), "n_samples": 4, "gradient": gradient}
    spec = DataSpec((3,), "continuous")
    warm = vae(spec, beta=2.0, beta_warmup_steps=8, **settings)
    params, state = random_params(warm)
    params = f64(params)
    batch = Batch(jnp.asarray(np.random.default_rng(1).normal(size=(4, 3))))

    def loss_of_step(params, step):
        return warm.losses["vae"](params, state, batch, KEY, step)[0].mean()

    def loss_of_beta(params, beta):
        model = vae(spec, beta=beta, **settings)
        return model.losses["vae"](params, state, batch, KEY, 0)[0].mean()

    by_step, by_beta = (jit(jax.value_and_grad(loss)) for loss in (loss_of_step, loss_of_beta))
    for step, share in SHARES.items():
        if step > 8:
            continue
        found = by_step(params, jnp.int32(step))
        wanted = by_beta(params, 2.0 * share)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_bound_knows_of_no_warm_up(x64):
    p = ppca()
    params, state = linear_params(p, SHIFT, WIDEN)
    batch = Batch(jnp.asarray(p.x[:5]))
    one, other = linear_vae(beta_warmup_steps=8), linear_vae()
    np.testing.assert_array_equal(
        one.bound(params, state, batch, KEY), other.bound(params, state, batch, KEY)
    )


def weights_of(metrics):
    """The weight that the KL had in each step's loss."""
    found = {name.removeprefix("vae/"): np.asarray(value) for name, value in metrics.items()}
    return (found["loss"] + found["log_likelihood"]) / found["kl"]


@pytest.mark.slow
def test_training_gives_the_loss_its_own_steps_whichever_way_they_are_taken(x64):
    model = linear_vae(beta=2.0, beta_warmup_steps=4)
    t = training(model, optax.sgd(1e-3))
    params, state = linear_params(ppca(), SHIFT, WIDEN)
    start = t.init(KEY)._replace(params=params, state=state)
    wanted = 2.0 * np.minimum(np.arange(7) / 4, 1)
    x = jnp.asarray(ppca().x[:70].reshape(7, 10, 6))
    ts, found = start, []
    step = jit(t.step)
    for i in range(7):
        ts, metrics = step(ts, Batch(x[i]))
        found.append(weights_of(metrics))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    _, metrics = jit(scan_steps(t).step)(start, Batch(x))
    np.testing.assert_allclose(weights_of(metrics), wanted, rtol=1e-9, atol=1e-9)
    # From the middle, as after a resume, and all over one batch.
    later, _ = jit(scan_steps(t).step)(start, Batch(x[:3]))
    _, metrics = jit(repeat_steps(t, 4).step)(later, Batch(x[0]))
    np.testing.assert_allclose(weights_of(metrics), wanted[3:], rtol=1e-9, atol=1e-9)


def test_a_warm_up_may_be_swept_and_none_is_none():
    shares = jax.jit(lambda n: jnp.stack([kl_weight(1.0, n, s, jnp.float32) for s in (0, 1, 4)]))
    np.testing.assert_allclose(shares(0), [1, 1, 1])
    np.testing.assert_allclose(shares(1), [0, 1, 1])
    np.testing.assert_allclose(shares(4), [0, 0.25, 1])
    assert kl_weight(0.7, 0, 3, jnp.float32) == 0.7  # the number itself: the program is the same
