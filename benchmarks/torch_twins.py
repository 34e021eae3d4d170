"""PyTorch twins of genjax's training steps, run by an interpreter of its own: it imports nothing of
genjax.

    python torch_twins.py CASE.json

The case says the family, the builder's settings, the data's shape and the optimisers, as `peers.py`
writes them. A twin is the same architecture with the same loss, optimiser, clipping, moving average
and learning-rate schedule, as one writes it in
PyTorch: fused Adam, gradients set to None, scaled_dot_product_attention, channels-last
convolutions, PyTorch's own recurrent layers where their equations are the same. Data are one random
batch; noise is drawn anew in each step.

The first line on stdout is JSON: the version, the threads and the number of parameters. Each line
    of JSON on stdin is answered
by one on stdout: {"variant": "eager" or "compiled", "steps": n} by seconds per step, and {"check":
"FILE.npz"} by the loss of each player and the norm of its gradient for the parameters, the data and
the noise of that file. What fails is answered by {"error": message}.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch_twin_exact import FAMILIES as EXACT
from torch_twin_families import FAMILIES, RNN, Twin

# --- the step -------------------------------------------------------------------------------------


class Player:
    """One player's parameters, optimiser and moving average."""

    def __init__(self, module: nn.Module, settings: dict[str, Any], steps: int) -> None:
        self.o, self.steps, self.done = SimpleNamespace(**settings), steps, 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        betas, rate, decay = (self.o.b1, self.o.b2), self.o.learning_rate, self.o.weight_decay
        if self.o.algorithm == "adamw":
            groups = [
                {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": decay},
                {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
            ]
            self.optimizer: Any = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
        else:
            self.optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=betas, fused=True)
        self.average = [p.detach().clone() for p in self.parameters] if self.o.ema_decay else []

    def rate(self) -> float:
        warm = min(1.0, (self.done + 1) / max(self.o.warmup_steps, 1))
        part = min(
            max(self.done - self.o.warmup_steps, 0) / (self.steps - self.o.warmup_steps), 1.0
        )
        shape = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * part)}[self.o.schedule]
        return self.o.learning_rate * warm * shape

    def update(self) -> None:
        """Clip, one step of the optimiser, and the moving average, from the gradients that are
        there.
        """
        if self.o.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.o.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            decay = min(self.o.ema_decay, (1 + self.done) / (10 + self.done))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.done += 1


def stepper(case: dict[str, Any], variant: str) -> Callable[[], None]:
    """One training step on a fixed random batch."""
    torch.manual_seed(0)
    twin = built(case)
    x, cond = batch_of(case)
    players = {
        name: Player(twin.own(name), case["optimizer"][name], case["steps"])
        for name in twin.players
    }

    def loss_of(name: str) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            return twin.loss(name, x, cond, twin.draw(name))

        return torch.compile(loss) if variant == "compiled" else loss

    losses = {name: loss_of(name) for name in players}

    def step() -> None:
        for name, player in players.items():
            for other in players:  # no gradient for the player whose turn it is not
                if len(players) > 1:
                    twin.own(other).requires_grad_(other == name)
            losses[name]().backward()
            twin.settle()
            player.update()

    return step


def built(case: dict[str, Any]) -> Twin:
    return (FAMILIES | EXACT)[case["family"]](case).to(memory_format=torch.channels_last)


