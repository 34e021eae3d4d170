"""Transforms of a step against steps without them: compiled functions, parts of a batch, several
steps, steps that are left out.
"""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_close, assert_same, differ, member, stack, structure
from toy import (
    MEMBERS,
    RATES,
    STEPS,
    TIGHT,
    TRAIN,
    B,
    batches,
    game,
    jitted,
    keys,
    nothing,
    reference,
    remembering,
    run,
    sgd,
    solo,
    start,
    toy,
)

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.rnn import rnn
from genjax.learning.members import ensemble, sweep
from genjax.learning.sharding import make_mesh, shard
from genjax.learning.step import training
from genjax.learning.transforms import (
    compiled,
    feed,
    microbatch,
    repeat_steps,
    scan_steps,
    skip_nonfinite,
)
from genjax.protocol import Aux, Batch, DataSpec, Model


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


# --- Parts of a batch -----------------------------------------------------------------------------


@pytest.mark.slow
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
    assert_same(got.state, wanted.state)  # a counter of the turns
    assert_close((got, metrics), (wanted, wanted_metrics), TIGHT)


def test_every_part_has_its_own_noise_and_the_turn_its_own_key():
    got, _ = run(
        microbatch(training(toy((("gen", 1), ("disc", 1))), sgd()), 2), start(), batches()[:1]
    )
    (batch,) = batches()[:1]
    key = jax.random.fold_in(start().key, 0)
    halves = [jax.random.normal(k, (B // 2, 3)) for k in jax.random.split(key, 2)]
    noise = np.stack(halves, axis=1).reshape(B, 3)  # a part is every second example
    p = jax.tree.map(np.asarray, start().params)
    w = p["gen"]["w"]
    grads = (p["frozen"]["c"] * (w - np.asarray(batch.x)) + p["disc"]["a"] + noise).mean(0)
    np.testing.assert_allclose(got.params["gen"]["w"], w - RATES["gen"] * grads, rtol=TIGHT)


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    with pytest.raises(ConfigError, match="batch of 8 does not divide into 3"):
        microbatch(TRAIN, 3).step(start(), batches()[0])
    with pytest.raises(ConfigError, match="at least 1 part; got 0"):
        microbatch(TRAIN, 0)
    for n in (2.0, "2", None):
        with pytest.raises(ConfigError, match=f"whole number of parts, at least 1 part; got {n!r}"):
            microbatch(TRAIN, n)
    microbatch(TRAIN, np.int64(2))


WEIGHTS = {
    "equal": None,
    "weighted": [1, 0, 2, 0.5, 0, 1, 3, 1],
    "first part empty": [0, 1, 0, 2, 0, 3, 0, 1],
    "last part empty": [1, 0, 2, 0, 3, 0, 1, 0],
    "padded": [1, 2, 3, 1, 0, 0, 0, 0],
}


def parts_of(examples, counts):
    """The examples of each part, in the order in which they are computed: every n-th, and of these
    again, the transform that was applied last first.
    """
    if not counts:
        return [examples]
    n = counts[-1]
    return [part for i in range(n) for part in parts_of(examples[i::n], counts[:-1])]


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("parts", [(2,), (4,), (8,), (2, 2)], ids=str)
def test_a_state_advances_once_a_step_however_the_batch_is_split(parts, weights):
    """Its moving average is that of the whole batch, 0.9 a step, not a part; what the parts agree
    on is kept exactly, of what is no real number the first part's is taken.
    """
    weight = WEIGHTS[weights] and jnp.asarray(WEIGHTS[weights], jnp.float32)
    whole = training(remembering(), optax.sgd(0.1))
    first, data = jitted(whole.init)(jax.random.key(0)), batches(weight=weight)
    wanted, _ = run(whole, first, data)
    t = whole
    for n in parts:
        t = microbatch(t, n)
    got, _ = run(t, first, data)
    mine, theirs = got.state["net"], wanted.state["net"]
    counts = np.ones(B) if weight is None else np.asarray(weight)
    earliest = next(p for p in parts_of(np.arange(B), parts) if counts[p].sum() > 0)[0]
    seen = data[-1].x[earliest, 0] if counts[earliest] > 0 else 0.0
    assert int(mine.pop("seen")) == int(1000 * seen)
    theirs.pop("seen")
    np.testing.assert_allclose(mine.pop("mean"), theirs.pop("mean"), rtol=1e-5, atol=1e-7)
    assert_same(mine, theirs)
    assert (int(mine["whole"]), float(mine["real"])) == (STEPS, STEPS)
    assert structure(got) == structure(wanted)


def test_parts_of_weight_zero_count_for_nothing_in_a_state_whatever_they_hold():
    """All of a part is padding: its mean is 0 / 0."""
    weight = jnp.asarray([1.0, 0, 2, 0, 3, 0, 1, 0])
    whole = training(remembering(), optax.sgd(0.1))
    first = jitted(whole.init)(jax.random.key(0))
    padded = [one._replace(x=one.x.at[1::2].set(jnp.nan)) for one in batches(weight=weight)]
    got, _ = run(microbatch(whole, 2), first, padded)
    front = [Batch(one.x[::2], None, weight[::2]) for one in batches()]
    wanted, _ = run(whole, first, front)
    constants = [ts.state["net"].pop("constant") for ts in (got, wanted)]
    assert_same(*constants)
    assert_close(got, wanted, TIGHT)


def test_a_state_that_cannot_be_averaged_refuses_parts():
    spec = DataSpec((4,), "tokens", levels=3, step="token")
    t = microbatch(training(rnn(spec, d_hidden=4, lanes=8), optax.sgd(0.1)), 2)
    with pytest.raises(ConfigError, match=r"carries the state of 8 streams.* do not split batches"):
        jax.eval_shape(
            lambda key: t.step(t.init(key), example_batch(spec, key, 8)), jax.random.key(0)
        )


# --- Several steps a dispatch ---------------------------------------------------------------------


@pytest.mark.slow
def test_repeated_steps_are_the_steps_of_one_batch():
    (batch,) = batches(steps=1)
    got, metrics = jitted(repeat_steps(TRAIN, STEPS).step)(start(), batch)
    assert_close(
        (got, metrics), jitted(scan_steps(TRAIN).step)(start(), stack([batch] * STEPS)), TIGHT
    )
    halves, _ = jitted(microbatch(repeat_steps(TRAIN, STEPS), 2).step)(start(), batch)
    assert_close(halves, run(game(1.0, 2), start(), [batch] * STEPS)[0], TIGHT)


def test_a_number_of_steps_belongs_to_repeat_steps():
    with pytest.raises(ConfigError, match=r"repeat_steps\(t, 5\)"):
        scan_steps(TRAIN, 5)
    with pytest.raises(ConfigError, match="at least 1 step; got 0"):
        repeat_steps(TRAIN, 0)
    with pytest.raises(ConfigError, match=r"whole number of steps, at least 1 step; got 2\.5"):
        repeat_steps(TRAIN, 2.5)


# --- Steps that are left out ----------------------------------------------------------------------


@pytest.mark.slow
def test_each_member_skips_its_own_bad_steps():
    scales = np.asarray([1.0, np.inf, 0.5], np.float32)
    t = sweep(lambda scale: skip_nonfinite(training(toy(), sgd(scale))), scale=scales)
    first = jitted(t.init)(keys())
    got, metrics = run(t, first, batches())
    np.testing.assert_array_equal([one["skipped"] for one in metrics], [[0, 1, 0]] * STEPS)
    assert_same(member(got.params, 1), member(first.params, 1))
    wanted, _ = reference()
    assert_close(member(got.params, 0), member(wanted.params, 0), TIGHT)


SCALES = np.asarray([1.0, np.inf, 0.5], np.float32)


def swept(mode="vmap"):
    return sweep(lambda scale: training(toy(), sgd(scale)), mode=mode, scale=SCALES)


def batch_at(arrays, step):
    return jax.tree.map(lambda leaf: leaf[step], arrays)


AROUND = {
    "members": lambda: skip_nonfinite(swept()),
    "members, map": lambda: skip_nonfinite(swept("map")),
    "parts": lambda: skip_nonfinite(microbatch(swept(), 2)),
    "parts around": lambda: microbatch(skip_nonfinite(swept()), 2),
    "a mesh": lambda: skip_nonfinite(shard(swept(), make_mesh({"data": 8}))),
    "compiled members": lambda: skip_nonfinite(compiled(swept())),
}
DISPATCHED = {
    "feed": lambda: repeat_steps(skip_nonfinite(feed(swept(), batch_at)), STEPS),
    "feed around": lambda: repeat_steps(feed(skip_nonfinite(swept("map")), batch_at), STEPS),
    "stacked": lambda: scan_steps(skip_nonfinite(swept())),
    "stacked, a mesh": lambda: scan_steps(skip_nonfinite(shard(swept(), make_mesh({"data": 8})))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*AROUND, *DISPATCHED])
def test_around_members_each_skips_its_own_steps_too(name):
    """A member's NaN stops no other, whatever stands in between."""
    t = {**AROUND, **DISPATCHED}[name]()
    first = jitted(swept().init)(keys())
    if name in AROUND:
        got, metrics = run(t, first, batches())
        metrics = stack(metrics)
    else:
        got, metrics = jitted(t.step)(first, stack(batches()))
    np.testing.assert_array_equal(metrics["skipped"], [[0, 1, 0]] * STEPS)
    assert metrics["gen/loss"].shape == (STEPS, MEMBERS)
    assert_same(member(got.params, 1), member(first.params, 1))
    scales = [1.0, 1.0, 0.5]  # the one that is left out aside
    wanted, _ = solo(2 if "parts" in name else 1, scales)
    for index in (0, 2):
        assert_close(member(got.params, index), member(wanted.params, index), TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_members_with_batches_of_their_own_skip_their_own_steps(mode):
    data = stack([batches(seed)[0] for seed in range(MEMBERS)])
    data = data._replace(x=jnp.asarray(data.x).at[1, 0, 0].set(jnp.inf))
    members = ensemble(TRAIN, mode, batch_axis=0)
    first = jitted(members.init)(keys())
    got, metrics = jitted(skip_nonfinite(members).step)(first, data)
    np.testing.assert_array_equal(metrics["skipped"], [0, 1, 0])
    assert_same(member(got.params, 1), member(first.params, 1))
    assert differ(member(got.params, 0), member(first.params, 0))
    # Stacked along another axis in front, they are a scan's.
    stacked = jax.tree.map(lambda leaf: leaf[None], data)
    assert_close(jitted(scan_steps(skip_nonfinite(members)).step)(first, stacked)[0], got, TIGHT)


@pytest.mark.slow
def test_members_that_cannot_be_reached_are_not_stopped_together():
    fed = feed(ensemble(TRAIN, batch_axis=0), batch_at)
    with pytest.raises(ConfigError, match=r"write feed\(skip_nonfinite\(t\), batch_at\)"):
        skip_nonfinite(fed)
    assert fed.within is None
    inside = feed(skip_nonfinite(ensemble(TRAIN, batch_axis=0)), batch_at)
    data = stack([stack([batches(seed)[step] for seed in range(MEMBERS)]) for step in range(2)])
    got, metrics = jitted(repeat_steps(inside, 2).step)(jitted(inside.init)(keys()), data)
    assert metrics["skipped"].shape == (2, MEMBERS)
    wanted, _ = solo(own=[batches(seed)[:2] for seed in range(MEMBERS)])
    assert_close(got, wanted, TIGHT)


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


@pytest.mark.parametrize(
    "around", [scan_steps, lambda t: repeat_steps(t, 2)], ids=["stacked", "repeated"]
)
def test_members_that_take_several_steps_are_out_of_reach(around):
    """There, one member's NaN would undo the steps of all."""
    with pytest.raises(ConfigError, match=r"scan_steps\(skip_nonfinite\(t\)\)"):
        skip_nonfinite(around(swept()))
    skip_nonfinite(around(TRAIN))  # of one alone it undoes the dispatch, as it says


def test_complex_numbers_go_down_in_both_parts():
    """The gradient of |w - c|², whose way down is towards c."""

    def init(key):
        return {"a": {"w": jnp.zeros(2, jnp.complex64)}}, {}

    def loss(params, state, batch, key, step):
        far = params["a"]["w"] - (1 + 2j)
        return jnp.zeros(len(batch.x)) + (far.real**2 + far.imag**2).sum(), Aux(state, {})

    t = training(Model(toy().spec, init, {"a": loss}, nothing), optax.sgd(0.25))
    new, _ = t.step(t.init(jax.random.key(0)), batches()[0])
    np.testing.assert_allclose(new.params["a"]["w"], [0.5 + 1j] * 2, rtol=1e-6)


def test_complex_numbers_are_looked_at():
    """In a model all of whose parameters are complex, too."""

    def init(key):
        return {"a": {"w": jnp.ones(3, jnp.complex64)}}, {}

    def loss(params, state, batch, key, step):
        return jnp.square(params["a"]["w"].real[None] - batch.x).sum(-1), Aux(state, {})

    model = Model(toy().spec, init, {"a": loss}, nothing, follows={"avg": ("a", 0.9)})
    bad = skip_nonfinite(training(model, optax.sgd(np.inf)))
    ts = bad.init(jax.random.key(0))
    new, metrics = bad.step(ts, batches()[0])
    assert float(metrics["skipped"]) == 1
    assert_same(new.params, ts.params)
    t = training(model, optax.sgd(0.1))
    new, _ = t.step(t.init(jax.random.key(0)), batches()[0])
    wanted = 0.9 * 1 + 0.1 * np.asarray(new.params["a"]["w"])
    np.testing.assert_allclose(new.params["avg"]["w"], wanted, rtol=1e-6)
