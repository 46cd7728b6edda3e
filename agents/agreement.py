"""How well the dream orders and predicts policies: correlations, rank violations, optimism.

Shapes: K policies, N dreamt episodes, M real episodes. The policies are taken as given; intervals
say how far the chance of the episodes could have moved a figure (bootstrap over episodes, the same
ones for all policies of a place, because those share seeds). Too few episodes give no interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from worldgym.agents.stats import FEW, difference
from worldgym.errors import ShapeError

RESAMPLES = 2_000
METHOD = "95% bootstrap interval over episodes (percentile, 2,000 resamples), policies fixed"
MEASURES = ("pearson_r", "kendall_tau", "spearman", "mmrv")


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its 95 % interval; None where too few episodes give none."""

    value: float
    ci95: tuple[float, float] | None

    def to_json(self) -> dict[str, object]:
        """``value`` and ``ci95`` as plain data."""
        return {"value": self.value, "ci95": None if self.ci95 is None else list(self.ci95)}


def mmrv(dream_K: object, real_K: object) -> float:
    """Mean maximum rank violation, in units of the real return; 0 is a perfect order.

    For each policy the largest real gap to another that the dream orders the other way round;
    then the mean over policies (Li et al., SIMPLER, arXiv 2405.05941).

    Raises:
        ShapeError: not one value per policy in both.

    >>> mmrv([1, 2, 3], [10, 20, 30]), round(mmrv([2, 1, 3], [10, 20, 30]), 3)
    (0.0, 6.667)
    """
    dream, real = np.asarray(dream_K, np.float64), np.asarray(real_K, np.float64)
    if dream.shape != real.shape or dream.ndim != 1 or not len(dream):
        raise ShapeError("values of other policies", given=(dream.shape, real.shape),
                         expected="one dream and one real value per policy",
                         fix="score every policy in both places")
    return float(_rank_violation(dream[:, None], real[:, None])[0])


def _rank_violation(dream_KR: np.ndarray, real_KR: np.ndarray) -> np.ndarray:
    wrong_KKR = (dream_KR[:, None] < dream_KR) != (real_KR[:, None] < real_KR)
    return (np.abs(real_KR[:, None] - real_KR) * wrong_KKR).max(1).mean(0)


def measures(dream_K: np.ndarray, real_K: np.ndarray) -> np.ndarray:
    """The figures of ``MEASURES`` (4,), in that order; NaN where one is undefined.

    A correlation needs three policies, and values that are not all equal. (K, R) in, (4, R) out:
    every column by itself. Spearman's rho is Pearson's r of the ranks, and Kendall's tau (tau-b)
    that of the signs of all differences: SciPy's functions of these names give the same numbers,
    but take one column at a time.
    """
    from scipy.stats import pearsonr, rankdata

    shape = np.shape(dream_K)
    dream, real = (np.asarray(x, np.float64).reshape(shape[0], -1) for x in (dream_K, real_K))
    found = np.full((4, dream.shape[1]), np.nan)
    if len(dream) > 1:
        found[3] = _rank_violation(dream, real)
    vary = (np.ptp(dream, axis=0) > 0) & (np.ptp(real, axis=0) > 0)
    if len(dream) > 2 and vary.any():
        pair = dream[:, vary], real[:, vary]
        signs = [np.sign(x[:, None] - x).reshape(-1, x.shape[1]) for x in pair]
        ranks = [rankdata(x, axis=0) for x in pair]
        for m, (x, y) in enumerate((pair, signs, ranks)):
            with warnings.catch_warnings():  # equal but for rounding: r is told, if imprecise
                warnings.simplefilter("ignore")
                found[m, vary] = pearsonr(x, y, axis=0).statistic
    return found.reshape(4, *shape[1:])


