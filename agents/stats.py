"""Means with honest intervals, for one policy, a difference of two, and many tasks; and power.

Shapes: N episodes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worldgym.errors import ConfigError

METHOD = ("95% bootstrap interval of the mean (BCa, 10,000 resamples, fixed seed); "
          "Student's t below 10 episodes")
RESAMPLES = 10_000
FEW = 10  # below this a bootstrap interval is too narrow: it cannot see what it never drew
POWER = 0.8


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
    mean = float(x.mean())
    sd = float(x.std(ddof=1)) if len(x) > 1 and np.ptp(x) > 0 else 0.0
    if sd == 0.0:
        return Summary(len(x), mean, sd, mean, mean)
    if len(x) < FEW:
        from scipy.stats import t

        low, high = t.interval(0.95, len(x) - 1, mean, sd / math.sqrt(len(x)))
        return Summary(len(x), mean, sd, float(low), float(high))
    low, high = _bootstrap((x,), np.mean)
    return Summary(len(x), mean, sd, low, high)


def difference(first: object, second: object, paired: bool = False) -> Summary:
    """Summary of mean(first) - mean(second); ``paired`` when both played the same seeds."""
    a, b = _sample(first), _sample(second)
    if paired:
        _same_length(a, b)
        return summary(a - b)
    gap, n = float(a.mean() - b.mean()), min(len(a), len(b))
    sd = float(np.sqrt(a.var(ddof=1) + b.var(ddof=1))) if n > 1 else 0.0
    if sd == 0.0:
        return Summary(n, gap, sd, gap, gap)
    if n < FEW:
        from scipy.stats import ttest_ind

        with warnings.catch_warnings():  # one sample may be constant; the interval still holds
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = ttest_ind(a, b, equal_var=False).confidence_interval()
        return Summary(n, gap, sd, float(interval.low), float(interval.high))
    low, high = _bootstrap((a, b), _mean_gap)
    return Summary(n, gap, sd, low, high)


def iqm(tasks: Sequence[object]) -> Summary:
    """Interquartile mean over all scores of all tasks, resampled within each task.

    After Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
    (2021). Scores of different tasks must be on one scale (normalised) before they come here.

    Args:
        tasks: one sequence of scores per task; lengths may differ.

    Returns:
        ``mean`` is the interquartile mean, ``n`` and ``sd`` are those of all scores.

    Raises:
        ConfigError: no task, an empty one, or scores that are not finite.

    >>> iqm([[0.0, 1.0], [1.0, 100.0]]).mean
    1.0
    """
    from scipy.stats import trim_mean

    if not len(tasks):
        raise ConfigError("no task to average", given="no scores", expected="scores of one task "
                          "or more", fix="pass one list of scores per task")
    samples = tuple(_sample(scores) for scores in tasks)
    together = np.concatenate(samples)
    value = float(trim_mean(together, 0.25))
    if min(map(len, samples)) < 2 or np.ptp(together) == 0:
        return Summary(len(together), value, float(together.std()), value, value)

    def middle(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return trim_mean(np.concatenate(parts, axis), 0.25, axis)

    low, high = _bootstrap(samples, middle)
    return Summary(len(together), value, float(together.std(ddof=1)), low, high)


def episodes_needed(first: object, second: object, paired: bool = True,
                    alpha: float = 0.05, power: float = POWER) -> int | None:
    """Episodes of each policy that would separate the two, were the difference as measured.

    The usual normal formula ((z(1 - alpha / 2) + z(power)) sd / difference)², where sd is that of
    the episodes' differences (paired) or of a difference of two independent episodes.

    Returns:
        None where it cannot be said: equal means, or a single episode.
    """
    from scipy.stats import norm

    a, b = _sample(first), _sample(second)
    if paired:
        _same_length(a, b)
    gap = abs(float(a.mean() - b.mean()))
    if min(len(a), len(b)) < 2 or gap <= 1e-12 * max(1.0, abs(float(a.mean()))):
        return None
    variance = float((a - b).var(ddof=1) if paired else a.var(ddof=1) + b.var(ddof=1))
    scale = float(norm.isf(alpha / 2) + norm.isf(1 - power))
    return max(2, math.ceil(variance * (scale / gap) ** 2))


def _mean_gap(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


def _bootstrap(data: tuple[np.ndarray, ...], statistic: object) -> tuple[float, float]:
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings():  # a degenerate sample is dealt with below
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(data, statistic, n_resamples=RESAMPLES, method="BCa",
                           rng=np.random.default_rng(0), vectorized=True)
    low, high = map(float, result.confidence_interval)
    if not (math.isfinite(low) and math.isfinite(high)):  # BCa has no acceleration to correct by
        low, high = map(float, np.quantile(result.bootstrap_distribution, (0.025, 0.975)))
    return low, high


def _same_length(a: np.ndarray, b: np.ndarray) -> None:
    if len(a) != len(b):
        raise ConfigError("paired samples differ in length", given=(len(a), len(b)),
                          expected="as many of one as of the other",
                          fix="score both policies on the same seeds")


def _sample(values: object) -> np.ndarray:
    x = np.asarray(values, np.float64).ravel()
    if len(x) == 0 or not np.isfinite(x).all():
        raise ConfigError("no sample to summarise", given=x[:5].tolist(),
                          expected="one or more finite returns", fix="score at least one episode")
    return x
