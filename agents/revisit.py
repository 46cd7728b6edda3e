"""Does a dream bring old views back? Out along a way and back the same way, frame by frame.

Shapes: B route, N frame of the way out, H W pixels. Return frames are compared with the dream's own
frames of the first pass, at the same poses (WorldPlay's protocol). Only those count whose first
pass has left the newest frames of a context: without memory nothing of them is left to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from tqdm import tqdm

from worldgym.agents.replays import ssim
from worldgym.agents.results import Row, atomic_bytes, write
from worldgym.agents.stats import summary
from worldgym.envs.rooms import FRAMES, INVERSE, LABELS, Rooms
from worldgym.errors import ConfigError
from worldgym.train.metrics import psnr

SEED = 1_000_000  # recordings use seeds from 2,000,000 on
UNITS = {"psnr": "dB", "psnr_all": "dB", "ssim": "", "features": "", "r_dist": "rad",
         "t_dist": "units"}
TRIES = 40
MOST = 60.0  # dB, of frames that are the same


@dataclass(frozen=True, slots=True)
class Route:
    """``picture``: where it starts (H, W, 3); ``keys``: of the steps out; ``frames``: what the real
    game showed (N, H, W, 3); ``poses``: c2w (N + 1, 4, 4), the start's first."""

    picture: np.ndarray
    keys: tuple[int, ...]
    frames: np.ndarray
    poses: np.ndarray


def route(seed: int, steps: int, frame_hw: tuple[int, int]) -> Route | None:
    """A way of ``steps`` steps in new rooms that no wall stops; None where none was found."""
    env, rng = Rooms(frame_hw=frame_hw, horizon=None), np.random.default_rng((seed, 7))
    picture, _ = env.reset(seed=seed)
    keys: list[int] = []
    frames: list[np.ndarray] = []
    poses = [np.eye(4)[None]]
    forward, turns = LABELS.index(9), (LABELS.index(1), LABELS.index(2))
    turn = int(rng.choice(turns))
    for _ in range(steps):
        for attempt in range(TRIES):
            here = env.c2w.copy()
            if rng.random() < 0.15:
                turn = int(rng.choice(turns))
            key = forward if attempt == 0 and rng.random() < 0.6 else (
                turn if attempt < 3 else int(rng.choice(turns)))
            *_, won, _, info = env.step(key)
            if not won and info["moved"].all():
                break
            env.c2w, env.over = here, False
        else:
            return None
        keys.append(key)
        frames.append(info["frames"])
        poses.append(info["poses"])
    return Route(picture, tuple(keys), np.concatenate(frames), np.concatenate(poses))


def find_routes(count: int, steps: int, frame_hw: tuple[int, int], seed: int = SEED) -> list[Route]:
    """The first ``count`` routes from ``seed`` on."""
    found: list[Route] = []
    for s in range(seed, seed + 20 * count):
        one = route(s, steps, frame_hw)
        found += [] if one is None else [one]
        if len(found) == count:
            return found
    raise ConfigError("no routes", given=f"{len(found)} of {count}", expected="shorter ways",
                      fix="lower --steps")


def back(keys: Sequence[int]) -> list[int]:
    """Keys that undo these, last first."""
    return [LABELS.index(INVERSE[LABELS[k]]) for k in reversed(keys)]


@torch.no_grad()
def dream(world: Any, routes: Sequence[Route], seed: int = 0) -> np.ndarray:
    """Frames (B, 2 N, H, W, 3) that the world makes on the way out and back."""
    state = world.begin(world.starts([r.picture[None] for r in routes]),
                        [seed + i for i in range(len(routes))])
    keys = np.array([[*r.keys, *back(r.keys)] for r in routes])
    made = []
    for actions in tqdm(keys.T, desc=f"{keys.shape[1]} steps", mininterval=5.0):
        new, chunk = world.step(state, actions)
        state.release()
        state = new
        made.append(chunk.frames().cpu().numpy())
    return np.concatenate(made, 1)


