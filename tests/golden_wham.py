"""Golden kinds of WHAM: tokenisers, transformer, sampler, actions and whole rollouts.

Shapes: B slot, F frame, I image tokens, A = 16 action tokens, V vocabulary. Tokens must be equal;
images within the fixture's ``uint8_tolerance``; logits within 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from golden import Check, Fixture, FixtureError
from torch import Tensor

from worldgym.checkpoint import load_into
from worldgym.models import wham_actions, wham_checkpoint
from worldgym.models.gpt import GPT, GPTConfig, StaticCache, losses
from worldgym.models.sampling import Sampling, distribution
from worldgym.models.vqgan import Tokenizer, ViTConfig, ViTVQGAN
from worldgym.models.vqgan_conv import ConvConfig, ConvVQGAN
from worldgym.models.wham import Wham
from worldgym.models.wham_world import WhamWorld
from worldgym.state import Starts

EXACT = (0.0, 0.0)
LOGITS = (1e-4, 0.0)


def weights(fixture: Fixture) -> dict[str, Tensor]:
    """``state.*`` without mask buffers, as float32."""
    found = {k.removeprefix("state."): v.float() for k, v in fixture.tensors.items()
             if k.startswith("state.") and not k.endswith((".attn_mask", ".attn.bias"))}
    if not found:
        raise FixtureError("no tensors state.*")
    return found


def usual(fixture: Fixture) -> tuple[float, float]:
    """The fixture's ``tolerance_abs``, else the runner's default."""
    given = fixture.meta.get("tolerance_abs")
    return (float(given), 0.0) if given is not None else fixture.tolerance()


def frames(fixture: Fixture) -> tuple[float, float]:
    """Tolerance of uint8 images."""
    return float(fixture.meta.get("uint8_tolerance", 0)), 0.0


def gpt(fixture: Fixture) -> Iterator[Check]:
    """Whole sequences, losses, and decoding from a static cache."""
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(fixture.get("config")))
    sd = {k: v for k, v in weights(fixture).items() if k != "lm_head.weight"}
    model = load_into(model, sd).eval()
    ids, targets, net = fixture["tokens"], fixture["targets"], model.network()
    logits = model(ids)
    yield Check("logits", logits, fixture["logits"], LOGITS)
    rows, count = ids.shape
    last = net.hidden(ids, torch.arange(count), last=4)[:, -1:]
    yield Check("last_logits", net.logits(last), fixture["last_logits"], LOGITS)
    mean = losses(logits, targets).mean().view(1)
    yield Check("mean_loss", mean, fixture["mean_loss"], LOGITS)
    masked = losses(logits, targets, fixture["loss_mask"])
    yield Check("masked_loss", masked, fixture["masked_loss"], LOGITS)
    cache, made = StaticCache(model.cfg, rows, count, net.wte), []
    start, size = 0, int(fixture.get("prefill_len"))
    while start < count:
        x = net.hidden(ids[:, start:start + size], torch.arange(start, start + size),
                         cache.extend(start, size))
        made.append(net.logits(x[:, -1:]))
        start, size = start + size, 1
    yield Check("incremental_logits", torch.cat(made, 1), fixture["incremental_logits"], LOGITS)


def tokenizer(model: Tokenizer, fixture: Fixture) -> Iterator[Check]:
    """What both tokenisers share."""
    images = fixture["images"]
    x = model.preprocess(images)
    yield Check("preprocessed", x, fixture["preprocessed"], usual(fixture))
    ids = model.frame_ids(images)
    yield Check("indices", ids, fixture["indices"], EXACT)
    for prefix, given in (("", ids), ("random_", fixture.tensors.get("random_indices"))):
        if given is None:
            continue
        y = model.pixels(torch.nn.functional.embedding(given, model.codes()))
        yield Check(f"{prefix}decoded_float", y, fixture[f"{prefix}decoded_float"], usual(fixture))
        yield Check(f"{prefix}decoded_uint8", model.ids_frames(given),
                    fixture[f"{prefix}decoded_uint8"], frames(fixture))


def vit_vqgan(fixture: Fixture) -> Iterator[Check]:
    """Every stage of the ViT tokeniser, its losses included."""
    with torch.device("meta"):
        net = ViTVQGAN(ViTConfig.from_spec(fixture.get("model_spec")))
    model = load_into(net, weights(fixture)).eval()
    yield from tokenizer(model, fixture)
    z = model.features(model.preprocess(fixture["images"]))
    yield Check("encoder_out", z, fixture["encoder_out"], usual(fixture))
    chosen = torch.nn.functional.embedding(model.nearest(z), model.codes())
    yield Check("quantized", chosen, fixture["quantized"], usual(fixture))
    loss, perplexity = model.quantiser_losses(z)
    yield Check("vq_loss", loss.view(1), fixture["vq_loss"], usual(fixture))
    yield Check("perplexity", perplexity.view(1), fixture["perplexity"], usual(fixture))


def taming_vqgan(fixture: Fixture) -> Iterator[Check]:
    """Every stage of the convolutional tokeniser."""
    with torch.device("meta"):
        net = ConvVQGAN(ConvConfig.from_spec(fixture.get("model_spec")))
    model = load_into(net, weights(fixture)).eval()
    yield from tokenizer(model, fixture)
    x = model.preprocess(fixture["images"])
    yield Check("encoder_out", model.encoded(x), fixture["encoder_out"], usual(fixture))
    z = model.features(x).transpose(1, 2).unflatten(2, model.grid_hw)
    yield Check("pre_quant", z, fixture["pre_quant"], usual(fixture))


def sampling(fixture: Fixture) -> Iterator[Check]:
    """The distribution handed to the draw, case by case; also from the allowed ids alone."""
    for case in fixture.get("cases"):
        known = set(Sampling.__dataclass_fields__)
        unknown = set(case) - known - {"i", "valid_token_range", "kept_per_row"}
        if unknown:
            raise FixtureError(f"case {case['i']} has settings without a rule: {sorted(unknown)}")
        how = Sampling(**{"temperature": 1.0, **{k: v for k, v in case.items() if k in known}})
        logits, want = fixture["logits"], fixture[f"probs.{case['i']}"]
        limits = case.get("valid_token_range")
        got = distribution(logits, how, tuple(limits) if limits else None)
        yield Check(f"probs.{case['i']}", got, want, usual(fixture))
        yield Check(f"kept.{case['i']}", (got > 0).sum(-1), (want > 0).sum(-1), EXACT)
        low, high = limits or (0, logits.shape[-1] - 1)
        alone = distribution(logits[:, low:high + 1], how)
        yield Check(f"allowed.{case['i']}", alone, want[:, low:high + 1], usual(fixture))


def actions(fixture: Fixture) -> Iterator[Check]:
    """Stick values to bins and back, bins to ids and back."""
    def same(name: str, got: Any, want: Any) -> Check:
        return Check(name, torch.as_tensor(np.asarray(got, np.float64)),
                     torch.as_tensor(np.asarray(want, np.float64)), EXACT)

    yield same("boundaries", wham_actions.EDGES, fixture.get("boundaries"))
    yield same("middles", wham_actions.MIDDLES, fixture.get("middles"))
    table = fixture.get("value_table")
    values = np.array([row["value"] for row in table], np.float64)
    got = wham_actions.stick_bins(values)
    yield same("bin", got, [row["bin"] for row in table])
    yield same("in_range", (got >= 0) & (got < wham_actions.BINS), [r["in_range"] for r in table])
    rounded = wham_actions.stick_bins(values.astype(np.float32))
    yield same("bin of float32", rounded, [r["bin_if_value_is_float32_rounded"] for r in table])
    inside = [(g, r["bin_middle"]) for g, r in zip(got, table, strict=True) if r["in_range"]]
    yield same("bin_middle", wham_actions.MIDDLES[[g for g, _ in inside]], [m for _, m in inside])
    yield same("ranges", wham_actions.RANGES, fixture.get("per_dim_token_range_inclusive"))
    yield same("vocabulary", wham_actions.VOCABULARY, fixture.get("action_vocab"))
    bins = fixture["bins_actions"].numpy()
    ids = wham_actions.ids(bins)
    yield same("tokens", ids, fixture["tokens"])
    yield same("decoded", wham_actions.from_ids(ids), fixture["decoded"])
    world = torch.from_numpy(wham_actions.world_values(bins))
    yield Check("world_actions", world, fixture["world_actions"], EXACT)
    yield same("fractional_tokens", wham_actions.ids(fixture["fractional_actions"].numpy()),
               fixture["fractional_tokens"])


# ------------------------------------------------------------------------------------ rollouts


class Recorder:
    """Full logits of every token of a step, in the order of the slots."""

    def __init__(self, model: Wham) -> None:
        self.model, self.rows = model, []

    def __call__(self, states_BD: Tensor) -> None:
        self.rows.append(self.model.gpt.network().logits(states_BD))

    def take(self) -> Tensor:
        rows, self.rows = torch.stack(self.rows, 1), []
        return rows


def rollout(fixture: Fixture) -> Iterator[Check]:
    """Everything from the checkpoint: clip, losses, greedy rollouts, policy, one server step."""
    config = fixture.get("config")
    size = {config["model_spec"]["model_size"]:
            (config["n_layer"], config["n_head"], config["n_embd"])}
    model = wham_checkpoint.load(fixture.folder / fixture.get("checkpoint")["file"], size)
    batch, length = fixture["images"].shape[:2]
    images = model.tokenizer.frame_ids(fixture["images"].flatten(0, 1)).unflatten(0, (batch, -1))
    yield Check("encoded_image_tokens", images, fixture["encoded_image_tokens"], EXACT)
    given = fixture["actions"].numpy()
    acted = torch.from_numpy(wham_actions.ids(given))
    yield Check("encoded_action_tokens", acted, fixture["encoded_action_tokens"], EXACT)
    again = model.tokenizer.ids_frames(images.flatten(0, 1)).unflatten(0, (batch, -1))
    yield Check("redecoded_images", again, fixture["redecoded_images"], frames(fixture))
    limit = float(fixture.meta.get("tolerance_abs_logits", 1e-4)), 0.0
    if "loss.mask" in fixture:
        mask = fixture["loss.mask"]
        f = mask.shape[1]
        image, action, _ = model.loss(images[:, :f], acted[:, :f], mask)
        yield Check("loss.images", image, fixture["loss.images"], limit)
        yield Check("loss.actions_output", action, fixture["loss.actions_output"], limit)
    for tag, plan in fixture.get("rollouts").items():
        if "steps" in plan:
            yield from dream(fixture, model, images, given, tag, plan)
    if "policy.prefix_tokens" in fixture:
        yield from policy(fixture, model)
    if "server.override_tokens" in fixture:
        yield from server(fixture, model, images, given)


def begin(world: WhamWorld, image_BFI: Tensor, bins_BFA: np.ndarray):
    """A state at these frames; ``bins_BFA``: the action taken on each (the last is not used)."""
    batch, f = image_BFI.shape[:2]
    f = min(f, world.history)
    latents = image_BFI[:, -f:].reshape(batch, f, *world.spec.latent_chw)
    led = np.roll(bins_BFA[:, -f:].astype(np.int64), 1, 1)
    starts = Starts(latents, led, np.arange(f)[None].repeat(batch, 0) == 0, np.full(batch, f))
    return world.begin(starts, list(range(batch)))


def dream(fixture: Fixture, model: Wham, images: Tensor, given: np.ndarray, tag: str,
          plan: dict) -> Iterator[Check]:
    """A greedy rollout; every token's logits are the cached path's own."""
    context, steps = int(plan["context_frames_at_start"]), int(plan["steps"])
    own = tag.startswith("full_generation")
    world = WhamWorld(model, sampling=Sampling(temperature=0.9, top_k=1), propose=True,
                      context_length=int(plan["context_length_arg"]))
    state = begin(world, images[:, :context], given[:, :context])
    action = given[:, context - 1].astype(np.int64)
    recorder, logits, log = Recorder(model), [], []
    made: dict[str, list] = {"image_tokens": [], "sampled_action_tokens": [], "images": [],
                             "actions": []}
    for step in range(steps):
        log.append(int(world._pairs(state)[0]) * model.step_tokens)
        watch = recorder if step in (0, steps - 1) else None
        world.watch = watch
        state, chunk = world.step(state, action)
        if watch:
            logits.append(recorder.take())
        proposed = world.proposal(state)
        action = proposed if own else given[:, context + step].astype(np.int64)
        made["image_tokens"].append(chunk.latents_BFChw.flatten(1))
        made["sampled_action_tokens"].append(torch.from_numpy(wham_actions.ids(proposed)))
        made["images"].append(chunk.frames()[:, 0].permute(0, 3, 1, 2))
        made["actions"].append(torch.from_numpy(action))
    for name, parts in made.items():
        tolerance = frames(fixture) if name == "images" else EXACT
        yield Check(f"{tag}.{name}", torch.stack(parts, 1), fixture[f"{tag}.{name}"], tolerance)
    yield Check(f"{tag}.raw_logits_first", logits[0], fixture[f"{tag}.raw_logits_first"], LOGITS)
    yield Check(f"{tag}.raw_logits_last", logits[-1], fixture[f"{tag}.raw_logits_last"], LOGITS)
    told = [a for a, _ in plan.get("prefill_lengths_and_new_tokens", [])][::2]
    if told:
        yield Check(f"{tag}.windows", torch.tensor(log), torch.tensor(told), EXACT)


def policy(fixture: Fixture, model: Wham) -> Iterator[Check]:
    """The behaviour policy after a prefix that ends with the newest frame."""
    prefix, step = fixture["policy.prefix_tokens"], model.step_tokens
    batch, full = prefix.shape
    padded = torch.nn.functional.pad(prefix, (0, -full % step))
    parts = padded.unflatten(1, (-1, step))
    images, acted = parts[..., :model.image_tokens], parts[..., model.image_tokens:]
    bins = wham_actions.from_ids(acted.numpy() - model.codes)
    bins[:, -1] = wham_actions.NEUTRAL  # not there yet
    world = WhamWorld(model, sampling=Sampling(temperature=0.9, top_k=1))
    recorder = Recorder(model)
    got = world.proposal(begin(world, images, bins), watch=recorder)
    yield Check("policy.raw_logits", recorder.take(), fixture["policy.raw_logits"], LOGITS)
    yield Check("policy.action_bins", torch.from_numpy(got), fixture["policy.action_bins"], EXACT)
    yield Check("policy.action_tokens", torch.from_numpy(wham_actions.ids(got)),
                fixture["policy.action_tokens"], EXACT)


def server(fixture: Fixture, model: Wham, images: Tensor, given: np.ndarray) -> Iterator[Check]:
    """One step from frames and bins, the newest frame of slot 0 replaced by other ids."""
    f = model.cfg.seq_len
    images = images[:, :f].clone()
    images[0, -1] = fixture["server.override_tokens"]
    world = WhamWorld(model, sampling=Sampling(temperature=0.9, top_k=1), propose=True)
    state, chunk = world.step(begin(world, images, given[:, :f]),
                              given[:, f - 1].astype(np.int64))
    yield Check("server.image_tokens", chunk.latents_BFChw.flatten(2), fixture[
        "server.image_tokens"].view(len(images), 1, -1), EXACT)
    yield Check("server.images", chunk.frames().permute(0, 1, 4, 2, 3), fixture["server.images"],
                frames(fixture))
    bins = torch.from_numpy(world.proposal(state))[:, None]
    yield Check("server.actions", bins, fixture["server.actions"], EXACT)


KINDS = {
    "wham.gpt": gpt,
    "wham.vit_vqgan": vit_vqgan,
    "wham.taming_vqgan": taming_vqgan,
    "wham.sampling": sampling,
    "wham.actions": actions,
    "wham.rollout": rollout,
}
