"""Where WorldPlay's episodes begin: pictures, walks that led to them, the user's own video."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from worldgym.data.starts import hash64
from worldgym.envs.pixels import read_picture
from worldgym.envs.scope import ScopeStarts, check_text
from worldgym.envs.spaces import check_frame, to_numpy


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames that an episode begins with, uint8 (T, H, W, 3), and the camera's pose c2w (F, 4, 4)
    in each latent frame of them (None: it stood still)."""

    frames_KHWC: np.ndarray
    c2w_F44: np.ndarray | None = None


class WorldPlayStarts(ScopeStarts):
    """Where episodes begin: pictures (None: nothing, all is dreamt), each with its prompt.

    ``pasts``: latents and poses of the walk that led to a picture (None: it is all there is); the
    episode then remembers what was seen on it.
    """

    def __init__(self, world: Any, pictures: Sequence[np.ndarray | None], prompts: Sequence[str],
                 encode: Callable[[list[str]], list[Any]] | None,
                 pasts: Sequence[tuple[Any, np.ndarray] | None] | None = None) -> None:
        super().__init__(world, pictures, prompts, "", encode or (lambda texts: []))  # type: ignore
        self.pasts = list(pasts or [None] * len(pictures))
        self.beginnings = np.flatnonzero([past is None for past in self.pasts])
        self.reads = encode is not None
        self.options = ("image", "prompt") if self.reads else ("image",)  # type: ignore

    def gather(self, indices: Any) -> Any:
        """These starts (repeats allowed) as ``Starts``."""
        index, clips, poses = [int(i) for i in indices], [], []
        for i in index:
            picture, (latents, c2w) = self.pictures[i], self.pasts[i] or (None, None)
            if latents is None and picture is not None and i not in self._latents:
                self._latents[i] = self.world.start_latents(picture[None])
            clips.append(self._latents.get(i) if latents is None else latents)
            poses.append(c2w)
        return self._told(clips, [self.prompts[i] for i in index], poses)

    def sample(self, seeds: Any, episodes: Any, beginnings_only: bool = False) -> np.ndarray:
        """As ``ScopeStarts.sample``; a picture with a walk behind it is no beginning."""
        if not beginnings_only or not len(self.beginnings):
            return super().sample(seeds, episodes)
        index = hash64(seeds, episodes) % np.uint64(len(self.beginnings))
        return self.beginnings[index.astype(np.int64)]

    def last_frames(self, indices: Any) -> np.ndarray:
        """Pictures of these starts, uint8 (B, H, W, 3); black where there is none."""
        black = np.zeros((*self.world.spec.frame_hw, 3), np.uint8)
        return np.stack([black if self.pictures[int(i)] is None else self.pictures[int(i)]
                         for i in indices])

    def check_own(self, frame: Any, frame_hw: tuple[int, int]) -> Clip:
        """The user's start as a ``Clip``, or a named error."""
        if isinstance(frame, Clip):
            return frame
        return Clip(check_frame(frame, frame_hw)[None])

    def encode_frames(self, world: Any, frames: Any) -> Any:
        """Starts of these ``Clip``, with the first start's prompt."""
        return self._told([c.frames_KHWC for c in frames], [self.prompts[0]] * len(frames),
                          [c.c2w_F44 for c in frames])

    def tell(self, starts: Any, texts: Sequence[dict | None]) -> Any:
        """The starts with the prompts that are given instead of their own."""
        import torch

        context, prompts = starts.context_BLD.clone(), starts.prompts_B.copy()
        for i, told in enumerate(texts):
            if told and told.get("prompt") is not None:
                prompts[i] = check_text("prompt", told["prompt"])
                encoded = torch.as_tensor(self.contexts([prompts[i]])[0])
                context[i] = 0
                context[i, :len(encoded)] = encoded
        return replace(starts, context_BLD=context, prompts_B=prompts)

    def picture(self, image: Any) -> np.ndarray:
        """A picture, or the path of one, as a frame: enlarged to cover, centre cut (Lanczos)."""
        return fitted(image, self.world.spec.frame_hw)

    def _told(self, clips: list[Any], prompts: list[str],
              poses: list[np.ndarray | None] | None = None) -> Any:
        told = {"contexts": self.contexts(prompts), "prompts": prompts} if self.reads else {}
        return self.world.starts(clips, poses=poses, **told)


def fitted(image: Any, frame_hw: Sequence[int]) -> np.ndarray:
    """A picture (array or path) as a frame of the world's size."""
    from worldgym.models.worldplay_rollout import fit_image

    return fit_image(to_numpy(read_picture(image)), frame_hw)
