"""The shipped rooms: files, card, faces, a memory that brings views back, walls and the goal."""

import json
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import worldgym  # noqa: F401
from worldgym.agents import results, revisit
from worldgym.envs.rooms import FRAME_HW, GAME, LABELS, Rooms, Seeker
from worldgym.envs.tasks import TASKS, load_task
from worldgym.envs.worldplay import WorldPlayEnv
from worldgym.models import rooms
from worldgym.testing import check_dream_env

ID = "worldgym/Rooms-v0"
FOLDER = TASKS[ID]["folder"]
RESULTS = Path(__file__).resolve().parent.parent / "results" / "rooms_revisit.json"
pytestmark = pytest.mark.skipif(not (FOLDER / "world.safetensors").exists(),
                                reason="no rooms are shipped")
AHEAD, RIGHT, LEFT = (LABELS.index(n) for n in (9, 1, 2))


def test_files_and_card():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 25e6
    card = json.loads((FOLDER / "world.json").read_text())
    made = card["provenance"]
    assert "worldgym fit-rooms" in made["command"] and made["real_steps_used"] > 100_000
    assert min(made["training_seconds"][k] for k in ("codec", "dynamics", "outcome")) > 0
    assert load_task(ID).twin == GAME and card["config"]["memory"] == "memory"


def test_faces_accept_it():
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ID, horizon=4)
        check_env(env.unwrapped, skip_render_check=True)
        obs, _ = env.reset(seed=0)
        assert obs.shape == (*FRAME_HW, 3) and env.action_space.n == len(LABELS)
        several = gymnasium.make_vec(ID, num_envs=2, horizon=4)
        assert several.reset(seed=0)[0].shape == (2, *FRAME_HW, 3)
    report = check_dream_env(partial(make, horizon=3), steps=3, other_process=False)
    assert {"state", "fork", "seeds", "gymnasium", "sb3"} <= set(report.passed), report


def make(**settings):
    return WorldPlayEnv(load_task(ID, **settings))


def test_what_was_seen_comes_back_through_the_memory_alone():
    """Out and back; all in the middle of the way is out of sight of the newest frames."""
    ways = revisit.find_routes(4, 10, FRAME_HW, seed=1_500_000)
    psnr = {}
    for name, changes in (("memory", {}), ("none", {"memory": "none"})):
        world = rooms.load(FOLDER, **changes)
        world.heads = None
        made = revisit.dream(world, ways)
        psnr[name] = np.mean([revisit.compare(world, w, m)["psnr"]
                              for w, m in zip(ways, made, strict=True)])
    assert psnr["memory"] > psnr["none"] + 2


def test_a_turn_shows_what_turning_back_hides():
    env = make()
    first, _ = env.reset(seed=4)
    away = env.step(RIGHT)[0]
    back = env.step(LEFT)[0]
    gap = [np.abs(x.astype(float) - first).mean() for x in (away, back)]
    assert gap[1] < 0.5 * gap[0]


def test_walls_stop_the_dream_where_they_stop_the_game():
    """Heads against the game: is the next move free, from frames of real walks?"""
    net = rooms.load_net(FOLDER).eval()
    right, free = [], []
    for seed in range(24):
        game, rng = Rooms(horizon=None), np.random.default_rng(seed)
        frame, _ = game.reset(seed=1_600_000 + seed)
        for _ in range(12):
            action = int(rng.choice([AHEAD, AHEAD, RIGHT, LEFT]))
            new, _, won, _, info = game.step(action)
            if action == AHEAD:
                told = net.outcome.moves(encoded(net, frame), labels(AHEAD))[0].numpy()
                right.append(told[:len(info["moved"])] == info["moved"])
                free.append(info["moved"])
            frame = new
            if won:
                break
    usual = np.concatenate(free).mean()
    assert np.concatenate(right).mean() > max(usual, 1 - usual) + 0.04, usual


def encoded(net, frame):
    import torch

    return net.codec.encode(torch.from_numpy(frame[None].copy()))


def labels(action):
    import torch

    return torch.full((1, 4), LABELS[action])


def test_the_goal_ends_the_episode_where_the_game_ends_it():
    """Real episodes of a player who seeks the pillar: their last frames, and frames before."""
    net = rooms.load_net(FOLDER).eval()
    ends, others = [], []
    for seed in range(40):
        game, player = Rooms(frames=1, horizon=None), Seeker(np.random.default_rng(seed))
        frame, _ = game.reset(seed=1_700_000 + seed)
        player.reset()
        for t in range(160):
            before = encoded(net, frame)
            frame, _, won, _, _ = game.step(player.act(frame, t))
            if won or t % 20 == 7:
                chance = net.outcome.ends(before, encoded(net, frame)[:, None]).item()
                (ends if won else others).append(chance > 0.5)
            if won:
                break
        if len(ends) == 10:
            break
    assert len(ends) >= 8 and np.mean(ends) > 0.5 and np.mean(others) < 0.05


@pytest.mark.skipif(not RESULTS.exists(), reason="revisits were not measured")
def test_revisits_were_measured():
    rows = results.by_metric(results.read(RESULTS))
    for what in ("memory", "no-memory", "plain-positions"):
        for metric in ("psnr", "ssim", "r_dist", "t_dist"):
            assert "ci95" in rows[what, metric]
    assert rows["memory", "psnr"]["value"] > rows["no-memory", "psnr"]["value"] + 2
