"""Checkpoints: load strictly into a module, save atomically, tell what a file holds.

Example:
    >>> import tempfile, torch
    >>> net = torch.nn.Linear(2, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(f"{folder}/net.safetensors", net, {"steps": 10})
    ...     again = load_into(torch.nn.Linear(2, 3, device="meta"), path)
    ...     print(torch.equal(again.weight, net.weight), describe(path)["metadata"]["steps"])
    True 10
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from worldgym.errors import CheckpointError, ConfigError, DTypeError, NotFiniteError
from worldgym.weightfile import META_KEY, Entry, Mapped, WeightFile, as_file, open_weights

Module = TypeVar("Module", bound=nn.Module)
# What FSDP, activation checkpointing and torch.compile put into names, anywhere.
WRAPPER_PIECES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# What training wrappers put before every name.
WRAPPER_PREFIXES = ("model.", "module.")


def load_into(
    module: Module,
    source: str | Path | WeightFile | Mapping[str, Tensor],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    part: str | None = None,
    rename: Callable[[str], str] | None = None,
    check_finite: bool = True,
    safe_globals: Sequence[Any] = (),
) -> Module:
    """Fill every parameter and buffer of ``module`` from a checkpoint, or change nothing.

    Names and shapes must match exactly; wrapper names of training checkpoints are taken off.
    A module on the meta device is filled without ever being allocated twice.

    Args:
        module: target; may be on the meta device.
        source: path (see :func:`worldgym.weightfile.open_weights`), opened file or a state dict.
        device: where the tensors go; default: where the module is (meta: the CPU).
        dtype: precision of floating tensors; default: the module's own.
        part: entry of a training checkpoint, e.g. "generator"; default: generator_ema first.
        rename: the module's name of a tensor of the file (wrapper names are off already).
        check_finite: refuse NaN and inf.
        safe_globals: see :func:`worldgym.weightfile.open_weights`.
    """
    target = module.state_dict()
    maps: tuple[Mapped, ...] = ()
    _refuse_unsaved_meta(module, target)
    if isinstance(source, Mapping):
        odd = [f"{k}: {type(v).__name__}" for k, v in source.items() if not isinstance(v, Tensor)]
        if odd:
            raise DTypeError(
                "state dict holds things that are not tensors",
                given=_some(odd),
                expected="tensors by name",
                fix="pass the inner state dict, e.g. loaded['generator']",
            )
        entries: Mapping[str, Entry] = {k: Entry.of(t) for k, t in source.items()}
        label = "the given state dict"
    else:
        file = as_file(source, part=part, safe_globals=safe_globals)
        entries, label, maps = file.entries, str(file.path), file.maps
    if rename is not None:
        named = {n: rename(plain) for n, plain in plain_names(list(entries)).items()}
        _refuse_twins(named, label)
        entries = {name: entries[n] for n, name in named.items()}
    entries = _named_like(entries, target, label)
    _check_fit(entries, target, label)

    fresh: dict[str, Tensor] = {}
    copied, total = 0, sum(torch.Size(e.shape).numel() for e in entries.values())
    for name, want in target.items():
        to_dtype = dtype if dtype is not None and want.is_floating_point() else want.dtype
        to_device = device if device is not None else ("cpu" if want.is_meta else want.device)
        raw = entries[name].read()
        fresh[name] = raw.to(device=to_device, dtype=to_dtype)
        if check_finite:
            _check_finite(name, raw, fresh[name], label)
        if fresh[name] is not raw:
            copied += raw.numel()
            if copied > total / 32:  # what was read is in memory twice until it is let go
                copied = 0
                del raw
                _forget(maps)
    _forget(maps)  # tensors used as they are keep their own
    same_place = all(
        fresh[n].device == t.device and fresh[n].dtype == t.dtype for n, t in target.items()
    )
    if not same_place:  # adopt the tensors themselves; never share memory with the caller's dict
        fresh = {n: _own(t, isinstance(source, Mapping)) for n, t in fresh.items()}
    module.load_state_dict(fresh, strict=True, assign=not same_place)
    if device is not None:
        module.to(device)  # buffers that no checkpoint holds
    return module


def _forget(maps: Sequence[Mapped]) -> None:
    for mapped in maps:
        mapped.forget()


def _own(tensor: Tensor, borrowed: bool) -> Tensor:
    return tensor.clone() if borrowed else tensor


def _refuse_unsaved_meta(module: nn.Module, target: Mapping[str, Tensor]) -> None:
    lost = [n for n, b in module.named_buffers() if b.is_meta and n not in target]
    if lost:
        raise CheckpointError(
            "buffers on the meta device are in no checkpoint",
            given=lost[:5],
            expected="every non-persistent buffer on a real device",
            fix="build these buffers with an explicit device, or compute them in forward",
        )


def plain_name(name: str) -> str:
    """A tensor name without the pieces that FSDP, checkpointing and compilation add."""
    for piece in WRAPPER_PIECES:
        name = name.replace(piece, "")
    return name


def plain_names(names: Sequence[str]) -> dict[str, str]:
    """Map names to names without wrappers; leading ``model.`` only goes if all have it."""
    out = {name: plain_name(name) for name in names}
    while prefix := next(
        (p for p in WRAPPER_PREFIXES if out and all(v.startswith(p) for v in out.values())), None
    ):
        out = {name: plain.removeprefix(prefix) for name, plain in out.items()}
    return out


def _named_like(
    entries: Mapping[str, Entry], target: Mapping[str, Tensor], label: str
) -> Mapping[str, Entry]:
    """The entries under the module's names: as they are if they fit, else without wrappers."""
    if set(entries) == set(target):
        return entries
    pieces_off = {name: plain_name(name) for name in entries}
    for names in (pieces_off, plain_names(list(entries))):
        _refuse_twins(names, label)
        if set(names.values()) & set(target):
            return {plain: entries[name] for name, plain in names.items()}
    return entries


