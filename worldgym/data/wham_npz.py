"""Episodes of WHAM's sample data set: one .npz per clip (specs/wham.md section 8).

Keys: ``images`` (N, 3, H, W) uint8 RGB, ``actions`` (N, 16) float32 bins, the action held while
that image is on screen, ``states`` (N, 56) float32, unused. Only the rows that are wanted are read.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from worldgym.errors import DatasetError, WorldGymError
from worldgym.models import wham_actions

STATES = 56


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames uint8 (N, H, W, 3) and bins int64 (N, 16) of the actions taken on them."""

    frames: np.ndarray
    actions: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)


def files(folder: str | Path) -> list[Path]:
    """All .npz files below a folder, sorted; or the file itself.

    Raises:
        DatasetError: there is none.
    """
    folder = Path(folder)
    found = [folder] if folder.is_file() else sorted(folder.rglob("*.npz"))
    if not found:
        raise DatasetError("no WHAM episodes", given=folder, expected="a folder with .npz files",
                           fix="check the path")
    return found


def measure(path: str | Path) -> tuple[int, tuple[int, int]]:
    """(frames, (height, width)) of a clip, from its headers alone.

    Raises:
        DatasetError: not such a file.
    """
    path = Path(path)

    def headers(archive: zipfile.ZipFile) -> tuple[int, tuple[int, int]]:
        told = {}
        for key in ("images", "actions"):
            with archive.open(f"{key}.npy") as file:
                told[key], _ = _header(path, key, file)
        count, _, height, width = told["images"]
        if told["actions"][0] != count:
            raise _odd(path, f"{count} images, {told['actions'][0]} actions", "one for each")
        return count, (height, width)

    return _inside(path, headers)


def read(path: str | Path, first: int = 0, count: int | None = None) -> Clip:
    """``count`` frames and actions from number ``first`` on (default: all).

    Raises:
        DatasetError: not such a file, or one that is too short.
    """
    path = Path(path)
    length, _ = measure(path)
    count = length - first if count is None else count
    if first < 0 or count < 1 or first + count > length:
        raise DatasetError("episode is too short", given=f"{path} with {length} frames",
                           expected=f"frames {first} to {first + count - 1}",
                           fix="take fewer frames, or leave this episode out")

    def rows(archive: zipfile.ZipFile) -> Clip:
        frames, actions = (_rows(archive, path, key, first, count) for key in ("images", "actions"))
        try:
            bins = np.floor(wham_actions.check(actions)).astype(np.int64)
        except WorldGymError as error:
            raise _odd(path, str(error), "actions as bins") from error
        return Clip(np.ascontiguousarray(frames.transpose(0, 2, 3, 1)), bins)

    return _inside(path, rows)


def write(path: str | Path, frames: np.ndarray, actions: np.ndarray,
          states: np.ndarray | None = None) -> Path:
    """Write an episode in the published layout, atomically.

    Args:
        frames: uint8 (N, H, W, 3).
        actions: bins (N, 16) of the actions taken on them.
        states: float32 (N, 56); default: all -1, as where nothing is known.

    Raises:
        DatasetError: they do not fit together.
    """
    path, frames, bins = Path(path), np.asarray(frames), wham_actions.check(actions)
    n = len(frames)
    known = np.full((n, STATES), -1) if states is None else np.asarray(states)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not n or (
            bins.shape != (n, wham_actions.COUNT) or known.shape != (n, STATES)):
        raise DatasetError("episode does not fit together", given=f"{frames.dtype} {frames.shape}, "
                           f"actions {bins.shape}, states {known.shape}",
                           expected=f"uint8 (N, H, W, 3), (N, {wham_actions.COUNT}), "
                           f"(N, {STATES})", fix="give one action for every frame")
    return save(path, images=np.ascontiguousarray(frames.transpose(0, 3, 1, 2)),
                actions=bins.astype(np.float32), states=known.astype(np.float32))


def save(path: str | Path, **arrays: Any) -> Path:
    """Write a .npz atomically."""
    path, held = Path(path), io.BytesIO()
    np.savez(held, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(held.getbuffer())
    part.replace(path)
    return path


def _inside(path: Path, use: Callable[[zipfile.ZipFile], Any]) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            return use(archive)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, WorldGymError):
            raise
        raise _odd(path, error, "a whole .npz with images and actions") from error


def _header(path: Path, key: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array whose bytes follow; nothing is unpickled."""
    version = np.lib.format.read_magic(file)
    read_header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                   else np.lib.format.read_array_header_2_0)
    shape, by_column, dtype = read_header(file)
    if key == "images":
        wrong = dtype != np.uint8 or len(shape) != 4 or shape[1] != 3
    else:
        wrong = dtype.kind not in "iuf" or len(shape) != 2 or shape[1] != wham_actions.COUNT
    if wrong or by_column or not shape[0]:
        raise _odd(path, f"{key} {dtype} {shape}",
                   f"images uint8 (N, 3, H, W), actions (N, {wham_actions.COUNT})")
    return shape, dtype


def _rows(archive: zipfile.ZipFile, path: Path, key: str, first: int, count: int) -> np.ndarray:
    with archive.open(f"{key}.npy") as file:
        shape, dtype = _header(path, key, file)
        row = int(np.prod(shape[1:])) * dtype.itemsize
        file.seek(first * row, io.SEEK_CUR)
        data = file.read(count * row)
    return np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _odd(path: Path, given: object, expected: str) -> DatasetError:
    return DatasetError("not a WHAM episode", given=f"{path}: {given}", expected=expected,
                        fix="give clips of the published sample data set, or write them with "
                        "wham_npz.write")
