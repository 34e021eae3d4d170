"""The rows of `benchmarks.accelerator`, by part: each a function that measures one thing on the
card.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import first_rows
from benchmarks.processes import AskedProcess
from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.members import ensemble
from genjax.learning.transforms import compiled, scan_steps
from genjax.nets.attention import dense_attention, fused_attention
from genjax.profiling.devices import datasheet_peak, product_flops
from genjax.profiling.measure import matmul_peak, seconds_per_call, step_shapes, stepper
from genjax.profiling.room import program_memory
from genjax.protocol import Training
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, replace

FLAG = "--xla_gpu_deterministic_ops=true"
B = 8  # examples, where values are compared
CLOSE = 1e-3  # relative distance to the CPU's values in full precision, of a family that is right
MEMBERS, DISPATCHES = (1, 16, 256), (10, 1, 100)
QUICK = ("gan-ring",)  # the rows of a small run, which shows that the command works
# Small models, of which many are trained at once.
CROWD: dict[str, dict[str, Any]] = {
    "vae": {"hidden": (64,), "latent_dim": 8, "batch_size": 64},
    "gan-ring": {"batch_size": 64},
    "diffusion-2d": {"hidden": (64, 64), "batch_size": 64},
    "lstm": {"d_hidden": 64, "d_embed": 16, "batch_size": 16, "lanes": 0},
}
# Rows of zoo/scale.py: the batch of one turn on the card, and what is made smaller for a CPU.
SCALE: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2-124m": (
        32,
        {"d_model": 16, "n_layers": 2, "n_heads": 2, "length": 32, "n_symbols": 50, "n_train": 64},
    ),
    "dit-b2": (
        256,
        {"d_model": 16, "n_layers": 2, "n_heads": 2, "size": 8, "n_train": 64},
    ),
    "unet-cifar": (
        256,
        {"model.channels": (4, 8), "n_blocks": 1, "n_heads": 2, "size": 8, "n_train": 64},
    ),
}
# By row and policy of remat, the most wanted first.
SCALED = (
    ("gpt2-124m", "none"),
    ("dit-b2", "none"),
    ("unet-cifar", "none"),
    ("gpt2-124m", "dots"),
    ("gpt2-124m", "full"),
    ("dit-b2", "dots"),
    ("dit-b2", "full"),
    ("unet-cifar", "dots"),
)
Row = Callable[[], dict[str, Any]]


# --- right ----------------------------------------------------------------------------------------


def tiny(name: str, **changes: Any) -> Recipe:
    """A row with the settings that its tests make it small with."""
    row = ZOO[name]
    return dataclasses.replace(row, model={**row.model, **row.tiny, **changes})


def values_of(recipe: Recipe, precision: str, device: Any) -> list[np.ndarray]:
    """Losses and gradients of each player on a device, which has its own form of every layer."""
    with jax.default_device(device), jax.default_matmul_precision(precision):
        spec = recipe.source().spec
        model = recipe.build(spec)
        params, state = jax.jit(model.init)(jax.random.key(0))
        batch = example_batch(spec, jax.random.key(1), B)
        found = []
        for player in model.losses:

            def loss(own: Any, player: str = player) -> Any:
                every = {**params, player: own}
                args = (state, batch, jax.random.key(2), jnp.zeros((), jnp.int32))
                return model.losses[player](every, *args)[0].mean()

            value, grads = jax.jit(jax.value_and_grad(loss))(params[player])
            found += [np.asarray(leaf, np.float64) for leaf in (value, *jax.tree.leaves(grads))]
        return found


def distance(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """|found - wanted| / |wanted| of all numbers together; infinite where one is no number."""
    over = sum(float(((a - b) ** 2).sum()) for a, b in zip(found, wanted, strict=True))
    far = (over / max(sum(float((b**2).sum()) for b in wanted), 1e-300)) ** 0.5
    return far if math.isfinite(far) else math.inf


def right_row(name: str) -> dict[str, Any]:
    """How far a family's losses and gradients are from the CPU's, by precision, and whether its
    sampler gives finite numbers.
    """
    cpu, card = jax.devices("cpu")[0], jax.devices()[0]
    recipe = tiny(name)
    wanted = values_of(recipe, "highest", cpu)
    row: dict[str, Any] = {"highest": distance(values_of(recipe, "highest", card), wanted)}
    row["agrees"] = row["highest"] < CLOSE
    further: dict[str, Callable[[], Any]] = {
        "default": lambda: distance(values_of(recipe, "default", card), wanted),
        "bfloat16": lambda: distance(values_of(narrow, "default", card), wanted),
        "samples are finite": lambda: samples_are_finite(recipe),
    }
    narrow = tiny(name, dtype="bfloat16")
    for what, figure in further.items():
        row[what] = tried(figure)
    return row


def samples_are_finite(recipe: Recipe) -> bool:
    """Whether a sampler gives finite numbers."""
    model = recipe.build(recipe.source().spec)
    params, state = jax.jit(model.init)(jax.random.key(0))
    cond = example_batch(model.spec, jax.random.key(3), 4).cond
    drawn = jax.jit(model.sample, static_argnums=3)(params, state, jax.random.key(4), 4, cond)
    return bool(jnp.isfinite(jnp.asarray(drawn, jnp.float32)).all())


def tried(figure: Callable[[], Any]) -> Any:
    """A figure of a row; None for a setting that the family has not, and of an error its text."""
    try:
        return figure()
    except ConfigError:
        return None
    except Exception as error:  # the figures before it stay
        return f"{type(error).__name__}: {error}"[:300]


def right(small: bool) -> dict[str, Row]:
    """A row of every family."""
    names = QUICK if small else first_rows()
    return {name: functools.partial(right_row, name) for name in names}


# --- scale ----------------------------------------------------------------------------------------


def scale_recipe(name: str, small: bool, remat: str = "none") -> Recipe:
    """A scale row with one turn's batch for one card."""
    size, smaller = SCALE[name]
    changes = {"batch_size": 8, **smaller} if small else {"batch_size": size}
    return replace(ZOO[name], microbatches=1, remat=remat, **changes)


