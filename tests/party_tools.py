"""A random party network at the size of specs/actionparty.md 4.9, and random inputs for it."""

from dataclasses import dataclass

import numpy as np
import torch

from worldgym.models.party import PartyConfig, PartyDynamics
from worldgym.models.party_layers import SubjectConfig
from worldgym.models.wan import WanConfig
from worldgym.state import Starts

CHW, SLOTS, FRAMES, ACTIONS = (4, 8, 8), 4, 5, 8
VIDEO = 16  # tokens of a frame: 8 x 8 latents in patches of 2 x 2
WAN = WanConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=2, in_dim=4, out_dim=4, freq_dim=32,
                text_dim=16, text_len=8)


def tiny_party(seed=0, window=FRAMES, layers=2, **subjects):
    """Random weights everywhere, the outputs included."""
    wan = WanConfig(**{**{k: getattr(WAN, k) for k in WAN.__slots__}, "num_layers": layers})
    cfg = PartyConfig(latent_chw=CHW, wan=wan, window=window,
                      subjects=SubjectConfig(**{"slots": SLOTS, "actions": ACTIONS, **subjects}))
    model = PartyDynamics(cfg)
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    for name, p in model.named_parameters():
        if name.endswith("bias") or "head.weight" in name:
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


@dataclass
class Inputs:
    """A clip for ``PartyDynamics.forward``."""

    clean_BFChw: torch.Tensor
    states_BFNS: torch.Tensor
    actions_BFN: torch.Tensor
    valid_BN: torch.Tensor
    text_BLD: torch.Tensor
    sigma_BF: torch.Tensor
    noise_BFChw: torch.Tensor
    state_noise_BFNS: torch.Tensor
    level_BF: torch.Tensor
    level_noise_BFChw: torch.Tensor
    context_states_BFNS: torch.Tensor

    def __call__(self, model, **options):
        """(flow of latents, flow of states)."""
        with torch.no_grad():
            return model(**vars(self), **options)


def inputs(batch=2, frames=FRAMES, seed=0, slots=SLOTS, channels=2, absent=1):
    """Random clips; the last ``absent`` slots of every clip are empty."""
    g = torch.Generator().manual_seed(seed)
    video, state = (batch, frames, *CHW), (batch, frames, slots, channels)
    states = 2 * torch.rand(state, generator=g) - 1
    valid = torch.ones(batch, slots, dtype=torch.bool)
    valid[:, slots - absent:] = False
    return Inputs(
        torch.randn(video, generator=g), states,
        torch.randint(0, ACTIONS, (batch, frames, slots), generator=g), valid,
        torch.randn(batch, 3, 16, generator=g), torch.rand(batch, frames, generator=g),
        torch.randn(video, generator=g), torch.randn(state, generator=g),
        torch.zeros(batch, frames), torch.zeros(video), states.clone())


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def starts(world, count, seed=0, frames=4):
    """Random starts of 1 to ``frames`` frames with one to four players in either game."""
    rng, n = np.random.default_rng(seed), world.spec.subjects
    shape = (count, frames)
    valid = rng.random((count, n)) < 0.7
    valid[np.arange(count), rng.integers(0, n, count)] = True
    lengths = rng.integers(1, frames + 1, count)
    return Starts(
        torch.from_numpy(rng.standard_normal((*shape, *world.spec.latent_chw))).float(),
        rng.integers(-1, 5, (*shape, n)), np.arange(frames)[None] == frames - lengths[:, None],
        lengths, torch.from_numpy(rng.uniform(-1, 1, (*shape, n, world.sub.channels))).float(),
        valid, rng.integers(0, world.games, count))


def moves(world, count, seed):
    return np.random.default_rng(seed).integers(-1, 5, (count, world.spec.subjects))
