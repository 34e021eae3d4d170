"""The command line: genjax list | train | sample | evaluate | sweep | bench.

Nothing heavy is imported until a command needs it, so that `genjax --help` answers at once. A command's flags come from
types: those of `train`, `sweep` and `bench` from the signatures of the recipe's builder and data loader.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from genjax.errors import ConfigError, GenjaxError, Interrupted, replacing, unknown_name

if TYPE_CHECKING:
    from genjax.config import Recipe

HELP = """\
usage: genjax COMMAND ...

Pure-function generative models in JAX.

  list                 the zoo as a table: what each recipe is, and what to expect of it
  train NAME           train a recipe in a run folder, or go on where it stopped
  sample RUN           draw samples from a run folder
  evaluate RUN         log-probability, bound or figures about samples on the test split, into report.json
  sweep NAME           many seeds and settings as one compiled program: --seeds 4 --learning-rate 1e-3,3e-4
  bench NAME           steps/s, examples/s, compile time, FLOPs and share of the machine's peak

`genjax COMMAND --help` and `genjax train NAME --help` list the flags. Exit codes: 0 done, 2 an error that is said in one
message, 143 or 130 stopped by a signal after saving.
"""


@dataclasses.dataclass(frozen=True)
class _Train:
    """Where to, beside the recipe's own settings.

    Attributes:
        out: the run folder; runs/NAME and the settings that you changed unless given.
        plain: progress as plain lines instead of a bar.
    """

    out: Path | None = None
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class _Sweep(_Train):
    """Where to, and which members, beside the recipe's own settings.

    Attributes:
        seeds: members per combination of settings, with seeds --seed, --seed + 1, ...
        mode: one batched program, one member after the other, or whichever is measured to be faster.
    """

    seeds: int = 4
    mode: Literal["vmap", "map", "auto"] = "vmap"


@dataclasses.dataclass(frozen=True)
class _Bench:
    """How to measure.

    Attributes:
        seconds: how long to time the step, in seconds.
    """

    seconds: float = 5.0


def _group(title: str, fields: dict[str, tuple[Any, Any, str]]) -> Any:
    """A dataclass whose fields become flags: name -> (type, default, help)."""
    import tyro

    made = []
    for name, (hint, default, text) in fields.items():
        flag = (
            tyro.conf.arg(help=text or None, name=name.replace("_", "-")) if "." in name else tyro.conf.arg(help=text or None)
        )
        made.append((name.replace(".", "__"), Annotated[hint, flag], dataclasses.field(default=default)))
    return dataclasses.make_dataclass(title, made, frozen=True, namespace={"__doc__": ""})


def _parse_recipe(command: str, args: list[str], options: type) -> "tuple[Recipe, Recipe, Any]":
    """Read NAME and flags: the recipe as set, the zoo's row, and the command's own options.

    Raises:
        ConfigError: for a name or data set that does not exist. Unknown and ill-typed flags end in tyro's own message.
    """
    import tyro

    from genjax.config import replace, sections_of
    from genjax.zoo import ZOO

    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(f"usage: genjax {command} NAME [flags]\n")
            print(f"`genjax {command} NAME --help` lists the flags of a recipe. There are:\n")
            print("\n".join(f"  {name:<20} {row.summary}, on {row.data}" for name, row in ZOO.items()))
            raise SystemExit(0)
        raise ConfigError(f"genjax {command} needs the name of a recipe. There are: {', '.join(ZOO)}.")
    name, rest = args[0], args[1:]
    if name not in ZOO:
        raise unknown_name("recipe", name, ZOO)
    row = ZOO[name]
    data = _value_of("--data", rest) or row.data
    # Another data set has other settings, so it is looked for before the flags are made.
    recipe = row if data == row.data else dataclasses.replace(row, data=data, data_options={})
    shown = sections_of(recipe)
    without_prefix = tyro.conf.arg(name="")
    fields: list[Any] = [
        ("data", Annotated[str, tyro.conf.arg(help="a data set's name, or an .npz or .npy file of your own")], data)
    ]
    fields += [(section, Annotated[_group(section, entries), without_prefix], None) for section, entries in shown.items()]
    fields += [("options", Annotated[options, without_prefix], None)]
    settings_type = dataclasses.make_dataclass(
        "Settings",
        [
            (n, hint, dataclasses.field(default=d) if d is not None else dataclasses.field())
            for n, hint, d in _required_first(fields)
        ],
        namespace={"__doc__": f"{row.summary}, on {row.data}."},
    )
    parsed: Any = tyro.cli(settings_type, prog=f"genjax {command} {name}", args=rest)
    changes: dict[str, Any] = {}
    for section, entries in shown.items():
        for field, (_, default, _) in entries.items():
            value = getattr(getattr(parsed, section), field.replace(".", "__"))
            if value != default:
                changes[field] = value
    return replace(recipe, **changes), row, parsed.options


def _required_first(fields: list[Any]) -> list[Any]:
    return sorted(fields, key=lambda field: field[2] is not None)


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
    return None


def _train(args: list[str]) -> None:
    recipe, row, options = _parse_recipe("train", args, _Train)
    from genjax import run
    from genjax.progress import console

    folder = options.out or run.default_folder(recipe, row)
    print(
        f"genjax train {recipe.name}: {row.summary}, on {recipe.data}, for {recipe.schedule.steps} steps, in {folder}",
        flush=True,
    )
    with console(recipe.name, options.plain or None) as progress:
        state = run.train(recipe, folder, progress)
    print(f"trained to step {int(state.step)}; see {folder}/samples and {folder}/curves.png")
    print(f"next: genjax evaluate {folder}   or   genjax sample {folder} --n 64")


def _sweep(args: list[str]) -> None:
    axes: dict[str, list[float]] = {}
    kept: list[str] = []
    index = 0
    while index < len(args):
        flag, _, value = args[index].partition("=")
        taken = 1
        if flag.startswith("--") and not value and index + 1 < len(args):
            value, taken = args[index + 1], 2
        if flag.startswith("--") and "," in value and flag not in ("--data", "--out"):
            axes[flag[2:].replace("-", "_")] = _numbers(flag, value)
            index += taken
            continue
        kept.append(args[index])
        index += 1
    recipe, row, options = _parse_recipe("sweep", kept, _Sweep)
    from genjax import run
    from genjax.progress import console
    from genjax.sweeps import check_axes, run_sweep

    check_axes(recipe, axes)
    folder = options.out or run.default_folder(recipe, row, "sweep-", **axes, seeds=options.seeds)
    settings = math.prod(map(len, axes.values()))
    print(f"genjax sweep {recipe.name}: {settings} settings x {options.seeds} seeds as one program, in {folder}", flush=True)
    with console(f"sweep {recipe.name}", options.plain or None) as progress:
        results = run_sweep(recipe, axes, options.seeds, folder, options.mode, progress)
    _print_table(
        f"{results['metric']} in {results['unit']} ({results['estimator'] or 'as trained'}; "
        f"{results['split']} split, n={results['n']}, {options.seeds} seeds, {results['steps']} steps)",
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


def _numbers(flag: str, value: str) -> list[float]:
    try:
        numbers = [float(text) for text in value.split(",") if text]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{flag} takes numbers separated by commas; got {value!r}.")
    return numbers


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed must be from 0 to 2**32 - 1; got {seed}.")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _sample(args: list[str]) -> None:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Sample:
        """Draw samples from a run: an array (.npz) and, where the data can be drawn, a picture (.png)."""

        run: Annotated[Path, tyro.conf.Positional]
        """The run folder."""
        n: int = 64
        """How many samples."""
        cond: str | None = None
        """A class (3), classes to cycle through (0,1,2), or the numbers of a vector (0.5,-1). Every class if left out."""
        seed: int = 0
        """Of the samples."""
        means: bool = False
        """Show means of p(x|z) instead of samples of x, where the family has them."""
        out: Path | None = None
        """Where to write, without an ending; in the run folder unless given."""

    options = tyro.cli(Sample, prog="genjax sample", args=args)
    if options.n < 1:
        raise ConfigError(f"--n must be at least 1; got {options.n}.")
    _check_seed(options.seed)
    import jax
    import numpy as np

    from genjax import figures, run

    loaded = run.load(options.run)
    cond = _condition(loaded.model.spec, options.cond, options.n)
    x = run.sample(loaded, jax.random.key(options.seed), options.n, cond, options.means)
    stem = (
        f"sample_n{options.n}_seed{options.seed}"
        + (f"_cond{options.cond}" if options.cond else "")
        + ("_means" * options.means)
    )
    out = options.out or options.run / "samples" / stem
    what = "means of p(x|z)" if options.means else "samples"
    title = f"{loaded.recipe.name}: {what}, step {loaded.step}, seed {options.seed}"
    labels = cond if loaded.model.spec.n_classes else None
    with replacing(out.with_name(out.name + ".npz")) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, x=x, **({} if cond is None else {"cond": cond}))
    figure = figures.samples(x, loaded.model.spec, title, run.true_log_prob(loaded.source), labels)
    if figure is not None:
        figures.save(figure, out.with_name(out.name + ".png"))
    print(f"{options.n} {what} {list(x.shape)} in {out}.npz" + (f" and {out}.png" if figure is not None else ""))


def _condition(spec: Any, text: str | None, n: int) -> Any:
    """What --cond says as an array for n samples; every class in turn, sorted, where it says nothing."""
    import numpy as np

    if text is None:
        return np.sort(np.resize(np.arange(spec.n_classes, dtype=np.int32), n)) if spec.n_classes else None
    numbers = _numbers("--cond", text)
    if spec.n_classes:
        if any(number not in range(spec.n_classes) for number in numbers):
            raise ConfigError(f"--cond takes classes 0..{spec.n_classes - 1}; got {text!r}.")
        return np.sort(np.resize(np.asarray(numbers, np.int32), n))
    return np.tile(np.asarray(numbers, np.float32), (n, 1))


def _evaluate(args: list[str]) -> None:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Evaluate:
        """What a run is worth on a split: log-probability, bound or figures about its samples, into report.json."""

        run: Annotated[Path, tyro.conf.Positional]
        """The run folder."""
        split: Literal["test", "valid", "train"] = "test"
        """Which split."""
        n: int | None = None
        """Only the first n examples; all unless given."""
        n_samples: int | None = None
        """Samples K of an importance-weighted bound; what the recipe says unless given."""
        seed: int = 0
        """Of the estimator's noise and of the binarisation of the data."""
        batch_size: int = 100
        """Examples at a time; it changes memory and speed, and the noise."""
        samples: bool = False
        """Give figures about samples as well, where there is a log-probability or bound."""

    options = tyro.cli(Evaluate, prog="genjax evaluate", args=args)
    for name in ("n", "n_samples", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}.")
    _check_seed(options.seed)
    from genjax import run
    from genjax.config import from_dict, parameters_of
    from genjax.zoo import ZOO

    recipe = from_dict(run.read_config(options.run), ZOO)
    changes = dict(recipe.evaluation)
    if options.n_samples is not None:
        if "n_bound_samples" not in parameters_of(recipe.family):
            raise ConfigError(f"{recipe.name} has no bound with samples; leave --n-samples out.")
        changes["n_bound_samples"] = options.n_samples
    loaded = run.load(options.run, **changes)
    counter = _counter("evaluate")
    report = run.evaluate(loaded, options.split, options.n, options.seed, options.batch_size, counter, options.samples)
    run.write_json(options.run / "report.json", report)
    rows = []
    if "figures" not in report or report["kind"] != report["figures"][0]["name"]:
        rows.append(["value", f"{report['mean']:.3f} ± {report['standard_error']:.3f} {report['unit']} ({report['kind']})"])
    for figure in report.get("figures", []):
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.2g}"
        real = "" if figure["real"] is None else f"; real data {figure['real']:.4g}"
        rows.append([figure["name"], f"{figure['value']:.4g}{error} {figure['unit']} ({figure['estimator']}{real})"])
    if "bits_per_dim" in report:
        rows.append(["bits per dimension", f"{report['bits_per_dim']:.4f}"])
    if "true_log_prob" in report:
        truth = report["true_log_prob"]
        rows.append(["true log-density", f"{truth['mean']:.3f} ± {truth['standard_error']:.3f} nats, on the same examples"])
    rows += [[name, str(report[name])] for name in ("estimator", "split", "n", "seed", "step", "seconds", "config_hash")]
    _print_table(f"{report['recipe']} on {report['data']}", ["what", "figure"], rows)
    print(f"written: {options.run}/report.json")


