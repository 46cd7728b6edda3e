"""Reconstituted context memory: recent frames and the past chunk with the same view (worldplay 9).

Shapes: N past latent frame. Nothing derived is kept: a chunk's context is chosen from the past
latents, poses and labels of its slot, and encoded anew. Positions are the ranks in the choice
(temporal reframing), so the gap between a revisited view and now is never seen by the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.camera import field_of_view
from worldgym.errors import ConfigError, ShapeError
from worldgym.models.prope import Cameras
from worldgym.retrieval import Cloud, Distances, ball, geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How views are compared; the defaults are the published score.

    ``fov``: degrees, None = that of the true intrinsics of the new chunk; ``distance_weight``: see
    :class:`worldgym.retrieval.Distances`; ``seed``: of the random points, the same in all episodes.
    """

    points: int = 50_000
    radius: float = 8.0
    fov: tuple[float, float] | None = (60.0, 35.0)
    distance_weight: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Reconstituted:
    """The last ``temporal`` frames and the best past chunks, ``total`` frames in all.

    ``keep_first``: the first chunk is always among them (Hunyuan variant).

    >>> policy = Reconstituted(scoring=Scoring(points=500))
    >>> policy.select(np.repeat(np.eye(4)[None], 24, 0), start=20).tolist()[:5]
    [0, 1, 2, 3, 8]
    """

    total: int = 16
    temporal: int = 12
    chunk: int = 4
    keep_first: bool = False
    scoring: Scoring = field(default_factory=Scoring)
    points_M3: np.ndarray | None = None  # instead of random ones

    def __post_init__(self) -> None:
        rest = self.total - self.temporal - self.chunk * self.keep_first
        if min(self.chunk, self.temporal, rest) < 1 or rest % self.chunk or (
                self.temporal % self.chunk):
            raise ConfigError(
                "impossible memory", given=f"{self.total} frames, {self.temporal} of them recent, "
                f"chunks of {self.chunk}, first kept: {self.keep_first}",
                expected="whole recent chunks and at least one retrieved chunk",
                fix="use total=16, temporal=12, chunk=4")

    @property
    def retrieved(self) -> int:
        """Number of chunks found by their view."""
        return (self.total - self.temporal) // self.chunk - self.keep_first

    def bound(self) -> int:
        """Most frames of a context."""
        return self.total

    def _near(self, w2c_Q44: np.ndarray, starts: np.ndarray, centre_N3: np.ndarray) -> np.ndarray:
        """Which candidates can overlap at all; of the others, all equal, the earliest stay."""
        here = geometry(w2c_Q44)[0]
        limit = (2 * self.scoring.radius + np.linalg.norm(here - here[0], axis=1).max() + 1e-3) ** 2
        near = np.zeros(len(starts), bool)
        for offset in (0, self.chunk // 2):
            away = centre_N3[starts + offset] - here[0]
            near |= np.einsum("ni,ni->n", away, away) < limit
        near[:self.retrieved] = True
        return near

    @cached_property
    def points(self) -> np.ndarray:
        """Points (M, 3) in the ball around a camera; they do not change."""
        if self.points_M3 is not None:
            return np.asarray(self.points_M3, np.float32)
        generator = torch.Generator().manual_seed(self.scoring.seed)
        rows = [torch.rand(self.scoring.points, generator=generator) for _ in range(3)]
        return ball(torch.stack(rows).double().numpy(), self.scoring.radius)

    @cached_property
    def _clouds(self) -> dict[tuple[float, float], Cloud]:
        return {}

    def cloud(self, K_33: np.ndarray | None = None) -> Cloud:
        """The points in view; with ``fov`` None, of a camera with these intrinsics."""
        fov = self.scoring.fov
        if fov is None:
            if K_33 is None:
                raise ConfigError("true intrinsics are not known", given="K None",
                                  expected="normalised intrinsics with Scoring(fov=None)",
                                  fix="pass K, or a fixed fov")
            wide, high = field_of_view(K_33)
            fov = round(wide, 3), round(high, 3)
        if fov not in self._clouds:
            while len(self._clouds) > 8:  # a zooming camera: few are needed at a time
                self._clouds.pop(next(iter(self._clouds)))
            self._clouds[fov] = Cloud(self.points, self.scoring.radius, fov)
        return self._clouds[fov]

    def select(self, w2c_N44: np.ndarray, start: int, K_33: np.ndarray | None = None,
               views: tuple[np.ndarray, ...] | None = None) -> np.ndarray:
        """Frames, ascending, that the chunk which begins at frame ``start`` shall see.

        Args:
            w2c_N44: poses of all frames up to the end of the new chunk (fewer at an episode's end).
            start: first frame of the chunk, a multiple of ``chunk``.
            K_33: normalised intrinsics, for ``Scoring(fov=None)``.
            views: of the past frames, where the caller keeps it (``History.views``):
                ``geometry(w2c)``, and whether a chunk begins there that shows what an earlier one
                shows: it can never be the best, and standing still costs nothing.
        """
        return self.choose(w2c_N44[start:start + self.chunk], start, K_33, views or geometry(
            w2c_N44[:start]))

    def choose(self, w2c_Q44: np.ndarray, start: int, K_33: np.ndarray | None,
               views: tuple[np.ndarray, ...]) -> np.ndarray:
        """The same, from the poses of the new chunk alone and the ``views`` of the past."""
        if start % self.chunk or not len(w2c_Q44):
            raise ShapeError("poses do not reach the new chunk", given=f"{len(w2c_Q44)} poses of "
                             f"the chunk at {start}", expected=f"a start that is a multiple of "
                             f"{self.chunk}, and poses of the chunk", fix="append the new poses")
        if start <= self.total:
            return np.arange(start)
        recent = np.arange(start - self.temporal, start)
        starts = np.arange(self.chunk * self.keep_first, start - self.temporal, self.chunk)
        if len(views) > 2 and self.retrieved == 1:
            starts = starts[~views[2][starts]]
        starts = starts[self._near(w2c_Q44, starts, views[0])]
        index = starts[:, None] + [0, self.chunk // 2]
        distances = Distances(w2c_Q44, views[0][index], views[1][index], self.cloud(K_33),
                              self.scoring.distance_weight)
        best = starts[distances.nearest(self.retrieved)]
        first = [np.arange(self.chunk)] if self.keep_first else []
        found = [np.arange(b, b + self.chunk) for b in best]
        return np.sort(np.concatenate([*first, *found, recent]))


class Recent(Reconstituted):
    """No memory, for comparison: as many frames, all of them the newest."""

    def choose(self, w2c_Q44: np.ndarray, start: int, K_33: np.ndarray | None,
               views: tuple[np.ndarray, ...]) -> np.ndarray:
        """The newest frames."""
        return np.arange(max(0, start - self.total), start)


WAN_MEMORY = Reconstituted()
HUNYUAN_MEMORY = Reconstituted(total=20, keep_first=True)


class _Rows:
    """Rows that only grow, shared by all histories that begin alike; doubling, never moved back."""

    def __init__(self, chunk: int) -> None:
        self.chunk, self.filled, self.latents = chunk, 0, list[Tensor]()
        self.known: dict[bytes, int] = {}  # views of a chunk -> where they were seen first
        self.numbers = {"w2c": np.zeros((0, 4, 4)), "K": np.zeros((0, 3, 3)),
                        "label": np.zeros(0, np.int64), "centre": np.zeros((0, 3)),
                        "ahead": np.zeros((0, 3)), "again": np.zeros(0, bool)}

    def add(self, latents: Sequence[Tensor], rows: dict[str, np.ndarray]) -> None:
        end = self.filled + len(latents)
        for name, old in self.numbers.items():
            if end > len(old):
                room = np.zeros((max(end, 2 * len(old), 64), *old.shape[1:]), old.dtype)
                room[:self.filled] = old[:self.filled]
                self.numbers[name] = room
            self.numbers[name][self.filled:end] = rows.get(name, False)
        # of every chunk that is complete now: was there one with the same views?
        for start in range(self.filled // self.chunk * self.chunk, end - self.chunk + 1,
                           self.chunk):
            pair = [start, start + self.chunk // 2]
            views = np.stack([self.numbers[n][pair] for n in ("centre", "ahead")])
            key = (np.round(views, 6) + 0.0).tobytes()  # -0.0 is 0.0
            self.numbers["again"][start] = key in self.known
            if start:  # the first chunk may be kept anyway, and then is no candidate
                self.known.setdefault(key, start)
        self.latents.extend(latents)
        self.filled = end

    def head(self, length: int) -> "_Rows":
        """A copy of the first rows: one of memory, however many they are."""
        new = _Rows(self.chunk)
        new.filled, new.latents = length, self.latents[:length]
        new.numbers = {n: x[:length].copy() for n, x in self.numbers.items()}
        new.known = {k: s for k, s in self.known.items() if s + self.chunk <= length}
        return new


@dataclass(frozen=True, slots=True)
class History:
    """All past latent frames of one slot: a value; forks share what they have in common.

    Adding a chunk costs the same however long the history is.
    """

    length: int = 0
    rows: _Rows = field(default_factory=lambda: _Rows(4))

    @classmethod
    def empty(cls, chunk: int = 4) -> "History":
        """No frames yet; ``chunk``: latent frames of a chunk."""
        return cls(0, _Rows(chunk))

    def append(self, latents_nCHW: Tensor, w2c_n44: np.ndarray, K_n33: np.ndarray,
               labels_n: np.ndarray) -> "History":
        """The history with further frames; this one stays as it is."""
        centre, ahead = geometry(w2c_n44)
        # fork: somebody else went on from here
        rows = self.rows if self.rows.filled == self.length else self.rows.head(self.length)
        rows.add(list(latents_nCHW.unbind(0)), {"w2c": w2c_n44, "K": K_n33, "label": labels_n,
                                                "centre": centre, "ahead": ahead})
        return History(self.length + len(latents_nCHW), rows)

    def __len__(self) -> int:
        return self.length

    def of(self, name: str) -> np.ndarray:
        """Rows of all frames: w2c, K, label, centre, ahead or again."""
        return self.rows.numbers[name][:self.length]

    @property
    def views(self) -> tuple[np.ndarray, ...]:
        """What ``Reconstituted.select`` needs of the past."""
        return self.of("centre"), self.of("ahead"), self.of("again")

    def latents(self, index: Sequence[int] | np.ndarray | None = None) -> Tensor:
        """Latents (n, C, H, W) of some frames, or of all."""
        chosen = range(self.length) if index is None else index
        return torch.stack([self.rows.latents[int(i)] for i in chosen])

    def cameras(self, index: np.ndarray) -> Cameras:
        """Cameras (1, n) of some frames, float64."""
        return Cameras(torch.from_numpy(self.of("w2c")[index])[None],
                       torch.from_numpy(self.of("K")[index])[None])

    def select(self, policy: Reconstituted, w2c_n44: np.ndarray,
               K_33: np.ndarray | None = None) -> np.ndarray:
        """Frames that a new chunk with these poses shall see."""
        return policy.choose(w2c_n44, self.length, K_33, self.views)

    def to_arrays(self) -> dict[str, Any]:
        """Everything as plain arrays and a tensor, to save; :meth:`from_arrays` reads it back."""
        latents = self.latents() if self.length else torch.zeros(0)
        return {"chunk": self.rows.chunk, "latents": latents,
                **{n: self.of(n).copy() for n in ("w2c", "K", "label")}}

    @classmethod
    def from_arrays(cls, data: dict[str, Any]) -> "History":
        """Inverse of :meth:`to_arrays`."""
        empty = cls.empty(int(data["chunk"]))
        if not len(data["label"]):
            return empty
        return empty.append(data["latents"], data["w2c"], data["K"], data["label"])
