"""``worldgym bench scope``: work, traffic and memory of SCOPE at its real size; a timed tiny pass.

Counted on meta tensors at the published sizes (no weights needed), timed at a tiny size on this
machine. ``published_pass`` keeps the published order of operations, for comparison only: rotations
in double-precision complex numbers, action windows and button keys repeated over all positions, one
timestep row per token, text keys and values in every pass.
Shapes: B clip, F latent frame, S tokens per frame, T = F * S tokens, D width, N raw row.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from worldgym.agents import results
from worldgym.agents.bench import in_turn
from worldgym.agents.results import Row
from worldgym.models.action_module import ActionConfig, ActionModule, windows
from worldgym.models.offload import resident_bytes
from worldgym.models.scope import ScopeConfig, ScopeDiT, frame_times
from worldgym.models.wan import WanConfig
from worldgym.models.wan_vae import WanVAE
from worldgym.rope import frame_rotation, rotation

OUT = Path("results/scope_bench.json")
REAL_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "temperal_downsample": [False, True, True], "attn_scales": [],
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_temporal": 4, "scale_factor_spatial": 16}
HW = (480, 832)
CLIP = 21  # latent frames of 81 frames
NEW_FRAMES, PASSES = (4, 8, 16), (4, 10)


# -- the published order of operations, for comparison --------------------------------------------


def _turned(x_BTHE: Tensor, turn: Tensor) -> Tensor:
    """Rotated in complex128, and back."""
    pairs = torch.view_as_complex(x_BTHE.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, :, None]).flatten(-2).to(x_BTHE.dtype)


def _attend(q_BTHE: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _published_actions(module: ActionModule, x_BTD: Tensor, mouse_BNJ: Tensor,
                       keyboard_BNK: Tensor, frames: int, turn: Tensor) -> Tensor:
    act, heads = module.action, module.heads
    b, tokens, d = x_BTD.shape
    s = tokens // frames
    y = x_BTD.unflatten(1, (frames, s)).transpose(1, 2).reshape(b * s, frames, d).contiguous()

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1))

    def repeated(rows: Tensor) -> Tensor:
        return windows(rows, frames, act.ratio, act.rows).repeat_interleave(s, 0)

    a: Any = module.mouse_attn
    t = module.mouse_mlp(torch.cat([y, repeated(mouse_BNJ)], -1))  # type: ignore[operator]
    q, k = (_turned(split(x), turn) for x in (a.norm_q(a.q(t)), a.norm_k(a.k(t))))
    y = y + a.o(_attend(q, k, split(a.v(t))))
    k, v = module.keyboard_kv_proj(windows(  # type: ignore[operator]
        module.keyboard_embed(keyboard_BNK), frames, act.ratio, act.rows)).chunk(2, -1)
    k = module.key_attn_k_norm(k)  # type: ignore[operator]
    q = module.key_attn_q_norm(module.keyboard_q_proj(y))  # type: ignore[operator]
    k, v = (x.repeat_interleave(s, 0) for x in (k, v))
    out = _attend(_turned(split(q), turn), _turned(split(k), turn), split(v))
    y = y + module.keyboard_o_proj(out)  # type: ignore[operator]
    return y.unflatten(0, (b, s)).transpose(1, 2).reshape(b, tokens, d)


@torch.no_grad()
def published_pass(dit: ScopeDiT, x_BCFHW: Tensor, t: Tensor, context_BLD: Tensor,
                   mouse_BNJ: Tensor, keyboard_BNK: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Flow (B, C, F, H, W) of a clip whose first frame is given, as the published code makes it.

    ``turns``: rotations of tokens and of frames, complex128, made once.
    """
    cfg, frames = dit.cfg, x_BCFHW.shape[2]
    grid = (x_BCFHW.shape[3] // cfg.patch_size[1], x_BCFHW.shape[4] // cfg.patch_size[2])
    s, dtype, device = grid[0] * grid[1], dit.head.modulation.dtype, x_BCFHW.device
    t_T = torch.cat([torch.zeros(s, device=device), t.reshape(1).expand(s * (frames - 1))])
    half = cfg.freq_dim // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = t_T.double()[:, None] * rate
    e = dit.time_embedding(torch.cat([angle.cos(), angle.sin()], -1).to(dtype)[None])
    rows_BT6D = dit.time_projection(e).unflatten(-1, (6, -1))
    text = dit.text_embedding(F.pad(context_BLD, (0, 0, 0, cfg.text_len - context_BLD.shape[1])))
    x = F.conv3d(x_BCFHW, dit.patch_embedding.weight, dit.patch_embedding.bias,
                 stride=cfg.patch_size).flatten(2).transpose(1, 2)
    turn, frame_turn = turns

    def plain(y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], eps=cfg.eps)

    block: Any
    for block in dit.blocks:
        m = (block.modulation[:, None] + rows_BT6D).unbind(2)
        u = plain(x) * (1 + m[1]) + m[0]
        q, (k, v) = block.self_attn.query(u), block.self_attn.key_value(u)
        x = x + m[2] * block.self_attn.o(_attend(_turned(q, turn), _turned(k, turn), v))
        k, v = block.cross_attn.key_value(text)
        x = x + block.cross_attn.o(_attend(block.cross_attn.query(block.norm3(x)), k, v))
        x = _published_actions(block.action_attn, x, mouse_BNJ, keyboard_BNK, frames, frame_turn)
        x = x + m[5] * block.ffn(plain(x) * (1 + m[4]) + m[3])
    shift, scale = (dit.head.modulation[:, None] + e[:, :, None]).unbind(2)
    return dit.unpatch(dit.head.head(plain(x) * (1 + scale) + shift), frames, grid)


