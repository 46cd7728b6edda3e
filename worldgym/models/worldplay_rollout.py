"""WorldPlay chunk by chunk: choose a context, encode it, denoise (specs/worldplay.md 6 and 7).

Shapes: B slot, C latent channel, n frames of a chunk, H W latent height and width, L text token.
Slots are independent: each has its own history, length and choice. Slots whose contexts have the
same number of frames go through the network together, without padding, so that a slot's bits do
not depend on the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.errors import ConfigError, ShapeError
from worldgym.extras import need
from worldgym.models.prope import Cameras
from worldgym.models.worldplay import CONTEXT_TIME
from worldgym.reconstituted import WAN_MEMORY, History, Reconstituted
from worldgym.schedule import Euler

TIMESTEPS = (1000.0, 960.0, 888.8889, 727.2728)  # of the distilled network
HUNYUAN_TIMESTEPS = (1000.0, 937.5, 833.3333129882812, 625.0)


@dataclass(frozen=True, slots=True)
class Moves:
    """What happens in a chunk, per latent frame: poses (B, n), intrinsics, labels (B, n).

    Frame k's pose and label are where the camera is in it and what led there; those of frame 0 of
    an episode are the start pose and 0.
    """

    cameras: Cameras
    labels_Bn: np.ndarray

    def rows(self, index: Sequence[int]) -> "Moves":
        """Of some slots."""
        return Moves(self.cameras.rows(index), self.labels_Bn[np.asarray(index)])


class ChunkStepper:
    """The few-step chunk loop with reconstituted memory.

    Args:
        dit: ``WorldPlayDiT`` or ``HunyuanDiT`` (whose texts are what ``tokens`` returns).
        memory: which past frames a chunk sees.
        sampler: noise levels; the published four by default.
        context_time: timestep at which clean context latents are encoded, and at which the given
            first latent of an image start stays.
        positions: of context frames: "reframed", their ranks, as published; "plain", their true
            numbers, for comparison.
    """

    def __init__(self, dit: Any, memory: Reconstituted = WAN_MEMORY, sampler: Euler | None = None,
                 context_time: float = CONTEXT_TIME, positions: str = "reframed") -> None:
        if positions not in ("reframed", "plain"):
            raise ConfigError("unknown positions", given=repr(positions), fix='use "reframed"',
                              expected='"reframed" or "plain"')
        self.plain = positions == "plain"
        self.dit, self.memory, self.context_time = dit, memory, context_time
        self.sampler = sampler or Euler.at(TIMESTEPS)
        self.overwrites = not hasattr(dit, "inputs")  # else conditions are channels of the input

    def select(self, histories: Sequence[History], moves: Moves) -> list[np.ndarray]:
        """Context frames of every slot, ascending; empty at the first chunk."""
        w2c, K = moves.cameras.w2c_BF44.numpy(force=True), moves.cameras.K_BF33
        return [h.select(self.memory, w2c[i], None if K is None else K[i, 0].numpy(force=True))
                for i, h in enumerate(histories)]

    @torch.no_grad()
    def step(self, histories: Sequence[History], noise_BCnHW: Tensor, moves: Moves,
             context_BLD: Tensor | None, first_BC1HW: Tensor | None = None,
             chosen: Sequence[np.ndarray] | None = None,
             watch: Callable[[int, Tensor], None] | None = None
             ) -> tuple[Tensor, list[History], list[np.ndarray]]:
        """Make one chunk of every slot.

        Args:
            histories: past of every slot; stays as it is.
            noise_BCnHW: standard normal numbers.
            moves: poses and labels of the new frames.
            context_BLD: text of every slot. Another text than before takes effect at once, in the
                context too, which is encoded anew: a prompt switch needs nothing else. None: the
                network reads no text.
            first_BC1HW: clean latent of a start image; for slots at their first chunk only, which
                it replaces a frame of. The Hunyuan variant shows it to the network instead, and
                needs it at every step.
            chosen: context frames, if ``select`` was called already.
            watch: called with (pass, sample) for each group of slots.

        Returns:
            Latents (B, C, n, H, W), the new histories, the context frames of every slot.
        """
        b, n = len(noise_BCnHW), noise_BCnHW.shape[2]
        texts = b if context_BLD is None else len(context_BLD)
        sizes = (len(histories), texts, *moves.labels_Bn.shape, *moves.cameras.w2c_BF44.shape[:2])
        if sizes != (b, b, b, n, b, n) or n != self.memory.chunk:
            raise ShapeError(
                "slots and frames do not fit", given=f"{sizes[0]} histories, {sizes[1]} texts, "
                f"labels {moves.labels_Bn.shape}, cameras {sizes[4:]}, noise for {b} x {n} frames",
                expected=f"as many slots of each, chunks of {self.memory.chunk} latent frames",
                fix="give one pose and label per slot and latent frame")
        if first_BC1HW is not None and self.overwrites and any(len(h) for h in histories):
            raise ConfigError("a start image in the middle of an episode",
                              given=[len(h) for h in histories], expected="slots without a past",
                              fix="step slots that begin apart from the others")
        chosen = self.select(histories, moves) if chosen is None else list(chosen)
        out = torch.empty_like(noise_BCnHW)
        lengths = np.array([len(c) for c in chosen])
        for length in np.unique(lengths):
            group = [int(i) for i in np.flatnonzero(lengths == length)]
            out[group] = self._group([histories[i] for i in group], noise_BCnHW[group],
                                     moves.rows(group),
                                     None if context_BLD is None else context_BLD[group],
                                     None if first_BC1HW is None else first_BC1HW[group],
                                     [chosen[i] for i in group], watch)
        w2c, K = moves.cameras.w2c_BF44, moves.cameras.K_BF33
        K = torch.eye(3).expand(b, n, 3, 3) if K is None else K
        poses, lenses = (x.double().numpy(force=True) for x in (w2c, K))
        # every slot keeps its own memory: a part of the batch would keep all of the batch
        grown = [h.append(out[i].transpose(0, 1).clone(), poses[i], lenses[i], moves.labels_Bn[i])
                 for i, h in enumerate(histories)]
        return out, grown, chosen

    def _group(self, histories: list[History], x: Tensor, moves: Moves, text: Tensor | None,
               first: Tensor | None, chosen: list[np.ndarray],
               watch: Callable[[int, Tensor], None] | None) -> Tensor:
        n, length, place = x.shape[2], len(chosen[0]), x.device
        here = moves.cameras.w2c_BF44[:, 0]
        now = moves.cameras.seen_from(here)
        labels = torch.from_numpy(moves.labels_Bn).to(place)
        given: dict[str, Any] = {} if text is None else {
            "text_kv": self.dit.text(text.to(next(self.dit.parameters())))}
        shown, first = (None, first) if self.overwrites else (first, None)

        dtype = next(self.dit.parameters()).dtype  # the sample keeps its own

        def inputs(latents: Tensor, frames_Bn: np.ndarray) -> Tensor:
            return latents.to(dtype) if self.overwrites else self.dit.inputs(
                latents, torch.from_numpy(frames_Bn).to(place), shown).to(dtype)

        context = None
        if length:
            past = [h.cameras(c) for h, c in zip(histories, chosen, strict=True)]
            K = [p.K_BF33.to(here) for p in past if p.K_BF33 is not None]
            cameras = Cameras(torch.cat([p.w2c_BF44 for p in past]).to(here),
                              None if now.K_BF33 is None else torch.cat(K)).seen_from(here)
            latents = torch.stack([h.latents(c) for h, c in zip(histories, chosen, strict=True)])
            where = {"frame_index_BF": torch.from_numpy(np.stack(chosen)).to(place)} if (
                self.plain) else {}
            old = np.stack([h.of("label")[c] for h, c in zip(histories, chosen, strict=True)])
            context = self.dit.context(
                inputs(latents.transpose(1, 2).to(x), np.stack(chosen)),
                labels_BF=torch.from_numpy(old).to(place), cameras=cameras,
                t=self.context_time, **where, **given)
        frames = np.array([len(h) for h in histories])[:, None] + np.arange(n)
        index = torch.from_numpy(frames).to(place) if self.plain else (
            length + torch.arange(n, device=place))
        for i, t in enumerate(self.sampler.timesteps_S.tolist()):
            times = torch.full((len(x), n), t, device=place)
            if first is not None:
                x = torch.cat([first.to(x), x[:, :, 1:]], 2)
                times[:, 0] = self.context_time
            flow = self.dit(inputs(x, frames), times, labels_BF=labels, cameras=now,
                            context=context, frame_index_BF=index, **given)
            x = self.sampler.step(x, flow.to(x), i)
            if watch is not None:
                watch(i, x)
        return x if first is None else torch.cat([first.to(x), x[:, :, 1:]], 2)


def start_image(image_HWC: np.ndarray, frame_hw: Sequence[int]) -> Tensor:
    """Pixels (1, 3, 1, H, W) in [-1, 1] of an RGB picture: enlarged to cover, centre cut."""
    cut = torch.from_numpy(fit_image(image_HWC, frame_hw))
    return (cut.permute(2, 0, 1).float() / 127.5 - 1)[None, :, None]


def fit_image(image_HWC: np.ndarray, frame_hw: Sequence[int]) -> np.ndarray:
    """An RGB picture as uint8 (H, W, 3) of another size: enlarged to cover (Lanczos), centre cut.
    """
    image = np.asarray(image_HWC)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ShapeError("not an RGB picture", given=f"{image.shape} {image.dtype}",
                         expected="(H, W, 3) uint8", fix="convert the picture to 8-bit RGB")
    picture, (height, width) = need("PIL.Image", "start images", "wan"), frame_hw
    h, w = image.shape[:2]
    scale = max(width / w, height / h)
    # at least the frame: the product may come out a hair below a whole number
    size = max(width, int(w * scale)), max(height, int(h * scale))
    big = np.asarray(picture.fromarray(image).resize(size, picture.Resampling.LANCZOS))
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return big[top:top + height, left:left + width].copy()
