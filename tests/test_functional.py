"""The adapter between NNX modules and pure functions, in both of NNX's modes."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from genjax.errors import ConfigError
from genjax.nets import functional as functional_module
from genjax.nets.functional import functional


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def graph_mode(request):
    """What NNX_GRAPH_MODE sets; flax is about to change its default."""
    with nnx.set_graph_mode(request.param):
        yield request.param


class Plain(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
        return self.blocks[1](jnp.tanh(self.blocks[0](x)))

    def first(self, x, *, double=False):
        h = self.blocks[0](x)
        return 2 * h if double else h


class Normalised(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-3, rngs=rngs)

    def __call__(self, x, train):
        return self.norm(self.linear(x), use_running_average=not train)


class Noisy(nnx.Module):
    """Dropout whose key is an argument, as it should be."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 100, rngs=rngs)
        self.drop = nnx.Dropout(0.25)

    def __call__(self, x, key, rate=1.0, label="none"):
        return self.drop(self.linear(x), rngs=nnx.Rngs(key)) * rate


class Hidden(nnx.Module):
    def __init__(self, *, rngs):
        self.drop = nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        return self.drop(x)


class SharedModule(nnx.Module):
    def __init__(self, *, rngs):
        self.one = nnx.Linear(3, 3, rngs=rngs)
        self.two = self.one

    def __call__(self, x):
        return self.two(self.one(x))


class SharedParameter(nnx.Module):
    def __init__(self, *, rngs):
        self.one, self.two = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        self.two.kernel = self.one.kernel

    def __call__(self, x):
        return self.two(self.one(x))


class Sowing(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        h = self.linear(x)
        self.sow(nnx.Intermediate, "h", h)
        return h


class Seen(nnx.Module):
    dtypes: ClassVar[list] = []

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x, count):
        h = self.linear(x)
        Seen.dtypes.append((self.linear.kernel.dtype, x.dtype, h.dtype, count.dtype))
        return {"h": h, "count": count, "logit": (h.sum(),)}


X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def nodes(tree):
    yield tree
    if isinstance(tree, dict):
        for child in tree.values():
            yield from nodes(child)


@pytest.mark.parametrize("build", [Plain, Normalised])
def test_parameters_and_state_are_plain_dicts_of_arrays(graph_mode, build):
    params, state = functional(build).init(jax.random.key(0))
    for node in (*nodes(params), *nodes(state)):
        assert type(node) is dict or isinstance(node, jax.Array), type(node)
    assert {type(leaf).__module__.split(".")[0] for leaf in jax.tree.leaves((params, state))} <= {
        "jaxlib",
        "jax",
    }
    assert "flax" not in str(jax.tree.structure((params, state)))


def test_apply_is_the_formula_of_the_module(graph_mode):
    net = functional(Plain)
    params, state = net.init(jax.random.key(0))
    assert state == {}
    one, two = (jax.tree.map(np.asarray, params["blocks"][i]) for i in (0, 1))
    hidden = X @ one["kernel"] + one["bias"]
    y, after = net.apply(params, state, jnp.asarray(X))
    np.testing.assert_allclose(
        y, np.tanh(hidden) @ two["kernel"] + two["bias"], rtol=1e-5, atol=1e-6
    )
    assert after == {}
    # Another method, with an argument by name.
    y, _ = net.apply(params, state, jnp.asarray(X), method="first", double=True)
    np.testing.assert_allclose(y, 2 * hidden, rtol=1e-5, atol=1e-6)


