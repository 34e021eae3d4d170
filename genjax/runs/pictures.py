"""Pictures: tiles of images, scatters over a density, and learning curves. Everything is drawn
without a display.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genjax.data.view import as_image, view_of
from genjax.errors import replacing
from genjax.protocol import DataSpec
from genjax.runs.json_text import metrics_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour-blind-safe order (Okabe & Ito 2008) for every line in every picture.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

SPEED = "speed/"  # of the names of figures that are of the clock
DOT = 5.0  # data that many times narrower than what else a panel shows are a dot in it
LOG_PROBABILITIES = ("elbo", "iwae", "bound", "log_prob")


def empty(width: float, height: float, layout: str | None = None) -> "Figure":
    """A picture of so many inches. matplotlib is imported with the first, so that training need not
    wait for it.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]


def save(picture: "Figure", path: Path | str, dpi: int = 150) -> Path:
    """Write a picture as PNG, whole or not at all.

    Raises:
        CheckpointError: if the disk does not take it; what was there before stays.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    path = Path(path)
    for text in picture.findobj(Text):  # names of columns and classes are no formulas
        text.set_parse_math(False)  # type: ignore[attr-defined]
    # A layout engine has fitted everything in already; to look for the edges again would draw it
    # all twice.
    box = None if picture.get_layout_engine() else "tight"
    with replacing(path) as temporary:
        FigureCanvasAgg(picture).print_figure(
            temporary, dpi=dpi, format="png", bbox_inches=box, facecolor="white"
        )
    return path


def tiles(x: np.ndarray, spec: DataSpec, columns: int) -> np.ndarray:
    """Images [n, height, width, channels], in the units of the data, as one image in [0, 1], row by
    row with white gaps.
    """
    n, height, width, channels = x.shape
    rows = math.ceil(n / columns)
    low, high = 0.0, spec.top
    if high is None:
        low, high = float(x.min()), float(x.max())
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
    picture, axes = _tiled(tiles(x, spec, columns), width, height, columns, rows)
    axes.set_xticks([])
    _label_rows(axes, labels, height)
    if title:
        axes.set_title(title, fontsize=9)
    return picture


def _tiled(
    canvas: np.ndarray, width: int, height: int, columns: int, rows: int
) -> "tuple[Figure, Any]":
    """A picture that shows tiles of so many pixels, and its axes, which have no frame and no ticks'
    lines.
    """
    inches = 0.55 if width > 16 else 0.42
    picture = empty(inches * columns + 0.3, inches * rows * height / width + 0.3)
    axes = picture.add_subplot()
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    return picture, axes


def _label_rows(axes: Any, labels: Sequence[str], height: int) -> None:
    """A text beside each row of tiles of so many pixels."""
    axes.set_yticks([(row + 0.5) * (height + 1) for row in range(len(labels))], labels)


def scatter(
    points: np.ndarray, log_prob: Callable[[np.ndarray], Any] | None = None, title: str = ""
) -> "Figure":
    """Points [n, 2], over the true density where it is known (`log_prob` in nats)."""
    picture = empty(4.2, 4.2)
    axes = picture.add_subplot()
    if log_prob is not None:
        _density(axes, log_prob, _reach(points))
    axes.scatter(points[:, 0], points[:, 1], s=2, color=COLORS[1], alpha=0.5, linewidths=0)
    if log_prob is None:
        _crop(axes, points)
    else:
        axes.set_aspect("equal")
    axes.set_title(title, fontsize=9)
    return picture


def _crop(axes: Any, points: np.ndarray) -> None:
    """Limits that show nearly all points [..., 2], with one scale for both axes unless one of them
    would be a line.
    """
    low, high = np.quantile(points.reshape(-1, 2), (0.0025, 0.9975), axis=0)
    size = np.maximum(high - low, 1e-12 + 1e-6 * np.abs(high))
    if max(size) < 10 * min(size):
        size = np.full(2, max(size))
        axes.set_aspect("equal")
    centre = (low + high) / 2
    for limits, middle, width in zip((axes.set_xlim, axes.set_ylim), centre, size, strict=True):
        limits(middle - 0.575 * width, middle + 0.575 * width)


def _reach(points: np.ndarray) -> float:
    """How far a square around 0 must reach to show nearly all points."""
    return 1.15 * max(float(np.quantile(np.abs(points), 0.995)), 1e-3)


def _density(axes: Any, log_prob: Callable[[np.ndarray], Any], half: float) -> None:
    """A density over [-half, half]², behind points; its square root shows where it is small but not
    zero.
    """
    line = np.linspace(-half, half, 220, dtype=np.float32)
    square = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    density = np.exp(np.asarray(log_prob(square))).reshape(220, 220)
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
    """The picture that fits the data: images (a row for each class given `labels`), a scatter,
    sequences, or None.

    The rows of an image, one after the other, are shown as that image.
    """
    x, spec = as_image(x, spec)
    view = view_of(spec)
    if view == "image":
        return _by_class(x, spec, title, labels)
    if view == "points":
        picture = scatter(x, log_prob, title)
        if spec.columns is not None:
            picture.axes[0].set(xlabel=spec.columns[0], ylabel=spec.columns[1])
        return picture
    if view == "vectors":
        return histograms(x, spec, title)
    return None if view == "nothing" else sequences(x, spec, title)


def histograms(x: np.ndarray, spec: DataSpec, title: str = "", at_most: int = 12) -> "Figure":
    """Vectors [n, D]: how the values of each of the first `at_most` columns are distributed."""
    shown = min(x.shape[1], at_most)
    columns = min(4, shown)
    rows = math.ceil(shown / columns)
    picture = empty(2.3 * columns, 0.4 + 1.6 * rows, layout="constrained")
    for index in range(shown):
        axes = picture.add_subplot(rows, columns, index + 1)
        bins: Any = 40
        if spec.top is not None and spec.top < 64:
            bins = np.arange(spec.top + 2) - 0.5
        axes.hist(x[:, index], bins=bins, color=COLORS[0])
        called = f"column {index}" if spec.columns is None else spec.columns[index]
        axes.set_title(called, fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
    more = f" (the first {shown} of {x.shape[1]} columns)" if shown < x.shape[1] else ""
    picture.suptitle(title + more, fontsize=9)
    return picture


def _by_class(x: np.ndarray, spec: DataSpec, title: str, labels: np.ndarray | None) -> "Figure":
    """Images with a row for each class, where there are several and of each as many."""
    if labels is None:
        return image_grid(x, spec, title)
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or len(set(counts.tolist())) > 1:
        return image_grid(x, spec, title)
    names = [class_name(spec, label) for label in classes]
    order = np.argsort(labels, kind="stable")
    return image_grid(x[order], spec, title, columns=int(counts[0]), labels=names)


def class_name(spec: DataSpec, label: int) -> str:
    """What a class is called."""
    return str(int(label)) if spec.class_names is None else spec.class_names[int(label)]


def sequences(x: np.ndarray, spec: DataSpec, title: str = "", at_most: int = 8) -> "Figure":
    """Sequences [n, T, *event] against the step: real vectors as lines, others as a raster of their
    values.

    Tokens are one raster with a row for each sequence; vectors get a panel for each of the first
    `at_most` sequences.
    """
    if spec.kind == "tokens":
        picture = empty(7.0, 0.5 + 0.12 * min(len(x), 64), layout="constrained")
        panels = [picture.add_subplot()]
        _token_raster(picture, panels[0], x[:64], spec)
    else:
        flat = x[:at_most].reshape(min(len(x), at_most), x.shape[1], -1)
        picture = empty(7.0, 0.6 + 1.3 * len(flat), layout="constrained")
        panels = list(np.ravel(picture.subplots(len(flat), 1, sharex=True)))
        for axes, one in zip(panels, flat, strict=True):
            _vectors(axes, one, spec)
    for axes in panels:
        axes.tick_params(labelsize=7)
    panels[-1].set_xlabel(spec.step or "step", fontsize=8)
    if title:
        picture.suptitle(title, fontsize=9)
    return picture


def _token_raster(picture: "Figure", axes: Any, x: np.ndarray, spec: DataSpec) -> None:
    """Tokens [n, T] as colours."""
    shown = axes.imshow(
        x, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=spec.top
    )
    picture.colorbar(shown, label="token")
    axes.set_ylabel("sequence", fontsize=8)


def _vectors(axes: Any, x: np.ndarray, spec: DataSpec) -> None:
    """One sequence of vectors [T, D]: lines, or a raster of values that are not continuous."""
    if spec.kind != "continuous":
        raster = {"origin": "lower", "interpolation": "nearest", "cmap": "Blues", "vmin": 0}
        axes.imshow(x.T, aspect="auto", **raster)
        return
    for color, values in zip(COLORS * 9, x.T, strict=False):
        axes.plot(values, color=color, lw=1.0)
    axes.grid(alpha=0.25)


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
    column, all on the same scale; where noise is so wide that the data would be a dot, each on its
    own, whose factor over the last one's is named. None for other data.

    Args:
        log_prob: the true density of points, drawn behind them.
        labels: one text for each sample, such as its class.
        at_most: so many times are shown, evenly spaced, the first and the last among them.
    """
    shown = np.unique(np.round(np.linspace(0, len(x) - 1, min(at_most, len(x)))).astype(int))
    x, spec = as_image(x, spec)
    view = view_of(spec)
    if view == "image":
        return _film_of_images(x, spec, shown, title, labels)
    return _film_of_points(x, shown, title, log_prob) if view == "points" else None


