"""The tiles of recorded games, and drawn cells replaced by the likeliest of them.

A game of tiles shows few different ones, and a codec that sees each cell by itself
(``CodecConfig.local``) gives each its own latent. A sampler with a few passes leaves some cells
between two of them (a player half here, half there), and the next frame goes on from that: the
nearest recorded tile is what was meant.
Shapes: B slot, C channel, h w latent grid, T tile, N pair of tiles, G game, R frame, H W pixels,
P pixels of a cell.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.errors import ConfigError
from worldgym.models.codec import Codec

MOST = 20_000  # tiles of a game; more are no game of tiles


class CellBook(nn.Module):
    """Latents of every game's recorded tiles, and how often which followed which.

    ``forward`` gives each cell the tile t that maximises prior * log p(t | tile before) -
    |cell - t|^2: for Gaussian errors of the drawing with variance prior / 2, the likeliest one.
    p: how often t followed that tile in recordings, with one more case, of any tile that ever came.

    Args:
        channels: C. tiles: T of all games together. pairs: N different ones of all games that
            followed each other. games: G. prior: see above, in squared units of the latents;
            0: the nearest.
    """

    cells_TC: Tensor
    pairs_N3: Tensor
    ends_G2: Tensor

    def __init__(self, channels: int, tiles: int, pairs: int, games: int,
                 prior: float = 0.3) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("cells_TC", torch.zeros(tiles, channels))
        # tile before and after, counted within the game, and how often
        self.register_buffer("pairs_N3", torch.zeros(pairs, 3, dtype=torch.int32))
        # where a game's tiles and pairs end
        self.register_buffer("ends_G2", torch.zeros(games, 2, dtype=torch.int64))
        self._logs: dict[int, Tensor] = {}
        self.register_load_state_dict_post_hook(lambda *_: self._logs.clear())

    def __len__(self) -> int:
        """T."""
        return len(self.cells_TC)

    def tiles(self, game: int) -> Tensor:
        """Latents (tiles, C) of one game."""
        return self.cells_TC[self._part(game, 0)]

    def chances(self, game: int) -> Tensor:
        """log p (tiles, tiles): row: the tile before, column: the tile after."""
        if game not in self._logs or self._logs[game].device != self.cells_TC.device:
            pairs, size = self.pairs_N3[self._part(game, 1)].long(), len(self.tiles(game))
            count = self.cells_TC.new_zeros(size, size)
            count[pairs[:, 0], pairs[:, 1]] = pairs[:, 2].to(count)
            came = count.sum(0) - count.diagonal() + 0.5
            count += came / came.sum()
            self._logs[game] = (count / count.sum(1, keepdim=True)).log()
        return self._logs[game]

    def _part(self, game: int, which: int) -> slice:
        return slice(int(self.ends_G2[game - 1, which]) if game else 0,
                     int(self.ends_G2[game, which]))

    @torch.no_grad()
    def forward(self, latents_BChw: Tensor, before_BChw: Tensor, game_B: Tensor) -> Tensor:
        """Each cell a recorded tile of its slot's game; ``before``: the frame before this one."""
        out = latents_BChw.clone()
        for game in game_B.unique().tolist():
            tiles = self.tiles(game)
            if not len(tiles):
                continue
            rows = game_B == game
            mine, twice, size = latents_BChw[rows], 2 * tiles, tiles.square().sum(1)
            score = F.linear(_cells(mine), twice, -size)
            if self.prior:
                was = F.linear(_cells(before_BChw[rows]), twice, -size).argmax(1)
                score += self.prior * self.chances(game)[was]
            b, c, h, w = mine.shape
            drawn = tiles[score.argmax(1)].view(b, h * w, c).transpose(1, 2)
            out[rows] = drawn.reshape(b, c, h, w)
        return out

    @classmethod
    def of(cls, codec: Codec, pairs: Sequence[np.ndarray], prior: float = 0.3) -> "CellBook":
        """From frames and the frames after them, uint8 (R, 2, H, W, 3), of every game in turn.

        Raises:
            ConfigError: the codec's cells see each other, or no game of tiles is shown.
        """
        if not codec.cfg.local:
            raise ConfigError("cells of this codec are no tiles", given="local=False",
                              expected="a codec that sees each cell by itself",
                              fix="set CodecConfig.local, or keep no book of tiles")
        found = [tiles_of(x, codec.cfg.cell) for x in pairs]
        most = max(len(tiles) for tiles, _ in found)
        if most > MOST:
            raise ConfigError("too many different tiles", given=f"{most} in one game",
                              expected=f"at most {MOST}", fix="keep no book of tiles")
        counted = [_counted(number) for _, number in found]
        made = cls(codec.cfg.channels, sum(len(t) for t, _ in found), sum(map(len, counted)),
                   len(found), prior)
        made.cells_TC.copy_(torch.cat([_encoded(codec, tiles) for tiles, _ in found]))
        made.pairs_N3.copy_(torch.from_numpy(np.concatenate(counted)))
        sizes = [(len(tiles), len(some)) for (tiles, _), some in zip(found, counted, strict=True)]
        made.ends_G2.copy_(torch.tensor(sizes).cumsum(0))
        return made


def tiles_of(frames_RFHWC: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Different squares (T, side, side, 3) of these frames, and which is where (R, F, cells)."""
    r, f, height, width, _ = frames_RFHWC.shape
    squares = frames_RFHWC.reshape(r * f, height // side, side, width // side, side, 3)
    flat = squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side * 3)
    tiles, number = np.unique(flat, axis=0, return_inverse=True)
    return tiles.reshape(-1, side, side, 3), number.reshape(r, f, -1)


def _counted(number_R2P: np.ndarray) -> np.ndarray:
    """Different (tile, tile in the same place one frame on, how often) rows (N, 3)."""
    pairs = number_R2P.transpose(0, 2, 1).reshape(-1, 2)
    different, count = np.unique(pairs, axis=0, return_counts=True)
    return np.concatenate([different, count[:, None]], 1)


def _cells(latents_BChw: Tensor) -> Tensor:
    return latents_BChw.flatten(2).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def _encoded(codec: Codec, tiles_TPP3: np.ndarray) -> Tensor:
    """Latents (T, C) of tiles, laid out as frames."""
    channels, h, w = codec.cfg.latent_chw
    side, count = codec.cfg.cell, len(tiles_TPP3)
    frames = -(-count // (h * w))
    filled = np.zeros((frames * h * w, side, side, 3), np.uint8)
    filled[:count] = tiles_TPP3
    filled = filled.reshape(frames, h, w, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    pixels = torch.from_numpy(filled.reshape(frames, h * side, w * side, 3).copy())
    latents = torch.cat([codec.encode(part) for part in pixels.split(256)])
    return latents.permute(0, 2, 3, 1).reshape(-1, channels)[:count]
