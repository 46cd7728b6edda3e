"""``worldgym/WorldPlay-v0``: WorldPlay's published folder as a task and as environments.

Shapes: B slot, T raw frame, F latent frame, H W pixels, L text token, D text width.
"""

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.camera import check_poses, inverse
from worldgym.envs.dream import DreamEnv
from worldgym.envs.make import _split
from worldgym.envs.scope import check_text
from worldgym.envs.spaces import to_numpy
from worldgym.envs.tasks import Task
from worldgym.envs.vector import DreamVectorEnv
from worldgym.envs.worldplay_starts import Clip, WorldPlayStarts, fitted
from worldgym.errors import ConfigError, DTypeError, ShapeError

ID = "worldgym/WorldPlay-v0"
WORLD = ("opening", "longest", "temperature", "fps", "memory", "positions")
PLACE = ("device", "dtype", "height", "width", "companions", "network")
SETTINGS = ("model", "image", "prompt", "controls", "move", "turn", "K", *WORLD, *PLACE)
log = logging.getLogger("worldgym")


# -- the task -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _parts(folder: str, companions: str | None, network: str, stamp: int, device: str,
           dtype: str) -> tuple[Any, Any, str]:
    """Network, autoencoder, fingerprint; loaded once per process."""
    import torch

    from worldgym import checkpoint
    from worldgym.models.worldplay_files import find

    found, kind = find(folder, companions), getattr(torch, dtype)
    assert found is not None
    dit = found.load_network(network, device=device, dtype=kind)
    values = next(dit.parameters()).detach().float().cpu().numpy().tobytes()
    print_ = f"{checkpoint.fingerprint(dit)} {hashlib.md5(values).hexdigest()} {dtype}"
    return dit, found.load_autoencoder(device=device, dtype=kind), print_


@functools.lru_cache(maxsize=4)
def _world(parts: tuple, frame_hw: tuple[int, int], controls: tuple, K: tuple,
           settings: tuple) -> Any:
    from worldgym.models.controls import Controls
    from worldgym.models.film import WanVideo
    from worldgym.models.worldplay_files import LICENCE
    from worldgym.models.worldplay_world import WorldPlayWorld

    dit, vae, print_ = _parts(*parts)
    return WorldPlayWorld(dit, WanVideo(vae, frame_hw), controls=Controls(**dict(controls)),
                          fingerprint=print_, licence=LICENCE, K_33=np.reshape(K, (3, 3)),
                          **dict(settings))


