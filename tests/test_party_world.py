"""ActionParty as a world of the engine: replay, batch invariance, states as values, refusals."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from engine_tools import bytes_of, pages_used  # noqa: E402
from party_tools import moves, starts  # noqa: E402

from worldgym import engine  # noqa: E402
from worldgym.errors import (  # noqa: E402
    ActionError,
    CheckpointError,
    ConfigError,
    NotFiniteError,
    ShapeError,
)
from worldgym.models import nano, party_nano  # noqa: E402
from worldgym.models.party_world import snap  # noqa: E402
from worldgym.noise import normal  # noqa: E402
from worldgym.state import WorldState  # noqa: E402
from worldgym.uncertainty import fork_spread  # noqa: E402

KINDS = {"published": {}, "facing": dict(subjects=dict(facing=True)),
         "no MSA, frame-wise MCA, no RoPE": dict(subjects=dict(msa=False, mca="frame",
                                                              rope_sa=False)),
         "no MCA": dict(subjects=dict(mca="none")), "pooled": dict(subjects=dict(pooled=True)),
         "guided, UniPC": dict(guidance=2.0, solver_steps=3), "sink": dict(sink=1),
         "tiles": dict(tiles=(12, 20, 5, 4)), "no memory, four frames": dict(subjects=dict(
             recent=3, window=1))}


@pytest.fixture(scope="module")
def world():
    return party_nano.tiny()


def told(chunk, row):
    """What a step brought to one slot, as bytes."""
    s = chunk.subjects
    return (chunk.latents_BFChw[row].numpy().tobytes(), s.states_BFNS[row].numpy().tobytes(),
            s.rewards_BN[row].tobytes(), s.ended_BN[row].tobytes(), float(chunk.reward_B[row]),
            s.end_probability_BN[row].tobytes(), bool(chunk.terminated_B[row]))


def everything(state, slot):
    rows = len(state.tables.pages_BP) // state.num_slots
    if rows == 1:
        return bytes_of(state, slot), {k: v[slot].numpy().tobytes() for k, v in state.extra.items()}
    return {k: v[slot].numpy().tobytes() for k, v in state.extra.items()}


def play(world, state, steps, first=0, slots=None):
    out = []
    for number in range(first, first + steps):
        every = moves(world, 8, number)
        state, chunk = world.step(state, every[:state.num_slots] if slots is None else every[slots])
        out.append([told(chunk, row) for row in range(state.num_slots)])
    return state, out


def column(steps, slot):
    return [step[slot] for step in steps]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_slot_does_not_know_its_batch(kind):
    """Bit for bit: latents, states, rewards, ends; alone, among others, replayed, from a file."""
    world = party_nano.tiny(**kind)
    some = starts(world, 5)
    whole_state, whole = play(world, world.begin(some, range(5)), 7)
    for slots in ([0], [3, 1], [4, 2, 0, 3, 1]):
        slots = np.array(slots)
        state, alone = play(world, world.begin(some.rows(slots), slots), 7, slots=slots)
        for row, slot in enumerate(slots):
            assert column(alone, row) == column(whole, slot)
            assert everything(state, row) == everything(whole_state, slot)
    assert len({step[0][1] for step in whole}) == 7  # players do move


@pytest.mark.parametrize("kind", ["published", "guided, UniPC", "no MCA"])
def test_states_are_values(kind, tmp_path):
    """snapshot, fork, select, replace, save and load: the same future, the parent untouched."""
    world = party_nano.tiny(**KINDS[kind])
    state, _ = play(world, world.begin(starts(world, 4), range(4)), 6)
    before = [everything(state, i) for i in range(4)]
    _, first = play(world, state, 4, 6)
    kept = state.snapshot()
    state.save(tmp_path / "state.safetensors")
    loaded = WorldState.load(tmp_path / "state.safetensors", world)
    assert [everything(loaded, i) for i in range(4)] == before
    for same in (kept, loaded):
        assert play(world, same, 4, 6)[1] == first
    forked = state.fork(2, [2, 0])
    new, results = play(world, forked, 1, 6, slots=np.array([2, 2, 0, 0]))
    assert results[0][0] == results[0][1] == first[0][2] and results[0][3] == first[0][0]
    part, _ = world.step(state, moves(world, 2, 6), [3, 1])
    assert everything(part, 0) == before[0] and everything(part, 3) != before[3]
    again = world.restart(state, [1], starts(world, 1, 9))
    assert everything(again, 0) == before[0] and again.episode_B.tolist() == [0, 1, 0, 0]
    assert [everything(state, i) for i in range(4)] == before


def test_a_file_that_does_not_fit_is_refused(world, tmp_path):
    from worldgym import checkpoint

    path = tmp_path / "state.safetensors"
    world.begin(starts(world, 2), [0, 1]).save(path)
    tensors, header = checkpoint.load_tensors(path)
    for name, value in (("extra.subjects", torch.full_like(tensors["extra.subjects"],
                                                           float("nan"))),
                        ("extra.valid", tensors["extra.valid"][:, :1])):
        checkpoint.save(path, tensors | {name: value}, header, check_finite=False)
        with pytest.raises(CheckpointError, match="subjects|valid"):
            WorldState.load(path, world)
    checkpoint.save(path, {k: v for k, v in tensors.items() if k != "extra.game"}, header)
    with pytest.raises(CheckpointError, match="lacks a tensor"):
        WorldState.load(path, world)


def test_nothing_leaks_and_cost_does_not_grow(world):
    used = pages_used(world)
    state, sizes = world.begin(starts(world, 2), [0, 1]), []
    for i in range(60):
        state, _ = world.step(state, moves(world, 2, i))
        sizes.append((world.pool.stats()["pages_used"], state.tables.pages_BP.shape))
    assert len(set(sizes[10:])) == 1 and torch.isfinite(state.extra["subjects"]).all()
    del state
    assert pages_used(world) == used


@pytest.mark.parametrize("kind", [{}, {"tiles": (12, 20, 5, 4)}], ids=["as drawn", "tiles"])
def test_permuting_players_permutes_the_states_and_leaves_the_video(monkeypatch, kind):
    """The engine's own steps, with the players' noise permuted as they are."""
    # octaves magnify rounding, 2 per octave
    world = party_nano.tiny(subjects=dict(octaves=1), **kind)
    order, n = np.array([2, 0, 3, 1]), 4
    some = starts(world, 3, frames=2)
    size = int(np.prod(world.spec.latent_chw))
    moved = replace(some, actions=some.actions[:, :, order], valid_BN=some.valid_BN[:, order],
                    subjects_BKNS=some.subjects_BKNS[:, :, order])

    def run(some, permute):
        def noise(keys, number, shape, device):
            z = normal(keys, number, shape, device)
            c = z[:, size:].unflatten(1, (n, 2))[:, permute].flatten(1, 2)
            return torch.cat([z[:, :size], c], 1)

        with monkeypatch.context() as patch:
            patch.setattr("worldgym.models.party_world.normal", noise)
            state, out = world.begin(some, range(3)), []
            for i in range(3):
                state, chunk = world.step(state, moves(world, 3, i)[:, permute])
                out.append(chunk)
            return out

    for i, (a, b) in enumerate(zip(run(some, np.arange(n)), run(moved, order), strict=True)):
        atol = 2e-5 * 10**i  # keys are summed in another order; random weights blow that up
        torch.testing.assert_close(b.latents_BFChw, a.latents_BFChw, atol=atol, rtol=0)
        torch.testing.assert_close(b.subjects.states_BFNS, a.subjects.states_BFNS[:, :, order],
                                   atol=atol, rtol=0)
        np.testing.assert_allclose(b.subjects.rewards_BN, a.subjects.rewards_BN[:, order],
                                   atol=atol)


def test_each_action_counts_and_those_of_empty_places_do_not(world):
    some = replace(starts(world, 1, frames=1), valid_BN=np.array([[True, True, False, True]]))
    state = world.begin(some, [0])

    def after(actions):
        return told(world.step(state, [actions])[1], 0)

    base = after([1, 2, 0, 3])
    assert after([1, 2, 4, 3]) == after([1, 2, -1, 3]) == after([1, 2, 99, 3]) == base
    for other in ([0, 2, 0, 3], [1, 0, 0, 3], [1, 2, 0, 0], [1, 2, 0, -1]):
        assert after(other) != base
    _, chunk = world.step(state, [[1, 2, 0, 3]])
    assert (chunk.subjects.states_BFNS[0, 0, 2] == 0).all()
    assert chunk.subjects.valid_BN.tolist() == some.valid_BN.tolist()
    assert chunk.subjects.rewards_BN[0, 2] == 0
    assert chunk.reward_B[0] == pytest.approx(chunk.subjects.rewards_BN.sum(), abs=1e-6)
    assert torch.equal(world.step(state, [[[1, 2, 0, 3]]], per_frame=True)[1].latents_BFChw,
                       chunk.latents_BFChw)


def test_the_game_is_told_to_the_network(world):
    some = starts(world, 1)
    chunks = [world.step(world.begin(replace(some, game_B=np.array([g])), [0]),
                         moves(world, 1, 0))[1] for g in (0, 1)]
    assert (chunks[0].latents_BFChw - chunks[1].latents_BFChw).abs().max() > 1e-4


def test_players_end_one_by_one():
    """An ended player stays ended, gets nothing, and its actions are not read any more."""
    world = party_nano.tiny(end_scale=8.0)
    state = world.begin(starts(world, 6, frames=1), range(6))
    valid, was, chances, ends = state.extra["valid"].numpy(), np.zeros((6, 4), bool), 0.0, 0
    for i in range(40):
        new, chunk = world.step(state, moves(world, 6, i))
        s = chunk.subjects
        assert (s.ended_BN >= was).all() and not s.ended_BN[~valid].any()
        assert (s.rewards_BN[was] == 0).all() and (s.end_probability_BN[was] == 0).all()
        assert chunk.terminated_B.tolist() == (s.ended_BN | ~valid).all(1).tolist()
        other = np.where(was, (moves(world, 6, i) + 2) % 5, moves(world, 6, i))
        assert torch.equal(world.step(state, other)[1].latents_BFChw, chunk.latents_BFChw)
        chances += s.end_probability_BN.sum()
        ends += (s.ended_BN & ~was).sum()
        state, was = new, s.ended_BN
    assert ends >= 5 and abs(ends - chances) < 4 * np.sqrt(chances) + 1
    never = party_nano.tiny(end_scale=0.0)
    _, chunk = never.step(never.begin(starts(never, 6), range(6)), moves(never, 6, 0))
    assert not chunk.subjects.ended_BN.any() and not chunk.terminated_B.any()


def test_a_world_without_heads(world):
    plain = party_nano.tiny()
    plain.outcome = None
    _, chunk = plain.step(plain.begin(starts(plain, 2), [0, 1]), moves(plain, 2, 0))
    assert not chunk.reward_B.any() and not chunk.terminated_B.any()


def test_snapping_keeps_players_on_cells():
    cells = ((0.0, 0.25, 0.5, 0.375),) * 2
    world = party_nano.tiny(snap=True, cells=cells, subjects=dict(facing=True))
    state = world.begin(starts(world, 3), range(3))
    for i in range(3):
        state, chunk = world.step(state, moves(world, 3, i))
        s = chunk.subjects.states_BFNS[:, 0][torch.from_numpy(chunk.subjects.valid_BN)]
        inside = s[:, :2].abs() < 1  # a centre beyond the border is kept at the border
        cell = (s[:, :2] + 1 - torch.tensor([0.0, 0.25])) / torch.tensor([0.5, 0.375]) - 0.5
        assert (cell - cell.round())[inside].abs().max() < 1e-5
        assert (s[:, 2:].abs() == 1).all() and (s[:, 2:6].sum(1) == -2).all()
    near = torch.tensor([[[-0.7, -0.4, .1, .9, .3, 0, -.2]]])
    assert snap(near, torch.tensor([cells[0]])).tolist() == [[[-.75, -.5625, -1, 1, -1, -1, -1]]]


def test_rollout_is_the_teacher_forced_forward(world):
    """Cached steps give what the training forward gives on the whole sequence, past the window."""
    world = party_nano.tiny(steps=(1000.0,))
    for reader in world.outcome.model.ends:  # who ends is told nothing more, whatever is forced
        reader.last.bias.fill_(-30)
    some = replace(starts(world, 1, frames=3), length_B=np.array([3]),
                   null_BK=np.array([[True, False, False]]))
    state, frames = world.begin(some, [3]), 8
    video, places = some.latents_BKChw, torch.where(
        torch.from_numpy(some.valid_BN)[:, None, :, None], some.subjects_BKNS, 0)
    actions = torch.from_numpy(np.where(some.actions < 0, 5, some.actions))
    actions[:, 0] = 5
    noise = torch.zeros(1, frames, world.spec.latent_chw[0] * 16 + 8)
    raw = []
    made = world._made
    world._made = lambda state, action, x0: raw.append(x0) or made(state, action, x0)
    for i in range(3, frames):
        noise[:, i] = normal(state.keys_B4, 0, (noise.shape[2],))
        act = np.abs(moves(world, 1, i))
        state, chunk = world.step(state, act)
        video = torch.cat([video, chunk.latents_BFChw], 1)
        places = torch.cat([places, chunk.subjects.states_BFNS], 1)
        actions = torch.cat([actions, torch.from_numpy(act)[:, None]], 1)
    z, c = world.party.unpack(noise.transpose(1, 2))
    level, valid = torch.ones(1, frames), torch.from_numpy(some.valid_BN)
    with torch.no_grad():
        flow_v, flow_s = world.party(
            video, places, actions, valid, torch.eye(2)[some.game_B][:, None], level, z, c,
            0 * level, 0 * z, places)
    x0 = torch.cat([world.party.unpack(x)[0] for x in raw], 1)
    s0 = torch.cat([world.party.unpack(x)[1] for x in raw], 1)
    torch.testing.assert_close(z[:, 3:] - flow_v[:, 3:], x0, atol=2e-5, rtol=0)
    there = valid[0]
    torch.testing.assert_close((c - flow_s)[:, 3:, there], s0[:, :, there], atol=2e-5, rtol=0)


def test_guidance_of_scale_one_is_no_guidance():
    from worldgym.models.party_world import Guidance, PartyWorld

    plain = party_nano.tiny(subjects=dict(octaves=1))
    guided = PartyWorld(
        plain.spec, plain.codec, plain.dynamics, plain.outcome, plain.stepper.policy,
        plain.schedule, texts_GLD=torch.eye(2)[:, None], guidance=Guidance(scale=1.0),
        fingerprint=plain.fingerprint)
    some = starts(plain, 2)
    states = [w.begin(some, [0, 1]) for w in (plain, guided)]
    for i in range(4):
        pairs = [w.step(s, moves(w, 2, i)) for w, s in zip((plain, guided), states, strict=True)]
        states = [s for s, _ in pairs]
        torch.testing.assert_close(pairs[0][1].latents_BFChw, pairs[1][1].latents_BFChw,
                                   atol=1e-4, rtol=0)
    assert len(states[1].tables.pages_BP) == 4


def test_frames_and_spread(world):
    state = world.begin(starts(world, 2), [0, 1])
    _, chunk = world.step(state, moves(world, 2, 0))
    assert chunk.frames().shape == (2, 1, 32, 32, 3)
    assert (fork_spread(world, state, moves(world, 2, 0)) > 0).all()


NAN = float("nan")
BAD_ACTIONS = {
    "one action per slot": ([1, 2], ShapeError),
    "five players": (np.zeros((2, 5), int), ShapeError),
    "action 5 of 5": (np.full((2, 4), 5), ActionError),
    "-2": (np.full((2, 4), -2), ActionError),
    "a fraction": (np.full((2, 4), 0.5), ActionError),
    "NaN": (np.full((2, 4), NAN), NotFiniteError),
    "text": (np.full((2, 4), "a"), ActionError), "None": (np.full((2, 4), None), ActionError)}


@pytest.mark.parametrize("name", BAD_ACTIONS)
def test_bad_actions_are_refused(world, name):
    some = replace(starts(world, 2), valid_BN=np.ones((2, 4), bool))
    state = world.begin(some, [0, 1])
    before = [everything(state, i) for i in range(2)]
    actions, error = BAD_ACTIONS[name]
    with pytest.raises(error, match="Fix:"):
        world.step(state, actions)
    assert [everything(state, i) for i in range(2)] == before


BAD_STARTS = {
    "no states": (dict(subjects_BKNS=None), ShapeError),
    "no players": (dict(valid_BN=None), ShapeError), "no game": (dict(game_B=None), ShapeError),
    "states of three": (dict(subjects_BKNS=torch.zeros(1, 4, 3, 2)), ShapeError),
    "game 2 of 2": (dict(game_B=np.array([2])), ConfigError),
    "half a game": (dict(game_B=np.array([0.5])), ConfigError),
    "NaN": (dict(subjects_BKNS=torch.full((1, 4, 4, 2), NAN)), NotFiniteError),
    "no slots": (dict(latents_BKChw=torch.zeros(0, 4, 4, 4, 4)), ShapeError),
    "no frames": (dict(latents_BKChw=torch.zeros(1, 4, 4)), ShapeError),
    "bad length": (dict(length_B=np.array([5])), ShapeError)}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_bad_starts_are_refused(world, name):
    change, error = BAD_STARTS[name]
    with pytest.raises(error, match="Fix:"):
        world.begin(replace(starts(world, 1), **change), [0])


def test_places_without_a_player_may_hold_anything(world):
    some = replace(starts(world, 2), valid_BN=np.array([[True, False, True, True]] * 2))
    other = replace(some, subjects_BKNS=some.subjects_BKNS.clone(), actions=some.actions.copy())
    other.subjects_BKNS[:, :, 1], other.actions[:, :, 1] = NAN, 77
    results = [play(world, world.begin(s, [0, 1]), 3)[1] for s in (some, other)]
    assert results[0] == results[1]


def test_an_interrupted_step_leaks_nothing(world, monkeypatch):
    state, _ = play(world, world.begin(starts(world, 2), [0, 1]), 2)
    used = pages_used(world)

    def fail(*args, **options):
        raise KeyboardInterrupt

    for thing, name in ((world.outcome.model, "predict"), (engine, "WorldState"),
                        (world.dynamics.dit.blocks[1], "forward"), (world, "_made")):
        with monkeypatch.context() as patch:
            patch.setattr(thing, name, fail)
            with pytest.raises(KeyboardInterrupt):
                world.step(state, moves(world, 2, 0))
        assert pages_used(world) == used


def test_a_world_folder_reads_back(tmp_path):
    cfg = replace(_config(party_nano.tiny()), outcome_amounts=3, games=("coins", "tag"))
    made = party_nano.fresh(cfg, 5)
    party_nano.save(made, tmp_path, {"about": "a test"})
    assert json.loads((tmp_path / "world.json").read_text())["kind"] == "worldgym.party"
    again = party_nano.load_party(tmp_path)
    assert again.cfg == cfg
    assert nano.value_fingerprint(again) == nano.value_fingerprint(made)
    assert party_nano.load(tmp_path, guidance=2.0).table_rows == 2
    with pytest.raises(CheckpointError, match="no world"):
        party_nano.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="games"):
        replace(cfg, games=("coins",))
    with pytest.raises(ConfigError, match="snap"):
        replace(cfg, snap=True)


def _config(world):
    return party_nano.PartyNanoConfig(
        name="tiny", dynamics=world.party.cfg, codec=world.codec.cfg, games=("a", "b"),
        outcome_width=8)
