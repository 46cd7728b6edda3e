"""``worldgym/WHAM-v0``: a WHAM checkpoint as a task and as environments.

Shapes: K frame of a start, H W pixels. An action is 16 bins (``MultiDiscrete``) or, with
``controls="values"``, a dict of 11 buttons and 4 sticks in [-1, 1] (specs/wham.md section 4).
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from worldgym.envs.dream import DreamEnv
from worldgym.envs.make import _split
from worldgym.envs.tasks import Task, place
from worldgym.envs.vector import DreamVectorEnv
from worldgym.envs.wham_starts import Past, WhamStarts
from worldgym.errors import CheckpointError, ConfigError, DTypeError, ShapeError
from worldgym.models import wham_actions

ID = "worldgym/WHAM-v0"
CONTROLS = ("bins", "raw", "values")
SAMPLING = ("temperature", "top_k", "top_p", "deterministic")
WORLD = ("context_length", "slide", "diagonal", "propose")
PLACE = ("device", "dtype", "size")
SETTINGS = ("model", "starts", "context", "start_every", *SAMPLING, *WORLD, *PLACE)
log = logging.getLogger("worldgym")


# -- actions ------------------------------------------------------------------------------------


def action_space(controls: str) -> spaces.Space:
    """The space of one action; ConfigError for unknown ``controls``."""
    if controls not in CONTROLS:
        raise ConfigError("unknown controls", given=repr(controls), expected=f"one of {CONTROLS}",
                          fix='pass controls="bins" or controls="values"')
    if controls != "values":
        return spaces.MultiDiscrete(np.asarray(wham_actions.SIZES, np.int64))
    return spaces.Dict(buttons=spaces.MultiBinary(wham_actions.PRESSED),
                       sticks=spaces.Box(-1, 1, (wham_actions.STICKS,), np.float32))


# -- the task -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _model(path: str, stamp: int, size: tuple | None, device: str, dtype: str) -> tuple[Any, str]:
    import torch

    from worldgym import checkpoint
    from worldgym.models import wham_checkpoint

    model = wham_checkpoint.load(path, None if size is None else {"*": size}, device=device,
                                 dtype=getattr(torch, dtype))
    return model, f"{checkpoint.fingerprint(model)} {dtype}"


@functools.lru_cache(maxsize=8)
def _small(folder: str, stamp: int, device: str, sampling: tuple, settings: tuple) -> Any:
    from worldgym.models import wham_nano
    from worldgym.models.sampling import Sampling

    made = wham_nano.load_nano(folder)
    how = {"temperature": made.cfg.temperature, **dict(sampling)}
    return made.world(device, sampling=Sampling(**how), **dict(settings))


@functools.lru_cache(maxsize=8)
def _world(parts: tuple, sampling: tuple, settings: tuple) -> Any:
    from worldgym.models.sampling import Sampling
    from worldgym.models.wham_world import WhamWorld

    model, fingerprint = _model(*parts)
    return WhamWorld(model, sampling=Sampling(**dict(sampling)), fingerprint=fingerprint,
                     **dict(settings))


def open_world(model: str | Path | None, *, device: str | None = None, dtype: str = "float32",
               size: Sequence[int] | None = None, **settings: Any) -> Any:
    """The ``WhamWorld`` of a file, shared within a process.

    Args:
        model: published ``.ckpt``, or what ``worldgym convert`` wrote; or a small WHAM's id or
            folder (``worldgym fit --dynamics wham``).
        device: None: cuda where there is one. dtype: float32 (exact) or bfloat16.
        size: layers, heads, width, where the built-in table lacks the file's size name.
        settings: temperature, top_k, top_p, deterministic (``Sampling``); context_length, slide,
            diagonal, propose (``WhamWorld``).

    Raises:
        ConfigError: no file given, or an impossible setting. CheckpointError: missing or broken.
    """
    if model is None:
        raise ConfigError("no WHAM file", given="no model", expected="a published .ckpt, or what "
                          "worldgym convert wrote", fix=f'gymnasium.make("{ID}", model="FILE")')
    path = place(model)
    folder = path.is_dir() and (path / "world.safetensors").is_file()
    if not path.is_file() and not folder:
        raise CheckpointError("WHAM file is missing", given=path, expected="a published .ckpt, or "
                              "what worldgym convert wrote", fix="check the path")
    unknown = sorted(set(settings) - {*SAMPLING, *WORLD})
    if unknown or dtype not in ("float32", "bfloat16"):
        raise ConfigError("unknown WHAM setting", given=unknown or dtype,
                          expected=f"some of {(*SAMPLING, *WORLD)}; dtype float32 or bfloat16",
                          fix="check the spelling")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    given = {k: v for k, v in settings.items() if v is not None}
    how, more = (tuple(sorted((k, v) for k, v in given.items() if k in names))
                 for names in (SAMPLING, WORLD))
    if folder:
        if size is not None or dtype != "float32":
            raise ConfigError("a small WHAM has a size and dtype of its own",
                              given=f"size {size}, dtype {dtype}", expected="neither",
                              fix="leave them out")
        stamp = (path / "world.safetensors").stat().st_mtime_ns
        return _small(str(path.resolve()), stamp, str(device), how, more)
    parts = (str(path.resolve()), path.stat().st_mtime_ns, None if size is None else tuple(size),
             str(device), dtype)
    return _world(parts, how, more)


def _check_device(device: Any) -> None:
    """ConfigError unless torch can put tensors there."""
    import torch

    try:
        there = torch.device(device).type in ("cpu", "cuda") and (
            torch.device(device).type == "cpu" or torch.cuda.is_available())
    except (RuntimeError, TypeError):
        there = False
    if not there:
        raise ConfigError("no such device", given=repr(str(device)), expected="cpu, or cuda where "
                          "there is one", fix="leave device out")


def controlled(world: Any, model: Any) -> Any:
    """The same world, if it is acted in with a controller; else a ConfigError."""
    if world.spec.action != wham_actions.SPEC:
        mine = world.spec.action
        raise ConfigError("this WHAM has no controller", given=f"{model}: {mine.kind}{mine.sizes}",
                          expected="12 buttons and 4 sticks",
                          fix="open its folder as any world: worldgym.envs.make.make_dream(FOLDER)")
    return world


def load_wham(model: str | Path | None = None, *, starts: Any = None, context: int | None = None,
              start_every: int | None = None, task: Mapping[str, Any] | None = None,
              **settings: Any) -> Task:
    """WHAM's task; no reward and no end of its own, so give ``reward`` and ``end`` callables.

    Args:
        model, settings: as for ``open_world``.
        starts: .npz episode or a folder of them; a list of frames (K, H, W, 3) or of (frames,
            actions); None: a plain grey frame, so that ``reset()`` always works.
        context: frames of a start from an episode. start_every: a start at every n-th frame.
        task: fields of ``Task``.

    Raises:
        ConfigError, CheckpointError, DatasetError, ShapeError: what is wrong with which argument.
    """
    world = controlled(open_world(model, **settings), model)
    hw, most = world.spec.frame_hw, world.spec.context_frames + 1
    bank: Any
    if starts is None:
        log.info("%s: no starts were given: episodes begin on plain grey", ID)
        bank = WhamStarts(world, [Past(np.full((1, *hw, 3), 128, np.uint8))])
    elif isinstance(starts, str | Path):
        bank = WhamStarts.from_episodes(world, starts, context, start_every)
    elif hasattr(starts, "gather"):
        bank = starts
    else:
        pairs = [own if isinstance(own, tuple) else (own, None) for own in starts]
        if not pairs:
            raise ConfigError("no start", given="an empty list", expected="at least one",
                              fix="leave starts out, or give frames")
        bank = WhamStarts(world, [own if isinstance(own, Past) else
                                  Past.checked(own[0], own[1], hw, most) for own in pairs])
    return Task(world=world, starts=bank, name=ID, **(task or {}))


# -- the environments ---------------------------------------------------------------------------


class WhamFace:
    """Mixin over a face: controller actions, starts of several frames, the players' next action."""

    core: Any
    controls: str

    def _bins(self, actions: Any) -> Any:
        if self.controls == "raw":
            return actions
        how = wham_actions.from_controller if self.controls == "values" else wham_actions.flagged
        return how(actions)

    def _past(self, frames: Any, actions: Any) -> Past:
        spec = self.core.spec
        return Past.checked(frames, actions, spec.frame_hw, spec.context_frames + 1)

    def _proposed(self) -> np.ndarray:
        return self.core.task.world.proposal(self.core.ready().world)


