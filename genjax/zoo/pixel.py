"""Rows: models of images, a pixel at a time, with exact likelihoods."""

import dataclasses

from genjax.families.made import made
from genjax.families.nade import nade
from genjax.families.pixelcnn import pixelcnn
from genjax.families.transformer import transformer
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY_PIXELCNN = {"channels": 4, "n_layers": 2, "kernel_size": 3, "dropout": 0.0}

# 1,257 training digits are few: in 3,000 steps the figure on the validation split is best after
# 750, and then falls.
_DIGITS = {"channels": 48, "n_layers": 6, "kernel_size": 3, "dropout": 0.3}
_DIGITS_OPTIMIZER = Optimizer(
    algorithm="adamw",
    learning_rate=2e-3,
    schedule="cosine",
    weight_decay=0.1,
    clip_norm=1.0,
    ema_decay=0.995,
)
_DIGITS_SCHEDULE = Schedule(
    steps=1_000, batch_size=32, evaluate_every=250, sample_every=500, checkpoint_every=500
)
_MNIST_SCHEDULE = Schedule(
    steps=25_000,
    batch_size=128,
    log_every=500,
    evaluate_every=5000,
    sample_every=10_000,
    checkpoint_every=5000,
)

# The MNIST rows are on the protocol of vae-mnist: the same draw of the test digits.
ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="made-mnist",
        family=made,
        data="mnist",
        summary="masked autoencoder (MADE) of binarised MNIST",
        model={"hidden": (1000, 1000)},
        data_options={"binarize": "dynamic"},
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", ema_decay=0.999),
        schedule=dataclasses.replace(_MNIST_SCHEDULE, steps=10_000),
        tiny={"hidden": (8, 8)},
    ),
    Recipe(
        name="nade-digits",
        family=nade,
        data="digits",
        summary="NADE of digits, one hidden layer",
        model={"hidden": 256},
        optimizer=_DIGITS_OPTIMIZER,
        schedule=_DIGITS_SCHEDULE,
        tiny={"hidden": 8},
    ),
    Recipe(
        name="pixelcnn-digits",
        family=pixelcnn,
        data="digits",
        summary="Gated PixelCNN of digits",
        model=_DIGITS,
        optimizer=_DIGITS_OPTIMIZER,
        schedule=_DIGITS_SCHEDULE,
        tiny=_TINY_PIXELCNN,
    ),
    Recipe(
        name="pixelcnn++-digits",
        family=pixelcnn,
        data="digits",
        summary="Gated PixelCNN of digits, with a mixture of logistics for a pixel (PixelCNN++)",
        model={**_DIGITS, "likelihood": "logistics", "n_components": 5},
        optimizer=_DIGITS_OPTIMIZER,
        schedule=_DIGITS_SCHEDULE,
        tiny={**_TINY_PIXELCNN, "n_components": 2},
    ),
    Recipe(
        name="pixelcnn-mnist",
        family=pixelcnn,
        data="mnist",
        summary="Gated PixelCNN of binarised MNIST",
        model={"channels": 32, "n_layers": 7, "kernel_size": 5},
        data_options={"binarize": "dynamic"},
        optimizer=Optimizer(learning_rate=2e-3, schedule="cosine", clip_norm=1.0, ema_decay=0.999),
        schedule=dataclasses.replace(_MNIST_SCHEDULE, steps=12_000, batch_size=32),
        tiny=_TINY_PIXELCNN,
    ),
    Recipe(
        name="image-transformer-digits",
        family=transformer,
        data="digit_pixels",
        summary="Transformer of digits, a token for each pixel",
        model={"d_model": 64, "n_layers": 4, "n_heads": 4, "position": "learned", "dropout": 0.1},
        optimizer=dataclasses.replace(_DIGITS_OPTIMIZER, weight_decay=0.3),
        # With a dropout of 0.3, 1,000 steps left it at 91 nats, in training as well.
        schedule=dataclasses.replace(_DIGITS_SCHEDULE, steps=4_000, evaluate_every=500),
        tiny={"d_model": 4, "n_layers": 2, "n_heads": 2, "d_hidden": 6, "dropout": 0.0},
    ),
)
