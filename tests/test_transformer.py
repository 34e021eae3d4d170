"""The Transformer as a model: causality, cache, probabilities that sum to one, and the law of what
it generates.
"""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from gates import assert_close, optimised, quick
from rows import widen

from genjax.errors import ConfigError
from genjax.families.transformer import transformer
from genjax.learning.step import training
from genjax.learning.transforms import scan_steps
from genjax.parts.decoding import beam_search, generate, sampler, top_k
from genjax.protocol import Batch, DataSpec

TOKENS = DataSpec((6,), "tokens", levels=3, step="symbol")
CLASSES = DataSpec((6,), "tokens", levels=3, step="symbol", n_classes=2)
VECTORS = DataSpec((6, 2), "continuous", step="frame", cond_dim=2, lengths=True)
VARIANTS = {
    "rotary": {},
    "learned": {
        "position": "learned",
        "bias": True,
        "tie_weights": True,
        "activation": "gelu_exact",
        "norm_eps": 0.3,
    },
    "grouped": {
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm": "rms",
        "activation": "swiglu",
        "norm_eps": 0.2,
        "rope_base": 30.0,
        "attention_dropout": 0.3,
    },
    "window": {"window": 3, "n_kv_heads": 1, "position": "learned"},
    "none": {"position": "none", "scan_layers": True},
}
TINY = {"d_model": 8, "n_layers": 2, "n_heads": 2}


def built(spec=TOKENS, **options):
    """A tiny model with parameters far from their init, and its functions compiled."""
    model = transformer(spec, **{**TINY, **options})
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0))[0])
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(
        tree, [leaf + 0.4 * rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
    )
    own = model.autoregressive
    begin = quick(own.begin, static_argnums=2)
    sample = quick(model.sample, static_argnums=3)
    loss = quick(model.losses["transformer"])
    return SimpleNamespace(
        model=model,
        params=params,
        log_prob=quick(model.log_prob),
        begin=begin,
        sample=sample,
        loss=loss,
        outputs=quick(own.outputs),
        step_log_prob=quick(own.step_log_prob),
        advance=quick(own.advance),
    )


@functools.cache
def shared(variant, spec=TOKENS):
    return built(spec, **VARIANTS[variant])


def tokens(seed, n, spec=TOKENS):
    return jnp.asarray(
        np.random.default_rng(seed).integers(0, spec.levels, (n, *spec.shape)), jnp.int32
    )


def strings(levels, length):
    return np.asarray(list(itertools.product(range(levels), repeat=length)), np.int32)


# --- causality ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 2])
def test_a_step_depends_on_every_earlier_event_in_reach_and_exactly_on_no_other(window):
    """The jacobian, exactly 0: event s goes in at position s + 1, and each of L layers looks window
    - 1 steps back.
    """
    m = built(VECTORS, window=window)
    x, c = (
        jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 2)), jnp.float32),
        jnp.ones((1, 2)),
    )
    jacobian = np.asarray(
        quick(jax.jacrev(lambda x: m.model.autoregressive.outputs(m.params, {}, x, c)))(x)
    )
    size = np.abs(jacobian[0, :, :, 0]).max(axis=(1, 3))  # [T of the output, T of the event]
    reach = 6 if window is None else TINY["n_layers"] * (window - 1)
    wanted = np.asarray([[0 <= t - (s + 1) <= reach for s in range(6)] for t in range(6)])
    np.testing.assert_array_equal(size != 0, wanted)


@pytest.mark.slow
def test_changing_a_token_changes_no_step_up_to_it():
    m = shared("rotary")
    x = tokens(0, 4)
    before = np.asarray(m.outputs(m.params, {}, x))
    for s in range(6):
        after = np.asarray(m.outputs(m.params, {}, x.at[:, s].set((x[:, s] + 1) % 3)))
        np.testing.assert_array_equal(before[:, : s + 1], after[:, : s + 1])
        assert s == 5 or (before[:, s + 1 :] != after[:, s + 1 :]).any(axis=(0, 2)).all()


# --- the cache ------------------------------------------------------------------------------------


