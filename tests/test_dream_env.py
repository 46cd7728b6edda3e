"""``DreamEnv``: the Gymnasium face of one dream."""

import multiprocessing
import warnings

import gymnasium
import numpy as np
import pytest
import torch

from tests.fakes import LIVE, FakeBank, FakeWorld, fake_env, fake_task, nano_env, nano_task
from worldgym.envs.core import DreamCore
from worldgym.envs.make import make_dream
from worldgym.envs.opening import ViewConfig
from worldgym.envs.state import EnvState
from worldgym.envs.tasks import TASKS, Task, load_task
from worldgym.errors import ClosedError, ConfigError, NotFiniteError, ResetNeeded, ShapeError


@pytest.fixture
def registered():
    """A registered id over the fake world, with every render mode."""
    for name in ("FakeDream-v0", "FakeDream3-v0"):
        gymnasium.register(
            name, entry_point="tests.fakes:fake_env", vector_entry_point="tests.fakes:fake_vector",
            kwargs={"frames": 3} if "3" in name else {})
    yield "FakeDream-v0"
    for name in ("FakeDream-v0", "FakeDream3-v0"):
        del gymnasium.registry[name]


def shipped() -> bool:
    return (TASKS["worldgym/TakeCover-v0"]["folder"] / "world.safetensors").is_file()


@pytest.mark.parametrize("settings", [
    {}, {"frames": 3}, {"observation": "latent"},
    {"kind": "box", "frames": 2, "actions": "per_frame"}], ids=str)
def test_gymnasium_checker_with_all_render_modes(registered, settings):
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(registered, **settings)
        check_env(env.unwrapped)


@pytest.mark.skipif(not shipped(), reason="the shipped weights are not in this checkout")
@pytest.mark.parametrize("name", ["worldgym/TakeCover-v0", "worldgym:worldgym/TakeCover-v0"])
def test_take_cover_is_made_by_its_id(name):
    env = gymnasium.make(name, render_mode="rgb_array")
    obs, info = env.reset(seed=0)
    assert obs.shape == (32, 80, 3) and info["start"] >= 0
    obs, reward, *_ = env.step(1)
    assert env.observation_space.contains(obs) and reward > 0
    assert env.render().shape == (32, 80, 3)


@pytest.mark.skipif(not shipped(), reason="the shipped weights are not in this checkout")
def test_take_cover_passes_the_checker():
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("worldgym/TakeCover-v0").unwrapped, skip_render_check=True)


def test_metadata_states_the_contract():
    env = fake_env(frames=3, actions="per_frame", horizon=9, frame_stack=2)
    assert env.metadata["frames_per_chunk"] == 3 and env.metadata["frame_rate_hz"] == 10.0
    assert env.metadata["control_rate_hz"] == env.metadata["render_fps"] == pytest.approx(10 / 3)
    assert env.metadata["action_mapping"] == "per_frame" and env.metadata["horizon"] == 9
    assert env.action_space.shape == (3,)


def test_reset_returns_the_start_and_generates_nothing():
    env = fake_env(observation="latent")
    obs, info = env.reset(seed=0, options={"start": 4})
    assert info == {"start": 4} and obs[0, 0, 0] * 128 + 128 == 3 + 4
    assert env.task.world.decodes == 0


def test_latent_observations_never_decode():
    env = fake_env(observation="latent")
    env.reset(seed=0)
    for _ in range(5):
        assert "frames" not in env.step(1)[4]
    assert env.task.world.decodes == 0


def test_own_start_image_comes_back_and_is_played_from():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:20, :20, 0] = 6  # byte 0 of the toy world: the place
    env = fake_env(frame_stack=2)
    obs, info = env.reset(seed=0, options={"frame": image})
    assert info["start"] == -1
    assert (obs[..., :3] == image).all() and (obs[..., 3:] == image).all()
    image[...] = 255
    obs, *_ = env.step(0)
    assert 5 <= int(obs[0, 0, 3]) <= 7


def test_stack_shows_the_start_context_oldest_first():
    for observation, scale in (("frame", 1), ("latent", 128)):
        env = fake_env(observation=observation, frame_stack=3)
        obs, _ = env.reset(seed=0, options={"start": 0})
        marks = obs[20, 20, 2::3] if observation == "frame" else obs[2::3, 1, 1] * scale + 128
        # byte 11 marks the older context frame; the third back repeats the oldest there is
        assert marks.tolist() == [7, 7, 0]


def test_seeds_and_episodes():
    env, other = fake_env(), fake_env()
    a = [env.reset(seed=0)[1]["start"], env.reset()[1]["start"], env.reset()[1]["start"]]
    b = [other.reset(seed=0)[1]["start"], other.reset()[1]["start"], other.reset()[1]["start"]]
    assert a == b and len(set(a)) == 3
    assert env.reset(seed=0)[1]["start"] == a[0]


