"""Pictures: grids of images, scatters over a density, and learning curves. Everything is drawn
without a display.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genjax.errors import replacing
from genjax.protocol import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour-blind-safe order (Okabe & Ito 2008) for every line in every picture.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

LOG_PROBABILITIES = ("elbo", "iwae", "bound", "log_prob")


def empty(width: float, height: float, layout: str | None = None) -> "Figure":
    """A figure of so many inches. matplotlib is imported with the first, so that training need not
    wait for it.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]


def save(figure: "Figure", path: Path | str, dpi: int = 150) -> Path:
    """Write a figure as PNG, whole or not at all.

    Raises:
        CheckpointError: if the disk does not take it; what was there before stays.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    # A layout engine has fitted everything in already; to look for the edges again would draw it
    # all twice.
    box = None if figure.get_layout_engine() else "tight"
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_figure(
            temporary, dpi=dpi, format="png", bbox_inches=box, facecolor="white"
        )
    return path


def is_image(spec: DataSpec) -> bool:
    """Whether events are images: (height, width, 1 or 3)."""
    return len(spec.shape) == 3 and spec.shape[-1] in (1, 3)


def rows_as_images(x: np.ndarray, spec: DataSpec) -> tuple[np.ndarray, DataSpec]:
    """Images that come row by row, [n, height, width], as images and their spec; anything else as
    it is.
    """
    if spec.step == "row" and len(spec.shape) == 2:
        return x[..., None], dataclasses.replace(spec, shape=(*spec.shape, 1), step=None)
    return x, spec


def tile(x: np.ndarray, spec: DataSpec, columns: int) -> np.ndarray:
    """Images [n, height, width, channels], in the units of the data, as one image in [0, 1], row by
    row with white gaps.
    """
    n, height, width, channels = x.shape
    rows = math.ceil(n / columns)
    low, high = (
        (0.0, float((spec.levels or 2) - 1))
        if spec.kind != "continuous"
        else (float(x.min()), float(x.max()))
    )
    unit = np.clip((x - low) / max(high - low, 1e-12), 0, 1)
    canvas = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, channels))
    for index, image in enumerate(unit):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    return canvas


def image_grid(
    x: np.ndarray,
    spec: DataSpec,
    title: str = "",
    columns: int | None = None,
    labels: Sequence[str] = (),
) -> "Figure":
    """Images [n, height, width, channels], in the units of the data, row by row with a gap of one
    pixel.

    Args:
        columns: images a row; the square root of n, rounded up, unless given.
        labels: one text for each row, such as the class it shows.
    """
    n, height, width, _ = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    figure, axes = _picture(tile(x, spec, columns), width, height, columns, rows)
    axes.set_xticks([])
    axes.set_yticks(
        [(row + 0.5) * (height + 1) for row in range(rows)] if labels else [], labels or []
    )
    if title:
        axes.set_title(title, fontsize=9)
    return figure


def _picture(
    canvas: np.ndarray, width: int, height: int, columns: int, rows: int
) -> "tuple[Figure, Any]":
    """A figure that shows tiles of so many pixels, and its axes, which have no frame and no ticks'
    lines.
    """
    inches = 0.55 if width > 16 else 0.42
    figure = empty(inches * columns + 0.3, inches * rows * height / width + 0.3)
    axes = figure.add_subplot()
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def scatter(
    points: np.ndarray, log_prob: Callable[[np.ndarray], Any] | None = None, title: str = ""
) -> "Figure":
    """Points [n, 2], over the true density where it is known (`log_prob` in nats)."""
    figure = empty(4.2, 4.2)
    axes = figure.add_subplot()
    if log_prob is not None:
        _density(axes, log_prob, 1.15 * max(float(np.quantile(np.abs(points), 0.995)), 1e-3))
    axes.scatter(points[:, 0], points[:, 1], s=2, color=COLORS[1], alpha=0.5, linewidths=0)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=9)
    return figure


def _density(axes: Any, log_prob: Callable[[np.ndarray], Any], half: float) -> None:
    """A density over [-half, half]², behind points; its square root shows where it is small but not
    zero.
    """
    line = np.linspace(-half, half, 220, dtype=np.float32)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    density = np.exp(np.asarray(log_prob(grid))).reshape(220, 220)
    axes.imshow(
        np.sqrt(density), extent=(-half, half, -half, half), origin="lower", cmap="Blues", alpha=0.6
    )
    axes.set_xlim(-half, half)
    axes.set_ylim(-half, half)


def samples(
    x: np.ndarray,
    spec: DataSpec,
    title: str = "",
    log_prob: Callable[[np.ndarray], Any] | None = None,
    labels: np.ndarray | None = None,
) -> "Figure | None":
    """The picture that fits the data: an image grid (a row for each class given `labels`), a
    scatter, sequences, or None.

    The rows of an image, one after the other, are shown as that image.
    """
    x, spec = rows_as_images(x, spec)
    if is_image(spec):
        if labels is not None and len(set(labels.tolist())) > 1:
            order = np.argsort(labels, kind="stable")
            classes, counts = np.unique(labels, return_counts=True)
            if len(set(counts.tolist())) == 1:
                names = [spec.class_names[c] if spec.class_names else str(c) for c in classes]
                return image_grid(x[order], spec, title, columns=int(counts[0]), labels=names)
        return image_grid(x, spec, title)
    if spec.shape == (2,):
        return scatter(x, log_prob, title)
    if spec.step is not None:
        return sequences(x, spec, title)
    return None


def sequences(x: np.ndarray, spec: DataSpec, title: str = "", at_most: int = 8) -> "Figure":
    """Sequences [n, T, *event] against the step: real vectors as lines, others as a raster of their
    values.

    Tokens are one raster with a row for each sequence; vectors get a panel for each of the first
    `at_most` sequences.
    """
    if spec.kind == "tokens":
        figure = empty(7.0, 0.5 + 0.12 * min(len(x), 64), layout="constrained")
        axes = figure.add_subplot()
        shown = axes.imshow(
            x[:64],
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=0,
            vmax=(spec.levels or 2) - 1,
        )
        figure.colorbar(shown, label="token")
        axes.set_ylabel("sequence", fontsize=8)
        panels = [axes]
    else:
        flat = x[:at_most].reshape(min(len(x), at_most), x.shape[1], -1)
        figure = empty(7.0, 0.6 + 1.3 * len(flat), layout="constrained")
        panels = list(np.ravel(figure.subplots(len(flat), 1, sharex=True)))
        for axes, one in zip(panels, flat, strict=True):
            if spec.kind == "continuous":
                for color, values in zip(COLORS * 9, one.T, strict=False):
                    axes.plot(values, color=color, lw=1.0)
                axes.grid(alpha=0.25)
            else:
                axes.imshow(
                    one.T,
                    aspect="auto",
                    origin="lower",
                    interpolation="nearest",
                    cmap="Blues",
                    vmin=0,
                )
    for axes in panels:
        axes.tick_params(labelsize=7)
    panels[-1].set_xlabel(spec.step or "step", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def film(
    x: np.ndarray,
    spec: DataSpec,
    title: str = "",
    log_prob: Callable[[np.ndarray], Any] | None = None,
    labels: Sequence[str] = (),
    at_most: int = 11,
) -> "Figure | None":
    """A film strip of paths from noise to data, x [steps + 1, n, *shape]: columns are times, named
    by the step.

    Images have a row for each sample, and each column its own grey scale only if the data are
    continuous: values outside their range are cut off, as noise is. Points [n, 2] are one scatter a
    column, all on the same scale. None for other data.

    Args:
        log_prob: the true density of points, drawn behind them.
        labels: one text for each sample, such as its class.
        at_most: so many times are shown, evenly spaced, the first and the last among them.
    """
    shown = np.unique(np.round(np.linspace(0, len(x) - 1, min(at_most, len(x)))).astype(int))
    names = [f"{index}" for index in shown]
    if is_image(spec):
        n, (height, width, channels) = x.shape[1], spec.shape
        strip = np.ones((n * (height + 1) + 1, len(shown) * (width + 1) + 1, channels))
        for column, index in enumerate(shown):
            left = column * (width + 1)
            strip[:, left : left + width + 2] = tile(x[index], spec, 1)
        figure, axes = _picture(strip, width, height, len(shown), n)
        axes.set_xticks([(column + 0.5) * (width + 1) for column in range(len(shown))], names)
        axes.set_yticks(
            [(row + 0.5) * (height + 1) for row in range(n)] if labels else [], labels or []
        )
        axes.set_xlabel(f"step of {len(x) - 1}", fontsize=8)
        if title:
            axes.set_title(title, fontsize=9)
        return figure
    if spec.shape != (2,):
        return None
    figure = empty(1.6 * len(shown) + 0.2, 2.2, layout="constrained")
    half = 1.15 * max(float(np.quantile(np.abs(x[shown]), 0.995)), 1e-3)
    for axes, index, name in zip(
        np.ravel(figure.subplots(1, len(shown))), shown, names, strict=True
    ):
        if log_prob is not None:
            _density(axes, log_prob, half)
        axes.scatter(x[index, :, 0], x[index, :, 1], s=2, color=COLORS[1], alpha=0.5, linewidths=0)
        axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])
        axes.set_xlabel(name, fontsize=8)
    figure.supxlabel(f"step of {len(x) - 1}", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def curves(lines: Sequence[dict[str, Any]], title: str = "") -> "Figure":
    """Learning curves from the lines of metrics.jsonl: a panel for each metric, against the
    optimiser step.

    Metrics with the same last name, "gen/loss" and "disc/loss", share a panel, and so do all that
    estimate or bound the log-probability, of whichever split. The members of an ensemble or sweep
    are one line each.
    """
    names = sorted({name for line in lines for name in line} - {"step", "seconds"})
    panels: dict[str, list[str]] = {}
    for name in names:
        last = name.rsplit("/", 1)[-1]
        panels.setdefault(
            "log-probability (nats)" if last in LOG_PROBABILITIES else last, []
        ).append(name)
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = empty(4.2 * columns, 2.9 * rows, layout="constrained")
    for index, (panel, members) in enumerate(sorted(panels.items())):
        axes = figure.add_subplot(rows, columns, index + 1)
        for color, name in zip(COLORS * 9, members, strict=False):
            have = [line for line in lines if name in line]
            steps, values = (
                [line["step"] for line in have],
                np.asarray([line[name] for line in have], float),
            )
            axes.plot(steps, values, color=color, lw=1.2, alpha=0.5 if values.ndim > 1 else 1.0)
            axes.plot([], [], color=color, label=name)
        # The first few values are often far off and would flatten everything that matters.
        late = np.concatenate(
            [
                np.ravel([line[m] for line in lines[len(lines) // 20 :] if m in line])
                for m in members
            ]
        )
        late = late[np.isfinite(late)]
        if late.size and late.max() > late.min():
            pad = 0.08 * (late.max() - late.min())
            axes.set_ylim(late.min() - pad, late.max() + pad)
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if len(members) > 1:
            axes.legend(fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut short by a crash is left out."""
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
