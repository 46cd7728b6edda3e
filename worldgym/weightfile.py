"""Weight files on disk, read safely: one safetensors file, shards with an index, a folder, torch.

:func:`open_weights` looks at names, shapes and dtypes only; tensors are read one by one when
asked for. Torch files go through ``weights_only=True``; nothing here can run code from a file.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worldgym.errors import CheckpointError, UnsafeFileError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"
# Where training checkpoints keep the network, best first. Self-Forcing: generator(_ema).
PARTS = ("generator_ema", "generator", "state_dict", "model_state", "model", "module")
META_KEY = "worldgym"  # our JSON header inside the safetensors metadata
# dtype names of the safetensors format
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """What a file says about one tensor: shape, dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """Entry of a tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Mapped:
    """Tensors of a memory-mapped file, which can be mapped anew.

    Pages count as memory once they were read, until the mapping goes; who copies tensors to
    another dtype or device calls ``forget`` now and then.
    """

    def __init__(self, open_: Callable[[], Callable[[str], Tensor]]) -> None:
        self._open, self._get = open_, open_()

    def reader(self, name: str) -> Callable[[], Tensor]:
        """What :class:`Entry` calls to read one tensor."""
        return lambda: self._get(name)

    def forget(self) -> None:
        """Let go of the pages read so far; tensors in use keep theirs."""
        self._get = self._open()


@dataclass(frozen=True)
class WeightFile:
    """An opened set of weights.

    Attributes:
        path: what was asked for.
        kind: "safetensors", "sharded safetensors" or "torch".
        files: every file that holds tensors.
        entries: the tensors by name.
        metadata: the file's own metadata; ours is parsed JSON.
        part: which part of a training checkpoint was taken ("" if there are no parts).
        parts: all parts the checkpoint has.
        maps: the memory maps behind the entries.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""
    parts: tuple[str, ...] = ()
    maps: tuple[Mapped, ...] = ()


def open_weights(
    path: str | Path, *, part: str | None = None, safe_globals: Sequence[Any] = ()
) -> WeightFile:
    """Open a weight file, a shard index or a folder that holds one of them.

    Args:
        path: ``*.safetensors``, ``*.safetensors.index.json``, ``.pt/.pth/.ckpt`` or a folder.
        part: entry of a training checkpoint to take, e.g. "generator"; default: best known one.
        safe_globals: further classes a torch file may hold (they must be harmless to build).
    """
    path = _pick(Path(path))
    if path.stat().st_size == 0:
        raise CheckpointError(
            "checkpoint is empty",
            given=f"{path} with 0 bytes",
            expected="a file with tensors",
            fix="copy or download it again",
        )
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        entries, metadata, mapped = _safetensors(path)
        return WeightFile(path, "safetensors", (path,), entries, metadata, maps=(mapped,))
    return _open_torch(path, part, safe_globals)


def as_file(source: str | Path | WeightFile, **options: Any) -> WeightFile:
    """``source`` itself if it is open already, else :func:`open_weights` of it."""
    return source if isinstance(source, WeightFile) else open_weights(source, **options)


def _pick(path: Path) -> Path:
    """Resolve a folder to the one set of weights in it; refuse missing and foreign files."""
    if not path.exists():
        near = (
            sorted(p.name for p in path.parent.glob("*") if _is_weights(p)) if path.parent else []
        )
        raise CheckpointError(
            "checkpoint does not exist",
            given=path,
            expected="a folder, or a .safetensors, .safetensors.index.json, .pt, .pth or .ckpt",
            fix=f"that folder holds {near[:5]}" if near else "check the path",
        )
    if not path.is_dir():
        if _is_weights(path):
            return path
        raise UnsafeFileError(
            "this kind of file is not opened as weights",
            given=path,
            expected=".safetensors, .safetensors.index.json, .pt, .pth or .ckpt",
            fix="convert it to safetensors on a machine where you trust it",
        )
    found = sorted(p for p in path.iterdir() if p.is_file() and _is_weights(p))
    indexes = [p for p in found if p.name.endswith(INDEX_SUFFIX)]
    shards = {path / name for index in indexes for name in _index(index).values()}
    single = [p for p in found if p.suffix == ".safetensors" and p not in shards]
    choice = indexes + single or [p for p in found if p.suffix in TORCH_SUFFIXES]
    if len(choice) != 1:
        raise CheckpointError(
            "folder does not hold exactly one set of weights",
            given=f"{path} with {[p.name for p in choice[:6]] or 'none'}",
            expected="one safetensors file, one shard index, or one torch file",
            fix="give the path of the file itself" if choice else "check the path",
        )
    return choice[0]


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", *TORCH_SUFFIXES) or path.name.endswith(INDEX_SUFFIX)


