"""Reward and end heads: bits that do not depend on the batch, for every number of actions."""

import pytest
import torch

from worldgym.models.outcome import Outcome, OutcomeConfig


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
