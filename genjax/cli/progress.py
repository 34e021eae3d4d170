"""What a person sees of a run while it goes on."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genjax.learning.loop import Progress

PLAIN_SECONDS = 5.0  # between two plain lines


def describe(metrics: dict[str, Any]) -> str:
    """The few numbers of a metrics line that a person wants to watch."""
    wanted = [
        name for name in metrics if name.endswith(("/loss", "/bound", "/log_prob", "skipped"))
    ]
    shown = []
    for name in wanted[:4]:
        value = metrics[name]
        if isinstance(value, list):  # the members of a sweep
            finite = [v for v in value if math.isfinite(v)]
            shown.append(
                f"{name} {min(finite):.3f} .. {max(finite):.3f}" if finite else f"{name} nan"
            )
        else:
            shown.append(f"{name} {value:.3f}")
    return "  ".join(shown)


@contextmanager
def console(name: str, plain: bool | None = None) -> Iterator[Progress]:
    """Progress as a bar with rate and time left on a terminal, elsewhere as one plain line every
    few seconds.

    Args:
        plain: True for lines, False for the bar; None looks whether standard error is a terminal.
    """
    if plain or (plain is None and not sys.stderr.isatty()):
        last, last_done = -math.inf, 0

        def line(step: int, steps: int, seconds: float, done: int, metrics: dict[str, Any]) -> None:
            nonlocal last, last_done
            if seconds - last < PLAIN_SECONDS and step < steps:
                return
            # The rate since the line before: that of the whole run would count the compilation for
            # a long time.
            rate = (done - last_done) / max(seconds - max(last, 0.0), 1e-9)
            left = f"{(steps - step) / max(rate, 1e-9):.0f} s left"
            print(
                f"{name}  step {step}/{steps}  {rate:.1f} steps/s  {left}  {describe(metrics)}",
                file=sys.stderr,
                flush=True,
            )
            last, last_done = seconds, done

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[metrics]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None, rate="compiling", metrics="")

        def draw(step: int, steps: int, seconds: float, done: int, metrics: dict[str, Any]) -> None:
            rate = f"{done / max(seconds, 1e-9):.1f} steps/s"
            bar.update(task, total=steps, completed=step, rate=rate, metrics=describe(metrics))

        yield draw
