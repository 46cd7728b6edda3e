"""WHAM checkpoints: the published ``.ckpt`` layout, and our safetensors (specs/wham.md section 7).

A published file is a Lightning checkpoint whose hyper-parameters are pickled objects under an old
package name. :mod:`worldgym.picklefile` reads them as inert records; classes are told by their
recorded names. Optimiser state (two thirds of the bytes) is mapped and never read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldgym import checkpoint
from worldgym.errors import CheckpointError, ConfigError, WorldGymError
from worldgym.models.gpt import GPTConfig
from worldgym.models.wham import SIZES, TOKENIZERS, Wham, WhamConfig
from worldgym.picklefile import Record, load_records
from worldgym.weightfile import META_KEY, Entry, open_weights

KIND = "worldgym.wham"
LICENCE = "Microsoft Research License, research use; weights may not be shipped"
GPT, IMAGES = "predictor.gpt_model.", "context_encoders.images."
CLASSES = {"VQGANModel": "vit", "TamingVQModel": "conv"}
ACTION_CLASS, GPT_CLASS = "ActionTokenEncoder", "GPTTokenPredictor"
DROPPED = (".attn_mask", ".attn.bias")  # mask buffers
DROPPED_PARTS = ("lpips", "patch_gan", "target_patchgan")  # networks of the tokeniser's training
READ = {"model_size", "seq_len", "nanogpt_version", "bias"}
# tokeniser keys that only its training used
TRAINING = {"commitment_cost", "is_perceptual", "use_gan"}
Sizes = Mapping[str, tuple[int, int, int]]


def is_wham(path: str | Path) -> bool:
    """Whether a file is of the published layout or converted; nothing is loaded."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return dict(open_weights(path).metadata.get(META_KEY, {})).get("kind") == KIND
    if path.suffix != ".ckpt" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            inner = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            return bool(inner) and GPT_CLASS.encode() in archive.read(inner[0])
    except zipfile.BadZipFile:
        return False


