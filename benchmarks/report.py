"""Write benchmarks/REPORT.md and the README's results table from what was measured; nothing in them
is typed by hand.
"""

import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks import report_accelerator, report_costs, report_exact, tpus
from benchmarks.common import machine, markdown, not_measured, percent, quartiles, read
from benchmarks.report_results import (
    attack_text,
    elsewhere_parts,
    makemore_parts,
    optimiser_parts,
    published_parts,
    results_table,
    steps_text,
)
from genjax.zoo import ZOO

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def _filled(text: str, name: str, block: str) -> str:
    """A text with what stands between two marks replaced."""
    whole = f"<!-- {name} -->\n{block}\n<!-- /{name} -->"
    pattern = rf"<!-- {name} -->.*<!-- /{name} -->"
    return re.sub(pattern, lambda _: whole, text, flags=re.DOTALL)


def adversarial_parts(found: dict[str, Any]) -> list[str]:
    """The part about GANs: mixtures by eight seeds in one program, and what that gains."""
    rows = []
    for one in found["mixtures"]:
        modes, share = one["figures"]["modes covered"], one["figures"]["high-quality share"]
        rows.append(
            [
                f"`{one['recipe']}`",
                ", ".join(f"{value:.0f}" for value in modes),
                f"{100 * statistics.mean(share):.1f} ± {100 * statistics.stdev(share):.1f} %",
                f"{100 * one['real']['high-quality share']:.1f} %",
                f"{one['n']:,}",
                f"{one['seconds_with_compilation']:.0f} s",
            ]
        )
    members = found["members"]
    gains = [
        [
            mode,
            f"{row['ms_per_step']:.2f}",
            quartiles(row["ratio"], ".2f"),
        ]
        if "ratio" in row
        else [mode, f"{row['ms_per_step']:.2f}", "1"]
        for mode, row in members["modes"].items()
    ]
    parts = [
        "## Generative adversarial networks",
        "",
        f"Eight seeds of a mixture as one vmapped program ({machine(found)}). A sample is of high "
        "quality within 3 sd of a "
        "mode; mean and sd over the seeds, and the same share of real data.",
        "",
        markdown(
            [
                "recipe",
                "modes covered, by seed",
                "high quality",
                "real data",
                "n",
                "training and compilation",
            ],
            rows,
        ),
        "",
        f"One step of {members['members']} ring GANs with batch {members['batch_size']} each, "
        f"{members['steps_per_dispatch']} steps a dispatch, in alternation:",
        "",
        markdown(["how", "ms for all", "ratio to one after the other (quartiles)"], gains),
        "",
    ]
    return parts


def twin_parts(twin: dict[str, Any]) -> list[str]:
    """The part about DCGAN and its PyTorch twin."""
    parts = ["## DCGAN beside a PyTorch twin", ""]
    if "skipped" in twin:
        return [*parts, f"The PyTorch twin of `dcgan-mnist` was skipped: {twin['skipped']}.", ""]
    both = [
        [
            name,
            *(
                f"{twin[who][name]['mean']:.4g} ± {twin[who][name]['sd']:.2g}"
                for who in ("genjax", "torch")
            ),
        ]
        for name in twin["genjax"]
    ]
    return [
        *parts,
        "`dcgan-mnist` and a PyTorch twin of the same layers, losses, optimiser and "
        f"{twin['steps']:,} steps of batch "
        f"{twin['batch_size']}, judged alike: mean and sd over {len(twin['seeds'])} seeds, "
        f"{twin['n']:,} samples against the "
        f"{twin['split']} split; seconds are of training, in turns on the same machine "
        f"({machine(twin)}).",
        "",
        markdown(["figure", "genjax", "PyTorch"], both),
        "",
    ]


def nanogpt_parts(found: dict[str, Any]) -> list[str]:
    """The part about a Transformer's step and nanoGPT's."""
    ms, ratios = found["ms"], found["ratio_to"]
    rows = [
        [name, quartiles(r, ".1f"), quartiles(ratios[name], ".2f") if name in ratios else "-"]
        for name, r in ms.items()
    ]
    return [
        "## A Transformer of nanoGPT's size for a CPU",
        "",
        "4 layers, 4 heads, width 128, context 64, batch 12, AdamW; the twin is the same "
        "arithmetic in PyTorch "
        f"({found['torch']}), timed in turns on the same machine ({machine(found)}); median and "
        "quartiles. genjax runs "
        "20 steps a dispatch, as `fit` does, unless said; `compiled` is `torch.compile`, `fused` "
        "eager with fused AdamW.",
        "",
        markdown(["program", "ms a step", "genjax's time as a share of it"], rows),
        "",
    ]


