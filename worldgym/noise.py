"""Counter-based noise: slot i's numbers depend on (seed, episode, step, pass) and nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) written in
64-bit integer tensor operations, so that CPU and GPU give the same bits and no global generator is
read or set. Shapes: B slot, M numbers per slot.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

# names of the passes; a pass of its own makes draws independent
PASSES = {"end": 1 << 16, "start": 1 << 17, "image": 1 << 18, "action": 1 << 19,
          "growth": 1 << 20}


SMALL = 4096  # words up to which NumPy, with its cheaper calls, is faster than torch

Words = TypeVar("Words", Tensor, np.ndarray)


def philox(counter: list[Words], key: list[Words]) -> list[Words]:
    """Ten rounds on four 32-bit counters and two 32-bit keys (int64, broadcastable)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul(_M0, c0)
        hi1, lo1 = _mul(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def _mul(a: int, b: Words) -> tuple[Words, Words]:
    """High and low 32 bits of a * b; the 64-bit product wraps into the sign bit and is masked."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def _words(keys_B4: np.ndarray, number: int, count: int, device: torch.device) -> Tensor:
    """``count`` 32-bit words (B, count) of stream ``number``."""
    keys = np.asarray(keys_B4, dtype=np.int64)
    blocks = np.arange((count + 3) // 4)[None]
    if device.type == "cpu" and len(keys) * count <= SMALL:
        made = np.stack(np.broadcast_arrays(*philox(*_counter(keys, blocks, number))), -1)
        return torch.from_numpy(made.reshape(len(keys), -1)[:, :count])
    given = torch.from_numpy(keys).to(device), torch.from_numpy(blocks).to(device)
    words = torch.stack(torch.broadcast_tensors(*philox(*_counter(*given, number))), -1)
    return words.flatten(1)[:, :count]


def _counter(keys_B4: Words, blocks_1N: Words, number: int) -> tuple[list[Words], list[Words]]:
    """Counters and keys of these blocks of stream ``number``."""
    seed, episode, step, branch = (keys_B4[:, i:i + 1] for i in range(4))
    high = ((seed >> 32) & _LOW) ^ ((branch * 0x9E3779B1) & _LOW)
    # every word is (B, blocks) from the first round on
    return [blocks_1N + 0 * seed, step & _LOW, episode & _LOW, 0 * seed + number], [
        seed & _LOW, high]


def uniform(keys_B4: np.ndarray, number: int, count: int,
            device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in (0, 1), float64 (B, count).

    Args:
        keys_B4: int64 rows (seed, episode, step, branch), one per slot.
        number: which pass of the step draws.
        count: numbers per slot.
    """
    return (_words(keys_B4, number, count, torch.device(device)).double() + 0.5) * 2.0**-32


def normal(keys_B4: np.ndarray, number: int, shape: tuple[int, ...],
           device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, float32 (B, *shape), by Box-Muller in float64."""
    count = int(np.prod(shape))
    u = uniform(keys_B4, number, count + count % 2, device)
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * torch.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count]
    return z.float().reshape(len(z), *shape)
