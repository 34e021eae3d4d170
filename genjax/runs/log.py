"""The log of a run: metrics.jsonl, TensorBoard events, and the curves that are drawn from them."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genjax.errors import CheckpointError, replacing, writing
from genjax.runs import pictures


class Log:
    """metrics.jsonl and TensorBoard events of one run; cut back to a step when a run goes on from
    there.

    Every line is on its way to the disk when the call returns. TensorBoard's usual writer hands its
    events to a thread instead, which dies of a full disk without a word and then blocks the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.folder = folder
        self.before = 0.0  # seconds of training in earlier processes
        self.started = time.perf_counter()
        self.events: Any = None

    def restore(self, step: int) -> None:
        """Forget what was logged after `step`: the run does those steps again.

        Raises:
            CheckpointError: if the disk does not take it.
        """
        from tensorboardX.event_file_writer import EventsWriter

        # What protobuf makes at run time is not seen by a type checker.
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        lines = pictures.read_metrics(self.path) if self.path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        self.before = kept[-1].get("seconds", 0.0) if kept else 0.0
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        folder = self.folder / "tensorboard"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            # The step in the name keeps apart two processes that start within one second.
            self.events = EventsWriter(str(folder / "events"), f".from_{step}")
            # TensorBoard then forgets the events of this step and later ones that an earlier
            # process wrote.
            self.events.write_event(
                Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            )
            self.events.flush()
        self.started = time.perf_counter()

    def __call__(self, line: dict[str, Any]) -> None:
        seconds = round(self.before + time.perf_counter() - self.started, 3)
        line = {"step": line["step"], "seconds": seconds, **line}
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        with writing(self.folder / "tensorboard"):
            self.events.write_event(_event(line))
            self.events.flush()

    def draw(self, title: str) -> None:
        """Draw what was logged into curves.png.

        Raises:
            CheckpointError: if the disk does not take it.
        """
        lines = pictures.read_metrics(self.path) if self.path.exists() else []
        if lines:
            pictures.save(pictures.curves(lines, title), self.folder / "curves.png")

    def close(self) -> None:
        """Close the file of events. All of them were flushed, so a disk that complains even now has
        cost nothing.
        """
        with contextlib.suppress(OSError):
            if self.events is not None:
                self.events.close()


def _event(line: dict[str, Any]) -> Any:
    """A line of metrics.jsonl as a TensorBoard event; the members of a sweep are scalars of their
    own, "name/0", "name/1".
    """
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

    scalars: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{index}": number for index, number in enumerate(value)}
        elif name != "step":
            scalars[name] = value
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
