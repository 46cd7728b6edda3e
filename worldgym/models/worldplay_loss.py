"""WorldPlay's training losses before distillation: chunk-causal, and joint with a memory.

Source: specs/worldplay.md section 12. Shapes: B clip, F frame of a clip, K context frame, N target
frame, W frame of a training sequence, C channel, h w latent grid, L text token, D text width.
A sequence of the chunk-causal student is a clip's beginning, or retrieved frames and a chunk that
sees them; every chunk has its own noise level. The bidirectional teacher sees clean context and
denoises four chunks at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from worldgym.errors import ConfigError, DatasetError, ShapeError
from worldgym.models.prope import Cameras
from worldgym.models.wan import block_ids, causal_frame_mask
from worldgym.models.worldplay import CONTEXT_TIME, Context, WorldPlayDiT
from worldgym.reconstituted import Reconstituted
from worldgym.schedule import add_noise, chunk_times, context_times

Draw = Callable[..., Tensor]  # draw(kind, *shape): (B, *shape) of noise
# most latent frames of a clip from an iteration on, as published
LENGTHS = ((0, 32), (500, 64), (1000, 96), (2000, 128), (3000, 160))


def length_at(lengths: Sequence[tuple[int, int]], iteration: int) -> int:
    """Most latent frames of a clip at an iteration.

    >>> [length_at(LENGTHS, i) for i in (0, 499, 500, 9000)]
    [32, 32, 64, 160]
    """
    return [most for start, most in lengths if start <= iteration][-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalConfig:
    """Published settings of the chunk-causal training.

    ``memory``: share of sequences that are retrieved frames and one chunk; ``shift``: of the
    chunks' timesteps; ``rows``: of the falling timestep table, between which those of context
    chunks lie (timesteps 500 to 16); ``lengths``: see ``LENGTHS``; ``skip``: gradient norm from
    which on an update is left out; ``drop``: share of clips trained without their text.
    """

    memory: float = 0.8
    shift: float = 3.0
    rows: tuple[int, int] = (500, 984)
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    skip: float = 10.0
    drop: float = 0.1

    def __post_init__(self) -> None:
        low, high = self.rows
        if not (0 <= self.memory <= 1 and 0 <= self.drop < 1 and 0 <= low <= high < 1000
                and self.lengths and self.lengths[0][0] == 0 and self.skip > 0):
            raise ConfigError(
                "impossible chunk-causal training", given=f"memory {self.memory}, rows {self.rows}"
                f", lengths {self.lengths}, skip {self.skip}, drop {self.drop}",
                expected="shares, ascending rows of 0..999, lengths from iteration 0 on, skip > 0",
                fix="leave them out")


@dataclass(frozen=True, slots=True)
class Frames:
    """Latent frames of clips and what belongs to each.

    ``cameras``: float64; ``number_BF``: which frame of its episode each is; ``text_BLD``: of every
    clip, None for a network that reads none.
    """

    latents_BFChw: Tensor
    cameras: Cameras
    labels_BF: Tensor
    number_BF: Tensor
    text_BLD: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.latents_BFChw.shape[:2])
        given = (shape, tuple(self.cameras.w2c_BF44.shape[:2]), tuple(self.labels_BF.shape),
                 tuple(self.number_BF.shape))
        if len(set(given)) > 1 or self.latents_BFChw.ndim != 5:
            raise ShapeError("frames, cameras, labels do not fit", given=given,
                             expected=f"(B, F) of latents {tuple(self.latents_BFChw.shape)}",
                             fix="give one of each per latent frame")

    @classmethod
    def of(cls, latents_BFChw: Tensor, w2c_BF44: np.ndarray, labels_BF: np.ndarray,
           K_33: np.ndarray | None = None, number_BF: np.ndarray | None = None,
           text_BLD: Tensor | None = None) -> "Frames":
        """From arrays; ``K_33``: one lens for all; ``number_BF``: default 0..F-1."""
        place, (b, f) = latents_BFChw.device, latents_BFChw.shape[:2]
        number = np.arange(f)[None].repeat(b, 0) if number_BF is None else number_BF
        K = None if K_33 is None else torch.from_numpy(np.asarray(K_33, np.float64)).to(
            place).expand(b, f, 3, 3)
        return cls(latents_BFChw, Cameras(torch.from_numpy(np.asarray(w2c_BF44, np.float64)).to(
            place), K), torch.from_numpy(np.asarray(labels_BF)).to(place),
            torch.from_numpy(number).to(place), text_BLD)

    def __len__(self) -> int:
        return len(self.latents_BFChw)

    def take(self, index_BK: np.ndarray | Tensor) -> "Frames":
        """Some frames of every clip."""
        index = torch.as_tensor(index_BK, device=self.labels_BF.device)
        row, K = torch.arange(len(self), device=index.device)[:, None], self.cameras.K_BF33
        return Frames(self.latents_BFChw[row, index], Cameras(
            self.cameras.w2c_BF44[row, index], None if K is None else K[row, index]),
            self.labels_BF[row, index], self.number_BF[row, index], self.text_BLD)

    def span(self, start: int, end: int) -> "Frames":
        """Frames start..end-1 of every clip."""
        return self.take(torch.arange(start, end).expand(len(self), -1))

    def rows(self, index: Sequence[int]) -> "Frames":
        """Some clips."""
        i = torch.as_tensor(index, device=self.labels_BF.device)
        text = None if self.text_BLD is None else self.text_BLD[i]
        return Frames(self.latents_BFChw[i], self.cameras.rows(i), self.labels_BF[i],
                      self.number_BF[i], text)

    @property
    def here(self) -> Tensor:
        """Camera (B, 4, 4) of every clip's first frame: the origin that attention works from."""
        return self.cameras.w2c_BF44[:, 0]


