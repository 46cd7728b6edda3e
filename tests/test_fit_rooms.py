"""Fitting a small WorldPlay: batches with old views, losses that fall, resuming, the whole way to
an environment and to revisit figures."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worldgym.agents import revisit  # noqa: E402
from worldgym.data.store import Episodes  # noqa: E402
from worldgym.envs import rooms as game  # noqa: E402
from worldgym.envs.tasks import load_task  # noqa: E402
from worldgym.envs.worldplay import WorldPlayEnv  # noqa: E402
from worldgym.errors import CheckpointError, ConfigError, DatasetError  # noqa: E402
from worldgym.models import nano, rooms  # noqa: E402
from worldgym.testing import check_dream_env  # noqa: E402
from worldgym.train.fit_rooms import Clips, FitRooms, FitRoomsConfig, fit_rooms  # noqa: E402

SMALL = dict(codec_iterations=12, dynamics_iterations=12, outcome_iterations=12, batch=4, draws=2,
             width=32, layers=2, channels=4, total=12, temporal=8, starts=8, tensorboard=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "data"
    game.record_rooms(folder, episodes=6, seed=1, steps=20, frame_hw=(40, 48), progress=False)
    return folder


@pytest.fixture(scope="module")
def folder(data):
    return fit_rooms(FitRoomsConfig(data=str(data), out=str(data.parent / "world"), **SMALL))


def test_a_batch_is_what_a_dream_would_see(data):
    fit = FitRooms(FitRoomsConfig(data=str(data), out=str(data.parent / "none"), **SMALL))
    clips, ids = fit.clips, np.arange(6)
    store = Episodes.open(data)
    kinds = set()
    for i in range(40):
        batch = clips.batch(ids, 4, 0, i)
        old, new = batch["old"], batch["new"]
        kinds.add(old.shape[1])
        assert (new[:, 0] % 4 == 0).all() and (old < new[:, :1]).all() and (
            np.diff(old, axis=1) > 0).all()
        assert old.shape[1] == 12 or old.shape[1] == new[0, 0]
        same = clips.batch(ids, 4, 0, i)
        assert all((same[k] == batch[k]).all() for k in batch)
    assert kinds == {4, 8, 12}
    episode = int(store.lengths.argmax())
    start = 4 * (clips.chunks(episode) - 1)
    seen = clips.context(episode, start)
    assert seen[-8:].tolist() == list(range(start - 8, start)) and len(seen) == 12
    assert clips.rows(episode, np.arange(6)).tolist() == (
        store.starts[episode] + np.array([0, 0, 0, 0, 1, 2])).tolist()
    assert clips.policy.select(clips.w2c[clips.rows(episode, np.arange(start + 4))], start,
                               clips.K).tolist() == seen.tolist()


def test_losses_fall_and_gradients_reach_cameras_and_keys(data):
    cfg = FitRoomsConfig(data=str(data), out=str(data.parent / "falls"), **{
        **SMALL, "dynamics_iterations": 60, "batch": 8})
    fit = FitRooms(cfg)
    fit.work.mkdir(parents=True)
    fit._codec(40)
    fit.latents, fit.weights = fit._encode()
    start = {k: v.clone() for k, v in fit.nano.dynamics.state_dict().items()}
    fit._dynamics(60)
    loss = [json.loads(line)["loss"]
            for line in (fit.work / "dynamics.jsonl").read_text().splitlines()]
    assert len(loss) == 3 and loss[-1] < 0.85 * loss[0], loss
    after = fit.nano.dynamics.state_dict()
    for name in ("dit.blocks.0.self_attn.o_camera.weight", "dit.action_embedding.2.weight"):
        assert not start[name].any() and after[name].abs().max() > 1e-4


def test_a_killed_fit_goes_on_to_the_same_weights(data, folder, monkeypatch):
    from worldgym.train import loop

    cfg = FitRoomsConfig(data=str(data), out=str(data.parent / "killed"), **SMALL)
    step, count = loop.Loop._step, [0]

    def dying(self, *args):
        count[0] += 1
        if count[0] == 12 + 8:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(loop.Loop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        fit_rooms(cfg)
    monkeypatch.undo()
    again = rooms.load_net(fit_rooms(cfg)).state_dict()
    whole = rooms.load_net(folder).state_dict()
    assert all(torch.equal(again[k], whole[k]) for k in whole)
    with pytest.raises(CheckpointError, match="other settings"):
        fit_rooms(replace(cfg, batch=8))


def test_the_published_stages_make_worlds_over_one_codec(data, folder, monkeypatch):
    """Student, teacher, context forcing; the last killed and resumed."""
    from worldgym.train import loop

    root, few = data.parent, {**SMALL, "dynamics_iterations": 4}
    first, nets = str(folder), {"init": rooms.load_net(folder)}

    def stage(name, out, **more):
        fit_rooms(FitRoomsConfig(data=str(data), out=str(root / out), stage=name, **few, **more))
        nets[out] = rooms.load_net(root / out)

    stage("causal", "student", init=first)
    stage("teacher", "teacher", init=first)
    folders = {"init": str(root / "student"), "teacher": str(root / "teacher"), "student_lr": 1e-3,
               "critic_lr": 1e-3, "critic_updates": 2}
    stage("forcing", "forced", **folders)
    for name, net in nets.items():
        for part in ("codec", "outcome"):
            assert all(torch.equal(v, getattr(nets["init"], part).state_dict()[k])
                       for k, v in getattr(net, part).state_dict().items())
        other = nets["student" if name == "forced" else "init"].dynamics.state_dict()
        assert name == "init" or any(not torch.equal(v, other[k])
                                     for k, v in net.dynamics.state_dict().items())
    state = torch.load(root / "forced" / "training" / "dynamics.ckpt", weights_only=True)
    assert (state["iteration"], state["partner"]["iteration"]) == (4, 8)
    made = json.loads((root / "forced" / nano.CARD).read_text())["provenance"]
    assert "--stage causal" in made["started_from"]["command"]
    assert "--stage teacher" in made["teacher"]["command"]
    env = make(root / "forced")
    env.reset(seed=0)
    assert env.step(1)[0].shape == (40, 48, 3)
    step, count = loop.Loop._step, [0]

    def dying(self, *args):
        count[0] += 1
        if count[0] == 9:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(loop.Loop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        stage("forcing", "again", **folders)
    monkeypatch.undo()
    stage("forcing", "again", **folders)
    assert all(torch.equal(v, nets["forced"].state_dict()[k])
               for k, v in nets["again"].state_dict().items())
    other = rooms.load_net(folder)
    other.codec.mean += 1
    nano.save(other, root / "strange", {}, rooms.KIND)
    for what, wrong in (("same latents", {**folders, "teacher": str(root / "strange")}),
                        ("stage and folders", {"init": first}), ("stage and folders", {}),
                        ("does not fit", {**folders, "width": 64})):
        with pytest.raises(ConfigError, match=what):
            fit_rooms(FitRoomsConfig(**{"data": str(data), "out": str(root / "no"),
                                        "stage": "forcing", **few, **wrong}))
    with pytest.raises(ConfigError, match="stage and folders"):
        FitRoomsConfig(data=str(data), out=str(root / "no"), init=first, teacher=first)


def test_a_fit_goes_on_from_a_world_with_other_positions(data, folder):
    """Codec and heads stay, the dynamics learn on, and the card tells from where."""
    out = data.parent / "plain"
    fit_rooms(FitRoomsConfig(data=str(data), out=str(out), init=str(folder), positions="plain",
                             **{**SMALL, "dynamics_iterations": 4}))
    old, new = rooms.load_net(folder), rooms.load_net(out)
    assert (old.cfg.positions, new.cfg.positions) == ("reframed", "plain")
    for part in ("codec", "outcome"):
        assert all(torch.equal(v, getattr(old, part).state_dict()[k])
                   for k, v in getattr(new, part).state_dict().items())
    assert any(not torch.equal(v, old.dynamics.state_dict()[k])
               for k, v in new.dynamics.state_dict().items())
    made = json.loads((out / nano.CARD).read_text())["provenance"]
    assert "fit-rooms" in made["started_from"]["command"] and "--positions plain" in made["command"]


def make(folder):
    return WorldPlayEnv(load_task(folder, horizon=3))


def test_the_fitted_world_is_an_environment(folder):
    task = load_task(folder)
    assert task.twin == game.GAME and task.horizon == game.HORIZON and len(task.starts) == 8
    report = check_dream_env(partial(make, folder), steps=4, other_process=False)
    assert {"state", "fork", "seeds", "refusal", "gymnasium", "sb3"} <= set(report.passed), report
    env = make(folder)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (40, 48, 3) and env.action_space.n == len(game.LABELS)
    info = env.step(1)[4]
    assert info["poses"].shape == (4, 4, 4) and len(info["frames"]) == 4
    with pytest.raises(ConfigError, match="reset option"):
        env.reset(options={"prompt": "rain"})
    lone = load_task(folder, temperature=0.5)
    assert lone.world.temperature == 0.5


def test_half_of_the_starts_remember_the_walk_that_led_there(data, folder):
    task, store = load_task(folder), Episodes.open(data)
    bank, world = task.starts, task.world
    everything, poses = (store.take(k, np.arange(store.rows)) for k in ("frames", "info_pose"))
    assert bank.beginnings.tolist() == [0, 1, 2, 3]
    assert set(bank.sample(np.arange(60), np.zeros(60, int), beginnings_only=True)) == {0, 1, 2, 3}
    assert set(bank.sample(np.arange(60), np.zeros(60, int))) == set(range(8))
    for index in range(4, 8):
        latents, c2w = bank.pasts[index]
        assert len(latents) == len(c2w) and len(latents) % 4 == 0 and len(latents) <= 48
        state = world.begin(bank.gather([index]), [0])
        assert len(state.extra["past"][0].history) == len(latents)
        shown = bank.last_frames([index])[0]  # a recorded frame, and no ending
        rows = np.flatnonzero((everything == shown).all((1, 2, 3)))
        assert len(rows) and not store.take("terminated", rows).any()
        assert torch.allclose(latents[-1], world.encode(shown[None])[0], atol=2e-2)
        assert np.allclose(c2w[-1], np.eye(4), atol=1e-6)
        if (latents[-1] != latents[-2]).any():  # not the standing chunk
            assert any(np.allclose(poses[r] @ c2w[-2], poses[r - 1], atol=1e-5) for r in rows)
    env = make(folder)
    obs, info = env.reset(seed=0, options={"start": 5})
    assert (obs == bank.pictures[5]).all() and info["start"] == 5
    env.step(2)
    kept = env.get_state()
    one = env.step(1)[0]
    env.set_state(kept)
    assert (env.step(1)[0] == one).all()


def test_heads_stop_the_camera_at_walls_and_end_the_episode(folder):
    task = load_task(folder)

    class Heads:
        reward = 1.0

        @staticmethod
        def moves(latents, labels):
            return torch.tensor([[True, True, False, False]]).expand(len(labels), 4)

        @staticmethod
        def ends(before, latents):
            return torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(latents), 4)

    world = rooms.load(folder)
    world.heads = Heads
    env = WorldPlayEnv(replace(task, world=world))
    env.reset(seed=0)
    _, reward, over, _, info = env.step(game.LABELS.index(9))
    assert (reward, over, info["end_frame"]) == (1.0, True, 2) and len(info["frames"]) == 3
    assert np.allclose(info["poses"][:, 2, 3], np.array([1, 2, 2, 2]) * game.MOVE)
    learned = rooms.load_net(folder).outcome
    wish = learned.wishes(np.array([[9, 9, 0, 11]]))
    assert wish.shape == (1, 4, 6) and np.allclose(wish[0, :2, 1], [0.25, 0.5], atol=1e-6)
    shown = torch.randn(3, *rooms.load_net(folder).cfg.codec.latent_chw)
    labels = torch.tensor([[9] * 4, [1] * 4, [18] * 4])
    both, one = learned.moves(shown, labels), learned.moves(shown[1:2], labels[1:2])
    assert torch.equal(both[1:2], one) and both.shape == (3, 4)


def test_revisit_figures(folder, tmp_path):
    rows = revisit.revisit(folder, tmp_path / "r.json", routes=2, steps=(4, 5))
    names = {(r.what, r.metric) for r in rows}
    assert {w for w, _ in names} == {f"{w}{x}" for w in ("memory", "no-memory", "plain-positions")
                                     for x in ("", "-5")}
    assert {m for _, m in names} == set(revisit.UNITS) and (tmp_path / "r.json").is_file()
    import imageio.v3 as imageio

    picture = imageio.imread(tmp_path / "r.png")  # two ways, two kinds, white between
    assert picture.shape == (2 * (4 * 40 + 4), 2 * 10 * 48, 3) and picture.std() > 5
    ways = revisit.find_routes(2, 4, (40, 48))
    assert [len(w.poses) for w in ways] == [17, 17]
    world = rooms.load(folder)
    for way in ways:  # a dream that is the real game brings everything back
        real = np.concatenate([way.frames, way.frames[-2::-1], way.picture[None]])
        figures = revisit.compare(world, way, real)
        assert figures["psnr_all"] == 60 and figures["ssim"] == pytest.approx(1)
        assert figures["r_dist"] == figures["t_dist"] == 0
        wrong = revisit.compare(world, way, np.concatenate([way.frames, way.frames]))
        assert wrong["psnr"] < 30 and wrong["r_dist"] + wrong["t_dist"] > 0
    a, b = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 255, np.uint8)
    assert revisit.psnr(a, b)[0] == pytest.approx(0) and revisit.ssim(a, b)[0] < 0.01


def test_memory_and_positions_change_what_is_dreamt(folder):
    way = revisit.find_routes(1, 6, (40, 48))
    made = {}
    for name, changes in (("memory", {}), ("none", {"memory": "none"}),
                          ("plain", {"positions": "plain"})):
        net = rooms.load_net(folder, **changes)
        g = torch.Generator().manual_seed(0)  # lively: 12 iterations leave the output near zero
        torch.nn.init.normal_(net.dynamics.dit.head.head.weight, std=0.3, generator=g)
        for block in net.dynamics.dit.blocks:
            torch.nn.init.normal_(block.self_attn.o_camera.weight, std=0.2, generator=g)
        world = net.world()
        world.heads = None
        made[name] = revisit.dream(world, way)
    assert (made["memory"][:, :12] == made["none"][:, :12]).all()
    assert (made["memory"] != made["none"]).any() and (made["memory"] != made["plain"]).any()


def test_refusals(data, tmp_path):
    with pytest.raises(ConfigError, match="impossible rooms"):
        FitRooms(FitRoomsConfig(data=str(data), out=str(tmp_path), **{**SMALL, "positions": "no"}))
    from worldgym.actions import ActionSpec

    Episodes.create(tmp_path / "d", ActionSpec.discrete(7), (40, 48), 8.0, {})
    with pytest.raises(DatasetError, match="no episodes"):
        FitRooms(FitRoomsConfig(data=str(tmp_path / "d"), out=str(tmp_path), **SMALL))
    with pytest.raises(DatasetError, match="without poses"):
        Clips(Episodes.open(tmp_path / "d"), rooms.RoomsConfig(
            name="x", labels=(0,), move=0.1, turn=0.1, K=tuple(range(1, 10))))
    with pytest.raises(ConfigError, match="do not fit"):
        rooms.RoomsNet(rooms.RoomsConfig(name="x", labels=(0,), move=0.1, turn=0.1,
                                         K=tuple(range(1, 10)), wan=nano.dit_config(8, 0)))
