"""The optimizer x hyperparameter matrix: a new optimizer or estimator enrols by one entry.

Every real-valued hyperparameter of every torch optimizer stands here, as accepted (its derivative must equal central
differences) or refused (with the error that it must raise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hypergrad import HyperparameterError, OptimizerHyperparameter, UnsupportedOptimizerError

Loss = Callable[[torch.nn.Module], torch.Tensor]


class Lion(torch.optim.Optimizer):
    """A third-party optimizer as users write them: out of torch operations, on `.data`, with Python floats."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                # tanh in place of Lion's sign, so that every derivative is alive
                update = torch.tanh(3 * (state["exp_avg"] * group["betas"][0] + p.grad * (1 - group["betas"][0])))
                p.data.add_(update, alpha=-group["lr"])
                state["exp_avg"].mul_(group["betas"][1]).add_(p.grad, alpha=1 - group["betas"][1])


@dataclass(frozen=True)
class Cell:
    """One optimizer with one setting, and what becomes of each of its hyperparameters."""

    optimizer: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    accepted: Sequence[str]
    refused: dict[str, type[Exception]] = field(default_factory=dict)
    matrices_only: bool = False
    difference: float = 0.02  # relative step of central differences; small where the rule has a max(), a kink
    carried: bool = True  # whether tangents can be carried over several steps; refused otherwise

    @property
    def name(self) -> str:
        return self.optimizer.__name__ + "".join(f" {k}={v}" for k, v in self.settings.items())


O = torch.optim
_ADAM = ("lr", "weight_decay", "betas[0]", "betas[1]", "eps")
_SGD = ("lr", "weight_decay", "momentum", "dampening")
_IGNORED, _LOST = HyperparameterError, UnsupportedOptimizerError

CELLS = [
    Cell(O.SGD, {"lr": 0.1}, ("lr", "weight_decay"), {"momentum": _IGNORED, "dampening": _IGNORED}),
    Cell(O.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}, _SGD),
    Cell(O.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 0.1}, _SGD),
    Cell(
        O.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        ("lr", "weight_decay", "momentum", "dampening"),
    ),
    Cell(O.Adam, {"lr": 0.1}, _ADAM),
    Cell(O.Adam, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}, _ADAM, difference=1e-4),
    Cell(O.Adam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, _ADAM),
    Cell(O.AdamW, {"lr": 0.1, "weight_decay": 0.1}, _ADAM),
    Cell(O.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}, _ADAM),
    Cell(O.AdamW, {"lr": 0.0}, ("lr",)),
    Cell(O.RMSprop, {"lr": 0.01}, ("lr", "weight_decay", "alpha", "eps"), {"momentum": _LOST}),
    Cell(
        O.RMSprop,
        {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
        ("lr", "weight_decay", "alpha", "eps", "momentum"),
    ),
    Cell(
        O.Adagrad,
        {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1, "eps": 0.01},
        ("lr", "weight_decay", "lr_decay", "eps"),
        {"initial_accumulator_value": _IGNORED},
    ),
    Cell(O.NAdam, {"lr": 0.1, "weight_decay": 0.1}, (*_ADAM, "momentum_decay")),
    Cell(O.NAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}, (*_ADAM, "momentum_decay")),
    Cell(O.RAdam, {"lr": 0.1, "weight_decay": 0.1}, _ADAM),
    Cell(O.RAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}, _ADAM),
    Cell(O.Adamax, {"lr": 0.1, "weight_decay": 0.1, "eps": 0.01, "betas": (0.9, 0.5)}, _ADAM, difference=1e-4),
    Cell(O.Adadelta, {"lr": 1.0, "weight_decay": 0.1}, ("lr", "weight_decay", "rho", "eps")),
    Cell(
        O.ASGD,
        {"lr": 0.1, "weight_decay": 0.1},
        ("weight_decay", "lambd"),
        {"lr": _IGNORED, "alpha": _IGNORED, "t0": _IGNORED},
    ),
    Cell(
        O.Rprop,
        {"lr": 0.01},
        ("etas[1]",),
        {"lr": _IGNORED, "etas[0]": _IGNORED, "step_sizes[0]": _IGNORED, "step_sizes[1]": _IGNORED},
    ),
    Cell(
        O.Adafactor,
        {"lr": 0.1, "weight_decay": 0.1},
        ("lr", "weight_decay", "beta2_decay"),
        {"eps[1]": _IGNORED, "d": _IGNORED},
    ),
    Cell(Lion, {"lr": 0.1, "weight_decay": 0.1}, ("lr", "weight_decay", "betas[0]"), {"betas[1]": _IGNORED}),
]
if hasattr(O, "Muon"):  # torch 2.9
    _MUON = Cell(
        O.Muon,
        {"lr": 0.1, "weight_decay": 0.1},
        ("lr", "weight_decay"),
        {"momentum": _LOST, "eps": _IGNORED, "ns_steps": _LOST}
        | {f"ns_coefficients[{i}]": _LOST for i in range(3)},  # bfloat16 inside
        matrices_only=True,
        carried=False,
    )
    CELLS.append(_MUON)
