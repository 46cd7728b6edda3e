"""Metrics against values worked out by hand, and on a world that knows the answer."""

import numpy as np
import pytest

from tests.fit_data import ACTIONS, make_store
from worldgym.models import nano
from worldgym.train.metrics import auc, average_precision, end_chances, measure, psnr, replay


def tiny():
    """A world with the actions of the recordings."""
    return nano.tiny(action=ACTIONS["discrete"])


def test_psnr_of_known_errors():
    a = np.full((3, 4, 5, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 1
    b[1] = 255 - a[1]  # off by 55
    assert psnr(a, b)[0] == pytest.approx(20 * np.log10(255), abs=1e-9)  # 48.13 dB
    assert psnr(a, b)[1] == pytest.approx(20 * np.log10(255 / 55), abs=1e-9)
    assert psnr(a, b)[2] > 130  # equal
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr(black, white)[0] == 0


def pairs(score, truth):
    """The definition: share of (true, false) pairs in the right order, ties half."""
    t, f = score[truth], score[~truth]
    return ((t[:, None] > f).mean() + 0.5 * (t[:, None] == f).mean())


def test_auc_against_its_definition():
    true, false = True, False
    assert auc(np.array([0.9, 0.8, 0.1]), np.array([true, true, false])) == 1
    assert auc(np.array([0.9, 0.8, 0.1]), np.array([false, false, true])) == 0
    assert auc(np.full(6, 0.5), np.array([true, false] * 3)) == 0.5
    assert auc(np.array([0.2, 0.5, 0.5, 0.7]), np.array([false, true, false, true])) == 0.875
    rng = np.random.default_rng(0)
    for _ in range(20):
        score = rng.integers(0, 12, 60) / 12
        truth = rng.random(60) < 0.3
        assert auc(score, truth) == pytest.approx(pairs(score, truth), abs=1e-12)
    assert np.isnan(auc(np.ones(3), np.ones(3, bool))) and np.isnan(auc(np.ones(3),
                                                                         np.zeros(3, bool)))


def test_average_precision_against_its_definition():
    def slow(score, truth):
        """Sum over thresholds, from high to low, of precision times the recall gained."""
        total, recall = 0.0, 0.0
        for threshold in sorted(set(score), reverse=True):
            told = score >= threshold
            now = (told & truth).sum() / truth.sum()
            total, recall = total + (now - recall) * truth[told].mean(), now
        return total

    rng = np.random.default_rng(1)
    for _ in range(20):
        score, truth = rng.integers(0, 12, 60) / 12, rng.random(60) < 0.3
        assert average_precision(score, truth) == pytest.approx(slow(score, truth), abs=1e-12)
    assert average_precision(np.full(8, 0.5), np.arange(8) < 2) == 0.25  # the share of true cases
    assert average_precision(np.arange(8.0), np.arange(8) > 5) == 1
    assert np.isnan(average_precision(np.ones(3), np.zeros(3, bool)))


def test_replay_shows_the_frames_after_the_context(tmp_path):
    world, store = tiny(), make_store(tmp_path / "data", steps=(12, 9))
    dream, real = replay(world, store, np.array([0, 1, 13]), 4, 5, 0)
    assert dream.shape == real.shape == (5, 3, 32, 32, 3)
    for step in range(5):
        assert np.array_equal(real[step], store.take("frames", np.array([4, 5, 17]) + step))
    again, _ = replay(world, store, np.array([0, 1, 13]), 4, 5, 0)
    assert np.array_equal(dream, again)


def test_end_chances_cover_every_step(tmp_path):
    world, store = tiny(), make_store(tmp_path / "data", steps=(5, 4, 6))
    chance, ended = end_chances(world, store, np.array([0, 2]))
    assert len(chance) == 11 and np.flatnonzero(ended).tolist() == [4, 10]
    assert ((0 <= chance) & (chance <= 1)).all()


@pytest.mark.parametrize(("steps", "keys", "context"), [
    ((60, 54), {"psnr_1", "psnr_50"}, 4), ((53, 20), {"psnr_1", "psnr_25"}, 4),
    ((3, 2), {"psnr_1"}, 2), ((1, 1), set(), None)])
def test_short_episodes_are_measured_as_far_as_they_go(tmp_path, steps, keys, context):
    store = make_store(tmp_path / "data", steps=steps)
    out = measure(tiny(), store, np.arange(2), clips=2)
    assert {k for k in out if k.startswith("psnr") and not k.endswith("copy")} == keys
    assert out.get("context_frames") == context and out["held_out_steps"] == sum(steps)
    assert out["end_auc"] is not None


def test_copying_is_perfect_where_nothing_moves(tmp_path):
    store = make_store(tmp_path / "data", steps=(9, 9), ends=False)
    still = np.zeros((store.rows, 32, 32, 3), np.uint8)
    store.take = lambda name, rows, take=store.take: (
        still[rows] if name == "frames" else take(name, rows))
    out = measure(tiny(), store, np.arange(2), clips=2, steps=3)
    assert out["psnr_3_copy"] > 130 > out["psnr_3"] and out["end_auc"] is None
