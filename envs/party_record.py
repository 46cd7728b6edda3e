"""Recording the mini-map games: one data set per game in a folder, frames and all players.

Layout of ``OUT``: one ``worldgym.data.store.Episodes`` per game (``OUT/coins``, ...) with
``agents`` = 8 slots; besides frames, actions and rewards every row has

    info_position     float32 (8, 2)  centre of the player's cell over the frame, x y in [-1, 1];
                                      nan in free slots; out of play: where it stood last
    info_orientation  int8 (8,)       0 N 1 E 2 S 3 W, -1 in free slots
    info_alive        bool (8,)       on the map
    info_valid        bool (8,)       the slot has a player (constant in an episode)
    info_ended        bool (8,)       this row finished the player for good (on one row at most)

``env["recipe"]`` of a data set is the game as data (map, offsets through it, roles). The name of
an episode's policy lists its players': ``gather|random:2``. A player who is out acts 0 (noop).
Episodes cannot be made again (the simulator's seeds do not hold), so ``seed`` is None; which
players meet depends on (seed, episode) alone. Legend: T steps, N players.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.data.store import Episodes
from worldgym.envs.meltingpot import CELLS_HW, STEPS_PER_SECOND, MeltingPotEnv
from worldgym.envs.party_games import ABSENT, ACTIONS, SLOTS, PartyGame, game_named
from worldgym.envs.party_scene import Scene
from worldgym.envs.record import open_store, record_into
from worldgym.errors import ConfigError

PlayerFactory = Callable[[], Any]
SAME = 0.25  # share of episodes in which all players have the same policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Party:
    """What a game's data set holds after ``collect_party``; ``policies``: name -> {"n": players'
    episodes, "mean_return", "std_return"} (per player); steps per second include resets."""

    path: str
    episodes: int
    steps: int
    new_steps: int
    seconds: float
    policies: dict[str, dict[str, float]]

    def __str__(self) -> str:
        rate = f", {self.new_steps / self.seconds:.0f} steps/s" if self.new_steps else ""
        lines = [f"{self.path}: {self.episodes} episodes, {self.steps} steps "
                 f"({self.new_steps} new in {self.seconds:.0f} s{rate})"]
        return "\n".join(lines + [
            f"  {name}: mean return {p['mean_return']:.2f} (std {p['std_return']:.2f}, "
            f"n = {p['n']} players' episodes)" for name, p in self.policies.items()])


def collect_party(game: str | PartyGame, out: str | Path, *, steps: int | None = None,
                  episodes: int | None = None,
                  policies: Sequence[tuple[str, float, PlayerFactory]], seed: int = 0,
                  players: Sequence[int] | None = None, cell_px: int = 8,
                  max_cycles: int | None = None, shard_episodes: int = 16,
                  progress: bool = True) -> Party:
    """Record one game until the data set in ``out`` holds so many steps or episodes.

    What is there counts; whole episodes only; a killed recording goes on after its last shard.

    Args:
        game: name or ``PartyGame``.
        out: folder of this game's data set.
        steps, episodes: when to stop, at least one of them.
        policies: (name, weight, factory of a ``worldgym.agents.party.Player``); drawn for every
            player of every episode, in a quarter of the episodes for all of them together.
        seed: of who plays.
        players: numbers of players to draw from; default: all that the game takes.
        cell_px, max_cycles: as in ``MeltingPotEnv``.
    """
    game = game if isinstance(game, PartyGame) else game_named(game)
    counts = tuple(game.players if players is None else players)
    if not counts or set(counts) - set(game.players) or (steps is None and episodes is None) or (
            not policies or min(weight for _, weight, _ in policies) < 0):
        raise ConfigError("impossible recording", given=f"{game.name}, players {counts}, steps "
                          f"{steps}, episodes {episodes}, {len(policies)} policies",
                          expected=f"players among {game.players}, steps or episodes, policies",
                          fix="pass steps=10_000 and policies=[('random', 1.0, Random)]")
    begun = time.monotonic()
    table = _Table(game, counts, policies, seed, cell_px, max_cycles)
    hw = (CELLS_HW[0] * cell_px, CELLS_HW[1] * cell_px)
    made = json.loads(json.dumps({"recipe": game.recipe(), "cell_px": cell_px,
                                  "max_cycles": table.max_cycles, "record_seed": int(seed)}))
    store = open_store(Path(out), ActionSpec.discrete(len(ACTIONS)), hw, STEPS_PER_SECOND, made,
                       SLOTS)
    had = store.steps
    try:
        record_into(store, table.play, steps=steps, episodes=episodes, progress=progress,
                    shard_episodes=shard_episodes, label=game.name)
    finally:
        table.close()
    return Party(path=str(out), episodes=len(store), steps=store.steps,
                 new_steps=store.steps - had, seconds=time.monotonic() - begun,
                 policies=returns_by_player(store))


def returns_by_player(store: Episodes) -> dict[str, dict[str, float]]:
    """Return per player's episode, by the player's policy."""
    found: dict[str, list[float]] = {}
    for i, names in enumerate(store.policies):
        totals = store.episode(i)["rewards"].sum(0, dtype=np.float64)
        for slot, name in enumerate(names.split("|")):
            found.setdefault(name, []).append(float(totals[slot]))
    return {name: {"n": len(got), "mean_return": float(np.mean(got)),
                   "std_return": float(np.std(got))} for name, got in sorted(found.items())}


class _Table:
    """Plays one episode at a time; keeps one simulator per number of players."""

    def __init__(self, game: PartyGame, counts: Sequence[int],
                 policies: Sequence[tuple[str, float, PlayerFactory]], seed: int, cell_px: int,
                 max_cycles: int | None) -> None:
        self.game, self.counts, self.seed, self.cell_px = game, counts, seed, cell_px
        self.max_cycles = game.max_cycles if max_cycles is None else max_cycles
        self.policies = policies
        weights = np.array([weight for _, weight, _ in policies], float)
        self.chances = weights / weights.sum()
        self.envs: dict[int, MeltingPotEnv] = {}

    def close(self) -> None:
        for env in self.envs.values():
            env.close()

    def play(self, number: int) -> dict[str, Any]:
        """One episode, as the store takes it."""
        rng = np.random.default_rng([self.seed, number])
        n = int(self.counts[int(rng.integers(len(self.counts)))])
        if n not in self.envs:
            self.envs[n] = MeltingPotEnv(self.game, n, max_cycles=self.max_cycles,
                                         cell_px=self.cell_px)
        which = rng.choice(len(self.policies), size=n, p=self.chances)
        if rng.random() < SAME:
            which[:] = which[0]
        players = [self.policies[k][2]() for k in which]
        for i, player in enumerate(players):
            player.reset(np.random.default_rng([self.seed, number, i]))
        rows = play_rows(self.envs[n], players)
        return rows | {"seed": None, "policy": "|".join(self.policies[k][0] for k in which)}


def play_rows(env: Any, players: Sequence[Any], seed: int | None = None) -> dict[str, Any]:
    """The rows of one episode of a real game or a dream, as the store takes them.

    Args:
        env: a ``MeltingPotEnv`` or a ``DreamParallelEnv``.
        players: one ``worldgym.agents.party.Player`` each, reset.
        seed: of the episode; None: the env's next.
    """
    env.reset(seed=seed)
    n = env.players
    nothing = np.zeros(n)
    scene = env.scene()
    rows = [_row(env, scene, np.full(n, ABSENT), nothing, nothing)]
    done, finished, late = np.zeros(n, bool), np.zeros(n, bool), False
    while not (done.all() or late):
        for i, player in enumerate(players):
            player.watch(scene, i)
        joint = np.array([0 if done[i] or not scene.alive_N[i] else player.act(scene, i)
                          for i, player in enumerate(players)])
        rewards, finished, late = env.advance(joint)
        scene = env.scene()
        rows.append(_row(env, scene, joint, np.where(done, 0, rewards), finished & ~done))
        done = done | finished
    last = np.arange(len(rows)) == len(rows) - 1
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
        "terminated": last & bool(done.all()), "truncated": last & (not done.all())}


def _row(env: Any, scene: Scene, actions: np.ndarray, rewards: np.ndarray,
         ended: np.ndarray) -> dict[str, np.ndarray]:
    """One row of the store, padded to all slots."""
    n = env.players

    def pad(values: np.ndarray, dtype: type, empty: float) -> np.ndarray:
        out = np.full((SLOTS, *values.shape[1:]), empty, dtype)
        out[:n] = values
        return out

    return {"frames": scene.frame, "actions": pad(actions, np.int16, ABSENT),
            "rewards": pad(rewards, np.float32, 0),
            "info_position": pad(env.positions_N2, np.float32, np.nan),
            "info_orientation": pad(scene.orientation_N, np.int8, -1),
            "info_alive": pad(scene.alive_N, np.bool_, False),
            "info_valid": pad(np.ones(n), np.bool_, False),
            "info_ended": pad(ended, np.bool_, False)}
