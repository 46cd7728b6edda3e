"""The faces of a world: Gymnasium, vector, PettingZoo, Stable-Baselines3; tasks, real twins."""

from typing import Any

if __name__ != "worldgym.envs":
    raise ImportError("import worldgym.envs, not envs")


def __getattr__(name: str) -> Any:
    if name == "parallel_env":  # PettingZoo and torch are loaded when it is asked for
        from worldgym.envs.parallel import parallel_env

        return parallel_env
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
