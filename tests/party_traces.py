"""Records the traces in tests/traces (``PYTHONPATH=. python tests/party_traces.py``).

The simulator's seeds do not reproduce an episode, so what is tested exactly is tested on these.
"""

import json
from pathlib import Path

import numpy as np

from worldgym.agents.party import party_policy
from worldgym.envs.meltingpot import MeltingPotEnv
from worldgym.envs.party_scene import Scene

FOLDER = Path(__file__).parent / "traces"
PLAYED = {"commons_harvest": (3, 90, "chase"), "predator_prey": (5, 200, "chase")}


def play(name, players, steps, policy):
    env = MeltingPotEnv(name, players, max_cycles=steps)
    env.reset()
    bots = [party_policy(policy) for _ in range(players)]
    for i, bot in enumerate(bots):
        bot.reset(np.random.default_rng(i))
    rows = {k: [] for k in ("frames", "cells", "orientation", "alive", "actions", "rewards",
                            "finished")}
    events, late = [], False

    def note(actions, rewards, finished):
        for key, value in zip(rows, (env.state(), env.cells_N2, env.orientation_N, env.alive_N,
                                     actions, rewards, finished), strict=True):
            rows[key].append(np.array(value))
        events.append(env.events)

    note(np.full(players, -1), np.zeros(players), np.zeros(players, bool))
    finished = rows["finished"][0]
    while not (finished.all() or late):
        scene = Scene(env.game, env.state(), env.cells_N2, env.orientation_N, env.alive_N)
        actions = np.array([bot.act(scene, i) for i, bot in enumerate(bots)])
        rewards, finished, late = env.advance(actions)
        note(actions, rewards, finished)
    env.close()
    return {k: np.stack(v) for k, v in rows.items()} | {"events": np.array(json.dumps(events))}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, how in PLAYED.items():
        trace = play(name, *how)
        np.savez_compressed(FOLDER / f"{name}.npz", **trace)
        print(name, trace["frames"].shape, "out:", (~trace["alive"]).sum(0), "finished at",
              trace["finished"].argmax(0), (FOLDER / f"{name}.npz").stat().st_size, "bytes")
