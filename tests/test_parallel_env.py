"""The multi-agent face: PettingZoo's own tests, SuperSuit, seeds, states, ends, refusals."""

import gc
import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pettingzoo")
from pettingzoo.test import (  # noqa: E402
    api_test,
    max_cycles_test,
    parallel_api_test,
    parallel_seed_test,
    render_test,
    seed_test,
)
from pettingzoo.utils import aec_to_parallel, parallel_to_aec  # noqa: E402

import worldgym.envs  # noqa: E402
from tests.party_face_tools import tiny_task  # noqa: E402
from worldgym.envs import parallel  # noqa: E402
from worldgym.envs.party_core import PartyCore, choose  # noqa: E402
from worldgym.envs.party_draw import picture  # noqa: E402
from worldgym.envs.party_view import PartyView, crops  # noqa: E402
from worldgym.errors import (  # noqa: E402
    ActionError,
    ClosedError,
    ConfigError,
    ResetNeeded,
    ShapeError,
    StateError,
)

STEADY, DEADLY = tiny_task(), tiny_task(end=-2.0, horizon=40)
VIEWS = ["frame", "crop", "position", "latent", ("crop", "position")]


def make(task=STEADY, game="predator_prey", **settings):
    return worldgym.envs.parallel_env(task, game, **settings)


def act(env, number=0):
    rng = np.random.default_rng(number)
    every = rng.integers(8, size=len(env.possible_agents))
    return {a: int(every[env.possible_agents.index(a)]) for a in env.agents}


def play(env, steps, first=0):
    """Everything that comes back, as bytes; begins nothing anew."""
    out = []
    for i in range(first, first + steps):
        if not env.agents:
            break
        out.append(pickle.dumps(env.step(act(env, i))) + env.state().tobytes())
    return out


@pytest.fixture(autouse=True)
def strict():
    gc.collect()  # what other tests left open is not counted here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("task", [STEADY, DEADLY], ids=["steady", "deadly"])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_pettingzoo_accepts_it(task, view):
    parallel_api_test(make(task, observation=view), num_cycles=25)


def test_aec_conversion():
    for task in (STEADY, DEADLY):
        env = make(task, max_cycles=8)
        api_test(parallel_to_aec(env), num_cycles=30)
    env = aec_to_parallel(parallel_to_aec(make(max_cycles=3)))
    env.reset(seed=0)
    straight = make(max_cycles=3)
    straight.reset(seed=0)
    for i in range(3):
        ours, theirs = straight.step(act(straight, i)), env.step(act(env, i))
        assert ours[1] == theirs[1] and ours[3] == theirs[3]


def test_seeds():
    parallel_seed_test(partial(make, DEADLY, max_cycles=10), num_cycles=12)
    seed_test(lambda: parallel.env(DEADLY, "coins", max_cycles=6), num_cycles=12)
    env, other = make(DEADLY), make(DEADLY, observation="crop")
    env.reset(seed=0)
    first = play(env, 15)
    env.reset(seed=0)
    assert play(env, 15) == first  # 0 is a seed
    env.reset()
    second = play(env, 15)
    assert second != first
    env.reset(seed=1)
    assert play(env, 15) != first
    env.reset(seed=0), env.reset()
    assert play(env, 15) == second  # the next episode of the same seed
    other.reset(seed=0), other.step(act(other, 0)), env.reset(seed=0), env.step(act(env, 0))
    assert other.state().tobytes() == env.state().tobytes()  # the view changes nothing


def test_rendering():
    render_test(lambda render_mode=None: parallel.env(STEADY, "coins", render_mode=render_mode))
    env = make(render_mode="rgb_array", draw="players")
    env.reset(seed=3)
    env.step(act(env))
    plain, drawn = env.picture(False), env.render()
    assert drawn.shape == plain.shape == (384, 480, 3) and (drawn != plain).any()
    assert np.array_equal(plain[::12, ::12], env.state())
    assert make().render() is None


def test_marks_are_where_players_are():
    black = np.zeros((32, 40, 3), np.uint8)
    drawn = picture(black, np.array([[-0.9, -0.875]]), np.array([1]), np.array([True]),
                    np.array([1]))
    assert drawn[:48, :48].any() and not drawn[48:].any() and not drawn[:, 48:].any()
    assert drawn[24, 45].any() and not drawn[24, 4].any()  # the bar is on the east side
    assert not picture(black, np.zeros((1, 2)), None, np.array([False])).any()