def one_by_one(m, params, x, cond=None):
    outputs, carry = m.begin(params, {}, len(x), cond)
    found = [outputs]
    for t in range(x.shape[1] - 1):
        outputs, carry = m.advance(params, {}, carry, x[:, t], cond)
        found.append(outputs)
    return np.stack(found, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_gives_the_outputs_of_the_full_forward_pass_at_every_position(variant):
    m, x = shared(variant), tokens(1, 3)
    np.testing.assert_allclose(one_by_one(m, m.params, x), m.outputs(m.params, {}, x), atol=1e-5)
    with jax.enable_x64(True):
        params = widen(m.params)
        full = m.outputs(params, {}, x)
        assert full.dtype == jnp.float64
        assert np.ptp(full) > 0.5
        np.testing.assert_allclose(one_by_one(m, params, x), full, atol=1e-10)


@pytest.mark.slow
def test_the_cache_of_vectors_with_a_condition():
    m = built(VECTORS, n_components=2)
    rng = np.random.default_rng(0)
    x, c = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 6, 2), (3, 2)))
    np.testing.assert_allclose(
        one_by_one(m, m.params, x, c), m.outputs(m.params, {}, x, c), atol=1e-5
    )


# --- probabilities --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rotary", "grouped"])
def test_the_probabilities_of_all_strings_sum_to_one(variant):
    spec = DataSpec((5,), "tokens", levels=3, step="symbol")
    m = built(spec, **VARIANTS[variant])
    with jax.enable_x64(True):
        nats = m.log_prob(widen(m.params), {}, Batch(jnp.asarray(strings(3, 5))), jax.random.key(0))
        np.testing.assert_allclose(np.exp(nats).sum(), 1, atol=1e-12)
        assert np.ptp(nats) > 1


@pytest.mark.slow
def test_with_an_end_token_the_strings_of_all_lengths_sum_to_one():
    spec = DataSpec((5,), "tokens", levels=3, step="symbol", end=1)
    m = built(spec)
    padded = {
        tuple(row[: list(row).index(1)]) + (1,) * (5 - list(row).index(1))
        if 1 in row
        else tuple(row)
        for row in strings(3, 5)
    }
    x = np.asarray(sorted(padded), np.int32)
    assert len(x) == 2**5 + sum(2**k for k in range(5))
    with jax.enable_x64(True):
        params, batch = widen(m.params), Batch(jnp.asarray(x))
        nats = m.log_prob(params, {}, batch, jax.random.key(0))
        np.testing.assert_allclose(np.exp(nats).sum(), 1, atol=1e-12)
        steps = np.asarray(m.step_log_prob(params, {}, batch))
    ended = np.cumsum(x == 1, axis=1) - (x == 1) > 0
    assert (steps[ended] == 0).all()
    assert (steps[~ended] < 0).all()
    np.testing.assert_allclose(steps.sum(1), nats, atol=1e-13)


@pytest.mark.slow
def test_steps_are_the_log_softmax_of_the_outputs_and_padding_counts_for_nothing():
    m, x = shared("learned"), tokens(2, 4)
    outputs = np.asarray(m.outputs(m.params, {}, x), np.float64)
    wanted = np.take_along_axis(
        outputs - np.log(np.exp(outputs).sum(-1, keepdims=True)), np.asarray(x)[..., None], -1
    )
    np.testing.assert_allclose(m.step_log_prob(m.params, {}, Batch(x)), wanted[..., 0], atol=1e-5)
    v = built(VECTORS)
    rng = np.random.default_rng(0)
    x, c = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 6, 2), (3, 2)))
    batch = Batch(x, c, length=jnp.asarray([1, 4, 6]))
    steps = np.asarray(v.step_log_prob(v.params, {}, batch))
    assert [np.flatnonzero(row).tolist() for row in steps] == [list(range(n)) for n in (1, 4, 6)]
    np.testing.assert_array_equal(
        steps, v.step_log_prob(v.params, {}, batch._replace(x=x.at[1, 4:].set(99.0)))
    )
    loss, aux = v.loss(v.params, {"transformer": {}}, batch, jax.random.key(0), 0)
    np.testing.assert_allclose(loss, -steps.sum(1), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["nats_per_step"], -steps.sum(1) / [1, 4, 6], rtol=1e-5)


