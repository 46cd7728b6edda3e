"""WHAM's behaviour mode as a policy, and ``worldgym dream``."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.wham_tools import HW, some_actions, some_frames, write_clip, write_model
from worldgym.actions import ActionSpec
from worldgym.agents import wham_dream
from worldgym.agents.cli import main
from worldgym.agents.course import Course
from worldgym.agents.policy import Policy
from worldgym.agents.score import dream_block
from worldgym.agents.scripted import parse_policy
from worldgym.agents.wham_dream import Dreaming, dream, dream_batch
from worldgym.agents.wham_policy import wham_policy
from worldgym.data import wham_npz
from worldgym.data.starts import StartBank
from worldgym.envs.tasks import Task, load_task
from worldgym.envs.wham import wham
from worldgym.errors import CheckpointError, ConfigError, DatasetError
from worldgym.models import nano, wham_actions, wham_checkpoint
from worldgym.models.sampling import Sampling
from worldgym.models.wham_world import WhamWorld

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "wham"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wham") / "wham.safetensors")


# -- the policy -----------------------------------------------------------------------------------


def test_choices_follow_from_seed_slot_and_step(file):
    policy, frames = parse_policy(f"wham:{file}", wham_actions.SPEC), some_frames(4)
    assert isinstance(policy, Policy)

    def play(slots, seed=0, count=3):
        policy.reset(count, seed)
        return np.stack([policy.act(frames[[t] * len(slots)], t, slots) for t in range(4)], 1)

    together = play([0, 1, 2])
    assert (together == play([0, 1, 2])).all() and wham_actions.check(together).shape == (3, 4, 16)
    assert (play([2])[0] == together[2]).all() and (play([2, 0]) == together[[2, 0]]).all()
    assert not (together[0] == together[1]).all() and not (play([0], 1)[0] == together[0]).all()
    policy.reset(1, 0)  # a second episode begins anew, and draws anew
    two = [policy.act(frames[:1], 0)[0] for _ in range(6)]
    assert len({a.tobytes() for a in two}) > 1 and len(policy._pasts[0]) == 1


def test_the_policy_sees_what_the_proposal_sees(file):
    """The most likely action of the policy is the world's own proposal, over a whole window."""
    env = wham(model=file, deterministic=True, observation="latent", controls="raw")
    policy = wham_policy(file, world=env.task.world, deterministic=True)
    assert policy.observes == "latent"
    policy.reset(1, seed=0)
    obs, _ = env.reset(seed=0)
    for t in range(5):
        action = policy.act_latents(obs[None], t)[0]
        assert (action == env.proposal()).all()
        obs = env.step(action)[0]


def test_the_policy_plays_wherever_policies_do(file):
    def one(chunk):
        return np.ones(len(chunk.slots))

    task = load_task(file, horizon=3, reward=one)
    names = (f"wham:{file},temperature=0.5", f"noisy:0.5:wham:{file}", "random")
    policies = [parse_policy(n, task.world.spec.action, task.world, task) for n in names]
    played = dream_block(task, policies, [0, 1], [5, 6], seed=0, course=Course())
    assert [list(p.returns) for p in played] == [[3.0, 3.0]] * 3
    frames = np.random.default_rng(0).integers(0, 256, (2, 30, 90, 3), np.uint8)
    other = parse_policy(f"wham:{file}", wham_actions.SPEC)  # another game's frames
    other.reset(2, 0)
    assert other.act(frames, 0).shape == (2, 16)


def test_the_policy_plays_in_a_world_of_another_kind(file):
    """Any world with the same actions: its frames are resized and encoded."""
    world = nano.tiny(action=wham_actions.SPEC)
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    starts = StartBank.from_frames(world.encode, frames, np.zeros((3, 16), np.int64))
    task = Task(world=world, starts=starts, horizon=4, name="tiny")
    names = (f"wham:{file}", "noop")
    policies = [parse_policy(n, world.spec.action, world, task) for n in names]
    assert policies[0].observes == "frame"
    played = dream_block(task, policies, [0, 1], [5, 6], seed=0, course=Course())
    assert all(len(p.returns) == 2 and min(p.lengths) >= 1 for p in played)


def test_doing_nothing_leaves_the_sticks_alone():
    noop = parse_policy("noop", wham_actions.SPEC)
    noop.reset(1, 0)
    assert (noop.act(some_frames(1), 0) == wham_actions.NEUTRAL).all()


def test_wrong_policies_are_named_errors(file):
    with pytest.raises(ConfigError, match="controller"):
        parse_policy(f"wham:{file}", ActionSpec.discrete(3))
    with pytest.raises(CheckpointError, match="missing"):
        parse_policy("wham:none.ckpt", wham_actions.SPEC)
    for wrong, words in (("colour=red", "setting"), ("device=zzz", "device")):
        with pytest.raises(ConfigError, match=words):
            parse_policy(f"wham:{file},{wrong}", wham_actions.SPEC)


# -- dreaming -------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")
@pytest.mark.parametrize(("tag", "protocol", "context", "steps", "window"), [
    ("world_model_full_context", "base", 3, 2, 3), ("world_model_short_window", "base", 2, 3, 2),
    ("world_model", "base", 1, 5, 3), ("full_generation", "comprehensive", 1, 5, 3)])
