"""Side-by-side films: the real game on the left, the dream on the right.

``same actions``: both begin with the same real frames and are given the same actions, so that
every difference is the world model's. ``two agents``: the policy plays each by itself.
Shapes: T frames of a film, K start frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents.encode import as_numpy
from worldgym.agents.policy import Policy
from worldgym.errors import ConfigError, MissingDependencyError

BAR = 24  # rows above the picture for the label
SCALE = 4


@dataclass(frozen=True, slots=True)
class Reel:
    """Frames (T, H, W, 3) uint8; the action that led to each, and what it paid (row 0: none)."""

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    ended: bool


def real_reel(make_game: Callable[[], Any], policy: Policy, seed: int, steps: int) -> Reel:
    """One real episode, cut after ``steps``; the black frame after an ending is left out."""
    game = make_game()
    try:
        policy.reset(1, seed)
        frames, actions, rewards, ended = [game.reset(seed=seed)[0]], [], [0.0], False
        for t in range(steps):
            action = policy.act(frames[-1][None], t)[0]
            frame, reward, ended, cut, _ = game.step(action.item() if action.ndim == 0 else action)
            frames.append(frame)
            actions.append(action)
            rewards.append(float(reward))
            if ended or cut:
                break
        if ended:
            frames[-1] = frames[-2]
    finally:
        game.close()
    return Reel(np.stack(frames), np.stack([np.zeros_like(actions[0]), *actions]),
                np.array(rewards), ended)


def dream_after(world: Any, real: Reel, context: int, seed: int = 0) -> Reel:
    """What the world dreams after the first ``context`` real frames, given the real actions."""
    count = min(context, len(real.frames) - 1, int(world.spec.context_frames))
    state = world.begin(first_frames(world, real, count), [seed])
    frames, rewards = list(real.frames[:count]), [0.0] * count
    ended = False
    for action in real.actions[count:]:
        state, chunk = world.step(state, action[None])
        frames.append(as_numpy(chunk.frames())[0, -1])
        rewards.append(float(chunk.reward_B[0]))
        ended = bool(chunk.terminated_B[0])
        if ended:
            break
    return Reel(np.stack(frames), real.actions[: len(frames)], np.array(rewards), ended)


def first_frames(world: Any, real: Reel, count: int) -> Any:
    """The first ``count`` frames of a film as a start state."""
    from worldgym.state import Starts

    latents = world.encode(real.frames[:count])[None]
    null = np.zeros((1, count), bool)
    null[0, 0] = True
    return Starts(latents, real.actions[None, :count], null, np.array([count]))


def dream_reel(task: Any, policy: Policy, seed: int, steps: int) -> Reel:
    """One dreamt episode that the policy plays by itself."""
    world = task.world
    start = task.starts.gather(task.starts.sample([seed], [0], beginnings_only=True))
    state = world.begin(start, [seed])
    policy.reset(1, seed)
    frames = [as_numpy(world.decode(state.latents_BCHW))[0]]
    actions: list[np.ndarray] = []
    rewards, ended = [0.0], False
    for t in range(steps):
        if getattr(policy, "observes", "frame") == "latent":
            action = policy.act_latents(as_numpy(state.latents_BCHW), t)  # type: ignore[attr-defined]
        else:
            action = policy.act(frames[-1][None], t)
        state, chunk = world.step(state, action)
        frames.append(as_numpy(chunk.frames())[0, -1])
        actions.append(np.asarray(action)[0])
        rewards.append(float(chunk.reward_B[0]))
        ended = bool(chunk.terminated_B[0])
        if ended:
            break
    return Reel(np.stack(frames), np.stack([np.zeros_like(actions[0]), *actions]),
                np.array(rewards), ended)


def side_by_side(task: Any, make_game: Callable[[], Any], policy: Policy, path: str | Path, *,
                 seed: int = 0, steps: int = 200, context: int = 4,
                 mode: str = "same-actions") -> Path:
    """Write the film and return its path.

    Args:
        mode: ``same-actions``, ``agents`` (one real, one dreamt episode), ``real`` or ``dream``.
    """
    modes = ("same-actions", "agents", "real", "dream")
    if mode not in modes:
        raise ConfigError("unknown kind of film", given=mode, expected=f"one of {modes}",
                          fix="pass mode='same-actions'")
    reels: list[tuple[str, Reel]] = []
    if mode != "dream":
        reels.append(("real game", real_reel(make_game, policy, seed, steps)))
    if mode == "same-actions":
        label = f"dream after {context} real frames, same actions"
        reels.append((label, dream_after(task.world, reels[0][1], context, seed)))
    elif mode != "real":
        reels.append(("dream", dream_reel(task, policy, seed, steps)))
    return write(path, panels(reels), float(task.world.spec.fps / task.world.spec.frames_per_chunk))


def panels(reels: Sequence[tuple[str, Reel]]) -> list[np.ndarray]:
    """Labelled pictures, all films next to each other; one that ended holds its last frame."""
    length = max(len(reel.frames) for _, reel in reels)
    made = []
    for t in range(length):
        row = []
        for label, reel in reels:
            over = t >= len(reel.frames)
            note = f"{label}  t={min(t, len(reel.frames) - 1)}" + (
                "  END" if over and reel.ended else "")
            row.append(panel(reel.frames[min(t, len(reel.frames) - 1)], note, dim=over))
        made.append(np.concatenate(row, axis=1))
    return made


def panel(frame_HWC: np.ndarray, label: str, dim: bool = False) -> np.ndarray:
    """One enlarged frame under its label."""
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError("labels need OpenCV", given="no module cv2",
                                     expected="opencv-python-headless",
                                     fix="pip install 'worldgym[rl]'") from error
    scale = max(1, SCALE * 80 // frame_HWC.shape[1])
    big = frame_HWC.repeat(scale, 0).repeat(scale, 1)
    big = big // 3 if dim else big
    bar = np.full((BAR, big.shape[1], 3), 24, np.uint8)
    cv2.putText(bar, label, (5, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (235, 235, 235), 1,
                cv2.LINE_AA)
    return np.concatenate([bar, big], axis=0)


def write(path: str | Path, frames: Sequence[np.ndarray], fps: float,
          options: Sequence[str] = ()) -> Path:
    """Write frames as H.264 mp4; ``options``: further ones of ffmpeg's output."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingDependencyError("films need imageio-ffmpeg", given="not installed",
                                     expected="imageio[ffmpeg]",
                                     fix="pip install 'worldgym[rl]'") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[0] // 2 * 2, frames[0].shape[1] // 2 * 2
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2,
                                         codec="libx264", quality=7, ffmpeg_log_level="error",
                                         output_params=list(options))
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame[:height, :width]))
    writer.close()
    return path
