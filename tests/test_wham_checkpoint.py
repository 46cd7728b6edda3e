"""Published WHAM files: what loads, what is refused, what is written; no code from a file runs."""

import collections
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from worldgym import checkpoint, picklefile
from worldgym.agents import inspect
from worldgym.agents.cli import main
from worldgym.envs.wham import wham
from worldgym.errors import CheckpointError, ConfigError, UnsafeFileError
from worldgym.models import wham_actions, wham_checkpoint
from worldgym.models.gpt import GPTConfig
from worldgym.models.wham import Wham, WhamConfig, tiny
from worldgym.models.wham_checkpoint import load

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parents[1] / "shared" / "golden" / "wham" / "wham_tiny.ckpt"
SIZE = {"small": (2, 4, 64)}


def published_classes(package, put):
    """Modules and classes as the release names them, for pickling only."""
    made = {}
    for module, name in (("models.wham_base.pl_creation_args", "LightningModuleCreationArgs"),
                         ("models.wham_token_model.gpt_token_transformer_predictor",
                          "GPTTokenPredictor"),
                         ("models.vqgan.vqgan", "VQGANModel"),
                         ("models.vqgan.taming_vqgan", "TamingVQModel"),
                         ("models.wham_token_model.token_action_encoder", "ActionTokenEncoder")):
        full = f"{package}.{module}"
        for depth in range(1, full.count(".") + 2):  # pickle imports the parents too
            part = ".".join(full.split(".")[:depth])
            if part not in sys.modules:
                put(sys.modules, part, types.ModuleType(part))
        made[name] = type(name, (), {"__module__": full})
        setattr(sys.modules[full], name, made[name])
    return made


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of the published layout around a tiny model."""

    def write(model=None, package="humanmodelling", name="wham.ckpt", pair=False, nested=False,
              change=None, **spec):
        model = model or tiny(torch.Generator().manual_seed(3), version=2)
        classes = published_classes(package, monkeypatch.setitem)

        def args(kind, **kwargs):
            made = classes["LightningModuleCreationArgs"]()
            made.__dict__ = {"pl_class": classes[kind], "pl_checkpoint_path": None,
                             "pl_kwargs": kwargs, "pl_stored_params_override": None}
            return made

        kind = {"vit": "VQGANModel", "conv": "TamingVQModel"}[model.cfg.tokenizer]
        image = dict(model.cfg.tokenizer_spec, is_perceptual=True, use_gan=False)
        if nested:
            sizes = {k: image.pop(k) for k in list(image) if k.startswith("image_size_per_")}
            images = args(kind, variant={**sizes, "model_spec": image}, ckpt_path="None")
        else:
            images = args(kind, model_spec=image, ckpt_path=None)
        middles = ("0.", "1.") if pair else ("",)
        state = collections.OrderedDict()
        for key, value in model.state_dict().items():
            part, _, rest = key.partition(".")
            if part == "gpt":
                state["predictor.gpt_model." + rest] = value
            else:
                state.update({f"context_encoders.images.{m}{rest}": value for m in middles})
        state["predictor.gpt_model.lm_head.weight"] = state[
            "predictor.gpt_model.transformer.wte.weight"].clone()
        state["context_encoders.images.lpips.net.weight"] = torch.ones(3)
        state["context_encoders.images.encoder.vit.0.attn.attn_mask"] = torch.ones(1, 1, 2, 2) > 0
        spec = {"model_size": "small", "seq_len": model.cfg.seq_len,
                "nanogpt_version": model.cfg.gpt.version, "bias": model.cfg.gpt.bias, **spec}
        whole = {"epoch": 1, "global_step": 7, "state_dict": state, "callbacks": {},
                 "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(5)}}}],
                 "hparams_name": "kwargs", "hyper_parameters": {
                     "predictor_args": args("GPTTokenPredictor", model_spec=spec),
                     "context_encoder_args": {
                         "images": (images, images) if pair else images,
                         "actions_output": args("ActionTokenEncoder")},
                     "variant": {"model_spec": spec}}}
        if change:
            change(whole)
        torch.save(whole, tmp_path / name)
        monkeypatch.undo()  # the classes are gone when the file is read
        return tmp_path / name, model

    return write


@pytest.mark.parametrize("layout", [{}, {"package": "wham"}, {"pair": True}, {"nested": True}],
                         ids=["plain", "new package name", "encoder and decoder", "in variant"])
def test_the_published_layout_loads(write, layout):
    path, model = write(**layout)
    before = set(sys.modules)
    again = load(path, SIZE)
    assert not {m for m in set(sys.modules) - before if m.startswith(("wham", "humanmod"))}
    want, got = model.state_dict(), again.state_dict()
    assert set(want) == set(got) and all(torch.equal(want[k], got[k]) for k in want)
    assert again.cfg.gpt == model.cfg.gpt and again.cfg.seq_len == model.cfg.seq_len


def test_the_convolutional_tokeniser_loads_and_dreams(write, tmp_path):
    spec = {"taming_n_embed": 16, "taming_embed_dim": 4, "taming_num_indices_per_axis": 4,
            "taming_ddconfig": {
                "double_z": False, "z_channels": 6, "resolution": 8, "in_channels": 3, "out_ch": 3,
                "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4],
                "dropout": 0.0}}
    gpt = GPTConfig(block_size=96, vocab_size=16 + 68, n_layer=2, n_head=4, n_embd=64)
    model = Wham(WhamConfig(gpt=gpt, seq_len=3, tokenizer="conv", tokenizer_spec=spec))
    model.gpt.initialize(torch.Generator().manual_seed(0))
    path, _ = write(model)
    again = load(path, SIZE)
    want, got = model.state_dict(), again.state_dict()
    assert set(want) == set(got) and all(torch.equal(want[k], got[k]) for k in want)
    out = wham_checkpoint.convert(path, tmp_path / "w.safetensors", SIZE)
    assert "conv" in inspect.describe(out)
    env = wham(model=out)
    env.reset(seed=0)
    assert env.step(wham_actions.NEUTRAL)[0].shape == (8, 8, 3)


def test_optimiser_state_is_never_read(write):
    def spoil(whole):  # a hundred megabytes that nobody touches
        whole["optimizer_states"] = [torch.empty(25_000_000)]

    path, _ = write(change=spoil)
    before = resident()
    load(path, SIZE)
    assert path.stat().st_size > 1e8 and resident() - before < 5e7


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_conversion_gives_the_same_model(write, tmp_path):
    path, _ = write(dropout=0.1)
    out = wham_checkpoint.convert(path, tmp_path / "w.safetensors", SIZE)
    first, again = load(path, SIZE), load(out)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
    assert again.cfg.to_json() == first.cfg.to_json()
    told = inspect.describe(out)
    assert "Microsoft Research License" in told and "heads: 4" in told and "dropout" in told
    half = load(out, dtype=torch.bfloat16)
    assert half.gpt.network().wte.dtype == torch.bfloat16


def test_odd_counters_do_not_keep_a_file_from_being_converted(write, tmp_path):
    path, _ = write(change=lambda whole: whole.update(
        epoch=torch.ones(3), global_step=whole["hyper_parameters"]["predictor_args"]))
    out = wham_checkpoint.convert(path, tmp_path / "w.safetensors", SIZE)
    assert "epoch: null" in inspect.describe(out)


def test_command_line(write, tmp_path, capsys):
    path, model = write()
    out = tmp_path / "w.safetensors"
    assert main(["convert", "--path", str(path), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "'small'" in told and "--size LAYERS HEADS WIDTH" in told and not out.exists()
    assert main(["inspect", "--path", str(path)]) == 0
    assert "unknown model size" in capsys.readouterr().out
    assert main(["convert", "--path", str(path), "--out", str(out), "--size", "2", "4", "64"]) == 0
    assert main(["inspect", "--path", str(out)]) == 0
    assert "parameters (transformer)" in capsys.readouterr().out
    assert load(out).cfg.gpt.n_head == 4


class Runs:
    """A pickle that would run a command."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("make", [
    lambda mark: Runs(os.system, f"touch {mark}"),
    lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    lambda mark: Runs(torch.save, 1, str(mark)),
    lambda mark: Runs(checkpoint.save, str(mark) + ".safetensors", {}),
    lambda mark: Runs(getattr, "text", "upper"),
    lambda mark: os.remove,
], ids=["os.system", "eval", "torch.save", "our own code", "getattr", "only named"])
def test_a_hostile_pickle_is_refused(write, tmp_path, make):
    mark = tmp_path / "ran"
    path, _ = write(change=lambda whole: whole.update(callbacks=make(mark)))
    with pytest.raises(UnsafeFileError, match="wants to run code"):
        load(path, SIZE)
    assert not list(tmp_path.glob("ran*"))


