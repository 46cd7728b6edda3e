"""A toy party: coloured squares on a grid, one action each; and how well a model binds them.

``python tests/party_toy.py --minutes 3`` trains a small model on one core and prints its figures.
Shapes: B episode, F frame, N player, C colour channel. A cell is one latent cell: latents are the
cells' colours in [-1, 1], so that no codec is needed. All moves happen at once; a square does not
move into the border, a wall, a cell that was taken, or a cell that another one wants.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDE, PLAYERS, WALLS = 6, 3, 3
MOVES = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])  # x, y: stay, up, down, left, right
COLOURS = np.array([[1, -.9, -.9], [-.9, 1, -.9], [-.9, -.9, 1], [1, 1, -.9], [1, -.9, 1],
                    [-.9, 1, 1]])
FLOOR, WALL, COIN = np.array([-.8, -.8, -.8]), np.array([0, 0, 0.]), np.array([1, 1, 1.])


class Toy:
    """A batch of games: positions ``at_BN2`` (x, y), walls and one coin each."""

    def __init__(self, batch: int, rng: np.random.Generator, players: int = PLAYERS) -> None:
        count = players + WALLS + 1
        cells = np.argsort(rng.random((batch, SIDE * SIDE)), 1)[:, :count]
        place = np.stack([cells % SIDE, cells // SIDE], -1)
        self.at_BN2, self.walls, self.coin = place[:, :players], place[:, players:-1], place[:, -1]
        self.paint = COLOURS[np.argsort(rng.random((batch, len(COLOURS))), 1)[:, :players]]
        self.left = np.ones(batch, bool)  # the coin is there

    def step(self, actions_BN: np.ndarray) -> np.ndarray:
        """Move all players; returns rewards (B, N): 1 for taking the coin."""
        want = self.at_BN2 + MOVES[np.maximum(actions_BN, 0)]
        same = (want[:, :, None] == self.at_BN2[:, None]).all(-1)
        clash = (want[:, :, None] == want[:, None]).all(-1)
        own = np.eye(want.shape[1], dtype=bool)
        into = (want[:, :, None] == self.walls[:, None]).all(-1).any(-1)
        ok = ~((same & ~own) | (clash & ~own)).any(-1) & ~into
        ok &= ((want >= 0) & (want < SIDE)).all(-1)
        self.at_BN2 = np.where(ok[..., None], want, self.at_BN2)
        takes = (self.at_BN2 == self.coin[:, None]).all(-1) & self.left[:, None]
        self.left &= ~takes.any(1)
        return takes.astype(np.float32)

    def frame(self) -> np.ndarray:
        """Colours (B, 3, side, side)."""
        b = len(self.left)
        out = np.tile(FLOOR, (b, SIDE, SIDE, 1))
        rows = np.arange(b)[:, None]
        out[rows, self.walls[..., 1], self.walls[..., 0]] = WALL
        out[rows[self.left, 0], self.coin[self.left, 1], self.coin[self.left, 0]] = COIN
        out[rows, self.at_BN2[..., 1], self.at_BN2[..., 0]] = self.paint
        return out.transpose(0, 3, 1, 2).astype(np.float32)

    def states(self) -> np.ndarray:
        """Positions (B, N, 2) in [-1, 1]."""
        return (2 * (self.at_BN2 + 0.5) / SIDE - 1).astype(np.float32)


def clips(batch: int, frames: int, seed, players: int = PLAYERS) -> dict[str, torch.Tensor]:
    """Random play as a training batch."""
    rng = np.random.default_rng(seed)
    toy = Toy(batch, rng, players)
    actions = rng.integers(0, len(MOVES), (batch, frames, players))
    actions[:, 0] = -1
    latents, states, rewards = [toy.frame()], [toy.states()], [np.zeros((batch, players), "f")]
    for f in range(1, frames):
        rewards.append(toy.step(actions[:, f]))
        latents.append(toy.frame())
        states.append(toy.states())
    made = {"latents_BFChw": np.stack(latents, 1), "states_BFNS": np.stack(states, 1),
            "actions_BFN": actions, "valid_BN": np.ones((batch, players), bool),
            "rewards_BFN": np.stack(rewards, 1), "ended_BFN": np.zeros(actions.shape, bool)}
    return {k: torch.from_numpy(v) for k, v in made.items()}
