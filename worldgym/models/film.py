"""Video codecs of worlds that step in chunks, and films: frames decoded when first asked for.

Shapes: F latent frame, T raw frame, C latent channel, h w latent grid, H W pixels. A codec has
``pictures`` frames per latent frame after the first of an episode (which is one), ``frame_hw``,
``latent_chw``, ``device``, ``encode`` and ``decode``; what its decoder remembers is a stream, a
value that is never changed in place. Slots are coded one by one, so that a slot's bits do not
depend on the others.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.clip import to_pixels
from worldgym.errors import ShapeError
from worldgym.models.codec import Codec
from worldgym.models.wan_vae import PICTURES, DecoderState, WanVAE, to_uint8


class WanVideo:
    """The Wan autoencoder: the first latent frame is one picture, every later one is four."""

    pictures = PICTURES

    def __init__(self, vae: WanVAE, frame_hw: tuple[int, int]) -> None:
        if frame_hw[0] % vae.stride or frame_hw[1] % vae.stride:
            raise ShapeError("frame size does not fit the autoencoder", given=frame_hw,
                             expected=f"multiples of {vae.stride}", fix="use 704 x 1280")
        self.vae, self.frame_hw, self.device = vae, tuple(frame_hw), vae.device
        self.latent_chw = (vae.mean.shape[1], frame_hw[0] // vae.stride, frame_hw[1] // vae.stride)

    @torch.no_grad()
    def encode(self, frames_THWC: np.ndarray) -> Tensor:
        """Latents (F, C, h, w), float32, of a clip uint8 (1 + 4 (F - 1), H, W, 3)."""
        clip = torch.cat([to_pixels(f, self.vae.dtype) for f in frames_THWC], 2)
        return self.vae.encode(clip)[0].transpose(0, 1).float().contiguous()

    @torch.no_grad()
    def decode(self, latents_FChw: Tensor, stream: Any = None) -> tuple[Tensor, Any]:
        """Frames uint8 (T, H, W, 3) that follow ``stream`` (None: of an episode's beginning)."""
        video, stream = self.vae.decode_next(latents_FChw.transpose(0, 1)[None], stream)
        return to_uint8(video)[0], stream


class FrameVideo:
    """A codec of single frames: every latent frame is one picture, and nothing is remembered."""

    pictures = 1

    def __init__(self, codec: Codec) -> None:
        self.codec, self.device = codec, codec.mean.device
        self.frame_hw, self.latent_chw = tuple(codec.cfg.frame_hw), codec.cfg.latent_chw

    @torch.no_grad()
    def encode(self, frames_THWC: np.ndarray) -> Tensor:
        """Latents (T, C, h, w) of frames uint8 (T, H, W, 3)."""
        return torch.cat([self.codec.encode(torch.from_numpy(f[None]))
                          for f in np.ascontiguousarray(frames_THWC)])

    @torch.no_grad()
    def decode(self, latents_FChw: Tensor, stream: Any = None) -> tuple[Tensor, Any]:
        """Frames uint8 (F, H, W, 3)."""
        return torch.cat([self.codec.decode(z[None]) for z in latents_FChw]), None


class Film:
    """The frames of a chunk, and what the decoder remembers after it.

    Nothing is decoded until it is asked for; then all chunks before that nobody looked at are
    decoded too, in order, so that looking changes no bit of what is seen. Forks share films.

    Args:
        latents_FChw: of the chunk. before: the chunk before, None at the beginning.
    """

    __slots__ = ("_frames", "_latents", "before", "stream")

    def __init__(self, latents_FChw: Tensor | None, before: "Film | None" = None) -> None:
        self._latents, self.before = latents_FChw, before
        self.stream: Any = None
        self._frames: Tensor | None = None

    def frames(self, video: Any) -> Tensor:
        """Frames uint8 (T, H, W, 3) of the chunk; of a film from a file only the last."""
        films: list[Film] = []
        film: Film | None = self
        while film is not None and film._frames is None:
            films.append(film)
            film = film.before
        for film in reversed(films):
            assert film._latents is not None
            old = film.before
            film._frames, film.stream = video.decode(
                film._latents, None if old is None else old.stream)
            if old is not None:  # the newest picture is enough of what is past
                old._frames = old._frames[-1:].clone()  # type: ignore[index]
            film.before = film._latents = None
        assert self._frames is not None
        return self._frames

    def to_tensors(self, video: Any) -> dict[str, Tensor]:
        """Newest picture and stream, for files."""
        out = {"picture": self.frames(video)[-1:].clone()}
        if self.stream is not None:
            marks = []
            for i, feature in enumerate(self.stream.features):
                marks.append(None if isinstance(feature, Tensor) else [feature])
                if isinstance(feature, Tensor):
                    out[f"stream.{i}"] = feature
            out["marks"] = torch.frombuffer(bytearray(json.dumps(marks).encode()),
                                            dtype=torch.uint8)
        return out

    @classmethod
    def from_tensors(cls, held: dict[str, Tensor], device: torch.device) -> "Film":
        """Inverse of ``to_tensors``."""
        film = cls(None)
        film._frames = held["picture"].to(device)
        if "marks" in held:
            marks = json.loads(held["marks"].numpy().tobytes().decode())
            film.stream = DecoderState(tuple(
                held[f"stream.{i}"].to(device) if mark is None else mark[0]
                for i, mark in enumerate(marks)))
        return film