def read(path: str | Path, sizes: Sizes | None = None
         ) -> tuple[WhamConfig, dict[str, Entry], dict[str, Any]]:
    """(config, tensors by our names, notes) of a published or a converted file.

    Args:
        sizes: further entries (layers, heads, width) of the size table ``wham.SIZES``; the name
            ``*`` stands for any that the table lacks.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        return _published(path, sizes or {})
    file = open_weights(path)
    header = dict(file.metadata.get(META_KEY, {}))
    if header.get("kind") != KIND:
        raise CheckpointError("not a WHAM checkpoint", given=f"{path}: kind {header.get('kind')}",
                              expected="a published .ckpt, or what worldgym convert wrote",
                              fix="convert the published file")
    return WhamConfig.from_json(header["config"]), dict(file.entries), header.get("notes", {})


def load(path: str | Path, sizes: Sizes | None = None, *, device: torch.device | str = "cpu",
         dtype: torch.dtype | None = None) -> Wham:
    """The model of a published or a converted file, ready to run."""
    config, entries, _ = read(path, sizes)
    with torch.device("meta"):
        model = Wham(config)
    tensors = {name: entry.read() for name, entry in entries.items()}
    return checkpoint.load_into(model, tensors, device=device,
                                dtype=dtype or torch.float32).requires_grad_(False).eval()


def convert(path: str | Path, out: str | Path, sizes: Sizes | None = None,
            dtype: torch.dtype | None = None) -> Path:
    """Write a published file as safetensors: no optimiser state, no masks, one head."""
    config, _, notes = read(path, sizes)
    model = load(path, sizes, dtype=dtype)
    header = {"kind": KIND, "format": 1, "config": config.to_json(), "licence": LICENCE,
              "notes": notes}
    return checkpoint.save(out, model, header)


def describe(path: str | Path, sizes: Sizes | None = None) -> dict[str, Any]:
    """Sizes, parameters and licence of a published or converted file, as plain JSON values."""
    path = Path(path)
    try:
        config, entries, notes = read(path, sizes)
    except ConfigError as error:
        return {"kind": "WHAM", "bytes": path.stat().st_size, "licence": LICENCE,
                "cannot be used as it is": str(error)}
    counts = {part: sum(torch.Size(e.shape).numel() for n, e in entries.items()
                        if n.startswith(part)) for part in ("gpt.", "tokenizer.")}
    gpt, spec = config.gpt, dict(config.tokenizer_spec)
    with torch.device("meta"):
        model = Wham(config)
    return {
        "kind": "WHAM", "bytes": path.stat().st_size, "licence": LICENCE,
        "size": config.size_name, "layers": gpt.n_layer, "heads": gpt.n_head,
        "width": gpt.n_embd, "block version": gpt.version, "bias": gpt.bias,
        "vocabulary": gpt.vocab_size, "positions": gpt.block_size, "window": config.seq_len,
        "tokens per step": model.step_tokens, "frame (height, width)": model.tokenizer.frame_hw,
        "parameters (transformer)": counts["gpt."],
        "parameters (tokeniser)": counts["tokenizer."], "tokeniser": config.tokenizer,
        "tokeniser spec": spec, **notes}


# -- the published layout ---------------------------------------------------------------------


def _published(path: Path, sizes: Sizes
               ) -> tuple[WhamConfig, dict[str, Entry], dict[str, Any]]:
    loaded = load_records(path)
    try:
        return _understood(path, loaded, sizes)
    except WorldGymError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # anything may stand where a number, a name or a dict belongs
        raise _odd(path, f"{type(error).__name__}: {error}"[:160],
                   "hyper-parameters and tensors as the release writes them") from error


def _understood(path: Path, loaded: Any, sizes: Sizes
                ) -> tuple[WhamConfig, dict[str, Entry], dict[str, Any]]:
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        raise _odd(path, "no state_dict", "a Lightning checkpoint with a state_dict")
    hyper = loaded.get("hyper_parameters")
    if not isinstance(hyper, dict) or "predictor_args" not in hyper:
        raise _odd(path, "no hyper_parameters", "hyper_parameters with predictor_args and "
                   "context_encoder_args")
    stored = {k: v for k, v in loaded["state_dict"].items() if isinstance(v, Tensor)}
    encoders = hyper.get("context_encoder_args") or {}
    if not isinstance(encoders, dict) or list(encoders) != ["images", "actions_output"]:
        raise _odd(path, f"modalities {list(encoders)}", "images, then actions_output")
    kind, image_args = _creation(path, _single(encoders["images"]))
    action, _ = _creation(path, _single(encoders["actions_output"]))
    if kind not in CLASSES or action != ACTION_CLASS:
        raise _odd(path, f"classes {kind} and {action}", f"{list(CLASSES)} and {ACTION_CLASS}")
    tensors = _tensors(path, stored)
    predictor, predictor_args = _creation(path, hyper["predictor_args"])
    if predictor != GPT_CLASS:
        raise _odd(path, f"class {predictor}", GPT_CLASS)
    spec = predictor_args.get("model_spec") or (hyper.get("variant") or {}).get("model_spec")
    image_spec = _image_spec(image_args)
    if not isinstance(spec, dict) or "seq_len" not in spec:
        raise _odd(path, f"model_spec {spec}", "model_size and seq_len")
    _check_depth(path, image_spec, len(tensors))
    config = WhamConfig(
        gpt=_gpt_config(path, spec, tensors, {**SIZES, **sizes}), seq_len=spec["seq_len"],
        tokenizer=CLASSES[kind], tokenizer_spec=_known(image_spec),
        size_name=str(spec.get("model_size", "")))
    notes = {"unread hyper-parameters": sorted(
        {str(k) for k in spec if k not in READ}
        | {f"images.{k}" for k in image_spec if k not in _known(image_spec) and k not in TRAINING
           and k != "taming_ddconfig"}),
        **{name: value if isinstance(value, int | float) else None for name, value in (
            ("epoch", loaded.get("epoch")), ("global step", loaded.get("global_step")))}}
    return config, {k: Entry.of(v) for k, v in tensors.items()}, notes


def _odd(path: Path, given: str, expected: str) -> CheckpointError:
    return CheckpointError("not a WHAM checkpoint", given=f"{path}: {given}", expected=expected,
                           fix="give the .ckpt of a published WHAM model")


def _check_depth(path: Path, spec: Mapping[str, Any], stored: int) -> None:
    """Refuse a tokeniser of more layers than there are tensors: building it would not end."""
    conv = spec.get("taming_ddconfig") or {}
    told = [spec.get("num_layers"), conv.get("num_res_blocks"), len(conv.get("ch_mult", ()))]
    if any(isinstance(count, int) and count > stored for count in told):
        raise _odd(path, f"a tokeniser of {max(n for n in told if isinstance(n, int))} layers and "
                   f"{stored} tensors", "as many layers as the file holds")


def _single(args: Any) -> Any:
    """An encoder's arguments, also where (encoder, decoder) are given."""
    return args[0] if isinstance(args, tuple) and len(args) == 2 else args


