"""What samples become: arrays, pictures, text, music. And how a model that makes them in many steps
is asked for them.
"""

import csv
import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data import Source, decode, encode_by, midi
from genjax.data.kinds import as_values
from genjax.data.view import View, view_of
from genjax.errors import ConfigError, replacing
from genjax.learning.memory import fetched
from genjax.parts import decoding
from genjax.protocol import Array, Autoregressive, Batch, DataSpec, Key, Model, Params, State
from genjax.runs import pictures
from genjax.runs.pictures import class_name

MIDI_FILES = 8  # at most so many of the samples are written as music

# Which fields of `Decoding` are for what; `guidance` and `prompt` are for some models of each kind.
RULES = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
_IDS = re.compile(r"\s*\d{1,10}\s*(,\s*\d{1,10}\s*)*", re.ASCII)
SOLVING = ("solver", "n_steps", "grid")

# How many samples a picture shows while a run trains; 100 of images and vectors with classes.
SHOWN: dict[View, int] = {"points": 2000, "vectors": 2000, "image": 64, "nothing": 64}
CLASSES_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to make samples where there is a choice: from one step of a sequence to the next, or from
    noise to data.

    What is left out changes nothing. `solver`, `n_steps` and `grid` are for models that go from
    noise to data along a path, all others but `guidance` for those that make a sequence step by
    step.

    Attributes:
        prompt: the text that every sample begins with; token ids, 12,7,3, where the tokens are no
            text.
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
            (`genjax.parts.solvers.SOLVERS`).
        n_steps: how many steps the solver takes.
        grid: where they are: "uniform", "karras", "cosine" or "log_snr"
            (`genjax.parts.solvers.GRIDS`).
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

    def asked(self) -> dict[str, Any]:
        """What was asked for, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def rules(self) -> list[decoding.Rule]:
        """The rules in the order in which they are applied: penalty, temperature, then what cuts
        off.
        """
        asked = self.asked()
        return [getattr(decoding, name)(asked[name]) for name in RULES if name in asked]


# --- what a model can do --------------------------------------------------------------------------


def fields_for(model: Model) -> tuple[str, ...]:
    """The fields of `Decoding` that apply to a model, in their order."""
    fits: set[str] = set()
    if model.denoiser is not None:
        fits |= {*SOLVING, *["guidance"] * model.denoiser.guided}
    elif model.autoregressive is not None:
        fits |= {*["length"] * (not _of_pixels(model.spec))}
        fits |= {*["guidance"] * model.autoregressive.guided}
        if view_of(model.spec) == "text" or _of_ids(model.spec):
            fits.add("prompt")
        # Without `begin`, steps have latent variables, and there are no logits to apply rules to.
        if model.spec.kind == "tokens" and model.autoregressive.begin is not None:
            fits |= {*RULES, "beams"}
    return tuple(field.name for field in dataclasses.fields(Decoding) if field.name in fits)


def shows_means(model: Model) -> bool:
    """Whether there are means of p(x|z), z ~ p(z), to show in the place of samples."""
    return model.latent is not None and model.latent.sample_mean is not None


def has_film(model: Model) -> bool:
    """Whether the way from noise to data of a model can be shown."""
    return model.denoiser is not None and view_of(model.spec) in ("image", "points")


# --- drawing --------------------------------------------------------------------------------------


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
    asked = how.asked()
    if not asked:
        return fetched(jax.jit(model.sample, static_argnums=3)(params, state, key, n, cond))
    if model.denoiser is not None:
        return _solved(model, params, state, key, n, cond, how, every=False)
    if model.autoregressive is None:
        way = (
            "go from noise to data"
            if set(asked) <= set(SOLVING)
            else "make a sequence step by step"
        )
        raise ConfigError(
            f"{as_flags(asked)}: for models that {way}, which this one of {model.spec.name} does "
            "not."
        )
    _check_steps(model, how)
    if how.beams is not None:
        return _beams(model, model.autoregressive, params, state, n, cond, how)
    return _stepwise(model, model.autoregressive, params, state, key, n, cond, how)


def film(
    model: Model, params: Params, state: State, key: Key, n: int, cond: Any, how: Decoding
) -> np.ndarray:
    """The paths of n samples from noise to data, [n_steps + 1, n, *shape] in the units of the data:
    the last is `draw`'s.

    Raises:
        ConfigError: for a model that has no such path, or settings that do not fit it.
    """
    return _solved(model, params, state, key, n, cond, how, every=True)


def as_flags(names: Iterable[str]) -> str:
    """Fields of `Decoding` as they are called on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _solved(
    model: Model,
    params: Params,
    state: State,
    key: Key,
    n: int,
    cond: Any,
    how: Decoding,
    every: bool,
) -> np.ndarray:
    """Samples that go from noise to data; with `every` all that they pass through."""
    if model.denoiser is None:
        raise ConfigError(
            "--film shows the way from noise to data of a diffusion or flow-matching model; this "
            f"one of {model.spec.name} has none."
        )
    asked, takes = how.asked(), (*SOLVING, "guidance")
    if wrong := [name for name in asked if name not in takes]:
        raise ConfigError(
            f"{as_flags(wrong)}: for models that make a sequence step by step; this one of "
            f"{model.spec.name} goes from noise to data and takes {as_flags(takes)}."
        )
    generate = partial(model.denoiser.generate, every=every, **asked)
    return fetched(jax.jit(generate, static_argnums=3)(params, state, key, n, cond))


