"""Start states: short pieces of real play in latents, from which dreamt episodes begin.

Shapes: N starts of the bank, B chosen starts, K context frames, U stored latents, V stored frames,
C channel, h w latent grid, H W pixels, P player slot, S state channel. Equal frames are stored
once; latents are kept as float16, rounded when the bank is built, so that a bank in memory and one
from disk are the same bits (ids, of worlds whose latents are tokens, as int16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym import checkpoint
from worldgym.data.packed import pack, squares, unpack, whole
from worldgym.data.start_rows import as_half, distinct, draw_rows, encode_rows
from worldgym.data.store import Episodes
from worldgym.errors import CheckpointError, ConfigError, DatasetError, ShapeError
from worldgym.state import Starts

FORMAT = 1  # one more where parts are packed
KIND = "worldgym.starts"
NEAR = 32  # starts among which one of about an age is drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class StartBank:
    """Real frames with their past, ready for ``World.begin``.

    Fields: ``latents_UChw`` float16 and ``latent_rows_NK`` (row of each context frame, -1: none),
    ``actions`` (N, K, *shape): the action that led to each frame, ``null_NK``: no action led to it,
    ``length_N``: context frames present (right-aligned), ``frames_VHWC`` uint8, ``frame_rows_N``:
    the newest frame of each start, ``beginnings``: bool (N,), the first frame of an episode,
    ``age_N``: steps since then (None: not kept, in older files). Beginnings come first.
    Of several players (None otherwise): ``subjects_NKPS`` float32, their states in each frame,
    ``valid_NP``, which places are taken, ``game_N`` int64, the number of the world's game.

    >>> from worldgym.data.starts import StartBank
    >>> bank = StartBank.from_frames(lambda frames: frames.float().permute(0, 3, 1, 2) / 255,
    ...                              np.zeros((2, 4, 6, 3), np.uint8), np.zeros((2,), np.int64))
    >>> len(bank), bank.sample([7, 7], [0, 1]).shape, bank.gather([0, 1]).latents_BKChw.shape
    (2, (2,), torch.Size([2, 1, 3, 4, 6]))
    """

    latents_UChw: Tensor
    latent_rows_NK: np.ndarray
    actions: np.ndarray
    null_NK: np.ndarray
    length_N: np.ndarray
    frames_VHWC: np.ndarray
    frame_rows_N: np.ndarray
    beginnings: np.ndarray
    age_N: np.ndarray | None = None
    subjects_NKPS: np.ndarray | None = None
    valid_NP: np.ndarray | None = None
    game_N: np.ndarray | None = None

    @classmethod
    def build(cls, episodes: Episodes, encode: Callable[[Tensor], Tensor], ids: np.ndarray,
              count: int, context: int, seed: int = 0, beginning_fraction: float = 0.25,
              margin: int = 10, *, view: Callable[[np.ndarray], np.ndarray] = np.asarray,
              states: Callable[[np.ndarray], np.ndarray] | None = None,
              game: int = 0) -> StartBank:
        """Draw starts from recorded episodes and encode them.

        Args:
            episodes: recorded play.
            encode: uint8 frames (B, H, W, 3) to latents (B, C, h, w), e.g. ``World.encode``.
            ids: episodes to draw from.
            count: starts to make, N.
            context: most frames per start, K.
            seed: of the draw.
            beginning_fraction: share of starts that are the first frame of an episode.
            margin: steps that a start keeps away from the end of an episode that terminated.
            view: recorded frames (B, H, W, 3) as the world sees them, e.g. at half the size.
            states: of recordings of several players: rows to the players' states (..., P, S). The
                oldest frame of each start then counts as one that no action led to, as in
                training (``PartySampler``).
            game: number of the game that was recorded.

        Raises:
            ConfigError: impossible numbers. DatasetError: no episodes to draw from.
        """
        ids = np.asarray(ids, np.int64)
        if count < 1 or context < 1 or margin < 1 or not 0 <= beginning_fraction <= 1:
            raise ConfigError(
                "impossible start bank", expected="count, context, margin >= 1; fraction in [0, 1]",
                given=f"count={count}, context={context}, margin={margin}, "
                      f"beginning_fraction={beginning_fraction}", fix="correct the number")
        if not len(ids) or ids.min() < 0 or ids.max() >= len(episodes):
            raise DatasetError("no such episodes to start from", given=ids.tolist()[:8],
                               expected=f"episode numbers in [0, {len(episodes) - 1}]",
                               fix="pass the training half of Episodes.split()")
        first_N, last_N = draw_rows(episodes, ids, count, context, seed, beginning_fraction, margin)
        length_N = last_N - np.maximum(first_N, last_N - context + 1) + 1
        column = np.arange(context)[None]
        rows_NK = np.where(column >= context - length_N[:, None],
                           last_N[:, None] - (context - 1 - column), -1)
        there, beginning_N = rows_NK >= 0, last_N == first_N
        wanted, inverse = np.unique(rows_NK[there], return_inverse=True)
        unique_U, same = distinct(episodes, wanted)
        latent_rows = np.full(rows_NK.shape, -1, np.int32)
        latent_rows[there] = same[inverse]
        shown, frame_rows = np.unique(latent_rows[:, -1], return_inverse=True)
        actions = episodes.take("actions", np.maximum(rows_NK, 0))
        actions[~there] = 0
        null, players = ~there | (rows_NK == first_N[:, None]), {}
        if states is not None:
            null |= column <= context - length_N[:, None]
            told = np.where(there[..., None, None], states(np.maximum(rows_NK, 0)), 0)
            players = {"subjects_NKPS": told.astype(np.float32),
                       "valid_NP": episodes.take("info_valid", last_N),
                       "game_N": np.full(count, game, np.int64)}
        return cls(
            latents_UChw=encode_rows(episodes, unique_U, encode, view), latent_rows_NK=latent_rows,
            actions=actions, null_NK=null, length_N=length_N.astype(np.int64),
            frames_VHWC=view(episodes.take("frames", unique_U[shown])),
            frame_rows_N=frame_rows.astype(np.int32), beginnings=beginning_N,
            age_N=(last_N - first_N).astype(np.int64), **players)

    @classmethod
    def joined(cls, banks: Sequence[StartBank]) -> StartBank:
        """One bank of the starts of several, in their order; all with the same fields."""
        parts = {f.name: [getattr(bank, f.name) for bank in banks] for f in fields(cls)}
        joined: dict[str, Any] = {}
        for name, values in parts.items():
            if any(value is None for value in values):
                joined[name] = None
            elif name == "latents_UChw":
                joined[name] = torch.cat(values)
            else:
                if name in ("latent_rows_NK", "frame_rows_N"):
                    stored = "latents_UChw" if name == "latent_rows_NK" else "frames_VHWC"
                    ahead = np.cumsum([0, *(len(x) for x in parts[stored])])[:-1]
                    values = [np.where(v < 0, v, v + n).astype(np.int32)
                              for v, n in zip(values, ahead, strict=True)]
                joined[name] = np.concatenate(values)
        return cls(**joined)

    @classmethod
    def from_frames(cls, encode: Callable[[Tensor], Tensor], frames_NHWC: np.ndarray,
                    actions: np.ndarray) -> StartBank:
        """A bank of single images without a past; ``actions`` (N, *shape) only give the layout."""
        frames = check_frames(frames_NHWC)
        n = len(frames)
        with torch.no_grad():
            latents = as_half(encode(torch.from_numpy(frames)))
        return cls(latents_UChw=latents, latent_rows_NK=np.arange(n, dtype=np.int32)[:, None],
                   actions=np.zeros_like(np.asarray(actions))[:, None],
                   null_NK=np.ones((n, 1), bool), length_N=np.ones(n, np.int64),
                   frames_VHWC=frames, frame_rows_N=np.arange(n, dtype=np.int32),
                   beginnings=np.ones(n, bool), age_N=np.zeros(n, np.int64))

    def __len__(self) -> int:
        return len(self.length_N)

    def __repr__(self) -> str:
        return (f"StartBank({len(self)} starts of up to {self.latent_rows_NK.shape[1]} frames, "
                f"{int(self.beginnings.sum())} of them beginnings)")

    def sample(self, seeds: Any, episodes: Any, beginnings_only: bool = False) -> np.ndarray:
        """Index of the start for each (seed, episode), broadcast; depends on nothing else."""
        draw = hash64(seeds, episodes)
        if not beginnings_only:
            return (draw % np.uint64(len(self))).astype(np.int64)
        chosen = np.flatnonzero(self.beginnings)
        if not len(chosen):
            raise ConfigError("the bank has no beginnings", given=repr(self),
                              expected="at least one", fix="build it with beginning_fraction > 0")
        return chosen[(draw % np.uint64(len(chosen))).astype(np.int64)]

    def at_age(self, age: int, seeds: Any, episodes: Any) -> np.ndarray:
        """Index of a start about ``age`` steps into an episode for each (seed, episode).

        One of the ``NEAR`` starts nearest in age; the draw depends on nothing else.

        Raises:
            ConfigError: the bank does not know the ages of its starts.
        """
        if self.age_N is None:
            raise ConfigError("the bank does not know how old its starts are", given=repr(self),
                              expected="a bank with ages", fix="build it again (StartBank.build)")
        near = np.argsort(np.abs(self.age_N - age), kind="stable")[:NEAR]
        return near[(hash64(seeds, episodes) % np.uint64(len(near))).astype(np.int64)]

    def only(self, indices: Any) -> StartBank:
        """A bank of these starts only, e.g. ``bank.only(np.flatnonzero(bank.beginnings))``."""
        i = self._check(indices)
        rest = {name: getattr(self, name) for name in _OPTIONAL.values()}
        kept: dict[str, Any] = {k: None if x is None else x[i] for k, x in rest.items()}
        return replace(self, latent_rows_NK=self.latent_rows_NK[i], actions=self.actions[i],
                       null_NK=self.null_NK[i], length_N=self.length_N[i],
                       frame_rows_N=self.frame_rows_N[i], beginnings=self.beginnings[i],
                       **kept)

    def gather(self, indices: Any) -> Starts:
        """These starts (repeats allowed) as ``Starts``, float32 (ids: int64) on the CPU; padding is
        zero."""
        index_B = self._check(indices)
        rows = torch.from_numpy(self.latent_rows_NK[index_B].astype(np.int64))
        latents = self.latents_UChw[rows.clamp(min=0)]
        latents = latents.float() if latents.is_floating_point() else latents.long()
        latents[rows < 0] = 0
        if self.subjects_NKPS is None or self.valid_NP is None or self.game_N is None:
            return Starts(latents, self.actions[index_B], self.null_NK[index_B],
                          self.length_N[index_B])
        return Starts(latents, self.actions[index_B], self.null_NK[index_B],
                      self.length_N[index_B], torch.from_numpy(self.subjects_NKPS[index_B]),
                      self.valid_NP[index_B], self.game_N[index_B])

    @cached_property
    def frames(self) -> np.ndarray:
        """Newest real frame of every start, uint8 (N, H, W, 3); read-only."""
        frames = self.frames_VHWC[self.frame_rows_N]
        frames.setflags(write=False)
        return frames

    def last_frames(self, indices: Any) -> np.ndarray:
        """Newest real frame of these starts, uint8 (B, H, W, 3)."""
        return self.frames_VHWC[self.frame_rows_N[self._check(indices)]]

    def _check(self, indices: Any) -> np.ndarray:
        index = np.asarray(indices)
        if index.ndim != 1 or (index.size and (index.dtype.kind not in "iu" or index.min() < 0
                                               or index.max() >= len(self))):
            raise ConfigError("no such start state", given=indices,
                              expected=f"a list of integers in [0, {len(self) - 1}]",
                              fix="draw indices with sample(seeds, episodes)")
        return index.astype(np.int64)

    @staticmethod
    def encode_frames(world: Any, frames: np.ndarray) -> Starts:
        """Starts of one image each (B, H, W, 3) uint8, as if an episode began there."""
        frames = check_frames(frames)
        n, action = len(frames), world.spec.action
        latents = world.encode(torch.from_numpy(frames))[:, None]
        latents = latents.float() if latents.is_floating_point() else latents
        return Starts(latents, np.zeros((n, 1, *action.shape), action.dtype),
                      np.ones((n, 1), bool), np.ones(n, np.int64))

    # -- disk --------------------------------------------------------------------------------

    def save(self, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
        """Write one safetensors file, atomically; ``metadata``: JSON values to keep with it.

        Cells, squares of the frames and states that come again and again are written once (see
        ``packed``), so the starts of a game of tiles take a tenth of the room.
        """
        tensors = {"latents": self.latents_UChw}
        for name, field in {**_ARRAYS, **_OPTIONAL}.items():
            if getattr(self, field) is not None:
                tensors[name] = torch.from_numpy(np.array(getattr(self, field)))
        some = {"cells": self.latents_UChw.permute(0, 2, 3, 1), "subjects": tensors.get("subjects"),
                "squares": squares(tensors["frames"], self.latents_UChw.shape[2:])}
        packed = False
        for name, tensor in some.items():
            parts = {} if tensor is None else pack(name, tensor)
            if len(parts) == 2:
                del tensors[_PACKED.get(name, name)]
                tensors, packed = tensors | parts, True
        header = {"kind": KIND, "format": FORMAT + packed, "starts": len(self),
                  **dict(metadata or {})}
        return checkpoint.save(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> StartBank:
        """Read a bank back; CheckpointError when the file is none or does not fit together."""
        tensors, header = checkpoint.load_tensors(path)
        if header.get("kind") != KIND or header.get("format") not in (FORMAT, FORMAT + 1):
            raise CheckpointError("not a start bank", given=f"{path}: {header}",
                                  expected=f"a {KIND} file of format {FORMAT} or {FORMAT + 1}",
                                  fix="write it with StartBank.save")
        if header["format"] != FORMAT:
            tensors = unpack(tensors)
            if "cells" in tensors and tensors["cells"].ndim == 4:
                tensors["latents"] = tensors.pop("cells").permute(0, 3, 1, 2).contiguous()
            if "squares" in tensors:
                tensors["frames"] = whole(tensors.pop("squares"))
        if set(tensors) - set(_OPTIONAL) != {"latents", *_ARRAYS}:
            raise CheckpointError("start bank has the wrong tensors",
                                  given=f"{path}: {sorted(tensors)}",
                                  expected=sorted(["latents", *_ARRAYS]), fix="build it again")
        bank = cls(latents_UChw=tensors["latents"],
                   **{field: tensors[name].numpy()
                      for name, field in {**_ARRAYS, **_OPTIONAL}.items() if name in tensors})
        problem = bank._problem()
        if problem:
            raise CheckpointError("start bank does not fit together", given=f"{path}: {problem}",
                                  expected="the file that StartBank.save wrote",
                                  fix="build the bank again")
        return bank

    def _problem(self) -> str:
        """What is wrong with the arrays, or nothing."""
        n, rows = len(self.length_N), self.latent_rows_NK
        k = rows.shape[-1]
        wants = {"latents": self.latents_UChw.ndim == 4
                 and self.latents_UChw.dtype in (torch.float16, torch.int16),
                 "latent_rows": rows.shape == (n, k) and rows.dtype == np.int32,
                 "actions": self.actions.shape[:2] == (n, k),
                 "null": self.null_NK.shape == (n, k) and self.null_NK.dtype == bool,
                 "frames": self.frames_VHWC.ndim == 4 and self.frames_VHWC.dtype == np.uint8,
                 "frame_rows": self.frame_rows_N.shape == (n,),
                 "beginnings": self.beginnings.shape == (n,) and self.beginnings.dtype == bool,
                 "age": self.age_N is None or self.age_N.shape == (n,) and
                 self.age_N.dtype == np.int64 and bool((self.age_N >= 0).all()),
                 "players": self._players_fit(n, k)}
        wrong = [name for name, ok in wants.items() if not ok]
        if wrong or n < 1:
            return f"shape or dtype of {wrong or 'length'}"
        absent = np.arange(k)[None] < (k - self.length_N)[:, None]
        if not ((1 <= self.length_N) & (self.length_N <= k)).all() or (
                (rows < 0) != absent).any() or rows.max() >= len(self.latents_UChw):
            return "latent rows"
        frames = self.frame_rows_N
        if frames.min() < 0 or frames.max() >= len(self.frames_VHWC):
            return "frame rows"
        return "" if bool(torch.isfinite(self.latents_UChw).all()) else "latents are not finite"

    def _players_fit(self, n: int, k: int) -> bool:
        """Whether the players' fields are all there and fit, or none is there."""
        states, valid, game = self.subjects_NKPS, self.valid_NP, self.game_N
        if states is None or valid is None or game is None:
            return states is None and valid is None and game is None
        return (states.ndim == 4 and states.shape[:2] == (n, k) and states.dtype == np.float32
                and valid.shape == (n, states.shape[2]) and valid.dtype == bool
                and game.shape == (n,) and game.dtype == np.int64 and bool((game >= 0).all())
                and bool(np.isfinite(states).all()))


