"""The commands about run folders: genjax sample, evaluate, export and compare."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from genjax.cli.file_names import free, report_name, report_path, sample_stem, unused_png
from genjax.cli.flags import group
from genjax.cli.terminal import check_count, check_seed, counter, plain, print_table, say
from genjax.errors import ConfigError, replacing

if TYPE_CHECKING:
    from genjax.protocol import DataSpec, Model
    from genjax.runs.samples import Decoding

TEXTS_SHOWN = 20  # how many samples of text the terminal shows; the file has all of them

Which = Literal["newest", "best"]  # of a run's checkpoints

# The flags of `genjax sample` beside those of `runs.samples.Decoding`: (type, default, help).
SAMPLE_FLAGS: dict[str, tuple[Any, Any, str]] = {
    "n": (
        int | None,
        None,
        "How many samples: 64, or 10 of sequences and of images with --film, unless given.",
    ),
    "cond": (
        str | None,
        None,
        "A class (3, or its name), classes to cycle through (0,1,2), or a vector (0.5,-1). Every "
        "class if left out.",
    ),
    "seed": (int, 0, "Of the samples."),
    "means": (
        bool,
        False,
        "Show means of p(x|z) instead of samples of x, where the family has them.",
    ),
    "film": (
        bool,
        False,
        "Show the way from noise to data: a row for each sample, a column for each of some of the "
        "times.",
    ),
    "which": (
        Which,
        "newest",
        "Of its checkpoints the newest, or the best by the figure on the validation split.",
    ),
    "sigma_rel": (
        float | None,
        None,
        "The relative length of the average of the weights, made of those that the run tracked.",
    ),
    "out": (
        Path | None,
        None,
        "Where to write, with or without an ending; in the run folder unless given.",
    ),
}


# --- genjax sample --------------------------------------------------------------------------------


def sample(args: list[str]) -> None:
    """genjax sample RUN."""
    options = _read_sample(args)
    import jax
    import numpy as np

    from genjax.data.kinds import as_values
    from genjax.data.labels import condition_of
    from genjax.data.view import no_picture, view_of
    from genjax.runs import load as runs
    from genjax.runs import samples

    how = samples.Decoding(
        **{
            field.name: getattr(options, field.name)
            for field in dataclasses.fields(samples.Decoding)
        }
    )
    loaded = runs.load(options.run, options.which, options.sigma_rel)
    spec = loaded.model.spec
    few = spec.step is not None or (options.film and view_of(spec) != "points")
    n = options.n or (10 if few else 64)
    cond = condition_of(spec, options.cond, n)
    key = jax.random.key(options.seed)
    for line in _idle(how, options.seed, spec, options.film):
        print(line)
    found = runs.sample(loaded, key, n, cond, options.means, how, options.film)
    x = found[-1] if options.film else found
    arrays: dict[str, Any] = {"x": as_values(x, spec.values)}
    arrays |= {} if cond is None else {"cond": cond}
    if options.film:
        arrays["film"] = as_values(found, spec.values)
    if options.out is not None:
        stem = free(options.out, arrays)
    else:
        stem = sample_stem(options, n, how.asked(), arrays)
    with replacing(stem.with_name(stem.name + ".npz")) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    written = [stem.with_name(stem.name + ".npz")]
    what = _what(options)
    title = f"{loaded.recipe.name}: {what}, step {loaded.step}, seed {options.seed}"
    if loaded.sigma_rel is not None:
        title += f", sigma_rel {loaded.sigma_rel:g}"
        print(_about_average(loaded.sigma_rel, loaded.off))
    log_prob = samples.true_log_prob(runs.made_source(loaded))
    show = samples.show_film if options.film else samples.show
    written += show(found, spec, stem, title, log_prob, cond)
    written += samples.play(x, spec, stem)
    if (why := no_picture(spec)) is not None:
        print(why)
    if view_of(spec) == "text":
        labels = cond if spec.n_classes else None
        for text in samples.texts(x[:TEXTS_SHOWN], spec, labels):
            print(plain(text if spec.end is not None else f"{'-' * 40}\n{text}"))
    if loaded.files:
        print(plain(f"the run was trained on {', '.join(one['path'] for one in loaded.files)}"))
    print(plain(f"{n} {what} {list(x.shape)} in {' and '.join(map(str, written))}"))


def _read_sample(args: Sequence[str]) -> Any:
    """What was asked for. Help about a run shows the flags that apply to it.

    Raises:
        ConfigError: for numbers that are out of range, and --help about what is no run.
    """
    import tyro

    run = _run_of_help(args)
    model = None if run is None else _model_of(run)
    tracks = run is not None and (run / "averages").is_dir()
    flags = {name.replace("_", "-"): entry for name, entry in _sample_flags(model, tracks).items()}
    about = (
        "Draw samples from a run: an array (.npz), and a picture (.png), text (.txt) or music "
        "(.mid) for a person."
    )
    about += f" These are the flags that apply to {run}." if run is not None else ""
    taken = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="The run folder.")]
    whole = dataclasses.make_dataclass(
        "Sample",
        [("run", taken)],
        bases=(group("Flags", flags),),
        namespace={"__doc__": about},
        frozen=True,
        kw_only=True,
    )
    options: Any = tyro.cli(whole, prog="genjax sample", args=list(args))
    for name in ("n", "length", "beams", "n_steps"):
        check_count(name, getattr(options, name))
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise ConfigError(f"--guidance must be a finite number; got {options.guidance}.")
    if options.film and options.means:
        raise ConfigError("--film and --means are two different pictures: leave one of them out.")
    check_seed(options.seed)
    return options


def _run_of_help(args: Sequence[str]) -> Path | None:
    """The run folder that --help is asked about; None for a call that is none, or about no run."""
    if not {"-h", "--help"} & set(args):
        return None
    named = [Path(arg) for arg in args if (Path(arg) / "config.json").is_file()]
    if not named and not args[0].startswith("-"):
        named = [Path(args[0])]
    return named[0] if named else None


def _model_of(run: Path) -> "Model":
    """The model of a run, without its parameters.

    Raises:
        ConfigError: if the folder is no run.
    """
    from genjax.runs.folder import recipe_in
    from genjax.runs.stages import kept

    return recipe_in(run).build(kept(run)[0])


def _sample_flags(model: "Model | None", tracks: bool = False) -> dict[str, tuple[Any, Any, str]]:
    """The flags that apply to a model, whose run `tracks` averages; all that there are without
    one.
    """
    from genjax.runs.samples import Decoding, fields_for, has_film, shows_means
    from genjax.zoo.sections import fields_of

    flags = SAMPLE_FLAGS | fields_of(Decoding())
    if model is None:
        return flags
    applies = {"n", "seed", "out", *fields_for(model)}
    applies |= {"which"} if model.score is not None else set()
    applies |= {"sigma_rel"} if tracks else set()
    applies |= {"cond"} if model.spec.conditional else set()
    applies |= {"means"} if shows_means(model) else set()
    applies |= {"film"} if has_film(model) else set()
    return {name: entry for name, entry in flags.items() if name in applies}


def _idle(how: "Decoding", seed: int, spec: "DataSpec", film: bool = False) -> list[str]:
    """What was asked for and does nothing beside the rest, a line each."""
    if how.solver == "adaptive":  # the steps of a film are where it shows the way
        given = {} if film else {"n_steps": how.n_steps, "grid": how.grid}
        why = "the solver adaptive chooses its own steps"
        return [f"{name} {value} has no effect: {why}" for name, value in given.items() if value]
    why, idle = None, ()
    if how.beams is not None:
        why = "a search with beams draws nothing"
    elif how.temperature == 0:
        why, idle = "temperature 0 takes the most probable token", ("top_k", "top_p", "min_p")
    elif how.top_k == 1:
        why, idle = "top_k 1 takes the most probable token", ("temperature", "top_p", "min_p")
    if why is None:
        if how.top_k and spec.levels and how.top_k >= spec.levels:
            return [f"top_k {how.top_k} has no effect: there are {spec.levels} tokens"]
        return []
    given = {name: value for name, value in how.asked().items() if name in idle}
    given |= {"seed": seed} if seed else {}
    return [f"{name} {value} has no effect: {why}" for name, value in given.items()]


def _about_average(sigma_rel: float, off: float) -> str:
    """What the weights are where they are an average that was chosen after training."""
    return f"the average of sigma_rel {sigma_rel:g}, to {100 * off:.2g} % of its profile"


def _what(options: Any) -> str:
    if options.means:
        return "means of p(x|z)"
    return "samples from noise to data" if options.film else "samples"


# --- genjax evaluate ------------------------------------------------------------------------------


def evaluate(args: list[str]) -> None:
    """genjax evaluate RUN."""
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Evaluate:
        """What a run is worth: log-probability, bound or figures about its samples, into
        report.json for the test split, or a report under the name of the split and data.
        """

        run: Annotated[Path, tyro.conf.Positional]
        """The run folder."""
        data: str | None = None
        """Other data of the same kind, a file or a name, to score under their own name."""
        split: Literal["test", "valid", "train", "all"] | None = None
        """Which split: test unless given, or all of other data. Of training windows that overlap,
        such as share nothing.
        """
        n: int | None = None
        """Only the first n examples; all unless given."""
        n_samples: int | None = None
        """Draws of the bound's estimator: K of an importance-weighted bound, noise levels of a
        diffusion bound, draws of dequantisation noise; what the recipe says unless given.
        """
        seed: int = 0
        """Of the estimator's noise and of the binarisation of the data."""
        batch_size: int = 100
        """Examples at a time; it changes memory and speed, and the noise."""
        which: Which = "newest"
        """Of its checkpoints the newest, or the best by the figure on the validation split."""
        sigma_rel: float | None = None
        """The relative length of the average of the weights, made of those that the run tracked."""
        samples: bool = False
        """Give figures about samples as well, where there is a log-probability or bound."""

    options = tyro.cli(Evaluate, prog="genjax evaluate", args=args)
    for name in ("n", "n_samples", "batch_size"):
        check_count(name, getattr(options, name))
    check_seed(options.seed)
    from genjax.runs import load as runs
    from genjax.runs.evaluate import as_evaluated
    from genjax.runs.evaluate import evaluate as evaluated
    from genjax.runs.folder import write_json

    loaded = runs.load(options.run, options.which, options.sigma_rel)
    run, other = as_evaluated(loaded, options.n_samples), None
    if options.data is not None:
        from genjax.runs.other_data import other_source

        other = other_source(run, options.data)
    split = options.split or ("test" if other is None else "all")
    report = evaluated(
        run,
        split,
        options.n,
        options.seed,
        options.batch_size,
        counter("evaluate"),
        options.samples,
        source=other,
    )
    about = None if other is None else other.spec.name
    name = report_name(split, about, options.which, options.sigma_rel)
    path = report_path(options.run / name, report)
    write_json(path, report)
    table = _rows_of(report)
    print_table(f"{report['recipe']} on {report['data']}", ["what", "figure"], table)
    say(f"written: {path}")


