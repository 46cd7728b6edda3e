"""Generating one step of tokens from a static cache (specs/wham.md sections 5, 6 and 11).

Shapes: B slot, G slot of one group, T token, I image token, A action token, D width, V vocabulary,
Q query. Slots whose windows have equal lengths form a group: attention runs group by group on
exactly the tokens there are, everything else over all slots at once, so a slot gets the bits it
gets alone and nothing is padded to the longest window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldgym.attention import attention
from worldgym.errors import ConfigError
from worldgym.models.gpt import Network, StaticCache, at_least
from worldgym.models.sampling import Sampling, distribution, draw
from worldgym.models.wan import MIN_ROWS
from worldgym.models.wham import Wham

# choose(logits_BMV, low, places) -> global ids (B, M) of M tokens of the frame or the action; the
# logits are those of ids low, low + 1, ...
Choose = Callable[[Tensor, int, slice | Tensor], Tensor]
# watch(states_BD): final states from which each token in turn is predicted
Watch = Callable[[Tensor], None]


@dataclass
class Group:
    """Slots with windows of one length, next to each other in the batch.

    ``rows``: where they are; ``ids_GT``: all tokens that are known; ``known``: how many of them
    have their keys and values in ``cache`` already.
    """

    rows: slice
    ids_GT: Tensor
    cache: StaticCache
    known: int = 0

    @property
    def length(self) -> int:
        """Known tokens."""
        return self.ids_GT.shape[1]


def sampler(how: Sampling, uniform_BM: Tensor) -> Choose:
    """Draw each token at the uniform number of its slot and position."""
    def choose(logits_BMV: Tensor, low: int, at: slice | Tensor) -> Tensor:
        ids = draw(distribution(logits_BMV, how), uniform_BM[:, at])
        return ids + low if low else ids

    return choose


@torch.inference_mode()
def prefill(model: Wham, groups: Sequence[Group]) -> Tensor:
    """Final states (B, D) of every slot's last known token; fills the caches."""
    states, network = [], model.gpt.network()
    for group in groups:
        new = group.ids_GT[:, group.known:]
        positions = torch.arange(group.known, group.length, device=new.device)
        rows = len(new)
        if new.numel() < MIN_ROWS and new.device.type == "cpu":  # bits, see wan.py
            new = new.expand(MIN_ROWS, -1) if rows == 1 else torch.cat([new] * MIN_ROWS)
        attend = group.cache.extend(group.known, new.shape[1])
        if len(new) > rows:
            attend = _first(rows, attend)
        last = min(new.shape[1], MIN_ROWS)
        states.append(network.hidden(new, positions, attend, last)[:rows, -1])
    return torch.cat(states)


