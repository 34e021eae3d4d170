"""Toys to train, and their steps by hand.

The first is a game of two quadratic losses with noise, whose gradients are written down below; a
third entry of its parameters has no loss, and its state counts the evaluations of one loss. The
others show one thing each: an entry that follows a player (`anchored`), a state (`remembering`),
initialisation from data (`whitening`).
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gates import quick, stack

from genjax.checks import checked
from genjax.learning.step import training
from genjax.learning.transforms import microbatch
from genjax.protocol import Aux, Batch, DataSpec, Model

jitted = functools.cache(quick)  # many tests run the same step
SPEC = DataSpec((3,), "continuous", name="toy")
TURNS = (("disc", 2), ("gen", 1))
RATES = {"gen": 0.1, "disc": 0.05}
B, STEPS = 8, 3
TIGHT = 1e-5


def nothing(params, state, key, n, cond=None):
    """A sampler of models that are never sampled."""


def toy(turns=TURNS, noisy=True, follows=types.MappingProxyType({})):
    """gen: ½ Σ c (w - x)² + w·a + w·ε, so ∂/∂w = c (w - x) + a + ε; disc: ½ |a|² - a·(x - w) + a·ε,
    so ∂/∂a = a - x + w + ε.
    """

    def init(key):
        key_gen, key_disc = jax.random.split(key)
        params = {
            "gen": {"w": jax.random.normal(key_gen, (3,))},
            "disc": {"a": jax.random.normal(key_disc, (3,))},
        }
        return params | {"frozen": {"c": jnp.asarray([1.0, 2.0, 3.0])}}, {
            "disc": {"evaluations": jnp.zeros(())}
        }

    def noise(key, x):
        return jax.random.normal(key, x.shape) if noisy else jnp.zeros(x.shape)

    def gen(params, state, batch, key, step):
        w, a, c = params["gen"]["w"][None], params["disc"]["a"][None], params["frozen"]["c"][None]
        value = 0.5 * c * (w - batch.x) ** 2 + w * a + w * noise(key, batch.x)
        return value.sum(-1), Aux(state, {"first": batch.x[:, 0]})

    def disc(params, state, batch, key, step):
        w, a = params["gen"]["w"][None], params["disc"]["a"][None]
        value = 0.5 * a**2 - a * (batch.x - w) + a * noise(key, batch.x)
        return value.sum(-1), Aux({"disc": {"evaluations": state["disc"]["evaluations"] + 1}}, {})

    return checked(
        Model(
            SPEC,
            init,
            {"gen": gen, "disc": disc},
            nothing,
            turns=turns,
            follows=follows,
        )
    )


def by_hand(ts, batches, turns=TURNS):
    """What the steps must give: parameters in float64, and the mean losses of the last turns."""
    p = {
        "gen": np.asarray(ts.params["gen"]["w"], float),
        "disc": np.asarray(ts.params["disc"]["a"], float),
    }
    c = np.asarray([1.0, 2.0, 3.0])
    for offset, batch in enumerate(batches):
        x = np.asarray(batch.x, float)
        weight = np.ones(len(x)) if batch.weight is None else np.asarray(batch.weight, float)
        weight = weight / weight.sum()
        losses, order = {}, [player for player, times in turns for _ in range(times)]
        for index, player in enumerate(order):
            key_turn = jax.random.fold_in(ts.key, (int(ts.step) + offset) * len(order) + index)
            e, w, a = np.asarray(jax.random.normal(key_turn, x.shape), float), p["gen"], p["disc"]
            if player == "gen":
                loss, grads = 0.5 * c * (w - x) ** 2 + w * a + w * e, c * (w - x) + a + e
            else:
                loss, grads = 0.5 * a**2 - a * (x - w) + a * e, a - x + w + e
            losses[player] = weight @ loss.sum(1)
            p[player] = p[player] - RATES[player] * weight @ grads
    return p, losses


def sgd(scale=1.0):
    return {player: optax.sgd(rate * scale) for player, rate in RATES.items()}


@functools.cache
def game(scale=1.0, parts=1):
    """One member's own procedure, the same object each time, so that it is compiled once."""
    t = training(toy(), sgd(scale))
    return microbatch(t, parts) if parts > 1 else t


TRAIN = game(1.0, 1)


def batches(seed=0, weight=None, steps=STEPS):
    rng = np.random.default_rng(seed)
    return [
        Batch(jnp.asarray(rng.normal(size=(B, 3)), jnp.float32), None, weight) for _ in range(steps)
    ]


def run(t, ts, batches):
    step, metrics = jitted(t.step), []
    for batch in batches:
        ts, new = step(ts, batch)
        metrics.append(new)
    return ts, metrics


@functools.cache
def start(seed=0):
    return jitted(TRAIN.init)(jax.random.key(seed))


# --- members --------------------------------------------------------------------------------------

MEMBERS = 3


def keys():
    return jax.random.split(jax.random.key(11), MEMBERS)


