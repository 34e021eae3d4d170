"""The train step against updates worked out by hand, and every transform and composition against
runs without it.

What is trained is the game of `toy.py`.
"""

import functools

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_close, assert_same, differ, member, stack, structure
from toy import (
    RATES,
    STEPS,
    TIGHT,
    TRAIN,
    TURNS,
    B,
    batches,
    by_hand,
    game,
    jitted,
    run,
    sgd,
    start,
    toy,
)

from genjax.errors import ConfigError
from genjax.learning import members as train
from genjax.learning.members import ensemble, fastest_mode, grid, sweep
from genjax.learning.optim import track_ema
from genjax.learning.sharding import make_mesh, shard
from genjax.learning.step import eval_params, training
from genjax.learning.transforms import (
    compiled,
    feed,
    microbatch,
    repeat_steps,
    scan_steps,
    skip_nonfinite,
)
from genjax.protocol import Batch

pytestmark = pytest.mark.both_ends

# --- One step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight", [None, np.asarray([1, 0, 2, 0.5, 0, 1, 3, 1], np.float32)], ids=["equal", "weighted"]
)
@pytest.mark.parametrize(
    "turns", [TURNS, (("gen", 1), ("disc", 2)), (("disc", 1), ("gen", 3), ("disc", 1)), ()]
)
def test_steps_equal_those_by_hand(turns, weight):
    t = training(toy(turns), sgd())
    data = batches(weight=None if weight is None else jnp.asarray(weight))
    order = turns or (("gen", 1), ("disc", 1))
    got, metrics = run(t, start(), data)
    params, losses = by_hand(start(), data, order)
    chex.assert_trees_all_close(
        {"gen": got.params["gen"]["w"], "disc": got.params["disc"]["a"]}, params, rtol=TIGHT
    )
    assert metrics[-1].keys() == {"gen/loss", "gen/first", "disc/loss"}
    for player, loss in losses.items():
        np.testing.assert_allclose(metrics[-1][f"{player}/loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(
        metrics[-1]["gen/first"], np.average(data[-1].x[:, 0], weights=weight), rtol=1e-4, atol=1e-6
    )
    assert int(got.step) == STEPS
    assert float(got.state["disc"]["evaluations"]) == STEPS * sum(
        times for player, times in order if player == "disc"
    )
    assert_same((got.params["frozen"], got.key), (start().params["frozen"], start().key))


def test_the_step_counts_from_where_the_state_is():
    """Steps 2 and 3 alone, from a state that says 2: the noise is that of steps 2 and 3."""
    data = batches(steps=4)
    half, _ = run(TRAIN, start(), data[:2])
    params, _ = by_hand(half, data[2:])
    got, _ = run(TRAIN, half, data[2:])
    chex.assert_trees_all_close(got.params["gen"]["w"], params["gen"], rtol=TIGHT)


def test_only_the_ratio_of_weights_counts():
    one, ten = (run(TRAIN, start(), batches(weight=jnp.full(B, value))) for value in (1.0, 10.0))
    assert_close(ten, one, TIGHT)
    assert_close(one, run(TRAIN, start(), batches()), TIGHT)


def test_an_example_of_weight_zero_may_be_anything():
    weight = jnp.asarray([1.0] * (B - 1) + [0.0])
    data = batches(weight=weight)
    wanted = run(TRAIN, start(), data)
    for junk in (1e30, jnp.nan, jnp.inf):
        assert_same(
            run(TRAIN, start(), [one._replace(x=one.x.at[-1].set(junk)) for one in data]), wanted
        )
    assert differ(
        run(TRAIN, start(), [one._replace(x=one.x.at[0].set(5.0)) for one in data])[0].params,
        wanted[0].params,
    )


def test_one_optimiser_serves_all_players():
    got, _ = run(training(toy(), optax.sgd(0.1)), start(), batches())
    wanted, _ = run(
        training(toy(), {"gen": optax.sgd(0.1), "disc": optax.sgd(0.1)}), start(), batches()
    )
    assert_same(got, wanted)


@pytest.mark.parametrize(
    ("tx", "turns", "message"),
    [
        (
            {"gen": optax.sgd(0.1)},
            TURNS,
            "one optimiser for each player .gen, disc.; got them for: gen",
        ),
        ({}, TURNS, "got them for: none"),
        (sgd() | {"frozen": optax.sgd(0.1)}, TURNS, "got them for: gen, disc, frozen"),
        (sgd(), (("gen", 1), ("critic", 1)), "must name a player"),
        (sgd(), (("gen", 0), ("disc", 1)), "count >= 1"),
        (sgd(), (("gen", 1),), "'disc' has a loss but no turn"),
    ],
)
def test_players_optimisers_and_turns_must_agree(tx, turns, message):
    with pytest.raises(ConfigError, match=message):
        training(toy(turns), tx)


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="typed PRNG key"):
        TRAIN.init(jax.random.key_data(jax.random.key(0)))
    with pytest.raises(ValueError, match="must have shape"):
        TRAIN.step(start(), Batch(jnp.zeros((B, 4))))
    with pytest.raises(TypeError, match="Batch"):
        TRAIN.step(start(), jnp.zeros((B, 3)))


