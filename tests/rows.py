"""The rows of the zoo as tiny models, with what is run of them: compiled once per row and shared
between gates.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from gates import by_hand, optimised, quick

from genjax.data import example_batch
from genjax.learning.optim import track_ema
from genjax.learning.step import training
from genjax.protocol import Aux
from genjax.zoo import ZOO

# examples in every batch: one for each fake device, and divisible by the parts of a microbatch
B = 8
STEPS = 5  # at most so many steps in a sequence
RATE = 2.0**-10  # the same number in every precision

first_of_family = {row.family: row.name for row in reversed(ZOO.values())}.values()
# One row of each family is always run. The others are slow, and variants: CI runs them on one end
# of the supported versions. Within a module all gates of a row come one after the other, and so in
# one worker, which compiles what they share once (that is what the scope is for).
_others = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.variant]) for name in ZOO]
_slow = [
    pytest.param(name, marks=pytest.mark.slow) if name in first_of_family else one
    for name, one in zip(ZOO, _others, strict=True)
]
_one = [name if name == "vae" else one for name, one in zip(ZOO, _slow, strict=True)]
_own = [name if name in first_of_family else one for name, one in zip(ZOO, _others, strict=True)]
# For what a gate of every row has seen in another form.
first_rows = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in first_of_family], scope="module"
)
slow_rows = pytest.mark.parametrize("name", _slow, scope="module")
# For gates that compile programs of their own: one row is enough for a quick look, and CI runs
# every row.
one_row_quick = pytest.mark.parametrize("name", _one, scope="module")
every_row = pytest.mark.parametrize("name", _own, scope="module")


@functools.cache
def setup(name):
    """The row as a tiny model: recipe, spec, model, its parameters and state, and the functions on
    them, compiled.
    """
    row = ZOO[name]
    recipe = dataclasses.replace(row, model={**row.model, **row.tiny})
    spec = recipe.source().spec
    if spec.step:  # a few steps show all that many would
        spec = dataclasses.replace(spec, shape=(min(STEPS, spec.shape[0]), *spec.shape[1:]))
    model = recipe.build(spec)
    t = training(model, optimizer())
    init = t.init  # not compiled: its small programs are those of other rows too
    first = init(jax.random.key(0))
    score = model.log_prob or model.bound
    return SimpleNamespace(
        recipe=recipe,
        spec=spec,
        model=model,
        t=t,
        init=init,
        params=first.params,
        state=first.state,
        losses={player: quick(loss) for player, loss in model.losses.items()},
        score=score and quick(score),
        sample=quick(model.sample, static_argnames="n"),
    )


@functools.cache
def batch(name, seed=0, n=B):
    return example_batch(setup(name).spec, jax.random.key(100 + seed), n)


def optimizer(rate=RATE):
    """Linear in the gradient: Adam would blow up the rounding of a gradient that is nearly 0."""
    return optax.chain(optax.sgd(rate, momentum=0.9), track_ema(0.9))


@functools.cache
def plain(name):
    """The solo run that ensembles, sweeps and shards are held against; its learning rate is an
    argument.
    """
    model = setup(name).model
    step = quick(lambda rate, ts, batch: training(model, optimizer(rate)).step(ts, batch))
    return SimpleNamespace(
        t=setup(name).t,
        init=setup(name).init,
        step=lambda ts, batch, rate=RATE: step(np.float32(rate), ts, batch),
    )


@functools.cache
def one_device(name):
    """A start and, in float64, the state and metrics after three steps of the solo run, each of its
    own batch.
    """
    start = plain(name).init(jax.random.key(0))
    with jax.enable_x64(True):
        return start, *run(
            plain(name).step, widen(start), [widen(batch(name, seed)) for seed in range(3)]
        )


@functools.cache
def solo_runs(name, rates):
    """For each key and rate the first state, and, in float64 as rounding grows, the state and
    metrics after 4 steps.
    """
    t = plain(name)
    firsts = [t.init(key) for key in jax.random.split(jax.random.key(7), len(rates))]
    with jax.enable_x64(True):
        batches = [widen(batch(name, seed)) for seed in range(4)]
        starts = zip(rates, map(widen, firsts), strict=True)
        return firsts, [
            run(functools.partial(t.step, rate=rate), first, batches) for rate, first in starts
        ]


@functools.cache
def real(name):
    """The procedure that the row itself describes, with skipping of steps that are not finite; a
    step as users have it.
    """
    recipe = setup(name).recipe
    schedule = dataclasses.replace(recipe.schedule, skip_nonfinite=True)
    t = dataclasses.replace(recipe, schedule=schedule).training(setup(name).spec)
    return SimpleNamespace(t=t, init=t.init, step=optimised(t.step, donate_argnums=0))


def run(step, ts, batches):
    metrics = []
    for one in batches:
        ts, new = step(ts, one)
        metrics.append(new)
    return ts, metrics


def grown(params):
    """Parameters away from their init, where biases and the like are 0."""
    rng = np.random.default_rng(0)
    return by_hand(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), params)


def in_chunks(model, n):
    """The same model, its losses evaluated over n parts with the keys of `microbatch` and put
    together again.
    """

    def loss_of(loss):
        def whole(params, state, batch, key):
            def part(state, at):
                value, (state, metrics) = loss(params, state, *at)
                return state, (value, metrics)

            parts = jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), batch)
            state, found = jax.lax.scan(part, state, (parts, jax.random.split(key, n)))
            value, metrics = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
            return value, Aux(state, metrics)

        return whole

    return model._replace(losses={player: loss_of(loss) for player, loss in model.losses.items()})


def widen(tree):
    """In float64, where `jax.enable_x64` holds."""
    return by_hand(
        lambda leaf: leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf,
        tree,
    )
