"""State space models: one recurrence in three forms, the formulas of the papers, causality, the
decode cache, and probabilities that sum to one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gates import assert_close, assert_same, quick
from known_losses import sequence_known
from rows import grown, widen

from genjax.data import example_batch
from genjax.families.ssm import ssm
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.labels import labels_of
from genjax.learning.optim import Optimizer
from genjax.learning.step import training
from genjax.nets import scans
from genjax.nets.ssm import LRU, S4D, SLOWEST, SSD, Delta, MinGRU
from genjax.protocol import Batch, DataSpec

analytic_loss = sequence_known  # all parameters 0: every step has the same distribution

KEY = jax.random.key(3)
CELLS = ("s4d", "lru", "mingru", "mamba2", "deltanet")
WORDS = DataSpec((5,), "tokens", levels=3, step="symbol", name="words")
LABELLED = DataSpec((5,), "tokens", levels=3, step="symbol", n_classes=2, name="labelled words")
ENDED = DataSpec((5,), "tokens", levels=3, step="symbol", end=2, name="ended words")
ROLLS = DataSpec((5, 3), "binary", step="frame", lengths=True, name="rolls")
CURVES = DataSpec((5, 2), "continuous", step="point", cond_dim=2, name="curves")
DT = (0.02, 0.9)
CORES = {
    "s4d": (functools.partial(S4D, 3, 4, DT), 3),
    "lru": (functools.partial(LRU, 4, DT), 8),
    "mingru": (functools.partial(MinGRU, 4, 3, DT), 8),
    "mamba2": (functools.partial(SSD, 6, 3, 2, 3, DT), 6 + 2 * 3 + 2),
    "deltanet": (functools.partial(Delta, 6, 3, 2, 3, DT), 6 + 2 * 6 + 2 * 2),
}


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@functools.cache
def setup(cell, spec=WORDS, wide=True, **settings):
    """A tiny model, parameters far from their init, in float64 if `wide`, and its state."""
    sizes = {"n_heads": 2, "d_state": 4} if cell in ("mamba2", "deltanet") else {}
    settings = {"d_model": 6, "n_layers": 2, "dt_min": DT[0], "dt_max": DT[1], **sizes, **settings}
    model = ssm(spec, cell=cell, **settings)
    params, state = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(grown(params))
    far = [leaf + 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
    params = jax.tree.unflatten(tree, far)
    return model, widen(params) if wide else params, state


def core_of(cell, form, chunk):
    """A core in float64 as a function of (u, carry), and its parameters by name."""
    build, n = CORES[cell]
    core = build(form, chunk, rngs=nnx.Rngs(1))
    graph, params = nnx.split(core)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    return nnx.merge(graph, params), n


def run(core, u, carry=None):
    """What a core makes of u, as one program."""
    graph, params = nnx.split(core)
    return quick(lambda params, u, carry: nnx.merge(graph, params)(u, carry))(params, u, carry)


# --- three forms of one recurrence ----------------------------------------------------------------


SHORT, LONG = 4, 64  # chunks of 7 steps: one that does not divide them, one that is longer


@pytest.mark.slow
@pytest.mark.parametrize(
    "going_on", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fresh", "carried"]
)
@pytest.mark.parametrize("cell", CELLS)
def test_all_forms_give_the_same_numbers_for_any_chunk(cell, going_on, x64):
    found = {}
    for form, chunk in [
        ("recurrent", LONG),
        ("scan", LONG),
        ("chunked", SHORT),
        ("chunked", 7),
        ("chunked", LONG),
    ]:
        core, n = core_of(cell, form, chunk)
        u, carry = array(0, 2, 7, n), None
        if going_on:
            empty = core.start(2, jnp.float64)
            carry = tuple(array(7 + i, *leaf.shape) for i, leaf in enumerate(empty))
        y, last = run(core, u, carry)
        found[form, chunk] = {"y": y, "last": last}
    wanted = found.pop(("recurrent", LONG))
    assert np.ptp(wanted["y"]) > 0.1
    for other in found.values():
        assert_close(other, wanted, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_all_forms_of_a_model_have_the_same_loss_and_gradient(cell, x64):
    spec = DataSpec((7,), "tokens", levels=3, step="symbol")
    batch = widen(example_batch(spec, KEY, 3))
    found = []
    for form in ("recurrent", "scan", "chunked"):
        model, params, state = setup(cell, spec, form=form, chunk=3, n_layers=1)
        loss = model.losses["ssm"]
        found.append(
            quick(jax.value_and_grad(lambda p, loss=loss: loss(p, state, batch, KEY, 0)[0].sum()))(
                params
            )
        )
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-9)


@pytest.mark.slow
def test_recomputed_layers_have_the_same_loss_and_gradient(x64):
    batch, found = widen(example_batch(WORDS, KEY, 3)), []
    for remat in ("none", "full"):
        model, params, state = setup("mingru", remat=remat, dropout=0.2)

        def loss(p, loss=model.losses["ssm"]):
            return loss(p, state, batch, KEY, 0)[0].sum()

        found.append(quick(jax.value_and_grad(loss))(params))
    assert_close(found[1], found[0], rtol=1e-12)


@pytest.mark.slow
def test_sums_of_long_segments_keep_their_digits():
    """After a step of -1e6 a difference of cumulative sums in float32 knows nothing of 1e-3."""
    log_a = jnp.full((64,), -1e-3).at[1].set(-1e6)
    apart = np.arange(64)[:, None] - np.arange(64)[None]
    wanted = np.where(apart >= 0, np.exp(-1e-3 * np.maximum(apart, 0)), 0)
    wanted[1:, :1] = 0
    np.testing.assert_allclose(scans.decays(log_a), wanted, rtol=1e-5)


# --- the formulas of the papers -------------------------------------------------------------------


def test_one_head_with_a_constant_decay_is_linear_attention_with_decay(x64):
    x, b, c = array(0, 2, 9, 1, 4), array(1, 2, 9, 3), array(2, 2, 9, 3)
    decay = 0.8
    log_a = jnp.full((2, 9, 1), np.log(decay))
    apart = np.arange(9)[:, None] - np.arange(9)[None]
    mask = np.where(apart >= 0, decay ** np.maximum(apart, 0), 0)
    wanted = np.einsum("ij,bin,bjn,bjp->bip", mask, c, b, x[:, :, 0])
    for form in ("recurrent", "scan", "chunked"):
        y, _ = quick(scans.scalar_decay, static_argnums=(5, 6))(x, log_a, b, c, None, form, 4)
        np.testing.assert_allclose(y[:, :, 0], wanted, rtol=0, atol=1e-12)


def delta_by_hand(q, k, v, a, beta):
    """S_t = a_t S_{t-1} (I - β k kᵀ) + β v kᵀ, y_t = S_t q_t, written as it stands, for one head of
    one example.
    """
    s, found = np.zeros((v.shape[-1], k.shape[-1])), []
    for t in range(len(q)):
        s = a[t] * s @ (np.eye(k.shape[-1]) - beta[t] * np.outer(k[t], k[t]))
        s = s + beta[t] * np.outer(v[t], k[t])
        found.append(s @ q[t])
    return np.stack(found)


@pytest.mark.parametrize("gate", [None, 1.0], ids=["gated", "delta rule"])
def test_the_gated_delta_rule_is_the_written_recurrence(gate, x64):
    q, k, v = (np.asarray(array(i, 7, 3)) for i in range(3))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    rng = np.random.default_rng(5)
    a, beta = (rng.uniform(0.1, 1, 7) for _ in range(2))
    a = a if gate is None else np.full(7, gate)
    wanted = delta_by_hand(q, k, v, a, beta)
    given = [jnp.asarray(leaf)[None, :, None] for leaf in (q, k, v, np.log(a), beta)]
    for form in ("recurrent", "scan", "chunked"):
        y, _ = quick(scans.delta_rule, static_argnums=(6, 7))(*given, None, form, 3)
        np.testing.assert_allclose(y[0, :, 0], wanted, rtol=0, atol=1e-12)
    if gate is not None:  # each step moves S k towards v by the share β (Widrow & Hoff 1960)
        s = np.zeros((3, 3))
        for t in range(7):
            s = s + beta[t] * np.outer(v[t] - s @ k[t], k[t])
        np.testing.assert_allclose(wanted[-1], s @ q[-1], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        pytest.param("recurrent", marks=pytest.mark.slow),
        pytest.param("scan", marks=pytest.mark.slow),
        "chunked",
    ],
)
def test_an_impulse_comes_back_as_powers_of_the_dynamics(form, x64):
    """S4D: C Ā^k B̄ with Ā = e^{ΔA}, B̄ = A^{-1} (Ā - 1); the conjugates count too. LRU: γ λ^k."""
    core, d = core_of("s4d", form, 4)
    u = jnp.zeros((1, 9, d)).at[0, 0].set(1.0)
    a = -np.exp(core.decay[...]) + 1j * np.asarray(core.frequency[...])
    assert a.real.max() <= -SLOWEST
    c = np.asarray(core.c_re[...]) + 1j * np.asarray(core.c_im[...])
    factor = np.exp(np.exp(core.timestep[...])[:, None] * a)
    wanted = [2 * np.real(c * factor**k * (factor - 1) / a).sum(-1) for k in range(9)]
    np.testing.assert_allclose(run(core, u)[0][0], wanted, rtol=0, atol=1e-12)
    core, n = core_of("lru", form, 4)
    u = jnp.zeros((1, 9, n)).at[0, 0, : n // 2].set(1.0)
    factor = np.exp(-np.exp(core.decay[...]) + 1j * np.asarray(core.frequency[...]))
    wanted = np.stack([np.exp(core.gain[...]) * factor**k for k in range(9)])
    y = np.asarray(run(core, u)[0][0])
    np.testing.assert_allclose(y[:, : n // 2] + 1j * y[:, n // 2 :], wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.exp(2 * core.gain[...]), 1 - np.abs(factor) ** 2, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("value", [-200.0, 0.0, 60.0])
def test_no_state_grows_whatever_the_parameters_say(value):
    """|λ| < 1 in float32, by the impulse response of extreme decays and steps."""
    for cell, names in (("s4d", ("decay", "timestep")), ("lru", ("decay",))):
        build, n = CORES[cell]
        core = build("recurrent", 4, rngs=nnx.Rngs(1))
        for name in names:
            leaf = getattr(core, name)
            leaf[...] = jnp.full_like(leaf[...], value)
        u = jnp.zeros((1, 3, n)).at[0, 0].set(1.0)
        _, one = run(core, u[:, :1])
        _, two = run(core, jnp.zeros_like(u[:, :1]), one)
        before, after = (np.hypot(*np.asarray(state, np.float64)) for state in (one, two))
        assert np.isfinite(before).all()
        assert (after < before).all() or (value > 0 and not after.any() and not before.any())
        assert np.isfinite(run(core, u)[0]).all()


@pytest.mark.slow
def test_a_gate_that_is_open_takes_the_candidate_and_one_that_is_closed_keeps_the_state():
    core = MinGRU(2, 1, DT, "scan", 4, rngs=nnx.Rngs(0))
    value = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2)), jnp.float32)
    h = jnp.full((1, 2), 0.3)
    for gate, wanted in ((200.0, value), (-200.0, jnp.broadcast_to(h[:, None], value.shape))):
        u = jnp.concatenate([jnp.full_like(value, gate), value], axis=-1)
        np.testing.assert_array_equal(run(core, u, (h,))[0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["mingru", "mamba2", "deltanet"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_gradients_are_finite_at_extreme_gates(cell, size):
    build, n = CORES[cell]
    u = size * jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, n)), jnp.float32))
    for form in ("recurrent", "scan", "chunked"):
        graph, params = nnx.split(build(form, 4, rngs=nnx.Rngs(1)))

        def total(params, u, graph=graph):
            return nnx.merge(graph, params)(u)[0].sum()

        value, grads = quick(jax.value_and_grad(total, argnums=(0, 1)))(params, u)
        for leaf in jax.tree.leaves((value, grads)):
            assert np.isfinite(leaf).all(), form


# --- causality and the decode cache ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["recurrent", "scan", "chunked"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_step_sees_its_future_by_a_gradient_that_is_exactly_0(cell, form, x64):
    model, params, state = setup(cell, CURVES, form=form, chunk=2)
    x, c = array(0, 1, 5, 2), jnp.ones((1, 2))
    own = model.autoregressive
    jacobian = quick(jax.jacrev(lambda x: own.outputs(params, state, x, c)[0]))(x)[:, :, 0]
    size = np.abs(jacobian).max(axis=(1, 3))  # [T of the output, T of the event]
    np.testing.assert_array_equal(size[np.triu_indices(5)], 0)  # event t goes in at step t + 1
    assert size[np.tril_indices(5, -1)].min() > 0


def one_by_one(model, params, state, x, cond=None):
    own = model.autoregressive
    outputs, carry = quick(own.begin, static_argnums=2)(params, state, len(x), cond)
    found, advance = [outputs], quick(own.advance)
    for t in range(x.shape[1] - 1):
        outputs, carry = advance(params, state, carry, x[:, t], cond)
        found.append(outputs)
    return np.stack(found, axis=1), carry


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [cell if cell == "mamba2" else pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS],
)
def test_the_cache_gives_the_outputs_of_the_full_forward_pass_at_every_position(cell, x64):
    model, params, state = setup(cell, form="chunked", chunk=2)
    x = jnp.asarray(np.random.default_rng(1).integers(0, 3, (3, 5)), jnp.int32)
    full = quick(model.autoregressive.outputs)(params, state, x)
    found, carry = one_by_one(model, params, state, x)
    assert np.ptp(full) > 0.5
    np.testing.assert_allclose(found, full, rtol=0, atol=1e-10)
    assert {leaf.dtype for leaf in jax.tree.leaves(carry)} == {jnp.dtype("float64")}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("spec", [LABELLED, CURVES], ids=lambda spec: spec.name)
def test_the_cache_with_a_condition(cell, spec, x64):
    model, params, state = setup(cell, spec, cond_dropout=0.1, n_components=2)
    batch = widen(example_batch(spec, KEY, 3))
    full = quick(model.autoregressive.outputs)(params, state, batch.x, batch.cond)
    found, _ = one_by_one(model, params, state, batch.x, batch.cond)
    np.testing.assert_allclose(found, full, rtol=0, atol=1e-10)
    without = quick(model.autoregressive.outputs)(
        params, state, batch.x, batch.cond, jnp.ones(3, bool)
    )
    assert np.abs(without - full).max() > 1e-3


# --- probabilities, padding, prompts --------------------------------------------------------------


def strings(spec):
    """All sequences; of those that differ after their end one."""
    every = np.asarray(list(itertools.product(range(3), repeat=5)), np.int32)
    if spec.end is None:
        return every
    ended = np.cumsum(every == spec.end, axis=1) - (every == spec.end) > 0
    return np.unique(np.where(ended, spec.end, every), axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "spec"),
    [
        ("mamba2", WORDS),
        pytest.param("s4d", WORDS, marks=pytest.mark.slow),
        pytest.param("lru", WORDS, marks=pytest.mark.slow),
        pytest.param("mingru", ENDED, marks=pytest.mark.slow),
        pytest.param("deltanet", ENDED, marks=pytest.mark.slow),
    ],
)
def test_probabilities_of_all_sequences_sum_to_one(cell, spec, x64):
    model, params, state = setup(cell, spec)
    nats = quick(model.log_prob)(params, state, Batch(jnp.asarray(strings(spec))), KEY)
    np.testing.assert_allclose(np.exp(nats).sum(), 1, rtol=1e-12)
    assert np.ptp(nats) > 1


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["s4d", "deltanet"])
def test_padding_changes_neither_values_nor_gradients(cell, x64):
    model, params, state = setup(cell, ROLLS, form="chunked", chunk=2)
    batch = widen(example_batch(ROLLS, KEY, 3))._replace(length=jnp.asarray([2, 5, 1]))
    counts = jnp.arange(5)[None] < batch.length[:, None]
    other = batch._replace(x=jnp.where(counts[..., None], batch.x, 1 - batch.x))
    value = quick(
        jax.value_and_grad(lambda p, batch: model.losses["ssm"](p, state, batch, KEY, 0)[0].sum())
    )
    assert_same(value(params, other), value(params, batch))
    assert np.abs(other.x - batch.x).max() == 1
    keep = jnp.asarray([0, 2])  # nor does its amount: the same sequences cut to 2 steps
    cut = Batch(batch.x[keep, :2], length=batch.length[keep])
    log_prob = quick(model.log_prob)
    whole = log_prob(params, state, batch, KEY)[keep]
    np.testing.assert_allclose(log_prob(params, state, cut, KEY), whole, rtol=1e-13)


@pytest.mark.slow
def test_a_prompt_goes_on_with_the_likeliest_event_given_all_of_it():
    from genjax.parts.decoding import sampler, top_k

    model, params, state = setup("mamba2", wide=False)
    prompt = jnp.asarray([[0, 2, 1], [1, 1, 0]], jnp.int32)
    generate = functools.partial(
        model.autoregressive.generate, n=2, choose=sampler(top_k(1)), length=8
    )
    x = np.asarray(quick(generate)(params, state, KEY, prompt=prompt))
    np.testing.assert_array_equal(x[:, :3], prompt)
    best = np.asarray(quick(model.autoregressive.outputs)(params, state, x)).argmax(-1)
    np.testing.assert_array_equal(x[:, 3:], best[:, 3:])


# --- arithmetic, labels, checkpoints --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_states_and_gates_stay_wide_in_narrow_arithmetic(cell):
    model, params, state = setup(cell, wide=False, n_layers=1)
    narrow = setup(cell, wide=False, n_layers=1, dtype="bfloat16")[0]
    batch = example_batch(WORDS, KEY, 8)
    one, other = (quick(m.log_prob)(params, state, batch, KEY) for m in (model, narrow))
    np.testing.assert_allclose(other, one, rtol=0.05)
    assert (np.asarray(one) != np.asarray(other)).any()
    _, carry = narrow.autoregressive.begin(params, state, 2)
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(carry)]
    assert {leaf.dtype for leaf in kept} == {np.dtype("float32")}
    advance = quick(narrow.autoregressive.advance)
    _, carry = advance(params, state, carry, jnp.zeros(2, jnp.int32))
    bits = np.concatenate([np.ravel(leaf[0]) for leaf in carry]).view(np.uint32)
    assert (bits & 0xFFFF).any()  # none of these is a bfloat16 in a float32's clothes


DYNAMICS = {
    "s4d": {"decay", "frequency", "timestep"},
    "lru": {"decay", "frequency", "gain"},
    "mingru": {"timestep"},
    "mamba2": {"decay", "timestep"},
    "deltanet": {"decay", "timestep"},
}


@pytest.mark.parametrize("cell", CELLS)
def test_the_dynamics_have_their_own_label_and_are_real(cell):
    model = ssm(WORDS, cell=cell, d_model=8, n_layers=1)
    params, _ = jax.eval_shape(model.init, KEY)
    found = labels_of(params, model.labels)["ssm"]
    core = found["blocks"][0]["core"]
    named = {name for name, label in core.items() if label == "dynamics"}
    assert named == DYNAMICS[cell]
    assert "dynamics" not in jax.tree.leaves({**found, "blocks": {}})
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    if "conv" in core:
        assert core["conv"]["kernel"] == "vector"
    assert found["inputs"]["events"]["table"] == "embedding"


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["s4d", "lru"])
def test_complex_dynamics_survive_the_optimiser_and_a_checkpoint(cell, tmp_path):
    """Without a gradient, decay takes from matrices but not from dynamics, whose step size is their
    own; and all of it comes back as it was.
    """
    model = ssm(WORDS, cell=cell, d_model=6, n_layers=1)
    optimizer = Optimizer(
        "adamw", 0.01, weight_decay=0.5, ema_decay=0.9, rates=("dynamics=0.5", "vector=1")
    )
    t = training(model, {"ssm": optimizer.build(10, model.labels, "ssm")})
    first = jax.jit(t.init)(KEY)
    ts, _ = jax.jit(t.step)(first, example_batch(WORDS, KEY, 4))
    before, after = (one.params["ssm"]["blocks"][0] for one in (first, ts))
    for name in DYNAMICS[cell]:
        moved = np.abs(np.asarray(after["core"][name]) - np.asarray(before["core"][name]))
        assert 0 < moved.max() < 0.006  # Adam's first step is the step size, here half of it
    kept = Checkpoints(tmp_path)
    kept.save(ts)
    back = kept.restore(first)
    assert back is not None
    assert_same(back.state, ts)
