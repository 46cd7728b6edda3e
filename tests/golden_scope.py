"""Golden kinds of SCOPE: network, schedule, actions, autoencoder, text encoder, whole sampler.

Shapes: B slot, F latent frame, L token, D width, S tokens per frame. Weights are stored in
bfloat16 with exact values and run in float32.
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
from worldgym.models.action_module import windows
from worldgym.models.scope import ScopeConfig, ScopeDiT, frame_times
from worldgym.models.umt5 import TextEncoder
from worldgym.models.wan_vae import MEAN, STD, WanVAE, to_uint8
from worldgym.rope import rotate
from worldgym.schedule import Euler

BF16_BOUND = 0.02  # relative RMS; the spec's bound (section 14)


def tolerance(fixture: Fixture) -> tuple[float, float]:
    """(atol, rtol); where the JSON tells it in words, the first such number in them."""
    words = fixture.meta.get("tolerance")
    if not isinstance(words, str):
        return fixture.tolerance()
    numbers = re.findall(r"\d+(?:\.\d+)?[eE]-\d+", words) or re.findall(r"\b0\.\d+", words)
    return (float(numbers[0]) if numbers else DEFAULT_ATOL), 0.0


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


# --------------------------------------------------------------------------- network


USES = {"full": ("mouse", "keyboard"), "scalar_timestep": ("mouse", "keyboard"),
        "mouse_only": ("mouse",), "keyboard_only": ("keyboard",), "no_action": ()}


class Case:
    """One output of a fixture: inputs, how they are used, and the run."""

    def __init__(self, fixture: Fixture, name: str) -> None:
        found = re.fullmatch(r"out(\d*)\.([a-z_]+?)(_bf16)?", name)
        if not found or found[2] not in USES:
            raise FixtureError(f"output without a rule: {name}")
        self.inputs, self.use = f"in{found[1]}.", found[2]
        self.dtype = torch.bfloat16 if found[3] else torch.float32
        self.fixture = fixture

    def tensor(self, name: str) -> Tensor:
        own = self.inputs + name
        return self.fixture[own if own in self.fixture else "in." + name]

    def actions(self) -> dict[str, Tensor | None]:
        """Rows of each path; a path the inputs have no rows for is skipped."""
        prefix = self.inputs if self.inputs + "latents" in self.fixture else "in."
        names = {path: prefix + path for path in USES[self.use]}
        rows = {path: self.fixture[n] for path, n in names.items() if n in self.fixture}
        return {"mouse": rows.get("mouse"), "keyboard": rows.get("keyboard")}

    def times(self, batch: int, frames: int) -> Tensor:
        t = self.tensor("timestep").to(self.dtype).reshape(-1)[:batch]
        return frame_times(t, batch, frames, self.use != "scalar_timestep")

    def run(self, model: ScopeDiT) -> Tensor:
        x, context = (self.tensor(n).to(self.dtype) for n in ("latents", "context"))
        rows = {k: v if v is None else v.to(self.dtype) for k, v in self.actions().items()}
        controls = model.controls(rows["mouse"], rows["keyboard"], x.shape[2])
        return model(x, self.times(len(x), x.shape[2]), context.expand(len(x), -1, -1),
                     controls=controls)


def dit(fixture: Fixture) -> Iterator[Check]:
    """Every output of the network, and every stage of its blocks for ``out.full``."""
    limit, weights = tolerance(fixture), weights_of(fixture)
    cfg = config_of(fixture, weights, fixture["in.context"].shape[1])
    special = ("out.timestep_bf16", "out.sinusoid_bf16")
    cases = {n: Case(fixture, n) for n in fixture.tensors
             if re.match(r"out\d*\.", n) and n not in special}
    for dtype in (torch.float32, torch.bfloat16):
        mine = {n: c for n, c in cases.items() if c.dtype is dtype}
        if not mine:
            continue
        model = model_of(weights, cfg, dtype)
        stages = Stages(model, fixture) if dtype is torch.float32 else None
        for name, case in mine.items():
            watch = stages is not None and name == "out.full"
            if watch:
                stages.listen()
            got, want = case.run(model), fixture[name]
            if watch:
                yield from stages.checks(case, limit)
            if dtype is torch.float32:
                yield Check(name, got, want, limit)
            else:
                yield _relative(name, got, want)
    if special[0] in fixture:
        t = fixture["in.timestep"].bfloat16()
        yield Check(special[0], t, fixture[special[0]], (0.0, 0.0))
        if special[1] in fixture:
            wave = _sinusoid(model_of(weights, cfg, torch.bfloat16), t)
            yield Check(special[1], wave, fixture[special[1]], (0.0, 0.0))


def _relative(name: str, got: Tensor, want: Tensor) -> Check:
    """Relative RMS error of a bfloat16 run, as one number against 0."""
    if got.shape != want.shape:
        return Check(name, got, want)
    got, want = got.double(), want.double()
    rms = ((got - want).norm() / want.norm()).reshape(1)
    return Check(f"{name} (relative RMS)", rms, torch.zeros(1), (BF16_BOUND, 0.0))


def _sinusoid(model: ScopeDiT, t: Tensor) -> Tensor:
    """What the time embedding receives for these timesteps."""
    seen: list[Tensor] = []
    hook = model.time_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.time(t[:, None])
    hook.remove()
    return seen[0][:len(t)]


class Stages:
    """Hooks on the modules of a network, and its inner tensors in the reference's layout."""

    def __init__(self, model: ScopeDiT, fixture: Fixture) -> None:
        self.model, self.fixture = model, fixture
        self.into: dict[str, Tensor] = {}
        self.out: dict[str, Tensor] = {}
        # products over the actions are done slot by slot, on rows padded to MIN_ROWS
        self.every_in: dict[str, list[Tensor]] = {}
        self.every_out: dict[str, list[Tensor]] = {}
        self.hooks: list = []

    def listen(self) -> None:
        for name, module in self.model.named_modules():
            def keep(_module: object, args: tuple, out: object, name: str = name) -> None:
                if args and isinstance(args[0], Tensor):
                    self.into[name] = args[0]
                    self.every_in.setdefault(name, []).append(args[0])
                if isinstance(out, Tensor):
                    self.out[name] = out
                    self.every_out.setdefault(name, []).append(out)
            self.hooks.append(module.register_forward_hook(keep))

    def checks(self, case: Case, limit: tuple[float, float]) -> Iterator[Check]:
        for hook in self.hooks:
            hook.remove()
        x = case.tensor("latents")
        frames, patch = x.shape[2], self.model.cfg.patch_size
        self.frames, self.grid = frames, (x.shape[3] // patch[1], x.shape[4] // patch[2])
        rules = self._whole(case, x) | {
            k: v for i in range(len(self.model.blocks)) for k, v in self._block(i, case).items()}
        for name, rule in rules.items():
            if f"mid.{name}" in self.fixture:
                yield Check(f"mid.{name}", rule(), self.fixture[f"mid.{name}"], limit)

    def _whole(self, case: Case, x: Tensor) -> dict:
        model, last = self.model, self.frames - 1
        t_BF = case.times(1, self.frames)[:, [0, last]]
        e, m = model.time(t_BF)

        def turn(part: int) -> Tensor:
            table = model.table(torch.arange(self.frames)[None], self.grid)
            return table[part][0, :, 0, 1::2]  # sines: the odd entries carry the plain sign

        def turn1(part: int) -> Tensor:
            action = model.blocks[0].action_attn
            return action.table(self.frames, x.device, x.dtype)[part][0, :, 0, 1::2]

        return {
            "text_embedding": lambda: self.out["text_embedding"],
            "sinusoid": lambda: torch.cat([_sinusoid(model, t) for t in t_BF.unbind(1)]),
            "time_embedding": lambda: e[0], "time_projection": lambda: m[0],
            "rope3d_cos": lambda: turn(0), "rope3d_sin": lambda: turn(1),
            "rope1d_cos": lambda: turn1(0), "rope1d_sin": lambda: turn1(1),
        }

    def by_position(self, x_BTD: Tensor) -> Tensor:
        """(B, F * S, D) as the reference's (B * S, F, D)."""
        return x_BTD.unflatten(1, (self.frames, -1)).transpose(1, 2).flatten(0, 1)

    def _turned(self, x_BTD: Tensor, heads: int, table: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(x_BTD.unflatten(-1, (heads, -1)), table).flatten(2)

    def _block(self, i: int, case: Case) -> dict:
        block, out, into = f"blocks.{i}", self.out, self.into
        action, cfg = f"{block}.action_attn", self.model.action
        heads = self.model.cfg.num_heads
        rows = case.actions()

        def table() -> tuple[Tensor, Tensor]:
            return self.model.table(torch.arange(self.frames)[None], self.grid)

        def module():
            return self.model.blocks[i].action_attn

        def table1() -> tuple[Tensor, Tensor]:
            tokens = self.grid[0] * self.grid[1]
            return tuple(x.repeat_interleave(tokens, 1) for x in module().table(
                self.frames, torch.device("cpu"), torch.float32))

        def stick(part: str) -> Tensor:
            return self.by_position(self._turned(
                out[f"{action}.mouse_attn.norm_{part}"], module().heads, table1()))

        def buttons(name: str) -> Tensor:
            return out[f"{action}.{name}"]

        def slots_of(kept: dict, name: str, count: int) -> Tensor:
            return torch.stack([x[:count] for x in kept[f"{action}.{name}"]])

        def frames_of(kept: dict, name: str) -> Tensor:
            return slots_of(kept, name, self.frames)

        def embedded() -> Tensor:
            return slots_of(self.every_out, "keyboard_embed", rows["keyboard"].shape[1])

        b = f"b{i}."
        return {
            f"block{i}.in": lambda: into[block], f"block{i}.out": lambda: out[block],
            f"block{i}": lambda: out[block],
            b + "self_q_roped": lambda: self._turned(
                out[f"{block}.self_attn.norm_q"], heads, table()),
            b + "self_k_roped": lambda: self._turned(
                out[f"{block}.self_attn.norm_k"], heads, table()),
            b + "self_v": lambda: out[f"{block}.self_attn.v"],
            b + "self_attn.in": lambda: into[f"{block}.self_attn.q"],
            b + "self_attn.out": lambda: out[f"{block}.self_attn.o"],
            b + "after_self_attn": lambda: into[f"{block}.norm3"],
            b + "cross_attn.in": lambda: out[f"{block}.norm3"],
            b + "cross_attn.out": lambda: out[f"{block}.cross_attn.o"],
            b + "action.in": lambda: into[action], b + "action.out": lambda: out[action],
            b + "mouse_window": lambda: windows(
                rows["mouse"], self.frames, cfg.ratio, cfg.rows)[0],
            b + "mouse_mlp.out": lambda: self.by_position(out[f"{action}.mouse_mlp.3"]),
            b + "mouse_q_roped": lambda: stick("q"), b + "mouse_k_roped": lambda: stick("k"),
            b + "mouse_v": lambda: self.by_position(out[f"{action}.mouse_attn.v"]),
            b + "mouse_sdpa": lambda: self.by_position(into[f"{action}.mouse_attn.o"]),
            b + "mouse_attn": lambda: self.by_position(out[f"{action}.mouse_attn.o"]),
            b + "after_mouse_path": lambda: self.by_position(into[f"{action}.keyboard_q_proj"]),
            b + "keyboard_embed": embedded,
            b + "keyboard_q_proj.out": lambda: self.by_position(buttons("keyboard_q_proj")),
            b + "key_q_normed": lambda: self.by_position(buttons("key_attn_q_norm")),
            b + "keyboard_kv_proj.in": lambda: frames_of(self.every_in, "keyboard_kv_proj"),
            b + "keyboard_kv_proj.out": lambda: frames_of(self.every_out, "keyboard_kv_proj"),
            b + "key_k_normed": lambda: buttons("key_attn_k_norm"),
            b + "keyboard_o_proj.in": lambda: self.by_position(into[f"{action}.keyboard_o_proj"]),
            b + "keyboard_o_proj.out": lambda: self.by_position(buttons("keyboard_o_proj")),
            b + "ffn.in": lambda: into[f"{block}.ffn"], b + "ffn.out": lambda: out[f"{block}.ffn"],
        }


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
    limit = tolerance(fixture)
    encoder = TextEncoder.load(weights_of(fixture), dtype=torch.float32)
    ids, mask = fixture["in.ids"], fixture["in.mask"]
    if "out.raw" in fixture:
        inside = mask.bool()
        yield Check("out.raw", encoder.raw(ids, mask)[inside], fixture["out.raw"][inside], limit)
    yield Check("out.zeroed", encoder.encode(ids, mask), fixture["out.zeroed"], limit)


def vae(fixture: Fixture) -> Iterator[Check]:
    """Encode and decode, whole and frame by frame."""
    limit = tolerance(fixture)
    model = WanVAE.load(weights_of(fixture), dtype=torch.float32,
                        mean=fixture.meta.get("latent_mean", MEAN),
                        std=fixture.meta.get("latent_std", STD))
    if "in.video" in fixture:
        video = fixture["in.video"]
        if "out.latent" in fixture:
            yield Check("out.latent", model.encode(video), fixture["out.latent"], limit)
        if "out.latent_first_frame" in fixture:
            yield Check("out.latent_first_frame", model.encode(video[:, :, :1]),
                        fixture["out.latent_first_frame"], limit)
    if "in.latent" in fixture:
        whole, state, pieces = model.decode(fixture["in.latent"]), None, []
        for frame in fixture["in.latent"].split(1, 2):
            piece, state = model.decode_next(frame, state)
            pieces.append(piece)
        yield Check("frame by frame", torch.cat(pieces, 2), whole, (0.0, 0.0))
        yield Check("out.video_unclamped", whole, fixture["out.video_unclamped"], limit)


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
    limit, contexts = tolerance(fixture), _contexts(fixture)
    for name, context in contexts.items():
        if name in fixture:
            yield Check(name, context, fixture[name], limit)
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
    for name in fixture.tensors:
        if name in seen:
            yield Check(name, seen[name], fixture[name], limit)
        elif name.startswith(("mid.", "out.")) and name != "out.frames_uint8":
            raise FixtureError(f"tensor without a rule: {name}")
    if "out.frames_uint8" in fixture:
        frames = to_uint8(codec.decode(latents))[0]
        yield Check("out.frames_uint8", frames, fixture["out.frames_uint8"], (1.0, 0.0))


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
    "scope.dit": dit,
    "scope.scheduler": scheduler,
    "scope.t5": t5,
    "scope.vae": vae,
    "scope.weights": weights,
}