def test_dreams_equal_the_published_rollouts(tag, protocol, context, steps, window):
    from safetensors.torch import load_file

    want = load_file(GOLDEN / "rollout.safetensors")
    model = wham_checkpoint.load(GOLDEN / "wham_tiny.ckpt", {"*": (2, 4, 32)})
    world = WhamWorld(model, sampling=Sampling(top_k=1), context_length=window,
                      propose=protocol == "comprehensive")
    clips = [wham_npz.Clip(images.permute(0, 2, 3, 1).numpy()[:context + steps],
                           actions.numpy().astype(np.int64)[:context + steps])
             for images, actions in zip(want["images"], want["actions"], strict=True)]
    how = Dreaming(protocol=protocol, context_length=context, steps=steps)
    made = dream_batch(world, how, clips, [0] * len(clips))
    for row, arrays in enumerate(made):
        got = torch.from_numpy(arrays["dreamt_images"])
        assert (got.int() - want[f"{tag}.images"][row].int()).abs().max() <= 1
        acted = arrays["all_actions"][context:]
        assert (acted == want[f"{tag}.actions"][row].numpy()).all()
        truth = want["redecoded_images"][row, :context + steps]
        again = torch.from_numpy(arrays["encoded_decoded_ground_truth_images"])
        assert (again.int() - truth.int()).abs().max() <= 1


@pytest.fixture
def clips(tmp_path):
    for i, name in enumerate(("a/0.npz", "a/1.npz", "b/0.npz")):
        write_clip(tmp_path / "clips" / name, 7, seed=i)
    return tmp_path / "clips"


def run(file, clips, out, *more):
    return main(["dream", "--model", str(file), "--episodes", str(clips), "--out", str(out),
                 "--context-length", "2", "--steps", "3", *more])


def test_the_command_writes_what_is_published_and_resumes(file, clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(file, clips, out, "--batch", "2") == 0
    with np.load(out / "a" / "1.npz") as made:
        assert {k: v.shape for k, v in made.items()} == {
            "context_length": (), "steps_to_dream": (), "raw_context": (2, 3, *HW),
            "dreamt_images": (3, 3, *HW), "all_actions": (5, 16),
            "encoded_decoded_ground_truth_images": (5, 3, *HW)}
        assert (made["raw_context"].transpose(0, 2, 3, 1) == some_frames(7, 1)[:2]).all()
        assert (made["all_actions"] == some_actions(7, 1)[:5]).all()
    film = (out / "b" / "0.mp4").read_bytes()
    assert b"Generated by WHAM" in film and b"ProgramName" in film
    shown = cv2.VideoCapture(str(out / "b" / "0.mp4"))
    assert (shown.get(cv2.CAP_PROP_FRAME_COUNT), shown.get(cv2.CAP_PROP_FPS)) == (2 + 3, 10)
    first = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(out.rglob("*.npz"))}
    assert len(first) == 3
    (out / "a" / "0.npz").unlink()  # as after an interruption
    (out / "b" / "0.mp4").unlink()
    capsys.readouterr()
    assert run(file, clips, out) == 0
    told = capsys.readouterr().out
    assert "1 of 3 are there already" in told and "2 of 2" in told
    again = {p: p.read_bytes() for p in sorted(out.rglob("*.npz"))}
    assert again == {p: data for p, (data, _) in first.items()}  # batches of 2 or 1: the same
    kept = out / "a" / "1.npz"
    assert kept.stat().st_mtime_ns == first[kept][1]
    assert run(file, clips, out, "--temperature", "0.5") == 2
    assert "other settings" in capsys.readouterr().err
    assert json.loads((out / wham_dream.SETTINGS).read_text())["steps"] == 3


def test_the_model_can_act_too(file, clips, tmp_path):
    how = Dreaming(protocol="comprehensive", context_length=2, steps=3)
    path, = dream(file, clips, tmp_path / "out", how, max_files=1, films=False, say=lambda _: None)
    with np.load(path) as made:
        assert (made["all_actions"][:2] == some_actions(7)[:2]).all()
        assert not (made["all_actions"][2:] == some_actions(7)[2:5]).all()
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_wrong_dreams_are_named_errors(file, clips, tmp_path):
    write_clip(clips / "c.npz", 4)
    with pytest.raises(DatasetError, match="c.npz: 4 frames"):
        dream(file, clips, tmp_path / "out", Dreaming(context_length=2, steps=3))
    assert not (tmp_path / "out").exists()  # before any work
    with pytest.raises(ConfigError, match="replace"):
        dream(file, clips, clips, Dreaming(context_length=2, steps=1))
    with pytest.raises(ConfigError, match="context length"):
        dream(file, clips, tmp_path / "out", Dreaming(context_length=9))
    with pytest.raises(ConfigError, match="protocol"):
        Dreaming(protocol="free")
    for wrong in ({"batch": 0}, {"max_files": 0}, {"max_files": -1}):
        with pytest.raises(ConfigError, match="number of episodes"):
            dream(file, clips, tmp_path / "out", Dreaming(context_length=2, steps=1), **wrong)
    with pytest.raises(ConfigError, match="device"):
        dream(file, clips, tmp_path / "out", Dreaming(context_length=2, steps=1), device="abc")


def test_films_are_marked_unless_told_otherwise():
    frame = np.zeros((180, 300, 3), np.uint8)
    marked = wham_dream.mark(frame)
    rows, columns, _ = np.nonzero(marked)
    assert not frame.any() and rows.min() > 150 and rows.max() < 176 and columns.max() < 292
    assert marked.max() == 255
