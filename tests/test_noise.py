"""Noise: the published Philox vectors, and numbers that depend on their own key alone."""

import numpy as np
import pytest
import torch

from worldgym import noise
from worldgym.noise import PASSES, normal, philox, uniform

# Random123, kat_vectors: counter, key, output of philox4x32-10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def column(*values):
    return [torch.tensor([v]) for v in values]


def keys(*rows):
    return np.array(rows, np.int64)


def some_keys(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(-2**62, 2**62, count), rng.integers(0, 9, count),
                     rng.integers(0, 999, count), rng.integers(0, 5, count)], 1)


@pytest.mark.parametrize("counter,key,want", KNOWN)
def test_known_answers(counter, key, want):
    assert [int(x) for x in philox(column(*counter), column(*key))] == list(want)


def test_all_vectors_at_once():
    counter, key, want = (torch.tensor([k[i] for k in KNOWN]).unbind(1) for i in range(3))
    assert all(map(torch.equal, philox(list(counter), list(key)), want))


@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 65])
def test_a_row_does_not_depend_on_the_batch(draw, count):
    every = some_keys(7)
    size = (count,) if draw is normal else count
    whole = draw(every, 3, size)
    for i in range(7):
        assert torch.equal(draw(every[i:i + 1], 3, size), whole[i:i + 1])
    order = np.array([4, 0, 6, 2])
    assert torch.equal(draw(every[order], 3, size), whole[order])


def test_longer_draws_begin_with_the_shorter():
    key = some_keys(2)
    assert torch.equal(uniform(key, 0, 9)[:, :4], uniform(key, 0, 4))


@pytest.mark.parametrize("column_", range(4))
def test_every_part_of_the_key_matters(column_):
    base = keys((5, 1, 7, 0))
    other = base.copy()
    other[0, column_] += 1
    assert not torch.isclose(uniform(base, 0, 16), uniform(other, 0, 16)).any()
    assert not torch.isclose(uniform(base, 0, 16), uniform(base, 1, 16)).any()
    assert not torch.isclose(uniform(base, 0, 16), uniform(base, PASSES["end"], 16)).any()


def test_seeds_of_all_sizes_differ():
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**40, 2**62, 2**63 - 1, -2**63, -2**32]
    rows = uniform(keys(*((s, 0, 0, 0) for s in seeds)), 0, 4)
    assert len({tuple(row) for row in rows.tolist()}) == len(seeds)
    assert rows.min() > 0 and rows.max() < 1


def test_neighbouring_keys_give_no_equal_rows():
    grid = keys(*((s, e, t, b) for s in (0, 1, 2**32) for e in range(3) for t in range(4)
                  for b in range(4)))
    words = torch.cat([uniform(grid, n, 4) for n in range(3)])
    assert len({tuple(row) for row in words.tolist()}) == 3 * len(grid)


def test_moments():
    z = normal(some_keys(8), 0, (50_001,)).double()
    assert z.dtype == torch.float64 and torch.isfinite(z).all()
    assert z.mean(1).abs().max() < 0.02 and (z.var(1) - 1).abs().max() < 0.03
    assert (z**3).mean().abs() < 0.03 and ((z**4).mean() - 3).abs() < 0.06
    assert torch.corrcoef(z).fill_diagonal_(0).abs().max() < 0.02  # slots are independent
    u = uniform(some_keys(4), 0, 50_000)
    assert u.dtype == torch.float64 and (u.mean(1) - 0.5).abs().max() < 0.01
    assert ((u.var(1) - 1 / 12).abs() < 0.005).all()


def test_shape_and_dtype():
    z = normal(some_keys(3), 0, (4, 2, 3))
    assert z.shape == (3, 4, 2, 3) and z.dtype == torch.float32
    assert torch.equal(z.flatten(1), normal(some_keys(3), 0, (24,)))


def test_no_global_generator_is_read_or_set():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = normal(some_keys(2), 0, (8,))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    torch.rand(3), np.random.rand(3)
    assert torch.equal(normal(some_keys(2), 0, (8,)), first)
    torch.set_rng_state(before)


def test_the_bits_stay_the_same_from_version_to_version():
    """Saved states and recorded results depend on these very numbers."""
    words = uniform(keys((0, 0, 0, 0)), 0, 4)[0] * 2**32 - 0.5
    assert [int(w) for w in words] == list(KNOWN[0][2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_agree():
    key = some_keys(5)
    assert torch.equal(uniform(key, 2, 99), uniform(key, 2, 99, "cuda").cpu())
    torch.testing.assert_close(normal(key, 2, (99,)), normal(key, 2, (99,), "cuda").cpu())


def test_small_and_large_draws_are_the_same_numbers(monkeypatch):
    keys = np.array([[7, 0, 3, 0], [-1, 2, 2**40, 5], [2**62, 1, 0, 1]])
    small = noise.uniform(keys, 9, 13)
    monkeypatch.setattr(noise, "SMALL", 0)
    assert torch.equal(small, noise.uniform(keys, 9, 13))
