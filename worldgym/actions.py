"""Action codec: the numeric layout of an action space and its features for the model.

Shapes: n actions, A features. The Gymnasium side (``worldgym.envs.spaces``) turns spaces into
``ActionSpec`` and back; the engine never sees a Gymnasium object.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from worldgym.errors import ActionError, ConfigError, NotFiniteError, ShapeError

KINDS = ("discrete", "multi_discrete", "multi_binary", "box")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionSpec:
    """One of Discrete(n), MultiDiscrete(nvec), MultiBinary(n), Box(low, high), as plain data.

    ``sizes``: number of choices per component (discrete kinds), or the flat length of a
    MultiBinary; ``low``/``high``: flat bounds of a Box; ``shape``: shape of one action;
    ``start``: first legal value of a Discrete; ``parts``: the (name, kind, length) under which a
    face may show stretches of a flat Box, "multi_binary" or "box" each. Component c of a discrete
    kind becomes a one-hot of ``sizes[c]``; a Box is scaled to [-1, 1]. The last feature is 1 for
    the null action (no action led to this frame: the first frame of an episode, or padding).

    >>> spec = ActionSpec.discrete(3)
    >>> spec.encode(np.array([2])).tolist()
    [[0.0, 0.0, 1.0, 0.0]]
    """

    kind: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    start: int = 0
    parts: tuple[tuple[str, str, int], ...] = ()

    @classmethod
    def discrete(cls, n: int, start: int = 0) -> "ActionSpec":
        """``n`` choices, the first of them called ``start``."""
        return cls(kind="discrete", shape=(), sizes=(int(n),), start=int(start))

    @classmethod
    def from_json(cls, data: dict) -> "ActionSpec":
        """Inverse of ``dataclasses.asdict``."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        known["parts"] = tuple((str(n), str(k), int(c)) for n, k, c in known.get("parts", ()))
        return cls(**known)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                "unknown action kind", given=self.kind, expected=f"one of {KINDS}",
                fix="wrap the game so that its action space is one of these four",
            )
        if self.kind == "box" and not np.isfinite(self.low + self.high).all():
            raise ConfigError(
                "unbounded Box action", given=f"bounds {self.low}..{self.high}",
                expected="finite bounds", fix="wrap the game with RescaleAction or ClipAction",
            )

    @property
    def features(self) -> int:
        """Width A of the feature vector, the null flag included."""
        if self.kind == "box":
            return len(self.low) + 1
        return (self.sizes[0] if self.kind == "multi_binary" else sum(self.sizes)) + 1

    @property
    def dtype(self) -> np.dtype:
        """Dtype in which recorded actions are stored."""
        return np.dtype(np.float32 if self.kind == "box" else np.int64)

    def check(self, actions: object, n: int | None = None) -> np.ndarray:
        """Return ``actions`` as an array of shape (n, *shape), or raise a named error."""
        array = np.asarray(actions)
        if array.dtype == object or array.dtype.kind not in "iufb":
            raise ActionError(
                "action is not numeric", given=f"dtype {array.dtype}",
                expected=f"{self.dtype} of shape {self.shape}", fix="pass numbers",
            )
        want = "(n, " + ", ".join(map(str, self.shape)) + ")"
        if array.ndim != 1 + len(self.shape) or array.shape[1:] != self.shape or (
            n is not None and array.shape[0] != n
        ):
            raise ShapeError(
                "action batch has the wrong shape", given=array.shape,
                expected=want if n is None else (n, *self.shape),
                fix="give one action for every slot",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotFiniteError(
                "action is not finite", given=array.ravel()[:8].tolist(),
                expected="finite numbers", fix="check the policy for NaN",
            )
        return self._check_range(array)

    def _check_range(self, array: np.ndarray) -> np.ndarray:
        flat = array.reshape(len(array), -1)
        if self.kind == "box":
            low, high = np.asarray(self.low), np.asarray(self.high)
            slack = 1e-6 * (high - low)
            bad = (flat < low - slack) | (flat > high + slack)
            expected = f"values in [{self.low}, {self.high}]"
        else:
            if array.dtype.kind == "f" and (flat != np.round(flat)).any():
                raise ActionError(
                    "action is not a whole number", given=flat[:4].tolist(),
                    expected="integers", fix="pass integer actions",
                )
            flat = flat.astype(np.int64)
            top = np.asarray(self.sizes if self.kind != "multi_binary" else (2,))
            bad = (flat < self.start) | (flat >= self.start + top)
            expected = f"integers in [{self.start}, {(self.start + top - 1).tolist()}]"
        if bad.any():
            raise ActionError(
                "action outside its space", given=flat[bad.any(1)][0].tolist(),
                expected=expected, fix="clip the policy's output to the action space",
            )
        return array.astype(self.dtype)

    def encode(self, actions: np.ndarray, null: np.ndarray | None = None) -> np.ndarray:
        """Features (n, A) float32 of checked actions (n, *shape); ``null`` rows get the flag."""
        flat = np.asarray(actions).reshape(len(actions), -1)
        if self.kind == "box":
            low, high = np.asarray(self.low), np.asarray(self.high)
            body = 2 * (flat - low) / np.maximum(high - low, 1e-12) - 1
        elif self.kind == "multi_binary":
            body = flat
        else:
            body = np.concatenate(
                [np.eye(k)[np.clip(flat[:, c] - self.start, 0, k - 1)]
                 for c, k in enumerate(self.sizes)], axis=1,
            )
        out = np.concatenate([body, np.zeros((len(flat), 1))], axis=1).astype(np.float32)
        if null is not None:
            out[np.asarray(null, bool)] = np.eye(self.features, dtype=np.float32)[-1]
        return out


def part_of(name: str, value: Any, count: int) -> np.ndarray:
    """A named part of an action, (..., count) numbers, or an error that names it.

    Raises:
        ActionError: not numbers, or ragged. ShapeError: not ``count`` of them.
    """
    try:
        part = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except ValueError:  # ragged
        part = np.asarray(None)
    if part.dtype.kind not in "iufb":
        raise ActionError(f"{name} are not numeric", given=repr(value)[:60],
                          expected=f"{count} numbers", fix="sample from env.action_space")
    if part.shape[-1:] != (count,):
        raise ShapeError(f"{name} have the wrong shape", given=part.shape,
                         expected=f"(..., {count})", fix="sample from env.action_space")
    return part