def encode(dit: WorldPlayDiT, past: Frames, here_B44: Tensor, t: float = CONTEXT_TIME,
           plain: bool = False) -> Context | None:
    """Context that frames seen from ``here`` shall see, as while stepping; None without frames.

    No gradient reaches the past latents. ``plain``: positions are the true frame numbers instead of
    ranks.
    """
    if not past.labels_BF.shape[1]:
        return None
    return dit.context(
        past.latents_BFChw.detach().transpose(1, 2), past.text_BLD, labels_BF=past.labels_BF,
        cameras=past.cameras.seen_from(here_B44), t=t,
        **({"frame_index_BF": past.number_BF} if plain else {}))


def flow_of(dit: WorldPlayDiT, noisy_BNChw: Tensor, t_BN: Tensor, new: Frames, seen: int,
            context: Context | None = None, plain: bool = False,
            sees_FF: Tensor | None = None) -> Tensor:
    """Flow (B, N, C, h, w) of noisy latents in the place of ``new``.

    ``seen``: frames of ``context``; they count before the new ones.
    """
    index = new.number_BF if plain else seen + torch.arange(
        new.labels_BF.shape[1], device=new.labels_BF.device)
    flow = dit(noisy_BNChw.transpose(1, 2), t_BN, new.text_BLD, labels_BF=new.labels_BF,
               cameras=new.cameras.seen_from(new.here), context=context, frame_index_BF=index,
               sees_FF=sees_FF)
    return flow.transpose(1, 2)


