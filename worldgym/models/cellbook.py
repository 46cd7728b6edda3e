"""The tiles of recorded games, and drawn cells replaced by the likeliest of them.

A game of tiles shows few different ones, and a codec that sees each cell by itself
(``CodecConfig.local``) gives each its own latent. A sampler with a few passes leaves some cells
between two of them (a player half here, half there), and the next frame goes on from that: the
nearest recorded tile is what was meant. A player that moves takes its looks along: where the model
tells it to be now, the tile that it showed before says more than what the cell showed.
Shapes: B slot, C channel, h w latent grid, T tile, M pair of tiles, G game, R frame, N player,
H W pixels, P pixels of a cell.
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
    """Latents of every game's recorded tiles, and how often which followed which: in a place where
    nobody stands, and where a player was and where it is now.

    ``forward`` gives each cell the tile t that maximises prior * log p(t | tile before) -
    |cell - t|^2: for Gaussian errors of the drawing with variance prior / 2, the likeliest one.
    p: how often t followed that tile in recordings, with one more case, of any tile that ever came;
    where a player is told to be, the tile before is the one in the place that it came from. So a
    player is shown where one is told to be and nowhere else: a figure that nobody plays would stay
    and, seen by the next drawing, bring others.

    Args:
        channels: C. tiles: T of all games together. pairs: different ones of all games that
            followed each other in one place without a player, and in those of one player. games: G. prior: see
            above, in squared units of the latents; 0: the nearest.
    """

    cells_TC: Tensor
    pairs_M3: Tensor
    moves_M3: Tensor
    ends_G3: Tensor

    def __init__(self, channels: int, tiles: int, pairs: tuple[int, int], games: int,
                 prior: float = 0.3) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("cells_TC", torch.zeros(tiles, channels))
        # tile before and after, counted within the game, and how often: in a place, of a player
        # (which was not on the map before: as many as the game has tiles)
        self.register_buffer("pairs_M3", torch.zeros(pairs[0], 3, dtype=torch.int32))
        self.register_buffer("moves_M3", torch.zeros(pairs[1], 3, dtype=torch.int32))
        # where a game's tiles and pairs end
        self.register_buffer("ends_G3", torch.zeros(games, 3, dtype=torch.int64))
        self._logs: dict[tuple[int, int], Tensor] = {}
        self.register_load_state_dict_post_hook(lambda *_: self._logs.clear())

    def __len__(self) -> int:
        """T."""
        return len(self.cells_TC)

    def tiles(self, game: int) -> Tensor:
        """Latents (tiles, C) of one game."""
        return self.cells_TC[self._part(game, 0)]

    def chances(self, game: int, moved: bool = False) -> Tensor:
        """log p (tiles, tiles): row: the tile before, column: the tile after.

        ``moved``: those of a player, wherever it was and is, and in one row more those of one that
        was not on the map; else those of one place where nobody stands. -inf: tiles not recorded
        in such a place.
        """
        key = game, 1 + moved
        if key not in self._logs or self._logs[key].device != self.cells_TC.device:
            pairs = (self.moves_M3 if moved else self.pairs_M3)[self._part(*key)].long()
            size = len(self.tiles(game))
            count = self.cells_TC.new_zeros(size + moved, size)
            count[pairs[:, 0], pairs[:, 1]] = pairs[:, 2].to(count)
            seen = count.sum(0)
            seen += ~seen.any()  # nothing recorded at all: any tile
            came = (seen - (0 if moved else count.diagonal()) + 0.5) * (seen > 0)
            count += came / came.sum()
            self._logs[key] = (count / count.sum(1, keepdim=True)).log()
        return self._logs[key]

    def _part(self, game: int, which: int) -> slice:
        return slice(int(self.ends_G3[game - 1, which]) if game else 0,
                     int(self.ends_G3[game, which]))

    @torch.no_grad()
    def forward(self, latents_BChw: Tensor, before_BChw: Tensor, game_B: Tensor,
                from_BN: Tensor, to_BN: Tensor) -> Tensor:
        """Each cell a recorded tile of its slot's game.

        Args:
            latents_BChw, before_BChw: this frame and the one before. game_B: games of the slots.
            from_BN, to_BN: cell of every player before and now (see ``standing``).
        """
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
                score += self.prior * self._likely(game, was, from_BN[rows], to_BN[rows])
            b, c, h, w = mine.shape
            drawn = tiles[score.argmax(1)].view(b, h * w, c).transpose(1, 2)
            out[rows] = drawn.reshape(b, c, h, w)
        return out

    def _likely(self, game: int, was: Tensor, from_BN: Tensor, to_BN: Tensor) -> Tensor:
        """log p of every tile (cells, tiles); ``was``: the tiles before (cells)."""
        log, count = self.chances(game)[was], len(was) // len(from_BN)
        slot, player = (to_BN >= 0).nonzero(as_tuple=True)
        before, now = (slot * count + x[slot, player] for x in (from_BN, to_BN))
        moves = self.chances(game, moved=True)
        likely = moves[torch.where(from_BN[slot, player] >= 0, was[before], len(moves) - 1)]
        log[now] = -torch.inf
        # two told to be in one place: either of them, in no order
        return log.scatter_reduce(0, now[:, None].expand_as(likely), likely, "amax")

    @classmethod
    def of(cls, codec: Codec, pairs: Sequence[np.ndarray], places: Sequence[np.ndarray],
           prior: float = 0.3) -> "CellBook":
        """From frames and the frames after them, uint8 (R, 2, H, W, 3), of every game in turn, and
        the players' cells in them, int64 (R, 2, N), see ``standing``.

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
        pair = [_counted(_stayed(number, at)) for (_, number), at in zip(found, places, strict=True)]
        move = [_counted(_moved(number, at)) for (_, number), at in zip(found, places, strict=True)]
        made = cls(codec.cfg.channels, sum(len(t) for t, _ in found),
                   (sum(map(len, pair)), sum(map(len, move))), len(found), prior)
        made.cells_TC.copy_(torch.cat([_encoded(codec, tiles) for tiles, _ in found]))
        made.pairs_M3.copy_(torch.from_numpy(np.concatenate(pair)))
        made.moves_M3.copy_(torch.from_numpy(np.concatenate(move)))
        sizes = [(len(tiles), len(one), len(other)) for (tiles, _), one, other in zip(
            found, pair, move, strict=True)]
        made.ends_G3.copy_(torch.tensor(sizes).cumsum(0))
        return made


