"""Context memory: K1-K3 and K6-K9 of the memory design, on a tiny network and on bare pages."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldgym.errors import ConfigError, MemoryBudgetError, TransactionError
from worldgym.memory import Full, PagedAttend, PagePool, PageSpec, SinkWindow, Tables
from worldgym.models.wan import block_ids, causal_frame_mask, masked
from worldgym.rope import cos_sin, rotate, rotation

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_dit import GRID, TOKENS, block, close, page_spec, stepper, tiny_dit, video  # noqa: E402

SPEC = PageSpec(layers=2, heads=2, head_dim=12, tokens=TOKENS)
FRAMES = 6


@pytest.fixture(scope="module")
def dit():
    return tiny_dit()


def cached(dit, x, policy, n=1, t=100.0):
    """Flows of a clip that is committed block by block, and the stepper with its tables."""
    step, tables, flows = stepper(dit, policy), Tables.empty(len(x)), []
    for start in range(0, x.shape[2], n):
        kept = step.context(tables, n)
        step.pool.decref(tables.pages_BP[~np.isin(tables.pages_BP, kept.pages_BP)])
        tables, flow = step.commit(kept, x[:, :, start:start + n], t, block(start, n, len(x)))
        flows.append(flow)
    return torch.cat(flows, 2), step, tables


def whole(dit, x, frame_mask, t=100.0):
    t = torch.full((len(x), x.shape[2]), t)
    return dit(x, t, attend=masked(frame_mask, TOKENS))


def window_mask(n, window=None, sink=0):
    mask = causal_frame_mask(block_ids(FRAMES, n), window and window - sink)
    mask[:, :sink] |= torch.tril(torch.ones(FRAMES, FRAMES, dtype=torch.bool))[:, :sink]
    return mask


# ------------------------------------------------------------------------- K1, K2: equivalence


@pytest.mark.parametrize("n", [1, 3])
def test_k1_pages_equal_one_block_causal_forward(dit, n):
    x = video(2, FRAMES)
    flows, step, tables = cached(dit, x, Full(), n)
    close(flows, whole(dit, x, window_mask(n)))
    assert tables.frames_BP.tolist() == [list(range(FRAMES))] * 2
    assert step.pool.stats()["pages_used"] == 2 * FRAMES


@pytest.mark.parametrize("n,window,sink", [(1, 3, 0), (1, 3, 1), (1, 4, 2), (2, 4, 0), (1, 1, 0)])
def test_k1_windowed(dit, n, window, sink):
    x = video(2, FRAMES)
    flows, step, tables = cached(dit, x, SinkWindow(window, sink), n)
    close(flows, whole(dit, x, window_mask(n, window, sink)))
    want = list(range(sink)) + list(range(FRAMES - window + sink, FRAMES))
    assert tables.frames_BP.tolist() == [want] * 2
    assert step.pool.stats()["pages_used"] == 2 * window


def test_k1_can_fail(dit):
    x = video(1, FRAMES)
    flows, _, _ = cached(dit, x, SinkWindow(3))
    assert (flows - whole(dit, x, window_mask(1))).abs().max() > 1e-3


@pytest.mark.parametrize("sink", [0, 2])
def test_k2_a_window_that_holds_everything_is_full(dit, sink):
    x = video(2, FRAMES)
    flows, _, tables = cached(dit, x, SinkWindow(FRAMES + 2, sink))
    full, _, full_tables = cached(dit, x, Full())
    close(flows, full)
    assert np.array_equal(tables.frames_BP, full_tables.frames_BP)


# ------------------------------------------------------------------------- K3: moving pages


@pytest.mark.parametrize("columns", [None, 5])
def test_k3_moving_a_page_equals_writing_it_elsewhere(columns):
    generator = torch.Generator().manual_seed(0)
    own = TOKENS
    k, v = torch.randn(2, 2, 3 * TOKENS, 2, 12, generator=generator)
    q, k_own, v_own = torch.randn(3, 2, own, 2, 12, generator=generator)
    frames = np.array([[4, 5, 6], [10, 17, 40]])
    move = np.array([[0, 3, -2], [100, -17, 1]])

    def outcome(written_BP, move_BP):
        pool = PagePool(SPEC)
        ids = pool.alloc(6)
        turned = rotate(k, cos_sin(rotation(torch.from_numpy(written_BP), (2, 3), 12), k.dtype))
        pool.write(ids, 0, turned, v)
        tables = Tables(ids.reshape(2, 3), written_BP)
        attend = PagedAttend(pool, tables, np.ones((2, 1, 4), bool), columns, move_BP=move_BP)
        before = pool.k[0].clone()
        out = attend(0, q, k_own, v_own)
        assert torch.equal(pool.k[0], before) or before.isnan().any()  # pages stay as written
        assert torch.equal(pool.k[0][:6], before[:6])
        return out

    want = outcome(frames + move, None)
    close(outcome(frames, move), want)
    assert (outcome(frames, None) - want).abs().max() > 1e-3


# ------------------------------------------------------------------------- K6, K9: pages


def kv(count, seed=0):
    return torch.randn(2, count, TOKENS, 2, 12, generator=torch.Generator().manual_seed(seed))


def test_k6_sealed_pages_never_change(dit):
    x = video(2, 3)
    _, step, tables = cached(dit, x, Full())
    held = tables.pages_BP.ravel()
    before = [t[held].clone() for t in (*step.pool.k, *step.pool.v)]
    with pytest.raises(TransactionError, match="written twice"):
        step.pool.write(held[:1], 0, *kv(1))
    for start in range(3, 6):  # more commits, a flow, growth
        tables, _ = step.commit(tables, x[:, :, :1], 0.0, block(start, 1, 2))
    step.flow(x[:, :, :1], 500.0, step.reader(tables, block(6, 1, 2)), block(6, 1, 2))
    step.pool.alloc(200)
    after = [t[held] for t in (*step.pool.k, *step.pool.v)]
    assert all(map(torch.equal, before, after))


def test_k6_reference_counts_never_leak():
    pool, rng, held = PagePool(SPEC), np.random.default_rng(0), []
    for _ in range(2000):
        move = rng.random()
        if move < 0.4 or not held:
            held.append(pool.alloc(int(rng.integers(0, 4))))
        elif move < 0.6:
            more = held[rng.integers(len(held))]
            pool.incref(np.append(more, -1))  # padding is ignored
            held.append(more)
        else:
            gone = held.pop(rng.integers(len(held)))
            pool.drop(gone) if move < 0.8 else pool.decref(gone)
        used = np.unique(np.concatenate([*held, np.zeros(0, np.int64)]))
        stats = pool.stats()
        assert stats["pages_used"] == len(used) == int((pool.refs > 0).sum())
        assert stats["pages_used"] + stats["pages_free"] == stats["capacity"]
    for ids in held:
        pool.decref(ids)
    assert pool.stats()["pages_used"] == 0 and len(set(pool._free)) == pool.stats()["capacity"]


def test_k9_double_release_changes_nothing():
    pool = PagePool(SPEC)
    a, b = pool.alloc(1), pool.alloc(1)
    with pytest.raises(TransactionError, match="released twice"):
        pool.decref(np.concatenate([b, a, a]))
    assert pool.stats()["pages_used"] == 2 and pool.refs[[a[0], b[0]]].tolist() == [1, 1]
    pool.decref(a)
    with pytest.raises(TransactionError, match="released twice"):
        pool.decref(a)
    assert pool.stats()["pages_used"] == 1
    fresh = pool.alloc(64)
    assert len(np.unique(np.concatenate([fresh, b]))) == 65  # no page is given out twice


def test_k9_released_pages_are_neither_used_nor_written():
    pool = PagePool(SPEC)
    ids = pool.alloc(2)
    pool.decref(ids)
    with pytest.raises(TransactionError, match="after its release"):
        pool.incref(ids)
    with pytest.raises(TransactionError, match="after its release"):
        pool.write(ids, 0, *kv(2))
    assert pool.stats()["pages_used"] == 0


def test_budget_is_refused_and_the_pool_stays_good():
    pool = PagePool(SPEC, max_pages=70)
    held = pool.alloc(69)
    with pytest.raises(MemoryBudgetError, match="at most 70"):
        pool.alloc(2)
    pool.alloc(1)
    pool.decref(held)
    assert pool.alloc(69).size == 69
    assert pool.stats() == {"pages_used": 70, "pages_free": 0, "capacity": 70,
                            "bytes": 70 * SPEC.nbytes}
    assert sum(t.numel() * t.element_size() for t in pool.k + pool.v) == 70 * SPEC.nbytes


def test_growing_can_be_tried_again(monkeypatch):
    pool, real, calls = PagePool(SPEC), torch.cat, []

    def cat(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **options)

    monkeypatch.setattr(torch, "cat", cat)
    with pytest.raises(torch.OutOfMemoryError):
        pool.alloc(3)
    pool.alloc(3)
    assert {len(t) for t in pool.k + pool.v} == {pool.stats()["capacity"]} == {64}


# ------------------------------------------------------------------------- K7: bound


def test_k7_tables_never_outgrow_the_bound():
    rng = np.random.default_rng(0)
    for _ in range(60):
        window = int(rng.integers(2, 9))
        sink = int(rng.integers(0, window))
        new = int(rng.integers(1, window - sink + 1))
        policy, tables, number = SinkWindow(window, sink), Tables.empty(3), 0
        for step in range(8):
            tables = tables.keep(policy.select(tables.frames_BP, new))
            frames = np.tile(np.arange(step * new, step * new + new), (3, 1))
            absent = (rng.random((3, 1)) < 0.2) & (step < 3)  # slots of unequal length
            pages = np.where(absent, -1, number + np.arange(3 * new).reshape(3, new))
            number += 3 * new
            tables = tables.append(pages, np.where(absent, -1, frames))
            assert tables.pages_BP.shape[1] <= policy.bound()
            for row in tables.frames_BP:
                real = row[row >= 0]
                assert (np.diff(real) > 0).all() and (row[len(real):] == -1).all()
            assert ((tables.pages_BP < 0) == (tables.frames_BP < 0)).all()


@pytest.mark.parametrize("window,sink", [(0, 0), (3, 3), (3, -1)])
def test_impossible_windows(window, sink):
    with pytest.raises(ConfigError, match="window"):
        SinkWindow(window, sink)


def test_block_that_does_not_fit():
    with pytest.raises(ConfigError, match="at most 2"):
        SinkWindow(4, 2).select(np.zeros((1, 4), np.int64), 3)


# ------------------------------------------------------------------------- K8: padding


def read(dit, step, tables, columns):
    slots = len(tables.pages_BP)
    p = tables.pages_BP.shape[1]
    attend = PagedAttend(step.pool, tables, np.ones((slots, 1, p + 1), bool), columns)
    return step.flow(video(slots, 1, 9), 700.0, attend, block(3, 1, slots))


@pytest.mark.parametrize("columns", [None, 3, 4, 9])
def test_k8_padding_columns_change_nothing(dit, columns):
    _, step, tables = cached(dit, video(2, 3), Full())
    close(read(dit, step, tables, columns), read(dit, step, tables, None), 1e-6)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_k8_garbage_in_free_pages_is_never_seen(dit, garbage):
    _, step, tables = cached(dit, video(2, 3), Full())
    first = step.pool.alloc(1)  # page 0 may stand in for padding: spoil it too
    ragged = Tables(np.array([tables.pages_BP[0], [tables.pages_BP[1, 0], -1, -1]]),
                    np.array([[0, 1, 2], [0, -1, -1]]))
    want = read(dit, step, ragged, 5)
    assert torch.isfinite(want).all()
    step.pool.decref(np.append(first, tables.pages_BP[1, 1:]))
    free = torch.tensor(step.pool._free)
    for store in step.pool.k + step.pool.v:
        store[free] = garbage
    assert torch.equal(read(dit, step, ragged, 5), want)
    alone = read(dit, step, ragged.rows(np.array([0])), 5)
    assert torch.equal(alone, want[:1])


@pytest.mark.parametrize("reuse", [False, True])
def test_k8_an_empty_pool_with_padded_columns(dit, reuse):
    step = stepper(dit, SinkWindow(4))
    x = video(2, 1)
    attend = PagedAttend(step.pool, Tables.empty(2), np.ones((2, 1, 1), bool), 3, reuse=reuse)
    close(step.flow(x, 500.0, attend, block(0, 1, 2)), whole(dit, x, torch.ones(1, 1).bool(), 500.0))
    assert step.pool.stats()["capacity"] == 0
    flow = step.flow(x, 500.0, step.reader(Tables.empty(2), block(0, 1, 2)), block(0, 1, 2))
    assert torch.isfinite(flow).all()


def test_fresh_pages_are_nan():
    pool = PagePool(SPEC, pages=2)
    assert all(t.isnan().all() for t in pool.k + pool.v)


def test_page_size(dit):
    step = stepper(dit, Full(), pages=1)
    assert page_spec(dit).nbytes == 4 * sum(t[0].numel() for t in step.pool.k + step.pool.v)
    assert GRID[0] * GRID[1] // 4 == TOKENS


# ------------------------------------------------------------------------- tables


def test_join_and_rows_of_tables():
    a = Tables(np.array([[3, 4]]), np.array([[0, 1]]))
    b = Tables(np.array([[7]]), np.array([[5]]))
    both = Tables.join([a, b, Tables.empty(1)])
    assert both.pages_BP.tolist() == [[3, 4], [7, -1], [-1, -1]]
    assert both.frames_BP.tolist() == [[0, 1], [5, -1], [-1, -1]]
    assert both.rows(np.array([1, 0, 1])).pages_BP.tolist() == [[7, -1], [3, 4], [7, -1]]
    grown = both.append(np.array([[9], [-1], [8]]), np.array([[2], [-1], [6]]))
    assert grown.pages_BP.tolist() == [[3, 4, 9], [7, -1, -1], [8, -1, -1]]
