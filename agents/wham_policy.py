"""WHAM's behaviour mode as a policy: what the recorded players would press after these frames.

Shapes: N acting slots, K frames of a slot's past, H W pixels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from worldgym.actions import ActionSpec
from worldgym.agents.policy import acting
from worldgym.data.starts import hash64
from worldgym.errors import ConfigError, DTypeError, ShapeError
from worldgym.models import wham_actions
from worldgym.state import Starts


class WhamPolicy:
    """Acts as the recorded players would, given up to a whole window of a slot's frames.

    It sees the frames that it was shown since ``t == 0`` and the actions that it chose on them.
    The draw follows from (seed, slot, episode of the slot, step) alone. Frames of another size are
    resized to the model's. In dreams of the same model it reads their ids (``observes``), since a
    decoded frame is not encoded to the same ids again.

    Args:
        world: a ``WhamWorld``.
        action: actions of the game that is played.
        latents: read ids instead of frames where a dream offers them.

    Raises:
        ConfigError: the game has other actions than the model.
    """

    def __init__(self, world: Any, action: ActionSpec = wham_actions.SPEC, *,
                 name: str = "wham", latents: bool = False) -> None:
        mine = world.spec.action
        if (action.kind, action.sizes, action.start) != (mine.kind, mine.sizes, mine.start):
            raise ConfigError("WHAM plays with actions of its own",
                              given=f"{action.kind}{action.sizes}",
                              expected=f"{mine.kind}{mine.sizes}",
                              fix="wrap the game so that its actions are the model's (as published,"
                              " a controller's 12 buttons and 4 sticks)")
        self.world, self.action, self.name = world, action, name
        self.observes = "latent" if latents else "frame"
        self._pasts: list[list[tuple[torch.Tensor, np.ndarray | None]]] = []
        self._seed, self._episodes = 0, np.zeros(0, np.int64)

    def reset(self, n: int, seed: int) -> None:
        """Prepare ``n`` slots."""
        if n < 1:
            raise ConfigError("policy has no slots", given=n, expected="n >= 1",
                              fix="call policy.reset(n, seed) with the number of environments")
        self._seed, self._episodes = int(seed), np.full(n, -1, np.int64)
        self._pasts = [[] for _ in range(n)]

    def act(self, frames_NHWC: np.ndarray, t: int | np.ndarray,
            slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Actions (N, *shape) for frames uint8; of the published models, bins (N, 16)."""
        index, times = acting(len(frames_NHWC), t, slots, len(self._pasts))
        frames = fitted(frames_NHWC, self.world.spec.frame_hw)
        ids = [self.world.encode(frame[None])[0] for frame in frames]  # bits: each on its own
        return self._act(ids, times, index)

    def act_latents(self, latents_NChw: np.ndarray, t: int | np.ndarray,
                    slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Actions (N, *shape) for the ids (N, 1, h, w) of a dream of the same model."""
        index, times = acting(len(latents_NChw), t, slots, len(self._pasts))
        ids = torch.as_tensor(np.asarray(latents_NChw)).long().to(self.world.device)
        return self._act(list(ids), times, index)

    def _act(self, ids: list[torch.Tensor], times: np.ndarray, index: np.ndarray) -> np.ndarray:
        for new, slot, time in zip(ids, index.tolist(), times.tolist(), strict=True):
            if time == 0 or self._episodes[slot] < 0:
                self._episodes[slot] += 1
                self._pasts[slot] = []
            self._pasts[slot].append((new, None))
            del self._pasts[slot][:-self.world.history]
        seeds = hash64(hash64(self._seed, index).astype(np.int64), self._episodes[index])
        state = self.world.begin(self._starts(index), (seeds >> np.uint64(1)).astype(np.int64),
                                 times)
        try:
            bins = self.world.proposal(state)
        finally:
            state.release()
        for slot, chosen in zip(index.tolist(), bins, strict=True):
            self._pasts[slot][-1] = (self._pasts[slot][-1][0], chosen)
        return bins.astype(self.action.dtype)

    def _starts(self, index: np.ndarray) -> Starts:
        pasts = [self._pasts[slot] for slot in index]
        b, k = len(pasts), max(map(len, pasts))
        latents = torch.zeros((b, k, *self.world.spec.latent_chw), dtype=torch.int64,
                              device=self.world.device)
        led, null = np.zeros((b, k, *self.action.shape), np.int64), np.ones((b, k), bool)
        for row, past in enumerate(pasts):
            for back, (ids, _) in enumerate(reversed(past)):
                latents[row, k - 1 - back] = ids
            for back, (_, chosen) in enumerate(reversed(past[:-1])):
                led[row, k - 1 - back], null[row, k - 1 - back] = chosen, False
        return Starts(latents, led, null, np.array([len(p) for p in pasts], np.int64))


def fitted(frames_NHWC: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Frames of the model's size; others are resized, bilinear with antialiasing.

    Raises:
        ShapeError, DTypeError: not uint8 RGB frames.
    """
    frames = np.asarray(frames_NHWC)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ShapeError("frames have the wrong shape", given=frames.shape,
                         expected="(slots, H, W, 3)", fix="show the policy RGB frames, unstacked")
    if frames.dtype != np.uint8:
        raise DTypeError("frames have the wrong dtype", given=frames.dtype, expected="uint8",
                         fix="show the policy frames in 0..255")
    if frames.shape[1:3] == tuple(hw):
        return frames
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    y = F.interpolate(x, tuple(hw), mode="bilinear", antialias=True, align_corners=False)
    return y.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def wham_policy(model: Any, action: ActionSpec = wham_actions.SPEC, world: Any = None,
                **settings: Any) -> WhamPolicy:
    """The behaviour policy of a WHAM file or folder.

    Args:
        model: published ``.ckpt``, or what ``worldgym convert`` wrote; or a small WHAM's folder.
        action: the game's actions; as published, those of a controller.
        world: the world that is played in; a dream of the same file shows the policy its ids.
        settings: as for ``worldgym.envs.wham.open_world`` (temperature, top_k, size, device, ...).
    """
    from worldgym.envs.wham import open_world

    own = open_world(model, **settings)
    same = getattr(world, "weights", None) == own.weights
    return WhamPolicy(own, action, name=f"wham:{model}", latents=same)


def parse_wham(name: str, action: ActionSpec, world: Any = None) -> WhamPolicy:
    """``wham:FILE`` or ``wham:FILE,temperature=0.7,top_k=50,size=16-16-1024`` as a policy."""
    file, *pairs = name.partition(":")[2].split(",")
    kinds = {"temperature": float, "top_k": int, "top_p": float, "context_length": int,
             "device": str, "dtype": str, "size": lambda s: tuple(map(int, s.split("-")))}
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            settings[key] = kinds[key](value)  # type: ignore[operator]
        except (KeyError, ValueError):
            raise ConfigError("policy wham has a bad setting", given=pair,
                              expected=f"name=value of {sorted(kinds)}",
                              fix="write for instance wham:FILE,temperature=0.7") from None
    return wham_policy(file, action, None if callable(world) else world, **settings)
