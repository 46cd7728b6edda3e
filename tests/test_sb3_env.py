"""``DreamVecEnv``: what Stable-Baselines3 needs, and what it costs."""

import time

import gymnasium
import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from stable_baselines3 import A2C, DQN, PPO  # noqa: E402
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecTransposeImage  # noqa: E402

from tests.fakes import fake_task, fake_vector  # noqa: E402
from worldgym.envs.make import make_dream_vec  # noqa: E402
from worldgym.errors import ActionError, ClosedError, ConfigError, ResetNeeded  # noqa: E402

SMALL = {"features_extractor_kwargs": {"features_dim": 16}}


def vec(n=3, kind="discrete", frames=1, **settings):
    return make_dream_vec(fake_task(kind, frames), n, **settings)


def test_same_stream_as_the_vector_env():
    env, twin = vec(horizon=5), fake_vector(3, horizon=5, autoreset_mode="SameStep")
    env.seed(4)
    assert (env.reset() == twin.reset(seed=4)[0]).all()
    for _ in range(15):
        obs, reward, done, infos = env.step(np.array([0, 1, 2]))
        theirs = twin.step([0, 1, 2])
        assert (obs == theirs[0]).all() and reward.dtype == np.float32
        assert np.allclose(reward, theirs[1]) and (done == (theirs[2] | theirs[3])).all()
        for i in np.flatnonzero(done):
            assert (infos[i]["terminal_observation"] == theirs[4]["final_obs"][i]).all()
            assert infos[i]["TimeLimit.truncated"] is bool(theirs[3][i])


def test_infos_of_finished_and_running_slots():
    env = vec(2, horizon=3, end="never", frames=2)
    env.seed(0)
    env.reset()
    assert [set(i) for i in env.reset_infos] == [{"start"}] * 2
    total = np.zeros(2)
    for _ in range(3):
        obs, reward, done, infos = env.step(np.zeros(2, int))
        total += reward
        assert done.any() or infos == [{}, {}]
    assert infos[0]["truncation_reason"] == "horizon" and infos[0]["TimeLimit.truncated"] is True
    assert infos[0]["episode"] == {"r": pytest.approx(total[0]), "l": 3, "t": pytest.approx(0.6)}
    ended = vec(1, end=lambda chunk: np.ones(1, bool))
    ended.reset()
    info = ended.step(np.zeros(1, int))[3][0]
    assert info["TimeLimit.truncated"] is False and info["end_frame"] == 0


def test_seed_zero_options_and_no_global_generator():
    env = vec(2)
    np.random.seed(0)
    before = np.random.get_state()[1].tobytes()
    env.seed()
    env.seed(0)
    first = env.reset()
    env.seed(0)
    assert (first == env.reset()).all()
    assert before == np.random.get_state()[1].tobytes()
    env.set_options([{"start": 1}, {"start": 2}])
    env.reset()
    assert [i["start"] for i in env.reset_infos] == [1, 2]
    env.set_options({"nonsense": 1})
    with pytest.raises(ConfigError):
        env.reset()


def test_state_forks_and_slots():
    env = vec(2, end="never")
    env.seed(1)
    env.reset()
    state = env.get_state()
    fork, = env.fork(1)
    a = [env.step(np.array([0, 2]))[0] for _ in range(4)]
    env.set_state(state)
    b = [env.step(np.array([0, 2]))[0] for _ in range(4)]
    c = [fork.step(np.array([0, 2]))[0] for _ in range(4)]
    assert all((x == y).all() and (x == z).all() for x, y, z in zip(a, b, c, strict=True))
    assert [s.num_slots for s in env.env_method("get_state")] == [1, 1]


def test_refusals_and_closing():
    env = vec(2)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(2, int))
    env.reset()
    with pytest.raises(ActionError):
        env.step_wait()
    with pytest.raises(ActionError):
        env.step(np.array([0, 7]))
    env.step(np.zeros(2, int))
    with pytest.raises(ConfigError):
        vec(1, render_mode="rgb_array_list")
    with pytest.raises(ConfigError):
        env.set_attr("x", 1, indices=[0])
    env.close()
    env.close()
    with pytest.raises(ClosedError):
        env.step(np.zeros(2, int))
    with pytest.raises(ClosedError):
        env.reset()


def test_attributes_the_sb3_way():
    env = vec(3, render_mode="rgb_array")
    env.reset()
    assert env.get_attr("render_mode") == ["rgb_array"] * 3 and not env.has_attr("action_masks")
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 3
    env.set_attr("note", 5)
    assert env.get_attr("note", indices=0) == [5]
    assert env.render().shape == (80, 80, 3) and len(env.env_method("render", indices=[1])) == 1
    with pytest.raises(AttributeError):
        env.env_method("fly")


def test_human_window():
    pytest.importorskip("pygame")
    env = vec(2, render_mode="human")
    env.reset()
    env.step(np.zeros(2, int))
    assert env.render() is None
    env.close()


def learn(algorithm, policy, env, **settings):
    model = algorithm(policy, env, seed=0, **settings)
    model.learn(64)
    return model


@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary", "box"])
def test_ppo_on_every_action_kind(kind):
    env = VecMonitor(vec(2, kind, horizon=6, observation="latent", frame_stack=2))
    model = learn(PPO, "MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1)
    assert len(model.ep_info_buffer) > 0


def test_cnn_and_wrappers():
    learn(PPO, "CnnPolicy", vec(2, horizon=6), n_steps=16, batch_size=16, n_epochs=1,
          policy_kwargs=SMALL)
    learn(A2C, "CnnPolicy", VecTransposeImage(VecFrameStack(vec(2, horizon=6), 2)), n_steps=8,
          policy_kwargs=SMALL)
    learn(DQN, "MlpPolicy", vec(1, observation="latent"), buffer_size=50, learning_starts=10)


def test_training_twice_is_the_same():
    weights = []
    for _ in range(2):
        env = vec(2, observation="latent", horizon=6)
        model = learn(PPO, "MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1)
        weights.append(np.concatenate([p.detach().numpy().ravel()
                                       for p in model.policy.parameters()]))
    assert (weights[0] == weights[1]).all()


def test_wrapper_is_cheap():
    """64 slots of the wrapper alone take a small part of what a world's step takes."""
    env = vec(64, observation="latent", horizon=10**6, end="never", reward=lambda c: np.ones(64))
    env.reset()
    world = env.task.world
    frozen = world.step(env.core._state.world, np.zeros(64, int))
    world.step = lambda *args, **kwargs: frozen
    actions = np.zeros(64, int)
    env.step(actions)
    start = time.process_time()
    for _ in range(100):
        env.step(actions)
    # a step of 64 slots of the shipped world takes some 40 ms of CPU; 5 % of it are 2 ms
    assert (time.process_time() - start) / 100 < 2e-3