def solo(parts=1, scales=(1.0,) * MEMBERS, own=None):
    """Each member's run on its own, stacked: the reference of all that trains members together."""
    runs = []
    for index, (key, scale) in enumerate(zip(keys(), scales, strict=True)):
        data = batches() if own is None else own[index]
        runs.append(run(game(float(scale), parts), jitted(TRAIN.init)(key), data))
    states, metrics = stack([ts for ts, _ in runs]), stack([stack(metrics) for _, metrics in runs])
    return states._replace(step=states.step[0]), metrics  # metrics [member, step]


@functools.cache
def reference(parts=1):
    return solo(parts)


def swap(metrics):
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), metrics)


# --- an entry that follows a player ---------------------------------------------------------------


def anchored(decay=0.9):
    """½ Σ (w - x)² + ½ Σ (w - t)², where t follows w: ∂/∂w = (w - x) + (w - t)."""

    def init(key):
        return {"net": {"w": jax.random.normal(key, (3,))}}, {"net": {}}

    def loss(params, state, batch, key, step):
        w, t = params["net"]["w"][None], params["target"]["w"][None]
        value = 0.5 * (w - batch.x) ** 2 + 0.5 * (w - t) ** 2
        return value.sum(-1), Aux(state, {"apart": jnp.sum((w - t) ** 2, -1).repeat(len(batch.x))})

    model = Model(SPEC, init, {"net": loss}, nothing, follows={"target": ("net", decay)})
    return checked(model)


def anchored_by_hand(ts, batches, rate, decay):
    """w and t after the steps, in float64."""
    w, t = (np.asarray(ts.params[name]["w"], float) for name in ("net", "target"))
    for index, batch in enumerate(batches):
        w = w - rate * ((w - np.asarray(batch.x, float)).mean(0) + (w - t))
        d = float(decay(int(ts.step) + index)) if callable(decay) else decay
        t = d * t + (1 - d) * w
    return {"net": {"w": w}, "target": {"w": t}}


# --- a state --------------------------------------------------------------------------------------

MOMENTUM = 0.9


def remembering():
    """½ Σ (w - x)², and a state with everything that one can hold: a moving average of the batch's
    mean, counters, what was seen first, a constant, a key.
    """

    def init(key):
        state = {
            "mean": jnp.zeros((3,)),
            "whole": jnp.zeros((), jnp.int32),
            "real": jnp.zeros(()),
            "seen": jnp.zeros((), jnp.int32),
            "constant": jnp.asarray([0.1, 1 / 3, -jnp.inf]),
            "key": jax.random.key(7),
        }
        return {"net": {"w": jax.random.normal(key, (3,))}}, {"net": state}

    def loss(params, state, batch, key, step):
        old = state["net"]
        weight = jnp.ones(len(batch.x)) if batch.weight is None else batch.weight
        mean = (weight[:, None] * batch.x).sum(0) / weight.sum()
        new = {
            "mean": MOMENTUM * old["mean"] + (1 - MOMENTUM) * mean,
            "whole": old["whole"] + 1,
            "real": old["real"] + 1,
            "seen": (1000 * batch.x[0, 0]).astype(jnp.int32),
            "constant": old["constant"],
            "key": jax.random.fold_in(old["key"], 1),
        }
        value = 0.5 * (params["net"]["w"][None] - batch.x) ** 2
        return value.sum(-1), Aux({"net": new}, {})

    return checked(Model(SPEC, init, {"net": loss}, nothing))


# --- initialisation from data ---------------------------------------------------------------------

JITTER = 0.1


def whitening(scale=1.0):
    """-ln N(x; shift, e^{2 log_scale}), whose first batch gives shift (with noise) and log_scale,
    times `scale`; the state counts how often that happened.
    """

    def init(key):
        params = {"shift": jax.random.normal(key, (3,)), "log_scale": jnp.zeros((3,))}
        return {"net": params}, {"net": {"prepared": jnp.zeros((), jnp.int32)}}

    def loss(params, state, batch, key, step):
        own = params["net"]
        z = (batch.x - own["shift"][None]) * jnp.exp(-own["log_scale"])[None]
        return (0.5 * z**2 + own["log_scale"][None]).sum(-1), Aux(state, {})

    def prepare(params, state, batch, key):
        weight = jnp.ones(len(batch.x)) if batch.weight is None else batch.weight
        weight = (weight / weight.sum())[:, None]
        mean = (weight * batch.x).sum(0)
        variance = (weight * (batch.x - mean[None]) ** 2).sum(0)
        own = {
            "shift": scale * (mean + JITTER * jax.random.normal(key, (3,))),
            "log_scale": 0.5 * jnp.log(variance),
        }
        return {**params, "net": own}, {"net": {"prepared": state["net"]["prepared"] + 1}}

    follows = {"slow": ("net", 0.9)}
    return checked(Model(SPEC, init, {"net": loss}, nothing, prepare=prepare, follows=follows))
