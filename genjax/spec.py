"""What data look like: the `DataSpec` that every builder takes and every checkpoint keeps."""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Kind = Literal["binary", "discrete", "continuous", "tokens"]

KINDS: tuple[Kind, ...] = ("binary", "discrete", "continuous", "tokens")


_TUPLES = (
    "vocabulary",
    "class_names",
    "shift",
    "scale",
    "cond_shift",
    "cond_scale",
    "columns",
    "values",
)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a builder must know of its data; it is plain numbers and text, and travels with every
    checkpoint.

    Attributes:
        shape: the event's shape without the batch axis: (8, 8, 1) for an image (height, width,
            channels), (2,) for a point.
        kind: what the values are. `binary`: 0 or 1. `discrete`: whole numbers 0 .. levels-1 with an
            order, such as grey
            levels. `continuous`: real numbers. `tokens`: whole numbers 0 .. levels-1 without an
            order. `batch.x` holds binary, discrete and continuous values as float32 and tokens as
            int32, and `sample` returns the same.
        levels: how many values `discrete` or `tokens` data take (256 for bytes); None for the other
            kinds.
        n_classes: the model is conditional on a label 0 .. n_classes-1, int32 [B]; None if it is
            not.
        cond_dim: the model is conditional on a vector, float32 [B, cond_dim]; None if it is not.
        class_names: what each class is called, for messages and pictures; None calls it by its
            number.
        vocabulary: the symbol of each token, for `tokens` data that are text.
        step: the event is a sequence along its first axis, and this is what one step of it is
            called in reports:
            "character", "frame", "row". None for events that are no sequences.
        end: the token that ends a sequence. What follows it in `batch.x` is padding (more of the
            same token) and counts for nothing; the end token itself counts, so a model of such data
            models how long they are.
        lengths: sequences come with their lengths, `batch.length` int32 [B] from 1 to shape[0];
            steps after that count for
            nothing. Lengths are given, not modelled: for data that have no end token, such as
                music.
        name: what the data are called, for messages and pictures.
        shift, scale: continuous values are (x - shift) / scale to a network: one number, or one
            for each column of the last axis. None takes them as they are. Losses,
            log-probabilities and samples are those of x all the same.
        cond_shift, cond_scale: the same for a condition vector, one number for each entry.
        columns: what the columns of the last axis are called, for pictures and samples.
        tokenizer: for tokens that are pieces of words, in the place of a vocabulary: the JSON of
            the tokenizer that makes text of them.
        values: the two values that binary data have where they come from, if they are others than
            0 and 1, which they are taken as; the smaller first.

    Example:
        >>> from genjax import DataSpec
        >>> DataSpec((8, 8, 1), "discrete", levels=17, n_classes=10).conditional
        True
    """

    shape: tuple[int, ...]
    kind: Kind
    levels: int | None = None
    n_classes: int | None = None
    cond_dim: int | None = None
    class_names: tuple[str, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    step: str | None = None
    end: int | None = None
    lengths: bool = False
    name: str = "data"
    shift: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    cond_shift: tuple[float, ...] | None = None
    cond_scale: tuple[float, ...] | None = None
    columns: tuple[str, ...] | None = None
    tokenizer: str | None = None
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # JSON gives lists back; a spec must stay hashable and equal to the one that was written.
        if not isinstance(self.shape, Iterable):
            raise ValueError(f"DataSpec.shape is a tuple of sizes, such as (3,); got {self.shape}.")
        object.__setattr__(self, "shape", tuple(map(operator.index, self.shape)))
        for name in _TUPLES:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KINDS:
            raise ValueError(f"DataSpec.kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"DataSpec.shape must hold positive sizes; got {self.shape}.")
        whole = self.kind in ("discrete", "tokens")
        if whole and (self.levels is None or self.levels < 2):
            raise ValueError(
                f"{self.kind} data need levels >= 2 (256 for bytes); got levels={self.levels}."
            )
        if not whole and self.levels is not None:
            raise ValueError(
                f"levels is for discrete or token data; got levels={self.levels} with "
                f"kind={self.kind!r}."
            )
        if self.n_classes is not None and self.cond_dim is not None:
            raise ValueError("A condition is a label (n_classes) or a vector (cond_dim), not both.")
        for name in ("n_classes", "cond_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DataSpec.{name} must be at least 1; got {value}.")
        if self.class_names is not None and len(self.class_names) != self.n_classes:
            raise ValueError(
                f"{len(self.class_names)} class_names for n_classes={self.n_classes}: give one "
                "name for each."
            )
        self._check_sequence()
        if self.values is not None and (self.kind != "binary" or not two_values(self.values)):
            raise ValueError(
                "values are two different numbers of binary data, the smaller first; got "
                f"{self.values} with kind={self.kind!r}."
            )
        if self.columns is not None and self.event[-1:] != (len(self.columns),):
            raise ValueError(
                f"{len(self.columns)} names of columns for events of shape {self.event}: give one "
                "for each of the last axis."
            )
        columns = self.event[-1] if self.event else 1
        _check_scale("", self.shift, self.scale, self.kind == "continuous", columns)
        of_vectors = self.cond_dim is not None
        _check_scale("cond_", self.cond_shift, self.cond_scale, of_vectors, self.cond_dim or 1)

    def _check_sequence(self) -> None:
        if self.vocabulary is not None and (
            self.kind != "tokens" or len(self.vocabulary) != self.levels
        ):
            raise ValueError(
                f"A vocabulary names each of the levels of token data; got {len(self.vocabulary)} "
                "symbols with "
                f"kind={self.kind!r}, levels={self.levels}."
            )
        if self.tokenizer is not None and (self.kind != "tokens" or self.vocabulary is not None):
            raise ValueError("A tokenizer is for token data without a vocabulary.")
        if (self.end is not None or self.lengths) and (self.step is None or not self.shape):
            raise ValueError(
                "end and lengths are for sequences: say what a step is called (step='character')."
            )
        if self.end is not None and (
            self.lengths or self.kind != "tokens" or not 0 <= self.end < (self.levels or 0)
        ):
            raise ValueError(
                "end must be a token, 0 <= end < levels, of data without lengths; got "
                f"end={self.end} with "
                f"kind={self.kind!r}, levels={self.levels}, lengths={self.lengths}."
            )

    @property
    def size(self) -> int:
        """The number of dimensions D of one event: the product of `shape`."""
        return math.prod(self.shape)

    @property
    def event(self) -> tuple[int, ...]:
        """The shape of one step of a sequence, and of the whole event for other data."""
        return self.shape if self.step is None else self.shape[1:]

    @property
    def conditional(self) -> bool:
        """Whether a model of these data takes a condition."""
        return self.n_classes is not None or self.cond_dim is not None

    @property
    def cond_size(self) -> int:
        """The length of a condition as a vector (a label counts as one-hot); 0 for an unconditional
        model.
        """
        return self.n_classes or self.cond_dim or 0

    @property
    def text(self) -> bool:
        """Whether events are text: tokens that a vocabulary or a tokenizer makes text of."""
        return self.vocabulary is not None or self.tokenizer is not None

    @property
    def dtype(self) -> Any:
        """The dtype of `batch.x`: int32 for tokens, float32 for all else."""
        return jnp.int32 if self.kind == "tokens" else jnp.float32

    @property
    def top(self) -> int | None:
        """The largest value: 1 of binary data, levels - 1 of discrete data and tokens, or None."""
        if self.kind == "binary":
            return 1
        return None if self.levels is None else self.levels - 1

    def embed(self, cond: Any, params: Any = None) -> jax.Array | None:
        """A condition as vectors [n, cond_size]: labels one-hot, in the dtype of the parameters
        that they meet, vectors standardised where the spec says how, None as it is.
        """
        if cond is None:
            return None
        if self.n_classes is not None:
            return jax.nn.one_hot(cond, self.n_classes, dtype=dtype_of(params))
        return _standardized(cond, self.cond_shift, self.cond_scale)

    def unembedded(self, c: jax.Array) -> jax.Array:
        """The condition that `embed` made these vectors [..., cond_size] of."""
        if self.n_classes is not None:
            return jnp.argmax(c, axis=-1)
        if self.cond_scale is None:
            return c
        return c * _row(self.cond_scale, c) + _row(self.cond_shift, c)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Values as a network wants them: binary and discrete ones mapped linearly to [-1, 1],
        continuous ones standardised where the spec says how. x is [..., *shape], or the steps of a
        sequence [..., *event].
        """
        if self.top is None:
            return _standardized(x, self.shift, self.scale)
        return x * (2 / self.top) - 1

    def denormalize(self, y: jax.Array) -> jax.Array:
        """The inverse of `normalize`, without rounding."""
        if self.top is not None:
            return (y + 1) * (self.top / 2)
        if self.scale is None:
            return y
        return y * _row(self.scale, y) + _row(self.shift, y)

    @property
    def log_volume(self) -> float:
        """ln of the volume that one value of an event has on the normalised scale, so that
        ln p(x) = ln p(normalize(x)) + log_volume: D ln(2 / (levels - 1)) for the levels of binary
        and discrete data, -Σ_d ln scale_d for continuous data. For a sequence it is that of all
        its steps.
        """
        if self.top is not None:
            return self.size * math.log(2 / self.top)
        if self.scale is None:
            return 0.0
        return -self.size * sum(map(math.log, self.scale)) / len(self.scale)


