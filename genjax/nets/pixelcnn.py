"""Convolutional networks over pixels in raster order: what is said of a pixel depends on the pixels
above it and to its left only. van den Oord 2016 (PixelCNN; Gated PixelCNN).

Both are called as net(y [n, H, W, C], cond [n, E] | None, dropped bool [n] | None, key, dropout) ->
[n, H, W, n_outputs], for normalised images y. One pixel at a time, `empty` gives caches of rows and
`look` what is said of the pixel `position`; `seen` puts a pixel into them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from genjax.nets.masked import MaskedConv
from genjax.nets.sequence import dropout
from genjax.protocol import Array, Key, PyTree


def gate(x: Array) -> Array:
    """tanh(a) σ(b) for x = (a, b). van den Oord 2016b, equation 2."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * jax.nn.sigmoid(b)


def pointwise(layer: nnx.Linear, x: Array) -> Array:
    """A dense layer of every pixel, on two axes."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def around(rows: Array, column: Array, width: int) -> Array:
    """The `width` columns around one of [n, R, W, d]; outside is 0."""
    half = width // 2
    padded = jnp.pad(rows, ((0, 0), (0, 0), (half, half), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(padded, column, width, axis=2)


def put(rows: Array, pixel: Array, column: Array) -> Array:
    """Rows [n, R, W, d] with a pixel [n, d] in the last of them."""
    zero = jnp.zeros_like(column)
    start = (zero, zero + (rows.shape[1] - 1), column, zero)
    return jax.lax.dynamic_update_slice(rows, pixel[:, None, None].astype(rows.dtype), start)


def pushed(rows: Array, row: Array | None = None) -> Array:
    """Rows [n, R, W, d] one up, with a new last one [n, W, d], 0 unless given."""
    last = jnp.zeros_like(rows[:, :1]) if row is None else row[:, None].astype(rows.dtype)
    return jnp.concatenate([rows[:, 1:], last], axis=1)


class _Pixels(nnx.Module):
    """What both networks have: images as they look at them, the condition, places, the head."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        d: int,
        n_layers: int,
        n_outputs: int,
        n_added: int,
        cond_size: int,
        guided: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.shape, self.d, self.n_layers, self.guided = shape, d, n_layers, guided
        self.positions = nnx.Param(jnp.zeros((*shape[:2], d)))
        size = cond_size + guided
        added = partial(nnx.Linear, size, n_added, use_bias=False, rngs=rngs)
        self.condition = nnx.List([added() for _ in range(n_layers)]) if cond_size else None
        self.head = nnx.Linear(d, d, rngs=rngs)
        self.readout = nnx.Linear(d, n_outputs, rngs=rngs)

    def _added(self, cond: Array | None, dropped: Array | None) -> list[Array | None]:
        """What the condition adds in each layer, [n, n_added], or None for each. Where it is
        dropped it counts as 0, and a network that knows of it is told so.
        """
        if self.condition is None:
            return [None] * self.n_layers
        c = jnp.asarray(cond)
        kept = jnp.ones(c.shape[:1], c.dtype)
        kept = kept if dropped is None else jnp.where(dropped, 0, kept).astype(c.dtype)
        c = c * kept[:, None]
        c = jnp.concatenate([c, kept[:, None]], axis=-1) if self.guided else c
        return [layer(c) for layer in self.condition]

    def _read(self, h: Array) -> Array:
        h = jax.nn.relu(pointwise(self.head, jax.nn.relu(h)))
        return pointwise(self.readout, h)

    def _place(self, position: Array) -> tuple[Array, Array]:
        width = self.shape[1]
        return position // width, position % width

    def seen(self, carry: PyTree, y: Array, position: Array) -> PyTree:
        """The caches once the pixel `position` is known to be y [n, C]."""
        column = self._place(position)[1]
        return {**carry, "x": put(carry["x"], with_one(y, carry["x"].dtype), column)}


def with_one(y: Array, dtype: Any) -> Array:
    """Pixels [..., C] with a channel of ones, by which they differ from what is outside."""
    y = y.astype(dtype)
    return jnp.concatenate([y, jnp.ones_like(y[..., :1])], axis=-1)


