"""Conformance suites for third parties; nothing is imported before it is used.

Example:
    ``from worldgym.testing import check_dream_env; print(check_dream_env(my_factory))``
"""

from typing import Any

_WHERE = {
    "check_dream_env": "worldgym.envs.checks",
    "check_dream_vector_env": "worldgym.envs.checks_vector",
    "ConformanceError": "worldgym.envs.conformance",
    "Report": "worldgym.envs.conformance",
    "RULES": "worldgym.envs.conformance",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
