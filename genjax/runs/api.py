"""A run as an object in Python: `genjax.load("runs/vae")` and `genjax.train("vae", data=x)`.

Arrays go in and come out in the units of the data, whatever the networks see: binary data of two
other values than 0 and 1 as those. The functions of `run.model` take 0 and 1.
"""

import dataclasses
import inspect
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import check_count
from genjax.data import MEMORY, Source, batch_indices
from genjax.data.kinds import as_bits, as_values
from genjax.data.labels import condition_of, condition_of_each
from genjax.errors import ConfigError, DataError, unknown_name
from genjax.evaluation.estimates import estimate, score_examples, scorer
from genjax.learning.loop import Progress
from genjax.learning.sharding import parse_mesh
from genjax.learning.step import eval_params
from genjax.protocol import Batch, DataSpec, Model, Params, State
from genjax.runs import load as loading
from genjax.runs import samples, shown
from genjax.runs.evaluate import as_evaluated, evaluate
from genjax.runs.other_data import in_order, other_in_memory, other_source, source_in
from genjax.runs.own_model import weights_of
from genjax.runs.train import train as train_in
from genjax.runs.train_own import train_own
from genjax.runs.writers import Writer
from genjax.values import (
    array_of,
    as_stored,
    check_batch,
    check_cond,
    check_events,
    check_form,
    check_real,
    key_of,
)
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, unknown_recipe
from genjax.zoo.sections import replace


class Scores(NamedTuple):
    """Log-probabilities or bounds.

    Attributes:
        nats: of each example, [n].
        mean, standard_error: over the examples.
        estimator: what was computed, in words.
    """

    nats: np.ndarray
    mean: float
    standard_error: float
    estimator: str


