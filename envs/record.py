"""Recording whole episodes of a real game, played by a mix of policies.

Episode ``e`` depends on (seed, e) and the policies only: which of them plays, its random numbers
and the game's seed. So a recording that was killed goes on where its last shard ends and becomes
the same data set. Shapes: T steps of an episode (T + 1 rows), H W pixels.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from worldgym.actions import ActionSpec
from worldgym.data.store import Episodes
from worldgym.envs.spaces import action_spec
from worldgym.errors import ConfigError, DatasetError

PolicyFactory = Callable[[np.random.Generator], Any]
# The game's seeds of recordings lie above those that scoring uses (1,000,000 and on).
FIRST_SEED, SEED_LIMIT = 2_000_000, 2**31
SHARD_BYTES = 256 * 2**20  # frames kept in memory before a shard is written early


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What a data set holds after ``collect``.

    ``policies``: name -> {"episodes", "steps", "mean_return"}; ``new_episodes``, ``new_steps``:
    made by this call; ``seconds``: that it took.
    """

    path: str
    episodes: int
    steps: int
    new_episodes: int
    new_steps: int
    seconds: float
    policies: dict[str, dict[str, float]]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.episodes} episodes, {self.steps} steps "
                 f"({self.new_episodes} new in {self.seconds:.0f} s)"]
        lines += [f"  {name}: {p['episodes']} episodes, mean return {p['mean_return']:.1f}"
                  for name, p in self.policies.items()]
        return "\n".join(lines)


def collect(env_factory: Callable[[], gym.Env], out: str | Path, *, steps: int | None = None,
            episodes: int | None = None, policies: Sequence[tuple[str, float, PolicyFactory]],
            seed: int = 0, shard_episodes: int = 64, info: Sequence[str] = (),
            max_episode_steps: int = 10_000, progress: bool = True) -> Recorded:
    """Record until the data set in ``out`` holds ``steps`` steps or ``episodes`` episodes.

    Both count what is there already: the same call again adds nothing. Whole episodes only.

    Args:
        env_factory: makes an environment with uint8 (H, W, 3) frames, see ``worldgym.envs.twins``.
        out: folder of the data set; made if it is not there, continued if it is.
        steps: stop at the first episode end with this many steps in all.
        episodes: stop at this many episodes in all; with both, whichever comes first.
        policies: (name, weight, factory); a factory takes a generator and gives a
            ``worldgym.agents.policy.Policy``, an object with ``reset()`` and ``act(frame, t)``, or
            an SB3-like one with ``predict(frame, state, episode_start, deterministic)``.
            It is called for every episode, and may return the same object.
        seed: of the whole recording.
        shard_episodes: episodes per shard, i.e. the most that kill -9 can lose.
        info: names in the game's info to record as float32 ``info_NAME``, e.g. ``["health"]``.
        max_episode_steps: cut episodes here, as truncated.
        progress: show a bar.

    Raises:
        ConfigError: impossible arguments, unusable environment, other settings than ``out`` has.
        DatasetError: ``out`` is damaged, or a wanted info entry is missing.
    """
    names, chances = _check(steps, episodes, policies, seed, shard_episodes, max_episode_steps)
    begun, env = time.monotonic(), env_factory()
    try:
        store, action = _open(env, Path(out), seed)
        before, had = len(store), store.steps
        player = _Player(env, action, tuple(info), max_episode_steps)

        def play(number: int) -> dict[str, Any]:
            rng = np.random.default_rng([seed, number])
            which = int(rng.choice(len(names), p=chances))
            game_seed = int(rng.integers(FIRST_SEED, SEED_LIMIT))
            return player.play(policies[which][2](rng), game_seed, rng) | {
                "seed": game_seed, "policy": names[which]}

        record_into(store, play, steps=steps, episodes=episodes, shard_episodes=shard_episodes,
                    progress=progress)
    finally:
        env.close()
    return Recorded(path=str(out), episodes=len(store), steps=store.steps,
                    new_episodes=len(store) - before, new_steps=store.steps - had,
                    seconds=time.monotonic() - begun, policies=by_policy(store))


