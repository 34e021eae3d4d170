"""The command line: genjax list | train | sample | evaluate | export | compare | sweep | compile |
bench.

Nothing heavy is imported until a command needs it, so that `genjax --help` answers at once. A
command's flags come from types: those of `train`, `sweep`, `compile` and `bench` from the
signatures of the recipe's builder and data loader (flags.py). What is about run folders is
in of_runs.py.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from genjax.cli.failures import streams, told
from genjax.cli.flags import axes_of, parse_recipe
from genjax.cli.start import restart
from genjax.cli.terminal import are_numbers, numbers, print_table, say
from genjax.errors import ConfigError, Interrupted, unknown_name

if TYPE_CHECKING:
    from genjax.profiling.ahead import Compiled
    from genjax.zoo.recipe import Recipe

HELP = """\
usage: genjax COMMAND ...

Pure-function generative models in JAX.

  list             the zoo as a table: what each recipe is, and what to expect of it
  train NAME       train a recipe in a run folder, or go on where it stopped
  sample RUN       draw samples from a run folder: pictures, text (with a --prompt), music
  evaluate RUN     log-probability, bound or figures about samples on the test split,
                   into report.json
  export RUN       weights as safetensors, sampler and score as StableHLO
  compare RUN ...  settings that differ, figures with their errors, one picture of curves
  sweep NAME       many seeds and settings as one compiled program:
                   --seeds 4 --learning-rate 1e-3,3e-4
  compile NAME     the step compiled for TPUs that are not here: --topology v5e:2x2;
                   memory, FLOPs, best time
  bench NAME       steps/s, examples/s, compile time, FLOPs and share of the machine's peak

