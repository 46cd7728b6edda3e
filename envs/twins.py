"""Real games behind one interface: the twins that worlds are recorded from and judged by.

Shapes: H W frame pixels, n environments. Frames are uint8 (H, W, 3), RGB.

Take Cover facts (vizdoom 1.3.2, measured): 160x120 screen, 4 tics per step at 35 tics per second;
Discrete(3): 0 stand, 1 right, 2 left; reward 1 per tic lived, so 4 per step and 1 to 4 on the last.
Death reports ``terminated`` and its frame is black, because the game has no screen any more. The
game itself never times out; the twin truncates at 2100 tics (525 steps, the usual limit of this
task), where ``truncated`` is True, ``terminated`` is False and the frame is a real one.
The first frame of every episode is the same whatever the seed; monsters appear later.
Everything happens between rows 31 and 95 of the screen (above and below it are bare ceiling and
floor), so that is what frames show: 64 rows and 160 columns, halved.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldgym.envs.pixels import check_hw, check_rows, load_cv2, resize
from worldgym.errors import (
    ClosedError,
    ConfigError,
    DTypeError,
    MissingDependencyError,
    ResetNeeded,
    ShapeError,
    SlotError,
)

TAKE_COVER = "VizdoomTakeCover-v1"
TWINS = {"worldgym/TakeCover-v0": TAKE_COVER, "TakeCover": TAKE_COVER, TAKE_COVER: TAKE_COVER}
FRAME_SKIP, TICS_PER_SECOND, TIMEOUT_TICS = 4, 35, 2100
TAKE_COVER_ROWS, TAKE_COVER_HW, ANY_HW = (31, 95), (32, 80), (48, 80)
SMALLEST_IMAGE = 16  # pixels; MiniGrid's 7x7x3 "image" is a table of symbols, not a picture

# families whose ids appear only after an import: (id prefix, module, pip name)
FAMILIES = (("Vizdoom", "vizdoom.gymnasium_wrapper", "vizdoom"), ("ALE/", "ale_py", "ale-py"),
            ("MiniGrid-", "minigrid", "minigrid"))
ACTION_SPACES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box)


def real_env(name: str, frame_hw: tuple[int, int] | None = None, *, full_frame: bool = False,
             rows: tuple[int, int] | None = None, key: str | None = None, source: str = "auto",
             **kwargs: Any) -> gym.Env:
    """The real game as a Gymnasium environment with uint8 (H, W, 3) observations.

    ``reset(seed=s)`` gives the same episode for the same actions, whatever was played before.

    Args:
        name: "worldgym/TakeCover-v0" (or a Gymnasium id; any game that shows an image).
        frame_hw: height and width of the observation, pixels; default 32x80 for Take Cover, else
            48x80.
        rows: first row of the original image to show, and the one after the last; default: all,
            in Take Cover (31, 95).
        full_frame: also put the original image into ``info["screen"]``.
        key: which entry of a Dict observation is the image; default: the only one that is.
        source: "observation", "render", or "auto" (the observation if it is an image).
        kwargs: for ``gymnasium.make``; ``max_episode_steps`` changes the time limit.

    Raises:
        ConfigError: unknown id, no image, unsupported action space, impossible size.
        MissingDependencyError: the game's package or OpenCV is not installed.
    """
    env_id = TWINS.get(name, name)
    if env_id == TAKE_COVER:
        rows = rows or TAKE_COVER_ROWS
    frame_hw = check_hw(frame_hw or default_hw(name))
    recipe = {"id": env_id, "frame_hw": list(frame_hw), "rows": rows and list(rows),
              "key": key, "source": source, "kwargs": dict(kwargs)}
    env: gym.Env | None
    if env_id == TAKE_COVER:
        base = {"frame_skip": FRAME_SKIP, "screen_resolution": "RES_160X120",
                "doom_config_path": f"{_scratch().name}/vizdoom.ini"}
        skip = kwargs.get("frame_skip", FRAME_SKIP)
        base["max_episode_steps"] = TIMEOUT_TICS // skip
        env = _make(env_id, **(base | kwargs))
        return ImageObservation(env, frame_hw, key="screen", source="observation",
                                full_frame=full_frame, rows=rows, health="gamevariables",
                                recipe=recipe, fps=TICS_PER_SECOND / skip)
    if source not in ("auto", "observation", "render"):
        raise ConfigError("unknown source of the image", given=source,
                          expected="'auto', 'observation' or 'render'", fix="use 'auto'")
    env = None if source == "render" else _make(env_id, **kwargs)
    if env is None or (source == "auto" and key is None and not _image_keys(env)):
        if env is not None:
            env.close()
        env, source = _make(env_id, **({"render_mode": "rgb_array"} | kwargs)), "render"
    try:
        return ImageObservation(env, frame_hw, key=key, source=source, full_frame=full_frame,
                                rows=rows, recipe=recipe)
    except Exception:
        env.close()
        raise


def default_hw(name: str) -> tuple[int, int]:
    """Frame size of a game's observations where none is asked for."""
    return TAKE_COVER_HW if TWINS.get(name, name) == TAKE_COVER else ANY_HW


