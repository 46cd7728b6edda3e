"""The faces of a world: Gymnasium, vector, Stable-Baselines3; tasks and their real twins."""

if __name__ != "worldgym.envs":
    raise ImportError("import worldgym.envs, not envs")
