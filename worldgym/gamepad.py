"""Recorded gamepad actions: parquet files with one row per raw frame (specs/scope.md section 10).

Shapes: N raw frame. Buttons (N, 6): fire, aim, jump, melee, reload, switch weapon. Sticks (N, 4):
move x, move y, camera x, camera y in [-1, 1]; x below 0 is left, **y below 0 is forward** (the
stick pushed up) and, for the camera, up. Values are used as they are: no dead zone, no clipping.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.errors import ActionError, DatasetError, ShapeError
from worldgym.extras import need

BUTTONS = {"right_trigger": "fire", "left_trigger": "aim", "south": "jump",
           "right_thumb": "melee", "west": "reload", "north": "switch weapon"}
STICKS = {"j_left": "move", "j_right": "camera"}


@dataclass(frozen=True, slots=True)
class Gamepad:
    """Buttons (N, 6) and sticks (N, 4), float32, one row per raw frame.

    >>> pad = Gamepad(np.zeros((5, 6), np.float32), np.zeros((5, 4), np.float32))
    >>> len(pad), len(pad.fit(5)), len(pad.fit(9, pad=True))
    (5, 5, 9)
    """

    buttons_N6: np.ndarray
    sticks_N4: np.ndarray

    def __post_init__(self) -> None:
        for name, width in (("buttons_N6", len(BUTTONS)), ("sticks_N4", 2 * len(STICKS))):
            rows = np.asarray(getattr(self, name), np.float32)
            if rows.ndim != 2 or rows.shape[1] != width or len(rows) != len(self.buttons_N6):
                raise ShapeError("gamepad rows have the wrong shape", given=f"{name} {rows.shape}",
                                 expected=f"(raw frames, {width}), as many rows as buttons",
                                 fix="give one row per raw frame")
            if not np.isfinite(rows).all():
                raise ActionError("gamepad value is not finite", given=f"{name} with NaN or inf",
                                  expected="finite numbers", fix="check the recording")
            object.__setattr__(self, name, rows)
        if not len(self.buttons_N6):
            raise ActionError("no action row", given=0, expected="one row per raw frame",
                              fix="record at least one frame")

    def check_range(self) -> "Gamepad":
        """Itself, or an ActionError if a stick or button lies where no gamepad puts it."""
        if np.abs(self.sticks_N4).max() > 1 + 1e-6 or (
                self.buttons_N6.min() < -1e-6 or self.buttons_N6.max() > 1 + 1e-6):
            raise ActionError(
                "gamepad value outside its range",
                given=f"sticks up to {np.abs(self.sticks_N4).max():.3g}, buttons "
                f"{self.buttons_N6.min():.3g} to {self.buttons_N6.max():.3g}",
                expected="sticks in [-1, 1], buttons in [0, 1]", fix="scale the recording")
        return self

    def __len__(self) -> int:
        return len(self.buttons_N6)

    def fit(self, frames: int, pad: bool = False) -> "Gamepad":
        """Rows for a clip of ``frames`` raw frames.

        The last row of a clip is never read, so ``frames - 1`` rows will do. With ``pad`` other
        lengths are accepted as the published reader does: the last row is repeated, rows too many
        are cut; without it they are an ActionError.
        """
        if not pad and len(self) not in (frames, frames - 1):
            raise ActionError(
                "action file and clip differ in length", given=f"{len(self)} rows",
                expected=f"{frames} rows (one per frame; the last is not read)",
                fix=f"use --frames {len(self)}, or --round to repeat the last row or cut the rest")
        index = np.minimum(np.arange(frames), len(self) - 1)
        return Gamepad(self.buttons_N6[index], self.sticks_N4[index])


def read_parquet(path: str | Path) -> Gamepad:
    """All rows of a file; columns are found by name, their order does not matter."""
    path = Path(path)
    pyarrow = need("pyarrow", "reading actions", "wan")
    parquet = need("pyarrow.parquet", "reading actions", "wan")
    if not path.is_file():
        raise DatasetError("action file is missing", given=path, expected="a parquet file",
                           fix="check the path")
    names = [*BUTTONS, *STICKS]
    try:
        held = parquet.read_schema(path).names
        lost = [name for name in names if name not in held]
        if lost:
            raise DatasetError("action file lacks columns", given=f"{path.name} without {lost}",
                               expected=f"columns {names}", fix="record all of them")
        table = parquet.read_table(path, columns=names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError("not a whole parquet file", given=f"{path} ({error})",
                           expected="one row per raw frame", fix="copy it again") from error
    if not len(table):
        raise ActionError("no action row", given=path, expected="one row per raw frame",
                          fix="record at least one frame")
    buttons = np.stack([_column(table, name, 1, path)[:, 0] for name in BUTTONS], 1)
    sticks = np.concatenate([_column(table, name, 2, path) for name in STICKS], 1)
    return Gamepad(buttons, sticks)


def _column(table: Any, name: str, width: int, path: Path) -> np.ndarray:
    try:
        rows = np.array(table.column(name).to_pylist(), np.float64).reshape(len(table), -1)
    except (ValueError, TypeError) as error:
        raise DatasetError("action column is not numeric", given=f"{path.name}: {name} ({error})",
                           expected="numbers, or lists of 2 numbers for a stick",
                           fix="record it again") from error
    if rows.shape[1] != width or not np.isfinite(rows).all():
        raise DatasetError("action column has holes or the wrong width",
                           given=f"{path.name}: {name} with {rows.shape[1]} values a row",
                           expected=f"{width} finite values in every row", fix="record it again")
    return rows.astype(np.float32)
