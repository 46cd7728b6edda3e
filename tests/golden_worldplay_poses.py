"""Golden kinds of WorldPlay that need no network: poses and keys, retrieval, training noise."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from golden import Check, Fixture, FixtureError

from worldgym import camera, trajectory
from worldgym.errors import ActionError
from worldgym.models.wan import block_ids, causal_frame_mask
from worldgym.models.worldplay_loss import CausalConfig, causal_times
from worldgym.reconstituted import Reconstituted, Scoring
from worldgym.retrieval import Cloud, Distances, geometry, overlap
from worldgym.schedule import chunk_times, context_times

EXACT = (0.0, 0.0)


def _numbers(name: str, got: object, want: object) -> Check:
    return Check(name, torch.as_tensor(np.asarray(got)), torch.as_tensor(np.asarray(want)), EXACT)


def _poses(name: str, got: np.ndarray, fixture: Fixture) -> Check:
    return Check(name, torch.from_numpy(got), fixture[name])


def pose_conversion(fixture: Fixture) -> Iterator[Check]:
    """Strings, motions and thresholds, both ways; labels exactly."""
    K = np.array(fixture.meta.get("K_pixels", camera.DEFAULT_K))
    for i, case in enumerate(fixture.get("strings")):
        text, base = case["pose_string"], f"string{case.get('id', i)}"
        if "error" in case:
            try:
                trajectory.from_string(text, K, published=True)
            except ActionError as error:
                if case["error"] not in {c.__name__ for c in type(error).__mro__}:
                    raise FixtureError(f"{text!r} is not a {case['error']}") from error
                continue
            raise FixtureError(f"{text!r} was accepted")
        path = trajectory.from_string(text, K, published=True)
        yield _poses(f"{base}.c2w", path.c2w_N44, fixture)
        yield _poses(f"{base}.w2c", path.w2c_N44, fixture)
        yield _poses(f"{base}.Ks", path.K_N33, fixture)
        yield _numbers(f"{base} labels", path.labels(), case["actions"])
        yield _numbers(f"{base} length", [len(path) - 1, len(path)],
                       [case["n_motions"], case["n_poses"]])
    yield from _motions(fixture)
    for case in fixture.meta.get("frame_timeline", ()):
        rows = trajectory.overlay(case["pose_string"], published=True)
        want = [row for count, row in case["frames_rle"] for _ in range(count)]
        if rows != want or len(rows) != case["n_frames"]:
            raise FixtureError(f"overlay of {case['pose_string']!r} differs")


def _motions(fixture: Fixture) -> Iterator[Check]:
    grid = fixture.get("grid81")
    walked = camera.walk(camera.motions(grid["motions"]))
    yield _poses("grid81.c2w", walked, fixture)
    yield _numbers("grid81 labels", camera.labels_of(walked), grid["actions"])
    asked = camera.motions(grid["motions"])
    step = {"move": asked[:, camera.FORWARD].max(), "turn": asked[:, camera.YAW].max()}
    yield _poses("grid81.c2w", camera.walk(camera.motions_of(np.arange(81), **step)), fixture)
    for case in fixture.get("labels"):
        c2w = fixture[f"label{case['id']}.c2w"].numpy()
        for name, third in (("first", False), ("third", True)):
            got = camera.labels_of(c2w, camera.Thresholds(third_person=third))
            yield _numbers(f"label{case['id']} {name}", got, case[f"actions_{name}_person"])
    got = camera.labels_of(fixture["angles.c2w"].numpy())[1:]
    want = fixture.get("angles")["actions"]
    yield _numbers("angles", got[-len(want):], want)
    yield _poses("center.out.w2c", camera.centred(fixture["center.in.w2c"].numpy()), fixture)
    yield _poses("third.c2w", camera.walk(camera.motions(fixture.get("third_motions"))), fixture)


def memory_retrieval(fixture: Fixture) -> Iterator[Check]:
    """Choices of both rules exactly, distances and overlaps; the published random points."""
    points, near = fixture["in.points"].numpy(), float(fixture.get("distance_atol"))
    rules = {"wan": Reconstituted(points_M3=points),
             "hunyuan": Reconstituted(total=20, keep_first=True, points_M3=points)}
    for case in fixture.get("cases"):
        start, name = int(case["current_frame_idx"]), case["trajectory"]
        w2c = fixture[f"in.w2c.{name}"].double().numpy()[:start + rules["wan"].chunk]
        for rule, memory in rules.items():
            margin = case.get("margin" if rule == "wan" else f"{rule}_margin")
            if rule in case and not (margin and margin < 1e-4):
                got = memory.select(w2c, start)
                yield _numbers(f"{name} at {start}, {rule}", [len(got), *got],
                               [len(case[rule]), *case[rule]])
        if case.get("wan_candidates"):
            index = np.array(case["wan_candidates"])[:, None] + [0, 2]
            centre, ahead = (x.reshape(-1, 2, 3) for x in geometry(w2c[index.ravel()]))
            distances = Distances(w2c[start:], centre, ahead, rules["wan"].cloud())
            yield Check(f"{name} at {start}, distances",
                        torch.from_numpy(distances.exact(np.arange(len(index)))),
                        torch.tensor(case["wan_distance"]), (near, 0.0))
    for case in fixture.meta.get("overlaps", ()):
        w2c = fixture[f"in.w2c.{case['trajectory']}"].double().numpy()
        for name in [k for k in case if k.startswith("overlap_")]:
            fov = tuple(float(x) for x in name.removeprefix("overlap_").split("x"))
            cloud = Cloud(points, fov=fov)  # type: ignore[arg-type]
            got = overlap(w2c[case["current"]], w2c[case["history"]], cloud)
            yield Check(f"{case['trajectory']} {name}", torch.tensor(got),
                        torch.tensor(case[name]), (float(fixture.get("atol_overlap")), 0.0))
    for name, want in fixture.tensors.items():
        found = re.fullmatch(r"ref\.points(\d+)(k?)_seed(\d+)_(first\d+|mean_std)", name)
        if not found:
            continue
        count, thousand, seed, what = found.groups()
        scoring = Scoring(points=int(count) * (1000 if thousand else 1), seed=int(seed))
        drawn = torch.from_numpy(Reconstituted(scoring=scoring).points)
        if what == "mean_std":
            yield Check(name, torch.stack([drawn.mean(0), drawn.std(0)]), want, (1e-4, 0.0))
        else:
            yield Check(name, drawn[:int(what.removeprefix("first"))], want, (1e-5, 0.0))


def training_schedule(fixture: Fixture) -> Iterator[Check]:
    """Timesteps of chunks and of context chunks; who sees whom. The JSON holds everything."""
    u = torch.tensor(fixture.get("u"), dtype=torch.float64)
    times = chunk_times(u, shift=float(fixture.get("time_shift")))
    yield _numbers("u_index", torch.floor(1000 * u).numpy(), fixture.get("u_index"))
    yield _numbers("timesteps", times.numpy(), fixture.get("timesteps"))
    yield Check("sigmas", times / 1000, torch.tensor(fixture.get("sigmas")), (1e-7, 0.0))
    past = fixture.get("memory_context")
    index = torch.tensor(past["index"])
    yield _numbers("context", context_times(index).numpy(), past["timestep"])
    # the same as a training step draws them: the first sequence whole, the second a memory sample
    low, high = CausalConfig().rows
    known = [i for i, n in enumerate(past["index"]) if low <= n <= high][:len(u) - 1]
    inside = (torch.floor(1000 * u) + 0.5) / 1000  # in the middle of what is cut down to u's
    rows = torch.zeros(len(u), dtype=torch.float64)
    rows[:len(known)] = (index[known] + 0.5 - low) / (high - low + 1)
    drawn = {torch.randn: torch.logit(inside), torch.rand: rows}
    trained, counts = causal_times(
        lambda kind, *shape: drawn[kind].expand(2, -1), torch.tensor([False, True]), 4 * len(u), 4,
        CausalConfig(shift=float(fixture.get("time_shift"))))
    yield _numbers("training", trained[0, ::4].numpy(), fixture.get("timesteps"))
    if known:
        yield _numbers("training context", trained[1, :4 * len(known):4].numpy(),
                       [past["timestep"][i] for i in known])
    yield _numbers("training counts", counts.sum(1).numpy(), [4 * len(u), 4])
    case = fixture.get("chunk_causal_mask")
    text, tokens = int(case["text_tokens"]), int(case["tokens_per_latent"])
    mask = causal_frame_mask(block_ids(int(case["latents"]), int(case["chunk_latents"])))
    counts = text + tokens * mask.sum(1).repeat_interleave(tokens)
    yield _numbers("mask", torch.cat([torch.full((text,), text), counts]).numpy(),
                   case["row_true_counts"])


KINDS = {
    "worldplay.memory_retrieval": memory_retrieval,
    "worldplay.pose_conversion": pose_conversion,
    "worldplay.training_schedule": training_schedule,
}
JSON_ONLY = frozenset({"worldplay.training_schedule"})
