"""The zoo: NAME -> recipe. The command line, the tests, the benchmarks and the README all read this
one table.

To add a row: write the family's file, then a `Recipe` here. `tiny` makes the model small enough for
the conformance gates of `tests/test_gates.py`, which every row has to pass.
"""

import dataclasses
from typing import Any

from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.families.gan import gan
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY_VAE = {"latent_dim": 2, "hidden": (8,), "channels": (4,)}

# 1,257 training digits are few: without this much weight decay the validation bound is best after
# 1,000 steps and then falls.
_DIGITS_VAE = {"latent_dim": 8, "hidden": (256, 256)}
_DIGITS_OPTIMIZER = Optimizer(
    algorithm="adamw", learning_rate=1e-3, schedule="cosine", weight_decay=1.0, ema_decay=0.999
)

_TINY_GAN = {"latent_dim": 2, "hidden": (8, 8), "channels": (4, 4)}


def _players(
    learning_rate: float, b1: float = 0.0, b2: float = 0.99, schedule: str = "constant"
) -> dict[str, Optimizer]:
    """Adam for both players of a GAN, and a moving average of the generator, which samples are
    drawn from.
    """
    both = Optimizer(learning_rate=learning_rate, b1=b1, b2=b2, schedule=schedule)  # type: ignore[arg-type]
    return {"discriminator": both, "generator": dataclasses.replace(both, ema_decay=0.999)}


_TINY_RNN = {"d_embed": 3, "d_hidden": 4, "n_layers": 2, "lanes": 0, "dropout": 0.0}
_TINY_TRANSFORMER = {"d_model": 4, "n_layers": 2, "n_heads": 2, "d_hidden": 6}
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
_TINY_VRNN = {"latent_dim": 2, "d_hidden": 4, "hidden": (4,)}

# Names in a row, cut into 64 streams that each step reads on by 64 characters: truncated
# back-propagation.
_STREAMS = {"layout": "stream", "context": 64, "order": "stream"}
_RECURRENT = {"d_embed": 64, "d_hidden": 256, "lanes": 64, "restart": 0.1}
_SEQUENCE_OPTIMIZER = Optimizer(
    algorithm="adamw", learning_rate=4e-3, schedule="cosine", clip_norm=1.0, ema_decay=0.99
)
_ATTENTION_OPTIMIZER = Optimizer(
    algorithm="adamw",
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=100,
    b2=0.99,
    weight_decay=0.1,
    clip_norm=1.0,
    ema_decay=0.99,
)
_SEQUENCE_SCHEDULE = Schedule(
    steps=2_000, batch_size=64, log_every=50, evaluate_every=500, sample_every=1000
)


def _chorales(
    learning_rate: float, weight_decay: float = 0.1, steps: int = 1_600
) -> dict[str, Any]:
    """How the rows of the chorales are trained; 229 pieces are few, so they need all the
    regularisation.
    """
    return {
        "optimizer": Optimizer(
            algorithm="adamw",
            learning_rate=learning_rate,
            schedule="cosine",
            weight_decay=weight_decay,
            clip_norm=1.0,
            ema_decay=0.99,
        ),
        "schedule": Schedule(
            steps=steps,
            batch_size=16,
            steps_per_call=10,
            log_every=50,
            evaluate_every=200,
            sample_every=1000,
        ),
    }


