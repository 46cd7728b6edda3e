"""Players x slots as one Stable-Baselines3 VecEnv, in the dream or in the real game.

Row r is one player's seat in one slot: ``slot_R[r]``, ``seat_R[r]``. A slot begins anew when its
episode is over, all its players together. Until then the row of a player that is out gives its
last sight, reward 0 and ``done`` False; ``acted_R`` says which rows were played in the last step,
and a learner must leave the others out of its update (``worldgym.agents.party_learner``).

Rows come in the order slot 0 player 0, slot 0 player 1, ... Legend: B slots, P players, R rows,
S crop pixels, k stacked frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from worldgym.envs.core import Batch
from worldgym.envs.face import Face
from worldgym.envs.meltingpot import MeltingPotEnv
from worldgym.envs.opening import check_seed
from worldgym.envs.party_core import PartyCore
from worldgym.envs.party_tasks import PartyTask
from worldgym.envs.party_view import PartyView, Players
from worldgym.envs.screen import Screen
from worldgym.envs.spaces import push
from worldgym.errors import ActionError, ConfigError, MissingDependencyError

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise MissingDependencyError(
        "PartyVecEnv needs Stable-Baselines3", given="no stable_baselines3",
        expected="stable-baselines3>=2.7", fix="pip install 'worldgym[rl]'") from error

# rival: (observations of its seats, noise keys (n, 4) of seed, episode, step, seat) -> actions
Rival = Callable[[np.ndarray, np.ndarray], np.ndarray]
TRAINING_VIEW = PartyView(observation="crop", frame_stack=2, cell_px=4)


def channels_first(seen: np.ndarray) -> np.ndarray:
    """Pictures (..., S, S, C) as (..., C, S, S), which Stable-Baselines3 takes as they are."""
    return np.ascontiguousarray(np.moveaxis(seen, -1, -3))


class RealParty:
    """B real games with the surface of a ``PartyCore``; they start anew on their own.

    Args:
        game, players: see ``MeltingPotEnv``. num_slots: B. view: what players are shown.
        cell_px: pixels of a cell in the frame; horizon: steps until truncation, None: the game's.
    """

    def __init__(self, game: str, players: int | None, num_slots: int, view: PartyView, *,
                 cell_px: int = 8, horizon: int | None = None) -> None:
        self.games = [MeltingPotEnv(game, players, max_cycles=horizon, cell_px=cell_px)
                      for _ in range(num_slots)]
        first = self.games[0]
        self.num_slots, self.players, self.seen = num_slots, first.players, view
        self.player_space = view.space(first.frame_hw, (1, 1, 1))
        self.player_actions = first.action_space("player_0")
        self.ended_BP = np.zeros((num_slots, self.players), bool)
        self.stack_B = np.zeros((num_slots, *first.frame_hw, 3 * view.frame_stack), np.uint8)
        self.count_B = np.zeros((num_slots, 2), np.int64)  # episode, step
        self.seed = 0

    def reset(self, *, seeds: Sequence[int | None] | None = None, slots: Any = None,
              starts: Any = None) -> None:
        """Begin episodes; seeds are told to the game, which does not keep them."""
        if seeds is not None and seeds[0] is not None:
            self.seed = seeds[0]
        for row, b in enumerate(range(self.num_slots) if slots is None else slots):
            self.games[b].reset(seed=None if seeds is None else seeds[row])
            self.stack_B[b] = np.tile(self.games[b].state(), self.seen.frame_stack)
            self.ended_BP[b] = False
            self.count_B[b] = self.count_B[b, 0] + 1, 0

    def where(self) -> Players:
        """Where everybody is, as the game tells."""
        games = self.games
        return Players(position_BP2=np.stack([g.positions_N2 for g in games]),
                       orientation_BP=np.stack([g.orientation_N for g in games]),
                       alive_BP=np.stack([g.alive_N for g in games]), ended_BP=self.ended_BP.copy())

    @property
    def playing_BP(self) -> np.ndarray:
        """Who may act."""
        return ~self.ended_BP

    def observe(self) -> Any:
        """What every player sees (B, P, ...)."""
        return self.seen.observe(self.stack_B, self.where())

    def noise_keys(self) -> np.ndarray:
        """(seed, episode, step) of every slot, (B, 3)."""
        seeds = self.seed + np.arange(self.num_slots)
        return np.concatenate([seeds[:, None], self.count_B], 1)

    def step(self, joint_BP: np.ndarray, autoreset: str = "SameStep") -> Batch:
        """One step of every game; finished ones begin anew at once."""
        b = self.num_slots
        rewards, late = np.zeros((b, self.players)), np.zeros(b, bool)
        for i, game in enumerate(self.games):
            got, finished, late[i] = game.advance(joint_BP[i])
            rewards[i] = np.where(self.ended_BP[i], 0, got)
            self.ended_BP[i] |= finished
            self.stack_B[i] = push(self.stack_B[i][None], game.state()[None], "frame")[0]
        self.count_B[:, 1] += 1
        over = np.asarray(self.ended_BP.all(1))
        made = Batch(obs_B=self.stack_B, reward_B=rewards.sum(1), terminated_B=over,
                     truncated_B=late & ~over, reason_B=np.zeros(b, np.int8),
                     last_frame_B=np.zeros(b, np.int64), length_B=self.count_B[:, 1].copy(),
                     return_B=np.zeros(b), stepped_B=np.ones(b, bool), rewards_BP=rewards,
                     ended_BP=self.ended_BP.copy())
        if (over | late).any():
            made.finished = np.flatnonzero(over | late)
            made.final_obs = self.observe()[made.finished]
            self.reset(slots=made.finished)
        return made

    def close(self) -> None:
        """End every game."""
        for game in self.games:
            game.close()


class PartyVecEnv(VecEnv):
    """Rows of a ``PartyCore`` or ``RealParty``.

    Args:
        source: the slots.
        rivals: how many seats of every slot a ``rival`` plays instead of the learner; which ones
            turns from slot to slot, so that the learner sits on every seat.
        seed: of the first reset; slot b gets seed + b.
    """

    def __init__(self, source: PartyCore | RealParty, *, rivals: int = 0, seed: int = 0) -> None:
        if not 0 <= rivals < source.players:
            raise ConfigError("impossible number of rivals", given=rivals,
                              expected=f"0..{source.players - 1} of {source.players} players",
                              fix="leave one seat to the learner at least")
        if source.seen.observation != "crop":
            raise ConfigError("rows of this observation cannot be told apart",
                              given=source.seen.observation, expected='"crop": each player its own',
                              fix='pass PartyView(observation="crop")')
        self.source, self.rival, self.render_mode = source, None, None
        b, p = source.num_slots, source.players
        seat = np.arange(p)[None]
        first = np.arange(b)[:, None] % p
        self.rival_BP = (seat - first) % p < rivals
        self.slot_R, self.seat_R = np.nonzero(~self.rival_BP)
        self.acted_R = np.zeros(len(self.slot_R), bool)
        self._first = seed
        self._joint: np.ndarray | None = None
        side, _, channels = source.player_space.shape  # type: ignore[misc]
        space = spaces.Box(0, 255, (channels, side, side), np.uint8)
        super().__init__(len(self.slot_R), space, source.player_actions)
        self._seeds = [seed + i for i in range(self.num_envs)]

    rival: Rival | None

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds of the next reset: slot b gets seed + b."""
        first = self._first if seed is None else check_seed(seed)
        self._seeds = [first + i for i in range(self.num_envs)]
        return self._seeds

    def reset(self) -> np.ndarray:
        """Start an episode in every slot."""
        first = self._seeds[0] if self._seeds else None
        count = self.source.num_slots
        self.source.reset(seeds=[None if first is None else first + b for b in range(count)])
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._joint = None
        return self._rows(self.source.observe())

    def _rows(self, seen_BP: np.ndarray) -> np.ndarray:
        return channels_first(seen_BP[self.slot_R, self.seat_R])

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for ``step_wait``; rivals decide now."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,):
            raise ActionError("wrong number of actions", given=actions.shape,
                              expected=(self.num_envs,), fix="give one action for every row")
        joint = np.zeros((self.source.num_slots, self.source.players), np.int64)
        joint[self.slot_R, self.seat_R] = actions
        if self.rival_BP.any():
            if self.rival is None:
                raise ConfigError("nobody plays the rivals' seats", given="rival None",
                                  expected="a callable", fix="set env.rival before stepping")
            slot, seat = np.nonzero(self.rival_BP)
            keys = np.concatenate([self.source.noise_keys()[slot], seat[:, None]], 1)
            seen = channels_first(self.source.observe()[slot, seat])
            joint[slot, seat] = self.rival(seen, keys)
        self._joint = joint

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One step of every slot."""
        if self._joint is None:
            raise ActionError("no action is waiting", given="step_wait() alone",
                              expected="step_async(actions) first", fix="call step(actions)")
        joint, self._joint = self._joint, None
        played = self.source.playing_BP
        batch = self.source.step(joint, "SameStep")
        assert batch.rewards_BP is not None and batch.ended_BP is not None
        cut_BP = batch.truncated_B[:, None] & ~batch.ended_BP
        done_BP = played & (batch.ended_BP | cut_BP)
        pick = self.slot_R, self.seat_R
        self.acted_R = played[pick]
        obs = self._rows(self.source.observe())
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        done_R = done_BP[pick]
        rank = {} if batch.finished is None else {int(b): i for i, b in enumerate(batch.finished)}
        for r in np.flatnonzero(done_R):
            slot, seat = int(self.slot_R[r]), int(self.seat_R[r])
            last = obs[r]
            if slot in rank:
                last = channels_first(batch.final_obs[rank[slot], seat])  # type: ignore[index]
            infos[r] = {"terminal_observation": last.copy(),
                        "TimeLimit.truncated": bool(cut_BP[slot, seat])}
        return obs, batch.rewards_BP[pick].astype(np.float32), done_R, infos

    def close(self) -> None:
        """Give back what the slots hold."""
        self.source.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, which all rows share, once per row."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute for all rows at once."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ConfigError("rows share their attributes", given=f"indices={indices}",
                              expected="indices=None", fix="make another env")
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None,
                   **method_kwargs: Any) -> list[Any]:
        """None: a row is no environment (AttributeError, as Stable-Baselines3 expects)."""
        raise AttributeError(f"a row of PartyVecEnv has no method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """No row is ever wrapped."""
        return [False] * len(list(self._get_indices(indices)))


class DreamPartyVecEnv(Face, PartyVecEnv):
    """``PartyVecEnv`` over a dream: state in and out, forks.

    Args:
        task: world, starts, games. game, players, beginnings: see ``PartyCore``.
        num_slots: dreams in one batch. horizon: steps until truncation, None: the task's.
        view: what players are shown; a crop. rivals, seed: see ``PartyVecEnv``.
    """

    def __init__(self, task: PartyTask, game: str | None = None, players: int | None = None,
                 num_slots: int = 1, *, horizon: int | None = None,
                 view: PartyView = TRAINING_VIEW, rivals: int = 0, seed: int = 0,
                 beginnings: bool = False) -> None:
        self._settings = {"horizon": horizon, "view": view, "rivals": rivals, "seed": seed,
                          "beginnings": beginnings}
        self.core: PartyCore = PartyCore(task, game, players, num_slots, view,
                                         beginnings=beginnings,
                                         horizon="task" if horizon is None else horizon)
        self._screen = Screen(None, self.core)
        PartyVecEnv.__init__(self, self.core, rivals=rivals, seed=seed)

    def _sibling(self) -> DreamPartyVecEnv:
        core = self.core
        made = type(self)(core.party, core.game, core.players, core.num_slots,
                          **self._settings)  # type: ignore[arg-type]
        made.rival = self.rival
        return made

    def set_state(self, state: Any) -> None:
        """Go on from a state of this env, or of another with the same settings."""
        super().set_state(state)
        self._joint = None
