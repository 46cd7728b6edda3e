"""A book of tiles: what is in it, what it draws, and a world that plays with it."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from party_tools import moves, starts  # noqa: E402

from worldgym.errors import ConfigError  # noqa: E402
from worldgym.models import party_nano  # noqa: E402
from worldgym.models.cellbook import CellBook, standing, tiles_of  # noqa: E402
from worldgym.models.codec import Codec, CodecConfig  # noqa: E402

CODEC = CodecConfig(frame_hw=(16, 24), channels=6, width=8, deep_width=16, stem=2, local=True)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return Codec(CODEC).eval()


@pytest.fixture(scope="module")
def frames():
    """Two games of three and two tiles: the first game's first tile always stays, its second and
    third change into each other or stay, by chance."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    made = []
    for own, chances in ((tiles[:3], (0.8, 0.15, 0.05)), (tiles[3:], (0.5, 0.5))):
        first = rng.choice(len(own), (30, 4, 6), p=chances)
        moved = np.where(rng.random(first.shape) < 0.5, first, len(own) - first % 3)
        then = np.where((first == 0) & (len(own) == 3), 0, np.minimum(moved, len(own) - 1))
        grid = own[np.stack([first, then], 1)]
        made.append(grid.transpose(0, 1, 2, 4, 3, 5, 6).reshape(30, 2, 16, 24, 3))
    return made


def nobody(frames):
    """No player in any of these frames."""
    return [np.full((len(x), 2, 1), -1) for x in frames]


def drawn(book, latents, before, game):
    """What a book makes of frames without players."""
    none = torch.full((len(latents), 1), -1)
    return book(latents, before, game, none, none)


def encoded(codec, frames):
    return codec.encode(torch.from_numpy(np.ascontiguousarray(frames)))