@functools.cache
def product_peak(small: bool) -> float:
    """FLOP/s of a large bfloat16 product, measured once."""
    return matmul_peak(256 if small else 8192, jnp.bfloat16, 0.02 if small else 1.0)


def scale_row(name: str, remat: str, small: bool) -> dict[str, Any]:
    """Of a scale row and a policy of remat: a step's time, examples and tokens a second, shares of
    peak, and memory.
    """
    recipe = scale_recipe(name, small, remat)
    spec, size = recipe.source().spec, recipe.schedule.batch_size
    t = recipe.training(spec)
    shapes = step_shapes(t, spec, size)
    # What the model asks for: of what is computed again only the first time counts.
    plain = replace(recipe, remat="none").training(spec)
    flops = product_flops(plain.step, *shapes)
    start = time.perf_counter()
    program = jax.jit(t.step, donate_argnums=0).lower(*shapes).compile()
    compiling = time.perf_counter() - start
    batch = example_batch(spec, jax.random.key(1), size)
    call = stepper(program, jax.jit(t.init)(jax.random.key(0)), batch)
    seconds = statistics.median(seconds_per_call(call, 0.1 if small else 4.0, 3))
    losses = jax.tree.leaves(call())
    sheet = datasheet_peak(jax.devices()[0].device_kind)
    return {
        "batch_size": size,
        "ms": 1000 * seconds,
        "examples_per_second": size / seconds,
        "steps_of_sequences_per_second": size * spec.shape[0] / seconds if spec.step else None,
        "product_flops": flops,
        "share_of_product": flops / seconds / product_peak(small),
        "share_of_datasheet": flops / seconds / sheet if sheet else None,
        "program_bytes": program_memory(program),
        "compile_seconds": compiling,
        "metrics are finite": all(bool(jnp.isfinite(x).all()) for x in losses),
    }


