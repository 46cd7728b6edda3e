"""Rewards and ends of every player of a party, learned from recordings.

Shapes: B slot, K past frame, C channel, h w latent grid, P = h * w cells, N subject, S state
channel, A action, M head member, G game, V amount.
A reward is read from what happened: the frames before, the action, and the frame after, at the
places where the player was and is: who of two players got the coin is in the picture. An end is
read from the frames before and the action only, never from a drawn ending: see outcome.py.
Rewards are learned as chances of the amounts that were recorded. A head that learns the mean by
squared errors pays a little wherever a payment is not far, and agents learn to stay there: a team
that kept gold half mined earned more from tenths than the game pays for mining it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.errors import ConfigError
from worldgym.heads import Learned
from worldgym.models.outcome import around, linear


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyOutcomeConfig:
    """``frames``: K past frames read; ``members``: independent heads that are averaged;
    ``amounts``: V of every game, that a player may be paid in one step; ``games``: how many are
    told apart by their number (1: by what they look like only)."""

    latent_chw: tuple[int, int, int]
    channels: int
    actions: int
    frames: int = 1
    width: int = 48
    hidden: int = 64
    members: int = 2
    amounts: int = 8
    games: int = 1


class _Reader(nn.Module):
    """Some numbers per player from frames, looked at where the player is."""

    def __init__(self, cfg: PartyOutcomeConfig, frames: int, places: int, out: int) -> None:
        super().__init__()
        c = cfg.latent_chw[0]
        self.inputs = nn.Linear(9 * (frames * c + places + 1), cfg.width)
        self.middle = nn.Linear(9 * cfg.width, cfg.width)
        self.deep = nn.Linear(9 * cfg.width, cfg.width)  # three cells: as far as beams reach
        own = places * (cfg.width + cfg.channels) + 2 * cfg.width + cfg.actions + 1
        self.hidden = nn.Linear(own, cfg.hidden)
        self.last = nn.Linear(cfg.hidden, out)
        # of every game, what is added in each layer; zeros: heads that knew no games go on
        self.games = None if cfg.games == 1 else nn.Embedding(
            cfg.games, 2 * cfg.width + cfg.hidden, _weight=torch.zeros(
                cfg.games, 2 * cfg.width + cfg.hidden))
        self.sizes = cfg.width, cfg.width, cfg.hidden

    def forward(self, frames_BKChw: Tensor, states_BKNS: Tensor, action_BNA: Tensor,
                valid_BN: Tensor, game_B: Tensor | None = None) -> Tensor:
        """(B, N, out); ``states_BKNS``: where the players are in the frames that ask for it."""
        added = (0.0, 0.0, 0.0) if self.games is None else self.games(game_B)[:, None].split(
            self.sizes, -1)
        grid = frames_BKChw.shape[-2:]
        at_BKNP = places(states_BKNS[..., :2], grid)
        crowd = (at_BKNP * valid_BN[:, None, :, None]).sum(2).unflatten(-1, grid)
        x = torch.cat([frames_BKChw.flatten(1, 2), crowd], 1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # marks the border against zero padding
        x = F.silu(around(self.inputs, x) + added[0])
        x = F.silu(around(self.middle, x.transpose(1, 2).unflatten(2, grid)) + added[1])
        x = x + F.silu(around(self.deep, x.transpose(1, 2).unflatten(2, grid)))
        here = [(at_BKNP[:, k, :, :, None] * x[:, None]).sum(2) for k in range(at_BKNP.shape[1])]
        # what pays everybody may be in one cell, anywhere
        every = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 2)
        every = every.expand(-1, valid_BN.shape[1], -1)
        own = torch.cat([*here, every, states_BKNS.transpose(1, 2).flatten(2), action_BNA], 2)
        y = linear(self.hidden, own.flatten(0, 1)).unflatten(0, valid_BN.shape)
        return linear(self.last, F.silu(y + added[2]).flatten(0, 1)).unflatten(0, valid_BN.shape)


def places(position_BKN2: Tensor, grid_hw: tuple[int, int] | torch.Size) -> Tensor:
    """Share of each cell (B, K, N, P) in each position: bilinear, positions kept on the grid."""
    h, w = grid_hw
    shares = []
    for axis, size in ((1, h), (0, w)):
        at = ((position_BKN2[..., axis] + 1) / 2 * size - 0.5).clamp(0, size - 1)
        cells = torch.arange(size, device=at.device, dtype=at.dtype)
        shares.append((1 - (at[..., None] - cells).abs()).clamp_min(0))
    return (shares[0][..., :, None] * shares[1][..., None, :]).flatten(-2)


def amounts_of(rewards_R: np.ndarray, count: int) -> np.ndarray:
    """Amounts (V,) that a game pays: what was recorded, ascending, and nothing.

    Where that is more than ``count``, as evenly many payments lie between any two of them as can
    be, from the least to the most. Where it is less, the last stands there again.
    """
    paid = np.nan_to_num(rewards_R).round(6)  # what is left of 1/3 + 1/3 - 2/3 is nothing
    paid = paid[paid != 0]
    known = np.unique(np.append(paid, 0))
    if len(known) > count:
        spread = np.quantile(paid, np.linspace(0, 1, count - 1), method="closest_observation")
        known = np.unique(np.append(spread, 0))
    return np.pad(known, (0, count - len(known)), "edge").astype(np.float32)


def shares(reward_BN: Tensor, amounts_BV: Tensor) -> Tensor:
    """Shares (B, N, V) of the amounts, whose mean is the reward: of one amount if it is one, else
    of the two that it lies between."""
    reward_BN = reward_BN.clamp(amounts_BV[:, :1], amounts_BV[:, -1:]).contiguous()
    # the last amount may be there several times: the first of them is meant
    high = torch.searchsorted(amounts_BV.contiguous(), reward_BN)
    low = (high - 1).clamp(min=0)
    at_low, at_high = amounts_BV.gather(1, low), amounts_BV.gather(1, high)
    part = ((reward_BN - at_low) / (at_high - at_low).clamp_min(1e-9)).clamp(0, 1)
    part = torch.where(high == 0, 1, part)
    out = torch.zeros(*reward_BN.shape, amounts_BV.shape[1]).to(reward_BN)
    out.scatter_(2, low[..., None], 1 - part[..., None])
    return out.scatter_(2, high[..., None], part[..., None])


def paid_by(amounts_GV: Tensor, game_B: Tensor | None, rows: int) -> Tensor:
    """Amounts (B, V) of the rows' games; ``game_B`` counts where there are several."""
    return amounts_GV.expand(rows, -1) if len(amounts_GV) == 1 else amounts_GV[game_B]


