"""The nodes of an autograd graph whose functions are made of pieces, and how each is held on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from hypergrad.piecewise import Bent, Kind, Masked, Piece, Pool, Reduction, Same, Selection, Shared, Shares, Sloped
from hypergrad.torch_internals import saved_by


def _mask(where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # On a CPU a choice by booleans takes several times as long; on a device memory is what counts.
    return where.to(like.dtype) if like.device.type == "cpu" else where


def _relu(node: Any) -> torch.Tensor:
    x: torch.Tensor = saved_by(node, "result")
    return x.sign() if x.device.type == "cpu" else x > 0


def _leaky(name: str) -> Callable[[Any], torch.Tensor]:
    def slope(node: Any) -> torch.Tensor:
        x = saved_by(node, name)
        return torch.full_like(x, saved_by(node, "negative_slope")).masked_fill_(x > 0, 1.0)

    return slope


def _between(low: str | None, high: str | None, *, closed: bool) -> Callable[[Any], torch.Tensor]:
    def inside(node: Any) -> torch.Tensor:
        x = saved_by(node, "self")
        return _mask(torch.logical_and(*_sides(node, x, low, high, closed=closed)), x)

    return inside


def _sides(node: Any, x: torch.Tensor, low: str | None, high: str | None, *, closed: bool) -> list[torch.Tensor]:
    """Where x is above the lower bound, and where it is below the upper one."""
    sides = []
    for name, at_least, above in ((low, torch.ge, torch.gt), (high, torch.le, torch.lt)):
        bound = None if name is None else saved_by(node, name)
        everywhere = torch.ones((), dtype=torch.bool, device=x.device)
        sides.append(everywhere if bound is None else (at_least if closed else above)(x, bound))
    return sides


def _bounded(low: str | None, high: str | None) -> Callable[[Any], Shares]:
    """Of x, and of the bounds, which are tensors."""

    def shares(node: Any) -> Shares:
        x = saved_by(node, "self")
        above, below = _sides(node, x, low, high, closed=True)
        # Where both bounds are broken the upper one counts.
        masks = [above & below, *([~above & below] if low else []), *([~below] if high else [])]
        return tuple(_mask(m, x) for m in masks)

    return shares


def _larger(sign: int) -> Callable[[Any], Shares]:
    def shares(node: Any) -> Shares:
        x: torch.Tensor = saved_by(node, "self")
        y: torch.Tensor = saved_by(node, "other")
        a, b = (x, y) if sign > 0 else (y, x)
        first = ((a > b).to(x.dtype) + (a >= b).to(x.dtype)) / 2  # half where they are equal
        return first, 1.0 - first

    return shares


def _where(node: Any) -> Shares:
    condition = saved_by(node, "condition").clone()
    return condition, ~condition


def _filled(node: Any) -> Shares:
    mask = saved_by(node, "mask").clone()
    return ~mask, mask


class _Product(Shared):
    """A product with a mask is a comparison made by hand; any other is taken for smooth."""

    _OTHER = Piece("MulBackward0")

    def __init__(self) -> None:
        super().__init__(self._masks)

    def stand(self, node: Any) -> Piece | None:
        # There are many of them.
        other, own = saved_by(node, "other"), saved_by(node, "self")
        if (other is None or other.requires_grad) and (own is None or own.requires_grad):
            return self._OTHER
        return super().stand(node)

    @staticmethod
    def _masks(node: Any) -> Shares | None:
        for name in ("other", "self"):
            factor = saved_by(node, name)
            if factor is None or factor.requires_grad or not (factor.dtype == torch.bool or _is_binary(factor)):
                continue
            mask, nothing = factor.bool().clone(), torch.zeros((), dtype=torch.bool, device=factor.device)
            return (mask, nothing) if name == "other" else (nothing, mask)
        return None


def _is_binary(factor: torch.Tensor) -> bool:
    if factor.numel() < 2 or factor.is_complex():
        return False
    head = factor.reshape(-1)[:64]
    return bool((head * head == head).all()) and bool((factor * factor == factor).all())


def _abs(node: Any) -> torch.Tensor | None:
    x = saved_by(node, "self")
    return None if x.is_complex() else x.sgn()  # of a complex number it is smooth


def _best(_: Any, x: torch.Tensor, result: torch.Tensor, dims: list[int]) -> torch.Tensor:
    best = (x == result).to(x.dtype)
    return best / best.sum(dims, keepdim=True) if dims else best


def _norm(node: Any, x: torch.Tensor, result: torch.Tensor, dims: list[int]) -> torch.Tensor | None:
    order = float(saved_by(node, "ord"))
    if order == 1.0:
        return x.sgn()
    return _best(node, x.abs(), result, dims) * x.sgn() if math.isinf(order) else None


class _Norm(Reduction):
    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]] | None:
        if float(saved_by(node, "ord")) not in (1.0, 2.0, math.inf, -math.inf) or saved_by(node, "self").is_complex():
            return None
        return super().found(node)


def _positive(x: torch.Tensor) -> torch.Tensor:
    return x > 0


def _prelu_edge(held: torch.Tensor, _: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(held, torch.ones_like(slope), slope)


def _elu_edge(held: torch.Tensor, _: torch.Tensor, alpha: float, scale: float, inner: float) -> torch.Tensor:
    return torch.where(held, scale, scale * alpha * inner)


def _hardswish_side(x: torch.Tensor) -> torch.Tensor:
    return (x >= -3.0).to(torch.int8) + (x > 3.0).to(torch.int8)


def _hardswish_edge(held: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    # x (x + 3) / 6 between 0 and x: from -1/2 to 3/2.
    return torch.where(held == 1, torch.where(side == 0, -0.5, 1.5), held / 2)


def _hardsigmoid_edge(held: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return held / 6.0


def _outside(node: Any) -> torch.Tensor:
    outside: torch.Tensor = saved_by(node, "self").abs() > saved_by(node, "lambd")
    return outside


# By the names of torch's nodes.
KINDS: dict[str, Kind] = {
    "ReluBackward0": Masked(_relu),
    "ThresholdBackward0": Masked(_between("threshold", None, closed=False)),
    "ThresholdBackward1": Masked(_between("threshold", None, closed=False)),
    "LeakyReluBackward0": Sloped(_leaky("self")),
    "LeakyReluBackward1": Sloped(_leaky("result")),
    "HardtanhBackward0": Masked(_between("min_val", "max_val", closed=False)),
    "HardsigmoidBackward0": Bent(lambda x: x.abs() < 3.0, _hardsigmoid_edge),
    "ClampBackward0": Shared(_bounded("min", "max")),
    "ClampBackward1": Masked(_between("min", "max", closed=True)),
    "ClampMinBackward0": Masked(_between("min", None, closed=True)),
    "ClampMinBackward1": Shared(_bounded("min", None)),
    "ClampMaxBackward0": Masked(_between(None, "max", closed=True)),
    "ClampMaxBackward1": Shared(_bounded(None, "max")),
    "AbsBackward0": Sloped(_abs),
    "SoftshrinkBackward0": Masked(lambda node: _mask(_outside(node), saved_by(node, "self"))),
    "PreluKernelBackward0": Bent(_positive, _prelu_edge, "weight"),
    "EluBackward0": Bent(_positive, _elu_edge, "alpha", "scale", "input_scale"),
    "EluBackward1": Bent(_positive, _elu_edge, "alpha", "scale", "input_scale", of="result"),
    "HardswishBackward0": Bent(_hardswish_side, _hardswish_edge),
    "MaxPool2DWithIndicesBackward0": Pool(2),
    "MaxPool3DWithIndicesBackward0": Pool(3),
    "AdaptiveMaxPool2DBackward0": Pool(2),
    "AdaptiveMaxPool3DBackward0": Pool(3),
    **dict.fromkeys(
        ("MaxBackward0", "MinBackward0", "TopkBackward0", "SortBackward0", "SortBackward1", "MedianBackward1"),
        Selection(),
    ),
    **dict.fromkeys(("KthvalueBackward0", "CummaxBackward0", "CumminBackward0", "NanmedianBackward1"), Selection()),
    **dict.fromkeys(("AmaxBackward0", "AminBackward0", "MaxBackward1", "MinBackward1"), Reduction(_best)),
    **dict.fromkeys(("MedianBackward0", "NanmedianBackward0"), Reduction(_best)),
    "LinalgVectorNormBackward0": _Norm(_norm),
    **dict.fromkeys(("MaximumBackward0", "FmaxBackward0"), Shared(_larger(1))),
    **dict.fromkeys(("MinimumBackward0", "FminBackward0"), Shared(_larger(-1))),
    "WhereBackward0": Shared(_where),
    **dict.fromkeys(("MaskedFillBackward0", "MaskedFillBackward1"), Shared(_filled)),
    "MulBackward0": _Product(),
    **{
        f"{name}Backward0": Same(kept)
        for kept, names in (
            ("indices", ("Index", "UnsafeIndex", "IndexPut", "IndexPutImpl", "UnsafeIndexPut", "Embedding")),
            ("index", ("IndexSelect", "Gather", "Scatter", "ScatterAdd", "IndexAdd", "IndexCopy", "IndexFill", "Take")),
            ("mask", ("MaskedSelect", "MaskedScatter")),
        )
        for name in names
    },
}
