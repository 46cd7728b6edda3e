"""Planners against worlds whose best actions are known."""

import numpy as np
import pytest

from tests.agent_toys import Corridor, tiny_task
from tests.fakes import LIVE
from tests.known_world import KnownWorld, known_task
from worldgym.actions import ActionSpec
from worldgym.agents import planner
from worldgym.agents.planner import PlanConfig, Planner
from worldgym.agents.plans import any_plan
from worldgym.agents.policy import Policy
from worldgym.agents.score import play_dream, play_real
from worldgym.agents.scripted import parse_policy
from worldgym.envs.tasks import Task
from worldgym.errors import ConfigError, DTypeError, ShapeError, WorldGymError
from worldgym.models import nano

KINDS = ("discrete", "multi_discrete", "multi_binary", "box")


def frames_at(world, *places):
    """What the walker sees at these places."""
    bytes_ = np.zeros((len(places), 12), np.uint8)
    bytes_[:, 0] = places
    small = bytes_.reshape(-1, 3, 2, 2).transpose(0, 2, 3, 1)
    return small.repeat(20, 1).repeat(20, 2)


def planner_of(task, text="cem:horizon=4,n=24"):
    return parse_policy(text, task.world.spec.action, task.world, task)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["cem:horizon=4,n=32,elite=0.2", "shooting:horizon=4,n=64"])
def test_it_goes_where_the_reward_is(kind, search):
    """Only the first component moves the walker: +1 is best, and each place right pays more."""
    task = known_task(KnownWorld(kind), horizon=5)
    policy = planner_of(task, search)
    assert isinstance(policy, Policy)
    best = play_dream(task, Right(task.world.spec.action), 2, seed=3)
    played = play_dream(task, policy, 2, seed=3)
    idle = play_dream(task, parse_policy("noop", task.world.spec.action), 2, seed=3)
    assert (played.returns >= best.returns - 0.3).all()
    assert (played.returns > idle.returns).all()


class Right:
    name = "right"

    def __init__(self, action):
        self.action = action

    def reset(self, n, seed):
        pass

    def act(self, frames, t, slots=None):
        actions = np.zeros((len(frames), *self.action.shape), self.action.dtype)
        actions.reshape(len(frames), -1)[:, 0] = 1
        return actions


def lock(chunk):
    """Pays once the walker's last push was 2 at place 7; that takes three steps from place 6."""
    byte = (chunk.latents_BFChw[:, -1].flatten(1) * 128 + 128).round().numpy()
    return 10.0 * ((byte[:, 0] == 7) & (byte[:, 4] == 2))


def test_it_plans_more_than_one_step_ahead():
    task = known_task(reward=lock, end="never")
    policy = planner_of(task, "cem:horizon=4,n=128,repeat=0")
    policy.reset(1, 0)
    state, total = task.world.begin(task.starts.gather([3]), [0]), 0.0  # place 6
    for t in range(3):
        frames = task.world.decode(state.latents_BCHW).numpy()
        state, chunk = task.world.step(state, policy.act(frames, t))
        total += float(lock(chunk)[0])
    assert total == 10.0


def test_it_weighs_the_chance_to_end_not_the_drawn_end():
    """Left of place 5 a step pays more but may end all; no end is ever drawn."""
    def pay(chunk):
        place = (chunk.latents_BFChw[:, -1, 0, 0, 0] * 128 + 128).round().numpy()
        return np.where(place < 5, 2.0, 1.0)

    for chance, where in ((0.9, 0), (0.0, 2)):
        world = KnownWorld(chance=lambda place, c=chance: np.where(place < 5, c, 0.0))
        policy = planner_of(known_task(world, reward=pay), "cem:horizon=6,n=64,iterations=3")
        policy.reset(2, 1)
        went = policy.act(frames_at(world, 5, 5), 0)
        assert (went == 2).all() == (where == 2), (chance, went)


def test_a_slot_depends_on_no_other(monkeypatch):
    world = KnownWorld(wind=lambda place: 1)
    policy = planner_of(known_task(world), "cem:horizon=3,n=8")
    frames = frames_at(world, 4, 9, 3, 12, 7)

    def play(slots, block=1024):
        monkeypatch.setattr(planner, "MAX_ROWS", block)
        policy.reset(5, 11)
        return np.array([policy.act(frames[slots], t, slots) for t in range(6)])

    every = play([0, 1, 2, 3, 4])
    assert np.array_equal(play([0, 1, 2, 3, 4]), every)
    assert np.array_equal(play([0, 1, 2, 3, 4], block=17), every)  # two slots at a time
    assert np.array_equal(play([3]), every[:, [3]])
    assert np.array_equal(play([4, 1]), every[:, [4, 1]])


