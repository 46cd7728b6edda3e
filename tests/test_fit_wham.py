"""A small WHAM of our own: fitting, the folder as a world and as a policy, rollouts, evaluation."""

import json
import shutil
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from tests.fit_data import ACTIONS, make_store
from worldgym.actions import ActionSpec
from worldgym.agents import wham_rollout, wham_small
from worldgym.agents.cli import parse
from worldgym.agents.model import load_agent
from worldgym.agents.score import dream_block
from worldgym.agents.scripted import parse_policy
from worldgym.agents.train import TrainConfig, train_in_dream
from worldgym.data.starts import StartBank
from worldgym.data.store import Episodes
from worldgym.envs.make import make_dream, make_dream_vector
from worldgym.envs.tasks import Task, load_task
from worldgym.envs.wham import ID, open_world
from worldgym.errors import CheckpointError, ConfigError
from worldgym.models import wham_actions, wham_nano
from worldgym.models.action_tokens import ActionTokens
from worldgym.models.vqgan import ViTConfig, ViTVQGAN
from worldgym.train.fit import fit
from worldgym.train.fit_wham import FitWham, FitWhamConfig

SMALL = dict(width=16, layers=1, window=3, batch=4, starts=8, codec_iterations=2, codes=16,
             dynamics_iterations=2, outcome_iterations=2, patch=(16, 16), tokenizer_width=32,
             tokenizer_layers=1, code_width=4, tensorboard=False, ahead=2)


