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
    """Latents of every game's recorded tiles, and how often each was seen.

    ``forward`` gives each cell the tile t that maximises log p(t) * prior - |cell - t|^2: for
    Gaussian errors of the drawing with variance prior / 2, the likeliest one.

    Args:
        channels: C. tiles: T of all games together. games: G. prior: see above, in squared units of
            the latents; 0: the nearest.
    """

    cells_TC: Tensor
    chance_T: Tensor
    ends_G: Tensor

    def __init__(self, channels: int, tiles: int, games: int, prior: float = 0.3) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("cells_TC", torch.zeros(tiles, channels))
        self.register_buffer("chance_T", torch.ones(tiles))
        self.register_buffer("ends_G", torch.zeros(games, dtype=torch.int64))

    def __len__(self) -> int:
        """T."""
        return len(self.cells_TC)

    @torch.no_grad()
    def forward(self, latents_BChw: Tensor, game_B: Tensor) -> Tensor:
        """The same latents, each cell a recorded tile of its slot's game."""
        out = latents_BChw.clone()
        for game in game_B.unique().tolist():
            end = int(self.ends_G[game])
            mine = slice(int(self.ends_G[game - 1]) if game else 0, end)
            if mine.start == end:
                continue
            rows = game_B == game
            cells = latents_BChw[rows].flatten(2).transpose(1, 2)
            tiles = self.cells_TC[mine]
            offset = self.prior * self.chance_T[mine].log() - tiles.square().sum(1)
            best = F.linear(cells.flatten(0, 1), 2 * tiles, offset).argmax(1)
            drawn = tiles[best].view(cells.shape).transpose(1, 2)
            out[rows] = drawn.reshape(-1, *latents_BChw.shape[1:])
        return out

    @classmethod
    def of(cls, codec: Codec, frames: Sequence[np.ndarray], prior: float = 0.3) -> "CellBook":
        """From frames uint8 (R, H, W, 3) of every game in turn.

        Raises:
            ConfigError: the codec's cells see each other, or no game of tiles is shown.
        """
        if not codec.cfg.local:
            raise ConfigError("cells of this codec are no tiles", given="local=False",
                              expected="a codec that sees each cell by itself",
                              fix="set CodecConfig.local, or keep no book of tiles")
        found = [tiles_of(x, codec.cfg.cell) for x in frames]
        most = max(len(tiles) for tiles, _ in found)
        if most > MOST:
            raise ConfigError("too many different tiles", given=f"{most} in one game",
                              expected=f"at most {MOST}", fix="keep no book of tiles")
        made = cls(codec.cfg.channels, sum(len(t) for t, _ in found), len(found), prior)
        if len(made):
            made.cells_TC.copy_(torch.cat([_encoded(codec, tiles) for tiles, _ in found]))
            made.chance_T.copy_(torch.cat([torch.from_numpy(n / n.sum()) for _, n in found]))
        made.ends_G.copy_(torch.tensor([len(t) for t, _ in found]).cumsum(0))
        return made


def tiles_of(frames_RHWC: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Different squares (T, side, side, 3) of these frames, and how often each is there (T,)."""
    r, height, width, _ = frames_RHWC.shape
    squares = frames_RHWC.reshape(r, height // side, side, width // side, side, 3)
    flat = squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side * 3)
    tiles, count = np.unique(flat, axis=0, return_counts=True)
    return tiles.reshape(-1, side, side, 3), count


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
