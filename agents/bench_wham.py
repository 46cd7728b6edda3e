"""``python -m worldgym.agents.bench_wham``: what WHAM's exact stepping and its options save.

Counted on meta tensors at the published 1.6B sizes (no weights needed), timed at a tiny size on
this machine. ``PublishedOrder`` keeps the published order of operations, for comparison only: two
prefills a frame, a cache that is built anew in every call and grows by copying, logits of the
whole vocabulary. Compared things are measured in turn, in processor time of one thread.
Shapes: B slots, T tokens, I image tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.agents import results
from worldgym.agents.bench import in_turn, rss, used_bytes
from worldgym.agents.results import Row
from worldgym.models import wham_actions
from worldgym.models.gpt import GPTConfig, StaticCache, causal
from worldgym.models.sampling import Sampling, distribution, draw
from worldgym.models.wham import SIZES, Wham, WhamConfig, tiny
from worldgym.models.wham_decode import Group, prefill, raster, surprise
from worldgym.models.wham_world import WhamWorld
from worldgym.state import Starts

NAME, STEPS = "wham-4kvocab-1.6b", 10
PUBLISHED_VIT = {"image_size_per_x_axis": 300, "image_size_per_y_axis": 180, "patch_size": 10,
                 "transf_dim": 1024, "embedding_dim": 32, "num_layers": 12, "head_size": 64,
                 "vocab_size": 16384}


def real(layers: int, image_tokens: int) -> Wham:
    """The published 1.6B model on the meta device, with fewer layers and tokens to generate."""
    _, heads, width = SIZES[NAME]
    cfg = GPTConfig(block_size=5560, vocab_size=16384 + wham_actions.VOCABULARY, n_layer=layers,
                    n_head=heads, n_embd=width)
    with torch.device("meta"):
        model = Wham(WhamConfig(gpt=cfg, seq_len=STEPS, tokenizer="vit",
                                tokenizer_spec=PUBLISHED_VIT, size_name=NAME)).eval()
    model.image_tokens = image_tokens
    return model


# -- the published order of operations, for comparison --------------------------------------------


class PublishedOrder:
    """One frame as the published code makes it: image call, then action call, each from scratch."""

    def __init__(self, model: Wham, how: Sampling) -> None:
        self.model, self.how = model, how

    def frame(self, ids_BT: Tensor, uniform_BM: Tensor) -> Tensor:
        """Image and action ids (B, I + 16) after complete pairs."""
        m = self.model
        ranges = [m.image_range(i) for i in range(m.image_tokens)]
        image = self._call(ids_BT, ranges, uniform_BM)
        ranges = [m.action_range(i) for i in range(wham_actions.COUNT)]
        action = self._call(torch.cat([ids_BT, image], 1), ranges, uniform_BM[:, m.image_tokens:])
        return torch.cat([image, action], 1)

    def _call(self, ids_BT: Tensor, ranges: list[tuple[int, int]], uniform_BM: Tensor) -> Tensor:
        cache: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer in cache:
                old = cache[layer]
                k, v = torch.cat([old[0], k], 1), torch.cat([old[1], v], 1)
            cache[layer] = (k, v)
            return causal(layer, q, k, v)

        net, made, new, start = self.model.gpt.network(), [], ids_BT, 0
        for index, limits in enumerate(ranges):
            end = start + new.shape[1]
            x = net.hidden(new, torch.arange(start, end, device=new.device), attend)
            logits = net.logits(x[:, -1])
            if logits.is_meta:  # only counted
                new = ids_BT[:, :1]
            else:
                chances = distribution(logits, self.how, limits)
                new = draw(chances, uniform_BM[:, index])[:, None]
            made.append(new)
            start = end
        return torch.cat(made, 1)


# -- counting at the real size --------------------------------------------------------------------


class _Watched(WhamWorld):
    """Notes (complete pairs, cached pages) of every step."""

    def _groups(self, *args: Any) -> Any:
        order, groups = super()._groups(*args)
        s = self.model.step_tokens
        self.log: list[tuple[int, int]] = getattr(self, "log", [])
        self.log += [(g.length // s, (g.known + self.tail) // s if g.known else 0) for g in groups]
        return order, groups


def windows(slide: int) -> list[tuple[int, int]]:
    """(pairs, cached pages) of the frames of one cycle in the steady state, from a real rollout."""
    model = tiny(torch.Generator().manual_seed(0), width=32, layers=1, seq_len=STEPS, hw=(4, 8))
    world = _Watched(model, slide=slide)
    state = begin(world, 1, 1)
    for _ in range(3 * STEPS + slide):
        state, _ = world.step(state, wham_actions.NEUTRAL[None])
    return world.log[-slide:]


def whole(cost: Callable[[Wham], int], make: Callable[[int, int], Wham] = real,
          layers: int = SIZES[NAME][0], image_tokens: int = 540) -> int:
    """A cost at the full size from counts at small ones; exact, for it is a polynomial.

    Every layer but the last costs the same, and the attention of a growing sequence is a square
    of the number of tokens that are generated.
    """
    places = (4, 8, 12)

    def deep(count: int) -> int:
        two, three = cost(make(2, count)), cost(make(3, count))
        return two + (layers - 2) * (three - two)

    total = Fraction(0)
    for x in places:
        others = [y for y in places if y != x]
        part = Fraction(deep(x))
        for y in others:
            part *= Fraction(image_tokens - y, x - y)
        total += part
    return int(total)


def frame_flops(model: Wham, pairs: int, pages: int) -> int:
    """Floating-point operations of a frame in our order, one slot."""
    from torch.utils.flop_counter import FlopCounterMode

    s = model.step_tokens
    ids = torch.zeros(1, pairs * s, dtype=torch.long, device=model.gpt.device)
    cache = StaticCache(model.cfg.gpt, 1, (pairs + 1) * s, model.gpt.network().wpe)
    groups = [Group(slice(0, 1), ids, cache, pages * s - model.actions.count - 1 if pages else 0)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        raster(model, groups, prefill(model, groups), lambda logits, low, at: ids[:, :1])
    return counter.get_total_flops()


def published_flops(model: Wham, pairs: int) -> int:
    """The same in the published order."""
    from torch.utils.flop_counter import FlopCounterMode

    order = PublishedOrder(model, Sampling())
    ids = torch.zeros(1, pairs * model.step_tokens, dtype=torch.long, device=model.gpt.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        order.frame(ids, ids)
    return counter.get_total_flops()


def counted(slide: int = 4) -> list[Row]:
    """Shares of the published path's work per frame at the 1.6B sizes."""
    flops = whole(lambda model: published_flops(model, STEPS - 1))
    s, what = 540 + wham_actions.COUNT, "real-config-1.6b"
    tokens = 2 * (STEPS - 1) * s + 540  # image call, then action call
    rows = [Row(what=what, metric="tflop_published", value=flops / 1e12, unit="TFLOP",
                note="one frame, full window, one slot, tokeniser left out; every multiplication "
                "and addition of products and of attention (causal halves not taken off)")]
    for name, step in (("exact", 1), ("chunked", slide)):
        at = windows(step)
        ours = [whole(lambda model, at=pair: frame_flops(model, *at))  # type: ignore[misc]
                for pair in at]
        tail = wham_actions.COUNT + 1
        filled = np.mean([(pairs - pages) * s + tail * (pages > 0) for pairs, pages in at])
        note = "steady state" if step == 1 else f"mean of a cycle of {step} frames, slide={step}"
        rows += [Row(what=what, metric=f"flops_share_{name}", value=float(np.mean(ours)) / flops,
                     unit="share", n=len(at), note=note),
                 Row(what=what, metric=f"prefill_token_share_{name}", value=float(filled) / tokens,
                     unit="share", n=len(at), note=f"{note}; {filled:.0f} of {tokens} tokens")]
    return rows


