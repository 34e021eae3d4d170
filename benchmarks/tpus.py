"""Steps compiled for TPUs that are not here: memory a chip, the least time by the compiler, and the
share of the chip's peak that it implies. Nothing is run. It needs libtpu (the extra `tpu`).

Each is compiled in a process of its own: libtpu ends one whose program it cannot compile.
"""

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from benchmarks import common

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# A Transformer as wide as a chip's matrix units ask for.
WIDE = {
    "d_model": 1024,
    "n_layers": 12,
    "n_heads": 8,
    "scan_layers": True,
    "dtype": "bfloat16",
    "batch_size": 16,
    "context": 1024,
}


class Case(NamedTuple):
    """A row, and the settings that are changed."""

    recipe: str
    changed: dict[str, Any]


def cases() -> dict[str, Case]:
    """The first row of each family that stands on data, the rows of scale, and a wide
    Transformer; each by its name in the table.
    """
    scale = ("gpt2-124m", "dit-b2", "unet-cifar")
    rows = {name: Case(name, {}) for name in (*common.first_rows(), *scale)}
    wide = "transformer-shakespeare of width 1024"
    return {**rows, wide: Case("transformer-shakespeare", WIDE)}


def compiled(recipe: str, topology: str, changed: dict[str, Any]) -> dict[str, Any]:
    """What `compile_for` says of a row, in this process."""
    from genjax.profiling.ahead import compile_for
    from genjax.zoo import ZOO
    from genjax.zoo.sections import replace

    row = replace(ZOO[recipe], **changed)
    return {"batch_size": row.schedule.batch_size, **compile_for(row, topology)._asdict()}


def in_child(case: Case, topology: str, seconds: float) -> dict[str, Any]:
    """The same in a process of its own; what went wrong where it did."""
    code = (
        "import json, sys; from benchmarks.tpus import compiled; "
        "print(json.dumps(compiled(*json.loads(sys.argv[1]))))"
    )
    args = json.dumps([case.recipe, topology, case.changed])
    command = [sys.executable, "-c", code, args]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is here that two could want
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled in {seconds:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main(names: tuple[str, ...] = (), seconds: float = 600.0) -> None:
    """Compile and write results/tpus.json; `names`, of rows, instead of all, in which case what was
    found of the others stays.
    """
    before = (common.read("tpus") or {"rows": []})["rows"]
    rows = [row for row in before if names and row["name"] not in names]
    for name, case in cases().items():
        if names and name not in names:
            continue
        for topology in TOPOLOGIES:
            found = {"name": name, "topology": topology, **in_child(case, topology, seconds)}
            rows.append(found)
            print(f"{name}, {topology}: {found.get('error') or _told(found)}", flush=True)
    common.write("tpus", {"rows": rows})


def _told(found: dict[str, Any]) -> str:
    return f"{', '.join(cells(found))} (compiled in {found['compile_seconds']:.0f} s)"


def cells(found: dict[str, Any]) -> list[str]:
    """Memory, least time and share of peak, in words."""
    fits = "" if found["memory"] <= found["capacity"] else ", does not fit"
    memory = f"{found['memory'] / 2**20:,.0f} MiB{fits}"
    if found["optimal_seconds"] is None:
        return [memory, "no estimate", "-"]
    share = f"{100 * found['share_of_peak']:.1f} %"
    return [memory, f"{1000 * found['optimal_seconds']:.3g} ms", share]


def parts(found: dict[str, Any]) -> list[str]:
    """The report's part about them."""
    of: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        of.setdefault(row["name"], {})[row["topology"]] = row
    lines = []
    for name, by_topology in of.items():
        line = [f"`{name}`"]
        for topology in TOPOLOGIES:
            row = by_topology.get(topology, {"error": "not compiled"})
            line += [row["error"], "", ""] if "error" in row else cells(row)
        lines.append(line)
    header = [
        f"{what}, {topology}" if what == "a chip" else what
        for topology in TOPOLOGIES
        for what in ("a chip", "least time", "of peak")
    ]
    return [
        "## TPUs, by their compiler",
        "",
        "A step at the rows' own batch, data parallel over four chips, compiled by libtpu on a "
        f"machine without a TPU ({common.machine(found)}). Nothing was run: the least time is the "
        "compiler's own estimate, and the share of the bfloat16 peak is what the products of the "
        "step, by its jaxpr, would take of it in that time; above 100 % the compiler expects "
        "more of the chip than its datasheet says. Small rows are bound by memory and by the time "
        "between operations.",
        "",
        common.markdown(["recipe", *header], lines),
        "",
    ]
