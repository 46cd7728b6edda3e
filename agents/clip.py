"""Whole clips from a published model's folder: pictures, a prompt and recorded actions to films.

Every film has a JSON beside it that says what it was made from; a film whose request is unchanged
is not made again, and a clip that was interrupted goes on after its last finished step.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from worldgym import checkpoint
from worldgym.agents.results import atomic_bytes
from worldgym.agents.video import write
from worldgym.clip import FPS, ClipSize, Prompt, Sampler, make_latents
from worldgym.envs.pixels import read_picture
from worldgym.errors import CheckpointError, ConfigError, DatasetError
from worldgym.gamepad import Gamepad, read_parquet
from worldgym.models.offload import offload
from worldgym.models.scope_files import ScopeFolder, layout_fingerprint
from worldgym.models.wan_vae import to_uint8

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a film is made from; equal requests make equal films on one machine.

    ``image`` and ``actions`` are SHA-256 of the files; ``model`` tells the network's layout and the
    stamp of all weights.
    """

    model: str
    image: str
    actions: str
    prompt: str
    negative: str
    height: int
    width: int
    frames: int
    steps: int
    shift: float
    guidance: float
    solver: str
    together: bool
    seed: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Job:
    """One film to make."""

    image: Path
    actions: Path
    out: Path

    @property
    def facts(self) -> Path:
        """Its JSON."""
        return self.out.with_suffix(".json")

    @property
    def part(self) -> Path:
        """The sample of an unfinished clip."""
        return self.out.with_name(f".{self.out.stem}.part.safetensors")


