"""Real twins: one image interface for every game, seeds, ends, named errors."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldgym.envs import twins
from worldgym.envs.twins import ImageObservation, RealBatch, real_env, real_env_factory
from worldgym.errors import ClosedError, ConfigError, ResetNeeded, ShapeError, SlotError

pytest.importorskip("cv2")


class Pictures(gym.Env):
    """A picture in a Dict, next to numbers; ends after 3 steps."""

    def __init__(self, space, action=None):
        self.observation_space = space
        self.action_space = action or spaces.MultiBinary(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.count += 1
        return self.observation_space.sample(), np.float32(1), np.bool_(self.count == 3), False, {}


PICTURE = spaces.Box(0, 255, (20, 30, 3), np.uint8)


@pytest.mark.parametrize("space", [
    PICTURE, spaces.Box(0, 255, (3, 20, 30), np.uint8), spaces.Box(0, 255, (20, 30), np.uint8),
    spaces.Box(0, 255, (20, 30, 1), np.uint8), spaces.Box(0.0, 1.0, (20, 30, 3), np.float32),
    spaces.Dict({"rgb": PICTURE, "speed": spaces.Box(-1, 1, (2,))}),
])
def test_every_kind_of_picture_becomes_hwc_uint8(space):
    env = ImageObservation(Pictures(space), (20, 30), full_frame=True)
    frame, info = env.reset(seed=1)
    assert frame.shape == (20, 30, 3) and frame.dtype == np.uint8 and frame.max() > 100
    assert (info["screen"] == frame).all() and (env.render() == frame).all()
    frame, reward, terminated, truncated, _ = env.step(np.array([0, 1]))
    assert type(reward) is float and terminated is False and truncated is False
    assert ImageObservation(Pictures(space), (8, 6)).reset(seed=1)[0].shape == (8, 6, 3)


def test_what_shows_no_image_is_refused():
    with pytest.raises(ConfigError, match="shows no image"):
        ImageObservation(Pictures(spaces.Box(-1, 1, (4,))))
    two = spaces.Dict({"left": PICTURE, "right": PICTURE})
    with pytest.raises(ConfigError, match="which image"):
        ImageObservation(Pictures(two))
    with pytest.raises(ConfigError, match="no such image"):
        ImageObservation(Pictures(two), key="middle")
    assert ImageObservation(Pictures(two), key="left").reset()[0].shape == (48, 80, 3)
    with pytest.raises(ConfigError, match="action space"):
        ImageObservation(Pictures(PICTURE, spaces.Tuple((spaces.Discrete(2),))))
    with pytest.raises(ConfigError, match="frame size"):
        ImageObservation(Pictures(PICTURE), (0, 8))
    with pytest.raises(ResetNeeded):
        ImageObservation(Pictures(PICTURE)).render()


@pytest.mark.parametrize("name", ["Nope-v0", "CartPole-v99", "no_such_module:Foo-v0", "a b c"])
def test_unknown_ids_are_named(name):
    with pytest.raises(ConfigError, match="unknown environment"):
        real_env(name)


def test_games_that_only_render():
    pytest.importorskip("pygame")
    env = real_env("CartPole-v1", (32, 48))
    first, _ = env.reset(seed=3)
    env.step(1)
    again, _ = env.reset(seed=3)
    assert env.source == "render" and (first == again).all() and first.shape == (32, 48, 3)
    with pytest.raises(ConfigError, match="source"):
        real_env("CartPole-v1", source="guess")
    env.close()


def test_real_batch_steps_only_running_slots():
    pytest.importorskip("pygame")
    batch = RealBatch(pickle.loads(pickle.dumps(real_env_factory("CartPole-v1", (16, 16)))), 3)
    frames = batch.reset([5, 6, 5])
    assert (frames[0] == frames[2]).all()
    while batch.running[1]:
        batch.step([1], [1])
    with pytest.raises(ResetNeeded):
        batch.step([0, 0, 0])
    frames, rewards, terminated, truncated, infos = batch.step([0, 1], [2, 0])
    assert frames.shape == (2, 16, 16, 3) and rewards.tolist() == [1, 1] and len(infos) == 2
    batch.reset([9], [1])
    assert batch.running.all()
    with pytest.raises(ShapeError):
        batch.step([0, 1])
    with pytest.raises(SlotError):
        batch.step([0, 1], [0, 3])
    batch.close()
    batch.close()
    with pytest.raises(ClosedError):
        batch.reset([1, 2, 3])
    with pytest.raises(ConfigError):
        RealBatch(real_env_factory("CartPole-v1"), 0)


@pytest.fixture(scope="module")
def take_cover():
    pytest.importorskip("vizdoom")
    env = real_env("worldgym/TakeCover-v0", full_frame=True)
    yield env
    env.close()


def play(env, seed, actions):
    frames, rewards = [env.reset(seed=seed)[0]], []
    for action in actions:
        frame, reward, terminated, truncated, info = env.step(action)
        frames.append(frame)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.stack(frames), rewards, terminated, truncated, info


def test_take_cover_episodes_repeat_and_end_black(take_cover):
    actions = np.random.default_rng(0).integers(3, size=600)
    frames, rewards, terminated, truncated, info = play(take_cover, 5, actions)
    other = play(take_cover, 6, actions)[0]
    again = play(take_cover, 5, actions)
    assert frames.shape[1:] == (32, 80, 3) and np.array_equal(frames, again[0])
    assert rewards == again[1] and not np.array_equal(frames[-2], other[-2])
    assert terminated is True and truncated is False and info["health"] == 0
    assert frames[-1].max() == 0 and frames[-2].max() > 0
    assert set(rewards[:-1]) == {4.0} and 1 <= rewards[-1] <= 4
    assert info["screen"].shape == (120, 160, 3) and take_cover.fps == 8.75


def test_take_cover_shows_the_rows_where_it_happens(take_cover):
    frame, info = take_cover.reset(seed=3)
    assert np.array_equal(frame, twins.resize(info["screen"][31:95], (32, 80)))
    assert take_cover.recipe["rows"] == [31, 95]


def test_take_cover_is_truncated_at_525_steps(take_cover):
    take_cover.reset(seed=0)
    take_cover.unwrapped.game.send_game_command("god")
    for step in range(1, 526):
        frame, reward, terminated, truncated, _ = take_cover.step(0)
        assert truncated == (step == twins.TIMEOUT_TICS // twins.FRAME_SKIP) and not terminated
    assert frame.max() > 0 and reward == 4


def test_take_cover_action_1_moves_right(take_cover):
    buttons = [b.name for b in take_cover.unwrapped.game.get_available_buttons()]
    pressed = [[n for n, on in zip(buttons, row, strict=True) if on]
               for row in take_cover.unwrapped.button_map]
    assert pressed == [[], ["MOVE_RIGHT"], ["MOVE_LEFT"]]
