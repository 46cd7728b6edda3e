"""Joystick and button paths that SCOPE adds to every block (specs/scope.md section 4).

Shapes: B slot, N raw row, F latent frame, S tokens per frame, T = F * S tokens, D width,
H heads, E head width, J joystick axes, K buttons, P raw rows in a window.
The published order of operations repeats the joystick window and the button keys over all S
positions. Here the window enters through its own columns of the first product and the keys are
kept once per frame: the same numbers, without the copies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.attention import attention
from worldgym.errors import ConfigError, ShapeError
from worldgym.models.wan import MIN_ROWS, RMSNorm, WanConfig, _Attention
from worldgym.rope import rotate, time_table

Table = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionConfig:
    """Sizes of the action paths.

    ``ratio``: raw frames per latent frame; ``window``: latent frames whose rows a frame sees;
    ``num_heads`` 0: as many as the network has; a path of width 0 does not exist.
    """

    mouse_dim: int = 4
    keyboard_dim: int = 6
    ratio: int = 4
    window: int = 4
    num_heads: int = 0

    @classmethod
    def from_dict(cls, data: Mapping) -> "ActionConfig":
        """Read the native ``action_config``; what it does not name keeps the published value."""
        names = {"mouse_dim_in": "mouse_dim", "keyboard_dim_in": "keyboard_dim",
                 "vae_time_compression_ratio": "ratio", "windows_size": "window",
                 "num_heads": "num_heads"}
        return cls(**{ours: int(data[native] or 0) for native, ours in names.items()
                      if native in data})

    @property
    def rows(self) -> int:
        """P: raw rows that a latent frame sees."""
        return self.ratio * self.window


def windows(rows_BNC: Tensor, frames: int, ratio: int, size: int, before: int = 0) -> Tensor:
    """What each latent frame sees of the raw rows, (B, F, size * C), time before component.

    Frame i sees rows ``ratio * i - size`` to ``ratio * i - 1``, rows before the first being copies
    of it: row k acts on the way from raw frame k to k + 1. Later rows are never read.
    ``before``: so many of the rows given belong to the time before the clip.
    """
    need = max(1, before + ratio * (frames - 1))
    if rows_BNC.ndim != 3 or rows_BNC.shape[1] < need:
        raise ShapeError(
            "action rows do not cover the clip", given=tuple(rows_BNC.shape),
            expected=f"(B, at least {need} rows, components) for {frames} latent frames",
            fix="give one row per raw frame, or shorten the clip")
    device = rows_BNC.device
    start = before + ratio * torch.arange(frames, device=device) - size
    index_FP = (start[:, None] + torch.arange(size, device=device)).clamp(min=0)
    return rows_BNC[:, index_FP].flatten(2)


@dataclass(frozen=True, slots=True)
class Controls:
    """The actions of a clip as one block uses them; constant over all denoising passes.

    ``stick_BFD``: the joystick windows after their columns of the first product;
    ``keys``: rotated keys and values (B, F, H, E) of the button windows.
    """

    stick_BFD: Tensor | None = None
    keys: tuple[Tensor, Tensor] | None = None

    def twice(self) -> "Controls":
        """For 2 B slots: those of B slots, then the same again."""
        def two(x: Tensor) -> Tensor:
            return torch.cat([x, x])

        return Controls(None if self.stick_BFD is None else two(self.stick_BFD),
                        None if self.keys is None else (two(self.keys[0]), two(self.keys[1])))


def _by_rows(layer: Callable[[Tensor], Tensor], x_BFC: Tensor) -> Tensor:
    """A product slot by slot, on memory of its own.

    So few and so narrow rows have bits that depend on how many there are and on where they lie.
    Done once per clip, so its speed does not matter.
    """
    frames = x_BFC.shape[1]
    padded = F.pad(x_BFC, (0, 0, 0, max(0, MIN_ROWS - frames)))
    return torch.stack([layer(rows.clone())[:frames] for rows in padded])


class ActionModule(nn.Module):
    """Adds to the stream what joystick and buttons have to say; published names and shapes."""

    def __init__(self, cfg: WanConfig, action: ActionConfig) -> None:
        super().__init__()
        self.action, self.heads = action, action.num_heads or cfg.num_heads
        if cfg.dim % max(1, action.rows) or action.rows < 1 or cfg.dim % (2 * self.heads):
            raise ConfigError(
                "width does not fit the action window",
                given=f"dim {cfg.dim}, {action.ratio} x {action.window} rows, {self.heads} heads",
                expected="a width that is a multiple of the rows and of twice the heads",
                fix="change dim, window or num_heads")
        dim = cfg.dim
        if action.mouse_dim:
            self.mouse_mlp = nn.Sequential(
                nn.Linear(dim + action.rows * action.mouse_dim, dim), nn.GELU("tanh"),
                nn.Linear(dim, dim), nn.LayerNorm(dim))  # eps 1e-5 here, 1e-6 elsewhere
            self.mouse_attn = _Attention(replace(cfg, num_heads=self.heads))
        if action.keyboard_dim:
            width = dim // action.rows
            self.keyboard_embed = nn.Sequential(
                nn.Linear(action.keyboard_dim, width), nn.SiLU(), nn.Linear(width, width))
            self.keyboard_q_proj = nn.Linear(dim, dim, bias=False)
            self.keyboard_kv_proj = nn.Linear(dim, 2 * dim, bias=False)
            self.keyboard_o_proj = nn.Linear(dim, dim, bias=False)
            self.key_attn_q_norm = RMSNorm(dim, cfg.eps)
            self.key_attn_k_norm = RMSNorm(dim, cfg.eps)

    def controls(self, mouse_BNJ: Tensor | None, keyboard_BNK: Tensor | None, frames: int,
                 table: Table, before: int = 0) -> Controls:
        """Everything that depends on the actions alone; ``table``: rotation of the F frames."""
        stick = keys = None
        ratio, rows = self.action.ratio, self.action.rows
        if mouse_BNJ is not None:
            window = windows(mouse_BNJ, frames, ratio, rows, before)
            first = cast(nn.Linear, cast(nn.Sequential, self.mouse_mlp)[0])
            columns = first.weight[:, -window.shape[-1]:]
            stick = _by_rows(lambda x: F.linear(x, columns, first.bias), window)
        if keyboard_BNK is not None:
            embedded = _by_rows(self.keyboard_embed, keyboard_BNK)
            both = _by_rows(self.keyboard_kv_proj,
                            windows(embedded, frames, ratio, rows, before))
            k, v = both.chunk(2, -1)
            k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.key_attn_k_norm(k), v))
            keys = rotate(k, table), v
        return Controls(stick, keys)

    def forward(self, x_BTD: Tensor, controls: Controls, table: Table) -> Tensor:
        """The stream with both paths added; ``table``: rotation of every token by its frame."""
        if controls.stick_BFD is not None:
            x_BTD = x_BTD + self._stick(x_BTD, controls.stick_BFD, table)
        if controls.keys is not None:
            q = self.key_attn_q_norm(self.keyboard_q_proj(x_BTD)).unflatten(-1, (self.heads, -1))
            y = attention(rotate(q, table), *controls.keys)  # every frame's buttons, also later
            x_BTD = x_BTD + self.keyboard_o_proj(y.flatten(2))
        return x_BTD

    def _stick(self, x_BTD: Tensor, stick_BFD: Tensor, table: Table) -> Tensor:
        """Each position attends over its own F frames, past and future."""
        frames = stick_BFD.shape[1]
        mlp = cast(nn.Sequential, self.mouse_mlp)
        y = F.linear(x_BTD, cast(nn.Linear, mlp[0]).weight[:, :x_BTD.shape[-1]])
        y = (y.unflatten(1, (frames, -1)) + stick_BFD[:, :, None]).flatten(1, 2)
        y = mlp[1:](y)
        q, (k, v) = self.mouse_attn.query(y), self.mouse_attn.key_value(y)
        q, k, v = (x.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
                   for x in (rotate(q, table), rotate(k, table), v))
        y = attention(q, k, v).unflatten(0, (len(x_BTD), -1)).transpose(1, 2)  # (B, F, S, H, E)
        return self.mouse_attn.o(y.flatten(1, 2).flatten(2))

    def table(self, frames: int, device: torch.device, dtype: torch.dtype,
              tokens: int = 1) -> Table:
        """Rotation of every token of frames 0..F-1 over the head width, never below float32."""
        return time_table(frames, tokens, self.key_width,
                          torch.promote_types(dtype, torch.float32), device)

    @property
    def key_width(self) -> int:
        """E."""
        weight = self.mouse_attn.norm_q if self.action.mouse_dim else self.key_attn_q_norm
        return weight.weight.shape[0] // self.heads