def test_unseeded_envs_differ():
    streams = set()
    for _ in range(4):
        env = fake_env(observation="latent", end="never")
        env.reset()
        streams.add(b"".join(env.step(1)[0].tobytes() for _ in range(12)))
    assert len(streams) > 1


def test_reward_counts_up_to_the_end_frame_and_frames_after_it_are_dropped():
    env = fake_env(frames=4, horizon=40)
    seen = 0
    for seed in range(20):
        env.reset(seed=seed, options={"start": 0})
        over = False
        while not over:
            obs, reward, terminated, truncated, info = env.step(2)
            over = terminated or truncated
            # the toy pays 1 + place / 8 a frame and the place is byte 0 of each frame
            paid = sum(1 + int(frame[0, 0, 0]) / 8 for frame in info["frames"])
            assert reward == pytest.approx(paid)
            assert len(info["frames"]) == (info["end_frame"] + 1 if terminated else 4)
            assert (obs == info["frames"][-1]).all()
        seen += terminated and info["end_frame"] < 3
    assert seen > 3


def test_callable_reward_and_end_per_frame_and_per_chunk():
    def place(chunk):
        return chunk.latents_BFChw[:, :, 0, 0, 0] * 128 + 128

    env = fake_env(frames=4, reward=place, end=lambda chunk: place(chunk) >= 9, horizon=30)
    env.reset(seed=1, options={"start": 0})
    for _ in range(30):
        obs, reward, terminated, truncated, info = env.step(1)
        assert reward == sum(int(f[0, 0, 0]) for f in info["frames"])
        if terminated:
            break
    assert terminated and int(obs[0, 0, 0]) >= 9
    assert all(int(f[0, 0, 0]) < 9 for f in info["frames"][:-1])
    whole = fake_env(frames=4, end=lambda chunk: np.ones(1, bool), reward=lambda c: np.ones(1))
    whole.reset(seed=0)
    _, reward, terminated, _, info = whole.step(0)
    assert reward == 1 and terminated and info["end_frame"] == 3


def test_failing_callable_leaves_the_env_as_it_was():
    bad = {"now": False}
    env = fake_env(reward=lambda chunk: np.full(1, np.nan if bad["now"] else 1.0))
    env.reset(seed=0)
    state = env.get_state()
    expected = [env.step(1)[0] for _ in range(3)]
    env.set_state(state)
    bad["now"] = True
    with pytest.raises(NotFiniteError):
        env.step(1)
    bad["now"] = False
    assert all((env.step(1)[0] == e).all() for e in expected)
    wrong = fake_env(end=lambda chunk: np.zeros((1, 9), bool))
    wrong.reset(seed=0)
    with pytest.raises(ShapeError, match="end of a chunk"):
        wrong.step(0)


@pytest.mark.parametrize("settings,reason,length", [
    ({"horizon": 7}, "horizon", 7),
    ({"max_episode_steps": 5}, "horizon", 5),
    ({"horizon": 9, "distrust": 0.0, "spread": lambda *a: np.full(1, 0.5)}, "distrust", 1),
])
def test_truncation_reasons(settings, reason, length):
    env = fake_env(end="never", **settings)
    env.reset(seed=0)
    for step in range(1, length + 1):
        _, _, terminated, truncated, info = env.step(0)
        assert not terminated and truncated == (step == length)
    assert info["truncation_reason"] == reason
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset()
    env.step(0)


def test_context_limit_truncates():
    env = make_dream(fake_task(max_steps=4, end="never", horizon=50))
    env.reset(seed=0)
    infos = [env.step(0)[4] for _ in range(4)]
    assert infos[-1]["truncation_reason"] == "context"


def test_termination_beats_truncation():
    env = fake_env(end=lambda chunk: np.ones(1, bool), horizon=1)
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step(0)
    assert terminated and not truncated and "truncation_reason" not in info


def test_penalty_is_taken_off_the_reward():
    plain, fearful = fake_env(), fake_env(penalty=2.0, spread=lambda *a: np.full(1, 0.25))
    plain.reset(seed=0)
    fearful.reset(seed=0)
    a, b = plain.step(1), fearful.step(1)
    assert b[1] == a[1] - 0.5 and b[4]["uncertainty"] == 0.25 and "uncertainty" not in a[4]


