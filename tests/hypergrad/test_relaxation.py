"""Dropout whose probability can be learned."""

from __future__ import annotations

import pytest
import torch

from hypergrad import ConfigurationError, Hyperparameter, Online, Unrolled, check, relaxed_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_it_is_dropout(p: float) -> None:
    x = torch.ones(200_000)
    y = relaxed_dropout(x, p, temperature=0.05)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert (y < 0.05).float().mean().item() == pytest.approx(p, abs=0.06)
    assert relaxed_dropout(x, p, training=False) is x
    assert relaxed_dropout(x.bfloat16(), p).isfinite().all()


@pytest.mark.parametrize("estimator", [Online(), Unrolled()], ids=["Online", "Unrolled"])
def test_its_probability_is_differentiated(estimator: Online | Unrolled, double: None) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, 8), torch.nn.Linear(8, 1)
            self.p = Hyperparameter(0.3, transform="logit")

        def loss(self, training: bool) -> torch.Tensor:
            h = self.first(torch.ones(4, 3)).tanh()
            return self.last(relaxed_dropout(h, self.p(), training)).square().mean()

    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    result = check(
        *(net, optimizer, [lambda m: m.loss(True)] * 3, lambda m: m.loss(False), [net.p], estimator), tolerance=1e-5
    )
    assert result.ok, result


def test_bad_temperature() -> None:
    for temperature in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(ConfigurationError, match="temperature"):
            relaxed_dropout(torch.ones(2), 0.5, temperature=temperature)
