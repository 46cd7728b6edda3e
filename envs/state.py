"""The whole state of a dream env as a value: world state, counters, stacks, RNG; and its file.

Shapes: B slots.
"""

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from worldgym.errors import SlotError, StateError, UnsafeFileError

ARRAYS = ("stack_B", "seed_B", "episode_B", "elapsed_B", "return_B", "done_B")
FORMAT = 1


@dataclass(frozen=True, slots=True)
class CoreState:
    """State of a batch of slots; never written in place, replaced as a whole by every call."""

    world: Any  # WorldState
    stack_B: np.ndarray  # stacked observations, as the user sees them
    seed_B: np.ndarray  # int64
    episode_B: np.ndarray  # int64, counts resets since the seed was given
    elapsed_B: np.ndarray  # int64 steps in this episode
    return_B: np.ndarray  # float64 sum of rewards in this episode
    done_B: np.ndarray  # bool, the episode ended and was not reset yet

    def copy(self) -> "CoreState":
        """A snapshot that shares the world's pages and nothing else."""
        arrays = {name: getattr(self, name).copy() for name in ARRAYS}
        return CoreState(world=self.world.snapshot(), **arrays)

    def select(self, slots: list[int]) -> "CoreState":
        """The state of some slots alone."""
        arrays = {name: getattr(self, name)[slots] for name in ARRAYS}
        return CoreState(world=self.world.select(slots), **arrays)


@dataclass(frozen=True, slots=True)
class EnvState:
    """What ``get_state`` returns: ``core`` (None before the first reset), RNG, and what it fits."""

    core: CoreState | None
    np_random: dict | None
    fits: dict  # world, observation, action mapping; compared by set_state

    @property
    def num_slots(self) -> int:
        """Number of slots B."""
        return int(self.fits["num_slots"])

    def select(self, slots: list[int]) -> "EnvState":
        """The state of some slots, for an env of that many slots.

        Raises:
            SlotError: no slot, or one that does not exist.
        """
        slots = [int(s) for s in slots]
        if not slots or any(not 0 <= s < self.num_slots for s in slots):
            raise SlotError("no such slot", given=slots, expected=f"0..{self.num_slots - 1}",
                            fix="pass at least one existing slot number")
        core = None if self.core is None else self.core.select(slots)
        return replace(self, core=core, fits={**self.fits, "num_slots": len(slots)})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; ``load`` reads it in any process."""
        path = Path(path)
        header = {"format": FORMAT, "np_random": self.np_random, "fits": self.fits,
                  "empty": self.core is None}
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            arrays = {"none": np.zeros(1, np.uint8)}
            if self.core is not None:
                arrays = {n: np.ascontiguousarray(getattr(self.core, n)) for n in ARRAYS}
                self.core.world.save(Path(folder) / "world.safetensors")
                data = (Path(folder) / "world.safetensors").read_bytes()
                arrays["world"] = np.frombuffer(data, np.uint8)
            part = Path(folder) / "state.safetensors"
            save_file(arrays, part, metadata={"worldgym_env_state": json.dumps(header)})
            os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path, world: Any) -> "EnvState":
        """Read a file that ``save`` wrote, for an env over ``world``.

        Raises:
            StateError: missing, truncated or foreign file. UnsafeFileError: a pickle or archive.
        """
        path = Path(path)
        header, arrays = _read(path)
        if header["empty"]:
            return cls(core=None, np_random=header["np_random"], fits=header["fits"])
        with tempfile.TemporaryDirectory() as folder:
            inner = Path(folder) / "world.safetensors"
            inner.write_bytes(arrays.pop("world").tobytes())
            core = CoreState(world=_state_class(world).load(inner, world), **arrays)
        return cls(core=core, np_random=header["np_random"], fits=header["fits"])


def _state_class(world: Any) -> Any:
    custom = getattr(world, "state_class", None)  # worlds that are not built on the engine
    if custom is not None:
        return custom
    from worldgym.state import WorldState

    return WorldState


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    def refuse(what: str, given: object) -> StateError:
        return StateError(what, given=given, expected="a file written by env.save_state",
                          fix="save the state again; a half-written or foreign file cannot be used")

    if not path.is_file():
        raise refuse("state file is missing", str(path))
    with path.open("rb") as raw:
        head = raw.read(9)
    if head[8:9] != b"{" and (head[:1] == b"\x80" or head[:2] == b"PK"):
        raise UnsafeFileError("state file is a pickle or archive", given=f"{path} ({head!r}...)",
                              expected="safetensors", fix="save the state with env.save_state")
    try:
        with safe_open(path, framework="np") as file:
            meta = (file.metadata() or {}).get("worldgym_env_state")
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise refuse("state file cannot be read", f"{path} ({error})") from error
    if meta is None:
        raise refuse("not the state of an env", f"{path} with tensors {sorted(arrays)[:4]}")
    header = json.loads(meta)
    wanted = {"none"} if header.get("empty") else {*ARRAYS, "world"}
    if header.get("format") != FORMAT or set(arrays) != wanted or "fits" not in header:
        raise refuse("state file of another format",
                     f"format {header.get('format')} with {sorted(arrays)}")
    return header, arrays
