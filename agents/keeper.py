"""Checkpoints of a training: written whole or not at all, enough to go on bit for bit.

A checkpoint is a folder ``checkpoints/000012288/``: ``agent.zip`` (usable by itself) and, in the
newest two, ``trainer.pt`` (counters, random generators, last observations, replay buffer; read
with ``weights_only=True``) and ``env.safetensors`` (the state of every dream).
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldgym.agents.bookkeeper import Bookkeeper
from worldgym.agents.model import save_agent
from worldgym.errors import CheckpointError

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls")
ARRAYS = ("_last_obs", "_last_episode_starts", "_last_original_obs")
REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class Keeper:
    """Saves and restores one training in ``folder``."""

    def __init__(self, folder: Path, facts: dict[str, Any], keep_full: int = 2) -> None:
        self.folder, self.facts, self.keep_full = folder / "checkpoints", facts, keep_full

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit() and p.is_dir())

    def latest(self) -> Path | None:
        """Newest checkpoint from which training can go on."""
        full = [p for p in self.all() if (p / "trainer.pt").is_file()]
        return full[-1] if full else None

    def save(self, model: Any, book: Bookkeeper, curve: list[dict[str, float]],
             seconds: float) -> Path:
        """Write a checkpoint of this moment, between two rollouts."""
        final = self.folder / f"{model.num_timesteps:09d}"
        if final.exists():
            return final
        temporary = self.folder / f".{final.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_agent(model, temporary / "agent.zip", {**self.facts, "steps": model.num_timesteps})
        source = dream_of(book)
        if source is not None:
            source.get_state().save(temporary / "env.safetensors")
        with open(temporary / "trainer.pt", "wb") as file:
            torch.save({**learner_state(model), "book": _tensors(book.state()), "curve": curve,
                        "seconds": seconds}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, final)
        self._prune()
        return final

    def restore(self, path: Path, model: Any, book: Bookkeeper) -> tuple[list[dict], float]:
        """Bring ``model`` and its envs back to the checkpoint; returns (curve, seconds)."""
        try:
            state = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
            model.set_parameters(str(path / "agent.zip"))
        except (OSError, RuntimeError, EOFError, ValueError, KeyError,
                pickle.UnpicklingError) as error:
            raise CheckpointError("checkpoint cannot be read", given=f"{path}: {error}",
                                  expected="a folder written by worldgym train",
                                  fix=f"delete {path}; training goes on from the one before"
                                  ) from error
        book.load({k: v.numpy() for k, v in state["book"].items()})
        load_learner(model, state)
        source = dream_of(book)
        if source is not None and (path / "env.safetensors").is_file():
            from worldgym.envs.state import EnvState

            source.set_state(EnvState.load(path / "env.safetensors", source.task.world))
        else:  # a real game cannot be put back: it starts new episodes
            model._last_obs = None
            book.seed(self.facts.get("seed", 0) + model.num_timesteps)
        return state["curve"], float(state["seconds"])

    def _prune(self) -> None:
        for path in self.all()[: -self.keep_full]:
            for name in ("trainer.pt", "env.safetensors"):
                (path / name).unlink(missing_ok=True)
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)


def dream_of(book: Bookkeeper) -> Any | None:
    """The dream inside the wrappers, if it can tell and take its state."""
    env: Any = book.venv
    while hasattr(env, "venv"):
        env = env.venv
    return env if hasattr(env, "get_state") and hasattr(env, "set_state") else None


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}


def learner_state(model: Any) -> dict[str, Any]:
    """What SB3 itself does not write: counters, generators, last observations, replay buffer."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    state: dict[str, Any] = {
        "counters": {k: int(getattr(model, k)) for k in COUNTERS if hasattr(model, k)},
        "arrays": _tensors({k: getattr(model, k) for k in ARRAYS
                            if isinstance(getattr(model, k, None), np.ndarray)}),
        "episodes": [dict(e) for e in model.ep_info_buffer or ()],
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python_rng": list(random.getstate()[1]),
        "action_rng": _text(model.action_space.np_random.bit_generator.state),
    }
    lstm = getattr(model, "_last_lstm_states", None)
    if lstm is not None:
        state["lstm"] = [list(pair) for pair in lstm]
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        size = buffer.buffer_size if buffer.full else buffer.pos
        state["replay"] = {"pos": buffer.pos, "full": buffer.full,
                           **{k: torch.from_numpy(getattr(buffer, k)[:size].copy())
                              for k in REPLAY if hasattr(buffer, k)}}
    return state


def load_learner(model: Any, state: dict[str, Any]) -> None:
    """Inverse of ``learner_state``."""
    import json
    from collections import deque

    for key, value in state["counters"].items():
        setattr(model, key, value)
    for key, value in state["arrays"].items():
        setattr(model, key, value.numpy())
    model.ep_info_buffer = deque(state["episodes"], maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    if "lstm" in state:
        kind = type(model._last_lstm_states)
        model._last_lstm_states = kind(*[tuple(pair) for pair in state["lstm"]])
    if "replay" in state:
        buffer, saved = model.replay_buffer, state["replay"]
        buffer.pos, buffer.full = int(saved["pos"]), bool(saved["full"])
        for key in REPLAY:
            if key in saved:
                getattr(buffer, key)[: len(saved[key])] = saved[key].numpy()
    torch.set_rng_state(state["torch_rng"])
    kind, keys, *rest = state["numpy_rng"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate((3, tuple(state["python_rng"]), None))
    model.action_space.np_random.bit_generator.state = json.loads(state["action_rng"])


def _text(value: Any) -> str:
    import json

    return json.dumps(value, default=int)
