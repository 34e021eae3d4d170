"""What a step costs: counts of compiled programs, and times."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from genjax.errors import ConfigError
from genjax.profiling.measure import (
    cost_of,
    loop_flops,
    matmul_peak,
    seconds_per_call,
    step_cost,
    stepper,
)
from genjax.zoo import ZOO
from genjax.zoo.recipe import replace


def test_cost_of_counts_a_matrix_product() -> None:
    a = jnp.ones((32, 16))
    flops, temporary = cost_of(jax.jit(lambda a: a @ a.T).lower(a).compile())
    assert flops == pytest.approx(2 * 32 * 32 * 16, rel=0.1)
    assert temporary >= 0


def test_products_in_a_loop_count_for_every_trip() -> None:
    """Three products a trip: one forward, two backward."""
    n, d, trips = 8, 16, 5

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=trips)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(jnp.ones((d, d)), jnp.ones((n, d))).compile()
    products = 2 * n * d * d
    assert loop_flops(program.as_text()) == 3 * (trips - 1) * products
    assert cost_of(program)[0] >= 3 * trips * products


def test_convolutions_in_a_loop_count_for_every_trip() -> None:
    """Of a stride's gradient without the zeros between its numbers."""
    trips, forward = 5, 2 * 3 * 4 * 4 * 6 * (3 * 3 * 2)
    x, kernel = jnp.ones((trips, 3, 8, 8, 2)), jnp.ones((3, 3, 2, 6))

    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=names)

    def flops(f: Callable[..., jax.Array]) -> float:
        def loop(xs: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.lax.map(lambda x: f(x, kernel), xs)

        return loop_flops(jax.jit(loop).lower(x, kernel).compile().as_text())

    assert flops(convolved) == (trips - 1) * forward
    by_image = jax.grad(lambda x, kernel: jnp.sin(convolved(x, kernel)).sum())
    assert flops(by_image) == (trips - 1) * 2 * forward


def test_stepper_advances_the_state_and_times_are_as_many_as_asked() -> None:
    seen: list[int] = []

    def step(state, batch):
        seen.append(state)
        return state + batch, jnp.zeros(())

    times = seconds_per_call(stepper(step, 1, 2), budget=0.0, at_least=3)
    assert len(times) == 3
    assert all(seconds >= 0 for seconds in times)
    assert seen == [1, 3, 5, 7]  # one to warm up
    assert matmul_peak(64, budget=0.0) > 0


@pytest.mark.slow
def test_a_step_on_a_mesh_costs_each_device_a_part() -> None:
    small = {"d_model": 16, "n_layers": 2, "n_heads": 2, "batch_size": 16, "microbatches": 2}
    recipe = replace(ZOO["gpt2-124m"], **small, n_symbols=64, length=32)
    alone = step_cost(recipe, 0.1)
    shared = step_cost(recipe, 0.1, mesh={"data": 2, "fsdp": 4})
    assert shared.product_flops == alone.product_flops
    assert shared.flops < alone.flops / 2  # eight devices, each of which also updates and joins
    assert alone.flops > 0.9 * alone.product_flops
    assert alone.steps_of_sequences == 16 * 32
    assert alone.share_of_datasheet is None
    # The devices are one machine, of which the peak is.
    done = 8 * shared.flops * shared.steps_per_second
    assert shared.share_of_peak == pytest.approx(done / (1e9 * shared.peak_gflops))
    with pytest.raises(ConfigError, match="A batch of 16 does not divide over the 5 devices"):
        step_cost(recipe, 0.1, mesh={"data": 5})
