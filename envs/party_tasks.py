"""A party task: a world of several players, where its games start, and how long they last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from worldgym.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PartyTask:
    """What a multi-player dream needs.

    ``world``: a ``PartyWorld``; ``starts``: a bank with ``sample(seeds, episodes)`` and
    ``gather(index) -> Starts`` whose starts tell subjects, valid places and game; ``games``: names
    in the order of the model's game numbers; ``horizon``: steps after which an episode is cut.
    """

    world: Any
    starts: Any
    games: tuple[str, ...]
    horizon: int | None = 300
    name: str = "party"
    facts: dict = field(default_factory=dict)


def load_party(name: Any, *, device: str = "cpu") -> PartyTask:
    """The task of an id or of a world's folder."""
    raise ConfigError("no party world is shipped yet", given=str(name),
                      expected="a PartyTask", fix="build one: PartyTask(world=..., starts=...)")
