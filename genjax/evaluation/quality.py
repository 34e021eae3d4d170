"""What a run's samples are worth: every figure of `sample_metrics` that its data allow, beside the
same figure of real data.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data import Source, loader, open_source
from genjax.data.source import rows_of
from genjax.data.view import view_of
from genjax.errors import ConfigError, GenjaxError
from genjax.evaluation.estimates import Estimate
from genjax.evaluation.judge import Judge, judge_of
from genjax.evaluation.sample_metrics import (
    class_agreement,
    frechet_distance,
    high_quality_share,
    kernel_mmd,
    modes_covered,
    precision_recall_density_coverage,
    sliced_wasserstein,
)
from genjax.learning.memory import fetched
from genjax.protocol import Batch, DataSpec, Key, Model, Params, State
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
    try:
        source = open_source(recipe.data, **{**recipe.data_options, "conditional": True})
    except GenjaxError:  # a file without labels
        return None
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
            # The last chunk is filled up, and cut below.
            rows = np.minimum(np.arange(start, start + size), n - 1)
            own = None if cond is None else cond[rows]
            x = program(params, state, jax.random.fold_in(key, index), size, own)
            parts.append(fetched(x))
        return np.concatenate(parts)[:n]

    return draw


class _Sets(NamedTuple):
    """What figures compare, each [n, ...]: examples of the split, samples, and examples of the
    training split in the place of samples.
    """

    data: np.ndarray
    samples: np.ndarray
    real: np.ndarray


def figures_of(
    recipe: Recipe,
    sampler: Sampler,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    source: Source | None = None,
) -> list[Figure]:
    """Every figure that fits the data, the most telling one first; samples have the conditions of
    the reference examples.

    Points with known modes: share of high quality, modes covered. Images with labels: class
    agreement (of a conditional model), and Fréchet distance, kernel MMD, precision, recall, density
    and coverage over the features of the judge. All data: Fréchet distance and sliced Wasserstein
    distance over raw values.

    Args:
        recipe: whose `source` has the data.
        split: what samples are compared with.
        n: how many examples of it, the first ones, and as many samples; None means all.
        source: other data to compare with than the recipe's.

    Raises:
        ConfigError: for sequences, which none of the figures fits.
    """
    source = source or recipe.source()
    if source.spec.step is not None:
        raise ConfigError(
            f"Figures about samples compare points and images; {source.spec.name} are sequences. "
            "Use the log-probability."
        )
    splits = source.load()
    key_data, key_real, key_sample = jax.random.split(jax.random.key(seed), 3)
    arrays = rows_of(splits, split)
    size = len(arrays.x) if n is None else min(n, len(arrays.x))
    reference = source.prepare(key_data, _first_rows(arrays, size))
    cond = None if reference.cond is None else np.asarray(reference.cond)
    sets = _Sets(
        data=np.asarray(reference.x),
        samples=sampler(key_sample, cond, size),
        real=np.asarray(source.prepare(key_real, _first_rows(splits.train, size)).x),
    )
    found = _of_modes(source, sets)
    if view_of(source.spec) == "image" and (with_labels := labelled(recipe)) is not None:
        judge = judge_of(with_labels, say=say)
        if source.spec.n_classes and cond is not None:
            found.append(_agreement(judge, sets, cond))
        found += _of_features(judge, sets)
    return found + _of_values(source.spec, sets)


def _first_rows(batch: Batch, n: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[:n], batch)


def _figure(
    name: str, unit: str, estimator: str, compare: Callable[[np.ndarray], Any], sets: _Sets
) -> Figure:
    """One figure, of the samples and of real data in their place."""
    value, real = compare(sets.samples), compare(sets.real)
    return _stated(name, unit, estimator, value, _number(real), sets)


def _stated(
    name: str, unit: str, estimator: str, value: Any, real: float | None, sets: _Sets
) -> Figure:
    error = value.standard_error if isinstance(value, Estimate) else None
    n, n_reference = len(sets.samples), len(sets.data)
    return Figure(name, _number(value), error, real, unit, estimator, n, n_reference)


def _number(value: Any) -> float:
    return float(value.mean if isinstance(value, Estimate) else value)


def _of_modes(source: Source, sets: _Sets) -> list[Figure]:
    """How many samples lie near the modes of the true density, and how many modes near samples."""
    modes, sd = source.modes, source.mode_std
    if modes is None or sd is None:
        return []

    def quality(x: np.ndarray) -> Estimate:
        return high_quality_share(x, modes, sd)

    def covered(x: np.ndarray) -> int:
        return modes_covered(x, modes, sd)

    near, some = "within 3 sd of a mode", "with at least one sample within 3 sd"
    return [
        _figure("high-quality share", "of samples", near, quality, sets),
        _figure("modes covered", f"of {len(modes)} modes", some, covered, sets),
    ]


def _agreement(judge: Judge, sets: _Sets, wanted: np.ndarray) -> Figure:
    """How often the judge sees the class that was asked for."""
    found = class_agreement(judge.predict(sets.samples), wanted)
    right = f"{100 * judge.accuracy.mean:.2f} % of {judge.accuracy.n} real test images"
    about = f"{judge.name}, right on {right}"
    return _stated("class agreement", "of samples", about, found, None, sets)


def _of_features(judge: Judge, sets: _Sets) -> list[Figure]:
    """Distances between the judge's features of samples and of data."""
    seen = _Sets(*map(judge.features, sets))

    def distance(features: np.ndarray) -> float:
        return frechet_distance(seen.data, features)

    def discrepancy(features: np.ndarray) -> Estimate:
        return kernel_mmd(seen.data, features)

    gaussians = f"two Gaussians over features of {judge.name}"
    kernel = f"unbiased, cubic kernel, features of {judge.name}"
    neighbours = f"5 nearest neighbours, features of {judge.name}"
    four = precision_recall_density_coverage(seen.data, seen.samples)
    four_real = precision_recall_density_coverage(seen.data, seen.real)
    return [
        _figure(f"FD[{judge.name}]", "squared", gaussians, distance, seen),
        _figure(f"MMD²[{judge.name}]", "squared", kernel, discrepancy, seen),
        *(
            _stated(name, "share", neighbours, getattr(four, name), getattr(four_real, name), seen)
            for name in four._fields
        ),
    ]


def _of_values(spec: DataSpec, sets: _Sets) -> list[Figure]:
    """Distances between raw values, or standardised ones where the spec has a scale."""
    values, called = "raw values", "raw"
    if spec.scale is not None:
        sets = _Sets(*(np.asarray(spec.normalize(jnp.asarray(x))) for x in sets))
        values, called = "standardised values", "standardised"
    flat = _Sets(*(x.reshape(len(x), -1) for x in sets))

    def distance(x: np.ndarray) -> float:
        return frechet_distance(flat.data, x)

    def sliced(x: np.ndarray) -> float:
        return sliced_wasserstein(flat.data, x, n_projections=200)

    directions = f"W2 over 200 random directions of {values}"
    return [
        _figure(f"FD[{called}]", "squared", f"two Gaussians over {values}", distance, flat),
        _figure("sliced Wasserstein", "distance", directions, sliced, flat),
    ]
