"""Unrolled against Forward (which is tested against differences of whole runs), and against differences itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hypergrad import (
    ConfigurationError,
    Curvature,
    Estimator,
    Exact,
    FiniteDifference,
    Forward,
    HypergradError,
    Hyperparameter,
    HyperparameterError,
    Online,
    OptimizerHyperparameter,
    Unrolled,
    UnsupportedOptimizerError,
    check,
    hypergradient,
    resolve,
)
from hypergrad.optimizer.recorded import RecordedStep
from hypergrad.optimizer.step import Direction, StateVector, differentiate_step
from tests.hypergrad.cells import ACCEPTED, CELLS, REFUSED, Cell, Problem, ids
from tests.hypergrad.layers import MODELS, assert_layers_are_differentiated

CARRIED = [(cell, name) for cell, name in ACCEPTED if cell.carried]
NOT_CARRIED = [(cell, name) for cell, name in ACCEPTED if not cell.carried]


@pytest.mark.parametrize(("cell", "name"), CARRIED, ids=ids(CARRIED))
def test_equals_forward_on_every_cell(cell: Cell, name: str, double: None) -> None:
    problem = Problem(cell, steps=10)

    def measured(estimator: Forward | Unrolled) -> float:
        model = problem.model()
        optimizer = problem.optimizer(model)
        return (
            hypergradient(model, optimizer, problem.train_losses, problem.val_loss, [name], estimator)
            .grads[name]
            .item()
        )

    expected = measured(Forward())
    assert expected != 0.0
    assert measured(Unrolled()) == pytest.approx(expected, rel=1e-8)
    if name == "lr":  # products are the same for every hyperparameter of a rule
        assert measured(Unrolled(curvature=FiniteDifference(1e-8))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("cell", "name"), [*NOT_CARRIED, *REFUSED], ids=ids([*NOT_CARRIED, *REFUSED]))
def test_refuses_every_other_cell(cell: Cell, name: str) -> None:
    optimizer = Problem(cell).optimizer(Problem(cell).model())
    with pytest.raises((UnsupportedOptimizerError, HyperparameterError)):
        Unrolled().track(optimizer, resolve(optimizer, [name]))


@pytest.mark.parametrize("index", [1, 7])  # SGD with momentum, AdamW
def test_each_param_group_has_its_own_hypergradient(index: int, double: None) -> None:
    problem = Problem(CELLS[index], groups=2, steps=6)
    model = problem.model()
    optimizer = problem.optimizer(model)
    result = hypergradient(model, optimizer, problem.train_losses, problem.val_loss, ["lr"], Unrolled())
    expected = torch.tensor([problem.run_difference("lr", group) for group in range(2)])
    torch.testing.assert_close(result.grads["lr"], expected, rtol=1e-6, atol=1e-12)
    assert result.cosines == {}  # d(parameters)/d(lr) is never formed


@pytest.mark.parametrize("cell", [c for c in CELLS if c.carried], ids=lambda c: c.name)
def test_continues_from_its_state(cell: Cell, double: None, tmp_path: Path) -> None:
    problem = Problem(cell, groups=2, steps=7)
    model = problem.model()
    optimizer = problem.optimizer(model)
    estimator, hyperparameters = Unrolled(4), resolve(optimizer, cell.accepted)
    tracker = estimator.track(optimizer, hyperparameters)

    def evaluation(step: int) -> Callable[[], torch.Tensor]:
        return lambda: problem.loss(step)(model)

    for step in range(7):
        optimizer.zero_grad()
        evaluation(step)().backward()
        if step == 6:
            torch.save(tracker.state_dict(), tmp_path / "state.pt")
            assert len(tracker.losses) == 3  # those that the next step does not push out
            other = estimator.track(optimizer, hyperparameters)
            losses = [evaluation(i) for i in (3, 4, 5)]
            other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), losses)
            other.before_step(evaluation(step))
        tracker.before_step(evaluation(step))
        optimizer.step()
    gradients = dict(zip(tracker.params, torch.autograd.grad(problem.val_loss(model), tracker.params), strict=True))
    expected, found = tracker.contract(gradients), other.contract(gradients)
    assert any(bool(t.abs().sum() > 0.0) for t in expected.hypergradients.values())
    assert {k: t.tolist() for k, t in found.hypergradients.items()} == {
        k: t.tolist() for k, t in expected.hypergradients.items()
    }


@pytest.mark.parametrize("index", [1, 7])
def test_one_step_is_online(index: int, double: None) -> None:
    problem = Problem(CELLS[index])
    names = ("lr", "weight_decay")

    def measured(estimator: Online | Unrolled) -> dict[str, torch.Tensor]:
        model = problem.model()
        optimizer = problem.optimizer(model)
        return hypergradient(model, optimizer, problem.train_losses, problem.val_loss, names, estimator).grads

    online, one, all_steps = measured(Online()), measured(Unrolled(steps=1)), measured(Unrolled())
    for name in names:
        torch.testing.assert_close(one[name], online[name], rtol=1e-9, atol=0.0)
        assert not torch.isclose(all_steps[name], online[name], rtol=1e-2)


@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_the_last_steps_only(steps: int, double: None) -> None:
    problem = Problem(CELLS[1], steps=4)
    model = problem.model()
    result = check(
        *(model, problem.optimizer(model), problem.train_losses, problem.val_loss, ("lr", "momentum")),
        Unrolled(steps),
        tolerance=1e-5,
    )
    assert result.ok, result


@pytest.mark.parametrize("curvature", [Exact(), FiniteDifference(1e-8)], ids=["exact", "difference"])
@pytest.mark.parametrize("kind", MODELS)
def test_ordinary_layers(kind: str, curvature: Curvature, double: None) -> None:
    looks = 2 if isinstance(curvature, Exact) else 0  # at the loss, whether its derivative is the gradient
    assert_layers_are_differentiated(kind, Unrolled(curvature=curvature), evaluations=5 + looks + 4 + 1)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.carried], ids=lambda c: c.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_backwards_is_the_transpose_of_the_step_forwards(cell: Cell, groups: int, double: None) -> None:
    problem = Problem(cell, groups=groups)
    model = problem.model()
    optimizer = problem.optimizer(model)
    for i, loss in enumerate(problem.train_losses):
        optimizer.zero_grad()
        loss(model).backward()
        if i < problem.steps - 1:
            optimizer.step()
    params = list(model.parameters())

    def random() -> StateVector:
        entries = {p: {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in params}
        return StateVector(
            {p: torch.randn_like(p) for p in params},
            {p: {k: torch.randn_like(v) for k, v in s.items() if v.dim()} for p, s in entries.items()},
        )

    def dot(a: StateVector, b: StateVector) -> float:
        both = [(t, b.params[p]) for p, t in a.params.items() if p in b.params]
        both += [(t, b.state.get(p, {}).get(k)) for p, s in a.state.items() for k, t in s.items()]
        return sum(float((x * y).sum()) for x, y in both if y is not None)

    before, cotangent, grads = random(), random(), {p: torch.randn_like(p) for p in params}
    rates = {(i, OptimizerHyperparameter(cell.accepted[0])): 0.3 + i for i in range(groups)}
    after = differentiate_step(optimizer, Direction(rates, before.params, grads, before.state))
    back = RecordedStep(optimizer).pull_back(cotangent, rates)
    backwards = dot(back.before, before) + dot(StateVector(back.grads), StateVector(grads))
    backwards += sum(rate * back.hyperparameters[c].item() for c, rate in rates.items())
    assert backwards == pytest.approx(dot(cotangent, after), rel=1e-9)


def test_the_cost_does_not_depend_on_the_number_of_hyperparameters(double: None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model.weights = Hyperparameter(torch.ones(1000))
    x, calls = torch.randn(1000, 3), []

    def loss(m: nn.Module) -> torch.Tensor:
        calls.append(1)
        return (m[:3](x).square().squeeze(1) * m.weights()).mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    evaluations = []
    for names in (["lr"], ["lr", "betas[0]", "betas[1]", "eps", model.weights]):
        result = hypergradient(model, optimizer, [loss] * 5, loss, names, Unrolled())
        evaluations.append(result.gradient_evaluations)
    # Two looks at the loss; and the first gradient matters to hyperparameters in the loss only.
    assert evaluations == [5 + 2 + 4 + 1, 5 + 2 + 5 + 1]


def test_third_party_steps_that_cannot_be_recorded_are_refused() -> None:
    class Numpy(torch.optim.Optimizer):
        """Computes part of its step outside of torch."""

        def __init__(self, params: object, lr: float) -> None:
            super().__init__(params, {"lr": lr})  # type: ignore[arg-type]

        @torch.no_grad()
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(group["lr"] * torch.from_numpy(p.grad.numpy().copy()))

    model = nn.Linear(2, 1)
    optimizer = Numpy(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedOptimizerError, match=r"Numpy"):
        Unrolled().track(optimizer, resolve(optimizer, ["lr"]))


def test_bad_settings() -> None:
    for steps in (0, -1, True, 2.5):
        with pytest.raises(ConfigurationError, match="steps"):
            Unrolled(steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="curvature"):
        Unrolled(curvature=None)  # type: ignore[arg-type]


def test_a_tracker_says_what_it_misses() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Unrolled().track(optimizer, resolve(optimizer, ["lr"]))
    assert list(tracker.params) == []
    with pytest.raises(HypergradError, match=r"before_step\(\)"):
        tracker.contract({})
    with pytest.raises(HypergradError, match="training loss"):
        tracker.before_step()


@pytest.mark.parametrize("factors", [(1.0, 0.5, 0.1, 0.7), (0.0, 0.5, 1.0, 0.3)], ids=["schedule", "warm-up from 0"])
@pytest.mark.parametrize("estimator", [Forward(), Unrolled()], ids=["Forward", "Unrolled"])
def test_under_a_schedule_the_whole_curve_moves(estimator: Estimator, factors: tuple[float, ...], double: None) -> None:
    problem = Problem(CELLS[1], steps=4)  # SGD with momentum

    def run(rate: float, tracker_of: Estimator | None = None) -> tuple[float, float]:
        model = problem.model()
        optimizer = problem.optimizer(model)
        tracker = tracker_of.track(optimizer, [OptimizerHyperparameter("lr")]) if tracker_of else None
        for factor, loss in zip(factors, problem.train_losses, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
            loss(model).backward()
            if tracker is not None:
                tracker.before_step(lambda loss=loss: loss(model))
            optimizer.step()
        value = problem.val_loss(model)
        if tracker is None:
            return value.item(), 0.0
        gradients = torch.autograd.grad(value, list(tracker.params))
        return value.item(), tracker.contract(dict(zip(tracker.params, gradients, strict=True))).hypergradients[
            "lr"
        ].item()

    _, found = run(0.1, estimator)
    table = [(run(0.1 + h)[0] - run(0.1 - h)[0]) / (2 * h) for h in (1e-3, 5e-4)]
    # Per unit of the last value, which is the last factor times what moved here.
    assert found * factors[-1] == pytest.approx((4 * table[1] - table[0]) / 3, rel=1e-7)
