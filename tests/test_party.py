"""Recordings of several players without a simulator: store, clips, games table, scripted players,
and what recorded traces of the real games say about who is alive."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from worldgym.actions import ActionSpec
from worldgym.agents import cli
from worldgym.agents.party import (
    MIXTURE,
    MOVES,
    STEPS,
    mixture,
    party_policy,
    route,
    turn_towards,
)
from worldgym.data.chunks import ChunkSampler
from worldgym.data.party import PartySampler, halved, open_party, split_party
from worldgym.data.store import Episodes
from worldgym.envs.party_games import ACTIONS, CELLS_HW, GAMES, INTERACT, SLOTS, game_named
from worldgym.envs.party_scene import Scene
from worldgym.errors import ConfigError, DatasetError

ROOT = Path(__file__).resolve().parent.parent
TRACES = ROOT / "tests" / "traces"
N, HW = 4, (4, 6)


def record(steps, players, seed, **changes):
    """A made-up episode, ``players`` players in N slots; frame t shows t, rewards are 10 i + t."""
    rng, rows = np.random.default_rng(seed), steps + 1
    valid = np.arange(N) < players
    actions = rng.integers(0, 8, (rows, N)).astype(np.int16)
    actions[:, ~valid], actions[0] = -1, -1
    rewards = (10 * np.arange(N) + np.arange(rows)[:, None]) * valid * 1.0
    rewards[0] = 0
    position = np.where(valid[:, None], np.arange(N)[:, None] / 10, np.nan)
    last = np.arange(rows) == steps
    return {
        "frames": np.broadcast_to(np.arange(rows)[:, None, None, None], (rows, *HW, 3)).astype(
            np.uint8), "actions": actions, "rewards": rewards.astype(np.float32),
        "terminated": last & (seed % 2 == 0), "truncated": last & (seed % 2 == 1),
        "info_position": np.broadcast_to(position, (rows, N, 2)).astype(np.float32),
        "info_orientation": np.where(valid, np.arange(N), -1).astype(np.int8)[None].repeat(rows, 0),
        "info_alive": valid[None].repeat(rows, 0), "info_valid": valid[None].repeat(rows, 0),
        "info_ended": last[:, None] & valid, "seed": None, "policy": "|".join(["random"] * players),
        **changes}


def build(folder, lengths=(7, 3, 12, 5)):
    store = Episodes.create(folder, ActionSpec.discrete(8), HW, 8.0, {"game": folder.name}, N)
    made = [record(steps, 2 + k % 3, k) for k, steps in enumerate(lengths)]
    store.append(made[:2])
    store.append(made[2:])
    return store, made


@pytest.fixture(scope="module")
def party(tmp_path_factory):
    folder = tmp_path_factory.mktemp("party")
    build(folder / "long", (40, 50, 30, 35, 33))
    build(folder / "short")
    return folder


# ---- store


def test_store_keeps_every_player(party):
    store, made = open_party(party)["short"], build_made()
    assert (store.agents, len(store), store.steps) == (N, 4, 27)
    assert store.fields["actions"] == (np.dtype(np.int16), (N,))
    assert store.fields["rewards"] == (np.dtype(np.float32), (N,))
    for i, episode in enumerate(made):
        got = pickle.loads(pickle.dumps(store)).episode(i)
        for key, value in episode.items():
            same = np.array_equal(got[key], value, equal_nan=key == "info_position") if isinstance(
                value, np.ndarray) else got[key] == value
            assert same, key
    store.verify()
    assert store.take("rewards", [[1, 2]]).shape == (1, 2, N)
    window = ChunkSampler(store, np.arange(4), 3, 5)(0)
    assert window["actions"].shape == (5, 3, N)


def build_made():
    return [record(steps, 2 + k % 3, k) for k, steps in enumerate((7, 3, 12, 5))]


@pytest.mark.parametrize("change, word", [
    ({"actions": np.full((4, N), 9, np.int16)}, "row 0|outside"),
    ({"actions": np.zeros((4, N), np.int16)}, "row 0"),
    ({"actions": np.array([[-1] * 4, [1, 1, -1, -1], [1, -1, -1, -1], [1, 1, -1, -1]], np.int16)},
     "outside"),
    ({"actions": np.array([[-1] * 4, [1, 1, -1, -1], [1, 1, 2, -1], [1, 1, 2, -1]], np.int16)},
     "joins"),
    ({"rewards": np.ones((4, N), np.float32)}, "row 0"),
    ({"rewards": np.full((4, N), np.nan, np.float32)}, "not finite"),
    ({"rewards": np.zeros(4, np.float32)}, "wrong shape"),
])
def test_store_refuses_what_makes_no_sense(tmp_path, change, word):
    store = Episodes.create(tmp_path / "d", ActionSpec.discrete(8), HW, 8.0, {}, N)
    with pytest.raises(Exception, match=word):
        store.append([record(3, 2, 0, **change)])
    assert len(Episodes.open(store.path)) == 0


def test_several_players_need_one_discrete_action_each(tmp_path):
    for spec in (ActionSpec.discrete(8, start=1), ActionSpec(kind="multi_binary", shape=(3,),
                                                             sizes=(3,))):
        with pytest.raises(DatasetError, match="player slots"):
            Episodes.create(tmp_path / "d", spec, HW, 8.0, {}, N)


def test_tools_for_one_player_refuse_it(party):
    from worldgym.train.fit import FitConfig, fit

    with pytest.raises(DatasetError, match="several players"):
        open_party(party)["short"].one_player()
    with pytest.raises(DatasetError, match="several players"):
        fit(FitConfig(data=str(party / "short"), out=str(party / "world")))


# ---- clips


def sampler(party, **settings):
    stores = open_party(party)
    every = {name: np.arange(len(store)) for name, store in stores.items()}
    given = {"frames": 4, "batch": 6, "permute": False} | settings
    return PartySampler(stores, given.pop("ids", every), **given)


def test_clips_stay_inside_episodes_and_rows_match(party):
    clips, stores = sampler(party, batch=64), open_party(party)
    batch = clips(3)
    assert batch["frames"].shape == (64, 4, *HW, 3)
    for b in range(64):
        store = stores[clips.games[batch["game"][b]]]
        rows = batch["rows"][b]
        episode = np.searchsorted(store.starts, rows, side="right") - 1
        assert len(set(episode)) == 1 and (np.diff(rows) == 1).all()
        data, first = store.episode(int(episode[0])), rows[0] - store.starts[episode[0]]
        part = slice(first, first + 4)
        assert np.array_equal(batch["frames"][b], data["frames"][part])
        assert np.array_equal(batch["actions"][b, 1:], data["actions"][part][1:])
        assert np.array_equal(batch["rewards"][b, 1:], data["rewards"][part][1:])
        assert (batch["actions"][b, 0] == -1).all() and not batch["rewards"][b, 0].any()
        assert np.array_equal(batch["positions"][b], np.nan_to_num(data["info_position"][part]))
        assert np.array_equal(batch["valid"][b], data["info_valid"][0])
        assert np.array_equal(batch["ended"][b], data["info_ended"][part])


def test_games_are_balanced_whatever_their_length(party):
    clips = sampler(party, batch=500)
    share = np.mean([clips(i)["game"].mean() for i in range(4)])
    assert 0.45 < share < 0.55
    assert len(clips) == sum(int((s.lengths - 2).clip(0).sum()) for s in open_party(party).values())


def test_every_window_of_a_game_comes_up(party):
    clips = sampler(party, batch=200)
    seen = {(g, int(r[0])) for i in range(20) for out in [clips(i)]
            for g, r in zip(out["game"].tolist(), out["rows"], strict=True)}
    assert len(seen) == len(clips)


def test_batch_depends_on_seed_and_iteration_and_ranks_share_it(party):
    whole = sampler(party, permute=True)(5)
    again = sampler(party, permute=True)(5)
    parts = [sampler(party, permute=True, rank=r, world_size=4)(5) for r in range(4)]
    for key, value in whole.items():
        assert np.array_equal(value, again[key])
        assert np.array_equal(value, np.concatenate([p[key] for p in parts])), key
    assert not np.array_equal(sampler(party)(5)["rows"], sampler(party)(6)["rows"])
    assert not np.array_equal(sampler(party)(5)["rows"], sampler(party, seed=1)(5)["rows"])


def test_shuffled_slots_move_everything_of_a_player_together(party):
    plain, mixed = sampler(party, batch=40)(1), sampler(party, batch=40, permute=True)(1)
    assert np.array_equal(plain["frames"], mixed["frames"])
    moved = 0
    for b in range(40):
        players = int(plain["valid"][b].sum())
        assert mixed["valid"][b].sum() == players
        for slot in np.flatnonzero(mixed["valid"][b]):
            was = int(round(10 * float(mixed["positions"][b, 0, slot, 0])))  # slot i lies at i / 10
            moved += was != slot
            for key in ("actions", "rewards", "orientation", "alive", "ended", "positions"):
                assert np.array_equal(mixed[key][b, :, slot], plain[key][b, :, was]), key
    assert moved > 20


def test_extra_arrays_and_half_size(party):
    stores = open_party(party)
    extra = {name: {"latents": np.arange(store.rows, dtype=np.float32)[:, None] + 1000 * k}
             for k, (name, store) in enumerate(stores.items())}
    out = sampler(party, extra=extra, halve=True)(0)
    assert np.array_equal(out["latents"][..., 0], out["rows"] + 1000 * out["game"][:, None])
    assert out["frames"].shape[2:] == (2, 3, 3)
    picture = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    mean = picture.reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
    assert np.array_equal(halved(picture), np.floor(mean + 0.5))


def test_split_is_by_episode(party):
    stores = open_party(party)
    train, held = split_party(stores, 0.3)
    for name, store in stores.items():
        both = np.concatenate([train[name], held[name]])
        assert sorted(both) == list(range(len(store))) and len(held[name])
    rows = np.concatenate([sampler(party, ids=train, batch=50)(i)["rows"].ravel()[
        np.repeat(sampler(party, ids=train, batch=50)(i)["game"] == 0, 4)] for i in range(3)])
    starts = stores["long"].starts
    assert not set(np.searchsorted(starts, rows, side="right") - 1) & set(held["long"])


@pytest.mark.parametrize("settings", [
    {"frames": 1}, {"frames": 60}, {"batch": 0}, {"rank": 2}, {"seed": -1}, {"ids": {}}])
def test_impossible_clips_are_refused(party, settings):
    with pytest.raises((ConfigError, DatasetError)):
        sampler(party, **settings)


def test_folder_without_games_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="collect-party"):
        open_party(tmp_path)


# ---- the table of games


def test_games_fit_the_frame_and_span_two_to_seven_players():
    assert len(GAMES) >= 12
    assert {n for g in GAMES.values() for n in g.players} == {2, 3, 4, 5, 6, 7}
    for name, game in GAMES.items():
        height, width = game.cells_hw
        assert name == game.name and {len(row) for row in game.rows} == {width}
        assert height <= CELLS_HW[0] and width <= CELLS_HW[1] and max(game.players) < SLOTS
        assert json.loads(json.dumps(game.recipe()))["substrate"] == game.substrate
        assert len(game.role_of(5)) in (0, 5)
        assert any(char not in game.solid for row in game.rows for char in row)
    with pytest.raises(ConfigError, match="coins"):
        game_named("poker")


# ---- scripted players


def scene(rows=None, cells=((1, 1), (6, 4)), facing=(0, 0), name="commons_harvest", apples=()):
    game = GAMES[name]
    frame = np.zeros((CELLS_HW[0] * 8, CELLS_HW[1] * 8, 3), np.uint8)
    for x, y in apples:
        frame[8 * y:8 * y + 8, 8 * x:8 * x + 8] = game.pickups[0]
    return Scene(game, frame, np.array(cells), np.array(facing), np.ones(len(cells), bool))


def started(name, seed=0):
    player = party_policy(name)
    player.reset(np.random.default_rng(seed))
    return player


@pytest.mark.parametrize("facing", range(4))
def test_gatherer_walks_to_the_nearest_apple_whatever_it_faces(facing):
    player, here = started("gather"), (2, 3)
    for _ in range(8):
        view = scene(cells=(here, (8, 6)), facing=(facing, 0), apples=((5, 3), (8, 1)))
        action = player.act(view, 0)
        assert action in MOVES
        way = STEPS[(MOVES.index(action) + facing) % 4]
        here = here[0] + way[0], here[1] + way[1]
        if here == (5, 3):
            break
    assert here == (5, 3)


def test_pickups_are_read_from_the_frame_at_both_sizes():
    view = scene(apples=((5, 3), (1, 1), (6, 4)))
    small = Scene(view.game, halved(view.frame), view.cells_N2, view.orientation_N, view.alive_N)
    for s in (view, small):
        assert sorted(s.pickups(0)) == [(1, 1), (5, 3)]  # (6, 4) is where the other player stands


def test_chaser_turns_and_interacts():
    other = (3, 3)
    assert started("chase").act(scene(cells=((3, 5), other)), 0) == INTERACT
    turn = started("chase").act(scene(cells=((3, 5), other), facing=(3, 0)), 0)
    assert turn == turn_towards(0, 3)
    far = started("chase").act(scene(cells=((3, 6), (3, 1))), 0)
    assert far in MOVES


def test_prey_does_not_hunt_and_teams_do_not_shoot_themselves():
    prey = scene(cells=((3, 5), (3, 4)), name="predator_prey")
    assert prey.roles == ("predator", "prey")
    assert started("chase").act(prey, 0) == INTERACT
    idle = started("chase")
    assert np.mean([idle.act(prey, 1) == INTERACT for _ in range(300)]) < 0.2
    team = scene(cells=((3, 5), (8, 1), (3, 4), (1, 1)), name="paintball")
    assert started("chase").act(team, 0) != INTERACT


def test_worker_faces_its_place_and_interacts():
    view = scene(cells=((1, 1), (4, 2)), facing=(3, 0), name="cooking_cramped")
    player = started("work")
    player.stage, player.target, player.wait = 0, (0, 1), 10
    assert player.act(view, 0) == INTERACT and player.wait == 0


def test_miners_stay_at_ore_until_it_is_gone():
    """Of all places of work they go to one that shows what pays."""
    player, ore = started("work"), ((4, 2),)
    view = scene(cells=((4, 3), (8, 6)), name="coop_mining", apples=ore)
    for _ in range(5):
        assert player.act(view, 0) == INTERACT and player.target == (4, 2)
    player.act(scene(cells=((4, 3), (8, 6)), name="coop_mining", apples=((7, 5),)), 0)
    assert player.wait == 0  # gone: on to the next
    player.act(scene(cells=((4, 3), (8, 6)), name="coop_mining", apples=((7, 5),)), 0)
    assert player.target == (7, 5)
    player.act(scene(cells=((4, 3), (8, 6)), name="coop_mining"), 0)
    assert player.target == (7, 5) and player.wait > 0


def test_dead_players_do_nothing_and_every_name_plays():
    view = scene()
    view.alive_N[0] = False
    for name in ("wander", "gather", "chase", "work"):
        assert started(name).act(view, 0) == 0
    for text in MIXTURE:
        player = started(text.partition("@")[0])
        assert all(0 <= player.act(scene(apples=((2, 2),)), 1) < len(ACTIONS) for _ in range(20))
        assert player.name == text.partition("@")[0].replace("random", "random:2", 1) or (
            player.name == text.partition("@")[0])


def test_kitchens_are_worked_in():
    assert "work@0.3" in mixture(GAMES["cooking_cramped"])
    assert all(mixture(GAMES[n]) == MIXTURE for n in ("coins", "clean_up", "territory"))


def test_interact_can_be_made_more_likely_and_sticky_sticks():
    often = started("random:8")
    assert 0.4 < np.mean([often.act(scene(), 0) == INTERACT for _ in range(600)]) < 0.65
    held = started("sticky:0.2")
    got = np.array([held.act(scene(), 0) for _ in range(600)])
    assert 0.75 < (got[1:] == got[:-1]).mean() < 0.92


def test_no_way_is_no_way():
    assert route((0, 0), [(2, 0)], {(0, 0)}, np.random.default_rng(0)) is None
    assert route((0, 0), [], {(0, 0)}, np.random.default_rng(0)) is None


@pytest.mark.parametrize("name", ["nobody", "sticky:0", "slips:2:gather", "slips:x:gather",
                                  "random:many", "gather:3", "slips:0.1:nobody"])
def test_unknown_players_are_refused(name):
    with pytest.raises(ConfigError):
        party_policy(name)


@pytest.mark.parametrize("argv", [
    ["--games", "poker"], ["--policy", "gather@much"], ["--policy", "nobody"],
    ["--steps", "0"], ["--cell-px", "5"], ["--steps", "1000000"],
    ["--games", "coins", "--players", "7"]])
def test_command_names_the_mistake(argv, tmp_path, capsys):
    assert cli.main(["collect-party", "--out", str(tmp_path / "o"), *argv]) == 2
    assert "Fix:" in capsys.readouterr().err and not (tmp_path / "o").exists()


# ---- recorded traces of the real games


def trace(name):
    data = dict(np.load(TRACES / f"{name}.npz"))
    return data | {"events": json.loads(str(data["events"]))}


def hit(events):
    from worldgym.envs.meltingpot import removed

    return removed([(name, values) for name, values in events])


def test_zapped_players_are_out_for_five_frames_and_come_back():
    pytest.importorskip("pettingzoo")
    data, outs = trace("commons_harvest"), 0
    alive = data["alive"]
    for t in range(1, len(alive)):
        fell = np.flatnonzero(alive[t - 1] & ~alive[t])
        named = hit(data["events"][t])
        assert set(fell) <= set(named)  # nobody vanishes without an event
        assert not alive[t, named].any()  # and in this game a hit takes out
        for i in fell:
            rest = alive[t:t + 6, i]
            if len(rest) == 6:
                assert rest.tolist() == [False] * 5 + [True]
                outs += 1
        for i in np.flatnonzero(~alive[t] & ~alive[t - 1]):
            assert (data["cells"][t, i] == data["cells"][t - 1, i]).all()
    assert outs >= 5 and not data["finished"].any()


def test_eaten_prey_is_gone_for_good():
    pytest.importorskip("pettingzoo")
    data = trace("predator_prey")
    alive, roles = data["alive"], GAMES["predator_prey"].role_of(data["alive"].shape[1])
    eaten = np.flatnonzero(~alive[-1])
    assert len(eaten) and "prey" in {roles[i] for i in eaten}
    assert (np.diff(alive.astype(int), axis=0) <= 0).all()  # nobody comes back
    for i in eaten:
        t = int(np.argmin(alive[:, i]))
        assert hit(data["events"][t]) == [i] and data["finished"][t, i]


def test_cells_of_the_living_move_as_their_actions_say():
    """Displacements of the traces: one cell at most, in the direction facing and action give."""
    data, agree, moved = trace("predator_prey"), 0, 0
    for t in range(1, len(data["cells"])):
        for i in range(data["cells"].shape[1]):
            action = int(data["actions"][t, i])
            way = tuple(data["cells"][t, i] - data["cells"][t - 1, i])
            if way == (0, 0) or not data["alive"][t, i]:
                continue
            moved += 1
            if action in MOVES:
                turn = MOVES.index(action) + int(data["orientation"][t - 1, i])
                agree += way == STEPS[turn % 4]
    assert moved > 50 and agree == moved


def test_missing_simulator_says_what_to_run():
    pytest.importorskip("pettingzoo")
    code = ("import sys; sys.modules['meltingpot.substrate'] = None\n"
            "from worldgym.envs.meltingpot import MeltingPotEnv, available\n"
            "from worldgym.errors import MissingDependencyError\n"
            "assert not available()\n"
            "try: MeltingPotEnv('coins')\n"
            "except MissingDependencyError as e: print('make meltingpot' in str(e))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
