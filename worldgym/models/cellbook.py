"""The tiles of recorded games, and drawn cells replaced by the likeliest of them.

A game of tiles shows few different ones, and a codec that sees each cell by itself
(``CodecConfig.local``) gives each its own latent. A sampler with a few passes leaves some cells
between two of them (a player half here, half there), and the next frame goes on from that: the
nearest recorded tile is what was meant.
Shapes: B slot, C channel, h w latent grid, T tile, G game, R frame, H W pixels, P pixels of a cell.
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
    """Latents of every game's recorded tiles, and how readily each stays or comes.

    ``forward`` gives each cell the tile t that maximises prior * log p(t | tile before) -
    |cell - t|^2: for Gaussian errors of the drawing with variance prior / 2, the likeliest one.
    p: the tile before stays with its own chance, or else any comes, as often as it came recorded.

    Args:
        channels: C. tiles: T of all games together. games: G. prior: see above, in squared units of
            the latents; 0: the nearest.
    """

    cells_TC: Tensor
    stay_T: Tensor
    come_T: Tensor
    ends_G: Tensor

    def __init__(self, channels: int, tiles: int, games: int, prior: float = 0.3) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("cells_TC", torch.zeros(tiles, channels))
        self.register_buffer("stay_T", torch.full((tiles,), 0.5))
        self.register_buffer("come_T", torch.ones(tiles))
        self.register_buffer("ends_G", torch.zeros(games, dtype=torch.int64))

    def __len__(self) -> int:
        """T."""
        return len(self.cells_TC)

    @torch.no_grad()
    def forward(self, latents_BChw: Tensor, before_BChw: Tensor, game_B: Tensor) -> Tensor:
        """Latents whose cells are recorded tiles of their slot's game; ``before``: one frame ago."""
        out = latents_BChw.clone()
        for game in game_B.unique().tolist():
            mine = slice(int(self.ends_G[game - 1]) if game else 0, int(self.ends_G[game]))
            if mine.start == mine.stop:
                continue
            rows = game_B == game
            best = self._best(_cells(latents_BChw[rows]), _cells(before_BChw[rows]), mine)
            count, channels, h, w = latents_BChw[rows].shape
            drawn = self.cells_TC[mine][best].view(count, h * w, channels)
            out[rows] = drawn.transpose(1, 2).reshape(count, channels, h, w)
        return out

    def _best(self, cells_NC: Tensor, before_NC: Tensor, mine: slice) -> Tensor:
        """Numbers (N,) of the likeliest tiles of one game."""
        tiles, stay, come = self.cells_TC[mine], self.stay_T[mine], self.come_T[mine]
        size = tiles.square().sum(1)
        was = F.linear(before_NC, 2 * tiles, -size).argmax(1, keepdim=True)
        near = F.linear(cells_NC, 2 * tiles, -size)
        goes = 1 - stay[was]
        score = near + self.prior * (goes * come).log()
        stays = (stay[was] + goes * come[was]).log()
        return score.scatter(1, was, near.gather(1, was) + self.prior * stays).argmax(1)

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
        made = cls(codec.cfg.channels, sum(len(t) for t, _ in found), len(found), prior)
        if len(made):
            chances = [_chances(number, len(tiles)) for tiles, number in found]
            made.cells_TC.copy_(torch.cat([_encoded(codec, tiles) for tiles, _ in found]))
            made.stay_T.copy_(torch.from_numpy(np.concatenate([x for x, _ in chances])))
            made.come_T.copy_(torch.from_numpy(np.concatenate([x for _, x in chances])))
        made.ends_G.copy_(torch.tensor([len(t) for t, _ in found]).cumsum(0))
        return made


def tiles_of(frames_RFHWC: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Different squares (T, side, side, 3) of these frames, and which is where (R, F, cells)."""
    r, f, height, width, _ = frames_RFHWC.shape
    squares = frames_RFHWC.reshape(r * f, height // side, side, width // side, side, 3)
    flat = squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side * 3)
    tiles, number = np.unique(flat, axis=0, return_inverse=True)
    return tiles.reshape(-1, side, side, 3), number.reshape(r, f, -1)


def _chances(number_R2P: np.ndarray, tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """How likely each tile stays (T,), and how likely each is what comes (T,), never 0 or 1."""
    before, after = number_R2P[:, 0].ravel(), number_R2P[:, 1].ravel()
    seen = np.bincount(before, minlength=tiles)
    stayed = np.bincount(before[before == after], minlength=tiles)
    came = np.bincount(after[before != after], minlength=tiles) + 0.5
    return (stayed + 0.5) / (seen + 1), came / came.sum()


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
