"""Averages of the weights whose length is chosen after training: what a run stores of those that it
tracks, and any other, made of what was stored. See `learning/powers.py`.

averages/ in a run folder is a folder of checkpoints that keeps all. A run that was stopped and went
on stores what one that was not does.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.errors import CheckpointError, ConfigError
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.loop import Hook
from genjax.learning.powers import Kept, Powers, SigmaRel, combination, powers_in
from genjax.learning.step import eval_params
from genjax.protocol import Params, TrainState
from genjax.runs.identity import check_note
from genjax.settings import check_setting
from genjax.zoo.recipe import Recipe

FOLDER = "averages"
ALL = 2**31
FARTHEST = 0.25  # that the profile of an average may be off, as a part of itself


class Snapshot(NamedTuple):
    """What is stored at a step: what every player that tracks averages has by then."""

    step: Any
    players: dict[str, Powers]


class Rebuilt(NamedTuple):
    """Parameters that are averages of a length, and how far the profile of the average is off, as a
    part of itself; the largest of the players.
    """

    params: Params
    off: float


def lengths_of(recipe: Recipe, players: Any) -> dict[str, tuple[float, ...]]:
    """The sigma_rel of the averages that each player tracks; without those that track none."""
    own = recipe.optimizer
    by_player = own if isinstance(own, Mapping) else dict.fromkeys(players, own)
    return {player: one.sigma_rels for player, one in by_player.items() if one.sigma_rels}


def snapshot_of(state: TrainState) -> Snapshot:
    """What is to be stored of a state, or its shapes of the state's shapes."""
    found = {player: powers_in(opt) for player, opt in state.opt.items()}
    return Snapshot(state.step, {player: one for player, one in found.items() if one is not None})


def snapshot_hook(folder: Path, about: Mapping[str, Any], every: int) -> Hook:
    """Store the averages every so many steps, and at the end.

    Raises:
        CheckpointError: from the hook, if the disk does not take them.
    """
    check = functools.partial(check_note, about=about, folder=folder)
    stored = Checkpoints(folder / FOLDER, ALL, about, check)

    def call(step: int, state: TrainState) -> None:
        stored.save(snapshot_of(state))  # type: ignore[arg-type]

    return Hook(every, call, "storing the averages")


def rebuilt(
    folder: Path,
    lengths: Mapping[str, tuple[float, ...]],
    state: TrainState,
    sigma_rel: float,
    check: Callable[[dict[str, Any]], None] = lambda note: None,
) -> Rebuilt:
    """The parameters that are averages of length sigma_rel at the step of a state; a player that
    tracks none has those that it is evaluated with anyway.

    Args:
        folder: of the run.
        lengths: of the averages that it tracks, see `lengths_of`.
        state: of one of its checkpoints.
        check: refuses the note of a snapshot that belongs to something else.

    Raises:
        ConfigError: for a run that tracks no averages, and for a length that is too far from what
            it stored.
        CheckpointError: for what cannot be read.
    """
    check_setting("sigma_rel", sigma_rel, SigmaRel)
    if not lengths:
        raise ConfigError(
            f"{folder} has tracked no averages to make one of sigma_rel {sigma_rel:g} of: train "
            "with --sigma-rels 0.05 0.1, or leave --sigma-rel out."
        )
    here = snapshot_of(state)
    stored = Checkpoints(folder / FOLDER, ALL, check=check)
    steps = [step for step in stored.steps() if step < int(state.step)]
    read = functools.partial(_read, stored, jax.eval_shape(lambda: here))
    counts = [{p: int(one.count) for p, one in read(step).players.items()} for step in steps]
    counts.append({player: int(one.count) for player, one in here.players.items()})
    found = {
        player: _shares(folder, sigma_rel, own, [at[player] for at in counts])
        for player, own in lengths.items()
    }
    totals: dict[str, Any] = {}
    for index, step in enumerate([*steps, None]):
        snapshot = here if step is None else read(step)
        for player, (shares, _) in found.items():
            averages = snapshot.players[player].averages
            for share, tree in zip(shares[index], averages, strict=True):
                part = jax.tree.map(functools.partial(_part, share), tree)
                before = totals.get(player)
                totals[player] = part if before is None else jax.tree.map(np.add, before, part)
    params = eval_params(state)
    for player, total in totals.items():
        params[player] = jax.tree.map(
            lambda leaf, like: jnp.asarray(leaf, like.dtype), total, params[player]
        )
    return Rebuilt(params, max(off for _, off in found.values()))


def _read(stored: Checkpoints, like: Any, step: int) -> Snapshot:
    """The averages that were stored at a step."""
    try:
        restored = stored.restore(like, step)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} These are averages that were stored on the way; move "
            f"{stored.folder / str(step)} away to do without them."
        ) from error
    assert restored is not None
    return restored.state  # type: ignore[return-value]


def _shares(
    folder: Path, sigma_rel: float, lengths: tuple[float, ...], counts: list[int]
) -> tuple[np.ndarray, float]:
    """By what each average is multiplied, [times, lengths], and how far the profile is off.

    Args:
        counts: the updates at each time, of which the last is that of the average.
    """
    if not counts[-1]:
        raise ConfigError(f"{folder} has not trained a step yet, of which there is no average.")
    kept = [Kept(length, count) for count in counts for length in lengths]
    # One of step 0 is no average of anything.
    some = [one for one in kept if one.step]
    shares, off = combination(Kept(sigma_rel, counts[-1]), some)
    if off > FARTHEST:
        raise ConfigError(
            f"The average of sigma_rel {sigma_rel:g} cannot be made of what {folder} has stored "
            f"({len(counts)} times those of {', '.join(f'{one:g}' for one in lengths)}): its "
            f"profile would be off by {100 * off:.0f} %. Ask for one that is nearer to these, or "
            "train with a smaller --snapshot-every."
        )
    whole = np.concatenate([np.zeros(len(kept) - len(some)), shares])
    return whole.reshape(len(counts), len(lengths)), off


def _part(share: float, leaf: Any) -> np.ndarray:
    """A share of an array, in double precision."""
    array = np.asarray(leaf)
    return share * array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
