"""Heads: who says what a step is worth and whether it ends the episode.

Shapes: B slot, K past frame, C channel, h w latent grid, A action features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldgym.errors import ConfigError, NotFiniteError, ShapeError
from worldgym.models.outcome import Outcome

# callable(chunk) -> array-like (B,): a reward, or whether the episode ends
ChunkFunction = Callable[[object], object]


@dataclass(frozen=True, slots=True)
class LearnedOutcome:
    """Reward and end from the world's own head.

    ``end_scale`` multiplies the end chance: above 1, the dream is harder than the head believes.
    """

    model: Outcome
    end_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.end_scale < float("inf"):
            raise ConfigError("impossible end_scale", given=self.end_scale,
                              expected="a finite number >= 0", fix="use 1.0")

    @property
    def frames(self) -> int:
        """Past frames read."""
        return self.model.cfg.frames

    @property
    def ahead(self) -> int:
        """Steps that the danger looks ahead; 1: it is the end chance of the step."""
        return max(1, self.model.cfg.ahead)

    @torch.no_grad()
    def __call__(self, past_BKChw: Tensor, action_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(end chance (B,) in [0, 1], rewards (B, 2): if it goes on, if it ends, danger (B,))."""
        chance, rewards, danger = self.model.predict(past_BKChw[:, -self.frames:], action_BA)
        return (chance * self.end_scale).clamp(0, 1), rewards, danger


def apply_function(function: ChunkFunction, chunk: object, slots: int, what: str) -> np.ndarray:
    """Call a user's reward or end function on a chunk and check what comes back: (B,) finite."""
    value = np.asarray(function(chunk))
    if value.shape != (slots,):
        raise ShapeError(f"{what} function returned the wrong shape", given=value.shape,
                         expected=(slots,), fix="return one value per slot")
    if not np.isfinite(value.astype(np.float64)).all():
        raise NotFiniteError(f"{what} function returned NaN or infinity", given=value[:8].tolist(),
                             expected="finite numbers", fix="guard the function's divisions")
    return value
