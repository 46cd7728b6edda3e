"""Gymnasium spaces of a world: actions, observations, batches; and the torch -> numpy door.

Shapes: B slots, F pixel frames of a chunk, H W pixels, C latent channels, k stacked observations.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from worldgym.actions import ActionSpec, part_of
from worldgym.errors import ActionError, ConfigError, DTypeError, ShapeError
from worldgym.spec import WorldSpec

OBSERVATIONS = ("frame", "latent")
ACTION_MAPPINGS = ("hold", "per_frame")


def to_numpy(value: Any) -> np.ndarray:
    """The one door from torch to numpy: a tensor on any device, or an array, as a CPU array.

    The result may share memory with the tensor; callers copy before they hand it to a user.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def action_spec(space: spaces.Space) -> ActionSpec:
    """The numeric layout of a Gymnasium action space.

    Raises:
        ConfigError: the space is not Discrete, MultiDiscrete, MultiBinary or a bounded Box.
    """
    if isinstance(space, spaces.Discrete):
        return ActionSpec.discrete(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1 and not space.start.any():
        sizes = tuple(int(n) for n in space.nvec)
        return ActionSpec(kind="multi_discrete", shape=(len(sizes),), sizes=sizes)
    if isinstance(space, spaces.MultiBinary):
        shape = tuple(int(n) for n in space.shape)
        return ActionSpec(kind="multi_binary", shape=shape, sizes=(int(np.prod(shape)),))
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return ActionSpec(
            kind="box", shape=tuple(int(n) for n in space.shape),
            low=tuple(float(x) for x in space.low.ravel()),
            high=tuple(float(x) for x in space.high.ravel()),
        )
    raise ConfigError(
        "this action space has no action codec", given=space,
        expected="Discrete, flat MultiDiscrete starting at 0, MultiBinary or a bounded float Box",
        fix="wrap the game so that its action space is one of these four",
    )


def action_space(spec: ActionSpec, frames: int | None = None, flat: bool = False) -> spaces.Space:
    """The Gymnasium space of one action, or of ``frames`` actions (``per_frame`` mapping).

    Actions with named parts are a Dict, or with ``flat`` the Box of all of them side by side.
    """
    if spec.parts and not flat:
        shown: dict[str, spaces.Space] = {}
        at = 0
        lowest: np.ndarray = np.asarray(spec.low, np.float32)
        highest: np.ndarray = np.asarray(spec.high, np.float32)
        for name, kind, count in spec.parts:
            part = slice(at, at + count)
            shown[name] = spaces.MultiBinary(count) if kind == "multi_binary" else spaces.Box(
                lowest[part], highest[part], dtype=np.float32)
            at += count
        single: spaces.Space = spaces.Dict(shown)
        return single if frames is None else batch_space(single, frames)
    if spec.kind == "discrete":
        single = spaces.Discrete(spec.sizes[0], start=spec.start)
    elif spec.kind == "multi_discrete":
        single = spaces.MultiDiscrete(np.asarray(spec.sizes, np.int64))
    elif spec.kind == "multi_binary":
        single = spaces.MultiBinary(spec.shape[0] if len(spec.shape) == 1 else list(spec.shape))
    else:
        single = spaces.Box(np.asarray(spec.low, np.float32).reshape(spec.shape),
                            np.asarray(spec.high, np.float32).reshape(spec.shape),
                            dtype=np.float32)
    return single if frames is None else batch_space(single, frames)


def join_parts(spec: ActionSpec, actions: Any) -> np.ndarray:
    """Flat actions (..., components) of a Dict of batches, or of a sequence of Dict actions.

    Raises:
        ActionError: not a Dict of the named parts, or not numbers. ShapeError: parts do not fit.
    """
    if isinstance(actions, list | tuple):
        joined = [join_parts(spec, action) for action in actions]
        if len({a.shape for a in joined}) != 1:
            raise ShapeError("action batch is ragged", given=[a.shape for a in joined][:4],
                             expected="actions of one shape", fix="give every slot an action")
        return np.stack(joined)
    names = [name for name, _, _ in spec.parts]
    if not isinstance(actions, Mapping) or sorted(map(str, actions)) != sorted(names):
        given = sorted(map(str, actions)) if isinstance(actions, Mapping) else type(actions)
        raise ActionError("action lacks its parts", given=given, expected=f"a dict of {names}",
                          fix="sample from env.action_space, or make the env with "
                          "flat_actions=True")
    columns = []
    for name, kind, count in spec.parts:
        part = part_of(name, actions[name], count)
        if kind == "multi_binary" and not np.isin(part, (0, 1)).all():
            raise ActionError(f"{name} are neither 0 nor 1", given=part.ravel()[:8].tolist(),
                              expected="0 or 1", fix="round the policy's output")
        columns.append(part.astype(np.float64))
    if len({c.shape[:-1] for c in columns}) != 1:
        raise ShapeError("parts of an action differ in shape",
                         given={n: c.shape for n, c in zip(names, columns, strict=True)},
                         expected="the same leading axes", fix="sample from env.action_space")
    return np.concatenate(columns, -1)


def observation_space(spec: WorldSpec, observation: str, frame_stack: int) -> spaces.Box:
    """Space of one observation: frames (H, W, 3k) uint8, or latents (C*k, h, w) float32.

    Raises:
        ConfigError: unknown ``observation``, or ``frame_stack`` is not a positive int.
    """
    if observation not in OBSERVATIONS:
        raise ConfigError(
            "unknown observation mode", given=repr(observation), expected=f"one of {OBSERVATIONS}",
            fix='pass observation="frame" or observation="latent"',
        )
    if isinstance(frame_stack, bool) or not isinstance(frame_stack, int | np.integer) or (
        frame_stack < 1
    ):
        raise ConfigError(
            "impossible frame_stack", given=repr(frame_stack), expected="an int of at least 1",
            fix="pass frame_stack=1 for the newest frame alone",
        )
    if observation == "frame":
        height, width = spec.frame_hw
        return spaces.Box(0, 255, (height, width, 3 * int(frame_stack)), np.uint8)
    channels, height, width = spec.latent_chw
    limit = np.finfo(np.float32).max  # latents have no bound; checkers refuse an infinite one
    return spaces.Box(-limit, limit, (channels * int(frame_stack), height, width), np.float32)


def stack_axis(observation: str) -> int:
    """Axis of a batched observation along which stacked frames lie: channels."""
    return -1 if observation == "frame" else 1


def push(stack_B: np.ndarray, newest_B: np.ndarray, observation: str) -> np.ndarray:
    """A new stack with the oldest observation dropped and ``newest_B`` at the end."""
    axis = stack_axis(observation)
    if stack_B.shape == newest_B.shape:
        return newest_B.copy()
    size = newest_B.shape[axis]
    kept = stack_B[..., size:] if axis == -1 else stack_B[:, size:]
    return np.concatenate([kept, newest_B], axis=axis)


def newest(stack_B: np.ndarray, size: int, observation: str) -> np.ndarray:
    """The newest observation inside a stack; ``size`` channels wide. A view."""
    return stack_B[..., -size:] if stack_axis(observation) == -1 else stack_B[:, -size:]


def check_frame(frame: Any, frame_hw: tuple[int, int]) -> np.ndarray:
    """A user's start image as a new uint8 array (H, W, 3).

    Raises:
        ShapeError: wrong size. DTypeError: not uint8.
    """
    array = np.asarray(to_numpy(frame))
    want = (*frame_hw, 3)
    if array.shape != want:
        raise ShapeError(
            "start frame has the wrong shape", given=array.shape, expected=f"{want} (H, W, RGB)",
            fix=f"resize the image to {frame_hw[0]} rows and {frame_hw[1]} columns",
        )
    if array.dtype != np.uint8:
        raise DTypeError(
            "start frame has the wrong dtype", given=array.dtype, expected="uint8 in 0..255",
            fix="convert with (image * 255).astype(numpy.uint8) if it is a float image in 0..1",
        )
    return array.copy()
