"""The report's sections about what programs cost: their size, their memory, sampling, starting, and
many models at once.
"""

import statistics
from typing import Any

from benchmarks.common import machine, markdown, percent, quartiles, read
from benchmarks.programs import ALLOWED


def program_parts(found: dict[str, Any]) -> list[str]:
    """The part about the size of compiled steps."""
    rows = []
    for name in dict.fromkeys(
        row["recipe"] for of in found["versions"].values() for row in of["rows"]
    ):
        for version, of in found["versions"].items():
            for row in (row for row in of["rows"] if row["recipe"] == name):
                counts = [
                    f"{row['flops'] / 1e6:,.1f}",
                    f"{row['bytes_accessed'] / 2**20:,.1f}",
                    f"{row['instructions']:,}",
                ]
                rows.append(
                    [
                        f"`{name}`",
                        str(row["batch_size"]),
                        version,
                        *counts,
                        f"{row['code_bytes'] / 2**10:,.0f}",
                    ]
                )
    where = "; ".join(machine(of) for of in found["versions"].values())
    return [
        "## Size of a compiled step",
        "",
        "A training step at its row's real size, by the compiler's own counts, in which the body "
        "of a loop counts once "
        f"({where}). `tests/test_programs.py` fails when FLOPs, bytes or instructions grow by more "
        f"than {100 * ALLOWED:.0f} %.",
        "",
        markdown(
            ["recipe", "batch", "jax", "MFLOP", "MiB accessed", "instructions", "executable, KiB"],
            rows,
        ),
        "",
    ]


def memory_parts(found: dict[str, Any]) -> list[str]:
    """The part about memory."""
    rows = []
    for row in found["rows"]:
        ways, plain = row["ways"], row["ways"]["float32"]

        def cell(way: str, ways: Any = ways, plain: Any = plain) -> str:
            if way not in ways:
                return "-"
            own = ways[way]["temporary_bytes"]
            return f"{own / 2**20:.2f} ({percent(own / plain['temporary_bytes'])})"

        changed = "".join(f", {name} {value}" for name, value in row["changes"].items())
        whole = all(one["reused_bytes"] == one["state_bytes"] for one in ways.values())
        rows.append(
            [
                f"`{row['recipe']}`{changed}",
                str(row["batch_size"]),
                f"{plain['state_bytes'] / 2**20:.2f}",
                "whole" if whole else "in part",
                f"{plain['temporary_bytes'] / 2**20:.2f}",
                *map(cell, ("bfloat16", "accumulated", "whole loss again", "remat")),
            ]
        )
    return [
        "## Memory of a step",
        "",
        "MiB of temporary memory at the peak of the compiled step, beside the state and the batch "
        f"({machine(found)}), and the "
        "difference to float32. bfloat16 is of the networks' arithmetic; parameters, their "
        "gradients and losses stay float32, "
        f"and casts of the parameters come on top. Accumulated: the gradient over {found['parts']} "
        "parts of the batch. "
        "`jax.checkpoint` around a whole loss brings back at once all that it did not keep. "
        "`remat` is the setting of the "
        "families with loops or blocks to compute again (for the Transformer with `scan_layers`). "
        "Reused: whether the new "
        "state is written over the donated one, byte for byte.",
        "",
        markdown(
            [
                "recipe",
                "batch",
                "state",
                "reused",
                "float32",
                "bfloat16",
                "accumulated",
                "`jax.checkpoint` around the loss",
                "`remat`",
            ],
            rows,
        ),
        "",
    ]


def sampling_parts(found: dict[str, Any]) -> list[str]:
    """The part about samplers."""
    rows = []
    for row in found["rows"]:
        steps = (
            "-"
            if row["steps_per_second"] is None
            else f"{row['steps_per_second']:,.0f} {row['step']}s"
        )
        rows.append(
            [
                f"`{row['recipe']}`",
                "-" if row["solver_steps"] is None else str(row["solver_steps"]),
                str(row["batch"]),
                quartiles({name: 1000 * value for name, value in row["seconds"].items()}, ",.2f"),
                f"{row['samples_per_second']:,.0f}",
                steps,
                f"{row['compile_seconds']:.1f}",
            ]
        )
    header = [
        "recipe",
        "solver steps",
        "batch",
        "ms a call (quartiles)",
        "samples/s",
        "steps/s",
        "compilation, s",
    ]
    return [
        "## Samplers",
        "",
        f"Whole samples with random weights, at the row's settings ({machine(found)}); compilation "
        "includes tracing.",
        "",
        markdown(header, rows),
        "",
    ]


