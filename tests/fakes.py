"""An exact toy world with the engine's API: a walker in a windy corridor; no network, no noise.

A latent (3, 2, 2) holds twelve bytes as (byte - 128) / 128; a frame repeats them over 40 x 40
pixels, so encode and decode are exact. Byte 0 is the place 0..15, bytes 1-2 count frames, byte 3 is
the wind of the last frame, byte 4 the last action, byte 5 whether the walker fell (place 0).
Wind comes from (seed, episode, step, frame, fork key) alone.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from worldgym.actions import ActionSpec
from worldgym.envs.tasks import Task
from worldgym.errors import SlotError, StateError
from worldgym.spec import WorldSpec
from worldgym.state import Starts

LIVE = {"states": 0}  # states that were not released: a leak detector
ACTIONS = {
    "discrete": ActionSpec.discrete(3),
    "multi_discrete": ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 2)),
    "multi_binary": ActionSpec(kind="multi_binary", shape=(2,), sizes=(2,)),
    "box": ActionSpec(kind="box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0)),
}


class FakeState:
    """Same surface as ``worldgym.state.WorldState``."""

    def __init__(self, latents, seed_B, episode_B, step_B, fork_B):
        self.latents_BCHW, self.seed_B, self.episode_B = latents, seed_B, episode_B
        self.step_B, self.fork_B, self.released = step_B, fork_B, False
        LIVE["states"] += 1

    def __del__(self):
        self.release()

    @property
    def num_slots(self):
        return len(self.seed_B)

    def release(self):
        if not self.released:
            LIVE["states"] -= 1
        self.released = True

    def check(self):
        if self.released:
            raise StateError("state was released", given="a released state",
                             expected="a live one", fix="take a snapshot before releasing")

    def _arrays(self):
        self.check()
        return self.latents_BCHW, self.seed_B, self.episode_B, self.step_B, self.fork_B

    def snapshot(self):
        return FakeState(*self._arrays())

    def select(self, slots):
        return FakeState(*(a[list(slots)] for a in self._arrays()))

    def fork(self, n, slots=None, fresh=False):
        slots = list(range(self.num_slots)) if slots is None else list(slots)
        out = self.select([s for s in slots for _ in range(n)])
        if fresh:
            out.fork_B = out.fork_B * 1000 + 1 + np.tile(np.arange(n), len(slots))
        return out

    def save(self, path):
        names = ("latents", "seed", "episode", "step", "fork")
        arrays = {n: torch.as_tensor(a).clone() for n, a in zip(names, self._arrays(), strict=True)}
        save_file(arrays, str(path), metadata={"state": json.dumps({"world": "fake"})})

    @classmethod
    def load(cls, path, world):
        with safe_open(str(path), framework="pt") as file:
            get = file.get_tensor
            rest = (get(n).numpy() for n in ("seed", "episode", "step", "fork"))
            return cls(get("latents"), *rest)


@dataclass
class Chunk:
    slots: list
    latents_BFChw: torch.Tensor
    reward_B: torch.Tensor
    reward_BF: torch.Tensor
    terminated_B: torch.Tensor
    end_frame_B: torch.Tensor
    world: "FakeWorld"

    def frames(self):
        self.world.decodes += 1
        flat = self.world.decode(self.latents_BFChw.flatten(0, 1))
        return flat.reshape(*self.latents_BFChw.shape[:2], *flat.shape[1:])


class FakeWorld:
    """``frames_per_chunk`` moves per step; falls at place 0; +1 and a bit of place per frame."""

    state_class = FakeState
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, kind="discrete", frames=1, max_steps=None):
        self.spec = WorldSpec(name=f"fake-{kind}-{frames}", frame_hw=(40, 40),
                              latent_chw=(3, 2, 2), action=ACTIONS[kind], fps=10.0,
                              frames_per_chunk=frames, latents_per_chunk=frames)
        self.max_steps, self.decodes = max_steps, 0

    def encode(self, frames):
        small = torch.as_tensor(np.asarray(frames))[:, ::20, ::20].permute(0, 3, 1, 2)
        return (small.float() - 128) / 128

    def decode(self, latents):
        if latents.ndim != 4:
            raise AssertionError(f"latents must be (n, C, h, w), got {tuple(latents.shape)}")
        small = (latents * 128 + 128).round().to(torch.uint8).permute(0, 2, 3, 1)
        return small.repeat_interleave(20, 1).repeat_interleave(20, 2)

    def begin(self, starts, seeds, episodes=None):
        n = len(seeds)
        episodes = [0] * n if episodes is None else episodes
        return FakeState(starts.latents_BKChw[:, -1].clone(), np.array(seeds, np.int64),
                         np.array(episodes, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64))

    def restart(self, state, slots, starts, seeds=None, episodes=None):
        self._slots(state, slots)
        fresh = self.begin(starts, seeds, episodes)
        merged = [a.clone() if torch.is_tensor(a) else a.copy() for a in state._arrays()]
        for whole, part in zip(merged, fresh._arrays(), strict=True):
            whole[list(slots)] = part
        return FakeState(*merged)

    def _slots(self, state, slots):
        if not len(slots) or len(set(slots)) != len(slots) or max(slots) >= state.num_slots:
            raise SlotError("bad slots", given=slots, expected="distinct slots", fix="check them")

    def step(self, state, actions, slots=None, per_frame=False):
        state.check()
        slots = list(range(state.num_slots)) if slots is None else list(slots)
        self._slots(state, slots)
        frames = self.spec.frames_per_chunk
        held = actions if per_frame else np.repeat(np.asarray(actions)[:, None], frames, 1)
        assert held.shape == (len(slots), frames, *self.spec.action.shape)
        latents = np.zeros((len(slots), frames, 12), np.int64)
        reward = np.zeros((len(slots), frames), np.float32)
        ended, end = np.zeros(len(slots), bool), np.full(len(slots), frames - 1)
        for row, slot in enumerate(slots):
            byte = (state.latents_BCHW[slot] * 128 + 128).round().long().numpy().ravel()
            key = [state.seed_B[slot], state.episode_B[slot], state.step_B[slot],
                   state.fork_B[slot]]
            wind = np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))
            for frame in range(frames):
                byte = self._move(byte, held[row, frame], int(wind.integers(-1, 2)))
                latents[row, frame], reward[row, frame] = byte, 1 + byte[0] / 8
                if byte[5] and not ended[row]:
                    ended[row], end[row] = True, frame
        shaped = torch.from_numpy((latents - 128) / 128).float()
        shaped = shaped.reshape(len(slots), frames, 3, 2, 2)
        parts = [a.clone() if torch.is_tensor(a) else a.copy() for a in state._arrays()]
        parts[0][slots], parts[3][slots] = shaped[:, -1], state.step_B[slots] + 1
        paid = np.where(np.arange(frames) <= end[:, None], reward, 0).sum(1)
        chunk = Chunk(slots, shaped, torch.from_numpy(paid), torch.from_numpy(reward),
                      torch.from_numpy(ended), torch.from_numpy(end), self)
        return FakeState(*parts), chunk

    @staticmethod
    def _move(byte, action, wind):
        flat = np.asarray(action).ravel()
        push = int(np.round(flat[0])) if flat.dtype.kind == "f" else int(flat[0]) % 3
        byte = byte.copy()
        count = int(byte[1]) + 256 * int(byte[2]) + 1
        byte[0] = np.clip(byte[0] + (-1 if push == 2 else push) + wind, 0, 15)
        byte[1:6] = count % 256, count // 256 % 256, wind + 1, push % 256, byte[0] == 0
        return byte


class FakeBank:
    """Starts at places 3..12, with two context frames, the older one marked by byte 11 = 7."""

    def __init__(self, count=10):
        bytes_ = np.zeros((count, 2, 12), np.int64)
        bytes_[:, :, 0] = (3 + np.arange(count) % 10)[:, None]
        bytes_[:, 0, 11] = 7
        shaped = (bytes_ - 128) / 128
        self.latents = torch.from_numpy(shaped).float().reshape(count, 2, 3, 2, 2)

    def __len__(self):
        return len(self.latents)

    def sample(self, seeds, episodes):
        return (np.asarray(seeds) * 7 + np.asarray(episodes) * 3 + 1) % len(self)

    def gather(self, indices):
        n = len(indices)
        return Starts(self.latents[np.asarray(indices)], np.zeros((n, 2), np.int64),
                      np.zeros((n, 2), bool), np.full(n, 2))

    @staticmethod
    def encode_frames(world, frames):
        n = len(frames)
        return Starts(world.encode(frames)[:, None], np.zeros((n, 1), np.int64),
                      np.ones((n, 1), bool), np.ones(n, np.int64))


def fake_spread(world, state, actions, forks):
    """Standard deviation of the place over forks with fresh noise."""
    _, chunk = world.step(state.fork(forks, fresh=True), np.repeat(actions, forks, axis=0))
    return chunk.latents_BFChw[:, -1, 0, 0, 0].reshape(-1, forks).numpy().std(axis=1)


def fake_task(kind="discrete", frames=1, max_steps=None, bank=10, **changes):
    """A task over a fresh fake world."""
    task = Task(world=FakeWorld(kind, frames, max_steps), starts=FakeBank(bank), spread=fake_spread,
                name="fake")
    return replace(task, **{"horizon": 50, **changes})


def nano_task(frames_seed=0, ahead=0, **changes):
    """A task over a tiny nano world with random weights and random start frames."""
    from worldgym.data.starts import StartBank
    from worldgym.models import nano

    world = nano.tiny(outcome_ahead=ahead)
    rng = np.random.default_rng(frames_seed)
    small = rng.integers(0, 256, (4, 4, 4, 3), np.uint8)
    bank = StartBank.from_frames(world.encode, small.repeat(8, 1).repeat(8, 2),
                                 np.zeros(4, np.int64))
    return Task(world=world, starts=bank, name="tiny", **{"horizon": 12, **changes})


def nano_env(render_mode=None, **settings):
    """Factory of a ``DreamEnv`` over the tiny nano world."""
    from worldgym.envs.make import make_dream

    return make_dream(nano_task(), render_mode=render_mode, **settings)


def nano_vector(num_envs=3, **settings):
    """Factory of a ``DreamVectorEnv`` over the tiny nano world."""
    from worldgym.envs.make import make_dream_vector

    return make_dream_vector(nano_task(), num_envs, **settings)


def fake_env(render_mode=None, kind="discrete", frames=1, **settings):
    """Factory of a ``DreamEnv`` that another process can import."""
    from worldgym.envs.make import make_dream

    return make_dream(fake_task(kind, frames), render_mode=render_mode, **settings)


def fake_vector(num_envs=3, render_mode=None, kind="discrete", frames=1, **settings):
    """Factory of a ``DreamVectorEnv``."""
    from worldgym.envs.make import make_dream_vector

    return make_dream_vector(fake_task(kind, frames), num_envs, render_mode=render_mode, **settings)