@torch.no_grad()
def our_pass(dit: ScopeDiT, given: dict[str, Any]) -> Tensor:
    """The same from what is computed once per prompt and once per clip."""
    x = given["x"]
    times = frame_times(given["t"].reshape(1), len(x), x.shape[2], True)
    return dit.infer(x, times, text_kv=given["text_kv"], controls=given["controls"])


def inputs(dit: ScopeDiT, frames: int, hw: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """Random inputs of one clip; ``hw``: latent height and width."""
    weight = dit.head.modulation
    if weight.is_meta:
        def draw(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=weight.dtype, device="meta")
    else:
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng)
    n, cfg = 4 * (frames - 1), dit.cfg
    given: dict[str, Any] = {
        "x": draw(1, cfg.in_dim, frames, *hw), "context": draw(1, cfg.text_len, cfg.text_dim),
        "mouse": draw(1, n, 4), "keyboard": draw(1, n, 6),
        "t": torch.full((), 600.0, device=weight.device)}
    with torch.no_grad():
        given["text_kv"] = dit.text(given["context"])
        given["controls"] = dit.controls(given["mouse"], given["keyboard"], frames)
    index = torch.arange(frames, device=weight.device)[None]
    grid = (hw[0] // cfg.patch_size[1], hw[1] // cfg.patch_size[2])
    given["turns"] = (rotation(index, grid, cfg.head_dim),
                      frame_rotation(index, cfg.dim // dit._modules_of_action()[0].heads))
    return given


def published(dit: ScopeDiT, given: dict[str, Any]) -> Tensor:
    """``published_pass`` of these inputs."""
    return published_pass(dit, given["x"], given["t"], given["context"], given["mouse"],
                          given["keyboard"], given["turns"])


# -- counting at the real size --------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, and the most that is alive at once beyond its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.alive = self.peak = 0
        self._known: set[int] = set()

    def _gone(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [x for x in torch.utils._pytree.tree_leaves((args, kwargs))
                if isinstance(x, Tensor)]
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        held = {x.untyped_storage()._cdata for x in read}
        fresh = [x for x in made if x.untyped_storage()._cdata not in held]
        if fresh or func.__name__.split(".")[0].endswith("_"):  # a view moves nothing
            # an expanded tensor is read once
            self.moved += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                              for x in (*read, *made))
        for x in fresh:
            store = x.untyped_storage()
            if store._cdata not in self._known:
                self._known.add(store._cdata)
                self.alive += store.nbytes()
                weakref.finalize(store, self._gone, store._cdata, store.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of products, convolutions and attention (multiply-add = 2)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


class _Fused(TorchFunctionMode):
    """Attention as one operator that keeps its scores to itself, as flash kernels do.

    On meta tensors it would be taken apart into products and count its scores as memory.
    """

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.traffic.moved += sum(x.numel() * x.element_size() for x in args[:3])
        return torch.empty_like(args[0])  # which counts as the output that is written


def traffic(call: Callable[[], Any]) -> Traffic:
    """Memory traffic of a call; attention counts its operands and its output."""
    with Traffic() as mode, _Fused(mode), torch.no_grad():
        call()
    return mode


def real() -> ScopeDiT:
    """The published network on the meta device."""
    with torch.device("meta"):
        return ScopeDiT(ScopeConfig()).to(torch.bfloat16).eval().requires_grad_(False)


def counted() -> list[Row]:
    """Work and memory at the real size."""
    dit, hw = real(), (HW[0] // 16, HW[1] // 16)
    vae = WanVAE(torch.nn.Module.to(WanVAE.build(REAL_VAE), torch.bfloat16))
    rows: list[Row] = []

    def add(metric: str, value: float, unit: str, note: str) -> None:
        rows.append(Row(what="real-config", metric=metric, value=value, unit=unit, note=note))

    clip = inputs(dit, CLIP, hw)
    pass_peak = _passes(add, dit, clip)
    codec = _codec(add, vae, hw)
    _env_steps(add, dit, hw, codec)
    _memory(add, dit, vae, clip, pass_peak, codec.peak)
    return rows


Add = Callable[[str, float, str, str], None]


@dataclass(frozen=True, slots=True)
class _Codec:
    """FLOPs of encoding a picture, decoding the first latent frame and a later one; the bytes each
    moves; the bytes that decoding a later one holds."""

    work: tuple[int, int, int]
    moved: tuple[int, int, int]
    peak: float

    def of_step(self, frames: int) -> list[int]:
        """FLOPs and bytes of decoding a step's frames and encoding the last picture again."""
        return [e + first + (frames - 1) * later for e, first, later in (self.work, self.moved)]


def _passes(add: Add, dit: ScopeDiT, clip: dict[str, Any]) -> float:
    """A network pass over a whole clip in both orders; returns the bytes that ours holds."""
    size, peak = f"{HW[0]}x{HW[1]}, 81 frames, one clip", 0
    for name, call in (("", our_pass), ("_published_order", published)):
        add(f"tflop_per_pass{name}", flops(lambda call=call: call(dit, clip)) / 1e12,  # type: ignore[misc]
            "TFLOP", f"{size}; one network pass with actions")
        seen = traffic(lambda call=call: call(dit, clip))  # type: ignore[misc]
        add(f"gb_moved_per_pass{name}", seen.moved / 1e9, "GB",
            f"{size}; bytes that operators read and write, each by itself, in bfloat16")
        if not name:
            peak = seen.peak
    add("tflop_per_prompt", flops(lambda: dit.text(clip["context"])) / 1e12, "TFLOP",
        "keys and values of a text, once per prompt")
    return peak


def _codec(add: Add, vae: WanVAE, hw: tuple[int, int]) -> _Codec:
    picture = torch.empty(1, 3, 1, *HW, dtype=torch.bfloat16, device="meta")
    latents = [torch.empty(1, 48, 1, *hw, dtype=torch.bfloat16, device="meta")] * 2
    _, stream = vae.decode_next(latents[0])
    calls = (lambda: vae.encode(picture), lambda: vae.decode_next(latents[0]),
             lambda: vae.decode_next(latents[1], stream))
    seen = [traffic(call) for call in calls]
    work, moved = [flops(call) for call in calls], [t.moved for t in seen]
    for i, name in enumerate(("encode_picture", "decode_first", "decode_later")):
        add(f"tflop_{name}", work[i] / 1e12, "TFLOP", "autoencoder, one latent frame")
        add(f"gb_moved_{name}", moved[i] / 1e9, "GB", "autoencoder, one latent frame, in bfloat16")
    return _Codec((work[0], work[1], work[2]), (moved[0], moved[1], moved[2]), seen[2].peak)


def _env_steps(add: Add, dit: ScopeDiT, hw: tuple[int, int], codec: _Codec) -> None:
    for new in NEW_FRAMES:
        frames = new // 4 + 1
        given = inputs(dit, frames, hw)
        def heard(given: dict[str, Any] = given, frames: int = frames) -> None:
            dit.controls(given["mouse"], given["keyboard"], frames)
        once = {"": (flops(heard), traffic(heard).moved), "_published_order": (0, 0)}
        for order, call in (("", our_pass), ("_published_order", published)):
            def run(call: Callable[..., Tensor] = call, given: dict[str, Any] = given) -> None:
                call(dit, given)

            each = flops(run), traffic(run).moved
            for passes in PASSES:
                note = (f"{new} new frames, {passes} network passes (two per step with guidance), "
                        "decoding and encoding included")
                work, moved = (passes * e + o + p for e, o, p in zip(
                    each, once[order], codec.of_step(frames), strict=True))
                add(f"tflop_per_env_step_{new}_{passes}{order}", work / 1e12, "TFLOP", note)
                add(f"gb_moved_per_env_step_{new}_{passes}{order}", moved / 1e9, "GB",
                    f"{note}; the network passes alone move {passes * each[1] / 1e9:.0f}")


def _memory(add: Add, dit: ScopeDiT, vae: WanVAE, clip: dict[str, Any], pass_peak: float,
            decode_peak: float) -> None:
    codec_bytes = sum(p.numel() * p.element_size() for p in vae.net.parameters())
    text = 2 * sum(x.numel() * x.element_size() for kv in clip["text_kv"] for x in kv)
    for name, away in (("offload", True), ("resident", False)):
        (device, host), work = resident_bytes(dit, away), max(pass_peak, decode_peak)
        note = (f"weights {device / 1e9:.2f} GB, autoencoder {codec_bytes / 1e9:.2f}, two prompts "
                f"{text / 1e9:.2f}, activations {work / 1e9:.2f} (larger of a pass over 81 frames "
                f"{pass_peak / 1e9:.2f} and decoding a latent frame {decode_peak / 1e9:.2f}); text "
                "encoder let go; no allocator overhead; bfloat16")
        add(f"device_gb_{name}", (device + codec_bytes + text + work) / 1e9, "GB", note)
        add(f"host_gb_{name}", host / 1e9, "GB", "blocks that rest in host memory")


# -- timing at a tiny size ------------------------------------------------------------------------


def tiny(seed: int = 0) -> ScopeDiT:
    """A small network with random weights: the test fixtures' proportions, three times as wide."""
    wan = WanConfig(dim=192, ffn_dim=288, num_heads=6, num_layers=2, in_dim=48, out_dim=48,
                    freq_dim=64, text_dim=64, text_len=24)
    net = ScopeDiT(ScopeConfig(wan=wan, action=ActionConfig()))
    rng = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, std=0.08, generator=rng)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return net.eval().requires_grad_(False)


def timed(seconds: float) -> list[Row]:
    """A tiny pass against the published order of operations, in turn."""
    dit, frames, hw = tiny(), 5, (12, 16)
    given = inputs(dit, frames, hw)

    def clock(call: Callable[..., Tensor]) -> Callable[[], float]:
        def once() -> float:
            start = time.process_time()
            call(dit, given)
            return time.process_time() - start

        return once

    slow, fast = in_turn(clock(published), clock(our_pass), seconds, least=15)
    gap = float((published(dit, given) - our_pass(dit, given)).abs().max())
    note = (f"width {dit.cfg.dim}, {dit.cfg.num_layers} layers, {frames} latent frames of "
            f"{hw[0]}x{hw[1]}, float32, one thread; processor time, in turn, medians; outputs "
            f"differ by at most {gap:.1e}; load average {load()}")
    return [
        Row(what="tiny", metric="speedup_over_published_order", unit="ratio", n=len(slow),
            value=float(np.median(slow) / np.median(fast)), note=note),
        Row(what="tiny", metric="pass_ms", unit="ms", n=len(fast),
            value=1e3 * float(np.median(fast)), note=note)]


def load() -> str:
    """Load average of the last minute, and the processors there are."""
    import os

    try:
        return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    except OSError:
        return "unknown"


def bench(out: Path | None = None, seconds: float = 5.0) -> list[Row]:
    """Measure, print, write the results file; 0 seconds: only count, timed rows stay."""
    torch.set_num_threads(1)
    rows = counted() + (timed(seconds) if seconds else [])
    for row in rows:
        print(f"{row.what:12} {row.metric:44} {row.value:>10.4g} {row.unit}", flush=True)
    print("written:", results.write(out or OUT, rows, extra={"threads": torch.get_num_threads(),
                                                             "load": load()}))
    return rows