# --- the same values by other programs ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_scanned_or_recomputed_layers_have_the_same_loss_and_gradient(x64, rate):
    rates = {"dropout": rate, "attention_dropout": rate}
    plain = built(**rates)
    params, batch = widen(plain.params), Batch(tokens(0, 4))

    def gradient(**options):
        loss = transformer(TOKENS, **TINY, **rates, **options).losses["transformer"]
        return quick(
            jax.value_and_grad(
                lambda p: loss(p, {"transformer": {}}, batch, jax.random.key(3), 0)[0].sum()
            )
        )(params)

    wanted = gradient()
    again = ("full", "dots", "dots_no_batch")
    for options in (
        {"scan_layers": True},
        *({"remat": name} for name in again),
        *({"remat": name, "scan_layers": True} for name in again),
    ):
        assert_close(gradient(**options), wanted, rtol=1e-12)


@pytest.mark.slow
def test_the_gradient_of_a_tied_table_is_the_sum_of_its_two_uses(x64):
    tied, free = (transformer(TOKENS, **TINY, tie_weights=tie) for tie in (True, False))
    params = widen(built(tie_weights=True).params)["transformer"]
    table = params["inputs"]["events"]["table"]
    dense = {"kernel": table, "bias": jnp.zeros(3)}  # the layout of the two is the same
    both = {**params, "readout": {**params["readout"], "dense": dense}}
    assert not {"dense"} & set(params["readout"])

    def gradient(model, p):
        def loss(p):
            batch, key = Batch(tokens(0, 4)), jax.random.key(0)
            return model.losses["transformer"](p, {"transformer": {}}, batch, key, 0)[0].sum()

        value, grad = quick(jax.value_and_grad(loss))({"transformer": p})
        return value, grad["transformer"]

    (value, grad), (other, parts) = gradient(tied, params), gradient(free, both)
    np.testing.assert_allclose(value, other, rtol=1e-14)
    of_table, of_readout = parts["inputs"]["events"]["table"], parts["readout"]["dense"]["kernel"]
    assert np.abs(of_table).max() > 0.1
    assert np.abs(of_readout).max() > 0.1
    np.testing.assert_allclose(grad["inputs"]["events"]["table"], of_table + of_readout, atol=1e-12)


