"""Block-wise offload: a network's blocks rest in host memory and visit the device one at a time.

The device then holds what lies outside the blocks, one block, and the activations. The numbers are
those of the whole network on the device: only the place of the weights changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from worldgym.models.wan import WanDiT


def offload(dit: WanDiT, device: torch.device | str) -> WanDiT:
    """Keep the blocks where they are and everything else on ``device``; the network itself.

    On a CUDA device the host copies are pinned, so that they travel at the bus's full speed.
    """
    device = torch.device(device)
    for name, child in dit.named_children():
        if name != "blocks":
            child.to(device)
    for block in dit.blocks:
        for tensor in (*block.parameters(), *block.buffers()):
            home = tensor.data.cpu()
            tensor.data = home.pin_memory() if device.type == "cuda" else home

    @contextmanager
    def near(block: nn.Module) -> Iterator[None]:
        tensors = (*block.parameters(), *block.buffers())
        homes = [tensor.data for tensor in tensors]
        try:
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home.to(device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home

    dit.near = near
    return dit


def resident_bytes(dit: WanDiT, offloaded: bool) -> tuple[int, int]:
    """Bytes of weights (device, host) while a network runs; works on the meta device too."""
    def size(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    blocks = [size(block) for block in dit.blocks]
    if not offloaded:
        return size(dit), 0
    return size(dit) - sum(blocks) + max(blocks, default=0), sum(blocks)