def record_into(store: Episodes, play: Callable[[int], dict[str, Any]], *, steps: int | None,
                episodes: int | None, shard_episodes: int, progress: bool = True,
                label: str = "record") -> None:
    """Append ``play(number)`` for the next numbers until ``store`` holds so much; crash-safe."""
    total, number = store.steps, len(store)
    bar = tqdm(total=episodes if steps is None else steps, disable=not progress, desc=label,
               initial=number if steps is None else total,
               unit="episode" if steps is None else "step")
    buffer: list[dict[str, Any]] = []
    try:
        while (steps is None or total < steps) and (episodes is None or number < episodes):
            buffer.append(play(number))
            made = len(buffer[-1]["frames"]) - 1
            total, number = total + made, number + 1
            bar.update(1 if steps is None else made)
            size = sum(e["frames"].nbytes for e in buffer)
            if number % shard_episodes == 0 or size >= SHARD_BYTES:
                ready, buffer = buffer, []
                store.append(ready)
    finally:
        bar.close()
        if buffer:  # whole episodes; also when the game or the user broke off
            store.append(buffer)


def by_policy(store: Episodes) -> dict[str, dict[str, float]]:
    """Episodes, steps and mean return of every policy in a data set."""
    returns = np.array([store.episode(i)["rewards"].sum(dtype=np.float64)
                        for i in range(len(store))])
    names = np.array(store.policies)
    return {str(name): {"episodes": int((names == name).sum()),
                        "steps": int(store.lengths[names == name].sum()),
                        "mean_return": float(returns[names == name].mean())}
            for name in dict.fromkeys(store.policies)}


class _Player:
    """Plays one episode at a time and returns its rows."""

    def __init__(self, env: gym.Env, action: ActionSpec, info: tuple[str, ...],
                 limit: int) -> None:
        self.env, self.action, self.info, self.limit = env, action, info, limit

    def play(self, policy: Any, seed: int, rng: np.random.Generator) -> dict[str, Any]:
        act = _actor(policy, rng)
        frame, extra = self.env.reset(seed=seed)
        frames, extras = [np.array(frame)], [self._extras(extra)]
        actions = [np.zeros(self.action.shape, self.action.dtype)]
        rewards, terminated, truncated = [0.0], False, False
        while not (terminated or truncated):
            t = len(frames) - 1
            choice = np.asarray(act(frames[-1], t)).reshape(1, *self.action.shape)
            choice = self.action.check(choice)[0]
            frame, reward, terminated, truncated, extra = self.env.step(self._native(choice))
            truncated = truncated or (t + 1 >= self.limit and not terminated)
            frames.append(np.array(frame))
            actions.append(choice)
            rewards.append(float(reward))
            extras.append(self._extras(extra))
        last = np.arange(len(frames)) == len(frames) - 1
        fields = {f"info_{name}": np.stack([row[i] for row in extras])
                  for i, name in enumerate(self.info)}
        return {"frames": np.stack(frames), "actions": np.stack(actions),
                "rewards": np.asarray(rewards, np.float32), "terminated": last & bool(terminated),
                "truncated": last & bool(truncated), **fields}

    def _native(self, choice: np.ndarray) -> Any:
        if self.action.kind == "discrete":
            return int(choice)
        return choice.astype(self.env.action_space.dtype)

    def _extras(self, info: dict[str, Any]) -> list[np.ndarray]:
        missing = [name for name in self.info if name not in info]
        if missing:
            raise DatasetError("the game's info lacks an entry", given=sorted(info),
                               expected=f"{missing} after reset and every step",
                               fix="record fewer entries, or add them with a wrapper")
        return [np.asarray(info[name], np.float32) for name in self.info]


