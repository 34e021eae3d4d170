"""What genjax does on an accelerator, within nine minutes on one card: whether every family is
right there, whether resume is bitwise, what members and dispatches cost, and how fast large models
are, beside PyTorch on the same card.

    python -m benchmarks.accelerator            (or `python -m benchmarks accelerator`)
    python -m benchmarks.accelerator --small    what it does, at sizes for a CPU

It needs jax, flax, optax, orbax-checkpoint, chex, numpy and scipy; PyTorch, in this interpreter or
the one that $GENJAX_TORCH_PYTHON names, is compared where there is one. Each part is written into
results/accelerator.json when it is done; one that fails is written with its error, and the next
begins.
"""

import dataclasses
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import first_rows, write
from benchmarks.processes import AskedProcess
from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.members import ensemble
from genjax.learning.transforms import compiled, scan_steps
from genjax.profiling.devices import datasheet_peak, product_flops
from genjax.profiling.measure import matmul_peak, seconds_per_call, step_shapes, stepper
from genjax.profiling.room import program_memory
from genjax.protocol import Training
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, replace

BUDGET = 540.0  # seconds in all
FLAG = "--xla_gpu_deterministic_ops=true"
B = 8  # examples, where values are compared
MEMBERS, DISPATCHES = (1, 4, 16, 64, 256), (1, 10, 100)
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
REMATS = ("none", "dots", "full")


# --- right ----------------------------------------------------------------------------------------


def tiny(name: str, **changes: Any) -> Recipe:
    """A row with the settings that its tests make it small with."""
    row = ZOO[name]
    return dataclasses.replace(row, model={**row.model, **row.tiny, **changes})


def values_of(recipe: Recipe, precision: str, device: Any) -> list[np.ndarray]:
    """Losses and gradients of each player on a device."""
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
    """|found - wanted| / |wanted| of all numbers together."""
    over = sum(float(((a - b) ** 2).sum()) for a, b in zip(found, wanted, strict=True))
    return (over / max(sum(float((b**2).sum()) for b in wanted), 1e-300)) ** 0.5


def right(small: bool) -> dict[str, Any]:
    """Of a row of every family: how far losses and gradients are from the CPU's, and whether its
    sampler gives finite numbers.
    """
    cpu, card = jax.devices("cpu")[0], jax.devices()[0]
    rows = {}
    for name in QUICK if small else first_rows():
        recipe = tiny(name)
        wanted = values_of(recipe, "highest", cpu)
        row: dict[str, Any] = {
            "highest": distance(values_of(recipe, "highest", card), wanted),
            "default": distance(values_of(recipe, "default", card), wanted),
        }
        try:
            narrow = tiny(name, dtype="bfloat16")
            row["bfloat16"] = distance(values_of(narrow, "default", card), wanted)
        except ConfigError:
            row["bfloat16"] = None  # of a family without that setting
        model = recipe.build(recipe.source().spec)
        params, state = jax.jit(model.init)(jax.random.key(0))
        cond = example_batch(model.spec, jax.random.key(3), 4).cond
        drawn = model.sample(params, state, jax.random.key(4), 4, cond)
        row["samples are finite"] = bool(jnp.isfinite(jnp.asarray(drawn, jnp.float32)).all())
        rows[name] = row
    return rows


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


def bitwise(small: bool) -> dict[str, Any]:
    """`goes_on_bitwise` of a row of every family as it is; of those where it does not, again in a
    process with XLA's deterministic operations.
    """
    names = QUICK if small else first_rows()
    found: dict[str, Any] = {name: goes_on_bitwise(name) for name in names}
    others = [name for name, same in found.items() if not same]
    if others and FLAG not in os.environ.get("XLA_FLAGS", ""):
        code = (
            "from benchmarks.accelerator import goes_on_bitwise as f; import sys; "
            "print(*[int(f(name)) for name in sys.argv[1:]])"
        )
        env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"}
        # Both are on the card at once.
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        out = subprocess.run(
            [sys.executable, "-c", code, *others], env=env, capture_output=True, text=True
        )
        same = out.stdout.split() or ["0"] * len(others)
        found |= {n: FLAG if s == "1" else False for n, s in zip(others, same, strict=True)}
    return {"XLA_FLAGS": os.environ.get("XLA_FLAGS", ""), "rows": found}


# --- members --------------------------------------------------------------------------------------


def step_seconds(t: Training, key: Any, batch: Any, k: int, budget: float) -> float:
    """Seconds of a step, k of them a dispatch."""
    if k > 1:
        t, batch = scan_steps(t), jax.tree.map(lambda leaf: jnp.stack([leaf] * k), batch)
    c = compiled(t)
    call = stepper(c.step, c.init(key), batch)
    return statistics.median(seconds_per_call(call, budget, 3)) / k


def members(small: bool) -> dict[str, Any]:
    """Milliseconds of a step of so many members, by steps a dispatch, and the price of 16 in units
    of one.
    """
    budget = 0.01 if small else 0.15
    crowd = {name: CROWD[name] for name in (QUICK if small else CROWD)}
    counts, dispatches = ((1, 4), (1,)) if small else (MEMBERS, DISPATCHES)
    rows = {}
    for name, changes in crowd.items():
        recipe = replace(ZOO[name], **changes)
        spec = recipe.source().spec
        t = recipe.training(spec)
        batch = example_batch(spec, jax.random.key(1), recipe.schedule.batch_size)
        ms = {
            f"{n} members, {k} steps a dispatch": 1000
            * step_seconds(ensemble(t), jax.random.split(jax.random.key(0), n), batch, k, budget)
            for n in counts
            for k in dispatches
        }
        many, k = counts[-1 if small else 2], dispatches[-1]
        one = ms[f"1 members, {k} steps a dispatch"]
        price = ms[f"{many} members, {k} steps a dispatch"] / one
        rows[name] = {"ms": ms, f"price of {many}": price}
    return rows