def two_values(values: Any) -> bool:
    """Whether these could be the values of binary data, in their order."""
    return len(values) == 2 and -math.inf < values[0] < values[1] < math.inf


def dtype_of(params: Any) -> Any:
    """The dtype of a tree's first real number, in which a model with these parameters computes;
    that of Python's numbers where there is none.
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
    real = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return (real or [jnp.result_type(float)])[0]


def as_vectors(spec: DataSpec) -> DataSpec:
    """The same events as vectors (size,); a scale of several columns is repeated for all values."""

    def repeated(numbers: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if numbers is None or len(numbers) == 1:
            return numbers
        return numbers * (spec.size // len(numbers))

    return dataclasses.replace(
        spec,
        shape=(spec.size,),
        step=None,
        columns=None,
        shift=repeated(spec.shift),
        scale=repeated(spec.scale),
    )


def _standardized(x: Any, shift: tuple[float, ...] | None, scale: tuple[float, ...] | None) -> Any:
    """(x - shift) / scale; x as it is without them."""
    if scale is None:
        return x
    x = jnp.asarray(x)
    return (x - _row(shift, x)) / _row(scale, x)


def _row(numbers: Any, x: jax.Array) -> jax.Array:
    """Numbers along the last axis of x."""
    return jnp.asarray(numbers, x.dtype).reshape(*[1] * (x.ndim - 1), -1)


def _check_scale(
    prefix: str,
    shift: tuple[float, ...] | None,
    scale: tuple[float, ...] | None,
    fits: bool,
    columns: int,
) -> None:
    """Refuse a shift and scale that are not one pair, or one for each column."""
    if shift is None and scale is None:
        return
    what = f"DataSpec.{prefix}shift and {prefix}scale"
    if not fits:
        wanted = "continuous data" if not prefix else "condition vectors (cond_dim)"
        raise ValueError(f"{what} are for {wanted}.")
    if shift is None or scale is None or len(shift) != len(scale):
        raise ValueError(f"{what} go together and have one length; got {shift} and {scale}.")
    if len(scale) not in (1, columns):
        raise ValueError(f"{what} must have 1 number or {columns}; got {len(scale)}.")
    if not all(map(math.isfinite, (*shift, *scale))) or min(scale) <= 0:
        raise ValueError(f"{what} must be finite, and the scale positive.")
