"""Scoring: the same policy in the real game and in the dream, whatever runs beside it."""

import numpy as np
import pytest

from tests.agent_toys import Corridor, tiny_task
from worldgym.actions import ActionSpec
from worldgym.agents.compare import text_table
from worldgym.agents.encode import FrameStack, LatentObservation
from worldgym.agents.score import Played, better, optimism, play_dream, play_real, seed_text
from worldgym.agents.scripted import parse_policy
from worldgym.errors import ConfigError, DTypeError, ShapeError


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def policy(name="random"):
    return parse_policy(name, ActionSpec.discrete(3))





def test_an_episode_does_not_depend_on_how_many_games_run():
    one = play_real(Corridor, policy(), episodes=6, seed=5, games=1)
    many = play_real(Corridor, policy(), episodes=6, seed=5, games=4)
    np.testing.assert_array_equal(one.returns, many.returns)
    assert one.seeds == (5, 6, 7, 8, 9, 10) and (one.returns == one.lengths).all()


def test_noop_lives_until_the_limit():
    played = play_real(Corridor, policy("noop"), episodes=2, games=2)
    assert played.lengths.tolist() == [40, 40]


def test_dream_episodes_end_and_repeat(task):
    first = play_dream(task, policy(), episodes=5, seed=3)
    again = play_dream(task, policy(), episodes=5, seed=3, slots=2)
    np.testing.assert_array_equal(first.lengths, again.lengths)
    np.testing.assert_allclose(first.returns, again.returns, atol=1e-4)
    assert first.lengths.max() <= task.horizon
    assert task.world.pool.stats()["pages_used"] == 0


def test_dream_needs_a_horizon():
    with pytest.raises(ConfigError, match="horizon"):
        play_dream(tiny_task(horizon=None), policy(), episodes=1)


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"games": 0}])
def test_impossible_counts(bad):
    with pytest.raises(ConfigError):
        play_real(Corridor, policy(), **{"episodes": 1, **bad})


def test_a_game_without_pictures_is_refused():
    import gymnasium

    with pytest.raises(DTypeError, match="frames"):
        play_real(lambda: gymnasium.make("CartPole-v1"), policy(), episodes=1)


def test_optimism_and_difference():
    real = Played("p", "real", (0, 1, 2), np.array([1.0, 2, 3]), np.ones(3, int))
    dream = Played("p", "dream", (0, 1, 2), np.array([5.0, 6, 7]), np.ones(3, int))
    assert optimism(dream, real).mean == 4 and better(real, dream).high < 0
    row = real.row("mine", "tics").to_json()
    assert row["metric"] == "real_return" and row["seeds"] == "0-2" and row["n"] == 3
    table = text_table({"mine": {"real": real, "dream": dream}, "random": {"real": real}})
    assert "+4.00" in table and "2.00 ± 1.00" in table and "random" in table
    many = Played("p", "real", (0, 1, 2), np.array([700.0, 800, 900]), np.ones(3, int))
    assert "800 ± 100" in text_table({"mine": {"real": many}})
    assert seed_text([1, 5]) == "1,5"


def test_a_comparison_is_paired_where_seeds_and_place_are_the_same():
    luck = np.array([0.0, 50, 100, 150])
    steps = np.ones(4, int)
    first = Played("a", "real", (0, 1, 2, 3), luck + [5, 6, 5, 6], steps)
    second = Played("b", "real", (0, 1, 2, 3), luck, steps)
    elsewhere = Played("b", "real", (7, 8, 9, 10), luck, steps)
    assert better(first, second).low > 4 and better(first, elsewhere).low < 0
    dreamt = Played("a", "dream", (0, 1, 2, 3), luck, steps)
    assert better(first, dreamt).low < 0


def test_what_was_cut_is_known(task):
    cut = play_dream(tiny_task(end="never", horizon=3), policy(), episodes=2)
    assert cut.cut == 2 and cut.lengths.tolist() == [3, 3]
    assert [len(r) for r in cut.rewards] == [3, 3]
    assert play_real(Corridor, policy("constant:1"), episodes=3).cut == 0
    assert play_real(Corridor, policy("noop"), episodes=3).cut == 3


def test_stack_matches_the_dream(task):
    """Frames through the codec give the very observation that DreamVecEnv shows."""
    from worldgym.envs.sb3 import DreamVecEnv

    env = DreamVecEnv(task, 3, observation="latent", frame_stack=3, info_frames=True)
    env.seed(0)
    obs = env.reset()
    view = LatentObservation(task.world, 3)
    view.reset(3)
    np.testing.assert_allclose(view.latents(obs[:, -4:], 0), obs)
    for t in range(1, 4):
        obs, _, done, _ = env.step(np.array([0, 1, 2]))
        if done.any():
            break
        np.testing.assert_allclose(view.latents(obs[:, -4:], t), obs)
    env.close()


def test_stack_forgets_only_the_slot_that_begins_anew():
    stack = FrameStack(2, axis=0)
    stack.reset(2)
    stack.push(np.zeros((2, 1, 2, 2)), 0, None)
    out = stack.push(np.ones((2, 1, 2, 2)), np.array([1, 0]), None)
    assert out[0, 0].max() == 0 and out[1].min() == 1
    with pytest.raises(ConfigError):
        FrameStack(0, axis=0)


def test_wrong_frames_are_named(task):
    view = LatentObservation(task.world)
    view.reset(1)
    with pytest.raises(ShapeError):
        view.frames(np.zeros((1, 8, 8, 3), np.uint8), 0)
    with pytest.raises(DTypeError):
        view.frames(np.zeros((1, 32, 32, 3), np.float32), 0)
    with pytest.raises(ShapeError):
        view.latents(np.zeros((1, 9, 2, 2), np.float32), 0)
