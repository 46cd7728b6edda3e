"""WorldPlay's Hunyuan variant: text once per prompt, then chunks of latents (worldplay.md 10).

Shapes: B slot, C channel, F latent frame, H W latent height and width, T = F * H * W image tokens,
L text token, D width, N heads, E head width. HunyuanVideo-1.5's double-stream blocks, with the
same two additions as the Wan variant: actions in the time embedding, cameras in a second branch of
every self-attention. The text stream sees only itself, so its keys and values are worked out once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.attention import attention
from worldgym.errors import CheckpointError, ConfigError, ShapeError
from worldgym.models.prope import Cameras, Projection
from worldgym.models.wan import MIN_ROWS, Block, RMSNorm
from worldgym.models.worldplay import CONTEXT_TIME, Context, angles32, check_labels, context_times
from worldgym.rope import cos_sin, rotate, rotation

WAVE = 256  # numbers in a sinusoid
TEXT, GLYPH, VISION = 0, 1, 2  # rows of cond_type_embedding


@dataclass(frozen=True, kw_only=True, slots=True)
class HunyuanConfig:
    """Sizes under their native names; the defaults are the 8B network's.

    ``in_channels``: latent channels; the network sees twice as many and a mask. ``refiner_ratio``:
    feed-forward width of the text refiner; ``byt5_hidden``: of the glyph mapper.
    """

    hidden_size: int = 2048
    heads_num: int = 16
    mm_double_blocks_depth: int = 54
    mlp_width_ratio: float = 4.0
    in_channels: int = 32
    out_channels: int = 32
    concat_condition: bool = True
    rope_dim_list: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    text_states_dim: int = 3584
    vision_states_dim: int = 1152
    glyph_byT5_v2: bool = True  # noqa: N815  (the published name)
    byt5_states_dim: int = 1472
    byt5_hidden: int = 2048
    use_cond_type_embedding: bool = True
    refiner_depth: int = 2
    refiner_ratio: float = 4.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        width = self.hidden_size // max(1, self.heads_num)
        if self.hidden_size % self.heads_num or width % 4 or sum(self.rope_dim_list) != width or (
                any(n % 2 for n in self.rope_dim_list)):
            raise ConfigError("width does not split into heads and axes",
                              given=f"{self.hidden_size}, {self.heads_num} heads, rotary widths "
                              f"{self.rope_dim_list}", expected="heads of a multiple of 4 channels"
                              ", even widths per axis that sum to it", fix="change these sizes")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "HunyuanConfig":
        """Read a native config dict; what concerns other variants is ignored, if it is off.

        Raises:
            ConfigError: single-stream blocks, patches or guidance embedding are asked for.
        """
        odd = {k: data[k] for k, usual in (("mm_single_blocks_depth", 0), ("guidance_embed", False))
               if data.get(k, usual) != usual}
        if list(data.get("patch_size", (1, 1, 1))) not in ([1, 1, 1], 1) or odd:
            raise ConfigError("not WorldPlay's Hunyuan network", given=odd or data["patch_size"],
                              expected="double blocks only, patches of 1, no guidance embedding",
                              fix="use the config of this checkpoint")
        names = {f.name for f in fields(cls)}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                                 for k, v in data.items() if k in names}
        return cls(**known)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]],
                    hints: Mapping[str, Any] | None = None) -> "HunyuanConfig":
        """Sizes read off the tensors of a checkpoint; rotary widths come from ``hints``."""
        refiner, block = "txt_in.individual_token_refiner.blocks.", "double_blocks."
        try:
            dim, channels = shapes["img_in.proj.weight"][:2]
            latent = shapes["final_layer.linear.weight"][0]
            head = shapes["double_blocks.0.img_attn_q_norm.weight"][0]
            seen: dict[str, Any] = {
                "hidden_size": dim, "heads_num": dim // head, "in_channels": latent,
                "out_channels": latent, "concat_condition": channels == 2 * latent + 1,
                "mm_double_blocks_depth": 1 + max(
                    int(n.split(".")[1]) for n in shapes if n.startswith(block)),
                "mlp_width_ratio": shapes["double_blocks.0.img_mlp.fc1.weight"][0] / dim,
                "text_states_dim": shapes["txt_in.input_embedder.weight"][1],
                "vision_states_dim": shapes["vision_in.proj.1.weight"][1],
                "glyph_byT5_v2": "byt5_in.fc1.weight" in shapes,
                "use_cond_type_embedding": "cond_type_embedding.weight" in shapes,
                "refiner_depth": 1 + max(
                    int(n.split(".")[3]) for n in shapes if n.startswith(refiner)),
                "refiner_ratio": shapes[refiner + "0.mlp.fc1.weight"][0] / dim}
            if seen["glyph_byT5_v2"]:
                hidden, states = shapes["byt5_in.fc1.weight"]
                seen |= {"byt5_states_dim": states, "byt5_hidden": hidden}
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                "not the tensors of WorldPlay's Hunyuan network",
                given=f"{len(shapes)} tensors ({error!r})",
                expected="img_in, txt_in, vision_in, double_blocks.*, final_layer",
                fix="give the folder or file of the network's own weights") from error
        free = {k: (hints or {})[k] for k in ("rope_dim_list", "rope_theta", "eps")
                if k in (hints or {})}
        return cls.from_dict({**seen, **free})

    @property
    def input_channels(self) -> int:
        """Channels of the network's input."""
        return 2 * self.in_channels + 1 if self.concat_condition else self.in_channels


