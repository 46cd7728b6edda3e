"""Episode store and samplers: round trips, killed appends, broken files, bounds, ranks."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from worldgym.actions import ActionSpec
from worldgym.data.chunks import ChunkSampler, OutcomeSampler
from worldgym.data.store import Episodes
from worldgym.errors import ActionError, ConfigError, DatasetError

HW = (4, 6)
BOX = ActionSpec(kind="box", shape=(2,), low=(-1.0, 0.0), high=(1.0, 2.0))
SPECS = {
    "discrete": ActionSpec.discrete(3),
    "from five": ActionSpec.discrete(3, start=5),
    "multi_discrete": ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 4)),
    "multi_binary": ActionSpec(kind="multi_binary", shape=(5,), sizes=(5,)),
    "box": BOX,
}


def record(steps, seed=0, spec=SPECS["discrete"], end="terminated", **extra):
    """One made-up episode; frames are noise, rewards are 1 .. steps."""
    rng = np.random.default_rng(seed)
    if spec.kind == "box":
        actions = rng.uniform(spec.low, spec.high, (steps + 1, 2)).astype(np.float32)
    else:
        top = 2 if spec.kind == "multi_binary" else np.asarray(spec.sizes)
        if spec.shape == ():
            top = int(spec.sizes[0])
        actions = rng.integers(spec.start, spec.start + top, (steps + 1, *spec.shape))
    actions[0] = 0
    flags = {k: np.zeros(steps + 1, bool) for k in ("terminated", "truncated")}
    if end:
        flags[end][-1] = True
    return {
        "frames": rng.integers(0, 256, (steps + 1, *HW, 3), dtype=np.uint8), "actions": actions,
        "rewards": np.arange(steps + 1, dtype=np.float32), **flags, "seed": seed,
        "policy": f"policy{seed % 2}", **extra,
    }


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == b[key].dtype and np.array_equal(value, b[key]), key
        else:
            assert value == b[key], key


def build(path, lengths=((3, 1, 9), (5,), (2, 7)), ends=("terminated", "truncated", None)):
    store = Episodes.create(path, SPECS["discrete"], HW, 8.75, {"id": "Toy-v0", "frame_skip": 4})
    made, n = [], 0
    for shard in lengths:
        batch = []
        for steps in shard:
            batch.append(record(steps, seed=n, end=ends[n % len(ends)]))
            n += 1
        store.append(batch)
        made += batch
    return store, made


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture
def data(original, tmp_path):
    return Episodes.open(shutil.copytree(original[0].path, tmp_path / "d")), original[1]


# ---- store


def test_round_trip_across_shards(data):
    store, made = data
    again = Episodes.open(store.path)
    for s in (store, again, pickle.loads(pickle.dumps(store))):
        assert (len(s), s.steps, s.rows) == (6, 27, 33)
        assert s.lengths.tolist() == [3, 1, 9, 5, 2, 7]
        assert s.starts.tolist() == [0, 4, 6, 16, 22, 25]
        assert s.seeds == list(range(6)) and s.policies == ["policy0", "policy1"] * 3
        assert s.action == SPECS["discrete"] and s.frame_hw == HW and s.fps == 8.75
        assert s.env == {"id": "Toy-v0", "frame_skip": 4}
        for i, episode in enumerate(made):
            same(s.episode(i), episode)
        same(s.episode(-1), made[-1])
        s.verify()


@pytest.mark.parametrize("name", SPECS)
def test_every_action_kind(tmp_path, name):
    store = Episodes.create(tmp_path / "d", SPECS[name], HW, 10, {})
    episode = record(6, spec=SPECS[name], info_health=np.arange(7, dtype=np.float32))
    assert store.append([episode]) == range(0, 1)
    store = Episodes.open(store.path)
    same(store.episode(0), episode)
    assert store.action == SPECS[name] and "info_health" in store.fields


def test_take_reads_any_order_and_shape(data):
    store, made = data
    flat = {k: np.concatenate([e[k] for e in made]) for k in store.fields}
    rows = np.random.default_rng(0).integers(0, store.rows, (5, 7))
    for field, whole in flat.items():
        assert np.array_equal(store.take(field, rows), whole[rows])
    assert store.take("frames", np.zeros((0, 3), int)).shape == (0, 3, *HW, 3)
    assert store.take("rewards", 2) == 2.0


def test_memory_maps_are_read_only(data):
    with pytest.raises(ValueError):
        data[0].episode(0)["frames"][0] = 1


def test_split_is_stable_when_data_grows(data):
    store, _ = data
    train, held = store.split(0.3, seed=4)
    assert len(train) and len(held) and sorted([*train, *held]) == list(range(6))
    assert [a.tolist() for a in store.split(0.3, seed=4)] == [train.tolist(), held.tolist()]
    store.append([record(2, seed=i) for i in range(200)])
    train2, held2 = store.split(0.3, seed=4)
    assert set(train) <= set(train2) and set(held) <= set(held2)
    assert 0.15 < len(held2) / len(store) < 0.45
    for bad in (0.0, 1.0, -1):
        with pytest.raises(DatasetError, match="hold"):
            store.split(bad)


def test_two_handles_append_in_turn(data):
    one, two = data[0], Episodes.open(data[0].path)
    assert one.append([record(2)]) == range(6, 7)
    assert two.append([record(3), record(4)]) == range(7, 9)
    assert Episodes.open(one.path).lengths.tolist() == [3, 1, 9, 5, 2, 7, 2, 3, 4]


def die_before(stop, store, episodes):
    """Append in a child process that dies, without any clean-up, before disk operation ``stop``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = iter(range(stop - 1, -1, -1))

    def counted(real):
        return lambda *args, **kwargs: real(*args, **kwargs) if next(left, 0) else os._exit(9)

    try:
        for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"),
                             (np.lib.format, "write_array_header_1_0")):
            setattr(module, name, counted(getattr(module, name)))
        store.append(episodes)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_append_killed_anywhere_leaves_the_old_or_the_new_data(data, tmp_path):
    outcomes = []
    for stop in range(1, 18):
        path = shutil.copytree(data[0].path, tmp_path / f"d{stop}")
        code = die_before(stop, Episodes.open(path), [record(5, seed=50), record(6, seed=51)])
        after = Episodes.open(path)
        outcomes.append((code, len(after)))
        same(after.episode(1), data[1][1])
        new = record(4, seed=99)
        after.append([new])  # clears what the killed process left
        same(Episodes.open(path).episode(len(after) - 1), new)
        left = {p.name for p in path.iterdir()} - {"index.json", ".lock"}
        assert left == {f"shard-{i:05d}" for i in range(len(left))}
    assert outcomes == [(9, 6)] * 15 + [(9, 8), (0, 8)]  # the index decides, at os.replace


