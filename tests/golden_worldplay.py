"""Golden kinds of WorldPlay: both networks, cameras, retrieval, poses, whole rollouts, decoding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from golden import Check, Fixture, FixtureError, _tensors
from torch import Tensor

from worldgym import camera
from worldgym.checkpoint import load_into
from worldgym.models.hunyuan import HunyuanConfig, HunyuanDiT
from worldgym.models.prope import Cameras
from worldgym.models.wan import WanConfig
from worldgym.models.wan_vae import WanVAE
from worldgym.models.worldplay import Context, WorldPlayDiT, config_of
from worldgym.models.worldplay_names import native_name
from worldgym.models.worldplay_rollout import ChunkStepper, Moves, start_image
from worldgym.reconstituted import History, Reconstituted
from worldgym.schedule import Euler

EXACT = (0.0, 0.0)


def sizes(fixture: Fixture, text_len: int) -> WanConfig:
    """The fixture's sizes under native names."""
    given = dict(fixture.get("config"))
    given["num_heads"] = given.pop("heads")
    given["attention_head_dim"] = given.pop("head_dim")
    return config_of({**given, "text_len": text_len})


def weights(fixture: Fixture) -> dict[str, Tensor]:
    """``sd.*`` of this fixture, or of the file its field state_dict names in whatever words."""
    held = fixture.tensors
    other = re.search(r"[\w.-]+\.safetensors", str(fixture.meta.get("state_dict", "")))
    if other:
        held = _tensors(fixture.folder / other[0])
    found = {k[3:]: v for k, v in held.items() if k.startswith("sd.")}
    if not found:
        raise FixtureError(f"no tensor sd.* for {fixture.stem}")
    return found


def network(fixture: Fixture, text_len: int) -> WorldPlayDiT:
    """The network with the fixture's weights, loaded strictly."""
    with torch.device("meta"):
        model = WorldPlayDiT(sizes(fixture, text_len))
    return load_into(model, weights(fixture), rename=native_name).eval()


def given(fixture: Fixture, prefix: str = "in.") -> dict[str, Any]:
    """Arguments of a forward: latents, timesteps, labels and cameras.

    The published code has one timestep per frame of the one clip; more clips share these, or have
    their own one after the other.
    """
    x, t = fixture[prefix + "hidden_states"], fixture[prefix + "timestep"]
    b, f = len(x), x.shape[2]
    return {"x_BCFHW": x, "t": t.reshape(-1, f).expand(b, f), "labels_BF": fixture[
        prefix + "action"], "cameras": Cameras(fixture[prefix + "viewmats"],
                                               fixture.tensors.get(prefix + "Ks"))}


