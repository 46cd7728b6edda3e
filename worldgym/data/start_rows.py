"""Which rows of a recording become start states, and their latents.

Shapes: E episodes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from worldgym.data.store import Episodes
from worldgym.errors import NotFiniteError

ENCODE_BATCH = 64  # frames
_log = logging.getLogger(__name__)


def draw_rows(episodes: Episodes, ids: np.ndarray, count: int, context: int, seed: int,
          fraction: float, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """(first row of the episode, row of the newest frame) of every start, beginnings first."""
    rng = np.random.default_rng([int(seed), 0x57A7])
    first_E, steps_E = episodes.starts[ids], episodes.lengths[ids]
    died_E = episodes.take("terminated", first_E + steps_E)
    room_E = np.maximum(steps_E - np.where(died_E, margin, 0), 0)  # positions 1..room
    total = int(room_E.sum())
    beginnings = round(count * fraction)
    if beginnings < count and not total:
        _log.warning("start bank of beginnings only: every episode ends within %d steps", margin)
        beginnings = count
    begin_E = _spread(rng, len(ids), beginnings)
    flat = _spread(rng, total, count - beginnings)
    edges = np.cumsum(room_E)
    mid_E = np.searchsorted(edges, flat, side="right")
    position = flat - (edges - room_E)[mid_E] + 1
    return (np.concatenate([first_E[begin_E], first_E[mid_E]]),
            np.concatenate([first_E[begin_E], first_E[mid_E] + position]))


def _spread(rng: np.random.Generator, choices: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, choices): none again before all were drawn; ascending."""
    if not count:
        return np.zeros(0, np.int64)
    whole, rest = divmod(count, choices)
    return np.sort(np.concatenate([np.tile(np.arange(choices), whole),
                                   rng.choice(choices, rest, replace=False)]))


def distinct(episodes: Episodes, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with distinct frames, and for each given row the number of its distinct frame."""
    seen: dict[bytes, int] = {}
    unique, number = [], np.empty(len(rows), np.int32)
    for lo in range(0, len(rows), 512):
        for i, frame in enumerate(episodes.take("frames", rows[lo:lo + 512])):
            key = hashlib.sha256(frame.tobytes()).digest()
            if key not in seen:
                seen[key] = len(seen)
                unique.append(rows[lo + i])
            number[lo + i] = seen[key]
    return np.asarray(unique, np.int64), number


def encode_rows(episodes: Episodes, rows: np.ndarray, encode: Callable[[Tensor], Tensor],
                view: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Latents of these rows as they are kept."""
    with torch.no_grad():
        return torch.cat([as_half(encode(torch.from_numpy(
            view(episodes.take("frames", rows[lo:lo + ENCODE_BATCH])))))
            for lo in range(0, len(rows), ENCODE_BATCH)])


def as_half(latents: Tensor) -> Tensor:
    """Latents as they are kept, float16, ids int16; NotFiniteError where they do not fit."""
    if not latents.is_floating_point():
        return latents.detach().cpu().to(torch.int16)
    half = latents.detach().cpu().half()
    if not bool(torch.isfinite(half).all()):
        raise NotFiniteError("a start latent does not fit float16",
                             given=f"largest value {float(latents.abs().max()):.3g}",
                             expected="finite normalised latents, near [-5, 5]",
                             fix="check the codec; it may have diverged")
    return half
