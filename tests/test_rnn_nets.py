"""Recurrent cells and layers against their equations, against Flax, and whole sequences against one
step at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gates import assert_close, quick
from rows import grown, widen

from genjax.errors import ConfigError
from genjax.nets.cells import CELLS, Cell, cell_of
from genjax.nets.functional import functional
from genjax.nets.recurrent import Recurrent, RecurrentLayer

B, T, D_IN, D = 3, 5, 4, 6
every_cell = pytest.mark.parametrize("cell", CELLS)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def written(cell, x, carry, w, b, u, c):
    """The equations, gate by gate: W, b, U are lists over the gates, c is the GRU's bias of its
    recurrent product.
    """
    carry = tuple(map(np.asarray, carry))
    h = carry[0]

    def gate(k):
        return x @ w[k] + b[k] + h @ u[k]

    if cell == "vanilla":
        return (np.tanh(gate(0)),)
    if cell == "lstm":
        memory = sigmoid(gate(1)) * carry[1] + sigmoid(gate(0)) * np.tanh(gate(2))
        return sigmoid(gate(3)) * np.tanh(memory), memory
    r, z = sigmoid(gate(0)), sigmoid(gate(1))
    n = np.tanh(x @ w[2] + b[2] + r * (h @ u[2] + c))
    return ((1 - z) * n + z * h,)


def flax_cell(cell, w, b, u, c):
    """Flax's own cell with the same weights, and how to call it on our carries. Its GRU has no bias
    c.
    """
    kinds = {"vanilla": nnx.SimpleCell, "lstm": nnx.LSTMCell, "gru": nnx.GRUCell}
    module = kinds[cell](D_IN, D, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    if cell == "lstm":
        for k, name in enumerate("ifgo"):
            getattr(module, "if_" if name == "f" else "i" + name).kernel[...] = w[k]
            getattr(module, "h" + name).kernel[...] = u[k]
            getattr(module, "h" + name).bias[...] = b[k]
        # Flax carries (c, h), and a call gives the carry and h.
        return lambda carry, x: module(carry[::-1], x)[0][::-1]
    module.dense_i.kernel[...], module.dense_i.bias[...] = (
        np.concatenate(w, axis=1),
        np.concatenate(b),
    )
    module.dense_h.kernel[...] = np.concatenate(u, axis=1)
    assert c is None or not c.any()
    return lambda carry, x: (module(carry[0], x)[0],)


@functools.cache
def net(cell, n_layers):
    return functional(functools.partial(Recurrent, cell, D_IN, D, n_layers))


def setup(cell, n_layers, seed=0):
    """In float64 where the test asks for it."""
    params = grown(net(cell, n_layers).init(jax.random.key(seed))[0])
    params = widen(params) if jnp.result_type(float) == jnp.float64 else params
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, T, D_IN)))
    carry = tuple(
        tuple(jnp.asarray(0.5 * rng.normal(size=(B, D))) for _ in range(CELLS[cell].n_carry))
        for _ in range(n_layers)
    )
    return params, x, carry


def call(cell, n_layers, params, *args, **kwargs):
    return net(cell, n_layers).apply(params, {}, *args, **kwargs)[0]


def weights(cell, params):
    """The gates' W, b and U, and c, of the first layer."""
    layer, n = jax.tree.map(np.asarray, params["layers"][0]), CELLS[cell].n_gates
    w, u = np.split(layer["inputs"]["kernel"], n, axis=1), np.split(layer["kernel"], n, axis=1)
    return w, np.split(layer["inputs"]["bias"], n), u, layer.get("bias")


