"""The functional front door: leaves no trace, and says what is wrong."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from hypergrad import (
    CG,
    ConfigurationError,
    FiniteDifference,
    Forward,
    Hyperparameter,
    HyperparameterError,
    Implicit,
    NotDifferentiableError,
    Online,
    Schedule,
    Unrolled,
    UnsupportedOptimizerError,
    hypergradient,
)


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
        )
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x + 0.1 * torch.randn_like(x) * random.random() * np.random.rand())


def _loss(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.ones(6, 4)).square().mean()


def _everything(model: Noisy, optimizer: torch.optim.Optimizer) -> object:
    return copy.deepcopy(
        (
            {k: v.tolist() for k, v in model.state_dict().items()},
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            repr(optimizer.state_dict()),
            model.training,
            model.calls,
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
        )
    )


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "in the middle of a run"])
@pytest.mark.parametrize("raises", [False, True])
def test_model_optimizer_and_rng_are_left_as_found(warm: bool, raises: bool) -> None:
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if warm:
        _loss(model).backward()
        optimizer.step()
        scheduler.step()
    before = _everything(model, optimizer)
    pointers = [p.data_ptr() for p in model.parameters()]

    def val_loss(model: torch.nn.Module) -> torch.Tensor:
        if raises:
            raise KeyError("mine")
        return _loss(model.eval())

    if raises:
        with pytest.raises(KeyError, match="mine"):
            hypergradient(model, optimizer, [_loss] * 3, val_loss)
    else:
        result = hypergradient(model, optimizer, [_loss] * 3, val_loss)
        assert result.gradient_evaluations == 4
        assert set(result.grads) == {"lr", "weight_decay"}
    assert _everything(model, optimizer) == before
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_the_same_call_gives_the_same_numbers() -> None:
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    a, b = (hypergradient(model, optimizer, [_loss] * 2, _loss) for _ in range(2))
    assert a.grads == b.grads
    assert a.value == b.value


def test_value_and_cosine(double: None) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    loss = lambda m: 0.5 * m.weight.square().sum()
    result = hypergradient(model, torch.optim.SGD(model.parameters(), lr=0.5), [loss, loss], loss, ["lr"])
    assert result.value.item() == pytest.approx(0.5 * 0.25**2)  # theta = 1 -> 0.5 -> 0.25
    assert result.grads["lr"].item() == pytest.approx(-0.25 * 0.5)  # theta'' * d theta''/d lr = 0.25 * (-0.5)
    assert result.cosines["lr"].item() == pytest.approx(-1.0)
    assert not result.value.requires_grad


def test_lr_as_a_tensor(double: None) -> None:
    model = torch.nn.Linear(3, 1)
    loss = lambda m: m(torch.ones(2, 3)).square().sum()
    results = [
        hypergradient(model, torch.optim.Adam(model.parameters(), lr=lr, foreach=False), [loss] * 2, loss).grads["lr"]
        for lr in (0.01, torch.tensor(0.01))
    ]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda m: 1.0, "scalar tensor, but got float"),
        (lambda m: m.weight, r"shape \(1, 2\)"),
        (lambda m: m.weight.sum().detach(), "without a graph"),
    ],
)
def test_losses_that_cannot_be_differentiated(loss: object, match: str) -> None:
    model = torch.nn.Linear(2, 1)
    good = lambda m: m(torch.ones(1, 2)).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotDifferentiableError, match=match):
        hypergradient(model, optimizer, [good], loss, ["lr"])  # type: ignore[arg-type]
    with pytest.raises(NotDifferentiableError, match=match):
        hypergradient(model, optimizer, [loss], good, ["lr"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["learning_rate"], r"no learnable hyperparameter 'learning_rate'.*offers lr, betas\[0\], betas\[1\]"),
        (["betas"], r"name one entry, such as 'betas\[0\]'"),
        (["betas[2]"], "offers"),
        (["amsgrad"], "False is not a real number"),
        (["lr", "lr"], "named once"),
        ([], "Name at least one"),
        ([3], "but got 3"),
        (["lr["], "but got 'lr\\['"),
    ],
)
def test_bad_names(names: list[object], match: str) -> None:
    model = torch.nn.Linear(2, 1)
    loss = lambda m: m(torch.ones(1, 2)).sum()
    with pytest.raises(HyperparameterError, match=match):
        hypergradient(model, torch.optim.Adam(model.parameters()), [loss], loss, names)  # type: ignore[arg-type]


def test_no_training_loss_and_refused_optimizers() -> None:
    model = torch.nn.Linear(2, 1)
    loss = lambda m: m(torch.ones(1, 2)).sum()
    with pytest.raises(ConfigurationError, match="`train_losses` is empty"):
        hypergradient(model, torch.optim.SGD(model.parameters(), lr=0.1), [], loss)
    with pytest.raises(UnsupportedOptimizerError, match="LBFGS"):
        hypergradient(model, torch.optim.LBFGS(model.parameters()), [loss], loss, ["lr"])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model": print}, "`model` must be a torch.nn.Module, but got <built-in"),
        ({"optimizer": "sgd"}, "`optimizer` must be a torch.optim.Optimizer, but got 'sgd'"),
        ({"train_losses": print}, r"sequence of callables .* such as \[loss\], but got <built-in"),
        ({"train_losses": [1.0]}, r"sequence of callables .* but got \[1.0\]"),
        ({"val_loss": 1.0}, r"`val_loss` must be a callable .* but got 1.0"),
        ({"estimator": Online}, r"must be an instance, such as Online\(\), but got <class"),
    ],
)
def test_arguments_of_another_kind(changed: dict[str, object], match: str) -> None:
    model = torch.nn.Linear(2, 1)
    loss = lambda m: m(torch.ones(1, 2)).sum()
    arguments = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_losses": [loss],
        "val_loss": loss,
    }
    with pytest.raises(ConfigurationError, match=match):
        hypergradient(**{**arguments, **changed})  # type: ignore[arg-type]


def test_slopes_are_per_unit_of_the_coordinate() -> None:
    model = Noisy()
    model.fraction = Hyperparameter(torch.tensor([0.2, 0.9]), transform="logit")
    loss = lambda m: _loss(m) * m.fraction().sum()
    groups = [
        {"params": [p], "lr": lr} for p, lr in zip(model.parameters(), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.5)
    curve = Schedule("momentum", {0: 0.2, 2: 0.9})
    result = hypergradient(model, optimizer, [loss] * 3, loss, ["lr", curve, model.fraction], Unrolled())
    for name, unit in (
        ("lr", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        ("momentum", [0.2 * 0.8, 0.9 * 0.1]),
        ("fraction", [0.2 * 0.8, 0.9 * 0.1]),
    ):
        torch.testing.assert_close(result.slopes[name], result.grads[name] * torch.tensor(unit))


def test_the_cost_is_told() -> None:
    model = Noisy()
    model.l2 = Hyperparameter(0.1)
    loss = lambda m: _loss(m) + m.l2() * sum(p.square().sum() for p in m.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for names, estimator, products, evaluations in (
        (["lr"], None, 0, 4),
        (["lr", "weight_decay"], Forward(), 2 * 2, 4 + 2),  # the first step has no past; on the graph of the real steps
        (["lr", "weight_decay"], Forward(curvature=FiniteDifference()), 2 * 2, 4 + 2 * 2),
        (["lr", "weight_decay", model.l2], Unrolled(), 3, 4 + 2 + 3),
        ([model.l2], Implicit(CG(iterations=4, tolerance=0.0), damping=10.0), 4 + 1, 4 + 2 + 1),
    ):
        result = hypergradient(model, optimizer, [loss] * 3, loss, names, estimator)
        assert (result.products, result.gradient_evaluations) == (products, evaluations)
