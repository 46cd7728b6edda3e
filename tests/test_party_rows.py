"""Players as rows of one batch, and who is left out of the update."""

import numpy as np
import pytest

pytest.importorskip("pettingzoo")
pytest.importorskip("stable_baselines3")
import torch  # noqa: E402

from tests.party_face_tools import tiny_task  # noqa: E402
from worldgym.agents.party_learner import LiveRollout  # noqa: E402
from worldgym.envs import parallel_env  # noqa: E402
from worldgym.envs.meltingpot import available  # noqa: E402
from worldgym.envs.party_rows import TRAINING_VIEW, DreamPartyVecEnv, PartyVecEnv  # noqa: E402
from worldgym.envs.party_view import PartyView  # noqa: E402
from worldgym.errors import ActionError, ConfigError  # noqa: E402

STEADY, DEADLY = tiny_task(horizon=6), tiny_task(end=-2.0, horizon=30)


def rows(task=DEADLY, slots=2, players=3, **settings):
    return DreamPartyVecEnv(task, "predator_prey", players, slots, **settings)


def moves(i, count):
    return np.random.default_rng(i).integers(8, size=count)


# ---------------------------------------------------------------------------- rows


def test_dreams_can_begin_where_recorded_episodes_did():
    """In all their episodes, and in those of a fork; else anywhere."""
    env, bank = rows(slots=4, beginnings=True), rows().core.task.starts
    chosen = env.core.task.starts
    assert 0 < len(chosen) < len(bank) and DEADLY.starts.beginnings[chosen.rows].all()
    env.reset()
    assert len(env.fork(2)[0].core.task.starts) == len(chosen)


def test_rows_are_the_players_of_single_environments():
    env, singles = rows(seed=3), [
        parallel_env(DEADLY, "predator_prey", 3, observation="crop", frame_stack=2)
        for _ in range(2)]
    obs = env.reset()
    seen = [single.reset(seed=3 + b)[0] for b, single in enumerate(singles)]
    assert obs.shape == (6, 6, 44, 44) and obs.dtype == np.uint8
    went = 0
    for i in range(10):
        for r, (b, p) in enumerate(zip(env.slot_R, env.seat_R, strict=True)):
            if f"player_{p}" in seen[b]:
                assert np.array_equal(obs[r].transpose(1, 2, 0), seen[b][f"player_{p}"])
        act = moves(i, 6)
        obs, rewards, dones, infos = env.step(act)
        over = False
        for b, single in enumerate(singles):
            seen[b], paid, ends, cuts, _ = single.step(
                {a: int(act[3 * b + int(a[-1])]) for a in single.agents})
            for a in paid:
                r = 3 * b + int(a[-1])
                assert rewards[r] == np.float32(paid[a]) and dones[r] == (ends[a] or cuts[a])
                if dones[r]:
                    assert infos[r]["TimeLimit.truncated"] == cuts[a]
                    assert np.array_equal(infos[r]["terminal_observation"].transpose(1, 2, 0),
                                          seen[b][a])
            over |= not single.agents
            went += 1
        if over:
            break
    assert went > 6


def test_who_is_out_waits_and_is_not_played():
    env = rows(slots=3)
    env.reset()
    out, died, waited = np.zeros(9, bool), 0, 0
    for i in range(60):
        _, rewards, dones, _ = env.step(moves(i, 9))
        assert np.array_equal(env.acted_R, ~out)
        assert (rewards[out] == 0).all() and not dones[out].any()
        out |= dones
        died, waited = died + dones.sum(), waited + out.sum()
        for b in range(3):  # all out: the slot has begun anew
            if out[3 * b:3 * b + 3].all():
                out[3 * b:3 * b + 3] = False
    assert died > 5 and waited > 5


def test_rows_refuse_nonsense():
    env = rows()
    with pytest.raises(ActionError, match="waiting"):
        env.step_wait()
    env.reset()
    with pytest.raises(ActionError, match="number of actions"):
        env.step(np.zeros(5, int))
    with pytest.raises(ActionError, match="player_"):
        env.step(np.full(6, 9))
    for wrong in (3, -1):
        with pytest.raises(ConfigError, match="rivals"):
            rows(rivals=wrong)
    with pytest.raises(ConfigError, match="told apart"):
        rows(view=PartyView(observation="frame"))
    env = rows(rivals=1)
    env.reset()
    with pytest.raises(ConfigError, match="nobody plays"):
        env.step(np.zeros(4, int))


