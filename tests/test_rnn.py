"""The recurrent family: probabilities that sum to one, causality, padding, windows of long streams,
and what is sampled.
"""

import functools
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from gates import assert_close, assert_same, quick
from rows import grown, widen

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.rnn import rnn
from genjax.families.ssm import ssm
from genjax.families.transformer import transformer
from genjax.parts.likelihoods import emission
from genjax.protocol import Batch, DataSpec
from genjax.runs.stages import opened
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

TINY = {"d_embed": 5, "d_hidden": 6}
WORDS = DataSpec((4,), "tokens", levels=3, step="character", end=2, name="words")
LABELLED = DataSpec((4,), "tokens", levels=3, step="character", n_classes=2, name="labelled words")
ROLLS = DataSpec((5, 3), "binary", step="frame", lengths=True, name="rolls")
CURVES = DataSpec((4, 2), "continuous", step="point", cond_dim=2, name="curves")
ROWS = DataSpec((3, 2), "discrete", levels=4, step="row", name="rows")
KEY = jax.random.key(11)


@functools.cache
def setup(spec, wide=True, **settings):
    """Model, parameters away from their init, and state; in float64 if `wide`."""
    model = rnn(spec, **{**TINY, **settings})
    params, state = model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 4 * leaf, grown(params))  # so that it is far from uniform
    return (model, widen(params), widen(state)) if wide else (model, params, state)


def wide_batch(spec, n, seed=1):
    batch = widen(example_batch(spec, jax.random.key(seed), n))
    return batch._replace(length=None if batch.length is None else batch.length.astype(int))


def every(levels, steps):
    return jnp.asarray(list(itertools.product(range(levels), repeat=steps)), jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["vanilla", "lstm", "gru"])
@pytest.mark.parametrize("spec", [WORDS, LABELLED], ids=lambda spec: spec.name)
def test_probabilities_of_all_sequences_sum_to_one(spec, cell, x64):
    model, params, state = setup(spec, cell=cell, n_layers=2)
    x = every(3, 4)
    if spec.end is not None:  # sequences that differ in their padding are one and the same
        padded = [
            np.where(np.cumsum([0, *(row[:-1] == spec.end)]) > 0, spec.end, row)
            for row in np.asarray(x)
        ]
        x = jnp.asarray(np.unique(padded, axis=0))
        assert len(x) == 31  # 1 + 2 + 4 + 8 that end, and 16 that go on
    score = quick(model.log_prob)
    for label in range(spec.n_classes or 1):
        cond = jnp.full(len(x), label, jnp.int32) if spec.n_classes else None
        p = np.exp(score(params, state, Batch(x, cond), KEY))
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
        assert p.max() > 3 * p.mean()


@pytest.mark.slow
def test_discrete_rows_sum_to_one(x64):
    model, params, state = setup(DataSpec((2, 2), "discrete", levels=3, step="row"))
    x = every(3, 4).reshape(-1, 2, 2).astype(jnp.float64)
    np.testing.assert_allclose(
        np.exp(model.log_prob(params, state, Batch(x), KEY)).sum(), 1, rtol=1e-12
    )


