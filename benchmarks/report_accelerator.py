"""The report's part about the accelerator that there was, if there was one."""

from typing import Any

from benchmarks.common import markdown, read


def shown(value: Any) -> str:
    """A figure as text; an error in a few words."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).splitlines()[-1][:80].replace("|", "/")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A row for each name, a column for each figure that one of them has."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return markdown(
        ["", *columns],
        [[f"`{name}`", *(shown(row.get(c)) for c in columns)] for name, row in rows.items()],
    )


def _table_of(part: str, found: dict[str, Any]) -> str:
    if "error" in found or "skipped" in found:
        return table({part: found})
    if part == "right":
        return table(found)
    if part == "members":
        prices = {n: {k: v for k, v in row.items() if k != "ms"} for n, row in found.items()}
        return table({name: {**found[name]["ms"], **prices[name]} for name in found})
    if part == "bitwise":
        return table({name: {"resumes bitwise": same} for name, same in found["rows"].items()})
    rows = found.get("rows") or {name: {"ms": ms} for name, ms in found["ms"].items()}
    return table(rows)


TITLES = {
    "right": "Losses and gradients, relative distance to the CPU's in float32 at the highest "
    "precision, by precision",
    "scale": "Scale rows, bfloat16, one optimiser step of one turn",
    "attention": "Causal attention and its gradient, bfloat16",
    "torch": "PyTorch's step of gpt2-124m on the same card, bfloat16, fused attention",
    "bitwise": "A run saved half way and restored",
    "members": "Milliseconds of a step of all members",
}


def parts() -> list[str]:
    """The section, or nothing where no accelerator was measured."""
    found = read("accelerator")
    if found is None:
        return []
    hardware, versions = found["hardware"], found["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"## On {hardware['device']}",
        "",
        f"By `python -m benchmarks.accelerator`, {found['date']}; driver {found['driver']}; "
        f"{names}.",
        "",
    ]
    for part, title in TITLES.items():
        if part in found:
            lines += [f"{title}:", "", _table_of(part, found[part]), ""]
    return lines
