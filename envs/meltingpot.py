"""Melting Pot mini-maps as a PettingZoo ParallelEnv: the real twin of a multi-player dream.

Needs ``make meltingpot``. Facts about the simulator (dm-meltingpot 2.4.1, dmlab2d 1.0.2):

* Seeds do not reproduce: one seed gives two or three different episodes, different from the first
  frame on. ``reset(seed)`` takes a seed and cannot keep its promise; tests use recorded traces.
* A player who was taken out is not drawn, but its piece keeps moving with its actions, off the
  grid. ``alive`` is read from the piece's own cell (a view of one cell shows nothing once it is
  off the grid), and the last cell it stood on is kept until it stands again.
* Every player sees the same frame. On one core a step costs 0.15 to 0.6 ms, a reset 10 to 150 ms.

Legend: N players, H W frame pixels; cells are (x, y) from the top left.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium import spaces

from worldgym.data.party import halved
from worldgym.envs.party_games import (
    ABSENT,
    ACTIONS,
    CELLS_HW,
    COLOURS,
    INTERACT,
    SPRITE_PX,
    PartyGame,
    game_named,
)
from worldgym.envs.party_scene import Scene, cells, positions
from worldgym.errors import ActionError, ConfigError, MissingDependencyError, ResetNeeded

try:
    from pettingzoo import ParallelEnv
except ImportError as error:
    raise MissingDependencyError(
        "multi-player games need PettingZoo", given="no pettingzoo", expected="pettingzoo>=1.25",
        fix="pip install 'worldgym[marl]'") from error

CELL_PX = (8, 4)  # pixels of a cell in the frame: as drawn, or halved
STEPS_PER_SECOND = 8.0  # Melting Pot names no rate; its films run at 8 frames per second
Events = list[tuple[str, dict[str, Any]]]


def available() -> bool:
    """Whether Melting Pot can be imported."""
    try:
        _substrates()
    except MissingDependencyError:
        return False
    return True


def _substrates() -> tuple[Any, Any, Any]:
    """Melting Pot's configs, builder and palettes, without its bots (those need TensorFlow)."""
    for name in ("meltingpot.bot", "meltingpot.scenario"):
        sys.modules.setdefault(name, ModuleType(name))
    try:
        return (importlib.import_module("meltingpot.substrate"),
                importlib.import_module("meltingpot.utils.substrates.substrate"),
                importlib.import_module("meltingpot.utils.substrates.shapes"))
    except ImportError as error:
        raise MissingDependencyError(
            "Melting Pot is needed for the real multi-player games", given=str(error),
            expected="dm-meltingpot 2.4.1 and dmlab2d", fix="make meltingpot") from error


def build(game: PartyGame, players: int) -> Any:
    """The substrate itself: a dm_env of ``players`` players on the mini-map."""
    if players not in game.players:
        raise ConfigError("this game does not take so many players",
                          given=f"{players} in {game.name}", expected=f"one of {game.players}",
                          fix="pass players=... from that list")
    substrate, builder, shapes = _substrates()
    config = substrate.get_config(game.substrate)
    if "layout" in config:  # some builders place objects by the map, so they must see it
        with config.unlocked():
            config.layout.ascii_map = game.text
    roles = game.role_of(players) or ("default",) * players
    made = copy.deepcopy(dict(config.lab2d_settings_builder(roles=roles, config=config)))
    made |= {"topology": "BOUNDED", "maxEpisodeLengthFrames": 10 * game.max_cycles}
    simulation = made["simulation"]
    simulation["map"] = game.text
    simulation.setdefault("scene", _SCENE)
    for prefab, changes in game.prefabs.items():
        _change(simulation["prefabs"][prefab], changes)
    avatars = [o for o in simulation["gameObjects"] if "Avatar" in _components(o)]
    for index, avatar in enumerate(avatars):
        _change(avatar, game.avatar, missing_ok=True)
        _change(avatar, {"Avatar": {"view": _ONE_CELL}})
        if game.tint:
            _tint(avatar, COLOURS[index], game.tint, shapes)
            simulation.pop("worldSpriteMap", None)
        avatar["components"].append(copy.deepcopy(_OBSERVER))
    return builder.build_substrate(
        lab2d_settings=made, individual_observations={"POSITION", "ORIENTATION", "LAYER"},
        global_observations={"WORLD.RGB"}, action_table=[dict(a) for a in config.action_set])


_ONE_CELL = {"left": 0, "right": 0, "forward": 0, "backward": 0, "centered": False}
_OBSERVER = {"component": "LocationObserver",
             "kwargs": {"objectIsAvatar": True, "alsoReportOrientation": True}}
_SCENE = {"name": "scene", "components": [  # the default, spelt out: else the simulator warns
    {"component": "StateManager",
     "kwargs": {"initialState": "scene", "stateConfigs": [{"state": "scene"}]}},
    {"component": "Transform", "kwargs": {"position": (0, 0), "orientation": "N"}}]}


def _components(thing: dict) -> dict[str, dict]:
    return {c["component"]: c for c in thing["components"]}


