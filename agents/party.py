"""Scripted players for the mini-map games: each reads the frame and where the players stand.

They act in the real game and in a dream alike: a ``Scene`` needs nothing but a frame, positions
and facing. One policy object plays one player for one episode at a time.
Legend: N players, H W frame pixels; cells are (x, y) on the map, directions 0 N 1 E 2 S 3 W.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable

import numpy as np

from worldgym.envs.party_games import (
    ACTIONS,
    BACKWARD,
    FORWARD,
    INTERACT,
    LEFT,
    NOOP,
    RIGHT,
    TURN_LEFT,
    TURN_RIGHT,
    PartyGame,
)
from worldgym.envs.party_scene import Cell, Scene
from worldgym.errors import ConfigError

STEPS: tuple[Cell, ...] = ((0, -1), (1, 0), (0, 1), (-1, 0))  # N E S W
MOVES = (FORWARD, RIGHT, BACKWARD, LEFT)  # by direction relative to the facing


def route(start: Cell, goals: Iterable[Cell], free: Collection[Cell],
          rng: np.random.Generator) -> int | None:
    """First direction of a shortest way from ``start`` to the nearest goal; None if there is none.

    >>> free = {(x, 0) for x in range(4)}
    >>> route((0, 0), [(3, 0)], free, np.random.default_rng(0))
    1
    """
    wanted = set(goals) - {start}
    if not wanted:
        return None
    order = rng.permutation(4)  # no side is preferred among equally short ways
    first: dict[Cell, int] = {start: -1}
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for way in order:
            there = here[0] + STEPS[way][0], here[1] + STEPS[way][1]
            if there in first or (there not in free and there not in wanted):
                continue
            first[there] = int(way) if here == start else first[here]
            if there in wanted:
                return first[there]
            if there in free:
                queue.append(there)
    return None


def step_towards(direction: int, facing: int) -> int:
    """The action that moves one cell in ``direction``, without turning."""
    return MOVES[(direction - facing) % 4]


def turn_towards(direction: int, facing: int) -> int | None:
    """The action that turns to ``direction``; None when facing it."""
    return {0: None, 1: TURN_RIGHT, 2: TURN_RIGHT, 3: TURN_LEFT}[(direction - facing) % 4]


class Player:
    """Base of scripted players: ``reset(rng)``, then ``act(scene, i)`` at every step."""

    name = "player"

    def reset(self, rng: np.random.Generator) -> None:
        """Begin an episode; everything random comes from ``rng``."""
        self.rng = rng
        self._last: tuple[Cell, int] | None = None  # where it stood when it last tried to move
        self._stuck = 0

    def watch(self, scene: Scene, i: int) -> None:
        """Called at every step before ``act``, also where the player is out and does not act."""

    def act(self, scene: Scene, i: int) -> int:
        """The action of player ``i``."""
        if not scene.alive_N[i]:
            return NOOP
        here = scene.cell(i)
        if self._last is not None and self._last[0] == here and self._last[1] in MOVES:
            self._stuck = 3  # something unseen is in the way: step aside
        action = int(self.rng.integers(1, 7)) if self._stuck else self.choose(scene, i)
        self._stuck = max(0, self._stuck - 1)
        self._last = (here, action)
        return action

    def choose(self, scene: Scene, i: int) -> int:
        """The action of a living player."""
        raise NotImplementedError

    def walk(self, scene: Scene, i: int, goals: Iterable[Cell]) -> int | None:
        """One step of the shortest way to the nearest of ``goals``; None if there is no way."""
        way = route(scene.cell(i), goals, scene.walkable(i), self.rng)
        return None if way is None else step_towards(way, int(scene.orientation_N[i]))


class Random(Player):
    """Any action; ``interact`` has the given weight, the others 1."""

    def __init__(self, interact: float = 2.0) -> None:
        self.name = f"random:{interact:g}"
        weights = np.ones(len(ACTIONS))
        weights[INTERACT] = interact
        self.chances = weights / weights.sum()

    def draw(self) -> int:
        """One action."""
        return int(self.rng.choice(len(ACTIONS), p=self.chances))

    def act(self, scene: Scene, i: int) -> int:
        return self.draw()


class Sticky(Random):
    """Keeps an action, and draws another with chance ``p`` at every step."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise ConfigError("sticky needs a probability", given=p, expected="0 < p <= 1",
                              fix="write sticky:0.3")
        self.name, self.p = f"sticky:{p:g}", p

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        self.held = self.draw()

    def act(self, scene: Scene, i: int) -> int:
        if self.rng.random() < self.p:
            self.held = self.draw()
        return self.held


class Wander(Player):
    """Walks to one random cell after another, turns and interacts on the way."""

    name = "wander"

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        self.goal: Cell | None = None

    def choose(self, scene: Scene, i: int) -> int:
        if self.rng.random() < 0.2:
            return int(self.rng.choice([TURN_LEFT, TURN_RIGHT, INTERACT]))
        free = sorted(scene.walkable(i))
        if self.goal not in free or self.goal == scene.cell(i):
            self.goal = free[int(self.rng.integers(len(free)))]
        move = self.walk(scene, i, [self.goal])
        if move is None:
            self.goal = None
        return int(self.rng.integers(1, 7)) if move is None else move


class Gather(Wander):
    """Walks onto the nearest thing that pays; wanders when there is none."""

    name = "gather"

    def choose(self, scene: Scene, i: int) -> int:
        move = self.walk(scene, i, scene.pickups(i))
        return super().choose(scene, i) if move is None else move


