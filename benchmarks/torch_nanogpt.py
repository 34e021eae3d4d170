"""A PyTorch twin of nanoGPT's CPU setting, run by an interpreter of its own: it imports nothing of
genjax.

    python torch_nanogpt.py [--bias] [--untied] [--context 64 --batch 12 ...]

The arithmetic of nanoGPT's `model.py` and `train.py` with `config/train_shakespeare_char.py` as its
README changes it for a
CPU: pre-norm blocks, learned positions, exact GELU, fused queries, keys and values,
scaled_dot_product_attention, tied embeddings, cross-entropy, gradient clipping at norm 1 and AdamW,
on one batch of random tokens. Fetching batches, logging and the learning-rate schedule are left
out.

It serves timed turns, so that another process can alternate with it: each line "VARIANT STEPS" on
stdin (VARIANT is one of eager, fused, compiled; "fused" is eager with PyTorch's fused AdamW) is
answered by a line of seconds per step on stdout. On CUDA "compiled" has the fused AdamW, too.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]


class Block(nn.Module):
    def __init__(self, d: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d, bias=bias), nn.LayerNorm(d, bias=bias)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d, bias=bias)
        self.up, self.down = nn.Linear(d, 4 * d, bias=bias), nn.Linear(4 * d, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(d, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(b, t, d))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(
        self, levels: int, context: int, d: int, heads: int, layers: int, bias: bool, tied: bool
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(levels, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList([Block(d, heads, bias) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d, bias=bias), nn.Linear(d, levels, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p,
                    0.0,
                    0.02 / (2 * layers) ** 0.5
                    if name.endswith(("out.weight", "down.weight"))
                    else 0.02,
                )
        if tied:
            self.tokens.weight = self.head.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return functional.cross_entropy(
            self.head(self.norm(h)).view(-1, self.head.out_features), y.view(-1)
        )


def stepper(
    variant: str, model: GPT, x: torch.Tensor, y: torch.Tensor, bfloat16: bool = False
) -> Callable[[], None]:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    fused = variant == "fused" or (variant == "compiled" and x.device.type == "cuda")
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=fused or None)
    loss_of = torch.compile(model) if variant == "compiled" else model

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def finish(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = (
        ("levels", 65),
        ("context", 64),
        ("batch", 12),
        ("width", 128),
        ("heads", 4),
        ("layers", 4),
    )
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    steps: dict[str, Callable[[], None]] = {}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for line in sys.stdin:
        variant, count = line.split()
        if variant not in steps:
            torch.manual_seed(0)
            x, y = torch.randint(args.levels, (2, args.batch, args.context)).to(args.device)
            size = (args.levels, args.context, args.width, args.heads, args.layers)
            model = GPT(*size, bias=args.bias, tied=not args.untied).to(args.device)
            steps[variant] = stepper(variant, model, x, y, args.bfloat16)
        finish(args.device)
        start = time.perf_counter()
        for _ in range(int(count)):
            steps[variant]()
        finish(args.device)
        print((time.perf_counter() - start) / int(count), flush=True)


if __name__ == "__main__":
    main()