def _how(side: dict[str, Any]) -> str:
    """How a side of `peers` is fastest: steps a dispatch, or eager or compiled; and its allocator,
    unless it is glibc's as it comes.
    """
    how = side["best"].removeprefix("PyTorch, ").partition(",")[0].partition(" ")[0]
    allocator = side.get("allocator", "default")
    return how if allocator == "default" else f"{how}, {allocator}"


def peers_parts(found: dict[str, Any]) -> list[str]:
    """The part about every family beside a PyTorch twin."""
    rows, skipped, versions = [], set(), set()
    for row in found["rows"]:
        torch, ms = row["torch"], row["ms"]
        skipped |= {torch["skipped"]} if "skipped" in torch else set()
        versions |= (
            {f"torch {torch['version']}, {torch['threads']} threads"}
            if "version" in torch
            else set()
        )
        beside = "skipped" not in torch
        rows.append(
            [
                f"`{row['recipe']}`",
                row["size"],
                f"{row['parameters']:,}",
                f"{ms[row['best']]['median']:.2f} ({_how(row)})",
                f"{row['steps_per_second']:,.1f}",
                f"{row['units_per_second']:,.0f} {row['unit']}",
                f"{row['flops'] / 1e9:.2f}",
                f"{100 * row['share_of_peak']:.0f} %",
                f"{row['temporary_bytes'] / 2**20:.0f}",
                f"{row['compile_seconds']:.1f}",
                f"{ms[torch['best']]['median']:.2f} ({_how(torch)})" if beside else "skipped",
                quartiles(row["ratio"], ".2f") if beside else "-",
                f"{row['ratio_one_step']['median']:.2f}" if beside else "-",
            ]
        )
    means = found["geometric_means"]
    allocators = "both under glibc's allocator of memory"
    if any("allocator" in row.get("torch", {}) for row in found["rows"]):
        allocators = (
            "each side under the allocator that it is fastest with, glibc's or the one named"
        )
    medium = any(row["size"] == "medium" for row in found["rows"])
    wider = " and a few times wider" if medium else ""
    parts = [
        "## Every family beside a PyTorch twin",
        "",
        "A training step of a row's own procedure (optimiser, clipping, moving average), at the "
        f"row's size{wider}, float32, on one resident batch ({machine(found)}). Milliseconds are "
        "medians, of "
        "one step a dispatch or as "
        f"many as the row says, whichever is faster (in brackets), {allocators}. FLOPs (of matrix "
        "products in "
        "loops for each trip, else as "
        "the compiler counts them) and temporary memory are of the compiled program of one step; "
        "the peak is that of a large "
        f"matrix product, {found['peak_gflops']:.0f} GFLOP/s; compilation includes tracing.",
        "",
    ]
    if versions:
        worst = max(
            max(row["torch"]["difference"].values())
            for row in found["rows"]
            if "difference" in row["torch"]
        )
        parts += [
            f"The twins ({'; '.join(sorted(versions))}) are the same architectures in PyTorch with "
            "as many parameters and "
            "fused Adam, eager or by torch.compile, whichever is faster (in brackets), timed in "
            "turns with genjax. Before "
            "that, each had genjax's loss and norm of the gradient for the same parameters, data "
            "and noise, to a relative "
            f"difference of {worst:.0e} at most. The ratio is genjax's time over PyTorch's, with "
            "quartiles over turns; below 1 "
            "genjax is faster.",
            "",
        ]
    for reason in sorted(skipped):
        parts += [f"The PyTorch twins were skipped: {reason}.", ""]
    parts += not_measured(ZOO[row["recipe"]].family.__name__ for row in found["rows"])
    header = [
        "recipe",
        "size",
        "parameters",
        "genjax, ms (steps a dispatch)",
        "steps/s",
        "per second",
        "GFLOP",
        "of the peak",
    ]
    header += [
        "temporary MiB",
        "compilation, s",
        "PyTorch, ms",
        "ratio (quartiles)",
        "ratio, one step a dispatch",
    ]
    parts += [markdown(header, rows), ""]
    if means:
        words = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
        alone = [r["ratio_one_step"]["median"] for r in found["rows"] if "ratio_one_step" in r]
        one = f"with one step a dispatch {statistics.geometric_mean(alone):.2f}"
        parts += [f"Geometric means of the ratios: {words}; {one}.", ""]
    return parts


