"""Means with honest intervals: BCa bootstrap for one policy, and for a difference of two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldgym.errors import ConfigError

METHOD = "95% bootstrap interval of the mean (BCa, 10,000 resamples, fixed seed)"
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean of ``n`` returns with standard deviation and 95 % interval."""

    n: int
    mean: float
    sd: float
    low: float
    high: float

    @property
    def ci95(self) -> tuple[float, float]:
        """The interval as a pair."""
        return (self.low, self.high)

    def __str__(self) -> str:
        return (f"{self.mean:.0f} ± {self.sd:.0f} "
                f"(n={self.n}, 95% {self.low:.0f} to {self.high:.0f})")


def summary(values: object) -> Summary:
    """Summary of one sample; fewer than two values, or equal ones, give an interval of no width.

    >>> summary([1.0, 2.0, 3.0, 4.0]).mean
    2.5
    """
    x = _sample(values)
    sd = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    if sd == 0.0:
        return Summary(len(x), float(x.mean()), sd, float(x.mean()), float(x.mean()))
    low, high = _bootstrap((x,), np.mean)
    return Summary(len(x), float(x.mean()), sd, low, high)


def difference(first: object, second: object, paired: bool = False) -> Summary:
    """Summary of mean(first) - mean(second); ``paired`` when both played the same seeds."""
    a, b = _sample(first), _sample(second)
    if paired:
        if len(a) != len(b):
            raise ConfigError("paired samples differ in length", given=(len(a), len(b)),
                              expected="as many of one as of the other",
                              fix="score both policies on the same seeds")
        return summary(a - b)
    gap = float(a.mean() - b.mean())
    sd = float(np.sqrt(a.var(ddof=1) + b.var(ddof=1))) if min(len(a), len(b)) > 1 else 0.0
    if sd == 0.0:
        return Summary(min(len(a), len(b)), gap, sd, gap, gap)
    low, high = _bootstrap((a, b), _mean_gap)
    return Summary(min(len(a), len(b)), gap, sd, low, high)


def _mean_gap(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


def _bootstrap(data: tuple[np.ndarray, ...], statistic: object) -> tuple[float, float]:
    from scipy.stats import bootstrap

    result = bootstrap(data, statistic, n_resamples=RESAMPLES, method="BCa",
                       rng=np.random.default_rng(0), vectorized=True)
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def _sample(values: object) -> np.ndarray:
    x = np.asarray(values, np.float64).ravel()
    if len(x) == 0 or not np.isfinite(x).all():
        raise ConfigError("no sample to summarise", given=x[:5].tolist(),
                          expected="one or more finite returns", fix="score at least one episode")
    return x