def jobs(image: Path, actions: Path, out: Path) -> list[Job]:
    """One job per picture; actions are one file for all, or a folder with a file per picture."""
    if not image.exists() or not actions.exists():
        lost = [str(p) for p in (image, actions) if not p.exists()]
        raise DatasetError("file is missing", given=lost, expected="a picture (or a folder of "
                           "them) and a parquet file (or a folder)", fix="check the paths")
    pictures = [image]
    if image.is_dir():
        pictures = sorted(p for p in image.iterdir() if p.suffix.lower() in PICTURES)
        if not pictures or len({p.stem for p in pictures}) < len(pictures):
            raise DatasetError("no pictures to begin with, or two of one name", given=image,
                               expected=f"files with different names ending in {PICTURES}",
                               fix="give a folder of pictures")
    rows = [actions / f"{p.stem}.parquet" if actions.is_dir() else actions for p in pictures]
    single = out.suffix == ".mp4"
    if single and len(pictures) > 1:
        raise ConfigError("one film cannot hold several clips", given=out,
                          expected="a folder", fix="give --out a folder")
    films = [out if single else out / f"{p.stem}.mp4" for p in pictures]
    return [Job(*job) for job in zip(pictures, rows, films, strict=True)]


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class ClipMaker:
    """Makes films; the network is loaded when the first one is really needed.

    Args:
        folder: the model.
        prompt, negative: texts, the same for all films.
        sampler: how to denoise.
        size: height and width; ``frames`` None = as many as the action file has rows.
        rounding: accept impossible sizes and lengths and round them as the published command does.
        offloaded: blocks of the network rest in host memory.
        say: receives progress lines.
    """

    def __init__(self, folder: ScopeFolder, prompt: str, negative: str, sampler: Sampler, *,
                 height: int, width: int, frames: int | None, rounding: bool, seed: int,
                 device: str, dtype: str, offloaded: bool = False,
                 say: Callable[[str], None] = print) -> None:
        if dtype not in DTYPES:
            raise ConfigError("unknown precision", given=dtype, expected=f"one of {[*DTYPES]}",
                              fix="use bfloat16, as published")
        self.folder, self.prompt, self.negative, self.sampler = folder, prompt, negative, sampler
        self.height, self.width, self.frames, self.rounding = height, width, frames, rounding
        self.seed, self.device, self.dtype, self.say = seed, device, dtype, say
        self.offloaded = offloaded
        self.model = f"{layout_fingerprint(folder.network.shapes)} {folder.stamp()}"
        self._loaded: tuple[Any, Any, Prompt] | None = None

    def plan(self, job: Job) -> tuple[Request, ClipSize, Gamepad]:
        """What a job asks for, with every rule checked before anything is loaded."""
        rows = read_parquet(job.actions)
        read_picture(job.image)
        size = ClipSize.fitting(self.height, self.width, self.frames or len(rows),
                                "down" if self.rounding else None)
        pad = rows.fit(size.frames, pad=self.rounding).check_range()
        s = self.sampler
        request = Request(
            model=self.model, image=_sha(job.image), actions=_sha(job.actions),
            prompt=self.prompt, negative=self.negative, height=size.height, width=size.width,
            frames=size.frames, steps=s.steps, shift=s.shift, guidance=s.guidance,
            solver=s.solver, together=s.together, seed=self.seed, dtype=self.dtype)
        return request, size, pad

    def parts(self) -> tuple[Any, Any, Prompt]:
        """Network, autoencoder and contexts; the text encoder is gone before the network comes."""
        if self._loaded is None:
            where: dict[str, Any] = {"device": self.device, "dtype": DTYPES[self.dtype]}
            self.say("encoding the prompts")
            texts = [self.prompt] + [self.negative] * (self.sampler.guidance != 1.0)
            contexts = self.folder.contexts(texts, **where)
            prompt = Prompt(contexts[:1], contexts[1:] if len(texts) > 1 else None)
            self.say("loading autoencoder and network")
            vae = self.folder.load_autoencoder(**where)
            if self.offloaded:
                dit = offload(self.folder.load_network(**where | {"device": "cpu"}), self.device)
            else:
                dit = self.folder.load_network(**where)
            self._loaded = dit, vae, prompt
        return self._loaded

    def make(self, job: Job) -> Path:
        """Make one film, or leave it if it is there."""
        request, size, pad = self.plan(job)
        if job.out.is_file() and _told(job.facts) == asdict(request):
            self.say(f"{job.out} is there already")
            return job.out
        dit, vae, prompt = self.parts()
        start = self._begun(job, request)
        job.out.parent.mkdir(parents=True, exist_ok=True)

        def watch(done: int, x: torch.Tensor) -> None:
            self.say(f"{job.out.name}: step {done} of {request.steps}")
            checkpoint.save(job.part, {"sample": x}, {"done": done, "request": asdict(request)})

        latents = make_latents(
            dit, vae, prompt, size, image_HWC=read_picture(job.image),
            mouse_BNJ=torch.from_numpy(pad.sticks_N4)[None],
            keyboard_BNK=torch.from_numpy(pad.buttons_N6)[None], seed=self.seed,
            sampler=self.sampler, start=start, watch=watch)
        self.say(f"{job.out.name}: decoding")
        frames = to_uint8(vae.decode(latents))[0].cpu().numpy()
        job.facts.unlink(missing_ok=True)  # they vouch for a whole film
        write(job.out, list(frames), FPS)
        atomic_bytes(job.facts, json.dumps(asdict(request), indent=1).encode())
        # and what runs that were killed while they wrote it left
        for left in (job.part, *job.part.parent.glob(f".{glob.escape(job.part.name)}.*.tmp")):
            left.unlink(missing_ok=True)
        return job.out

    def _begun(self, job: Job, request: Request) -> tuple[int, torch.Tensor] | None:
        """Where an interrupted clip of the same request stopped."""
        if not job.part.is_file() or request.solver != "euler":  # unipc remembers more than that
            return None
        try:
            tensors, told = checkpoint.load_tensors(job.part)
        except CheckpointError:
            tensors, told = {}, {}
        if told.get("request") != asdict(request) or "sample" not in tensors:
            self.say(f"{job.part.name} belongs to another request: starting anew")
            return None
        self.say(f"{job.out.name}: going on after step {told['done']}")
        return int(told["done"]), tensors["sample"]


def _told(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
