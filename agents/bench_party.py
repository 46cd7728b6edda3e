"""``worldgym bench party``: what players cost, and joint steps a second beside the real game's.

What is compared is measured in turn. Shapes: B slots, P players.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents import results
from worldgym.agents.bench import in_turn
from worldgym.agents.results import Row
from worldgym.agents.stats import summary
from worldgym.errors import ConfigError

OUT = Path("results/party_bench.json")
GAME = "commons_harvest"  # has starts of 2 to 7 players on one map
PLAYERS_SLOTS, SPEED_SLOTS = 8, 32
STEPS = 4  # of one measurement


def bench(world: str, out: Path | None = None, seconds: float = 10.0) -> list[Row]:
    """Measure, print, write the results file."""
    import torch

    from worldgym.envs.party_tasks import load_party

    if seconds <= 0:
        raise ConfigError("impossible measurement", given=f"{seconds} s", expected="above 0",
                          fix="raise --seconds")
    task = load_party(world)
    rows = players(task, seconds) + speed(task, seconds)
    for row in rows:
        low, high = row.ci95 or (row.value, row.value)
        print(f"{row.metric:24} {row.value:>12.5g} {row.unit} (95% {low:.4g} to {high:.4g})",
              flush=True)
    print("written:", results.write(out or OUT, rows, extra={"threads": torch.get_num_threads()}))
    return rows


def _dream(task: Any, count: int, slots: int) -> Callable[[], float]:
    """Seconds of a joint step of ``slots`` games of ``count`` players, drawn frames included."""
    from worldgym.envs.party_core import PartyCore

    core = PartyCore(task, GAME, count, slots)
    core.reset(seeds=list(range(slots)))
    rng = np.random.default_rng(0)

    def once() -> float:
        joint = [rng.integers(0, 8, (slots, core.players)) for _ in range(STEPS)]
        start = time.perf_counter()
        for actions in joint:
            core.step(actions, "NextStep")
            core.observe()
        return (time.perf_counter() - start) / STEPS

    return once


def players(task: Any, seconds: float) -> list[Row]:
    """Time of a step with seven players over that with two, of the same game and frame."""
    seven, two = in_turn(_dream(task, 7, PLAYERS_SLOTS), _dream(task, 2, PLAYERS_SLOTS), seconds)
    ratio = summary(seven / two)
    return [Row(what="nano", metric="seven_over_two_players", value=ratio.mean, ci95=ratio.ci95,
                n=ratio.n, unit="ratio", note=f"{GAME}, {PLAYERS_SLOTS} slots, frames drawn; in "
                "turn, one thread")]


def speed(task: Any, seconds: float, count: int = 7) -> list[Row]:
    """Joint steps a second of 32 dreams, and of the real substrate in one process."""
    from worldgym.envs.meltingpot import MeltingPotEnv

    dream, env = _dream(task, count, SPEED_SLOTS), MeltingPotEnv(GAME, count, cell_px=4)
    rng = np.random.default_rng(1)
    env.reset()

    def real() -> float:
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.3:
            env.step({a: int(rng.integers(8)) for a in env.agents})
            steps += 1
            if not env.agents:
                env.reset()
        return steps / (time.perf_counter() - start)

    dreams, reals = in_turn(lambda: SPEED_SLOTS / dream(), real, seconds)
    env.close()
    note = (f"{GAME}, {count} players; the dream in {SPEED_SLOTS} slots with drawn frames, Melting "
            "Pot in one process with 32 x 40 frames, resets included; in turn, one thread")
    rows = []
    for metric, values, unit in (("dream_over_real_steps", dreams / reals, "ratio"),
                                 ("dream_joint_steps_per_s", dreams, "steps/s"),
                                 ("real_joint_steps_per_s", reals, "steps/s")):
        s = summary(values)
        rows.append(Row(what="nano", metric=metric, value=s.mean, ci95=s.ci95, n=s.n, unit=unit,
                        note=note))
    return rows
