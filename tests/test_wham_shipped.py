"""The shipped small WHAM of Take Cover: its files, its card, its faces, and what it knows."""

import json
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import worldgym  # noqa: F401
from worldgym.agents import results
from worldgym.agents.wham_policy import wham_policy
from worldgym.envs.make import make_dream
from worldgym.envs.tasks import TASKS, load_task
from worldgym.testing import check_dream_env

ID = "worldgym/TakeCover-WHAM-v0"
FOLDER = TASKS[ID]["folder"]
RESULTS = Path(__file__).resolve().parent.parent / "results" / "wham_small.json"
pytestmark = pytest.mark.skipif(not (FOLDER / "world.safetensors").exists(),
                                reason="no small WHAM is shipped")


def test_files_and_card():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 25e6
    card = json.loads((FOLDER / "world.json").read_text())
    made, told = card["provenance"], card["metrics"]
    assert "--dynamics wham" in made["command"] and made["real_steps_used"] > 100_000
    assert made["training_seconds"]["dynamics"] > 0
    assert told["psnr_1"] > told["psnr_1_copy"] and told["end_auc"] > 0.8


def test_faces_accept_it():
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ID, horizon=4)
        check_env(env.unwrapped, skip_render_check=True)
        assert env.reset(seed=0)[0].shape == (32, 80, 3)
        several = gymnasium.make_vec(ID, num_envs=3, horizon=4)
        assert several.reset(seed=0)[0].shape == (3, 32, 80, 3)
    report = check_dream_env(partial(make_dream, ID, horizon=4, observation="latent"), steps=4,
                             other_process=False)
    assert {"state", "fork", "seeds", "gymnasium", "sb3"} <= set(report.passed), report


def test_moving_moves_the_view():
    """Right and left from the same moments: the walls go opposite ways."""
    world, starts = load_task(ID).world, load_task(ID).starts
    seeds = list(range(8))
    given = starts.gather(starts.sample(seeds, [0] * 8))
    shown = {}
    for action in (1, 2):
        state = world.begin(given, seeds)
        for _ in range(4):
            state, chunk = world.step(state, np.full(8, action))
        shown[action] = chunk.frames()[:, -1].float().mean(-1)  # (8, H, W)

    def apart(shift: int) -> float:
        a, b = shown[1], shown[2]
        a, b = (a[..., shift:], b[..., :-shift]) if shift > 0 else (a[..., :shift], b[..., -shift:])
        return float((a - b).abs().mean())

    assert min(map(apart, range(1, 25))) != min(map(apart, range(-24, 0)))
    best = min((s for s in range(-24, 25) if s), key=apart)
    assert best < 0  # who steps to the right sees the room go left


def test_its_players_are_no_dice():
    task = load_task(ID)
    policy = wham_policy(FOLDER, task.world.spec.action)
    policy.reset(4, 0)
    env = gymnasium.make_vec(ID, num_envs=4, horizon=40)
    obs, _ = env.reset(seed=3)
    done = []
    for t in range(24):
        acted = policy.act(obs, t)
        done.append(acted)
        obs, *_ = env.step(acted)
    again = np.mean(np.array(done)[1:] == np.array(done)[:-1])
    assert again > 0.5  # recorded players hold their keys; dice repeat a third


def test_same_dream_for_the_same_seed_whatever_runs_beside():
    task = load_task(ID)
    frames = []
    for seeds in ([5], [5, 9, 11]):
        given = task.starts.gather(task.starts.sample(seeds, [0] * len(seeds)))
        state = task.world.begin(given, seeds)
        for _ in range(3):
            state, chunk = task.world.step(state, np.ones(len(seeds), np.int64))
        frames.append(chunk.frames()[0])
    assert torch.equal(*frames)


@pytest.mark.skipif(not RESULTS.exists(), reason="it was not measured beside nano")
def test_it_was_measured_beside_nano():
    rows = results.by_metric(results.read(RESULTS))
    for what in ("wham", "nano"):
        for metric in ("psnr_50", "action_wasserstein", "real_return"):
            assert np.isfinite(rows[what, metric]["value"])
    assert rows["wham", "action_wasserstein_8"]["value"] < rows["uniform", "action_wasserstein_8"][
        "value"]


def test_its_id_stands_for_its_folder_wherever_a_world_or_a_file_is_asked_for(tmp_path):
    from worldgym.agents.cli import main
    from worldgym.agents.scripted import parse_policy
    from worldgym.agents.wham_rollout import is_wham_world
    from worldgym.data.store import Episodes

    assert is_wham_world(ID) and not is_wham_world("worldgym/TakeCover-v0")
    policy = parse_policy(f"wham:{ID}", load_task(ID).world.spec.action)
    assert policy.name == f"wham:{ID}"
    main(["rollout", "--env", ID, "--out", str(tmp_path / "r"), "--episodes", "1",
          "--max-cycles", "3"])
    store = Episodes.open(tmp_path / "r")
    assert len(store) == 1 and store.frame_hw == (32, 80)
