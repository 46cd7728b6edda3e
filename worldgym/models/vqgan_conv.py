"""The convolutional image tokeniser that WHAM may name (specs/wham.md section 2).

Shapes: B image, C channel, H W pixels, h w token grid, T = h * w, Z code width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.errors import ConfigError
from worldgym.models.vqgan import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvConfig:
    """Sizes of the convolutional VQGAN: the native ``taming_*`` keys, flat."""

    n_embed: int
    embed_dim: int
    num_indices_per_axis: int
    z_channels: int
    resolution: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...] = ()
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = False

    def __post_init__(self) -> None:
        side = self.resolution // 2 ** (len(self.ch_mult) - 1)
        if side != self.num_indices_per_axis or any(self.ch * m % 32 for m in self.ch_mult):
            raise ConfigError("impossible tokeniser sizes",
                              given=f"{side} tokens a side, widths {self.ch} x {self.ch_mult}",
                              expected=f"{self.num_indices_per_axis} a side, widths divisible by "
                              "32 (group norm)", fix="check the hyper-parameters")

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "ConvConfig":
        """Read a native ``model_spec``."""
        names = {f.name for f in fields(cls)}
        try:
            flat = dict(spec["taming_ddconfig"])
            for name in ("n_embed", "embed_dim", "num_indices_per_axis"):
                flat[name] = spec[f"taming_{name}"]
            known: dict[str, Any] = {k: tuple(v) if isinstance(v, Sequence) else v
                                     for k, v in flat.items() if k in names}
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise ConfigError("tokeniser spec cannot be used", given=repr(error),
                              expected="taming_n_embed, taming_embed_dim, taming_ddconfig, ...",
                              fix="read the hyper-parameters of the checkpoint") from error


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv3(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inside), _conv3(inside, outside)
        self.norm2, self.conv2 = _norm(outside), _conv3(outside, outside)
        self.nin_shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _SelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(seen.transpose(1, 2).reshape(x.shape))


class _Sampler(nn.Module):
    """Halves or doubles the resolution."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=int(up))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = (_Residual(channels, channels) for _ in range(2))
        self.attn_1 = _SelfAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """Residual blocks of one resolution, with attention after each where wanted."""

    def __init__(self, inside: int, outside: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _Residual(inside if i == 0 else outside, outside) for i in range(blocks))
        self.attn = nn.ModuleList(_SelfAttention(outside) for _ in range(blocks * attention))
        self.downsample: _Sampler | None = None
        self.upsample: _Sampler | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for sampler in (self.downsample, self.upsample):
            x = x if sampler is None else sampler(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, cfg: ConvConfig) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = _conv3(cfg.in_channels, cfg.ch)
        self.down = nn.ModuleList(
            _Level(inside, outside, cfg.num_res_blocks, side in cfg.attn_resolutions)
            for inside, outside, side in zip([cfg.ch, *widths], widths, _sides(cfg), strict=False))
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = _Sampler(width, up=False)  # type: ignore[assignment]
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], cfg.z_channels * (2 if cfg.double_z else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, cfg: ConvConfig) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        above = [*widths[1:], widths[-1]]  # what each level is given
        self.conv_in = _conv3(cfg.z_channels, widths[-1])
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList(
            _Level(inside, outside, cfg.num_res_blocks + 1, side in cfg.attn_resolutions)
            for inside, outside, side in zip(above, widths, _sides(cfg), strict=True))
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = _Sampler(width, up=True)  # type: ignore[assignment]
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], cfg.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # type: ignore[call-overload]
            z = level(z)
        return self.conv_out(F.silu(self.norm_out(z)))


def _sides(cfg: ConvConfig) -> Iterator[int]:
    """Resolution of every level."""
    return iter([cfg.resolution // 2**i for i in range(len(cfg.ch_mult))])


class _Codebook(nn.Module):
    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)


class _VQ(nn.Module):
    def __init__(self, cfg: ConvConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = _Encoder(cfg), _Decoder(cfg)
        self.quantize = _Codebook(cfg.n_embed, cfg.embed_dim)
        wide = cfg.z_channels * (2 if cfg.double_z else 1)
        self.quant_conv = nn.Conv2d(wide, cfg.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.embed_dim, cfg.z_channels, 1)


class ConvVQGAN(Tokenizer):
    """Square frames; codes are compared by plain distance."""

    def __init__(self, cfg: ConvConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.frame_hw = (cfg.resolution, cfg.resolution)
        self.grid_hw = (cfg.num_indices_per_axis, cfg.num_indices_per_axis)
        self.vq_model = _VQ(cfg)

    def preprocess(self, frames_BCHW: Tensor) -> Tensor:
        return frames_BCHW.to(self.codes().dtype) / 127.5 - 1

    def encoded(self, x_BCHW: Tensor) -> Tensor:
        """What the encoder says (B, z_channels, h, w)."""
        return self.vq_model.encoder(x_BCHW)

    def features(self, x_BCHW: Tensor) -> Tensor:
        return self.vq_model.quant_conv(self.encoded(x_BCHW)).flatten(2).transpose(1, 2)

    def codes(self) -> Tensor:
        return self.vq_model.quantize.embedding.weight

    def pixels(self, codes_BTZ: Tensor) -> Tensor:
        z = codes_BTZ.transpose(1, 2).unflatten(2, self.grid_hw)
        return self.vq_model.decoder(self.vq_model.post_quant_conv(z))

    def postprocess(self, y_BCHW: Tensor) -> Tensor:
        return ((y_BCHW.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
