"""Golden kind of SCOPE's network: every output, and every stage of its blocks.

Shapes: B slot, F latent frame, L token, D width, S tokens per frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from golden import Check, Fixture, FixtureError
from golden_scope import against, config_of, model_of, tolerance, weights_of
from torch import Tensor

from worldgym.models.action_module import windows
from worldgym.models.scope import ScopeDiT, frame_times
from worldgym.rope import rotate

USES = {"full": ("mouse", "keyboard"), "scalar_timestep": ("mouse", "keyboard"),
        "mouse_only": ("mouse",), "keyboard_only": ("keyboard",), "no_action": ()}


class Case:
    """One output of a fixture: inputs, how they are used, and the run."""

    def __init__(self, fixture: Fixture, name: str) -> None:
        found = re.fullmatch(r"out(\d*)\.([a-z_]+?)(_bf16)?", name)
        if not found or found[2] not in USES:
            raise FixtureError(f"output without a rule: {name}")
        self.inputs, self.use = f"in{found[1]}.", found[2]
        bf16 = found[3] or fixture[name].dtype is torch.bfloat16
        self.dtype = torch.bfloat16 if bf16 else torch.float32
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
            got = case.run(model)
            if watch:
                yield from stages.checks(case, limit)
            yield against(fixture, name, got)
    if special[0] in fixture:
        t = fixture["in.timestep"].bfloat16()
        yield Check(special[0], t, fixture[special[0]], (0.0, 0.0))
        if special[1] in fixture:
            wave = _sinusoid(model_of(weights, cfg, torch.bfloat16), t)
            yield Check(special[1], wave, fixture[special[1]], (0.0, 0.0))


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


KINDS = {"scope.dit": dit}
