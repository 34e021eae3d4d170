"""Data larger than memory: what training on 8 GiB of images holds in memory and waits for, and how
long folders, tables and the import take to open.

Training runs in a process of its own. Its memory is what the kernel says in /proc/self/status,
looked at every 20 ms: RssAnon is what it holds itself, RssFile are pages of files (libraries; rows
are read, not mapped, so that none of the data is among them), VmHWM the largest sum. The step is a
small VAE's, with a loop of matrix products beside it that makes it as long as is said. The wait is
the time that the loop stood still for a payload that was not made yet (`prefetch.Ahead.waited`).
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 8 * 2**30
PICTURES, TABLE = 50_000, 1_000_000
STEP_MS, BATCH, STEPS = 20.0, 128, 500


# --- training, in a process of its own ------------------------------------------------------------


def memory() -> dict[str, int]:
    """Bytes that this process holds, by the kernel's names; none where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmHWM", "Rss")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


class Watched:
    """The largest memory of this process while it is entered."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *about: Any) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for name, value in memory().items():
                self.most[name] = max(value, self.most.get(name, 0))


def slowed(t: Any, seconds: float) -> tuple[Any, float]:
    """A training whose step takes as long as that, by a loop of matrix products beside it, and how
    long the loop alone took.
    """
    import jax
    import jax.numpy as jnp

    def work(x: Any, turns: int) -> Any:
        square = jnp.eye(256) * jnp.mean(x.astype(jnp.float32))
        return jax.lax.fori_loop(0, turns, lambda _, y: jnp.tanh(y @ square), square).mean()

    def timed(turns: int) -> float:
        run, x = jax.jit(partial(work, turns=turns)), jnp.ones((4,))
        jax.block_until_ready(run(x))
        times = []
        for _ in range(7):
            before = time.perf_counter()
            jax.block_until_ready(run(x))
            times.append(time.perf_counter() - before)
        return min(times)

    turns = max(1, round(seconds / (timed(200) / 200)))

    def step(ts: Any, batch: Any) -> Any:
        ts, metrics = t.step(ts, batch)
        return ts, {**metrics, "vae/work": work(batch.x, turns)}

    return t._replace(step=step), timed(turns)


def child(path: str, steps: int, batch: int, step_ms: float) -> None:
    """Open the file, train, and print what it took as a line of JSON."""
    import jax
    import optax

    from genjax.data import open_source
    from genjax.families.vae import vae
    from genjax.learning import loop
    from genjax.learning.step import training

    aheads: list[Any] = []

    class Kept(loop.Ahead):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            aheads.append(self)

    loop.Ahead = Kept
    begun, times = memory(), []
    with Watched() as watched:
        start = time.perf_counter()
        source = open_source(path)
        opened = time.perf_counter() - start
        model = vae(source.spec, hidden=(16,), latent_dim=4)
        t, worked = slowed(training(model, optax.adam(1e-3)), step_ms / 1000)
        feed = loop.choose_feed(t, source, source.load().train, batch, seed=0)

        def progress(step: int, steps: int, seconds: float, done: int, metrics: Any) -> None:
            times.append((step, seconds))

        loop.fit(feed, key=jax.random.key(0), steps=steps, progress=progress)
    reading = []
    for turn in range(1, 4):  # by one thread, without a step beside it
        before = time.perf_counter()
        feed.payload(turn * steps, 50)
        reading.append(1e3 * (time.perf_counter() - before) / 50)
    (first, early), (last, late) = times[0], times[-1]
    rest = max(1, last - first)
    found = {
        "seconds_to_open": opened,
        "place": "host" if feed.prefetch else "device",
        "before": begun,
        "peak": watched.most,
        "read_ms_per_step": min(reading),
        "work_alone_ms": 1e3 * worked,
        "ms_per_step": 1e3 * (late - early) / rest,
        "wait_ms_per_step": 1e3 * aheads[0].waited / rest,
    }
    print(json.dumps(found))


def in_child(code: str, *args: Any, **environment: str) -> str:
    """What a Python process prints last."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    return done.stdout.strip().splitlines()[-1]


def train(folder: Path, size: int, steps: int, step_ms: float) -> dict[str, Any]:
    """Write so many bytes of images, and train on them."""
    path, rng = folder / "images.npy", np.random.default_rng(0)
    n = size // 3072
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 32, 32, 3))
    tile = rng.integers(0, 256, (min(n, 20_000), 32, 32, 3), dtype=np.uint8)
    for begin in range(0, n, len(tile)):
        images[begin : begin + len(tile)] = tile[: n - begin]
    images.flush()
    del images
    code = (
        "import sys; from benchmarks.larger import child; "
        "child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))"
    )
    found = json.loads(in_child(code, path, steps, BATCH, step_ms))
    share = found["wait_ms_per_step"] / step_ms
    return {"bytes": path.stat().st_size, "steps": steps, "batch": BATCH, **found, "share": share}


# --- opening --------------------------------------------------------------------------------------

OPENING = (
    "import sys, time; from genjax.data import open_source; import pyarrow, pyarrow.csv, PIL.Image;"
    "a, b = time.perf_counter(), time.process_time(); open_source(sys.argv[1]);"
    "print(time.perf_counter() - a, time.process_time() - b)"
)


def seconds_to_open(path: Path, cache: Path) -> dict[str, float]:
    """Seconds that a new process takes to open data, and of the processor, without imports."""
    wall, cpu = map(float, in_child(OPENING, path, XDG_CACHE_HOME=str(cache)).split())
    return {"seconds": wall, "processor_seconds": cpu}


def pictures(folder: Path, n: int) -> dict[str, Any]:
    """n PNG of 32 x 32 in ten folders, opened for the first and for the second time."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(10):
        (folder / "png" / f"class{index}").mkdir(parents=True)
    for index in range(n):
        one = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        one.save(folder / "png" / f"class{index % 10}" / f"{index}.png")
    open_it = partial(seconds_to_open, folder / "png", folder / "cache")
    return {"n": n, "first": open_it(), "again": open_it()}


def table(folder: Path, n: int) -> dict[str, Any]:
    """A CSV of n rows and 8 columns."""
    import pyarrow as pa
    from pyarrow import csv

    rng = np.random.default_rng(0)
    columns = {f"column{index}": rng.normal(size=n) for index in range(8)}
    csv.write_csv(pa.table(columns), folder / "table.csv")
    return {"rows": n, "columns": 8, **seconds_to_open(folder / "table.csv", folder / "cache")}


def imported(runs: int) -> float:
    """Seconds that `import genjax` takes in a new process, the least of several."""
    code = "import time; a = time.perf_counter(); import genjax; print(time.perf_counter() - a)"
    return min(float(in_child(code)) for _ in range(runs))


def measure(size: int, steps: int, step_ms: float, n_pictures: int, n_rows: int) -> dict[str, Any]:
    """All of it, in a temporary folder that is removed."""
    found: dict[str, Any] = {"load_average": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="genjax-larger-") as place:
        folder = Path(place)
        parts = {
            "training": partial(train, folder, size, steps, step_ms),
            "pictures": partial(pictures, folder, n_pictures),
            "table": partial(table, folder, n_rows),
            "import_seconds": partial(imported, 5),
        }
        for name, part in parts.items():
            found[name] = part()
            print(f"{name}: {found[name]}", flush=True)
    return found


def main() -> None:
    """Measure and write results/larger.json."""
    from benchmarks.common import write

    write("larger", measure(SIZE, STEPS, STEP_MS, PICTURES, TABLE))
