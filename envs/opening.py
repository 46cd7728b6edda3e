"""The opening of episodes: seeds, episode numbers, start states, first observations.

Shapes: B slots, n slots that are reset, K start context frames, k stacked observations, H W pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from worldgym.envs import spaces
from worldgym.envs.state import ARRAYS, CoreState
from worldgym.envs.tasks import Task
from worldgym.errors import ConfigError, DTypeError, ShapeError

SEED_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """What a face shows: "frame" or "latent" observations, stacked or not, and action mapping.

    ``actions``: "hold" repeats one action over the chunk's frames, "per_frame" takes one for each.
    ``info_frames``: put the chunk's frames into info; None: with frame observations only.
    ``flat_actions``: one Box instead of a Dict, where a world's actions have named parts.
    """

    observation: str = "frame"
    frame_stack: int = 1
    actions: str = "hold"
    info_frames: bool | None = None
    flat_actions: bool = False

    def __post_init__(self) -> None:
        if self.actions not in spaces.ACTION_MAPPINGS:
            raise ConfigError(
                "unknown action mapping", given=repr(self.actions),
                expected=f"one of {spaces.ACTION_MAPPINGS}", fix='pass actions="hold"',
            )

    @property
    def frames_wanted(self) -> bool:
        """Whether a step hands out the chunk's frames."""
        return self.observation == "frame" if self.info_frames is None else self.info_frames


def check_seed(seed: Any) -> int:
    """A seed as an int; 0 is a seed.

    Raises:
        DTypeError: not an integer. ConfigError: negative, or 2**63 or more.
    """
    if isinstance(seed, bool | np.bool_) or not isinstance(seed, int | np.integer):
        raise DTypeError("seed is not an integer", given=repr(seed),
                         expected=f"an int in 0..{SEED_LIMIT - 1}, or None", fix="pass seed=0")
    if not 0 <= seed < SEED_LIMIT:
        raise ConfigError("seed out of range", given=int(seed),
                          expected=f"an int in 0..{SEED_LIMIT - 1}", fix="pass seed=0")
    return int(seed)


