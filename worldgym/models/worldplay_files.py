"""WorldPlay's published folders: found, weighed, loaded strictly (specs/worldplay.md section 3).

    wan_distilled_model/model.pt                    the Wan variant, under "generator"
    wan_transformer/config.json + *.safetensors     its backbone (plain Wan2.2), diffusers names
    ar_distilled_action_model/*.safetensors ...     the Hunyuan variant in four stages
    vae/  text_encoder/  tokenizer/                 of Wan2.2-TI2V-5B in diffusers' layout

The parts may lie in two folders, as they are published. Nothing is loaded until it is asked for;
torch files go through ``weights_only``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldgym import checkpoint
from worldgym.errors import CheckpointError
from worldgym.models import umt5, wan_vae
from worldgym.models.hunyuan import HunyuanConfig, HunyuanDiT
from worldgym.models.published import Part, json_object
from worldgym.models.scope import ScopeConfig
from worldgym.models.wan import WanConfig, WanDiT
from worldgym.models.worldplay import WorldPlayDiT, config_of
from worldgym.models.worldplay_names import is_added, native_name
from worldgym.spec import Licence

WAN, BACKBONE = "wan_distilled_model", "wan_transformer"
HUNYUAN = ("ar_distilled_action_model", "ar_rl_model", "ar_model", "bidirectional_model")
PARTS = {"autoencoder": "vae", "text encoder": "text_encoder"}
FILES = ("model.pt", "diffusion_pytorch_model.safetensors", "model.safetensors",
         "diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")
PARAMETERS = {"wan": 5_293_225_152, "hunyuan": 8_557_933_856}  # as published, additions included
LICENCE = Licence(name="Tencent HY-WorldPlay community licence", may_ship_weights=False,
                  may_train_on_outputs=False,
                  territory="worldwide except the European Union, the United Kingdom, South Korea")
TERMS = "outputs may not be used to improve any other AI model"


@dataclass(frozen=True)
class Weights(Part):
    """One set of weights of the folder; ``kind``: "wan", "backbone", "hunyuan" or a part's name."""

    kind: str = ""

    @classmethod
    def within(cls, name: str, kind: str, folder: Path) -> "Weights":
        """The folder's weight file; tensors under our network's names."""
        path = next((folder / f for f in FILES if (folder / f).is_file()), folder / FILES[0])
        return cls.look(name, path, "generator" if path.suffix == ".pt" else None,
                        native_name if kind in ("wan", "backbone") else str, kind=kind)

    def known(self) -> dict[str, Any]:
        want = PARAMETERS.get(self.kind)
        fits = "as published" if want == self.parameters else "other sizes than published"
        return {"layout": fits} if want else {}

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        return found if self.file is None else found | {
            "GiB_in_bfloat16": round(2 * self.parameters / 2**30, 3)}


