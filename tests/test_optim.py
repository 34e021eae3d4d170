"""Optimisers against loops written by hand and formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.learning.optim import (
    ALGORITHMS,
    SCHEDULES,
    Optimizer,
    TrackEmaState,
    averaged,
    track_ema,
)
from genjax.zoo import ZOO
from genjax.zoo.recipe import Schedule
from genjax.zoo.sections import replace

PARAMS = {
    "kernel": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32),
    "bias": np.array([1.0, -1.0], np.float32),
}


def tree(value=PARAMS):
    return jax.tree.map(jnp.asarray, value)


def step(tx):
    """One update as a step makes it: optax's own arithmetic mixes whole and real numbers."""

    @jax.jit
    def run(grads, opt, params):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    return run


def zeros():
    return jax.tree.map(jnp.zeros_like, tree())


# --- track_ema ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_track_ema_is_the_loop(decay):
    tx = optax.chain(optax.sgd(0.1), track_ema(decay))
    params, opt, run = tree(), tx.init(tree()), step(tx)
    want = jax.tree.map(np.float64, PARAMS)
    rng = np.random.default_rng(0)
    for count in range(30):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        params, opt = run(grads, opt, params)
        # The warm-up: 1/10, 2/11, 3/12, ... until it passes the decay. The average sees the
        # parameters after the update.
        d = min(decay, (1 + count) / (10 + count))
        want = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * np.float64(p), want, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            averaged(opt, params),
            want,
        )
    assert opt[-1].count == 30
    assert opt[-1].count.dtype == jnp.int32
    assert (decay == 0) == bool(np.array_equal(opt[-1].ema["bias"], params["bias"]))


def test_the_decay_warms_up_as_its_formula_says():
    # With parameters at 0 and an average that starts at 1, the average is the product of the
    # decays.
    tx = track_ema(0.6)
    opt = tx.init({"w": jnp.ones(())})
    run, zero, product = jax.jit(tx.update), {"w": jnp.zeros(())}, 1.0
    for count in range(25):
        _, opt = run(zero, opt, zero)
        product *= min(0.6, (1 + count) / (10 + count))
        np.testing.assert_allclose(opt.ema["w"], product, rtol=1e-5)
    assert (1 + 12) / (10 + 12) < 0.6 < (1 + 24) / (10 + 24)  # both regimes were seen


def test_an_average_of_equal_values_stays_exactly_equal():
    tx = track_ema(0.999)
    params = {"w": jnp.asarray([0.1, 1 / 3, 1e-8, 12345.678])}
    opt, run = tx.init(params), jax.jit(tx.update)
    for _ in range(20):
        updates, opt = run({"w": jnp.zeros(4)}, opt, params)
    np.testing.assert_array_equal(opt.ema["w"], params["w"])
    np.testing.assert_array_equal(updates["w"], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_track_ema_keeps_dtypes_and_passes_updates_on(dtype):
    tx = track_ema(0.9)
    params = {"w": jnp.ones((3,), dtype)}
    updates = {"w": jnp.full((3,), 0.5, dtype)}
    out, opt = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(out["w"], updates["w"])
    assert opt.ema["w"].dtype == dtype
    # d = 1/10 at the first update, towards 1.5: 1 + 0.9 * 0.5
    np.testing.assert_allclose(opt.ema["w"].astype(jnp.float32), 1.45, rtol=1e-2)


def test_the_average_is_a_copy_that_can_be_donated():
    tx = optax.chain(optax.adam(1e-2), track_ema(0.9))
    params = tree()
    opt = tx.init(params)
    for a, b in zip(jax.tree.leaves(opt[-1].ema), jax.tree.leaves(params), strict=True):
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
        np.testing.assert_array_equal(a, b)

    def both(params, opt):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(jax.tree.map(jnp.ones_like, params), opt, params)
        return optax.apply_updates(params, updates), opt

    # An alias: "attempt to donate the same buffer twice".
    params, opt = jax.jit(both, donate_argnums=(0, 1))(params, opt)
    assert np.isfinite(params["bias"]).all()


def test_averaged_finds_the_average_anywhere_in_a_chain():
    params = tree()
    track = track_ema(0.5)
    for tx in (
        track,
        optax.chain(track, optax.sgd(0.1)),
        optax.chain(optax.clip(1.0), optax.chain(optax.adam(0.1), optax.chain(track))),
        optax.masked(track, {"kernel": True, "bias": True}),
        optax.MultiSteps(optax.chain(optax.sgd(0.1), track), 2).gradient_transformation(),
        optax.multi_transform(
            {"all": optax.chain(optax.sgd(0.1), track)}, {"kernel": "all", "bias": "all"}
        ),
    ):
        opt = tx.init(jax.tree.map(lambda p: p + 7, params))
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, np.asarray(b) + 7),
            averaged(opt, params),
            params,
        )
    # Two in one chain: the last, which sees the final update.
    two = optax.chain(track_ema(0.1), track_ema(0.9)).init(params)
    two = (two[0], two[1]._replace(ema={"found": jnp.zeros(())}))
    assert set(averaged(two, params)) == {"found"}


