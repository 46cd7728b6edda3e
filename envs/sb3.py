"""A learned world as a Stable-Baselines3 ``VecEnv``: the fastest way to train in a dream."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from worldgym.envs.core import Batch, DreamCore
from worldgym.envs.face import Face, check_options, own_start
from worldgym.envs.opening import ViewConfig, check_seed
from worldgym.envs.outcome import REASONS
from worldgym.envs.screen import MODES, Screen
from worldgym.envs.tasks import Task
from worldgym.errors import ActionError, ConfigError, MissingDependencyError

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise MissingDependencyError(
        "DreamVecEnv needs Stable-Baselines3", given="no stable_baselines3",
        expected="stable-baselines3>=2.7", fix="pip install 'worldgym[rl]'") from error


class DreamVecEnv(Face, VecEnv):
    """B dreams for SB3; a finished slot is reset in the same step.

    The info of a finished slot holds ``terminal_observation``, ``TimeLimit.truncated`` (SB3
    bootstraps from both), ``truncation_reason`` or ``end_frame``, and ``episode`` with return
    ``r``, length ``l`` in steps and ``t`` in seconds of game time (no wall-clock anywhere).
    Other slots' infos stay empty, so that the wrapper costs next to nothing.

    Args:
        task: what is dreamt. num_envs: B, at least 1.
        render_mode: None, "rgb_array" or "human". view: as in ``DreamEnv``.
    """

    def __init__(
        self, task: Task, num_envs: int = 1, *, render_mode: str | None = None, **view: Any
    ) -> None:
        if render_mode == "rgb_array_list":
            raise ConfigError("render mode without meaning here", given=repr(render_mode),
                              expected='None, "rgb_array" or "human"',
                              fix='pass render_mode="rgb_array"')
        view.setdefault("info_frames", False)
        view.setdefault("flat_actions", True)  # SB3 has no Dict actions
        self._settings = {"render_mode": render_mode, **view}
        self.core = DreamCore(task, num_envs, ViewConfig(**view))
        self._screen = Screen(render_mode, self.core)
        self.render_mode = render_mode
        self._actions: Any = None
        super().__init__(self.core.num_slots, self.core.observation_space, self.core.action_space)
        self.metadata = {**self._describe(), "render_modes": [m for m in MODES if m != MODES[1]]}

    def _sibling(self) -> "DreamVecEnv":
        return type(self)(self.core.task, self.num_envs, **self._settings)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds of the next reset: slot i gets seed + i; None draws from the operating system."""
        first = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else (
            check_seed(seed))
        self._seeds = [first + i for i in range(self.num_envs)]
        return self._seeds

    def reset(self) -> np.ndarray:
        """Start an episode in every slot, with the seeds and options that were set."""
        self.core.check_open()
        known = ("start", "frame", *self.core.start_options)
        chosen = [check_options(o, known) for o in self._options]
        own = [own_start(self.core, c) for c in chosen]
        obs_B, index_B = self.core.reset(
            seeds=self._seeds, starts=[c.get("start") for c in chosen],
            frames=[frame for frame, _ in own],
            texts=[t for _, t in own] if any(t for _, t in own) else None)
        self._screen.after_reset()
        self._actions = None
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{"start": int(i)} for i in index_B]
        return obs_B

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Generate one chunk in every slot."""
        self.core.ready()
        if self._actions is None:
            raise ActionError("no action is waiting", given="step_wait() alone",
                              expected="step_async(actions) first", fix="call step(actions)")
        actions, self._actions = self._actions, None
        batch = self.core.step(actions, "SameStep")
        self._screen.after_step(batch)
        done_B = batch.terminated_B | batch.truncated_B
        return batch.obs_B, batch.reward_B.astype(np.float32), done_B, self._infos(batch)

    def _infos(self, batch: Batch) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if batch.uncertainty_B is not None:
            for info, value in zip(infos, batch.uncertainty_B.tolist(), strict=True):
                info["uncertainty"] = value
        if batch.frames_BFHWC is not None:
            for info, frames, last in zip(infos, batch.frames_BFHWC, batch.last_frame_B,
                                          strict=True):
                info["frames"] = frames[: last + 1]
        for row, slot in enumerate(() if batch.finished is None else batch.finished.tolist()):
            info, truncated = infos[slot], bool(batch.truncated_B[slot])
            info["terminal_observation"] = batch.final_obs[row].copy()  # type: ignore[index]
            info["TimeLimit.truncated"] = truncated
            length = int(batch.length_B[slot])
            info["episode"] = {"r": float(batch.return_B[slot]), "l": length,
                               "t": length / self.core.control_rate}
            if truncated:
                info["truncation_reason"] = REASONS[batch.reason_B[slot]]
            else:
                info["end_frame"] = int(batch.last_frame_B[slot])
        return infos

    def set_state(self, state: Any) -> None:
        """Go on from a state of this env, or of another with the same settings."""
        super().set_state(state)
        self._actions = None

    def get_images(self) -> list[np.ndarray]:
        """The newest frame of every slot."""
        return list(self.core.current_frames())

    def render(self, mode: str | None = None) -> np.ndarray | None:
        """All slots in one picture; a window if the env was made with render_mode="human"."""
        if self.render_mode == "human":
            self._screen.render()
            return None
        return super().render(mode)

    def close(self) -> None:
        """Give the memory pages back."""
        self._screen.close()
        self.core.close()

    # -------------------------------------------------- SB3's access to "each" environment

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, which all slots share, once per slot."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute for all slots at once.

        Raises:
            ConfigError: only some slots were asked for; slots share their attributes.
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ConfigError("slots share their attributes", given=f"indices={indices}",
                              expected="indices=None", fix="make another env for other settings")
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """``render``, ``get_state`` or ``get_wrapper_attr`` of single slots.

        Raises:
            AttributeError: any other name (SB3 asks that way whether a method exists).
        """
        slots = list(self._get_indices(indices))
        if method_name == "render":
            frames = self.core.current_frames()
            return [frames[s] for s in slots]
        if method_name == "get_state":
            whole = self.get_state()
            return [whole.select([s]) for s in slots]
        if method_name == "get_wrapper_attr":
            return [getattr(self, *method_args)] * len(slots)
        raise AttributeError(f"a slot of DreamVecEnv has no method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """No slot is ever wrapped."""
        return [False] * len(list(self._get_indices(indices)))
