"""SCOPE's published folder: a tiny one written in exactly this layout, loaded, damaged, weighed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
for package in ("diffusers", "transformers", "sentencepiece", "ftfy"):
    pytest.importorskip(package)

import scope_folder as layout  # noqa: E402

from worldgym.agents.inspect import describe  # noqa: E402
from worldgym.errors import CheckpointError, ConfigError, ShapeError, UnsafeFileError  # noqa: E402
from worldgym.models import umt5  # noqa: E402
from worldgym.models.scope_files import find, layout_fingerprint, open_folder  # noqa: E402
from worldgym.models.wan_vae import WanVAE, diffusers_name, sizes_of  # noqa: E402

VAE, TEXT = "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return layout.write_folder(tmp_path_factory.mktemp("scope"))


@pytest.fixture
def folder(written, tmp_path):
    """A copy whose files may be replaced (links: what is damaged is written anew)."""
    for path in written.rglob("*"):
        if path.is_file():
            new = tmp_path / path.relative_to(written)
            new.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, new)
    return tmp_path


def rewrite(path, data):
    path.unlink()
    path.write_bytes(data)


def test_every_part_loads_as_it_was_written(written):
    found = open_folder(written)
    network = found.load_network(dtype=None)
    want = layout.network_tensors()
    assert {k: v.dtype for k, v in network.state_dict().items()} == dict.fromkeys(
        want, torch.bfloat16)
    assert all(torch.equal(v, want[k].bfloat16()) for k, v in network.state_dict().items())
    vae = found.load_autoencoder(dtype=torch.float32)
    for name, value in layout.vae_tensors().items():
        assert torch.equal(vae.net.state_dict()[diffusers_name(name)], value)
    text = found.load_text_encoder(dtype=torch.float32).net.state_dict()
    for name, value in layout.t5_tensors().items():
        assert torch.equal(text[umt5.transformers_name(name)], value.bfloat16().float())
    assert found.config().wan.num_heads == 2 and found.config().wan.text_len == 24


def test_sizes_of_the_published_autoencoder_and_text_encoder():
    real = dict(layout.VAE_SIZES, base_dim=160, decoder_base_dim=256, num_res_blocks=2)
    shapes = {k: v.shape for k, v in WanVAE.build(real).state_dict().items()}
    native = {n: shapes[diffusers_name(n)] for n in layout.native_vae_names(real)}
    assert len(native) == 196
    assert layout_fingerprint(native) == "e1de6c02cdac79f8b739f4d3698cd216"
    assert sum(s.numel() for s in native.values()) == 704_688_668
    assert sizes_of(native) == real
    big = layout.t5_shapes(dim=4096, heads=64, layers=24, vocab=256384, inner=4096, ffn=10240)
    assert layout_fingerprint(big) == "9c8818c2cbea55eca56c7b447df170da"
    net = umt5.TextEncoder.build(umt5.sizes_of(big))
    assert sum(p.numel() for p in net.parameters()) == 5_680_910_336


def test_prompts(written):
    import sentencepiece

    contexts = open_folder(written).contexts(["the fox", "a soldier &amp; a&nbsp; rifle"])
    assert contexts.shape == (2, 24, 16)
    used = (contexts != 0).any(-1).sum(1).tolist()
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(written / "google/umt5-xxl/spiece.model"))
    texts = ["the fox", "a soldier & a rifle"]
    assert used == [len(model.encode(t)) + 1 for t in texts]
    ids, mask = umt5.Tokenizer(written / "google/umt5-xxl", 24)([*texts, "色调艳丽，过曝 " * 20])
    for row, text in zip(ids, texts, strict=False):
        want = [*model.encode(text), umt5.EOS]
        assert row.tolist() == want + [umt5.PAD] * (24 - len(want))
    assert ids[2, -1] == umt5.EOS and mask[2].all()


# ------------------------------------------------------------------------- what is wrong


def test_without_config_the_heads_must_be_told(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="number of heads"):
        open_folder(folder)
    told = open_folder(folder, {"num_heads": 2})
    assert told.config().wan.num_heads == 2 and told.config().wan.text_len == 512
    assert "not known" in describe(folder)
    rewrite_config = folder / "config.json"
    rewrite_config.write_text('{"anything": ["unknown"], "num_heads": 2}')
    assert open_folder(folder).config().wan.num_heads == 2
    rewrite_config.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_folder(folder)


@pytest.mark.parametrize("name,words", [
    ("model-00002-of-00003.safetensors", "shards are missing"), (VAE, "does not exist"),
    (TEXT, "does not exist"), ("google/umt5-xxl/spiece.model", "not complete"),
    ("model.safetensors.index.json", "index is missing")])
def test_a_missing_file(folder, name, words):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder)
    text = describe(folder)
    assert "SCOPE" in text and "missing: nothing" not in text and name.split("/")[0] in text


def test_a_folder_without_its_network(folder):
    for path in (*folder.glob("model-*"), folder / "model.safetensors.index.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="network is missing"):
        open_folder(folder)
    text = describe(folder)
    assert "SCOPE" in text and "network (model.safetensors.index.json)" in text
    assert "model-00001-of-00003.safetensors" in text and "not known" in text
    (folder / "diffusion_pytorch_model-00001-of-00003.safetensors").write_bytes(b"")
    assert find(folder) is None  # plain Wan2.2, which comes with the same two files
    with pytest.raises(CheckpointError, match="nothing that worldgym wrote or knows"):
        describe(folder)


def test_a_file_of_another_name_and_files_too_many(folder):
    (folder / "README.md").write_text("x")
    (folder / "other.safetensors").write_bytes(b"x")
    assert open_folder(folder).missing == []
    os.rename(folder / VAE, folder / "vae.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_folder(folder)
    assert f"autoencoder ({VAE})" in describe(folder)
    os.rename(folder / "vae.pth", folder / VAE)
    shard = folder / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    shard.unlink()
    save_file({**tensors, "new": torch.ones(1)}, shard)
    with pytest.raises(CheckpointError, match="shard and index disagree"):
        open_folder(folder)
    assert "shard and index disagree" in describe(folder)


def test_the_stamp_tells_other_weights(folder):
    before = open_folder(folder).stamp()
    assert before == open_folder(folder).stamp()
    data = bytearray((folder / VAE).read_bytes())
    data[-1] ^= 1
    rewrite(folder / VAE, bytes(data))
    assert find(folder).stamp() != before


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}'])
def test_a_damaged_index(folder, text):
    rewrite(folder / "model.safetensors.index.json", text.encode())
    with pytest.raises(CheckpointError, match="not a shard index"):
        open_folder(folder)
    assert "SCOPE" in describe(folder) and "not a shard index" in describe(folder)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", VAE, TEXT])
def test_a_file_cut_off(folder, name):
    rewrite(folder / name, (folder / name).read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="not a complete"):
        open_folder(folder)
    assert "not a complete" in describe(folder)


@pytest.mark.parametrize("change,words", [
    (lambda t: t.pop("head.modulation"), "1 missing tensor"),
    (lambda t: t.update({"blocks.1.action_attn.extra": torch.zeros(2)}), "1 extra tensor"),
    (lambda t: t.update({"head.modulation": torch.zeros(1, 2, 63)}), "wrong shape"),
    (lambda t: t.update({"head.modulation": torch.full((1, 2, 64), float("nan"))}), "NaN")])
def test_a_network_that_does_not_fit(folder, change, words):
    tensors = {}
    for path in folder.glob("model-*"):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "SCOPE.safetensors")
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder).load_network()


def test_a_text_encoder_that_does_not_fit(folder):
    tensors = layout.t5_tensors()
    tensors.pop("blocks.1.norm2.weight")
    (folder / TEXT).unlink()
    torch.save(tensors, folder / TEXT)
    with pytest.raises(CheckpointError, match="1 missing tensor"):
        open_folder(folder).load_text_encoder()


def test_a_pickle_that_wants_to_run_code(folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    rewrite(folder / VAE, pickle.dumps(Evil()))
    with pytest.raises(UnsafeFileError):
        open_folder(folder)
    assert "run code" in describe(folder)


def test_other_folders_are_not_scope(tmp_path, folder):
    assert find(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="not a SCOPE folder"):
        open_folder(tmp_path / "nowhere")
    plain = tmp_path / "plain"
    plain.mkdir()
    layout.write_shards(plain, {k: v for k, v in layout.network_tensors().items()
                                if "action_attn" not in k})
    assert find(plain) is None
    # plain Wan shards beside SCOPE's are ignored
    layout.write_shards(folder, {"patch_embedding.weight": torch.zeros(3)},
                        name="diffusion_pytorch_model")
    assert open_folder(folder).network.shapes["patch_embedding.weight"] == (64, 48, 1, 2, 2)


def test_inspect_says_what_it_is(written, capsys):
    from worldgym.agents import cli

    assert cli.main(["inspect", str(written)]) == 0
    text = capsys.readouterr().out
    parameters = sum(v.numel() for v in layout.network_tensors().values())
    for words in ("missing: nothing", f"network parameters: {parameters}", "Apache-2.0",
                  "network tensors: 119", "other sizes than published", "GiB",
                  layout_fingerprint({k: v.shape for k, v in layout.network_tensors().items()})):
        assert words in text


# ------------------------------------------------------------------------- memory

PEAK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from worldgym.models import scope_files, umt5
def status(key):
    rows = [r for r in open("/proc/self/status") if r.startswith(key)]
    return int(rows[0].split()[1]) * 1024
small, big = (scope_files.find(p) for p in sys.argv[2:4])
for folder, name, dtype in ((f, n, d) for f in (small, big)  # small: code pages and caches
                            for n in ("load_network", "load_text_encoder")
                            for d in (torch.bfloat16, torch.float32)):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    part = getattr(folder, name)(dtype=dtype)
    tensors = getattr(part, "net", part).state_dict().values()
    if folder is big:
        print((status("VmHWM") - before) / sum(t.numel() * t.element_size() for t in tensors))
    del part, tensors
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_the_part(written, tmp_path):
    config = dict(layout.CONFIG, dim=512, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=512)
    config["action_config"] = dict(config["action_config"], dim=512, num_heads=4)
    layout.write_shards(tmp_path, {k: v.bfloat16() for k, v in
                                   layout.network_tensors(config).items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    big = layout.t5_tensors(dim=512, heads=8, layers=6, vocab=40000, inner=512, ffn=2048)
    torch.save({k: v.bfloat16() for k, v in big.items()}, tmp_path / TEXT)
    # the C library keeps what was freed, up to a threshold that grows: not the loader's doing
    env = dict(os.environ, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    done = subprocess.run([sys.executable, "-c", PEAK, str(HERE), str(written), str(tmp_path)],
                          capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    peaks = [float(x) for x in done.stdout.split()]
    assert len(peaks) == 4 and all(0.8 < p <= 1.15 for p in peaks), peaks


# ------------------------------------------------------------------------- autoencoder


@pytest.fixture(scope="module")
def vae():
    return WanVAE.load(layout.vae_tensors())


def latents(batch=2, frames=4, seed=0):
    return torch.randn(batch, 48, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_decoding_frame_by_frame_gives_the_bits_of_the_whole(vae):
    z = latents()
    whole = vae.decode(z)
    assert whole.shape == (2, 3, 13, 32, 48)
    scaled = z * vae.std + vae.mean
    published = vae.net.decode(scaled).sample  # its first convolution takes all frames at once
    torch.testing.assert_close(whole.clamp(-1, 1), published, atol=1e-4, rtol=0)
    state, pieces = None, []
    for part in (z[:, :, :1], z[:, :, 1:3], z[:, :, 3:]):
        piece, state = vae.decode_next(part, state)
        pieces.append(piece)
    assert [p.shape[2] for p in pieces] == [1, 8, 4]
    assert torch.equal(torch.cat(pieces, 2), whole)


def test_decoder_states_are_values(vae):
    z = latents(3)
    _, state = vae.decode_next(z[:, :, :2])
    want, later = vae.decode_next(z[:, :, 2:3], state)
    vae.decode_next(latents(3, 1, seed=5), state)  # another future of the same moment
    assert torch.equal(vae.decode_next(z[:, :, 2:3], state)[0], want)
    vae.decode(latents(1))  # a whole other video in between
    one, _ = vae.decode_next(z[1:2, :, 2:3], state.select([1]))
    torch.testing.assert_close(one, want[1:2], atol=1e-5, rtol=0)
    both, _ = vae.decode_next(z[[2, 2], :, 3:], later.select(torch.tensor([2, 2])))
    assert torch.equal(both[0], both[1])


def test_diffusers_names_need_their_sizes(vae):
    state = vae.net.state_dict()
    again = WanVAE.load(state, sizes={"_class_name": "AutoencoderKLWan", **layout.VAE_SIZES})
    assert torch.equal(again.decode(latents(1)), vae.decode(latents(1)))
    with pytest.raises(CheckpointError, match="sizes of the autoencoder"):
        WanVAE.load(state)
    with pytest.raises(CheckpointError, match="not the tensors of a Wan2.2 autoencoder"):
        WanVAE.load({"a": torch.zeros(1)})


def test_encoding(vae):
    video = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = vae.encode(video)
    assert z.shape == (1, 48, 3, 2, 3)
    torch.testing.assert_close(vae.encode(video[:, :, :1]), z[:, :, :1], atol=1e-5, rtol=0)
    for wrong in (video[:, :, :8], video[..., :30]):
        with pytest.raises(ShapeError, match="does not fit the autoencoder"):
            vae.encode(wrong)
    with pytest.raises(ShapeError, match="latents do not fit"):
        vae.decode(z[:, :47])
    with pytest.raises(ShapeError, match="statistics"):
        WanVAE(vae.net, [0.0], [1.0])


GOLDEN = HERE.parents[1] / "shared" / "golden" / "scope"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")
def test_a_clip_is_the_published_one():
    import golden
    from golden_scope import denoise

    base = GOLDEN / "denoise_tiny"
    fixture = golden.Fixture(GOLDEN, base.name, json.loads(base.with_suffix(".json").read_text()),
                             load_file(base.with_suffix(".safetensors")))
    with torch.no_grad():
        checks = {c.name: c for c in denoise(fixture)}
    assert set(checks) == {n for n in fixture.tensors
                           if n not in ("in.image", "in.mouse", "in.keyboard")}
    for name, check in checks.items():
        error = (check.got.double() - check.want.double()).abs().max()
        assert error <= (1 if name == "out.frames_uint8" else 1e-4), name
