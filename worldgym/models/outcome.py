"""Reward and end heads of ``nano``: what the next step will bring, read from the frames so far.

Shapes: B slot, K past latent frames, C channel, h w grid, A action features, M head members.
The heads look at the *past* and the action, never at a drawn ending: the chance of an ending is
p(end | frames before, action) and the dynamics draw p(frame | frames before, action, no end).
A world that had to draw its endings could be played by making it forget to (the classic trap).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeConfig:
    """``frames``: K past frames read; ``members``: independent heads whose chances are averaged.

    ``ahead``: steps that the danger looks ahead (0: the end chance of the step is the danger).
    ``reward_range``: lowest and highest recorded reward of a step that went on, and of one that
    ended; predictions are kept inside. Where steps pay nothing until the goal, an error of 0.01 a
    step adds up to more than the goal, and agents learn to collect errors.
    """

    latent_chw: tuple[int, int, int]
    action_features: int
    frames: int = 4
    width: int = 48
    hidden: int = 128
    members: int = 2
    ahead: int = 0
    reward_range: tuple[tuple[float, float], tuple[float, float]] | None = None


class _Member(nn.Module):
    def __init__(self, cfg: OutcomeConfig) -> None:
        super().__init__()
        c, h, w = cfg.latent_chw
        self.inputs = nn.Linear(9 * (cfg.frames * c + 1), cfg.width)
        self.middle = nn.Linear(9 * cfg.width, cfg.width // 2)
        self.hidden = nn.Linear(cfg.width // 2 * h * w + cfg.action_features, cfg.hidden)
        self.last = nn.Linear(cfg.hidden + cfg.action_features, 3 + (cfg.ahead > 0))

    def forward(self, near_BPN: Tensor, grid_hw: tuple[int, int], action_BA: Tensor) -> Tensor:
        # 3x3 convolutions written as matrix products: their bits do not depend on the batch
        x = F.silu(linear(self.inputs, near_BPN))
        x = neighbours(x.transpose(1, 2).unflatten(2, grid_hw))
        x = F.silu(linear(self.middle, x))
        x = F.silu(linear(self.hidden, torch.cat([x.flatten(1), action_BA], 1)))
        return linear(self.last, torch.cat([x, action_BA], 1))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer, with bits that do not depend on a row's place in the batch.

    Products with few outputs choose their code by the alignment of each row: rows of narrow
    layers are padded with zeros to a multiple of 16 bytes.
    """
    pad = -x.shape[-1] % 4
    if not pad or layer.out_features >= 24:
        return layer(x)
    return F.linear(F.pad(x, (0, pad)), F.pad(layer.weight, (0, pad)), layer.bias)


def neighbours(x_BChw: Tensor) -> Tensor:
    """(B, h * w, 9 C): every cell with its eight neighbours, zeros outside."""
    return F.unfold(x_BChw, 3, padding=1).transpose(1, 2)


def around(layer: nn.Linear, x_BChw: Tensor) -> Tensor:
    """The layer on every cell with its neighbours, (B, h * w, out).

    While it trains, a convolution (2.5 times as fast: neighbours are not copied); otherwise a
    product of rows, whose bits do not depend on the rows beside.
    """
    if not torch.is_grad_enabled():
        return linear(layer, neighbours(x_BChw))
    weight = layer.weight.unflatten(1, (x_BChw.shape[1], 3, 3))
    return F.conv2d(x_BChw, weight, layer.bias, padding=1).flatten(2).transpose(1, 2)


class Outcome(nn.Module):
    """End chance, reward and danger of the step that ``action`` leads to.

    ``forward`` returns (B, M, 3 or 4): end logit, reward if the episode goes on, reward if it ends,
    and with ``ahead`` the logit of the danger: an end within that many steps, as recorded play
    went on. It is learned from recordings alone, so it knows what an approaching fireball meant in
    the game even where the dream would let it fade.
    """

    reward_scale: Tensor

    def __init__(self, cfg: OutcomeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.members = nn.ModuleList(_Member(cfg) for _ in range(cfg.members))
        self.register_buffer("reward_scale", torch.ones(()))

    def forward(self, past_BKChw: Tensor, action_BA: Tensor) -> Tensor:
        x = past_BKChw.flatten(1, 2)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # marks the border against zero padding
        near, grid = neighbours(x), x.shape[2:]
        return torch.stack([member(near, grid, action_BA) for member in self.members], 1)

    def predict(self, past_BKChw: Tensor, action_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(end chance (B,), rewards (B, 2) if it goes on / if it ends, danger (B,))."""
        rows = len(action_BA)
        # matrix products have row-independent bits from 4 rows on; the last row is always padding,
        # since elementwise kernels work out the end of a tensor (its size modulo 32) in other code
        pad = max(1, 4 - rows)
        out = self(F.pad(past_BKChw, (0, 0) * 4 + (0, pad)), F.pad(action_BA, (0, 0, 0, pad)))
        out = out[:rows]
        rewards = out[..., 1:3].mean(1) * self.reward_scale
        if self.cfg.reward_range is not None:
            low, high = rewards.new_tensor(self.cfg.reward_range).unbind(1)
            rewards = rewards.clamp(low, high)
        end, danger = (out[..., i].sigmoid().mean(1) for i in (0, 3 if self.cfg.ahead else 0))
        return end, rewards, danger


def outcome_loss(model: nn.Module, past_BKChw: Tensor, action_BA: Tensor, reward_B: Tensor,
                 end_B: Tensor, scale: Tensor,
                 soon_B: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the end and squared error of the reward of whichever branch happened.

    ``soon_B``: an end within ``ahead`` steps, 1 or 0; -1 where the recording stops before.
    """
    out = model(past_BKChw, action_BA)
    end = end_B.float()[:, None].expand(-1, out.shape[1])
    bce = F.binary_cross_entropy_with_logits(out[..., 0], end)
    guess = torch.where(end.bool(), out[..., 2], out[..., 1])
    squared = (guess - (reward_B / scale)[:, None]) ** 2
    told = {"end_bce": float(bce.detach()), "reward_mse": float(squared.detach().mean())}
    if soon_B is None:
        return bce + squared.mean(), told
    soon = soon_B.float()[:, None].expand(-1, out.shape[1])
    error = F.binary_cross_entropy_with_logits(out[..., 3], soon.clamp(min=0), reduction="none")
    danger = torch.where(soon >= 0, error, 0.0).mean()
    return bce + squared.mean() + danger, told | {"danger_bce": float(danger.detach())}
