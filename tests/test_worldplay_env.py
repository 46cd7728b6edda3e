"""``worldgym/WorldPlay-v0``: first steps, prompts, continued videos, exact states, refusals."""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

import golden_worldplay  # noqa: E402
import worldplay_tools as tools  # noqa: E402
from golden import Fixture  # noqa: E402

from worldgym import camera, trajectory  # noqa: E402
from worldgym.envs.events import Events  # noqa: E402
from worldgym.envs.worldplay import WorldPlayVectorEnv  # noqa: E402
from worldgym.errors import ConfigError, DTypeError, ShapeError, WorldGymError  # noqa: E402
from worldgym.models.controls import Controls  # noqa: E402
from worldgym.reconstituted import Reconstituted, Scoring  # noqa: E402
from worldgym.schedule import Euler  # noqa: E402
from worldgym.testing import check_dream_env  # noqa: E402

GOLDEN = next((p / "shared" / "golden" / "worldplay" for p in Path(__file__).resolve().parents
               if (p / "shared" / "golden").is_dir()), Path("absent"))
RIGHT, AHEAD = np.array([0, 1]), np.array([1, 0])


@pytest.fixture(scope="module")
def world():
    return tools.tiny_world()


def play(env, actions):
    return [env.step(a) for a in actions]


def same(one, two):
    return all((a[0] == b[0]).all() and a[1:4] == b[1:4]
               and (a[4]["retrieved"] == b[4]["retrieved"]).all()
               and (a[4]["poses"] == b[4]["poses"]).all() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("settings", [{"render_mode": "rgb_array"}, {
    "observation": "latent", "controls": Controls(kind="deltas"), "picture": False}, {
    "controls": Controls(kind="poses"), "actions": "per_frame"}], ids=str)
def test_conformance(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_dream_env(partial(tools.tiny_env, **settings), steps=4, other_process=False)
    for rule in ("types", "truncation", "seeds", "global-rng", "state", "fork", "refusal",
                 "gymnasium", "closed"):
        assert rule in report.passed, report


def test_poses_and_retrieved_frames_are_told(world):
    env = tools.tiny_env(world=world, horizon=None)
    env.reset(seed=0)
    told = [i for *_, i in play(env, [RIGHT] * 2 + [AHEAD] * 4)]
    want = camera.walk(camera.motions_of(np.array([1] * 7 + [9] * 16)))
    assert np.allclose(np.concatenate([t["poses"] for t in told]), want, atol=1e-12)
    assert np.allclose(env.poses[0], want[-1])
    assert told[0]["retrieved"].tolist() == [-1] * 16
    assert told[2]["retrieved"].tolist() == [*range(8), *[-1] * 8]
    assert told[5]["retrieved"][4:].tolist() == list(range(8, 20))
    still = tools.tiny_env(opening="still")
    still.reset(seed=0)
    info = still.step(AHEAD)[4]
    assert np.allclose(info["poses"][:, 2, 3], 0.08 * np.arange(1, 5))
    assert info["retrieved"][:4].tolist() == [0, 1, 2, 3]


def test_states_forks_and_files_repeat_every_bit_with_the_memory_inside(world, tmp_path):
    env = tools.tiny_env(world=world, horizon=None)
    env.reset(seed=3)
    play(env, [RIGHT] * 4)
    env.set_prompt("a town at night")
    state, fork = env.get_state(), env.fork(1)[0]
    env.save_state(tmp_path / "state")
    want = play(env, [RIGHT, AHEAD])
    assert same(play(fork, [RIGHT, AHEAD]), want)
    env.set_state(state)
    assert same(play(env, [RIGHT, AHEAD]), want)
    other = tools.tiny_env(world=world, horizon=None)
    other.load_state(tmp_path / "state")
    assert other.prompt == "a town at night" and len(other.poses) == 1
    assert same(play(other, [RIGHT, AHEAD]), want)
    changed = env.fork(1)[0]
    env.set_state(state)
    changed.set_state(state)
    changed.set_prompt("a desert")
    assert not same(play(changed, [RIGHT]), want[:1])
    assert same(play(env, [RIGHT]), want[:1])


def test_slots_of_a_vector_env_are_single_envs(world):
    many = tools.tiny_env(partial(WorldPlayVectorEnv, num_envs=2), world=world, horizon=None)
    many.reset(seed=5, options={"prompt": ["a meadow", "a desert"], "start": [0, 1]})
    one = tools.tiny_env(world=world, horizon=None)
    one.reset(seed=6, options={"prompt": "a desert", "start": 1})
    for action in ([RIGHT] * 2, [AHEAD] * 2):
        obs, *_, info = many.step(np.stack(action))
        alone, *_, own = one.step(action[1])
        assert (obs[1] == alone).all() and (info["poses"][1] == own["poses"]).all()
    many.set_prompt(["a meadow", "rain"])
    one.set_prompt("rain")
    assert many.prompts == ["a meadow", "rain"]
    assert (many.step(np.stack([RIGHT] * 2))[0][1] == one.step(RIGHT)[0]).all()


def test_events_come_at_random_and_repeat_with_the_state(world):
    env = Events(tools.tiny_env(world=world, horizon=None), {"weather": ["Rain.", "Snow."],
                 "things": ["A dog."]}, chance=0.3, lasts=2)
    plain = tools.tiny_env(world=world, horizon=None)

    def go(seed, count=6):
        env.reset(seed=seed)
        return play(env, [RIGHT] * count)

    first = go(1)
    told = [i["events"] for *_, i in first]
    assert any(told) and not all(told) and env.unwrapped.prompt in ("a meadow", "a town")
    assert same(go(1), first) and [i["events"] for *_, i in go(2)] != told
    go(1, 2)
    state = env.get_state()
    fork = env.fork(1)[0]
    play(env, [AHEAD])
    env.set_state(state)
    assert same(play(env, [RIGHT] * 4), first[2:]) and same(play(fork, [RIGHT] * 4), first[2:])
    plain.reset(seed=1)
    at = next(i for i, t in enumerate(told) if t)
    assert same(play(plain, [RIGHT] * at), first[:at])
    assert not same(play(plain, [RIGHT]), first[at:at + 1])
    with pytest.raises(ConfigError, match="no events"):
        Events(plain, {})
    with pytest.raises(DTypeError, match="no prompt"):
        import gymnasium

        Events(gymnasium.make("CartPole-v1"))


def test_a_video_goes_on(world):
    """Given frames go into memory with their poses; the first step is like any later one."""
    env = tools.tiny_env(world=world, horizon=None)
    frames = np.random.default_rng(1).integers(0, 256, (8, 48, 48, 3), np.uint8)
    poses = camera.walk(camera.motions_of(np.full(7, 9)))
    obs, info = env.reset(seed=0, options={"frames": frames, "poses": poses})
    assert (obs == frames[-1]).all() and info["start"] == -1
    info = env.step(AHEAD)[4]
    assert "first_frame" not in info and info["retrieved"][:8].tolist() == list(range(8))
    assert np.allclose(info["poses"][:, 2, 3], 0.08 * np.arange(8, 12))
    before = env.get_state()
    for bad, error in ((dict(frames=frames[:5]), ShapeError), (dict(poses=poses), ConfigError),
                       (dict(frames=frames, poses=poses[:3]), ShapeError),
                       (dict(frames=frames, poses=[[1, 2], [3]]), ShapeError),
                       (dict(frames=frames[:1], poses=poses[1:2]), ConfigError),
                       (dict(frames=frames[..., :2]), ShapeError),
                       (dict(frames=frames.astype(float)), DTypeError),
                       (dict(frames=frames, start=0), ConfigError)):
        with pytest.raises(error):
            env.reset(seed=0, options=bad)
        assert env.get_state().core.elapsed_B == before.core.elapsed_B
    with pytest.raises(WorldGymError):
        env.set_prompt(3)
    with pytest.raises(ConfigError, match="reads no text"):
        w = tools.tiny_world(text=False)
        w.tell(w.begin(w.starts([None]), [0]), [0], [None], ["rain"])


def test_keys_and_deltas_say_the_same():
    keys = tools.tiny_env(actions="per_frame")
    deltas = tools.tiny_env(controls=Controls(kind="deltas"), actions="per_frame")
    assert keys.action_space.shape == (4, 2) and deltas.action_space.shape == (4, 4)
    rows = np.array([[0, 0], [1, 1], [5, 2], [0, 3]])
    labels = camera.label(rows[:, 0], rows[:, 1])
    motion = camera.motions_of(labels)[:, :4].astype(np.float32)
    shown = []
    for env, action in ((keys, rows), (deltas, motion)):
        env.reset(seed=0)
        shown.append(env.step(action))
    assert np.allclose(shown[0][4]["poses"], shown[1][4]["poses"], atol=1e-7)
    assert np.abs(shown[0][0].astype(int) - shown[1][0]).max() <= 1


def test_a_whole_sequence_of_poses_is_gone(world):
    """From a file: as few steps as it has whole chunks, wherever the camera stands."""
    rng = np.random.default_rng(3)
    start = camera.walk(camera.motions([{"roll": 1.0, "down": 3.0}]))[1]
    c2w = camera.walk(camera.motions(rng.uniform(-0.2, 0.2, (11, 6))), start)
    path = trajectory.from_json(trajectory.to_json(trajectory.Trajectory.of(c2w)), recentre=True)
    env = tools.tiny_env(controls=Controls(kind="poses"), actions="per_frame", horizon=None)
    env.reset(seed=0)
    actions = env.along(path)
    assert actions.shape == (3, 4, 6)
    told = np.concatenate([i["poses"] for *_, i in play(env, actions)])
    assert np.allclose(told, path.c2w_N44, atol=1e-6)
    labels = env.core.ready().world.extra["past"][0].history.of("label")
    assert labels.tolist() == path.labels().tolist()
    with pytest.raises(ShapeError, match="12 poses.*4 per step, and one more.*give 13"):
        env.along(path)  # no longer at the beginning: the first pose is where the camera is
    on = trajectory.Trajectory.of(env.poses[0] @ path.c2w_N44[:9])
    assert np.allclose(play(env, env.along(on))[-1][4]["poses"][-1], on.c2w_N44[-1], atol=1e-5)
    env.reset(seed=0)
    with pytest.raises(ShapeError, match="11 poses.*give 12"):
        env.along(path.cut(11))
    held = tools.tiny_env(world=world)
    held.reset(seed=0)
    with pytest.raises(ConfigError, match="per frame"):
        held.along(path)
    keys = tools.tiny_env(world=world, actions="per_frame", horizon=None)
    keys.reset(seed=0)
    said = trajectory.from_string("w-4,right-3")
    told = np.concatenate([i["poses"] for *_, i in play(keys, keys.along(said))])
    assert np.allclose(told, said.c2w_N44, atol=1e-12)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no fixtures here")
@pytest.mark.parametrize("stem", ["rollout_text_prompt_switch", "rollout_image"])
def test_published_rollouts_step_by_step(stem):
    """The world's own steps make the published latents, a prompt switch included."""
    fixture = Fixture(GOLDEN, stem, json.loads((GOLDEN / f"{stem}.json").read_text()),
                      load_file(GOLDEN / f"{stem}.safetensors"))
    dit = golden_worldplay.network(fixture, fixture["in.text"].shape[1])
    c, h, w = fixture["in.noise_latents"].shape[1], *fixture.get("latent_hw")

    class Video:
        pictures, frame_hw, latent_chw, device = 4, (16 * h, 16 * w), (c, h, w), torch.device("cpu")

    first = fixture.tensors.get("in.first_image_condition")
    world = tools.WorldPlayWorld(
        dit, Video(), memory=Reconstituted(points_M3=fixture["in.points"].numpy()),
        sampler=Euler.at(fixture.get("timesteps")), controls=Controls(kind="deltas", move=1.0,
                                                                      turn=0.5))
    world.K = fixture["in.Ks"][0].numpy()
    world.noise = lambda keys, number: fixture["in.noise_latents"][
        :, :, 4 * int(keys[0, 2]):4 * int(keys[0, 2]) + 4]
    clip = None if first is None else first[0].transpose(0, 1)
    state = world.begin(world.starts([clip], [fixture["in.text"][0]], ["one"]), [0])
    rows = camera.motions(fixture.get("motions"))[:, :4].astype(np.float32)
    rows = np.concatenate([np.zeros((1, 4), np.float32), rows])  # of latent 0, not heard
    for i in range(int(fixture.get("n_chunks"))):
        if i == fixture.get("prompt_switch_chunk"):
            state = world.tell(state, [0], [fixture["in.text_after_switch"][0]], ["two"])
        state, chunk = world.step(state, rows[4 * i:4 * i + 4].repeat(4, 0)[None], per_frame=True)
        want = fixture[f"out.chunk{i}.latents"].transpose(1, 2)
        assert float((chunk.latents_BFChw - want).abs().max()) < 1e-4
        seen = chunk.notes["retrieved"][0]
        assert seen[seen >= 0].tolist() == (fixture.get("selected")[i] or [])


def test_the_published_folder_as_an_environment(tmp_path):
    for package in ("diffusers", "transformers", "sentencepiece", "ftfy", "PIL"):
        pytest.importorskip(package)
    import gymnasium

    import worldgym  # noqa: F401

    root = tools.write_folder(tmp_path / "model")
    small = dict(model=root, height=32, width=64, prompt="a soldier")
    env = gymnasium.make("worldgym/WorldPlay-v0", **small).unwrapped
    assert env.action_space == gymnasium.spaces.MultiDiscrete([9, 9])
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    assert not env.reset(seed=1)[0].any()  # nothing is given: black, until the first step
    text = env.step(RIGHT)
    assert text[4]["frames"].shape == (13, 32, 64, 3) and text[4]["first_frame"] == 3
    obs, info = env.reset(seed=1, options={"image": picture, "prompt": "rain"})
    assert obs.shape == (32, 64, 3) and env.prompt == "rain"
    first, second = play(env, [RIGHT, AHEAD])
    assert [len(s[4]["frames"]) for s in (first, second)] == [13, 16]
    assert (first[4]["frames"][-1] == first[0]).all()
    world, past = env.core.task.world, env.core.ready().world.extra["past"][0]
    whole, _ = world.video.decode(past.history.latents())  # a film in pieces is the whole film
    parts = np.concatenate([s[4]["frames"] for s in (first, second)])
    assert (whole.numpy() == parts).all()
    env.save_state(tmp_path / "state")  # with what the decoder remembers
    want = env.step(RIGHT)
    other = gymnasium.make("worldgym/WorldPlay-v0", observation="latent", **small).unwrapped
    env.load_state(tmp_path / "state")
    assert same([env.step(RIGHT)], [want])
    other.reset(seed=1, options={"image": picture, "prompt": "rain"})
    play(other, [RIGHT, AHEAD, RIGHT])  # nobody looked until now
    assert (other.core.current_frames()[0] == want[0]).all()
    obs, _ = env.reset(seed=1, options={"frames": parts[:13]})
    assert (obs == parts[12]).all() and len(env.step(AHEAD)[4]["frames"]) == 16
    with pytest.raises(ShapeError, match="broken chunks.*newest 13"):
        env.reset(options={"frames": parts[:17]})
    mine = Reconstituted(scoring=Scoring(points=500, fov=None, distance_weight=0.5))
    own = gymnasium.make("worldgym/WorldPlay-v0", memory=mine, positions="plain", **small).unwrapped
    own.reset(seed=1)
    *_, info = play(own, [RIGHT] * 6)[-1]
    assert own.core.task.world.memory is mine and (info["retrieved"] >= 0).all()
    for network in ("ar_model", "text encoder"):
        with pytest.raises(ConfigError, match="Wan variant"):
            gymnasium.make("worldgym/WorldPlay-v0", network=network, **small)
    with pytest.raises(ConfigError, match="no WorldPlay folder"):
        gymnasium.make("worldgym/WorldPlay-v0", model=tmp_path)


def test_a_long_episode_is_measured(tmp_path, monkeypatch):

    from worldgym.agents import bench_worldplay as bench

    monkeypatch.setattr(bench, "LATE", 30)
    monkeypatch.setattr(bench, "STORED", 200)
    rows = bench.bench(tmp_path / "b.json", rounds=4)
    assert [r.metric for r in rows] == ["chunk500_over_chunk10", "retrieval_ms_2000"]
    assert all(r.value > 0 and r.what == "tiny" and r.n == 4 for r in rows)
    assert json.loads((tmp_path / "b.json").read_text())["rows"]
    world = bench.tiny()
    state = bench.start(world, 20)
    seen = state.extra["past"][0].history
    assert len(seen) == 80 and np.abs(bench.walk(400)[:, :3, 3]).max() < 20