def scale(small: bool) -> dict[str, Row]:
    """The scale rows, and what their shares refer to."""
    rows: dict[str, Row] = {
        f"{name}, remat {remat}": functools.partial(scale_row, name, remat, small)
        for name, remat in SCALED
        if not (small and remat != "none")
    }
    sheet = datasheet_peak(jax.devices()[0].device_kind)
    peaks = {"by the data sheet": lambda: {"tflops": sheet and sheet / 1e12}}
    peaks["a product, measured"] = lambda: {"tflops": product_peak(small) / 1e12}
    return {**peaks, **rows}


# --- attention ------------------------------------------------------------------------------------


def by_jax(implementation: Any, q: Any, k: Any, v: Any) -> Any:
    """Causal attention of q, k and v [B, heads, T, h] by `jax.nn`."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return y.swapaxes(1, 2)


WAYS: dict[str, Callable[..., Any]] = {
    "what the Transformer takes": lambda q, k, v: fused_attention(q[:, :, None], k, v),
    "our products": lambda q, k, v: dense_attention(q[:, :, None], k, v),
    "jax.nn, XLA": functools.partial(by_jax, "xla"),
    "jax.nn, cuDNN": functools.partial(by_jax, "cudnn"),
}


def attention_row(name: str, small: bool) -> dict[str, Any]:
    """Milliseconds of causal attention and its gradient in bfloat16, and how far it is from our
    products in float32.
    """
    b, heads, t, h = (2, 2, 16, 8) if small else (32, 12, 1024, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (b, heads, t, h), jnp.bfloat16) for key in keys)
    way = WAYS[name]

    def loss(q: Any, k: Any, v: Any) -> Any:
        return way(q, k, v).astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("standard"):  # as where networks compute in bfloat16
        both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        times = seconds_per_call(functools.partial(both, q, k, v), 0.05 if small else 1.0)
        y, back = jax.vjp(way, *(x[:2] for x in (q, k, v)))
        found = [y, *back(y)]
    with jax.default_matmul_precision("highest"):
        ours = WAYS["our products"]
        y, back = jax.vjp(ours, *(x[:2].astype(jnp.float32) for x in (q, k, v)))
        wanted = [y, *back(y)]
    return {
        "ms": 1000 * statistics.median(times),
        "distance": distance([numbers(found[0])], [numbers(wanted[0])]),
        "of the gradient": distance([*map(numbers, found[1:])], [*map(numbers, wanted[1:])]),
    }


def numbers(x: Any) -> np.ndarray:
    """Numbers in a row, in float64."""
    return np.asarray(x, np.float64).ravel()


def attention(small: bool) -> dict[str, Row]:
    """What computes it: XLA's products, cuDNN's kernel, and what the Transformer takes here."""
    return {name: functools.partial(attention_row, name, small) for name in WAYS}


# --- PyTorch --------------------------------------------------------------------------------------


def torch_python() -> str | None:
    """An interpreter that has PyTorch, if one is known."""
    given = os.environ.get("GENJAX_TORCH_PYTHON")
    if given:
        return given
    return sys.executable if importlib.util.find_spec("torch") else None


def torch_row(variant: str, small: bool) -> dict[str, Any]:
    """Milliseconds of a step of gpt2-124m's twin in bfloat16, by scaled_dot_product_attention and
    the fused AdamW, on the same card.
    """
    python = torch_python()
    if python is None:
        return {"skipped": "no PyTorch here; GENJAX_TORCH_PYTHON may name an interpreter that has"}
    size, smaller = SCALE["gpt2-124m"]
    shape = {"levels": 50_257, "context": 1024, "batch": size, "width": 768, "heads": 12}
    shape |= {"layers": 12}
    if small:
        shape = {
            "levels": smaller["n_symbols"],
            "context": smaller["length"],
            "batch": 8,
            "width": smaller["d_model"],
            "heads": smaller["n_heads"],
            "layers": smaller["n_layers"],
        }
    flags = [f"--{name}={value}" for name, value in shape.items()]
    flags += ["--bias", "--bfloat16", f"--device={'cpu' if small else 'cuda'}"]
    program = [python, str(Path(__file__).with_name("torch_nanogpt.py")), *flags]
    twin = AskedProcess(program, seconds=150)
    try:
        twin.ask(f"{variant} 3")
        times = [float(twin.ask(f"{variant} {2 if small else 20}")) for _ in range(3)]
    finally:
        twin.kill()
    return {"ms": 1000 * statistics.median(times), "torch": twin.greeting}


def torch(small: bool) -> dict[str, Row]:
    """Eager and compiled, each in a process of its own."""
    variants = ("fused",) if small else ("fused", "compiled")
    return {
        {"fused": "eager"}.get(variant, variant): functools.partial(torch_row, variant, small)
        for variant in variants
    }


# --- bitwise --------------------------------------------------------------------------------------


def bits(state: Any) -> list[bytes]:
    """Every leaf of a state."""
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def goes_on_bitwise(name: str, steps: int = 4) -> bool:
    """Whether a run that is saved half way and restored ends as one that was not."""
    recipe = tiny(name)
    spec = recipe.source().spec
    t = compiled(recipe.training(spec))
    batches = [example_batch(spec, jax.random.key(i), B) for i in range(steps)]
    state = t.init(jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        for index, batch in enumerate(batches):
            if index == steps // 2:
                Checkpoints(Path(folder) / "c").save(state)
            state, _ = t.step(state, batch)
        like = jax.eval_shape(t.init, jax.random.key(0))
        restored = Checkpoints(Path(folder) / "c").restore(like)
    assert restored is not None
    again = restored.state
    for batch in batches[steps // 2 :]:
        again, _ = t.step(again, batch)
    return bits(again) == bits(state)


def answer_bitwise() -> None:
    """Serve `goes_on_bitwise`: a name a line, 1 or 0 a line."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(int(goes_on_bitwise(line.strip())), flush=True)


