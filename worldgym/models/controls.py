"""What an action means to a world with a camera: motions and labels of every latent frame.

Shapes: n slot or frame, A numbers of an action.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from worldgym import camera
from worldgym.actions import ActionSpec
from worldgym.errors import ConfigError

KINDS = ("keys", "deltas", "labels")


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How actions steer the camera.

    ``kind``: "keys", two of 9 classes each, move and turn (``worldgym.camera``); "deltas", how far
    (forward, right, yaw, pitch) in each latent frame, whose labels follow from the poses; "labels",
    a choice among ``labels``. ``move`` and ``turn`` (radians): what a key does in a latent frame,
    and for deltas a quarter of the most that can be asked for.

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
        return camera.deltas(1, 4 * self.move, 4 * self.turn)

    @property
    def width(self) -> int:
        """Numbers A of an action."""
        return int(np.prod(self.action.shape, dtype=int))

    def read(self, rows_nA: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Motions (n, 5) and, if the action says them, labels (n,) of checked actions (n, A)."""
        if self.kind == "deltas":
            return camera.motions(np.asarray(rows_nA, np.float64)), None
        whole = np.asarray(rows_nA).astype(np.int64)
        labels = np.asarray(self.labels)[whole[:, 0]] if self.kind == "labels" else (
            camera.label(whole[:, 0], whole[:, 1]))
        return camera.motions_of(labels, self.move, self.turn), labels
