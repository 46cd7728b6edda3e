"""Camera walks: motions to poses, poses to labels, both ways (specs/worldplay.md section 8).

Shapes: N latent frame. Poses are 4 x 4, float64, column vectors; c2w camera to world, w2c its
inverse; x right, y down, z forward. Lengths have no unit; one motion is one latent frame (four
pictures). A label is ``9 * move + turn``:

    move  0 none  1 forward  2 backward  3 right  4 left  5..8 (ahead, back) x (right, left)
    turn  0 none  1 right    2 left      3 up     4 down  5..8 (right, left) x (up, down)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.errors import ActionError, DTypeError, NotFiniteError, ShapeError

MOVE = 0.08  # length of one motion
TURN = float(np.deg2rad(3.0))
# columns of motions; yaw > 0 right, pitch > 0 up, roll > 0 clockwise
FORWARD, RIGHT, YAW, PITCH, ORBIT, DOWN, ROLL = range(7)
COLUMNS = ("forward", "right", "yaw", "pitch", "third_yaw", "down", "roll")
POSE = [FORWARD, RIGHT, YAW, PITCH, DOWN, ROLL]  # what any rigid motion is made of
# the least length of a move, in inference and in the published trainer; the least turn in degrees
LEAST_MOVE, LEAST_MOVE_TRAINING, LEAST_TURN = 1e-4, 0.01, 0.05
SECTOR = 60.0  # degrees: a move counts for an axis from which it is less than this away
# (along, across) of each class
_PARTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_MOVES = np.array(_PARTS, float)  # (forward, right)
_TURNS = np.array([(yaw, pitch) for yaw, pitch in _PARTS], float)  # (yaw, pitch)
# pixels of the published runs: 969.697 at 1920 x 1080
DEFAULT_K = np.array([[969.6969696969696, 0, 960], [0, 969.6969696969696, 540], [0, 0, 1]])


def keys(latents: int = 1) -> ActionSpec:
    """Space of keys: a move and a turn class for each latent frame of an action."""
    shape = (2,) if latents == 1 else (latents, 2)
    return ActionSpec(kind="multi_discrete", shape=shape, sizes=(9, 9) * latents)


def deltas(latents: int = 1, most_move: float = 4 * MOVE, most_turn: float = 4 * TURN
           ) -> ActionSpec:
    """Space of camera motions (forward, right, yaw, pitch) for each latent frame of an action."""
    most = (most_move, most_move, most_turn, most_turn) * latents
    shape = (4,) if latents == 1 else (latents, 4)
    return ActionSpec(kind="box", shape=shape, low=tuple(-m for m in most), high=most)


def rigid(latents: int = 1, most_move: float = 4 * MOVE, most_turn: float = 4 * TURN
          ) -> ActionSpec:
    """Space of any camera motion (forward, right, yaw, pitch, down, roll) for each latent frame."""
    most = (most_move, most_move, most_turn, most_turn, most_move, most_turn) * latents
    shape = (6,) if latents == 1 else (latents, 6)
    return ActionSpec(kind="box", shape=shape, low=tuple(-m for m in most), high=most)


def label(move: np.ndarray | int, turn: np.ndarray | int) -> np.ndarray:
    """Labels 0..80 of classes 0..8.

    >>> int(label(1, 2))
    11
    """
    move, turn = np.asarray(move), np.asarray(turn)
    for what, given in (("move", move), ("turn", turn)):
        if given.dtype.kind not in "iu" or (given < 0).any() or (given > 8).any():
            raise ActionError(f"{what} class is none of the nine", given=given.ravel()[:8].tolist(),
                              expected="whole numbers 0..8", fix="see worldgym.camera")
    return 9 * move + turn


def classes(labels_N: np.ndarray) -> np.ndarray:
    """Move and turn (..., 2) of labels; inverse of :func:`label`."""
    labels_N = np.asarray(labels_N)
    if labels_N.dtype.kind not in "iu" or (labels_N < 0).any() or (labels_N > 80).any():
        raise ActionError("label is none of the 81", given=labels_N.ravel()[:8].tolist(),
                          expected="whole numbers 0..80", fix="use worldgym.camera.label")
    return np.stack([labels_N // 9, labels_N % 9], -1)


def motions_of(labels_N: np.ndarray, move: float = MOVE, turn: float = TURN) -> np.ndarray:
    """Motions (N, 7) that keys stand for."""
    pair = classes(labels_N)
    out = np.zeros((*pair.shape[:-1], len(COLUMNS)))
    out[..., [FORWARD, RIGHT]] = move * _MOVES[pair[..., 0]]
    out[..., [YAW, PITCH]] = turn * _TURNS[pair[..., 1]]
    return out


def motions(given: Sequence[Mapping[str, float]] | np.ndarray) -> np.ndarray:
    """Motions (N, 7) from dicts such as {"forward": 0.08}, or from numbers: (N, 4), 5 or all 7
    ``COLUMNS``, or (N, 6), those of ``POSE``."""
    if isinstance(given, np.ndarray):
        columns = {4: [FORWARD, RIGHT, YAW, PITCH], 5: range(5), 6: POSE, 7: range(7)}
        if given.ndim != 2 or given.shape[1] not in columns:
            raise ShapeError("motions have the wrong shape", given=given.shape,
                             expected="(N, 4): forward, right, yaw, pitch", fix="add the others")
        rows = np.zeros((len(given), len(COLUMNS)))
        rows[:, columns[given.shape[1]]] = given
    else:
        odd = sorted({name for motion in given for name in motion} - set(COLUMNS))
        if odd:
            raise ActionError("unknown motion", given=odd, expected=COLUMNS,
                              fix="use negative numbers for backward, left and down")
        rows = np.array([[float(m.get(c, 0)) for c in COLUMNS] for m in given]
                        ).reshape(-1, len(COLUMNS))
    if not np.isfinite(rows).all():
        raise NotFiniteError("motion is not finite", given=rows[~np.isfinite(rows)][:4].tolist(),
                             expected="finite numbers", fix="check where the motion comes from")
    return rows


def inverse(pose_N44: np.ndarray) -> np.ndarray:
    """Inverse of rigid motions: w2c from c2w and back."""
    turn = np.swapaxes(pose_N44[..., :3, :3], -1, -2)
    out = np.zeros(pose_N44.shape)
    out[..., :3, :3], out[..., 3, 3] = turn, 1
    out[..., :3, 3] = -np.einsum("...ij,...j->...i", turn, pose_N44[..., :3, 3])
    return out


def _turn(axis: int, angle: np.ndarray) -> np.ndarray:
    """Right-handed rotations (..., 4, 4) about x (0), y (1) or z (2)."""
    out = np.zeros((*np.shape(angle), 4, 4))
    out[..., range(4), range(4)] = 1
    cos, sin, (i, j) = np.cos(angle), np.sin(angle), ((1, 2), (2, 0), (0, 1))[axis]
    out[..., i, i], out[..., j, j], out[..., i, j], out[..., j, i] = cos, cos, -sin, sin
    return out


def steps_of(motions_N7: np.ndarray) -> np.ndarray:
    """Each motion as a matrix (N, 4, 4) to multiply a c2w pose with from the right.

    Columns that are not given are 0. Turns come before moves; an orbit goes round the point one
    unit ahead, after both.
    """
    m = np.asarray(motions_N7, np.float64)
    m = np.concatenate([m, np.zeros((*m.shape[:-1], len(COLUMNS) - m.shape[-1]))], -1)
    out = _turn(1, m[..., YAW]) @ _turn(0, m[..., PITCH])
    if m[..., ROLL].any():
        out = out @ _turn(2, m[..., ROLL])
    move = m[..., [RIGHT, DOWN, FORWARD]]
    out[..., :3, 3] = np.einsum("...ij,...j->...i", out[..., :3, :3], move)
    if m[..., ORBIT].any():
        away, back = np.eye(4), np.eye(4)
        away[2, 3], back[2, 3] = 1, -1
        out = out @ (away @ _turn(1, -m[..., ORBIT]) @ back)
    return out


def motions_between(c2w_N44: np.ndarray) -> np.ndarray:
    """Motions (N - 1, 7) that lead along poses, whatever they are; ``walk`` goes them.

    >>> motions_between(walk(motions([{"forward": 0.08, "pitch": 0.1}])))[0, :4].round(4).tolist()
    [0.08, 0.0, 0.0, 0.1]
    """
    c2w_N44 = check_poses(c2w_N44)
    step = inverse(c2w_N44[:-1]) @ c2w_N44[1:]
    out = np.zeros((len(step), len(COLUMNS)))
    level = np.hypot(step[:, 0, 2], step[:, 2, 2])
    steep = level < 1e-9  # straight up or down, yaw and roll are one
    out[:, YAW] = np.where(steep, np.arctan2(-step[:, 2, 0], step[:, 0, 0]),
                           np.arctan2(step[:, 0, 2], step[:, 2, 2]))
    out[:, PITCH] = np.arctan2(-step[:, 1, 2], level)
    out[:, ROLL] = np.where(steep, 0, np.arctan2(step[:, 1, 0], step[:, 1, 1]))
    out[:, [RIGHT, DOWN, FORWARD]] = np.einsum("nji,nj->ni", step[:, :3, :3], step[:, :3, 3])
    return out


def walk(motions_N7: np.ndarray, start_44: np.ndarray | None = None) -> np.ndarray:
    """c2w poses (N + 1, 4, 4): the start (default: the identity) and one after each motion.

    >>> walk(motions([{"forward": 0.08}]))[1, :3, 3].tolist()
    [0.0, 0.0, 0.08]
    """
    poses = [np.eye(4) if start_44 is None else np.asarray(start_44, np.float64)]
    for step in steps_of(motions_N7):
        poses.append(poses[-1] @ step)
    return np.stack(poses)


def centred(w2c_N44: np.ndarray) -> np.ndarray:
    """w2c poses in the coordinates of the first camera, whose pose becomes the identity."""
    out = w2c_N44 @ inverse(w2c_N44[:1])
    out[0] = np.eye(4)
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """From where on a relative motion counts; ``third_person``: a turning camera does not move."""

    move: float = LEAST_MOVE
    turn: float = LEAST_TURN
    third_person: bool = False


def labels_of(c2w_N44: np.ndarray, limits: Thresholds | None = None) -> np.ndarray:
    """Labels (N,) int64 of poses: what led from each pose's predecessor to it; the first has 0."""
    limits = limits or Thresholds()
    c2w_N44 = check_poses(c2w_N44)
    step = inverse(c2w_N44[:-1]) @ c2w_N44[1:]
    yaw, pitch = _angles(step)
    right, up = _sign(yaw, limits.turn), _sign(pitch, limits.turn)
    # one by one: sums along an axis round otherwise, and 30 degrees off an axis is on the edge
    length = np.array([np.linalg.norm(move) for move in step[:, :3, 3]])
    moves = length > limits.move
    if limits.third_person:
        moves &= (np.abs(yaw) < limits.turn) & (np.abs(pitch) < limits.turn)
    unit = step[:, :3, 3] / np.maximum(length, 1e-300)[:, None]
    away = np.rad2deg(np.arccos(np.clip(unit, -1, 1)))
    ahead, aside = (np.where(moves, (a < SECTOR) * 1 - (a > 180 - SECTOR) * 1, 0)
                    for a in (away[:, 2], away[:, 0]))
    out = label(_class(ahead, aside), _class(right, up))
    return np.concatenate([[0], out]).astype(np.int64)


