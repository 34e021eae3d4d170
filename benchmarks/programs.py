"""Size of the compiled train step of each family: a baseline per version of jax, which
tests/test_programs.py checks.

Nothing is run, and what is counted does not depend on the machine's cores or load. Programs are
compiled with the compiler's own defaults, given for each program, so that XLA_FLAGS such as those
of the test suite do not count; how hard the back end then optimises (`quick`) changes none of the
counts either, only the size of the machine code.
"""

import datetime
import json
import re
from typing import Any

import jax

from benchmarks import common
from genjax.profiling.measure import step_program
from genjax.runs.folder import environment, write_json
from genjax.zoo import ZOO

# The first row of each family, and three of images: a convolutional one, a U-Net, and a large one.
ROWS = (*common.first_rows(), "vae-conv", "edm-mnist", "pixelcnn-mnist")
# What may not grow, and by how much it may: less than a changed kernel moves, more than a
# compiler's patch release does.
CHECKED = {"flops": "FLOPs", "bytes_accessed": "bytes accessed", "instructions": "instructions"}
ALLOWED = 0.03
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = ", re.MULTILINE)


def version() -> str:
    """The version of jax that a baseline is of, such as 0.10: a minor release has another
    compiler.
    """
    return ".".join(jax.__version__.split(".")[:2])


def options(quick: bool = False) -> dict[str, Any]:
    """The compiler's options: its defaults, whatever XLA_FLAGS says; `quick` leaves out what
    changes no count.
    """
    level = {"xla_backend_optimization_level": 0 if quick else 3}
    return level | ({"xla_cpu_use_fusion_emitters": True} if version() == "0.10" else {})


def measured(name: str, quick: bool = False) -> dict[str, Any]:
    """What the compiled step of a recipe at its real size does and is; a loop's body counts once,
    however often it runs.

    `flops` and `bytes_accessed` by the compiler's analysis; `instructions` of its final text (HLO);
    `code_bytes` of the executable, None with `quick`.
    """
    recipe = ZOO[name]
    spec = recipe.source().spec
    program = step_program(recipe.training(spec), spec, recipe.schedule.batch_size, options(quick))
    found, text = program.cost_analysis(), program.as_text()
    code = None if quick else len(program.runtime_executable().serialize())
    return {
        "recipe": name,
        "batch_size": recipe.schedule.batch_size,
        "flops": float(found["flops"]),
        "bytes_accessed": float(found["bytes accessed"]),
        "instructions": len(_INSTRUCTION.findall(text)),
        "code_bytes": code,
    }


def baseline() -> dict[str, dict[str, Any]]:
    """Recipe -> what it was with this version of jax; empty if there is no baseline for it."""
    found = (common.read("programs") or {}).get("versions", {}).get(version(), {})
    return {row["recipe"]: row for row in found.get("rows", [])}


def growth(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What grew by more than `ALLOWED`, in words; nothing if all is well."""
    lines = []
    for what, words in CHECKED.items():
        share = now[what] / was[what] - 1
        if share > ALLOWED:
            lines.append(
                f"{now['recipe']}: {words} of its train step were {was[what]:,.0f} and are "
                f"{now[what]:,.0f} "
                f"({100 * share:+.1f} %, allowed +{100 * ALLOWED:.0f} %). If meant, run python -m "
                "benchmarks programs."
            )
    return lines


def main() -> None:
    """Measure and write this version's part of results/programs.json; those of other versions are
    kept.
    """
    rows = []
    for name in ROWS:
        rows.append(measured(name))
        print(rows[-1], flush=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path = common.RESULTS / "programs.json"
    kept = json.loads(path.read_text())["versions"] if path.exists() else {}
    kept[version()] = {"date": stamp, **environment(), "rows": rows}
    write_json(
        path,
        {
            "versions": dict(
                sorted(kept.items(), key=lambda item: [int(n) for n in item[0].split(".")])
            )
        },
    )