# -- timing at a tiny size ------------------------------------------------------------------------


def starts(world: WhamWorld, slots: int, frames: int, seed: int = 0) -> Starts:
    """Random starts."""
    rng, model = np.random.default_rng(seed), world.model
    ids = rng.integers(0, model.codes, (slots, frames, *world.spec.latent_chw))
    acted = rng.integers(0, np.array(wham_actions.SIZES), (slots, frames, wham_actions.COUNT))
    return Starts(torch.from_numpy(ids), acted, np.zeros((slots, frames), bool),
                  np.full(slots, frames))


def begin(world: WhamWorld, slots: int, frames: int) -> Any:
    """A state of random starts."""
    return world.begin(starts(world, slots, frames), list(range(slots)))


def timed(call: Callable[[], Any], repeat: int = 1) -> Callable[[], float]:
    """Processor seconds of one call."""
    def once() -> float:
        start = time.process_time()
        for _ in range(repeat):
            call()
        return (time.process_time() - start) / repeat

    return once


def stepping(world: WhamWorld, slots: int) -> Callable[[], Any]:
    """Steps of a full window from one state."""
    state, action = begin(world, slots, world.history), np.stack([wham_actions.NEUTRAL] * slots)

    def step() -> None:
        new, _ = world.step(state, action)
        new.release()

    return step


def speed(model: Wham, what: str, seconds: float) -> list[Row]:
    """Exact mode against the published order, and 16 slots against one."""
    world = WhamWorld(model)
    order, pairs = PublishedOrder(model, world.sampling), world.window
    ids = torch.randint(0, model.codes, (1, pairs * model.step_tokens),
                        generator=torch.Generator().manual_seed(0))
    u = torch.rand(1, model.step_tokens, generator=torch.Generator().manual_seed(1)).double()

    def published() -> None:
        with torch.no_grad():
            order.frame(ids, u)

    note = (f"{model.image_tokens} + {wham_actions.COUNT} tokens a step, window of {pairs}, width "
            f"{model.cfg.gpt.n_embd}, {model.cfg.gpt.n_head} heads, {model.cfg.gpt.n_layer} "
            "layers; full window, one slot; processor time, in turn, medians")
    slow, fast = in_turn(timed(published), timed(stepping(world, 1)), seconds)
    one, many = in_turn(timed(stepping(world, 1)), timed(stepping(world, 16)), seconds)
    ratio = 16 * float(np.median(one) / np.median(many))
    return [
        Row(what=what, metric="speedup_exact", value=float(np.median(slow) / np.median(fast)),
            n=len(slow), unit="ratio", note=note),
        Row(what=what, metric="step_ms", value=1e3 * float(np.median(fast)), n=len(fast),
            unit="ms", note=note),
        Row(what=what, metric="throughput_16_over_1", value=ratio, n=len(one), unit="ratio",
            note=note.replace("one slot", "frames per second of all slots"))]