def test_failed_append_changes_nothing(data):
    store, _ = data
    before = sorted(p.name for p in store.path.iterdir())
    with pytest.raises(DatasetError):
        store.append([record(3), record(3) | {"rewards": np.zeros(9, np.float32)}])
    assert sorted(p.name for p in store.path.iterdir()) == before and len(store) == 6


BAD_EPISODES = {
    "dtype of frames": (lambda e: e.update(frames=e["frames"] / 255), "frames has the wrong dtype"),
    "dtype of rewards": (lambda e: e.update(rewards=e["rewards"].astype(float)), "float64"),
    "dtype of flags": (lambda e: e.update(terminated=e["terminated"] * 1), "terminated has the wr"),
    "float actions": (lambda e: e.update(actions=e["actions"] * 1.0), "actions has the wrong dt"),
    "objects": (lambda e: e.update(actions=e["actions"].astype(object)), "object"),
    "frame size": (lambda e: e.update(frames=e["frames"][:, :2]), "frames has the wrong shape"),
    "ragged": (lambda e: e.update(actions=e["actions"][:-1]), "actions has the wrong shape"),
    "no step": (lambda e: e.update({k: v[:1] for k, v in e.items() if k not in ("seed", "policy")}),
                "T >= 1"),
    "missing field": (lambda e: e.pop("truncated"), "wrong fields"),
    "unknown field": (lambda e: e.update(info_new=np.zeros(4)), "wrong fields"),
    "seed": (lambda e: e.update(seed="7"), "seed or policy"),
    "early end": (lambda e: e["terminated"].__setitem__(1, True), "before the last row"),
    "first row": (lambda e: e["actions"].__setitem__(0, 1), "not a reset row"),
    "NaN": (lambda e: e["rewards"].__setitem__(2, np.nan), "not finite"),
    "action range": (lambda e: e["actions"].__setitem__(2, 3), "outside its space"),
}


@pytest.mark.parametrize("name", BAD_EPISODES)
def test_bad_episode_is_refused(data, name):
    spoil, message = BAD_EPISODES[name]
    episode = record(3)
    spoil(episode)
    with pytest.raises((DatasetError, ActionError), match=message) as caught:
        data[0].append([episode])
    assert caught.value.fix and len(Episodes.open(data[0].path)) == 6


def edit(change):
    def spoil(path):
        index = json.loads((path / "index.json").read_text())
        change(index)
        (path / "index.json").write_text(json.dumps(index))
    return spoil


def cut(name, drop):
    def spoil(path):
        file = path / "shard-00001" / name
        os.truncate(file, file.stat().st_size - drop if drop else 0)
    return spoil


