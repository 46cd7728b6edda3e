"""The command: help, one paragraph per mistake, and every subcommand on a tiny world."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import tests.agent_toys as toys
from worldgym.agents import cli, commands
from worldgym.errors import CommandError, ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toys.tiny_folder(tmp_path_factory.mktemp("tiny") / "world")


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_an_option_given_twice_keeps_all_its_values():
    from worldgym.agents.cli import parse

    command = parse(["evaluate", "--policy", "a.zip", "--real", "--policy", "b.py:make", "random",
                     "--policy=noop", "--episodes", "3"])
    assert command.policy == ("a.zip", "b.py:make", "random", "noop")
    assert command.real and command.episodes == 3
    assert parse(["train", "--out", "x", "--set", "gamma=0.9", "--set", "n_epochs=4"]).set == (
        "gamma=0.9", "n_epochs=4")
    assert parse(["evaluate", "--policy", "x"]).policy == ("x",)


def test_help_names_every_command():
    out = subprocess.run([sys.executable, "-m", "worldgym.agents.cli", "--help"], cwd=ROOT,
                         capture_output=True, text=True)
    assert out.returncode == 0
    for name in ("collect", "fit", "train", "score", "video", "bench", "inspect", "demo",
                 "evaluate"):
        assert name in out.stdout


@pytest.mark.parametrize("name", list(commands.COMMANDS))
def test_help_of_every_command_says_something_about_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in fields(commands.COMMANDS[name]):
        assert option.name.replace("_", "-") in text.lower()
        assert f"{option.name}: " in commands.COMMANDS[name].__doc__


@pytest.mark.parametrize("argv", [
    [], ["nonsense"], ["train"], ["train", "--out", "x", "--steps", "many"],
    ["train", "--out", "x", "--stepz", "3"], ["score", "--where", "moon"],
    ["score", "--world", "nowhere"], ["train", "--out", "x", "--steps", "0"],
    ["train", "--out", "x", "--set", "gamma"], ["train", "--out", "x", "--minutes", "-1"],
    ["inspect", "nowhere"], ["inspect"], ["bench", "--slots", "0"],
    ["bench", "--long", "10"], ["video", "--world", "nowhere"],
    ["collect", "--out", "/tmp/none", "--env", "NoSuchGame-v0"],
    ["collect", "--out", "/tmp/none", "--policy", "sticky:9"],
    ["collect", "--out", "/tmp/none", "--policy", "random@much"],
    ["fit", "--data", "nowhere", "--out", "/tmp/none"], ["fit"],
    ["evaluate"], ["evaluate", "--policy", "random", "random"],
    ["evaluate", "--policy", "nobody"], ["evaluate", "--ladder", "--env", "nowhere"],
    ["evaluate", "--policy", "random", "--episodes", "0"],
    ["demo", "--world", "nowhere"], ["inspect", "--path", "/dev/null"],
])
def test_a_mistake_is_one_paragraph(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2, err
    line = [x for x in err.splitlines() if x.strip()][-1]
    assert "Error: " in line and "expected" in line and "Fix: " in line
    assert "Traceback" not in err


def test_fit_options_are_those_of_the_config():
    from worldgym.train.fit import FitConfig
    from worldgym.train.fit_wham import FitWhamConfig

    known = {f.name for f in fields(FitConfig)} | {f.name for f in fields(FitWhamConfig)}
    assert {f.name for f in fields(commands.Fit)} - {"dynamics"} <= known


def test_settings_and_names():
    assert commands.settings(("a=1", "b=[2, 3]", "c=linear")) == {"a": 1, "b": [2, 3],
                                                                 "c": "linear"}
    assert commands.named(("random", "best=sweep:20")) == {"random": "random", "best": "sweep:20"}
    with pytest.raises(ConfigError):
        commands.settings(("3",))
    with pytest.raises(CommandError):
        cli.parse(["train", "--nope"])


def test_train_score_video_inspect(world, capsys, tmp_path):
    agent = tmp_path / "agent"
    assert run(capsys, "train", "--world", world, "--out", agent, "--steps", 64, "--envs", 4,
               "--set", "n_steps=8", "batch_size=16")[0] == 0
    out = tmp_path / "scores.json"
    code, text, err = run(capsys, "score", "--world", world, "--policy", "random",
                          f"mine={agent / 'agent.zip'}", "--episodes", 3, "--out", out)
    assert code == 0, err
    assert "mine" in text
    rows = {(r["what"], r["metric"]) for r in json.loads(out.read_text())["rows"]}
    assert rows == {(w, m) for w in ("random", "mine") for m in ("real_return", "dream_return")}
    for mode in ("same-actions", "agents"):
        film = tmp_path / f"{mode}.mp4"
        code, _, err = run(capsys, "video", "--world", world, "--policy", agent / "agent.zip",
                           "--out", film, "--steps", 12, "--mode", mode)
        assert code == 0, err
        assert film.stat().st_size > 1000
    assert run(capsys, "video", "--world", world, "--mode", "sideways")[0] == 2
    for path in (world, agent, agent / "agent.zip", out, world / "world.safetensors"):
        code, text, err = run(capsys, "inspect", "--path", path)
        assert code == 0 and len(text) > 40, err


def test_bench_writes_its_rows(world, capsys, tmp_path):
    out = tmp_path / "bench.json"
    code, _, err = run(capsys, "bench", "--world", world, "--out", out, "--slots", 4,
                       "--seconds", 0.2, "--long", 220)
    assert code == 0, err
    rows = {r["metric"]: r["value"] for r in json.loads(out.read_text())["rows"]}
    assert {"dream_over_real_steps", "step2000_over_step50", "memory_growth", "wrapper_share",
            "cached_over_recomputed", "cached_over_refilled", "dream_steps_per_s",
            "real_steps_per_s"} <= set(rows)
    assert 0 < rows["wrapper_share"] < 1 and rows["cached_over_recomputed"] > 0


def test_demo(world, capsys, tmp_path):
    code, text, err = run(capsys, "demo", "--world", world, "--out", tmp_path / "demo", "--quick")
    assert code == 0, err
    for name in ("results.json", "learning_curve.png", "side_by_side.mp4", "training/agent.zip"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    assert "demo agent" in text and "random" in text
