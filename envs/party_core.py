"""The batched core with several players in every slot: the part behind all multi-agent faces.

Shapes: B slots, n reset slots, P players of the game, N places for players in the world.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces

from worldgym.data.starts import hash64
from worldgym.envs.core import Batch, DreamCore
from worldgym.envs.opening import ViewConfig
from worldgym.envs.party_games import ACTIONS, GAMES, NOOP, PartyGame
from worldgym.envs.party_scene import Scene, cells
from worldgym.envs.party_tasks import PartyTask
from worldgym.envs.party_view import PartyView, Players
from worldgym.envs.spaces import to_numpy
from worldgym.envs.state import CoreState
from worldgym.envs.tasks import Task
from worldgym.errors import ActionError, ConfigError, ShapeError

BLOCK = 256  # starts looked at together


class GameStarts:
    """The starts of one game and number of players out of a larger bank; indices are its own."""

    def __init__(self, bank: Any, rows: np.ndarray) -> None:
        self.bank, self.rows = bank, rows
        if hasattr(bank, "last_frames"):
            self.last_frames = lambda index: bank.last_frames(self.rows[np.asarray(index)])

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, seeds: Any, episodes: Any) -> np.ndarray:
        """Index of the start for each (seed, episode); depends on nothing else."""
        return (hash64(seeds, episodes) % np.uint64(len(self))).astype(np.int64)

    def gather(self, index: Any) -> Any:
        """These starts."""
        return self.bank.gather(self.rows[np.asarray(index, np.int64)])

    def encode_frames(self, world: Any, frames: np.ndarray) -> Any:
        """Refused: a picture does not tell where the players are."""
        raise ConfigError("a picture alone is no start of a party", given="a start image",
                          expected="a start with its players' positions",
                          fix='pass options={"start": index}')


@functools.lru_cache(maxsize=8)
def _facts(bank: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every start of a bank: game number, number of players, whether all are on the map."""
    games, players, whole = [], [], []
    for first in range(0, len(bank), BLOCK):
        some = bank.gather(np.arange(first, min(first + BLOCK, len(bank))))
        valid, states = to_numpy(some.valid_BN), to_numpy(some.subjects_BKNS)[:, -1]
        games.append(np.zeros(len(valid), np.int64) if some.game_B is None
                     else to_numpy(some.game_B))
        players.append(valid.sum(1))
        out = valid & (states[..., 6] <= 0) if states.shape[-1] > 2 else np.zeros_like(valid)
        whole.append(~out.any(1))
    return np.concatenate(games), np.concatenate(players), np.concatenate(whole)


def choose(task: PartyTask, game: str | None, players: int | None,
           beginnings: bool = False) -> tuple[str, int, GameStarts]:
    """The game's name, number of players, and the starts that fit.

    Where a player taken out stays out, starts in which one already is are left out: it would be
    neither playing nor ended.

    Args:
        game: a name, None: the task's first. players: None: the most its starts have.
        beginnings: only starts that are the first frame of an episode, where the bank knows.

    Raises:
        ConfigError: no such game, or no start with so many players.
    """
    game = task.games[0] if game is None else game
    if game not in task.games:
        raise ConfigError("unknown game", given=repr(game), expected=f"one of {task.games}",
                          fix="check the spelling, or load a world that knows it")
    game_N, players_N, whole_N = _facts(task.starts)
    mine = game_N == task.games.index(game)
    if game in GAMES and GAMES[game].removed_for_good:
        mine &= whole_N
    counts = sorted({int(n) for n in players_N[mine]})
    if not counts:
        raise ConfigError("no start of this game", given=game, expected="a bank with some",
                          fix="build the start bank from recordings of this game, too")
    wanted = counts[-1] if players is None else players
    if isinstance(wanted, bool) or wanted not in counts:
        raise ConfigError("this game does not take so many players", given=f"{players!r} in {game}",
                          expected=f"one of {counts}", fix="pass players=... from that list")
    rows = np.flatnonzero(mine & (players_N == wanted))
    first = getattr(task.starts, "beginnings", None)
    if beginnings and first is not None and np.asarray(first)[rows].any():
        rows = rows[np.asarray(first)[rows]]
    return game, int(wanted), GameStarts(task.starts, rows)