@functools.cache
def deterministic() -> AskedProcess:
    """The same in a process with XLA's deterministic operations."""
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"}
    code = "from benchmarks.accelerator_rows import answer_bitwise; answer_bitwise()"
    return AskedProcess([sys.executable, "-c", code], env, seconds=90)


def bitwise_row(name: str) -> dict[str, Any]:
    """Whether resume is bitwise as things are, and where it is not, with the flag."""
    row: dict[str, Any] = {"resumes bitwise": goes_on_bitwise(name)}
    if not row["resumes bitwise"] and FLAG not in os.environ.get("XLA_FLAGS", ""):
        try:
            row[FLAG] = deterministic().ask(name) == "1"
        except RuntimeError as error:
            row[FLAG] = str(error)[:200]
            deterministic.cache_clear()
    return row


def bitwise(small: bool) -> dict[str, Row]:
    """A row of every family."""
    names = QUICK if small else first_rows()
    return {name: functools.partial(bitwise_row, name) for name in names}


# --- members --------------------------------------------------------------------------------------


def step_seconds(t: Training, key: Any, batch: Any, k: int, budget: float) -> float:
    """Seconds of a step, k of them a dispatch."""
    if k > 1:
        t, batch = scan_steps(t), jax.tree.map(lambda leaf: jnp.stack([leaf] * k), batch)
    c = compiled(t)
    call = stepper(c.step, c.init(key), batch)
    return statistics.median(seconds_per_call(call, budget, 3)) / k


def members_row(name: str, k: int, small: bool) -> dict[str, Any]:
    """Milliseconds of a step of so many members, and the price of 16 in units of one."""
    recipe = replace(ZOO[name], **CROWD[name])
    spec = recipe.source().spec
    t = recipe.training(spec)
    batch = example_batch(spec, jax.random.key(1), recipe.schedule.batch_size)
    seconds = {
        n: step_seconds(
            ensemble(t),
            jax.random.split(jax.random.key(0), n),
            batch,
            k,
            0.01 if small else 0.15,
        )
        for n in ((1, 16) if small else MEMBERS)
    }
    ms = {f"{n} members, ms": 1000 * value for n, value in seconds.items()}
    return {**ms, "price of 16": seconds[16] / seconds[1]}


def members(small: bool) -> dict[str, Row]:
    """Small models by steps a dispatch."""
    return {
        f"{name}, {k} steps a dispatch": functools.partial(members_row, name, k, small)
        for k in ((1,) if small else DISPATCHES)
        for name in (QUICK if small else CROWD)
    }
