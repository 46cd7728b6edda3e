"""Whole clips from a bidirectional Wan network: image, prompt and actions in, latents out.

The published SCOPE pipeline, step by step (specs/scope.md section 9). Shapes: B clip, C latent
channel, F latent frame, T raw frame, H W pixels, h w latent grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.errors import ConfigError, DTypeError, ShapeError
from worldgym.models.action_module import Controls
from worldgym.models.scope import ScopeDiT, frame_times
from worldgym.schedule import Euler, UniPC

SIZE_STEP = 32  # pixels: latent stride 16, patches of 2
TIME_STEP = 4  # raw frames per latent frame
MAX_LATENT_FRAMES = 100  # rows of the published action rotation table
FPS = 20
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")

Watch = Callable[[int, Tensor], None]


@dataclass(frozen=True, slots=True)
class ClipSize:
    """Pixels and raw frames of a clip that the network can make.

    >>> ClipSize.fitting(470, 832, 80, rounding="down")
    ClipSize(height=480, width=832, frames=77)
    >>> ClipSize(64, 96, 9).latent_frames
    3
    """

    height: int = 480
    width: int = 832
    frames: int = 81

    def __post_init__(self) -> None:
        if min(self.height, self.width) < SIZE_STEP or self.height % SIZE_STEP or (
                self.width % SIZE_STEP):
            raise ShapeError("impossible frame size", given=f"{self.height} x {self.width}",
                             expected=f"multiples of {SIZE_STEP}",
                             fix=f"use {_up(self.height, SIZE_STEP)} x "
                             f"{_up(self.width, SIZE_STEP)}, or accept rounding (--round)")
        if self.frames < 1 or self.frames % TIME_STEP != 1:
            low = max(1, (self.frames - 1) // TIME_STEP * TIME_STEP + 1)
            raise ShapeError("impossible number of frames", given=self.frames,
                             expected=f"{TIME_STEP}k + 1: the first frame alone, then fours",
                             fix=f"use {low} or {low + TIME_STEP}, or accept rounding (--round)")
        if self.latent_frames > MAX_LATENT_FRAMES:
            most = TIME_STEP * (MAX_LATENT_FRAMES - 1) + 1
            raise ShapeError("clip is too long", given=f"{self.frames} frames",
                             expected=f"at most {most}", fix="chain clips through the last frame")

    @classmethod
    def fitting(cls, height: int, width: int, frames: int, rounding: str | None) -> "ClipSize":
        """Like the constructor, but with rounding: sizes go up to the next possible ones.

        ``rounding``: what happens to frames. "down": as the published command does, "up": as the
        published pipeline does, None: nothing is rounded.
        """
        if rounding not in (None, "up", "down"):
            raise ConfigError("unknown rounding", given=rounding, expected="up, down or None",
                              fix="use 'down', as the published command does")
        if rounding and min(height, width, frames) > 0:
            height, width = _up(height, SIZE_STEP), _up(width, SIZE_STEP)
            steps = (frames - 1) / TIME_STEP
            frames = TIME_STEP * int(math.ceil(steps) if rounding == "up" else steps) + 1
        return cls(height, width, frames)

    @property
    def latent_frames(self) -> int:
        """F."""
        return (self.frames - 1) // TIME_STEP + 1


def _up(value: int, step: int) -> int:
    return max(step, -(-value // step) * step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How a clip is denoised; the published values are the defaults.

    ``guidance``: on the text alone; 1 skips the negative pass. ``timestep_dtype``: what timesteps
    are rounded to before the network sees them (the published pipeline runs in bfloat16 and the
    step itself stays exact); float32 switches the rounding off. ``latent_dtype``: of the sample
    between steps; None = the network's own, as published. ``solver``: "euler", as published, or
    "unipc", which needs fewer steps. ``together``: both passes of guidance as one batch.
    """

    steps: int = 30
    shift: float = 5.0
    guidance: float = 5.0
    strength: float = 1.0
    timestep_dtype: torch.dtype = torch.bfloat16
    latent_dtype: torch.dtype | None = None
    solver: str = "euler"
    together: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ConfigError("impossible guidance", given=self.guidance, expected="a number",
                              fix="use 5.0, or 1.0 for none")
        if self.solver not in ("euler", "unipc") or (
                self.solver == "unipc" and self.strength != 1):
            raise ConfigError("unknown solver", given=f"{self.solver}, strength {self.strength}",
                              expected="euler, or unipc at strength 1", fix="use euler")
        self.schedule()

    @property
    def passes(self) -> int:
        """Network passes of a clip."""
        return self.steps * (1 if self.guidance == 1.0 else 2)

    def schedule(self) -> Euler | UniPC:
        """Noise levels of the steps."""
        if self.solver == "unipc":
            return UniPC(self.steps, shift=self.shift)
        return Euler(self.steps, shift=self.shift, strength=self.strength)


