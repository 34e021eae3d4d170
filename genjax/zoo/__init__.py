"""The zoo: NAME -> recipe. The command line, the tests, the benchmarks and the README all read this
one table.

To add a row: write the family's file, then a `Recipe` in the file of its group here. `tiny` makes
the model small enough for the conformance gates of `tests/test_gates.py`, which every row has to
pass. `python -m genjax.zoo.catalogue` then counts its parameters for `genjax list`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genjax.zoo.recipe import Recipe

    ZOO: dict[str, Recipe]

__all__ = ["ZOO"]


def _rows() -> "dict[str, Recipe]":
    from genjax.zoo import composed, denoising, flows, gan, pixel, scale, sequences, ssm, vae

    groups = (
        vae.ROWS,
        gan.ROWS,
        sequences.ROWS,
        ssm.ROWS,
        flows.ROWS,
        pixel.ROWS,
        denoising.ROWS,
        scale.ROWS,
        composed.ROWS,
    )
    return {row.name: row for group in groups for row in group}


def __getattr__(name: str) -> Any:
    """`ZOO` when it is first used: its families take a second to import, which `genjax list` does
    not need.
    """
    if name != "ZOO":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    return globals().setdefault("ZOO", _rows())
