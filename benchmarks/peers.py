"""Every family's training step beside a PyTorch twin of the same architecture, at the size of its
row in the zoo and wider.

genjax runs as users run it: the row's own training procedure, compiled, one step a dispatch and as
many as its schedule says. The twins run in an interpreter that $GENJAX_TORCH_PYTHON names
(`torch_twins.py`); before anything is timed, a twin has to give the loss and the norm of the
gradient that genjax gives for the same parameters, data and noise.
"""

import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import in_turns, ratio, summary, write
from benchmarks.processes import AskedProcess
from genjax.data import example_batch
from genjax.evaluation.estimates import count
from genjax.learning.transforms import compiled, scan_steps
from genjax.profiling.measure import cost_of, matmul_peak, stepper
from genjax.protocol import Batch, Model, Training
from genjax.zoo import ZOO
from genjax.zoo import recipe as config
from genjax.zoo.recipe import Recipe

SIZES = ("small", "medium")
VARIANTS = ("eager", "compiled")
TOLERANCE = 1e-3  # of a loss and of the norm of its gradient, relative, in float32
NO_TORCH = "GENJAX_TORCH_PYTHON is not set: it names an interpreter that has torch and numpy"
# Rows of the zoo, and what is wider in their medium size; the small size is the row itself.
CASES: dict[str, dict[str, Any]] = {
    "vae": {"hidden": (1024, 1024), "latent_dim": 32},
    "vae-conv": {"channels": (64, 128)},
    "gan": {"hidden": (1024, 1024)},
    "gan-ring": {"hidden": (512, 512)},
    "dcgan-mnist": {"channels": (64, 128)},
    "rnn": {"d_hidden": 512, "d_embed": 128},
    "lstm": {"d_hidden": 512, "d_embed": 128},
    "gru": {"d_hidden": 512, "d_embed": 128},
    "transformer": {"d_model": 256, "n_heads": 8},
    "vrnn": {"d_hidden": 512, "hidden": (512,), "latent_dim": 32},
    "diffusion": {"hidden": (1024, 1024, 1024)},
    "edm-mnist": {"channels": (48, 96)},
    "flow-matching": {"hidden": (1024, 1024, 1024)},
    "flow-matching-mnist": {"channels": (48, 96)},
    "nsf-ring": {"hidden": (256, 256)},
    "made-mnist": {"hidden": (2048, 2048)},
    "pixelcnn-mnist": {"channels": 64},
    "mingru-shakespeare": {"d_model": 256, "d_inner": 336},
}


def recipe_of(name: str, size: str) -> Recipe:
    """A row at a size."""
    return config.replace(ZOO[name], **(CASES[name] if size == "medium" else {}))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """All of the builder's settings."""
    return {name: value for name, (_, value, _) in config.sections_of(recipe)["model"].items()}


def case_of(recipe: Recipe) -> dict[str, Any]:
    """What a twin has to know of a row, as JSON-ready data."""
    spec = recipe.source().spec
    model = recipe.build(spec)
    given = recipe.optimizer
    by_player = given if isinstance(given, Mapping) else dict.fromkeys(model.losses, given)
    params = jax.eval_shape(model.init, jax.random.key(0))[0]
    case = {
        "family": recipe.family.__name__,
        "model": settings_of(recipe),
        "spec": {name: getattr(spec, name) for name in ("shape", "kind", "levels", "n_classes")},
        "batch_size": recipe.schedule.batch_size,
        "steps": recipe.schedule.steps,
        "optimizer": {
            player: dataclasses.asdict(settings) for player, settings in by_player.items()
        },
        "parameters": count(params),
    }
    if model.denoiser is not None:
        path: Any = model.denoiser.path(params)
        case["times"] = [float(path.end), float(path.start)]
    return case


