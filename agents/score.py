"""What a policy is worth: in the real game, in the dream, and the difference of the two.

Shapes: N acting slots. Slot i plays episode i and nothing else, so an episode depends on its own
seed alone, however many games run side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.course import WHOLE_LIVES, Course, Tally, check_count
from worldgym.agents.encode import as_numpy
from worldgym.agents.policy import Policy
from worldgym.agents.results import Row
from worldgym.agents.stats import METHOD, Summary, difference, summary
from worldgym.errors import ConfigError, DTypeError, WorldGymError

REAL_SEEDS = 1_000_000  # first seed of scoring episodes; recordings use those from 2,000,000 on


@dataclass(frozen=True, slots=True)
class Played:
    """Returns and lengths of one policy's episodes, in the order of ``seeds``.

    ``truncated``: which episodes were cut (at the horizon, or by the game) rather than ended;
    ``rewards``: one array per episode, what each of its steps paid; ``drawn``: the returns with
    ends drawn, where ``returns`` count ends by their chance (``Course.expected``).
    """

    policy: str
    where: str
    seeds: tuple[int, ...]
    returns: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray | None = None
    rewards: tuple[np.ndarray, ...] = ()
    drawn: np.ndarray | None = None

    @classmethod
    def of(cls, policy: str, where: str, seeds: Sequence[int],
           rewards: Sequence[Sequence[float] | np.ndarray], truncated: object,
           drawn: np.ndarray | None = None) -> Played:
        """From what each step of each episode paid."""
        steps = tuple(np.asarray(r, np.float64) for r in rewards)
        return cls(policy, where, tuple(seeds), np.array([r.sum() for r in steps]),
                   np.array([len(r) for r in steps], np.int64), np.asarray(truncated, bool), steps,
                   drawn)

    @classmethod
    def join(cls, parts: Sequence[Played]) -> Played:
        """One record of consecutive parts of the same policy in the same place."""
        return cls.of(parts[0].policy, parts[0].where, sum((p.seeds for p in parts), ()),
                      sum((p.rewards for p in parts), ()),
                      np.concatenate([np.asarray(p.truncated, bool) for p in parts]),
                      None if parts[0].drawn is None else
                      np.concatenate([p.drawn for p in parts if p.drawn is not None]))

    @property
    def summary(self) -> Summary:
        """Mean, standard deviation and interval of the returns."""
        return summary(self.returns)

    @property
    def cut(self) -> int:
        """How many episodes were cut before their end."""
        return 0 if self.truncated is None else int(self.truncated.sum())

    def row(self, what: str, unit: str = "") -> Row:
        """The line for a results file."""
        s = self.summary
        return Row(what=what, metric=f"{self.where}_return", value=s.mean,
                   ci95=s.ci95 if s.n > 1 else None, n=s.n, unit=unit,
                   seeds=seed_text(self.seeds), sd=s.sd, note=f"{METHOD}; policy {self.policy}")


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
    check_count(episodes, "episodes")
    check_count(games, "games")
    with opened(make_game, min(games, episodes)) as envs:
        return real_block(envs, policy, range(episodes), range(seed, seed + episodes), seed,
                          progress)


@contextlib.contextmanager
def opened(make_game: Callable[[], Any], games: int) -> Iterator[list[Any]]:
    """``games`` games, closed again at the end whatever happens."""
    envs: list[Any] = []
    try:
        while len(envs) < games:
            envs.append(make_game())
        yield envs
    finally:
        for env in envs:
            env.close()


def real_block(envs: Sequence[Any], policy: Policy, block: Sequence[int], seeds: Sequence[int],
               seed: int, progress: Callable[[int], None] | None = None) -> Played:
    """Play the episodes ``block`` of an experiment of ``len(seeds)`` episodes in real games.

    An episode depends on its number, its entry in ``seeds`` and ``seed`` (of the policy's own
    choices) alone, not on the block it is played in.
    """
    policy.reset(len(seeds), seed)
    rewards: dict[int, list[float]] = {e: [] for e in block}
    truncated: dict[int, bool] = {}
    running: dict[int, int] = {}  # game -> episode
    frames: dict[int, np.ndarray] = {}
    waiting = list(block)[::-1]
    while waiting or running:
        for game in range(len(envs)):
            if game not in running and waiting:
                running[game] = waiting.pop()
                frames[game] = _frame(envs[game].reset(seed=int(seeds[running[game]]))[0])
        order = list(running)
        slots = np.array([running[g] for g in order])
        times = np.array([len(rewards[e]) for e in slots])
        actions = policy.act(np.stack([frames[g] for g in order]), times, slots)
        for game, action in zip(order, actions, strict=True):
            obs, reward, ended, cut, _ = envs[game].step(_plain(action))
            frames[game] = _frame(obs)
            rewards[running[game]].append(float(reward))
            if ended or cut:
                truncated[running.pop(game)] = bool(cut and not ended)
                if progress:
                    progress(1)
    return Played.of(policy.name, "real", [int(seeds[e]) for e in block],
                     [rewards[e] for e in block], [truncated[e] for e in block])


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
    check_count(episodes, "episodes")
    seeds = range(seed, seed + episodes)
    return Played.join([
        dream_block(task, [policy], range(first, min(first + slots, episodes)), seeds, seed,
                    progress)[0]
        for first in range(0, episodes, slots)])


def dream_block(task: Any, policies: Sequence[Policy], block: Sequence[int], seeds: Sequence[int],
                seed: int, progress: Callable[[int], None] | None = None,
                course: Course = WHOLE_LIVES) -> list[Played]:
    """Play the episodes ``block`` with every policy, all of them in one batch of dream slots.

    Policies share each episode's start and noise: both follow from its seed and the step alone.

    Args:
        policies: act on frames, or on latents if they say so (``observes``).
        block: episodes to play now; seeds: one per episode of the whole experiment.
        seed: of the policies' own choices.
        course: where dreams begin and go on.

    Raises:
        ConfigError: the task has no horizon. A policy's own errors come with its name.
    """
    check_horizon(task)
    world, per_chunk = task.world, int(task.world.spec.frames_per_chunk)
    who_R = np.repeat(np.arange(len(policies)), len(block))
    episode_R = np.tile(np.asarray(block, np.int64), len(policies))
    _reset(policies, len(seeds), seed)
    keys_R = np.array([int(seeds[e]) for e in episode_R])
    shown = any(not _reads_latents(p) for p in policies)
    state, latents, frames = _begin(task, keys_R.tolist(), course.anywhere, shown)
    tally, live, step = Tally(len(who_R), course.expected), np.arange(len(who_R)), 0
    while len(live):
        if course.anchor and step and step % course.anchor == 0:
            state, latents, frames = _anchored(task, state, live, keys_R[live].tolist(), step,
                                               shown)
        actions = _decide(policies, who_R[live], episode_R[live], latents, frames, step,
                          world.spec.action)
        state, chunk = world.step(state, actions, slots=live.tolist())
        ended, last = tally.count(task, chunk, per_chunk, live)
        step += 1
        go_on = ~ended & (step < task.horizon)
        tally.cut(live[~ended & ~go_on])
        if go_on.any():
            latents, frames = _shown(chunk, np.flatnonzero(go_on), last[go_on], per_chunk, shown)
        live = live[go_on]
        if progress:
            progress(int((~go_on).sum()))
    state.release()
    return [Played.of(p.name, "dream", keys_R[who_R == k].tolist(),
                      *tally.of(np.flatnonzero(who_R == k))) for k, p in enumerate(policies)]


def _reset(policies: Sequence[Policy], slots: int, seed: int) -> None:
    for policy in policies:
        policy.reset(slots, seed)


def check_horizon(task: Any) -> None:
    """Raise ConfigError unless every dreamt episode of ``task`` comes to an end."""
    if task.horizon is None:
        raise ConfigError("dream return without a horizon", given="horizon None",
                          expected="a horizon, so that every episode ends",
                          fix="load_task(id, horizon=525)")


def _begin(task: Any, keys: list[int], anywhere: bool,
           decode: bool) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """One dream per key, at the beginning of an episode or anywhere in one, and what they show."""
    episodes = [0] * len(keys)
    index = task.starts.sample(keys, episodes, beginnings_only=not anywhere)
    state = task.world.begin(task.starts.gather(index), keys, episodes)
    return state, *_now(task.world, state.latents_BCHW, decode)


def _now(world: Any, latents: Any, decode: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Latents and, if wanted, frames as arrays."""
    return as_numpy(latents), as_numpy(world.decode(latents)) if decode else None


