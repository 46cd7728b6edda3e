"""Pairs of recorded frames, one step apart, for tile classifiers.

Legend: B pair, F = 2 frames (before, after), H W pixels, N player slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from worldgym.data.party import halved
from worldgym.data.store import Episodes
from worldgym.envs.party_games import CELLS_HW
from worldgym.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pairs:
    """``cells_BFN2`` (x, y) on the frame's grid and ``facing_BFN`` (0 N 1 E 2 S 3 W), 0 where
    nobody is; ``alive_BFN``: on the map; ``actions_BN`` led from before to after."""

    before_BHWC: np.ndarray
    after_BHWC: np.ndarray
    cells_BFN2: np.ndarray
    facing_BFN: np.ndarray
    alive_BFN: np.ndarray
    actions_BN: np.ndarray
    valid_BN: np.ndarray
    episode_B: np.ndarray

    def __len__(self) -> int:
        return len(self.episode_B)

    def rows(self, index: np.ndarray) -> Pairs:
        """Some of the pairs."""
        return Pairs(*(getattr(self, f.name)[index] for f in fields(self)))

    def mates(self, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each pair of ``index`` a random pair of the same episode."""
        episode = self.episode_B[index]  # ascending over all pairs: draw_pairs sorts
        low = np.searchsorted(self.episode_B, episode, "left")
        high = np.searchsorted(self.episode_B, episode, "right")
        return low + (rng.random(len(low)) * (high - low)).astype(np.int64)


def cells_of(positions_X2: np.ndarray) -> np.ndarray:
    """Cells (x, y) int64 of positions over the frame in [-1, 1]; nan: the first cell."""
    size = np.array(CELLS_HW[::-1])
    at = (np.nan_to_num(np.asarray(positions_X2, np.float64), nan=-1.0) + 1) / 2 * size
    return np.clip(np.floor(at), 0, size - 1).astype(np.int64)


def in_size(frames_BHWC: np.ndarray, cell_px: int) -> np.ndarray:
    """Recorded frames with cells of ``cell_px`` pixels: as they are, or halved."""
    have = frames_BHWC.shape[-3] // CELLS_HW[0]
    if have == cell_px:
        return frames_BHWC
    if have == 2 * cell_px:
        return halved(frames_BHWC)
    raise ConfigError("frames have another size", given=f"cells of {have} px",
                      expected=f"cells of {cell_px} or {2 * cell_px} px",
                      fix="record with --cell-px 8, or choose the size that was recorded")


def draw_pairs(store: Episodes, ids: Sequence[int] | np.ndarray, count: int,
               rng: np.random.Generator, cell_px: int) -> Pairs:
    """At most ``count`` random steps of these episodes, in the order of the recording."""
    ids = np.sort(np.asarray(ids, np.int64))
    lengths = store.lengths[ids]
    ends = np.cumsum(lengths)
    pick = np.sort(rng.choice(int(ends[-1]), min(count, int(ends[-1])), replace=False))
    which = np.searchsorted(ends, pick, side="right")
    rows = store.starts[ids[which]] + pick - (ends[which] - lengths[which])
    both = np.stack([rows, rows + 1], 1)
    before, after = (in_size(store.take("frames", r), cell_px) for r in both.T)
    alive = store.take("info_alive", both)
    return Pairs(before, after, cells_of(store.take("info_position", both)),
                 np.maximum(store.take("info_orientation", both), 0).astype(np.int64), alive,
                 store.take("actions", rows + 1).astype(np.int64),
                 store.take("info_valid", rows), ids[which])