`genjax COMMAND --help` and `genjax train NAME --help` list the flags. A setting may say its
section, too: --optimizer.b1 for --b1. Exit codes: 0 done, 2 an error that is said in one
message, 143 or 130 stopped by a signal after saving.
"""


@dataclasses.dataclass(frozen=True)
class _Out:
    """Where to, beside the recipe's own settings.

    Attributes:
        out: the run folder; runs/NAME and the settings that you changed unless given.
        plain: progress as plain lines instead of a bar.
    """

    out: Path | None = None
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class _Train(_Out):
    """Where to and on what, beside the recipe's own settings.

    Attributes:
        mesh: devices to train on, such as data=8, or data=2,fsdp=4 to split the state as well, or
            tensor=2 for a Transformer; one device unless given. A run may go on with another mesh.
        init_from: a run folder whose parameters this run begins with, wherever names and shapes are
            the same.
        log_to: wandb, trackio or both: where the figures and pictures go as well. A run may go on
            with another.
        first: train the run that this recipe stands on before it, where that is not done yet.
        distributed: train over several processes, each of which runs this command with the same
            settings. On Slurm, Open MPI, Cloud TPU and Kubernetes that is all; elsewhere the three
            below, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the
            environment, are needed too.
        coordinator: host:port of process 0, for --distributed.
        processes: how many processes there are, for --distributed.
        process: which of them this is, from 0, for --distributed.
    """

    mesh: str | None = None
    init_from: Path | None = None
    log_to: tuple[Literal["wandb", "trackio"], ...] = ()
    first: bool = False
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


@dataclasses.dataclass(frozen=True)
class _Sweep(_Out):
    """Where to, and which members, beside the recipe's own settings.

    Attributes:
        seeds: members per combination of settings, with seeds --seed, --seed + 1, ...
        mode: one batched program, one member after the other, or whichever is measured to be
            faster.
    """

    seeds: int = 4
    mode: Literal["vmap", "map", "auto"] = "vmap"


@dataclasses.dataclass(frozen=True)
class _Bench:
    """How to measure.

    Attributes:
        seconds: how long to time the step, in seconds.
        mesh: devices that share the step, such as data=2,fsdp=4; one unless given.
    """

    seconds: float = 5.0
    mesh: str | None = None


@dataclasses.dataclass(frozen=True)
class _Compile:
    """What to compile for.

    Attributes:
        topology: TPUs, such as v5e:2x2 (v4, v5e, v5p, v6e), or cuda, for which the step is only
            lowered.
        mesh: how to split the work over them, such as data=2,fsdp=2; data parallel over all unless
            given.
    """

    topology: str = "v5e:2x2"
    mesh: str | None = None


def _train(args: list[str]) -> None:
    recipe, row, options = parse_recipe("train", args, _Train)
    from genjax.cli.progress import console
    from genjax.learning import distributed
    from genjax.learning.sharding import parse_mesh
    from genjax.runs.folder import default_folder
    from genjax.runs.train import train

    mesh = parse_mesh(options.mesh) if options.mesh is not None else None
    joined = (options.coordinator, options.processes, options.process)
    if options.distributed:
        distributed.start(*joined)
    elif joined != (None, None, None):
        raise ConfigError(
            "--coordinator, --processes and --process are for several processes: give "
            "--distributed as well."
        )
    folder = options.out or default_folder(recipe, row)
    if options.first:
        _train_first(recipe, options.plain or None)
    if options.distributed and not distributed.writes():  # process 0 speaks for all
        train(recipe, folder, mesh=mesh, init_from=options.init_from, log_to=options.log_to)
        return
    say(
        f"genjax train {recipe.name}: {row.summary}, on {recipe.data}, for {recipe.schedule.steps} "
        f"steps, in {folder}"
    )
    if recipe.data != row.data:
        say(_other_data(row, recipe))
    with console(recipe.name, options.plain or None) as progress:
        start, to = options.init_from, options.log_to
        state = train(recipe, folder, progress, say, mesh, init_from=start, log_to=to)
    say(f"trained to step {int(state.step)}; see {folder}/samples and {folder}/curves.png")
    quoted = shlex.quote(str(folder))
    say(f"next: genjax evaluate {quoted}   or   genjax sample {quoted} --n 64")


def _other_data(row: "Recipe", recipe: "Recipe") -> str:
    """What else changes where a recipe is trained on other data than its row's."""
    own = recipe.data_options
    kept = {name: value for name, value in row.data_options.items() if own.get(name) == value}
    lost = [name for name in row.data_options if name not in own]
    line = f"{recipe.data} in the place of {row.data}"
    if kept:
        line += f"; kept {', '.join(f'{name}={value}' for name, value in kept.items())}"
    if lost:
        line += f"; left out, as these data have no such option: {', '.join(lost)}"
    if row.model.get("lanes") and recipe.model.get("lanes") == 0:
        line += "; lanes=0, as they are no streams"
    return line


def _train_first(recipe: "Recipe", plain: bool | None) -> None:
    """Train what a recipe stands on, in the folder that it names, or go on with it."""
    from genjax.cli.progress import console
    from genjax.runs.stages import first_to_train
    from genjax.runs.train import train

    first = first_to_train(recipe)
    if first is None:
        say(f"first: {recipe.data} is trained already")
        return
    say(f"first: genjax train {first.name}, in {recipe.data}")
    with console(first.name, plain) as progress:
        train(first, Path(recipe.data), progress)


def _axes_in(args: Sequence[str]) -> tuple[dict[str, list[float]], list[str]]:
    """The flags with values to sweep over, numbers between commas; and the other arguments."""
    axes, others = {}, []
    index = 0
    while index < len(args):
        flag, equals, value = args[index].partition("=")
        taken = 1
        if not equals and index + 1 < len(args):
            value, taken = args[index + 1], 2
        if flag.startswith("--") and are_numbers(value) and flag not in ("--data", "--out"):
            axes[flag[2:]] = numbers(flag, value)
            index += taken
        else:
            others.append(args[index])
            index += 1
    return axes, others


