"""Numbers mean the same however they come (issue of trust, A7): as Python's, numpy's or jax's,
traced, or one for each example of a vmap; and what is out of range where it can be seen is refused.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from gates import quick

from genjax import Batch, DataSpec, diffusion, gan, rnn, training, transformer, vae
from genjax.errors import ConfigError, DataError
from genjax.learning.transforms import compiled
from genjax.parts.decoding import beam_search, sampler
from genjax.parts.pairing import assignment, squared_distances
from genjax.parts.rules import min_p, repetition_penalty, temperature, top_k, top_p
from genjax.runs.api import Run

LOGITS = jnp.asarray([[1.0, 2.0, 0.0], [0.5, -1.0, 0.25]])
BEST = [1, 0]
NONE = jnp.zeros((2, 3), jnp.int32)

# --- temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "zero", [0, 0.0, -0.0, np.float32(0), np.float64(0), np.int64(0), np.zeros(()), 1e-45, 1e-300]
)
def test_a_temperature_of_zero_is_greedy_whatever_it_is_made_of(zero):
    kept = np.isfinite(temperature(zero)(LOGITS, NONE))
    np.testing.assert_array_equal(kept.argmax(1), BEST)
    np.testing.assert_array_equal(kept.sum(1), 1)


def test_a_traced_temperature_of_zero_is_greedy_and_any_other_divides():
    def rule(t, logits):
        return temperature(t)(logits, NONE)

    def drawn(t, key):
        return sampler(temperature(t))(key, LOGITS, NONE)

    for zero in (jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.float32(1e-40)):
        np.testing.assert_array_equal(np.isfinite(quick(rule)(zero, LOGITS)).argmax(1), BEST)
    for seed in range(20):
        np.testing.assert_array_equal(quick(drawn)(jnp.zeros(()), jax.random.key(seed)), BEST)
    np.testing.assert_array_equal(quick(rule)(jnp.float32(2), LOGITS), LOGITS / 2)
    # One for each of three runs: two that are greedy, and one that is not.
    runs = quick(jax.vmap(rule, in_axes=(0, None)))(jnp.asarray([0.0, 1.0, 0.0]), LOGITS)
    np.testing.assert_array_equal(np.isfinite(runs).sum((1, 2)), [2, 6, 2])
    np.testing.assert_array_equal(runs[1], LOGITS)


@pytest.mark.parametrize("t", [0.01, 1e-20, 1e-37])
def test_a_small_temperature_keeps_the_best_and_is_never_nan(t):
    for rule in (temperature(t), lambda logits, counts: temperature(jnp.float32(t))(logits, None)):
        p = np.asarray(jax.nn.softmax(quick(rule)(LOGITS, NONE)))
        np.testing.assert_array_equal(p.argmax(1), BEST)
        np.testing.assert_allclose(p.max(1), 1, rtol=1e-6)


@pytest.mark.parametrize("bad", [-1, -1e-9, np.float32(-0.5), float("nan"), float("inf"), "hot"])
def test_a_temperature_that_is_none_is_refused(bad):
    with pytest.raises(ConfigError, match="The temperature must be 0"):
        temperature(bad)


# --- what is cut off ------------------------------------------------------------------------------


def kept_exactly(logits, p):
    """The smallest set whose probabilities, in float64 and from the small end, add up to p."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, axis=-1, kind="stable")
    ordered = np.take_along_axis(logits, order, -1)
    q = np.exp(ordered - ordered.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    behind = np.cumsum(q[:, ::-1], axis=-1)[:, ::-1]  # it and all that are less probable
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, order, behind > 1 - p, axis=-1)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.3, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("traced", [False, True])
def test_top_p_keeps_the_set_of_float64(p, traced):
    """Of 2,000 rows of 97, near p = 1 as well; rows on the border of rounding (a relative 1e-4 of
    the cut) may go either way.
    """
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(2000, 97))).astype(np.float32)
    if traced:
        p = np.float32(p)
        found = np.isfinite(quick(lambda p, x: top_p(p)(x, None))(p, logits))
    else:
        found = np.isfinite(top_p(p)(jnp.asarray(logits), None))
    p = float(p)
    slack = 1e-6 * p + 1e-4 * (1 - p)
    inside, outside = (
        kept_exactly(logits, p - slack),
        kept_exactly(logits, min(p + slack, 1 - 1e-15)),
    )
    assert np.all(inside <= found)
    assert np.all(found <= outside)
    same = (found == kept_exactly(logits, p)).all(1)
    assert same.mean() > 0.995