def _safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, Any], Mapped]:
    """Entries, metadata and memory map of one safetensors file."""
    try:
        handle = safe_open(str(path), framework="pt", device="cpu")
        names = list(handle.keys())
        slices = {name: handle.get_slice(name) for name in names}
        metadata: dict[str, Any] = dict(handle.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "not a complete safetensors file",
            given=f"{path} with {path.stat().st_size} bytes ({error})",
            expected="a whole safetensors file",
            fix="copy or download it again; the copy may have been cut off",
        ) from error
    del handle
    mapped = Mapped(lambda: safe_open(str(path), framework="pt", device="cpu").get_tensor)
    entries = {}
    for name, part in slices.items():
        dtype = DTYPES.get(part.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"tensor {name} has a dtype that is not supported",
                given=part.get_dtype(),
                expected=f"one of {sorted(DTYPES)}",
                fix="save the weights again as float32, float16 or bfloat16",
            )
        entries[name] = Entry(tuple(part.get_shape()), dtype, mapped.reader(name))
    if META_KEY in metadata:
        try:
            metadata[META_KEY] = json.loads(metadata[META_KEY])
        except json.JSONDecodeError as error:
            raise CheckpointError(
                "metadata is not JSON",
                given=f"{path}: {error}",
                expected=f"JSON under the key {META_KEY!r}",
                fix="save the checkpoint again with worldgym.checkpoint.save",
            ) from error
    return entries, metadata, mapped


