"""Retrieval: exact whatever is pruned, per slot, bounded; histories that share their past."""

import time

import numpy as np
import pytest
import torch

from worldgym import camera
from worldgym.errors import ConfigError, ShapeError
from worldgym.reconstituted import History, Reconstituted, Scoring
from worldgym.retrieval import Cloud, Distances, geometry, overlap

POINTS = Reconstituted(scoring=Scoring(points=6000)).points


def walk(labels):
    return camera.inverse(camera.walk(camera.motions_of(np.asarray(labels, np.int64))))[1:]


def paths(n):
    r = np.random.default_rng(0)
    yield "uniform", walk(r.integers(0, 81, n))
    yield "sticky", walk(np.repeat(r.choice([9, 18, 27, 36, 1, 2, 10, 11], n // 8 + 1), 8)[:n])
    yield "spin", walk(np.ones(n))
    yield "still", walk(np.zeros(n))
    yield "square", walk(np.tile(np.r_[np.full(48, 9), np.full(30, 1)], n // 78 + 1)[:n])
    far = camera.motions_of(r.integers(0, 81, n))
    far[:, :2] *= 40
    yield "far", camera.inverse(camera.walk(far))[1:]


def history(w2c, chunk=4):
    K = np.repeat(camera.normalised(camera.DEFAULT_K)[None], len(w2c), 0)
    return History.empty(chunk).append(torch.zeros(len(w2c), 1, 1, 1), w2c, K,
                                       np.zeros(len(w2c), np.int64))


def plain_rule(memory, w2c, start):
    """The rule as the specification says it, every overlap counted over every point."""
    if start <= memory.total:
        return list(range(start))
    found = []
    for b in range(4 if memory.keep_first else 0, start - memory.temporal, 4):
        d = np.mean([1 - (overlap(q, w2c[b], memory.cloud())
                          + overlap(q, w2c[b + 2], memory.cloud())) / 2
                     for q in w2c[start:start + 4]])
        found.append((round(d, 9), b))
    first = [0, 1, 2, 3] if memory.keep_first else []
    b = min(found)[1]
    return sorted({*first, *range(b, b + 4), *range(start - memory.temporal, start)})


@pytest.mark.parametrize("keep_first", [False, True])
def test_pruning_and_caching_never_change_the_choice(keep_first):
    memory = Reconstituted(total=20 if keep_first else 16, keep_first=keep_first,
                           points_M3=POINTS[:3000])
    for name, w2c in paths(100):
        for start in (16, 20, 24, 60, 96):
            past = history(w2c[:start])
            want = plain_rule(memory, w2c, start)
            assert memory.select(w2c[:start + 4], start).tolist() == want, (name, start)
            assert past.select(memory, w2c[start:start + 4]).tolist() == want, (name, start)


def test_bounds_hold_for_every_candidate_and_cell():
    cloud = Cloud(POINTS)
    for name, w2c in paths(200):
        centre, ahead = (x.reshape(-1, 2, 3) for x in geometry(w2c[:192]))
        distances = Distances(w2c[196:200], centre, ahead, cloud)
        index = np.arange(len(centre))
        exact = distances.exact(index)
        for cells in cloud.cells:
            assert (distances.least(index, cells) <= exact + 1e-9).all(), name


def test_overlap_is_what_it_means():
    cloud, here = Cloud(POINTS), np.eye(4)
    turned = {d: camera.inverse(camera.walk(camera.motions([{"yaw": np.deg2rad(d)}])))[1]
              for d in (30, 59, 61, 180)}
    assert overlap(here, here, cloud) == 1
    assert abs(overlap(here, turned[30], cloud) - 0.5) < 0.1
    assert overlap(here, turned[59], cloud) > 0 == overlap(here, turned[61], cloud)
    away = camera.inverse(camera.walk(camera.motions([{"forward": -16.5}])))[1]
    assert overlap(here, away, cloud) == 0  # looks the same way, but too far off


def test_options_change_the_score_as_they_say():
    # back off, turn round and back again, stand
    labels = np.r_[np.zeros(4), np.full(20, 18), np.full(16, 1), np.full(16, 2), np.zeros(8)]
    w2c = walk(labels)
    plain = Reconstituted(points_M3=POINTS)
    near = Reconstituted(points_M3=POINTS, scoring=Scoring(distance_weight=100.0))
    start = 60
    off = np.linalg.norm(geometry(w2c)[0] - geometry(w2c)[0][start], axis=1)
    assert off[near.select(w2c, start)[0]] < 1e-9 < 1 < off[0]
    index = np.arange(0, 48, 4)[:, None] + [0, 2]
    plainly, nearly = (Distances(w2c[start:start + 4], *(x[index] for x in geometry(w2c)),
                                 plain.cloud(), weight) for weight in (0.0, 2.0))
    want = plainly.exact(np.arange(12)) + 2 * np.minimum(off[index].mean(1) / 8, 1)
    assert np.allclose(nearly.exact(np.arange(12)), want)
    true = Reconstituted(points_M3=POINTS, scoring=Scoring(fov=None))
    K = camera.normalised(camera.DEFAULT_K)
    wide = true.cloud(K)
    assert np.allclose(wide.fov, (89.4, 58.2), atol=0.1)
    assert len(wide.seen) > len(plain.cloud().seen)
    assert len(true.select(w2c, start, K)) == 16
    with pytest.raises(ConfigError, match="intrinsics"):
        true.select(w2c, start)


def test_more_than_one_chunk_can_be_retrieved():
    memory = Reconstituted(total=24, temporal=12, points_M3=POINTS[:2000])
    for _, w2c in paths(80):
        chosen = history(w2c[:76]).select(memory, w2c[76:])
        assert len(set(chosen.tolist())) == 24 and (chosen[-12:] == np.arange(64, 76)).all()


def test_every_fork_has_its_own_future_and_the_common_past():
    a = history(walk(np.ones(8)))
    w2c, K = walk(np.full(4, 9)), np.repeat(np.eye(3)[None], 4, 0)
    left = a.append(torch.ones(4, 1, 1, 1), w2c, K, np.full(4, 1))
    right = a.append(torch.full((4, 1, 1, 1), 2.0), w2c, K, np.full(4, 2))
    more = left.append(torch.ones(4, 1, 1, 1), w2c, K, np.full(4, 3))
    assert (len(a), len(left), len(right), len(more)) == (8, 12, 12, 16)
    assert left.of("label").tolist() == [0] * 8 + [1] * 4
    assert right.of("label").tolist() == [0] * 8 + [2] * 4
    assert float(left.latents([11])) == 1 and float(right.latents([11])) == 2
    assert more.of("label")[8:].tolist() == [1] * 4 + [3] * 4
    again = History.from_arrays(more.to_arrays())
    assert all((again.of(n) == more.of(n)).all() for n in ("w2c", "label", "again", "centre"))
    assert len(History.from_arrays(History.empty().to_arrays())) == 0


def test_a_late_fork_is_what_its_own_past_would_have_made():
    """Also where it parts in the middle of a chunk, and of views that came back."""
    turns = np.tile([1] * 4 + [2] * 4, 6)  # out and back: most chunks show what one showed before
    K, w2c = np.repeat(np.eye(3)[None], 47, 0), walk(turns)
    labels = np.zeros(47, np.int64)

    def part(past, a, b):
        return past.append(torch.zeros(b - a, 1, 1, 1), w2c[a:b], K[a:b], labels[a:b])

    whole = part(History.empty(), 0, 47)
    for length in (8, 18, 41):
        early = History(length, whole.rows)  # somebody else went on from here
        made, own = part(early, length, 47), part(part(History.empty(), 0, length), length, 47)
        assert made.rows is not whole.rows and made.rows.known == own.rows.known
        for name in ("w2c", "again", "centre", "label"):
            assert (made.of(name) == own.of(name)).all()
        assert own.of("again")[::4].sum() > 4


def test_cost_of_a_choice_at_2000_latents_stays_small():
    """Published: 50,000 points, 4 x 2 overlaps with each of 497 chunks; here few are counted."""
    memory = Reconstituted()
    assert len(memory.cloud().cells) == 3
    for name, w2c in paths(2004):
        past = history(w2c[:2000])
        past.select(memory, w2c[2000:])
        spent = []
        for _ in range(5):
            start = time.process_time()
            past.select(memory, w2c[2000:])
            spent.append(time.process_time() - start)
        assert min(spent) < 0.02, (name, min(spent))


@pytest.mark.parametrize("sizes", [dict(total=12), dict(total=14), dict(temporal=10),
                                   dict(keep_first=True), dict(chunk=0)])
def test_impossible_memories_are_named(sizes):
    with pytest.raises(ConfigError):
        Reconstituted(**sizes)


def test_a_start_that_is_no_chunk_is_named():
    with pytest.raises(ShapeError):
        Reconstituted(points_M3=POINTS).select(np.repeat(np.eye(4)[None], 30, 0), 18)
    with pytest.raises(ShapeError):
        Reconstituted(points_M3=POINTS).select(np.repeat(np.eye(4)[None], 20, 0), 20)
    with pytest.raises(ConfigError):
        Cloud(POINTS, fov=(200.0, 30.0))


@pytest.mark.parametrize("size", [0.5, 6.0, 30.0])
def test_the_first_glance_never_promises_too_much(size):
    """In worlds smaller and larger than the score's ball, for eyes that also look up and roll."""
    rng = np.random.default_rng(int(size))
    turn = camera.walk(np.concatenate([np.zeros((120, 2)), rng.normal(0, 1, (120, 2)),
                                       np.zeros((120, 1))], 1))[1:]
    turn[:, :3, 3] = rng.uniform(-size, size, (120, 3))
    w2c = camera.inverse(turn)
    policy = Reconstituted(scoring=Scoring(points=3000))
    centre, ahead = geometry(w2c)
    starts = np.arange(0, 100, 4)
    index = starts[:, None] + [0, 2]
    distances = Distances(w2c[112:116], centre[index], ahead[index], policy.cloud())
    every = np.arange(len(starts))
    exact = distances.exact(every)
    assert (distances.roughly(every) <= exact + 1e-9).all()
    assert size > 10 or (distances.roughly(every) > 0.05).any()  # and it says something
    best = starts[exact.argmin()]
    assert policy.select(w2c[:116], 112)[:4].tolist() == list(range(best, best + 4))
