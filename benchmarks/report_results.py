"""The zoo's results as a table: value, estimator, reference, time; and the front page's sentences
about speed and attacks.
"""

import math
import statistics
import textwrap
from typing import Any

from benchmarks.common import machine, markdown, percent, quartiles
from genjax.zoo import ZOO
from genjax.zoo.catalogue import measured

# What others published for the same quantity; the source is named because the figure is not ours.
REFERENCES = {
    "transformer-shakespeare": "1.88 nats per character (nanoGPT's README, which leaves out the "
    "first of a window)",
    "transformer-names": "1.92 nats per character (makemore's README, other test names)",
    "gru-names": "1.92 nats per character (the same)",
    "rnn-jsb": "8.91 nats per frame (Bai 2018, table 1, without the first frame)",
    "gru-jsb": "8.43 nats per frame (the same)",
    "lstm-jsb": "8.45 nats per frame (the same)",
    "made-mnist": "-88.04 (of static binarisation; one of the MADEs of Germain 2015, which differ "
    "in layers and masks)",
    "pixelcnn-mnist": "-81.30 (PixelCNN, of static binarisation; van den Oord 2016, table 4)",
    "vae-mnist": "-86.8 (2x200 units, K=5000, 3,280 epochs; Burda 2015, table 1)",
}


# Of the figures about samples, those that the README shows; the report shows all.
HEADLINES = ("high-quality share", "modes covered", "class agreement", "FD[cnn-v1]", "recall")


# The rows that the README shows: one of each kind of family, and those with a published reference
# or the best figure of their data.
FRONT = (
    "vae",
    "vae-mnist",
    "gan-ring",
    "gru-names",
    "lstm-jsb",
    "transformer-shakespeare",
    "vrnn-jsb",
    "mamba-shakespeare",
    "nsf-ring",
    "made-mnist",
    "pixelcnn-mnist",
    "pixelcnn-digits",
    "vdm-digits",
    "flow-matching",
    "vae-flow-prior",
    "reflow-2d",
)


def optimiser_parts(found: dict[str, Any]) -> list[str]:
    """The part about optimisers."""
    rows = []
    for task in found["tasks"]:
        for algorithm, of in task["algorithms"].items():
            final, reached = of["final"], of["steps_to_adam"]
            spread = "" if final["sd"] is None else f" ± {final['sd']:.3f}"
            seconds = "-" if reached is None else f"{reached * of['ms'] / 1000:.0f}"
            rows.append(
                [
                    f"`{task['task']}`",
                    algorithm,
                    f"{of['learning_rate']:g} of {', '.join(of['tried'])}",
                    f"{final['mean']:.3f}{spread}",
                    "-" if task["truth"] is None else f"{task['truth']:.3f}",
                    f"{of['ms']:.1f}",
                    "-" if reached is None else f"{reached:,}",
                    seconds,
                ]
            )
    header = ["task", "algorithm", "step size, of those tried", "nats, at the end", "the truth"]
    header += ["ms a step", "steps to AdamW's end", "seconds to it"]
    return [
        "## Adam, Muon and schedule-free",
        "",
        "Loss on the validation split, in nats of an example (mean and standard deviation over "
        f"{len(found['seeds'])} seeds; {machine(found)}). The step size is the best for the first "
        "seed of those listed; while it was the smallest or the largest, a further one was tried, "
        "up to a limit. All other settings are the row's, but schedule-free has neither a schedule "
        "nor another average of weights. Seconds are of training alone, without compiling and "
        "evaluating; the truth is what the true distribution has on the same examples.",
        "",
        markdown(header, rows),
        "",
        "![loss against steps and seconds](results/optimisers.png)",
        "",
    ]