def compare(world: Any, one: Route, made: np.ndarray) -> dict[str, float]:
    """Figures of one route: return frames against the first pass.

    ``features``: mean distance of the codec's latents (what they call perceptual needs a network
    that nobody here has). ``r_dist``, ``t_dist``: where the first pass says that a return frame
    is, by its most similar frame, against where the keys say it is.
    """
    n = len(one.frames)
    first = np.concatenate([one.picture[None], made[:n - 1]])  # at poses 0 to N - 1
    again = made[n:][::-1]  # at the same poses
    old = n - np.arange(n) + n - np.arange(n) > 2 * world.memory.total  # frames in between
    old = old if old.any() else np.arange(n) == 0
    latents = [world.encode(f).flatten(1) for f in (first, again)]
    gap = (latents[0] - latents[1]).square().mean(1).sqrt().cpu().numpy()
    flat = [f.reshape(n, -1).astype(np.float32) for f in (again, first)]
    apart = ((flat[0] ** 2).sum(1)[:, None] - 2 * flat[0] @ flat[1].T + (flat[1] ** 2).sum(1))
    like = apart.argmin(1)
    seen, true = one.poses[like], one.poses[:n]
    turned = np.einsum("nij,nij->n", seen[:, :3, :3], true[:, :3, :3])
    angle = np.arccos(np.clip((turned - 1) / 2, -1, 1))
    away = np.linalg.norm(seen[:, :3, 3] - true[:, :3, 3], axis=1)
    whole = psnr(again, first).clip(max=MOST)
    return {"psnr": float(whole[old].mean()), "psnr_all": float(whole.mean()),
            "ssim": float(ssim(again, first)[old].mean()), "features": float(gap[old].mean()),
            "r_dist": float(angle[old].mean()), "t_dist": float(away[old].mean())}


def strip(ways: Sequence[Route], made: dict[str, np.ndarray], shown: int = 3) -> np.ndarray:
    """A picture (H, W, 3): for some ways, what every kind of ``made`` (B, 2 N, H, W, 3) shows on
    the way out (left) and back (right), with the same places at the same distance from the middle.
    """
    rows = []
    for i, way in enumerate(ways[:shown]):
        n = len(way.frames)
        out = [0, n // 6, n // 3, n // 2, 2 * n // 3]
        for frames in made.values():
            first = np.concatenate([way.picture[None], frames[i]])  # at poses 0 to N and back to 0
            rows.append(np.concatenate([first[j] for j in out + [2 * n - j for j in out[::-1]]], 1))
        rows.append(np.full((4, rows[-1].shape[1], 3), 255, np.uint8))
    return np.concatenate(rows[:-1]).repeat(2, 0).repeat(2, 1)


def revisit(folder: str | Path, out: str | Path | None = None, *, plain: str | Path | None = None,
            routes: int = 32, steps: Sequence[int] = (24, 6, 120), seed: int = SEED,
            device: str = "cpu") -> list[Row]:
    """Measure a world of rooms with its memory, without, and with plain positions.

    Args:
        folder: world that ``worldgym fit-rooms`` wrote.
        out: results file; a picture of the first length is written beside it.
        plain: world fitted with ``--positions plain``; None: the same weights,
            told plain positions when they step.
        routes: how many. steps: of the ways out; rows of longer ways than the first are named so.
    """
    from worldgym.models import rooms

    if not steps or min(steps) < 1 or routes < 1:
        raise ConfigError("impossible routes", given=f"{routes} of {tuple(steps)} steps",
                          expected="at least 1 of each", fix="use 32 and 24 6 120")
    kinds: dict[str, tuple[str | Path, dict[str, Any]]] = {
        "memory": (folder, {}), "no-memory": (folder, {"memory": "none"}),
        "plain-positions": (plain or folder, {"positions": "plain"})}
    rows = []
    for length in steps:
        ways: list[Route] = []
        seen: dict[str, np.ndarray] = {}
        for what, (where, changes) in kinds.items():
            world = rooms.load(where, device, **changes)
            world.heads = None  # the ways are free
            ways = ways or find_routes(routes, length, world.spec.frame_hw, seed)
            made = seen[what] = dream(world, ways)
            figures = [compare(world, way, m) for way, m in zip(ways, made, strict=True)]
            note = f"{length} steps ({length * FRAMES} frames) out and back" + (
                "; weights fitted with reframed positions" * (
                    what == "plain-positions" and plain is None))
            name = what if length == steps[0] else f"{what}-{length}"
            for metric, unit in UNITS.items():
                s = summary([f[metric] for f in figures])
                rows.append(Row(what=name, metric=metric, value=s.mean, ci95=(s.low, s.high),
                                n=routes, unit=unit, seeds=f"from {seed}", sd=s.sd, note=note))
        if out is not None and length == steps[0]:
            picture = strip(ways, {k: seen[k] for k in ("memory", "no-memory")})
            atomic_bytes(Path(out).with_suffix(".png"), imageio.imwrite("<bytes>", picture,
                                                                        extension=".png"))
    if out is not None:
        write(out, rows)
    return rows
