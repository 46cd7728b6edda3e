"""WHAM's benchmark compares the same work: equal tokens, and counts that are exact."""

import numpy as np
import torch

from worldgym.agents import bench_wham
from worldgym.models import wham_actions
from worldgym.models.sampling import Sampling
from worldgym.models.wham import tiny
from worldgym.models.wham_world import WhamWorld

GREEDY = Sampling(top_k=1)


@torch.no_grad()
def test_the_published_order_gives_the_same_tokens():
    model = tiny(torch.Generator().manual_seed(0), hw=(8, 12))
    world = WhamWorld(model, sampling=GREEDY, propose=True)
    state = bench_wham.begin(world, 2, 3)
    action = np.stack([wham_actions.NEUTRAL] * 2)
    taken = state.extra["taken_BFA"].clone()
    taken[:, -1] = world.features(action)
    ids = model.sequence(state.history_BKChw[:, -3:].flatten(2), taken[:, -3:])
    want = bench_wham.PublishedOrder(model, GREEDY).frame(ids, torch.full((2, 99), 0.5).double())
    new, chunk = world.step(state, action)
    assert torch.equal(chunk.latents_BFChw.flatten(1), want[:, :model.image_tokens])
    proposed = wham_actions.ids(world.proposal(new)) + model.codes
    assert (proposed == want[:, model.image_tokens:].numpy()).all()


def test_counts_at_the_full_size_follow_from_small_ones():
    """The polynomial gives what counting the whole thing gives, in both orders."""
    def make(layers, image_tokens):
        made = tiny(torch.Generator(), layers=layers, hw=(16, 20), seq_len=3, width=32).to("meta")
        made.image_tokens = image_tokens
        return made

    for cost in (lambda m: bench_wham.frame_flops(m, 2, 0),
                 lambda m: bench_wham.frame_flops(m, 2, 2),
                 lambda m: bench_wham.published_flops(m, 2)):
        assert bench_wham.whole(cost, make, layers=4, image_tokens=20) == cost(make(4, 20))


def test_windows_of_a_cycle():
    assert bench_wham.windows(1) == [(9, 0)]
    assert sorted(bench_wham.windows(4)) == [(6, 0), (7, 7), (8, 8), (9, 9)]


def test_five_hundred_frames_take_no_memory():
    model = tiny(torch.Generator().manual_seed(0), hw=(4, 8), width=16, layers=1)
    rows = {r.metric: r.value for r in bench_wham.soak(model, 500)}
    assert rows["memory_growth"] < 0.02 and rows["late_over_early"] < 2


def test_rows_of_a_short_run():
    model = tiny(torch.Generator().manual_seed(0), hw=(8, 12))
    rows = {r.metric: r for r in [*bench_wham.soak(model, 120), *bench_wham.speed(model, "x", 0.0),
                                  *bench_wham.deviation(model, (3,), 8)]}
    assert rows["extra_nats_per_token"].value == 0  # a lead of the whole width is raster order
    assert rows["memory_growth"].value < 0.2 and rows["speedup_exact"].value > 0.5
    assert "window of 3" in rows["throughput_16_over_1"].note
