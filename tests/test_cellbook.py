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
    """Two games of three and two tiles; one tile of the first game is shown most."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    made = []
    for own, chances in ((tiles[:3], (0.8, 0.15, 0.05)), (tiles[3:], (0.5, 0.5))):
        grid = own[rng.choice(len(own), (30, 4, 6), p=chances)]
        made.append(grid.transpose(0, 1, 3, 2, 4, 5).reshape(30, 16, 24, 3))
    return made


def test_tiles_are_found_and_counted(frames):
    tiles, count = tiles_of(frames[0], 4)
    assert tiles.shape == (3, 4, 4, 3) and count.sum() == 30 * 24
    common = tiles[count.argmax()]
    squares = frames[0].reshape(30, 4, 4, 6, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    assert (squares == common).all((3, 4, 5)).sum() == count.max()


def test_recorded_frames_stay_and_blurred_ones_come_back(codec, frames):
    book = CellBook.of(codec, frames, prior=0.0)
    assert len(book) == 5 and book.ends_G.tolist() == [3, 5]
    latents = torch.cat([codec.encode(torch.from_numpy(x)) for x in frames])
    game = torch.tensor([0] * 30 + [1] * 30)
    torch.testing.assert_close(book(latents, game), latents, rtol=0, atol=1e-5)
    g = torch.Generator().manual_seed(0)
    apart = min(float(torch.pdist(x).min()) for x in (book.cells_TC[:3], book.cells_TC[3:]))
    blurred = latents + 0.1 * apart * torch.randn(latents.shape, generator=g)
    torch.testing.assert_close(book(blurred, game), latents, rtol=0, atol=1e-5)
    other = book(latents, 1 - game)  # the other game's tiles, and no others
    own = book.cells_TC[3:]
    assert all(any(torch.equal(cell, t) for t in own) for cell in other[0].flatten(1).t())


def test_between_two_tiles_the_frequent_one_is_meant(codec, frames):
    rare, common = (int(f(CellBook.of(codec, frames).chance_T[:3])) for f in (
        torch.argmin, torch.argmax))
    near, far = CellBook.of(codec, frames, prior=0.0), CellBook.of(codec, frames, prior=100.0)
    between = 0.55 * near.cells_TC[rare] + 0.45 * near.cells_TC[common]
    picture = between[None, :, None, None].expand(1, -1, *CODEC.latent_chw[1:]).contiguous()
    game = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(near(picture, game)[0, :, 0, 0], near.cells_TC[rare])
    assert torch.equal(far(picture, game)[0, :, 0, 0], near.cells_TC[common])


def test_no_row_knows_its_batch(codec, frames):
    book = CellBook.of(codec, frames)
    latents = torch.randn(7, *CODEC.latent_chw, generator=torch.Generator().manual_seed(1))
    game = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    whole = book(latents, game)
    for i in range(7):
        assert torch.equal(book(latents[i:i + 1], game[i:i + 1])[0], whole[i])


def test_refusals(frames):
    with pytest.raises(ConfigError, match="no tiles"):
        CellBook.of(Codec(CodecConfig(frame_hw=(16, 24), stem=2)), frames)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 16, 24, 3), dtype=np.uint8)
    with pytest.raises(ConfigError, match="too many different tiles"):
        CellBook.of(Codec(CODEC), [frames[0], noise])


def test_a_game_without_tiles_is_drawn_freely():
    book = CellBook(6, 0, 2)
    latents = torch.randn(2, 6, 3, 3)
    assert torch.equal(book(latents, torch.tensor([0, 1])), latents)