def generation_parts(found: dict[str, Any]) -> list[str]:
    """The part about cached generation."""
    rows = [
        [
            f"`{r['recipe']}`",
            str(r["batch"]),
            str(r["length"]),
            quartiles(r["us_per_step"], ",.0f"),
            f"{r['tokens_per_second']:,.0f}",
            str(r["programs"]),
        ]
        for r in found["rows"]
    ]
    return [
        "## Cached generation",
        "",
        f"Sampling whole sequences of {found['levels']} symbols ({machine(found)}); for the "
        "Transformer the length is also its "
        "context. Programs: how many were compiled for prompts of 0, 1, half and all but one of "
        "the length.",
        "",
        markdown(
            ["recipe", "batch", "length", "µs a step (quartiles)", "tokens/s", "programs"], rows
        ),
        "",
    ]


def denoising_parts(found: dict[str, Any]) -> list[str]:
    """The part about diffusion and flow matching, as far as it was measured."""
    parts = ["## Diffusion and flow matching", ""]
    if "plane" in found:
        rows = [
            [
                f"`{one['recipe']}`",
                one["density"],
                *(f"{one['mean'][who]:.4f} ± {one['sd'][who]:.4f}" for who in ("samples", "real")),
                f"{one['excess_in_standard_errors']:+.2f}",
            ]
            for one in found["plane"]
        ]
        parts += [
            f"In the plane: sliced Wasserstein distance of {found['points']:,} samples "
            f"({found['plane_steps']} Heun steps) to "
            f"as many fresh points, and of two fresh sets; mean and sd over {found['draws']} "
            "draws. The excess is in units "
            "of the latter sd, which is the standard error of one such distance "
            f"({machine(found)}).",
            "",
            markdown(["recipe", "density", "samples", "fresh data", "excess, s.e."], rows),
            "",
        ]
    if "guided" in found:
        judge = found["guided"][0]
        rows = [
            [
                f"`{one['recipe']}`",
                f"{row['scale']:g}",
                f"{100 * row['class agreement']:.1f} %",
                f"{row['FD[cnn-v1]']:.2f}",
            ]
            for one in found["guided"]
            for row in one["rows"]
        ]
        parts += [
            f"Guided digits, one seed: n={judge['n']:,} samples with the classes of the test "
            f"split; judge: {judge['judge']}. "
            f"Scale 1 is the conditional model, 0 the unconditional one ({machine(found)}).",
            "",
            markdown(["recipe", "guidance", "class agreement", "FD[cnn-v1]"], rows),
            "",
        ]
    if "bits" in found:
        rows = [
            [
                f"`{one['recipe']}`",
                "on the class" if one["conditional"] else "no",
                f"{one['bits_per_dim']:.3f}",
                f"{one['mean']:.2f} ± {one['standard_error']:.2f}",
                one["estimator"],
                f"{one['n']:,}",
            ]
            for one in found["bits"]
        ]
        parts += [
            "Bits per dimension of the 8x8 digits with 17 levels, one seed. All are bounds from "
            "above, by different "
            "estimators, so a difference between two rows is of models and of estimators together.",
            "",
            markdown(
                [
                    "recipe",
                    "conditional",
                    "bits/dim, at most",
                    "nats, at least",
                    "estimator",
                    "n, test",
                ],
                rows,
            ),
            "",
        ]
    if "few_steps" in found:
        few = found["few_steps"]
        rows = [
            [n, f"{row['FD[cnn-v1]']:.2f}", f"{row['recall']:.3f}"]
            for n, row in few["steps"].items()
        ]
        parts += [
            f"`{few['recipe']}` with few and with many Heun steps from the same noise, "
            f"n={few['n']:,}:",
            "",
            markdown(["Heun steps", "FD[cnn-v1]", "recall"], rows),
            "",
        ]
    return parts