def results_table(headlines: bool = False) -> str:
    """The zoo's results as Markdown: family, data, value, estimator, reference, time. With
    `headlines` only the rows of `FRONT`, and fewer figures about samples.
    """
    results = measured()
    rows = []
    for name, recipe in ZOO.items():
        r = results.get(name)
        if headlines and (name not in FRONT or r is None):
            continue
        if r is None:
            rows.append([f"`{name}`", recipe.data, "not measured", "", "", ""])
            continue
        reference = REFERENCES.get(name, "")
        if "true_log_prob" in r:
            reference = f"{r['true_log_prob']:.2f} (the true density, same examples)"
            if "per_step" in r:
                per = -r["true_log_prob"] * r["n"] / r["per_step"]["n"]
                unit = f"nats per {r['per_step']['step']}"
                reference = f"{per:.3f} {unit} (the true distribution, same examples)"
        if "figures" in r:
            shown = [
                figure for figure in r["figures"] if figure["name"] in HEADLINES or not headlines
            ]
            value = "; ".join(map(figure_text, shown))
            how = f"{r['estimator']}; as many samples as examples"
        elif "per_step" in r:
            per = r["per_step"]
            code = mean_and_sd({"mean": per["nats"], "sd": per["sd"]}, ".3f")
            bound, bits = "at most " * ("bound" in r["kind"]), per["nats"] / math.log(2)
            value = f"{bound}{code} nats per {per['step']}, {bits:.3f} bits"
            error = f"s.e. over examples {per['standard_error']:.3f}"
            how = f"{r['estimator']}; {error}; {per['n']:,} {per['step']}s"
        else:
            bits = f", {r['bits_per_dim']:.3f} bits/dim" if "bits_per_dim" in r else ""
            value = f"{'at least ' * ('bound' in r['kind'])}{mean_and_sd(r, '.2f')} nats{bits}"
            how = f"{r['estimator']}; s.e. over examples {r['standard_error']:.2f}"
        how += f"; {r['split']}, n={r['n']:,}; {len(r['seeds'])} seed{'s' * (len(r['seeds']) != 1)}"
        rows.append(
            [
                f"`{name}`",
                r["data"],
                value,
                how,
                reference or "-",
                f"{r['train_seconds']['mean']:.0f} s",
            ]
        )
    table = markdown(["recipe", "data", "value", "estimator", "reference", "training time"], rows)
    return f"{table}\n{_not_shown(results)}" if headlines else table


def _not_shown(results: dict[str, Any]) -> str:
    """A line about the families that the README's table leaves out."""
    seen = {ZOO[name].family.__name__ for name in FRONT if name in results}
    of = {name: row.family.__name__ for name, row in ZOO.items()}
    known = sorted({of[name] for name in results} - seen)
    others = sorted(set(of.values()) - seen - set(known))
    lines = []
    for what, families in (("In the report", known), ("Not measured yet", others)):
        if families:
            lines.append(f"{what}: {', '.join(f'`{family}`' for family in families)}.")
    return "\n" + " ".join(lines) if lines else ""


def mean_and_sd(r: dict[str, Any], form: str) -> str:
    """A result over seeds in words."""
    return f"{r['mean']:{form}}" + (f" ± {r['sd']:{form}}" if r["sd"] is not None else "")


def figure_text(figure: dict[str, Any]) -> str:
    """A figure about samples over seeds, and the same figure of real data."""
    real = "" if figure["real"] is None else f" (real data {figure['real']:.3g})"
    return f"{figure['name']} {mean_and_sd(figure, '.3g')}{real}"


def published_parts(found: dict[str, Any]) -> list[str]:
    """The part about rows with a published reference."""
    return [
        "## Counted as their references count",
        "",
        "Nats per step of the test split without the first step of each sequence, which nanoGPT "
        "and Bai (2018) do not predict; "
        f"mean and sd over training seeds ({machine(found)}). Shakespeare's last tenth is "
        "nanoGPT's validation split.",
        "",
        markdown(
            ["recipe", "nats", "seeds", "s.e. over sequences", "steps", "reference"],
            [
                [
                    f"`{row['recipe']}`",
                    mean_and_sd(row, ".3f"),
                    str(len(row["by_seed"])),
                    f"{row['standard_error']:.3f}",
                    f"{row['steps']:,}",
                    f"{row['reference']} ({row['source']})",
                ]
                for row in found["rows"]
            ],
        ),
        "",
    ]


def makemore_parts(found: dict[str, Any]) -> list[str]:
    """The part about first names beside makemore's Transformer."""
    results, runs = measured(), found["runs"]
    ours = {
        name: results[name]["per_step"]
        for name, row in ZOO.items()
        if row.data == "names" and name in results
    }
    rows = [
        [
            f"`{name}`",
            mean_and_sd({"mean": per["nats"], "sd": per["sd"]}, ".3f"),
            str(len(per["by_seed"])),
        ]
        for name, per in ours.items()
    ]
    rows.append(["makemore's Transformer", mean_and_sd(found, ".3f"), str(len(runs))])
    steps = ", ".join(f"{run['best_step']:,}" for run in runs)
    return [
        "## First names beside makemore's Transformer",
        "",
        "Nats per character of the same 1,000 test names; mean and sd over training seeds "
        f"({machine(found)}). makemore's "
        f"model ({runs[0]['parameters']:,} parameters) was trained on the same names by its own "
        "settings in PyTorch "
        f"{runs[0]['torch']}, {found['steps']:,} steps, and is taken at its best step on the "
        f"validation names ({steps}). Its "
        "README gives 1.92 for another 1,000 names, on which the best step was chosen as well.",
        "",
        markdown(["model", "nats per character", "seeds"], rows),
        "",
    ]


