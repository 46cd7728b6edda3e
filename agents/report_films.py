"""Films for a report: the last seconds of evaluated real episodes, dreamt with the same actions.

Shapes: T frames of a film.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from worldgym.agents import video
from worldgym.agents.games import game_maker
from worldgym.agents.ledger import fingerprint
from worldgym.agents.policy import Policy
from worldgym.agents.replays import context_of
from worldgym.agents.scripted import parse_policy
from worldgym.agents.video import Reel
from worldgym.errors import CheckpointError

SECONDS = 6.0
EACH = 2  # films of the most and of the least different kind, and policies of either kind
EPISODES = 2  # episodes tried of each policy: its first ones, so that nobody chose them
CONTROLS = 48  # rows below the picture, for the browser's buttons
LONGEST = 2_000  # real steps; of a longer episode the last seconds before this are shown


@dataclass(frozen=True, kw_only=True)
class Film:
    """One episode's last seconds, real and dreamt; returns are those within the film.

    ``picture_error``: root mean square difference of the frames that both show, in grey levels
    (0 to 255); None where there is none. ``steps``: actions that were dreamt.
    """

    kind: str
    policy: str
    episode: int
    seed: int
    steps: int
    real_return: float
    dream_return: float
    real_ended: bool
    dream_ended: bool
    picture_error: float | None
    mp4: bytes

    def to_json(self) -> dict[str, Any]:
        """Everything but the film itself."""
        return {k: v for k, v in asdict(self).items() if k != "mp4"}


@dataclass(frozen=True)
class _Take:
    policy: str
    episode: int
    seed: int
    count: int
    real: Reel
    dream: Reel

    @property
    def returns(self) -> tuple[float, float]:
        return (float(self.real.rewards[self.count:].sum()),
                float(self.dream.rewards[self.count:].sum()))

    @property
    def picture_error(self) -> float | None:
        last = min(len(self.real.frames) - self.real.ended, len(self.dream.frames))
        if last <= self.count:
            return None
        shown = slice(self.count, last)
        gap = self.real.frames[shown].astype(np.float64) - self.dream.frames[shown]
        return float(np.sqrt((gap**2).mean()))

    @property
    def difference(self) -> tuple[float, float]:
        real, dream = self.returns
        return (round(abs(real - dream), 6), self.picture_error or 0.0)


class _Episode:
    """A policy that plays one episode of an evaluation, with the luck it had there."""

    def __init__(self, player: Policy, number: int, settings: Mapping[str, Any]) -> None:
        self.name, self.player, self.number = player.name, player, number
        self.episodes, self.first = int(settings["episodes"]), int(settings["seed"])

    def reset(self, n: int, seed: int) -> None:
        self.player.reset(self.episodes, self.first)

    def act(self, frames_NHWC: np.ndarray, t: int | np.ndarray,
            slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        return self.player.act(frames_NHWC, t, [self.number])


def disagreements(data: Mapping[str, Any], settings: Mapping[str, Any],
                  task: Any = None) -> list[Film]:
    """Films of the most and then of the least different replays, at most two of each.

    Tried are the first two episodes of the policies with the largest and the smallest optimism
    (either sign). The world is shown the real frames before the last six seconds, then dreams on
    with the actions that the policy took in the game. Two replays are compared by the difference
    of what they pay, equal ones by their pictures.

    Args:
        data: content of evaluation.json, with real episodes.
        settings: content of the settings.json beside it.
        task: default: the evaluation's world, loaded by its name.

    Raises:
        ConfigError: the world, a policy or the real game cannot be found any more.
        CheckpointError: the world or a policy is not the one that was evaluated.
        MissingDependencyError: without what the game or a film needs.
    """
    task = _task(settings) if task is None else task
    if task.world.fingerprint != settings["fingerprint"]:
        raise CheckpointError("not the world that was evaluated", given=task.world.fingerprint,
                              expected=settings["fingerprint"],
                              fix="evaluate again, or restore the world")
    takes = []
    for name in _policies(data):
        player = _player(task, name, settings)
        takes += [_take(task, player, name, episode, settings)
                  for episode in range(min(EPISODES, data["episodes"]))]
    takes.sort(key=lambda take: take.difference, reverse=True)
    least = min(EACH, len(takes) // 2)
    chosen = [("most", take) for take in takes[:min(EACH, len(takes) - least)]]
    chosen += [("least", take) for take in takes[len(takes) - least:]]
    return [_film(task, kind, take) for kind, take in chosen]


def _task(settings: Mapping[str, Any]) -> Any:
    from worldgym.envs.tasks import load_task

    return load_task(settings["world"])


def _player(task: Any, name: str, settings: Mapping[str, Any]) -> Policy:
    """A policy of the evaluation, made anew."""
    source, hash_ = next((s, h) for n, s, h in [*settings["policies"], (name, "", None)]
                         if n == name)
    if fingerprint(source) != hash_:
        raise CheckpointError("not the policy that was evaluated", given=f"{name}, {source}",
                              expected=f"a file of hash {hash_}" if hash_ else "settings with it",
                              fix="evaluate again, or restore the file")
    player = parse_policy(source, task.world.spec.action, task.world, task)
    if settings["draw"] and hasattr(player, "deterministic"):
        player.deterministic = False
    return player


def _policies(data: Mapping[str, Any]) -> list[str]:
    """Names of the policies with the largest and the smallest optimism, without repetition."""
    order = sorted(data["policies"], key=lambda p: -abs(p["optimism"]["value"]))
    names = [p["name"] for p in order]
    return list(dict.fromkeys([*names[:EACH], *names[-EACH:]]))


def _take(task: Any, player: Policy, name: str, number: int,
          settings: Mapping[str, Any]) -> _Take:
    seed = int(settings["seed"]) + number
    whole = video.real_reel(game_maker(task), _Episode(player, number, settings), seed, LONGEST)
    keep = max(2, int(SECONDS * _rate(task)))
    real = Reel(whole.frames[-keep:], whole.actions[-keep:], whole.rewards[-keep:], whole.ended)
    count = min(context_of(task.world), len(real.frames) - 1)
    dream = video.dream_after(task.world, real, count, seed)
    return _Take(name, number, seed, count, real, dream)


def _rate(task: Any) -> float:
    """Frames of a film per second."""
    return float(task.world.spec.fps / task.world.spec.frames_per_chunk)


def _film(task: Any, kind: str, take: _Take) -> Film:
    (real, dream), error = take.returns, take.picture_error
    pictures = video.panels([("real game", take.real), ("dream, same actions", take.dream)])
    framed = [np.pad(p, ((0, CONTROLS), (0, 0), (0, 0)), constant_values=24) for p in pictures]
    with TemporaryDirectory() as folder:
        mp4 = video.write(Path(folder) / "film.mp4", framed, _rate(task)).read_bytes()
    return Film(kind=kind, policy=take.policy, episode=take.episode, seed=take.seed,
                steps=len(take.real.frames) - take.count, real_return=real, dream_return=dream,
                real_ended=bool(take.real.ended), dream_ended=bool(take.dream.ended),
                picture_error=error, mp4=mp4)