def _counter(name: str) -> Callable[[int, int], None]:
    """A plain count on standard error, rewritten in place on a terminal and silent elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _bench(args: list[str]) -> None:
    recipe, _, options = _parse_recipe("bench", args, _Bench)
    from genjax.measure import step_cost
    from genjax.run import environment

    cost = step_cost(recipe, options.seconds)
    machine = environment()["hardware"]
    _print_table(
        f"one optimiser step of {recipe.name} per dispatch, batch {cost.batch_size}, "
        f"on {machine['device']} ({machine['cores']} cores)",
        ["what", "figure"],
        [
            ["steps/s", f"{cost.steps_per_second:.1f} ({cost.milliseconds:.3f} ms, median)"],
            ["examples/s", f"{cost.examples_per_second:.0f}"],
            ["compile", f"{cost.compile_seconds:.2f} s"],
            ["FLOPs per step", f"{cost.flops:.4g} (from the compiled program)"],
            [
                "share of peak",
                f"{100 * cost.share_of_peak:.1f} % of {cost.peak_gflops:.0f} GFLOP/s (a 2048 x 2048 float32 product)",
            ],
            ["temporary memory", f"{cost.temporary_bytes / 2**20:.2f} MiB"],
        ],
    )


def _list(args: list[str]) -> None:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class List:
        """The zoo as a table; expected results and times are those that `python -m benchmarks results` measured."""

        json: bool = False
        """Print JSON instead of a table."""

    options = tyro.cli(List, prog="genjax list", args=args)
    from genjax.catalogue import rows

    table = rows()
    if options.json:
        import json

        print(json.dumps(table, indent=2))
        return
    columns = ("name", "family", "data", "score", "conditional", "parameters", "expected", "time")
    _print_table("the zoo", list(columns), [[str(row[column]) for column in columns] for row in table])


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Into a file or a pipe rich would fold at 80 columns, which nobody can grep.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(title, style="bold", markup=False, highlight=False)  # a table's own title is folded to the table's width
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # brackets are text, not markup
    console.print(table)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "list": _list,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "sweep": _sweep,
    "bench": _bench,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `genjax` program."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("genjax-zoo"))
        return
    try:
        if args[0] not in COMMANDS:
            raise unknown_name("command", args[0], COMMANDS)
        COMMANDS[args[0]](args[1:])
    except Interrupted as stop:
        print(f"genjax: {stop}", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None
    except GenjaxError as error:
        print(f"genjax: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("genjax: interrupted; what was saved before is still there.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
