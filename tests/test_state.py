"""World states as values: snapshot, fork, select, join, replace, files, and refused misuse."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldgym import checkpoint
from worldgym.errors import (
    CheckpointError,
    MemoryBudgetError,
    ShapeError,
    SlotError,
    StateError,
    WorldGymError,
)
from worldgym.models import nano
from worldgym.state import WorldState

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from engine_tools import all_bytes, begin, bytes_of, column, pages_used, play, start  # noqa: E402
from state_fuzz import outcome  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return nano.tiny()


@pytest.fixture(autouse=True)
def nothing_leaks(world):
    before = pages_used(world)
    yield
    assert pages_used(world) <= before


# ------------------------------------------------------------------------- values


def test_snapshot_restores_and_survives_release(world):
    state, _ = play(world, begin(world), 3)
    kept, used = state.snapshot(), pages_used(world)
    assert kept is not state and all_bytes(kept) == all_bytes(state)
    _, first = play(world, state, 4, 3)
    state.release()
    assert pages_used(world) == used  # shared, still held by the snapshot
    _, again = play(world, kept, 4, 3)
    assert first == again


def test_old_states_stay_good(world):
    states, told = [begin(world)], []
    for number in range(6):
        new, result = play(world, states[-1], 1, number)
        states.append(new)
        told.append(result)
    for number in (4, 0, 2):
        _, again = play(world, states[number], 1, number)
        assert again == told[number]


def test_fork_copies_are_equal_and_share_pages(world):
    state, _ = play(world, begin(world), 2)
    before, used = all_bytes(state), pages_used(world)
    copies = state.fork(3, [2, 0])
    assert pages_used(world) == used and copies.num_slots == 6
    assert all_bytes(copies) == [before[2]] * 3 + [before[0]] * 3
    new, chunk = world.step(copies, [1] * 6)
    results = [outcome(chunk, i) for i in range(6)]
    assert results[0] == results[1] == results[2] != results[3] == results[4] == results[5]
    assert bytes_of(new, 0) == bytes_of(new, 2)
    _, other = world.step(copies, [0, 1, 2, 0, 1, 2])
    assert len({outcome(other, i) for i in range(6)}) == 6
    assert all_bytes(state) == before and all_bytes(copies) == [before[2]] * 3 + [before[0]] * 3


def test_fresh_forks_have_noise_of_their_own(world):
    state, _ = play(world, begin(world, 2), 2)
    before = all_bytes(state)
    copies = state.fork(3, fresh=True)
    again = copies.fork(2, fresh=True)
    for forked, count in ((copies, 6), (again, 12)):
        _, chunk = world.step(forked, [1] * count)
        _, parent = world.step(state, [1, 1])
        results = [outcome(chunk, i)[0] for i in range(count)]
        assert len({*results, outcome(parent, 0)[0], outcome(parent, 1)[0]}) == count + 2
        _, repeat = world.step(state.fork(3, fresh=True), [1] * 6)
        if count == 6:
            assert [outcome(repeat, i)[0] for i in range(6)] == results
    keys = np.concatenate([s.keys_B4 for s in (state, copies, again)])
    assert len(np.unique(keys, axis=0)) == len(keys)
    assert all_bytes(state) == before


def test_fork_of_a_fork_of_many_has_no_equal_keys(world):
    state = begin(world, 1)
    deep = state.fork(20, fresh=True).fork(20, fresh=True).fork(10, fresh=True)
    assert len(np.unique(deep.keys_B4[:, 3] & 0xFFFFFFFF)) == 4000  # the bits that noise reads


def test_select_join_replace(world):
    state, _ = play(world, begin(world, 4), 3)
    before = all_bytes(state)
    assert all_bytes(state.select([3, 1])) == [before[3], before[1]]
    assert all_bytes(state.select(np.array([True, False, True, False]))) == [before[0], before[2]]
    fresh = world.begin(start(world, 1, slots=2), [8, 9])  # shorter tables
    joined = WorldState.join([state, fresh, state.select([0])])
    assert all_bytes(joined) == before + all_bytes(fresh) + [before[0]]
    new = state.replace([3, 0], fresh)
    f = all_bytes(fresh)
    assert all_bytes(new) == [f[1], before[1], before[2], f[0]]
    assert all_bytes(state) == before
    _, told = play(world, joined, 2)
    _, alone = play(world, state, 2)
    assert column(told, 1) == column(alone, 1)


def test_states_cannot_be_written_by_accident(world):
    state = begin(world)
    for array in (state.seed_B, state.step_B, state.tables.pages_BP, state.tables.frames_BP):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    with pytest.raises(AttributeError):
        state.no_such_thing


def test_pages_go_back_with_release_or_forgetting(world):
    state, _ = play(world, begin(world, 2), 3)
    copies, base = state.fork(4), pages_used(world)
    after, _ = world.step(copies, [0] * 8)
    assert pages_used(world) == base + 8
    after.release()
    after.release()  # harmless
    assert pages_used(world) == base
    del copies
    state.release()
    assert pages_used(world) == 0


def test_forgetting_a_cycle_inside_pool_calls_is_safe(world):
    """The garbage collector may run a finalizer in the middle of any pool call."""
    gc.set_threshold(5, 100_000, 100_000)
    try:
        state = begin(world, 2)
        for number in range(5):
            loop = [state.fork(2)]
            loop.append(loop)
            state, _ = world.step(state, [0, 1])
            del loop
    finally:
        gc.set_threshold(700, 10, 10)
    pages = state.tables.pages_BP
    assert pages_used(world) == len(np.unique(pages[pages >= 0])) == world.pool.refs.sum()


# ------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("use", [
    lambda w, s: w.step(s, [0, 1, 2]), lambda w, s: w.restart(s, [0], start(w)),
    lambda w, s: s.snapshot(), lambda w, s: s.fork(2), lambda w, s: s.select([0]),
    lambda w, s: WorldState.join([s]), lambda w, s: s.replace([0], begin(w, 1)),
    lambda w, s: begin(w, 1).replace([0], s.select([0])),
    lambda w, s: s.save("never.safetensors"),
])
def test_released_states_are_refused(world, use):
    state = begin(world)
    state.release()
    with pytest.raises(StateError, match="released"):
        use(world, state)
    assert "released" in repr(state) and not Path("never.safetensors").exists()


@pytest.mark.parametrize("use,error", [
    (lambda s: s.fork(0), SlotError), (lambda s: s.fork(1.5), SlotError),
    (lambda s: s.fork(True), SlotError), (lambda s: s.fork(2, [7]), SlotError),
    (lambda s: s.select([]), SlotError), (lambda s: s.select([0, 0]), SlotError),
    (lambda s: s.select(1), SlotError), (lambda s: s.select("all"), SlotError),
    (lambda s: s.select([True, False]), SlotError), (lambda s: WorldState.join([]), SlotError),
    (lambda s: s.replace([0, 1], s.select([0])), ShapeError),
    (lambda s: WorldState.join([s, begin(nano.tiny(1))]), StateError),
    (lambda s: WorldState.join([s, begin(nano.tiny())]), StateError),
])
def test_impossible_calls_are_refused(world, use, error):
    state = begin(world)
    before, used = all_bytes(state), pages_used(world)
    with pytest.raises(error) as info:
        use(state)
    assert isinstance(info.value, WorldGymError)
    assert all_bytes(state) == before and pages_used(world) == used


# ------------------------------------------------------------------------- files

OTHER_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from engine_tools import play
from worldgym.models import nano
from worldgym.state import WorldState
import hashlib
world = nano.tiny()
state = WorldState.load({path!r}, world)
print(hashlib.sha256(repr(play(world, state, 4, 3)[1]).encode()).hexdigest())
"""


