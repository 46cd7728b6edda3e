"""Golden kinds of WorldPlay that need no network: poses and keys, retrieval, training noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from golden import Check, Fixture, FixtureError

from worldgym import camera, trajectory
from worldgym.errors import ActionError

EXACT = (0.0, 0.0)


def _numbers(name: str, got: object, want: object) -> Check:
    return Check(name, torch.as_tensor(np.asarray(got)), torch.as_tensor(np.asarray(want)), EXACT)


def _poses(name: str, got: np.ndarray, fixture: Fixture) -> Check:
    return Check(name, torch.from_numpy(got), fixture[name])


def pose_conversion(fixture: Fixture) -> Iterator[Check]:
    """Strings, motions and thresholds, both ways; labels exactly."""
    K = np.array(fixture.get("K_pixels"))
    for case in fixture.get("strings"):
        text, base = case["pose_string"], f"string{case['id']}"
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
    for case in fixture.get("frame_timeline"):
        rows = trajectory.overlay(case["pose_string"], published=True)
        want = [row for count, row in case["frames_rle"] for _ in range(count)]
        if rows != want or len(rows) != case["n_frames"]:
            raise FixtureError(f"overlay of {case['pose_string']!r} differs")


def _motions(fixture: Fixture) -> Iterator[Check]:
    grid = fixture.get("grid81")
    walked = camera.walk(camera.motions(grid["motions"]))
    yield _poses("grid81.c2w", walked, fixture)
    yield _numbers("grid81 labels", camera.labels_of(walked), grid["actions"])
    ours = camera.walk(camera.motions_of(np.arange(81)))
    yield _poses("grid81.c2w", ours, fixture)
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


KINDS = {"worldplay.pose_conversion": pose_conversion}
