"""Fitting: all kinds of actions and data, refitting, refusals, kills, several processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import fit_run
from tests.fit_data import ACTIONS, draw_actions, make_store
from worldgym import checkpoint
from worldgym.data.starts import StartBank
from worldgym.errors import CheckpointError, ConfigError, DatasetError
from worldgym.models import nano
from worldgym.train import loop
from worldgym.train.fit import FitConfig, fit
from worldgym.train.provenance import command

SMALL = dict(width=32, layers=1, window=4, clip=5, batch=4, starts=6, codec_iterations=2,
             dynamics_iterations=2, outcome_iterations=2, tensorboard=False)
RUN = Path(fit_run.__file__)


@pytest.mark.parametrize(("action", "hw"), [
    ("discrete", (48, 80)), ("multi_discrete", (64, 64)), ("multi_binary", (32, 32)),
    ("box", (24, 40))])
def test_fits_any_actions_and_frame_sizes(tmp_path, action, hw):
    store = make_store(tmp_path / "data", action, hw)
    out = fit(FitConfig(data=str(tmp_path / "data"), out=str(tmp_path / "w"), **SMALL,
                        steps=(1000.0, 400.0), seed=3))
    world, bank = nano.load(out), StartBank.load(out / "starts.safetensors")
    assert tuple(world.spec.frame_hw) == hw and world.spec.action == ACTIONS[action]
    assert world.spec.context_frames == 3 and world.schedule.timesteps == (1000.0, 400.0)
    state = world.begin(bank.gather(bank.sample([1, 2], [0, 0])), [1, 2])
    actions = draw_actions(np.random.default_rng(0), world.spec.action, 2)
    state, chunk = world.step(state, actions)
    assert chunk.frames().shape == (2, 1, *hw, 3) and np.isfinite(chunk.reward_B).all()
    card = json.loads((out / "world.json").read_text())
    origin = card["provenance"]
    assert origin["real_steps_used"] == store.steps == 43 and origin["episodes"] == 4
    assert origin["policies"] == {"random": 4} and origin["seed"] == 3
    assert set(origin["training_seconds"]) == {"codec", "encode", "dynamics", "outcome"}
    assert "--steps 1000.0 400.0" in origin["command"] and origin["machine"]
    assert card["task"] == {"twin": "Square-v0", "horizon": 15}
    assert {"psnr_1", "psnr_1_copy", "end_auc"} <= set(card["metrics"])


def test_metrics_reach_fifty_steps(tmp_path):
    make_store(tmp_path / "data", steps=(60, 54, 60))
    out = fit(FitConfig(data=str(tmp_path / "data"), out=str(tmp_path / "w"), **SMALL, holdout=0.9))
    metrics = json.loads((out / "world.json").read_text())["metrics"]
    assert {"psnr_1", "psnr_1_copy", "psnr_50", "psnr_50_copy"} <= set(metrics)
    assert metrics["end_rate"] > 0 and 0 <= metrics["end_auc"] <= 1


@pytest.mark.parametrize(("data", "changes"), [
    (dict(steps=(3, 2, 3, 1)), {}),  # shorter than any clip or context
    (dict(steps=(3, 2, 40)), dict(clip=12)),
    (dict(steps=(9,)), {}),  # nothing to hold out
    (dict(ends=False, reward=0.0), dict(holdout=0.0)),
    (dict(steps=(1, 1)), dict(keep_terminal_frames=True)),
])
def test_fits_scarce_data(tmp_path, data, changes):
    make_store(tmp_path / "data", **data)
    out = fit(FitConfig(data=str(tmp_path / "data"), out=str(tmp_path / "w"), **SMALL | changes))
    card = json.loads((out / "world.json").read_text(), parse_constant=pytest.fail)
    assert ("metrics" in card) == (len(data.get("steps", "some")) > 1
                                   and changes.get("holdout") != 0)
    assert all(torch.isfinite(v).all() for v in nano.load_nano(out).state_dict().values())
    if data.get("reward") == 0.0:
        assert float(nano.load_nano(out).outcome.reward_scale) == 1.0
        world = nano.load(out)
        state = world.begin(StartBank.load(out / "starts.safetensors").gather([0]), [0])
        assert world.step(state, np.array([1]))[1].reward_B.tolist() == [0.0]  # not nearly 0


def test_refit_keeps_the_codec(tmp_path):
    make_store(tmp_path / "data")
    make_store(tmp_path / "more", seed=5)
    args = dict(SMALL, data=str(tmp_path / "data"))
    old = nano.load_nano(fit(FitConfig(out=str(tmp_path / "a"), **args)))
    args = dict(args, data=str(tmp_path / "more"), width=None, layers=None, window=3)
    new = nano.load_nano(fit(FitConfig(out=str(tmp_path / "b"), init=str(tmp_path / "a"), **args)))
    for part in ("codec", "dynamics", "outcome"):
        before, after = getattr(old, part).state_dict(), getattr(new, part).state_dict()
        equal = all(torch.equal(before[k], after[k]) for k in before)
        assert equal == (part == "codec"), part
    assert new.cfg.name == "b" and new.cfg.window == 3 and new.cfg.wan.dim == 32
    heads = nano.load_nano(fit(FitConfig(  # other heads only: the dynamics keep their bits
        out=str(tmp_path / "d"), init=str(tmp_path / "b"),
        **args | dict(dynamics_iterations=0, ahead=3))))
    kept, left = heads.dynamics.state_dict(), new.dynamics.state_dict()
    assert all(torch.equal(kept[k], left[k]) for k in left)
    assert heads.cfg.outcome_ahead == 3 and heads.outcome.cfg.ahead == 3
    for wrong in (dict(width=64), dict(layers=2)):
        with pytest.raises(ConfigError, match="does not fit.*--init"):
            fit(FitConfig(out=str(tmp_path / "c"), init=str(tmp_path / "a"), **args | wrong))
    for name, change in (("hw", dict(hw=(48, 48))), ("kind", dict(action="box"))):
        make_store(tmp_path / name, **change)
        with pytest.raises(ConfigError, match="does not fit.*frames|does not fit.*actions"):
            fit(FitConfig(out=str(tmp_path / "c"), init=str(tmp_path / "a"),
                          **args | dict(data=str(tmp_path / name))))


def test_refusals(tmp_path):
    make_store(tmp_path / "empty", steps=())
    make_store(tmp_path / "data", steps=(4, 4))
    make_store(tmp_path / "odd", hw=(30, 30))
    make_store(tmp_path / "one", steps=(1, 1))

    def refused(error, match, data="data", **changes):
        with pytest.raises(error, match=match):
            fit(FitConfig(data=str(tmp_path / data), out=str(tmp_path / "w"), **SMALL | changes))

    refused(DatasetError, "no episodes to learn from.*worldgym collect", "empty")
    refused(DatasetError, "no data set here", "nowhere")
    refused(ConfigError, "divisible by 8.*resize", "odd")
    refused(CheckpointError, "no world in this folder", init=str(tmp_path / "nothing"))
    refused(ConfigError, "iterations", codec_iterations=0)
    refused(ConfigError, "clip", clip=1)
    refused(ConfigError, "holdout", holdout=1.0)
    fit(FitConfig(data=str(tmp_path / "data"), out=str(tmp_path / "w"), **SMALL))
    refused(CheckpointError, "other settings.*iterations=3.*iterations=2", codec_iterations=3)
    refused(CheckpointError, "other settings.*data=", "one")
    (tmp_path / "w/training/codec.ckpt").write_bytes(b"nonsense")
    refused(CheckpointError, "cannot resume training")


def test_command_repeats_the_run():
    cfg = FitConfig(data="a b", out="o", batch=1, steps=(1000.0,), quick=True, measure=False)
    assert command(cfg) == (
        "worldgym fit --data 'a b' --out o --batch 1 --steps 1000.0 --quick --no-measure")


def weights(folder):
    """Every tensor of a world folder."""
    return checkpoint.load_tensors(folder / "world.safetensors")[0]


def same_run(one, two):
    """Whether two folders hold the same weights, bit for bit, and the same logs but for time."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for part in ("codec", "dynamics", "outcome"):
        logs = [[{k: v for k, v in json.loads(line).items() if k != "seconds"}
                 for line in (f / f"training/{part}.jsonl").read_text().splitlines()]
                for f in (one, two)]
        assert logs[0] == logs[1], part
    card = [json.loads((f / "world.json").read_text())["metrics"] for f in (one, two)]
    assert card[0] == card[1]