def batch_of(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random data of the case's kind; images come as [n, C, H, W], tokens as whole numbers."""
    spec, n = SimpleNamespace(**case["spec"]), case["batch_size"]
    cond = torch.randint(spec.n_classes, (n,)) if spec.n_classes else None
    if spec.kind == "continuous":
        return torch.randn(n, *spec.shape), cond
    x = torch.randint(spec.levels or 2, (n, *spec.shape))
    return arranged(x if spec.kind == "tokens" else x.float()), cond


def arranged(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x  # NHWC in memory: channels last


# --- the same weights as genjax's -----------------------------------------------------------------


def load(twin: Twin, arrays: dict[str, np.ndarray]) -> None:
    """Put genjax's parameters into the twin; a name or a shape that does not fit is an error."""
    if isinstance(twin, RNN):
        twin.load(arrays)
    arrays = twin.named(arrays)
    modules = dict(twin.named_modules())
    for name, parameter in twin.named_parameters():
        if isinstance(twin, RNN) and name.startswith("layers."):
            continue
        path, _, leaf = name.rpartition(".")
        value = found(arrays, name)
        if path in twin.images:
            c, h, w = twin.images[path]
            axis = (
                1 if path.endswith("first") else 0
            )  # what the image is to the kernel: its outputs or its inputs
            if leaf == "weight" or path.endswith("first"):
                value = np.moveaxis(value, axis if leaf == "weight" else 0, 0)
                value = value.reshape(h, w, c, *value.shape[1:])
                value = value[::-1, ::-1] if twin.mirrored else value
                value = np.moveaxis(value, 2, 0).reshape(c * h * w, *value.shape[3:])
                value = np.moveaxis(value, 0, axis if leaf == "weight" else 0)
        if value.ndim == 4:
            turned = isinstance(modules[path], nn.ConvTranspose2d)
            value = value[::-1, ::-1] if twin.mirrored or turned else value
            value = value.transpose(2, 3, 0, 1) if turned else value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            square = value.shape[0] == value.shape[1] and leaf in ("weight", "kernel")
            value = value.T if square or value.shape != parameter.shape else value
        assert value.shape == parameter.shape, (name, value.shape, tuple(parameter.shape))
        parameter.data.copy_(torch.from_numpy(np.array(value)))


def found(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """genjax's array for a parameter of the twin."""
    *path, leaf = name.replace("film", "parameters").split(".")
    leaves = {"weight": ("kernel", "scale", ""), "bias": ("bias", "shift")}.get(leaf, (leaf,))
    heads = ["/".join(path)]
    heads += [f"{heads[0]}/layer"]  # a layer that may be wrapped, in a discriminator
    if name.startswith(("discriminator.convs", "discriminator.norms")):
        heads = [
            "/".join(["discriminator", "features", *path[1:], *end]) for end in ((), ("layer",))
        ]
    names = [f"{head}/{end}".strip("/") for head in heads for end in leaves]
    for candidate in names:
        if candidate in arrays:
            return arrays[candidate]
    raise KeyError(f"{name}: none of {names}")


def check(case: dict[str, Any], path: str) -> dict[str, list[float]]:
    """Loss and gradient norm of each player for the parameters, data and noise of a file."""
    with np.load(path) as file:
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name in file.files:
            part, _, rest = name.partition("|")
            parts.setdefault(part, {})[rest] = file[name]
    twin = built(case)
    load(twin, parts["params"])
    data = {name: torch.from_numpy(value) for name, value in parts["data"].items()}
    x = arranged(data["x"] if data["x"].is_floating_point() else data["x"].long())
    x = x.flip(2, 3) if twin.mirrored else x
    results = {}
    for player in twin.players:
        noise = {
            name: arranged(torch.from_numpy(value)) for name, value in parts.get(player, {}).items()
        }
        noise = {**twin.draw(player), **noise}
        value = twin.loss(player, x, data["cond"].long() if "cond" in data else None, noise)
        own = [p for p in twin.own(player).parameters() if p.requires_grad]
        twin.zero_grad()
        value.backward()
        norm = torch.stack([p.grad.square().sum() for p in own if p.grad is not None]).sum().sqrt()
        results[player] = [value.item(), norm.item()]
    return results


def main() -> None:
    with open(sys.argv[1]) as file:
        case = json.load(file)
    twin = built(case)
    count = sum(p.numel() for p in twin.parameters()) - twin.redundant
    assert count == case["parameters"], f"{count} parameters here, {case['parameters']} in genjax"
    about = {"version": torch.__version__, "threads": torch.get_num_threads(), "parameters": count}
    print(json.dumps(about), flush=True)
    steps: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        try:
            print(json.dumps(answer(case, steps, json.loads(line))), flush=True)
        except Exception as error:  # such as a loss that torch.compile cannot differentiate twice
            print(
                json.dumps(
                    {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
                ),
                flush=True,
            )


def answer(
    case: dict[str, Any], steps: dict[str, Callable[[], None]], asked: dict[str, Any]
) -> Any:
    if "check" in asked:
        return check(case, asked["check"])
    variant, n = asked["variant"], asked["steps"]
    if variant not in steps:
        steps[variant] = stepper(case, variant)
    start = time.perf_counter()
    for _ in range(n):
        steps[variant]()
    return (time.perf_counter() - start) / n


if __name__ == "__main__":
    main()
