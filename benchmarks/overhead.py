"""What the abstractions cost: training steps of every family against hand-written ones, and the
loop against a bare one.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import by_hand
from benchmarks.common import alternate, ratio, summary, write
from genjax.data import example_batch
from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.families.gan import gan
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.learning import loop
from genjax.learning.step import training
from genjax.learning.transforms import compiled
from genjax.profiling.measure import stepper
from genjax.protocol import Batch, DataSpec, Model
from genjax.runs.log import Log
from genjax.zoo import ZOO
from genjax.zoo import recipe as config

SIZES: dict[str, dict[str, Any]] = {
    "small (8x8, 2x256, z 8, batch 128)": {"side": 8, "width": 256, "latent": 8, "batch": 128},
    "medium (28x28, 2x500, z 50, batch 128)": {
        "side": 28,
        "width": 500,
        "latent": 50,
        "batch": 128,
    },
}


class Case(NamedTuple):
    """A family at a size: its model, the same by hand, and how many examples a batch has."""

    size: str
    model: Model
    by_hand: Mapping[str, by_hand.Loss]
    batch: int


def draws_of(model: Model) -> dict[str, by_hand.Draw]:
    """What each player's loss draws, for steps by hand."""

    def draw_of(player: str) -> by_hand.Draw:
        def draw(key: jax.Array, x: jax.Array) -> Any:
            return model.noise[player](key, Batch(x))

        return draw

    return {player: draw_of(player) for player in model.losses}


def vae_case(size: str, side: int, width: int, latent: int, batch: int) -> Case:
    """Binary images."""
    model = vae(
        DataSpec((side, side, 1), "binary", name="random bits"),
        hidden=(width,) * 2,
        latent_dim=latent,
    )
    return Case(size, model, {"vae": by_hand.vae_loss}, batch)


def gan_case(width: int, d: int = 64, latent: int = 32, batch: int = 128) -> Case:
    """Vectors, with a gradient penalty."""
    spec = DataSpec((d,), "continuous", name="random vectors")
    size = f"{d} values, 2x{width}, z {latent}, R1, batch {batch}"
    return Case(
        size,
        gan(spec, hidden=(width,) * 2, latent_dim=latent, r1=1.0),
        by_hand.gan_losses(1.0),
        batch,
    )


