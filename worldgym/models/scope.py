"""SCOPE's network: the Wan DiT with an ActionModule in every block (specs/scope.md 3 to 6).

Shapes as in wan.py and action_module.py. The network is bidirectional: every frame of a clip, and
every action, is seen by every other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from worldgym.errors import CheckpointError, ConfigError, ShapeError
from worldgym.models.action_module import ActionConfig, ActionModule, Controls
from worldgym.models.wan import WAN_5B, WanConfig, WanDiT

HEAD_WIDTH = 128  # of every published Wan network; not to be read from shapes
MARK = "blocks.0.action_attn.keyboard_kv_proj.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScopeConfig:
    """Sizes of network and action paths; ``action`` None: the plain Wan2.2 network."""

    wan: WanConfig = WAN_5B
    action: ActionConfig | None = field(default_factory=ActionConfig)

    @classmethod
    def from_dict(cls, data: Mapping) -> "ScopeConfig":
        """Read a native config dict with its ``action_config``."""
        action = data.get("action_config")
        return cls(wan=WanConfig.from_dict(data),
                   action=None if action is None else ActionConfig.from_dict(action))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]],
                    hints: Mapping[str, Any] | None = None) -> "ScopeConfig":
        """Sizes read off the tensors of a checkpoint.

        Heads, text length, eps and how the window splits into ratio x size cannot be seen in
        shapes: they come from ``hints`` (a native config dict), else they are the published ones.

        Raises:
            CheckpointError: the tensors are not those of this network.
            ConfigError: a size cannot be told, or the hints contradict the tensors.
        """
        hints = dict(hints or {})
        try:
            dim, in_dim, *patch = shapes["patch_embedding.weight"]
            blocks = {int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")}
            seen: dict[str, Any] = {
                "dim": dim, "in_dim": in_dim, "patch_size": tuple(patch),
                "text_dim": shapes["text_embedding.0.weight"][1],
                "freq_dim": shapes["time_embedding.0.weight"][1],
                "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
                "out_dim": shapes["head.head.weight"][0] // (patch[0] * patch[1] * patch[2]),
                "num_layers": len(blocks)}
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                "not the tensors of a Wan network", given=f"{len(shapes)} tensors ({error!r})",
                expected="patch_embedding, text_embedding, time_embedding, blocks.*, head",
                fix="give the folder or file of the network's own weights") from error
        with_actions = any(".action_attn." in name for name in shapes)
        action = _action_of(shapes, dim, hints) if with_actions else None
        heads = hints.get("num_heads")
        if heads is None:
            if dim % HEAD_WIDTH:
                raise ConfigError(
                    "number of heads cannot be told from the tensors", given=f"width {dim}",
                    expected=f"a multiple of {HEAD_WIDTH}, or num_heads in config.json",
                    fix="write config.json with num_heads, or pass config={'num_heads': ...}")
            heads = dim // HEAD_WIDTH
        free = {k: hints[k] for k in ("eps", "text_len") if k in hints}
        for name, value in seen.items():
            told = hints.get(name)
            if told is not None and (tuple(told) if isinstance(told, list) else told) != value:
                raise ConfigError("config contradicts the tensors", given=f"{name} {told}",
                                  expected=value, fix="use the config of this checkpoint")
        return cls(wan=WanConfig(**seen, num_heads=int(heads), **free), action=action)


def _action_of(shapes: Mapping[str, tuple[int, ...]], dim: int,
               hints: Mapping[str, Any]) -> ActionConfig:
    told = ActionConfig.from_dict(hints.get("action_config") or {})
    base = "blocks.0.action_attn."
    embed = shapes.get(base + "keyboard_embed.0.weight")
    rows = dim // embed[0] if embed else told.rows
    mlp = shapes.get(base + "mouse_mlp.0.weight")
    mouse = (mlp[1] - dim) // rows if mlp else 0
    if rows % told.ratio or (hints.get("action_config") and rows != told.rows):
        raise ConfigError("action window cannot be told from the tensors", given=f"{rows} rows",
                          expected=f"{told.ratio} raw frames per latent x the window size",
                          fix="write the right action_config into config.json")
    return replace(told, keyboard_dim=embed[1] if embed else 0, mouse_dim=mouse,
                   window=rows // told.ratio)


def is_scope(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Do these tensors belong to a SCOPE network?"""
    patch = shapes.get("patch_embedding.weight", ())
    return MARK in shapes and len(patch) == 5 and patch[1:3] == (48, 1)