ACCEPTED = [(cell, name) for cell in CELLS for name in cell.accepted]
REFUSED = [(cell, name) for cell in CELLS for name in cell.refused]


def ids(pairs: list[tuple[Cell, str]]) -> list[str]:
    return [f"{cell.name}-{name}" for cell, name in pairs]


class Problem:
    """A small nonlinear regression, float64, one batch per step; two param groups if asked."""

    def __init__(self, cell: Cell, *, groups: int = 1, steps: int = 9) -> None:
        self.cell, self.groups, self.steps = cell, groups, steps
        self.batches = torch.randn(steps + 1, 16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(self) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(2)
        bias = not self.cell.matrices_only
        model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
        return model

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        params = list(model.parameters())
        if self.groups == 1:
            return self.cell.optimizer(params, **self.cell.settings)
        half = len(params) // 2
        groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.7 * self.cell.settings["lr"]}]
        return self.cell.optimizer(groups, **self.cell.settings)

    def loss(self, step: int) -> Loss:
        x = self.batches[step]
        target = torch.stack([x.sum(1).sin(), x.prod(1)], dim=1)
        return lambda model: (model(x) - target).square().mean() + 0.1 * model(x).square().add(0.1).sqrt().mean()

    @property
    def train_losses(self) -> list[Loss]:
        return [self.loss(i) for i in range(self.steps)]

    @property
    def val_loss(self) -> Loss:
        return self.loss(self.steps)

    def last_step_difference(self, name: str, group: int = 0) -> float:
        """d(val_loss)/d(value at the last step), by central differences extrapolated twice (Richardson)."""
        return self._difference(name, group, self.cell.difference, first=self.steps - 1)

    def run_difference(self, name: str, group: int = 0) -> float:
        """d(val_loss)/d(value at every step), in the same way. Over a run every rule has kinks or bends sharply."""
        return self._difference(name, group, min(self.cell.difference, 1e-3), first=0)

    def _difference(self, name: str, group: int, difference: float, first: int) -> float:
        hyperparameter = OptimizerHyperparameter(name)
        value = hyperparameter.read(self.optimizer(self.model()).param_groups[group])
        h = difference * (min(value, 1 - value) if 0 < value < 1 else abs(value)) or 1e-3
        if name == "momentum_decay" or value == 1e-8:
            h = 0.9 * value  # an effect that is linear and tiny: a short difference drowns in rounding

        def loss(at: float) -> float:
            model = self.model()
            optimizer = self.optimizer(model)
            for i, train_loss in enumerate(self.train_losses):
                optimizer.zero_grad()
                train_loss(model).backward()
                if i == first:
                    hyperparameter.write(optimizer.param_groups[group], at)
                optimizer.step()
            return self.val_loss(model).item()

        table = [(loss(value + h / 2**k) - loss(value - h / 2**k)) / (2 * h / 2**k) for k in range(3)]
        once = [(4 * table[k + 1] - table[k]) / 3 for k in range(2)]
        return (16 * once[1] - once[0]) / 15
