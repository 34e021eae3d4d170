"""The log of a run: metrics.jsonl, TensorBoard events, and the curves that are drawn from them."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genjax.errors import (
    CheckpointError,
    WriteError,
    reading,
    reason_of,
    regular_file,
    replacing,
    writing,
)
from genjax.runs import pictures
from genjax.runs.json_text import dumps, metrics_in

logger = logging.getLogger(__name__)


class Log:
    """metrics.jsonl and TensorBoard events of one run; cut back to a step when a run goes on from
    there.

    Every line is on its way to the disk when the call returns. TensorBoard's usual writer hands its
    events to a thread instead, which dies of a full disk without a word and then blocks the run.
    metrics.jsonl has it all; where there can be no events or curves, that is said, and the run goes
    on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.folder = folder
        self.before = 0.0  # seconds of training in earlier processes
        self.started = time.perf_counter()
        self.events: Any = None

    def restore(self, step: int) -> None:
        """Forget what was logged after `step`: the run does those steps again. What is no line of
        metrics is kept beside, in metrics.jsonl.bad.

        Raises:
            CheckpointError: if the disk does not take it, or metrics.jsonl cannot be read.
            DataError: if it is no file.
        """
        lines, bad = metrics_in(self._read(self.path))
        if bad:
            self._keep(bad)
        kept = [line for line in lines if line["step"] <= step]
        self.before = max(map(_seconds, kept), default=0.0)
        with replacing(self.path) as temporary:
            text = "".join(dumps(line) + "\n" for line in kept)
            temporary.write_text(text, encoding="utf-8")
        with self._events():
            self._begin_events(step)
        self.started = time.perf_counter()

    def _read(self, path: Path) -> bytes:
        regular_file(path)  # a pipe would wait for ever
        with reading(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return b""

    def _keep(self, bad: list[bytes]) -> None:
        beside = self.path.with_name(self.path.name + ".bad")
        before = b"" if beside.is_symlink() else self._read(beside)
        with replacing(beside) as temporary:
            temporary.write_bytes(before + b"".join(line + b"\n" for line in bad))
        logger.warning(
            "%s: %d lines are no metrics or were written twice; they are left out, and kept in %s",
            self.path,
            len(bad),
            beside.name,
        )

    def _begin_events(self, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        # What protobuf makes at run time is not seen by a type checker.
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        # With the root in front no folder "gs:" is taken for a place on the network.
        folder = (self.folder / "tensorboard").absolute()
        folder.mkdir(exist_ok=True)
        # The step in the name keeps apart two processes that start within one second.
        self.events = EventsWriter(str(folder / "events"), f".from_{step}")
        # TensorBoard then forgets the events of this step and later ones that an earlier process
        # wrote.
        self.events.write_event(
            Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self.events.flush()

    @contextlib.contextmanager
    def _events(self) -> Iterator[None]:
        """Where events are written: the first failure is said, and ends them."""
        try:
            yield
        except Exception as error:
            self.close()
            self.events = None
            logger.warning(
                "Could not write %s (%s). Training goes on without TensorBoard's events; "
                "metrics.jsonl has the same numbers.",
                self.folder / "tensorboard",
                reason_of(error),
            )

    def __call__(self, line: dict[str, Any]) -> None:
        seconds = round(self.before + time.perf_counter() - self.started, 3)
        line = {"step": line["step"], "seconds": seconds, **line}
        text = dumps(line) + "\n"
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        if self.events is not None:
            with self._events():
                self.events.write_event(_event(line))
                self.events.flush()

    def draw(self, title: str) -> None:
        """Draw what was logged into curves.png; a failure is said."""
        try:
            lines = metrics_in(self._read(self.path))[0]
            if lines:
                # Names of files need not be UTF-8, but what is drawn must be.
                shown = title.encode("utf-8", "backslashreplace").decode()
                pictures.save(pictures.curves(lines, shown), self.folder / "curves.png")
        except Exception as error:
            if isinstance(error, CheckpointError) and not isinstance(error, WriteError):
                raise
            what = f"{type(error).__name__}: {reason_of(error)}"
            logger.warning("%s could not be drawn (%s)", self.folder / "curves.png", what)

    def close(self) -> None:
        """Close the file of events. All of them were flushed, so a disk that complains even now has
        cost nothing.
        """
        with contextlib.suppress(Exception):
            if self.events is not None:
                self.events.close()


def _seconds(line: dict[str, Any]) -> float:
    value = line.get("seconds")
    return value if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def scalars_of(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line; those of members are scalars of their own, "name/0", "name/1"."""
    scalars: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{index}": number for index, number in enumerate(value)}
        elif name != "step":
            scalars[name] = value
    return scalars


def _event(line: dict[str, Any]) -> Any:
    """A line of metrics.jsonl as a TensorBoard event."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    scalars = scalars_of(line)
    summary = Summary(
        value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    )
    return Event(wall_time=time.time(), step=line["step"], summary=summary)


@contextlib.contextmanager
def logging_in(folder: Path, title: str) -> Iterator[Log]:
    """The log of a run that is about to start or go on. However the run ends, the log is closed and
    its curves are drawn.
    """
    log = Log(folder)
    try:
        yield log
    except BaseException:
        with contextlib.suppress(CheckpointError):  # what stopped the run is what there is to say
            log.draw(title)
        raise
    else:
        log.draw(title)
    finally:
        log.close()
