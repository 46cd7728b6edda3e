"""Rollouts of a game of several players, in a dream or for real: recordings and a film.

The recording has the format of ``worldgym collect-party`` (``worldgym.envs.party_record``), so that
the same tools read both; ``env["where"]`` says what was played.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.party_agent import team
from worldgym.agents.video import panel, write
from worldgym.data.store import Episodes
from worldgym.envs.party_draw import picture
from worldgym.envs.party_games import ACTIONS, CELLS_HW, SLOTS
from worldgym.envs.party_record import play_rows
from worldgym.envs.record import open_store, record_into
from worldgym.errors import ConfigError

REAL = "real"


def game_env(env: str | Path, game: str | None, players: int | None, *,
             max_cycles: int | None = None, cell_px: int = 8) -> Any:
    """A ``DreamParallelEnv`` of an id or folder that begins where episodes began, or the real game
    for ``env`` "real"."""
    if str(env) == REAL:
        from worldgym.envs.meltingpot import MeltingPotEnv

        return MeltingPotEnv(game or "coins", players, max_cycles=max_cycles, cell_px=cell_px)
    from worldgym.envs.parallel import parallel_env

    return parallel_env(env, game, players, max_cycles=max_cycles, beginnings=True)


def rollout(env: Any, policies: Sequence[str], out: str | Path, episodes: int, *, seed: int = 0,
            where: str = "dream", draw: bool = True, progress: bool = True) -> Episodes:
    """Record until the data set in ``out`` holds so many episodes; a killed rollout goes on.

    Args:
        env: a ``DreamParallelEnv`` or ``MeltingPotEnv``; it is not closed.
        policies: one for everybody, or one for each player (see ``party_agent.team``).
        out: folder of the data set, one game and number of players.
        seed: dreamt episode e has seed + e; players' choices follow from (seed, e, seat).
        where: kept with the recording.

    Raises:
        ConfigError: policies do not fit, or ``out`` holds something else.
    """
    if episodes < 1 or env.players > SLOTS:
        raise ConfigError("impossible rollout", given=f"{episodes} episodes, {env.players} players",
                          expected=f"1 or more episodes, at most {SLOTS} players",
                          fix="pass episodes=10")
    makers, dream = team(policies, env.players, draw), hasattr(env, "core")
    said = "|".join(maker().name for maker in makers)
    cell_px = env.frame_hw[0] // CELLS_HW[0]
    made = json.loads(json.dumps({
        "recipe": env.game.recipe(), "cell_px": cell_px, "max_cycles": env.max_cycles,
        "record_seed": int(seed), "where": where, "players": env.players, "policies": said}))
    fps = float(env.metadata["render_fps"])
    store = open_store(Path(out), ActionSpec.discrete(len(ACTIONS)), env.frame_hw, fps, made, SLOTS)

    def play(number: int) -> dict[str, Any]:
        players = [make() for make in makers]
        for i, player in enumerate(players):
            player.reset(np.random.default_rng([seed, number, i]))
        mine = seed + number if dream else None
        return play_rows(env, players, mine) | {"seed": mine, "policy": said}

    record_into(store, play, steps=None, episodes=episodes, shard_episodes=4, progress=progress,
                label=env.game.name)
    return store


def film(store: Episodes, path: str | Path, episodes: int = 4, marks: bool = True,
         label: str = "") -> Path:
    """The first episodes of a recording as an mp4, one after another.

    Args:
        marks: draw where players stand and what they did (of a dream: as the model tells).
        label: shown above the picture.
    """
    pictures: list[np.ndarray] = []
    for number in range(min(episodes, len(store))):
        rows = store.episode(number)
        valid = rows["info_valid"][0]
        total = np.zeros(int(valid.sum()))
        for t in range(len(rows["frames"])):
            total += rows["rewards"][t][valid]
            shown = picture(rows["frames"][t], *[
                rows[name][t][valid] for name in ("info_position", "info_orientation",
                                                  "info_alive", "actions")]) if marks else (
                picture(rows["frames"][t]))
            paid = " ".join(f"{x:.1f}" for x in total)
            pictures.append(panel(shown, f"{label} #{number} t={t}  {paid}"))
    return write(path, pictures, store.fps)
