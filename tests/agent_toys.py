"""Tiny stand-ins for agent tests: a random-weight world, its start bank, and a real game."""

import gymnasium
import numpy as np

from worldgym.envs.tasks import Task
from worldgym.models import nano
from worldgym.state import Starts


class Bank:
    """Eight one-frame starts."""

    def __init__(self, world, count=8):
        frames = np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3)).astype(np.uint8)
        shape = world.spec.action.shape
        self.frames = frames
        self.starts = Starts(world.encode(frames)[:, None], np.zeros((count, 1, *shape), np.int64),
                             np.ones((count, 1), bool), np.ones(count, np.int64))

    def __len__(self):
        return len(self.starts)

    def sample(self, seed, episode):
        return int(np.random.default_rng([seed, episode]).integers(len(self)))

    def gather(self, index):
        return self.starts.rows(np.asarray(index))


def tiny_task(**changes):
    """A task over a tiny random world; pays 1 a step, ends by its own head."""
    world = nano.tiny()
    settings = {"world": world, "starts": Bank(world), "horizon": 12, "name": "tiny", **changes}
    return Task(**settings)


class Corridor(gymnasium.Env):
    """A dot on a line: 1 moves right, 2 left; the episode ends at either wall; 1 per step."""

    metadata = {"render_modes": [], "render_fps": 10}
    observation_space = gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, size=9):
        self.size, self.render_mode = size, None

    def _frame(self):
        frame = np.zeros((32, 32, 3), np.uint8)
        x = int(self.at * 31 / (self.size - 1))
        frame[12:20, max(0, x - 2):x + 3] = (250, 220, 40)
        return frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.t = int(self.np_random.integers(2, self.size - 2)), 0
        return self._frame(), {}

    def step(self, action):
        self.at += {0: 0, 1: 1, 2: -1}[int(action)]
        self.t += 1
        ended = self.at <= 0 or self.at >= self.size - 1
        return self._frame(), 1.0, bool(ended), bool(not ended and self.t >= 40), {}
