"""Training a party: what is learned, the two stages in the training loop."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import party_toy as toy  # noqa: E402
from party_tools import ACTIONS, CHW, SLOTS, close, tiny_party  # noqa: E402

from worldgym.errors import ConfigError, ShapeError  # noqa: E402
from worldgym.models.party import PartyDynamics, nano_config  # noqa: E402
from worldgym.models.party_loss import PartyLossConfig, batch_of, clip, party_loss  # noqa: E402
from worldgym.train.loop import Loop, LoopConfig  # noqa: E402


def batch(rows=3, frames=4, seed=0, channels=2):
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(rows, SLOTS, dtype=torch.bool)
    valid[:, -1] = False
    return {"latents_BFChw": torch.randn(rows, frames, *CHW, generator=g), "valid_BN": valid,
            "states_BFNS": 2 * torch.rand(rows, frames, SLOTS, channels, generator=g) - 1,
            "actions_BFN": torch.randint(-1, ACTIONS, (rows, frames, SLOTS), generator=g),
            "text_BLD": torch.randn(rows, 3, 16, generator=g)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_learning_smoke():
    """Spec 4.9, 4.10: a few seconds of training bind actions: one-step accuracy >= 0.85."""
    rules = toy.Rules(side=4, players=2, walls=0, coins=0)
    how = PartyLossConfig(shift=3.0, jitter=0, drop_text=0, drop_actions=0, context_noise=0,
                          full_noise=0.5, state_weight=3.0)
    model = toy.train(rules, 1e9, layers=2, frames=3, lr=6e-3, iterations=170, alone=1.0, how=how)
    found = toy.binding(model, rules, length=1)
    assert found["told"][0] >= 0.85 and found["told_moves"][0] >= 0.85, found
    assert found["others_stay"] > 0.9 and found["own_follows"] > 0.8, found


# ------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_spec_4_6():
    """Against sums written out, with one sigma per frame and the published weight."""
    model, data = tiny_party(), batch()
    how = PartyLossConfig(bell=True, full_noise=0.0, context_noise=0.0, jitter=0.0, drop_text=0.0,
                          drop_actions=0.0, state_weight=2.0)
    seen = {}
    model.register_forward_hook(lambda m, a, y: seen.update(given=a, flow=y))
    loss, logs = party_loss(model, model.cfg, data, generator(), how)
    latents, states, actions, valid, _, sigma, noise, state_noise, level, _, context, *_ = seen[
        "given"]
    assert torch.equal(context, states) and not level.any()
    u = np.linspace(1, 0, 1001)[:-1]
    t = 1000 * 5 * u / (1 + 4 * u)
    bell = np.exp(-2 * ((t - 500) / 1000) ** 2)
    bell = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    top = [0.0, 0.0]
    low = [0.0, 0.0]
    for b in range(3):
        for f in range(1, 4):
            w = bell[np.abs(t - 1000 * float(sigma[b, f])).argmin()]
            v = seen["flow"][0][b, f] - (noise[b, f] - latents[b, f])
            top[0], low[0] = top[0] + w * float((v**2).mean()), low[0] + w
            for i in range(SLOTS):
                if valid[b, i]:
                    v = seen["flow"][1][b, f, i] - (state_noise[b, f, i] - states[b, f, i])
                    top[1], low[1] = top[1] + w * float((v**2).mean()), low[1] + w
    assert logs["video"] == pytest.approx(top[0] / low[0], rel=1e-4)
    assert logs["states"] == pytest.approx(top[1] / low[1], rel=1e-4)
    assert float(loss) == pytest.approx(logs["video"] + 2 * logs["states"], rel=1e-5)
    assert actions.min() >= 0 and actions.max() == ACTIONS  # -1 is the null action


def test_what_does_not_count():
    """Empty slots (NaN there), filling frames and the first frame change nothing."""
    model, data = tiny_party(), batch()
    data["exists_BF"] = torch.ones(3, 4, dtype=torch.bool)
    data["exists_BF"][0, 3] = False
    loss, _ = party_loss(model, model.cfg, data, generator())
    other = {k: v.clone() for k, v in data.items()}
    other["states_BFNS"][:, :, -1] = float("nan")
    other["actions_BFN"][:, :, -1] = 3
    other["latents_BFChw"][0, 3] += 1  # nothing after it looks back at it
    again, _ = party_loss(model, model.cfg, other, generator())
    close(again, loss, 1e-6)
    other["latents_BFChw"][0, 2] += 1
    assert abs(float(party_loss(model, model.cfg, other, generator())[0] - loss)) > 1e-3


def test_frames_that_are_only_looked_back_at():
    """With a lead the loss is that of the frames after it; those before are seen all the same."""
    model = PartyDynamics(nano_config(CHW, 1, 32, 1, recent=2, slots=SLOTS, actions=ACTIONS))
    model.initialize(generator(3))
    for head in (model.dit.head.head, model.subjects.head):
        torch.nn.init.normal_(head.weight, std=0.2, generator=generator(4))
    data = batch(frames=5) | {"game_B": torch.zeros(3)}
    data.pop("text_BLD")
    how = PartyLossConfig(forcing="alone", lead=2)
    exists = torch.ones(3, 5)
    exists[:, 1:3] = 0
    of_lead = party_loss(model, model.cfg, data, generator(), how)[0]
    of_all = party_loss(model, model.cfg, data | {"exists_BF": exists}, generator(),
                        PartyLossConfig(forcing="alone"))[0]
    assert torch.allclose(of_lead, of_all, rtol=1e-5)
    other = data | {"latents_BFChw": data["latents_BFChw"].clone()}
    other["latents_BFChw"][:, 2] += 1
    assert not torch.allclose(party_loss(model, model.cfg, other, generator(), how)[0], of_lead)
    with pytest.raises(ConfigError, match="look back"):
        PartyLossConfig(lead=1)


def test_the_video_stage_has_no_subjects():
    model, data = tiny_party(), batch()
    how = PartyLossConfig(stage="video")
    loss, logs = party_loss(model, model.cfg, data, generator(), how)
    other = data | {"states_BFNS": -data["states_BFNS"], "actions_BFN": 0 * data["actions_BFN"]}
    assert torch.equal(party_loss(model, model.cfg, other, generator(), how)[0], loss)
    assert logs["states"] == 0


def test_jitter_moves_the_context_only():
    model, data, seen = tiny_party(facing=True), batch(channels=7), {}
    model.register_forward_hook(lambda m, a, y: seen.update(given=a))
    data["cell_B2"] = torch.tensor([[0.5, 0.1]] * 3)
    off = []
    for seed in range(60):
        party_loss(model, model.cfg, data, generator(seed), PartyLossConfig(jitter=0.25))
        states, context = seen["given"][1], seen["given"][10]
        off.append((context - states)[:, :, :3])
        assert torch.equal(context[..., 2:], states[..., 2:])
    off = torch.stack(off).flatten(0, 1)
    some = off.abs().amax((1, 2, 3)) > 0
    assert 0.35 < some.float().mean() < 0.65
    spread = off[some][:, :, :, :2].flatten(0, 2)
    spread = spread[spread.abs().sum(1) > 0].std(0)
    assert spread[0] == pytest.approx(0.125, rel=0.15) and spread[1] == pytest.approx(0.025,
                                                                                     rel=0.15)


def test_shares_of_two_processes_are_the_batch():
    model, data = tiny_party(), batch(4)
    whole, _ = party_loss(model, model.cfg, data, generator())
    halves = [party_loss(model, model.cfg, {k: v[i:i + 2] for k, v in data.items()}, generator(),
                         share=(i // 2, 2))[0] for i in (0, 2)]
    close(sum(halves) / 2, whole, 1e-5)


@pytest.mark.parametrize("name,value", [
    ("states_BFNS", torch.zeros(3, 4, SLOTS, 3)), ("valid_BN", torch.ones(3, 2)),
    ("actions_BFN", torch.zeros(3, 4)), ("latents_BFChw", torch.zeros(3, 4, 4, 4, 4))])
def test_batches_that_do_not_fit_are_refused(name, value):
    with pytest.raises(ShapeError, match=name):
        clip(tiny_party().cfg, batch() | {name: value})
    data = batch()
    del data["valid_BN"]
    with pytest.raises(ShapeError, match="nothing"):
        clip(tiny_party().cfg, data)
    for wrong in (dict(stage="both"), dict(forcing="none")):
        with pytest.raises(ConfigError):
            PartyLossConfig(**wrong)


def test_batches_of_recorded_clips():
    """What the sampler of multi-player recordings gives, as the losses want it."""
    b, f, n = 2, 3, SLOTS
    rng = np.random.default_rng(0)
    sample = {"positions": rng.uniform(-1, 1, (b, f, n, 2)).astype("f"),
              "orientation": np.tile(np.array([0, 1, 3, -1], np.int8), (b, f, 1)),
              "alive": np.array([True, False, True, False])[None, None].repeat(b, 0).repeat(f, 1),
              "ended": np.zeros((b, f, n), bool), "rewards": np.ones((b, f, n), "f"),
              "actions": np.full((b, f, n), -1), "valid": np.array([[1, 1, 1, 0]] * b, bool),
              "game": np.array([1, 0]), "latents": np.zeros((b, f, *CHW), np.float16)}
    made = batch_of(sample, facing=True)
    assert made["states_BFNS"][0, 0, :3, 2:].tolist() == [
        [1, -1, -1, -1, 1], [-1, 1, -1, -1, -1], [-1, -1, -1, 1, 1]]
    cfg = nano_config(CHW, games=2, width=32, layers=1, head=16, slots=n, actions=8, facing=True)
    latents, states, actions, valid, text = clip(cfg, made)
    assert latents.dtype == torch.float32 and text[:, 0].tolist() == [[0, 1], [1, 0]]
    assert (states[:, :, 3] == 0).all() and (actions == 8).all() and valid.sum() == 6
    assert batch_of(sample, facing=False)["states_BFNS"].shape == (b, f, n, 2)


# ------------------------------------------------------------------------- the two stages


def test_two_stages_in_the_training_loop_resume_bit_for_bit(tmp_path):
    rules = toy.Rules(side=4, players=2)
    cfg = nano_config((3, 4, 4), width=32, layers=2, head=16, slots=2, actions=5)

    def run(folder, stops):
        model = PartyDynamics(cfg)
        model.initialize(generator())
        losses = []
        for stage, forcing in (("video", "alone"), ("joint", "teacher")):
            how = PartyLossConfig(stage=stage, forcing=forcing)

            def loss(module, data, g, how=how):
                value, logs = party_loss(module, cfg, data, g, how)
                losses.append(logs["video"])
                return value, logs

            for stop in (*stops, None):
                loop = Loop(stage, model, LoopConfig(iterations=12, lr=3e-3, muon=True,
                                                     save_every=3), folder,
                            about={"stage": stage})

                def sample(i, stop=stop):
                    if i == stop:
                        raise InterruptedError
                    return toy.clips(8, 3, i, rules)

                try:
                    loop.run(sample, loss, tensorboard=False)
                except InterruptedError:
                    continue
            loop.load_ema()
        return model.state_dict(), losses

    whole, losses = run(tmp_path / "a", ())
    again, _ = run(tmp_path / "b", (7,))
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    assert np.mean(losses[9:12]) < 0.8 * np.mean(losses[:3])


# ------------------------------------------------------------------------- the toy itself


def test_the_toy_moves_as_it_says():
    rules = toy.Rules(side=3, players=2, walls=1, coins=1)
    game = toy.Toy(1, np.random.default_rng(0), rules)
    game.at_BN2, game.walls = np.array([[[0, 0], [2, 0]]]), np.array([[[0, 1]]])
    game.coin = np.array([[2, 1]])
    assert game.step(np.array([[4, 3]])).tolist() == [[0, 0]]  # both want the cell between them
    assert game.at_BN2.tolist() == [[[0, 0], [2, 0]]]
    assert game.step(np.array([[2, 2]])).tolist() == [[0, 1]]  # a wall; a coin
    assert game.at_BN2.tolist() == [[[0, 0], [2, 1]]] and not game.left[0]
    game.step(np.array([[1, 0]]))
    assert game.at_BN2.tolist() == [[[0, 0], [2, 1]]]  # the border
    assert (toy.cell_of(game.states(), 3) == game.at_BN2).all()
    made = toy.clips(2, 3, 0, replace(rules, side=5))
    assert made["latents_BFChw"].shape == (2, 3, 3, 5, 5)
