"""SCOPE's published folder: found, checked by fingerprint, loaded part by part (scope.md 5, 6).

    model-00001-of-00003.safetensors ...  model.safetensors.index.json  config.json (optional)
    models_t5_umt5-xxl-enc-bf16.pth  Wan2.2_VAE.pth  google/umt5-xxl/spiece.model

A part is read from a memory map straight into its dtype on its device; the largest part bounds the
host memory, because the text encoder is needed before the network and can be let go.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldgym import checkpoint
from worldgym.errors import CheckpointError, WorldGymError
from worldgym.models import umt5, wan_vae
from worldgym.models.published import Part, json_object
from worldgym.models.scope import MARK, ScopeConfig, ScopeDiT, is_scope
from worldgym.spec import Licence
from worldgym.weightfile import INDEX_SUFFIX, open_weights

INDEX, SINGLE = "model" + INDEX_SUFFIX, "SCOPE.safetensors"
FILES = {"text encoder": "models_t5_umt5-xxl-enc-bf16.pth", "autoencoder": "Wan2.2_VAE.pth"}
TOKENIZER, CONFIG = "google/umt5-xxl", "config.json"
LICENCE = Licence(name="Apache-2.0")  # of network, autoencoder and text encoder alike
PUBLISHED = {
    "8776d493d559edb3c31854ba1537d90b": "SCOPE network, as published",
    "1f5ab7703c6fc803fdded85ff040c316": "Wan2.2-TI2V-5B network (no actions)",
    "e1de6c02cdac79f8b739f4d3698cd216": "Wan2.2 autoencoder, as published",
    "9c8818c2cbea55eca56c7b447df170da": "UMT5-XXL encoder, as published",
}
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file, for its stamp
PUBLISHED_TENSORS = {"network": 1575, "text encoder": 242, "autoencoder": 196}


def layout_fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """MD5 of names and shapes as the Wan tools compute it (``PUBLISHED`` lists the known ones).

    >>> layout_fingerprint({"a": (2, 3)}) == hashlib.md5(b"a,a:2_3").hexdigest()
    True
    """
    words = [w for n, s in shapes.items() for w in (n, f"{n}:{'_'.join(map(str, s))}")]
    return hashlib.md5(",".join(sorted(words)).encode(), usedforsecurity=False).hexdigest()


class ScopePart(Part):
    """One part of the folder, told by the fingerprint of its layout."""

    def known(self) -> dict[str, Any]:
        print_ = layout_fingerprint(self.shapes)
        known = PUBLISHED.get(print_, "other sizes than published")
        if print_ not in PUBLISHED and len(self.shapes) == PUBLISHED_TENSORS[self.name]:
            known = "as many tensors as published, but other names or shapes"
        return {"fingerprint": print_, "layout": known}

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        return found if self.file is None else found | {"bytes_in_bfloat16": 2 * self.parameters}


@dataclass(frozen=True, slots=True)
class ScopeFolder:
    """A folder in SCOPE's published layout. Parts load strictly, one at a time.

    Example:
        >>> find("/nowhere") is None
        True
    """

    path: Path
    network: ScopePart
    text_encoder: ScopePart
    autoencoder: ScopePart
    hints: Mapping[str, Any]

    @property
    def parts(self) -> tuple[ScopePart, ...]:
        """Network, text encoder, autoencoder."""
        return self.network, self.text_encoder, self.autoencoder

    @property
    def missing(self) -> list[str]:
        """What a clip would need and the folder lacks."""
        lost = [f"{p.name} ({p.path.name})" for p in self.parts if p.file is None]
        if not (self.path / TOKENIZER / "spiece.model").is_file():
            lost.append(f"tokenizer ({TOKENIZER}/spiece.model)")
        return lost

    def config(self) -> ScopeConfig:
        """Sizes of the network, from its tensors and the optional config.json."""
        self.network.need()
        return ScopeConfig.from_shapes(self.network.shapes, self.hints)

    def load_network(self, *, device: torch.device | str = "cpu",
                     dtype: torch.dtype | None = torch.bfloat16) -> ScopeDiT:
        """The network; ``dtype`` None: as stored."""
        file = self.network.need()
        with torch.device("meta"):
            dit = ScopeDiT(self.config())
        dtype = dtype or next(iter(file.entries.values())).dtype
        loaded = checkpoint.load_into(dit, file, device=device, dtype=dtype)
        return loaded.eval().requires_grad_(False)

    def load_autoencoder(self, *, device: torch.device | str = "cpu",
                         dtype: torch.dtype | None = torch.bfloat16) -> wan_vae.WanVAE:
        """The autoencoder; ``dtype`` None: as stored."""
        return wan_vae.WanVAE.load(self.autoencoder.need(), device=device, dtype=dtype)

    def load_text_encoder(self, *, device: torch.device | str = "cpu",
                          dtype: torch.dtype | None = torch.bfloat16) -> umt5.TextEncoder:
        """The text encoder; ``dtype`` None: as stored."""
        return umt5.TextEncoder.load(self.text_encoder.need(), device=device, dtype=dtype)

    def contexts(self, prompts: Sequence[str], *, device: torch.device | str = "cpu",
                 dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
        """Contexts (B, L, D) of prompts; the encoder is loaded for this and let go again."""
        length = int(self.hints.get("text_len", umt5.LENGTH))
        tokens = umt5.Tokenizer(self.path / TOKENIZER, length)(prompts)
        return self.load_text_encoder(device=device, dtype=dtype).encode(*tokens)

    def each_context(self, prompts: Sequence[str], *, device: torch.device | str = "cpu",
                     dtype: torch.dtype | None = torch.bfloat16) -> list[Tensor]:
        """Contexts (L, D), each encoded alone: its bits do not depend on the other prompts."""
        length = int(self.hints.get("text_len", umt5.LENGTH))
        tokens = umt5.Tokenizer(self.path / TOKENIZER, length)
        encoder = self.load_text_encoder(device=device, dtype=dtype)
        return [encoder.encode(*tokens([prompt]))[0] for prompt in prompts]

    def stamp(self) -> str:
        """SHA-256 of name, size and 64 samples of every weight file: other values, another stamp.

        Reads a quarter of a MiB per file, so it is not proof against one changed number.
        """
        digest = hashlib.sha256()
        for path in (p for part in self.parts for p in part.need().files):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for i in range(SAMPLES):
                    file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What it is, what is missing, what it costs, its licence; no tensor is read."""
        facts: dict[str, Any] = {p.name: p.facts() for p in self.parts}
        try:
            cfg = self.config()
            facts["sizes"] = {"width": cfg.wan.dim, "heads": cfg.wan.num_heads,
                              "layers": cfg.wan.num_layers, "latent_channels": cfg.wan.in_dim,
                              "buttons": cfg.action.keyboard_dim if cfg.action else 0,
                              "stick_axes": cfg.action.mouse_dim if cfg.action else 0}
        except WorldGymError as error:
            facts["sizes"] = f"not known: {error}"
        gib = [2 * p.parameters / 2**30 for p in self.parts]
        facts["memory_in_bfloat16_GiB"] = {
            "all_parts": _gib(sum(gib)), "while_generating": _gib(gib[0] + gib[2]),
            "largest_part": _gib(max(gib)), "note": "weights alone; while_generating: the text "
            "encoder let go after the prompts"}
        facts["licence"] = {"name": LICENCE.name, "may_ship_weights": LICENCE.may_ship_weights,
                            "may_train_on_outputs": LICENCE.may_train_on_outputs,
                            "territory": LICENCE.territory}
        return {"missing": self.missing or "nothing", **facts}


