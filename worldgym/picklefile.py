"""Torch files whose pickle names foreign classes, read without importing or calling any of them.

``torch.load(weights_only=True)`` refuses such files altogether. Here tensors and plain containers
are built as usual, an object of any other class becomes an inert :class:`Record` of its module,
name and state, and whatever would call something raises ``UnsafeFileError``. Tensors are
memory-mapped: those that are never read (optimiser state) cost nothing.
"""

from __future__ import annotations

import collections
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from worldgym.errors import CheckpointError, UnsafeFileError

MAX_PICKLE = 1 << 28  # bytes of the pickle itself, without tensors
PATHS = ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath", "PurePath")
DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


class _Call:
    """A function that the pickle can call but not change (BUILD sets attributes of anything)."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Refused(f"BUILD, to set {name!r} of a function that every file is read with")


def _plain_bytes(text: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 writes them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode({type(text).__name__}, {encoding!r})")
    return text.encode("latin1")


def _path(*parts: Any) -> str:
    """A path as text."""
    return "/".join(map(str, parts)).replace("//", "/")


# what may be called: these build tensors and plain containers, nothing else
HARMLESS: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Call(torch._utils._rebuild_tensor_v2),
    "torch._utils._rebuild_parameter": _Call(torch._utils._rebuild_parameter),
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "_codecs.encode": _Call(_plain_bytes),
    **{f"{m}.{c.__name__}": c for m in ("builtins", "__builtin__")
       for c in (set, frozenset, complex)},
    **{f"{m}.{name}": _Call(_path) for m in ("pathlib", "pathlib._local") for name in PATHS},
}


class _Inert(type):
    """Type of stand-in classes: instances can be made (NEWOBJ), calls cannot (REDUCE)."""

    module: str
    name: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Refused(cls.full_name())

    def full_name(cls) -> str:
        """``module.name`` as the file gives it."""
        return f"{cls.module}.{cls.name}"


class _Refused(Exception):
    """The pickle wants to call something."""


class Record(metaclass=_Inert):
    """An object of a class that was not imported: its module, name, arguments and state."""

    module = name = ""
    args: tuple = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Record:
        self = object.__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # a subclass of dict: its items are of no use here

    def append(self, value: Any) -> None:
        """A subclass of list: the same."""

    def extend(self, values: Any) -> None:
        """A subclass of list: the same."""

    def __repr__(self) -> str:
        return f"<record {type(self).full_name()} {self.state}>"


def _stand_in(module: str, name: str) -> type:
    return _Inert(name.rpartition(".")[2] or "Record", (Record,), {"module": module, "name": name})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in HARMLESS:
            return HARMLESS[full]
        if full in DTYPES:
            return DTYPES[full]
        if module.partition(".")[0] in sys.stdlib_module_names or module == "__builtin__":
            raise _Refused(full)
        return _stand_in(module, name)


def _refuse_load(*args: Any, **kwargs: Any) -> Any:
    raise _Refused("a second pickle (old torch format)")


def load_records(path: str | Path) -> Any:
    """What a torch zip file holds; tensors are memory-mapped, foreign objects are records.

    Raises:
        UnsafeFileError: the pickle wants to call something, or names the standard library.
        CheckpointError: the file is missing, damaged or not in the zip format.
    """
    path = Path(path)
    _check_archive(path)
    safe: Any = types.ModuleType("worldgym_restricted_pickle")
    safe.Unpickler, safe.load, safe.loads = _Unpickler, _refuse_load, _refuse_load
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False,
                          pickle_module=safe)
    except _Refused as refused:
        raise UnsafeFileError(
            "file wants to run code", given=f"{path} calling {refused}",
            expected="tensors, plain containers and hyper-parameter objects",
            fix="do not use this file; get it from its publisher again") from refused
    except Exception as error:  # torch and pickle raise many types here; each becomes one of ours
        text = " ".join(str(error).split())[:160]
        raise CheckpointError(
            "not a complete torch file",
            given=f"{path} with {path.stat().st_size} bytes ({type(error).__name__}: {text})",
            expected="a whole file written by torch.save",
            fix="copy or download it again; the copy may have been cut off") from error


def _check_archive(path: Path) -> None:
    """Refuse what would reach anything but the restricted unpickler."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise CheckpointError(
            "not a torch zip file", given=path if path.exists() else f"{path}, which is missing",
            expected="a whole file written by torch.save (torch 1.6 or newer)",
            fix="check the path; copy or download it again if it was cut off")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError("not a complete torch file", given=f"{path} ({error})",
                              expected="a whole file written by torch.save",
                              fix="copy or download it again") from error
    names = [i.filename for i in infos]
    if any(n.endswith("constants.pkl") for n in names):
        raise UnsafeFileError("file holds a program (TorchScript)", given=path,
                              expected="a state dict", fix="export the state dict instead")
    if any(i.filename.endswith(".pkl") and i.file_size > MAX_PICKLE for i in infos):
        raise UnsafeFileError("pickle is too large", given=path,
                              expected=f"at most {MAX_PICKLE} bytes beside the tensors",
                              fix="do not use this file")
