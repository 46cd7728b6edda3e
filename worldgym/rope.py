"""Three-dimensional rotary position embedding (Wan2.1; specs/actionparty.md section 3.2).

Pairs (2j, 2j+1) of a head are rotated; the pairs are split over (frame, row, column). Angles are
computed on the fly in float64, so a rollout has no longest length.
"""

import functools

import torch
from torch import Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Number of pairs for (frame, row, column): (half - 2 (half // 3), half // 3, half // 3)."""
    half = head_dim // 2
    return half - 2 * (half // 3), half // 3, half // 3


def axis_frequencies(pairs: int, theta: float = 10000.0) -> Tensor:
    """Angle per unit of position, float64 (pairs,): theta^(-j / pairs)."""
    return theta ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))


def rotation(frame_BF: Tensor, grid_hw: tuple[int, int], head_dim: int, *,
             theta: float = 10000.0, pairs: tuple[int, int, int] | None = None) -> Tensor:
    """Unit complex numbers (B, F * h * w, head_dim / 2), complex128, for tokens in (f, y, x) order.

    ``frame_BF``: absolute frame indices; rows and columns count from 0; ``pairs``: how they are
    split over the axes (default: ``axis_pairs``).
    """
    pairs_t, pairs_y, pairs_x = pairs or axis_pairs(head_dim)
    (b, f), (h, w) = frame_BF.shape, grid_hw
    device = frame_BF.device
    t = frame_BF.double()[..., None] * axis_frequencies(pairs_t, theta).to(device)
    y = torch.arange(h, dtype=torch.float64)[:, None] * axis_frequencies(pairs_y, theta)
    x = torch.arange(w, dtype=torch.float64)[:, None] * axis_frequencies(pairs_x, theta)
    angle = torch.cat(
        [
            t[:, :, None, None].expand(b, f, h, w, pairs_t),
            y.to(device)[None, None, :, None].expand(b, f, h, w, pairs_y),
            x.to(device)[None, None, None].expand(b, f, h, w, pairs_x),
        ],
        dim=-1,
    ).reshape(b, f * h * w, head_dim // 2)
    return torch.polar(torch.ones_like(angle), angle)


def frame_rotation(frame_BF: Tensor, head_dim: int) -> Tensor:
    """Unit complex numbers (B, F, head_dim / 2) with every pair on the time axis alone."""
    angle = frame_BF.double()[..., None] * axis_frequencies(head_dim // 2).to(frame_BF.device)
    return torch.polar(torch.ones_like(angle), angle)


def rotation_at(position_BT3: Tensor, head_dim: int) -> Tensor:
    """Unit complex numbers (B, T, head_dim / 2), complex128, for tokens at any (frame, y, x).

    Positions may lie between those of the grid: patch k is at k.
    """
    pairs = axis_pairs(head_dim)
    angle = torch.cat([position_BT3[..., i:i + 1].double()
                       * axis_frequencies(n).to(position_BT3.device)
                       for i, n in enumerate(pairs)], dim=-1)
    return torch.polar(torch.ones_like(angle), angle)


class Table(tuple):
    """``cos_sin`` that is used again and again; ``unit``: the same as complex64, made once."""

    @functools.cached_property
    def unit(self) -> Tensor:
        """Unit complex numbers (B, T, 1, P)."""
        return torch.complex(self[0][..., ::2], self[1][..., 1::2])


@functools.lru_cache(maxsize=8)
def clip_table(frames: int, grid_hw: tuple[int, int], head_dim: int, dtype: torch.dtype,
               device: torch.device) -> tuple[Tensor, Tensor]:
    """``cos_sin`` of frames 0 to ``frames`` - 1: the same in every pass over a clip. Read only."""
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(frames, device=device)[None]
        return Table(cos_sin(rotation(index, grid_hw, head_dim), dtype))


@functools.lru_cache(maxsize=8)
def time_table(frames: int, tokens: int, head_dim: int, dtype: torch.dtype,
               device: torch.device) -> tuple[Tensor, Tensor]:
    """The same of ``frame_rotation``, each frame's row for all its ``tokens``. Read only."""
    with torch.inference_mode(False), torch.no_grad():
        turn = frame_rotation(torch.arange(frames, device=device)[None], head_dim)
        cos, sin = cos_sin(turn, dtype)
        return Table((cos.repeat_interleave(tokens, 1), sin.repeat_interleave(tokens, 1)))


def cos_sin(rotation_BTP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Interleaved cosines and signed sines (B, T, 1, 2P) ready for ``rotate``."""
    cos = rotation_BTP.real.repeat_interleave(2, dim=-1)
    sin = torch.stack([-rotation_BTP.imag, rotation_BTP.imag], dim=-1).flatten(-2)
    return cos.to(dtype)[:, :, None], sin.to(dtype)[:, :, None]


def rotate(x_BTND: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate every head's pairs; ``table`` comes from ``cos_sin``."""
    cos, sin = table
    if (x_BTND.device.type == "cpu" and x_BTND.dtype == cos.dtype == torch.float32
            and x_BTND.is_contiguous() and cos.shape[-1] % 32 == 0):
        # the same bits in a quarter of the time: one complex product reads and writes once
        # (for other widths the last few pairs would go through another kernel and other bits)
        turn = (table if isinstance(table, Table) else Table(table)).unit
        pairs = torch.view_as_complex(x_BTND.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)
    swapped = x_BTND.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x_BTND * cos + swapped * sin).to(x_BTND.dtype)