def _check_steps(model: Model, how: Decoding) -> None:
    """Refuse what does not fit a model that makes a sequence step by step.

    Raises:
        ConfigError: with the flags that do not fit.
    """
    spec, asked, record = model.spec, how.asked(), model.autoregressive
    assert record is not None
    if wrong := [name for name in asked if name in SOLVING]:
        raise ConfigError(
            f"{as_flags(wrong)}: for models that go from noise to data (diffusion, flow matching); "
            f"this one of {spec.name} makes a sequence step by step."
        )
    if how.beams and set(asked) - {"beams", "length"}:
        raise ConfigError(
            f"{as_flags(asked)}: --beams finds the most probable sequences and goes with --length "
            "only."
        )
    of_tokens = [name for name in asked if name in (*RULES, "beams")]
    if of_tokens and spec.kind != "tokens":
        raise ConfigError(
            f"{as_flags(of_tokens)}: rules and beams are for tokens; {spec.name} is {spec.kind}."
        )
    of_logits = [name for name in asked if name in (*RULES, "beams", "guidance")]
    if of_logits and record.begin is None:
        raise ConfigError(
            f"{as_flags(of_logits)}: this model of {spec.name} has latent variables and takes no "
            "rules, no beams and no guidance."
        )
    if how.length is not None and _of_pixels(spec):
        raise ConfigError(
            f"--length: the steps of {spec.name} are the pixels of an image, and a part of one is "
            "no image."
        )
    if how.prompt is not None and view_of(spec) != "text" and not _of_ids(spec):
        raise ConfigError(
            f"--prompt takes text or token ids, and {spec.name} has neither. In Python, "
            "`model.autoregressive.generate` takes any prompt."
        )


def _stepwise(
    model: Model,
    record: Autoregressive,
    params: Params,
    state: State,
    key: Key,
    n: int,
    cond: Any,
    how: Decoding,
) -> np.ndarray:
    """Sequences, an event after the other."""
    spec, rules = model.spec, how.rules()
    options: dict[str, Any] = {"choose": decoding.sampler(*rules)} if rules else {}
    if how.guidance is not None:
        options["guidance"] = how.guidance
    generate = partial(record.generate, n=n, **options)
    given = None if how.prompt is None else _prompt(spec, how.prompt)
    length = how.length or spec.shape[0]
    if given is not None and len(given) > length:
        raise ConfigError(
            f"The prompt has {len(given)} {spec.step}s, and only {length} fit. Shorten it, or give "
            "--length."
        )
    if record.context is not None and length > record.context and _endless_text(spec):
        text = np.zeros((n, 0), np.int32) if given is None else np.tile(given[None], (n, 1))
        window = jax.jit(partial(generate, length=record.context))
        go_on = partial(window, params, state, cond=cond)
        return _beyond(go_on, key, text, record.context, length)
    program = jax.jit(partial(generate, length=how.length))
    if given is None:
        return fetched(program(params, state, key, cond=cond))
    prompt, counts = _padded_prompt(np.tile(given[None], (n, 1)), length)
    return fetched(program(params, state, key, cond=cond, prompt=prompt, prompt_length=counts))


