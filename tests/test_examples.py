"""Every example runs as a newcomer would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.agent_toys as toys

ROOT = Path(__file__).resolve().parent.parent
WITH_TOYS = "import sys, runpy, tests.agent_toys; sys.argv = sys.argv[1:]; " \
            "runpy.run_path(sys.argv[0], run_name='__main__')"


def example(name, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", WITH_TOYS, str(ROOT / "examples" / name),
                           *map(str, args)], env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toys.tiny_folder(tmp_path_factory.mktemp("tiny") / "world")


def test_quickstart(world):
    done = example("quickstart.py", world, 20)
    assert done.returncode == 0, done.stderr
    assert "last frame: (32, 32, 3)" in done.stdout


def test_train_in_dream(world):
    done = example("train_in_dream.py", world, 64)
    assert done.returncode == 0, done.stderr
    assert "random" in done.stdout


def test_own_game(tmp_path):
    pytest.importorskip("minigrid")
    done = example("own_game.py", "MiniGrid-Dynamic-Obstacles-6x6-v0", tmp_path / "own", "--quick")
    assert done.returncode == 0, done.stderr
    assert "agent" in done.stdout
