"""Small convolutional autoencoder for frames: the codec of ``nano``.

Shapes: B image, C latent channels, H W pixels, h w latent grid (h = H/8, w = W/8; with a stem of 2
pixels H/4, W/4).
Space-to-depth stems keep every convolution on a 12x or smaller grid, so that two CPU cores can
train it; a frame is encoded alone (one latent frame per pixel frame).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.errors import ConfigError, DTypeError, ShapeError


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """Sizes of the autoencoder; ``frame_hw`` must be divisible by 8.

    ``stem``: pixels of a side of the first squares; a latent cell is two of them wide and high.
    ``local``: a latent cell sees and draws its own pixels only: for games of tiles, where it then
    changes only when its tile does.
    """

    frame_hw: tuple[int, int] = (48, 80)
    channels: int = 8
    width: int = 48
    deep_width: int = 96
    noise: float = 0.3  # of raw latents while training: only what survives it is worth encoding
    stem: int = 4
    local: bool = False

    @property
    def cell(self) -> int:
        """Pixels of a side of a latent cell."""
        return 2 * self.stem

    @property
    def latent_chw(self) -> tuple[int, int, int]:
        """Shape of one latent frame."""
        return (self.channels, self.frame_hw[0] // self.cell, self.frame_hw[1] // self.cell)


class _Residual(nn.Module):
    """Pre-activation residual block of two convolutions of ``side`` x ``side``."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, side, padding=side // 2)
        self.b = nn.Conv2d(width, width, side, padding=side // 2)
        nn.init.zeros_(self.b.weight)
        assert self.b.bias is not None
        nn.init.zeros_(self.b.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.b(F.silu(self.a(F.silu(x_BCHW))))


class Codec(nn.Module):
    """Frames (uint8) to normalised latents (float32) and back.

    The statistics ``mean`` and ``std`` (per channel) are buffers set after training, so that
    latents that leave this class have about zero mean and unit variance.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: CodecConfig) -> None:
        super().__init__()
        height, width = cfg.frame_hw
        if height % 8 or width % 8 or height < 16 or width < 16 or cfg.stem not in (2, 4):
            raise ConfigError(
                "frame size does not fit the codec", given=f"{cfg.frame_hw}, stem {cfg.stem}",
                expected="height and width divisible by 8, at least 16; a stem of 2 or 4",
                fix="resize the game's frames, for example to (48, 80) or (64, 64)",
            )
        self.cfg = cfg
        w, d, stem = cfg.width, cfg.deep_width, cfg.stem
        side = 1 if cfg.local else 3

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, side, padding=side // 2)

        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(stem), conv(3 * stem**2, w), _Residual(w, side),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * w, d, 1), _Residual(d, side),
            nn.Conv2d(d, cfg.channels, 1),
        )
        self.decoder = nn.Sequential(
            conv(cfg.channels, d), _Residual(d, side), _Residual(d, side),
            nn.Conv2d(d, 4 * w, 1), nn.PixelShuffle(2), _Residual(w, side), nn.SiLU(),
            conv(w, 3 * stem**2), nn.PixelShuffle(stem),
        )
        self.register_buffer("mean", torch.zeros(cfg.channels))
        self.register_buffer("std", torch.ones(cfg.channels))

    @property
    def frame_hw(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.cfg.frame_hw

    def forward(self, pixels_BCHW: Tensor, noise_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction, raw latents); noise bounds what latents can carry."""
        z = self.raw(pixels_BCHW)
        return self.decoder(z + self.cfg.noise * noise_BChw), z

    def raw(self, pixels_BCHW: Tensor) -> Tensor:
        """Latents before normalisation, of pixels in [-1, 1]."""
        return self.encoder(pixels_BCHW)

    def encode(self, frames_BHWC: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) of uint8 frames (B, H, W, 3)."""
        z = self.raw(to_pixels(frames_BHWC, self.cfg.frame_hw, self.mean.device))
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def decode_pixels(self, z_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in about [-1, 1] of normalised latents."""
        return self.decoder(z_BCHW * self.std[:, None, None] + self.mean[:, None, None])

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Frames uint8 (B, H, W, 3) of normalised latents (B, C, h, w)."""
        pixels = self.decode_pixels(z_BCHW).clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def to_pixels(frames_BHWC: Tensor, frame_hw: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 frames (B, H, W, 3) to float pixels (B, 3, H, W) in [-1, 1], checked."""
    if frames_BHWC.dtype != torch.uint8:
        raise DTypeError(
            "frames have the wrong dtype", given=frames_BHWC.dtype, expected="uint8 in 0..255",
            fix="convert with (x * 255).round().astype(np.uint8)",
        )
    if frames_BHWC.ndim != 4 or tuple(frames_BHWC.shape[1:]) != (*frame_hw, 3):
        raise ShapeError(
            "frames have the wrong shape", given=tuple(frames_BHWC.shape),
            expected=f"(batch, {frame_hw[0]}, {frame_hw[1]}, 3)",
            fix="resize the frames to the world's frame size, channels last",
        )
    return frames_BHWC.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def emphasis(pixels_BCHW: Tensor, median_CHW: Tensor) -> Tensor:
    """Distance of each pixel from the recording's median frame (B, 1, H, W), in 0..2.

    What differs from the usual picture matters: without this, small moving things (a fireball is a
    few pixels of thousands) are the first that a model drops.
    """
    return (pixels_BCHW - median_CHW).abs().amax(1, keepdim=True)


def cell_weight(pixels_BCHW: Tensor, median_CHW: Tensor, cell: int = 8) -> Tensor:
    """The same for latent cells (B, h, w): 0.3 + 0.8 d^2 of the farthest of 8x8 pixels, up to 1.5.

    The farthest, not the mean: a fireball far away is two pixels. Without the bound the few frames
    full of an explosion outweigh all others.
    """
    far = F.max_pool2d(emphasis(pixels_BCHW, median_CHW), cell)[:, 0]
    return (0.3 + 0.8 * far**2).clamp(max=1.5)


def codec_loss(model: nn.Module, pixels_BCHW: Tensor, median_CHW: Tensor, noise_BChw: Tensor,
               average: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor]:
    """(squared error weighted by ``emphasis`` + latent penalty, plain squared error on [-1, 1]).

    ``average`` means a number over the processes that share the batch.
    """
    drawn, z = model(pixels_BCHW, noise_BChw)
    error = (drawn - pixels_BCHW) ** 2
    weight = 1 + 8 * emphasis(pixels_BCHW, median_CHW)
    loss = (weight * error).mean() / average(weight.mean()) + 1e-3 * (z**2).mean()
    return loss, error.detach().mean()