class Twin:
    """A PyTorch twin as a process that answers one line with another; `about` is what it says of
    itself.
    """

    def __init__(self, python: str, case: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "case.json"
        path.write_text(json.dumps(case))
        # What torch.compile kept from an earlier run would make its seconds of compilation too few.
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(self.folder.name) / "compiled")}
        self.process = AskedProcess(
            [python, str(Path(__file__).with_name("torch_twins.py")), str(path)], env
        )
        self.about = json.loads(self.process.greeting)

    def ask(self, **question: Any) -> Any:
        """The answer to a question; see `torch_twins.py`."""
        answer = json.loads(self.process.ask(json.dumps(question)))
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def check(self, arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
        """Loss and gradient norm of each player for given parameters, data and noise."""
        path = Path(self.folder.name) / "check.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return self.ask(check=str(path))

    def close(self) -> None:
        """End the process."""
        self.process.close()
        self.folder.cleanup()


# --- the same function ----------------------------------------------------------------------------


def noise_of(model: Model, player: str, key: Any, batch: Batch) -> dict[str, Any]:
    """What a loss draws with its key, by the name that the twin has for it."""
    noise = model.noise[player](key, batch)
    names = ("t", "u", "epsilon", "dropped")
    found = {name: getattr(noise, name, None) for name in names}
    family = next(iter(model.losses))
    if family == "vae":
        found = {"z": noise.epsilon[0]}
    elif family == "discriminator":
        found = {"z": noise.z}
    elif family == "vrnn":
        assert model.latent is not None
        n_steps, latent = model.latent.spec.shape
        steps = jax.vmap(lambda t: jax.random.fold_in(noise.paths, t))(jnp.arange(n_steps))
        draw = partial(jax.random.normal, shape=(batch.x.shape[0], latent))
        found = {"z": jax.vmap(draw)(steps)}
    elif model.denoiser is None:
        found = {}
    return {name: value for name, value in found.items() if value is not None}


def agreement(recipe: Recipe, twin: Twin) -> dict[str, float]:
    """`differences`, held to what rounding explains.

    Raises:
        RuntimeError: if the twin computes another function, since its time would then mean nothing.
    """
    found = differences(recipe, twin)
    if max(found.values()) > TOLERANCE:
        raise RuntimeError(
            f"The PyTorch twin of {recipe.name} is another function: relative differences {found}."
        )
    return found


def differences(recipe: Recipe, twin: Twin) -> dict[str, float]:
    """How far the twin's loss and gradient norm are from genjax's, relative, the largest over the
    players.

    Parameters are the initial ones and noise, because layers that begin at 0 would hide what comes
    before them.
    """
    spec = recipe.source().spec
    model = recipe.build(spec)
    batch = example_batch(spec, jax.random.key(1), recipe.schedule.batch_size)
    params, state = jax.jit(model.init)(jax.random.key(2))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [
        leaf + 0.03 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(tree, noisy)
    arrays = {"data|x": batch.x} | ({"data|cond": batch.cond} if batch.cond is not None else {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        arrays["params|" + (name if len(params) > 1 else name.partition("/")[2])] = leaf
    mine: dict[str, list[float]] = {}
    for index, player in enumerate(model.losses):
        key, step = jax.random.key(4 + index), jnp.zeros((), jnp.int32)
        arrays |= {
            f"{player}|{name}": value for name, value in noise_of(model, player, key, batch).items()
        }

        def loss(own: Any, player: str = player, key: Any = key) -> jax.Array:
            return model.losses[player]({**params, player: own}, state, batch, key, step)[0].mean()

        value, grads = jax.jit(jax.value_and_grad(loss))(params[player])
        mine[player] = [
            float(value),
            math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))),
        ]
    theirs = twin.check({name: np.asarray(value) for name, value in arrays.items()})
    names = ("loss", "gradient_norm")
    return {
        name: max(abs(theirs[p][i] - mine[p][i]) / max(abs(mine[p][i]), 1e-12) for p in mine)
        for i, name in enumerate(names)
    }


# --- time -----------------------------------------------------------------------------------------


class Ours(NamedTuple):
    """genjax's step: seconds per step of so many, compile seconds, and what the program of one step
    takes.
    """

    calls: dict[str, Callable[[int], float]]
    per_call: dict[str, int]
    compile_seconds: float
    cost: dict[str, float]


def ours(recipe: Recipe, k: int | None = None) -> Ours:
    """The row's training procedure on one resident batch, one step a dispatch and k; those of its
    own schedule if None.
    """
    k = k or recipe.schedule.steps_per_call
    spec = recipe.source().spec
    one = recipe.training(spec)
    batch = example_batch(spec, jax.random.key(1), recipe.schedule.batch_size)

    def compile_one(t: Training, batch: Any) -> tuple[Any, float]:
        state = jax.eval_shape(t.init, jax.random.key(0))
        start = time.perf_counter()
        program = jax.jit(t.step, donate_argnums=0).lower(state, batch).compile()
        return program, time.perf_counter() - start

    def timed(t: Training, program: Any, batch: Any, per_call: int) -> Callable[[int], float]:
        call = stepper(program, compiled(t).init(jax.random.key(0)), batch)

        def seconds(steps: int) -> float:
            calls = -(-steps // per_call)
            start = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(call())
            return (time.perf_counter() - start) / (calls * per_call)

        return seconds

    program, compile_seconds = compile_one(one, batch)
    names = ("one step a dispatch", f"{k} steps a dispatch")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * k), batch)
    calls = {
        names[0]: timed(one, program, batch, 1),
        names[1]: timed(scan_steps(one), compile_one(scan_steps(one), stacked)[0], stacked, k),
    }
    flops, temporary = cost_of(program)
    cost = {
        "flops": flops,
        "bytes_accessed": float(
            (program.cost_analysis() or {}).get("bytes accessed", math.nan)
        ),  # loops once
        "temporary_bytes": temporary,
        "argument_bytes": program.memory_analysis().argument_size_in_bytes,
    }
    return Ours(calls, dict(zip(names, (1, k), strict=True)), compile_seconds, cost)