@pytest.mark.slow
@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), jnp.ones(())])
def test_top_p_of_one_changes_nothing(one):
    logits = jnp.asarray([[0.0, -200.0, 3.0]])  # whose second has probability 0 in float32
    np.testing.assert_array_equal(top_p(one)(logits, None), logits)
    np.testing.assert_array_equal(quick(lambda p: top_p(p)(logits, None))(jnp.ones(())), logits)


@pytest.mark.parametrize("k", [1, 2, 3, 50])
def test_a_traced_k_is_the_same_as_a_known_one(k):
    known = top_k(k)(LOGITS, NONE)
    np.testing.assert_array_equal(top_k(np.int64(k))(LOGITS, NONE), known)
    np.testing.assert_array_equal(quick(lambda k: top_k(k)(LOGITS, NONE))(jnp.int32(k)), known)


def test_other_rules_mean_the_same_traced():
    counts = jnp.asarray([[1, 0, 0], [0, 2, 0]])
    for rule, value in ((min_p, 0.4), (repetition_penalty, 1.5)):
        known = rule(value)(LOGITS, counts)
        found = quick(lambda v, rule=rule: rule(v)(LOGITS, counts))(jnp.float32(value))
        np.testing.assert_allclose(found, known, rtol=1e-6)
        np.testing.assert_array_equal(rule(np.float32(value))(LOGITS, counts), known)


# --- beams ----------------------------------------------------------------------------------------


@functools.partial(quick, static_argnames=("n_beams", "n_steps", "end", "penalty"))
def beams_of(table, n_beams, n_steps, end, penalty=0.0):
    """Beam search on a chain whose next logits are row `token + 1` of the table."""

    def advance(carry, x):
        return table[x + 1], carry

    first = table[:1]
    return beam_search(advance, first, jnp.zeros((1,)), n_beams, n_steps, end, penalty)


def best_by_hand(table, n_steps, end, penalty=0.0):
    """The largest penalised ln p of all sequences, and its own ln p."""
    table = np.asarray(table, np.float64)
    scored = []
    for sequence in itertools.product(range(table.shape[1]), repeat=n_steps):
        row, total, length = 0, 0.0, 0
        for token in sequence:
            total, length, row = total + table[row, token], length + 1, token + 1
            if token == end:
                break
        if all(token == end for token in sequence[length:]):
            scored.append((total / ((5 + length) / 6) ** penalty, total))
    return max(scored)


