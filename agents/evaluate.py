"""Play many policies on the same starts and noise, resumably, and say what tells them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from worldgym.actions import ActionSpec
from worldgym.agents import results, sequential
from worldgym.agents.course import Course, check_count
from worldgym.agents.evaluation import Evaluation
from worldgym.agents.games import game_maker, unit
from worldgym.agents.ladder import expand, named
from worldgym.agents.ledger import Ledger, fingerprint
from worldgym.agents.policy import Policy
from worldgym.agents.score import (
    REAL_SEEDS,
    Played,
    check_horizon,
    dream_block,
    opened,
    real_block,
)
from worldgym.agents.scripted import parse_policy
from worldgym.errors import ConfigError

SLOTS = 96  # dream slots in one batch; more is hardly faster on a CPU, and loses more to a kill


def evaluate(world: str | Path | Any, policies: Sequence[str] | Mapping[str, str | Policy], *,
             episodes: int = 50, real: bool = False, until_separated: bool = False,
             out: str | Path | None = None, seed: int = REAL_SEEDS, slots: int = SLOTS,
             games: int = 8, horizon: int | None = None, alpha: float = 0.05, draw: bool = False,
             anywhere: bool = False, anchor: int | None = None, expected: bool = False,
             end: str | None = None, progress: bool = True) -> Evaluation:
    """Score policies in the dream, and with ``real`` in the real twin too.

    Episode e of every policy begins in the same state and meets the same noise. Finished blocks of
    episodes go to ``out``; the same call goes on where a killed one was, and its numbers are those
    of a call that nobody killed. ``real`` may be added to a folder later.

    Args:
        world: id, folder, or a ``Task``.
        policies: names (``parse_policy``), ``name=policy``, or ``ladder``; or a mapping to them.
        episodes: episodes of each policy; with ``until_separated`` the most there may be.
        until_separated: stop as soon as every pair differs (``worldgym.agents.sequential``).
        out: folder for blocks and results; default: under ``runs``, named after the settings.
        seed: first seed of the episodes.
        slots, games: dream slots in one batch, real games in lockstep.
        horizon: steps after which a dreamt episode is cut; default: the world's.
        alpha: chance that ``until_separated`` tells any equal pair apart.
        draw: draw actions from trained policies instead of taking the most probable one.
        anywhere: begin at recorded moments anywhere in episodes. With a short ``horizon`` policies
            share most of their luck, and far fewer episodes part them.
        anchor, expected: see ``Course``; end: "head" or "danger" (``Task``). With anchor and danger
            a dream's faults neither add up nor pay, also for policies that learned in the dream.

    Raises:
        ConfigError: no policy, two of one name, one that does not fit this world, no real twin,
            ``real`` with ``anywhere``, a folder begun with other settings. CheckpointError: an
            agent file is missing.
    """
    _check_numbers(episodes, slots, games, real and anywhere)
    task, course = _task(world, horizon, end), Course(anywhere, anchor, expected)
    cast = _cast(policies, task, draw)
    maker = game_maker(task) if real else None
    width, error = max(1, slots // len(cast)), alpha if until_separated else None
    looks = _looks(episodes, error, len(cast))
    settings = _settings(task, cast, seed, episodes, width, draw, error, course)
    ledger = Ledger(out or _default_out(settings), settings)
    run = _Run(task, cast, ledger, range(seed, seed + episodes), maker, games, course, progress)
    played, verdict = run.play(looks, width, error)
    found = Evaluation(str(task.name), {n: a.source for n, a in cast.items()}, played, episodes,
                       unit(task), task.horizon, looks, verdict,
                       frozenset(n for n, a in cast.items() if a.dreamt), course,
                       task.end == "danger", folder=ledger.folder)
    _write(found, ledger.folder)
    return found


def _check_numbers(episodes: int, slots: int, games: int, middle: bool) -> None:
    for value, what in ((episodes, "episodes"), (slots, "slots"), (games, "games")):
        check_count(value, what)
    if middle:
        raise ConfigError("a real game cannot begin in the middle", given="real and anywhere",
                          expected="one of the two", fix="leave out --anywhere to compare with the "
                          "real game")


def _looks(episodes: int, alpha: float | None, policies: int) -> tuple[int, ...]:
    """Episode counts at which to test; without a test only the last one."""
    if alpha is None:
        return (episodes,)
    if policies < 2:
        raise ConfigError("nothing to separate", given=f"{policies} policy",
                          expected="two policies or more", fix="leave out --until-separated")
    looks = sequential.look_points(episodes)
    sequential.boundaries(looks, alpha)  # refuses an impossible alpha before anything is played
    return looks


@dataclass(frozen=True)
class _Actor:
    policy: Policy
    source: str
    hash: str
    dreamt: bool = False  # learned in a dream


@dataclass(frozen=True)
class _Run:
    task: Any
    cast: Mapping[str, _Actor]
    ledger: Ledger
    seeds: range
    maker: Any
    games: int
    course: Course
    progress: bool

    def play(self, looks: Sequence[int], width: int,
             alpha: float | None) -> tuple[dict[str, dict[str, Played]],
                                           sequential.Verdict | None]:
        """Every block up to the last look, or to the look at which all pairs are separated."""
        places = ("dream", "real") if self.maker else ("dream",)
        parts: dict[str, list[list[Played]]] = {place: [] for place in places}
        verdict = None
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(
                total=len(self.cast) * len(places) * len(self.seeds), unit=" episodes",
                disable=not self.progress))
            envs: list[Any] = []
            for block in blocks(looks, width):
                for place in places:
                    done = self._read(place, block)
                    if done is not None:
                        bar.update(len(self.cast) * len(block))
                    else:
                        if place == "real" and not envs:
                            envs = stack.enter_context(
                                opened(self.maker, min(self.games, width, len(self.seeds))))
                        done = self._play(place, block, envs, bar)
                    parts[place].append(done)
                if alpha is not None and block.stop in looks:
                    returns = np.stack([p.returns for p in _joined(parts["dream"])])
                    verdict = sequential.judge(returns, looks, alpha)
                    if verdict.stop:
                        break
        joined = {place: _joined(parts[place]) for place in places}
        return {name: {place: joined[place][k] for place in places}
                for k, name in enumerate(self.cast)}, verdict

    def _read(self, place: str, block: range) -> list[Played] | None:
        return self.ledger.read(place, block, [a.source for a in self.cast.values()], self.seeds)

    def _play(self, place: str, block: range, envs: list[Any], bar: Any) -> list[Played]:
        bar.set_description(f"{place} {block.start}-{block.stop - 1}")
        actors, seed = list(self.cast.values()), self.seeds[0]
        if place == "dream":
            done = dream_block(self.task, [a.policy for a in actors], block, self.seeds, seed,
                               bar.update, self.course)
        else:
            done = [real_block(envs, a.policy, block, self.seeds, seed, bar.update)
                    for a in actors]
        done = [replace(p, policy=a.source) for p, a in zip(done, actors, strict=True)]
        self.ledger.write(place, block, done)
        return done


def blocks(looks: Sequence[int], width: int) -> Iterator[range]:
    """Episode numbers in blocks of at most ``width``, with an edge at every look.

    The same blocks are played after an interruption, in the same batch, so that even a machine
    whose sums depend on the batch size repeats every digit.

    >>> list(blocks((5, 8), 4))
    [range(0, 4), range(4, 5), range(5, 8)]
    """
    for first, last in zip((0, *looks), looks, strict=False):
        for start in range(first, last, width):
            yield range(start, min(start + width, last))


def _joined(parts: Sequence[Sequence[Played]]) -> list[Played]:
    return [Played.join(list(of_one)) for of_one in zip(*parts, strict=True)]


def _task(world: Any, horizon: int | None, end: str | None) -> Any:
    from worldgym.envs.tasks import load_task

    given: dict[str, Any] = {"horizon": horizon, "end": end}
    changes = {name: value for name, value in given.items() if value is not None}
    found = load_task(world, **changes) if isinstance(world, str | Path) else replace(
        world, **changes)
    check_horizon(found)
    return found


def _cast(policies: Sequence[str] | Mapping[str, str | Policy], task: Any,
          draw: bool) -> dict[str, _Actor]:
    spec = task.world.spec
    if isinstance(policies, str):
        policies = [policies]
    if not isinstance(policies, Mapping) or not policies:
        policies = named(expand(tuple(policies), spec))
    cast: dict[str, _Actor] = {}
    for name, source in policies.items():
        if isinstance(source, str):
            policy, text = parse_policy(source, spec.action, task.world, task), source
        else:
            policy, text = source, f"{type(source).__module__}.{type(source).__qualname__}"
        if any(policy is actor.policy for actor in cast.values()):
            raise ConfigError("one policy object under two names", given=name,
                              expected="an object of its own for every name",
                              fix="make a second one; policies remember their episodes")
        _check_fit(name, policy, spec)
        if draw and hasattr(policy, "deterministic"):
            policy.deterministic = False
        cast[name] = _Actor(policy, text, fingerprint(text) if isinstance(source, str) else "",
                            _facts(policy).get("where") == "dream")
    return cast


def _check_fit(name: str, policy: Policy, spec: Any) -> None:
    """Refuse an agent that was trained for other actions or other frames."""
    facts = _facts(policy)
    if not facts:
        return
    action, frame_hw = ActionSpec.from_json(facts["action"]), tuple(facts["frame_hw"])
    if action != spec.action or frame_hw != tuple(spec.frame_hw):
        raise ConfigError(f"policy {name} was trained for another world",
                          given=f"{action}, frames {frame_hw}",
                          expected=f"{spec.action}, frames {tuple(spec.frame_hw)}",
                          fix="give the world it was trained in as --world, or another agent")


def _facts(policy: Policy) -> Mapping[str, Any]:
    """What an agent file says of its training, also beneath a ``noisy:``; empty for others."""
    return getattr(getattr(policy, "player", policy), "facts", None) or {}


def _settings(task: Any, cast: Mapping[str, _Actor], seed: int, episodes: int, width: int,
              draw: bool, alpha: float | None, course: Course) -> dict[str, Any]:
    """Everything the numbers depend on; how many real games run in lockstep is not among it."""
    return {
        "format": 1, "world": str(task.name), "fingerprint": task.world.fingerprint,
        "horizon": task.horizon, "twin": task.twin, "starts": repr(task.starts),
        **{key: value if isinstance(value, str) else value.__qualname__
           for key, value in (("reward", task.reward), ("end", task.end))},
        "policies": [[name, actor.source, actor.hash] for name, actor in cast.items()],
        "seed": seed, "episodes": episodes, "width": width, "draw": draw, "alpha": alpha,
        **course.settings()}


def _default_out(settings: Mapping[str, Any]) -> Path:
    """A folder of its own for every set of settings, so that the same call finds it again."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"evaluate-{key}"


def _write(found: Evaluation, folder: Path) -> None:
    text = json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n"
    results.write(folder / "results.json", found.rows(), merge=False)
    if found.real:
        from worldgym.agents.calibration import calibration_plot, drift_plot

        calibration_plot(found, folder / "calibration.png")
        drift_plot(found, folder / "drift.png")
    results.atomic_text(folder / "evaluation.json", text)
