"""One training loop for every part: progress, TensorBoard, checkpoints, resume, many processes.

A step's data and noise depend on (seed, iteration) alone, so a run that was killed continues from
its last checkpoint as if nothing had happened, on any number of processes (sharded runs only as
sharded ones: their optimiser differs, see ``optimizers``).
"""

import contextlib
import copy
import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from worldgym.errors import CheckpointError, NotFiniteError
from worldgym.train.distributed import Group, fill, whole
from worldgym.train.muon import Muon

BLOCKS = ("blocks.", ".h.")  # where a DiT and a GPT keep their blocks
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
    ema_from: int | None = None  # the average is the weights themselves until then; None: a ramp
    skip: float | None = None  # leave out updates whose gradient norm is this or more
    muon: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    compile: bool = False  # fuse the network's operations; the first iterations take minutes


def learning_rate(cfg: LoopConfig, i: int) -> float:
    """Linear warm-up (over a tenth of the iterations at most), constant, linear decay."""
    tail = cfg.iterations * (1 - cfg.decay)
    down = 1.0 if i < tail else 1 - 0.95 * (i - tail) / max(1.0, cfg.iterations - tail)
    warmup = max(1, min(cfg.warmup, cfg.iterations // 10))
    return cfg.lr * min(1.0, (i + 1) / warmup) * down


def optimizers(module: nn.Module, cfg: LoopConfig,
               shard: bool = False) -> list[torch.optim.Optimizer]:
    """AdamW for everything; with ``cfg.muon`` the matrices inside blocks go to Muon instead.

    Muon (Jordan et al., 2024) orthogonalises the update of a matrix; a small DiT needs about a
    third fewer iterations with it. Embeddings, norms and the output stay with AdamW. Muon needs
    whole matrices: with ``shard`` every parameter goes to AdamW.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if cfg.muon and not shard and p.ndim == 2 and any(part in name for part in BLOCKS):
            matrices.append(p)
        else:
            (rest if p.ndim > 1 else plain).append(p)
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        [{"params": rest, "weight_decay": cfg.weight_decay},
         {"params": plain, "weight_decay": 0.0}], lr=cfg.lr, betas=cfg.betas)]
    if matrices:
        out.append(Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay))
    return out


class Loop:
    """Optimise ``module``; its averaged copy (EMA) is ``self.ema``, a state dict.

    Args:
        name: of the part; files are ``folder/name.ckpt`` and ``folder/name.jsonl``.
        module: trained in place; when sharding, a copy is, until ``load_ema``.
        cfg: how long and how.
        folder: of checkpoints and logs.
        group: the processes; default: this one alone.
        about: what else a checkpoint depends on (data, batch, ...), plain JSON values; one made
            with other values is refused.
        partner: a loop whose ``step`` is called within this one's loss (a critic's): it is saved
            and resumed in this one's file, so that both are always of one moment.
    """

    def __init__(self, name: str, module: nn.Module, cfg: LoopConfig, folder: Path,
                 group: Group | None = None, about: Mapping | None = None,
                 partner: "Loop | None" = None) -> None:
        self.name, self.target, self.cfg, self.folder = name, module, cfg, Path(folder)
        self.group = group or Group()
        self.module = copy.deepcopy(module) if self.group.shard else module
        self.wrapped = self.group.wrap(self.module)
        self.model: Any = self.wrapped
        if cfg.compile:
            self.model = torch.compile(self.wrapped, dynamic=False)
        self.optimizers = optimizers(self.wrapped, cfg, self.group.shard)
        self.ema = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        self.iteration, self.seconds = 0, 0.0
        self.path = self.folder / f"{name}.ckpt"
        self.history: list[dict] = []
        self.about = {**asdict(cfg), **dict(about or {}), "shard": self.group.shard}
        del self.about["compile"]  # the same up to rounding
        self.partner = partner
        if partner is not None:
            self.about["partner"] = partner.about
        self._sums: dict[str, float] = {}
        self._stop = False

    def run(self, sample: Callable[[int], dict], loss: Loss, tensorboard: bool = True) -> None:
        """Train to ``cfg.iterations``, resuming from ``folder/name.ckpt`` if it is there.

        Ctrl-C and SIGTERM finish the step at hand, save, and raise KeyboardInterrupt.
        """
        self.resume()
        if self.iteration >= self.cfg.iterations:
            return
        writer = self._writer() if tensorboard and self.group.first else None
        bar = tqdm(total=self.cfg.iterations, initial=self.iteration, desc=self.name,
                   disable=not self.group.first, mininterval=5.0, smoothing=0.05)
        self.wrapped.train()
        try:
            with self._signals():
                while self.iteration < self.cfg.iterations and not self._stop:
                    self._once(sample, loss, writer, bar)
            self.save()
        finally:
            bar.close()
            if writer:
                writer.close()
        if self._stop:
            raise KeyboardInterrupt(f"saved at iteration {self.iteration} in {self.path}")
        self.wrapped.eval()

    def _once(self, sample: Callable[[int], dict], loss: Loss, writer, bar) -> None:
        """One iteration with its bookkeeping."""
        start = time.perf_counter()
        values = self._step(sample, loss)
        self.seconds += time.perf_counter() - start
        self._stop = values.pop("stop") > 0  # agreed between the processes
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        bar.update()
        if self.iteration % self.cfg.log_every == 0:
            self._log({k: v / self.cfg.log_every for k, v in self._sums.items()}, writer, bar)
            self._sums = {}
        if self.iteration % self.cfg.save_every == 0 and not self._stop:
            self.save()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a wish to stop; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._wish, old = False, {}

        def wish(number: int, frame: object) -> None:
            if self._wish:
                raise KeyboardInterrupt
            self._wish = True

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, wish)
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    _wish = False

    def step(self, sample: Callable[[int], dict], loss: Loss) -> dict[str, float]:
        """One update of a partner: no log, no checkpoint; returns what it measured."""
        values = self._step(sample, loss)
        del values["stop"]
        return values

    def _step(self, sample: Callable[[int], dict], loss: Loss) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + self.iteration)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for g in optimizer.param_groups:
                g["lr"] = learning_rate(self.cfg, self.iteration)
        value, logs = loss(self.model, sample(self.iteration), generator)
        value.backward()
        norm = float(whole(nn.utils.clip_grad_norm_(self.wrapped.parameters(), self.cfg.clip)))
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"training of {self.name} diverged",
                given=f"gradient norm {norm} at iteration {self.iteration}",
                expected="a finite number", fix="lower the learning rate and start again",
            )
        if self.cfg.skip is None or norm < self.cfg.skip:
            for optimizer in self.optimizers:
                optimizer.step()
        self.iteration += 1
        rate = min(self.cfg.ema, (1 + self.iteration) / (10 + self.iteration))
        if self.cfg.ema_from is not None:
            rate = self.cfg.ema if self.iteration > self.cfg.ema_from else 0.0
        with torch.no_grad():
            for key, live in self.module.state_dict().items():
                if live.is_floating_point():
                    self.ema[key].lerp_(live, 1 - rate)
        return self.group.mean({"loss": float(value.detach()), **logs, "grad": norm,
                                "stop": float(self._wish)})

    def save(self) -> None:
        """Write model, EMA, optimiser and counters atomically; every process must call it."""
        state = self._state()
        if self.partner is not None:
            state["partner"] = self.partner._state()
        if not self.group.first:
            return
        part = self.path.with_suffix(".part")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def _state(self) -> dict:
        state = self.group.full(self.module, self.optimizers)
        return state | {
            "ema": {k: whole(v) for k, v in self.ema.items()}, "iteration": self.iteration,
            "seconds": self.seconds, "about": self.about, "history": self.history,
            "sums": self._sums}

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one; without one, begin with empty logs."""
        if self.path.exists():
            try:
                state = torch.load(self.path, weights_only=True, map_location="cpu")
                about = state["about"]
            except (OSError, KeyError, RuntimeError, EOFError, ValueError, TypeError,
                    pickle.UnpicklingError) as error:
                raise CheckpointError(
                    "cannot resume training", given=f"{self.path} ({type(error).__name__})",
                    expected="the checkpoint of an earlier run", fix="delete the file",
                ) from error
            keys = sorted(about.keys() | self.about.keys())
            other = [k for k in keys if about.get(k) != self.about.get(k)]
            if other:
                raise CheckpointError(
                    "cannot resume training with other settings",
                    given=", ".join(f"{k}={self.about.get(k)!r}" for k in other),
                    expected=", ".join(f"{k}={about.get(k)!r}" for k in other) + f" of {self.path}",
                    fix=f"use a new output folder, or delete {self.folder}")
            self._restore(state)
        if self.group.first:
            self._rewrite_log()

    def _restore(self, state: dict) -> None:
        try:
            self.group.load(self.module, self.optimizers, state)
            for key, value in state["ema"].items():
                fill(self.ema[key], value)
            if self.partner is not None:
                self.partner._restore(state["partner"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                "cannot resume training", given=f"{self.path} ({error})",
                expected="a checkpoint of the same sizes", fix="use a new output folder",
            ) from error
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.history, self._sums = state["history"], state["sums"]

    def load_ema(self) -> None:
        """Put the averaged weights into the module that was given."""
        self.target.load_state_dict({k: whole(v) for k, v in self.ema.items()})

    def _rewrite_log(self) -> None:
        """Forget lines that a killed run wrote after its last checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part, log = self.folder / f"{self.name}.jsonl.part", self.folder / f"{self.name}.jsonl"
        part.write_text("".join(json.dumps(row) + "\n" for row in self.history))
        os.replace(part, log)

    def _log(self, values: dict[str, float], writer, bar) -> None:
        row = {"iteration": self.iteration, "seconds": round(self.seconds, 1), **values}
        self.history.append({k: round(float(v), 6) for k, v in row.items()})
        bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()})
        if self.group.first:
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
        return SummaryWriter(str(self.folder / "tensorboard" / self.name),
                             purge_step=self.iteration + 1 if self.iteration else None)
