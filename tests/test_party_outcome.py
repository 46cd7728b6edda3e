"""The heads of a party: what is learned of rewards and ends, and what is paid."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import party_toy as toy  # noqa: E402
from party_tools import close  # noqa: E402

from worldgym.errors import ConfigError  # noqa: E402
from worldgym.models.party_outcome import (  # noqa: E402
    LearnedPartyOutcome,
    PartyOutcome,
    PartyOutcomeConfig,
    amounts_of,
    party_outcome_loss,
    places,
    shares,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outcome_batch(rows, seed, cfg):
    """Toy play; who stands on the coin's cell ends with the chance of a coin (by parity)."""
    rules = toy.Rules(side=4, players=2, walls=0)
    data = toy.clips(rows, 4, seed, rules)
    taken = data["rewards_BFN"].cumsum(1) > 0
    data["ended_BFN"] = taken
    return data


def learned(cfg, data, iterations=300, lr=8e-3, amounts=None):
    """Heads that learned from ``data(iteration)``; ``amounts``: what the games pay."""
    model = PartyOutcome(cfg)
    if amounts is not None:
        model.amounts_GV.copy_(torch.tensor(amounts))
    for i, p in enumerate(model.parameters()):
        if p.ndim > 1:
            torch.nn.init.xavier_uniform_(p, generator=generator(i))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for i in range(iterations):
        optimizer.zero_grad()
        party_outcome_loss(model, cfg, data(i), model.amounts_GV)[0].backward()
        optimizer.step()
    return model


def test_rewards_and_ends_are_learned_per_player():
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 4), channels=2, actions=5, width=24, hidden=32,
                             members=2, amounts=2)
    model = learned(cfg, lambda i: outcome_batch(48, i, cfg))
    data = outcome_batch(400, 10_000, cfg)
    states, latents, valid = data["states_BFNS"], data["latents_BFChw"], data["valid_BN"].clone()
    given = (latents[:, :1], states[:, 0], latents[:, 1], states[:, 1])
    actions = data["actions_BFN"][:, 1]
    heads = LearnedPartyOutcome(model)
    chance, reward = heads(*given, actions, valid)
    truth = data["rewards_BFN"][:, 1]
    assert 20 < truth.sum() < 200
    assert reward[truth == 1].mean() > 0.8 and reward[truth == 0].mean() < 0.05
    assert chance[truth == 1].mean() > 0.6 and chance[truth == 0].mean() < 0.05
    order = torch.tensor([1, 0])  # players are a set here, too
    swapped = heads(given[0], given[1][:, order], given[2], given[3][:, order], actions[:, order],
                    valid)
    close(swapped[0], chance[:, order])
    close(swapped[1], reward[:, order])
    valid[:, 1] = False
    alone = heads(*given, actions, valid)
    assert not alone[0][:, 1].any() and not alone[1][:, 1].any()
    for rows in (slice(0, 1), slice(5, 8)):  # and no row knows its batch
        part = heads(*(x[rows] for x in (*given, actions, valid)))
        assert torch.equal(part[0], alone[0][rows]) and torch.equal(part[1], alone[1][rows])
    with pytest.raises(ConfigError):
        LearnedPartyOutcome(model, float("nan"))


def test_players_that_ended_count_no_more():
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 4), channels=2, actions=5, width=8, hidden=8)
    model, data = PartyOutcome(cfg), outcome_batch(32, 0, None)
    loss = party_outcome_loss(model, cfg, data, model.amounts_GV)[0]
    gone = data["ended_BFN"][:, :-1]
    other = data | {"rewards_BFN": data["rewards_BFN"].clone()}
    other["rewards_BFN"][:, 1:][gone] = 50
    assert torch.equal(party_outcome_loss(model, cfg, other, model.amounts_GV)[0], loss)
    data["valid_BN"][:, 1] = False
    assert party_outcome_loss(model, cfg, data, model.amounts_GV)[0] != loss


def test_rewards_count_as_often_as_they_are():
    """Clips drawn four times too often count a quarter: the loss is that of an even draw."""
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 4), channels=2, actions=5, width=8, hidden=8)
    model, even = PartyOutcome(cfg), outcome_batch(8, 0, None)
    order = torch.tensor([0, 0, 0, 0, *range(1, 8)])
    drawn = {k: v[order] for k, v in even.items() if torch.is_tensor(v)}
    drawn["likely_B"] = torch.tensor([0.25] * 4 + [1.0] * 7)
    of_even, told_even = party_outcome_loss(model, cfg, even, model.amounts_GV)
    of_drawn, told_drawn = party_outcome_loss(model, cfg, drawn, model.amounts_GV)
    assert torch.allclose(of_even, of_drawn, rtol=1e-5)
    assert told_drawn["reward_ce"] == pytest.approx(told_even["reward_ce"], rel=1e-5)
    drawn.pop("likely_B")
    assert not torch.allclose(party_outcome_loss(model, cfg, drawn, model.amounts_GV)[0], of_even,
                              rtol=1e-4)


