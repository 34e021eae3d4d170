"""What a notebook shows of a run: what was trained on what, for how long, and its figures."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from genjax.errors import GenjaxError
from genjax.evaluation.estimates import count
from genjax.protocol import DataSpec
from genjax.runs import compare
from genjax.runs.load import Loaded

# Of a row of `compare.figures`, without the name of the run.
COLUMNS = ("figure", "value", "data", "split", "n", "step", "report")


def figures_in(folder: Path | None) -> list[list[str]]:
    """The figures in a run folder as `genjax compare` has them; none where it has none that can be
    read, since something is always to be shown.
    """
    if folder is None:
        return []
    try:
        return [row[1:] for row in compare.figures([compare.one(folder, "")])]
    except GenjaxError:
        return []


def figures_of(report: dict[str, Any]) -> list[list[str]]:
    """The figures of a report, as those of a folder."""
    return [row[1:] for row in compare.figures_of("", "evaluate()", report)]


def described(spec: DataSpec) -> str:
    """What the data look like, in a line."""
    parts = [f"{spec.kind} {list(spec.shape)}"]
    parts += [f"{spec.levels} levels"] if spec.levels is not None else []
    parts += [f"sequences of {spec.step}s"] if spec.step is not None else []
    parts += [f"{spec.n_classes} classes"] if spec.n_classes is not None else []
    parts += [f"conditions [{spec.cond_dim}]"] if spec.cond_dim is not None else []
    return f"{spec.name}: {', '.join(parts)}"


def page_of(
    spec: DataSpec,
    params: Any,
    step: int,
    loaded: Loaded | None,
    folder: Path | None,
    figures: Sequence[Sequence[str]],
) -> str:
    """HTML of a run, of a recipe if it was `loaded`; `figures` are those that no folder has."""
    title, facts, steps = "a model of one's own", [("data", described(spec))], str(step)
    if loaded is not None:
        recipe = loaded.recipe
        title = f"{recipe.name}: {recipe.summary}"
        facts = [("family", recipe.family.__name__), *facts]
        steps = f"{step} of {recipe.schedule.steps} (the {loaded.which} checkpoint)"
    facts += [("steps", steps), ("parameters", f"{count(params):,}")]
    facts += [] if folder is None else [("folder", str(folder))]
    return page(title, facts, [*figures_in(folder), *figures])


def page(title: str, facts: Iterable[tuple[str, str]], figures: Sequence[Sequence[str]]) -> str:
    """HTML of a run: a line for each fact, and a table of figures; everything escaped."""
    lines = [f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts]
    parts = [f"<b>{_text(title)}</b>", f"<table>{''.join(lines)}</table>"]
    if figures:
        head = "".join(f"<th>{_text(name)}</th>" for name in COLUMNS)
        rows = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in figures]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
    return f"<div>{''.join(parts)}</div>"


def _text(value: Any) -> str:
    return html.escape(str(value))