def alternate(
    calls: dict[str, Callable[[int], float]], per_call: dict[str, int], seconds: float, block: float
) -> dict[str, list[float]]:
    """Seconds per step of several programs in turns of about `block` seconds, five rounds at least.

    Each call runs a number of steps and gives its seconds per step.
    """
    steps = {}
    for name, call in calls.items():
        least = per_call.get(name, 1)
        call(least)  # compile and warm up
        steps[name] = max(least, round(block / call(least)))
    return in_turns(calls, steps, seconds)


def _steps_of(twin: Twin, variant: str, steps: int) -> float:
    """Seconds that so many steps of a twin take."""
    return twin.ask(variant=variant, steps=steps)


def measure(
    name: str, size: str, seconds: float, peak: float, python: str | None, block: float = 0.3
) -> dict[str, Any]:
    """All figures of one row at one size; without an interpreter for PyTorch, genjax's alone, and a
    word of it.
    """
    recipe = recipe_of(name, size)
    spec, case = recipe.source().spec, case_of(recipe)
    mine = ours(recipe)
    calls, about = dict(mine.calls), {}
    twin = Twin(python, case) if python else None
    if twin:
        about = {
            **twin.about,
            "difference": agreement(recipe, twin),
            "failed": {},
            "first_step_seconds": {},
        }
        for variant in VARIANTS:
            own = partial(_steps_of, twin, variant)
            try:
                about["first_step_seconds"][variant] = own(1)
                calls[f"PyTorch, {variant}"] = own
            except RuntimeError as error:
                about["failed"][variant] = str(error)
    rounds = alternate(calls, mine.per_call, seconds, block)
    if twin:
        twin.close()

    def best(names: Iterable[str]) -> str:
        return min(names, key=lambda one: statistics.median(rounds[one]))

    fastest = best(mine.calls)
    step = statistics.median(rounds[fastest])
    per_example = spec.shape[0] if spec.step else 1
    row = {
        "recipe": name,
        "family": case["family"],
        "size": size,
        "wider": CASES[name] if size == "medium" else {},
        "parameters": case["parameters"],
        "batch_size": case["batch_size"],
        "best": fastest,
        "steps_per_second": 1 / step,
        "unit": f"{spec.step}s" if spec.step else "examples",
        "units_per_second": case["batch_size"] * per_example / step,
        "compile_seconds": mine.compile_seconds,
        **mine.cost,
        "share_of_peak": mine.cost["flops"] / step / peak,
        "ms": {
            one: {key: 1000 * v if key != "rounds" else v for key, v in summary(t).items()}
            for one, t in rounds.items()
        },
    }
    if not twin:
        return row | {"torch": {"skipped": NO_TORCH}}
    theirs = best([one for one in calls if one not in mine.calls])
    return row | {
        "torch": about | {"best": theirs},
        "ratio": ratio(rounds[fastest], rounds[theirs]),
        "ratio_one_step": ratio(rounds[next(iter(mine.calls))], rounds[theirs]),
    }


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the median ratios, genjax's time over PyTorch's, by size and over all; empty where PyTorch
    was not measured.
    """
    kept = [row for row in rows if "ratio" in row]
    groups = {size: [row for row in kept if row["size"] == size] for size in SIZES} | {"all": kept}
    return {
        name: math.exp(statistics.mean(math.log(row["ratio"]["median"]) for row in group))
        for name, group in groups.items()
        if group
    }


def main(seconds: float = 8.0, names: tuple[str, ...] = (), sizes: tuple[str, ...] = SIZES) -> None:
    """Measure and write results/peers.json."""
    python = os.environ.get("GENJAX_TORCH_PYTHON") or None
    if python is None:
        print(f"PyTorch is skipped: {NO_TORCH}.")
    peak = matmul_peak()
    rows = []
    for name in names or CASES:
        for size in sizes:
            rows.append(measure(name, size, seconds, peak, python))
            row = rows[-1]
            beside = (
                f", {row['ratio']['median']:.2f} of the time of {row['torch']['best']}"
                if "ratio" in row
                else ""
            )
            print(
                f"{name}, {size}: {row['ms'][row['best']]['median']:.2f} ms with "
                f"{row['best']}{beside}",
                flush=True,
            )
            # After each, so that what was measured is there when a long run is stopped.
            write(
                "peers",
                {"peak_gflops": peak / 1e9, "rows": rows, "geometric_means": geometric_means(rows)},
            )


if __name__ == "__main__":
    main()