@pytest.mark.parametrize(
    "tx", [optax.adam(1e-3), optax.identity(), optax.chain(optax.clip(1.0), optax.sgd(1.0))]
)
def test_averaged_without_an_average_is_the_parameters(tx):
    params = tree()
    assert averaged(tx.init(params), params) is params
    assert averaged((), params) is params


def test_track_ema_inside_vmap_is_each_members_own():
    tx = optax.chain(optax.sgd(1.0), track_ema(0.8))
    members = jnp.arange(1.0, 4.0)

    def run(start):
        params, opt = {"w": start}, tx.init({"w": start})
        for _ in range(5):
            updates, opt = tx.update({"w": 0.1 * start}, opt, params)
            params = optax.apply_updates(params, updates)
        return params, opt

    params, opt = jax.jit(jax.vmap(run))(members)
    assert isinstance(opt[-1], TrackEmaState)
    assert opt[-1].count.shape == (3,)
    solo = jax.jit(run)(members[1])
    np.testing.assert_allclose(
        averaged(opt, params)["w"][1], averaged(solo[1], solo[0])["w"], rtol=1e-6
    )
    # Everything is proportional to the start, and so is the average.
    ema = np.asarray(averaged(opt, params)["w"])
    np.testing.assert_allclose(ema / np.asarray(members), ema[0], rtol=1e-5)


def test_track_ema_without_parameters_says_what_it_needs():
    tx = track_ema(0.9)
    with pytest.raises(ConfigError, match="track_ema needs the parameters"):
        tx.update(zeros(), tx.init(tree()))


# --- the settings of an optimiser -----------------------------------------------------------------


def first_update(optimizer, grads, steps=100):
    tx = optimizer.build(steps)
    params = tree()
    after, _ = step(tx)(grads, tx.init(params), params)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, params)


GRADS = {
    "kernel": np.array([[0.5, -0.25], [2.0, -1.0]], np.float32),
    "bias": np.array([-4.0, 0.125], np.float32),
}


@pytest.mark.parametrize(
    ("algorithm", "rule"),
    [
        # Both moments are corrected for their start, so the first step is g / |g|.
        ("adam", lambda g: -np.sign(g)),
        ("adamw", lambda g: -np.sign(g)),
        ("lion", lambda g: -np.sign(g)),
        ("sgd", lambda g: -g),
        # A second moment that starts at 0, uncorrected.
        ("rmsprop", lambda g: -g / np.sqrt((1 - 0.96) * g * g)),
    ],
)
def test_the_first_step_of_every_algorithm_is_its_formula(algorithm, rule):
    optimizer = Optimizer(algorithm=algorithm, learning_rate=0.01, b2=0.96)
    got = first_update(optimizer, tree(GRADS))
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, 0.01 * rule(g), rtol=1e-3), got, GRADS)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_goes_downhill_with_every_other_setting(algorithm):
    free = algorithm == "schedule-free"
    optimizer = Optimizer(
        algorithm=algorithm,
        # Muon's steps have one size, whatever the gradient's, and this way is long.
        learning_rate=0.1 if algorithm == "muon" else 0.02,
        schedule="constant" if free else "cosine",
        warmup_steps=5,
        clip_norm=1.0,
        ema_decay=0.0 if free else 0.5,
        weight_decay=1e-3 if algorithm in ("adamw", "lion", "muon", "schedule-free") else 0.0,
    )
    tx = optimizer.build(300)

    def value(params):
        return sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(params))

    @jax.jit
    def run(params):
        def one(carry, _):
            params, opt = carry
            with jax.numpy_dtype_promotion("standard"):
                updates, opt = tx.update(jax.grad(value)(params), opt, params)
            return (optax.apply_updates(params, updates), opt), None

        (params, opt), _ = jax.lax.scan(one, (params, tx.init(params)), length=300)
        return params, averaged(opt, params)

    for end in run(tree()):
        assert value(end) < 0.05 * value(tree())


