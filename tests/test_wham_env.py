"""``worldgym/WHAM-v0``: conformance, starts, controller actions, episodes on disk, errors."""

from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from tests.wham_tools import HW, some_actions, some_frames, write_clip, write_model
from worldgym.data import wham_npz
from worldgym.envs.wham import ID, WhamVectorEnv, load_wham, wham, wham_vector
from worldgym.errors import (
    ActionError,
    CheckpointError,
    ConfigError,
    DatasetError,
    DTypeError,
    ResetNeeded,
    ShapeError,
    WorldGymError,
)
from worldgym.models import wham_actions
from worldgym.testing import check_dream_env, check_dream_vector_env

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wham") / "wham.safetensors")


def brightness(chunk):
    return chunk.frames().float().mean((1, 2, 3, 4)).numpy()


@pytest.mark.parametrize("settings", [
    {"reward": brightness}, {"controls": "values", "render_mode": "rgb_array", "frame_stack": 2}],
    ids=["bins", "values"])
def test_conformance(file, settings):
    report = check_dream_env(partial(wham, model=file, horizon=3, **settings), steps=4,
                             other_process=False)
    assert {"seeds", "state", "fork", "refusal", "gymnasium", "start-frame"} <= set(report.passed)


def test_conformance_of_the_vector_env(file):
    make = partial(wham_vector, model=file, horizon=2, reward=brightness)
    report = check_dream_vector_env(make, num_envs=2, steps=3)
    assert {"autoreset", "batch-invariance", "slot-reset", "state"} <= set(report.passed)


def test_registered_id_and_gymnasium_s_checker(file):
    env = gymnasium.make(ID, model=file, max_episode_steps=2)
    assert env.action_space == spaces.MultiDiscrete([2] * 12 + [11] * 4)
    assert env.observation_space.shape == (*HW, 3) and env.observation_space.dtype == np.uint8
    known = env.unwrapped.metadata
    assert known["control_rate_hz"] == 10.0 and known["controls"] == "bins"
    check_env(env.unwrapped, skip_render_check=True)
    vec = gymnasium.make_vec(ID, num_envs=2, model=file, controls="values",
                             vectorization_mode="vector_entry_point")
    obs, _ = vec.reset(seed=0)
    assert obs.shape == (2, *HW, 3)
    obs, reward, terminated, truncated, _ = vec.step(vec.action_space.sample())
    assert not reward.any() and not terminated.any() and not truncated.any()


def test_ids_as_observations_and_their_spread(file):
    env = wham(model=file, observation="latent", frame_stack=2, distrust=0.99)
    obs, _ = env.reset(seed=0)
    obs, *_, info = env.step(some_actions(1)[0])
    assert obs in env.observation_space and (obs == obs.round()).all()
    assert 0 < info["uncertainty"] <= 1
    shown = wham(model=file)
    shown.reset(seed=0)
    frame = shown.step(some_actions(1)[0])[0]
    assert (env.core.current_frames()[0] == frame).all()  # floats decode like ids


# -- actions --------------------------------------------------------------------------------------


def test_bins_and_values_are_the_same_controller(file):
    rows = some_actions(3)
    bins, values = wham(model=file), wham(model=file, controls="values")
    bins.reset(seed=1)
    values.reset(seed=1)
    for row in rows:
        given = wham_actions.to_controller(row)
        assert given in values.action_space
        assert (wham_actions.from_controller(given) == row).all()
        flipped = row.copy()
        flipped[0] = 1 - row[0]  # number 0 follows from the others
        assert (bins.step(flipped)[0] == values.step(given)[0]).all()


def test_stick_values_fall_into_the_published_bins():
    for value, want in ((0.0, 5), (1.0, 10), (-1.0, 0), (0.3, 7), (0.049, 5), (0.5, 8)):
        got = wham_actions.from_controller({"buttons": np.zeros(11), "sticks": [value] * 4})
        assert got.tolist() == [1] + [0] * 11 + [want] * 4
    pressed = wham_actions.from_controller({"buttons": [0, 1] + [0] * 9, "sticks": [0] * 4})
    assert pressed[0] == 0 and pressed[2] == 1


