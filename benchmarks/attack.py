"""What genjax survives: kills, damaged checkpoints, mutated files of data, mutated run folders and
random arguments, repeated with a seed. A silent wrong result and a traceback are counted apart.

    python -m benchmarks attack
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import genjax.cli
from benchmarks.common import first_rows, read, write
from genjax.data import open_source
from genjax.errors import GenjaxError, unknown_name
from genjax.learning.checkpoint import Checkpoints
from genjax.runs.load import load, source_of
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, from_dict, to_dict
from genjax.zoo.sections import settings_of

QUIET = ["--evaluate-every", "0", "--sample-every", "0", "--plain"]


# --- what happened --------------------------------------------------------------------------------


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """What a call comes to: ("done", value), ("told", message) or ("traceback", error)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return "done", call()
        except GenjaxError as error:
            return "told", str(error)
        except SystemExit as stop:
            return ("told" if stop.code in (0, 2) else "traceback"), said.getvalue()
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"


def command(*args: str) -> Callable[[], Any]:
    return lambda: genjax.cli.main(list(args))


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one thing wrong: some changed, some missing, some too many, or none left."""
    way = rng.randrange(7)
    if way == 0:
        return b""
    if way == 1:
        return data[: rng.randrange(len(data) + 1)]
    if way == 2:
        return data + rng.randbytes(rng.randrange(1, 40))
    at = rng.randrange(len(data) + 1)
    if way == 3:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if way == 4:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    changed = bytearray(data or b"\0")
    for _ in range(1 if way == 5 else rng.randrange(2, 20)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@contextlib.contextmanager
def elsewhere() -> Iterator[Path]:
    """A folder of its own to work in, removed at the end."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            yield Path(place)
        finally:
            os.chdir(before)


# --- kills ----------------------------------------------------------------------------------------


def small(name: str, steps: int, out: str) -> list[str]:
    """A command that trains a row's tiny model and saves at every dispatch."""
    row = ZOO[name]
    args = ["train", name, "--steps", str(steps), "--steps-per-call", "2", *QUIET, "--out", out]
    args += ["--checkpoint-every", "2", "--log-every", "2"]
    warmup = getattr(row.optimizer, "warmup_steps", 0)
    if warmup >= steps:
        args += ["--warmup-steps", "0"]
    if row.model.get("lanes") is None or row.tiny.get("lanes"):
        args += ["--batch-size", "8"]
    for setting, value in row.tiny.items():
        flag = f"--model.{setting.replace('_', '-')}"
        if isinstance(value, bool):
            args.append(flag if value else f"--model.no-{setting.replace('_', '-')}")
        else:
            args += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return args


