"""The judges of action binding, on a drawn game whose truth is known and on planted dreams."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from binding_toy import played, record  # noqa: E402

from worldgym import checkpoint  # noqa: E402
from worldgym.agents import binding, binding_rows  # noqa: E402
from worldgym.agents.binding import Dream, choose_clips, copied, measure, recorded  # noqa: E402
from worldgym.agents.cli import main  # noqa: E402
from worldgym.agents.tiles import Tiles, TilesConfig  # noqa: E402
from worldgym.agents.tiles_data import cells_of, draw_pairs  # noqa: E402
from worldgym.agents.tiles_learn import learn_tiles  # noqa: E402
from worldgym.data.party import open_party, split_party  # noqa: E402
from worldgym.errors import CheckpointError, ConfigError, DatasetError  # noqa: E402
from worldgym.models import party_nano  # noqa: E402
from worldgym.models.codec import CodecConfig  # noqa: E402
from worldgym.models.party import nano_config  # noqa: E402

CFG = TilesConfig(frames=300, iterations=400, batch=96, width=32, rate=8e-3)
STEPS = (4, 12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two games: three players of fixed colours; two of other colours in every episode."""
    folder = tmp_path_factory.mktemp("party")
    record(folder / "fixed", episodes=10)
    record(folder / "redrawn", players=2, episodes=10, redraw=True, interact=0, seed=1)
    return folder


@pytest.fixture(scope="module")
def tiles(data):
    stores = open_party(data)
    return learn_tiles(stores, *split_party(stores, 0.3), CFG)


@pytest.fixture(scope="module")
def clips(data):
    stores = open_party(data)
    held_out = split_party(stores, 0.3)[1]
    return {g: choose_clips(s, g, held_out[g], steps=12, clips=3) for g, s in stores.items()}


def figures(tiles, clips, roll, game):
    """Values by metric of one roller in one game."""
    found = measure(tiles, {game: clips[game]}, {"x": roll}, STEPS)["x"]
    return {r.metric: r.value for r in binding_rows.rows({"x": found}, [game]) if r.what == "x"}


def test_judges_are_right_on_held_out_frames(tiles):
    for game, found in tiles.card["real_frames"].items():
        assert found["presence"] > 0.99 and found["strays"] < 0.02, (game, found)
        assert found["facing"] > 0.97 and found["usable"] == 1, (game, found)
    assert tiles.card["real_frames"]["fixed"]["interact_seen"] > 0.9
    assert tiles.card["real_frames"]["fixed"]["interact_false"] < 0.05
    assert "interact_seen" not in tiles.card["real_frames"]["redrawn"]  # it has no such action
    assert tiles.card["commit"] and tiles.card["held_out"]


@pytest.mark.parametrize("game", ["fixed", "redrawn"])
def test_the_recording_is_the_upper_bound_and_the_last_frame_the_lower(tiles, clips, game):
    real, still = (figures(tiles, clips, roll, game) for roll in (recorded, copied))
    for name in ("ma_4", "ma_12", "sp_4", "sp_12", "detection"):
        assert real[name] > 0.97 and real[f"{name}_states"] == 1
    assert figures(tiles, clips, played, game) == pytest.approx(real)
    some = clips[game]
    n = int(some.valid_BN[0].sum())
    moved = (np.diff(some.cells_BFN2[:, :, :n], axis=1) != 0).any(-1)
    tries = (some.actions_BFN[:, 1:, :n] >= 1) & (some.actions_BFN[:, 1:, :n] <= 6)
    turns = some.actions_BFN[:, 1:, :n] >= 5
    assert still["ma_12_states"] == pytest.approx(  # what was blocked
        (tries & ~moved & ~turns).sum() / tries.sum(), abs=1e-5)
    assert still["ma_12"] == pytest.approx(still["ma_12_states"], abs=0.03)
    assert still["sp_12"] > 0.97 and still["ma_12"] < 0.3
    if game == "fixed":
        assert real["interact"] == 1 and still["interact"] == pytest.approx(0.5, abs=0.07)
        assert still["interact_hit"] < 0.15 and still["interact_quiet"] > 0.95
    else:
        assert "interact" not in real


