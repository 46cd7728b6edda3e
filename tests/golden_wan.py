"""Golden kinds of the Wan DiT: forwards, masks, schedules and cached rollouts.

Shapes: B slot, F frame, C channel, H W latent size, T tokens, N heads, E head width, S step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from golden import Check, Fixture, FixtureError

from worldgym.checkpoint import load_into
from worldgym.models.wan import (
    WanConfig,
    WanDiT,
    block_ids,
    causal_frame_mask,
    masked,
    teacher_forcing_frame_mask,
)
from worldgym.schedule import FlowTable, UniPC, x0_from_flow


def model_of(fixture: Fixture) -> WanDiT:
    """The fixture's network with its weights, loaded strictly."""
    with torch.device("meta"):
        model = WanDiT(WanConfig.from_dict(fixture.get("config")))
    return load_into(model, fixture.state_dict()).eval()


def bidirectional(fixture: Fixture) -> Iterator[Check]:
    """One forward in which every token sees every token; x is [B,C,F,H,W], x0 [B,F,C,H,W]."""
    x, t = fixture["x"], fixture["t"]
    flow = model_of(fixture)(x, t, fixture["context"])
    yield Check("out", flow, fixture["out"])
    x0 = x0_from_flow(x, flow, FlowTable(fixture.get("timestep_shift", "shift")).sigma(t))
    yield Check("x0", x0.transpose(1, 2), fixture["x0"])


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


KINDS = {
    "wan.bidirectional": bidirectional,
    "wan.causal_train": causal_train,
    "wan.scheduler": scheduler,
    "wan.unipc": unipc,
}
