"""Diagnosis: an exact world is found right, and every planted mistake is found."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.agent_toys import tiny_folder
from tests.fit_data import make_store
from tests.known_world import KnownWorld, known_task, record
from worldgym import uncertainty
from worldgym.actions import ActionSpec
from worldgym.agents import cli, reliability, results
from worldgym.agents.diagnose import diagnose
from worldgym.agents.replays import Replayed, choose_clips, ssim
from worldgym.agents.response import action_response, idle_drift, idle_runs, probe_actions
from worldgym.errors import ConfigError, DatasetError, ShapeError
from worldgym.models import nano

SIZES = {"steps": 15, "clips": 20, "forks": 3, "window": 4, "hold": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return record(tmp_path_factory.mktemp("walks") / "data", episodes=30)


@pytest.fixture(scope="module")
def exact(store):
    return diagnose(known_task(), store, **SIZES)


def look(store, **mistakes):
    return diagnose(known_task(KnownWorld(**mistakes)), store, **SIZES)


def whole(found, window):
    return next(b for b in found.ends if b["window"] == window and (b["from"], b["to"]) == (1, 15))


def test_an_exact_world_makes_no_mistake(exact):
    by_step = exact.by_step
    assert by_step["n"][0] == 20 and by_step["n"] == sorted(by_step["n"], reverse=True)
    assert by_step["n"][-1] < 20  # some clips end before the replay does
    assert min(by_step["psnr"]) > 130 and min(by_step["ssim"]) == 1
    assert by_step["psnr_codec"] == by_step["psnr"]  # the codec is exact too
    assert max(by_step["psnr_copy"]) < 60 and max(by_step["ssim_copy"]) < 1
    assert max(by_step["latent_error"]) == max(by_step["reward_error"]) == 0
    assert by_step["end_chance"] == by_step["end_recorded"] and sum(by_step["end_recorded"]) > 0
    for window in (1, 4):
        band = whole(exact, window)
        assert band["ends"] >= 3
        assert all(band[k] == 1 for k in ("auc", "average_precision", "precision", "recall"))
        assert band["predicted"] == pytest.approx(band["recorded"])
    assert exact.uncertainty["wrong_share"] == 0 and "auroc" not in exact.uncertainty
    assert exact.drift["dream_from_real"] and max(exact.drift["dream_from_real"]) == 0
    assert exact.drift["same_from_start"] == exact.drift["real_from_start"]


def test_wrong_pictures_are_found_where_they_begin(store):
    found = look(store, wrong_after=5)
    assert min(found.by_step["psnr"][:5]) > 130 and max(found.by_step["psnr"][5:]) < 40
    assert min(found.by_step["ssim"][:5]) == 1 > max(found.by_step["ssim"][5:])
    assert max(found.by_step["latent_error"][:5]) == 0 < min(found.by_step["latent_error"][5:])
    assert max(found.by_step["reward_error"]) == 0


def test_wrong_rewards_are_found(store):
    found = look(store, bonus=lambda place: 0 * place + 1.5)
    assert found.by_step["reward_error"] == pytest.approx([1.5] * 15)
    assert found.by_step["reward_bias"] == found.by_step["reward_error"]
    # 1.5 is more than half of a usual reward; only windows of nothing but an end are spared
    assert 0.95 < found.uncertainty["wrong_share"] < 1
    less = look(store, bonus=lambda place: 0 * place - 0.1)
    assert less.uncertainty["wrong_share"] == 0
    assert less.by_step["reward_bias"] == pytest.approx([-0.1] * 15)


def test_wrong_ends_are_found(store):
    lies = whole(look(store, chance=lambda place: np.where(place == 0, 0.0, 0.6)), 1)
    assert lies["auc"] == lies["recall"] == lies["precision"] == 0 and lies["predicted"] > 0.5
    half = whole(look(store, chance=lambda place: np.full(len(place), 0.01)), 1)
    assert half["auc"] == 0.5 and half["recall"] == 0 and "precision" not in half
    assert half["average_precision"] == pytest.approx(half["recorded"])
    early = look(store, chance=lambda place: np.where(place == 1, 1.0, 0.0))
    assert whole(early, 1)["recall"] == 0 and whole(early, 4)["recall"] > 0.6


def test_without_recorded_ends_their_measures_are_left_out(tmp_path):
    endless = record(tmp_path / "data", episodes=4, ends=False)
    found = look(endless, chance=lambda place: np.full(len(place), 0.1))
    for band in found.ends:
        assert band["ends"] == 0 and not {"auc", "average_precision", "recall"} & set(band)
    metrics = {row.metric for row in found.rows()}
    assert "end_predicted_within_4" in metrics and "end_auc_within_4" not in metrics
    json.dumps(found.to_json(), allow_nan=False)


def test_spread_that_knows_and_spread_that_does_not(store):
    """The dream pays too much right of place 7; three spreads are asked where it is wrong."""
    world = KnownWorld(bonus=lambda place: 3.0 * (place > 7))

    def told(where):
        def spread(world, state, actions, forks):
            return where((state.latents_BCHW[:, 0, 0, 0] * 128 + 128).round().numpy())

        task = known_task(world, spread=spread)
        return diagnose(task, store, **SIZES | {"window": 1}).uncertainty

    knows = told(lambda place: 0.1 + (place > 7))
    assert knows["auroc"] > 0.85 and 0 < knows["wrong_share"] < 1
    assert knows["auroc_ci95"][0] <= knows["auroc"] <= knows["auroc_ci95"][1]
    assert told(lambda place: 1.1 - (place > 7))["auroc"] == pytest.approx(1 - knows["auroc"])
    dull = told(lambda place: 0 * place + 0.25)
    assert dull["auroc"] == 0.5 and "rank_correlation" not in dull
    assert dull["wrong_share"] == knows["wrong_share"]


def test_doubt_of_reward_and_end_is_told_beside_that_of_the_latents(tmp_path):
    data = make_store(tmp_path / "data", steps=(14, 9, 15, 12))
    sizes = dict(steps=4, clips=8, forks=3, window=2, hold=1)
    task = replace(known_task(), world=nano.tiny(action=data.action), spread=None)
    told = diagnose(task, data, **sizes)
    own = {name: diagnose(replace(task, spread=lambda w, s, a, k, name=name: getattr(
        uncertainty, name)(w, s, a, k)), data, **sizes).uncertainty
        for name in ("fork_spread", "outcome_spread")}
    assert told.uncertainty["auroc_of_latents"] == own["fork_spread"]["auroc"]
    assert told.uncertainty["auroc"] == own["outcome_spread"]["auroc"]
    assert told.uncertainty["reliability"] == own["fork_spread"]["reliability"]


def test_fork_spread_foretells_errors_of_a_windy_dream(store):
    """Wind blows in the dream from place 6 on; recorded walks never meet any."""
    found = look(store, wind=lambda place: 9 * (place >= 6))
    told, curve = found.uncertainty, found.uncertainty["reliability"]
    assert told["auroc"] > 0.5 and told["wrong_share"] > 0.1
    assert told["rank_correlation"] > 0.1 and curve["spread"] == sorted(curve["spread"])
    assert curve["error"][-1] > curve["error"][0] and sum(curve["n"]) > 100


def test_a_deaf_world_is_found(store):
    clips = choose_clips(store, np.arange(30), 8, 4, 6)
    breeze = dict(wind=lambda place: 1)
    for deaf in (True, False):
        pairs = action_response(KnownWorld(deaf=deaf, **breeze), store, clips, hold=3)["pairs"]
        assert [p["actions"] for p in pairs] == [[0, 1], [0, 2], [1, 2]]
        if deaf:
            assert all(p["action_distance"] == p["ratio"] == 0 for p in pairs)
            continue
        assert pairs[2]["ratio"] > 1  # left against right; right against nothing moves half as far
        assert pairs[2]["action_distance"] > pairs[0]["action_distance"]
    still = action_response(KnownWorld(), store, clips, hold=3)["pairs"]
    assert all("ratio" not in p and p["action_distance"] > 0 for p in still)


@pytest.mark.parametrize(("spec", "count"), [
    (ActionSpec.discrete(4, start=2), 4),
    (ActionSpec(kind="multi_discrete", shape=(2,), sizes=(3, 2)), 4),
    (ActionSpec(kind="multi_binary", shape=(3,), sizes=(3,)), 4),
    (ActionSpec(kind="box", shape=(2,), low=(-1.0, 0.0), high=(1.0, 2.0)), 4)])
def test_probed_actions_are_legal_and_different(spec, count):
    probes = probe_actions(spec)
    spec.check(probes)
    assert len(probes) == count == len({p.tobytes() for p in probes})


def test_idle_drift_is_that_of_the_planted_wind(store):
    runs = idle_runs(store, np.arange(30), 8, 10, 6)
    assert 3 <= runs.steps_B.max() <= 10 and len(runs) == 6
    for first, length in zip(runs.firsts_B, runs.steps_B, strict=True):
        assert not store.take("actions", first + 8 + np.arange(length)).any()
    calm = idle_drift(KnownWorld(), store, runs, 10)
    storm = idle_drift(KnownWorld(wind=lambda place: 3), store, runs, 10)
    assert max(calm["dream_from_real"]) == 0 < min(storm["dream_from_real"])
    assert (np.array(storm["dream_from_start"]) > calm["dream_from_start"]).all()
    assert calm["n"][0] == 6 and len(calm["dream_from_start"]) == 10
    assert len(calm["n"]) == len(calm["real_from_start"]) == runs.steps_B.max()


def test_recordings_in_which_nobody_idles(tmp_path):
    data = make_store(tmp_path / "data", action="box", steps=(14, 12))
    assert len(idle_runs(data, np.arange(2), 4, 5, 6)) == 0
    task = replace(known_task(), world=nano.tiny(action=data.action), spread=None)
    drift = diagnose(task, data, steps=3, clips=4, forks=2, window=2, hold=1).drift
    assert len(drift["dream_from_start"]) == 3 and min(drift["dream_from_start"]) > 0
    assert drift["n"] == drift["real_from_start"] == drift["dream_from_real"] == []


def replayed(chance, ended, reward=0.0, there=None):
    """One clip per column."""
    chance = np.array(chance, float)
    there = np.ones(chance.shape, bool) if there is None else np.array(there, bool)
    ended, zero = np.array(ended, bool), np.zeros(chance.shape)
    return Replayed(there, there & ~ended, {}, zero, zero, zero, zero + reward, zero,
                    chance * there, zero.astype(bool), ended)


def test_windows_worked_out_by_hand():
    told = replayed([[0.5, 0.1], [0.5, 0.2], [0.0, 0.5], [0.2, 0.9]],
                    [[0, 0], [0, 1], [0, 0], [0, 0]], there=[[1, 1], [1, 1], [1, 0], [1, 0]])
    chance, came, counts = reliability.windows(told, 2)
    # clip 0 never ends; its last window is cut off. Clip 1 ends at its second step
    assert counts.tolist() == [[True, True], [True, True], [True, False], [False, False]]
    assert chance[0].tolist() == pytest.approx([0.75, 1 - 0.9 * 0.8])
    assert chance[1:3, 0].tolist() == pytest.approx([0.5, 0.2])
    assert chance[1, 1] == pytest.approx(0.2)
    assert came[0].tolist() == [False, True] and came[1].tolist() == [False, True]
    wrong, _ = reliability.wrong_soon(told, 2, 0.0)
    assert wrong.tolist() == [[True, True], [True, True], [False, False], [False, False]]
    off, counts = reliability.wrong_soon(replace(told, reward_SB=np.array(
        [[0, 0], [0, 9], [0, 9], [5.0, 0]])), 2, 2.0)
    assert off[2, 0]  # the reward of the step after it
    assert not off[~counts].any()
    assert reliability.wrong_soon(replayed([[0.0], [0.0]], [[0], [1]], reward=[[0.0], [9.0]]), 1,
                                  1.0)[0].tolist() == [[False], [True]]  # the end was not foreseen


def test_an_honest_spread_gives_one():
    rng = np.random.default_rng(0)
    sd = rng.uniform(0.1, 1, (40, 50))
    error = np.abs(rng.normal(size=sd.shape)) * sd * np.sqrt(2)
    honest = replace(replayed(np.zeros(sd.shape), np.zeros(sd.shape)), spread_SB=sd, error_SB=error)
    told = reliability.uncertainty(honest, 3, 0.0)
    assert told["error_over_spread"] == pytest.approx(1, abs=0.06)
    curve = told["reliability"]
    expected = np.sqrt(2) * np.array(curve["spread"])
    assert np.array(curve["error"]) == pytest.approx(expected, rel=0.3)
    proud = reliability.uncertainty(replace(honest, error_SB=3 * error), 3, 0.0)
    assert proud["error_over_spread"] == pytest.approx(3 * told["error_over_spread"])


def test_end_reliability_bins():
    told = replayed([[0.05, 0.05, 0.95, 0.95, 1.0]], [[0, 1, 1, 1, 0]])
    curve = reliability.end_reliability(told, 1)
    assert curve["predicted"] == pytest.approx([0.05, 2.9 / 3]) and curve["n"] == [2, 3]
    assert curve["recorded"] == pytest.approx([1 / 2, 2 / 3])


def test_the_interval_draws_clips():
    clip = np.repeat(np.arange(20), 30)
    truth = np.tile(np.arange(30) >= 20, 20)
    score = truth + np.random.default_rng(0).normal(size=600)
    low, high = reliability.over_clips(reliability.auc, score, truth, clip)
    assert low < reliability.auc(score, truth) < high < 1
    assert reliability.over_clips(reliability.auc, score, np.ones(600, bool), clip) is None


def test_clips_are_different_places_inside_episodes(store):
    clips = choose_clips(store, np.arange(30), 8, 15, 60, seed=1)
    assert len(np.unique(clips.firsts_B)) == 60 and (np.diff(clips.steps_B) <= 0).all()
    for first, steps in zip(clips.firsts_B, clips.steps_B, strict=True):
        episode = np.searchsorted(store.starts, first, side="right") - 1
        last = store.starts[episode] + store.lengths[episode]
        assert first + 8 + steps - 1 <= last  # ends with the episode, or is complete
        assert steps == 15 or first + 8 + steps - 1 == last
    again = choose_clips(store, np.arange(30), 8, 15, 60, seed=1)
    assert np.array_equal(again.firsts_B, clips.firsts_B)
    assert not np.array_equal(choose_clips(store, np.arange(30), 8, 15, 60).firsts_B,
                              clips.firsts_B)


def test_only_the_given_episodes_are_read(store, exact):
    held = store.split(0.3, seed=0)[1]
    found = diagnose(known_task(), store, held, **SIZES)
    assert found.settings["episodes"] == len(held) < 30 == exact.settings["episodes"]
    clips = choose_clips(store, held, 8, 15, 12)
    episode = np.searchsorted(store.starts, clips.firsts_B, side="right") - 1
    assert set(episode) <= set(held)


@pytest.mark.parametrize("change", [
    {"steps": 0}, {"clips": 1}, {"forks": 1}, {"forks": 2.5}, {"window": 0}, {"window": 16},
    {"hold": 0}, {"clips": True}])
def test_impossible_numbers_are_refused(store, change):
    with pytest.raises(ConfigError, match="Fix: "):
        diagnose(known_task(), store, **SIZES | change)


def test_recordings_that_do_not_fit_are_refused(store, tmp_path):
    for changes, words in (({"steps": 60}, "too short"), ({"clips": 10**5}, "too few places")):
        with pytest.raises(DatasetError, match=words):
            diagnose(known_task(), store, **SIZES | changes)
    with pytest.raises(DatasetError, match="no episodes"):
        diagnose(known_task(), store, [], **SIZES)
    with pytest.raises(DatasetError, match="no such episodes"):
        diagnose(known_task(), store, [0, 30], **SIZES)
    with pytest.raises(DatasetError, match="another game: got Walk-v0"):
        diagnose(known_task(twin="Run-v0"), store, **SIZES)
    with pytest.raises(DatasetError, match="other actions"):
        diagnose(known_task(KnownWorld("box")), store, **SIZES)
    other = make_store(tmp_path / "other", steps=(30, 30))
    with pytest.raises(DatasetError, match=r"frame size: got \(32, 32\); expected \(40, 40\)"):
        task = known_task()
        task.world.spec = replace(task.world.spec, action=other.action)
        diagnose(task, other, **SIZES)
    with pytest.raises(DatasetError, match="12 context frames") as caught:
        task.world.spec = replace(task.world.spec, frame_hw=(32, 32), context_frames=12)
        diagnose(task, make_store(tmp_path / "short", steps=(9, 5)), **SIZES)
    assert "record longer episodes" in str(caught.value)


def test_a_trained_kind_of_world_every_action_kind(tmp_path):
    for kind in ("discrete", "multi_discrete", "multi_binary", "box"):
        data = make_store(tmp_path / kind, action=kind, steps=(14, 9, 15, 12))
        world = nano.tiny(action=data.action)
        task = replace(known_task(), world=world, spread=None)
        found = diagnose(task, data, steps=4, clips=6, forks=2, window=2, hold=1)
        again = diagnose(task, data, steps=4, clips=6, forks=2, window=2, hold=1)
        assert found.to_json() == again.to_json()
        json.dumps(found.to_json(), allow_nan=False)
        assert found.uncertainty["error_over_spread_1"] > 0
        assert all(p["ratio"] > 0 for p in found.response["pairs"])


def test_ssim_of_known_pictures():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 16, 24, 3), np.uint8)
    assert ssim(a, a).tolist() == [1, 1]
    assert (ssim(a, 255 - a) < 0).all()
    worse = np.clip(a.astype(int) + rng.integers(-60, 60, a.shape), 0, 255).astype(np.uint8)
    slight = np.clip(a.astype(int) + rng.integers(-9, 9, a.shape), 0, 255).astype(np.uint8)
    with pytest.raises(ShapeError, match="7 pixels"):
        ssim(a[:, :6], a[:, :6])
    assert (ssim(a, worse) < ssim(a, slight)).all() and (ssim(a, slight) < 1).all()


def test_command(tmp_path, capsys):
    world, data, out = tiny_folder(tmp_path / "world"), tmp_path / "data", tmp_path / "out"
    assert cli.main(["collect", "--env", "Corridor-v0", "--out", str(data), "--steps", "120",
                     "--policy", "sticky:0.4", "--frame-hw", "32", "32"]) == 0
    words = ["diagnose", "--world", str(world), "--data", str(data), "--out", str(out), "--steps",
             "4", "--clips", "5", "--forks", "2", "--window", "2"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "psnr_copy_4" in text and "diagnosis.json" in text
    content = results.read(out / "diagnosis.json")
    assert content["about"]["command"] and len(content["rows"]) > 20
    assert {r["metric"] for r in content["rows"]} >= {"psnr_1", "ssim_4", "reward_error_4"}
    assert content["diagnosis"]["settings"]["clips"] == 5
    for name in ("frames", "ends", "uncertainty", "actions"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*words, "--forks", "1"]) == 2
    assert cli.main([*words[:3], "--data", str(world), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("Fix: ") == 2
