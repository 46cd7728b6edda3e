"""Training clips from recordings of several players, balanced over games or over players.

A batch depends on (seed, iteration) alone; a game is as likely as ``chances`` say (equally, if
nothing does) whatever its recording's length, and within a game every window is equally likely.
Windows never cross an episode.
Legend: B clips, F frames of a clip, N player slots, H W C frame pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from worldgym.data.shards import ABSENT
from worldgym.data.store import INDEX, Episodes
from worldgym.errors import ConfigError, DatasetError

CLIPS = 3  # random stream, beside those of worldgym.data.chunks
FIELDS = {"positions": "info_position", "orientation": "info_orientation", "alive": "info_alive",
          "ended": "info_ended", "rewards": "rewards"}
Ids = Mapping[str, np.ndarray]


def open_party(folder: str | Path) -> dict[str, Episodes]:
    """The data sets that ``worldgym collect-party`` wrote into ``folder``, by game, sorted."""
    found = sorted(path.parent for path in Path(folder).glob(f"*/{INDEX}"))
    stores = {path.name: Episodes.open(path) for path in found}
    stores = {name: store for name, store in stores.items() if len(store)}
    if not stores or any(not store.agents for store in stores.values()):
        raise DatasetError("no recordings of several players here", given=str(folder),
                           expected="a folder with one data set per game",
                           fix="record some: worldgym collect-party --out FOLDER")
    return stores


def split_party(stores: Mapping[str, Episodes], holdout: float = 0.05,
                seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Episode numbers (train, held out) of every game: whole episodes, see ``Episodes.split``."""
    parts = {name: store.split(holdout, seed) for name, store in stores.items()}
    return {k: v[0] for k, v in parts.items()}, {k: v[1] for k, v in parts.items()}


