"""Learning the judges of action binding from recorded frames, and trying them on held-out ones.

The simulator draws a cell in some hundred ways; cells are drawn for training by the square root of
how often each way was seen, so that the judges know the rare ones, too.
Legend: B frame, X drawn cell or step, P pixels of a cell, D numbers of a tile, N player slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from worldgym.agents.results import about
from worldgym.agents.tiles import (
    GameTiles,
    Tiles,
    TilesConfig,
    around,
    as_float,
    at_cells,
    tiles_of,
)
from worldgym.agents.tiles_data import Pairs, draw_pairs
from worldgym.data.store import Episodes
from worldgym.envs.party_games import CELLS_HW, INTERACT, NOOP

UNUSABLE = 0.95  # a judge that is right less often than this on real frames is told so


def learn_tiles(stores: Mapping[str, Episodes], train: Mapping[str, np.ndarray],
                held_out: Mapping[str, np.ndarray], cfg: TilesConfig | None = None,
                progress: bool = False) -> Tiles:
    """Learn the judges of every game from ``train`` episodes and try them on ``held_out`` ones.

    The card holds, per game, what ``validate`` found on held-out real frames.
    """
    cfg = cfg or TilesConfig()
    games = {}
    with tqdm(total=len(stores) * cfg.iterations, unit=" it", disable=not progress) as bar:
        for number, (game, store) in enumerate(stores.items()):
            bar.set_description(game)
            rng = np.random.default_rng([cfg.seed, number])
            pairs = draw_pairs(store, train[game], cfg.frames, rng, cfg.cell_px)
            recipe = store.env.get("recipe", {})
            judge = GameTiles(cfg.cell_px, cfg.width, bool(recipe.get("redraw", False)),
                              recipe.get("interact", INTERACT) != NOOP)
            games[game] = _Lesson(judge, pairs, cfg, rng).learn(bar)
    tiles = Tiles(games, cfg, {})
    tiles.card.update(about(), real_frames=validate(tiles, stores, held_out),
                      held_out={game: len(held_out[game]) for game in stores})
    return tiles


class _Lesson:
    """Fits the three networks of one game."""

    def __init__(self, judge: GameTiles, pairs: Pairs, cfg: TilesConfig,
                 rng: np.random.Generator) -> None:
        self.judge, self.pairs, self.cfg, self.rng = judge, pairs, cfg, rng
        self.generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        taken = np.flatnonzero(np.asarray(pairs.valid_BN).any(0))
        self.count = int(taken.max()) + 1  # slots that are ever taken
        alive = pairs.alive_BFN[:, 1]
        b, n = np.nonzero(alive)
        x, y = pairs.cells_BFN2[b, 1, n].T
        self.who = np.zeros((len(pairs), *CELLS_HW), np.int64)
        self.looks = np.zeros_like(self.who)
        self.who[b, y, x], self.looks[b, y, x] = n + 1, pairs.facing_BFN[b, 1, n]
        self.padded = [np.pad(f, ((0, 0), *[(cfg.cell_px, cfg.cell_px)] * 2, (0, 0)))
                       for f in (pairs.before_BHWC, pairs.after_BHWC)]
        self.chance = self._chances()
        self.acts_X2 = np.argwhere(pairs.alive_BFN[:, 0] & (pairs.actions_BN >= 0))

    def _chances(self) -> np.ndarray:
        """Running sum of the chances of all cells of all frames."""
        tiles = tiles_of(torch.as_tensor(self.pairs.after_BHWC)).flatten(3).flatten(0, 2).numpy()
        # equal tiles have equal products with random numbers; whole numbers: exact
        key = np.random.default_rng(0).integers(1, 2**40, tiles.shape[1])
        number = tiles.astype(np.int64) @ key * 16 + self.who.ravel()
        _, which, seen = np.unique(number, return_inverse=True, return_counts=True)
        return np.cumsum(1 / np.sqrt(seen[which]))

    def learn(self, bar: Any) -> GameTiles:
        """The fitted judge."""
        cfg, judge = self.cfg, self.judge
        for p in judge.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p, generator=self.generator)
            else:
                nn.init.zeros_(p)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=cfg.rate, weight_decay=1e-4)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.rate, cfg.iterations + 1)
        for _ in range(cfg.iterations):
            loss = self._cells()
            if judge.acts:
                loss = loss + self._steps()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
            bar.update(1)
        return judge.eval().requires_grad_(False)

    def _cells(self) -> Tensor:
        """Loss of who is in drawn cells, and where those face."""
        draw = self.rng.random(self.cfg.batch) * self.chance[-1]
        b, y, x = np.unravel_index(np.searchsorted(self.chance, draw, side="right"),
                                   self.who.shape)
        tiles = self._rough(as_float(self._cut(self.padded[1], b, y + 1, x + 1))).flatten(1)
        who, looks = (torch.as_tensor(a[b, y, x]) for a in (self.who, self.looks))
        valid, refs = torch.as_tensor(self.pairs.valid_BN[b]), None
        if self.judge.match:
            mates = self.pairs.rows(self.pairs.mates(b, self.rng))
            valid = valid[:, :self.count]
            refs = at_cells(tiles_of(as_float(mates.after_BHWC)),
                            torch.as_tensor(mates.cells_BFN2[:, 1, :self.count]))
        loss = F.cross_entropy(self.judge.presence(tiles, valid, refs), who)
        there = who > 0
        if not there.any():
            return loss
        return loss + F.cross_entropy(self.judge.facing(tiles[there]), looks[there])

    def _steps(self) -> Tensor:
        """Loss of whether players interacted in drawn steps."""
        b, n = self.acts_X2[self.rng.integers(len(self.acts_X2), size=self.cfg.batch)].T
        x, y = self.pairs.cells_BFN2[b, 0, n].T
        facing = torch.as_tensor(self.pairs.facing_BFN[b, 0, n])[:, None]
        middle = torch.ones(len(b), 1, 2, dtype=torch.long)
        pair = []
        for frames in self.padded:
            near = np.stack([np.stack([self._cut(frames, b, y + i, x + j) for j in range(3)], 1)
                             for i in range(3)], 1)
            pair.append(around(as_float(near), middle, facing)[:, 0])
        both = torch.cat(pair, -1)
        scale = torch.rand((len(b), 1), generator=self.generator) * 2 * self.cfg.noise
        both = both + scale * torch.randn(both.shape, generator=self.generator)
        did = torch.as_tensor(self.pairs.actions_BN[b, n] == INTERACT).float()
        return F.binary_cross_entropy_with_logits(self.judge.interact(both)[:, 0], did)

    def _cut(self, padded_BHWC: np.ndarray, b: np.ndarray, y: np.ndarray,
             x: np.ndarray) -> np.ndarray:
        """Single tiles (X, P, P, 3) of padded frames."""
        px, (rows, columns) = self.cfg.cell_px, CELLS_HW
        cells = padded_BHWC.reshape(len(padded_BHWC), rows + 2, px, columns + 2, px, 3)
        return cells[b, y, :, x]

    def _rough(self, tiles_XPPc: Tensor) -> Tensor:
        """Tiles with a random amount of blur and noise each, so that judges stand imperfect ones;
        half of them are not blurred."""
        shape, g = (len(tiles_XPPc), 1, 1, 1), self.generator
        near = torch.zeros_like(tiles_XPPc)
        for axis in (1, 2):
            size = tiles_XPPc.shape[axis]
            for by in (-1, 1):
                index = (torch.arange(size) + by).clamp(0, size - 1)
                near += tiles_XPPc.index_select(axis, index) / 4
        share = (torch.rand(shape, generator=g) * 2 - 1).clamp(0) * self.cfg.blur
        x = tiles_XPPc + share * (near - tiles_XPPc)
        scale = torch.rand(shape, generator=g) * 2 * self.cfg.noise  # colours are in [-1, 1]
        x = x + scale * torch.randn(x.shape, generator=g)
        return x + (torch.rand(shape, generator=g) - 0.5) * self.cfg.noise


def validate(tiles: Tiles, stores: Mapping[str, Episodes], ids: Mapping[str, np.ndarray],
             frames: int = 1000) -> dict[str, dict[str, float]]:
    """How often the judges are right on real frames of these episodes, per game.

    ``presence``: share of players on the map found in their cell and there only; ``missed``: shown
    in no cell; ``strays``: tiles of players where there are none, per frame; ``facing``;
    ``interact_seen``: share of interact actions with a visible effect; ``interact_false``: of other
    actions taken for one; ``usable``: presence and facing are right at least 95 times in 100.
    """
    found = {}
    for number, (game, store) in enumerate(stores.items()):
        judge = tiles.of(game)
        pairs = draw_pairs(store, ids[game], frames, np.random.default_rng([1, number]),
                           tiles.cfg.cell_px)
        mates = pairs.rows(pairs.mates(np.arange(len(pairs)), np.random.default_rng(2)))
        refs = tiles.references(mates.after_BHWC, mates.cells_BFN2[:, 1])
        seen = tiles.find(game, pairs.after_BHWC, pairs.valid_BN, refs) > 0
        cells, alive = pairs.cells_BFN2[:, 1], pairs.alive_BFN[:, 1]
        b, n = np.nonzero(alive)
        right = seen[b, n, cells[b, n, 1], cells[b, n, 0]]
        count = seen.sum((2, 3))
        facing = tiles.facing(game, pairs.after_BHWC, cells)
        did = tiles.interacted(game, pairs.before_BHWC, pairs.after_BHWC, pairs.cells_BFN2[:, 0],
                               pairs.facing_BFN[:, 0])
        acts = pairs.alive_BFN[:, 0] & (pairs.actions_BN >= 0)
        one, other = acts & (pairs.actions_BN == INTERACT), acts & (pairs.actions_BN != INTERACT)
        scores = {
            "presence": float((right & (count[b, n] == 1)).mean()),
            "missed": float((count[b, n] == 0).mean()),
            "strays": float((seen.sum() - right.sum()) / len(seen)),
            "facing": float((facing == pairs.facing_BFN[:, 1])[alive].mean())}
        if judge.acts and one.any():
            scores |= {"interact_seen": float(did[one].mean()),
                       "interact_false": float(did[other].mean())}
        scores["usable"] = float(min(scores["presence"], scores["facing"]) >= UNUSABLE)
        found[game] = {k: round(v, 4) for k, v in scores.items()}
    return found
