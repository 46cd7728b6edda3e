"""Controller actions of WHAM: 12 buttons and 4 sticks, as bins, real values and ids (section 4).

Shapes: any leading dimensions, then 16 numbers. *Bins*: buttons 0 or 1, sticks 0..10; *world*
values: buttons 0 or 1, sticks in [-1, 1]; *local ids*: 0..67 without the offset of the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec, part_of
from worldgym.errors import ActionError, ShapeError

BUTTONS, STICKS, BINS = 12, 4, 11
COUNT = BUTTONS + STICKS
PRESSED = BUTTONS - 1  # buttons of a controller; number 0 says that none is pressed
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


def from_controller(action: Any) -> np.ndarray:
    """Bins int64 (..., 16) of {"buttons": (..., 11), "sticks": (..., 4) in [-1, 1]}.

    Raises:
        ActionError, ShapeError: the parts are missing, do not fit, or lie outside their spaces.
    """
    if not isinstance(action, Mapping) or set(action) != {"buttons", "sticks"}:
        given = sorted(map(str, action)) if isinstance(action, Mapping) else type(action).__name__
        raise ActionError("not a controller's action", given=given,
                          expected='{"buttons": 11 of 0 or 1, "sticks": 4 in [-1, 1]}',
                          fix="sample from env.action_space")
    parts = []
    for name, count, low in (("buttons", PRESSED, 0), ("sticks", STICKS, -1)):
        part = part_of(name, action[name], count)
        whole = name == "sticks" or np.isin(part, (0, 1)).all()
        if not whole or not ((part >= low) & (part <= 1)).all():
            raise ActionError(f"{name} outside their space", given=part.ravel()[:8].tolist(),
                              expected="0 or 1" if name == "buttons" else "-1 to 1",
                              fix="clip the policy's output")
        parts.append(part)
    if parts[0].shape[:-1] != parts[1].shape[:-1]:
        raise ShapeError("parts of an action differ in shape", given=[p.shape for p in parts],
                         expected="the same leading axes", fix="sample from env.action_space")
    flag = np.zeros((*parts[0].shape[:-1], 1))
    return bins(np.concatenate([flag, *parts], -1), derive_flag=True)


def to_controller(bins_: np.ndarray) -> dict[str, np.ndarray]:
    """Inverse of ``from_controller``, up to the width of a stick's bins."""
    world = world_values(bins_)
    return {"buttons": world[..., 1:BUTTONS].astype(np.int8),
            "sticks": world[..., BUTTONS:]}


def flagged(bins_: Any) -> Any:
    """Bins with number 0 set from the other buttons, as the data has it; nonsense stays."""
    try:
        array = np.asarray(bins_)
    except ValueError:  # ragged
        return bins_
    if array.dtype.kind not in "iufb" or array.shape[-1:] != (COUNT,):
        return bins_
    flag = array[..., 0].copy()
    known = (flag == 0) | (flag == 1)
    none = ~array[..., 1:BUTTONS].astype(bool).any(-1)
    out = array.copy()
    out[..., 0] = np.where(known, none, flag)
    return out


def _sixteen(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim < 1 or array.shape[-1] != COUNT or array.dtype.kind not in "iufb":
        raise ShapeError("action has the wrong shape", given=f"{array.dtype} {array.shape}",
                         expected=f"(..., {COUNT}) numbers: {BUTTONS} buttons and {STICKS} sticks",
                         fix="give 12 buttons, then left stick X and Y, right stick X and Y")
    return array
