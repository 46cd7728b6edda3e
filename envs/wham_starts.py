"""Where WHAM's dreams begin: frames with or without the actions taken on them, or .npz episodes.

Shapes: B start, K frame of a start, H W pixels, h w token grid.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.data import wham_npz
from worldgym.data.starts import hash64
from worldgym.envs.spaces import check_frame, to_numpy
from worldgym.errors import ConfigError, ShapeError
from worldgym.models import wham_actions

KEPT = 4096  # starts whose ids stay in memory, about 0.2 MB each


@dataclass(frozen=True, slots=True)
class Past:
    """Where an episode begins: frames uint8 (K, H, W, 3), the last one current, and the bins
    (K - 1, 16) of the actions taken on all but the last; None: not known, nothing is pressed."""

    frames_KHWC: np.ndarray
    actions: np.ndarray | None = None

    @classmethod
    def checked(cls, frames: Any, actions: Any, hw: tuple[int, int], most: int) -> "Past":
        """From the user's frames and actions, or a named error; arrays are copied.

        Args:
            actions: bins, or a dict of buttons and sticks; K - 1 rows, or K as in the data files
                (the last is the one that ``step`` gives, and not used).
        """
        array = np.asarray(to_numpy(frames))
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or not 1 <= len(array) <= most:
            raise ShapeError("start frames have the wrong shape", given=array.shape,
                             expected=f"(1 to {most} frames, {hw[0]}, {hw[1]}, 3)",
                             fix="give the newest frames only, oldest first, channels last")
        clip = np.stack([check_frame(frame, hw) for frame in array])
        if actions is None:
            return cls(clip)
        bins = (wham_actions.from_controller(actions) if isinstance(actions, Mapping)
                else np.asarray(to_numpy(actions)))
        count = len(clip)
        if bins.ndim != 2 or len(bins) not in (count - 1, count):
            raise ShapeError("start actions have the wrong shape", given=bins.shape,
                             expected=f"({count - 1} or {count}, {wham_actions.COUNT})",
                             fix="give the action taken on every frame but the last")
        bins = np.floor(wham_actions.check(bins)).astype(np.int64)
        return cls(clip, bins[:count - 1].copy())


class WhamStarts:
    """Start states: pasts in memory, or places in .npz episodes that are read when first wanted.

    Args:
        world: a ``WhamWorld``.
        pasts: ``Past``, or (file, number of the first frame, frames).
    """

    def __init__(self, world: Any, pasts: Sequence[Past | tuple[Path, int, int]]) -> None:
        self.world, self.pasts = world, list(pasts)
        self._known: OrderedDict[int, tuple[Any, np.ndarray, np.ndarray | None]] = OrderedDict()

    @classmethod
    def from_episodes(cls, world: Any, folder: str | Path, context: int | None = None,
                      every: int | None = None) -> "WhamStarts":
        """Starts of ``context`` frames at the beginning of every episode, or at every n-th frame.

        Raises:
            DatasetError, ConfigError, ShapeError: no such files, too short, or of another size.
        """
        most = world.spec.context_frames + 1
        count = most if context is None else context
        if not 1 <= count <= most or (every is not None and every < 1):
            raise ConfigError("impossible starts", given=f"context={context}, start_every={every}",
                              expected=f"1 to {most} frames, start_every at least 1",
                              fix="leave them out")
        places = []
        for file in wham_npz.files(folder):
            length, hw = wham_npz.measure(file)
            if hw != tuple(world.spec.frame_hw):
                raise ShapeError("episode has frames of another size", given=f"{file}: {hw}",
                                 expected=world.spec.frame_hw, fix="resize its frames")
            if length < count:
                raise ConfigError("episode is shorter than a start", fix="use a smaller context",
                                  given=f"{file}: {length} frames", expected=f"{count} or more")
            stop = 1 if every is None else length - count + 1
            places += [(file, first, count) for first in range(0, stop, every or 1)]
        return cls(world, places)

    def __len__(self) -> int:
        return len(self.pasts)

    def sample(self, seeds: Any, episodes: Any, beginnings_only: bool = False) -> np.ndarray:
        """Index of the start for each (seed, episode); depends on nothing else."""
        return (hash64(seeds, episodes) % np.uint64(len(self))).astype(np.int64)

    def gather(self, indices: Any) -> Any:
        """These starts (repeats allowed) as ``Starts``."""
        known = [self._get(int(i)) for i in indices]
        return _starts(self.world, [k[0] for k in known], [k[2] for k in known])

    def last_frames(self, indices: Any) -> np.ndarray:
        """Current frame of these starts, uint8 (B, H, W, 3)."""
        return np.stack([self._get(int(i))[1] for i in indices])

    def check_own(self, own: Any, hw: tuple[int, int]) -> Past:
        """What the user gave as a start: an image, or a ``Past`` that was checked already."""
        return own if isinstance(own, Past) else Past(check_frame(own, hw)[None])

    def encode_frames(self, world: Any, pasts: Any) -> Any:
        """Starts of pasts, or of images (B, H, W, 3)."""
        given = [p if isinstance(p, Past) else Past(np.asarray(p)[None]) for p in pasts]
        return _starts(world, [_encode(world, p.frames_KHWC) for p in given],
                       [p.actions for p in given])

    def _get(self, index: int) -> tuple[Any, np.ndarray, np.ndarray | None]:
        """(ids, current frame, actions) of a start."""
        if index not in self._known:
            past = self.pasts[index]
            if not isinstance(past, Past):
                clip = wham_npz.read(*past)
                past = Past(clip.frames, clip.actions[:-1])
            ids = _encode(self.world, past.frames_KHWC)
            self._known[index] = ids, past.frames_KHWC[-1].copy(), past.actions
        self._known.move_to_end(index)
        out = self._known[index]
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        return out


def _encode(world: Any, frames_KHWC: np.ndarray) -> Any:
    """Ids (K, 1, h, w), frame by frame, so that a frame's ids depend on nothing else."""
    import torch

    return torch.cat([world.encode(frame[None]) for frame in frames_KHWC])


def _starts(world: Any, ids: list[Any], actions: list[np.ndarray | None]) -> Any:
    """Pasts of different lengths as ``Starts``, right-aligned."""
    import torch

    from worldgym.state import Starts

    b, k = len(ids), max(map(len, ids))
    latents = torch.zeros((b, k, *world.spec.latent_chw), dtype=torch.int64, device=ids[0].device)
    led, null = np.zeros((b, k, wham_actions.COUNT), np.int64), np.ones((b, k), bool)
    for row, (own, taken) in enumerate(zip(ids, actions, strict=True)):
        latents[row, k - len(own):] = own
        if taken is not None and len(taken):  # the action on a frame led to the next one
            led[row, k - len(taken):], null[row, k - len(taken):] = taken, False
    return Starts(latents, led, null, np.array([len(own) for own in ids], np.int64))
