"""The subcommands ``convert`` and ``dream``."""

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


@dataclass(kw_only=True)
class Dream:
    """Dream on from recorded WHAM episodes (.npz): a .npz and a film for each; resumes.

    Args:
        model: published .ckpt, or what `worldgym convert` wrote.
        episodes: .npz file, or a folder that is searched for them.
        out: folder to write; it mirrors the episodes' folder.
        protocol: base (recorded actions are given) or comprehensive (the model acts too).
        context_length: recorded frames that a dream begins with, and its window.
        steps: frames to dream.
        temperature: of the sampler.
        top_k: draw among the k likeliest tokens.
        top_p: draw among the likeliest tokens that make up p.
        batch: episodes at once.
        max_files: episodes at most.
        seed: of the draws.
        slide: frames dropped at once from a full window; above 1 faster and not as published.
        diagonal: lead of diagonal decoding; faster and not as published.
        films: write films.
        watermark: mark the films as generated, as the published command does.
        size: layers, heads and width, for a model size that the built-in table lacks.
        device: cuda or cpu; default: cuda where there is one.
        dtype: float32 or bfloat16.
    """

    model: Path
    episodes: Path
    out: Path
    protocol: str = "base"
    context_length: int = 10
    steps: int = 10
    temperature: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    batch: int = 1
    max_files: int | None = None
    seed: int = 0
    slide: int = 1
    diagonal: int | None = None
    films: bool = True
    watermark: bool = True
    size: tuple[int, int, int] | None = None
    device: str | None = None
    dtype: str = "float32"

    def run(self) -> None:
        """Dream."""
        from worldgym.agents.wham_dream import Dreaming, dream

        how = Dreaming(protocol=self.protocol, context_length=self.context_length,
                       steps=self.steps, temperature=self.temperature, top_k=self.top_k,
                       top_p=self.top_p, slide=self.slide, diagonal=self.diagonal, seed=self.seed)
        made = dream(self.model, self.episodes, self.out, how, batch=self.batch,
                     max_files=self.max_files, films=self.films, watermark=self.watermark,
                     size=self.size, device=self.device, dtype=self.dtype)
        print(f"{len(made)} dreams in {self.out}")