def _film_of_images(
    x: np.ndarray, spec: DataSpec, shown: np.ndarray, title: str, labels: Sequence[str]
) -> "Figure":
    """The times `shown` of x [steps + 1, n, *shape], a column each."""
    n, (height, width, channels) = x.shape[1], spec.shape
    strip = np.ones((n * (height + 1) + 1, len(shown) * (width + 1) + 1, channels))
    for column, index in enumerate(shown):
        left = column * (width + 1)
        strip[:, left : left + width + 2] = tiles(x[index], spec, 1)
    picture, axes = _tiled(strip, width, height, len(shown), n)
    middles = [(column + 0.5) * (width + 1) for column in range(len(shown))]
    axes.set_xticks(middles, [f"{index}" for index in shown])
    _label_rows(axes, labels, height)
    axes.set_xlabel(f"step of {len(x) - 1}", fontsize=8)
    if title:
        axes.set_title(title, fontsize=9)
    return picture


def _film_of_points(
    x: np.ndarray,
    shown: np.ndarray,
    title: str,
    log_prob: Callable[[np.ndarray], Any] | None,
) -> "Figure":
    """The times `shown` of x [steps + 1, n, 2], a scatter each, all on the same scale or, where
    they shrink by more than `DOT`, each on its own.
    """
    last = _reach(x[-1])
    factors = [max(_reach(x[index]) / last, 1.0) for index in shown]
    alike = max(factors) <= DOT
    picture = empty(1.6 * len(shown) + 0.2, 2.2, layout="constrained")
    panels = np.ravel(picture.subplots(1, len(shown)))
    for axes, index, factor in zip(panels, shown, factors, strict=True):
        if log_prob is not None:
            half = _reach(x[shown]) if alike else factor * last
            _density(axes, log_prob, half)
            axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
        else:
            _crop(axes, x[shown] if alike else x[index])
        axes.scatter(x[index, :, 0], x[index, :, 1], s=2, color=COLORS[1], alpha=0.5, linewidths=0)
        axes.set(xticks=[], yticks=[])
        scale = "" if alike else f"\n{factor:.{0 if factor >= 10 else 1}f}x"
        axes.set_xlabel(f"{index}{scale}", fontsize=8)
    picture.supxlabel(f"step of {len(x) - 1}", fontsize=8)
    if title:
        picture.suptitle(title, fontsize=9)
    return picture


