"""Rows: normalizing flows."""

import dataclasses
from typing import Any

from genjax.families.cnf import cnf
from genjax.families.flows import maf, nsf, realnvp
from genjax.families.glow import glow
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY = {"n_layers": 2, "hidden": (8,), "dequantizer_layers": 1, "dequantizer_hidden": (4,)}
_TINY_SPLINE = {**_TINY, "bins": 4}
_TINY_GLOW = {"n_steps": 2, "channels": 4}
_TINY_CNF = {"hidden": (4,), "n_steps": 2}
# A flow with sharp peaks fits its 20,000 points so closely that fresh ones are 0.02 nats worse.
_MANY_POINTS = {"n_train": 200_000}
_SPLINES_IN_THE_PLANE = {"n_layers": 4, "hidden": (64, 64), "bins": 32}
_PLANE_SCHEDULE = Schedule(
    steps=10_000, batch_size=512, evaluate_every=2000, sample_every=2000, checkpoint_every=2000
)
_SPLINE_TRAINING: dict[str, Any] = {
    "optimizer": Optimizer(learning_rate=3e-3, schedule="cosine", ema_decay=0.999),
    "schedule": _PLANE_SCHEDULE,
}
# Of 1,257 digits a flow knows every one in a few hundred steps: in 3,000, the bound on the
# validation split is best after 500 (MAF) or 1,000 (splines), and then falls.
_DIGITS_TRAINING: dict[str, Any] = {
    "optimizer": Optimizer(
        algorithm="adamw", learning_rate=1e-3, schedule="cosine", weight_decay=1.0, ema_decay=0.999
    ),
    "schedule": Schedule(
        steps=1_000, batch_size=128, evaluate_every=250, sample_every=500, checkpoint_every=500
    ),
    "evaluation": {"n_bound_samples": 100},
}

ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="realnvp-ring",
        family=realnvp,
        data="ring",
        summary="RealNVP of eight Gaussians on a ring",
        model={"n_layers": 12, "hidden": (64, 64)},
        data_options=_MANY_POINTS,
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", clip_norm=1.0, ema_decay=0.999),
        schedule=_PLANE_SCHEDULE,
        tiny=_TINY,
    ),
    Recipe(
        name="nsf-ring",
        family=nsf,
        data="ring",
        summary="neural spline flow of eight Gaussians on a ring",
        model=_SPLINES_IN_THE_PLANE,
        data_options=_MANY_POINTS,
        **_SPLINE_TRAINING,
        tiny=_TINY_SPLINE,
    ),
    Recipe(
        name="nsf-grid",
        family=nsf,
        data="grid",
        summary="neural spline flow of 25 Gaussians on a grid",
        model=_SPLINES_IN_THE_PLANE,
        data_options=_MANY_POINTS,
        **_SPLINE_TRAINING,
        tiny=_TINY_SPLINE,
    ),
    Recipe(
        name="maf-digits",
        family=maf,
        data="digits",
        summary="masked autoregressive flow of digits",
        model={"n_layers": 5, "hidden": (256,)},
        **_DIGITS_TRAINING,
        tiny=_TINY,
    ),
    Recipe(
        name="nsf-digits",
        family=nsf,
        data="digits",
        summary="neural spline flow of digits, autoregressive",
        model={"structure": "autoregressive", "n_layers": 2, "hidden": (256,)},
        **_DIGITS_TRAINING,
        tiny=_TINY_SPLINE,
    ),
    Recipe(
        name="glow-mnist",
        family=glow,
        data="mnist",
        summary="Glow of MNIST",
        optimizer=Optimizer(
            learning_rate=1e-3, schedule="cosine", warmup_steps=100, clip_norm=10.0, ema_decay=0.999
        ),
        schedule=Schedule(
            steps=5_000,
            batch_size=64,
            steps_per_call=10,
            evaluate_every=0,
            sample_every=1000,
            checkpoint_every=1000,
        ),
        evaluation={"n_bound_samples": 4},
        tiny=_TINY_GLOW,
    ),
    Recipe(
        name="cnf-ring",
        family=cnf,
        data="ring",
        summary="continuous flow (FFJORD) of eight Gaussians on a ring",
        # In the plane the exact divergence costs as little as two random vectors. With 8 steps it
        # learns what these steps get wrong: 9 nats too many after 300, and then infinity.
        model={"hidden": (64, 64, 64), "n_steps": 32, "n_probes": 0},
        data_options=_MANY_POINTS,
        optimizer=Optimizer(learning_rate=2e-3, schedule="cosine", clip_norm=1.0, ema_decay=0.999),
        schedule=dataclasses.replace(_PLANE_SCHEDULE, steps=4_000, batch_size=128),
        evaluation={"n_steps": 64},
        tiny=_TINY_CNF,
    ),
)
