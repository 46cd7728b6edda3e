"""What an evaluation found: values, pairs, agreement of dream and real game, drift; as JSON, rows.

Shapes: K policies, N episodes, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents import agreement, results, stats
from worldgym.agents.agreement import Figure
from worldgym.agents.course import WHOLE_LIVES, Course
from worldgym.agents.score import Played, optimism, seed_text
from worldgym.agents.sequential import Verdict, repeated_interval
from worldgym.agents.stats import Summary, difference, summary

DRIFT_POINTS = 12


@dataclass(frozen=True, slots=True)
class Pair:
    """``first`` minus ``second`` in one place; ``needed``: episodes to separate them, each.

    ``separated``: the sequential test told them apart; None where there was no such test.
    """

    first: str
    second: str
    place: str
    difference: float
    ci95: tuple[float, float] | None
    needed: int | None
    needed_unpaired: int | None
    separated: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """The pair as plain data."""
        return {"first": self.first, "second": self.second, "place": self.place,
                "difference": self.difference, "ci95": self.ci95, "paired": True,
                "episodes_needed": self.needed, "episodes_needed_unpaired": self.needed_unpaired,
                "separated": self.separated}


@dataclass(frozen=True)
class Evaluation:
    """Several policies on the same starts and noise, in the dream and perhaps in the real game.

    ``played``: name -> place -> episodes, equally many for all policies; ``sources``: name -> what
    made the policy; ``planned``: the most episodes there might be; ``horizon``: of the dream, in
    steps; ``looks`` and ``verdict``: of the sequential test, if there was one;
    ``dreamers``: policies that learned in a dream; ``course``: where dreams began and
    went on; ``by_danger``: they ended by danger (``Task.end``); ``folder``: where it is written.
    """

    world: str
    sources: Mapping[str, str]
    played: Mapping[str, Mapping[str, Played]]
    planned: int
    unit: str = ""
    horizon: int | None = None
    looks: tuple[int, ...] = ()
    verdict: Verdict | None = None
    dreamers: frozenset[str] = frozenset()
    course: Course = WHOLE_LIVES
    by_danger: bool = False
    about: Mapping[str, Any] = field(default_factory=results.about)
    folder: Path | None = None

    @property
    def names(self) -> list[str]:
        """The policies, in the order given."""
        return list(self.played)

    @cached_property
    def episodes(self) -> int:
        """Episodes of each policy in each place."""
        return len(self.played[self.names[0]]["dream"].seeds)

    @property
    def real(self) -> bool:
        """Whether the real game was played too."""
        return "real" in self.played[self.names[0]]

    def returns(self, place: str) -> np.ndarray:
        """Returns (K, N) of all policies."""
        return np.stack([self.played[name][place].returns for name in self.names])

    @cached_property
    def summaries(self) -> dict[tuple[str, str], Summary]:
        """(name, place) -> mean and interval."""
        return {(name, place): p.summary for name, at in self.played.items()
                for place, p in at.items()}

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair in every place."""
        return [self._pair(i, j, place) for place in self.played[self.names[0]]
                for i, j in combinations(range(len(self.names)), 2)]

    def _pair(self, i: int, j: int, place: str) -> Pair:
        first, second = self.names[i], self.names[j]
        a, b = (self.played[name][place].returns for name in (first, second))
        gap, separated = difference(a, b, paired=True), None
        interval: tuple[float, float] | None = gap.ci95
        if self.verdict is not None and place == "dream":
            interval = repeated_interval(a - b, self.looks, self.verdict.look)
            order = list(combinations(range(len(self.names)), 2))
            separated = bool(self.verdict.separated_P[order.index((min(i, j), max(i, j)))])
        return Pair(first, second, place, gap.mean, interval if self.episodes > 1 else None,
                    stats.episodes_needed(a, b), stats.episodes_needed(a, b, paired=False),
                    separated)

    @cached_property
    def neighbours(self) -> list[Pair]:
        """Pairs of policies that follow each other in dream return, the better one first."""
        order = np.argsort(-self.returns("dream").mean(1), kind="stable")
        return [self._pair(i, j, "dream") for i, j in zip(order, order[1:], strict=False)]

    @cached_property
    def agreement(self) -> dict[str, Figure | None] | None:
        """Agreement of dream and real values; None where the real game was not played."""
        if not self.real:
            return None
        return agreement.agreement(self.returns("dream"), self.returns("real"))

    @cached_property
    def outsiders(self) -> list[str]:
        """Policies that did not learn in a dream: it has not taught them its own faults."""
        return [name for name in self.names if name not in self.dreamers]

    @cached_property
    def agreement_outside(self) -> dict[str, Figure | None] | None:
        """The agreement over ``outsiders``; None where these are all policies, or too few."""
        if not self.real or not self.dreamers or len(self.outsiders) < 3:
            return None
        rows = [self.names.index(name) for name in self.outsiders]
        return agreement.agreement(self.returns("dream")[rows], self.returns("real")[rows])

    @cached_property
    def optimism(self) -> dict[str, Summary]:
        """Dream minus real return of every policy (not paired: these are different games)."""
        return {name: optimism(at["dream"], at["real"]) for name, at in self.played.items()
                if "real" in at}

    @cached_property
    def paired_ratio(self) -> Figure | None:
        """Episodes needed when paired over those needed when not, between dream neighbours.

        Where ends count by their chance, the unpaired episodes are plain ones, with ends drawn.
        """
        drawn = [at["dream"].drawn for at in self.played.values()]
        told = [d for d in drawn if d is not None]
        plain = np.stack(told) if len(told) == len(drawn) else None
        return agreement.paired_ratio(self.returns("dream"), plain)

    @cached_property
    def drift(self) -> list[dict[str, Any]] | None:
        """Mean return within the first steps, dream and real, over all policies."""
        if not self.real:
            return None
        longest = max(int(p.lengths.max()) for at in self.played.values() for p in at.values())
        points = np.unique(np.geomspace(1, longest, DRIFT_POINTS).round().astype(int))
        sums = {place: self._collected(place, points) for place in ("dream", "real")}
        table = []
        for s, step in enumerate(points):
            line: dict[str, Any] = {"step": int(step)}
            for place in ("dream", "real"):
                mean = summary(sums[place][s])
                line |= {place: mean.mean, f"{place}_ci95": self._known(mean)}
            table.append(line)
        return table

    def _collected(self, place: str, points: np.ndarray) -> np.ndarray:
        """(S, N): return within the first steps of each episode, mean over policies."""
        total = np.zeros((len(points), self.episodes))
        for at in self.played.values():
            for e, rewards in enumerate(at[place].rewards):
                total[:, e] += np.cumsum(rewards)[np.minimum(points, len(rewards)) - 1]
        return total / len(self.played)

    def _known(self, value: Summary) -> tuple[float, float] | None:
        return value.ci95 if value.n > 1 else None

    # -- files -------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data; numbers in six digits, what is undefined is null."""
        ratio, table = self.paired_ratio, self.agreement
        return tidy({
            "about": self.about, "world": self.world, "unit": self.unit,
            "episodes": self.episodes, "planned_episodes": self.planned,
            "policies": [self._policy(name) for name in self.names],
            "pairs": [pair.to_json() for pair in self.pairs],
            "agreement": figures(table), "agreement_outside": figures(self.agreement_outside),
            "paired_episode_ratio": None if ratio is None else ratio.to_json(),
            "drift": self.drift, "sequential": self._sequential(), "notes": self.notes})

    def _policy(self, name: str) -> dict[str, Any]:
        at = self.played[name]
        gap = self.optimism.get(name)
        return {"name": name, "source": self.sources[name],
                "learned_in_dream": name in self.dreamers, "dream": self._place(name, "dream"),
                "real": self._place(name, "real") if "real" in at else None,
                "optimism": None if gap is None else {"value": gap.mean, "ci95": self._known(gap)}}

    def _place(self, name: str, place: str) -> dict[str, Any]:
        s, played = self.summaries[name, place], self.played[name][place]
        return {"mean": s.mean, "sd": s.sd, "ci95": self._known(s), "n": s.n,
                "truncated": played.cut,
                "mean_length": float(played.lengths.mean())}

    def _sequential(self) -> dict[str, Any] | None:
        if self.verdict is None:
            return None
        return {"looks": list(self.looks), "stopped_at": self.verdict.episodes,
                "pairs_separated": int(self.verdict.separated_P.sum()),
                "pairs": len(self.verdict.separated_P)}

    def rows(self) -> list[results.Row]:
        """Lines for a results file; what is undefined has no line."""
        seeds = seed_text(self.played[self.names[0]]["dream"].seeds)
        groups: list[tuple[str, list[str], dict[str, Figure | None]]] = [
            ("ladder", self.names,
             {**(self.agreement or {}), "paired_episode_ratio": self.paired_ratio})]
        if self.agreement_outside is not None:
            groups.append(("ladder-outside", self.outsiders, self.agreement_outside))
        found = []
        for what, names, told in groups:
            found.append(results.Row(what=what, metric="policies", value=len(names), n=len(names),
                                     seeds=seeds))
            for metric, figure in told.items():
                if figure is not None:
                    unit = self.unit if metric in ("mmrv", "optimism") else ""
                    method = stats.METHOD if metric == "optimism" else agreement.METHOD
                    found.append(results.Row(
                        what=what, metric=metric, value=figure.value, ci95=figure.ci95,
                        n=self.episodes, unit=unit, seeds=seeds, note=method))
        return found + [self.played[name][place].row(name, self.unit) for name in self.names
                        for place in ("real", "dream") if place in self.played[name]]

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        said = []
        if self.course.anywhere:
            said.append("Episodes begin at recorded moments anywhere in an episode: a value is "
                        f"what the next {self.horizon} steps bring, not a whole episode.")
        if self.course.anchor:
            said.append(f"Every {self.course.anchor} steps the dream went on from a recorded "
                        "moment of the same age.")
        if self.course.expected:
            said.append("Ends in the dream count by their chance and are not drawn; paired over "
                        "unpaired episodes compares with plain ones, whose ends are drawn.")
        if self.by_danger:
            said.append("Dreams ended by the danger that recorded play knew of, whatever the dream "
                        "made of it.")
        if self.episodes == 1:
            said.append("One episode per policy: there are no intervals.")
        elif self.episodes < stats.FEW:
            said.append(f"Fewer than {stats.FEW} episodes: intervals of means are Student's t; "
                        "agreement has none.")
        for place in self.played[self.names[0]]:
            where = "real game" if place == "real" else place
            cut = [n for n in self.names if self.played[n][place].cut == self.episodes]
            flat = [n for n in self.names if n not in cut and self.summaries[n, place].sd == 0]
            if cut:
                said.append(f"In the {where} every episode was cut before its end for "
                            f"{', '.join(cut)}: the value is what it earned until then.")
            if flat and self.episodes > 1:
                said.append(f"In the {where} all {self.episodes} returns are equal for "
                            f"{', '.join(flat)}: an interval of no width is no proof.")
        if self.real and self.horizon is not None:
            longest = max(int(at["real"].lengths.max()) for at in self.played.values())
            if longest > self.horizon:
                said.append(f"Dreamt episodes are cut at {self.horizon} steps, real ones lasted "
                            f"up to {longest}: part of dream - real is this cut.")
        undefined = [k for k, v in (self.agreement or {}).items() if v is None]
        if undefined:
            said.append(f"Undefined: {', '.join(undefined)} (needs three policies, and values "
                        "that are not all equal).")
        if self.real:
            said.append("Dream and real episodes are different games, so dream - real is not "
                        "paired; policies are paired with each other within each place.")
        if self.verdict is not None and self.verdict.episodes < self.planned:
            said.append("Stopped early: intervals of pairs in the dream hold all the same "
                        "(repeated confidence intervals); those of single values and of the "
                        "agreement are as if the number of episodes had been fixed.")
        return said


def figures(table: Mapping[str, Figure | None] | None) -> dict[str, Any] | None:
    """A table of figures as plain data."""
    return None if table is None else {
        name: None if figure is None else figure.to_json() for name, figure in table.items()}


def tidy(value: Any) -> Any:
    """Plain data with floats in six digits.

    >>> tidy({"a": (1 / 3, 2)})
    {'a': [0.333333, 2]}
    """
    if isinstance(value, Mapping):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
