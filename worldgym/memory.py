"""Context memory: immutable pages in one pool, tables per slot, policies that choose pages.

Shapes: B slot, P page column of a table, Q query frame, K key frame, T token, N head, E head
width. A page holds the keys and values of one latent frame in every layer, written once; states
share pages by reference counts (../shared/design/memory.md). Keys are stored rotated to the frame
index at which they were written: rotations compose, so a policy that moves a page to another slot
turns it by the difference only (``PagedAttend`` with ``move_BP``).
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worldgym.attention import attention
from worldgym.errors import ConfigError, MemoryBudgetError, TransactionError
from worldgym.rope import axis_frequencies, axis_pairs, cos_sin, rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class PageSpec:
    """Size of one page: keys and values of one latent frame in all layers."""

    layers: int
    heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        return 2 * self.layers * self.heads * self.head_dim * self.tokens * self.dtype.itemsize


class PagePool:
    """Physical store of pages with reference counts; grows by doubling up to ``max_pages``."""

    def __init__(self, spec: PageSpec, device: torch.device | str = "cpu", pages: int = 0,
                 max_pages: int | None = None) -> None:
        self.spec, self.device, self.max_pages = spec, torch.device(device), max_pages
        shape = (0, spec.tokens, spec.heads, spec.head_dim)
        self.k = [torch.empty(shape, dtype=spec.dtype, device=device) for _ in range(spec.layers)]
        self.v = [torch.empty(shape, dtype=spec.dtype, device=device) for _ in range(spec.layers)]
        self.refs = np.zeros(0, np.int64)
        self.sealed = np.zeros(0, bool)
        self._free: list[int] = []
        self._dropped: deque[np.ndarray] = deque()
        self._buffers: dict[tuple, Tensor] = {}
        if pages:
            self._grow(pages)

    def _grow(self, capacity: int) -> None:
        old = len(self.refs)
        if self.max_pages is not None and capacity > self.max_pages:
            capacity = self.max_pages
        for store in (self.k, self.v):
            for layer, tensor in enumerate(store):
                # NaN: a page that is read before it is written shows at once
                # (a layer may have grown already, if the last attempt ran out of memory)
                more = max(0, capacity - len(tensor))
                fresh = torch.full((more, *tensor.shape[1:]), float("nan"),
                                   dtype=tensor.dtype, device=self.device)
                store[layer] = torch.cat([tensor, fresh])
        self.refs = np.concatenate([self.refs, np.zeros(capacity - old, np.int64)])
        self.sealed = np.concatenate([self.sealed, np.zeros(capacity - old, bool)])
        self._free.extend(range(capacity - 1, old - 1, -1))

    def alloc(self, n: int) -> np.ndarray:
        """``n`` unwritten pages with one reference each."""
        self._settle()
        if len(self._free) < n:
            need = len(self.refs) + n - len(self._free)
            if self.max_pages is not None and need > self.max_pages:
                raise MemoryBudgetError(
                    "page pool is full", given=f"{need} pages needed",
                    expected=f"at most {self.max_pages} ({self.spec.nbytes} bytes each)",
                    fix="use fewer slots, release snapshots, or raise max_pages",
                )
            self._grow(max(need, 2 * len(self.refs), 64))
        ids = np.array([self._free.pop() for _ in range(n)], np.int64)
        self.refs[ids] = 1
        self.sealed[ids] = False
        return ids

    def incref(self, ids: np.ndarray) -> None:
        """One more reference per occurrence; entries below 0 are padding."""
        ids = ids[ids >= 0]
        self._need_held(ids, "page used after its release")
        np.add.at(self.refs, ids, 1)

    def decref(self, ids: np.ndarray) -> None:
        """One reference less per occurrence; pages without any go back to the pool."""
        ids, times = np.unique(ids[ids >= 0], return_counts=True)
        left = self.refs[ids] - times
        if (left < 0).any():  # nothing has changed yet
            raise TransactionError(
                "page released twice", given=f"pages {ids[left < 0][:4].tolist()}",
                expected="a reference for every release", fix="report this with the call sequence",
            )
        self.refs[ids] = left
        self._free.extend(ids[left == 0].tolist())

    def drop(self, ids: np.ndarray) -> None:
        """``decref`` for finalizers: these may run in the middle of any other call of the pool."""
        self._dropped.append(ids)

    def _settle(self) -> None:
        while self._dropped:
            self.decref(self._dropped.popleft())

    def _need_held(self, ids: np.ndarray, what: str) -> None:
        """Raise unless every one of these pages has a reference."""
        lost = ids[self.refs[ids] < 1]
        if len(lost):
            raise TransactionError(what, given=f"pages {lost[:4].tolist()}",
                                   expected="pages that somebody holds",
                                   fix="report this with the call sequence")

    def write(self, ids: np.ndarray, layer: int, k_BTNE: Tensor, v_BTNE: Tensor) -> None:
        """Write one layer of the pages ``ids`` (row-major over slots and frames); once only."""
        self._need_held(ids, "page written after its release")
        if self.sealed[ids].any():
            raise TransactionError(
                "page written twice", given=f"pages {ids[:4].tolist()}",
                expected="pages that are still open", fix="allocate new pages for new frames",
            )
        where = torch.from_numpy(ids).to(self.device)
        shape = (len(ids), *self.k[layer].shape[1:])
        self.k[layer][where] = k_BTNE.reshape(shape)
        self.v[layer][where] = v_BTNE.reshape(shape)

    def seal(self, ids: np.ndarray) -> None:
        """Make pages immutable."""
        self.sealed[ids] = True

    def gather(self, store: Tensor, pages_BP: Tensor, own_BTNE: Tensor,
               buffer: tuple | None = None) -> Tensor:
        """One layer's keys or values of a table, then a block's own: (B, P * tokens + T, N, E).

        Padding must point at a real page. ``buffer``: write into the pool's scratch buffer of this
        name, valid until the next gather into it; saves allocating the whole context every step.
        """
        (b, p), spec = pages_BP.shape, self.spec
        if not len(store):  # nothing but padding, and no page yet that could stand in for it
            store = store.new_zeros((1, *store.shape[1:]))
        rows = p * spec.tokens + own_BTNE.shape[1]
        shape = (b, rows, spec.heads, spec.head_dim)
        if buffer is None or torch.is_grad_enabled():
            pages = store.index_select(0, pages_BP.flatten())
            return torch.cat([pages.view(b, -1, *shape[2:]), own_BTNE], 1)
        old = self._scratch((*buffer, "pages"), (b * p, *store.shape[1:]))
        torch.index_select(store, 0, pages_BP.flatten(), out=old)
        out = self._scratch(buffer, shape)
        return torch.cat([old.view(b, -1, *shape[2:]), own_BTNE], 1, out=out)

    def _scratch(self, name: tuple, shape: tuple[int, ...]) -> Tensor:
        tensor = self._buffers.get(name)
        if tensor is None or tensor.shape != shape:
            tensor = torch.empty(shape, dtype=self.spec.dtype, device=self.device)
            self._buffers[name] = tensor
        return tensor

    def stats(self) -> dict[str, int]:
        """Pages in use, free pages, capacity and bytes."""
        self._settle()
        free = len(self._free)
        return {"pages_used": len(self.refs) - free, "pages_free": free,
                "capacity": len(self.refs), "bytes": len(self.refs) * self.spec.nbytes}


class Policy(Protocol):
    """Which pages a new block sees. Pure data in, pure data out; no torch."""

    def bound(self) -> int | None:
        """Most pages of one table after a commit, None if there is no bound."""

    def select(self, frames_BP: np.ndarray, new: int) -> np.ndarray:
        """Bool (B, P): which pages of the tables a block of ``new`` frames sees and keeps."""


@dataclass(frozen=True, slots=True)
class Full:
    """Every page is seen and kept."""

    def bound(self) -> int | None:
        return None

    def select(self, frames_BP: np.ndarray, new: int) -> np.ndarray:
        return frames_BP >= 0


@dataclass(frozen=True, slots=True)
class SinkWindow:
    """The first ``sink`` frames and the most recent ones, ``window`` in all, new block included."""

    window: int
    sink: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.sink < self.window:
            raise ConfigError(
                "impossible window", given=f"window {self.window}, sink {self.sink}",
                expected="window >= 1 and 0 <= sink < window", fix="enlarge the window",
            )

    def bound(self) -> int | None:
        return self.window

    def select(self, frames_BP: np.ndarray, new: int) -> np.ndarray:
        if new > self.window - self.sink:
            raise ConfigError(
                "block does not fit the window", given=f"{new} new frames",
                expected=f"at most {self.window - self.sink}", fix="enlarge the window",
            )
        valid = frames_BP >= 0
        drop = np.maximum(valid.sum(1) + new - self.window, 0)  # per slot
        rank = np.cumsum(valid, axis=1) - 1  # position among the slot's pages
        evict = (rank >= self.sink) & (rank < self.sink + drop[:, None])
        return valid & ~evict


@dataclass(frozen=True, slots=True)
class Tables:
    """Page tables of a batch of slots, oldest first, padded at the end with -1.

    ``pages_BP``: page ids; ``frames_BP``: the absolute frame index each page was written at.
    """

    pages_BP: np.ndarray
    frames_BP: np.ndarray

    @classmethod
    def empty(cls, slots: int) -> "Tables":
        """Tables without pages."""
        none = np.zeros((slots, 0), np.int64)
        return cls(none, none)

    def rows(self, index: np.ndarray) -> "Tables":
        """Tables of some slots (repeats allowed)."""
        return Tables(self.pages_BP[index], self.frames_BP[index])

    def keep(self, keep_BP: np.ndarray) -> "Tables":
        """Tables with only these pages, packed to the left."""
        order = np.argsort(~keep_BP, axis=1, kind="stable")
        width = int(keep_BP.sum(1).max(initial=0))
        kept = np.take_along_axis(keep_BP, order, 1)[:, :width]
        return Tables(*(np.where(kept, np.take_along_axis(x, order, 1)[:, :width], -1)
                        for x in (self.pages_BP, self.frames_BP)))

    def append(self, pages_BF: np.ndarray, frames_BF: np.ndarray) -> "Tables":
        """Tables with new pages after the last; -1 entries add nothing."""
        both = Tables(np.concatenate([self.pages_BP, pages_BF], 1),
                      np.concatenate([self.frames_BP, frames_BF], 1))
        return both.keep(both.pages_BP >= 0)

    @staticmethod
    def join(parts: list["Tables"]) -> "Tables":
        """Tables of several batches, one after the other."""
        width = max(p.pages_BP.shape[1] for p in parts)

        def pad(x: np.ndarray) -> np.ndarray:
            return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-1)

        return Tables(np.concatenate([pad(p.pages_BP) for p in parts]),
                      np.concatenate([pad(p.frames_BP) for p in parts]))


class PagedAttend:
    """An ``attend`` for the DiT: a block's frames see chosen pages and chosen frames of the block.

    Args:
        pool: where the pages lie.
        tables: the pages that some frame of the block sees.
        sees_BQK: bool (B, Q, P + Q): which page columns, then which frames of the block itself,
            each frame of the block sees.
        columns: pad the page columns to this many, so that shapes (and bits) do not depend on how
            full the tables are.
        write: page ids (B, Q) to write the block's own keys and values to; -1 = do not keep.
        move_BP: frames by which to turn each page's keys (None: nowhere).
        reuse: keep what was gathered, for ``again``.
        within_BTT: bool, which tokens of a frame see which tokens of a frame they see (None: all).
    """

    def __init__(self, pool: PagePool, tables: Tables, sees_BQK: np.ndarray,
                 columns: int | None = None, write: np.ndarray | None = None,
                 move_BP: np.ndarray | None = None, reuse: bool = False,
                 within_BTT: Tensor | None = None) -> None:
        b, p = tables.pages_BP.shape
        extra = max(0, (columns or 0) - p)
        pages = np.pad(tables.pages_BP, ((0, 0), (0, extra)), constant_values=-1)
        sees = np.concatenate(
            [sees_BQK[:, :, :p] & (tables.pages_BP >= 0)[:, None],
             np.zeros((b, sees_BQK.shape[1], extra), bool), sees_BQK[:, :, p:]], 2)
        self.pool, self.tokens, self.write = pool, pool.spec.tokens, write
        empty = pages < 0
        self.pages = torch.from_numpy(np.where(empty, 0, pages)).to(pool.device)
        self.hole = None
        if empty.any():  # whatever lies in a padding column must not turn into NaN * 0
            hole = torch.from_numpy(empty.repeat(self.tokens, 1)).to(pool.device)
            self.hole = hole[:, :, None, None]
        self.mask = self._token_mask(sees)
        if within_BTT is not None:
            among = within_BTT.to(pool.device).repeat(1, sees.shape[1], sees.shape[2])
            self.mask.masked_fill_(~among[:, None], -torch.inf)
        self.reuse = reuse
        self.turn = None if move_BP is None else self._turn(np.pad(move_BP, ((0, 0), (0, extra))))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def _token_mask(self, sees_BQK: np.ndarray) -> Tensor:
        """Additive mask (B, 1, Q * tokens, K * tokens): 0 or -inf."""
        mask = torch.from_numpy(np.where(sees_BQK, 0.0, -np.inf)).to(self.pool.spec.dtype)
        mask = mask.repeat_interleave(self.tokens, 1).repeat_interleave(self.tokens, 2)
        return mask[:, None].to(self.pool.device)

    def _turn(self, move_BP: np.ndarray) -> tuple[Tensor, Tensor]:
        spec = self.pool.spec
        pairs = axis_pairs(spec.head_dim)
        frequency = torch.cat([axis_frequencies(pairs[0]), torch.zeros(pairs[1] + pairs[2])])
        angle = torch.from_numpy(move_BP).double()[..., None] * frequency
        angle = angle.repeat_interleave(spec.tokens, 1)
        angle = angle.to(self.pool.device)
        return cos_sin(torch.polar(torch.ones_like(angle), angle), spec.dtype)

    def __call__(self, layer: int, q_BTNE: Tensor, k_BTNE: Tensor, v_BTNE: Tensor) -> Tensor:
        if self.write is not None:
            self._write(layer, k_BTNE, v_BTNE)
        if self.pages.shape[1]:
            k_BTNE = self._with_context(self.pool.k[layer], k_BTNE, ("k", layer), self.turn)
            v_BTNE = self._with_context(self.pool.v[layer], v_BTNE, ("v", layer), None)
        if self.reuse:
            self.keys.append(k_BTNE)
            self.values.append(v_BTNE)
        return attention(q_BTNE, k_BTNE, v_BTNE, self.mask)

    def _with_context(self, store: Tensor, own_BTNE: Tensor, name: tuple,
                      turn: tuple[Tensor, Tensor] | None) -> Tensor:
        # only keys and values that later passes reuse need a buffer per layer
        buffer = name if self.reuse else None
        whole = self.pool.gather(store, self.pages, own_BTNE, buffer)
        old = whole[:, :self.pages.shape[1] * self.tokens]
        if self.hole is not None:
            old.masked_fill_(self.hole, 0)
        if turn is not None:
            old.copy_(rotate(old, turn))
        return whole

    def _write(self, layer: int, k_BTNE: Tensor, v_BTNE: Tensor) -> None:
        assert self.write is not None
        frames = self.write.shape[1]
        ids, keep = self.write.ravel(), self.write.ravel() >= 0
        shape = (-1, self.tokens, *k_BTNE.shape[2:])
        k = k_BTNE[:, :frames * self.tokens].reshape(shape)
        v = v_BTNE[:, :frames * self.tokens].reshape(shape)
        if not keep.all():
            rows = torch.from_numpy(np.flatnonzero(keep)).to(k.device)
            k, v = k[rows], v[rows]
        self.pool.write(ids[keep], layer, k, v)

    def again(self, frames: int) -> "SameContext":
        """An ``attend`` for further passes over the last ``frames`` frames of the block only."""
        return SameContext(self, frames * self.tokens)


class SameContext:
    """Later passes of one step: the gathered context is reused, the block's own keys replaced."""

    def __init__(self, first: PagedAttend, tokens: int) -> None:
        self.keys, self.values, self.tokens = first.keys, first.values, tokens
        self.mask = first.mask[:, :, -tokens:].contiguous()

    def __call__(self, layer: int, q_BTNE: Tensor, k_BTNE: Tensor, v_BTNE: Tensor) -> Tensor:
        k, v = self.keys[layer], self.values[layer]
        k[:, -self.tokens:], v[:, -self.tokens:] = k_BTNE, v_BTNE
        return attention(q_BTNE, k, v, self.mask)
