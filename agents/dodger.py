"""A pixel dodger for Take Cover: it sees fireballs, foresees where they land, and steps aside.

What it knows of the game (32x80 frames, 90 degree view, no turning): a fireball whose place on
the screen stands still while it grows is on collision course; its size says how many steps are
left; action 1 slides right, 2 left. Units: one step of a fireball's flight is 1 in depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.policy import SlotPolicy
from worldgym.errors import MissingDependencyError, ShapeError

HORIZON = 9  # rows above it never show a fireball that matters
STEPS_TIMES_PIXELS = 22.4  # a fireball d pixels wide hits in 20 / d steps (measured)
SPEED = {0: 0.0, 1: 0.7, 2: -0.7}  # sideways speed an action leads to (measured)
PICK_UP = 0.5  # share of the missing speed gained per step


@dataclass
class Ball:
    """One fireball: ``side`` (tangent of its bearing), ``steps`` to impact, own side speed."""

    side: float
    steps: float
    drift: float | None = None


@dataclass
class Memory:
    """What the dodger remembers of one slot: course, own speed, the fireballs it saw."""

    course: int = 1
    speed: float = 0.0
    balls: list[Ball] = field(default_factory=list)


class Dodger(SlotPolicy):
    """Holds one course from wall to wall; leaves it only for a fireball that would hit.

    Args:
        action: Discrete(3).
        safe: distance (in steps of flight) at which a fireball is let pass.
    """

    def __init__(self, action: ActionSpec, safe: float = 0.8) -> None:
        super().__init__(action)
        self.name, self.safe = "dodger", safe
        self._memory: dict[int, Memory] = {}

    def start(self, slot: int) -> None:
        self._memory[slot] = Memory(course=1 + int(self.rngs[slot].integers(2)))

    def choose(self, slot: int, t: int, frame_HWC: np.ndarray) -> int:
        mind = self._memory[slot]
        left, right = wall_shares(frame_HWC)
        mind.balls = follow(mind, find_balls(frame_HWC))
        blocked = {0: False, 1: right > 0.35, 2: left > 0.35}
        if blocked[mind.course]:
            mind.course = 3 - mind.course
        miss = {a: self._closest(mind, a, blocked[a]) for a in (0, 1, 2)}
        action = mind.course
        if miss[action] < self.safe:
            action = max(miss, key=lambda a: min(miss[a], 1.5)
                         + 0.3 * (a == mind.course) - 0.1 * (a == 0))
        mind.course = action or mind.course
        stuck = (action == 1 and right > 0.8) or (action == 2 and left > 0.8)
        mind.speed = 0.0 if stuck else mind.speed + PICK_UP * (SPEED[action] - mind.speed)
        return action

    @staticmethod
    def _closest(mind: Memory, action: int, blocked: bool) -> float:
        """Smallest distance at which a known fireball would pass if ``action`` were held."""
        nearest = 9.0
        for ball in mind.balls:
            if ball.drift is not None and ball.steps <= 7:
                own = travel(mind.speed, 0.0 if blocked else SPEED[action], ball.steps)
                nearest = min(nearest, abs((ball.side + ball.drift) * ball.steps - own))
        return nearest


def travel(speed: float, target: float, steps: float) -> float:
    """Sideways way covered in ``steps`` while ``speed`` approaches ``target``."""
    whole, way = int(np.ceil(steps)), 0.0
    for _ in range(whole):
        speed += PICK_UP * (target - speed)
        way += speed
    return way * steps / max(whole, 1)


def wall_shares(frame_HWC: np.ndarray) -> tuple[float, float]:
    """How much of the lower left and lower right corner is brown brick."""
    if frame_HWC.shape != (32, 80, 3):
        raise ShapeError("the dodger knows one frame size", given=frame_HWC.shape,
                         expected=(32, 80, 3), fix="use it in Take Cover, or use sweep:20")
    low = frame_HWC[19:].astype(np.int16)
    brown = (low[..., 0] - low[..., 2]) > 18
    return float(brown[:, :16].mean()), float(brown[:, -16:].mean())


def find_balls(frame_HWC: np.ndarray) -> list[Ball]:
    """Bright yellow blobs of three pixels or more below the horizon."""
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            "the dodger needs OpenCV", given="no module cv2", expected="opencv-python-headless",
            fix="pip install 'worldgym[rl]'") from error
    view = frame_HWC[HORIZON:]
    mask = ((view[..., 0] > 170) & (view[..., 1] > 140)).astype(np.uint8)
    count, _, stats, centres = cv2.connectedComponentsWithStats(mask)
    sizes = stats[:, cv2.CC_STAT_AREA]
    return [
        Ball((centres[i, 0] - 39.5) / 40, STEPS_TIMES_PIXELS / (2 * np.sqrt(sizes[i] / np.pi)))
        for i in range(1, count) if sizes[i] >= 3
    ]


def follow(mind: Memory, seen: list[Ball]) -> list[Ball]:
    """Match the fireballs seen now with those remembered, and estimate each one's own drift."""
    for ball in seen:
        best = None
        for old in mind.balls:
            drift = -old.side + mind.speed if old.drift is None else old.drift
            expected = (old.side * old.steps + drift - mind.speed) / max(old.steps - 1, 0.5)
            gap = abs(expected - ball.side)
            if gap < 0.2 and ball.steps < old.steps + 1.5 and (best is None or gap < best[0]):
                best = (gap, old)
        if best is not None:
            old = best[1]
            measured = (ball.side - old.side) * ball.steps - ball.side + mind.speed
            ball.drift = measured if old.drift is None else 0.6 * old.drift + 0.4 * measured
    return seen
