"""A small WHAM of our own: the published classes at a small size, with reward and end, as a folder.

A world folder holds ``world.safetensors`` (tokeniser, transformer and outcome heads),
``world.json`` (configuration, provenance, metrics) and ``starts.safetensors``, as ``nano``'s does.
Shapes: B slot, K past frame, Z code width, h w token grid, A action tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldgym import checkpoint
from worldgym.actions import ActionSpec
from worldgym.errors import ConfigError
from worldgym.heads import LearnedOutcome
from worldgym.models import nano
from worldgym.models.action_tokens import ActionTokens
from worldgym.models.gpt import GPT, GPTConfig
from worldgym.models.outcome import Outcome, OutcomeConfig
from worldgym.models.sampling import Sampling
from worldgym.models.vqgan import Tokenizer
from worldgym.models.wham import Wham, WhamConfig
from worldgym.models.wham_world import WhamWorld
from worldgym.spec import Licence

KIND = "worldgym.wham-world"


@dataclass(frozen=True, kw_only=True, slots=True)
class WhamNanoConfig:
    """Everything that fixes a small WHAM but its weights.

    ``temperature``: of the sampler; ``slide``: frames dropped at once from a full window (1: as
    published); ``code_width``: Z, what the heads read of a token; ``end_scale``, ``outcome_ahead``,
    ``reward_range``: as in ``NanoConfig``.
    """

    name: str
    wham: WhamConfig
    code_width: int
    fps: float = 8.75
    temperature: float = 1.0
    slide: int = 1
    end_scale: float = 1.0
    outcome_frames: int = 4
    outcome_width: int = 48
    outcome_members: int = 2
    outcome_ahead: int = 0
    reward_range: tuple[tuple[float, float], tuple[float, float]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dict that ``from_json`` reads back."""
        return {**asdict(self), "wham": self.wham.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WhamNanoConfig":
        """Inverse of ``to_json``."""
        try:
            told = {**data, "wham": WhamConfig.from_json(data["wham"])}
            if told.get("reward_range") is not None:
                go, end = told["reward_range"]
                told["reward_range"] = (tuple(go), tuple(end))
            return cls(**told)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("configuration of a small WHAM cannot be read", given=str(error),
                              expected="the dict that WhamNanoConfig.to_json writes",
                              fix="take world.json from the folder of the weights") from error

    @property
    def action(self) -> ActionSpec:
        """What is acted with."""
        return self.wham.action

    @property
    def window(self) -> int:
        """Frames of the longest window."""
        return self.wham.seq_len


@dataclass(frozen=True, kw_only=True)
class TokenOutcome(LearnedOutcome):
    """Reward, end and danger, read from the codes of ids."""

    tokenizer: Tokenizer
    actions: ActionTokens

    @torch.no_grad()
    def __call__(self, past_BKChw: Tensor, action_BA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``LearnedOutcome``, of ids (B, K, 1, h, w) and an action's local ids (B, A)."""
        past = past_BKChw[:, -self.frames:]
        codes = self.tokenizer.vectors(past.flatten(0, 1)).unflatten(0, past.shape[:2])
        told = self.actions.values(action_BA.cpu().numpy())
        features = torch.from_numpy(self.actions.spec.encode(told)).to(codes.device)
        return super().__call__(codes, features)


class WhamNano(nn.Module):
    """The trainable parts: ``codec`` (image tokeniser), ``dynamics`` (GPT) and ``outcome``."""

    def __init__(self, cfg: WhamNanoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.wham = Wham(cfg.wham)
        width = self.codec.codes().shape[1]
        if width != cfg.code_width or cfg.outcome_frames > cfg.window:
            raise ConfigError("heads do not fit the model", fix="correct the configuration",
                              given=f"code_width {cfg.code_width}, {cfg.outcome_frames} frames",
                              expected=f"code_width {width}, at most {cfg.window} frames")
        self.outcome = Outcome(OutcomeConfig(
            latent_chw=(cfg.code_width, *self.codec.grid_hw), action_features=cfg.action.features,
            frames=cfg.outcome_frames, width=cfg.outcome_width, members=cfg.outcome_members,
            ahead=cfg.outcome_ahead, reward_range=cfg.reward_range))

    @property
    def codec(self) -> Tokenizer:
        """The image tokeniser."""
        return self.wham.tokenizer

    @property
    def dynamics(self) -> GPT:
        """The transformer."""
        return self.wham.gpt

    def world(self, device: torch.device | str = "cpu", **changes: Any) -> WhamWorld:
        """A world that steps with these weights; ``changes``: sampling, ... of ``WhamWorld``."""
        self.eval().requires_grad_(False).to(device)
        cfg = self.cfg
        given: dict[str, Any] = {"sampling": Sampling(temperature=cfg.temperature),
                                 "slide": cfg.slide, **changes}
        return WhamWorld(
            self.wham, name=cfg.name, fps=cfg.fps, licence=Licence(),
            fingerprint=nano.value_fingerprint(self),
            outcome=TokenOutcome(self.outcome, cfg.end_scale, tokenizer=self.codec,
                                 actions=self.wham.actions),
            **given)


def small(action: ActionSpec, frame_hw: tuple[int, int], *, seq_len: int, width: int, layers: int,
          codes: int, patch: int, tokenizer: str = "vit", tokenizer_width: int,
          tokenizer_layers: int, code_width: int, head: int = 32) -> WhamConfig:
    """A configuration for such frames and actions.

    Args:
        seq_len: steps of the longest window.
        width, layers, head: of the transformer; tokenizer_width, tokenizer_layers: of each half of
            the tokeniser (conv: channels, a multiple of 32, and blocks of each resolution).
        codes, code_width: size of the codebook.
        patch: pixels of a token's side (conv: a power of two).
        tokenizer: "vit", or "conv" for square frames.

    Raises:
        ConfigError: frames do not suit the tokeniser.
    """
    height, side = frame_hw
    spec: dict[str, Any]
    if tokenizer == "conv":
        levels = max(1, patch).bit_length() - 1
        if height != side or patch != 2**levels or height % patch:
            raise ConfigError("the convolutional tokeniser reads other frames",
                              given=f"{height} x {side}, patch {patch}",
                              expected="square frames, a patch that is a power of two and divides "
                              "their side", fix='use tokenizer="vit"')
        spec = {"taming_n_embed": codes, "taming_embed_dim": code_width,
                "taming_num_indices_per_axis": height // patch,
                "taming_ddconfig": {
                    "double_z": False, "z_channels": code_width, "resolution": height,
                    "in_channels": 3, "out_ch": 3, "ch": tokenizer_width,
                    "ch_mult": [1] * (levels + 1), "num_res_blocks": tokenizer_layers,
                    "attn_resolutions": [], "dropout": 0.0}}
        tokens = (height // patch) ** 2
    else:
        spec = {"image_size_per_x_axis": side, "image_size_per_y_axis": height, "patch_size": patch,
                "transf_dim": tokenizer_width, "embedding_dim": code_width,
                "num_layers": tokenizer_layers, "head_size": min(head, tokenizer_width),
                "vocab_size": codes}
        tokens = -(-height // patch) * -(-side // patch)
    told = ActionTokens(action)
    gpt = GPTConfig(block_size=(tokens + told.count) * seq_len,
                    vocab_size=codes + told.vocabulary, n_layer=layers,
                    n_head=max(1, width // head), n_embd=width)
    return WhamConfig(gpt=gpt, seq_len=seq_len, tokenizer=tokenizer, tokenizer_spec=spec,
                      size_name="small", action=action)


def fresh(cfg: WhamNanoConfig, seed: int = 0) -> WhamNano:
    """Untrained weights that depend on ``seed`` alone."""
    return nano.seeded(WhamNano(cfg), seed)


def save(made: WhamNano, folder: str | Path, card: dict) -> None:
    """Write weights and card, as ``nano.save``."""
    nano.save(made, folder, card, KIND)


def load_nano(folder: str | Path, **changes: Any) -> WhamNano:
    """Weights and configuration of a world folder; ``changes`` override configuration fields."""
    made = WhamNano(replace(WhamNanoConfig.from_json(nano.read_config(folder)), **changes))
    return checkpoint.load_into(made, Path(folder) / nano.WEIGHTS)


def load(folder: str | Path, device: torch.device | str = "cpu", **changes: Any) -> WhamWorld:
    """A world from a folder, ready to step; ``changes`` as for ``load_nano``."""
    return load_nano(folder, **changes).world(device)