def _first(rows: int, attend):
    """An ``attend`` for the first rows only; the others are there to fill a product."""
    def some(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(layer, q[:rows], k[:rows], v[:rows])
        return F.pad(out, (0, 0, 0, 0, 0, 0, 0, len(q) - rows))

    return some


class _Next:
    """Feeds one token per slot, at its own position of its own cache."""

    def __init__(self, model: Wham, groups: Sequence[Group], steps: int) -> None:
        self.network, self.groups, self.offset = model.gpt.network(), groups, 0
        self.count = groups[-1].rows.stop
        self.rows = at_least(self.count, model.gpt.device)
        lengths = [g.length for g in groups for _ in range(g.rows.start, g.rows.stop)]
        lengths += [0] * (self.rows - self.count)
        base = torch.tensor(lengths, device=model.gpt.device)
        places = torch.arange(steps - 1, device=base.device)[:, None] + base
        self.places = F.embedding(places, self.network.wpe).unbind()
        self.buffer = base.new_zeros(self.rows)
        self.ids_B1 = self.buffer[:self.count, None]
        # what slots see, side by side; rows that only fill a product stay 0
        self.seen = self.network.wpe.new_zeros(self.rows, self.network.wpe.shape[1])
        self.parts = [(g, g.length, self.seen[g.rows]) for g in groups]
        self.alone = len(groups) == 1 and self.rows == self.count

    def feed(self, ids_B1: Tensor) -> Tensor:
        """Final states (rows, D) after these ids."""
        self.ids_B1.copy_(ids_B1)
        x = F.embedding(self.buffer, self.network.wte) + self.places[self.offset]
        for number, layer in enumerate(self.network.layers):
            asked = layer.asked(x)
            if self.alone:
                group, length, _ = self.parts[0]
                seen = group.cache.append(number, length + self.offset, asked)
            else:
                seen = self.seen
                for group, length, part in self.parts:
                    at = length + self.offset
                    part.copy_(group.cache.append(number, at, asked[group.rows]))
            x = layer.after(x, seen)
        self.offset += 1
        return x


@torch.inference_mode()
def raster(model: Wham, groups: Sequence[Group], state_BD: Tensor, choose: Choose,
           act: Choose | None = None, watch: Watch | None = None) -> tuple[Tensor, Tensor | None]:
    """Image ids (B, I), one by one, and with ``act`` the action ids (B, A) that follow."""
    ranges = [model.image_range(i) for i in range(model.image_tokens)]
    if act is not None:
        ranges += [model.action_range(i) for i in range(model.step_tokens - model.image_tokens)]
    after = _Next(model, groups, len(ranges))
    made: list[Tensor] = []
    x = _fill(state_BD, after.rows)
    for index, (low, high) in enumerate(ranges):
        if index:
            x = after.feed(made[-1])
        if watch is not None:
            watch(x[:after.count])
        logits = after.network.logits(x, low, high + 1)[:after.count]
        image = index < model.image_tokens
        here = index if image else index - model.image_tokens
        pick = choose if image or act is None else act
        made.append(pick(logits[:, None], low, slice(here, here + 1)))
    ids = torch.cat(made, 1)
    images = ids[:, :model.image_tokens]
    return images, None if act is None else ids[:, model.image_tokens:] - model.codes


@torch.inference_mode()
def actions(model: Wham, groups: Sequence[Group], act: Choose,
            watch: Watch | None = None) -> Tensor:
    """Action ids (B, A) that follow sequences which end with an image."""
    count = model.step_tokens - model.image_tokens
    after = _Next(model, groups, count)
    made: list[Tensor] = []
    x = _fill(prefill(model, groups), after.rows)
    for index in range(count):
        if index:
            x = after.feed(made[-1])
        if watch is not None:
            watch(x[:after.count])
        low, high = model.action_range(index)
        logits = after.network.logits(x, low, high + 1)[:after.count]
        made.append(act(logits[:, None], low, slice(index, index + 1)))
    return torch.cat(made, 1) - model.codes


def _fill(x_BD: Tensor, rows: int) -> Tensor:
    return x_BD if len(x_BD) == rows else F.pad(x_BD, (0, 0, 0, rows - len(x_BD)))


def waves(height: int, width: int, lead: int) -> list[list[tuple[int, int]]]:
    """Which grid cells each pass of diagonal decoding makes: (row, column) lists.

    A row begins once the row above is ``lead`` tokens ahead; ``lead = width`` is raster order.
    """
    if not 1 <= lead <= width:
        raise ConfigError("impossible lead of diagonal decoding", given=lead,
                          expected=f"1 to {width}, the width of the token grid",
                          fix="use a smaller lead for speed, a larger one for quality")
    return [[(r, t - lead * r) for r in range(height) if 0 <= t - lead * r < width]
            for t in range(width + lead * (height - 1))]


@torch.inference_mode()
def diagonal(model: Wham, groups: Sequence[Group], state_BD: Tensor, choose: Choose, lead: int,
             guess_BI: Tensor) -> Tensor:
    """Image ids (B, I), several rows at once (DiagD, arXiv 2503.14070); approximate.

    A token that begins a row before the row above is complete follows the last token of that row
    in the frame before (``guess_BI``); its keys are replaced once the true token is known. Every
    token sees what is decoded so far and comes before it.
    """
    (height, width), device = model.tokenizer.grid_hw, state_BD.device
    network = model.gpt.network()
    count = groups[-1].rows.stop
    rows = at_least(count, device)
    ids = guess_BI.clone()
    written = torch.zeros(model.image_tokens, dtype=torch.bool)
    for group in groups:  # what is not written yet is masked, but 0 * NaN is NaN
        for layer in range(model.cfg.gpt.n_layer):
            for store in (group.cache.k[layer], group.cache.v[layer]):
                store[:, group.length:] = 0
    late: list[int] = []
    for number, wave in enumerate(waves(height, width, lead)):
        targets = [r * width + c for r, c in wave]
        at = torch.tensor(targets, device=device)
        if number == 0:
            x = _fill(state_BD, rows)[:, None]
        else:
            fed = torch.tensor([t - 1 for t in targets] + late)
            late = []
            written[fed] = True
            x = _feed(network, groups, rows, ids, fed, written)
        low, high = model.image_range(number)
        logits = network.logits(x[:, :len(targets)], low, high + 1)[:count]
        ids[:, at] = choose(logits, low, at)
        # a row's last token, if the next row has begun without it: its true keys are due
        late = [t for t in targets if (t + 1) % width == 0 and t + 1 < model.image_tokens
                and bool(written[t])]
    return ids


def _feed(network: Network, groups: Sequence[Group], rows: int, ids: Tensor, fed: Tensor,
          written: Tensor) -> Tensor:
    """Final states (rows, Q, D) after image tokens at these places of the frame."""
    device = ids.device
    sees = written[None] & (torch.arange(len(written))[None] <= fed[:, None])
    sees, place = sees.to(device), fed.to(device)
    base = [g.length for g in groups for _ in range(g.rows.start, g.rows.stop)]
    base += [0] * (rows - len(base))
    positions = torch.tensor(base, device=device)[:, None] + place
    masks = [torch.cat([sees.new_ones(len(fed), g.length), sees], 1) for g in groups]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for group, mask in zip(groups, masks, strict=True):
            r, end = group.rows, group.length + len(written)
            group.cache.put(layer, group.length + place, k[r], v[r])
            keys = group.cache.k[layer][:, :end], group.cache.v[layer][:, :end]
            out[r] = attention(q[r], *keys, mask[:, :keys[0].shape[1]])
        return out

    new = F.pad(ids[:, place], (0, 0, 0, rows - len(ids)))
    return network.hidden(new, positions, attend)


def surprise(model: Wham, ids_BT: Tensor, count: int) -> Tensor:
    """Nats (B, count) by which the exact model is surprised by the last image's ``count`` tokens.

    ``ids_BT`` ends with a whole image; the ranges of the positions are respected.
    """
    net = model.gpt.network()
    x = net.hidden(ids_BT, torch.arange(ids_BT.shape[1], device=ids_BT.device))
    logits = net.logits(x[:, -count - 1:-1], 0, model.codes)
    logits[:, 0, :model.image_range(0)[0]] = -torch.inf
    return -logits.log_softmax(-1).gather(-1, ids_BT[:, -count:, None])[..., 0]