def put(name, array):
    return lambda path: np.save(path / "shard-00001" / name, array)


BROKEN = {
    "no index": (lambda p: (p / "index.json").unlink(), "no data set here"),
    "empty index": (lambda p: (p / "index.json").write_text(""), "not JSON"),
    "half an index": (lambda p: os.truncate(p / "index.json", 90), "not JSON"),
    "list": (lambda p: (p / "index.json").write_text("[]"), "unknown data set format"),
    "format": (edit(lambda i: i.update(format=2)), "format 2"),
    "no action": (edit(lambda i: i.pop("action")), "description .* inconsistent"),
    "odd action": (edit(lambda i: i["action"].update(kind="text")), "unknown action kind"),
    "frame_hw": (edit(lambda i: i.update(frame_hw=[4])), "description .* inconsistent"),
    "fps": (edit(lambda i: i.update(fps=0)), "fps 0"),
    "info object": (edit(lambda i: i.update(info={"info_x": ["O", []]})), "bad extra field"),
    "shards": (edit(lambda i: i.update(shards={})), "shards is not a list"),
    "rows": (edit(lambda i: i["shards"][1].update(rows=7)), "cover 6 of 7 rows"),
    "overlap": (edit(lambda i: i["shards"][0]["episodes"][1].__setitem__(0, 3)), "at row 4"),
    "steps": (edit(lambda i: i["shards"][1]["episodes"][0].__setitem__(1, 0)), "shard .* incons"),
    "climbs out": (edit(lambda i: i["shards"][1].update(name="../d")), "shard .* inconsistent"),
    "no file": (lambda p: (p / "shard-00001/rewards.npy").unlink(), "is missing"),
    "empty file": (cut("rewards.npy", 0), "not a .npy array"),
    "not npy": (lambda p: (p / "shard-00001/rewards.npy").write_bytes(b"x" * 99), "not a .npy"),
    "short file": (cut("frames.npy", 1), "truncated: got shard-00001/frames.npy"),
    "long file": (lambda p: (p / "shard-00001/frames.npy").open("ab").write(b"x"), "trailing"),
    "wrong dtype": (put("rewards.npy", np.zeros(6)), "float64"),
    "wrong shape": (put("frames.npy", np.zeros((6, 4, 5, 3), np.uint8)), "does not match"),
    "objects": (put("actions.npy", np.array([{}] * 6, object)), "object"),
    "Fortran": (put("frames.npy", np.asfortranarray(np.zeros((6, *HW, 3), np.uint8))), "C order"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_set_is_refused(data, name):
    spoil, message = BROKEN[name]
    spoil(data[0].path)
    with pytest.raises(DatasetError, match=message) as caught:
        Episodes.open(data[0].path)
    assert caught.value.fix and "Fix: " in str(caught.value)


def test_verify_reads_the_flags(data):
    path = data[0].path / "shard-00001/terminated.npy"
    np.save(path, np.array([0, 1, 0, 0, 0, 0], bool))
    with pytest.raises(DatasetError, match="episode 3, row 1"):
        Episodes.open(data[0].path).verify()


def test_bad_arguments(data, tmp_path):
    store, _ = data
    with pytest.raises(DatasetError, match="not empty"):
        Episodes.create(store.path, BOX, HW, 1, {})
    with pytest.raises(DatasetError, match="JSON"):
        Episodes.create(tmp_path / "e", BOX, HW, 1, {"x": object()})
    assert not (tmp_path / "e").exists()
    with pytest.raises(DatasetError, match="nothing to append"):
        store.append([])
    with pytest.raises(DatasetError, match="no such episode"):
        store.episode(6)
    with pytest.raises(DatasetError, match="no such field"):
        store.take("reward", [0])
    for rows, message in (([33], "out of range"), ([-1], "out of range"), ([0.5], "not integers"),
                          (np.ones(33, bool), "not integers")):
        with pytest.raises(DatasetError, match=message):
            store.take("rewards", rows)


def test_an_empty_data_set_opens_but_gives_nothing(tmp_path):
    store = Episodes.create(tmp_path / "d", BOX, HW, 1, {})
    assert (len(store), store.steps, store.rows) == (0, 0, 0)
    with pytest.raises(DatasetError):
        store.split()
    with pytest.raises(DatasetError, match="no such episodes"):
        ChunkSampler(store, np.arange(0), 1, 1)


# ---- samplers


def owner(store, rows):
    return np.searchsorted(store.starts, rows, side="right") - 1


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_windows_stay_inside_and_cover_everything(data, length, drop):
    store, made = data
    latents = np.random.default_rng(1).random((store.rows, 2), np.float32)
    sampler = ChunkSampler(store, np.arange(6), length, 64, 3, drop, with_frames=True,
                           extra={"latents": latents})
    seen = set()
    for i in range(30):
        batch = sampler(i)
        rows = batch["rows"]
        assert rows.shape == (64, length) and (np.diff(rows, axis=1) == 1).all()
        episode = owner(store, rows)
        assert (episode == episode[:, :1]).all()
        assert np.array_equal(batch["null"], np.isin(rows, store.starts))
        for k in ("actions", "rewards", "terminated", "frames"):
            assert np.array_equal(batch[k], np.concatenate([e[k] for e in made])[rows])
        assert np.array_equal(batch["latents"], latents[rows])
        assert not (drop and batch["terminated"].any())
        seen |= set(rows[:, 0].tolist())
    terminated = np.array([bool(e["terminated"][-1]) for e in made])
    usable = store.lengths + 1 - (terminated & drop)
    want = [range(s, s + u - length + 1) for s, u in zip(store.starts, usable, strict=True)]
    assert seen == {r for part in want for r in part} and len(sampler) == len(seen)


@pytest.mark.parametrize("past", [1, 3])
def test_outcomes_hold_the_past_and_the_next_row(data, past):
    store, made = data
    ids = np.array([0, 2, 5])
    sampler = OutcomeSampler(store, ids, past, 32, 1, with_frames=True)
    rewards = np.concatenate([e["rewards"] for e in made])
    seen = set()
    for i in range(30):
        batch = sampler(i)
        rows, last = batch["rows"], batch["rows"][:, -1]
        episode = owner(store, last)
        assert np.isin(episode, ids).all() and (owner(store, last + 1) == episode).all()
        for b, t in enumerate(last):
            past_rows = [max(store.starts[episode[b]], t - k) for k in range(past - 1, -1, -1)]
            assert rows[b].tolist() == past_rows and batch["length"][b] == len(set(past_rows))
        assert np.array_equal(batch["rewards"], rewards[last + 1])
        assert np.array_equal(batch["actions"], store.take("actions", last + 1))
        assert np.array_equal(batch["terminated"], store.take("terminated", last + 1))
        assert batch["frames"].shape == (32, past, *HW, 3)
        seen |= set(last.tolist())
    assert len(seen) == len(sampler) == store.lengths[ids].sum()


def test_soon_is_known_from_the_recording(data):
    store, made = data
    sampler, ahead = OutcomeSampler(store, np.arange(len(made)), 1, 32, 1, ahead=2), 2
    ended, seen = store.take("terminated", np.arange(store.rows)), set()
    for i in range(30):
        batch = sampler(i)
        newest = batch["rows"][:, -1]
        for t, e, soon in zip(newest, owner(store, newest), batch["soon"], strict=True):
            last = store.starts[e] + store.lengths[e]
            next_rows = ended[t + 1:min(t + ahead, last) + 1]
            assert soon == (1 if next_rows.any() else 0 if len(next_rows) == ahead else -1)
            seen.add(int(soon))
    assert seen == {0, 1, -1}
    assert "soon" not in OutcomeSampler(store, np.arange(len(made)), 1, 8)(0)


@pytest.mark.parametrize("make", [ChunkSampler, OutcomeSampler])
def test_batches_depend_on_seed_and_iteration_alone(data, make):
    store, args = data[0], (np.arange(6), 2, 10)
    one, two = make(store, *args, seed=5), make(Episodes.open(store.path), *args, seed=5)
    later = one(7)
    one(0)
    same(later, one(7))
    same(later, two(7))
    assert not np.array_equal(later["rows"], one(8)["rows"])
    assert not np.array_equal(later["rows"], make(store, *args, seed=6)(7)["rows"])
    for n in (2, 3, 10):  # ranks share the batch
        parts = [make(store, *args, seed=5, rank=r, world_size=n)(7) for r in range(n)]
        same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, later)


def test_sampler_refuses_nonsense(data):
    store, every = data[0], np.arange(6)
    for kwargs in ({"rank": 2, "world_size": 2}, {"world_size": 9}, {"seed": -1}, {"length": 0}):
        with pytest.raises(ConfigError):
            ChunkSampler(store, **{"ids": every, "length": 2, "batch": 8, **kwargs})
    with pytest.raises(ConfigError):
        OutcomeSampler(store, every, 0, 8)
    for ids in ([], [6], [-1], [0.5]):
        with pytest.raises(DatasetError, match="no such episodes"):
            ChunkSampler(store, ids, 2, 8)
    with pytest.raises(DatasetError, match="nothing to sample"):
        ChunkSampler(store, every, 99, 8)
    with pytest.raises(DatasetError, match="33 rows"):
        ChunkSampler(store, every, 2, 8, extra={"latents": np.zeros(32)})
