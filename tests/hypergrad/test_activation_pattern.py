"""A gradient nearby, taken on the pieces of another point, differs from the gradient there by the Hessian alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hypergrad import ActivationPattern

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SHORT = 1e-5

# Of x and of a second tensor, a weight or another x.
FUNCTIONS: dict[str, Function] = {
    "relu": lambda x, w: F.relu(x * w),
    "relu in place": lambda x, w: F.relu_(x * w),
    "leaky_relu": lambda x, w: F.leaky_relu(x, 0.2) * w,
    "leaky_relu in place": lambda x, w: F.leaky_relu_(x * w, 0.2),
    "relu6": lambda x, w: F.relu6(x) * w,
    "hardtanh": lambda x, w: F.hardtanh(x) * w,
    "hardtanh in place": lambda x, w: F.hardtanh_(x * 1) * w,
    "hardswish": lambda x, w: F.hardswish(x) * w,
    "threshold": lambda x, w: F.threshold(x, 0.5, 0.5) * w,
    "softshrink": lambda x, w: F.softshrink(x, 0.5) * w,
    "elu": lambda x, w: F.elu(x, alpha=0.3) * w,
    "selu": lambda x, w: F.selu(x) * w,
    "prelu": lambda x, w: F.prelu(x, w.flatten()[:3] / 4),
    "prelu of one number": lambda x, w: F.prelu(x, w.flatten()[:1] / 4),
    "abs": lambda x, w: x.abs() * w,
    "l1_loss": lambda x, w: F.l1_loss(x, torch.zeros_like(x), reduction="none") * w,
    "clamp": lambda x, w: x.clamp(-0.5, 1.0) * w,
    "clamp from below": lambda x, w: x.clamp(min=0.0) * w,
    "clamp_min": lambda x, w: torch.clamp_min(x, 0.0) * w,
    "clamp_max": lambda x, w: torch.clamp_max(x, 0.5) * w,
    "max_pool1d": lambda x, w: F.max_pool1d((x * w).flatten(1, 2), 3, 2),
    "max_pool2d": lambda x, w: F.max_pool2d(x, 2) * w[..., ::2, ::2],
    "max_pool2d, windows overlap": lambda x, w: F.max_pool2d(x * w, 3, 2, padding=1),
    "max_pool2d without batch": lambda x, w: F.max_pool2d((x * w).flatten(0, 1), 3, 1),
    "max_pool2d, channels last": lambda x, w: F.max_pool2d((x * w).to(memory_format=torch.channels_last), 3, 2),
    "max_pool3d": lambda x, w: F.max_pool3d((x * w).unsqueeze(1), 2, 1),
    "adaptive_max_pool1d": lambda x, w: F.adaptive_max_pool1d((x * w).flatten(1, 2), 5),
    "adaptive_max_pool2d": lambda x, w: F.adaptive_max_pool2d(x * w, 3),
    "adaptive_max_pool3d": lambda x, w: F.adaptive_max_pool3d((x * w).unsqueeze(1), 2),
    "max along a dimension": lambda x, w: (x * w).max(1)[0],
    "max along the last": lambda x, w: (x * w).max(-1)[0],
    "max, dimension kept": lambda x, w: (x * w).max(-2, keepdim=True)[0],
    "min along a dimension": lambda x, w: (x * w).min(2)[0],
    "amax": lambda x, w: (x * w).amax((1, -1)),
    "amin, dimension kept": lambda x, w: (x * w).amin(-1, keepdim=True),
    "topk": lambda x, w: (x * w).topk(3, dim=-1)[0],
    "sort": lambda x, w: (x * w).sort(dim=2)[0] * w,
    "median": lambda x, w: (x * w).median(-1)[0],
    "kthvalue": lambda x, w: (x * w).kthvalue(2, 1)[0],
    "cummax": lambda x, w: (x * w).cummax(-1)[0] * w,
    "maximum": lambda x, w: torch.maximum(x, _close_to(x) * w),
    "minimum of broadcast": lambda x, w: torch.minimum(x * w, w[0, 0]),
    "fmin": lambda x, w: torch.fmin(x, _close_to(x) * w),
    "clamp between tensors": lambda x, w: torch.clamp(x, -_near(w), _near(w)) * x,
    "clamp between tensors, in place": lambda x, w: (x * 1).clamp_(-_near(w), _near(w)),
    "clamp_min of a tensor": lambda x, w: torch.clamp_min(x * w, w[0, 0] - 1.0),
    "clamp_max of a tensor": lambda x, w: torch.clamp_max(x, w / 2) * w,
    "threshold in place": lambda x, w: F.threshold_(x * w, 0.5, 0.5),
    "elu in place": lambda x, w: F.elu_(x * w, alpha=0.3),
    "selu in place": lambda x, w: F.selu_(x * w),
    "where": lambda x, w: torch.where(x > 0, x * w, 0.1 * x),
    "where, of a number": lambda x, w: torch.where(x > 0, x * w, 0.0),
    "masked_fill": lambda x, w: (x * w).masked_fill(x < 0, 0.0),
    "masked_fill with a tensor": lambda x, w: (x * w).masked_fill(x < 0, 0 * w[0, 0, 0, 0]),
    "times a comparison": lambda x, w: x * (x > 0) * w,
    "a comparison in numbers, times": lambda x, w: (x > 0).to(x.dtype) * x * w,
    "median of all": lambda x, w: torch.stack([(x[i] * w[i]).median() for i in range(16)]),
    "norm of order 1": lambda x, w: (x * w).norm(p=1, dim=-1) / 16,
    "norm of order inf": lambda x, w: torch.linalg.vector_norm(x * w, float("inf"), dim=(0, 2), keepdim=True),
    "sort, stable": lambda x, w: (x * w).sort(dim=2, stable=True)[0] * w,
}


def _close_to(x: torch.Tensor) -> torch.Tensor:
    return x.detach().roll(1, -1)


def _near(w: torch.Tensor) -> torch.Tensor:
    return 1.0 + (w[..., :1] - 1.0)


def _problem() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two tensors full of values near ties and kinks, and a direction that leads about one in fifty past them."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(16, 3, 16, 16, dtype=torch.float64, generator=generator)

    x = (2 * normal(2.0)).round() / 2 + normal(30.0 * SHORT)
    w = 1.0 + normal(30.0 * SHORT)
    return [x.requires_grad_(), w.requires_grad_()], [normal(1.0), normal(1.0)]


def _loss(function: Function, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    found = function(inputs[0], inputs[1])
    weights = torch.linspace(0.5, 2.0, found.numel(), dtype=found.dtype).view(found.shape)
    return (weights * found.sin()).sum() + 0.1 * (inputs[0] * inputs[1]).cos().sum()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_the_difference_of_gradients_is_the_hessian_where_elements_switch(name: str) -> None:
    inputs, direction = _problem()

    def gradient(pattern: ActivationPattern | None) -> list[torch.Tensor]:
        value = _loss(FUNCTIONS[name], there)
        assert pattern is None or pattern.hold(value)
        return list(torch.autograd.grad(value, there))

    loss = _loss(FUNCTIONS[name], inputs)
    pattern = ActivationPattern(loss)
    assert pattern.rounding <= torch.finfo(torch.float64).eps
    here = torch.autograd.grad(loss, inputs, create_graph=True)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(here, inputs, direction)])
    there = [(x + SHORT * v).detach().requires_grad_() for x, v in zip(inputs, direction, strict=True)]
    off = {}
    for held in (pattern, ActivationPattern.restored(pattern.state_dict(), torch.device("cpu")), None):
        pairs = zip(gradient(held), here, strict=True)
        found = torch.cat([(a - b).flatten() / SHORT for a, b in pairs])
        off[held is not None] = float((found - expected).norm() / expected.norm())
    # The values of those that have switched are their own: a part as small as these are few.
    assert off[True] < 0.4
    assert off[False] > 30.0 * off[True]  # with pieces of its own


def test_hardsigmoid_which_has_no_second_derivative() -> None:
    x, v = (t[0].detach() for t in _problem())
    here, there = x.requires_grad_(), (x + SHORT * v).detach().requires_grad_()
    pattern = ActivationPattern(F.hardsigmoid(here).sum())
    held = F.hardsigmoid(there).sum()
    assert pattern.hold(held)
    (expected,) = torch.autograd.grad(F.hardsigmoid(here).sum(), here)
    (own,) = torch.autograd.grad(F.hardsigmoid(there).sum(), there)
    torch.testing.assert_close(torch.autograd.grad(held, there)[0], expected)  # it is linear on every piece
    assert not torch.allclose(own, expected)


def _vectors(*shape: int) -> torch.Tensor:
    return nn.Linear(6, 6)(torch.randn(*shape, 6))


ORDINARY: dict[str, Callable[[], torch.Tensor]] = {
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)(_vectors(2, 3)),
    "decoder": lambda: nn.TransformerDecoderLayer(6, 2, 8, norm_first=True)(_vectors(2, 3), _vectors(2, 3)),
    "LSTM": lambda: nn.LSTM(6, 4, 2, bidirectional=True)(_vectors(2, 3))[0],
    "GRU": lambda: nn.GRU(6, 4)(_vectors(2, 3))[0],
    "RNN": lambda: nn.RNN(6, 4, nonlinearity="relu")(_vectors(2, 3))[0],
    "convolutions": lambda: nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d()),
        *(nn.ConvTranspose2d(4, 2, 3), nn.GroupNorm(1, 2), nn.SiLU(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)),
    )(_vectors(2, 1, 12)),
    "RMSNorm": lambda: nn.RMSNorm(6)(_vectors(2)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 2))(_vectors(2)),
    "embedding": lambda: nn.Embedding(3, 6)(torch.tensor([0, 2])) * _vectors(2),
    "embedding_bag": lambda: nn.EmbeddingBag(3, 6)(torch.tensor([[0, 2]])),
    "cross_entropy": lambda: F.cross_entropy(_vectors(2), torch.tensor([0, 2]), label_smoothing=0.1),
    "triplet": lambda: F.triplet_margin_loss(_vectors(2), _vectors(2), _vectors(2)),
    "ctc": lambda: F.ctc_loss(
        _vectors(3, 1).log_softmax(-1), torch.tensor([[1]]), torch.tensor([3]), torch.tensor([1])
    ),
    "contrastive": lambda: (F.normalize(_vectors(4)) @ F.normalize(_vectors(4)).T).logsumexp(1),
    "distances": lambda: torch.cdist(_vectors(3), _vectors(3)),
    "attention": lambda: F.scaled_dot_product_attention(_vectors(1, 3), _vectors(1, 3), _vectors(1, 3), is_causal=True),
    "written into": lambda: torch.zeros(2, 6).index_put((torch.tensor([1]),), _vectors(1)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_networks_are_seen_as_a_whole(name: str) -> None:
    assert ActivationPattern(ORDINARY[name]().sum()).rounding == 0.0


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


class Linear(_Doubled):
    """Has the name of one of torch's own, but for a digit."""


