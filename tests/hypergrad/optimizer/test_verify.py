"""Optimizers that would be differentiated wrongly are found out before anything is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import UnsupportedOptimizerError, resolve
from hypergrad.optimizer.verify import verify


class _Base(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group["lr"])

    def update(self, p: torch.Tensor, lr: Any) -> None:
        raise NotImplementedError


class ThroughNumpy(_Base):
    def update(self, p: torch.Tensor, lr: Any) -> None:
        p.add_(p.grad, alpha=-float(lr))


class ThroughAKernel(_Base):
    """Silent: the hyperparameter goes through an operation that reads it as a number."""

    def update(self, p: torch.Tensor, lr: Any) -> None:
        p.copy_(
            torch.addmm(p, p, torch.zeros(p.shape[1], p.shape[1], dtype=p.dtype), beta=1 - lr) if p.dim() == 2 else p
        )


class KeepsItsOwnList(_Base):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__(params, lr)
        self.mine = tuple(params)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.mine:
            p.sub_(self.param_groups[0]["lr"] * torch.ones_like(p))


class Raises(_Base):
    def update(self, p: torch.Tensor, lr: Any) -> None:
        raise KeyError("exp_avg")


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (ThroughNumpy, "as a Python number"),
        (ThroughAKernel, "not differentiated correctly"),
        (KeepsItsOwnList, "outside `param_groups`"),
        (Raises, "could not be tried"),
    ],
)
def test_is_refused_and_nothing_moves(optimizer: type[_Base], match: str) -> None:
    model = torch.nn.Linear(3, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    foreign = optimizer(model.parameters())
    with pytest.raises(UnsupportedOptimizerError, match=match):
        verify(foreign, resolve(foreign, ["lr"]))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not foreign.state


def test_leaves_the_global_rng_alone() -> None:
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    state = torch.get_rng_state()
    verify(optimizer, resolve(optimizer, ["lr", "weight_decay"]))
    assert torch.equal(state, torch.get_rng_state())


def test_every_kind_of_param_group_is_checked() -> None:
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    groups = [{"params": a.parameters(), "momentum": 0.9}, {"params": b.parameters(), "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(Exception, match="momentum=0 does not depend"):
        verify(optimizer, resolve(optimizer, ["momentum"]))


def test_torchs_own_classes_are_verified_once_per_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    monkeypatch.setattr("hypergrad.optimizer.verify._VERIFIED", set())
    original = verify.__globals__["_Problem"]
    monkeypatch.setattr(
        "hypergrad.optimizer.verify._Problem", lambda o, g: problems.append(type(o).__name__) or original(o, g)
    )
    p = torch.nn.Parameter(torch.ones(2, 2))

    def asked(optimizer: torch.optim.Optimizer, *names: str, **how: bool) -> int:
        before = len(problems)
        verify(optimizer, resolve(optimizer, names), **how)
        return len(problems) - before

    assert asked(torch.optim.SGD([p], lr=0.1, momentum=0.9), "lr") == 1
    assert asked(torch.optim.SGD([p], lr=0.2, momentum=0.8), "lr") == 0
    assert asked(torch.optim.SGD([p], lr=0.1), "lr") == 1  # momentum 0 takes another branch
    assert asked(torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True), "lr") == 1
    assert asked(torch.optim.SGD([p], lr=0.1, momentum=0.9), "lr", "momentum") == 1
    assert asked(torch.optim.SGD([p], lr=0.1, momentum=0.9), "lr", carried=True) == 1

    class Mine(torch.optim.SGD):
        """Somebody else's: what it does may depend on anything."""

    assert [asked(Mine([p], lr=0.1), "lr") for _ in range(2)] == [1, 1]
