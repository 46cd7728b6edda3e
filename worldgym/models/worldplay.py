"""WorldPlay's network: the Wan DiT with cameras and keys (specs/worldplay.md sections 4 to 6).

Shapes as in wan.py. Two additions: every self-attention has a second branch that sees cameras
instead of positions (prope.py), and the label of a frame's action joins its time embedding. A chunk
sees its context through a ``Context``: keys and values made by one pass over clean past latents.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldgym.attention import attention
from worldgym.errors import ActionError, ConfigError, ShapeError
from worldgym.models.prope import Cameras
from worldgym.models.wan import WAN_5B, WanConfig, WanDiT

LABELS = 81  # 9 translations x 9 rotations
CONTEXT_TIME = 14.0  # timestep of clean context latents


@dataclass(frozen=True, slots=True)
class Context:
    """Keys and values of past frames, per layer: by position (k, v) and by camera (k, v)."""

    position: tuple[tuple[Tensor, Tensor], ...]
    camera: tuple[tuple[Tensor, Tensor], ...]

    def map(self, how: Callable[[Tensor], Tensor]) -> "Context":
        """Every tensor changed in the same way."""
        return Context(*(tuple((how(k), how(v)) for k, v in which)
                         for which in (self.position, self.camera)))

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(x.nbytes for pair in self.position + self.camera for x in pair)


def config_of(data: Mapping[str, Any]) -> WanConfig:
    """Sizes from a diffusers ``config.json`` of a Wan transformer; native names work too."""
    names = {"num_attention_heads": "num_heads", "in_channels": "in_dim",
             "out_channels": "out_dim"}
    known = {names.get(k, k): v for k, v in data.items() if v is not None}
    if "attention_head_dim" in known:
        known.setdefault("dim", known["num_heads"] * known["attention_head_dim"])
    return WanConfig.from_dict(known)


def angles32(value: Tensor, half: int) -> Tensor:
    """Angles of the published sinusoids (..., half): value * 10000^(-j / half), in float32."""
    power = torch.arange(half, dtype=torch.float32, device=value.device) / half
    return value.float()[..., None] * torch.exp(-math.log(10000) * power)


def check_labels(labels_BF: Tensor) -> Tensor:
    """The labels, if they are some of the 81; else a named error."""
    if labels_BF.ndim != 2 or not bool(((labels_BF >= 0) & (labels_BF < LABELS)).all()):
        raise ActionError("label is not one of the 81", given=labels_BF.flatten()[:8].tolist(),
                          expected=f"(B, F) numbers 0..{LABELS - 1}: 9 * move + turn",
                          fix="use worldgym.camera.label")
    return labels_BF


def context_times(x_BCFHW: Tensor, t: float | Tensor) -> Tensor:
    """Timesteps (B, F) of context frames: one for all, or what is given for each."""
    return t if isinstance(t, Tensor) else torch.full(
        (len(x_BCFHW), x_BCFHW.shape[2]), t, device=x_BCFHW.device)


class WorldPlayDiT(WanDiT):
    """``WanDiT`` that knows where the camera is and what was pressed.

    >>> cfg = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4,
    ...                 freq_dim=8, text_dim=8, text_len=2)
    >>> cameras = Cameras(torch.eye(4).expand(1, 2, 4, 4))
    >>> WorldPlayDiT(cfg)(torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 2), torch.zeros(1, 2, 8),
    ...                   labels_BF=torch.zeros(1, 2), cameras=cameras).shape
    torch.Size([1, 4, 2, 4, 4])
    """

    def __init__(self, cfg: WanConfig = WAN_5B) -> None:
        super().__init__(cfg)
        if cfg.head_dim % 4:
            raise ConfigError("head width does not split into points", given=cfg.head_dim,
                              expected="a multiple of 4", fix="change dim or num_heads")
        self.action_embedding = nn.Sequential(
            nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        for block in cast(Any, self.blocks):
            block.self_attn.o_camera = nn.Linear(cfg.dim, cfg.dim)
        self.silence()

    def silence(self) -> None:
        """Make the additions add nothing: the network is the plain Wan network then."""
        layers: list[nn.Linear] = [b.self_attn.o_camera for b in cast(Any, self.blocks)]
        for layer in (*layers, cast(nn.Linear, self.action_embedding[2])):
            if not layer.weight.is_meta:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights as in ``WanDiT``; the additions start silent."""
        super().initialize(generator)
        self.silence()

    def angles(self, value_BF: Tensor) -> Tensor:
        """As in ``WanDiT``, but in float32: so the network was trained, and it shows (5e-5)."""
        return angles32(value_BF, self.cfg.freq_dim // 2)

    def actions(self, labels_BF: Tensor) -> Tensor:
        """Embedding (B, F, D) of labels 0..80; the number itself is the sinusoid's position."""
        rows = self.action_embedding(self.wave(check_labels(labels_BF)))
        return rows[:labels_BF.numel()].unflatten(0, labels_BF.shape)

    def forward(self, x_BCFHW: Tensor, t: Tensor, context_BLD: Tensor | None = None, *,
                labels_BF: Tensor | None = None, cameras: Cameras | None = None,
                context: Context | None = None,
                record: list[tuple[Tensor, ...]] | None = None,
                sees_FF: Tensor | None = None, **given: Any) -> Tensor:
        """Flow (B, C, F, H, W).

        Args:
            x_BCFHW: latents; ``t``: timesteps (B,) or (B, F); ``context_BLD``: text.
            labels_BF: action label of every frame; None: the additions are skipped, as
                ``cameras`` None skips the second branch.
            cameras: of these frames; in the same world coordinates as those of ``context``.
            context: what the frames see besides themselves.
            record: keys and values of every layer are appended to it.
            sees_FF: bool, True = the frame (row) sees that frame, in both branches; None: each sees
                all. A context is seen anyway.
            given: as in ``WanDiT``; ``frame_index_BF`` starts at the number of context frames.
        """
        if cameras is not None and cameras.w2c_BF44.shape[:2] != (len(x_BCFHW), x_BCFHW.shape[2]):
            raise ShapeError("cameras do not fit the latents",
                             given=tuple(cameras.w2c_BF44.shape),
                             expected=(len(x_BCFHW), x_BCFHW.shape[2], 4, 4),
                             fix="give one camera per slot and latent frame")
        see = None if cameras is None else cameras.projection(self.head.modulation)
        mask = None if sees_FF is None else self._tokens(sees_FF, x_BCFHW, context)

        def with_context(which: tuple[tuple[Tensor, Tensor], ...], layer: int, k: Tensor,
                         v: Tensor) -> tuple[Tensor, Tensor]:
            old_k, old_v = which[layer]
            return torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if record is not None:
                record.append((k, v))
            if context is not None:
                k, v = with_context(context.position, layer, k, v)
            return attention(q, k, v, mask)

        def beside(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert see is not None
            k, v = see.key(k), see.key(v)
            if record is not None:
                record[-1] += (k, v)
            if context is not None:
                k, v = with_context(context.camera, layer, k, v)
            y = see.out(attention(see.query(q), k, v, mask))
            return cast(Any, self.blocks[layer]).self_attn.o_camera(y.flatten(2))

        if labels_BF is not None:
            given["cond_BFD"] = self.actions(labels_BF)
        return super().forward(x_BCFHW, t, context_BLD, attend=attend,
                               beside=beside if see is not None else None, **given)

    def _tokens(self, sees_FF: Tensor, x_BCFHW: Tensor, context: Context | None) -> Tensor:
        """The mask of the tokens that one of frames stands for."""
        frames = x_BCFHW.shape[2]
        if sees_FF.shape != (frames, frames):
            raise ShapeError("mask does not fit the frames", given=tuple(sees_FF.shape),
                             expected=(frames, frames), fix="one row and column per latent frame")
        size = x_BCFHW[0, 0, 0].numel() // (self.cfg.patch_size[1] * self.cfg.patch_size[2])
        mask = sees_FF.to(x_BCFHW.device).repeat_interleave(size, 0).repeat_interleave(size, 1)
        old = 0 if context is None else context.position[0][0].shape[1]
        return nn.functional.pad(mask, (old, 0), value=True)

    def context(self, x_BCFHW: Tensor, context_BLD: Tensor | None = None, *, labels_BF: Tensor,
                cameras: Cameras, t: float | Tensor = CONTEXT_TIME, **given: Any) -> Context:
        """Keys and values of clean past latents, which all see each other (section 6).

        Positions are the ranks 0..F-1, whatever the true gaps between the frames, unless
        ``frame_index_BF`` is given. ``t``: one timestep, or one per frame (B, F).
        """
        record: list[tuple[Tensor, ...]] = []
        self(x_BCFHW, context_times(x_BCFHW, t), context_BLD, labels_BF=labels_BF,
             cameras=cameras, record=record, **given)
        return Context(tuple((r[0], r[1]) for r in record), tuple((r[2], r[3]) for r in record))