def kills(n: int = 36, seed: int = 0) -> dict[str, int]:
    """Training in a process that is killed (SIGKILL) again and again, half of the times as a save
    begins, against training that never was: their last checkpoints, bit for bit. Every family that
    has a row whose data are on this machine.
    """
    rng, names = random.Random(seed), first_rows(_here)
    done = Counter[str]()
    with elsewhere() as place:
        for name in names:
            steps = 40
            run = [sys.executable, "-m", "genjax"]
            subprocess.run([*run, *small(name, steps, f"{name}-whole")], check=True, **_SILENT)
            for _ in range(-(-n // len(names))):
                _killed_once(rng, [*run, *small(name, steps, f"{name}-killed")], place, name)
                done["kills"] += 1
            subprocess.run([*run, *small(name, steps, f"{name}-killed")], check=True, **_SILENT)
            same = _same_state(place / f"{name}-whole", place / f"{name}-killed")
            done["families"] += 1
            done["families that ended bitwise equal"] += same
    return dict(done)


def _here(row: Recipe) -> bool:
    """Whether a row's data are on this machine."""
    try:
        row.source().load()
    except GenjaxError:
        return False
    return True


_SILENT: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _killed_once(rng: random.Random, args: list[str], place: Path, name: str) -> None:
    """Start the command, and kill it soon after its next checkpoint, or as the one after begins."""
    checkpoints = Checkpoints(place / f"{name}-killed" / "checkpoints")
    before = checkpoints.steps()
    process = subprocess.Popen(args, **_SILENT)
    in_a_save = rng.random() < 0.5
    while checkpoints.steps() == before and process.poll() is None:
        time.sleep(0.002)
    folder = checkpoints.folder
    deadline = time.monotonic() + (5 if in_a_save else rng.uniform(0, 0.1))
    while time.monotonic() < deadline and process.poll() is None:
        if in_a_save and any(".part" in entry.name for entry in folder.iterdir()):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()


def _same_state(one: Path, other: Path) -> bool:
    a, b = (Checkpoints(folder / "checkpoints").steps()[-1:] for folder in (one, other))
    if a != b:
        return False
    trees = [load(folder) for folder in (one, other)]
    leaves = [jax.tree.leaves((run.params, run.state)) for run in trees]
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoints(n: int = 120, seed: int = 1) -> dict[str, int]:
    """A file of the newest checkpoint mutated or gone: the older one must be taken, and that said;
    and where both are damaged, nothing.
    """
    rng, found = random.Random(seed), Counter[str]()
    with elsewhere() as place:
        outcome(command(*small("vae", 4, "run")))
        older = _params(_copy(place / "run", place / "older", drop="4"))
        newest = _params(place / "run")
        for index in range(n):
            folder = _copy(place / "run", place / f"copy{index}")
            files = [path for path in (folder / "checkpoints" / "4").rglob("*") if path.is_file()]
            _damage(rng, rng.choice(sorted(files)))
            how, value = outcome(lambda folder=folder: _params(folder))
            if how == "done":
                equal = _equal(value, older)
                how = "told, and the one before taken" if equal else "silent"
                if _equal(value, newest):
                    how = "harmless"  # a mutation that changed nothing
            found[how] += 1
            shutil.rmtree(folder)
    return {"damaged": n, **found}


def _damage(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.15:
        path.unlink()
        return
    data = path.read_bytes()
    changed = mutated(rng, data)
    path.write_bytes(changed if changed != data else changed + b"\0")


def _copy(folder: Path, to: Path, drop: str | None = None) -> Path:
    shutil.copytree(folder, to)
    if drop is not None:
        shutil.rmtree(to / "checkpoints" / drop)
    return to


def _params(folder: Path) -> Any:
    run = load(folder)
    return jax.tree.map(np.asarray, (run.params, run.state))


def _equal(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- files of data --------------------------------------------------------------------------------


def _originals(place: Path) -> dict[str, dict[str, Any]]:
    """A file of every format, and the options that it is opened with."""
    import scipy.io

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 17, (40, 4, 4)), np.arange(40) % 3
    np.savez(place / "a.npz", x=x.astype(np.uint8), y=y)
    np.savez_compressed(place / "b.npz", x=rng.normal(size=(40, 3)), y=rng.normal(size=(40, 2)))
    np.save(place / "c.npy", rng.normal(size=(40, 3)).astype(np.float32))
    np.save(place / "d.npy", x)
    (place / "e.txt").write_text("the cat sat on the mat, naïve and glad.\n" * 30)
    (place / "f.txt").write_text("\n".join(f"name {index}" for index in range(60)) + "\n")
    cells = {name: np.empty(3, object) for name in ("traindata", "validdata", "testdata")}
    for cell in cells.values():
        for index in range(3):
            cell[index] = rng.integers(0, 2, (5 + index, 88)).astype(float)
    scipy.io.savemat(place / "g.mat", cells)
    _newer(place, rng)
    return {
        "a.npz": {"conditional": True},
        "b.npz": {"conditional": True},
        "c.npy": {},
        "d.npy": {},
        "e.txt": {"context": 8},
        "f.txt": {"layout": "lines"},
        "g.mat": {},
        "h.csv": {},
        "i.parquet": {},
        "j.mid": {},
        "k.zip": {},
        "l.tar": {},
        "m.jsonl": {"context": 8},
        "n.bin": {"context": 8, "vocab_size": 20},
        "o.npy": {"kind": "tokens"},
        "p.txt.gz": {"context": 8},
        "q.tsv": {},
        "r.jsonl.gz": {"context": 8},
        "s.tar.gz": {},
        "t.ndjson": {"layout": "lines"},
    }


def _newer(place: Path, rng: np.random.Generator) -> None:
    """Tables, music, pictures in archives, token ids."""
    import pyarrow as pa
    import pyarrow.parquet
    from PIL import Image

    from genjax.data.music import midi

    table = {name: rng.normal(size=60).round(3) for name in ("height", "width")}
    rows = zip(*table.values(), strict=True)
    lines = [",".join(table), *(",".join(map(str, row)) for row in rows)]
    (place / "h.csv").write_text("\n".join(lines) + "\n")
    (place / "q.tsv").write_text("\n".join(lines).replace(",", "\t") + "\n")
    pyarrow.parquet.write_table(pa.table(table), place / "i.parquet")
    midi(rng.integers(0, 2, (40, 88)), place / "j.mid")
    (place / "pictures").mkdir()
    for index in range(20):
        pixels = rng.integers(0, 256, (6, 6)).astype(np.uint8)
        Image.fromarray(pixels).save(place / "pictures" / f"{index}.png")
    shutil.make_archive(str(place / "k"), "zip", place / "pictures")
    shutil.make_archive(str(place / "l"), "tar", place / "pictures")
    shutil.make_archive(str(place / "s"), "gztar", place / "pictures")
    texts = ("".join(rng.choice(list("abc \n"), 30)) for _ in range(40))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("m.jsonl", "t.ndjson"):
        (place / name).write_text(lines)
    (place / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rng.integers(0, 20, 800).astype("<u2").tofile(place / "n.bin")
    np.save(place / "o.npy", rng.integers(0, 9, (40, 6)))
    (place / "p.txt.gz").write_bytes(gzip.compress(b"the cat sat on the mat. " * 40))


def files(n: int = 1050, seed: int = 2) -> dict[str, int]:
    """Mutated files of every format: opened, and asked for as the data of a run that has trained on
    the original. Silent is a run that takes other values than it was trained on.
    """
    rng, found = random.Random(seed), Counter[str]()
    with elsewhere() as place:
        originals = _originals(place)
        outcome(command(*small("vae", 2, "run")))
        run = load(place / "run")
        for index in range(n):
            name, options = rng.choice(list(originals.items()))
            whole = (place / name).read_bytes()
            path = place / f"mutant{index}{''.join(Path(name).suffixes)}"
            path.write_bytes(mutated(rng, whole))
            how, value = outcome(lambda path=path, o=options: open_source(path, **o).load())
            if how == "done":
                how = _known_to_a_run(run, place / name, path, options, value)
            found[how] += 1
            path.unlink()
    return {"mutated files": n, **found}


def _known_to_a_run(run: Any, whole: Path, path: Path, options: Any, value: Any) -> str:
    """Whether a run on the whole file would take the mutant in its place."""
    from genjax.runs.identity import files_of

    source = open_source(whole, **options)
    kept = files_of(source)
    recipe = dataclasses.replace(run.data, data=str(whole), data_options=options)
    there = run._replace(
        files=[{**kept[0], "path": str(path)}],
        data=dataclasses.replace(recipe, data=str(path)),
        model=run.model._replace(spec=source.spec),
        folder=Path("nowhere"),
    )
    how, _ = outcome(lambda: source_of(there))
    if how == "done":
        return "harmless" if _equal(value, source.load()) else "silent"
    return "told by its hash" if how == "told" else how


# --- run folders ----------------------------------------------------------------------------------


def folders(n: int = 320, seed: int = 3) -> dict[str, int]:
    """A file of a run folder mutated, replaced by a folder or a link, or gone: `genjax sample`
    draws the same samples, or says what is wrong.
    """
    rng, found = random.Random(seed), Counter[str]()
    with elsewhere() as place:
        outcome(command(*small("cvae", 4, "run")))
        wanted = _sampled(place / "run")
        for index in range(n):
            folder = _copy(place / "run", place / f"copy{index}")
            _spoil(rng, folder)
            how, value = outcome(lambda folder=folder: _sampled(folder))
            if how == "done":
                how = "the same samples" if np.array_equal(value, wanted) else "other samples"
                older = how == "other samples" and load(folder).step == 2
                how = "told, and the checkpoint before taken" if older else how
            found[how] += 1
            if how == "traceback":
                print(value, file=sys.stderr)
            shutil.rmtree(folder)
    silent = found.pop("other samples", 0)
    return {"spoiled folders": n, **found, "silent": silent}


def _spoil(rng: random.Random, folder: Path) -> None:
    top = [path for path in folder.rglob("*") if path.is_file()]
    small_files = [path for path in top if path.parent == folder and path.suffix != ".png"]
    path = rng.choice(sorted(small_files if rng.random() < 0.8 else top))
    way = rng.random()
    if way < 0.1:
        path.unlink()
        path.mkdir()
    elif way < 0.2:
        path.unlink()
        path.symlink_to(rng.choice([".", "/dev/null", "nowhere", "/"]))
    elif way < 0.5 and path.suffix == ".json":
        _edit(rng, path)
    else:
        _damage(rng, path)


_ODD: tuple[Any, ...] = (None, -1, 0, 1.5, 1e300, "", "²", [], {}, [[]], True, 10**30, "\x1b[2J")


def _edit(rng: random.Random, path: Path) -> None:
    """One value of a JSON file is another one, or gone, or under another name."""
    values = json.loads(path.read_text())
    inner, name = values, ""
    while isinstance(inner, dict) and inner:
        name = rng.choice(sorted(inner))
        if not isinstance(inner[name], dict) or not inner[name] or rng.random() < 0.2:
            break
        inner = inner[name]
    if isinstance(inner, dict) and inner:
        value = inner.pop(name)
        if rng.random() < 0.7:
            inner[name] = rng.choice(_ODD)
        elif rng.random() < 0.5:
            inner[name + "_"] = value
    path.write_text(json.dumps(values))


def _sampled(folder: Path) -> np.ndarray:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "drawn"
        genjax.cli.main(["sample", str(folder), "--n", "2", "--out", str(out)])
        with np.load(out.with_name("drawn.npz")) as file:
            return file["x"]


# --- arguments ------------------------------------------------------------------------------------

_ABSURD = ("nan", "inf", "-inf", "1e999", "", "x", "--", "[1]", "1,2", "None", "-1", "0x", "٣")


def arguments(n: int = 1200, seed: int = 4) -> dict[str, int]:
    """Random flags with absurd values for every row: each list is refused in one message. What is
    accepted is built as far as its step, and counts as absurd where a number is NaN or infinite.
    """
    rng, found = random.Random(seed), Counter[str]()
    names = list(ZOO)
    with elsewhere():
        for _ in range(n):
            row = ZOO[rng.choice(names)]
            args = [row.name]
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                setting = rng.choice(list(settings_of(row).values()))
                flag = setting.name if rng.random() < 0.7 else setting.full
                args += [f"--{flag.replace('_', '-')}", rng.choice(_ABSURD)]
            how, value = outcome(lambda args=args: _prepared(args))
            if how == "done":
                how = "absurd and accepted" if value else "accepted"
            found[how] += 1
            if how in ("traceback", "absurd and accepted"):
                print(how, args, value, file=sys.stderr)
    return {"argument lists": n, **found}


def _prepared(args: list[str]) -> bool:
    """Everything that `train` does before it writes: whether a setting is no number."""
    from genjax.cli.flags import parse_recipe

    recipe, row, _ = parse_recipe("train", args, genjax.cli._Train)
    values = to_dict(recipe)
    from_dict(values, ZOO)
    if row.first is None:
        spec = recipe.source().spec
        jax.eval_shape(recipe.training(spec).init, jax.random.key(0))
    return "NaN" in json.dumps(values) or "Infinity" in json.dumps(values)


PARTS: dict[str, Callable[[], dict[str, int]]] = {
    "kills": kills,
    "checkpoints": checkpoints,
    "files": files,
    "folders": folders,
    "arguments": arguments,
}


def main(names: tuple[str, ...] = ()) -> None:
    """Run the attacks, or those of them that are named, and write results/attack.json, which keeps
    what there is of the others.
    """
    for name in names:
        if name not in PARTS:
            raise unknown_name("attack", name, PARTS)
    before = read("attack") if names else None
    found = {name: before[name] for name in PARTS if name in before} if before else {}
    for name in names or PARTS:
        start = time.perf_counter()
        found[name] = PARTS[name]()
        print(f"{name}: {found[name]} in {time.perf_counter() - start:.0f} s", flush=True)
    write("attack", found)