def test_averages_are_taken_where_an_optimiser_tracks_them():
    t = training(
        toy(), {"gen": optax.chain(optax.sgd(0.1), track_ema(0.9)), "disc": optax.sgd(0.05)}
    )
    ts, _ = run(t, jitted(t.init)(jax.random.key(0)), batches())
    found = eval_params(ts)
    assert_same(found["gen"], ts.opt["gen"][-1].ema)
    assert differ(found["gen"], ts.params["gen"])
    assert_same([found["disc"], found["frozen"]], [ts.params["disc"], ts.params["frozen"]])


@pytest.mark.slow
def test_compiled_steps_are_the_same_and_donate_the_state():
    t = compiled(TRAIN)
    wanted, _ = run(TRAIN, start(), batches())
    ts, old = t.init(jax.random.key(0)), None
    for batch in batches():
        old = ts
        ts, _ = t.step(ts, batch)
    assert_close(ts, wanted, TIGHT)
    assert old.params["gen"]["w"].is_deleted()
    assert t.step._cache_size() == 1
    again, _ = microbatch(t, 2).step(t.init(jax.random.key(0)), batches()[0])
    assert_close(again, run(game(1.0, 2), start(), batches()[:1])[0], TIGHT)


# --- Accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(1,), (2,), (8,), (2, 2), (2, 4)], ids=str)
@pytest.mark.parametrize(
    "weight", [None, np.asarray([1, 0, 2, 0.5, 0, 1, 3, 1], np.float32)], ids=["equal", "weighted"]
)
def test_without_noise_accumulation_equals_the_big_batch(parts, weight):
    t = training(toy(noisy=False), sgd())
    data = batches(weight=None if weight is None else jnp.asarray(weight))
    (wanted, wanted_metrics), accumulating = run(t, start(), data), t
    for n in parts:
        accumulating = microbatch(accumulating, n)
    got, metrics = run(accumulating, start(), data)
    assert float(got.state["disc"]["evaluations"]) == np.prod(parts) * float(
        wanted.state["disc"]["evaluations"]
    )
    assert_close(
        (got._replace(state=()), metrics), (wanted._replace(state=()), wanted_metrics), TIGHT
    )


