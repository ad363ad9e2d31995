"""Lightning callbacks of hypergrad."""

from hypergrad.callbacks._history import Update
from hypergrad.callbacks.hypergradient import HyperGradient
from hypergrad.callbacks.trial_pruning import TrialPruning

__all__ = ["HyperGradient", "TrialPruning", "Update"]
