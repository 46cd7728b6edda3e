"""The one batched core behind every face: slots, seeds, resets, steps, observations.

Shapes: B slots, n reset or stepped slots, F pixel frames of a chunk, H W pixels, C latent channels.
The core's state is one immutable value that every call replaces at its very end, so that a call
that raises leaves the env exactly as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from worldgym.envs import outcome, spaces
from worldgym.envs.opening import Opening, ViewConfig, decode
from worldgym.envs.state import CoreState, EnvState
from worldgym.envs.tasks import Task
from worldgym.errors import (
    ClosedError,
    NotFiniteError,
    ResetNeeded,
    ShapeError,
    SlotError,
    StateError,
)


@dataclass(slots=True)
class Batch:
    """What one step made, as fresh numpy arrays; rows of slots that were only reset hold zeros."""

    obs_B: np.ndarray
    reward_B: np.ndarray  # float64
    terminated_B: np.ndarray
    truncated_B: np.ndarray
    reason_B: np.ndarray  # int8, index into outcome.REASONS
    last_frame_B: np.ndarray  # int64, the last frame that counts
    length_B: np.ndarray  # int64 steps of the episode so far
    return_B: np.ndarray  # float64
    stepped_B: np.ndarray  # False: this call only reset the slot
    frames_BFHWC: np.ndarray | None = None
    uncertainty_B: np.ndarray | None = None
    drift_B: np.ndarray | None = None
    first_frame_B: np.ndarray | None = None  # the first frame that counts, where it is not 0
    notes: dict[str, np.ndarray] = field(default_factory=dict)  # what else the world tells
    final_obs: np.ndarray | None = None  # same-step autoreset: last observations of ``finished``
    finished: np.ndarray | None = None  # slot numbers
    rewards_BP: np.ndarray | None = None  # several players: float64 each
    ended_BP: np.ndarray | None = None  # out for good, in this step or before


class DreamCore:
    """B dreams of one task; every face is a thin translation of this class.

    Args:
        task: what is dreamt.
        num_slots: B, at least 1.
        view: what is shown.
    """

    def __init__(self, task: Task, num_slots: int, view: ViewConfig) -> None:
        if not isinstance(num_slots, int | np.integer) or isinstance(num_slots, bool) or (
            num_slots < 1
        ):
            raise SlotError("impossible number of slots", given=repr(num_slots),
                            expected="an int of at least 1", fix="pass num_envs=1")
        self.task, self.view, self.num_slots = task, view, int(num_slots)
        self.spec = task.world.spec
        self.frames = int(self.spec.frames_per_chunk)
        self.per_frame = view.actions == "per_frame"
        self.observation_space = spaces.observation_space(
            self.spec, view.observation, view.frame_stack)
        self.action_space = spaces.action_space(
            self.spec.action, self.frames if self.per_frame else None, view.flat_actions)
        self._in_parts = bool(self.spec.action.parts) and not view.flat_actions
        # what else reset may be told, where the starts know how to use it
        self.start_options: tuple[str, ...] = tuple(getattr(task.starts, "options", ()))
        frame_like = view.observation == "frame"
        self._newest = 3 if frame_like else int(self.spec.latent_chw[0])
        self._opening = Opening(task, view, self.num_slots)
        self._state: CoreState | None = None
        self.closed = False

    # ------------------------------------------------------------------ facts

    @property
    def control_rate(self) -> float:
        """Steps per second of game time."""
        return float(self.spec.fps) / self.frames

    def metadata(self) -> dict[str, Any]:
        """What a caller must know, as data."""
        return {
            "world": self.spec.name,
            "frames_per_chunk": self.frames,
            "frame_rate_hz": float(self.spec.fps),
            "control_rate_hz": self.control_rate,
            "observation": self.view.observation,
            "frame_stack": int(self.view.frame_stack),
            "observation_frame": "last of the chunk, or the one in which the episode ended",
            "action_mapping": self.view.actions,
            "horizon": self.task.horizon,
        }

    def fits(self) -> dict[str, Any]:
        """What a saved state must agree with."""
        return {
            "world": self.spec.name, "latent_chw": list(self.spec.latent_chw),
            "observation": self.view.observation, "frame_stack": int(self.view.frame_stack),
            "action_mapping": self.view.actions, "num_slots": self.num_slots,
        }

    @property
    def done_B(self) -> np.ndarray:
        """Slots whose episode ended and was not reset (a copy)."""
        return self.ready().done_B.copy()

    def ready(self) -> CoreState:
        """The current state.

        Raises:
            ClosedError, ResetNeeded
        """
        self.check_open()
        if self._state is None:
            raise ResetNeeded("step before reset", given="an env that was never reset",
                              expected="reset() first", fix="call reset(seed=...)")
        return self._state

    def check_open(self) -> None:
        """Raise ClosedError after ``close``."""
        if self.closed:
            raise ClosedError("the env is closed", given="a call after close()",
                              expected="an open env", fix="make a new env")

    # ------------------------------------------------------------------ reset

    def reset(
        self,
        *,
        slots: Sequence[int] | None = None,
        seeds: Sequence[int | None] | None = None,
        starts: Sequence[int | None] | None = None,
        frames: Sequence[np.ndarray | None] | None = None,
        texts: Sequence[dict | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Begin new episodes in ``slots`` (None: all); the other slots' bytes stay as they are.

        Args:
            seeds: one per slot; None keeps a slot's seed and counts its episode up, or draws a
                seed from the operating system if it never had one.
            starts: index into the start bank per slot; None samples by (seed, episode).
            frames: the user's own start image (H, W, 3) uint8 per slot, None: from the bank.
            texts: "prompt" and "negative_prompt" per slot, for worlds that are told what to show.

        Returns:
            Observations of all slots (a copy) and start index per reset slot (-1: user's image).
        """
        self.check_open()
        if slots is not None:
            self.ready()
        elif self._state is not None:
            slots = range(self.num_slots)
        which = range(self.num_slots) if slots is None else slots
        slot_n = np.asarray(which, np.int64)
        new, index_n = self._opening.begin(self._state, slot_n, seeds, starts, frames, texts)
        self._state = new
        return new.stack_B.copy(), index_n

    # ------------------------------------------------------------------ step

    def step(self, actions: Any, autoreset: str = "Disabled") -> Batch:
        """One chunk in every slot.

        Args:
            actions: (B, *shape), or (B, F, *shape) with the per-frame mapping.
            autoreset: "NextStep", "SameStep" or "Disabled" (Gymnasium's words), or "Stay": slots
                whose episode is over stay as they are.

        Raises:
            ResetNeeded: a slot's episode is over and ``autoreset`` says nothing of that.
        """
        state = self.ready()
        due_B = state.done_B
        if due_B.any() and autoreset not in ("NextStep", "Stay"):
            raise ResetNeeded(
                "step after the end of an episode", given=f"slots {np.flatnonzero(due_B).tolist()}",
                expected="a reset of these slots first", fix="call reset()")
        actions_B = self._check_actions(actions, ~due_B)
        if due_B.any():
            batch, state = self._advance(state, actions_B, np.flatnonzero(~due_B))
            if autoreset == "NextStep":
                state, _ = self._opening.begin(state, np.flatnonzero(due_B))
        else:
            batch, state = self._advance(state, actions_B, None)
        if autoreset == "SameStep" and state.done_B.any():
            batch.finished = np.flatnonzero(state.done_B)
            batch.final_obs = self._last_seen(state, batch.finished)
            state, _ = self._opening.begin(state, batch.finished)
        batch.obs_B = state.stack_B.copy()
        self._state = state
        return batch

    def _last_seen(self, state: CoreState, slots: np.ndarray) -> Any:
        """Last observations of these slots, whose episodes are over."""
        return state.stack_B[slots]

    def _note(self, batch: Batch, chunk: Any, rows: Any) -> None:
        """Whatever else a core keeps of a chunk; ``rows``: the stepped slots."""

    def _check_actions(self, actions: Any, live_B: np.ndarray) -> np.ndarray:
        spec = self.spec.action
        if self._in_parts:
            actions = spaces.join_parts(spec, actions)
        try:
            array = np.asarray(actions)
        except ValueError as error:  # rows of different lengths
            raise ShapeError("action batch is ragged", given=repr(actions)[:80],
                             expected=f"an array of shape (slots, *{spec.shape})",
                             fix="give every slot an action of the same shape") from error
        lead = (self.num_slots, self.frames) if self.per_frame else (self.num_slots,)
        if array.shape != lead + spec.shape:
            raise ShapeError(
                "action batch has the wrong shape", given=array.shape,
                expected=f"{lead + spec.shape} (slots{', frames' * self.per_frame}, *action)",
                fix="give one action for every slot" + " and frame" * self.per_frame)
        out = np.zeros(array.shape, spec.dtype)  # rows of slots about to be reset are ignored
        if live_B.any():
            rows = array[live_B]
            out[live_B] = spec.check(rows.reshape(-1, *spec.shape)).reshape(rows.shape)
        return out

    def _advance(self, state: CoreState, actions_B: np.ndarray, live: np.ndarray | None) -> Any:
        task, slots = self.task, self.num_slots
        batch = Batch(
            obs_B=state.stack_B, reward_B=np.zeros(slots), terminated_B=np.zeros(slots, bool),
            truncated_B=np.zeros(slots, bool), reason_B=np.zeros(slots, np.int8),
            last_frame_B=np.zeros(slots, np.int64), length_B=state.elapsed_B.copy(),
            return_B=state.return_B.copy(), stepped_B=np.ones(slots, bool))
        if live is not None:
            batch.stepped_B = np.isin(np.arange(slots), live)
            if not len(live):
                return batch, state
        rows = slice(None) if live is None else live
        acts = actions_B[rows]
        spread = None
        if task.wants_uncertainty:
            before = state.world if live is None else state.world.select(live.tolist())
            spread = self._spread(before, acts)
        world, chunk = task.world.step(
            state.world, acts, slots=None if live is None else live.tolist(),
            per_frame=self.per_frame)
        reward, ended, last = outcome.judge(task, chunk, self.frames)
        self._note(batch, chunk, rows)
        if task.hazard:
            reward = reward - task.hazard * outcome.danger(chunk)
        if spread is not None:
            reward = reward - task.penalty * spread
            batch.uncertainty_B = np.zeros(slots)
            batch.uncertainty_B[rows] = spread
        batch.length_B[rows] += 1
        batch.reward_B[rows], batch.terminated_B[rows], batch.last_frame_B[rows] = (
            reward, ended, last)
        batch.return_B += batch.reward_B
        first = getattr(chunk, "first_frame_B", None)
        if first is not None and first.any():
            batch.first_frame_B = np.zeros(slots, np.int64)
            batch.first_frame_B[rows] = first
        for name, value in getattr(chunk, "notes", {}).items():
            batch.notes[name] = np.zeros((slots, *value.shape[1:]), value.dtype)
            batch.notes[name][rows] = value
        drift = outcome.drift(task, chunk)
        if drift is not None:
            batch.drift_B = np.zeros(slots)
            batch.drift_B[rows] = drift
        reason = outcome.truncations(batch.length_B[rows], ended, spread, task, drift)
        batch.reason_B[rows] = reason
        batch.truncated_B = batch.reason_B > 0
        return batch, self._observed(state, world, chunk, batch, rows, live, last)

    def _observed(self, state: CoreState, world: Any, chunk: Any, batch: Batch, rows: Any,
                  live: np.ndarray | None, last: np.ndarray) -> CoreState:
        """The next state, its stack moved on by the newest observation of the stepped slots."""
        view, picks = self.view, np.arange(len(last))
        frames: Any = None
        if view.frames_wanted or view.observation == "frame":
            frames = spaces.to_numpy(chunk.frames())
        if view.observation == "frame":
            fresh = frames[picks, last]
        else:
            latents = spaces.to_numpy(chunk.latents_BFChw)
            fresh = latents[picks, last * latents.shape[1] // self.frames].astype(
                np.float32, copy=False)  # ids are whole numbers
            if not np.isfinite(fresh).all():
                raise NotFiniteError("the world dreamt a latent that is not finite",
                                     given=f"step {batch.length_B.tolist()[:8]}",
                                     expected="finite latents", fix="check the world's weights")
        stack = spaces.push(state.stack_B[rows], fresh, view.observation)
        if view.frames_wanted:
            batch.frames_BFHWC = np.zeros((self.num_slots, *frames.shape[1:]), np.uint8)
            batch.frames_BFHWC[rows] = frames
        if live is not None:
            full = state.stack_B.copy()
            full[rows] = stack
            stack = full
        done_B = (batch.terminated_B | batch.truncated_B) | (state.done_B & ~batch.stepped_B)
        return replace(state, world=world, stack_B=stack, elapsed_B=batch.length_B.copy(),
                       return_B=batch.return_B.copy(), done_B=done_B)

    def _spread(self, world_state: Any, actions: np.ndarray) -> np.ndarray:
        held = actions[:, 0] if self.per_frame else actions  # spread is measured with held actions
        spread = spaces.to_numpy(self.task.uncertainty(world_state, held)).astype(np.float64)
        if spread.shape != (len(actions),) or not np.isfinite(spread).all():
            raise NotFiniteError("uncertainty is not one finite number per slot",
                                 given=spread.tolist(), expected=f"shape ({len(actions)},)",
                                 fix="repair the task's spread callable")
        return spread

    def change(self, how: Callable[[Any], Any]) -> None:
        """Go on from the world's state as ``how`` changes it; if it raises, nothing changed."""
        state = self.ready()
        self._state = replace(state, world=how(state.world))

    # ------------------------------------------------------------------ frames and state

    def current_frames(self) -> np.ndarray:
        """The newest frame of every slot, uint8 (B, H, W, 3), a copy; decoded if need be."""
        shown = spaces.newest(self.ready().stack_B, self._newest, self.view.observation)
        if self.view.observation == "frame":
            return shown.copy()
        if not getattr(self.task.world, "stands_alone", True):  # a video's latent: show the state's
            return spaces.to_numpy(self.task.world.pictures(self.ready().world)).copy()
        return decode(self.task.world, shown).copy()

    def get_state(self, np_random: dict | None = None) -> EnvState:
        """The whole state; ``np_random`` is the face's generator state."""
        self.check_open()
        core = None if self._state is None else self._state.copy()
        return EnvState(core=core, np_random=np_random, fits=self.fits())

    def set_state(self, state: EnvState) -> None:
        """Go on from ``state``.

        Raises:
            StateError: not a state, or one of another world, observation or number of slots.
        """
        self.check_open()
        if not isinstance(state, EnvState):
            raise StateError("not a state", given=type(state).__name__, expected="EnvState",
                             fix="pass what get_state() returned, or use load_state(path)")
        ours = self.fits()
        wrong = {k: state.fits.get(k) for k in ours if state.fits.get(k) != ours[k]}
        if wrong:
            raise StateError("the state belongs to another env", given=wrong,
                             expected={k: ours[k] for k in wrong},
                             fix="make the env with the settings that the state was saved with")
        self._state = None if state.core is None else state.core.copy()

    def forked(self, n: int, fresh: bool) -> list[EnvState]:
        """``n`` copies of the state, each with noise of its own if ``fresh``."""
        many = self.ready().world.fork(n, fresh=fresh)  # copies of a slot lie next to each other
        out = []
        for i in range(n):
            state = self.get_state()
            assert state.core is not None  # ready() was called
            world = many.select(np.arange(i, n * self.num_slots, n))
            out.append(replace(state, core=replace(state.core, world=world)))
        return out

    def close(self) -> None:
        """Give the world's pages back; every later call raises ClosedError."""
        if self._state is not None:
            self._state.world.release()
        self._state, self.closed = None, True
