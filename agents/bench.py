"""``make bench``: speed against the real game, constancy, memory, overhead; all ratios in one run.

What is compared is always measured in turn (A, B, A, B, …), so that a neighbour on the machine
slows both sides alike. Shapes: B slots, n actions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents import results
from worldgym.agents.results import Row
from worldgym.agents.stats import summary
from worldgym.errors import ConfigError

CONSTANCY_SLOTS = 8


def bench(world: str, out: Path | None = None, *, slots: int = 64, seconds: float = 10.0,
          long: int = 2000) -> list[Row]:
    """Measure, print, and (with ``out``) write the results file."""
    from worldgym.agents.games import plain_game
    from worldgym.envs.tasks import load_task

    if slots < 1 or seconds <= 0 or long < 200:
        raise ConfigError("impossible measurement",
                          given=f"{slots} slots, {seconds} s, {long} steps",
                          expected="slots >= 1, seconds > 0, long >= 200", fix="raise the numbers")
    task = load_task(world)
    rows = speed(task, plain_game(task), slots, seconds)
    rows += constancy(task, long)
    rows += wrapper(task, slots, seconds)
    rows += caching(task, slots, seconds)
    for row in rows:
        interval = f"  (95% {row.ci95[0]:.4g} to {row.ci95[1]:.4g})" if row.ci95 else ""
        print(f"{row.metric:24} {row.value:>12.5g} {row.unit}{interval}", flush=True)
    if out is not None:
        print("written:", results.write(out, rows, extra={"threads": _threads()}))
    return rows


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _row(metric: str, value: float, **more: Any) -> Row:
    return Row(what="nano", metric=metric, value=value, **more)


def in_turn(first: Callable[[], float], second: Callable[[], float],
            seconds: float, least: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Call both in turn for ``2 * seconds``; returns what each reported."""
    first(), second()  # warm up
    a: list[float] = []
    b: list[float] = []
    start = time.perf_counter()
    while len(a) < least or time.perf_counter() - start < 2 * seconds:
        a.append(first())
        b.append(second())
    return np.array(a), np.array(b)


def speed(task: Any, make_game: Callable[[], Any], slots: int, seconds: float) -> list[Row]:
    """Dream steps per second with latent observations, over the real game's in one process."""
    from worldgym.envs.sb3 import DreamVecEnv

    env, game = DreamVecEnv(task, slots, observation="latent", frame_stack=4), make_game()
    rng = np.random.default_rng(0)
    spec = task.world.spec.action
    env.seed(0)
    env.reset()
    game.reset(seed=0)

    def dream() -> float:
        actions = [random_actions(spec, rng, slots) for _ in range(4)]
        start = time.perf_counter()
        for action in actions:
            env.step(action)
        return slots * len(actions) / (time.perf_counter() - start)

    def real() -> float:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.3:
            _, _, ended, cut, _ = game.step(game.action_space.sample())
            count += 1
            if ended or cut:
                game.reset()
        return count / (time.perf_counter() - start)

    game.action_space.seed(0)
    dreams, reals = in_turn(dream, real, seconds)
    env.close()
    game.close()
    ratio, d, r = summary(dreams / reals), summary(dreams), summary(reals)
    note = f"{slots} slots, latent observations, frame_stack 4; measured in turn"
    return [
        _row("dream_over_real_steps", ratio.mean, ci95=ratio.ci95, n=ratio.n, unit="ratio",
             note=note),
        _row("dream_steps_per_s", d.mean, ci95=d.ci95, n=d.n, unit="steps/s", note=note),
        _row("real_steps_per_s", r.mean, ci95=r.ci95, n=r.n, unit="steps/s",
             note="the game alone: one process, 160x120, frame_skip 4, resets included"),
    ]