class PartyOutcome(nn.Module):
    """End logit (B, M, N) and logits of the amounts (B, M, N, V) of every player's step."""

    amounts_GV: Tensor

    def __init__(self, cfg: PartyOutcomeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.ends = nn.ModuleList(_Reader(cfg, cfg.frames, 1, 1) for _ in range(cfg.members))
        self.rewards = nn.ModuleList(
            _Reader(cfg, cfg.frames + 1, 2, cfg.amounts) for _ in range(cfg.members))
        self.register_buffer("amounts_GV", torch.arange(cfg.amounts).float().repeat(cfg.games, 1))

    def forward(self, past_BKChw: Tensor, before_BNS: Tensor, after_BChw: Tensor,
                after_BNS: Tensor, actions_BN: Tensor, valid_BN: Tensor,
                game_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``before_BNS``, ``after_BNS``: states in the last past frame and in the one after;
        ``game_B``: numbers of the games, where ``cfg.games`` > 1."""
        if game_B is None and self.cfg.games > 1:
            raise ConfigError("heads need the numbers of the games", given="nothing",
                              expected=f"game_B (B,), below {self.cfg.games}",
                              fix="give the games that the rows play")
        action = F.one_hot(actions_BN, self.cfg.actions + 1).to(past_BKChw)
        both = torch.cat([past_BKChw, after_BChw[:, None]], 1)
        states = torch.stack([before_BNS, after_BNS], 1)
        states = torch.where(valid_BN[:, None, :, None], states, 0)
        ends = [m(past_BKChw, states[:, :1], action, valid_BN, game_B) for m in self.ends]
        rewards = [m(both, states, action, valid_BN, game_B) for m in self.rewards]
        return torch.stack(ends, 1)[..., 0], torch.stack(rewards, 1)

    def predict(self, past_BKChw: Tensor, before_BNS: Tensor, after_BChw: Tensor,
                after_BNS: Tensor, actions_BN: Tensor, valid_BN: Tensor,
                game_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(end chance, mean reward), (B, N) each; zero where nobody is."""
        rows = len(valid_BN)
        pad = max(1, 4 - rows)  # see Outcome.predict
        given = [past_BKChw, before_BNS, after_BChw, after_BNS, actions_BN, valid_BN]
        given += [] if game_B is None else [game_B]
        end, paid = self(*(torch.cat([x, torch.zeros_like(x[:1]).expand(pad, *x.shape[1:])])
                           for x in given))
        # an end or not as two chances, too: a sigmoid's bits depend on the rows beside
        end_BMN2 = torch.stack([torch.zeros_like(end), end], -1)[:rows]
        chance_BNV = paid[:rows].softmax(-1).mean(1)
        rewards = (chance_BNV * paid_by(self.amounts_GV, game_B, rows)[:, None]).sum(-1)
        return (torch.where(valid_BN, end_BMN2.softmax(-1).mean(1)[..., 1], 0),
                torch.where(valid_BN, rewards, 0))


class LearnedPartyOutcome(Learned):
    """Rewards and ends of every player from a ``PartyOutcome``."""

    @torch.no_grad()
    def __call__(self, past_BKChw: Tensor, before_BNS: Tensor, after_BChw: Tensor,
                 after_BNS: Tensor, actions_BN: Tensor, valid_BN: Tensor,
                 game_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(end chance (B, N) in [0, 1], reward (B, N))."""
        chance, reward = self.model.predict(past_BKChw[:, -self.frames:], before_BNS, after_BChw,
                                            after_BNS, actions_BN, valid_BN, game_B)
        return (chance * self.end_scale).clamp(0, 1), reward


def party_outcome_loss(model: nn.Module, cfg: PartyOutcomeConfig, batch: dict[str, Tensor],
                       amounts_GV: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the ends and of the rewards over all steps of the clips.

    ``batch``: as for ``party_loss`` (see there), with ``rewards_BFN`` and ``ended_BFN`` (the player
    ended in this frame or before); a player that has ended before counts no more. ``likely_B``, if
    there (see ``PartySampler``), weighs them all: heads that saw events twice as often as they
    happen would pay twice as often for what looks alike. ``amounts_GV``: what each game (of those
    that ``cfg`` tells apart) pays, ascending; a reward between two of them counts as its shares of
    both (``shares``), so that the mean of the chances is the reward.
    """
    latents, valid = batch["latents_BFChw"].float(), batch["valid_BN"].bool()
    states = torch.where(valid[:, None, :, None], batch["states_BFNS"].float(), 0)
    actions = batch["actions_BFN"].long()
    actions = torch.where(valid[:, None] & (actions >= 0), actions, cfg.actions)
    b, f = latents.shape[:2]
    reach = torch.arange(f - 1)[:, None] - torch.arange(cfg.frames - 1, -1, -1)
    past = latents[:, reach.clamp(min=0)].flatten(0, 1)
    ended = batch["ended_BFN"].bool()
    there = valid[:, None] & ~ended[:, :-1]
    if "exists_BF" in batch:
        there = there & batch["exists_BF"][:, 1:, None].bool()

    def after(x: Tensor) -> Tensor:
        return x[:, 1:].flatten(0, 1)

    games = batch["game_B"].long().repeat_interleave(f - 1) if cfg.games > 1 else None
    ends, paid = model(past, states[:, :-1].flatten(0, 1), after(latents), after(states),
                       after(actions), valid.repeat_interleave(f - 1, 0), games)
    counts = there.flatten(0, 1)[:, None].expand(-1, ends.shape[1], -1)
    end = after(ended).float()[:, None].expand(counts.shape)
    amounts = paid_by(amounts_GV.to(latents), games, len(counts))
    is_paid = shares(after(torch.nan_to_num(batch["rewards_BFN"].float())), amounts)[:, None]
    bce = F.binary_cross_entropy_with_logits(ends, end, reduction="none")
    ce = -(is_paid * paid.log_softmax(-1)).sum(-1)
    even = torch.ones(b) if "likely_B" not in batch else batch["likely_B"]
    even = counts * even.to(latents).repeat_interleave(f - 1)[:, None, None]
    total = even.sum().clamp_min(1e-6)
    bce = (bce * even).sum() / total
    ce = (ce * even).sum() / total
    return bce + ce, {"end_bce": float(bce.detach()), "reward_ce": float(ce.detach())}
