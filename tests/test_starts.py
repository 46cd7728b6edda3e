"""Start banks: what is drawn, exactness on disk, per-slot determinism, refusals."""

import numpy as np
import pytest
import torch

from worldgym import checkpoint
from worldgym.actions import ActionSpec
from worldgym.data.starts import StartBank, hash64
from worldgym.data.store import Episodes
from worldgym.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    NotFiniteError,
    ShapeError,
    WorldGymError,
)

K = 4


def encode(frames):
    """Latents that tell the frame: channel means at half the resolution, to three digits."""
    return frames.float().permute(0, 3, 1, 2)[:, :, ::2, ::2] / 100


def episode(number, steps, terminated):
    frames = np.zeros((steps + 1, 4, 6, 3), np.uint8)
    frames[..., 0], frames[..., 1] = number, np.arange(steps + 1)[:, None, None]
    frames[0] = 9  # every episode begins alike
    ends = np.arange(steps + 1) == steps
    actions = np.arange(steps + 1) % 3
    return {"frames": frames, "actions": actions,
            "rewards": (np.arange(steps + 1) > 0).astype(np.float32),
            "terminated": ends & terminated, "truncated": ends & ~np.bool_(terminated),
            "seed": number, "policy": "p"}


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    store = Episodes.create(tmp_path_factory.mktemp("data") / "d", ActionSpec.discrete(3), (4, 6),
                            10.0, {})
    store.append([episode(i, 15 + i, i % 2 == 0) for i in range(6)])
    store.append([episode(6, 5, True), episode(7, 30, True)])
    return store


@pytest.fixture(scope="module")
def bank(episodes):
    return StartBank.build(episodes, encode, np.arange(8), 40, K, seed=1)  # 10 beginnings


def test_every_start_is_a_piece_of_an_episode(episodes, bank):
    starts = bank.gather(np.arange(len(bank)))
    assert len(bank) == 40 and bank.beginnings.sum() == 10 and bank.beginnings[:10].all()
    assert starts.latents_BKChw.dtype == torch.float32
    for i in range(40):
        length, frame = starts.length_B[i], bank.frames[i]
        newest = encode(torch.tensor(frame[None]))[0].half().float()
        assert torch.equal(starts.latents_BKChw[i, -1], newest)
        assert (starts.latents_BKChw[i, : K - length] == 0).all()
        assert starts.null_BK[i, : K - length].all()
        if bank.beginnings[i]:
            assert length == 1 and starts.null_BK[i].all() and (frame == 9).all()
            continue
        number, t = frame[0, 0, 0], frame[0, 0, 1]
        source = episodes.episode(int(number))
        steps = len(source["frames"]) - 1
        assert 1 <= t <= (steps - 10 if source["terminated"][-1] else steps)
        assert length == min(K, t + 1)
        piece = slice(t - length + 1, t + 1)
        want = encode(torch.from_numpy(np.array(source["frames"][piece]))).half().float()
        assert torch.equal(starts.latents_BKChw[i, K - length:], want)
        assert (starts.actions[i, K - length:] == source["actions"][piece]).all()
        assert starts.null_BK[i, K - length:].tolist() == [
            row == 0 for row in range(t - length + 1, t + 1)]


def test_only_named_episodes_and_no_repeats_before_all_were_used(episodes):
    bank = StartBank.build(episodes, encode, np.array([3, 7]), 10, 2, beginning_fraction=0.0)
    assert set(bank.frames[:, 0, 0, 0]) <= {3, 7} and not bank.beginnings.any()
    assert len(np.unique(bank.frames[:, 0, 0, :2], axis=0)) == 10
    every = StartBank.build(episodes, encode, np.array([7]), 40, 2, beginning_fraction=0.0)
    assert set(every.frames[:, 0, 0, 1]) == set(range(1, 21))


def test_equal_frames_are_stored_once(bank):
    assert len(bank.frames_VHWC) == 31 and bank.latents_UChw.dtype == torch.float16
    assert len(np.unique(bank.latents_UChw.numpy(), axis=0)) == len(bank.latents_UChw)


def test_same_seed_same_bank_and_disk_keeps_the_bits(episodes, bank, tmp_path):
    again = StartBank.build(episodes, encode, np.arange(8), 40, K, seed=1)
    other = StartBank.build(episodes, encode, np.arange(8), 40, K, seed=2)
    loaded = StartBank.load(bank.save(tmp_path / "starts.safetensors", {"world": "w"}))
    here = bank.gather(np.arange(40))
    for bank_ in (again, loaded):
        there = bank_.gather(np.arange(40))
        assert torch.equal(here.latents_BKChw, there.latents_BKChw)
        for name in ("actions", "null_BK", "length_B"):
            assert np.array_equal(getattr(here, name), getattr(there, name))
            assert getattr(here, name).dtype == getattr(there, name).dtype
        assert np.array_equal(bank.frames, bank_.frames)
        assert np.array_equal(bank.beginnings, bank_.beginnings)
    assert not np.array_equal(bank.frames, other.frames)
    assert checkpoint.load_tensors(tmp_path / "starts.safetensors")[1]["world"] == "w"