def attack_text(found: dict[str, Any]) -> str:
    """What `python -m benchmarks attack` found, in one paragraph."""

    def count(part: str, name: str) -> str:
        return f"{found.get(part, {}).get(name, 0):,}"

    silent = sum(
        found.get(part, {}).get("silent", 0) for part in ("checkpoints", "files", "folders")
    )
    traces = sum(part.get("traceback", 0) for part in found.values() if isinstance(part, dict))
    equal = count("kills", "families that ended bitwise equal")
    how = ("accepted", "absurd and accepted")
    accepted = sum(found.get("arguments", {}).get(name, 0) for name in how)
    sentences = [
        f"`python -m benchmarks attack` ({found['date']}): {count('kills', 'kills')} runs killed",
        f"by SIGKILL, half of them in a save: {equal} of {count('kills', 'families')} families",
        "ended bitwise as if never stopped.",
        f"{count('checkpoints', 'damaged')} damaged checkpoints,",
        f"{count('files', 'mutated files')} mutated files of data and",
        f"{count('folders', 'spoiled folders')} spoiled run folders: {silent} silent wrong",
        f"results. {count('arguments', 'argument lists')} lists of flags with absurd values:",
        f"{count('arguments', 'told')} refused, {accepted:,} accepted,",
        f"{count('arguments', 'absurd and accepted')} of these with NaN or infinity. {traces}",
        "tracebacks in all.",
    ]
    return textwrap.fill(" ".join(sentences), 100)


def _beside_pytorch(peers: dict[str, Any]) -> tuple[list[dict[str, Any]], list[float], list[str]]:
    """The rows of their own size that have a twin; of their ratios, with as many steps a dispatch
    as a row has and with one, the geometric means, and the least and the most in words.
    """
    rows = [row for row in peers["rows"] if row["size"] == "small" and "ratio" in row]
    kinds = [[row[kind]["median"] for row in rows] for kind in ("ratio", "ratio_one_step")]
    means = [statistics.geometric_mean(ratios) for ratios in kinds]
    return rows, means, [f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in kinds]


def elsewhere_parts(peers: dict[str, Any]) -> list[str]:
    """The part about the same rows beside PyTorch on another machine."""
    rows, means, _ = _beside_pytorch(peers)
    lines = [
        [
            f"`{row['recipe']}`",
            f"{row['ms'][row['best']]['median']:.2f}",
            f"{row['ms'][row['torch']['best']]['median']:.2f}",
            quartiles(row["ratio"], ".2f"),
            f"{row['ratio_one_step']['median']:.2f}",
        ]
        for row in rows
    ]
    return [
        "### On another machine",
        "",
        f"The same, of the rows' own size, where a large product has {peers['peak_gflops']:.0f} "
        f"GFLOP/s ({machine(peers)}).",
        "",
        markdown(["recipe", "genjax, ms", "PyTorch, ms", "ratio (quartiles)", "one step"], lines),
        "",
        f"Geometric means of the ratios: {means[0]:.2f}; with one step a dispatch {means[1]:.2f}.",
        "",
    ]


def steps_text(
    peers: dict[str, Any], overhead: dict[str, Any], elsewhere: dict[str, Any] | None
) -> str:
    """What a step takes beside PyTorch, on another machine too where that was measured, and beside
    plain jax, at the rows' own size, in one paragraph.
    """
    rows, means, spans = _beside_pytorch(peers)
    by_hand = [case["ratio"]["median"] for case in overhead["step"]]
    where = f"products at {peers['peak_gflops']:.0f} GFLOP/s"
    if elsewhere:
        _, also, _ = _beside_pytorch(elsewhere)
        where += f"; {also[0]:.2f} and {also[1]:.2f} at {elsewhere['peak_gflops']:.0f}"
    sentence = (
        f"A step of {len(rows)} rows takes {means[0]:.2f} of PyTorch's time with as many steps a "
        f"dispatch as the row has, {means[1]:.2f} with one ({where}): geometric means, each "
        f"under its best allocator ({spans[0]} and {spans[1]}; {peers['hardware']['cores']} cores, "
        f"jax {peers['versions']['jax']}; see the notes), and "
        f"{percent(min(by_hand))} to {percent(max(by_hand))} over one by hand in plain jax."
    )
    return textwrap.fill(sentence, 110)
