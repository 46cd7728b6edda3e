"""Arrays of few different vectors, stored as those vectors and which is where.

Recordings of games of tiles show the same squares over and over, players stand in the same places:
start states of such a game take a tenth of the room this way, to the bit.
Shapes: D different vectors, C numbers of a vector, M vectors in all.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from worldgym.errors import CheckpointError

MOST = 1 << 15  # different vectors, int16 numbers
VALUES, ROWS = ".values", ".rows"


def pack(name: str, array: Tensor) -> dict[str, Tensor]:
    """``array`` (..., C) as ``name.values`` (D, C) and ``name.rows`` (...) int16; or as it is,
    under its own name, where that would not halve its room."""
    flat = array.contiguous().flatten(0, -2).numpy()
    vectors = np.ascontiguousarray(flat).view(np.dtype((np.void, flat.itemsize * flat.shape[1])))
    few = vectors[:: max(1, len(vectors) // MOST)]  # some first: sorting all of them takes long
    if len(few) and len(np.unique(few)) * 2 <= len(few):
        _, first, number = np.unique(vectors[:, 0], return_index=True, return_inverse=True)
        values, rows = flat[first], number.astype(np.int16)
        if len(values) <= MOST and 2 * (values.nbytes + rows.nbytes) <= flat.nbytes:
            return {name + VALUES: torch.from_numpy(values.copy()),
                    name + ROWS: torch.from_numpy(rows).view(array.shape[:-1])}
    return {name: array}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``pack`` for all tensors of a file; those that are not packed stay.

    Raises:
        CheckpointError: a part is missing, or numbers point at no vector.
    """
    packed = {k.removesuffix(VALUES).removesuffix(ROWS) for k in tensors} - set(tensors)
    out = {k: v for k, v in tensors.items() if not k.endswith((VALUES, ROWS))}
    for name in packed | {k for k in out if {k + VALUES, k + ROWS} & set(tensors)}:
        values, rows = tensors.get(name + VALUES), tensors.get(name + ROWS)
        if values is None or rows is None or values.ndim != 2 or rows.dtype != torch.int16 or (
                name in out) or (rows.numel() and not (
                    0 <= int(rows.min()) and int(rows.max()) < len(values))):
            raise CheckpointError(
                "packed tensor does not fit together", given=name,
                expected=f"{name}{VALUES} (D, C) and {name}{ROWS}, int16 below D",
                fix="write the file again")
        out[name] = values[rows.long()]
    return out


def squares(frames_VHWC: Tensor, grid_hw: Sequence[int]) -> Tensor | None:
    """Frames as squares, one to a cell of the grid: (V, h, w, side * side * channels); None where
    no such squares fill them."""
    v, height, width, c = frames_VHWC.shape
    (h, w), side = grid_hw, height // max(1, grid_hw[0])
    if side < 2 or (h * side, w * side) != (height, width):
        return None
    parts = frames_VHWC.view(v, h, side, w, side, c).transpose(2, 3)
    return parts.reshape(v, h, w, side * side * c)


def whole(squares_VhwP: Tensor, channels: int = 3) -> Tensor:
    """Inverse of ``squares``: frames (V, h * side, w * side, channels).

    Raises:
        CheckpointError: these are no squares.
    """
    v, h, w, size = (*squares_VhwP.shape, 0, 0, 0, 0)[:4]
    side = math.isqrt(size // channels)
    if squares_VhwP.ndim != 4 or side ** 2 * channels != size:
        raise CheckpointError("packed frames are no squares", given=tuple(squares_VhwP.shape),
                              expected=f"(V, h, w, side * side * {channels})",
                              fix="write the file again")
    parts = squares_VhwP.view(v, h, w, side, side, channels).transpose(2, 3)
    return parts.reshape(v, h * side, w * side, channels)
