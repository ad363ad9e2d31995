"""Lightning callbacks of hypergrad."""

from hypergrad.callbacks._history import Update
from hypergrad.callbacks.hypergradient import HyperGradient

__all__ = ["HyperGradient", "Update"]
