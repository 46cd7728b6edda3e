"""A book of tiles: what is in it, what it draws, and a world that plays with it."""

import numpy as np
import pytest
import torch

from worldgym.errors import ConfigError
from worldgym.models.cellbook import CellBook, tiles_of
from worldgym.models.codec import Codec, CodecConfig

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


def encoded(codec, frames):
    return codec.encode(torch.from_numpy(np.ascontiguousarray(frames)))


def test_tiles_are_found_and_told_apart(frames):
    tiles, number = tiles_of(frames[0], 4)
    assert tiles.shape == (3, 4, 4, 3) and number.shape == (30, 2, 24)
    again = tiles[number].reshape(30, 2, 4, 6, 4, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    assert (again.reshape(frames[0].shape) == frames[0]).all()


def test_recorded_frames_stay_and_blurred_ones_come_back(codec, frames):
    book = CellBook.of(codec, frames, prior=0.0)
    assert len(book) == 5 and book.ends_G2[:, 0].tolist() == [3, 5]
    before, latents = (torch.cat([encoded(codec, x[:, i]) for x in frames]) for i in range(2))
    game = torch.tensor([0] * 30 + [1] * 30)
    torch.testing.assert_close(book(latents, before, game), latents, rtol=0, atol=1e-5)
    g = torch.Generator().manual_seed(0)
    apart = min(float(torch.pdist(x).min()) for x in (book.cells_TC[:3], book.cells_TC[3:]))
    blurred = latents + 0.1 * apart * torch.randn(latents.shape, generator=g)
    torch.testing.assert_close(book(blurred, before, game), latents, rtol=0, atol=1e-5)
    other = book(latents, before, 1 - game)  # the other game's tiles, and no others
    own = book.cells_TC[3:]
    assert all(any(torch.equal(cell, t) for t in own) for cell in other[0].flatten(1).t())


def test_chances_are_those_of_the_recordings(codec, frames):
    """The first game's first tile stays, always; the others change into each other, by chance."""
    book = CellBook.of(codec, frames)
    chance = book.chances(0).exp()
    torch.testing.assert_close(chance.sum(1), torch.ones(3))
    still = int(chance.diagonal().argmax())
    others = [i for i in range(3) if i != still]
    assert chance[still, still] > 0.99
    assert all(0.1 < chance[i, j] < 0.9 for i in others for j in others)
    assert 0 < chance[others[0], still] < 0.01  # never seen, but not impossible
    drawn = [int((tiles_of(frames[0], 4)[1][:, 0] == i).sum()) for i in range(3)]
    mine = book.pairs_N3[:int(book.ends_G2[0, 1])]
    assert [int(mine[mine[:, 0] == i, 2].sum()) for i in range(3)] == drawn
    again = CellBook(6, len(book), len(book.pairs_N3), 2)
    assert again.prior == book.prior
    again.load_state_dict(book.state_dict())
    assert torch.equal(again.chances(1), book.chances(1))


def test_what_is_drawn_between_two_tiles_is_what_recordings_make_likely(codec, frames):
    """A tile that never changed stays; one that changes half of the time may go."""
    book, keen = (CellBook.of(codec, frames, prior=x) for x in (0.0, 10.0))
    still = int(keen.chances(0).diagonal().argmax())
    others = [i for i in range(3) if i != still]
    for made in (book, keen):
        made.cells_TC.copy_(3 * torch.eye(6)[:5])
    for before, drawn, meant in ((still, others[0], still), (others[0], others[1], others[1]),
                                 (others[1], still, others[1])):
        old, new = book.cells_TC[before], book.cells_TC[drawn]
        between = 0.45 * old + 0.55 * new
        given = [x[None, :, None, None].expand(1, -1, *CODEC.latent_chw[1:]).contiguous()
                 for x in (between, old)]
        game = torch.zeros(1, dtype=torch.int64)
        assert torch.equal(book(*given, game)[0, :, 0, 0], new)
        if meant != drawn:
            assert torch.equal(keen(*given, game)[0, :, 0, 0], book.cells_TC[meant])


def test_no_row_knows_its_batch(codec, frames):
    book = CellBook.of(codec, frames)
    g = torch.Generator().manual_seed(1)
    latents, before = (torch.randn(7, *CODEC.latent_chw, generator=g) for _ in range(2))
    game = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    whole = book(latents, before, game)
    for i in range(7):
        part = slice(i, i + 1)
        assert torch.equal(book(latents[part], before[part], game[part])[0], whole[i])


def test_refusals(frames):
    with pytest.raises(ConfigError, match="no tiles"):
        CellBook.of(Codec(CodecConfig(frame_hw=(16, 24), stem=2)), frames)
    noise = np.random.default_rng(0).integers(0, 256, (500, 2, 16, 24, 3), dtype=np.uint8)
    with pytest.raises(ConfigError, match="too many different tiles"):
        CellBook.of(Codec(CODEC), [frames[0], noise])


def test_a_game_without_tiles_is_drawn_freely():
    book = CellBook(6, 0, 0, 2)
    latents = torch.randn(2, 6, 3, 3)
    assert torch.equal(book(latents, latents, torch.tensor([0, 1])), latents)
