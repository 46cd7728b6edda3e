"""Camera trajectories as text: pose strings and both JSON layouts (specs/worldplay.md section 8).

Shapes: N latent frame. What made the published code crash or go on with wrong numbers is a named
error here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldgym import camera
from worldgym.camera import DEFAULT_K, Thresholds, check_poses, inverse, labels_of, normalised
from worldgym.errors import ActionError, DatasetError, ShapeError

PICTURES = 4  # per latent frame after the first
LONGEST = 1_000_000  # latent frames of a pose string: days
KEYS = {"w": 9, "s": 18, "d": 27, "a": 36, "right": 1, "left": 2, "up": 3, "down": 4}
_OVERLAY = {"w": ("forward", 1), "s": ("forward", -1), "a": ("left", 1), "d": ("left", -1),
            "right": ("yaw", 1), "left": ("yaw", -1), "up": ("pitch", 1), "down": ("pitch", -1)}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Where the camera of every latent frame stands; the first is the start.

    ``c2w_N44``: poses; ``K_N33``: normalised intrinsics.
    """

    c2w_N44: np.ndarray
    K_N33: np.ndarray

    @classmethod
    def of(cls, c2w_N44: np.ndarray, K_33: np.ndarray = DEFAULT_K) -> "Trajectory":
        """Poses with pixel intrinsics, one matrix or one per frame."""
        c2w = check_poses(c2w_N44)
        K = np.asarray(K_33)
        if K.ndim == 3 and len(K) != len(c2w):
            raise ShapeError("poses and intrinsics differ in number",
                             given=f"{len(c2w)} and {len(K)}", expected="as many of each",
                             fix="give one K per pose, or one for all")
        return cls(c2w, np.broadcast_to(normalised(K), (len(c2w), 3, 3)).copy())

    def __len__(self) -> int:
        return len(self.c2w_N44)

    @property
    def w2c_N44(self) -> np.ndarray:
        """World to camera."""
        return inverse(self.c2w_N44)

    def labels(self, limits: Thresholds | None = None) -> np.ndarray:
        """Labels 0..80 (N,)."""
        return labels_of(self.c2w_N44, limits)

    def cut(self, latents: int) -> "Trajectory":
        """The first ``latents`` frames.

        Raises:
            ShapeError: there are fewer. The published code crashed, or with exactly one left
                repeated it in silence.
        """
        if len(self) < latents:
            raise ShapeError("trajectory is too short", given=f"{len(self)} poses",
                             expected=f"at least {latents}: one per latent frame, start included",
                             fix=f"add {latents - len(self)} motions, or make fewer chunks")
        return Trajectory(self.c2w_N44[:latents], self.K_N33[:latents])


def commands(text: str, published: bool = False) -> list[tuple[str, int]]:
    """Actions and their counts of a pose string.

    Args:
        text: comma-separated ``action-count``; action one of w s a d up down left right.
        published: cut counts to whole numbers as the published parser does, so that
            ``right-0.5`` says nothing. Else such a count is an error.

    >>> commands("w-3, right-1")
    [('w', 3), ('right', 1)]
    """
    if not isinstance(text, str):
        raise ActionError("pose string is not a text", given=type(text).__name__,
                          expected="a str", fix="write for instance 'w-4, right-2'")
    out, total = [], 0
    for part in filter(None, (p.strip() for p in text.split(","))):
        pieces = [p.strip() for p in part.split("-")]
        number = None
        if len(pieces) == 2 and pieces[0] in KEYS:
            try:
                number = float(pieces[1])
            except ValueError:
                number = None
        if number is None or not np.isfinite(number):
            raise ActionError("pose command cannot be read", given=repr(part),
                              expected=f"ACTION-COUNT with an action of {list(KEYS)}",
                              fix="write for instance 'w-4, right-2' (small letters)")
        if number != int(number) and not published:
            raise ActionError(
                "pose command with a broken count", given=repr(part),
                expected="a whole number of latent frames",
                fix="the published parser would cut it down"
                f" to {int(number)}: write that, or give motions for smaller steps")
        total += int(number)
        if total > LONGEST:
            raise ActionError("pose string is too long", given=repr(part),
                              expected=f"at most {LONGEST} latent frames", fix="mend the count")
        out.append((pieces[0], int(number)))
    return out


def from_string(text: str, K_33: np.ndarray = DEFAULT_K, published: bool = False) -> Trajectory:
    """Trajectory of a pose string: "w-4" has 5 poses."""
    labels = [KEYS[name] for name, count in commands(text, published) for _ in range(count)]
    motions = camera.motions_of(np.array(labels, np.int64))
    return Trajectory.of(camera.walk(motions), K_33)


