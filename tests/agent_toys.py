"""Tiny stand-ins for agent tests: a random-weight world, its start bank, and a real game."""

import json
from pathlib import Path

import gymnasium
import numpy as np

from worldgym.actions import ActionSpec
from worldgym.data.starts import StartBank
from worldgym.envs.tasks import Task
from worldgym.models import nano
from worldgym.models.codec import CodecConfig


def tiny_folder(folder):
    """A world folder of random weights whose real twin is ``Corridor-v0``."""
    cfg = nano.NanoConfig(
        name="tiny", action=ActionSpec.discrete(3), wan=nano.dit_config(4, 2, 32, 2, 16),
        window=5, recent=2, outcome_frames=2, outcome_width=8,
        codec=CodecConfig(frame_hw=(32, 32), channels=4, width=8, deep_width=16))
    nano.save(nano.fresh(cfg), folder, {"task": {"horizon": 12, "twin": "Corridor-v0"}})
    bank(nano.load(folder)).save(folder / "starts.safetensors")
    return folder


def numbers(out):
    """What an evaluation wrote, without when and where."""
    data = json.loads((Path(out) / "evaluation.json").read_text())
    data.pop("about")
    return data


def policy_file(path, body="return Random(action)"):
    """A Python file with a policy; its name as the commands read it."""
    path.write_text("from worldgym.agents.scripted import Random\n"
                    f"def make(action):\n    {body}\n")
    return f"{path}:make"


def bank(world):
    """Eight one-frame starts."""
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3)).astype(np.uint8)
    return StartBank.from_frames(world.encode, frames, np.zeros(8, np.int64))


def tiny_task(**changes):
    """A task over a tiny random world; pays 1 a step, ends by its own head."""
    world = nano.tiny()
    settings = {"world": world, "starts": bank(world), "horizon": 12, "name": "tiny", **changes}
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


if "Corridor-v0" not in gymnasium.registry:
    gymnasium.register("Corridor-v0", entry_point=Corridor)