def prepare_image(image_HWC: np.ndarray, size: ClipSize,
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels (1, 3, 1, H, W) in [-1, 1] of an RGB picture: centre crop to the aspect, bicubic."""
    return to_pixels(fit_image(image_HWC, size), dtype)


def to_pixels(image_HWC: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels (1, 3, 1, H, W) in [-1, 1] of uint8 values, in the arithmetic of ``dtype``."""
    x_HWC = torch.from_numpy(image_HWC).to(dtype) * (2 / 255) - 1
    return x_HWC.permute(2, 0, 1)[None, :, None]


def fit_image(image_HWC: np.ndarray, size: ClipSize) -> np.ndarray:
    """An RGB picture uint8 (H, W, 3) of the clip's size: centre crop to the aspect, bicubic."""
    from worldgym.extras import need

    picture = need("PIL.Image", "reading pictures", "wan")
    image_HWC = np.asarray(image_HWC)
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or 0 in image_HWC.shape:
        raise ShapeError("image has the wrong shape", given=image_HWC.shape,
                         expected="(height, width, 3)", fix="convert the picture to RGB")
    if image_HWC.dtype != np.uint8:
        raise DTypeError("image has the wrong dtype", given=image_HWC.dtype, expected="uint8",
                         fix="scale to 0..255 and cast")
    have_h, have_w = image_HWC.shape[:2]
    crop_h, crop_w = have_h, have_w
    if have_h / have_w < size.height / size.width:
        crop_w = max(1, int(have_h / size.height * size.width))
    else:
        crop_h = max(1, int(have_w / size.width * size.height))
    top, left = (have_h - crop_h) // 2, (have_w - crop_w) // 2
    cropped = picture.fromarray(image_HWC[top:top + crop_h, left:left + crop_w])
    return np.array(cropped.resize((size.width, size.height)))


def draw_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """The published starting noise: float32, drawn on the CPU from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


TextKV = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def denoise(dit: ScopeDiT, noise_BCFhw: Tensor, text: TextKV, negative: TextKV | None, *,
            first_BC1hw: Tensor | None = None, controls: list[Controls] | None = None,
            sampler: Sampler = Sampler(), start: tuple[int, Tensor] | None = None,  # noqa: B008
            watch: Watch | None = None,
            flows: Callable[[int, Tensor, Tensor | None], None] | None = None) -> Tensor:
    """Latents of a whole clip (B, C, F, h, w).

    Args:
        noise_BCFhw: starting noise.
        text, negative: keys and values from ``dit.text``; the actions go to both passes.
        first_BC1hw: latent of the given first frame, put back after every step; None = no image.
        controls: actions, from ``dit.controls``.
        start: (step to begin with, sample before it), to go on where ``watch`` saw a run stop.
        watch: called with (steps done, sample) before the first step and after every one.
        flows: called with (step, flow of the prompt, flow of the negative prompt).
    """
    weight = dit.head.modulation
    guided = sampler.guidance != 1.0
    if guided and negative is None:
        raise ConfigError("guidance without a negative prompt", given=sampler.guidance,
                          expected="a negative context, or guidance 1",
                          fix="encode worldgym.clip.NEGATIVE_PROMPT")
    schedule, dtype = sampler.schedule(), sampler.latent_dtype or weight.dtype
    first = 0
    if start is None:
        x = noise_BCFhw.to(weight.device, dtype, copy=True)
    else:
        first, x = start[0], start[1].to(weight.device, dtype, copy=True)
        if not 0 <= first <= len(schedule) or x.shape != noise_BCFhw.shape:
            raise ConfigError("cannot go on from there", given=f"step {first}, {tuple(x.shape)}",
                              expected=f"a step up to {len(schedule)}, {tuple(noise_BCFhw.shape)}",
                              fix="begin anew")
        if isinstance(schedule, UniPC) and first:
            raise ConfigError("cannot go on within a multi-step run", given=f"step {first}",
                              expected="step 0, or the euler solver", fix="begin anew")
    given = None if first_BC1hw is None else first_BC1hw.to(x)
    b, frames = x.shape[0], x.shape[2]

    def keep_first(x: Tensor) -> Tensor:
        if given is not None:
            x[:, :, :1] = given
        return x

    def flow(t_BF: Tensor, text_kv: TextKV) -> Tensor:
        out = dit.infer(x.to(weight.dtype), t_BF, text_kv=text_kv, controls=controls)
        return out.to(dtype)

    both, doubled = None, None
    if guided and sampler.together:
        both = [tuple(torch.cat([y.expand(b, -1, -1, -1) for y in pair])
                      for pair in zip(kv, no_kv, strict=True))
                for kv, no_kv in zip(text, negative, strict=True)]  # type: ignore[arg-type]
        doubled = controls and [c.twice() for c in controls]

    def flows_of(t_BF: Tensor) -> tuple[Tensor, Tensor | None]:
        if both is not None:
            out = dit.infer(torch.cat([x, x]).to(weight.dtype), torch.cat([t_BF, t_BF]),
                            text_kv=both, controls=doubled).to(dtype)
            return out[:b], out[b:]
        return flow(t_BF, text), flow(t_BF, negative) if guided else None  # type: ignore[arg-type]

    x = keep_first(x)
    run = schedule.begin(x) if isinstance(schedule, UniPC) else None
    times_S = schedule.timesteps_S if isinstance(schedule, Euler) else torch.tensor(
        schedule.timesteps, dtype=torch.float32)
    if watch is not None:
        watch(first, x)
    for i in range(first, len(schedule)):
        t = times_S[i].to(weight.device, sampler.timestep_dtype)
        t_BF = frame_times(t, b, frames, given is not None)
        positive, opposite = flows_of(t_BF)
        v = positive
        if opposite is not None:
            v = opposite + sampler.guidance * (positive - opposite)
        if flows is not None:
            flows(i, positive, opposite)
        x = run.step(v).clone() if run is not None else schedule.step(x, v, i)  # type: ignore
        x = keep_first(x)
        if watch is not None:
            watch(i + 1, x)
    return x


@dataclass(frozen=True, slots=True)
class Prompt:
    """Contexts (B, L, D) of the prompts and of the negative ones, encoded once per clip."""

    context_BLD: Tensor
    negative_BLD: Tensor | None = None


@torch.no_grad()
def make_latents(dit: ScopeDiT, vae: Any, prompt: Prompt, size: ClipSize, *,
                 image_HWC: np.ndarray | None = None, mouse_BNJ: Tensor | None = None,
                 keyboard_BNK: Tensor | None = None, seed: int = 0,
                 sampler: Sampler = Sampler(), **options: Any) -> Tensor:  # noqa: B008
    """Latents (B, C, F, h, w) of clips, ready for ``vae.decode``; one clip per prompt.

    Args:
        image_HWC: uint8 first frame of all of them; None = text to video.
        mouse_BNJ, keyboard_BNK: raw rows, one per raw frame, of every clip or of all (B = 1);
            None skips the path.
        seed: of the noise, drawn at once for all clips.
        options: ``start``, ``watch`` and ``flows`` of :func:`denoise`.
    """
    device = dit.head.modulation.device
    frames = size.latent_frames
    b = len(prompt.context_BLD)
    shape = (b, dit.cfg.in_dim, frames, size.height // vae.stride, size.width // vae.stride)
    first = None if image_HWC is None else vae.encode(prepare_image(image_HWC, size, vae.dtype))
    weight = dit.head.modulation
    text = dit.text(prompt.context_BLD.to(weight))
    negative = None
    if sampler.guidance != 1.0 and prompt.negative_BLD is not None:
        negative = dit.text(prompt.negative_BLD.to(weight).expand(b, -1, -1))
    mouse_BNJ, keyboard_BNK = (None if r is None else r.to(device).expand(b, -1, -1)
                               for r in (mouse_BNJ, keyboard_BNK))
    controls = dit.controls(mouse_BNJ, keyboard_BNK, frames)
    return denoise(dit, draw_noise(shape, seed), text, negative, first_BC1hw=first,
                   controls=controls, sampler=sampler, **options)