def main() -> None:
    """Write the report from the files that are there."""
    parts = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks`; see the JSON files in `results/` for every value and "
        "its spread.",
        "",
    ]
    overhead, throughput = read("overhead"), read("throughput")
    if overhead:
        rows = [
            [
                f"`{row.get('family', 'vae')}`",
                row["size"],
                f"{row['genjax_ms']:.3f}",
                f"{row['hand_written_ms']:.3f}",
                f"{percent(row['ratio']['median'])} [{percent(row['ratio']['q1'])}, "
                f"{percent(row['ratio']['q3'])}]",
                str(row["compiled_programs"]),
            ]
            for row in overhead["step"]
        ]
        loop = overhead["loop"]
        parts += [
            "## Overhead of a training step over a hand-written jax step",
            "",
            "Same arithmetic, timed in alternation in one process; median and quartiles of the "
            f"ratio ({machine(overhead)}).",
            "",
            markdown(
                [
                    "family",
                    "size",
                    "genjax, ms",
                    "hand-written, ms",
                    "overhead",
                    "compiled programs",
                ],
                rows,
            ),
            "",
            *not_measured(row.get("family", "vae") for row in overhead["step"]),
            "## Cost of the loop",
            "",
            "`fit` with metrics, log files and progress against bare dispatches of the same "
            "program: "
            f"{loop['fit_ms']:.3f} ms against {loop['bare_ms']:.3f} ms a step, in turns "
            f"({quartiles(loop['ratio'], '.2f')}). "
            "The processor time of the loop's own thread, over that of bare dispatches, would be "
            f"{quartiles(loop['overhead_at_1ms_percent'], '.1f')} % of a step of 1 ms.",
            "",
        ]
    if throughput:
        columns = list(dict.fromkeys((row["size"], row["dtype"]) for row in throughput["rows"]))
        names = list(dict.fromkeys(row["variant"] for row in throughput["rows"]))
        table = {(row["variant"], row["size"], row["dtype"]): row for row in throughput["rows"]}

        def cell(row: dict[str, Any]) -> str:
            share = 100 * row["share_of_float32_peak"]
            return f"{row['ms_per_step_and_member']:.3f} ({share:.0f} %)"

        parts += [
            "## Throughput of one VAE step",
            "",
            "Milliseconds per optimiser step and member, and the share of the measured float32 "
            "matrix-product peak "
            f"({throughput['peak_gflops']['float32']:.0f} GFLOP/s; {machine(throughput)}).",
            "",
            markdown(
                ["variant", *(f"{size}, {dtype}" for size, dtype in columns)],
                [
                    [name, *(cell(table[name, size, dtype]) for size, dtype in columns)]
                    for name in names
                ],
            ),
            "",
        ]
    adversarial = read("adversarial")
    if adversarial:
        parts += adversarial_parts(adversarial)
    dcgan = read("dcgan")
    if dcgan:
        parts += twin_parts(dcgan)
    nanogpt, generation = read("nanogpt"), read("generation")
    if nanogpt:
        parts += nanogpt_parts(nanogpt)
    peers, elsewhere = read("peers"), read("peers_elsewhere")
    if peers:
        parts += peers_parts(peers)
    if elsewhere:
        parts += elsewhere_parts(elsewhere)
    published = read("published")
    if published:
        parts += published_parts(published)
    makemore = read("makemore")
    if makemore:
        parts += makemore_parts(makemore)
    if generation:
        parts += generation_parts(generation)
    denoising = read("denoising")
    if denoising:
        parts += denoising_parts(denoising)
    optimisers = read("optimisers")
    if optimisers:
        parts += optimiser_parts(optimisers)
    parts += report_exact.parts()
    parts += report_costs.parts()
    parts += report_accelerator.parts()
    compiled = read("tpus")
    if compiled:
        parts += tpus.parts(compiled)
    parts += ["## Results of the zoo", "", results_table(), ""]
    (HERE / "REPORT.md").write_text("\n".join(parts))
    print(f"written: {HERE / 'REPORT.md'}")
    text = _filled(README.read_text(), "results", results_table(headlines=True))
    attack = read("attack")
    if attack is not None:
        text = _filled(text, "attack", attack_text(attack))
    overhead = read("overhead")
    if overhead and peers and any("ratio" in row for row in peers["rows"]):
        text = _filled(text, "steps", steps_text(peers, overhead, elsewhere))
    README.write_text(text)
