"""The gates that every row of the zoo has to pass, G1 to G14. To cover a new row, add it to the zoo
and do nothing here.

A new *family* adds one entry to `known_losses.ANALYTIC`, and to the tables below where they apply.
Models are `Recipe.tiny` ones, on short sequences. Programs are compiled once per row and shared
between gates. Those whose speed and last bit say nothing are compiled without optimisation
(`quick`), which halves the time; where the bits of two programs are compared, they are compiled as
users do.
"""

import dataclasses
import functools
import inspect
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
from known_losses import ANALYTIC
from rows import (
    RATE,
    B,
    batch,
    every_row,
    one_device,
    one_row_quick,
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
from genjax.families.gan import gan
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.members import ensemble, sweep
from genjax.learning.sharding import shard
from genjax.learning.step import training
from genjax.learning.transforms import microbatch, scan_steps
from genjax.protocol import Batch, InitFn, LossFn, SampleFn, ScoreFn, step_mask
from genjax.zoo import ZOO

pytestmark = pytest.mark.both_ends
PARTS = 4
RATES = np.asarray([RATE, RATE / 4, RATE / 8], np.float32)
WEIGHT = np.asarray([1, 0, 2, 0.5, 0, 1, 3, 1], np.float32)
# Rows whose losses depend on the rest of the batch by design (batch statistics), which G6 then
# wants to see.
BATCH_COUPLED = {"dcgan-mnist"}
# Losses that need not look at an example, only at its condition: a generator may be judged by the
# discriminator alone.
DATA_FREE = {gan: {"generator"}}
# Rows whose scanned steps equal single ones to rounding only, and to how much of it: in a loop, XLA
# sums the gradient of a convolution, or of a table of tokens, in another order. Two players that
# Adam moves by nearly the sign of a gradient pass more of it on (2e-6 to 5e-6).
SCANNED_TO_ROUNDING = {
    "vae-conv": 1e-6,
    "dcgan-mnist": 2e-5,
    "r3gan-mnist": 2e-5,
    "gru-markov": 1e-5,
}
# Families whose gradient is, by design, not the derivative of the loss for fixed noise: builder
# arguments that make it so. (The estimators themselves are tested with the family.) Gradient
# penalties jump where a leaky ReLU has its kink, so they have no difference quotient there.
PLAIN_GRADIENT = {
    vae: {"gradient": "pathwise"},
    gan: {"r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0},
    diffusion: {"schedule_gradient": "bound"},
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
}
# Losses that look at one noise level an example and step see each of the eight at as many as this.
COPIES = {diffusion: 8, flow_matching: 8}
ROOMY = {
    vae: {"hidden": (128, 128)},
    rnn: {"lanes": 0, "dropout": 0.0, "d_hidden": 128},
    transformer: {"dropout": 0.0, "cond_dropout": 0.0, "d_model": 64, "n_layers": 2},
    vrnn: {"dropout": 0.0, "d_hidden": 64},
    # Noise has nothing for a convolution to use.
    diffusion: {"cond_dropout": 0.0, "guidance": None, "net": "mlp", "hidden": (128, 128)},
    flow_matching: {"cond_dropout": 0.0, "guidance": None, "net": "mlp", "hidden": (128, 128)},
}


# --- G1: the loss where its value is known --------------------------------------------------------


@every_row
def test_g1_loss_equals_the_analytic_value(name):
    row = setup(name)
    assert row.recipe.family in ANALYTIC, (
        f"add the family {row.recipe.family.__name__} to known_losses.ANALYTIC"
    )
    params, known = ANALYTIC[row.recipe.family](row)
    assert known.keys() == row.losses.keys()
    for player, wanted in known.items():
        value, _ = row.losses[player](params, row.state, batch(name), jax.random.key(1), 0)
        np.testing.assert_allclose(value, wanted(batch(name)), rtol=1e-5)


# --- G2, G3, G9, skipping: the row's own training procedure ---------------------------------------


@one_row_quick
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


@one_row_quick
def test_g3_scanned_steps_are_the_same_steps(name):
    batches = [batch(name, seed) for seed in range(3)]
    t = real(name)
    wanted, metrics = run(t.step, t.init(jax.random.key(0)), batches)
    got, scanned = optimised(scan_steps(t.t).step, donate_argnums=0)(
        t.init(jax.random.key(0)), stack(batches)
    )
    rounding = SCANNED_TO_ROUNDING.get(name)
    compare = functools.partial(assert_close, rtol=rounding) if rounding else assert_same
    compare(got, wanted)
    compare(scanned, stack(metrics))


@one_row_quick
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


@one_row_quick
def test_a_step_that_is_not_finite_is_skipped(name):
    t, good = real(name), batch(name)
    ts, step = t.init(jax.random.key(0)), t.step
    kept = by_hand(np.copy, ts)
    if jnp.issubdtype(good.x.dtype, jnp.floating):
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


# --- G4, G5: transforms against solo runs ---------------------------------------------------------


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


@one_row_quick
@both_modes
def test_g4_members_with_keys_and_rates_of_their_own_equal_solo_runs(name, mode):
    model = setup(name).model
    t = sweep(lambda rate: training(model, optimizer(rate)), mode=mode, rate=RATES)
    assert_members(name, t, list(RATES), check_init=mode == "vmap")


@rows.first_rows
@both_modes
def test_g4_an_ensemble_equals_solo_runs(name, mode):
    """A sweep without its rates, by the same function, so one row of each family is enough."""
    assert_members(name, ensemble(plain(name).t, mode), [RATE] * 3, check_init=mode == "vmap")


@functools.cache
def accumulating(name):
    return quick(microbatch(plain(name).t, PARTS).step)


@one_row_quick
def test_g5_accumulated_gradients_equal_the_big_batch(name):
    big = quick(training(rows.in_chunks(setup(name).model, PARTS), optimizer()).step)
    start = plain(name).init(jax.random.key(0))
    for weight in (np.ones(B, np.float32), WEIGHT):
        batches = [batch(name, seed)._replace(weight=jnp.asarray(weight)) for seed in range(3)]
        got, wanted = run(accumulating(name), start, batches), run(big, start, batches)
        assert_close(got, wanted)
        assert differ(got[0].params, start.params)


@one_row_quick
def test_g5_data_parallel_over_8_devices_equals_one(name):
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    start, *wanted = one_device(name)
    with jax.enable_x64(True):
        placed = jax.device_put(widen(start), NamedSharding(mesh, PartitionSpec()))
        step = quick(shard(plain(name).t, mesh).step).lower(placed, widen(batch(name))).compile()
        got = run(step, placed, [widen(batch(name, seed)) for seed in range(3)])
        assert_close(got, tuple(wanted), rtol=1e-9)
    assert "all-reduce" in step.as_text()
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(got)} == {8}


@one_row_quick
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
    wanted = accumulating(name)(start, good._replace(weight=jnp.asarray(WEIGHT)))
    for filling in fillings:
        got = accumulating(name)(
            start, Batch(jnp.where(rows, filling, good.x), cond, jnp.asarray(WEIGHT), good.length)
        )
        assert_same(got, wanted)


# --- G6: no example sees another ------------------------------------------------------------------


@every_row
def test_g6_an_example_changes_its_own_loss_and_no_other(name):
    """Noise belongs to a position in the batch, so instead of permuting examples one of them is
    exchanged.
    """
    row, key = setup(name), jax.random.key(3)
    params = rows.grown(row.params)
    values = {
        player: lambda batch, loss=loss: loss(params, row.state, batch, key)[0]
        for player, loss in row.losses.items()
    }
    if row.score:
        values["score"] = lambda batch: row.score(params, row.state, batch, key)
    good, other = batch(name), batch(name, 1)
    exchange = lambda j: jax.tree.map(lambda a, b: a.at[j].set(b[j]), good, other)  # noqa: E731
    for what, value in values.items():
        before = np.asarray(value(good))
        for j in (0, 3, B - 1):
            after = np.asarray(value(exchange(j)))
            changed = np.flatnonzero(before != after).tolist()
            data_free = what in DATA_FREE.get(row.recipe.family, ())
            if name in BATCH_COUPLED and not data_free:
                assert len(changed) > 1, (
                    "no example sees another: take the row out of BATCH_COUPLED"
                )
                continue
            assert changed == [j] or (data_free and not row.spec.conditional and not changed), (
                what,
                j,
            )
        if row.spec.conditional:
            changed = good.cond + 1 if row.spec.cond_dim else (good.cond + 1) % row.spec.n_classes
            assert (np.asarray(value(good._replace(cond=changed))) != before).all(), (
                f"{what} does not depend on the condition"
            )


# --- G7: memorising 8 examples --------------------------------------------------------------------


def independent_entropy(x):
    """What 8 first steps cost at least if the values within a step are independent: Σ_k H of the
    values at place k, in nats.
    """
    shares = [np.unique(column, return_counts=True)[1] / len(column) for column in x.T]
    return float(sum(-(p * np.log(p)).sum() for p in shares))


@rows.slow_rows
def test_g7_eight_examples_are_memorised_down_to_the_floor(name):
    """No model codes 8 distinct examples in fewer than ln 8 nats on average, ln (how many share
    what is given, a condition or a length) otherwise: Σ p <= 1. A bound that gets below is broken;
    a model that stays far above cannot learn. Densities have no such floor.
    """
    row, spec, n = ZOO[name], setup(name).spec, 8
    if (
        row.family in COPIES and spec.kind == "discrete"
    ):  # 784 bytes to the last bit would take many more steps
        spec = dataclasses.replace(spec, shape=(4, 4, 1), levels=17)
    model = row.build(spec, **ROOMY.get(row.family, {}))  # not the tiny one, which has no room
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
    alike = lambda rows: (rows[:, None] == rows[None]).all(-1).sum(1)  # noqa: E731
    same = alike(given) / alike(events)
    floor = float(np.log(same).mean())
    if row.family in INDEPENDENT and eight.x.ndim > 2:
        floor = max(floor, independent_entropy(np.asarray(eight.x[:, 0]).reshape(n, -1)))
    tight = row.build(spec, **ROOMY.get(row.family, {}), **TIGHT.get(row.family, {}))
    score = tight.log_prob or tight.bound
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
    fast = (optimised if score is None or row.family in COPIES else jax.jit)(
        scan_steps(t, 200).step, donate_argnums=0
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


# --- G8, G10: gradients ---------------------------------------------------------------------------


@functools.cache
def gradient(name, player):
    """In float64: (parameters, state, own -> batch -> mean loss and its gradient with respect to
    `own`), compiled.
    """
    row = setup(name)
    model = row.recipe.build(row.spec, **PLAIN_GRADIENT.get(row.recipe.family, {}))
    with jax.enable_x64(True):
        params, state = widen((rows.grown(row.params), row.state))

        def mean_loss(own, batch):
            return model.losses[player](
                {**params, player: own}, state, batch, jax.random.key(2), 0
            )[0].mean()

        return params[player], quick(jax.value_and_grad(mean_loss))


@one_row_quick
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
                move = lambda t: jax.tree.map(lambda p, d: p + t * d, own, direction)  # noqa: E731
                numeric = float(
                    value_and_grad(move(h), example)[0] - value_and_grad(move(-h), example)[0]
                ) / (2 * h)
                exact = sum(
                    np.sum(g * d)
                    for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
                )
                np.testing.assert_allclose(numeric, exact, rtol=1e-5, atol=1e-7 * size)


@every_row
def test_g10_the_gradient_reaches_every_parameter(name):
    for player in setup(name).model.losses:
        own, value_and_grad = gradient(name, player)
        with jax.enable_x64(True):
            several = [named(value_and_grad(own, widen(batch(name, seed)))[1]) for seed in range(3)]
        unused = [path for path in several[0] if not any(grads[path].any() for grads in several)]
        assert not unused, f"no influence on the loss of {player}: {unused}"


@every_row
def test_g10_a_turn_changes_its_own_players_parameters_only(name):
    row = setup(name)
    if set(row.params) == set(row.losses) and len(row.losses) == 1:
        # With one player nothing else can change, and any step shows that the player does.
        start, after, _ = one_device(name)
        assert differ(after.params, widen(start).params)
        return
    for player in row.losses:
        alone = row.model._replace(losses={player: row.model.losses[player]}, turns=())
        t = training(alone, optimizer())
        start = t.init(jax.random.key(0))
        after, _ = quick(t.step)(start, batch(name))
        assert {path.split("/")[0] for path in differ(after.params, start.params)} == {player}


# --- G11 to G14 -----------------------------------------------------------------------------------


@one_row_quick
def test_g11_bfloat16_arithmetic_keeps_float32_parameters(name):
    row = setup(name)
    t = training(row.recipe.build(row.spec, dtype="bfloat16"), optimizer())
    start, batches = plain(name).init(jax.random.key(0)), [batch(name, seed) for seed in range(3)]
    lowered = quick(t.step).lower(start, batches[0])
    assert "bf16" in lowered.as_text()
    ts, metrics = run(lowered.compile(), start, batches)
    assert structure(ts) == structure(start)
    assert structure(jax.eval_shape(t.init, jax.random.key(0))) == structure(start)
    _, wanted = plain(name).step(start, batches[0])
    for player in row.losses:
        np.testing.assert_allclose(
            metrics[0][f"{player}/loss"], wanted[f"{player}/loss"], rtol=0.05
        )
        assert all(np.isfinite(one[f"{player}/loss"]) for one in metrics)


@one_row_quick
def test_g12_everything_lowers_for_cpu_cuda_and_tpu(name):
    row, key, n = setup(name), jax.random.key(0), 4
    cond = batch(name, 0, n).cond
    t = training(row.model, optimizer())
    programs = {
        "step": (t.step, (plain(name).init(key), batch(name))),
        "sample": (
            lambda params, state, key, cond: row.model.sample(params, state, key, n, cond),
            (row.params, row.state, key, cond),
        ),
    }
    if row.score:
        programs["score"] = (
            row.model.log_prob or row.model.bound,
            (row.params, row.state, batch(name), key),
        )
    for fun, args in programs.values():
        exported = jax.export.export(jax.jit(fun), platforms=["cpu", "cuda", "tpu"])(*args)
        assert exported.platforms == ("cpu", "cuda", "tpu")


@one_row_quick
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
        found = [loss(params, state, batch, next(keys))[0] for loss in row.model.losses.values()]
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


@every_row
def test_g14_arguments_are_called_what_the_contract_calls_them(name):
    model = setup(name).model
    # The family's own functions, inside those that `checked` wrapped around them.
    inner = inspect.getclosurevars(model.init).nonlocals["model"]
    assert inner.losses.keys() == model.losses.keys()
    for one in (model, inner):
        functions = [
            (one.init, InitFn),
            (one.sample, SampleFn),
            (one.log_prob, ScoreFn),
            (one.bound, ScoreFn),
        ]
        functions += [(loss, LossFn) for loss in one.losses.values()]
        for function, contract in functions:
            if function is not None:
                wanted = [
                    p
                    for p in inspect.signature(contract.__call__).parameters.values()
                    if p.name != "self"
                ]
                got = list(inspect.signature(function).parameters.values())
                assert [(p.name, p.default, p.kind) for p in got] == [
                    (p.name, p.default, p.kind) for p in wanted
                ], function


# --- Samples and scores ---------------------------------------------------------------------------


@every_row
def test_samples_are_of_the_kind_that_the_spec_says(name):
    row, n = setup(name), 16
    spec, cond = row.spec, batch(name, 0, 16).cond
    draw = lambda key, cond=cond: np.asarray(
        row.sample(rows.grown(row.params), row.state, key, n=n, cond=cond)
    )  # noqa: E731
    x = draw(jax.random.key(0))
    assert x.shape == (n, *spec.shape)
    assert x.dtype == spec.dtype
    assert np.isfinite(x).all()
    if spec.kind != "continuous":
        assert (x == np.floor(x)).all()
        assert x.min() >= 0
        assert x.max() <= (spec.levels or 2) - 1
    np.testing.assert_array_equal(x, draw(jax.random.key(0)))
    assert (x != draw(jax.random.key(1))).any()
    assert len(np.unique(x.reshape(n, -1), axis=0)) > 1
    with pytest.raises(ValueError, match="conditional"):
        draw(jax.random.key(0), None if spec.conditional else jnp.zeros(n, jnp.int32))


@every_row
def test_scores_are_nats_per_example_and_say_what_they_are(name):
    row = setup(name)
    if row.score is None:
        assert row.model.estimator == ""
        return
    assert row.model.estimator
    nats = np.asarray(row.score(row.params, row.state, batch(name), jax.random.key(0)))
    assert nats.shape == (B,)
    assert nats.dtype == np.float32
    assert np.isfinite(nats).all()
    # A log-probability, not a loss: that of discrete data is below 0.
    assert row.spec.kind == "continuous" or nats.max() < 0
