"""Minari: what is exported comes back bit for bit; what cannot be kept exactly is refused."""

import sys

import numpy as np
import pytest

from worldgym.actions import ActionSpec
from worldgym.data.minari_io import export_minari, import_minari
from worldgym.data.store import Episodes
from worldgym.errors import DatasetError, MissingDependencyError

SPECS = {
    "discrete": ActionSpec.discrete(3, start=1),
    "multi_discrete": ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 4)),
    "multi_binary": ActionSpec(kind="multi_binary", shape=(5,), sizes=(5,)),
    "box": ActionSpec(kind="box", shape=(2,), low=(-0.1, 0.0), high=(1.0, 2.0)),
}


def record(spec, steps, seed, end, policy):
    rng = np.random.default_rng(seed or 0)
    if spec.kind == "box":
        actions = rng.uniform(spec.low, spec.high, (steps + 1, 2)).astype(np.float32)
    else:
        top = 2 if spec.kind == "multi_binary" else spec.sizes if spec.shape else spec.sizes[0]
        actions = rng.integers(spec.start, spec.start + np.asarray(top), (steps + 1, *spec.shape))
    rewards = rng.standard_normal(steps + 1).astype(np.float32)
    actions[0], rewards[0] = 0, 0
    flags = {k: np.zeros(steps + 1, bool) for k in ("terminated", "truncated")}
    if end:
        flags[end][-1] = True
    return {"frames": rng.integers(0, 256, (steps + 1, 32, 40, 3), dtype=np.uint8), **flags,
            "actions": actions, "rewards": rewards, "seed": seed, "policy": policy,
            "info_health": rng.standard_normal(steps + 1)}


def build(path, spec):
    store = Episodes.create(path, spec, (32, 40), 8.75, {"id": "Toy-v0", "kwargs": {"skip": 4}})
    store.append([record(spec, 3, 0, "terminated", "random"), record(spec, 1, 2**40, None, "a b")])
    store.append([record(spec, 12, None, "truncated", "random")])
    return store


@pytest.mark.parametrize("name", SPECS)
def test_round_trip_is_bit_exact(tmp_path, name):
    minari = pytest.importorskip("minari")
    store = build(tmp_path / "d", SPECS[name])
    path = export_minari(store, tmp_path / "m/data", "worldgym/toy-v0")
    again = import_minari(path, tmp_path / "again")
    assert (again.action, again.frame_hw, again.fps, again.env, again.seeds, again.policies) == (
        store.action, store.frame_hw, store.fps, store.env, store.seeds, store.policies)
    assert len(again) == 3 and again.fields == store.fields
    for i in range(3):
        one, two = store.episode(i), again.episode(i)
        assert one.keys() == two.keys()
        for key in store.fields:
            assert one[key].dtype == two[key].dtype and np.array_equal(one[key], two[key]), key
    seen = minari.MinariDataset(path)  # and Minari itself reads it
    assert seen.total_steps == 16 and not seen.storage.jpeg_encoding
    first = seen[0]
    assert np.array_equal(first.observations, store.episode(0)["frames"])
    assert np.array_equal(first.actions, store.episode(0)["actions"][1:])
    assert all(seen.observation_space.contains(o) for o in first.observations)


def foreign(tmp_path, **changes):
    """A data set that Minari wrote without us."""
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box, Dict, Discrete
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    tmp_path.joinpath("f").mkdir()
    image = Box(0, 255, (32, 40, 3), np.uint8)
    storage = MinariStorage.new(tmp_path / "f", Dict({"image": image, "time": Discrete(9)}),
                                Discrete(3), jpeg_encoding=False)
    storage.update_metadata({"dataset_id": "f-v0", "minari_version": minari.__version__,
                             "algorithm_name": "expert"})
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 40, 3), dtype=np.uint8)
    data = {
        "observations": {"image": frames, "time": np.arange(4)}, "actions": np.array([0, 2, 1]),
        "rewards": np.array([0.5, 0.25, -1.0]), "terminations": np.array([False, False, True]),
        "truncations": np.zeros(3, bool), "infos": None, **changes,
    }
    storage.update_episodes([EpisodeBuffer(id=0, seed=4, **data)])
    return frames


def test_import_of_a_foreign_data_set(tmp_path):
    frames = foreign(tmp_path)
    store = import_minari(tmp_path / "f", tmp_path / "d", fps=10, observation_key="image")
    episode = store.episode(0)
    assert np.array_equal(episode["frames"], frames)
    assert episode["actions"].tolist() == [0, 0, 2, 1]
    assert episode["rewards"].tolist() == [0, 0.5, 0.25, -1]
    assert episode["terminated"].tolist() == [False, False, False, True]
    assert (episode["seed"], episode["policy"], store.fps) == (4, "expert", 10)
    assert store.env["minari"] == "f-v0"


@pytest.mark.parametrize("changes, arguments, message", [
    ({}, {"fps": None}, "frames per second"),
    ({}, {"observation_key": None}, "not RGB"),
    ({}, {"observation_key": "time"}, "not RGB"),
    ({"rewards": np.full(3, 0.1)}, {}, "float32 cannot hold the rewards"),
    ({"infos": {"deep": {"x": np.zeros(4)}}}, {}, "info cannot be imported"),
    ({"infos": {"short": np.zeros(3)}}, {}, "info cannot be imported"),
    ({"infos": {"one": 3.0}}, {}, "info cannot be imported"),
])
def test_what_cannot_be_kept_is_refused(tmp_path, changes, arguments, message):
    foreign(tmp_path, **changes)
    arguments = {"fps": 10, "observation_key": "image", **arguments}
    with pytest.raises(DatasetError, match=message):
        import_minari(tmp_path / "f", tmp_path / "d", **arguments)
    assert not (tmp_path / "d").exists()
    if changes:
        arguments |= {"infos": False, "round_floats": True}
        assert len(import_minari(tmp_path / "f", tmp_path / "e", **arguments)) == 1


def test_bad_paths_and_names(tmp_path):
    pytest.importorskip("minari")
    store = build(tmp_path / "d", SPECS["discrete"])
    with pytest.raises(DatasetError, match="cannot export"):
        export_minari(store, tmp_path / "d", "toy-v0")
    with pytest.raises(DatasetError, match="bad Minari data set id"):
        export_minari(store, tmp_path / "m", "toy!")
    with pytest.raises(DatasetError, match="not a Minari data set"):
        import_minari(tmp_path / "nothing", tmp_path / "e")


def test_without_minari(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'worldgym\[minari\]'"):
        import_minari(tmp_path / "m", tmp_path / "d")
    with pytest.raises(MissingDependencyError):
        export_minari(build(tmp_path / "d", SPECS["box"]), tmp_path / "m", "toy-v0")
