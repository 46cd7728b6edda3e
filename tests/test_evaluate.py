"""worldgym evaluate: many policies on the same starts and noise; what it says, what it refuses."""

import json
from itertools import combinations

import numpy as np
import pytest

import tests.agent_toys as toys
from worldgym.actions import ActionSpec
from worldgym.agents import cli
from worldgym.agents.course import Course
from worldgym.agents.evaluate import evaluate
from worldgym.agents.evaluation_text import text
from worldgym.agents.ladder import expand, ladder
from worldgym.agents.score import dream_block, play_dream, play_real
from worldgym.agents.scripted import parse_policy
from worldgym.errors import ActionError, ConfigError, WorldGymError

THREE = ActionSpec.discrete(3)
CAST = ["random", "lazy=noop", "sticky:0.5", "sweep:5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.tiny_folder(tmp_path_factory.mktemp("tiny") / "world")


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return evaluate(folder, CAST, episodes=12, real=True, out=out, slots=20, progress=False), out


def test_one_batch_gives_what_each_policy_gives_alone(found, folder):
    from worldgym.envs.tasks import load_task

    task = load_task(folder)
    for name, source in (("random", "random"), ("lazy", "noop"), ("sweep:5", "sweep:5")):
        for place, play in (("dream", play_dream), ("real", None)):
            policy = parse_policy(source, THREE)
            alone = play(task, policy, 12) if play else play_real(toys.Corridor, policy, 12)
            together = found[0].played[name][place]
            np.testing.assert_array_equal(together.lengths, alone.lengths)
            np.testing.assert_array_equal(together.truncated, alone.truncated)
            np.testing.assert_allclose(together.returns, alone.returns, atol=1e-4)
            assert together.seeds == alone.seeds


def test_equal_policies_meet_equal_luck_and_every_step_is_kept():
    task = toys.tiny_task()
    twins = [parse_policy("noop", THREE), parse_policy("constant:0", THREE)]
    first, second = dream_block(task, twins, range(5), range(40, 45), 40)
    np.testing.assert_array_equal(first.returns, second.returns)
    assert len(set(first.returns)) > 1  # every episode has luck of its own
    for played in (first, second):
        assert [len(r) for r in played.rewards] == played.lengths.tolist()
        np.testing.assert_allclose([r.sum() for r in played.rewards], played.returns)
        cut = played.lengths == task.horizon
        assert (played.truncated <= cut).all()
    assert task.world.pool.stats()["pages_used"] == 0


def test_policies_that_learned_in_a_dream_are_told_apart(folder, tmp_path):
    from dataclasses import asdict

    grown = parse_policy("sticky:0.1", THREE)
    grown.facts = {"where": "dream", "action": asdict(THREE), "frame_hw": [32, 32]}
    cast = {name: name for name in ("random", "noop", "sweep:5")}
    given = {"episodes": 6, "real": True, "progress": False}
    found = evaluate(folder, {**cast, "grown": grown}, out=tmp_path / "with", **given)
    outside = evaluate(folder, cast, out=tmp_path / "without", **given)
    assert found.outsiders == list(cast) and outside.agreement_outside is None
    assert found.agreement_outside == outside.agreement != found.agreement
    data = toys.numbers(tmp_path / "with")
    assert [p["learned_in_dream"] for p in data["policies"]] == [False] * 3 + [True]
    assert data["agreement_outside"] == toys.numbers(tmp_path / "without")["agreement"]
    rows = {(r["what"], r["metric"]): r["value"]
            for r in json.loads((tmp_path / "with" / "results.json").read_text())["rows"]}
    assert rows["ladder", "policies"] == 4 and rows["ladder-outside", "policies"] == 3
    assert ("ladder-outside", "mmrv") in rows and "did not learn in a dream" in text(found)


def test_anywhere_begins_within_episodes_and_says_so(folder, tmp_path, monkeypatch):
    from worldgym.data.starts import StartBank

    asked, sample = [], StartBank.sample
    monkeypatch.setattr(StartBank, "sample", lambda self, *a, beginnings_only=False: (
        asked.append(beginnings_only), sample(self, *a, beginnings_only=beginnings_only))[1])
    given = {"episodes": 3, "progress": False, "horizon": 4}
    found = evaluate(folder, CAST, anywhere=True, out=tmp_path / "any", **given)
    assert set(asked) == {False} and "next 4 steps" in text(found)
    evaluate(folder, CAST, out=tmp_path / "whole", **given)
    assert asked[-1] is True
    with pytest.raises(ConfigError, match="other settings"):
        evaluate(folder, CAST, out=tmp_path / "any", **given)
    with pytest.raises(ConfigError, match="cannot begin in the middle"):
        evaluate(folder, CAST, anywhere=True, real=True, out=tmp_path / "real", **given)
    assert not (tmp_path / "real").exists()


def test_anchored_dreams_meet_again_at_recorded_moments(tmp_path):
    task = toys.tiny_task(end="never", horizon=9)
    moments = []

    class Watch:
        name = "watch"

        def __init__(self, action):
            self.action = action

        def reset(self, slots, seed):
            self.seen = {}

        def act(self, frames, times, slots):
            for frame, time, slot in zip(frames, times, slots, strict=True):
                self.seen[int(time), int(slot)] = frame.copy()
            return np.full(len(frames), self.action)

    left, right = Watch(1), Watch(2)
    sample = task.starts.at_age
    object.__setattr__(task.starts, "at_age", lambda age, *a: (
        moments.append(age), sample(age, *a))[1])
    found = dream_block(task, [left, right], range(3), range(70, 73), 70, course=Course(anchor=4))
    assert moments == [4, 8] and [p.lengths.tolist() for p in found] == [[9] * 3] * 2
    for slot in range(3):
        same = [np.array_equal(left.seen[t, slot], right.seen[t, slot]) for t in range(9)]
        assert same == [True, False, False, False, True, False, False, False, True]
    assert task.world.pool.stats()["pages_used"] == 0
    evaluation = evaluate(task, ["random", "noop"], episodes=2, anchor=4, out=tmp_path,
                          progress=False)
    assert "Every 4 steps" in text(evaluation)
    with pytest.raises(ConfigError, match="between anchors"):
        evaluate(task, ["random"], anchor=0, progress=False)
    with pytest.raises(ConfigError, match="other settings"):
        evaluate(task, ["random", "noop"], episodes=2, out=tmp_path, progress=False)


def test_expected_ends_are_the_same_on_average_and_vary_less(folder, tmp_path):
    given = {"episodes": 80, "progress": False, "horizon": 8, "slots": 200}
    plain = evaluate(folder, ["random", "noop"], out=tmp_path / "p", **given)
    told = evaluate(folder, ["random", "noop"], expected=True, out=tmp_path / "e", **given)
    for name in ("random", "noop"):
        a, b = plain.played[name]["dream"], told.played[name]["dream"]
        np.testing.assert_allclose(b.drawn, a.returns, atol=1e-4)  # the same dreams, ends drawn
        assert abs(a.returns.mean() - b.returns.mean()) < 3 * a.returns.std() / 80**0.5
        assert b.returns.std() < 0.9 * a.returns.std() and b.cut == 0
        assert set(b.lengths) == {8}
    assert told.paired_ratio.value < plain.paired_ratio.value
    assert "count by their chance" in text(told)
    again = evaluate(folder, ["random", "noop"], expected=True, out=tmp_path / "e", **given)
    assert np.array_equal(again.played["noop"]["dream"].drawn, told.played["noop"]["dream"].drawn)


def test_ends_by_danger_are_told(folder, tmp_path):
    given = {"episodes": 4, "progress": False}
    by_danger = evaluate(folder, ["random", "noop"], end="danger", out=tmp_path / "d", **given)
    assert "Dreams ended by the danger" in text(by_danger)
    by_head = evaluate(folder, ["random", "noop"], out=tmp_path / "h", **given)
    # without a danger head the danger is the end chance: the same ends, drawn by the same numbers
    assert np.array_equal(by_danger.returns("dream"), by_head.returns("dream"))
    with pytest.raises(ConfigError, match="unknown end"):
        evaluate(folder, ["random"], end="sometime", **given)


def test_json_has_the_agreed_form(found):
    result, out = found
    data = toys.numbers(out)
    assert data["episodes"] == 12 and data["world"] == result.world
    assert [p["name"] for p in data["policies"]] == ["random", "lazy", "sticky:0.5", "sweep:5"]
    assert data["policies"][1]["source"] == "noop"
    for policy in data["policies"]:
        for place in ("dream", "real"):
            at = policy[place]
            assert at["ci95"][0] <= at["mean"] <= at["ci95"][1] and at["n"] == 12
            assert 0 <= at["truncated"] <= 12
    pairs = {(p["first"], p["second"], p["place"]) for p in data["pairs"]}
    assert pairs == {(*pair, place) for place in ("dream", "real")
                     for pair in combinations(["random", "lazy", "sticky:0.5", "sweep:5"], 2)}
    for pair in data["pairs"]:
        means = {p["name"]: p[pair["place"]]["mean"] for p in data["policies"]}
        gap = means[pair["first"]] - means[pair["second"]]
        assert pair["paired"] and pair["difference"] == pytest.approx(gap, abs=1e-4)
        assert pair["episodes_needed"] is None or pair["episodes_needed"] >= 2
    assert set(data["agreement"]) == {"pearson_r", "kendall_tau", "spearman", "mmrv", "optimism"}
    assert all(set(v) == {"value", "ci95"} for v in data["agreement"].values())
    assert data["drift"][0]["step"] == 1 and data["drift"][-1]["step"] == 40
    last = np.mean([[p[place]["mean"] for place in ("dream", "real")] for p in data["policies"]],
                   0)
    np.testing.assert_allclose([data["drift"][-1][k] for k in ("dream", "real")], last, atol=1e-3)


def test_results_rows_and_pictures(found):
    from worldgym.agents import results

    _, out = found
    rows = {(r["what"], r["metric"]): r for r in results.read(out / "results.json")["rows"]}
    for metric in ("policies", "kendall_tau", "pearson_r", "spearman", "mmrv", "optimism",
                   "paired_episode_ratio"):
        assert ("ladder", metric) in rows
    assert rows["ladder", "policies"]["value"] == 4
    assert rows["lazy", "real_return"]["value"] == 40 and ("lazy", "dream_return") in rows
    for name in ("calibration.png", "drift.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_text_names_everything_and_no_nan(found):
    said = text(found[0])
    for word in ("random", "lazy", "cut", "dream - real", "Kendall's tau", "MMRV", "optimism",
                 "unpaired", "every episode was cut", "cut at 12 steps"):
        assert word in said
    assert "nan" not in said.lower()


def test_until_separated_stops_early_only_for_different_policies(tmp_path):
    def pay(chunk):  # what the next frame looks like depends on the action, and on luck
        return np.asarray(chunk.latents_BFChw.mean((1, 2, 3, 4))).astype(np.float64)

    task = toys.tiny_task(reward=pay, end="never", horizon=2)
    same = evaluate(task, {"a": "noop", "b": "constant:0"}, episodes=30, until_separated=True,
                    out=tmp_path / "same", progress=False)
    assert same.verdict.episodes == 30 and not same.pairs[0].separated
    apart = evaluate(task, {"a": "constant:1", "b": "constant:2"}, episodes=60, slots=20,
                     until_separated=True, out=tmp_path / "apart", progress=False)
    pair = apart.pairs[0]
    assert pair.separated and apart.verdict.episodes < 60
    assert pair.ci95[0] * pair.ci95[1] > 0
    assert toys.numbers(tmp_path / "apart")["sequential"]["stopped_at"] == apart.episodes
    assert "told apart" in text(apart) and "Stopped early" in text(apart)


def test_one_episode_has_no_interval(folder, tmp_path):
    found = evaluate(folder, CAST, episodes=1, real=True, out=tmp_path, progress=False)
    data = toys.numbers(tmp_path)
    assert all(p["dream"]["ci95"] is None for p in data["policies"])
    assert all(p["ci95"] is None and p["episodes_needed"] is None for p in data["pairs"])
    said = text(found)
    assert "unknown" in said and "One episode" in said and "nan" not in said.lower()


def test_equal_values_are_undefined_and_have_no_row(tmp_path):
    task = toys.tiny_task(reward=lambda chunk: np.ones(len(chunk.slots)), end="never",
                          twin="Corridor-v0")
    found = evaluate(task, ["random", "noop", "sticky:0.5"], episodes=4, real=True, out=tmp_path,
                     progress=False)
    said = text(found)
    assert "undefined" in said and "nan" not in said.lower() and "every episode was cut" in said
    data = toys.numbers(tmp_path)
    assert data["agreement"]["pearson_r"] is None and data["paired_episode_ratio"] is None
    assert all(p["dream"]["truncated"] == 4 for p in data["policies"])
    metrics = {r["metric"] for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert "optimism" in metrics and not metrics & {"pearson_r", "kendall_tau", "spearman"}


class TooMany(type(parse_policy("random", THREE))):
    """Acts outside the space of three actions."""

    def choose(self, slot, t, frame_HWC):
        return 5


def test_bad_input_is_named(folder, tmp_path):
    given = {"episodes": 2, "out": tmp_path / "out", "progress": False}
    for policies in ([], (), {}, ["random", "random"], ["a=noop", "a=random"], ["=random"],
                     ["nonsense"], [str(tmp_path / "none.py:make")], ["none.zip"], ["x.py"]):
        with pytest.raises(WorldGymError, match="Fix:"):
            evaluate(folder, policies, **given)
    for change in ({"episodes": 0}, {"slots": 0}, {"games": 0}, {"horizon": 0},
                   {"until_separated": True}):
        with pytest.raises(ConfigError):
            evaluate(folder, ["random"], **{**given, **change})
    with pytest.raises(ConfigError, match="alpha"):
        evaluate(folder, CAST, until_separated=True, alpha=0.0, **given)
    with pytest.raises(ConfigError, match="no real game"):
        evaluate(toys.tiny_task(), ["random"], real=True, **given)
    with pytest.raises(ConfigError, match="horizon"):
        evaluate(toys.tiny_task(horizon=None), ["random"], **given)
    one = parse_policy("random", THREE)
    with pytest.raises(ConfigError, match="two names"):
        evaluate(folder, {"a": one, "b": one}, **given)
    assert not (tmp_path / "out").exists()
    wrong = TooMany(THREE)
    wrong.name = "eager"
    with pytest.raises(ActionError, match="eager"):
        evaluate(folder, {"a": wrong}, **given)


def test_an_agent_of_another_action_space_is_refused(folder, tmp_path):
    pytest.importorskip("stable_baselines3")
    import gymnasium
    from stable_baselines3 import PPO

    from worldgym.agents.model import save_agent

    class Other(toys.Corridor):
        observation_space = gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)
        action_space = gymnasium.spaces.Discrete(5)

    model = PPO("MlpPolicy", Other(), n_steps=8, batch_size=8)
    agent = save_agent(model, tmp_path / "five.zip", {
        "algorithm": "PPO", "policy": "MlpPolicy", "network": {}, "observation": "frame",
        "frame_stack": 1, "observation_shape": [32, 32, 3], "frame_hw": [32, 32],
        "action": {"kind": "discrete", "shape": [], "sizes": [5], "low": [], "high": [],
                   "start": 0}})
    for name in (str(agent), f"noisy:0.1:{agent}"):
        with pytest.raises(ConfigError, match="another world"):
            evaluate(folder, [name], episodes=2, out=tmp_path / "out", progress=False)


@pytest.mark.parametrize("body", [
    "return 3", "raise ValueError('no')", "return undefined_name", "return action.nothing",
])
def test_a_policy_file_that_makes_no_policy_is_named(tmp_path, body):
    with pytest.raises(ConfigError, match="Fix:"):
        parse_policy(toys.policy_file(tmp_path / "bad.py", body), THREE)
    assert parse_policy(toys.policy_file(tmp_path / "good.py"), THREE).name == "random"
    for text_ in ("def make(:\n", "import no_such_module\n", "raise SystemExit(3)\n"):
        (tmp_path / "broken.py").write_text(text_)
        with pytest.raises(ConfigError, match="imported"):
            parse_policy(f"{tmp_path / 'broken.py'}:make", THREE)
    with pytest.raises(ConfigError, match="imported"):
        parse_policy(f"{tmp_path / 'good.py'}:other", THREE)


def test_ladder_of_take_cover_and_of_other_games():
    class Spec:
        action, frame_hw = THREE, (32, 80)

    names = ladder(Spec)
    assert len(names) >= 10 and len(set(names)) == len(names)
    for name in names:
        assert parse_policy(name, THREE)
    Spec.action, Spec.frame_hw = ActionSpec.discrete(4, start=2), (48, 80)
    for name in ladder(Spec):
        assert parse_policy(name, Spec.action)
    Spec.action = ActionSpec(kind="box", shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0))
    for name in ladder(Spec):
        assert parse_policy(name, Spec.action)
    assert expand(("ladder", "noop", "x.zip"), Spec).count("noop") == 1
    with pytest.raises(ConfigError, match="no policies"):
        expand((), Spec)


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["evaluate", "--env", str(folder), "--ladder", "--policy", "mine=sticky:0.9",
            "--episodes", "2"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    (out,) = (tmp_path / "runs").iterdir()  # the same command finds its folder again
    assert cli.main(argv) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert "mine" in said and "sweep:20" in said
    assert len(toys.numbers(out)["policies"]) >= 10
    assert cli.main(["evaluate", "--world", str(folder)]) == 2
    assert "no policies" in capsys.readouterr().err
