"""A world of which memory alone knows something: a thing seen at the start, later seen again.

An episode begins with a chunk that looks ahead (label 0) at a thing, three numbers of its own, then
looks around elsewhere (label 1), where there is a wall. Whoever looks ahead again sees the same
thing. The newest frames do not tell it; the retrieved first chunk does.
"""

import functools

import numpy as np
import torch

from worldgym import camera
from worldgym.models.wan import WanConfig
from worldgym.models.worldplay import WorldPlayDiT
from worldgym.models.worldplay_loss import Frames
from worldgym.reconstituted import Recent, Reconstituted, Scoring
from worldgym.train.context_forcing import Window

CFG = WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=16,
                text_len=0, patch_size=(1, 1, 1))
SIZES = {"total": 8, "temporal": 4, "scoring": Scoring(points=500, radius=3.0)}
MEMORY, RECENT = Reconstituted(**SIZES), Recent(**SIZES)
CHUNKS = 2  # of a rollout
STEPS = (1000.0, 937.5, 833.3333, 625.0)
SPREAD = 0.2  # of the noise in every frame


def fresh(seed=0, cfg=CFG):
    dit = WorldPlayDiT(cfg)
    dit.initialize(torch.Generator().manual_seed(seed))
    return dit


def poses(ahead):
    """World to camera (F, 4, 4): ahead, or turning round elsewhere."""
    turn = camera.walk(camera.motions([{"yaw": np.pi / 2}, *[{"yaw": np.pi / 32}] * 16]))[1:]
    out = turn[np.arange(4 * len(ahead)) % 17]
    out[np.repeat(ahead, 4)] = np.eye(4)
    return camera.inverse(out)


def clips(rng, count, past, after=CHUNKS, forgets=False, always=False):
    """Clips of ``past`` chunks and ``after`` more, their things (B, 3), which chunks look ahead.

    All clips have the same views. ``forgets``: a world that shows another thing in every chunk;
    ``always``: all chunks after the past look ahead.
    """
    ahead = np.zeros(past + after, bool)
    ahead[0], ahead[past], ahead[past + 1:] = True, True, (
        always | (rng.random(after - 1) < 0.6))
    thing = rng.normal(size=(count, past + after if forgets else 1, 3))
    thing *= 1.5 / np.linalg.norm(thing, axis=-1, keepdims=True)
    x = np.zeros((count, past + after, 4))
    x[..., :3], x[..., 3] = np.where(ahead[:, None], thing, 0), np.where(ahead, -1, 1)
    x = x.repeat(4, 1) + SPREAD * rng.normal(size=(count, 4 * (past + after), 4))
    labels = (~ahead).astype(np.int64).repeat(4)[None].repeat(count, 0)
    return Frames.of(torch.from_numpy(x[..., None, None].astype(np.float32)),
                     poses(ahead)[None].repeat(count, 0), labels), thing[:, 0], tuple(ahead)


@functools.cache
def _window(ahead, past, teacher):
    return Window.choose(MEMORY, poses(np.array(ahead))[None], 4 * past, len(ahead) - past,
                         teacher_policy=teacher)


def window(count, ahead, past, teacher=None):
    """What student and teacher see; ``teacher``: chooses the teacher's context instead."""
    one = _window(ahead, past, teacher)
    return Window(one.start, one.chunk, tuple(c.repeat(count, 0) for c in one.contexts),
                  one.teacher * count)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lively(seed=0, cfg=CFG):
    """Random weights everywhere, the additions included."""
    dit, g = fresh(seed, cfg), generator(seed)
    for p in dit.parameters():
        p.data = torch.randn(p.shape, generator=g) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 5)
    return dit


def scene(past=4, count=2, seed=3):
    clip, _, ahead = clips(np.random.default_rng(seed), count, past)
    return clip, window(count, ahead, past)