def _autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(x.flatten(0, -2) @ torch.ones(8, 1, dtype=x.dtype)).to(x.dtype)


@pytest.mark.parametrize(
    "hidden",
    [
        lambda x: _Doubled.apply(F.relu(x)),
        lambda x: checkpoint(F.relu, x, use_reentrant=True),
        _autocast,
        lambda x: F.rrelu(x, training=True),
        lambda x: x + (x.sign() - x).detach() + 0 * x.sign(),
        lambda x: x.frac(),
        lambda x: torch.div(x, 0.3, rounding_mode="floor") + x,
        lambda x: F.hardshrink(x),
        lambda x: F.relu_((2 * x).view(2, 2, 8)),
        lambda x: Linear.apply(x),
        lambda x: torch.linalg.vector_norm(x, 3.0),
        lambda x: torch.autograd.grad(F.relu(x).square().sum(), x, create_graph=True)[0],
    ],
    ids=lambda _: "",
)
def test_it_is_known_that_a_part_was_not_seen(hidden: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert ActivationPattern(F.relu(x).sum()).rounding == 0.0
    assert ActivationPattern(hidden(x).sum()).rounding > 1e-3


def test_products_in_less_than_full_precision_are_no_whole() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert ActivationPattern(F.relu(x).sum()).rounding > 1e-3
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_checkpointed_part_is_not_run_again() -> None:
    calls = []

    def part(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return F.relu(x) * x

    x = torch.randn(5, requires_grad=True)
    loss = checkpoint(part, x, use_reentrant=False).sum()
    pattern = ActivationPattern(loss)
    assert pattern.rounding == float("inf")
    assert len(calls) == 1
    again = checkpoint(part, x, use_reentrant=False).sum()
    assert pattern.hold(again)  # of nothing
    torch.testing.assert_close(torch.autograd.grad(again, x)[0], (2 * x * (x > 0)).detach())


def test_nothing_is_held_in_another_graph() -> None:
    x = torch.randn(5, requires_grad=True)
    pattern = ActivationPattern(F.relu(x).sum())
    for other in (x.abs(), F.relu(F.relu(x)), x, F.relu(x[:3])):
        assert not pattern.hold(other.sum())


def test_nothing_is_held_where_other_elements_are_taken() -> None:
    x = torch.randn(5, requires_grad=True)
    at = torch.tensor([0, 3])
    for take in (lambda t, i: t[i], lambda t, i: t.index_select(0, i), lambda t, i: t.gather(0, i), torch.take):
        pattern = ActivationPattern(F.relu(take(x, at)).sum())
        assert pattern.hold(F.relu(take(x, at.clone())).sum())
        assert not pattern.hold(F.relu(take(x, at + 1)).sum())
    pattern = ActivationPattern(x[x > 0].sum())
    assert not pattern.hold(x[x < 0].sum())


@pytest.mark.parametrize(
    "infinite",
    [lambda h: F.relu(h).sqrt(), lambda h: h.clamp(-1, 0).abs().sqrt(), lambda h: torch.where(h > 0, h, 0.0).sqrt()],
    ids=["relu", "clamp", "where"],
)
def test_what_is_infinite_beyond_a_kink_stays_there(infinite: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5], requires_grad=True)
    pattern, again = ActivationPattern(infinite(x).sum()), infinite(x).sum()
    assert pattern.hold(again)
    found, expected = torch.autograd.grad(again, x)[0], torch.autograd.grad(infinite(x).sum(), x)[0]
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_number_is_looked_at_as_a_vector_is() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    for reduced in (torch.amax(x, dim=0), torch.linalg.vector_norm(x, dim=0), x.max()):
        assert ActivationPattern(reduced).rounding == 0.0


def test_gradients_keep_their_dtype() -> None:
    x, y = torch.randn(9, requires_grad=True), torch.randn(9, dtype=torch.bfloat16, requires_grad=True)
    for of_two in (lambda: torch.where(x > 0, x, y), lambda: torch.maximum(x, y), lambda: (x * (y > 0)) + y):
        pattern, shifted = ActivationPattern(of_two().sum()), of_two().sum()
        for piece in pattern.state_dict()["pieces"]:  # so that there is something to hold
            piece[1] = [~t if t.dtype == torch.bool else 1 - t for t in piece[1]]
        restored = ActivationPattern.restored(pattern.state_dict(), torch.device("cpu"))
        assert restored.hold(shifted)
        assert [g.dtype for g in torch.autograd.grad(shifted, [x, y])] == [torch.float32, torch.bfloat16]


def test_absolute_values_of_complex_numbers_are_no_pieces() -> None:
    x, v = torch.randn(16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64)
    here = torch.fft.rfft(x).abs().square().sum() + torch.fft.rfft(x).abs().sum()
    pattern = ActivationPattern(here)
    (g,) = torch.autograd.grad(here, x, create_graph=True)
    (expected,) = torch.autograd.grad(g, x, v)
    near = (x + 1e-6 * v).detach().requires_grad_()
    there = torch.fft.rfft(near).abs().square().sum() + torch.fft.rfft(near).abs().sum()
    assert pattern.hold(there)
    torch.testing.assert_close(
        (torch.autograd.grad(there, near)[0] - g.detach()) / 1e-6, expected, rtol=1e-4, atol=1e-4
    )


def test_a_mask_that_the_user_changes_afterwards_does_not_change_the_pattern() -> None:
    x, mask = torch.randn(6, requires_grad=True), torch.tensor([True, False] * 3)
    pattern = ActivationPattern(torch.where(mask, x, 0.0).sum())
    then = mask.clone()
    mask.fill_(True)
    again = torch.where(mask, x, 0.0).sum()
    assert pattern.hold(again)
    assert torch.equal(torch.autograd.grad(again, x)[0], then.to(x.dtype))


def test_hooks_of_modules_hide_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[1].register_full_backward_hook(lambda *_: None)
    assert ActivationPattern(model(torch.randn(2, 3)).sum()).rounding == 0.0


def test_a_pattern_that_is_kept_takes_a_byte_per_element() -> None:
    x = torch.randn(1000, requires_grad=True)
    pattern = ActivationPattern((F.leaky_relu(F.relu(x), 0.1) * x).sum())
    pattern.shrink()
    held = {kind: tensors[0] for kind, tensors, *_ in pattern.state_dict()["pieces"] if tensors}
    assert held["ReluBackward0"].dtype == torch.bool
    assert held["LeakyReluBackward0"].dtype == torch.float32  # its slopes
    assert torch.equal(held["ReluBackward0"], x > 0)