def _refuse_twins(names: Mapping[str, str], label: str) -> None:
    twice = [n for n, c in Counter(names.values()).items() if c > 1]
    if twice:
        raise CheckpointError(
            "two tensors have the same name once wrapper names are off",
            given=f"{label}: {twice[:3]}",
            expected="each tensor once",
            fix="save the unwrapped module's state dict",
        )


def _check_fit(entries: Mapping[str, Entry], target: Mapping[str, Tensor], label: str) -> None:
    """Names, shapes and kinds of dtype must agree; everything wrong is told at once."""
    missing = sorted(set(target) - set(entries))
    extra = sorted(set(entries) - set(target))
    if missing or extra:
        said = [
            f"{len(some)} {word} tensor{'s' * (len(some) > 1)} ({_some(some)})"
            for word, some in (("missing", missing), ("extra", extra))
            if some
        ]
        raise CheckpointError(
            "checkpoint does not fit the model",
            given=f"{label} with {' and '.join(said)}",
            expected=f"exactly the model's {len(target)} tensors",
            fix="use the config this checkpoint was trained with, or the checkpoint of this model",
        )
    shapes = [
        f"{n} is {list(entries[n].shape)}, not {list(t.shape)}"
        for n, t in target.items()
        if entries[n].shape != tuple(t.shape)
    ]
    if shapes:
        raise CheckpointError(
            "tensors have the wrong shape",
            given=f"{label}: {_some(shapes)}",
            expected="the model's shapes",
            fix="use the config this checkpoint was trained with",
        )
    kinds = [
        f"{n} is {_short(entries[n].dtype)}, not {_short(t.dtype)}"
        for n, t in target.items()
        if not _convertible(entries[n].dtype, t.dtype)
    ]
    if kinds:
        raise CheckpointError(
            "tensors have the wrong dtype",
            given=f"{label}: {_some(kinds)}",
            expected="float64, float32, float16 or bfloat16 for weights; integers as in the model",
            fix="save the weights in a plain floating dtype (float8 and int8 need their scales)",
        )


