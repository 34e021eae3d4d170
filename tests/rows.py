"""The rows of the zoo as tiny models, with what is run of them: compiled once per row and shared
between gates.
"""

import dataclasses
import functools
import inspect
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from gates import by_hand, optimised, quick

from genjax.data import example_batch
from genjax.families.compose import reflow
from genjax.families.diffusion import diffusion
from genjax.families.gan import gan
from genjax.families.ssm import ssm
from genjax.families.vae import vae
from genjax.learning.optim import track_ema
from genjax.learning.step import training
from genjax.protocol import Aux, Trained
from genjax.zoo import ZOO
from genjax.zoo.sections import sections_of

# examples in every batch: one for each fake device, and divisible by the parts of a microbatch
B = 8
STEPS = 5  # at most so many steps in a sequence
RATE = 2.0**-10  # the same number in every precision


def _changed(name, row, model=None, tiny=None):
    """A row of the zoo under another name, with other settings."""
    settings = {"model": {**row.model, **(model or {})}, "tiny": {**row.tiny, **(tiny or {})}}
    return dataclasses.replace(row, name=name, **settings)


# Ways that no row's tiny model takes. (What follows a player has a toy of its own, in `toy.py`,
# until a row has it.)
EXTRA = {
    row.name: row
    for row in (
        _changed("iwae-vamp", ZOO["iwae"], {"prior": "vamp"}, {"n_pseudo_inputs": 3}),
        _changed("spectral-cgan", ZOO["cgan"], {"spectral_norm": True}),
        _changed(
            "learned-schedule",
            ZOO["diffusion"],
            {"noise_schedule": "learned", "weighting": "elbo", "prediction": "epsilon"},
        ),
        _changed("lstm-lanes", ZOO["lstm"], tiny={"lanes": B}),
    )
}
MODELS = {**ZOO, **EXTRA}
# Of a file that has several builders, as that of flows, one stands for all.
first_of_family = {row.family.__module__: row.name for row in reversed(ZOO.values())}.values()
# The gates of what `training` and its transforms do (G2 to G5, G7 to G9, G11, G12) are of code
# paths, not of rows. They run on this set of models: the first row of each family, unless another
# takes every way that it takes, and one for each other way through a loss or a state. Of networks
# convolutions have ways of their own; other layers are told apart by the tests of networks. A test
# holds the features of every row to it.
TAKEN_BY_OTHERS = {
    "diffusion": "learned-schedule",
    "gan-ring": "spectral-cgan",
    "flow-matching": "vae-flow-prior",
}
COVERING = tuple(
    dict.fromkeys(
        (
            *(name for name in first_of_family if name not in TAKEN_BY_OTHERS),
            "vae-conv",
            "iwae-vamp",
            "spectral-cgan",
            "dcgan-mnist",
            "lstm-lanes",
            "gru-names",
            "vrnn-jsb",
            "edm-mnist",
            "learned-schedule",
            "vae-flow-prior",
        )
    )
)