# A bound with one sample says little of a model that was trained with many, so those rows validate
# with more.
_ROWS = (
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
        tiny=_TINY_GAN,
    ),
    Recipe(
        name="rnn",
        family=rnn,
        data="unicode_names",
        summary="vanilla recurrent network of the names of characters",
        model={**_RECURRENT, "cell": "vanilla"},
        data_options=_STREAMS,
        optimizer=dataclasses.replace(_SEQUENCE_OPTIMIZER, learning_rate=2e-3),
        schedule=_SEQUENCE_SCHEDULE,
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="lstm",
        family=rnn,
        data="unicode_names",
        summary="LSTM of the names of characters",
        model={**_RECURRENT, "cell": "lstm"},
        data_options=_STREAMS,
        optimizer=_SEQUENCE_OPTIMIZER,
        schedule=_SEQUENCE_SCHEDULE,
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="gru",
        family=rnn,
        data="unicode_names",
        summary="GRU of the names of characters",
        model={**_RECURRENT, "cell": "gru"},
        data_options=_STREAMS,
        optimizer=_SEQUENCE_OPTIMIZER,
        schedule=_SEQUENCE_SCHEDULE,
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="gru-markov",
        family=rnn,
        data="markov",
        summary="GRU of a Markov chain, whose entropy rate is known",
        model={"cell": "gru", "d_embed": 16, "d_hidden": 32},
        optimizer=Optimizer(learning_rate=5e-3, schedule="cosine", ema_decay=0.99),
        schedule=Schedule(steps=1_500, batch_size=64, sample_every=1000),
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="transformer",
        family=transformer,
        data="unicode_names",
        summary="Transformer of the names of characters",
        model={"d_model": 128, "n_layers": 3, "n_heads": 4},
        optimizer=dataclasses.replace(_ATTENTION_OPTIMIZER, learning_rate=2e-3),
        schedule=dataclasses.replace(_SEQUENCE_SCHEDULE, steps=1_500, batch_size=32),
        tiny=_TINY_TRANSFORMER,
    ),
    Recipe(
        name="transformer-unicode-conditional",
        family=transformer,
        data="unicode_names",
        summary="Transformer of names, one at a time, conditional on the first word",
        model={"d_model": 128, "n_layers": 3, "n_heads": 4, "dropout": 0.1, "cond_dropout": 0.2},
        data_options={"layout": "lines", "conditional": True},
        optimizer=dataclasses.replace(_ATTENTION_OPTIMIZER, learning_rate=2e-3),
        schedule=dataclasses.replace(_SEQUENCE_SCHEDULE, steps=1_500, batch_size=32),
        tiny={**_TINY_TRANSFORMER, "cond_dropout": 0.0},
    ),
    Recipe(
        name="transformer-names",
        family=transformer,
        data="names",
        summary="Transformer of first names",
        model={"d_model": 64, "n_layers": 4, "n_heads": 4, "d_hidden": 240, "dropout": 0.1},
        optimizer=dataclasses.replace(_ATTENTION_OPTIMIZER, learning_rate=3e-3),
        schedule=dataclasses.replace(_SEQUENCE_SCHEDULE, steps=10_000, batch_size=128),
        tiny=_TINY_TRANSFORMER,
    ),
    Recipe(
        name="gru-names",
        family=rnn,
        data="names",
        summary="GRU of first names",
        model={"cell": "gru", "d_embed": 64, "d_hidden": 220, "dropout": 0.35, "forget_bias": 1.0},
        optimizer=dataclasses.replace(_ATTENTION_OPTIMIZER, learning_rate=4e-3, ema_decay=0.999),
        schedule=dataclasses.replace(
            _SEQUENCE_SCHEDULE, steps=20_000, batch_size=128, evaluate_every=1000
        ),
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="transformer-shakespeare",
        family=transformer,
        data="shakespeare",
        summary="Transformer of Shakespeare's plays, of the size of nanoGPT's example for a CPU",
        model={"d_model": 128, "n_layers": 4, "n_heads": 4, "bias": False},
        data_options={
            "context": 65
        },  # nanoGPT's 64 and the first character, which it does not predict
        optimizer=dataclasses.replace(_ATTENTION_OPTIMIZER, learning_rate=3e-3),
        schedule=Schedule(
            steps=2_000, batch_size=12, log_every=50, evaluate_every=500, sample_every=1000
        ),
        tiny=_TINY_TRANSFORMER,
    ),
    Recipe(
        name="vrnn",
        family=vrnn,
        data="digit_rows",
        summary="recurrent VAE of digits, a row a step",
        model={"cell": "gru", "latent_dim": 8, "d_hidden": 128, "hidden": (128,)},
        data_options={"conditional": True},
        optimizer=Optimizer(
            algorithm="adamw",
            learning_rate=2e-3,
            schedule="cosine",
            weight_decay=0.3,
            ema_decay=0.99,
        ),
        schedule=Schedule(steps=3_000, batch_size=64),
        evaluation={"bound_estimator": "iwae", "n_bound_samples": 100},
        tiny=_TINY_VRNN,
    ),
    Recipe(
        name="rnn-jsb",
        family=rnn,
        data="jsb",
        summary="vanilla recurrent network of Bach's chorales",
        model={"cell": "vanilla", "d_embed": 64, "d_hidden": 300, "dropout": 0.3},
        **_chorales(3e-3),
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="gru-jsb",
        family=rnn,
        data="jsb",
        summary="GRU of Bach's chorales",
        model={"cell": "gru", "d_embed": 64, "d_hidden": 256, "dropout": 0.4, "forget_bias": 2.0},
        **_chorales(1e-2),
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="lstm-jsb",
        family=rnn,
        data="jsb",
        summary="LSTM of Bach's chorales",
        model={"cell": "lstm", "d_embed": 64, "d_hidden": 200, "dropout": 0.3},
        **_chorales(1e-2),
        tiny=_TINY_RNN,
    ),
    Recipe(
        name="vrnn-jsb",
        family=vrnn,
        data="jsb",
        summary="recurrent VAE of Bach's chorales",
        # With the ELBO as objective the latent vectors go unused (KL 0.002 nats a piece): particles
        # keep them in use.
        model={
            "cell": "gru",
            "latent_dim": 32,
            "d_hidden": 128,
            "hidden": (128,),
            "dropout": 0.3,
            "objective": "fivo",
            "n_samples": 8,
            "bound_estimator": "fivo",
            "n_bound_samples": 8,
        },
        **_chorales(3e-3, steps=800),
        evaluation={"bound_estimator": "fivo", "n_bound_samples": 100},
        tiny={**_TINY_VRNN, "n_samples": 2, "n_bound_samples": 2, "dropout": 0.0},
    ),
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

ZOO: dict[str, Recipe] = {row.name: row for row in _ROWS}
