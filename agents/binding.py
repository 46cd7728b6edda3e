"""Does a dream move the right player? Action accuracy, subject preservation, detection, interact.

Recorded moments of held-out episodes are dreamt on with the recorded actions; every generated frame
is judged by classifiers that saw real frames only (``worldgym.agents.tiles``), and the model's own
states by themselves. Definitions of specs/actionparty.md section 6, for frames f = 1..S after the
given frame 0; a player is judged as long as the recording has had it on the map without a break:

    ma          share of movement steps (forward ... turn right) whose displacement and turn are the
                recorded ones; blocked moves count as stay; a player not found counts as wrong
    sp          share of players found in exactly one tile in every frame
    detection   share of (player, frame) found in one tile or more
    interact    mean of two shares: interact steps whose effect the recording shows and so does the
                dream; other steps without one in the recording and in the dream

Legend: B clip, F frame, H W pixels, N player slot, S state channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from worldgym.agents.tiles import Tiles
from worldgym.agents.tiles_data import cells_of, in_size
from worldgym.data.store import Episodes
from worldgym.envs.party_games import ABSENT, CELLS_HW, FORWARD, INTERACT, RIGHT, SLOTS, TURN_RIGHT
from worldgym.errors import ConfigError, DatasetError
from worldgym.models.party_loss import batch_of
from worldgym.state import Starts

STEPS = (4, 20)  # lengths of a rollout, of the published evaluation
Tally = dict[str, np.ndarray]  # metric -> (B, 2): right, of how many


@dataclass(frozen=True, slots=True)
class Clips:
    """Recorded clips of one game: ``frames_BFHWC`` uint8 with cells of the judges' size,
    ``positions_BFN2`` in [-1, 1], ``orientation_BFN``, ``alive_BFN``, ``actions_BFN`` (row f led to
    frame f; -1 in free slots, and in row 0 if nothing before it is given), ``valid_BN`` and the
    episode of each clip; ``past``: the frames before, ``known_B``: how many of them there are."""

    game: str
    frames_BFHWC: np.ndarray
    positions_BFN2: np.ndarray
    orientation_BFN: np.ndarray
    alive_BFN: np.ndarray
    actions_BFN: np.ndarray
    valid_BN: np.ndarray
    episode_B: np.ndarray
    past: Clips | None = None
    known_B: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.episode_B)

    @property
    def cells_BFN2(self) -> np.ndarray:
        """Cells (x, y) of the players."""
        return cells_of(self.positions_BFN2)

    @property
    def facing_BFN(self) -> np.ndarray:
        """0 N 1 E 2 S 3 W."""
        return np.maximum(self.orientation_BFN, 0).astype(np.int64)

    @property
    def judged_BFN(self) -> np.ndarray:
        """On the map from frame 0 to this one."""
        return np.logical_and.accumulate(self.alive_BFN & self.valid_BN[:, None], 1)


@dataclass(frozen=True, slots=True)
class Rolled:
    """What a roller made of clips: frames like theirs (frame 0: the given one) and, if it has
    states, positions (B, F, N, 2), facing and whether a player is alive (None: it does not say)."""

    frames_BFHWC: np.ndarray
    positions_BFN2: np.ndarray | None = None
    facing_BFN: np.ndarray | None = None
    alive_BFN: np.ndarray | None = None


class Roller(Protocol):
    """Anything that goes on from frame 0 of clips with their actions."""

    def __call__(self, clips: Clips) -> Rolled:
        """Frames and states of the same length as the clips."""


def recorded(clips: Clips) -> Rolled:
    """The recording itself: what the judges can see at best."""
    return Rolled(clips.frames_BFHWC, clips.positions_BFN2, clips.facing_BFN, clips.alive_BFN)


def copied(clips: Clips) -> Rolled:
    """Nothing moves: frame 0 again and again."""
    def still(x: np.ndarray) -> np.ndarray:
        return np.repeat(x[:, :1], x.shape[1], 1)

    return Rolled(still(clips.frames_BFHWC), still(clips.positions_BFN2), still(clips.facing_BFN),
                  still(clips.alive_BFN))


class Dream:
    """A ``PartyWorld`` as a roller; ``games``: their names in the order of its numbers."""

    def __init__(self, world: Any, games: Sequence[str], seed: int = 0, batch: int = 32) -> None:
        self.world, self.games, self.seed, self.batch = world, tuple(games), seed, batch

    def __call__(self, clips: Clips) -> Rolled:
        slots = self.world.sub.slots
        if clips.game not in self.games or clips.valid_BN[:, slots:].any():
            raise ConfigError(
                "the world cannot play these recordings", fix="choose --games the world knows",
                given=f"{clips.game} with {int(clips.valid_BN.sum(1).max())} players",
                expected=f"one of {self.games}, at most {slots} players")
        parts = [self._roll(clips, np.arange(i, min(i + self.batch, len(clips))))
                 for i in range(0, len(clips), self.batch)]
        frames, states = (np.concatenate(x) for x in zip(*parts, strict=True))
        extra = SLOTS - slots
        states = np.pad(states, ((0, 0), (0, 0), (0, extra), (0, 0)))
        full = states.shape[-1] > 2
        return Rolled(frames, states[..., :2],
                      states[..., 2:6].argmax(-1) if full else None,
                      states[..., 6] > 0 if full else None)

    def _roll(self, clips: Clips, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        world, n = self.world, self.world.sub.slots
        count, past = len(rows), clips.past
        back = 0 if past is None else min(world.spec.context_frames, past.frames_BFHWC.shape[1])

        def start(name: str) -> np.ndarray:
            now = getattr(clips, name)[rows, :1]
            if past is None or not back:
                return now
            return np.concatenate([getattr(past, name)[rows, -back:], now], 1)

        seen = np.ascontiguousarray(start("frames_BFHWC"))
        latents = world.encode(seen.reshape(-1, *seen.shape[2:])).unflatten(0, seen.shape[:2])
        valid, actions = clips.valid_BN[rows, :n], clips.actions_BFN[rows, :, :n]
        shape = (count, back + 1, n)
        given = {"positions": np.nan_to_num(start("positions_BFN2")[:, :, :n]),
                 "orientation": start("orientation_BFN")[:, :, :n],
                 "alive": start("alive_BFN")[:, :, :n], "valid": valid,
                 "actions": start("actions_BFN")[:, :, :n], "latents": latents,
                 "game": np.full(count, self.games.index(clips.game)),
                 "rewards": np.zeros(shape), "ended": np.zeros(shape, bool)}
        states = batch_of(given, world.sub.channels > 2)["states_BFNS"]
        known = np.zeros(count, np.int64) if clips.known_B is None else clips.known_B[rows]
        told = given["actions"] if back else np.full(shape, ABSENT)
        starts = Starts(latents, told, (told == ABSENT).all(2), 1 + np.minimum(known, back), states,
                        valid, given["game"])
        state = world.begin(starts, [self.seed] * count, rows.tolist())
        frames, kept = [seen[:, -1]], [states[:, -1].numpy()]
        for step in range(1, clips.frames_BFHWC.shape[1]):
            state, chunk = world.step(state, actions[:, step])
            frames.append(chunk.frames()[:, -1].cpu().numpy())
            kept.append(chunk.subjects.states_BFNS[:, -1].cpu().numpy())
        return np.stack(frames, 1), np.stack(kept, 1)


def choose_clips(store: Episodes, game: str, ids: Sequence[int] | np.ndarray, *,
                 steps: int = max(STEPS), clips: int = 6, cell_px: int = 4,
                 context: int = 0) -> Clips:
    """``clips`` clips of ``steps`` steps from each of these episodes, evenly spread over it.

    ``context``: frames before each that a world with a memory is given, too, where there are any.
    """
    rows, episodes = [], []
    for i in np.asarray(ids, np.int64):
        spare = int(store.lengths[i]) - steps
        if spare < 0:
            continue
        firsts = np.unique(np.linspace(0, spare, clips).astype(np.int64))
        rows += [int(store.starts[i]) + first + np.arange(steps + 1) for first in firsts]
        episodes += [int(i)] * len(firsts)
    if not rows:
        raise DatasetError("nothing to judge", given=f"{game}: {len(ids)} episodes",
                           expected=f"one of {steps} steps or more", fix="record longer episodes")
    where, number = np.stack(rows), np.array(episodes)
    valid = store.take("info_valid", where[:, 0])

    def read(where: np.ndarray, **more: Any) -> Clips:
        return Clips(game, in_size(store.take("frames", where), cell_px),
                     store.take("info_position", where), store.take("info_orientation", where),
                     store.take("info_alive", where),
                     store.take("actions", where).astype(np.int64), valid, number, **more)

    if not context:
        out = read(where)
        out.actions_BFN[:, 0] = ABSENT
        return out
    begin = store.starts[number]
    before = where[:, :1] + np.arange(-context, 0)
    past = read(np.maximum(before, begin[:, None]))
    return read(where, past=past, known_B=np.minimum(where[:, 0] - begin, context))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a judge saw: tiles that show the player, its cell (of the likeliest tile), facing, and
    whether the step to this frame shows it interacting; None where the judge cannot tell."""

    tiles_BFN: np.ndarray
    cells_BFN2: np.ndarray
    facing_BFN: np.ndarray | None
    effect_BFN: np.ndarray | None


