"""A WHAM world left to itself, or played by a policy: recordings and a film.

Without a policy the model draws frames and actions in turn (full generation, specs/wham.md section
6). The recording has the format of ``worldgym collect``, so that the same tools read it. Episode e
begins and goes on as (seed + e) says, whatever is recorded beside it.
Shapes: B episode played at once, T steps of an episode (T + 1 rows), H W pixels.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents.encode import as_numpy
from worldgym.agents.video import panel, write
from worldgym.data.store import Episodes
from worldgym.envs.outcome import judge
from worldgym.envs.record import open_store, record_into
from worldgym.errors import ConfigError

SLOTS = 16  # episodes at once
ITSELF = "wham"  # who acts when nobody is named


def is_wham_world(name: str | Path) -> bool:
    """Whether this is a WHAM file, or the folder of a small WHAM; nothing is loaded."""
    from worldgym.envs.tasks import place
    from worldgym.models import nano, wham_checkpoint, wham_nano

    path = place(name)
    if path.is_file():
        return wham_checkpoint.is_wham(path)
    try:
        return json.loads((path / nano.CARD).read_text())["kind"] == wham_nano.KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_task(name: str | Path, *, starts: str | Path | None = None,
              horizon: int | None = None, **settings: Any) -> Any:
    """The task of a WHAM file or folder, with a world that draws its own next action in every step.

    Args:
        starts: .npz episodes to start from (files only; without them, plain grey).
        horizon: steps of an episode at most; default: the folder's.
        settings: as for ``worldgym.envs.wham.open_world``.

    Raises:
        ConfigError: no horizon, or starts of a folder, which has its own.
    """
    from worldgym.envs.tasks import load_task, place
    from worldgym.envs.wham import load_wham, open_world

    if place(name).is_dir():
        if starts is not None:
            raise ConfigError("this world has starts of its own", given=starts, expected="none",
                              fix="leave --starts out")
        task = load_task(name)
        task = replace(task, world=open_world(name, propose=True, **settings))
    else:
        task = load_wham(name, starts=starts, propose=True, **settings)
    task = task if horizon is None else replace(task, horizon=horizon)
    if task.horizon is None:
        raise ConfigError("a rollout without an end", given="no horizon",
                          expected="steps after which an episode is cut",
                          fix="pass --max-cycles 100")
    return task


def play_block(task: Any, seeds: list[int], policy: Any = None, *,
               starts: Any = None) -> list[dict[str, Any]]:
    """Rows of one dreamt episode per seed, as ``Episodes`` stores them.

    Args:
        policy: acts on frames, or on latents if it says so; None: the model itself.
        starts: ``Starts`` to begin from instead of the task's.
    """
    world, count = task.world, len(seeds)
    if starts is None:
        starts = task.starts.gather(task.starts.sample(seeds, [0] * count))
    state = world.begin(starts, seeds, [0] * count)
    action = world.spec.action
    frames = [as_numpy(world.decode(state.latents_BCHW))]
    acted = [np.zeros((count, *action.shape), action.dtype)]
    paid, last = [np.zeros(count, np.float32)], np.full(count, task.horizon)
    ended, live = np.zeros(count, bool), np.arange(count)
    try:
        for step in range(task.horizon):
            said = _act(world, policy, state, frames[-1], live, step)
            new, chunk = world.step(state, said[live], slots=live.tolist())
            state.release()
            state = new
            reward, over, _ = judge(task, chunk, 1)
            rows = [x.copy() for x in (frames[-1], acted[0], paid[0])]
            rows[0][live] = as_numpy(chunk.frames())[:, -1]
            rows[1][live], rows[2][live] = said[live], reward
            for kept, row in zip((frames, acted, paid), rows, strict=True):
                kept.append(row)
            ended[live[over]], last[live[over]] = True, step + 1
            live = live[~over]
            if not len(live):
                break
    finally:
        state.release()
    return [_episode(frames, acted, paid, b, int(last[b]), bool(ended[b])) for b in range(count)]


def _act(world: Any, policy: Any, state: Any, frames: np.ndarray, live: np.ndarray,
         step: int) -> np.ndarray:
    """Actions (B, *shape); those of episodes that are over mean nothing."""
    if policy is None:
        return world.proposal(state)
    latents = getattr(policy, "observes", "frame") == "latent"
    seen = as_numpy(state.latents_BCHW) if latents else frames
    act = policy.act_latents if latents else policy.act
    said = np.zeros((len(frames), *world.spec.action.shape), world.spec.action.dtype)
    said[live] = act(seen[live], np.full(len(live), step), live)
    return said


def _episode(frames: list, acted: list, paid: list, slot: int, steps: int,
             ended: bool) -> dict[str, Any]:
    final = np.arange(steps + 1) == steps
    told = {name: np.stack([row[slot] for row in rows[:steps + 1]])
            for name, rows in (("frames", frames), ("actions", acted), ("rewards", paid))}
    return {**told, "terminated": final & ended, "truncated": final & (not ended)}


def rollout(task: Any, out: str | Path, episodes: int, *, seed: int = 0, policy: Any = None,
            slots: int = SLOTS, progress: bool = True) -> Episodes:
    """Record until the data set in ``out`` holds so many episodes; a killed rollout goes on.

    Raises:
        ConfigError: an impossible number, or ``out`` holds something else.
    """
    if episodes < 1 or slots < 1 or seed < 0:
        raise ConfigError("impossible rollout", given=f"{episodes} episodes, {slots} at once, "
                          f"seed {seed}", expected="1 or more, seed at least 0",
                          fix="pass episodes=10")
    world, name = task.world, ITSELF if policy is None else policy.name
    made = {"dream": str(task.name), "world": world.fingerprint, "record_seed": int(seed),
            "horizon": task.horizon, "policy": name}
    store = open_store(Path(out), world.spec.action, world.spec.frame_hw, world.spec.fps, made)
    ready: dict[int, dict[str, Any]] = {}

    def play(number: int) -> dict[str, Any]:
        if number not in ready:  # blocks lie where they lay before a kill, for the policy's sake
            block = range(number - number % slots, min(number - number % slots + slots, episodes))
            seeds = [seed + i for i in block]
            if policy is not None:
                policy.reset(slots, seeds[0])
            for i, mine, rows in zip(block, seeds, play_block(task, seeds, policy), strict=True):
                ready[i] = rows | {"seed": mine, "policy": name}
        return ready.pop(number)

    record_into(store, play, steps=None, episodes=episodes, shard_episodes=slots,
                progress=progress, label="dream")
    return store


def film(store: Episodes, path: str | Path, episodes: int = 4, *, watermark: bool = False) -> Path:
    """The first episodes of a recording as an mp4, one after another.

    Args:
        watermark: mark it as generated, as the licence of the published models wants it.
    """
    from worldgym.agents.wham_dream import PROGRAM, mark

    pictures: list[np.ndarray] = []
    for number in range(min(episodes, len(store))):
        rows = store.episode(number)
        for t, (frame, total) in enumerate(zip(rows["frames"], np.cumsum(rows["rewards"]),
                                               strict=True)):
            shown = panel(np.array(frame), f"{rows['policy']} #{number} t={t}  {total:.0f}")
            pictures.append(mark(shown) if watermark else shown)
    marks = ("-movflags", "use_metadata_tags", "-metadata", f"ProgramName={PROGRAM}",
             "-metadata", f"comment={PROGRAM}") if watermark else ()
    return write(path, pictures, store.fps, marks)
