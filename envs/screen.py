"""Rendering of every face: one frame, all frames since the last call, or a window.

Shapes: B slots, H W pixels.
"""

from typing import Any

import numpy as np

from worldgym.errors import ConfigError, MissingDependencyError

MODES = ("rgb_array", "rgb_array_list", "human")


def check_mode(mode: Any) -> str | None:
    """``mode`` if it is None or one of ``MODES``, else ConfigError."""
    if mode is not None and mode not in MODES:
        raise ConfigError("unknown render mode", given=repr(mode),
                          expected=f"None or one of {MODES}", fix='pass render_mode="rgb_array"')
    return mode


def tile(frames_BHWC: np.ndarray) -> np.ndarray:
    """One picture of all slots in a near-square grid, uint8 (rows*H, columns*W, 3)."""
    count, height, width = frames_BHWC.shape[:3]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    out = np.zeros((rows * height, columns * width, 3), np.uint8)
    for i, frame in enumerate(frames_BHWC):
        y, x = divmod(i, columns)
        out[y * height:(y + 1) * height, x * width:(x + 1) * width] = frame
    return out


class Screen:
    """Keeps what a render mode needs; one per face.

    Args:
        mode: None or one of ``MODES``. core: the batched core. fps: speed of the window.
    """

    def __init__(self, mode: str | None, core: Any) -> None:
        self.mode, self.core = check_mode(mode), core
        self._lists: list[list[np.ndarray]] = [[] for _ in range(core.num_slots)]
        self._window: Any = None
        self._clock: Any = None

    @property
    def fps(self) -> float:
        """Rendered frames per second of game time."""
        return float(self.core.spec.fps) if self.mode == "rgb_array_list" else (
            self.core.control_rate)

    def after_reset(self, slots: Any = None) -> None:
        """Take in the start frames of ``slots`` (None: all)."""
        if self.mode == "rgb_array_list":
            frames = self.core.current_frames()
            for slot in range(self.core.num_slots) if slots is None else slots:
                self._lists[slot] = [frames[slot]]
        elif self.mode == "human":
            self._show()

    def after_step(self, batch: Any) -> None:
        """Take in the frames that a step made."""
        if self.mode == "rgb_array_list":
            for slot, row in enumerate(self._lists):
                if batch.stepped_B[slot]:
                    first = 0 if batch.first_frame_B is None else batch.first_frame_B[slot]
                    row.extend(batch.frames_BFHWC[
                        slot, first : batch.last_frame_B[slot] + 1].copy())
            if not batch.stepped_B.all():
                self.after_reset(np.flatnonzero(~batch.stepped_B))
        elif self.mode == "human":
            self._show()

    def render(self) -> list[Any] | None:
        """One entry per slot: a frame (H, W, 3) or a list of them; None for a window."""
        self.core.ready()
        if self.mode == "rgb_array":
            return list(self.core.current_frames())
        if self.mode == "rgb_array_list":
            out, self._lists = self._lists, [[] for _ in self._lists]
            return out
        if self.mode == "human":
            self._show()
            return None
        raise ConfigError("nothing to render", given="render_mode=None", expected=f"one of {MODES}",
                          fix='make the env with render_mode="rgb_array"')

    def _show(self) -> None:
        try:
            import pygame
        except ImportError as error:
            raise MissingDependencyError("the window needs pygame", given="no pygame",
                                         expected="pygame-ce", fix="pip install pygame-ce"
                                         ) from error
        picture = tile(self.core.current_frames())
        scale = max(1, 480 // max(picture.shape[:2]))
        picture = picture.repeat(scale, 0).repeat(scale, 1)
        if self._window is None:
            pygame.display.init()
            self._window = pygame.display.set_mode(picture.shape[1::-1])
            self._clock = pygame.time.Clock()
        surface = pygame.surfarray.make_surface(picture.transpose(1, 0, 2))
        self._window.blit(surface, (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        self._clock.tick(self.fps)

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            import pygame

            pygame.display.quit()
        self._window = None
