"""``worldgym clip``: a published model, pictures, a prompt and recorded actions to films."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Clip:
    """Make whole clips with a published model's weights; run it again after an interruption.

    Args:
        model: folder with SCOPE's published files.
        image: first frame, or a folder of pictures.
        actions: parquet file with one row per frame, or a folder with NAME.parquet per picture.
        prompt: what is to be seen.
        negative: what is not to be seen; default: the published text.
        out: folder for the films, or one .mp4 file.
        height: of the film, a multiple of 32.
        width: likewise.
        frames: 4k + 1; default: as many as the action file has rows.
        steps: denoising steps.
        shift: of the schedule towards noise.
        guidance: weight of the prompt; 1 makes it twice as fast.
        solver: euler, as published, or unipc, which needs fewer steps (and begins anew when it was
            interrupted).
        together: both passes of guidance as one batch: faster where one does not fill the GPU.
        offload: blocks of the network rest in host memory and visit the GPU one by one; fits 24 GB.
        seed: of the starting noise.
        round: round impossible sizes and lengths, and repeat or cut action rows, instead of erring.
        device: cuda or cpu; default: cuda where there is one.
        dtype: bfloat16 (as published) or float32.
    """

    model: Path
    image: Path
    actions: Path
    prompt: str
    negative: str | None = None
    out: Path = Path("runs/clip")
    height: int = 480
    width: int = 832
    frames: int | None = None
    steps: int = 30
    shift: float = 5.0
    guidance: float = 5.0
    solver: str = "euler"
    together: bool = False
    offload: bool = False
    seed: int = 0
    round: bool = False
    device: str | None = None
    dtype: str = "bfloat16"

    def run(self) -> None:
        """Make the films."""
        import torch

        from worldgym.agents.clip import ClipMaker, jobs
        from worldgym.clip import NEGATIVE_PROMPT, Sampler
        from worldgym.models.scope_files import open_folder

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        sampler = Sampler(steps=self.steps, shift=self.shift, guidance=self.guidance,
                          solver=self.solver, together=self.together)
        negative = NEGATIVE_PROMPT if self.negative is None else self.negative
        todo = jobs(self.image, self.actions, self.out)
        maker = ClipMaker(open_folder(self.model), self.prompt, negative, sampler,
                          height=self.height, width=self.width, frames=self.frames,
                          rounding=self.round, seed=self.seed, device=device, dtype=self.dtype,
                          offloaded=self.offload)
        for job in todo:
            maker.plan(job)  # every mistake before the first minute of work
        for job in todo:
            print("written:", maker.make(job))
