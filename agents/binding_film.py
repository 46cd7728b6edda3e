"""Four games side by side: the recording on the left, the dream on the right, the same actions.

Where a side holds a player is drawn as a ring in the player's colour: from the recording's
positions and from the model's own states. Shapes: F frame, H W pixels, N player slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from worldgym.agents.binding import Clips, Rolled, recorded
from worldgym.agents.video import panel, write
from worldgym.envs.party_games import COLOURS
from worldgym.errors import MissingDependencyError

GAMES = ("coins", "commons_harvest", "predator_prey", "stag_hunt")  # shown first, if there
MOMENTS = (0, 2, 4, 10, 20)  # of the picture
ENLARGE = 8  # of frames with cells of 4 pixels


def film(kept: Mapping[str, tuple[Clips, Rolled]], path: str | Path, fps: float = 3.0,
         row: int = 0) -> list[Path]:
    """Write a film (``path``) and a picture of some moments (``.png``) of clip ``row`` of at most
    four games; returns both paths."""
    names = [*(g for g in GAMES if g in kept), *(g for g in kept if g not in GAMES)][:4]
    strips = [_strip(name, *kept[name], row) for name in names]
    length = min(map(len, strips))
    frames = [_grid([strip[f] for strip in strips]) for f in range(length)]
    path = Path(path)
    write(path, [f for f in frames for _ in (0, 1)], 2 * fps)  # players dislike very low rates
    moments = [f for f in MOMENTS if f < length]
    picture = np.concatenate([np.concatenate([strip[f] for f in moments], 1)
                              for strip in strips], 0)
    still = path.with_suffix(".png")
    half = (picture.shape[1] // 2, picture.shape[0] // 2)
    cv2 = _opencv()
    small = cv2.resize(picture, half, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(still), np.ascontiguousarray(small[..., ::-1]),
                [cv2.IMWRITE_PNG_COMPRESSION, 9])
    return [path, still]


def _strip(name: str, clips: Clips, rolled: Rolled, row: int) -> list[np.ndarray]:
    """Recording and dream of every frame next to each other, labelled."""
    made = []
    for f in range(rolled.frames_BFHWC.shape[1]):
        sides = []
        for label, side in (("real", recorded(clips)), ("dream", rolled)):
            big = _drawn(side, clips, row, f)
            sides.append(panel(big, f"{name}  {label}  t={f}"))
        made.append(np.concatenate(sides, 1))
    return made


def _drawn(side: Rolled, clips: Clips, row: int, f: int) -> np.ndarray:
    """One frame, enlarged, with rings where the side holds its players."""
    cv2 = _opencv()
    frame = side.frames_BFHWC[row, f]
    scale = max(1, ENLARGE * 40 // frame.shape[1])
    big = np.ascontiguousarray(frame.repeat(scale, 0).repeat(scale, 1))
    if side.positions_BFN2 is None:
        return big
    for n in np.flatnonzero(clips.valid_BN[row]):
        if side.alive_BFN is not None and not side.alive_BFN[row, f, n]:
            continue
        size = np.array([big.shape[1], big.shape[0]])
        at = tuple(int(v) for v in (side.positions_BFN2[row, f, n] + 1) / 2 * size)
        cv2.circle(big, at, scale * 2, (255, 255, 255), 3, cv2.LINE_AA)
        cv2.circle(big, at, scale * 2, COLOURS[n % len(COLOURS)], 2, cv2.LINE_AA)
    return big


def _grid(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Two panels a row; an odd one stays alone."""
    rows = []
    for i in range(0, len(panels), 2):
        pair = list(panels[i:i + 2])
        if len(pair) == 1 and len(panels) > 1:
            pair.append(np.zeros_like(pair[0]))
        rows.append(np.concatenate(pair, 1))
    return np.concatenate(rows, 0)


def _opencv():  # type: ignore[no-untyped-def]
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError("drawing needs OpenCV", given="no module cv2",
                                     expected="opencv-python-headless",
                                     fix="pip install 'worldgym[rl]'") from error
    return cv2