def tiles_of(frames_RFHWC: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Different squares (T, side, side, 3) of these frames, and which is where (R, F, cells)."""
    r, f, height, width, _ = frames_RFHWC.shape
    squares = frames_RFHWC.reshape(r * f, height // side, side, width // side, side, 3)
    flat = squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side * 3)
    tiles, number = np.unique(flat, axis=0, return_inverse=True)
    return tiles.reshape(-1, side, side, 3), number.reshape(r, f, -1)


def _counted(pairs_X2: np.ndarray) -> np.ndarray:
    """Different (tile before, tile after, how often) rows (M, 3)."""
    different, count = np.unique(pairs_X2, axis=0, return_counts=True)
    return np.concatenate([different, count[:, None]], 1)


def _stayed(number_R2P: np.ndarray, places_R2N: np.ndarray) -> np.ndarray:
    """Tiles (X, 2) of one place before and after, where nobody stands after."""
    free = np.ones((len(number_R2P), number_R2P.shape[2]), bool)
    row, player = np.nonzero(places_R2N[:, 1] >= 0)
    free[row, places_R2N[row, 1, player]] = False
    return number_R2P.transpose(0, 2, 1)[free]


def _moved(number_R2P: np.ndarray, places_R2N: np.ndarray) -> np.ndarray:
    """Tiles (X, 2) that players showed before and after, wherever they were and are; before is
    the number of tiles where a player was not on the map."""
    row, player = np.nonzero(places_R2N[:, 1] >= 0)
    was, now = (number_R2P[row, i, places_R2N[row, i, player]] for i in range(2))
    was = np.where(places_R2N[row, 0, player] >= 0, was, number_R2P.max() + 1)
    return np.stack([was, now], 1)


def standing(states_BNS: Tensor, valid_BN: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Cell of every player (B, N), counted row by row, -1: not on the map.

    ``states_BNS``: positions in [-1, 1] first; the seventh number, if there, tells who is alive.
    """
    h, w = grid_hw
    there = valid_BN & (states_BNS[..., 6] > 0) if states_BNS.shape[-1] > 2 else valid_BN
    size = torch.tensor([w, h], device=states_BNS.device)
    at = ((states_BNS[..., :2] + 1) / 2 * size).floor().long().clamp(min=0).minimum(size - 1)
    return torch.where(there, at[..., 1] * w + at[..., 0], -1)


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
