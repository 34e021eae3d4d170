"""Diffusion and flow matching: distance to the data in the plane, guidance, few solver steps, bits
per dimension, overhead.

Runs are made through the command line, as `results` makes its own, and kept in the same folders.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import results_of_zoo
from benchmarks.common import write
from genjax.evaluation import quality
from genjax.evaluation.sample_metrics import sliced_wasserstein
from genjax.runs.load import Loaded, load
from genjax.zoo import ZOO

PLANE = ("diffusion-2d", "flow-matching-2d")
DENSITIES = ("ring", "moons", "checkerboard")
POINTS, DRAWS, PLANE_STEPS = 2_000, 20, 50
DIGITS = ("diffusion", "flow-matching")
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0)
FEW, MANY, FEW_SAMPLES = 18, 200, 1_000
COMPARED = ("vdm-digits", "vae", "flow-matching")


def trained(name: str, keep: Path, *flags: str) -> Loaded:
    """A run of seed 0, trained unless it is in `keep`; flags that change settings go into the
    folder's name.
    """
    folder = keep / "-".join([f"{name}_seed0", *(flag.strip("-") for flag in flags)])
    results_of_zoo.train(name, 0, folder, *flags)
    return load(folder)


def sampler(loaded: Loaded, **how: Any) -> quality.Sampler:
    """A run's samples with some settings of its solver or guidance changed."""
    denoiser = loaded.model.denoiser
    assert denoiser is not None

    def sample(params: Any, state: Any, key: jax.Array, n: int, cond: Any = None) -> jax.Array:
        return denoiser.generate(params, state, key, n, cond, **how)

    return quality.sampler_of(loaded.model._replace(sample=sample), loaded.params, loaded.state)


def plane(name: str, density: str, keep: Path) -> dict[str, Any]:
    """Sliced Wasserstein distances of 2,000 samples to 2,000 fresh points, and of two fresh sets,
    20 draws of each.
    """
    flags = [] if ZOO[name].data == density else ["--data", density]
    loaded = trained(name, keep, *flags)
    draw = sampler(loaded, solver="heun", n_steps=PLANE_STEPS)
    fresh = loaded.recipe.source().fresh
    if fresh is None:
        raise TypeError(f"{density} cannot be drawn without end")
    distances: dict[str, list[float]] = {"samples": [], "real": []}
    for index in range(DRAWS):
        reference, other = (fresh(2 * index + which, POINTS).x for which in range(2))
        samples = draw(jax.random.key(index), None, POINTS)
        for who, points in {"samples": samples, "real": other}.items():
            distances[who].append(
                sliced_wasserstein(reference, points, n_projections=200, seed=index)
            )
    mean = {who: statistics.mean(values) for who, values in distances.items()}
    sd = {who: statistics.stdev(values) for who, values in distances.items()}
    excess = (mean["samples"] - mean["real"]) / sd["real"]
    print(
        f"{name} on {density}: {mean['samples']:.4f} against {mean['real']:.4f} ± "
        f"{sd['real']:.4f}, {excess:+.2f} s.e.",
        flush=True,
    )
    return {
        "recipe": name,
        "density": density,
        "mean": mean,
        "sd": sd,
        "excess_in_standard_errors": excess,
    }


def guided(name: str, keep: Path) -> dict[str, Any]:
    """Class agreement and Fréchet distance of the recipe's samples by the scale of guidance."""
    loaded = trained(name, keep)
    rows = []
    for scale in SCALES:
        found = quality.figures_of(loaded.recipe, sampler(loaded, guidance=scale))
        rows.append({"scale": scale, **{f.name: f.value for f in found}})
        judged = next(f.estimator for f in found if f.name == "class agreement")
        print(f"{name}, guidance {scale}: {rows[-1]}", flush=True)
    return {"recipe": name, "judge": judged, "n": found[0].n, "rows": rows}


def few_steps(name: str, keep: Path) -> dict[str, Any]:
    """The Fréchet distance with few and with many Heun steps, from the same noise."""
    loaded = trained(name, keep)
    found = {}
    for steps in (FEW, MANY):
        figures = quality.figures_of(
            loaded.recipe, sampler(loaded, solver="heun", n_steps=steps), n=FEW_SAMPLES
        )
        found[steps] = {f.name: f.value for f in figures}
        print(f"{name}, {steps} Heun steps: {found[steps]}", flush=True)
    return {
        "recipe": name,
        "n": figures[0].n,
        "steps": {str(steps): row for steps, row in found.items()},
    }


def bits(name: str, keep: Path) -> dict[str, Any]:
    """Bits per dimension of one recipe on the test digits, by its own estimator."""
    trained(name, keep)
    report = results_of_zoo.evaluate(keep / f"{name}_seed0", ZOO[name].schedule.steps)
    kept = ("mean", "standard_error", "bits_per_dim", "kind", "estimator", "n", "split")
    print(
        f"{name}: {report['bits_per_dim']:.3f} bits per dimension, {report['estimator']}",
        flush=True,
    )
    return {
        "recipe": name,
        "conditional": ZOO[name].source().spec.conditional,
        **{key: report[key] for key in kept},
    }


def main(keep: Path | None = None) -> None:
    """Measure and write results/denoising.json, a part at a time; runs that are in `keep` already
    are not trained again.
    """
    found: dict[str, Any] = {"points": POINTS, "draws": DRAWS, "plane_steps": PLANE_STEPS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        parts: dict[str, Callable[[], Any]] = {
            "guided": lambda: [guided(name, folder) for name in DIGITS],
            "bits": lambda: [bits(name, folder) for name in COMPARED],
            "few_steps": lambda: few_steps("edm-mnist", folder),
            "plane": lambda: [
                plane(name, density, folder) for name in PLANE for density in DENSITIES
            ],
        }
        for name, measure in parts.items():
            found[name] = measure()
            write("denoising", found)