def constancy(task: Any, long: int, pairs: int = 60) -> list[Row]:
    """Time of a step late in an episode over early in it, and memory growth on the way."""
    world, rng = task.world, np.random.default_rng(1)
    state = begin(task, CONSTANCY_SLOTS)
    early: Any = None
    warm = (0, 0)
    for t in range(long):
        if t == 50:
            early = state.snapshot()
        if t == 150:
            warm = (used_bytes(world), rss())
        state, _ = world.step(state, random_actions(world.spec.action, rng, CONSTANCY_SLOTS))
    grown = (used_bytes(world) / max(warm[0], 1) - 1, rss() / warm[1] - 1)
    actions = random_actions(world.spec.action, rng, CONSTANCY_SLOTS)

    def timed(at: Any) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            new, _ = world.step(at, actions)
            spent = time.perf_counter() - start
            new.release()
            return spent
        return once

    late_s, early_s = in_turn(timed(state), timed(early), 0.0, least=pairs)
    bytes_now = used_bytes(world)
    early.release()
    state.release()
    note = f"{CONSTANCY_SLOTS} slots; steps from saved states, measured in turn; medians"
    return [
        _row("step2000_over_step50", float(np.median(late_s) / np.median(early_s)), n=pairs,
             unit="ratio", note=note if long == 2000 else f"step {long} for 2000; {note}"),
        _row("step50_ms", 1e3 * float(np.median(early_s)), n=pairs, unit="ms", note=note),
        _row("step2000_ms", 1e3 * float(np.median(late_s)), n=pairs, unit="ms", note=note),
        _row("memory_growth", max(*grown, 0.0), unit="share",
             note=f"step 150 to {long}: larger of pages in use ({grown[0]:+.4f}) and resident "
             f"memory ({grown[1]:+.4f})"),
        _row("pool_mib", bytes_now / 2**20, unit="MiB", note="pages in use"),
    ]


