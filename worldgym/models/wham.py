"""WHAM as one module: image tokeniser, GPT, and the layout of its token sequence.

Shapes: B row, F frame, I image tokens of a frame, A action tokens (as published 16, those of a
controller), S = I + A tokens of a step, T token. A sequence is [image 0, action 0, image 1,
action 1, ...]; image ids come first in the vocabulary, action ids after them (specs/wham.md
sections 0, 3, 4 and 6).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from worldgym.actions import ActionSpec
from worldgym.errors import ConfigError
from worldgym.models import wham_actions
from worldgym.models.action_tokens import ActionTokens
from worldgym.models.gpt import GPT, GPTConfig, losses
from worldgym.models.vqgan import Tokenizer, ViTConfig, ViTVQGAN
from worldgym.models.vqgan_conv import ConvConfig, ConvVQGAN

# layers, heads, width of the published sizes; heads cannot be read off a checkpoint
SIZES = {"chinchilla-251M": (16, 16, 1024), "chinchilla-1018M": (23, 14, 1792),
         "wham-4kvocab-1.6b": (24, 18, 2304), "wham-3b": (30, 24, 3072)}
TOKENIZERS: dict[str, tuple[Any, Any]] = {"vit": (ViTConfig, ViTVQGAN),
                                         "conv": (ConvConfig, ConvVQGAN)}


@dataclass(frozen=True, kw_only=True, slots=True)
class WhamConfig:
    """Everything that shapes the module.

    ``seq_len``: steps of the longest window; ``tokenizer``: "vit" or "conv", ``tokenizer_spec``:
    its native keys; ``size_name``: what the hyper-parameters call this size; ``action``: what is
    acted with, a controller in the published models.
    """

    gpt: GPTConfig
    seq_len: int
    tokenizer: str
    tokenizer_spec: Mapping[str, Any] = field(default_factory=dict)
    size_name: str = ""
    action: ActionSpec = wham_actions.SPEC

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise ConfigError("unknown image tokeniser", given=self.tokenizer,
                              expected=sorted(TOKENIZERS), fix="use one of these")
        if not isinstance(self.seq_len, int) or self.seq_len < 2:
            raise ConfigError("window is too short", given=f"seq_len {self.seq_len!r}",
                              expected="an integer from 2 on: a window of seq_len - 1 is seen",
                              fix="read seq_len from the hyper-parameters")

    def to_json(self) -> dict[str, Any]:
        """Plain dict that ``from_json`` reads back."""
        data = {**asdict(self), "tokenizer_spec": dict(self.tokenizer_spec)}
        if self.action == wham_actions.SPEC:  # files of the published models need not tell
            del data["action"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WhamConfig":
        """Inverse of ``to_json``."""
        told = {"action": ActionSpec.from_json(data["action"])} if "action" in data else {}
        return cls(**{**data, **told, "gpt": GPTConfig.from_dict(data["gpt"])})


class Wham(nn.Module):
    """Tokeniser and GPT; what they share is the layout of the sequence."""

    def __init__(self, cfg: WhamConfig) -> None:
        super().__init__()
        self.cfg = cfg
        config, network = TOKENIZERS[cfg.tokenizer]
        self.tokenizer: Tokenizer = network(config.from_spec(cfg.tokenizer_spec))
        self.gpt = GPT(cfg.gpt)
        self.codes = self.tokenizer.vocabulary
        self.image_tokens = self.tokenizer.tokens
        self.actions = ActionTokens(cfg.action)
        self.step_tokens = self.image_tokens + self.actions.count
        self._ranges = [(self.codes + low, self.codes + high) for low, high in self.actions.ranges]
        want = (self.codes + self.actions.vocabulary, self.step_tokens * cfg.seq_len)
        if cfg.gpt.vocab_size != want[0] or cfg.gpt.block_size < want[1]:
            raise ConfigError(
                "transformer does not fit the tokeniser",
                given=f"vocabulary {cfg.gpt.vocab_size}, {cfg.gpt.block_size} positions",
                expected=f"vocabulary {want[0]}, at least {want[1]} positions",
                fix="use the hyper-parameters and tensors of one checkpoint")

    def image_range(self, index: int) -> tuple[int, int]:
        """Inclusive range of ids at image position ``index``: id 0 never comes first."""
        return (1 if index == 0 else 0, self.codes - 1)

    def action_range(self, index: int) -> tuple[int, int]:
        """Inclusive range of ids at action position ``index``."""
        return self._ranges[index]

    def sequence(self, image_BFI: Tensor, action_BFA: Tensor) -> Tensor:
        """Global ids (B, T) of complete steps, from local ids."""
        return torch.cat([image_BFI, action_BFA + self.codes], -1).flatten(1)

    def loss(self, image_BFI: Tensor, action_BFA: Tensor, mask_BF: Tensor | None = None,
             network: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy of image tokens (B, F, I) and action tokens (B, F, A), and their mean.

        The first token of all has loss 0 but counts in the mean, as published; steps that
        ``mask_BF`` leaves out have loss 0 and do not count. ``network``: the GPT as it is trained,
        where it is wrapped for several processes.
        """
        ids = self.sequence(image_BFI, action_BFA)
        told = losses((self.gpt if network is None else network)(ids[:, :-1]), ids[:, 1:])
        told = torch.nn.functional.pad(told, (1, 0)).unflatten(1, (-1, self.step_tokens))
        seen = torch.ones_like(told) if mask_BF is None else mask_BF[..., None].expand_as(told)
        told = told * seen
        parts = told.split([self.image_tokens, self.actions.count], -1)
        return parts[0], parts[1], told.sum() / seen.sum().clamp_min(1)


def tiny(generator: torch.Generator, *, width: int = 64, layers: int = 2, heads: int = 4,
         seq_len: int = 4, codes: int = 32, hw: tuple[int, int] = (16, 24), patch: int = 4,
         version: int = 1, bias: bool = True) -> Wham:
    """A small random model for tests, examples and measurements.

    Its weights are larger than fresh ones, so that next tokens are neither evenly likely nor the
    token before.
    """
    spec = {"image_size_per_x_axis": hw[1], "image_size_per_y_axis": hw[0], "patch_size": patch,
            "transf_dim": 32, "embedding_dim": 8, "num_layers": 1, "head_size": 8,
            "vocab_size": codes}
    tokens = -(-hw[0] // patch) * -(-hw[1] // patch) + wham_actions.COUNT
    cfg = GPTConfig(block_size=tokens * seq_len, vocab_size=codes + wham_actions.VOCABULARY,
                    n_layer=layers, n_head=heads, n_embd=width, version=version, bias=bias)
    model = Wham(WhamConfig(gpt=cfg, seq_len=seq_len, tokenizer="vit", tokenizer_spec=spec,
                            size_name="tiny"))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, generator=generator)
    for name, p in model.gpt.named_parameters():
        if ".ln_" in name and name.endswith("weight"):
            nn.init.ones_(p)
    return model.requires_grad_(False).eval()
