"""The gates of what `training` and its transforms do, over a covering set of models
(`rows.COVERING`): G2 to G5, G7 to G9, G11 to G13.

A further row of a family whose features are in the set needs nothing here. Models are `Recipe.tiny`
ones, on short sequences. Programs are compiled once per model and shared between gates. Those whose
speed and last bit say nothing are compiled without optimisation (`quick`), which halves the time;
where the bits of two programs are compared, they are compiled as users do.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rows
from gates import (
    assert_close,
    assert_same,
    by_hand,
    differ,
    member,
    named,
    optimised,
    quick,
    stack,
    structure,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from known_losses import said_by
from rows import (
    RATE,
    B,
    batch,
    covering,
    gradient,
    one_device,
    optimizer,
    plain,
    real,
    run,
    setup,
    widen,
)

from genjax.data import example_batch
from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.families.glow import glow
from genjax.families.made import made
from genjax.families.pixelcnn import pixelcnn
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.members import ensemble, sweep
from genjax.learning.sharding import shard
from genjax.learning.step import training
from genjax.learning.transforms import microbatch, repeat_steps, scan_steps
from genjax.protocol import Batch, step_mask

PARTS = 4
RATES = np.asarray([RATE, RATE / 4, RATE / 8], np.float32)
WEIGHT = np.asarray([1, 0, 2, 0.5, 0, 1, 3, 1], np.float32)


# Rows whose scanned steps equal single ones to rounding only, and to how much of it: in a loop, XLA
# sums the gradient of a convolution in another order. Two players that Adam moves by nearly the
# sign of a gradient pass more of it on (2e-6 to 5e-6).
SCANNED_TO_ROUNDING = {
    "vae-conv": 1e-6,
    "dcgan-mnist": 2e-5,
}


# Families whose steps are vectors of independent values, given the past: the first step has no past
# to be told apart by.
INDEPENDENT = {rnn, transformer}
# Builder arguments that make a family's score tight enough for G7, and that spare it time or noise
# there.
TIGHT = {
    vae: {"n_bound_samples": 32},
    diffusion: {"n_bound_samples": 32, "n_likelihood_steps": 20},
    flow_matching: {"n_likelihood_steps": 20},
    glow: {"n_bound_samples": 32},
}
# Losses that look at one noise level, or one draw of what is added, an example and step see each of
# the eight at as many as this.
COPIES = {diffusion: 8, flow_matching: 8, glow: 8}
ROOMY = {
    vae: {"hidden": (128, 128)},
    rnn: {"lanes": 0, "dropout": 0.0, "d_hidden": 128},
    transformer: {"dropout": 0.0, "cond_dropout": 0.0, "d_model": 64, "n_layers": 2},
    vrnn: {"dropout": 0.0, "d_hidden": 64},
    made: {"hidden": (128,)},
    glow: {"n_steps": 4, "channels": 32},
    pixelcnn: {"dropout": 0.0, "channels": 16, "n_layers": 4},
    # Noise has nothing for a convolution to use.
    diffusion: {"cond_dropout": 0.0, "guidance": None, "net": "mlp", "hidden": (128, 128)},
    flow_matching: {"cond_dropout": 0.0, "guidance": None, "net": "mlp", "hidden": (128, 128)},
}


@pytest.mark.bits
@covering
def test_g2_resume_is_bitwise(name, tmp_path):
    batches = [batch(name, seed) for seed in range(6)]
    t = real(name)
    straight, wanted = run(t.step, t.init(jax.random.key(0)), batches)
    half, first = run(t.step, t.init(jax.random.key(0)), batches[:3])
    Checkpoints(tmp_path).save(half)
    restored = Checkpoints(tmp_path).restore(jax.eval_shape(t.t.init, jax.random.key(1)))
    assert_same(restored.state, half)
    resumed, second = run(t.step, restored.state, batches[3:])
    assert_same(resumed, straight)
    assert_same(first + second, wanted)
    assert not np.array_equal(named(wanted[3]), named(wanted[4]))


@pytest.mark.bits
@covering
def test_g3_scanned_steps_are_the_same_steps(name):
    batches = [batch(name, seed) for seed in range(3)]
    t = real(name)
    wanted, metrics = run(t.step, t.init(jax.random.key(0)), batches)
    got, scanned = rows.whole(name)(scan_steps(t.t).step, donate_argnums=0)(
        t.init(jax.random.key(0)), stack(batches)
    )
    own = said_by(rows.MODELS[name].family, "SCANNED_TO_ROUNDING")
    rounding = SCANNED_TO_ROUNDING.get(name, own)
    compare = functools.partial(assert_close, rtol=rounding) if rounding else assert_same
    compare(got, wanted)
    compare(scanned, stack(metrics))


@covering
def test_g9_steps_neither_recompile_nor_change_the_state_structure(name):
    t = real(name)
    ts = t.init(jax.random.key(0))
    before = structure(ts)
    ts, _ = t.step(ts, batch(name))
    programs = t.step._cache_size()
    for seed in range(20):
        old = jax.tree.leaves(ts.params)[0]
        ts, _ = t.step(ts, batch(name, seed % 3))
        assert old.is_deleted(), "the state's buffers were not donated"
    assert structure(ts) == before
    assert t.step._cache_size() == programs
    assert int(ts.step) == 21


@covering
def test_a_step_that_is_not_finite_is_skipped(name):
    t, good = real(name), batch(name)
    ts, step = t.init(jax.random.key(0)), t.step
    kept = by_hand(np.copy, ts)
    if jnp.issubdtype(good.x.dtype, jnp.floating) and not rows.blind(name):
        bad = good._replace(x=good.x.at[(0,) * good.x.ndim].set(jnp.nan))
    else:  # another program, as the other batches of this row have no weights
        bad, step = (
            good._replace(weight=jnp.ones(B).at[0].set(jnp.nan)),
            quick(t.t.step, donate_argnums=0),
        )
    ts, metrics = step(ts, bad)
    assert float(metrics["skipped"]) == 1
    assert_same(ts, kept._replace(step=kept.step + 1))
    ts, metrics = t.step(ts, good)
    assert float(metrics["skipped"]) == 0
    assert differ(ts.params, kept.params)


def assert_members(name, t, rates, check_init):
    firsts, solos = rows.solo_runs(name, tuple(rates))
    first = stack(firsts)._replace(step=firsts[0].step)
    if check_init:
        assert_close(quick(t.init)(jax.random.split(jax.random.key(7), len(rates))), first)
    with jax.enable_x64(True):
        many, metrics = run(
            quick(t.step), widen(first), [widen(batch(name, seed)) for seed in range(4)]
        )
    for index, (wanted, wanted_metrics) in enumerate(solos):
        got = member(many._replace(step=np.repeat(many.step, len(rates))), index)
        assert_close(got, wanted, rtol=1e-9)
        assert_close([member(one, index) for one in metrics], wanted_metrics, rtol=1e-9)
    assert differ(member(many.params, 0), member(many.params, 1))


both_modes = pytest.mark.parametrize("mode", ["vmap", "map"])


@covering
@both_modes
def test_g4_members_with_keys_and_rates_of_their_own_equal_solo_runs(name, mode):
    model = setup(name).model
    t = sweep(lambda rate: training(model, optimizer(rate)), mode=mode, rate=RATES)
    assert_members(name, t, list(RATES), check_init=mode == "vmap")


@rows.a_few
@both_modes
def test_g4_an_ensemble_equals_solo_runs(name, mode):
    """A sweep without its rates, by the same function, so a few rows are enough."""
    assert_members(name, ensemble(plain(name).t, mode), [RATE] * 3, check_init=mode == "vmap")


@functools.cache
def accumulating(name):
    return quick(microbatch(plain(name).t, PARTS).step)


@rows.splitting
def test_g5_accumulated_gradients_equal_the_big_batch(name):
    """In float64: Adam moves a gradient that is nearly zero by its sign, which rounding decides."""
    big = quick(training(rows.in_chunks(setup(name).model, PARTS), optimizer()).step)
    first = plain(name).init(jax.random.key(0))
    with jax.enable_x64(True):
        start = widen(first)
        for weight in (np.ones(B), np.asarray(WEIGHT, np.float64)):
            batches = [widen(batch(name, seed))._replace(weight=weight) for seed in range(3)]
            got, wanted = run(accumulating(name), start, batches), run(big, start, batches)
            assert_close(got, wanted, rtol=1e-9)
            assert differ(got[0].params, start.params)


@covering
def test_g5_data_parallel_over_8_devices_equals_one(name):
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    start, *wanted = one_device(name)
    with jax.enable_x64(True):
        placed = jax.device_put(widen(start), NamedSharding(mesh, PartitionSpec()))
        step = quick(shard(plain(name).t, mesh).step).lower(placed, widen(batch(name))).compile()
        got = run(step, placed, [widen(batch(name, seed)) for seed in range(3)])
        assert_close(got, tuple(wanted), rtol=1e-9)
    assert "all-reduce" in step.as_text() or rows.blind(name)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(got)} == {8}


@rows.splitting
def test_padding_of_weight_zero_changes_nothing(name):
    start = plain(name).init(jax.random.key(0))
    good, other, masked = batch(name), batch(name, 1), WEIGHT == 0
    cond = (
        None
        if good.cond is None
        else jnp.where(masked.reshape(-1, *[1] * (good.cond.ndim - 1)), other.cond, good.cond)
    )
    rows = masked.reshape(-1, *[1] * (good.x.ndim - 1))
    fillings = [
        other.x,
        *([jnp.nan, jnp.inf] if jnp.issubdtype(good.x.dtype, jnp.floating) else []),
    ]
    batches = [
        good,
        *(Batch(jnp.where(rows, f, good.x), cond, None, good.length) for f in fillings),
    ]
    with jax.enable_x64(True):  # the program of the gate above
        weight = np.asarray(WEIGHT, np.float64)
        wanted, *others = (
            accumulating(name)(widen(start), widen(one)._replace(weight=weight)) for one in batches
        )
    for got in others:
        assert_same(got, wanted)


def independent_entropy(x):
    """What 8 first steps cost at least if the values within a step are independent: Σ_k H of the
    values at place k, in nats.
    """
    shares = [np.unique(column, return_counts=True)[1] / len(column) for column in x.T]
    return float(sum(-(p * np.log(p)).sum() for p in shares))


@rows.memorising
def test_g7_eight_examples_are_memorised_down_to_the_floor(name):
    """No model codes 8 distinct examples in fewer than ln 8 nats on average, ln (how many share
    what is given, a condition or a length) otherwise: Σ p <= 1. A bound that gets below is broken;
    a model that stays far above cannot learn. Densities have no such floor.
    """
    row, spec, n = rows.MODELS[name], setup(name).spec, 8
    if not said_by(row.family, "MEMORISES", default=True):
        pytest.skip("a family that cannot, as its own tests say")
    if (
        row.family in COPIES and spec.kind == "discrete"
    ):  # 784 bytes to the last bit would take many more steps
        spec = dataclasses.replace(spec, shape=(4, 4, 1), levels=17)
    model = row.build(spec, **ROOMY.get(row.family, {}))  # not the tiny one, which has no room
    if model.score is None:  # of which nothing but finite values is asked
        model, spec = setup(name).model, setup(name).spec
    eight = example_batch(spec, jax.random.key(5), n)
    counted = np.ones(eight.x.shape, bool)
    if spec.step:
        counted &= np.asarray(step_mask(spec, eight)).reshape(
            *eight.x.shape[:2], *[1] * (eight.x.ndim - 2)
        )
    given = [
        np.asarray(leaf).reshape(n, -1) for leaf in (eight.cond, eight.length) if leaf is not None
    ]
    given = np.concatenate([np.zeros((n, 1)), *given], axis=1)
    events = np.concatenate([given, np.where(counted, eight.x, -1).reshape(n, -1)], axis=1)

    def alike(rows):
        return (rows[:, None] == rows[None]).all(-1).sum(1)

    same = alike(given) / alike(events)
    floor = float(np.log(same).mean())
    if row.family in INDEPENDENT and eight.x.ndim > 2:
        floor = max(floor, independent_entropy(np.asarray(eight.x[:, 0]).reshape(n, -1)))
    tight = model
    if row.family in TIGHT:
        tight = row.build(spec, **ROOMY.get(row.family, {}), **TIGHT[row.family])
    score = tight.score
    keys = jax.random.split(
        jax.random.key(9), 1 if tight.log_prob else 8
    )  # exact, or a mean of draws

    @jax.jit
    def nats(params, state):  # means over the examples, one for each key
        return jax.lax.map(lambda key: -score(params, state, eight, key).mean(), keys)

    # Fitting 8 examples is a stiff problem: without the clipping, single gradients throw weights
    # far off.
    t = training(
        model,
        optax.chain(
            optax.adaptive_grad_clip(0.05), optax.adam(optax.cosine_decay_schedule(5e-3, 2000))
        ),
    )
    fast = (optimised if row.family in COPIES else jax.jit)(
        repeat_steps(t, 200).step, donate_argnums=0
    )
    many = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * COPIES.get(row.family, 1)), eight)
    ts = t.init(jax.random.key(0))
    before = after = None if score is None else np.asarray(nats(ts.params, ts.state)).mean()
    for _ in range(10):
        ts, metrics = fast(ts, many)
        assert all(np.isfinite(leaf).all() for leaf in named((metrics, ts)).values())
        if score is None:
            return
        values = np.asarray(nats(ts.params, ts.state))
        after = values.mean()
        if spec.kind != "continuous":
            assert after >= floor - 4 * values.std() / math.sqrt(len(values))
        print(f"step {int(ts.step)}: {before:.2f} -> {after:.2f} nats, floor {floor:.2f}")
        near = (
            after < before - 2
            if spec.kind == "continuous"
            else after - floor <= 0.1 * (before - floor)
        )
        if near:
            return
    pytest.fail(
        f"from {before:.2f} nats only to {after:.2f} in {int(ts.step)} steps; the floor is "
        f"{floor:.2f}"
    )


def _moved(own, direction, t):
    return jax.tree.map(lambda p, d: p + t * d, own, direction)


@rows.differentiable
def test_g8_gradients_equal_finite_differences(name):
    rng, h = np.random.default_rng(1), 1e-6  # small: a unit may have its kink within the step
    for player in setup(name).model.losses:
        own, value_and_grad = gradient(name, player)
        with jax.enable_x64(True):
            example = widen(batch(name))
            grads = jax.tree.map(np.asarray, value_and_grad(own, example)[1])
            size = math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
            for _ in range(3):
                # Of equal length in every leaf, so that a scalar counts as much as a matrix.
                direction = jax.tree.map(
                    lambda leaf: rng.normal(size=leaf.shape) / math.sqrt(leaf.size), own
                )
                moved = functools.partial(_moved, own, direction)
                numeric = float(
                    value_and_grad(moved(h), example)[0] - value_and_grad(moved(-h), example)[0]
                ) / (2 * h)
                exact = sum(
                    np.sum(g * d)
                    for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
                )
                np.testing.assert_allclose(numeric, exact, rtol=1e-5, atol=1e-7 * size)


@rows.narrowing
def test_g11_bfloat16_arithmetic_keeps_float32_parameters(name):
    """By the step that the row itself describes, which gates above have compiled in float32."""
    row = setup(name)
    model = {**row.recipe.model, "dtype": "bfloat16"}
    t = dataclasses.replace(row.recipe, model=model).training(row.on)
    start, batches = real(name).init(jax.random.key(0)), [batch(name, seed) for seed in range(3)]
    lowered = quick(t.step).lower(start, batches[0])
    assert "bf16" in lowered.as_text()
    ts, metrics = run(lowered.compile(), start, batches)
    assert structure(ts) == structure(start)
    assert structure(jax.eval_shape(t.init, jax.random.key(0))) == structure(start)
    _, wanted = real(name).step(start, batches[0])  # which takes the start's buffers
    for player in row.losses:
        np.testing.assert_allclose(
            metrics[0][f"{player}/loss"], wanted[f"{player}/loss"], rtol=0.05
        )
        assert all(np.isfinite(one[f"{player}/loss"]) for one in metrics)


@covering
def test_g12_everything_lowers_for_cpu_cuda_and_tpu(name):
    row, key, cond = setup(name), jax.random.key(0), batch(name).cond
    t = training(row.model, optimizer())
    programs = {
        "step": (t.step, (plain(name).init(key), batch(name))),
        "sample": (
            lambda params, state, key, cond: row.model.sample(params, state, key, B, cond),
            (row.params, row.state, key, cond),
        ),
    }
    if row.score:
        programs["score"] = (
            row.model.score,
            (row.params, row.state, batch(name), key),
        )
    for fun, args in programs.values():
        exported = jax.export.export(jax.jit(fun), platforms=["cpu", "cuda", "tpu"])(*args)
        assert exported.platforms == ("cpu", "cuda", "tpu")


@covering
def test_g13_no_key_is_used_twice(name):
    """One program with everything that takes a key, each part with its own; the check is of the
    traced program.
    """
    row, example = setup(name), batch(name)
    t = training(row.model, optimizer())

    @jax.jit  # traced once, for both checks
    def everything(key, batch):
        keys = iter(jax.random.split(key, 8 + len(row.losses)))
        params, state = row.model.init(next(keys))
        found = [loss(params, state, batch, next(keys), 0)[0] for loss in row.model.losses.values()]
        found += [
            score(params, state, batch, next(keys))
            for score in (row.model.log_prob, row.model.bound)
            if score
        ]
        found.append(row.model.sample(params, state, next(keys), B, batch.cond))
        return found, t.step(t.init(next(keys)), batch)

    with jax.debug_key_reuse(True):
        jax.eval_shape(everything, jax.random.key(0), example)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.eval_shape(
                lambda key: (everything(key, example), jax.random.split(key)), jax.random.key(0)
            )


@pytest.mark.slow
def test_the_features_of_every_row_are_in_the_covering_set():
    covered = set().union(*(rows.features(name) for name in rows.COVERING))
    lacking = {name: rows.features(name) - covered for name in rows.ZOO}
    assert {name: found for name, found in lacking.items() if found} == {}
