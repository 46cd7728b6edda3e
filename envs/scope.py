"""``worldgym/SCOPE-v0``: SCOPE's published folder as a task; start pictures and prompts.

Shapes: B slot, H W pixels, L text token, D text width.
"""

import functools
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.data.starts import hash64
from worldgym.envs.pixels import read_picture
from worldgym.envs.tasks import Task
from worldgym.envs.vector import DreamVectorEnv
from worldgym.errors import ConfigError, DTypeError

ID = "worldgym/SCOPE-v0"
SAMPLING = ("steps", "guidance", "shift", "solver", "together")
WORLD = ("height", "width", "latents", "carry", "remember", "temperature")
PLACE = ("device", "dtype", "offload", "config")
SETTINGS = ("model", "image", "prompt", "negative_prompt", *SAMPLING, *WORLD, *PLACE)
KEPT_PROMPTS = 64
log = logging.getLogger("worldgym")


class ScopeStarts:
    """Where episodes begin: pictures, each with its prompt; and what ``reset`` may be told instead.

    Args:
        world: a ``ScopeWorld``.
        pictures: uint8 (H, W, 3) of the world's size, at least one.
        prompts: one per picture. negative: what is not to be seen.
        encode: prompts to their contexts (L, D); asked once for every new prompt.
    """

    options = ("image", "prompt", "negative_prompt")

    def __init__(self, world: Any, pictures: Sequence[np.ndarray], prompts: Sequence[str],
                 negative: str, encode: Callable[[list[str]], list[Any]]) -> None:
        self.world, self.pictures, self.prompts = world, list(pictures), list(prompts)
        self.negative, self._encode = negative, encode
        self._contexts: OrderedDict[str, Any] = OrderedDict()
        self._latents: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, seeds: Any, episodes: Any, beginnings_only: bool = False) -> np.ndarray:
        """Index of the start for each (seed, episode); depends on nothing else. All of them are
        beginnings."""
        return (hash64(seeds, episodes) % np.uint64(len(self))).astype(np.int64)

    def gather(self, indices: Any) -> Any:
        """These starts (repeats allowed) as ``Starts``."""
        import torch

        index = [int(i) for i in indices]
        for i in index:
            if i not in self._latents:
                self._latents[i] = self.world.encode(self.pictures[i][None])[0]
        latents = torch.stack([self._latents[i] for i in index])
        return self._starts(latents, [{"prompt": self.prompts[i]} for i in index])

    def last_frames(self, indices: Any) -> np.ndarray:
        """Pictures of these starts, uint8 (B, H, W, 3)."""
        return np.stack([self.pictures[int(i)] for i in indices])

    def encode_frames(self, world: Any, frames: np.ndarray) -> Any:
        """Starts of these frames (B, H, W, 3) uint8, with the first start's prompt."""
        return self._starts(world.encode(frames), [{"prompt": self.prompts[0]}] * len(frames))

    def tell(self, starts: Any, texts: Sequence[dict | None]) -> Any:
        """The starts with the texts that are given instead of their own.

        A negative prompt has no effect at guidance 1, where none is used.
        """
        import torch

        context, negative = starts.context_BLD.clone(), starts.negative_BLD
        negative = None if negative is None else negative.clone()
        for name, held in (("prompt", context), ("negative_prompt", negative)):
            told = {i: check_text(name, t[name]) for i, t in enumerate(texts)
                    if t and t.get(name) is not None}
            if held is not None:  # at guidance 1 there is no negative prompt
                for i, text in zip(told, self.contexts(list(told.values())), strict=True):
                    held[i] = torch.as_tensor(text)
        return replace(starts, context_BLD=context, negative_BLD=negative)

    def picture(self, image: Any) -> np.ndarray:
        """A picture, or the path of one, as a frame: centre crop to the aspect, bicubic."""
        return fitted(image, self.world.size)

    def contexts(self, texts: Sequence[str]) -> list[Any]:
        """Contexts (L, D), encoded once per text."""
        new = [t for t in dict.fromkeys(texts) if t not in self._contexts]
        if new:
            self._contexts.update(zip(new, self._encode(new), strict=True))
        out = []
        for text in texts:
            self._contexts.move_to_end(text)
            out.append(self._contexts[text])
        while len(self._contexts) > max(KEPT_PROMPTS, len(self) + 1):
            self._contexts.popitem(last=False)
        return out

    def _starts(self, latents_BChw: Any, texts: list[dict]) -> Any:
        import torch

        from worldgym.state import Starts

        b, action = len(latents_BChw), self.world.spec.action
        context = torch.stack(self.contexts([t["prompt"] for t in texts]))
        negative = None
        if self.world.guided:
            negative = self.contexts([self.negative])[0].expand(b, -1, -1)
        return Starts(latents_BChw[:, None], np.zeros((b, 1, *action.shape), np.float32),
                      np.ones((b, 1), bool), np.ones(b, np.int64), context_BLD=context,
                      negative_BLD=negative)