def load_worldplay(model: str | Path | None = None, *, image: Any = None,
                   prompt: str | Sequence[str] = "", companions: str | Path | None = None,
                   network: str | None = None, controls: str = "keys", move: float | None = None,
                   turn: float | None = None, K: Any = None, height: int = 704, width: int = 1280,
                   device: str | None = None, dtype: str | None = None,
                   task: Mapping[str, Any] | None = None, **settings: Any) -> Task:
    """WorldPlay's task (its Wan variant); no reward and no end of its own.

    Args:
        model: folder with WorldPlay's published files; ``companions``: folder with ``vae``,
            ``text_encoder`` and ``tokenizer``, if they are not there.
        image: picture that episodes begin with (array, path, or a list of them); None: episodes
            begin with nothing, and the first step dreams the first frame from the prompt.
        prompt: text of every picture, or one per picture.
        network: subfolder of the weights; None: the distilled ones.
        controls: "keys", "deltas" or "poses", with move and turn as in ``Controls``.
        K: pixel intrinsics (3, 3); None: the published ones.
        height, width: of the frames. device: None: cuda where there is one. dtype: None: bfloat16
            on cuda, else float32.
        task: fields of ``Task``. settings: ``WORLD``, as in ``WorldPlayWorld``.

    Raises:
        ConfigError: no folder, or an impossible setting. CheckpointError: files missing or broken.
    """
    import torch

    from worldgym import camera
    from worldgym.models import worldplay_files as files

    found = None if model is None else files.find(model, companions)
    if found is None:
        raise ConfigError("no WorldPlay folder", given=repr(model), expected="the published folder",
                          fix=f'gymnasium.make("{ID}", model="FOLDER"); `worldgym inspect FOLDER` '
                          "says what is missing")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
    if dtype not in ("bfloat16", "float32") or (
            controls not in ("keys", "deltas", "poses")):
        raise ConfigError("unknown precision or controls", given=f"{dtype}, {controls!r}",
                          expected='bfloat16 or float32; "keys", "deltas" or "poses"',
                          fix="leave them out")
    network = network or (files.WAN if files.WAN in found.parts else files.BACKBONE)
    weights = found._part(network)
    if weights.kind not in ("wan", "backbone"):
        raise ConfigError("not a network of the Wan variant", given=network, fix="leave it out",
                          expected=f"{files.WAN!r} or {files.BACKBONE!r}")
    stamp = weights.need().files[0].stat().st_mtime_ns
    many = list(image) if isinstance(image, list | tuple) else [image]
    pictures = [None if p is None else fitted(p, (height, width)) for p in many]
    prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
    if not pictures or len(prompts) != len(pictures):
        raise ConfigError("prompts and pictures differ in number",
                          given=f"{len(prompts)} prompts, {len(pictures)} pictures",
                          expected="one prompt, or one per picture", fix="give as many prompts")
    prompts = [check_text("prompt", p) for p in prompts]
    kind = getattr(torch, dtype)

    def encode(texts: list[str]) -> list[Any]:
        """The encoder is loaded for this and let go again; every prompt alone, for its bits."""
        return [found.contexts([t], device=device, dtype=kind)[0].to(device) for t in texts]

    keys = {"kind": controls} | {n: v for n, v in (("move", move), ("turn", turn)) if v is not None}
    K_33 = np.asarray(camera.DEFAULT_K if K is None else K, np.float64)
    camera.normalised(K_33)
    world = _world((str(found.path.resolve()), None if companions is None else str(companions),
                    network, stamp, str(device), dtype), (height, width),
                   tuple(sorted(keys.items())), tuple(K_33.ravel().tolist()),
                   tuple(sorted(settings.items())))
    return Task(world=world, starts=WorldPlayStarts(world, pictures, prompts, encode), name=ID,
                **(task or {}))


# -- the environments -----------------------------------------------------------------------------


