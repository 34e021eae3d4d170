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
from genjax.evaluation.estimates import Estimate, counting
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
        real: the same figure with as many other examples of the training split in the place of
            samples: what is possible. None where there are not as many.
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


def labelled(recipe: Recipe, trained_on: Source | None = None) -> Source | None:
    """The recipe's data with their labels, whether the recipe uses them or not; `trained_on` where
    they were in memory or are no longer there. None where there are no labels.
    """
    try:
        found = recipe.source()
        if not found.spec.n_classes:
            if "conditional" not in inspect.signature(loader(recipe.data)).parameters:
                return None
            found = open_source(recipe.data, **{**recipe.data_options, "conditional": True})
    except GenjaxError:  # or a file without labels
        found = trained_on
    return found if found is not None and found.spec.n_classes else None


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
    """What figures compare, each [n, ...]: examples of the split, samples, and other examples of
    the training split in the place of samples, where there are as many.
    """

    data: np.ndarray
    samples: np.ndarray
    real: np.ndarray | None

    def map(self, f: Callable[[np.ndarray], np.ndarray]) -> "_Sets":
        """f of each."""
        return _Sets(f(self.data), f(self.samples), None if self.real is None else f(self.real))


# Fewer examples are too few for a figure over features: ten blocks of two for the MMD.
LEAST = 20


def figures_of(
    recipe: Recipe,
    sampler: Sampler,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    source: Source | None = None,
    trained_on: Source | None = None,
) -> list[Figure]:
    """Every figure that fits the data, the most telling one first; samples have the conditions of
    the reference examples.

    Points with known modes: share of high quality, modes covered. Images with labels: class
    agreement (of a conditional model), and Fréchet distance, kernel MMD, precision, recall, density
    and coverage over the features of the judge. All data, sequences of one length among them:
    Fréchet distance and sliced Wasserstein distance over raw values. Of fewer than 20 images those
    over features are left out, and of a single example the Fréchet distance, which is said.

    Args:
        recipe: whose `source` has the data.
        split: what samples are compared with.
        n: how many examples of it, the first ones, and as many samples; None means all.
        source: other data to compare with than the recipe's.
        trained_on: what the judge learns of where the recipe's data cannot be opened.

    Raises:
        ConfigError: see `check_figures`.
    """
    source = source or recipe.source()
    splits = source.load()
    key_data, key_real, key_sample = jax.random.split(jax.random.key(seed), 3)
    arrays = rows_of(splits, split, source.apart)
    check_figures(source.spec, arrays)
    size = len(arrays.x) if n is None else min(n, len(arrays.x))
    reference = source.prepare(key_data, _first_rows(arrays, size))
    cond = None if reference.cond is None else np.asarray(reference.cond)
    train = counting(rows_of(splits, "train", source.apart))
    others = _others(train, size, already=size if split in ("train", "all") else 0)
    sets = _Sets(
        data=np.asarray(reference.x),
        samples=sampler(key_sample, cond, size),
        real=None if others is None else np.asarray(source.prepare(key_real, others).x),
    )
    found = _of_modes(source, sets)
    with_labels = labelled(recipe, trained_on) if view_of(source.spec) == "image" else None
    asked = cond if source.spec.n_classes else None
    if size < 2:
        say("The Fréchet distance needs 2 examples; 1 is too few.")
    if with_labels is not None and size < LEAST:
        more = "; a larger --n, or none, has more" * (size < len(arrays.x))
        say(f"Figures over features need {LEAST} examples; {size} are too few{more}.")
    if with_labels is not None and (size >= LEAST or asked is not None):
        judge = judge_of(with_labels, say=say)
        found += [] if asked is None else [_agreement(judge, sets, asked)]
        found += _of_features(judge, sets) if size >= LEAST else []
    return found + _of_values(source.spec, sets)


def check_figures(spec: DataSpec, arrays: Batch) -> None:
    """Refuse reference examples that no figure about samples fits.

    Raises:
        ConfigError: for tokens, for sequences of several lengths, and for examples whose weights
            differ.
    """
    found = "are tokens" if spec.kind == "tokens" else "are sequences of several lengths"
    if spec.kind == "tokens" or spec.lengths:
        raise ConfigError(
            f"Figures about samples compare numbers of one shape; {spec.name} {found}. Use the "
            "log-probability."
        )
    if arrays.weight is not None and np.ptp(arrays.weight) > 0:
        raise ConfigError(
            "Figures about samples take every example for one, and those of the split of "
            f"{spec.name} that is compared with have weights that differ. Give that split without "
            "weights, and without examples of weight 0."
        )


def _first_rows(batch: Batch, n: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[:n], batch)


def _others(train: Batch, n: int, already: int) -> Batch | None:
    """n examples of the training split beside its first ones, which are the reference already, and
    from all over it, as data of one's own may lie in the order of classes; None if it has fewer.
    """
    left = len(train.x) - already
    if left < n:
        return None
    rows = already + np.arange(n) * left // n
    return jax.tree.map(lambda leaf: leaf[rows], train)


def _figure(
    name: str, unit: str, estimator: str, compare: Callable[[np.ndarray], Any], sets: _Sets
) -> Figure:
    """One figure, of the samples and of real data in their place."""
    real = None if sets.real is None else _number(compare(sets.real))
    return _stated(name, unit, estimator, compare(sets.samples), real, sets)


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
    seen = sets.map(judge.features)

    def distance(features: np.ndarray) -> float:
        return frechet_distance(seen.data, features)

    def discrepancy(features: np.ndarray) -> Estimate:
        return kernel_mmd(seen.data, features)

    gaussians = f"two Gaussians over features of {judge.name}"
    kernel = f"unbiased, cubic kernel, features of {judge.name}"
    neighbours = f"5 nearest neighbours, features of {judge.name}"
    four = precision_recall_density_coverage(seen.data, seen.samples)
    real = None if seen.real is None else precision_recall_density_coverage(seen.data, seen.real)
    return [
        _figure(f"FD[{judge.name}]", "squared", gaussians, distance, seen),
        _figure(f"MMD²[{judge.name}]", "squared", kernel, discrepancy, seen),
        *(
            _stated(name, "share", neighbours, getattr(four, name), getattr(real, name, None), seen)
            for name in four._fields
        ),
    ]


def _of_values(spec: DataSpec, sets: _Sets) -> list[Figure]:
    """Distances between raw values, or standardised ones where the spec has a scale; the steps of a
    sequence stand side by side.
    """
    values, called = "raw values", "raw"
    if spec.scale is not None:
        sets = sets.map(lambda x: np.asarray(spec.normalize(jnp.asarray(x))))
        values, called = "standardised values", "standardised"
    flat = sets.map(lambda x: x.reshape(len(x), -1))

    def distance(x: np.ndarray) -> float:
        return frechet_distance(flat.data, x)

    def sliced(x: np.ndarray) -> float:
        return sliced_wasserstein(flat.data, x, n_projections=200)

    directions = f"W2 over 200 random directions of {values}"
    figures = [_figure("sliced Wasserstein", "distance", directions, sliced, flat)]
    if len(flat.data) < 2:  # which have no covariance
        return figures
    gaussians = f"two Gaussians over {values}"
    return [_figure(f"FD[{called}]", "squared", gaussians, distance, flat), *figures]