def _rows_of(report: dict[str, Any]) -> list[list[str]]:
    """A report as a table: what, figure."""
    rows = []
    if "figures" not in report or report["kind"] != report["figures"][0]["name"]:
        value = f"{report['mean']:.3f} ± {report['standard_error']:.3f} {report['unit']}"
        rows.append(["value", f"{value} ({report['kind']})"])
    if "per_step" in report:
        per = report["per_step"]
        # A lower bound of ln p bounds the code from above.
        bound = "at most " if report["kind"].startswith("lower") else ""
        code = (
            f"{bound}{per['nats']:.4f} ± {per['standard_error']:.4f} nats, {per['bits']:.4f} bits"
        )
        counted = f"(n={per['n']:,} {per['step']}s)"
        e = "" if per["perplexity"] is None else f", perplexity {per['perplexity']:.3f}"
        rows.append([f"per {per['step']}", f"{code}{e} {counted}"])
    for figure in report.get("figures", []):
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.2g}"
        real = "" if figure["real"] is None else f"; real data {figure['real']:.4g}"
        value = f"{figure['value']:.4g}{error} {figure['unit']}"
        rows.append([figure["name"], f"{value} ({figure['estimator']}{real})"])
    if "bits_per_dim" in report:
        rows.append(["bits per dimension", f"{report['bits_per_dim']:.4f}"])
    if "true_log_prob" in report:
        truth = report["true_log_prob"]
        value = f"{truth['mean']:.3f} ± {truth['standard_error']:.3f} nats"
        rows.append(["true log-density", f"{value}, on the same examples"])
    if "solver" in report:
        finer = report["solver"]
        words = f"{-finer['difference']:+.2g} nats (n={finer['n']:,}; {finer['estimator']})"
        rows.append(["with twice the steps", words])
    if "sigma_rel" in report:
        words = _about_average(report["sigma_rel"], report["sigma_rel_off"])
        rows.append(["weights", words])
    names = ("estimator", "split", "n", "seed", "step", "which", "seconds", "config_hash")
    return rows + [[name, str(report[name])] for name in names]


