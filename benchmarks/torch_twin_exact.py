"""Families with exact likelihoods as PyTorch modules, for `torch_twins.py`: a neural spline flow, a
masked autoencoder, a Gated PixelCNN and a minGRU.
"""

import math
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch_twin_nets as nets
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]
from torch_twin_families import Blocks, Noise, Twin

EPSILON = 1e-5  # of a norm

# --- a neural spline flow -------------------------------------------------------------------------

MIN_BIN = MIN_SLOPE = 1e-3


def places(raw: torch.Tensor, bound: float) -> torch.Tensor:
    """Knots between -bound and bound, [..., bins + 1]."""
    share = MIN_BIN + (1 - MIN_BIN * raw.shape[-1]) * torch.softmax(raw, -1)
    inner = 2 * bound * share.cumsum(-1)[..., :-1] - bound
    inner = functional.pad(inner, (1, 0), value=-bound)
    return functional.pad(inner, (0, 1), value=bound)


def spline(x: torch.Tensor, params: torch.Tensor, bins: int, bound: float) -> Any:
    """y and ln dy/dx of a rational-quadratic spline with linear tails. Durkan 2019."""
    widths, heights, slopes = params.split([bins, bins, bins - 1], -1)
    inside, cut = x.abs() < bound, x.clamp(-bound, bound)
    slopes = MIN_SLOPE + functional.softplus(slopes + math.log(math.expm1(1 - MIN_SLOPE)))
    slopes, xs = functional.pad(slopes, (1, 1), value=1.0), places(widths, bound)
    ys = places(heights, bound)
    index = torch.searchsorted(xs[..., 1:-1].contiguous(), cut[..., None], right=True)

    def ends(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return values.gather(-1, index)[..., 0], values.gather(-1, index + 1)[..., 0]

    (x0, x1), (y0, y1), (d0, d1) = ends(xs), ends(ys), ends(slopes)
    width, height = x1 - x0, y1 - y0
    s, share = height / width, (cut - x0) / width
    rest = share * (1 - share)
    below = s + (d0 + d1 - 2 * s) * rest
    y = y0 + height * (s * share.square() + d0 * rest) / below
    above = d1 * share.square() + 2 * s * rest + d0 * (1 - share).square()
    log_slope = 2 * torch.log(s) + torch.log(above) - 2 * torch.log(below)
    return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)


