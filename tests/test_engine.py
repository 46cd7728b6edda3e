"""The engine's promises on a random tiny world: replay, batch invariance, isolation, refusal."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import worldgym.engine
from worldgym.actions import ActionSpec
from worldgym.engine import World
from worldgym.errors import (
    ActionError,
    ConfigError,
    DTypeError,
    MemoryBudgetError,
    NotFiniteError,
    ShapeError,
    SlotError,
    StateError,
    WorldGymError,
)
from worldgym.memory import PagePool
from worldgym.models import nano
from worldgym.models.codec import CodecConfig
from worldgym.noise import normal
from worldgym.uncertainty import fork_spread

sys.path.insert(0, str(Path(__file__).resolve().parent))
from engine_tools import (  # noqa: E402
    actions,
    all_bytes,
    begin,
    bytes_of,
    column,
    pages_used,
    play,
    start,
)
from state_fuzz import fuzz, outcome, random_starts  # noqa: E402

KINDS = {
    "discrete": ActionSpec.discrete(4, start=-1),
    "multi_discrete": ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 2)),
    "multi_binary": ActionSpec(kind="multi_binary", shape=(3,), sizes=(3,)),
    "box": ActionSpec(kind="box", shape=(2, 1), low=(-1.0, 0.0), high=(1.0, 5.0)),
}


@pytest.fixture(scope="module")
def world():
    return nano.tiny()


@pytest.fixture(autouse=True)
def nothing_leaks(world):
    before = pages_used(world)
    yield
    assert pages_used(world) <= before


# ------------------------------------------------------------------------- replay, invariance


def test_temperature_scales_the_noise_and_nothing_else():
    worlds = [nano.tiny(temperature=t) for t in (1.0, 1.0, 1.5)]
    seen = []
    for w in worlds:
        _, chunk = w.step(begin(w, 2), [0, 1])
        seen.append(chunk)
    assert torch.equal(seen[0].latents_BFChw, seen[1].latents_BFChw)
    assert not torch.allclose(seen[0].latents_BFChw, seen[2].latents_BFChw)
    assert np.array_equal(seen[0].end_probability_B, seen[2].end_probability_B)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="temperature"):
            nano.tiny(temperature=wrong)


def test_same_seed_same_bytes(world):
    _, first = play(world, begin(world), 6)
    torch.rand(3)
    _, again = play(world, begin(world), 6)
    assert first == again
    assert len({step[0][0] for step in first}) == 6  # it does move


def test_no_global_generator_is_touched(world):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    play(world, begin(world), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("slots", [[0], [4], [3, 1], [4, 2, 0, 3, 1]])
def test_a_slot_does_not_know_its_batch(world, slots):
    starts, slots = random_starts(world, 5, 0), np.array(slots)
    whole_state, whole = play(world, world.begin(starts, range(5)), 6)
    state, told = play(world, world.begin(starts.rows(slots), slots), 6, slots=slots)
    for row, slot in enumerate(slots):
        assert column(told, row) == column(whole, slot)
        assert bytes_of(state, row) == bytes_of(whole_state, slot)


def test_starts_without_context_and_padded_starts_are_the_same(world):
    """A start of one frame alone, or as the last of four of which three are absent."""
    short = start(world, 1)
    k = world.spec.context_frames
    long = start(world, k, latents_BKChw=torch.full((1, k, *world.spec.latent_chw), 1e6),
                 length_B=np.array([1]))
    long.latents_BKChw[:, -1] = short.latents_BKChw[:, -1]
    long.actions[:, -1] = short.actions[:, -1]
    _, a = play(world, world.begin(short, [5]), 3)
    _, b = play(world, world.begin(long, [5]), 3)
    assert a == b


def test_stepping_some_slots_leaves_the_others(world):
    state = begin(world, 4)
    before = all_bytes(state)
    every = actions(world, 8, 0)
    new, chunk = world.step(state, every[[2, 0]], [2, 0])
    assert chunk.slots.tolist() == [2, 0] and new.step_B.tolist() == [1, 0, 1, 0]
    assert bytes_of(new, 1) == before[1] and bytes_of(new, 3) == before[3]
    assert all_bytes(state) == before
    whole, told = play(world, state, 1)
    assert outcome(chunk, 0) == told[0][2] and outcome(chunk, 1) == told[0][0]
    assert bytes_of(new, 0) == bytes_of(whole, 0)
    mask, chunk = world.step(state, every[[1, 3]], np.array([False, True, False, True]))
    assert mask.step_B.tolist() == [0, 1, 0, 1]


def test_restart_touches_no_other_slot(world):
    state, _ = play(world, begin(world, 4), 3)
    before = all_bytes(state)
    new = world.restart(state, [3, 1], random_starts(world, 2, 7))
    assert bytes_of(new, 0) == before[0] and bytes_of(new, 2) == before[2]
    assert all_bytes(state) == before
    assert new.episode_B.tolist() == [0, 1, 0, 1] and new.seed_B.tolist() == [0, 1, 2, 3]
    assert new.step_B.tolist() == [3, 0, 3, 0]
    alone = world.begin(random_starts(world, 2, 7), [3, 1], [1, 1])
    assert [bytes_of(new, 3), bytes_of(new, 1)] == all_bytes(alone)
    _, told = play(world, new, 2)
    _, undisturbed = play(world, state, 2)
    assert column(told, 0) == column(undisturbed, 0)
    assert column(told, 1) != column(undisturbed, 1)


@pytest.mark.parametrize("change", ["seed", "episode", "branch", "action"])
def test_keys_and_actions_matter(world, change):
    one = random_starts(world, 1, 0)
    base = world.begin(one, [7], [2])
    other = {"seed": lambda: world.begin(one, [7 + 2**33], [2]),
             "episode": lambda: world.begin(one, [7], [3]),
             "branch": lambda: base.fork(1, fresh=True), "action": lambda: base}[change]()
    _, a = world.step(base, [1])
    _, b = world.step(other, [2 if change == "action" else 1])
    assert outcome(a, 0) != outcome(b, 0)


def test_step_number_matters(world, monkeypatch):
    seen = []
    monkeypatch.setattr(worldgym.engine, "normal",
                        lambda keys, *rest: seen.append(keys.copy()) or normal(keys, *rest))
    play(world, begin(world, 2, seeds=[5, 6], episodes=[1, 2]), 2)
    per_step = len(world.schedule)
    assert len(seen) == 2 * per_step
    assert seen[0].tolist() == [[5, 1, 0, 0], [6, 2, 0, 0]]
    assert seen[per_step].tolist() == [[5, 1, 1, 0], [6, 2, 1, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_action(kind):
    world = nano.tiny(action=KINDS[kind])
    state, told = play(world, begin(world, 3), 3)
    _, alone = play(world, begin(world, 3).select([1]), 3, slots=[1])
    assert column(told, 1) == column(alone, 0)
    for bad in (np.full((3, *world.spec.action.shape), 99), np.zeros((3, 7, 7))):
        with pytest.raises((ActionError, ShapeError)):
            world.step(state, bad)


# ------------------------------------------------------------------------- the network's view


def test_rollout_equals_teacher_forcing():
    """Cached steps give what the training forward gives on the whole sequence, past the window."""
    world = nano.tiny(steps=(1000.0,))
    starts, frames = start(world, 3, null_BK=np.array([[True, False, False]])), 8
    state = world.begin(starts, [3])
    clean, features = starts.latents_BKChw, [world._check_starts(starts)[1]]
    noise = torch.zeros(1, frames, *world.spec.latent_chw)
    for i in range(3, frames):
        noise[:, i] = normal(state.keys_B4, 0, world.spec.latent_chw)
        act = actions(world, 1, i)
        state, chunk = world.step(state, act)
        clean = torch.cat([clean, chunk.latents_BFChw], 1)
        features.append(world.features(act)[:, None])
    level = torch.ones(1, frames)
    with torch.no_grad():
        flow = world.dynamics(clean, torch.cat(features, 1), level, noise, 0 * level, noise)
    torch.testing.assert_close(noise[:, 3:] - flow[:, 3:], clean[:, 3:], atol=1e-5, rtol=0)


def test_cost_does_not_grow(world):
    state, used = begin(world, 1), []
    for _ in range(300):
        state, _ = world.step(state, [0])
        used.append((world.pool.stats()["pages_used"], world.pool.stats()["capacity"],
                     state.tables.pages_BP.shape, len(world.pool._buffers)))
    bound = world.stepper.policy.bound()
    assert len(set(used[10:])) == 1 and used[-1][0] <= bound
    assert state.step_B.tolist() == [300] and torch.isfinite(state.latents_BCHW).all()


def test_chunk(world):
    state = begin(world, 2)
    new, chunk = world.step(state, [0, 1])
    h, w = world.spec.frame_hw
    assert chunk.frames().shape == (2, 1, h, w, 3) and chunk.frames().dtype == torch.uint8
    assert chunk.frames() is chunk.frames()
    assert torch.equal(chunk.latents_BFChw[:, 0], new.latents_BCHW)
    assert chunk.reward_B.dtype == np.float32 and chunk.terminated_B.dtype == bool
    assert ((chunk.end_probability_B >= 0) & (chunk.end_probability_B <= 1)).all()
    chunk.latents_BFChw.zero_()  # a caller's own copy
    assert new.latents_BCHW.abs().sum() > 0
    per_frame, _ = world.step(state, [[0], [1]], per_frame=True)
    assert all_bytes(per_frame) == all_bytes(new)
    frames = chunk.frames()[:, 0]
    one = torch.cat([world.decode(world.encode(frames[i:i + 1])) for i in range(2)])
    both = world.decode(world.encode(frames))
    assert (one.int() - both.int()).abs().max() <= 1


def test_ends_follow_their_chance():
    world = nano.tiny(end_scale=1e9)  # the head's chance, cut off at 1
    state = begin(world, 3)
    _, chunk = world.step(state, [0, 1, 2])
    assert chunk.terminated_B.all() and (chunk.end_probability_B == 1).all()
    _, chunk = (never := nano.tiny(end_scale=0.0)).step(begin(never, 3), [0, 1, 2])
    assert not chunk.terminated_B.any()
    world = nano.tiny()
    state, ends, chances = begin(world, 8), 0, 0.0
    for i in range(40):
        state, chunk = world.step(state, actions(world, 8, i))
        ends, chances = ends + chunk.terminated_B.sum(), chances + chunk.end_probability_B.sum()
    assert abs(ends - chances) < 4 * np.sqrt(chances) + 1


def test_fork_spread(world):
    state, _ = play(world, begin(world, 3), 2)
    before = all_bytes(state)
    spread = fork_spread(world, state, [0, 1, 2])
    assert spread.shape == (3,) and spread.dtype == np.float32 and (spread > 0).all()
    assert np.array_equal(spread, fork_spread(world, state, [0, 1, 2]))
    alone = fork_spread(world, state.select([1]), [1])
    np.testing.assert_allclose(alone, spread[1:2], rtol=1e-5)
    assert all_bytes(state) == before
    for bad, error in (([0, 1], ShapeError), (0, ShapeError), ([0, 1, 9], ActionError)):
        with pytest.raises(error):
            fork_spread(world, state, bad)
    with pytest.raises(ConfigError):
        fork_spread(world, state, [0, 1, 2], forks=1)
    assert all_bytes(state) == before


# ------------------------------------------------------------------------- refusals


NAN = float("nan")
BAD_STEPS = {
    "too few actions": (lambda w, s: w.step(s, [0]), ShapeError),
    "scalar action": (lambda w, s: w.step(s, 0), ShapeError),
    "out of range": (lambda w, s: w.step(s, [0, 3]), ActionError),
    "fraction": (lambda w, s: w.step(s, [0.5, 1]), ActionError),
    "NaN action": (lambda w, s: w.step(s, [NAN, 1]), NotFiniteError),
    "text action": (lambda w, s: w.step(s, ["a", "b"]), ActionError),
    "None action": (lambda w, s: w.step(s, [None, 1]), ActionError),
    "no slots": (lambda w, s: w.step(s, [], []), SlotError),
    "same slot twice": (lambda w, s: w.step(s, [0, 0], [1, 1]), SlotError),
    "slot 2 of 2": (lambda w, s: w.step(s, [0], [2]), SlotError),
    "slot -1": (lambda w, s: w.step(s, [0], [-1]), SlotError),
    "slot 0.0": (lambda w, s: w.step(s, [0], [0.0]), SlotError),
    "ragged slots": (lambda w, s: w.step(s, [0], [[0], [1, 0]]), SlotError),
    "two frames": (lambda w, s: w.step(s, [[0, 0], [1, 1]], per_frame=True), ShapeError),
    "no frames": (lambda w, s: w.step(s, [0, 1], per_frame=True), ShapeError),
    "one start for two": (lambda w, s: w.restart(s, [0, 1], start(w)), ShapeError),
    "restart of slot 5": (lambda w, s: w.restart(s, [5], start(w)), SlotError),
    "restart with a bad seed": (lambda w, s: w.restart(s, [0], start(w), ["x"]), StateError),
    "another world": (lambda w, s: nano.tiny(1).step(s, [0, 0]), StateError),
    "another object": (lambda w, s: nano.tiny().step(s, [0, 0]), StateError),
    "another object's restart": (lambda w, s: nano.tiny().restart(s, [0], start(w)), StateError),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_refused_calls_leave_the_state_good(world, name):
    call, error = BAD_STEPS[name]
    state = begin(world, 2)
    before, used = all_bytes(state), pages_used(world)
    with pytest.raises(error) as info:
        call(world, state)
    assert isinstance(info.value, WorldGymError) and "Fix:" in str(info.value)
    assert all_bytes(state) == before and pages_used(world) == used
    world.step(state, [0, 1])


BAD_STARTS = {
    "NaN": (lambda w: dict(latents_BKChw=torch.full((1, 2, *w.spec.latent_chw), NAN)),
            NotFiniteError),
    "integers": (lambda w: dict(latents_BKChw=torch.zeros(1, 2, *w.spec.latent_chw).int()),
                 DTypeError),
    "wrong grid": (lambda w: dict(latents_BKChw=torch.zeros(1, 2, 4, 3, 3)), ShapeError),
    "no slots": (lambda w: dict(latents_BKChw=torch.zeros(0, 2, *w.spec.latent_chw)), ShapeError),
    "no length": (lambda w: dict(length_B=np.array([0])), ShapeError),
    "too long": (lambda w: dict(length_B=np.array([3])), ShapeError),
    "half a frame": (lambda w: dict(length_B=np.array([1.5])), ShapeError),
    "action missing": (lambda w: dict(actions=np.zeros((1, 1), int)), ShapeError),
    "flag missing": (lambda w: dict(null_BK=np.zeros((1, 1), bool)), ShapeError),
    "bad action": (lambda w: dict(actions=np.full((1, 2), 9)), ActionError),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_bad_starts_are_refused(world, name):
    change, error = BAD_STARTS[name]
    with pytest.raises(error):
        world.begin(start(world, **change(world)), [0])


def test_start_of_more_frames_than_fit(world):
    k = world.spec.context_frames
    assert world.begin(start(world, k), [0]).num_slots == 1
    latents = torch.zeros(1, k + 2, *world.spec.latent_chw)
    with pytest.raises(ShapeError, match="too long"):
        world.begin(start(world, latents_BKChw=latents), [0])


def test_lists_and_numpy_will_do_for_starts(world):
    plain = start(world)
    other = start(world, latents_BKChw=plain.latents_BKChw.numpy(), length_B=[2],
                  actions=plain.actions.tolist(), null_BK=[[0, 0]])
    assert all_bytes(world.begin(plain, [0])) == all_bytes(world.begin(other, [0]))


@pytest.mark.parametrize("seeds", [[0], [0.0, 1.0], ["a", "b"], [2**70, 0], None, [True, False],
                                   [[0], [1, 2]]])
def test_bad_seeds(world, seeds):
    with pytest.raises(StateError, match="seeds"):
        world.begin(start(world, slots=2), seeds)


def test_budget_is_refused_and_the_state_stays_good():
    cfg = nano.tiny()
    world = World(cfg.spec, cfg.codec, cfg.dynamics, cfg.outcome, cfg.stepper.policy, cfg.schedule,
                  fingerprint="x", max_pages=9)
    state = world.begin(start(world, 4, slots=2), [0, 1])  # 2 * 3 pages
    before = all_bytes(state)
    with pytest.raises(MemoryBudgetError):
        world.step(state.fork(2), [0] * 4)
    assert all_bytes(state) == before and pages_used(world) == 6
    state, _ = world.step(state, [0, 0])
    assert pages_used(world) == 8


def test_frames_that_do_not_split_into_patches_are_refused_at_once():
    with pytest.raises(ConfigError, match="divisible by 16"):
        nano.tiny(codec=CodecConfig(frame_hw=(40, 72), channels=4, width=8, deep_width=16))


# ------------------------------------------------------------------------- interruptions


class Stop(KeyboardInterrupt):
    pass


def fail_at(patch, thing, name, number):
    """Let the call of this number raise."""
    real, calls = getattr(thing, name), []

    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise Stop
        return real(*args, **options)

    patch.setattr(thing, name, wrapped)


PLACES = {
    "first pass": lambda w: (w.dynamics.dit.blocks[1], "forward", 1),
    "second pass": lambda w: (w.dynamics.dit.blocks[1], "forward", 2),
    "last layer": lambda w: (w.dynamics.dit.head, "forward", 2),
    "heads": lambda w: (w.outcome.model, "predict", 1),
    "noise": lambda w: (worldgym.engine, "normal", 2),
    "ends": lambda w: (worldgym.engine, "uniform", 1),
    "new state": lambda w: (worldgym.engine, "WorldState", 1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("slots", [None, [1]])
def test_an_interrupted_step_leaks_nothing(world, place, slots, monkeypatch):
    state, _ = play(world, begin(world, 2), 2)
    before, used, refs = all_bytes(state), pages_used(world), world.pool.refs.copy()
    act = [0, 1] if slots is None else [1]
    with monkeypatch.context() as patch:
        fail_at(patch, *PLACES[place](world))
        with pytest.raises(Stop):
            world.step(state, act, slots)
    assert pages_used(world) == used and np.array_equal(world.pool.refs[:len(refs)], refs)
    assert all_bytes(state) == before
    after, chunk = world.step(state, act, slots)
    _, told = play(world, begin(world, 2), 2)
    assert torch.isfinite(chunk.latents_BFChw).all()


@pytest.mark.parametrize("place", ["first pass", "new state"])
def test_an_interrupted_restart_leaks_nothing(world, place, monkeypatch):
    state = begin(world, 2)
    before, used = all_bytes(state), pages_used(world)
    with monkeypatch.context() as patch:
        fail_at(patch, *PLACES[place](world))
        with pytest.raises(Stop):
            world.restart(state, [1], start(world, 4))
    assert all_bytes(state) == before and pages_used(world) == used
    world.restart(state, [1], start(world, 4))


# ------------------------------------------------------------------------- fuzz


def test_fuzz(world):
    assert fuzz(world, 25, 8) == {"sequences": 25, "failures": 0, "pages_leaked": 0}


def test_the_fuzz_finds_noise_that_depends_on_the_batch(world, monkeypatch):
    def spoiled(keys, number, shape, device):
        return normal(keys, number, shape, device) + torch.arange(len(keys)).reshape(-1, 1, 1, 1)

    monkeypatch.setattr(worldgym.engine, "normal", spoiled)
    assert fuzz(world, 1, 8)["failures"] > 0


def test_the_fuzz_finds_a_leak(monkeypatch):
    world, real = nano.tiny(), PagePool.drop
    calls = []

    def forgetful(pool, ids):
        calls.append(1)
        if len(calls) % 5:
            real(pool, ids)

    monkeypatch.setattr(PagePool, "drop", forgetful)
    assert fuzz(world, 1, 8)["pages_leaked"] > 0