def recurrent_case(
    cell: Any, width: int, length: int = 64, levels: int = 39, batch: int = 64
) -> Case:
    """Tokens, each sequence by itself."""
    spec = DataSpec((length,), "tokens", levels=levels, step="token", name="random tokens")
    step, n_carry = {
        "vanilla": (by_hand.vanilla, 1),
        "lstm": (by_hand.lstm, 2),
        "gru": (by_hand.gru, 1),
    }[cell]
    model = rnn(spec, cell=cell, d_hidden=width, d_embed=width // 4)
    return Case(
        f"{length} tokens, {width}, batch {batch}",
        model,
        {"rnn": by_hand.recurrent_loss(step, n_carry)},
        batch,
    )


def transformer_case(
    width: int, n_heads: int, length: int = 64, levels: int = 39, batch: int = 32
) -> Case:
    """Tokens, turned positions, no biases."""
    spec = DataSpec((length,), "tokens", levels=levels, step="token", name="random tokens")
    model = transformer(
        spec, d_model=width, n_heads=n_heads, n_layers=3, bias=False, position="rotary"
    )
    losses = {"transformer": by_hand.transformer_loss(n_heads)}
    return Case(f"{length} tokens, 3x{width}, batch {batch}", model, losses, batch)


def vrnn_case(width: int, latent: int, side: int = 8, levels: int = 17, batch: int = 64) -> Case:
    """Rows of an image."""
    spec = DataSpec((side, side), "discrete", levels=levels, step="row", name="random rows")
    model = vrnn(spec, d_hidden=width, hidden=(width,), latent_dim=latent)
    return Case(
        f"{side} rows of {side}, {width}, z {latent}, batch {batch}",
        model,
        {"vrnn": by_hand.vrnn_loss(levels)},
        batch,
    )


def diffusion_case(width: int, d: int = 64, batch: int = 128) -> Case:
    """Vectors."""
    model = diffusion(DataSpec((d,), "continuous", name="random vectors"), hidden=(width,) * 3)
    return Case(
        f"{d} values, 3x{width}, batch {batch}", model, {"diffusion": by_hand.diffusion_loss}, batch
    )


def flow_case(width: int, d: int = 64, batch: int = 128) -> Case:
    """Vectors."""
    model = flow_matching(DataSpec((d,), "continuous", name="random vectors"), hidden=(width,) * 3)
    return Case(
        f"{d} values, 3x{width}, batch {batch}", model, {"flow": by_hand.flow_matching_loss}, batch
    )


# Every family at a small and a medium size.
CASES: dict[str, Callable[[], list[Case]]] = {
    "vae": lambda: [vae_case(name, **size) for name, size in SIZES.items()],
    "gan": lambda: [gan_case(256), gan_case(1024)],
    "rnn": lambda: [recurrent_case("vanilla", 256), recurrent_case("vanilla", 512)],
    "lstm": lambda: [recurrent_case("lstm", 256), recurrent_case("lstm", 512)],
    "gru": lambda: [recurrent_case("gru", 256), recurrent_case("gru", 512)],
    "transformer": lambda: [transformer_case(128, 4), transformer_case(256, 8)],
    "vrnn": lambda: [vrnn_case(128, 8), vrnn_case(512, 32)],
    "diffusion": lambda: [diffusion_case(256), diffusion_case(512, d=784)],
    "flow_matching": lambda: [flow_case(256), flow_case(512, d=784)],
}


def step_overhead(seconds: float) -> list[dict[str, Any]]:
    """ms per step of genjax and by hand, in alternation in one process, and the ratio round by
    round.
    """
    rows = []
    for family, cases in CASES.items():
        for case in cases():
            row = {"family": family, "size": case.size, **_compare(case, seconds)}
            rows.append(row)
            ms = f"{row['genjax_ms']:.3f} ms, hand-written {row['hand_written_ms']:.3f} ms"
            print(f"{family}, {case.size}: {ms}, ratio {row['ratio']}", flush=True)
    return rows


def _compare(case: Case, seconds: float) -> dict[str, Any]:
    batch = jax.jit(partial(example_batch, case.model.spec), static_argnums=1)(
        jax.random.key(1), case.batch
    )
    t, hand = (
        compiled(training(case.model, optax.adam(1e-3))),
        by_hand.adam(case.by_hand, draws_of(case.model)),
    )
    ts = t.init(jax.random.key(0))
    mine = hand.init(jax.tree.map(jnp.copy, ts.params), jax.random.key(0))
    calls = {
        "genjax": stepper(t.step, ts, batch),
        "hand-written": stepper(hand.step, mine, batch.x),
    }
    # Short turns, so that both programs of a round meet the machine in the same mood: a shared one
    # changes within 0.1 s.
    rounds = alternate(calls, seconds, block=0.02)
    return {
        "genjax_ms": 1000 * summary(rounds["genjax"])["median"],
        "hand_written_ms": 1000 * summary(rounds["hand-written"])["median"],
        "ratio": ratio(rounds["genjax"], rounds["hand-written"]),
        "compiled_programs": t.step._cache_size(),  # type: ignore[attr-defined]
    }


def loop_overhead(
    rounds: int = 6, steps: int = 5000, warm: int = 1000, **settings: Any
) -> dict[str, Any]:
    """What `fit` adds per step to the same dispatches without it, at a step of about two
    milliseconds.

    Both run the same compiled program of 50 steps a dispatch; `fit` also reads the metrics,
    averages them, writes metrics.jsonl and TensorBoard every 100 steps, and calls a progress
    function. The first `warm` steps are left out. What it adds is taken from the processor time of
    the thread that does all this; other work disturbs the clock.
    """
    recipe = config.replace(ZOO["vae"], **{"batch_size": 128, "hidden": (256, 256), **settings})
    source = recipe.source()
    arrays = source.load().train
    feed = loop.device_feed(
        recipe.training(source.spec), source, arrays, recipe.schedule.batch_size, 0
    )
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

            def progress(
                step: int, steps: int, seconds: float, done: int, metrics: dict[str, Any]
            ) -> None:
                times[step] = now()

            state = loop.fit(
                feed,
                key=jax.random.key(0),
                steps=steps,
                steps_per_call=k,
                log=log,
                on_restore=log.restore,
                progress=progress,
            )
            jax.block_until_ready(state)
            end = now()
            log.close()
        return (end - times[warm]) / (steps - warm)

    bare()
    fitted()
    pairs = []
    for index in range(
        rounds
    ):  # the order turns around, so that neither always runs in the wake of the other
        first, second = (fitted, bare) if index % 2 == 0 else (bare, fitted)
        both = {first: first(), second: second()}
        pairs.append((both[fitted], both[bare]))
    return {
        "recipe": "vae",
        "steps": steps,
        "fit_ms": 1000 * statistics.median(a[0] for a, _ in pairs),
        "bare_ms": 1000 * statistics.median(b[0] for _, b in pairs),
        "ratio": summary([a[0] / b[0] for a, b in pairs]),
        # The overhead is host work, which does not shrink with the step: this is what it would be
        # at a step of 1 ms.
        "overhead_at_1ms_percent": summary([100 * 1000 * float(a[1] - b[1]) for a, b in pairs]),
    }


def main(seconds: float = 40.0) -> None:
    """Measure and write results/overhead.json."""
    rows = step_overhead(seconds)
    cost = loop_overhead()
    print(f"loop: {cost}")
    write("overhead", {"step": rows, "loop": cost})
