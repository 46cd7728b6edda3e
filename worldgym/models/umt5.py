"""The UMT5 text encoder of Wan: transformers' network, our key map, sizes read off the file.

Shapes: B prompt, L token, D width. Context rows past the prompt's end are zero (specs/scope.md
section 8; key map section 11).
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldgym import checkpoint
from worldgym.errors import CheckpointError, ShapeError
from worldgym.extras import need
from worldgym.weightfile import WeightFile, as_file

LENGTH = 512  # tokens of a context
MAX_DISTANCE = 128  # of the relative position buckets; the same in every UMT5
PAD, EOS = 0, 1

_RULES = [(re.compile(pattern), new) for pattern, new in (
    (r"^shared\.", "embed_tokens."),
    (r"^encoder\.", ""),
    (r"^token_embedding\.", "embed_tokens."),
    (r"^norm\.", "final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
     r"block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"block.\1.layer.1.DenseReluDense.wo."),
)]


def transformers_name(native: str) -> str:
    """A tensor name of ``models_t5_umt5-xxl-enc-bf16.pth`` in transformers' encoder stack.

    Names of transformers' whole encoder model (``text_encoder/`` of diffusers folders) work too.

    >>> transformers_name("blocks.3.ffn.gate.0.weight")
    'block.3.layer.1.DenseReluDense.wi_0.weight'
    """
    for pattern, new in _RULES:
        native = pattern.sub(new, native)
    return native


def sizes_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Arguments of transformers' ``UMT5Config``, read off the tensors, named either way."""
    shapes, given = {transformers_name(n): s for n, s in shapes.items()}, shapes
    first = "block.0.layer.0.SelfAttention."
    try:
        vocab, dim = shapes["embed_tokens.weight"]
        buckets, heads = shapes[first + "relative_attention_bias.weight"]
        layers = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("block."))
        return {"vocab_size": vocab, "d_model": dim, "num_heads": heads, "num_layers": layers,
                "d_kv": shapes[first + "q.weight"][0] // heads,
                "d_ff": shapes["block.0.layer.1.DenseReluDense.wi_1.weight"][0],
                "relative_attention_num_buckets": buckets,
                "relative_attention_max_distance": MAX_DISTANCE,
                "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
                "dropout_rate": 0.0}
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            "not the tensors of a UMT5 encoder", given=f"{len(given)} tensors ({error!r})",
            expected="token_embedding, blocks.*.pos_embedding, norm",
            fix="give models_t5_umt5-xxl-enc-bf16.pth") from error


class TextEncoder:
    """Token ids to contexts. ``net``: transformers' UMT5 encoder stack."""

    def __init__(self, net: Any) -> None:
        weight = net.embed_tokens.weight
        self.net, self.device, self.dtype = net, weight.device, weight.dtype

    @staticmethod
    def build(sizes: Mapping[str, Any]) -> Any:
        """transformers' encoder stack without weights, on the meta device."""
        transformers = need("transformers", "Wan's text encoder", "wan")
        with torch.device("meta"):
            whole = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
        return whole.encoder.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path | WeightFile | Mapping[str, Tensor], *,
             device: torch.device | str = "cpu",
             dtype: torch.dtype | None = None) -> "TextEncoder":
        """Load strictly from a file or state dict; ``dtype`` default: its own.

        Names are the native ones or transformers'; a second copy of the token table is left out.
        """
        file = source if isinstance(source, Mapping) else as_file(source)
        if isinstance(file, WeightFile) and "encoder.embed_tokens.weight" in file.entries:
            file = replace(file, entries={n: e for n, e in file.entries.items()
                                          if n != "shared.weight"})
        held: Mapping[str, Any] = file.entries if isinstance(file, WeightFile) else file
        names = checkpoint.plain_names(list(held))
        sizes = sizes_of({names[n]: tuple(t.shape) for n, t in held.items()})
        dtype = dtype or next(iter(held.values())).dtype
        return cls(checkpoint.load_into(cls.build(sizes), file, device=device, dtype=dtype,
                                        rename=transformers_name))

    @torch.no_grad()
    def raw(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Encoder output (B, L, D); rows past a prompt's end mean nothing."""
        if ids_BL.ndim != 2 or ids_BL.shape != mask_BL.shape:
            raise ShapeError("token ids and mask do not fit", given=(tuple(ids_BL.shape),
                             tuple(mask_BL.shape)), expected="(B, L) both",
                             fix="use worldgym.models.umt5.Tokenizer")
        return self.net(input_ids=ids_BL.to(self.device),
                        attention_mask=mask_BL.to(self.device)).last_hidden_state

    def encode(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Contexts (B, L, D): rows past a prompt's end are zero."""
        out = self.raw(ids_BL, mask_BL)
        return out * mask_BL.to(out)[..., None]


def clean(text: str) -> str:
    """A prompt as the published pipeline hands it to the tokenizer.

    Mojibake repaired (ftfy), HTML entities resolved twice, blanks collapsed.
    """
    text = need("ftfy", "cleaning prompts", "wan").fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """The tokenizer folder ``google/umt5-xxl`` (needs its ``spiece.model``)."""

    def __init__(self, folder: str | Path, length: int = LENGTH) -> None:
        folder = Path(folder)
        if not (folder / "spiece.model").is_file():
            raise CheckpointError("tokenizer is missing", given=folder,
                                  expected="a folder with spiece.model",
                                  fix="copy the folder google/umt5-xxl beside the weights")
        need("sentencepiece", "Wan's tokenizer", "wan")
        # not AutoTokenizer: from version 5 on it finds no class for a folder without tokenizer.json
        kind = need("transformers", "Wan's tokenizer", "wan").T5Tokenizer
        self.inner, self.length = kind.from_pretrained(folder, local_files_only=True), length

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 (B, length): cleaned, closed with EOS, padded or cut."""
        out = self.inner([clean(p) for p in prompts], padding="max_length", truncation=True,
                         max_length=self.length, return_tensors="pt")
        return out["input_ids"], out["attention_mask"]