def soak(model: Wham, frames: int = 500, slots: int = 2) -> list[Row]:
    """Memory and step time over a long episode, with the chunked slide (pages come and go)."""
    world = WhamWorld(model, slide=2)
    state, spent, warm = begin(world, slots, 1), [], (0, 0)
    action = np.stack([wham_actions.NEUTRAL] * slots)
    for t in range(frames):
        begun = time.process_time()
        state, chunk = world.step(state, action)
        chunk.frames()
        spent.append(time.process_time() - begun)
        if t == frames // 5:
            warm = (world.pool.stats()["capacity"], rss())
    grown = max(world.pool.stats()["capacity"] / max(warm[0], 1) - 1, rss() / warm[1] - 1, 0.0)
    late, early = np.median(spent[-100:]), np.median(spent[frames // 10:frames // 10 + 100])
    note = f"{frames} frames, {slots} slots, slide=2"
    return [Row(what="tiny", metric="memory_growth", value=grown, unit="share",
                note=f"{note}; from frame {frames // 5} on, larger of page pool and resident "
                f"memory; {used_bytes(world)} bytes of pages in use"),
            Row(what="tiny", metric="late_over_early", value=float(late / early), unit="ratio",
                note=f"{note}; median time of the last 100 frames over frames "
                f"{frames // 10} to {frames // 10 + 100}")]


def deviation(model: Wham, leads: tuple[int, ...], frames: int = 24) -> list[Row]:
    """What diagonal decoding costs: extra surprise of the exact model, and speed."""
    rows, width = [], model.tokenizer.grid_hw[1]
    exact = WhamWorld(model)
    states = begin(exact, frames, 2)
    action = np.stack([wham_actions.NEUTRAL] * frames)

    def told(world: WhamWorld) -> float:
        state = begin(world, frames, 2)
        new, _ = world.step(state, action)
        ids = torch.cat([model.sequence(states.history_BKChw[:, -2:].flatten(2),
                                        torch.cat([state.extra["taken_BFA"][:, -2:-1],
                                                   world.features(action)[:, None]], 1)),
                         new.latents_BCHW.flatten(1)], 1)
        return float(surprise(model, ids, model.image_tokens).mean())

    base = told(exact)
    plain = timed(stepping(exact, 1))
    for lead in leads:
        world = WhamWorld(model, diagonal=lead)
        slow, fast = in_turn(plain, timed(stepping(world, 1)), 0.0, least=7)
        note = f"lead of {lead} of {width} tokens; random weights, {frames} frames"
        rows += [Row(what=f"tiny-diagonal-{lead}", metric="extra_nats_per_token",
                     value=told(world) - base, n=frames, unit="nats",
                     note=f"{note}; raster order has {base:.4f}"),
                 Row(what=f"tiny-diagonal-{lead}", metric="speedup", n=len(slow), unit="ratio",
                     value=float(np.median(slow) / np.median(fast)), note=note)]
    return rows


def bench(out: Path | None = None, seconds: float = 5.0, count: bool = True) -> list[Row]:
    """Measure, print, and (with ``out``) write the results file."""
    torch.set_num_threads(1)
    model = tiny(torch.Generator().manual_seed(0))
    long = tiny(torch.Generator().manual_seed(0), width=128, seq_len=STEPS)
    rows = counted() if count else []
    # prefill is what exact mode saves, and what more slots cannot share; and slots share calls, not
    # the memory that is read: each figure of "tiny" is taken where it matters (a long window; a
    # small model), and both models' figures stand beside it
    small = tiny(torch.Generator().manual_seed(0), width=32, heads=1)
    near, far = speed(small, "tiny-window-3", seconds), speed(long, "tiny-window-9", seconds)
    rows += near + far
    rows += [replace(row, what="tiny") for row in (far[0], near[2])]
    rows += soak(model)
    rows += deviation(model, (1, 2, model.tokenizer.grid_hw[1]))
    for row in rows:
        print(f"{row.what:20} {row.metric:28} {row.value:>10.4g} {row.unit}", flush=True)
    if out is not None:
        print("written:", results.write(out, rows, extra={"threads": torch.get_num_threads()}))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--timed-only", action="store_true", help="leave the counted rows as is")
    given = parser.parse_args()
    bench(given.out, given.seconds, not given.timed_only)


if __name__ == "__main__":
    main()
