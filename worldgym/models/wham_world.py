"""WHAM as a world of the engine: a state is ids, and pages of keys while the window grows.

Shapes: B slot, G slot of one group, P page, F frame of the history, A action tokens, I image
tokens, S = I + A, L layer, N heads, E head width.

Positions are learned and absolute, so keys and values are good only while a window grows from its
first token. A page holds what one step computes: the last image token and the action of frame f - 1
and all but the last image token of frame f, S tokens in all; the first page of a window begins with
``tail`` = A + 1 empty places. Once a window is full the next step drops its oldest frames and
computes it anew, so no pages are kept for it and the state is a few hundred integers.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldgym import checkpoint
from worldgym.engine import World
from worldgym.errors import ConfigError, DTypeError, ShapeError
from worldgym.memory import PagePool, PageSpec, Tables
from worldgym.models.gpt import StaticCache
from worldgym.models.sampling import Sampling
from worldgym.models.wham import Wham
from worldgym.models.wham_decode import (
    Group,
    Watch,
    actions,
    diagonal,
    prefill,
    raster,
    sampler,
    waves,
)
from worldgym.noise import PASSES, uniform
from worldgym.spec import Licence, WorldSpec
from worldgym.state import Starts, WorldState

LICENCE = Licence(name="Microsoft Research License (research use)", may_ship_weights=False,
                  may_train_on_outputs=False)


class WhamWorld(World):
    """A WHAM model for a batch of slots; every option is off by default, and then it is exact.

    One step attaches the action to the current frame, drops the oldest frames of a full window
    and generates the next frame's ids. ``latents`` are ids int64 (1, h, w).

    Args:
        model: what ``wham_checkpoint.load`` gives.
        sampling: how tokens are drawn.
        context_length: frames of the window if fewer than the model's; a step sees
            ``min(context_length, seq_len - 1)`` frames with their actions.
        slide: frames dropped when the window is full; above 1 the window is computed anew only
            every ``slide`` steps and holds between ``window + 1 - slide`` and ``window`` frames.
        diagonal: lead of diagonal decoding in tokens (see ``wham_decode.waves``); None = raster
            order, exact.
        propose: also sample the recorded players' next action in every step, from the same cache;
            ``proposal`` then costs nothing.
        outcome: reward and end, as in ``World``.
    """

    latent_dtype = torch.int64

    def __init__(self, model: Wham, *, sampling: Sampling | None = None,
                 context_length: int | None = None, slide: int = 1, diagonal: int | None = None,
                 propose: bool = False, name: str = "wham", fps: float = 10.0,
                 licence: Licence = LICENCE, fingerprint: str = "", outcome=None,
                 max_pages: int | None = None) -> None:
        self.model, self.outcome = model, outcome
        self.tail = model.actions.count + 1  # tokens of a page that belong to the frame before
        self.codec = model.tokenizer  # type: ignore[assignment]  # encode and decode, as a Codec
        self.device = model.gpt.device
        self.sampling = sampling or Sampling()
        self.temperature = self.sampling.temperature
        most, cfg = model.cfg.seq_len, model.cfg.gpt
        length = most if context_length is None else context_length
        if not 1 <= length <= most:
            raise ConfigError("impossible context length", given=context_length,
                              expected=f"1 to {most}", fix="leave it out for the whole window")
        self.window = min(length, most - 1)
        if not 1 <= slide <= self.window:
            raise ConfigError("impossible slide", given=slide, expected=f"1 to {self.window}",
                              fix="use 1 for the exact window")
        if diagonal is not None:
            waves(*model.tokenizer.grid_hw, diagonal)
            if propose:
                raise ConfigError("diagonal decoding cannot propose actions", given="both",
                                  expected="one of them", fix="call World.proposal instead")
        self.watch: Watch | None = None  # told the final states of every token, while it is set
        self.slide, self.lead, self.propose = slide, diagonal, propose
        self.spec = WorldSpec(
            name=name, frame_hw=model.tokenizer.frame_hw,
            latent_chw=(1, *model.tokenizer.grid_hw), action=model.cfg.action, fps=fps,
            context_frames=self.window, licence=licence)
        self.history = self.window + 1
        # the action taken on each frame of the history; -1 where it is not known yet
        self.extra = {"taken_BFA": ((self.history, model.actions.count), torch.int64)}
        self.table_rows = 1
        options = f"window {self.window}, slide {slide}, diagonal {diagonal}"
        self.weights = fingerprint or checkpoint.fingerprint(model)  # equal: ids mean the same
        self.fingerprint = f"{self.weights} {options}"
        self.pool = PagePool(
            PageSpec(layers=cfg.n_layer, heads=cfg.n_head, head_dim=cfg.n_embd // cfg.n_head,
                     tokens=model.step_tokens, dtype=next(model.gpt.parameters()).dtype),
            self.device, max_pages=max_pages)

    # -- what the engine asks for --------------------------------------------------------------

    def features(self, actions: np.ndarray, null: np.ndarray | None = None) -> Tensor:
        """Local action ids; where no action is known, nothing is pressed."""
        told = self.model.actions
        ids = told.ids(actions)
        if null is not None:
            ids = np.where(null[:, None], told.neutral, ids)
        return torch.from_numpy(ids).to(self.device)

    def _check_latents(self, latents: Tensor) -> None:
        if latents.dtype != torch.int64:
            raise DTypeError("start ids have the wrong dtype", given=latents.dtype,
                             expected="int64", fix="encode start frames with World.encode")
        if bool(((latents < 0) | (latents >= self.model.codes)).any()):
            raise ShapeError("start ids outside the codebook", given="ids out of range",
                             expected=f"0 to {self.model.codes - 1}",
                             fix="encode start frames with this world's tokeniser")

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Frames uint8 (B, H, W, 3) of ids, which may be given as floats."""
        return super().decode(latents_BChw.long())

    @property
    def pending_shape(self) -> tuple[int, ...]:
        return (self.model.actions.count,)

    def _remember(self, latents_BKChw: Tensor, features_BKA: Tensor, length_B: np.ndarray,
                  starts: Starts, extra: dict[str, Tensor]) -> Tables:
        return Tables.empty(len(length_B))  # the first step computes the window

    def _start_extra(self, starts: Starts, features_BKA: Tensor, rows_B1: np.ndarray,
                     reach_BK: np.ndarray) -> dict[str, Tensor]:
        led = features_BKA[:, 1:]  # the action that led to a frame was taken on the one before
        before = self.history - features_BKA.shape[1]
        return {"taken_BFA": F.pad(led, (0, 0, before, 1), value=-1)}

    @torch.no_grad()
    def _generate(self, state: WorldState,
                  action_BA: Tensor) -> tuple[Tensor, dict[str, Tensor], Tables]:
        model, keys, taken = self.model, state.keys_B4, state.extra["taken_BFA"].clone()
        taken[:, -1] = action_BA
        pairs = self._pairs(state)
        order, groups = self._groups(state, pairs, taken, model.image_tokens - 1 + (
            self.tail if self.propose else 0))
        keys = keys[order]
        u = uniform(keys, PASSES["image"], model.image_tokens, self.device)
        choose, act = sampler(self.sampling, u), None
        if self.propose:
            act = self._actor(keys, 1)
        x = prefill(model, groups)
        if self.lead is None:
            ids, proposed = raster(model, groups, x, choose, act, self.watch)
        else:
            guess = state.latents_BCHW.flatten(1)[torch.from_numpy(order).to(self.device)]
            ids, proposed = diagonal(model, groups, x, choose, self.lead, guess), None
        back = torch.from_numpy(np.argsort(order)).to(self.device)
        tables = self._keep(state, order, groups, pairs)
        if proposed is None:
            proposed = ids.new_full((len(ids), self.tail - 1), -1)
        extra = {"taken_BFA": torch.cat([taken[:, 1:], proposed[back][:, None]], 1)}
        return ids[back].view(-1, 1, *self.spec.latent_chw), extra, tables

    def _actor(self, keys_B4: np.ndarray, ahead: int):
        """Draws actions for the frame ``ahead`` steps on."""
        keys = keys_B4 + np.array([0, 0, ahead, 0])
        return sampler(self.sampling, uniform(keys, PASSES["action"], self.tail - 1, self.device))

    def _frames(self, state: WorldState) -> np.ndarray:
        """Frames (B,) of every slot's window, the current one included."""
        pages = (state.tables.pages_BP >= 0).sum(1)
        return np.where(pages > 0, pages, state.lengths_B)

    def _pairs(self, state: WorldState) -> np.ndarray:
        """Complete (image, action) pairs (B,) that the next frame is conditioned on."""
        frames = self._frames(state)
        return np.where(frames > self.window, self.window + 1 - self.slide, frames)

    def _groups(self, state: WorldState, pairs: np.ndarray, taken_BFA: Tensor,
                room: int) -> tuple[np.ndarray, list[Group]]:
        """Slots sorted by window length; ``taken_BFA``: actions of complete pairs, newest last."""
        pages = (state.tables.pages_BP >= 0).sum(1)
        held = np.where(pages == pairs, pages, 0)
        order = np.lexsort((held, pairs))
        groups = []
        for rows in _runs(pairs[order] * 2 + (held[order] > 0)):
            slots = order[rows]
            count, paged = int(pairs[slots[0]]), int(held[slots[0]])
            where = torch.from_numpy(slots).to(self.device)
            images = state.history_BKChw[where, -count:].flatten(2)
            ids = self.model.sequence(images, taken_BFA[where, -count:])
            groups.append(self._group(rows, ids, state.tables.pages_BP[slots, :paged], room))
        return order, groups

    def _group(self, rows: slice, ids_GT: Tensor, pages_GP: np.ndarray, room: int) -> Group:
        cache = StaticCache(self.model.cfg.gpt, len(ids_GT), ids_GT.shape[1] + room,
                            self.model.gpt.network().wpe)
        known = 0
        if pages_GP.shape[1]:
            known = pages_GP.shape[1] * self.pool.spec.tokens - self.tail
            flat = torch.from_numpy(pages_GP.ravel()).to(self.device)
            for layer in range(self.pool.spec.layers):
                for store, out in ((self.pool.k, cache.k), (self.pool.v, cache.v)):
                    read = store[layer].index_select(0, flat).view(len(ids_GT), -1,
                                                                   *store[layer].shape[2:])
                    out[layer][:, :known] = read[:, self.tail:]
        return Group(rows, ids_GT, cache, known)

    def _keep(self, state: WorldState, order: np.ndarray, groups: list[Group],
              pairs: np.ndarray) -> Tables:
        """Tables after a step: grown where the next step extends the window, else empty."""
        if int(pairs.min()) >= self.window:
            return Tables.empty(state.num_slots)
        s, width = self.pool.spec.tokens, int(pairs.max()) + 1
        pages = np.full((state.num_slots, width), -1, np.int64)
        fresh: list[np.ndarray] = []
        try:
            for group in groups:
                slots = order[group.rows]
                count = int(pairs[slots[0]]) + 1
                if count > self.window:
                    continue
                old = (group.known + self.tail) // s if group.known else 0
                ids = self.pool.alloc(len(slots) * (count - old))
                fresh.append(ids)
                for layer in range(self.pool.spec.layers):
                    k, v = (self._paged(store[layer], old, count)
                            for store in (group.cache.k, group.cache.v))
                    self.pool.write(ids, layer, k, v)
                self.pool.seal(ids)
                pages[slots, :old] = state.tables.pages_BP[slots, :old]
                pages[slots, old:count] = ids.reshape(len(slots), -1)
        except BaseException:
            for ids in fresh:
                self.pool.decref(ids)
            raise
        real = pages >= 0
        first = state.index_B[:, None] + 2 - real.sum(1)[:, None]  # the new frame is the last
        frames = np.where(real, first + np.arange(width), -1)
        return Tables(pages, frames).keep(real)

    def _paged(self, store: Tensor, old: int, count: int) -> Tensor:
        """Keys or values of pages ``old`` to ``count`` - 1, (G * pages, S, N, E)."""
        s = self.pool.spec.tokens
        rows = store[:, max(0, old * s - self.tail):count * s - self.tail]
        if not old:
            rows = F.pad(rows, (0, 0, 0, 0, self.tail, 0))
        return rows.unflatten(1, (count - old, s)).flatten(0, 1)

    # -- the recorded players' next action -------------------------------------------------------

    @torch.no_grad()
    def proposal(self, state: WorldState, watch: Watch | None = None) -> np.ndarray:
        """Actions (B, *shape) of the behaviour policy, next; the state stays as it is.

        The same draw however often it is asked for, and whether or not the world proposes.
        """
        state.check(self.fingerprint, self.pool)
        ids = state.extra["taken_BFA"][:, -1]
        if watch is not None or bool((ids < 0).any()):
            model, frames = self.model, self._frames(state)
            order, groups = self._groups(state, frames, state.extra["taken_BFA"].clamp_min(0),
                                         self.tail)
            for group in groups:  # the sequence ends with the current image
                group.ids_GT = group.ids_GT[:, :1 - self.tail]
            ids = actions(model, groups, self._actor(state.keys_B4[order], 0), watch)
            ids = ids[torch.from_numpy(np.argsort(order)).to(self.device)]
        return self.model.actions.values(ids.cpu().numpy())


def _runs(values: np.ndarray) -> Iterator[slice]:
    """Slices of equal neighbours."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield slice(start, stop)
