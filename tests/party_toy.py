"""A toy party: coloured squares on a grid, one action each; and how well a model binds them.

``python tests/party_toy.py --seconds 170`` trains a small model on one core for that many seconds
of CPU time and prints its figures as JSON; ``--pooled``: the baseline of one pooled action.
Shapes: B episode, F frame, N player. A cell is one latent cell: latents are the cells' colours in
[-1, 1], so that no codec is needed. All moves happen at once; a square does not move beyond the
border, into a wall, a cell that was taken, or a cell that another one wants.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from worldgym.memory import SinkWindow  # noqa: E402
from worldgym.models.party import PartyDynamics, nano_config  # noqa: E402
from worldgym.models.party_loss import PartyLossConfig, party_loss  # noqa: E402
from worldgym.models.party_world import PartyWorld, party_spec  # noqa: E402
from worldgym.schedule import FewStep  # noqa: E402
from worldgym.state import Starts  # noqa: E402
from worldgym.train.loop import LoopConfig, optimizers  # noqa: E402

MOVES = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])  # x, y: stay, up, down, left, right
PAINT = np.array([[1, -.9, -.9], [-.9, 1, -.9], [-.9, -.9, 1], [1, 1, -.9], [1, -.9, 1],
                  [-.9, 1, 1], [-.8, -.8, -.8], [0, 0, 0], [1, 1, 1]])
FLOOR, WALL, COIN = 6, 7, 8  # colours that no player has


@dataclass(frozen=True)
class Rules:
    """Sizes of a game."""

    side: int = 6
    players: int = 3
    walls: int = 3
    coins: int = 1


class Toy:
    """A batch of games: positions ``at_BN2`` (x, y), walls and at most one coin each."""

    def __init__(self, batch: int, rng: np.random.Generator, rules: Rules) -> None:
        n, count = rules.players, rules.players + rules.walls + 1
        cells = np.argsort(rng.random((batch, rules.side**2)), 1)[:, :count]
        place = np.stack([cells % rules.side, cells // rules.side], -1)
        self.rules, self.at_BN2, self.walls, self.coin = rules, place[:, :n], place[:, n:-1], \
            place[:, -1]
        self.colour = np.argsort(rng.random((batch, 6)), 1)[:, :n]
        self.left = np.full(batch, rules.coins > 0)  # the coin is there

    def step(self, actions_BN: np.ndarray) -> np.ndarray:
        """Move all players; returns rewards (B, N): 1 for taking the coin."""
        want = self.at_BN2 + MOVES[np.maximum(actions_BN, 0)]
        same = (want[:, :, None] == self.at_BN2[:, None]).all(-1)
        clash = (want[:, :, None] == want[:, None]).all(-1)
        own = np.eye(want.shape[1], dtype=bool)
        into = (want[:, :, None] == self.walls[:, None]).all(-1).any(-1)
        ok = ~((same & ~own) | (clash & ~own)).any(-1) & ~into
        ok &= ((want >= 0) & (want < self.rules.side)).all(-1)
        self.at_BN2 = np.where(ok[..., None], want, self.at_BN2)
        takes = (self.at_BN2 == self.coin[:, None]).all(-1) & self.left[:, None]
        self.left &= ~takes.any(1)
        return takes.astype(np.float32)

    def cells(self) -> np.ndarray:
        """Number of the colour of every cell (B, side, side)."""
        rows, out = np.arange(len(self.left))[:, None], np.full(
            (len(self.left), self.rules.side, self.rules.side), FLOOR)
        out[rows, self.walls[..., 1], self.walls[..., 0]] = WALL
        out[rows[self.left, 0], self.coin[self.left, 1], self.coin[self.left, 0]] = COIN
        out[rows, self.at_BN2[..., 1], self.at_BN2[..., 0]] = self.colour
        return out

    def frame(self) -> np.ndarray:
        """Colours (B, 3, side, side)."""
        return PAINT[self.cells()].transpose(0, 3, 1, 2).astype(np.float32)

    def states(self) -> np.ndarray:
        """Positions (B, N, 2) in [-1, 1]."""
        return (2 * (self.at_BN2 + 0.5) / self.rules.side - 1).astype(np.float32)


def clips(batch: int, frames: int, seed, rules: Rules) -> dict[str, torch.Tensor]:
    """Random play as a training batch; players and coins weigh more than floor."""
    rng = np.random.default_rng(seed)
    toy = Toy(batch, rng, rules)
    actions = rng.integers(0, len(MOVES), (batch, frames, rules.players))
    actions[:, 0] = -1
    cells, states, rewards = [toy.cells()], [toy.states()], [np.zeros(actions[:, 0].shape)]
    for f in range(1, frames):
        rewards.append(toy.step(actions[:, f]))
        cells.append(toy.cells())
        states.append(toy.states())
    shown = np.stack(cells, 1)
    made = {"latents_BFChw": PAINT[shown].transpose(0, 1, 4, 2, 3).astype(np.float32),
            "states_BFNS": np.stack(states, 1), "actions_BFN": actions,
            "valid_BN": np.ones((batch, rules.players), bool),
            "rewards_BFN": np.stack(rewards, 1).astype(np.float32),
            "ended_BFN": np.zeros(actions.shape, bool),
            "weight_BFhw": np.where(shown == FLOOR, 0.3, 1.0).astype(np.float32)}
    return {k: torch.from_numpy(v) for k, v in made.items()}


class CellCodec:
    """Latents are pixels here."""

    def encode(self, frames_BHWC):
        return frames_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, z_BChw):
        return ((z_BChw.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def world_of(model: PartyDynamics, rules: Rules, snap: bool = False,
             steps=(1000.0, 850.0, 600.0)) -> PartyWorld:
    """The model as a world without reward heads."""
    size = 2 / rules.side
    spec = party_spec("toy", (rules.side,) * 2, model.cfg.latent_chw, rules.players, len(MOVES),
                      model.cfg.window)
    return PartyWorld(
        spec, CellCodec(), model, None, SinkWindow(model.cfg.window),
        FewStep(tuple(steps), tuple(t / 1000 for t in steps)), texts_GLD=torch.ones(1, 1, 1),
        cells_G4=torch.tensor([[0, 0, size, size]]) if snap else None, fingerprint="toy")


def starts_of(toy: Toy) -> Starts:
    """Episodes that begin here."""
    b, n = len(toy.left), toy.rules.players
    return Starts(torch.from_numpy(toy.frame())[:, None], np.zeros((b, 1, n), np.int64),
                  np.ones((b, 1), bool), np.ones(b, np.int64),
                  torch.from_numpy(toy.states())[:, None], np.ones((b, n), bool))


def cell_of(states_BNS: np.ndarray, side: int) -> np.ndarray:
    """Cells (x, y) that positions lie in."""
    return np.round((states_BNS[..., :2] + 1) / 2 * side - 0.5).astype(int)


def binding(model: PartyDynamics, rules: Rules, episodes: int = 128, length: int = 4,
            snap: bool = False, seed: int = 999) -> dict:
    """How often players are where their own actions took them, over rollouts of unseen episodes.

    ``told``: by the model's states; ``seen``: by colour in its picture, at the true cell, and
    nowhere else (``once``); ``told_moves``, ``seen_moves``: only where the player did move.
    ``others_stay``: after changing one player's first action, share of other players that the
    model keeps where they were, of those that the game keeps; ``own_follows``: share of changed
    players that go where the game puts them, of those that the change moves.
    """
    rng = np.random.default_rng(seed)
    toy = Toy(episodes, rng, rules)
    world = world_of(model.eval(), rules, snap)
    state = start = world.begin(starts_of(toy), range(episodes))
    at, actions = toy.at_BN2.copy(), rng.integers(0, len(MOVES), (length, episodes, rules.players))
    out: dict[str, list] = {k: [] for k in ("told", "told_moves", "seen", "seen_moves", "once")}
    rows = np.arange(episodes)[:, None]
    for step in range(length):
        old = toy.at_BN2
        toy.step(actions[step])
        state, chunk = world.step(state, actions[step])
        told = (cell_of(chunk.subjects.states_BFNS[:, 0].numpy(), rules.side)
                == toy.at_BN2).all(-1)
        z = chunk.latents_BFChw[:, 0].permute(0, 2, 3, 1).numpy()
        shown = np.linalg.norm(z[..., None, :] - PAINT, axis=-1).argmin(-1)
        seen = shown[rows, toy.at_BN2[..., 1], toy.at_BN2[..., 0]] == toy.colour
        count = (shown[:, None] == toy.colour[..., None, None]).sum((2, 3))
        moved = (old != toy.at_BN2).any(-1)
        for name, value in (("told", told), ("told_moves", told[moved]), ("seen", seen),
                            ("seen_moves", seen[moved]), ("once", seen & (count == 1))):
            out[name].append(round(float(value.mean()), 3))
    return out | _swap(world, start, at, actions[0], rules, rng)


def _swap(world: PartyWorld, start, at: np.ndarray, actions: np.ndarray, rules: Rules,
          rng: np.random.Generator) -> dict:
    """What changing one player's action does to it and to the others; same noise."""
    other, who = actions.copy(), rng.integers(0, rules.players, len(at))
    rows = np.arange(len(at))
    other[rows, who] = (other[rows, who] + rng.integers(1, len(MOVES), len(at))) % len(MOVES)
    real, dream = [], []
    for act in (actions, other):
        toy = Toy(len(at), np.random.default_rng(999), rules)
        toy.step(act)
        real.append(toy.at_BN2)
        dream.append(cell_of(world.step(start, act)[1].subjects.states_BFNS[:, 0].numpy(),
                             rules.side))
    mine = np.eye(rules.players, dtype=bool)[who]
    still, same = ((x[0] == x[1]).all(-1) for x in (real, dream))
    right = (dream[1] == real[1]).all(-1)
    return {"others_stay": round(float(same[~mine & still].mean()), 3),
            "own_follows": round(float(right[mine & ~still].mean()), 3)}