def test_rivals_sit_on_every_seat():
    env, asked = rows(STEADY, slots=3, rivals=1), []
    assert env.num_envs == 6 and env.rival_BP.sum(0).tolist() == [1, 1, 1]

    def rival(seen, keys):
        asked.append((seen.shape, keys.tolist()))
        return np.full(len(seen), 7)

    env.rival = rival
    env.reset()
    env.step(np.zeros(6, int))
    acts, alive = env.core.last_actions(), env.core.where().alive_BP
    assert asked[0][0] == (3, 6, 44, 44) and [k[2:] for k in asked[0][1]] == [
        [0, 0], [0, 1], [0, 2]]  # step 0; seats 0, 1, 2
    assert ((acts == 7) <= env.rival_BP).all() and (acts[~env.rival_BP] == 0).all() and alive.any()


# ---------------------------------------------------------------------------- the update


def filled(poison):
    """A buffer of two rows; the second is out in steps 2 and 3, where it holds ``poison``."""
    from gymnasium import spaces

    live = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, 1], [1, 1]], bool)
    starts = np.array([[1, 1], [0, 0], [0, 1], [0, 0], [1, 0], [0, 0]], np.float32)
    buffer = LiveRollout(6, spaces.Box(-9, 9, (1,), np.float32), spaces.Discrete(4), "cpu",
                         gae_lambda=0.9, gamma=0.9, n_envs=2)
    rng = np.random.default_rng(0)
    for t in range(6):
        value, paid = rng.normal(size=2), rng.normal(size=2)
        value[~live[t]], paid[~live[t]] = poison, 0
        buffer.played = lambda t=t: live[t]
        buffer.add(np.full((2, 1), t), np.zeros(2, int), paid, starts[t],
                   torch.tensor(value).float(), torch.zeros(2))
    # the learner is told that the second row's third episode begins by its slot alone
    buffer.compute_returns_and_advantage(torch.zeros(2), np.array([1.0, 1.0]))
    return buffer, live


def test_the_update_does_not_see_who_is_out():
    found = []
    for poison in (0.0, 1e6):
        np.random.seed(1)
        buffer, live = filled(poison)
        batches = list(buffer.get(4))
        sizes = [len(b.advantages) for b in batches]
        assert sum(sizes) == live.sum() == 10 and sizes == [4, 4, 2]
        found.append(torch.cat([torch.stack([b.old_values, b.advantages, b.returns], 1)
                                for b in batches]))
    assert torch.equal(*found) and found[0].abs().max() < 10


def test_all_rows_played_is_the_plain_buffer():
    from stable_baselines3.common.buffers import RolloutBuffer

    np.random.seed(1)
    ours, _ = filled(0.0)
    ours.live[:] = True
    np.random.seed(2)
    ours = [b.advantages for b in ours.get(5)]
    plain, _ = filled(0.0)
    plain.__class__ = RolloutBuffer
    np.random.seed(2)
    assert all(torch.equal(a, b.advantages) for a, b in zip(ours, plain.get(5), strict=True))


@pytest.mark.skipif(not available(), reason="Melting Pot is not installed")
def test_rows_of_the_real_game():
    from worldgym.envs.party_rows import RealParty

    env = PartyVecEnv(RealParty("coins", 2, 2, TRAINING_VIEW, horizon=5), seed=1)
    obs = env.reset()
    assert obs.shape == (4, 6, 44, 44) and obs.std() > 10
    for i in range(1, 11):
        obs, rewards, dones, infos = env.step(moves(i, 4))
        assert env.acted_R.all() and dones.all() == dones.any() == (i % 5 == 0)
        if dones.all():
            assert infos[0]["TimeLimit.truncated"]
            assert infos[0]["terminal_observation"].shape == (6, 44, 44)
    env.close()