@pytest.mark.slow
def test_a_mixture_of_gaussians_integrates_to_one_and_one_component_is_a_gaussian(x64):
    spec = DataSpec((2, 1), "continuous", step="point")
    model, params, state = setup(spec, n_components=3)
    grid = jnp.linspace(-60, 60, 12_001)
    x = jnp.stack([jnp.full_like(grid, 0.7), grid], axis=1)[..., None]
    steps = quick(model.autoregressive.step_log_prob)(params, state, Batch(x))
    np.testing.assert_allclose(np.exp(steps[:, 1]).sum() * (grid[1] - grid[0]), 1, rtol=1e-6)
    model, params, state = setup(CURVES)
    batch = wide_batch(CURVES, 3)
    outputs, _ = model.autoregressive.begin(params, state, 3, batch.cond)
    mean, raw = outputs[:, 1:3], outputs[:, 3:]
    wanted = scipy.stats.norm.logpdf(
        batch.x[:, 0], mean, np.exp(-7 + np.log1p(np.exp(raw + 7)))
    ).sum(-1)
    got = model.autoregressive.step_log_prob(params, state, batch)[:, 0]
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [WORDS, LABELLED, ROLLS, CURVES, ROWS], ids=lambda spec: spec.name)
def test_one_step_at_a_time_equals_the_whole_sequence(spec, x64):
    """What `begin` and `advance` say of each next event is what `log_prob` adds up, with and
    without the condition.
    """
    model, params, state = setup(spec, n_layers=2, n_components=2, cond_dropout=1 - 1e-9)
    batch, n = wide_batch(spec, 4), 4
    begin, advance = (
        quick(getattr(model.autoregressive, name), static_argnums=(2,) if name == "begin" else ())
        for name in ("begin", "advance")
    )
    log_prob = quick(model.autoregressive.step_log_prob)(params, state, batch)
    emit = quick(emission(spec, 2).log_prob)

    def walk(dropped):
        outputs, carry = begin(params, state, n, batch.cond, dropped)
        nats = [emit(batch.x[:, 0], outputs)]
        for t in range(1, spec.shape[0]):
            outputs, carry = advance(params, state, carry, batch.x[:, t - 1], batch.cond, dropped)
            nats.append(emit(batch.x[:, t], outputs))
        return np.where(log_prob == 0, 0, np.stack(nats, axis=1))

    np.testing.assert_allclose(walk(None), log_prob, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        np.sum(log_prob, 1), quick(model.log_prob)(params, state, batch, KEY), rtol=1e-13
    )
    without = walk(jnp.ones(n, bool))
    loss, aux = quick(model.losses["rnn"])(params, state, batch, KEY, 0)  # no condition is left
    np.testing.assert_allclose(loss, -without.sum(1), rtol=1e-12)
    np.testing.assert_allclose(
        aux.metrics["nats_per_step"],
        np.asarray(loss) / np.asarray(log_prob != 0).sum(1),
        rtol=1e-12,
    )
    assert spec.conditional == bool(np.abs(without - log_prob).max() > 1e-3)


@pytest.mark.slow
def test_no_step_sees_its_future(x64):
    model, params, state = setup(DataSpec((5, 3), "binary", step="frame"), n_layers=2)
    x = wide_batch(model.spec, 1).x
    jacobian = quick(
        jax.jacrev(lambda x: model.autoregressive.step_log_prob(params, state, Batch(x))[0])
    )(x)[:, 0]
    size = np.abs(jacobian).max(-1)  # of the derivative of step t with respect to event s
    np.testing.assert_array_equal(size[np.triu_indices(5, 1)], 0)
    assert size[np.tril_indices(5)].min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", [WORDS, ROLLS], ids=lambda spec: spec.name)
def test_padding_changes_neither_values_nor_gradients(spec, x64):
    model, params, state = setup(spec, n_layers=2)
    if spec.end is not None:
        batch = Batch(jnp.asarray([[0, 1, 2, 2], [2, 2, 2, 2], [1, 0, 1, 0]], jnp.int32))
        other = Batch(jnp.asarray([[0, 1, 2, 0], [2, 1, 0, 1], [1, 0, 1, 0]], jnp.int32))
    else:
        batch = wide_batch(spec, 3)._replace(length=jnp.asarray([2, 5, 1]))
        counts = jnp.arange(5)[None] < batch.length[:, None]
        other = batch._replace(x=jnp.where(counts[..., None], batch.x, 1e6))
    value = quick(
        jax.value_and_grad(lambda p, batch: model.losses["rnn"](p, state, batch, KEY, 0)[0].sum())
    )
    assert_same(value(params, other), value(params, batch))
    assert_same(
        model.autoregressive.step_log_prob(params, state, other),
        model.autoregressive.step_log_prob(params, state, batch),
    )
    if spec.end is None:  # nor does their amount: the same sequences cut to 2 steps
        short, _, _ = setup(
            DataSpec((2, 3), "binary", step="frame", lengths=True, name="short rolls"), n_layers=2
        )
        keep = jnp.asarray([0, 2])
        cut = Batch(batch.x[keep, :2], length=batch.length[keep])
        whole = model.log_prob(params, state, batch, KEY)[keep]
        np.testing.assert_allclose(short.log_prob(params, state, cut, KEY), whole, rtol=1e-13)


