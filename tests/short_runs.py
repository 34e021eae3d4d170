"""Runs that are short, and what is in their folders."""

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event

from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe
from genjax.zoo.sections import replace

SHORT = {
    "steps": 40,
    "steps_per_call": 10,
    "log_every": 20,
    "evaluate_every": 30,
    "sample_every": 20,
    "checkpoint_every": 20,
}


def tiny(name: str, **changes: Any) -> Recipe:
    return replace(
        ZOO[name], **{"hidden": (8,), "latent_dim": 2, "batch_size": 16, **SHORT, **changes}
    )


def events(folder: Path) -> list[Event]:
    """The TensorBoard events of a run, read as TensorBoard does: length, checksum, event,
    checksum.
    """
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        assert path.name.startswith("events.out.tfevents.")
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
