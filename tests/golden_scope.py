"""Golden kinds of SCOPE: weights, schedule, actions, autoencoder, text encoder, whole sampler.

Weights are stored in bfloat16 with exact values and run in float32, or in the dtype of the outputs:
bfloat16 is compared by its relative RMS. The network: golden_scope_dit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from golden import DEFAULT_ATOL, Check, Fixture, FixtureError, _tensors
from torch import Tensor

from worldgym.checkpoint import load_into
from worldgym.clip import ClipSize, Prompt, Sampler, draw_noise, make_latents
from worldgym.gamepad import read_parquet
from worldgym.models.scope import ScopeConfig, ScopeDiT
from worldgym.models.umt5 import TextEncoder
from worldgym.models.wan_vae import MEAN, STD, WanVAE, to_uint8
from worldgym.schedule import Euler


def tolerance(fixture: Fixture) -> tuple[float, float]:
    """(atol, rtol); where the JSON tells it in words, the first such number in them."""
    words = fixture.meta.get("tolerance")
    if not isinstance(words, str):
        return fixture.tolerance()
    numbers = re.findall(r"\d+(?:\.\d+)?[eE]-\d+", words) or re.findall(r"\b0\.\d+", words)
    return (float(numbers[0]) if numbers else DEFAULT_ATOL), 0.0


BF16_BOUND = 0.02  # relative RMS; the spec's bound of a pass of the network (section 14)
BF16_CODEC = 2.5  # text encoder and autoencoder: so many times that; the spec names no bound


def against(fixture: Fixture, name: str, got: Tensor, want: Tensor | None = None,
            passes: float = 1.0) -> Check:
    """Our value against the fixture's of this name; bfloat16 as relative RMS, one number against 0.

    The bound of bfloat16 is the relative one in the JSON's words if there is one, else ``passes``
    times the spec's.
    """
    want = fixture[name] if want is None else want
    if want.dtype is not torch.bfloat16 or got.shape != want.shape:
        return Check(name, got, want, tolerance(fixture))
    told = re.search(r"\brel\w*\D*?(\d+(?:\.\d+)?(?:[eE]-\d+)?)\s*(%?)",
                     str(fixture.meta.get("tolerance")), re.IGNORECASE)
    bound = float(told[1]) / (100 if told[2] else 1) if told else BF16_BOUND * passes
    got, want = got.double(), want.double()
    rms = ((got - want).norm() / want.norm().clamp_min(1e-30)).reshape(1)
    return Check(f"{name} (relative RMS)", rms, torch.zeros(1), (bound, 0.0))


def known(fixture: Fixture, *names: str) -> None:
    """FixtureError if the fixture has an output that we do not compute."""
    odd = [n for n in fixture.tensors if n.startswith("out") and n not in names]
    if odd:
        raise FixtureError(f"tensor without a rule: {odd[0]}")


def weights_of(fixture: Fixture, field: str = "weights") -> dict[str, Tensor]:
    """The weight file a fixture names, or the one called as it is with _io made _weights."""
    name = fixture.meta.get(field)
    if name is None:
        name = re.sub(r"(_io)?$", "_weights", fixture.stem, count=1) + ".safetensors"
    return _tensors(fixture.folder / name)


def model_of(weights: dict[str, Tensor], cfg: ScopeConfig,
             dtype: torch.dtype = torch.float32) -> ScopeDiT:
    """The network with these weights, loaded strictly."""
    with torch.device("meta"):
        model = ScopeDiT(cfg)
    return load_into(model, weights, dtype=dtype).eval()


def config_of(fixture: Fixture, weights: dict[str, Tensor], text_len: int) -> ScopeConfig:
    """The JSON's config; without action tensors in the file, a plain Wan network."""
    cfg = ScopeConfig.from_dict(fixture.get("config"))
    if not any(".action_attn." in name for name in weights):
        cfg = replace(cfg, action=None)
    return replace(cfg, wan=replace(cfg.wan, text_len=text_len))


def weights(fixture: Fixture) -> Iterator[Check]:
    """A state dict: it loads strictly, and our network has its tensors and parameters."""
    held = fixture.tensors
    model = model_of(held, config_of(fixture, held, 1))
    seen = ScopeConfig.from_shapes({k: tuple(v.shape) for k, v in held.items()},
                                   fixture.get("config"))
    again = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    with torch.device("meta"):
        if {k: tuple(v.shape) for k, v in ScopeDiT(seen).state_dict().items()} != again:
            raise FixtureError("sizes read off the tensors give another network")
    got = [len(again), sum(p.numel() for p in model.parameters())]
    want = [fixture.get("n_tensors"), fixture.get("n_params")]
    yield Check("tensors, parameters", torch.tensor(got), torch.tensor(want), (0.0, 0.0))