def _sweep(args: list[str]) -> None:
    flags, others = _axes_in(args)
    recipe, row, options = parse_recipe("sweep", others, _Sweep)
    axes = axes_of(recipe, row.on(recipe.data), flags, _Sweep)
    from genjax.cli.progress import console
    from genjax.runs.folder import default_folder
    from genjax.runs.sweeps import check_axes, run_sweep

    check_axes(recipe, axes)
    folder = options.out or default_folder(recipe, row, "sweep-", **axes, seeds=options.seeds)
    settings = math.prod(map(len, axes.values()))
    print(
        f"genjax sweep {recipe.name}: {settings} settings x {options.seeds} seeds as one program, "
        f"in {folder}",
        flush=True,
    )
    with console(f"sweep {recipe.name}", options.plain or None) as progress:
        results = run_sweep(recipe, axes, options.seeds, folder, options.mode, progress)
    print_table(
        f"{results['metric']} in {results['unit']} ({results['estimator'] or 'as trained'}; "
        f"{results['split']} split, n={results['n']}, {options.seeds} seeds, {results['steps']} "
        "steps)",
        [*axes, "mean", "sd over seeds", "not finite"],
        [
            [
                *(f"{line['settings'][name]:g}" for name in axes),
                _number(line["mean"]),
                _number(line["sd"]),
                str(line["not_finite"]),
            ]
            for line in results["results"]
        ],
    )
    print(f"written: {folder}/results.json")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bench(args: list[str]) -> None:
    recipe, _, options = parse_recipe("bench", args, _Bench)
    from genjax.learning.sharding import parse_mesh
    from genjax.profiling import allocators
    from genjax.profiling.measure import step_cost
    from genjax.runs.folder import environment
    from genjax.runs.stages import first_of

    mesh = parse_mesh(options.mesh) if options.mesh is not None else None
    cost = step_cost(recipe, options.seconds, first_of(recipe), mesh)
    machine = environment()["hardware"]
    shared = f", over a mesh {options.mesh}" if mesh else ""
    lines = [
        ["steps/s", f"{cost.steps_per_second:.1f} ({cost.milliseconds:.3f} ms, median)"],
        ["examples/s", f"{cost.examples_per_second:.0f}"],
        ["compile", f"{cost.compile_seconds:.2f} s"],
        ["FLOPs per step", f"{cost.flops:.4g} (of one device)"],
        ["of products", f"{cost.product_flops:.4g} (as the step asks for them, of all devices)"],
        [
            "share of peak",
            f"{100 * cost.share_of_peak:.1f} % of {cost.peak_gflops:.0f} GFLOP/s (a "
            f"{cost.product} product)",
        ],
        ["temporary memory", f"{cost.temporary_bytes / 2**20:.2f} MiB"],
        ["allocator", allocators.in_use()],
    ]
    if cost.steps_of_sequences:
        figure = f"{cost.steps_of_sequences * cost.steps_per_second:.0f}"
        lines.insert(2, ["steps of sequences/s", figure])
    if cost.share_of_datasheet is not None:
        figure = f"{100 * cost.share_of_datasheet:.1f} % of bfloat16, by products"
        lines.insert(-2, ["share of the data sheet", figure])
    print_table(
        f"one optimiser step of {recipe.name} per dispatch, batch {cost.batch_size}, "
        f"on {machine['device']} ({machine['cores']} cores){shared}",
        ["what", "figure"],
        lines,
    )
    line = allocators.advice(*allocators.here())
    if line is not None:
        say(line)


def _compile(args: list[str]) -> None:
    # Before jax is imported: what is compiled for is not here.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    recipe, _, options = parse_recipe("compile", args, _Compile)
    from genjax.learning.sharding import describe, parse_mesh
    from genjax.profiling.ahead import compile_for, lowered_for_cuda
    from genjax.runs.stages import first_of

    mesh = parse_mesh(options.mesh) if options.mesh is not None else None
    on = first_of(recipe)
    if options.topology == "cuda":
        if mesh is not None:
            raise ConfigError(
                "A step is lowered for CUDA as one device runs it: leave out --mesh, or take a "
                "topology of several chips, such as v5e:2x2."
            )
        size = lowered_for_cuda(recipe, on)
        print(
            f"a step of {recipe.name} lowers for CUDA: {size} bytes of StableHLO (compiling it "
            "takes a GPU)"
        )
        return
    found = compile_for(recipe, options.topology, mesh, on)
    fits = "fits" if found.memory <= found.capacity else "DOES NOT FIT"
    print_table(
        f"a step of {recipe.name}, batch {recipe.schedule.batch_size}, compiled for "
        f"{options.topology} over a mesh "
        f"{describe(found.mesh)}; nothing was run",
        ["what, on each device", "figure"],
        [
            ["device", found.device],
            ["compile", f"{found.compile_seconds:.2f} s, on this machine"],
            [
                "memory",
                f"{found.memory / 2**20:.1f} MiB of {found.capacity / 2**30:.0f} GiB: {fits}",
            ],
            ["FLOPs", f"{found.flops:.4g} (of products, by the step's jaxpr)"],
            ["bytes accessed", f"{found.bytes_accessed:.4g} (by the compiler)"],
            *_least_time(found),
        ],
    )