def test_a_state_goes_on_in_another_process(world, tmp_path):
    import hashlib

    state, _ = play(world, begin(world, seeds=[5, -3, 2**40]), 3)
    path = str(tmp_path / "state.safetensors")
    state.save(path)
    _, told = play(world, state, 4, 3)
    want = hashlib.sha256(repr(told).encode()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS.format(tests=str(ROOT), path=path)],
        capture_output=True, text=True, cwd=ROOT.parent, timeout=280)
    assert done.stdout.strip() == want, done.stderr


def test_save_and_load_keep_every_byte(world, tmp_path):
    path = tmp_path / "state.safetensors"
    mixed = WorldState.join([begin(world, 2), world.begin(start(world, 1), [7])]).fork(
        2, fresh=True)
    new = world.begin(start(world, 1, slots=2), [1, 2])  # no pages at all
    for state in (mixed, new, play(world, mixed, 6)[0]):
        state.save(path)
        used = pages_used(world)
        loaded = WorldState.load(path, world)
        real = state.tables.pages_BP[state.tables.pages_BP >= 0]
        assert pages_used(world) == used + len(np.unique(real))  # sharing is kept
        assert all_bytes(loaded) == all_bytes(state)
        assert play(world, loaded, 2)[1] == play(world, state, 2)[1]
        del loaded


