"""Subject state tokens: what a party model adds to the video DiT (specs/actionparty.md section 4).

Shapes: B slot, F frame, G frame that an action led to, N subject, S state channel, P video tokens
of a frame, M = P + N tokens of a frame, T = F * M, D width, H heads, E head width, L text token,
K key.
A subject's state is its position (x, y), each from -1 to 1 over the frame (x right, y down), and
with ``facing`` also its facing (four channels N E S W, 1 and -1) and whether it is alive (1, -1).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.attention import attention
from worldgym.errors import ConfigError
from worldgym.models.wan import MIN_ROWS, Block, WanConfig
from worldgym.rope import rotate

MCA = ("subject", "frame", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectConfig:
    """Subjects of a frame, their actions, and which mechanisms bind the two.

    ``slots``: N places for subjects; ``actions``: number of actions of each; ``facing``: see above;
    ``octaves``: of the Fourier features of a position. Bindings, and their ablations:
    ``msa``: a subject's token does not see the other subjects' (off: it does); ``mca``: a subject's
    token sees only its own action ("subject"), every token all actions that led to its frame
    ("frame"), or those of all frames it can see ("none": no mask); ``rope_sa``, ``rope_ca``:
    subjects stand where they were a frame ago in self- and cross-attention; ``pooled``: no action
    tokens at all, but the mean of the actions' embeddings on the frame's timestep (a baseline).
    ``slot_embedding``: tell the slots apart (off: subjects are a set, exactly).
    ``beside``: the state a frame ago is laid beside each state as further input, as ``recent``
    frames are: where a subject stands is then known without looking (off as published).
    """

    slots: int = 8
    actions: int = 8
    facing: bool = False
    octaves: int = 8
    msa: bool = True
    mca: str = "subject"
    rope_sa: bool = True
    rope_ca: bool = True
    pooled: bool = False
    slot_embedding: bool = False
    beside: bool = False

    def __post_init__(self) -> None:
        if self.mca not in MCA or self.slots < 0 or self.actions < 1 or self.octaves < 0:
            raise ConfigError(
                "impossible subjects", given=f"mca {self.mca!r}, slots {self.slots}, actions "
                f"{self.actions}, octaves {self.octaves}",
                expected=f"mca one of {MCA}, slots >= 0, actions >= 1, octaves >= 0",
                fix="correct the setting",
            )

    @property
    def channels(self) -> int:
        """S."""
        return 7 if self.facing else 2

    @property
    def null(self) -> int:
        """Number of the null action: no action led to this frame, or nobody is there."""
        return self.actions


class Subjects(nn.Module):
    """Embedding and output of subject tokens, action tokens, and who sees whom."""

    def __init__(self, cfg: SubjectConfig, wan: WanConfig) -> None:
        super().__init__()
        self.cfg, self.wan, dim = cfg, wan, wan.dim
        self.inputs = nn.Linear((cfg.channels + 4 * cfg.octaves) * (1 + cfg.beside), dim)
        self.embedding = nn.Linear(dim, dim)
        self.kind = nn.Parameter(torch.zeros(dim))
        self.absent = nn.Parameter(torch.zeros(dim))
        if cfg.slot_embedding:
            self.slot = nn.Parameter(torch.zeros(cfg.slots, dim))
        self.actions = nn.Parameter(torch.zeros(cfg.actions + 1, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))
        self.head = nn.Linear(dim, cfg.channels)

    def initialize(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Fresh weights: Xavier input, N(0, ``std``) embeddings, output zero.

        ``std``: 0.02 beside a trained video base, so that it is disturbed little; about 1 when
        everything starts from nothing, so that actions are heard at once.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias") or name.startswith("head"):
                nn.init.zeros_(p)
            elif name == "modulation":
                nn.init.normal_(p, std=self.wan.dim**-0.5, generator=generator)
            elif name.startswith("inputs") or (std > 0.1 and name.startswith("embedding")):
                nn.init.xavier_uniform_(p, generator=generator)
            else:
                nn.init.normal_(p, std=std, generator=generator)

    def tokens(self, states_BFNS: Tensor, before_BFNS: Tensor, valid_BN: Tensor) -> Tensor:
        """Tokens (B, F, N, D); what stands in an empty place is not read."""
        there = valid_BN[:, None, :, None]
        told = [states_BFNS, before_BFNS] if self.cfg.beside else [states_BFNS]
        rows = torch.cat([self._features(torch.where(there, x, 0)) for x in told], -1)
        rows = rows.flatten(0, 2)
        n = len(rows)
        rows = F.pad(rows, (0, 0, 0, max(0, MIN_ROWS - n)))  # see MIN_ROWS
        y = self.embedding(F.silu(self.inputs(rows)))[:n].unflatten(0, states_BFNS.shape[:3])
        y = y + self.kind + torch.where(there, 0, self.absent)
        return y + self.slot if self.cfg.slot_embedding else y

    def _features(self, states_BFNS: Tensor) -> Tensor:
        """States, then sine and cosine of the position at ``octaves`` frequencies pi 2^k."""
        rate = torch.pi * 2.0 ** torch.arange(self.cfg.octaves, dtype=torch.float64,
                                              device=states_BFNS.device)
        # float64: float32 kernels round sines by their place in the batch
        angle = (states_BFNS[..., :2].double()[..., None] * rate).flatten(-2)
        return torch.cat([states_BFNS, torch.cat([angle.sin(), angle.cos()], -1).to(states_BFNS)],
                         -1)

    def flow(self, x_BFND: Tensor, e_BFD: Tensor, valid_BN: Tensor) -> Tensor:
        """Flow (B, F, N, S) of the states; zero in empty places, which stay as they were given."""
        shift, scale = (self.modulation + e_BFD.unsqueeze(2)).unsqueeze(3).unbind(2)
        y = F.layer_norm(x_BFND, x_BFND.shape[-1:], eps=self.wan.eps)
        rows = torch.addcmul(shift, y, 1 + scale).flatten(0, 2)
        n = len(rows)
        flow = self.head(F.pad(rows, (0, 0, 0, max(0, MIN_ROWS - n))))[:n]
        return torch.where(valid_BN[:, None, :, None], flow.unflatten(0, x_BFND.shape[:3]), 0)

    def pooled(self, actions_BFN: Tensor, valid_BN: Tensor) -> Tensor:
        """Mean embedding (B, F, D) of the actions of the subjects that are there."""
        share = valid_BN / valid_BN.sum(1, keepdim=True).clamp_min(1)
        return (self.actions[actions_BFN] * share[:, None, :, None]).sum(2)

    def within(self, valid_BN: Tensor, video_tokens: int) -> Tensor:
        """Bool (B, M, M): which tokens of a frame see which tokens of a frame they may see.

        Every token sees video; video sees the subjects that are there; a subject sees itself.
        """
        b, n = valid_BN.shape
        m = video_tokens + n
        see = torch.ones(b, m, m, dtype=torch.bool, device=valid_BN.device)
        if self.cfg.msa:
            see[:, video_tokens:, video_tokens:] = torch.eye(n, dtype=torch.bool, device=see.device)
        see[:, :, video_tokens:] &= valid_BN[:, None]
        return see

    def positions(self, frame_BF: Tensor, grid_hw: tuple[int, int], before_BFNS: Tensor) -> Tensor:
        """Places (B, F, M, 3) of all tokens as (frame, row, column), float64.

        ``before_BFNS``: states a frame ago, of which the position (x, y) in [-1, 1] is read.
        """
        (b, f, n, _), (h, w) = before_BFNS.shape, grid_hw
        size = torch.tensor([h, w], dtype=torch.float64, device=before_BFNS.device)
        subject = (before_BFNS[..., :2].double().flip(-1) + 1) / 2 * size - 0.5
        row, column = torch.meshgrid(*(torch.arange(k, dtype=torch.float64, device=size.device)
                                       for k in grid_hw), indexing="ij")
        video = torch.stack([row, column], -1).reshape(1, 1, h * w, 2).expand(b, f, -1, -1)
        place = torch.cat([video, subject], 2)
        frame = frame_BF.double()[:, :, None, None].expand(b, f, h * w + n, 1)
        return torch.cat([frame, place], -1)

    def sees_actions(self, frame_BF: Tensor, action_frame_BG: Tensor, valid_BN: Tensor,
                     video_tokens: int, window: int) -> Tensor:
        """Bool (B, T', G * N): which tokens see which action tokens (MCA).

        T' counts the subject tokens only, F * N, where video sees no action (mca "subject").
        """
        f, g = frame_BF[:, :, None], action_frame_BG[:, None]
        same_BFG = f == g
        if self.cfg.mca == "none":
            same_BFG = (g <= f) & (g > f - window) & (g >= 0)
        n = valid_BN.shape[1]
        if self.cfg.mca == "subject":
            own = torch.eye(n, dtype=torch.bool, device=valid_BN.device)[None, None, :, None]
            sees = same_BFG[:, :, None, :, None] & own
        else:
            sees = same_BFG[:, :, None, :, None] & valid_BN[:, None, None, None]
            sees = sees.expand(-1, -1, video_tokens + n, -1, -1)
        return sees.flatten(3, 4).flatten(1, 2)


class ActionCross:
    """Cross-attention to text and action tokens, in every layer (MCA with spatial RoPE).

    Text logits are those of the base, unrotated; action logits compare places: the query's own,
    and where the subject stood that the action belongs to. One softmax over both.

    Args:
        subjects: settings and action embeddings.
        text_kv: keys and values of the text, per layer.
        actions_BGN: action numbers; ``places`` and ``action_places``: rotation tables of all tokens
            and of the action tokens; ``sees``: from ``Subjects.sees_actions``.
        frames: F.
    """

    def __init__(self, subjects: Subjects, text_kv: list[tuple[Tensor, Tensor]],
                 actions_BGN: Tensor, places: tuple[Tensor, Tensor],
                 action_places: tuple[Tensor, Tensor], sees_BTK: Tensor, frames: int) -> None:
        self.subjects, self.text_kv, self.frames = subjects, text_kv, frames
        self.actions = actions_BGN.flatten(1)
        self.places, self.action_places = places, action_places
        b, t, _ = sees_BTK.shape
        text = sees_BTK.new_ones(b, t, text_kv[0][0].shape[1])
        self.mask = torch.cat([text, sees_BTK], 2)[:, None]

    def layer(self, number: int, block: Block):
        """cross(q_BTHE) of one layer."""
        k, v = block.cross_attn.key_value(self.subjects.actions)
        k, v = k[self.actions], v[self.actions]
        if self.subjects.cfg.rope_ca:
            k = rotate(k, self.action_places)
        text = [x.expand(len(k), -1, -1, -1) for x in self.text_kv[number]]
        return lambda q_BTHE: self._cross(q_BTHE, text, k, v)

    def _cross(self, q_BTHE: Tensor, text: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
        if self.subjects.cfg.mca != "subject":
            return self._both(q_BTHE, self.places, text, k, v)
        n = self.subjects.cfg.slots
        q = q_BTHE.unflatten(1, (self.frames, -1))
        places = [x.unflatten(1, (self.frames, -1))[:, :, -n:].flatten(1, 2) for x in self.places]
        video = attention(q[:, :, :-n].flatten(1, 2), text[0], text[1])
        subject = self._both(q[:, :, -n:].flatten(1, 2), (places[0], places[1]), text, k, v)
        parts = [x.unflatten(1, (self.frames, -1)) for x in (video, subject)]
        return torch.cat(parts, 2).flatten(1, 2)

    def _both(self, q_BTHE: Tensor, places: tuple[Tensor, Tensor], text: list[Tensor], k: Tensor,
              v: Tensor) -> Tensor:
        """One softmax over two kinds of logits: heads of double width, half of it zero in keys."""
        turned = rotate(q_BTHE, places) if self.subjects.cfg.rope_ca else q_BTHE
        width = q_BTHE.shape[-1]
        q = torch.cat([q_BTHE, turned], -1) * 2**0.5  # keeps the scale 1 / sqrt(head width)
        keys = torch.cat([F.pad(text[0], (0, width)), F.pad(k, (width, 0))], 1)
        values = F.pad(torch.cat([text[1], v], 1), (0, width))
        return attention(q, keys, values, self.mask)[..., :width]
