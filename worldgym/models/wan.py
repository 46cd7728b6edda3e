"""The Wan video DiT, bidirectional and causal (Wan2.1; specs/actionparty.md section 3).

Shapes: B slot, F latent frame, C channel, H W latent height and width, h w token grid,
P = h * w tokens per frame, T = F * P tokens, D width, N heads, E head width, L text token.
One network serves every use: which tokens see which is decided by the ``attend`` argument (a mask
while training, paged memory while stepping). ``nano`` is this same class at a small size.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.attention import attention
from worldgym.errors import ConfigError, ShapeError
from worldgym.rope import clip_table, cos_sin, rotate, rotation

# attend(layer, q_BTNE, k_BTNE, v_BTNE) -> out_BTNE; q and k are already rotated
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# between(layer, x_BTD) -> x_BTD: what a model adds to the stream before the feed-forward
Between = Callable[[int, Tensor], Tensor]
# beside(layer, q_BTNE, k_BTNE, v_BTNE) -> y_BTD: what a model adds to the self-attention's output;
# q and k are not rotated
Beside = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# cross-attention of one layer: keys and values that every token sees, or cross(q_BTNE) -> out_BTNE
Cross = tuple[Tensor, Tensor] | Callable[[Tensor], Tensor]
# A float32 matrix product gives row-independent bits from 4 rows on, elementwise kernels for sizes
# that are multiples of 32 (they work out the rest in other code): choose dim % 32 == 0 (test_wan).
MIN_ROWS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class WanConfig:
    """Sizes under their native names. ``text_len=0``: no text, and no cross-attention at all."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                "width does not split into heads", given=f"dim {self.dim}, heads {self.num_heads}",
                expected="an even number of channels per head", fix="change dim or num_heads",
            )
        if self.patch_size[0] != 1:
            raise ConfigError(
                "temporal patches are not supported", given=self.patch_size,
                expected="(1, ph, pw): one latent frame per token row",
                fix="use a patch size of 1 in time",
            )

    @classmethod
    def from_dict(cls, data: Mapping) -> "WanConfig":
        """Read a native ``config.json`` dict; unknown descriptive keys are ignored."""
        names = {f.name for f in fields(cls)}
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}
        return cls(**known)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.num_heads


WAN_1_3B = WanConfig()
WAN_5B = WanConfig(dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48)  # Wan2.2-TI2V