def check_text(name: str, text: Any) -> str:
    """A prompt, or DTypeError."""
    if not isinstance(text, str):
        raise DTypeError(f"{name} is not a text", given=type(text).__name__, expected="a str",
                         fix=f'pass {name}="a soldier in a hall"')
    return text


def fitted(image: Any, size: Any) -> np.ndarray:
    """A picture (array or path) as a frame of the world's size."""
    from worldgym.clip import fit_image
    from worldgym.envs.spaces import to_numpy

    return fit_image(to_numpy(read_picture(image)), size)


@functools.lru_cache(maxsize=1)
def _parts(folder: str, stamp: int, device: str, dtype: str, offloaded: bool,
           config: tuple) -> tuple[Any, Any, str]:
    """Network, autoencoder, fingerprint; loaded once per process."""
    import torch

    from worldgym.models.offload import offload
    from worldgym.models.scope_files import layout_fingerprint, open_folder

    found, kind = open_folder(folder, dict(config)), getattr(torch, dtype)
    vae = found.load_autoencoder(device=device, dtype=kind)
    dit = found.load_network(device="cpu" if offloaded else device, dtype=kind)
    values = dit.head.modulation.float().cpu().numpy().tobytes()
    print_ = f"{layout_fingerprint(found.network.shapes)} {hashlib.md5(values).hexdigest()}"
    return offload(dit, device) if offloaded else dit, vae, f"{print_} {dtype}"


@functools.lru_cache(maxsize=4)
def _world(parts: tuple, sampling: tuple, settings: tuple) -> Any:
    from worldgym.clip import Sampler
    from worldgym.models.scope_world import ScopeWorld

    dit, vae, print_ = _parts(*parts)
    return ScopeWorld(dit, vae, sampler=Sampler(**dict(sampling)), fingerprint=print_,
                      **dict(settings))


