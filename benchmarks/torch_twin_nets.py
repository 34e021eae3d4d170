"""PyTorch networks of the same architectures as genjax's, for `torch_twins.py`: it imports nothing
of genjax.

Modules and parameters have the names that genjax gives them, so that weights can be carried over.
Images are NCHW, kept channels-last in memory, which is what PyTorch's convolutions on a CPU are
fastest with.
"""

import itertools
import math

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

FREQUENCIES = torch.logspace(math.log2(0.25), math.log2(8.0), 16, base=2.0)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """By the approximation with tanh, which is jax's default."""
    return functional.gelu(x, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, d_in: int, hidden: list[int], d_out: int, activation=gelu) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(a, b) for a, b in itertools.pairwise([d_in, *hidden, d_out])]
        )
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


# --- images ---------------------------------------------------------------------------------------


class ConvEncoder(nn.Module):
    def __init__(self, shape: list[int], channels: list[int], d_out: int) -> None:
        super().__init__()
        sizes, smallest = [shape[2], *channels], [side // 2 ** len(channels) for side in shape[:2]]
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(sizes)])
        self.last = nn.Linear(math.prod(smallest) * sizes[-1], d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = gelu(conv(x))
        return self.last(x.flatten(1))


class ConvDecoder(nn.Module):
    def __init__(self, d_in: int, shape: list[int], channels: list[int]) -> None:
        super().__init__()
        self.start = (channels[0], *(side // 2 ** len(channels) for side in shape[:2]))
        self.first = nn.Linear(d_in, math.prod(self.start))
        self.convs = nn.ModuleList(
            [nn.Conv2d(a, b, 3, 1, 1) for a, b in itertools.pairwise([*channels, shape[2]])]
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.first(z).reshape(-1, *self.start)
        for conv in self.convs:
            x = conv(functional.interpolate(gelu(x), scale_factor=2.0, mode="nearest"))
        return x


class MLPGenerator(nn.Module):
    def __init__(self, d_z: int, shape: list[int], hidden: list[int], bounded: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(a, b) for a, b in itertools.pairwise([d_z, *hidden])]
        )
        self.last = nn.Linear(hidden[-1], math.prod(shape))
        self.bounded = bounded

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            z = functional.relu(layer(z))
        return torch.tanh(self.last(z)) if self.bounded else self.last(z)


class MLPFeatures(nn.Module):
    def __init__(self, shape: list[int], hidden: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(a, b) for a, b in itertools.pairwise([math.prod(shape), *hidden])]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), 0.2)
        return x


class Discriminator(nn.Module):
    def __init__(self, shape: list[int], hidden: list[int], bias: bool) -> None:
        super().__init__()
        self.features = MLPFeatures(shape, hidden)
        self.logit = nn.Linear(hidden[-1], 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logit(self.features(x))[:, 0]


# --- denoising ------------------------------------------------------------------------------------


class Embedding(nn.Module):
    def __init__(self, d: int, n_classes: int | None, guided: bool) -> None:
        super().__init__()
        self.noise, self.last = nn.Linear(32, d), nn.Linear(d, d)
        self.condition = nn.Embedding(n_classes, d) if n_classes else None
        self.dropped = nn.Parameter(torch.zeros(d)) if n_classes and guided else None
        self.register_buffer("frequencies", FREQUENCIES.clone())

    def forward(
        self, level: torch.Tensor, cond: torch.Tensor | None, dropped: torch.Tensor | None
    ) -> torch.Tensor:
        angles = level[:, None] * self.frequencies
        h = self.noise(torch.cat([torch.cos(angles), torch.sin(angles)], 1))
        if self.condition is not None:
            given = self.condition(cond)
            h = h + (
                given if dropped is None else torch.where(dropped[:, None], self.dropped, given)
            )
        return functional.silu(self.last(functional.silu(h)))


class DenoiserMlp(nn.Module):
    def __init__(
        self, shape: list[int], hidden: list[int], n_classes: int | None, guided: bool
    ) -> None:
        super().__init__()
        d, sizes = 128, list(itertools.pairwise([math.prod(shape), *hidden]))
        self.embed = Embedding(d, n_classes, guided)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in sizes])
        self.modulations = nn.ModuleList([nn.Linear(d, 2 * b) for _, b in sizes])
        self.last = nn.Linear(hidden[-1], math.prod(shape))

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, cond=None, dropped=None
    ) -> torch.Tensor:
        e, h = self.embed(level, cond, dropped), x.flatten(1)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            scale, shift = modulation(e).chunk(2, 1)
            y = functional.silu(torch.addcmul(shift, 1 + scale, layer(h)))
            h = h + y if h.shape == y.shape else y
        return self.last(h).view_as(x)


class SelfAttention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


