"""The commands about a run folder: genjax sample and genjax evaluate."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from genjax.cli.terminal import check_seed, counter, numbers, print_table
from genjax.errors import ConfigError, replacing

TEXTS_SHOWN = 20  # how many samples of text the terminal shows; the file has all of them


def sample(args: list[str]) -> None:
    """genjax sample RUN."""
    import tyro

    from genjax.runs.samples import Decoding

    @dataclasses.dataclass(frozen=True)
    class Sample:
        """Draw samples from a run: an array (.npz), and a picture (.png), text (.txt) or music
        (.mid) for a person.
        """

        run: Annotated[Path, tyro.conf.Positional]
        """The run folder."""
        n: int | None = None
        """How many samples: 64, or 10 of sequences and of images with --film, unless given."""
        cond: str | None = None
        """A class (3, or its name), classes to cycle through (0,1,2), or a vector (0.5,-1). Every
        class if left out.
        """
        seed: int = 0
        """Of the samples."""
        means: bool = False
        """Show means of p(x|z) instead of samples of x, where the family has them."""
        film: bool = False
        """Show the way from noise to data: a row for each sample, a column for each of some of the
        times.
        """
        out: Path | None = None
        """Where to write, without an ending; in the run folder unless given."""
        how: Annotated[Decoding, tyro.conf.arg(name="")] = dataclasses.field(
            default_factory=Decoding
        )

    options = tyro.cli(Sample, prog="genjax sample", args=args)
    if options.n is not None and options.n < 1:
        raise ConfigError(f"--n must be at least 1; got {options.n}.")
    for name in ("length", "beams", "n_steps"):
        value = getattr(options.how, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    if options.how.guidance is not None and not math.isfinite(options.how.guidance):
        raise ConfigError(f"--guidance must be a finite number; got {options.how.guidance}.")
    if options.film and options.means:
        raise ConfigError("--film and --means are two different pictures: leave one of them out.")
    check_seed(options.seed)
    import jax
    import numpy as np

    from genjax.runs import samples
    from genjax.runs import train as run

    loaded = run.load(options.run)
    spec = loaded.model.spec
    n = options.n or (10 if spec.step or (options.film and spec.shape != (2,)) else 64)
    cond = condition(spec, options.cond, n)
    found = run.sample(
        loaded, jax.random.key(options.seed), n, cond, options.means, options.how, options.film
    )
    x = found[-1] if options.film else found
    asked = {
        k: v for k, v in dataclasses.asdict(options.how).items() if v is not None and k != "prompt"
    }
    parts = [f"sample_n{n}_seed{options.seed}", *([f"cond{options.cond}"] if options.cond else [])]
    parts += (
        ["means"] * options.means
        + ["film"] * options.film
        + ["prompt"] * (options.how.prompt is not None)
        + [f"{k}{v}" for k, v in asked.items()]
    )
    stem = options.out or options.run / "samples" / "_".join(parts).replace("/", "_")
    what = (
        "means of p(x|z)"
        if options.means
        else "samples from noise to data"
        if options.film
        else "samples"
    )
    title = f"{loaded.recipe.name}: {what}, step {loaded.step}, seed {options.seed}"
    with replacing(stem.with_name(stem.name + ".npz")) as temporary, temporary.open("wb") as file:
        more: Any = ({} if cond is None else {"cond": cond}) | (
            {"film": found} if options.film else {}
        )
        np.savez_compressed(file, x=x, **more)
    written = [stem.with_name(stem.name + ".npz")]
    log_prob = samples.true_log_prob(run.source_of(loaded))
    if options.film:
        written += samples.show_film(found, spec, stem, title, log_prob, cond)
    else:
        written += samples.show(x, spec, stem, title, log_prob, cond)
    written += samples.play(x, spec, stem)
    if spec.text:
        labels = cond if spec.n_classes else None
        for text in samples.texts(x[:TEXTS_SHOWN], spec, labels):
            print(text if spec.end is not None else f"{'-' * 40}\n{text}")
    print(f"{n} {what} {list(x.shape)} in {' and '.join(map(str, written))}")


def condition(spec: Any, text: str | None, n: int) -> Any:
    """What --cond says as an array for n samples; every class in turn, sorted, where it says
    nothing.

    Raises:
        ConfigError: for anything but classes, by number or name, or the numbers of a vector.
    """
    import numpy as np

    if text is None:
        return (
            np.sort(np.resize(np.arange(spec.n_classes, dtype=np.int32), n))
            if spec.n_classes
            else None
        )
    names = spec.class_names or ()
    if names and all(part in names for part in text.split(",")):
        return np.sort(
            np.resize(np.asarray([names.index(part) for part in text.split(",")], np.int32), n)
        )
    try:
        found = numbers("--cond", text)
    except ConfigError as error:
        called = f" The classes are called {', '.join(names)}." if names else ""
        raise ConfigError(f"{error}{called}") from None
    if spec.n_classes:
        if any(number not in range(spec.n_classes) for number in found):
            raise ConfigError(f"--cond takes classes 0..{spec.n_classes - 1}; got {text!r}.")
        return np.sort(np.resize(np.asarray(found, np.int32), n))
    return np.tile(np.asarray(found, np.float32), (n, 1))


def evaluate(args: list[str]) -> None:
    """genjax evaluate RUN."""
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Evaluate:
        """What a run is worth on a split: log-probability, bound or figures about its samples, into
        report.json.
        """

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
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}."
            )
    check_seed(options.seed)
    from genjax.runs import train as run
    from genjax.zoo import ZOO
    from genjax.zoo.recipe import from_dict, parameters_of

    recipe = from_dict(run.read_config(options.run), ZOO)
    changes = dict(recipe.evaluation)
    if options.n_samples is not None:
        if "n_bound_samples" not in parameters_of(recipe.family):
            raise ConfigError(f"{recipe.name} has no bound with samples; leave --n-samples out.")
        changes["n_bound_samples"] = options.n_samples
    loaded = run.load(options.run, **changes)
    report = run.evaluate(
        loaded,
        options.split,
        options.n,
        options.seed,
        options.batch_size,
        counter("evaluate"),
        options.samples,
    )
    run.write_json(options.run / "report.json", report)
    rows = []
    if "figures" not in report or report["kind"] != report["figures"][0]["name"]:
        rows.append(
            [
                "value",
                f"{report['mean']:.3f} ± {report['standard_error']:.3f} {report['unit']} "
                f"({report['kind']})",
            ]
        )
    if "per_step" in report:
        per = report["per_step"]
        bound = (
            "at most " if report["kind"].startswith("lower") else ""
        )  # a lower bound of ln p bounds the code from above
        code = (
            f"{bound}{per['nats']:.4f} ± {per['standard_error']:.4f} nats, {per['bits']:.4f} bits"
        )
        rows.append(
            [
                f"per {per['step']}",
                f"{code}, perplexity {per['perplexity']:.3f} (n={per['n']:,} {per['step']}s)",
            ]
        )
    for figure in report.get("figures", []):
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.2g}"
        real = "" if figure["real"] is None else f"; real data {figure['real']:.4g}"
        rows.append(
            [
                figure["name"],
                f"{figure['value']:.4g}{error} {figure['unit']} ({figure['estimator']}{real})",
            ]
        )
    if "bits_per_dim" in report:
        rows.append(["bits per dimension", f"{report['bits_per_dim']:.4f}"])
    if "true_log_prob" in report:
        truth = report["true_log_prob"]
        rows.append(
            [
                "true log-density",
                f"{truth['mean']:.3f} ± {truth['standard_error']:.3f} nats, on the same examples",
            ]
        )
    rows += [
        [name, str(report[name])]
        for name in ("estimator", "split", "n", "seed", "step", "seconds", "config_hash")
    ]
    print_table(f"{report['recipe']} on {report['data']}", ["what", "figure"], rows)
    print(f"written: {options.run}/report.json")
