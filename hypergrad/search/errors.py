"""What can go wrong in a search, and the one exception that is no error."""

from __future__ import annotations

from hypergrad.errors import ConfigurationError, HypergradError


class SpaceError(ConfigurationError):
    """A search space that cannot be searched: wrong bounds, impossible conditions, an infinite grid."""


class ObjectiveError(HypergradError, TypeError):
    """A `train` function that cannot be sent to a worker, or that returns something that is no number."""


class StorageError(HypergradError, RuntimeError):
    """A study folder that cannot be read, belongs to another study, or is in use."""


class ExecutionError(HypergradError, RuntimeError):
    """A place where no trial can be started."""


class TrialPruned(Exception):  # noqa: N818 - a decision, not an error
    """Raise it inside `train` to end the trial as pruned; the message becomes the reason in its record."""
