"""GANs: many seeds of the mixtures in one compiled program, what vmap gains, and DCGAN beside a
PyTorch twin.
"""

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import results_of_zoo
from benchmarks.common import alternate, ratio, summary, write
from genjax.data import batch_at
from genjax.evaluation import quality
from genjax.learning import loop
from genjax.learning.members import ensemble
from genjax.learning.step import eval_params
from genjax.learning.transforms import compiled, feed, repeat_steps
from genjax.profiling.measure import stepper
from genjax.runs.load import load
from genjax.zoo import ZOO

SEEDS = 8
# The interpreter of an environment with PyTorch, which is never a dependency: pip install
# torch==2.13.0 (Python 3.11, CPU).
TORCH = os.environ.get("GENJAX_TORCH_PYTHON", "")


def mixtures(name: str) -> dict[str, Any]:
    """Train eight seeds of a recipe as one vmapped program; figures of every member on the test
    split's number of samples.
    """
    recipe = ZOO[name]
    source, schedule = recipe.source(), recipe.schedule
    splits = source.load()
    t = ensemble(recipe.training(source.spec))
    fed = loop.choose_feed(t, source, splits.train, schedule.batch_size, schedule.seed)
    start = time.perf_counter()
    keys = jax.vmap(jax.random.key)(np.arange(SEEDS, dtype=np.uint32))
    state = loop.fit(
        fed,
        key=keys,
        steps=schedule.steps,
        steps_per_call=schedule.steps_per_call,
        stop_on_nonfinite=False,
    )
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    model = recipe.build(source.spec)
    found = []
    for member in range(SEEDS):
        own = [
            jax.tree.map(lambda leaf, member=member: leaf[member], tree)
            for tree in (eval_params(state), state.state)
        ]
        figures = quality.figures_of(recipe, quality.sampler_of(model, *own))
        found.append({f.name: f.value for f in figures})
    names = list(found[0])
    table = {figure: [member[figure] for member in found] for figure in names}
    print(
        f"{name}: {seconds:.0f} s, "
        + "; ".join(f"{figure} {np.round(values, 4)}" for figure, values in table.items())
    )
    return {
        "recipe": name,
        "seeds": list(range(SEEDS)),
        "steps": schedule.steps,
        "batch_size": schedule.batch_size,
        "seconds_with_compilation": seconds,
        "split": "test",
        "n": len(splits.test.x),
        "figures": table,
        "mean": {figure: statistics.mean(values) for figure, values in table.items()},
        "real": {f.name: f.real for f in figures},
    }


def members(seconds: float) -> dict[str, Any]:
    """One step of eight ring GANs with batch 64 each: vmapped, mapped, and as eight programs one
    after the other.
    """
    recipe = ZOO["gan-ring"]
    source = recipe.source()
    arrays = jax.device_put(source.load().train)
    k = 20
    t = repeat_steps(feed(recipe.training(source.spec), batch_at(source, 64, 0)), k)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    calls = {}
    for mode in ("vmap", "map"):
        c = compiled(ensemble(t, mode))  # type: ignore[arg-type]
        calls[mode] = stepper(c.step, c.init(keys), arrays)
    solo = compiled(t)
    each = [stepper(solo.step, solo.init(key), arrays) for key in keys]
    calls["one after the other"] = lambda: [call() for call in each][-1]
    rounds = alternate(calls, seconds)
    found: dict[str, Any] = {
        mode: {"ms_per_step": 1000 * summary(r)["median"] / k} for mode, r in rounds.items()
    }
    for mode in ("vmap", "map"):
        found[mode]["ratio"] = ratio(rounds[mode], rounds["one after the other"])
    print(f"eight ring GANs, batch 64: {found}")
    return {"batch_size": 64, "members": SEEDS, "steps_per_dispatch": k, "modes": found}


def twin(seeds: tuple[int, ...] = (0, 1, 2), keep: Path | None = None) -> dict[str, Any]:
    """`dcgan-mnist` and its PyTorch twin: the same figures by the same judge, mean and sd over
    seeds, and the times.

    Runs of the recipe that are in `keep` already (see `results_of_zoo`) are not trained again.
    """
    if not TORCH:
        return {
            "skipped": "GENJAX_TORCH_PYTHON is not set: the interpreter of an environment with "
            "torch==2.13.0"
        }
    recipe = ZOO["dcgan-mnist"]
    source, schedule = recipe.source(), recipe.schedule
    splits = source.load()
    n = len(splits.test.x)
    runs: dict[str, list[dict[str, Any]]] = {"genjax": [], "torch": []}
    with tempfile.TemporaryDirectory() as scratch:
        images, out = Path(scratch) / "images.npz", Path(scratch) / "samples.npz"
        np.savez(images, x=splits.train.x)
        for seed in seeds:
            folder = (keep or Path(scratch)) / f"dcgan-mnist_seed{seed}"
            seconds = results_of_zoo.train("dcgan-mnist", seed, folder)
            loaded = load(folder)
            sampler = quality.sampler_of(loaded.model, loaded.params, loaded.state)
            own = {f.name: f.value for f in quality.figures_of(recipe, sampler, seed=seed)}
            runs["genjax"].append({"training, s": seconds, **own})
            flags = [
                f"--steps={schedule.steps}",
                f"--batch={schedule.batch_size}",
                f"--seed={seed}",
                f"--n={n}",
            ]
            script = str(Path(__file__).with_name("torch_dcgan.py"))
            subprocess.run([TORCH, script, str(images), str(out), *flags], check=True)
            with np.load(out) as file:
                drawn, seconds = file["x"].astype(np.float32), float(file["seconds"])
            figures = quality.figures_of(
                recipe, lambda key, cond, n, drawn=drawn: drawn[:n], seed=seed
            )
            own = {f.name: f.value for f in figures}
            runs["torch"].append({"training, s": seconds, **own})
            print(
                f"seed {seed}: genjax {runs['genjax'][-1]}; torch {runs['torch'][-1]}", flush=True
            )

    def over(values: list[float]) -> dict[str, Any]:
        mean, sd = statistics.mean(values), statistics.stdev(values)
        return {"mean": mean, "sd": sd, "by_seed": values}

    table = {
        who: {name: over([one[name] for one in of]) for name in of[0]} for who, of in runs.items()
    }
    return {
        "steps": schedule.steps,
        "batch_size": schedule.batch_size,
        "split": "test",
        "n": n,
        "seeds": list(seeds),
        **table,
    }


def main(seconds: float = 10.0) -> None:
    """Measure mixtures and members, and write results/adversarial.json."""
    write(
        "adversarial",
        {
            "mixtures": [mixtures(name) for name in ("gan-ring", "gan-grid")],
            "members": members(seconds),
        },
    )


def compare_with_torch(keep: Path | None = None) -> None:
    """Measure the twin, and write results/dcgan.json."""
    write("dcgan", twin(keep=keep))
