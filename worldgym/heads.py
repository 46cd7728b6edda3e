"""Heads: who says what a step is worth and whether it ends the episode.

Shapes: B slot, K past frame, C channel, h w latent grid, A action features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldgym.errors import ConfigError


@dataclass(frozen=True)
class Learned:
    """Heads of a world's own, ``model``; its ``cfg.frames`` past frames are read.

    ``end_scale`` multiplies the end chance: above 1, the dream is harder than the head believes.
    """

    model: Any
    end_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.end_scale < float("inf"):
            raise ConfigError("impossible end_scale", given=self.end_scale,
                              expected="a finite number >= 0", fix="use 1.0")

    @property
    def frames(self) -> int:
        """Past frames read."""
        return self.model.cfg.frames


class LearnedOutcome(Learned):
    """Reward, end and danger from an ``Outcome``."""

    @property
    def ahead(self) -> int:
        """Steps that the danger looks ahead; 1: it is the end chance of the step."""
        return max(1, self.model.cfg.ahead)

    @torch.no_grad()
    def __call__(self, past_BKChw: Tensor, action_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(end chance (B,) in [0, 1], rewards (B, 2): if it goes on, if it ends, danger (B,))."""
        chance, rewards, danger = self.model.predict(past_BKChw[:, -self.frames:], action_BA)
        return (chance * self.end_scale).clamp(0, 1), rewards, danger
