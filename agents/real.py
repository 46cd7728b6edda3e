"""Several real games as one Stable-Baselines3 VecEnv, seen as the dream is seen.

For the comparison every result needs: the same learner, in the game itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from worldgym.agents.encode import FrameObservation, LatentObservation
from worldgym.errors import ConfigError


class RealVecEnv(VecEnv):
    """Lockstep games in this process, frames or latents stacked like the dream's.

    Args:
        make_game: makes one Gymnasium env showing frames (H, W, 3) uint8.
        num_envs: how many.
        observation: "frame", or "latent" to read through ``world``'s codec.
        frame_stack: observations side by side.
        world: needed for "latent".
        seed: first seed; game i plays seed + i, then draws on from there.
    """

    def __init__(self, make_game: Callable[[], Any], num_envs: int, *, observation: str = "frame",
                 frame_stack: int = 4, world: Any = None, seed: int = 0) -> None:
        if observation == "latent" and world is None:
            raise ConfigError("latents of a real game need a world", given="no world",
                              expected="the world whose codec reads the frames",
                              fix="pass world=load_task(id).world, or observation='frame'")
        self.games = [make_game() for _ in range(num_envs)]
        self.render_mode = None
        self._first = seed
        self.t_B = np.zeros(num_envs, np.int64)
        self._actions: Any = None
        height, width = self.games[0].observation_space.shape[:2]
        k = frame_stack
        if observation == "latent":
            self.view: Any = LatentObservation(world, k)
            channels, h, w = world.spec.latent_chw
            limit = np.finfo(np.float32).max
            space = spaces.Box(-limit, limit, (channels * k, h, w), np.float32)
        else:
            self.view = FrameObservation((height, width), k)
            space = spaces.Box(0, 255, (height, width, 3 * k), np.uint8)  # type: ignore[arg-type]
        self.view.reset(num_envs)
        super().__init__(num_envs, space, self.games[0].action_space)
        self._seeds = [seed + i for i in range(num_envs)]

    def seed(self, seed: int | None = None) -> list[int | None]:  # type: ignore[override]
        """Seeds of the next ``reset``."""
        first = self._first if seed is None else seed
        self._seeds = [first + i for i in range(self.num_envs)]
        return self._seeds

    def reset(self) -> np.ndarray:
        """New episodes everywhere."""
        seeds = self._seeds
        frames = np.stack([g.reset(seed=s)[0] for g, s in zip(self.games, seeds, strict=True)])
        self._reset_seeds()
        self.t_B[:] = 0
        self.reset_infos = [{} for _ in self.games]
        return self.view.frames(frames, self.t_B)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> Any:
        """One step of every game; a finished one begins anew at once."""
        made = [g.step(a.item() if np.ndim(a) == 0 else a)
                for g, a in zip(self.games, self._actions, strict=True)]
        self.t_B += 1
        obs = self.view.frames(np.stack([m[0] for m in made]), self.t_B)
        rewards = np.array([m[1] for m in made], np.float32)
        dones = np.array([m[2] or m[3] for m in made])
        infos: list[dict[str, Any]] = [{} for _ in made]
        ended = np.flatnonzero(dones)
        if len(ended):
            for slot in ended:
                infos[slot] = {"terminal_observation": obs[slot].copy(),
                               "TimeLimit.truncated": bool(made[slot][3] and not made[slot][2])}
            self.t_B[ended] = 0
            fresh = np.stack([self.games[slot].reset()[0] for slot in ended])
            obs[ended] = self.view.frames(fresh, 0, ended)
        return obs, rewards, dones, infos

    def close(self) -> None:
        """End every game."""
        for game in self.games:
            game.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the single games (``render_mode``: this env's)."""
        slots = self._get_indices(indices)
        if attr_name == "render_mode":
            return [self.render_mode for _ in slots]
        return [getattr(self.games[i], attr_name) for i in slots]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the single games."""
        for i in self._get_indices(indices):
            setattr(self.games[i], attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None,
                   **method_kwargs: Any) -> list[Any]:
        """Call a method of the single games."""
        return [getattr(self.games[i], method_name)(*method_args, **method_kwargs)
                for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No Stable-Baselines3 wrapper is inside."""
        return [False for _ in self._get_indices(indices)]
