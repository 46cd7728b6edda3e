"""Exact worlds whose mistakes are planted, and recordings of the one without."""

import numpy as np
import torch

from tests.fakes import FakeBank, FakeWorld, fake_spread
from worldgym.data.store import Episodes
from worldgym.envs.tasks import Task


class KnownWorld(FakeWorld):
    """The walker of ``tests.fakes`` without wind, unless a mistake is planted.

    ``wind(place)``: how strong chance is there; ``deaf``: actions do nothing; ``wrong_after``: from
    this step on pictures are wrong; ``bonus(place)``: added to the reward of a step that led there;
    ``chance(place)``: its end chance (default: 0 or 1, as it is).
    """

    def __init__(self, kind="discrete", wind=lambda place: 0, deaf=False, wrong_after=10**6,
                 bonus=lambda place: 0.0 * place, chance=None):
        super().__init__(kind)
        self.wind, self.deaf, self.wrong_after = wind, deaf, wrong_after
        self.bonus, self.chance = bonus, chance
        self.begun, self.forked, self.rows = [], [], 0

    def begin(self, starts, seeds, episodes=None):
        self.begun.append((starts, list(seeds)))
        return super().begin(starts, seeds, episodes)

    def step(self, state, actions, slots=None, per_frame=False):
        late = state.step_B >= self.wrong_after
        self.rows += state.num_slots if slots is None else len(slots)
        self.forked.append(state.fork_B.copy())
        after, chunk = super().step(state, actions, slots, per_frame)
        place = (chunk.latents_BFChw[:, -1, 0, 0, 0] * 128 + 128).round().numpy()
        if late.any():
            chunk.latents_BFChw[late, :, 2] = 0
        chunk.reward_BF += self.bonus(torch.from_numpy(place))[:, None]
        if self.chance is not None:
            chunk.end_probability_B = self.chance(place)
            chunk.terminated_B[:] = False
        return after, chunk

    def _move(self, byte, action, wind):
        blown = FakeWorld._move(byte, np.zeros(1, int) if self.deaf else action, 0)
        blown[0] = np.clip(blown[0] + wind * self.wind(int(byte[0])), 0, 15)
        blown[5] = blown[0] == 0
        return blown


class Bank(FakeBank):
    """Starts at places 3..12; all of them are beginnings."""

    def sample(self, seeds, episodes, beginnings_only=False):
        return super().sample(seeds, episodes)


def known_task(world=None, **changes):
    """A task over a ``KnownWorld``."""
    settings = {"world": world or KnownWorld(), "starts": Bank(), "spread": fake_spread,
                "horizon": 12, **changes}
    return Task(**settings)


def record(path, episodes=12, steps=40, ends=True, game="Walk-v0"):
    """Random play of the world without mistakes, idling now and then; it ends at place 0."""
    world, rng = KnownWorld(), np.random.default_rng(5)
    store = Episodes.create(path, world.spec.action, world.spec.frame_hw, 10.0,
                            {"recipe": {"id": game}})
    made = []
    for i in range(episodes):
        byte = np.zeros(12, int)
        byte[0] = 15 if not ends else 3 + i % 10
        latents, rewards, over = [byte], [0.0], [False]
        actions = [0]
        while len(actions) <= steps and not over[-1]:
            hold = len(actions) % 10 < 4
            actions.append(0 if hold else int(rng.choice(3, p=(0.2, 0.2, 0.6)) if ends else 1))
            byte = world._move(byte, np.array(actions[-1]), 0)
            latents.append(byte)
            rewards.append(1 + byte[0] / 8)
            over.append(bool(byte[5]))
        frames = np.stack(latents).reshape(-1, 3, 2, 2).transpose(0, 2, 3, 1)
        frames[np.array(over)] = 0  # as real games do: the frame after an ending shows nothing
        truncated = np.zeros(len(actions), bool)
        truncated[-1] = not over[-1]
        made.append(dict(frames=frames.repeat(20, 1).repeat(20, 2).astype(np.uint8),
                         actions=np.array(actions), rewards=np.float32(rewards),
                         terminated=np.array(over), truncated=truncated, seed=i, policy="random"))
    store.append(made)
    return store