def _sign(x: np.ndarray, least: float) -> np.ndarray:
    return (x > least) * 1 - (x < -least) * 1


def _class(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    table = np.zeros((3, 3), np.int64)
    for number, (a, b) in enumerate(_PARTS):
        table[a, b] = number
    return table[along, across]


def _angles(turn_N44: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Yaw and pitch in degrees: the second and first Euler angle, axes x y z fixed in space."""
    r = turn_N44
    yaw = np.arctan2(-r[:, 2, 0], np.hypot(r[:, 0, 0], r[:, 1, 0]))
    return np.rad2deg(yaw), np.rad2deg(np.arctan2(r[:, 2, 1], r[:, 2, 2]))


def check_poses(pose_N44: np.ndarray) -> np.ndarray:
    """Poses as float64, or a named error: shape, numbers, and that they are rigid motions."""
    try:
        pose = np.asarray(pose_N44)
        pose = pose if pose.dtype.kind in "iuf" else pose.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError("poses are not matrices of numbers", given=str(error)[:80],
                         expected="(N, 4, 4)", fix="give one 4 x 4 matrix per latent frame"
                         ) from error
    if pose.ndim != 3 or pose.shape[1:] != (4, 4) or not len(pose):
        raise ShapeError("poses have the wrong shape", given=pose.shape, expected="(N, 4, 4)",
                         fix="give one 4 x 4 matrix per latent frame")
    pose = pose.astype(np.float64)
    if not np.isfinite(pose).all():
        raise NotFiniteError("pose is not finite", given="NaN or inf", expected="finite matrices",
                             fix="check the pose file")
    turn = pose[:, :3, :3]
    off = np.abs(turn @ np.swapaxes(turn, 1, 2) - np.eye(3)).max()
    if off > 1e-3 or (np.linalg.det(turn) < 0).any() or (pose[:, 3] != [0, 0, 0, 1]).any():
        raise ActionError("pose is not a rigid motion", given=f"rotation off by {off:.2g}",
                          expected="a rotation, a translation, last row 0 0 0 1",
                          fix="give c2w or w2c matrices without scale or mirroring")
    return pose


def normalised(K_N33: np.ndarray) -> np.ndarray:
    """Pixel intrinsics as the network sees them: fx / (2 cx), fy / (2 cy), centre 0.5, float64.

    Whole numbers are taken as numbers, not as a dtype: the published code cut the result to 0.
    """
    K = np.asarray(K_N33)
    if K.shape[-2:] != (3, 3):
        raise ShapeError("intrinsics have the wrong shape", given=K.shape, expected="(..., 3, 3)",
                         fix="give 3 x 3 matrices in pixels")
    if K.dtype.kind not in "iuf":
        raise DTypeError("intrinsics are not numbers", given=K.dtype, expected="float64",
                         fix="give 3 x 3 matrices in pixels")
    K = K.astype(np.float64)
    focal, centre = K[..., [0, 1], [0, 1]], K[..., [0, 1], [2, 2]]
    if not (np.isfinite(K).all() and (focal > 0).all() and (centre > 0).all()):
        raise NotFiniteError("impossible intrinsics", given=K.reshape(-1, 9)[0].tolist(),
                             expected="focal lengths and principal point above 0, in pixels",
                             fix="K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] before normalisation")
    out = np.zeros(K.shape)
    out[..., [0, 1], [0, 1]] = focal / (2 * centre)
    out[..., :2, 2], out[..., 2, 2] = 0.5, 1
    return out


def field_of_view(K_33: np.ndarray) -> tuple[float, float]:
    """Width and height of the view in degrees, from normalised intrinsics."""
    fx, fy = float(K_33[0, 0]), float(K_33[1, 1])
    return (float(np.rad2deg(2 * np.arctan(0.5 / fx))), float(np.rad2deg(2 * np.arctan(0.5 / fy))))
