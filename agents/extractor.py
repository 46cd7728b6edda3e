"""Features of latent observations for Stable-Baselines3 policies."""

from __future__ import annotations

import gymnasium
import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from worldgym.errors import ConfigError


class LatentExtractor(BaseFeaturesExtractor):
    """3x3 convolution, ReLU, flatten, linear: enough for a (C*k, h, w) latent, and fast.

    Latents are squashed at four standard deviations, so that one strange value cannot drive the
    policy far from what it learned.

    Args:
        space: Box (C*k, h, w) float32.
        width: channels of the convolution.
        features_dim: size of the output.
    """

    def __init__(self, space: gymnasium.Space, width: int = 32, features_dim: int = 128) -> None:
        if space.shape is None or len(space.shape) != 3:
            raise ConfigError("LatentExtractor reads latents", given=space.shape,
                              expected="(channels, h, w)", fix='train with observation="latent"')
        super().__init__(space, features_dim)
        channels, height, side = space.shape
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.linear = nn.Linear(width * height * side, features_dim)

    def forward(self, observations: Tensor) -> Tensor:
        """Features (N, features_dim)."""
        x = 4 * torch.tanh(observations / 4)
        x = torch.relu(self.conv(x))
        return torch.relu(self.linear(x.flatten(1)))


class TokenExtractor(LatentExtractor):
    """The same for ids (k, h, w): each is looked up in a table of codes first.

    Args:
        space: Box (k, h, w) float32 of ids.
        codes, code_width: size of the table.
        width, features_dim: as in ``LatentExtractor``.
    """

    def __init__(self, space: gymnasium.Space, codes: int, code_width: int, width: int = 32,
                 features_dim: int = 128) -> None:
        super().__init__(space, width, features_dim)
        assert space.shape is not None
        self.table = nn.Embedding(codes, code_width)
        self.conv = nn.Conv2d(space.shape[0] * code_width, width, 3, padding=1)

    def begin_with(self, codes_VZ: Tensor) -> None:
        """Take over a world's codes, scaled to unit variance; they are learned on."""
        with torch.no_grad():
            self.table.weight.copy_(codes_VZ / codes_VZ.square().mean().sqrt())

    def forward(self, observations: Tensor) -> Tensor:
        """Features (N, features_dim)."""
        ids = observations.long().clamp(0, self.table.num_embeddings - 1)
        return super().forward(self.table(ids).movedim(-1, 2).flatten(1, 2))