class PartySampler:
    """Random clips of ``frames`` rows.

    Args:
        stores: one data set per game, e.g. from ``open_party``; the same slots and frame size.
        ids: episode numbers to draw from, per game, e.g. from ``split_party``.
        frames: rows F of a clip.
        batch: clips B of the global batch.
        seed: non-negative.
        halve: frames at half the size (mean of 2 x 2 pixels), 4 pixels a cell instead of 8.
        permute: shuffle the player slots of every clip, as a model without slot identity wants.
        with_frames: also read the frames.
        extra: per game, further arrays with one entry per row of its data set, e.g. latents.
        eventful: share of the clips drawn from those that pay or end a player in their last row,
            which are rare in some games; the rest is drawn from all.
        soon: clips count as eventful, too, if a player is paid, ends, leaves the map or comes back
            within so many rows after their last; None: the last row's pay and ends alone count.
        chances: of each game in the order of ``stores``, which sum to 1; default: all alike.
        rank, world_size: this process reads rows ``rank*B//world_size : (rank+1)*B//world_size``.

    ``sampler(iteration)`` returns ``frames`` uint8 (B, F, H, W, 3) if asked, ``positions`` float32
    (B, F, N, 2; 0 in free slots), ``orientation`` int8, ``alive`` bool, ``ended`` bool, ``rewards``
    float32 and ``actions`` int64 (each B, F, N), ``valid`` bool (B, N), ``game`` int64 (B; index
    into ``games``), ``rows`` int64 (B, F) and every extra array as (B, F, ...). Row f holds what
    led from frame f-1 to f; on row 0 actions are -1 and rewards 0, nothing in the clip led there.
    With ``eventful`` also ``likely`` float32 (B): how much likelier an even draw of clips had been,
    by which to weigh what chance decides.
    """

    def __init__(self, stores: Mapping[str, Episodes], ids: Ids, frames: int, batch: int,
                 seed: int = 0, *, halve: bool = False, permute: bool = True,
                 with_frames: bool = True,
                 extra: Mapping[str, Mapping[str, np.ndarray]] | None = None,
                 eventful: float = 0.0, soon: int | None = None,
                 chances: Sequence[float] | None = None,
                 rank: int = 0, world_size: int = 1) -> None:
        self.games = tuple(stores)
        layouts = {(store.agents, store.frame_hw) for store in stores.values()}
        if frames < 2 or not 0 <= rank < world_size <= batch or seed < 0 or len(layouts) != 1 or (
                set(ids) != set(stores) or not 0 <= eventful < 1) or (
                chances is not None and (len(chances) != len(stores) or min(chances) < 0
                                         or abs(sum(chances) - 1) > 1e-6)):
            raise ConfigError(
                "impossible clips",
                given=f"{frames} frames, batch {batch}, rank {rank} of {world_size}, seed {seed}, "
                f"(slots, frame) {sorted(layouts)}, ids of {sorted(ids)}, eventful {eventful}, "
                f"chances {chances}",
                expected="frames >= 2, 0 <= rank < world_size <= batch, seed >= 0, games recorded "
                f"alike, ids of {sorted(stores)}, 0 <= eventful < 1, chances of sum 1",
                fix="take stores from open_party and ids from split_party")
        self.stores, self.frames, self.batch, self.seed = dict(stores), frames, batch, seed
        self.chances = None if chances is None else np.cumsum(chances)
        self.slots, _ = layouts.pop()
        self.halve, self.permute, self.with_frames = halve, permute, with_frames
        self.extra = {name: dict(arrays) for name, arrays in (extra or {}).items()}
        self.part = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
        self._places: list[tuple[np.ndarray, np.ndarray]] = []
        for name, store in self.stores.items():
            mine = np.asarray(ids[name], np.int64)
            count = np.maximum(store.lengths[mine] + 2 - frames, 0)
            if not count.sum():
                raise DatasetError("nothing to sample", given=f"{name}: {len(mine)} episodes",
                                   expected=f"one of {frames} rows or more",
                                   fix="record longer episodes, or ask for shorter clips")
            self._places.append((mine, np.cumsum(count)))
        self.eventful, self.soon = eventful, soon
        self._events = [self._eventful(g) for g in range(len(self.games))] if eventful else []

    def _eventful(self, game: int) -> np.ndarray:
        """First rows of the windows of this game in whose last row something happens, ascending."""
        store, (mine, _) = self.stores[self.games[game]], self._places[game]
        first = np.concatenate([np.arange(s, s + max(0, n + 2 - self.frames)) for s, n in zip(
            store.starts[mine], store.lengths[mine], strict=True)])
        last = first + self.frames - 1
        return first[self._happens(store, mine)[last]]

    def _happens(self, store: Episodes, mine: np.ndarray) -> np.ndarray:
        """Of every row of a data set, whether it is the last of an eventful window."""
        rows = np.arange(store.rows)
        paid = (np.nan_to_num(store.take("rewards", rows)) != 0).any(1)
        told = paid | store.take("info_ended", rows).any(1)
        if self.soon is None:
            return told
        alive = store.take("info_alive", rows)
        told[1:] |= (alive[1:] != alive[:-1]).any(1)
        out = np.zeros_like(told)
        for s, n in zip(store.starts[mine], store.lengths[mine], strict=True):
            inside = told[s:s + n + 1].copy()
            inside[0] = False  # another episode was before
            for later in range(self.soon + 1):
                out[s:s + n + 1 - later] |= inside[later:]
        return out

    def __len__(self) -> int:
        """Number of different clips, all games together."""
        return int(sum(ends[-1] for _, ends in self._places))

    def __call__(self, iteration: int) -> dict[str, np.ndarray]:
        """The batch of this iteration."""
        rng = np.random.default_rng([self.seed, int(iteration), CLIPS])
        game = rng.integers(len(self.games), size=self.batch)
        if self.chances is not None:
            game = np.searchsorted(self.chances[:-1], rng.random(self.batch), side="right")
        place = rng.random(self.batch)
        order = rng.permuted(np.tile(np.arange(self.slots), (self.batch, 1)), axis=1)
        chosen = rng.random(self.batch) < self.eventful if self.eventful else np.zeros(
            self.batch, bool)
        mine = self.part
        game, place, order, chosen = game[mine], place[mine], order[mine], chosen[mine]
        rows = np.stack([self._rows(g, p, e) for g, p, e in zip(game, place, chosen, strict=True)])
        out = self._read(game, rows)
        if self.eventful:
            out["likely"] = np.array([self._likely(g, r[0]) for g, r in zip(
                game, rows, strict=True)], np.float32)
        if self.permute:
            for name in ("actions", "valid", *FIELDS):
                axis = 1 if name == "valid" else 2
                index = order.reshape(len(order), *[1] * (axis - 1), self.slots)
                index = index.reshape(*index.shape, *[1] * (out[name].ndim - axis - 1))
                out[name] = np.take_along_axis(out[name], index, axis)
        return out | {"game": game, "rows": rows}

    def _likely(self, game: int, first: int) -> float:
        """Chance of the window at row ``first`` in an even draw, over its chance in ours."""
        events, share = self._events[game], self.eventful
        if not len(events):
            return 1.0
        at = np.searchsorted(events, first)
        there = at < len(events) and events[at] == first
        return float(1 / (1 - share + share * there * self._places[game][1][-1] / len(events)))

    def _rows(self, game: int, place: float, eventful: bool = False) -> np.ndarray:
        """Global rows of one clip; ``place`` in [0, 1) picks among the game's windows."""
        if eventful and len(self._events[game]):
            events = self._events[game]
            return int(events[int(place * len(events))]) + np.arange(self.frames)
        mine, ends = self._places[game]
        number = int(place * ends[-1])
        which = int(np.searchsorted(ends, number, side="right"))
        offset = number - (int(ends[which - 1]) if which else 0)
        store = self.stores[self.games[game]]
        return int(store.starts[mine[which]]) + offset + np.arange(self.frames)

    def _read(self, game: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {}
        where = [np.flatnonzero(game == g) for g in range(len(self.games))]
        for name, index in zip(self.games, where, strict=True):
            if not len(index):
                continue
            store, mine = self.stores[name], rows[index]
            got = {ours: store.take(theirs, mine) for ours, theirs in FIELDS.items()}
            got["actions"] = store.take("actions", mine).astype(np.int64)
            got["valid"] = store.take("info_valid", mine[:, 0])
            if self.with_frames:
                frames = store.take("frames", mine)
                got["frames"] = halved(frames) if self.halve else frames
            for label, array in self.extra.get(name, {}).items():
                got[label] = array[mine.ravel()].reshape(*mine.shape, *array.shape[1:])
            for label, value in got.items():
                parts.setdefault(label, []).append(value)
        back = np.argsort(np.concatenate(where), kind="stable")
        out = {label: np.concatenate(values)[back] for label, values in parts.items()}
        out["positions"] = np.nan_to_num(out["positions"], nan=0.0)
        out["actions"][:, 0], out["rewards"][:, 0] = ABSENT, 0
        return out


def halved(frames: np.ndarray) -> np.ndarray:
    """Frames (..., H, W, 3) at half the size: rounded mean of 2 x 2 pixels."""
    total = np.full((*frames.shape[:-3], frames.shape[-3] // 2, frames.shape[-2] // 2, 3), 2,
                    np.uint16)  # 2: rounds
    for row in (0, 1):
        for column in (0, 1):
            total += frames[..., row::2, column::2, :]
    return (total // 4).astype(np.uint8)
