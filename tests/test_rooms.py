"""The real rooms: exact poses, walls, the goal, players, recordings with poses."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import worldgym  # noqa: F401
from worldgym import camera
from worldgym.data.store import Episodes
from worldgym.envs import rooms
from worldgym.envs.rooms import FRAMES, LABELS, MOVE, TURN, Rooms
from worldgym.envs.rooms_draw import GOAL, REACH, draw, focal, make_layout
from worldgym.errors import ActionError, ConfigError, ResetNeeded

AHEAD, BACK, RIGHT, LEFT = (LABELS.index(n) for n in (9, 18, 1, 2))


def test_it_is_a_gymnasium_env():
    env = gymnasium.make("worldgym/RoomsGame-v0", render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    obs, _ = env.reset(seed=3)
    assert obs.shape == (48, 64, 3) and (env.render() == obs).all()
    assert (obs == env.reset(seed=3)[0]).all() and (obs != env.reset(seed=4)[0]).any()
    assert env.unwrapped.spec.id == rooms.GAME


def free_place():
    """An env that looks along a way of two free steps."""
    for seed in range(50):
        env = Rooms(horizon=None)
        env.reset(seed=seed)
        trial = Rooms(horizon=None)
        trial.reset(seed=seed)
        if all(trial.step(a)[4]["moved"].all() and not trial.over for a in (AHEAD, RIGHT, AHEAD)):
            return env, seed
    raise AssertionError


def test_poses_are_those_of_the_keys_and_undoing_them_shows_the_same_frames():
    env, seed = free_place()
    first, _ = env.reset(seed=seed)
    path = [env.step(a)[4] for a in (AHEAD, RIGHT, AHEAD)]
    labels = np.array([LABELS[a] for a in (AHEAD, RIGHT, AHEAD) for _ in range(FRAMES)])
    want = camera.walk(camera.motions_of(labels, MOVE, TURN))[1:]
    assert np.allclose(np.concatenate([i["poses"] for i in path]), want, atol=1e-12)
    shown = np.concatenate([[first], *(i["frames"] for i in path)])
    again = np.concatenate([env.step(a)[4]["frames"] for a in (BACK, LEFT, BACK)])
    # but for pixels on an edge, where the last bit of a pose decides
    assert (again == shown[-2::-1]).mean() > 0.995
    assert np.allclose(env.pose(), np.eye(4), atol=1e-9)


def test_the_eye_sees_walls_where_they_are():
    """Height of a wall on the screen and direction of its corner, against plain trigonometry."""
    rng = np.random.default_rng(0)
    layout = make_layout(rng)
    pose, hw = np.eye(4), (48, 64)
    pose[[0, 2], 3] = 0.2, 1.5  # close to the outer wall x = 0, looking along it to z = 4 or less
    turned = camera.walk(camera.motions([{"yaw": -np.pi / 2}]), pose)[-1]  # at the wall, 0.2 away
    assert np.allclose(turned[:3, 2], [-1, 0, 0], atol=1e-9)
    assert len(np.unique(draw(layout, turned, hw)[24].reshape(-1, 3), axis=0)) <= 2  # its colours
    back_off = turned.copy()
    back_off[0, 3] = 1.0
    column = draw(layout, back_off, hw)[:, 32].astype(int)
    half = 0.5 * focal(hw) / 1.0  # a wall half a unit high, one unit away
    edges = np.flatnonzero(np.abs(np.diff(column, axis=0)).sum(1) > 0) + 1
    assert int(round(24 - half)) in edges or int(round(24 + half)) in edges


def test_walls_stop_moves_not_turns_and_the_goal_pays():
    env = Rooms(horizon=None)
    env.reset(seed=1)
    for _ in range(30):
        *_, info = env.step(AHEAD)
        if not info["moved"].any():
            break
        if env.over:
            env.reset(seed=1)
    assert not info["moved"].any() and (info["frames"][0] == info["frames"][-1]).all()
    before = env.pose()
    env.step(RIGHT)
    assert np.allclose(env.pose()[:3, 3], before[:3, 3]) and not np.allclose(env.pose(), before)
    gx, gz = env.layout.goal
    env.c2w = np.eye(4)
    env.c2w[[0, 2], 3] = gx, gz - REACH - 0.15
    obs, reward, won, cut, info = env.step(AHEAD)
    assert (reward, won, cut) == (1.0, True, False) and 1 <= len(info["frames"]) < FRAMES
    assert (np.abs(obs.reshape(-1, 3).astype(float)[:, 1]) < 1).mean() > 0.2  # magenta has no green
    with pytest.raises(ResetNeeded):
        env.step(AHEAD)
    short = Rooms(horizon=1)
    short.reset(seed=0)
    assert short.step(RIGHT)[3]
    with pytest.raises(ActionError):
        env.reset(seed=0)
        env.step(7)
    with pytest.raises(ConfigError):
        Rooms(frames=0)
    assert GOAL == (255.0, 0.0, 255.0)


def test_recordings_hold_frames_keys_and_poses_and_routes_that_come_back(tmp_path):
    done = rooms.record_rooms(tmp_path / "a", episodes=6, seed=3, steps=30, progress=False)
    data = Episodes.open(tmp_path / "a")
    assert done.episodes == len(data) == 6 and set(data.policies) <= {p[0] for p in rooms.PLAYERS}
    assert data.env["recipe"]["labels"] == list(LABELS) and data.fps == rooms.FPS
    for i in range(6):
        e = data.episode(i)
        assert np.allclose(e["info_pose"][0], np.eye(4))
        labels = np.array(LABELS)[e["actions"][1:]]
        moves = camera.motions_of(labels, MOVE, TURN)
        moves[:, :2] *= e["info_free"][1:, None] > 0.5
        assert np.allclose(camera.walk(moves), e["info_pose"], atol=1e-5)
    again = rooms.record_rooms(tmp_path / "b", episodes=6, seed=3, steps=30, progress=False)
    assert again.steps == done.steps
    assert (Episodes.open(tmp_path / "b").episode(5)["frames"] == data.episode(5)["frames"]).all()
    env, player = Rooms(frames=1, horizon=None), rooms.Returner(np.random.default_rng(2))
    frame, info = env.reset(seed=5)
    player.reset()
    poses, out = [info["pose"]], 0
    for t in range(150):
        label = player.act(frame, t)
        out = max(out, len(player.back))
        frame, _, won, _, info = env.step(label)
        poses.append(info["pose"])
        if out and not player.back:
            break
    assert out >= 4 * FRAMES - 1  # it really went away, and every view of the way out came again
    assert np.allclose(poses[-1], poses[len(poses) - 1 - 2 * (out + 1)], atol=1e-6)
