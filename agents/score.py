"""What a policy is worth: in the real game, in the dream, and the difference of the two.

Shapes: N acting slots. Slot i plays episode i and nothing else, so an episode depends on its own
seed alone, however many games run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldgym.agents.encode import as_numpy
from worldgym.agents.policy import Policy
from worldgym.agents.results import Row
from worldgym.agents.stats import METHOD, Summary, difference, summary
from worldgym.errors import ConfigError, DTypeError

REAL_SEEDS = 1_000_000  # first seed of scoring episodes; recordings use those from 2,000,000 on


@dataclass(frozen=True, slots=True)
class Played:
    """Returns and lengths of one policy's episodes, in the order of ``seeds``."""

    policy: str
    where: str
    seeds: tuple[int, ...]
    returns: np.ndarray
    lengths: np.ndarray

    @property
    def summary(self) -> Summary:
        """Mean, standard deviation and interval of the returns."""
        return summary(self.returns)

    def row(self, what: str, unit: str = "") -> Row:
        """The line for a results file."""
        s = self.summary
        return Row(what=what, metric=f"{self.where}_return", value=s.mean, ci95=s.ci95, n=s.n,
                   unit=unit, seeds=seed_text(self.seeds), sd=s.sd,
                   note=f"{METHOD}; policy {self.policy}")


def seed_text(seeds: Sequence[int]) -> str:
    """Seeds in short: ``0-99`` if consecutive.

    >>> seed_text([3, 4, 5])
    '3-5'
    """
    seeds = list(seeds)
    if len(seeds) > 1 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def play_real(
    make_game: Callable[[], Any],
    policy: Policy,
    episodes: int = 20,
    seed: int = REAL_SEEDS,
    games: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Played:
    """Play ``episodes`` real episodes with seeds ``seed, seed + 1, …``.

    Args:
        make_game: makes one Gymnasium env whose observations are frames (H, W, 3) uint8.
        policy: acts on the frames of all running games at once.
        games: how many games run in lockstep.
        progress: called with 1 after each episode.
    """
    _check_count(episodes, "episodes")
    _check_count(games, "games")
    seeds = tuple(range(seed, seed + episodes))
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    envs = [make_game() for _ in range(min(games, episodes))]
    try:
        policy.reset(episodes, seed)
        running: dict[int, int] = {}  # game -> episode
        frames: dict[int, np.ndarray] = {}
        waiting = list(range(episodes))[::-1]
        while waiting or running:
            for game in range(len(envs)):
                if game not in running and waiting:
                    running[game] = waiting.pop()
                    frames[game] = _frame(envs[game].reset(seed=seeds[running[game]])[0])
            order = list(running)
            slots = np.array([running[g] for g in order])
            actions = policy.act(np.stack([frames[g] for g in order]), lengths[slots], slots)
            for game, action in zip(order, actions, strict=True):
                obs, reward, ended, cut, _ = envs[game].step(_plain(action))
                frames[game] = _frame(obs)
                returns[running[game]] += float(reward)
                lengths[running[game]] += 1
                if ended or cut:
                    del running[game]
                    if progress:
                        progress(1)
    finally:
        for env in envs:
            env.close()
    return Played(policy.name, "real", seeds, returns, lengths)


def play_dream(
    task: Any,
    policy: Policy,
    episodes: int = 20,
    seed: int = REAL_SEEDS,
    slots: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Played:
    """Play ``episodes`` dreamt episodes of ``task``, to its end or its horizon.

    Episodes begin where real ones do (start states from within an episode are left out).
    The agent's reward is what the task pays; a distrust penalty or truncation is left out, so
    that the figure can be held against the real return.
    """
    _check_count(episodes, "episodes")
    if task.horizon is None:
        raise ConfigError("dream return without a horizon", given="horizon None",
                          expected="a horizon, so that every episode ends",
                          fix="load_task(id, horizon=525)")
    seeds = tuple(range(seed, seed + episodes))
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    policy.reset(episodes, seed)
    for first in range(0, episodes, slots):
        block = np.arange(first, min(first + slots, episodes))
        _dream_block(task, policy, block, seeds, returns, lengths, progress)
    return Played(policy.name, "dream", seeds, returns, lengths)


def _dream_block(task: Any, policy: Policy, block: np.ndarray, seeds: Sequence[int],
                 returns: np.ndarray, lengths: np.ndarray,
                 progress: Callable[[int], None] | None) -> None:
    from worldgym.envs.outcome import judge

    world, per_chunk = task.world, int(task.world.spec.frames_per_chunk)
    keys = [int(seeds[e]) for e in block]
    index = task.starts.sample(keys, [0] * len(keys), beginnings_only=True)
    state = world.begin(task.starts.gather(index), keys, [0] * len(keys))
    latents = as_numpy(state.latents_BCHW)
    wants_latents = getattr(policy, "observes", "frame") == "latent"
    frames = None if wants_latents else as_numpy(world.decode(state.latents_BCHW))
    live = np.arange(len(block))
    while len(live):
        episodes = block[live]
        if wants_latents:
            actions = policy.act_latents(latents, lengths[episodes], episodes)  # type: ignore
        else:
            assert frames is not None
            actions = policy.act(frames, lengths[episodes], episodes)
        state, chunk = world.step(state, actions, slots=live.tolist())
        reward, ended, last = judge(task, chunk, per_chunk)
        returns[episodes] += reward
        lengths[episodes] += 1
        go_on = ~(ended | (lengths[episodes] >= task.horizon))
        made = as_numpy(chunk.latents_BFChw)
        rows = np.arange(len(live))
        latents = made[rows, last * made.shape[1] // per_chunk][go_on]
        if not wants_latents and go_on.any():
            frames = as_numpy(chunk.frames())[rows, last][go_on]
        live = live[go_on]
        if progress:
            progress(int((~go_on).sum()))
    state.release()


def optimism(dream: Played, real: Played) -> Summary:
    """How much better the dream says the policy is than it is; the first number to watch."""
    return difference(dream.returns, real.returns)


def better(first: Played, second: Played) -> Summary:
    """Difference of two policies' returns; paired only where the seeds are the same game."""
    return difference(first.returns, second.returns)


def _frame(obs: Any) -> np.ndarray:
    frame = np.asarray(obs)
    if frame.dtype != np.uint8 or frame.ndim != 3:
        raise DTypeError("the game does not show frames", given=f"{frame.dtype} {frame.shape}",
                         expected="uint8 (H, W, 3)", fix="wrap it so that it returns pixels "
                         "(worldgym.envs.twins)")
    return frame


def _plain(action: np.ndarray) -> Any:
    return int(action) if np.ndim(action) == 0 and np.asarray(action).dtype.kind in "iu" else action


def _check_count(value: int, name: str) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"impossible number of {name}", given=value, expected="1 or more",
                          fix=f"pass {name}=20")
