"""World state as a value: everything that can change during a step, for a batch of slots.

Shapes: B slot, P page column, K past frame, C channel, h w latent grid, A action features.
A ``WorldState`` never changes. ``step`` makes a new one; pages are shared by reference counts and
return to the pool when the last state that uses them is released or forgotten.
"""

import weakref
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.errors import CheckpointError, ShapeError, SlotError, StateError
from worldgym.memory import PagePool, Tables

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Starts:
    """Where episodes begin: up to K real frames per slot; the last is the frame ``reset`` returns.

    ``latents_BKChw``: normalised latents, oldest first, right-aligned; ``actions``: (B, K, ...)
    the action that led to each frame, in the world's action layout; ``null_BK``: no
    action led to it (first frame of an episode); ``length_B``: how many of the K frames are there.

    Worlds with subjects also need ``subjects_BKNS``, the subjects' states in each frame, and
    ``valid_BN``, which of the N places are taken; ``game_B``: which of the world's games it is.
    Worlds that are told what to show need ``context_BLD``, the encoded prompt of each start, and
    ``negative_BLD``, that of what not to show; ``prompts_B``, the texts themselves. Worlds with a
    camera: ``c2w_BK44``, its pose in each frame; ``blank_B``: nothing is given, the start is empty.
    """

    latents_BKChw: Tensor
    actions: np.ndarray
    null_BK: np.ndarray
    length_B: np.ndarray
    subjects_BKNS: Tensor | None = None
    valid_BN: np.ndarray | None = None
    game_B: np.ndarray | None = None
    context_BLD: Tensor | None = None
    negative_BLD: Tensor | None = None
    prompts_B: np.ndarray | None = None
    c2w_BK44: np.ndarray | None = None
    blank_B: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.length_B)

    def rows(self, index: np.ndarray) -> "Starts":
        """Some of the starts (repeats allowed)."""
        index = np.asarray(index)

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[torch.from_numpy(index)]
            return None if value is None else np.asarray(value)[index]

        return replace(self, **{f.name: cut(getattr(self, f.name)) for f in fields(self)})


def check_slots(slots: object, count: int) -> np.ndarray:
    """``slots`` as a non-empty array of distinct slot numbers in [0, count), or SlotError."""
    if slots is None:
        return np.arange(count)
    try:
        array = np.asarray(slots)
    except ValueError:  # ragged
        array = np.zeros(0)
    if array.dtype == bool and array.shape == (count,):
        array = np.flatnonzero(array)
    ok = array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu"
    if not ok or array.min() < 0 or array.max() >= count or len(np.unique(array)) != len(array):
        raise SlotError(
            "impossible slots", given=slots, expected=f"distinct integers in [0, {count - 1}]",
            fix="pass a non-empty list of slot numbers, or None for all",
        )
    return array.astype(np.int64)


class PerSlot(tuple):
    """What a world keeps of its slots that is no tensor: one immutable value for each slot.

    A value has ``to_tensors() -> dict``; its class, which a world names in ``extra`` in place of
    shape and dtype, has ``from_tensors(dict, world)``.
    """

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor):
            return PerSlot(tuple.__getitem__(self, int(i)) for i in index)
        return tuple.__getitem__(self, index)


def _joined(values: list) -> Any:
    if isinstance(values[0], PerSlot):
        return PerSlot(v for part in values for v in part)
    return torch.cat(values)