def test_a_pickle_cannot_change_what_other_files_are_read_with(tmp_path):
    """BUILD may set attributes: of nothing that outlives the file."""
    rebuild = picklefile.HARMLESS["torch._utils._rebuild_tensor_v2"]
    before = rebuild._function
    for name, value in (("_function", b"ccollections\nOrderedDict\n"), ("other", b"K\x01")):
        text = name.encode()
        evil = (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X" + bytes([len(text), 0, 0, 0])
                + text + value + b"s\x86b.")  # BUILD with the state (None, {name: value})
        with zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as archive:
            archive.writestr("a/data.pkl", evil)
            archive.writestr("a/version", "3")
        with pytest.raises(UnsafeFileError, match="set"):
            picklefile.load_records(tmp_path / "evil.ckpt")
        assert rebuild._function is before


def of_spec(**changes):
    return lambda whole: whole["hyper_parameters"]["predictor_args"].pl_kwargs[
        "model_spec"].update(changes)


def of_images(**changes):
    return lambda whole: whole["hyper_parameters"]["context_encoder_args"][
        "images"].pl_kwargs["model_spec"].update(changes)


@pytest.mark.parametrize("change", [
    lambda whole: whole["state_dict"].update({3: torch.ones(1)}), of_spec(seq_len="10"),
    of_spec(seq_len=None), of_spec(seq_len=torch.tensor(4)), of_spec(seq_len=4.0),
    of_spec(nanogpt_version="x"), of_spec(nanogpt_version=None),
    lambda whole: whole["state_dict"].update(
        {"predictor.gpt_model.transformer.h.x.ln_1.weight": torch.ones(1)}),
    lambda whole: whole["state_dict"].update(
        {"predictor.gpt_model.transformer.wpe.weight": torch.tensor(1.0)}),
    lambda whole: (whole["hyper_parameters"].update(variant="x"),
                   whole["hyper_parameters"]["predictor_args"].pl_kwargs.clear()),
    of_images(patch_size="4"), of_images(num_layers=10**7), of_images(vocab_size=10**12),
    of_images(image_size_per_x_axis=10**9)])
