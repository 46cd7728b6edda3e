"""Training losses of a party model: flow matching of frames and states, rewards and ends.

Shapes: B clip, F frame, C channel, h w latent grid, N subject, S state channel, L text token.
A batch is a dict: ``latents_BFChw``; ``states_BFNS``; ``actions_BFN`` (integers; the action that
led to each frame, -1: none); ``valid_BN`` (which places are taken); ``game_B`` (integers) or
``text_BLD``; and, if there: ``exists_BF`` (frames that are real, not filling), ``weight_BFhw`` (how
much each cell matters), ``cell_B2`` (size of a game cell, width and height over the frame's two
units), and for the heads ``rewards_BFN``, ``ended_BFN``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from worldgym.errors import ConfigError, ShapeError
from worldgym.models.dynamics import drawer
from worldgym.models.party import PartyConfig
from worldgym.schedule import FlowTable


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyLossConfig:
    """How to train.

    ``stage``: "video" (frames only: nobody is there, nobody acts) or "joint"; ``forcing``: see
    ``PartyDynamics.forward``; ``state_weight``: lambda_c; ``position_weight``: of a position's two
    channels, against 1 of facing and alive, which lie farther apart; ``shift``: of noise levels;
    ``full_noise``: share of frames that start from pure noise, where every rollout starts;
    ``bell``: the published weight of noise levels, which vanishes at pure noise: right for
    many-step samplers only; ``context_noise``: half of the clips see latents noised up to this;
    ``jitter``: half of the clips see states moved by this many cells (standard deviation), so that
    a rollout survives its own errors; ``lead``: frames after the first that are only looked back
    at, with forcing "alone"; ``drop_text``, ``drop_actions``: shares without them, for
    guidance.
    """

    stage: str = "joint"
    forcing: str = "teacher"
    state_weight: float = 1.0
    position_weight: float = 1.0
    shift: float = 5.0
    full_noise: float = 0.25
    bell: bool = False
    context_noise: float = 0.1
    jitter: float = 0.25
    lead: int = 0
    drop_text: float = 0.1
    drop_actions: float = 0.1

    def __post_init__(self) -> None:
        if self.stage not in ("video", "joint") or self.forcing not in ("teacher", "diffusion",
                                                                        "alone"):
            raise ConfigError("impossible training", given=f"{self.stage!r}, {self.forcing!r}",
                              expected="stage video or joint; forcing teacher, diffusion or alone",
                              fix="correct the setting")
        if self.lead < 0 or self.lead and self.forcing != "alone":
            raise ConfigError("frames to look back at need frames by themselves",
                              given=f"lead {self.lead}, {self.forcing!r}",
                              expected="lead >= 0, above 0 with forcing alone only",
                              fix="set lead=0, or forcing=\"alone\"")


def party_loss(model: nn.Module, cfg: PartyConfig, batch: dict[str, Tensor],
               generator: torch.Generator, how: PartyLossConfig | None = None,
               share: tuple[int, int] = (0, 1),
               average: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, dict]:
    """Flow-matching loss of frames 1.. and their states, given the frames before them.

    Args:
        model: a ``PartyDynamics``, or what a training loop wrapped around it; ``cfg``: its sizes.
        batch: see above; any device, moved to that of the latents.
        generator: all noise comes from here.
        share: (rank, processes) and ``average`` over them: see ``dynamics_loss``.

    Returns:
        (loss, {"video": ..., "states": ...} squared errors, and the video's at pure noise).
    """
    how = how or PartyLossConfig()
    latents, states, actions, valid, text = clip(cfg, batch)
    b, f = latents.shape[:2]
    draw = drawer(b, generator, share, latents.device)
    order = draw(torch.rand, valid.shape[1]).argsort(1)  # slots are a set
    states = states.gather(2, order[:, None, :, None].expand_as(states))
    actions, valid = actions.gather(2, order[:, None].expand_as(actions)), valid.gather(1, order)
    if how.stage == "video":
        valid = torch.zeros_like(valid)
    sigma = draw(torch.rand, f)
    sigma = how.shift * sigma / (1 + (how.shift - 1) * sigma)
    sigma = torch.where(draw(torch.rand, f) < how.full_noise, torch.ones_like(sigma), sigma)
    level = how.context_noise * draw(torch.rand, f) * (draw(torch.rand, 1) < 0.5)
    noise, state_noise = draw(torch.randn, *latents.shape[1:]), draw(torch.randn, *states.shape[1:])
    moved = _jitter(cfg, how, batch, states, draw)
    text = text * (draw(torch.rand, 1) >= how.drop_text)[..., None]
    actions = torch.where((draw(torch.rand, 1) < how.drop_actions)[..., None],
                          cfg.subjects.null, actions)
    flow_v, flow_s = model(latents, states, actions, valid, text, sigma, noise, state_noise, level,
                           draw(torch.randn, *latents.shape[1:]), moved, how.forcing, how.lead)
    weight = batch.get("exists_BF", torch.ones(b, f)).to(latents).clone()
    weight[:, :1 + how.lead] = 0
    if how.bell:
        weight = weight * FlowTable(how.shift).weight(1000 * sigma)
    cells = batch.get("weight_BFhw")
    cells = torch.ones_like(latents[:, :, 0]) if cells is None else cells.to(latents)
    cells = weight[..., None, None] * cells
    error = ((flow_v - (noise - latents)) ** 2).mean(2)
    video = (cells * error).sum() / average(cells.sum()).clamp_min(1e-6)
    there = weight[:, :, None] * valid[:, None]
    error_s = (flow_s - (state_noise - states)) ** 2
    if how.position_weight != 1 and cfg.subjects.facing:
        each = torch.ones_like(error_s[0, 0, 0])
        each[:2] = how.position_weight
        error_s = error_s * (each / each.mean())
    error_s = error_s.mean(-1)
    of_states = (there * error_s).sum() / average(there.sum()).clamp_min(1e-6)
    told = {"video": float(video.detach()), "states": float(of_states.detach())}
    first = (sigma == 1) & (weight > 0)
    told["full_noise"] = float(error.detach().mean((2, 3))[first].mean()) if first.any() else \
        told["video"]
    return video + how.state_weight * of_states, told


def _jitter(cfg: PartyConfig, how: PartyLossConfig, batch: dict[str, Tensor], states_BFNS: Tensor,
            draw: Callable) -> Tensor:
    """States as a rollout would hand them on: half of the clips with positions a little off."""
    size = batch.get("cell_B2")
    if size is None:
        size = states_BFNS.new_tensor([2 / cfg.grid_hw[1], 2 / cfg.grid_hw[0]])[None]
    off = how.jitter * size.to(states_BFNS)[:, None, None] * draw(
        torch.randn, *states_BFNS.shape[1:3], 2)
    off = off * (draw(torch.rand, 1) < 0.5)[..., None, None]
    moved = states_BFNS.clone()
    moved[..., :2] += off
    return moved


def clip(cfg: PartyConfig, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(latents, states, actions with the null action's number, valid, text) of a batch, checked."""
    sub, latents = cfg.subjects, batch["latents_BFChw"].float()
    b, f = latents.shape[:2]
    shapes = {"latents_BFChw": (b, f, *cfg.latent_chw), "valid_BN": (b, sub.slots),
              "states_BFNS": (b, f, sub.slots, sub.channels), "actions_BFN": (b, f, sub.slots)}
    for name, shape in shapes.items():
        if name not in batch or tuple(batch[name].shape) != shape:
            given = tuple(batch[name].shape) if name in batch else "nothing"
            raise ShapeError(f"{name} does not fit the model", given=given, expected=shape,
                             fix="pad players to the model's slots, -1 and False where nobody is")
    device = latents.device
    valid = batch["valid_BN"].to(device).bool()
    states = batch["states_BFNS"].to(device).float()
    states = torch.where(valid[:, None, :, None], states, 0)  # recordings have NaN there
    actions = batch["actions_BFN"].to(device).long()
    actions = torch.where(valid[:, None] & (actions >= 0), actions, sub.null)
    text = batch.get("text_BLD")
    if text is None:
        text = game_text(batch["game_B"] if "game_B" in batch else torch.zeros(b), cfg.wan.text_dim)
    return latents, states, actions, valid, text.to(device).float()


def game_text(game_B: Tensor, games: int) -> Tensor:
    """The text of nano's games (B, 1, games): which one it is, as a one-hot row."""
    return one_hot(game_B.long(), games)[:, None].float()


def batch_of(sample: Mapping[str, Any], facing: bool) -> dict[str, Tensor]:
    """A batch for the losses from a ``PartySampler``'s clips with their ``latents`` (an extra).

    ``facing``: states of seven channels (position, facing, alive) rather than two.
    """
    got = {k: torch.as_tensor(v) for k, v in sample.items()}
    states = states_of(got["positions"], got["orientation"], got["alive"], facing)
    return {"latents_BFChw": got["latents"].float(), "states_BFNS": states,
            "actions_BFN": got["actions"], "valid_BN": got["valid"], "game_B": got["game"],
            "rewards_BFN": got["rewards"], "ended_BFN": got["ended"]}


def states_of(positions: Tensor, orientation: Tensor, alive: Tensor, facing: bool) -> Tensor:
    """States (..., N, S) from recorded positions (..., N, 2), orientation 0..3 and alive (..., N).

    ``facing``: see ``batch_of``.
    """
    states = [positions.float()]
    if facing:
        turned = one_hot(orientation.long().clamp(0, 3), 4).float()
        states += [2 * turned - 1, 2 * alive.float()[..., None] - 1]
    return torch.cat(states, -1)
