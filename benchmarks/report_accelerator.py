"""The report's part about the accelerator that there was, if there was one."""

from typing import Any

from benchmarks.common import markdown, read


def shown(value: Any) -> str:
    """A figure as text; an error in a few words."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return " ".join(str(value).split())[:80].replace("|", "/")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A row for each name, a column for each figure that one of them has."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return markdown(
        ["", *columns],
        [[f"`{name}`", *(shown(row.get(c)) for c in columns)] for name, row in rows.items()],
    )


TITLES = {
    "right": "Losses and gradients, relative distance to the CPU's in float32 at the highest "
    "precision (what agrees is closer than 0.001), by precision",
    "scale": "Scale rows, bfloat16, one optimiser step of one turn",
    "attention": "Causal attention and its gradient, bfloat16, of 32 times 12 heads of 64 at "
    "1,024 positions; the distance is to our products in float32",
    "torch": "PyTorch's step of gpt2-124m on the same card, bfloat16, by its fused attention and "
    "AdamW",
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
            lines += [f"{title}:", "", table(found[part]), ""]
    return lines
