"""What a node of an autograd graph does where its function is made of pieces: which one it is on, and to stay there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hypergrad.torch_internals import saved_by, shape_of

# What a node hands back: one gradient per input.
Grads = Sequence[torch.Tensor | None]
Hook = Callable[[Grads, Grads], Grads]
Shares = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Piece:
    """Where one node of a graph stands.

    Args:
        kind: the name of the node.
        held: tensors that say it of every element; nothing where there is nothing to hold.
        numbers: settings of the node.
        shape: of what the node computed.
    """

    kind: str
    held: Shares = ()
    numbers: tuple[float, ...] = ()
    shape: tuple[int, ...] = field(default=())


class Kind(ABC):
    """How one kind of node is seen and held."""

    def stand(self, node: Any) -> Piece | None:
        """The piece that the node is on; None where it cannot be held."""
        found = self._found(node)
        return None if found is None else Piece(type(node).__name__, *found, shape=shape_of(node))

    def fits(self, node: Any, piece: Piece) -> bool | torch.Tensor:
        """Whether another node of the kind can be held on the piece; perhaps on the device."""
        return shape_of(node) == piece.shape

    @abstractmethod
    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]] | None:
        """What is to be held, and settings."""

    @abstractmethod
    def hook(self, node: Any, piece: Piece) -> Hook | None:
        """What makes of the gradients that another node of the kind hands back those on this piece."""


class _Masked(Kind):
    """Of functions that let gradients through, or do not.

    Args:
        mask: of a node, where it does.
    """

    def __init__(self, mask: Callable[[Any], torch.Tensor]) -> None:
        self._mask = mask

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        return (self._mask(node),), ()

    def hook(self, node: Any, piece: Piece) -> Hook:  # noqa: ARG002
        (mask,) = piece.held
        return lambda _, given: (None if given[0] is None else _passed(given[0], mask),)


class _Sloped(Kind):
    """Of functions that are linear on every piece.

    Args:
        slope: of a node, the derivative of what it computes.
    """

    def __init__(self, slope: Callable[[Any], torch.Tensor | None]) -> None:
        self._slope = slope

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        slope = self._slope(node)
        return (() if slope is None else (slope,)), ()

    def hook(self, node: Any, piece: Piece) -> Hook | None:  # noqa: ARG002
        if not piece.held:
            return None
        (slope,) = piece.held
        return lambda _, given: (None if given[0] is None else given[0] * slope,)


class _Shared(Kind):
    """Of values that are taken from one of several inputs.

    Args:
        shares: of a node, that of each input, per element: from where it is, or how much of it.
    """

    def __init__(self, shares: Callable[[Any], Shares | None]) -> None:
        self._shares = shares

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        return self._shares(node) or (), ()

    def hook(self, node: Any, piece: Piece) -> Hook | None:
        # Masks that say nothing of the inputs, as of padding, are the same again.
        if not piece.held or (piece.held[0].device.type == "cpu" and _alike(self._shares(node) or (), piece.held)):
            return None

        def hook(own: Grads, given: Grads) -> Grads:
            g = given[0]
            if g is None:
                return own
            pairs = zip(own, piece.held, strict=False)
            return tuple(None if x is None else _chosen(g, s).sum_to_size(x.shape).to(x.dtype) for x, s in pairs)

        return hook


class _Bent(Kind):
    """Of functions that are curved, too: only an element that has switched gets another derivative, that at the edge.

    Args:
        side: of a tensor, the piece of every element: 0, 1, ...
        edge: of these, as held and as they are, the derivative where both meet; also of the settings.
        settings: names of what the node has saved, numbers or tensors.
        of: the name of the tensor.
    """

    def __init__(
        self,
        side: Callable[[torch.Tensor], torch.Tensor],
        edge: Callable[..., torch.Tensor],
        *settings: str,
        of: str = "self",
    ) -> None:
        self._side, self._edge, self._settings, self._of = side, edge, settings, of

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        settings = [saved_by(node, name) for name in self._settings]
        tensors = [s.clone() for s in settings if torch.is_tensor(s)]
        numbers = tuple(s for s in settings if not torch.is_tensor(s))
        return (self._side(saved_by(node, self._of)), *tensors), numbers

    def hook(self, node: Any, piece: Piece) -> Hook:
        held, *tensors = piece.held
        side = self._side(saved_by(node, self._of))
        switched, slope = side != held, self._edge(held, side, *tensors, *piece.numbers)

        def hook(own: Grads, given: Grads) -> Grads:
            if own[0] is None or given[0] is None:
                return own
            return torch.where(switched, (given[0] * slope).to(own[0].dtype), own[0]), *own[1:]

        return hook


class _Pool(Kind):
    """Of a pool over the last dimensions, whose indices count through all of them.

    Args:
        dims: how many.
    """

    def __init__(self, dims: int) -> None:
        self._dims = dims

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        return (saved_by(node, "result1"),), ()

    def hook(self, node: Any, piece: Piece) -> Hook:  # noqa: ARG002
        (winners,) = piece.held

        def hook(own: Grads, given: Grads) -> Grads:
            if own[0] is None or given[0] is None:
                return own
            flat = torch.zeros_like(own[0], memory_format=torch.contiguous_format).flatten(-self._dims)
            flat.scatter_add_(-1, winners.flatten(-self._dims), given[0].flatten(-self._dims))
            return (flat.view(own[0].shape),)

        return hook


class _Selection(Kind):
    """Of values that are taken along one dimension, which may be gone."""

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        dim = saved_by(node, "dim")
        return (saved_by(node, "indices"),), (dim if dim < 2**63 else dim - 2**64,)

    def hook(self, node: Any, piece: Piece) -> Hook:  # noqa: ARG002
        (at,), dim = piece.held, int(piece.numbers[0])

        def hook(own: Grads, given: Grads) -> Grads:
            if own[0] is None or given[0] is None or own[0].dim() == 0:
                return own
            is_gone = at.dim() < own[0].dim()
            index, values = (at.unsqueeze(dim), given[0].unsqueeze(dim)) if is_gone else (at, given[0])
            return (torch.zeros_like(own[0]).scatter_add_(dim, index, values),)

        return hook


class _Reduction(Kind):
    """Of one number for all elements along some dimensions.

    Args:
        slope: of a node, of what it reduced and of the result, the derivative of each element; None where it is smooth.
    """

    def __init__(self, slope: Callable[[Any, torch.Tensor, torch.Tensor, list[int]], torch.Tensor | None]) -> None:
        self._slope = slope

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]] | None:
        x, result = saved_by(node, "self"), saved_by(node, "result")
        dims, kept = saved_by(node, "dim") or (), saved_by(node, "keepdim", False)
        dims = sorted((d if d < 2**63 else d - 2**64) % x.dim() for d in dims) or list(range(x.dim()))
        shape = result.shape if kept else [1 if d in dims else n for d, n in enumerate(x.shape)]
        slope = self._slope(node, x, result.view(shape), dims)
        return ((), ()) if slope is None else ((slope,), tuple(shape))

    def hook(self, node: Any, piece: Piece) -> Hook | None:  # noqa: ARG002
        if not piece.held:
            return None
        (slope,), shape = piece.held, [int(n) for n in piece.numbers]
        return lambda _, given: (None if given[0] is None else slope * given[0].view(shape),)


class _Same(Kind):
    """Of what takes or puts elements by indices, which must be the same again: a jump is no piece.

    Args:
        name: of the indices.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        found = saved_by(node, self._name)
        return tuple(t for t in (found if isinstance(found, (tuple, list)) else (found,)) if t is not None), ()

    def fits(self, node: Any, piece: Piece) -> bool | torch.Tensor:
        again = self._found(node)[0]
        if shape_of(node) != piece.shape or len(again) != len(piece.held):
            return False
        pairs = [(a, b) for a, b in zip(again, piece.held, strict=True) if a.data_ptr() != b.data_ptr()]
        if any(a.shape != b.shape for a, b in pairs):
            return False
        return torch.stack([(a == b).all() for a, b in pairs]).all() if pairs else True

    def hook(self, node: Any, piece: Piece) -> Hook | None:  # noqa: ARG002
        return None


