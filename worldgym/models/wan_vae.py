"""The Wan2.2 video autoencoder: diffusers' network, our key map, sizes read off the file.

Shapes: B slot, C latent channel, F latent frame, T raw frame, H W pixels, h w latent grid.
T = 4 (F - 1) + 1: the first latent frame is one picture, every later one is four. Latents are
normalised, (mean - latents_mean) / latents_std (specs/scope.md section 7; key map section 11).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldgym import checkpoint
from worldgym.errors import CheckpointError, ShapeError
from worldgym.extras import need
from worldgym.weightfile import WeightFile, as_file

MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667)
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)
PICTURES = 4  # of a latent frame after the first

_RULES = [(re.compile(pattern), new) for pattern, new in (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.",
     r"encoder.down_blocks.\1.downsampler.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.",
     r"decoder.up_blocks.\1.upsampler.\2."),
    (r"^encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"(\.resnets\.\d+)\.residual\.0\.", r"\1.norm1."),
    (r"(\.resnets\.\d+)\.residual\.2\.", r"\1.conv1."),
    (r"(\.resnets\.\d+)\.residual\.3\.", r"\1.norm2."),
    (r"(\.resnets\.\d+)\.residual\.6\.", r"\1.conv2."),
    (r"(\.resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
)]


def diffusers_name(native: str) -> str:
    """A tensor name of ``Wan2.2_VAE.pth`` as diffusers calls it.

    >>> diffusers_name("decoder.upsamples.0.upsamples.3.time_conv.bias")
    'decoder.up_blocks.0.upsampler.time_conv.bias'
    """
    for pattern, new in _RULES:
        native = pattern.sub(new, native)
    return native


def sizes_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Arguments of diffusers' ``AutoencoderKLWan``, read off natively named tensors."""
    try:
        base, inside = shapes["encoder.conv1.weight"][:2]
        top = "encoder.downsamples.{}.downsamples."
        levels = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("encoder.downsamp"))
        mult = [shapes[top.format(i) + "0.residual.2.weight"][0] // base for i in range(levels)]
        blocks = sum(bool(re.fullmatch(r"encoder\.downsamples\.0\.downsamples\.\d+\.residual\.2"
                                       r"\.weight", n)) for n in shapes)
        in_time = [any(n.startswith(top.format(i)) and ".time_conv." in n for n in shapes)
                   for i in range(levels - 1)]
        patch = round((inside / 3) ** 0.5)
        return {"base_dim": base, "decoder_base_dim": shapes["decoder.head.2.weight"][1] // mult[0],
                "z_dim": shapes["conv2.weight"][0], "dim_mult": mult, "num_res_blocks": blocks,
                "temperal_downsample": in_time, "attn_scales": [], "is_residual": True,
                "in_channels": inside, "out_channels": shapes["decoder.head.2.weight"][0],
                "patch_size": patch if patch > 1 else None,
                "scale_factor_temporal": 2 ** sum(in_time),
                "scale_factor_spatial": 2 ** (levels - 1) * patch}
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            "not the tensors of a Wan2.2 autoencoder", given=f"{len(shapes)} tensors ({error!r})",
            expected="encoder.downsamples.*, decoder.upsamples.*, conv1, conv2",
            fix="give Wan2.2_VAE.pth (Wan2.1's autoencoder has another layout)") from error


@dataclass(frozen=True, slots=True)
class DecoderState:
    """What the decoder remembers of the latent frames before; a value, never changed in place.

    ``features``: one tensor (B, ...) or marker per causal convolution.
    """

    features: tuple[Any, ...]

    def select(self, slots: Sequence[int] | Tensor) -> "DecoderState":
        """The state of some slots (also for copies: a slot may come twice)."""
        return DecoderState(tuple(x[torch.as_tensor(slots, device=x.device)]
                                  if isinstance(x, Tensor) else x for x in self.features))