def _change(thing: dict, changes: Any, missing_ok: bool = False) -> None:
    parts = _components(thing)
    for name, settings in changes.items():
        if name in parts:
            parts[name].setdefault("kwargs", {}).update(copy.deepcopy(dict(settings)))
        elif not missing_ok:
            raise ConfigError("no such component in Melting Pot", given=name,
                              expected=f"one of {sorted(parts)}", fix="correct the games' table")


def _tint(avatar: dict, colour: tuple[int, int, int], share: float, shapes: Any) -> None:
    """Mix ``share`` of the player's colour into its sprites; whites (eyes) stay."""
    kwargs = _components(avatar)["Appearance"]["kwargs"]
    if "palettes" not in kwargs or share == 1:
        _change(avatar, {"Appearance": {
            "renderMode": "ascii_shape", "spriteShapes": [shapes.CUTE_AVATAR],
            "palettes": [shapes.get_palette(colour)], "noRotates": [True]}})
        return
    kwargs["palettes"] = [
        {key: rgba if min(rgba[:3]) > 230 else
         (*(round((1 - share) * old + share * new)
            for old, new in zip(rgba[:3], colour, strict=True)), *rgba[3:])
         for key, rgba in palette.items()} for palette in kwargs["palettes"]]


def parse_events(raw: Iterable[Any]) -> Events:
    """The simulator's events as (name, values); player numbers become 0-based by the caller."""
    found = []
    for name, content in raw:
        kind, *words = content  # b"dict", then keys and values in turn; or b"str" and a word
        pairs = zip(words[::2], words[1::2], strict=True) if _text(kind) == "dict" else ()
        found.append((str(name), {_text(k): _plain(v) for k, v in pairs}))
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    array = np.asarray(value)
    return array.item() if array.size == 1 else array.tolist()


REMOVALS = {"zap": "target", "prey_consumed": "prey_player_index",
            "predator_consumed": "eaten_player_index", "removal_due_to_sanctioning": "target"}


def removed(events: Events) -> list[int]:
    """Players (from 0) whom these events name as hit or eaten; whether a hit takes out is the
    game's affair. Meetings in matrix games take out some steps later and are not among them."""
    return sorted({int(values[REMOVALS[name]]) - 1 for name, values in events
                   if name in REMOVALS and REMOVALS[name] in values})


