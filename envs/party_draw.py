"""A picture of a party: the frame, where the model says everyone is, and what everyone did.

Shapes: H W frame pixels, P players. Drawn with arrays alone; no drawing library is needed.
"""

from __future__ import annotations

import numpy as np

from worldgym.envs.party_games import CELLS_HW, COLOURS

CELL = 48  # pixels of a cell in the picture
GLYPHS = {  # 7 x 7: the action, seen from the player (up is forward)
    0: ("       ", "       ", "       ", "   #   ", "       ", "       ", "       "),
    1: ("   #   ", "  ###  ", " ##### ", "   #   ", "   #   ", "   #   ", "   #   "),
    2: ("   #   ", "   #   ", "   #   ", "   #   ", " ##### ", "  ###  ", "   #   "),
    3: ("       ", "  #    ", " ##    ", "#######", " ##    ", "  #    ", "       "),
    4: ("       ", "    #  ", "    ## ", "#######", "    ## ", "    #  ", "       "),
    5: (" #     ", "####   ", " #  #  ", "    #  ", "    #  ", "    #  ", "  ##   "),
    6: ("     # ", "   ####", "  #  # ", "  #    ", "  #    ", "  #    ", "   ##  "),
    7: ("   #   ", " # # # ", "  ###  ", "#######", "  ###  ", " # # # ", "   #   "),
}


def picture(frame_HWC: np.ndarray, position_P2: np.ndarray | None = None,
            orientation_P: np.ndarray | None = None, alive_P: np.ndarray | None = None,
            actions_P: np.ndarray | None = None) -> np.ndarray:
    """The frame with cells of 48 pixels, uint8; with positions, what is said of every player.

    A box in the player's colour where it is said to stand, a bar on the side that it faces, and in
    the box's corner what it did. Players that are not alive are left out; action -1: none.
    """
    scale = max(1, CELL * CELLS_HW[0] // frame_HWC.shape[0])
    out = frame_HWC.repeat(scale, 0).repeat(scale, 1)
    if position_P2 is None:
        return out
    height, width = out.shape[:2]
    for i, (x, y) in enumerate(np.asarray(position_P2, np.float64)):
        if alive_P is not None and not alive_P[i]:
            continue
        colour = COLOURS[i % len(COLOURS)]
        left = int(round((x + 1) / 2 * width)) - CELL // 2
        top = int(round((y + 1) / 2 * height)) - CELL // 2
        for box in ((top, left, 3, CELL), (top + CELL - 3, left, 3, CELL), (top, left, CELL, 3),
                    (top, left + CELL - 3, CELL, 3)):
            _fill(out, *box, colour)
        if orientation_P is not None:
            side = int(orientation_P[i])
            bar = ((0, 14, 8, 20), (14, CELL - 8, 20, 8), (CELL - 8, 14, 8, 20), (14, 0, 20, 8))
            t, f, h, w = bar[side]
            _fill(out, top + t, left + f, h, w, colour)
        if actions_P is not None and int(actions_P[i]) in GLYPHS:
            _fill(out, top + CELL - 21, left + CELL - 21, 18, 18, (0, 0, 0))
            for row, line in enumerate(GLYPHS[int(actions_P[i])]):
                for column, char in enumerate(line):
                    if char == "#":
                        _fill(out, top + CELL - 19 + 2 * row, left + CELL - 19 + 2 * column, 2, 2,
                              (255, 255, 255))
    return out


def _fill(out: np.ndarray, top: int, left: int, height: int, width: int,
          colour: tuple[int, int, int]) -> None:
    """A rectangle, cut at the border."""
    out[max(0, top):max(0, top + height), max(0, left):max(0, left + width)] = colour