def spread(added: Array | None) -> Array | float:
    """What a condition adds [n, d] for every pixel of [n, H, W, d]."""
    return 0.0 if added is None else added[:, None, None]


class PixelCNN(_Pixels):
    """One stack of masked convolutions: h ← h + W relu(masked convolution(relu(h)) + V c). Its
    pixels do not see some of those above and to the right, the blind spot.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        d: int,
        n_layers: int,
        size: int,
        n_outputs: int,
        cond_size: int = 0,
        guided: bool = False,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(shape, d, n_layers, n_outputs, d, cond_size, guided, rngs)
        self.rows, self.size = size // 2 + 1, size
        window = (self.rows, size)
        self.first = MaskedConv(shape[2] + 1, d, *window, "before", rngs=rngs)
        self.convs = nnx.List(
            [MaskedConv(d, d, *window, "here", rngs=rngs) for _ in range(n_layers)]
        )
        self.outs = nnx.List([nnx.Linear(d, d, rngs=rngs) for _ in range(n_layers)])

    def __call__(
        self,
        y: Array,
        cond: Array | None = None,
        dropped: Array | None = None,
        key: Key | None = None,
        rate: Any = 0.0,
    ) -> Array:
        keys = [None] * self.n_layers if key is None else jax.random.split(key, self.n_layers)
        places = self.positions[...][None]
        h = self.first(with_one(y, places.dtype)) + places
        for conv, out, added, own in zip(
            self.convs, self.outs, self._added(cond, dropped), keys, strict=True
        ):
            new = jax.nn.relu(conv(jax.nn.relu(h)) + spread(added))
            h = h + pointwise(out, dropout(own, new, rate))
        return self._read(h)

    def empty(self, n: int) -> PyTree:
        dtype, width = self.positions[...].dtype, self.shape[1]
        h = [jnp.zeros((n, self.rows, width, self.d), dtype) for _ in range(self.n_layers)]
        return {"x": jnp.zeros((n, self.rows, width, self.shape[2] + 1), dtype), "h": h}

    def look(
        self, carry: PyTree, position: Array, cond: Array | None, dropped: Array | None
    ) -> tuple[Array, PyTree]:
        """Outputs [n, n_outputs] of the pixel `position`, and the caches after it."""
        row, column = self._place(position)
        carry = jax.lax.cond(
            (column == 0) & (row > 0), lambda rows: jax.tree.map(pushed, rows), lambda r: r, carry
        )
        h = self.first.one(around(carry["x"], column, self.size))
        h, kept = h + self.positions[...][row, column][None], []
        for conv, out, added, rows in zip(
            self.convs, self.outs, self._added(cond, dropped), carry["h"], strict=True
        ):
            kept.append(put(rows, jax.nn.relu(h), column))
            new = conv.one(around(kept[-1], column, self.size))
            h = h + out(jax.nn.relu(new if added is None else new + added))
        return self._read(h), {**carry, "h": kept}


class GatedPixelCNN(_Pixels):
    """Two stacks. v sees the rows above, all their columns as layers go; h sees v and the pixels to
    the left in its own row, so that together they see every earlier pixel within reach.

        a = K v + V c,  v ← v + gate(a);   h ← h + W gate(k h + U a + V' c)

    van den Oord 2016b, figure 2; with a residual sum in v, too. Of `size` columns each, and of
    (size + 1) / 2 rows.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        d: int,
        n_layers: int,
        size: int,
        n_outputs: int,
        cond_size: int = 0,
        guided: bool = False,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(shape, d, n_layers, n_outputs, 4 * d, cond_size, guided, rngs)
        self.rows, self.size = size // 2 + 1, size
        c = shape[2] + 1
        self.first_v = MaskedConv(c, d, self.rows, size, "above", rngs=rngs)
        self.first_h = MaskedConv(c, d, 1, size, "before", rngs=rngs)
        layers = range(n_layers)
        self.vertical = nnx.List(
            [MaskedConv(d, 2 * d, self.rows, size, "row", rngs=rngs) for _ in layers]
        )
        self.horizontal = nnx.List(
            [MaskedConv(d, 2 * d, 1, size, "here", rngs=rngs) for _ in layers]
        )
        self.across = nnx.List([nnx.Linear(2 * d, 2 * d, rngs=rngs) for _ in layers])
        self.outs = nnx.List([nnx.Linear(d, d, rngs=rngs) for _ in layers])
        self.between = nnx.Linear(d, d, rngs=rngs)

    def __call__(
        self,
        y: Array,
        cond: Array | None = None,
        dropped: Array | None = None,
        key: Key | None = None,
        rate: Any = 0.0,
    ) -> Array:
        keys = [None] * self.n_layers if key is None else jax.random.split(key, self.n_layers)
        places = self.positions[...][None]
        x = with_one(y, places.dtype)
        v = self.first_v(x) + places
        h = self.first_h(x) + places + pointwise(self.between, v)
        for index, (added, own) in enumerate(zip(self._added(cond, dropped), keys, strict=True)):
            to_v, to_h = _halves(added)
            a = self.vertical[index](v) + spread(to_v)
            b = self.horizontal[index](h) + pointwise(self.across[index], a) + spread(to_h)
            # The last a is all that h still needs of v.
            v = v + gate(a) if index < self.n_layers - 1 else v
            h = h + pointwise(self.outs[index], dropout(own, gate(b), rate))
        return self._read(h)

    def empty(self, n: int) -> PyTree:
        dtype, width, layers = self.positions[...].dtype, self.shape[1], range(self.n_layers)
        return {
            "x": jnp.zeros((n, self.rows, width, self.shape[2] + 1), dtype),
            "v": [jnp.zeros((n, self.rows, width, self.d), dtype) for _ in layers],
            "from_v": [jnp.zeros((n, width, self.d), dtype)]
            + [jnp.zeros((n, width, 2 * self.d), dtype) for _ in layers],
            "h": [jnp.zeros((n, 1, width, self.d), dtype) for _ in layers],
        }

    def _new_row(self, carry: PyTree, row: Array, to_v: list[Array | None]) -> PyTree:
        """The caches at the beginning of a row: all that v has to say of it is known."""
        x = pushed(carry["x"])
        v = self.first_v(x)[:, -1] + self.positions[...][row][None]
        from_v, kept = [pointwise(self.between, v)], []
        for index, added in enumerate(to_v):
            kept.append(pushed(carry["v"][index], v))
            a = self.vertical[index](kept[-1])[:, -1]
            a = a if added is None else a + added[:, None]
            from_v.append(pointwise(self.across[index], a))
            v = v + gate(a)
        h = [jnp.zeros_like(rows) for rows in carry["h"]]
        return {"x": x, "v": kept, "from_v": from_v, "h": h}

    def look(
        self, carry: PyTree, position: Array, cond: Array | None, dropped: Array | None
    ) -> tuple[Array, PyTree]:
        """Outputs [n, n_outputs] of the pixel `position`, and the caches after it."""
        row, column = self._place(position)
        halves = [_halves(added) for added in self._added(cond, dropped)]
        carry = jax.lax.cond(
            column == 0,
            lambda rows: self._new_row(rows, row, [to_v for to_v, _ in halves]),
            lambda rows: rows,
            carry,
        )
        from_v = [values[:, column] for values in carry["from_v"]]
        h = self.first_h.one(around(carry["x"][:, -1:], column, self.size))
        h, kept = h + self.positions[...][row, column][None] + from_v[0], []
        for index, (_, to_h) in enumerate(halves):
            kept.append(put(carry["h"][index], h, column))
            b = self.horizontal[index].one(around(kept[-1], column, self.size))
            b = b + from_v[index + 1]
            h = h + self.outs[index](gate(b if to_h is None else b + to_h))
        return self._read(h), {**carry, "h": kept}


def _halves(added: Array | None) -> tuple[Array | None, Array | None]:
    if added is None:
        return None, None
    first, second = jnp.split(added, 2, axis=-1)
    return first, second