def _of_pixels(spec: DataSpec) -> bool:
    """Whether the steps are the pixels of an image, of which a part is no image."""
    return view_of(spec) == "pixels" or (spec.step is None and len(spec.shape) == 3)


def _of_ids(spec: DataSpec) -> bool:
    """Whether data are sequences of token ids that nothing makes text of."""
    return (
        spec.kind == "tokens" and spec.step is not None and len(spec.shape) == 1 and not spec.text
    )


def _prompt(spec: DataSpec, prompt: str) -> np.ndarray:
    """The tokens of a prompt, int32 [m].

    Raises:
        ConfigError, DataError: for what is no text, or are no ids, of these data.
    """
    if not _of_ids(spec):
        return encode_by(spec, prompt, "the prompt")
    found = [int(one) for one in prompt.split(",")] if _IDS.fullmatch(prompt) else []
    if not found or max(found) > (spec.top or 0):
        raise ConfigError(
            f"--prompt: the {spec.step}s of {spec.name} are no text: give ids from 0 to {spec.top} "
            f"between commas, such as 1,0,1; got {prompt!r:.80}."
        )
    return np.asarray(found, np.int32)


def _padded_prompt(text: np.ndarray, length: int) -> tuple[Array, Array]:
    """Tokens [n, m] as a prompt [n, length], and m: all prompts of a length share one program."""
    whole = np.pad(text, ((0, 0), (0, length - text.shape[1])))
    return jnp.asarray(whole, jnp.int32), jnp.asarray(text.shape[1], jnp.int32)


def _endless_text(spec: DataSpec) -> bool:
    """Whether text is cut out of something longer, so that it can go on."""
    return view_of(spec) == "text" and spec.end is None


