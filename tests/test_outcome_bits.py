"""Reward and end heads: bits that do not depend on the batch, for every number of actions."""

import pytest
import torch

from worldgym.models.outcome import Outcome, OutcomeConfig, outcome_loss


@pytest.mark.parametrize("features", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_a_slot_does_not_know_its_place(features, grid):
    generator = torch.Generator().manual_seed(0)
    heads = Outcome(OutcomeConfig(latent_chw=(4, *grid), action_features=features, frames=2,
                                  width=24)).eval().requires_grad_(False)
    for p in heads.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    past = torch.randn(9, 2, 4, *grid, generator=generator)
    action = torch.randn(9, features, generator=generator)
    whole = heads.predict(past, action)
    for rows in ([0], [1], [8], [7, 2], [3, 4, 5], [5, 0, 8, 1], [1, 2, 3, 4, 5, 6, 7, 8]):
        for got, want in zip(heads.predict(past[rows], action[rows]), whole, strict=True):
            assert torch.equal(got, want[rows])


def test_danger_is_an_end_within_the_steps_ahead():
    """Ends come exactly 3 steps after a bright frame; only a head that looks ahead can say so."""
    cfg = OutcomeConfig(latent_chw=(1, 2, 2), action_features=1, frames=1, width=8, hidden=8,
                        members=1, ahead=3)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Outcome(cfg)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        bright = torch.rand(64, generator=generator) < 0.5
        past = bright.float()[:, None, None, None, None].expand(-1, 1, 1, 2, 2).contiguous()
        soon = torch.where(torch.rand(64, generator=generator) < 0.2, -1, bright.long())
        loss, told = outcome_loss(model, past, torch.zeros(64, 1), torch.ones(64),
                                  torch.zeros(64, dtype=torch.bool), torch.ones(()), soon)
        adam.zero_grad()
        loss.backward()
        adam.step()
    end, _, danger = model.predict(torch.tensor([0.0, 1.0])[:, None, None, None, None].expand(
        -1, 1, 1, 2, 2), torch.zeros(2, 1))
    assert danger[0] < 0.1 and danger[1] > 0.9 and end.max() < 0.1 and told["danger_bce"] < 0.2
    plain = Outcome(OutcomeConfig(latent_chw=(1, 2, 2), action_features=1, frames=1))
    end, _, danger = plain.predict(torch.zeros(2, 1, 1, 2, 2), torch.zeros(2, 1))
    assert torch.equal(end, danger)
