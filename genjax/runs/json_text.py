"""JSON that everybody can read, and what to make of lines of it that anybody may have written."""

import json
import math
from typing import Any


def dumps(values: Any, indent: int | None = None) -> str:
    """Values as JSON, which has no NaN and no infinity: null stands for them.

    Raises:
        TypeError: for what is no JSON.
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return values


def metrics_in(data: bytes) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of a metrics.jsonl in the order of their steps, with NaN for null; and those that
    are none, which a crash, another program or a hand may have left.

    Of several lines of one step the last one counts, and the others are among the bad ones unless
    they say the same. So are lines with more or fewer members than the first.
    """
    found: dict[int, tuple[bytes, dict[str, Any]]] = {}
    bad = []
    for text in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        text = text.strip(b"\0 \t\r")  # a crash of the machine may leave zeros
        line = _metrics(text)
        if line is None:
            bad += [text] if text else []
            continue
        before, _ = found.get(line["step"], (text, None))
        bad += [before] if before != text else []
        found[line["step"]] = text, line
    lines: list[dict[str, Any]] = []
    members: dict[str, int | None] = {}
    for _, (text, line) in sorted(found.items()):
        own = {
            name: len(value) if isinstance(value, list) else None for name, value in line.items()
        }
        if any(members.get(name, number) != number for name, number in own.items()):
            bad.append(text)
            continue
        members |= own
        lines.append(line)
    return lines, bad


def _metrics(text: bytes) -> dict[str, Any] | None:
    """A line of metrics: a "step", and by name a number, or a list of them for members."""
    try:
        values = json.loads(text.decode("utf-8"))
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            return None
        line = {name: _metric(value) for name, value in values.items()}
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return None
    return line if 0 <= line["step"] < 2**63 else None


def _metric(value: Any) -> Any:
    """
    Raises:
        TypeError, OverflowError: for what is no metric.
    """
    if isinstance(value, list) and value and not any(isinstance(one, list) for one in value):
        return [_metric(one) for one in value]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a metric is a number; found {type(value).__name__}")
    float(value)  # a whole number may be too large
    return value