def _linears(*pairs: tuple[str, int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(a, b) for name, a, b in pairs})


def _few_rows(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` with the bits that a row has among many (see MIN_ROWS)."""
    rows = x.reshape(-1, x.shape[-1])
    out = layer(F.pad(rows, (0, 0, 0, max(0, MIN_ROWS - len(rows)))))[:len(rows)]
    return out.unflatten(0, x.shape[:-1])


class _Waves(nn.Module):
    """Sinusoid and two-layer embedding of a number."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVE, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, value: Tensor) -> Tensor:
        angle = angles32(value, WAVE // 2)
        wave = torch.cat([angle.cos(), angle.sin()], -1)
        return _few_rows(self.mlp, wave.to(cast(nn.Linear, self.mlp[0]).weight))


class _RefinerBlock(nn.Module):
    """Self-attention over the prompt; only its gates are modulated."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        dim, wide = cfg.hidden_size, int(cfg.hidden_size * cfg.refiner_ratio)
        self.heads = cfg.heads_num
        self.norm1, self.norm2 = nn.LayerNorm(dim, cfg.eps), nn.LayerNorm(dim, cfg.eps)
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = _linears(("fc1", dim, wide), ("fc2", wide, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x_BLD: Tensor, c_BD: Tensor, mask_BL: Tensor) -> Tensor:
        attn, mlp = self.adaLN_modulation(c_BD)[:, None].chunk(2, -1)
        q, k, v = self.self_attn_qkv(self.norm1(x_BLD)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = attention(q, k, v, mask_BL[:, None, None]).flatten(2)
        x_BLD = x_BLD + attn * self.self_attn_proj(y)
        y = self.mlp["fc2"](F.silu(self.mlp["fc1"](self.norm2(x_BLD))))
        return x_BLD + mlp * y


class _Refiner(nn.Module):
    """Language-model states of a prompt to tokens of the network's width."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        dim = cfg.hidden_size
        self.input_embedder = nn.Linear(cfg.text_states_dim, dim)
        self.t_embedder = _Waves(dim)
        self.c_embedder = _linears(("linear_1", cfg.text_states_dim, dim), ("linear_2", dim, dim))
        self.individual_token_refiner = nn.ModuleDict({"blocks": nn.ModuleList(
            _RefinerBlock(cfg) for _ in range(cfg.refiner_depth))})

    def forward(self, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        part = mask_BL.to(text_BLD)[..., None]
        mean = (text_BLD * part).sum(1) / part.sum(1)
        c = self.c_embedder["linear_2"](F.silu(self.c_embedder["linear_1"](mean)))
        c = c + self.t_embedder(torch.zeros(len(c), device=c.device))
        x = self.input_embedder(text_BLD)
        for block in cast(nn.ModuleList, self.individual_token_refiner["blocks"]):
            x = block(x, c, mask_BL)
        return x


class _Glyphs(nn.Module):
    """ByT5 states to tokens."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(cfg.byt5_states_dim)
        self.fc1 = nn.Linear(cfg.byt5_states_dim, cfg.byt5_hidden)
        self.fc2 = nn.Linear(cfg.byt5_hidden, cfg.hidden_size)
        self.fc3 = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y = F.gelu(self.fc1(self.layernorm(x_BLD)))
        return self.fc3(F.gelu(self.fc2(y)))


class _DoubleBlock(nn.Module):
    """One block of both streams; the published names of its tensors are flat."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        dim, wide = cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_width_ratio)
        self.heads, self.eps = cfg.heads_num, cfg.eps
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", _linears(("linear", dim, 6 * dim)))
            for part in "qkv":
                self.add_module(f"{stream}_attn_{part}", nn.Linear(dim, dim))
            self.add_module(f"{stream}_attn_proj", nn.Linear(dim, dim))
            for part in "qk":
                self.add_module(f"{stream}_attn_{part}_norm", RMSNorm(dim // self.heads, cfg.eps))
            self.add_module(f"{stream}_mlp", _linears(("fc1", dim, wide), ("fc2", wide, dim)))
        self.img_attn_prope_proj = nn.Linear(dim, dim)

    def modulation(self, stream: str, vec_BFD: Tensor) -> tuple[Tensor, ...]:
        """Six of (B, F, 1, D): worked out per frame, not per token."""
        out = _few_rows(self.get_submodule(f"{stream}_mod.linear"), F.silu(vec_BFD))
        return out[:, :, None].chunk(6, -1)

    def qkv(self, stream: str, x_BTD: Tensor, m: tuple[Tensor, ...]
            ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised per head, and values (B, T, N, E)."""
        y = Block._modulate(cast(Block, self), x_BTD, m[0], m[1])
        q, k, v = (self.get_submodule(f"{stream}_attn_{p}")(y).unflatten(-1, (self.heads, -1))
                   for p in "qkv")
        norm = self.get_submodule
        return norm(f"{stream}_attn_q_norm")(q), norm(f"{stream}_attn_k_norm")(k), v

    def rest(self, stream: str, x_BTD: Tensor, y_BTD: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        """Residual of the attention's output, then the feed-forward."""
        x_BTD = Block._gate(x_BTD, y_BTD, m[2])
        y = Block._modulate(cast(Block, self), x_BTD, m[3], m[4])
        y = self.get_submodule(f"{stream}_mlp.fc1")(y)
        y = self.get_submodule(f"{stream}_mlp.fc2")(F.gelu(y, approximate="tanh"))
        return Block._gate(x_BTD, y, m[5])


TextKV = list[tuple[Tensor, Tensor]]


class HunyuanDiT(nn.Module):
    """Flow of latent frames under text, actions and cameras; published tensor names."""

    def __init__(self, cfg: HunyuanConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or HunyuanConfig()
        dim, sight = cfg.hidden_size, cfg.vision_states_dim
        self.img_in = nn.ModuleDict({"proj": nn.Conv3d(cfg.input_channels, dim, 1)})
        self.txt_in = _Refiner(cfg)
        if cfg.glyph_byT5_v2:
            self.byt5_in = _Glyphs(cfg)
        self.vision_in = nn.ModuleDict({"proj": nn.Sequential(
            nn.LayerNorm(sight), nn.Linear(sight, sight), nn.GELU(), nn.Linear(sight, dim),
            nn.LayerNorm(dim))})
        if cfg.use_cond_type_embedding:
            self.cond_type_embedding = nn.Embedding(3, dim)
        self.time_in, self.action_in = _Waves(dim), _Waves(dim)
        self.double_blocks = nn.ModuleList(
            _DoubleBlock(cfg) for _ in range(cfg.mm_double_blocks_depth))
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(dim, cfg.out_channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))})

    def tokens(self, text_BLD: Tensor, mask_BL: Tensor, vision_BLD: Tensor | None = None,
               glyphs_BLD: Tensor | None = None, glyph_mask_BL: Tensor | None = None) -> Tensor:
        """All conditions as one sequence (B, L, D): vision, glyphs, text, without padding.

        Args:
            text_BLD: language-model states, ``mask_BL`` their mask; ``vision_BLD``: picture states
                (all used); ``glyphs_BLD``: ByT5 states with their mask.

        Raises:
            ShapeError: the slots have different numbers of tokens; make such texts one by one.
        """
        parts = [(self.txt_in(text_BLD, mask_BL.bool()), mask_BL.bool(), TEXT)]
        if glyphs_BLD is not None and glyph_mask_BL is not None:
            parts.insert(0, (self.byt5_in(glyphs_BLD), glyph_mask_BL.bool(), GLYPH))
        if vision_BLD is not None:
            seen = self.vision_in["proj"](vision_BLD)
            parts.insert(0, (seen, torch.ones_like(seen[..., 0], dtype=torch.bool), VISION))
        if self.cfg.use_cond_type_embedding:
            parts = [(x + self.cond_type_embedding.weight[kind], m, kind) for x, m, kind in parts]
        x, mask = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
        counts = mask.sum(1)
        if bool((counts != counts[0]).any()):
            raise ShapeError("prompts of different length in one batch", given=counts.tolist(),
                             expected="the same number of tokens in every slot",
                             fix="encode the prompts one by one and step these slots apart")
        return x[mask].unflatten(0, (len(x), -1))

    def text(self, tokens_BLD: Tensor) -> TextKV:
        """Keys and values of the text in every block, at timestep 0 (see ``tokens``)."""
        x, out = tokens_BLD, TextKV()
        vec = self.time_in(torch.zeros(len(x), 1, device=x.device))
        for i, block in enumerate(cast(Any, self.double_blocks)):
            m = block.modulation("txt", vec)
            q, k, v = block.qkv("txt", x, m)
            out.append((k, v))
            if i + 1 < len(self.double_blocks):  # nobody looks at what comes after the last
                y = block.txt_attn_proj(attention(q, k, v).flatten(2))
                x = block.rest("txt", x, y, m)
        return out

    def table(self, frame_index_BF: Tensor, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Rotation table of the tokens of these frames, never below float32."""
        a, b, c = (n // 2 for n in self.cfg.rope_dim_list)
        turn = rotation(frame_index_BF, grid_hw, 2 * (a + b + c), theta=self.cfg.rope_theta,
                        pairs=(a, b, c))
        dtype = self.img_in["proj"].weight.dtype
        return cos_sin(turn, torch.promote_types(cast(torch.dtype, dtype), torch.float32))

    def forward(self, x_BCFHW: Tensor, t: Tensor, *, labels_BF: Tensor, cameras: Cameras,
                text_kv: TextKV, context: Context | None = None,
                frame_index_BF: Tensor | None = None,
                record: list[tuple[Tensor, ...]] | None = None) -> Tensor:
        """Flow (B, C, F, H, W) of latents with their condition channels (see ``inputs``).

        Arguments as in ``WorldPlayDiT``; ``text_kv`` from :meth:`text`.
        """
        b, _, f, height, width = x_BCFHW.shape
        if x_BCFHW.shape[1] != self.cfg.input_channels:
            raise ShapeError("latents do not fit the model", given=tuple(x_BCFHW.shape),
                             expected=f"(B, {self.cfg.input_channels}, F, H, W)",
                             fix="add condition and mask channels with HunyuanDiT.inputs")
        proj = cast(nn.Conv3d, self.img_in["proj"])
        x = F.linear(x_BCFHW.flatten(2).mT, proj.weight.flatten(1), proj.bias)
        if (*cameras.w2c_BF44.shape[:2], *labels_BF.shape) != (b, f, b, f):
            raise ShapeError("cameras or labels do not fit the latents",
                             given=f"cameras {tuple(cameras.w2c_BF44.shape)}, labels "
                             f"{tuple(labels_BF.shape)}", expected=f"({b}, {f}) of each",
                             fix="give one camera and label per slot and latent frame")
        t_BF = t[:, None].expand(b, f) if t.ndim == 1 else t
        vec = self.time_in(t_BF) + self.action_in(check_labels(labels_BF))
        index = torch.arange(f, device=x.device) if frame_index_BF is None else frame_index_BF
        table = self.table(index if index.ndim == 2 else index[None], (height, width))
        see = cameras.projection(x)
        for i, block in enumerate(cast(Any, self.double_blocks)):
            m = block.modulation("img", vec)
            q, k, v = block.qkv("img", x, m)
            y, kept = _two_branches(block, i, (q, k, v), table, see, text_kv[i], context)
            if record is not None:
                record.append(kept)
            x = block.rest("img", x, y, m)
        scale = self.final_layer["adaLN_modulation"](vec)[:, :, None]
        y = Block._modulate(cast(Block, cast(Any, self.double_blocks)[0]), x, *scale.chunk(2, -1))
        y = self.final_layer["linear"](y)
        return y.mT.unflatten(-1, (f, height, width))

    def context(self, x_BCFHW: Tensor, *, labels_BF: Tensor, cameras: Cameras, text_kv: TextKV,
                t: float | Tensor = CONTEXT_TIME, **given: Any) -> Context:
        """Keys and values of clean past latents, which see each other and the text.

        Positions and ``t`` as in ``WorldPlayDiT.context``.
        """
        record: list[tuple[Tensor, ...]] = []
        self(x_BCFHW, context_times(x_BCFHW, t), labels_BF=labels_BF, cameras=cameras,
             text_kv=text_kv, record=record, **given)
        return Context(tuple((r[0], r[1]) for r in record), tuple((r[2], r[3]) for r in record))

    def inputs(self, x_BCFHW: Tensor, frames_BF: Tensor, first_BC1HW: Tensor | None) -> Tensor:
        """Latents with condition and mask channels: a start image at frame 0, zeros elsewhere."""
        if not self.cfg.concat_condition:
            return x_BCFHW
        cond, mask = torch.zeros_like(x_BCFHW), torch.zeros_like(x_BCFHW[:, :1])
        if first_BC1HW is not None:
            start = (frames_BF == 0).to(x_BCFHW)[:, None, :, None, None]
            cond, mask = start * first_BC1HW, mask + start
        return torch.cat([x_BCFHW, cond, mask], 1)


def _two_branches(block: Any, layer: int, qkv: tuple[Tensor, Tensor, Tensor],
                  table: tuple[Tensor, Tensor], see: Projection, text: tuple[Tensor, Tensor],
                  context: Context | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output of both branches (B, T, D), and what a context keeps of them.

    Text comes first and as it is, in both: it has neither place nor camera.
    """
    q, k, v = qkv
    position = rotate(k, table), v
    camera = see.key(k), see.key(v)
    seen: list[tuple[Tensor, Tensor]] = []
    for own, old in ((position, context.position if context else None),
                     (camera, context.camera if context else None)):
        rows = [text, own] if old is None else [text, old[layer], own]
        seen.append((torch.cat([r[0] for r in rows], 1), torch.cat([r[1] for r in rows], 1)))
    y = block.img_attn_proj(attention(rotate(q, table), *seen[0]).flatten(2))
    y = y + block.img_attn_prope_proj(see.out(attention(see.query(q), *seen[1])).flatten(2))
    return y, (*position, *camera)
