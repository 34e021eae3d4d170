"""Every family's training step beside a PyTorch twin of the same architecture, at the size of its
row in the zoo and wider.

genjax runs as users run it: the row's own training procedure, compiled, one step a dispatch and as
many as its schedule says. Both sides run under glibc's allocator of memory and under those that are
installed (`own_step.environments`), and each side counts with the one that it is fastest with. The
twins run in an interpreter that $GENJAX_TORCH_PYTHON names
(`torch_twins.py`); before anything is timed, a twin has to give the loss and the norm of the
gradient that genjax gives for the same parameters, data and noise.

What a second machine wrote is kept as `results/peers_elsewhere.json`; the report has both.
"""

import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import ratio, summary, write
from benchmarks.own_step import OwnStep, alternate, environments, filled
from benchmarks.processes import AskedProcess
from genjax.data import example_batch
from genjax.evaluation.estimates import count
from genjax.profiling.measure import matmul_peak
from genjax.protocol import Batch, Model
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

    def __init__(
        self, python: str, case: dict[str, Any], env: Mapping[str, str] | None = None
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "case.json"
        path.write_text(json.dumps(case))
        self.process = AskedProcess(
            [python, str(Path(__file__).with_name("torch_twins.py")), str(path)],
            None if env is None else dict(env),
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


def _steps_of(twin: Twin, variant: str, steps: int) -> float:
    """Seconds that so many steps of a twin take."""
    return twin.ask(variant=variant, steps=steps)


class _Side(NamedTuple):
    """What one side runs, by label, and what it says of itself."""

    calls: dict[str, Callable[[int], float]]
    about: dict[str, Any]
    close: list[Callable[[], None]]


def _ours(name: str, size: str, envs: Mapping[str, Mapping[str, str]]) -> _Side:
    """genjax's step under every allocator. What it says of itself is of a process that compiled."""
    changes = CASES[name] if size == "medium" else {}
    about = filled(name, changes, None, envs["default"])
    steps = {one: OwnStep(name, changes, None, env) for one, env in envs.items()}
    calls = {
        f"{form}, {one}": partial(step.seconds, form)
        for form in about["per_call"]
        for one, step in steps.items()
    }
    return _Side(calls, about, [step.close for step in steps.values()])


def _theirs(
    recipe: Recipe, case: dict[str, Any], python: str, envs: Mapping[str, Mapping[str, str]]
) -> _Side:
    """The twin's step under every allocator, once it is known for the same function. What it says
    of itself is of the first, which compiled for all.
    """
    twins = {one: Twin(python, case, env) for one, env in envs.items()}
    first = next(iter(twins.values()))
    difference = agreement(recipe, first)
    about = {**first.about, "difference": difference, "failed": {}, "first_step_seconds": {}}
    calls: dict[str, Callable[[int], float]] = {}
    for variant in VARIANTS:
        try:
            for one, twin in twins.items():
                own = partial(_steps_of, twin, variant)
                about["first_step_seconds"].setdefault(variant, own(1))
                calls[f"PyTorch, {variant}, {one}"] = own
        except RuntimeError as error:
            about["failed"][variant] = str(error)
    return _Side(calls, about, [twin.close for twin in twins.values()])


def measure(
    name: str, size: str, seconds: float, peak: float, python: str | None, block: float = 0.3
) -> dict[str, Any]:
    """All figures of one row at one size, each side under the allocator that it is fastest with;
    without an interpreter for PyTorch, genjax's alone, and a word of it.
    """
    recipe = recipe_of(name, size)
    with tempfile.TemporaryDirectory() as folder:
        # What torch.compile kept from an earlier run would make its seconds of compilation too few.
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "torch")}
        envs = {
            one: {**env, **kept} for one, env in environments(str(Path(folder) / "xla")).items()
        }
        mine = _ours(name, size, envs)
        twin = _theirs(recipe, case_of(recipe), python, envs) if python else _Side({}, {}, [])
        per_call = {label: mine.about["per_call"][_form(label)] for label in mine.calls}
        rounds = alternate({**mine.calls, **twin.calls}, per_call, seconds, block)
        for close in (*mine.close, *twin.close):
            close()
    return _row(recipe, size, peak, mine, twin, rounds)


def _form(label: str) -> str:
    """How a step ran, of a label that names the allocator last."""
    return label.rpartition(", ")[0]


def _row(
    recipe: Recipe,
    size: str,
    peak: float,
    mine: _Side,
    twin: _Side,
    rounds: dict[str, list[float]],
) -> dict[str, Any]:
    """What is written of a row."""

    def best(names: Iterable[str]) -> str:
        return min(names, key=lambda one: statistics.median(rounds[one]))

    spec, case = recipe.source().spec, case_of(recipe)
    fastest = best(mine.calls)
    one_step = best([label for label in mine.calls if mine.about["per_call"][_form(label)] == 1])
    step = statistics.median(rounds[fastest])
    per_example = spec.shape[0] if spec.step else 1
    row = {
        "recipe": recipe.name,
        "family": case["family"],
        "size": size,
        "wider": CASES[recipe.name] if size == "medium" else {},
        "parameters": case["parameters"],
        "batch_size": case["batch_size"],
        "best": fastest,
        "allocator": fastest.rpartition(", ")[2],
        "steps_per_second": 1 / step,
        "unit": f"{spec.step}s" if spec.step else "examples",
        "units_per_second": case["batch_size"] * per_example / step,
        "compile_seconds": mine.about["compile_seconds"],
        **mine.about["cost"],
        "share_of_peak": mine.about["cost"]["flops"] / step / peak,
        "ms": {
            one: {key: 1000 * v if key != "rounds" else v for key, v in summary(t).items()}
            for one, t in rounds.items()
        },
    }
    if not twin.calls:
        return row | {"torch": {"skipped": NO_TORCH}}
    theirs = best(twin.calls)
    return row | {
        "torch": twin.about | {"best": theirs, "allocator": theirs.rpartition(", ")[2]},
        "ratio": ratio(rounds[fastest], rounds[theirs]),
        "best_one_step": one_step,
        "ratio_one_step": ratio(rounds[one_step], rounds[theirs]),
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
    for size in sizes:
        for name in names or CASES:
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