def change(tensors, **new):
    tensors.update({k.replace("__", "."): v for k, v in new.items()})


BAD_FILES = {
    "history of another length": lambda t: change(t, history=t["history"][:, 1:]),
    "history of other channels": lambda t: change(t, history=t["history"][:, :, 1:]),
    "fewer pending": lambda t: change(t, pending=t["pending"][1:]),
    "fewer tables": lambda t: change(t, tables__pages=t["tables.pages"][1:],
                                     tables__frames=t["tables.frames"][1:]),
    "narrow frames": lambda t: change(t, tables__frames=t["tables.frames"][:, 1:]),
    "page that is not there": lambda t: change(t, tables__pages=t["tables.pages"] + 1000),
    "page without a frame": lambda t: change(t, tables__frames=t["tables.frames"] * 0 - 1),
    "fewer counters": lambda t: change(t, seed_B=t["seed_B"][1:]),
    "counters of another kind": lambda t: change(t, step_B=t["step_B"].float()),
    "impossible length": lambda t: change(t, lengths_B=t["lengths_B"] * 0),
    "one page too few": lambda t: change(t, pages__v__1=t["pages.v.1"][1:]),
    "half precision": lambda t: change(t, pages__k__1=t["pages.k.1"].half()),
    "NaN history": lambda t: change(t, history=t["history"] * float("nan")),
    "NaN pages": lambda t: change(t, pages__k__0=t["pages.k.0"] * float("nan")),
    "no history": lambda t: t.pop("history"),
    "no layer": lambda t: t.pop("pages.v.1"),
    "no seeds": lambda t: t.pop("seed_B"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_misshaped_files_are_refused(world, tmp_path, name):
    path, state = tmp_path / "state.safetensors", begin(world)
    state.save(path)
    tensors, header = checkpoint.load_tensors(path)
    tensors = {k: v.clone() for k, v in tensors.items()}
    BAD_FILES[name](tensors)
    checkpoint.save(path, tensors, header, check_finite=False)
    before, used = all_bytes(state), pages_used(world)
    with pytest.raises(CheckpointError):
        WorldState.load(path, world)
    assert all_bytes(state) == before and pages_used(world) == used


@pytest.mark.parametrize("header,error", [
    ({}, CheckpointError), ({"kind": "worldgym.nano"}, CheckpointError),
    ({"kind": "worldgym.state", "format": 99}, CheckpointError),
    ({"kind": "worldgym.state", "format": 1}, StateError),
    ({"kind": "worldgym.state", "format": 1, "fingerprint": "other"}, StateError),
])
def test_other_headers_are_refused(world, tmp_path, header, error):
    path, state = tmp_path / "state.safetensors", begin(world)
    state.save(path)
    checkpoint.save(path, checkpoint.load_tensors(path)[0], header)
    with pytest.raises(error):
        WorldState.load(path, world)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_truncated_files_are_refused(world, tmp_path, keep):
    path = tmp_path / "state.safetensors"
    begin(world).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        WorldState.load(path, world)


def test_missing_files_and_other_worlds_are_refused(world, tmp_path):
    with pytest.raises(CheckpointError):
        WorldState.load(tmp_path / "none.safetensors", world)
    begin(world).save(tmp_path / "state.safetensors")
    with pytest.raises(StateError, match="another world"):
        WorldState.load(tmp_path / "state.safetensors", nano.tiny(1))


def test_no_room_for_a_loaded_state(world, tmp_path):
    begin(world).save(tmp_path / "state.safetensors")
    small = nano.tiny()
    small.pool.max_pages = 2
    with pytest.raises(MemoryBudgetError):
        WorldState.load(tmp_path / "state.safetensors", small)
    assert pages_used(small) == 0


def test_states_share_nothing_that_torch_writes(world):
    state, _ = play(world, begin(world), 2)
    before, copy = all_bytes(state), state.snapshot()
    copy.history_BKChw.zero_()
    assert all_bytes(state) == before and torch.isfinite(state.latents_BCHW).all()
