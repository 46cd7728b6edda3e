"""Agents in the multi-agent face: training, past selves, resuming, teams scored in both places,
rollouts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pettingzoo")
pytest.importorskip("stable_baselines3")
import torch  # noqa: E402

from tests.party_face_tools import tiny_nano, tiny_task  # noqa: E402
from worldgym.agents import cli, party_score  # noqa: E402
from worldgym.agents.model import read_facts  # noqa: E402
from worldgym.agents.party_agent import TrainedPlayer, party_player, team  # noqa: E402
from worldgym.agents.party_learner import PastSelf  # noqa: E402
from worldgym.agents.party_train import PPO, party_config, train_party_in_dream  # noqa: E402
from worldgym.agents.rollout import film, rollout  # noqa: E402
from worldgym.agents.score import Played  # noqa: E402
from worldgym.data.party import PartySampler  # noqa: E402
from worldgym.data.store import Episodes  # noqa: E402
from worldgym.envs import parallel_env  # noqa: E402
from worldgym.envs.meltingpot import available  # noqa: E402
from worldgym.envs.party_rows import TRAINING_VIEW, DreamPartyVecEnv  # noqa: E402
from worldgym.errors import CheckpointError, ConfigError  # noqa: E402

STEADY, DEADLY = tiny_task(horizon=6), tiny_task(end=-2.0, horizon=30)


# ---------------------------------------------------------------------------- training


def config(**changes):
    return party_config(**{"steps": 64, "envs": 2, "save_every": 32, "tensorboard": False,
                           "progress": False, "frame_stack": 2, "hyperparameters": {
                               "n_steps": 8, "batch_size": 16, "n_epochs": 1}, **changes})


def test_parties_learn_from_short_rollouts():
    """Defaults of their own, of which any may be set anew."""
    plain = party_config().hyperparameters
    assert plain == PPO and plain["n_steps"] < 64
    changed = party_config(hyperparameters={"n_steps": 8, "gamma": 0.9}).hyperparameters
    assert changed == PPO | {"n_steps": 8, "gamma": 0.9}
    assert party_config().resolved().hyperparameters["gamma"] == 0.99


def learn(folder, rivals=1, **changes):
    return train_party_in_dream(DEADLY, config(**changes), folder, game="predator_prey",
                                players=3, rivals=rivals, horizon=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("agent"))


def weights(path):
    player = TrainedPlayer(path)
    return {k: v.clone() for k, v in player.policy.state_dict().items()}


def test_training_goes_on_bit_for_bit(trained, tmp_path):
    """Interrupted after the first checkpoint, rivals and all; the same agent as in one go."""
    assert trained.steps == 64 and len(trained.checkpoints) == 2
    learn(tmp_path, steps=32)
    again = learn(tmp_path)
    one, two = weights(trained.agent), weights(again.agent)
    first = weights(trained.checkpoints[0])
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], first[k]) for k in one)
    facts = read_facts(again.agent)
    assert facts["players"] == 3 and facts["rivals"] == 1 and facts["where"] == "dream"
    with pytest.raises(ConfigError, match="other settings"):
        learn(tmp_path, rivals=0)


def test_the_past_self_is_frozen_until_a_checkpoint(trained):
    policy = TrainedPlayer(trained.agent).policy
    rival = PastSelf(policy)
    seen, keys = np.random.default_rng(0).integers(0, 255, (64, 6, 44, 44), np.uint8), np.stack(
        [np.arange(64)] * 4, 1)
    before = rival(seen, keys)
    turned = rival(seen[::-1].copy(), keys[::-1])
    assert np.array_equal(turned[::-1], before)  # a row's noise is its own
    rival.load(trained.checkpoints[0].parent)
    old = weights(trained.checkpoints[0])
    assert all(torch.equal(v, old[k]) for k, v in rival.policy.state_dict().items())
    assert len(set(before.tolist())) > 2


def test_a_licence_can_forbid_training(tmp_path):
    from dataclasses import replace

    from worldgym.errors import LicenceError
    from worldgym.spec import Licence

    spec = replace(DEADLY.world.spec, licence=Licence(may_train_on_outputs=False))
    world = SimpleNamespace(spec=spec)
    with pytest.raises(LicenceError):
        train_party_in_dream(replace(DEADLY, world=world), config(), tmp_path)


# ---------------------------------------------------------------------------- trained players


def test_a_player_sees_what_it_was_trained_on(trained):
    env = DreamPartyVecEnv(STEADY, "predator_prey", 3, 1, view=TRAINING_VIEW)
    player = TrainedPlayer(trained.agent)
    player.reset(np.random.default_rng(0))
    obs = env.reset()
    for i in range(5):
        scene = env.core.scenes()[0]
        for seat in range(3):
            if seat == 0:
                player.watch(scene, seat)
            if i:  # an episode begins with copies of its first frame here
                assert np.array_equal(player.see(scene, seat)[0], obs[seat])
        obs, *_ = env.step(np.random.default_rng(i).integers(8, size=3))


def test_teams():
    assert [m().name for m in team("gather+slips:0.1:chase", 2)] == ["gather", "slips:0.1:chase"]
    for wrong in (["gather", "chase"], "gather+"):
        with pytest.raises(ConfigError):
            team(wrong, 3)
    with pytest.raises(CheckpointError, match="missing"):
        party_player("nobody.zip")


def test_agents_of_other_kinds_are_refused(tmp_path):
    import shutil
    from pathlib import Path

    other = Path(__file__).parents[1] / "agents" / "pretrained" / "take_cover.zip"
    shutil.copy(other, tmp_path / "a.zip")
    with pytest.raises(ConfigError, match="several players"):
        TrainedPlayer(tmp_path / "a.zip")


def test_scores_in_the_dream(trained):
    def play(slots, episodes=3):
        return party_score.play_team_dream(
            DEADLY, "predator_prey", 3, f"gather+random+{trained.agent}", episodes, seed=5,
            horizon=8, slots=slots)

    one, two = play(3), play(2)
    assert np.array_equal(one.returns, two.returns)  # episodes do not know their batch
    assert one.lengths.max() <= 8 and len(one.returns) == 3 and one.where == "dream"
    assert len(set(one.returns.tolist())) == 3
    with pytest.raises(ConfigError, match="horizon"):
        party_score.play_team_dream(SimpleNamespace(horizon=None), "coins", 2, "random", 1)


def played(where, *returns):
    paid = [[r] for r in returns]
    return Played.of("x", where, range(len(returns)), paid, [False] * len(returns))


def test_gain_share():
    scores = {"random": {"real": played("real", 0., 2., 1.)},
              "real": {"real": played("real", 11., 11., 11.)},
              "dream": {"real": played("real", 9., 9., 9.), "dream": played("dream", 20., 21.)}}
    share, low, high, n = party_score.gain_share(scores)
    assert share == pytest.approx(0.8) and low < 0.8 < high and n == 3
    assert party_score.rows_of(scores, "coins")[-1].what == "coins/dream"
    text = party_score.party_table(scores)
    assert "9.00" in text and "20.50" in text and "+8.00" in text
    assert party_score.gain_share({**scores, "real": scores["random"]}) is None
    assert party_score.gain_share({"dream": scores["dream"]}) is None


def test_rollouts_are_recordings(trained, tmp_path):
    """The format of collect-party; the same again is the same; goes on where it was."""
    env = parallel_env(DEADLY, "predator_prey", 3, max_cycles=6)
    names = ["gather", "random:4", str(trained.agent)]
    first = rollout(env, names, tmp_path / "a", 2, progress=False)
    for count in (1, 2):
        second = rollout(env, names, tmp_path / "b", count, progress=False)
    assert len(first) == len(second) == 2 and first.policies[0] == "|".join(names)
    for number in range(2):
        one, two = first.episode(number), second.episode(number)
        assert set(one) == set(two)
        assert all(np.asarray(one[k]).tobytes() == np.asarray(two[k]).tobytes() for k in one)
    rows = first.episode(0)
    assert rows["frames"].shape[1:] == (32, 40, 3) and rows["actions"].shape[1:] == (8,)
    assert (rows["actions"][:, 3:] == -1).all() and (rows["actions"][0] == -1).all()
    assert np.isnan(rows["info_position"][:, 3:]).all()
    assert rows["info_valid"][0].tolist() == [True] * 3 + [False] * 5
    env.reset(seed=0)
    assert np.array_equal(rows["frames"][0], env.state())
    store = Episodes.open(tmp_path / "a")
    assert store.env["where"] == "dream" and store.env["recipe"]["name"] == "predator_prey"
    clips = PartySampler({"predator_prey": store}, {"predator_prey": np.arange(2)}, 3, 2)(0)
    assert clips["frames"].shape == (2, 3, 32, 40, 3)
    assert film(store, tmp_path / "a.mp4", label="dream").stat().st_size > 2000
    with pytest.raises(ConfigError, match="another recording"):
        rollout(env, ["gather"], tmp_path / "a", 3, progress=False)


def test_commands_are_read():
    said = cli.parse(["train-party", "--out", "x", "--game", "coins", "--rivals", "1", "--real"])
    assert (said.game, said.rivals, said.real, said.slots) == ("coins", 1, True, 16)
    said = cli.parse(["rollout", "--out", "x", "--env", "real", "--policies", "gather", "random"])
    assert said.policies == ("gather", "random") and said.env == "real"
    assert cli.main(["score-party", "--where", "moon"]) == 2


def test_a_folder_is_all_it_takes(tmp_path, capsys):
    """A world and its starts on disk: environment, training, score, rollout by the commands."""
    from worldgym.data.starts import StartBank
    from worldgym.models import party_nano
    from worldgym.train.metrics_party import recorded_states

    env = parallel_env(STEADY, "coins", max_cycles=6)
    store = rollout(env, ["random"], tmp_path / "seen", 2, progress=False)
    made, world = tiny_nano(), str(tmp_path / "world")
    party_nano.save(made, world, {"task": {"horizon": 6}})
    StartBank.build(store, made.world().encode, np.arange(2), 6, 2, margin=1,
                    states=lambda rows: recorded_states(store, rows, True)).save(
                        tmp_path / "world" / "starts.safetensors")
    env = parallel_env(world, "coins", observation="crop")
    env.reset(seed=0)
    assert env.players == 2 and env.max_cycles == 6
    assert any(np.array_equal(env.state(), f) for i in range(2)
               for f in store.episode(i)["frames"])  # begins with a recorded frame
    with pytest.raises(ConfigError, match="no start of this game"):
        parallel_env(world, "predator_prey")
    agent = str(tmp_path / "agent")
    assert cli.main(["train-party", "--world", world, "--game", "coins", "--out", agent,
                     "--slots", "1", "--steps", "16", "--beginnings", "--set", "n_steps=8",
                     "batch_size=8"]) == 0
    assert json.loads((tmp_path / "agent" / "run.json").read_text())["run"]["beginnings"]
    common = ["--game", "coins"]
    assert cli.main(["score-party", "--world", world, *common, "--where", "dream", "--episodes",
                     "2", "--policy", "random", f"mine={agent}/agent.zip"]) == 0
    assert cli.main(["rollout", "--env", world, *common, "--policies", "gather",
                     f"{agent}/agent.zip", "--episodes", "1", "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().out
    assert "mine" in said and "gather: mean return" in said
    assert (tmp_path / "r" / "rollout.mp4").exists()


def test_the_real_game_has_beginnings_only(tmp_path, capsys):
    assert cli.main(["train-party", "--real", "--beginnings", "--game", "coins", "--out",
                     str(tmp_path / "agent")]) != 0
    assert "leave out --beginnings" in capsys.readouterr().err
    assert not (tmp_path / "agent").exists()


def test_wrong_teams_are_told_before_anything_is_played(tmp_path, monkeypatch):
    played = []
    monkeypatch.setattr("worldgym.agents.party_score.play_team_real",
                        lambda *a, **k: played.append(a))
    with pytest.raises(CheckpointError, match="agent file is missing"):
        party_score.score_party(None, "coins", None, {"all": "random", "lost": f"{tmp_path}/a.zip"},
                                2, where=["real"], progress=False)
    assert not played
    party_score.score_party(None, "coins", None, {"two": "random+gather"}, 2, where=["real"],
                            progress=False)
    assert len(played) == 1


# ---------------------------------------------------------------------------- the real game

real = pytest.mark.skipif(not available(), reason="Melting Pot is not installed")


@real
def test_real_commands_end_to_end(tmp_path, capsys):
    """Train in the substrate, score and roll out there."""
    out = str(tmp_path / "agent")
    assert cli.main(["train-party", "--out", out, "--real", "--game", "coins", "--slots", "1",
                     "--steps", "32", "--horizon", "8", "--set", "n_steps=16",
                     "batch_size=32"]) == 0
    agent = f"{out}/agent.zip"
    assert read_facts(agent)["where"] == "real"
    assert cli.main(["score-party", "--where", "real", "--game", "coins", "--episodes", "2",
                     "--horizon", "8", "--policy", "random", f"mixed=gather+{agent}",
                     "--out", str(tmp_path / "s.json")]) == 0
    lines = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [r["what"] for r in lines] == ["coins/random", "coins/mixed"] and lines[0]["n"] == 2
    assert cli.main(["rollout", "--out", str(tmp_path / "r"), "--env", "real", "--game", "coins",
                     "--policies", "gather", agent, "--episodes", "1", "--max-cycles", "6"]) == 0
    assert (tmp_path / "r" / "rollout.mp4").exists() and "mean return" in capsys.readouterr().out