def curves(lines: Sequence[dict[str, Any]], title: str = "") -> "Figure":
    """Learning curves from the lines of metrics.jsonl: a panel for each metric, against the
    optimiser step.

    Metrics with the same last name, "gen/loss" and "disc/loss", share a panel, and so do all that
    estimate or bound the log-probability, of whichever split. The members of an ensemble or sweep
    are one line each.
    """
    panels: dict[str, list[str]] = {}
    for name in sorted({name for line in lines for name in line if is_metric(name)}):
        panels.setdefault(_panel_of(name), []).append(name)
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    picture = empty(4.2 * columns, 2.9 * rows, layout="constrained")
    for index, (panel, names) in enumerate(sorted(panels.items())):
        axes = picture.add_subplot(rows, columns, index + 1)
        draw_curves(axes, lines, names)
        axes.set_title(panel, fontsize=9)
    if title:
        picture.suptitle(title, fontsize=10)
    return picture


def is_metric(name: str) -> bool:
    """Whether a figure of a line is one of the model, and none of the clock."""
    return name not in ("step", "seconds") and not name.startswith(SPEED)


def _panel_of(metric: str) -> str:
    """The title of the panel that shows a metric."""
    last = metric.rsplit("/", 1)[-1]
    return "log-probability (nats)" if last in LOG_PROBABILITIES else last


def draw_curves(axes: Any, lines: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Metrics against the step; those of members are fainter."""
    for color, name in zip(COLORS * 9, names, strict=False):
        have = [line for line in lines if name in line]
        values = np.asarray([line[name] for line in have], float)
        faint = 0.5 if values.ndim > 1 else 1.0
        axes.plot([line["step"] for line in have], values, color=color, lw=1.2, alpha=faint)
        axes.plot([], [], color=color, label=name)
    # The first few values are often far off and would flatten everything that matters.
    after = lines[len(lines) // 20 :]
    late = np.concatenate(
        [np.ravel([line[name] for line in after if name in line]) for name in names]
    )
    late = late[np.isfinite(late)]
    if late.size and late.max() > late.min():
        pad = 0.08 * (late.max() - late.min())
        axes.set_ylim(late.min() - pad, late.max() + pad)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if len(names) > 1:
        axes.legend(fontsize=7, frameon=False)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in the order of their steps; what is no line of metrics, such as
    a last one that was cut short by a crash, is left out.
    """
    return metrics_in(Path(path).read_bytes())[0]
