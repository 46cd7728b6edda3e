"""The callback of a training: progress bar, learning curve, checkpoints, time limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from worldgym.agents.bookkeeper import Bookkeeper
from worldgym.agents.keeper import Keeper


class TimeUp(Exception):  # noqa: N818  (no error: it ends a training between two rollouts)
    """The time limit is reached; what was learned is kept."""


class Watch(BaseCallback):
    """Sees every step; saves only between rollouts, where a run can go on exactly."""

    def __init__(self, keeper: Keeper, book: Bookkeeper, config: Any,
                 curve: list[dict[str, float]], seconds: float,
                 saved: Callable[[Path], None] | None = None) -> None:
        super().__init__()
        self._told = saved
        self.keeper, self.book, self.config, self.curve = keeper, book, config, list(curve)
        self._before, self._began = seconds, time.perf_counter()
        self._saved: int | None = None
        self._bar: tqdm | None = None

    @property
    def seconds(self) -> float:
        """Training time, earlier parts of the run included."""
        return self._before + time.perf_counter() - self._began

    def late(self) -> bool:
        """Whether the time limit is reached."""
        return self.config.minutes is not None and self.seconds >= 60 * self.config.minutes

    def _on_training_start(self) -> None:
        self._saved = self.num_timesteps = self.model.num_timesteps
        self._bar = tqdm(total=self.config.steps, initial=self.model.num_timesteps, unit=" steps",
                         desc=f"training {self.config.algorithm}", mininterval=2.0,
                         disable=not self.config.progress, unit_scale=True)

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        if self._saved is not None and steps - self._saved >= self.config.save_every:
            self._save(self.model)
        if self.late():
            raise TimeUp

    def _on_step(self) -> bool:
        assert self._bar is not None
        self._bar.update(self.model.num_timesteps - self._bar.n)
        return True

    def _on_rollout_end(self) -> None:
        means = self.book.means()
        steps = int(self.model.num_timesteps)
        if means is None or (self.curve and steps - self.curve[-1]["steps"] < self._every()):
            return
        self.curve.append({"steps": steps, "return": round(means[0], 3),
                           "length": round(means[1], 3), "seconds": round(self.seconds, 1)})
        self.logger.record("dream/return", means[0])
        self.logger.record("dream/length", means[1])
        if self._bar is not None:
            self._bar.set_postfix_str(f"return {means[0]:.4g}")

    def _every(self) -> int:
        return max(1, self.config.steps // 500)

    def _save(self, model: Any) -> Path:
        self._saved = model.num_timesteps
        path = self.keeper.save(model, self.book, self.curve, self.seconds)
        if self._told is not None:
            self._told(path)
        return path

    def close(self, model: Any) -> Path:
        """Write the last checkpoint and end the bar."""
        if self._bar is not None:
            self._bar.close()
        return self._save(model)
