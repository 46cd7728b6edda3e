"""The network: published sizes and names, strict files, bits that do not depend on the batch."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worldgym import checkpoint
from worldgym.attention import attention
from worldgym.errors import CheckpointError, ConfigError, ShapeError
from worldgym.models.wan import (
    MIN_ROWS,
    WAN_1_3B,
    WanConfig,
    WanDiT,
    block_ids,
    causal_frame_mask,
    teacher_forcing_frame_mask,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_dit import close, tiny_dit, video  # noqa: E402
from weights import write_shards  # noqa: E402

TEXT = dict(text_len=5, text_dim=7)


def pair(name, *weight, bias=True):
    """Shapes of a layer's weight and bias."""
    return {f"{name}.weight": weight} | ({f"{name}.bias": weight[:1]} if bias else {})


def native_shapes(D=1536, ffn=8960, layers=30, text=4096, freq=256, channels=16):
    """The state dict of specs/actionparty.md section 3.1."""
    want = pair("patch_embedding", D, channels, 1, 2, 2)
    want |= pair("text_embedding.0", D, text) | pair("text_embedding.2", D, D)
    want |= pair("time_embedding.0", D, freq) | pair("time_embedding.2", D, D)
    want |= pair("time_projection.1", 6 * D, D)
    for i in range(layers):
        b = f"blocks.{i}"
        want |= {f"{b}.modulation": (1, 6, D)} | pair(f"{b}.norm3", D)
        for kind in ("self_attn", "cross_attn"):
            for part in "qkvo":
                want |= pair(f"{b}.{kind}.{part}", D, D)
            for part in "qk":
                want |= pair(f"{b}.{kind}.norm_{part}", D, bias=False)
        want |= pair(f"{b}.ffn.0", ffn, D) | pair(f"{b}.ffn.2", D, ffn)
    return want | {"head.modulation": (1, 2, D)} | pair("head.head", 4 * channels, D)


def test_the_published_model_has_the_published_tensors():
    with torch.device("meta"):
        state = WanDiT(WAN_1_3B).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == native_shapes()
    assert len(state) == 825
    assert sum(v.numel() for v in state.values()) == 1_418_996_800


def test_native_config_json():
    native = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06,
              "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12,
              "num_layers": 30, "out_dim": 16, "text_len": 512}
    assert WanConfig.from_dict(json.loads(json.dumps(native))) == WAN_1_3B
    assert WanConfig.from_dict({"patch_size": [1, 2, 2]}).patch_size == (1, 2, 2)


@pytest.mark.parametrize("sizes", [dict(dim=10, num_heads=3), dict(dim=6, num_heads=2),
                                   dict(patch_size=(2, 2, 2))])
def test_impossible_sizes(sizes):
    with pytest.raises(ConfigError):
        WanConfig(**sizes)


# ------------------------------------------------------------------------- files


@pytest.mark.parametrize("sharded", [False, True])
def test_strict_loading_of_a_native_file(tmp_path, sharded):
    dit = tiny_dit(**TEXT)
    tensors = {k: v.clone() for k, v in dit.state_dict().items()}
    if sharded:
        write_shards(tmp_path, tensors, "diffusion_pytorch_model")
    else:
        save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with torch.device("meta"):
        empty = WanDiT(dit.cfg)
    loaded = checkpoint.load_into(empty, tmp_path)
    x, text = video(1, 2), torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x, torch.tensor([500.0]), text), dit(x, torch.tensor([500.0]), text))