class WorldState:
    """An immutable batch of slots.

    Fields (one row per slot): ``tables`` (memory), ``history_BKChw`` (the newest K latents, the
    last is the current frame; what heads and observations read), ``lengths_B`` (how many of them
    are real), ``pending_BA`` (action features of the current frame, not yet in memory), ``index_B``
    (absolute index of the current frame), ``seed_B``, ``episode_B``, ``step_B``, ``branch_B``
    (the noise key), ``fingerprint`` (which world it belongs to), ``extra`` (whatever else a world
    keeps of a slot, tensors or ``PerSlot`` by name). A guided world has two rows of ``tables`` per
    slot.
    """

    COUNTERS = ("index_B", "lengths_B", "seed_B", "episode_B", "step_B", "branch_B")

    def __init__(self, pool: PagePool, fingerprint: str, tables: Tables, history_BKChw: Tensor,
                 pending_BA: Tensor, counters: dict[str, np.ndarray],
                 extra: dict[str, Any] | None = None) -> None:
        self.extra = extra or {}
        self.pool, self.fingerprint, self.tables = pool, fingerprint, tables
        self.history_BKChw, self.pending_BA, self._counters = history_BKChw, pending_BA, counters
        for array in (*counters.values(), tables.pages_BP, tables.frames_BP):
            array.setflags(write=False)
        pool.incref(tables.pages_BP)
        self._finalizer = weakref.finalize(self, pool.drop, tables.pages_BP)

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_counters"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        alive = "" if self.alive else ", released"
        return f"WorldState({self.num_slots} slots, steps {self.step_B.tolist()[:8]}{alive})"

    @property
    def num_slots(self) -> int:
        """How many slots."""
        return len(self.step_B)

    @property
    def latents_BCHW(self) -> Tensor:
        """Latents of the current frame of every slot."""
        return self.history_BKChw[:, -1]

    @property
    def keys_B4(self) -> np.ndarray:
        """Noise keys (seed, episode, step, branch)."""
        return np.stack([self.seed_B, self.episode_B, self.step_B, self.branch_B], 1)

    @property
    def alive(self) -> bool:
        """False after ``release``."""
        return self._finalizer.alive

    def check(self, fingerprint: str, pool: PagePool | None = None) -> None:
        """Raise StateError unless this state is alive and belongs to that world (and its pool)."""
        if not self.alive:
            raise StateError("state was released", given=repr(self), expected="a live state",
                             fix="keep a snapshot() of states you still need")
        if fingerprint != self.fingerprint:
            raise StateError("state of another world", given=self.fingerprint,
                             expected=fingerprint, fix="load the world that made this state")
        if pool is not None and pool is not self.pool:
            raise StateError("state of another world object", given="pages of another pool",
                             expected="a state that this object made or loaded",
                             fix="save() the state and load it into this world object")

    def release(self) -> None:
        """Give the pages back now rather than when Python forgets the state. Safe to repeat."""
        self._finalizer()

    def _new(self, tables: Tables, history: Tensor, pending: Tensor,
             counters: dict[str, np.ndarray], extra: dict[str, Any]) -> "WorldState":
        return WorldState(self.pool, self.fingerprint, tables, history, pending, counters, extra)

    def _rows(self, index: np.ndarray) -> "WorldState":
        self.check(self.fingerprint)
        where = torch.from_numpy(index).to(self.history_BKChw.device)
        rows = len(self.tables.pages_BP) // self.num_slots  # of tables, per slot
        tables = self.tables.rows((index[:, None] * rows + np.arange(rows)).ravel())
        return self._new(tables, self.history_BKChw[where], self.pending_BA[where],
                         {k: v[index] for k, v in self._counters.items()},
                         {k: v[where] for k, v in self.extra.items()})

    def snapshot(self) -> "WorldState":
        """Another handle on the same values; it survives ``release`` of this one. Shares pages."""
        return self._rows(np.arange(self.num_slots))

    def select(self, slots: object) -> "WorldState":
        """A state of only these slots, in this order."""
        return self._rows(check_slots(slots, self.num_slots))

    def fork(self, n: int, slots: object = None, fresh: bool = False) -> "WorldState":
        """``n`` copies of each slot, copies of a slot next to each other; this state is untouched.

        Args:
            fresh: give every copy noise of its own; by default copies with equal actions are equal.
        """
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
            raise SlotError("impossible number of forks", given=n, expected="an integer >= 1",
                            fix="fork at least once")
        index = check_slots(slots, self.num_slots)
        state = self._rows(np.repeat(index, n))
        if not fresh:
            return state
        branch = state.branch_B * 1_000_003 + 1 + np.tile(np.arange(n), len(index))
        out = state._new(state.tables, state.history_BKChw, state.pending_BA,
                         state._counters | {"branch_B": branch}, state.extra)
        state.release()
        return out

    @staticmethod
    def join(states: list["WorldState"]) -> "WorldState":
        """One state of all slots of several states of the same world."""
        if not states:
            raise SlotError("nothing to join", given="no states", expected="at least one",
                            fix="pass the states to join")
        first = states[0]
        for state in states:
            state.check(first.fingerprint)
            if state.pool is not first.pool:
                raise StateError("states of two pools", given="states of two world objects",
                                 expected="one world", fix="save and load them into one world")
        return first._new(
            Tables.join([s.tables for s in states]),
            torch.cat([s.history_BKChw for s in states]), torch.cat([s.pending_BA for s in states]),
            {k: np.concatenate([s._counters[k] for s in states]) for k in WorldState.COUNTERS},
            {k: _joined([s.extra[k] for s in states]) for k in first.extra},
        )

    def replace(self, slots: object, other: "WorldState") -> "WorldState":
        """This state with these slots taken from ``other``; all other slots bit-identical."""
        index = check_slots(slots, self.num_slots)
        if other.num_slots != len(index):
            raise ShapeError("replacement has the wrong size", given=f"{other.num_slots} slots",
                             expected=f"{len(index)} slots", fix="select the slots first")
        order = np.arange(self.num_slots)
        order[index] = self.num_slots + np.arange(len(index))
        both = WorldState.join([self, other])
        out = both._rows(order)
        both.release()
        return out

    def with_extra(self, **extra: Any) -> "WorldState":
        """The same state with other values of some ``extra``."""
        self.check(self.fingerprint)
        return self._new(self.tables, self.history_BKChw, self.pending_BA, self._counters,
                         self.extra | extra)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file (atomically); each page once."""
        from worldgym import checkpoint

        self.check(self.fingerprint)
        unique, inverse = np.unique(self.tables.pages_BP, return_inverse=True)
        real = unique[unique >= 0]
        local = inverse.reshape(self.tables.pages_BP.shape) - (len(unique) - len(real))
        where = torch.from_numpy(real).to(self.pool.device)
        tensors = {f"pages.{kind}.{layer}": store[layer][where]
                   for kind, store in (("k", self.pool.k), ("v", self.pool.v))
                   for layer in range(self.pool.spec.layers)}
        tensors |= {name: torch.from_numpy(value.copy()) for name, value in self._counters.items()}
        tensors |= {"tables.pages": torch.from_numpy(local),
                    "tables.frames": torch.from_numpy(self.tables.frames_BP.copy()),
                    "history": self.history_BKChw, "pending": self.pending_BA}
        for name, value in self.extra.items():
            if isinstance(value, PerSlot):
                tensors |= {f"extra.{name}.{slot}.{part}": tensor.contiguous()
                            for slot, one in enumerate(value)
                            for part, tensor in one.to_tensors().items()}
            else:
                tensors[f"extra.{name}"] = value
        header = {"kind": "worldgym.state", "format": FORMAT, "fingerprint": self.fingerprint}
        checkpoint.save(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path, world) -> "WorldState":
        """Read a state of ``world`` back, in this process or another."""
        from worldgym import checkpoint

        tensors, header = checkpoint.load_tensors(path)
        if header.get("kind") != "worldgym.state" or header.get("format") != FORMAT:
            raise CheckpointError("not a state file", given=f"{path}: {header}",
                                  expected=f"a worldgym.state file of format {FORMAT}",
                                  fix="write it with WorldState.save")
        if header.get("fingerprint") != world.fingerprint:
            raise StateError("state of another world", given=header.get("fingerprint"),
                             expected=world.fingerprint, fix="load the world that made this state")
        pool: PagePool = world.pool
        try:
            local = tensors["tables.pages"].numpy()
            history, pending = tensors["history"], tensors["pending"]
            counters = {k: tensors[k].numpy().copy() for k in cls.COUNTERS}
            count = len(tensors["pages.k.0"])
            pages = [(tensors[f"pages.k.{i}"], tensors[f"pages.v.{i}"])
                     for i in range(pool.spec.layers)]
            frames = tensors["tables.frames"].numpy().copy()
            extra = {k: tensors[f"extra.{k}"].to(pool.device) if isinstance(kind, tuple)
                     else _values(tensors, k, kind, world) for k, kind in world.extra.items()}
        except KeyError as error:
            raise CheckpointError("state file lacks a tensor", given=f"{path} without {error}",
                                  expected="all tensors of a saved state",
                                  fix="save the state again") from error
        _check_tensors(path, world, tensors, count)
        ids = pool.alloc(count)
        try:
            for layer, (k, v) in enumerate(pages):
                pool.write(ids, layer, k.to(pool.device), v.to(pool.device))
            pool.seal(ids)
            table = np.where(local >= 0, ids[np.maximum(local, 0)] if count else -1, -1)
            return cls(pool, world.fingerprint, Tables(table, frames), history.to(pool.device),
                       pending.to(pool.device), counters, extra)
        finally:
            pool.decref(ids)


def _values(tensors: dict[str, Tensor], name: str, kind: Any, world: Any) -> PerSlot:
    """Values of all slots, from the tensors that ``save`` wrote."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(len(tensors["step_B"]))]
    for key, tensor in tensors.items():
        if key.startswith(f"extra.{name}."):
            slot, _, part = key[len(f"extra.{name}."):].partition(".")
            parts[int(slot)][part] = tensor
    return PerSlot(kind.from_tensors(part, world) for part in parts)