def train(rules: Rules, seconds: float, width: int = 64, layers: int = 3, batch: int = 24,
          frames: int = 5, lr: float = 4e-3, seed: int = 0, iterations: int = 10**9, said=None,
          alone: float = 0.55, how: PartyLossConfig | None = None, **subjects) -> PartyDynamics:
    """A model trained for so many seconds of CPU time, or iterations.

    The first share ``alone`` sees single frames with the one before beside them (cheap), the rest
    whole clips: what a rollout's memory holds must have been seen in training.
    """
    cfg = nano_config((3, rules.side, rules.side), width=width, layers=layers, window=4,
                      slots=rules.players, actions=len(MOVES), **subjects)
    model = PartyDynamics(cfg)
    model.initialize(torch.Generator().manual_seed(seed))
    opts = optimizers(model, LoopConfig(iterations=1, lr=lr, muon=True))
    how = how or PartyLossConfig(shift=3.0)
    start, i = time.process_time(), 0
    while (done := max((time.process_time() - start) / seconds, i / iterations)) < 1:
        for o in opts:
            o.zero_grad()
            for g in o.param_groups:
                g["lr"] = lr * min(1, (i + 1) / 50) * min(1.0, (1 - done) / 0.4 + 0.05)
        loss, told = party_loss(
            model, cfg, clips(batch, frames, (seed, i), rules),
            torch.Generator().manual_seed(seed * 1_000_003 + i),
            replace(how, forcing="alone" if done < alone else "teacher"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
        i += 1
        if said and i % 100 == 0:
            said(i, time.process_time() - start, told)
    model.iterations = i
    return model.requires_grad_(False)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--pooled", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rules = Rules()
    model = train(rules, args.seconds, pooled=args.pooled, said=lambda i, s, told: print(
        i, round(s, 1), {k: round(v, 4) for k, v in told.items()}, file=sys.stderr, flush=True))
    if args.out:
        torch.save(model.state_dict(), args.out)
    found = {"pooled": args.pooled, "iterations": model.iterations, "cpu_seconds": args.seconds,
             "parameters": sum(p.numel() for p in model.parameters()),
             "plain": binding(model, rules), "snapped": binding(model, rules, snap=True)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