def look(tiles: Tiles, clips: Clips, frames_BFHWC: np.ndarray) -> Seen:
    """Classifiers on frames; frame 0 is given, so its places and facings are known."""
    b, f, n = clips.alive_BFN.shape
    real = clips.cells_BFN2
    refs = tiles.references(clips.frames_BFHWC[:, 0], real[:, 0])
    flat = np.ascontiguousarray(frames_BFHWC).reshape(b * f, *frames_BFHWC.shape[2:])
    chance = tiles.find(clips.game, flat, np.repeat(clips.valid_BN, f, 0),
                        refs.repeat_interleave(f, 0)).reshape(b, f, n, -1)
    best = chance.argmax(-1)
    columns = frames_BFHWC.shape[3] // tiles.cfg.cell_px
    cells = np.stack([best % columns, best // columns], -1)
    count = (chance > 0).sum(-1)
    cells[:, 0], count[:, 0] = real[:, 0], clips.alive_BFN[:, 0]
    facing = tiles.facing(clips.game, flat, cells.reshape(b * f, n, 2)).reshape(b, f, n)
    facing[:, 0] = clips.facing_BFN[:, 0]
    return Seen(count, cells, facing, _effects(tiles, clips.game, frames_BFHWC, cells, facing))


def _effects(tiles: Tiles, game: str, frames_BFHWC: np.ndarray, cells_BFN2: np.ndarray,
             facing_BFN: np.ndarray) -> np.ndarray | None:
    if not tiles.of(game).acts:
        return None
    b, f, n = facing_BFN.shape
    size = frames_BFHWC.shape[2:]
    before, after = (np.ascontiguousarray(frames_BFHWC[:, part]).reshape(-1, *size)
                     for part in (slice(0, -1), slice(1, None)))
    effect = np.zeros((b, f, n), bool)
    effect[:, 1:] = tiles.interacted(
        game, before, after, cells_BFN2[:, :-1].reshape(-1, n, 2),
        facing_BFN[:, :-1].reshape(-1, n)).reshape(b, f - 1, n)
    return effect


def believe(clips: Clips, rolled: Rolled) -> Seen | None:
    """The model's own states as what is seen: one tile per player that it holds alive."""
    if rolled.positions_BFN2 is None:
        return None
    alive = (np.ones(clips.alive_BFN.shape, bool) if rolled.alive_BFN is None
             else rolled.alive_BFN.copy())
    cells = cells_of(rolled.positions_BFN2)
    cells[:, 0], alive[:, 0] = clips.cells_BFN2[:, 0], clips.alive_BFN[:, 0]
    facing = None if rolled.facing_BFN is None else rolled.facing_BFN.copy()
    if facing is not None:
        facing[:, 0] = clips.facing_BFN[:, 0]
    return Seen(alive.astype(np.int64), cells, facing, None)


def tally(clips: Clips, seen: Seen, effect_BFN: np.ndarray | None,
          steps: Sequence[int] = STEPS, mark: str = "") -> Tally:
    """Right and counted cases per clip; ``effect_BFN``: what the recording shows, by the same
    classifier; ``mark``: appended to the metrics' names."""
    judged = clips.judged_BFN[:, 1:]
    found, tiles = seen.tiles_BFN > 0, seen.tiles_BFN[:, 1:]
    went = np.diff(clips.cells_BFN2, axis=1)
    right = (np.diff(seen.cells_BFN2, axis=1) == went).all(-1) & found[:, 1:] & found[:, :-1]
    actions = clips.actions_BFN[:, 1:]
    moving = judged & (actions >= FORWARD) & (np.abs(went).sum(-1) <= 1)  # more: put elsewhere
    if seen.facing_BFN is None:  # a turn cannot be seen: displacements only
        moving &= actions <= RIGHT
    else:
        moving &= actions <= TURN_RIGHT
        right &= (np.diff(seen.facing_BFN, axis=1) - np.diff(clips.facing_BFN, axis=1)) % 4 == 0
    out: Tally = {}
    for count in steps:
        part = slice(0, count)
        out[f"ma_{count}{mark}"] = _share(right[:, part], moving[:, part])
        whole = ((tiles == 1) | ~judged)[:, part].all(1)
        out[f"sp_{count}{mark}"] = _share(whole, judged[:, 0])
    out[f"detection{mark}"] = _share(tiles > 0, judged)
    if effect_BFN is not None and seen.effect_BFN is not None:
        real, shown, there = effect_BFN[:, 1:], seen.effect_BFN[:, 1:], found[:, :-1]
        acts = judged & (actions == INTERACT) & real
        out[f"interact_hit{mark}"] = _share(shown & there, acts)
        rest = judged & (actions != INTERACT) & ~real
        out[f"interact_quiet{mark}"] = _share(~shown & there, rest)
    return out


def _share(right: np.ndarray, counted: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, counted.ndim))
    return np.stack([(right & counted).sum(axes), counted.sum(axes)], 1).astype(np.float64)


def measure(tiles: Tiles, clips: Mapping[str, Clips], rollers: Mapping[str, Roller],
            steps: Sequence[int] = STEPS, keep: Any = None) -> dict[str, dict[str, Tally]]:
    """Tallies of every roller and game, summed by episode; ``keep(name, clips, rolled)`` is called
    with everything that was rolled."""
    found: dict[str, dict[str, Tally]] = {name: {} for name in rollers}
    for game, some in clips.items():
        effect = _effects(tiles, game, some.frames_BFHWC, some.cells_BFN2, some.facing_BFN)
        for name, roll in rollers.items():
            rolled = roll(some)
            if rolled.frames_BFHWC.shape != some.frames_BFHWC.shape:
                raise ConfigError("the roller's frames do not fit", given=f"{name}: "
                                  f"{rolled.frames_BFHWC.shape}", expected=some.frames_BFHWC.shape,
                                  fix="give judges and world the same frame size")
            got = tally(some, look(tiles, some, rolled.frames_BFHWC), effect, steps)
            own = believe(some, rolled)
            if own is not None:
                got |= tally(some, own, None, steps, "_states")
            found[name][game] = {k: _by_episode(v, some.episode_B) for k, v in got.items()}
            if keep is not None:
                keep(name, some, rolled)
    return found


def _by_episode(counts_B2: np.ndarray, episode_B: np.ndarray) -> np.ndarray:
    _, index = np.unique(episode_B, return_inverse=True)
    out = np.zeros((int(index.max()) + 1, 2))
    np.add.at(out, index, counts_B2)
    return out


def dreams(folder: str | Path, seed: int = 0) -> dict[str, Dream]:
    """The world of a folder as "model", and with its states snapped to cells the other way round:
    "snapped", or "unsnapped" if it snaps by itself."""
    from worldgym.models.party_nano import PartyNanoConfig, load_party, nano

    cfg = PartyNanoConfig.from_json(nano.read_config(folder))
    cells = cfg.cells or (snap_cells(),) * len(cfg.games)
    name = "unsnapped" if cfg.snap else "snapped"
    other = load_party(folder, snap=not cfg.snap, cells=cells)
    return {"model": Dream(load_party(folder).world(), cfg.games, seed),
            name: Dream(other.world(), cfg.games, seed)}


def snap_cells() -> tuple[float, float, float, float]:
    """Offset and size of the cells that all mini-map games share, as ``PartyWorld`` wants them."""
    return (0.0, 0.0, 2 / CELLS_HW[1], 2 / CELLS_HW[0])

