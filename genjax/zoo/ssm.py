"""Rows: state space models and linear recurrent networks, each trained as a row of `sequences.py`
on the same data is, with about as many parameters. Two have fewer steps than that row (`s4d-names`,
`mamba-jsb`), and the latter another step size.
"""

import dataclasses
from typing import Any

from genjax.families.ssm import ssm
from genjax.zoo import sequences
from genjax.zoo.recipe import Recipe

_TINY = {"d_model": 4, "n_layers": 2, "chunk": 2}
_TINY_MAMBA = {**_TINY, "n_layers": 1, "d_inner": 6, "d_state": 3, "n_heads": 2}


def _as(name: str, steps: int | None = None, **changes: Any) -> dict[str, Any]:
    """How another row is trained, with changes to its optimiser, for no more steps than it."""
    row = next(row for row in sequences.ROWS if row.name == name)
    own: Any = row.optimizer
    return {
        "data": row.data,
        "data_options": row.data_options,
        "optimizer": dataclasses.replace(own, **changes),
        "schedule": dataclasses.replace(row.schedule, steps=steps or row.schedule.steps),
    }


ROWS: tuple[Recipe, ...] = (
    Recipe(
        name="mingru-names",
        family=ssm,
        summary="minGRU of first names",
        model={
            "cell": "mingru",
            "d_model": 64,
            "n_layers": 4,
            "d_inner": 128,
            "d_hidden": 176,
            "dt_min": 0.05,
            "dt_max": 0.9,
            "dropout": 0.1,
        },
        **_as("transformer-names"),
        tiny={**_TINY, "d_inner": 6, "d_hidden": 6},
    ),
    Recipe(
        name="s4d-names",
        family=ssm,
        summary="diagonal state space model of first names",
        model={
            "cell": "s4d",
            "d_model": 96,
            "n_layers": 4,
            "d_state": 16,
            "d_hidden": 128,
            "dt_min": 0.05,
            "dt_max": 0.9,
            "dropout": 0.1,
        },
        # Of 10,000 steps, the validation split was at its best after 6,000.
        **_as("transformer-names", steps=6_000),
        tiny={**_TINY, "n_layers": 1, "d_state": 4, "d_hidden": 6},
    ),
    Recipe(
        name="mamba-shakespeare",
        family=ssm,
        summary="Mamba-2 of Shakespeare's plays, of the size of transformer-shakespeare",
        model={"cell": "mamba2", "d_model": 168, "n_layers": 4},
        **_as("transformer-shakespeare"),
        tiny=_TINY_MAMBA,
    ),
    Recipe(
        name="mingru-shakespeare",
        family=ssm,
        summary="minGRU of Shakespeare's plays, of the size of transformer-shakespeare",
        model={"cell": "mingru", "d_model": 128, "n_layers": 4, "d_inner": 168},
        **_as("transformer-shakespeare"),
        tiny={**_TINY, "d_inner": 6, "d_hidden": 6},
    ),
    Recipe(
        name="mamba-jsb",
        family=ssm,
        summary="Mamba-2 of Bach's chorales",
        # With a dropout of 0.3, or more steps, it knows the 229 pieces and forgets the others.
        model={"cell": "mamba2", "d_model": 96, "n_layers": 3, "dropout": 0.5},
        **_as("lstm-jsb", steps=600, learning_rate=3e-3),
        tiny=_TINY_MAMBA,
    ),
)
