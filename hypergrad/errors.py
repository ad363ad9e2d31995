"""What can go wrong, as a small tree: catch `HypergradError` for everything, or a builtin for a kind."""

from __future__ import annotations


class HypergradError(Exception):
    """Base of every error that hypergrad raises on purpose."""


class HyperparameterError(HypergradError, ValueError):
    """A hyperparameter that does not exist, is not a real number, or that the optimizer ignores."""


class UnsupportedOptimizerError(HypergradError, TypeError):
    """An optimizer whose step has no derivative here; the message names what to use instead."""


class NotDifferentiableError(HypergradError, RuntimeError):
    """A loss from which no gradient reaches the parameters."""


class ConfigurationError(HypergradError, ValueError):
    """Settings that cannot work together with this module, Trainer or data."""
