"""Training: reproducible, resumable after a kill; settings are checked; agent files are safe."""

import csv
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("stable_baselines3")

from tests.agent_toys import Corridor, tiny_task  # noqa: E402
from worldgym.actions import ActionSpec  # noqa: E402
from worldgym.agents import keeper  # noqa: E402
from worldgym.agents.model import load_agent, read_facts  # noqa: E402
from worldgym.agents.score import play_dream, play_real  # noqa: E402
from worldgym.agents.train import TrainConfig, train_in_dream, train_in_game  # noqa: E402
from worldgym.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    LicenceError,
    UnsafeFileError,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = TrainConfig(steps=192, envs=4, save_every=48, frame_stack=2, progress=False,
                    tensorboard=False, hyperparameters={"n_steps": 8, "batch_size": 16,
                                                        "n_epochs": 2})


def weights(agent):
    with zipfile.ZipFile(agent) as archive:
        return torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_in_dream(tiny_task(), SMALL, tmp_path_factory.mktemp("whole"))


def test_same_seed_same_agent(trained, tmp_path):
    again = train_in_dream(tiny_task(), SMALL, tmp_path)
    assert again.steps == trained.steps == 192 and same(again.agent, trained.agent)
    other = train_in_dream(tiny_task(), replace(SMALL, seed=1), tmp_path / "other")
    assert not same(other.agent, trained.agent)


class Killed(Exception):
    pass


def die_at_second_save(monkeypatch, config, folder):
    """Begin a training that is killed right after its second checkpoint."""
    save, calls = keeper.Keeper.save, []

    def dying(self, *args):
        path = save(self, *args)
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        return path

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(keeper.Keeper, "save", dying)
        train_in_dream(tiny_task(), config, folder)


def test_resume_repeats_the_uninterrupted_run(trained, tmp_path, monkeypatch):
    die_at_second_save(monkeypatch, SMALL, tmp_path)
    (tmp_path / "checkpoints" / ".000000999.1").mkdir()  # what a kill in mid-write leaves
    resumed = train_in_dream(tiny_task(), SMALL, tmp_path)
    assert same(resumed.agent, trained.agent)
    without_time = [{k: v for k, v in p.items() if k != "seconds"} for p in resumed.curve]
    assert without_time == [{k: v for k, v in p.items() if k != "seconds"} for p in trained.curve]
    assert len(resumed.checkpoints) == len(trained.checkpoints) == 3


@pytest.mark.parametrize("algorithm, hyper", [
    ("A2C", {"n_steps": 8}),
    ("DQN", {"buffer_size": 500, "learning_starts": 16, "train_freq": 4, "batch_size": 16}),
    ("RecurrentPPO", {"n_steps": 8, "batch_size": 16, "n_epochs": 1}),
])
def test_other_algorithms_train_resume_and_load(algorithm, hyper, tmp_path):
    if algorithm == "RecurrentPPO":
        pytest.importorskip("sb3_contrib")
    config = replace(SMALL, algorithm=algorithm, hyperparameters=hyper, steps=96)
    task = tiny_task()
    whole = train_in_dream(task, replace(config, steps=96), tmp_path / "whole")
    train_in_dream(tiny_task(), replace(config, steps=48), tmp_path / "parts")
    policy = load_agent(whole.agent, world=task.world)
    assert play_dream(task, policy, episodes=2).lengths.min() >= 1
    more = train_in_dream(tiny_task(), config, tmp_path / "parts")
    assert more.steps >= 96


def test_a_latent_agent_plays_the_real_game(trained):
    task = tiny_task()
    policy = load_agent(trained.agent, world=lambda: task.world)
    one = play_real(Corridor, policy, episodes=3, games=1)
    many = play_real(Corridor, policy, episodes=3, games=3)
    np.testing.assert_array_equal(one.lengths, many.lengths)
    policy.deterministic = False
    drawn = play_real(Corridor, policy, episodes=3, games=2)
    again = play_real(Corridor, policy, episodes=3, games=3)
    np.testing.assert_array_equal(drawn.lengths, again.lengths)


def test_training_in_the_real_game(tmp_path):
    task = tiny_task()
    for observation, world in (("frame", None), ("latent", task.world)):
        config = replace(SMALL, observation=observation, steps=64, envs=2,
                         policy="MlpPolicy" if observation == "frame" else None)
        done = train_in_game(Corridor, ActionSpec.discrete(3), (32, 32), config,
                             tmp_path / observation, world=world)
        assert play_real(Corridor, load_agent(done.agent, world=world), episodes=1).lengths[0] >= 1


def test_what_was_run_is_written_down(trained):
    run = json.loads((trained.agent.parent / "run.json").read_text())
    assert run["done"]["steps"] == 192 and run["run"]["world"] == tiny_task().world.fingerprint
    assert run["run"]["hyperparameters"]["n_steps"] == 8 and run["run"]["seed"] == 0
    facts = read_facts(trained.agent)
    assert facts["steps"] == 192 and facts["frame_stack"] == 2


