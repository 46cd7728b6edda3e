"""Tiny recordings for the fitting tests: a bright square that actions move."""

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.data.store import Episodes

ACTIONS = {
    "discrete": ActionSpec.discrete(3, start=1),
    "multi_discrete": ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 2)),
    "multi_binary": ActionSpec(kind="multi_binary", shape=(2,), sizes=(2,)),
    "box": ActionSpec(kind="box", shape=(2,), low=(-1.0, 0.0), high=(1.0, 2.0)),
}


def draw_actions(rng, spec, n):
    """n legal actions."""
    if spec.kind == "box":
        return rng.uniform(spec.low, spec.high, (n, *spec.shape)).astype(np.float32)
    if spec.kind == "multi_binary":
        return rng.integers(0, 2, (n, *spec.shape))
    top = spec.sizes if spec.shape else spec.sizes[0]
    return rng.integers(0, top, (n, *spec.shape)) + spec.start


def make_store(path, action="discrete", hw=(32, 32), steps=(12, 9, 15, 7), ends=True, reward=1.0,
               seed=0):
    """A data set with one episode per entry of ``steps``; every other one terminates."""
    spec, rng = ACTIONS[action], np.random.default_rng(seed)
    store = Episodes.create(path, spec, hw, 10.0, {"recipe": {"id": "Square-v0"}})
    episodes = []
    for i, n in enumerate(steps):
        frames = rng.integers(0, 40, (n + 1, *hw, 3)).astype(np.uint8)
        actions = np.concatenate([np.zeros((1, *spec.shape), spec.dtype),
                                  draw_actions(rng, spec, n).astype(spec.dtype)])
        move = np.cumsum(actions.reshape(n + 1, -1)[:, 0]).astype(int) % (hw[1] - 8)
        for frame, x in zip(frames, move, strict=True):
            frame[8:16, x:x + 8] = 250
        terminated, truncated = np.zeros((2, n + 1), bool)
        terminated[-1], truncated[-1] = ends and i % 2 == 0, not (ends and i % 2 == 0)
        rewards = np.full(n + 1, reward, np.float32)
        rewards[0] = 0
        episodes.append(dict(frames=frames, actions=actions, rewards=rewards,
                             terminated=terminated, truncated=truncated, seed=i, policy="random"))
    if episodes:
        store.append(episodes)
    return store
