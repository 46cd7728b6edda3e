"""Image tokenisers of WHAM: the common part and the ViT-VQGAN (specs/wham.md section 1).

Shapes: B image, C H W pixels, T token (raster order), P patch side, D width, Z code width,
V codes, h w token grid. A tokeniser is a codec of the engine whose latents are ids (1, h, w).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.errors import ConfigError, DTypeError, ShapeError
from worldgym.models.gpt import Block, LayerNorm, everyone

MEAN, STD = (.485, .456, .406), (.229, .224, .225)


class Tokenizer(nn.Module):
    """Frames to ids and back; subclasses give the four stages and ``codebook``."""

    frame_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    commitment: float = 0.25

    def preprocess(self, frames_BCHW: Tensor) -> Tensor:
        """Network input (B, C, H, W) of uint8 frames."""
        raise NotImplementedError

    def features(self, x_BCHW: Tensor) -> Tensor:
        """What is compared with the codes, (B, T, Z), of preprocessed frames."""
        raise NotImplementedError

    def codes(self) -> Tensor:
        """The codes (V, Z) as they are compared and decoded."""
        raise NotImplementedError

    def pixels(self, codes_BTZ: Tensor) -> Tensor:
        """Network output (B, C, H, W) of chosen codes."""
        raise NotImplementedError

    def postprocess(self, y_BCHW: Tensor) -> Tensor:
        """uint8 frames (B, C, H, W) of network output; values are cut off, not rounded."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return self.grid_hw[0] * self.grid_hw[1]

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return len(self.codes())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def nearest(self, features_BTZ: Tensor) -> Tensor:
        """Id (B, T) of the nearest code."""
        codes = self.codes()
        flat = features_BTZ.flatten(0, 1)
        distance = (flat**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * flat @ codes.T
        return distance.argmin(1).view(features_BTZ.shape[:2])

    def frame_ids(self, frames_BCHW: Tensor) -> Tensor:
        """Ids (B, T) of uint8 frames (B, C, H, W)."""
        if frames_BCHW.dtype != torch.uint8:
            raise DTypeError("frames have the wrong dtype", given=frames_BCHW.dtype,
                             expected="uint8 in 0..255", fix="convert the frames to uint8")
        if frames_BCHW.ndim != 4 or tuple(frames_BCHW.shape[1:]) != (3, *self.frame_hw):
            raise ShapeError("frames have the wrong shape", given=tuple(frames_BCHW.shape),
                             expected=f"(batch, 3, {self.frame_hw[0]}, {self.frame_hw[1]})",
                             fix="resize the frames; nothing is resized inside the model")
        return self.nearest(self.features(self.preprocess(frames_BCHW.to(self.device))))

    def ids_frames(self, ids_BT: Tensor) -> Tensor:
        """uint8 frames (B, C, H, W) of ids (B, T)."""
        return self.postprocess(self.pixels(F.embedding(ids_BT.to(self.device), self.codes())))

    def encode(self, frames_BHWC: Tensor) -> Tensor:
        """Ids (B, 1, h, w) of uint8 frames (B, H, W, 3)."""
        if frames_BHWC.ndim != 4 or frames_BHWC.shape[-1] != 3:
            raise ShapeError("frames have the wrong shape", given=tuple(frames_BHWC.shape),
                             expected=f"(batch, {self.frame_hw[0]}, {self.frame_hw[1]}, 3)",
                             fix="give RGB frames, channels last")
        ids = self.frame_ids(frames_BHWC.permute(0, 3, 1, 2))
        return ids.view(-1, 1, *self.grid_hw)

    def decode(self, ids_B1hw: Tensor) -> Tensor:
        """uint8 frames (B, H, W, 3) of ids (B, 1, h, w)."""
        return self.ids_frames(ids_B1hw.flatten(1)).permute(0, 2, 3, 1).contiguous()

    def vectors(self, ids_B1hw: Tensor) -> Tensor:
        """Codes (B, Z, h, w) of ids, of about unit variance: what heads read."""
        codes = self.codes()
        codes = codes / codes.square().mean().sqrt()
        return F.embedding(ids_B1hw.flatten(1).long(), codes).transpose(1, 2).unflatten(
            2, self.grid_hw)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What training needs: (reconstruction of preprocessed frames, with the gradient passed
        straight through the choice of codes, code and commitment loss, ``usage``, perplexity)."""
        features = self.features(x_BCHW)
        chosen = F.embedding(self.nearest(features), self.codes())
        drawn = self.pixels(features + (chosen - features).detach())
        loss, perplexity = self.quantiser_losses(features)
        return drawn, loss, self.usage(features), perplexity

    def usage(self, features_BTZ: Tensor, sharpness: float = 10.0) -> Tensor:
        """How far from all codes being in use, in nats: entropy of the softly chosen code of a
        token, less that of all tokens together (Yu et al., MAGVIT-v2, 2023, section 3.1).

        Without it most codes of a small, briefly trained tokeniser are never chosen.
        """
        codes, flat = self.codes(), features_BTZ.flatten(0, 1)
        distance = (flat**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * flat @ codes.T
        told = (-sharpness * distance).log_softmax(-1)
        each = -(told.exp() * told).sum(-1).mean()
        share = told.exp().mean(0)
        return each + (share * share.clamp_min(1e-9).log()).sum()

    def quantiser_losses(self, features_BTZ: Tensor) -> tuple[Tensor, Tensor]:
        """(code and commitment loss, perplexity of the codes in use); gradients as in VQ-VAE."""
        ids, codes = self.nearest(features_BTZ), self.codes()
        chosen = F.embedding(ids, codes)
        loss = F.mse_loss(chosen, features_BTZ.detach()) + self.commitment * F.mse_loss(
            features_BTZ, chosen.detach())
        share = torch.bincount(ids.flatten(), minlength=len(codes)).float() / ids.numel()
        return loss, (-(share * (share + 1e-5).log()).sum()).exp()


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Sizes of the ViT-VQGAN under their native names."""

    image_size_per_x_axis: int
    image_size_per_y_axis: int
    patch_size: int
    transf_dim: int
    embedding_dim: int
    num_layers: int
    head_size: int
    vocab_size: int
    commitment_cost: float = 0.25

    def __post_init__(self) -> None:
        sizes = [getattr(self, f.name) for f in fields(self) if f.name != "commitment_cost"]
        if any(not isinstance(s, int) or s < 1 for s in sizes) or (
                self.transf_dim % self.head_size):
            raise ConfigError("impossible tokeniser sizes", given=sizes,
                              expected="positive integers, transf_dim a multiple of head_size",
                              fix="check the hyper-parameters")

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "ViTConfig":
        """Read a native ``model_spec``; keys that only training uses are ignored."""
        lost = [f.name for f in fields(cls) if f.name not in spec and f.name != "commitment_cost"]
        if lost or not spec.get("is_perceptual", True):
            raise ConfigError("tokeniser spec cannot be used",
                              given=f"without {lost}" if lost else "is_perceptual false",
                              expected="all sizes of a perceptual ViT-VQGAN",
                              fix="read the hyper-parameters of the checkpoint")
        return cls(**{f.name: spec[f.name] for f in fields(cls) if f.name in spec})


class _Stack(nn.Module):
    """Patches or codes in, the other out: projection, positions, blocks, norm, projection."""

    def __init__(self, cfg: ViTConfig, tokens: int, wide: int, narrow: int) -> None:
        super().__init__()
        dim = cfg.transf_dim
        self.proj1 = nn.Linear(wide, dim)
        self.pos_embeds = nn.Embedding(tokens, dim)
        self.vit = nn.ModuleList(Block(dim, dim // cfg.head_size, bias=False)
                                 for _ in range(cfg.num_layers))
        self.output_ln = LayerNorm(dim)
        self.output_proj = nn.Linear(dim, narrow)

    def forward(self, x_BTI: Tensor) -> Tensor:
        x = self.proj1(x_BTI) + self.pos_embeds.weight
        for block in self.vit:
            x = block(x, everyone)
        return self.output_proj(self.output_ln(x))


class _Codebook(nn.Module):
    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self._embedding = nn.Embedding(codes, dim)


class ViTVQGAN(Tokenizer):
    """Patch tokeniser of two small transformers; codes are compared by angle.

    >>> cfg = ViTConfig(image_size_per_x_axis=6, image_size_per_y_axis=4, patch_size=2,
    ...                 transf_dim=8, embedding_dim=4, num_layers=1, head_size=4, vocab_size=5)
    >>> ViTVQGAN(cfg).encode(torch.zeros(1, 4, 6, 3, dtype=torch.uint8)).shape
    torch.Size([1, 1, 2, 3])
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.cfg, side = cfg, cfg.patch_size
        self.frame_hw = (cfg.image_size_per_y_axis, cfg.image_size_per_x_axis)
        self.grid_hw = (-(-self.frame_hw[0] // side), -(-self.frame_hw[1] // side))
        self.commitment = cfg.commitment_cost
        patch = 3 * side * side
        self.encoder = _Stack(cfg, self.tokens, patch, cfg.embedding_dim)
        self.vq_vae = _Codebook(cfg.vocab_size, cfg.embedding_dim)
        self.decoder = _Stack(cfg, self.tokens, cfg.embedding_dim, patch)

    def _stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return (like.new_tensor(MEAN)[:, None, None], like.new_tensor(STD)[:, None, None])

    def preprocess(self, frames_BCHW: Tensor) -> Tensor:
        x = frames_BCHW.to(self.encoder.proj1.weight.dtype) / 255
        mean, std = self._stats(x)
        return (x - mean) / std

    def features(self, x_BCHW: Tensor) -> Tensor:
        side, (h, w) = self.cfg.patch_size, self.grid_hw
        height, width = self.frame_hw
        x = F.pad(x_BCHW, (0, w * side - width, 0, h * side - height))
        x = x.reshape(len(x), 3, h, side, w, side).permute(0, 2, 4, 1, 3, 5)
        return F.normalize(self.encoder(x.reshape(len(x), h * w, -1)), dim=-1)

    def codes(self) -> Tensor:
        return F.normalize(self.vq_vae._embedding.weight, dim=-1)

    def pixels(self, codes_BTZ: Tensor) -> Tensor:
        side, (h, w) = self.cfg.patch_size, self.grid_hw
        y = self.decoder(codes_BTZ).view(len(codes_BTZ), h, w, 3, side, side)
        y = y.permute(0, 3, 1, 4, 2, 5).reshape(len(y), 3, h * side, w * side)
        return y[:, :, :self.frame_hw[0], :self.frame_hw[1]]

    def postprocess(self, y_BCHW: Tensor) -> Tensor:
        y = y_BCHW.float()
        mean, std = self._stats(y)
        return ((y * std + mean).clamp(0, 1) * 255).to(torch.uint8)