def test_hazard_times_end_chance_is_taken_off_the_reward():
    seen, told = [], []
    plain, careful = make_dream(nano_task(end="never")), make_dream(nano_task(
        end=lambda chunk: seen.append(chunk.end_probability_B[0]) or np.zeros(1, bool), hazard=3.0))
    for env in (plain, careful):
        env.reset(seed=0)
    loss = plain.step(1)[1] - careful.step(1)[1]
    assert 0 < seen[0] < 1 and np.isclose(loss, 3 * seen[0])
    plain, wary = make_dream(nano_task(ahead=4, end="never")), make_dream(nano_task(
        ahead=4, hazard=3.0,
        end=lambda chunk: told.append((chunk.danger_B[0], chunk.end_probability_B[0]))
        or np.zeros(1, bool)))
    for env in (plain, wary):
        env.reset(seed=0)
    loss = plain.step(1)[1] - wary.step(1)[1]
    assert told[0][0] != told[0][1] and np.isclose(loss, 3 * told[0][0])
    blind = fake_env(hazard=1.0)
    blind.reset(seed=0)
    with pytest.raises(ConfigError, match="end_probability_B"):
        blind.step(1)


def test_ends_by_danger_come_as_often_as_the_danger_says():
    from types import SimpleNamespace

    from worldgym.envs.outcome import end_chances, judge

    rng, n = np.random.default_rng(0), 20_000
    chunk = SimpleNamespace(slots=np.arange(n), reward_B=np.ones(n), terminated_B=np.zeros(n, bool),
                            end_probability_B=np.zeros(n), danger_B=np.full(n, 0.6),
                            draw_B=rng.random(n), ahead=8)
    task = fake_task(end="danger")
    _, ended, _ = judge(task, chunk, 1)
    share = 1 - 0.4 ** (1 / 8)
    assert abs(ended.mean() - share) < 0.01 and (1 - share) ** 8 == pytest.approx(0.4)
    assert end_chances(task, chunk, ended) == pytest.approx(np.full(n, share))
    env = make_dream(nano_task(ahead=4, end="danger"))
    env.reset(seed=0)
    assert isinstance(env.step(1)[2], bool)
    blind = fake_env(end="danger")
    blind.reset(seed=0)
    with pytest.raises(ConfigError, match="no ends by danger|danger"):
        blind.step(1)


def test_state_is_a_value_and_forks_are_independent():
    env = fake_env(horizon=8)
    env.reset(seed=2)
    env.step(1)
    state = env.get_state()
    forks = env.fork(3)
    streams = []
    for one in [env, *forks]:
        streams.append([one.step(a)[:4] for a in (0, 1, 2)])
        one.close()
    other = fake_env(horizon=8)
    other.set_state(state)
    streams.append([other.step(a)[:4] for a in (0, 1, 2)])
    for stream in streams[1:]:
        for a, b in zip(streams[0], stream, strict=True):
            assert (a[0] == b[0]).all() and a[1:] == b[1:]


def test_fresh_forks_dream_differently():
    env = fake_env(observation="latent", end="never")
    env.reset(seed=0)
    streams = [b"".join(f.step(0)[0].tobytes() for _ in range(10))
               for f in [env.fork(1)[0], *env.fork(4, fresh=True)]]
    assert len(set(streams)) == 5


def test_saved_state_and_np_random_come_back(tmp_path):
    env = fake_env()
    env.reset(seed=5)
    env.np_random.random(3)
    env.step(1)
    env.save_state(tmp_path / "state")
    expected = env.step(2)[0], env.np_random.random()
    fresh = fake_env()
    fresh.load_state(tmp_path / "state")
    assert (fresh.step(2)[0] == expected[0]).all() and fresh.np_random.random() == expected[1]
    never = fake_env()
    never.save_state(tmp_path / "empty")
    fresh.load_state(tmp_path / "empty")
    with pytest.raises(ResetNeeded):
        fresh.step(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "state"]


def test_nothing_leaks():
    before = LIVE["states"]
    env = fake_env(horizon=5)
    env.reset(seed=0)
    kept = env.get_state()
    for _ in range(30):
        if any(env.step(0)[2:4]):
            env.reset()
    for fork in env.fork(3):
        fork.close()
    env.close()
    assert LIVE["states"] == before + 1
    del kept
    assert LIVE["states"] == before


def test_render_modes():
    env = fake_env(render_mode="rgb_array", observation="latent")
    env.reset(seed=0)
    obs, *_ = env.step(1)
    frame = env.render()
    assert frame.shape == (40, 40, 3) and frame[0, 0, 0] == obs[0, 0, 0] * 128 + 128
    env = fake_env(render_mode="rgb_array_list", frames=3, horizon=50, observation="latent")
    env.reset(seed=0, options={"start": 9})
    env.step(1)
    assert env.metadata["render_fps"] == 10.0
    assert len(env.render()) == 4 and env.render() == []
    env.step(1)
    assert len(env.render()) == 3
    env.reset()
    assert len(env.render()) == 1


