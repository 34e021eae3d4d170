"""What samples become: arrays, pictures, text, music. And how a model that makes them in many steps
is asked for them.
"""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data import Source, decode, encode, midi
from genjax.errors import ConfigError, replacing
from genjax.parts import decoding
from genjax.protocol import Batch, DataSpec, Key, Model, Params, State
from genjax.runs import pictures

MIDI_FILES = 8  # at most so many of the samples are written as music
SOLVING = (
    "solver",
    "n_steps",
    "grid",
)  # the settings of models that go from noise to data, with `guidance`


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to make samples where there is a choice: from one step of a sequence to the next, or from
    noise to data.

    What is left out changes nothing. `solver`, `n_steps` and `grid` are for models that go from
    noise to data along a path, all others but `guidance` for those that make a sequence step by
    step.

    Attributes:
        prompt: the text that every sample begins with.
        temperature: divides the logits; 0 always takes the most probable token.
        top_k: keep the k most probable tokens.
        top_p: keep the smallest set of tokens with at least this probability.
        min_p: keep tokens that are at least this many times as probable as the most probable one.
        repetition_penalty: above 1 makes tokens that came before less likely.
        guidance: scale of classifier-free guidance towards the condition; 1 is the conditional
            model, 0 ignores the condition.
        beams: search for the most probable sequences with so many beams, and show the best one.
        length: how many steps to sample; those of the training data unless given.
        solver: how to go from noise to data: "heun", "ddim", "ancestral", ...
            (`genjax.solvers.SOLVERS`).
        n_steps: how many steps the solver takes.
        grid: where they are: "uniform", "karras", "cosine" or "log_snr" (`genjax.solvers.GRIDS`).
    """

    prompt: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    guidance: float | None = None
    beams: int | None = None
    length: int | None = None
    solver: str | None = None
    n_steps: int | None = None
    grid: str | None = None

    def rules(self) -> list[decoding.Rule]:
        """The rules in the order in which they are applied: penalty, temperature, then what cuts
        off.
        """
        makers = {
            "repetition_penalty": decoding.repetition_penalty,
            "temperature": decoding.temperature,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "min_p": decoding.min_p,
        }
        return [
            make(getattr(self, name))
            for name, make in makers.items()
            if getattr(self, name) is not None
        ]


def draw(
    model: Model, params: Params, state: State, key: Key, n: int, cond: Any, how: Decoding
) -> np.ndarray:
    """n samples of a model, made as `how` says: [n, *shape], or sequences [n, length, *event].

    Beyond the context of a model that has one, a text goes on from its own second half, a window at
    a time.

    Raises:
        ConfigError, DataError: for settings that do not fit the model, or a prompt with a character
            that it does not know.
    """
    spec = model.spec
    asked = [f.name for f in dataclasses.fields(how) if getattr(how, f.name) is not None]
    if not asked:
        return np.asarray(jax.jit(model.sample, static_argnums=3)(params, state, key, n, cond))
    flags = _flags(asked)
    generate = model.extras.get("generate")
    if generate is None:
        raise ConfigError(
            f"{flags}: for models that make samples step by step, which this one of {spec.name} is "
            "not."
        )
    if _solves(model):
        solving = _solving(model, asked, how)
        return np.asarray(
            jax.jit(lambda key, cond: generate(params, state, key, n, cond, **solving))(key, cond)
        )
    if wrong := [name for name in asked if name in SOLVING]:
        raise ConfigError(
            f"{_flags(wrong)}: for models that go from noise to data (diffusion, flow matching); "
            f"this one of {spec.name} makes "
            "a sequence step by step."
        )
    rules = how.rules()
    if (rules or how.beams) and spec.kind != "tokens":
        raise ConfigError(f"{flags}: rules and beams are for tokens; {spec.name} is {spec.kind}.")
    if how.prompt is not None and not spec.text:
        raise ConfigError(
            f"--prompt takes text, which {spec.name} is not. In Python, `extras['generate']` takes "
            "any prompt."
        )
    given = None if how.prompt is None else encode(how.prompt, spec.vocabulary or (), "the prompt")
    if how.beams is not None:
        if [name for name in asked if name not in ("beams", "length")]:
            raise ConfigError(
                f"{flags}: --beams finds the most probable sequences and goes with --length only."
            )
        return _beams(model, params, state, n, cond, how)
    options: dict[str, Any] = {"choose": decoding.sampler(*rules)} if rules else {}
    options |= {} if how.guidance is None else {"guidance": how.guidance}
    lacking = set(options) - set(inspect.signature(generate).parameters)
    if lacking:
        raise ConfigError(
            f"{flags}: this model of {spec.name} has latent variables and takes no rules and no "
            "guidance."
        )
    length = how.length or spec.shape[0]
    if length > spec.shape[0] and spec.text and spec.end is None:
        try:
            jax.eval_shape(lambda key: generate(params, state, key, n, cond, length=length), key)
        except ConfigError:  # a model with a context
            return _beyond(model, params, state, key, n, cond, given, length, options)
    options["length"] = how.length
    if given is None:
        go = jax.jit(lambda key, cond: generate(params, state, key, n, cond, **options))
        return np.asarray(go(key, cond))
    if len(given) > length:
        raise ConfigError(
            f"The prompt has {len(given)} {spec.step}s, and only {length} fit. Shorten it, or give "
            "--length."
        )
    prompt = np.zeros((n, length), np.int32)
    prompt[:, : len(given)] = given

    def prompted(key: Key, prompt: Any, m: Any, cond: Any) -> Any:
        return generate(params, state, key, n, cond, prompt=prompt, prompt_length=m, **options)

    return np.asarray(
        jax.jit(prompted)(key, jnp.asarray(prompt), jnp.asarray(len(given), jnp.int32), cond)
    )


def film(
    model: Model, params: Params, state: State, key: Key, n: int, cond: Any, how: Decoding
) -> np.ndarray:
    """The paths of n samples from noise to data, [n_steps + 1, n, *shape] in the units of the data:
    the last is `draw`'s.

    Raises:
        ConfigError: for a model that has no such path, or settings that do not fit it.
    """
    if not _solves(model):
        raise ConfigError(
            "--film shows the way from noise to data of a diffusion or flow-matching model; this "
            "one of "
            f"{model.spec.name} has none."
        )
    asked = [f.name for f in dataclasses.fields(how) if getattr(how, f.name) is not None]
    options, generate = _solving(model, asked, how), model.extras["generate"]
    return np.asarray(
        jax.jit(lambda key, cond: generate(params, state, key, n, cond, every=True, **options))(
            key, cond
        )
    )


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _solves(model: Model) -> bool:
    """Whether a model goes from noise to data by a solver."""
    generate = model.extras.get("generate")
    return generate is not None and "solver" in inspect.signature(generate).parameters


def _solving(model: Model, asked: list[str], how: Decoding) -> dict[str, Any]:
    """What was asked of a model that goes from noise to data, as arguments of its `generate`."""
    takes = (*SOLVING, "guidance")
    if wrong := [name for name in asked if name not in takes]:
        raise ConfigError(
            f"{_flags(wrong)}: for models that make a sequence step by step; this one of "
            f"{model.spec.name} goes from noise "
            f"to data and takes {_flags(list(takes))}."
        )
    return {name: getattr(how, name) for name in asked}


def _beyond(
    model: Model,
    params: Params,
    state: State,
    key: Key,
    n: int,
    cond: Any,
    given: np.ndarray | None,
    length: int,
    options: dict[str, Any],
) -> np.ndarray:
    """A text longer than the context: each window is prompted with the second half of what is
    there, and goes on from it.
    """
    context = model.spec.shape[0]
    text = np.zeros((n, 0), np.int32) if given is None else np.tile(given[None], (n, 1))

    @jax.jit
    def window(key: Key, prompt: Any, m: Any) -> Any:
        return model.extras["generate"](
            params, state, key, n, cond, prompt=prompt, prompt_length=m, **options
        )

    index = 0
    while text.shape[1] < length:
        kept = text if text.shape[1] < context else text[:, -(context // 2) :]
        prompt = np.zeros((n, context), np.int32)
        prompt[:, : kept.shape[1]] = kept
        new = window(
            jax.random.fold_in(key, index),
            jnp.asarray(prompt),
            jnp.asarray(kept.shape[1], jnp.int32),
        )
        text = np.concatenate([text, np.asarray(new)[:, kept.shape[1] :]], axis=1)
        index += 1
    return text[:, :length]


def _beams(
    model: Model, params: Params, state: State, n: int, cond: Any, how: Decoding
) -> np.ndarray:
    repeated = None if cond is None else np.repeat(cond, how.beams or 1, axis=0)

    @jax.jit
    def search() -> Any:
        outputs, carry = model.extras["begin"](params, state, n, cond)
        advance = lambda carry, x: model.extras["advance"](params, state, carry, x, repeated)  # noqa: E731
        steps = how.length or model.spec.shape[0]
        return decoding.beam_search(
            advance, outputs, carry, how.beams or 1, steps, end=model.spec.end
        )[0][:, 0]

    return np.asarray(search())


def texts(x: np.ndarray, spec: DataSpec, labels: np.ndarray | None = None) -> list[str]:
    """Samples as text, one string each; behind the name of the class where there are labels."""
    found = [decode(tokens, spec) for tokens in x]
    return (
        found
        if labels is None
        else [f"{class_name(spec, c)}: {one}" for c, one in zip(labels, found, strict=True)]
    )


def class_name(spec: DataSpec, label: int) -> str:
    """What a class is called."""
    return spec.class_names[int(label)] if spec.class_names is not None else str(int(label))


def is_music(spec: DataSpec) -> bool:
    """Whether events are piano rolls of 88 keys."""
    return spec.kind == "binary" and len(spec.shape) == 2 and spec.shape[1] == 88


def true_log_prob(source: Source | None) -> Callable[[np.ndarray], Any] | None:
    """The true density of points in the plane, for pictures."""
    if source is None or source.log_prob is None or source.spec.shape != (2,):
        return None
    return lambda x: source.log_prob(jnp.asarray(x, jnp.float32))  # type: ignore[misc]


def show(
    x: np.ndarray,
    spec: DataSpec,
    stem: Path,
    title: str,
    log_prob: Callable[[np.ndarray], Any] | None = None,
    cond: np.ndarray | None = None,
) -> list[Path]:
    """Write samples as what a person can look at: STEM.png, or STEM.txt for text. The files
    written; none for other data.

    Raises:
        CheckpointError: if the disk does not take it.
    """
    labels = cond if spec.n_classes else None
    if spec.text:
        path = stem.with_name(stem.name + ".txt")
        separator = "\n" if spec.end is not None else f"\n{'-' * 40}\n"
        with replacing(path) as temporary:
            temporary.write_text(separator.join(texts(x, spec, labels)) + "\n")
        return [path]
    figure = pictures.samples(x, spec, title, log_prob, labels)
    return [] if figure is None else [pictures.save(figure, stem.with_name(stem.name + ".png"))]


def show_film(
    x: np.ndarray,
    spec: DataSpec,
    stem: Path,
    title: str,
    log_prob: Callable[[np.ndarray], Any] | None = None,
    cond: np.ndarray | None = None,
) -> list[Path]:
    """Write paths [n_steps + 1, n, *shape] from noise to data as STEM.png; nothing for data other
    than images and points.

    Raises:
        CheckpointError: if the disk does not take it.
    """
    labels = (
        [class_name(spec, label) for label in cond] if spec.n_classes and cond is not None else []
    )
    figure = pictures.film(x, spec, title, log_prob, labels)
    return [] if figure is None else [pictures.save(figure, stem.with_name(stem.name + ".png"))]


def play(x: np.ndarray, spec: DataSpec, stem: Path) -> list[Path]:
    """Write piano rolls as MIDI files STEM_0.mid, STEM_1.mid, ... at two frames a second; nothing
    for other data.
    """
    if not is_music(spec):
        return []
    paths = [stem.with_name(f"{stem.name}_{index}.mid") for index in range(min(len(x), MIDI_FILES))]
    for roll, path in zip(x, paths, strict=False):
        midi(roll, path)
    return paths


def picture_cond(spec: Any, n: int, arrays: Batch | None = None) -> np.ndarray | None:
    """Conditions for a picture of n samples: every class equally often, or vectors of the data."""
    if not spec.conditional:
        return None
    if spec.n_classes:
        per = max(1, n // spec.n_classes)
        return np.repeat(np.arange(spec.n_classes, dtype=np.int32), per)
    vectors: Any = None if arrays is None else arrays.cond
    return np.resize(np.asarray(vectors, np.float32), (n, spec.cond_dim))


def picture_sampler(model: Model) -> Callable[..., Any]:
    """What a picture shows: the mean of p(x|z) for images where the family has it, as papers do,
    otherwise samples.
    """
    latent = model.latent
    if latent is None or latent.sample_mean is None or not shows_means(model):
        return model.sample
    return latent.sample_mean


def picture_title(model: Model) -> str:
    """What such a picture shows, in words."""
    return "means of p(x|z), z ~ p(z)," if shows_means(model) else "samples"


def shows_means(model: Model) -> bool:
    has = model.latent is not None and model.latent.sample_mean is not None
    return has and pictures.is_image(model.spec)