@pytest.mark.parametrize("action", [
    {"buttons": np.zeros(11)}, {"buttons": np.zeros(12), "sticks": np.zeros(4)},
    {"buttons": np.full(11, 2), "sticks": np.zeros(4)}, np.zeros(16, int),
    {"buttons": np.zeros(11), "sticks": np.full(4, 1.5)},
    {"buttons": np.zeros(11), "sticks": np.full(4, np.nan)},
    {"buttons": np.zeros((2, 11)), "sticks": np.zeros(4)}], ids=repr)
def test_wrong_controller_actions_are_named_errors(file, action):
    env = wham(model=file, controls="values")
    with pytest.raises(ResetNeeded):
        env.step(action)
    env.reset(seed=0)
    with pytest.raises((ActionError, ShapeError)):
        env.step(action)


# -- starts ---------------------------------------------------------------------------------------


def dream(env, options, seed=0, steps=2):
    first, _ = env.reset(seed=seed, options=options)
    return [first] + [env.step(a)[0] for a in some_actions(steps, 5)]


def same(a, b):
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def test_starts_of_frames_with_and_without_actions(file):
    env, frames, actions = wham(model=file), some_frames(3), some_actions(3)
    with_actions = dream(env, {"frames": frames, "actions": actions[:2]})
    assert (with_actions[0] == frames[-1]).all()
    assert same(with_actions, dream(env, {"frames": frames, "actions": actions}))
    assert same(with_actions, dream(
        env, {"frames": frames, "actions": wham_actions.to_controller(actions[:2])}))
    without = dream(env, {"frames": frames})
    idle = np.tile(wham_actions.NEUTRAL, (2, 1))
    assert same(without, dream(env, {"frames": frames, "actions": idle}))
    assert not same(without, with_actions)
    alone = dream(env, {"frame": frames[-1]})
    assert same(alone, dream(env, {"frames": frames[-1:]})) and not same(alone, without)


def test_stacked_observations_show_the_start_s_frames(file):
    env, frames = wham(model=file, frame_stack=3), some_frames(2)
    obs, _ = env.reset(options={"frames": frames})
    assert (obs == np.concatenate([frames[0], *frames], -1)).all()


def test_vector_slots_have_starts_of_their_own(file):
    env, frames, actions = wham_vector(3, model=file), some_frames(3), some_actions(2)
    assert isinstance(env, WhamVectorEnv)
    env.reset(seed=[4, 4, 4], options={"frames": [frames, frames[2], None],
                                       "actions": [actions, None, None]})
    given = some_actions(2, 5)
    obs = [env.step(np.tile(a, (3, 1)))[0] for a in given]
    single = wham(model=file)
    wants = ({"frames": frames, "actions": actions}, {"frame": frames[2]}, None)
    for slot, options in enumerate(wants):
        assert same([o[slot] for o in obs], dream(single, options, seed=4)[1:])


@pytest.mark.parametrize(("options", "kind"), [
    ({"frames": some_frames(4)}, ShapeError), ({"frames": some_frames(2)[:, :-1]}, ShapeError),
    ({"frames": some_frames(2) / 255}, DTypeError), ({"frames": 3}, DTypeError),
    ({"actions": some_actions(1)}, ConfigError),
    ({"frames": some_frames(2), "start": 0}, ConfigError),
    ({"frames": some_frames(2), "actions": some_actions(3)}, ShapeError),
    ({"frames": some_frames(2), "actions": some_actions(2)[:, :-1]}, WorldGymError),
    ({"frames": some_frames(2), "actions": some_actions(2) + 20}, ActionError)])
def test_wrong_starts_are_named_errors_and_change_nothing(file, options, kind):
    env = wham(model=file)
    env.reset(seed=0)
    state = env.get_state()
    want = env.step(some_actions(1)[0])[0]
    env.set_state(state)
    with pytest.raises(kind, match="Fix:"):
        env.reset(options=options)
    assert (env.step(some_actions(1)[0])[0] == want).all()