@pytest.mark.parametrize("spoil,words", [
    (lambda t: t.pop("head.modulation"), "1 missing tensor"),
    (lambda t: t.update(extra=torch.zeros(1)), "1 extra tensor"),
    (lambda t: t.update({"head.head.bias": torch.zeros(3)}), "wrong shape"),
    (lambda t: t["blocks.1.ffn.0.weight"].fill_(float("nan")), "NaN"),
])
def test_a_native_file_that_does_not_fit_is_refused(tmp_path, spoil, words):
    dit = tiny_dit(**TEXT)
    tensors = {k: v.clone() for k, v in dit.state_dict().items()}
    before = {k: v.clone() for k, v in tensors.items()}
    spoil(tensors)
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(words)):
        checkpoint.load_into(dit, tmp_path / "net.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in dit.state_dict().items())


# ------------------------------------------------------------------------- forward


def test_bfloat16_runs_and_is_near():
    dit, x, t = tiny_dit(), video(2, 3), torch.tensor([700.0, 300.0])
    want = dit(x, t)
    got = tiny_dit().bfloat16()(x.bfloat16(), t)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("frames", [1, 2])
def test_bits_do_not_depend_on_the_batch(frames):
    dit, x = tiny_dit(dim=32), video(9, frames)
    t = torch.linspace(0, 1000, 9)[:, None].expand(9, frames)
    cond = video(1, 9)[0, 0, :, 0, 0, None, None].expand(9, frames, dit.cfg.dim).contiguous()
    whole, embedded = dit(x, t, cond_BFD=cond), dit.time(t, cond)
    for rows in (slice(0, 1), slice(4, 5), slice(3, 6), slice(2, 9)):
        assert torch.equal(dit(x[rows], t[rows], cond_BFD=cond[rows]), whole[rows])
        for got, want in zip(dit.time(t[rows], cond[rows]), embedded, strict=True):
            assert torch.equal(got, want[rows])
    order = torch.tensor([5, 0, 8, 1])
    assert torch.equal(dit(x[order], t[order], cond_BFD=cond[order]), whole[order])


@pytest.mark.parametrize("inputs,outputs", [(24, 144), (128, 768), (512, 128)])
def test_products_have_row_independent_bits_from_min_rows_on(inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    rows = torch.randn(40, inputs, generator=generator)
    whole = torch.nn.functional.linear(rows, weight)
    for count in (MIN_ROWS, MIN_ROWS + 1, 7, 16, 33):
        assert torch.equal(torch.nn.functional.linear(rows[:count], weight), whole[:count])


def test_frame_positions_are_relative_and_order_free():
    dit, x, t = tiny_dit(), video(1, 3), torch.tensor([[100.0, 500.0, 900.0]])
    want = dit(x, t)
    close(dit(x, t, frame_index_BF=torch.tensor([1000, 1001, 1002])), want, 1e-4)
    order = [2, 0, 1]
    close(dit(x[:, :, order], t[:, order], frame_index_BF=torch.tensor([order])), want[:, :, order])
    assert (dit(x, t, frame_index_BF=torch.tensor([0, 2, 4])) - want).abs().max() > 1e-3


def test_patches_are_the_strided_convolution():
    dit, x = tiny_dit(), video(2, 3)
    close(dit.patches(x), dit.patch_embedding(x).flatten(2).transpose(1, 2))


def test_text_is_needed_and_checked():
    dit, x, t = tiny_dit(**TEXT), video(1, 1), torch.tensor([500.0])
    with pytest.raises(ShapeError, match="no text given"):
        dit(x, t)
    for shape in ((1, 6, 7), (1, 3, 8)):
        with pytest.raises(ShapeError, match="text embedding"):
            dit(x, t, torch.zeros(shape))
    short = torch.ones(1, 2, 7)
    padded = torch.cat([short, torch.zeros(1, 3, 7)], 1)
    assert torch.equal(dit(x, t, short), dit(x, t, text_kv=dit.text(padded)))


def test_wrong_latents_are_refused():
    for shape in ((1, 3, 1, 4, 6), (1, 4, 1, 5, 6)):
        with pytest.raises(ShapeError, match="do not fit the model"):
            tiny_dit()(torch.zeros(shape), torch.tensor([1.0]))


def test_masks():
    assert block_ids(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert block_ids(5, 2, separate_first=True).tolist() == [0, 1, 1, 2, 2]
    assert causal_frame_mask(block_ids(4, 2), 3).int().tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert teacher_forcing_frame_mask(block_ids(2, 1)).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_and_sdpa_agree(dtype):
    from worldgym.attention import flash_function

    if flash_function() is None:
        pytest.skip("flash-attn is not installed")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, 128, generator=generator).cuda().to(dtype)
               for n in (60, 300, 300))
    everything = torch.ones(60, 300, dtype=torch.bool, device="cuda")
    close(attention(q, k, v).float(), attention(q, k, v, everything).float(), 2e-2)


def test_attention_mask_hides():
    q, k, v = (torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(i))
               for i in range(3))
    mask = torch.tensor([True, True, False]).expand(3, 3)
    close(attention(q, k, v, mask), attention(q, k[:, :2], v[:, :2]), 1e-6)
