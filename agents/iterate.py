"""Rounds of collect, refit, retrain: the agent shows the world model what it gets wrong.

Every step played in the real game is counted, scoring aside; what a result cost in real steps is
part of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worldgym.agents import results
from worldgym.agents.train import TrainConfig, Trained, train_in_dream
from worldgym.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Round:
    """What one round made and cost."""

    number: int
    world: Path
    agent: Path
    real_steps: int  # steps recorded in this round
    real_steps_total: int  # steps in the recordings the world was fitted to


def iterate(
    *,
    rounds: int,
    world: str | Path,
    data: Path,
    out: Path,
    collect: Callable[[Path, Path | None, str | Path, int], int],
    fit: Callable[[Path, Path, str | Path], Path],
    load: Callable[[Path], Any],
    config: TrainConfig,
    train: Callable[[Any, TrainConfig, Path], Trained] = train_in_dream,
    agent: Path | None = None,
) -> list[Round]:
    """Run ``rounds`` rounds; one that ``out/iterate.json`` knows already is taken as it is.

    Args:
        world: the world to begin with.
        data: recordings that grow from round to round.
        out: gets ``round-1/world`` and ``round-1/agent``, and so on.
        collect: ``(data, agent or None, world, round) -> total steps in data``; adds recordings.
        fit: ``(data, new world folder, old world) -> new world folder``.
        load: world folder -> task.
        config: one training; the seed goes up with every round.
        agent: the agent that plays in the first round; None: scripted policies only.
    """
    if rounds < 1:
        raise ConfigError("impossible number of rounds", given=rounds, expected="1 or more",
                          fix="pass --rounds 1")
    done = _noted(out)[:rounds]
    if done:
        world, agent = done[-1].world, done[-1].agent
    total = _steps(data)
    for number in range(len(done) + 1, rounds + 1):
        folder = out / f"round-{number}"
        before = total
        if not (folder / "world" / "world.json").is_file():
            total = collect(data, agent, world, number)
            fit(data, folder / "world", world)
        world = folder / "world"
        init = str(done[-1].agent) if done else config.init  # it learns on from the last round
        trained = train(load(world), replace(config, seed=config.seed + number, init=init),
                        folder / "agent")
        agent = trained.agent
        done.append(Round(number, Path(world), agent, total - before, total))
        _note(out, done)
    return done


def _steps(data: Path) -> int:
    from worldgym.data.store import Episodes

    return Episodes.open(data).steps if (data / "index.json").is_file() else 0


def _noted(out: Path) -> list[Round]:
    """The rounds that an earlier call finished, with what they cost."""
    path = out / "iterate.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())["rounds"]
        done = [Round(r["round"], Path(r["world"]), Path(r["agent"]), r["real_steps"],
                      r["real_steps_total"]) for r in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("iterate.json is broken", given=path,
                              expected="what an earlier call wrote",
                              fix="use another folder") from error
    return [r for r in done if r.agent.is_file()]


def _note(out: Path, done: list[Round]) -> None:
    text = json.dumps({"about": results.about(), "rounds": [
        {"round": r.number, "world": str(r.world), "agent": str(r.agent),
         "real_steps": r.real_steps, "real_steps_total": r.real_steps_total} for r in done]},
        indent=1)
    results.atomic_text(out / "iterate.json", text + "\n")


def from_command(command: Any, fit_settings: dict[str, Any]) -> list[Round]:
    """``worldgym iterate``: the functions that ``iterate`` needs, made from the command line."""
    from worldgym.agents.games import record, remember_task
    from worldgym.data.store import Episodes
    from worldgym.envs.tasks import load_task, place
    from worldgym.train.fit import FitConfig, fit

    env = command.world
    first = load_task(command.world)
    folder = place(env)

    def collect(data: Path, agent: Path | None, world: str | Path, number: int) -> int:
        players = ("sticky:0.2", "sticky:0.5") if agent is None else (
            f"{agent}@3", "sticky:0.2")
        have = Episodes.open(data)
        print(record(first.twin or env, data, have.steps + command.real_steps, players,
                     seed=have.env.get("record_seed", 0), frame_hw=first.world.spec.frame_hw,
                     world=str(world)))
        return _steps(data)

    def refit(data: Path, new: Path, old: str | Path) -> Path:
        folder = fit(FitConfig(**{"data": str(data), "out": str(new), "init": str(old),
                                  "seed": command.seed, **fit_settings}))
        remember_task(data, folder)
        return folder

    rounds = iterate(
        rounds=command.rounds, world=folder, data=command.data, out=command.out, collect=collect,
        fit=refit, load=lambda f: load_task(f, twin=first.twin, horizon=first.horizon),
        config=TrainConfig(steps=command.steps, seed=command.seed))
    print(f"{rounds[-1].real_steps_total} real steps in all; last agent {rounds[-1].agent}")
    return rounds
