"""The table of worlds and their lazy Gymnasium registration (loads no torch)."""

# id -> (entry point of the single env, entry point of the native vector env)
ENVS = {
    "worldgym/TakeCover-v0": (
        "worldgym.envs.make:take_cover",
        "worldgym.envs.make:take_cover_vector",
    ),
    "worldgym/TakeCover-WHAM-v0": (
        "worldgym.envs.make:take_cover_wham",
        "worldgym.envs.make:take_cover_wham_vector",
    ),
    "worldgym/WHAM-v0": ("worldgym.envs.wham:wham", "worldgym.envs.wham:wham_vector"),
    "worldgym/SCOPE-v0": ("worldgym.envs.scope:scope", "worldgym.envs.scope:scope_vector"),
    "worldgym/WorldPlay-v0": (
        "worldgym.envs.worldplay:worldplay",
        "worldgym.envs.worldplay:worldplay_vector",
    ),
    "worldgym/Rooms-v0": (
        "worldgym.envs.worldplay:rooms",
        "worldgym.envs.worldplay:rooms_vector",
    ),
    "worldgym/RoomsGame-v0": ("worldgym.envs.rooms:Rooms", None),
}


def register_envs() -> None:
    """Register every world with Gymnasium, if Gymnasium is installed; safe to call twice."""
    try:
        import gymnasium
    except ImportError:  # the engine alone works without Gymnasium
        return
    for env_id, (single, vector) in ENVS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, entry_point=single, vector_entry_point=vector)
