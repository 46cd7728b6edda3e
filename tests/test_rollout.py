"""Stepping: the fused pass equals its two halves, the cache equals teacher forcing."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldgym.errors import ConfigError
from worldgym.memory import Full, SinkWindow, Tables
from worldgym.models.wan import block_ids, masked, teacher_forcing_frame_mask
from worldgym.rollout import Block, few_step
from worldgym.schedule import FewStep

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_dit import TOKENS, block, close, stepper, tiny_dit, video  # noqa: E402


@pytest.fixture(scope="module")
def dit():
    return tiny_dit()


def pages(step, tables, layer):
    ids = torch.from_numpy(np.maximum(tables.pages_BP, 0))
    there = torch.from_numpy(tables.pages_BP >= 0)[..., None, None, None]
    return torch.stack([store[layer][ids].masked_fill(~there, 0)
                        for store in (step.pool.k, step.pool.v)])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sink", [0, 1, None])
def test_fused_equals_commit_then_denoise(dit, n, sink):
    policy = Full() if sink is None else SinkWindow(2 * n + 2, sink)
    step, x, noise = stepper(dit, policy), video(2, 5 * n), video(2, 5 * n, 1)
    tables = Tables.empty(2)
    for start in range(0, 4 * n, n):  # from empty tables to full ones
        last, new = block(start, n, 2), block(start + n, n, 2)
        clean, noisy = x[:, :, start:start + n], noise[:, :, start + n:start + 2 * n]
        split, _ = step.commit(step.context(tables, n), clean, 20.0, last)
        split = step.context(split, n)
        reader = step.reader(split, new)
        fused, flow, attend = step.commit_and_flow(
            tables, clean, 20.0, last, noisy, 1000.0, new, {})
        close(flow, step.flow(noisy, 1000.0, reader, new))
        for t in (500.0, 100.0):  # later passes reuse the gathered context
            close(step.flow(0.5 * noisy, t, attend, new), step.flow(0.5 * noisy, t, reader, new))
        assert np.array_equal(fused.frames_BP, split.frames_BP)
        for layer in range(2):
            close(pages(step, fused, layer), pages(step, split, layer))
        tables = fused


def test_fused_with_slots_of_unequal_length(dit):
    step, x = stepper(dit, SinkWindow(4)), video(2, 6)
    index = np.array([[0, 1, 2], [-1, -1, 0]])
    tables = step.prefill(x[:, :, :3], 0.0, Block(index))
    assert tables.frames_BP.tolist() == [[0, 1, 2], [0, -1, -1]]
    last, new = Block(np.array([[3], [1]])), Block(np.array([[4], [2]]))
    fused, flow, _ = step.commit_and_flow(tables, x[:, :, 3:4], 0.0, last, x[:, :, 4:5], 900.0,
                                          new, {})
    split, _ = step.commit(tables, x[:, :, 3:4], 0.0, last)
    split = step.context(split, 1)
    close(flow, step.flow(x[:, :, 4:5], 900.0, step.reader(split, new), new))
    assert fused.frames_BP.tolist() == split.frames_BP.tolist() == [[1, 2, 3], [0, 1, -1]]


@pytest.mark.parametrize("policy", [Full(), SinkWindow(3), SinkWindow(4, 1)])
def test_prefill_equals_one_commit_after_the_other(dit, policy):
    x, step = video(2, 5), stepper(dit, policy)
    index = np.array([np.arange(5), [-1, -1, 0, 1, 2]])
    at_once = step.prefill(x, 0.0, Block(index))
    held = len(np.unique(at_once.pages_BP[at_once.pages_BP >= 0]))
    assert step.pool.stats()["pages_used"] == held
    for slot, first in ((0, 0), (1, 2)):
        tables = Tables.empty(1)
        for frame in range(first, 5):
            kept = step.context(tables, 1)
            tables, _ = step.commit(kept, x[slot:slot + 1, :, frame:frame + 1], 0.0,
                                    block(frame - first, 1))
        row = at_once.rows(np.array([slot]))
        real = row.keep(row.pages_BP >= 0)
        assert np.array_equal(real.frames_BP, tables.frames_BP)
        for layer in range(2):
            close(pages(step, real, layer), pages(step, tables, layer))


@pytest.mark.parametrize("window", [None, 3])
def test_cache_equals_teacher_forcing(dit, window):
    frames, clean, noisy = 6, video(2, 6), video(2, 6, 1)
    mask = teacher_forcing_frame_mask(block_ids(frames, 1), window)
    index, t = torch.arange(frames), torch.tensor([0.0, 600.0]).repeat_interleave(frames)
    want = dit(torch.cat([clean, noisy], 2), t.expand(2, -1), attend=masked(mask, TOKENS),
               frame_index_BF=torch.cat([index, index]))[:, :, frames:]
    step, tables = stepper(dit, Full() if window is None else SinkWindow(window)), Tables.empty(2)
    for i in range(frames - 1):
        tables, flow, _ = step.commit_and_flow(
            tables, clean[:, :, i:i + 1], 0.0, block(i, 1, 2), noisy[:, :, i + 1:i + 2], 600.0,
            block(i + 1, 1, 2), {})
        close(flow, want[:, :, i + 1:i + 2])


def test_few_step_order_of_passes(dit):
    schedule = FewStep((1000.0, 500.0, 250.0), (1.0, 0.5, 0.25))
    step, new, x, drawn = stepper(dit, Full()), block(0, 1), video(1, 1), []

    def renoise(number):
        drawn.append(number)
        return video(1, 1, 10 + number)

    attend = step.reader(Tables.empty(1), new)
    got = few_step(step, x, schedule, renoise, attend, new)
    given = few_step(step, x, schedule, renoise, attend, new, step.flow(x, 1000.0, attend, new))
    assert drawn == [1, 2, 1, 2] and torch.equal(got, given)
    y = x
    for i, (t, s) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=True)):
        y = (1 - s) * y + s * video(1, 1, 10 + i) if i else y
        y = y - s * step.flow(y, t, attend, new)
    close(got, y)


@pytest.mark.parametrize("call", ["commit", "prefill", "commit_and_flow"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_gives_its_pages_back(call, error, monkeypatch):
    dit = tiny_dit()
    step, x = stepper(dit, SinkWindow(3)), video(2, 3)
    tables = step.prefill(x[:, :, :2], 0.0, block(0, 2, 2))
    used, refs = step.pool.stats()["pages_used"], step.pool.refs.copy()

    def run():
        if call == "commit":
            return step.commit(step.context(tables, 1), x[:, :, 2:], 0.0, block(2, 1, 2))
        if call == "prefill":
            return step.prefill(x, 0.0, Block(np.array([[0, 1, 2], [-1, 0, 1]])))
        return step.commit_and_flow(tables, x[:, :, 2:], 0.0, block(2, 1, 2), x[:, :, 2:], 1000.0,
                                    block(3, 1, 2), {})

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(dit.blocks[1], "forward", fail)
        with pytest.raises(error):
            run()
    assert step.pool.stats()["pages_used"] == used and np.array_equal(step.pool.refs, refs)
    run()


def test_a_block_that_does_not_fit_allocates_nothing(dit):
    step, x = stepper(dit, SinkWindow(2)), video(1, 3)
    for new in (block(1, 3), block(0, 3)):
        with pytest.raises(ConfigError):
            step.commit_and_flow(Tables.empty(1), x[:, :, :1], 0.0, block(0, 1), x, 1000.0, new, {})
    assert step.pool.stats()["pages_used"] == 0
