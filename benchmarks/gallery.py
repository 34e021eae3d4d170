"""One picture with samples of every recipe, from the run folders that `python -m benchmarks results --keep FOLDER` left."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from genjax import figures, run
from genjax.zoo import ZOO

COLUMNS = 4


def main(keep: Path) -> None:
    """Draw results/gallery.png: a panel for each recipe that has a run of seed 0 in `keep`."""
    folders = {name: keep / f"{name}_seed0" for name in ZOO}
    have = {name: folder for name, folder in folders.items() if (folder / "config.json").exists()}
    rows = -(-len(have) // COLUMNS)
    figure = Figure(figsize=(3.0 * COLUMNS, 3.3 * rows), layout="constrained")
    for index, (name, folder) in enumerate(have.items()):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        _panel(axes, run.load(folder))
        axes.set_title(f"{name}: {ZOO[name].summary}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figures.save(figure, RESULTS / "gallery.png", dpi=110)
    print(f"written: {RESULTS / 'gallery.png'}")


def _panel(axes: Any, loaded: run.Loaded) -> None:
    spec, n = loaded.model.spec, 1000 if loaded.model.spec.shape == (2,) else 100
    cond = run.picture_cond(spec, n)
    draw = jax.jit(run.picture_sampler(loaded.model), static_argnums=3)
    x = np.asarray(draw(loaded.params, loaded.state, jax.random.key(0), n, cond))
    if figures.is_image(spec):
        axes.imshow(figures.tile(x, spec, columns=10).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.scatter(x[:, 0], x[:, 1], s=2, color=figures.COLORS[1], alpha=0.5, linewidths=0)
        axes.set_aspect("equal")
