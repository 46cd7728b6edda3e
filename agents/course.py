"""Where the dreams of an evaluation begin, how they go on, and how their ends are counted.

Shapes: R dreams, L live ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from worldgym.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Course:
    """How dreams run.

    ``anywhere``: begin at any recorded moment, not only where real episodes begin. ``anchor``: go
    on from a recorded moment of the same age after every so many steps, which keeps what has gone
    wrong in the dream from adding up. ``expected``: no end is drawn; dreams go on to the horizon,
    and what a step pays counts by the chance that the episode has come so far. That is the same on
    average and varies far less, which pays where most episodes reach the horizon anyway.
    """

    anywhere: bool = False
    anchor: int | None = None
    expected: bool = False

    def __post_init__(self) -> None:
        if self.anchor is not None and (not isinstance(self.anchor, int | np.integer)
                                        or self.anchor < 1):
            raise ConfigError("impossible number of steps between anchors", given=self.anchor,
                              expected="1 or more, or None", fix="pass anchor=50")

    def settings(self) -> dict[str, Any]:
        """What is set, as plain data."""
        said = {"anywhere": self.anywhere, "anchor": self.anchor, "expected": self.expected}
        return {name: value for name, value in said.items() if value}


WHOLE_LIVES = Course()


class Tally:
    """What every dream was paid, step by step, and how it ended."""

    def __init__(self, rows: int, expected: bool) -> None:
        self.rewards: list[list[float]] = [[] for _ in range(rows)]
        self.truncated_R = np.zeros(rows, bool)
        self.expected = expected
        self.weight_R = np.ones(rows)  # chance that the dream has come so far
        self.drawn_R, self.gone_R = np.zeros(rows), np.zeros(rows, bool)

    def count(self, task: Any, chunk: Any, per_chunk: int,
              live_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Note a step of the live dreams; returns (which end now, their last frame), (L,)."""
        from worldgym.envs.outcome import end_chances, judge

        reward, ended, last = judge(task, chunk, per_chunk)
        if self.expected:
            self.drawn_R[live_L] += np.where(self.gone_R[live_L], 0, reward)
            self.gone_R[live_L] |= ended
            reward = reward * self.weight_R[live_L]
            self.weight_R[live_L] *= 1 - end_chances(task, chunk, ended)
            ended = np.zeros(len(live_L), bool)
        for row, paid in zip(live_L, reward, strict=True):
            self.rewards[row].append(float(paid))
        return ended, last

    def cut(self, rows: np.ndarray) -> None:
        """Note that these dreams stop before their end."""
        self.truncated_R[rows] = not self.expected

    def of(self, rows: np.ndarray) -> tuple[list[list[float]], np.ndarray, np.ndarray | None]:
        """(rewards, cut or not, returns with ends drawn where ends are not) of these dreams."""
        return ([self.rewards[r] for r in rows], self.truncated_R[rows],
                self.drawn_R[rows] if self.expected else None)


def check_count(value: int, name: str) -> None:
    """Raise ConfigError unless ``value`` is 1 or more."""
    if not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"impossible number of {name}", given=value, expected="1 or more",
                          fix=f"pass {name}=20")
