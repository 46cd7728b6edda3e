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
from worldgym.models.growth import Growth, grown

MOST = 20_000  # tiles of a game; more are no game of tiles
SURE = 1000  # showings of a tile
RETURNS = 100  # of players to the map
STRAY = 0.02  # of a tile's showings by players: where a recording's positions are a frame off


class CellBook(nn.Module):
    """Latents of every game's recorded tiles, and how often which followed which: in a place where
    nobody stands, and where a player was and where it is now.

    ``forward`` gives each cell the tile t that maximises prior * log p(t | tile before) -
    |cell - t|^2: for Gaussian errors of the drawing with variance prior / 2, the likeliest one.
    p: how often t followed that tile in recordings, with one more case, of any tile that ever came
    (in a place whose tile was seen ``SURE`` times and more, what never followed never does; nor
    do players, once ``RETURNS`` were seen, come back to the map as none ever did);
    where a player is told to be, the tile before is the one in the place that it came from. So a
    player is shown where one is told to be and nowhere else: a figure that nobody plays would stay
    and, seen by the next drawing, bring others. And it is shown in its own looks, where tiles tell
    the players of a recording apart: players that once took each other's colours never change back.
    What chance alone brings comes as often as recorded (see ``Growth``).

    Args:
        channels: C. tiles: T of all games together. pairs: different ones of all games that
            followed each other in one place without a player, and in those of one player.
            games: G. prior: see above, in squared units of the latents; 0: the nearest.
            grows: kinds of changes by chance, of all games, and cells of a frame.
    """

    cells_TC: Tensor
    looks_T: Tensor
    walls_T: Tensor
    pairs_M3: Tensor
    moves_M3: Tensor
    ends_G3: Tensor

    def __init__(self, channels: int, tiles: int, pairs: tuple[int, int], games: int,
                 prior: float = 0.3, grows: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.prior, self.growth = prior, Growth(*grows, games)
        self.register_buffer("cells_TC", torch.zeros(tiles, channels))
        # the one player that shows a tile in its game's recordings; -1: several, or none
        self.register_buffer("looks_T", torch.full((tiles,), -1, dtype=torch.int16))
        # tiles that recordings show often and that no player ever came to
        self.register_buffer("walls_T", torch.zeros(tiles, dtype=torch.bool))
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
            sure = torch.full_like(count[:, :1], torch.inf if moved else SURE)
            sure[size:] = RETURNS
            more = count.sum(1, keepdim=True) < sure
            count += more * came / came.sum()
            self._logs[key] = (count / count.sum(1, keepdim=True)).log()
        return self._logs[key]

    def _part(self, game: int, which: int) -> slice:
        return slice(int(self.ends_G3[game - 1, which]) if game else 0,
                     int(self.ends_G3[game, which]))

    @torch.no_grad()
    def looks(self, latents_BChw: Tensor, game_B: Tensor, at_BN: Tensor) -> Tensor:
        """Whose looks every player (B, N) has in these frames, int64; -1: it is not on the map, or
        what is shown there tells nobody apart. ``at_BN``: their cells (see ``standing``)."""
        return self._there(self.looks_T.long(), latents_BChw, game_B, at_BN)

    @torch.no_grad()
    def blocked(self, latents_BChw: Tensor, game_B: Tensor, at_BN: Tensor) -> Tensor:
        """Whether a wall is where a player (B, N) is told to be next, bool."""
        return self._there(self.walls_T.long(), latents_BChw, game_B, at_BN) > 0

    def _there(self, told_T: Tensor, latents_BChw: Tensor, game_B: Tensor, at_BN: Tensor) -> Tensor:
        """What is told of the tiles where players are (B, N); -1: nothing."""
        out = torch.full_like(at_BN, -1)
        for game in game_B.unique().tolist():
            told, rows = told_T[self._part(game, 0)], game_B == game
            if len(told):  # products of whole frames: a row's bits do not depend on the others
                shown = told[self._near(_cells(latents_BChw[rows]), game).argmax(1)]
                there = shown.view(int(rows.sum()), -1).gather(1, at_BN[rows].clamp(min=0))
                out[rows] = torch.where(at_BN[rows] >= 0, there, -1)
        return out

    def _near(self, cells_PC: Tensor, game: int) -> Tensor:
        """-|cell - tile|^2 of every tile of a game (P, tiles), but for a number per cell."""
        tiles = self.tiles(game)
        return F.linear(cells_PC, 2 * tiles, -tiles.square().sum(1))

    @torch.no_grad()
    def forward(self, latents_BChw: Tensor, before_BChw: Tensor, game_B: Tensor,
                from_BN: Tensor, to_BN: Tensor, look_BN: Tensor | None = None,
                draw_BP: Tensor | None = None) -> Tensor:
        """Each cell a recorded tile of its slot's game.

        Args:
            latents_BChw, before_BChw: this frame and the one before. game_B: games of the slots.
            from_BN, to_BN: cell of every player before and now (see ``standing``).
            look_BN: whose looks every player has (see ``looks``; None: nobody knows).
            draw_BP: uniform numbers in (0, 1) by which chance changes tiles (None: it does not).
        """
        look_BN = torch.full_like(to_BN, -1) if look_BN is None else look_BN
        out = latents_BChw.clone()
        for game in game_B.unique().tolist():
            tiles = self.tiles(game)
            if not len(tiles):
                continue
            rows = game_B == game
            mine = latents_BChw[rows]
            b, c, h, w = mine.shape
            score = self._near(_cells(mine), game)
            was = self._near(_cells(before_BChw[rows]), game).argmax(1)
            if self.prior:
                told = from_BN[rows], to_BN[rows], look_BN[rows]
                score = self._likeliest(game, score, was, *told)
            best = score.argmax(1).view(b, h * w)
            if draw_BP is not None:
                at = torch.where(to_BN[rows] < 0, h * w, to_BN[rows])  # one more cell: nowhere
                free = torch.ones(b, h * w + 1, dtype=torch.bool, device=at.device)
                free = free.scatter(1, at, False)[:, :-1]
                best = self.growth(best, was.view(b, h * w), free, game, draw_BP[rows])
            out[rows] = tiles[best].transpose(1, 2).reshape(b, c, h, w)
        return out

    def _likeliest(self, game: int, near: Tensor, was: Tensor, from_BN: Tensor, to_BN: Tensor,
                   look_BN: Tensor) -> Tensor:
        """``near`` (cells, tiles) and what the tiles before (cells) and the players make likely."""
        count, moves = len(was) // len(from_BN), self.chances(game, moved=True)
        slot, player = (to_BN >= 0).nonzero(as_tuple=True)
        before, now = (slot * count + x[slot, player] for x in (from_BN, to_BN))
        row = torch.where(from_BN[slot, player] >= 0, was[before], len(moves) - 1)
        player_XT = near[now] + self.prior * moves[row]
        own, anyone = self._own(game, look_BN)[slot, player], self.looks_T[self._part(game, 0)] < 0
        # looks like another player: not even what hides every player alike, which may be nearer
        other = ~(own | anyone).gather(1, player_XT.argmax(1, keepdim=True))
        own = torch.where(other & (own & (player_XT > -torch.inf)).any(1, keepdim=True), own,
                          own | anyone)
        player_XT = torch.where(own, player_XT, -torch.inf)
        score = near + self.prior * self.chances(game)[was]
        score[now] = -torch.inf
        # two told to be in one place: either of them, in no order
        return score.scatter_reduce(0, now[:, None].expand_as(player_XT), player_XT, "amax")

    def _own(self, game: int, look_BN: Tensor) -> Tensor:
        """Which tiles (B, N, tiles) are of a player's looks alone; where its looks are not known,
        of those that are no other player's."""
        looks = self.looks_T[self._part(game, 0)].long() + 1  # 0: nobody's
        many = int(max(looks.max(), look_BN.max() + 1)) + 1
        its = F.one_hot(look_BN + 1, many).bool()
        free = ~its.any(1, keepdim=True)
        own = torch.where(look_BN[..., None] < 0, free, its)
        own[..., 0] = False
        return own[..., looks]

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
        each = list(zip(found, places, strict=True))
        pair = [_counted(_stayed(number, at)) for (_, number), at in each]
        move = [_counted(_moved(number, at)) for (_, number), at in each]
        _, h, w = codec.cfg.latent_chw
        growth = Growth.joined([grown(number, at, w) for (_, number), at in each], h * w)
        made = cls(codec.cfg.channels, sum(len(t) for t, _ in found),
                   (sum(map(len, pair)), sum(map(len, move))), len(found), prior,
                   (len(growth), h * w))
        made.growth.load_state_dict(growth.state_dict())
        made.cells_TC.copy_(torch.cat([_encoded(codec, tiles) for tiles, _ in found]))
        for buffer, parts in (
                (made.looks_T, [_looks(number, at, len(tiles)) for (tiles, number), at in each]),
                (made.walls_T, [_walls(number, at, len(tiles)) for (tiles, number), at in each]),
                (made.pairs_M3, pair), (made.moves_M3, move)):
            buffer.copy_(torch.from_numpy(np.concatenate(parts)))
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


def _looks(number_R2P: np.ndarray, places_R2N: np.ndarray, tiles: int) -> np.ndarray:
    """The player (tiles,) that alone shows a tile, but for ``STRAY`` of the times; -1: none."""
    row, frame, player = np.nonzero(places_R2N >= 0)
    count = np.zeros((tiles, places_R2N.shape[2]), np.int64)
    np.add.at(count, (number_R2P[row, frame, places_R2N[row, frame, player]], player), 1)
    alone = count.max(1) > (1 - STRAY) * count.sum(1)
    return np.where(alone, count.argmax(1), -1)


def _walls(number_R2P: np.ndarray, places_R2N: np.ndarray, tiles: int) -> np.ndarray:
    """Tiles (tiles,) shown ``SURE`` times, by no player, that no player came to, bool."""
    row, frame, player = np.nonzero(places_R2N >= 0)
    at, entered = places_R2N[row, frame, player], np.zeros(tiles, bool)
    entered[number_R2P[row, frame, at]] = True  # what players show
    entered[number_R2P[row, 0, at][frame == 1]] = True
    return ~entered & (np.bincount(number_R2P[:, 0].ravel(), minlength=tiles) >= SURE)


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