def test_init_and_apply_are_pure(graph_mode):
    net = functional(Normalised)
    params, state = net.init(jax.random.key(1))
    before = jax.tree.map(np.array, (params, state))
    first = net.apply(params, state, jnp.asarray(X), train=True)
    second = net.apply(params, state, jnp.asarray(X), train=True)
    for a, b in ((before, (params, state)), (first, second)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_init_is_a_function_of_the_key(graph_mode):
    init = functional(Plain).init
    one, same, other = (
        init(jax.random.key(2))[0],
        init(jax.random.key(2))[0],
        init(jax.random.key(3))[0],
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for i in (0, 1):
        assert np.all(
            np.asarray(one["blocks"][i]["kernel"]) != np.asarray(other["blocks"][i]["kernel"])
        )
    # The layers have streams of their own.
    layers = functional(Deep).init(jax.random.key(2))[0]["layers"]
    assert (np.asarray(layers[0]["kernel"]) != np.asarray(layers[1]["kernel"])).all()
    # A jitted init rounds differently in the last bit at most.
    jitted = jax.jit(init)(jax.random.key(2))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, jitted)


@pytest.mark.slow
def test_init_and_apply_can_be_vmapped(graph_mode):
    net = functional(Normalised)
    keys = jax.random.split(jax.random.key(4), 3)
    params, state = jax.jit(jax.vmap(net.init))(keys)

    def call(p, s):
        return net.apply(p, s, jnp.asarray(X), train=True)

    y, after = jax.jit(jax.vmap(call))(params, state)
    assert y.shape == (3, 5, 4)
    for i, key in enumerate(keys):
        solo = net.init(key)
        many = jax.tree.map(lambda leaf: leaf[i], (params, state))
        assert jax.tree.structure(solo) == jax.tree.structure(many)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), solo, many
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            (y, after),
            call(*solo),
        )


def test_gradients_are_taken_of_parameters_only(graph_mode):
    net = functional(Normalised)
    params, state = net.init(jax.random.key(5))
    weight = jnp.asarray(X[:, :1])

    def loss(p):
        return (
            net.apply(p, state, jnp.asarray(X), train=True)[0] * weight[:, :1].repeat(4, 1)
        ).sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    # Batch statistics remove a shift of the input, so the linear layer's bias has no gradient but
    # its kernel has.
    assert np.abs(grads["linear"]["kernel"]).max() > 1e-2
    np.testing.assert_allclose(grads["linear"]["bias"], 0, atol=1e-5)
    # A shift and a scale after the normalisation: the sum of weights, and of weighted normalised
    # inputs.
    np.testing.assert_allclose(grads["norm"]["bias"], X[:, 0].sum(), rtol=1e-4)