class Run:
    """A trained model with its parameters, and what can be done with it.

    Attributes:
        model, params, state: the record of pure functions, and what it takes; `params` are averaged
            where the recipe averages them.
        recipe: what was trained; None for a model of one's own.
        folder: the run folder; None without one.
        step: how many optimiser steps it has had.

    Example:
        >>> import genjax, numpy as np
        >>> x = np.random.default_rng(0).normal(size=(100, 3))
        >>> run = genjax.train("vae", x, steps=2, hidden=(4,), latent_dim=2, batch_size=8, say=str)
        >>> scores = run.bound(x[:10])  # in nats, of each example
        >>> scores.nats.shape
        (10,)
        >>> mean, scale = run.encode(x[:2])
        >>> run.decode(mean).shape
        (2, 3)
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        state: State,
        step: int,
        loaded: loading.Loaded | None = None,
        source: Source | None = None,
        folder: Path | None = None,
    ) -> None:
        self.model, self.params, self.state, self.step = model, params, state, step
        self.folder, self._loaded, self._source = folder, loaded, source
        self._figures: list[list[str]] = []  # that no folder has

    @property
    def recipe(self) -> Recipe | None:
        """What was trained; None for a model of one's own."""
        return None if self._loaded is None else self._loaded.recipe

    @property
    def spec(self) -> DataSpec:
        """What the data look like."""
        return self.model.spec

    @property
    def source(self) -> Source:
        """The data that it was trained on, compared with what they were then.

        Raises:
            DataError: for data that are not there any more, or changed; or are not known, of a
                model of one's own.
        """
        if self._source is None:
            if self._loaded is None:
                raise DataError(
                    "The data of a run of a model of one's own are not kept in its folder; use "
                    "what it was trained on."
                )
            self._source = loading.source_of(self._loaded)
        return self._source

    def sample(self, n: int = 16, cond: Any = None, seed: int = 0) -> np.ndarray:
        """n samples [n, *shape]. `cond` is a class by its name or number, several of them, or an
        array [n] or [n, cond_dim]; every class in turn unless given.
        """
        return self._drawn(n, cond, seed, samples.Decoding())

    def generate(self, n: int = 16, cond: Any = None, seed: int = 0, **how: Any) -> np.ndarray:
        """n samples made as `how` says, the settings of `runs.samples.Decoding` that fit the model,
        such as prompt, temperature, repetition_penalty or n_steps. A prompt is a text or, of tokens
        that are no text, ids: [12, 7, 3].

        Raises:
            ConfigError: for settings that do not exist or do not fit the model.
        """
        fits = samples.fields_for(self.model)
        for name in how:
            if name not in fits:
                raise ConfigError(
                    f"This model of {self.spec.name} has no setting {name!r} of how samples are "
                    f"made; it has: {', '.join(fits) or 'none'}."
                )
        if "prompt" in how:
            how["prompt"] = self._prompt(how["prompt"])
        return self._drawn(n, cond, seed, samples.Decoding(**how))

    def _prompt(self, prompt: Any) -> str | None:
        """Ids as the command line has them."""
        if prompt is None or isinstance(prompt, str):
            return prompt
        ids = np.asarray(prompt)
        if self.spec.text or ids.ndim != 1 or ids.dtype.kind not in "iu":
            wanted = "a text" if self.spec.text else "token ids [m], such as [1, 0, 1]"
            raise ConfigError(
                f"A prompt for this model of {self.spec.name} must be {wanted}; got {prompt!r:.80}."
            )
        return ",".join(map(str, ids.tolist()))

    def _drawn(self, n: int, cond: Any, seed: int, how: samples.Decoding) -> np.ndarray:
        check_count(n)
        found = condition_of(self.spec, cond, n)
        x = samples.draw(self.model, self.params, self.state, key_of(seed), n, found, how)
        return as_values(x, self.spec.values)

    def texts(self, x: np.ndarray) -> list[str]:
        """Samples of a model of text as strings."""
        return samples.texts(x, self.spec)

    def log_prob(self, x: Any, cond: Any = None, seed: int = 0, length: Any = None) -> Scores:
        """ln p(x | cond) of each example in nats, exact.

        Raises:
            ConfigError: for a model that has only a bound, or neither.
        """
        return self._scores("log_prob", x, cond, seed, length)

    def bound(self, x: Any, cond: Any = None, seed: int = 0, length: Any = None) -> Scores:
        """A lower bound (in expectation) of the same.

        Raises:
            ConfigError: for a model that has none.
        """
        return self._scores("bound", x, cond, seed, length)

    def _scores(self, name: str, x: Any, cond: Any, seed: int, length: Any) -> Scores:
        score = getattr(self.model, name)
        if score is None:
            has = self.model.score_name
            instead = "it makes samples only" if has is None else f"it has {has}"
            raise ConfigError(f"This model of {self.spec.name} has no {name}; {instead}.")
        batch = self._batch(x, cond, length)
        program = scorer(score, lambda key, batch: batch)
        nats = score_examples(program, self.params, self.state, batch, key_of(seed))
        error = estimate(nats).standard_error if len(nats) > 1 else float("nan")
        return Scores(nats, float(nats.mean()), error, self.model.estimator)

    def _events(self, x: Any) -> np.ndarray:
        """Examples as the model takes them; [N, H, W] is understood for [N, H, W, 1], and the
        columns of a table are taken by their names.
        """
        array, wanted = array_of(in_order(x, self.spec.columns), "x"), self.spec.shape
        if array.shape[1:] == wanted[:-1] and wanted[-1:] == (1,):
            array = array[..., None]
        if array.ndim != len(wanted) + 1 or array.shape[1:] != wanted:
            raise DataError(
                f"x must be [N, {', '.join(map(str, wanted))}]; got {list(np.shape(x))}."
            )
        events = as_stored(self.spec, as_bits(array, self.spec.values, "x"))
        check_form(self.spec, events, "x")  # before the conditions, which may be as few
        return events

    def _batch(self, x: Any, cond: Any, length: Any = None) -> Batch:
        """The same with what goes with them, looked at now: inside a compiled program no value is
        known.
        """
        events = self._events(x)
        lengths: Any = None if length is None else array_of(length, "length")
        batch = Batch(events, condition_of_each(self.spec, cond, len(events)), length=lengths)
        check_batch(self.spec, batch)  # as they are: rounded, 1.7 would be in range
        return batch if length is None else batch._replace(length=lengths.astype(np.int32))

    def encode(self, x: Any, cond: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of q(z | x), [N, *latent shape] each.

        Raises:
            ConfigError: for a model without latent variables.
        """
        latent = self.model.latent
        if latent is None:
            raise ConfigError(f"This model of {self.spec.name} has no latent variables.")
        events = self._events(x)
        given = condition_of_each(self.spec, cond, len(events))
        check_events(self.spec, events)
        check_cond(self.spec, given, len(events))
        mean, log_scale = jax.jit(latent.encode)(self.params, self.state, events, given)
        return np.asarray(mean), np.exp(np.asarray(log_scale))

    def decode(self, z: Any, cond: Any = None) -> np.ndarray:
        """The mean of p(x | z), [N, *shape].

        Raises:
            ConfigError: for a model without latent variables that can be decoded.
        """
        latent = self.model.latent
        if latent is None or latent.decode is None:
            raise ConfigError(f"This model of {self.spec.name} has no latents that it can decode.")
        array = jnp.asarray(array_of(z, "z"), jnp.float32)
        check_real(array, (None, *latent.spec.shape), "z")
        given = condition_of_each(self.spec, cond, len(array))
        check_cond(self.spec, given, len(array))
        mean = np.asarray(jax.jit(latent.decode)(self.params, self.state, array, given))
        return as_values(mean, self.spec.values)

    def evaluate(
        self, split: str | None = None, data: Any = None, n_samples: int | None = None, **how: Any
    ) -> dict[str, Any]:
        """What the run is worth on a split, as `genjax evaluate` has it: a dictionary.

        Args:
            split: "test" unless given, or "all" of other `data`.
            data: other data of the same kind: a path, or what `from_arrays` takes.
            n_samples: draws of the bound's estimator, see `as_evaluated`; what the recipe
                evaluates with unless given.
            how: see `runs.evaluate.evaluate`: n, seed, batch_size, about_samples.

        Raises:
            ConfigError: for a model of one's own, which no recipe describes.
        """
        if self._loaded is None:
            raise ConfigError("Only runs of recipes are evaluated; use log_prob or bound.")
        source = self.source if data is None else self._other(data)
        usual = "test" if data is None else "all"
        loaded = as_evaluated(self._loaded, n_samples)
        own = self._source if data is not None else source
        report = evaluate(loaded, split or usual, source=source, trained_on=own, **how)
        self._figures += shown.figures_of(report)
        return report

    def _other(self, data: Any) -> Source:
        assert self._loaded is not None
        if isinstance(data, str | Path):
            return other_source(self._loaded, str(data))
        return other_in_memory(self._loaded, data)

    def __repr__(self) -> str:
        name = "a model of one's own" if self.recipe is None else self.recipe.name
        where = "" if self.folder is None else f", {self.folder}"
        return f"<genjax run: {name} on {self.spec.name}, step {self.step}{where}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        how = (self.params, self.step, self._loaded, self.folder, self._figures)
        return shown.page_of(self.spec, *how)


def load(
    folder: str | Path,
    which: str = "newest",
    model: Model | None = None,
    sigma_rel: float | None = None,
) -> Run:
    """A run folder as an object.

    Args:
        which: of its checkpoints the "newest", or the "best" by the figure on the validation split.
        model: what was trained, if it was a model of one's own (such as with an own network), which
            no folder can rebuild; its parameters are matched by name. Such a run has no `source`.
        sigma_rel: have averages of this relative length for parameters, chosen now and made of
            those that the run tracked (`--sigma-rels`).

    Raises:
        ConfigError: if the folder is no run, or is a sweep, or needs the model, or the average
            cannot be made.
        CheckpointError: if it has no checkpoint, none that is whole, or one of another model.

    Example:
        >>> import tempfile
        >>> import genjax, numpy as np
        >>> x, folder = np.random.default_rng(0).normal(size=(100, 3)), tempfile.mkdtemp() + "/run"
        >>> small = {"steps": 2, "hidden": (4,), "latent_dim": 2, "batch_size": 8}
        >>> run = genjax.train("vae", x, out=folder, say=str, **small)
        >>> genjax.load(folder).sample(5).shape
        (5, 3)
    """
    if model is not None:
        if sigma_rel is not None:
            raise ConfigError("Averages are stored for recipes, not for a model of one's own.")
        found = weights_of(Path(folder), model, which)
        return Run(model, *found, folder=Path(folder))
    loaded = loading.load(Path(folder), which, sigma_rel)
    return Run(loaded.model, loaded.params, loaded.state, loaded.step, loaded, folder=Path(folder))


def train(
    what: str | Recipe | Model,
    data: Any = None,
    *,
    out: str | Path | None = None,
    steps: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    mesh: Mapping[str, int] | str | None = None,
    init_from: str | Path | None = None,
    log_to: str | Iterable[str | Writer] = (),
    **settings: Any,
) -> Run:
    """Train what `genjax train` does, and return the run.

    Args:
        what: a recipe of the zoo, by its name or changed; or a `Model` of one's own.
        data: a name, a path, or data in memory (see `from_arrays`) or a `Source`; the recipe's own
            unless given. A `Source` or data in memory with labels are modelled with them.
        out: the run folder, in which the same call goes on where it stopped; without one nothing is
            kept but what is returned.
        steps: optimiser steps.
        progress: what is told after each dispatch.
        say: what is told of the data and of going on.
        mesh: {"data": 4} or "data=4", see `genjax train --mesh`; of recipes.
        init_from: the folder of a run whose parameters this one begins with, where names and
            shapes are the same; of recipes.
        log_to: "wandb", "trackio" or writers of one's own (`runs.writers.Writer`); of recipes.
        settings: any setting of the recipe by its name, as the command line has it:
            `hidden=(64,)`, `learning_rate=1e-3`, or `**{"optimizer.b1": 0.5}`. For a model of one's
            own: batch_size, seed, optimizer (an optax transform), steps_per_call, log, hooks.

    Raises:
        GenjaxError: as the command does.

    Example:
        >>> import genjax, numpy as np
        >>> x = np.random.default_rng(0).normal(size=(100, 3))
        >>> run = genjax.train("vae", x, steps=2, hidden=(4,), latent_dim=2, batch_size=8, say=str)
        >>> run.sample(5).shape
        (5, 3)
    """
    if steps is not None:
        settings["steps"] = steps
    mesh = parse_mesh(mesh) if isinstance(mesh, str) else mesh
    begin = None if init_from is None else Path(init_from)
    if isinstance(what, Model):
        if begin is not None:
            raise ConfigError(
                "init_from is for recipes; a model of one's own begins with what its `init` gives: "
                "model._replace(init=...)."
            )
        if log_to:
            raise ConfigError(
                "log_to is for recipes; a model of one's own takes log=, a function of a line."
            )
        if mesh is not None:
            raise ConfigError(
                "mesh is for recipes; a model of one's own is trained over devices by "
                "shard(training(model, tx), mesh), choose_feed(..., mesh=mesh) and fit."
            )
        takes = inspect.signature(train_own).parameters.values()
        names = [one.name for one in takes if one.kind is one.KEYWORD_ONLY]
        for name in settings:
            if name not in names:
                raise unknown_name("setting of a model of one's own", name, names)
        place = None if out is None else Path(out)
        state, source = train_own(what, data, place, progress, say, **settings)
        return Run(what, eval_params(state), state.state, int(state.step), None, source, place)
    if not isinstance(what, str | Recipe):
        raise ConfigError(
            "train takes a recipe's name, a Recipe or a Model first, and then the data; got a "
            f"{type(what).__name__}."
        )
    recipe, source = _recipe_of(what, data, say)
    recipe = replace(recipe, **settings)
    _check_kept(recipe)
    if out is not None:
        train_in(recipe, Path(out), progress, say, mesh, source, begin, log_to)
        return _with_source(load(out), source)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / recipe.name
        train_in(recipe, folder, progress, say, mesh, source, begin, log_to)
        found = _with_source(load(folder), source)
        found._figures = shown.figures_in(folder)  # of a folder that is gone in a moment
    found.folder = None
    return found


def _check_kept(recipe: Recipe) -> None:
    """Refuse settings that only Python has, such as a network: a run folder could not keep them."""
    for name, value in {**recipe.data_options, **recipe.model}.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{name}: a {type(value).__name__} cannot be written into a run folder. "
                f"Build the model, genjax.{recipe.family.__name__}(source.spec, ...), and train "
                "that: genjax.train(model, source)."
            ) from None


def _with_source(run: Run, source: Source | None) -> Run:
    run._source = source
    return run


def _recipe_of(
    what: str | Recipe, data: Any, say: Callable[[str], None]
) -> tuple[Recipe, Source | None]:
    """The recipe on the data, and their source where it is in memory."""
    if isinstance(what, str):
        if what not in ZOO:
            raise unknown_recipe(what, ZOO)
        what = ZOO[what]
    if data is None:
        return what, None
    if isinstance(data, str | Path):
        return what.on(str(data)), None
    source = source_in(data)
    if what.data_options.get("conditional") and not source.spec.conditional:
        say(
            f"The data have no labels, so {what.name} is trained without a condition: "
            "genjax.from_arrays(x, y) gives them."
        )
        what = replace(what, conditional=False)  # with what only a condition needs
    if source.order is batch_indices and (own := what.apart(())) is not what:
        say(f"The data are no streams, so {what.name} is trained with lanes=0.")
        what = own
    return dataclasses.replace(what, data=MEMORY, data_options={}, loaded_by=None), source
