"""A part of a folder in some published layout: opened, weighed, or why it is not there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from worldgym import checkpoint
from worldgym.errors import ConfigError, WorldGymError
from worldgym.weightfile import WeightFile, open_weights

P = TypeVar("P", bound="Part")


def json_object(path: Path) -> dict[str, Any]:
    """What a configuration file says; nothing where there is none.

    Raises:
        ConfigError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConfigError(f"{path.name} cannot be read", given=f"{path} ({error})",
                          expected="a JSON object, or no such file",
                          fix="download it again or take it away") from error
    return data


@dataclass(frozen=True)
class Part:
    """One part of the folder; ``shapes``: its tensors under their plain names."""

    name: str
    path: Path
    file: WeightFile | None = None
    trouble: WorldGymError | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def look(cls: type[P], name: str, path: Path, part: str | None = None,
             rename: Callable[[str], str] = str, **more: Any) -> P:
        """Open the headers; nothing is loaded.

        Args:
            part: entry of a torch file that holds the weights.
            rename: plain names to those of our network.
            more: fields of a subclass.
        """
        try:
            file = open_weights(path, part=part)
        except WorldGymError as error:
            return cls(name, path, trouble=error, **more)
        plain = checkpoint.plain_names(list(file.entries))
        return cls(name, path, file,
                   shapes={rename(plain[n]): e.shape for n, e in file.entries.items()}, **more)

    def need(self) -> WeightFile:
        """The opened file, or the error that says what is wrong with it."""
        if self.file is None:
            assert self.trouble is not None
            raise self.trouble
        return self.file

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(torch.Size(s).numel() for s in self.shapes.values())

    def facts(self) -> dict[str, Any]:
        """What ``worldgym inspect`` says about it."""
        if self.file is None:
            return {"missing": str(self.trouble)}
        return {"files": [f.name for f in self.file.files], "tensors": len(self.shapes),
                "parameters": self.parameters, **self.known(),
                "dtypes": sorted({str(e.dtype).removeprefix("torch.")
                                  for e in self.file.entries.values()})}

    def known(self) -> dict[str, Any]:
        """How it compares with what was published."""
        return {}
