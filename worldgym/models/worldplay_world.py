"""WorldPlay as a world of the engine: a step is a chunk, seen from a camera that remembers.

Shapes: B slot, n latent frame of a chunk, K frame of a start, F latent frame, T raw frame, C latent
channel, h w latent grid, H W pixels, L text token, D text width, A numbers of an action.

A slot keeps all its past latent frames with pose and label (``History``) and chooses a context
among them at every step (``Reconstituted``); nothing derived is kept but the decoder's stream.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym import camera, checkpoint
from worldgym.engine import Chunk, World
from worldgym.errors import ConfigError, NotFiniteError, ShapeError
from worldgym.memory import PagePool, PageSpec, Tables
from worldgym.models.controls import Controls
from worldgym.models.film import Film
from worldgym.models.prope import Cameras
from worldgym.models.worldplay_past import Past
from worldgym.models.worldplay_rollout import TIMESTEPS, ChunkStepper, Moves
from worldgym.noise import PASSES, normal, uniform
from worldgym.reconstituted import WAN_MEMORY, History, Reconstituted
from worldgym.schedule import Euler
from worldgym.spec import Licence, WorldSpec
from worldgym.state import PerSlot, Starts, WorldState

FPS = 16.0  # at which the Wan variant writes its videos
PROMPT_BYTES = 4096  # longest prompt that a state remembers as text
OPENINGS = ("picture", "still")


class WorldPlayWorld(World):
    """A WorldPlay network for a batch of slots, each with its own past and prompt.

    An action is held over the latent frames of a step, or one per raw frame with ``per_frame``, of
    which each latent frame hears its first. Poses are relative to where an episode starts.

    A start of one picture: it is latent frame 0, so the first step makes one latent frame less than
    later ones: the step's frames begin with copies of the start's, which ``first_frame_B`` leaves
    out but for one (13 frames then, of 16), and the first of the step's motions is not heard. A
    start of no picture (``blank_B``): the first step makes that frame too. A start of many frames
    goes into memory as it is, and the first step is like any other; so is a picture's with
    ``opening="still"``: it stands still for a chunk.

    Args:
        dit: ``WorldPlayDiT``. video: its codec (``worldgym.models.film``).
        memory: which past frames a chunk sees. sampler: noise levels.
        controls: what actions mean. K_33: pixel intrinsics.
        opening: what a start of one picture is, see above. positions: see ``ChunkStepper``.
        longest: latent frames of the longest start.
        heads: ``moves(latents_BChw, labels_Bn) -> bool (B, n)``, which moves walls let happen, and
            ``ends(before_BChw, latents_BnChw) -> (B, n)``, chance of an end at each latent frame,
            which pays ``reward``. None: every move happens; no end.
        context_time: timestep of clean context.
    """

    stands_alone = False  # a later latent frame needs the ones before it

    def __init__(self, dit: Any, video: Any, *, memory: Reconstituted = WAN_MEMORY,
                 sampler: Euler | None = None, controls: Controls | None = None,
                 K_33: np.ndarray = camera.DEFAULT_K, opening: str = "picture",
                 positions: str = "reframed", longest: int = 64, heads: Any = None,
                 fps: float = FPS, temperature: float = 1.0, name: str = "worldplay",
                 fingerprint: str = "", licence: Licence | None = None) -> None:
        if opening not in OPENINGS or longest < memory.chunk or not 0 < temperature <= 10:
            raise ConfigError("impossible world", given=f"opening {opening!r}, longest {longest}, "
                              f"temperature {temperature}", fix="leave them out",
                              expected=f"one of {OPENINGS}, at least {memory.chunk}, 0 < t <= 10")
        sampler = sampler or Euler.at(TIMESTEPS)
        self.dit, self.video, self.memory, self.heads = dit, video, memory, heads
        self.stepper: Any = ChunkStepper(dit, memory, sampler, positions=positions)
        self.controls = controls or Controls()
        self.opening, self.temperature, self.outcome = opening, temperature, None
        self.weight = next(dit.parameters())
        self.device, self.K = self.weight.device, camera.normalised(K_33)
        n = memory.chunk
        self.spec = WorldSpec(
            name=name, frame_hw=video.frame_hw, latent_chw=tuple(video.latent_chw),
            action=self.controls.action, fps=fps, frames_per_chunk=video.pictures * n,
            latents_per_chunk=n, context_frames=longest - 1, licence=licence or Licence())
        self.history, self.table_rows = 1, 1
        self.extra: dict[str, Any] = {"past": Past, "given": ((), torch.bool)}
        if dit.cfg.text_len:
            self.extra |= {"context": ((dit.cfg.text_len, dit.cfg.text_dim), self.weight.dtype),
                           "prompt": ((PROMPT_BYTES,), torch.uint8)}
        self.pool = PagePool(PageSpec(layers=1, heads=1, head_dim=1, tokens=1), self.device)
        points = memory.points if memory.points_M3 is not None else memory.scoring
        options = (f"{sampler.timesteps_S.tolist()} {positions} {type(memory).__name__} "
                   f"{memory.total} {memory.temporal} {n} "
                   f"{memory.keep_first} {points} {self.controls} {self.K.tolist()} {opening} "
                   f"{temperature} {video.frame_hw}")
        self.fingerprint = f"{fingerprint or checkpoint.fingerprint(dit)} {options}"

    @property
    def pending_shape(self) -> tuple[int, ...]:
        """The newest actions, one per latent frame."""
        return (self.memory.chunk, self.controls.width)

    # -- frames ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, frames_BHWC: Tensor | np.ndarray) -> Tensor:
        """Latents (B, C, h, w) of single pictures uint8 (B, H, W, 3)."""
        frames = np.asarray(frames_BHWC)
        return torch.stack([self.encode_clip(f[None])[0] for f in frames])

    def encode_clip(self, frames_THWC: np.ndarray) -> Tensor:
        """Latents (F, C, h, w) of a clip uint8 (T, H, W, 3), T = 1 + pictures * (F - 1)."""
        frames, pictures = np.asarray(frames_THWC), self.video.pictures
        if frames.shape[1:] != (*self.spec.frame_hw, 3) or frames.dtype != np.uint8 or (
                not len(frames) or (len(frames) - 1) % pictures):
            raise ShapeError("frames do not fit the world", given=f"{frames.dtype} {frames.shape}",
                             expected=f"uint8 (1 + {pictures} k, *{self.spec.frame_hw}, 3)",
                             fix="resize them, and cut their number")
        return self.video.encode(frames).to(self.device)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Frames uint8 (B, H, W, 3) of latents of single pictures, as ``encode`` makes them."""
        if tuple(latents_BChw.shape[1:]) != tuple(self.spec.latent_chw):
            raise ShapeError("latents have the wrong shape", given=tuple(latents_BChw.shape),
                             expected=("batch", *self.spec.latent_chw), fix="use World.encode")
        return torch.cat([self.video.decode(z[None])[0] for z in latents_BChw])

    def pictures(self, state: WorldState) -> Tensor:
        """The newest frame of every slot, uint8 (B, H, W, 3); black before a blank start's first.
        """
        out = []
        for past, latents, given in zip(state.extra["past"], state.latents_BCHW,
                                        state.extra["given"], strict=True):
            if past.film is not None:
                out.append(past.film.frames(self.video)[-1])
            elif given:
                out.append(self.video.decode(latents[None])[0][0])
            else:
                out.append(torch.zeros(*self.spec.frame_hw, 3, dtype=torch.uint8,
                                       device=self.device))
        return torch.stack(out)

    # -- begin -------------------------------------------------------------------------------

    def start_latents(self, clip_THWC: np.ndarray | None) -> Tensor:
        """Latents (F, C, h, w) of a start: a clip, a picture (which may stand still), nothing."""
        if clip_THWC is None:
            return torch.zeros(1, *self.spec.latent_chw, device=self.device)
        clip, n, p = np.asarray(clip_THWC), self.memory.chunk, self.video.pictures
        if len(clip) == 1 and self.opening == "still":
            clip = np.repeat(clip, 1 + p * (n - 1), 0)
        z = self.encode_clip(clip)
        if len(z) != 1 and len(z) % n:
            raise ShapeError("a start of broken chunks", given=f"{len(clip)} frames",
                             expected=f"one picture, or {1 + p * (n - 1)} + {p * n} j frames",
                             fix=f"keep the newest {1 + p * max(len(z) // n * n - 1, 0)}")
        return z

    def starts(self, clips: list[np.ndarray | Tensor | None], contexts: list[Tensor] | None = None,
               prompts: list[str] | None = None,
               poses: list[np.ndarray | None] | None = None) -> Starts:
        """Starts of clips uint8 (T, H, W, 3), of one picture or of whole chunks; None: of nothing.

        Args:
            clips: or what ``start_latents`` made of them.
            contexts: encoded prompts (<= L, D), where the network reads text; prompts: the texts.
            poses: c2w (F, 4, 4) of the latent frames of each clip; None: the camera stood still.
        """
        rows = [c if isinstance(c, Tensor) else self.start_latents(c) for c in clips]
        b, k = len(rows), max(len(z) for z in rows)
        latents = torch.zeros(b, k, *self.spec.latent_chw, device=self.device)
        c2w = np.broadcast_to(np.eye(4), (b, k, 4, 4)).copy()
        for i, z in enumerate(rows):
            latents[i, k - len(z):] = z
            own = None if poses is None else poses[i]
            if own is not None and clips[i] is not None:
                own = camera.check_poses(own)
                if len(own) != len(z):
                    raise ShapeError("poses and frames of a start differ in number",
                                     given=f"{len(own)} poses", expected=f"{len(z)} poses, one "
                                     "per latent frame", fix="give the pose of every latent frame")
                if len(z) == 1 and np.abs(own[0] - np.eye(4)).max() > 1e-9:
                    raise ConfigError("a pose of a single picture", given=own[0].tolist(),
                                      expected="none: an episode that begins with a picture begins "
                                      "at the identity", fix="leave the pose out")
                c2w[i, k - len(z):] = own
        length = np.array([len(z) for z in rows])
        action = self.spec.action
        return Starts(
            latents, np.zeros((b, k, *action.shape), action.dtype), np.ones((b, k), bool), length,
            context_BLD=None if contexts is None else torch.stack(
                [self._padded(c) for c in contexts]),
            prompts_B=None if prompts is None else np.array(prompts, object), c2w_BK44=c2w,
            blank_B=np.array([c is None for c in clips]))

    def _padded(self, context_LD: Tensor) -> Tensor:
        length, width = self.extra["context"][0]
        context = torch.as_tensor(context_LD).to(self.device, self.weight.dtype)
        if context.ndim != 2 or context.shape[1] != width or len(context) > length:
            raise ShapeError("prompt encoding does not fit", given=tuple(context.shape),
                             expected=f"(<= {length}, {width})",
                             fix="encode the prompt with the model's own text encoder")
        if not bool(torch.isfinite(context).all()):
            raise NotFiniteError("prompt encoding is not finite", given="NaN or infinity",
                                 expected="finite numbers", fix="check the text encoder")
        return torch.nn.functional.pad(context, (0, 0, 0, length - len(context)))

    def _start_extra(self, starts: Starts, features_BKA: Tensor, rows_B1: np.ndarray,
                     reach_BK: np.ndarray) -> dict[str, Any]:
        latents = torch.as_tensor(starts.latents_BKChw).to(self.device, torch.float32)
        b, k = latents.shape[:2]
        c2w = np.broadcast_to(np.eye(4), (b, k, 4, 4)) if starts.c2w_BK44 is None else (
            starts.c2w_BK44)
        blank = np.zeros(b, bool) if starts.blank_B is None else starts.blank_B
        pasts = []
        for i, length in enumerate(np.asarray(starts.length_B).tolist()):
            past = Past(History.empty(self.memory.chunk), self.video)
            if length > 1:
                own = latents[i, k - length:].clone()  # not a part of the batch, which it outlives
                poses = camera.check_poses(c2w[i, k - length:])
                if length % self.memory.chunk:
                    raise ShapeError("a start of broken chunks", given=f"{length} latent frames",
                                     expected=f"1, or a multiple of {self.memory.chunk}",
                                     fix="use WorldPlayWorld.starts")
                K = np.broadcast_to(self.K, (length, 3, 3))
                past = Past(past.history.append(own, camera.inverse(poses), K,
                                                camera.labels_of(poses)), self.video, Film(own))
            pasts.append(past)
        extra: dict[str, Any] = {"past": PerSlot(pasts),
                                 "given": torch.from_numpy(~blank).to(self.device)}
        if "context" in self.extra:
            if starts.context_BLD is None or len(starts.context_BLD) != b:
                raise ShapeError("start context does not fit", given="nothing" if
                                 starts.context_BLD is None else tuple(starts.context_BLD.shape),
                                 expected=f"({b}, <= L, D), one encoded prompt per start",
                                 fix="encode the prompts with the model's own text encoder")
            texts = [""] * b if starts.prompts_B is None else list(starts.prompts_B)
            extra["context"] = torch.stack([self._padded(c) for c in starts.context_BLD])
            extra["prompt"] = torch.stack([text_bytes(t) for t in texts]).to(self.device)
        return extra

    def _remember(self, latents_BKChw: Tensor, features_BKA: Tensor, length_B: np.ndarray,
                  starts: Starts, extra: dict[str, Any]) -> Tables:
        return Tables.empty(len(length_B))

    def tell(self, state: WorldState, slots: Any, contexts: list[Tensor],
             prompts: list[str]) -> WorldState:
        """The state with other prompts in some slots; they count from the next step on."""
        if "context" not in self.extra:
            raise ConfigError("this world reads no text", given=repr(prompts[0])[:60],
                              expected="a network with a text encoder", fix="leave prompts out")
        context, prompt = state.extra["context"].clone(), state.extra["prompt"].clone()
        for slot, encoded, text in zip(slots, contexts, prompts, strict=True):
            context[slot], prompt[slot] = self._padded(encoded), text_bytes(text).to(prompt)
        return state.with_extra(context=context, prompt=prompt)

    def prompts(self, state: WorldState) -> list[str]:
        """The prompt of every slot."""
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in state.extra["prompt"].cpu()]

    # -- actions -----------------------------------------------------------------------------

    def _start_controls(self, actions: np.ndarray, unused: np.ndarray) -> Tensor:
        return torch.zeros(len(actions), *self.pending_shape, device=self.device)

    def _controls(self, raw: np.ndarray, state: WorldState, index: np.ndarray) -> Tensor:
        held = self.spec.action.check(raw, len(index)).reshape(len(index), 1, -1)
        return self._to_rows(held.repeat(self.memory.chunk, 1))

    def _dense_controls(self, raw: np.ndarray, state: WorldState, index: np.ndarray) -> Tensor:
        if len(raw) != len(index):
            raise ShapeError("action batch has the wrong shape", given=raw.shape, fix="give one "
                             "action for every slot and frame", expected=(
                                 len(index), self.spec.frames_per_chunk, *self.spec.action.shape))
        flat = self.spec.action.check(raw.reshape(-1, *raw.shape[2:]))
        rows = flat.reshape(len(index), self.spec.frames_per_chunk, -1)
        return self._to_rows(rows[:, ::self.video.pictures])

    def _to_rows(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(self.device)

    def _moves(self, state: WorldState, action_BnA: Tensor) -> Moves:
        """Poses and labels of the coming chunk of every slot."""
        rows = action_BnA.cpu().numpy()
        read = [self.controls.read(r) for r in rows]
        motions = np.stack([m for m, _ in read])
        if self.heads is not None:
            told = np.stack([camera.labels_of(camera.walk(m))[1:] if own is None else own
                             for m, own in read])
            there = self.heads.moves(state.latents_BCHW, torch.from_numpy(told).to(self.device))
            moves = [camera.FORWARD, camera.RIGHT, camera.DOWN]
            motions[..., moves] *= there.cpu().numpy()[..., None]
        w2c, labels = [], []
        for i, past in enumerate(state.extra["past"]):
            begins = not len(past.history)
            here = np.eye(4) if begins else camera.inverse(past.history.of("w2c")[-1])
            path = camera.walk(motions[i, int(begins):], here)
            own = read[i][1]
            row = camera.labels_of(path)[1:] if own is None else own[int(begins):]
            w2c.append(camera.inverse(path if begins else path[1:]))
            labels.append(np.concatenate([[0], row]) if begins else row)
        poses = torch.from_numpy(np.stack(w2c)).to(self.device)
        K = torch.from_numpy(self.K).to(self.device).expand(*poses.shape[:2], 3, 3)
        return Moves(Cameras(poses, K), np.stack(labels).astype(np.int64))

    # -- step --------------------------------------------------------------------------------

    def noise(self, keys_B4: np.ndarray, number: int) -> Tensor:
        """The sampler's noise (B, C, n, h, w) of a chunk."""
        c, h, w = self.spec.latent_chw
        return self.temperature * normal(keys_B4, number, (c, self.memory.chunk, h, w),
                                         self.device)

    def _generate(self, state: WorldState,
                  action_BA: Tensor) -> tuple[Tensor, dict[str, Any], Tables]:
        pasts, moves = state.extra["past"], self._moves(state, action_BA)
        noise, given = self.noise(state.keys_B4, 0), state.extra["given"].cpu().numpy()
        text = state.extra.get("context")
        latents, grown = torch.empty_like(noise), list(pasts)
        begins = np.array([not len(p.history) for p in pasts]) & given
        for group in (np.flatnonzero(begins), np.flatnonzero(~begins)):
            if not len(group):
                continue
            where = torch.from_numpy(group).to(self.device)
            first = state.latents_BCHW[where][:, :, None] if begins[group[0]] else None
            made, histories, seen = self.stepper.step(
                [pasts[i].history for i in group], noise[where], moves.rows(group.tolist()),
                None if text is None else text[where], first)
            latents[where] = made
            for row, i in enumerate(group):
                streams = self.video.pictures > 1  # else a frame needs none before it
                film = Film(made[row].transpose(0, 1).clone(), pasts[i].film if streams else None)
                grown[i] = Past(histories[row], self.video, film, seen[row])
        return (latents.transpose(1, 2).float().contiguous(),
                state.extra | {"past": PerSlot(grown)}, state.tables)

    def _judge(self, state: WorldState, action_BA: Tensor, latents_BFChw: Tensor,
               extra: dict[str, Any]) -> tuple[Chunk, dict[str, Any]]:
        chunk, extra = super()._judge(state, action_BA, latents_BFChw, extra)
        pictures, pasts = self.video.pictures, extra["past"]
        n, total = self.memory.chunk, self.memory.total
        begins = np.array([not len(p.history) for p in state.extra["past"]])
        if self.heads is not None:
            chance = self.heads.ends(state.latents_BCHW, latents_BFChw).double().cpu().numpy()
            draws = uniform(state.keys_B4, PASSES["end"], n).numpy()
            hit = draws < chance
            chunk.terminated_B = hit.any(1)
            chunk.end_probability_B = 1 - np.prod(1 - chance, 1)
            chunk.danger_B, chunk.draw_B = chunk.end_probability_B, draws[:, 0]
            chunk.end_frame_B = np.where(chunk.terminated_B, pictures * (hit.argmax(1) + 1) - 1,
                                         chunk.end_frame_B)
            chunk.reward_B = (self.heads.reward * chunk.terminated_B).astype(np.float32)
        chunk.video = partial(self._frames, [p.film for p in pasts], begins)
        chunk.first_frame_B = np.where(begins, pictures - 1, 0)
        seen = np.full((len(pasts), total), -1, np.int64)
        for row, past in zip(seen, pasts, strict=True):
            row[:len(past.seen)] = past.seen
        w2c = np.stack([p.history.of("w2c")[-n:] for p in pasts])
        chunk.notes = {"poses": camera.inverse(w2c), "retrieved": seen}
        return chunk, extra

    def _frames(self, films: list[Film], begins_B: np.ndarray) -> Tensor:
        """Frames uint8 (B, T, H, W, 3); those of a beginning have copies of their first in front.
        """
        out = []
        for film, begins in zip(films, begins_B, strict=True):
            made = film.frames(self.video)
            if begins and self.video.pictures > 1:
                made = torch.cat([made[:1].expand(self.video.pictures - 1, -1, -1, -1), made])
            out.append(made)
        return torch.stack(out)

    def _kept(self, state: WorldState, action_BA: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        return chunk.latents_BFChw[:, -1:].contiguous(), action_BA


def text_bytes(text: str) -> Tensor:
    """A prompt as ``PROMPT_BYTES`` bytes, zeros behind it."""
    data = text.encode()
    if len(data) > PROMPT_BYTES or b"\0" in data:
        raise ConfigError("prompt is too long", given=f"{len(data)} bytes",
                          expected=f"at most {PROMPT_BYTES}, and no zero byte", fix="shorten it")
    return torch.frombuffer(bytearray(data.ljust(PROMPT_BYTES, b"\0")), dtype=torch.uint8)