def test_tiles_are_found_and_told_apart(frames):
    tiles, number = tiles_of(frames[0], 4)
    assert tiles.shape == (3, 4, 4, 3) and number.shape == (30, 2, 24)
    again = tiles[number].reshape(30, 2, 4, 6, 4, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    assert (again.reshape(frames[0].shape) == frames[0]).all()


def test_recorded_frames_stay_and_blurred_ones_come_back(codec, frames):
    book = CellBook.of(codec, frames, nobody(frames), prior=0.0)
    assert len(book) == 5 and book.ends_G3[:, 0].tolist() == [3, 5]
    before, latents = (torch.cat([encoded(codec, x[:, i]) for x in frames]) for i in range(2))
    game = torch.tensor([0] * 30 + [1] * 30)
    torch.testing.assert_close(drawn(book, latents, before, game), latents, rtol=0, atol=1e-5)
    g = torch.Generator().manual_seed(0)
    apart = min(float(torch.pdist(x).min()) for x in (book.cells_TC[:3], book.cells_TC[3:]))
    blurred = latents + 0.1 * apart * torch.randn(latents.shape, generator=g)
    torch.testing.assert_close(drawn(book, blurred, before, game), latents, rtol=0, atol=1e-5)
    other = drawn(book, latents, before, 1 - game)  # the other game's tiles, and no others
    own = book.cells_TC[3:]
    assert all(any(torch.equal(cell, t) for t in own) for cell in other[0].flatten(1).t())


def test_chances_are_those_of_the_recordings(codec, frames):
    """The first game's first tile stays, always; the others change into each other, by chance."""
    book = CellBook.of(codec, frames, nobody(frames))
    chance = book.chances(0).exp()
    torch.testing.assert_close(chance.sum(1), torch.ones(3))
    still = int(chance.diagonal().argmax())
    others = [i for i in range(3) if i != still]
    assert chance[still, still] > 0.99
    assert all(0.1 < chance[i, j] < 0.9 for i in others for j in others)
    assert 0 < chance[others[0], still] < 0.01  # never seen, but not impossible
    often = [int((tiles_of(frames[0], 4)[1][:, 0] == i).sum()) for i in range(3)]
    mine = book.pairs_M3[:int(book.ends_G3[0, 1])]
    assert [int(mine[mine[:, 0] == i, 2].sum()) for i in range(3)] == often
    again = CellBook(6, len(book), (len(book.pairs_M3), 0), 2, grows=(len(book.growth), 24))
    assert again.prior == book.prior
    again.load_state_dict(book.state_dict())
    assert torch.equal(again.chances(1), book.chances(1))


def test_what_is_drawn_between_two_tiles_is_what_recordings_make_likely(codec, frames):
    """A tile that never changed stays; one that changes half of the time may go."""
    book, keen = (CellBook.of(codec, frames, nobody(frames), prior=x) for x in (0.0, 10.0))
    still = int(keen.chances(0).diagonal().argmax())
    others = [i for i in range(3) if i != still]
    for made in (book, keen):
        made.cells_TC.copy_(3 * torch.eye(6)[:5])
    for before, shown, meant in ((still, others[0], still), (others[0], others[1], others[1]),
                                 (others[1], still, others[1])):
        old, new = book.cells_TC[before], book.cells_TC[shown]
        between = 0.45 * old + 0.55 * new
        given = [x[None, :, None, None].expand(1, -1, *CODEC.latent_chw[1:]).contiguous()
                 for x in (between, old)]
        game = torch.zeros(1, dtype=torch.int64)
        assert torch.equal(drawn(book, *given, game)[0, :, 0, 0], new)
        if meant != shown:
            assert torch.equal(drawn(keen, *given, game)[0, :, 0, 0], book.cells_TC[meant])


@pytest.fixture(scope="module")
def walks():
    """Players of two colours (tiles 1 and 2) step right over a floor (tile 0), which forgets them;
    frames (40, 2, 16, 24, 3) and the players' cells (40, 2, 2)."""
    rng = np.random.default_rng(1)
    tiles = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    grid, places = np.zeros((40, 2, 24), np.int64), np.zeros((40, 2, 2), np.int64)
    for r in range(40):
        cell = rng.choice([c for c in range(24) if c % 6 < 4], 2, replace=False)
        for f in range(2):
            for player in range(2):
                grid[r, f, cell[player] + f] = player + 1
                places[r, f, player] = cell[player] + f
    frames = tiles[grid].reshape(40, 2, 4, 6, 4, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    return np.ascontiguousarray(frames.reshape(40, 2, 16, 24, 3)), places


def test_a_player_keeps_its_looks(codec, walks):
    """Where a player is told to be, a drawing between two players is the one that came there; the
    order of the players, and who else is in the batch, change nothing."""
    frames, places = walks
    book = CellBook.of(codec, [frames], [places])
    tiles, number = tiles_of(frames, 4)
    book.cells_TC.copy_(3 * torch.eye(6)[:3])
    look = number[np.arange(40)[:, None], 0, places[:, 0]]  # tile of both players (40, 2)
    chance = book.chances(0, moved=True).exp()
    torch.testing.assert_close(chance.sum(1), torch.ones(4))
    assert all(chance[i, i] > 0.9 for i in np.unique(look))

    def latents(number_P):
        return book.cells_TC[torch.from_numpy(number_P)].T.reshape(1, 6, 4, 6).contiguous()

    apart = next(r for r in range(40) if abs(np.diff(places[r, 0])) > 2)
    before, after = (latents(number[apart, i]) for i in range(2))
    mixed, at = after.clone(), [torch.from_numpy(places[apart:apart + 1, i]) for i in range(2)]
    here, other = int(places[apart, 1, 0]), int(look[apart, 1])
    mixed[0, :, here // 6, here % 6] = 0.49 * book.cells_TC[look[apart, 0]] + (
        0.51 * book.cells_TC[other])
    game = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(book(mixed, before, game, *at), after)
    assert torch.equal(book(mixed, before, game, *(x.flip(1) for x in at)), after)
    floor = int(np.bincount(number.ravel()).argmax())
    wrong = drawn(book, mixed, before, game)  # nobody is told to be there: a figure nobody plays
    assert torch.equal(wrong, latents(np.full(24, floor)))
    many = book(mixed.repeat(3, 1, 1, 1), before.repeat(3, 1, 1, 1), game.repeat(3),
                *(torch.cat([x.flip(1), torch.full_like(x, -1), x]) for x in at))
    assert torch.equal(many[0], after[0]) and torch.equal(many[1], wrong[0])
    assert torch.equal(many[2], after[0])
    # each has one colour, which it keeps even where the other's is drawn
    looks = book.looks(before, game, at[0])
    assert sorted(looks[0].tolist()) == [0, 1]
    assert book.looks(before, game, torch.full_like(at[0], -1)).tolist() == [[-1, -1]]
    assert book.looks(before.expand(3, -1, -1, -1), torch.zeros(3, dtype=torch.int64), torch.tensor(
        [[-1, 23], *at[0].tolist(), at[0][0].flip(0).tolist()])).tolist() == [
            [-1, -1], looks[0].tolist(), looks[0].flip(0).tolist()]
    taken, there = after.clone(), int(places[apart, 1, 1])
    for cell, tile in ((here, other), (there, look[apart, 0])):
        taken[0, :, cell // 6, cell % 6] = book.cells_TC[tile]
    assert torch.equal(book(taken, before, game, *at), taken)  # nobody knows whose colours
    assert torch.equal(book(taken, before, game, *at, looks), after)
    # one that comes back, nobody knows in what colour: not in the other's
    back = [torch.where(torch.arange(2) == 0, -1, at[0]), at[1]]
    known = torch.where(torch.arange(2) == 0, -1, looks)
    assert torch.equal(book(taken, before, game, *back, known), after)
    # two told to be in one place: either, in no order
    both = at[0], at[1][:, :1].expand(1, 2)
    swapped = tuple(x.flip(1) for x in both)
    assert torch.equal(book(mixed, before, game, *both), book(mixed, before, game, *swapped))


def test_whoever_comes_back_is_drawn_and_nobody_else(codec, walks):
    """Players that were not on the map look as such ones did; a floor drawn where one is told to
    be is a player, a player drawn where nobody is told to be is the floor."""
    frames, places = walks
    far = places.copy()
    far[:20, 0, 0] = -1  # the first player of these comes onto the map
    book = CellBook.of(codec, [frames], [far])
    _, number = tiles_of(frames, 4)
    book.cells_TC.copy_(3 * torch.eye(6)[:3])
    first, second = number[0, 0, places[0, 0]]
    floor = 3 - first - second
    chance = book.chances(0, moved=True).exp()
    assert chance[3, first] > 0.9 and chance[:, floor].max() == 0
    assert book.chances(0).exp()[:, [first, second]].max() == 0
    game, cells = torch.zeros(1, dtype=torch.int64), np.full(24, floor)
    cells[7] = second
    shown = book.cells_TC[torch.from_numpy(cells)].T.reshape(1, 6, 4, 6).contiguous()
    before = book.cells_TC[floor].view(1, 6, 1, 1).expand(1, -1, 4, 6).contiguous()
    got = book(shown, before, game, torch.tensor([[-1]]), torch.tensor([[15]]))
    assert torch.equal(got[0, :, 2, 3], book.cells_TC[first])
    got[0, :, 2, 3] = book.cells_TC[floor]
    assert torch.equal(got, before)


def test_players_come_back_as_recorded_ones_did(codec, walks, monkeypatch):
    """Drawn in other looks, one that comes back is shown in those that such ones had, once enough
    were seen; one that was on the map is not held to that."""
    frames, places = walks
    far = places.copy()
    far[:20, 0, 0] = -1
    _, number = tiles_of(frames, 4)
    first, second = number[0, 0, places[0, 0]]
    floor = 3 - first - second
    game, cells = torch.zeros(1, dtype=torch.int64), np.full(24, floor)
    cells[15] = second
    shown = []
    for enough in (21, 20):
        monkeypatch.setattr("worldgym.models.cellbook.RETURNS", enough)
        book = CellBook.of(codec, [frames], [far])
        book.cells_TC.copy_(9 * torch.eye(6)[:3])
        chance = book.chances(0, moved=True).exp()
        torch.testing.assert_close(chance.sum(1), torch.ones(4))
        assert (chance[3, second] == 0) == (enough == 20) and chance[first, second] > 0
        latents = book.cells_TC[torch.from_numpy(cells)].T.reshape(1, 6, 4, 6).contiguous()
        got = book(latents, latents, game, torch.tensor([[-1]]), torch.tensor([[15]]))
        shown.append(int((got[0, :, 2, 3] == book.cells_TC).all(1).nonzero()))
    assert shown == [second, first]


def test_walls_are_what_nobody_came_to(codec, walks, monkeypatch):
    frames, places = walks
    walled = frames.copy()
    walled[:, :, :4, 20:] = 77  # the last cell of the first row, shown 40 times
    stepped = (places % 24 == 5).any((1, 2))
    monkeypatch.setattr("worldgym.models.cellbook.SURE", 30)
    book = CellBook.of(codec, [walled[~stepped]], [places[~stepped]])
    latents = encoded(codec, walled[~stepped][:2, 0])
    at = torch.tensor([[5, int(places[~stepped][0, 1, 0])], [-1, 5]])
    game = torch.zeros(2, dtype=torch.int64)
    assert book.blocked(latents, game, at).tolist() == [[True, False], [False, True]]
    assert int(book.walls_T.sum()) == 1
    monkeypatch.setattr("worldgym.models.cellbook.SURE", 50)  # seen too seldom to be sure
    assert not CellBook.of(codec, [walled[~stepped]], [places[~stepped]]).walls_T.any()


def test_what_never_followed_a_tile_seen_often_never_does(codec, frames, monkeypatch):
    monkeypatch.setattr("worldgym.models.cellbook.SURE", 10)
    chance = CellBook.of(codec, frames, nobody(frames)).chances(0).exp()
    still = int(chance.diagonal().argmax())
    assert chance[still, still] == 1 and not chance[torch.arange(3) != still, still].any()


def test_a_game_recorded_without_players_draws_any_of_its_tiles_for_one(codec, frames):
    book = CellBook.of(codec, frames, nobody(frames))
    latents = encoded(codec, frames[0][:1, 1])
    at = torch.tensor([[5]])
    got = book(latents, latents, torch.zeros(1, dtype=torch.int64), at, at)
    torch.testing.assert_close(got, latents, rtol=0, atol=1e-5)


def test_standing():
    states = torch.zeros(1, 4, 7)
    states[0, :, 0], states[0, :, 1] = torch.tensor([-1.0, 0.99, 0.0, 0.0]), -0.6
    states[0, :, 6] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    valid = torch.tensor([[True, True, True, False]])
    assert standing(states, valid, (4, 6)).tolist() == [[0, 5, -1, -1]]
    assert standing(states[..., :2], valid, (4, 6)).tolist() == [[0, 5, 3, -1]]


def test_no_row_knows_its_batch(codec, frames):
    book = CellBook.of(codec, frames, nobody(frames))
    g = torch.Generator().manual_seed(1)
    latents, before = (torch.randn(7, *CODEC.latent_chw, generator=g) for _ in range(2))
    game = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    whole = drawn(book, latents, before, game)
    for i in range(7):
        part = slice(i, i + 1)
        assert torch.equal(drawn(book, latents[part], before[part], game[part])[0], whole[i])


def test_refusals(frames):
    with pytest.raises(ConfigError, match="no tiles"):
        CellBook.of(Codec(CodecConfig(frame_hw=(16, 24), stem=2)), frames, nobody(frames))
    noise = np.random.default_rng(0).integers(0, 256, (500, 2, 16, 24, 3), dtype=np.uint8)
    with pytest.raises(ConfigError, match="too many different tiles"):
        CellBook.of(Codec(CODEC), [frames[0], noise], nobody([frames[0], noise]))


def test_a_game_without_tiles_is_drawn_freely():
    book = CellBook(6, 0, (0, 0), 2)
    latents = torch.randn(2, 6, 3, 3)
    assert torch.equal(drawn(book, latents, latents, torch.tensor([0, 1])), latents)


# --------------------------------------------------------------------------- a world with one


def test_a_world_draws_its_tiles_only(tmp_path):
    """Every drawn cell is a tile of the slot's own game; tiles are part of what a world is."""
    world = party_nano.tiny(tiles=(12, 20, 5, 4))
    some = starts(world, 5)
    state, book = world.begin(some, range(5)), world.book
    for step in range(3):
        state, chunk = world.step(state, moves(world, 5, step))
    for row, game in zip(chunk.latents_BFChw[:, 0], some.game_B, strict=True):
        own = book.cells_TC[6 * game:6 * game + 6]
        assert (row.flatten(1).t()[:, None] == own).all(-1).any(1).all()
    made = party_nano.fresh(party_nano.PartyNanoConfig(
        name="tiled", dynamics=world.party.cfg, codec=world.codec.cfg, tiles=(12, 20, 5, 4),
        games=("game 0", "game 1"), outcome_width=8), 0)
    made.book.load_state_dict(book.state_dict())
    party_nano.save(made, tmp_path, {})
    again = party_nano.load(tmp_path)
    assert torch.equal(again.book.cells_TC, book.cells_TC) and again.book.prior == book.prior
    made.book.cells_TC += 1
    assert made.world().fingerprint != again.fingerprint


def test_nobody_goes_into_walls():
    """Where all is wall, all stay; but those that come onto the map."""
    world = party_nano.tiny(tiles=(12, 20, 5, 4), subjects=dict(facing=True))
    some = starts(world, 4, frames=2)
    some.subjects_BKNS[..., 6] = 1.0
    first, _ = world.step(world.begin(some, range(4)), moves(world, 4, 0))
    world.book.walls_T.fill_(True)
    state = world.begin(some, range(4))
    valid = state.extra["valid"]
    was = state.extra["subjects"][:, -1]
    state, _ = world.step(state, moves(world, 4, 0))
    now = state.extra["subjects"][:, -1]
    alive = valid & (now[..., 6] > 0)
    assert alive.any() and torch.equal(now[alive][:, :2], was[alive][:, :2])
    assert not torch.equal(first.extra["subjects"][:, -1][alive][:, :2], was[alive][:, :2])


def test_players_keep_their_looks():
    """Those that they have when they are last seen before it begins; others once they are."""
    world = party_nano.tiny(tiles=(12, 20, 5, 4), subjects=dict(facing=True))
    some, book = starts(world, 4, frames=2), world.book
    some = replace(some, length_B=np.array([2, 2, 2, 1]), null_BK=np.arange(2) < np.array(
        [[0], [0], [0], [1]]))
    some.subjects_BKNS[..., 6] = 1.0
    some.subjects_BKNS[:, 1, 0, 6] = -1.0  # just left the map
    some.subjects_BKNS[:, :, 1, 6] = -1.0  # never on it
    valid = torch.from_numpy(np.asarray(some.valid_BN))
    game = torch.from_numpy(np.asarray(some.game_B))
    seen = [book.looks(some.latents_BKChw[:, k].float(), game, standing(
        some.subjects_BKNS[:, k], valid, world.spec.latent_chw[1:])) for k in range(2)]
    seen[0][3] = -1  # begins with its second frame
    state = world.begin(some, range(4))
    look = state.extra["look"]
    assert (look[:, 1] == -1).all() and (look >= 0).any()
    assert torch.equal(look[:, 0], seen[0][:, 0])
    assert torch.equal(look[:, 2:], torch.where(seen[1] >= 0, seen[1], seen[0])[:, 2:])
    for number in range(6):
        state, chunk = world.step(state, moves(world, 4, number))
        at = standing(state.extra["subjects"][:, -1], valid, world.spec.latent_chw[1:])
        shown = book.looks(chunk.latents_BFChw[:, 0], game, at)
        kept = look >= 0
        assert torch.equal(state.extra["look"][kept], look[kept])
        assert torch.equal(state.extra["look"][~kept], shown[~kept])
        look = state.extra["look"]
