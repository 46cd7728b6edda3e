"""What a player of a mini-map game sees: the frame, where everyone stands and faces, the map.

The same for the real game and for a dream. Cells are (x, y) on the map; N players, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from worldgym.envs.party_games import CELLS_HW, PartyGame

Cell = tuple[int, int]
TOLERANCE = 24  # largest difference of a colour channel at which two colours are the same


@dataclass(frozen=True)
class Scene:
    """What the players see: ``frame`` (H, W, 3) uint8, ``cells_N2``, ``orientation_N``,
    ``alive_N``, and the ``roles`` of the game; ``position_N2``: exactly where a dream says that
    players stand, in [-1, 1] over the frame."""

    game: PartyGame
    frame: np.ndarray
    cells_N2: np.ndarray
    orientation_N: np.ndarray
    alive_N: np.ndarray
    position_N2: np.ndarray | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """One role per player."""
        return self.game.role_of(len(self.alive_N)) or ("default",) * len(self.alive_N)

    def cell(self, i: int) -> Cell:
        """Where player ``i`` stands."""
        return int(self.cells_N2[i, 0]), int(self.cells_N2[i, 1])

    def others(self, i: int) -> list[int]:
        """The other players on the map."""
        return [int(j) for j in np.flatnonzero(self.alive_N) if j != i]

    @cached_property
    def centres(self) -> np.ndarray:
        """Mean colour of the middle of every map cell, float (rows, columns, 3)."""
        px = self.frame.shape[0] // CELLS_HW[0]
        (x, y), (rows, columns) = self.game.offset_cells, self.game.cells_hw
        part = self.frame[y * px:(y + rows) * px, x * px:(x + columns) * px]
        tiles = part.reshape(rows, px, columns, px, 3)
        middle = tiles[:, px // 4:px - px // 4, :, px // 4:px - px // 4]
        return middle.mean((1, 3))

    @cached_property
    def _apart(self) -> np.ndarray:
        """Distance of every cell's colour from every pickup's, (rows, columns, pickups)."""
        wanted = np.array(self.game.pickups, float)
        return np.abs(self.centres[:, :, None] - wanted).max(-1)

    def pickups(self, i: int) -> list[Cell]:
        """Cells that show something player ``i`` is paid for, by colour."""
        if not self.game.pickups:
            return []
        centres, wanted = self.centres, np.array(self.game.pickups, float)
        apart = self._apart
        seen = apart.min(-1) <= TOLERANCE
        if self.game.own_colour:  # only what has the hue of the player
            x, y = self.cell(i)
            own = centres[y, x] / (np.linalg.norm(centres[y, x]) + 1e-6)
            hue = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
            seen &= apart.argmin(-1) == int((hue @ own).argmax())
        taken = {self.cell(j) for j in self.others(i)}
        return [(int(x), int(y)) for y, x in np.argwhere(seen) if (int(x), int(y)) not in taken]

    def walkable(self, i: int) -> frozenset[Cell]:
        """Cells free of walls and of other players."""
        return open_cells(self.game.rows, self.game.solid) - {
            self.cell(j) for j in self.others(i)}


@lru_cache(maxsize=64)
def open_cells(rows: tuple[str, ...], solid: str) -> frozenset[Cell]:
    """Cells of a map without walls."""
    return frozenset((x, y) for y, row in enumerate(rows) for x, char in enumerate(row)
                     if char not in solid)


def positions(cells_N2: np.ndarray, game: PartyGame) -> np.ndarray:
    """Cells (..., 2) of a map as centres over the frame: 2 (offset + cell + 1/2) / size - 1."""
    size = np.array(CELLS_HW[::-1], np.float64)
    return (2 * (cells_N2 + np.array(game.offset_cells) + 0.5) / size - 1).astype(np.float32)


def cells(positions_N2: np.ndarray, game: PartyGame) -> np.ndarray:
    """Inverse of ``positions``, rounded to the nearest cell: int64."""
    size = np.array(CELLS_HW[::-1], np.float64)
    exact = (np.asarray(positions_N2, np.float64) + 1) / 2 * size - 0.5
    return np.round(exact - np.array(game.offset_cells)).astype(np.int64)
