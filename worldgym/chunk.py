"""What one step of a world made.

Shapes: B slot, F latent frame of the chunk, C channel, h w latent grid, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(slots=True)
class Chunk:
    """What one step made, one row per stepped slot.

    ``latents_BFChw``; ``reward_B`` float32, summed up to ``end_frame_B``; ``terminated_B`` bool;
    ``end_probability_B``; ``danger_B``: chance of an end within the next steps, as recorded play
    went on (``ahead`` steps; 1: the end chance); ``draw_B``: the uniform numbers that decided the
    ends; ``end_frame_B``: index of the last frame that counts; ``uncertainty_B``: fork spread, if
    it was asked for; ``drift_B``: how far the frames have moved from what the episode began with,
    where a world tells it; ``first_frame_B``: index of the first frame that counts (default 0);
    ``notes``: what else the faces put into info, by name, one row per slot. ``frames()`` decodes on
    first use: with ``video``, all of the chunk at once, or with ``decode``, latent by latent.
    """

    slots: np.ndarray
    latents_BFChw: Tensor
    reward_B: np.ndarray
    terminated_B: np.ndarray
    end_probability_B: np.ndarray
    end_frame_B: np.ndarray
    uncertainty_B: np.ndarray | None = None
    danger_B: np.ndarray | None = None
    draw_B: np.ndarray | None = None
    drift_B: np.ndarray | None = None
    first_frame_B: np.ndarray | None = None
    notes: dict[str, np.ndarray] = field(default_factory=dict)
    ahead: int = 1
    subjects: object = None
    video: Callable[[], Tensor] | None = field(default=None, repr=False)
    decode: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    _frames: Tensor | None = field(default=None, repr=False)

    def frames(self) -> Tensor:
        """Decoded frames uint8 (B, F, H, W, 3)."""
        if self._frames is None and self.video is not None:
            self._frames = self.video()
        if self._frames is None:
            assert self.decode is not None
            b, f = self.latents_BFChw.shape[:2]
            self._frames = self.decode(self.latents_BFChw.flatten(0, 1)).unflatten(0, (b, f))
        return self._frames
