"""The subcommand ``convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Convert:
    """Write a published WHAM checkpoint (.ckpt) as safetensors, without running code from it.

    Args:
        path: the published file.
        out: safetensors file to write; optimiser state, masks and the second head are left out.
        size: layers, heads and width, for a model size that the built-in table lacks.
        half: store bfloat16 instead of float32.
    """

    path: Path
    out: Path
    size: tuple[int, int, int] | None = None
    half: bool = False

    def run(self) -> None:
        """Convert."""
        import torch

        from worldgym.models import wham_checkpoint

        sizes = None if self.size is None else {"*": self.size}
        print("written:", wham_checkpoint.convert(self.path, self.out, sizes,
                                                  torch.bfloat16 if self.half else None))