class WhamEnv(WhamFace, DreamEnv):
    """A WHAM dream; ``DreamEnv`` says what all dreams share.

    - Action: 16 bins (12 buttons, number 0 is set from the others; 4 sticks of 0..10), or with
      ``controls="values"`` {"buttons": 11, "sticks": left x, y, right x, y in [-1, 1], y up}.
      ``controls="raw"``: 16 bins taken as they are, number 0 too.
    - ``reset(options={"frames": (K, H, W, 3), "actions": (K - 1, 16)})`` starts from up to a whole
      window of your own frames, oldest first, with the actions taken on them (or a dict of
      buttons and sticks) or without: then nothing was pressed. ``{"frame": image}`` is K = 1.
    - ``proposal()``: what the recorded players would do now; ``env.step(env.proposal())`` is the
      model left to itself (exactly so with ``controls="raw"``).
    """

    def __init__(self, task: Task, *, controls: str = "bins", **settings: Any) -> None:
        space = action_space(controls)
        super().__init__(task, **settings)
        self.controls, self.action_space = controls, space
        self._settings = {"controls": controls, **self._settings}
        self.metadata["controls"] = controls

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """As ``DreamEnv.reset``, with "frames" and "actions" in the options."""
        if isinstance(options, dict) and {"frames", "actions"} & set(options):
            self.core.check_open()
            _check_pair(options)
            rest = {k: v for k, v in options.items() if k not in ("frames", "actions")}
            options = {**rest, "frame": self._past(options["frames"], options.get("actions"))}
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        """As ``DreamEnv.step``."""
        self.core.ready()
        return super().step(self._bins(action))

    def proposal(self) -> Any:
        """The recorded players' next action, as this env's actions are; asking changes nothing."""
        bins = self._proposed()[0]
        return wham_actions.to_controller(bins) if self.controls == "values" else bins