def _passed(given: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What is given, where the mask is not 0; chosen and not multiplied, for it may be infinite elsewhere."""
    if given.device.type != "cpu":
        return torch.where(mask != 0, given, 0)
    passed: torch.Tensor = torch.ops.aten.threshold_backward(given, mask.to(given.dtype), 0)
    return passed


def _chosen(given: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The same, times the share."""
    return torch.where(share, given, 0) if share.dtype == torch.bool else torch.where(share != 0, given * share, 0)


def _alike(one: Shares, other: Shares) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a, b.to(a.dtype)) for a, b in zip(one, other, strict=True)
    )


def _mask(where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # On a CPU a choice by booleans takes several times as long; on a device memory is what counts.
    return where.to(like.dtype) if like.device.type == "cpu" else where


def _relu(node: Any) -> torch.Tensor:
    x: torch.Tensor = saved_by(node, "result")
    return x.sign() if x.device.type == "cpu" else x > 0


def _leaky(name: str) -> Callable[[Any], torch.Tensor]:
    def slope(node: Any) -> torch.Tensor:
        x = saved_by(node, name)
        slopes: torch.Tensor = torch.where(x > 0, 1.0, saved_by(node, "negative_slope"))
        return slopes.to(x.dtype)

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


def _product(node: Any) -> Shares | None:
    """Of a product with a mask, which is a comparison made by hand; None of any other."""
    for name in ("other", "self"):
        factor = saved_by(node, name)
        if factor is None or getattr(node, f"_saved_{name}").requires_grad:
            continue
        if factor.dtype == torch.bool or _is_binary(factor):
            nothing = torch.zeros((), dtype=torch.bool, device=factor.device)
            mask = factor.bool()
            return (mask.clone(), nothing) if name == "other" else (nothing, mask.clone())
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


class _Norm(_Reduction):
    def _found(self, node: Any) -> tuple[Shares, tuple[float, ...]] | None:
        if float(saved_by(node, "ord")) not in (1.0, 2.0, math.inf, -math.inf) or saved_by(node, "self").is_complex():
            return None
        return super()._found(node)


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
    "ReluBackward0": _Masked(_relu),
    "ThresholdBackward0": _Masked(_between("threshold", None, closed=False)),
    "ThresholdBackward1": _Masked(_between("threshold", None, closed=False)),
    "LeakyReluBackward0": _Sloped(_leaky("self")),
    "LeakyReluBackward1": _Sloped(_leaky("result")),
    "HardtanhBackward0": _Masked(_between("min_val", "max_val", closed=False)),
    "HardsigmoidBackward0": _Bent(lambda x: x.abs() < 3.0, _hardsigmoid_edge),
    "ClampBackward0": _Shared(_bounded("min", "max")),
    "ClampBackward1": _Masked(_between("min", "max", closed=True)),
    "ClampMinBackward0": _Masked(_between("min", None, closed=True)),
    "ClampMinBackward1": _Shared(_bounded("min", None)),
    "ClampMaxBackward0": _Masked(_between(None, "max", closed=True)),
    "ClampMaxBackward1": _Shared(_bounded(None, "max")),
    "AbsBackward0": _Sloped(_abs),
    "SoftshrinkBackward0": _Masked(lambda node: _mask(_outside(node), saved_by(node, "self"))),
    "PreluKernelBackward0": _Bent(_positive, _prelu_edge, "weight"),
    "EluBackward0": _Bent(_positive, _elu_edge, "alpha", "scale", "input_scale"),
    "EluBackward1": _Bent(_positive, _elu_edge, "alpha", "scale", "input_scale", of="result"),
    "HardswishBackward0": _Bent(_hardswish_side, _hardswish_edge),
    "MaxPool2DWithIndicesBackward0": _Pool(2),
    "MaxPool3DWithIndicesBackward0": _Pool(3),
    "AdaptiveMaxPool2DBackward0": _Pool(2),
    "AdaptiveMaxPool3DBackward0": _Pool(3),
    **dict.fromkeys(
        ("MaxBackward0", "MinBackward0", "TopkBackward0", "SortBackward0", "SortBackward1", "MedianBackward1"),
        _Selection(),
    ),
    **dict.fromkeys(("KthvalueBackward0", "CummaxBackward0", "CumminBackward0", "NanmedianBackward1"), _Selection()),
    **dict.fromkeys(("AmaxBackward0", "AminBackward0", "MaxBackward1", "MinBackward1"), _Reduction(_best)),
    **dict.fromkeys(("MedianBackward0", "NanmedianBackward0"), _Reduction(_best)),
    "LinalgVectorNormBackward0": _Norm(_norm),
    **dict.fromkeys(("MaximumBackward0", "FmaxBackward0"), _Shared(_larger(1))),
    **dict.fromkeys(("MinimumBackward0", "FminBackward0"), _Shared(_larger(-1))),
    "WhereBackward0": _Shared(_where),
    **dict.fromkeys(("MaskedFillBackward0", "MaskedFillBackward1"), _Shared(_filled)),
    "MulBackward0": _Shared(_product),
    **{
        f"{name}Backward0": _Same(kept)
        for kept, names in (
            ("indices", ("Index", "UnsafeIndex", "IndexPut", "IndexPutImpl", "UnsafeIndexPut", "Embedding")),
            ("index", ("IndexSelect", "Gather", "Scatter", "ScatterAdd", "IndexAdd", "IndexCopy", "IndexFill", "Take")),
            ("mask", ("MaskedSelect", "MaskedScatter")),
        )
        for name in names
    },
}
