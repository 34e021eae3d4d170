"""`python -m benchmarks`: measure everything and write the report. `python -m benchmarks --help`
lists the parts.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure, and write benchmarks/results/*.json, benchmarks/REPORT.md, the README's tables and
    genjax/zoo/results.json.
    """

    part: Annotated[
        Literal[
            "all",
            "overhead",
            "throughput",
            "adversarial",
            "dcgan",
            "nanogpt",
            "peers",
            "published",
            "makemore",
            "generation",
            "denoising",
            "flows",
            "programs",
            "memory",
            "sampling",
            "startup",
            "ensemble",
            "convolution",
            "widths",
            "pages",
            "optimisers",
            "buckets",
            "larger",
            "pixels",
            "attack",
            "accelerator",
            "tpus",
            "results",
            "gallery",
            "report",
        ],
        tyro.conf.Positional,
    ] = "all"
    """What to measure. `results` trains every recipe, `adversarial` many GANs, `dcgan` one and its
    PyTorch twin, `nanogpt` a Transformer's step and its twin (GENJAX_TORCH_PYTHON names their
    interpreter), `peers` a step of every family at two sizes, and their twins, `published` rows as
    the source of their reference counts, from runs in `keep`, `makemore` what makemore's
    Transformer in PyTorch reaches on our first names, `generation` cached sampling, `denoising`
    what diffusion and flow matching reach, `flows` how far flows end from densities that are
    known, and beside zuko's and flowjax's (GENJAX_ZUKO_PYTHON and GENJAX_FLOWJAX_PYTHON name their
    interpreters), `programs` the size of compiled steps (the baseline of
    tests/test_programs.py, for this version of jax), `memory` what they need, `sampling` samplers
    by batch, `startup` from the command to the first step, `ensemble` many small models at once,
    `convolution` gradients beside flax's convolutions, `widths` steps as shares of the peak,
    `pages` a step of every row under each allocator of memory that is here, `buckets` sequences in
    buckets of lengths, `larger` 8 GiB of images in 2 GiB of memory, and how fast data open,
    `pixels` cached
    sampling beside whole passes, `attack`
    what kills, damage and random arguments do (`names`: kills, checkpoints, files, folders,
    arguments), `optimisers` losses of Adam, Muon and schedule-free (`names`:
    transformer-shakespeare, gpt2-124m), `accelerator` what the card here does (`names`: right,
    torch, attention, scale, bitwise, members), `tpus` what their compiler says of steps (needs
    libtpu). `all` leaves these out.
    """
    names: tuple[str, ...] = ()
    """For `results`, `peers`, `flows`, `pages`, `tpus`: only these recipes; all unless given."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """For `results`, `makemore`, `flows` and `optimisers`: training seeds."""
    seconds: float | None = None
    """Seconds for each comparison, and for `pages` for each turn; each part's own default unless
    given.
    """
    rounds: int | None = None
    """For `pages`: turns of each allocator; 7 unless given."""
    keep: Path | None = None
    """For `results`, `dcgan`, `published`, `denoising`, `flows`, `optimisers`: keep run folders
    here, and do not train again what is here already.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for."""
    args = tyro.cli(Args, prog="python -m benchmarks", args=argv)
    from benchmarks.common import one_message

    with one_message():
        _run(args)


def _run(args: Args) -> None:
    """The parts, and the report of all that there is."""
    if args.part in ("results", "peers", "flows", "pages", "tpus"):
        from genjax.zoo import ZOO
        from genjax.zoo.recipe import unknown_recipe

        for name in args.names:
            if name not in ZOO:
                raise unknown_recipe(name, ZOO)
    if args.part in ("all", "overhead"):
        from benchmarks import overhead

        overhead.main(*([args.seconds] if args.seconds else []))
    if args.part in ("all", "throughput"):
        from benchmarks import throughput

        throughput.main(*([args.seconds] if args.seconds else []))
    if args.part == "adversarial":
        from benchmarks import adversarial

        adversarial.main(args.seconds or 10.0)
    if args.part == "dcgan":
        from benchmarks import adversarial

        adversarial.compare_with_torch(args.keep)
    if args.part == "nanogpt":
        from benchmarks import nanogpt

        nanogpt.main(args.seconds or 30.0)
    if args.part == "peers":
        from benchmarks import peers

        peers.main(*([args.seconds] if args.seconds else []), names=args.names)
    if args.part == "published":
        from benchmarks import published

        published.main(args.keep)
    if args.part == "makemore":
        from benchmarks import makemore

        makemore.main(list(args.seeds))
    if args.part == "generation":
        from benchmarks import generation

        generation.main(*([args.seconds] if args.seconds else []))
    if args.part == "denoising":
        from benchmarks import denoising

        denoising.main(args.keep)
    if args.part == "flows":
        from benchmarks import flow_peers, flows

        flows.main(list(args.names), list(args.seeds), args.keep)
        flow_peers.main(args.names, args.seeds)
    if args.part in ("programs", "memory", "startup", "larger"):
        importlib.import_module(f"benchmarks.{args.part}").main()
    if args.part in ("sampling", "ensemble", "convolution", "widths", "buckets", "pixels"):
        importlib.import_module(f"benchmarks.{args.part}").main(
            *([args.seconds] if args.seconds else [])
        )
    if args.part == "pages":
        from benchmarks import pages

        asked = {"rounds": args.rounds, "block": args.seconds}
        pages.main(args.names, **{name: value for name, value in asked.items() if value})
    if args.part == "accelerator":
        from benchmarks import accelerator

        accelerator.main(names=args.names)
    if args.part == "tpus":
        from benchmarks import tpus

        tpus.main(args.names)
    if args.part == "optimisers":
        from benchmarks import optimisers

        optimisers.main(args.names, args.seeds, args.keep)
    if args.part == "attack":
        from benchmarks import attack

        attack.main(args.names)
    if args.part == "results":
        from benchmarks import results_of_zoo

        results_of_zoo.main(list(args.names), list(args.seeds), args.keep)
    # Of a few rows it would be a picture of less than there is.
    if args.part == "gallery" or (args.part == "results" and args.keep and not args.names):
        from benchmarks import gallery

        if args.keep is None:
            raise SystemExit(
                "gallery draws the runs that `results --keep FOLDER` left: give --keep FOLDER."
            )
        gallery.main(args.keep)
    from benchmarks import report

    report.main()


if __name__ == "__main__":
    main()
