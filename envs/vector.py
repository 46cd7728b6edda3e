"""A learned world as a native Gymnasium vector environment: one batch, one forward pass."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from worldgym.envs.core import Batch, DreamCore
from worldgym.envs.face import TEXTS, Face, check_mask, check_options, per_slot
from worldgym.envs.opening import ViewConfig, check_seed
from worldgym.envs.outcome import REASONS
from worldgym.envs.screen import MODES, Screen
from worldgym.envs.tasks import Task
from worldgym.errors import ConfigError, ShapeError


def check_autoreset(mode: Any) -> AutoresetMode:
    """An ``AutoresetMode`` from itself or its word ("NextStep", "SameStep", "Disabled")."""
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        raise ConfigError("unknown autoreset mode", given=repr(mode),
                          expected=f"one of {[m.value for m in AutoresetMode]}",
                          fix='pass autoreset_mode="NextStep"') from error


class DreamVectorEnv(Face, VectorEnv):
    """B dreams in one batch; slot i behaves as a ``DreamEnv`` with the same seed would.

    Autoreset (in ``metadata["autoreset_mode"]``): NEXT_STEP: the step after an end ignores that
    slot's action and returns its reset observation. SAME_STEP: the observation is the new
    episode's, the old one's is ``infos["final_obs"]``. DISABLED: call
    ``reset(options={"reset_mask": bool_array})``; stepping a finished slot raises ResetNeeded.
    The mask works in every mode. ``reset(seed=s)`` gives slot i the seed s + i.
    Options: "start" (an index, or one per slot), "frame" (one image), "frames" (one per slot).

    Args:
        task: what is dreamt. num_envs: B, at least 1.
        autoreset_mode: the enum or its word. render_mode, view: as in ``DreamEnv``.
    """

    metadata: dict[str, Any] = {"render_modes": list(MODES), "autoreset_mode": None}

    def __init__(
        self, task: Task, num_envs: int = 1, *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None, **view: Any,
    ) -> None:
        self.autoreset_mode = check_autoreset(autoreset_mode)
        if render_mode == "rgb_array_list":
            view["info_frames"] = True
        self._settings = {"autoreset_mode": self.autoreset_mode, "render_mode": render_mode, **view}
        self.core = DreamCore(task, num_envs, ViewConfig(**view))
        self.num_envs = self.core.num_slots
        self._screen = Screen(render_mode, self.core)
        self.render_mode = render_mode
        self.single_observation_space = self.core.observation_space
        self.single_action_space = self.core.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**self._describe(), "autoreset_mode": self.autoreset_mode}

    def _sibling(self) -> "DreamVectorEnv":
        return type(self)(self.core.task, self.num_envs, **self._settings)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start episodes in all slots, or in those of ``options["reset_mask"]``."""
        self.core.check_open()
        own = self.core.start_options
        known = ("start", "frame", "frames", "reset_mask", *own, *("images",) * ("image" in own))
        chosen, count = check_options(options, known), self.num_envs
        slots = np.arange(count)
        if "reset_mask" in chosen:
            slots = check_mask(chosen["reset_mask"], count)
            self.core.ready()
        if seed is not None and np.ndim(seed) == 0:
            first = check_seed(seed)
            seeds: list[Any] = [check_seed(first + i) for i in range(count)]
        else:
            seeds = per_slot(seed, count, "seed")
        starts = per_slot(chosen.get("start"), count, "start")
        frames, texts = self._own_frames(chosen), self._texts(chosen)
        obs_B, index_n = self.core.reset(
            slots=None if len(slots) == count else slots.tolist(),
            seeds=[seeds[i] for i in slots], starts=[starts[i] for i in slots],
            frames=[frames[i] for i in slots],
            texts=None if texts is None else [texts[i] for i in slots])
        if seed is not None and np.ndim(seed) == 0:
            super().reset(seed=int(seed))
        self._screen.after_reset(slots)
        start_B, mask_B = np.zeros(count, np.int64), np.zeros(count, bool)
        start_B[slots], mask_B[slots] = index_n, True
        return obs_B, {"start": start_B, "_start": mask_B}

    def _texts(self, chosen: dict[str, Any]) -> list[dict[str, Any]] | None:
        told = {k: per_slot(chosen[k], self.num_envs, k) for k in TEXTS if k in chosen}
        if not told:
            return None
        return [{k: v[i] for k, v in told.items()} for i in range(self.num_envs)]

    def _own_frames(self, chosen: dict[str, Any]) -> list[Any]:
        if "image" in chosen:
            return [self.core.task.starts.picture(chosen["image"])] * self.num_envs
        if "images" in chosen:
            chosen = {"frames": [p if p is None else self.core.task.starts.picture(p)
                                 for p in chosen["images"]]}
        if "frames" not in chosen:
            return [chosen.get("frame")] * self.num_envs
        frames = chosen["frames"]
        if len(frames) != self.num_envs:
            raise ShapeError("wrong number of start frames", given=len(frames),
                             expected=self.num_envs,
                             fix='give one image for every slot in "frames"')
        return list(frames)

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Generate one chunk in every slot; see the class for what happens at ends."""
        batch = self.core.step(actions, self.autoreset_mode.value)
        self._screen.after_step(batch)
        if batch.finished is not None:
            self._screen.after_reset(batch.finished)
        return (batch.obs_B, batch.reward_B, batch.terminated_B, batch.truncated_B,
                self._infos(batch))

    def _infos(self, batch: Batch) -> dict[str, Any]:
        if batch.finished is None:
            return self._step_info(batch, batch.stepped_B)
        over_B = batch.terminated_B | batch.truncated_B
        infos = self._step_info(batch, ~over_B)
        final = np.full(self.num_envs, None, object)
        for row, slot in enumerate(batch.finished):
            final[slot] = batch.final_obs[row].copy()  # type: ignore[index]
        return {**infos, "final_obs": final, "_final_obs": over_B,
                "final_info": self._step_info(batch, over_B), "_final_info": over_B.copy()}

    def _step_info(self, batch: Batch, rows_B: np.ndarray) -> dict[str, Any]:
        """Info of the slots in ``rows_B``, in Gymnasium's layout: arrays, each with its mask."""
        infos: dict[str, Any] = {}

        def add(name: str, values: np.ndarray, mask_B: np.ndarray) -> None:
            if mask_B.any():
                infos[name], infos[f"_{name}"] = values, mask_B.copy()

        if batch.frames_BFHWC is not None:
            add("frames", self._frames(batch, rows_B), rows_B)
        if batch.first_frame_B is not None:
            add("first_frame", batch.first_frame_B.copy(), rows_B & (batch.first_frame_B > 0))
        for name, value in batch.notes.items():
            add(name, value.copy(), rows_B)
        if batch.uncertainty_B is not None:
            add("uncertainty", batch.uncertainty_B.copy(), rows_B)
        if batch.drift_B is not None:
            add("drift", batch.drift_B.copy(), rows_B)
        add("end_frame", batch.last_frame_B.copy(), rows_B & batch.terminated_B)
        if batch.truncated_B.any():
            words = np.array([None, *REASONS[1:]], object)
            add("truncation_reason", words[batch.reason_B], rows_B & batch.truncated_B)
        return infos

    def _frames(self, batch: Batch, rows_B: np.ndarray) -> np.ndarray:
        """(B, F, H, W, 3), or an object array of (f, H, W, 3) when some slot has fewer frames."""
        frames = batch.frames_BFHWC
        first_B = np.zeros(self.num_envs, int) if batch.first_frame_B is None else (
            batch.first_frame_B)
        short_B = rows_B & ((batch.last_frame_B < self.core.frames - 1) | (first_B > 0))
        if not short_B.any():
            return frames.copy()  # type: ignore[union-attr]
        ragged = np.full(self.num_envs, None, object)
        for slot in np.flatnonzero(rows_B):
            ragged[slot] = frames[slot, first_B[slot]:  # type: ignore[index]
                                  batch.last_frame_B[slot] + 1].copy()
        return ragged

    def render(self) -> tuple[Any, ...] | None:
        """A tuple with one frame (or list of frames) per slot; None for a window."""
        frames = self._screen.render()
        return None if frames is None else tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        """Give the memory pages back."""
        self._screen.close()
        self.core.close()