# --------------------------------------------------------------------------- schedule, actions


def scheduler(fixture: Fixture) -> Iterator[Check]:
    """Noise levels and timesteps for the settings that each tensor's name tells."""
    for name, want in fixture.tensors.items():
        found = re.fullmatch(r"(sigmas|timesteps)(_bf16)?\.steps(\d+)\.shift(\d+(?:\.\d+)?)"
                             r"(?:\.strength(\d+(?:\.\d+)?))?", name)
        if not found:
            raise FixtureError(f"tensor without a rule: {name}")
        table = Euler(int(found[3]), shift=float(found[4]), strength=float(found[5] or 1))
        got = table.sigmas_S if found[1] == "sigmas" else table.timesteps_S
        # float32 carries 7 digits: 1e-6 of 1, 1e-3 of 1000 would hide a wrong step
        limit = (0.0, 0.0) if found[2] else (1e-6, 1e-6)
        yield Check(name, got.bfloat16() if found[2] else got, want, limit)


def actions(fixture: Fixture) -> Iterator[Check]:
    """Rows of the parquet file beside the JSON, padded or cut to the clip."""
    pad = read_parquet(fixture.folder / fixture.meta.get("parquet", f"{fixture.stem}.parquet"))
    for name, want in fixture.tensors.items():
        found = re.fullmatch(r"out\.(keyboard|mouse)(_\w+)?", name)
        if not found:
            raise FixtureError(f"tensor without a rule: {name}")
        rows = pad.fit(int(fixture.get(f"frames{found[2] or ''}")), pad=True)
        got = torch.from_numpy(rows.buttons_N6 if found[1] == "keyboard" else rows.sticks_N4)
        yield Check(name, got[None].to(want.dtype), want, (0.0, 0.0))


# --------------------------------------------------------------------------- text, pictures


def t5(fixture: Fixture) -> Iterator[Check]:
    """The text encoder on token ids; past a prompt's end only the zeroed output counts."""
    known(fixture, "out.raw", "out.zeroed")
    encoder = TextEncoder.load(weights_of(fixture), dtype=fixture["out.zeroed"].dtype)
    ids, mask = fixture["in.ids"], fixture["in.mask"]
    if "out.raw" in fixture:
        inside = mask.bool()
        yield against(fixture, "out.raw", encoder.raw(ids, mask)[inside],
                      fixture["out.raw"][inside], BF16_CODEC)
    yield against(fixture, "out.zeroed", encoder.encode(ids, mask), passes=BF16_CODEC)


def vae(fixture: Fixture) -> Iterator[Check]:
    """Encode and decode, whole and frame by frame."""
    known(fixture, "out.latent", "out.latent_first_frame", "out.video_unclamped", "out.video")
    outputs = [v for n, v in fixture.tensors.items() if n.startswith("out.")]
    model = WanVAE.load(weights_of(fixture), dtype=outputs[0].dtype if outputs else None,
                        mean=fixture.meta.get("latent_mean", MEAN),
                        std=fixture.meta.get("latent_std", STD))
    for name, frames in (("out.latent", None), ("out.latent_first_frame", 1)):
        if name in fixture:
            video = fixture["in.video"][:, :, :frames]
            yield against(fixture, name, model.encode(video), passes=BF16_CODEC)
    if "in.latent" in fixture:
        whole, state, pieces = model.decode(fixture["in.latent"]), None, []
        for frame in fixture["in.latent"].split(1, 2):
            piece, state = model.decode_next(frame, state)
            pieces.append(piece)
        yield Check("frame by frame", torch.cat(pieces, 2), whole, (0.0, 0.0))
        for name, got in (("out.video_unclamped", whole), ("out.video", whole.clamp(-1, 1))):
            if name in fixture:
                yield against(fixture, name, got, passes=BF16_CODEC)
    elif "out.video_unclamped" in fixture or "out.video" in fixture:
        raise FixtureError("video without in.latent")


# --------------------------------------------------------------------------- sampler


