"""A tiny WorldPlay folder with a tokenizer, and tiny worlds of random weights."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worldgym.models.codec import Codec, CodecConfig  # noqa: E402
from worldgym.models.controls import Controls  # noqa: E402
from worldgym.models.film import FrameVideo  # noqa: E402
from worldgym.models.wan import WanConfig  # noqa: E402
from worldgym.models.worldplay import WorldPlayDiT  # noqa: E402
from worldgym.models.worldplay_world import WorldPlayWorld  # noqa: E402
from worldgym.reconstituted import Reconstituted, Scoring  # noqa: E402

MEMORY = Reconstituted(scoring=Scoring(points=2000))


def spread(model, seed=0):
    """Random weights everywhere, the additions included."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 5)
    return model.eval().requires_grad_(False)


def write_folder(root):
    """The published layout at 64 wide, so that bits do not depend on the batch."""
    import scope_folder
    import test_worldplay_files as layout

    old = layout.CONFIG, layout.values
    layout.CONFIG = {**layout.CONFIG, "attention_head_dim": 32, "ffn_dim": 96}
    layout.values = lambda shapes, seed=0: {
        k: (0.15 * v.float()).bfloat16() for k, v in old[1](shapes, seed).items()}
    try:
        root.mkdir(parents=True, exist_ok=True)
        layout.write(root)
    finally:
        layout.CONFIG, layout.values = old
    scope_folder.write_tokenizer(root / "tokenizer", 40)
    return root


def tiny_world(text=True, video=None, **settings):
    """A world over a codec of single frames (48 x 48), with text or without."""
    codec = spread(Codec(CodecConfig(frame_hw=(48, 48), channels=4, width=8,
                                                deep_width=16))) if video is None else None
    video = video or FrameVideo(codec)
    c = video.latent_chw[0]
    cfg = WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=c, out_dim=c,
                    freq_dim=16, text_dim=8, text_len=4 if text else 0)
    return WorldPlayWorld(spread(WorldPlayDiT(cfg)), video, memory=settings.pop("memory", MEMORY),
                          controls=settings.pop("controls", Controls()), **settings)


def encode(texts):
    """Stands in for a text encoder: a context (4, 8) of each text's bytes."""
    import zlib

    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(zlib.crc32(t.encode())))
            for t in texts]


def tiny_env(kind=None, world=None, picture=True, **settings):
    """A face over a tiny world that reads text."""
    import numpy as np

    from worldgym.envs.tasks import Task
    from worldgym.envs.worldplay import WorldPlayEnv
    from worldgym.envs.worldplay_starts import WorldPlayStarts

    world = world or tiny_world(**{k: settings.pop(k) for k in ("opening", "controls")
                                   if k in settings})
    pictures = [np.random.default_rng(i).integers(0, 256, (48, 48, 3), np.uint8)
                for i in range(2)] if picture else [None]
    starts = WorldPlayStarts(world, pictures, ["a meadow", "a town"][:len(pictures)], encode)
    task = Task(world=world, starts=starts, name="tiny", horizon=settings.pop("horizon", 3))
    return (kind or WorldPlayEnv)(task, **settings)