def test_momentum_and_second_moment_are_the_settings():
    for algorithm, expected in (("sgd", 1 + 0.7), ("adam", None)):
        tx = Optimizer(algorithm=algorithm, learning_rate=1.0, b1=0.7, b2=0.5).build(10)
        params = {"w": jnp.zeros(())}
        run, opt = step(tx), tx.init(params)
        after, opt = run({"w": jnp.ones(())}, opt, params)
        last, _ = run({"w": jnp.full((), 2.0)}, opt, after)
        moved = -float(last["w"] - after["w"])
        if expected is None:
            m, v = (0.7 * 0.3 + 0.3 * 2) / (1 - 0.7**2), (0.5 * 0.5 + 0.5 * 4) / (1 - 0.5**2)
            assert moved == pytest.approx(m / math.sqrt(v), rel=1e-5)
        else:
            assert moved == pytest.approx(2 + 0.7, rel=1e-6)


def rates(optimizer, steps, turns=1):
    """The step size of every update, measured: sgd without momentum on a gradient of 1."""
    tx = dataclasses.replace(optimizer, algorithm="sgd", b1=0.0).build(steps, turns=turns)

    def one(carry, _):
        params, opt = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update({"w": jnp.ones(())}, opt, params)
        return (params, opt), -updates["w"]

    start = ({"w": jnp.zeros(())}, tx.init({"w": jnp.zeros(())}))
    return np.asarray(jax.jit(lambda: jax.lax.scan(one, start, length=turns * (steps + 5))[1])())


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "wsd"])
def test_schedules_at_the_start_the_middle_and_the_end(schedule, final, warmup):
    steps, peak = 24, 0.5
    got = rates(
        Optimizer(schedule=schedule, learning_rate=peak, final_fraction=final, warmup_steps=warmup),
        steps,
    )
    fall = {
        "constant": lambda t: 0 * t,
        "linear": lambda t: t,
        "cosine": lambda t: (1 - np.cos(np.pi * t)) / 2,
    }[schedule]
    count = np.arange(steps + 5)
    done = np.clip((count - warmup) / (steps - warmup), 0, 1)
    want = (
        peak
        * (1 - (1 - final) * fall(done))
        * (np.minimum(1, (count + 1) / warmup) if warmup else 1)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    # The same in words: the first step, the peak, half way down, and what is left at the end of the
    # run and after it.
    low = peak * (1 if schedule == "constant" else final)
    assert got[0] == pytest.approx(peak / warmup if warmup else peak)
    if warmup:
        np.testing.assert_allclose(
            got[:warmup], peak * np.arange(1, warmup + 1) / warmup, rtol=1e-6
        )
    assert got[warmup] == pytest.approx(peak)
    assert got[(steps + warmup) // 2] == pytest.approx((peak + low) / 2, rel=1e-5)
    np.testing.assert_allclose(got[steps:], low, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_wsd_keeps_the_peak_and_falls_by_1_minus_sqrt_in_the_last_part_of_the_run(fraction):
    steps, warmup, peak, final = 100, 5, 0.5, 0.1
    settings = Optimizer(
        schedule="wsd",
        learning_rate=peak,
        final_fraction=final,
        warmup_steps=warmup,
        decay_fraction=fraction,
    )
    got = rates(settings, steps)
    count = np.arange(steps + 5)
    first = steps - fraction * steps
    fallen = np.sqrt(np.clip((count - first) / (fraction * steps), 0, 1))
    want = np.minimum(1, (count + 1) / warmup) * peak * (1 - (1 - final) * fallen)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    if fraction == 0.2:
        np.testing.assert_allclose(got[warmup:81], peak, rtol=1e-6)
        assert got[85] == pytest.approx(peak * (1 - 0.9 * 0.5))
    # A run that goes on to more steps has had the same step sizes up to its fall.
    longer = rates(dataclasses.replace(settings), 2 * steps)
    np.testing.assert_allclose(longer[: int(first)], got[: int(first)], rtol=1e-6)


def test_clipping_bounds_the_global_norm_and_leaves_small_gradients_alone():
    sgd = Optimizer(algorithm="sgd", b1=0.0, learning_rate=1.0)
    norm = math.sqrt(sum(float((g**2).sum()) for g in GRADS.values()))
    for bound, factor in ((norm / 3, 1 / 3), (norm * 2, 1.0)):
        got = first_update(dataclasses.replace(sgd, clip_norm=bound), tree(GRADS))
        jax.tree.map(
            lambda u, g, f=factor: np.testing.assert_allclose(u, -f * g, rtol=1e-5), got, GRADS
        )
    # Adam's first step does not depend on the size of the gradient: clipping comes before it, not
    # after.
    got = first_update(Optimizer(learning_rate=0.5, clip_norm=1e-2), tree(GRADS))
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, -0.5 * np.sign(g), rtol=1e-3), got, GRADS
    )


@pytest.mark.parametrize("algorithm", ["adamw", "lion"])
def test_weight_decay_is_decoupled_and_skips_vectors(algorithm):
    optimizer = Optimizer(algorithm=algorithm, learning_rate=0.1, weight_decay=0.2)
    got = first_update(optimizer, zeros())
    np.testing.assert_allclose(got["kernel"], -0.1 * 0.2 * PARAMS["kernel"], rtol=1e-4)
    np.testing.assert_array_equal(got["bias"], 0.0)
    none = first_update(dataclasses.replace(optimizer, weight_decay=0.0), zeros())
    np.testing.assert_array_equal(none["kernel"], 0.0)


@pytest.mark.slow
def test_float_settings_may_be_traced():
    settings = {
        "learning_rate": [0.1, 0.2],
        "clip_norm": [1.0, 2.0],
        "ema_decay": [0.05, 0.01],
        "final_fraction": [0.5, 0.1],
    }

    def run(hyper):
        tx = Optimizer(algorithm="sgd", b1=0.0, schedule="linear", **hyper).build(2)
        params = tree()
        opt = tx.init(params)
        for _ in range(2):
            with jax.numpy_dtype_promotion("standard"):
                updates, opt = tx.update(tree(GRADS), opt, params)
            params = optax.apply_updates(params, updates)
        return params, averaged(opt, params)

    many = jax.jit(jax.vmap(run))({name: jnp.asarray(value) for name, value in settings.items()})
    for i in range(2):
        solo = run({name: value[i] for name, value in settings.items()})
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), many, solo)
    assert np.all(np.asarray(many[0]["bias"][0]) != np.asarray(many[0]["bias"][1]))