def _contexts(fixture: Fixture) -> dict[str, Tensor]:
    """Contexts from token ids where the fixture has ids and encoder, else as it gives them."""
    names = {"in.context_pos": "prompt_token_ids", "in.context_neg": "negative_token_ids"}
    if "t5_weights" not in fixture.meta:
        return {n: fixture[n] for n in names if n in fixture}
    encoder = TextEncoder.load(weights_of(fixture, "t5_weights"), dtype=torch.float32)
    found, length = {}, int(fixture.get("context_length"))
    for name, field in names.items():
        if field in fixture.meta:
            ids = torch.tensor([fixture.get(field)])
            pad = (0, length - ids.shape[1])
            mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
            found[name] = encoder.encode(torch.nn.functional.pad(ids, pad), mask)
        elif name in fixture:
            found[name] = fixture[name]
    return found


def denoise(fixture: Fixture) -> Iterator[Check]:
    """Image, prompt and actions to latents and frames, with every step in between."""
    contexts = _contexts(fixture)
    for name, context in contexts.items():
        if name in fixture:
            yield against(fixture, name, context)
    held, dtype = weights_of(fixture, "dit_weights"), fixture["out.latents"].dtype
    cfg = _sampled_config(fixture, held, contexts["in.context_pos"].shape[1])
    model = model_of(held, cfg, dtype)
    codec = WanVAE.load(weights_of(fixture, "vae_weights"), dtype=dtype,
                        mean=fixture.meta.get("latent_mean", MEAN),
                        std=fixture.meta.get("latent_std", STD))
    size = ClipSize(*(int(fixture.get(n)) for n in ("height", "width", "num_frames")))
    sampler = Sampler(steps=int(fixture.get("steps")), shift=float(fixture.get("shift")),
                      guidance=float(fixture.get("cfg_scale")), timestep_dtype=dtype,
                      strength=float(fixture.meta.get("denoising_strength", 1)))
    seen: dict[str, Tensor] = {}

    def flows(step: int, positive: Tensor, negative: Tensor | None) -> None:
        seen[f"mid.v_pos_step{step}"] = positive
        if negative is not None:
            seen[f"mid.v_neg_step{step}"] = negative

    def watch(done: int, x: Tensor) -> None:
        seen[f"mid.latents_before_step{done}"] = x.clone()

    image = fixture["in.image"].numpy() if "in.image" in fixture else None
    rows = [fixture[n] if n in fixture else None for n in ("in.mouse", "in.keyboard")]
    seed = int(fixture.get("seed"))
    latents = make_latents(
        model, codec, Prompt(contexts["in.context_pos"], contexts.get("in.context_neg")), size,
        image_HWC=image, mouse_BNJ=rows[0], keyboard_BNK=rows[1], seed=seed, sampler=sampler,
        watch=watch, flows=flows)
    table = sampler.schedule()
    seen |= {"mid.timesteps": table.timesteps_S, "mid.sigmas": table.sigmas_S,
             "out.latents": latents, "in.noise": draw_noise(tuple(latents.shape), seed)}
    if image is not None:
        seen["mid.first_frame_latent"] = latents[:, :, :1]
    # guidance carries the error of a pass on, up to so many times
    passes = max(1.0, 2 * sampler.guidance - 1)
    for name in fixture.tensors:
        if name in seen:
            yield against(fixture, name, seen[name].to(fixture[name].dtype), passes=passes)
        elif name.startswith(("mid.", "out.")) and name != "out.frames_uint8":
            raise FixtureError(f"tensor without a rule: {name}")
    if "out.frames_uint8" in fixture:
        frames, want = to_uint8(codec.decode(latents)), fixture["out.frames_uint8"]
        if want.ndim == 4:  # (T, H, W, 3) of a single clip
            frames = frames[0]
        if dtype is torch.bfloat16 and frames.shape == want.shape:
            yield against(fixture, "out.frames_uint8", frames, want.bfloat16(), passes)
        else:
            yield Check("out.frames_uint8", frames, want, (1.0, 0.0))


def _sampled_config(fixture: Fixture, held: dict[str, Tensor], text_len: int) -> ScopeConfig:
    """Config of the sampler's network: here, or in the JSON beside its weights."""
    if "config" in fixture.meta:
        return config_of(fixture, held, text_len)
    import json

    path = (fixture.folder / fixture.get("dit_weights")).with_suffix(".json")
    if not path.is_file():
        raise FixtureError(f"no config here and no {path.name}")
    meta = json.loads(path.read_text())
    return config_of(Fixture(Path(fixture.folder), path.stem, meta), held, text_len)


KINDS = {
    "scope.actions": actions,
    "scope.denoise": denoise,
    "scope.scheduler": scheduler,
    "scope.t5": t5,
    "scope.vae": vae,
    "scope.weights": weights,
}
