"""Scripted policies from bad to good, to see whether a dream tells them apart as the game does."""

from __future__ import annotations

from typing import Any

from worldgym.errors import ConfigError

ANY = ("random", "noop", "sticky:0.05", "sticky:0.2", "sticky:0.5")
SWEEPS = ("sweep:5", "sweep:10", "sweep:20", "sweep:40")  # games of Discrete(3): none, right, left
DODGERS = ("noisy:0.3:dodger", "noisy:0.1:dodger", "noisy:0.03:dodger", "dodger:0.4", "dodger")
MOST_CONSTANTS = 6
NAME = "ladder"


def ladder(spec: Any) -> tuple[str, ...]:
    """Names of scripted policies that can play a world of this ``WorldSpec``.

    Every world has random, noop and sticky ones; worlds of discrete actions have constants too,
    those that move left and right have sweeps, and Take Cover has dodgers (they read its pixels).
    """
    action = spec.action
    found = list(ANY)
    if action.kind == "discrete":
        first, count = int(action.start), int(action.sizes[0])
        found += [f"constant:{a}" for a in range(first + 1, first + min(count, MOST_CONSTANTS))]
        if action.sizes == (3,):
            found += SWEEPS
            found += DODGERS if tuple(spec.frame_hw) == (32, 80) else ()
    return tuple(found)


def expand(policies: tuple[str, ...], spec: Any) -> tuple[str, ...]:
    """``policies`` with the word ``ladder`` replaced by the ladder of that world.

    Raises:
        ConfigError: no policies.
    """
    found: list[str] = []
    for policy in policies:
        if policy != NAME:
            found.append(policy)
        else:
            found += [rung for rung in ladder(spec) if rung not in policies]
    if not found:
        raise ConfigError("no policies to evaluate", given="none", expected="one or more",
                          fix="pass --policy random agent.zip, or --ladder")
    return tuple(found)


def named(policies: tuple[str, ...]) -> dict[str, str]:
    """``("random", "best=sweep:20")`` as name -> policy; every name once.

    Raises:
        ConfigError: two policies of one name, or an empty name.
    """
    pairs = [p.partition("=") for p in policies]
    names = [head for head, _, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        raise ConfigError("two policies of one name" if twice else "a policy without a name",
                          given=twice or list(policies), expected="every name once",
                          fix="write name=policy, such as first=random second=random")
    return {head: tail if equals else head for head, equals, tail in pairs}