class Chase(Gather):
    """Goes after the nearest other player (a predator: the nearest prey) and interacts with it.

    In games of resources (``collect_first``) it gathers for a while before every hunt.
    """

    name, reach = "chase", 2  # cells that beams carry; a predator bites what is next to it

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        self.hunting = not rng.integers(2)

    def choose(self, scene: Scene, i: int) -> int:
        if scene.roles[i] == "prey":
            return super().choose(scene, i)
        if scene.game.collect_first:
            self.hunting ^= bool(self.rng.random() < 0.08)
            if not self.hunting:
                return super().choose(scene, i)
        targets = [j for j in scene.others(i)
                   if scene.roles[i] != "predator" or scene.roles[j] == "prey"]
        if scene.game.teams > 1:
            targets = [j for j in targets if (i - j) % scene.game.teams]
        here, facing = scene.cell(i), int(scene.orientation_N[i])
        for cell in (scene.cell(j) for j in targets):
            way = straight(here, cell, 1 if scene.roles[i] == "predator" else self.reach)
            if way is not None:
                turn = turn_towards(way, facing)
                return INTERACT if turn is None else turn
        move = self.walk(scene, i, [scene.cell(j) for j in targets])
        return super().choose(scene, i) if move is None else move


class Work(Wander):
    """Goes to the map's work places in the game's order, faces each and interacts.

    Where some of them show what pays (ore), it goes to those, and works there until it is gone.
    """

    name = "work"

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        self.stage, self.target, self.wait = -1, (-1, -1), 0

    def places(self, scene: Scene, i: int) -> list[Cell]:
        """Cells of this stage's kind; of those, what pays, if anything does."""
        chars = scene.game.work[self.stage % len(scene.game.work)]
        every = [(x, y) for y, row in enumerate(scene.game.rows) for x, char in enumerate(row)
                 if char in chars and (x, y) != scene.cell(i)]
        paying = set(scene.pickups(i))
        return [cell for cell in every if cell in paying] or every

    def choose(self, scene: Scene, i: int) -> int:
        if not scene.game.work:
            return super().choose(scene, i)
        here, facing = scene.cell(i), int(scene.orientation_N[i])
        if self.wait <= 0:  # on to the next place; a stage that cannot be done is skipped
            self.stage = self.stage + 1 if self.stage >= 0 else int(
                self.rng.integers(len(scene.game.work)))
            places = self.places(scene, i)
            near = sorted(places, key=lambda c: abs(c[0] - here[0]) + abs(c[1] - here[1]))[:4]
            self.target = near[int(self.rng.integers(len(near)))]
            self.wait = 25
        self.wait -= 1
        way = straight(here, self.target, 1)
        if way is not None:
            turn = turn_towards(way, facing)
            if turn is not None:
                return turn
            if self.target not in scene.pickups(i):
                self.wait = 0
            return INTERACT
        beside = [(self.target[0] + dx, self.target[1] + dy) for dx, dy in STEPS]
        free = scene.walkable(i)
        move = self.walk(scene, i, [c for c in beside if c in free])
        return super().choose(scene, i) if move is None else move


def straight(here: Cell, there: Cell, reach: int) -> int | None:
    """Direction in which ``there`` lies in a straight line, at most ``reach`` cells away."""
    dx, dy = there[0] - here[0], there[1] - here[1]
    if (dx == 0) == (dy == 0) or abs(dx) + abs(dy) > reach:
        return None
    return STEPS.index((int(np.sign(dx)), int(np.sign(dy))))


class Slips(Player):
    """Another player that slips: with chance ``p`` a step it does something random instead."""

    def __init__(self, p: float, player: Player) -> None:
        if not 0 <= p <= 1:
            raise ConfigError("slips needs a probability", given=p, expected="0 <= p <= 1",
                              fix="write slips:0.1:gather")
        self.name, self.p, self.player = f"slips:{p:g}:{player.name}", p, player
        self.random = Random()

    def reset(self, rng: np.random.Generator) -> None:
        super().reset(rng)
        self.player.reset(rng)
        self.random.reset(rng)

    def act(self, scene: Scene, i: int) -> int:
        if self.rng.random() < self.p:
            return self.random.draw()
        return self.player.act(scene, i)


_PLAIN: dict[str, Callable[[], Player]] = {
    "random": Random, "sticky": Sticky, "wander": Wander, "gather": Gather, "chase": Chase,
    "work": Work,
}
MIXTURE = ("random@0.15", "sticky:0.3@0.15", "wander@0.15", "slips:0.15:gather@0.25",
           "slips:0.15:chase@0.2", "slips:0.15:work@0.1")
KITCHEN = ("random@0.1", "sticky:0.3@0.1", "wander@0.15", "slips:0.15:chase@0.05", "work@0.3",
           "slips:0.05:work@0.3")


def mixture(game: PartyGame) -> tuple[str, ...]:
    """Who plays when nobody says who; where work goes through several stages, cooks do most."""
    return KITCHEN if len(game.work) > 1 else MIXTURE


def party_policy(name: str) -> Player:
    """The scripted player that ``name`` says.

    ``random`` (``random:4``: weight of interact), ``sticky:0.3``, ``wander``, ``gather``,
    ``chase``, ``work``, and ``slips:0.15:PLAYER``.
    """
    head, _, tail = name.partition(":")
    try:
        if head == "slips" and ":" in tail:
            chance, _, player = tail.partition(":")
            return Slips(float(chance), party_policy(player))
        if head in ("random", "sticky") and tail:
            return (Random if head == "random" else Sticky)(float(tail))
        if head in _PLAIN and not tail:
            return _PLAIN[head]()
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError("unknown player", given=repr(name),
                      expected=f"one of {', '.join(_PLAIN)}, sticky:0.3, slips:0.15:gather",
                      fix="check the spelling")
