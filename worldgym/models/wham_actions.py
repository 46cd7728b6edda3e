"""Controller actions of WHAM: 12 buttons and 4 sticks, as bins, real values and ids (section 4).

Shapes: any leading dimensions, then 16 numbers. *Bins*: buttons 0 or 1, sticks 0..10; *world*
values: buttons 0 or 1, sticks in [-1, 1]; *local ids*: 0..67 without the offset of the vocabulary.
"""

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.errors import ActionError, ShapeError

BUTTONS, STICKS, BINS = 12, 4, 11
COUNT = BUTTONS + STICKS
VOCABULARY = 2 * BUTTONS + BINS * STICKS
NAMES = ("no button", "right trigger", "A", "left trigger", "D-pad right", "X", "right bumper", "Y",
         "B", "left bumper", "right stick click", "D-pad down", "left stick X", "left stick Y",
         "right stick X", "right stick Y")
EDGES = np.array([-1.05, -.95, -.75, -.5, -.25, -.05, .05, .25, .5, .75, .95, 1.05])
MIDDLES = np.array([-1, -.85, -.625, -.375, -.15, 0, .15, .375, .625, .85, 1])
OFFSETS = np.array([2 * i for i in range(BUTTONS)]
                   + [2 * BUTTONS + BINS * j for j in range(STICKS)])
SIZES = (2,) * BUTTONS + (BINS,) * STICKS
# inclusive range of local ids of every position
RANGES = tuple((int(o), int(o) + n - 1) for o, n in zip(OFFSETS, SIZES, strict=True))
NEUTRAL = np.array([1] + [0] * (BUTTONS - 1) + [BINS // 2] * STICKS)  # nothing pressed
SPEC = ActionSpec(kind="multi_discrete", shape=(COUNT,), sizes=SIZES)


def stick_bins(values: np.ndarray) -> np.ndarray:
    """Bins of stick values, half-open and in float64; -1 and 11 lie outside [-1.05, 1.05)."""
    return np.searchsorted(EDGES, np.asarray(values, np.float64), side="right") - 1


def bins(world: np.ndarray, derive_flag: bool = False) -> np.ndarray:
    """Bins int64 of world values; sticks are clipped to [-1, 1] first.

    ``derive_flag``: set number 0 ("no button") from the other buttons, as the recorded data has it.
    """
    world = _sixteen(world)
    sticks = stick_bins(world[..., BUTTONS:].astype(np.float64).clip(-1, 1))
    out = np.concatenate([world[..., :BUTTONS].astype(np.int64), sticks], -1)
    if derive_flag:
        out[..., 0] = ~out[..., 1:BUTTONS].any(-1)
    return out


def world_values(bins_: np.ndarray) -> np.ndarray:
    """World values float32 of bins: the middle of each stick bin."""
    bins_ = check(bins_)
    sticks = MIDDLES[bins_[..., BUTTONS:].astype(np.int64)]
    return np.concatenate([bins_[..., :BUTTONS], sticks], -1).astype(np.float32)


def ids(bins_: np.ndarray) -> np.ndarray:
    """Local ids int64 of bins; fractions are cut off."""
    return np.floor(check(bins_).astype(np.float64) + OFFSETS).astype(np.int64)


def from_ids(local: np.ndarray) -> np.ndarray:
    """Bins int64 of local ids."""
    return _sixteen(local) - OFFSETS


def check(bins_: np.ndarray) -> np.ndarray:
    """Return bins as an array, or raise a named error."""
    array = _sixteen(bins_)
    bad = ~((array >= 0) & (array <= np.array(SIZES) - 1))
    if bad.any():
        where = np.argwhere(bad)[0]
        raise ActionError(f"action outside its space: {NAMES[where[-1]]}",
                          given=array[tuple(where)], expected=f"0 to {SIZES[where[-1]] - 1}",
                          fix="give bins; wham_actions.bins makes them from stick values")
    return array


def _sixteen(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim < 1 or array.shape[-1] != COUNT or array.dtype.kind not in "iufb":
        raise ShapeError("action has the wrong shape", given=f"{array.dtype} {array.shape}",
                         expected=f"(..., {COUNT}) numbers: {BUTTONS} buttons and {STICKS} sticks",
                         fix="give 12 buttons, then left stick X and Y, right stick X and Y")
    return array
