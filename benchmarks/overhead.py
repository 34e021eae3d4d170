"""What the abstractions cost: training steps of two families against hand-written ones, and the loop against a bare one."""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import alternate, ratio, summary, write
from genjax import config, loop
from genjax.data import example_batch
from genjax.families.denoising import diffusion
from genjax.families.variational import vae
from genjax.log import Log
from genjax.measure import stepper
from genjax.protocol import DataSpec, Model
from genjax.train import compiled, training
from genjax.zoo import ZOO

SIZES: dict[str, dict[str, Any]] = {
    "small (8x8, 2x256, z 8, batch 128)": {"side": 8, "width": 256, "latent": 8, "batch": 128},
    "medium (28x28, 2x500, z 50, batch 128)": {"side": 28, "width": 500, "latent": 50, "batch": 128},
}
DIFFUSION_SIZES: dict[str, dict[str, Any]] = {
    "small (64 values, 3x256, batch 128)": {"d": 64, "width": 256, "batch": 128},
    "medium (784 values, 3x512, batch 128)": {"d": 784, "width": 512, "batch": 128},
}
T_END = 1e-3  # where the cosine schedule is cut off
D_EMBED = 128
Layers = dict[str, tuple[int, int]]


class HandWritten(NamedTuple):
    """A hand-written training: init(key) -> state, loss(params, x, key) and step(state, x) -> (state, loss)."""

    init: Callable[..., Any]
    loss: Callable[..., Any]
    step: Callable[..., Any]


def by_hand(sizes: Layers, loss: Callable[..., jax.Array]) -> HandWritten:
    """Dense layers and Adam as anyone would write them in plain jax: nothing of genjax, flax or optax."""

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(sizes))
        shapes = list(sizes.items())
        w = {n: jax.random.normal(k, s) / jnp.sqrt(float(s[0])) for k, (n, s) in zip(keys, shapes, strict=True)}
        b = {n: jnp.zeros(s[1]) for n, s in shapes}
        params = {"w": w, "b": b}
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return {"params": params, "m": zeros(), "v": zeros(), "count": jnp.zeros((), jnp.int32), "key": key}

    def step(ts: Any, x: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(ts["params"], x, jax.random.fold_in(ts["key"], ts["count"]))
        count = ts["count"] + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, ts["m"], grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, ts["v"], grads)
        c1, c2 = 1 - 0.9 ** count.astype(jnp.float32), 1 - 0.999 ** count.astype(jnp.float32)
        params = jax.tree.map(lambda p, m, v: p - 1e-3 * (m / c1) / (jnp.sqrt(v / c2) + 1e-8), ts["params"], m, v)
        return {"params": params, "m": m, "v": v, "count": count, "key": ts["key"]}, value

    return HandWritten(jax.jit(init), loss, jax.jit(step, donate_argnums=0))


