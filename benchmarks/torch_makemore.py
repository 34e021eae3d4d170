"""makemore's Transformer trained by makemore's settings in PyTorch, by an interpreter of its own:
it imports nothing of genjax.

    python torch_makemore.py DATA.npz STEPS SEED

DATA holds `train`, `valid` and `test`: lines of tokens [N, T], int64, ended by token 0 and filled
with -1. The defaults of makemore.py (Karpathy 2022): 4 pre-norm blocks of 4 heads and width 64 with
biases and learned positions, PyTorch's initial distributions, AdamW at a constant 5e-4 (betas 0.9
and 0.99, decay 0.01), batches of 32 lines drawn with replacement, token 0 as the first input. It
keeps the best step on its test lines; here that step is chosen on `valid`. One line of JSON on
stdout.
"""

import copy
import json
import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch_nanogpt import GPT  # pyright: ignore[reportMissingImports]

EVERY = 500  # steps between looks at the validation lines, as in makemore


def pairs(lines: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets; targets of -100 do not count."""
    y = torch.from_numpy(lines)
    x = torch.cat([torch.zeros(len(y), 1, dtype=torch.int64), y[:, :-1].clamp(min=0)], dim=1)
    return x, torch.where(y < 0, -100, y)


def main() -> None:
    path, steps, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(seed)
    data = {name: pairs(lines) for name, lines in np.load(path).items()}
    x, y = data["train"]
    model = GPT(27, x.shape[1], 64, 4, 4, bias=True, tied=False)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-4, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8
    )
    best, kept, curve, started = (float("inf"), 0), None, [], time.perf_counter()
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (32,))
        model(x[rows], y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % EVERY == 0:
            with torch.no_grad():
                nats = float(model(*data["valid"]))
            curve.append(nats)
            if nats < best[0]:
                best, kept = (nats, step), copy.deepcopy(model.state_dict())
    seconds = time.perf_counter() - started
    model.load_state_dict(kept)
    with torch.no_grad():
        test = float(model(*data["test"]))
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "every": EVERY,
        "valid_curve": curve,
    }
    print(
        json.dumps(
            {
                **found,
                "best_step": best[1],
                "valid": best[0],
                "test": test,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
