"""A tiny random world of two known games, and its starts, for tests of the multi-agent face."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from worldgym.envs.party_games import GAMES
from worldgym.envs.party_scene import positions
from worldgym.envs.party_tasks import PartyTask
from worldgym.models import party_nano
from worldgym.models.codec import CodecConfig
from worldgym.models.party import nano_config
from worldgym.state import Starts


class Bank:
    """Random starts of every (game, players); the surface that ``PartyTask.starts`` needs."""

    def __init__(self, world, games, counts, each=6, frames=2, seed=0):
        rng, n = np.random.default_rng(seed), world.spec.subjects
        kinds = [(g, p) for g, name in enumerate(games) for p in counts[name]]
        self.game = np.repeat([g for g, _ in kinds], each)
        self.count = np.repeat([p for _, p in kinds], each)
        total = len(self.game)
        self.valid = np.arange(n)[None] < self.count[:, None]
        self.valid[1::2] = self.valid[1::2, ::-1]  # players need not lie in the first places
        shape = (total, frames)
        states = np.zeros((*shape, n, world.sub.channels), np.float32)
        for i in range(total):
            rules = GAMES[games[self.game[i]]]
            cells = np.stack([rng.integers(1, rules.cells_hw[1] - 1, (frames, n)),
                              rng.integers(1, rules.cells_hw[0] - 1, (frames, n))], -1)
            states[i, ..., :2] = positions(cells, rules)
        if world.sub.facing:
            states[..., 2:6] = 2 * np.eye(4)[rng.integers(0, 4, (*shape, n))] - 1
            states[..., 6] = 1
            states[each * len(kinds) - 1, -1, :, 6] = -1  # the last start: everybody is out
        self.starts = Starts(
            torch.from_numpy(rng.standard_normal((*shape, *world.spec.latent_chw))).float(),
            rng.integers(0, 8, (*shape, n)), np.arange(frames)[None].repeat(total, 0) == 0,
            np.full(total, frames), torch.from_numpy(states), self.valid, self.game)
        self.beginnings = np.arange(total) % 2 == 0

    def __len__(self):
        return len(self.game)

    def sample(self, seeds, episodes):
        raise AssertionError("faces choose among the starts of one game")

    def gather(self, index):
        return self.starts.rows(np.asarray(index))


def tiny_nano(seed=0, end=-9.0, snap=True, facing=True, **changes):
    """Random weights; ``end``: bias of the end head, -9 never, -2 often."""
    games = ("coins", "predator_prey")
    cells = tuple((2 * GAMES[g].offset_cells[0] / 10, 2 * GAMES[g].offset_cells[1] / 8, .2, .25)
                  for g in games)
    codec = CodecConfig(frame_hw=(32, 40), channels=4, width=8, deep_width=16)
    cfg = party_nano.PartyNanoConfig(
        name="tiny", codec=codec, games=games, cells=cells, snap=snap, outcome_width=8,
        steps=(1000.0,), dynamics=nano_config(codec.latent_chw, 2, 32, 1, 16, slots=8, actions=8,
                                              facing=facing))
    made = party_nano.fresh(replace(cfg, **changes), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for head in (made.dynamics.dit.head.head, made.dynamics.subjects.head):
        nn.init.normal_(head.weight, std=0.2, generator=generator)
    for reader in made.outcome.ends:
        reader.last.bias.data.fill_(end)
    return made


def tiny_task(horizon=12, **changes):
    """A task of the tiny world; see ``tiny_nano``."""
    made = tiny_nano(**changes)
    world, games = made.world(), made.cfg.games
    return PartyTask(world=world, games=games, horizon=horizon, name="tiny",
                     starts=Bank(world, games, {"coins": (2,), "predator_prey": (3, 5)}))
