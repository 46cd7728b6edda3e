"""One call from a name to an environment; also the entry points of the registered ids."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from worldgym.envs import scope
from worldgym.envs.dream import DreamEnv
from worldgym.envs.opening import ViewConfig
from worldgym.envs.tasks import Task, check_names, load_task
from worldgym.envs.vector import DreamVectorEnv
from worldgym.errors import ConfigError

TASK_SETTINGS = ("horizon", "distrust", "drift", "penalty", "hazard", "forks", "reward", "end",
                 "spread", "starts")
VIEW_SETTINGS = tuple(f.name for f in fields(ViewConfig))

LOADED = ("device", "temperature", "slide")  # settings of the world itself

World = str | Path | Task


def _split(world: World, settings: dict[str, Any], own: tuple[str, ...]) -> tuple[Task, dict]:
    """The task with its settings applied, and the face's settings."""
    loaded = scope.SETTINGS if str(world) == scope.ID else LOADED
    check_names(settings, [*own, *VIEW_SETTINGS, *TASK_SETTINGS, *loaded, "max_episode_steps"],
                "env setting")
    rest = dict(settings)
    load, steps = {k: rest.pop(k) for k in loaded if k in rest}, rest.pop("max_episode_steps", None)
    changes = {name: rest.pop(name) for name in TASK_SETTINGS if name in rest}
    view = {name: rest[name] for name in VIEW_SETTINGS if name in rest}
    ViewConfig(**view)  # refuse a bad setting before a world is loaded
    if isinstance(world, Task):
        if load:
            raise ConfigError(f"{' and '.join(load)} of a task that is already loaded", given=load,
                              expected="a name or folder", fix="load_task(name, ...) with these")
        task = replace(world, **changes)
    elif str(world) == scope.ID:
        task = replace(scope.load_scope(**load), **changes)
    else:
        task = load_task(world, **load, **changes)
    if steps is not None:
        replace(task, horizon=steps)  # refuses nonsense
        task = replace(task, horizon=steps if task.horizon is None else min(steps, task.horizon))
    return task, rest


def make_dream(world: World, **settings: Any) -> DreamEnv:
    """A ``DreamEnv`` of a registered id, a world's folder or a ``Task``.

    Args:
        world: "worldgym/TakeCover-v0", a folder that ``worldgym fit`` wrote, or a task.
        settings: render_mode; observation, frame_stack, actions, info_frames; horizon, distrust,
            drift, penalty, hazard, forks, reward, end, spread, starts; max_episode_steps; device,
            temperature, slide; SCOPE's: see ``worldgym.envs.scope.load_scope``.

    Raises:
        ConfigError: an unknown or impossible setting. CheckpointError: files are missing or broken.
    """
    task, rest = _split(world, settings, ("render_mode",))
    return DreamEnv(task, **rest)


def make_dream_vector(world: World, num_envs: int = 1, **settings: Any) -> DreamVectorEnv:
    """A ``DreamVectorEnv``; settings as in ``make_dream``, and ``autoreset_mode``."""
    task, rest = _split(world, settings, ("render_mode", "autoreset_mode"))
    return DreamVectorEnv(task, num_envs, **rest)


def make_dream_vec(world: World, num_envs: int = 1, **settings: Any) -> Any:
    """A ``DreamVecEnv`` for Stable-Baselines3; settings as in ``make_dream``."""
    from worldgym.envs.sb3 import DreamVecEnv

    task, rest = _split(world, settings, ("render_mode",))
    return DreamVecEnv(task, num_envs, **rest)


def take_cover(**settings: Any) -> DreamEnv:
    """Entry point of ``gymnasium.make("worldgym/TakeCover-v0")``."""
    return make_dream("worldgym/TakeCover-v0", **settings)


def take_cover_vector(num_envs: int = 1, **settings: Any) -> DreamVectorEnv:
    """Entry point of ``gymnasium.make_vec("worldgym/TakeCover-v0")``."""
    return make_dream_vector("worldgym/TakeCover-v0", num_envs, **settings)


def take_cover_wham(**settings: Any) -> DreamEnv:
    """Entry point of ``gymnasium.make("worldgym/TakeCover-WHAM-v0")``."""
    return make_dream("worldgym/TakeCover-WHAM-v0", **settings)


def take_cover_wham_vector(num_envs: int = 1, **settings: Any) -> DreamVectorEnv:
    """Entry point of ``gymnasium.make_vec("worldgym/TakeCover-WHAM-v0")``."""
    return make_dream_vector("worldgym/TakeCover-WHAM-v0", num_envs, **settings)
