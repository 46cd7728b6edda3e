"""Named errors. Every message says what was given, what was expected and how to fix it."""


class WorldGymError(Exception):
    """Base of every error worldgym raises on purpose.

    Args:
        what: the condition, in a few words.
        given: what was received.
        expected: what would have been right.
        fix: the next thing to do.
    """

    def __init__(self, what: str, *, given: object, expected: object, fix: str) -> None:
        self.what, self.given, self.expected, self.fix = what, given, expected, fix
        super().__init__(what, given, expected, fix)

    def __str__(self) -> str:
        return f"{self.what}: got {self.given}; expected {self.expected}. Fix: {self.fix}"


class ShapeError(WorldGymError, ValueError):
    """A tensor or array has the wrong shape."""


class DTypeError(WorldGymError, TypeError):
    """A tensor or array has the wrong dtype, or an argument the wrong type."""


class NotFiniteError(WorldGymError, ValueError):
    """A value is NaN or infinite."""


class ActionError(WorldGymError, ValueError):
    """An action lies outside its space."""


class ConfigError(WorldGymError, ValueError):
    """A configuration or constructor argument is impossible."""


class SlotError(WorldGymError, IndexError):
    """A slot number does not exist, is repeated, or the list of slots is empty."""


class StateError(WorldGymError, ValueError):
    """A world state does not fit this world, or was released."""


class ResetNeeded(WorldGymError, RuntimeError):
    """``step`` was called before ``reset``, or after the episode ended."""


class ClosedError(WorldGymError, RuntimeError):
    """The environment was closed."""


class MemoryBudgetError(WorldGymError, MemoryError):
    """The page pool would outgrow its budget."""


class TransactionError(WorldGymError, RuntimeError):
    """A memory page was written twice, or a stale plan was committed."""


class CheckpointError(WorldGymError, ValueError):
    """A checkpoint is missing, truncated, or its tensors do not fit the model."""


class UnsafeFileError(WorldGymError, ValueError):
    """A pickle would run code, or a file is of a kind we refuse to open."""


class DatasetError(WorldGymError, ValueError):
    """A recorded data set is missing, truncated or inconsistent."""


class LicenceError(WorldGymError, PermissionError):
    """The licence of a world does not allow this use."""


class MissingDependencyError(WorldGymError, ImportError):
    """An optional package is needed for this call."""


class CommandError(WorldGymError, ValueError):
    """A command line argument makes no sense."""