@pytest.mark.parametrize("game, order", [("fixed", [1, 2, 0]), ("redrawn", [1, 0])])
def test_a_world_that_moves_the_wrong_player_binds_nothing(tiles, clips, game, order):
    """All are there in every frame, all move as somebody was told to: only the binding is wrong."""
    right, wrong = (figures(tiles, clips, lambda c, o=o: played(c, o), game)
                    for o in (None, order))
    assert right["ma_12"] > 0.97 and right["ma_12_states"] == 1
    assert wrong["ma_12"] < 0.35 and wrong["ma_12_states"] < 0.35
    assert wrong["sp_12"] > 0.97 and wrong["detection"] > 0.97
    if game == "fixed":
        assert wrong["interact"] < 0.65 < right["interact"]


def test_a_world_that_loses_a_player(tiles, clips):
    """From frame 6 on the first of three players is gone: preservation over 12, not over 4."""
    def losing(some):
        rolled = played(some)
        frames, cells = rolled.frames_BFHWC.copy(), cells_of(rolled.positions_BFN2)
        for b, f in np.ndindex(len(some), 13):
            x, y = cells[b, f, 0] * 4
            if f >= 6:
                frames[b, f, y:y + 4, x:x + 4] = 20
        return replace(rolled, frames_BFHWC=frames)

    full, lost = (figures(tiles, clips, roll, "fixed") for roll in (played, losing))
    assert lost["sp_4"] == full["sp_4"] and lost["ma_4"] == full["ma_4"]
    assert lost["sp_12"] == pytest.approx(2 / 3, abs=0.03)
    assert lost["detection"] == pytest.approx(1 - 7 / 12 / 3, abs=0.02)
    assert lost["ma_12"] == pytest.approx(1 - 7 / 12 / 3, abs=0.06)
    assert lost["sp_12_states"] == 1  # its states know nothing of it


def test_a_world_that_doubles_a_player(tiles, clips):
    """Found, but not preserved."""
    def doubling(some):
        rolled = played(some)
        frames, cells = rolled.frames_BFHWC.copy(), cells_of(rolled.positions_BFN2)
        for b in range(len(some)):
            x, y = cells[b, 3, 1] * 4
            taken = {tuple(c) for c in cells[b, 3, :3]}
            to = next(c for c in ((1, 1), (8, 6), (4, 3), (6, 2)) if c not in taken)
            frames[b, 3, to[1] * 4:to[1] * 4 + 4, to[0] * 4:to[0] * 4 + 4] = frames[
                b, 3, y:y + 4, x:x + 4]
        return replace(rolled, frames_BFHWC=frames)

    found = figures(tiles, clips, doubling, "fixed")
    assert found["sp_4"] == found["sp_12"] == pytest.approx(2 / 3, abs=0.03)
    assert found["detection"] > 0.98


def test_the_tally_by_hand():
    """Blocked moves count as stay, turns count, who is not found is wrong, who is out is left."""
    cells = np.zeros((1, 4, 8, 2), int)
    cells[0, :, 0] = [(1, 1), (1, 1), (2, 1), (2, 1)]  # blocked, moves, turns
    cells[0, :, 1] = [(5, 5), (5, 4), (5, 3), (5, 3)]  # out from frame 2 on
    facing = np.zeros((1, 4, 8), int)
    facing[0, 3, 0] = 1
    alive = np.zeros((1, 4, 8), bool)
    alive[:, :, 0] = alive[:, :2, 1] = alive[:, 3:, 1] = True
    actions = np.full((1, 4, 8), -1)
    actions[0, 1:, 0], actions[0, 1:, 1] = (1, 4, 6), (1, 1, 0)
    places = (cells + 0.5) / np.array([10, 8]) * 2 - 1
    clip = binding.Clips("g", np.zeros((1, 4, 32, 40, 3), np.uint8), places, facing, alive,
                         actions, np.arange(8)[None] < 2, np.zeros(1, int))

    def told(seen):
        return {k: v[0].tolist() for k, v in binding.tally(clip, seen, None, (1, 3)).items()}

    seen = binding.Seen(alive.astype(int), cells, facing, None)
    assert told(seen) == {"ma_1": [2, 2], "sp_1": [2, 2], "ma_3": [4, 4], "sp_3": [2, 2],
                          "detection": [4, 4]}
    lost = seen.tiles_BFN.copy()
    lost[0, 2, 0] = 0  # two steps have it at one end
    assert told(replace(seen, tiles_BFN=lost)) == {
        "ma_1": [2, 2], "sp_1": [2, 2], "ma_3": [2, 4], "sp_3": [1, 2], "detection": [3, 4]}
    assert told(replace(seen, facing_BFN=facing * 0))["ma_3"] == [3, 4]
    assert told(replace(seen, facing_BFN=None))["ma_3"] == [3, 3]  # turns cannot be judged
    away = cells.copy()
    away[0, 1, 0] = (1, 2)
    assert told(replace(seen, cells_BFN2=away))["ma_3"] == [2, 4]


