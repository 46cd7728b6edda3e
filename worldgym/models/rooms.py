"""A small WorldPlay of our own: ``nano``'s codec, the camera DiT, reconstituted memory, two heads.

Shapes: B slot, n latent frame of a chunk, K context frame, F latent frame, C channel, h w latent
grid. A world folder holds ``world.safetensors``, ``world.json`` and ``starts.safetensors``
(pictures that episodes begin with).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym import camera, checkpoint
from worldgym.errors import ConfigError
from worldgym.models.codec import Codec, CodecConfig
from worldgym.models.controls import Controls
from worldgym.models.film import FrameVideo
from worldgym.models.nano import WEIGHTS, dit_config, read_config, seeded, value_fingerprint
from worldgym.models.outcome import linear, neighbours
from worldgym.models.prope import Cameras
from worldgym.models.wan import WanConfig
from worldgym.models.worldplay import CONTEXT_TIME, WorldPlayDiT
from worldgym.models.worldplay_world import WorldPlayWorld
from worldgym.reconstituted import Recent, Reconstituted, Scoring
from worldgym.schedule import Euler

KIND = "worldgym.rooms"
CLEAN = CONTEXT_TIME  # timestep of context frames without noise
MEMORIES = ("memory", "none")
POSITIONS = ("reframed", "plain")
WISH = 6  # numbers that tell where a frame's keys want to go


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomsConfig:
    """Everything that fixes such a world but its weights.

    ``labels``: of the keys; ``move``, ``turn``: what a key does in a frame; ``K``: pixel intrinsics
    in rows; ``chunk``: frames of a step; ``total``, ``temporal``: frames of a context, and how many
    of them are the newest; ``points``, ``radius``, ``distance_weight``: of the retrieval's score
    (``Scoring``; the true field of view); ``steps``: denoising timesteps; ``positions``: of context
    frames, "reframed" (ranks) or "plain" (true frame numbers); ``memory``: "memory", or "none", the
    newest frames alone; ``reward``: of an end; ``sure``: chances of an end below it count as none.
    """

    name: str
    labels: tuple[int, ...]
    move: float
    turn: float
    K: tuple[float, ...]
    fps: float = 8.0
    codec: CodecConfig = field(default_factory=lambda: CodecConfig(frame_hw=(48, 64), channels=16))
    wan: WanConfig = field(default_factory=lambda: dit_config(16, 0))
    chunk: int = 4
    total: int = 16
    temporal: int = 8
    points: int = 2000
    radius: float = 3.0
    distance_weight: float = 0.2
    steps: tuple[float, ...] = (1000.0, 937.5, 833.3333, 625.0)
    temperature: float = 1.0
    positions: str = "reframed"
    memory: str = "memory"
    head_width: int = 48
    reward: float = 1.0
    sure: float = 0.5

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS or self.memory not in MEMORIES or len(self.K) != 9:
            raise ConfigError("impossible rooms", given=f"{self.positions!r}, {self.memory!r}",
                              expected=f"{POSITIONS}, {MEMORIES}, 9 numbers of K",
                              fix="leave them out")

    def to_json(self) -> dict:
        """Plain dict that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RoomsConfig":
        """Inverse of ``to_json``."""
        try:
            known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                                     for k, v in data.items()}
            codec = {**known["codec"], "frame_hw": tuple(known["codec"]["frame_hw"])}
            return cls(**{**known, "codec": CodecConfig(**codec),
                          "wan": WanConfig.from_dict(known["wan"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("rooms configuration cannot be read", given=str(error),
                              expected="the dict that RoomsConfig.to_json writes",
                              fix="take world.json from the folder of the weights") from error

    @property
    def policy(self) -> Reconstituted:
        """Which past frames a chunk sees."""
        kind = Reconstituted if self.memory == "memory" else Recent
        return kind(total=self.total, temporal=self.temporal, chunk=self.chunk, scoring=Scoring(
            points=self.points, radius=self.radius, fov=None,
            distance_weight=self.distance_weight))

    @property
    def controls(self) -> Controls:
        """What the keys mean."""
        return Controls(kind="labels", labels=tuple(self.labels), move=self.move, turn=self.turn)

    @property
    def K_33(self) -> np.ndarray:
        """Pixel intrinsics."""
        return np.reshape(np.asarray(self.K, np.float64), (3, 3))


class ChunkDynamics(nn.Module):
    """The camera DiT as it is trained: one context pass, then chunks that see it."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.dit = WorldPlayDiT(cfg)

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights; the additions start silent."""
        self.dit.initialize(generator)

    def forward(self, context_BCKhw: Tensor, context_t_BK: Tensor, context_labels_BK: Tensor,
                context_w2c_BK44: Tensor, context_index_BK: Tensor, noisy_BRCnhw: Tensor,
                t_BRn: Tensor, labels_Bn: Tensor, w2c_Bn44: Tensor, index_Bn: Tensor,
                K_33: Tensor) -> Tensor:
        """Flow (B, R, C, n, h, w) of R noisy versions of each chunk, which share their context."""
        b, r = noisy_BRCnhw.shape[:2]
        here = w2c_Bn44[:, 0]

        def cameras(w2c: Tensor, origin: Tensor) -> Cameras:
            return Cameras(w2c, K_33.expand(*w2c.shape[:2], 3, 3)).seen_from(origin)

        def each(x: Tensor) -> Tensor:
            return x.repeat_interleave(r, 0)

        context = self.dit.context(
            context_BCKhw, labels_BF=context_labels_BK, cameras=cameras(context_w2c_BK44, here),
            t=context_t_BK, frame_index_BF=context_index_BK).map(each)
        flow = self.dit(
            noisy_BRCnhw.flatten(0, 1), t_BRn.flatten(0, 1), labels_BF=each(labels_Bn),
            cameras=cameras(each(w2c_Bn44), each(here)), context=context,
            frame_index_BF=each(index_Bn))
        return flow.unflatten(0, (b, r))


class RoomsHeads(nn.Module):
    """What walls let happen, and where an episode ends: both read off latents.

    ``forward(latents_BChw, wish_BW) -> (B, 2)``: logits that the wished move is free, seen from the
    frame, and that the frame shows the end (for which the wish is zeros).
    """

    def __init__(self, cfg: RoomsConfig) -> None:
        super().__init__()
        c, h, w = cfg.codec.latent_chw
        self.move, self.turn, self.sure, self.reward = cfg.move, cfg.turn, cfg.sure, cfg.reward
        self.inputs = nn.Linear(9 * (c + 1), cfg.head_width)
        self.hidden = nn.Linear(cfg.head_width * h * w + WISH, 128)
        self.last = nn.Linear(128 + WISH, 2)

    def forward(self, latents_BChw: Tensor, wish_BW: Tensor) -> Tensor:
        x = torch.cat([latents_BChw, torch.ones_like(latents_BChw[:, :1])], 1)
        y = F.silu(linear(self.inputs, neighbours(x)))
        y = F.silu(linear(self.hidden, torch.cat([y.flatten(1), wish_BW], 1)))
        return linear(self.last, torch.cat([y, wish_BW], 1))

    def wishes(self, labels_Bn: np.ndarray) -> np.ndarray:
        """Where the keys of each frame want to be, seen from before the chunk (B, n, W)."""
        out = np.zeros((*labels_Bn.shape, WISH), np.float32)
        for row, labels in zip(out, labels_Bn, strict=True):
            motions = camera.motions_of(labels, self.move, self.turn)
            path = camera.walk(motions)[1:]
            row[:, :4] = path[:, [0, 2, 0, 2], [3, 3, 2, 2]]
            row[:, 4:] = motions[:, :2] / self.move
            row[:, :2] /= 4 * self.move
        return out

    @torch.no_grad()
    def moves(self, latents_BChw: Tensor, labels_Bn: Tensor) -> Tensor:
        """Whether each frame's move happens (B, n), as the frame before the chunk shows it."""
        n = labels_Bn.shape[1]
        wish = torch.from_numpy(self.wishes(labels_Bn.cpu().numpy())).to(latents_BChw)
        return self._rows(latents_BChw.repeat_interleave(n, 0), wish.flatten(0, 1))[:, 0].reshape(
            -1, n) > 0

    @torch.no_grad()
    def ends(self, before_BChw: Tensor, latents_BFChw: Tensor) -> Tensor:
        """Chance (B, F) that each latent frame is an episode's last."""
        flat = latents_BFChw.flatten(0, 1)
        chance = self._rows(flat, flat.new_zeros(len(flat), WISH))[:, 1].sigmoid()
        return torch.where(chance < self.sure, 0.0, chance).reshape(latents_BFChw.shape[:2])

    def _rows(self, latents_BChw: Tensor, wish_BW: Tensor) -> Tensor:
        """Of a multiple of 4 rows and one more, so that bits do not depend on the batch."""
        rows = len(latents_BChw)
        pad = 4 - rows % 4
        return self(F.pad(latents_BChw, (0, 0) * 3 + (0, pad)), F.pad(wish_BW, (0, 0, 0, pad))
                    )[:rows]


class RoomsNet(nn.Module):
    """The three trainable parts."""

    def __init__(self, cfg: RoomsConfig) -> None:
        super().__init__()
        c, h, w = cfg.codec.latent_chw
        ph, pw = cfg.wan.patch_size[1:]
        if (cfg.wan.in_dim, cfg.wan.out_dim) != (c, c) or h % ph or w % pw:
            raise ConfigError("codec and dynamics do not fit",
                              given=f"in_dim {cfg.wan.in_dim}, patch {cfg.wan.patch_size}",
                              expected=f"{c} channels, a patch that divides {h} x {w}",
                              fix="build the sizes with nano.dit_config(channels, 0)")
        self.cfg = cfg
        self.codec, self.outcome = Codec(cfg.codec), RoomsHeads(cfg)
        self.dynamics = ChunkDynamics(cfg.wan)

    def world(self, device: torch.device | str = "cpu", **settings: Any) -> WorldPlayWorld:
        """A world that steps with these weights."""
        self.eval().requires_grad_(False).to(device)
        cfg = self.cfg
        return WorldPlayWorld(
            self.dynamics.dit, FrameVideo(self.codec), memory=cfg.policy,
            sampler=Euler.at(cfg.steps), controls=cfg.controls, K_33=cfg.K_33, opening="still",
            heads=self.outcome, fps=cfg.fps, temperature=cfg.temperature, name=cfg.name,
            positions=cfg.positions, fingerprint=value_fingerprint(self), **settings)


def fresh(cfg: RoomsConfig, seed: int = 0) -> RoomsNet:
    """Untrained weights that depend on ``seed`` alone."""
    return seeded(RoomsNet(cfg), seed)


def load_net(folder: str | Path, **changes: Any) -> RoomsNet:
    """Weights and configuration of a world folder; ``changes`` override configuration fields."""
    net = RoomsNet(replace(RoomsConfig.from_json(read_config(folder)), **changes))
    return checkpoint.load_into(net, Path(folder) / WEIGHTS)


def load(folder: str | Path, device: torch.device | str = "cpu", **changes: Any) -> WorldPlayWorld:
    """A world from a folder, ready to step."""
    return load_net(folder, **changes).world(device)


@dataclass(frozen=True, slots=True)
class RoomsStarts:
    """What episodes begin with: pictures uint8 (N, H, W, 3), and for the last M of them the walk
    that led there: latents (M, K, C, h, w) and poses c2w (M, K, 4, 4), newest last, of which the
    last ``length_M`` count (whole chunks)."""

    frames_NHWC: np.ndarray
    latents_MKChw: Tensor
    c2w_MK44: np.ndarray
    length_M: np.ndarray

    def pasts(self) -> list[tuple[Tensor, np.ndarray] | None]:
        """Latents and poses (k, ...) behind every picture; None where it is all there is."""
        walks = [(z[len(z) - k:].float(), c[len(c) - k:]) for z, c, k in zip(
            self.latents_MKChw, self.c2w_MK44, self.length_M.tolist(), strict=True)]
        return [None] * (len(self.frames_NHWC) - len(walks)) + walks

    def save(self, folder: str | Path) -> None:
        """Write ``starts.safetensors``; latents in half precision."""
        checkpoint.save(Path(folder) / "starts.safetensors", {
            "frames": torch.from_numpy(np.ascontiguousarray(self.frames_NHWC)),
            "latents": self.latents_MKChw.half(), "c2w": torch.from_numpy(self.c2w_MK44),
            "length": torch.from_numpy(self.length_M)}, {"kind": KIND + ".starts"})

    @classmethod
    def load(cls, folder: str | Path) -> "RoomsStarts":
        """Inverse of ``save``."""
        tensors, header = checkpoint.load_tensors(Path(folder) / "starts.safetensors")
        names = ("frames", "latents", "c2w", "length")
        if header.get("kind") != KIND + ".starts" or not set(names) <= set(tensors):
            raise ConfigError("not the starts of a rooms world", given=json.dumps(header)[:80],
                              expected=KIND + ".starts", fix="fit the world again")
        frames, latents, c2w, length = (tensors[n] for n in names)
        return cls(frames.numpy(), latents, c2w.numpy(), length.numpy())
