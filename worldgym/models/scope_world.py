"""SCOPE as a world of the engine: a step is a short clip that begins with the current frame.

Shapes: B slot, F latent frame made by a step, N = 4 F raw frames and action rows, P action rows of
a window, C latent channel, h w latent grid, H W pixels, L text token, D text width.

The network sees a whole clip, every action of it included, so a step denoises F + 1 latent frames:
the first is the current frame, given; the others are new (receding horizon; specs/scope.md 13).
Autoencoder calls go slot by slot, so their bits do not depend on the batch.
"""

import hashlib
from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym import checkpoint
from worldgym.actions import ActionSpec
from worldgym.clip import FPS, ClipSize, Sampler, TextKV, denoise, to_pixels
from worldgym.engine import Chunk, World
from worldgym.errors import ConfigError, NotFiniteError, ShapeError
from worldgym.memory import PagePool, PageSpec, Tables
from worldgym.models.scope import ScopeDiT
from worldgym.models.wan_vae import PICTURES, WanVAE, to_uint8
from worldgym.noise import normal
from worldgym.spec import Licence, WorldSpec
from worldgym.state import Starts, WorldState

BUTTONS, STICKS = 6, 4
ACTION = ActionSpec(
    kind="box", shape=(BUTTONS + STICKS,), low=(0.0,) * BUTTONS + (-1.0,) * STICKS,
    high=(1.0,) * (BUTTONS + STICKS),
    parts=(("buttons", "multi_binary", BUTTONS), ("move", "box", 2), ("camera", "box", 2)))
CARRIES = ("frame", "latent")


