"""Recorded play, dreamt again: the same context and actions, compared step by step.

Shapes: B clips, longest first; S steps of the replay; H W pixels. Entries of steps that a clip
does not have are zero, and False in ``there_SB``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from worldgym.agents.encode import as_numpy
from worldgym.envs.outcome import end_chances, judge
from worldgym.errors import ConfigError, DatasetError, MissingDependencyError, ShapeError
from worldgym.train.metrics import psnr, real_context


@dataclass(frozen=True, slots=True)
class Clips:
    """Pieces of recorded episodes: row of the first context frame, and steps to replay."""

    firsts_B: np.ndarray
    steps_B: np.ndarray
    context: int

    def __len__(self) -> int:
        return len(self.firsts_B)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was recorded and what was dreamt, (S, B) each.

    ``seen_SB``: the recording shows a frame (the one after an ending is black or of another game).
    ``psnr``, ``ssim``: of the dreamt frame; ``_copy``: of the last context frame shown instead;
    ``_codec``: of the real frame encoded and decoded, the best that the world can draw.
    ``error_SB``: root mean square difference of dreamt and real latents; ``spread_SB``: spread of
    the forks' latents, ``doubt_SB``: of their reward and end. ``chance_SB``: the dream's chance
    that the step ends; ``drawn_SB``: its drawn ends.
    """

    there_SB: np.ndarray
    seen_SB: np.ndarray
    frame_SB: dict[str, np.ndarray]
    error_SB: np.ndarray
    spread_SB: np.ndarray
    doubt_SB: np.ndarray
    reward_SB: np.ndarray
    real_reward_SB: np.ndarray
    chance_SB: np.ndarray
    drawn_SB: np.ndarray
    ended_SB: np.ndarray


def check_recordings(task: Any, episodes: Any) -> None:
    """Raise DatasetError unless these recordings are of the task's game, as its world sees it."""
    spec = task.world.spec
    game = dict(episodes.env).get("recipe", {}).get("id")
    if task.twin is not None and game is not None and game != task.twin:
        raise DatasetError("recordings of another game", given=game, expected=task.twin,
                           fix="record the world's own game with `worldgym collect`")
    if episodes.action != spec.action:
        raise DatasetError("recordings with other actions", given=episodes.action,
                           expected=spec.action, fix="record the game that the world was fitted to")
    if tuple(episodes.frame_hw) != tuple(spec.frame_hw):
        raise DatasetError("recordings of another frame size", given=tuple(episodes.frame_hw),
                           expected=tuple(spec.frame_hw),
                           fix="record with --frame-hw {} {}".format(*spec.frame_hw))


def context_of(world: Any) -> int:
    """Past frames to begin with, one per step: as many as the world can use."""
    spec = world.spec  # of a chunk of several latents only one is shown, so it leaves no past
    return int(spec.context_frames) if spec.latents_per_chunk == 1 else 1


def choose_clips(episodes: Any, ids: np.ndarray, context: int, steps: int, count: int,
                 seed: int = 0) -> Clips:
    """``count`` different places in these episodes, every one with the same chance.

    A clip goes on for ``steps`` steps or until its episode is over, so that ends are as frequent
    in the clips as in play.

    Raises:
        DatasetError: no episode is long enough for ``steps``, or there are too few places.
    """
    ids = np.asarray(ids, np.int64)
    if not len(ids):
        raise DatasetError("no episodes to replay", given="none", expected="at least one",
                           fix="record some with `worldgym collect`, or drop --held-out")
    if ids.min() < 0 or ids.max() >= len(episodes):
        raise DatasetError("no such episodes to replay", given=ids.tolist()[:8],
                           expected=f"numbers in [0, {len(episodes) - 1}]",
                           fix="pass one half of Episodes.split()")
    longest = int(episodes.lengths[ids].max())
    if longest < context - 1 + steps:
        raise DatasetError(
            "episodes are too short for the replay", given=f"at most {longest} steps",
            expected=f"{context - 1 + steps}: {context} context frames, then {steps} steps",
            fix=f"ask for {longest - context + 1} steps" if longest >= context
            else "record longer episodes")
    places_E = np.maximum(episodes.lengths[ids] - context + 1, 0)
    if places_E.sum() < count:
        raise DatasetError("too few places for the clips", given=int(places_E.sum()),
                           expected=f"{count} or more", fix="ask for fewer clips, or record more")
    edges = np.cumsum(places_E)
    flat = np.sort(np.random.default_rng([seed, 0xC11]).choice(edges[-1], count, replace=False))
    chosen = np.searchsorted(edges, flat, side="right")
    offset = flat - (edges - places_E)[chosen]
    length = np.minimum(places_E[chosen] - offset, steps)
    order = np.argsort(-length, kind="stable")
    return Clips((episodes.starts[ids[chosen]] + offset)[order], length[order], context)