@pytest.mark.slow
@every_cell
@pytest.mark.parametrize("other", [written, flax_cell])
def test_a_cell_is_its_equations_and_that_of_flax(cell, other, x64):
    params, x, (carry,) = setup(cell, 1)
    if other is flax_cell and cell == "gru":
        params["layers"][0]["bias"] = jnp.zeros_like(params["layers"][0]["bias"])
    y, (last,) = quick(functools.partial(call, cell, 1))(params, x, (carry,))
    parts = weights(cell, params)
    step = (
        flax_cell(cell, *parts)
        if other is flax_cell
        else lambda carry, x: written(cell, np.asarray(x), carry, *parts)
    )
    for t in range(T):
        carry = step(carry, x[:, t])
        np.testing.assert_allclose(y[:, t], carry[0], rtol=0, atol=1e-13)
    for ours, theirs in zip(last, carry, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.slow
@every_cell
def test_whole_sequences_equal_a_python_loop_of_single_steps_with_their_gradients(cell, x64):
    params, x, carry = setup(cell, 2)

    def whole(params, x, carry):
        return call(cell, 2, params, x, carry)

    def loop(params, x, carry):
        ys = []
        for t in range(T):
            y, carry = call(cell, 2, params, x[:, t], carry, method="one")
            ys.append(y)
        return jnp.stack(ys, axis=1), carry

    def with_gradients(run):
        # Weights that differ everywhere, so that no two parts of the gradient can be mistaken for
        # each other.
        def value(*args):
            out = run(*args)
            leaves = jax.tree.leaves(out)
            return sum(
                (leaf * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)).sum() for leaf in leaves
            ), out

        return quick(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    assert_close(
        with_gradients(whole)(params, x, carry), with_gradients(loop)(params, x, carry), rtol=1e-12
    )


# It multiplies a and u, so that du is not da.
PRODUCT = Cell(lambda a, u, carry: (jnp.tanh(a * u + a),), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", [CELLS["vanilla"], CELLS["lstm"], PRODUCT], ids=["vanilla", "lstm", "product"]
)
def test_the_way_back_with_one_product_for_all_steps_has_every_derivative(cell, x64):
    layer = functional(functools.partial(RecurrentLayer, cell, D_IN, D))
    params, rng = widen(grown(layer.init(jax.random.key(0))[0])), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(T, B, D_IN)))
    carry = tuple(jnp.asarray(0.5 * rng.normal(size=(B, D))) for _ in range(cell.n_carry))
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

    def whole(params):
        return sum(
            (leaf**3).sum() for leaf in jax.tree.leaves(layer.apply(params, {}, x, carry)[0])
        )

    def loop(params):
        after, ys = carry, []
        for t in range(T):
            a = x[t] @ params["inputs"]["kernel"] + params["inputs"]["bias"][None]
            after = cell.step(a, after[0] @ params["kernel"], after)
            ys.append(after[0])
        return sum((leaf**3).sum() for leaf in (*ys, *after))

    def derivatives(loss):
        def first(params):
            return jax.jvp(loss, (params,), (along,))[1]

        def forward_over_reverse(params):
            return jax.jvp(jax.grad(loss), (params,), (along,))[1]

        return quick(
            lambda params: (first(params), jax.grad(first)(params), forward_over_reverse(params))
        )(params)

    assert_close(derivatives(whole), derivatives(loop), rtol=1e-11)


@pytest.mark.slow
def test_only_cells_whose_gates_add_their_products_say_so():
    """d step / da = d step / du for those; a cell that says so and is not would have a wrong
    gradient of U.
    """
    for name, cell in {**CELLS, "product": PRODUCT}.items():
        rng = np.random.default_rng(0)
        a, u = (jnp.asarray(rng.normal(size=(1, cell.n_gates * D)), jnp.float32) for _ in range(2))
        carry = tuple(jnp.ones((1, D)) for _ in range(cell.n_carry))
        of_a, of_u = (jax.jacobian(cell.step, argnums)(a, u, carry) for argnums in (0, 1))
        same = all(np.allclose(p, q, atol=1e-6) for p, q in zip(of_a, of_u, strict=True))
        assert same == cell.summed, name


@pytest.mark.slow
@every_cell
def test_a_sequence_in_two_parts_is_the_whole(cell, x64):
    params, x, carry = setup(cell, 2)
    apply = quick(functools.partial(call, cell, 2))
    y, last = apply(params, x, carry)
    first, between = apply(params, x[:, :2], carry)
    second, after = apply(params, x[:, 2:], between)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), y, rtol=0, atol=1e-14)
    assert_close(after, last, rtol=1e-14)