def decode(world: Any, latents: np.ndarray) -> np.ndarray:
    """Frames uint8 (n, H, W, 3) of latents float (n, C, h, w)."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(latents, np.float32))
    return spaces.to_numpy(world.decode(tensor.to(world.device)))


class Opening:
    """Begins episodes in some slots of a batch; holds no state of its own.

    Args:
        task: what is dreamt. view: what is shown. num_slots: B.
    """

    def __init__(self, task: Task, view: ViewConfig, num_slots: int) -> None:
        self.task, self.view, self.num_slots = task, view, num_slots

    def begin(
        self, old: CoreState | None, slots: np.ndarray, seeds: Any = None, starts: Any = None,
        frames: Any = None, texts: Any = None,
    ) -> tuple[CoreState, np.ndarray]:
        """State with new episodes in ``slots``, and start index per slot (-1: user's image).

        ``old`` None begins all slots; see ``DreamCore.reset`` for the other arguments.
        """
        seed_n, episode_n = self._keys(old, slots, seeds)
        size = self.task.world.spec.frame_hw
        # a bank may know starts of more than an image; such have ``frames_KHWC``
        check = getattr(self.task.starts, "check_own", spaces.check_frame)
        images = [None] * len(slots) if frames is None else [
            None if f is None else check(f, size) for f in frames]
        given = np.array([f is not None for f in images])
        index_n = self._start_indices(seed_n, episode_n, starts)
        world, bank = self.task.world, self.task.starts
        seed_list, episode_list = seed_n.tolist(), episode_n.tolist()
        source = bank.gather(index_n)
        if texts is not None:
            source = bank.tell(source, texts)
        if old is None or len(slots) == self.num_slots:
            state = world.begin(source, seed_list, episode_list)
        else:
            state = world.restart(old.world, slots.tolist(), source, seed_list, episode_list)
        stack_n = self._first_stack(source, index_n)
        if given.any():
            told = [f for f in images if f is not None]
            own = bank.encode_frames(world, np.stack(told) if check is spaces.check_frame else told)
            if texts is not None:
                own = bank.tell(own, [t for t, mine in zip(texts, given, strict=True) if mine])
            state = world.restart(state, slots[given].tolist(), own, seed_n[given].tolist(),
                                  episode_n[given].tolist())
            stack_n[given] = self._own_stack(own, images)
            index_n[given] = -1
        return self._with_rows(old, state, slots, stack_n, seed_n, episode_n), index_n

    def _keys(self, old: CoreState | None, slots: np.ndarray, seeds: Any) -> Any:
        seeds = [None] * len(slots) if seeds is None else list(seeds)
        if len(seeds) != len(slots):
            raise ShapeError("wrong number of seeds", given=len(seeds), expected=len(slots),
                             fix="give one seed for every slot that is reset")
        seed_n, episode_n = np.zeros(len(slots), np.int64), np.zeros(len(slots), np.int64)
        for row, (slot, seed) in enumerate(zip(slots, seeds, strict=True)):
            if seed is not None:
                seed_n[row] = check_seed(seed)
            elif old is not None:
                seed_n[row], episode_n[row] = old.seed_B[slot], old.episode_B[slot] + 1
            else:  # fresh entropy of the operating system, never a global generator
                seed_n[row] = int(np.random.SeedSequence().generate_state(1)[0])
        return seed_n, episode_n

    def _start_indices(self, seed_n: np.ndarray, episode_n: np.ndarray, starts: Any) -> np.ndarray:
        bank = self.task.starts
        out = np.array(bank.sample(seed_n, episode_n), np.int64)
        for row, start in enumerate([] if starts is None else starts):
            if start is None:
                continue
            if isinstance(start, bool) or not isinstance(start, int | np.integer):
                raise DTypeError("start is not an integer", given=repr(start),
                                 expected=f"an int in 0..{len(bank) - 1}",
                                 fix='pass options={"start": 0}')
            if not 0 <= start < len(bank):
                raise ConfigError("no such start state", given=int(start),
                                  expected=f"an int in 0..{len(bank) - 1}",
                                  fix='pass options={"start": 0}')
            out[row] = start
        return out

    def _first_stack(self, source: Any, index_n: np.ndarray) -> np.ndarray:
        """Stacked observations of bank starts: the start context, its oldest frame repeated."""
        latents = spaces.to_numpy(source.latents_BKChw)
        count, depth = latents.shape[:2]
        length = getattr(source, "length_B", None)
        length_n = np.full(count, depth) if length is None else spaces.to_numpy(length)
        k = int(self.view.frame_stack)
        # column j shows context frame depth-k+j, but never one before the slot's history
        want = np.arange(depth - k, depth)[None]
        column_nk = np.clip(np.maximum(want, depth - length_n[:, None]), 0, depth - 1)
        picked = latents[np.arange(count)[:, None], column_nk]
        if self.view.observation == "latent":
            return np.ascontiguousarray(picked.reshape(count, -1, *latents.shape[3:]), np.float32)
        real = getattr(self.task.starts, "last_frames", None)
        if k == 1 and real is not None:
            return np.array(real(index_n))
        flat = decode(self.task.world, picked.reshape(count * k, *latents.shape[2:]))
        shown = flat.reshape(count, k, *flat.shape[1:])
        if real is not None:
            shown = shown.copy()
            shown[:, -1] = real(index_n)
        return np.concatenate([shown[:, j] for j in range(k)], axis=-1)

    def _own_stack(self, own: Any, images: list) -> np.ndarray:
        k = int(self.view.frame_stack)
        if self.view.observation == "frame":
            pasts = [getattr(f, "frames_KHWC", [f]) for f in images if f is not None]
            columns = [np.stack([past[max(len(past) - k + j, 0)] for past in pasts])
                       for j in range(k)]
        else:
            latents, length_n = spaces.to_numpy(own.latents_BKChw), own.length_B
            depth = latents.shape[1]
            columns = [latents[np.arange(len(latents)), np.maximum(depth - k + j, depth - length_n)]
                       .astype(np.float32) for j in range(k)]
        return np.concatenate(columns, axis=spaces.stack_axis(self.view.observation))

    def _with_rows(self, old: CoreState | None, world: Any, slots: np.ndarray, stack_n: np.ndarray,
                   seed_n: np.ndarray, episode_n: np.ndarray) -> CoreState:
        n = len(slots)
        rows = {"stack_B": stack_n, "seed_B": seed_n, "episode_B": episode_n,
                "elapsed_B": np.zeros(n, np.int64), "return_B": np.zeros(n),
                "done_B": np.zeros(n, bool)}
        if old is None or n == self.num_slots:
            return CoreState(world=world, **rows)
        merged = {}
        for name in ARRAYS:
            merged[name] = getattr(old, name).copy()
            merged[name][slots] = rows[name]
        return CoreState(world=world, **merged)
