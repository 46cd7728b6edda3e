"""Fitting a world of several players: files, resuming, snapshots, start banks, figures, errors."""

import json
import multiprocessing
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import fit_run
from tests.party_squares import CELLS, PLAYERS, SLOTS, recorded_games

sys.path.insert(0, str(Path(__file__).resolve().parent))
import party_toy as toy  # noqa: E402

from worldgym.agents import cli  # noqa: E402
from worldgym.data.party import PartySampler, halved, open_party, split_party  # noqa: E402
from worldgym.data.starts import StartBank  # noqa: E402
from worldgym.envs.party_tasks import PARTIES, load_party  # noqa: E402
from worldgym.errors import CheckpointError, ConfigError  # noqa: E402
from worldgym.models import party_nano  # noqa: E402
from worldgym.models.party_loss import PartyLossConfig, party_loss  # noqa: E402
from worldgym.train.fit_party import FitParty, FitPartyConfig  # noqa: E402
from worldgym.train.metrics_party import cell_of, measure_party, recorded_states  # noqa: E402

SMALL = {"codec_iterations": 8, "dynamics_iterations": 12, "outcome_iterations": 4, "width": 32,
         "layers": 1, "batch": 4, "clip": 4, "window": 3, "recent": 2, "starts": 6,
         "tensorboard": False,
         "alone_share": 0.5, "video_share": 0.2, "holdout": 0.3, "measure": False, "party": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recorded_games(tmp_path_factory.mktemp("games"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run without interruption, and its losses."""
    out = tmp_path_factory.mktemp("whole") / "world"
    settings = SMALL | {"data": str(data), "out": str(out), "name": "toy", "measure": True}
    return out, fit_run.recorded(settings)


def test_the_world_and_its_task(whole, data):
    out, losses = whole
    assert {k: len(v) for k, v in losses.items()} == {"codec": 8, "dynamics": 12, "outcome": 4}
    task = load_party(out)
    assert task is load_party(str(out)) and task.horizon == 100 and task.facing
    assert task.games == ("apples", "walls") and task.cells == (CELLS, CELLS)
    assert task.game_id("walls") == 1
    assert task.world.spec.subjects == SLOTS and task.world.spec.frame_hw == (16, 16)
    assert len(task.starts) == 12 and task.starts.game_N.tolist() == [0] * 6 + [1] * 6
    state = task.world.begin(task.starts.gather([0, 5, 11, 7]), [0] * 4, range(4))
    state, chunk = task.world.step(state, np.zeros((4, SLOTS), np.int64))
    assert chunk.subjects.valid_BN.sum(1).tolist() == [PLAYERS] * 4
    assert np.isfinite(chunk.subjects.rewards_BN).all()
    card = json.loads((out / "world.json").read_text())
    made = card["provenance"]
    assert made["real_steps_used"] == {"apples": 55, "walls": 55}
    assert "worldgym fit-party --data" in made["command"] and "--layers 1" in made["command"]
    assert set(made["training_seconds"]) == {"codec", "encode", "dynamics", "outcome"}
    assert set(card["metrics"]) == {"apples", "walls", "pooled"}
    made = party_nano.load_party(out)
    assert made.outcome.amounts_GV[:, :2].tolist() == [[0, 1], [0, 1]]


def test_killed_runs_end_as_if_nothing_had_happened(whole, data, tmp_path):
    out, losses = whole
    settings = SMALL | {"data": str(data), "out": str(tmp_path / "world"), "name": "toy"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fit_run"])
    for kill in (("codec", 5, "SIGKILL"), ("dynamics", 8, "SIGKILL")):
        process = context.Process(target=fit_run.child, args=(settings, kill))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    state = torch.load(tmp_path / "world/training/dynamics.ckpt")
    assert state["iteration"] == 6 and not (tmp_path / "world/world.json").exists()
    again = fit_run.recorded(settings)
    assert again == {"dynamics": losses["dynamics"][6:]}
    a, b = (party_nano.load_party(x).state_dict() for x in (out, tmp_path / "world"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (StartBank.load(x / "starts.safetensors") for x in (out, tmp_path / "world"))
    assert torch.equal(a.latents_UChw, b.latents_UChw)
    with pytest.raises(CheckpointError, match="other settings"):
        fit_run.recorded(settings | {"dynamics_lr": 1e-3})


def test_a_snapshot_is_a_world(whole, data, tmp_path):
    """Of a finished run: the same weights. Early: no memory, no ends."""
    out, _ = whole
    settings = SMALL | {"data": str(data), "out": str(out), "name": "toy",
                        "snapshot": str(tmp_path / "now")}
    fit_run.recorded(settings)
    a, b = (party_nano.load_party(x) for x in (out, tmp_path / "now"))
    assert a.cfg == b.cfg
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    path, heads = (out / f"training/{part}.ckpt" for part in ("dynamics", "outcome"))
    state = torch.load(path)
    torch.save(state | {"iteration": 6}, path)
    heads.rename(tmp_path / "heads")
    try:
        fit_run.recorded(settings | {"snapshot": str(tmp_path / "early")})
    finally:
        torch.save(state, path)
        (tmp_path / "heads").rename(heads)
    task = load_party(tmp_path / "early")
    assert task.world.party.cfg.window == 1 and task.world.spec.context_frames == 2
    card = json.loads((tmp_path / "early/world.json").read_text())
    assert card["provenance"]["iterations"] == {"codec": 8, "dynamics": 6, "outcome": 0}
    state = task.world.begin(task.starts.gather([0, 11]), [0] * 2, range(2))
    _, chunk = task.world.step(state, np.zeros((2, SLOTS), np.int64))
    assert not chunk.subjects.end_probability_BN.any() and not chunk.subjects.ended_BN.any()
    with pytest.raises(ConfigError, match="nothing to take a snapshot of"):
        fit_run.recorded(settings | {"out": str(tmp_path / "none")})


# ---- start banks with players


def bank(store, game=0, **changes):
    def encode(frames):
        return frames.permute(0, 3, 1, 2).float()[:, :, ::4, ::4] / 255

    args = {"count": 8, "context": 3, "view": halved, "game": game, "margin": 2,
            "states": lambda rows: recorded_states(store, rows, True)}
    return StartBank.build(store, encode, np.arange(len(store)), **args | changes)


def test_banks_hold_the_players(data, tmp_path):
    store = open_party(data)["apples"]
    made = bank(store, 1)
    starts = made.gather(np.arange(8))
    assert starts.subjects_BKNS.shape == (8, 3, SLOTS, 7) and starts.game_B.tolist() == [1] * 8
    assert (starts.valid_BN == (np.arange(SLOTS) < PLAYERS)).all()
    first = 3 - starts.length_B
    assert starts.null_BK[np.arange(8), first].all()  # nothing led to the oldest frame
    assert starts.null_BK.sum(1).tolist() == (first + 1).tolist()
    colour = toy.PAINT[:6]
    for i in range(8):  # the newest frame shows a player where the state says he is
        frame = made.last_frames([i])[0].astype(float) / 127.5 - 1
        assert frame.shape == (16, 16, 3)
        x, y = cell_of(starts.subjects_BKNS[i, -1, :PLAYERS].numpy(), CELLS).T
        shown = frame[4 * y + 1, 4 * x + 1]
        assert (np.abs(shown[:, None] - colour).max(-1).min(1) < 0.02).all()
    made.save(tmp_path / "bank.safetensors")
    again = StartBank.load(tmp_path / "bank.safetensors")
    assert np.array_equal(again.subjects_NKPS, made.subjects_NKPS)
    assert again.only([3, 1]).valid_NP.shape == (2, SLOTS)
    replace(made, game_N=None).save(tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="players"):
        StartBank.load(tmp_path / "half.safetensors")


def test_banks_join(data):
    stores = open_party(data)
    parts = [bank(stores["apples"]), bank(stores["walls"], 1, count=5)]
    joined = StartBank.joined(parts)
    assert len(joined) == 13
    for part, offset in zip(parts, (0, 8), strict=True):
        mine = np.arange(len(part))
        a, b = part.gather(mine), joined.gather(mine + offset)
        assert torch.equal(a.latents_BKChw, b.latents_BKChw)
        assert np.array_equal(part.last_frames(mine), joined.last_frames(mine + offset))
        assert np.array_equal(a.game_B, b.game_B) and torch.equal(a.subjects_BKNS, b.subjects_BKNS)
    old = StartBank.from_frames(lambda x: x.permute(0, 3, 1, 2).half(),
                                np.zeros((2, 16, 16, 3), np.uint8), np.zeros(2, np.int64))
    assert StartBank.joined([old, old]).game_N is None


# ---- figures


class Known:
    """A world that tells what it is given: one that knows the truth, or one that stands still."""

    def __init__(self, truth, right):
        self.truth, self.right, self.at = truth, right, 0
        self.sub = type("S", (), {"facing": True})
        self.spec = type("P", (), {"context_frames": 1})

    def encode(self, frames):
        return torch.from_numpy(frames).permute(0, 3, 1, 2).float()

    def decode(self, latents):
        return latents.permute(0, 2, 3, 1).round().to(torch.uint8)

    def begin(self, starts, seeds, episodes):
        assert starts.null_BK.all()
        self.now, self.picture = starts.subjects_BKNS, starts.latents_BKChw
        return self._state()

    def step(self, state, actions):
        self.at += 1
        if self.right:
            self.now = self.truth[:, self.at:self.at + 1]
        return self._state(), None

    def _state(self):
        return type("W", (), {"extra": {"subjects": self.now}, "history_BKChw": self.picture,
                              "release": lambda self: None})()


def test_measures_of_known_worlds(data):
    """One that knows everything, and one in which nobody moves."""
    store = open_party(data)["apples"]
    ids = {"apples": np.arange(len(store))}
    clip = PartySampler({"apples": store}, ids, 5, 16, 0, permute=False)(0)
    truth = torch.from_numpy(recorded_states(store, clip["rows"], True))
    known, still = (measure_party(Known(truth, right), {"apples": store}, ids, cells=[CELLS],
                                  view=halved, clips=16)["apples"] for right in (True, False))
    names = ("position", "moved", "displacement", "facing", "alive")
    assert all(known[f"{name}_{step}"] == 1 for name in names for step in (1, 4))
    assert still["moved_1"] == 0 and 0 < still["position_1"] == still["position_1_copy"] < 1
    assert still["position_1"] == still["displacement_1"]
    assert still["psnr_1"] == still["psnr_1_copy"] and still["position_4"] < still["position_1"]


def test_held_out_episodes_are_not_trained_on(whole, data):
    stores = open_party(data)
    train, held = split_party(stores, SMALL["holdout"])
    for game, number in (("apples", 0), ("walls", 1)):
        starts = load_party(whole[0]).starts
        mine = starts.only(np.flatnonzero(starts.game_N == number)).frames
        rows = np.concatenate([np.arange(stores[game].starts[i], stores[game].starts[i] + 2)
                               for i in held[game]])
        unseen = halved(stores[game].take("frames", rows))
        assert not (mine[:, None] == unseen).all((2, 3, 4)).any()
        assert not set(train[game]) & set(held[game])


# ---- small hooks


def test_a_run_goes_on_from_a_world(whole, data, tmp_path):
    """The codec stays bit for bit; dynamics and heads start where they were and move."""
    settings = SMALL | {"data": str(data), "out": str(tmp_path / "next"), "name": "next",
                        "init": str(whole[0]), "balance": "players", "video_share": 0.0,
                        "dynamics_iterations": 2, "outcome_iterations": 1}
    assert not fit_run.recorded(settings | {"out": str(tmp_path / "same"), "dynamics_iterations": 0,
                                            "outcome_iterations": 0})
    same = party_nano.load_party(tmp_path / "same")
    assert same.cfg.end_scale == 1
    losses = fit_run.recorded(settings)
    assert {k: len(v) for k, v in losses.items()} == {"dynamics": 2, "outcome": 1}
    old, new = (party_nano.load_party(x) for x in (whole[0], tmp_path / "next"))
    assert old.cfg.codec == new.cfg.codec and new.cfg.name == "next"
    assert all(torch.equal(v, new.codec.state_dict()[k]) for k, v in old.codec.state_dict().items())
    for part in ("dynamics", "outcome"):
        a, b = (torch.cat([p.detach().flatten() for p in getattr(x, part).parameters()])
                for x in (old, new))
        assert 0 < (a - b).norm() < 0.3 * a.norm()
        assert torch.equal(a, torch.cat([p.detach().flatten() for p in getattr(
            same, part).parameters()]))
    (tmp_path / "next/training/outcome.ckpt").unlink()
    fit_run.recorded(settings | {"snapshot": str(tmp_path / "early")})
    assert party_nano.load_party(tmp_path / "early").cfg.end_scale == 1  # its first world's heads
    made = json.loads((tmp_path / "next/world.json").read_text())["provenance"]
    assert made["config"]["init"] == str(whole[0])
    earlier = json.loads((whole[0] / "world.json").read_text())["provenance"]
    assert made["started_from"]["command"] == earlier["command"] != made["command"]
    assert made["started_from"]["training_seconds"] == earlier["training_seconds"]
    assert "started_from" not in earlier
    with pytest.raises(ConfigError, match="does not fit"):
        fit_run.recorded(settings | {"out": str(tmp_path / "other"), "width": 64})


def test_a_world_that_went_on_sees_further_back(data, tmp_path):
    """Frames that the first world did not see count nothing at first."""
    settings = SMALL | {"data": str(data), "out": str(tmp_path / "first"), "recent": 1}
    fit_run.recorded(settings)
    settings |= {"init": str(tmp_path / "first"), "out": str(tmp_path / "next"), "recent": 2}
    settings.pop("party")
    made = FitParty(FitPartyConfig(**settings)).nano
    old = party_nano.load_party(tmp_path / "first").dynamics.dit.patch_embedding.weight
    new = made.dynamics.dit.patch_embedding.weight
    assert 2 * new.shape[1] == 3 * old.shape[1] and made.cfg.dynamics.recent == 2
    assert torch.equal(new[:, :old.shape[1]], old) and not new[:, old.shape[1]:].any()


def test_other_dynamics_beside_the_same_codec_and_heads(data, tmp_path):
    """Networks to compare share everything but the dynamics."""
    settings = SMALL | {"data": str(data), "out": str(tmp_path / "first")}
    fit_run.recorded(settings)
    settings |= {"init": str(tmp_path / "first"), "out": str(tmp_path / "next"),
                 "ablation": "no-mca", "fresh": True}
    settings.pop("party")
    made = FitParty(FitPartyConfig(**settings)).nano
    old = party_nano.load_party(tmp_path / "first")
    assert made.cfg.dynamics.subjects.mca == "none" and old.cfg.dynamics.subjects.mca != "none"
    for part in ("codec", "outcome"):
        mine, theirs = (x.get_submodule(part).state_dict() for x in (made, old))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert not made.dynamics.dit.head.head.weight.any()  # untrained
    with pytest.raises(ConfigError, match="does not fit"):
        FitParty(FitPartyConfig(**settings | {"fresh": False}))


def test_position_weight_counts_positions():
    """An untrained network tells nothing (flow 0): the error is that of the target alone."""
    world = party_nano.tiny(lively=False, subjects={"facing": True})
    model, cfg = world.party, world.party.cfg
    g = torch.Generator().manual_seed(0)
    batch = {"latents_BFChw": torch.randn(4, 3, *cfg.latent_chw, generator=g),
             "states_BFNS": torch.zeros(4, 3, 4, 7), "valid_BN": torch.ones(4, 4) > 0,
             "actions_BFN": torch.zeros(4, 3, 4, dtype=torch.long), "game_B": torch.zeros(4)}
    batch["states_BFNS"][..., :2] = 3.0  # positions err by 3 more than the noise
    told = [party_loss(model, cfg, batch, torch.Generator().manual_seed(1),
                       PartyLossConfig(position_weight=w))[1]["states"] for w in (1.0, 4.0)]
    # mean of (2 * 10 + 5 * 1) / 7, and (2 * 4 * 10 + 5 * 1) / 13, up to the noise
    assert told[0] == pytest.approx(25 / 7, rel=0.15) and told[1] == pytest.approx(85 / 13, rel=.15)


@pytest.mark.parametrize("changes, message", [
    ({"games": ("chess",)}, "no recordings of this game"), ({"batch": 0}, "impossible length"),
    ({"alone_share": 0.0}, "impossible shares"), ({"ablation": "no-eyes"}, "no such ablation"),
    ({"window": 0}, "impossible length"),
    ({"recent": 3}, "outside its window"), ({"balance": "teams"}, "no such balance"),
    ({"fresh": True}, "begin anew"), ({"eventful": 1.0}, "share of events")])
def test_refusals(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        fit_run.recorded(SMALL | {"data": str(data), "out": str(tmp_path / "x")} | changes)


def test_loader_refusals(whole, tmp_path):
    with pytest.raises(ConfigError, match="unknown party world"):
        load_party("worldgym/NoSuchWorld-v0")
    (tmp_path / "world.json").write_text("{}")
    with pytest.raises(CheckpointError, match="missing"):
        load_party(tmp_path)
    with pytest.raises(ConfigError, match="not learned this game"):
        load_party(whole[0]).game_id("chess")


def test_a_shipped_world_is_named_by_its_id(monkeypatch):
    seen = []
    monkeypatch.setattr("worldgym.train.fit_party.fit_party", lambda cfg: seen.append(cfg))
    ours = "worldgym/MeltingPotMini-v0"
    cli.parse(["fit-party", "--data", "d", "--out", "o", "--init", ours]).run()
    assert Path(seen[0].init) == PARTIES[ours]


def test_the_command_passes_its_settings_on(monkeypatch):
    made = cli.parse(["fit-party", "--data", "d", "--out", "o", "--games", "coins", "clean_up",
                      "--layers", "3", "--ablation", "pooled", "--snapshot", "s", "--init", "i",
                      "--compile", "--balance", "players", "--fresh", "--eventful", "0.2"])
    seen = []
    monkeypatch.setattr("worldgym.train.fit_party.fit_party", lambda cfg: seen.append(cfg))
    made.run()
    assert seen == [FitPartyConfig(data="d", out="o", games=("coins", "clean_up"), layers=3,
                                   ablation="pooled", snapshot="s", init="i", compile=True,
                                   balance="players", fresh=True, eventful=0.2)]