def _creation(path: Path, args: Any) -> tuple[str, dict[str, Any]]:
    """(class name, keyword arguments) of a pickled creation-args object."""
    state = getattr(args, "state", None)
    if not isinstance(args, Record) or not isinstance(state, dict):
        raise _odd(path, f"hyper-parameter {args!r}"[:120], "a creation-args object")
    known, kwargs = state.get("pl_class"), state.get("pl_kwargs")
    if not (isinstance(known, type) and issubclass(known, Record)) or not isinstance(kwargs, dict):
        raise _odd(path, f"creation args {list(state)}", "pl_class and pl_kwargs")
    return known.name.rpartition(".")[2], kwargs


def _image_spec(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The tokeniser's flat spec: in ``model_spec``, or in ``variant`` with sizes beside it."""
    variant = kwargs.get("variant")
    if not isinstance(variant, dict):
        return dict(kwargs.get("model_spec") or {})
    beside = {k: v for k, v in variant.items() if k.startswith("image_size_per_")}
    return {**(kwargs.get("model_spec") or {}), **beside, **(variant.get("model_spec") or {})}


def _known(spec: dict[str, Any]) -> dict[str, Any]:
    """Keys of a tokeniser spec that shape the network."""
    names = {"commitment_cost", *(f for kind, _ in TOKENIZERS.values()
                                  for f in kind.__dataclass_fields__)}
    return {k: v for k, v in spec.items() if k in names or k.startswith("taming_")}


def _gpt_config(path: Path, spec: dict[str, Any], tensors: Mapping[str, Tensor],
                sizes: Sizes) -> GPTConfig:
    name, wte = str(spec.get("model_size")), tensors.get("gpt.transformer.wte.weight")
    wpe = tensors.get("gpt.transformer.wpe.weight")
    if wte is None or wpe is None:
        raise _odd(path, f"no {GPT}transformer.wte.weight or .wpe.weight", "a whole state_dict")
    layers = 1 + max((int(n.split(".")[3]) for n in tensors if n.startswith("gpt.transformer.h.")),
                     default=-1)
    size = sizes.get(name) or sizes.get("*")
    if size is None:
        raise ConfigError(
            "unknown model size", given=f"{path}: {name!r} with {layers} layers, width "
            f"{wte.shape[1]}", expected=f"one of {sorted(sizes)} (tensors do not tell the heads)",
            fix="give its (layers, heads, width): sizes={...}, or --size LAYERS HEADS WIDTH")
    if (size[0], size[2]) != (layers, wte.shape[1]):
        raise CheckpointError(
            "checkpoint does not have the size it names", given=f"{path}: {name!r} with {layers} "
            f"layers, width {wte.shape[1]}", expected=f"(layers, heads, width) {size}",
            fix="check the size table and the file")
    return GPTConfig(block_size=len(wpe), vocab_size=len(wte), n_layer=layers,
                     n_head=size[1], n_embd=wte.shape[1],
                     bias=bool(spec.get("bias", True)), version=int(spec.get("nanogpt_version", 1)))


def _tensors(path: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names; masks, training networks and the second head are left out."""
    out: dict[str, Tensor] = {}
    pairs: dict[str, Tensor] = {}  # of an (encoder, decoder) pair, the decoder's
    head = None
    for given, tensor in stored.items():
        name = checkpoint.plain_name(given)
        if name.endswith(DROPPED) or any(p in name for p in DROPPED_PARTS):
            continue
        if name == GPT + "lm_head.weight":
            head = tensor
        elif name.startswith(GPT):
            out["gpt." + name.removeprefix(GPT)] = tensor
        elif name.startswith(IMAGES):
            rest = name.removeprefix(IMAGES)
            which, dot, inner = rest.partition(".")
            if dot and which in ("0", "1"):
                (out if which == "0" else pairs)["tokenizer." + inner] = tensor
            else:
                out["tokenizer." + rest] = tensor
        elif not name.startswith("context_encoders.actions_output."):
            raise _odd(path, f"tensor {given}", f"names that begin with {GPT} or {IMAGES}")
    wte = out.get("gpt.transformer.wte.weight")
    if head is not None and wte is not None and not torch.equal(head, wte):
        raise CheckpointError("head and embedding differ", given=path,
                              expected="lm_head equal to wte (they are tied)",
                              fix="this is not a published WHAM model")
    for name, tensor in pairs.items():
        decodes = ".decoder." in name or "post_quant_conv" in name
        if decodes:
            out[name] = tensor
        elif "embedding" in name and not torch.equal(tensor, out[name]):
            raise _odd(path, "two codebooks", "one codebook for encoder and decoder")
    return out