def startup_parts(found: dict[str, Any]) -> list[str]:
    """The part about starting."""

    def each(times: list[float]) -> str:
        return f"{statistics.median(times):.2f} ({', '.join(f'{t:.2f}' for t in times)})"

    rows = [[f"`{row['command']}`", each(row["cold"]), each(row["warm"])] for row in found["rows"]]
    return [
        "## From the command to the first step",
        "",
        "Seconds from starting the process until the first optimiser step is done and logged, with "
        "an empty cache of compiled "
        f"programs and with the one that it left: median and all of {found['runs']} runs "
        f"({machine(found)}).",
        "",
        markdown(
            ["command", "cold", "warm"],
            [*rows, ["`genjax --help` (to its end)", each(found["help"]), "-"]],
        ),
        "",
    ]


def ensemble_parts(found: dict[str, Any]) -> list[str]:
    """The part about many small models as one program."""
    parts = [
        "## Many small models as one program",
        "",
        "A step of all members in units of a step of one member alone, "
        f"{found['steps_per_dispatch']} steps a dispatch, in "
        f"turns ({machine(found)}); the last column is the time of `auto` over that of one program "
        "after the other.",
        "",
    ]
    rows = []
    for row in found["rows"]:
        modes = row["modes"]
        shown = [
            f"{modes[mode]['to_one_member']['median']:.2f}"
            for mode in ("one by one", "map", "vmap", "auto")
        ]
        alone = f"{modes['one']['ms']:.2f}"
        last = quartiles(modes["auto"]["to_one_by_one"], ".2f")
        rows.append(
            [f"`{row['recipe']}`", str(row["batch_size"]), str(row["members"]), alone, *shown, last]
        )
    header = [
        "recipe",
        "batch",
        "members",
        "one member, ms",
        "one by one",
        "map",
        "vmap",
        "auto",
        "auto / one by one",
    ]
    parts += [markdown(header, rows), ""]
    autos = [row["modes"]["auto"]["to_one_by_one"]["median"] for row in found["rows"]]
    return [*parts, f"`auto` against one by one, at worst: {percent(max(autos))}.", ""]


def convolution_parts(found: dict[str, Any]) -> list[str]:
    """The part about convolutions."""
    rows = []
    for row in found["rows"]:
        cells = []
        for form in ("alone", "loop"):
            ms = row[form]["ms"]
            cells += [
                f"{ms['genjax']:.1f}",
                f"{ms['flax']:.1f}",
                quartiles(row[form]["times_as_long"], ".2f"),
            ]
        rows.append(
            [f"`{row['recipe']}`", str(row["batch_size"]), *cells, f"{row['difference']:.0e}"]
        )
    header = ["recipe", "batch", "genjax, ms", "flax, ms", "flax / genjax"]
    return [
        "## Convolutions",
        "",
        "The whole gradient of a row's losses with genjax's convolutions and with plain `flax.nnx` "
        "ones, in turns "
        f"({machine(found)}): by itself, then in a loop of {found['trips']}, which is where "
        "training steps are (milliseconds "
        "of one gradient). The last column is the largest difference between both gradients, over "
        "the largest entry.",
        "",
        markdown([*header, *(f"{name}, in a loop" for name in header[2:]), "difference"], rows),
        "",
    ]


