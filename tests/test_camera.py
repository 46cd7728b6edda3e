"""Keys, motions, poses, pose strings and JSON: both ways, with errors where others went on."""

import json

import numpy as np
import pytest

from worldgym import camera, trajectory
from worldgym.camera import DEFAULT_K, Thresholds
from worldgym.errors import ActionError, DatasetError, DTypeError, NotFiniteError, ShapeError
from worldgym.models.controls import Controls


def test_all_81_labels_survive_the_way_through_poses():
    labels = np.arange(81)
    walked = camera.walk(camera.motions_of(labels))
    assert camera.labels_of(walked)[1:].tolist() == labels.tolist()
    pair = camera.classes(labels)
    assert (camera.label(pair[:, 0], pair[:, 1]) == labels).all()


def test_where_keys_lead():
    """x right, y down, z forward; turns before moves."""
    ahead, right, up = (camera.walk(camera.motions([m]))[1] for m in (
        {"forward": 1.0}, {"yaw": np.pi / 2, "forward": 1.0}, {"pitch": np.pi / 2, "forward": 1.0}))
    assert np.allclose(ahead[:3, 3], [0, 0, 1])
    assert np.allclose(right[:3, 3], [1, 0, 0]) and np.allclose(right[:3, 2], [1, 0, 0])
    assert np.allclose(up[:3, 3], [0, -1, 0])
    orbit = camera.walk(camera.motions([{"third_yaw": 0.3}] * 4))
    pivot = orbit @ np.array([0, 0, 1, 1])
    assert np.allclose(pivot, pivot[0]) and np.allclose(np.linalg.norm(
        orbit[:, :3, 3] - pivot[0, :3], axis=1), 1)


