"""Decoding: the support of each rule, generation against a loop by hand, beam search against all
strings, guidance.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import quick

from genjax.errors import ConfigError
from genjax.parts.decoding import (
    beam_search,
    compose,
    generate,
    make_generate,
    min_p,
    repetition_penalty,
    sampler,
    temperature,
    top_k,
    top_p,
)
from genjax.parts.guidance import classifier_free
from genjax.protocol import DataSpec

V = 6
LOGITS = np.random.default_rng(0).normal(0, 2, (5, V)).astype(np.float32)
NONE = jnp.zeros((5, V), jnp.int32)


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def support(rule, logits=LOGITS):
    """Which tokens a rule keeps; those that it keeps have their logits unchanged."""
    got = np.asarray(rule(jnp.asarray(logits), NONE[: len(logits)]))
    np.testing.assert_array_equal(got[np.isfinite(got)], logits[np.isfinite(got)])
    assert (got[~np.isfinite(got)] == -np.inf).all()
    return [set(np.flatnonzero(row)) for row in np.isfinite(got)]


def smallest_set(row, p):
    """By trying all subsets: the one of the fewest tokens, and of those the most probable, with
    mass p or more.
    """
    mass = softmax(row)
    subsets = (set(s) for size in range(1, V + 1) for s in itertools.combinations(range(V), size))
    enough = [s for s in subsets if mass[list(s)].sum() >= p - 1e-12]
    return max(enough, key=lambda s: (-len(s), mass[list(s)].sum()))


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, V, V + 3])
def test_top_k_keeps_the_k_largest_and_of_equal_ones_the_first(k):
    assert support(top_k(k)) == [set(np.argsort(-row)[:k]) for row in LOGITS]
    assert support(top_k(k), np.ones((2, V), np.float32)) == [set(range(min(k, V)))] * 2


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_top_p_keeps_the_smallest_set_with_that_mass(p):
    assert support(top_p(p)) == [smallest_set(row, p) for row in LOGITS]


def test_top_p_of_equal_probabilities():
    uniform = np.zeros((1, 4), np.float32)
    assert [len(support(top_p(p), uniform)[0]) for p in (0.25, 0.26, 0.5, 0.51, 1.0)] == [
        1,
        2,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_is_p_times_as_probable_as_the_best(p):
    kept = softmax(LOGITS) >= p * softmax(LOGITS).max(-1, keepdims=True) * (1 - 1e-6)
    assert support(min_p(p)) == [set(np.flatnonzero(row)) for row in kept]


def test_a_temperature_of_zero_is_greedy_and_others_divide():
    assert support(temperature(0)) == [{int(row.argmax())} for row in LOGITS]
    assert support(temperature(0.0), np.ones((2, V), np.float32)) == [{0}, {0}]
    np.testing.assert_allclose(temperature(0.5)(jnp.asarray(LOGITS), NONE), LOGITS / 0.5, rtol=1e-6)


def test_the_repetition_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    counts = jnp.zeros((5, V), jnp.int32).at[:, 1].set(1).at[:, 4].set(3)
    got = np.asarray(repetition_penalty(1.5)(jnp.asarray(LOGITS), counts))
    seen = [1, 4]
    assert (LOGITS[:, seen] > 0).any()
    assert (LOGITS[:, seen] < 0).any()
    np.testing.assert_allclose(
        got[:, seen], np.where(LOGITS > 0, LOGITS / 1.5, LOGITS * 1.5)[:, seen], rtol=1e-6
    )
    assert (got[:, seen] < LOGITS[:, seen]).all()
    np.testing.assert_array_equal(np.delete(got, seen, 1), np.delete(LOGITS, seen, 1))


def test_rules_are_applied_in_order_and_inside_a_trace():
    one, other = top_k(3), temperature(0.7)
    logits = jnp.asarray(LOGITS)
    np.testing.assert_array_equal(compose(one, other)(logits, NONE), other(one(logits, NONE), NONE))
    np.testing.assert_array_equal(compose()(logits, NONE), logits)
    # A flatter distribution before top-p keeps more than after it: the order matters.
    first, last = compose(temperature(3.0), top_p(0.8)), compose(top_p(0.8), temperature(3.0))
    kept = [np.isfinite(np.asarray(rule(logits, NONE))).sum() for rule in (first, last)]
    assert kept[0] > kept[1]
    many = jax.jit(jax.vmap(lambda t, p: compose(temperature(t), top_p(p))(logits, NONE)))
    values = (jnp.asarray([0.5, 2.0]), jnp.asarray([0.4, 0.9]))
    for got, t, p in zip(many(*values), *values, strict=True):
        np.testing.assert_array_equal(
            got, compose(temperature(float(t)), top_p(float(p)))(logits, NONE)
        )


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        (temperature, -0.1, "temperature must be 0"),
        (top_p, 0.0, r"top-p must be in \(0, 1\]"),
        (top_p, 1.01, r"top-p must be in \(0, 1\]"),
        (min_p, 0.0, r"min-p must be in \(0, 1\]"),
        (min_p, 1.5, r"min-p must be in \(0, 1\]"),
        (top_k, 0, "top-k must be at least 1"),
        (repetition_penalty, 0.0, "penalty must be above 0"),
        (repetition_penalty, -1.0, "penalty must be above 0"),
    ],
)
def test_a_rule_refuses_what_means_nothing(rule, value, message):
    with pytest.raises(ConfigError, match=message):
        rule(value)


# --- generation: a source of order 2, whose carry is the token before the last --------------------


W = 3
TABLE = np.random.default_rng(1).normal(0, 1, (W + 1, W, W)).astype(np.float32)


def second_order(carry, x):
    """The logits of the token after `x`, given the one before it (W for none)."""
    return jnp.asarray(TABLE)[carry, x], x


FIRST = np.asarray([0.3, -0.5, 0.1], np.float32)
START = (jnp.broadcast_to(jnp.asarray(FIRST), (4, W)), jnp.full(4, W, jnp.int32))


def log_probs(x):
    """ln p of whole strings x [N, T], by hand."""
    total, before = np.log(softmax(FIRST))[x[:, 0]], np.full(len(x), W)
    for t in range(1, x.shape[1]):
        each = np.log(softmax(TABLE[before, x[:, t - 1]]))
        total = total + each[np.arange(len(x)), x[:, t]]
        before = x[:, t - 1]
    return total


@pytest.mark.slow
def test_generation_is_the_loop_by_hand_with_a_key_for_each_step():
    choose, key = sampler(temperature(0.8)), jax.random.key(3)
    outputs, carry = START
    wanted = []
    for t in range(6):
        x = choose(jax.random.fold_in(key, t), outputs, jnp.zeros((4, W), jnp.int32))
        outputs, carry = second_order(carry, x)
        wanted.append(x)
    got = generate(second_order, *START, choose, key, 6)
    np.testing.assert_array_equal(got, np.stack(wanted, 1))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(
        generate(second_order, *START, choose, key, 1), np.stack(wanted[:1], 1)
    )


def test_the_law_of_generated_strings():
    n = 6000
    start = (jnp.broadcast_to(jnp.asarray(FIRST), (n, W)), jnp.full(n, W, jnp.int32))
    x = np.asarray(generate(second_order, *start, sampler(), jax.random.key(0), 3))
    strings = np.asarray(list(itertools.product(range(W), repeat=3)))
    p = np.exp(log_probs(strings))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    counts = np.bincount(x @ [9, 3, 1], minlength=27)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 54.05  # the 0.999 quantile with 26 degrees of freedom


def test_counts_are_those_of_the_tokens_so_far():
    def least(key, outputs, counts):
        return counts.argmin(-1).astype(jnp.int32)

    got = generate(
        second_order, *START, least, jax.random.key(0), 7, prompt=jnp.full((4, 1), 1, jnp.int32)
    )
    np.testing.assert_array_equal(got, [[1, 0, 2, 0, 1, 2, 0]] * 4)


@pytest.mark.slow
def test_prompts_are_kept_each_with_its_length_and_without_another_program():
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, W, (4, 5)), jnp.int32)

    @jax.jit
    def run(length):
        return generate(
            second_order,
            *START,
            sampler(),
            jax.random.key(1),
            6,
            prompt=prompt,
            prompt_length=length,
        )

    free = np.asarray(generate(second_order, *START, sampler(), jax.random.key(1), 6))
    np.testing.assert_array_equal(run(jnp.int32(0)), free)
    for length in range(6):
        got = np.asarray(run(jnp.int32(length)))
        np.testing.assert_array_equal(got[:, :length], prompt[:, :length])
    assert run._cache_size() == 1
    each = np.asarray(run(jnp.asarray([0, 2, 3, 5], jnp.int32)))
    for row, length in enumerate([0, 2, 3, 5]):
        np.testing.assert_array_equal(each[row], np.asarray(run(jnp.int32(length)))[row])
    whole = generate(second_order, *START, sampler(), jax.random.key(1), 6, prompt=prompt)
    np.testing.assert_array_equal(whole, run(jnp.int32(5)))


def test_after_the_end_token_all_is_the_end_token():
    x = np.asarray(generate(second_order, *START, sampler(), jax.random.key(2), 12, end=1))
    free = np.asarray(generate(second_order, *START, sampler(), jax.random.key(2), 12))
    assert (x == 1).any()
    for got, same in zip(x, free, strict=True):
        stop = np.flatnonzero(same == 1)[0] if (same == 1).any() else len(same)
        np.testing.assert_array_equal(got[:stop], same[:stop])
        assert (got[stop:] == 1).all()


def test_events_need_not_be_tokens():
    def walk(carry, x):
        return x, carry

    def choose(key, outputs, counts):
        return outputs + 1 + 0 * counts.sum().astype(outputs.dtype)

    got = generate(
        walk,
        jnp.zeros((2, 3)),
        jnp.zeros(2),
        choose,
        jax.random.key(0),
        4,
        prompt=jnp.full((2, 1, 3), 5.0),
    )
    np.testing.assert_array_equal(
        got, np.broadcast_to(np.asarray([5.0, 6, 7, 8])[None, :, None], (2, 4, 3))
    )


def test_a_prompt_that_does_not_fit_is_refused():
    run = functools.partial(generate, second_order, *START, sampler(), jax.random.key(0), 3)
    with pytest.raises(ConfigError, match="4 steps does not fit into 3"):
        run(prompt=jnp.zeros((4, 4), jnp.int32))
    with pytest.raises(ConfigError, match="from 0 to the 2 steps"):
        run(prompt=jnp.zeros((4, 2), jnp.int32), prompt_length=3)


# --- beam search ----------------------------------------------------------------------------------


def enumerate_strings(steps, end):
    """All strings of the model, padded after their end, with ln p and their length."""
    found = {}
    for string in itertools.product(range(W), repeat=steps):
        length = string.index(end) + 1 if end in string else steps
        found[string[:length] + (end,) * (steps - length)] = length
    strings = np.asarray(list(found))
    lengths = np.asarray(list(found.values()))
    nats = np.asarray(
        [log_probs(row[None, :length])[0] for row, length in zip(strings, lengths, strict=True)]
    )
    return strings, nats, lengths


@pytest.mark.slow
@pytest.mark.parametrize(("end", "penalty"), [(None, 0.0), (2, 0.0), (2, 0.8), (2, -0.5)])
def test_a_wide_beam_finds_the_best_of_all_strings(end, penalty):
    steps, width = 4, W**3
    search = quick(
        lambda outputs, carry: beam_search(second_order, outputs, carry, width, steps, end, penalty)
    )
    tokens, nats = search(*START)
    strings, wanted, lengths = enumerate_strings(steps, end)
    order = np.argsort(-wanted / ((5 + lengths) / 6) ** penalty)[:width]
    for row in range(4):
        n = len(order)
        np.testing.assert_array_equal(tokens[row, :n], strings[order])
        np.testing.assert_allclose(nats[row, :n], wanted[order], atol=1e-5)
        assert (nats[row, n:] == -np.inf).all()


@pytest.mark.slow
def test_a_beam_of_one_is_greedy_and_examples_do_not_mix():
    start = (jnp.asarray(np.random.default_rng(5).normal(size=(4, W)), jnp.float32), START[1])
    tokens, nats = beam_search(second_order, *start, 1, 5)
    greedy = generate(second_order, *start, sampler(temperature(0)), jax.random.key(0), 5)
    np.testing.assert_array_equal(tokens[:, 0], greedy)
    assert nats.shape == (4, 1)
    assert len(np.unique(np.asarray(greedy)[:, 0])) > 1
    with pytest.raises(ConfigError, match="n_beams"):
        beam_search(second_order, *start, 0, 5)


# --- guidance -------------------------------------------------------------------------------------


def test_guidance_at_scale_one_and_zero_is_bitwise_one_of_the_two():
    rng = np.random.default_rng(0)
    c, u = (jnp.asarray(rng.normal(size=(3, V)), jnp.float32) for _ in range(2))
    c, u = c.at[0, 0].set(-jnp.inf).at[1, 1].set(-0.0), u.at[0, 1].set(-jnp.inf).at[1, 2].set(-0.0)
    for scale in (1, 1.0, jnp.float32(1)):
        assert np.asarray(classifier_free(c, u, scale)).tobytes() == np.asarray(c).tobytes()
    for scale in (0, 0.0, jnp.float32(0)):
        assert np.asarray(classifier_free(c, u, scale)).tobytes() == np.asarray(u).tobytes()
    assert np.asarray(jax.jit(classifier_free)(c, u, 1.0)).tobytes() == np.asarray(c).tobytes()


def test_guided_logits_are_the_product_of_powers():
    rng = np.random.default_rng(1)
    c, u = (rng.normal(size=(3, V)).astype(np.float32) for _ in range(2))
    for scale in (0.5, 3.0):
        power = softmax(u) ** (1 - scale) * softmax(c) ** scale
        got = softmax(classifier_free(jnp.asarray(c), jnp.asarray(u), scale))
        np.testing.assert_allclose(got, power / power.sum(-1, keepdims=True), rtol=1e-4)


CLASSES = DataSpec((4,), "tokens", levels=W, n_classes=2, step="symbol", name="toy")


def of_class(params, state, n, cond, dropped):
    logits = jnp.where(dropped[:, None], 0.0, jax.nn.one_hot(cond, W) * 4)
    return logits, logits


@pytest.mark.slow
def test_the_generator_of_a_family_guides_and_refuses_what_does_not_fit():
    def stay(params, state, carry, x, cond, dropped):
        return carry, carry

    def draw(key, outputs):
        return jax.random.categorical(key, outputs).astype(jnp.int32)

    run = make_generate(CLASSES, of_class, stay, draw, context=4)
    cond, key = jnp.asarray([0, 1] * 500), jax.random.key(0)

    def rate(**options):
        return float((run({}, {}, key, 1000, cond, **options) == cond[:, None]).mean())

    for scale, logit in ((0.0, 0.0), (1.0, 4.0), (0.5, 2.0)):
        p = np.exp(logit) / (np.exp(logit) + 2)
        assert abs(rate(guidance=scale) - p) < 4 * np.sqrt(p * (1 - p) / 4000), scale
    assert rate(guidance=1.0) == rate()
    assert run({}, {}, key, 2, cond[:2], length=2).shape == (2, 2)
    for options, message in (
        ({"length": 5}, "from 1 to 4"),
        ({"length": 0}, "from 1 to 4"),
        ({"prompt": jnp.zeros((1000, 5), jnp.int32)}, "does not fit"),
        ({"prompt": jnp.zeros((2, 2), jnp.int32)}, r"shape \[1000, steps\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            run({}, {}, key, 1000, cond, **options)
    for spec in (
        DataSpec((4,), "tokens", levels=W, step="symbol"),
        DataSpec((4, 1), "continuous", n_classes=2, step="row"),
    ):
        labels = cond[:2] if spec.conditional else None
        with pytest.raises(ConfigError, match="Guidance needs a condition and logits"):
            make_generate(spec, of_class, stay, draw)({}, {}, key, 2, labels, guidance=2.0)
