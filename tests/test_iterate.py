"""Rounds of collect, refit, retrain: run whole, counted, and resumed."""

import json
from types import SimpleNamespace

import pytest

from tests.agent_toys import tiny_folder
from worldgym.agents import iterate
from worldgym.agents.games import record
from worldgym.agents.train import TrainConfig
from worldgym.data.store import Episodes
from worldgym.envs.tasks import load_task
from worldgym.errors import ConfigError

pytest.importorskip("stable_baselines3")


@pytest.fixture
def ground(tmp_path):
    """A world of random weights and 200 recorded steps of its game."""
    world = tiny_folder(tmp_path / "world")
    record("Corridor-v0", tmp_path / "data", 200, ("random",), frame_hw=(32, 32))
    return SimpleNamespace(world=str(world), data=tmp_path / "data", out=tmp_path / "out",
                           rounds=1, real_steps=60, steps=64, seed=0)


def test_a_round_records_refits_and_trains(ground, monkeypatch):
    settings = dict(codec_iterations=2, dynamics_iterations=2, outcome_iterations=2, batch=2,
                    clip=3, starts=4, measure=False, tensorboard=False)
    small = dict(envs=2, progress=False, tensorboard=False,
                 hyperparameters={"n_steps": 8, "batch_size": 8, "n_epochs": 1})
    monkeypatch.setattr(iterate, "TrainConfig", lambda **given: TrainConfig(**given, **small))
    (first,) = iterate.from_command(ground, settings)
    assert first.real_steps >= 60
    assert first.real_steps_total == Episodes.open(ground.data).steps >= 260
    assert load_task(first.world).twin == "Corridor-v0" and first.agent.is_file()

    ground.rounds = 2  # the round that is there stays; its agent plays in the next
    written = first.agent.stat().st_mtime_ns
    first, second = iterate.from_command(ground, settings)
    assert first.real_steps >= 60 and first.agent.stat().st_mtime_ns == written
    assert any("agent" in p or "PPO" in p for p in Episodes.open(ground.data).policies)
    told = json.loads((ground.out / "iterate.json").read_text())["rounds"]
    assert [r["real_steps_total"] for r in told][-1] == second.real_steps_total


def test_no_rounds_are_refused(ground):
    ground.rounds = 0
    with pytest.raises(ConfigError, match="rounds"):
        iterate.from_command(ground, {})