def test_trained_as_it_is_played():
    """Convolutions while gradients are kept, products of rows without: the same numbers."""
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 6), channels=2, actions=5, width=8, hidden=8)
    model, g = PartyOutcome(cfg), generator(3)
    given = (torch.randn(5, 1, 3, 4, 6, generator=g), torch.rand(5, 2, 2, generator=g),
             torch.randn(5, 3, 4, 6, generator=g), torch.rand(5, 2, 2, generator=g),
             torch.tensor([[0, 4]] * 5), torch.ones(5, 2, dtype=torch.bool))
    trained = model(*given)
    with torch.no_grad():
        played = model(*given)
    for mine, other in zip(trained, played, strict=True):
        assert mine.requires_grad and torch.allclose(other, mine, atol=1e-5)


def test_heads_tell_games_apart_by_their_number():
    """The same pictures pay in one game and cost in the other."""
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 4), channels=2, actions=5, width=24, hidden=32,
                             members=1, amounts=2, games=2)

    def data(rows, seed):
        made = outcome_batch(rows, seed, cfg)
        made["game_B"] = torch.arange(rows) % 2
        made["rewards_BFN"] = made["rewards_BFN"] * (1 - 2 * made["game_B"])[:, None, None]
        return made

    model = learned(cfg, lambda i: data(48, i), amounts=[[0.0, 1.0], [-1.0, 0.0]])
    new = data(400, 10_000)
    given = [new["latents_BFChw"][:, :1], new["states_BFNS"][:, 0], new["latents_BFChw"][:, 1],
             new["states_BFNS"][:, 1], new["actions_BFN"][:, 1], new["valid_BN"]]
    heads, truth = LearnedPartyOutcome(model), new["rewards_BFN"][:, 1]
    _, reward = heads(*given, new["game_B"])
    assert reward[truth == 1].mean() > 0.7 and reward[truth == -1].mean() < -0.7
    _, other = heads(*given, 1 - new["game_B"])
    assert other[truth == 1].mean() < -0.5
    _, part = heads(*(x[5:7] for x in given), new["game_B"][5:7])
    assert torch.equal(part, reward[5:7])
    with pytest.raises(ConfigError, match="numbers of the games"):
        heads(*given)


def test_heads_that_knew_no_games_go_on():
    """What is added for a game begins at nothing: the same numbers as before."""
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 6), channels=2, actions=5, width=8, hidden=8)
    old, new = PartyOutcome(cfg), PartyOutcome(replace(cfg, games=3))
    weights = old.state_dict()
    weights["amounts_GV"] = weights["amounts_GV"].expand(3, -1)
    missing, unknown = new.load_state_dict(weights, strict=False)
    assert not unknown and missing and all(k.endswith(".games.weight") for k in missing)
    g = generator(3)
    given = (torch.randn(5, 1, 3, 4, 6, generator=g), torch.rand(5, 2, 2, generator=g),
             torch.randn(5, 3, 4, 6, generator=g), torch.rand(5, 2, 2, generator=g),
             torch.tensor([[0, 4]] * 5), torch.ones(5, 2, dtype=torch.bool))
    with torch.no_grad():
        for mine, other in zip(new(*given, torch.tensor([0, 1, 2, 0, 1])), old(*given),
                               strict=True):
            assert torch.equal(mine, other)


def test_heads_pay_amounts_of_their_game():
    """The chances of a game's amounts, and the mean of them."""
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 4), channels=2, actions=5, width=8, hidden=8,
                             amounts=3, games=2)
    model, data = PartyOutcome(cfg), outcome_batch(32, 0, cfg)
    amounts = torch.tensor([[0.0, 1.0, 8.0], [-2.0, 0.0, 0.5]])
    model.amounts_GV.copy_(amounts)
    for reader in model.rewards:
        torch.nn.init.zeros_(reader.last.weight)
        reader.last.bias.data.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    data["game_B"] = torch.arange(32) % 2
    given = [data["latents_BFChw"][:, :1], data["states_BFNS"][:, 0], data["latents_BFChw"][:, 1],
             data["states_BFNS"][:, 1], data["actions_BFN"][:, 1], data["valid_BN"]]
    _, reward = model.predict(*given, data["game_B"])
    means = torch.tensor([2.25, -0.875])[data["game_B"]][:, None]
    close(reward, torch.where(data["valid_BN"], means, 0))
    for reader in model.rewards:  # sure of the middle amount
        reader.last.bias.data.copy_(torch.tensor([-40.0, 0.0, -40.0]))
    paid = amounts[data["game_B"], 1][:, None, None].expand_as(data["rewards_BFN"])
    _, told = party_outcome_loss(model, cfg, data | {"rewards_BFN": paid}, model.amounts_GV)
    assert told["reward_ce"] < 1e-10
    _, told = party_outcome_loss(model, cfg, data | {"rewards_BFN": 0 * paid - 2}, amounts)
    assert told["reward_ce"] == pytest.approx(40, rel=0.01)