def replay_clips(task: Any, episodes: Any, clips: Clips, forks: int, seed: int = 0,
                 tick: Callable[[int], Any] | None = None) -> Replayed:
    """Dream every clip again; ``tick`` is called with 1 after each step."""
    world, steps, count = task.world, int(clips.steps_B.max()), len(clips)
    task = replace(task, forks=forks)
    state = world.begin(real_context(world, episodes, clips.firsts_B, clips.context),
                        [seed] * count, list(range(count)))
    shown = episodes.take("frames", clips.firsts_B + clips.context - 1)
    table = _Table(steps, count)
    for step in range(steps):
        live = int((clips.steps_B > step).sum())
        if live < state.num_slots:
            state = _moved(state, state.select(np.arange(live)))
        rows = clips.firsts_B[:live] + clips.context + step
        actions = episodes.take("actions", rows)
        spread, doubt = _spreads(task, state, actions)
        after, chunk = world.step(state, actions)
        state = _moved(state, after)
        ended = episodes.take("terminated", rows).astype(bool)
        reward, drawn, _ = judge(task, chunk, int(world.spec.frames_per_chunk))
        table.put(step, live, there=True, seen=~ended, spread=spread, doubt=doubt, reward=reward,
                  drawn=drawn, ended=ended, real_reward=episodes.take("rewards", rows),
                  chance=end_chances(task, chunk, drawn),
                  **_pictures(world, chunk, episodes.take("frames", rows), shown[:live]))
        if tick:
            tick(1)
    state.release()
    return table.done()


def _spreads(task: Any, state: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both spreads of ``worldgym.uncertainty``, or twice the one that the task brings along."""
    if callable(task.spread):
        own = as_numpy(task.uncertainty(state, actions))
        return own, own
    from worldgym.uncertainty import both_spreads

    return both_spreads(task.world, state, actions, task.forks)


def ssim(a_BHWC: np.ndarray, b_BHWC: np.ndarray) -> np.ndarray:
    """Structural similarity (B,) of uint8 frames (Wang et al., 2004; scikit-image)."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MissingDependencyError("SSIM needs scikit-image", given="no module skimage",
                                     expected="scikit-image",
                                     fix="pip install 'worldgym[rl]'") from error
    if min(a_BHWC.shape[1:3]) < 7:
        raise ShapeError("frames are too small for SSIM", given=a_BHWC.shape,
                         expected="7 pixels or more each way, the size of its window",
                         fix="use a world of larger frames")
    return np.array([structural_similarity(a, b, channel_axis=-1, data_range=255)
                     for a, b in zip(a_BHWC, b_BHWC, strict=True)])


def rms(a: Any, b: Any) -> np.ndarray:
    """Root mean square difference (B,) of latents (B, C, h, w)."""
    gap = as_numpy(a).astype(np.float64) - as_numpy(b)
    return np.sqrt((gap**2).reshape(len(gap), -1).mean(1))


def _pictures(world: Any, chunk: Any, real: np.ndarray, shown: np.ndarray) -> dict[str, np.ndarray]:
    """How far dream, copied frame and codec are from the real frames."""
    dream = as_numpy(chunk.frames())[:, -1]
    latents = world.encode(real)
    codec = as_numpy(world.decode(latents))
    return {"error": rms(chunk.latents_BFChw[:, -1], latents),
            "psnr": psnr(dream, real), "psnr_copy": psnr(shown, real),
            "psnr_codec": psnr(codec, real), "ssim": ssim(dream, real),
            "ssim_copy": ssim(shown, real), "ssim_codec": ssim(codec, real)}


def _moved(old: Any, new: Any) -> Any:
    old.release()
    return new


class _Table:
    """Columns (S, B) that fill step by step."""

    def __init__(self, steps: int, count: int) -> None:
        self._shape = (steps, count)
        self._columns: dict[str, np.ndarray] = {}

    def put(self, step: int, live: int, **values: Any) -> None:
        for name, value in values.items():
            value = np.asarray(value)
            kind = bool if value.dtype == bool else np.float64
            column = self._columns.setdefault(name, np.zeros(self._shape, kind))
            column[step, :live] = value

    def done(self) -> Replayed:
        c = self._columns
        frame = {k: v for k, v in c.items() if k.startswith(("psnr", "ssim"))}
        return Replayed(c["there"], c["seen"] & c["there"], frame, c["error"], c["spread"],
                        c["doubt"], c["reward"], c["real_reward"], c["chance"], c["drawn"],
                        c["ended"])


def check_counts(steps: int, clips: int, forks: int, window: int) -> None:
    """Raise ConfigError for numbers that no diagnosis can have."""
    for name, value, least in (("steps", steps, 1), ("clips", clips, 2), ("forks", forks, 2),
                               ("window", window, 1)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < least:
            raise ConfigError(f"impossible number of {name}", given=value,
                              expected=f"an integer >= {least}", fix=f"pass {name}={8 * least}")
    if window > steps:
        raise ConfigError("the window is longer than the replay", given=f"window {window}",
                          expected=f"at most {steps} steps", fix="replay more steps")
