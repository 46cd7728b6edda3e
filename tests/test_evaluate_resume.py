"""worldgym evaluate goes on where it was killed, and refuses what is not its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tests.agent_toys as toys
from worldgym.agents import cli
from worldgym.agents.evaluate import evaluate
from worldgym.errors import ConfigError, DatasetError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.tiny_folder(tmp_path_factory.mktemp("tiny") / "world")


RESUMED = """
import os, time
from pathlib import Path
import tests.agent_toys  # registers the real game
from worldgym.agents.scripted import Random

class Hangs(Random):
    def act(self, frames, t, slots=None):
        flag = Path(os.environ["HANG"])
        if flag.exists() and max(slots) >= 6:
            flag.with_suffix(".there").touch()
            time.sleep(600)
        return super().act(frames, t, slots)

def make(action):
    return Hangs(action)
"""


@pytest.mark.parametrize("until", [False, True])
def test_killed_and_begun_again_it_ends_with_the_same_numbers(folder, tmp_path, until, monkeypatch):
    (tmp_path / "slow.py").write_text(RESUMED)
    flag, there = tmp_path / "hang", tmp_path / "hang.there"
    argv = [sys.executable, "-m", "worldgym.agents.cli", "evaluate", "--world", str(folder),
            "--policy", f"slow={tmp_path / 'slow.py'}:make", "noop", "--episodes", "20",
            "--slots", "6", "--real", *(["--until-separated"] if until else [])]
    env = {**os.environ, "HANG": str(flag), "PYTHONPATH": str(ROOT)}

    flag.touch()
    killed = subprocess.Popen([*argv, "--out", str(tmp_path / "killed")], cwd=tmp_path, env=env,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not there.exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    blocks = tmp_path / "killed" / "blocks"
    before = {p: p.stat().st_mtime_ns for p in blocks.iterdir()}
    assert before and not (tmp_path / "killed" / "evaluation.json").exists()
    flag.unlink()
    monkeypatch.setenv("HANG", str(flag))
    for out in ("killed", "whole"):
        assert cli.main([*argv[3:], "--out", str(tmp_path / out)]) == 0
    assert toys.numbers(tmp_path / "killed") == toys.numbers(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())  # not played again
    assert not [p for p in blocks.iterdir() if p.name.startswith(".")]


def test_real_may_be_added_later_and_done_is_done(folder, tmp_path, monkeypatch):
    from worldgym.agents import evaluate as module

    dream = evaluate(folder, ["random", "noop"], episodes=5, out=tmp_path, progress=False)
    assert toys.numbers(tmp_path)["agreement"] is None and toys.numbers(tmp_path)["drift"] is None

    def refuse(*_):
        raise AssertionError("played again")

    monkeypatch.setattr(module, "dream_block", refuse)
    both = evaluate(folder, ["random", "noop"], episodes=5, out=tmp_path, real=True, progress=False)
    np.testing.assert_array_equal(dream.returns("dream"), both.returns("dream"))
    monkeypatch.setattr(module, "real_block", refuse)
    evaluate(folder, ["random", "noop"], episodes=5, out=tmp_path, real=True, progress=False)


@pytest.mark.parametrize("change", [
    {"episodes": 6}, {"seed": 3}, {"horizon": 7}, {"policies": ["random"]}, {"slots": 3},
    {"policies": ["noop", "random"]}, {"until_separated": True}, {"draw": True},
])
def test_a_folder_of_other_settings_is_refused(folder, tmp_path, change):
    given = {"policies": ["random", "noop"], "episodes": 5, "out": tmp_path, "progress": False}
    evaluate(folder, **given)
    before = (tmp_path / "evaluation.json").read_bytes()
    with pytest.raises(ConfigError, match="other settings"):
        evaluate(folder, **{**given, **change})
    assert (tmp_path / "evaluation.json").read_bytes() == before


def test_a_policy_file_that_changed_is_other_settings(folder, tmp_path):
    name = toys.policy_file(tmp_path / "mine.py")
    given = {"episodes": 2, "out": tmp_path / "out", "progress": False}
    evaluate(folder, [name], **given)
    toys.policy_file(tmp_path / "mine.py", "return Random(action)  # better now")
    with pytest.raises(ConfigError, match="other settings"):
        evaluate(folder, [name], **given)


def test_a_broken_block_is_named(folder, tmp_path):
    given = {"policies": ["random"], "episodes": 3, "out": tmp_path, "progress": False}
    evaluate(folder, **given)
    whole, (block,) = toys.numbers(tmp_path), (tmp_path / "blocks").iterdir()
    for junk in (b"", block.read_bytes()[:60]):
        block.write_bytes(junk)
        with pytest.raises(DatasetError, match="plays it again"):
            evaluate(folder, **given)
    block.unlink()
    evaluate(folder, **given)
    assert toys.numbers(tmp_path) == whole
