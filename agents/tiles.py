"""Independent judges of multi-player frames: tile classifiers learned from recorded frames.

A frame is cut into map cells. Per game three small networks say which player a cell shows, where
a player faces, and whether it interacted (from the 3 x 3 cells around it, before and after, turned
so that it faces up): specs/actionparty.md section 6. They see real frames in training, roughened
by blur and noise, and never a dreamt one.
Legend: B frame, H W pixels, R C rows and columns of cells, P pixels of a cell, D numbers of a tile,
N player slot, X any rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym import checkpoint
from worldgym.envs.party_games import CELLS_HW, SLOTS
from worldgym.errors import CheckpointError, ConfigError

KIND = "worldgym.tiles"


@dataclass(frozen=True, kw_only=True, slots=True)
class TilesConfig:
    """How judges are learned.

    ``cell_px``: pixels of a cell, 8 (frames as recorded) or 4 (half the size); ``frames``: real
    frames of every game; ``batch``: cells, and players' steps, of an iteration; ``width``: of the
    hidden layers; ``noise``: largest standard deviation of the noise on training tiles, of colours
    in [0, 1]; ``blur``: largest share of the four neighbours' mean.
    """

    cell_px: int = 4
    frames: int = 3000
    iterations: int = 1200
    batch: int = 256
    width: int = 64
    rate: float = 3e-3
    noise: float = 0.04
    blur: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cell_px not in (4, 8) or min(self.frames, self.iterations, self.batch,
                                             self.width) < 1:
            raise ConfigError("impossible judges", given=f"cells of {self.cell_px} px, "
                              f"{self.frames} frames, {self.iterations} iterations",
                              expected="cells of 4 or 8 px, positive numbers",
                              fix="leave the numbers out")


class GameTiles(nn.Module):
    """The judges of one game.

    ``match``: colours are drawn anew for every episode, so a player is told by its own tile in a
    frame where its place is known (the reference); else every slot looks the same in all episodes.
    ``acts``: the game has an interact action.
    """

    def __init__(self, cell_px: int, width: int, match: bool, acts: bool = True) -> None:
        super().__init__()
        tile, self.match, self.acts = 3 * cell_px**2, match, acts
        self.who = _mlp(2 * tile if match else tile, width, 1 if match else 1 + SLOTS)
        self.facing = _mlp(tile, width // 2, 4)
        self.interact = _mlp(18 * tile, width // 2, 1)

    def presence(self, tiles_XD: Tensor, valid_XN: Tensor, refs_XND: Tensor | None) -> Tensor:
        """Logits (X, 1 + N): nobody, then every player; players that do not play are ruled out."""
        if self.match:
            if refs_XND is None:
                raise ConfigError("no reference tiles", given="None", expected="one per player",
                                  fix="give the tiles of a frame with known positions")
            pair = torch.cat([tiles_XD[:, None].expand_as(refs_XND), refs_XND], -1)
            logits = F.pad(self.who(pair)[..., 0], (1, 0))
        else:
            logits = self.who(tiles_XD)
        return logits.masked_fill(F.pad(~valid_XN, (1, 0)), -1e4)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                         nn.Linear(width, outputs))


def tiles_of(frames_BHWC: Tensor) -> Tensor:
    """Float frames as cells (B, R, C, P, P, 3)."""
    rows, columns = CELLS_HW
    return frames_BHWC.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).transpose(2, 3)


def as_float(frames_BHWC: np.ndarray | Tensor) -> Tensor:
    """Frames uint8 as float colours in [-1, 1]."""
    return torch.as_tensor(frames_BHWC).float() / 127.5 - 1


def at_cells(tiles_BRCPPc: Tensor, cells_BN2: Tensor) -> Tensor:
    """The tiles (B, N, D) of given cells (x, y)."""
    rows = torch.arange(len(tiles_BRCPPc))[:, None]
    return tiles_BRCPPc[rows, cells_BN2[..., 1], cells_BN2[..., 0]].flatten(2)


def around(tiles_BRCPPc: Tensor, cells_BN2: Tensor, facing_BN: Tensor) -> Tensor:
    """The 3 x 3 cells (B, N, 9 D) around given cells, turned so that ``facing`` is up."""
    padded = F.pad(tiles_BRCPPc, (0,) * 6 + (1, 1, 1, 1), value=-1.0)
    rows, x, y = torch.arange(len(padded))[:, None], cells_BN2[..., 0], cells_BN2[..., 1]
    near = torch.stack([torch.stack([padded[rows, y + dy, x + dx] for dx in range(3)], 2)
                        for dy in range(3)], 2)  # B N 3 3 P P c
    pixels = near.transpose(3, 4).flatten(2, 5)  # rows of 3 P pixels each
    side = 3 * near.shape[4]
    number = torch.arange(side * side).view(side, side)
    turned = torch.stack([number.rot90(k).flatten() for k in range(4)])[facing_BN]
    return pixels.gather(2, turned[..., None].expand_as(pixels)).flatten(2)


class Tiles:
    """The judges of all games.

    >>> tiles = Tiles({"coins": GameTiles(4, 16, match=True)}, TilesConfig(), {})
    >>> frames = np.zeros((1, 32, 40, 3), np.uint8)
    >>> valid, cells = np.ones((1, 8), bool), np.zeros((1, 8, 2), int)
    >>> tiles.find("coins", frames, valid, tiles.references(frames, cells)).shape
    (1, 8, 8, 10)
    """

    def __init__(self, games: Mapping[str, GameTiles], cfg: TilesConfig,
                 card: Mapping[str, Any]) -> None:
        self.games, self.cfg, self.card = dict(games), cfg, dict(card)

    def of(self, game: str) -> GameTiles:
        """The judges of a game, or ConfigError."""
        if game not in self.games:
            raise ConfigError("no judges for this game", given=game, expected=[*self.games],
                              fix="learn them: worldgym tiles --data FOLDER --out FILE")
        return self.games[game]

    def _cut(self, frames_BHWC: np.ndarray) -> Tensor:
        want = tuple(n * self.cfg.cell_px for n in CELLS_HW) + (3,)
        if np.shape(frames_BHWC)[1:] != want:
            raise ConfigError("frames have another size than these judges'",
                              given=np.shape(frames_BHWC)[1:], expected=want,
                              fix=f"learn judges for this size, not cell_px {self.cfg.cell_px}")
        return tiles_of(as_float(frames_BHWC))

    def references(self, frames_BHWC: np.ndarray, cells_BN2: np.ndarray) -> Tensor:
        """Tiles (B, N, D) that show the players, from frames with known places."""
        return at_cells(self._cut(frames_BHWC), torch.as_tensor(cells_BN2))

    @torch.no_grad()
    def find(self, game: str, frames_BHWC: np.ndarray, valid_BN: np.ndarray,
             refs_BND: Tensor | None = None) -> np.ndarray:
        """Chance (B, N, R, C) that a cell shows a player where that is the likeliest, else 0."""
        judge, tiles = self.of(game), self._cut(frames_BHWC).flatten(3)
        out = np.zeros((*np.shape(valid_BN), *CELLS_HW), np.float32)
        taken = np.flatnonzero(np.asarray(valid_BN).any(0))
        most = (int(taken.max(initial=-1)) + 1) if judge.match else SLOTS
        valid = torch.as_tensor(valid_BN)[:, :most]
        cells = CELLS_HW[0] * CELLS_HW[1]
        for i in range(0, len(tiles), 64):
            part = slice(i, i + 64)
            refs = None
            if judge.match and refs_BND is not None:
                refs = refs_BND[part, :most].repeat_interleave(cells, 0)
            logits = judge.presence(tiles[part].flatten(0, 2),
                                    valid[part].repeat_interleave(cells, 0), refs)
            best = F.one_hot(logits.argmax(1), logits.shape[1]) * logits.softmax(1)
            maps = best[:, 1:].unflatten(0, (-1, *CELLS_HW)).permute(0, 3, 1, 2)
            out[part, :most] = maps.numpy()
        return out

    @torch.no_grad()
    def facing(self, game: str, frames_BHWC: np.ndarray, cells_BN2: np.ndarray) -> np.ndarray:
        """Where the players in given cells face (B, N): 0 N 1 E 2 S 3 W."""
        tiles = at_cells(self._cut(frames_BHWC), torch.as_tensor(cells_BN2))
        return self.of(game).facing(tiles).argmax(-1).numpy()

    @torch.no_grad()
    def interacted(self, game: str, before_BHWC: np.ndarray, after_BHWC: np.ndarray,
                   cells_BN2: np.ndarray, facing_BN: np.ndarray) -> np.ndarray:
        """Whether the picture shows an interaction (B, N) of players at given places before."""
        where = torch.as_tensor(cells_BN2), torch.as_tensor(facing_BN)
        pair = [around(self._cut(frames), *where) for frames in (before_BHWC, after_BHWC)]
        return (self.of(game).interact(torch.cat(pair, -1))[..., 0] > 0).numpy()

    def save(self, path: str | Path) -> Path:
        """Write all judges as one safetensors file, in half precision, with their card."""
        tensors = {f"{game}.{name}": value.half() for game, judge in self.games.items()
                   for name, value in judge.state_dict().items()}
        return checkpoint.save(path, tensors, {
            "kind": KIND, "config": asdict(self.cfg), "card": self.card,
            "games": {game: [judge.match, judge.acts] for game, judge in self.games.items()}})

    @classmethod
    def load(cls, path: str | Path) -> Tiles:
        """Judges of a file that ``save`` wrote."""
        tensors, header = checkpoint.load_tensors(path)
        if header.get("kind") != KIND:
            raise CheckpointError("not a file of judges", given=f"{path} ({header.get('kind')})",
                                  expected=KIND, fix="write one: worldgym tiles --out FILE")
        cfg, games = TilesConfig(**header["config"]), {}
        for game, how in header["games"].items():
            judge = GameTiles(cfg.cell_px, cfg.width, *how)
            judge.load_state_dict({name[len(game) + 1:]: value.float()
                                   for name, value in tensors.items()
                                   if name.startswith(f"{game}.")})
            games[game] = judge.eval().requires_grad_(False)
        return cls(games, cfg, header["card"])


def shipped(cell_px: int) -> Path:
    """Where the judges that come with the package are, for this size of cells."""
    return Path(__file__).parent / "pretrained" / f"party_tiles_{cell_px}px.safetensors"
