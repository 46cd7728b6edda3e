"""What parameter-shared PPO needs beside Stable-Baselines3: who is left out, eyes, a past self.

Every player of every slot is a row of one VecEnv and all rows share one network. The row of a
player that is out goes on until its slot's episode is over; what it then holds is nobody's
experience. ``LiveRollout`` remembers which rows were played at each step and leaves the others out
of every minibatch: no weight, no gradient, no share in the advantages' mean. Advantages of rows
that were played are those of an ordinary episode, since a player's end is a ``done`` in its row.
Shapes: R rows, C channels, S crop pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from worldgym.agents.model import load_weights
from worldgym.errors import ConfigError


class LiveRollout(RolloutBuffer):
    """A rollout buffer that gives out only what was played; ``played()`` tells, (R,) bool."""

    played: Callable[[], np.ndarray] | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.live = np.ones((self.buffer_size, self.n_envs), bool)
        super().reset()

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Keep one step of all rows, and which of them were played."""
        if self.played is not None:
            self.live[self.pos] = self.played()
        super().add(*args, **kwargs)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Minibatches of the played steps in random order."""
        assert self.full
        total = self.buffer_size * self.n_envs
        order = np.random.permutation(total)  # as in the base class: the learner's seed decides
        if not self.generator_ready:
            for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        order = order[self.live.swapaxes(0, 1).ravel()[order]]
        size = batch_size or max(1, len(order))
        for first in range(0, len(order), size):
            yield self._get_samples(order[first:first + size])


class CropExtractor(BaseFeaturesExtractor):
    """One look at every cell of a crop, one at every cell's neighbours, then a linear layer.

    Args:
        space: Box (C, S, S) uint8, cells of ``cell_px`` pixels.
        width: channels of the convolutions. features_dim: size of the output.
    """

    def __init__(self, space: gymnasium.Space, cell_px: int = 4, width: int = 32,
                 features_dim: int = 128) -> None:
        if space.shape is None or len(space.shape) != 3 or space.shape[1] % cell_px:
            raise ConfigError("CropExtractor reads crops", given=space.shape,
                              expected=f"(channels, S, S), S a multiple of {cell_px}",
                              fix='train with observation="crop"')
        super().__init__(space, features_dim)
        channels, side = space.shape[0], space.shape[1] // cell_px
        self.cells = nn.Conv2d(channels, width, cell_px, cell_px)
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.linear = nn.Linear(width * side * side, features_dim)

    def forward(self, observations: Tensor) -> Tensor:
        """Features (R, features_dim) of pictures in 0..1."""
        x = torch.relu(self.around(torch.relu(self.cells(observations))))
        return torch.relu(self.linear(x.flatten(1)))


def drawn(policy: Any, seen_RCSS: np.ndarray, keys_R: np.ndarray) -> np.ndarray:
    """Actions (R,) drawn from an SB3 policy; the noise of a row follows from its keys alone."""
    with torch.no_grad():
        tensor, _ = policy.obs_to_tensor(seen_RCSS)
        logits = policy.get_distribution(tensor).distribution.logits.cpu().numpy()
    noise = np.stack([np.random.default_rng([int(k) for k in key]).gumbel(size=logits.shape[1])
                      for key in keys_R])
    return (logits + noise).argmax(1)


class PastSelf:
    """A frozen copy of the learner that plays rivals' seats; ``load``: become a checkpoint."""

    def __init__(self, policy: Any) -> None:
        self.policy = copy.deepcopy(policy)
        self.policy.set_training_mode(False)

    def load(self, checkpoint: Path) -> None:
        """Play as the agent of this checkpoint from now on."""
        load_weights(self.policy, checkpoint / "agent.zip")

    def __call__(self, seen_RCSS: np.ndarray, keys_R4: np.ndarray) -> np.ndarray:
        return drawn(self.policy, seen_RCSS, keys_R4)
