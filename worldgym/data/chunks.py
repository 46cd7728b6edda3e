"""Training batches from recorded episodes: fixed-length windows and single transitions.

A batch depends on (seed, iteration) alone: resuming needs the iteration number, nothing else, and
the ranks of a distributed run each read their slice of the batch that one process would read.
Legend: B batch, T rows of a window, K past rows, R rows of the data set, H W C frame.
"""

from collections.abc import Mapping

import numpy as np

from worldgym.data.store import Episodes
from worldgym.errors import ConfigError, DatasetError

WINDOWS, TRANSITIONS = 1, 2  # separate random streams


class _Sampler:
    """What both samplers share: the choice of places, the ranks, the reading."""

    stream = 0

    def __init__(self, episodes: Episodes, ids: np.ndarray, batch: int, seed: int,
                 rank: int, world_size: int, with_frames: bool,
                 extra: Mapping[str, np.ndarray] | None) -> None:
        if not 0 <= rank < world_size <= batch or seed < 0:
            raise ConfigError(
                "impossible batch",
                given=f"batch {batch}, rank {rank} of {world_size}, seed {seed}",
                expected="0 <= rank < world_size <= batch and seed >= 0",
                fix="give the global batch size, at least one row for every process",
            )
        ids = np.asarray(ids)
        known = ids.size and ids.dtype.kind in "iu"
        if not known or ids.min() < 0 or ids.max() >= len(episodes):
            raise DatasetError(
                "no such episodes", given=f"{ids.size} ids of dtype {ids.dtype}",
                expected=f"at least one integer in 0..{len(episodes) - 1}",
                fix="take ids from Episodes.split, or np.arange(len(episodes))",
            )
        for name, array in (extra or {}).items():
            if len(array) != episodes.rows or name in RESERVED:
                raise DatasetError(
                    "extra array does not fit", given=f"{name!r} with {len(array)} rows",
                    expected=f"{episodes.rows} rows, a name other than {sorted(RESERVED)}",
                    fix="compute it for every row of this data set, in order",
                )
        self.episodes, self.ids, self.batch, self.seed = episodes, ids.astype(np.int64), batch, seed
        self.part = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
        self.with_frames, self.extra = with_frames, dict(extra or {})

    def _count(self, places: np.ndarray, shortage: str) -> None:
        """Remember how many places (int64, one number per id) a batch may draw from."""
        self._ends = np.cumsum(places)
        if not len(self):
            raise DatasetError(
                "nothing to sample", given=f"{len(self.ids)} episodes, none with {shortage}",
                expected="at least one", fix="record longer episodes, or ask for shorter windows",
            )

    def __len__(self) -> int:
        """Number of different places."""
        return int(self._ends[-1])

    def _draw(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Episode numbers and offsets of this rank's part; each place equally likely."""
        rng = np.random.default_rng([self.seed, int(iteration), self.stream])
        place = rng.integers(len(self), size=self.batch)[self.part]
        which = np.searchsorted(self._ends, place, side="right")
        before = np.where(which > 0, self._ends[which - 1], 0)
        return self.ids[which], place - before

    def _images(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Frames (if asked) and extra arrays at ``rows``."""
        out = {"frames": self.episodes.take("frames", rows)} if self.with_frames else {}
        order = np.argsort(rows, axis=None)
        for name, array in self.extra.items():
            read = np.empty((rows.size, *array.shape[1:]), array.dtype)
            read[order] = array[rows.ravel()[order]]  # ascending: one pass over a memory map
            out[name] = read.reshape((*rows.shape, *array.shape[1:]))
        return out


RESERVED = {"rows", "actions", "null", "valid", "rewards", "terminated", "length", "frames",
            "soon"}


class ChunkSampler(_Sampler):
    """Random windows of ``length`` rows that never cross an episode; every window equally likely.

    Args:
        episodes: the data set; build a new sampler after an append.
        ids: episode numbers to draw from.
        length: rows T of a window.
        batch: windows B of the global batch.
        seed: non-negative.
        drop_terminal_frame: leave out the last row of terminated episodes, whose frame many games
            show black; ends are learned from ``OutcomeSampler``. Truncated episodes keep theirs.
        rank, world_size: this process reads rows ``rank*B//world_size : (rank+1)*B//world_size``.
        with_frames: also read the frames.
        extra: further arrays with one entry per row of the data set, e.g. latents.
        shortest: an episode with fewer than ``length`` but at least this many usable rows gives one
            window, filled up with its last usable row; default: no such windows.

    ``sampler(iteration)`` returns ``rows`` int64 (B, T), ``actions`` (B, T, ...), ``null`` bool
    (B, T; true on row 0 of an episode), ``valid`` bool (B, T; false where a short window was filled
    up), ``rewards`` float32 (B, T), ``terminated`` bool (B, T), ``frames`` uint8 (B, T, H, W, C) if
    asked, and every extra array as (B, T, ...).
    """

    stream = WINDOWS

    def __init__(self, episodes: Episodes, ids: np.ndarray, length: int, batch: int, seed: int = 0,
                 drop_terminal_frame: bool = True, rank: int = 0, world_size: int = 1,
                 with_frames: bool = False, extra: Mapping[str, np.ndarray] | None = None,
                 shortest: int | None = None) -> None:
        super().__init__(episodes, ids, batch, seed, rank, world_size, with_frames, extra)
        shortest = length if shortest is None else shortest
        if not 1 <= shortest <= length:
            raise ConfigError("impossible window", given=f"length {length}, shortest {shortest}",
                              expected="1 <= shortest <= length rows",
                              fix="ask for at least one row")
        usable = episodes.lengths[self.ids] + 1
        if drop_terminal_frame:
            last = episodes.starts[self.ids] + episodes.lengths[self.ids]
            usable = usable - episodes.take("terminated", last)
        self.length, self.longest = length, int(usable.max())
        self._last = np.zeros(len(episodes), np.int64)  # last usable row of each episode
        self._last[self.ids] = episodes.starts[self.ids] + usable - 1
        places = np.where(usable >= shortest, np.maximum(usable - length + 1, 1), 0)
        self._count(places, f"{shortest} usable rows")

    def __call__(self, iteration: int) -> dict[str, np.ndarray]:
        """The batch of this iteration."""
        episode, offset = self._draw(iteration)
        start = self.episodes.starts[episode]
        rows = (start + offset)[:, None] + np.arange(self.length)
        last = self._last[episode][:, None]
        valid, rows = rows <= last, np.minimum(rows, last)
        out = {k: self.episodes.take(k, rows) for k in ("actions", "rewards", "terminated")}
        null = rows == start[:, None]
        return {"rows": rows, "null": null, "valid": valid, **out, **self._images(rows)}


class OutcomeSampler(_Sampler):
    """Random transitions row t -> t+1 with the K rows up to t; every transition equally likely.

    Args as for ``ChunkSampler``; ``past`` is K. The row arrived at is never read as an image, so a
    black last frame does no harm.

    ``sampler(iteration)`` returns ``rows`` int64 (B, K; ascending, the last is t, row 0 of the
    episode repeated on the left when there are fewer than K), ``length`` int64 (B; different rows
    among the K), ``actions`` (B, ...), ``rewards`` float32 (B) and ``terminated`` bool (B) of row
    t+1, with ``ahead`` also ``soon`` int8 (B): 1 if the episode ended within that many steps from
    t, 0 if it went on for longer, -1 if the recording stops before, ``frames`` uint8
    (B, K, H, W, C) if asked, and every extra array as (B, K, ...).
    """

    stream = TRANSITIONS

    def __init__(self, episodes: Episodes, ids: np.ndarray, past: int, batch: int, seed: int = 0,
                 rank: int = 0, world_size: int = 1, with_frames: bool = False,
                 extra: Mapping[str, np.ndarray] | None = None, ahead: int = 0) -> None:
        super().__init__(episodes, ids, batch, seed, rank, world_size, with_frames, extra)
        if past < 1 or ahead < 0:
            raise ConfigError("impossible history", given=f"past {past}, ahead {ahead}",
                              expected="past >= 1 row, ahead >= 0 steps",
                              fix="ask for at least one row")
        self.past, self.ahead = past, ahead
        self._count(episodes.lengths[self.ids], "a step")

    def __call__(self, iteration: int) -> dict[str, np.ndarray]:
        """The batch of this iteration."""
        episode, offset = self._draw(iteration)
        start = self.episodes.starts[episode]
        back = np.arange(self.past - 1, -1, -1)
        rows = start[:, None] + np.maximum(offset[:, None] - back, 0)
        arrived = start + offset + 1
        out = {k: self.episodes.take(k, arrived) for k in ("actions", "rewards", "terminated")}
        length = np.minimum(offset + 1, self.past)
        if self.ahead:
            left = self.episodes.lengths[episode] - offset  # steps from t to the last row
            died = self.episodes.take("terminated", start + self.episodes.lengths[episode])
            soon = np.where(left >= self.ahead, 0, -1)
            out["soon"] = np.where(died & (left <= self.ahead), 1, soon).astype(np.int8)
        return {"rows": rows, "length": length, **out, **self._images(rows)}
