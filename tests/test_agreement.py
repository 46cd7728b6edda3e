"""Agreement of dream and real values, and whether intervals hold what they promise."""

import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, spearmanr, trim_mean

from worldgym.agents.agreement import MEASURES, agreement, measures, mmrv, paired_ratio
from worldgym.agents.stats import difference, episodes_needed, iqm, summary
from worldgym.errors import ConfigError, ShapeError


def test_mmrv_by_hand():
    assert mmrv([1, 2, 3], [5, 6, 9]) == 0
    # first and second swapped: each loses 1; the third is in its place
    assert mmrv([2, 1, 3], [5, 6, 9]) == pytest.approx(2 / 3)
    # upside down: 4, 3, 4
    assert mmrv([3, 2, 1], [5, 6, 9]) == pytest.approx(11 / 3)
    assert mmrv([1, 1], [5, 6]) == 0.5  # "less than" is violated for the lesser one only
    with pytest.raises(ShapeError, match="other policies"):
        mmrv([1, 2], [1, 2, 3])


def test_measures_are_those_of_scipy():
    rng = np.random.default_rng(0)
    plain, tied = rng.normal(size=(2, 8, 20)), rng.integers(0, 4, (2, 8, 20))
    for dream, real in (plain, tied):
        table = measures(dream, real)
        assert table.shape == (4, 20)
        for column in range(20):
            d, r = dream[:, column], real[:, column]
            found = dict(zip(MEASURES, table[:, column], strict=True))
            assert found["pearson_r"] == pytest.approx(pearsonr(d, r).statistic)
            assert found["kendall_tau"] == pytest.approx(kendalltau(d, r).statistic)
            assert found["spearman"] == pytest.approx(spearmanr(d, r).statistic)
            assert found["mmrv"] == pytest.approx(mmrv(d, r))


def test_undefined_is_said_and_never_nan():
    ones = np.ones((4, 6))
    ramp = ones * np.arange(4)[:, None] + np.arange(6)
    for dream, real in ((ones, ramp), (ramp, ones)):
        found = agreement(dream, real)
        assert found["pearson_r"] is found["kendall_tau"] is found["spearman"] is None
        assert np.isfinite(found["optimism"].value) and np.isfinite(found["mmrv"].value)
    two = agreement(ramp[:2], ramp[:2])
    assert two["pearson_r"] is None and two["mmrv"].value == 0
    alone = agreement(ramp[:1], ramp[:1])
    assert alone["mmrv"] is None and alone["optimism"].value == 0
    once = agreement(ramp[:, :1], ramp[:, :1])
    assert once["pearson_r"].value == pytest.approx(1) and once["pearson_r"].ci95 is None
    assert paired_ratio(ones) is None and paired_ratio(ramp[:1]) is None
    with pytest.raises(ShapeError):
        agreement(ramp, ramp[:3])


def test_intervals_of_agreement_cover_the_truth():
    rng = np.random.default_rng(1)
    worth = np.array([[0, 20, 60, 90, 140, 160], [10, 60, 40, 130, 100, 190.0]])
    truth = dict(zip(MEASURES, measures(worth[0], worth[1]), strict=True))
    truth["optimism"] = float((worth[0] - worth[1]).mean())
    runs, inside = 30, dict.fromkeys(truth, 0)
    for _ in range(runs):
        luck = rng.normal(0, 30, (1, 40))  # shared by the policies of a place
        dream = worth[0][:, None] + luck + rng.normal(0, 50, (6, 40))
        real = worth[1][:, None] + rng.normal(0, 60, (6, 40))
        for name, figure in agreement(dream, real).items():
            low, high = figure.ci95
            inside[name] += low - 1e-9 <= truth[name] <= high + 1e-9
            assert low < high
    assert all(count >= runs - 5 for count in inside.values()), inside


