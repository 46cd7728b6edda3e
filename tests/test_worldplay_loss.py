"""WorldPlay's chunk-causal training: noise levels, sequences, who sees whom, which frames count."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import forcing_toy as toy  # noqa: E402
from forcing_toy import generator, lively, scene  # noqa: E402

from worldgym.errors import ConfigError, DatasetError, ShapeError  # noqa: E402
from worldgym.models.dynamics import drawer  # noqa: E402
from worldgym.models.wan import block_ids, causal_frame_mask  # noqa: E402
from worldgym.models.worldplay_loss import (  # noqa: E402
    CausalConfig,
    causal_loss,
    causal_sequence,
    causal_times,
    encode,
    flow_of,
)
from worldgym.schedule import add_noise  # noqa: E402

CPU = torch.device("cpu")


def test_noise_levels_of_chunks_and_of_context_chunks():
    memory = torch.tensor([True, False])
    cfg = CausalConfig()
    times = []
    for seed in range(300):
        t, counts = causal_times(drawer(2, generator(seed), (0, 1), CPU), memory, 24, 4, cfg)
        times.append(t)
        assert (t.unflatten(1, (6, 4)) == t[:, ::4, None]).all()  # one level per chunk
    t = torch.stack(times)[:, :, ::4]
    assert counts.tolist() == [[False] * 20 + [True] * 4, [True] * 24]
    assert t[:, 0, :5].min() >= 16 and t[:, 0, :5].max() <= 500
    assert t[:, 1].min() >= 1 and t[:, 1].max() > 950 and len(t[:, 1].unique()) > 300
    assert float((t[:, 1] > 500).double().mean()) > 0.6  # shifted to the noisy side
    first, second = t[:, 1, 0] - t[:, 1, 0].mean(), t[:, 1, 1] - t[:, 1, 1].mean()
    assert abs(float((first * second).mean() / (first.std() * second.std()))) < 0.2  # independent
    u = torch.tensor([0.863224, 0.626888, 0.152915, 0.154285], dtype=torch.float64)  # published
    t, _ = causal_times(lambda kind, *shape: torch.logit(u)[None], memory[1:], 16, 4, cfg)
    assert t[0, ::4].tolist() == [950, 834, 350, 354]


def test_sequences_are_a_beginning_or_a_retrieved_context_and_its_chunk():
    rng, w2c = np.random.default_rng(0), toy.poses(np.array([1, 0, 0, 0, 1, 0, 1, 1, 0, 1]) > 0)
    kinds, starts = [], set()
    for _ in range(200):
        frames, memory = causal_sequence(toy.MEMORY, w2c, None, rng)
        kinds.append(memory)
        assert len(frames) == 12
        if memory:
            start = int(frames[-4])
            assert frames.tolist() == [*toy.MEMORY.select(w2c, start), *range(start, start + 4)]
            starts.add(start)
        else:
            assert frames.tolist() == list(range(12))
    assert 0.72 < np.mean(kinds) < 0.88 and starts == set(range(12, 40, 4))
    with pytest.raises(DatasetError, match="too short"):
        causal_sequence(toy.MEMORY, w2c[:8], None, rng)


def test_the_loss_is_the_mean_over_what_counts_and_chunks_see_no_later_one():
    clip, dit = scene(past=1, count=3)[0], lively()  # 12 frames
    memory = torch.tensor([True, False, True])
    loss, _ = causal_loss(dit, clip, memory, drawer(3, generator(5), (0, 1), CPU))
    draw, x = drawer(3, generator(5), (0, 1), CPU), clip.latents_BFChw
    t, counts = causal_times(draw, memory, 12, 4, CausalConfig())
    noise = draw(torch.randn, *x.shape[1:])
    sees = causal_frame_mask(block_ids(12, 4))
    noisy = add_noise(x, noise, (t / 1000).float())
    with torch.no_grad():
        flow = flow_of(dit, noisy, t.float(), clip, 0, sees_FF=sees)
        error = [(flow[b, f] - noise[b, f] + x[b, f]).square() for b in range(3)
                 for f in range(12) if not memory[b] or f >= 8]
        assert float(loss) == pytest.approx(float(torch.stack(error).mean()), rel=1e-5)
        later = noisy.clone()
        later[:, 8:] += 1
        other = flow_of(dit, later, t.float(), clip, 0, sees_FF=sees)
        assert torch.equal(other[:, :8], flow[:, :8]) and not torch.allclose(other[:, 8:],
                                                                             flow[:, 8:])
        # the retrieved chunk matters to the last: another one in its place changes the flow
        swapped = noisy.clone()
        swapped[:, :4] = noisy[:, :4].flip(0)
        other = flow_of(dit, swapped, t.float(), clip, 0, sees_FF=sees)
        assert float((other - flow)[:, 8:].abs().max()) > 0.01
    with pytest.raises(ShapeError, match="mask"):
        flow_of(dit, noisy, t.float(), clip, 0, sees_FF=sees[:8, :8])


def test_some_clips_are_trained_without_their_text():
    cfg, seen = replace(toy.CFG, text_dim=8, text_len=4), []
    clip, dit = scene(past=1, count=8)[0], lively(0, cfg)
    text, empty = torch.randn(8, 4, 8, generator=generator(7)), torch.full((4, 8), 0.5)
    dit.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    for share in (0.0, 0.5):
        causal_loss(dit, replace(clip, text_BLD=text), torch.zeros(8, dtype=torch.bool),
                    drawer(8, generator(5), (0, 1), CPU), cfg=CausalConfig(drop=share),
                    empty_LD=empty)
    gone = (seen[1] == empty).all(2).all(1)
    assert torch.equal(seen[0], text) and 0 < int(gone.sum()) < 8
    assert torch.equal(seen[1][~gone], text[~gone])


def test_the_causal_forward_is_the_cached_one_for_one_context_chunk_only():
    """With more, the published context pass lets context chunks see later ones."""
    clip, dit = scene(past=1, count=2)[0], lively()
    x = clip.latents_BFChw

    def both(old):
        n = old + 4
        some, t = clip.span(0, n), torch.full((2, n), 14.0)
        t[:, old:] = 700.0
        mask = causal_frame_mask(block_ids(n, 4))
        # frames of a sequence are seen from its first camera, a chunk from its own: no difference
        whole = flow_of(dit, x[:, :n], t, some, 0, sees_FF=mask)[:, old:]
        new = clip.span(old, n)
        context = encode(dit, clip.span(0, old), new.here)
        return whole, flow_of(dit, x[:, old:n], t[:, old:], new, old, context)

    with torch.no_grad():
        one, two = both(4), both(8)
    assert torch.allclose(*one, atol=2e-5)
    assert float((two[0] - two[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("wrong", [{"memory": 2.0}, {"rows": (984, 500)}, {"lengths": ()},
                                   {"drop": 1.0}], ids=str)
def test_wrong_settings_have_named_errors(wrong):
    with pytest.raises(ConfigError, match="chunk-causal"):
        CausalConfig(**wrong)
