"""How good a world is: against held-out real episodes, and against copying the last frame.

Shapes: B episode, K context frame, S step, C channel, h w latent grid, H W pixels.
"""

import numpy as np
import torch

from worldgym.data.store import Episodes
from worldgym.engine import World
from worldgym.state import Starts


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB (B,) of uint8 frames (B, H, W, 3)."""
    error = (a.astype(np.float64) - b.astype(np.float64)) ** 2
    return 10 * np.log10(255.0**2 / np.maximum(error.mean((1, 2, 3)), 1e-9))


def auc(score: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve: chance that a true case scores above a false one, ties half.

    NaN when there are only true or only false cases.

    >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]  # of ties: the middle of their ranks
    n = int(truth.sum())
    if n == 0 or n == len(truth):
        return float("nan")
    return float((rank[truth].sum() - n * (n + 1) / 2) / (n * (len(truth) - n)))


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Average precision: precision at every distinct score, weighted by the recall it adds.

    Cases of one score are accepted together. NaN when nothing is true.

    >>> average_precision(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]))
    0.8333333333333333
    """
    n = int(truth.sum())
    if n == 0:
        return float("nan")
    _, inverse = np.unique(-score, return_inverse=True)
    accepted = np.cumsum(np.bincount(inverse))
    hits = np.bincount(inverse, weights=truth)
    return float((np.cumsum(hits) / accepted * hits).sum() / n)


def real_context(world: World, episodes: Episodes, firsts: np.ndarray, context: int) -> Starts:
    """Start states of ``context`` recorded frames each; ``firsts``: rows of the first of them."""
    past = firsts[:, None] + np.arange(context)
    frames = episodes.take("frames", past.ravel())
    latents = torch.cat([world.encode(part) for part in np.array_split(frames, context)])
    shape = (len(firsts), context)
    return Starts(latents.unflatten(0, shape),
                  episodes.take("actions", past.ravel()).reshape(*shape, *episodes.action.shape),
                  np.isin(past, episodes.starts), np.full(len(firsts), context))


def replay(world: World, episodes: Episodes, firsts: np.ndarray, context: int,
           steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames (S, B, H, W, 3) of the dream that replays recorded actions, and the real ones.

    ``firsts``: rows of the first context frame of each clip.
    """
    starts = real_context(world, episodes, firsts, context)
    state = world.begin(starts, [seed] * len(firsts), list(range(len(firsts))))
    dream, real = [], []
    for step in range(steps):
        rows = firsts + context + step
        state, chunk = world.step(state, episodes.take("actions", rows))
        dream.append(chunk.frames()[:, 0].cpu().numpy())
        real.append(episodes.take("frames", rows))
    return np.stack(dream), np.stack(real)


def measure(world: World, episodes: Episodes, ids: np.ndarray, clips: int = 64, steps: int = 50,
            seed: int = 0) -> dict[str, float | None]:
    """Metrics on held-out episodes.

    ``psnr_1``, ``psnr_50``: PSNR (dB) of the first and of the 50th dreamed frame under the recorded
    actions; ``psnr_1_copy``, ``psnr_50_copy``: of the last real context frame shown instead;
    ``end_auc``: area under the ROC curve of the end chance over all held-out steps; None when none
    or all of them end. Where no episode is long enough, fewer steps are dreamed (``psnr_25``, ...),
    then from fewer context frames (``context_frames``); the frame after an ending is never used.
    """
    lengths = episodes.lengths[ids]
    out: dict[str, float | None] = {}
    context = world.spec.context_frames
    while steps > 1 and lengths.max() < context + steps:
        steps //= 2
    context = min(context, int(lengths.max()) - steps)
    if context >= 1:
        out |= _drawing(world, episodes, ids, clips, steps, context, seed)
    chance, ended = end_chances(world, episodes, ids)
    area = auc(chance, ended)
    return out | {
        "end_auc": None if np.isnan(area) else round(area, 4),
        "end_rate": round(float(ended.mean()), 5),
        "end_rate_predicted": round(float(chance.mean()), 5), "held_out_steps": len(chance)}


def _drawing(world: World, episodes: Episodes, ids: np.ndarray, clips: int, steps: int,
             context: int, seed: int) -> dict[str, float]:
    """PSNR of ``clips`` replayed pieces of these episodes."""
    long = ids[episodes.lengths[ids] >= context + steps]
    rng = np.random.default_rng((seed, 7))
    pick = rng.choice(long, clips)
    room = episodes.lengths[pick] - context - steps + 1  # the last row may be black
    firsts = episodes.starts[pick] + rng.integers(0, room)
    dream, real = replay(world, episodes, firsts, context, steps, seed)
    last = episodes.take("frames", firsts + context - 1)
    out: dict[str, float] = {}
    for step in sorted({1, steps}):
        a, b = dream[step - 1], real[step - 1]
        out[f"psnr_{step}"] = round(float(psnr(a, b).mean()), 3)
        out[f"psnr_{step}_copy"] = round(float(psnr(last, b).mean()), 3)
    return out | {"clips": clips, "context_frames": context}


def end_chances(world: World, episodes: Episodes, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(end chance, whether it ended) of every step of these real episodes."""
    chances, truth = [], []
    k = world.outcome.frames
    for i in ids:
        episode = episodes.episode(int(i))
        n = len(episode["rewards"]) - 1
        z = torch.cat([world.encode(np.array(episode["frames"][j:min(j + 256, n)]))
                       for j in range(0, n, 256)])
        past = z[torch.from_numpy(np.maximum(np.arange(n)[:, None] + np.arange(1 - k, 1), 0))]
        features = world.features(episode["actions"][1:])
        chances.append(world.outcome(past, features.to(past.device))[0].cpu().numpy())
        truth.append(episode["terminated"][1:].astype(bool))
    return np.concatenate(chances), np.concatenate(truth)
