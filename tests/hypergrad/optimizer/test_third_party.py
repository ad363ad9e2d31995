"""Optimizers that others have written: right, or refused; nothing in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree, SGDScheduleFree

from hypergrad import Forward, Online, Unrolled, UnsupportedOptimizerError, check

ESTIMATORS = {"Online": Online, "Forward": Forward, "Unrolled": Unrolled}
RIGHT, REFUSED = "right", "refused"
CELLS = [
    (Lion, {"lr": 1e-3, "weight_decay": 0.1}, "lr", (RIGHT, RIGHT, RIGHT)),
    (Lion, {"lr": 1e-3, "weight_decay": 0.1}, "weight_decay", (RIGHT, RIGHT, RIGHT)),
    (Prodigy, {"weight_decay": 0.1}, "lr", (RIGHT, REFUSED, REFUSED)),
    (Prodigy, {"weight_decay": 0.1}, "weight_decay", (RIGHT, REFUSED, REFUSED)),
    (AdamWScheduleFree, {"lr": 1e-3, "weight_decay": 0.1}, "lr", (REFUSED, REFUSED, REFUSED)),
    (AdamWScheduleFree, {"lr": 1e-3, "weight_decay": 0.1}, "weight_decay", (RIGHT, RIGHT, RIGHT)),
    (SGDScheduleFree, {"lr": 1e-2, "weight_decay": 0.1}, "weight_decay", (RIGHT, RIGHT, RIGHT)),
]


def _setting() -> tuple[torch.nn.Module, Any]:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (16,), generator=generator)
    return model, lambda m: torch.nn.functional.cross_entropy(m(x), y)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("kind", "settings", "name", "outcomes"), CELLS, ids=[f"{c[0].__name__}-{c[2]}" for c in CELLS]
)
def test_right_or_refused(
    kind: Any, settings: dict[str, Any], name: str, outcomes: tuple[str, ...], estimator: str
) -> None:
    model, loss = _setting()
    optimizer = kind(model.parameters(), **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    arguments = (model, optimizer, [loss] * 4, loss, (name,), ESTIMATORS[estimator]())
    if outcomes[list(ESTIMATORS).index(estimator)] == REFUSED:
        with pytest.raises(UnsupportedOptimizerError, match=r"Use Online|Leave 'lr' out"):
            check(*arguments)
    else:
        assert check(*arguments).ok


class Remembers(torch.optim.Optimizer):
    """Divides by the largest gradient so far, which it keeps in its param group, as some that need no lr do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "largest": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norm = sum(p.grad.square().sum() for p in group["params"]).sqrt()
            group["largest"] = torch.maximum(torch.as_tensor(group["largest"]), norm)
            for p in group["params"]:
                p.sub_(p.grad / group["largest"] * group["lr"])


def test_what_a_param_group_remembers_is_no_state() -> None:
    model, loss = _setting()
    assert check(model, Remembers(model.parameters()), [loss] * 3, loss, ("lr",), Online()).ok
    for estimator in (Forward(), Unrolled()):
        with pytest.raises(UnsupportedOptimizerError, match=r"'largest' in its param groups.*Use Online"):
            check(model, Remembers(model.parameters()), [loss] * 3, loss, ("lr",), estimator)
