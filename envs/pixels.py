"""Pictures of real games: their sizes, their rows, and how they are shrunk.

Shapes: H W frame pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.errors import ConfigError, DatasetError, MissingDependencyError
from worldgym.extras import need


def resize(image: np.ndarray, frame_hw: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3) to a new array (H, W, 3): area average to shrink, linear to enlarge."""
    cv2 = load_cv2()
    height, width = frame_hw
    if image.shape[:2] == (height, width):
        return image.copy()
    grows = height > image.shape[0] or width > image.shape[1]
    how = cv2.INTER_LINEAR if grows else cv2.INTER_AREA
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=how)


def read_picture(image: Any) -> Any:
    """A picture given as a path as uint8 (H, W, 3); anything else as it is.

    Raises:
        DatasetError: the file cannot be read.
    """
    if not isinstance(image, str | Path):
        return image
    pictures = need("PIL.Image", "reading pictures", "wan")
    try:
        with pictures.open(image) as picture:
            return np.array(picture.convert("RGB"))
    except OSError as error:
        raise DatasetError("picture cannot be read", given=f"{image} ({error})",
                           expected="a picture file", fix="check the path") from error


def load_cv2() -> Any:
    """OpenCV on one thread, or MissingDependencyError."""
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            "resizing frames needs OpenCV", given="no module cv2", expected="opencv installed",
            fix="pip install 'worldgym[rl]'") from error
    cv2.setNumThreads(1)  # frames are tiny: threads cost more than they give
    return cv2


def check_rows(rows: Sequence[int]) -> tuple[int, int]:
    """(first row, one after the last) as ints, checked."""
    first, stop = (int(v) for v in rows)
    if not 0 <= first < stop:
        raise ConfigError("impossible rows", given=tuple(rows), expected="0 <= first < stop",
                          fix="for example (31, 95)")
    return first, stop


def check_hw(frame_hw: Sequence[int]) -> tuple[int, int]:
    """(height, width) as ints, checked."""
    sizes = tuple(int(v) for v in frame_hw)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ConfigError("impossible frame size", given=frame_hw,
                          expected="(height, width), both >= 1", fix="for example (48, 80)")
    return sizes  # type: ignore[return-value]
