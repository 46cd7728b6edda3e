"""The real multi-player games: PettingZoo's own tests, every game of the table, recording.

Seeds do not reproduce episodes in this simulator, so ``seed_test`` cannot hold and is not run;
what must be exact is tested on recorded traces in test_party.py."""

import warnings

import numpy as np
import pytest

pytest.importorskip("pettingzoo")
from worldgym.envs.meltingpot import MeltingPotEnv, available, cells, positions  # noqa: E402

if not available():
    pytest.skip("Melting Pot is not installed (make meltingpot)", allow_module_level=True)

from pettingzoo.test import parallel_api_test, render_test  # noqa: E402
from pettingzoo.utils import parallel_to_aec  # noqa: E402

from worldgym.agents import cli  # noqa: E402
from worldgym.agents.party import party_policy  # noqa: E402
from worldgym.data.party import PartySampler, halved, open_party  # noqa: E402
from worldgym.data.store import Episodes  # noqa: E402
from worldgym.envs.party_games import GAMES, SLOTS  # noqa: E402
from worldgym.envs.party_record import collect_party  # noqa: E402
from worldgym.errors import ActionError, ConfigError, ResetNeeded  # noqa: E402


def play(env, steps, seed=0, actions=None):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        if not env.agents:
            return
        yield env.step({a: int(rng.integers(8)) if actions is None else actions[a]
                        for a in env.agents})


@pytest.mark.parametrize("name, players", [("coins", 2), ("predator_prey", 3)])
def test_pettingzoo_accepts_it(name, players):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = MeltingPotEnv(name, players, max_cycles=40)
        parallel_api_test(env, num_cycles=60)
        env.close()


def test_rendering():
    def make(render_mode=None):
        return parallel_to_aec(MeltingPotEnv("coins", max_cycles=20, render_mode=render_mode))

    render_test(make)
    assert MeltingPotEnv("coins").render() is None


@pytest.mark.parametrize("name", GAMES)
def test_every_game_plays(name):
    game = GAMES[name]
    env = MeltingPotEnv(name, game.players[0], max_cycles=12)
    observations, infos = env.reset(seed=1)
    assert set(observations) == set(infos) == set(env.possible_agents)
    for _ in play(env, 12):
        where = env.cells_N2
        assert (where >= 0).all() and (where < np.array(game.cells_hw[::-1])).all()
        for i, (x, y) in enumerate(where):
            assert game.rows[y][x] not in game.solid or not env.alive_N[i] or name == "territory"
    assert env.state().shape == (64, 80, 3) and env.state().std() > 5
    assert np.array_equal(cells(env.positions_N2, game), env.cells_N2)
    assert np.abs(positions(env.cells_N2, game)).max() < 1
    env.close()


def test_a_player_is_drawn_in_its_cell():
    """Where somebody moves away, the picture of the cell changes; elsewhere it hardly does."""
    env, moved, changed = MeltingPotEnv("coins", max_cycles=80), 0, 0
    env.reset()
    before, frame = env.cells_N2.copy(), env.state()
    for _ in play(env, 60):
        new = env.state()
        for i in range(2):
            if (env.cells_N2[i] != before[i]).any():
                x, y = 8 * (before[i] + np.array(env.game.offset_cells))
                moved += 1
                changed += (new[y:y + 8, x:x + 8] != frame[y:y + 8, x:x + 8]).any()
        before, frame = env.cells_N2.copy(), new
    env.close()
    assert moved > 15 and changed == moved


def test_observations_are_new_arrays_and_half_size_is_half_the_size():
    env, small = MeltingPotEnv("stag_hunt", 3), MeltingPotEnv("coins", cell_px=4)
    observations, _ = env.reset()
    a, b, _ = observations.values()
    a[:] = 0
    assert b.any() and env.state().any() and np.array_equal(b, env.state())
    small.reset()
    assert small.state().shape == (32, 40, 3) and small.observation_space("player_0").shape == (
        32, 40, 3)
    assert halved(env.state()).shape == (32, 40, 3)
    env.close()
    small.close()


def test_time_cuts_and_does_not_end():
    env = MeltingPotEnv("coins", max_cycles=5)
    env.reset()
    *_, (_, _, ends, cuts, _) = play(env, 9)
    assert env.t == 5 and all(cuts.values()) and not any(ends.values()) and env.agents == []
    with pytest.raises(ResetNeeded):
        env.step({})
    env.close()


def test_impossible_settings_and_actions():
    for wrong in ({"game": "poker"}, {"players": 3}, {"cell_px": 5}, {"max_cycles": 0}):
        with pytest.raises(ConfigError):
            MeltingPotEnv(**{"game": "coins"} | wrong)
    env = MeltingPotEnv("coins")
    with pytest.raises(ResetNeeded):
        env.state()
    env.reset()
    for wrong in ({"player_0": 1}, {"player_0": 1, "player_1": 8}):
        with pytest.raises(ActionError):
            env.step(wrong)
    env.close()


POLICIES = [("random", 1.0, lambda: party_policy("random")),
            ("gather", 1.0, lambda: party_policy("gather"))]


def test_recording_goes_on_where_it_was(tmp_path):
    out = tmp_path / "stag_hunt"
    settings = {"policies": POLICIES, "players": (2, 4), "max_cycles": 15, "progress": False,
                "shard_episodes": 2}
    first = collect_party("stag_hunt", out, steps=20, **settings)
    assert (first.episodes, first.steps) == (2, 30)
    frames = Episodes.open(out).episode(0)["frames"].copy()
    again = collect_party("stag_hunt", out, steps=20, **settings)
    assert again.new_steps == 0 and again.steps == 30
    more = collect_party("stag_hunt", out, episodes=5, **settings)
    store = Episodes.open(out)
    assert more.new_steps == 45 and len(store) == 5 and store.agents == SLOTS
    assert np.array_equal(store.episode(0)["frames"], frames)
    store.verify()
    for i in range(5):
        data, players = store.episode(i), len(store.policies[i].split("|"))
        assert data["info_valid"].sum() == players * len(data["frames"]) and players in (2, 4)
        assert np.isnan(data["info_position"][:, players:]).all()
        assert data["truncated"][-1] and not data["info_ended"].any()
    assert sum(p["n"] for p in more.policies.values()) == sum(
        len(p.split("|")) for p in store.policies)
    with pytest.raises(ConfigError, match="another recording"):
        collect_party("stag_hunt", out, episodes=6, **settings | {"max_cycles": 9})


def test_the_command_records_and_clips_can_be_drawn(tmp_path, capsys):
    argv = ["collect-party", "--out", str(tmp_path), "--games", "coins", "scissors", "--steps",
            "12", "--max-cycles", "12", "--cell-px", "4", "--policy", "wander", "chase@0.5"]
    assert cli.main(argv) == 0
    assert "mean return" in capsys.readouterr().out
    stores = open_party(tmp_path)
    assert [*stores] == ["coins", "scissors"] and stores["coins"].steps == 12
    every = {name: np.arange(len(store)) for name, store in stores.items()}
    batch = PartySampler(stores, every, 5, 8)(0)
    assert batch["frames"].shape == (8, 5, 32, 40, 3) and batch["valid"].sum() == 16
