"""``DreamVectorEnv``: three autoreset modes, masks, batch invariance, Gymnasium's wrappers."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from tests.fakes import fake_env, fake_task, fake_vector, nano_vector
from worldgym.envs.make import make_dream_vector
from worldgym.errors import ClosedError, ResetNeeded

MODES = ["NextStep", "SameStep", "Disabled"]


def single_stream(seed, actions, **settings):
    """Steps of one ``DreamEnv``, reset after each end; [(obs, reward, terminated, truncated)]."""
    env = fake_env(**settings)
    out, starts = [], [env.reset(seed=seed)[0]]
    for action in actions:
        result = env.step(action)
        out.append(result[:4])
        if result[2] or result[3]:
            starts.append(env.reset()[0])
    return out, starts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("observation", ["frame", "latent"])
def test_slots_equal_single_envs(mode, observation):
    settings = {"horizon": 6, "observation": observation, "frames": 2}
    env = fake_vector(3, autoreset_mode=mode, **settings)
    obs, _ = env.reset(seed=[3, 9, 27])
    given = [[] for _ in range(3)]  # the actions that each slot really took
    seen, first = [[] for _ in range(3)], [[obs[i]] for i in range(3)]
    rng, due = np.random.default_rng(0), np.zeros(3, bool)
    for _ in range(20):
        actions = rng.integers(0, 3, 3)
        obs, reward, terminated, truncated, infos = env.step(actions)
        done = terminated | truncated
        for i in range(3):
            if mode == "NextStep" and due[i]:
                first[i].append(obs[i])
                assert reward[i] == 0 and not done[i]
                continue
            given[i].append(int(actions[i]))
            last = infos["final_obs"][i] if mode == "SameStep" and done[i] else obs[i]
            seen[i].append((last, reward[i], terminated[i], truncated[i]))
            if mode == "SameStep" and done[i]:
                first[i].append(obs[i])
        if mode == "Disabled" and done.any():
            obs, _ = env.reset(options={"reset_mask": done})
            for i in np.flatnonzero(done):
                first[i].append(obs[i])
        due = done if mode == "NextStep" else np.zeros(3, bool)
    for i, seed in enumerate((3, 9, 27)):
        steps, starts = single_stream(seed, given[i], **settings)
        assert len(first[i]) > 2
        for ours, theirs in zip(seen[i], steps, strict=True):
            assert ours[0].tobytes() == theirs[0].tobytes() and ours[1:] == theirs[1:]
        for ours, theirs in zip(first[i], starts, strict=False):
            assert ours.tobytes() == theirs.tobytes()


def test_int_seed_counts_up_and_zero_is_a_seed():
    a, b = fake_vector(3), fake_vector(3)
    assert (a.reset(seed=0)[0] == b.reset(seed=[0, 1, 2])[0]).all()
    assert (a.reset(seed=np.int64(4))[1]["start"] == b.reset(seed=[4, 5, 6])[1]["start"]).all()


def test_reset_mask_touches_only_its_slots():
    env, twin = fake_vector(3, horizon=20), fake_vector(3, horizon=20)
    for one in (env, twin):
        one.reset(seed=0)
        one.step([1, 1, 1])
    options = {"reset_mask": np.array([False, True, False]), "start": [0, 7, 0]}
    obs, infos = env.reset(options=options)
    assert "reset_mask" in options, "the caller's dict is left alone"
    assert infos["start"].tolist() == [0, 7, 0] and infos["_start"].tolist() == [False, True, False]
    assert int(obs[1, 0, 0, 0]) == 10
    for _ in range(5):
        ours, theirs = env.step([0, 2, 1]), twin.step([0, 2, 1])
        for x, y in zip(ours[:4], theirs[:4], strict=True):
            assert (x[[0, 2]] == y[[0, 2]]).all()


def test_own_images_per_slot_and_for_all():
    env = fake_vector(2)
    images = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((2, 40, 40, 3), np.uint8)
    assert (env.reset(seed=0, options={"frames": images})[0] == images).all()
    obs, infos = env.reset(options={"frame": images[1]})
    assert (obs == images[1]).all() and infos["start"].tolist() == [-1, -1]


def test_infos_have_masks_and_ragged_frames():
    env = fake_vector(4, frames=3, horizon=30)
    env.reset(seed=0, options={"start": 0})
    ragged = False
    for _ in range(30):
        _, _, terminated, truncated, infos = env.step([2, 2, 2, 1])
        for slot in range(4):
            if terminated[slot]:
                assert infos["_end_frame"][slot]
                assert len(infos["frames"][slot]) == infos["end_frame"][slot] + 1
        ragged |= infos["frames"].dtype == object
    assert ragged


def test_same_step_final_info():
    env = fake_vector(2, horizon=3, end="never", autoreset_mode=AutoresetMode.SAME_STEP)
    env.reset(seed=0)
    env.step([0, 0])
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step([0, 0])
    *_, truncated, infos = env.step([0, 0])
    assert truncated.tolist() == [True, False]
    final = infos["final_info"]
    assert final["truncation_reason"].tolist() == ["horizon", None]
    assert infos["_final_info"].tolist() == [True, False] and infos["final_obs"][1] is None
    assert "truncation_reason" not in infos


def test_disabled_refuses_finished_slots_and_stays_usable():
    env = fake_vector(2, horizon=2, end="never", autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step([0, 0])
    env.step([0, 0])
    with pytest.raises(ResetNeeded, match=r"slots \[0, 1\]"):
        env.step([0, 0])
    env.reset(options={"reset_mask": np.array([True, True])})
    env.step([0, 0])


@pytest.mark.parametrize("mode", MODES)
def test_state_and_forks_with_waiting_slots(mode):
    env = fake_vector(3, horizon=3, autoreset_mode=mode)
    env.reset(seed=0)
    for _ in range(3 if mode != "Disabled" else 2):
        env.step([1, 0, 2])
    fork, = env.fork(1)
    state = env.get_state()

    def roll(one):
        out = []
        for action in (0, 1):
            try:
                out.append(one.step([action] * 3)[:4])
            except ResetNeeded:
                break
        return [x.tobytes() for step in out for x in step]

    first = roll(env)
    env.set_state(state)
    assert roll(env) == first == roll(fork)


def test_one_slot_of_a_state_continues_in_a_single_env():
    env, single = fake_vector(3, end="never"), fake_env(end="never")
    env.reset(seed=0)
    env.step([0, 1, 2])
    single.set_state(env.get_state().select([1]))
    assert (single.step(2)[0] == env.step([2, 2, 2])[0][1]).all()


def test_fresh_forks_of_a_batch_differ_per_slot():
    env = fake_vector(2, observation="latent", end="never")
    env.reset(seed=0)
    a, b = env.fork(2, fresh=True)
    rows = [[one.step([0, 0])[0] for _ in range(8)] for one in (a, b)]
    for slot in range(2):
        assert any((x[slot] != y[slot]).any() for x, y in zip(*rows, strict=True))


def test_make_vec_and_gymnasium_wrappers():
    gymnasium.register("FakeVec-v0", entry_point="tests.fakes:fake_env",
                       vector_entry_point="tests.fakes:fake_vector", max_episode_steps=4)
    try:
        env = gymnasium.make_vec("FakeVec-v0", num_envs=5, end="never", autoreset_mode="SameStep")
        assert env.num_envs == 5 and env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
        env.reset(seed=0)
        infos = [env.step(env.action_space.sample())[4] for _ in range(4)]
        assert "final_obs" in infos[-1]
        sync = gymnasium.make_vec("FakeVec-v0", num_envs=2, vectorization_mode="sync")
        native = gymnasium.make_vec("FakeVec-v0", num_envs=2)
        assert (sync.reset(seed=3)[0] == native.reset(seed=3)[0]).all()
        for _ in range(12):
            for x, y in zip(sync.step([1, 0])[:4], native.step([1, 0])[:4], strict=True):
                assert (x == y).all()
    finally:
        del gymnasium.registry["FakeVec-v0"]


def test_render_is_a_tuple():
    env = fake_vector(3, render_mode="rgb_array")
    env.reset(seed=0)
    assert [f.shape for f in env.render()] == [(40, 40, 3)] * 3
    env = fake_vector(2, render_mode="rgb_array_list", frames=2, observation="latent", horizon=2,
                      end="never")
    env.reset(seed=0)
    env.step([0, 0])
    assert [len(x) for x in env.render()] == [3, 3]
    env.step([0, 0])
    env.step([0, 0])
    assert [len(x) for x in env.render()] == [1, 1], "only the start frames of the new episodes"


def test_closing():
    env = fake_vector(2)
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(ClosedError):
        env.step([0, 0])


def test_uncertainty_of_some_slots():
    env = fake_vector(2, horizon=4, penalty=1.0, end="never")
    env.reset(seed=0)
    for _ in range(6):
        *_, infos = env.step([0, 1])
    assert infos["uncertainty"].shape == (2,) and infos["_uncertainty"].all()
    distrustful = make_dream_vector(fake_task(
        end="never", distrust=0.5, spread=lambda w, s, a, n: np.array([0.1, 0.9])), 2)
    distrustful.reset(seed=0)
    *_, truncated, infos = distrustful.step([0, 0])
    assert truncated.tolist() == [False, True]
    assert infos["truncation_reason"].tolist() == [None, "distrust"]


def test_nano_batch_invariance():
    env = nano_vector(3, observation="latent", horizon=4)
    env.reset(seed=[1, 2, 3])
    alone = nano_vector(1, observation="latent", horizon=4)
    alone.reset(seed=[2])
    for _ in range(7):
        a, b = env.step([0, 1, 2]), alone.step([1])
        np.testing.assert_allclose(a[0][1], b[0][0], atol=1e-5)
        assert a[1][1] == pytest.approx(b[1][0], abs=1e-5)
        assert a[2][1] == b[2][0] and a[3][1] == b[3][0]
