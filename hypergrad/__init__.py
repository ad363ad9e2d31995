"""Tune neural networks by gradient: d(validation loss)/d(hyperparameter), for any torch optimizer.

`hypergrad.callbacks` holds the Lightning callback; this package is the mathematics and needs torch only.
"""

from hypergrad.activation_pattern import ActivationPattern, HeldLoss
from hypergrad.autodiff import gradient, requiring_grad
from hypergrad.checking import CheckedHyperparameter, CheckResult, check
from hypergrad.clipping import ClippedLoss, Clipping
from hypergrad.controllers.base import Controller, Reading
from hypergrad.controllers.cautious import Cautious
from hypergrad.controllers.descent import Descent
from hypergrad.controllers.frozen import Frozen
from hypergrad.controllers.gated import Gated
from hypergrad.controllers.hold import Hold
from hypergrad.controllers.race import Race, best_arms, boldest_arms, has_learned
from hypergrad.controllers.readout import Best, Readout
from hypergrad.controllers.rewind import Rewind, notable
from hypergrad.controllers.shape import Cosine, Linear, Shape
from hypergrad.controllers.timescale import Timescale
from hypergrad.curvature import Curvature, Exact, SharedLoss
from hypergrad.data import split
from hypergrad.errors import (
    ConfigurationError,
    HypergradError,
    HyperparameterError,
    NotDifferentiableError,
    UnsupportedOptimizerError,
)
from hypergrad.estimators.base import Contraction, Estimator, Tracker
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.implicit import Implicit
from hypergrad.estimators.online import Online
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.finite_difference import FiniteDifference
from hypergrad.functional import HypergradientResult, check_names, hypergradient
from hypergrad.hyperparameter import OptimizerHyperparameter, resolve
from hypergrad.isolation import preserved
from hypergrad.loss_hyperparameter import Hyperparameter, loss_hyperparameters
from hypergrad.optimizer.rules import decay_rate
from hypergrad.optimizer.step import check_optimizer
from hypergrad.relaxation import relaxed_dropout
from hypergrad.rng import RngState, generators_of, preserved_rng
from hypergrad.schedule import Schedule
from hypergrad.scopes import rejoin_groups, split_groups
from hypergrad.solvers import CG, Neumann, Nystrom, Solution, Solver
from hypergrad.torch_internals import raw_step, step_hooks
from hypergrad.training_state import (
    TrainingState,
    copied,
    exchange_tensors,
    live_tensors,
    parts_of_others,
    write_tensors,
)
from hypergrad.transform import Identity, Log, Logit, Softplus, Transform
from hypergrad.tuner import Measurement, Outcome, TensorMeasurement, Tuner

__all__ = [
    "CG",
    "ActivationPattern",
    "Best",
    "Cautious",
    "CheckResult",
    "CheckedHyperparameter",
    "ClippedLoss",
    "Clipping",
    "ConfigurationError",
    "Contraction",
    "Controller",
    "Cosine",
    "Curvature",
    "Descent",
    "Estimator",
    "Exact",
    "FiniteDifference",
    "Forward",
    "Frozen",
    "Gated",
    "HeldLoss",
    "Hold",
    "HypergradError",
    "HypergradientResult",
    "Hyperparameter",
    "HyperparameterError",
    "Identity",
    "Implicit",
    "Linear",
    "Log",
    "Logit",
    "Measurement",
    "Neumann",
    "NotDifferentiableError",
    "Nystrom",
    "Online",
    "OptimizerHyperparameter",
    "Outcome",
    "Race",
    "Reading",
    "Readout",
    "Rewind",
    "RngState",
    "Schedule",
    "Shape",
    "SharedLoss",
    "Softplus",
    "Solution",
    "Solver",
    "TensorMeasurement",
    "Timescale",
    "Tracker",
    "TrainingState",
    "Transform",
    "Tuner",
    "Unrolled",
    "UnsupportedOptimizerError",
    "best_arms",
    "boldest_arms",
    "check",
    "check_names",
    "check_optimizer",
    "copied",
    "decay_rate",
    "exchange_tensors",
    "generators_of",
    "gradient",
    "has_learned",
    "hypergradient",
    "live_tensors",
    "loss_hyperparameters",
    "notable",
    "parts_of_others",
    "preserved",
    "preserved_rng",
    "raw_step",
    "rejoin_groups",
    "relaxed_dropout",
    "requiring_grad",
    "resolve",
    "split",
    "split_groups",
    "step_hooks",
    "write_tensors",
]
