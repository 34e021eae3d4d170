"""Bijections in float64: ln |det| against Jacobians, inverses, and what each is said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_checks import B, assert_bijection, events, moved
from vae_oracles import jit

from genjax.nets.conditioners import (
    ConditionerConv,
    ConditionerMasked,
    ConditionerMLP,
    hidden_degrees,
)
from genjax.nets.functional import functional
from genjax.nets.patches import to_patches
from genjax.parts.bijections import (
    actnorm,
    autoregressive,
    chain,
    coupling,
    flattened,
    inverted,
    linear,
    matrix,
    prepared,
    reordered,
    reversed_order,
    stacked,
)
from genjax.parts.image_bijections import split, squeezed
from genjax.parts.monotone import additive, affine, spline

pytestmark = pytest.mark.usefixtures("x64")

D, E = 5, 2
IMAGE = (4, 4, 2)
MAPS = {"additive": additive(), "affine": affine(), "spline": spline(4, 3.0)}
ORDERS = np.asarray([[2, 0, 4, 1, 3], [1, 3, 0, 4, 2], [4, 3, 1, 0, 2]])


def coupled(name, d=D, cond_size=E):
    one, kept = MAPS[name], d // 2
    net = functional(
        lambda rngs: ConditionerMLP(kept, (6,), d - kept, one.n_params, cond_size, rngs=rngs)
    )
    return coupling(net, one, d)


def masked(name, d=D, cond_size=E, hidden=(7, 7)):
    one = MAPS[name]
    net = functional(lambda rngs: ConditionerMasked(d, hidden, one.n_params, cond_size, rngs=rngs))
    return autoregressive(net, one, d)


def convolved(name, d_in, d_out):
    n_params = MAPS[name].n_params
    return functional(lambda rngs: ConditionerConv(d_in, 3, d_out, n_params, E, rngs=rngs))


def layer(number):
    order = reordered(jnp.asarray(ORDERS, jnp.int32)[number])
    return chain(norm=actnorm(D), order=order, product=linear(D), move=coupled("affine"))


def multiscale():
    last = chain(squeeze=squeezed(), vector=flattened((1, 1, 16)))
    step = chain(
        norm=actnorm(8),
        product=linear(8),
        move=coupling(convolved("spline", 4, 4), MAPS["spline"], 8),
    )
    out = split(last, convolved("affine", 4, 4), MAPS["affine"], (2, 2, 8))
    return chain(squeeze=squeezed(), steps=stacked(lambda number: step, 2), out=out)


EACH = {
    "reversed": (reversed_order(), (D,)),
    "reordered": (reordered(jnp.asarray(ORDERS[0], np.int32)), (D,)),
    "flattened": (flattened(IMAGE), IMAGE),
    "squeezed": (squeezed(), IMAGE),
    "actnorm": (actnorm(D), (D,)),
    "actnorm of images": (actnorm(2), IMAGE),
    "linear": (linear(D), (D,)),
    "linear of images": (linear(2), IMAGE),
    **{f"coupling, {name}": (coupled(name), (D,)) for name in MAPS},
    **{f"autoregressive, {name}": (masked(name), (D,)) for name in MAPS},
    **{f"inverse autoregressive, {name}": (inverted(masked(name)), (D,)) for name in MAPS},
    "autoregressive, one number": (masked("spline", d=1), (1,)),
    "coupling of images": (
        coupling(convolved("affine", 1, 1), MAPS["affine"], 2),
        IMAGE,
    ),
    "stacked": (stacked(layer, 3), (D,)),
    "multi-scale": (multiscale(), IMAGE),
}


def parameters(bijection, size=0.3):
    return moved(bijection.init(jax.random.key(0)), size)


def conditions(seed=9):
    return events((E,), seed)


SLOW = ("multi-scale", "stacked", "inverse autoregressive, spline")
SOME = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EACH]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_log_det_is_that_of_the_jacobian_and_the_inverse_undoes_it(name):
    bijection, shape = EACH[name]
    params, c = parameters(bijection), conditions()
    # One condition for all, so that a Jacobian of one example has it too.
    c = jnp.broadcast_to(c[:1], c.shape)

    def forward(x):
        return bijection.forward(params, x, c[: len(x)])

    def inverse(z):
        return bijection.inverse(params, z, c[: len(z)])

    x = events(shape)
    z, log_det = assert_bijection(forward, inverse, x)
    exact = name in ("reversed", "reordered", "flattened", "squeezed")
    assert exact == (not np.asarray(log_det).any()) or "additive" in name
    assert np.asarray(z).tolist() != np.asarray(x).tolist() or name == "flattened"


# --- order ----------------------------------------------------------------------------------------


def test_orders_are_what_they_say():
    x = events((D,))
    np.testing.assert_array_equal(reversed_order().forward({}, x, None)[0], x[:, ::-1])
    one = reordered(jnp.asarray(ORDERS[1], jnp.int32))
    np.testing.assert_array_equal(one.forward({}, x, None)[0], np.asarray(x)[:, ORDERS[1]])


def test_squeezing_keeps_the_pixels_of_a_block_together():
    x = np.arange(4 * 4 * 2).reshape(1, 4, 4, 2)
    y = np.asarray(to_patches(jnp.asarray(x), 2))
    for i in range(2):
        for j in range(2):
            block = x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(y[0, i, j], block.reshape(-1))


# --- products -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(D,), (3, 2, D)])
def test_a_product_by_l_u_is_the_dense_one(shape):
    one, x = linear(D), events(shape)
    params = parameters(one)
    lower, upper = map(np.asarray, matrix(params))
    dense = lower @ upper
    assert (np.triu(lower, 1) == 0).all()
    assert (np.tril(upper, -1) == 0).all()
    z, log_det = one.forward(params, x, None)
    np.testing.assert_allclose(z, np.einsum("ij,...j->...i", dense, x), atol=1e-12)
    places = np.prod(shape[:-1])
    np.testing.assert_allclose(log_det, places * np.linalg.slogdet(dense)[1], atol=1e-12)
    back, _ = one.inverse(params, x, None)
    solved = np.einsum("ij,...j->...i", np.linalg.inv(dense), x)
    np.testing.assert_allclose(back, solved, atol=1e-10)


# --- actnorm --------------------------------------------------------------------------------------

WEIGHT = jnp.asarray([1.0, 0.0, 2.5, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("junk", [1e30, np.nan, np.inf])
@pytest.mark.parametrize("shape", [(D,), (3, 2, D)])
def test_actnorm_makes_mean_0_and_variance_1_of_what_counts(shape, junk):
    one = actnorm(D)
    x = 5 + 3 * events(shape)
    params, z = jit(one.prepare)(parameters(one), x.at[1].set(junk), None, WEIGHT)
    weight = np.asarray(WEIGHT)
    axes = tuple(range(1, len(shape)))
    mean = np.average(np.asarray(z)[weight > 0].mean(axes), axis=0, weights=weight[weight > 0])
    square = np.square(np.asarray(z)[weight > 0]).mean(axes)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(np.average(square, axis=0, weights=weight[weight > 0]), 1)
    # What it returns is what the new parameters make of x.
    again, _ = one.forward(params, x, None)
    np.testing.assert_allclose(np.asarray(z)[weight > 0], np.asarray(again)[weight > 0])


def test_actnorm_leaves_alone_what_does_not_vary():
    x = events((D,)).at[:, 2].set(7.25)
    params, z = actnorm(D).prepare({}, x, None, jnp.ones(B))
    assert params["log_scale"][2] == 0
    np.testing.assert_array_equal(z[:, 2], 0)


@pytest.mark.slow
def test_a_stack_is_prepared_layer_by_layer():
    stack, x = stacked(layer, 3), events((D,))
    params = parameters(stack)
    after, z = jit(lambda p, x: prepared(stack, p, x, conditions(), WEIGHT))(params, x)
    h = x
    for number in range(3):
        own = jax.tree.map(lambda leaf: leaf[number], params)
        own, h = layer(number).prepare(own, h, conditions(), WEIGHT)
        found = jax.tree.map(lambda leaf: leaf[number], after)
        for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-12)
    np.testing.assert_allclose(z, h, atol=1e-12)


def test_what_has_nothing_to_prepare_has_no_prepare():
    plain = chain(order=reversed_order(), move=coupled("affine"))
    assert plain.prepare is None
    assert stacked(lambda number: plain, 2).prepare is None
    net = convolved("affine", 1, 1)
    assert split(flattened((2, 2, 1)), net, MAPS["affine"], (2, 2, 2)).prepare is None


# --- coupling and autoregression ------------------------------------------------------------------


def jacobian(forward, x):
    return np.asarray(jit(jax.jacfwd(lambda x: forward(x[None])[0].reshape(-1)))(x))


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 3, D])
def test_coupling_keeps_the_first_half_and_two_layers_move_all(d):
    one = coupled("affine", d)
    x, c = events((d,)), conditions()
    params = parameters(one)
    z, _ = one.forward(params, x, c)
    np.testing.assert_array_equal(z[:, : d // 2], x[:, : d // 2])
    assert (np.asarray(z[:, d // 2 :]) != np.asarray(x[:, d // 2 :])).all()
    both = stacked(lambda number: chain(order=reversed_order(), move=one), 2)
    z, _ = both.forward(parameters(both), x, c)
    assert (np.asarray(z) != np.asarray(x)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hidden"),
    [("affine", hidden) for hidden in ((), (3,), (16,), (16, 9), (2, 16))] + [("spline", (16,))],
)
def test_parameters_of_a_number_are_a_function_of_those_before_it(name, hidden):
    one = MAPS[name]
    net = functional(lambda rngs: ConditionerMasked(D, hidden, one.n_params, E, rngs=rngs))
    params, x, c = moved(net.init(jax.random.key(0))[0], 0.3), events((D,))[0], conditions()[:1]

    def outputs(x):
        return net.apply(params, {}, x[None], c)[0][0]

    slopes = np.asarray(jit(jax.jacfwd(outputs))(x))  # [D, n_params, D]
    earlier = np.tri(D, D, -1, dtype=bool)
    assert (slopes.transpose(0, 2, 1)[~earlier] == 0).all()
    if hidden in ((), (16,), (16, 9)):  # wide enough for all that may be seen
        assert (slopes.transpose(0, 2, 1)[earlier] != 0).all()
    whole = jacobian(lambda x: masked(name, hidden=hidden).forward(params, x, c)[0], x)
    assert (np.triu(whole, 1) == 0).all()
    assert (np.diag(whole) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(), (4,), (8, 8)])
def test_every_number_sees_the_condition_the_first_too(hidden):
    net = functional(lambda rngs: ConditionerMasked(D, hidden, 2, E, rngs=rngs))
    params, x = moved(net.init(jax.random.key(0))[0], 0.3), events((D,))
    one, other = (net.apply(params, {}, x, conditions(seed))[0] for seed in (1, 2))
    assert (np.asarray(one) != np.asarray(other)).all()
    # And as more than a constant times it, where there are hidden layers.
    c = conditions()
    straight = [net.apply(params, {}, x, k * c)[0][:, 0] for k in (0.0, 1.0, 2.0)]
    bend = np.abs(np.asarray(straight[2] - 2 * straight[1] + straight[0]))
    assert (bend > 1e-6).all() == (hidden != ())


def test_hidden_units_are_spread_over_all_that_may_be_seen():
    for d, width in ((5, 4), (5, 8), (64, 256), (64, 8), (2, 3)):
        degrees = hidden_degrees(d, width, 0)
        assert len(degrees) == width
        assert min(degrees) == 1
        assert max(degrees) == d - 1 or width < d - 1
        assert max(degrees) > 0.8 * (d - 1)
    assert min(hidden_degrees(5, 8, cond_size=2)) == 0
    assert hidden_degrees(1, 3, 0) == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_an_inverse_autoregressive_flow_is_the_inverse_with_the_same_weights(name):
    maf, c, x = masked(name), conditions(), events((D,))
    iaf = inverted(maf)
    params = parameters(maf)
    there, log_det = jit(maf.forward)(params, x, c)
    back, log_det_back = jit(iaf.inverse)(params, x, c)
    np.testing.assert_array_equal(there, back)
    np.testing.assert_array_equal(log_det, log_det_back)
    z, log_det = jit(iaf.forward)(params, there, c)
    np.testing.assert_allclose(z, x, atol=1e-8)
    np.testing.assert_allclose(log_det, -np.asarray(log_det_back), atol=1e-8)


def test_the_inverse_never_feeds_the_network_what_is_not_known_yet():
    """A number that overflows is one example's last, and must not spoil those before it."""
    one = masked("affine", cond_size=0)
    params = parameters(one)
    z = events((D,)).astype(jnp.float32).at[:, -1].set(3e38)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    x, _ = jit(one.inverse)(params, z, None)
    assert np.isfinite(x[:, :-1]).all()


