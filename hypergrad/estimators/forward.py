"""Forward-mode hypergradients: the tangent of the whole run, carried along with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hypergrad.clipping import ClippedLoss
from hypergrad.curvature import Curvature, Evaluation, Exact
from hypergrad.errors import ConfigurationError, HypergradError, HyperparameterError
from hypergrad.estimators.base import (
    Contraction,
    Estimator,
    Learned,
    Pace,
    Tensors,
    Tracker,
    norm,
    plain,
    wide,
)
from hypergrad.hyperparameter import OptimizerHyperparameter
from hypergrad.optimizer.closed_forms import carried
from hypergrad.optimizer.packets import gradient_of, stepped_params
from hypergrad.optimizer.step import Direction, StateVector, check_optimizer
from hypergrad.optimizer.verify import verify
from hypergrad.schedule import Schedule
from hypergrad.scopes import reference, units, weights

# One direction per number: beyond this many, going backwards is cheaper by far.
_MOST_DIRECTIONS = 256


@dataclass(frozen=True)
class Forward(Estimator):
    """Carries Z = d(parameters, optimizer state)/d(lam) through every step:

        Z' = dPhi/ds Z + dPhi/dlam,    h = grad L_val(theta) . Z_theta

    so that the hypergradient sees the effect of a hyperparameter on all steps since tracking began, in memory that does
    not grow with their number: one copy of parameters and optimizer state per hyperparameter and param group, or per
    element of a hyperparameter in the loss. Each of them costs one Hessian-vector product and one differentiated step
    per training step.

    Forward-HG of Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization", eqs. 13-15;
    real-time recurrent learning of a hyperparameter.

    Args:
        decay: Z is multiplied by it before each step, in [0, 1]: 1 is exact over the whole run, 0 looks one step ahead
            as `Online` does, between them the effect on later steps fades.
        curvature: how Hessian-vector products are computed; None drops them: the gradient of every step is then taken
            to be what it was, whatever the parameters.

    Raises:
        ConfigurationError: for a decay outside [0, 1].
    """

    decay: float = 1.0
    curvature: Curvature | None = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigurationError(f"`decay` must lie in [0, 1], but got {self.decay!r}.")
        if self.curvature is not None and not isinstance(self.curvature, Curvature):
            raise ConfigurationError(
                f"`curvature` must be Exact(), FiniteDifference() or None, but got {self.curvature!r}."
            )

    @property
    def needs_every_step(self) -> bool:
        """Whether every step of a run must be tracked, and not only the one before a validation loss."""
        return self.decay > 0.0

    def track(
        self,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Learned],
        tensors: Tensors | None = None,
    ) -> Tracker:
        """Start to follow an optimizer; checks on a small problem that its steps are differentiated correctly."""
        tensors = tensors or {}
        numbers = sum(t.numel() for t in tensors.values())
        if tensors and self.curvature is None:
            raise HyperparameterError(
                f"{', '.join(tensors)}: hyperparameters in the loss act through its second derivatives, which "
                "Forward(curvature=None) drops. Use curvature=Exact() or FiniteDifference()."
            )
        if numbers > _MOST_DIRECTIONS:
            raise HyperparameterError(
                f"Forward costs one Hessian-vector product per number, and {', '.join(tensors)} have {numbers:,}: "
                "use Unrolled() or Implicit(), whose cost does not depend on it."
            )
        check_optimizer(optimizer)
        verify(optimizer, [plain(h) for h in hyperparameters], carried=self.decay > 0.0)
        return _ForwardTracker(self, optimizer, hyperparameters, tensors)


# What a direction is along: a number of a hyperparameter, a knot of a schedule, or an element of a tensor in the loss.
_Key = tuple[int, Learned | str]


class _ForwardTracker(Tracker):
    def __init__(
        self,
        estimator: Forward,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Learned],
        tensors: Tensors,
    ) -> None:
        self._estimator = estimator
        self._optimizer = optimizer
        self._hyperparameters = hyperparameters
        self._tensors = tensors
        self._unused = set(tensors)
        self._tangents: dict[_Key, StateVector] = {}
        self._paces: dict[_Key, Pace] = {}
        self._units: dict[str, int] = {}  # how many numbers each hyperparameter has
        self._moved: list[torch.Tensor] = []  # by any tracked step
        self._steps = 0
        self._products = 0

    @property
    def params(self) -> list[torch.Tensor]:
        return [*self._moved, *self._tensors.values()] if self._moved else []

    @property
    def needs_loss(self) -> bool:
        return bool(self._tensors) or (self._estimator.decay > 0.0 and self._estimator.curvature is not None)

    @property
    def needs_graph(self) -> bool:
        curvature = self._estimator.curvature
        return self._will_ask and curvature is not None and curvature.uses_graph

    @property
    def needs_pattern(self) -> bool:
        curvature = self._estimator.curvature
        # With tensors in the loss its gradient is taken anew.
        return self._will_ask and curvature is not None and curvature.uses_pattern and not self._tensors

    @property
    def _will_ask(self) -> bool:
        """Whether the coming step has directions to ask for the Hessian in."""
        known = any(tangents.params for tangents in self._tangents.values())
        return self.needs_loss and (known or bool(self._tensors))

    @torch.no_grad()
    def before_step(self, loss: Evaluation | None = None) -> None:
        optimizer = self._optimizer
        stepped = [stepped_params(group) for group in optimizer.param_groups]
        moving = dict.fromkeys(p for params in stepped for p in params)
        self._fade()
        self._moved = list(dict.fromkeys([*self._moved, *moving]))
        for h in self._hyperparameters:
            self._units[h.name] = len(h.knots) if isinstance(h, Schedule) else len(units(h, optimizer.param_groups))
        for key in self._keys():
            self._tangents.setdefault(key, StateVector())
        own = {key: self._own_direction(key) for key in self._tangents}
        with self._gradient_tangents(loss, list(moving)) as gradient_tangent:
            for key, before in self._tangents.items():
                direction = Direction(own[key], before.params, gradient_tangent(key), before.state)
                after = carried(optimizer, direction)
                # A parameter without a gradient stays where it is, and so does its tangent.
                self._tangents[key] = StateVector(
                    {**{p: t for p, t in before.params.items() if p not in moving}, **after.params},
                    {**{p: t for p, t in before.state.items() if p not in moving}, **after.state},
                )
        curvature = self._estimator.curvature
        if self._steps == 0 and loss is not None and curvature is not None and self._estimator.decay > 0.0:
            curvature.check(loss, {p: gradient_of(p) for p in moving})
        self._steps += 1

    @torch.no_grad()
    def contract(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> Contraction:
        if not self._tangents:
            raise HypergradError("There is no tracked step to contract with: call before_step() before the update.")
        dtype = wide(list(gradients.values()))
        device = next(iter(gradients)).device if gradients else torch.device("cpu")
        zero = torch.zeros((), device=device, dtype=dtype)
        pairs: dict[_Key, tuple[torch.Tensor, torch.Tensor]] = {}
        for key, tangents in self._tangents.items():
            dots = [(gradients[p].to(dtype) * t.to(dtype)).sum() for p, t in tangents.params.items()]
            squares = [t.to(dtype).square().sum() for t in tangents.params.values()]
            unit = self._paces[key].unit if key in self._paces else 1.0
            pairs[key] = sum(dots, zero) * unit, sum(squares, zero).sqrt() * unit
        hypergradients: dict[str, torch.Tensor] = {}
        tangent_norms: dict[str, torch.Tensor] = {}
        for h in self._hyperparameters:
            rows = [pairs[i, h] for i in range(self._units[h.name])]
            hypergradients[h.name], tangent_norms[h.name] = (torch.stack(column) for column in zip(*rows, strict=True))
        for name, tensor in self._tensors.items():
            rows = [pairs[i, name] for i in range(tensor.numel())]
            through, norms = (torch.stack(column).view(tensor.shape) for column in zip(*rows, strict=True))
            hypergradients[name] = through + gradients[tensor].to(through)
            tangent_norms[name] = norms
        # Every hyperparameter acts, through the loss, on all parameters.
        whole = norm([gradients[p] for p in self._moved], dtype)
        gradient_norms = {name: whole.expand(norms.shape) for name, norms in tangent_norms.items()}
        products, self._products = self._products, 0
        return Contraction(hypergradients, tangent_norms, gradient_norms, products=products, unused=tuple(self._unused))

    def state_dict(self) -> dict[str, Any]:
        """The tangents, by parameter and hyperparameter."""
        index = {p: i for i, p in enumerate(self._all_params())}
        return {
            "steps": self._steps,
            "moved": [index[p] for p in self._moved],
            "unused": sorted(self._unused),
            "tangents": {
                _label(key): {
                    "params": {index[p]: t for p, t in z.params.items()},
                    "state": {index[p]: dict(entry) for p, entry in z.state.items()},
                }
                for key, z in self._tangents.items()
            },
            "paces": {_label(key): pace.state_dict() for key, pace in self._paces.items()},
        }

    def load_state_dict(self, state: dict[str, Any], losses: Sequence[Evaluation | None] = ()) -> None:  # noqa: ARG002
        """Continue as the tracker that returned `state`; tangents of hyperparameters that it did not have are 0."""
        params = self._all_params()
        self._steps = state["steps"]
        self._moved = [params[i] for i in state["moved"]]
        self._unused = set(state["unused"]) & set(self._tensors)
        known: dict[str, Learned | str] = {h.name: h for h in self._hyperparameters}
        known |= {name: name for name in self._tensors}
        # In one order in all processes that share the loss, as everywhere: they meet at every product.
        for label in dict.fromkeys([*state["tangents"], *state["paces"]]):
            name, _, index = label.rpartition("/")
            if name not in known:
                continue
            key = int(index), known[name]
            if label in state["tangents"]:
                saved = state["tangents"][label]
                self._tangents[key] = StateVector(
                    {params[i]: t.to(params[i].device) for i, t in saved["params"].items()},
                    {params[i]: {k: _placed(params[i], t) for k, t in e.items()} for i, e in saved["state"].items()},
                )
            if label in state["paces"]:
                self._paces.setdefault(key, Pace()).load_state_dict(state["paces"][label])

    def _all_params(self) -> list[torch.Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _own_direction(self, key: _Key) -> dict[tuple[int, OptimizerHyperparameter], float]:
        index, what = key
        if isinstance(what, str):
            return {}
        if isinstance(what, Schedule):
            rate = what.rates(self._steps).get(index, 0.0)
            return {(i, what.hyperparameter): rate for i in range(len(self._optimizer.param_groups)) if rate}
        groups = self._optimizer.param_groups
        unit = units(what, groups)[index]
        value = what.read(groups[reference(what, groups, unit)])
        rate, anew = self._paces.setdefault(key, Pace()).step(what, value)
        if anew:
            self._tangents[key] = StateVector()
        matrix = weights(what, groups)
        shares = {i: 1.0 if matrix is None else float(matrix[index, i]) for i in unit}
        return {(i, what): rate * share for i, share in shares.items() if rate * share}

    def _keys(self) -> list[_Key]:
        ours: list[_Key] = [(i, h) for h in self._hyperparameters for i in range(self._units[h.name])]
        return ours + [(i, name) for name, tensor in self._tensors.items() for i in range(tensor.numel())]

    def _fade(self) -> None:
        decay = self._estimator.decay
        if decay == 0.0:
            self._tangents, self._moved = {}, []
        elif decay < 1.0:
            self._tangents = {
                key: StateVector(
                    {p: decay * t for p, t in tangents.params.items()},
                    {p: {name: decay * t for name, t in entry.items()} for p, entry in tangents.state.items()},
                )
                for key, tangents in self._tangents.items()
            }

    @contextmanager
    def _gradient_tangents(
        self, loss: Evaluation | None, moving: list[torch.Tensor]
    ) -> Iterator[Callable[[_Key], dict[torch.Tensor, torch.Tensor]]]:
        """The tangent of every gradient in a direction: H Z, and what a hyperparameter in the loss does by itself.

        For one direction after the other, so that no more than one such tangent exists at a time.
        """
        curvature = self._estimator.curvature
        keys = [key for key, tangents in self._tangents.items() if tangents.params or isinstance(key[1], str)]
        if curvature is None or not keys:
            yield lambda _: {}
            return
        if loss is None:
            raise HypergradError("Forward needs the training loss of each step: call before_step(loss).")
        # Also parameters that this step does not move count: the gradients of others depend on them.
        involved = list(dict.fromkeys([*moving, *(p for key in keys for p in self._tangents[key].params)]))
        # Of one that has no gradient now, such as a layer that was frozen meanwhile, the loss may well have one.
        grads = [None if p.grad is None else p.grad.detach() for p in involved]
        asked = set(keys)
        clipped = None
        if isinstance(loss, ClippedLoss):
            raw, clipped = loss.gradients(moving, grads[: len(moving)])
            grads = [*raw, *grads[len(moving) :]]
        inputs, known = [*involved, *self._tensors.values()], [*grads, *[None] * len(self._tensors)]
        with curvature.at(loss, inputs, known, products=len(self._unused) + len(keys)) as product:

            def along(key: _Key) -> dict[torch.Tensor, torch.Tensor]:
                if key not in asked:
                    return {}
                tangents = self._tangents[key].params
                ones = [_one_hot(t, key[0]) if name == key[1] else None for name, t in self._tensors.items()]
                rows = product([*(tangents.get(p) for p in involved), *ones])
                self._products += 1
                rows = rows[: len(moving)]  # `involved` begins with those that move
                rows = rows if clipped is None else clipped(rows)
                return {p: t for p, t in zip(moving, rows, strict=True) if t is not None}

            for name in sorted(self._unused):
                alone = [torch.ones_like(t) if n == name else None for n, t in self._tensors.items()]
                rows = product([*[None] * len(involved), *alone])
                if any(row is not None for row in rows[: len(involved)]):
                    self._unused.discard(name)
            with torch.no_grad():
                yield along


def _placed(param: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    # Tangents of counters stay where counters are differentiated, on the CPU.
    return tangent if tangent.dim() == 0 and param.dim() > 0 else tangent.to(param.device)


def _label(key: _Key) -> str:
    return f"{key[1] if isinstance(key[1], str) else key[1].name}/{key[0]}"


def _one_hot(tensor: torch.Tensor, index: int) -> torch.Tensor:
    hot = torch.zeros_like(tensor)
    hot.view(-1)[index] = 1.0
    return hot