def agreement(dream_KN: np.ndarray, real_KM: np.ndarray) -> dict[str, Figure | None]:
    """Every figure of ``MEASURES`` and ``optimism``; None where one is undefined.

    ``optimism`` is the mean over policies of dream minus real return. Dream and real episodes are
    different games, so its interval is that of two independent samples.

    Raises:
        ShapeError: not one row per policy in both.
    """
    dream_KN, real_KM = np.asarray(dream_KN, np.float64), np.asarray(real_KM, np.float64)
    if dream_KN.ndim != 2 or real_KM.ndim != 2 or len(dream_KN) != len(real_KM):
        raise ShapeError("returns do not fit", given=(dream_KN.shape, real_KM.shape),
                         expected="(policies, episodes) twice, the same policies",
                         fix="score every policy in both places")

    def resampled(dream_RN: np.ndarray, real_RM: np.ndarray, axis: int = -1) -> np.ndarray:
        return measures(dream_KN[:, dream_RN].mean(-1), real_KM[:, real_RM].mean(-1))

    values = measures(dream_KN.mean(1), real_KM.mean(1))
    found = _figures(values, resampled, (dream_KN.shape[1], real_KM.shape[1]))
    gap = difference(dream_KN.mean(0), real_KM.mean(0))
    figures: dict[str, Figure | None] = dict(zip(MEASURES, found, strict=True))
    figures["optimism"] = Figure(gap.mean, gap.ci95 if gap.n > 1 else None)
    return figures


def paired_ratio(returns_KN: np.ndarray, plain_KN: np.ndarray | None = None) -> Figure | None:
    """Episodes a paired design needs over those an unpaired one needs, for equal intervals.

    The mean of var(a - b) / (var a + var b) over policies that are neighbours in mean return;
    below 1 pairing helps. None where no neighbours vary.

    Args:
        plain_KN: returns of the same policies as the unpaired design would have them, of which the
            denominator is taken; default: the same returns.
    """
    order = np.argsort(np.asarray(returns_KN).mean(1), kind="stable")
    ranked = np.asarray(returns_KN, np.float64)[order]
    plain = ranked if plain_KN is None else np.asarray(plain_KN, np.float64)[order]

    def ratio(index_RN: np.ndarray, axis: int = -1) -> np.ndarray:
        spread = plain[:, index_RN].var(-1, ddof=1)
        both = spread[1:] + spread[:-1]
        gap = np.diff(ranked[:, index_RN], axis=0).var(-1, ddof=1)
        vary = both > 0
        total = np.where(vary, gap / np.where(vary, both, 1), 0).sum(0)
        return np.where(vary.any(0), total / np.maximum(vary.sum(0), 1), np.nan)[None]

    whole = np.arange(ranked.shape[1])
    return _figures(ratio(whole), ratio, (len(whole),))[0] if len(whole) > 1 else None


def _figures(values_S: np.ndarray, statistic: Callable[..., np.ndarray],
             sizes: tuple[int, ...]) -> list[Figure | None]:
    """Values with intervals; ``statistic``: resampled episode numbers (R, N) -> values (S, R)."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    intervals: list[tuple[float, float] | None] = [None] * len(values_S)
    if min(sizes) >= FEW and np.isfinite(values_S).any():
        with warnings.catch_warnings():  # SciPy's own interval is unknown where a resample is
            warnings.simplefilter("ignore", DegenerateDataWarning)
            drawn_SR = bootstrap(
                tuple(np.arange(n) for n in sizes), statistic, n_resamples=RESAMPLES,
                method="percentile", vectorized=True, batch=100, rng=np.random.default_rng(0),
            ).bootstrap_distribution
        for s, drawn in enumerate(np.atleast_2d(drawn_SR)):
            known = drawn[np.isfinite(drawn)]  # a resample may leave a correlation undefined
            if len(known) > RESAMPLES / 2:
                low, high = np.quantile(known, (0.025, 0.975))
                intervals[s] = (float(low), float(high))
    return [Figure(float(v), i) if np.isfinite(v) else None
            for v, i in zip(values_S, intervals, strict=True)]