_ARRAYS = {"latent_rows": "latent_rows_NK", "actions": "actions", "null": "null_NK",
           "length": "length_N", "frames": "frames_VHWC", "frame_rows": "frame_rows_N",
           "beginnings": "beginnings"}
_PLAYERS = {"subjects": "subjects_NKPS", "valid": "valid_NP", "game": "game_N"}
_OPTIONAL = {"age": "age_N", **_PLAYERS}
_PACKED = {"cells": "latents", "squares": "frames"}  # what is packed in another layout


def hash64(seeds: Any, episodes: Any) -> np.ndarray:
    """uint64 hash of (seed, episode), broadcast (splitmix64: Steele, Lea, Flood, OOPSLA 2014)."""
    seed, episode = np.broadcast_arrays(np.asarray(seeds, np.int64), np.asarray(episodes, np.int64))
    with np.errstate(over="ignore"):
        return _mix(_mix(seed.astype(np.uint64)) ^ episode.astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_frames(frames: Any) -> np.ndarray:
    """Contiguous uint8 frames (B, H, W, 3), or ShapeError."""
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not len(array):
        raise ShapeError("start frames have the wrong form", given=f"{array.dtype} {array.shape}",
                         expected="uint8 (B, H, W, 3), B >= 1", fix="stack RGB frames in 0..255")
    return np.array(array)