@pytest.mark.slow
def test_beams_that_have_ended_are_kept_apart():
    with np.errstate(divide="ignore"):
        table = np.log(
            [
                [0.3, 0.7, 0, 0, 0],
                [0, 0.5, 0.5, 0, 0],
                [0, 0.25, 0.25, 0.25, 0.25],
            ]
        )
        # Rows for tokens that nothing leads to twice.
        table = np.concatenate([table, np.log(np.full((3, 5), 0.2))])
    tokens, log_prob = beams_of(table, 2, 3, end=0)
    assert np.exp(log_prob[0, 0]) == pytest.approx(0.30)
    np.testing.assert_array_equal(tokens[0, 0], [0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_no_wide_beam_is_worse_than_the_best_of_all_sequences(penalty):
    rng = np.random.default_rng(1)
    for _ in range(5):
        table = np.asarray(jax.nn.log_softmax(2 * rng.normal(size=(5, 4))), np.float32)
        _, log_prob = beams_of(table, 64, 4, end=0, penalty=penalty)
        assert float(log_prob[0, 0]) == pytest.approx(
            best_by_hand(table, 4, 0, penalty)[1], abs=1e-5
        )


def beams_by_hand(table, n_beams, n_steps, end, penalty):
    """The best sequences of a search that keeps so many that go on, and so many that ended."""
    table = np.asarray(table, np.float64)

    def worth(one):
        sequence, total = one
        return total / ((5 + len(sequence)) / 6) ** penalty

    live, ended = [((), 0.0)], []
    for _ in range(n_steps):
        longer = [
            ((*sequence, token), total + table[sequence[-1] + 1 if sequence else 0, token])
            for sequence, total in live
            for token in range(table.shape[1])
        ]
        just = [one for one in longer if one[0][-1] == end]
        ended = sorted([*ended, *just], key=worth)[::-1][:n_beams]
        live = sorted((one for one in longer if one[0][-1] != end), key=worth)[::-1][:n_beams]
    return sorted([*ended, *live], key=worth)[::-1][:n_beams]


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 0.8])
@pytest.mark.parametrize("n_beams", [1, 2, 3])
def test_narrow_beams_are_those_of_a_search_by_hand(n_beams, penalty):
    rng = np.random.default_rng(2)
    for _ in range(5):
        table = np.asarray(jax.nn.log_softmax(2 * rng.normal(size=(5, 4))), np.float32)
        tokens, log_prob = beams_of(table, n_beams, 4, end=0, penalty=penalty)
        wanted = beams_by_hand(table, n_beams, 4, 0, penalty)
        np.testing.assert_allclose(log_prob[0], [total for _, total in wanted], atol=1e-5)
        # Of a chain other orders of the same steps are worth the same: the tokens by their sum.
        rows = np.pad(tokens[0] + 1, ((0, 0), (1, 0)))[:, :-1]
        going = np.pad(tokens[0] != 0, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
        sums = np.where(going, table[rows, tokens[0]], 0).sum(1)
        np.testing.assert_allclose(log_prob[0], sums, atol=1e-5)


# --- pairing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [0.0, 1e2, 1e4])
def test_one_far_point_takes_nothing_from_the_others(far):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(64, 2)), rng.normal(size=(64, 2))
    x[5] += far
    cost = np.asarray(squared_distances(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)))
    exact = ((x[:, None] - y[None]) ** 2).sum(-1)
    found = np.asarray(quick(assignment)(cost))
    assert sorted(found) == list(range(64))
    rows, columns = scipy.optimize.linear_sum_assignment(exact)
    others = np.arange(64) != 5
    assert exact[rows, found][others].sum() <= 1.001 * exact[rows, columns][others].sum() + 1e-3


# --- values ---------------------------------------------------------------------------------------

TOKENS = DataSpec((5,), "tokens", levels=4, step="character")
LEVELS = DataSpec((3,), "discrete", levels=5)
BITS = DataSpec((3,), "binary")
REALS = DataSpec((3,), "continuous")

TINY = {
    "rnn": (TOKENS, lambda spec: rnn(spec, d_hidden=4)),
    "transformer": (
        TOKENS,
        lambda spec: transformer(spec, d_model=4, n_layers=1, n_heads=1, position="learned"),
    ),
    "vae": (LEVELS, lambda spec: vae(spec, latent_dim=1, hidden=(4,))),
    "bits": (BITS, lambda spec: vae(spec, latent_dim=1, hidden=(4,))),
    "diffusion": (REALS, lambda spec: diffusion(spec, hidden=(4,))),
    "gan": (REALS, lambda spec: gan(spec, latent_dim=1, hidden=(4,))),
}
I32, F32 = jnp.int32, jnp.float32
WRONG = {
    "a token below 0": ("rnn", jnp.zeros((2, 5), I32).at[1, 2].set(-1), "-1 at index"),
    "a token of V": ("transformer", jnp.zeros((2, 5), I32).at[0, 4].set(4), "from 0 to 3"),
    "tokens as numpy's int64": ("rnn", np.full((2, 5), 2**40), "from 0 to 3"),
    "a level below 0": ("vae", jnp.zeros((2, 3)).at[1, 2].set(-1), "from 0 to 4"),
    "a level too large": ("vae", jnp.zeros((2, 3)).at[1, 2].set(5), "from 0 to 4"),
    "half a level": ("vae", jnp.zeros((2, 3)).at[1, 2].set(0.5), "0.5 at index"),
    "a bit of 2": ("bits", jnp.zeros((2, 3)).at[0, 0].set(2), "from 0 to 1"),
    "nan": ("diffusion", jnp.zeros((2, 3)).at[0, 0].set(jnp.nan), "finite"),
    "infinity": ("gan", jnp.zeros((2, 3)).at[0, 0].set(jnp.inf), "finite"),
    "an axis too few": ("diffusion", jnp.zeros((3,)), "must have shape"),
    "another size": ("vae", jnp.zeros((2, 4)), "must have shape"),
    "an axis too many": ("gan", jnp.zeros((2, 3, 1)), "must have shape"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_events_that_the_data_cannot_have_are_refused_where_they_are_known(case):
    name, x, message = WRONG[case]
    spec, build = TINY[name]
    model = build(spec)
    params, state = model.init(jax.random.key(0))
    player = next(iter(model.losses))
    with pytest.raises(DataError, match=message):
        model.losses[player](params, state, Batch(x), jax.random.key(1), jnp.int32(0))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in WRONG if WRONG[case][0] != "gan"])