def groups(chosen: Sequence[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Clips whose choices have the same number of frames: their rows, and choices (b, K)."""
    lengths = np.array([len(c) for c in chosen])
    for length in np.unique(lengths):
        rows = [int(i) for i in np.flatnonzero(lengths == length)]
        yield rows, np.stack([chosen[i] for i in rows]).astype(np.int64)


def joint_flow(dit: WorldPlayDiT, noisy_BNChw: Tensor, t_B: Tensor, clip: Frames, start: int,
               chosen: Sequence[np.ndarray], plain: bool = False) -> Tensor:
    """Flow (B, N, C, h, w) of the frames from ``start`` on, all seeing each other and clean frames.

    Args:
        noisy_BNChw: at one timestep ``t_B`` per clip. clip: frames 0.. of the episode.
        chosen: context of every clip, of any lengths.
    """
    n, order, parts = noisy_BNChw.shape[1], [], []
    for rows, index_bK in groups(chosen):
        some = clip.rows(rows)
        new = some.span(start, start + n)
        context = encode(dit, some.take(index_bK), new.here, plain=plain)
        times = t_B[rows, None].expand(-1, n)
        parts.append(flow_of(dit, noisy_BNChw[rows], times, new, index_bK.shape[1], context, plain))
        order += rows
    return torch.cat(parts)[torch.as_tensor(np.argsort(order), device=noisy_BNChw.device)]


# -- chunk-causal: every chunk has its own noise level --------------------------------------------


def causal_sequence(policy: Reconstituted, w2c_F44: np.ndarray, K_33: np.ndarray | None,
                    rng: np.random.Generator, memory: float = 0.8) -> tuple[np.ndarray, bool]:
    """Frames (W,) of a training sequence of a clip, and whether it is a memory sample.

    A memory sample: a chunk that begins at 4 U{W/4 .. (F-4)/4} after what the policy retrieves for
    it; else the clip's first W frames. W: frames of a whole context and a chunk.
    """
    n, wide = policy.chunk, policy.total + policy.chunk
    if len(w2c_F44) < wide:
        raise DatasetError("clip is too short for a training sequence", given=len(w2c_F44),
                           expected=f"at least {wide} latent frames", fix="record longer episodes")
    last = (len(w2c_F44) - n) // n
    if rng.random() >= memory or last < wide // n:
        return np.arange(wide), False
    start = n * int(rng.integers(wide // n, last + 1))
    return np.concatenate([policy.select(w2c_F44, start, K_33), start + np.arange(n)]), True


def causal_times(draw: Draw, memory_B: Tensor, frames: int, chunk: int,
                 cfg: CausalConfig) -> tuple[Tensor, Tensor]:
    """Timesteps (B, W) and which frames count (B, W) of sequences of ``frames``."""
    chunks = frames // chunk
    t = chunk_times(torch.sigmoid(draw(torch.randn, chunks)), shift=cfg.shift)
    low, high = cfg.rows
    past = context_times(torch.floor(low + (high - low + 1) * draw(torch.rand, chunks)))
    old = memory_B[:, None] & (torch.arange(chunks, device=t.device) < chunks - 1)
    return tuple(x.repeat_interleave(chunk, 1)  # type: ignore[return-value]
                 for x in (torch.where(old, past.to(t), t), ~old))


@cache
def _causal_mask(frames: int, chunk: int) -> Tensor:
    return causal_frame_mask(block_ids(frames, chunk))


def causal_loss(dit: WorldPlayDiT, clip_BW: Frames, memory_B: Tensor, draw: Draw, chunk: int = 4,
                cfg: CausalConfig = CausalConfig(), plain: bool = False,
                empty_LD: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """Flow-matching loss of sequences whose chunks see those before them, as noisy as they are.

    Args:
        clip_BW: frames as ``causal_sequence`` chose them. memory_B: which are memory samples, of
            which the last chunk alone counts.
        empty_LD: the text of no prompt, which some clips get instead of theirs (``cfg.drop``).
    """
    x = clip_BW.latents_BFChw
    t, counts = causal_times(draw, memory_B, x.shape[1], chunk, cfg)
    noise = draw(torch.randn, *x.shape[1:])
    noisy = add_noise(x, noise, (t / 1000).to(x))
    if clip_BW.text_BLD is not None and empty_LD is not None:
        gone = draw(torch.rand, 1, 1) < cfg.drop
        clip_BW = replace(clip_BW, text_BLD=torch.where(gone, empty_LD, clip_BW.text_BLD))
    flow = flow_of(dit, noisy, t.to(x), clip_BW, 0, plain=plain,
                   sees_FF=_causal_mask(x.shape[1], chunk))
    error = ((flow - (noise - x)) ** 2).mean((2, 3, 4))
    loss = (error * counts).sum() / counts.sum()
    return loss, {"memory_share": float(memory_B.double().mean())}


# -- joint: the bidirectional teacher, and the critic of its student ------------------------------


def noised(x_BNChw: Tensor, t_B: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Frames at one timestep per clip, and the noise in them."""
    noise = draw(torch.randn, *x_BNChw.shape[1:])
    return add_noise(x_BNChw, noise, (t_B / 1000).to(x_BNChw)), noise


def joint_loss(dit: WorldPlayDiT, clip: Frames, start: int, target_BNChw: Tensor,
               chosen: Sequence[np.ndarray], t_B: Tensor, draw: Draw, plain: bool = False
               ) -> Tensor:
    """Flow-matching loss of ``target`` in the place of the frames from ``start`` on."""
    noisy, noise = noised(target_BNChw, t_B, draw)
    flow = joint_flow(dit, noisy, t_B, clip, start, chosen, plain)
    return ((flow - (noise - target_BNChw)) ** 2).mean()


def with_latents(clip: Frames, latents_BFChw: Tensor) -> Frames:
    """The same frames with other latents."""
    return replace(clip, latents_BFChw=latents_BFChw)
