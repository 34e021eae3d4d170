"""Settings that cannot be meant are refused before anything is written (trust, A6)."""

import dataclasses
import functools
import inspect
import itertools
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from program import refused
from rows import setup

from genjax import ZOO, DataSpec, settings
from genjax.errors import ConfigError, GenjaxError
from genjax.learning.optim import Optimizer
from genjax.profiling import room
from genjax.protocol import Trained
from genjax.zoo.recipe import from_dict, to_dict

NAN, INF = float("nan"), float("inf")

# --- the command line -----------------------------------------------------------------------------

REFUSED = [
    "vae --learning-rate -1",
    "vae --learning-rate 0",
    "vae --learning-rate nan",
    "vae --learning-rate inf",
    "vae --learning-rate 1e30",
    "vae --optimizer.learning-rate -1e-3",
    "gan --gen.learning-rate 0",
    "transformer --learning-rate -1",
    "vae --b1 1",
    "vae --b1 -0.1",
    "vae --b1 1.5",
    "vae --b2 nan",
    "vae --ema-decay 1",
    "vae --ema-decay -1",
    "vae --clip-norm -1",
    "vae --clip-norm nan",
    "vae --weight-decay -0.1",
    "vae --final-fraction 2",
    "vae --warmup-steps -1",
    "vae --steps 100 --warmup-steps 100 --schedule linear",
    "vae --beta -1",
    "vae --beta nan",
    "vae --beta-warmup-steps -5",
    "gan --r1 -1",
    "gan --r1 nan",
    "vae --evaluate-every -1",
    "vae --checkpoint-every -1",
    "vae --sample-every -7",
    "vae --steps 0",
    "vae --steps -10",
    "vae --epochs 0",
    "vae --epochs -3",
    "vae --batch-size 0",
    "vae --batch-size -4",
    "vae --steps-per-call 0",
    "vae --seed -1",
    "vae --hidden 0",
    "vae --hidden -1",
    "vae --hidden 64 0 64",
    "vae --latent-dim 0",
    "vae --latent-dim -2",
    "diffusion --n-steps 0",
    "diffusion --cond-dropout 1",
    "diffusion --cond-dropout -0.5",
    "transformer --dropout 1",
    "transformer --n-heads 0",
    "lstm --d-hidden 0",
    "vae --keep-checkpoints 0",
    "vae --microbatches 0",
    "glow-mnist --data digits --bins 1000",
    "nsf-ring --bins 1000",
    "pixelcnn-digits --kernel-size 60001",
    "maf-digits --hidden 1000000000",
]


@pytest.mark.slow
@pytest.mark.parametrize("args", REFUSED)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(["train", *args.split()], capsys)
    assert "Traceback" not in said
    flag = next(word for word in reversed(args.split()) if word.startswith("--"))
    words = {name for name in args.replace("--", " --").split() if name.startswith("--")}
    asked = {word.lstrip("-").split(".")[-1].replace("-", "_") for word in words}
    assert any(name in said.replace("-", "_") for name in asked), (flag, said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        "vae --latent-dim 1000000000",
        "vae --hidden 100000000 100000000",
        "lstm --d-hidden 10000000",
        "transformer --d-model 4194304",
        "diffusion --hidden 50000000 50000000",
        "gan --latent-dim 2000000000",
    ],
)
def test_sizes_that_cannot_fit_are_refused_before_anything_is_written(
    args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(["train", *args.split()], capsys)
    assert "memory" in said or "at most" in said
    assert not list(tmp_path.iterdir())


def test_what_the_machine_has_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"params": {"w": jax.ShapeDtypeStruct((1000, 250), np.float32)}}
    monkeypatch.setattr(room, "capacity", lambda: (1_000_000, "this machine"))
    room.check_memory(shapes, "It")
    monkeypatch.setattr(room, "capacity", lambda: (999_999, "this machine"))
    with pytest.raises(GenjaxError, match=r"The largest array is params/w, float32\[1000, 250\]"):
        room.check_memory(shapes, "It")


# --- every numeric setting of every builder -------------------------------------------------------


def bounded(hint: typing.Any) -> settings.Within | None:
    """The bounds that an annotation gives, of itself or of what it may be instead of None."""
    for part in (hint, *typing.get_args(hint)):
        for note in getattr(part, "__metadata__", ()):
            if isinstance(note, settings.Within):
                return note
    return None


def numbers_of(build: typing.Any) -> dict[str, settings.Within]:
    build = inspect.unwrap(build)
    hints = typing.get_type_hints(build, include_extras=True)
    found: dict[str, settings.Within | None] = {}
    for name, hint in hints.items():
        groups = [part for part in (hint, *typing.get_args(hint)) if inspect.isclass(part)]
        for group in groups:
            if dataclasses.is_dataclass(group) and issubclass(group, settings.Settings):
                own = typing.get_type_hints(group, include_extras=True)
                found |= {field: bounded(of) for field, of in own.items()}
        found[name] = bounded(hint)
    return {name: bounds for name, bounds in found.items() if bounds is not None}


# The first row of each builder.
ROWS = {row.family.__name__: row for row in reversed(ZOO.values())}
NUMBERS = [
    (family, name, bounds)
    for family, row in ROWS.items()
    for name, bounds in numbers_of(row.family).items()
]


def test_every_builder_has_settings_with_bounds():
    assert len(NUMBERS) > 60
    assert {family for family, _, _ in NUMBERS} == set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "bounds"), NUMBERS, ids=[f"{family}-{name}" for family, name, _ in NUMBERS]
)
def test_a_number_outside_its_bounds_is_refused_by_name(family, name, bounds):
    wrong = [NAN, INF, -INF, 1e300]
    if np.isfinite(bounds.low):
        wrong += [bounds.low - 1, *([bounds.low] if bounds.above else [])]
    if np.isfinite(bounds.high) and bounds.high < settings.LARGEST:
        wrong += [bounds.high + 1, *([bounds.high] if bounds.below else [])]
    for value in wrong:
        if not np.isnan(value) and bounds.holds(value):
            continue
        with pytest.raises(ConfigError, match=name):
            setup_of(family)(**{name: value})


def setup_of(family):
    """The builder, on what its first row is built on."""
    row = setup(ROWS[family].name)
    assert isinstance(row.on, Trained | DataSpec)
    return functools.partial(row.recipe.family, row.on)


# --- optimisers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("learning_rate",), (0, -1, NAN, INF, -INF, 1001, 1e30, "1e-3")),
        *itertools.product(("b1", "b2", "ema_decay"), (-0.1, 1, 1.1, NAN)),
        *itertools.product(("clip_norm", "weight_decay"), (-1, NAN, INF)),
        *itertools.product(("final_fraction",), (-0.1, 1.1, NAN)),
        *itertools.product(("warmup_steps",), (-1, 1.5, 2**31, NAN)),
    ],
)
def test_an_optimiser_that_cannot_be_meant_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Optimizer(**{name: value})


def test_a_config_by_hand_is_held_to_the_same():
    """What a file says is checked as what is typed."""
    stored = to_dict(ZOO["vae"])
    assert to_dict(from_dict(stored, ZOO)) == stored
    for section, name, value in (
        ("optimizer", "learning_rate", -1),
        ("model", "latent_dim", 0),
        ("model", "hidden", [-1]),
        ("schedule", "steps", -5),
    ):
        broken = {**stored, section: {**stored[section], name: value}}
        with pytest.raises(ConfigError, match=name):
            from_dict(broken, ZOO).training(ZOO["vae"].source().spec)
