"""Spaces of a world and back."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.fakes import ACTIONS, FakeWorld
from worldgym.actions import ActionSpec
from worldgym.envs.spaces import (
    action_space,
    action_spec,
    check_frame,
    newest,
    observation_space,
    push,
    to_numpy,
)
from worldgym.errors import ConfigError


@pytest.mark.parametrize("space", [
    spaces.Discrete(3), spaces.Discrete(4, start=-1), spaces.MultiDiscrete([3, 2, 5]),
    spaces.MultiBinary(4), spaces.MultiBinary([2, 3]), spaces.Box(-1, 1, (2,), np.float32),
    spaces.Box(np.array([[0.0], [-2.0]], np.float32), np.array([[1.0], [5.0]], np.float32)),
], ids=str)
def test_action_space_round_trip(space):
    spec = action_spec(space)
    again = action_space(spec)
    assert again == space and action_spec(again) == spec
    space.seed(0)
    batch = np.stack([space.sample() for _ in range(5)])
    assert spec.check(batch, 5).shape == (5, *spec.shape)
    assert spec.encode(batch).shape == (5, spec.features)


@pytest.mark.parametrize("space", [
    spaces.Dict(a=spaces.Discrete(2)), spaces.Tuple([spaces.Discrete(2)]), spaces.Text(3),
    spaces.Box(-np.inf, np.inf, (1,)), spaces.Box(0, 3, (2,), np.int32),
    spaces.MultiDiscrete([[2, 3], [4, 5]]), spaces.MultiDiscrete([2, 2], start=[1, 0]),
], ids=str)
def test_other_action_spaces_are_refused(space):
    with pytest.raises(ConfigError, match="Fix: "):
        action_spec(space)


@pytest.mark.parametrize("kind", sorted(ACTIONS))
def test_per_frame_space_holds_stacked_actions(kind):
    single, many = action_space(ACTIONS[kind]), action_space(ACTIONS[kind], frames=3)
    single.seed(1)
    stacked = np.stack([np.asarray(single.sample()) for _ in range(3)])
    assert many.contains(stacked.astype(many.dtype))
    assert many.shape == (3, *ACTIONS[kind].shape)


def test_observation_spaces():
    spec = FakeWorld().spec
    frame = observation_space(spec, "frame", 4)
    assert frame.shape == (40, 40, 12) and frame.dtype == np.uint8 and frame.high.max() == 255
    latent = observation_space(spec, "latent", 4)
    assert latent.shape == (12, 2, 2) and latent.dtype == np.float32 and latent.is_bounded()
    for wrong in (("pixels", 1), ("frame", 0), ("frame", True), ("frame", 1.5)):
        with pytest.raises(ConfigError):
            observation_space(spec, *wrong)


@pytest.mark.parametrize("observation,shape", [("frame", (2, 4, 5, 3)), ("latent", (2, 3, 4, 5))])
def test_stack_is_oldest_first(observation, shape):
    stack = np.concatenate([np.full(shape, i) for i in range(3)],
                           axis=-1 if observation == "frame" else 1)
    moved = push(stack, np.full(shape, 9), observation)
    order = moved[0, 0, 0] if observation == "frame" else moved[0, :, 0, 0]
    assert order.tolist() == [1, 1, 1, 2, 2, 2, 9, 9, 9]
    assert (newest(moved, 3, observation) == 9).all()
    single = np.zeros(shape)
    assert not np.shares_memory(push(stack[..., :3] if observation == "frame" else stack[:, :3],
                                     single, observation), single)


def test_one_door_to_numpy():
    array = np.arange(3)
    assert to_numpy(array) is array
    assert to_numpy(torch.arange(3, dtype=torch.float32).requires_grad_()).tolist() == [0, 1, 2]
    assert to_numpy([1, 2]).tolist() == [1, 2]


def test_start_image_is_copied():
    image = np.zeros((4, 5, 3), np.uint8)
    assert not np.shares_memory(check_frame(image, (4, 5)), image)
    assert check_frame(torch.zeros(4, 5, 3, dtype=torch.uint8), (4, 5)).shape == (4, 5, 3)


def test_spec_of_a_shifted_discrete():
    assert action_spec(spaces.Discrete(3, start=5)) == ActionSpec.discrete(3, start=5)
