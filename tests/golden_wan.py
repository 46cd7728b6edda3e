"""Golden kinds of the Wan DiT: forwards, masks, schedules and cached rollouts.

Shapes: B slot, F frame, C channel, H W latent size, T tokens, N heads, E head width, S step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from golden import Check, Fixture, FixtureError
from torch import Tensor

from worldgym.checkpoint import load_into
from worldgym.memory import Full, PagePool, PageSpec, SinkWindow, Tables
from worldgym.models.wan import (
    WanConfig,
    WanDiT,
    block_ids,
    causal_frame_mask,
    masked,
    teacher_forcing_frame_mask,
)
from worldgym.rollout import Block, CausalStepper, few_step
from worldgym.schedule import FewStep, FlowTable, UniPC, x0_from_flow


def model_of(fixture: Fixture) -> WanDiT:
    """The fixture's network with its weights, loaded strictly."""
    with torch.device("meta"):
        model = WanDiT(WanConfig.from_dict(fixture.get("config")))
    return load_into(model, fixture.state_dict()).eval()


def swap(x: Tensor) -> Tensor:
    """[B,F,C,H,W] to [B,C,F,H,W] and back."""
    return x.transpose(1, 2)


def bidirectional(fixture: Fixture) -> Iterator[Check]:
    """One forward in which every token sees every token; x is [B,C,F,H,W], x0 [B,F,C,H,W]."""
    x, t = fixture["x"], fixture["t"]
    flow = model_of(fixture)(x, t, fixture["context"])
    yield Check("out", flow, fixture["out"])
    sigma = FlowTable(fixture.get("timestep_shift", "shift")).sigma(t)  # [B] or [B,F]
    yield Check("x0", x0_from_flow(swap(x), swap(flow), sigma), fixture["x0"])


