"""The gates that every row of the zoo has to pass: G1, G6, G10, G14, samples and scores. To cover a
new row, add it to the zoo and do nothing here. The gates of `training` are in
`test_gates_of_training.py`.

A new *family* adds its analytic loss (`known_losses.analytic`), and to the tables below where they
apply. Models are `Recipe.tiny` ones, on short sequences, compiled without optimisation (`quick`).
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows
from gates import (
    by_hand,
    differ,
    named,
    quick,
)
from known_losses import KEY, analytic
from rows import (
    COVERING,
    B,
    batch,
    every_row,
    gradient,
    one_device,
    optimizer,
    setup,
    widen,
)

from genjax.learning.step import training
from genjax.protocol import InitFn, LossFn, SampleFn, ScoreFn

# Rows whose losses depend on the rest of the batch by design (batch statistics), which G6 then
# wants to see.
BATCH_COUPLED = {"dcgan-mnist"}


@every_row
def test_g1_loss_equals_the_analytic_value(name):
    row = setup(name)
    params, known = analytic(row)
    assert known.keys() == row.losses.keys()
    for player, wanted in known.items():
        value, _ = row.losses[player](params, row.state, batch(name), KEY, 0)
        np.testing.assert_allclose(value, wanted(batch(name)), rtol=1e-5)


@every_row
def test_g6_an_example_changes_its_own_loss_and_no_other(name):
    """Noise belongs to a position in the batch, so instead of permuting examples one of them is
    exchanged.
    """
    row, key = setup(name), jax.random.key(3)
    params = rows.grown(row.params)
    values = {
        player: lambda batch, loss=loss: loss(params, row.state, batch, key, 0)[0]
        for player, loss in row.losses.items()
    }
    if row.score:
        values["score"] = lambda batch: row.score(params, row.state, batch, key)
    good, other = batch(name), batch(name, 1)

    def exchange(j):
        def one(mine, others):
            exchanged = np.array(mine)
            exchanged[j] = np.asarray(others)[j]
            return exchanged

        return by_hand(one, good, other)

    for what, value in values.items():
        before = np.asarray(value(good))
        for j in (0, 3, B - 1):
            after = np.asarray(value(exchange(j)))
            changed = np.flatnonzero(before != after).tolist()
            data_free = what in rows.DATA_FREE.get(row.recipe.family, ())
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


@every_row
def test_g10_the_gradient_reaches_every_parameter(name):
    for player in setup(name).model.losses:
        own, value_and_grad = gradient(name, player)
        with jax.enable_x64(True):
            several = [named(value_and_grad(own, widen(batch(name, seed)))[1]) for seed in range(3)]
        unused = [path for path in several[0] if not any(grads[path].any() for grads in several)]
        finite = all(np.isfinite(leaf).all() for grads in several for leaf in grads.values())
        assert finite, f"the gradient of {player} is not finite"
        assert not unused, f"no influence on the loss of {player}: {unused}"


@every_row
def test_g10_a_turn_changes_its_own_players_parameters_only(name):
    """With one player and no entry besides, nothing else can change, and what its gradient reaches
    (the gate above) SGD moves: of such rows those of the covering set take a step.
    """
    row = setup(name)
    if set(row.params) == set(row.losses) and len(row.losses) == 1:
        if name in COVERING:
            start, after, _ = one_device(name)
            assert differ(after.params, widen(start).params)
        return
    for player in row.losses:
        own = {player: row.model.losses[player]}
        alone = row.model._replace(losses=own, turns=(), noise={})
        t = training(alone, optimizer())
        start = t.init(jax.random.key(0))
        after, _ = quick(t.step)(start, batch(name))
        assert {path.split("/")[0] for path in differ(after.params, start.params)} == {player}


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


@every_row
def test_samples_are_of_the_kind_that_the_spec_says(name):
    row, n = setup(name), 2 * B
    spec, drawn = row.spec, [batch(name, seed).cond for seed in range(2)]  # as other gates do
    cond = by_hand(lambda *two: np.concatenate(two), *drawn)

    def draw(key, cond=cond):
        return np.asarray(row.sample(rows.grown(row.params), row.state, key, n=n, cond=cond))

    x = draw(jax.random.key(0))
    assert x.shape == (n, *spec.shape)
    assert x.dtype == spec.dtype
    assert np.isfinite(x).all()
    if spec.kind != "continuous":
        assert (x == np.floor(x)).all()
        assert x.min() >= 0
        assert x.max() <= spec.top
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
