"""Where a world comes from: the command that made it, and the machine."""

import json
import math
import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from worldgym.models.nano import CARD


def machine(device: torch.device) -> str:
    """One line on where this runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPU cores, {math.ceil(memory)} GiB"


def command(cfg: Any, name: str = "worldgym fit") -> str:
    """The command line that repeats a fit (``FitConfig``): every setting but the defaults."""
    words = [name]
    for field in fields(cfg):
        value, flag = getattr(cfg, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            many = value if isinstance(value, tuple) else [value]
            words.append(f"--{flag} " + " ".join(shlex.quote(str(v)) for v in many))
    return " ".join(words)


def started_from(init: str | None) -> dict:
    """What the card of the world that a fit started from says of its making, and so on back."""
    if not init:
        return {}
    made = json.loads((Path(init) / CARD).read_text()).get("provenance", {})
    kept = ("command", "seed", "training_seconds", "machine", "torch", "date", "started_from")
    return {"started_from": {k: made[k] for k in kept if k in made}}