@dataclass(frozen=True, slots=True)
class WorldPlayFolder:
    """What was found of WorldPlay; parts load strictly, one at a time.

    >>> find("/nowhere") is None
    True
    """

    path: Path
    parts: Mapping[str, Weights]
    companions: Path  # where autoencoder, text encoder and tokenizer are
    hints: Mapping[str, Any]

    def _part(self, name: str) -> Weights:
        if name not in self.parts:
            raise CheckpointError("folder has no such part", given=name,
                                  expected=f"one of {sorted(self.parts)}",
                                  fix="download it into the same folder")
        return self.parts[name]

    def config(self, name: str = WAN) -> WanConfig:
        """Sizes of a Wan network: from its tensors, and what these do not tell from config.json."""
        part = self._part(name)
        part.need()
        return ScopeConfig.from_shapes(part.shapes, self.hints).wan

    def load_network(self, name: str = WAN, *, device: torch.device | str = "cpu",
                     dtype: torch.dtype | None = torch.bfloat16) -> WorldPlayDiT | HunyuanDiT:
        """A network by the folder it lies in; ``dtype`` None: as stored.

        The backbone (``wan_transformer``) comes with additions that add nothing yet.
        """
        part = self._part(name)
        file = part.need()
        dtype = dtype or next(iter(file.entries.values())).dtype
        if part.kind == "hunyuan":
            with torch.device("meta"):
                other = HunyuanDiT(HunyuanConfig.from_shapes(part.shapes, self.hints))
            return checkpoint.load_into(other, file, device=device, dtype=dtype
                                        ).eval().requires_grad_(False)
        with torch.device("meta"):
            dit = WorldPlayDiT(self.config(name))
        if any(is_added(n) for n in file.entries):
            checkpoint.load_into(dit, file, device=device, dtype=dtype, rename=native_name)
            return dit.eval().requires_grad_(False)
        with torch.device("meta"):
            plain = WanDiT(dit.cfg)
        checkpoint.load_into(plain, file, device=device, dtype=dtype, rename=native_name)
        held = plain.state_dict()
        for key, tensor in dit.state_dict().items():
            if key not in held:
                held[key] = torch.zeros(tensor.shape, device=device, dtype=dtype)
        dit.load_state_dict(held, strict=True, assign=True)
        first: Any = dit.action_embedding[0]
        first.reset_parameters()  # the output layer stays zero, so that it can learn
        return dit.eval().requires_grad_(False)

    def load_autoencoder(self, *, device: torch.device | str = "cpu",
                         dtype: torch.dtype | None = torch.bfloat16) -> wan_vae.WanVAE:
        """The autoencoder with the latent statistics of its config."""
        folder = self.companions / PARTS["autoencoder"]
        sizes = json_object(folder / "config.json")
        stats = {k: sizes[f"latents_{k}"] for k in ("mean", "std") if f"latents_{k}" in sizes}
        return wan_vae.WanVAE.load(self._part("autoencoder").need(), device=device, dtype=dtype,
                                   sizes=sizes or None, **stats)

    def load_text_encoder(self, *, device: torch.device | str = "cpu",
                          dtype: torch.dtype | None = torch.bfloat16) -> umt5.TextEncoder:
        """The text encoder."""
        return umt5.TextEncoder.load(self._part("text encoder").need(), device=device, dtype=dtype)

    def contexts(self, prompts: Sequence[str], *, device: torch.device | str = "cpu",
                 dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
        """Contexts (B, L, D) of prompts; the encoder is loaded for this and let go again."""
        tokens = umt5.Tokenizer(self.companions / "tokenizer",
                                int(self.hints.get("text_len", umt5.LENGTH)))(prompts)
        return self.load_text_encoder(device=device, dtype=dtype).encode(*tokens)

    def facts(self) -> dict[str, Any]:
        """What it is, what is missing, what it costs, its licence; no tensor is read."""
        facts: dict[str, Any] = {name: part.facts() for name, part in self.parts.items()}
        if not (self.companions / "tokenizer" / "spiece.model").is_file():
            facts["tokenizer"] = {"missing": "tokenizer/spiece.model"}
        facts["licence"] = {"name": LICENCE.name, "may_ship_weights": LICENCE.may_ship_weights,
                            "may_train_on_outputs": LICENCE.may_train_on_outputs,
                            "terms": TERMS, "territory": LICENCE.territory}
        return facts


def find(path: str | Path, companions: str | Path | None = None) -> WorldPlayFolder | None:
    """The folder if it is WorldPlay's, else None; damaged parts are noted, not raised.

    Args:
        path: holds at least one of the published subfolders.
        companions: holds ``vae``, ``text_encoder`` and ``tokenizer``, if they are not in ``path``.
    """
    path = Path(path)
    found = [n for n in (WAN, *HUNYUAN) if (path / n).is_dir()]
    if not found and not (path / BACKBONE).is_dir():
        return None
    beside = Path(companions) if companions is not None else path
    parts = {n: Weights.within(n, "wan" if n == WAN else "hunyuan", path / n) for n in found}
    if (path / BACKBONE).is_dir():
        parts[BACKBONE] = Weights.within(BACKBONE, "backbone", path / BACKBONE)
    for name, folder in PARTS.items():
        parts[name] = Weights.within(name, name, beside / folder)
    return WorldPlayFolder(path, parts, beside, _hints(path / BACKBONE / "config.json"))


def _hints(path: Path) -> dict[str, Any]:
    """What a diffusers config tells beyond the tensors, under native names."""
    data = json_object(path)
    if not data:
        return {}
    cfg = config_of(data)
    return {"num_heads": cfg.num_heads, "eps": cfg.eps, "text_len": cfg.text_len}

