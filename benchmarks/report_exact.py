"""The report's sections about exact likelihoods: how far flows end from the truth, alone and beside
those of other libraries, and what caches gain a PixelCNN.
"""

from typing import Any

from benchmarks.common import machine, markdown, quartiles, read


def flow_parts(found: dict[str, Any]) -> list[str]:
    """The part about flows whose density is known."""
    rows = [
        [
            f"`{row['recipe']}`",
            ", ".join(f"{gap:.4f}" for gap in row["by_seed"]),
            f"{row['standard_error']:.4f}",
            f"{row['round_trip']:.1e}",
            f"{row['n']:,}",
        ]
        for row in found["rows"]
    ]
    return [
        "## Flows beside the truth",
        "",
        "The mean of ln p(x) - ln q(x) over test points whose density is known, in nats, and the "
        "worst difference of such a point from what comes back of its noise, in float32 "
        f"({machine(found)}).",
        "",
        markdown(["recipe", "nats, by seed", "s.e.", "there and back", "n"], rows),
        "",
    ]


def flow_peer_parts(found: dict[str, Any]) -> list[str]:
    """The part about flows beside those of other libraries."""
    rows = []
    for row in found["rows"]:
        for name, own in row["libraries"].items():
            more = ", ".join(f"{mean:+.4f} ± {error:.4f}" for mean, error in own["genjax_more_by"])
            beside = name != "genjax"
            rows.append(
                [
                    f"`{row['recipe']}`",
                    f"{name} ({own['version']})",
                    f"{own['parameters']:,}",
                    ", ".join(f"{gap:.4f}" for gap in own["gap"]["by_seed"]),
                    f"{own['standard_error']:.4f}",
                    more if beside else "-",
                    f"{own['steps_per_second']:,.0f}",
                    quartiles(own["ratio"], ".2f") if beside else "-",
                ]
            )
    sizes = ", ".join(
        f"`{row['recipe']}` {row['steps']:,} steps of batch {row['batch_size']}"
        for row in found["rows"]
    )
    header = ["recipe", "library", "parameters", "nats from the truth, by seed", "s.e."]
    header += ["genjax's log-likelihood less its", "steps/s", "genjax's time as a share of its"]
    return [
        "## Flows beside other libraries",
        "",
        "The same bijections, widths, number of layers, optimiser and batches, trained in turns, "
        f"one process each; {sizes}; {found['rows'][0]['n']:,} test points ({machine(found)}). How "
        "networks begin and how a spline's numbers become knots is as each library has it.",
        "",
        markdown(header, rows),
        "",
    ]


def pixel_parts(found: dict[str, Any]) -> list[str]:
    """The part about sampling a PixelCNN with caches."""
    rows = [
        [
            f"`{row['recipe']}`",
            str(row["batch"]),
            quartiles(row["cached"], ".3f"),
            quartiles(row["whole"], ".3f"),
            f"{row['faster']:.1f}",
            f"{100 * row['same']:.2f} %",
        ]
        for row in found["rows"]
    ]
    header = ["recipe", "batch", "with caches, s", "whole passes, s", "times faster", "same values"]
    return [
        "## Sampling pixel by pixel",
        "",
        "A batch of images from the same key, with caches of rows and with the whole network for "
        f"every pixel, in turns ({machine(found)}); medians and quartiles.",
        "",
        markdown(header, rows),
        "",
    ]


def parts() -> list[str]:
    """All of these sections that have been measured."""
    sections = {"flows": flow_parts, "flow_peers": flow_peer_parts, "pixels": pixel_parts}
    measured = {name: read(name) for name in sections}
    return [line for name, found in measured.items() if found for line in sections[name](found)]
