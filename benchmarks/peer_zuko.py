"""A neural spline flow by zuko's modules; `peer_flows.py` says what is asked of it."""

from functools import partial
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import zuko  # pyright: ignore[reportMissingImports]
from peer_flows import decay, rate, serve
from torch import nn  # pyright: ignore[reportMissingImports]
from zuko.flows.coupling import (  # pyright: ignore[reportMissingImports]
    ElementWiseTransform,
    GeneralCouplingTransform,
)
from zuko.lazy import (  # pyright: ignore[reportMissingImports]
    Flow,
    UnconditionalDistribution,
    UnconditionalTransform,
)
from zuko.transforms import (  # pyright: ignore[reportMissingImports]
    LULinearTransform,
    MonotonicRQSTransform,
    PermutationTransform,
)


def layer(case: dict[str, Any], d: int) -> list[nn.Module]:
    """Scale and shift, turn the order round, a product L U, and a coupling layer of splines."""
    bins, kept = case["bins"], torch.arange(d) < d // 2
    return [
        ElementWiseTransform(d),
        UnconditionalTransform(PermutationTransform, torch.arange(d).flip(0), buffer=True),
        UnconditionalTransform(LULinearTransform, torch.eye(d)),
        GeneralCouplingTransform(
            d,
            0,
            kept,
            univariate=partial(MonotonicRQSTransform, bound=case["tail_bound"]),
            shapes=[(bins,), (bins,), (bins - 1,)],
            hidden_features=case["hidden"],
            activation=partial(nn.GELU, approximate="tanh"),
        ),
    ]


def make(case: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    torch.manual_seed(case["seed"])
    d = case["d"]
    transforms = [part for _ in range(case["n_layers"]) for part in layer(case, d)]
    zeros, ones = torch.zeros(d), torch.ones(d)
    flow = Flow(
        transforms,
        UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, ones, buffer=True),
    )
    parameters = list(flow.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=case["learning_rate"], fused=True)

    def train(batch: np.ndarray, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(case, step)
        loss = -flow().log_prob(torch.from_numpy(batch)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay(case, step))

    def score(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            kept = [p.clone() for p in parameters]
            torch._foreach_copy_(parameters, average)
            nats = flow().log_prob(torch.from_numpy(x)).numpy()
            torch._foreach_copy_(parameters, kept)
        return nats

    count = sum(p.numel() for p in parameters)
    words = f"zuko {zuko.__version__}, torch {torch.__version__}"
    return {"version": words, "parameters": count}, train, score


if __name__ == "__main__":
    serve(make)
