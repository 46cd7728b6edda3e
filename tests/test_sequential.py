"""Sequential stopping: published bounds, the error rate it promises, and that it does stop."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from worldgym.agents.sequential import (
    boundaries,
    judge,
    look_points,
    repeated_interval,
    z_scores,
)
from worldgym.errors import ConfigError

LOOKS = look_points(60)


def nothing_between(rng, episodes=60, policies=3):
    """Policies of equal worth: skewed returns, with part of the luck in common."""
    return rng.exponential(100, episodes) + rng.exponential(60, (policies, episodes))


def test_bounds_are_the_published_ones():
    # Lan-DeMets, O'Brien-Fleming type, two-sided 0.05: as printed by the usual programs
    for looks, bounds in (((1, 2), (2.963, 1.969)), ((1, 2, 3), (3.710, 2.511, 1.993)),
                          ((1, 2, 3, 4, 5), (4.877, 3.357, 2.680, 2.290, 2.031))):
        np.testing.assert_allclose(boundaries(looks), bounds, atol=2e-3)
    assert boundaries((7,))[0] == pytest.approx(1.96, abs=1e-3)


def test_a_walk_without_drift_crosses_as_often_as_promised():
    rng = np.random.default_rng(0)
    looks = (10, 15, 40, 50, 100)  # unevenly spaced
    steps = np.diff((0, *looks))
    walks = np.cumsum(rng.normal(size=(40_000, 5)) * np.sqrt(steps), 1) / np.sqrt(looks)
    crossed = (np.abs(walks) > boundaries(looks, 0.1)).any(1).mean()
    assert abs(crossed - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 40_000)


def test_error_rate_over_all_pairs_and_looks():
    rng = np.random.default_rng(1)
    wrong, naive, runs = 0, 0, 1200
    for _ in range(runs):
        returns = nothing_between(rng)
        wrong += judge(returns, LOOKS).separated_P.any()
        naive += any((np.abs(z_scores(returns[:, :n])) > 1.96).any() for n in LOOKS)
    assert wrong / runs < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / runs)
    assert wrong / runs > 0.005  # it is not safe by never saying anything
    assert naive / runs > 0.15  # looking again and again without a rule


def test_true_differences_are_found_early():
    rng = np.random.default_rng(2)
    stops = []
    for _ in range(50):
        returns = nothing_between(rng) + np.array([0, 300, 600])[:, None]
        verdict = judge(returns, LOOKS)
        assert verdict.separated_P.all() and verdict.stop
        stops.append(verdict.episodes)
    assert np.mean(stops) < 40 and max(stops) <= 60


def test_intervals_hold_at_the_moment_of_stopping():
    rng = np.random.default_rng(3)
    runs, held, ordinary = 600, 0, 0
    for _ in range(runs):
        gap = rng.normal(8, 20, 60)
        verdict = judge(np.stack([gap, np.zeros(60)]), LOOKS)
        x = gap[:verdict.episodes]
        low, high = repeated_interval(x, LOOKS, verdict.look)
        held += low <= 8 <= high
        plain = ttest_1samp(x, 0).confidence_interval()
        ordinary += plain.low <= 8 <= plain.high
    assert held / runs > 0.93
    assert ordinary < held


def test_one_verdict_whatever_is_known_of_later_episodes():
    rng = np.random.default_rng(4)
    returns = rng.normal(0, 10, (2, 60)) + np.array([[12.0], [0.0]])
    verdict = judge(returns, LOOKS)
    assert verdict.episodes < 60
    again = judge(returns[:, :verdict.episodes], LOOKS)
    assert again.episodes == verdict.episodes and again.look == verdict.look
    before = judge(returns[:, :LOOKS[verdict.look - 1]], LOOKS)
    assert not before.stop


def test_equal_policies_run_to_the_end_and_constants_are_told_by_sign():
    same = np.ones((2, 60))
    verdict = judge(same, LOOKS)
    assert verdict.stop and verdict.episodes == 60 and not verdict.separated_P.any()
    assert z_scores(same)[0] == 0
    apart = z_scores(np.array([[2.0] * 10, [1.0] * 10]))[0]  # chance of ten equal signs
    assert 3 < apart < 3.5


def test_impossible_plans_are_refused():
    for looks, alpha in (((), 0.05), ((5, 5), 0.05), ((0, 4), 0.05), ((5, 10), 0), ((5, 10), 1)):
        with pytest.raises(ConfigError, match="looks"):
            boundaries(looks, alpha)
    with pytest.raises(ConfigError, match="tell apart"):
        judge(np.ones((1, 60)), LOOKS)
    with pytest.raises(ConfigError, match="tell apart"):
        judge(np.ones((2, 3)), LOOKS)
    assert look_points(3) == (3,) and look_points(100)[-1] == 100 and len(look_points(5000)) == 10