def _index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of a shard index: tensor name to file name, checked."""
    try:
        index = json.loads(path.read_text())
        weight_map = index["weight_map"]
        rows = [(str(k), str(v)) for k, v in weight_map.items()]
        if not rows:
            raise KeyError("weight_map is empty")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "not a shard index",
            given=f"{path} ({type(error).__name__}: {error})",
            expected='JSON {"weight_map": {tensor: file name}}',
            fix="copy or download the index again",
        ) from error
    for _, name in rows:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsafeFileError(
                "shard index points outside its folder or at another kind of file",
                given=name,
                expected="plain names of .safetensors files beside the index",
                fix="do not use this index; get it from its publisher again",
            )
    return dict(rows)


def _open_shards(path: Path) -> WeightFile:
    """Open all shards of an index and check that index and shards agree."""
    weight_map = _index(path)
    files = tuple(path.parent / name for name in sorted(set(weight_map.values())))
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise CheckpointError(
            "shards are missing",
            given=f"{path} without {absent[:5]} ({len(absent)} of {len(files)})",
            expected=f"all {len(files)} shards beside the index",
            fix="download the missing shards into the same folder",
        )
    entries: dict[str, Entry] = {}
    maps: list[Mapped] = []
    for file in files:
        inside, _, mapped = _safetensors(file)
        maps.append(mapped)
        listed = {name for name, shard in weight_map.items() if shard == file.name}
        if set(inside) != listed:
            odd = sorted(set(inside) ^ listed)
            raise CheckpointError(
                "shard and index disagree",
                given=f"{file.name}: {len(inside)} tensors, {len(listed)} listed, e.g. {odd[:3]}",
                expected="each shard holds exactly the tensors that the index lists for it",
                fix="download index and shards again from one revision",
            )
        entries.update(inside)
    return WeightFile(path, "sharded safetensors", files, entries, maps=tuple(maps))


def _open_torch(path: Path, part: str | None, safe_globals: Sequence[Any]) -> WeightFile:
    """Open a torch file without running anything in it, and find the network inside."""
    zipped = zipfile.is_zipfile(path)

    def load() -> Any:
        with torch.serialization.safe_globals(list(safe_globals)):
            # mmap: only tensors that are used are read; needs the zip format (torch >= 1.6)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)

    try:
        loaded = load()
    except Exception as error:  # torch raises many types here; each becomes one of ours
        text = " ".join(str(error).split()).partition("WeightsUnpickler error:")
        foreign = _foreign_names(path)
        if foreign or "Unsupported global" in text[2] or "TorchScript" in text[0]:
            raise UnsafeFileError(
                "file wants to run code",
                given=f"{path} calling {', '.join(foreign[:3]) or (text[2] or text[0])[:160]}",
                expected="a torch file with nothing but tensors and plain containers",
                fix="ask for safetensors, or convert it on a machine where you trust it",
            ) from error
        cause = f"{type(error).__name__}: {(text[2] or text[0])[:120]}"
        raise CheckpointError(
            "not a complete torch file",
            given=f"{path} with {path.stat().st_size} bytes ({cause})",
            expected="a whole file written by torch.save",
            fix="copy or download it again; the copy may have been cut off",
        ) from error
    tensors, taken, parts = unwrap(loaded, part, path)
    entries = {name: Entry.of(tensor) for name, tensor in tensors.items()}
    maps: tuple[Mapped, ...] = ()
    if zipped:
        del loaded, tensors
        maps = (Mapped(lambda: unwrap(load(), taken or None, path)[0].__getitem__),)
        entries = {n: Entry(e.shape, e.dtype, maps[0].reader(n)) for n, e in entries.items()}
    return WeightFile(path, "torch", (path,), entries, {}, taken, parts, maps)


def _foreign_names(path: Path) -> list[str]:
    """Functions and classes that a torch file names, without torch's own; nothing is imported.

    Only for telling a hostile or foreign pickle from a damaged one: torch refuses both.
    """
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inner = [n for n in archive.namelist() if n.endswith("data.pkl")]
                streams: list[Any] = [io.BytesIO(archive.read(n)) for n in inner]
        else:
            streams = [path.open("rb")]
        for stream in streams:
            with stream:
                for _ in range(5):  # old torch files are five pickles in a row
                    for name in _names_in_pickle(stream):
                        names.append(name)  # one by one: the pickle may break later
    except (ValueError, OSError, zipfile.BadZipFile, EOFError):
        pass  # the pickle ends or breaks here; what was seen before counts
    ours = ("torch.", "collections.OrderedDict")
    foreign = {n for n in names if not n.startswith(ours) or n.startswith("torch.nn.")}
    return sorted(foreign, key=lambda n: (n.startswith("torch."), n))


def _names_in_pickle(stream: Any) -> Iterator[str]:
    """Names of globals in one pickle, read opcode by opcode."""
    words: list[str] = []
    for code, value, _ in pickletools.genops(stream):
        if code.name in ("GLOBAL", "INST"):
            yield str(value).replace(" ", ".")
        elif code.name == "STACK_GLOBAL":
            yield ".".join(words[-2:])
        elif isinstance(value, str):
            words.append(value)


def unwrap(
    loaded: Any, part: str | None = None, source: object = "the checkpoint"
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Find the state dict in what a torch file holds.

    Returns:
        The tensors by name, the part they came from ("" at top level), and all parts there are.
    """
    parts: tuple[str, ...] = ()
    taken = ""
    if isinstance(loaded, Mapping):
        parts = tuple(str(k) for k, v in loaded.items() if isinstance(v, Mapping) and v)
        if part is not None:
            taken = part
        elif parts:
            taken = next((p for p in PARTS if p in parts), "")
    inner = loaded.get(taken) if taken and isinstance(loaded, Mapping) else loaded
    if (
        not isinstance(inner, Mapping)
        or not inner
        or not all(isinstance(v, Tensor) and v.layout == torch.strided for v in inner.values())
    ):
        held = list(loaded)[:8] if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(
            "no state dict found in the checkpoint"
            if part is None
            else f"no state dict at {part!r}",
            given=f"{source} holding {held}",
            expected=f"a dict of tensors, at top level or under one of {list(PARTS)}",
            fix="name the part that holds the network, e.g. part='generator'",
        )
    return {str(k): v for k, v in inner.items()}, taken, parts