def _over(names, quick=()):
    """These models, of which some are in the quick tier.

    Within a module all gates of one come one after the other, and so in one worker, which compiles
    what they share once (that is what the scope is for).
    """
    params = [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
    return pytest.mark.parametrize("name", params, scope="module")


def _where(holds):
    return _over([name for name in COVERING if holds(MODELS[name])], ["vae"])


every_row = _over(ZOO, first_of_family)
# For gates that compile programs of their own: one model is enough for a quick look.
covering = _where(lambda row: True)
# Streams go on from batch to batch, so that a batch cannot be split.
splitting = _where(lambda row: row.name != "lstm-lanes")
# What a row made of another one learns is in the other one's latents or samples.
memorising = _where(lambda row: row.first is None)
# The largest singular value is estimated by vectors that the step itself moves on, and gradients
# take them as constant, by design: a difference quotient moves them.
differentiable = _where(lambda row: row.name != "spectral-cgan")
narrowing = _where(lambda row: "dtype" in inspect.signature(row.family).parameters)
# For what a gate of the whole set has seen in another form.
a_few = _over(("vae", "gan-ring", "glow-mnist"))


# Losses that need not look at an example, only at its condition: a generator may be judged by the
# discriminator alone, and a flow learns from pairs that another makes.
DATA_FREE = {gan: {"generator"}, reflow: {"flow"}}


def blind(name):
    """Whether no loss of a row looks at an example."""
    return set(setup(name).losses) <= DATA_FREE.get(setup(name).recipe.family, set())


CONVOLUTIONS = ("conv", "dcgan", "resnet", "unet")


def features(name):
    """The ways through the code that a row takes and another row might not."""
    row = setup(name)
    settings = {k: value for k, (_, value, _) in sections_of(row.recipe)["model"].items()}
    model, spec = row.model, row.spec
    seen = {
        "labels": spec.n_classes is not None,
        "vectors as conditions": spec.cond_dim is not None,
        "end token": spec.end is not None,
        "lengths": spec.lengths,
        "state": bool(jax.tree.leaves(row.state)),
        "batch statistics": "batch"
        in (settings.get("generator_norm"), settings.get("discriminator_norm")),
        "spectral normalisation": bool(settings.get("spectral_norm")),
        "gradient penalty": any(settings.get(k) for k in ("r1", "r2", "gradient_penalty")),
        "several players": len(model.losses) > 1,
        "frozen entries": bool(set(row.params) - set(model.losses) - set(model.follows)),
        "an entry that follows": bool(model.follows),
        "preparation from data": model.prepare is not None,
        "carry of streams": bool(settings.get("lanes")),
        "learned schedule": settings.get("noise_schedule") == "learned",
        "preconditioning": settings.get("precondition") == "edm",
        "learned prior": settings.get("prior") == "vamp",
        "importance weights": settings.get("gradient") == "dreg",
        "particles": settings.get("objective") == "fivo",
        "dropout of conditions": bool(settings.get("cond_dropout")),
        "latents of a first stage": row.recipe.first is not None and not row.recipe.composed,
    }
    kinds = ["cell", "discriminator_cond"]
    if row.recipe.family is ssm:
        kinds.remove("cell")  # a core is a network
    chosen = {f"{k}={settings[k]}" for k in kinds if k in settings}
    if settings.get("net") in CONVOLUTIONS:
        chosen.add("convolutions")
    own = {row.recipe.family.__module__, *chosen}
    return own | {what for what, there in seen.items() if there}


def _standing_on(recipe):
    """What a row's tiny model is built on: the spec of its data, or the tiny model of another row.

    A few steps of a sequence, or pixels of a large image, show all that many would.
    """
    if recipe.first is not None:
        first = setup(recipe.first)
        return Trained(first.model, grown(first.params), first.state)
    spec = recipe.source().spec
    if not spec.step:
        large = spec.size > 100
        return dataclasses.replace(spec, shape=(8, 8, spec.shape[2])) if large else spec
    return dataclasses.replace(spec, shape=(min(STEPS, spec.shape[0]), *spec.shape[1:]))


@functools.cache
def setup(name):
    """The row as a tiny model: recipe, what it is built on, spec, model, its parameters and state,
    and the functions on them, compiled.
    """
    row = MODELS[name]
    recipe = dataclasses.replace(row, model={**row.model, **row.tiny})
    on = _standing_on(recipe)
    model = recipe.build(on)
    t = training(model, optimizer())
    init = t.init  # not compiled: its small programs are those of other rows too
    first = init(jax.random.key(0))
    score = model.score
    return SimpleNamespace(
        recipe=recipe,
        on=on,
        spec=model.spec,
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
    """The procedure that the row itself describes, with skipping of steps that are not finite; of
    some rows a step as users have it.
    """
    recipe = setup(name).recipe
    schedule = dataclasses.replace(recipe.schedule, skip_nonfinite=True)
    t = dataclasses.replace(recipe, schedule=schedule).training(setup(name).on)
    return SimpleNamespace(t=t, init=t.init, step=whole(name)(t.step, donate_argnums=0))


# Rows whose steps are compiled as users have them where bits are compared: an MLP, a convolution
# with batch statistics, a loop over steps with a state, attention. It takes four times as long.
OPTIMISED = {"vae", "vae-conv", "dcgan-mnist", "lstm-lanes", "transformer"}


def whole(name):
    """How the real step of a row is compiled."""
    return optimised if name in OPTIMISED else quick


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
    """The same model, its losses evaluated over n parts, each of every n-th example, with the keys
    of `microbatch`, and put together again. All parts begin with the same state, and what they
    leave is averaged.
    """

    def loss_of(loss):
        def whole(params, state, batch, key, step):
            def part(at):
                value, (after, metrics) = loss(params, state, *at, step)
                return value, after, metrics

            def joined(old, new):
                over = share.reshape(n, *[1] * old.ndim).astype(old.dtype)
                return old + (over * (new - old[None])).sum(0)

            def split(leaf):
                return jax.numpy.stack([leaf[i::n] for i in range(n)])

            parts = jax.tree.map(split, batch)
            value, states, metrics = jax.lax.map(part, (parts, jax.random.split(key, n)))
            share = parts.weight.sum(1) / batch.weight.sum()
            value, metrics = jax.tree.map(lambda leaf: leaf.T.reshape(-1), (value, metrics))
            return value, Aux(jax.tree.map(joined, state, states), metrics)

        return whole

    return model._replace(losses={player: loss_of(loss) for player, loss in model.losses.items()})


def widen(tree):
    """In float64, where `jax.enable_x64` holds."""
    return by_hand(
        lambda leaf: leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf,
        tree,
    )


# Families whose gradient is, by design, not the derivative of the loss for fixed noise: builder
# arguments that make it so. (The estimators themselves are tested with the family.) Gradient
# penalties jump where a leaky ReLU has its kink, so they have no difference quotient there.
PLAIN_GRADIENT = {
    vae: {"gradient": "pathwise"},
    gan: {"r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0},
    diffusion: {"schedule_gradient": "bound"},
}


@functools.cache
def gradient(name, player):
    """In float64: (parameters, state, own -> batch -> mean loss and its gradient with respect to
    `own`), compiled.
    """
    row = setup(name)
    model = row.recipe.build(row.on, **PLAIN_GRADIENT.get(row.recipe.family, {}))
    with jax.enable_x64(True):
        params, state = widen((grown(row.params), row.state))

        def mean_loss(own, batch):
            return model.losses[player](
                {**params, player: own}, state, batch, jax.random.key(2), 0
            )[0].mean()

        return params[player], quick(jax.value_and_grad(mean_loss))
