"""One training loop for every part: progress, TensorBoard, checkpoints, resume, DDP.

A step's data and noise depend on (seed, iteration) alone, so a run that was killed continues from
its last checkpoint as if nothing had happened, on any number of processes.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from worldgym.errors import CheckpointError
from worldgym.train.distributed import Group

Loss = Callable[[nn.Module, dict, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long and how to optimise one part."""

    iterations: int
    lr: float = 3e-4
    warmup: int = 100
    decay: float = 0.3  # the last share of the iterations lowers the rate linearly to a twentieth
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.999
    muon: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 200


def learning_rate(cfg: LoopConfig, i: int) -> float:
    """Linear warm-up, constant, linear decay."""
    tail = cfg.iterations * (1 - cfg.decay)
    down = 1.0 if i < tail else 1 - 0.95 * (i - tail) / max(1.0, cfg.iterations - tail)
    return cfg.lr * min(1.0, (i + 1) / cfg.warmup) * down


def optimizers(module: nn.Module, cfg: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything; with ``cfg.muon`` the matrices inside blocks go to Muon instead.

    Muon (Jordan et al., 2024) orthogonalises the update of a matrix; a small DiT needs about a
    third fewer iterations with it. Embeddings, norms and the output stay with AdamW.
    """
    matrices, rest, plain = [], [], []
    for name, p in module.named_parameters():
        if cfg.muon and p.ndim == 2 and "blocks." in name:
            matrices.append(p)
        else:
            (rest if p.ndim > 1 else plain).append(p)
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        [{"params": rest, "weight_decay": cfg.weight_decay},
         {"params": plain, "weight_decay": 0.0}], lr=cfg.lr, betas=cfg.betas)]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay,
                                    adjust_lr_fn="match_rms_adamw"))
    return out


class Loop:
    """Optimise ``module`` in place; its EMA copy is ``self.ema`` (a state dict)."""

    def __init__(self, name: str, module: nn.Module, cfg: LoopConfig, folder: Path,
                 group: Group | None = None) -> None:
        self.name, self.module, self.cfg, self.folder = name, module, cfg, folder
        self.group = group or Group()
        self.wrapped = self.group.wrap(module)
        self.optimizers = optimizers(self.wrapped, cfg)
        self.ema = {k: v.detach().clone() for k, v in self.group.state(module).items()}
        self.iteration, self.seconds = 0, 0.0
        self.path = folder / f"{name}.ckpt"
        self.history: list[dict] = []

    def run(self, sample: Callable[[int], dict], loss: Loss, tensorboard: bool = True) -> None:
        """Train to ``cfg.iterations``, resuming from ``folder/name.ckpt`` if it is there."""
        self.resume()
        writer = self._writer() if tensorboard and self.group.first else None
        bar = tqdm(total=self.cfg.iterations, initial=self.iteration, desc=self.name,
                   disable=not self.group.first, mininterval=5.0, smoothing=0.05)
        sums: dict[str, float] = {}
        self.wrapped.train()
        try:
            while self.iteration < self.cfg.iterations:
                start = time.perf_counter()
                values = self._step(sample, loss)
                self.seconds += time.perf_counter() - start
                for key, value in values.items():
                    sums[key] = sums.get(key, 0.0) + value
                bar.update()
                if self.iteration % self.cfg.log_every == 0:
                    self._log({k: v / self.cfg.log_every for k, v in sums.items()}, writer, bar)
                    sums = {}
                if self.iteration % self.cfg.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
            if writer:
                writer.close()
        self.save()
        self.wrapped.eval()

    def _step(self, sample: Callable[[int], dict], loss: Loss) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + self.iteration)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for g in optimizer.param_groups:
                g["lr"] = learning_rate(self.cfg, self.iteration)
        value, logs = loss(self.wrapped, sample(self.iteration), generator)
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.wrapped.parameters(), self.cfg.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise CheckpointError(
                f"training of {self.name} diverged", given=f"gradient norm {norm}",
                expected="a finite number", fix="lower the learning rate and start again",
            )
        for optimizer in self.optimizers:
            optimizer.step()
        self.iteration += 1
        rate = min(self.cfg.ema, (1 + self.iteration) / (10 + self.iteration))
        with torch.no_grad():
            for key, live in self.group.state(self.module).items():
                if live.is_floating_point():
                    self.ema[key].lerp_(live, 1 - rate)
        return self.group.mean({"loss": float(value.detach()), **logs, "grad": norm})

    def save(self) -> None:
        """Write model, EMA, optimiser and counters atomically."""
        state = self.group.full(self.module, self.optimizers)
        if not self.group.first:
            return
        state |= {"ema": self.ema, "iteration": self.iteration, "seconds": self.seconds,
                  "config": asdict(self.cfg), "history": self.history}
        part = self.path.with_suffix(".part")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            self.group.load(self.module, self.optimizers, state)
            for key, value in state["ema"].items():
                self.ema[key].copy_(value)
            self.iteration, self.seconds = state["iteration"], state["seconds"]
            self.history = state["history"]
        except (KeyError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(
                "cannot resume training", given=f"{self.path} ({error})",
                expected="a checkpoint of the same sizes", fix="use a new output folder",
            ) from error

    def load_ema(self) -> None:
        """Put the averaged weights into the module."""
        self.group.load_model(self.module, self.ema)

    def _log(self, values: dict[str, float], writer, bar) -> None:
        row = {"iteration": self.iteration, "seconds": round(self.seconds, 1), **values}
        self.history.append({k: round(float(v), 6) for k, v in row.items()})
        bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()})
        if self.group.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"{self.name}.jsonl", "a") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
        if writer:
            for key, value in values.items():
                writer.add_scalar(f"{self.name}/{key}", value, self.iteration)

    def _writer(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # TensorBoard is an extra; the .jsonl log is always there
            return None
        return SummaryWriter(str(self.folder / "tensorboard"))