# --- genjax export --------------------------------------------------------------------------------


def export(args: list[str]) -> None:
    """genjax export RUN."""
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Export:
        """A run for other programs: its weights as safetensors, its sampler and its score as
        StableHLO, for any number of examples.
        """

        run: Annotated[Path, tyro.conf.Positional]
        """The run folder."""
        out: Path | None = None
        """The folder to write into; export in the run folder unless given."""
        which: Which = "newest"
        """Of its checkpoints the newest, or the best by the figure on the validation split."""

    options = tyro.cli(Export, prog="genjax export", args=args)
    from genjax.runs.export import export as exported
    from genjax.runs.load import load

    folder = "export" if options.which == "newest" else f"export-{options.which}"
    run = load(options.run, options.which)
    for path in exported(run, options.out or options.run / folder):
        print(plain(f"written: {path} ({path.stat().st_size:,} bytes)"))


# --- genjax compare -------------------------------------------------------------------------------


def compare(args: list[str]) -> None:
    """genjax compare RUN RUN ..."""
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Compare:
        """Runs side by side: the settings in which they differ, what they are worth, and a picture
        of their curves.
        """

        runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """The run folders, two or more."""
        out: Path = Path("compare.png")
        """Where the picture of their curves is written, as PNG."""

    options = tyro.cli(Compare, prog="genjax compare", args=args)
    from genjax.runs import compare as comparing
    from genjax.runs import pictures

    runs = comparing.read(options.runs)
    names = [run.name for run in runs]
    rows = comparing.differing(runs)
    if rows:
        print_table("settings that differ", ["setting", *names], rows)
    else:
        print("settings: the same in all of them")
    columns = ["run", "figure", "value", "data", "split", "n", "step", "from"]
    figures = comparing.figures(runs)
    if figures:
        print_table("figures", columns, figures)
    for run in runs:
        if any(name.startswith("sweep.") for name in run.settings):
            say(f"{run.name} is a sweep: the figures of its members are in its results.json")
        elif not run.reports:
            say(f"{run.name} was never evaluated: genjax evaluate writes its figures")
    for line in comparing.incomparable(runs):
        say(f"not to be compared: {line}")
    picture = comparing.curves(runs)
    if picture is None:
        print("no picture: these runs have no metric in common")
        return
    out = unused_png(options.out)
    pictures.save(picture, out)
    print(plain(f"written: {out}"))