def test_batch_statistics_flow_out_and_are_used_in_evaluation(graph_mode):
    net = functional(Normalised)
    params, state = net.init(jax.random.key(6))
    assert set(params["norm"]) == {"scale", "bias"}
    assert set(state["norm"]) == {"mean", "var"}
    h = X @ np.asarray(params["linear"]["kernel"]) + np.asarray(params["linear"]["bias"])
    mean, var = np.zeros(4), np.ones(4)
    call = jax.jit(lambda s, x: net.apply(params, s, x, train=True))
    for step in range(3):
        y, state = call(state, jnp.asarray(X + step))
        shifted = h + step * np.asarray(params["linear"]["kernel"]).sum(0)
        # In training the batch's own statistics.
        np.testing.assert_allclose(
            y, (shifted - shifted.mean(0)) / np.sqrt(shifted.var(0) + 1e-3), rtol=1e-3, atol=1e-4
        )
        mean, var = 0.9 * mean + 0.1 * shifted.mean(0), 0.9 * var + 0.1 * shifted.var(0)
        np.testing.assert_allclose(state["norm"]["mean"], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state["norm"]["var"], var, rtol=1e-4, atol=1e-6)
    # In evaluation the running ones, which do not change.
    y, after = net.apply(params, state, jnp.asarray(X), train=False)
    np.testing.assert_allclose(y, (h - mean) / np.sqrt(var + 1e-3), rtol=1e-3, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_randomness_is_an_argument(graph_mode):
    net = functional(Noisy)
    params, state = net.init(jax.random.key(7))
    assert state == {}
    x = jnp.ones((40, 3))
    full = np.asarray(x @ params["linear"]["kernel"]) / 0.75
    call = jax.jit(lambda key: net.apply(params, state, x, key)[0])
    one, same, other = (np.asarray(call(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
    for y in (one, other):
        kept = y != 0
        np.testing.assert_allclose(y[kept], full[kept], rtol=1e-5)
        assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / kept.size)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (Hidden, r"Hidden stores random state at drop\.rngs.*pass the key as a call argument"),
        (SharedModule, "SharedModule shares one variable .*tie weights by passing the value"),
        (SharedParameter, "SharedParameter shares one variable .*tie weights by passing the value"),
    ],
)
def test_modules_that_are_no_pure_functions_are_refused(graph_mode, build, match):
    with pytest.raises(ConfigError, match=match):
        functional(build)


def test_shared_variables_are_named():
    with (
        nnx.set_graph_mode(True),
        pytest.raises(ConfigError, match=r"between one\.kernel and two\.kernel"),
    ):
        functional(SharedParameter)
    with nnx.set_graph_mode(True), pytest.raises(ConfigError, match="between one and two"):
        functional(SharedModule)


@pytest.mark.filterwarnings("ignore:.*sow.*:DeprecationWarning")  # flax's own advice, besides ours
def test_sow_is_refused_at_the_first_call(graph_mode):
    net = functional(Sowing)
    params, state = net.init(jax.random.key(8))
    for apply in (net.apply, jax.jit(net.apply)):
        with pytest.raises(
            ConfigError,
            match=r"Sowing changed the structure of its state .*sow.*return the value instead",
        ):
            apply(params, state, jnp.asarray(X))


def test_bfloat16_is_for_arithmetic_only(graph_mode):
    narrow, wide = functional(Seen, "bfloat16"), functional(Seen, "float32")
    params, state = narrow.init(jax.random.key(9))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    count = jnp.arange(3)
    Seen.dtypes.clear()
    ours, _ = jax.jit(narrow.apply)(params, state, jnp.asarray(X), count)
    # What the module saw: everything real is narrow, whole numbers are as they were.
    assert Seen.dtypes == [(*[jnp.dtype("bfloat16")] * 3, jnp.dtype("int32"))]
    assert {ours["h"].dtype, ours["logit"][0].dtype} == {jnp.dtype("float32")}
    assert ours["count"].dtype == jnp.int32
    exact, _ = jax.jit(wide.apply)(params, state, jnp.asarray(X), count)
    assert Seen.dtypes[1][:3] == (jnp.dtype("float32"),) * 3
    # 8 bits of mantissa: rounding of the input, the weights, the sum and the output, each 2^-9 of
    # what goes into the sum.
    size = np.abs(X) @ np.abs(np.asarray(params["linear"]["kernel"]))
    error = np.abs(np.asarray(ours["h"]) - np.asarray(exact["h"]))
    assert np.all(error <= 6 * 2.0**-9 * size)
    assert error.max() > 0
    grads = jax.jit(
        jax.grad(lambda p: narrow.apply(p, state, jnp.asarray(X), count)[0]["h"].sum())
    )(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_bfloat16_keeps_batch_statistics_in_float32(graph_mode):
    narrow, wide = functional(Normalised, "bfloat16"), functional(Normalised)
    params, state = narrow.init(jax.random.key(10))
    for train in (True, False):
        y, after = jax.jit(narrow.apply, static_argnames="train")(
            params, state, jnp.asarray(X), train=train
        )
        want, want_after = jax.jit(wide.apply, static_argnames="train")(
            params, state, jnp.asarray(X), train=train
        )
        assert {leaf.dtype for leaf in (y, *jax.tree.leaves(after))} == {jnp.dtype("float32")}
        assert jax.tree.structure(after) == jax.tree.structure(state)
        # The input of the layer has a relative error of 2^-8 or so.
        np.testing.assert_allclose(y, want, atol=0.1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), after, want_after)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_arguments_that_are_no_arrays_pass_through(dtype):
    net = functional(Noisy, dtype)
    params, state = net.init(jax.random.key(11))
    y, _ = net.apply(params, state, jnp.asarray(X), jax.random.key(0), rate=0.0, label="text")
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 0.0)


def test_the_build_may_be_a_closure_and_its_own_errors_stay_its_own(graph_mode):
    net = functional(lambda *, rngs: nnx.Linear(3, 2, rngs=rngs))
    assert net.apply(*net.init(jax.random.key(12)), jnp.asarray(X))[0].shape == (5, 2)

    def broken(*, rngs):
        raise ValueError("my own message")

    with pytest.raises(ValueError, match="my own message"):
        functional(broken)


# --- parameters are matched by name ---------------------------------------------------------------