def test_intervals_resample_episodes():
    rng = np.random.default_rng(0)

    def games(right, count=10.0):
        return {"g": {"ma_4": np.stack([right, np.full(len(right), count)], 1)}}

    assert binding_rows.interval("ma_4", games(np.array([7.0]))) is None
    assert binding_rows.interval("ma_4", games(np.full(20, 7.0))) == (0.7, 0.7)
    for episodes in (5, 30):  # jackknife, bootstrap
        hits = 0
        for _ in range(60):
            chance = rng.beta(4, 2, episodes)  # episodes differ more than their steps
            low, high = binding_rows.interval("ma_4", games(rng.binomial(10, chance).astype(float)))
            hits += low <= 4 / 6 <= high
        assert 0.85 < hits / 60
    one = games(np.array([10.0, 10, 10, 10, 10, 0, 0, 0, 0, 0]))
    few = binding_rows.interval("ma_4", one | {"h": games(np.full(90, 5.0))["g"]})
    assert 0.45 < few[0] < 0.5 < few[1] < 0.55
    half = {"g": {"interact_hit": np.array([[4.0, 4], [2, 4]]),
                  "interact_quiet": np.array([[9.0, 10], [9, 10]])}}
    assert {r.metric: r.value for r in binding_rows.rows({"x": half}, ["g"])
            if r.what == "x"}["interact"] == pytest.approx((0.75 + 0.9) / 2)


def test_judges_survive_their_file(tiles, clips, tmp_path):
    path = tiles.save(tmp_path / "tiles.safetensors")
    again = Tiles.load(path)
    assert again.card == tiles.card and again.cfg == tiles.cfg
    for some in clips.values():
        seen, same = (binding.look(t, some, some.frames_BFHWC) for t in (tiles, again))
        assert (seen.tiles_BFN == same.tiles_BFN).mean() > 0.999
        assert (seen.cells_BFN2 == same.cells_BFN2).mean() > 0.999


def test_refusals(tiles, data, clips, tmp_path):
    frames = np.zeros((1, 64, 80, 3), np.uint8)
    with pytest.raises(ConfigError, match="another size"):
        tiles.find("fixed", frames, np.ones((1, 8), bool))
    with pytest.raises(ConfigError, match="no judges"):
        tiles.find("chess", frames[:, :32, :40], np.ones((1, 8), bool))
    with pytest.raises(ConfigError, match="another size"):
        draw_pairs(open_party(data)["fixed"], [0], 3, np.random.default_rng(0), 8)
    with pytest.raises(DatasetError, match="nothing to judge"):
        choose_clips(open_party(data)["fixed"], "fixed", [0], steps=1000)
    with pytest.raises(ConfigError, match="cannot play"):
        Dream(party_nano.tiny(), ["fixed"])(clips["redrawn"])
    path = tmp_path / "other.safetensors"
    checkpoint.save(path, {"a": torch.zeros(1)}, {"kind": "other"})
    with pytest.raises(CheckpointError, match="not a file of judges"):
        Tiles.load(path)


def test_clips_stay_within_their_episodes(data):
    store = open_party(data)["fixed"]
    some = choose_clips(store, "fixed", [2, 5], steps=12, clips=4)
    assert some.episode_B.tolist() == [2] * 4 + [5] * 4
    np.testing.assert_array_equal(some.frames_BFHWC[3, -1], store.episode(2)["frames"][-1])
    np.testing.assert_array_equal(some.frames_BFHWC[4, 0], store.episode(5)["frames"][0])
    assert (some.actions_BFN[:, 0] == -1).all() and (some.actions_BFN[:, 1:, :3] >= 0).all()


