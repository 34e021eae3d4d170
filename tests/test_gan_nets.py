"""The networks of adversarial models against their formulas: normalisations, convolutional nets,
and what reads a condition.
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from flax import nnx
from gates import assert_same, quick

from genjax.errors import ConfigError
from genjax.families.gan import OBJECTIVES, gan
from genjax.learning.step import training
from genjax.nets.functional import functional
from genjax.nets.gan import DCGANFeatures, DCGANGenerator, ResidualFeatures, ResidualGenerator
from genjax.nets.norm import BatchNorm, Plain, Spectral
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(0)
PLANE = DataSpec((2,), "continuous", name="plane")
leaves = jax.tree_util.tree_leaves_with_path
leaky = lambda x: np.where(x > 0, x, 0.2 * x)  # noqa: E731


def random(net, seed=0, size=0.5):
    """Parameters and state (positive, as variances are) of a net or model, all random; float64
    where that is switched on.
    """
    rng = np.random.default_rng(seed)
    params, state = jax.eval_shape(net.init, KEY)
    params = jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape)), params)
    return params, jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.normal(size=leaf.shape)) + 0.5), state
    )


def normal(*shape, seed=1, scale=1.0, loc=0.0):
    return np.random.default_rng(seed).normal(loc, scale, shape)


# --- batch normalisation --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 3), (5, 4, 2, 3)])
def test_batch_normalisation_is_its_formula(x64, shape):
    net = functional(partial(BatchNorm, 3))
    params, state = random(net)
    scale, shift = (np.asarray(params[name]) for name in ("scale", "shift"))
    x = normal(*shape, scale=[30.0, 10.0, 5.0], loc=[20.0, -10.0, 100.0])
    axes = tuple(range(x.ndim - 1))
    apply = quick(net.apply, static_argnames="train")
    y, after = apply(params, state, jnp.asarray(x), None, train=True)
    standard = (np.asarray(y) - shift) / scale
    np.testing.assert_allclose(
        standard.mean(axes), 0, atol=1e-12
    )  # and its variance is 1, by the next line
    np.testing.assert_allclose(standard * np.sqrt(x.var(axes) + 1e-5) + x.mean(axes), x, rtol=1e-9)
    np.testing.assert_allclose(
        after["mean"], 0.99 * state["mean"] + 0.01 * x.mean(axes), rtol=1e-12
    )
    np.testing.assert_allclose(after["var"], 0.99 * state["var"] + 0.01 * x.var(axes), rtol=1e-12)
    y, kept = apply(params, after, jnp.asarray(x), None, train=False)
    wanted = (
        scale * (x - np.asarray(after["mean"])) / np.sqrt(np.asarray(after["var"]) + 1e-5) + shift
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-12)
    assert_same(kept, after)
    # The mean and variance are functions of x: a change that only shifts or stretches a channel has
    # no effect (but for ε).
    power = lambda x: jnp.sum(
        jnp.asarray(normal(*shape, seed=2)) * net.apply(params, state, x, None, train=True)[0]
    )  # noqa: E731
    slope = np.asarray(quick(jax.grad(power))(jnp.asarray(x)))
    np.testing.assert_allclose(slope.sum(axes), 0, atol=1e-12)
    np.testing.assert_allclose((slope * standard).sum(axes), 0, atol=1e-5)
    assert np.all(np.abs(slope).max(axes) > 1e-3)


def test_conditional_batch_normalisation_is_linear_in_the_condition(x64):
    net, plain = functional(partial(BatchNorm, 3, 4)), functional(partial(BatchNorm, 3))
    params, state = random(net)
    x, c = jnp.asarray(normal(6, 2, 2, 3)), normal(6, 4, seed=2)
    identity = {"scale": jnp.ones(3), "shift": jnp.zeros(3)}
    standard, wanted_state = plain.apply(identity, state, x, None, train=True)
    y, after = net.apply(params, state, x, jnp.asarray(c), train=True)
    scale, shift = (c @ np.asarray(params[name]["kernel"]) for name in ("scale", "shift"))
    np.testing.assert_allclose(
        y, np.asarray(standard) * (1 + scale[:, None, None]) + shift[:, None, None], rtol=1e-10
    )
    assert_same(after, wanted_state)
    # Labels of which each has the same row: the unconditional layer, whatever the label.
    row = {name: params[name]["kernel"][:1] for name in ("scale", "shift")}
    equal = {name: {"kernel": jnp.tile(value, (4, 1))} for name, value in row.items()}
    labels = jax.nn.one_hot(np.array([0, 3, 1, 1, 2, 0]), 4)
    own = {"scale": 1 + row["scale"][0], "shift": row["shift"][0]}
    for train in (True, False):
        found, wanted = (
            net.apply(equal, state, x, labels, train=train),
            plain.apply(own, state, x, None, train=train),
        )
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-12)
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves(net.init(KEY)[0])
    )  # all rows are 0 at first


def test_a_generator_that_takes_its_condition_in_its_normalisations():
    spec = DataSpec((2,), "continuous", n_classes=3)
    model = gan(
        spec, latent_dim=4, hidden=(20,), generator_norm="batch", generator_cond="batch_norm"
    )
    params, state = random(model)
    assert params["generator"]["layers"][0]["kernel"].shape == (4, 20)  # and not beside z
    z, labels, generate = jnp.asarray(normal(3, 4)), np.arange(3), quick(model.extras["generate"])
    assert (
        len(np.unique(np.asarray(generate(params, state, jnp.tile(z[:1], (3, 1)), labels)), axis=0))
        == 3
    )
    norm = params["generator"]["norms"][0]
    params["generator"]["norms"][0] = jax.tree.map(lambda leaf: jnp.tile(leaf[:1], (3, 1)), norm)
    np.testing.assert_array_equal(
        generate(params, state, z, labels), generate(params, state, z, labels[::-1])
    )


# --- spectral normalisation -----------------------------------------------------------------------

LAYERS = {
    "dense": (lambda *, rngs: nnx.Linear(5, 4, rngs=rngs), (7, 5)),
    "wide": (lambda *, rngs: nnx.Linear(3, 6, rngs=rngs), (7, 3)),
    "conv": (lambda *, rngs: nnx.Conv(2, 4, (3, 3), rngs=rngs), (2, 5, 5, 2)),
}


@cache
def spectral(name):
    """A layer after 300 power iterations, with random weights: its net and the plain one,
    parameters, states and inputs.
    """
    make, shape = LAYERS[name]
    net, plain = (
        functional(lambda *, rngs, wrap=wrap: wrap(make(rngs=rngs), rngs=rngs))
        for wrap in (Spectral, Plain)
    )
    (params, first), x = random(net, size=2.0), jnp.asarray(normal(*shape))
    more = lambda state, _: (net.apply(params, state, x, train=True)[1], None)  # noqa: E731
    return (
        net,
        plain,
        params,
        first,
        quick(lambda state: jax.lax.scan(more, state, length=300)[0])(first),
        x,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_spectral_normalisation_divides_by_the_largest_singular_value(x64, name):
    net, plain, params, first, state, x = spectral(name)
    layer = params["layer"]
    w = np.asarray(layer["kernel"]).reshape(-1, layer["kernel"].shape[-1])
    exact = np.linalg.svd(w, compute_uv=False)[0]
    wanted = plain.apply(
        {"layer": {**layer, "kernel": layer["kernel"] / exact}}, {}, x, train=False
    )[0]
    for train in (True, False):
        np.testing.assert_allclose(
            net.apply(params, state, x, train=train)[0], wanted, rtol=1e-4, atol=1e-10
        )
    # From the start by the formula, which takes one power iteration in training only, and leaves
    # the bias alone.
    offset = plain.apply({"layer": {**layer, "kernel": 0 * layer["kernel"]}}, {}, x, train=False)[0]
    full = plain.apply(params, {}, x, train=False)[0]
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    v, u = unit(w @ first["u"]), unit(first["u"])
    for train in (False, True):
        u = unit(w.T @ v) if train else u
        y, after = net.apply(params, first, x, train=train)
        np.testing.assert_allclose((y - offset) * (v @ w @ u), full - offset, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(after["u"], u if train else first["u"], rtol=1e-9)
        assert v @ w @ u < exact


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_the_gradient_goes_through_the_singular_value(x64, name):
    net, plain, params, _, state, x = spectral(name)
    weights = jnp.asarray(normal(*net.apply(params, state, x, train=False)[0].shape, seed=3))
    value = lambda p, train: jnp.sum(weights * net.apply(p, state, x, train=train)[0])  # noqa: E731

    def exact(p):
        kernel = p["layer"]["kernel"]
        size = jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
        return jnp.sum(
            weights
            * plain.apply({"layer": {**p["layer"], "kernel": kernel / size}}, {}, x, train=False)[0]
        )

    wanted = quick(jax.grad(exact))(params)
    for train in (True, False):
        found = quick(jax.grad(partial(value, train=train)))(params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), found, wanted)


# --- nets, and what they make of data -------------------------------------------------------------


def conv(x, layer, stride=1, before=1, after=1):
    """A convolution of images with zeros around them, written out."""
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer.get("bias", 0.0))
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    sides = [(size - kernel.shape[0]) // stride + 1 for size in x.shape[1:3]]
    look = lambda a, b: x[:, a : a + stride * sides[0] : stride, b : b + stride * sides[1] : stride]  # noqa: E731
    return sum(look(a, b) @ kernel[a, b] for a, b in np.ndindex(*kernel.shape[:2])) + bias


def transposed(x, layer):
    """A 4x4 transposed convolution with stride 2: zeros between the pixels, and a convolution."""
    wide = np.zeros((x.shape[0], 2 * x.shape[1] - 1, 2 * x.shape[2] - 1, x.shape[3]))
    wide[:, ::2, ::2] = x
    return conv(wide, layer, 1, 2, 2)


def check(net, *args, wanted):
    np.testing.assert_allclose(
        quick(partial(net.apply, train=True))(*args)[0], wanted, rtol=1e-8, atol=1e-8
    )


def unwrapped(node):
    """Parameters without the level of `Plain` or `Spectral`."""
    if not isinstance(node, dict):
        return node
    return (
        node["layer"]
        if "layer" in node
        else {name: unwrapped(below) for name, below in node.items()}
    )


def standardised(x, norm):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * np.asarray(
        norm["scale"]
    ) + np.asarray(norm["shift"])


def test_dcgan_nets_are_their_formulas(x64):
    shape, x, z, c = (8, 4, 2), normal(3, 8, 4, 2), normal(3, 5), normal(3, 1, seed=4)
    net = functional(partial(DCGANFeatures, shape, (3, 4), concat=1, norm=True))
    params, state = random(net)
    plain = unwrapped(params)
    h = np.concatenate([x, np.broadcast_to(c[:, None, None], (3, 8, 4, 1))], axis=-1)
    h = leaky(conv(h, plain["convs"][0], 2))
    h = leaky(standardised(conv(h, plain["convs"][1], 2), plain["norms"][0]))
    check(net, params, state, x, c, wanted=h.reshape(3, -1))

    net = functional(partial(DCGANGenerator, 5, shape, (4, 3), concat=1, norm=True))
    params, state = random(net)
    first = params["first"]
    h = (
        np.concatenate([z, c], axis=1) @ np.asarray(first["kernel"]) + np.asarray(first["bias"])
    ).reshape(3, 2, 1, 4)
    for index in range(2):
        h = transposed(
            np.maximum(standardised(h, params["norms"][index]), 0), params["convs"][index]
        )
    check(net, params, state, z, c, wanted=h)


def test_residual_nets_are_their_formulas(x64):
    def block(x, layer):
        h = conv(leaky(conv(leaky(x), layer["one"])), layer["two"])
        return (h + (conv(x, layer["short"], 1, 0, 0) if "short" in layer else x)) / math.sqrt(2)

    shape, x, z = (4, 8, 2), normal(3, 4, 8, 2), normal(3, 5)
    net = functional(partial(ResidualFeatures, shape, (3, 4)))
    params, state = random(net)
    plain = unwrapped(params)
    h = conv(x, plain["first"])
    for index in range(2):
        h = block(h, plain["blocks"][index])
        h = sum(h[:, a::2, b::2] for a, b in np.ndindex(2, 2)) / 4
    check(net, params, state, x, None, wanted=leaky(h).reshape(3, -1))

    net = functional(partial(ResidualGenerator, 5, shape, (4, 3)))
    params, state = random(net)
    plain = unwrapped(params)
    h = (z @ np.asarray(plain["first"]["kernel"]) + np.asarray(plain["first"]["bias"])).reshape(
        3, 1, 2, 4
    )
    for index in range(2):
        h = block(h, plain["blocks"][index]).repeat(2, axis=1).repeat(2, axis=2)
    check(net, params, state, z, None, wanted=conv(leaky(h), plain["last"]))


@pytest.mark.slow
@pytest.mark.parametrize("net", ["dcgan", "resnet"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (8, 16, 3)])
def test_images_of_every_size_go_in_and_come_out(net, shape):
    spec = DataSpec(shape, "discrete", levels=256, n_classes=10)
    cond, x = jnp.zeros(4, jnp.int32), jnp.zeros((4, *shape))
    settings = {
        "generator_norm": "batch",
        "generator_cond": "batch_norm",
        "discriminator_cond": "projection",
    }
    model = gan(
        spec,
        net=net,
        latent_dim=5,
        channels=(4, 6),
        gradient_penalty=1.0,
        spectral_norm=True,
        **settings,
    )
    params, state = jax.eval_shape(model.init, KEY)
    for loss in model.losses.values():
        value, aux = jax.eval_shape(loss, params, state, Batch(x, cond), KEY)
        assert value.shape == (4,)
        assert aux.state == state
    assert jax.eval_shape(lambda p, s: model.sample(p, s, KEY, 4, cond), params, state).shape == (
        4,
        *shape,
    )
    assert jax.eval_shape(
        lambda p, s: model.extras["logit"](p, s, x, cond), params, state
    ).shape == (4,)
    assert params["discriminator"]["logit"]["layer"]["kernel"].shape == (
        shape[0] * shape[1] // 16 * 6,
        1,
    )
    n_kernels = sum(
        "kernel" in jax.tree_util.keystr(path) for path, _ in leaves(params["discriminator"])
    )
    assert len(leaves(state["discriminator"])) == n_kernels  # each has its singular vector


@pytest.mark.parametrize(("kind", "levels"), [("discrete", 5), ("binary", None)])
def test_samples_of_discrete_data_are_their_whole_numbers(kind, levels):
    model = gan(DataSpec((4, 4, 1), kind, levels=levels), latent_dim=3, net="dcgan", channels=(4,))
    params, state = random(model, size=1.0)
    run = lambda p, z: (model.sample(p, state, KEY, 400), model.extras["generate"](p, state, z))  # noqa: E731
    x, smooth = quick(run)(params, jax.random.normal(KEY, (400, 3)))
    assert set(np.unique(x)) == set(range(levels or 2))
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(np.round(smooth), x)
    assert np.any(smooth != x)


def test_penalties_of_binary_data_are_on_the_scale_from_minus_one_to_one(x64):
    model = gan(DataSpec((2, 2), "binary"), hidden=(), r1=1.0, objective="wasserstein")
    params, state = random(model)
    slope = np.asarray(params["discriminator"]["logit"]["layer"]["kernel"]).reshape(2, 2)
    x = np.random.default_rng(7).integers(0, 2, size=(6, 2, 2)).astype(float)
    value, aux = model.losses["discriminator"](params, state, Batch(jnp.asarray(x)), KEY, 0)
    np.testing.assert_allclose(
        aux.metrics["real_logit"], ((2 * x - 1) * slope).sum((1, 2)), rtol=1e-10
    )
    penalty = value - aux.metrics["fake_logit"] + aux.metrics["real_logit"]
    np.testing.assert_allclose(penalty, 0.5 * (slope**2).sum(), rtol=1e-10)


@pytest.mark.slow
def test_bfloat16_arithmetic_keeps_float32_parameters_statistics_and_losses():
    make = partial(
        gan,
        DataSpec((4, 4, 1), "binary"),
        net="dcgan",
        generator_norm="batch",
        spectral_norm=True,
        r1=1.0,
    )
    narrow, wide = make(dtype="bfloat16", channels=(4,)), make(channels=(4,))
    params, state = random(narrow)
    batch = Batch(jnp.asarray(np.random.default_rng(8).integers(0, 2, (6, 4, 4, 1)), jnp.float32))
    run = lambda model: quick(
        lambda p: [loss(p, state, batch, KEY) for loss in model.losses.values()]
    )(params)  # noqa: E731
    found, wanted = run(narrow), run(wide)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, jax.eval_shape(narrow.init, KEY)))} == {
        jnp.dtype("float32")
    }
    for (one, _), (other, _) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.1, atol=0.05)
        assert np.any(np.asarray(one) != np.asarray(other))


# --- what reads a condition -----------------------------------------------------------------------

CLASSES = DataSpec((2,), "continuous", n_classes=3)
MEANS = 1.2 * np.array(
    [[1.0, 0.0], [-0.6, 0.8], [0.0, -1.0]]
)  # of one length, so that one bias serves them all


@pytest.mark.slow
def test_a_projection_discriminator_is_and_learns_the_ratio_of_normals_by_class(x64):
    # p(x | c) = N(m_c, I) and q = N(0, I): ln p/q = m_c·x - |m_c|²/2, set by hand and then found.
    model = gan(CLASSES, latent_dim=1, hidden=(), discriminator_cond="projection")
    params, state = random(model)
    ratio = lambda x, c: (
        scipy.stats.norm.logpdf(x, MEANS[c]).sum(1) - scipy.stats.norm.logpdf(x).sum(1)
    )  # noqa: E731
    layer = {"kernel": jnp.full((2, 1), 0.3), "bias": jnp.full((1,), -(1.2**2) / 2)}
    known = {
        **params["discriminator"],
        "logit": {"layer": layer},
        "embed": {"layer": {"kernel": jnp.asarray(MEANS - 0.3)}},
    }
    x, labels = normal(30, 2, scale=2.0), np.arange(30) % 3
    found = model.extras["logit"]({**params, "discriminator": known}, state, jnp.asarray(x), labels)
    np.testing.assert_allclose(found, ratio(x, labels), rtol=1e-10, atol=1e-12)
    # Logistic regression by quadrature: its minimum is the ratio, since the ratio is of the
    # projection's form.
    grid = np.stack(np.meshgrid(np.linspace(-6, 6, 31), np.linspace(-6, 6, 31)), axis=-1).reshape(
        -1, 2
    )
    mass = lambda mean: jnp.asarray(scipy.stats.norm.pdf(grid, mean).prod(1) * 0.4**2)  # noqa: E731
    start, unravel = jax.flatten_util.ravel_pytree(params["discriminator"])

    def logits(theta):
        own = {**params, "discriminator": unravel(theta)}
        return [
            model.extras["logit"](own, state, jnp.asarray(grid), jnp.full(len(grid), c))
            for c in range(3)
        ]

    def value(theta):
        loss = OBJECTIVES["nonsaturating"].discriminator
        parts = [
            mass(MEANS[c]) * loss(d, -jnp.inf) + mass(0.0) * loss(jnp.inf, d)
            for c, d in enumerate(logits(theta))
        ]
        return sum(jnp.sum(part) for part in parts)

    fit = scipy.optimize.minimize(
        quick(jax.value_and_grad(value)), start, jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    for c, found in enumerate(logits(jnp.asarray(fit.x))):
        np.testing.assert_allclose(found, ratio(grid, c), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["label", "vector"])
def test_the_auxiliary_loss_is_what_it_says(x64, kind):
    # G(z, c) = c V + b without z, D = w·x + b, and a prediction x A + a: all by hand.
    spec = CLASSES if kind == "label" else DataSpec((2,), "continuous", cond_dim=3)
    model = gan(spec, latent_dim=1, hidden=(), discriminator_cond="auxiliary", auxiliary_weight=0.7)
    params, state = random(model)
    kernel, head = params["generator"]["last"]["kernel"], params["discriminator"]["auxiliary"]
    params["generator"]["last"]["kernel"] = kernel.at[0].set(0)
    cond = np.array([0, 2, 1, 1, 0]) if kind == "label" else normal(5, 3, seed=5)
    c = np.eye(3)[cond] if kind == "label" else cond
    x = normal(5, 2)
    fake = c @ np.asarray(kernel)[1:] + np.asarray(params["generator"]["last"]["bias"])
    np.testing.assert_allclose(
        model.extras["generate"](params, state, jnp.ones((5, 1)), cond), fake, rtol=1e-10
    )

    def auxiliary(x):
        guess = x @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        return (
            0.5 * ((guess - c) ** 2).sum(1)
            if kind == "vector"
            else -(scipy.special.log_softmax(guess, 1) * c).sum(1)
        )

    logit = lambda x: model.extras["logit"](params, state, jnp.asarray(x), cond)  # noqa: E731
    batch, objective = Batch(jnp.asarray(x), jnp.asarray(cond)), OBJECTIVES["nonsaturating"]
    found = {player: loss(params, state, batch, KEY)[0] for player, loss in model.losses.items()}
    wanted = (
        objective.discriminator(logit(x), logit(fake)) + 0.7 * (auxiliary(x) + auxiliary(fake)) / 2
    )
    np.testing.assert_allclose(found["discriminator"], wanted, rtol=1e-10)
    wanted = objective.generator(logit(x), logit(fake)) + 0.7 * auxiliary(fake)
    np.testing.assert_allclose(found["generator"], wanted, rtol=1e-10)


# --- bad input ------------------------------------------------------------------------------------

DIGITS, LABELS = (
    DataSpec((8, 8, 1), "binary", name="digits"),
    DataSpec((8, 8, 1), "binary", n_classes=3),
)


@pytest.mark.parametrize(
    ("spec", "settings", "match"),
    [
        (PLANE, {"objective": "hing"}, "no objective called 'hing'. Did you mean hinge"),
        (PLANE, {"net": "dcgn"}, "no net called 'dcgn'. Did you mean dcgan"),
        (
            LABELS,
            {"generator_cond": "batchnorm"},
            "no generator_cond called 'batchnorm'. Did you mean batch_norm",
        ),
        (
            LABELS,
            {"discriminator_cond": "project"},
            "no discriminator_cond called 'project'. Did you mean projection",
        ),
        (PLANE, {"dtype": "bfloat"}, "no dtype called 'bfloat'. Did you mean bfloat16"),
        (PLANE, {"r1": -1.0}, "r1 is the weight of a penalty and must not be negative; got -1.0"),
        (
            PLANE,
            {"gradient_penalty": -10},
            "gradient_penalty is the weight of a penalty and must not be negative; got -10",
        ),
        (
            DIGITS,
            {"net": "dcgan", "discriminator_norm": "batch", "r1": 1.0, "gradient_penalty": 1.0},
            "r1 and gradient_pen",
        ),
        (
            PLANE,
            {"discriminator_norm": "batch"},
            "for convolutional nets; use net='dcgan' or 'resnet'",
        ),
        (LABELS, {"generator_cond": "batch_norm"}, "say generator_norm='batch' as well"),
        (
            LABELS,
            {"generator_cond": "batch_norm", "generator_norm": "batch", "hidden": ()},
            "a hidden layer",
        ),
        (PLANE, {"discriminator_cond": "projection"}, "plane has none. Take conditional data"),
        (
            PLANE,
            {"generator_cond": "batch_norm", "generator_norm": "batch"},
            "generator_cond='batch_norm' and",
        ),
        (PLANE, {"latent_dim": 0}, "latent_dim must be at least 1; got 0"),
        (PLANE, {"discriminator_steps": 0}, "discriminator_steps must be at least 1; got 0"),
        (DataSpec((5,), "tokens", levels=9), {}, "got tokens. Use a sequence family"),
        (
            DataSpec((30, 30, 1), "binary"),
            {"net": "dcgan"},
            "sides that are multiples of 4; got 30 x 30",
        ),
        (
            PLANE,
            {"net": "dcgan"},
            r"events of shape \(height, width, channels\); got \(2,\). Use net='mlp'",
        ),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(spec, settings, match):
    with pytest.raises(ConfigError, match=match):
        gan(spec, **settings)


def test_players_and_conditions_that_do_not_fit():
    model = gan(PLANE, latent_dim=1, hidden=())
    params, state = random(model)
    with pytest.raises(
        ConfigError, match=r"each player \(discriminator, generator\); got them for: generater"
    ):
        training(model, {"generater": optax.adam(1e-3)})
    labels, z, x = np.zeros(3, np.int32), jnp.zeros((3, 1)), jnp.zeros((3, 2))
    for function, *inputs in (
        (model.sample, KEY, 3),
        (model.extras["generate"], z),
        (model.extras["logit"], x),
    ):
        with pytest.raises(ValueError, match="unconditional: leave `cond` out"):
            function(params, state, *inputs, labels)
