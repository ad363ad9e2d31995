"""Hyperparameters in the loss: the module, and every estimator that can serve them against central differences."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hypergrad import (
    ConfigurationError,
    Curvature,
    Estimator,
    Exact,
    FiniteDifference,
    Forward,
    Hyperparameter,
    HyperparameterError,
    Implicit,
    Online,
    Unrolled,
    check,
    hypergradient,
)

ESTIMATORS: dict[str, Callable[[Curvature], Estimator]] = {
    "Online": lambda c: Online(curvature=c),
    "Forward": lambda c: Forward(curvature=c),
    "Unrolled": lambda c: Unrolled(curvature=c),
    "Unrolled(2)": lambda c: Unrolled(2, c),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.02),
}


class Net(nn.Module):
    """Label smoothing, L1, L2 per layer, a weight per example and per class; dropout and BatchNorm beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
        )
        self.smoothing = Hyperparameter(0.1, transform="logit")
        self.l1 = Hyperparameter(1e-2)
        self.l2 = nn.ModuleDict({name: Hyperparameter(0.1) for name in ("0", "4")})
        self.examples = Hyperparameter(torch.rand(5) + 0.5, transform="softplus")
        self.classes = Hyperparameter(torch.rand(3), transform="none")
        self.x, self.y = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])

    def train_loss(self) -> torch.Tensor:
        log_p = self.net(self.x).log_softmax(1)
        each = (1 - self.smoothing()) * -log_p[range(5), self.y] - self.smoothing() * log_p.mean(1)
        loss = (each * self.examples() * self.classes()[self.y]).mean()
        for name, penalty in self.l2.items():
            loss = loss + penalty() * self.net[int(name)].weight.square().sum()
        return loss + self.l1() * self.net[4].weight.abs().sum()

    def val_loss(self) -> torch.Tensor:
        return cross_entropy(self.net(self.x.flip(0)), self.y)


@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference()], ids=["exact", "difference"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_central_differences(optimizer: str, estimator: str, curvature: Curvature, double: None) -> None:
    model = Net()
    learned = [m for m in model.modules() if isinstance(m, Hyperparameter)]
    before = copy.deepcopy(model.state_dict())
    result = check(
        *(model, OPTIMIZERS[optimizer](model), [Net.train_loss] * 4, Net.val_loss, ["lr", *learned]),
        ESTIMATORS[estimator](curvature),
        tolerance=1e-5 if isinstance(curvature, Exact) else 1e-3,
    )
    assert [row.name for row in result.rows if row.verdict == "disagrees"] == [], result
    assert sum(row.verdict == "agrees" for row in result.rows) >= len(result.rows) - 1, result
    assert len(result.rows) == 1 + 1 + 1 + 2 + 5 + 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(m.value.requires_grad or m.value.grad is not None for m in learned)


def test_the_direct_term_counts(double: None) -> None:
    model = Net()
    optimizer = OPTIMIZERS["SGD"](model)
    for estimator in (Online(), Forward(), Unrolled()):
        plain = hypergradient(model, optimizer, [Net.train_loss] * 2, Net.val_loss, [model.l1], estimator)
        direct = hypergradient(
            model, optimizer, [Net.train_loss] * 2, lambda m: m.val_loss() + 3.0 * m.l1(), [model.l1], estimator
        )
        assert (direct.grads["l1"] - plain.grads["l1"]).item() == pytest.approx(3.0)


def test_one_that_the_loss_never_uses_is_named() -> None:
    model = Net()
    model.unused = Hyperparameter(0.5)
    for estimator in (Online(), Forward(), Unrolled(), Implicit()):
        with pytest.raises(HyperparameterError, match="differentiated depends on unused"):
            hypergradient(
                model, OPTIMIZERS["SGD"](model), [Net.train_loss] * 2, Net.val_loss, [model.l1, model.unused], estimator
            )


def test_forward_refuses_what_would_cost_too_much() -> None:
    model = Net()
    model.many = Hyperparameter(torch.ones(1000))
    optimizer = OPTIMIZERS["SGD"](model)
    with pytest.raises(HyperparameterError, match=r"1,000.*Unrolled\(\)"):
        hypergradient(model, optimizer, [Net.train_loss], Net.val_loss, [model.many], Forward())
    with pytest.raises(HyperparameterError, match="curvature=None"):
        hypergradient(model, optimizer, [Net.train_loss], Net.val_loss, [model.l1], Forward(curvature=None))


def test_it_is_saved_and_moved_but_not_trained() -> None:
    model = Net()
    assert not any("value" in name for name, _ in model.named_parameters())
    assert "l2.0.value" in model.state_dict()
    other = Net()
    other.l1.value.fill_(0.7)
    tensor = model.l1.value
    model.load_state_dict(other.state_dict())
    assert model.l1.value is tensor
    assert model.l1().item() == pytest.approx(0.7)
    model.train_loss().backward()
    assert tensor.grad is None
    assert model.to(torch.float64).l1().dtype == torch.float64
    assert "transform=logit" in repr(model.smoothing)


def test_moves_stay_in_the_domain() -> None:
    fraction = Hyperparameter(torch.tensor([0.5, 0.5]), transform="logit", upper=0.9)
    fraction.move(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(fraction(), torch.tensor([0.7310586, 0.2689414]))
    fraction.move(torch.tensor([100.0, -5.0]))
    assert fraction()[0].item() == pytest.approx(0.9)
    assert 0.0 < fraction()[1] < 0.01
    free = Hyperparameter(torch.tensor(0.5), transform="logit")
    free.move(torch.tensor(1000.0))  # would be exactly 1, from where there is no way back
    assert free().item() == 0.5
    scale = Hyperparameter(2.0)
    scale.move(torch.tensor(1.0))
    assert scale().item() == pytest.approx(2.0 * 2.718281828)


def test_bad_values() -> None:
    for value, options, problem in [
        (0.0, {}, "outside the open domain"),
        (-1.0, {"transform": "softplus"}, "outside the open domain"),
        (1.0, {"transform": "logit"}, "outside the open domain"),
        (0.5, {"lower": 0.6}, r"must lie in \[0.6"),
        (0.5, {"lower": 0.6, "upper": 0.4}, "below"),
        (float("nan"), {}, "finite ones, but got nan"),
        (torch.zeros(0), {}, "at least one number"),
    ]:
        with pytest.raises(HyperparameterError, match=problem):
            Hyperparameter(value, **options)
    with pytest.raises(ConfigurationError, match="'log', 'logit', 'softplus', 'none'"):
        Hyperparameter(0.5, transform="exp")  # type: ignore[arg-type]


def test_it_must_be_part_of_the_model() -> None:
    model, stranger = Net(), Hyperparameter(0.1)
    optimizer = OPTIMIZERS["SGD"](model)
    with pytest.raises(HyperparameterError, match="assign it to an attribute"):
        hypergradient(model, optimizer, [Net.train_loss], Net.val_loss, [stranger])
    with pytest.raises(HyperparameterError, match="'l1' twice"):
        hypergradient(model, optimizer, [Net.train_loss], Net.val_loss, [model.l1, model.l1])
