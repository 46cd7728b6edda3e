"""Bad inputs over the whole package: a named error that says what was given, what is expected and
how to fix it, and the env or state goes on afterwards as if nothing had happened."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes import ACTIONS, FakeBank, FakeWorld, fake_env, fake_task, fake_vector
from worldgym import checkpoint
from worldgym.actions import ActionSpec
from worldgym.data.starts import StartBank
from worldgym.data.store import Episodes
from worldgym.envs.conformance import difference, rollout
from worldgym.envs.make import make_dream, make_dream_vector, take_cover
from worldgym.envs.state import EnvState
from worldgym.envs.tasks import Task, load_task
from worldgym.errors import (
    ActionError,
    CheckpointError,
    ClosedError,
    CommandError,
    ConfigError,
    DatasetError,
    DTypeError,
    NotFiniteError,
    ResetNeeded,
    ShapeError,
    SlotError,
    StateError,
    UnsafeFileError,
    WorldGymError,
)
from worldgym.models import nano

NAN = float("nan")
GOOD = {"discrete": 1, "multi_discrete": [2, 1], "multi_binary": [1, 0], "box": [0.5, -0.5]}

# kind -> name -> (bad action, error, what the message must say)
ACTION_ROWS = {
    "discrete": {
        "none": (None, ActionError, "numeric"), "word": ("left", ActionError, "numeric"),
        "dict": ({}, ActionError, "numeric"), "too large": (3, ActionError, "[3]"),
        "negative": (-1, ActionError, "[-1]"), "half": (0.5, ActionError, "whole number"),
        "nan": (NAN, NotFiniteError, "nan"), "vector": ([1], ShapeError, "(1, 1)"),
        "complex": (1j, ActionError, "complex"),
    },
    "multi_discrete": {
        "scalar": (1, ShapeError, "(1,)"), "too long": ([0, 0, 0], ShapeError, "(1, 3)"),
        "too large": ([0, 2], ActionError, "[0, 2]"), "negative": ([-1, 0], ActionError, "-1"),
        "half": ([0.5, 0], ActionError, "0.5"), "inf": ([0, np.inf], NotFiniteError, "inf"),
        "ragged": ([[0], [0, 1]], ShapeError, "ragged"),
    },
    "multi_binary": {
        "two": ([0, 2], ActionError, "[0, 2]"), "negative": ([-1, 0], ActionError, "-1"),
        "scalar": (1, ShapeError, "(1,)"), "nan": ([NAN, 0.0], NotFiniteError, "nan"),
        "words": (["a", "b"], ActionError, "numeric"),
    },
    "box": {
        "above": ([1.5, 0.0], ActionError, "1.5"), "below": ([0.0, -2.0], ActionError, "-2"),
        "nan": ([NAN, 0.0], NotFiniteError, "nan"), "inf": ([0.0, np.inf], NotFiniteError, "inf"),
        "too short": ([0.0], ShapeError, "(1, 1)"), "none": ([None, 0.0], ActionError, "object"),
    },
}

IMAGE = np.zeros((40, 40, 3), np.uint8)
# name -> (call on a running env, error, what the message must say)
ENV_ROWS = {
    "unknown option": (lambda e: e.reset(options={"sart": 1}), ConfigError, "sart"),
    "options list": (lambda e: e.reset(options=[1]), DTypeError, "list"),
    "start too large": (lambda e: e.reset(options={"start": 10}), ConfigError, "10"),
    "start negative": (lambda e: e.reset(options={"start": -1}), ConfigError, "-1"),
    "start half": (lambda e: e.reset(options={"start": 0.5}), DTypeError, "0.5"),
    "start bool": (lambda e: e.reset(options={"start": True}), DTypeError, "True"),
    "mask for one": (lambda e: e.reset(options={"reset_mask": np.ones(1, bool)}), ConfigError,
                     "reset_mask"),
    "start and frame": (lambda e: e.reset(options={"start": 1, "frame": IMAGE}), ConfigError,
                        "contradictory"),
    "frame size": (lambda e: e.reset(options={"frame": IMAGE[:5]}), ShapeError, "(5, 40, 3)"),
    "frame gray": (lambda e: e.reset(options={"frame": IMAGE[..., 0]}), ShapeError, "(40, 40)"),
    "frame float": (lambda e: e.reset(options={"frame": IMAGE / 255}), DTypeError, "float64"),
    "seed negative": (lambda e: e.reset(seed=-1), ConfigError, "-1"),
    "seed huge": (lambda e: e.reset(seed=2**64), ConfigError, str(2**64)),
    "seed word": (lambda e: e.reset(seed="0"), DTypeError, "'0'"),
    "seed half": (lambda e: e.reset(seed=0.5), DTypeError, "0.5"),
    "seed bool": (lambda e: e.reset(seed=True), DTypeError, "True"),
    "state none": (lambda e: e.set_state(None), StateError, "NoneType"),
    "state of two slots": (lambda e: e.set_state(two_slots()), StateError, "num_slots"),
    "state of another view": (lambda e: e.set_state(running(observation="latent").get_state()),
                              StateError, "observation"),
    "state of another world": (lambda e: e.set_state(running(frames=2).get_state()), StateError,
                               "fake-discrete-2"),
    "no forks": (lambda e: e.fork(0), SlotError, "0"),
    "half a fork": (lambda e: e.fork(1.5), SlotError, "1.5"),
    "no such slot": (lambda e: e.get_state().select([1]), SlotError, "[1]"),
    "render without a mode": (lambda e: e.render(), ConfigError, "render_mode"),
    "missing state file": (lambda e: e.load_state("/nonexistent/state"), StateError, "nonexistent"),
}

ONES = np.ones(3, int)
VECTOR_ROWS = {
    "too few actions": (lambda e: e.step([0, 1]), ShapeError, "(2,)"),
    "too many actions": (lambda e: e.step([0] * 4), ShapeError, "(4,)"),
    "one bad slot": (lambda e: e.step([0, 9, 0]), ActionError, "[9]"),
    "no actions": (lambda e: e.step([]), ShapeError, "(0,)"),
    "seed list short": (lambda e: e.reset(seed=[1, 2]), ShapeError, "2"),
    "seed list word": (lambda e: e.reset(seed=[1, 2, "3"]), DTypeError, "3"),
    "mask of ints": (lambda e: e.reset(options={"reset_mask": ONES}), DTypeError, "int64"),
    "mask as list": (lambda e: e.reset(options={"reset_mask": [True] * 3}), DTypeError, "list"),
    "mask too long": (lambda e: e.reset(options={"reset_mask": np.ones(4, bool)}), ShapeError,
                      "(4,)"),
    "mask of nothing": (lambda e: e.reset(options={"reset_mask": np.zeros(3, bool)}), ConfigError,
                        "no slot"),
    "frames of two": (lambda e: e.reset(options={"frames": IMAGE[None].repeat(2, 0)}), ShapeError,
                      "2"),
    "starts of two": (lambda e: e.reset(options={"start": [1, 2]}), ShapeError, "2"),
    "start of one slot": (lambda e: e.reset(options={"start": [1, 99, 2]}), ConfigError, "99"),
}

# name -> (call, error, what the message must say)
MAKE_ROWS = {
    "zero slots": (lambda: fake_vector(0), SlotError, "0"),
    "negative slots": (lambda: fake_vector(-3), SlotError, "-3"),
    "half a slot": (lambda: fake_vector(1.5), SlotError, "1.5"),
    "autoreset word": (lambda: fake_vector(2, autoreset_mode="Sometimes"), ConfigError,
                       "Sometimes"),
    "observation": (lambda: fake_env(observation="pixels"), ConfigError, "pixels"),
    "frame_stack zero": (lambda: fake_env(frame_stack=0), ConfigError, "0"),
    "frame_stack half": (lambda: fake_env(frame_stack=1.5), ConfigError, "1.5"),
    "action mapping": (lambda: fake_env(actions="repeat"), ConfigError, "repeat"),
    "render mode": (lambda: fake_env(render_mode="ansi"), ConfigError, "ansi"),
    "unknown setting": (lambda: fake_env(horizn=3), ConfigError, "horizn"),
    "unknown vector setting": (lambda: fake_env(autoreset_mode="NextStep"), ConfigError,
                               "autoreset_mode"),
    "horizon zero": (lambda: fake_env(horizon=0), ConfigError, "0"),
    "max steps negative": (lambda: fake_env(max_episode_steps=-1), ConfigError, "-1"),
    "distrust negative": (lambda: fake_env(distrust=-0.1), ConfigError, "-0.1"),
    "hazard below 0": (lambda: fake_env(hazard=-1.0), ConfigError, "hazard"),
    "penalty nan": (lambda: fake_env(penalty=NAN), ConfigError, "nan"),
    "one fork": (lambda: fake_env(forks=1), ConfigError, "1"),
    "reward word": (lambda: fake_env(reward="score"), ConfigError, "score"),
    "end word": (lambda: fake_env(end="head0"), ConfigError, "head0"),
    "device of a loaded task": (lambda: make_dream(fake_task(), device="cpu"), ConfigError, "cpu"),
    "unknown world": (lambda: make_dream("worldgym/Nowhere-v0"), ConfigError, "Nowhere"),
    "unknown take cover setting": (lambda: take_cover(speed=2), ConfigError, "speed"),
    "step before reset": (lambda: fake_env().step(0), ResetNeeded, "reset"),
    "vector step before reset": (lambda: fake_vector(2).step([0, 0]), ResetNeeded, "reset"),
    "mask before reset": (lambda: fake_vector(2).reset(options={"reset_mask": np.ones(2, bool)}),
                          ResetNeeded, "reset"),
    "fork before reset": (lambda: fake_env().fork(2), ResetNeeded, "reset"),
    "step after close": (lambda: closed(fake_env()).step(0), ClosedError, "close"),
    "reset after close": (lambda: closed(fake_env()).reset(), ClosedError, "close"),
    "vector after close": (lambda: closed(fake_vector(2)).step([0, 0]), ClosedError, "close"),
    "state after close": (lambda: closed(fake_env()).set_state(None), ClosedError, "close"),
    "action kind": (lambda: ActionSpec(kind="text", shape=()), ConfigError, "text"),
    "unbounded box": (lambda: ActionSpec(kind="box", shape=(1,), low=(-np.inf,), high=(1.0,)),
                      ConfigError, "inf"),
}


def running(**settings):
    """An env in the middle of an episode."""
    env = fake_env(**{"end": "never", **settings})
    env.reset(seed=0)
    env.step(0)
    return env


def two_slots():
    env = fake_vector(2)
    env.reset(seed=0)
    return env.get_state()


def closed(env):
    env.close()
    return env


def refused(call, kind, word):
    """``call`` raises ``kind``, whose message has the word and all three parts."""
    with pytest.raises(WorldGymError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    text = str(error)
    assert word in text, text
    assert text == f"{error.what}: got {error.given}; expected {error.expected}. Fix: {error.fix}"
    assert error.what and str(error.expected) and len(error.fix) > 3


@pytest.mark.parametrize("kind,name", [(k, n) for k, rows in ACTION_ROWS.items() for n in rows])
def test_bad_action(kind, name):
    action, error, word = ACTION_ROWS[kind][name]
    env, twin = fake_env(kind=kind, end="never"), fake_env(kind=kind, end="never")
    for one in (env, twin):
        one.reset(seed=0)
        one.step(GOOD[kind])
    refused(lambda: env.step(action), error, word)
    actions = [GOOD[kind]] * 3
    assert not difference(rollout(twin, actions), rollout(env, actions))


@pytest.mark.parametrize("kind", sorted(ACTION_ROWS))
def test_bad_per_frame_action(kind):
    env = fake_env(kind=kind, frames=3, actions="per_frame")
    env.reset(seed=0)
    refused(lambda: env.step(GOOD[kind]), ShapeError, "frames")
    refused(lambda: env.step([GOOD[kind]] * 2), ShapeError, "frames")
    env.step([GOOD[kind]] * 3)


@pytest.mark.parametrize("name", sorted(ENV_ROWS))
def test_bad_call_on_a_running_env(name):
    call, error, word = ENV_ROWS[name]
    env, twin = running(), running()
    refused(lambda: call(env), error, word)
    assert not difference(rollout(twin, [0, 1, 2]), rollout(env, [0, 1, 2]))


@pytest.mark.parametrize("name", sorted(VECTOR_ROWS))
def test_bad_call_on_a_running_vector_env(name):
    call, error, word = VECTOR_ROWS[name]
    env, twin = fake_vector(3, end="never"), fake_vector(3, end="never")
    for one in (env, twin):
        one.reset(seed=0)
    refused(lambda: call(env), error, word)
    for action in ([0, 1, 2], [2, 1, 0]):
        assert not difference(env.step(action), twin.step(action))


@pytest.mark.parametrize("name", sorted(MAKE_ROWS))
def test_bad_construction_or_order(name):
    refused(*MAKE_ROWS[name])


# ---------------------------------------------------------------------- files


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def spoil_state(path, how):
    """Overwrite a good state file."""
    data = path.read_bytes()
    if how == "pickle":
        path.write_bytes(pickle.dumps(Exploit(str(path) + ".ran")))
    elif how == "archive":
        torch.save({"a": torch.zeros(1)}, path)
    elif how == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    elif how == "missing tensor":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            meta = file.metadata()
        tensors = load_file(path)
        del tensors["elapsed_B"]
        save_file(tensors, path, meta)
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "header": data[:5],
                          "text": b"not a state at all"}[how])


@pytest.mark.parametrize("how,error,word", [
    ("pickle", UnsafeFileError, "pickle"), ("archive", UnsafeFileError, "archive"),
    ("foreign", StateError, "not the state"), ("missing tensor", StateError, "another format"),
    ("empty", StateError, "cannot be read"), ("cut", StateError, "cannot be read"),
    ("header", StateError, "cannot be read"), ("text", StateError, "cannot be read"),
])
def test_bad_state_file(tmp_path, how, error, word):
    env, twin = running(), running()
    path = tmp_path / "state"
    env.save_state(path)
    spoil_state(path, how)
    refused(lambda: env.load_state(path), error, word)
    assert not (tmp_path / "state.ran").exists()
    assert not difference(rollout(twin, [0, 1, 2]), rollout(env, [0, 1, 2]))
    refused(lambda: EnvState.load(path, env.task.world), error, word)


CFG = nano.NanoConfig(
    name="t", action=ActionSpec.discrete(2), wan=nano.dit_config(4, 2, 32, 2, 16), recent=2,
    codec=nano.CodecConfig(frame_hw=(32, 32), channels=4, width=8, deep_width=16),
    outcome_frames=2, outcome_width=8)


@pytest.fixture(scope="module")
def good_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    net = nano.fresh(CFG)
    nano.save(net, folder, {})
    StartBank.from_frames(net.world().encode, np.zeros((2, 32, 32, 3), np.uint8),
                          np.zeros(2, np.int64)).save(folder / "starts.safetensors")
    return folder


def spoil_world(folder, how):
    weights, card = folder / "world.safetensors", folder / "world.json"
    data = weights.read_bytes()
    tensors = load_file(weights)
    first = next(n for n, t in tensors.items() if t.is_floating_point() and t.ndim > 1)
    if how == "missing tensor":
        del tensors[first]
    elif how == "extra tensor":
        tensors["codec.more"] = torch.zeros(1)
    elif how == "misshaped tensor":
        tensors[first] = tensors[first][:1].clone()
    elif how == "nan tensor":
        tensors[first].view(-1)[0] = NAN
    if "tensor" in how:
        save_file(tensors, weights)
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "cut weights":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "pickled weights":
        weights.write_bytes(pickle.dumps(Exploit(str(folder / "ran"))))
    elif how == "no weights":
        weights.unlink()
    elif how == "no starts":
        (folder / "starts.safetensors").unlink()
    elif how == "weights as starts":
        (folder / "starts.safetensors").write_bytes(data)
    elif how == "no config":
        card.write_text("{}")
    elif how == "odd config":
        described = json.loads(card.read_text())
        described["config"]["depth"] = 3
        card.write_text(json.dumps(described))


@pytest.mark.parametrize("how,error,word", [
    ("missing tensor", CheckpointError, "missing"), ("extra tensor", CheckpointError, "extra"),
    ("misshaped tensor", CheckpointError, "shape"), ("nan tensor", CheckpointError, "NaN"),
    ("empty weights", CheckpointError, "0 bytes"), ("cut weights", CheckpointError, "cut off"),
    ("pickled weights", CheckpointError, "safetensors"), ("no weights", CheckpointError, "missing"),
    ("no starts", CheckpointError, "starts.safetensors"),
    ("weights as starts", CheckpointError, "start bank"), ("no config", CheckpointError, "config"),
    ("odd config", ConfigError, "depth"),
])
def test_bad_world_folder(good_world, tmp_path, how, error, word):
    for file in good_world.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil_world(tmp_path, how)
    refused(lambda: load_task(tmp_path), error, word)
    assert not (tmp_path / "ran").exists()
    assert make_dream(good_world).reset(seed=0)


FILE_ROWS = {
    "torch pickle": (lambda d: checkpoint.load_tensors(evil(d / "a.pt")), UnsafeFileError, "a.pt"),
    "no data set": (lambda d: Episodes.open(d / "none"), DatasetError, "none"),
    "data set without index": (lambda d: Episodes.open(d), DatasetError, "index"),
    "data set index cut": (lambda d: Episodes.open(written(d, '{"format": 1')), DatasetError,
                           "index"),
    "data set of the future": (lambda d: Episodes.open(written(d, '{"format": 99}')), DatasetError,
                               "99"),
    "data set in a full folder": (lambda d: Episodes.create(
        written(d, "{}"), ACTIONS["discrete"], (4, 4), 1.0, {}), DatasetError, "empty"),
    "setting of a task": (lambda d: load_task(good(d), wrld=1), ConfigError, "wrld"),
}


def evil(path):
    path.write_bytes(pickle.dumps(Exploit(str(path) + ".ran")))
    return path


def written(folder, text):
    (folder / "index.json").write_text(text)
    return folder


def good(folder):
    for name in ("world.safetensors", "world.json", "starts.safetensors"):
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.mark.parametrize("name", sorted(FILE_ROWS))
def test_bad_file(tmp_path, name):
    call, error, word = FILE_ROWS[name]
    refused(lambda: call(tmp_path), error, word)
    assert not list(tmp_path.glob("*.ran"))


# ---------------------------------------------------------------------- engine and commands


@pytest.fixture(scope="module")
def engine():
    world = nano.tiny()
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    starts = StartBank.encode_frames(world, frames)
    return world, world.begin(starts, [0, 1]), starts


ENGINE_ROWS = {
    "short actions": (lambda w, s, b: w.step(s, [0]), ShapeError, "(1,)"),
    "bad slot": (lambda w, s, b: w.step(s, [0], slots=[2]), SlotError, "[2]"),
    "slot twice": (lambda w, s, b: w.step(s, [0, 0], slots=[1, 1]), SlotError, "[1, 1]"),
    "no slots": (lambda w, s, b: w.step(s, [], slots=[]), SlotError, "[]"),
    "released state": (lambda w, s, b: w.step(released(s), [0, 0]), StateError, "released"),
    "frames of another size": (lambda w, s, b: w.encode(np.zeros((1, 8, 8, 3), np.uint8)),
                               ShapeError, "8"),
    "latents of another size": (lambda w, s, b: w.decode(torch.zeros(1, 2, 3, 3)), ShapeError,
                                "2, 3, 3"),
    "seeds too few": (lambda w, s, b: w.begin(b, [0]), StateError, "seeds"),
    "fork of nothing": (lambda w, s, b: s.fork(0), SlotError, "0"),
    "join of nothing": (lambda w, s, b: type(s).join([]), SlotError, "no states"),
    "state of another world": (lambda w, s, b: nano.tiny(seed=5).step(s, [0, 0]), StateError,
                               "another world"),
}


def released(state):
    copy = state.snapshot()
    copy.release()
    return copy


@pytest.mark.parametrize("name", sorted(ENGINE_ROWS))
def test_bad_engine_call(engine, name):
    world, state, starts = engine
    call, error, word = ENGINE_ROWS[name]
    before = world.step(state, [0, 1])[1].latents_BFChw
    refused(lambda: call(world, state, starts), error, word)
    assert torch.equal(before, world.step(state, [0, 1])[1].latents_BFChw)


@pytest.mark.parametrize("argv", [[], ["fly"], ["score", "--no-such-option", "1"],
                                  ["inspect"]], ids=" ".join)
def test_bad_command_line(argv):
    cli = pytest.importorskip("worldgym.agents.cli")
    pytest.importorskip("tyro")
    refused(lambda: cli.parse(argv), CommandError, "worldgym")


def test_task_over_a_world_needs_its_parts():
    refused(lambda: Task(world=FakeWorld(), starts=FakeBank(), horizon=True), ConfigError, "True")
    refused(lambda: make_dream_vector(fake_task(), 2, frame_stak=1), ConfigError, "frame_stak")


def test_there_are_enough_rows():
    rows = [ENV_ROWS, VECTOR_ROWS, MAKE_ROWS, FILE_ROWS, ENGINE_ROWS, *ACTION_ROWS.values()]
    assert sum(map(len, rows)) >= 60
