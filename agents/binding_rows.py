"""Rates of action binding with intervals, as rows of a results file and as a table.

Legend: E episode; tallies are (E, 2): right, of how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from worldgym.agents.compare import aligned
from worldgym.agents.results import Row
from worldgym.agents.stats import FEW

RESAMPLES = 4000
METHOD = ("95% interval, whole episodes: bootstrap (percentile, 4,000 resamples within each game, "
          "fixed seed); below 10 episodes jackknife with Student's t")
Games = Mapping[str, Mapping[str, np.ndarray]]  # game -> metric -> (E, 2)


def rate(metric: str, sums: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """A metric from summed tallies (..., 2), or None if nothing was counted."""
    if metric.startswith("interact") and not metric.startswith(("interact_hit", "interact_quiet")):
        mark = metric.removeprefix("interact")
        both = [rate(f"interact_{part}{mark}", sums) for part in ("hit", "quiet")]
        return None if both[0] is None or both[1] is None else (both[0] + both[1]) / 2
    if metric not in sums or not (sums[metric][..., 1] > 0).any():
        return None
    right, counted = sums[metric][..., 0], sums[metric][..., 1]
    return np.where(counted > 0, right / np.maximum(counted, 1), np.nan)


def metrics_of(games: Games) -> list[str]:
    """Names of the metrics in some tallies, ``interact`` before its parts."""
    names = list(dict.fromkeys(k for tallies in games.values() for k in tallies))
    if "interact_hit" in names:
        names.insert(names.index("interact_hit"), "interact")
    return names


def interval(metric: str, games: Games) -> tuple[float, float] | None:
    """95 % interval of a metric over all games together; None with a single episode."""
    needs = (["interact_hit", "interact_quiet"] if metric == "interact" else [metric])
    parts = [np.stack([tallies[k] for k in needs], 1) for tallies in games.values()
             if all(k in tallies for k in needs)]  # (E, metrics, 2) per game
    count = sum(map(len, parts))
    if count < 2:
        return None

    def of(sums: np.ndarray) -> np.ndarray:
        got = rate(metric, {k: sums[..., i, :] for i, k in enumerate(needs)})
        return np.full(sums.shape[:-2], np.nan) if got is None else got

    total = sum(part.sum(0) for part in parts)
    if count < FEW:
        from scipy.stats import t

        each = np.concatenate(parts)
        left = of(total - each)
        left = left[np.isfinite(left)]
        if len(left) < 2:
            return None
        spread = np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
        half = float(t.ppf(0.975, len(left) - 1) * spread)
        value = float(of(total))
        return max(0.0, value - half), min(1.0, value + half)
    rng = np.random.default_rng(0)
    sums = np.zeros((RESAMPLES, *total.shape))
    for part in parts:
        sums += part[rng.integers(len(part), size=(RESAMPLES, len(part)))].sum(1)
    low, high = np.nanquantile(of(sums), (0.025, 0.975))
    return float(low), float(high)


def rows(found: Mapping[str, Games], pooled: Sequence[str], seeds: str = "") -> list[Row]:
    """Rows of every roller: ``NAME`` over the ``pooled`` games, ``NAME/GAME`` for each game.

    ``n`` is the number of cases counted (steps, players or frames), all clips together.
    """
    made = []
    for name, games in found.items():
        pool = {game: games[game] for game in pooled if game in games}
        for what, some in [(name, pool)] + [(f"{name}/{g}", {g: t}) for g, t in games.items()]:
            for metric in metrics_of(some):
                sums: dict[str, np.ndarray] = {}
                for tallies in some.values():
                    for k, v in tallies.items():
                        sums[k] = sums.get(k, np.zeros(2)) + v.sum(0)
                value = rate(metric, sums)
                if value is None:
                    continue
                key = "interact_hit" if metric == "interact" else metric
                made.append(Row(what=what, metric=metric, value=float(value), note=METHOD,
                                ci95=interval(metric, some), n=int(sums[key][1]), seeds=seeds))
    return made


def table(made: Sequence[Row], columns: Sequence[str]) -> str:
    """The rows as text: one line per what, the given metrics with their intervals."""
    found = {(row.what, row.metric): row for row in made}
    lines = [["what", *columns]]
    for what in dict.fromkeys(row.what for row in made):
        line = [what]
        for metric in columns:
            row = found.get((what, metric))
            if row is None:
                line.append("-")
            else:
                between = "" if row.ci95 is None else " ({:.2f}-{:.2f})".format(*row.ci95)
                line.append(f"{row.value:.3f}{between}")
        lines.append(line)
    return aligned(lines)