def _anchored(task: Any, state: Any, live: np.ndarray, keys: list[int], step: int,
              decode: bool) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """The live dreams moved to recorded moments ``step`` steps into an episode, and what they show.

    Moment and noise follow from (seed, step), so that all policies go on from the same one.
    """
    index = task.starts.at_age(step, keys, [step] * len(keys))
    moved = task.world.restart(state, live.tolist(), task.starts.gather(index), seeds=keys,
                               episodes=[step] * len(keys))
    state.release()
    return moved, *_now(task.world, moved.latents_BCHW[live.tolist()], decode)


def _shown(chunk: Any, rows: np.ndarray, last: np.ndarray, per_chunk: int,
           decode: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """What these rows of a chunk show at their last frame: latents, and frames if wanted."""
    made = as_numpy(chunk.latents_BFChw)
    latents = made[rows, last * made.shape[1] // per_chunk]
    return latents, as_numpy(chunk.frames())[rows, last] if decode else None


def _reads_latents(policy: Policy) -> bool:
    return getattr(policy, "observes", "frame") == "latent"


def _decide(policies: Sequence[Policy], who_N: np.ndarray, episodes_N: np.ndarray,
            latents: np.ndarray, frames: np.ndarray | None, step: int,
            action: ActionSpec) -> np.ndarray:
    """Every live row's action (N, *shape), asked of its own policy."""
    actions = np.zeros((len(who_N), *action.shape), action.dtype)
    for k in np.unique(who_N):
        policy, rows = policies[k], np.flatnonzero(who_N == k)
        times, slots = np.full(len(rows), step), episodes_N[rows]
        try:
            if _reads_latents(policy):
                said = policy.act_latents(latents[rows], times, slots)  # type: ignore[attr-defined]
            else:
                assert frames is not None
                said = policy.act(frames[rows], times, slots)
            actions[rows] = action.check(np.asarray(said), len(rows))
        except WorldGymError as error:
            raise type(error)(f"policy {policy.name}: {error.what}", given=error.given,
                              expected=error.expected, fix=error.fix) from error
    return actions


def optimism(dream: Played, real: Played) -> Summary:
    """How much better the dream says the policy is than it is; the first number to watch."""
    return difference(dream.returns, real.returns)


def better(first: Played, second: Played) -> Summary:
    """Difference of two policies' returns; paired where both played the same seeds in one place."""
    same = first.where == second.where and first.seeds == second.seeds
    return difference(first.returns, second.returns, paired=same)


def _frame(obs: Any) -> np.ndarray:
    frame = np.asarray(obs)
    if frame.dtype != np.uint8 or frame.ndim != 3:
        raise DTypeError("the game does not show frames", given=f"{frame.dtype} {frame.shape}",
                         expected="uint8 (H, W, 3)", fix="wrap it so that it returns pixels "
                         "(worldgym.envs.twins)")
    return frame


def _plain(action: np.ndarray) -> Any:
    return int(action) if np.ndim(action) == 0 and np.asarray(action).dtype.kind in "iu" else action
