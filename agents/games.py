"""The real game behind a world: one place that knows how to open, record and wrap it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldgym.errors import ConfigError


def game_maker(task: Any) -> Callable[[], Any]:
    """A function that opens the task's real twin, showing frames of the world's size.

    Raises:
        ConfigError: the task has no real twin.
    """
    if task.twin is None:
        raise ConfigError("this world has no real game to score in", given=f"{task.name}, twin None",
                          expected="a task with a twin", fix="load_task(folder, twin='MyGame-v0')")
    from worldgym.envs.twins import real_env_factory

    return real_env_factory(task.twin, task.world.spec.frame_hw)


def plain_game(task: Any) -> Callable[[], Any]:
    """The twin as its makers ship it (Take Cover: 160x120, frame_skip 4), for speed comparisons."""
    if task.twin != "VizdoomTakeCover-v1":
        return game_maker(task)

    def make() -> Any:
        import gymnasium
        import vizdoom.gymnasium_wrapper  # noqa: F401  (registers the ids)

        return gymnasium.make(task.twin, frame_skip=4, screen_resolution="RES_160X120",
                              disable_env_checker=True)

    return make


def record(env: str, out: Path, steps: int, policies: tuple[str, ...], **settings: Any) -> Any:
    """``worldgym collect``."""
    from worldgym.envs.record import collect

    return collect(env, out, steps, policies, **settings)
