"""What helps small party worlds of tiles: staying at the frame before, and cells by themselves."""

import json

import pytest
import torch

from worldgym.errors import ConfigError
from worldgym.models import nano
from worldgym.models.codec import Codec, CodecConfig
from worldgym.models.party import PartyConfig, PartyDynamics, nano_config, stay
from worldgym.models.party_loss import game_text

CHW, SKIP = (3, 4, 4), (0.5, 0.1, 0.7)


@pytest.mark.parametrize("level", [1.0, 0.85, 0.6, 0.2, 0.0])
def test_stay_is_the_flow_that_a_gaussian_step_makes_likely(level):
    """Mean of noise - clean given the noisy value, and the spread around it, by drawing."""
    g, spread, before = torch.Generator().manual_seed(0), 0.4, 0.7
    step, noise = (torch.randn(400_000, generator=g, dtype=torch.float64) for _ in range(2))
    clean = before + spread * step
    x = (1 - level) * clean + level * noise
    still, said = (stay(x, torch.tensor(before), torch.tensor(level, dtype=torch.float64),
                        torch.tensor(spread, dtype=torch.float64), torch.tensor(s).double())
                   for s in (0.0, 1.0))
    rest = noise - clean - still
    assert rest.mean().abs() < 0.01  # right on average, and wherever the noisy value lies
    assert (rest * (x - x.mean())).mean().abs() < 0.01
    assert (rest.std() / (said - still).mean() - 1).abs() < 0.01


def party(skip=SKIP):
    cfg = nano_config(CHW, width=32, layers=1, head=16, slots=2, actions=5, facing=True, skip=skip)
    model = PartyDynamics(cfg)
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


def test_an_untrained_network_stays_where_it_is():
    model, g = party(), torch.Generator().manual_seed(1)
    video, recent = (torch.randn(2, *CHW, generator=g)[:, :, None] for _ in range(2))
    states, old = (torch.rand(2, 1, 2, 7, generator=g) for _ in range(2))
    valid = torch.tensor([[True, True], [True, False]])
    with torch.no_grad():
        flow_v, flow_s = model.joint(
            video, states, torch.full((2, 1), 1000.0), actions_BGN=torch.zeros(2, 1, 2).long(),
            before_BFNS=old, valid_BN=valid, text_kv=model.dit.text(game_text(torch.zeros(2), 1)),
            recent_BRFhw=recent)
    torch.testing.assert_close(video - flow_v, recent, atol=1e-6, rtol=0)
    torch.testing.assert_close((states - flow_s)[valid[:, None]], old[valid[:, None]],
                               atol=1e-6, rtol=0)
    assert not flow_s[1, 0, 1].any()  # an empty place stays as it was given


def test_skip_reads_back_and_refuses():
    cfg = party().cfg
    assert PartyConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    old = cfg.to_json()
    del old["skip"]  # worlds from before it
    assert PartyConfig.from_json(old).skip is None
    for wrong in (dict(recent=0), dict(beside=False), dict(skip=(0.5, 0.0, 0.1))):
        with pytest.raises(ConfigError, match="nothing to stay at"):
            nano_config(CHW, **{"slots": 2, "actions": 5, "skip": SKIP, **wrong})


@pytest.mark.parametrize("local", [True, False])
def test_cells_of_a_local_codec_know_only_themselves(local):
    codec = Codec(CodecConfig(frame_hw=(16, 16), channels=4, width=8, deep_width=16, stem=2,
                              local=local)).eval()
    frames = torch.randint(0, 256, (1, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    other = frames.clone()
    other[0, 5, 6] = 255 - other[0, 5, 6]  # cell (1, 1)
    with torch.no_grad():
        for p in codec.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.2)
        latents = [codec.encode(x.to(torch.uint8)) for x in (frames, other)]
        latents[1][:, :, 2:] = latents[0][:, :, 2:]
        drawn = [codec.decode_pixels(z) for z in latents]
        changed = (codec.encode(other.to(torch.uint8)) != latents[0]).any(1)[0]
    assert changed[1, 1] and (changed.sum() == 1) == local
    away = (drawn[0] != drawn[1]).any(1)[0, 8:]
    assert away.any() != local


def test_a_card_names_a_local_codec_and_older_ones_stay_as_they_were():
    cfg = nano.tiny().spec
    assert cfg.name
    made = nano.NanoConfig(name="x", action=cfg.action)
    assert "local" not in made.to_json()["codec"]
    local = nano.NanoConfig(name="x", action=cfg.action, codec=CodecConfig(local=True))
    assert nano.NanoConfig.from_json(local.to_json()).codec.local
