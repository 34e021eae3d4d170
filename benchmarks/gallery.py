"""Pictures with samples of every recipe, from the run folders that `python -m benchmarks results
--keep FOLDER` left.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import RESULTS
from genjax.data.view import as_image, view_of
from genjax.errors import ConfigError
from genjax.runs import pictures, samples
from genjax.runs.load import Loaded, load
from genjax.runs.samples import picture_cond, picture_sampler
from genjax.zoo import ZOO, flows, pixel, ssm

# A picture for the rows of some files of the zoo, and one for all others.
EXACT = [row.name for part in (flows, pixel, ssm) for row in part.ROWS]
PICTURES = {
    "gallery.png": [name for name in ZOO if name not in EXACT],
    "gallery_exact.png": EXACT,
}
COLUMNS = 4
TEXTS, LINES, WIDTH = 26, 26, 38  # in a panel of text: samples, lines and characters a line
SHOWN = {"points": 1000, "text": TEXTS, "music": 1}  # samples in a panel; 100 of other data


def main(keep: Path) -> None:
    """Draw `PICTURES`, a panel for each recipe that has a run of seed 0 in `keep`; a picture none
    of whose recipes has one stays as it is.

    Raises:
        ConfigError: if no recipe has a run.
    """
    folders = {name: keep / f"{name}_seed0" for name in ZOO}
    have = {name: folder for name, folder in folders.items() if (folder / "config.json").exists()}
    if not have:
        raise ConfigError(
            f"No recipe has a run in {keep}, such as {folders['vae']}; the pictures were left as "
            "they are."
        )
    for file, names in PICTURES.items():
        some = {name: have[name] for name in names if name in have}
        if some:
            _draw(some, RESULTS / file)


def _draw(folders: dict[str, Path], path: Path) -> None:
    rows = -(-len(folders) // COLUMNS)
    figure = Figure(figsize=(3.0 * COLUMNS, 3.3 * rows), layout="constrained")
    for index, (name, folder) in enumerate(folders.items()):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        _panel(axes, load(folder))
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    pictures.save(figure, path, dpi=110)
    print(f"written: {path}")


def _panel(axes: Any, loaded: Loaded) -> None:
    spec = loaded.model.spec
    n = SHOWN.get(view_of(spec), 100)
    cond = picture_cond(spec, n)
    if cond is not None:
        # Of classes with names for texts there may be more than there is room for.
        cond = cond[np.linspace(0, len(cond) - 1, min(n, len(cond))).astype(int)]
        n = len(cond)
    draw = jax.jit(picture_sampler(loaded.model), static_argnums=3)
    x = np.asarray(draw(loaded.params, loaded.state, jax.random.key(0), n, cond))
    x, spec = as_image(x, spec)
    view = view_of(spec)
    if view == "image":
        axes.imshow(
            pictures.tiles(x, spec, columns=10).squeeze(),
            cmap="gray",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
    elif view == "text":
        lines = [
            line for text in samples.texts(x, spec) for line in text.splitlines() if line.strip()
        ]
        shown = "\n".join(
            line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines[:LINES]
        )
        axes.text(
            0.02, 0.98, shown, family="monospace", fontsize=6.5, va="top", transform=axes.transAxes
        )
    elif view in ("music", "sequence"):
        axes.imshow(
            x[0].reshape(x.shape[1], -1).T,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="Blues",
            vmin=0,
        )
    else:
        axes.scatter(x[:, 0], x[:, 1], s=2, color=pictures.COLORS[1], alpha=0.5, linewidths=0)
        axes.set_aspect("equal")