def test_anything_may_stand_in_a_file(write, change):
    path, _ = write(change=change)
    with pytest.raises((CheckpointError, ConfigError)):
        load(path, SIZE)


def drop(name):
    return lambda whole: whole["state_dict"].pop(name)


def put(name, value):
    return lambda whole: whole["state_dict"].update({name: value})


@pytest.mark.parametrize(("change", "words"), [
    (drop("predictor.gpt_model.transformer.h.1.mlp.c_fc.weight"), "1 missing tensor"),
    (drop("context_encoders.images.decoder.proj1.bias"), "1 missing tensor"),
    (drop("predictor.gpt_model.transformer.wpe.weight"), "wpe"),
    (put("predictor.gpt_model.lm_head.weight", torch.zeros(2, 2)), "differ"),
    (put("predictor.gpt_model.transformer.ln_f.weight", torch.full((64,), torch.nan)), "NaN"),
    (put("reward_head.weight", torch.zeros(2)), "reward_head"),
    (lambda whole: whole.pop("hyper_parameters"), "hyper_parameters"),
    (lambda whole: whole["hyper_parameters"].update(predictor_args=3), "creation-args"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_fit_is_refused(write, change, words):
    path, _ = write(change=change)
    with pytest.raises(CheckpointError, match=words):
        load(path, SIZE)


def test_sizes_that_do_not_fit_are_refused(write, tmp_path):
    path, _ = write()
    with pytest.raises(ConfigError, match="unknown model size"):
        load(path)
    with pytest.raises(CheckpointError, match="size it names"):
        load(path, {"small": (3, 4, 64)})
    other, _ = write(seq_len=50, name="long.ckpt")
    with pytest.raises(ConfigError, match="does not fit"):
        load(other, SIZE)


@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_a_cut_file_is_refused(write, keep):
    path, _ = write()
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match="torch"):
        load(path, SIZE)


def test_old_torch_files_and_programs_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="zip"):
        load(tmp_path / "old.ckpt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "program.ckpt"))
    with pytest.raises(UnsafeFileError, match="TorchScript"):
        load(tmp_path / "program.ckpt")


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"{GOLDEN} is absent")
def test_the_published_implementation_s_own_file():
    model = load(GOLDEN, {"fixture-l2-h4-d32": (2, 4, 32)})
    assert (model.image_tokens, model.codes, model.step_tokens) == (24, 64, 40)
    assert "cannot be used" in inspect.describe(GOLDEN)
