"""Learned video world models as ordinary reinforcement-learning environments.

Importing this package registers the Gymnasium ids and imports no torch.
"""

__version__ = "0.1.0"


def _source_checkout() -> None:
    """Let ``import worldgym.envs`` work in a bare clone, where ``envs/`` is a top-level folder."""
    import importlib.util
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    dirs = {
        f"worldgym.{name}": root / name
        for name in ("envs", "agents")
        if (root / name / "__init__.py").is_file()
    }
    if not dirs or not (root / "pyproject.toml").is_file():
        return

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            folder = dirs.get(name)
            return folder and importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )

    sys.meta_path.append(Finder)  # type: ignore[arg-type]


_source_checkout()

from worldgym import registry  # noqa: E402

registry.register_envs()