def _check_tensors(path: str | Path, world, tensors: dict[str, Tensor], count: int) -> None:
    """Refuse a state file whose tensors have a wrong shape, dtype, page number or NaN."""
    spec, slots = world.pool.spec, len(tensors["step_B"])
    page = (count, spec.tokens, spec.heads, spec.head_dim)
    table = (slots * world.table_rows, *tensors["tables.pages"].shape[1:])
    wants: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: (page, spec.dtype) for name in tensors if name.startswith("pages.")}
    wants |= {name: ((slots,), torch.int64) for name in WorldState.COUNTERS}
    wants |= {"history": ((slots, world.history, *world.spec.latent_chw), world.latent_dtype),
              "pending": ((slots, *world.pending_shape), world.latent_dtype),
              "tables.pages": (table, torch.int64), "tables.frames": (table, torch.int64)}
    wants |= {f"extra.{k}": ((slots, *form[0]), form[1]) for k, form in world.extra.items()
              if isinstance(form, tuple)}
    for name, expected in wants.items():
        tensor = tensors[name]
        if (tuple(tensor.shape), tensor.dtype) != expected:
            raise CheckpointError(f"state file has misshaped {name}",
                                  given=f"{path}: {tuple(tensor.shape)} {tensor.dtype}",
                                  expected=expected, fix="save the state again with this world")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"state file has NaN in {name}", given=path,
                                  expected="finite values", fix="save the state again")
    local, frames = tensors["tables.pages"], tensors["tables.frames"]
    lengths = tensors["lengths_B"]
    if (local.ndim != 2 or slots < 1 or bool((local >= count).any())
            or bool(((local < 0) != (frames < 0)).any())
            or bool(((lengths < 1) | (lengths > world.history)).any())):
        raise CheckpointError("state file has impossible page or frame numbers", given=path,
                              expected=f"pages in [0, {count - 1}], one frame number each",
                              fix="save the state again with this world")