def test_as_many_key_heads_as_heads_is_the_default():
    one, other = (
        transformer(TOKENS, **TINY, n_kv_heads=n).init(jax.random.key(0)) for n in (None, 2)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


# --- noise in training ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("option", ["dropout", "attention_dropout"])
def test_dropout_depends_on_the_key_in_training_and_is_absent_from_evaluation(option):
    plain, noisy, batch = built(), built(**{option: 0.5}), Batch(tokens(0, 4))
    losses = {}
    for name, m in (("plain", plain), ("noisy", noisy)):
        losses[name] = [
            np.asarray(m.loss(m.params, {"transformer": {}}, batch, jax.random.key(k), 0)[0])
            for k in (0, 0, 1)
        ]
    np.testing.assert_array_equal(losses["plain"][0], losses["plain"][2])
    np.testing.assert_array_equal(losses["noisy"][0], losses["noisy"][1])
    assert (losses["noisy"][0] != losses["noisy"][2]).all()
    nats = [
        m.log_prob(plain.params, {}, batch, jax.random.key(k))
        for m, k in ((plain, 0), (noisy, 0), (noisy, 1))
    ]
    np.testing.assert_array_equal(nats[0], nats[1])
    np.testing.assert_array_equal(nats[0], nats[2])
    np.testing.assert_allclose(losses["plain"][0], -nats[0], rtol=1e-6)


@pytest.mark.slow
def test_the_condition_is_left_out_at_the_rate_that_was_asked_for():
    m, n, rate = built(CLASSES, cond_dropout=0.3), 2000, 0.3
    batch = Batch(jnp.repeat(tokens(0, 1), n, axis=0), jnp.ones(n, jnp.int32))
    loss, _ = m.loss(m.params, {"transformer": {}}, batch, jax.random.key(0), 0)
    values, counts = np.unique(np.round(np.asarray(loss), 3), return_counts=True)
    given = -float(
        m.log_prob(m.params, {}, Batch(batch.x[:1], batch.cond[:1]), jax.random.key(0))[0]
    )
    assert len(values) == 2
    kept = counts[np.abs(values - given) < 2e-3]
    assert len(kept) == 1
    assert abs(kept[0] / n - (1 - rate)) < 3 * np.sqrt(rate * (1 - rate) / n)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_law_of_samples_is_the_model_by_enumeration():
    spec, n = DataSpec((3,), "tokens", levels=3, step="symbol"), 20_000
    m = built(spec, n_kv_heads=1)
    x = np.asarray(m.sample(m.params, {}, jax.random.key(5), n))
    p = np.exp(
        np.asarray(
            m.log_prob(m.params, {}, Batch(jnp.asarray(strings(3, 3))), jax.random.key(0)),
            np.float64,
        )
    )
    counts = np.bincount(x @ [9, 3, 1], minlength=27)
    assert scipy.stats.chisquare(counts, n * p / p.sum()).pvalue > 1e-3
    assert scipy.stats.chisquare(counts, np.full(27, n / 27)).pvalue < 1e-6


@pytest.mark.slow
def test_guidance_of_scale_one_is_the_conditional_and_of_zero_the_unconditional_model():
    m, cond, key = built(CLASSES, cond_dropout=0.1), jnp.asarray([0, 1] * 8), jax.random.key(1)
    with pytest.raises(ConfigError, match="cond_dropout"):
        shared("rotary", CLASSES).model.autoregressive.generate(
            m.params, {}, key, 16, cond, guidance=2.0
        )
    run = quick(
        lambda scale: m.model.autoregressive.generate(m.params, {}, key, 16, cond, guidance=scale)
    )
    np.testing.assert_array_equal(run(1.0), m.sample(m.params, {}, key, 16, cond))
    dropped = jnp.ones(16, bool)
    outputs, carry = m.begin(m.params, {}, 16, cond, dropped)

    def advance(carry, x):
        return m.model.autoregressive.advance(m.params, {}, carry, x, cond, dropped)

    without = generate(advance, outputs, carry, sampler(), key, 6)
    np.testing.assert_array_equal(run(0.0), without)
    np.testing.assert_array_equal(outputs, m.begin(m.params, {}, 16, 1 - cond, dropped)[0])
    assert (np.asarray(run(0.0)) != np.asarray(run(1.0))).any()
    assert (np.asarray(run(4.0)) != np.asarray(run(1.0))).any()


@pytest.mark.slow
def test_a_prompt_is_kept_and_no_length_of_it_compiles_another_program():
    m, prompt = shared("window"), tokens(3, 5)
    run = jax.jit(
        lambda length: m.model.autoregressive.generate(
            m.params,
            {},
            jax.random.key(0),
            5,
            prompt=prompt,
            prompt_length=length,
            choose=sampler(top_k(1)),
        )
    )
    for length in (0, 2, 6):
        x = run(jnp.int32(length))
        np.testing.assert_array_equal(x[:, :length], prompt[:, :length])
        # What follows is the greedy choice given all before it, by the full forward pass.
        best = np.asarray(m.outputs(m.params, {}, x)).argmax(-1)
        np.testing.assert_array_equal(x[:, length:], best[:, length:])
    assert run._cache_size() == 1
    with pytest.raises(ConfigError, match="prompt of 7 steps does not fit into 6"):
        m.model.autoregressive.generate(
            m.params, {}, jax.random.key(0), 5, prompt=jnp.zeros((5, 7), jnp.int32)
        )
    with pytest.raises(ConfigError, match="from 1 to 6, the model's context"):
        m.model.autoregressive.generate(m.params, {}, jax.random.key(0), 5, length=7)


@pytest.mark.slow
def test_beam_search_over_the_cache_finds_the_best_string_of_each_condition():
    spec, beams = DataSpec((3,), "tokens", levels=3, step="symbol", n_classes=2), 9
    m, cond = built(spec, n_heads=4, n_kv_heads=2), jnp.asarray([0, 1])
    outputs, carry = m.begin(m.params, {}, 2, cond)
    each = jnp.repeat(cond, beams)

    def advance(carry, x):
        return m.model.autoregressive.advance(m.params, {}, carry, x, each)

    found, nats = quick(lambda outputs, carry: beam_search(advance, outputs, carry, beams, 3))(
        outputs, carry
    )
    every = jnp.asarray(strings(3, 3))
    for row in range(2):
        batch = Batch(every, jnp.full(27, row, jnp.int32))
        wanted = np.asarray(m.log_prob(m.params, {}, batch, jax.random.key(0)))
        order = np.argsort(-wanted)[:beams]
        np.testing.assert_array_equal(found[row], every[order])
        np.testing.assert_allclose(nats[row], wanted[order], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        DataSpec((4, 5), "binary", step="frame"),
        DataSpec((4, 2, 2), "discrete", levels=4, step="row"),
        DataSpec((4, 3), "continuous", step="frame"),
    ],
)
def test_events_of_other_kinds_come_out_as_they_go_in(spec):
    m = built(spec, n_components=2, d_model=4)
    x = m.sample(m.params, {}, jax.random.key(0), 3)
    assert x.shape == (3, *spec.shape)
    assert x.dtype == jnp.float32
    assert spec.kind == "continuous" or set(np.unique(x)) <= set(range(spec.levels or 2))
    assert np.isfinite(m.log_prob(m.params, {}, Batch(x), jax.random.key(0))).all()


