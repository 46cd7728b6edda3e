"""The training loop on a linear model: rates, resume, interruption, logs, refusals."""

import json
import os
import shutil
import signal

import pytest
import torch
from torch import nn

from worldgym.errors import CheckpointError, NotFiniteError
from worldgym.train import loop as module
from worldgym.train.loop import Loop, LoopConfig, learning_rate
from worldgym.train.muon import Muon, orthogonal


class Model(nn.Module):
    """Parameters of every kind the optimisers tell apart: block matrices, others, vectors."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.head(torch.tanh(self.blocks[0](x)))


def make(folder, iterations=30, **changes):
    torch.manual_seed(0)
    about = changes.pop("about", {})
    cfg = LoopConfig(iterations=iterations, **{"muon": True, "save_every": 7, "log_every": 5,
                                               "lr": 0.01, **changes})
    return Loop("part", Model(), cfg, folder, about=about)


def sample(i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 4, generator=generator)
    return {"x": x, "y": x.sum(1, keepdim=True).tanh()}


def loss(model, data, generator):
    x = data["x"] + 0.01 * torch.randn(data["x"].shape, generator=generator)
    value = ((model(x) - data["y"]) ** 2).mean()
    return value, {"mse": float(value.detach())}


def final(loop):
    state = {**loop.module.state_dict(), **{f"ema.{k}": v for k, v in loop.ema.items()}}
    return state, [{k: v for k, v in row.items() if k != "seconds"} for row in loop.history]


def test_rate_warms_up_holds_and_falls():
    cfg = LoopConfig(iterations=100, lr=1.0, warmup=50, decay=0.3)
    rates = [learning_rate(cfg, i) for i in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[69] == 1.0  # warm-up: a tenth at most
    assert rates[70] == 1.0 and rates[85] == pytest.approx(0.525) and 0.05 < rates[99] < 0.09
    assert learning_rate(LoopConfig(iterations=1, lr=1.0), 0) == 1.0


def test_the_average_begins_late_and_wild_updates_are_left_out(tmp_path):
    late = make(tmp_path / "late", 6, ema=0.5, ema_from=5, muon=False)
    live = []

    def watched(model, data, generator):
        live.append({k: v.clone() for k, v in model.state_dict().items()})
        return loss(model, data, generator)

    late.run(sample, watched, False)
    last = late.module.state_dict()
    for key in ("head.weight", "blocks.0.bias"):  # iteration 6 is the first that counts
        assert torch.allclose(late.ema[key], (live[5][key] + last[key]) / 2, atol=1e-7)
    start = {k: v.clone() for k, v in make(tmp_path / "x").module.state_dict().items()}
    still = make(tmp_path / "still", 3, skip=1e-9)
    still.run(sample, loss, False)
    assert all(torch.equal(v, start[k]) for k, v in still.module.state_dict().items())
    old = torch.load(still.path, weights_only=True)  # one from before there were these settings
    for key in ("skip", "ema_from"):
        old["about"].pop(key)
    torch.save(old, still.path)
    with pytest.raises(CheckpointError, match="skip"):
        make(tmp_path / "still", 3, skip=1e-9).resume()
    make(tmp_path / "still", 3).resume()


def test_muon_takes_block_matrices_only():
    adam, muon = module.optimizers(Model(), LoopConfig(iterations=1, muon=True))
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert [len(g["params"]) for g in adam.param_groups] == [1, 2]
    assert len(module.optimizers(Model(), LoopConfig(iterations=1, muon=True), shard=True)) == 1


def test_muon_agrees_with_torch():
    torch.manual_seed(0)
    start, target = torch.randn(6, 9), torch.randn(6, 9)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    pairs = [(mine, Muon([mine], lr=0.05, weight_decay=0.1)),
             (theirs, torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1,
                                       adjust_lr_fn="match_rms_adamw"))]
    for _ in range(5):
        for p, optimizer in pairs:
            optimizer.zero_grad()
            ((p - target) ** 2).sum().backward()
            optimizer.step()
    assert torch.allclose(mine, theirs, atol=5e-3) and not torch.allclose(mine, start, atol=0.05)
    wide = orthogonal(torch.randn(4, 7))
    assert ((torch.linalg.svdvals(wide) > 0.6) & (torch.linalg.svdvals(wide) < 1.3)).all()
    assert orthogonal(torch.zeros(3, 2)).abs().sum() == 0


def test_learns_and_keeps_the_average(tmp_path):
    loop = make(tmp_path, 200)
    loop.run(sample, loss, tensorboard=False)
    assert loop.history[-1]["loss"] < loop.history[0]["loss"] / 5
    live = {k: v.clone() for k, v in loop.module.state_dict().items()}
    loop.load_ema()
    assert all(torch.equal(v, loop.ema[k]) for k, v in loop.target.state_dict().items())
    assert not torch.equal(live["head.weight"], loop.target.head.weight)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_training_is_the_same_and_goes_on_from_the_other(tmp_path):
    """Up to rounding; a run may be interrupted and go on compiled, or the other way round."""
    (plain := make(tmp_path / "plain")).run(sample, loss, tensorboard=False)
    with pytest.raises(KeyError):  # saved at 7
        make(tmp_path / "fused").run(lambda i: {} if i == 9 else sample(i), loss, False)
    fused = make(tmp_path / "fused", compile=True)
    seen = []
    fused.run(sample, lambda model, *rest: (seen.append(model), loss(model, *rest))[1],
              tensorboard=False)
    assert isinstance(seen[0], torch._dynamo.OptimizedModule) and len(seen) == 23
    (a, log_a), (b, log_b) = final(plain), final(fused)
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)
    assert log_b[-1]["loss"] == pytest.approx(log_a[-1]["loss"], rel=0.05)


@pytest.mark.parametrize("at", [3, 7, 23])
def test_a_crash_changes_nothing(tmp_path, at):
    whole = make(tmp_path / "whole")
    whole.run(sample, loss, tensorboard=False)
    broken = make(tmp_path / "broken")

    def breaks(i):
        if i == at:
            raise OSError("disk")
        return sample(i)

    with pytest.raises(OSError, match="disk"):
        broken.run(breaks, loss, tensorboard=False)
    (tmp_path / "broken/part.part").write_bytes(b"half a checkpoint")
    again = make(tmp_path / "broken")
    again.run(sample, loss, tensorboard=False)
    (a, log_a), (b, log_b) = final(whole), final(again)
    assert all(torch.equal(a[k], b[k]) for k in a) and log_a == log_b
    lines = [json.loads(x) for x in (tmp_path / "broken/part.jsonl").read_text().splitlines()]
    assert [x["iteration"] for x in lines] == [5, 10, 15, 20, 25, 30]
    again.run(lambda i: pytest.fail("trained again"), loss)  # done is done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on(tmp_path, number):
    before = signal.getsignal(number)
    whole = make(tmp_path / "whole")
    whole.run(sample, loss, tensorboard=False)

    def interrupted(i):
        if i == 11:
            os.kill(os.getpid(), number)
        return sample(i)

    with pytest.raises(KeyboardInterrupt, match="saved at iteration 12"):
        make(tmp_path / "cut").run(interrupted, loss, tensorboard=False)
    assert signal.getsignal(number) is before
    again = make(tmp_path / "cut")
    again.run(lambda i: sample(i) if i >= 12 else pytest.fail("twice"), loss, tensorboard=False)
    (a, log_a), (b, log_b) = final(whole), final(again)
    assert all(torch.equal(a[k], b[k]) for k in a) and log_a == log_b


def test_a_fresh_start_forgets_old_logs(tmp_path):
    (tmp_path / "part.jsonl").write_text('{"iteration": 5}\n')  # killed before any checkpoint
    make(tmp_path, 10).run(sample, loss, tensorboard=False)
    assert len((tmp_path / "part.jsonl").read_text().splitlines()) == 2


def test_refusals(tmp_path):
    make(tmp_path, 10, about={"data": "a"}).run(sample, loss, tensorboard=False)
    for changes in ({"lr": 0.02}, {"about": {"data": "b"}}, {"about": {}}, {"iterations": 20}):
        with pytest.raises(CheckpointError, match="other settings.*new output folder"):
            make(tmp_path, **{"iterations": 10, "about": {"data": "a"}, **changes}).resume()
    whole = (tmp_path / "part.ckpt").read_bytes()
    for bad in (b"", b"nonsense", whole[:-200]):
        (tmp_path / "part.ckpt").write_bytes(bad)
        with pytest.raises(CheckpointError, match="(?s)cannot resume.*delete the file"):
            make(tmp_path, 10, about={"data": "a"}).resume()

    def diverges(model, data, generator):
        value, logs = loss(model, data, generator)
        return value * float("nan"), logs

    with pytest.raises(NotFiniteError, match="diverged.*iteration 0.*learning rate"):
        make(tmp_path / "nan").run(sample, diverges, tensorboard=False)


def test_tensorboard_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    make(tmp_path, 10).run(sample, loss)
    assert any((tmp_path / "tensorboard/part").iterdir())