# --- windows of long streams ----------------------------------------------------------------------

LONG = DataSpec((12,), "tokens", levels=3, step="character")
WINDOW = DataSpec((4,), "tokens", levels=3, step="character")


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_windows_with_a_carried_state_are_the_long_sequence(cell, x64):
    whole, params, nothing = setup(LONG, cell=cell, n_layers=2)
    model, _, start = setup(WINDOW, cell=cell, n_layers=2, lanes=2)
    x = example_batch(LONG, jax.random.key(3), 2).x
    wanted = quick(whole.autoregressive.step_log_prob)(params, nothing, Batch(x))
    loss, state = quick(model.losses["rnn"]), start
    for part in range(3):
        value, (state, _) = loss(params, state, Batch(x[:, 4 * part : 4 * part + 4]), KEY, 0)
        np.testing.assert_allclose(value, -wanted[:, 4 * part : 4 * part + 4].sum(1), rtol=1e-12)
    carry, nats = None, []
    for part in range(3):
        one, carry = model.autoregressive.stream(
            params, carry, Batch(x[:, 4 * part : 4 * part + 4])
        )
        nats.append(one)
    np.testing.assert_allclose(jnp.concatenate(nats, axis=1), wanted, rtol=0, atol=1e-12)
    assert_close(carry, state["rnn"], rtol=1e-12)


@pytest.mark.slow
def test_the_gradient_of_one_window_is_the_full_one_and_stops_at_its_edge(x64):
    model, params, start = setup(WINDOW, lanes=2)
    whole, _, nothing = setup(WINDOW)
    long, _, _ = setup(LONG)
    x = example_batch(LONG, jax.random.key(3), 2).x
    gradient = quick(
        jax.grad(lambda p, state, x: model.losses["rnn"](p, state, Batch(x), KEY, 0)[0].sum())
    )
    full = jax.grad(lambda p: whole.losses["rnn"](p, nothing, Batch(x[:, :4]), KEY, 0)[0].sum())(
        params
    )
    assert_close(gradient(params, start, x[:, :4]), full, rtol=1e-12)
    # Over two windows, the gradient is that of the second with its carry held fixed: not that of
    # the long sequence.
    state = model.losses["rnn"](params, start, Batch(x[:, :4]), KEY, 0)[1].state
    cut = gradient(params, state, x[:, 4:8])
    fixed = jax.grad(
        lambda p: -model.autoregressive.stream(p, state["rnn"], Batch(x[:, 4:8]))[0].sum()
    )(params)
    assert_close(cut, fixed, rtol=1e-12)
    through = jax.grad(
        lambda p: -long.autoregressive.step_log_prob(p, nothing, Batch(x))[:, 4:8].sum()
    )(params)
    one, other = (tree["rnn"]["layers"]["layers"][0]["kernel"] for tree in (cut, through))
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.slow
def test_a_restarted_stream_begins_afresh():
    model, params, state = setup(WINDOW, wide=False, lanes=2000, restart=0.3, cell="gru")
    x = example_batch(WINDOW, jax.random.key(3), 1).x.repeat(2000, axis=0)
    loss = quick(model.losses["rnn"])
    first, (state, _) = loss(params, state, Batch(x), jax.random.key(0), 0)
    assert np.ptp(first) == 0
    second, _ = loss(params, state, Batch(x), jax.random.key(1), 0)
    afresh = np.isclose(second, first[0], rtol=1e-5)
    assert len(np.unique(np.asarray(second))) == 2
    assert abs(afresh.mean() - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 2000)


