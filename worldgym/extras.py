"""Optional packages: imported where they are used, with a named error where they are missing."""

import importlib
from types import ModuleType

from worldgym.errors import MissingDependencyError


def need(module: str, what: str, extra: str) -> ModuleType:
    """The module, or an error that says which extra to install for ``what``.

    >>> need("math", "sums", "none").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs {module.partition('.')[0]}", given=str(error),
            expected=f"the packages of the extra {extra!r}",
            fix=f"pip install 'worldgym[{extra}]'") from error