def test_a_training_begins_with_the_weights_it_is_given(trained, tmp_path):
    still = replace(SMALL, seed=5, steps=32, init=str(trained.agent),
                    hyperparameters={**SMALL.hyperparameters, "learning_rate": 0.0})
    assert same(train_in_dream(tiny_task(), still, tmp_path / "still").agent, trained.agent)
    narrow = replace(SMALL, init=str(trained.agent), network={"net_arch": [8]})
    with pytest.raises(ConfigError, match="begin with does not fit.*net_arch"):
        train_in_dream(tiny_task(), narrow, tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="missing"):
        train_in_dream(tiny_task(), replace(SMALL, init="none.zip"), tmp_path / "none")


def test_other_settings_in_the_same_folder_are_refused(trained):
    with pytest.raises(ConfigError, match="other settings"):
        train_in_dream(tiny_task(), replace(SMALL, seed=9), trained.agent.parent)


def test_a_falling_rate_ends_at_zero_and_resumes_exactly(tmp_path, monkeypatch):
    falling = replace(SMALL, hyperparameters={**SMALL.hyperparameters,
                                              "learning_rate": "lin_0.01"})
    whole = train_in_dream(tiny_task(), falling, tmp_path / "whole")
    rates = [float(line) for line in _column(tmp_path / "whole", "train/learning_rate")]
    assert rates == sorted(rates, reverse=True) and rates[0] <= 0.01 and rates[-1] < 0.003
    die_at_second_save(monkeypatch, falling, tmp_path / "parts")
    assert same(train_in_dream(tiny_task(), falling, tmp_path / "parts").agent, whole.agent)
    wrong = replace(SMALL, hyperparameters={"learning_rate": "lin_fast"})
    with pytest.raises(ConfigError, match="lin_NUMBER"):
        train_in_dream(tiny_task(), wrong, tmp_path / "wrong")


def _column(folder, name):
    rows = list(csv.DictReader(open(folder / "log" / "progress.csv")))
    return [row[name] for row in rows if row.get(name)]


def test_bad_settings_are_named(tmp_path):
    for change in ({"steps": 0}, {"envs": 0}, {"minutes": 0.0}, {"observation": "sound"}):
        with pytest.raises(ConfigError):
            replace(SMALL, **change)
    with pytest.raises(ConfigError, match="unknown algorithm"):
        train_in_dream(tiny_task(), replace(SMALL, algorithm="PPQ"), tmp_path / "a")
    with pytest.raises(ConfigError, match="hyperparameter"):
        train_in_dream(tiny_task(), replace(SMALL, hyperparameters={"gama": 1}), tmp_path / "b")


def test_the_licence_is_respected(tmp_path):
    task = tiny_task()
    licence = replace(task.world.spec.licence, may_train_on_outputs=False)
    task.world.spec = replace(task.world.spec, licence=licence)
    with pytest.raises(LicenceError):
        train_in_dream(task, SMALL, tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/worldgym-evil",)


def test_agent_files_never_run_code(trained, tmp_path):
    plain = tmp_path / "plain.zip"
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("data", "{}")
    with pytest.raises(UnsafeFileError):
        load_agent(plain)
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(trained.agent) as old, zipfile.ZipFile(evil, "w") as new:
        new.writestr("worldgym.json", old.read("worldgym.json"))
        new.writestr("policy.pth", pickle.dumps(Evil()))
    with pytest.raises((CheckpointError, UnsafeFileError)):
        load_agent(evil, world=tiny_task().world)
    assert not Path("/tmp/worldgym-evil").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 half a zip"])
def test_broken_agent_files(tmp_path, data):
    path = tmp_path / "agent.zip"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="Fix:"):
        load_agent(path)
    with pytest.raises(CheckpointError, match="missing"):
        load_agent(tmp_path / "none.zip")


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from tests.test_train_agent import SMALL, tiny_task, train_in_dream
train_in_dream(tiny_task(), replace(SMALL, steps=100_000), {out!r})
"""


def test_kill_minus_nine(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=str(ROOT),
                                                                  out=str(tmp_path))], env=env)
    import time

    ends = time.monotonic() + 120
    done = tmp_path / "checkpoints"
    while time.monotonic() < ends and len(list(done.glob("0*"))) < 2:
        assert child.poll() is None
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    reached = int(max(p.name for p in done.glob("0*")))
    more = train_in_dream(tiny_task(), replace(SMALL, steps=reached + 32), tmp_path)
    assert more.steps == reached + 32


def test_a_time_limit_ends_between_rollouts_and_goes_on_exactly(trained, tmp_path):
    short = train_in_dream(tiny_task(), replace(SMALL, minutes=1e-6), tmp_path)
    assert short.steps < 192 and short.agent.is_file()
    limited = replace(SMALL, minutes=1e-4)
    assert train_in_dream(tiny_task(), limited, tmp_path).steps >= short.steps
    assert same(train_in_dream(tiny_task(), SMALL, tmp_path).agent, trained.agent)
