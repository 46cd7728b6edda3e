"""What chance alone brings: tiles that seldom turn into others, whoever stands near.

A sampler with a few passes below full temperature draws what is likely and leaves out what happens
in one of three hundred steps: ore that is mined never grows again. Such changes are known by their
being as frequent far from all players as beside them, and are drawn as often as recorded instead.
Shapes: B slot, P cell, K kind of change, R frame, N player, T tile.
"""

import numpy as np
import torch
from torch import Tensor, nn

FAR = 3  # cells from every player, along the longer axis: out of reach
SELDOM = 0.1  # more is nothing that a sampler leaves out
STAYS = 0.9  # a tile that goes by itself more often (a beam) shows nothing that grows
LEAST = 5  # times that a change was recorded far from players
EVEN = 0.5  # of its rate near players, that a change must have far from them


class Growth(nn.Module):
    """Changes of one tile into another by chance, and how likely they are in every place.

    Args:
        kinds: K of all games together. cells: P. games: how many.
    """

    tiles_K2: Tensor
    chance_KP: Tensor
    ends_G: Tensor

    def __init__(self, kinds: int, cells: int, games: int) -> None:
        super().__init__()
        self.register_buffer("tiles_K2", torch.zeros(kinds, 2, dtype=torch.int32))
        self.register_buffer("chance_KP", torch.zeros(kinds, cells))
        self.register_buffer("ends_G", torch.zeros(games, dtype=torch.int64))

    def __len__(self) -> int:
        """K."""
        return len(self.tiles_K2)

    def forward(self, drawn_BP: Tensor, was_BP: Tensor, free_BP: Tensor, game: int,
                draw_BP: Tensor) -> Tensor:
        """Tiles (B, P) of one game as drawn, but for what chance brings.

        Args:
            drawn_BP, was_BP: tiles now and before. free_BP: where nobody stands.
            draw_BP: uniform numbers in (0, 1). One below a cell's chance lets it change.
        """
        part = slice(int(self.ends_G[game - 1]) if game else 0, int(self.ends_G[game]))
        before, after = self.tiles_K2[part].long().unbind(1)
        if not len(before):
            return drawn_BP
        open_BPK = (was_BP[..., None] == before) & free_BP[..., None]
        by_itself = (open_BPK & (drawn_BP[..., None] == after)).any(-1)
        drawn_BP = torch.where(by_itself, was_BP, drawn_BP)  # when, says chance, not the drawing
        # changes of one tile share the numbers from 0 on; summed without the batch, for the bits
        chance_KP = self.chance_KP[part].double()
        below_KP = (before[:, None] == before).tril().double() @ chance_KP
        draw_BP1 = draw_BP[..., None]
        comes_BPK = open_BPK & (draw_BP1 < below_KP.T) & (draw_BP1 >= (below_KP - chance_KP).T)
        comes = comes_BPK.any(-1) & (drawn_BP == was_BP)
        return torch.where(comes, after[comes_BPK.int().argmax(-1)], drawn_BP)

    @classmethod
    def joined(cls, found: list[tuple[np.ndarray, np.ndarray]], cells: int) -> "Growth":
        """Of several games, from what ``grown`` found in each."""
        made = cls(sum(len(pairs) for pairs, _ in found), cells, len(found))
        made.tiles_K2.copy_(torch.from_numpy(np.concatenate([pairs for pairs, _ in found])))
        made.chance_KP.copy_(torch.from_numpy(np.concatenate([chance for _, chance in found])))
        made.ends_G.copy_(torch.tensor([len(pairs) for pairs, _ in found]).cumsum(0))
        return made


def grown(number_R2P: np.ndarray, places_R2N: np.ndarray,
          columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Changes by chance (K, 2) of recorded tiles, and the chance of each in every place (K, P).

    A place where a change was never seen does not have it; in all others it is equally likely.

    Args:
        number_R2P: tiles of frames and of those after them. places_R2N: cells of the players in
            them, -1: not on the map. columns: cells of a row.
    """
    away = _away(places_R2N, number_R2P.shape[2], columns)
    was, now = number_R2P[:, 0], number_R2P[:, 1]
    tiles = int(number_R2P.max()) + 1
    far, near = away >= FAR, (away > 0) & (away < FAR)
    there = [np.bincount(was[m], minlength=tiles) for m in (far, near)]
    stay = np.bincount(was[far & (was == now)], minlength=tiles) / np.maximum(there[0], 1)
    pair = np.where(was == now, -1, was.astype(np.int64) * tiles + now)
    kinds, chances = [], []
    for kind, count in zip(*np.unique(pair[far & (pair >= 0)], return_counts=True), strict=True):
        before = kind // tiles
        rate = count / there[0][before]
        beside = (near & (pair == kind)).sum() / max(1, there[1][before])
        if count < LEAST or not EVEN * beside <= rate < SELDOM or stay[before] < STAYS:
            continue
        seen, open_P = (((far | near) & m).sum(0) for m in (pair == kind, was == before))
        where = seen > 0
        kinds.append((before, kind % tiles))
        chances.append(where * (seen.sum() / open_P[where].sum()))
    return (np.array(kinds, np.int32).reshape(-1, 2),
            np.array(chances, np.float32).reshape(-1, number_R2P.shape[2]))


def _away(places_R2N: np.ndarray, cells: int, columns: int) -> np.ndarray:
    """Cells (R, P) from the nearest player, before or after, along the longer axis."""
    out = np.full((len(places_R2N), cells), cells)
    y, x = np.divmod(np.arange(cells), columns)
    for at in places_R2N.reshape(len(places_R2N), -1).T:
        on = at >= 0
        off = np.maximum(abs(at[on, None] // columns - y), abs(at[on, None] % columns - x))
        out[on] = np.minimum(out[on], off)
    return out
