"""``worldgym/RoomsGame-v0``: the real game behind ``worldgym/Rooms-v0``, four rooms seen from
inside; its players, and recordings with exact poses.

Shapes: F frame of a step, H W pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldgym import camera
from worldgym.envs.record import Recorded, collect
from worldgym.envs.rooms_draw import REACH, ROOM, Layout, draw, intrinsics, make_layout
from worldgym.errors import ActionError, ConfigError, ResetNeeded

ID, GAME = "worldgym/Rooms-v0", "worldgym/RoomsGame-v0"
# none, forward, backward, right, left, forward and right, forward and left
LABELS = (0, 9, 18, 1, 2, 10, 11)
MOVE, TURN = 0.1, float(np.deg2rad(11.25))  # of a frame
FRAMES, FPS = 4, 8.0  # frames of a step; frames per second
FRAME_HW = (48, 64)
HORIZON = 60  # steps
INVERSE = {0: 0, 9: 18, 18: 9, 1: 2, 2: 1}  # of the labels that one can undo exactly


class Rooms(gymnasium.Env):
    """Find the magenta pillar in four rooms whose doors, walls and colours are new every time.

    - Observation: the frame after the step, uint8 (H, W, 3).
    - Action: one of 7 keys (``LABELS`` as labels of ``worldgym.camera``), held for ``frames``
      frames; a move of a frame that would end in a wall does not happen, a turn always does.
    - Reward: 1 for coming near the pillar, which ends the episode.
    - Info: ``frames``; ``poses``, c2w (F, 4, 4) relative to the start, exact; ``moved`` (F,), False
      where a wall was in the way; ``pose`` and ``free``, the newest of these.

    Args:
        frames: of a step. frame_hw: size of a frame. horizon: steps until truncation, None: never.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": FPS / FRAMES}
    fps = FPS

    def __init__(self, frames: int = FRAMES, frame_hw: tuple[int, int] = FRAME_HW,
                 horizon: int | None = HORIZON, render_mode: str | None = None) -> None:
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1 or min(
                frame_hw) < 8:
            raise ConfigError("impossible rooms", given=f"{frames} frames of {frame_hw}",
                              expected="at least 1 frame of at least 8 x 8", fix="use the defaults")
        self.frames, self.horizon = frames, horizon
        self.frame_hw = (int(frame_hw[0]), int(frame_hw[1]))
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, (*self.frame_hw, 3), np.uint8)
        self.action_space = spaces.Discrete(len(LABELS))
        self.metadata = {**Rooms.metadata, "render_fps": FPS / frames}
        self.recipe = {"id": GAME, "labels": list(LABELS), "move": MOVE, "turn": TURN,
                       "K": intrinsics(self.frame_hw).ravel().tolist(), "frames": FRAMES,
                       "horizon": HORIZON}
        self.layout: Layout | None = None
        self.c2w = self.start = np.eye(4)
        self.elapsed, self.over = 0, True

    def reset(self, *, seed: int | None = None,
              options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """New rooms; one stands away from walls, pillars and the goal."""
        super().reset(seed=seed)
        rng = self.np_random
        self.layout = make_layout(rng)
        while True:
            x, z = rng.uniform(0, 2 * ROOM, 2)
            goal = np.hypot(x - self.layout.goal[0], z - self.layout.goal[1])
            if goal > 1.0 and not self.layout.blocked(x, z):
                break
        turn = camera.motions([{"yaw": float(rng.integers(32)) * TURN}])
        self.c2w = camera.walk(turn)[-1]
        self.c2w[[0, 2], 3] = x, z
        self.start, self.elapsed, self.over = self.c2w.copy(), 0, False
        return self._see(), {"pose": self.pose(), "free": np.float32(1)}

    def pose(self) -> np.ndarray:
        """Where the eye is, c2w (4, 4) relative to the start."""
        return camera.inverse(self.start) @ self.c2w

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Hold a key for some frames; the step stops where the goal is reached."""
        if self.layout is None or self.over:
            raise ResetNeeded("step without an episode", given="no reset since the last end",
                              expected="reset() first", fix="call reset(seed=...)")
        if not self.action_space.contains(action):
            raise ActionError("no such key", given=repr(action),
                              expected=f"an int in 0..{len(LABELS) - 1}", fix="see LABELS")
        motion = camera.motions_of(np.array([LABELS[int(action)]]), MOVE, TURN)
        frames, poses, moved, won = [], [], [], False
        for _ in range(self.frames):
            moved.append(self._move(motion))
            frames.append(self._see())
            poses.append(self.pose())
            x, z = self.c2w[[0, 2], 3]
            won = bool(np.hypot(x - self.layout.goal[0], z - self.layout.goal[1]) < REACH)
            if won:
                break
        self.elapsed += 1
        cut = not won and self.horizon is not None and self.elapsed >= self.horizon
        self.over = won or cut
        info = {"frames": np.stack(frames), "poses": np.stack(poses), "moved": np.array(moved),
                "pose": poses[-1], "free": np.float32(moved[-1])}
        return frames[-1].copy(), float(won), won, cut, info

    def _move(self, motion_15: np.ndarray) -> bool:
        """Take a motion, or only its turn where a wall is in the way; whether it was free."""
        assert self.layout is not None
        wished = self.c2w @ camera.steps_of(motion_15)[0]
        free = not self.layout.blocked(wished[0, 3], wished[2, 3])
        if not free:
            wished[:3, 3] = self.c2w[:3, 3]
        self.c2w = wished
        return free

    def _see(self) -> np.ndarray:
        assert self.layout is not None
        return draw(self.layout, self.c2w, self.frame_hw)

    def render(self) -> np.ndarray | None:
        """The newest frame."""
        return self._see() if self.render_mode == "rgb_array" and self.layout else None


# -- players --------------------------------------------------------------------------------------


class Walker:
    """Plays frame by frame, each key held for ``FRAMES`` frames, and knows when a wall stopped it
    (nothing changed). ``plan`` gives the next key.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.reset()

    def reset(self) -> None:
        """A new episode."""
        self.label, self.stuck = 0, False
        self.last: np.ndarray | None = None
        self.done: list[int] = []  # what was really done, frame by frame
        self.back: list[int] = []  # what is still to be undone

    def act(self, frame: np.ndarray, t: int) -> int:
        """Key of the next frame."""
        if t:
            self.stuck = (self.label // 9 > 0 and self.last is not None
                          and np.array_equal(frame, self.last))
            self.done.append(self.label % 9 if self.stuck else self.label)
        if self.back:
            self.label = self.back.pop()
        elif t % FRAMES == 0:
            self.label = self.plan(frame, t // FRAMES)
        self.last = frame
        return LABELS.index(self.label)

    def plan(self, frame: np.ndarray, step: int) -> int:
        """Walk about, turn at walls."""
        if self.stuck or self.rng.random() < 0.25:
            return int(self.rng.choice([1, 2]))
        return int(self.rng.choice([9, 10, 11, 18, 0, 1, 2],
                                   p=[.55, .15, .15, .03, .02, .05, .05]))


class Returner(Walker):
    """Goes out for a while, by keys that can be undone, and comes back the same way."""

    def plan(self, frame: np.ndarray, step: int) -> int:
        """Out, and now and then all the way back."""
        if len(self.done) >= 4 * FRAMES and len(self.done) % FRAMES == 0 and (
                self.rng.random() < 0.15 or len(self.done) >= 14 * FRAMES):
            self.back = [INVERSE[label] for label in self.done]  # popped from the end
            self.done = []
            return self.back.pop()
        self.turning = getattr(self, "turning", 1)
        if self.stuck or self.rng.random() < 0.3:
            if self.rng.random() < 0.3:
                self.turning = int(self.rng.choice([1, 2]))
            return self.turning
        return 9


class Looker(Walker):
    """Turns on the spot, all the way round and on, with short walks between."""

    def plan(self, frame: np.ndarray, step: int) -> int:
        """Eleven turns, five steps, and so on."""
        if step % 16 == 0:
            self.side = int(self.rng.choice([1, 2]))
        return self.side if step % 16 < 11 else super().plan(frame, step)


class Seeker(Walker):
    """Goes to the goal when it sees it, else walks about."""

    def plan(self, frame: np.ndarray, step: int) -> int:
        """Towards what has the goal's colour."""
        r, g, b = (frame[..., i].astype(int) for i in range(3))
        seen = ((r > 100) & (b > 100) & (g < 50)).sum(0)
        if seen.sum() < 4:
            return super().plan(frame, step)
        where = (seen * np.arange(len(seen))).sum() / seen.sum() / len(seen) - 0.5
        if abs(where) > 0.3:
            return 1 if where > 0 else 2
        return 9 if not self.stuck else int(self.rng.choice([1, 2]))


PLAYERS: tuple[tuple[str, float, Callable[[np.random.Generator], Any]], ...] = (
    ("walker", 0.25, Walker), ("returner", 0.35, Returner), ("looker", 0.15, Looker),
    ("seeker", 0.25, Seeker))


def record_rooms(out: str | Path, *, episodes: int | None = None,
                 frames_in_all: int | None = None, seed: int = 0, steps: int = HORIZON,
                 frame_hw: tuple[int, int] = FRAME_HW, progress: bool = True) -> Recorded:
    """Record episodes frame by frame, with keys, exact poses (``info_pose``) and whether the way
    was free (``info_free``); the same call goes on where it was stopped.

    Args:
        episodes, frames_in_all: that the folder shall hold, whichever comes first.
        steps: longest episode, in steps of ``FRAMES`` frames.
    """
    return collect(lambda: Rooms(frames=1, frame_hw=frame_hw, horizon=None), out,
                   episodes=episodes, steps=frames_in_all, policies=PLAYERS, seed=seed,
                   info=("pose", "free"), max_episode_steps=steps * FRAMES,
                   progress=progress)