def in_child(settings, kill=None):
    """Run ``fit`` in another process, which may be killed; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fit_run"])  # one import of torch for all of them
    process = context.Process(target=fit_run.child, args=(settings, kill))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.timeout(900)
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    make_store(tmp_path / "data")
    args = dict(SMALL, data=str(tmp_path / "data"), name="x", codec_iterations=8,
                dynamics_iterations=44, outcome_iterations=8)
    fit_run.recorded(args | {"out": str(tmp_path / "whole")})
    out = tmp_path / "killed"
    args["out"] = str(out)
    assert in_child(args, ("codec", 5, "SIGKILL")) == -signal.SIGKILL
    assert torch.load(out / "training/codec.ckpt")["iteration"] == 4
    # the log of iteration 40 is written, the newest checkpoint is of iteration 33
    assert in_child(args, ("dynamics", 42, "SIGKILL")) == -signal.SIGKILL
    assert len((out / "training/dynamics.jsonl").read_text().splitlines()) == 2
    assert torch.load(out / "training/dynamics.ckpt")["iteration"] == 33
    assert in_child(args, ("outcome", 3, "SIGINT")) == 1  # Ctrl-C finishes a step and saves
    assert torch.load(out / "training/outcome.ckpt")["iteration"] in (3, 4)
    assert in_child(args) == 0
    same_run(tmp_path / "whole", out)


@pytest.mark.timeout(900)
def test_two_processes_lose_what_one_loses(tmp_path):
    """Codec from nothing; dynamics and outcome on one codec, whose latents are then the same."""
    make_store(tmp_path / "data", steps=(12, 3, 15, 7))
    args = dict(SMALL, data=str(tmp_path / "data"), measure=False)
    base = str(fit(FitConfig(out=str(tmp_path / "base"), **args)))

    def runs(name, **changes):
        short = dict(args, codec_iterations=6, dynamics_iterations=1, outcome_iterations=1)
        heads = dict(args, init=base, dynamics_iterations=6, outcome_iterations=6)
        return [given | {"out": str(tmp_path / f"{name}{i}")} | changes
                for i, given in enumerate((short, heads))]

    (tmp_path / "runs.json").write_text(json.dumps(runs("copies") + runs("shards", shard=True)))
    root = RUN.parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(RUN), str(tmp_path / "runs.json")], cwd=root, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-3000:]
    several = json.loads((tmp_path / "runs.losses.json").read_text())
    alone = [fit_run.recorded(settings) for settings in runs("one")]
    with pytest.MonkeyPatch.context() as patch:  # sharded training has no Muon: compare without
        patch.setattr(loop, "optimizers", lambda m, cfg, shard: OPTIMIZERS(m, cfg, True))
        alone += [fit_run.recorded(settings) for settings in runs("plain")]
    for one, two in zip(alone, several, strict=True):
        part = {k: v for k, v in one.items() if len(v) == 6}
        assert part.keys() in ({"codec"}, {"dynamics", "outcome"})
        for name, losses in part.items():
            assert np.allclose(losses, two[name], rtol=0, atol=1e-5), (name, losses, two[name])
    for one, two in (("one1", "copies1"), ("plain1", "shards1")):
        a, b = weights(tmp_path / one), weights(tmp_path / two)
        assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


OPTIMIZERS = loop.optimizers
