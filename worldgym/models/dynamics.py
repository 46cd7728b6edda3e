"""Dynamics of ``nano``: the causal Wan DiT, steered by actions through its timestep modulation.

Shapes: B slot, F latent frame, C channel, h w latent grid, A action features, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldgym.models.wan import WanConfig, WanDiT, block_ids, masked, teacher_forcing_frame_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicsConfig:
    """``window``: frames a step can see, itself included; ``action_features``: width A.

    ``recent``: how many of the frames before it are laid beside each frame as further input
    channels (as Wan's image-to-video models do with their given frame): motion is then local.
    """

    action_features: int
    window: int
    recent: int
    wan: WanConfig


class Dynamics(nn.Module):
    """A WanDiT and the embedding of the action that led to each frame."""

    def __init__(self, cfg: DynamicsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.dit = WanDiT(cfg.wan)
        self.action_embedding = nn.Linear(cfg.action_features, cfg.wan.dim)

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights."""
        self.dit.initialize(generator)
        nn.init.normal_(self.action_embedding.weight, std=0.3, generator=generator)
        nn.init.zeros_(self.action_embedding.bias)

    def condition(self, actions_BFA: Tensor) -> Tensor:
        """Per-frame conditioning (B, F, D) of action features."""
        return self.action_embedding(actions_BFA)

    def network(self, x_BCFhw: Tensor, t_BF: Tensor, *, recent_BRFhw: Tensor | None = None,
                **given) -> Tensor:
        """The DiT on frames, each with the frames before it beside it (R = recent * C channels)."""
        if recent_BRFhw is not None:
            x_BCFhw = torch.cat([x_BCFhw, recent_BRFhw], 1)
        return self.dit(x_BCFhw, t_BF, **given)

    def forward(self, clean_BFChw: Tensor, actions_BFA: Tensor, sigma_BF: Tensor,
                noise_BFChw: Tensor, context_sigma_BF: Tensor, context_noise_BFChw: Tensor,
                alone: bool = False) -> Tensor:
        """Teacher forcing: flow of every frame given the (slightly noised) frames before it.

        The sequence is [context | noisy]; returns the flow of the noisy half (B, F, C, h, w).
        ``alone``: every frame by itself, with only the recent frames beside it: what the first part
        of a training learns most of, at a third of the cost.
        """
        def mix(x: Tensor, eps: Tensor, s_BF: Tensor) -> Tensor:
            s = s_BF[..., None, None, None]
            return (1 - s) * x + s * eps

        frames = clean_BFChw.shape[1]
        context = mix(clean_BFChw, context_noise_BFChw, context_sigma_BF)
        noisy = mix(clean_BFChw, noise_BFChw, sigma_BF)
        recent = before(context.transpose(1, 2), self.cfg.recent)
        if alone:
            flow = self.network(
                noisy.flatten(0, 1)[:, :, None], 1000 * sigma_BF.reshape(-1, 1),
                recent_BRFhw=recent.transpose(1, 2).flatten(0, 1)[:, :, None],
                cond_BFD=self.condition(actions_BFA).flatten(0, 1)[:, None])
            return flow[:, :, 0].unflatten(0, sigma_BF.shape)
        x = torch.cat([context, noisy], dim=1)
        t = 1000 * torch.cat([context_sigma_BF, sigma_BF], dim=1)
        mask = teacher_forcing_frame_mask(block_ids(frames, 1), self.cfg.window)
        patch = self.cfg.wan.patch_size
        tokens = (x.shape[-2] // patch[1]) * (x.shape[-1] // patch[2])
        flow = self.network(
            x.transpose(1, 2), t, recent_BRFhw=recent.repeat(1, 1, 2, 1, 1),
            attend=masked(mask, tokens),
            frame_index_BF=torch.arange(frames, device=x.device).repeat(2),
            cond_BFD=self.condition(actions_BFA).repeat(1, 2, 1),
        )
        return flow.transpose(1, 2)[:, frames:]


def before(x_BCFhw: Tensor, count: int) -> Tensor:
    """The ``count`` frames before each frame as channels (B, count * C, F, h, w), newest first.

    Frames before the first are zeros.
    """
    frames = x_BCFhw.shape[2]
    padded = torch.cat([torch.zeros_like(x_BCFhw[:, :, :1]).expand(-1, -1, count, -1, -1),
                        x_BCFhw], 2)
    return torch.cat([padded[:, :, count - i:count - i + frames] for i in range(1, count + 1)], 1)


def drawer(rows: int, generator: torch.Generator, share: tuple[int, int],
           device: torch.device) -> Callable[..., Tensor]:
    """draw(kind, *shape): this process's ``rows`` of the noise that the whole batch gets."""
    rank, size = share

    def draw(kind, *shape: int) -> Tensor:
        whole = kind(rows * size, *shape, generator=generator)
        return whole[rank * rows:(rank + 1) * rows].to(device)

    return draw


def dynamics_loss(model: nn.Module, latents_BFChw: Tensor, actions_BFA: Tensor,
                  weight_BFhw: Tensor, generator: torch.Generator, share: tuple[int, int] = (0, 1),
                  full_noise: float = 0.25, context_noise: float = 0.3, alone: bool = False,
                  shift: float = 4.0,
                  average: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, dict]:
    """Flow-matching loss of frames 1.. given the frames before them.

    Noise levels: a ``full_noise`` share of frames starts from pure noise (where every step of a
    rollout starts), the rest is uniform, then shifted towards noise as in Wan: whether something
    rare appears (a monster fires) is decided at high noise, and learned only there. Half of the
    clips see a context noised up to ``context_noise``, so that a rollout survives its own errors.
    ``weight_BFhw``: how much each latent cell matters (0 for frames that do not exist).
    ``share``: (rank, processes); noise is
    drawn for the whole batch and cut, and ``average`` means a number over the processes, so that
    how many there are changes nothing. ``alone``: see ``Dynamics.forward``.
    """
    b, f = latents_BFChw.shape[:2]
    draw = drawer(b, generator, share, latents_BFChw.device)
    sigma = draw(torch.rand, f)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    sigma = torch.where(draw(torch.rand, f) < full_noise, torch.ones_like(sigma), sigma)
    level = context_noise * draw(torch.rand, f) * (draw(torch.rand, 1) < 0.5)
    noise = draw(torch.randn, *latents_BFChw.shape[1:])
    flow = model(latents_BFChw, actions_BFA, sigma, noise, level,
                 draw(torch.randn, *latents_BFChw.shape[1:]), alone)
    weight = weight_BFhw[:, :, None].clone()
    weight[:, 0] = 0
    error = (flow - (noise - latents_BFChw)) ** 2
    total = average(weight.sum()).clamp_min(1e-6)
    loss = (weight * error).sum() / (total * latents_BFChw.shape[2])
    with torch.no_grad():
        start = (sigma == 1)[:, 1:] & (weight_BFhw[:, 1:].amax((2, 3)) > 0)
        first = error[:, 1:].mean((2, 3, 4))[start].mean() if start.any() else loss.detach()
    return loss, {"full_noise_mse": float(first.detach())}