def test_a_run_refuses_events_that_its_data_cannot_have(case):
    """What is compiled does not know its values: they are looked at before."""
    name, x, message = WRONG[case]
    spec, build = TINY[name]
    model = build(spec)
    run = Run(model, *model.init(jax.random.key(0)), step=0)
    score = run.bound if model.log_prob is None else run.log_prob
    with pytest.raises(DataError, match=message.replace("have shape", "be")):
        score(np.asarray(x))
    if model.latent is not None:
        with pytest.raises(DataError, match=message.replace("have shape", "be")):
            run.encode(np.asarray(x))


@pytest.mark.parametrize("x", [np.full((2, 5), 0.5), np.full((2, 5), np.nan), np.full((2, 5), "a")])
def test_tokens_of_a_run_that_are_no_whole_numbers_are_refused(x):
    spec, build = TINY["rnn"]
    model = build(spec)
    with pytest.raises(DataError, match="must be"):
        Run(model, *model.init(jax.random.key(0)), step=0).log_prob(x)


def test_latents_that_are_none_are_refused():
    spec, build = TINY["bits"]
    model = build(spec)
    run = Run(model, *model.init(jax.random.key(0)), step=0)
    for z in (np.full((2, 1), np.nan), np.zeros((2, 3))):
        with pytest.raises(DataError, match="z must"):
            run.decode(z)


@pytest.mark.slow
def test_labels_of_scores_stay_with_their_examples():
    spec = DataSpec((3,), "continuous", n_classes=3, class_names=("1", "2", "30"))
    model = vae(spec, latent_dim=1, hidden=(4,))
    told = model._replace(bound=lambda params, state, batch, key: batch.cond.astype("f"))
    run = Run(told, *model.init(jax.random.key(0)), step=0)
    for y in ([30, 1, 2, 1], np.array([30, 1, 2, 1])):
        assert run.bound(np.zeros((4, 3)), y).nats.tolist() == [2, 0, 1, 0]


@pytest.mark.slow
def test_sequences_of_another_length_than_the_table_of_positions_are_refused():
    spec, build = TINY["transformer"]
    model = build(spec)
    params, state = model.init(jax.random.key(0))
    key = jax.random.key(1)
    assert model.log_prob(params, state, Batch(jnp.zeros((1, 5), I32)), key).shape == (1,)
    for steps in (3, 6):
        with pytest.raises(DataError, match="must have shape"):
            model.log_prob(params, state, Batch(jnp.zeros((1, steps), I32)), key)


# --- a state that is gone -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_donated_state_that_is_used_again_says_so():
    spec, build = TINY["vae"]
    model = build(spec)
    t = compiled(training(model, {"vae": optax.sgd(0.1)}))
    batch = Batch(jnp.zeros((4, 3)))
    first = t.init(jax.random.key(0))
    kept = jax.tree.map(jnp.copy, first)
    second, _ = t.step(first, batch)
    with pytest.raises(
        ConfigError, match=r"donates it.*Go on with the state that the step returned"
    ):
        t.step(first, batch)
    with pytest.raises(ConfigError, match="donates it"):
        model.sample(first.params, first.state, jax.random.key(1), 2)
    # The advice works: the returned state goes on, and so does a copy.
    t.step(second, batch)
    t.step(kept, batch)
