"""``worldgym bench scope --gpu``: seconds of SCOPE at its real size on a GPU.

Weights are random (the time does not depend on them), in bfloat16: a clip of 81 frames with the
published settings and an environment step of 16 new frames, with and without the autoencoder, by
PyTorch's attention, by flash-attn where it is installed, and compiled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from worldgym import attention
from worldgym.agents import results
from worldgym.agents.bench_scope import HW, REAL_VAE, real
from worldgym.agents.results import Row
from worldgym.clip import ClipSize, Prompt, Sampler, make_latents
from worldgym.errors import ConfigError, NotFiniteError
from worldgym.models.scope import ScopeDiT
from worldgym.models.scope_world import ScopeWorld
from worldgym.models.wan_vae import WanVAE

OUT = Path("results/scope_gpu.json")
FRAMES, LATENTS, PASSES = 81, 4, (4, 8, 10)
ROUNDS = 3  # of an environment step
NEED_GB = 24.0
WAYS = ("sdpa", "flash", "compile")


def filled(module: nn.Module, device: torch.device | str, seed: int = 0) -> nn.Module:
    """A module of the meta device with random weights on ``device``; outputs stay finite."""
    module.to_empty(device=device)
    rng = torch.Generator(device).manual_seed(seed)
    for name, p in module.named_parameters():
        gain = "norm" in name and name.endswith("weight") or name.endswith("gamma")
        fan = p[0].numel() if p.ndim > 1 else p.numel()
        nn.init.normal_(p, float(gain), 0.5 * fan**-0.5, generator=rng)
    return module.eval().requires_grad_(False)


def ready(device: str = "cuda") -> None:
    """Nothing, or the reason why nothing can be measured here.

    Raises:
        ConfigError: no CUDA device, or one without room for the network.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "no GPU to measure on", given=f"torch {torch.__version__} without a CUDA device",
            expected=f"a CUDA device with {NEED_GB:.0f} GB free", fix="run it on a machine with a "
            "GPU; `worldgym bench scope` counts work and memory without one")
    free = torch.cuda.mem_get_info(device)[0] / 1e9
    if free < NEED_GB:
        raise ConfigError("GPU is too small or in use", given=f"{free:.1f} GB free",
                          expected=f"{NEED_GB:.0f} GB for network, autoencoder and activations",
                          fix="free it, or take a larger one")


@contextmanager
def way(dit: ScopeDiT, name: str, backend: str | Callable = "inductor") -> Iterator[None]:
    """The network by one of ``WAYS``; "compile" takes flash-attn where it is installed."""
    before, plain = os.environ.get("WORLDGYM_FLASH"), dit.forward
    try:
        os.environ["WORLDGYM_FLASH"] = "0" if name == "sdpa" else "1"
        attention.flash_function.cache_clear()
        if name == "flash" and attention.flash_function() is None:
            raise ConfigError("flash-attn cannot be used", given="no such package, or no GPU",
                              expected="flash-attn and a CUDA device",
                              fix="pip install 'worldgym[flash]'")
        if name == "compile":
            dit.forward = torch.compile(  # type: ignore[method-assign]
                plain, dynamic=False, backend=backend)
        yield
    finally:
        vars(dit).pop("forward", None)
        os.environ.pop("WORLDGYM_FLASH")
        if before is not None:
            os.environ["WORLDGYM_FLASH"] = before
        attention.flash_function.cache_clear()


def seconds(call: Callable[[], Tensor], device: torch.device, rounds: int) -> tuple[float, float]:
    """Median and deviation of ``rounds`` calls after one that is not counted."""
    taken = []
    for i in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        out = call()
        _wait(device)
        if i:
            taken.append(time.perf_counter() - start)
        elif not bool(torch.isfinite(out.float()).all()):
            raise NotFiniteError("the network's output is not finite", given="NaN or infinity",
                                 expected="finite numbers", fix="draw smaller random weights")
    return float(np.median(taken)), float(np.std(taken))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(dit: ScopeDiT, vae: WanVAE, *, hw: tuple[int, int] = HW, frames: int = FRAMES,
             latents: int = LATENTS, passes: tuple[int, ...] = PASSES, steps: int = 30,
             rounds: int = ROUNDS, say: Callable[[str], None] = print,
             ways: tuple[str, ...] = WAYS) -> list[Row]:
    """Seconds of a clip and of an environment step by every way that this machine has."""
    rows: list[Row] = []
    device = dit.head.modulation.device
    size = f"{hw[0]}x{hw[1]}, random weights, {str(dit.head.modulation.dtype)[6:]}"
    context = torch.zeros(1, 1, dit.cfg.text_dim, device=device)
    picture = np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8)

    def add(metric: str, call: Callable[[], Tensor], n: int, note: str) -> None:
        value, sd = seconds(call, device, n)
        rows.append(Row(what="gpu", metric=metric, unit="s", n=n, value=value,
                        sd=sd if n > 1 else None, note=f"{size}; {note}"))
        say(f"{metric:44} {value:>10.4g} s")

    def clip(decode: bool) -> Tensor:
        made = make_latents(
            dit, vae, Prompt(context, context), ClipSize(*hw, frames), image_HWC=picture,
            mouse_BNJ=torch.zeros(1, frames, 4), keyboard_BNK=torch.zeros(1, frames, 6),
            sampler=Sampler(steps=steps))
        return vae.decode(made) if decode else made

    def step(number: int, carry: str) -> Callable[[], Tensor]:
        world = ScopeWorld(dit, vae, height=hw[0], width=hw[1], latents=latents, carry=carry,
                           sampler=Sampler(steps=number // 2), fingerprint="random")
        state = world.begin(world.starts(picture[None], context, context), [0])
        return lambda: world.step(state, np.zeros((1, 10), np.float32))[1].latents_BFChw

    for name in ways:
        try:
            with way(dit, name):
                for decode, end in ((False, "_no_decode"), (True, "")):
                    told = "with decoding" if decode else "latents only"
                    add(f"seconds_per_clip_{frames}{end}_{name}", lambda d=decode: clip(d),  # type: ignore[misc]
                        1, f"{steps} steps, guidance 5 ({2 * steps} passes), {told}, {name}")
                    for number in passes:
                        add(f"seconds_per_env_step_{4 * latents}_{number}{end}_{name}",
                            step(number, "frame" if decode else "latent"), rounds,
                            f"{number} passes (two per step with guidance), {told}"
                            f"{' and the last frame encoded' if decode else ''}, {name}")
        except (ConfigError, RuntimeError) as error:  # what one way lacks, the others may have
            say(f"{name} was not measured: {' '.join(str(error).split())[:300]}")
    return rows


def bench(out: Path | None = None) -> list[Row]:
    """Measure on the first CUDA device, print, write the results file."""
    ready()
    dit = filled(real(), "cuda")
    assert isinstance(dit, ScopeDiT)
    vae = WanVAE(filled(nn.Module.to(WanVAE.build(REAL_VAE), torch.bfloat16), "cuda", 1))
    rows = measured(dit, vae)
    if not rows:
        raise ConfigError("nothing could be measured", given="errors in every way of computing",
                          expected="at least one that works", fix="see the reasons above")
    rows.append(Row(what="gpu", metric="peak_gb", unit="GB",
                    value=torch.cuda.max_memory_allocated() / 1e9, note="allocated at once, all of "
                    "the above"))
    print("written:", results.write(out or OUT, rows))
    return rows
