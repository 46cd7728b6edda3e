"""What a player sees: the shared frame, its own crop of it, its own position, or latents.

The same for dreams and real games. Legend: B slots, P players, R rows (slot, player), H W frame
pixels, S crop pixels, k stacked frames; cells are those of ``party_games.CELLS_HW``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from worldgym.data.party import halved
from worldgym.envs.party_games import CELLS_HW
from worldgym.errors import ConfigError

KINDS = ("frame", "crop", "position", "latent")


@dataclass(frozen=True, kw_only=True, slots=True)
class Players:
    """Where the players of B slots are, as the model (or the real game) tells.

    ``position_BP2`` float32 in [-1, 1] (x, y over the frame); ``orientation_BP`` 0 N 1 E 2 S 3 W,
    None where the model does not know; ``alive_BP``: on the map; ``ended_BP``: out for good.
    """

    position_BP2: np.ndarray
    orientation_BP: np.ndarray | None
    alive_BP: np.ndarray
    ended_BP: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyView:
    """What each player is shown.

    ``observation``: "frame" (the shared frame), "crop" (a square of the frame with the player in
    its middle, turned so that the player looks up where the model knows facings), "position" (own
    x, y in [-1, 1]), "latent" (the world's latents), or several of them, as a Dict;
    ``frame_stack``: newest frames side by side, all cropped where the player is now;
    ``crop_cells``: side of a crop, an odd number of cells; ``cell_px``: pixels of a cell in crops,
    None: as in the frame, or half of that.
    """

    observation: str | tuple[str, ...] = "frame"
    frame_stack: int = 1
    crop_cells: int = 11
    cell_px: int | None = None

    def __post_init__(self) -> None:
        kinds = self.kinds
        mixed = "latent" in kinds and ("frame" in kinds or "crop" in kinds)
        if not kinds or set(kinds) - set(KINDS) or len(set(kinds)) < len(kinds) or mixed:
            raise ConfigError("unknown observation", given=repr(self.observation),
                              expected=f"one of {KINDS}, or several (frames or latents, not both)",
                              fix='pass observation="frame"')
        if self.crop_cells < 1 or self.crop_cells % 2 == 0:
            raise ConfigError("impossible crop", given=self.crop_cells,
                              expected="an odd number of cells", fix="pass crop_cells=11")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What an observation consists of."""
        return (self.observation,) if isinstance(self.observation, str) else tuple(
            self.observation)

    @property
    def shared(self) -> str:
        """What the slot must keep: frames, or latents only (nothing is decoded)."""
        return "frame" if {"frame", "crop"} & set(self.kinds) else "latent"

    def scale(self, frame_hw: tuple[int, int]) -> tuple[int, bool]:
        """Pixels of a cell in crops, and whether frames are halved for them."""
        native = frame_hw[0] // CELLS_HW[0]
        if self.cell_px not in (None, native) and 2 * (self.cell_px or 0) != native:
            raise ConfigError("impossible size of cells", given=self.cell_px,
                              expected=f"{native}, or {native // 2}", fix="leave cell_px out")
        return self.cell_px or native, self.cell_px not in (None, native)

    def space(self, frame_hw: tuple[int, int], latent_chw: tuple[int, int, int]) -> spaces.Space:
        """The space of one player's observation."""
        k, side = self.frame_stack, self.crop_cells * self.scale(frame_hw)[0]
        c, h, w = latent_chw
        limit = np.finfo(np.float32).max
        every: dict[str, spaces.Space] = {
            "frame": spaces.Box(0, 255, (*frame_hw, 3 * k), np.uint8),
            "crop": spaces.Box(0, 255, (side, side, 3 * k), np.uint8),
            "position": spaces.Box(-1, 1, (2,), np.float32),
            "latent": spaces.Box(-limit, limit, (c * k, h, w), np.float32)}
        if isinstance(self.observation, str):
            return every[self.observation]
        return spaces.Dict({kind: every[kind] for kind in self.kinds})

    def observe(self, stack_B: np.ndarray, players: Players) -> Any:
        """Observations (B, P, ...) of everybody, fresh arrays; a dict of them for several kinds."""
        made: dict[str, np.ndarray] = {}
        b, p = players.alive_BP.shape
        for kind in self.kinds:
            if kind == "position":
                made[kind] = players.position_BP2.copy()
            elif kind == "crop":
                px, half = self.scale(stack_B.shape[1:3])  # type: ignore[arg-type]
                facing = players.orientation_BP
                rows = crops(_halved(stack_B) if half else stack_B, np.repeat(np.arange(b), p),
                             players.position_BP2.reshape(-1, 2),
                             None if facing is None else facing.ravel(), self.crop_cells * px)
                made[kind] = rows.reshape(b, p, *rows.shape[1:])
            else:
                made[kind] = np.repeat(stack_B[:, None], p, 1)
        return made[self.observation] if isinstance(self.observation, str) else made


def _halved(stack_BHWK: np.ndarray) -> np.ndarray:
    """Stacked frames at half the size."""
    return halved(stack_BHWK) if stack_BHWK.shape[-1] == 3 else np.concatenate(
        [halved(stack_BHWK[..., i:i + 3]) for i in range(0, stack_BHWK.shape[-1], 3)], -1)


def crops(frames_BHWK: np.ndarray, slot_R: np.ndarray, position_R2: np.ndarray,
          orientation_R: np.ndarray | None, side: int) -> np.ndarray:
    """Squares (R, side, side, K) around positions in [-1, 1], black beyond the frame.

    With ``orientation_R`` they are turned so that what the player faces is up.
    """
    _, height, width, _ = frames_BHWK.shape
    padded = np.pad(frames_BHWK, ((0, 0), (side, side), (side, side), (0, 0)))
    where = np.clip(np.asarray(position_R2, np.float64), -1, 1)
    first = np.round((where + 1) / 2 * (width, height) - side / 2).astype(np.int64) + side
    out = np.empty((len(slot_R), side, side, frames_BHWK.shape[3]), frames_BHWK.dtype)
    for row, (slot, (x, y)) in enumerate(zip(slot_R, first, strict=True)):
        out[row] = padded[slot, y:y + side, x:x + side]
    if orientation_R is not None:
        for turns in (1, 2, 3):  # facing east, the right side comes up: counterclockwise
            rows = orientation_R == turns
            if rows.any():
                out[rows] = np.rot90(out[rows], turns, (1, 2))
    return out