# --- sampling -------------------------------------------------------------------------------------


def chi_square(x, x_all, p, levels):
    """The p-value of how often each sequence came, given its probability; rare ones are counted
    together.
    """

    def code(x):
        return (np.asarray(x) * levels ** np.arange(x.shape[1])).sum(1)

    values, counts = np.unique(code(x), return_counts=True)
    observed = np.zeros(len(p))
    index = {value: i for i, value in enumerate(code(x_all).tolist())}
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        observed[index[value]] = count
    expected = np.asarray(p, np.float64) * len(x)
    rare = expected < 5
    if rare.any():
        observed, expected = (np.append(a[~rare], a[rare].sum()) for a in (observed, expected))
    return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.slow
def test_samples_follow_the_enumerated_law_and_a_prompt_its_conditional_law():
    spec = DataSpec((3,), "tokens", levels=3, step="character", end=2)
    model, params, state = setup(spec, wide=False, cell="gru")
    x_all = np.unique(
        [np.where(np.cumsum([0, *(row[:-1] == 2)]) > 0, 2, row) for row in np.asarray(every(3, 3))],
        axis=0,
    )
    p = np.exp(model.log_prob(params, state, Batch(jnp.asarray(x_all)), KEY))
    n = 20_000
    generate = quick(model.autoregressive.generate, static_argnums=3)
    x = generate(params, state, jax.random.key(4), n)
    assert x.dtype == jnp.int32
    assert chi_square(x, x_all, p, 3) > 1e-3
    assert chi_square(x, x_all, p[::-1], 3) < 1e-9  # it can tell
    prompt = jnp.full((n, 2), 1, jnp.int32).at[:, 1].set(0)
    x = generate(params, state, jax.random.key(5), n, prompt=prompt, prompt_length=jnp.asarray(1))
    assert (x[:, 0] == 1).all()
    given = x_all[:, 0] == 1
    assert chi_square(x, x_all[given], p[given] / p[given].sum(), 3) > 1e-3


@pytest.mark.slow
def test_guidance_of_scale_1_is_the_conditional_and_0_the_unconditional_model():
    model, params, state = setup(LABELLED, wide=False, cond_dropout=0.1)
    cond = jnp.asarray([0, 1] * 50, jnp.int32)
    generate = quick(model.autoregressive.generate, static_argnums=3)
    plain = model.sample(params, state, KEY, 100, cond)
    assert_same(generate(params, state, KEY, 100, cond, guidance=jnp.asarray(1.0)), plain)
    without = generate(params, state, KEY, 100, cond, guidance=jnp.asarray(0.0))
    assert_same(generate(params, state, KEY, 100, 1 - cond, guidance=jnp.asarray(0.0)), without)
    assert (np.asarray(without) != np.asarray(plain)).any()


# --- training mode --------------------------------------------------------------------------------


@pytest.mark.slow
def test_dropout_is_for_losses_only():
    model, params, state = setup(ROLLS, wide=False, dropout=0.4)
    plain, _, _ = setup(ROLLS, wide=False)
    batch = example_batch(ROLLS, jax.random.key(1), 4)
    score = quick(model.log_prob)
    assert_same(
        score(params, state, batch, jax.random.key(0)),
        score(params, state, batch, jax.random.key(1)),
    )
    assert_close(
        score(params, state, batch, KEY),
        -plain.losses["rnn"](params, state, batch, KEY, 0)[0],
        rtol=1e-6,
    )
    loss = quick(lambda key: model.losses["rnn"](params, state, batch, key, 0)[0])
    assert (loss(jax.random.key(0)) != loss(jax.random.key(1))).all()


