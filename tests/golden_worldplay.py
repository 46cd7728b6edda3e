"""Golden kinds of WorldPlay: both networks, cameras, retrieval, poses, whole rollouts, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from golden import Check, Fixture, FixtureError, _tensors
from torch import Tensor

from worldgym.checkpoint import load_into
from worldgym.models.prope import Cameras
from worldgym.models.wan import WanConfig
from worldgym.models.worldplay import Context, WorldPlayDiT, config_of
from worldgym.models.worldplay_names import native_name

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
    words = str(fixture.meta.get("state_dict", "")).split()
    other = [w for w in words if w.endswith(".safetensors")]
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
    """Arguments of a forward: latents, timesteps, labels and cameras."""
    return {"x_BCFHW": fixture[prefix + "hidden_states"], "t": fixture[prefix + "timestep"][None],
            "labels_BF": fixture[prefix + "action"],
            "cameras": Cameras(fixture[prefix + "viewmats"], fixture[prefix + "Ks"])}


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
    seen["out.velocity"] = model(**arguments, context_BLD=text, frame_index_BF=index)
    e, modulation = model.time(arguments["t"], model.actions(arguments["labels_BF"]))
    seen |= {"mid.temb": e[0], "mid.time_proj": modulation[0].flatten(1),
             "mid.text": model.text_embedding(text)}
    labels = torch.arange(81)[None]
    seen |= {"mid.label_sinusoid_0_80": model.wave(labels),
             "mid.label_embed_0_80": model.actions(labels)[0]}
    patch = model.cfg.patch_size
    cos, sin = _table(model.table(index[None], (height // patch[1], width // patch[2])))
    seen |= {"mid.rope_cos": cos[None, None], "mid.rope_sin": sin[None, None]}
    yield from compare(fixture, seen)


def compare(fixture: Fixture, seen: dict[str, Tensor]) -> Iterator[Check]:
    """A check for every mid.* and out.* of the fixture."""
    for name, want in fixture.tensors.items():
        if not name.startswith(("mid.", "out.")):
            continue
        if name not in seen:
            raise FixtureError(f"tensor without a rule: {name}")
        yield Check(name, seen[name], want)


def joined(context: Context, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values as the fixtures hold them: (1, heads, tokens, position | camera)."""
    (k, v), (kc, vc) = context.position[layer], context.camera[layer]
    return tuple(torch.cat(pair, -1).transpose(1, 2)  # type: ignore[return-value]
                 for pair in ((k, kc), (v, vc)))


def dit_cached_chunk(fixture: Fixture) -> Iterator[Check]:
    """The context pass, then a chunk with and without what it left."""
    text = fixture["in.text"]
    model, past, now = network(fixture, text.shape[1]), given(fixture, "in.ctx."), given(fixture)
    times = past.pop("t")
    if bool((times != times[0, 0]).any()):
        raise FixtureError("context frames have different timesteps")
    seen: dict[str, Tensor] = {}
    last = len(model.blocks) - 1
    hook = model.blocks[last].register_forward_hook(
        lambda m, a, out: seen.__setitem__(f"mid.ctx.block{last}", out))
    context = model.context(**past, context_BLD=text, t=float(times[0, 0]))
    hook.remove()
    model.blocks[last].register_forward_hook(
        lambda m, a, out: seen.__setitem__(f"mid.block{last}", out))
    index = int(fixture.get("rope_start_frame")) + torch.arange(now["x_BCFHW"].shape[2])
    seen["out.velocity"] = model(**now, context_BLD=text, frame_index_BF=index, context=context)
    seen["out.velocity_without_cache"] = model(**now, context_BLD=text, frame_index_BF=index)
    seen["mid.ctx.temb"] = model.time(times, model.actions(past["labels_BF"]))[0][0]
    seen["mid.temb"] = model.time(now["t"], model.actions(now["labels_BF"]))[0][0]
    for i in range(len(model.blocks)):
        seen[f"out.cache{i}.k"], seen[f"out.cache{i}.v"] = joined(context, i)
    yield from compare(fixture, seen)


def prope_attention(fixture: Fixture) -> Iterator[Check]:
    """Attention among cameras, without intrinsics, with a context, in a moved world."""
    from worldgym.attention import attention

    q, k, v = (fixture[f"in.{n}"].transpose(1, 2) for n in "qkv")
    cameras = Cameras(fixture["in.viewmats"], fixture["in.Ks"])

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
    past = Cameras(fixture["in.ctx.viewmats"], fixture["in.ctx.Ks"]).projection(q)
    old = tuple(past.key(fixture[f"in.ctx.{n}"].transpose(1, 2)) for n in "kv")
    seen |= {"mid.ctx.k": old[0], "mid.ctx.v": old[1],
             "out.prope_with_ctx": run(cameras, old)["out"]}  # type: ignore[arg-type]
    yield from compare(fixture, {n: x.transpose(1, 2) for n, x in seen.items()})
    moved = Cameras(fixture["in.viewmats"] @ fixture["in.world_transform"], fixture["in.Ks"])
    yield Check("in a moved world", run(moved)["out"].transpose(1, 2), fixture["out.prope"])


KINDS = {
    "worldplay.dit_cached_chunk": dit_cached_chunk,
    "worldplay.dit_first_chunk": dit_first_chunk,
    "worldplay.prope_attention": prope_attention,
}
