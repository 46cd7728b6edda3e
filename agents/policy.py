"""What a policy is: one protocol that acts in the dream and in the real game alike.

Shapes: N acting slots, H W pixels. A slot is one place in a batch; it plays one episode after
another, and ``t == 0`` tells the policy that a new episode begins in that slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.errors import ConfigError
from worldgym.models import wham_actions


@runtime_checkable
class Policy(Protocol):
    """Chooses one action per slot from the frames those slots show."""

    name: str

    def reset(self, n: int, seed: int) -> None:
        """Prepare ``n`` slots; everything random later follows from ``seed``, slot and episode."""

    def act(
        self,
        frames_NHWC: np.ndarray,
        t: int | np.ndarray,
        slots: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Actions (N, *shape) for ``slots`` (default: all), each at step ``t`` of its episode."""


class SlotPolicy:
    """Base of scripted policies: per-slot random streams that no other slot can disturb."""

    name = "policy"

    def __init__(self, action: ActionSpec) -> None:
        self.action = action
        self.rngs: list[np.random.Generator] = []
        self._seed, self._episodes = 0, np.zeros(0, np.int64)

    def reset(self, n: int, seed: int) -> None:
        """Prepare ``n`` slots."""
        if n < 1:
            raise ConfigError("policy has no slots", given=n, expected="n >= 1",
                              fix="call policy.reset(n, seed) with the number of environments")
        self._seed, self._episodes = int(seed), np.full(n, -1, np.int64)
        self.rngs = [np.random.default_rng([self._seed, i]) for i in range(n)]
        for slot in range(n):
            self.start(slot)

    def act(
        self,
        frames_NHWC: np.ndarray,
        t: int | np.ndarray,
        slots: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """One action per acting slot."""
        index, times = acting(len(frames_NHWC), t, slots, len(self.rngs))
        actions = []
        for row, (slot, time) in enumerate(zip(index, times, strict=True)):
            if time == 0:
                self._episodes[slot] += 1
                self.rngs[slot] = np.random.default_rng(
                    [self._seed, int(slot), int(self._episodes[slot])]
                )
                self.start(int(slot))
            actions.append(self.choose(int(slot), int(time), frames_NHWC[row]))
        return np.asarray(actions, self.action.dtype).reshape(len(index), *self.action.shape)

    def start(self, slot: int) -> None:
        """Forget the last episode of ``slot``."""

    def choose(self, slot: int, t: int, frame_HWC: np.ndarray) -> np.ndarray | int:
        """The action of one slot."""
        raise NotImplementedError


def acting(
    n: int, t: int | np.ndarray, slots: Sequence[int] | np.ndarray | None, have: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slot numbers and step counters of the ``n`` rows given to ``act``, checked."""
    index = np.arange(n) if slots is None else np.asarray(slots, np.int64)
    if index.shape != (n,) or (n and (index.min() < 0 or index.max() >= have)):
        raise ConfigError(
            "policy asked for slots it does not have", given=f"{n} frames for slots {index}",
            expected=f"one frame per slot, slots in 0..{have - 1}",
            fix="call policy.reset(n, seed) with the number of environments first",
        )
    return index, np.broadcast_to(np.asarray(t, np.int64), (n,))


def sample_action(action: ActionSpec, rng: np.random.Generator) -> np.ndarray:
    """A uniformly random legal action."""
    if action.kind == "box":
        return rng.uniform(action.low, action.high).reshape(action.shape)
    if action.kind == "multi_binary":
        return rng.integers(0, 2, action.shape)
    return (action.start + rng.integers(0, action.sizes)).reshape(action.shape)


def idle_action(action: ActionSpec) -> np.ndarray:
    """The action that does nothing: the first choice, all off, or zero within the bounds.

    Of a controller as WHAM has it: no button and sticks in the middle, not far left and down.
    """
    controller = wham_actions.SPEC
    if (action.kind, action.sizes, action.start) == (
            controller.kind, controller.sizes, controller.start):
        return wham_actions.NEUTRAL.reshape(action.shape).copy()
    if action.kind == "box":
        return np.clip(0.0, action.low, action.high).reshape(action.shape)
    return np.full(action.shape, action.start if action.kind != "multi_binary" else 0)
