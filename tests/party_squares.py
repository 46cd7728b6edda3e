"""Recordings of a toy game of several players on a small square map, for tests."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import party_toy as toy  # noqa: E402

from worldgym.actions import ActionSpec  # noqa: E402
from worldgym.data.store import Episodes  # noqa: E402

SIDE, SLOTS, PLAYERS = 4, 4, 3
CELLS = (0.0, 0.0, 2 / SIDE, 2 / SIDE)


def episode(steps, seed):
    """A toy game as a recording: cells of 8 pixels, a free slot, who faces where he last went."""
    game = toy.Toy(1, np.random.default_rng(seed), toy.Rules(side=SIDE, walls=1))
    rng, rows = np.random.default_rng(seed + 1), steps + 1
    actions = np.full((rows, SLOTS), -1, np.int16)
    actions[1:, :PLAYERS] = rng.integers(0, 5, (steps, PLAYERS))
    frames, where, rewards = [], [], np.zeros((rows, SLOTS), np.float32)
    for f in range(rows):
        if f:
            rewards[f, :PLAYERS] = game.step(actions[f:f + 1, :PLAYERS])[0]
        picture = ((game.frame()[0].transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
        frames.append(picture.repeat(8, 0).repeat(8, 1))
        where.append(np.pad(game.states()[0], ((0, 1), (0, 0)), constant_values=np.nan))
    valid = np.arange(SLOTS) < PLAYERS
    turned = np.where(valid, np.maximum(actions, 1) - 1, -1).astype(np.int8)
    last = np.arange(rows) == steps
    return {"frames": np.stack(frames), "actions": actions, "rewards": rewards,
            "terminated": np.zeros(rows, bool), "truncated": last,
            "info_position": np.stack(where).astype(np.float32), "info_orientation": turned,
            "info_alive": valid[None].repeat(rows, 0), "info_valid": valid[None].repeat(rows, 0),
            "info_ended": np.zeros((rows, SLOTS), bool), "seed": None,
            "policy": "|".join(["random"] * PLAYERS)}


def recorded(folder):
    """An empty data set of such recordings."""
    return Episodes.create(folder, ActionSpec.discrete(5), (32, 32), 8.0,
                           {"recipe": {"frame_cells_hw": [SIDE, SIDE]}}, SLOTS)


def recorded_games(folder):
    """Data sets of two games of five episodes each in ``folder``; returns it."""
    for number, game in enumerate(("apples", "walls")):
        recorded(folder / game).append([episode(9 + i, 10 * number + i) for i in range(5)])
    return folder