class ScopeDiT(WanDiT):
    """``WanDiT`` whose blocks also hear joystick and buttons; published tensor names."""

    def __init__(self, cfg: ScopeConfig) -> None:
        super().__init__(cfg.wan)
        self.action = cfg.action
        if cfg.action is not None:
            for block in self.blocks:
                block.action_attn = ActionModule(cfg.wan, cfg.action)

    def _modules_of_action(self) -> list[ActionModule]:
        return [cast(ActionModule, block.action_attn) for block in self.blocks]

    def controls(self, mouse_BNJ: Tensor | None, keyboard_BNK: Tensor | None,
                 frames: int, before: int = 0) -> list[Controls] | None:
        """Actions of a clip for every block; constant over its denoising passes.

        Args:
            mouse_BNJ: joystick axes per raw frame, None = that path is skipped.
            keyboard_BNK: buttons per raw frame, None = that path is skipped.
            frames: latent frames of the clip, F; rows ``ratio * (F - 1)`` and later are not read.
            before: how many of the rows came before the clip; published clips know of none.
        """
        given = (("joystick", mouse_BNJ, self.action.mouse_dim if self.action else 0),
                 ("button", keyboard_BNK, self.action.keyboard_dim if self.action else 0))
        for name, rows, width in given:
            if rows is not None and (rows.ndim != 3 or rows.shape[-1] != width or not width):
                raise ShapeError(f"{name} rows have the wrong shape", given=tuple(rows.shape),
                                 expected=f"(B, raw frames, {width})" if width else
                                 "none: this network has no such path",
                                 fix="read them with worldgym.gamepad")
        if mouse_BNJ is None and keyboard_BNK is None:
            return None
        modules, weight = self._modules_of_action(), self.head.modulation
        table = modules[0].table(frames, weight.device, weight.dtype)
        mouse, keyboard = (None if x is None else x.to(weight) for x in (mouse_BNJ, keyboard_BNK))
        out = []
        for block, module in zip(self.blocks, modules, strict=True):
            with self.near(block):
                out.append(module.controls(mouse, keyboard, frames, table, before))
        return out

    def forward(self, x_BCFHW: Tensor, t: Tensor, context_BLD: Tensor | None = None, *,
                controls: list[Controls] | None = None, **given: Any) -> Tensor:
        """Flow (B, C, F, H, W); ``controls`` from :meth:`controls`, the rest as in ``WanDiT``.

        The timesteps are per frame: 0 for a given first frame (see ``frame_times``).
        """
        if controls is None:
            return super().forward(x_BCFHW, t, context_BLD, **given)
        modules, weight, frames = self._modules_of_action(), self.head.modulation, x_BCFHW.shape[2]
        tokens = x_BCFHW.shape[3] * x_BCFHW.shape[4] // (
            self.cfg.patch_size[1] * self.cfg.patch_size[2])
        table = modules[0].table(frames, weight.device, weight.dtype, tokens)
        return super().forward(
            x_BCFHW, t, context_BLD,
            between=lambda i, x: modules[i](x, controls[i], table), **given)

    @torch.inference_mode()
    def infer(self, x_BCFHW: Tensor, t: Tensor, **given: Any) -> Tensor:
        """``forward`` without the books that autograd keeps of every tensor: a twentieth of a tiny
        pass's time."""
        return self(x_BCFHW, t, **given)


def frame_times(t: Tensor, batch: int, frames: int, first_frame: bool) -> Tensor:
    """Timesteps per frame (B, F): ``t`` everywhere, 0 for a first frame that is given."""
    out = t.reshape(-1, 1).expand(batch, frames).clone()
    if first_frame:
        out[:, 0] = 0
    return out


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published network, from the class on the meta device."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in ScopeDiT(ScopeConfig()).state_dict().items()}
