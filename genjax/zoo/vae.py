"""Rows: variational autoencoders."""

from genjax.families.vae import vae
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY_VAE = {"latent_dim": 2, "hidden": (8,), "channels": (4,)}

# 1,257 training digits are few: without this much weight decay the validation bound is best after
# 1,000 steps and then falls.
_DIGITS_VAE = {"latent_dim": 8, "hidden": (256, 256)}
_DIGITS_OPTIMIZER = Optimizer(
    algorithm="adamw", learning_rate=1e-3, schedule="cosine", weight_decay=1.0, ema_decay=0.999
)

# A bound with one sample says little of a model that was trained with many, so those rows validate
# with more.
ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="vae",
        family=vae,
        data="digits",
        summary="variational autoencoder",
        model=_DIGITS_VAE,
        optimizer=_DIGITS_OPTIMIZER,
        schedule=Schedule(steps=6_000, batch_size=128),
        evaluation={"n_bound_samples": 1000},
        tiny=_TINY_VAE,
    ),
    Recipe(
        name="cvae",
        family=vae,
        data="digits",
        summary="VAE conditional on the digit",
        model=_DIGITS_VAE,
        data_options={"conditional": True},
        optimizer=_DIGITS_OPTIMIZER,
        schedule=Schedule(steps=6_000, batch_size=128),
        evaluation={"n_bound_samples": 1000},
        tiny=_TINY_VAE,
    ),
    Recipe(
        name="vae-conv",
        family=vae,
        data="digits",
        summary="convolutional VAE",
        model={"latent_dim": 8, "net": "conv", "channels": (16, 32)},
        optimizer=_DIGITS_OPTIMIZER,
        schedule=Schedule(steps=3_000, batch_size=64),
        evaluation={"n_bound_samples": 1000},
        tiny=_TINY_VAE,
    ),
    Recipe(
        name="vae-vamp",
        family=vae,
        data="digits",
        summary="VAE with a VampPrior",
        model={**_DIGITS_VAE, "prior": "vamp"},
        optimizer=_DIGITS_OPTIMIZER,
        schedule=Schedule(steps=6_000, batch_size=128),
        evaluation={"n_bound_samples": 1000},
        tiny={**_TINY_VAE, "n_pseudo_inputs": 3},
    ),
    Recipe(
        name="iwae",
        family=vae,
        data="digits",
        summary="importance-weighted autoencoder, K=8",
        model={**_DIGITS_VAE, "n_samples": 8, "gradient": "dreg", "n_bound_samples": 64},
        optimizer=_DIGITS_OPTIMIZER,
        schedule=Schedule(steps=6_000, batch_size=128),
        evaluation={"n_bound_samples": 1000},
        tiny={**_TINY_VAE, "n_samples": 2},
    ),
    Recipe(
        name="vae-ring",
        family=vae,
        data="ring",
        summary="VAE of eight Gaussians on a ring",
        model={
            "latent_dim": 2,
            "hidden": (128, 128),
            "scale": "element",
            "n_samples": 16,
            "n_bound_samples": 64,
        },
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", clip_norm=10.0, ema_decay=0.999),
        schedule=Schedule(steps=10_000, batch_size=256),
        evaluation={"n_bound_samples": 1000},
        tiny={**_TINY_VAE, "n_samples": 2},
    ),
    Recipe(
        name="vae-mnist",
        family=vae,
        data="mnist",
        summary="VAE of binarised MNIST with a VampPrior",
        model={"latent_dim": 50, "hidden": (500, 500), "prior": "vamp", "n_pseudo_inputs": 500},
        data_options={"binarize": "dynamic"},
        optimizer=Optimizer(learning_rate=2e-3, schedule="cosine", ema_decay=0.999),
        schedule=Schedule(
            steps=25_000,
            batch_size=128,
            log_every=500,
            evaluate_every=5000,
            sample_every=10_000,
            checkpoint_every=5000,
        ),
        evaluation={"n_bound_samples": 5000},
        tiny={**_TINY_VAE, "n_pseudo_inputs": 3},
    ),
)
