"""Runs side by side: the settings in which they differ, their figures, and their curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genjax.errors import ConfigError, reading, regular_file
from genjax.runs import pictures
from genjax.runs.folder import completed, is_there, read_config, read_json
from genjax.runs.identity import read_files
from genjax.runs.json_text import metrics_in
from genjax.zoo.recipe import flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "-"


class Compared(NamedTuple):
    """What there is to compare of one run.

    Attributes:
        name: what it is called here.
        settings: by path, such as "model.hidden".
        reports: what `genjax evaluate` has written, by the name of the file.
        lines: of metrics.jsonl.
    """

    name: str
    settings: dict[str, Any]
    reports: dict[str, dict[str, Any]]
    lines: list[dict[str, Any]]


def read(folders: Sequence[Path]) -> list[Compared]:
    """What there is to compare of some runs, each under its shortest name that no other has.

    Raises:
        ConfigError: for fewer than two folders, one that is no run or is there twice, or a file in
            it that is damaged.
    """
    if len(folders) < 2:
        raise ConfigError("compare takes two run folders or more.")
    real = [folder.resolve() for folder in folders]
    for folder in folders:
        if real.count(folder.resolve()) > 1:
            raise ConfigError(f"{folder} is given twice: name each run once.")
    depth = 1
    while len({path.parts[-depth:] for path in real}) < len(real):
        depth += 1
    names = ["/".join(path.parts[-depth:]) for path in real]
    return [one(folder, name) for folder, name in zip(folders, names, strict=True)]


def one(folder: Path, name: str) -> Compared:
    """What there is to compare of a run.

    Raises:
        ConfigError: for a folder that is no run, or a file in it that is damaged.
    """
    settings = flatten(completed(read_config(folder)))
    if hashes := [str(_get(file, "sha256"))[:12] for file in read_files(folder) or ()]:
        settings["SHA-256 of the data"] = hashes
    paths = sorted(folder.glob("report*.json"))
    log, lines = folder / "metrics.jsonl", []
    if is_there(log):
        regular_file(log)
        with reading(log, ConfigError):
            lines = metrics_in(log.read_bytes())[0]
    return Compared(name, settings, {path.stem: read_json(path) for path in paths}, lines)


def differing(runs: Sequence[Compared]) -> list[list[str]]:
    """The settings that are not the same in all runs: a row each, its path and what it is in each
    run.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name, MISSING) for run in runs]
        if any(value != values[0] for value in values):
            shown = [_text(value) for value in values]
            exact = [value if isinstance(value, str) else repr(value) for value in values]
            rows.append([name, *(shown if len(set(shown)) > 1 else exact)])
    return rows


def figures(runs: Sequence[Compared]) -> list[list[str]]:
    """What the runs are worth: a row for each report, with what it was measured on; and the best
    value that the log has of the validation split, where there is no report.

    Rows: run, figure, value with its standard error, data, split, n, step, report.
    """
    rows = []
    for run in runs:
        for name, report in run.reports.items():
            rows += figures_of(run.name, name, report)
        if not run.reports:
            rows += _logged(run)
    return rows


def figures_of(run: str, name: str, report: Mapping[str, Any]) -> list[list[str]]:
    """The rows of one report, which is called `name`."""
    where = [_text(report.get(key, MISSING)) for key in ("data", "split", "n")]
    step = [f"{_text(report.get('step', MISSING))} ({report.get('which', 'newest')})", name]
    rows = []
    listed = report.get("figures")
    listed = listed if isinstance(listed, list) else []
    if not listed or report.get("kind") != _get(listed[0], "name"):
        value = _with_error(report.get("mean"), report.get("standard_error"))
        kind = f"{_text(report.get('kind', MISSING))}, {_text(report.get('unit', MISSING))}"
        rows.append([run, kind, value, *where, *step])
    for one in listed:
        value = _with_error(_get(one, "value"), _get(one, "standard_error"))
        kind = f"{_text(_get(one, 'name'))}, {_text(_get(one, 'unit'))}"
        rows.append([run, kind, value, *where[:2], _text(_get(one, "n_reference")), *step])
    return rows


def _get(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, dict) else None


def _logged(run: Compared) -> list[list[str]]:
    """The best values of the log, of a run that was never evaluated."""
    rows = []
    names = {name for line in run.lines for name in line if name.startswith("valid/")}
    for name in sorted(names):
        found = [(line[name], line["step"]) for line in run.lines if name in line]
        alone = [one for one in found if isinstance(one[0], (int, float)) and one[0] == one[0]]
        if alone:
            value, step = max(alone)
            text = f"{value:.4f} (the best of {len(alone)}, so too good)"
            rows.append([run.name, name, text, MISSING, "valid", MISSING, str(step), "the log"])
    return rows


def incomparable(runs: Sequence[Compared]) -> list[str]:
    """Why figures of the same report are not to be compared, a line for each reason."""
    said = []
    for name in dict.fromkeys(name for run in runs for name in run.reports):
        reports = [run.reports[name] for run in runs if name in run.reports]
        for what in ("kind", "data", "n", "estimator", "seed"):
            values = dict.fromkeys(_text(report.get(what, MISSING)) for report in reports)
            if len(values) > 1:
                said.append(f"{name} is not of the same {what}: {'; '.join(values)}")
        files = [report.get("files") for report in reports]
        hashes = [
            tuple(str(_get(one, "sha256")) for one in listed) if isinstance(listed, list) else ()
            for listed in files
        ]
        if len(set(hashes)) > 1:
            said.append(f"{name} is not of the same files of data")
    return said


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value)) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_error(value: Any, error: Any) -> str:
    if not isinstance(value, (int, float)):
        return MISSING
    return f"{value:.4f}" if not isinstance(error, (int, float)) else f"{value:.4f} ± {error:.4f}"


def curves(runs: Sequence[Compared]) -> "Figure | None":
    """The curves of the runs, a panel for each metric that two of them have; None without any."""
    of_run = [{name for line in run.lines for name in line} for run in runs]
    counted = [name for names in of_run for name in names if pictures.is_metric(name)]
    names = sorted({name for name in counted if counted.count(name) > 1})
    if not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    picture = pictures.empty(4.6 * columns, 3.1 * rows, layout="constrained")
    for index, name in enumerate(names):
        axes = picture.add_subplot(rows, columns, index + 1)
        lines = [
            {"step": line["step"], run.name: line[name]}
            for run in runs
            for line in run.lines
            if name in line
        ]
        lines.sort(key=lambda line: line["step"])
        pictures.draw_curves(axes, lines, [run.name for run in runs if _has(run, name)])
        axes.set_title(name, fontsize=9)
    return picture


def _has(run: Compared, name: str) -> bool:
    return any(name in line for line in run.lines)