def _convertible(have: torch.dtype, want: torch.dtype) -> bool:
    plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return have == want or (have in plain and want in plain)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(items: Sequence[str], most: int = 4) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _all_finite(tensor: Tensor) -> bool:
    """In pieces: the test needs room of its own, and the largest tensors are gigabytes."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(1 << 20))


def _check_finite(name: str, raw: Tensor, new: Tensor, label: str) -> None:
    if not new.is_floating_point() or _all_finite(new):
        return
    if _all_finite(raw):
        raise CheckpointError(
            f"tensor {name} overflows in the target dtype",
            given=f"{label}: largest value {float(raw.abs().max()):.3g} as {_short(new.dtype)}",
            expected=f"values up to {torch.finfo(new.dtype).max:.3g}",
            fix="load with dtype=torch.bfloat16 or torch.float32",
        )
    bad = int((~torch.isfinite(raw)).sum())
    raise CheckpointError(
        f"tensor {name} has NaN or infinite values",
        given=f"{label}: {bad} of {raw.numel()} values",
        expected="finite weights",
        fix="use an earlier checkpoint; this one comes from a run that diverged or a damaged file",
    )


def save(
    path: str | Path,
    source: nn.Module | Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    check_finite: bool = True,
) -> Path:
    """Write tensors and JSON metadata as one safetensors file: all of it or nothing.

    The file appears under its name only when it is complete and on the disk, so a crash at any
    time leaves the old file or the new one.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(
            "checkpoints are safetensors files",
            given=path.name,
            expected="a name that ends in .safetensors",
            fix=f"use {path.with_suffix('.safetensors').name}",
        )
    tensors = _for_disk(source, check_finite)
    try:
        header = {META_KEY: json.dumps(dict(metadata or {}), allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "metadata cannot be written as JSON",
            given=str(error),
            expected="strings, finite numbers, booleans, lists and dicts",
            fix="convert arrays with .tolist() and paths with str()",
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temp, metadata=header)
        _sync(temp)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    _sync(path.parent)
    return path


def _for_disk(source: nn.Module | Mapping[str, Tensor], check_finite: bool) -> dict[str, Tensor]:
    """Detached, contiguous CPU tensors of which no two share memory."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in (source.state_dict() if isinstance(source, nn.Module) else source).items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise DTypeError(
                f"{name} cannot be saved",
                given="a tensor on the meta device" if isinstance(value, Tensor) else type(value),
                expected="a tensor with data",
                fix="load or initialise the module first; put plain values into metadata",
            )
        if check_finite and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NotFiniteError(
                f"{name} would be saved with NaN or infinite values",
                given=f"{int((~torch.isfinite(value)).sum())} of {value.numel()} values",
                expected="finite values",
                fix="the run has diverged: go back to the last checkpoint (the file is unchanged)",
            )
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return tensors


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file written by :func:`save`, and its metadata."""
    file = open_weights(path)
    return {n: e.read() for n, e in file.entries.items()}, dict(file.metadata.get(META_KEY, {}))


def fingerprint(source: nn.Module | Mapping[str, Any]) -> str:
    """MD5 of the architecture: sorted lines "name shape", e.g. ``head.bias 64``.

    Equal for two checkpoints of one architecture, whatever their values, dtypes or files.
    """
    items = source.state_dict() if isinstance(source, nn.Module) else source
    lines = sorted(f"{name} {'x'.join(map(str, value.shape))}" for name, value in items.items())
    return hashlib.md5("\n".join(lines).encode(), usedforsecurity=False).hexdigest()


def describe(path: str | Path, *, part: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds, as plain JSON values; no safetensors data is read."""
    file: WeightFile = open_weights(path, part=part)
    names = plain_names(list(file.entries))
    entries = {names[n]: e for n, e in file.entries.items()}
    dtypes = Counter(_short(e.dtype) for e in entries.values())
    sizes = {n: torch.Size(e.shape).numel() for n, e in entries.items()}
    metadata = dict(file.metadata)
    return {
        "path": str(file.path),
        "kind": file.kind,
        "files": [f.name for f in file.files],
        "bytes": sum(f.stat().st_size for f in file.files),
        "tensors": len(entries),
        "parameters": sum(sizes.values()),
        "dtypes": dict(dtypes.most_common()),
        "part": file.part,
        "parts": list(file.parts),
        "wrapped_names": any(n != plain for n, plain in names.items()),
        "largest": [
            {"name": n, "shape": list(entries[n].shape)}
            for n in sorted(sizes, key=lambda n: (-sizes[n], n))[:5]
        ],
        "fingerprint": fingerprint(entries),
        "metadata": {**metadata.pop(META_KEY, {}), **metadata},
    }