@pytest.mark.slow
def test_narrow_arithmetic_keeps_wide_parameters_and_nearly_the_loss():
    wide, narrow, batch = built(), built(dtype="bfloat16"), Batch(tokens(0, 8))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype("float32")}
    one, other = (m.log_prob(wide.params, {}, batch, jax.random.key(0)) for m in (wide, narrow))
    np.testing.assert_allclose(one, other, rtol=0.03)
    assert (np.asarray(one) != np.asarray(other)).any()


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_markov_chain_is_learned_to_its_entropy_and_never_below():
    levels, length, n = 4, 32, 4096
    rng = np.random.default_rng(0)
    matrix = rng.dirichlet(np.full(levels, 0.5), levels)
    values, vectors = np.linalg.eig(matrix.T)
    law = np.real(vectors[:, np.argmax(np.real(values))])
    law /= law.sum()
    entropy = (
        -(law * np.log(law)).sum() / length
        - (length - 1) / length * (law[:, None] * matrix * np.log(matrix)).sum()
    )

    def draw(n):
        x = np.empty((n, length), np.int32)
        x[:, 0] = rng.choice(levels, n, p=law)
        for t in range(1, length):
            x[:, t] = (matrix[x[:, t - 1]].cumsum(1) < rng.random((n, 1))).sum(1)
        return x

    spec = DataSpec((length,), "tokens", levels=levels, step="symbol")
    t = training(
        transformer(spec, d_model=32, n_layers=1, n_heads=2),
        optax.adam(optax.cosine_decay_schedule(3e-3, 600)),
    )
    ts, step = jax.jit(t.init)(jax.random.key(0)), optimised(scan_steps(t).step, donate_argnums=0)
    for _ in range(12):
        ts, _ = step(ts, Batch(jnp.asarray(draw(50 * 64).reshape(50, 64, length))))
    model = transformer(spec, d_model=32, n_layers=1, n_heads=2)
    nats = (
        -np.asarray(
            jax.jit(model.log_prob)(
                ts.params, ts.state, Batch(jnp.asarray(draw(n))), jax.random.key(1)
            )
        )
        / length
    )
    error = nats.std() / np.sqrt(n)
    assert -3 * error < nats.mean() - entropy < 0.01 + 3 * error