class Timed:
    """A world that adds up the time spent in it."""

    def __init__(self, world: Any) -> None:
        self._world, self.spent = world, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return getattr(self._world, name)(*args, **kwargs)
        finally:
            self.spent += time.perf_counter() - start

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        """``World.begin``."""
        return self._call("begin", *args, **kwargs)

    def restart(self, *args: Any, **kwargs: Any) -> Any:
        """``World.restart``."""
        return self._call("restart", *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """``World.step``."""
        return self._call("step", *args, **kwargs)


def wrapper(task: Any, slots: int, seconds: float) -> list[Row]:
    """Share of an env step that is spent outside the world."""
    from worldgym.envs.sb3 import DreamVecEnv

    world = Timed(task.world)
    env = DreamVecEnv(replace(task, world=world), slots, observation="latent", frame_stack=4)
    rng, spec = np.random.default_rng(2), task.world.spec.action
    env.seed(0)
    env.reset()
    shares: list[float] = []
    start = time.perf_counter()
    while len(shares) < 8 or time.perf_counter() - start < seconds:
        actions, world.spent, begun = random_actions(spec, rng, slots), 0.0, time.perf_counter()
        env.step(actions)
        shares.append(1 - world.spent / (time.perf_counter() - begun))
    env.close()
    s = summary(shares[1:])
    return [_row("wrapper_share", s.mean, ci95=s.ci95, n=s.n, unit="share",
                 note=f"time in DreamVecEnv.step outside World, {slots} slots, latent, stack 4")]


def caching(task: Any, slots: int, seconds: float) -> list[Row]:
    """Speed of stepping from the cache over stepping without one, and over refilling one."""
    world = task.world
    state, window, action = _filled(task, slots)

    def cached() -> None:
        new, _ = world.step(state, action)
        new.release()

    def recomputed() -> None:
        recompute_step(world, window, action, state.keys_B4)

    def refilled() -> None:
        old = world.begin(window, [0] * slots)
        new, _ = world.step(old, action)
        old.release()
        new.release()

    passes, frames = len(world.schedule.timesteps), int(world.spec.context_frames) + 1
    against = {
        "cached_over_recomputed": (recomputed, f"step from the cache against the same {passes} "
                                   f"passes without a cache, each over {frames} frames"),
        "cached_over_refilled": (refilled, "step from the cache against a step that first fills "
                                 f"the cache anew from {frames - 1} frames")}
    rows = []
    for metric, (other, note) in against.items():
        slow, fast = in_turn(_timed(other), _timed(cached), seconds / 2)
        rows.append(_row(metric, float(np.median(slow) / np.median(fast)), n=len(slow),
                         unit="ratio", note=f"{note}; {slots} slots; medians, in turn"))
    state.release()
    return rows


def _timed(call: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def _filled(task: Any, slots: int) -> tuple[Any, Any, np.ndarray]:
    """A state with a full window, the window's frames as ``Starts``, and the next actions."""
    import torch

    from worldgym.state import Starts

    world, rng = task.world, np.random.default_rng(3)
    spec, context = world.spec.action, int(world.spec.context_frames)
    state = begin(task, slots)
    latents, actions = [state.latents_BCHW], [random_actions(spec, rng, slots)]
    for _ in range(context + 2):
        actions.append(random_actions(spec, rng, slots))
        state, _ = world.step(state, actions[-1])
        latents.append(state.latents_BCHW)
    window = Starts(torch.stack(latents[-context:], 1), np.stack(actions[-context:], 1),
                    np.zeros((slots, context), bool), np.full(slots, context))
    return state, window, actions[-1]


def recompute_step(world: Any, window: Any, action: np.ndarray, keys_B4: np.ndarray) -> Any:
    """The next latents (B, C, h, w) without any cache: every pass computes the whole window.

    ``window``: the last K frames as full ``Starts``; ``keys_B4``: whose noise.
    """
    import torch

    from worldgym.models.dynamics import before
    from worldgym.models.wan import causal_frame_mask, masked
    from worldgym.rollout import Block, WholeWindow, few_step

    spec, network = world.spec, world.dynamics
    b, k = window.latents_BKChw.shape[:2]
    past = window.latents_BKChw.transpose(1, 2)

    def noise(number: int) -> Any:
        return world.noise(keys_B4, number)

    with torch.no_grad():
        flat = np.concatenate([window.actions, action[:, None]], 1).reshape(
            b * (k + 1), *spec.action.shape)
        features = torch.from_numpy(spec.action.encode(flat, None)).to(world.device)
        cond = network.condition(features).unflatten(0, (b, k + 1))
        recent = before(torch.nn.functional.pad(past, (0, 0, 0, 0, 0, 1)), network.cfg.recent)
        index = np.broadcast_to(np.arange(k + 1), (b, k + 1)).copy()
        mask = causal_frame_mask(torch.arange(k + 1), k + 1)
        stepper = WholeWindow(network.network, past, world.context_t,
                              Block(index, {"cond_BFD": cond, "recent_BRFhw": recent}),
                              masked(mask, world.pool.spec.tokens))
        return few_step(stepper, noise(0), world.schedule, noise, None, None)[:, :, 0]


def begin(task: Any, slots: int) -> Any:
    """A state of ``slots`` slots at the task's starts."""
    index = task.starts.sample(list(range(slots)), [0] * slots)
    return task.world.begin(task.starts.gather(index), list(range(slots)))


def random_actions(spec: Any, rng: np.random.Generator, n: int) -> np.ndarray:
    """Random legal actions (n, *shape)."""
    from worldgym.agents.policy import sample_action

    return np.asarray([sample_action(spec, rng) for _ in range(n)], spec.dtype).reshape(
        n, *spec.shape)


def used_bytes(world: Any) -> int:
    """Bytes of the pages in use."""
    stats = world.pool.stats()
    total = stats["pages_used"] + stats["pages_free"]
    return int(stats["bytes"] * stats["pages_used"] / max(total, 1))


def rss() -> int:
    """Resident memory of this process in bytes."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