class WanVAE:
    """Pictures to normalised latents and back.

    Args:
        net: diffusers' ``AutoencoderKLWan``.
        mean: per latent channel; ``std``: likewise. The published 48 by default.
    """

    def __init__(self, net: Any, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        weight = net.post_quant_conv.weight
        if not len(mean) == len(std) == weight.shape[0]:
            raise ShapeError("latent statistics do not fit the autoencoder",
                             given=f"{len(mean)} means, {len(std)} deviations",
                             expected=weight.shape[0], fix="pass the mean and std of this file")
        self.net, self.device, self.dtype = net, weight.device, weight.dtype
        self.stride = int(net.config.scale_factor_spatial)
        column = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(mean, device=self.device).reshape(column)
        self.std = torch.tensor(std, device=self.device).reshape(column)

    @classmethod
    def build(cls, sizes: Mapping[str, Any]) -> Any:
        """diffusers' network without weights, on the meta device."""
        network = need("diffusers", "Wan's autoencoder", "wan").AutoencoderKLWan
        with torch.device("meta"):
            return network(**sizes).eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path | WeightFile | Mapping[str, Tensor], *,
             device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
             sizes: Mapping[str, Any] | None = None, mean: Sequence[float] = MEAN,
             std: Sequence[float] = STD) -> "WanVAE":
        """Load strictly from a file in native or diffusers names.

        Args:
            source: ``Wan2.2_VAE.pth``, a safetensors file, or a state dict.
            dtype: default: the file's own.
            sizes: diffusers config; native names tell it themselves.
        """
        file = source if isinstance(source, Mapping) else as_file(source)
        held: Mapping[str, Any] = file.entries if isinstance(file, WeightFile) else file
        names = checkpoint.plain_names(list(held))
        shapes = {names[n]: tuple(t.shape) for n, t in held.items()}
        rename: Callable[[str], str] | None = None
        if "decoder.conv_in.weight" not in shapes:
            sizes, rename = sizes_of(shapes), diffusers_name
        if sizes is None:
            raise CheckpointError("sizes of the autoencoder are not known",
                                  given="tensors in diffusers names", expected="its config",
                                  fix="pass sizes=json.load(open('vae/config.json'))")
        sizes = {k: v for k, v in sizes.items() if not k.startswith(("_", "latents_"))}
        dtype = dtype or next(iter(held.values())).dtype
        net = checkpoint.load_into(cls.build(sizes), file, device=device, dtype=dtype,
                                   rename=rename)
        return cls(net, mean, std)

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Normalised mean latents (B, C, F, h, w) of pixels in [-1, 1]."""
        t, h, w = video_BCTHW.shape[2:]
        if t % PICTURES != 1 or h % self.stride or w % self.stride:
            raise ShapeError("video does not fit the autoencoder", given=tuple(video_BCTHW.shape),
                             expected=f"(B, 3, 4k + 1, multiples of {self.stride})",
                             fix="cut frames and sizes to fit")
        posterior = self.net.encode(video_BCTHW.to(self.device, self.dtype)).latent_dist
        mean = posterior.mode()
        return (mean - self.mean.to(mean)) / self.std.to(mean)

    @torch.no_grad()
    def decode_next(self, latents_BCFhw: Tensor,
                    state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode further latent frames of running videos.

        Args:
            latents_BCFhw: normalised, F >= 1.
            state: after the frames before; None = these are the first.

        Returns:
            Pixels (B, 3, T, H, W), not clamped, and the state to go on with. Frame by frame gives
            the bits of all at once.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        z = latents_BCFhw.to(self.device, self.dtype)
        if z.ndim != 5 or z.shape[1] != self.mean.shape[1] or not z.shape[2]:
            raise ShapeError("latents do not fit the autoencoder", given=tuple(z.shape),
                             expected=f"(B, {self.mean.shape[1]}, F, h, w)",
                             fix="give latents of this autoencoder")
        z = z * self.std.to(z) + self.mean.to(z)
        self.net.clear_cache()
        features = list(state.features) if state else list(self.net._feat_map)
        out = []
        for i in range(z.shape[2]):
            x = self.net.post_quant_conv(z[:, :, i:i + 1])
            out.append(self.net.decoder(x, feat_cache=features, feat_idx=[0],
                                        first_chunk=state is None and i == 0))
        video = torch.cat(out, 2)
        if self.net.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.net.config.patch_size)
        return video, DecoderState(tuple(features))

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Pixels (B, 3, 4 (F - 1) + 1, H, W) of whole videos, not clamped."""
        return self.decode_next(latents_BCFhw)[0]


def to_uint8(video_BCTHW: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8 (B, T, H, W, 3): clamped, scaled by 127.5, truncated."""
    x = (video_BCTHW.float().clamp(-1, 1) + 1) * 127.5
    return x.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
