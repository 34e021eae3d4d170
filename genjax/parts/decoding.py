"""From the outputs of an autoregressive model to sequences: rules on logits, generation step by
step, beam search.

A model is seen here as `advance(carry, x_t) -> (outputs, carry)` and what its `begin` gave: the
outputs for the first step and a carry. Every leaf of a carry has the batch as its leading axis, or
is a scalar that all examples share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.checks import check_cond, check_key, check_values, known
from genjax.errors import ConfigError
from genjax.parts.guidance import classifier_free
from genjax.parts.rules import Rule as Rule
from genjax.parts.rules import compose as compose
from genjax.parts.rules import greedy as greedy
from genjax.parts.rules import min_p as min_p
from genjax.parts.rules import repetition_penalty as repetition_penalty
from genjax.parts.rules import require, require_whole, wide
from genjax.parts.rules import temperature as temperature
from genjax.parts.rules import top_k as top_k
from genjax.parts.rules import top_p as top_p
from genjax.protocol import Array, DataSpec, Key, Params, PyTree, State

# (key, outputs [n, n_outputs], counts) -> events x_t [n, *event]. Counts are those of `rules.Rule`,
# int32 [n, V] of each token so far, and 0 where events are no tokens.
Choose = Callable[[Key, Array, Array], Array]
# (carry, x_t [n, *event]) -> (outputs [n, n_outputs] for the next step, carry).
Advance = Callable[[Any, Array], tuple[Array, Any]]


def sampler(*rules: Rule) -> Choose:
    """Draws tokens int32 [n] from softmax(rules(logits)); for models whose outputs are the logits
    of one token a step.
    """
    rule = compose(*rules)

    def choose(key: Key, logits: Array, counts: Array) -> Array:
        return jax.random.categorical(key, rule(logits, counts)).astype(jnp.int32)

    return choose


# --- generation -----------------------------------------------------------------------------------


def check_length(length: Any, context: int | None = None) -> None:
    """Refuse a sequence that the model has no room for.

    Raises:
        ConfigError: with what there is room for.
    """
    whole = isinstance(length, int | np.integer) and not isinstance(length, bool)
    most = 2**31 - 1 if context is None else context
    if whole and 1 <= length <= most:
        return
    room = "at least 1" if whole and length < 1 else "at most 2**31 - 1"
    if context is not None:
        room = f"from 1 to {context}, the model's context"
    raise ConfigError(f"The length must be {room}; got {length}.")


def check_position(position: Any, context: int) -> None:
    """Refuse a position that a model has no room for, where it is known.

    Raises:
        ConfigError: with both numbers.
    """
    at = known(position)
    if at is not None and at >= context:
        raise ConfigError(
            f"Step {int(at) + 1} of a sequence is past the model's context of {context} steps: "
            "begin anew, with the last steps as a prompt."
        )


def in_room(outputs: Array, position: Array, context: int) -> Array:
    """The outputs of a position; NaN for one that the model has no room for. In a trace nobody can
    refuse it, and a table would go on with its last row without a word.
    """
    return jnp.where(position < context, outputs, jnp.nan)


def check_prompt(
    spec: DataSpec, n: int, prompt: Any, prompt_length: Array | int | None = None
) -> None:
    """Refuse a prompt that does not hold events of the data for n sequences, in the steps that
    count.

    Raises:
        ConfigError: with both shapes, or the value that is none of the data's.
    """
    event = spec.shape[1:]
    fits = prompt.ndim == len(event) + 2 and (prompt.shape[0], *prompt.shape[2:]) == (n, *event)
    if not fits:
        wanted = ", ".join(map(str, (n, "steps", *event)))
        raise ConfigError(f"The prompt must have the shape [{wanted}]; got {list(prompt.shape)}.")
    if spec.kind == "tokens" and not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ConfigError(f"The prompt must hold tokens, whole numbers; got {prompt.dtype}.")
    whole = prompt.shape[1]
    length = known(whole if prompt_length is None else prompt_length)
    if length is None:
        return
    kept = np.arange(whole)[None] < np.reshape(length, (-1, 1))
    check_values(spec, prompt, "The prompt", np.broadcast_to(kept, (n, whole)))


def checked_prompt(spec: DataSpec, n: int, prompt: Any, prompt_length: Array | int | None) -> Array:
    """A prompt, an array or lists of numbers, as an array; see `check_prompt`."""
    # Before jax makes int32 of what is larger than that.
    given = prompt if hasattr(prompt, "dtype") else np.asarray(prompt)
    if prompt_length is not None and given.ndim > 1:
        check_prompt_length(prompt_length, n, given.shape[1])
    check_prompt(spec, n, given, prompt_length)
    return jnp.asarray(given)


def prompted(
    n: int, n_steps: int, prompt: Array | None, prompt_length: Array | int | None
) -> tuple[Array | None, Array]:
    """The events that a prompt fixes, time first and padded, [n_steps, n, *event], and how many of
    them count, int32 [n]; None and zeros without a prompt.

    Raises:
        ConfigError: for a prompt longer than n_steps, or a prompt_length (where it is no traced
            value) longer than the prompt, or not one number or one for each sequence.
    """
    if prompt is None:
        return None, jnp.zeros(n, jnp.int32)
    whole = prompt.shape[1]
    if whole > n_steps:
        raise ConfigError(
            f"A prompt of {whole} steps does not fit into {n_steps}: shorten it or generate more."
        )
    length = whole if prompt_length is None else prompt_length
    check_prompt_length(length, n, whole)
    counts = jnp.asarray(length, jnp.int32)
    padding = [(0, 0), (0, n_steps - whole)] + [(0, 0)] * (prompt.ndim - 2)
    return jnp.moveaxis(jnp.pad(prompt, padding), 1, 0), jnp.broadcast_to(counts, (n,))


def check_prompt_length(length: Any, n: int, whole: int) -> None:
    """Refuse lengths of prompts that are none.

    Raises:
        ConfigError: for another shape than [] or [n], or one outside of the prompt.
    """
    if jnp.shape(length) not in ((), (n,)):
        raise ConfigError(
            f"prompt_length must be one number or {n}; got shape {list(jnp.shape(length))}."
        )
    wanted = f"from 0 to the {whole} steps of the prompt"
    require(lambda m: (m >= 0) & (m <= whole) & (m == np.floor(m)), "prompt_length", wanted, length)


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
            prompt = checked_prompt(spec, n, prompt, prompt_length)
        if guidance is not None:
            check_guidance(spec, guided)
            require(np.isfinite, "guidance", "a finite number", guidance)
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


class _Beams(NamedTuple):
    """Sequences that a search keeps of each example, best first.

    Attributes:
        tokens: int32 [n, n_beams, n_steps].
        log_prob: ln p(tokens) [n, n_beams]; -inf where there is no such sequence.
        length: how many of the tokens count, int32 [n, n_beams].
    """

    tokens: Array
    log_prob: Array
    length: Array


def _best(beams: _Beams, k: int, penalty: Array | float) -> _Beams:
    """The k best of some sequences, of equal ones the first."""
    over = ((5 + beams.length) / 6).astype(beams.log_prob.dtype)
    rank = beams.log_prob / over ** jnp.asarray(penalty, over.dtype)
    # What does not exist stays last, whatever a penalty makes of an infinity.
    rank = jnp.where(jnp.isneginf(beams.log_prob), -jnp.inf, rank)
    chosen = jax.lax.top_k(rank, k)[1]
    rows = jnp.arange(len(chosen), dtype=chosen.dtype)[:, None]
    return jax.tree.map(lambda leaf: leaf[rows, chosen], beams)


def beam_search(
    advance: Advance,
    outputs: Array,
    carry: Any,
    n_beams: int,
    n_steps: int,
    end: int | None = None,
    length_penalty: Array | float = 0.0,
) -> tuple[Array, Array]:
    """The n_beams best sequences that a search of that width finds, best first: tokens int32 [n,
    n_beams, n_steps] and ln p(tokens).

    The best are those with the largest ln p / ((5 + length) / 6)^length_penalty, `length` counting
    the end token (Wu 2016, equation 14, without its coverage). At every step the n_beams best
    sequences that have not ended are kept, and apart from them the n_beams best of all that have:
    one that ended never makes way for one that goes on, nor the other way round. What is returned
    is the best of both after n_steps. With n_beams >= V^(n_steps - 1) nothing is cut off before its
    time, and the search is exhaustive; beams beyond the number of sequences have ln p = -inf.

    `outputs` [n, V] are logits and `carry` that of n examples, but `advance` gets n * n_beams of
    them, the beams of one example next to each other: whatever else depends on the example, such as
    a condition, must be repeated (`jnp.repeat`, axis 0).

    Returns:
        tokens int32 [n, n_beams, n_steps], after an end token all end tokens; log_prob [n, n_beams]
        in nats, not penalised.

    Raises:
        ConfigError: for n_beams or n_steps below 1, an end that is no token, or a penalty that is
            not finite.
    """
    n, levels = outputs.shape
    require_whole("n_beams", n_beams)
    fits = f"below 2**31 / {n * levels}, as all beams of all examples are counted in int32"
    require(lambda k: k * n * levels < 2**31, "n_beams", fits, n_beams)
    check_length(n_steps)
    if end is not None:
        require(lambda e: (e >= 0) & (e < levels), "end", f"a token, 0 to {levels - 1}", end)
    require(np.isfinite, "length_penalty", "finite", length_penalty)

    def each(leaf: Array) -> Array:
        return leaf if jnp.ndim(leaf) == 0 else jnp.repeat(leaf, n_beams, axis=0)

    outputs, carry = jnp.repeat(outputs, n_beams, axis=0), jax.tree.map(each, carry)
    rows = jnp.arange(n, dtype=jnp.int32)[:, None]
    dtype = wide(outputs).dtype
    ends = jnp.zeros(levels, bool) if end is None else jnp.arange(levels) == end

    def extend(
        live: _Beams, ended: _Beams, outputs: Array, t: Array | int
    ) -> tuple[_Beams, _Beams, Array]:
        """The best with one token more, those that go on and those that ended; and from which of
        the n * n_beams beams each of the first comes.
        """
        step = jax.nn.log_softmax(wide(outputs)).reshape(n, n_beams, levels)
        total = live.log_prob[..., None] + step
        going = jnp.where(ends[None, None], -jnp.inf, total).reshape(n, -1)
        chosen = jax.lax.top_k(going, n_beams)[1]  # all of one length, so of one penalty
        parent, token = chosen // levels, (chosen % levels).astype(jnp.int32)
        longer = jax.lax.dynamic_update_index_in_dim(live.tokens[rows, parent], token, t, axis=2)
        new = _Beams(longer, going[rows, chosen], live.length + 1)
        if end is not None:
            tokens = live.tokens.at[:, :, t].set(end)
            just = _Beams(tokens, total[..., end], live.length + 1)
            both = jax.tree.map(lambda *two: jnp.concatenate(two, axis=1), ended, just)
            ended = _best(both, n_beams, length_penalty)
        return new, ended, (parent + rows * n_beams).reshape(-1)

    def step(loop: Any, t: Array) -> tuple[Any, None]:
        live, ended, carry, parent = loop
        carry = jax.tree.map(lambda leaf: leaf if jnp.ndim(leaf) == 0 else leaf[parent], carry)
        outputs, carry = advance(carry, live.tokens[:, :, t - 1].reshape(-1))
        live, ended, parent = extend(live, ended, outputs, t)
        return (live, ended, carry, parent), None

    # All beams of an example are alike at first, so all but one of them are out of the running.
    alone = jnp.where(jnp.arange(n_beams) == 0, 0.0, -jnp.inf).astype(dtype)
    shape, nothing = (n, n_beams), jnp.zeros((n, n_beams, n_steps), jnp.int32)
    none = jnp.full(shape, -jnp.inf, dtype)
    live = _Beams(nothing, jnp.broadcast_to(alone, shape), jnp.zeros(shape, jnp.int32))
    ended = _Beams(nothing, none, jnp.ones(shape, jnp.int32))
    live, ended, parent = extend(live, ended, outputs, 0)
    (live, ended, _, _), _ = jax.lax.scan(
        step, (live, ended, carry, parent), jnp.arange(1, n_steps, dtype=jnp.int32)
    )
    both = jax.tree.map(lambda *two: jnp.concatenate(two, axis=1), ended, live)
    found = _best(both, n_beams, length_penalty)
    if end is None:
        return found.tokens, found.log_prob
    over = jnp.cumsum(found.tokens == end, axis=-1) > 0
    return jnp.where(over, jnp.int32(end), found.tokens), found.log_prob
