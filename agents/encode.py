"""What a trained policy saw: real frames turned into the very observation it learned from.

Shapes: N acting slots, C latent channels, h w latent size, H W pixels, k stacked observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from worldgym.agents.policy import acting
from worldgym.errors import ConfigError, DTypeError, ShapeError


class FrameStack:
    """The last ``k`` observations of every slot, oldest first; an episode begins with k copies.

    ``axis``: where they are joined, counted without the slot axis (-1 for frames, 0 for latents).
    """

    def __init__(self, k: int, axis: int) -> None:
        if not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError("impossible frame stack", given=k, expected="an integer >= 1",
                              fix="pass the frame_stack that the policy was trained with")
        self.k, self.axis = int(k), axis
        self._last: list[list[np.ndarray] | None] = []

    def reset(self, n: int) -> None:
        """Forget everything, and prepare ``n`` slots."""
        self._last = [None] * n

    def push(
        self, new_N: np.ndarray, t: int | np.ndarray, slots: Sequence[int] | np.ndarray | None
    ) -> np.ndarray:
        """Stacked observations (N, …) after ``new_N`` arrived in ``slots`` at step ``t``."""
        index, times = acting(len(new_N), t, slots, len(self._last))
        rows = []
        for row, slot in enumerate(index):
            last = self._last[slot]
            fresh = new_N[row].copy()
            last = [fresh] * self.k if times[row] == 0 or last is None else [*last[1:], fresh]
            self._last[slot] = last
            rows.append(np.concatenate(last, axis=self.axis) if self.k > 1 else fresh)
        return np.stack(rows)


class LatentObservation:
    """Encodes real frames as the world does and stacks them as the dream did.

    ``world`` needs ``encode(frames_NHWC) -> latents_NCHW`` and ``spec``. A policy trained on
    ``observation="latent", frame_stack=k`` reads from here in the real game:

    >>> class World:  # stands for a loaded world
    ...     class spec: frame_hw, latent_chw = (4, 4), (1, 2, 2)
    ...     def encode(self, frames): return frames[:, None, ::2, ::2, 0].astype(np.float32)
    >>> view = LatentObservation(World(), frame_stack=3)
    >>> view.reset(1)
    >>> view.frames(np.zeros((1, 4, 4, 3), np.uint8), t=0).shape
    (1, 3, 2, 2)
    """

    kind = "latent"

    def __init__(self, world: Any, frame_stack: int = 1) -> None:
        self.world = world
        self.stack = FrameStack(frame_stack, axis=0)

    def reset(self, n: int) -> None:
        """Prepare ``n`` slots."""
        self.stack.reset(n)

    def frames(
        self, frames_NHWC: np.ndarray, t: int | np.ndarray,
        slots: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Observation (N, C*k, h, w) float32 from frames."""
        check_frames(frames_NHWC, self.world.spec.frame_hw)
        return self.latents(as_numpy(self.world.encode(frames_NHWC)), t, slots)

    def latents(
        self, latents_NCHW: np.ndarray, t: int | np.ndarray,
        slots: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Observation (N, C*k, h, w) float32 from latents that the dream made itself."""
        latents = np.asarray(latents_NCHW, np.float32)
        if latents.shape[1:] != tuple(self.world.spec.latent_chw):
            raise ShapeError("latents have the wrong shape", given=latents.shape,
                             expected=f"(n, {self.world.spec.latent_chw})",
                             fix="score the policy in the world it was trained in")
        return self.stack.push(latents, t, slots)


class FrameObservation:
    """Stacks frames (H, W, 3k); for policies that were trained on ``observation="frame"``."""

    kind = "frame"

    def __init__(self, frame_hw: tuple[int, int], frame_stack: int = 1) -> None:
        self.frame_hw = frame_hw
        self.stack = FrameStack(frame_stack, axis=-1)

    def reset(self, n: int) -> None:
        """Prepare ``n`` slots."""
        self.stack.reset(n)

    def frames(
        self, frames_NHWC: np.ndarray, t: int | np.ndarray,
        slots: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Observation (N, H, W, 3k) uint8."""
        check_frames(frames_NHWC, self.frame_hw)
        return self.stack.push(frames_NHWC, t, slots)


def check_frames(frames_NHWC: np.ndarray, frame_hw: tuple[int, int]) -> None:
    """Raise a named error unless these are uint8 frames (N, H, W, 3) of the right size."""
    if frames_NHWC.ndim != 4 or frames_NHWC.shape[1:] != (*frame_hw, 3):
        raise ShapeError("frames have the wrong shape", given=frames_NHWC.shape,
                         expected=f"(n, {frame_hw[0]}, {frame_hw[1]}, 3)",
                         fix="resize the game's frames to the world's frame size")
    if frames_NHWC.dtype != np.uint8:
        raise DTypeError("frames are not uint8", given=frames_NHWC.dtype, expected="uint8, 0..255",
                         fix="pass the game's own pixels")


def as_numpy(value: Any) -> np.ndarray:
    """A tensor on any device, or an array, as an array."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
