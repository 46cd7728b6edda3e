"""Stop as soon as policies are told apart, without being wrong more often than promised.

Group-sequential tests with O'Brien-Fleming-like alpha spending (Lan and DeMets, "Discrete
sequential boundaries for clinical trials", Biometrika 1983): a fixed largest number of episodes, a
few looks on the way, and at each look a bound on the test statistic so that the chance to cross any
of them by luck is ``alpha`` altogether. Over several pairs the error is kept for the whole family
by Holm's step-down rule at every look (Maurer and Bretz, "Multiple testing in group sequential
trials using graphical approaches", Statistics in Biopharmaceutical Research 2013). The intervals
are repeated confidence intervals (Jennison and Turnbull, JRSS B 1989): they hold at any stop.

Shapes: L looks, K policies, P pairs, N episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from worldgym.errors import ConfigError

LOOKS, FIRST = 10, 10  # looks at most; episodes before the first of them
NODES = 160  # of the Gauss-Legendre rule; bounds agree with published ones in three digits
FARTHEST = 37.0  # beyond this many standard deviations float64 knows no chance


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a sequential test says: episodes used, pairs told apart, and the bound of that look."""

    episodes: int
    separated_P: np.ndarray
    look: int
    stop: bool


def look_points(episodes: int) -> tuple[int, ...]:
    """Episode counts at which to look: even steps of ``FIRST`` or more, the last is ``episodes``.

    >>> look_points(100)
    (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    """
    count = max(1, min(LOOKS, episodes // FIRST))
    return tuple(round(episodes * (k + 1) / count) for k in range(count))


@lru_cache(maxsize=4096)
def boundaries(looks: tuple[int, ...], alpha: float = 0.05) -> tuple[float, ...]:
    """Two-sided bounds on the z statistic at each look.

    Args:
        looks: ascending episode counts; the last is the largest possible one.
        alpha: chance to cross any bound when there is no difference; half of it on each side.

    Raises:
        ConfigError: looks that do not ascend, or alpha outside (0, 1).

    >>> [round(b, 3) for b in boundaries((20, 40, 60, 80, 100))]
    [4.877, 3.357, 2.68, 2.29, 2.031]
    """
    if not looks or looks[0] < 1 or (np.diff(looks) <= 0).any() or not 0 < alpha < 1:
        raise ConfigError("impossible looks", given=f"{looks}, alpha {alpha}",
                          expected="ascending episode counts, alpha between 0 and 1",
                          fix="use look_points(episodes)")
    from scipy.optimize import brentq
    from scipy.stats import norm

    times = np.asarray(looks, np.float64) / looks[-1]
    spent = 2 * norm.sf(norm.isf(alpha / 4) / np.sqrt(times))  # on each side, up to each look
    node, weight = np.polynomial.legendre.leggauss(NODES)
    # y: where the walk may be, if it has not crossed yet; mass: chance to be there, per node
    y, mass, bounds, before = np.zeros(1), np.ones(1), [], 0.0
    for time, share in zip(times, np.diff(spent, prepend=0.0), strict=True):
        step, scale = np.sqrt(time - before), np.sqrt(time)

        def excess(z: float, y: np.ndarray = y, mass: np.ndarray = mass, step: float = step,
                   scale: float = scale, share: float = share) -> float:
            return float(mass @ norm.sf((z * scale - y) / step) - share)

        bound = brentq(excess, 0.0, FARTHEST) if excess(FARTHEST) < 0 else FARTHEST
        grid = node * bound * scale
        density = norm.pdf((grid[:, None] - y) / step) @ mass / step
        y, mass, before = grid, density * weight * bound * scale, time
        bounds.append(float(bound))
    return tuple(bounds)


def z_scores(returns_KN: np.ndarray) -> np.ndarray:
    """Paired z statistic (P,) of every pair of policies, first with second, first with third, …

    Student's t brought to the normal scale by its tail chance, so that a bound holds for few
    episodes too. Differences that are all equal say only their sign: a sign test.
    """
    from scipy.special import ndtri, stdtr  # the normal's and Student's t, without the overhead

    first, second = np.triu_indices(len(returns_KN), 1)
    gap_PN = returns_KN[first] - returns_KN[second]
    n = gap_PN.shape[1]
    mean = gap_PN.mean(1)
    if n < 2:
        return np.zeros(len(mean))
    flat = np.ptp(gap_PN, axis=1) == 0
    sem = np.where(flat, 1.0, gap_PN.std(1, ddof=1)) / np.sqrt(n)
    tail = np.where(flat, np.where(mean == 0, 0.5, 0.5 ** n), stdtr(n - 1, -np.abs(mean) / sem))
    return np.sign(mean) * -ndtri(np.clip(tail, 1e-300, 0.5))


def judge(returns_KN: np.ndarray, looks: Sequence[int], alpha: float = 0.05) -> Verdict:
    """Go through the looks that ``returns_KN`` reaches and say which pairs are told apart.

    Nothing is remembered between calls: the same returns give the same verdict. ``stop`` is True
    once every pair is told apart or the last look is over. Episodes after a stop are not read.

    Raises:
        ConfigError: fewer than two policies, or no look reached.
    """
    returns, looks = np.asarray(returns_KN, np.float64), tuple(int(n) for n in looks)
    if returns.ndim != 2 or len(returns) < 2 or returns.shape[1] < looks[0]:
        raise ConfigError("nothing to tell apart", given=f"returns {returns.shape}",
                          expected=f"two policies or more, {looks[0]} episodes or more",
                          fix="give a second policy, or play on to the first look")
    separated = np.zeros(len(returns) * (len(returns) - 1) // 2, bool)
    look = 0
    for look, n in enumerate(looks):
        if n > returns.shape[1]:
            look -= 1
            break
        sizes = np.abs(z_scores(returns[:, :n]))
        for pair in np.argsort(-sizes, kind="stable"):
            left = int((~separated).sum())
            if not separated[pair]:
                if sizes[pair] < boundaries(looks, alpha / left)[look]:
                    break
                separated[pair] = True
        if separated.all():
            break
    return Verdict(looks[look], separated, look, bool(separated.all() or look == len(looks) - 1))


def repeated_interval(differences_N: object, looks: Sequence[int], look: int,
                      alpha: float = 0.05) -> tuple[float, float]:
    """Interval of a mean difference that holds at this look however one came to stop there."""
    from scipy.stats import norm, t

    x = np.asarray(differences_N, np.float64)
    mean = float(x.mean())
    if len(x) < 2 or np.ptp(x) == 0:
        return (mean, mean)
    bound = boundaries(tuple(looks), alpha)[look]
    half = float(t.isf(norm.sf(bound), len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return (mean - half, mean + half)