def test_rewards_are_shares_of_the_amounts_around_them():
    amounts = torch.tensor([[-2.0, 0.0, 1.0, 8.0], [0.0, 1.0, 1.0, 1.0]])
    reward = torch.tensor([[0.0, -0.5, 1.0, 4.5, 9.0, -3.0], [0.0, 0.25, 1.0, 2.0, -1.0, 0.5]])
    got = shares(reward, amounts)
    close(got.sum(-1), torch.ones_like(reward))
    close((got * amounts[:, None]).sum(-1), torch.stack([
        reward[0].clamp(-2, 8), reward[1].clamp(0, 1)]))
    assert got[0, 0].tolist() == [0, 1, 0, 0] and got[0, 3].tolist() == [0, 0, 0.5, 0.5]
    assert got[1, 2].tolist() == [0, 1, 0, 0]  # the first of those that are there again


def test_amounts_are_what_was_recorded():
    few = np.array([[0, 8, np.nan], [1, 0, 1]], np.float32)
    assert amounts_of(few, 5).tolist() == [0, 1, 8, 8, 8]
    many = np.random.default_rng(0).normal(0, 1, 5000)
    found = amounts_of(many, 8)
    assert found[[0, -1]] == pytest.approx([many.min(), many.max()], abs=1e-6)
    assert (np.diff(found) > 0).all() and 0 in found
    assert amounts_of(np.zeros(4), 3).tolist() == [0, 0, 0]
    assert amounts_of(np.array([0, 1e-16, 2]), 3).tolist() == [0, 2, 2]  # sums of what cancels


def test_what_seldom_pays_does_not_pay_a_little_everywhere():
    """One step in sixteen pays 8, and the picture shows which: the others pay nothing, where
    means learned by squared errors pay some hundredths in each."""
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 4), channels=2, actions=5, width=24, hidden=32,
                             members=1, amounts=2)

    def paying(i):
        data = outcome_batch(48, i, cfg)
        return data | {"rewards_BFN": 8 * data["rewards_BFN"]}

    model = learned(cfg, paying, amounts=[[0.0, 8.0]])
    new = outcome_batch(400, 10_000, cfg)
    _, reward = LearnedPartyOutcome(model)(
        new["latents_BFChw"][:, :1], new["states_BFNS"][:, 0], new["latents_BFChw"][:, 1],
        new["states_BFNS"][:, 1], new["actions_BFN"][:, 1], new["valid_BN"])
    pays = new["rewards_BFN"][:, 1] == 1
    assert reward[pays].mean() > 6.5
    assert reward[~pays & new["valid_BN"]].median() < 0.01


def test_beams_of_three_cells_pay_who_sent_them():
    """Paid is who stands three cells to the left of one of many marks: the longest beam's reach."""
    cfg = PartyOutcomeConfig(latent_chw=(3, 4, 8), channels=2, actions=5, width=24, hidden=32,
                             members=1, amounts=2)

    def data(rows, seed):
        g = generator(seed)
        x, y = (torch.randint(0, side, (rows, 7), generator=g) for side in (5, 4))
        latents = torch.zeros(rows, 2, 3, 4, 8)
        latents[:, 1, 0] = (torch.rand(rows, 4, 8, generator=g) < 0.3).float()
        states = torch.stack([(2 * x + 1) / 8 - 1, (2 * y + 1) / 4 - 1], -1)[:, None]
        pays = latents[torch.arange(rows)[:, None], 1, 0, y, x + 3]
        return {"latents_BFChw": latents, "states_BFNS": states.expand(-1, 2, -1, -1),
                "valid_BN": torch.ones(rows, 7, dtype=torch.bool),
                "actions_BFN": torch.zeros(rows, 2, 7, dtype=torch.long),
                "rewards_BFN": torch.stack([0 * pays, pays], 1),
                "ended_BFN": torch.zeros(rows, 2, 7, dtype=torch.bool)}

    model = learned(cfg, lambda i: data(64, i), iterations=400, lr=5e-3)
    new = data(600, 10_000)
    _, reward = LearnedPartyOutcome(model)(
        new["latents_BFChw"][:, :1], new["states_BFNS"][:, 0], new["latents_BFChw"][:, 1],
        new["states_BFNS"][:, 1], new["actions_BFN"][:, 1], new["valid_BN"])
    pays = new["rewards_BFN"][:, 1] == 1
    assert pays.sum() > 50
    assert reward[pays].mean() > 0.9 and reward[~pays].mean() < 0.1


def test_places_are_bilinear():
    at = places(torch.tensor([[[[-0.75, -0.75], [0.5, 0.0], [1.0, 1.0]]]]), (2, 4))[0, 0]
    assert at.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert at[0, 0] == 1 and at[2, 7] == 1
    assert at[1].tolist() == pytest.approx([0, 0, .25, .25, 0, 0, .25, .25])
