"""WorldPlay's published folders: tiny ones in exactly these layouts, loaded, damaged, weighed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
for package in ("diffusers", "transformers"):
    pytest.importorskip(package)

from worldgym.agents.inspect import describe  # noqa: E402
from worldgym.errors import CheckpointError, LicenceError, UnsafeFileError  # noqa: E402
from worldgym.models import worldplay_files as files  # noqa: E402
from worldgym.models.hunyuan import HunyuanConfig, HunyuanDiT  # noqa: E402
from worldgym.models.umt5 import TextEncoder  # noqa: E402
from worldgym.models.wan import WanConfig  # noqa: E402
from worldgym.models.wan_vae import WanVAE  # noqa: E402
from worldgym.models.worldplay import WorldPlayDiT, config_of  # noqa: E402
from worldgym.models.worldplay_names import is_added, native_name  # noqa: E402

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 6, "out_channels": 6,
          "text_dim": 8, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2, "eps": 1e-6,
          "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "image_dim": None}
VAE = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 6, "dim_mult": [1, 2, 2, 2],
       "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True],
       "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
       "scale_factor_temporal": 4, "scale_factor_spatial": 16,
       "latents_mean": [0.1] * 6, "latents_std": [1.5] * 6, "_class_name": "AutoencoderKLWan"}
TEXT = {"vocab_size": 40, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_kv": 4, "d_ff": 12,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 128}
HUNYUAN = HunyuanConfig(
    hidden_size=128, heads_num=1, mm_double_blocks_depth=2, mlp_width_ratio=2.0, in_channels=4,
    out_channels=4, text_states_dim=10, vision_states_dim=6, byt5_states_dim=8, byt5_hidden=12)


def published_names(layers):
    """Every tensor name of the Wan variant as the specification lists them."""
    wb, time = ("weight", "bias"), "condition_embedder."
    for base in ("patch_embedding", f"{time}time_proj", "proj_out",
                 *(f"{time}{n}_embedder.linear_{i}" for n in ("time", "action", "text")
                   for i in (1, 2))):
        yield from (f"{base}.{x}" for x in wb)
    yield "scale_shift_table"
    for i in range(layers):
        block = f"blocks.{i}."
        yield block + "scale_shift_table"
        for attn in ("attn1", "attn2"):
            for n in ("to_q", "to_k", "to_v", "to_out.0"):
                yield from (f"{block}{attn}.{n}.{x}" for x in wb)
            yield from (f"{block}{attn}.{n}.weight" for n in ("norm_q", "norm_k"))
        for n in ("attn1.to_out_prope.0", "norm2", "ffn.net.0.proj", "ffn.net.2"):
            yield from (f"{block}{n}.{x}" for x in wb)


def values(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(tuple(s), generator=g).bfloat16() for k, s in shapes.items()}


def shapes_of(module, keep=lambda n: True):
    return {k: v.shape for k, v in module.state_dict().items() if keep(k)}


def wan_tensors():
    with torch.device("meta"):
        native = shapes_of(WorldPlayDiT(config_of(CONFIG)))
    return values({n: native[native_name(n)] for n in published_names(2)})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("worldplay"))


def write(root):
    for name in (files.WAN, files.BACKBONE, "ar_model", "ar_distilled_action_model", "vae",
                 "text_encoder"):
        (root / name).mkdir()
    tensors = wan_tensors()
    wrapped = {"model._fsdp_wrapped_module." + n.replace(
        "attn1.", "_fsdp_wrapped_module.model.attn1."): t for n, t in tensors.items()}
    torch.save({"generator": wrapped, "step": 7}, root / files.WAN / "model.pt")
    save_file({n: t for n, t in tensors.items() if not is_added(n)},
              root / files.BACKBONE / "diffusion_pytorch_model.safetensors")
    (root / files.BACKBONE / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        other = shapes_of(HunyuanDiT(HUNYUAN))
    save_file(values(other), root / "ar_model" / "diffusion_pytorch_model.safetensors")
    save_file(values(other, 1), root / "ar_distilled_action_model" / "model.safetensors")
    sizes = {k: v for k, v in VAE.items() if not k.startswith(("_", "latents_"))}
    save_file(values(shapes_of(WanVAE.build(sizes))),
              root / "vae" / "diffusion_pytorch_model.safetensors")
    (root / "vae" / "config.json").write_text(json.dumps(VAE))
    table = values(shapes_of(TextEncoder.build({**TEXT, "feed_forward_proj": "gated-gelu"})))
    held = {("shared.weight" if n == "embed_tokens.weight" else f"encoder.{n}"): t
            for n, t in table.items()}
    save_file(held, root / "text_encoder" / "model.safetensors")
    return root


def test_the_distilled_network_loads_with_its_renames(written):
    dit = files.find(written).load_network(dtype=None)
    want = wan_tensors()
    assert dit.cfg.num_heads == 2 and len(dit.state_dict()) == len(want)
    for name, tensor in want.items():
        assert torch.equal(dit.state_dict()[native_name(name)], tensor)


def test_the_backbone_comes_with_additions_that_add_nothing(written):
    dit = files.find(written).load_network(files.BACKBONE, dtype=torch.float32)
    held = dit.state_dict()
    for name, tensor in wan_tensors().items():
        if not is_added(name):
            assert torch.equal(held[native_name(name)], tensor.float())
    for i in range(2):
        assert not held[f"blocks.{i}.self_attn.o_camera.weight"].any()
    assert not held["action_embedding.2.weight"].any() and held["action_embedding.0.weight"].any()


def test_the_hunyuan_networks_load_and_tell_their_sizes(written):
    found = files.find(written)
    one, two = (found.load_network(n, dtype=None) for n in ("ar_model",
                                                           "ar_distilled_action_model"))
    assert one.cfg == two.cfg == HUNYUAN
    assert not torch.equal(one.img_in["proj"].weight, two.img_in["proj"].weight)


def test_autoencoder_and_text_encoder_load_from_diffusers_folders(written):
    found = files.find(written)
    vae = found.load_autoencoder(dtype=torch.float32)
    assert float(vae.mean.flatten()[0]) == pytest.approx(0.1)
    assert vae.decode(torch.zeros(1, 6, 2, 2, 2)).shape == (1, 3, 5, 32, 32)
    text = found.load_text_encoder(dtype=torch.float32)
    out = text.encode(torch.tensor([[3, 1, 0, 0]]), torch.tensor([[1, 1, 0, 0]]))
    assert out.shape == (1, 4, 8) and not out[:, 2:].any() and out[:, :2].any()


def test_published_sizes_are_the_classes_own():
    with torch.device("meta"):
        counts = {"wan": sum(p.numel() for p in WorldPlayDiT().parameters()),
                  "hunyuan": sum(p.numel() for p in HunyuanDiT().parameters())}
    assert counts == files.PARAMETERS
    assert [round(c / 1e9, 3) for c in counts.values()] == [5.293, 8.558]


def test_every_published_name_has_a_place():
    with torch.device("meta"):
        native = WorldPlayDiT(WanConfig(dim=24, ffn_dim=8, num_heads=2, num_layers=3)).state_dict()
    names = list(published_names(3))
    assert sorted(native_name(n) for n in names) == sorted(native)


def test_inspect_tells_what_there_is_and_the_licence(written):
    said = describe(written)
    for word in ("WorldPlay", "wan distilled model parameters", "ar model", "autoencoder",
                 "text encoder", "tokenizer missing", "Tencent", "may train on outputs: false",
                 "improve any other AI model", "European Union", "other sizes than published"):
        assert word in said, word
    assert files.find(written / "vae") is None


def test_parts_may_lie_in_two_folders(written, tmp_path):
    (tmp_path / files.WAN).symlink_to(written / files.WAN)
    alone = files.find(tmp_path)
    assert "missing" in alone.facts()["autoencoder"]
    with pytest.raises(CheckpointError):
        alone.load_autoencoder()
    assert files.find(tmp_path, written).load_autoencoder(dtype=torch.float32)
    with pytest.raises(CheckpointError, match="no such part"):
        alone.load_network("ar_model")


def damaged(written, tmp_path, change):
    tensors = wan_tensors()
    change(tensors)
    (tmp_path / files.WAN).mkdir()
    torch.save({"generator": tensors}, tmp_path / files.WAN / "model.pt")
    (tmp_path / files.BACKBONE).symlink_to(written / files.BACKBONE)
    return files.find(tmp_path)


def _cut(tensors):
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].clone()


@pytest.mark.parametrize("change", [
    lambda t: t.pop("blocks.1.norm2.bias"), lambda t: t.update(extra=torch.zeros(2)), _cut,
    lambda t: t["proj_out.bias"].fill_(float("nan"))],
    ids=["missing", "extra", "shape", "nan"])
def test_damaged_weights_are_refused(written, tmp_path, change):
    with pytest.raises(CheckpointError):
        damaged(written, tmp_path, change).load_network()


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    (tmp_path / files.WAN).mkdir()
    torch.save({"generator": {"a": torch.zeros(1)}, "x": Evil()}, tmp_path / files.WAN / "model.pt")
    found = files.find(tmp_path)
    with pytest.raises(UnsafeFileError):
        found.load_network()
    assert "missing" in found.facts()[files.WAN] and "code ran" not in capsys.readouterr().out


def test_training_needs_the_stated_right(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    from worldgym.agents import train

    spec = SimpleNamespace(licence=files.LICENCE, frame_hw=(8, 8), name="play",
                           action=HUNYUAN)  # any dataclass: only its fields are noted
    task = SimpleNamespace(world=SimpleNamespace(spec=spec), name="play", horizon=1, distrust=None,
                           penalty=0.0, hazard=0.0, forks=0)
    with pytest.raises(LicenceError, match="right-to-train"):
        train.train_in_dream(task, train.TrainConfig(), tmp_path)
    seen = {}
    monkeypatch.setattr(train, "train", lambda make, config, folder, facts, *_: seen.update(facts))
    train.train_in_dream(task, train.TrainConfig(), tmp_path, right_to_train=True)
    assert "stated by the user" in seen["right_to_train"] and "Tencent" in seen["right_to_train"]
