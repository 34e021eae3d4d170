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
from genjax.nets.patches import from_patches
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
        self.positions = nnx.Param(jnp.zeros((*shape[:2], d), jnp.float32))
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
        """Caches of n images of which no pixel is known: 0, for the last rows that a layer sees."""
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

    With `scales` there are so many halvings, each between `n_layers` layers and `n_layers` more, to
    which what was made of the smaller image is added (Salimans 2017, sections 2.3 and 2.4). The
    pixel (I, J) of a smaller image sees what (2I, 2J) of the larger one does, and is seen by that
    and by the other three of its square, which are later: nothing sees itself.
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
        scales: int = 0,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.each, self.scales = n_layers, scales
        layers = range((2 * scales + 1) * n_layers)
        super().__init__(shape, d, len(layers), n_outputs, 4 * d, cond_size, guided, rngs)
        self.rows, self.size = size // 2 + 1, size
        c = shape[2] + 1
        above = partial(MaskedConv, d, rows=self.rows, columns=size, sees="row", rngs=rngs)
        beside = partial(MaskedConv, d, rows=1, columns=size, sees="here", rngs=rngs)
        self.first_v = MaskedConv(c, d, self.rows, size, "above", rngs=rngs)
        self.first_h = MaskedConv(c, d, 1, size, "before", rngs=rngs)
        self.vertical = nnx.List([above(d_out=2 * d) for _ in layers])
        self.horizontal = nnx.List([beside(d_out=2 * d) for _ in layers])
        self.across = nnx.List([nnx.Linear(2 * d, 2 * d, rngs=rngs) for _ in layers])
        self.outs = nnx.List([nnx.Linear(d, d, rngs=rngs) for _ in layers])
        self.between = nnx.Linear(d, d, rngs=rngs)
        halvings = range(scales)
        self.down_v = nnx.List([above(d_out=d) for _ in halvings])
        self.down_h = nnx.List([beside(d_out=d) for _ in halvings])
        self.down_across = nnx.List([nnx.Linear(d, d, rngs=rngs) for _ in halvings])
        self.up_v = nnx.List([nnx.Linear(d, 4 * d, rngs=rngs) for _ in halvings])
        self.up_h = nnx.List([nnx.Linear(d, 4 * d, rngs=rngs) for _ in halvings])

    def _layers(self, scale: int) -> tuple[range, range]:
        """The numbers of the layers of a scale, 0 being the image's own: before and after what is
        made of the smaller image.
        """
        n, last = self.each, 2 * self.scales - scale
        after = range(last * n, (last + 1) * n) if scale < self.scales else range(0)
        return range(scale * n, (scale + 1) * n), after

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
        given = [_halves(added) for added in self._added(cond, dropped)]

        def layer(index: int, v: Array, h: Array) -> tuple[Array, Array]:
            to_v, to_h = given[index]
            a = self.vertical[index](v) + spread(to_v)
            b = self.horizontal[index](h) + pointwise(self.across[index], a) + spread(to_h)
            h = h + pointwise(self.outs[index], dropout(keys[index], gate(b), rate))
            return v + gate(a), h

        def through(scale: int, v: Array, h: Array) -> tuple[Array, Array]:
            before, after = self._layers(scale)
            for index in before:
                v, h = layer(index, v, h)
            if scale < self.scales:
                low_v = self.down_v[scale](v)[:, ::2, ::2]
                low_h = self.down_h[scale](h)[:, ::2, ::2]
                low_h = low_h + pointwise(self.down_across[scale], low_v)
                low_v, low_h = through(scale + 1, low_v, low_h)
                v = v + from_patches(pointwise(self.up_v[scale], low_v), 2)
                h = h + from_patches(pointwise(self.up_h[scale], low_h), 2)
            for index in after:
                v, h = layer(index, v, h)
            return v, h

        return self._read(through(0, v, h)[1])

    # One pixel at a time. A row of v is made when the row begins, a pixel of h when it comes, and
    # those of a smaller image at the first pixel of each of its squares: they are kept until the
    # square has ended.

    def empty(self, n: int) -> PyTree:
        """Caches of n images of which no pixel is known, all 0: of the last `rows` rows of x and v,
        of the row of h, and of what v tells h; for every layer and every halved image.
        """
        dtype, width = self.positions[...].dtype, self.shape[1]
        scales = range(self.scales)
        of_layer = sorted((i, s) for s in range(self.scales + 1) for i in _both(self._layers(s)))

        def zeros(*shape: int, halved: int = 0, d: int = self.d) -> Array:
            return jnp.zeros((n, *shape, width >> halved, d), dtype)

        return {
            "x": zeros(self.rows, d=self.shape[2] + 1),
            "v": [zeros(self.rows, halved=s) for _, s in of_layer],
            "from_v": [zeros()] + [zeros(halved=s, d=2 * self.d) for _, s in of_layer],
            "h": [zeros(1, halved=s) for _, s in of_layer],
            "down_v": [zeros(self.rows, halved=s) for s in scales],
            "down_h": [zeros(1, halved=s) for s in scales],
            "from_down": [zeros(halved=s + 1) for s in scales],
            "low_v": [zeros(halved=s + 1) for s in scales],
            "low_h": [zeros(halved=s + 1) for s in scales],
        }

    def _new_row(self, carry: PyTree, row: Array, to_v: list[Array | None]) -> PyTree:
        """The caches at the beginning of a row: all that v has to say of it is known."""
        carry = {**carry, "x": pushed(carry["x"])}
        v = self.first_v(carry["x"])[:, -1] + self.positions[...][row][None]
        carry["from_v"][0] = pointwise(self.between, v)
        return self._row(0, v, row, carry, to_v)[1]

    def _row(
        self, scale: int, v: Array, row: Array, carry: PyTree, to_v: list[Array | None]
    ) -> tuple[Array, PyTree]:
        """v of a row [n, W, d] after the layers of a scale, and what they keep of it."""

        def layer(index: int, v: Array) -> Array:
            carry["v"][index] = pushed(carry["v"][index], v)
            carry["h"][index] = jnp.zeros_like(carry["h"][index])
            a = self.vertical[index](carry["v"][index])[:, -1]
            added = to_v[index]
            a = a if added is None else a + added[:, None]
            carry["from_v"][index + 1] = pointwise(self.across[index], a)
            return v + gate(a)

        def smaller(carry: PyTree) -> PyTree:
            low = self.down_v[scale](carry["down_v"][scale])[:, -1, ::2]
            carry["from_down"][scale] = pointwise(self.down_across[scale], low)
            low, carry = self._row(scale + 1, low, row // 2, carry, to_v)
            carry["low_v"][scale] = low
            return carry

        before, after = self._layers(scale)
        for index in before:
            v = layer(index, v)
        if scale < self.scales:
            carry["down_v"][scale] = pushed(carry["down_v"][scale], v)
            carry["down_h"][scale] = jnp.zeros_like(carry["down_h"][scale])
            carry = jax.lax.cond(row % 2 == 0, smaller, unchanged, carry)
            up = from_patches(pointwise(self.up_v[scale], carry["low_v"][scale])[:, None], 2)
            v = v + up[:, row % 2]
        for index in after:
            v = layer(index, v)
        return v, carry

    def _pixel(
        self,
        scale: int,
        h: Array,
        place: tuple[Array, Array],
        carry: PyTree,
        to_h: list[Array | None],
    ) -> tuple[Array, PyTree]:
        """h of a pixel [n, d] after the layers of a scale, and what they keep of it."""
        row, column = place

        def layer(index: int, h: Array) -> Array:
            carry["h"][index] = put(carry["h"][index], h, column)
            b = self.horizontal[index].one(around(carry["h"][index], column, self.size))
            b = b + carry["from_v"][index + 1][:, column]
            added = to_h[index]
            b = b if added is None else b + added
            return h + self.outs[index](gate(b))

        def smaller(carry: PyTree) -> PyTree:
            half = (row // 2, column // 2)
            low = self.down_h[scale].one(around(carry["down_h"][scale], column, self.size))
            low = low + carry["from_down"][scale][:, half[1]]
            low, carry = self._pixel(scale + 1, low, half, carry, to_h)
            carry["low_h"][scale] = put(carry["low_h"][scale][:, None], low, half[1])[:, 0]
            return carry

        before, after = self._layers(scale)
        for index in before:
            h = layer(index, h)
        if scale < self.scales:
            carry["down_h"][scale] = put(carry["down_h"][scale], h, column)
            first = (row % 2 == 0) & (column % 2 == 0)
            carry = jax.lax.cond(first, smaller, unchanged, carry)
            up = self.up_h[scale](carry["low_h"][scale][:, column // 2])
            h = h + up.reshape(-1, 2, 2, self.d)[:, row % 2, column % 2]
        for index in after:
            h = layer(index, h)
        return h, carry

    def look(
        self, carry: PyTree, position: Array, cond: Array | None, dropped: Array | None
    ) -> tuple[Array, PyTree]:
        """Outputs [n, n_outputs] of the pixel `position`, and the caches after it."""
        row, column = self._place(position)
        halves = [_halves(added) for added in self._added(cond, dropped)]
        to_v, to_h = ([pair[part] for pair in halves] for part in (0, 1))
        # The branch, and a map of it, have lists of their own to fill.
        carry = jax.lax.cond(
            column == 0, lambda rows: self._new_row(rows, row, to_v), unchanged, carry
        )
        h = self.first_h.one(around(carry["x"][:, -1:], column, self.size))
        h = h + self.positions[...][row, column][None] + carry["from_v"][0][:, column]
        h, carry = self._pixel(0, h, (row, column), carry, to_h)
        return self._read(h), carry


def unchanged(carry: PyTree) -> PyTree:
    """The caches as they are, where `cond` has nothing to compute."""
    return carry


def _both(pair: tuple[range, range]) -> list[int]:
    return [*pair[0], *pair[1]]


def _halves(added: Array | None) -> tuple[Array | None, Array | None]:
    if added is None:
        return None, None
    first, second = jnp.split(added, 2, axis=-1)
    return first, second
