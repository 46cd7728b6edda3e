"""What a slot of a WorldPlay world remembers besides the engine's own state."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.models.film import Film
from worldgym.reconstituted import History


@dataclass(frozen=True, slots=True)
class Past:
    """What a slot remembers: ``history``; ``film`` of the newest frames; ``seen``, the context
    frames of the newest chunk; ``video``, that decodes."""

    history: History
    video: Any
    film: Film | None = None
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, for files."""
        held = self.history.to_arrays()
        out = {n: torch.from_numpy(held[n]) for n in ("w2c", "K", "label")}
        out |= {"latents": held["latents"], "seen": torch.from_numpy(self.seen.copy())}
        if self.film is not None:
            out |= {f"film.{n}": t for n, t in self.film.to_tensors(self.video).items()}
        return out

    @classmethod
    def from_tensors(cls, held: dict[str, Tensor], world: Any) -> "Past":
        """Inverse of ``to_tensors``."""
        arrays: dict[str, Any] = {n: held[n].numpy() for n in ("w2c", "K", "label")}
        history = History.from_arrays(arrays | {
            "latents": held["latents"].to(world.device), "chunk": world.memory.chunk})
        film = {n[5:]: t for n, t in held.items() if n.startswith("film.")}
        return cls(history, world.video, Film.from_tensors(film, world.device) if film else None,
                   held["seen"].numpy())
