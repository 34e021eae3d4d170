"""FLOPs by a jaxpr, against products counted by hand, and data sheets by name."""

import jax
import jax.numpy as jnp
import optax
import pytest

from genjax import DataSpec, example_batch
from genjax.families.transformer import transformer
from genjax.learning.step import training
from genjax.profiling.devices import datasheet_peak, product_flops

A, B = jnp.ones((2, 3)), jnp.ones((3, 4))
ONE = 2 * 2 * 3 * 4


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        (lambda: A @ B, ONE),
        (lambda: jax.jit(jnp.matmul)(A, B) + jax.checkpoint(jnp.matmul)(A, B), 2 * ONE),
        (lambda: jax.lax.scan(lambda c, _: (c, A @ B), 0, None, length=5), 5 * ONE),
        (lambda: jax.lax.cond(A[0, 0] > 0, lambda: A @ B, lambda: A @ (B @ B.T) @ B), ONE * 5.5),
        (lambda: jnp.einsum("bij,bjk->bik", jnp.ones((7, 2, 3)), jnp.ones((7, 3, 4))), 7 * ONE),
        (lambda: jnp.sin(A), 0),
    ],
)
def test_products_are_counted(f, wanted):
    if wanted == ONE * 5.5:  # the longer branch: B B' 2*3*4*3, A (.) 2*2*3*3, (.) B 2*2*3*4
        wanted = 2 * 3 * 4 * 3 + 2 * 2 * 3 * 3 + ONE
    assert product_flops(f) == wanted


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_counted(groups):
    x, kernel = jnp.ones((5, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def f(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    assert product_flops(f, x, kernel) == 2 * (5 * 8 * 8 * 6) * 9 * 4 / groups


@pytest.mark.slow
def test_a_step_costs_three_times_its_forward_pass_and_no_more_in_a_loop():
    """6 N D and the attention, as every table of model FLOPs has it (Kaplan 2020, appendix B): a
    looped or an accumulated step asks for the same products.
    """
    spec = DataSpec((16,), "tokens", levels=11, step="token")
    sizes = {"d_model": 8, "n_layers": 3, "n_heads": 2, "d_hidden": 32}
    counts = {}
    for looped in (False, True):
        model = transformer(spec, **sizes, scan_layers=looped)
        t = training(model, optax.sgd(0.1))
        state = jax.eval_shape(t.init, jax.random.key(0))
        batch = example_batch(spec, jax.random.key(1), 4)
        counts[looped] = product_flops(t.step, state, batch)
    dense = 3 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 8 * 11  # qkv, out, up and down, and the readout
    attention = 3 * 2 * 16 * 8  # q k' and p v, of each token
    assert counts[True] == counts[False]
    assert counts[True] == pytest.approx(6 * 4 * 16 * (dense + attention), rel=0.02)


def test_peaks_go_by_the_name_of_the_device():
    assert datasheet_peak("NVIDIA H200") == 989e12
    assert datasheet_peak("NVIDIA H100 PCIe") == 756e12
    assert datasheet_peak("NVIDIA H100 80GB HBM3") == datasheet_peak("NVIDIA H200") == 989e12
    assert datasheet_peak("NVIDIA H200 NVL") == 835e12
    assert datasheet_peak("NVIDIA A100-SXM4-80GB") == datasheet_peak("NVIDIA A100-PCIE-40GB")
    assert datasheet_peak("NVIDIA L40S") == 362e12
    assert datasheet_peak("NVIDIA L40") == 181e12
    assert datasheet_peak("NVIDIA L4") == 121e12
    assert datasheet_peak("NVIDIA GeForce RTX 4090") == 165e12
    # Other chips, or parts of one, whose names begin alike.
    for other in ("RTX 4090 Laptop GPU", "H100 80GB HBM3 MIG 1g.10gb", "GB200", "H20"):
        assert datasheet_peak(f"NVIDIA {other}") is None
    assert datasheet_peak("TPU v5 lite") == 197e12
    assert datasheet_peak("cpu") is None
