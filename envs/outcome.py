"""What a chunk is worth: reward up to the end frame, the end, and why an episode is cut.

Shapes: B slots of the chunk, F pixel frames of the chunk.
"""

from typing import Any

import numpy as np

from worldgym.envs.spaces import to_numpy
from worldgym.envs.tasks import Task
from worldgym.errors import ConfigError, NotFiniteError, ShapeError

REASONS = ("", "horizon", "context", "distrust", "drift")  # a reason code is an index into it


def judge(task: Task, chunk: Any, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward, end and last valid frame of every slot of a chunk.

    Returns:
        reward_B float64 (summed up to and including the end frame), terminated_B bool,
        last_frame_B int64 (the end frame where terminated, else ``frames - 1``).

    Raises:
        ShapeError, NotFiniteError: the task's reward or end callable, or a head, returned nonsense.
    """
    slots = len(chunk.slots)
    ended_B, last_B = _ends(task, chunk, slots, frames)
    return _rewards(task, chunk, slots, frames, last_B), ended_B, last_B


def _ends(task: Task, chunk: Any, slots: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    last_B = np.full(slots, frames - 1, np.int64)
    if task.end == "never":
        return np.zeros(slots, bool), last_B
    if task.end == "head":
        ended_B = _shaped(to_numpy(chunk.terminated_B), slots, None, "end head").astype(bool)
        end_B = _shaped(to_numpy(chunk.end_frame_B), slots, None, "end frame").astype(np.int64)
        if (ended_B & ((end_B < 0) | (end_B >= frames))).any():
            raise ShapeError(
                "end frame outside its chunk", given=end_B[ended_B].tolist(),
                expected=f"0..{frames - 1}", fix="give the index of a frame inside the chunk",
            )
        return ended_B, np.where(ended_B, end_B, last_B)
    if task.end == "danger":
        return danger_draws(chunk) < danger_share(chunk), last_B
    assert callable(task.end)
    value = _shaped(to_numpy(task.end(chunk)), slots, frames, "end").astype(bool)
    if value.ndim == 1:
        return value, last_B
    ended_B = np.asarray(value.any(axis=1))
    return ended_B, np.where(ended_B, value.argmax(axis=1), last_B)


def _rewards(task: Task, chunk: Any, slots: int, frames: int, last_B: np.ndarray) -> np.ndarray:
    if task.reward == "head":
        per_frame = getattr(chunk, "reward_BF", None)
        value, name = (chunk.reward_B if per_frame is None else per_frame), "reward head"
    else:
        assert callable(task.reward)
        value, name = task.reward(chunk), "reward"
    reward = _shaped(to_numpy(value), slots, frames, name).astype(np.float64)
    if not np.isfinite(reward).all():
        raise NotFiniteError(
            f"the {name} is not finite", given=reward.ravel()[:8].tolist(),
            expected="finite numbers", fix="repair the reward callable, or the world's weights",
        )
    if reward.ndim == 1:
        return reward
    counts_BF = np.arange(frames)[None] <= last_B[:, None]
    first_B = getattr(chunk, "first_frame_B", None)
    if first_B is not None:
        counts_BF &= np.arange(frames)[None] >= first_B[:, None]
    return np.where(counts_BF, reward, 0.0).sum(axis=1)


def _shaped(value: np.ndarray, slots: int, frames: int | None, name: str) -> np.ndarray:
    allowed = [(slots,)] if frames is None else [(slots,), (slots, frames)]
    if value.shape not in allowed:
        raise ShapeError(
            f"the {name} of a chunk has the wrong shape", given=value.shape,
            expected=" or ".join(map(str, allowed)) + " (slots[, frames])",
            fix="return one value for every slot, or one for every slot and frame",
        )
    return value


def danger(chunk: Any) -> np.ndarray:
    """Danger (B,) that a world's heads see for each slot: the chance of an end, soon or now.

    Raises:
        ConfigError: the world has no end head.
    """
    chance = getattr(chunk, "danger_B", None)
    if chance is None:
        chance = getattr(chunk, "end_probability_B", None)
    if chance is None:
        raise ConfigError("no danger to take off the reward", given="a world without end head",
                          expected="a world whose chunks tell danger_B or end_probability_B",
                          fix="leave hazard at 0")
    return to_numpy(chance).astype(np.float64)


def drift(task: Task, chunk: Any) -> np.ndarray | None:
    """Drift (B,) of a chunk's frames from what their episodes began with, if the task watches it.

    Raises:
        ConfigError: the world does not tell it. NotFiniteError: it is not a number.
    """
    if task.drift is None:
        return None
    told = getattr(chunk, "drift_B", None)
    if told is None:
        raise ConfigError("no drift to watch", given="a world whose chunks tell no drift_B",
                          expected="a world that compares frames with the start",
                          fix="leave drift at None, or watch distrust")
    value = to_numpy(told).astype(np.float64)
    if not np.isfinite(value).all():
        raise NotFiniteError("the drift is not finite", given=value.tolist()[:8],
                             expected="finite numbers", fix="check the world's weights")
    return value


def danger_share(chunk: Any) -> np.ndarray:
    """Chance (B,) that a step ends by its share of the danger: 1 - (1 - danger)^(1 / steps ahead).

    Ends drawn with it come as often as recorded play ended in such situations, whatever the dream
    makes of them in the following frames: a fault that lets the danger fade is worth nothing.
    """
    return 1 - (1 - danger(chunk)) ** (1 / getattr(chunk, "ahead", 1))


def danger_draws(chunk: Any) -> np.ndarray:
    """Uniform numbers (B,) that ends are decided by.

    Raises:
        ConfigError: the world's chunks bring none.
    """
    draw = getattr(chunk, "draw_B", None)
    if draw is None:
        raise ConfigError("no ends by danger", given="a world whose chunks tell no draw_B",
                          expected="a world with an end head", fix='leave end at "head"')
    return to_numpy(draw)


def end_chances(task: Task, chunk: Any, ended_B: np.ndarray) -> np.ndarray:
    """Chance (B,) that the chunk was the last; ``ended_B``: its ends as ``judge`` told them.

    It is the head's where the task ends by a head that tells one; else an end is certain or not.
    """
    if task.end == "danger":
        return danger_share(chunk)
    told = task.end == "head" and getattr(chunk, "end_probability_B", None) is not None
    return (to_numpy(chunk.end_probability_B) if told else ended_B).astype(np.float64)


def truncations(
    elapsed_B: np.ndarray, terminated_B: np.ndarray, uncertainty_B: np.ndarray | None, task: Task,
    drift_B: np.ndarray | None = None,
) -> np.ndarray:
    """Reason code of every slot (0: not truncated); a terminated slot is never truncated."""
    reason_B = np.zeros(len(elapsed_B), np.int8)
    if task.drift is not None and drift_B is not None:
        reason_B[drift_B > task.drift] = REASONS.index("drift")
    if task.distrust is not None and uncertainty_B is not None:
        reason_B[uncertainty_B > task.distrust] = REASONS.index("distrust")
    if task.context_steps is not None:
        reason_B[elapsed_B >= task.context_steps] = REASONS.index("context")
    if task.horizon is not None:
        reason_B[elapsed_B >= task.horizon] = REASONS.index("horizon")
    reason_B[terminated_B] = 0
    return reason_B
