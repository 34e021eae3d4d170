"""What the networks of sequences share: events as vectors, one step late, with a condition beside
them; and dropout.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.errors import ConfigError
from genjax.nets.functional import Net
from genjax.protocol import Array, DataSpec, Key


def dropout(key: Key | None, x: Array, rate: Any) -> Array:
    """x with each value 0 with probability `rate` and the others divided by 1 - rate; x itself
    where key is None.
    """
    if key is None or (isinstance(rate, int | float) and rate == 0):
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def embedding_labels(spec: DataSpec) -> tuple[tuple[str, str], ...]:
    """`Model.labels` of a network with an `EventEmbed`: a table has a row for each token, position
    or class, of which a step sees a few only, so it is no matrix to an optimiser.
    """
    tables = ["table", "positions"]
    if spec.n_classes:
        tables.append("condition/kernel")
    return tuple((f"/{name}$", "embedding") for name in tables)


def check_tied(spec: DataSpec, tied: bool) -> None:
    """Refuse a readout by the embedding's table where there is none.

    Raises:
        ConfigError: with what the data are.
    """
    event = spec.shape[1:]
    if tied and (spec.kind != "tokens" or event):
        raise ConfigError(
            f"tie_weights is for sequences of tokens; {spec.name} has {spec.kind} events of shape "
            f"{event}."
        )


def read(readout: Net, p: Any, h: Array, tied: bool) -> Array:
    """What a readout makes of h, by the table of p's embedding where the two are tied."""
    table = [p["inputs"]["events"]["table"]] if tied else []
    return readout.apply(p["readout"], {}, h, *table)[0]


def blocks_of(p: Any, n_layers: int) -> list[Any]:
    """The parameters of each block, in their order; "10" is the same name as 10."""
    named = {str(index): block for index, block in p["blocks"].items()}
    return [named[str(index)] for index in range(n_layers)]


# What nets call their events in the units of the data, for `functional`: of numbers around 1000,
# bfloat16 has every fourth.
EVENTS = ("x", "last")


class EventEmbed(nnx.Module):
    """The inputs of an autoregressive network: position t gets event t-1 as a vector of d, and
    position 0 a learned start.

    Tokens are rows of a learned table [levels, d]; other events are flattened, normalised and go
    through a dense layer. A condition c [B, E] adds W c at every position. Where it is dropped,
    which is how a model learns to do without it for classifier-free guidance, nothing is added, or
    with `droppable` a learned vector.
    """

    def __init__(self, spec: DataSpec, d: int, droppable: bool = False, *, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.start = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d,), jnp.float32))
        if spec.kind == "tokens":
            self.table = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), (spec.levels or 0, d), jnp.float32)
            )
        else:
            size = spec.size // spec.shape[0]
            self.dense = nnx.Linear(size, d, rngs=rngs)
        if spec.conditional:
            self.condition = nnx.Linear(spec.cond_size, d, use_bias=False, rngs=rngs)
            self.dropped = nnx.Param(jnp.zeros(d, jnp.float32)) if droppable else None

    def embed(self, x: Array) -> Array:
        """Events [..., *event] as vectors [..., d], without start and condition."""
        if self.spec.kind == "tokens":
            return jnp.take(self.table[...], x, axis=0, mode="clip")
        flat = self.spec.normalize(x).reshape(*x.shape[: x.ndim - len(self.spec.shape) + 1], -1)
        flat = flat.astype(self.dense.kernel[...].dtype)  # not before: see `EVENTS`
        return self.dense(flat.reshape(-1, flat.shape[-1])).reshape(*flat.shape[:-1], -1)

    def of_condition(self, n: int, c: Array | None, dropped: Array | None) -> Array:
        """What the condition adds, [n, d]; zeros for an unconditional model. `dropped` is bool [n];
        None drops none.
        """
        if not self.spec.conditional:
            return jnp.zeros((n, self.start[...].shape[0]), self.start[...].dtype)
        given = self.condition(jnp.asarray(c))
        if dropped is None:
            return given
        without = jnp.zeros((), given.dtype) if self.dropped is None else self.dropped[...]
        return jnp.where(dropped[:, None], without.reshape(1, -1), given)

    def initial(self, n: int, c: Array | None, dropped: Array | None = None) -> Array:
        """The input of position 0, [n, d]."""
        return self.start[...][None] + self.of_condition(n, c, dropped)

    def one(self, x: Array, c: Array | None, dropped: Array | None = None) -> Array:
        """The input of the position after event x [n, *event], [n, d]."""
        return self.embed(x) + self.of_condition(x.shape[0], c, dropped)

    def __call__(self, x: Array, c: Array | None, dropped: Array | None = None) -> Array:
        """The inputs of all positions for whole sequences x [B, T, *event], [B, T, d]."""
        start = jnp.broadcast_to(
            self.start[...][None, None], (x.shape[0], 1, self.start[...].shape[0])
        )
        late = jnp.concatenate([start, self.embed(x[:, :-1])], axis=1)
        return late + self.of_condition(x.shape[0], c, dropped)[:, None]