@pytest.mark.slow
@every_cell
def test_the_first_weights_and_the_first_carry(cell):
    params = net(cell, 2).init(jax.random.key(0))[0]
    for layer in params["layers"].values():
        for gate in np.split(np.asarray(layer["kernel"]), CELLS[cell].n_gates, axis=1):
            np.testing.assert_allclose(gate.T @ gate, np.eye(D), atol=1e-5)
        wanted = np.repeat([0, 1, 0, 0], D) if cell == "lstm" else np.zeros(CELLS[cell].n_gates * D)
        np.testing.assert_array_equal(layer["inputs"]["bias"], wanted)
    assert ("bias" in params["layers"][0]) == (cell == "gru")
    start = call(cell, 2, params, B, method="start")
    assert jax.tree.map(jnp.shape, start) == (((B, D),) * CELLS[cell].n_carry,) * 2
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(start))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_forget_bias_is_how_much_of_the_past_a_new_cell_keeps(cell, x64):
    """Without anything to see, and with U = 0, the last entry of the carry is multiplied by σ(bias)
    at every step.
    """
    biased = functional(functools.partial(Recurrent, cell_of(cell, 2.0), D_IN, D))
    params = widen(biased.init(jax.random.key(0))[0])
    layer = params["layers"][0]
    layer["kernel"] = jnp.zeros_like(layer["kernel"])
    memory = CELLS[cell].n_carry - 1
    start = (tuple(jnp.full((B, D), 0.5 if k == memory else 0.0) for k in range(memory + 1)),)
    _, (last,) = biased.apply(params, {}, jnp.zeros((B, T, D_IN)), start)[0]
    np.testing.assert_allclose(last[memory], 0.5 * sigmoid(2.0) ** T, rtol=1e-12)
    assert cell_of(cell) is CELLS[cell]


@pytest.mark.slow
def test_dropout_is_between_layers_only_and_unbiased():
    key = jax.random.key(3)
    params, x, carry = setup("gru", 1)
    plain = call("gru", 1, params, x, carry)
    assert_close(call("gru", 1, params, x, carry, key, 0.5), plain, rtol=0)
    params, x, carry = setup("vanilla", 2)
    # With a small gain the second layer is linear in what it is fed, and its mean is that without
    # dropout.
    params["layers"][1]["inputs"] = jax.tree.map(
        lambda leaf: 1e-3 * leaf, params["layers"][1]["inputs"]
    )
    carry = (carry[0], jax.tree.map(jnp.zeros_like, carry[1]))
    wanted = call("vanilla", 2, params, x, carry)[0][:, 0]
    run = quick(
        jax.vmap(lambda key: call("vanilla", 2, params, x[:, :1], carry, key, 0.3)[0][:, 0])
    )
    values = np.asarray(run(jax.random.split(key, 4000)))
    error = (values.mean(0) - wanted) / (values.std(0) / np.sqrt(len(values)))
    assert values.std(0).min() > 0
    assert np.abs(error).max() < 4


def test_a_cell_cannot_be_summed_and_biased_twice():
    with pytest.raises(ConfigError, match="n_biased must be 0; got 1"):
        Cell(lambda a, u, carry: (a + u,), 1, n_biased=1, summed=True)


def test_a_cell_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"no cell called 'lsmt'\. Did you mean lstm"):
        functional(functools.partial(Recurrent, "lsmt", D_IN, D))
    with pytest.raises(
        ConfigError, match="a gate that keeps the past, as lstm and gru have; got 1"
    ):
        cell_of("vanilla", 1.0)


def test_one_bias_is_that_of_all_gates_and_others_are_one_for_each():
    def step(a, u, carry):
        gate, new = jnp.split(a + u, 2, -1)
        return (jax.nn.sigmoid(gate) * jnp.tanh(new),)

    assert Cell(step, 2).bias == (0.0, 0.0)
    with pytest.raises(ConfigError, match="2 gates has as many biases, or one for all; got 3"):
        Cell(step, 2, bias=(0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (lambda a, u, carry: (a + u,), r"it gave \[\(1, 4\)\]"),
        (lambda a, u, carry: jnp.split(a + u, 2, -1)[0], "it gave"),
        (lambda a, u, carry: (carry[1],), "IndexError"),
    ],
)
def test_a_cell_whose_step_is_not_what_it_says_is_refused(step, text):
    with pytest.raises(ConfigError, match=f"n_gates=2 and n_carry=1 must .*{text}"):
        functional(functools.partial(RecurrentLayer, Cell(step, 2), D_IN, 2))