@pytest.mark.parametrize("draw,truth", [
    (lambda rng, n: rng.normal(7, 3, n), 7.0), (lambda rng, n: rng.exponential(7, n), 7.0),
    (lambda rng, n: rng.binomial(1, 0.3, n), 0.3),
], ids=["normal", "exponential", "coin"])
@pytest.mark.parametrize("n,least", [(5, 0.84), (40, 0.90)])
def test_intervals_of_a_mean_cover_the_truth(draw, truth, n, least):
    rng = np.random.default_rng(2)
    runs = 150
    samples = [draw(rng, n) for _ in range(runs)]
    told = [s for s in map(summary, samples) if s.sd > 0]
    inside = np.mean([s.low <= truth <= s.high for s in told])
    assert inside >= least - 2 * np.sqrt(least * (1 - least) / len(told))
    if n == 40:  # 95 % intervals, not wider ones
        assert inside < 1


def test_intervals_of_a_difference_cover_the_truth_and_pairing_narrows_them():
    rng = np.random.default_rng(3)
    runs, inside, widths = 60, np.zeros(2), np.zeros(2)
    for _ in range(runs):
        luck = rng.exponential(50, 30)
        a, b = luck + rng.normal(10, 10, 30), luck + rng.normal(4, 10, 30)
        for k, paired in enumerate((True, False)):
            gap = difference(a, b, paired)
            inside[k] += gap.low <= 6 <= gap.high
            widths[k] += gap.high - gap.low
    assert (inside >= 0.85 * runs).all()
    assert widths[0] < 0.5 * widths[1]


def test_few_episodes_give_wide_intervals():
    two = summary([1.0, 3.0])
    assert two.low < -10 and two.high > 14  # Student's t with one degree of freedom
    gap = difference([1.0, 3.0], [1.0, 3.5])
    assert gap.high - gap.low > 5
    assert difference([2.0, 2.0], [1.0, 1.5]).low < 0.75


def test_episodes_needed_give_the_power_they_promise():
    rng = np.random.default_rng(4)
    pilot = rng.normal(0, 10, 4000)
    luck = rng.normal(0, 20, 4000)
    a, b = luck + pilot + 5, luck + rng.normal(0, 10, 4000)
    paired, unpaired = episodes_needed(a, b), episodes_needed(a, b, paired=False)
    assert unpaired > 3 * paired  # the shared luck is 4/5 of each variance
    gaps = rng.normal(5, np.sqrt(200), (2000, paired))
    z = gaps.mean(1) / gaps.std(1, ddof=1) * np.sqrt(paired)
    assert abs((z > 1.96).mean() - 0.8) < 0.05
    assert episodes_needed([1, 2], [1, 2]) is None and episodes_needed([1], [2]) is None
    assert episodes_needed([2, 2, 2], [1, 1, 1]) == 2


def test_paired_ratio_knows_shared_luck():
    rng = np.random.default_rng(5)
    own, luck = rng.normal(0, 10, (4, 400)), rng.normal(0, 30, 400)
    shared = paired_ratio(own + luck + np.arange(4)[:, None] * 5)
    assert shared.value == pytest.approx(0.1, abs=0.03)  # 2 * 100 / (2 * 1000)
    assert shared.ci95[0] < 0.1 < shared.ci95[1]
    alone = paired_ratio(rng.normal(0, 10, (4, 400)))
    assert alone.value == pytest.approx(1, abs=0.15)


def test_iqm_is_the_trimmed_mean_over_tasks():
    rng = np.random.default_rng(6)
    tasks = [rng.normal(k, 1, 30) for k in range(5)]
    found = iqm(tasks)
    assert found.mean == pytest.approx(trim_mean(np.concatenate(tasks), 0.25))
    assert found.n == 150 and found.low < 2 < found.high
    wild = iqm([*tasks[:-1], np.append(tasks[-1][:-1], 1e9)])
    assert abs(wild.mean - found.mean) < 0.1  # one outlier does not carry it away
    assert iqm([[1.0], [2.0]]).ci95 == (1.5, 1.5)
    for bad in ([], [[]], [[1.0, float("nan")]]):
        with pytest.raises(ConfigError):
            iqm(bad)