class WorldPlayFace:
    """Mixin over a face: prompts that change between steps, starts of several frames."""

    core: Any

    @property
    def prompts(self) -> list[str]:
        """The prompt of every slot, as reset and ``set_prompt`` gave it."""
        return self.core.task.world.prompts(self.core.ready().world)

    @property
    def poses(self) -> np.ndarray:
        """Where the camera of every slot stands now, c2w (B, 4, 4); identity at the start."""
        pasts = self.core.ready().world.extra["past"]
        return np.stack([inverse(p.history.of("w2c")[-1]) if len(p.history) else np.eye(4)
                         for p in pasts])

    def along(self, path: Any, slot: int = 0) -> np.ndarray:
        """Actions (steps, frames, *action) that lead a slot's camera along poses from where it is.

        Needs ``actions="per_frame"``. ``path``: ``worldgym.trajectory.Trajectory`` (whose lens
        does not count: the world has its own) or c2w (N, 4, 4), one pose per latent frame, of which
        the first is where the camera stands now. So an episode that begins with a picture or with
        nothing goes n steps along 4 n poses; later, or after a video, 4 n + 1 are needed.

        Raises:
            ShapeError: too few poses, or a broken step. ActionError: the controls cannot go there.
        """
        if not self.core.per_frame:
            raise ConfigError("poses need an action per frame", given='actions="hold"',
                              expected='actions="per_frame"', fix="make the env with it")
        state, world = self.core.ready().world, self.core.task.world
        rows = world.controls.along(getattr(path, "c2w_N44", path))
        begins, n = not len(state.extra["past"][slot].history), world.memory.chunk
        if begins:  # the start is a latent frame of the first step, and its action is not heard
            rows = np.concatenate([np.zeros((1, *rows.shape[1:]), rows.dtype), rows])
        if len(rows) % n or not len(rows):
            whole = max(1, -(-len(rows) // n)) * n + (not begins)
            raise ShapeError("poses do not fill whole steps", given=f"{len(rows) + (not begins)} "
                             f"poses", expected=f"{n} per step{'' if begins else ', and one more'}",
                             fix=f"give {whole}, or fewer (Trajectory.cut)")
        return rows.reshape(-1, n, *rows.shape[1:]).repeat(world.video.pictures, 1)

    def _tell(self, slots: Sequence[int], texts: Sequence[str], events: Sequence[str]) -> None:
        texts = [check_text("prompt", t) for t in texts]
        said = [f"{t} {check_text('event', e)}".strip() for t, e in zip(texts, events, strict=True)]
        bank, world = self.core.task.starts, self.core.task.world
        contexts = bank.contexts(said) if getattr(bank, "reads", True) else said
        self.core.change(lambda state: world.tell(state, slots, contexts, texts))

    def _clip(self, frames: Any, poses: Any) -> Clip:
        array = np.asarray(to_numpy(frames))
        hw = tuple(self.core.spec.frame_hw)
        if array.ndim != 4 or array.shape[1:] != (*hw, 3) or not len(array):
            raise ShapeError("start frames have the wrong shape", given=array.shape,
                             expected=f"(T, {hw[0]}, {hw[1]}, 3)", fix="stack them, oldest first")
        if array.dtype != np.uint8:
            raise DTypeError("start frames have the wrong dtype", given=array.dtype,
                             expected="uint8 in 0..255", fix="scale to 0..255 and cast")
        return Clip(array.copy(), None if poses is None else check_poses(poses))


class WorldPlayEnv(WorldPlayFace, DreamEnv):
    """A WorldPlay dream; ``DreamEnv`` says what all dreams share.

    - A step is a chunk: 4 latent frames, 16 frames. Action: ``controls="keys"``, (move, turn) of
      nine classes each, "deltas", (forward, right, yaw, pitch), or "poses", with (down, roll) more;
      held over the latent frames, or with ``actions="per_frame"`` one per frame, of which each
      latent frame hears its first. ``along`` makes such actions of a whole sequence of poses.
    - ``reset`` shows the start picture as it was given (black where none is) and generates nothing.
      The **first step makes 13 frames**, not 16: its ``info["frames"]`` begin with the start
      picture as the network draws it, at the start pose (``info["first_frame"]`` is 3: that many
      of the chunk's 16 are left out), and only the last 12 come of the action. With
      ``opening="still"`` the picture first stands still for a chunk in memory, and every step makes
      16 frames.
    - ``reset(options={"prompt": text, "image": picture or path})``; ``{"frames": (T, H, W, 3),
      "poses": c2w (F, 4, 4)}`` continues a video of T = 13 + 16 j frames (or T = 1).
    - ``set_prompt(text)`` between steps takes effect in the next chunk.
    - ``info["poses"]``: c2w (4, 4, 4) of the chunk's latent frames, relative to the start;
      ``info["retrieved"]``: latent frames of the past that the chunk saw (16, filled with -1).
    - Saved states, forks and replays are exact, memory, prompt and decoder included.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """As ``DreamEnv.reset``, with "frames" and "poses" in the options."""
        if isinstance(options, dict) and {"frames", "poses"} & set(options):
            self.core.check_open()
            check_pair(options)
            rest = {k: v for k, v in options.items() if k not in ("frames", "poses")}
            options = {**rest, "frame": self._clip(options["frames"], options.get("poses"))}
        return super().reset(seed=seed, options=options)

    @property
    def prompt(self) -> str:
        """The prompt, as reset and ``set_prompt`` gave it (without an event)."""
        return self.prompts[0]

    def set_prompt(self, text: str, event: str = "") -> None:
        """From the next chunk on, dream of ``text``, followed by ``event`` (which ``prompt`` does
        not tell: see ``Events``).

        Raises:
            ResetNeeded, ClosedError, DTypeError; ConfigError: a world that reads no text.
        """
        self._tell([0], [text], [event])


class WorldPlayVectorEnv(WorldPlayFace, DreamVectorEnv):
    """WorldPlay dreams in one batch; options "frames" and "poses" hold one entry per slot."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        """As ``DreamVectorEnv.reset``, with several frames and "poses" per slot."""
        if isinstance(options, dict) and {"frames", "poses"} & set(options):
            self.core.check_open()
            check_pair(options)
            frames = list(options["frames"])
            poses = list(options.get("poses") or [None] * len(frames))
            if len(poses) != len(frames):
                raise ShapeError("wrong number of start poses", given=len(poses),
                                 expected=len(frames), fix="give poses or None for every slot")
            hw = tuple(self.core.spec.frame_hw)
            clips = [f if f is None else self._clip(f[None] if np.shape(f) == (*hw, 3) else f, p)
                     for f, p in zip(frames, poses, strict=True)]
            options = {**{k: v for k, v in options.items() if k != "poses"}, "frames": clips}
        return super().reset(seed=seed, options=options)

    def set_prompt(self, text: str | Sequence[str], event: str | Sequence[str] = "") -> None:
        """From the next chunk on, dream of these texts: one for all slots, or one each."""
        b = self.num_envs
        told = [[x] * b if isinstance(x, str) else list(x) for x in (text, event)]
        if any(len(x) != b for x in told):
            raise ShapeError("wrong number of prompts", given=[len(x) for x in told], expected=b,
                             fix="give one text, or one per slot")
        self._tell(list(range(b)), *told)


def check_pair(options: dict[str, Any]) -> None:
    """ConfigError for start poses without frames, or for two starts."""
    if "frames" not in options:
        raise ConfigError("start poses without frames", given=sorted(options),
                          expected='"frames" and "poses"', fix="give the frames they belong to")
    if {"frame", "start", "image", "images"} & set(options):
        raise ConfigError("contradictory reset options", given=sorted(options),
                          expected="one start", fix="pass only one")


def _task(settings: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
    own = {k: settings.pop(k) for k in SETTINGS if k in settings}
    return load_worldplay(**own), settings


def worldplay(**settings: Any) -> WorldPlayEnv:
    """Entry point of ``gymnasium.make("worldgym/WorldPlay-v0", model=FOLDER)``.

    Settings: those of ``load_worldplay`` and ``make_dream`` (reward, end, horizon, ...).
    """
    task, rest = _split(*_task(settings), ("render_mode",))
    return WorldPlayEnv(task, **rest)


def worldplay_vector(num_envs: int = 1, **settings: Any) -> WorldPlayVectorEnv:
    """Entry point of ``gymnasium.make_vec("worldgym/WorldPlay-v0", model=FOLDER)``."""
    task, rest = _split(*_task(settings), ("render_mode", "autoreset_mode"))
    return WorldPlayVectorEnv(task, num_envs, **rest)


def rooms(**settings: Any) -> WorldPlayEnv:
    """Entry point of ``gymnasium.make("worldgym/Rooms-v0")``, a small world of four rooms.

    A key is held for the step's 4 frames; the start picture stands still in memory, so that every
    step makes 4 frames. Settings: those of ``make_dream``.
    """
    task, rest = _split("worldgym/Rooms-v0", settings, ("render_mode",))
    return WorldPlayEnv(task, **rest)


def rooms_vector(num_envs: int = 1, **settings: Any) -> WorldPlayVectorEnv:
    """Entry point of ``gymnasium.make_vec("worldgym/Rooms-v0")``."""
    task, rest = _split("worldgym/Rooms-v0", settings, ("render_mode", "autoreset_mode"))
    return WorldPlayVectorEnv(task, num_envs, **rest)
