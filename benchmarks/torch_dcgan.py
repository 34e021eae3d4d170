"""A PyTorch twin of the recipe `dcgan-mnist`, run by an interpreter of its own: it imports nothing
of genjax.

    python torch_dcgan.py IMAGES.npz OUT.npz --steps 6000 --batch 64 --seed 0 --n 10000

The same layers, initial distributions, losses, optimiser, moving average and number of steps as the
recipe's; PyTorch's own order of the data. Writes `x` (uint8 grey levels [n, 28, 28, 1]), the
seconds of training, and the numbers of parameters.
"""

import argparse
import copy
import itertools
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]


class Generator(nn.Module):
    def __init__(self, d_z: int, channels: tuple[int, ...], side: int) -> None:
        super().__init__()
        wide = channels[::-1]
        self.start = (wide[0], side // 2 ** len(wide), side // 2 ** len(wide))
        self.first = nn.Linear(d_z, int(np.prod(self.start)))
        sizes = [*wide, 1]
        self.norms = nn.ModuleList([nn.BatchNorm2d(d, momentum=0.01) for d in wide])
        self.convs = nn.ModuleList(
            [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=b == 1) for a, b in itertools.pairwise(sizes)]
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.first(z).reshape(-1, *self.start)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(functional.relu(norm(x)))
        return torch.tanh(x)


class Discriminator(nn.Module):
    def __init__(self, channels: tuple[int, ...], side: int) -> None:
        super().__init__()
        sizes = [1, *channels]
        self.convs = nn.ModuleList(
            [nn.Conv2d(a, b, 4, 2, 1, bias=a == 1) for a, b in itertools.pairwise(sizes)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(d, momentum=0.01) for d in channels[1:]])
        self.logit = nn.Linear(channels[-1] * (side // 2 ** len(channels)) ** 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, conv in enumerate(self.convs):
            x = conv(x)
            x = functional.leaky_relu(self.norms[index - 1](x) if index else x, 0.2)
        return self.logit(x.flatten(1))[:, 0]


def initialise(module: nn.Module) -> None:
    """Normal kernels with sd 0.02, the last layer with 1/sqrt(inputs), and biases of 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            narrow = not (isinstance(layer, nn.Linear) and layer.out_features == 1)
            nn.init.normal_(layer.weight, 0.0, 0.02 if narrow else layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images")
    parser.add_argument("out")
    for name, kind, default in (
        ("steps", int, 6000),
        ("batch", int, 64),
        ("seed", int, 0),
        ("n", int, 10000),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = torch.from_numpy(np.load(args.images)["x"]).permute(0, 3, 1, 2).float() * (2 / 255) - 1
    d_z, channels = 64, (32, 64)
    generator, discriminator = Generator(d_z, channels, 28), Discriminator(channels, 28)
    initialise(generator)
    initialise(discriminator)
    generator = generator.to(memory_format=torch.channels_last)
    discriminator = discriminator.to(memory_format=torch.channels_last)
    average = copy.deepcopy(generator)

    def make(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999))

    opt_g, opt_d = make(generator), make(discriminator)
    order = torch.empty(0, dtype=torch.long)
    start = time.perf_counter()
    for step in range(args.steps):
        if len(order) < args.batch:
            order = torch.cat([order, torch.randperm(len(data))])
        index, order = order[: args.batch], order[args.batch :]
        real = data[index].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            fake = generator(torch.randn(args.batch, d_z))
        loss = (
            functional.softplus(-discriminator(real)).mean()
            + functional.softplus(discriminator(fake)).mean()
        )
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        loss = functional.softplus(-discriminator(generator(torch.randn(args.batch, d_z)))).mean()
        opt_g.zero_grad()
        loss.backward()
        opt_g.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), generator.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
            for slow, fast in zip(average.buffers(), generator.buffers(), strict=True):
                slow.copy_(fast)
    seconds = time.perf_counter() - start
    average.eval()
    with torch.no_grad():
        parts = [average(torch.randn(500, d_z)) for _ in range(-(-args.n // 500))]
    x = (
        ((torch.cat(parts)[: args.n].permute(0, 2, 3, 1) + 1) * 127.5)
        .round()
        .to(torch.uint8)
        .numpy()
    )

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    np.savez_compressed(
        args.out,
        x=x,
        seconds=seconds,
        parameters=np.asarray([count(generator), count(discriminator)]),
        version=torch.__version__,
    )


if __name__ == "__main__":
    main()
