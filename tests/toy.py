"""A toy to train, and its steps by hand.

It is a game of two quadratic losses with noise, whose gradients are written down below; a third
entry of its parameters has no loss, and its state counts the evaluations of one loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gates import quick

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


def toy(turns=TURNS, noisy=True):
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
            lambda params, state, key, n, cond=None: None,
            turns=turns,
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