class FlowLayer(nn.Module):
    """Actnorm, the other order, a product L U, and a coupling layer of splines."""

    def __init__(self, d: int, hidden: list[int], bins: int, bound: float) -> None:
        super().__init__()
        self.kept, self.bins, self.bound = d // 2, bins, bound
        self.shift, self.log_scale = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.lower, self.upper = (nn.Parameter(torch.zeros(d, d)) for _ in range(2))
        self.log_diagonal = nn.Parameter(torch.zeros(d))
        self.move = nets.MLP(self.kept, hidden, (d - self.kept) * (3 * bins - 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = ((x - self.shift) * torch.exp(-self.log_scale)).flip(1)
        eye = torch.eye(x.shape[1])
        x = x @ (self.upper.triu(1) + eye * torch.exp(self.log_diagonal)).T
        x = x @ (self.lower.tril(-1) + eye).T
        a, b = x[:, : self.kept], x[:, self.kept :]
        params = self.move(a).view(len(x), b.shape[1], -1)
        b, log_slope = spline(b, params, self.bins, self.bound)
        log_det = (self.log_diagonal - self.log_scale).sum() + log_slope.sum(1)
        return torch.cat([a, b], 1), log_det


class SplineFlow(Twin):
    players = ("flow",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s, d = self.s, math.prod(self.spec.shape)
        asked = (s.structure, s.mix, self.spec.kind)
        assert asked == ("coupling", "linear", "continuous"), asked
        self.layers = nn.ModuleList(
            [FlowLayer(d, s.hidden, s.bins, s.tail_bound) for _ in range(s.n_layers)]
        )

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        z, total = x.flatten(1), 0.0
        for layer in self.layers:
            z, log_det = layer(z)
            total = total + log_det
        nats = total - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return -nats.mean()

    def named(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Layer by layer what genjax keeps in one array of all layers."""
        deepest, found = len(self.s.hidden), {}
        for name, stacked in arrays.items():
            own = name.removeprefix("map/layers/").replace("move/last", f"move/layers/{deepest}")
            if not own.startswith("move"):
                own = own.rpartition("/")[2]
            found |= {f"layers/{index}/{own}": value for index, value in enumerate(stacked)}
        return found


# --- masked networks ------------------------------------------------------------------------------


class MaskedLinear(nn.Linear):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class MADE(Twin):
    players = ("made",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s, size = self.s, math.prod(self.spec.shape)
        asked = (s.order, s.direct, s.activation, self.spec.kind)
        assert asked == ("raster", True, "relu", "binary"), asked
        rank = sees = torch.arange(size)
        layers = []
        for width in s.hidden:
            degree = torch.arange(width) * (size - 1) // width
            layers.append(MaskedLinear(sees[None, :] <= degree[:, None]))
            sees = degree
        self.layers = nn.ModuleList(layers)
        self.last = nn.Parameter(torch.randn(s.hidden[-1], size, 1) / s.hidden[-1] ** 0.5)
        self.direct = nn.Parameter(torch.randn(size, size, 1) / (10 * size) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(size, 1))
        self.register_buffer("of_last", (sees[:, None] < rank[None, :]).float())
        self.register_buffer("of_direct", (rank[:, None] < rank[None, :]).float())

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        x = x.flatten(1)
        y = h = self.normalize(x)
        for layer in self.layers:
            h = functional.relu(layer(h))
        logits = torch.addmm(self.bias[:, 0], h, self.last[..., 0] * self.of_last)
        logits = torch.addmm(logits, y, self.direct[..., 0] * self.of_direct)
        return functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") / self.n


class MaskedConv(nn.Conv2d):
    """A convolution whose windows end with the pixel's own row, of which it sees a part."""

    def __init__(self, d_in: int, d_out: int, rows: int, columns: int, sees: str) -> None:
        super().__init__(d_in, d_out, (rows, columns))
        mask, middle = torch.ones(rows, columns), columns // 2
        seen = {"above": 0, "before": middle, "here": middle + 1, "row": columns}[sees]
        mask[-1, seen:] = 0
        self.whole, self.around = sees == "row", (middle, middle, rows - 1, 0)
        self.register_buffer("mask", mask[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.whole else self.weight * self.mask
        return functional.conv2d(functional.pad(x, self.around), weight, self.bias)


class Pointwise(nn.Linear):
    """A dense layer of every pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight[:, :, None, None], self.bias)


def gate(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class PixelCNN(Twin):
    players = ("pixelcnn",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s, (height, width, colours) = self.s, self.spec.shape
        asked = (s.gated, s.dropout, self.spec.kind, colours)
        assert asked == (True, 0.0, "binary", 1), asked
        d, size, rows = s.channels, s.kernel_size, s.kernel_size // 2 + 1
        self.positions = nn.Parameter(torch.zeros(height, width, d))
        self.first_v = MaskedConv(colours + 1, d, rows, size, "above")
        self.first_h = MaskedConv(colours + 1, d, 1, size, "before")
        layers = range(s.n_layers)
        self.vertical = nn.ModuleList([MaskedConv(d, 2 * d, rows, size, "row") for _ in layers])
        self.horizontal = nn.ModuleList([MaskedConv(d, 2 * d, 1, size, "here") for _ in layers])
        self.across = nn.ModuleList([Pointwise(2 * d, 2 * d) for _ in layers])
        self.outs = nn.ModuleList([Pointwise(d, d) for _ in layers])
        self.between, self.head, self.readout = Pointwise(d, d), Pointwise(d, d), Pointwise(d, 1)

    def loss(
        self, player: str, x: torch.Tensor, cond: torch.Tensor | None, noise: Noise
    ) -> torch.Tensor:
        y, places = self.normalize(x), self.positions.permute(2, 0, 1)[None]
        y = torch.cat([y, torch.ones_like(y[:, :1])], 1)
        v = self.first_v(y) + places
        h = self.first_h(y) + places + self.between(v)
        for index, out in enumerate(self.outs):
            a = self.vertical[index](v)
            b = self.horizontal[index](h) + self.across[index](a)
            v, h = v + gate(a), h + out(gate(b))
        logits = self.readout(functional.relu(self.head(functional.relu(h))))
        return functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") / self.n


# --- a linear recurrent network -------------------------------------------------------------------


class MinGRU(nn.Module):
    """h_t = (1 - z_t) h_{t-1} + z_t v_t with z_t = σ(r_t + timestep), after a short convolution."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.width, self.timestep = width, nn.Parameter(torch.zeros(d))
        self.conv = nn.ParameterDict(
            {"kernel": torch.randn(width, 2 * d), "bias": torch.zeros(2 * d)}
        )

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        kernel = self.conv["kernel"].flip(0).T[:, None]  # its first is of the newest input
        u = functional.pad(u.transpose(1, 2), (self.width - 1, 0))
        u = functional.silu(functional.conv1d(u, kernel, self.conv["bias"], groups=len(kernel)))
        r, v = u.permute(2, 0, 1).chunk(2, 2)  # time first
        z = torch.sigmoid(r + self.timestep)
        h, path = torch.zeros_like(v[0]), []
        for share, value in zip(z.unbind(0), v.unbind(0), strict=True):
            h = torch.lerp(h, value, share)
            path.append(h)
        return torch.stack(path, 1)


class RecurrentBlock(nn.Module):
    def __init__(self, d: int, inner: int, width: int) -> None:
        super().__init__()
        norm, dense = nn.RMSNorm(d, eps=EPSILON), nn.Linear(d, 2 * inner, bias=False)
        self.project = nn.ModuleDict({"norm": norm, "dense": dense})
        self.core = MinGRU(inner, width)
        self.out = nn.ModuleDict({"dense": nn.Linear(inner, d, bias=False)})
        self.feed_forward = nets.FeedForward(d, 4 * d, False)
        self.feed_forward.norm = nn.RMSNorm(d, eps=EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.project["dense"](self.project["norm"](x))
        x = x + self.out["dense"](self.core(u))
        return x + self.feed_forward(x)


class Recurrent(Blocks):
    players = ("ssm",)

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        s = self.s
        asked = (s.cell, s.dropout, s.tie_weights, s.d_hidden)
        assert asked == ("mingru", 0.0, False, None), asked
        d, inner, width = s.d_model, s.d_inner or s.d_model, s.conv or 4
        self.inputs = nn.ModuleDict({"events": nets.Events(self.spec.levels, d)})
        self.blocks = nn.ModuleList([RecurrentBlock(d, inner, width) for _ in range(s.n_layers)])
        norm, dense = nn.RMSNorm(d, eps=EPSILON), nn.Linear(d, self.spec.levels)
        self.readout = nn.ModuleDict({"norm": norm, "dense": dense})


FAMILIES: dict[str, type[Twin]] = {
    "nsf": SplineFlow,
    "made": MADE,
    "pixelcnn": PixelCNN,
    "ssm": Recurrent,
}
