"""Stepping a causal DiT through paged memory: denoise a block, commit it, or both in one pass.

Shapes: B slot, C channel, n frames of a block, H W latent height and width, P page column.
The same few functions run the published rollouts (a separate cache pass after every block) and the
environments (the cache pass of the last block rides along with the first denoising pass of the
next: same numbers, one network call less).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from worldgym.memory import PagedAttend, PagePool, Policy, Tables
from worldgym.schedule import FewStep, UniPC, x0_from_flow


@dataclass(frozen=True, slots=True)
class Block:
    """A block of frames on its way through the network.

    ``index_Bn``: absolute frame indices; ``given``: further arguments of the network for these
    frames (``cond_BFD``) or for the whole call (``text_kv``); ``within_BTT``: see ``PagedAttend``.
    """

    index_Bn: np.ndarray
    given: dict = field(default_factory=dict)
    within_BTT: Tensor | None = None

    @property
    def frames(self) -> int:
        """n."""
        return self.index_Bn.shape[1]


class CausalStepper:
    """Denoise and commit blocks with the memory ``policy`` in ``pool``."""

    def __init__(self, dit: Callable[..., Tensor], pool: PagePool, policy: Policy) -> None:
        self.dit, self.pool, self.policy = dit, pool, policy

    def empty(self, slots: int) -> Tables:
        """Tables of slots without memory."""
        return Tables.empty(slots)

    def context(self, tables: Tables, frames: int) -> Tables:
        """The pages that a new block of ``frames`` frames sees."""
        return tables.keep(self.policy.select(tables.frames_BP, frames))

    def _columns(self, frames: int) -> int | None:
        """Page columns to pad to, so that shapes do not depend on how full the tables are."""
        bound = self.policy.bound()
        return None if bound is None else max(0, bound - frames)

    def _call(self, x_BCnHW: Tensor, t_Bn: Tensor, attend: Callable, index_Bn: np.ndarray,
              given: dict) -> Tensor:
        index = torch.from_numpy(np.maximum(index_Bn, 0)).to(x_BCnHW.device)
        return self.dit(x_BCnHW, t_Bn, attend=attend, frame_index_BF=index, **given)

    def reader(self, kept: Tables, block: Block) -> PagedAttend:
        """An ``attend`` with which a block sees its context and itself."""
        return self._attend(kept, block, None)

    def _attend(self, kept: Tables, block: Block, write: np.ndarray | None) -> PagedAttend:
        b, p = kept.pages_BP.shape
        sees = np.ones((b, block.frames, p + block.frames), bool)
        return PagedAttend(self.pool, kept, sees, self._columns(block.frames), write,
                           within_BTT=block.within_BTT)

    def flow(self, x_BCnHW: Tensor, t: float, attend: Callable, block: Block) -> Tensor:
        """Flow of a noisy block at timestep ``t``."""
        t_Bn = torch.full((len(x_BCnHW), block.frames), t, device=x_BCnHW.device)
        return self._call(x_BCnHW, t_Bn, attend, block.index_Bn, block.given)

    def commit(self, kept: Tables, x_BCnHW: Tensor, t: float,
               block: Block) -> tuple[Tables, Tensor]:
        """The cache pass: write the keys and values of clean frames; returns (tables, flow).

        The new pages hold one reference, the caller's.
        """
        ids = self.pool.alloc(block.index_Bn.size).reshape(block.index_Bn.shape)
        with self._or_give_back(ids):
            flow = self.flow(x_BCnHW, t, self._attend(kept, block, ids), block)
        self.pool.seal(ids.ravel())
        return kept.append(ids, block.index_Bn), flow

    @contextmanager
    def _or_give_back(self, ids: np.ndarray) -> Iterator[None]:
        """Pages allocated for a network call go back to the pool if it fails or is interrupted."""
        try:
            yield
        except BaseException:
            self.pool.decref(ids)
            raise

    def prefill(self, x_BCKHW: Tensor, t: float, block: Block) -> Tables:
        """Cache pass over a whole start clip at once; entries of ``index_Bn`` below 0 are absent.

        Each frame sees the present frames before it that the policy would have kept.
        """
        index, (b, k) = block.index_Bn, block.index_Bn.shape
        present = index >= 0
        sees = np.zeros((b, k, k), bool)
        seen_BP = np.full((b, 0), -1, np.int64)
        for frame in range(k):
            kept = self.policy.select(seen_BP, 1) if frame else np.zeros((b, 0), bool)
            sees[:, frame, :frame] = kept
            sees[:, frame, frame] = True
            seen_BP = np.concatenate([np.where(kept, seen_BP, -1), index[:, frame:frame + 1]], 1)
        ids = np.full((b, k), -1, np.int64)
        ids[present] = self.pool.alloc(int(present.sum()))
        with self._or_give_back(ids):
            attend = PagedAttend(self.pool, Tables.empty(b), sees, 0, ids,
                                 within_BTT=block.within_BTT)
            self.flow(x_BCKHW, t, attend, block)
        self.pool.seal(ids[present])
        every = Tables(ids, np.where(present, index, -1))
        tables = every.keep(seen_BP >= 0)
        self.pool.decref(ids[seen_BP < 0])
        return tables

    def commit_and_flow(self, tables: Tables, last_BCnHW: Tensor, last_t: float, last: Block,
                        x_BCnHW: Tensor, t: float, new: Block,
                        given: dict) -> tuple[Tables, Tensor, Callable]:
        """Commit the last block and take the first denoising pass of the new one in one call.

        Returns (tables with the last block, trimmed to what the new block sees; flow of the new
        block; ``attend`` for its further passes). ``given``: network arguments of the joint call.
        """
        n, b = new.frames, len(x_BCnHW)
        kept = self.context(tables, last.frames)
        p = kept.pages_BP.shape[1]
        frames_BP = np.concatenate([kept.frames_BP, last.index_Bn], 1)
        seen = self.policy.select(frames_BP, n)
        sees = np.zeros((b, last.frames + n, p + last.frames + n), bool)
        sees[:, :last.frames, :p + last.frames] = True
        sees[:, last.frames:, :p + last.frames] = seen[:, None]
        sees[:, last.frames:, p + last.frames:] = True
        ids = self.pool.alloc(last.index_Bn.size).reshape(last.index_Bn.shape)
        with self._or_give_back(ids):
            attend = PagedAttend(self.pool, kept, sees, self._columns(last.frames), ids, reuse=True,
                                 within_BTT=new.within_BTT)
            x = torch.cat([last_BCnHW, x_BCnHW], 2)
            t_BF = torch.full((b, last.frames + n), t, device=x.device)
            t_BF[:, :last.frames] = last_t
            index = np.concatenate([last.index_Bn, new.index_Bn], 1)
            flow = self._call(x, t_BF, attend, index, given)[:, :, last.frames:]
        self.pool.seal(ids.ravel())
        self.pool.decref(ids[~seen[:, p:]])
        joint = Tables(np.concatenate([kept.pages_BP, ids], 1), frames_BP)
        return joint.keep(seen), flow, attend.again(n)


class Guided:
    """Classifier-free guidance over a stepper: ``v = v_neg + scale (v_pos - v_neg)``.

    Each slot has two rows of tables, the wanted one and the negative one: two caches, both written
    (actionparty spec 3.4). Callers see one row per slot.

    Args:
        stepper: works on two rows per slot.
        scale: 1 = no guidance.
        split: network arguments of B slots to those of 2 B rows, alternately wanted and negative.
    """

    def __init__(self, stepper: CausalStepper, scale: float, split: Callable[[dict], dict]) -> None:
        self.stepper, self.scale, self.split = stepper, scale, split
        self.policy, self.pool = stepper.policy, stepper.pool

    def empty(self, slots: int) -> Tables:
        """Tables of slots without memory."""
        return Tables.empty(2 * slots)

    def _block(self, block: Block) -> Block:
        within = block.within_BTT
        return Block(block.index_Bn.repeat(2, 0), self.split(block.given) if block.given else {},
                     None if within is None else within.repeat_interleave(2, 0))

    def _mix(self, flow: Tensor) -> Tensor:
        wanted, negative = flow[::2], flow[1::2]
        return negative + self.scale * (wanted - negative)

    def prefill(self, x_BCKHW: Tensor, t: float, block: Block) -> Tables:
        """As ``CausalStepper.prefill``."""
        return self.stepper.prefill(x_BCKHW.repeat_interleave(2, 0), t, self._block(block))

    def commit_and_flow(self, tables: Tables, last_BCnHW: Tensor, last_t: float, last: Block,
                        x_BCnHW: Tensor, t: float, new: Block,
                        given: dict) -> tuple[Tables, Tensor, Callable]:
        """As ``CausalStepper.commit_and_flow``."""
        tables, flow, attend = self.stepper.commit_and_flow(
            tables, last_BCnHW.repeat_interleave(2, 0), last_t, self._block(last),
            x_BCnHW.repeat_interleave(2, 0), t, self._block(new), self.split(given))
        return tables, self._mix(flow), attend

    def context(self, tables: Tables, frames: int) -> Tables:
        """As ``CausalStepper.context``."""
        return self.stepper.context(tables, frames)

    def commit(self, kept: Tables, x_BCnHW: Tensor, t: float,
               block: Block) -> tuple[Tables, Tensor]:
        """As ``CausalStepper.commit``."""
        tables, flow = self.stepper.commit(kept, x_BCnHW.repeat_interleave(2, 0), t,
                                           self._block(block))
        return tables, self._mix(flow)

    def flow(self, x_BCnHW: Tensor, t: float, attend: Callable, block: Block) -> Tensor:
        """As ``CausalStepper.flow``."""
        return self._mix(self.stepper.flow(x_BCnHW.repeat_interleave(2, 0), t, attend,
                                           self._block(block)))


class WholeWindow:
    """A stepper without memory: every network call computes the frames before the block again.

    What the cache is measured and tested against. While the window holds the whole history, both
    give the same numbers (tests/test_engine.py).

    Args:
        dit: network as for ``CausalStepper``.
        past_BCKHW: clean frames before the block; ``past_t``: the timestep told for them.
        block: indices and ``given`` of the past frames and the block's own, K + n frames.
        attend: causal mask over all of them.
    """

    def __init__(self, dit: Callable[..., Tensor], past_BCKHW: Tensor, past_t: float,
                 block: Block, attend: Callable) -> None:
        self.dit, self.past, self.past_t = dit, past_BCKHW, past_t
        self.block, self.attend = block, attend

    def flow(self, x_BCnHW: Tensor, t: float, attend: object = None,
             block: object = None) -> Tensor:
        """Flow of the noisy block at timestep ``t``."""
        new, frames = x_BCnHW.shape[2], self.block.frames
        t_BF = torch.full((len(x_BCnHW), frames), t, device=x_BCnHW.device)
        t_BF[:, :frames - new] = self.past_t
        index = torch.from_numpy(self.block.index_Bn).to(x_BCnHW.device)
        flow = self.dit(torch.cat([self.past, x_BCnHW], 2), t_BF, attend=self.attend,
                        frame_index_BF=index, **self.block.given)
        return flow[:, :, -new:]


def few_step(stepper: CausalStepper | WholeWindow | Guided, x_BCnHW: Tensor, schedule: FewStep,
             renoise: Callable[[int], Tensor], attend: Callable | None, block: Block | None,
             first_flow: Tensor | None = None) -> Tensor:
    """Few-step sampling of one block: predict x0, noise it to the next level, repeat.

    Args:
        x_BCnHW: starting noise.
        renoise: pass number (from 1) to Gaussian noise like x.
        attend: the first pass's ``attend``, or that of the later ones if ``first_flow`` is given.
        first_flow: the flow of the first pass, if it was computed already.
    """
    x0 = x_BCnHW
    for i, (t, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=True)):
        if i:
            x_BCnHW = schedule.next_input(x0, renoise(i), i - 1)
        if i == 0 and first_flow is not None:
            flow = first_flow
        else:
            flow = stepper.flow(x_BCnHW, t, attend, block)  # type: ignore[arg-type]
        x0 = x0_from_flow(x_BCnHW, flow, sigma)
    return x0


def multi_step(stepper: CausalStepper | WholeWindow | Guided, x_BCnHW: Tensor, solver: UniPC,
               attend: Callable | None, block: Block | None,
               first_flow: Tensor | None = None) -> Tensor:
    """Sampling of one block with a solver; arguments as for ``few_step``, no fresh noise."""
    run = solver.begin(x_BCnHW)
    for i, t in enumerate(solver.timesteps):
        if i == 0 and first_flow is not None:
            flow = first_flow
        else:
            flow = stepper.flow(run.x, t, attend, block)  # type: ignore[arg-type]
        run.step(flow)
    return run.x
