"""What an action means to a world with a camera: motions and labels of every latent frame.

Shapes: n slot or frame, A numbers of an action.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from worldgym import camera
from worldgym.actions import ActionSpec
from worldgym.errors import ActionError, ConfigError

KINDS = ("keys", "deltas", "poses", "labels")


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How actions steer the camera.

    ``kind``: "keys", two of 9 classes each, move and turn (``worldgym.camera``); "deltas", how far
    (forward, right, yaw, pitch) in each latent frame, whose labels follow from the poses; "poses",
    the same with down and roll, so that any sequence of poses can be gone (``along``); "labels", a
    choice among ``labels``. ``move`` and ``turn`` (radians): what a key does in a latent frame, and
    for deltas and poses a quarter of the most that can be asked for.

    >>> motions, labels = Controls().read(np.array([[1, 2]]))
    >>> labels.tolist(), motions[0, :3].round(4).tolist()
    ([11], [0.08, 0.0, -0.0524])
    """

    kind: str = "keys"
    labels: tuple[int, ...] = ()
    move: float = camera.MOVE
    turn: float = camera.TURN

    def __post_init__(self) -> None:
        if self.kind not in KINDS or (self.kind == "labels") != bool(self.labels) or not (
                all(0 <= n <= 80 for n in self.labels) and 0 < self.move < 1e3
                and 0 < self.turn < np.pi):
            raise ConfigError(
                "impossible controls", given=f"{self.kind!r}, labels {self.labels}, move "
                f"{self.move}, turn {self.turn}", fix='use "keys"',
                expected=f'one of {KINDS}; numbers 0..80 with "labels" alone; a step and an angle '
                "above 0")

    @cached_property
    def action(self) -> ActionSpec:
        """Layout of an action."""
        if self.kind == "labels":
            return ActionSpec.discrete(len(self.labels))
        if self.kind == "keys":
            return camera.keys()
        space = camera.deltas if self.kind == "deltas" else camera.rigid
        return space(1, 4 * self.move, 4 * self.turn)

    @property
    def width(self) -> int:
        """Numbers A of an action."""
        return int(np.prod(self.action.shape, dtype=int))

    def read(self, rows_nA: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Motions (n, 7) and, if the action says them, labels (n,) of checked actions (n, A)."""
        if self.kind in ("deltas", "poses"):
            return camera.motions(np.asarray(rows_nA, np.float64)), None
        whole = np.asarray(rows_nA).astype(np.int64)
        labels = np.asarray(self.labels)[whole[:, 0]] if self.kind == "labels" else (
            camera.label(whole[:, 0], whole[:, 1]))
        return camera.motions_of(labels, self.move, self.turn), labels

    def along(self, c2w_N44: np.ndarray) -> np.ndarray:
        """Actions (N - 1, *action.shape), one per latent frame, that lead along poses.

        Raises:
            ActionError: these controls cannot: a step is too large or of a kind they do not have.
        """
        motions = camera.motions_between(c2w_N44)
        if self.kind in ("keys", "labels"):
            labels = camera.labels_of(c2w_N44)[1:]
            offered = np.asarray(self.labels or range(81))
            made, known = camera.motions_of(labels, self.move, self.turn), np.isin(labels, offered)
            rows = camera.classes(labels) if self.kind == "keys" else np.where(
                known, np.argmax(labels[:, None] == offered, 1), 0)
        else:
            rows = motions[:, camera.POSE[:self.width]].astype(np.float32)
            made, most = camera.motions(rows), np.asarray(self.action.high, np.float32)
            known = (np.abs(rows) <= most).all(1)
        off = np.abs(made - motions) > 1e-6 + 1e-6 * np.abs(motions)
        bad = np.flatnonzero(~known | off.any(1))
        if len(bad):
            asked = {n: round(float(x), 6) for n, x in zip(
                camera.COLUMNS, motions[bad[0]], strict=True) if abs(x) > 1e-6}
            raise ActionError("poses cannot be gone with these controls",
                              given=f"step {bad[0] + 1}: {asked}",
                              expected=f'"{self.kind}" with move {self.move:.4g}, turn '
                              f"{self.turn:.4g}", fix='use controls="poses" with a larger move and '
                              "turn, or more poses in between")
        return rows
