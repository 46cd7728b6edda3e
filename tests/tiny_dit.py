"""A random two-layer DiT with a memory, for the tests of memory, rollout and network."""

import numpy as np
import torch

from worldgym.memory import PagePool, PageSpec
from worldgym.models.wan import WanConfig, WanDiT
from worldgym.rollout import Block, CausalStepper

SIZES = dict(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=16)
GRID = (4, 6)  # latent height and width: 2 x 3 = 6 tokens
TOKENS = 6


def tiny_dit(seed=0, **changes):
    """Random weights everywhere, the output layer included."""
    dit = WanDiT(WanConfig(**{**SIZES, "text_len": 0, **changes}))
    generator = torch.Generator().manual_seed(seed)
    dit.initialize(generator)
    for name, p in dit.named_parameters():
        if name.endswith("bias") or name == "head.head.weight":
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return dit.eval().requires_grad_(False)


def page_spec(dit):
    cfg = dit.cfg
    return PageSpec(layers=cfg.num_layers, heads=cfg.num_heads, head_dim=cfg.head_dim,
                    tokens=TOKENS)


def stepper(dit, policy, pages=0):
    return CausalStepper(dit, PagePool(page_spec(dit), pages=pages), policy)


def video(slots, frames, seed=0, channels=4):
    """Random latents (B, C, F, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slots, channels, frames, *GRID, generator=generator)


def block(start, frames, slots=1):
    return Block(np.tile(np.arange(start, start + frames), (slots, 1)))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
