"""What chance alone brings: found in recordings, drawn as often as there, and nothing else."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from party_tools import moves, starts  # noqa: E402

from worldgym.models import party_nano  # noqa: E402
from worldgym.models.growth import Growth, grown  # noqa: E402

FLOOR, ORE, BEAM, DIRT = range(4)
ROWS, COLUMNS = 6, 10
CELLS = ROWS * COLUMNS
VEINS = np.arange(0, CELLS, 3)  # where ore grows
RATE = 0.04


@pytest.fixture(scope="module")
def recorded():
    """Tiles (3000, 2, 60) and a player's cells: ore grows in veins by chance and is never lost;
    a beam beside the player comes and goes; dirt comes up beside the player more often than
    far from it."""
    rng = np.random.default_rng(0)
    count = 3000
    was = np.where(rng.random((count, CELLS)) < 0.2, ORE, FLOOR)
    was[:, np.setdiff1d(np.arange(CELLS), VEINS)] = FLOOR
    at = rng.integers(CELLS, size=(count, 2, 1))
    at[:, 1] = at[:, 0]
    y, x = np.divmod(np.arange(CELLS), COLUMNS)
    away = np.maximum(abs(at[:, 0] // COLUMNS - y), abs(at[:, 0] % COLUMNS - x))
    chance = rng.random((count, CELLS))
    vein = np.isin(np.arange(CELLS), VEINS)
    now = np.where((was == FLOOR) & vein & (chance < RATE), ORE, was)
    now[(away < 3) & (chance > 0.9)] = DIRT
    now[(away >= 3) & (chance > 0.995)] = DIRT
    was[(away < 2) & (rng.random((count, CELLS)) < 0.3)] = BEAM
    was[(away >= 3) & (rng.random((count, CELLS)) < 0.01)] = BEAM  # and far from it vanishes, too
    return np.stack([was, now], 1), at


def test_what_is_as_frequent_far_from_players_is_by_chance(recorded):
    pairs, chance = grown(*recorded, COLUMNS)
    assert pairs.tolist() == [[FLOOR, ORE]]  # no beams, which never stay; no dirt: players' doing
    assert np.flatnonzero(chance[0]).tolist() == VEINS.tolist()
    assert chance[0, VEINS] == pytest.approx(RATE, rel=0.1)


def test_nothing_is_by_chance_where_nothing_was_recorded():
    tiles = np.zeros((50, 2, CELLS), np.int64)
    pairs, chance = grown(tiles, np.full((50, 2, 3), -1), COLUMNS)
    assert pairs.shape == (0, 2) and chance.shape == (0, CELLS)


@pytest.fixture
def growth(recorded):
    """Of three games: one where nothing grows, the recorded one, one more of the kind."""
    one = grown(*recorded, COLUMNS)
    nothing = np.zeros((0, 2), np.int32), np.zeros((0, CELLS), np.float32)
    return Growth.joined([nothing, one, one], CELLS)


def test_it_comes_as_often_as_recorded_and_only_there(growth):
    generator = torch.Generator().manual_seed(0)
    floor = torch.full((4000, CELLS), FLOOR)
    free = torch.ones(4000, CELLS, dtype=torch.bool)
    free[:, :6] = False
    draw = torch.rand(4000, CELLS, generator=generator, dtype=torch.float64)
    made = growth(floor, floor, free, 1, draw)
    share = (made == ORE).double().mean(0)
    veins = torch.from_numpy(VEINS)
    there = veins[veins >= 6]
    assert (made[:, there] == ORE).double().mean().item() == pytest.approx(RATE, rel=0.1)
    assert share.sum() == share[there].sum()  # not under players, not elsewhere
    # what a drawing adds by itself counts for nothing
    drawn = torch.full_like(floor, ORE)
    assert torch.equal(growth(drawn, floor, free, 1, draw)[:, 6:], made[:, 6:])
    assert (growth(drawn, floor, free, 1, draw)[:, :6] == ORE).all()
    # other changes are the drawing's
    for before, after in ((FLOOR, BEAM), (FLOOR, DIRT), (BEAM, ORE), (ORE, FLOOR), (ORE, ORE)):
        was, now = torch.full_like(floor, before), torch.full_like(floor, after)
        assert torch.equal(growth(now, was, free, 1, draw), now)
    assert torch.equal(growth(floor, floor, free, 0, draw), floor)
    assert torch.equal(growth(floor, floor, free, 2, draw), made)
    for i in (0, 17):  # no row knows its batch
        part = slice(i, i + 1)
        assert torch.equal(growth(floor[part], floor[part], free[part], 1, draw[part])[0], made[i])


def test_one_of_several_changes_is_drawn_by_its_chance():
    pairs = np.array([[FLOOR, ORE], [FLOOR, DIRT], [ORE, DIRT]], np.int32)
    growth = Growth.joined([(pairs, np.array([[0.1], [0.3], [1.0]], np.float32))], 1)
    draw = ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None]
    floor = torch.zeros(1000, 1, dtype=torch.int64)
    made = growth(floor, floor, floor == 0, 0, draw)
    assert [int((made == t).sum()) for t in (FLOOR, ORE, DIRT)] == [600, 100, 300]


def test_a_world_grows_by_its_key_alone():
    """The same in every batch, another in every step; a restored state grows the same again."""
    world = party_nano.tiny(tiles=(12, 20, 5, 4))
    world.book.growth.chance_KP.fill_(0.5)
    some = starts(world, 6)
    state = world.begin(some, range(6))
    one, _ = world.step(state, moves(world, 6, 0))
    again, _ = world.step(state, moves(world, 6, 0))
    assert torch.equal(one.history_BKChw, again.history_BKChw)
    alone = world.begin(replace(some, **{k: getattr(some, k)[2:3] for k in (
        "latents_BKChw", "actions", "null_BK", "length_B", "subjects_BKNS", "valid_BN", "game_B")}),
        [2])
    alone, _ = world.step(alone, moves(world, 6, 0)[2:3])
    assert torch.equal(alone.history_BKChw[0], one.history_BKChw[2])
    world.book.growth.chance_KP.fill_(0.0)
    bare, _ = world.step(state, moves(world, 6, 0))
    grew = (bare.history_BKChw[:, -1] != one.history_BKChw[:, -1]).any(1)
    assert grew.any() and not grew.all()