def _least_time(found: "Compiled") -> list[list[str]]:
    """What the compiler says of a step's time, if it does."""
    if found.optimal_seconds is None or found.share_of_peak is None:
        return [["least time", "no estimate: the compiler has none for a part of this step"]]
    least = f"{1000 * found.optimal_seconds:.4g} ms, by the compiler's own estimate"
    share = f"{100 * found.share_of_peak:.2f} % of the bfloat16 peak, in that time"
    return [["least time", least], ["share of peak", share]]


def _list(args: list[str]) -> None:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class List:
        """The zoo as a table; expected results and times are those that `python -m benchmarks
        results` measured.
        """

        json: bool = False
        """Print JSON instead of a table."""

    options = tyro.cli(List, prog="genjax list", args=args)
    from genjax.zoo.catalogue import rows

    table = rows()
    if options.json:
        import json

        print(json.dumps(table, indent=2))
        return
    columns = ("name", "family", "data", "score", "conditional", "parameters", "expected", "time")
    print_table(
        "the zoo", list(columns), [[str(row[column]) for column in columns] for row in table]
    )


def _sample(args: list[str]) -> None:
    from genjax.cli.of_runs import sample

    sample(args)


def _evaluate(args: list[str]) -> None:
    from genjax.cli.of_runs import evaluate

    evaluate(args)


def _export(args: list[str]) -> None:
    from genjax.cli.of_runs import export

    export(args)


def _compare(args: list[str]) -> None:
    from genjax.cli.of_runs import compare

    compare(args)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "list": _list,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "export": _export,
    "compare": _compare,
    "sweep": _sweep,
    "compile": _compile,
    "bench": _bench,
}


def _keep_compiled_programs() -> None:
    """Have jax keep what took it long to compile on disk, so that the same command starts faster
    the next time.

    In $JAX_COMPILATION_CACHE_DIR, or genjax/xla in the user's cache folder, in a folder for each
    kind of processor: a home folder may be shared by several, and a program compiled for one need
    not run on another. JAX_ENABLE_COMPILATION_CACHE=0 turns it off. A damaged entry is compiled
    again, with a warning; where nothing can be written, nothing is kept.
    """
    if "jax" in sys.modules:  # which has read its settings
        return
    processor = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # no such file but on Linux
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        processor += "".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genjax" / "xla"
    cache /= hashlib.sha256(processor.encode()).hexdigest()[:12]
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:  # of which jax would warn at every program
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    # jax's own second skips most steps of a CPU.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("genjax-zoo"))
        return
    if args[0] not in COMMANDS:
        raise unknown_name("command", args[0], COMMANDS)
    if args[0] not in ("bench", "compile"):  # which say how long compiling takes
        _keep_compiled_programs()
    COMMANDS[args[0]](args[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """The `genjax` program."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with streams():
            if argv is None:
                restart(args)
            _run(args)
        sys.stdout.flush()
    except Interrupted as stop:
        say(f"genjax: {stop}", sys.stderr)
        raise SystemExit(128 + stop.signal) from None
    except BrokenPipeError:  # of `genjax list | head`; Python would complain once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # as shells have it, 128 + SIGPIPE
    except KeyboardInterrupt:
        print("genjax: interrupted; what was saved before is still there.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        text = told(error, args[0] if args else "")
        if text is None:
            raise
        say(f"genjax: error: {text}", sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
