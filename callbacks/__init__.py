"""Lightning callbacks of hypergrad."""

from hypergrad.callbacks._history import Update
from hypergrad.callbacks.early_stopping import EarlyStopping
from hypergrad.callbacks.hypergradient import HyperGradient
from hypergrad.callbacks.stopping_criteria import (
    GeneralizationLoss,
    Patience,
    ProgressQuotient,
    StoppingCriterion,
    UpStrips,
)
from hypergrad.callbacks.trial_pruning import TrialPruning

__all__ = [
    "EarlyStopping",
    "GeneralizationLoss",
    "HyperGradient",
    "Patience",
    "ProgressQuotient",
    "StoppingCriterion",
    "TrialPruning",
    "UpStrips",
    "Update",
]
