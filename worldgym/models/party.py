"""ActionParty's network: subject states diffused jointly with video (specs/actionparty.md 4).

Shapes: B slot, F frame, C channel, h w latent grid, N subject, S state channel, G frame that an
action led to, L text token, V = C * h * w + N * S numbers of a frame.
The base is the causal Wan DiT, unchanged; every frame carries N subject tokens after its video
tokens, and all share its timestep. Without subjects the network is the base, bit for bit.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from worldgym import checkpoint
from worldgym.attention import attention
from worldgym.errors import CheckpointError, ConfigError
from worldgym.models.dynamics import before
from worldgym.models.party_layers import ActionCross, SubjectConfig, Subjects
from worldgym.models.wan import (
    WAN_1_3B,
    Attend,
    Block,
    WanConfig,
    WanDiT,
    block_ids,
    causal_frame_mask,
    masked,
    teacher_forcing_frame_mask,
)
from worldgym.rope import cos_sin, rotation_at


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyConfig:
    """``latent_chw``: one latent frame; ``window``: frames a step can see, itself included;
    ``recent``: frames before each one laid beside it as input channels (0 as published); ``skip``:
    root mean square step, from one frame to the next, of latents, positions, and facing and alive:
    the network then learns what changes only, see ``stay`` (None as published; with it, ``recent``
    and ``subjects.beside`` are needed)."""

    latent_chw: tuple[int, int, int]
    wan: WanConfig
    subjects: SubjectConfig = field(default_factory=SubjectConfig)
    window: int = 5
    recent: int = 0
    skip: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        c, h, w = self.latent_chw
        if self.skip and not (self.recent and self.subjects.beside and min(self.skip) > 0):
            raise ConfigError("nothing to stay at", given=f"skip {self.skip}, recent "
                              f"{self.recent}, beside {self.subjects.beside}",
                              expected="recent >= 1 and subjects beside, skip above 0",
                              fix="set skip=None, or build the sizes with party.nano_config")
        _, ph, pw = self.wan.patch_size
        if (self.wan.in_dim, self.wan.out_dim) != (c * (1 + self.recent), c) or h % ph or w % pw:
            raise ConfigError(
                "latents and network do not fit",
                given=f"latents {self.latent_chw}, recent {self.recent}, in_dim {self.wan.in_dim}, "
                      f"out_dim {self.wan.out_dim}, patch {self.wan.patch_size}",
                expected=f"in_dim {c * (1 + self.recent)}, out_dim {c}, a grid that splits into "
                         "patches", fix="change the network's sizes")
        if not self.wan.text_len and self.subjects.slots and not self.subjects.pooled:
            raise ConfigError("actions need cross-attention", given="text_len 0",
                              expected="text_len >= 1, or pooled actions",
                              fix="use text_len=1 and tell the game as a one-hot row")

    def to_json(self) -> dict:
        """Plain dict that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "PartyConfig":
        """Inverse of ``to_json``."""
        try:
            return cls(**data | {"wan": WanConfig.from_dict(data["wan"]),
                                 "subjects": SubjectConfig(**data["subjects"]),
                                 "skip": tuple(data["skip"]) if data.get("skip") else None,
                                 "latent_chw": tuple(data["latent_chw"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("party configuration cannot be read", given=str(error),
                              expected="the dict that PartyConfig.to_json writes",
                              fix="take the card from the folder of the weights") from error

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of video tokens."""
        _, h, w = self.latent_chw
        return h // self.wan.patch_size[1], w // self.wan.patch_size[2]


# 512 x 512 pixels: 1024 video tokens and 8 subject tokens a frame
PARTY_1_3B = PartyConfig(latent_chw=(16, 64, 64), wan=WAN_1_3B)


def nano_config(latent_chw: tuple[int, int, int], games: int = 1, width: int = 128,
                layers: int = 6, head: int = 32, recent: int = 1, window: int = 5,
                patch: tuple[int, int] = (1, 1), skip: tuple[float, float, float] | None = None,
                **subjects) -> PartyConfig:
    """A small network; its text is one row, the game as a one-hot of ``games``.

    ``subjects``: fields of ``SubjectConfig``; by default states, too, have what was before beside.
    """
    c = latent_chw[0]
    wan = WanConfig(dim=width, ffn_dim=4 * width, num_heads=max(1, width // head),
                    num_layers=layers, in_dim=c * (1 + recent), out_dim=c, freq_dim=width // 2,
                    text_dim=games, text_len=1, patch_size=(1, *patch))
    return PartyConfig(latent_chw=latent_chw, wan=wan, window=window, recent=recent, skip=skip,
                       subjects=SubjectConfig(**{"beside": recent > 0, **subjects}))


class PartyDynamics(nn.Module):
    """A WanDiT and its subject tokens.

    >>> cfg = nano_config((3, 4, 4), width=32, layers=1, slots=2, actions=5)
    >>> model = PartyDynamics(cfg)
    >>> model.pack(torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 2, 2)).shape
    torch.Size([1, 52, 2])
    """

    def __init__(self, cfg: PartyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.dit = WanDiT(cfg.wan)
        self.subjects = Subjects(cfg.subjects, cfg.wan)

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights for a training from nothing."""
        self.dit.initialize(generator)
        self.subjects.initialize(generator, std=1.0)

    def pack(self, video_BFChw: Tensor, states_BFNS: Tensor) -> Tensor:
        """Latents and states of frames as one tensor (B, V, F): what memory and samplers carry."""
        return torch.cat([video_BFChw.flatten(2), states_BFNS.flatten(2)], 2).transpose(1, 2)

    def unpack(self, x_BVF: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, F, C, h, w) and states (B, F, N, S)."""
        size = self.cfg.latent_chw[0] * self.cfg.latent_chw[1] * self.cfg.latent_chw[2]
        x, sub = x_BVF.transpose(1, 2), self.cfg.subjects
        return (x[:, :, :size].unflatten(2, self.cfg.latent_chw),
                x[:, :, size:].unflatten(2, (sub.slots, sub.channels)) if sub.slots
                else x.new_zeros(*x.shape[:2], 0, sub.channels))

    def within(self, valid_BN: Tensor) -> Tensor:
        """See ``Subjects.within``."""
        return self.subjects.within(valid_BN, self.cfg.grid_hw[0] * self.cfg.grid_hw[1])

    def network(self, x_BVF: Tensor, t_BF: Tensor, **given) -> Tensor:
        """``joint`` on packed frames: flow (B, V, F)."""
        video, states = self.unpack(x_BVF)
        flow_v, flow_s = self.joint(video.transpose(1, 2), states, t_BF, **given)
        return self.pack(flow_v.transpose(1, 2), flow_s)

    def joint(self, video_BCFhw: Tensor, states_BFNS: Tensor, t_BF: Tensor, *,
              actions_BGN: Tensor, before_BFNS: Tensor, valid_BN: Tensor,
              text_kv: list[tuple[Tensor, Tensor]] | None, attend: Attend | None = None,
              frame_index_BF: Tensor | None = None, action_frame_BG: Tensor | None = None,
              action_before_BGNS: Tensor | None = None,
              recent_BRFhw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Flows (B, C, F, h, w) of the latents and (B, F, N, S) of the states.

        Args:
            video_BCFhw, states_BFNS: noisy latents and states; t_BF: timesteps in [0, 1000].
            actions_BGN: int64; the action that led to each frame, ``actions`` = none.
            before_BFNS: state of every subject one frame before; the first frame's own.
            valid_BN: bool, which places are taken.
            text_kv: from ``dit.text``.
            attend: who sees whom over M tokens a frame; must hold ``within``.
            frame_index_BF: absolute frame indices, default 0..F-1.
            action_frame_BG, action_before_BGNS: index of the frames that the actions led to, and
                the states before; default: those of the frames.
            recent_BRFhw: the frames before, as channels.
        """
        flows = self._joint(
            video_BCFhw, states_BFNS, t_BF, actions_BGN, before_BFNS, valid_BN, text_kv, attend,
            frame_index_BF, action_frame_BG, action_before_BGNS, recent_BRFhw)
        if not self.cfg.skip:
            return flows
        assert recent_BRFhw is not None
        still, turn, other = self.cfg.skip
        each = torch.tensor([turn] * 2 + [other] * 5, device=t_BF.device)[:states_BFNS.shape[-1]]
        level, c = t_BF / 1000, video_BCFhw.shape[1]
        video = stay(video_BCFhw, recent_BRFhw[:, :c], level[:, None, :, None, None],
                     torch.tensor(still, device=t_BF.device), flows[0])
        there = valid_BN[:, None, :, None]
        states = stay(states_BFNS, before_BFNS, level[:, :, None, None], each, flows[1])
        return video, torch.where(there, states, 0)

    def _joint(self, video_BCFhw: Tensor, states_BFNS: Tensor, t_BF: Tensor, actions_BGN: Tensor,
               before_BFNS: Tensor, valid_BN: Tensor,
               text_kv: list[tuple[Tensor, Tensor]] | None, attend: Attend | None,
               frame_index_BF: Tensor | None, action_frame_BG: Tensor | None,
               action_before_BGNS: Tensor | None,
               recent_BRFhw: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the network itself says; see ``joint``."""
        b, _, f = video_BCFhw.shape[:3]
        x = video_BCFhw if recent_BRFhw is None else torch.cat([video_BCFhw, recent_BRFhw], 1)
        if frame_index_BF is None:
            frame_index_BF = torch.arange(f, device=x.device)
        if frame_index_BF.ndim == 1:
            frame_index_BF = frame_index_BF[None]
        if not self.cfg.subjects.slots:
            return self.dit(x, t_BF, attend=attend, frame_index_BF=frame_index_BF,
                            text_kv=text_kv), states_BFNS
        frame_index_BF = frame_index_BF.expand(b, -1)
        action_frame_BG = frame_index_BF if action_frame_BG is None else action_frame_BG
        action_before_BGNS = before_BFNS if action_before_BGNS is None else action_before_BGNS
        actions_BGN = torch.where(valid_BN[:, None], actions_BGN, self.cfg.subjects.null)
        before_BFNS, action_before_BGNS = (torch.where(valid_BN[:, None, :, None], a, 0)
                                           for a in (before_BFNS, action_before_BGNS))

        video = self.dit.patches(x).unflatten(1, (f, -1))
        p = video.shape[2]
        subjects = self.subjects.tokens(states_BFNS, before_BFNS, valid_BN)
        x = torch.cat([video, subjects], 2).flatten(1, 2)
        cond, cross = None, None
        places = self.subjects.positions(frame_index_BF, self.cfg.grid_hw, before_BFNS)
        table = self._table(places, p if not self.cfg.subjects.rope_sa else None)
        if self.cfg.subjects.pooled:
            which = (frame_index_BF[:, :, None] == action_frame_BG[:, None]).int().argmax(2)
            own = actions_BGN.gather(1, which[:, :, None].expand(-1, -1, actions_BGN.shape[2]))
            cond = self.subjects.pooled(own, valid_BN)
        else:
            spots = self.subjects.positions(action_frame_BG, self.cfg.grid_hw, action_before_BGNS)
            sees = self.subjects.sees_actions(frame_index_BF, action_frame_BG, valid_BN, p,
                                              self.cfg.window)
            assert text_kv is not None
            cross = ActionCross(self.subjects, text_kv, actions_BGN, self._table(places),
                                self._table(spots[:, :, p:]), sees, f)
        e, modulation = self.dit.time(t_BF, cond)
        for i, module in enumerate(self.dit.blocks):
            block = cast(Block, module)
            see = (lambda q, k, v, i=i: attend(i, q, k, v)) if attend else attention
            text = text_kv[i] if text_kv else None
            x = block(x, modulation, table, see, cross.layer(i, block) if cross else text)
        x = x.unflatten(1, (f, -1))
        flow = self.dit.unpatch(self.dit.head(x[:, :, :p].flatten(1, 2), e), f, self.cfg.grid_hw)
        return flow, self.subjects.flow(x[:, :, p:], e, valid_BN)

    def _table(self, places_BFM3: Tensor, nowhere: int | None = None) -> tuple[Tensor, Tensor]:
        """Rotation table of tokens at these places; from token ``nowhere`` on only in time."""
        if nowhere is not None:
            places_BFM3 = places_BFM3.clone()
            places_BFM3[:, :, nowhere:, 1:] = 0
        turn = rotation_at(places_BFM3.flatten(1, 2), self.cfg.wan.head_dim)
        return cos_sin(turn, self.dit.head.modulation.dtype)

    def forward(self, clean_BFChw: Tensor, states_BFNS: Tensor, actions_BFN: Tensor,
                valid_BN: Tensor, text_BLD: Tensor, sigma_BF: Tensor,
                noise_BFChw: Tensor, state_noise_BFNS: Tensor, level_BF: Tensor,
                level_noise_BFChw: Tensor, context_states_BFNS: Tensor,
                forcing: str = "teacher", lead: int = 0) -> tuple[Tensor, Tensor]:
        """Flows of every frame's latents (B, F, C, h, w) and states (B, F, N, S).

        Args:
            sigma_BF: noise level of each frame; ``noise_BFChw``, ``state_noise_BFNS``: its noise.
            level_BF, level_noise_BFChw: the same for the frames as context.
            context_states_BFNS: states as context, and as what the next frame starts from.
            forcing: "teacher": the sequence is [context | noisy], each noisy frame sees the context
                before it and itself; "diffusion": each noisy frame sees the noisy ones before it;
                "alone": itself only, with the recent frames beside it (needs ``recent``).
            lead: with "alone", so many frames after the first are only looked back at.
        """
        b, f = sigma_BF.shape

        def mix(x: Tensor, eps: Tensor, s_BF: Tensor) -> Tensor:
            s = s_BF.reshape(b, f, *(1,) * (x.ndim - 2))
            return (1 - s) * x + s * eps

        noisy = mix(clean_BFChw, noise_BFChw, sigma_BF)
        states = mix(states_BFNS, state_noise_BFNS, sigma_BF)
        context = mix(clean_BFChw, level_noise_BFChw, level_BF)
        recent = before(context.transpose(1, 2), self.cfg.recent) if self.cfg.recent else None
        earlier = torch.cat([context_states_BFNS[:, :1], context_states_BFNS[:, :-1]], 1)
        text_kv = self.dit.text(text_BLD) if self.cfg.wan.text_len else None
        if forcing == "alone":
            return self._alone(noisy, states, sigma_BF, actions_BFN, earlier, valid_BN, text_kv,
                               recent, 1 + lead)
        index, times = torch.arange(f, device=sigma_BF.device), 1
        frames, t = causal_frame_mask(block_ids(f, 1), self.cfg.window), 1000 * sigma_BF
        if forcing == "teacher":
            noisy, times = torch.cat([context, noisy], 1), 2
            states = torch.cat([context_states_BFNS, states], 1)
            t = torch.cat([1000 * level_BF, t], 1)
            frames = teacher_forcing_frame_mask(block_ids(f, 1), self.cfg.window)
        flow_v, flow_s = self.joint(
            noisy.transpose(1, 2), states, t, actions_BGN=actions_BFN, valid_BN=valid_BN,
            before_BFNS=earlier.repeat(1, times, 1, 1), text_kv=text_kv,
            attend=self._masked(frames, valid_BN), frame_index_BF=index.repeat(times),
            action_frame_BG=index.expand(b, -1), action_before_BGNS=earlier,
            recent_BRFhw=None if recent is None else recent.repeat(1, 1, times, 1, 1))
        return flow_v.transpose(1, 2)[:, -f:], flow_s[:, -f:]

    def _alone(self, noisy_BFChw: Tensor, states_BFNS: Tensor, sigma_BF: Tensor,
               actions_BFN: Tensor, before_BFNS: Tensor, valid_BN: Tensor,
               text_kv: list[tuple[Tensor, Tensor]] | None,
               recent_BRFhw: Tensor | None, first: int = 1) -> tuple[Tensor, Tensor]:
        """Flows of frames ``first``.. each by itself; zeros before (nothing led to frame 0)."""
        b, f = sigma_BF.shape

        def each(x: Tensor) -> Tensor:  # the frames as clips of one frame
            return x[:, first:].flatten(0, 1)[:, None]

        def back(x: Tensor) -> Tensor:
            x = x.unflatten(0, (b, f - first))
            return torch.cat([torch.zeros_like(x[:, :1]).expand(-1, first, *x.shape[2:]), x], 1)

        valid = valid_BN.repeat_interleave(f - first, 0)
        text = [(k.repeat_interleave(f - first, 0), v.repeat_interleave(f - first, 0))
                for k, v in text_kv or []]
        flow_v, flow_s = self.joint(
            each(noisy_BFChw).transpose(1, 2), each(states_BFNS), 1000 * each(sigma_BF),
            actions_BGN=each(actions_BFN), before_BFNS=each(before_BFNS), valid_BN=valid,
            text_kv=text, attend=self._masked(torch.ones(1, 1, dtype=torch.bool), valid),
            recent_BRFhw=None if recent_BRFhw is None else
            each(recent_BRFhw.transpose(1, 2)).transpose(1, 2))
        return back(flow_v[:, :, 0]), back(flow_s[:, 0])

    def _masked(self, frames_FF: Tensor, valid_BN: Tensor) -> Attend:
        """Who sees whom while training."""
        slots, (h, w) = self.cfg.subjects.slots, self.cfg.grid_hw
        return masked(frames_FF, h * w + slots, self.within(valid_BN) if slots else None)


def stay(x: Tensor, before: Tensor, level: Tensor, spread: Tensor, said: Tensor) -> Tensor:
    """Flow from ``x``, noised to ``level``, when the clean value is about that of a frame ago.

    With clean = before + d and d ~ N(0, spread^2), the flow noise - clean has, given x, a normal
    distribution: its mean, plus ``said`` times its spread. At pure noise the clean value is then
    before - spread * said (the preconditioning of arXiv 2206.00364 about the frame before).
    """
    total = level**2 + (1 - level) ** 2 * spread**2
    off = x - (1 - level) * before
    return (level - (1 - level) * spread**2) / total * off - before + spread / total.sqrt() * said


def from_base(folder: str | Path, cfg: PartyConfig | None = None, seed: int = 0,
              device: torch.device | str = "cpu",
              dtype: torch.dtype | None = None) -> PartyDynamics:
    """Wan2.1 weights in their native layout, strictly loaded, with new subject parameters.

    ``cfg``: default: the sizes of ``config.json`` beside the weights and those of ``PARTY_1_3B``.
    """
    if cfg is None:
        path = Path(folder) / "config.json"
        try:
            wan = WanConfig.from_dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise CheckpointError("no configuration beside the weights", given=f"{path} ({error})",
                                  expected="a native config.json",
                                  fix="give cfg, or copy config.json there") from error
        cfg = PartyConfig(latent_chw=(wan.out_dim, *PARTY_1_3B.latent_chw[1:]), wan=wan)
    with torch.device("meta"):
        model = PartyDynamics(cfg)
    checkpoint.load_into(model.dit, Path(folder), device=device, dtype=dtype)
    model.subjects.to_empty(device="cpu")
    model.subjects.initialize(torch.Generator().manual_seed(seed))
    model.subjects.to(device=device, dtype=dtype)
    return model
