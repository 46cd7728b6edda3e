"""Scripted policies: legal, reproducible, independent of the batch; and their names."""

import numpy as np
import pytest

from worldgym.actions import ActionSpec
from worldgym.agents.dodger import Memory, find_balls, follow, wall_shares
from worldgym.agents.policy import Policy
from worldgym.agents.scripted import parse_policy
from worldgym.errors import ConfigError, ShapeError, WorldGymError

THREE = ActionSpec.discrete(3)
SPECS = [
    THREE, ActionSpec.discrete(4, start=2),
    ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 2)),
    ActionSpec(kind="multi_binary", shape=(4,), sizes=(4,)),
    ActionSpec(kind="box", shape=(2,), low=(-1.0, 0.5), high=(1.0, 2.0)),
]


def play(policy, n=3, steps=6, seed=0):
    policy.reset(n, seed)
    frames = np.zeros((n, 32, 80, 3), np.uint8)
    return np.stack([policy.act(frames, t) for t in range(steps)])


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
@pytest.mark.parametrize("name", ["random", "noop", "sticky:0.3"])
def test_actions_are_legal_and_repeat(spec, name):
    policy = parse_policy(name, spec)
    assert isinstance(policy, Policy)
    first = play(policy)
    for actions in first:
        spec.check(actions, 3)
    np.testing.assert_array_equal(first, play(policy))


@pytest.mark.parametrize("name", ["random", "sticky:0.3", "sweep:2", "dodger"])
def test_a_slot_does_not_depend_on_the_others(name):
    policy = parse_policy(name, THREE)
    together = play(policy, n=3)
    policy.reset(3, 0)
    alone = [policy.act(np.zeros((1, 32, 80, 3), np.uint8), t, slots=[2])[0] for t in range(6)]
    assert together[:, 2].tolist() == [int(a) for a in alone]


def test_a_new_episode_gets_new_noise():
    policy = parse_policy("random", THREE)
    policy.reset(1, 0)
    frame = np.zeros((1, 4, 4, 3), np.uint8)
    first, second = ([int(policy.act(frame, t)[0]) for t in range(30)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("name", [
    "sweep:", "sticky:2", "sticky:x", "sweep:0", "sweep:1.5", "random:3", "nonsense", "",
    "constant:7", "no.such.module:thing", "builtins:repr", "agent.zip", "dodger:x",
])
def test_bad_names_are_refused(name):
    if name == "sweep:":
        assert parse_policy(name, THREE).name == "sweep:20"
        return
    with pytest.raises(WorldGymError) as caught:
        parse_policy(name, THREE)
    assert "Fix:" in str(caught.value)


def test_noisy_slips_and_otherwise_plays_on():
    frames = np.zeros((2, 32, 80, 3), np.uint8)

    def play(name, slots=None):
        policy = parse_policy(name, THREE)
        policy.reset(2, 4)
        return np.array([policy.act(frames if slots is None else frames[:len(slots)], t, slots)
                         for t in range(300)])

    sweep, noisy = play("sweep:20"), play("noisy:0.05:sweep:20")
    assert np.array_equal(play("noisy:0:sweep:20"), sweep)
    assert 0.05 < (noisy != sweep).mean() < 0.3
    assert np.array_equal(play("noisy:0.05:sweep:20", [1])[:, 0], noisy[:, 1])
    for wrong in ("noisy", "noisy:2:random", "noisy:x:random", "noisy:0.1:nobody"):
        with pytest.raises(ConfigError):
            parse_policy(wrong, THREE)


def test_sweep_needs_left_and_right():
    with pytest.raises(ConfigError, match="left and right"):
        parse_policy("sweep:20", ActionSpec.discrete(5))


def frame_with_ball(x, size):
    frame = np.full((32, 80, 3), 90, np.uint8)
    frame[18:18 + size, x:x + size] = (250, 230, 60)
    return frame


def test_dodger_leaves_the_path_of_a_fireball():
    policy = parse_policy("dodger", THREE)
    policy.reset(1, 0)
    course = [int(policy.act(frame_with_ball(60, 1)[None], 0)[0])]
    # held still on the screen while it grows: a hit, if nothing changes
    course += [int(policy.act(frame_with_ball(60 - s // 2, s)[None], t)[0])
               for t, s in enumerate((3, 4, 5, 6, 8), start=1)]
    assert len(set(course)) > 1


def test_dodger_sees_balls_and_walls():
    balls = find_balls(frame_with_ball(50, 4))
    assert len(balls) == 1 and balls[0].side > 0
    mind = Memory(balls=balls)
    again = follow(mind, find_balls(frame_with_ball(50, 5)))
    assert again[0].drift is not None and again[0].steps < balls[0].steps
    brick = np.full((32, 80, 3), 90, np.uint8)
    brick[:, 60:] = (120, 90, 60)
    left, right = wall_shares(brick)
    assert left == 0 and right > 0.9
    with pytest.raises(ShapeError, match="sweep:20"):
        wall_shares(np.zeros((64, 64, 3), np.uint8))
