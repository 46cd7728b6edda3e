"""A learned world as a Gymnasium environment."""

from typing import Any

import gymnasium
import numpy as np

from worldgym.envs.core import DreamCore
from worldgym.envs.face import Face, check_options, own_start
from worldgym.envs.opening import ViewConfig, check_seed
from worldgym.envs.outcome import REASONS
from worldgym.envs.screen import MODES, Screen
from worldgym.envs.tasks import Task


class DreamEnv(Face, gymnasium.Env):
    """One dream. ``step`` generates one chunk; ``reset`` returns the start frame as given.

    - Observation: the chunk's last frame, or the frame in which the episode ended (uint8 HWC), or
      its latent (float32 CHW); ``frame_stack=k`` stacks k of them along channels, oldest first.
    - Action: held over the chunk's frames, or one per frame (``actions="per_frame"``).
    - Reward: summed up to and including the end frame. ``info["frames"]`` holds the frames up to
      there, ``info["end_frame"]`` (on termination) the index of the last.
    - ``truncated`` comes with ``info["truncation_reason"]``: horizon, context, distrust or drift.
    - ``reset(seed=s)`` starts episode 0 of seed s; ``reset()`` the next episode of that seed.
      ``options``: ``{"start": i}`` takes start state i, ``{"frame": image}`` your own image.

    Args:
        task: what is dreamt.
        render_mode: None, "rgb_array", "rgb_array_list" (all frames since the last call), "human".
        view: keywords of ``ViewConfig``: observation, frame_stack, actions, info_frames.
    """

    metadata: dict[str, Any] = {"render_modes": list(MODES), "render_fps": 8.75}

    def __init__(self, task: Task, *, render_mode: str | None = None, **view: Any) -> None:
        if render_mode == "rgb_array_list":
            view["info_frames"] = True
        self._settings = {"render_mode": render_mode, **view}
        self.core = DreamCore(task, 1, ViewConfig(**view))
        self._screen = Screen(render_mode, self.core)
        self.render_mode = render_mode
        self.observation_space = self.core.observation_space
        self.action_space = self.core.action_space
        self.metadata = self._describe()

    def _sibling(self) -> "DreamEnv":
        return type(self)(self.core.task, **self._settings)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; nothing is generated. Info holds the start index (-1: your image)."""
        self.core.check_open()
        chosen = check_options(options, ("start", "frame", *self.core.start_options))
        seed = None if seed is None else check_seed(seed)
        frame, texts = own_start(self.core, chosen)
        obs_B, index = self.core.reset(
            seeds=[seed], starts=[chosen.get("start")], frames=[frame],
            texts=None if texts is None else [texts])
        super().reset(seed=seed)
        self._screen.after_reset()
        return obs_B[0], {"start": int(index[0])}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Generate one chunk.

        Raises:
            ResetNeeded, ClosedError, ActionError, ShapeError, NotFiniteError
        """
        batch = self.core.step([action])
        self._screen.after_step(batch)
        terminated, truncated = bool(batch.terminated_B[0]), bool(batch.truncated_B[0])
        info: dict[str, Any] = {}
        if batch.frames_BFHWC is not None:
            first = 0 if batch.first_frame_B is None else int(batch.first_frame_B[0])
            info["frames"] = batch.frames_BFHWC[0, first : batch.last_frame_B[0] + 1]
            if first:
                info["first_frame"] = first
        info |= {name: value[0] for name, value in batch.notes.items()}
        if batch.uncertainty_B is not None:
            info["uncertainty"] = float(batch.uncertainty_B[0])
        if batch.drift_B is not None:
            info["drift"] = float(batch.drift_B[0])
        if terminated:
            info["end_frame"] = int(batch.last_frame_B[0])
        if truncated:
            info["truncation_reason"] = REASONS[batch.reason_B[0]]
        return batch.obs_B[0], float(batch.reward_B[0]), terminated, truncated, info

    def render(self) -> Any:
        """The newest frame, all frames since the last call, or None for a window."""
        frames = self._screen.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Give the memory pages back; later calls raise ClosedError."""
        self._screen.close()
        self.core.close()