def _table(cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Our rotation table as plain cosines and sines, repeated per pair."""
    cos, sin = (x[0, :, 0] for x in cos_sin)
    return cos, sin[:, 1::2].repeat_interleave(2, -1)


def dit_first_chunk(fixture: Fixture) -> Iterator[Check]:
    """One forward without context, with every intermediate tensor."""
    text, start = fixture["in.text"], int(fixture.meta.get("rope_start_frame", 0))
    model, arguments = network(fixture, text.shape[1]), given(fixture)
    frames, (height, width) = arguments["x_BCFHW"].shape[2], arguments["x_BCFHW"].shape[3:]
    index = start + torch.arange(frames)
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        def keep(_: Any, __: Any, out: Tensor, name: str) -> None:
            seen[name] = out if name not in seen else seen[name] + out

        for name, module in ((f"mid.block{i}", block), (f"mid.block{i}.attn1", block.self_attn.o),
                             (f"mid.block{i}.attn1", block.self_attn.o_camera),
                             (f"mid.block{i}.attn2", block.cross_attn.o)):
            module.register_forward_hook(
                lambda m, a, out, name=name, keep=keep: keep(m, a, out, name))
    seen["out.velocity"] = model(**arguments, context_BLD=text.expand(len(arguments["t"]), -1, -1),
                                 frame_index_BF=index)
    e, modulation = model.time(arguments["t"], model.actions(arguments["labels_BF"]))
    seen |= {"mid.temb": e.flatten(0, 1), "mid.time_proj": modulation.flatten(0, 1).flatten(1),
             "mid.text": model.text_embedding(text)}
    labels = torch.arange(81)[None]
    seen |= {"mid.label_sinusoid_0_80": model.wave(labels),
             "mid.label_embed_0_80": model.actions(labels)[0]}
    patch = model.cfg.patch_size
    cos, sin = _table(model.table(index[None], (height // patch[1], width // patch[2])))
    seen |= {"mid.rope_cos": cos[None, None], "mid.rope_sin": sin[None, None]}
    yield from compare(fixture, seen)


def compare(fixture: Fixture, seen: dict[str, Tensor]) -> Iterator[Check]:
    """A check for every mid.* and out.* of the fixture.

    Leading axes of one clip count as none: some tensors have them, some do not.
    """
    for name, want in fixture.tensors.items():
        if not name.startswith(("mid.", "out.")):
            continue
        if name not in seen:
            raise FixtureError(f"tensor without a rule: {name}")
        got = seen[name]
        while got.ndim > want.ndim and got.shape[0] == 1:
            got = got[0]
        yield Check(name, got[(None,) * (want.ndim - got.ndim)], want)


def joined(context: Context, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values as the fixtures hold them: (1, heads, tokens, position | camera)."""
    (k, v), (kc, vc) = context.position[layer], context.camera[layer]
    return tuple(torch.cat(pair, -1).transpose(1, 2)  # type: ignore[return-value]
                 for pair in ((k, kc), (v, vc)))


def dit_cached_chunk(fixture: Fixture) -> Iterator[Check]:
    """The context pass, then a chunk with and without what it left."""
    text = fixture["in.text"]
    model, past, now = network(fixture, text.shape[1]), given(fixture, "in.ctx."), given(fixture)
    times = past["t"]
    seen: dict[str, Tensor] = {}
    place = ["mid.ctx.block"]
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda m, a, out, i=i: seen.__setitem__(f"{place[0]}{i}", out))
    context = model.context(**past, context_BLD=text)
    place[0] = "mid.block"
    index = int(fixture.get("rope_start_frame")) + torch.arange(now["x_BCFHW"].shape[2])
    seen["out.velocity"] = model(**now, context_BLD=text, frame_index_BF=index, context=context)
    seen["out.velocity_without_cache"] = model(**now, context_BLD=text, frame_index_BF=index)
    for name, t, frames in (("mid.ctx.temb", times, past), ("mid.temb", now["t"], now)):
        seen[name] = model.time(t, model.actions(frames["labels_BF"]))[0].flatten(0, 1)
    for i in range(len(model.blocks)):
        seen[f"out.cache{i}.k"], seen[f"out.cache{i}.v"] = joined(context, i)
    yield from compare(fixture, seen)