def test_a_world_with_a_memory_is_given_the_frames_before(data):
    """As many as it can use and as there are: what lies further back changes nothing."""
    store = open_party(data)["fixed"]
    some = choose_clips(store, "fixed", [2, 5], steps=12, clips=4, context=3)
    plain = choose_clips(store, "fixed", [2, 5], steps=12, clips=4)
    np.testing.assert_array_equal(some.frames_BFHWC, plain.frames_BFHWC)
    whole = store.episode(5)
    assert some.known_B[4] == 0 and some.known_B[7] == 3 and len(whole["frames"]) > 15
    np.testing.assert_array_equal(some.past.frames_BFHWC[7, -1], whole["frames"][-14])
    np.testing.assert_array_equal(some.past.actions_BFN[7, -1], whole["actions"][-14])
    made = random_world(facing=True, window=1, recent=2)
    for head in (made.dynamics.dit.head.head, made.dynamics.subjects.head):
        torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    roll = Dream(made.world(), ["fixed", "redrawn"])
    base = roll(some).frames_BFHWC
    far, near = (replace(some.past, frames_BFHWC=some.past.frames_BFHWC.copy()) for _ in range(2))
    far.frames_BFHWC[:, 0] = 255  # of three, the world sees two
    near.frames_BFHWC[:, 2] = 255
    np.testing.assert_array_equal(roll(replace(some, past=far)).frames_BFHWC, base)
    other = roll(replace(some, past=near)).frames_BFHWC
    first = some.known_B == 0  # nothing is before an episode
    np.testing.assert_array_equal(other[first], base[first])
    assert all((other[i, 1] != base[i, 1]).any() for i in np.flatnonzero(~first))


def random_world(**dynamics):
    """A random world of both games on frames of 32 x 40."""
    codec = CodecConfig(frame_hw=(32, 40), channels=4, width=8, deep_width=16)
    return party_nano.fresh(party_nano.PartyNanoConfig(
        name="random", codec=codec, games=("fixed", "redrawn"), outcome_width=8, steps=(1000.0,),
        dynamics=nano_config(codec.latent_chw, 2, 32, 1, 16, slots=4, actions=8, **dynamics)))


def write_world(folder, facing):
    """Its folder."""
    party_nano.save(random_world(facing=facing), folder, {})
    return folder


def test_the_command_measures_worlds_beside_their_baselines(data, tiles, tmp_path, capsys):
    world, other = write_world(tmp_path / "w", True), write_world(tmp_path / "o", False)
    judges, out = tiles.save(tmp_path / "tiles.safetensors"), tmp_path / "party_binding.json"
    common = ["binding", "--world", str(world), "--data", str(data), "--tiles", str(judges),
              "--out", str(out), "--clips", "1", "--steps", "2", "6"]
    assert main([*common, "--baseline", f"plain={other}"]) == 0
    found = json.loads(out.read_text())
    rows = {(r["what"], r["metric"]): r for r in found["rows"]}
    for what in ("model", "snapped", "plain", "copy", "real", "model/fixed", "copy/redrawn"):
        for metric in ("ma_2", "ma_6", "sp_2", "sp_6", "detection", "ma_6_states"):
            assert 0 <= rows[what, metric]["value"] <= 1
    assert rows["real", "sp_6"]["value"] > 0.95 and rows["real", "ma_6_states"]["value"] == 1
    assert rows["model", "ma_6"]["value"] < 0.5 < rows["real", "ma_6"]["value"]
    assert rows["model", "interact"]["n"] == rows["copy", "interact"]["n"]
    assert found["about"]["pooled"] == ["fixed", "redrawn"]
    assert out.with_suffix(".mp4").stat().st_size > 5000 and out.with_suffix(".png").exists()
    assert "by the model's own states" in capsys.readouterr().out
    first = json.loads(out.read_text())["rows"]
    assert main([*common, "--baseline", f"plain={other}"]) == 0
    assert json.loads(out.read_text())["rows"] == first  # the same seed, the same figures
    assert main([*common, "--baseline", "model=x"]) == 2
    assert main([*common, "--games", "chess"]) == 2
