"""Where a run's figures go beside its folder: Weights & Biases, trackio, or a writer of one's own.

One that fails is said once, by its name, and is left out from then on; training goes on, and
metrics.jsonl has the same numbers. None of this is part of a run's settings.
"""

import contextlib
import importlib.util
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from genjax.errors import ConfigError, reason_of, replacing, unknown_name
from genjax.learning.distributed import writes
from genjax.runs.log import scalars_of

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """What takes the figures of a run."""

    def begin(self, config: dict[str, Any], name: str, folder: Path) -> None:
        """Called once, before the others, and again for a run that goes on in another process.

        Args:
            config: every setting of the run.
            name: the run's.
            folder: of the run.
        """
        ...

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Take the figures of a step by their names, such as "vae/loss" in nats."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """Take a picture of a step, a PNG; `name` says what it is of: "samples"."""
        ...

    def close(self) -> None:
        """Called once, at the end or after a failure."""
        ...


class Wandb:
    """Weights & Biases, in the project WANDB_PROJECT or "genjax". A run that goes on is the same
    run there, by the id in wandb_id.txt; steps that it has had already are not written again.
    """

    def begin(self, config: dict[str, Any], name: str, folder: Path) -> None:
        """Start the run there, or go on with it."""
        import wandb  # type: ignore[import-not-found]

        self.wandb = wandb
        project = os.environ.get("WANDB_PROJECT") or "genjax"
        run_id = _kept_id(folder / "wandb_id.txt")
        self.run = wandb.init(project=project, id=run_id, name=name, resume="allow")
        # Steps may have grown since.
        self.run.config.update(config, allow_val_change=True)
        self.first = self.run.step  # of a run that went on: one more than its last

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the figures of a step that is not there yet."""
        if step >= self.first:
            self.run.log(metrics, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Log a picture of a step that is not there yet."""
        if step >= self.first:
            self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Finish the run there."""
        self.run.finish()


class Trackio:
    """trackio, in the project TRACKIO_PROJECT or "genjax". A run that goes on is the same run
    there, by the id in trackio_id.txt; steps after the checkpoint that it goes on from are there
    twice, with the same values, since trackio takes nothing back.
    """

    def begin(self, config: dict[str, Any], name: str, folder: Path) -> None:
        """Start the run there, or go on with it."""
        import trackio  # type: ignore[import-not-found]

        self.trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT") or "genjax"
        unique = f"{name}-{_kept_id(folder / 'trackio_id.txt')}"
        self.run = trackio.init(project=project, name=unique, config=config, resume="allow")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the figures of a step."""
        self.run.log(metrics, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Log a picture of a step."""
        self.run.log({name: self.trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        """Finish the run there."""
        self.run.finish()


WRITERS: dict[str, Callable[[], Writer]] = {"wandb": Wandb, "trackio": Trackio}


def _kept_id(path: Path) -> str:
    """The id in a file of the run folder; a new one is kept there."""
    if path.is_file():
        found = path.read_text("utf-8").strip()
        if found:
            return found
    made = secrets.token_hex(4)
    with replacing(path) as temporary:
        temporary.write_text(made + "\n", encoding="utf-8")
    return made


class Writers:
    """The writers of a run; on other processes than the first, none."""

    def __init__(self, found: Mapping[str, Writer]) -> None:
        self.all, self.opened = dict(found), dict[str, Writer]()

    def begin(self, config: dict[str, Any], folder: Path) -> None:
        """Open each, with the settings of the run in a folder, which names it."""
        for name, writer in self.all.items():
            self.opened[name] = writer
            self._told(name, lambda w: w.begin(config, folder.absolute().name, folder))

    def write(self, line: dict[str, Any]) -> None:
        """Tell each what a line of metrics.jsonl says."""
        metrics = scalars_of(line)
        for name in list(self.opened):
            self._told(name, lambda w: w.write(line["step"], metrics))

    def image(self, step: int, what: str, path: Path) -> None:
        """Give each a PNG, if there is one."""
        for name in list(self.opened) if path.is_file() else ():
            self._told(name, lambda w: w.image(step, what, path))

    def close(self) -> None:
        """Close each; it is told nothing any more."""
        for name in list(self.opened):
            self._told(name, lambda w: w.close())
            self.opened.pop(name, None)

    def _told(self, name: str, call: Callable[[Writer], None]) -> None:
        try:
            call(self.opened[name])
        except Exception as error:
            writer = self.opened.pop(name)
            logger.warning(
                "%s failed (%s: %s). Training goes on without it; metrics.jsonl has the same "
                "numbers.",
                name,
                type(error).__name__,
                reason_of(error),
            )
            with contextlib.suppress(Exception):
                writer.close()


@contextlib.contextmanager
def writing_to(log_to: str | Iterable[str | Writer]) -> Iterator[Writers]:
    """The writers by their names, or as they are; closed at the end. None is opened yet.

    Raises:
        ConfigError: for a name that does not exist, a package that is not installed, or an object
            that is no writer.
    """
    found: dict[str, Writer] = {}
    for given in (log_to,) if isinstance(log_to, str) else log_to:
        if isinstance(given, str):
            found[given] = _named(given)
            continue
        for method in ("begin", "write", "image", "close"):
            if not callable(getattr(given, method, None)):
                raise ConfigError(
                    f"{given!r} in log_to has no {method}(); expected {' or '.join(WRITERS)}, or "
                    "an object with begin, write, image and close."
                )
        found[f"the writer {type(given).__name__} ({len(found)})"] = given
    writers = Writers(found if writes() else {})
    try:
        yield writers
    finally:
        writers.close()


def _named(name: str) -> Writer:
    if name not in WRITERS:
        raise unknown_name("writer", name, WRITERS)
    try:
        there = importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was made by hand, or is None
        there = False
    if not there:
        raise ConfigError(
            f"--log-to {name} needs the package {name}, which is not installed: pip install "
            f"'genjax-zoo[{name}]'."
        )
    return WRITERS[name]()
