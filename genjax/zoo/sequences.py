"""Rows: models of sequences, recurrent, with attention, and with latent variables."""

import dataclasses
from typing import Any

from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vrnn import vrnn
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

_TINY_RNN = {"d_embed": 3, "d_hidden": 4, "n_layers": 2, "lanes": 0, "dropout": 0.0}
_TINY_TRANSFORMER = {"d_model": 4, "n_layers": 2, "n_heads": 2, "d_hidden": 6}
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


ROWS: tuple[Recipe, ...] = (
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
        # nanoGPT's 64 and the first character, which it does not predict.
        data_options={"context": 65},
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
)
