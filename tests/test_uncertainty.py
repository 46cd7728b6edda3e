"""Spread over forks: of what they show, and of what comes of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.agent_toys import tiny_task
from worldgym.actions import ActionSpec
from worldgym.errors import ConfigError
from worldgym.uncertainty import both_spreads, fork_spread, outcome_spread


class Script:
    """A world that says of every fork what the test says: (slots * forks,) a step."""

    def __init__(self, chances, rewards, danger=None):
        self.spec = SimpleNamespace(action=ActionSpec.discrete(3))
        self.chances, self.rewards, self.danger, self.now = chances, rewards, danger, 0

    def step(self, state, actions):
        n, now = len(actions), self.now
        self.now += 1
        return state, SimpleNamespace(
            latents_BFChw=torch.arange(n).float()[:, None, None, None, None],
            end_probability_B=np.array(self.chances[now], float),
            reward_B=np.array(self.rewards[now], np.float32),
            danger_B=None if self.danger is None else np.array(self.danger[now], float))


class State(SimpleNamespace):
    def fork(self, forks, fresh):
        assert fresh
        return State(num_slots=self.num_slots * forks)

    def release(self):
        pass


def spread(chances, rewards, danger=None, slots=1):
    world = Script(chances, rewards, danger)
    return outcome_spread(world, State(num_slots=slots), np.zeros(slots, int), 2).tolist()


def test_outcome_spread_by_hand():
    calm = [[0, 0], [0, 0]]
    assert spread(calm, [[1, 1], [1, 1]]) == [0]
    # fork 0 ends with chance 1 - 0.5 * 0.5, fork 1 never: p = 0.375
    assert spread([[0.5, 0], [0.5, 0]], calm) == pytest.approx([(0.375 * 0.625) ** 0.5])
    # danger stands for the chance of the second step
    assert spread([[0.5, 0], [0, 0]], calm, [[0, 0], [0.5, 0]]) == pytest.approx(
        [(0.375 * 0.625) ** 0.5])
    # one fork is paid, the other is not; the unit does not count
    assert spread(calm, [[0, 7], [0, 0]]) == spread(calm, [[0, 1], [0, 0]]) == [0.5]
    assert spread([[1, 1, 0, 0], [0] * 4], [[0] * 4] * 2, slots=2) == [0, 0]  # certain ends


def test_both_come_from_the_same_forks_and_leave_the_state():
    task = tiny_task()
    starts = task.starts.gather(task.starts.sample([1, 2, 3], [0, 0, 0]))
    state = task.world.begin(starts, [1, 2, 3])
    used = task.world.pool.stats()["pages_used"]
    shown, outcome = both_spreads(task.world, state, [0, 1, 2])
    assert np.array_equal(shown, fork_spread(task.world, state, [0, 1, 2]))
    assert np.array_equal(outcome, outcome_spread(task.world, state, [0, 1, 2]))
    assert outcome.dtype == np.float32 and (outcome > 0).all() and (outcome <= 1).all()
    alone = outcome_spread(task.world, state.select([1]), [1])
    np.testing.assert_allclose(alone, outcome[1:2], rtol=1e-5)
    assert task.world.pool.stats()["pages_used"] == used
    for name, measured in (("latent", shown), (None, shown), ("outcome", outcome)):
        assert np.array_equal(replace(task, spread=name).uncertainty(state, [0, 1, 2]), measured)
    with pytest.raises(ConfigError, match="unknown spread"):
        replace(task, spread="colour")
