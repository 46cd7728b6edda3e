"""The engine: a world is five parts (codec, dynamics, controls, memory, heads) and this one loop.

Shapes: B slot, K past frame, F frame of a chunk, C channel, h w latent grid, A action features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.chunk import Chunk
from worldgym.errors import ConfigError, DTypeError, NotFiniteError, ShapeError, StateError
from worldgym.memory import PagePool, PageSpec, SinkWindow, Tables
from worldgym.models.codec import Codec
from worldgym.models.dynamics import Dynamics, before
from worldgym.noise import PASSES, normal, uniform
from worldgym.rollout import Block, CausalStepper, Guided, few_step, multi_step
from worldgym.schedule import FewStep, UniPC
from worldgym.spec import WorldSpec
from worldgym.state import Starts, WorldState, check_slots


class World:
    """A learned world for a batch of slots: ``begin`` makes a state, ``step`` makes the next one.

    Args:
        spec: sizes and rates.
        codec: frames to latents and back.
        dynamics: the network and its action embedding.
        outcome: callable (past_BKChw, action_BA) -> (end chance, rewards (B, 2), danger), with
            a ``frames`` attribute; None = no reward and no end (give the task functions instead).
        policy: context memory; schedule: denoising passes of a step, few (noised again after each)
            or a solver's.
        temperature: standard deviation of the sampler's noise; above 1 what is rare happens
            more often (Ha and Schmidhuber, 2018, do the same to their mixture).
        context_noise: timestep told to the network for frames in memory (0 = clean).
        max_pages: page budget of the pool.
    """

    latent_dtype = torch.float32  # of what a codec makes; ids where latents are tokens
    stands_alone = True  # a latent of a chunk decodes by itself

    def __init__(self, spec: WorldSpec, codec: Codec, dynamics: Dynamics, outcome: Any,
                 policy: SinkWindow, schedule: FewStep | UniPC, *, temperature: float = 1.0,
                 context_noise: float = 0.0, fingerprint: str = "",
                 device: torch.device | str = "cpu", max_pages: int | None = None) -> None:
        n = spec.latents_per_chunk
        if n < 1 or spec.frames_per_chunk % n or (n > 1 and (
                dynamics.cfg.recent or outcome is not None or spec.context_frames < n)):
            raise ConfigError(
                "chunk is too long for this network or its heads", fix="set latents_per_chunk=1",
                given=f"{n} frames, recent {dynamics.cfg.recent}, context {spec.context_frames}",
                expected="1 latent frame per step; more only where no frame reads the very frame "
                "before it (recent=0), no head judges single frames, and a chunk fits the window")
        if not 0 < temperature <= 10:
            raise ConfigError("impossible temperature", given=temperature,
                              expected="a number above 0, at most 10", fix="use 1.0, or about 1.3")
        self.spec, self.device = spec, torch.device(device)
        self.codec, self.dynamics, self.outcome = codec, dynamics, outcome
        self.schedule, self.context_t = schedule, 1000 * context_noise
        self.temperature = temperature
        self.fingerprint = fingerprint
        cfg = dynamics.cfg.wan
        _, h, w = spec.latent_chw
        tokens = (h // cfg.patch_size[1]) * (w // cfg.patch_size[2])
        self.pool = PagePool(
            PageSpec(layers=cfg.num_layers, heads=cfg.num_heads, head_dim=cfg.head_dim,
                     tokens=tokens + spec.subjects), self.device, max_pages=max_pages)
        self.stepper: CausalStepper | Guided = CausalStepper(dynamics.network, self.pool, policy)
        self.history = max(outcome.frames if outcome else 1, spec.context_frames,
                           dynamics.cfg.recent + 1)
        # what else a state holds: name -> (shape, dtype), or for a PerSlot the class of its values
        self.extra: dict[str, Any] = {}
        self.table_rows = 1  # per slot

    @property
    def pending_shape(self) -> tuple[int, ...]:
        """Shape of what a slot keeps of its actions."""
        return (self.spec.action.features,)

    # -- frames ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, frames_BHWC: Tensor | np.ndarray) -> Tensor:
        """Normalised latents (B, C, h, w) of uint8 frames (B, H, W, 3)."""
        return self.codec.encode(torch.as_tensor(frames_BHWC))

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Frames uint8 (B, H, W, 3)."""
        if tuple(latents_BChw.shape[1:]) != tuple(self.spec.latent_chw):
            raise ShapeError("latents have the wrong shape", given=tuple(latents_BChw.shape),
                             expected=("batch", *self.spec.latent_chw), fix="use World.encode")
        z = latents_BChw.to(self.device)  # CPU: row by row; convolutions round by the rows beside
        return torch.cat([self.codec.decode(x) for x in z.split(1 if z.is_cpu else max(1, len(z)))])

    def pictures(self, state: WorldState) -> Tensor:
        """The newest frame of every slot, uint8 (B, H, W, 3)."""
        return self.decode(state.latents_BCHW)

    # -- begin -------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, starts: Starts, seeds: Sequence[int],
              episodes: Sequence[int] | None = None) -> WorldState:
        """State of one slot per start; the current frame is the start's last frame.

        All frames of the start but the last go into memory now; nothing is generated.
        """
        latents, features, length_B = self._check_starts(starts)
        b, k = latents.shape[:2]
        # before the start there is nothing: the oldest real frame stands in for what heads read
        reach = np.maximum(np.arange(k - self.history, k)[None], (k - length_B)[:, None])
        rows = np.arange(b)[:, None]
        extra = self._start_extra(starts, features, rows, reach)
        episodes = [0] * b if episodes is None else episodes
        counters = {"seed_B": _integers(seeds, b, "seeds"),
                    "episode_B": _integers(episodes, b, "episodes"),
                    "step_B": np.zeros(b, np.int64), "branch_B": np.zeros(b, np.int64),
                    "index_B": length_B - 1, "lengths_B": np.minimum(length_B, self.history)}
        tables = self._remember(latents, features, length_B, starts, extra)
        try:
            where = tuple(torch.from_numpy(index).to(self.device) for index in (rows, reach))
            return WorldState(self.pool, self.fingerprint, tables, latents[where],
                              features[:, -1], counters, extra)
        finally:  # the state holds the pages now, or nobody does
            self.pool.decref(tables.pages_BP)

    def restart(self, state: WorldState, slots: object, starts: Starts,
                seeds: Sequence[int] | None = None,
                episodes: Sequence[int] | None = None) -> WorldState:
        """State in which these slots begin anew; every other slot keeps its bits.

        Default: the slots' seeds stay and their episode numbers count up."""
        state.check(self.fingerprint, self.pool)
        index = check_slots(slots, state.num_slots)
        if len(starts) != len(index):
            raise ShapeError("number of starts", given=len(starts), expected=len(index),
                             fix="give one start for every slot to reset")
        fresh = self.begin(starts, state.seed_B[index] if seeds is None else seeds,
                           state.episode_B[index] + 1 if episodes is None else episodes)
        return state.replace(index, fresh)

    # -- step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, state: WorldState, actions: object, slots: object = None,
             per_frame: bool = False) -> tuple[WorldState, Chunk]:
        """Generate one chunk for all slots, or for ``slots`` only.

        Args:
            actions: (n, *action shape), or (n, frames, *action shape) with ``per_frame``.

        Returns:
            The next state and the chunk; the given state stays as it was and usable.
        """
        state.check(self.fingerprint, self.pool)
        index = check_slots(slots, state.num_slots)
        raw = np.asarray(actions)
        if per_frame:
            if raw.ndim < 2 or raw.shape[1] != self.spec.frames_per_chunk:
                raise ShapeError("per-frame actions", given=raw.shape,
                                 expected=(len(index), self.spec.frames_per_chunk, "..."),
                                 fix="give one action per generated frame")
            features = self._dense_controls(raw, state, index)
        else:
            features = self._controls(raw, state, index)
        part = state if slots is None else state.select(index)
        new, chunk = self._advance(part, features)
        chunk.slots = index
        return (new if slots is None else state.replace(index, new)), chunk

    def _advance(self, state: WorldState, action_BA: Tensor) -> tuple[WorldState, Chunk]:
        latents, extra, tables = self._generate(state, action_BA)
        try:
            chunk, extra = self._judge(state, action_BA, latents, extra)
            history, pending = self._kept(state, action_BA, chunk)
            n = latents.shape[1]
            counters = {
                "index_B": state.index_B + n, "step_B": state.step_B + 1,
                "lengths_B": np.minimum(state.lengths_B + n, self.history),
                "seed_B": state.seed_B, "episode_B": state.episode_B, "branch_B": state.branch_B}
            new = WorldState(self.pool, self.fingerprint, tables, history, pending, counters, extra)
        finally:  # the new state holds the pages now, or nobody does
            self.pool.decref(_unowned(tables, state.tables))
        return new, chunk

    def _generate(self, state: WorldState,
                  action_BA: Tensor) -> tuple[Tensor, dict[str, Tensor], Tables]:
        """Latents (B, F, C, h, w) of the next chunk, what else the new state keeps, and the tables
        with every frame committed but the chunk's last."""
        keys = state.keys_B4
        current, last, new, joint = self._blocks(state, action_BA)
        x = self.noise(keys, 0)
        tables, flow, attend = self.stepper.commit_and_flow(
            state.tables, current, self.context_t, last, x, self.schedule.timesteps[0], new, joint)
        try:
            if isinstance(self.schedule, UniPC):
                x0 = multi_step(self.stepper, x, self.schedule, attend, new, flow)
            else:
                x0 = few_step(self.stepper, x, self.schedule, lambda i: self.noise(keys, i),
                              attend, new, flow)
            latents, extra = self._made(state, action_BA, x0)
            if x0.shape[2] > 1 and new.frames > 1:
                tables = self._commit_made(tables, state.tables, x0, new)
        except BaseException:
            self.pool.decref(_unowned(tables, state.tables))
            raise
        return latents, extra, tables

    def _commit_made(self, tables: Tables, old: Tables, x0: Tensor, block: Block) -> Tables:
        """Tables with all frames of a chunk but its last, which the next step commits."""
        kept = self.stepper.context(tables, block.frames - 1)
        given = {"cond_BFD": block.given["cond_BFD"][:, :-1]}
        out, _ = self.stepper.commit(kept, x0[:, :, :-1], self.context_t,
                                     Block(block.index_Bn[:, :-1], given))
        mine = _unowned(tables, old)
        self.pool.decref(mine[~np.isin(mine, kept.pages_BP)])
        return out

    # -- what worlds of another kind change --------------------------------------------------

    def _start_extra(self, starts: Starts, features_BKA: Tensor, rows_B1: np.ndarray,
                     reach_BK: np.ndarray) -> dict[str, Tensor]:
        """What else a state keeps of these (checked) starts; ``reach``: frames of its history."""
        return {}

    def _remember(self, latents_BKChw: Tensor, features_BKA: Tensor, length_B: np.ndarray,
                  starts: Starts, extra: dict[str, Tensor]) -> Tables:
        """Tables with all frames of a start but the last in memory."""
        b, k = latents_BKChw.shape[:2]
        if k == 1:
            return self.stepper.empty(b)
        index = np.arange(k - 1)[None] - (k - length_B)[:, None]
        index = np.where(index >= 0, index, -1)
        there = torch.from_numpy(index >= 0).to(latents_BKChw)[:, None, :, None, None]
        past = latents_BKChw[:, :-1].transpose(1, 2) * there
        past, block = self._past(past, features_BKA[:, :-1], index, starts, extra)
        return self.stepper.prefill(past, self.context_t, block)

    def _past(self, past_BCKhw: Tensor, features_BKA: Tensor, index_BK: np.ndarray,
              starts: Starts, extra: dict[str, Tensor]) -> tuple[Tensor, Block]:
        """Network input of a start's past frames, and their block."""
        recent = self.dynamics.cfg.recent
        return past_BCKhw, Block(index_BK, {
            "cond_BFD": self._condition(features_BKA),
            "recent_BRFhw": before(past_BCKhw, recent) if recent else None})

    def _blocks(self, state: WorldState, action_BA: Tensor) -> tuple[Tensor, Block, Block, dict]:
        """The current frame as network input, its block, the next frame's, and the arguments of
        the network when both run together."""
        n = self.spec.latents_per_chunk
        every = action_BA if action_BA.ndim == 3 else action_BA[:, None].expand(-1, n, -1)
        pending, cond = self._condition(state.pending_BA[:, None]), self._condition(every)
        recent = self._recent(state) if self.dynamics.cfg.recent else None
        new = Block(state.index_B[:, None] + np.arange(1, n + 1)[None], {
            "cond_BFD": cond, "recent_BRFhw": None if recent is None else recent[:, :, 1:]})
        return state.latents_BCHW[:, :, None], Block(state.index_B[:, None]), new, {
            "cond_BFD": torch.cat([pending, cond], 1), "recent_BRFhw": recent}

    def _made(self, state: WorldState, action_BA: Tensor,
              x0: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B, F, C, h, w) of a sample, and what else the next state keeps."""
        return x0.transpose(1, 2).contiguous(), state.extra

    def _kept(self, state: WorldState, action_BA: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """History and pending actions of the state after a chunk."""
        history = torch.cat([state.history_BKChw, chunk.latents_BFChw], 1)
        pending = action_BA if action_BA.ndim == 2 else action_BA[:, -1]
        return history[:, -self.history:].contiguous(), pending

    def _judge(self, state: WorldState, action_BA: Tensor, latents_BFChw: Tensor,
               extra: dict[str, Tensor]) -> tuple[Chunk, dict[str, Tensor]]:
        """The chunk with its rewards and ends, and what else the next state keeps."""
        end_B, rewards_B2, danger_B = self._outcome(state, action_BA)
        chance = end_B.double().cpu().numpy()
        draw = (None if self.outcome is None else  # nothing is drawn where nothing can end
                uniform(state.keys_B4, PASSES["end"], 1).numpy()[:, 0])
        terminated = np.zeros(len(chance), bool) if draw is None else draw < chance
        rewards = rewards_B2.cpu().numpy()
        reward = np.where(terminated, rewards[:, 1], rewards[:, 0]).astype(np.float32)
        b, last = len(latents_BFChw), self.spec.frames_per_chunk - 1
        return Chunk(np.arange(b), latents_BFChw, reward, terminated, chance,
                     np.full(b, last, np.int64), danger_B=danger_B.double().cpu().numpy(),
                     draw_B=draw, ahead=getattr(self.outcome, "ahead", 1),
                     decode=self.decode), extra

    def noise(self, keys_B4: np.ndarray, number: int) -> Tensor:
        """The sampler's noise (B, C, F, h, w) of pass ``number`` for slots with these keys."""
        n, (c, h, w) = self.spec.latents_per_chunk, self.spec.latent_chw
        noise = normal(keys_B4, number, (n * c, h, w), self.device).unflatten(1, (n, c))
        return self.temperature * noise.transpose(1, 2).contiguous()

    def _recent(self, state: WorldState) -> Tensor:
        """The frames before the current and before the next frame, (B, R, 2, h, w)."""
        count = self.dynamics.cfg.recent
        age = np.arange(count + 1)[::-1]
        there = torch.from_numpy(age[None] < state.lengths_B[:, None]).to(state.history_BKChw)
        newest = state.history_BKChw[:, -count - 1:] * there[:, :, None, None, None]
        padded = torch.nn.functional.pad(newest.transpose(1, 2), (0, 0, 0, 0, 0, 1))
        return before(padded, count)[:, :, -2:]

    def _outcome(self, state: WorldState, action_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.outcome is None:
            zero = torch.zeros(len(state.step_B), device=self.device)
            return zero, zero[:, None].expand(-1, 2), zero
        return self.outcome(state.history_BKChw, action_BA)

    # -- actions and checks ------------------------------------------------------------------

    def _controls(self, raw: np.ndarray, state: WorldState, index: np.ndarray) -> Tensor:
        """Action features (n, A) of what was given to ``step`` for these slots, checked."""
        return self.features(self.spec.action.check(raw, len(index)))

    def _dense_controls(self, raw: np.ndarray, state: WorldState, index: np.ndarray) -> Tensor:
        """The same of one action per pixel frame, (n, frames, ...): (n, A), or (n, F, A) with
        several latent frames F, each of which hears the first action of its pixel frames."""
        count = self.spec.latents_per_chunk
        heard = raw[:, ::self.spec.frames_per_chunk // count]
        if count == 1:
            return self._controls(heard[:, 0], state, index)
        return torch.stack([self._controls(heard[:, i], state, index) for i in range(count)], 1)

    def _start_controls(self, actions: np.ndarray, unused: np.ndarray) -> Tensor:
        """Action features (n, A) of a start's frames, checked; ``unused`` rows are null."""
        flat = np.zeros(actions.shape, self.spec.action.dtype)
        if not unused.all():
            flat[~unused] = self.spec.action.check(actions[~unused])
        return self.features(flat, unused)

    def features(self, actions: np.ndarray, null: np.ndarray | None = None) -> Tensor:
        """What the network is told of checked actions (n, *shape), (n, A); ``null`` rows: none."""
        return torch.from_numpy(self.spec.action.encode(actions, null)).to(self.device)

    def _condition(self, features_BFA: Tensor) -> Tensor:
        """Action embedding with at least four rows in the product (bits independent of B)."""
        b, f = features_BFA.shape[:2]
        rows = features_BFA.flatten(0, 1)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, max(0, 4 - len(rows))))
        return self.dynamics.condition(rows)[:b * f].unflatten(0, (b, f))

    def _check_starts(self, starts: Starts) -> tuple[Tensor, Tensor, np.ndarray]:
        """Latents and action features on the device, and lengths, or a named error."""
        latents, action = torch.as_tensor(starts.latents_BKChw), self.spec.action
        if latents.ndim != 5 or tuple(latents.shape[2:]) != tuple(self.spec.latent_chw) or not len(
                latents):
            raise ShapeError("start latents have the wrong shape", given=tuple(latents.shape),
                             expected=("slots >= 1", "frames", *self.spec.latent_chw),
                             fix="encode start frames with World.encode")
        b, k = latents.shape[:2]
        self._check_latents(latents)
        if k > self.spec.context_frames + 1:
            raise ShapeError("start is too long", given=f"{k} frames",
                             expected=f"at most {self.spec.context_frames + 1}",
                             fix="keep the newest frames only")
        length_B, null = np.asarray(starts.length_B), np.asarray(starts.null_BK)
        if (length_B.shape != (b,) or length_B.dtype.kind not in "iu" or length_B.min() < 1
                or length_B.max() > k):
            raise ShapeError("start lengths", given=length_B.tolist(),
                             expected=f"{b} integers in [1, {k}]", fix="every start has a frame")
        actions = np.asarray(starts.actions)
        for name, array, shape in (("actions", actions, (b, k, *action.shape)),
                                   ("null flags", null, (b, k))):
            if array.shape != shape:
                raise ShapeError(f"start {name} have the wrong shape", given=array.shape,
                                 expected=shape, fix="give one for every frame of every start")
        length_B = length_B.astype(np.int64)
        absent = np.arange(k)[None] < (k - length_B)[:, None]
        unused = (null.astype(bool) | absent).reshape(-1)
        features = self._start_controls(actions.reshape(b * k, *action.shape), unused)
        features = features.unflatten(0, (b, k))
        return latents.to(self.device, self.latent_dtype), features, length_B

    def _check_latents(self, latents: Tensor) -> None:
        """Raise a named error unless latents of the right shape hold usable values."""
        if not latents.is_floating_point():
            raise DTypeError("start latents have the wrong dtype", given=latents.dtype,
                             expected="float32", fix="encode start frames with World.encode")
        if not bool(torch.isfinite(latents).all()):
            raise NotFiniteError("start latents are not finite", given="NaN or infinity",
                                 expected="finite latents", fix="check the start bank")


def _unowned(new: Tables, old: Tables) -> np.ndarray:
    """Pages of ``new`` that ``old`` does not hold: just written, on their first reference."""
    pages = new.pages_BP[new.pages_BP >= 0]
    return pages[~np.isin(pages, old.pages_BP)]


def _integers(values: Sequence[int], count: int, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        array = np.zeros(0)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise StateError(f"{name} do not fit", given=values, expected=f"{count} integers",
                         fix=f"give one integer for every slot in {name}")
    return array.astype(np.int64)