def hand_written(side: int, width: int, latent: int) -> HandWritten:
    """A Bernoulli VAE of binary images."""
    d = side * side
    sizes = {
        "e0": (d, width),
        "e1": (width, width),
        "e2": (width, 2 * latent),
        "d0": (latent, width),
        "d1": (width, width),
        "d2": (width, d),
    }

    def loss(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        w, b = params["w"], params["b"]
        h = 2.0 * x.reshape(x.shape[0], d) - 1.0
        h = jax.nn.gelu(h @ w["e0"] + b["e0"])
        h = jax.nn.gelu(h @ w["e1"] + b["e1"])
        h = h @ w["e2"] + b["e2"]
        mean, log_scale = h[:, :latent], h[:, latent:]
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        h = jax.nn.gelu(z @ w["d0"] + b["d0"])
        h = jax.nn.gelu(h @ w["d1"] + b["d1"])
        logits = h @ w["d2"] + b["d2"]
        flat = x.reshape(x.shape[0], d)
        log_likelihood = jnp.sum(flat * logits - jax.nn.softplus(logits), axis=1)
        kl = jnp.sum(0.5 * (jnp.exp(2 * log_scale) + mean**2 - 1) - log_scale, axis=1)
        return jnp.mean(kl - log_likelihood)

    return by_hand(sizes, loss)


def hand_written_diffusion(d: int, width: int) -> HandWritten:
    """Diffusion of vectors with the cosine schedule and v-prediction; three hidden layers that know of the noise level."""
    sizes = {"noise": (32, D_EMBED), "embed": (D_EMBED, D_EMBED), "h0": (d, width), "h1": (width, width), "h2": (width, width)}
    sizes |= {f"m{i}": (D_EMBED, 2 * width) for i in range(3)} | {"out": (width, d)}

    def loss(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        w, b = params["w"], params["b"]
        key_time, key_noise, _, _ = jax.random.split(key, 4)
        t = T_END + (1 - 2 * T_END) * jax.random.uniform(key_time, (x.shape[0],))
        noise = jax.random.normal(key_noise, x.shape)
        alpha, sigma = jnp.cos(jnp.pi / 2 * t)[:, None], jnp.sin(jnp.pi / 2 * t)[:, None]
        x_t = alpha * x + sigma * noise
        angles = (jnp.log(alpha) - jnp.log(sigma)) / 2 * jnp.geomspace(0.25, 8.0, 16)
        e = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
        e = jax.nn.silu(jax.nn.silu(e @ w["noise"] + b["noise"]) @ w["embed"] + b["embed"])
        h = x_t
        for i in range(3):
            scale, shift = jnp.split(e @ w[f"m{i}"] + b[f"m{i}"], 2, axis=1)
            y = jax.nn.silu((1 + scale) * (h @ w[f"h{i}"] + b[f"h{i}"]) + shift)
            h = h + y if h.shape == y.shape else y
        missed = h @ w["out"] + b["out"] - (alpha * noise - sigma * x)
        return jnp.mean(jnp.sum(missed**2, axis=1))

    return by_hand(sizes, loss)


def step_overhead(seconds: float) -> list[dict[str, Any]]:
    """ms per step of genjax and by hand, in alternation in one process, and the ratio round by round."""
    rows = []
    for name, size in SIZES.items():
        spec = DataSpec((size["side"], size["side"], 1), "binary", name="random bits")
        model = vae(spec, hidden=(size["width"],) * 2, latent_dim=size["latent"])
        hand = hand_written(size["side"], size["width"], size["latent"])
        rows.append({"family": "vae", "size": name, **_compare(model, hand, size["batch"], seconds)})
    for name, size in DIFFUSION_SIZES.items():
        model = diffusion(DataSpec((size["d"],), "continuous", name="random vectors"), hidden=(size["width"],) * 3)
        hand = hand_written_diffusion(size["d"], size["width"])
        rows.append({"family": "diffusion", "size": name, **_compare(model, hand, size["batch"], seconds)})
    return rows


def _compare(model: Model, hand: HandWritten, batch_size: int, seconds: float) -> dict[str, Any]:
    batch = jax.jit(partial(example_batch, model.spec), static_argnums=1)(jax.random.key(1), batch_size)
    t = compiled(training(model, optax.adam(1e-3)))
    calls = {
        "genjax": stepper(t.step, t.init(jax.random.key(0)), batch),
        "hand-written": stepper(hand.step, hand.init(jax.random.key(0)), batch.x),
    }
    # Short turns, so that both programs of a round meet the machine in the same mood: a shared one changes within 0.1 s.
    rounds = alternate(calls, seconds, block=0.02)
    return {
        "genjax_ms": 1000 * summary(rounds["genjax"])["median"],
        "hand_written_ms": 1000 * summary(rounds["hand-written"])["median"],
        "ratio": ratio(rounds["genjax"], rounds["hand-written"]),
        "compiled_programs": t.step._cache_size(),  # type: ignore[attr-defined]
    }


def loop_overhead(rounds: int = 6, steps: int = 5000, warm: int = 1000) -> dict[str, Any]:
    """What `fit` adds per step to the same dispatches without it, at a step of about two milliseconds.

    Both run the same compiled program of 50 steps a dispatch; `fit` also reads the metrics, averages them, writes
    metrics.jsonl and TensorBoard every 100 steps, and calls a progress function. The first `warm` steps are left out.
    What it adds is taken from the processor time of the thread that does all this; other work disturbs the clock.
    """
    recipe = config.replace(ZOO["vae"], batch_size=128, hidden=(256, 256))
    source = recipe.source()
    arrays = source.load().train
    feed = loop.device_feed(recipe.training(source.spec), source, arrays, recipe.schedule.batch_size, 0)
    k = recipe.schedule.steps_per_call
    bare_program = compiled(feed.training(k))

    def now() -> np.ndarray:  # seconds on the clock and of this thread's processor time
        return np.asarray([time.perf_counter(), time.thread_time()])

    def bare() -> np.ndarray:
        state = bare_program.init(jax.random.key(0))
        for done in range(0, steps, k):
            state, _ = bare_program.step(state, feed.payload(done, k))
            if done + k == warm:
                jax.block_until_ready(state)
                start = now()
        jax.block_until_ready(state)
        return (now() - start) / (steps - warm)

    def fitted() -> np.ndarray:
        times: dict[int, np.ndarray] = {}
        with tempfile.TemporaryDirectory() as folder:
            log = Log(Path(folder))

            def progress(step: int, steps: int, seconds: float, done: int, metrics: dict[str, Any]) -> None:
                times[step] = now()

            state = loop.fit(
                feed, key=jax.random.key(0), steps=steps, steps_per_call=k, log=log, on_restore=log.restore, progress=progress
            )
            jax.block_until_ready(state)
            end = now()
            log.close()
        return (end - times[warm]) / (steps - warm)

    bare()
    fitted()
    pairs = []
    for index in range(rounds):  # the order turns around, so that neither always runs in the wake of the other
        first, second = (fitted, bare) if index % 2 == 0 else (bare, fitted)
        both = {first: first(), second: second()}
        pairs.append((both[fitted], both[bare]))
    return {
        "recipe": "vae",
        "steps": steps,
        "fit_ms": 1000 * statistics.median(a[0] for a, _ in pairs),
        "bare_ms": 1000 * statistics.median(b[0] for _, b in pairs),
        "ratio": summary([a[0] / b[0] for a, b in pairs]),
        # The overhead is host work, which does not shrink with the step: this is what it would be at a step of 1 ms.
        "overhead_at_1ms_percent": summary([100 * 1000 * float(a[1] - b[1]) for a, b in pairs]),
    }


def main(seconds: float = 20.0) -> None:
    """Measure and write results/overhead.json."""
    rows = step_overhead(seconds)
    for row in rows:
        ms = f"{row['genjax_ms']:.3f} ms, hand-written {row['hand_written_ms']:.3f} ms"
        print(f"{row['family']}, {row['size']}: {ms}, ratio {row['ratio']}")
    cost = loop_overhead()
    print(f"loop: {cost}")
    write("overhead", {"step": rows, "loop": cost})