def test_human_window_opens_and_closes():
    pytest.importorskip("pygame")
    env = fake_env(render_mode="human")
    env.reset(seed=0)
    env.step(1)
    assert env.render() is None
    env.close()


def test_wrappers_of_gymnasium(registered, tmp_path):
    env = gymnasium.wrappers.FrameStackObservation(gymnasium.make(registered), 2)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    assert env.step(0)[0].shape == (2, 40, 40, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timed = gymnasium.make(registered, max_episode_steps=3)
    timed.reset(seed=0)
    assert [timed.step(1)[3] for _ in range(3)] == [False, False, True]


def test_closed_env():
    env = fake_env()
    env.reset(seed=0)
    env.close()
    env.close()
    for call in (lambda: env.step(0), env.reset, env.get_state, env.fork, env.render):
        with pytest.raises(ClosedError):
            call()


def test_nano_dreams_and_repeats_itself_after_a_file(tmp_path):
    env = nano_env(frame_stack=2)
    env.reset(seed=0)
    env.step(1)
    env.save_state(tmp_path / "state")
    expected = [env.step(a)[:2] for a in (0, 1, 2)]
    env.load_state(tmp_path / "state")
    again = [env.step(a)[:2] for a in (0, 1, 2)]
    assert all((a[0] == b[0]).all() and a[1] == b[1]
               for a, b in zip(expected, again, strict=True))
    pool = env.task.world.pool
    env.close()
    assert pool.stats()["pages_used"] == 0


def test_folder_of_a_world_makes_an_env(tmp_path):
    from worldgym.actions import ActionSpec
    from worldgym.data.starts import StartBank
    from worldgym.models import nano
    from worldgym.models.codec import CodecConfig

    cfg = nano.NanoConfig(
        name="saved", action=ActionSpec.discrete(2), wan=nano.dit_config(4, 2, 32, 2, 16), recent=2,
        codec=CodecConfig(frame_hw=(32, 32), channels=4, width=8, deep_width=16),
        outcome_frames=2, outcome_width=8)
    net = nano.fresh(cfg)
    nano.save(net, tmp_path, {"task": {"horizon": 3, "twin": "Real-v0"}})
    world = net.world()
    StartBank.from_frames(world.encode, np.zeros((2, 32, 32, 3), np.uint8),
                          np.zeros(2, np.int64)).save(tmp_path / "starts.safetensors")
    task = load_task(tmp_path)
    assert (task.horizon, task.twin) == (3, "Real-v0")
    assert load_task(tmp_path).world is task.world, "a world is shared within a process"
    env = make_dream(tmp_path, observation="latent", horizon=2, end="never")
    env.reset(seed=0)
    assert [env.step(1)[3] for _ in range(2)] == [False, True]


def test_core_is_the_same_for_any_face():
    core = DreamCore(Task(world=FakeWorld(), starts=FakeBank()), 2, ViewConfig())
    obs, index = core.reset(seeds=[1, 2])
    assert obs.shape == (2, 40, 40, 3) and index.shape == (2,)
    assert core.step([0, 1]).length_B.tolist() == [1, 1]
    assert isinstance(core.get_state(), EnvState) and torch.is_grad_enabled()


def _child(path, pipe):
    env = fake_env()
    env.load_state(path)
    pipe.send([env.step(1)[0].tobytes() for _ in range(3)])


def test_another_process_goes_on_from_a_file(tmp_path):
    env = fake_env()
    env.reset(seed=11)
    env.save_state(tmp_path / "state")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(str(tmp_path / "state"), theirs))
    child.start()
    assert ours.poll(120) and ours.recv() == [env.step(1)[0].tobytes() for _ in range(3)]
    child.join(20)


def test_a_hotter_dream_is_another_world(tmp_path):
    from tests.agent_toys import tiny_folder

    folder = tiny_folder(tmp_path / "world")
    worlds = [load_task(folder).world, load_task(folder, temperature=2.0).world]
    assert [w.temperature for w in worlds] == [1.0, 2.0]
    assert worlds[0].fingerprint != worlds[1].fingerprint  # neither takes the other's states
    frames = []
    for env in (make_dream(folder), make_dream(folder, temperature=2.0)):
        env.reset(seed=0)
        frames.append(env.step(1)[0])
    assert not np.array_equal(*frames)
    with pytest.raises(ConfigError, match="temperature of a task that is already loaded"):
        make_dream(load_task(folder), temperature=2.0)
    with pytest.raises(ConfigError, match="impossible temperature"):
        load_task(folder, temperature=-1.0)
