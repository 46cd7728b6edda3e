"""Recording: rows, mixes, resume after kill -9, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldgym.agents.scripted import parse_policy
from worldgym.data.store import Episodes
from worldgym.envs.record import collect
from worldgym.envs.spaces import action_spec
from worldgym.errors import ActionError, ConfigError, DatasetError


class Walk(gym.Env):
    """Frames of noise around the place; an episode takes 3 to 8 steps; place 9 terminates."""

    observation_space = spaces.Box(0, 255, (4, 6, 3), np.uint8)
    metadata = {"render_modes": [], "render_fps": 5}

    def __init__(self, action=None, endless=False):
        self.action_space, self.endless = action or spaces.Discrete(3, start=1), endless

    def _see(self):
        return self.np_random.integers(0, 256, (4, 6, 3), np.uint8), {"health": self.left}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(3, 9))
        self.dies = bool(self.np_random.integers(2))
        return self._see()

    def step(self, action):
        assert self.action_space.contains(action)
        self.left -= 1
        over = self.left == 0 and not self.endless
        frame, info = self._see()
        return frame, float(np.sum(action)), over and self.dies, over and not self.dies, info


class Plain:
    """reset() and act(frame, t) on one frame."""

    def __init__(self, rng):
        self.rng = rng

    def reset(self):
        self.offset = 1

    def act(self, frame, t):
        assert frame.shape == (4, 6, 3)
        return self.offset + self.rng.integers(3)


class Predicts:
    """Like a recurrent SB3 model."""

    def predict(self, frame, state=None, episode_start=None, deterministic=False):
        assert (state is None) == bool(episode_start[0])
        return np.array(1 + (state or 0) % 3), (state or 0) + 1


def scripted(name):
    return lambda rng: parse_policy(name, action_spec(spaces.Discrete(3, start=1)))


MIX = [("plain", 2.0, Plain), ("predicts", 1.0, lambda rng: Predicts()),
       ("sticky", 1.0, scripted("sticky:0.3"))]


def same(a, b, count):
    for i in range(count):
        first, second = a.episode(i), b.episode(i)
        assert set(first) == set(second)
        for key in first:
            assert np.array_equal(first[key], second[key]), (i, key)


def test_rows_mix_and_summary(tmp_path):
    done = collect(Walk, tmp_path / "d", episodes=60, policies=MIX, info=["health"],
                   shard_episodes=16, progress=False)
    store = Episodes.open(tmp_path / "d")
    store.verify()
    assert done.episodes == done.new_episodes == len(store) == 60 and done.steps == store.steps
    assert set(done.policies) == {"plain", "predicts", "sticky"} == set(store.policies)
    assert done.policies["plain"]["episodes"] > done.policies["sticky"]["episodes"]
    assert store.fps == 5 and store.frame_hw == (4, 6) and len(set(store.seeds)) == 60
    assert min(store.seeds) >= 2_000_000 and "60 episodes" in str(done)
    game = Walk()
    for i in range(60):
        data = store.episode(i)
        frame, _ = game.reset(seed=data["seed"])
        assert (data["frames"][0] == frame).all() and data["actions"][0] == 0
        for t in range(1, len(data["frames"])):
            frame, reward, terminated, truncated, info = game.step(int(data["actions"][t]))
            assert (data["frames"][t] == frame).all() and data["rewards"][t] == reward
            assert data["info_health"][t] == info["health"]
            assert (data["terminated"][t], data["truncated"][t]) == (terminated, truncated)
        assert terminated or truncated
    mean = np.mean([store.episode(i)["rewards"].sum() for i in range(60)
                    if store.policies[i] == "plain"])
    assert done.policies["plain"]["mean_return"] == pytest.approx(mean)


def test_resumed_recordings_are_the_same_data(tmp_path):
    whole = collect(Walk, tmp_path / "a", steps=200, policies=MIX, seed=3, progress=False)
    for steps in (1, 50, 51, 200, 200):
        part = collect(Walk, tmp_path / "b", steps=steps, policies=MIX, seed=3, shard_episodes=5,
                       progress=False)
    a, b = Episodes.open(tmp_path / "a"), Episodes.open(tmp_path / "b")
    assert len(a) == len(b) and part.new_episodes == 0 and 200 <= a.steps < 208
    assert part.policies == whole.policies
    same(a, b, len(a))
    collect(Walk, tmp_path / "c", episodes=len(a), policies=MIX, seed=4, progress=False)
    assert Episodes.open(tmp_path / "c").seeds != a.seeds


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_record as t
class Dies(t.Plain):
    count = 0
    def act(self, frame, step):
        Dies.count += 1
        if Dies.count == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().act(frame, step)
t.collect(t.Walk, sys.argv[1], episodes=30, policies=[("plain", 1.0, Dies)], seed=1,
          shard_episodes=4, progress=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_kill_9_loses_at_most_one_shard(tmp_path):
    root = Path(__file__).resolve().parent.parent
    code = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "d"), str(root / "tests")], cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, timeout=120)
    assert code.returncode == -9, code.stderr.decode()
    kept = len(Episodes.open(tmp_path / "d"))
    assert 0 < kept < 30 and kept % 4 == 0
    policies = [("plain", 1.0, Plain)]
    done = collect(Walk, tmp_path / "d", episodes=30, policies=policies, seed=1, progress=False)
    collect(Walk, tmp_path / "whole", episodes=30, policies=policies, seed=1, progress=False)
    assert done.new_episodes == 30 - kept
    same(Episodes.open(tmp_path / "d"), Episodes.open(tmp_path / "whole"), 30)


def test_an_error_keeps_the_episodes_before_it(tmp_path):
    class Breaks(Plain):
        count = 0

        def act(self, frame, t):
            Breaks.count += 1
            return 99 if Breaks.count == 40 else super().act(frame, t)

    with pytest.raises(ActionError):
        collect(Walk, tmp_path / "d", episodes=30, policies=[("p", 1, Breaks)], progress=False)
    assert 0 < len(Episodes.open(tmp_path / "d")) < 30


@pytest.mark.parametrize("space", [
    spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4),
    spaces.Box(-1.0, np.array([1.0, 2.0], np.float32), (2,), np.float32)])
def test_every_action_space(tmp_path, space):
    make = lambda rng: parse_policy("random", action_spec(space))  # noqa: E731
    collect(lambda: Walk(space), tmp_path / "d", episodes=3, policies=[("r", 1, make)],
            progress=False)
    data = Episodes.open(tmp_path / "d").episode(0)
    assert data["actions"].shape[1:] == space.shape
    assert all(space.contains(a.astype(space.dtype)) for a in data["actions"][1:])


def test_endless_games_are_cut(tmp_path):
    collect(lambda: Walk(endless=True), tmp_path / "d", steps=25, policies=MIX,
            max_episode_steps=10, progress=False)
    store = Episodes.open(tmp_path / "d")
    assert store.lengths.tolist() == [10, 10, 10] and store.episode(0)["truncated"][-1]


def test_refusals(tmp_path):
    def go(out="d", make=Walk, **changes):
        return collect(make, tmp_path / out, **({"episodes": 2, "policies": MIX, "seed": 0,
                                                 "progress": False} | changes))

    go()
    for changes in ({"episodes": None}, {"episodes": 0}, {"steps": -1}, {"seed": -1},
                    {"policies": []}, {"policies": [("a", 0.0, Plain)]},
                    {"policies": [("a", 1, Plain), ("a", 1, Plain)]}, {"shard_episodes": 0}):
        with pytest.raises(ConfigError, match="impossible"):
            go(**changes)
    with pytest.raises(ConfigError, match="another recording"):
        go(seed=1, episodes=3)
    with pytest.raises(ConfigError, match="another recording"):
        go(make=lambda: Walk(spaces.Discrete(4)), episodes=3)
    with pytest.raises(ConfigError, match="not a policy"):
        go(out="e", policies=[("a", 1, lambda rng: object())])
    with pytest.raises(DatasetError, match="info lacks"):
        go(out="f", info=["ammo"])
    with pytest.raises(ConfigError, match="does not show frames"):
        go(out="g", make=lambda: gym.make("CartPole-v1"))


def test_take_cover_is_recorded(tmp_path):
    pytest.importorskip("vizdoom")
    from worldgym.envs.twins import real_env_factory

    make = lambda rng: parse_policy("noop", action_spec(spaces.Discrete(3)))  # noqa: E731
    collect(real_env_factory("worldgym/TakeCover-v0"), tmp_path / "d", episodes=1,
            policies=[("noop", 1, make)], info=["health"], progress=False)
    store = Episodes.open(tmp_path / "d")
    data = store.episode(0)
    assert store.env["recipe"]["id"] == "VizdoomTakeCover-v1" and store.fps == 8.75
    assert data["terminated"][-1] and data["frames"][-1].max() == 0
    assert data["info_health"][0] == 100 and data["info_health"][-1] == 0
