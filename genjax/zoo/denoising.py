"""Rows: models that go from noise to data, diffusion and flow matching."""

from typing import Any

from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY_DENOISER = {
    "hidden": (4,),
    "channels": (4,),
    "n_heads": 2,
    "cond_dropout": 0.0,
    "guidance": None,
    "n_steps": 2,
    "n_likelihood_steps": 2,
}
_TINY_DIFFUSION = {**_TINY_DENOISER, "n_bound_samples": 2}
_TINY_FLOW = {**_TINY_DENOISER, "n_probes": 1}
_DENOISER_OPTIMIZER = Optimizer(
    algorithm="adamw", learning_rate=1e-3, schedule="cosine", weight_decay=0.1, ema_decay=0.999
)
_PLANE_TRAINING: dict[str, Any] = {
    "optimizer": Optimizer(learning_rate=1e-3, schedule="cosine", ema_decay=0.999),
    "schedule": Schedule(
        steps=10_000, batch_size=512, evaluate_every=2000, sample_every=2000, checkpoint_every=2000
    ),
}
# Patches of 2 x 2 pixels make a step of a U-Net four times as fast on a CPU.
_UNET = {"net": "unet", "channels": (24, 48), "patch": 2, "n_heads": 2}
_UNET_TRAINING: dict[str, Any] = {
    "optimizer": Optimizer(
        learning_rate=2e-3, schedule="cosine", warmup_steps=100, clip_norm=1.0, ema_decay=0.999
    ),
    "schedule": Schedule(
        steps=6_000,
        batch_size=64,
        steps_per_call=10,
        evaluate_every=0,
        sample_every=2000,
        checkpoint_every=1000,
    ),
}

ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="diffusion",
        family=diffusion,
        data="digits",
        summary="diffusion of digits, conditional on the digit, with guidance",
        model={
            "hidden": (512, 512, 512),
            "sigma_data": 0.75,
            "cond_dropout": 0.15,
            "guidance": 1.5,
        },
        data_options={"conditional": True},
        optimizer=_DENOISER_OPTIMIZER,
        schedule=Schedule(
            steps=4_000,
            batch_size=128,
            evaluate_every=1000,
            sample_every=2000,
            checkpoint_every=2000,
        ),
        evaluation={"n_bound_samples": 256},
        tiny=_TINY_DIFFUSION,
    ),
    Recipe(
        name="diffusion-2d",
        family=diffusion,
        data="ring",
        summary="diffusion of points in the plane",
        model={
            "hidden": (256, 256, 256),
            "noise_schedule": "edm",
            "precondition": "edm",
            "sigma_data": 0.7,
        },
        **_PLANE_TRAINING,
        tiny=_TINY_DIFFUSION,
    ),
    Recipe(
        name="edm-mnist",
        family=diffusion,
        data="mnist",
        summary="EDM of MNIST with a U-Net",
        model={
            **_UNET,
            "noise_schedule": "edm",
            "precondition": "edm",
            "sigma_data": 0.5,
            "n_steps": 18,
        },
        **_UNET_TRAINING,
        evaluation={"n_bound_samples": 16},
        tiny=_TINY_DIFFUSION,
    ),
    Recipe(
        name="vdm-digits",
        family=diffusion,
        data="digits",
        summary="variational diffusion of digits with a learned schedule",
        model={
            "net": "unet",
            "channels": (32, 64),
            "noise_schedule": "learned",
            "weighting": "elbo",
            "prediction": "epsilon",
        },
        optimizer=Optimizer(
            algorithm="adamw",
            learning_rate=2e-3,
            schedule="cosine",
            weight_decay=0.1,
            ema_decay=0.999,
        ),
        schedule=Schedule(
            steps=3_000, batch_size=64, evaluate_every=500, sample_every=1000, checkpoint_every=1000
        ),
        evaluation={"n_bound_samples": 256},
        tiny={**_TINY_DIFFUSION, "net": "mlp"},
    ),
    Recipe(
        name="flow-matching",
        family=flow_matching,
        data="digits",
        summary="flow matching of digits, conditional on the digit, with guidance",
        # While it trains, its bound is estimated by one random probe: the exact divergence costs 64
        # derivatives a step.
        model={
            "hidden": (512, 512, 512),
            "cond_dropout": 0.15,
            "guidance": 2.0,
            "n_steps": 25,
            "n_likelihood_steps": 20,
            "n_probes": 1,
        },
        data_options={"conditional": True},
        optimizer=_DENOISER_OPTIMIZER,
        schedule=Schedule(
            steps=10_000,
            batch_size=128,
            evaluate_every=1000,
            sample_every=2000,
            checkpoint_every=2000,
        ),
        evaluation={"n_likelihood_steps": 40, "n_probes": 0},
        tiny=_TINY_FLOW,
    ),
    Recipe(
        name="flow-matching-2d",
        family=flow_matching,
        data="ring",
        summary="flow matching of points in the plane",
        model={"hidden": (256, 256, 256)},
        **_PLANE_TRAINING,
        evaluation={"n_likelihood_steps": 200},
        tiny=_TINY_FLOW,
    ),
    Recipe(
        name="flow-matching-mnist",
        family=flow_matching,
        data="mnist",
        summary="flow matching of MNIST with a U-Net",
        model={**_UNET, "n_steps": 25, "n_likelihood_steps": 10, "n_probes": 1},
        **_UNET_TRAINING,
        tiny=_TINY_FLOW,
    ),
)