def test_every_part_has_its_own_noise_and_the_turn_its_own_key():
    got, _ = run(
        microbatch(training(toy((("gen", 1), ("disc", 1))), sgd()), 2), start(), batches()[:1]
    )
    (batch,) = batches()[:1]
    key = jax.random.fold_in(start().key, 0)
    noise = np.concatenate([jax.random.normal(k, (B // 2, 3)) for k in jax.random.split(key, 2)])
    p = jax.tree.map(np.asarray, start().params)
    w = p["gen"]["w"]
    grads = (p["frozen"]["c"] * (w - np.asarray(batch.x)) + p["disc"]["a"] + noise).mean(0)
    np.testing.assert_allclose(got.params["gen"]["w"], w - RATES["gen"] * grads, rtol=TIGHT)


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    with pytest.raises(ConfigError, match="batch of 8 does not divide into 3"):
        microbatch(TRAIN, 3).step(start(), batches()[0])
    with pytest.raises(ConfigError, match="at least 1 part; got 0"):
        microbatch(TRAIN, 0)


# --- Many members, many steps ---------------------------------------------------------------------

MEMBERS = 3


def keys():
    return jax.random.split(jax.random.key(11), MEMBERS)


def solo(parts=1, scales=(1.0,) * MEMBERS, own=None):
    """Each member's run on its own, stacked: the reference of all that follows."""
    runs = []
    for index, (key, scale) in enumerate(zip(keys(), scales, strict=True)):
        data = batches() if own is None else own[index]
        runs.append(run(game(float(scale), parts), jitted(TRAIN.init)(key), data))
    states, metrics = stack([ts for ts, _ in runs]), stack([stack(metrics) for _, metrics in runs])
    return states._replace(step=states.step[0]), metrics  # metrics [member, step]


@functools.cache
def reference(parts=1):
    return solo(parts)


def mesh():
    return make_mesh({"data": 8})


def swap(metrics):
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), metrics)


def nothing_skipped(run):
    return run[0], [
        {name: value for name, value in one.items() if name != "skipped"} for one in run[1]
    ]


STEPWISE = {
    "ensemble": (lambda t: ensemble(t), 1),
    "ensemble, map": (lambda t: ensemble(t, "map"), 1),
    "microbatch(ensemble)": (lambda t: microbatch(ensemble(t), 2), 2),
    "ensemble(microbatch)": (lambda t: ensemble(microbatch(t, 2)), 2),
    "microbatch(ensemble, map)": (lambda t: microbatch(ensemble(t, "map"), 2), 2),
    "skip_nonfinite(ensemble)": (lambda t: skip_nonfinite(ensemble(t)), 1),
    "ensemble(skip_nonfinite)": (lambda t: ensemble(skip_nonfinite(t)), 1),
    "microbatch(ensemble(skip_nonfinite))": (
        lambda t: microbatch(ensemble(skip_nonfinite(t)), 2),
        2,
    ),
    "shard(ensemble)": (lambda t: shard(ensemble(t), mesh()), 1),
    "ensemble(shard)": (lambda t: ensemble(shard(t, mesh())), 1),
}
SCANNED = {
    "scan_steps(ensemble)": (lambda t: scan_steps(ensemble(t)), 1, True),
    "scan_steps(ensemble), map": (lambda t: scan_steps(ensemble(t, "map")), 1, True),
    "scan_steps(skip_nonfinite(ensemble)), map": (
        lambda t: scan_steps(skip_nonfinite(ensemble(t, "map"))),
        1,
        True,
    ),
    "ensemble(scan_steps)": (lambda t: ensemble(scan_steps(t)), 1, False),
    "ensemble(scan_steps), map": (lambda t: ensemble(scan_steps(t), "map"), 1, False),
    "microbatch(scan_steps(ensemble))": (lambda t: microbatch(scan_steps(ensemble(t)), 2), 2, True),
    "scan_steps(shard(ensemble))": (lambda t: scan_steps(shard(ensemble(t), mesh())), 1, True),
    "scan_steps(microbatch(shard(ensemble)))": (
        lambda t: scan_steps(microbatch(shard(ensemble(t), mesh()), 2)),
        2,
        True,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPWISE)
def test_members_equal_solo_runs(name):
    compose, parts = STEPWISE[name]
    t = compose(TRAIN)
    first = jitted(t.init)(keys())
    got, metrics = nothing_skipped(run(t, first, batches()))
    wanted, wanted_metrics = reference(parts)
    assert_close((got, swap(stack(metrics))), (wanted, wanted_metrics), TIGHT)
    assert structure(got) == structure(first)
    assert got.step.shape == ()
    assert differ(member(got.params, 0), member(got.params, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANNED)
def test_scanned_members_equal_solo_runs(name):
    compose, parts, steps_first = SCANNED[name]
    t = compose(TRAIN)
    got, metrics = jitted(t.step)(jitted(t.init)(keys()), stack(batches()))
    metrics = {name: value for name, value in metrics.items() if name != "skipped"}
    assert_close((got, swap(metrics) if steps_first else metrics), reference(parts), TIGHT)


@pytest.mark.parametrize("fed", [False, True], ids=["", "fed"])
@pytest.mark.parametrize(
    "make",
    [lambda: ensemble(TRAIN, "map"), lambda: sweep(lambda s: TRAIN, mode="map", s=[1.0] * MEMBERS)],
)
def test_mapped_members_take_all_steps_of_a_dispatch_before_the_next_one(make, fed):
    """One loop over members around one loop over steps: not a member's state out of the others' at
    every step.
    """
    t, arrays = make(), stack(batches())
    fed_by = lambda arrays, step: jax.tree.map(lambda leaf: leaf[step], arrays)  # noqa: E731
    t = repeat_steps(feed(t, fed_by), STEPS) if fed else scan_steps(t)
    program = jax.make_jaxpr(t.step)(jitted(t.init)(keys()), arrays)
    assert [(one, [inner for inner, _ in within]) for one, within in loops(program.jaxpr)] == [
        (MEMBERS, [STEPS])
    ]


def loops(jaxpr):
    """The lengths of the loops of a program, each with those inside of it: [(length, [...])]."""
    found = []
    for equation in jaxpr.eqns:
        inner = [
            loop for sub in jax.extend.core.jaxprs_in_params(equation.params) for loop in loops(sub)
        ]
        found += (
            [(equation.params["length"], inner)] if equation.primitive.name == "scan" else inner
        )
    return found


@pytest.mark.parametrize("mode", ["vmap", "map"])
@pytest.mark.parametrize("axis", [0, 1])
def test_members_may_have_their_own_batches(mode, axis):
    own = [batches(seed) for seed in range(MEMBERS)]
    together = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *step)
        for step in zip(*own, strict=True)
    ]
    t = ensemble(TRAIN, mode, batch_axis=axis)
    got, metrics = run(t, jitted(t.init)(keys()), together)
    assert_close((got, swap(stack(metrics))), solo(own=own), TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_a_sweep_equals_solo_runs(mode):
    scales = np.asarray([1.0, 0.5, 2.0], np.float32)
    t = sweep(lambda scale: training(toy(), sgd(scale)), mode=mode, scale=scales)
    got, metrics = run(t, jitted(t.init)(keys()), batches())
    assert_close((got, swap(stack(metrics))), solo(scales=scales), TIGHT)
    halves = microbatch(t, 2)
    got, metrics = run(halves, jitted(halves.init)(keys()), batches())
    assert_close((got, swap(stack(metrics))), solo(2, scales), TIGHT)


SCALES = np.asarray([1.0, 0.5], np.float32)
NESTED = {
    "ensemble(ensemble)": (lambda: ensemble(ensemble(TRAIN)), lambda i, j: 1.0),
    "ensemble(ensemble), map": (lambda: ensemble(ensemble(TRAIN, "map"), "map"), lambda i, j: 1.0),
    "ensemble(sweep)": (
        lambda: ensemble(sweep(lambda s: training(toy(), sgd(s)), s=SCALES)),
        lambda i, j: SCALES[j],
    ),
    "ensemble(sweep), map": (
        lambda: ensemble(sweep(lambda s: training(toy(), sgd(s)), s=SCALES), "map"),
        lambda i, j: SCALES[j],
    ),
    "sweep(ensemble)": (
        lambda: sweep(lambda s: ensemble(training(toy(), sgd(s))), s=SCALES),
        lambda i, j: SCALES[i],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NESTED)
def test_nested_members_equal_solo_runs(name):
    compose, scale = NESTED[name]
    t = compose()
    keys = jax.random.split(jax.random.key(3), (2, 2))
    got, metrics = run(t, jitted(t.init)(keys), batches())
    scanned, together = jitted(scan_steps(t).step)(jitted(t.init)(keys), stack(batches()))
    assert_close((scanned, together), (got, stack(metrics)), TIGHT)
    for i in range(2):
        for j in range(2):
            wanted = run(game(float(scale(i, j)), 1), jitted(TRAIN.init)(keys[i, j]), batches())
            mine = member(member(got._replace(step=jnp.full((2, 2), got.step)), i), j)
            assert_close((mine, [member(member(one, i), j) for one in metrics]), wanted, TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "feed(ensemble)",
        "ensemble(feed)",
        "scan_steps(feed(ensemble), k)",
        "scan_steps(feed(ensemble), k), map",
        "ensemble(scan_steps(feed, k))",
    ],
)
def test_fed_members_equal_solo_runs(name):
    arrays = stack(batches())

    def batch_at(arrays, step):
        return jax.tree.map(lambda leaf: leaf[step], arrays)

    compose = {
        "feed(ensemble)": lambda t: feed(ensemble(t), batch_at),
        "ensemble(feed)": lambda t: ensemble(feed(t, batch_at)),
        "scan_steps(feed(ensemble), k)": lambda t: repeat_steps(feed(ensemble(t), batch_at), STEPS),
        "scan_steps(feed(ensemble), k), map": lambda t: repeat_steps(
            feed(ensemble(t, "map"), batch_at), STEPS
        ),
        "ensemble(scan_steps(feed, k))": lambda t: ensemble(repeat_steps(feed(t, batch_at), STEPS)),
    }[name]
    for parts in (1, 2):
        t = compose(TRAIN) if parts == 1 else microbatch(compose(TRAIN), parts)
        first = jitted(t.init)(keys())
        if "scan" in name:
            got, metrics = jitted(t.step)(first, arrays)
            metrics = metrics if name.startswith("ensemble") else swap(metrics)
        else:
            got, metrics = run(t, first, [arrays] * STEPS)
            metrics = swap(stack(metrics))
        assert_close((got, metrics), reference(parts), TIGHT)


@pytest.mark.slow
def test_each_member_skips_its_own_bad_steps():
    scales = np.asarray([1.0, np.inf, 0.5], np.float32)
    make = lambda scale: skip_nonfinite(training(toy(), sgd(scale)))  # noqa: E731
    t = sweep(make, scale=scales)
    first = jitted(t.init)(keys())
    got, metrics = run(t, first, batches())
    np.testing.assert_array_equal([one["skipped"] for one in metrics], [[0, 1, 0]] * STEPS)
    assert_same(member(got.params, 1), member(first.params, 1))
    wanted, _ = reference()
    assert_close(member(got.params, 0), member(wanted.params, 0), TIGHT)
    # Around the members instead of inside, one bad member stops them all.
    around = skip_nonfinite(sweep(lambda scale: training(toy(), sgd(scale)), scale=scales))
    got, metrics = run(around, first, batches())
    assert [float(one["skipped"]) for one in metrics] == [1] * STEPS
    assert_same(got, first._replace(step=first.step + STEPS))


def test_skipping_changes_no_good_step_and_nothing_but_the_counter_of_a_bad_one():
    t = skip_nonfinite(TRAIN)
    data = batches()
    got, metrics = run(t, start(), data)
    wanted, wanted_metrics = run(TRAIN, start(), data)
    assert_close(got, wanted, TIGHT)
    assert_close(metrics, [one | {"skipped": jnp.zeros(())} for one in wanted_metrics], TIGHT)
    bad = data[0]._replace(x=data[0].x.at[0, 0].set(jnp.inf))
    after, metrics = jitted(t.step)(got, bad)
    assert_same(after, got._replace(step=got.step + 1))
    assert {name: float(value) for name, value in metrics.items()} == {
        "gen/loss": 0,
        "gen/first": 0,
        "disc/loss": 0,
        "skipped": 1,
    }


# --- Which mode is faster -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_fastest_mode_is_measured_once_outside_and_inside_a_trace(monkeypatch):
    monkeypatch.setattr(train, "_MEASURED", {})
    first = jitted(ensemble(TRAIN).init)(keys())

    def one(hyper, ts, batch):
        return TRAIN.step(ts, batch)

    outside = fastest_mode(one, {}, first, batches()[0])
    assert outside in ("vmap", "map")
    measured = []

    def inside(ts):
        measured.append(fastest_mode(one, {"rate": ts.params["gen"]["w"][:, 0]}, ts, batches()[0]))
        return ts.step

    jax.jit(inside)(first)
    assert measured[0] in ("vmap", "map")
    assert len(train._MEASURED) == 2
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "perf_counter", None)  # nothing can be timed again
        assert fastest_mode(one, {}, first, batches()[0]) == outside


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["vmap", "map"])
def test_auto_is_the_mode_that_was_found_faster(monkeypatch, chosen):
    asked = []
    monkeypatch.setattr(train, "fastest_mode", lambda *args: asked.append(args) or chosen)
    t = ensemble(TRAIN, "auto")
    got = run(t, jitted(t.init)(keys()), batches())
    assert asked
    assert_same(got, run(ensemble(TRAIN, chosen), jitted(t.init)(keys()), batches()))


@pytest.mark.slow
def test_auto_trains_without_being_told_how(monkeypatch):
    monkeypatch.setattr(train, "_MEASURED", {})
    t = scan_steps(ensemble(TRAIN, "auto"))
    got, metrics = jitted(t.step)(jitted(t.init)(keys()), stack(batches()))
    assert_close((got, swap(metrics)), reference(), TIGHT)
    assert len(train._MEASURED) == 1


# --- What a sweep, an ensemble and a mesh refuse --------------------------------------------------


def test_grid_is_the_product_with_the_last_axis_fastest():
    axes = grid(a=[1, 2], b=[3, 4, 5])
    np.testing.assert_array_equal(axes["a"], np.asarray([1, 1, 1, 2, 2, 2], np.float32))
    np.testing.assert_array_equal(axes["b"], np.asarray([3, 4, 5, 3, 4, 5], np.float32))
    assert axes["a"].dtype == np.float32


@pytest.mark.parametrize(
    "axes", [{}, {"a": [1.0, 2.0], "b": [1.0]}, {"a": 1.0}, {"a": [[1.0]]}], ids=str
)
def test_a_sweep_needs_vectors_of_one_length(axes):
    with pytest.raises(ConfigError, match="vectors of one length"):
        sweep(lambda **hyper: TRAIN, **axes)


def test_members_need_one_key_each():
    swept = sweep(lambda a: TRAIN, a=[1.0, 2.0])
    for t in (ensemble(TRAIN), swept):
        with pytest.raises(ConfigError, match="one key per member"):
            t.init(jax.random.key(0))
        with pytest.raises(TypeError, match="typed PRNG key"):
            t.init(jnp.zeros((2, 2), jnp.uint32))
    with pytest.raises(ConfigError, match=r"init needs one key; got keys of shape \[3\]"):
        TRAIN.init(keys())
    with pytest.raises(ConfigError, match=r"2 rows .* got 3 keys"):
        swept.init(keys())


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="'vmap', 'map' or 'auto'; got 'pmap'"):
        ensemble(TRAIN, "pmap").step(jitted(ensemble(TRAIN).init)(keys()), batches()[0])