def _beyond(
    go_on: Callable[..., Array], key: Key, text: np.ndarray, context: int, length: int
) -> np.ndarray:
    """Texts [n, m] made longer than the context: each window is prompted with the second half of
    what is there, and goes on from it.
    """
    index = 0
    while text.shape[1] < length:
        kept = text if text.shape[1] < context else text[:, text.shape[1] - context // 2 :]
        prompt, counts = _padded_prompt(kept, context)
        new = go_on(jax.random.fold_in(key, index), prompt=prompt, prompt_length=counts)
        text = np.concatenate([text, fetched(new)[:, kept.shape[1] :]], axis=1)
        index += 1
    return text[:, :length]


def _beams(
    model: Model,
    record: Autoregressive,
    params: Params,
    state: State,
    n: int,
    cond: Any,
    how: Decoding,
) -> np.ndarray:
    """The best sequence that a search finds, n times over: once for each condition."""
    begin, further, n_beams = record.begin, record.advance, how.beams or 1
    assert begin is not None  # `_check_steps` has looked
    assert further is not None
    steps, end = how.length or model.spec.shape[0], model.spec.end
    decoding.check_length(steps, record.context)

    @jax.jit
    def search(params: Params, state: State, cond: Any, repeated: Any) -> Array:
        def advance(carry: Any, x: Array) -> tuple[Array, Any]:
            return further(params, state, carry, x, repeated)

        outputs, carry = begin(params, state, n, cond)
        return decoding.beam_search(advance, outputs, carry, n_beams, steps, end=end)[0][:, 0]

    repeated = None if cond is None else np.repeat(cond, n_beams, axis=0)
    return fetched(search(params, state, cond, repeated))


# --- showing --------------------------------------------------------------------------------------


def texts(x: np.ndarray, spec: DataSpec, labels: np.ndarray | None = None) -> list[str]:
    """Samples as text, one string each; behind the name of the class where there are labels."""
    found = [decode(tokens, spec) for tokens in x]
    if labels is None:
        return found
    named = zip(labels, found, strict=True)
    return [f"{class_name(spec, label)}: {text}" for label, text in named]


def true_log_prob(source: Source | None) -> Callable[[np.ndarray], Any] | None:
    """The true density of points in the plane, for pictures."""
    if source is None or source.log_prob is None or view_of(source.spec) != "points":
        return None
    density = source.log_prob
    return lambda x: density(jnp.asarray(x, jnp.float32))


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
    if view_of(spec) == "text":
        path = stem.with_name(stem.name + ".txt")
        separator = "\n" if spec.end is not None else f"\n{'-' * 40}\n"
        with replacing(path) as temporary:
            text = separator.join(texts(x, spec, labels)) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        return [path]
    picture = pictures.samples(x, spec, title, log_prob, labels)
    if picture is None:
        return []
    written = [pictures.save(picture, stem.with_name(stem.name + ".png"))]
    if spec.columns is not None and len(spec.shape) == 1:
        written.append(_table(x, spec, stem.with_name(stem.name + ".csv"), labels))
    return written


def _table(x: np.ndarray, spec: DataSpec, path: Path, labels: np.ndarray | None) -> Path:
    """Write vectors [n, D] as a table with the names of their columns, and of their classes."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(spec.columns or ()), *["class"] * (labels is not None)])
        for index, row in enumerate(as_values(x, spec.values).tolist()):
            named = [] if labels is None else [class_name(spec, labels[index])]
            writer.writerow([*row, *named])
    return path


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
    labels = []
    if spec.n_classes and cond is not None:
        labels = [class_name(spec, label) for label in cond]
    picture = pictures.film(x, spec, title, log_prob, labels)
    return [] if picture is None else [pictures.save(picture, stem.with_name(stem.name + ".png"))]


def play(x: np.ndarray, spec: DataSpec, stem: Path) -> list[Path]:
    """Write piano rolls as MIDI files STEM_0.mid, STEM_1.mid, ... at two frames a second; nothing
    for other data.
    """
    if view_of(spec) != "music":
        return []
    paths = [stem.with_name(f"{stem.name}_{index}.mid") for index in range(min(len(x), MIDI_FILES))]
    for roll, path in zip(x, paths, strict=False):
        midi(roll, path)
    return paths


# --- the picture of a run -------------------------------------------------------------------------


def picture_size(spec: DataSpec) -> int:
    """How many samples a picture of a run shows."""
    view = view_of(spec)
    if view in ("image", "nothing") and spec.n_classes:
        return 100
    return SHOWN.get(view, 16)


def picture_cond(spec: DataSpec, n: int, arrays: Batch | None = None) -> np.ndarray | None:
    """Conditions for a picture of n samples: every class, of the first ten, equally often; or
    vectors of the data.
    """
    if not spec.conditional:
        return None
    if spec.n_classes:
        classes = min(spec.n_classes, CLASSES_SHOWN)
        return np.repeat(np.arange(classes, dtype=np.int32), max(1, n // classes))
    vectors: Any = None if arrays is None else arrays.cond
    return np.resize(np.asarray(vectors, np.float32), (n, spec.cond_dim or 1))


def picture_sampler(model: Model) -> Callable[..., Any]:
    """What a picture shows: the mean of p(x|z) for images where the family has it, as papers do,
    otherwise samples.
    """
    latent = model.latent
    if latent is None or latent.sample_mean is None or view_of(model.spec) != "image":
        return model.sample
    return latent.sample_mean


def picture_title(model: Model) -> str:
    """What such a picture shows, in words."""
    return "samples" if picture_sampler(model) is model.sample else "means of p(x|z), z ~ p(z),"
