"""Trained players: an agent file as a ``Player`` that acts in real games and dreams alike."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents.model import build_policy, load_weights, read_facts
from worldgym.agents.party import Player, party_policy
from worldgym.envs.party_scene import Scene, positions
from worldgym.envs.party_view import PartyView, Players
from worldgym.errors import ConfigError


@functools.lru_cache(maxsize=16)
def _loaded(path: str, stamp: int) -> tuple[Any, PartyView]:
    facts = read_facts(path)
    if facts["observation"] != "crop" or "view" not in facts:
        raise ConfigError("not an agent for games of several players", given=path,
                          expected="an agent.zip that `worldgym train-party` wrote",
                          fix="train one with `worldgym train-party`")
    policy = build_policy(facts)
    load_weights(policy, path)
    policy.set_training_mode(False)
    return policy, PartyView(**facts["view"])


class TrainedPlayer(Player):
    """One player of a trained network; every seat may have its own.

    Args:
        path: agent.zip of ``worldgym train-party``.
        draw: draw actions as in training, or take the most probable one.
    """

    def __init__(self, path: str | Path, draw: bool = True) -> None:
        self.name, self.draw = str(path), draw
        stamp = Path(path).stat().st_mtime_ns if Path(path).exists() else 0
        self.policy, self.view = _loaded(str(Path(path).resolve()), stamp)

    def reset(self, rng: np.random.Generator) -> None:
        """Begin an episode."""
        super().reset(rng)
        self.frames: deque[np.ndarray] = deque(maxlen=self.view.frame_stack)

    def watch(self, scene: Scene, i: int) -> None:
        """Keep the newest frames; an episode begins with copies of the first."""
        self.frames.append(scene.frame)
        while len(self.frames) < self.view.frame_stack:
            self.frames.append(scene.frame)

    def act(self, scene: Scene, i: int) -> int:
        """The action of player ``i``."""
        import torch

        with torch.no_grad():
            tensor, _ = self.policy.obs_to_tensor(self.see(scene, i))
            logits = self.policy.get_distribution(tensor).distribution.logits.numpy()[0]
        return int((logits + self.rng.gumbel(size=len(logits)) * self.draw).argmax())

    def see(self, scene: Scene, i: int) -> np.ndarray:
        """The observation (1, C, S, S) that it was trained on."""
        where = (positions(scene.cells_N2, scene.game) if scene.position_N2 is None
                 else scene.position_N2)[i]
        me = Players(position_BP2=where[None, None],
                     orientation_BP=scene.orientation_N[None, i:i + 1],
                     alive_BP=np.ones((1, 1), bool), ended_BP=np.zeros((1, 1), bool))
        stack = np.concatenate(list(self.frames), -1)[None]
        return np.ascontiguousarray(np.moveaxis(self.view.observe(stack, me)[0], -1, -3))


def party_player(text: str, draw: bool = True) -> Player:
    """A scripted player by its name, or a trained one by its file."""
    return TrainedPlayer(text, draw) if text.endswith(".zip") else party_policy(text)


def team(text: str | Sequence[str], players: int, draw: bool = True) -> list[Callable[[], Player]]:
    """One factory per seat.

    Args:
        text: one policy for everybody, or one for each player, joined by "+" or as a sequence.

    >>> len(team("gather+random", 2)), team(["gather"], 3)[2]().name
    (2, 'gather')
    """
    names = text.split("+") if isinstance(text, str) else list(text)
    if len(names) == 1:
        names = names * players
    if len(names) != players:
        raise ConfigError("policies do not fit the players", given=f"{len(names)} for {players}",
                          expected=f"1 or {players}", fix="give one policy, or one for each player")
    for name in set(names):
        party_player(name, draw)  # a misspelt one is refused before anything is played
    return [functools.partial(party_player, name, draw) for name in names]
