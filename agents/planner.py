"""Planning in the dream: try action sequences on forks of the present, and act on the best.

Random shooting draws plans once and takes the best; the cross-entropy method (Rubinstein, 1999;
for planning in learned models Chua et al., NeurIPS 2018) fits a distribution to the best plans and
draws again. Shapes: N acting slots, M plans, F futures of a plan, H steps ahead, K context frames,
C channel, h w latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.encode import as_numpy, check_frames
from worldgym.agents.plans import Choices, Gaussians, any_plan
from worldgym.agents.policy import acting
from worldgym.agents.replays import context_of
from worldgym.errors import ConfigError, ShapeError

MAX_ROWS = 1024  # forks stepped at once; more slots are planned for one group after the other
KINDS = {"cem": ("horizon", "n", "iterations", "elite", "repeat", "futures", "discount", "warm",
                 "every"),
         "shooting": ("horizon", "n", "repeat", "futures", "discount", "every")}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How a planner searches; an action costs ``n * horizon * iterations / every`` world steps.

    ``horizon``: steps ahead, H. ``n``: forks per round, plans times futures. ``iterations``:
    rounds. ``elite``: share of the plans that the next round's distribution is fitted to.
    ``repeat``: chance that a plan keeps its draw for one more step, which makes long movements
    likely. ``futures``: noise seeds that each plan is tried under, the same for all plans; 1:
    every plan has noise of its own. ``discount``: worth of a reward one step later. ``warm``:
    share of the last plan in the next search's first distribution. ``every``: steps of a plan that
    are played before the next search.

    >>> PlanConfig(n=64, futures=4).plans
    16

    Raises:
        ConfigError: a number is out of range.
    """

    horizon: int = 12
    n: int = 64
    iterations: int = 2
    elite: float = 0.1
    repeat: float = 0.5
    futures: int = 1
    discount: float = 1.0
    warm: float = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        for name, least in (("horizon", 1), ("n", 2), ("iterations", 1), ("futures", 1),
                            ("every", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"impossible {name} of a planner", given=value,
                                  expected=f"an integer >= {least}", fix=f"leave {name} out")
        for name, fits, expected in (
                ("elite", 0 < self.elite <= 1, "a share above 0, at most 1"),
                ("repeat", 0 <= self.repeat < 1, "a chance of at least 0, below 1"),
                ("discount", 0 < self.discount <= 1, "a factor above 0, at most 1"),
                ("warm", 0 <= self.warm < 1, "a share of at least 0, below 1")):
            if not fits:
                raise ConfigError(f"impossible {name} of a planner", given=getattr(self, name),
                                  expected=expected, fix=f"leave {name} out")
        if self.every > self.horizon:
            raise ConfigError("a plan is played beyond its end", given=f"every={self.every}",
                              expected=f"at most horizon={self.horizon}", fix="leave every out")
        if self.n % self.futures or self.n < 2 * self.futures:
            raise ConfigError("forks do not share out among the futures",
                              given=f"n={self.n}, futures={self.futures}",
                              expected="n a multiple of futures, and two plans or more",
                              fix=f"write n={self.futures * max(2, self.n // self.futures)}")

    @property
    def plans(self) -> int:
        """Plans per round, M."""
        return self.n // self.futures

    @property
    def elites(self) -> int:
        """Plans that a distribution is fitted to."""
        return max(1, round(self.elite * self.plans))


@dataclass(slots=True)
class _Plan:
    """What a slot goes by: where its plan came from, the actions, how many were played."""

    law: Choices | Gaussians
    actions: np.ndarray
    played: int = 0


class Planner:
    """A policy that plans its actions in forks of the world; satisfies ``Policy``.

    It sees what any policy sees, frames or latents, and rebuilds the present from the last K of
    them and its own actions. Its forks draw noise of their own, from (seed, slot, episode, step)
    alone, so that in a dream it does not foresee the dream's luck, and no slot depends on another.
    A plan is worth the sum of its rewards, each times the chance to have survived until then;
    survival is taken from the end chances, not from drawn ends. The action that it returns must be
    the one that is played.

    >>> from worldgym.models import nano
    >>> world = nano.tiny()
    >>> policy = parse_planner("cem:horizon=2,n=4", world.spec.action, world)
    >>> policy.reset(3, seed=0)
    >>> policy.act(np.zeros((3, 32, 32, 3), np.uint8), t=0).shape
    (3,)

    Args:
        task: what is dreamt and paid; ``Task(world=world, starts=None)`` pays by the world's heads.
        config: how it searches.
        fit: cross-entropy method; else random shooting (one round).

    Raises:
        ConfigError: nothing says what a step is worth, or the horizon exceeds the world's memory.
    """

    observes = "latent"

    def __init__(self, task: Any, config: PlanConfig, fit: bool = True, name: str = "cem") -> None:
        self.task, self.world, self.config, self.fit, self.name = (
            task, task.world, config, fit, name)
        self.action: ActionSpec = self.world.spec.action
        self.context = context_of(self.world)
        if task.reward == "head" and getattr(self.world, "outcome", task) is None:
            raise ConfigError("nothing to plan for", given="a world without a reward head",
                              expected="a task that says what a step is worth",
                              fix="pass Task(reward=...), or fit the world's heads")
        most = task.context_steps
        if most is not None and config.horizon > most:
            raise ConfigError("the plan is longer than the world's memory", given=config.horizon,
                              expected=f"a horizon of at most {most}", fix=f"horizon={most}")
        self.reset(1, 0)

    def reset(self, n: int, seed: int) -> None:
        """Prepare ``n`` slots; everything random follows from ``seed``, slot, episode and step."""
        if n < 1:
            raise ConfigError("policy has no slots", given=n, expected="n >= 1",
                              fix="call policy.reset(n, seed) with the number of environments")
        k, shape = self.context, self.action.shape
        self._seed, self._episodes = int(seed), np.full(n, -1, np.int64)
        self._latents = np.zeros((n, k, *self.world.spec.latent_chw), np.float32)
        self._actions = np.zeros((n, k, *shape), self.action.dtype)
        self._null, self._length = np.ones((n, k), bool), np.zeros(n, np.int64)
        self._played = np.zeros((n, *shape), self.action.dtype)
        self._last: dict[int, _Plan] = {}

    def act(self, frames_NHWC: np.ndarray, t: int | np.ndarray,
            slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Actions (N, *shape) from frames uint8 (N, H, W, 3)."""
        check_frames(frames_NHWC, self.world.spec.frame_hw)
        return self.act_latents(as_numpy(self.world.encode(frames_NHWC)), t, slots)

    def act_latents(self, latents_NChw: np.ndarray, t: int | np.ndarray,
                    slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Actions (N, *shape) from the dream's own latents."""
        latents = np.asarray(latents_NChw, np.float32)
        if latents.shape[1:] != tuple(self.world.spec.latent_chw):
            raise ShapeError("latents have the wrong shape", given=latents.shape,
                             expected=f"(n, {self.world.spec.latent_chw})",
                             fix="play in the world that the planner dreams in")
        index, times = acting(len(latents), t, slots, len(self._length))
        self._remember(latents, index, times)
        due = np.array([slot not in self._last or self._last[slot].played >= self.config.every
                        for slot in index.tolist()], bool)
        group = max(1, MAX_ROWS // self.config.n)
        for first in range(0, int(due.sum()), group):
            part = slice(first, first + group)
            self._search(index[due][part], times[due][part])
        for slot in index.tolist():
            plan = self._last[slot]
            self._played[slot] = plan.actions[plan.played]
            plan.played += 1
        return self._played[index].copy()

    def _remember(self, latents_NChw: np.ndarray, index: np.ndarray, times: np.ndarray) -> None:
        """Move the context of these slots on by one frame and the action that led to it."""
        begins = index[times == 0]
        self._episodes[begins] += 1
        self._length[begins] = 0
        for slot in begins.tolist():
            self._last.pop(slot, None)
        for whole, new in ((self._latents, latents_NChw), (self._actions, self._played[index]),
                           (self._null, self._length[index] == 0)):
            whole[index, :-1] = whole[index, 1:]
            whole[index, -1] = new
        self._length[index] = np.minimum(self._length[index] + 1, self.context)

    def _search(self, index: np.ndarray, times: np.ndarray) -> None:
        """Find a plan for each of these slots."""
        config = self.config
        keys = zip(index.tolist(), self._episodes[index].tolist(), times.tolist(), strict=True)
        rngs = [np.random.default_rng([self._seed, *key]) for key in keys]
        now = self._present(index, [int(rng.integers(2**62)) for rng in rngs])
        rounds = now.fork(config.iterations, fresh=True)
        now.release()
        searches = [self._opening(slot) for slot in index.tolist()]
        for number in range(config.iterations):
            start = rounds.select(np.arange(number, rounds.num_slots, config.iterations))
            plans = np.stack([self._drawn(search, rng)
                              for search, rng in zip(searches, rngs, strict=True)])
            score_NM = self._scores(start, plans)
            order = np.argsort(-score_NM, axis=1, kind="stable")
            if self.fit:
                searches = [(law.refit(plans[i, order[i, :config.elites]]), None)
                            for i, (law, _) in enumerate(searches)]
        rounds.release()
        for i, slot in enumerate(index.tolist()):
            law = searches[i][0]
            self._last[slot] = _Plan(law, law.mode() if self.fit else plans[i, order[i, 0]])

    def _present(self, index: np.ndarray, seeds: list[int]) -> Any:
        """The world's state after the frames that these slots have shown."""
        import torch

        from worldgym.state import Starts

        return self.world.begin(Starts(
            torch.from_numpy(self._latents[index]), self._actions[index], self._null[index],
            self._length[index]), seeds, [0] * len(index))

    def _opening(self, slot: int) -> tuple[Choices | Gaussians, np.ndarray | None]:
        """First distribution of a slot's search, and the last plan, one step on, as a candidate."""
        config = self.config
        if slot not in self._last:
            return any_plan(self.action, config.horizon, config.repeat), None
        last = self._last[slot]
        law = last.law.later(config.warm, last.played) if self.fit else last.law
        return law, last.actions[last.played:]

    def _drawn(self, search: tuple[Any, np.ndarray | None], rng: np.random.Generator) -> np.ndarray:
        law, candidate = search
        plans = law.draw(rng, self.config.plans)
        if candidate is not None:
            plans[0, :len(candidate)] = candidate
        return plans

    def _scores(self, start: Any, plans_NMH: np.ndarray) -> np.ndarray:
        """Worth (N, M) of the plans from ``start``, which is released."""
        from worldgym.envs.outcome import end_chances, judge

        (n, m, horizon), futures = plans_NMH.shape[:3], self.config.futures
        if futures == 1:
            state = start.fork(m, fresh=True)
        else:  # all plans meet the same futures, so that luck does not choose between them
            many = start.fork(futures, fresh=True)
            state = many.fork(m)
            many.release()
        start.release()
        actions = np.repeat(plans_NMH, futures, axis=0).reshape(-1, *plans_NMH.shape[2:])
        worth, alive = np.zeros(len(actions)), np.ones(len(actions))
        for step in range(horizon):
            after, chunk = self.world.step(state, actions[:, step])
            state.release()
            state = after
            reward, ended, _ = judge(self.task, chunk, int(self.world.spec.frames_per_chunk))
            worth += self.config.discount**step * alive * reward
            alive *= 1 - end_chances(self.task, chunk, ended)
        state.release()
        return worth.reshape(n, futures, m).mean(1)


def parse_planner(name: str, action: ActionSpec, world: Any = None, task: Any = None) -> Planner:
    """The planner that ``cem:horizon=12,n=64`` or ``shooting:n=64`` describes.

    Args:
        name: the kind, and any of its settings (``KINDS``) as name=value.
        action: the game's actions.
        world: a world, or a function that makes one; its heads say reward and end.
        task: a task, whose reward and end are planned for instead.

    Raises:
        ConfigError: unknown setting, impossible value, no world, or a world of other actions.
    """
    kind, _, rest = name.partition(":")
    types = {f.name: int if f.type == "int" else float for f in fields(PlanConfig)}
    given: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, text = pair.partition("=")
        if key not in KINDS[kind] or key in given:
            raise ConfigError(f"policy {kind} has an unknown or repeated setting", given=pair,
                              expected=f"some of {', '.join(KINDS[kind])}",
                              fix=f"write for instance {kind}:horizon=12,n=64")
        try:
            given[key] = types[key](text)
        except ValueError:
            raise ConfigError(f"policy {kind} has a bad setting", given=pair,
                              expected=f"{key}={types[key].__name__}",
                              fix=f"write for instance {kind}:horizon=12,n=64") from None
    if kind == "shooting":
        given["iterations"] = 1
    config = PlanConfig(**given)
    task = _planned(task, world)
    if task.world.spec.action != action:
        raise ConfigError("the planner's world has other actions", given=task.world.spec.action,
                          expected=action, fix="plan in a world of this game")
    return Planner(task, config, kind == "cem", name)


def _planned(task: Any, world: Any) -> Any:
    """The task itself, or the one that a world's heads make."""
    from worldgym.envs.tasks import Task

    if task is not None:
        return task
    world = world() if callable(world) and not hasattr(world, "encode") else world
    if world is None:
        raise ConfigError("a planner needs its world", given="no world",
                          expected="the world to plan in", fix="pass world=load_task(id).world")
    return Task(world=world, starts=None)