class MeltingPotEnv(ParallelEnv):
    """One mini-map game of Melting Pot.

    Observations are the shared frame, uint8 (H, W, 3): a new array, the same for every agent.
    Actions are ``Discrete(8)`` (``party_games.ACTIONS``), also where a game has no ``interact``.
    ``infos[agent]``: ``position`` float32 (2,) in [-1, 1] (centre of the cell over the frame, x
    and y), ``cell`` int64 (2,) on the map, ``orientation`` 0 N 1 E 2 S 3 W, ``alive`` bool.
    A player who is out but comes back stays in ``agents`` with ``alive`` False and its actions do
    nothing; where the game says ``removed_for_good`` it is terminated and leaves ``agents``.

    Args:
        game: a name of ``party_games.GAMES``, or a ``PartyGame`` of your own.
        players: how many; default: the most the game takes.
        max_cycles: steps until truncation; default: the game's.
        cell_px: pixels of a cell, 8 (frames of 64 x 80) or 4 (32 x 40).
        render_mode: None, "rgb_array" or "human".
    """

    metadata = {"name": "meltingpot_mini", "render_modes": ["rgb_array"],
                "is_parallelizable": True, "render_fps": STEPS_PER_SECOND}

    def __init__(self, game: str | PartyGame = "coins", players: int | None = None, *,
                 max_cycles: int | None = None, cell_px: int = 8,
                 render_mode: str | None = None) -> None:
        self.game = game if isinstance(game, PartyGame) else game_named(game)
        self.players = max(self.game.players) if players is None else int(players)
        self.max_cycles = self.game.max_cycles if max_cycles is None else int(max_cycles)
        if self.max_cycles < 1 or cell_px not in CELL_PX or render_mode not in (
                None, "rgb_array", "human"):
            raise ConfigError("impossible setting of a mini-map game",
                              given=f"max_cycles {max_cycles}, cell_px {cell_px}, {render_mode!r}",
                              expected=f"max_cycles >= 1, cell_px in {CELL_PX}, rgb_array",
                              fix="leave the defaults")
        self.cell_px, self.render_mode = cell_px, render_mode
        self._env = build(self.game, self.players)
        self.possible_agents = [f"player_{i}" for i in range(self.players)]
        self.agents: list[str] = []
        self.frame_hw = (CELLS_HW[0] * cell_px, CELLS_HW[1] * cell_px)
        self.state_space = spaces.Box(0, 255, (*self.frame_hw, 3), np.uint8)
        self._spaces = {a: spaces.Box(0, 255, (*self.frame_hw, 3), np.uint8)
                        for a in self.possible_agents}
        self._actions = {a: spaces.Discrete(len(ACTIONS)) for a in self.possible_agents}
        self.events: Events = []
        self._frame: np.ndarray | None = None

    def observation_space(self, agent: str) -> spaces.Space:
        """Box of the shared frame."""
        return self._spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        """Discrete(8)."""
        return self._actions[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start an episode; ``seed`` and ``options`` are accepted, the simulator ignores them."""
        self.cells_N2 = np.zeros((self.players, 2), np.int64)
        self.orientation_N = np.zeros(self.players, np.int64)
        self.alive_N = np.ones(self.players, bool)
        self.t, self.agents = 0, list(self.possible_agents)
        if self.game.redraw and self._frame is not None:
            self._env.close()
            self._env = build(self.game, self.players)
        self._see(self._env.reset())
        return self._observations(self.agents), self._infos(self.agents)

    def _see(self, timestep: Any) -> None:
        """Take frame, cells, facing and who is on the map from the simulator."""
        view = timestep.observation
        self.events = parse_events(self._env.events())
        for i, own in enumerate(view):
            layers = np.asarray(own["LAYER"]).ravel()
            self.alive_N[i] = (layers != layers[0]).any()
            if self.alive_N[i]:
                self.cells_N2[i] = own["POSITION"]
                self.orientation_N[i] = own["ORIENTATION"]
        self._frame = place(view[0]["WORLD.RGB"], self.game, self.cell_px)

    def advance(self, actions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """One step of everyone, without the dicts: actions (N,) of the eight, for all players.

        Returns:
            rewards float64 (N,); who is finished for good, bool (N,); whether time is up.
        """
        native = np.where(actions_N == INTERACT, self.game.interact, actions_N)
        timestep = self._env.step(np.where(self.alive_N, native, 0))
        self.t += 1
        self._see(timestep)
        over = timestep.last()
        if self.game.removed_for_good and "prey" in self.game.roles:
            prey = [role == "prey" for role in self.game.role_of(self.players)]
            over = over or not self.alive_N[prey].any()
        gone = ~self.alive_N if self.game.removed_for_good else np.zeros(self.players, bool)
        rewards = np.array([float(r) for r in timestep.reward])
        return rewards, gone | over, self.t >= self.max_cycles

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        """One step; ``actions`` holds one for every agent in ``agents``."""
        if not self.agents:
            raise ResetNeeded("no episode is running", given="step()", expected="reset() before",
                              fix="call reset(); it is needed again when agents is empty")
        playing = {a: self.possible_agents.index(a) for a in self.agents}
        joint = np.zeros(self.players, np.int64)
        for agent, i in playing.items():
            joint[i] = self._check(actions.get(agent), agent)
        rewards, finished, late = self.advance(joint)
        ends = {a: bool(finished[i]) for a, i in playing.items()}
        cuts = {a: bool(late and not ends[a]) for a in playing}
        self.agents = [a for a in playing if not (ends[a] or cuts[a])]
        return (self._observations(playing), {a: float(rewards[i]) for a, i in playing.items()},
                ends, cuts, self._infos(playing))

    def _check(self, action: Any, agent: str) -> int:
        if action is None or not self._actions[agent].contains(action):
            raise ActionError("impossible action", given=f"{action!r} of {agent}",
                              expected=f"0..{len(ACTIONS) - 1} for every agent in agents",
                              fix="sample from action_space(agent)")
        return int(action)

    @property
    def positions_N2(self) -> np.ndarray:
        """Centres of the players' cells over the frame, float32 in [-1, 1]."""
        return positions(self.cells_N2, self.game)

    def _observations(self, agents: Iterable[str]) -> dict[str, np.ndarray]:
        return {a: self.state() for a in agents}

    def _infos(self, agents: Iterable[str]) -> dict[str, dict]:
        where = self.positions_N2
        return {a: {"position": where[i].copy(), "cell": self.cells_N2[i].copy(),
                    "orientation": int(self.orientation_N[i]), "alive": bool(self.alive_N[i])}
                for a in agents for i in [self.possible_agents.index(a)]}

    def state(self) -> np.ndarray:
        """The shared frame, uint8 (H, W, 3); a new array."""
        if self._frame is None:
            raise ResetNeeded("nothing to see yet", given="state()", expected="reset() before",
                              fix="call reset()")
        return self._frame.copy()

    def scene(self) -> Scene:
        """What scripted players read."""
        return Scene(self.game, self.state(), self.cells_N2.copy(), self.orientation_N.copy(),
                     self.alive_N.copy())

    def render(self) -> np.ndarray | None:
        """The frame, six times as large, where render_mode is "rgb_array"."""
        if self.render_mode != "rgb_array":
            return None
        return self.state().repeat(6, 0).repeat(6, 1)

    def close(self) -> None:
        """Release the simulator."""
        self._env.close()


def place(image: np.ndarray, game: PartyGame, cell_px: int) -> np.ndarray:
    """A picture of the whole map, at its place in the common frame."""
    frame = np.zeros((CELLS_HW[0] * SPRITE_PX, CELLS_HW[1] * SPRITE_PX, 3), np.uint8)
    x, y = (SPRITE_PX * n for n in game.offset_cells)
    frame[y:y + image.shape[0], x:x + image.shape[1]] = image
    return frame if cell_px == SPRITE_PX else halved(frame)


__all__ = ["ABSENT", "MeltingPotEnv", "available", "build", "cells", "positions"]
