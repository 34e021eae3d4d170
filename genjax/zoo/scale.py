"""Rows: models of the size that accelerators are for. Their data are made, so that they run
anywhere; `--data` takes real ones: nanoGPT's train.bin, a folder of CIFAR-10, latents.
"""

from genjax.families.diffusion import diffusion
from genjax.families.transformer import transformer
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY_DENOISER = {"n_steps": 2, "n_bound_samples": 2, "n_likelihood_steps": 2, "dtype": "float32"}

ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="gpt2-124m",
        family=transformer,
        data="zipf",
        summary="GPT-2 of 124 million parameters, half a million tokens a step",
        model={
            "d_model": 768,
            "n_layers": 12,
            "n_heads": 12,
            "position": "learned",
            "bias": True,
            "tie_weights": True,
            "scan_layers": True,
            "dtype": "bfloat16",
        },
        optimizer=Optimizer(
            algorithm="adamw",
            learning_rate=6e-4,
            schedule="cosine",
            final_fraction=0.1,
            warmup_steps=700,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        schedule=Schedule(
            steps=19_000,
            batch_size=512,
            microbatches=16,
            steps_per_call=1,
            log_every=10,
            evaluate_every=1000,
            sample_every=1000,
            checkpoint_every=1000,
        ),
        tiny={
            "d_model": 4,
            "n_layers": 2,
            "n_heads": 2,
            "d_hidden": 6,
            "dtype": "float32",
        },
    ),
    Recipe(
        name="dit-b2",
        family=diffusion,
        data="textures",
        summary="DiT-B/2 of 32 x 32 x 4, conditional, with guidance",
        model={
            "net": "dit",
            "patch": 2,
            "d_model": 768,
            "n_layers": 12,
            "n_heads": 12,
            "scan_layers": True,
            "cond_dropout": 0.1,
            "guidance": 1.5,
            "dtype": "bfloat16",
        },
        data_options={"channels": 4, "conditional": True},
        optimizer=Optimizer(learning_rate=1e-4, warmup_steps=100, ema_decay=0.9999),
        schedule=Schedule(
            steps=400_000,
            batch_size=256,
            steps_per_call=10,
            evaluate_every=0,
            sample_every=10_000,
            checkpoint_every=5_000,
        ),
        tiny={
            **_TINY_DENOISER,
            "patch": 4,
            "d_model": 4,
            "n_layers": 2,
            "n_heads": 2,
            "cond_dropout": 0.0,
            "guidance": None,
        },
    ),
    Recipe(
        name="unet-cifar",
        family=diffusion,
        data="textures",
        summary="U-Net of 32 x 32 x 3, as of Ho 2020, with EDM's preconditioning",
        model={
            "net": "unet",
            "channels": (128, 256, 256, 256),
            "n_blocks": 2,
            "n_heads": 4,
            "noise_schedule": "edm",
            "precondition": "edm",
            "n_steps": 18,
            "dtype": "bfloat16",
        },
        optimizer=Optimizer(
            learning_rate=2e-4, warmup_steps=5_000, clip_norm=1.0, ema_decay=0.9999
        ),
        schedule=Schedule(
            steps=500_000,
            batch_size=128,
            steps_per_call=10,
            evaluate_every=0,
            sample_every=10_000,
            checkpoint_every=5_000,
        ),
        tiny={**_TINY_DENOISER, "net": "mlp", "hidden": (4,)},
    ),
)