class RMSNorm(nn.Module):
    """Root-mean-square norm with weight over the full width."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    """Projections shared by self- and cross-attention."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.heads = cfg.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q = RMSNorm(cfg.dim, cfg.eps)
        self.norm_k = RMSNorm(cfg.dim, cfg.eps)

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1))
        return k, self.v(x).unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, modulated per frame by the timestep."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.eps = cfg.eps
        self.self_attn = _Attention(cfg)
        if cfg.text_len:
            self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
            self.cross_attn = _Attention(cfg)
        self.ffn = nn.Sequential(
            nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU("tanh"), nn.Linear(cfg.ffn_dim, cfg.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)

    def forward(self, x_BTD: Tensor, mod_BF6D: Tensor, table: tuple[Tensor, Tensor],
                attend: Callable[[Tensor, Tensor, Tensor], Tensor],
                text_kv: Cross | None,
                between: Callable[[Tensor], Tensor] | None = None,
                beside: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
        m = (self.modulation + mod_BF6D).unsqueeze(3).unbind(2)  # six of (B, F, 1, D)
        y = self._modulate(x_BTD, m[0], m[1])
        q, (k, v) = self.self_attn.query(y), self.self_attn.key_value(y)
        y = attend(rotate(q, table), rotate(k, table), v).flatten(2)
        y = self.self_attn.o(y)
        if beside is not None:
            y = y + beside(q, k, v)
        x_BTD = self._gate(x_BTD, y, m[2])
        if text_kv is not None:
            q = self.cross_attn.query(self.norm3(x_BTD))
            y = text_kv(q) if callable(text_kv) else attention(q, *text_kv)
            x_BTD = x_BTD + self.cross_attn.o(y.flatten(2))
        if between is not None:
            x_BTD = between(x_BTD)
        return self._gate(x_BTD, self.ffn(self._modulate(x_BTD, m[3], m[4])), m[5])

    def _modulate(self, x_BTD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor) -> Tensor:
        y = F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=self.eps)
        y = y.unflatten(1, (shift_BF1D.shape[1], -1))
        return torch.addcmul(shift_BF1D, y, 1 + scale_BF1D).flatten(1, 2)

    @staticmethod
    def _gate(x_BTD: Tensor, y_BTD: Tensor, gate_BF1D: Tensor) -> Tensor:
        frames = (gate_BF1D.shape[1], -1)
        out = torch.addcmul(x_BTD.unflatten(1, frames), y_BTD.unflatten(1, frames), gate_BF1D)
        return out.flatten(1, 2)


class Head(nn.Module):
    """Last modulation and projection to patches."""

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.dim, cfg.out_dim * cfg.patch_size[1] * cfg.patch_size[2])
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x_BTD: Tensor, e_BFD: Tensor) -> Tensor:
        shift, scale = (self.modulation + e_BFD.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(Block._modulate(self, x_BTD, shift, scale))  # type: ignore[arg-type]


class WanDiT(nn.Module):
    """Diffusion transformer that predicts the flow (noise - clean) of latent frames.

    >>> cfg = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4,
    ...                 freq_dim=8, text_len=0)
    >>> x = torch.zeros(1, 4, 2, 4, 4)
    >>> WanDiT(cfg)(x, torch.zeros(1, 2)).shape
    torch.Size([1, 4, 2, 4, 4])
    """

    def __init__(self, cfg: WanConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.near: Callable[[nn.Module], AbstractContextManager] = nullcontext  # see offload.py
        dim, patch = cfg.dim, cfg.patch_size
        self.patch_embedding = nn.Conv3d(cfg.in_dim, dim, patch, stride=patch)
        if cfg.text_len:
            self.text_embedding = nn.Sequential(
                nn.Linear(cfg.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
            )
        self.time_embedding = nn.Sequential(
            nn.Linear(cfg.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights: Xavier linears, N(0, 0.02) embeddings, zero output."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "embedding" in name and "patch" not in name:
                nn.init.normal_(p, std=0.02, generator=generator)
            elif name.endswith("modulation"):
                nn.init.normal_(p, std=self.cfg.dim**-0.5, generator=generator)
            elif p.ndim > 1:
                nn.init.xavier_uniform_(p.flatten(1), generator=generator)
        nn.init.zeros_(self.head.head.weight)

    def text(self, context_BLD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the text for every layer; constant during a rollout.

        Rows are padded with zeros to ``text_len`` before the embedding and are attended.
        """
        if context_BLD.shape[-1] != self.cfg.text_dim or context_BLD.shape[1] > self.cfg.text_len:
            raise ShapeError(
                "text embedding has the wrong shape", given=tuple(context_BLD.shape),
                expected=f"(batch, <= {self.cfg.text_len}, {self.cfg.text_dim})",
                fix="encode the prompt with the model's own text encoder",
            )
        pad = self.cfg.text_len - context_BLD.shape[1]
        y = self.text_embedding(F.pad(context_BLD, (0, 0, 0, pad)))
        out = []
        for block in self.blocks:
            with self.near(block):
                out.append(cast(Block, block).cross_attn.key_value(y))
        return out

    def time(self, t_BF: Tensor, cond_BFD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Time embedding e (B, F, D) and modulation (B, F, 6, D) of timesteps in [0, 1000].

        ``cond_BFD``: per-frame conditioning (an action embedding) added to e.
        """
        rows, n = self.wave(t_BF), t_BF.numel()
        e = self.time_embedding(rows)
        if cond_BFD is not None:
            e = e + F.pad(cond_BFD.flatten(0, 1), (0, 0, 0, len(rows) - n))
        modulation = self.time_projection(e)[:n].unflatten(0, t_BF.shape)
        return e[:n].unflatten(0, t_BF.shape), modulation.unflatten(-1, (6, -1))

    def angles(self, value_BF: Tensor) -> Tensor:
        """Angles of a number's sinusoid, (B, F, freq_dim / 2): value * 10000^(-j / half)."""
        half = self.cfg.freq_dim // 2
        rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=value_BF.device) / half)
        return value_BF.double()[..., None] * rate

    def wave(self, value_BF: Tensor) -> Tensor:
        """Sinusoid of numbers, cosines first: (at least MIN_ROWS rows, freq_dim), zeros below.

        See MIN_ROWS: one slot alone must get the bits it gets among many.
        """
        angle = self.angles(value_BF)
        rows = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.head.modulation.dtype)
        rows = rows.flatten(0, 1)
        return F.pad(rows, (0, 0, 0, max(0, MIN_ROWS - len(rows))))

    def patches(self, x_BCFHW: Tensor) -> Tensor:
        """Tokens (B, T, D), order (frame, row, column). The strided convolution as one product."""
        ph, pw = self.cfg.patch_size[1:]
        b, c, f, h, w = x_BCFHW.shape
        if c != self.cfg.in_dim or h % ph or w % pw:
            raise ShapeError(
                "latents do not fit the model", given=tuple(x_BCFHW.shape),
                expected=f"(B, {self.cfg.in_dim}, F, multiple of {ph}, multiple of {pw})",
                fix="check the codec and the frame size",
            )
        x = x_BCFHW.reshape(b, c, f, h // ph, ph, w // pw, pw).permute(0, 2, 3, 5, 1, 4, 6)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(x.reshape(b, f * (h // ph) * (w // pw), -1), weight,
                        self.patch_embedding.bias)

    def unpatch(self, y_BTO: Tensor, frames: int, grid_hw: tuple[int, int]) -> Tensor:
        """Inverse of ``patches`` for outputs laid out (dy, dx, channel) per token."""
        ph, pw = self.cfg.patch_size[1:]
        h, w = grid_hw
        y = y_BTO.reshape(len(y_BTO), frames, h, w, ph, pw, self.cfg.out_dim)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(
            len(y), self.cfg.out_dim, frames, h * ph, w * pw)

    def table(self, frame_index_BF: Tensor, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Rotation table of the tokens of these absolute frames, never below float32."""
        turn = rotation(frame_index_BF, grid_hw, self.cfg.head_dim)
        return cos_sin(turn, torch.promote_types(self.head.modulation.dtype, torch.float32))

    def forward(self, x_BCFHW: Tensor, t: Tensor, context_BLD: Tensor | None = None, *,
                attend: Attend | None = None, frame_index_BF: Tensor | None = None,
                cond_BFD: Tensor | None = None,
                text_kv: list[tuple[Tensor, Tensor]] | None = None,
                between: Between | None = None, beside: Beside | None = None) -> Tensor:
        """Flow (B, C, F, H, W).

        Args:
            x_BCFHW: noisy latents.
            t: timesteps in [0, 1000], (B,) or per frame (B, F).
            context_BLD: text embeddings; or give ``text_kv`` from ``text()``.
            attend: who sees whom; None = every token sees every token.
            frame_index_BF: absolute frame indices, (F,) or (B, F); default 0..F-1.
            cond_BFD: per-frame conditioning added to the time embedding.
            between: called in every block before the feed-forward.
            beside: called in every block with its unrotated queries, keys and values.
        """
        b, _, f, height, width = x_BCFHW.shape
        grid = (height // self.cfg.patch_size[1], width // self.cfg.patch_size[2])
        x = self.patches(x_BCFHW)
        t_BF = t[:, None].expand(b, f) if t.ndim == 1 else t
        e, modulation = self.time(t_BF, cond_BFD)
        if frame_index_BF is None:
            table = clip_table(f, grid, self.cfg.head_dim, torch.promote_types(
                self.head.modulation.dtype, torch.float32), x.device)
        else:
            table = self.table(
                frame_index_BF[None] if frame_index_BF.ndim == 1 else frame_index_BF, grid)
        if text_kv is None and context_BLD is not None:
            text_kv = self.text(context_BLD)
        if self.cfg.text_len and text_kv is None:
            raise ShapeError(
                "no text given", given="context None and text_kv None",
                expected=f"embeddings (B, <= {self.cfg.text_len}, {self.cfg.text_dim})",
                fix="pass context_BLD, zeros for an empty prompt",
            )
        for i, block in enumerate(self.blocks):
            see = (lambda q, k, v, i=i: attend(i, q, k, v)) if attend else attention
            add = (lambda x, i=i: between(i, x)) if between else None
            plus = (lambda q, k, v, i=i: beside(i, q, k, v)) if beside else None
            with self.near(block):
                x = block(x, modulation, table, see, text_kv[i] if text_kv else None, add, plus)
        return self.unpatch(self.head(x, e), f, grid)


def block_ids(frames: int, per_block: int, separate_first: bool = False) -> Tensor:
    """Block number of every frame; with ``separate_first`` frame 0 is a block of its own."""
    index = torch.arange(frames)
    if separate_first:
        return (index + per_block - 1) // per_block
    return index // per_block


def causal_frame_mask(blocks_F: Tensor, window: int | None = None) -> Tensor:
    """Bool (F, F), True = query frame may see key frame: block(k) <= block(q).

    ``window``: also frame(k) >= end(block(q)) - window.
    """
    allow = blocks_F[None, :] <= blocks_F[:, None]
    if window is not None:
        frame = torch.arange(len(blocks_F))
        end = torch.stack([frame[blocks_F == b].max() + 1 for b in blocks_F])
        allow &= frame[None, :] >= end[:, None] - window
    return allow | torch.eye(len(blocks_F), dtype=torch.bool)


def teacher_forcing_frame_mask(blocks_F: Tensor, window: int | None = None) -> Tensor:
    """Bool (2F, 2F) for the sequence [clean | noisy].

    Clean block b sees clean blocks <= b; noisy block b sees clean blocks < b and itself.
    """
    clean = causal_frame_mask(blocks_F, window)
    same = blocks_F[None, :] == blocks_F[:, None]
    top = torch.cat([clean, torch.zeros_like(clean)], dim=1)
    bottom = torch.cat([clean & ~same, same], dim=1)
    return torch.cat([top, bottom])


def masked(frame_mask_FF: Tensor, tokens_per_frame: int,
           within_BTT: Tensor | None = None) -> Attend:
    """An ``attend`` that applies a frame mask to every token of the frames.

    ``within_BTT``: which tokens of a frame see which tokens of a frame they see, per slot.
    """
    mask = frame_mask_FF.repeat_interleave(tokens_per_frame, 0)
    mask = mask.repeat_interleave(tokens_per_frame, 1)
    if within_BTT is not None:
        frames = len(frame_mask_FF)
        mask = (mask.to(within_BTT.device) & within_BTT.repeat(1, frames, frames))[:, None]
    return lambda layer, q, k, v: attention(q, k, v, mask.to(q.device))
