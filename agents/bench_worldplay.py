"""``worldgym bench worldplay``: what a long episode costs, and what finding old views costs.

Processor time of this process is measured, not the clock: other programs then count for little.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldgym import camera
from worldgym.agents.results import Row, write
from worldgym.agents.stats import summary

OUT = Path("results/worldplay_bench.json")
STORED = 2000  # latent frames: those of 500 chunks
EARLY, LATE = 10, 500  # chunks
ROUNDS = 40


def tiny() -> Any:
    """A world of random weights: the sizes of Rooms-v0, the published memory and score; its starts
    may be as long as the episode."""
    from worldgym.models.codec import Codec, CodecConfig
    from worldgym.models.film import FrameVideo
    from worldgym.models.nano import dit_config
    from worldgym.models.worldplay import WorldPlayDiT
    from worldgym.models.worldplay_world import WorldPlayWorld

    codec = Codec(CodecConfig(frame_hw=(48, 64), channels=16)).eval()
    dit = WorldPlayDiT(dit_config(16, 0, patch=(2, 2)))
    g = torch.Generator().manual_seed(0)
    for module in (codec, dit):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1, generator=g)
    return WorldPlayWorld(dit.eval().requires_grad_(False), FrameVideo(codec.requires_grad_(False)),
                          longest=4 * (LATE + 1))


def walk(latents: int, seed: int = 0) -> np.ndarray:
    """c2w poses of a walk at random about one place: nearly all old views are near."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.choice([9, 18, 1, 2, 10, 11, 27, 36], latents // 4 + 1), 4)[:latents - 1]
    return camera.walk(camera.motions_of(labels))


def start(world: Any, chunks: int, seed: int = 0) -> Any:
    """A state that has ``chunks`` chunks behind it."""
    n = world.memory.chunk
    clip = torch.randn(chunks * n, *world.spec.latent_chw,
                       generator=torch.Generator().manual_seed(seed))
    given = world.starts([clip], poses=[walk(chunks * n, seed)])
    return world.begin(given, [seed])


def cost(world: Any, state: Any, action: np.ndarray) -> tuple[float, Any]:
    """Processor seconds of a step, and the state after it."""
    begun = time.process_time()
    new, chunk = world.step(state, action[None])
    chunk.frames()
    return time.process_time() - begun, new


def growth(rounds: int = ROUNDS) -> list[float]:
    """Step time late in an episode over that early in one, of neighbouring pairs of steps; both
    episodes go on."""
    world = tiny()
    actions = np.random.default_rng(0).integers(0, 9, (rounds + 2, 2))
    states = {n: start(world, n) for n in (EARLY, LATE)}
    ratios = []
    for i, action in enumerate(actions):
        order = (EARLY, LATE) if i % 2 else (LATE, EARLY)
        took = {}
        for n in order:
            took[n], new = cost(world, states[n], action)
            states[n].release()
            states[n] = new
        if i > 1:  # the first ones make tables
            ratios.append(took[LATE] / took[EARLY])
    return ratios


def retrieval(rounds: int = ROUNDS) -> list[float]:
    """Milliseconds to choose the context of a chunk among ``STORED`` latent frames."""
    from worldgym.reconstituted import WAN_MEMORY, History

    c2w = walk(STORED + 4 * rounds)
    w2c, n = camera.inverse(c2w), WAN_MEMORY.chunk
    K = np.broadcast_to(camera.normalised(camera.DEFAULT_K), (STORED, 3, 3))
    history = History.empty(n).append(torch.zeros(STORED, 1, 1, 1), w2c[:STORED], K,
                                      camera.labels_of(c2w[:STORED]))
    out = []
    for i in range(rounds + 1):
        at = w2c[STORED + n * (i - 1):STORED + n * i] if i else w2c[STORED:STORED + n]
        begun = time.process_time()
        history.select(WAN_MEMORY, at)
        out.append(1000 * (time.process_time() - begun))
    return out[1:]


def bench(out: str | Path | None = None, rounds: int = ROUNDS) -> list[Row]:
    """Measure, print and write; returns the rows."""
    rows = []
    for metric, values, unit, note in (
            ("chunk500_over_chunk10", growth(rounds), "", "median of neighbouring pairs of steps; "
             "128 wide, 6 layers, 48 x 64 pixels, published memory and score"),
            ("retrieval_ms_2000", retrieval(rounds), "ms", "published score, 50,000 points")):
        s = summary(values)
        value = float(np.median(values)) if metric.startswith("chunk") else s.mean
        rows.append(Row(what="tiny", metric=metric, value=value, ci95=s.ci95, n=len(values),
                        unit=unit, note=note))
        print(f"{metric:24} {value:.3f} [{s.low:.3f}, {s.high:.3f}] {unit}")
    write(out or OUT, rows)
    return rows
