"""A drawn game like the mini-maps, its recordings, and planted rollers for the judges of binding.

Players are coloured cells with a bright bar where they face; interact paints the cell in front
yellow for one frame. All move at once, in the order of their slots; walls are the frame's border.
Legend: B game, F frame, N player.
"""

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.binding import Clips, Rolled
from worldgym.data.store import Episodes
from worldgym.envs.party_games import CELLS_HW, SLOTS

AHEAD = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])  # N E S W, (x, y)
TURN = {1: 0, 2: 2, 3: 3, 4: 1}  # forward, backward, left, right: quarter turns off the facing
PALETTE = np.array([(220, 40, 40), (40, 60, 230), (30, 190, 60), (220, 40, 220), (40, 200, 210)])
PX = 4


class Toy:
    """``cells_BN2``, ``facing_BN``, the players' colours."""

    def __init__(self, cells_BN2, facing_BN, colours_BN3):
        self.cells, self.facing = cells_BN2.copy(), facing_BN.copy()
        self.colours = np.broadcast_to(colours_BN3, (*facing_BN.shape, 3))
        self.beam = np.zeros(facing_BN.shape, bool)

    def step(self, actions_BN):
        self.beam = actions_BN == 7
        for b, row in enumerate(actions_BN):
            for n, a in enumerate(row):
                if a in TURN:
                    to = self.cells[b, n] + AHEAD[(self.facing[b, n] + TURN[a]) % 4]
                    free = (to > 0).all() and (to < np.array(CELLS_HW[::-1]) - 1).all()
                    if free and not (self.cells[b] == to).all(1).any():
                        self.cells[b, n] = to
                elif a in (5, 6):
                    self.facing[b, n] = (self.facing[b, n] + (1 if a == 6 else -1)) % 4

    def draw(self):
        """Frames (B, 32, 40, 3)."""
        frames = np.full((len(self.cells), CELLS_HW[0] * PX, CELLS_HW[1] * PX, 3), 20, np.uint8)
        frames[:, :PX] = frames[:, -PX:] = frames[:, :, :PX] = frames[:, :, -PX:] = 110
        for beams in (True, False):  # players lie over beams
            for b, n in np.ndindex(self.facing.shape):
                x, y = self.cells[b, n]
                if beams and self.beam[b, n]:
                    x, y = self.cells[b, n] + AHEAD[self.facing[b, n]]
                    frames[b, y * PX:(y + 1) * PX, x * PX:(x + 1) * PX] = (240, 230, 90)
                elif not beams:
                    tile = np.empty((PX, PX, 3), np.uint8)
                    tile[:] = self.colours[b, n]
                    tile[0] = 255
                    frames[b, y * PX:(y + 1) * PX, x * PX:(x + 1) * PX] = np.rot90(
                        tile, -self.facing[b, n])
        return frames


def record(folder, players=3, episodes=8, steps=40, redraw=False, interact=7, seed=0):
    """A data set as ``worldgym collect-party`` writes it."""
    rng = np.random.default_rng(seed)
    store = Episodes.create(folder, ActionSpec.discrete(8), (32, 40), 8.0,
                            {"recipe": {"redraw": redraw, "interact": interact}}, agents=SLOTS)
    cells = np.stack([rng.permutation(48)[:players] for _ in range(episodes)])
    cells = np.stack([cells % 8 + 1, cells // 8 + 1], -1)
    colours = np.stack([PALETTE[rng.permutation(5)[:players] if redraw else np.arange(players)]
                        for _ in range(episodes)])
    toy = Toy(cells, rng.integers(0, 4, (episodes, players)), colours)
    rows = [(toy.draw(), toy.cells.copy(), toy.facing.copy(), np.full((episodes, players), -1))]
    for _ in range(steps):
        actions = rng.integers(0, 8, (episodes, players))
        toy.step(actions)
        rows.append((toy.draw(), toy.cells.copy(), toy.facing.copy(), actions))
    frames, cells, facing, actions = (np.stack(x, 1) for x in zip(*rows, strict=True))

    def pad(values, empty, dtype):
        out = np.full((episodes, steps + 1, SLOTS, *values.shape[3:]), empty, dtype)
        out[:, :, :players] = values
        return out

    places = pad((cells + 0.5) / np.array(CELLS_HW[::-1]) * 2 - 1, np.nan, np.float32)
    there = pad(np.ones(facing.shape), False, bool)
    last = np.arange(steps + 1) == steps
    store.append([{
        "frames": frames[i], "actions": pad(actions, -1, np.int16)[i],
        "rewards": np.zeros((steps + 1, SLOTS), np.float32), "terminated": last & False,
        "truncated": last, "info_position": places[i], "info_alive": there[i],
        "info_orientation": pad(facing, -1, np.int8)[i], "info_valid": there[i],
        "info_ended": np.zeros((steps + 1, SLOTS), bool), "seed": None, "policy": "random"}
        for i in range(episodes)])
    return store


def played(clips: Clips, order=None) -> Rolled:
    """The game itself from frame 0 on; ``order``: players get each other's actions."""
    n = int(clips.valid_BN[0].sum())
    order = np.arange(n) if order is None else np.asarray(order)
    cells, facing = clips.cells_BFN2[:, 0, :n], clips.facing_BFN[:, 0, :n]
    where = cells * PX + 2  # a pixel that no bar covers
    colours = clips.frames_BFHWC[np.arange(len(clips))[:, None], 0, where[..., 1], where[..., 0]]
    toy = Toy(cells, facing, colours)
    frames, places, turned = [clips.frames_BFHWC[:, 0]], [cells], [facing]
    for f in range(1, clips.frames_BFHWC.shape[1]):
        toy.step(clips.actions_BFN[:, f, :n][:, order])
        frames.append(toy.draw())
        places.append(toy.cells.copy())
        turned.append(toy.facing.copy())
    positions = np.zeros(clips.positions_BFN2.shape, np.float32)
    positions[:, :, :n] = (np.stack(places, 1) + 0.5) / np.array(CELLS_HW[::-1]) * 2 - 1
    looks = np.zeros(clips.orientation_BFN.shape, np.int64)
    looks[:, :, :n] = np.stack(turned, 1)
    return Rolled(np.stack(frames, 1), positions, looks, clips.alive_BFN)
