"""A VecEnv wrapper that keeps the books: raw episode returns, and rewards scaled for learning.

Its whole state is a dict of arrays, so that a killed training goes on exactly where it stood.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

RECENT = 200  # finished episodes that the running mean covers


class Bookkeeper(VecEnvWrapper):
    """Counts returns per slot; hands out rewards divided by the deviation of discounted returns.

    Args:
        venv: the envs.
        gamma: discount of the learner.
        scale: False leaves rewards as they are.
    """

    def __init__(self, venv: VecEnv, gamma: float = 0.99, scale: bool = True) -> None:
        super().__init__(venv)
        self.gamma, self.scale = gamma, scale
        self.return_B = np.zeros(venv.num_envs)
        self.length_B = np.zeros(venv.num_envs)
        self.discounted_B = np.zeros(venv.num_envs)
        self.moments = np.array([0.0, 1.0, 1e-4])  # mean, variance, weight of discounted returns
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self.episodes = 0

    def reset(self) -> Any:
        """Begin new episodes everywhere."""
        self.return_B[:], self.length_B[:], self.discounted_B[:] = 0, 0, 0
        return self.venv.reset()

    def step_wait(self) -> Any:
        """One step, with ``info["episode"]`` where one ended."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self.return_B += rewards
        # rows of several players: one that is out waits for the others, and that counts for nothing
        live = getattr(self.venv, "acted_R", None)
        self.length_B += 1 if live is None else live
        out = self._scaled(rewards, live) if self.scale else rewards
        for slot in np.flatnonzero(dones):
            done = (float(self.return_B[slot]), float(self.length_B[slot]))
            infos[slot] = {**infos[slot], "episode": {"r": done[0], "l": int(done[1]), "t": 0.0}}
            self.recent.append(done)
            self.episodes += 1
        for array in (self.return_B, self.length_B, self.discounted_B):
            array[dones] = 0
        return obs, out.astype(np.float32), dones, infos

    def _scaled(self, rewards: np.ndarray, live: np.ndarray | None = None) -> np.ndarray:
        self.discounted_B = self.discounted_B * self.gamma + rewards
        mean, variance, weight = self.moments
        sums = self.discounted_B if live is None or not live.any() else self.discounted_B[live]
        n, delta = len(sums), sums.mean() - mean
        total = weight + n
        spread = variance * weight + sums.var() * n + delta**2 * weight * n / total
        self.moments = np.array([mean + delta * n / total, spread / total, total])
        return np.clip(rewards / np.sqrt(self.moments[1] + 1e-8), -10, 10)

    def means(self) -> tuple[float, float] | None:
        """Mean return and length of recent episodes, None before the first ended."""
        return tuple(np.mean(self.recent, axis=0).tolist()) if self.recent else None

    def state(self) -> dict[str, np.ndarray]:
        """Everything that changes, as arrays."""
        return {"return_B": self.return_B.copy(), "length_B": self.length_B.copy(),
                "discounted_B": self.discounted_B.copy(), "moments": self.moments.copy(),
                "recent": np.array(self.recent, np.float64).reshape(-1, 2),
                "episodes": np.array(self.episodes)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Inverse of ``state``."""
        for name in ("return_B", "length_B", "discounted_B", "moments"):
            setattr(self, name, np.array(state[name]))
        self.recent = deque(map(tuple, state["recent"].tolist()), maxlen=RECENT)
        self.episodes = int(state["episodes"])