class Deep(nnx.Module):
    """Twelve layers, so that as text "10" sorts before "2", of one shape, so that none stands out;
    and a state for each.
    """

    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(12)])
        self.counts = nnx.List([nnx.BatchStat(jnp.zeros(())) for _ in range(12)])

    def __call__(self, x):
        for index, (layer, count) in enumerate(zip(self.layers, self.counts, strict=True)):
            x = jnp.tanh(layer(x))
            count[...] += index
        return x


DEEP = functional(Deep)


def as_text(tree):
    """The tree with text for keys, as a file might give it back."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): as_text(child) for key, child in tree.items()}


@pytest.mark.slow
def test_keys_of_another_kind_are_the_same_names():
    params, state = DEEP.init(jax.random.key(0))
    wanted, after = DEEP.apply(params, state, jnp.asarray(X))
    text = as_text(params), as_text(state)
    first, second = (list(jax.tree.leaves(tree)) for tree in (params, text[0]))
    assert any(one is not other for one, other in zip(first, second, strict=True))  # by position
    found, text_after = jax.jit(DEEP.apply)(*text, jnp.asarray(X))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # The state comes back under the keys that were given, with the values of its own places.
    assert jax.tree.structure(text_after) == jax.tree.structure(text[1])
    assert [float(text_after["counts"][str(i)]) for i in range(12)] == list(range(12))
    assert [float(after["counts"][i]) for i in range(12)] == list(range(12))

    def loss(params, state):  # gradients do, too
        return DEEP.apply(params, state, jnp.asarray(X))[0].sum()

    one, other = jax.grad(loss)(params, state), jax.grad(loss)(text[0], text[1])
    assert jax.tree.structure(other) == jax.tree.structure(text[0])
    for i in range(12):
        for leaf, value in one["layers"][i].items():
            np.testing.assert_allclose(other["layers"][str(i)][leaf], value, rtol=1e-5, atol=1e-7)


def renamed(params, state):
    """As if a normalisation called its scale weight and its shift bias."""
    norm = params.pop("norm")
    return {**params, "norm": {"weight": norm["scale"], "offset": norm["bias"]}}, state


def missing(params, state):
    del params["linear"]["bias"]
    return params, state


def surplus(params, state):
    params["linear"]["extra"] = jnp.zeros(3)
    return params, state


def reshaped(params, state):
    params["linear"]["kernel"] = params["linear"]["kernel"].T
    return params, state


def stateless(params, state):
    return params, {}


def wide_state(params, state):
    state["norm"]["mean"] = jnp.zeros(7)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            renamed,
            "The tree of parameters of Normalised does not fit this model:\n"
            "  norm/bias: missing\n  norm/scale: missing\n"
            "  norm/offset: not of this model\n  norm/weight: not of this model",
        ),
        (missing, "linear/bias: missing"),
        (surplus, "linear/extra: not of this model"),
        (reshaped, r"linear/kernel: expected shape \[3, 4\]; found \[4, 3\]"),
        (stateless, "The state of Normalised does not fit .*\n  norm/mean: missing\n  norm/var: m"),
        (wide_state, r"norm/mean: expected shape \[4\]; found \[7\]"),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_trees_that_are_not_those_of_init_are_refused(change, match, dtype):
    net = functional(Normalised, dtype)
    given = change(*net.init(jax.random.key(0)))
    for apply in (net.apply, jax.jit(net.apply, static_argnames="train")):
        with pytest.raises(ConfigError, match=match):
            apply(*given, jnp.asarray(X), train=True)


def test_matching_costs_nothing_once_traced(monkeypatch):
    """The program is the same whatever the keys, and a second call of the same shapes looks at no
    names.
    """
    params, state = DEEP.init(jax.random.key(0))
    x = jnp.asarray(X)
    same = [
        jax.jit(DEEP.apply).lower(*trees, x).compile().cost_analysis()
        for trees in ((params, state), (as_text(params), as_text(state)))
    ]
    assert same[0]["flops"] == same[1]["flops"]
    calls, original = [], functional_module.by_name

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(functional_module, "by_name", counted)
    net = functional(Deep)
    for _ in range(3):
        net.apply(as_text(params), as_text(state), x)
    assert len(calls) == 3  # parameters, state, and the state after: in one trace
    net.apply(params, state, x)
    assert len(calls) == 3  # none where the structures are equal
