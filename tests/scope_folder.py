"""A tiny model in SCOPE's published folder layout, written file by file for the tests."""

import json
import re

import sentencepiece
import torch
from safetensors.torch import save_file

from worldgym.models.scope import ScopeConfig, ScopeDiT
from worldgym.models.wan_vae import WanVAE, diffusers_name

CONFIG = {
    "patch_size": [1, 2, 2], "in_dim": 48, "out_dim": 48, "eps": 1e-6, "dim": 64, "ffn_dim": 96,
    "freq_dim": 32, "text_dim": 16, "text_len": 24, "num_heads": 2, "num_layers": 2,
    "action_config": {"mouse_dim_in": 4, "keyboard_dim_in": 6, "dim": 64, "num_heads": 2,
                      "vae_time_compression_ratio": 4, "windows_size": 4},
}  # fmt: skip
VAE_SIZES = {
    "base_dim": 4, "decoder_base_dim": 4, "z_dim": 48, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1, "temperal_downsample": [False, True, True], "attn_scales": [],
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_temporal": 4, "scale_factor_spatial": 16,
}  # fmt: skip
SENTENCES = ["the quick brown fox jumps over the lazy dog", "a soldier fires in a dark hall",
             "first person view, walking in the rain with a rifle", "色调艳丽，过曝，静态"]


def random_like(shapes, seed, scale=0.1):
    """Random tensors; norms and gains around 1."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        value = scale * torch.randn(tuple(shape), generator=rng)
        if re.search(r"(norm\w*\.weight|gamma|mouse_mlp\.3\.weight)$", name):
            value += 1
        out[name] = value
    return out


def network_tensors(config=CONFIG, seed=0):
    with torch.device("meta"):
        net = ScopeDiT(ScopeConfig.from_dict(config))
    return random_like({k: v.shape for k, v in net.state_dict().items()}, seed)


def t5_shapes(dim=16, heads=2, layers=2, vocab=128, inner=16, ffn=24):
    """Section 8's list of names."""
    shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        b = f"blocks.{i}."
        shapes |= {b + "norm1.weight": (dim,), b + "norm2.weight": (dim,)}
        shapes |= {f"{b}attn.{x}.weight": (inner, dim) for x in "qkv"}
        shapes |= {b + "attn.o.weight": (dim, inner), b + "ffn.gate.0.weight": (ffn, dim),
                   b + "ffn.fc1.weight": (ffn, dim), b + "ffn.fc2.weight": (dim, ffn),
                   b + "pos_embedding.embedding.weight": (32, heads)}
    return shapes


def t5_tensors(dim=16, seed=1, **sizes):
    return random_like(t5_shapes(dim, **sizes), seed, 0.3)


def native_vae_names(sizes=VAE_SIZES):
    """Native name of every tensor of diffusers' autoencoder: section 7's list, spelled out."""
    levels, blocks, time = len(sizes["dim_mult"]), sizes["num_res_blocks"], sizes[
        "temperal_downsample"]
    names, both = [], ("weight", "bias")

    def layer(name, ends=both):
        names.extend(f"{name}.{end}" for end in ends)

    def resnet(name, shortcut):
        for i, ends in ((0, ["gamma"]), (2, both), (3, ["gamma"]), (6, both)):
            layer(f"{name}.residual.{i}", ends)
        if shortcut:
            layer(f"{name}.shortcut")

    layer("conv1")
    layer("conv2")
    down = [1, *sizes["dim_mult"]]
    up = [sizes["dim_mult"][-1], *sizes["dim_mult"][::-1]]
    sides = (("encoder", "downsamples", down, blocks, time),
             ("decoder", "upsamples", up, blocks + 1, time[::-1]))
    for side, part, widths, count, in_time in sides:
        layer(f"{side}.conv1")
        layer(f"{side}.head.0", ["gamma"])
        layer(f"{side}.head.2")
        for i in (0, 2):
            resnet(f"{side}.middle.{i}", False)
        layer(f"{side}.middle.1.norm", ["gamma"])
        layer(f"{side}.middle.1.to_qkv")
        layer(f"{side}.middle.1.proj")
        for i in range(levels):
            for j in range(count):
                resnet(f"{side}.{part}.{i}.{part}.{j}", j == 0 and widths[i] != widths[i + 1])
            if i < levels - 1:
                layer(f"{side}.{part}.{i}.{part}.{count}.resample.1")
                if in_time[i]:
                    layer(f"{side}.{part}.{i}.{part}.{count}.time_conv")
    return names


def vae_tensors(sizes=VAE_SIZES, seed=2):
    """Random weights under native names; shapes from diffusers' own network."""
    shapes = {k: v.shape for k, v in WanVAE.build(sizes).state_dict().items()}
    native = {name: diffusers_name(name) for name in native_vae_names(sizes)}
    assert sorted(native.values()) == sorted(shapes)
    return random_like({n: shapes[d] for n, d in native.items()}, seed, 0.2)


def write_shards(folder, tensors, count=3, name="model"):
    """``count`` shards and their index, as Hugging Face writes them."""
    keys, files = sorted(tensors), {}
    for i in range(count):
        file = f"{name}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = keys[i * len(keys) // count:(i + 1) * len(keys) // count]
        save_file({k: tensors[k].contiguous() for k in part}, folder / file)
        files |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / f"{name}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": files}))


def write_tokenizer(folder, vocab=120):
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_prefix=str(folder / "spiece"),
        vocab_size=vocab, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        minloglevel=2)
    (folder / "spiece.vocab").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "umt5"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>",
         "unk_token": "<unk>", "extra_ids": 0}))


def write_folder(folder, config=CONFIG, with_config=True):
    """The whole layout: bfloat16 network and text encoder, float32 autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, {k: v.bfloat16() for k, v in network_tensors(config).items()})
    if with_config:
        (folder / "config.json").write_text(json.dumps(config))
    torch.save({k: v.bfloat16() for k, v in t5_tensors(config["text_dim"]).items()},
               folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"model_state": vae_tensors()}, folder / "Wan2.2_VAE.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


