"""Decoding one token in few calls: the same bits as a block makes of it."""

import numpy as np
import pytest
import torch

from worldgym.models.gpt import StaticCache
from worldgym.models.wham import tiny


@pytest.mark.parametrize("settings", [{}, {"version": 2}, {"bias": False},
                                      {"layers": 3, "heads": 2, "width": 96}], ids=repr)
def test_one_token_in_few_calls_is_what_a_block_makes_of_it(settings):
    model = tiny(torch.Generator().manual_seed(0), hw=(8, 12), **settings)
    net, cfg = model.gpt.network(), model.cfg.gpt
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, cfg.vocab_size, (5, 9)))
    few, plain = (StaticCache(cfg, 5, 9, net.wpe) for _ in range(2))
    with torch.inference_mode():
        for cache in (few, plain):
            net.hidden(ids[:, :8], torch.arange(8), cache.extend(0, 8))
        want = net.hidden(ids[:, 8:], torch.arange(8, 9), plain.extend(8, 1))[:, 0]
        x = torch.nn.functional.embedding(ids[:, 8], net.wte) + net.wpe[8]
        for number, layer in enumerate(net.layers):
            x = layer.after(x, few.append(number, 8, layer.asked(x)))
    assert torch.equal(x, want)
    assert all(torch.equal(a, b) for a, b in zip(few.stores, plain.stores, strict=True))