def test_noise_is_new_for_every_seed_slot_episode_and_step():
    world = KnownWorld()
    policy = planner_of(known_task(world), "shooting:horizon=2,n=4")
    for seed in (0, 1):
        policy.reset(2, seed)
        for t in (0, 1, 0, 1):  # two episodes
            policy.act(frames_at(world, 5, 5), t)
    seeds = [s for _, keys in world.begun for s in keys]
    assert len(seeds) == 16 and len(set(seeds)) == 16


def test_futures_are_shared_by_all_plans():
    for text, keys in (("shooting:horizon=2,n=12", 12), ("shooting:horizon=2,n=12,futures=3", 3)):
        world = KnownWorld()
        planner_of(known_task(world), text).act(frames_at(world, 5), 0)
        assert len(world.forked[0]) == 12 and len(set(world.forked[0].tolist())) == keys


def test_it_remembers_frames_and_its_own_actions():
    world = KnownWorld()
    policy = planner_of(known_task(world), "cem:horizon=2,n=4,iterations=1")
    policy.reset(2, 0)
    took = [policy.act(frames_at(world, 3 + t, 9), t) for t in range(3)]
    starts, _ = world.begun[-1]
    places = (starts.latents_BKChw[:, :, 0, 0, 0] * 128 + 128).round().int().tolist()
    assert starts.length_B.tolist() == [3, 3]
    assert places[0][-3:] == [3, 4, 5] and places[1][-3:] == [9, 9, 9]
    assert starts.actions[0, -2:].tolist() == [took[0][0], took[1][0]]
    assert starts.null_BK[0, -3:].tolist() == [True, False, False]
    policy.act(frames_at(world, 8), 0, [0])  # a new episode in slot 0 alone
    assert world.begun[-1][0].length_B.tolist() == [1]
    policy.act(frames_at(world, 9), 3, [1])
    assert world.begun[-1][0].length_B.tolist() == [4]
    for t in range(20):  # no more than the world can use
        policy.act(frames_at(world, 8), t, [0])
    assert world.begun[-1][0].length_B.tolist() == [world.spec.context_frames]


def test_frames_and_latents_are_the_same_to_it():
    world = KnownWorld(wind=lambda place: 1)
    policy = planner_of(known_task(world), "cem:horizon=3,n=8")
    frames = frames_at(world, 4, 9, 12)
    policy.reset(3, 2)
    seen = policy.act(frames, 0)
    policy.reset(3, 2)
    assert np.array_equal(policy.act_latents(world.encode(frames).numpy(), 0), seen)
    with pytest.raises(ShapeError):
        policy.act(frames[:, :8], 0)
    with pytest.raises(DTypeError):
        policy.act(frames.astype(np.float32), 0)
    with pytest.raises(ShapeError):
        policy.act_latents(np.zeros((3, 4, 4), np.float32), 0)
    with pytest.raises(ConfigError):
        policy.act(frames, 0, [0, 1, 3])


def test_cost_is_what_the_docstring_says():
    for text, each in (("cem:horizon=5,n=6,iterations=3", 90), ("shooting:horizon=5,n=6", 30),
                       ("cem:horizon=6,n=6,iterations=1,every=3", 12)):
        world = KnownWorld()
        policy = planner_of(known_task(world), text)
        before = LIVE["states"]
        for t in range(6):
            policy.act(frames_at(world, 6), t)
        assert world.rows == 6 * each
        assert LIVE["states"] == before  # every fork was given back


def test_a_plan_that_is_kept_is_played_to_its_end():
    world = KnownWorld()
    policy = planner_of(known_task(world), "shooting:horizon=4,n=8,every=4")
    for t in range(4):
        policy.act(frames_at(world, 6), t)
    assert len(world.begun) == 1
    policy.act(frames_at(world, 6), 4)
    assert len(world.begun) == 2
    policy.act(frames_at(world, 6), 0)  # a new episode does not go by the old plan
    assert len(world.begun) == 3


