"""What all faces share: saved states, forks, options, and the facts in ``metadata``."""

from pathlib import Path
from typing import Any

import numpy as np

from worldgym.envs.core import DreamCore
from worldgym.envs.screen import MODES, Screen
from worldgym.envs.state import EnvState
from worldgym.errors import ConfigError, DTypeError, ShapeError, SlotError

TEXTS = ("prompt", "negative_prompt")


def check_options(options: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """A copy of reset's options.

    Raises:
        DTypeError: not a dict. ConfigError: an unknown name, or both a start index and an image.
    """
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise DTypeError("options is not a dict", given=type(options).__name__,
                         expected=f"a dict with some of {known}", fix='pass options={"start": 0}')
    unknown = sorted(map(str, set(options) - set(known)))
    if unknown:
        raise ConfigError("unknown reset option", given=unknown, expected=f"some of {known}",
                          fix="check the spelling")
    images = [k for k in ("frame", "frames", "image", "images") if k in options]
    if len(images) + ("start" in options) > 1:
        raise ConfigError("contradictory reset options", given=sorted(options),
                          expected="a start index or a start image",
                          fix='pass only one of "start", "frame", "frames"')
    return dict(options)


def own_start(core: DreamCore, chosen: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """The user's start image and texts of one slot, from reset's checked options."""
    frame = chosen.get("frame")
    if "image" in chosen:
        frame = core.task.starts.picture(chosen["image"])
    texts = {k: chosen[k] for k in TEXTS if k in chosen}
    return frame, texts or None


class Face:
    """Mixin over a ``DreamCore``: state in and out, forks, metadata."""

    core: DreamCore
    _screen: Screen

    def _describe(self) -> dict[str, Any]:
        return {"render_modes": list(MODES), "render_fps": self._screen.fps,
                **self.core.metadata()}

    @property
    def task(self) -> Any:
        """The task that is dreamt."""
        return self.core.task

    def _sibling(self) -> "Face":
        """A new face of the same kind and settings over the same world, never reset."""
        raise NotImplementedError

    def get_state(self) -> EnvState:
        """Everything that can change during a step, as a value that later steps never touch.

        ``set_state`` and the same actions repeat observations, rewards and ends exactly.
        """
        rng = getattr(self, "_np_random", None)
        return self.core.get_state(None if rng is None else rng.bit_generator.state)

    def set_state(self, state: EnvState) -> None:
        """Go on from a state of this env, or of another env with the same settings.

        Raises:
            StateError: the state does not fit; the env stays as it was.
        """
        self.core.set_state(state)
        if hasattr(self, "_np_random"):
            self._np_random = None
            if state.np_random is not None:
                kind = getattr(np.random, state.np_random["bit_generator"])()
                kind.state = state.np_random
                self._np_random = np.random.Generator(kind)
        if state.core is not None:
            self._screen.after_reset()

    def save_state(self, path: str | Path) -> None:
        """Write the state to one safetensors file, atomically."""
        self.get_state().save(path)

    def load_state(self, path: str | Path) -> None:
        """Go on from a file that ``save_state`` wrote, in this process or another.

        Raises:
            StateError, UnsafeFileError: the file cannot be used; the env stays as it was.
        """
        self.core.check_open()
        self.set_state(EnvState.load(path, self.core.task.world))

    def fork(self, n: int = 1, fresh: bool = False) -> list[Any]:
        """``n`` independent envs that continue from here; this one is untouched.

        They share the world and its memory pages until they differ. With ``fresh`` every fork
        dreams with noise of its own; else equal actions give equal futures.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise SlotError("impossible number of forks", given=repr(n),
                            expected="an int of at least 1", fix="pass n=2")
        self.core.ready()
        states = self.core.forked(int(n), bool(fresh))
        rng = self.get_state().np_random
        forks = [self._sibling() for _ in states]
        for child, state in zip(forks, states, strict=True):
            child.set_state(EnvState(core=state.core, np_random=rng, fits=state.fits))
        return forks


def per_slot(value: Any, count: int, what: str) -> list[Any]:
    """One value for every slot: a scalar repeated, or a sequence of the right length."""
    if value is None or np.ndim(value) == 0:
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ShapeError(f"wrong number of values for {what}", given=len(values), expected=count,
                         fix=f"give one {what} for every slot, or a single one for all")
    return [v.item() if isinstance(v, np.integer) else v for v in values]


def check_mask(mask: Any, count: int) -> np.ndarray:
    """Slot numbers of a reset mask.

    Raises:
        DTypeError, ShapeError, ConfigError: not a bool array (B,) with at least one True.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise DTypeError("reset_mask is not a bool array",
                         given=getattr(mask, "dtype", type(mask).__name__),
                         expected=f"numpy bool array of shape ({count},)",
                         fix="pass numpy.array([...], dtype=bool)")
    if mask.shape != (count,):
        raise ShapeError("reset_mask has the wrong shape", given=mask.shape, expected=(count,),
                         fix="give one bool for every slot")
    if not mask.any():
        raise ConfigError("reset_mask selects no slot", given="all False",
                          expected="at least one True", fix="skip the reset instead")
    return np.flatnonzero(mask)
