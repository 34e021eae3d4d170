"""What refuses what does not keep the contract: trees by name, models, and every function of a
`checked` one.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.checks import (
    by_name,
    check_cond,
    check_key,
    check_model,
    check_per_example,
    checked,
    leaves_by_name,
    mismatch,
)
from genjax.errors import ConfigError
from genjax.families.cnf import cnf
from genjax.families.flows import realnvp
from genjax.families.gan import gan
from genjax.families.rnn import rnn
from genjax.families.ssm import ssm
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.learning.step import training
from genjax.protocol import Aux, Batch, DataSpec, Model

SPEC = DataSpec((2,), "continuous", name="plane")
KEY = jax.random.key(0)
X = jnp.ones((3, 2))


def small(**changes):
    """x ~ N(w, 1) for a player, and an entry that follows it; the state counts calls."""

    def init(key):
        return {"student": {"w": jnp.zeros(2)}}, {"student": {"calls": jnp.zeros(())}}

    def square(params, batch):
        return jnp.sum(jnp.square(batch.x - params["student"]["w"][None]), axis=1)

    def loss(params, state, batch, key, step):
        calls = {"student": {"calls": state["student"]["calls"] + 1}}
        return 0.5 * square(params, batch), Aux(calls, {"square": square(params, batch)})

    def log_prob(params, state, batch, key):
        return -0.5 * square(params, batch)

    def sample(params, state, key, n, cond=None):
        return params["student"]["w"][None] + jax.random.normal(key, (n, 2))

    model = Model(SPEC, init, {"student": loss}, sample, log_prob=log_prob, bound=log_prob)
    return model._replace(**changes)


# --- trees by name --------------------------------------------------------------------------------

TREE = {"net": {"layers": {i: {"kernel": jnp.full((2, 3), i)} for i in range(12)}}, "scale": X}


def test_leaves_have_their_paths_for_names():
    named = leaves_by_name(TREE)
    assert set(named) == {f"net/layers/{i}/kernel" for i in range(12)} | {"scale"}
    assert named["net/layers/10/kernel"][0, 0] == 10


def test_a_tree_that_fits_is_itself():
    assert mismatch(TREE, TREE) == []
    assert by_name(TREE, TREE, "it") is TREE
    shapes = jax.eval_shape(lambda: TREE)
    assert by_name(TREE, shapes, "it") is TREE


def test_keys_of_another_kind_are_matched_by_their_text():
    text = {"net": {"layers": {str(i): leaf for i, leaf in TREE["net"]["layers"].items()}}}
    found = by_name({**TREE, **text}, TREE, "it")
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for i in range(12):
        assert found["net"]["layers"][i]["kernel"][0, 0] == i


def test_what_differs_is_named():
    layers = {i: leaf for i, leaf in TREE["net"]["layers"].items() if i != 3}
    layers[4] = {"weight": layers[4]["kernel"]}
    layers[5] = {"kernel": jnp.zeros((3, 2))}
    given = {"net": {"layers": layers}, "scale": X, "shift": X}
    assert mismatch(given, TREE) == [
        "net/layers/3/kernel: missing",
        "net/layers/4/kernel: missing",
        "net/layers/4/weight: not of this model",
        "shift: not of this model",
        "net/layers/5/kernel: expected shape [2, 3]; found [3, 2]",
    ]
    assert mismatch(given, TREE, most=2) == [
        "net/layers/3/kernel: missing",
        "net/layers/4/kernel: missing",
        "... and 3 more",
    ]
    with pytest.raises(ConfigError, match=r"(?s)The tree does not fit .*4/weight: not of this mod"):
        by_name(given, TREE, "The tree")


# --- single values --------------------------------------------------------------------------------


def test_keys_are_typed():
    check_key(KEY)
    for wrong, match in (
        (jax.random.PRNGKey(0), r"an array of uint32\[2\]. Make one with jax.random.key"),
        (0, "got a int"),
    ):
        with pytest.raises(TypeError, match=match):
            check_key(wrong)


@pytest.mark.parametrize("cond", [[0, 4], [-1, 0]])
def test_labels_out_of_range_are_seen_where_they_are_known(cond):
    spec = DataSpec((2,), "continuous", n_classes=4)
    with pytest.raises(ValueError, match="got labels from"):
        check_cond(spec, jnp.asarray(cond), 2)

    def run(cond):
        check_cond(spec, cond, 2)
        return cond

    np.testing.assert_array_equal(jax.jit(run)(jnp.asarray(cond)), cond)  # in a trace no one knows


def test_values_are_one_for_each_example():
    ok = jnp.zeros(4)
    check_per_example(ok, {"kl": ok}, 4, "vae")
    with pytest.raises(ConfigError, match=r"loss of 'vae' must be .* shape \[4\]; got shape \[\]"):
        check_per_example(jnp.zeros(()), {}, 4, "vae")
    with pytest.raises(ConfigError, match=r"metric 'kl' of 'vae' must be .*; got shape \[4, 1\]"):
        check_per_example(ok, {"kl": jnp.zeros((4, 1))}, 4, "vae")


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"follows": {"target": ("teacher", 0.9)}},
            "follows.'target'. names the player 'teacher'; those with a loss are: student",
        ),
        ({"follows": {"student": ("student", 0.9)}}, "'student' has a loss and cannot follow"),
        ({"follows": {"target": ("student", 1.5)}}, r"must be in \[0, 1\]; got 1.5"),
        ({"noise": {"teacher": max}}, "noise names the player 'teacher'; those .* are: student"),
        (
            {"losses": {"student": lambda params, state, batch, key: None}},
            r"takes \(params, state, batch, key\); a loss takes .* Add `step`",
        ),
    ],
)
def test_what_can_be_seen_of_a_model_before_it_runs(changes, match):
    for check in (check_model, checked):
        with pytest.raises(ConfigError, match=match):
            check(small(**changes))


def test_entries_that_follow_a_player_begin_as_its_copies():
    model = checked(small(follows={"target": ("student", 0.9)}))
    params, _ = model.init(KEY)
    assert set(params) == {"student", "target"}
    assert params["target"]["w"] is not params["student"]["w"]  # an alias could not be donated
    np.testing.assert_array_equal(params["target"]["w"], params["student"]["w"])
    with pytest.raises(ConfigError, match="target/w: missing"):
        model.log_prob({"student": params["student"]}, {"student": {"calls": 0.0}}, Batch(X), KEY)


def test_an_entry_that_init_makes_stays_as_it_is():
    init = small().init

    def other(key):
        params, state = init(key)
        return {**params, "target": {"w": jnp.full(2, 7.0)}}, state

    model = checked(small(init=other, follows={"target": ("student", lambda step: 0.9)}))
    np.testing.assert_array_equal(model.init(KEY)[0]["target"]["w"], 7.0)


FUNCTIONS = {
    "loss": lambda model, *trees: model.losses["student"](*trees, Batch(X), KEY, 0),
    "log_prob": lambda model, *trees: model.log_prob(*trees, Batch(X), KEY),
    "bound": lambda model, *trees: model.bound(*trees, Batch(X), KEY),
    "sample": lambda model, *trees: model.sample(*trees, KEY, 3),
    "prepare": lambda model, *trees: model.prepare(*trees, Batch(X), KEY),
}


def prepared(params, state, batch, key):
    return {"student": {"w": jnp.mean(batch.x, axis=0)}}, state


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_takes_its_parameters_and_state_by_name(name):
    model = checked(small(prepare=prepared))
    params, state = model.init(KEY)
    call = FUNCTIONS[name]
    call(model, params, state)
    with pytest.raises(ConfigError, match=r"(?s)parameters does not fit.*w: missing.*weight: not"):
        call(model, {"student": {"weight": jnp.zeros(2)}}, state)
    with pytest.raises(ConfigError, match=r"student/w: expected shape \[2\]; found \[3\]"):
        call(model, {"student": {"w": jnp.zeros(3)}}, state)
    with pytest.raises(ConfigError, match=r"(?s)The state does not fit.*student/calls: missing"):
        call(model, params, {"student": {}})


@pytest.mark.parametrize(
    ("name", "batch", "match"),
    [
        ("loss", Batch(jnp.ones((3, 3))), "batch.x of plane must have shape"),
        ("bound", Batch(X, cond=jnp.zeros(3, jnp.int32)), "unconditional"),
        ("log_prob", Batch(X, weight=jnp.ones(2)), r"batch.weight must have shape \[3\]"),
        ("prepare", Batch(jnp.ones((3, 2), jnp.int32)), "must be floating point; got int32"),
        *(
            (
                name,
                Batch(X[:0]),
                r"batch.x of plane must hold one example at least; got shape \[0, 2\]",
            )
            for name in ("loss", "bound", "log_prob", "prepare")
        ),
    ],
)
def test_every_function_looks_at_its_batch_and_key(name, batch, match):
    model = checked(small(prepare=prepared))
    trees = model.init(KEY)
    step = (0,) if name == "loss" else ()
    function = model.losses["student"] if name == "loss" else getattr(model, name)
    with pytest.raises((ValueError, TypeError), match=match):
        function(*trees, batch, KEY, *step)
    with pytest.raises(TypeError, match="Expected a typed PRNG key"):
        function(*trees, Batch(X), jax.random.PRNGKey(0), *step)


@pytest.mark.parametrize("n", [0, -2, 1.5, None])
def test_samples_are_a_whole_number_of_events(n):
    model = checked(small())
    with pytest.raises(ValueError, match="whole number n >= 1 of samples"):
        model.sample(*model.init(KEY), KEY, n)


def mean_of(function):
    """The same function with its first result averaged over the batch."""

    def averaged(*args):
        result = function(*args)
        if isinstance(result, tuple):
            return jnp.mean(result[0]), result[1]
        return jnp.mean(result)

    return averaged


def test_results_are_one_number_for_each_example():
    """A mean that a loss takes itself would be divided by the batch once more, without a word."""
    plain = small()
    losses = {"student": lambda *args: mean_of(plain.losses["student"])(*args)}
    model = checked(plain._replace(losses=losses, log_prob=mean_of(plain.log_prob)))
    trees = model.init(KEY)
    with pytest.raises(ConfigError, match=r"The loss of 'student' must be per example, .*\[3\]"):
        FUNCTIONS["loss"](model, *trees)
    with pytest.raises(ConfigError, match=r"log_prob must be per example, .*\[3\]; got shape \[\]"):
        FUNCTIONS["log_prob"](model, *trees)


def test_a_state_that_changes_its_shape_is_refused():
    def grown(params, state, batch, key, step):
        value, aux = small().losses["student"](params, state, batch, key, step)
        return value, aux._replace(state={"student": {"calls": jnp.zeros(4)}})

    model = checked(small(losses={"student": grown}))
    with pytest.raises(ConfigError, match="calls"):
        FUNCTIONS["loss"](model, *model.init(KEY))


def test_samples_of_another_shape_are_refused():
    model = checked(small(sample=lambda params, state, key, n, cond=None: jnp.zeros((n, 3))))
    with pytest.raises(AssertionError, match=r"\(4, 2\)"):
        model.sample(*model.init(KEY), KEY, 4)


def test_samples_of_tokens_are_whole_numbers():
    tokens = DataSpec((2,), "tokens", levels=3)
    drawn = {"float": jnp.zeros((4, 2)), "whole": jnp.zeros((4, 2), jnp.int32)}
    model_of = {
        name: checked(small(spec=tokens, sample=lambda *args, x=x, **kwargs: x))
        for name, x in drawn.items()
    }
    trees = model_of["whole"].init(KEY)
    assert model_of["whole"].sample(*trees, KEY, 4).dtype == jnp.int32
    with pytest.raises(ConfigError, match=r"must be whole numbers, .* gave float32"):
        model_of["float"].sample(*trees, KEY, 4)


def test_checks_cost_nothing_once_traced():
    plain = small()
    model = checked(plain)
    params, state = model.init(KEY)
    programs = [
        jax.jit(one.log_prob).lower(params, state, Batch(X), KEY).as_text()
        for one in (plain, model)
    ]
    assert programs[0].count("stablehlo") == programs[1].count("stablehlo")


def returning(value):
    return small(losses={"student": lambda params, state, batch, key, step: value(batch, state)})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda batch, state: batch.x.sum(-1), r"must return \(loss, genjax\.Aux.*got .*Array"),
        (lambda batch, state: (batch.x.sum(-1), {}), r"must return .*got \(\w+, dict\)"),
        (
            lambda batch, state: (jax.lax.complex(batch.x, batch.x)[:, 0], Aux(state, {})),
            "must be real numbers",
        ),
        (
            lambda batch, state: (batch.x[:, 0], Aux(state, {"loss": batch.x[:, 0]})),
            "called 'loss'",
        ),
    ],
    ids=["no aux", "a plain tuple", "complex", "the loss's name"],
)
def test_a_loss_of_another_form_is_refused(value, text):
    model = checked(returning(value))
    with pytest.raises(ConfigError, match=text):
        FUNCTIONS["loss"](model, *model.init(KEY))
    t = training(returning(value), optax.sgd(0.1))
    ts = t.init(KEY)
    with pytest.raises(ConfigError, match=text):
        t.step(ts, Batch(X))


@pytest.mark.parametrize("decay", ["0.9", None, lambda: 0.9, jnp.zeros(3)])
def test_a_decay_that_is_neither_a_number_nor_a_function_of_the_step_is_refused(decay):
    with pytest.raises(ConfigError, match="The decay of follows"):
        checked(small(follows={"target": ("student", decay)}))


LENGTHS = DataSpec((6, 2), "continuous", step="frame", lengths=True)


@pytest.mark.parametrize("build", [partial(vae, latent_dim=2), gan])
def test_families_of_whole_events_refuse_sequences_of_several_lengths(build):
    with pytest.raises(ConfigError, match=r"would model their padding\. Use a sequence family"):
        build(LENGTHS, hidden=(4,))


@pytest.mark.parametrize(
    "build",
    [
        partial(rnn, d_hidden=4),
        partial(transformer, d_model=8, n_layers=1, n_heads=2),
        partial(ssm, d_model=8, n_layers=1),
        partial(vrnn, d_hidden=4, latent_dim=2, hidden=(4,)),
    ],
)
def test_padding_counts_for_nothing_whatever_it_is(build):
    model = build(LENGTHS)
    (player,) = model.losses
    x = jax.random.normal(KEY, (2, 6, 2))
    params, state = jax.jit(model.init)(KEY)

    @jax.jit
    def of(x):
        batch = Batch(x, length=jnp.array([3, 6]))

        def loss(params):
            value, _ = model.losses[player](params, state, batch, KEY, jnp.zeros((), jnp.int32))
            return jnp.sum(value)

        return model.score(params, state, batch, KEY), jax.grad(loss)(params)

    usual = of(x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(usual))
    spoiled = of(x.at[0, 3:].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, spoiled, usual)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
@pytest.mark.parametrize(
    "build",
    [partial(vae, n_bound_samples=2), partial(realnvp, n_layers=2), partial(cnf, n_steps=2)],
)
@pytest.mark.filterwarnings("error:Explicitly requested dtype")
def test_real_numbers_of_any_precision_are_scored_in_float32(build, dtype):
    """Those of 16 bits ended in an error of a scan, those of 64 in jax's warnings."""
    model = build(DataSpec((2,), "continuous", cond_dim=1), hidden=(4,))
    x, key = np.asarray([[0.5, -1.25]], dtype), jax.random.key(0)
    params, state = model.init(key)
    given = Batch(x, np.asarray([[0.75]], dtype))
    wide = Batch(x.astype(np.float32), np.asarray([[0.75]], np.float32))
    got = model.score(params, state, given, key)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, model.score(params, state, wide, key))