# --- loops ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loop_over_layers_is_one_after_the_other():
    stack, c, x = stacked(layer, 3), conditions(), events((D,))
    params = parameters(stack)
    own = [jax.tree.map(lambda leaf: leaf[number], params) for number in range(3)]
    names = [f"l{number}" for number in range(3)]
    unrolled = chain(**{name: layer(number) for number, name in enumerate(names)})
    given = dict(zip(names, own, strict=True))
    for way in ("forward", "inverse"):
        got = jit(getattr(stack, way))(params, x, c)
        wanted = jit(getattr(unrolled, way))(given, x, c)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_every_layer_begins_with_parameters_of_its_own():
    params = stacked(layer, 3).init(jax.random.key(0))
    kernels = params["move"]["layers"][0]["kernel"]
    assert kernels.shape[0] == 3
    assert len({kernel.tobytes() for kernel in np.asarray(kernels)}) == 3


@pytest.mark.slow
def test_what_is_compiled_does_not_grow_with_the_layers():
    def size(n):
        stack = stacked(lambda number: layer(number % 3), n)
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            jax.eval_shape(stack.init, jax.random.key(0)),
        )
        c, x = (one.astype(jnp.float32) for one in (conditions(), events((D,))))

        def total(params):
            return sum(one.sum() for one in stack.forward(params, x, c))

        return len(jax.jit(jax.grad(total)).lower(params).as_text().splitlines())

    assert size(24) == size(2)