class WhamVectorEnv(WhamFace, DreamVectorEnv):
    """WHAM dreams in one batch; options "frames" and "actions" hold one entry per slot or None."""

    def __init__(self, task: Task, num_envs: int = 1, *, controls: str = "bins",
                 **settings: Any) -> None:
        space = action_space(controls)
        super().__init__(task, num_envs, **settings)
        self.controls, self.single_action_space = controls, space
        self.action_space = batch_space(space, self.num_envs)
        self._settings = {"controls": controls, **self._settings}
        self.metadata["controls"] = controls

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        """As ``DreamVectorEnv.reset``, with several frames and "actions" per slot."""
        if isinstance(options, dict) and {"frames", "actions"} & set(options):
            self.core.check_open()
            _check_pair(options)
            frames = list(options["frames"])
            actions = options.get("actions")
            acted = [None] * len(frames) if actions is None else list(actions)
            if len(acted) != len(frames):
                raise ShapeError("wrong number of start actions", given=len(acted),
                                 expected=len(frames), fix="give actions or None for every slot")
            pasts = [None if f is None else self._past(f, a)
                     for f, a in zip(frames, acted, strict=True)]
            options = {**{k: v for k, v in options.items() if k != "actions"}, "frames": pasts}
        return super().reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        """As ``DreamVectorEnv.step``."""
        self.core.ready()
        return super().step(self._bins(actions))

    def proposal(self) -> Any:
        """The recorded players' next actions, for all slots."""
        bins = self._proposed()
        return wham_actions.to_controller(bins) if self.controls == "values" else bins


def _check_pair(options: dict[str, Any]) -> None:
    if "frames" not in options:
        raise ConfigError("start actions without frames", given=sorted(options),
                          expected='"frames" and "actions"', fix="give the frames they belong to")
    if {"frame", "start"} & set(options):
        raise ConfigError("contradictory reset options", given=sorted(options),
                          expected='"frames", or "frame", or "start"', fix="pass only one")
    if not isinstance(options["frames"], np.ndarray | list | tuple) and not hasattr(
            options["frames"], "detach"):
        raise DTypeError("start frames are no array", given=type(options["frames"]).__name__,
                         expected="uint8 (K, H, W, 3)", fix="stack the frames, oldest first")


def _task(settings: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
    own = {k: settings.pop(k) for k in SETTINGS if k in settings}
    return load_wham(**own), settings


def wham(**settings: Any) -> WhamEnv:
    """Entry point of ``gymnasium.make("worldgym/WHAM-v0", model=FILE)``.

    Settings: those of ``load_wham``; controls; those of ``make_dream`` (reward, end, horizon, ...).
    """
    controls = settings.pop("controls", "bins")
    action_space(controls)
    task, rest = _split(*_task(settings), ("render_mode",))
    return WhamEnv(task, controls=controls, **rest)


def wham_vector(num_envs: int = 1, **settings: Any) -> WhamVectorEnv:
    """Entry point of ``gymnasium.make_vec("worldgym/WHAM-v0", model=FILE)``."""
    controls = settings.pop("controls", "bins")
    action_space(controls)
    task, rest = _split(*_task(settings), ("render_mode", "autoreset_mode"))
    return WhamVectorEnv(task, num_envs, controls=controls, **rest)
