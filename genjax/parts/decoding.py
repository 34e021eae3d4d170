"""From the outputs of an autoregressive model to sequences: rules on logits, generation step by
step, beam search.

A model is seen here as `advance(carry, x_t) -> (outputs, carry)` and what its `begin` gave: the
outputs for the first step and a carry. Every leaf of a carry has the batch as its leading axis, or
is a scalar that all examples share.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from genjax.checks import check_cond, check_key
from genjax.errors import ConfigError
from genjax.parts.guidance import classifier_free
from genjax.protocol import Array, DataSpec, Key, Params, PyTree, State

# (logits [n, V], counts int32 [n, V] of each token so far) -> logits [n, V].
Rule = Callable[[Array, Array], Array]
# (key, outputs [n, n_outputs], counts) -> events x_t [n, *event]. Counts are as above, and 0 where
# events are no tokens.
Choose = Callable[[Key, Array, Array], Array]
# (carry, x_t [n, *event]) -> (outputs [n, n_outputs] for the next step, carry).
Advance = Callable[[Any, Array], tuple[Array, Any]]


def _keep(kept: Array, logits: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)


def _require(valid: Callable[[Any], bool], name: str, wanted: str, value: Any) -> None:
    # A traced number cannot be looked at.
    if isinstance(value, int | float) and not valid(value):
        raise ConfigError(f"{name} must be {wanted}; got {value}.")


def temperature(t: Array | float) -> Rule:
    """logits / t. The number 0 means greedy: the first of the largest logits keeps its value, all
    others become -inf.

    Raises:
        ConfigError: for t below 0.
    """
    _require(lambda t: t >= 0, "The temperature", "0 (greedy) or above", t)
    if isinstance(t, int | float) and t == 0:
        return greedy
    return lambda logits, counts: logits / jnp.asarray(t, logits.dtype)


def greedy(logits: Array, counts: Array) -> Array:
    """The first of the largest logits keeps its value, all others become -inf."""
    return _keep(jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool), logits)


def top_k(k: int) -> Rule:
    """Keeps the k largest logits (of equal ones the first) and makes the others -inf. Fan 2018.

    Raises:
        ConfigError: for k below 1.
    """
    _require(lambda k: k >= 1, "k of top-k", "at least 1", k)

    def rule(logits: Array, counts: Array) -> Array:
        chosen = jax.lax.top_k(logits, min(k, logits.shape[-1]))[1]
        return _keep(
            jnp.put_along_axis(jnp.zeros(logits.shape, bool), chosen, True, axis=-1, inplace=False),
            logits,
        )

    return rule


def top_p(p: Array | float) -> Rule:
    """Keeps the smallest set of most probable tokens whose probabilities add up to p or more.
    Holtzman 2019, equation 3.

    Raises:
        ConfigError: for p outside (0, 1].
    """
    _require(lambda p: 0 < p <= 1, "p of top-p", "in (0, 1]", p)
    if isinstance(p, int | float) and p == 1:
        return lambda logits, counts: logits  # rounding in the sum would cut off the tail

    def rule(logits: Array, counts: Array) -> Array:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most probable token is always in: 0 < p.
        kept = (before < p).at[..., 0].set(True)
        return _keep(
            jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, kept, axis=-1, inplace=False),
            logits,
        )

    return rule


def min_p(p: float) -> Rule:
    """Keeps the tokens that are at least p times as probable as the most probable one. Nguyen 2024.

    Raises:
        ConfigError: for p outside (0, 1].
    """
    _require(lambda p: 0 < p <= 1, "p of min-p", "in (0, 1]", p)
    return lambda logits, counts: _keep(
        logits >= logits.max(-1, keepdims=True) + jnp.log(p).astype(logits.dtype), logits
    )


def repetition_penalty(r: float) -> Rule:
    """Makes tokens that came before less likely: logit / r where it is positive and logit r where
    it is negative.

    Keskar 2019 (CTRL), section 4.1, whose logits are divided whatever their sign, which would
    favour a repetition where they are negative.

    Raises:
        ConfigError: for r not above 0; 1 changes nothing.
    """
    _require(lambda r: r > 0, "The repetition penalty", "above 0", r)

    def rule(logits: Array, counts: Array) -> Array:
        penalised = jnp.where(logits > 0, logits / r, logits * r)
        return jnp.where(counts > 0, penalised, logits)

    return rule


def compose(*rules: Rule) -> Rule:
    """The rules one after the other, the first one first; without any, the logits as they are."""

    def rule(logits: Array, counts: Array) -> Array:
        for one in rules:
            logits = one(logits, counts)
        return logits

    return rule


def sampler(*rules: Rule) -> Choose:
    """Draws tokens int32 [n] from softmax(rules(logits)); for models whose outputs are the logits
    of one token a step.
    """
    rule = compose(*rules)

    def choose(key: Key, logits: Array, counts: Array) -> Array:
        return jax.random.categorical(key, rule(logits, counts)).astype(jnp.int32)

    return choose


# --- generation -----------------------------------------------------------------------------------


def check_length(length: int, context: int | None = None) -> None:
    """Refuse a sequence that the model has no room for.

    Raises:
        ConfigError: with what there is room for.
    """
    if length >= 1 and (context is None or length <= context):
        return
    room = "at least 1" if context is None else f"from 1 to {context}, the model's context"
    raise ConfigError(f"The length must be {room}; got {length}.")


def check_prompt(spec: DataSpec, n: int, prompt: Array) -> None:
    """Refuse a prompt that does not hold events of the data for n sequences.

    Raises:
        ConfigError: with both shapes.
    """
    event = spec.shape[1:]
    fits = prompt.ndim == len(event) + 2 and (prompt.shape[0], *prompt.shape[2:]) == (n, *event)
    if not fits:
        wanted = ", ".join(map(str, (n, "steps", *event)))
        raise ConfigError(f"The prompt must have the shape [{wanted}]; got {list(prompt.shape)}.")


def prompted(
    n: int, n_steps: int, prompt: Array | None, prompt_length: Array | int | None
) -> tuple[Array | None, Array]:
    """The events that a prompt fixes, time first and padded, [n_steps, n, *event], and how many of
    them count, int32 [n]; None and zeros without a prompt.

    Raises:
        ConfigError: for a prompt longer than n_steps, or a prompt_length (where it is no traced
            value) longer than the prompt.
    """
    if prompt is None:
        return None, jnp.zeros(n, jnp.int32)
    whole = prompt.shape[1]
    if whole > n_steps:
        raise ConfigError(
            f"A prompt of {whole} steps does not fit into {n_steps}: shorten it or generate more."
        )
    wanted = f"from 0 to the {whole} steps of the prompt"
    _require(lambda m: 0 <= m <= whole, "prompt_length", wanted, prompt_length)
    counts = jnp.asarray(whole if prompt_length is None else prompt_length, jnp.int32)
    padding = [(0, 0), (0, n_steps - whole)] + [(0, 0)] * (prompt.ndim - 2)
    return jnp.moveaxis(jnp.pad(prompt, padding), 1, 0), jnp.broadcast_to(counts, (n,))


def settled(
    x: Array, given: Array | None, here: Array, ended: Array, end: int | None
) -> tuple[Array, Array]:
    """What becomes of a drawn event x [n, *event]: that of the prompt where it is `given` `here`,
    bool [n], and the end token where a sequence has `ended`; and which sequences have, now.
    """
    if given is not None:
        x = jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), given.astype(x.dtype), x)
    if end is not None:
        x = jnp.where(ended, jnp.asarray(end, x.dtype), x)
        ended = ended | (x == end)
    return x, ended


def generate(
    advance: Advance,
    outputs: Array,
    carry: Any,
    choose: Choose,
    key: Key,
    n_steps: int,
    *,
    prompt: Array | None = None,
    prompt_length: Array | int | None = None,
    end: int | None = None,
) -> Array:
    """Sequences x [n, n_steps, *event], one event after the other: x_t = choose(fold_in(key, t),
    outputs_t, counts_t).

    Args:
        advance: the model from one event to the next outputs.
        outputs: those of the first step, [n, n_outputs].
        carry: the model's, before the first step.
        choose: draws an event: `sampler(...)` for tokens, or (key, outputs, counts) ->
            Emission.sample(key, outputs).
        key: of the whole sequence.
        n_steps: the length of the result, a Python number.
        prompt: [n, at most n_steps, *event]: what the sequences begin with, padded with anything.
        prompt_length: how much of it counts, one number or int [n], by default all. It may be
            traced, so that prompts of any length share one compiled program when they are padded to
            the same shape.
        end: after this token, all is this token.

    Raises:
        ConfigError: for a prompt longer than n_steps, or a prompt_length (where it is no traced
            value) longer than the prompt.
    """
    n = outputs.shape[0]
    given, length = prompted(n, n_steps, prompt, prompt_length)

    def event(
        t: Array | int, fixed: Array | None, outputs: Array, counts: Array, ended: Array
    ) -> tuple[Array, Array, Array]:
        x = choose(jax.random.fold_in(key, t), outputs, counts)
        x, ended = settled(x, fixed, t < length, ended, end)
        if x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.integer):
            counts = counts + jax.nn.one_hot(x, counts.shape[-1], dtype=counts.dtype)
        return x, counts, ended

    def step(loop: Any, at: tuple[Array, Array | None]) -> tuple[Any, Array]:
        carry, x, counts, ended = loop
        outputs, carry = advance(carry, x)
        x, counts, ended = event(*at, outputs, counts, ended)
        return (carry, x, counts, ended), x

    # The first event comes before the loop, so that the model is not advanced past the last one.
    first, rest = (None, None) if given is None else (given[0], given[1:])
    x, counts, ended = event(
        0, first, outputs, jnp.zeros(outputs.shape, jnp.int32), jnp.zeros(n, bool)
    )
    later = jax.lax.scan(
        step, (carry, x, counts, ended), (jnp.arange(1, n_steps, dtype=jnp.int32), rest)
    )[1]
    return jnp.moveaxis(jnp.concatenate([x[None], later]), 0, 1)


def check_guidance(spec: DataSpec, guided: bool) -> None:
    """Refuse guidance of a model that cannot be guided.

    Raises:
        ConfigError: for data without a condition, outputs that are no logits, or a model that
            always had its condition.
    """
    if not spec.conditional or spec.kind == "continuous":
        raise ConfigError(
            f"Guidance needs a condition and logits; the data {spec.name} have not both."
        )
    if not guided:
        raise ConfigError(
            "Guidance needs a model that was trained without its condition at times; this one of "
            f"{spec.name} was not. Build it with cond_dropout=0.1."
        )


def make_generate(
    spec: DataSpec,
    begin: Callable[..., tuple[Array, Any]],
    advance: Callable[..., tuple[Array, Any]],
    sample: Callable[[Key, Array], Array],
    context: int | None = None,
    guided: bool = True,
) -> Callable[..., Array]:
    """The `generate` of an autoregressive family, from its `begin` and `advance`.

    `begin(params, state, n, cond, dropped)` and `advance(params, state, carry, x, cond, dropped)`
    as in `protocol.Autoregressive`, `sample(key, outputs)` as in an Emission; `context` is
    the longest sequence that the model can handle, None for any; `guided` says whether it learned
    to do without its condition.

    Returns generate(params, state, key, n, cond=None, *, choose=None, prompt=None,
    prompt_length=None, length=None, guidance=None) -> x [n, length, *event], `length` being
    spec.shape[0] unless given. Without `choose`, events are drawn from the model. `guidance` is the
    scale of classifier-free guidance of the logits; None, the same as 1, costs half as much.

    Raises:
        ConfigError: for a length or a prompt beyond the context, guidance of a model without a
            condition, of one that never did without it, or of one of continuous data, whose outputs
            are no logits.
    """

    def draw(key: Key, outputs: Array, counts: Array) -> Array:
        return sample(key, outputs)

    def generate_of(
        params: Params,
        state: State,
        key: Key,
        n: int,
        cond: PyTree | None = None,
        *,
        choose: Choose | None = None,
        prompt: Array | None = None,
        prompt_length: Array | int | None = None,
        length: int | None = None,
        guidance: Array | float | None = None,
    ) -> Array:
        check_key(key)
        check_cond(spec, cond, n)
        steps = spec.shape[0] if length is None else length
        check_length(steps, context)
        if prompt is not None:
            prompt = jnp.asarray(prompt)
            check_prompt(spec, n, prompt)
        if guidance is not None:
            check_guidance(spec, guided)
        dropped = jnp.zeros(n, bool)
        outputs, carry = begin(params, state, n, cond, dropped)
        if guidance is not None:
            without, carry_without = begin(params, state, n, cond, ~dropped)
            outputs, carry = classifier_free(outputs, without, guidance), (carry, carry_without)

        def go_on(carry: Any, x: Array) -> tuple[Array, Any]:
            if guidance is None:
                return advance(params, state, carry, x, cond, dropped)
            outputs, given = advance(params, state, carry[0], x, cond, dropped)
            outputs_without, without = advance(params, state, carry[1], x, cond, ~dropped)
            return classifier_free(outputs, outputs_without, guidance), (given, without)

        return generate(
            go_on,
            outputs,
            carry,
            choose or draw,
            key,
            steps,
            prompt=prompt,
            prompt_length=prompt_length,
            end=spec.end,
        )

    return generate_of


# --- beam search ----------------------------------------------------------------------------------


def beam_search(
    advance: Advance,
    outputs: Array,
    carry: Any,
    n_beams: int,
    n_steps: int,
    end: int | None = None,
    length_penalty: float = 0.0,
) -> tuple[Array, Array]:
    """The n_beams best sequences that a search of that width finds: tokens int32 [n, n_beams,
    n_steps] and ln p(tokens).

    At every step the beams with the largest ln p / ((5 + length) / 6)^length_penalty are kept,
    `length` counting the end token (Wu 2016, equation 14, without its coverage). They come best
    first. With n_beams >= V^(n_steps - 1) nothing is cut off before its time, and the search is
    exhaustive; beams beyond the number of sequences have ln p = -inf.

    `outputs` [n, V] are logits and `carry` that of n examples, but `advance` gets n * n_beams of
    them, the beams of one example next to each other: whatever else depends on the example, such as
    a condition, must be repeated (`jnp.repeat`, axis 0).

    Returns:
        tokens int32 [n, n_beams, n_steps], after an end token all end tokens; log_prob [n, n_beams]
        in nats, not penalised.

    Raises:
        ConfigError: for n_beams below 1.
    """
    _require(lambda n: n >= 1, "n_beams", "at least 1", n_beams)
    n, levels = outputs.shape

    def each(leaf: Array) -> Array:
        return leaf if jnp.ndim(leaf) == 0 else jnp.repeat(leaf, n_beams, axis=0)

    outputs, carry = jnp.repeat(outputs, n_beams, axis=0), jax.tree.map(each, carry)
    rows = jnp.arange(n, dtype=jnp.int32)[:, None]

    def extend(beams: Any, outputs: Array, t: Array | int) -> tuple[Any, Array]:
        """The best beams with one token more, and from which of the n * n_beams beams each
        comes.
        """
        tokens, log_prob, length, ended = beams
        step = jax.nn.log_softmax(outputs).reshape(n, n_beams, levels)
        if end is not None:
            free = jnp.where(jnp.arange(levels) == end, 0.0, -jnp.inf).astype(step.dtype)
            step = jnp.where(ended[..., None], free[None, None], step)
        total = log_prob[..., None] + step
        after = length + jnp.where(ended, 0, 1)
        rank = total / (((5 + after) / 6).astype(total.dtype) ** length_penalty)[..., None]
        chosen = jax.lax.top_k(rank.reshape(n, -1), n_beams)[1]
        parent, token = chosen // levels, (chosen % levels).astype(jnp.int32)
        ended = ended[rows, parent] | (False if end is None else token == end)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens[rows, parent], token, t, axis=2)
        beams = (tokens, total.reshape(n, -1)[rows, chosen], after[rows, parent], ended)
        return beams, (parent + rows * n_beams).reshape(-1)

    def step(loop: Any, t: Array) -> tuple[Any, None]:
        beams, carry, parent = loop
        carry = jax.tree.map(lambda leaf: leaf if jnp.ndim(leaf) == 0 else leaf[parent], carry)
        outputs, carry = advance(carry, beams[0][:, :, t - 1].reshape(-1))
        beams, parent = extend(beams, outputs, t)
        return (beams, carry, parent), None

    # All beams of an example are alike at first, so all but one of them are out of the running.
    alone = jnp.where(jnp.arange(n_beams) == 0, 0.0, -jnp.inf).astype(outputs.dtype)
    shape = (n, n_beams)
    empty = (jnp.zeros((*shape, n_steps), jnp.int32), jnp.broadcast_to(alone, shape))
    beams, parent = extend(
        (*empty, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)), outputs, 0
    )
    (beams, _, _), _ = jax.lax.scan(
        step, (beams, carry, parent), jnp.arange(1, n_steps, dtype=jnp.int32)
    )
    return beams[0], beams[1]