def causal_train(fixture: Fixture) -> Iterator[Check]:
    """Full-sequence forwards under the training masks, timesteps per frame."""
    model, x, t, context = model_of(fixture), fixture["x"], fixture["t"], fixture["context"]
    frames, patch = x.shape[2], model.cfg.patch_size
    tokens = (x.shape[3] // patch[1]) * (x.shape[4] // patch[2])
    per_block, alone = (
        fixture.get("frames_per_block"),
        bool(fixture.meta.get("independent_first_frame")),
    )
    blocks = block_ids(frames, per_block, alone)

    def teacher_forcing() -> torch.Tensor:
        both, index = torch.cat([fixture["clean_x"], x], dim=2), torch.arange(frames)
        attend = masked(teacher_forcing_frame_mask(blocks), tokens)
        t_both = torch.cat([torch.zeros_like(t), t], dim=1)
        out = model(both, t_both, context, attend=attend, frame_index_BF=torch.cat([index, index]))
        return out[:, :, frames:]

    def causal(ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
        return model(x, t, context, attend=masked(causal_frame_mask(ids, window), tokens))

    outputs = {
        "out_block_causal": lambda: causal(blocks),
        "out_block_causal_local": lambda: causal(blocks, fixture.get("train_local_attn_frames")),
        "out_teacher_forcing": teacher_forcing,
        "out_frame_causal": lambda: causal(block_ids(frames, 1)),
    }
    held = [name for name in fixture.tensors if name.startswith("out")]
    if unknown := sorted(set(held) - set(outputs)):
        raise FixtureError(f"outputs without a rule: {unknown}")
    for name in outputs:
        if name in held:
            yield Check(name, outputs[name](), fixture[name])


def scheduler(fixture: Fixture) -> Iterator[Check]:
    """The shifted 1000-row table."""
    table = FlowTable(fixture.get("shift", "timestep_shift"))
    yield Check("sigmas", table.sigmas_R, fixture["sigmas"])
    yield Check("timesteps", table.timesteps_R, fixture["timesteps"])
    yield Check("training_weight", table.weights_R, fixture["training_weight"])


def unipc(fixture: Fixture) -> Iterator[Check]:
    """The solver on given flows."""
    solver = UniPC(fixture.get("steps"), shift=fixture.get("shift", "timestep_shift"))
    yield Check("sigmas", torch.tensor(solver.sigmas), fixture["sigmas"])
    yield Check("timesteps", torch.tensor(solver.timesteps), fixture["timesteps"])
    solve, flows = solver.begin(fixture["x0_sample"]), fixture["model_outputs"]
    yield Check("samples", torch.stack([solve.step(flow) for flow in flows]), fixture["samples"])


@dataclass
class Span:
    """A block of frames: where it starts, how many frames, and whether they are given."""

    start: int
    frames: int
    given: bool


def spans_of(fixture: Fixture, total: int) -> list[Span]:
    """Blocks of a rollout: as ``calls`` lists them, else cut by the block length."""
    initial = int(fixture.get("initial_frames"))
    if "calls" in fixture.meta:
        found = dict.fromkeys(
            (int(c["frame_start"]), int(c["frames"])) for c in fixture.get("calls")
        )
        return [Span(start, frames, start < initial) for start, frames in found]
    spans, per_block = [], int(fixture.get("frames_per_block"))
    first = 1 if fixture.get("independent_first_frame") else per_block
    while (start := sum(s.frames for s in spans)) < total:
        spans.append(Span(start, per_block if spans else first, start < initial))
    return spans


class Rollout(CausalStepper):
    """The engine's stepper with a memory of its own, that records every network call."""

    def __init__(self, model: WanDiT, fixture: Fixture, context_BLD: Tensor) -> None:
        cfg, noise = model.cfg, fixture["noise"]  # noise [B,F,C,H,W]
        tokens = (noise.shape[3] // cfg.patch_size[1]) * (noise.shape[4] // cfg.patch_size[2])
        spec = PageSpec(
            layers=cfg.num_layers, heads=cfg.num_heads, head_dim=cfg.head_dim, tokens=tokens
        )
        window, sink = int(fixture.get("local_attn_frames")), int(fixture.get("sink_frames"))
        policy = SinkWindow(window, sink) if window > 0 else Full()
        super().__init__(model, PagePool(spec, pages=noise.shape[0]), policy)
        self.slots = noise.shape[0]
        self.given = {"text_kv": model.text(context_BLD.expand(self.slots, -1, -1))}
        self.tables = Tables.empty(self.slots)
        self.calls: list[tuple[Tensor, float, int, Tensor]] = []  # input, t, first frame, flow

    def open(self, span: Span) -> Block:
        """Make room for a block: what the policy evicts goes back to the pool."""
        kept = self.context(self.tables, span.frames)
        gone = [
            np.setdiff1d(a, b) for a, b in zip(self.tables.pages_BP, kept.pages_BP, strict=True)
        ]
        self.pool.decref(np.concatenate(gone))
        self.tables = kept
        index = np.arange(span.start, span.start + span.frames)
        return Block(np.tile(index, (self.slots, 1)), self.given)

    def flow(self, x_BCnHW, t, attend, block):
        out = super().flow(x_BCnHW, t, attend, block)
        self.calls.append((x_BCnHW, float(t), int(block.index_Bn[0, 0]), out))
        return out

    def close(self, x_BCnHW: Tensor, t: float, block: Block) -> None:
        """The cache pass of a finished block."""
        self.tables, _ = self.commit(self.tables, x_BCnHW, t, block)

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (after rotation) and values [B,T,N,E] of all frames still held."""
        return self.pool.gather(layer, torch.from_numpy(self.tables.pages_BP))


def few_step_of(fixture: Fixture) -> FewStep:
    """The denoising list; ours is made from the raw steps where the fixture tells them."""
    shift = fixture.get("timestep_shift", "shift")
    listed = fixture.get("warped_steps", "raw_steps")
    raw = fixture.meta.get("raw_steps", listed)
    return FewStep.of(raw, shift=shift, warp=list(raw) != list(listed))


def kv_rollout(fixture: Fixture) -> Iterator[Check]:
    """Few-step rollout: every call, the latents, and the caches at the end."""
    model, schedule = model_of(fixture), few_step_of(fixture)
    listed = torch.tensor(fixture.get("warped_steps", "raw_steps"))
    yield Check("warped_steps", torch.tensor(schedule.timesteps), listed[: len(schedule)])
    roll = Rollout(model, fixture, fixture["context"])
    noise, renoise, initial = fixture["noise"], fixture["renoise"], fixture.get("initial_frames")
    done: list[Tensor] = []
    generated = 0
    for span in spans_of(fixture, initial + noise.shape[1]):
        block, end = roll.open(span), span.start + span.frames
        if span.given:
            x0, t = swap(fixture["initial_latent"][:, span.start : end]), 0.0
        else:
            steps, t = renoise[generated, :, :, : span.frames], float(fixture.get("context_noise"))
            x = swap(noise[:, span.start - initial : end - initial])
            attend = roll.reader(roll.tables, block)
            x0 = few_step(roll, x, schedule, lambda i, s=steps: swap(s[i - 1]), attend, block)
            generated += 1
        roll.close(x0, t, block)
        done.append(swap(x0))
    yield from _calls(fixture, roll)
    yield Check("latents", torch.cat(done, 1), fixture["latents"])
    yield from _caches(fixture, roll)


def _calls(fixture: Fixture, roll: Rollout) -> Iterator[Check]:
    """Input, flow and x0 of every network call, and where in time each happened."""
    table = FlowTable(fixture.get("timestep_shift", "shift"))
    if "calls" in fixture.meta:
        got = [[t, start, x.shape[2]] for x, t, start, _ in roll.calls]
        want = [[*c["t"], c["frame_start"], c["frames"]] for c in fixture.get("calls")]
        yield Check("calls", torch.tensor(got), torch.tensor(want))
    held = {name.partition(".")[0] for name in fixture.tensors if name.startswith("call")}
    if held and len(held) != len(roll.calls):
        raise FixtureError(f"the file holds {len(held)} calls, we made {len(roll.calls)}")
    for i, (x, t, _, flow) in enumerate(roll.calls if held else []):
        x0 = x0_from_flow(x, flow, float(table.sigma(t)))
        for name, value in (("input", x), ("flow", flow), ("x0", x0)):
            key = f"call{i:02d}.{name}"
            yield Check(key, swap(value), fixture[key])


def _caches(fixture: Fixture, roll: Rollout) -> Iterator[Check]:
    """The cache of every layer; beyond ``local_end_index`` the reference was never written."""
    end = fixture.meta.get("final_indices", {}).get("local_end_index")
    for layer in range(roll.dit.cfg.num_layers):
        for name, value in zip("kv", roll.cache(layer), strict=True):
            key = f"final_cache.{layer}.{name}"
            yield Check(key, value, fixture[key][:, :end])


def kv_rollout_cfg_unipc(fixture: Fixture) -> Iterator[Check]:
    """Multi-step rollout with guidance: two memories, one for each prompt."""
    model = model_of(fixture)
    rolls = [Rollout(model, fixture, fixture[name]) for name in ("context", "neg_context")]
    solver = UniPC(fixture.get("steps"), shift=fixture.get("shift", "timestep_shift"))
    noise, guidance = fixture["noise"], float(fixture.get("guidance_scale"))
    initial, context_noise = (
        fixture.get("initial_frames"),
        float(fixture.meta.get("context_noise", 0)),
    )
    done: list[Tensor] = []
    for span in spans_of(fixture, initial + noise.shape[1]):
        blocks, end = [roll.open(span) for roll in rolls], span.start + span.frames
        if span.given:
            x, t = swap(fixture["initial_latent"][:, span.start : end]), 0.0
        else:
            x, t = swap(noise[:, span.start - initial : end - initial]), context_noise
            attends = [r.reader(r.tables, b) for r, b in zip(rolls, blocks, strict=True)]
            solve = solver.begin(x)
            for step in solver.timesteps:
                positive, negative = (
                    roll.flow(x, step, attend, block)
                    for roll, attend, block in zip(rolls, attends, blocks, strict=True)
                )
                x = solve.step(negative + guidance * (positive - negative))
        for roll, block in zip(rolls, blocks, strict=True):
            roll.close(x, t, block)
        done.append(swap(x))
    yield Check("latents", torch.cat(done, 1), fixture["latents"])


KINDS = {
    "wan.bidirectional": bidirectional,
    "wan.causal_train": causal_train,
    "wan.kv_rollout": kv_rollout,
    "wan.kv_rollout_cfg_unipc": kv_rollout_cfg_unipc,
    "wan.scheduler": scheduler,
    "wan.unipc": unipc,
}
