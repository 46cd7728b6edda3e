"""An evaluation as text for the terminal: values, neighbours, agreement, drift, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from worldgym.agents.agreement import Figure
from worldgym.agents.compare import aligned
from worldgym.agents.evaluation import Evaluation, Pair

TITLES = {"pearson_r": "Pearson's r", "kendall_tau": "Kendall's tau", "spearman": "Spearman's rho",
          "mmrv": "MMRV", "optimism": "optimism (dream - real)"}


def text(found: Evaluation) -> str:
    """All tables; numbers in the unit of the return unless a title says otherwise."""
    parts = [f"{found.world}: {len(found.names)} policies, {found.episodes} episodes each"
             + (f", returns in {found.unit}" if found.unit else ""), _values(found)]
    if found.neighbours:
        parts.append("Neighbours in the dream, paired by start and noise; episodes each to tell "
                     "them apart (80% power, 5% error):\n" + _neighbours(found))
    if found.agreement is not None:
        parts.append("Dream against real game:\n" + _agreement(found.agreement))
    if found.agreement_outside is not None:
        parts.append(f"The same for the {len(found.outsiders)} policies that did not learn in a "
                     "dream:\n" + _agreement(found.agreement_outside))
    if found.drift is not None:
        parts.append("Return within the first steps, mean over policies:\n" + _drift(found))
    if found.verdict is not None:
        v = found.verdict
        parts.append(f"Sequential test: {int(v.separated_P.sum())} of {len(v.separated_P)} pairs "
                     f"told apart after {v.episodes} of at most {found.planned} episodes.")
    return "\n\n".join([*parts, *found.notes])


def _values(found: Evaluation) -> str:
    places = ["dream", "real"] if found.real else ["dream"]
    lines = [["policy", *(x for p in places for x in (f"{p} ± sd", "95% interval", "n", "cut")),
              *(["dream - real", "95% interval"] if found.real else [])]]
    best_first = np.argsort(-found.returns("dream").mean(1), kind="stable")
    for name in (found.names[k] for k in best_first):
        line = [name]
        for place in places:
            s = found.summaries[name, place]
            cut = found.played[name][place].cut
            line += [f"{number(s.mean)} ± {number(s.sd)}", interval(s.ci95 if s.n > 1 else None),
                     str(s.n), "all" if cut == s.n else str(cut)]
        if found.real:
            gap = found.optimism[name]
            line += [number(gap.mean, "+"), interval(gap.ci95 if gap.n > 1 else None, "+")]
        lines.append(line)
    return aligned(lines)


def _neighbours(found: Evaluation) -> str:
    def line(pair: Pair) -> list[str]:
        return [f"{pair.first} - {pair.second}", number(pair.difference, "+"),
                interval(pair.ci95, "+"), str(pair.needed or "-"),
                str(pair.needed_unpaired or "-")]

    head = ["pair", "difference", "95% interval", "paired", "unpaired"]
    table = aligned([head, *map(line, found.neighbours)])
    ratio = found.paired_ratio
    if ratio is None:
        return table
    return table + (f"\nPaired over unpaired episodes: {ratio.value:.2f} "
                    f"({interval(ratio.ci95)})")


def _agreement(figures: Mapping[str, Figure | None]) -> str:
    lines = []
    for key, figure in figures.items():
        value = ["undefined", ""] if figure is None else [
            number(figure.value), interval(figure.ci95)]
        lines.append([TITLES[key], *value])
    return aligned(lines)


def _drift(found: Evaluation) -> str:
    lines = [["step", "dream", "95% interval", "real", "95% interval", "dream / real"]]
    for at in found.drift or []:
        share = f"{at['dream'] / at['real']:.2f}" if at["real"] else "-"
        lines.append([str(at["step"]), number(at["dream"]), interval(at["dream_ci95"]),
                      number(at["real"]), interval(at["real_ci95"]), share])
    return aligned(lines)


def number(value: float, sign: str = "") -> str:
    """Three digits where a value is small, none behind the point where it is large.

    >>> number(812.4), number(0.51234), number(-3.0, "+")
    ('812', '0.512', '-3.00')
    """
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:{sign}.{digits}f}"


def interval(ci95: Sequence[float] | None, sign: str = "") -> str:
    """A 95 % interval in words.

    >>> interval((1, 20)), interval(None)
    ('1.00 to 20.0', 'unknown')
    """
    return "unknown" if ci95 is None else f"{number(ci95[0], sign)} to {number(ci95[1], sign)}"
