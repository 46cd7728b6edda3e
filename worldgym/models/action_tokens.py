"""Actions as tokens of a transformer: one for each part of a discrete action (specs/wham.md 3, 4).

Shapes: any leading dimensions, then A parts. *Local ids* count through the choices of all parts, in
their order; in the vocabulary they follow the ids of the images.
"""

from dataclasses import dataclass

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.errors import ConfigError
from worldgym.models import wham_actions


@dataclass(frozen=True, slots=True)
class ActionTokens:
    """The layout of an action's tokens.

    >>> told = ActionTokens(ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 2)))
    >>> told.ids(np.array([[2, 1]])).tolist(), told.values(np.array([[2, 4]])).tolist()
    ([[2, 4]], [[2, 1]])
    """

    spec: ActionSpec

    def __post_init__(self) -> None:
        if self.spec.kind == "box":
            raise ConfigError("actions cannot be tokens", given=self.spec.kind,
                              expected="discrete, multi_discrete or multi_binary actions",
                              fix="wrap the game so that its actions are choices")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Choices of every part."""
        if self.spec.kind == "multi_binary":
            return (2,) * self.spec.sizes[0]
        return self.spec.sizes

    @property
    def count(self) -> int:
        """Tokens of an action, A."""
        return len(self.sizes)

    @property
    def vocabulary(self) -> int:
        """Choices of all parts."""
        return sum(self.sizes)

    @property
    def offsets(self) -> np.ndarray:
        """Local id of every part's first choice."""
        return np.cumsum([0, *self.sizes[:-1]])

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Inclusive range of local ids of every part."""
        return tuple((int(o), int(o) + n - 1) for o, n in zip(self.offsets, self.sizes,
                                                             strict=True))

    @property
    def neutral(self) -> np.ndarray:
        """Ids (A,) of what stands for an action that is not known: nothing is pressed."""
        if self.spec == wham_actions.SPEC:
            return wham_actions.NEUTRAL + self.offsets
        return self.offsets

    def ids(self, actions: np.ndarray) -> np.ndarray:
        """Local ids int64 (..., A) of checked actions (..., *shape)."""
        actions = np.asarray(actions)
        lead = actions.shape[:actions.ndim - len(self.spec.shape)]
        return actions.reshape(*lead, self.count).astype(np.int64) - self.spec.start + self.offsets

    def values(self, local: np.ndarray) -> np.ndarray:
        """Actions (..., *shape) of local ids."""
        parts = np.asarray(local) - self.offsets + self.spec.start
        return parts.reshape(*parts.shape[:-1], *self.spec.shape)