def test_max_cycles():
    max_cycles_test(SimpleNamespace(parallel_env=partial(make, STEADY),
                                    env=partial(parallel.env, STEADY)))
    env = make(max_cycles=3)
    env.reset(seed=0)
    for i in range(3):
        _, _, ends, cuts, infos = env.step(act(env, i))
    assert not any(ends.values()) and all(cuts.values()) and env.agents == []
    assert {i["truncation_reason"] for i in infos.values()} == {"horizon"}


def test_supersuit_stacks_and_vectorises():
    supersuit = pytest.importorskip("supersuit")
    env = supersuit.frame_stack_v1(make(DEADLY, max_cycles=10), 4)
    parallel_api_test(env, num_cycles=12)
    assert env.observation_space("player_0").shape == (32, 40, 12)
    # its vector env ends players together or not at all: where they leave one by one, PartyVecEnv
    vec = supersuit.pettingzoo_env_to_vec_env_v1(supersuit.frame_stack_v1(make(max_cycles=5), 2))
    vec.reset(seed=0)
    for i in range(12):
        obs, _, ends, cuts, _ = vec.step(np.zeros(vec.num_envs, int))
        assert not ends.any() and bool(cuts.all()) == (i % 5 == 4)
    assert np.asarray(obs).shape == (5, 32, 40, 6)


def test_players_leave_for_good():
    env, left = make(DEADLY, max_cycles=60), 0
    for seed in range(4):
        env.reset(seed=seed)
        agents, gone = env.possible_agents, set()
        for i in range(60):
            playing = list(env.agents)
            obs, rewards, ends, cuts, infos = env.step(act(env, i))
            assert set(obs) == set(rewards) == set(ends) == set(cuts) == set(infos) == set(playing)
            assert not gone & set(playing) and all(type(v) is bool for v in ends.values())
            assert all(type(v) is float for v in rewards.values())
            gone |= {a for a in playing if ends[a] or cuts[a]}
            left += sum(ends.values())
            assert env.agents == [a for a in agents if a not in gone]
            if not env.agents:
                break
    assert left > 5


def test_what_agents_see():
    env = make(observation=("crop", "position"), render_mode="rgb_array")
    obs, infos = env.reset(seed=5)
    frame = env.state()
    for agent in env.agents:
        assert env.observation_space(agent).contains(obs[agent])
        x, y = infos[agent]["cell"] + np.array(env.game.offset_cells)
        middle = obs[agent]["crop"][20:24, 20:24]
        turned = np.rot90(frame[4 * y:4 * y + 4, 4 * x:4 * x + 4], infos[agent]["orientation"])
        assert np.array_equal(middle, turned)
        assert np.array_equal(obs[agent]["position"], infos[agent]["position"])
    assert obs["player_0"]["crop"] is not obs["player_1"]["crop"]
    obs["player_0"]["crop"][:] = 0
    assert np.array_equal(env.state(), frame)


def test_crops_turn_with_the_player():
    frame = np.zeros((1, 32, 40, 3), np.uint8)
    frame[0, 16:20, 24:28] = 255  # the cell east of the player's
    for facing, (row, column) in enumerate([(4, 8), (0, 4), (4, 0), (8, 4)]):
        out = crops(frame, np.zeros(1, int), np.array([[0.1, 0.125]]), np.array([facing]), 12)[0]
        assert (out[row:row + 4, column:column + 4] == 255).all() and (out == 255).sum() == 48
    assert not crops(frame, np.zeros(1, int), np.array([[-5.0, 5.0]]), None, 12).any()


def test_states_and_forks(tmp_path):
    env = make(DEADLY)
    env.reset(seed=2)
    play(env, 4)
    state, agents, actions = env.get_state(), env.agents, env.core.last_actions().tolist()
    env.save_state(tmp_path / "state.safetensors")
    forks, strangers = env.fork(2), env.fork(1, fresh=True)
    future = play(env, 10, 4)
    assert play(forks[0], 10, 4) == future == play(forks[1], 10, 4)
    assert play(strangers[0], 10, 4) != future
    env.set_state(state)
    assert env.agents == agents and env.core.last_actions().tolist() == actions
    assert play(env, 10, 4) == future
    other = make(DEADLY)
    other.load_state(tmp_path / "state.safetensors")
    assert play(other, 10, 4) == future
    for wrong in (make(DEADLY, "coins"), make(DEADLY, players=3),
                  make(DEADLY, observation="latent")):
        with pytest.raises(StateError, match="another env"):
            wrong.set_state(state)