def width_parts(found: dict[str, Any]) -> list[str]:
    """The part about steps by their widths."""
    rows = []
    for row in found["rows"]:
        share = {key: 100 * value for key, value in row["share_of_peak"].items()}
        width = row["width"] if isinstance(row["width"], list) else [row["width"]]
        at_peak = row.get("with_products_at_peak")
        rows.append(
            [
                f"`{row['recipe']}`, {row['setting']} {' '.join(map(str, width))}",
                str(row["batch_size"]),
                f"{row['parameters']:,}",
                f"{row['ms']:.1f}",
                f"{row['flops'] / 1e9:.1f}",
                f"{row['peak_gflops']:.0f}",
                f"{quartiles(share, '.0f')} %",
                "" if at_peak is None else f"{100 * at_peak:.0f} %",
            ]
        )
    return [
        "## Steps by their widths",
        "",
        f"Training steps (float32, {found['steps_per_dispatch']} a dispatch, memory by "
        f"{found['allocator']}; {machine(found)}), as shares of the rate of a large matrix "
        "product, in turns with it. FLOPs are what XLA counts of one step. Last, the share if its "
        "products ran at the peak and the rest of it, which is the optimiser and the matrices' "
        "traffic, took what it takes with the fewest examples.",
        "",
        markdown(
            [
                "model",
                "batch",
                "parameters",
                "ms a step",
                "GFLOP",
                "peak, GFLOP/s",
                "of the peak (quartiles)",
                "with products at the peak",
            ],
            rows,
        ),
        "",
    ]


def page_parts(found: dict[str, Any]) -> list[str]:
    """The part about allocators of memory and their pages."""
    rows = []
    for row in found["rows"]:
        for form, of in row["forms"].items():
            for one in of["ms"]:
                rows.append(
                    [
                        f"`{row['recipe']}` ({row['temporary_bytes'] / 2**20:.0f} MiB)",
                        form.partition(" ")[0],
                        one,
                        f"{of['ms'][one]:,.2f}",
                        quartiles(of["to_default"][one], ".2f"),
                        f"{of['processors_to_default'][one]['median']:.2f}",
                        f"{of['faults'][one]:,.0f}",
                        f"{of['peak_bytes'][one] / 2**20:,.0f}",
                    ]
                )
    header = [
        "recipe (temporary memory)",
        "steps a dispatch",
        "allocator",
        "ms a step",
        "of the default's",
        "processors' time",
        "page faults a step",
        "peak, MiB",
    ]
    glibc = "; ".join(
        f"{name}: {' '.join(f'`{key}={value}`' for key, value in env.items())}"
        for name, env in found["glibc"].items()
    )
    left_out = [f"Left out: {name}, {why}" for name, why in found["left_out"].items()]
    return [
        "## Allocators of memory",
        "",
        "XLA asks for temporary memory anew at every dispatch. Where that is tens of MiB, glibc "
        "takes it from the kernel each time, which clears every page at its first touch. A step "
        "under glibc as it comes, under allocators that are preloaded, and under settings of "
        f"glibc's ({glibc}), a process each, in turns, {found['rounds']} of them "
        f"({machine(found)}): medians of milliseconds, the ratio to the default with its "
        "quartiles, that of the processors' time, page faults of a step in the last turn, and the "
        "most memory that the process had had by then.",
        "",
        markdown(["allocator", "of the default's time", "worst", "peak"], _over_rows(found)),
        "",
        "The first is the geometric mean over rows and forms, as is that of the most memory.",
        "",
        markdown(header, rows),
        "",
        *[line for text in left_out for line in (text, "")],
    ]


def _over_rows(found: dict[str, Any]) -> list[list[str]]:
    """Of each allocator: the mean ratio of time to the default, the largest, and that of memory."""
    forms = [
        (f"`{row['recipe']}`, {form.partition(' ')[0]}", of)
        for row in found["rows"]
        for form, of in row["forms"].items()
    ]
    lines = []
    for one in forms[0][1]["ms"]:
        ratios = {label: of["to_default"][one]["median"] for label, of in forms}
        worst = max(ratios, key=lambda label: ratios[label])
        peaks = [of["peak_bytes"][one] / of["peak_bytes"]["default"] for _, of in forms]
        lines.append(
            [
                one,
                f"{statistics.geometric_mean(ratios.values()):.2f}",
                f"{ratios[worst]:.2f} ({worst})",
                f"{statistics.geometric_mean(peaks):.2f}",
            ]
        )
    return lines


def parts() -> list[str]:
    """All of these sections that have been measured."""
    sections = {
        "programs": program_parts,
        "memory": memory_parts,
        "sampling": sampling_parts,
        "startup": startup_parts,
        "ensemble": ensemble_parts,
        "convolution": convolution_parts,
        "widths": width_parts,
        "pages": page_parts,
    }
    measured = {name: read(name) for name in sections}
    return [line for name, found in measured.items() if found for line in sections[name](found)]