def _gib(value: float) -> float:
    return round(value, 6 if value < 0.1 else 2)


def find(path: str | Path) -> ScopeFolder | None:
    """The folder if it is SCOPE's, else None; damaged parts are noted, not raised.

    SCOPE is recognised by the button projection among the network's tensor names. Plain Wan shards
    (``diffusion_pytorch_model-*``) beside it are ignored, as they are when it is published. A
    folder with all but a network counts as SCOPE's, unless such shards say that it is plain Wan.
    """
    path = Path(path)
    names = [INDEX] if (path / INDEX).is_file() else [SINGLE] if (path / SINGLE).is_file() else []
    shards = sorted(path.glob("model-*-of-*.safetensors")) if path.is_dir() else []
    whole = all((path / file).is_file() for file in FILES.values())
    if not names and not shards:
        if not whole or any(path.glob("diffusion_pytorch_model*")):
            return None
        return _folder(path, ScopePart("network", path / INDEX, trouble=CheckpointError(
            "network is missing", given=f"{path} without {INDEX} and its shards",
            expected="model-00001-of-00003.safetensors to model-00003-of-00003.safetensors",
            fix="download them, and the index, into the same folder")))
    network = ScopePart.look("network", path / (names[0] if names else shards[0].name))
    if not names:  # shards without their index cannot be told complete
        known = network.shapes
        network = ScopePart("network", path / INDEX, trouble=CheckpointError(
            "shard index is missing", given=f"{len(shards)} shards without {INDEX}",
            expected=INDEX, fix="download the index from the same revision"))
    else:
        known = network.shapes or dict.fromkeys(_listed(path / names[0]), ())
    if not known and whole:  # too damaged to tell
        return _folder(path, network)
    if not any(n == MARK or ".action_attn." in n for n in known) or (
            network.shapes and not is_scope(network.shapes)):
        return None
    return _folder(path, network)


def _folder(path: Path, network: ScopePart) -> ScopeFolder:
    parts = {name: ScopePart.look(name, path / file) for name, file in FILES.items()}
    return ScopeFolder(path, network, parts["text encoder"], parts["autoencoder"],
                       json_object(path / CONFIG))


def open_folder(path: str | Path, config: Mapping[str, Any] | None = None) -> ScopeFolder:
    """A SCOPE folder that has everything a clip needs.

    Args:
        path: the folder.
        config: facts that neither tensors nor config.json tell, e.g. {"num_heads": 2}.

    Raises:
        CheckpointError: not SCOPE's layout, or a part is missing or damaged.
    """
    path = Path(path)
    folder = find(path)
    if folder is None:
        if (path / INDEX).is_file():
            open_weights(path / INDEX)  # if it is damaged, that is the error to tell
        held = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "no such folder"
        raise CheckpointError("not a SCOPE folder", given=f"{path} with {held}",
                              expected=f"{INDEX} and its shards with blocks.*.action_attn.*",
                              fix="give the folder the weights were downloaded to")
    folder = replace(folder, hints={**folder.hints, **(config or {})})
    for part in folder.parts:
        part.need()
    if folder.missing:
        raise CheckpointError("folder is not complete", given=f"{path} without {folder.missing}",
                              expected="network, text encoder, autoencoder and tokenizer",
                              fix="download what is missing into the same folder")
    folder.config()
    return folder


def _listed(index: Path) -> list[str]:
    """Tensor names of a shard index, however damaged the shards are."""
    try:
        return list(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, OSError):
        return []