def test_slots_do_not_know_each_other():
    """N slots of the core are N single environments, byte for byte."""
    core = PartyCore(DEADLY, "predator_prey", num_slots=3, view=PartyView(observation="crop"))
    core.reset(seeds=[4, 5, 6])
    singles = [make(DEADLY, observation="crop") for _ in range(3)]
    for seed, env in zip((4, 5, 6), singles, strict=True):
        env.reset(seed=seed)
    for i in range(12):
        joint = np.random.default_rng(i).integers(8, size=5)
        batch = core.step(np.tile(joint, (3, 1)), "Disabled")
        for b, env in enumerate(singles):
            rewards, ended, cut = env.advance(joint)
            assert np.array_equal(rewards, batch.rewards_BP[b])
            assert np.array_equal(ended, batch.ended_BP[b]) and cut == batch.truncated_B[b]
            assert np.array_equal(env.core.observe()[0], core.observe()[b])
        if core.done_B.any():
            break
    assert i > 2


def test_what_the_dead_do_is_not_read():
    env = make(DEADLY, max_cycles=60)
    env.reset(seed=1)
    while len(env.agents) > 3:
        env.step(act(env))
    other = env.fork()[0]
    gone = [i for i, a in enumerate(env.possible_agents) if a not in env.agents]
    joint = np.array([3] * 5)
    changed = joint.copy()
    changed[gone] = -1
    for one, two in zip(env.advance(joint), other.advance(changed), strict=True):
        assert np.array_equal(one, two)
    assert np.array_equal(env.state(), other.state())


def test_starts_of_a_game():
    env = make(game="coins")
    assert env.players == 2 and make().players == 5 and make(players=3).players == 3
    assert len(choose(STEADY, "predator_prey", 5)[2]) == 5  # in the sixth, players are out for good
    _, _, bank = choose(STEADY, "predator_prey", 3)
    assert len(bank) == 6 and len(choose(STEADY, "predator_prey", 3, beginnings=True)[2]) == 3
    env.reset(seed=0, options={"start": 1})
    one = env.state()
    env.reset(seed=0, options={"start": 2})
    assert not np.array_equal(env.state(), one)


BAD = {
    "unknown game": (dict(game="chess"), "unknown game"),
    "four players": (dict(players=4), "so many players"),
    "eight players": (dict(players=8), "so many players"),
    "true players": (dict(players=True), "so many players"),
    "observation": (dict(observation="sound"), "unknown observation"),
    "frames and latents": (dict(observation=("frame", "latent")), "unknown observation"),
    "even crop": (dict(crop_cells=4), "impossible crop"),
    "cells": (dict(observation="crop", cell_px=3), "size of cells"),
    "max_cycles": (dict(max_cycles=0), "impossible max_cycles"),
    "render": (dict(render_mode="ansi"), "way to render"),
    "draw": (dict(draw="cats"), "way to render"),
    "device": (dict(device="cpu"), "already loaded"),
    "typo": (dict(max_cycle=3), "unknown env setting")}


@pytest.mark.parametrize("name", BAD)
def test_impossible_settings_are_refused(name):
    settings, what = BAD[name]
    with pytest.raises(ConfigError, match=f"{what}(.|\n)*Fix:"):
        make(**settings)


def test_wrong_calls_are_refused():
    env = make(max_cycles=4)
    for call in (env.state, lambda: env.step({}), env.core.observe, lambda: env.fork()):
        with pytest.raises(ResetNeeded, match="reset"):
            call()
    assert env.agents == []
    env.reset(seed=0)
    before, good = env.state(), act(env)
    for wrong in ({"player_0": 1}, good | {"player_9": 0}, good | {"player_1": 8},
                  good | {"player_1": -1}, good | {"player_1": None}, good | {"player_1": 0.5}, {}):
        with pytest.raises(ActionError, match="Fix:"):
            env.step(wrong)
    for wrong in (np.zeros(4, int), np.zeros(5)):
        with pytest.raises(ShapeError, match="Fix:"):
            env.advance(wrong)
    with pytest.raises(ActionError, match="player_3"):
        env.advance(np.array([0, 0, 0, 8, 0]))
    with pytest.raises(ConfigError):
        env.reset(seed=-1)
    assert np.array_equal(env.state(), before) and len(play(env, 9)) == 4
    with pytest.raises(ResetNeeded, match="no agent is left"):
        env.step({})
    env.close()
    with pytest.raises(ClosedError):
        env.reset()
    assert env.agents == []
