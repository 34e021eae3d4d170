"""What networks are traced for, and the forms that they take on a card. There is none here: cuDNN's
kernel is lowered, and not run.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from genjax.cli.failures import told
from genjax.nets import attention, platforms
from genjax.nets.attention import fused_attention
from genjax.nets.fast_conv import convolve
from genjax.profiling.devices import product_flops

B, G, R, T, H = 2, 2, 3, 16, 8


def test_the_platform_is_that_of_the_device_that_was_asked_for():
    assert platforms.platform() == "cpu"
    with platforms.traced_for("tpu"):
        assert platforms.platform() == "tpu"
        with jax.default_device(jax.devices("cpu")[0]), platforms.traced_for("gpu"):
            assert platforms.platform() == "gpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert platforms.platform() == "cpu"


@pytest.mark.parametrize(
    ("capability", "wanted"), [("9.0", True), ("7.5", False), ("gfx90a", False), (None, False)]
)
def test_the_kernel_is_for_cards_that_have_it(monkeypatch, capability, wanted):
    class Card:
        compute_capability = capability

    assert not platforms.has_cudnn_attention()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    assert platforms.has_cudnn_attention() == wanted


def lowered(dtype, window=None):
    """The text of fused attention for CUDA."""
    q = jax.ShapeDtypeStruct((B, G, R, T, H), dtype)
    k = jax.ShapeDtypeStruct((B, G, T, H), dtype)
    f = jax.jit(functools.partial(fused_attention, window=window))
    return f.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(attention, "has_cudnn_attention", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    checked = functools.partial(lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", checked)


def test_narrow_numbers_are_attended_to_by_cudnn_and_wide_ones_by_products(card):
    assert "__cudnn$fmha" in lowered(jnp.bfloat16)
    assert "__cudnn$fmha" in lowered(jnp.bfloat16, window=4)
    assert "__cudnn$fmha" not in lowered(jnp.float32)


def test_its_products_are_counted_as_those_of_the_other_form(card, monkeypatch):
    def counted():
        def loss(q, k, v):
            return fused_attention(q, k, v).astype(jnp.float32).sum()

        q, k = jnp.ones((B, G, R, T, H), jnp.bfloat16), jnp.ones((B, G, T, H), jnp.bfloat16)
        return product_flops(jax.grad(loss, (0, 1, 2)), q, k, k)

    by_cudnn = counted()
    monkeypatch.setattr(attention, "has_cudnn_attention", lambda: False)
    with jax.numpy_dtype_promotion("standard"):  # as where networks compute in bfloat16
        by_products = counted()
    assert by_cudnn == by_products == 3 * 4 * B * G * R * T * T * H


@pytest.mark.parametrize("stride", [1, 2])
def test_of_a_form_for_each_platform_the_plain_one_counts(stride):
    """Without the zeros that the form for CPUs multiplies, or that a stride's gradient lies
    between.
    """
    x, kernel = jnp.ones((5, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
    forward = 2 * 5 * (8 // stride) ** 2 * 6 * 9 * 4

    def loss(x, kernel):
        return convolve(x, kernel, stride).sum()

    assert product_flops(loss, x, kernel) == forward
    assert product_flops(jax.grad(loss, 0), x, kernel) == 2 * forward
    assert product_flops(jax.grad(loss, (0, 1)), x, kernel) == 3 * forward


def test_what_is_computed_once_is_itself_and_has_its_derivatives():
    x = jnp.arange(12.0).reshape(3, 4)
    dx = jnp.cos(x)
    assert (platforms.once(x) == x).all()
    value, tangent = jax.jvp(platforms.once, (x,), (dx,))
    assert (value == x).all()
    assert (tangent == dx).all()
    assert (jax.grad(lambda x: (platforms.once(x) * dx).sum())(x) == dx).all()
    assert (jax.vmap(platforms.once)(x) == x).all()
    assert platforms.once(jnp.arange(3)).dtype == jnp.int32
    for name, loops in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = jax.export.export(jax.jit(platforms.once), platforms=(name,))(x).mlir_module()
        assert ("while" in text) == loops


@pytest.mark.parametrize(("wrap", "most"), [(platforms.once, 1), (lambda x: x, None)])
def test_xla_computes_a_draw_that_windows_read_once(wrap, most):
    """On a CPU; and without, for each of them."""

    def windows(key):
        noise = wrap(jax.random.normal(key, (4, 12, 12, 4)))
        padded = jnp.pad(noise, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return jnp.concatenate([padded[:, i : i + 12, i : i + 12] for i in range(3)], axis=-1)

    text = jax.jit(windows).lower(jax.random.key(0)).compile().as_text()
    draws = text.count("constant(2.83297682)")  # of the inverse error function
    assert draws == most if most else draws > 1


@pytest.mark.parametrize("asked", ["", "cuda"])
def test_a_plug_in_that_does_not_start_is_one_message(monkeypatch, asked):
    """With a driver that is too old, say: jax's own advice and what else there is."""
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    reason = "Unable to initialize backend 'cuda': INTERNAL: no supported devices found"
    said = told(RuntimeError(reason), "train")
    assert said is not None
    assert reason in said
    assert "the driver (`nvidia-smi`) no older than its CUDA" in said
    assert ("JAX_PLATFORMS=cpu" in said) == (not asked)
    assert told(RuntimeError("another"), "train") is None