def to_string(labels_N: np.ndarray) -> str:
    """Pose string of labels, the start's left out.

    >>> to_string(np.array([0, 9, 9, 1]))
    'w-2,right-1'
    """
    names = {number: name for name, number in KEYS.items()}
    runs: list[list] = []
    for number in np.asarray(labels_N)[1:].tolist():
        if number not in names:
            raise ActionError("label cannot be said in a pose string", given=number,
                              expected=f"one of {sorted(names)}: one key at a time",
                              fix="write a JSON trajectory instead (to_json)")
        if runs and runs[-1][0] == names[number]:
            runs[-1][1] += 1
        else:
            runs.append([names[number], 1])
    return ",".join(f"{name}-{count}" for name, count in runs)


def overlay(text: str, published: bool = False) -> list[dict[str, int]]:
    """What to draw over each picture: the keys held; the first command has one picture more."""
    rows: list[dict[str, int]] = []
    for i, (name, count) in enumerate(commands(text, published)):
        axis, sign = _OVERLAY[name]
        held = {"forward": 0, "left": 0, "yaw": 0, "pitch": 0, axis: sign}
        rows += [held] * (PICTURES * count + (i == 0))
    return rows


def from_json(source: str | Path | Mapping[str, Any], recentre: bool | None = None) -> Trajectory:
    """Trajectory from JSON: a path, or the object itself.

    Two layouts, told apart by their fields, both objects in the order of their entries:
    inference, an entry per latent frame with "extrinsic" (c2w) and "K" in pixels; training, an
    entry per picture with "w2c" and "intrinsic", of which every fourth is used.

    Args:
        source: where the poses are.
        recentre: make the first pose the identity; None: as published, in the training layout only.
    """
    data = _object(source)
    entries = list(data.values())
    training = bool(entries) and isinstance(entries[0], Mapping) and "w2c" in entries[0]
    pose, K = ("w2c", "intrinsic") if training else ("extrinsic", "K")
    every = slice(None, None, PICTURES if training else 1)
    try:  # every entry has to be there, though not all are used: the layouts may be mixed up
        poses = np.array([e[pose] for e in entries][every], np.float64)
        Ks = np.array([e[K] for e in entries][every], np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError("pose entries cannot be read", given=f"{error!r}",
                           expected=f'entries {{"{pose}": 4 x 4, "{K}": 3 x 3}}',
                           fix="see worldgym.trajectory for the two layouts") from error
    poses = check_poses(poses)
    w2c = poses if training else inverse(poses)
    if training if recentre is None else recentre:
        return Trajectory.of(inverse(camera.centred(w2c)), Ks)
    return Trajectory.of(inverse(poses) if training else poses, Ks)


def _object(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    data: Any = source
    if isinstance(source, str | Path):
        try:
            data = json.loads(Path(source).read_text())
        except (OSError, ValueError) as error:
            raise DatasetError("pose file cannot be read", given=f"{source} ({error})",
                               expected="a JSON object", fix="check path and file") from error
    if not isinstance(data, Mapping) or not data:
        raise DatasetError("pose file holds no poses", given=type(data).__name__,
                           expected='an object {"0": {...}, "1": {...}}',
                           fix="give one entry per latent frame")
    return data


def to_json(path: Trajectory, K_33: np.ndarray = DEFAULT_K, training: bool = False
            ) -> dict[str, dict]:
    """The object that :func:`from_json` reads back.

    Args:
        path: what to write; only its poses and focal lengths are kept.
        K_33: pixel intrinsics whose principal point gives the scale of pixels.
        training: an entry per picture (the latent frame's pose repeated), w2c.
    """
    K = np.repeat(np.asarray(K_33, np.float64)[None], len(path), 0)
    for axis in (0, 1):
        K[:, axis, axis] = path.K_N33[:, axis, axis] * 2 * K[:, axis, 2]
    if not training:
        rows = [{"extrinsic": c.tolist(), "K": k.tolist()}
                for c, k in zip(path.c2w_N44, K, strict=True)]
    else:
        rows = [{"w2c": c.tolist(), "intrinsic": k.tolist()}
                for i, (c, k) in enumerate(zip(path.w2c_N44, K, strict=True))
                for _ in range(1 if i == len(path) - 1 else PICTURES)]
    return {str(i): row for i, row in enumerate(rows)}
