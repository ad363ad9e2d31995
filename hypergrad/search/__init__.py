"""Search what has no gradient: studies whose trials can be pruned, killed, resumed and looked at.

Optuna draws the points and prunes; what is here owns processes, storage, retries and TensorBoard.
"""

from hypergrad.search.cross_validation import CrossValidation, cross_validate
from hypergrad.search.errors import ExecutionError, ObjectiveError, SpaceError, StorageError, TrialPruned
from hypergrad.search.execution.base import Began, Ended, Event, Executor, Launched, Reported
from hypergrad.search.execution.local import Local
from hypergrad.search.execution.ray import Ray
from hypergrad.search.messages import Job, Report, Result, Verdict
from hypergrad.search.parameter import Categorical, Constant, Float, Int, Parameter
from hypergrad.search.record import TrialRecord
from hypergrad.search.samplers.base import Proposal, Sampler
from hypergrad.search.samplers.grid import Grid
from hypergrad.search.samplers.pbt import PBT
from hypergrad.search.samplers.refine import Refine
from hypergrad.search.space import Space
from hypergrad.search.spec import StudySpec
from hypergrad.search.storage import Storage
from hypergrad.search.study import Study
from hypergrad.search.trial import Trial, current_trial

__all__ = [
    "PBT",
    "Began",
    "Categorical",
    "Constant",
    "CrossValidation",
    "Ended",
    "Event",
    "ExecutionError",
    "Executor",
    "Float",
    "Grid",
    "Int",
    "Job",
    "Launched",
    "Local",
    "ObjectiveError",
    "Parameter",
    "Proposal",
    "Ray",
    "Refine",
    "Report",
    "Reported",
    "Result",
    "Sampler",
    "Space",
    "SpaceError",
    "Storage",
    "StorageError",
    "Study",
    "StudySpec",
    "Trial",
    "TrialPruned",
    "TrialRecord",
    "Verdict",
    "cross_validate",
    "current_trial",
]