# --- scale ----------------------------------------------------------------------------------------


def scale_recipe(name: str, small: bool, remat: str = "none") -> Recipe:
    """A scale row with one turn's batch for one card."""
    size, smaller = SCALE[name]
    changes = {"batch_size": 8, **smaller} if small else {"batch_size": size}
    return replace(ZOO[name], microbatches=1, remat=remat, **changes)


def scale(small: bool) -> dict[str, Any]:
    """Of each scale row and policy of remat: a step's time, examples and tokens a second, shares of
    peak and memory.
    """
    budget = 0.1 if small else 4.0
    sheet = datasheet_peak(jax.devices()[0].device_kind)
    peak = matmul_peak(256 if small else 8192, jnp.bfloat16, budget / 4)
    rows = {}
    for name in SCALE:
        for remat in REMATS[: 1 if small else None]:
            try:
                rows[f"{name}, remat {remat}"] = _scaled(
                    scale_recipe(name, small, remat), budget, peak, sheet
                )
            except Exception as error:  # of a policy that does not fit the card
                rows[f"{name}, remat {remat}"] = {"error": str(error)[:300]}
    return {"product_tflops": peak / 1e12, "datasheet_tflops": sheet and sheet / 1e12, "rows": rows}


def _scaled(recipe: Recipe, budget: float, peak: float, sheet: float | None) -> dict[str, Any]:
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
    seconds = statistics.median(seconds_per_call(call, budget, 3))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "batch_size": size,
        "ms": 1000 * seconds,
        "examples_per_second": size / seconds,
        "steps_of_sequences_per_second": size * spec.shape[0] / seconds if spec.step else None,
        "compile_seconds": compiling,
        "product_flops": flops,
        "share_of_product": flops / seconds / peak,
        "share_of_datasheet": flops / seconds / sheet if sheet else None,
        "program_bytes": program_memory(program),
        "peak_bytes_so_far": stats.get("peak_bytes_in_use"),
    }


def attention(small: bool) -> dict[str, Any]:
    """Milliseconds of causal attention and its gradient in bfloat16, by what computes it: XLA's
    products, cuDNN's kernel, and what the Transformer takes on this backend.
    """
    from genjax.nets.attention import dense_attention, fused_attention

    b, heads, t, h = (2, 2, 16, 8) if small else (32, 12, 1024, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (b, heads, t, h), jnp.bfloat16) for key in keys)

    def by(implementation: Any, q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        return y.swapaxes(1, 2)

    ways: dict[str, Callable[..., Any]] = {
        "our products": lambda q, k, v: dense_attention(q[:, :, None], k, v),
        "jax.nn, XLA": functools.partial(by, "xla"),
        "jax.nn, cuDNN": functools.partial(by, "cudnn"),
        "the Transformer's on an accelerator": lambda q, k, v: fused_attention(q[:, :, None], k, v),
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():

        def loss(q: Any, k: Any, v: Any, way: Callable[..., Any] = way) -> Any:
            return way(q, k, v).astype(jnp.float32).sum()

        try:
            both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
            times = seconds_per_call(functools.partial(both, q, k, v), 0.05 if small else 1.0)
            found[name] = 1000 * statistics.median(times)
        except Exception as error:
            found[name] = str(error)[:200]
    return {"shape [batch, heads, T, width]": [b, heads, t, h], "ms": found}


# --- PyTorch --------------------------------------------------------------------------------------


def torch_python() -> str | None:
    """An interpreter that has PyTorch, if one is known."""
    given = os.environ.get("GENJAX_TORCH_PYTHON")
    if given:
        return given
    return sys.executable if importlib.util.find_spec("torch") else None


def torch(small: bool) -> dict[str, Any]:
    """Milliseconds of a step of gpt2-124m's twin in bfloat16 with fused attention, eager and
    compiled, on the same card, beside ours.
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
    twin = AskedProcess([python, str(Path(__file__).with_name("torch_nanogpt.py")), *flags])
    steps, found = (2 if small else 20), {}
    for variant in ("fused",) if small else ("fused", "compiled"):
        twin.ask(f"{variant} 3")
        found[variant] = 1000 * statistics.median(
            float(twin.ask(f"{variant} {steps}")) for _ in range(3)
        )
    twin.close()
    return {"torch": twin.greeting, "ms": found}


# --- all ------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "right": right,
    "scale": scale,
    "attention": attention,
    "torch": torch,
    "bitwise": bitwise,
    "members": members,
}


def driver() -> str:
    """The version of the card's driver, where there is one to ask."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def main(small: bool = False, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the parts, or those that are named, and write results/accelerator.json (of a small run
    nothing is written).
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the card too
    found: dict[str, Any] = {"driver": driver(), "small": small, "seconds": {}}
    began = time.perf_counter()
    for name in names or PARTS:
        start = time.perf_counter()
        if start - began > BUDGET:
            found[name] = {"error": f"not begun: the {BUDGET:.0f} s were over"}
            continue
        try:
            found[name] = PARTS[name](small)
        except Exception:
            found[name] = {"error": traceback.format_exc()[-1500:]}
        found["seconds"][name] = round(time.perf_counter() - start, 1)
        print(f"{name}, {found['seconds'][name]} s: {found[name]}", flush=True)
        if not small:
            write("accelerator", found)
    return found


if __name__ == "__main__":
    main("--small" in sys.argv[1:], tuple(a for a in sys.argv[1:] if not a.startswith("--")))