class ScopeWorld(World):
    """A SCOPE network for a batch of slots, each with its own prompt.

    Actions are rows of buttons (fire, aim, jump, melee, reload, switch weapon), move x, move y,
    camera x, camera y: one held over the step, or with ``per_frame`` one per new frame, row j
    acting on the way to new frame j. **y below 0 is forward, and up for the camera**; x below 0 is
    left. Values reach the network as they are. Starts carry one frame and ``context_BLD`` (and
    ``negative_BLD`` unless guidance is 1); ``starts`` makes them.

    Args:
        dit: the network. vae: its autoencoder.
        height, width: of the frames.
        latents: latent frames F of a step; it makes 4 F new frames.
        sampler: how a step is denoised.
        carry: what the next step begins with: "frame", the last frame, encoded again as it was
            seen; "latent" (an experiment), the last latent frame: a step then calls no
            autoencoder, and frames are decoded only when they are asked for.
        remember: windows at the beginning of a step see the real actions before it; off, as
            published, they see copies of the step's first action.
        outcome: reward and end, as in ``World``.
        prompts: encoded prompts whose keys and values stay in memory (189 MB each at full size).
    """

    stands_alone = False  # a later latent of a clip is four frames and needs the ones before

    def __init__(self, dit: ScopeDiT, vae: WanVAE, *, height: int = 480, width: int = 832,
                 latents: int = 4, sampler: Sampler | None = None, carry: str = "frame",
                 remember: bool = False, outcome: Any = None, temperature: float = 1.0,
                 prompts: int = 4, name: str = "scope", fingerprint: str = "",
                 licence: Licence | None = None) -> None:
        action = dit.action
        if action is None or (action.keyboard_dim, action.mouse_dim, action.ratio) != (
                BUTTONS, STICKS, PICTURES):
            raise ConfigError("network does not hear a gamepad", given=action,
                              expected=f"{BUTTONS} buttons, {STICKS} stick axes, {PICTURES} raw "
                              "frames per latent frame", fix="load SCOPE's own weights")
        if isinstance(latents, bool) or not isinstance(latents, int) or latents < 1:
            raise ConfigError("impossible number of latent frames", given=repr(latents),
                              expected="an int of at least 1", fix="use 4 for 16 new frames")
        if carry not in CARRIES:
            raise ConfigError("unknown carry", given=repr(carry), expected=f"one of {CARRIES}",
                              fix='use "frame"')
        if not 0 < temperature <= 10:
            raise ConfigError("impossible temperature", given=temperature,
                              expected="a number above 0, at most 10", fix="use 1.0")
        self.size = ClipSize(height, width, PICTURES * latents + 1)  # refuses impossible ones
        self.dit, self.vae, self.outcome = dit, vae, outcome
        self.sampler = sampler or Sampler()
        self.carry, self.remember, self.temperature = carry, remember, temperature
        self.weight = dit.head.modulation
        self.device, cfg = self.weight.device, dit.cfg
        self.rows, self.prompts = action.rows, max(2, prompts)
        shape = (cfg.in_dim, height // vae.stride, width // vae.stride)
        self.spec = WorldSpec(
            name=name, frame_hw=(height, width), latent_chw=shape, action=ACTION, fps=FPS,
            frames_per_chunk=PICTURES * latents, latents_per_chunk=latents, context_frames=0,
            licence=licence or Licence(name="Apache-2.0"))
        self.history, self.table_rows = 1, 1
        text = ((cfg.text_len, cfg.text_dim), self.weight.dtype)
        self.extra = {"context": text, "context_id": ((), torch.int64),
                      "origin": ((2 * shape[0],), torch.float32)}
        if self.guided:
            self.extra |= {"negative": text, "negative_id": ((), torch.int64)}
        self.pool = PagePool(PageSpec(layers=1, heads=1, head_dim=1, tokens=1), self.device)
        options = f"{self.size} {self.sampler} {carry} {remember} {temperature}"
        self.fingerprint = f"{fingerprint or checkpoint.fingerprint(dit)} {options}"
        self._texts: OrderedDict[int, TextKV] = OrderedDict()

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is needed."""
        return self.sampler.guidance != 1.0

    @property
    def pending_shape(self) -> tuple[int, ...]:
        """The last P action rows."""
        return (self.rows, BUTTONS + STICKS)

    # -- frames ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, frames_BHWC: Tensor | np.ndarray) -> Tensor:
        frames = np.asarray(frames_BHWC)
        if frames.shape[1:] != (*self.spec.frame_hw, 3) or frames.dtype != np.uint8:
            raise ShapeError("frames do not fit the world",
                             given=f"{frames.dtype} {frames.shape}",
                             expected=f"uint8 (B, {self.size.height}, {self.size.width}, 3)",
                             fix="use worldgym.clip.fit_image")
        return torch.cat([self.vae.encode(to_pixels(f, self.vae.dtype))[:, :, 0].float()
                          for f in frames]).to(self.device)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Frames uint8 (B, H, W, 3) of latents of single pictures, as ``encode`` makes them."""
        if tuple(latents_BChw.shape[1:]) != tuple(self.spec.latent_chw):
            raise ShapeError("latents have the wrong shape", given=tuple(latents_BChw.shape),
                             expected=("batch", *self.spec.latent_chw), fix="use World.encode")
        return torch.cat([to_uint8(self.vae.decode(z[None, :, None]))[:, 0] for z in latents_BChw])

    @torch.no_grad()
    def video(self, first_BChw: Tensor, latents_BFChw: Tensor) -> Tensor:
        """Frames uint8 (B, N, H, W, 3) of the latent frames after a given first one."""
        out = []
        for first_Chw, latents_FChw in zip(first_BChw, latents_BFChw, strict=True):
            _, stream = self.vae.decode_next(first_Chw[None, :, None])
            made = latents_FChw.transpose(0, 1)[None]
            out.append(to_uint8(self.vae.decode_next(made, stream)[0]))
        return torch.cat(out)

    # -- begin -------------------------------------------------------------------------------

    def starts(self, frames_BHWC: np.ndarray, context_BLD: Tensor,
               negative_BLD: Tensor | None = None) -> Starts:
        """Starts of one frame uint8 (B, H, W, 3) each; contexts of B prompts, or of one for all."""
        b = len(frames_BHWC)
        return Starts(
            self.encode(frames_BHWC)[:, None], np.zeros((b, 1, *ACTION.shape), np.float32),
            np.ones((b, 1), bool), np.ones(b, np.int64), context_BLD=context_BLD.expand(b, -1, -1),
            negative_BLD=None if negative_BLD is None else negative_BLD.expand(b, -1, -1))

    def _start_extra(self, starts: Starts, features_BKA: Tensor, rows_B1: np.ndarray,
                     reach_BK: np.ndarray) -> dict[str, Tensor]:
        latents = torch.as_tensor(starts.latents_BKChw)[:, -1].to(self.device, torch.float32)
        extra = {"origin": statistics(latents)}
        texts = {"context": starts.context_BLD}
        if self.guided:
            texts["negative"] = starts.negative_BLD
        for name, given in texts.items():
            length, width = self.extra[name][0]
            if given is None or given.ndim != 3 or len(given) != len(latents) or (
                    given.shape[1] > length or given.shape[2] != width):
                raise ShapeError(f"start {name} does not fit", expected=f"({len(latents)}, <= "
                                 f"{length}, {width}), one encoded prompt per start",
                                 given="nothing" if given is None else tuple(given.shape),
                                 fix="encode the prompts with the model's own text encoder")
            text = given.to(self.device, self.weight.dtype)
            if not bool(torch.isfinite(text).all()):
                raise NotFiniteError(f"start {name} is not finite", given="NaN or infinity",
                                     expected="finite numbers", fix="check the text encoder")
            text = torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))
            extra[name] = text
            extra[f"{name}_id"] = torch.tensor([_id(t) for t in text], device=self.device)
        return extra

    def _remember(self, latents_BKChw: Tensor, features_BKA: Tensor, length_B: np.ndarray,
                  starts: Starts, extra: dict[str, Tensor]) -> Tables:
        return Tables.empty(len(length_B))

    # -- actions -----------------------------------------------------------------------------

    def _start_controls(self, actions: np.ndarray, unused: np.ndarray) -> Tensor:
        flat = np.zeros(actions.shape, np.float32)
        if not unused.all():
            flat[~unused] = ACTION.check(actions[~unused])
        return self._to_rows(flat[:, None].repeat(self.rows, 1))

    def _controls(self, raw: np.ndarray, state: WorldState, index: np.ndarray) -> Tensor:
        """Action rows (n, N, 10)."""
        held = ACTION.check(raw, len(index))
        return self._to_rows(held[:, None].repeat(self.spec.frames_per_chunk, 1))

    def _dense_controls(self, raw: np.ndarray, state: WorldState, index: np.ndarray) -> Tensor:
        if len(raw) != len(index):
            raise ShapeError("action batch has the wrong shape", given=raw.shape,
                             expected=(len(index), self.spec.frames_per_chunk, *ACTION.shape),
                             fix="give one action for every slot and frame")
        flat = ACTION.check(raw.reshape(-1, *raw.shape[2:]))
        return self._to_rows(flat.reshape(raw.shape))

    def _to_rows(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(self.device)

    def _with_past(self, state: WorldState, rows_BNA: Tensor) -> Tensor:
        """P rows before the step, then the step's; copies of the oldest known where none is."""
        known = np.minimum(state.step_B * rows_BNA.shape[1], self.rows)
        at = np.arange(self.rows + rows_BNA.shape[1])[None]
        index = torch.from_numpy(np.maximum(at, (self.rows - known)[:, None])).to(self.device)
        both = torch.cat([state.pending_BA, rows_BNA], 1)
        return both.gather(1, index[..., None].expand(-1, -1, both.shape[2]))

    # -- step --------------------------------------------------------------------------------

    def _generate(self, state: WorldState,
                  action_BA: Tensor) -> tuple[Tensor, dict[str, Tensor], Tables]:
        c, h, w = self.spec.latent_chw
        frames, first = self.size.latent_frames, state.latents_BCHW[:, :, None]
        noise = self.temperature * normal(state.keys_B4, 0, (c, frames, h, w), self.device)
        rows, before = action_BA, 0
        if self.remember:
            rows, before = self._with_past(state, action_BA), self.rows
        controls = self.dit.controls(rows[..., BUTTONS:], rows[..., :BUTTONS], frames, before)
        text = self._text(state, "context")
        negative = self._text(state, "negative") if self.guided else None
        x = denoise(self.dit, noise, text, negative, first_BC1hw=first, controls=controls,
                    sampler=self.sampler)
        return x[:, :, 1:].transpose(1, 2).float().contiguous(), state.extra, state.tables

    def _judge(self, state: WorldState, action_BA: Tensor, latents_BFChw: Tensor,
               extra: dict[str, Tensor]) -> tuple[Chunk, dict[str, Tensor]]:
        chunk, extra = super()._judge(state, action_BA, latents_BFChw, extra)
        chunk.video = partial(self.video, state.latents_BCHW, latents_BFChw)
        return chunk, extra

    def _kept(self, state: WorldState, action_BA: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        if self.carry == "frame":
            current = self.encode(chunk.frames()[:, -1].cpu().numpy())
        else:
            current = chunk.latents_BFChw[:, -1].contiguous()
        gap = statistics(current) - state.extra["origin"]
        chunk.drift_B = gap.double().square().mean(1).sqrt().cpu().numpy()
        rows = torch.cat([state.pending_BA, action_BA], 1)[:, -self.rows:].contiguous()
        return current[:, None], rows

    # -- prompts -----------------------------------------------------------------------------

    def _text(self, state: WorldState, name: str) -> TextKV:
        """Keys and values of every slot's prompt, computed once per prompt."""
        ids = state.extra[f"{name}_id"].tolist()
        here: dict[int, TextKV] = {}
        for slot, number in enumerate(ids):
            if number not in here:
                if number not in self._texts:
                    self._texts[number] = self.dit.text(state.extra[name][slot:slot + 1])
                self._texts.move_to_end(number)
                here[number] = self._texts[number]
        while len(self._texts) > self.prompts:
            self._texts.popitem(last=False)
        if len(here) == 1:
            only = here[ids[0]]
            return [(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1))
                    for k, v in only]
        return [(torch.cat([here[n][i][0] for n in ids]), torch.cat([here[n][i][1] for n in ids]))
                for i in range(len(here[ids[0]]))]


def statistics(latents_BChw: Tensor) -> Tensor:
    """Mean and deviation of every channel over the frame, (B, 2 C)."""
    flat = latents_BChw.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2, correction=0)], 1)


def _id(text_LD: Tensor) -> int:
    """63 bits of a hash of an encoded prompt."""
    data = text_LD.float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1
