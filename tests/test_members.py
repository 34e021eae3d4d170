"""Many members as one program, alone and under every composition, against solo runs.

What is trained is the game of `toy.py`.
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
    STEPS,
    TIGHT,
    TRAIN,
    batches,
    game,
    jitted,
    keys,
    reference,
    run,
    sgd,
    solo,
    swap,
    toy,
)

from genjax.errors import ConfigError
from genjax.families.rnn import rnn
from genjax.families.vae import vae
from genjax.learning import members
from genjax.learning.members import ensemble, fastest_mode, grid, sweep
from genjax.learning.sharding import make_mesh, shard
from genjax.learning.step import training
from genjax.learning.transforms import (
    feed,
    microbatch,
    repeat_steps,
    scan_steps,
    skip_nonfinite,
)
from genjax.protocol import DataSpec


def mesh():
    return make_mesh({"data": 8})


def batch_at(arrays, step):
    return jax.tree.map(lambda leaf: leaf[step], arrays)


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
    t = repeat_steps(feed(t, batch_at), STEPS) if fed else scan_steps(t)
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


@pytest.mark.slow
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
        "repeat_steps(feed(ensemble), k)",
        "repeat_steps(feed(ensemble), k), map",
        "ensemble(repeat_steps(feed, k))",
    ],
)
def test_fed_members_equal_solo_runs(name):
    arrays = stack(batches())
    compose = {
        "feed(ensemble)": lambda t: feed(ensemble(t), batch_at),
        "ensemble(feed)": lambda t: ensemble(feed(t, batch_at)),
        "repeat_steps(feed(ensemble), k)": lambda t: repeat_steps(
            feed(ensemble(t), batch_at), STEPS
        ),
        "repeat_steps(feed(ensemble), k), map": lambda t: repeat_steps(
            feed(ensemble(t, "map"), batch_at), STEPS
        ),
        "ensemble(repeat_steps(feed, k))": lambda t: ensemble(
            repeat_steps(feed(t, batch_at), STEPS)
        ),
    }[name]
    for parts in (1, 2):
        t = compose(TRAIN) if parts == 1 else microbatch(compose(TRAIN), parts)
        first = jitted(t.init)(keys())
        if "repeat" in name:
            got, metrics = jitted(t.step)(first, arrays)
            metrics = metrics if name.startswith("ensemble") else swap(metrics)
        else:
            got, metrics = run(t, first, [arrays] * STEPS)
            metrics = swap(stack(metrics))
        assert_close((got, metrics), reference(parts), TIGHT)


# --- Which mode is faster -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_fastest_mode_is_measured_once_outside_and_inside_a_trace(monkeypatch):
    monkeypatch.setattr(members, "_MEASURED", {})
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
    assert len(members._MEASURED) == 2
    with monkeypatch.context() as patch:
        patch.setattr(members.time, "perf_counter", None)  # nothing can be timed again
        assert fastest_mode(one, {}, first, batches()[0]) == outside


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["vmap", "map"])
def test_auto_is_the_mode_that_was_found_faster(monkeypatch, chosen):
    asked = []
    monkeypatch.setattr(members, "fastest_mode", lambda *args: asked.append(args) or chosen)
    t = ensemble(TRAIN, "auto")
    got = run(t, jitted(t.init)(keys()), batches())
    assert asked
    assert_same(got, run(ensemble(TRAIN, chosen), jitted(t.init)(keys()), batches()))


@pytest.mark.slow
def test_auto_trains_without_being_told_how(monkeypatch):
    monkeypatch.setattr(members, "_MEASURED", {})
    t = scan_steps(ensemble(TRAIN, "auto"))
    got, metrics = jitted(t.step)(jitted(t.init)(keys()), stack(batches()))
    assert_close((got, swap(metrics)), reference(), TIGHT)
    assert len(members._MEASURED) == 1


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


@pytest.mark.parametrize(
    ("setting", "values", "said"),
    [
        ("beta", [1.0, -1.0], "where beta=-1: beta must be at least 0"),
        ("beta", [1.0, np.nan], "where beta=nan: beta must be"),
        ("latent_dim", [1, 2], "cannot trace latent_dim .* one after the other"),
        ("n_samples", [1, 2], "cannot trace n_samples .* one after the other"),
        ("gradient", ["stl", "dreg"], "An axis of sweep holds numbers"),
    ],
)
def test_values_that_a_sweep_cannot_have_are_refused_as_it_is_made(setting, values, said):
    def make(**given):
        return training(vae(DataSpec((2,), "continuous"), hidden=(4,), **given), optax.sgd(0.1))

    with pytest.raises(ConfigError, match=said):
        sweep(make, **{setting: values})


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_of_many_rows_those_with_the_ends_of_an_axis_are_tried(wrong):
    tried = []

    def make(beta):
        tried.append(beta)
        model = vae(DataSpec((2,), "continuous"), latent_dim=1, hidden=(4,), beta=beta)
        return training(model, optax.sgd(0.1))

    many = [*np.linspace(0.1, 1.0, 99), wrong, 0.5]
    with pytest.raises(ConfigError, match="sweep, where beta="):
        sweep(make, beta=many)
    tried.clear()
    sweep(make, beta=many[:-2])
    assert len(tried) == 3  # the least, the largest, and a traced one


def test_states_and_batches_of_other_members_are_refused():
    batch = batches()[0]
    swept = sweep(lambda a: TRAIN, a=[1.0, 2.0])
    one, two = TRAIN.init(jax.random.key(0)), swept.init(jax.random.split(jax.random.key(0)))
    three = ensemble(TRAIN).init(jax.random.split(jax.random.key(0), 3))
    for t, ts, given, said in (
        (TRAIN, two, batch, r"one of members, with keys of shape \[2\]"),
        (TRAIN, (1, 2), batch, "got a tuple in its place"),
        (swept, one, batch, "no state of theirs"),
        (swept, three, batch, "3 members, and the sweep 2 rows"),
        (ensemble(TRAIN, batch_axis=0), three, batch, "axis 0 of a batch should hold as many"),
    ):
        with pytest.raises(ConfigError, match=said):
            jax.eval_shape(lambda given, t=t, ts=ts: t.step(ts, given), given)


def test_whole_numbers_of_a_grid_are_whole():
    def make(steps, rate):
        model = vae(DataSpec((2,), "continuous"), hidden=(4,), beta_warmup_steps=steps)
        return training(model, optax.sgd(rate))

    sweep(make, **grid(steps=[0, 3], rate=[1.0, 0.5]))
    with pytest.raises(ConfigError, match=r"where steps=0\.5.*must be a whole number"):
        sweep(make, **grid(steps=[0.5], rate=[1.0]))


def test_the_bias_of_a_gate_can_be_swept():
    spec = DataSpec((3,), "tokens", levels=4, step="character")

    def make(bias):
        return training(rnn(spec, d_embed=2, d_hidden=3, forget_bias=bias), optax.sgd(0.1))

    keys = jax.random.split(jax.random.key(0), 2)
    ts = sweep(make, bias=[0.0, 2.0]).init(keys)
    for index, value in enumerate([0.0, 2.0]):
        solo = make(value).init(keys[index])
        for got, wanted in zip(*map(jax.tree.leaves, (ts.params, solo.params)), strict=True):
            np.testing.assert_allclose(got[index], wanted, rtol=1e-6)


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
