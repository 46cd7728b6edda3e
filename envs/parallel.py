"""A learned world of several players as a PettingZoo ParallelEnv: ``parallel_env``.

Legend: P players, H W frame pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from worldgym.envs.face import Face
from worldgym.envs.opening import check_seed
from worldgym.envs.outcome import REASONS
from worldgym.envs.party_core import PartyCore
from worldgym.envs.party_draw import picture
from worldgym.envs.party_scene import Scene, cells
from worldgym.envs.party_tasks import PartyTask, load_party
from worldgym.envs.party_view import PartyView
from worldgym.envs.screen import Screen
from worldgym.errors import ActionError, ConfigError, MissingDependencyError, ResetNeeded

try:
    from pettingzoo import ParallelEnv
except ImportError as error:
    raise MissingDependencyError(
        "multi-player environments need PettingZoo", given="no pettingzoo",
        expected="pettingzoo>=1.25", fix="pip install 'worldgym[marl]'") from error

DRAWS = ("plain", "players")


class DreamParallelEnv(Face, ParallelEnv):
    """One dream of several players; a step is one step of the world.

    Agents ``player_0`` … act with ``Discrete`` numbers (mini-map games: ``party_games.ACTIONS``).
    An agent that is out for good terminates and leaves ``agents``; the episode is over when none
    is left, or truncated at ``max_cycles``. A player off the map that comes back stays, with
    ``infos[agent]["alive"]`` False; its actions do nothing. ``infos``: ``position`` float32 (2,)
    in [-1, 1] as the model tells it, ``alive``, and where the model knows it ``orientation``
    (0 N 1 E 2 S 3 W) and, for mini-map games, ``cell``; ``truncation_reason`` when cut.

    ``reset(seed=s)`` begins the same episode every time, ``reset()`` the next one of that seed.
    Options: ``start``, an index into the game's starts; others are not read.

    Args:
        task: world, starts, games.
        game: name; None: the task's first.
        players: how many; None: the most that the game's starts have.
        max_cycles: steps until truncation; None: the task's horizon.
        view: what each agent is shown.
        render_mode: None, "rgb_array" or "human" (one window).
        draw: "plain", or "players": positions as the model predicts them, and actions.
        beginnings: begin only where recorded episodes began.
    """

    metadata: dict[str, Any] = {"name": "worldgym_party", "render_modes": ["rgb_array"],
                                "is_parallelizable": True}

    def __init__(self, task: PartyTask, game: str | None = None, players: int | None = None, *,
                 max_cycles: int | None = None, view: PartyView | None = None,
                 render_mode: str | None = None, draw: str = "plain",
                 beginnings: bool = False) -> None:
        if render_mode not in (None, "rgb_array", "human") or draw not in DRAWS:
            raise ConfigError("unknown way to render", given=f"{render_mode!r}, draw={draw!r}",
                              expected=f"None, rgb_array or human; draw one of {DRAWS}",
                              fix='pass render_mode="rgb_array"')
        if max_cycles is not None and (isinstance(max_cycles, bool) or max_cycles < 1):
            raise ConfigError("impossible max_cycles", given=max_cycles, expected="1 or more",
                              fix="leave it out")
        self._settings = {"game": game, "players": players, "max_cycles": max_cycles, "view": view,
                          "render_mode": render_mode, "draw": draw, "beginnings": beginnings}
        self.core: PartyCore = PartyCore(
            task, game, players, 1, view, beginnings=beginnings,
            horizon="task" if max_cycles is None else int(max_cycles))
        self.players, self.render_mode, self.draw = self.core.players, render_mode, draw
        self.possible_agents = [f"player_{i}" for i in range(self.players)]
        self._screen = Screen(render_mode, self.core)
        self._spaces = {a: self.core.seen.space(self.core.spec.frame_hw, self.core.spec.latent_chw)
                        for a in self.possible_agents}
        self._actions = {a: spaces.Discrete(int(self.core.player_actions.n))
                         for a in self.possible_agents}
        self.frame_hw = tuple(self.core.spec.frame_hw)
        self.state_space = spaces.Box(0, 255, (*self.frame_hw, 3), np.uint8)
        self.metadata = {**self._describe(), "name": "worldgym_party", "is_parallelizable": True,
                         "render_modes": ["rgb_array", "human"]}

    def _sibling(self) -> DreamParallelEnv:
        child = type(self)(self.core.party, **self._settings)  # type: ignore[arg-type]
        child.max_cycles = self.max_cycles
        return child

    # ------------------------------------------------------------------ facts

    @property
    def game(self) -> Any:
        """The game as data, where it is a mini-map game."""
        return self.core.rules

    @property
    def max_cycles(self) -> int | None:
        """Steps until truncation."""
        return self.core.task.horizon

    @max_cycles.setter
    def max_cycles(self, steps: int | None) -> None:
        self.core.set_horizon(steps)

    @property
    def agents(self) -> list[str]:  # type: ignore[override]
        """Who plays; empty before the first reset and after the end."""
        if self.core.closed or self.core._state is None:
            return []
        plays = self.core.playing_BP[0]
        return [a for a, on in zip(self.possible_agents, plays, strict=True) if on]

    def observation_space(self, agent: str) -> spaces.Space:
        """The agent's space, the same object at every call."""
        return self._spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        """Discrete, the same object at every call."""
        return self._actions[agent]

    # ------------------------------------------------------------------ PettingZoo

    def reset(self, seed: int | None = None,
              options: dict | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; nothing is generated."""
        start = (options or {}).get("start")
        self.core.reset(seeds=[None if seed is None else check_seed(seed)], starts=[start])
        self._screen.after_reset()
        return self._observations(self.agents), self._infos(self.agents)

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        """One step of the world; ``actions`` holds one for every agent in ``agents``.

        Raises:
            ResetNeeded: before reset, or when nobody plays any more. ActionError: an action is
            missing, out of range, or for somebody who does not play.
        """
        self.core.ready()
        playing = self.agents
        if not playing:
            raise ResetNeeded("step after the end of an episode", given="no agent is left",
                              expected="reset() first", fix="call reset()")
        unknown = sorted(map(str, set(actions) - set(playing)))
        missing = [a for a in playing if a not in actions]
        if unknown or missing:
            raise ActionError("the wrong agents act", given=f"missing {missing}, extra {unknown}",
                              expected=f"one action for each of {playing}",
                              fix="act for every agent in env.agents and for no other")
        joint = np.full(self.players, -1, np.int64)
        for agent in playing:
            joint[self.possible_agents.index(agent)] = self._number(actions[agent], agent)
        rewards, ended, cut = self.advance(joint)
        index = {a: self.possible_agents.index(a) for a in playing}
        ends = {a: bool(ended[i]) for a, i in index.items()}
        cuts = {a: bool(cut and not ends[a]) for a in playing}
        infos = self._infos(playing)
        for agent in playing:
            if cuts[agent]:
                infos[agent]["truncation_reason"] = self._reason
        return (self._observations(playing), {a: float(rewards[i]) for a, i in index.items()},
                ends, cuts, infos)

    def _number(self, action: Any, agent: str) -> int:
        if not self._actions[agent].contains(action):
            raise ActionError("impossible action", given=f"{action!r} of {agent}",
                              expected=f"an integer in 0..{self.core.player_actions.n - 1}",
                              fix="sample from action_space(agent)")
        return int(action)

    def advance(self, actions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """One step of everyone, without the dicts: actions (P,); those of ended players unread.

        Returns:
            rewards float64 (P,); who is out for good, bool (P,); whether the episode is cut.
        """
        batch = self.core.step(np.asarray(actions_P)[None])
        self._reason = REASONS[batch.reason_B[0]]
        self._screen.after_step(batch)
        assert batch.rewards_BP is not None and batch.ended_BP is not None
        return batch.rewards_BP[0], batch.ended_BP[0], bool(batch.truncated_B[0])

    def _observations(self, agents: list[str]) -> dict[str, Any]:
        seen = self.core.observe()
        index = {a: self.possible_agents.index(a) for a in agents}
        if isinstance(seen, dict):
            return {a: {k: v[0, i].copy() for k, v in seen.items()} for a, i in index.items()}
        return {a: seen[0, i].copy() for a, i in index.items()}

    def _infos(self, agents: list[str]) -> dict[str, dict[str, Any]]:
        who, infos = self.core.where(), {}
        for agent in agents:
            i = self.possible_agents.index(agent)
            infos[agent] = {"position": who.position_BP2[0, i].copy(),
                            "alive": bool(who.alive_BP[0, i])}
            if who.orientation_BP is not None:
                infos[agent]["orientation"] = int(who.orientation_BP[0, i])
            if self.core.known:
                infos[agent]["cell"] = cells(who.position_BP2[0, i], self.game)
        return infos

    def state(self) -> np.ndarray:
        """The shared frame, uint8 (H, W, 3); a new array."""
        return self.core.current_frames()[0]

    def render(self) -> np.ndarray | None:
        """The frame enlarged, with the players as the model sees them if ``draw`` says so."""
        if self.render_mode is None:
            return None
        if self.render_mode == "human":
            self._screen.render()
            return None
        return self.picture(self.draw == "players")

    def picture(self, players: bool = True) -> np.ndarray:
        """The picture that ``render`` gives, uint8; with or without the players' marks."""
        if not players:
            return picture(self.state())
        who = self.core.where()
        facing = None if who.orientation_BP is None else who.orientation_BP[0]
        return picture(self.state(), who.position_BP2[0], facing, who.alive_BP[0],
                       self.core.last_actions()[0])

    def close(self) -> None:
        """Give the memory pages back; later calls raise ClosedError."""
        self._screen.close()
        self.core.close()

    # ------------------------------------------------------------------ as the real game

    def scene(self) -> Scene:
        """What scripted players read."""
        return self.core.scenes()[0]

    @property
    def positions_N2(self) -> np.ndarray:
        """Where players stand, float32 (P, 2) in [-1, 1]."""
        return self.core.where().position_BP2[0]


VIEW = ("observation", "frame_stack", "crop_cells", "cell_px")


def parallel_env(world: str | Path | PartyTask = "worldgym/MeltingPotMini-v0",
                 game: str | None = None, players: int | None = None,
                 **settings: Any) -> DreamParallelEnv:
    """A multi-player dream as a PettingZoo ParallelEnv.

    Args:
        world: an id, a world's folder, or a ``PartyTask``.
        game, players: see ``DreamParallelEnv``.
        settings: max_cycles, render_mode, draw, beginnings; observation, frame_stack, crop_cells,
            cell_px (``PartyView``); device.

    Raises:
        ConfigError: an unknown or impossible setting, game, or number of players.
    """
    from worldgym.envs.tasks import check_names

    own = ("max_cycles", "render_mode", "draw", "beginnings")
    check_names(settings, [*own, *VIEW, "device"], "env setting")
    view = PartyView(**{k: settings[k] for k in VIEW if k in settings})
    if isinstance(world, PartyTask):
        if "device" in settings:
            raise ConfigError("device of a task that is already loaded", given=settings["device"],
                              expected="an id or folder", fix="load_party(name, device=...)")
        task = world
    else:
        task = load_party(world, device=settings.get("device", "cpu"))
    return DreamParallelEnv(task, game, players, view=view,
                            **{k: settings[k] for k in own if k in settings})


def env(world: str | Path | PartyTask = "worldgym/MeltingPotMini-v0", *args: Any,
        **settings: Any) -> Any:
    """The same as an AEC environment, by PettingZoo's own conversion."""
    from pettingzoo.utils import parallel_to_aec

    return parallel_to_aec(parallel_env(world, *args, **settings))