def prope_attention(fixture: Fixture) -> Iterator[Check]:
    """Attention among cameras, without intrinsics, with a context, in a moved world."""
    from worldgym.attention import attention

    q, k, v = (fixture[f"in.{n}"].transpose(1, 2) for n in "qkv")
    K = fixture.tensors.get("in.Ks")
    cameras = Cameras(fixture["in.viewmats"], K)

    def run(cameras: Cameras, old: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        see = cameras.projection(q)
        inside = {"mid.q": see.query(q), "mid.k": see.key(k), "mid.v": see.key(v)}
        keys, values = inside["mid.k"], inside["mid.v"]
        if old is not None:
            keys, values = torch.cat([old[0], keys], 1), torch.cat([old[1], values], 1)
        inside["mid.attn"] = attention(inside["mid.q"], keys, values)
        return {**inside, "out": see.out(inside["mid.attn"])}

    plain = run(cameras)
    seen = {n: x for n, x in plain.items() if n != "out"} | {"out.prope": plain["out"]}
    seen["out.no_intrinsics"] = run(Cameras(fixture["in.viewmats"]))["out"]
    if "in.ctx.viewmats" in fixture:
        past = Cameras(fixture["in.ctx.viewmats"], fixture.tensors.get("in.ctx.Ks")).projection(q)
        old = tuple(past.key(fixture[f"in.ctx.{n}"].transpose(1, 2)) for n in "kv")
        seen |= {"mid.ctx.k": old[0], "mid.ctx.v": old[1],
                 "out.prope_with_ctx": run(cameras, old)["out"]}  # type: ignore[arg-type]
    yield from compare(fixture, {n: x.transpose(1, 2) for n, x in seen.items()})
    if "in.world_transform" not in fixture:
        return
    moved = Cameras(fixture["in.viewmats"] @ fixture["in.world_transform"], K)
    yield Check("in a moved world", run(moved)["out"].transpose(1, 2), fixture["out.prope"])


def hunyuan_cached_chunk(fixture: Fixture) -> Iterator[Check]:
    """Text pass, context pass, a chunk with both, and a first chunk with the text alone."""
    held = weights(fixture)
    cfg = HunyuanConfig.from_shapes({k: tuple(v.shape) for k, v in held.items()},
                                    fixture.get("config"))
    with torch.device("meta"):
        model = HunyuanDiT(cfg)
    model = load_into(model, held).eval()
    text = model.text(model.tokens(fixture["in.text_states"], fixture["in.text_mask"],
                                   fixture.tensors.get("in.vision_states")))
    past, now = given(fixture, "in.ctx."), given(fixture)
    context = model.context(**past, text_kv=text)
    n, frames = int(fixture.get("n_ctx")), now["x_BCFHW"].shape[2]
    seen = {"out.velocity": model(**now, text_kv=text, context=context,
                                  frame_index_BF=n + torch.arange(frames)),
            "out.velocity_chunk0": model(**now, text_kv=text)}
    for i, (k, v) in enumerate(text):
        both = torch.cat([torch.stack(x) for x in (context.position[i], context.camera[i])], 1)
        for name, plain, pair in (("k", k, both[0]), ("v", v, both[1])):
            seen[f"out.cache{i}.{name}_txt"] = plain.transpose(1, 2)
            seen[f"out.cache{i}.{name}_vision"] = pair.transpose(1, 2)
    grid = tuple(fixture.get("latent_hw"))
    cos, sin = _table(model.table(torch.arange(n + frames)[None], grid))  # type: ignore[arg-type]
    yield from compare(fixture, {**seen, "mid.rope_cos": cos, "mid.rope_sin": sin})
    for shift, want in fixture.meta.get("few_step_schedules", {}).items():
        table = Euler(len(want["timesteps"]), shift=float(shift))
        sigmas = torch.cat([table.sigmas_S, torch.zeros(1)])
        yield Check(f"sigmas {shift}", sigmas, torch.tensor(want["sigmas"]), (1e-6, 0.0))
        yield Check(f"times {shift}", table.timesteps_S, torch.tensor(want["timesteps"]),
                    (0.0, 1e-6))


# --------------------------------------------------------------------------- whole rollouts


def _codec(fixture: Fixture, stem: str) -> WanVAE:
    meta = json.loads((fixture.folder / f"{stem}.json").read_text())
    held = _tensors(fixture.folder / f"{stem}.safetensors")
    return WanVAE.load({k[3:]: v for k, v in held.items() if k.startswith("sd.")},
                       sizes=meta["config"], mean=meta["config"]["latents_mean"],
                       std=meta["config"]["latents_std"])


def _unit(video_BCTHW: Tensor) -> Tensor:
    """Frames (B, T, H, W, 3) in [0, 1]."""
    return (video_BCTHW.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 4, 1)


def rollout(fixture: Fixture) -> Iterator[Check]:
    """Chunk after chunk: choices and labels exactly, latents within 1e-4, every network call."""
    text, steps = fixture["in.text"], fixture.get("timesteps")
    switch = fixture.meta.get("prompt_switch_chunk")
    dit, limit = network(fixture, text.shape[1]), (1e-4, 0.0)
    memory = Reconstituted(points_M3=fixture["in.points"].numpy())
    stepper = ChunkStepper(dit, memory, Euler.at(steps), float(fixture.get("context_timestep")))
    n = memory.chunk
    c2w = camera.walk(camera.motions(fixture.get("motions")))
    yield Check("in.c2w", torch.from_numpy(c2w), fixture["in.c2w"], (1e-12, 0.0))
    labels, w2c = camera.labels_of(c2w), fixture["in.viewmats"]
    frames = len(w2c)
    yield Check("labels", torch.from_numpy(labels[:frames]), fixture["in.action"], EXACT)
    yield Check("in.viewmats", torch.from_numpy(camera.inverse(c2w[:frames])), w2c, (1e-12, 0.0))
    calls: list[dict[str, Any]] = []
    chunk = [0]

    def note(_: Any, a: tuple[Any, ...], given: dict[str, Any]) -> None:
        index = given.get("frame_index_BF", torch.arange(a[0].shape[2]))
        calls.append({"chunk": chunk[0], "is_cache": given.get("record") is not None,
                      "latents": a[0].shape[2], "timestep": a[1][0].tolist(),
                      "rope_frame_start": int(index[0]), "rope_frame_end": int(index[-1]) + 1})

    dit.register_forward_pre_hook(note, with_kwargs=True)
    b = len(fixture["in.noise_latents"])
    histories, made = [History.empty(n) for _ in range(b)], []
    for i in range(int(fixture.get("n_chunks"))):
        chunk[0] = i
        if i == switch:
            text = fixture["in.text_after_switch"]
            dit.cfg = replace(dit.cfg, text_len=text.shape[1])  # no padding in the fixtures
        part = slice(n * i, n * i + n)
        moves = Moves(Cameras(w2c[part].expand(b, -1, -1, -1), fixture["in.Ks"][part].expand(
            b, -1, -1, -1)), labels[None, part].repeat(b, 0))
        first = fixture.tensors.get("in.first_image_condition") if i == 0 else None
        latents, histories, chosen = stepper.step(
            histories, fixture["in.noise_latents"][:, :, part], moves, text.expand(b, -1, -1),
            first)
        want = fixture.get("selected")[i] or []
        for found in chosen:
            yield Check(f"choice {i}", torch.tensor([len(found), *found.tolist()]),
                        torch.tensor([len(want), *want]), EXACT)
        yield Check(f"chunk {i}", latents, fixture[f"out.chunk{i}.latents"], limit)
        made.append(latents)
    told = fixture.meta.get("calls") or []
    for name in told[0] if told else ():
        if name not in calls[0]:
            raise FixtureError(f"field of a call without a rule: {name}")
        got, want = ([call[name] for call in some] for some in (calls, told))
        flat = [torch.tensor(x, dtype=torch.float64).flatten() for x in (sum(got, []) if
                name == "timestep" else got, sum(want, []) if name == "timestep" else want)]
        yield Check(f"calls: {name}", *flat, (1e-4, 0.0))
    if fixture.meta.get("vae"):
        yield from _pictures(fixture, made)


def _pictures(fixture: Fixture, made: list[Tensor]) -> Iterator[Check]:
    """Start image and decoded frames."""
    named = re.search(r"\w*vae\w*", str(fixture.get("vae")))
    if not named:
        raise FixtureError(f"no fixture of an autoencoder in {fixture.get('vae')!r}")
    codec = _codec(fixture, named[0])
    if "out.image_preprocessed" in fixture:
        want = fixture["out.image_preprocessed"]
        image = start_image(fixture["in.image_rgb_uint8"].numpy(), want.shape[1:])
        yield Check("out.image_preprocessed", image[0, :, 0], want)
    state = None
    for i, latents in enumerate(made):
        video, state = codec.decode_next(latents, state)
        count = fixture.get("frames_per_chunk")[i]
        yield Check(f"frames of chunk {i}", torch.tensor(video.shape[2]), torch.tensor(count),
                    EXACT)
        for name in [k for k in fixture.tensors if k.startswith(f"out.chunk{i}.frames_")]:
            index = [int(k) for k in name.partition("frames_")[2].split("_")]
            yield Check(name, _unit(video)[:, index], fixture[name])


def vae_stream(fixture: Fixture) -> Iterator[Check]:
    """Decoding latent by latent; encoding one picture."""
    codec = _codec(fixture, fixture.stem)
    state, pieces = None, []
    for latent in fixture["in.normalised_latents"].split(1, 2):
        piece, state = codec.decode_next(latent, state)
        pieces.append(piece.clamp(-1, 1))
    whole = codec.decode(fixture["in.normalised_latents"]).clamp(-1, 1)
    yield Check("all at once", torch.cat(pieces, 2), whole, EXACT)
    for name, want in fixture.tensors.items():
        found = re.fullmatch(r"out\.frames_per_latent(\d+)(?:_(first|last)(\d+))?", name)
        if found:
            some = int(found[3] or 0)
            part = {"first": slice(some), "last": slice(-some, None), None: slice(None)}[found[2]]
            yield Check(name, pieces[int(found[1])][:, :, part], want)
    if "in.image" not in fixture:
        return
    latent = codec.net.encode(fixture["in.image"]).latent_dist
    yield Check("out.posterior_mean", latent.mean, fixture["out.posterior_mean"])
    yield Check("out.posterior_logvar", latent.logvar, fixture["out.posterior_logvar"])
    yield Check("out.normalised_mean", codec.encode(fixture["in.image"]),
                fixture["out.normalised_mean"])


KINDS = {
    "worldplay.hunyuan_cached_chunk": hunyuan_cached_chunk,
    "worldplay.rollout": rollout,
    "worldplay.vae_stream": vae_stream,
    "worldplay.dit_cached_chunk": dit_cached_chunk,
    "worldplay.dit_first_chunk": dit_first_chunk,
    "worldplay.prope_attention": prope_attention,
}