def test_it_plays_the_real_game_and_a_real_world():
    task = tiny_task(horizon=4)
    policy = planner_of(task, "cem:horizon=2,n=4,iterations=1")
    one = play_real(Corridor, policy, episodes=3, seed=5, games=1)
    many = play_real(Corridor, policy, episodes=3, seed=5, games=3)
    assert np.array_equal(one.returns, many.returns) and (one.lengths > 1).all()
    dreamt = play_dream(task, policy, 3, seed=5)
    assert np.array_equal(dreamt.returns, play_dream(task, policy, 3, seed=5, slots=2).returns)


@pytest.mark.parametrize("text", [
    "cem:n=1", "shooting:n=0", "cem:horizon=0", "cem:horizon=2.5", "cem:elite=0", "cem:elite=2",
    "cem:repeat=1", "cem:warm=-0.1", "cem:discount=0", "cem:discount=nan", "cem:iterations=0",
    "cem:colour=3", "cem:n", "cem:n=", "cem:n=8,n=9", "shooting:iterations=2", "shooting:elite=0.5",
    "cem:n=9,futures=2", "cem:n=4,futures=4", "cem:futures=0", "cem:horizon=3,every=4", "cem:12"])
def test_impossible_settings_are_refused(text):
    task = known_task()
    with pytest.raises(ConfigError) as caught:
        planner_of(task, text)
    assert "Fix: " in str(caught.value)


def test_it_needs_a_world_that_fits():
    with pytest.raises(ConfigError, match="needs its world"):
        parse_policy("cem", ActionSpec.discrete(3))
    with pytest.raises(ConfigError, match="other actions"):
        parse_policy("cem", ActionSpec.discrete(4), KnownWorld())
    short = KnownWorld()
    short.max_steps = 5
    with pytest.raises(ConfigError, match="at most 5"):
        planner_of(known_task(short), "cem:horizon=6")
    silent = nano.tiny()
    silent.outcome = None
    with pytest.raises(ConfigError, match="nothing to plan for"):
        Planner(Task(world=silent, starts=None), PlanConfig())
    assert parse_policy("noisy:0.1:cem:n=4,horizon=2", ActionSpec.discrete(3),
                        lambda: KnownWorld())
    with pytest.raises(WorldGymError):
        parse_policy("cem", ActionSpec.discrete(3), KnownWorld()).reset(0, 0)


SPECS = [ActionSpec.discrete(4, start=2),
         ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 2)),
         ActionSpec(kind="multi_binary", shape=(4,), sizes=(4,)),
         ActionSpec(kind="box", shape=(2,), low=(-1.0, 0.5), high=(1.0, 2.0))]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_plans_are_legal_and_follow_what_they_are_fitted_to(spec):
    rng = np.random.default_rng(0)
    law = any_plan(spec, 5, 0.5)
    plans = law.draw(rng, 400)
    assert plans.shape == (400, 5, *spec.shape) and plans.dtype == spec.dtype
    spec.check(plans.reshape(-1, *spec.shape))
    assert len(np.unique(plans.reshape(2000, -1)[:, 0])) >= 2
    target = plans[:1]
    for _ in range(4):
        law = law.refit(np.repeat(target, 3, axis=0))
    np.testing.assert_allclose(law.mode(), target[0], atol=1e-3)
    again = law.draw(rng, 200)
    spec.check(again.reshape(-1, *spec.shape))
    off, first = (np.abs(x - target).mean() for x in (again, plans))
    assert off < first / 3
    np.testing.assert_allclose(law.later(0.9, 2).mode()[:3], target[0, 2:], atol=0.2)


def test_repeating_keeps_each_steps_chances():
    rng = np.random.default_rng(1)
    plans = any_plan(ActionSpec.discrete(4), 12, 0.8).draw(rng, 4000)
    for step in (0, 5, 11):
        share = np.bincount(plans[:, step], minlength=4) / 4000
        assert np.abs(share - 0.25).max() < 0.04
    same = (plans[:, 1:] == plans[:, :-1]).mean()
    assert abs(same - (0.8 + 0.2 / 4)) < 0.02
    assert abs((any_plan(ActionSpec.discrete(4), 12, 0.0).draw(rng, 4000)[:, 1:]
                == any_plan(ActionSpec.discrete(4), 12, 0.0).draw(rng, 4000)[:, :-1]).mean()
               - 0.25) < 0.02