def groups(d: int) -> int:
    return max(g for g in range(1, 33) if d % g == 0 and (g == 1 or d // g >= 4))


class AdaptiveGroupNorm(nn.Module):
    def __init__(self, d: int, d_embed: int) -> None:
        super().__init__()
        self.norm, self.film = nn.GroupNorm(groups(d), d, affine=False), nn.Linear(d_embed, 2 * d)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(e)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift, 1 + scale, self.norm(x))


class ResidualBlock(nn.Module):
    def __init__(self, d_in: int, d_out: int, d_embed: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([AdaptiveGroupNorm(d, d_embed) for d in (d_in, d_out)])
        self.one, self.two = nn.Conv2d(d_in, d_out, 3, 1, 1), nn.Conv2d(d_out, d_out, 3, 1, 1)
        self.short = nn.Conv2d(d_in, d_out, 1) if d_in != d_out else None

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        h = self.one(functional.silu(self.norms[0](x, e)))
        h = self.two(functional.silu(self.norms[1](h, e)))
        return h + (x if self.short is None else self.short(x))


class UNet(nn.Module):
    def __init__(
        self,
        shape: list[int],
        channels: list[int],
        n_classes: int | None,
        guided: bool,
        patch: int,
        blocks: int,
        heads: int,
    ) -> None:
        super().__init__()
        d, colours, last = 4 * channels[0], shape[2] * patch**2, channels[-1]
        pairs = list(itertools.pairwise(channels))

        def row(a: int, b: int) -> nn.ModuleList:
            return nn.ModuleList([ResidualBlock(b if i else a, b, d) for i in range(blocks)])

        self.patch = patch
        self.embed = Embedding(d, n_classes, guided)
        self.first = nn.Conv2d(colours, channels[0], 3, 1, 1)
        self.down = nn.ModuleList([row(a, b) for a, b in [(channels[0], channels[0]), *pairs]])
        self.norm, self.attention = AdaptiveGroupNorm(last, d), SelfAttention(last, heads)
        self.narrow = nn.ModuleList([nn.Conv2d(below, c, 1) for c, below in pairs])
        self.up = nn.ModuleList([row(c, c) for c in channels])
        self.last_norm, self.last = (
            AdaptiveGroupNorm(channels[0], d),
            nn.Conv2d(channels[0], colours, 3, 1, 1),
        )

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, cond=None, dropped=None
    ) -> torch.Tensor:
        e = self.embed(level, cond, dropped)
        x = functional.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        h, skips = self.first(x), []
        for depth, row in enumerate(self.down):
            h = functional.avg_pool2d(h, 2) if depth else h
            for block in row:
                h = block(h, e)
            skips.append(h)
        n, c, height, width = h.shape
        pixels = self.norm(h, e).permute(0, 2, 3, 1).reshape(n, height * width, c)
        h = h + self.attention(pixels).view(n, height, width, c).permute(0, 3, 1, 2)
        for depth in reversed(range(len(skips))):
            if depth < len(skips) - 1:
                h = (
                    functional.interpolate(self.narrow[depth](h), scale_factor=2.0, mode="nearest")
                    + skips[depth]
                )
            for block in self.up[depth]:
                h = block(h, e)
        y = self.last(functional.silu(self.last_norm(h, e)))
        return functional.pixel_shuffle(y, self.patch)


# --- sequences ------------------------------------------------------------------------------------


class Events(nn.Module):
    def __init__(self, levels: int, d: int) -> None:
        super().__init__()
        self.start, self.table = nn.Parameter(0.02 * torch.randn(d)), nn.Embedding(levels, d)
        nn.init.normal_(self.table.weight, 0.0, 0.02)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, context: int, bias: bool) -> None:
        super().__init__()
        self.heads, half = heads, d // heads // 2
        self.norm = nn.LayerNorm(d, bias=bias)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d, bias=bias)
        angles = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", torch.cos(angles).repeat(1, 2))
        # The sign of the first half, so that a turn is x cos + swapped(x) sin.
        self.register_buffer("sin", torch.cat([-torch.sin(angles), torch.sin(angles)], 1))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.addcmul(x * self.cos, torch.cat([b, a], -1), self.sin)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = (
            part.view(n, t, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(d, 2)
        )
        y = functional.scaled_dot_product_attention(
            self.turned(q), self.turned(k), v, is_causal=True
        )
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class FeedForward(nn.Module):
    def __init__(self, d: int, d_hidden: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, bias=bias)
        self.up, self.down = nn.Linear(d, d_hidden, bias=bias), nn.Linear(d_hidden, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gelu(self.up(self.norm(x))))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, context: int, bias: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward = (
            Attention(d, heads, context, bias),
            FeedForward(d, 4 * d, bias),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class JointMLP(nn.Module):
    """An MLP of two inputs, of which the first layer's part for one is computed ahead of time."""

    def __init__(self, d_a: int, d_b: int, width: int, d_out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(d_a, width), nn.Linear(d_b, width, bias=False)
        self.rest = MLP(width, [], d_out)

    def forward(self, first: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.rest(functional.relu(first + self.second(b)))


class GatedCell(nn.Module):
    """A GRU's step for inputs that were projected ahead of time, all steps at once."""

    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.inputs, self.kernel = nn.Linear(d_in, 3 * d), nn.Parameter(torch.empty(3 * d, d))
        self.bias = nn.Parameter(torch.zeros(d))
        nn.init.orthogonal_(self.kernel)

    def forward(self, a: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        d = h.shape[1]
        u = functional.linear(h, self.kernel)
        r, z = torch.sigmoid(a[:, : 2 * d] + u[:, : 2 * d]).chunk(2, 1)
        n = torch.tanh(torch.addcmul(a[:, 2 * d :], r, u[:, 2 * d :] + self.bias))
        return torch.lerp(n, h, z)