def load_scope(model: str | Path | None = None, *, image: Any = None,
               prompt: str | Sequence[str] = "", negative_prompt: str | None = None,
               device: str | None = None, dtype: str | None = None, offload: bool = False,
               config: dict | None = None, task: dict | None = None, **settings: Any) -> Task:
    """SCOPE's task.

    Args:
        model: folder with SCOPE's published files.
        image: picture that episodes begin with (array, path, or a list of them); None: a plain grey
            one, so that ``reset()`` always works; ``reset(options={"image": ...})`` is the way.
        prompt: text of every picture, or one per picture. negative_prompt: None: the published one.
        device: None: cuda where there is one. dtype: None: bfloat16 on cuda, else float32.
        offload: blocks rest in host memory and visit the device one by one.
        config: facts that neither tensors nor config.json tell, e.g. {"num_heads": 2}.
        task: fields of ``Task``.
        settings: steps, guidance, shift, solver, together (``clip.Sampler``); height, width,
            latents, carry, remember, temperature (``ScopeWorld``).

    Raises:
        ConfigError: no folder, or an impossible setting. CheckpointError: files missing or broken.
    """
    if model is None:
        raise ConfigError("no model folder", given="no model", expected="SCOPE's published folder",
                          fix=f'gymnasium.make("{ID}", model="FOLDER"); `worldgym inspect FOLDER` '
                          "says what is missing")
    import torch

    from worldgym.clip import NEGATIVE_PROMPT, ClipSize
    from worldgym.models.scope_files import open_folder

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError("unknown precision", given=dtype, expected="bfloat16 or float32",
                          fix="use bfloat16, as published")
    found = open_folder(model, config)  # every mistake before anything is loaded
    size = ClipSize(settings.get("height", 480), settings.get("width", 832), 5)
    pictures, prompts = _pictures(image, size), [prompt] if isinstance(prompt, str) else prompt
    if len(prompts) == 1:
        prompts = list(prompts) * len(pictures)
    if len(prompts) != len(pictures):
        raise ConfigError("prompts and pictures differ in number",
                          given=f"{len(prompts)} prompts, {len(pictures)} pictures",
                          expected="one prompt, or one per picture", fix="give as many prompts")
    negative = NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    kind = getattr(torch, dtype)

    def encode(texts: list[str]) -> list[Any]:
        """The encoder is loaded for this and let go again; every prompt alone, for its bits."""
        return [t.to(device) for t in found.each_context(texts, device=device, dtype=kind)]

    sampling = {k: settings.pop(k) for k in SAMPLING if k in settings}
    texts = [check_text("prompt", p) for p in prompts] + [check_text("negative_prompt", negative)]
    first = dict(zip(texts, encode(texts), strict=True))  # before the network needs the memory
    stamp = sum(f.stat().st_mtime_ns for f in found.network.need().files)
    key = (str(found.path.resolve()), stamp, str(device), dtype, bool(offload),
           tuple(sorted((config or {}).items())))
    world = _world(key, tuple(sorted(sampling.items())), tuple(sorted(settings.items())))
    starts = ScopeStarts(world, pictures, prompts, negative, encode)
    starts._contexts.update(first)
    return Task(world=world, starts=starts, name=ID, **(task or {}))


def _pictures(image: Any, size: Any) -> list[np.ndarray]:
    if image is None:
        log.info("%s: no start picture was given: episodes begin on plain grey", ID)
        return [np.full((size.height, size.width, 3), 128, np.uint8)]
    many = image if isinstance(image, list | tuple) else [image]
    if not len(many):
        raise ConfigError("no start picture", given="an empty list", expected="at least one",
                          fix='give image="first.png"')
    return [fitted(picture, size) for picture in many]


def scope(**settings: Any) -> Any:
    """Entry point of ``gymnasium.make("worldgym/SCOPE-v0", model=FOLDER)``.

    One step makes 4 * ``latents`` new frames. Action: buttons (fire, aim, jump, melee, reload,
    switch weapon), move (x, y), camera (x, y); **y below 0 is forward** and, for the camera, up; x
    below 0 is left. ``flat_actions=True``: one Box of ten numbers in this order.
    ``reset(options={"image": picture or path, "prompt": text, "negative_prompt": text})``; what is
    not told is as the env was made. Settings: those of ``load_scope`` and ``make_dream``.
    """
    from worldgym.envs.make import make_dream

    return make_dream(ID, **settings)


def scope_vector(num_envs: int = 1, **settings: Any) -> DreamVectorEnv:
    """Entry point of ``gymnasium.make_vec("worldgym/SCOPE-v0", model=FOLDER)``.

    Options of ``reset``: "image" (for all slots) or "images" (one each); texts for all or a list.
    """
    from worldgym.envs.make import make_dream_vector

    return make_dream_vector(ID, num_envs, **settings)
