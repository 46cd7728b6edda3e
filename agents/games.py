"""The real game behind a world: one place that knows how to open, record and wrap it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worldgym.errors import ConfigError


def game_maker(task: Any) -> Callable[[], Any]:
    """A function that opens the task's real twin, showing frames of the world's size.

    Raises:
        ConfigError: the task has no real twin.
    """
    if task.twin is None:
        raise ConfigError("this world has no real game to score in", given=f"{task.name}, no twin",
                          expected="a task with a twin", fix="load_task(folder, twin='MyGame-v0')")
    from worldgym.envs.twins import real_env_factory

    return real_env_factory(task.twin, task.world.spec.frame_hw)


def unit(task: Any) -> str:
    """What one point of return is, where that has a name."""
    return "tics" if task.twin == "VizdoomTakeCover-v1" else ""


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


def record(env: str, out: Path, steps: int, policies: Sequence[str], *, seed: int = 0,
           frame_hw: tuple[int, int] | None = None, world: Any = None) -> Any:
    """``worldgym collect``: record until ``out`` holds ``steps`` steps, played by ``policies``.

    A policy may carry its share of the episodes: ``dodger@0.3``. ``world``: a world folder or id,
    read only if one of the policies was trained on latents.
    """
    from worldgym.agents.scripted import parse_policy
    from worldgym.envs.record import collect
    from worldgym.envs.spaces import action_spec
    from worldgym.envs.twins import real_env_factory

    factory = real_env_factory(env, frame_hw)
    game = factory()
    action = action_spec(game.action_space)
    game.close()

    def open_world() -> Any:
        from worldgym.envs.tasks import load_task

        if world is None:
            raise ConfigError("a latent policy needs its world", given="no --world",
                              expected="the world it was trained in", fix="add --world FOLDER")
        return load_task(world).world

    mix = []
    for text in policies:
        name, share = _share(text)
        policy = parse_policy(name, action, open_world)
        mix.append((name, share, lambda rng, policy=policy: policy))
    return collect(factory, out, steps=steps, policies=mix, seed=seed)


def remember_task(data: str | Path, world: str | Path) -> dict[str, Any]:
    """Write into a world's card which real game it was recorded from, and how long it plays.

    ``load_task(world)`` then knows the twin, and a horizon: the longest recorded episode.
    """
    import json

    from worldgym.agents.results import atomic_text
    from worldgym.data.store import Episodes

    episodes = Episodes.open(data)
    recipe = dict(episodes.env).get("recipe", {})
    card = Path(world) / "world.json"
    content = json.loads(card.read_text())
    task = {"twin": recipe.get("id"), "horizon": int(max(episodes.lengths)),
            **content.get("task", {})}
    atomic_text(card, json.dumps({**content, "task": task}, indent=1) + "\n")
    return task


def _share(text: str) -> tuple[str, float]:
    name, at, share = text.rpartition("@")
    if not at:
        return text, 1.0
    try:
        return name, float(share)
    except ValueError:
        raise ConfigError("a policy's share cannot be read", given=text, expected="POLICY@NUMBER",
                          fix="write for instance dodger@0.3") from None
