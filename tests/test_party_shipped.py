"""The shipped world of several players: its files, its card, and what it knows about play."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pettingzoo.test import parallel_api_test, parallel_seed_test

from worldgym.agents import results
from worldgym.envs import parallel_env
from worldgym.envs.party_games import GAMES, NOOP, TURN_LEFT
from worldgym.envs.party_tasks import PARTIES, load_party

ID = "worldgym/MeltingPotMini-v0"
FOLDER = PARTIES[ID]
RESULTS = Path(__file__).resolve().parent.parent / "results" / "party_binding.json"
pytestmark = pytest.mark.skipif(not (FOLDER / "world.safetensors").exists(),
                                reason="no world of several players is shipped")


def test_files_and_card():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 25e6
    card = json.loads((FOLDER / "world.json").read_text())
    made = card["provenance"]
    assert set(made["real_steps_used"]) == set(GAMES) and min(made["real_steps_used"].values()) > 0
    assert "fit-party" in made["command"]
    trained = set()  # in this fit, or in those that it went on from
    while made:
        trained |= {part for part, seconds in made["training_seconds"].items() if seconds > 0}
        made = made.get("started_from")
    assert trained >= {"codec", "dynamics", "outcome"}
    counts = {g: len(GAMES[g].players) for g in GAMES}
    assert len(counts) >= 12 and {max(GAMES[g].players) for g in GAMES} >= {2, 7}
    told = card["metrics"]["pooled"]
    assert told["position_1"] > 0.9 > told["position_1_copy"] + 0.2
    assert told["psnr_1"] > 30


def test_a_frame_does_not_know_its_batch():
    """Decoded among 32 rows and alone: the same bytes."""
    world = load_party(ID).world
    z_BChw = torch.randn(32, *world.spec.latent_chw, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([world.decode(row) for row in z_BChw.split(1)])
    assert torch.equal(world.decode(z_BChw), alone)


@pytest.mark.parametrize("game", GAMES)
def test_every_game_plays(game):
    env = parallel_env(ID, game=game, max_cycles=4)
    observations, _ = env.reset(seed=1)
    assert len(observations) == max(GAMES[game].players)
    assert next(iter(observations.values())).shape == (32, 40, 3)
    steps = 0
    while env.agents:
        env.step({a: env.action_space(a).sample() for a in env.agents})
        steps += 1
    assert steps == 4 or GAMES[game].removed_for_good
    env.close()


def test_pettingzoo_accepts_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_api_test(parallel_env(ID, game="coins", max_cycles=8), num_cycles=12)
        parallel_seed_test(lambda: parallel_env(ID, game="stag_hunt", players=3, max_cycles=6),
                           num_cycles=8)


def test_only_who_acts_turns():
    """In the dream, a player that turns faces elsewhere; the others do not."""
    task = load_party(ID)
    right = wrong = 0
    for seed in range(4):
        env = parallel_env(task, game="clean_up", players=4)
        _, infos = env.reset(seed=seed)
        facing = {a: infos[a]["orientation"] for a in env.agents}
        for who in env.agents:
            state = env.get_state()
            _, _, _, _, infos = env.step({a: TURN_LEFT if a == who else NOOP for a in env.agents})
            for a in env.agents:
                moved = infos[a]["orientation"] - facing[a]
                right += moved % 4 == (3 if a == who else 0)
                wrong += moved % 4 != (3 if a == who else 0)
            env.set_state(state)
    assert right / (right + wrong) > 0.9


@pytest.mark.skipif(not RESULTS.exists(), reason="binding was not measured")
def test_binding_was_measured_with_these_weights():
    data = results.read(RESULTS)
    rows = {(r["what"], r["metric"]): r["value"] for r in data["rows"]}
    for what in ("model", "copy", "real"):
        assert {m for w, m in rows if w == what} >= {"ma_4", "ma_20", "sp_4", "sp_20", "detection"}
    assert rows["model", "ma_4"] > rows["pooled", "ma_4"] + 0.2
    assert rows["model", "ma_4"] > rows["copy", "ma_4"] + 0.3
    assert np.isfinite([v for v in rows.values()]).all()