def config(folder, **changes):
    return FitWhamConfig(data=str(folder / "data"), out=str(folder / "w"), **{**SMALL, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a world, folder of its recordings)."""
    folder = tmp_path_factory.mktemp("wham")
    make_store(folder / "data", hw=(32, 48), steps=(12, 9, 15, 7, 14, 16))
    return fit(config(folder, holdout=0.5)), folder / "data"


@pytest.fixture
def world(made):
    return load_task(made[0]).world


# ------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("name", ["discrete", "multi_discrete", "multi_binary"])
def test_any_choices_become_tokens_and_come_back(name):
    spec = ACTIONS[name]
    told = ActionTokens(spec)
    top = np.array(told.sizes).reshape(spec.shape) if spec.shape else told.sizes[0]
    actions = np.random.default_rng(0).integers(0, top, (50, *spec.shape)) + spec.start
    ids = told.ids(actions)
    low, high = np.array(told.ranges).T
    assert ids.shape == (50, told.count) and ((ids >= low) & (ids <= high)).all()
    assert (told.values(ids) == actions).all()
    assert len({tuple(r) for r in ids}) == len({tuple(np.ravel(a)) for a in actions})


def test_a_controller_has_the_published_tokens():
    told = ActionTokens(wham_actions.SPEC)
    bins = np.random.default_rng(0).integers(0, np.array(wham_actions.SIZES), (20, 16))
    assert (told.ids(bins) == wham_actions.ids(bins)).all()
    assert told.ranges == wham_actions.RANGES and told.vocabulary == 68
    assert (told.values(told.neutral) == wham_actions.NEUTRAL).all()
    with pytest.raises(ConfigError, match="tokens"):
        ActionTokens(ACTIONS["box"])


def test_usage_is_least_when_all_codes_are_chosen_alike():
    net = ViTVQGAN(ViTConfig(image_size_per_x_axis=4, image_size_per_y_axis=4, patch_size=4,
                             transf_dim=8, embedding_dim=8, num_layers=1, head_size=8,
                             vocab_size=8))
    net.vq_vae._embedding.weight.data = torch.eye(8)
    even, one = torch.eye(8)[None], torch.eye(8)[:1].expand(8, 8)[None]
    assert net.usage(even) < -1.5 and abs(float(net.usage(one).detach())) < 0.01


def test_the_image_gradient_passes_the_choice_of_codes():
    net = ViTVQGAN(ViTConfig(image_size_per_x_axis=8, image_size_per_y_axis=8, patch_size=4,
                             transf_dim=8, embedding_dim=4, num_layers=1, head_size=8,
                             vocab_size=8))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn, *_ = net(x)
    torch.testing.assert_close(drawn, net.pixels(torch.nn.functional.embedding(
        net.nearest(net.features(x)), net.codes())))
    drawn.square().mean().backward()
    assert net.encoder.proj1.weight.grad.abs().max() > 0


# --------------------------------------------------------------------------------------- fitting


def test_the_folder_is_a_world(made):
    folder, data = made
    card = json.loads((folder / "world.json").read_text())
    assert card["kind"] == wham_nano.KIND and card["task"]["twin"] == "Square-v0"
    origin = card["provenance"]
    assert origin["command"].startswith("worldgym fit --dynamics wham --data")
    assert origin["real_steps_used"] == Episodes.open(data).steps
    assert set(origin["training_seconds"]) == {"codec", "encode", "dynamics", "outcome"}
    assert {"psnr_1", "psnr_1_copy", "end_rate_predicted"} <= set(card["metrics"])
    bank = StartBank.load(folder / "starts.safetensors")
    assert bank.gather([0, 1]).latents_BKChw.dtype == torch.int64
    assert sum(f.stat().st_size for f in folder.glob("*.*")) < 25e6
    env = make_dream(folder, horizon=6, end="never")
    assert env.action_space == gymnasium.spaces.Discrete(3, start=1)
    first = [env.reset(seed=3)[0], *[env.step(2)[0] for _ in range(4)]]
    env.reset(seed=3)
    frame, reward, ended, cut, info = env.step(2)
    assert (frame == first[1]).all() and frame.shape == (32, 48, 3) and np.isfinite(reward)
    assert any((a != b).any() for a, b in zip(first, first[1:], strict=False))
    many = make_dream_vector(folder, 3, horizon=6, slide=2)
    assert many.core.task.world.slide == 2
    many.reset(seed=[3, 4, 5])
    assert many.step(np.full(3, 2))[0].shape == (3, 32, 48, 3)
    own, _ = make_dream(folder).reset(options={"frame": first[0]})
    assert own.shape == (32, 48, 3)


def test_rewards_and_ends_come_from_heads_that_read_codes(world):
    bank_reward = (1.0, 1.0)
    state = world.begin(load_task_starts(world, 3), [1, 2, 3])
    _, chunk = world.step(state, np.array([1, 2, 3]))
    assert ((chunk.end_probability_B > 0) & (chunk.end_probability_B < 1)).all()
    assert np.allclose(chunk.reward_B, bank_reward[0])  # every recorded step paid this
    other, _ = world.outcome(state.history_BKChw, world.features(np.array([2, 2, 3])))[:2]
    one, _ = world.outcome(state.history_BKChw, world.features(np.array([1, 2, 3])))[:2]
    assert other[0] != one[0] and (other[1:] == one[1:]).all()
    flipped = (state.history_BKChw + 1) % world.model.codes
    assert (world.outcome(flipped, world.features(np.array([1, 2, 3])))[0] != one).all()


def load_task_starts(world, count):
    rng = np.random.default_rng(0)
    from worldgym.state import Starts

    shape = (count, 2, *world.spec.latent_chw)
    return Starts(torch.from_numpy(rng.integers(0, world.model.codes, shape)),
                  np.full((count, 2), 2), np.zeros((count, 2), bool), np.full(count, 2))


def test_a_slot_does_not_feel_its_neighbours(world):
    starts = load_task_starts(world, 4)
    state = world.begin(starts, [5, 6, 7, 8])
    _, together = world.step(state, np.array([1, 2, 3, 2]))
    alone = world.begin(starts.rows(np.array([2])), [7])
    _, chunk = world.step(alone, np.array([3]))
    assert torch.equal(chunk.latents_BFChw[0], together.latents_BFChw[2])
    assert chunk.end_probability_B[0] == together.end_probability_B[2]


def test_a_killed_fit_goes_on_to_the_same_weights(made, tmp_path, monkeypatch):
    folder, data = made
    shutil.copytree(data, tmp_path / "data")

    def stop(self, iterations):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FitWham, "_outcome", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(config(tmp_path, holdout=0.5, measure=False))
    out = fit(config(tmp_path, holdout=0.5, measure=False))
    assert (out / "world.safetensors").read_bytes() == (folder / "world.safetensors").read_bytes()


def test_training_teaches_frames_and_actions(tmp_path):
    make_store(tmp_path / "data", hw=(32, 32), steps=(12, 9))
    cfg = config(tmp_path, holdout=0.0, codec_iterations=1, dynamics_iterations=40,
                 outcome_iterations=1, batch=8, measure=False)
    fit(cfg)
    told = [json.loads(x) for x in (tmp_path / "w/training/dynamics.jsonl").read_text().split("\n")
            if x]
    assert told[-1]["image"] < told[0]["image"] and told[-1]["action"] < told[0]["action"]


def test_the_convolutional_tokeniser_and_other_actions(tmp_path):
    make_store(tmp_path / "data", "multi_binary", hw=(32, 32))
    out = fit(config(tmp_path, tokenizer="conv", patch=(8, 8), measure=False))
    world = load_task(out).world
    assert world.spec.latent_chw == (1, 4, 4) and world.spec.action == ACTIONS["multi_binary"]
    state = world.begin(StartBank.load(out / "starts.safetensors").gather([0, 1]), [1, 2])
    _, chunk = world.step(state, np.array([[0, 1], [1, 1]]))
    assert chunk.frames().shape == (2, 1, 32, 32, 3)


@pytest.mark.parametrize("bad", [
    {"patch": (8, 4)}, {"window": 1}, {"codes": 0}, {"slide": 3}, {"init": "x"}, {"codes": 2**16},
    {"layers": 0}, {"steps": (1000.0,)}])
def test_impossible_settings_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError):
        config(tmp_path, **bad)


def test_unfit_recordings_are_refused(tmp_path):
    make_store(tmp_path / "data", "box", hw=(24, 40))
    with pytest.raises(ConfigError, match="tokens"):
        fit(config(tmp_path))
    make_store(tmp_path / "b" / "data", hw=(24, 40))
    with pytest.raises(ConfigError, match="convolutional"):
        fit(config(tmp_path / "b", tokenizer="conv", patch=(8, 8)))


def test_the_command_line(made, tmp_path, capsys):
    folder, data = made
    run = parse(["fit", "--dynamics", "wham", "--data", str(data), "--out", str(tmp_path / "w"),
                 "--codes", "8", "--quick"])
    assert run.dynamics == "wham" and run.codes == 8
    for words in (["--dynamics", "nano", "--codes", "8"], ["--dynamics", "wham", "--clip", "9"],
                  ["--dynamics", "dreamer"]):
        wrong = parse(["fit", "--data", str(data), "--out", str(tmp_path / "w"), *words])
        with pytest.raises(ConfigError):
            wrong.run()
    parse(["inspect", str(folder)]).run()
    assert wham_nano.KIND in capsys.readouterr().out


# ---------------------------------------------------------------------------- as a policy and world


def test_the_folder_is_a_policy(made, world):
    folder, data = made
    policy = parse_policy(f"wham:{folder}", world.spec.action, world)
    assert policy.observes == "latent"  # a dream of the same weights shows its ids
    frames = Episodes.open(data).episode(0)["frames"]
    player = parse_policy(f"wham:{folder}", world.spec.action)

    def play():
        player.reset(2, 7)
        return [player.act(np.stack([frames[t], frames[t + 1]]), t).tolist() for t in range(6)]

    first = play()
    assert first == play() and {a for row in first for a in row} <= {1, 2, 3}
    with pytest.raises(ConfigError, match="actions of its own"):
        parse_policy(f"wham:{folder}", wham_actions.SPEC)
    with pytest.raises(ConfigError, match="actions of its own"):
        parse_policy(f"wham:{folder}", ActionSpec.discrete(3))
    with pytest.raises(ConfigError, match="size and dtype"):
        parse_policy(f"wham:{folder},dtype=bfloat16", world.spec.action)


def test_what_needs_a_controller_says_so(made):
    with pytest.raises(ConfigError, match="controller"):
        gymnasium.make(ID, model=str(made[0]))
    with pytest.raises(CheckpointError, match="missing"):
        open_world(made[1])


def test_an_agent_learns_in_it_from_ids(tmp_path):
    wham = wham_nano.small(ActionSpec.discrete(3), (32, 48), seq_len=4, width=16, layers=1,
                           codes=16, patch=16, tokenizer_width=16, tokenizer_layers=1, code_width=4)
    world = wham_nano.fresh(wham_nano.WhamNanoConfig(name="small", wham=wham, code_width=4)).world()
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), np.uint8)
    bank = StartBank.from_frames(world.encode, frames, np.zeros(4, np.int64))
    task = Task(world=world, starts=bank)
    config = TrainConfig(steps=16, envs=2, frame_stack=2, tensorboard=False, progress=False,
                         hyperparameters={"n_steps": 8, "batch_size": 8, "n_epochs": 1,
                                          "learning_rate": 1e-9})
    agent = load_agent(train_in_dream(task, config, tmp_path).agent, world=task.world)
    codes, table = task.world.codec.codes(), agent.policy.features_extractor.table.weight.detach()
    torch.testing.assert_close(table, codes / codes.square().mean().sqrt(), atol=1e-5, rtol=1e-4)
    played = dream_block(replace(task, horizon=3), [agent], [0, 1], [5, 6], seed=0)
    assert played[0].lengths.min() >= 1
    agent.reset(1, 0)
    assert int(agent.act(frames[:1], 0)[0]) in (0, 1, 2)  # as in the real game


# ------------------------------------------------------------------------------- left to itself


def test_a_rollout_draws_frames_and_actions(made, tmp_path):
    task = wham_rollout.open_task(made[0], horizon=5)
    store = wham_rollout.rollout(task, tmp_path / "a", 3, seed=4, slots=2, progress=False)
    assert len(store) == 3 and store.policies == ["wham"] * 3 and store.seeds == [4, 5, 6]
    store.verify()
    again = wham_rollout.rollout(task, tmp_path / "b", 1, seed=4, progress=False)  # then goes on
    again = wham_rollout.rollout(task, tmp_path / "b", 3, seed=4, slots=3, progress=False)
    for i in range(3):
        a, b = store.episode(i), again.episode(i)
        assert all((a[k] == b[k]).all() for k in ("frames", "actions", "rewards", "terminated"))
    # the same dream, step by step: frames follow from the model's own actions
    episode = store.episode(1)
    state = task.world.begin(task.starts.gather(task.starts.sample([5], [0])), [5])
    for t in range(1, len(episode["frames"])):
        action = task.world.proposal(state)
        assert action[0] == episode["actions"][t]
        state, chunk = task.world.step(state, action)
        assert (chunk.frames()[0, 0].numpy() == episode["frames"][t]).all()
    with pytest.raises(ConfigError, match="another recording"):
        wham_rollout.rollout(task, tmp_path / "a", 4, seed=5, progress=False)


def test_the_rollout_command(made, tmp_path, capsys):
    folder, _ = made
    words = ["rollout", "--env", str(folder), "--max-cycles", "4", "--episodes", "2"]
    parse([*words, "--out", str(tmp_path / "a"), "--film", "1"]).run()
    assert (tmp_path / "a" / "rollout.mp4").stat().st_size and "2 episodes" in (
        capsys.readouterr().out)
    parse([*words, "--out", str(tmp_path / "b"), "--film", "0", "--policies", "noop"]).run()
    noop = Episodes.open(tmp_path / "b").episode(0)
    assert noop["policy"] == "noop" and (noop["actions"][1:] == 1).all()
    with pytest.raises(ConfigError, match="one player"):
        parse([*words, "--out", str(tmp_path / "c"), "--players", "2"]).run()


# ------------------------------------------------------------------------------------ evaluation


def test_wasserstein_of_actions():
    a = np.repeat([[0], [1]], [6, 4], axis=0)
    b = np.repeat([[0], [1], [2]], [3, 4, 3], axis=0)
    assert wham_small.wasserstein(a, b) == pytest.approx(0.3)  # total variation of single actions
    assert wham_small.wasserstein(a, a[::-1]) == 0
    x, y = np.array([[0, 0, 0, 0], [1, 1, 1, 1]]), np.array([[1, 1, 1, 0], [0, 0, 0, 0]])
    assert wham_small.wasserstein(x, y) == pytest.approx(1 / 8)  # one of eight moves one step
    runs = wham_small.runs(np.arange(12).reshape(2, 6, 1), 3)
    assert runs.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_evaluation_rows(made, monkeypatch):
    from worldgym.agents.scripted import Random

    folder, data = made
    monkeypatch.setattr(wham_small, "RESAMPLES", 5)
    spec = load_task(folder).world.spec.action
    monkeypatch.setattr(wham_small, "load_agent", lambda path, world: Random(spec))
    rows = wham_small.measure(folder, data, nano=folder, nano_agent="-", clips=3, steps=4,
                              episodes=0, holdout=0.5, say=lambda text: None)
    found = {(r.what, r.metric): r for r in rows}
    for what in ("wham", "nano"):
        assert found[what, "psnr_4"].ci95 is not None and found[what, "psnr_4"].unit == "dB"
        assert 0 <= found[what, "action_wasserstein"].value <= 1
    assert found["wham-nano", "psnr_4"].value == 0  # the same world, moments and noise
    assert found["wham", "psnr_4"].n == found["copy", "psnr_4"].n <= 3