def test_motions_lead_along_any_poses():
    """Every rigid motion is one, also those straight up, where yaw and roll are the same."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1.5, 1.5, (60, 6))
    rows[::7, 3] = np.pi / 2
    rows[3::7, 3] = -np.pi / 2
    start = camera.walk(camera.motions([{"yaw": 1.0, "down": 2.0, "roll": 0.4}]))[-1]
    c2w = camera.walk(camera.motions(rows), start)
    assert np.allclose(camera.walk(camera.motions_between(c2w), start), c2w, atol=1e-12)
    mild = rng.uniform(-0.5, 0.5, (60, 6))
    again = camera.motions_between(camera.walk(camera.motions(mild)))
    assert np.allclose(again[:, camera.POSE], mild) and not again[:, camera.ORBIT].any()
    down, roll = (camera.walk(camera.motions([{n: 0.5}]))[1] for n in ("down", "roll"))
    assert np.allclose(down[:3, 3], [0, 0.5, 0]) and roll[1, 0] > 0  # the right side sinks
    orbit = camera.walk(camera.motions([{"third_yaw": 0.3}] * 4))
    assert np.allclose(camera.walk(camera.motions_between(orbit)), orbit, atol=1e-12)


def test_controls_say_which_poses_they_can_go():
    labels = np.random.default_rng(1).integers(0, 81, 30)
    c2w = camera.walk(camera.motions_of(labels))
    for kind, shape in (("keys", (30, 2)), ("deltas", (30, 4)), ("poses", (30, 6))):
        controls = Controls(kind=kind)
        rows = controls.along(c2w)
        assert rows.shape == shape and controls.action.check(rows).shape == shape
        assert np.allclose(camera.walk(controls.read(rows)[0]), c2w, atol=1e-5)
    few = Controls(kind="labels", labels=(0, 9, 1))
    assert few.along(camera.walk(camera.motions_of(np.array([9, 0, 1])))).tolist() == [1, 0, 2]
    roll, far = (camera.walk(camera.motions([{}, m])) for m in ({"roll": 0.1}, {"forward": 1.0}))
    for controls, path in ((few, c2w), (Controls(), roll), (Controls(), far),
                           (Controls(kind="deltas"), roll), (Controls(kind="poses"), far)):
        with pytest.raises(ActionError, match="cannot be gone"):
            controls.along(path)
    assert Controls(kind="poses", move=0.25).along(far).shape == (2, 6)


def test_spaces_fit_what_they_stand_for():
    keys, deltas = camera.keys(4), camera.deltas(4)
    given = keys.check(np.full((2, 4, 2), 8))
    assert camera.label(given[..., 0], given[..., 1]).tolist() == [[80] * 4] * 2
    with pytest.raises(ActionError):
        keys.check(np.full((1, 4, 2), 9))
    moves = camera.motions_of(np.arange(81))[:, :4].astype(np.float32)
    assert camera.deltas().check(moves).shape == (81, 4)
    with pytest.raises(ActionError):
        deltas.check(np.full((1, 4, 4), 1.0))


@pytest.mark.parametrize("degrees, label", [(0, 9), (45, 45), (90, 27), (180, 18), (-45, 54),
                                            (-135, 72)])
def test_diagonal_moves_are_two_keys(degrees, label):
    a = np.deg2rad(degrees)
    c2w = camera.walk(camera.motions([{"forward": np.cos(a), "right": np.sin(a)}]))
    assert camera.labels_of(c2w)[1] == label


def test_thresholds_of_inference_training_and_third_person():
    small = camera.walk(camera.motions([{"forward": 0.005}, {"yaw": 0.0005},
                                        {"forward": 0.1, "yaw": 0.1}]))
    assert camera.labels_of(small).tolist() == [0, 9, 0, 10]
    training = Thresholds(move=camera.LEAST_MOVE_TRAINING)
    assert camera.labels_of(small, training).tolist() == [0, 0, 0, 10]
    assert camera.labels_of(small, Thresholds(third_person=True)).tolist() == [0, 9, 0, 1]


# ----------------------------------------------------------------------------- strings


def test_strings_go_both_ways():
    path = trajectory.from_string(" w-2, right-3 ,,d-1")
    assert len(path) == 7 and path.labels().tolist() == [0, 9, 9, 1, 1, 1, 27]
    assert trajectory.to_string(path.labels()) == "w-2,right-3,d-1"
    with pytest.raises(ActionError, match="cannot be said"):
        trajectory.to_string(np.array([0, 10]))


def test_half_a_motion_is_an_error_and_what_was_published_can_be_had():
    with pytest.raises(ActionError, match="broken count") as error:
        trajectory.from_string("w-3, right-0.5")
    assert isinstance(error.value, ValueError) and "cut it down to 0" in str(error.value)
    assert len(trajectory.from_string("w-3, right-0.5", published=True)) == 4


@pytest.mark.parametrize("text", ["w", "w--3", "jump-3", "w-x", "W-2", "w-nan", "w-inf",
                                  "-", "3-w"])
def test_malformed_strings_are_named(text):
    with pytest.raises(ActionError, match="cannot be read"):
        trajectory.from_string(text)


def test_strings_that_are_none_or_never_end_are_named():
    with pytest.raises(ActionError, match="not a text"):
        trajectory.from_string(None)
    with pytest.raises(ActionError, match="too long"):
        trajectory.from_string("w-3,d-1e12")


def test_overlay_has_a_row_for_every_picture():
    rows = trajectory.overlay("w-4,d-4")
    assert len(rows) == 33 and rows[16]["forward"] == 1 and rows[17]["left"] == -1


# ----------------------------------------------------------------------------- JSON


def test_both_json_layouts_go_both_ways(tmp_path):
    path = trajectory.from_string("w-2, right-3")
    for training in (False, True):
        file = tmp_path / f"{training}.json"
        file.write_text(json.dumps(trajectory.to_json(path, training=training)))
        again = trajectory.from_json(file)
        assert np.allclose(again.c2w_N44, path.c2w_N44, atol=1e-14)
        assert np.allclose(again.K_N33, path.K_N33) and (again.labels() == path.labels()).all()
    assert len(trajectory.to_json(path, training=True)) == 4 * (len(path) - 1) + 1


def test_only_the_training_layout_is_recentred_unless_asked():
    start = camera.walk(camera.motions([{"forward": 5.0, "yaw": 1.0}]))[-1]
    c2w = camera.walk(camera.motions([{"forward": 0.08}] * 3), start)
    path = trajectory.Trajectory.of(c2w)
    plain = trajectory.from_json(trajectory.to_json(path))
    assert np.allclose(plain.c2w_N44[0], start)
    for data, ask in ((trajectory.to_json(path, training=True), None),
                      (trajectory.to_json(path), True)):
        assert np.allclose(trajectory.from_json(data, recentre=ask).c2w_N44[0], np.eye(4))


def test_whole_numbers_in_K_are_not_cut_to_zero():
    data = trajectory.to_json(trajectory.from_string("w-3"))
    for entry in data.values():
        entry["K"] = [[970, 0, 960], [0, 970, 540], [0, 0, 1]]
    K = trajectory.from_json(json.loads(json.dumps(data))).K_N33
    assert np.allclose(K[0], [[970 / 1920, 0, 0.5], [0, 970 / 1080, 0.5], [0, 0, 1]])
    assert np.allclose(camera.field_of_view(camera.normalised(DEFAULT_K)), (89.4, 58.2), atol=0.1)


@pytest.mark.parametrize("K, error", [
    ([[0, 0, 960], [0, 970, 540], [0, 0, 1]], NotFiniteError),
    ([[0.5, 0, 0], [0, 0.9, 0], [0, 0, 1]], NotFiniteError),
    ([[float("nan"), 0, 960], [0, 970, 540], [0, 0, 1]], NotFiniteError),
    ([[970, 0], [0, 970]], ShapeError),
    ([["970", "0", "960"], ["0", "970", "540"], ["0", "0", "1"]], DTypeError),
], ids=["no focal length", "no principal point", "nan", "2 x 2", "text"])
def test_impossible_intrinsics_are_named(K, error):
    with pytest.raises(error):
        camera.normalised(np.array(K))


@pytest.mark.parametrize("left", [1, 3, 15])
def test_too_few_poses_are_named(left):
    """One pose left used to be repeated in silence, others crashed."""
    path = trajectory.from_string(f"w-{left - 1}") if left > 1 else trajectory.from_string("")
    with pytest.raises(ShapeError, match="too short"):
        path.cut(16)
    assert len(path.cut(left)) == left


@pytest.mark.parametrize("data, error", [
    ([], DatasetError), ({}, DatasetError), ({"0": {"pose": 1}}, DatasetError),
    ({"0": {"w2c": np.eye(4).tolist(), "intrinsic": DEFAULT_K.tolist()},
      "1": {"extrinsic": np.eye(4).tolist(), "K": DEFAULT_K.tolist()}}, DatasetError),
    ({"0": {"extrinsic": [[10**400] * 4] * 4, "K": DEFAULT_K.tolist()}}, DatasetError),
    ({"0": {"extrinsic": [[1, 2], [3]], "K": []}}, DatasetError),
    ({"0": {"extrinsic": (2 * np.eye(4)).tolist(), "K": DEFAULT_K.tolist()}}, ActionError),
    ({"0": {"extrinsic": np.diag([1, 1, -1, 1]).tolist(), "K": DEFAULT_K.tolist()}}, ActionError),
], ids=["list", "empty", "no fields", "mixed layouts", "too large", "ragged", "scaled", "mirrored"])
def test_broken_pose_files_are_named(tmp_path, data, error):
    file = tmp_path / "poses.json"
    file.write_text(json.dumps(data))
    for source in (file, data):
        with pytest.raises(error):
            trajectory.from_json(source)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "absent.json"):
        with pytest.raises(DatasetError, match="cannot be read"):
            trajectory.from_json(tmp_path / name)