def _actor(policy: Any, rng: np.random.Generator) -> Callable[[np.ndarray, int], Any]:
    """``act(frame, t)`` of any kind of policy, reset for a new episode."""
    reset, act = getattr(policy, "reset", None), getattr(policy, "act", None)
    if callable(act) and callable(reset):
        if {"n", "seed"} <= set(inspect.signature(reset).parameters):  # batched: one slot of it
            reset(1, int(rng.integers(2**31)))
            return lambda frame, t: act(frame[None], t)
        reset()
        return act
    if callable(getattr(policy, "predict", None)):
        state: Any = None

        def predict(frame: np.ndarray, t: int) -> Any:
            nonlocal state
            choice, state = policy.predict(frame, state=state, deterministic=True,
                                           episode_start=np.array([t == 0]))
            return choice

        return predict
    raise ConfigError("not a policy", given=type(policy).__name__,
                      expected="reset() and act(frame, t), or predict(frame, ...)",
                      fix="see worldgym.agents.policy.Policy")


def _open(env: gym.Env, out: Path, seed: int) -> tuple[Episodes, ActionSpec]:
    """The data set to go on with, or a new one; refuses one made another way."""
    space = env.observation_space
    if not (isinstance(space, gym.spaces.Box) and space.dtype == np.uint8
            and len(space.shape) == 3 and space.shape[-1] == 3):
        raise ConfigError("the game does not show frames", given=space,
                          expected="a Box of uint8 (H, W, 3)",
                          fix="use worldgym.envs.twins.real_env, or ImageObservation")
    action = action_spec(env.action_space)
    recipe = getattr(env, "recipe", None) or {"id": env.spec.id if env.spec else type(env).__name__}
    made = {"recipe": recipe, "record_seed": int(seed)}
    try:
        made = json.loads(json.dumps(made))
    except TypeError as error:
        raise ConfigError("the game's settings cannot be written as JSON", given=str(error),
                          expected="numbers, strings, lists and dicts",
                          fix="pass plain values to real_env") from error
    fps = float(getattr(env, "fps", None) or env.metadata.get("render_fps") or 30)
    return open_store(out, action, space.shape[:2], fps, made), action


def open_store(out: Path, action: ActionSpec, hw: tuple[int, int], fps: float,
               made: dict[str, Any], agents: int = 0) -> Episodes:
    """The data set in ``out``, new if there is none; ConfigError if it was made another way."""
    if not (out / "index.json").exists():
        return Episodes.create(out, action, hw, fps, made, agents)
    store = Episodes.open(out)
    here = {"action": action, "frame_hw": tuple(hw), "fps": fps, "env": made, "agents": agents}
    there = {"action": store.action, "frame_hw": tuple(store.frame_hw), "fps": store.fps,
             "env": dict(store.env), "agents": store.agents}
    other = [k for k in here if here[k] != there[k]]
    if other:
        raise ConfigError("the folder holds another recording",
                          given={k: here[k] for k in other}, expected={k: there[k] for k in other},
                          fix="record with the same game and seed, or into another folder")
    return store


def _check(steps: int | None, episodes: int | None, policies: Sequence, seed: int,
           shard_episodes: int, limit: int) -> tuple[list[str], np.ndarray]:
    """Names and chances of the policies."""
    counts = {"steps": steps, "episodes": episodes, "shard_episodes": shard_episodes,
              "max_episode_steps": limit}
    bad = {k: v for k, v in counts.items() if v is not None and (
        isinstance(v, bool) or not isinstance(v, (int, np.integer)) or v < 1)}
    if bad or (steps is None and episodes is None):
        raise ConfigError("impossible length of recording", given=bad or "no steps, no episodes",
                          expected="whole numbers >= 1", fix="pass steps=10_000 or episodes=100")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError("impossible seed", given=seed, expected="an integer >= 0",
                          fix="pass seed=0")
    names = [str(name) for name, *_ in policies]
    weights = np.array([float(weight) for _, weight, _ in policies])
    if not names or len(set(names)) < len(names) or not np.isfinite(weights).all() or (
            weights < 0).any() or weights.sum() <= 0:
        raise ConfigError("impossible mix of policies",
                          given=dict(zip(names, weights.tolist(), strict=True)) or "none",
                          expected="distinct names, weights >= 0, one of them above 0",
                          fix="pass for instance [('random', 1.0, make_random)]")
    return names, weights / weights.sum()
