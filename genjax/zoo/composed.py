"""Rows: models made of trained ones. `data` is the run folder of the first stage, which the row
named `first` makes.
"""

from genjax.families.compose import reflow
from genjax.families.flow_matching import flow_matching
from genjax.learning.optim import Optimizer
from genjax.zoo.recipe import Recipe, Schedule

ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="vae-flow-prior",
        family=flow_matching,
        data="runs/vae",
        first="vae",
        summary="flow matching of a VAE's latents, the bound of both joined",
        # While it trains, its bound is estimated with few steps: it is one of many terms.
        model={"hidden": (256, 256, 256), "n_steps": 25, "n_likelihood_steps": 20},
        optimizer=Optimizer(
            algorithm="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            weight_decay=0.1,
            ema_decay=0.999,
        ),
        schedule=Schedule(
            steps=6_000,
            batch_size=128,
            evaluate_every=1000,
            sample_every=2000,
            checkpoint_every=2000,
        ),
        evaluation={"n_likelihood_steps": 50},
        tiny={"hidden": (4,), "n_steps": 2, "n_likelihood_steps": 2},
    ),
    Recipe(
        name="reflow-2d",
        family=reflow,
        data="runs/flow-matching-2d",
        first="flow-matching-2d",
        summary="a straighter flow from the pairs that a flow makes itself",
        # Twenty steps of Heun's method would halve the variance of the modes.
        model={"solver": "rk4", "n_steps": 25},
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", ema_decay=0.999),
        schedule=Schedule(
            steps=6_000,
            batch_size=256,
            evaluate_every=1000,
            sample_every=2000,
            checkpoint_every=2000,
        ),
        # By RK4 the gates' teacher leaves noise where it is but for rounding, by Heun exactly.
        tiny={"solver": "heun", "n_steps": 2},
    ),
)