@pytest.mark.slow
def test_conditions_are_dropped_at_the_rate_that_was_asked_for():
    model, params, state = setup(LABELLED, wide=False, cond_dropout=0.2)
    n = 4000
    x, cond = jnp.zeros((n, 4), jnp.int32), jnp.ones(n, jnp.int32)
    loss, _ = quick(model.losses["rnn"])(params, state, Batch(x, cond), KEY, 0)
    given = -model.log_prob(params, state, Batch(x[:1], cond[:1]), KEY)[0]
    assert len(np.unique(np.asarray(loss))) == 2
    rate = 1 - np.isclose(loss, given, rtol=1e-5).mean()
    assert abs(rate - 0.2) < 3 * math.sqrt(0.2 * 0.8 / n)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "settings", "match"),
    [
        (DataSpec((4,), "continuous", name="points"), {}, "points has no steps"),
        (WINDOW, {"cell": "lsmt"}, "no cell called 'lsmt'"),
        (WINDOW, {"d_hidden": 0}, "d_hidden must be at least 1; got 0"),
        (WINDOW, {"n_layers": 0}, "n_layers must be at least 1; got 0"),
        (WINDOW, {"d_embed": 2.5}, "d_embed must be a whole number; got 2.5"),
        (WINDOW, {"forget_bias": float("inf")}, "forget_bias must be finite; got inf"),
        (WINDOW, {"d_hiden": 8}, "no setting of rnn called 'd_hiden'. Did you mean d_hidden"),
        (WINDOW, {"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        (WINDOW, {"cond_dropout": -0.1}, "cond_dropout must be in"),
        (WINDOW, {"dtype": "float8"}, "no dtype called 'float8'"),
        (WINDOW, {"lanes": -1}, "lanes must be at least 0; got -1"),
        (WORDS, {"lanes": 2}, "got lanes=2 with sequences that end"),
        (ROLLS, {"lanes": 2}, "got lanes=2 with sequences that end"),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(spec, settings, match):
    with pytest.raises(ConfigError, match=match):
        rnn(spec, **settings)


@pytest.mark.slow
def test_a_batch_that_does_not_fill_the_lanes():
    model, params, state = setup(WINDOW, wide=False, lanes=2)
    with pytest.raises(
        ConfigError, match="carries the state of 2 streams, so a batch must hold 2 examples; got 3"
    ):
        model.losses["rnn"](params, state, example_batch(WINDOW, KEY, 3), KEY, 0)


def test_streams_are_of_batches_that_go_on_from_each_other():
    """A state is not carried on into a sequence of its own: by itself, where a row is put on other
    data, and else refused.
    """
    assert ZOO["lstm"].on("markov").model["lanes"] == 0
    # Nor is a file of sequences cut into windows of the row's stream.
    assert ZOO["lstm"].on("mine.npz").data_options == {}
    assert ZOO["lstm"].on("mine.bin").data_options["context"] == 64
    assert ZOO["lstm"].on("shakespeare").model == ZOO["lstm"].model
    with pytest.raises(ConfigError, match=r"do not go on from each other\. Say --lanes 0"):
        opened(replace(ZOO["lstm"], order="shuffle"))


@pytest.mark.parametrize("build", [
    partial(rnn, d_hidden=8),
    partial(transformer, d_model=8, n_layers=1, n_heads=2),
    partial(ssm, d_model=8, n_layers=1),
])  # fmt: skip
def test_narrow_arithmetic_begins_after_the_scale(build):
    """bfloat16 has no 999 and 1001 apart, which are two standard deviations here."""
    spec = DataSpec((8, 1), "continuous", step="hour", shift=(1000.0,), scale=(1.0,))
    model = build(spec, dtype="bfloat16")
    params, state = model.init(jax.random.key(0))
    x = jnp.full((1, 8, 1), 999.0)
    one, other = (model.autoregressive.outputs(params, state, y) for y in (x, x + 2))
    assert bool((jnp.abs(one - other)[:, 1:].max(-1) > 0).all())
