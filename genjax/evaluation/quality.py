"""What a run's samples are worth: every figure of `estimates.py` that its data allow, beside the
same figure of real data.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from genjax.data import Source, loader, open_source
from genjax.errors import ConfigError
from genjax.evaluation import estimates
from genjax.evaluation.judge import judge_of
from genjax.protocol import Batch, Key, Model, Params, State
from genjax.zoo.recipe import Recipe


class Figure(NamedTuple):
    """One figure about samples, with all that it takes to repeat it.

    Attributes:
        name: "FD[raw]", "modes covered", ...
        value: of n samples against n_reference examples of a split.
        standard_error: where the estimator has one.
        real: the same figure with as many examples of the training split in the place of samples:
            what is possible.
        unit: "share", "squared feature distance", ...
        estimator: how it was computed, in words.
    """

    name: str
    value: float
    standard_error: float | None
    real: float | None
    unit: str
    estimator: str
    n: int
    n_reference: int


def labelled(recipe: Recipe) -> Source | None:
    """The recipe's data with their labels, whether the recipe uses them or not; None where there
    are none.
    """
    source = recipe.source()
    if source.spec.n_classes:
        return source
    if "conditional" not in inspect.signature(loader(recipe.data)).parameters:
        return None
    source = open_source(recipe.data, **{**recipe.data_options, "conditional": True})
    return source if source.spec.n_classes else None


class Sampler(Protocol):
    """What makes samples: (key, conditions [n] or None, n) -> x [n, *shape] in the units of the
    data.
    """

    def __call__(self, key: Key, cond: np.ndarray | None, n: int) -> np.ndarray: ...


def sampler_of(model: Model, params: Params, state: State, chunk: int = 500) -> Sampler:
    """A model's samples, made a chunk at a time by one compiled program."""
    program = jax.jit(model.sample, static_argnums=3)

    def draw(key: Key, cond: np.ndarray | None, n: int) -> np.ndarray:
        parts, size = [], min(chunk, n)
        for index, start in enumerate(range(0, n, size)):
            rows = np.minimum(
                np.arange(start, start + size), n - 1
            )  # the last chunk is filled up, and cut below
            own = None if cond is None else cond[rows]
            parts.append(
                np.asarray(program(params, state, jax.random.fold_in(key, index), size, own))
            )
        return np.concatenate(parts)[:n]

    return draw


def figures_of(
    recipe: Recipe,
    sampler: Sampler,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Figure]:
    """Every figure that fits the data, the most telling one first; samples have the conditions of
    the reference examples.

    Points with known modes: share of high quality, modes covered. Images with labels: class
    agreement (of a conditional model), and Fréchet distance, kernel MMD, precision, recall, density
    and coverage over the features of the judge. All
    data: Fréchet distance and sliced Wasserstein distance over raw values.

    Args:
        split: what samples are compared with.
        n: how many examples of it, the first ones, and as many samples; None means all.

    Raises:
        ConfigError: for sequences, which none of the figures fits.
    """
    source = recipe.source()
    if source.spec.step is not None:
        raise ConfigError(
            f"Figures about samples compare points and images; {source.spec.name} are sequences. "
            "Use the log-probability."
        )
    splits = source.load()
    key_data, key_real, key_sample = jax.random.split(jax.random.key(seed), 3)
    arrays: Batch = getattr(splits, split)
    size = len(arrays.x) if n is None else min(n, len(arrays.x))
    cut = lambda batch: jax.tree.map(lambda leaf: leaf[:size], batch)  # noqa: E731
    reference = source.prepare(key_data, cut(arrays))
    data, cond = (
        np.asarray(reference.x),
        None if reference.cond is None else np.asarray(reference.cond),
    )
    # Every figure is computed twice: of the samples, and of training examples in their place.
    of = {
        "samples": sampler(key_sample, cond, size),
        "real": np.asarray(source.prepare(key_real, cut(splits.train)).x),
    }
    found: list[Figure] = []

    def add(
        name: str, unit: str, estimator: str, figure: Callable[[str], Any], compare: bool = True
    ) -> None:
        value = figure("samples")
        error = value.standard_error if isinstance(value, estimates.Estimate) else None
        real = _number(figure("real")) if compare else None
        found.append(Figure(name, _number(value), error, real, unit, estimator, size, len(data)))

    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    if source.modes is not None and source.mode_std is not None:
        modes, sd = source.modes, source.mode_std
        quality, covered = estimates.high_quality_share, estimates.modes_covered
        add(
            "high-quality share",
            "of samples",
            "within 3 sd of a mode",
            lambda which: quality(of[which], modes, sd),
        )
        about = "with at least one sample within 3 sd"
        add(
            "modes covered",
            f"of {len(modes)} modes",
            about,
            lambda which: covered(of[which], modes, sd),
        )
    whole = labelled(recipe) if len(source.spec.shape) == 3 else None
    if whole is not None:
        judge = judge_of(whole, say=say)
        if source.spec.n_classes and cond is not None:
            wanted = cond
            says = f"{judge.name}, right on {100 * judge.accuracy.mean:.2f} % of {judge.accuracy.n} real test images"
            agree = lambda which: estimates.class_agreement(judge.predict(of[which]), wanted)  # noqa: E731
            add("class agreement", "of samples", says, agree, compare=False)
        expected, seen = judge.features(data), {which: judge.features(x) for which, x in of.items()}
        about = f"two Gaussians over features of {judge.name}"
        add(
            f"FD[{judge.name}]",
            "squared",
            about,
            lambda which: estimates.frechet_distance(expected, seen[which]),
        )
        about = f"unbiased, cubic kernel, features of {judge.name}"
        add(
            f"MMD²[{judge.name}]",
            "squared",
            about,
            lambda which: estimates.kernel_mmd(expected, seen[which]),
        )
        four = {
            which: estimates.precision_recall_density_coverage(expected, x)
            for which, x in seen.items()
        }
        for name in ("precision", "recall", "density", "coverage"):
            about = f"5 nearest neighbours, features of {judge.name}"
            add(name, "share", about, lambda which, name=name: getattr(four[which], name))
    about = "two Gaussians over raw values"
    add(
        "FD[raw]",
        "squared",
        about,
        lambda which: estimates.frechet_distance(flat(data), flat(of[which])),
    )
    about = "W2 over 200 random directions of raw values"
    sliced = lambda which: estimates.sliced_wasserstein(
        flat(data), flat(of[which]), n_projections=200
    )  # noqa: E731
    add("sliced Wasserstein", "distance", about, sliced)
    return found


def _number(value: Any) -> float:
    return float(value.mean if isinstance(value, estimates.Estimate) else value)
