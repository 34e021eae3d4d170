"""Rows: generative adversarial networks."""

import dataclasses
from typing import Literal

from genjax.families.gan import gan
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY_GAN = {"latent_dim": 2, "hidden": (8, 8), "channels": (4, 4)}


def _players(
    learning_rate: float,
    b1: float = 0.0,
    b2: float = 0.99,
    schedule: Literal["constant", "cosine"] = "constant",
) -> dict[str, Optimizer]:
    """Adam for both players of a GAN, and a moving average of the generator, which samples are
    drawn from.
    """
    both = Optimizer(learning_rate=learning_rate, b1=b1, b2=b2, schedule=schedule)
    return {"discriminator": both, "generator": dataclasses.replace(both, ema_decay=0.999)}


ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="gan-ring",
        family=gan,
        data="ring",
        summary="GAN of eight Gaussians on a ring, relativistic with R1 and R2",
        model={
            "latent_dim": 2,
            "hidden": (128, 128),
            "objective": "relativistic",
            "r1": 0.1,
            "r2": 0.1,
        },
        optimizer=_players(1e-3, schedule="cosine"),
        schedule=Schedule(steps=10_000, batch_size=128, sample_every=2000, checkpoint_every=2000),
        tiny=_TINY_GAN,
    ),
    Recipe(
        name="gan-grid",
        family=gan,
        data="grid",
        summary="GAN of 25 Gaussians on a grid, relativistic with R1 and R2",
        model={
            "latent_dim": 2,
            "hidden": (128, 128),
            "objective": "relativistic",
            "r1": 0.1,
            "r2": 0.1,
        },
        optimizer=_players(1e-3, schedule="cosine"),
        schedule=Schedule(steps=20_000, batch_size=128, sample_every=2000, checkpoint_every=2000),
        tiny=_TINY_GAN,
    ),
    Recipe(
        name="gan",
        family=gan,
        data="digits",
        summary="GAN of digits, non-saturating with R1",
        model={"latent_dim": 32, "hidden": (256, 256), "objective": "nonsaturating", "r1": 1.0},
        optimizer=_players(5e-4),
        schedule=Schedule(steps=10_000, batch_size=128, sample_every=2000, checkpoint_every=2000),
        tiny=_TINY_GAN,
    ),
    Recipe(
        name="cgan",
        family=gan,
        data="digits",
        summary="GAN conditional on the digit, relativistic, projection",
        model={
            "latent_dim": 32,
            "hidden": (256, 256),
            "objective": "relativistic",
            "r1": 1.0,
            "r2": 1.0,
            "discriminator_cond": "projection",
        },
        data_options={"conditional": True},
        optimizer=_players(5e-4),
        schedule=Schedule(steps=10_000, batch_size=128, sample_every=2000, checkpoint_every=2000),
        tiny=_TINY_GAN,
    ),
    Recipe(
        name="dcgan-mnist",
        family=gan,
        data="mnist",
        summary="DCGAN, non-saturating, batch normalisation",
        model={
            "latent_dim": 64,
            "net": "dcgan",
            "channels": (32, 64),
            "generator_norm": "batch",
            "discriminator_norm": "batch",
        },
        optimizer=_players(2e-4, b1=0.5, b2=0.999),
        schedule=Schedule(steps=6_000, batch_size=64, sample_every=1000, checkpoint_every=1000),
        tiny=_TINY_GAN,
    ),
    Recipe(
        name="r3gan-mnist",
        family=gan,
        data="mnist",
        summary="residual GAN, relativistic with R1 and R2",
        model={
            "latent_dim": 64,
            "net": "resnet",
            "channels": (16, 32),
            "objective": "relativistic",
            "r1": 1.0,
            "r2": 1.0,
        },
        optimizer=_players(2e-4, b2=0.99),
        schedule=Schedule(steps=4_000, batch_size=64, sample_every=1000, checkpoint_every=1000),
        tiny={**_TINY_GAN, "channels": (4,)},
    ),
)