class PartyCore(DreamCore):
    """B dreams of one game with P players each; ``step`` takes (B, P) actions.

    Player p has the p-th taken place of its slot's start. What is given for a player that is out
    is not read; where the world tells who is alive, players off the map do nothing, as in the
    recordings. ``Batch.rewards_BP`` and ``Batch.ended_BP`` are per player; a slot terminates when
    all its players have ended.

    Args:
        task: world, starts, games.
        game, players, beginnings: see ``choose``.
        num_slots: B. view: what players are shown.
        horizon: steps until truncation; "task": the task's.
    """

    def __init__(self, task: PartyTask, game: str | None = None, players: int | None = None,
                 num_slots: int = 1, view: PartyView | None = None, *, beginnings: bool = False,
                 horizon: int | None | str = "task") -> None:
        self.party, self.seen = task, view or PartyView()
        self.game, self.players, bank = choose(task, game, players, beginnings)
        cut: Any = task.horizon if horizon == "task" else horizon
        super().__init__(
            Task(world=task.world, starts=bank, name=f"{task.name}:{self.game}", horizon=cut),
            num_slots, ViewConfig(observation=self.seen.shared, info_frames=False,
                                  frame_stack=self.seen.frame_stack))
        self.player_space = self.seen.space(tuple(self.spec.frame_hw), tuple(self.spec.latent_chw))
        self.player_actions = spaces.Discrete(int(self.spec.action.sizes[0]))

    @property
    def rules(self) -> PartyGame:
        """The game as data.

        Raises:
            ConfigError: it is none of the known mini-maps.
        """
        if self.game not in GAMES:
            raise ConfigError("the map of this game is not known", given=self.game,
                              expected=f"one of {[*GAMES]}", fix="use positions instead of cells")
        return GAMES[self.game]

    @property
    def known(self) -> bool:
        """Whether the game's map is known."""
        return self.game in GAMES

    def scenes(self) -> list[Scene]:
        """What scripted players read, one per slot.

        Raises:
            ConfigError: the map is not known, or the model does not tell facings.
        """
        who, frames, rules = self.where(), self.current_frames(), self.rules
        if who.orientation_BP is None:
            raise ConfigError("this world does not tell where players face", given=self.spec.name,
                              expected="a world with facing (and alive) in its players' states",
                              fix="fit it with facing, or use policies that need none")
        at = cells(who.position_BP2, rules)
        last = np.array(rules.cells_hw[::-1]) - 1  # a prediction may lie beyond the map
        at = np.clip(at, 0, last)
        return [Scene(rules, frames[b], at[b], who.orientation_BP[b], who.alive_BP[b],
                      who.position_BP2[b])
                for b in range(self.num_slots)]

    def set_horizon(self, steps: int | None) -> None:
        """Cut episodes after so many steps."""
        self.task = replace(self.task, horizon=steps)

    def metadata(self) -> dict[str, Any]:
        """What a caller must know, as data."""
        return super().metadata() | {"observation": self.seen.observation, "game": self.game,
                                     "players": self.players}

    def fits(self) -> dict[str, Any]:
        """What a saved state must agree with."""
        return super().fits() | {"game": self.game, "players": self.players}

    # ------------------------------------------------------------------ players

    def places(self, state: CoreState | None = None) -> np.ndarray:
        """Place in the world of every player, (B, P)."""
        valid = to_numpy((state or self.ready()).world.extra["valid"])
        return np.argsort(~valid, axis=1, kind="stable")[:, :self.players]

    def where(self, state: CoreState | None = None) -> Players:
        """Where everybody is, as the model tells."""
        state = state or self.ready()
        extra, at = state.world.extra, self.places(state)
        states = np.take_along_axis(to_numpy(extra["subjects"])[:, -1], at[..., None], 1)
        ended = np.take_along_axis(to_numpy(extra["ended"]), at, 1)
        alive, facing = ~ended, None
        if states.shape[-1] > 2:
            facing = states[..., 2:6].argmax(-1)
            alive = alive & (states[..., 6] > 0)
        return Players(position_BP2=np.array(states[..., :2], np.float32), orientation_BP=facing,
                       alive_BP=alive, ended_BP=ended)

    def last_actions(self) -> np.ndarray:
        """What every player did last (B, P); -1: nothing led here."""
        world = self.ready().world
        acts = np.take_along_axis(to_numpy(world.extra["controls"])[:, -1], self.places(), 1)
        return np.where(acts >= self.player_actions.n, -1, acts)

    @property
    def playing_BP(self) -> np.ndarray:
        """Who may act: not out, in a slot whose episode goes on."""
        return ~self.where().ended_BP & ~self.ready().done_B[:, None]

    def observe(self, state: CoreState | None = None) -> Any:
        """What every player sees (B, P, ...)."""
        state = state or self.ready()
        return self.seen.observe(state.stack_B, self.where(state))

    def noise_keys(self) -> np.ndarray:
        """(seed, episode, step) of every slot, (B, 3)."""
        state = self.ready()
        return np.stack([state.seed_B, state.episode_B, state.elapsed_B], 1)

    # ------------------------------------------------------------------ hooks of a step

    def _check_actions(self, actions: Any, live_B: np.ndarray) -> np.ndarray:
        array, state = np.asarray(actions), self.ready()
        if array.shape != (self.num_slots, self.players) or array.dtype.kind not in "iu":
            raise ShapeError("joint actions have the wrong form",
                             given=f"{array.dtype} {array.shape}",
                             expected=f"integers ({self.num_slots} slots, {self.players} players)",
                             fix="give one action for every player of every slot")
        who, count = self.where(state), int(self.player_actions.n)
        plays = ~who.ended_BP & live_B[:, None]
        bad = plays & ((array < 0) | (array >= count))
        if bad.any():
            slot, player = np.argwhere(bad)[0]
            raise ActionError("impossible action",
                              given=f"{array[slot, player]} of player_{player}",
                              expected=f"0..{count - 1}", fix="sample from action_space(agent)")
        array = np.where(plays, np.where(who.alive_BP, array, NOOP), -1)
        out = np.full((self.num_slots, *self.spec.action.shape), -1, np.int64)
        np.put_along_axis(out, self.places(state), array, 1)
        return out

    def _note(self, batch: Batch, chunk: Any, rows: Any) -> None:
        at = self.places()
        batch.rewards_BP = np.zeros(at.shape)
        batch.ended_BP = self.where().ended_BP.copy()
        told, mine = chunk.subjects, at[rows]
        batch.rewards_BP[rows] = np.take_along_axis(told.rewards_BN, mine, 1)
        batch.ended_BP[rows] = np.take_along_axis(told.ended_BN, mine, 1)

    def _last_seen(self, state: CoreState, slots: np.ndarray) -> Any:
        part = state.select([int(s) for s in slots])
        return self.observe(part)


def action_names(count: int) -> tuple[str, ...]:
    """Names of the actions, where they are those of the mini-map games."""
    return ACTIONS if count == len(ACTIONS) else tuple(map(str, range(count)))