def real_env_factory(name: str, frame_hw: tuple[int, int] | None = None,
                     **kwargs: Any) -> Callable[[], gym.Env]:
    """A picklable function that makes ``real_env(name, frame_hw, **kwargs)``, for vector envs."""
    return partial(real_env, name, check_hw(frame_hw or default_hw(name)), **kwargs)


class ImageObservation(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Any environment with a picture, as uint8 (H, W, 3) observations; actions pass through.

    Args:
        env: environment; for ``source="render"`` made with render_mode="rgb_array".
        frame_hw: height and width, pixels.
        key: entry of a Dict observation; default: the only image in it.
        source: "observation", "render" or "auto".
        rows: rows of the original image to show, as (first, one after the last); default: all.
        full_frame: put the original image into ``info["screen"]``.
        health: entry of a Dict observation whose first number becomes ``info["health"]``.
        recipe: how the environment was made, as JSON values (kept with recordings).
        fps: steps per second of game time; default: the environment's ``render_fps``.

    ``render()`` gives the newest original image.
    """

    def __init__(self, env: gym.Env, frame_hw: tuple[int, int] = ANY_HW, *,
                 key: str | None = None, source: str = "auto", full_frame: bool = False,
                 rows: tuple[int, int] | None = None, health: str | None = None,
                 recipe: dict[str, Any] | None = None, fps: float | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(
            self, frame_hw=frame_hw, key=key, source=source, full_frame=full_frame, rows=rows,
            health=health, recipe=recipe, fps=fps)
        gym.Wrapper.__init__(self, env)
        self.frame_hw, self.full_frame, self.health = check_hw(frame_hw), full_frame, health
        self._cv2 = load_cv2()
        if not isinstance(env.action_space, ACTION_SPACES):
            raise ConfigError("unsupported action space", given=env.action_space,
                              expected="Discrete, MultiDiscrete, MultiBinary or Box",
                              fix="wrap the game with FlattenAction or a wrapper of your own")
        self.key, self.source = self._choose(key, source)
        self.observation_space = spaces.Box(0, 255, (*self.frame_hw, 3), np.uint8)
        self.fps = float(fps or env.metadata.get("render_fps") or 30)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": self.fps}
        self.recipe = dict(recipe or {})
        self.rows = None if rows is None else check_rows(rows)
        self._screen: np.ndarray | None = None
        self._unit_scale = self._is_unit_scale()

    @property
    def render_mode(self) -> str:  # type: ignore[override]
        """Always "rgb_array"."""
        return "rgb_array"

    def _choose(self, key: str | None, source: str) -> tuple[str | None, str]:
        """(key, "observation" or "render") of the picture, or ConfigError."""
        images = _image_keys(self.env)
        if source == "auto":
            source = "observation" if images or key is not None else "render"
        if source == "render":
            if self.env.render_mode != "rgb_array":
                raise ConfigError(
                    "the environment shows no image",
                    given=f"{self.env.observation_space}, render_mode={self.env.render_mode!r}",
                    expected="an image observation, or render_mode='rgb_array'",
                    fix="make it with render_mode='rgb_array', if it can draw")
            return None, source
        if key is None and len(images) == 1:
            return images[0], source
        if key not in images:
            raise ConfigError(
                "no such image in the observation" if key else "which image is meant?",
                given=f"key={key!r} of {self.env.observation_space}",
                expected=f"one of {images}" if images else "an environment with image observations",
                fix="name one with key=..." if images else "use source='render'")
        return key, source

    def _is_unit_scale(self) -> bool:
        if self.source == "render":
            return False
        space = _entry(self.env.observation_space, self.key)
        return space.dtype is not None and space.dtype.kind == "f"

    def _picture(self, observation: Any) -> np.ndarray:
        """The original image, uint8 (h, w, 3)."""
        raw = self.env.render() if self.source == "render" else (
            observation if self.key is None else observation[self.key])
        image = np.asarray(raw)
        if self._unit_scale:
            image = np.round(image * 255).clip(0, 255).astype(np.uint8)
        if image.ndim == 3 and image.shape[-1] not in (1, 3, 4) and image.shape[0] in (1, 3):
            image = image.transpose(1, 2, 0)
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or image.dtype != np.uint8:
            raise ShapeError("the game gave no image", given=f"{image.dtype} {image.shape}",
                             expected="uint8 (h, w, 3)", fix="check render() of the environment")
        return np.repeat(image, 3, 2) if image.shape[-1] == 1 else image[..., :3]

    def _see(self, observation: Any, info: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        self._screen = np.ascontiguousarray(self._picture(observation))
        info = dict(info)
        if self.full_frame:
            info["screen"] = self._screen.copy()
        if self.health is not None:
            info["health"] = float(observation[self.health][0])
        return resize(self._shown(self._screen), self.frame_hw), info

    def _shown(self, image: np.ndarray) -> np.ndarray:
        """The rows that are observed."""
        if self.rows is None:
            return image
        if self.rows[1] > len(image):
            raise ConfigError("the picture has too few rows", given=f"{len(image)} rows",
                              expected=f"rows up to {self.rows[1]}", fix="change rows")
        return image[self.rows[0]:self.rows[1]]

    def reset(self, *, seed: int | None = None,
              options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns frame (H, W, 3) and info."""
        return self._see(*self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step; the flags are Python bools, the reward is a Python float."""
        if isinstance(self.action_space, spaces.Discrete):
            action = int(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        frame, info = self._see(observation, info)
        return frame, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray:
        """The newest original image, uint8 (h, w, 3)."""
        if self._screen is None:
            raise ResetNeeded("nothing to render", given="render() before reset()",
                              expected="an episode", fix="call reset() first")
        return self._screen.copy()


class RealBatch:
    """``n`` real environments in one process, stepped together, never reset on their own.

    For scoring batched policies: the caller decides which slots go on and which start again.

    >>> from worldgym.envs.twins import RealBatch, real_env_factory
    >>> batch = RealBatch(real_env_factory("CartPole-v1", (32, 32)), 2)
    >>> batch.reset([0, 1]).shape
    (2, 32, 32, 3)
    >>> frames, rewards, terminated, truncated, infos = batch.step([0, 1])
    >>> batch.close()
    """

    def __init__(self, env_factory: Callable[[], gym.Env], n: int) -> None:
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
            raise ConfigError("impossible number of environments", given=n,
                              expected="an integer >= 1", fix="use at least one")
        self.envs = [env_factory() for _ in range(int(n))]
        self.num_envs = int(n)
        self.observation_space = self.envs[0].observation_space
        self.action_space = self.envs[0].action_space
        self.running = np.zeros(n, bool)
        self._closed = False

    def _slots(self, slots: Sequence[int] | np.ndarray | None, count: int | None) -> list[int]:
        if self._closed:
            raise ClosedError("the batch is closed", given="a call after close()",
                              expected="an open batch", fix="make a new RealBatch")
        chosen = list(range(self.num_envs)) if slots is None else [int(i) for i in slots]
        if len(set(chosen)) < len(chosen) or not all(0 <= i < self.num_envs for i in chosen):
            raise SlotError("impossible slots", given=chosen,
                            expected=f"distinct integers in [0, {self.num_envs - 1}]",
                            fix="name each slot once")
        if count is not None and count != len(chosen):
            raise ShapeError("one value per slot is needed", given=f"{count} values",
                             expected=f"{len(chosen)} values", fix="pass one value for every slot")
        return chosen

    def reset(self, seeds: Sequence[int | None], slots: Sequence[int] | None = None) -> np.ndarray:
        """Start episodes in these slots (default all); returns frames (n, H, W, 3)."""
        chosen = self._slots(slots, len(seeds))
        frames = [self.envs[i].reset(seed=None if s is None else int(s))[0]
                  for i, s in zip(chosen, seeds, strict=True)]
        self.running[chosen] = True
        return np.stack(frames)

    def step(self, actions: Any, slots: Sequence[int] | None = None
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step these slots (default all).

        Returns: frames (n, H, W, 3), rewards float64 (n,), terminated (n,), truncated (n,), infos.
        """
        chosen = self._slots(slots, len(actions))
        ended = [i for i in chosen if not self.running[i]]
        if ended:
            raise ResetNeeded("these slots have no running episode", given=ended,
                              expected="slots that were reset and have not ended",
                              fix="call reset(seeds, slots), or step only running slots")
        out = [self.envs[i].step(a) for i, a in zip(chosen, actions, strict=True)]
        frames, rewards, terminated, truncated, infos = zip(*out, strict=True)
        ends = np.array(terminated) | np.array(truncated)
        self.running[np.array(chosen)[ends]] = False
        return (np.stack(frames), np.array(rewards, np.float64), np.array(terminated),
                np.array(truncated), list(infos))

    def close(self) -> None:
        """Close every environment. Safe to repeat."""
        if not self._closed:
            for env in self.envs:
                env.close()
        self._closed = True


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory:
    """A folder of this process, for the ini file that ViZDoom would leave in the current one."""
    return tempfile.TemporaryDirectory(prefix="worldgym-")


def _make(env_id: str, **kwargs: Any) -> gym.Env:
    """``gymnasium.make`` with the package of the id imported, and named errors."""
    if not isinstance(env_id, str):
        raise DTypeError("an environment id is a string", given=type(env_id).__name__,
                         expected="for example 'worldgym/TakeCover-v0'", fix="pass the id")
    for prefix, module, package in FAMILIES:
        if env_id.startswith(prefix):
            try:
                loaded = importlib.import_module(module)
            except ImportError as error:
                raise MissingDependencyError(
                    f"{env_id} needs {package}", given=str(error), expected=f"{package} installed",
                    fix=f"pip install {package}") from error
            if module == "ale_py":
                gym.register_envs(loaded)
    try:
        return gym.make(env_id, disable_env_checker=True, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        raise MissingDependencyError(f"{env_id} needs another package", given=str(error),
                                     expected="its packages installed",
                                     fix="install what the message names") from error
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise ConfigError("unknown environment", given=f"{env_id!r} ({error})",
                          expected=f"one of {sorted(TWINS)} or a registered Gymnasium id",
                          fix="check the spelling, or import the package that registers it"
                          ) from error


def _is_image(space: spaces.Space) -> bool:
    """A Box that holds one picture: (h, w), (h, w, 1|3|4) or (1|3, h, w), uint8 or in [0, 1]."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    shape = space.shape
    if len(shape) == 3 and shape[-1] in (1, 3, 4):
        size = shape[:2]
    elif len(shape) == 3 and shape[0] in (1, 3):
        size = shape[1:]
    elif len(shape) == 2:
        size = shape
    else:
        return False
    unit = space.dtype.kind == "f" and (space.low >= 0).all() and (space.high <= 1).all()
    return min(size) >= SMALLEST_IMAGE and (space.dtype == np.uint8 or bool(unit))


def _entry(space: spaces.Space, key: str | None) -> spaces.Space:
    return space if key is None else space[key]  # type: ignore[index]


def _image_keys(env: gym.Env) -> list[str | None]:
    """Where the observation holds images: [None] for itself, keys of a Dict, or nothing."""
    space = env.observation_space
    if isinstance(space, spaces.Dict):
        return [k for k, sub in space.spaces.items() if _is_image(sub)]
    return [None] if _is_image(space) else []
