"""Ordinary layers in whole runs: the models, and what every estimator of a whole run must get right on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from hypergrad import Estimator, hypergradient


class Attention(nn.Module):
    """Embedding with tied weights, attention, layer norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.embedding(x)).unflatten(-1, (2, 4)).transpose(1, 2)
        h = scaled_dot_product_attention(h, h, h, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        return self.head(nn.functional.dropout(h.transpose(1, 2).flatten(2), 0.2, self.training)).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(7, 4), kind(4, 6, batch_first=True), nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(x))[0][:, -1])


class Convolution(nn.Module):
    """BatchNorm in train mode, whose running statistics the validation loss uses, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.net = nn.Sequential(
            *(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(9, 7))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.frozen(x.to(self.frozen.weight.dtype)).unsqueeze(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "convolution": Convolution,
}


def assert_layers_are_differentiated(kind: str, estimator: Estimator, evaluations: int) -> None:
    """d/d(lr) of five steps of SGD with momentum equals central differences, and nothing is left changed."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 7, (6, 5), generator=generator) for _ in range(5)]
    targets = [torch.randint(0, 7, (6,), generator=generator) for _ in range(5)]

    def make() -> nn.Module:
        torch.manual_seed(1)
        return MODELS[kind]()

    def losses() -> list[Any]:
        return [lambda m, x=x, y=y: cross_entropy(m(x), y) for x, y in zip(batches, targets, strict=True)]

    def evaluated(model: nn.Module) -> torch.Tensor:
        # Random draws of the validation loss come from where the training left the streams.
        return cross_entropy(model(batches[0]), targets[0])

    def loss(lr: float) -> float:
        model = make()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=lr, momentum=0.9)
        torch.manual_seed(2)
        for one in losses():
            optimizer.zero_grad()
            one(model).backward()
            optimizer.step()
        return evaluated(model).item()

    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    result = hypergradient(model, optimizer, losses(), evaluated, ["lr"], estimator)
    assert torch.equal(torch.get_rng_state(), state)
    expected = [(loss(0.1 + h) - loss(0.1 - h)) / (2 * h) for h in (1e-4, 5e-5)]
    assert result.grads["lr"].item() == pytest.approx((4 * expected[1] - expected[0]) / 3, rel=1e-5)
    assert result.value.item() == loss(0.1)
    assert result.gradient_evaluations == evaluations
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    assert not optimizer.state