def test_a_game_of_tiles_takes_little_room_and_comes_back_to_the_bit(tmp_path):
    """Frames of few squares, of latents by the square: written as numbers of the different ones."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    looks = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).half()
    looks[0, 0] = -0.0
    n, number = 300, rng.integers(5, size=(300, 6, 8))
    frames = tiles[number].transpose(0, 1, 3, 2, 4, 5).reshape(n, 24, 32, 3)
    at = rng.choice(np.float32([-0.75, -0.25, 0.25, 0.75]), (n, 1, 2, 2))
    rows = np.arange(n, dtype=np.int32)
    made = StartBank(
        latents_UChw=looks[torch.from_numpy(number)].permute(0, 3, 1, 2).contiguous(),
        latent_rows_NK=rows[:, None], actions=np.zeros((n, 1, 2), np.int64),
        null_NK=np.ones((n, 1), bool), length_N=np.ones(n, np.int64), frames_VHWC=frames,
        frame_rows_N=rows, beginnings=np.ones(n, bool), subjects_NKPS=at,
        valid_NP=np.ones((n, 2), bool), game_N=np.zeros(n, np.int64))
    path = made.save(tmp_path / "tiles.safetensors")
    again = StartBank.load(path)
    assert again.latents_UChw.view(torch.int16).equal(made.latents_UChw.view(torch.int16))
    assert (again.frames_VHWC == frames).all() and again.frames_VHWC.dtype == np.uint8
    assert (again.subjects_NKPS == at).all() and again.latents_UChw.is_contiguous()
    tensors, header = checkpoint.load_tensors(path)
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    plain = sum(x.nbytes for x in (frames, made.latents_UChw.numpy(), at))
    assert header["format"] == 2 and stored < plain / 5
    # starts whose pictures hardly repeat stay as they were
    noise = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    plain = StartBank.from_frames(encode, noise, np.zeros(20, np.int64))
    _, header = checkpoint.load_tensors(plain.save(tmp_path / "plain.safetensors"))
    assert header["format"] == 1
    for change, words in (
            (lambda t: t.pop("cells.rows"), "cells"),
            (lambda t: t.pop("squares.values"), "squares"),
            (lambda t: t["cells.rows"].fill_(5), "cells"),
            (lambda t: t["subjects.rows"].fill_(-1), "subjects"),
            (lambda t: t.update({"cells.rows": t["cells.rows"].long()}), "cells"),
            (lambda t: t.update({"cells": t["cells.rows"]}), "cells")):
        broken = {k: v.clone() for k, v in tensors.items()}
        change(broken)
        checkpoint.save(path, broken, {"kind": "worldgym.starts", "format": 2})
        with pytest.raises(CheckpointError, match=f"packed tensor.*{words}"):
            StartBank.load(path)
    for name, words in (("cells", "wrong tensors"), ("squares", "no squares")):
        broken = tensors | {f"{name}.rows": tensors[f"{name}.rows"].flatten(1).contiguous()}
        checkpoint.save(path, broken, {"kind": "worldgym.starts", "format": 2})
        with pytest.raises(CheckpointError, match=words):
            StartBank.load(path)


def test_ages_and_starts_of_about_an_age(episodes, bank, tmp_path, monkeypatch):
    from dataclasses import replace

    for i in np.flatnonzero(~bank.beginnings):
        assert bank.age_N[i] == bank.frames[i][0, 0, 1]  # the second channel tells the step
    assert (bank.age_N[bank.beginnings] == 0).all()
    loaded = StartBank.load(bank.save(tmp_path / "starts.safetensors"))
    assert np.array_equal(loaded.age_N, bank.age_N)
    assert np.array_equal(bank.only([39, 3]).age_N, bank.age_N[[39, 3]])
    monkeypatch.setattr("worldgym.data.starts.NEAR", 5)
    seeds = np.arange(400)
    drawn = bank.at_age(7, seeds, 0)
    nearest = np.sort(np.abs(bank.age_N - 7))[:5]
    assert sorted(set(np.abs(bank.age_N[drawn] - 7))) == sorted(set(nearest))
    assert len(set(drawn.tolist())) == 5  # every one of the nearest comes up
    assert drawn.tolist() == [int(bank.at_age(7, int(s), 0)) for s in seeds]
    older = replace(bank, age_N=None)
    with pytest.raises(ConfigError, match="how old"):
        older.at_age(7, seeds, 0)
    path = older.save(tmp_path / "older.safetensors")
    assert StartBank.load(path).age_N is None
    tensors, header = checkpoint.load_tensors(path)
    checkpoint.save(path, tensors | {"age": torch.full((40,), -1)}, header)
    with pytest.raises(CheckpointError, match="age"):
        StartBank.load(path)


def test_samples_depend_on_seed_and_episode_only(bank):
    seeds, episodes = np.arange(1000), np.arange(1000)[::-1] % 7
    all_at_once = bank.sample(seeds, episodes)
    one_by_one = [int(bank.sample(int(s), int(e))) for s, e in zip(seeds, episodes, strict=True)]
    assert all_at_once.tolist() == one_by_one
    assert bank.sample(3, np.arange(4)).shape == (4,)
    counts = np.bincount(bank.sample(0, np.arange(40_000)), minlength=40)
    assert counts.min() > 850 and counts.max() < 1150
    only = bank.sample(seeds, episodes, beginnings_only=True)
    assert bank.beginnings[only].all() and len(set(only.tolist())) == 10
    assert hash64(1, 2) != hash64(2, 1) and hash64(0, 1) != hash64(1, 0)
    assert hash64(2**62, 3).dtype == np.uint64
    assert len(np.unique(hash64(np.arange(300)[:, None], np.arange(300)))) == 90_000


def test_known_hash_value():
    """Pinned: recorded runs name starts by (seed, episode)."""
    x = (0 + 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor % 2**64
    x ^= x >> 31
    assert x == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0
    y = (x ^ 5) + 0x9E3779B97F4A7C15
    y %= 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        y = (y ^ (y >> shift)) * factor % 2**64
    assert int(hash64(0, 5)) == y ^ (y >> 31)


def test_part_of_a_bank(bank):
    part = bank.only(np.flatnonzero(~bank.beginnings))
    assert len(part) == 30 and not part.beginnings.any()
    assert np.array_equal(part.frames, bank.last_frames(np.arange(10, 40)))
    with pytest.raises(ConfigError, match="no beginnings"):
        part.sample(0, 0, beginnings_only=True)
    with pytest.raises(ConfigError, match="no such start"):
        bank.gather([40])


def test_short_episodes_give_beginnings_and_say_so(episodes, caplog):
    bank = StartBank.build(episodes, encode, np.array([6]), 3, K)
    assert bank.beginnings.all() and "beginnings only" in caplog.text


@pytest.mark.parametrize("change", [{"count": 0}, {"context": 0}, {"margin": 0},
                                    {"beginning_fraction": 1.5}])
def test_impossible_numbers(episodes, change):
    with pytest.raises(ConfigError, match="impossible start bank"):
        StartBank.build(**({"episodes": episodes, "encode": encode, "ids": np.arange(8),
                            "count": 4, "context": 2} | change))


def test_bad_sources(episodes):
    with pytest.raises(DatasetError):
        StartBank.build(episodes, encode, np.array([8]), 4, K)
    with pytest.raises(DatasetError):
        StartBank.build(episodes, encode, np.array([], int), 4, K)
    with pytest.raises(NotFiniteError):
        StartBank.build(episodes, lambda f: encode(f) * 1e6, np.arange(8), 4, K)
    with pytest.raises(ShapeError):
        StartBank.encode_frames(None, np.zeros((4, 6, 3), np.uint8))


def test_bad_files(bank, tmp_path):
    path = tmp_path / "starts.safetensors"
    with pytest.raises((WorldGymError, FileNotFoundError)):
        StartBank.load(path)
    checkpoint.save(path, {"x": torch.zeros(1)}, {"kind": "other"})
    with pytest.raises(CheckpointError, match="not a start bank"):
        StartBank.load(path)
    bank.save(path)
    tensors, header = checkpoint.load_tensors(path)
    for name, value, word in (("latent_rows", tensors["latent_rows"] + 500, "latent rows"),
                              ("frame_rows", tensors["frame_rows"] + 500, "frame rows"),
                              ("null", tensors["null"][:3], "null"),
                              ("length", tensors["length"] + 1, "latent rows")):
        checkpoint.save(path, tensors | {name: value}, header)
        with pytest.raises(CheckpointError, match=word):
            StartBank.load(path)
    checkpoint.save(path, {k: v for k, v in tensors.items() if k != "null"}, header)
    with pytest.raises(CheckpointError, match="wrong tensors"):
        StartBank.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        StartBank.load(path)