def test_starts_from_episodes_and_from_frames(file, tmp_path):
    for i in range(2):
        write_clip(tmp_path / "a" / f"{i}.npz", 7, seed=i)
    env = wham(model=file, starts=tmp_path)
    got = dream(env, {"start": 1})
    assert (got[0] == some_frames(7, 1)[2]).all() and len(env.task.starts) == 2
    own = {"frames": some_frames(7, 1)[:3], "actions": some_actions(7, 1)[:2]}
    assert same(got, dream(env, own))
    every = load_wham(file, starts=tmp_path, context=2, start_every=2).starts
    assert len(every) == 6 and (every.last_frames([2]) == some_frames(7)[5]).all()
    given = load_wham(file, starts=[some_frames(2), (some_frames(3), some_actions(2))]).starts
    assert given.gather([0, 1]).length_B.tolist() == [2, 3]
    assert {env.reset(seed=s)[1]["start"] for s in range(8)} == {0, 1}


def test_files_that_are_wrong_are_named_errors(file, tmp_path):
    with pytest.raises(ConfigError, match="no WHAM file"):
        gymnasium.make(ID)
    with pytest.raises(CheckpointError, match="missing"):
        wham(model=tmp_path / "no.ckpt")
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError):
        wham(model=tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="controls"):
        wham(model=file, controls="keyboard")
    with pytest.raises(ConfigError, match="setting"):
        wham(model=file, colour="red")
    with pytest.raises(DatasetError, match="no WHAM episodes"):
        wham(model=file, starts=tmp_path / "none")
    write_clip(tmp_path / "short.npz", 2)
    with pytest.raises(ConfigError, match="shorter"):
        wham(model=file, starts=tmp_path)


def test_what_players_would_do_and_the_model_left_to_itself(file):
    for controls in ("bins", "raw", "values"):
        env = wham(model=file, controls=controls, propose=True)
        env.reset(seed=3)
        asked = [env.proposal() for _ in range(2)]
        assert asked[0] in env.action_space
        assert (wham_actions.COUNT,) == env._bins(asked[0]).shape
        assert np.array_equal(env._bins(asked[0]), env._bins(asked[1]))
        moved = [env.step(env.proposal())[0] for _ in range(3)]
        env.reset(seed=3)
        assert same(moved, [env.step(env.proposal())[0] for _ in range(3)])
    vec = wham_vector(2, model=file)
    vec.reset(seed=3)
    assert vec.proposal() in vec.action_space


# -- episodes on disk -----------------------------------------------------------------------------


def test_episodes_are_read_and_written(tmp_path):
    path = write_clip(tmp_path / "clip.npz", 6)
    with np.load(path) as stored:
        assert {k: (v.dtype.name, v.shape) for k, v in stored.items()} == {
            "images": ("uint8", (6, 3, *HW)), "actions": ("float32", (6, 16)),
            "states": ("float32", (6, 56))}
        assert (stored["states"] == -1).all()
    assert wham_npz.measure(path) == (6, HW)
    clip = wham_npz.read(path, 2, 3)
    assert (clip.frames == some_frames(6)[2:5]).all()
    assert (clip.actions == some_actions(6)[2:5]).all() and clip.actions.dtype == np.int64
    np.savez_compressed(tmp_path / "packed.npz", **np.load(path))
    assert (wham_npz.read(tmp_path / "packed.npz", 4).frames == some_frames(6)[4:]).all()


@pytest.mark.parametrize("change", [
    {"images": None}, {"images": np.zeros((6, 4, 4, 3), np.uint8)},
    {"actions": np.zeros((5, 16), np.float32)}, {"actions": np.full((6, 16), 30, np.float32)},
    {"images": np.array([{}] * 6, object)}, {"actions": np.zeros((6, 12), np.float32)}], ids=str)
def test_broken_episodes_are_named_errors(tmp_path, change):
    arrays = {**np.load(write_clip(tmp_path / "a.npz", 6)), **change}
    np.savez(tmp_path / "b.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DatasetError, match="not a WHAM episode"):
        wham_npz.read(tmp_path / "b.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:3000])
    with pytest.raises(DatasetError, match="not a WHAM episode"):
        wham_npz.read(tmp_path / "b.npz")
    with pytest.raises(DatasetError, match="too short"):
        wham_npz.read(tmp_path / "a.npz", 3, 4)