def test_only_what_is_asked_for_is_in_the_chain():
    params = tree()
    assert averaged(Optimizer().build(10).init(params), params) is params
    assert averaged(Optimizer(ema_decay=0.9).build(10).init(params), params) is not params
    plain = jax.tree.structure(Optimizer().build(10).init(params))
    assert plain == jax.tree.structure(optax.adam(1e-3).init(params))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"algorithm": "adm"}, "no algorithm called 'adm'. Did you mean"),
        (
            {"algorithm": "newton"},
            "no algorithm called 'newton'. There are: adam, adamw, sgd, rmsprop, lion",
        ),
        ({"schedule": "cosin"}, "no schedule called 'cosin'. Did you mean cosine"),
        ({"warmup_steps": 10}, "warmup_steps must be below the run's 10 steps; got 10"),
        ({"warmup_steps": 11}, "warmup_steps must be below the run's 10 steps; got 11"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0; got -1"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a whole number; got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate must be positive; got 0.0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number; got 'fast'"),
        ({"final_fraction": 1.5}, r"final_fraction must be in \[0, 1\]; got 1.5"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\); got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\); got -0.1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\); got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0; got -1.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be at least 0; got nan"),
        ({"decayed": ("matrix", 3)}, r"decayed\[1\] must be a text; got 3"),
    ],
)
def test_settings_that_do_not_exist_or_do_not_fit(settings, match):
    with pytest.raises(ConfigError, match=match):
        Optimizer(**settings).build(10)
    assert Optimizer(warmup_steps=9).build(10)


def test_settings_are_checked_when_they_are_made():
    """So that a wrong one is refused where it is written; lists are what JSON gives back."""
    with pytest.raises(ConfigError, match="learning_rate must be positive"):
        Optimizer(learning_rate=-1.0)
    assert Optimizer(decayed=["matrix"], rates=["vector=2"]) == Optimizer(
        decayed=("matrix",), rates=("vector=2",)
    )


def test_a_weight_decay_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="adam has no weight decay; use adamw, lion, muon or schedule-free"
    ):
        Optimizer(algorithm="adam", weight_decay=0.1).build(10)
    Optimizer(algorithm="lion", weight_decay=0.1).build(10)


def test_a_player_of_several_turns_has_the_schedule_of_the_run():
    """Its updates of one step share a step size, and end at the last step."""
    settings = Optimizer(learning_rate=0.1, schedule="cosine", warmup_steps=2)
    once, often = rates(settings, 6), rates(settings, 6, turns=3)
    np.testing.assert_array_equal(often, np.repeat(once, 3))
    row = replace(ZOO["gan-ring"], **{**ZOO["gan-ring"].tiny, "discriminator_steps": 3})
    own = Optimizer("sgd", 0.1, b1=0.0, schedule="cosine")
    row = dataclasses.replace(row, optimizer=own, schedule=Schedule(steps=2, batch_size=8))
    spec = row.source().spec
    t = row.training(spec)
    ts, batch = jax.jit(t.init)(jax.random.key(0)), example_batch(spec, jax.random.key(1), 8)
    for moves in (True, True, False):  # at the end of the run the rate is 0
        new, _ = jax.jit(t.step)(ts, batch)
        pairs = zip(*map(jax.tree.leaves, (new.params, ts.params)), strict=True)
        assert any(bool((a != b).any()) for a, b in pairs) == moves
        ts = new
