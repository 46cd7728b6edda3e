"""A tiny random WHAM file, and clips in the layout of the published data set."""

import numpy as np
import torch

from worldgym import checkpoint
from worldgym.data import wham_npz
from worldgym.models import wham_actions
from worldgym.models.wham import tiny
from worldgym.models.wham_checkpoint import KIND, LICENCE

HW = (40, 60)


def write_model(path, **settings):
    """A tiny model as ``worldgym convert`` writes one."""
    model = tiny(torch.Generator().manual_seed(0), hw=HW, patch=20, width=32, heads=2,
                 **{"seq_len": 3, "layers": 1, **settings})
    return checkpoint.save(path, model, {"kind": KIND, "format": 1, "config": model.cfg.to_json(),
                                         "licence": LICENCE, "notes": {}})


def some_actions(count, seed=0):
    """Random bins with number 0 as recorded data has it."""
    rng = np.random.default_rng(seed)
    return wham_actions.flagged(rng.integers(0, np.array(wham_actions.SIZES), (count, 16)))


def some_frames(count, seed=0):
    """Random frames that differ from each other."""
    return np.random.default_rng(seed).integers(0, 256, (count, *HW, 3), np.uint8)


def write_clip(path, count=7, seed=0):
    """An episode on disk."""
    return wham_npz.write(path, some_frames(count, seed), some_actions(count, seed))
