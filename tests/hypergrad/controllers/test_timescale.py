"""A timescale is what it says: real optimizers forget within it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hypergrad import ConfigurationError, Timescale, decay_rate

KNOWN = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"dampening": 0.3}),  # of no momentum
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.5}),
    (torch.optim.SGD, {"momentum": 0.9, "maximize": True}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.Adam, {"decoupled_weight_decay": True}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    (torch.optim.RAdam, {"decoupled_weight_decay": True}),
]


@pytest.mark.parametrize(("kind", "settings"), KNOWN, ids=lambda v: getattr(v, "__name__", str(v)))
def test_weights_that_nothing_else_moves_fall_at_its_rate(kind: Any, settings: dict[str, Any]) -> None:
    lr, steps, timescale = 0.01, 4_000_000, Timescale(0.25)
    p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = kind([p], lr=lr, **settings)
    rate = decay_rate(optimizer, optimizer.param_groups[0])
    assert rate is not None
    optimizer.param_groups[0]["weight_decay"] = timescale.weight_decay(lr * rate, steps)
    p.grad = torch.zeros_like(p)
    logs = []
    for _ in range(2):  # momentum lags behind at first
        for _ in range(300):
            optimizer.step()
        logs.append(math.log(p.item()))
    # To first order in what one step takes, a millionth; momentum repeats it up to ten times.
    assert (logs[0] - logs[1]) / 300 == pytest.approx(1e-6, rel=1e-5)


class Subclass(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
        (Subclass, {}),
        (torch.optim.SGD, {"momentum": 1.0}),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_nothing_is_said_of_rules_that_are_not_known(kind: Any, settings: dict[str, Any]) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1, **settings)
    assert decay_rate(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, math.nan])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigurationError, match=r"`share` must lie in \(0, 1\]"):
        Timescale(share)
