"""Which piece of every ReLU, pool and clamp a loss was evaluated on, held while it is differentiated close by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from hypergrad.autodiff import nodes
from hypergrad.torch_internals import dtype_of, is_packed, saved_by

# What a node hands back: one gradient per input.
_Grads = Sequence[torch.Tensor | None]
_Hook = Callable[[_Grads, _Grads], _Grads]


@dataclass(frozen=True)
class _Piece:
    """Where one node of a graph stands.

    Args:
        kind: the name of the node.
        held: tensors that say it of every element.
        numbers: settings of the node.
    """

    kind: str
    held: tuple[torch.Tensor, ...]
    numbers: tuple[float, ...] = ()


class ActivationPattern:
    """The pieces that the piecewise smooth functions in a loss are on (Hanin & Rolnick 2019, "activation patterns").

    Gradients of a network of ReLUs at two points near each other differ by what bends the loss between them, and by
    every unit that switches between them: these are fewer the closer the points are, but so is what there is to find.
    With the pattern of one point held at the other, the difference is the Hessian's alone, as autograd has it.

    Args:
        loss: with a graph that has not been differentiated yet.
    """

    def __init__(self, loss: torch.Tensor) -> None:
        self._pieces: list[_Piece | None] = []
        hidden = _HIDDEN | (_TF32 if loss.device.type == "cuda" and _rounds_convolutions() else set())
        self._is_whole = not _rounds_products()
        for node in nodes([loss]):
            kind = type(node).__name__
            if kind in _KINDS:
                self._pieces.append(_stand(node, kind))
            elif kind in hidden or (isinstance(node, BackwardCFunction) and kind not in _HARMLESS):
                self._is_whole = False
            elif kind == _CAST and dtype_of(node) not in (torch.float32, torch.float64):
                self._is_whole = False  # autocast, whose rounding would drown a small step
        self._is_whole = self._is_whole and None not in self._pieces

    @property
    def is_whole(self) -> bool:
        """Whether all of the graph was seen, and all of it was computed in the parameters' own precision.

        It was not with compiled modules, functions in Python, reentrant checkpoints, autocast and TF32, nor where
        somebody packs saved tensors (activation checkpoints, offloading).
        """
        return self._is_whole

    def hold(self, loss: torch.Tensor) -> bool:
        """Let the gradient of another evaluation of the same loss flow through the pieces of this one.

        Its value is its own: a unit that has switched is near the point where the pieces meet.

        Returns:
            whether the graph is alike; if not, nothing is done.
        """
        found = [node for node in nodes([loss]) if type(node).__name__ in _KINDS]
        kinds = [type(node).__name__ for node in found]
        if len(found) != len(self._pieces) or any(
            piece is not None and piece.kind != kind for piece, kind in zip(self._pieces, kinds, strict=True)
        ):
            return False
        for node, piece in zip(found, self._pieces, strict=True):
            if piece is not None:
                node.register_hook(_KINDS[piece.kind].hook(node, piece))
        return True

    def shrink(self) -> None:
        """Take less memory, where it is to be kept for a while: a byte per element of what only switches."""
        self._pieces = [p if p is None else replace(p, held=tuple(map(_shrunken, p.held))) for p in self._pieces]

    def state_dict(self) -> dict[str, Any]:
        """All of it in plain containers."""
        self.shrink()
        pieces = [None if p is None else [p.kind, list(p.held), list(p.numbers)] for p in self._pieces]
        return {"pieces": pieces, "is_whole": self._is_whole}

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> ActivationPattern:
        """The pattern whose `state_dict` this is."""
        pattern = cls(torch.zeros(()))
        pattern._is_whole = state["is_whole"]
        pattern._pieces = [
            None if p is None else _Piece(p[0], tuple(t.to(device) for t in p[1]), tuple(p[2])) for p in state["pieces"]
        ]
        return pattern


class HeldLoss(ABC):
    """An evaluation of the training loss of a step that may know on which pieces the step was.

    Callable like any other evaluation.
    """

    @abstractmethod
    def __call__(self) -> torch.Tensor:
        """The loss where the parameters stand."""

    @property
    @abstractmethod
    def is_whole(self) -> bool:
        """Whether it knows all of them, see `ActivationPattern.is_whole`."""

    @abstractmethod
    def held(self) -> torch.Tensor:
        """The loss where the parameters stand, whose gradient flows through the pieces of the step."""

    @abstractmethod
    def shrink(self) -> None:
        """Take less memory for them: they are to be kept for a while."""


def _shrunken(held: torch.Tensor) -> torch.Tensor:
    if not held.is_floating_point():
        return held
    switches = held.bool()
    return switches if torch.equal(switches.to(held.dtype), held) else held


@torch.no_grad()
def _stand(node: Any, kind: str) -> _Piece | None:
    return None if is_packed(node) else _Piece(kind, *_KINDS[kind].stand(node))


class _Kind:
    """How one kind of node is held: as a factor, one number per element.

    Args:
        factor: of a node, the derivative of what it computes.
    """

    def __init__(self, factor: Callable[[Any], torch.Tensor]) -> None:
        self._factor = factor

    def stand(self, node: Any) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
        """What says on which piece the node is: tensors, and settings."""
        return (self._factor(node),), ()

    def hook(self, node: Any, piece: _Piece) -> _Hook:  # noqa: ARG002 (others look at it)
        """What makes of the gradients that another node of the kind hands back those on this piece."""
        (factor,) = piece.held
        is_slow = factor.dtype == torch.bool and factor.device.type == "cpu"

        def hook(_: _Grads, given: _Grads) -> _Grads:
            g = given[0]
            return (None if g is None else g * (factor.to(g.dtype) if is_slow else factor),)

        return hook


class _Bent(_Kind):
    """Of functions that are curved, too: only an element that has switched gets another derivative, that at the edge.

    Args:
        side: of a node, the piece of every element: 0, 1, ...
        edge: of these, as held and as they are, the derivative where both meet; also of the settings.
        settings: names of what the node has saved, numbers or tensors.
    """

    def __init__(
        self, side: Callable[[torch.Tensor], torch.Tensor], edge: Callable[..., torch.Tensor], *settings: str
    ) -> None:
        self._side, self._edge, self._settings = side, edge, settings

    def stand(self, node: Any) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
        """See `_Kind.stand`."""
        settings = [saved_by(node, name) for name in self._settings]
        tensors = [s.clone() for s in settings if torch.is_tensor(s)]
        return (self._side(saved_by(node, "self")), *tensors), tuple(s for s in settings if not torch.is_tensor(s))

    def hook(self, node: Any, piece: _Piece) -> _Hook:
        """See `_Kind.hook`."""
        held, *tensors = piece.held
        side = self._side(saved_by(node, "self"))
        switched, slope = side != held, self._edge(held, side, *tensors, *piece.numbers)

        def hook(own: _Grads, given: _Grads) -> _Grads:
            if own[0] is None or given[0] is None:
                return own
            return torch.where(switched, (given[0] * slope).to(own[0].dtype), own[0]), *own[1:]

        return hook


class _Pool(_Kind):
    """Of a pool over the last dimensions, whose indices count through all of them.

    Args:
        dims: how many.
    """

    def __init__(self, dims: int) -> None:
        self._dims = dims

    def stand(self, node: Any) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
        """See `_Kind.stand`."""
        return (saved_by(node, "result1"),), ()

    def hook(self, node: Any, piece: _Piece) -> _Hook:  # noqa: ARG002
        """See `_Kind.hook`."""
        (winners,) = piece.held

        def hook(own: _Grads, given: _Grads) -> _Grads:
            if own[0] is None or given[0] is None:
                return own
            flat = torch.zeros_like(own[0], memory_format=torch.contiguous_format).flatten(-self._dims)
            flat.scatter_add_(-1, winners.flatten(-self._dims), given[0].flatten(-self._dims))
            return (flat.view(own[0].shape),)

        return hook


class _Selection(_Kind):
    """Of values that are taken along one dimension, which may be gone."""

    def __init__(self) -> None:
        pass

    def stand(self, node: Any) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
        """See `_Kind.stand`."""
        dim = saved_by(node, "dim")
        return (saved_by(node, "indices"),), (dim if dim < 2**63 else dim - 2**64,)

    def hook(self, node: Any, piece: _Piece) -> _Hook:  # noqa: ARG002
        """See `_Kind.hook`."""
        (at,), dim = piece.held, int(piece.numbers[0])

        def hook(own: _Grads, given: _Grads) -> _Grads:
            if own[0] is None or given[0] is None or own[0].dim() == 0:
                return own
            is_gone = at.dim() < own[0].dim()
            index, values = (at.unsqueeze(dim), given[0].unsqueeze(dim)) if is_gone else (at, given[0])
            return (torch.zeros_like(own[0]).scatter_add_(dim, index, values),)

        return hook


class _Extremes(_Kind):
    """Of largest or smallest values over several dimensions, which share among equals."""

    def __init__(self) -> None:
        pass

    def stand(self, node: Any) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
        """See `_Kind.stand`."""
        x, result = saved_by(node, "self"), saved_by(node, "result")
        dims, kept = saved_by(node, "dim", ()), saved_by(node, "keepdim", False)
        dims = sorted(d % x.dim() if d < 2**63 else (d - 2**64) % x.dim() for d in dims) or list(range(x.dim()))
        shape = result.shape if kept else [1 if d in dims else n for d, n in enumerate(x.shape)]
        best = (x == result.view(shape)).to(x.dtype)
        return (best / best.sum(dims, keepdim=True) if dims else best,), tuple(shape)

    def hook(self, node: Any, piece: _Piece) -> _Hook:  # noqa: ARG002
        """See `_Kind.hook`."""
        (share,), shape = piece.held, [int(n) for n in piece.numbers]
        return lambda _, given: (None if given[0] is None else share * given[0].view(shape),)


class _OfTwo(_Kind):
    """Of values that are taken from the first of two tensors, or from the second.

    Args:
        share: of a node, that of the first, per element.
    """

    def hook(self, node: Any, piece: _Piece) -> _Hook:  # noqa: ARG002
        """See `_Kind.hook`."""
        (first,) = piece.held

        def hook(own: _Grads, given: _Grads) -> _Grads:
            if given[0] is None:
                return own
            share = first.to(given[0].dtype)
            pair = zip(own, (share, 1.0 - share), strict=False)
            return tuple(None if x is None else (given[0] * s).sum_to_size(x.shape) for x, s in pair)

        return hook


def _mask(where: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # On a CPU a product with a mask of booleans takes several times as long; on a device memory is what counts.
    return where.to(like.dtype) if like.device.type == "cpu" else where


def _relu(node: Any) -> torch.Tensor:
    x: torch.Tensor = saved_by(node, "result")
    return x.sign() if x.device.type == "cpu" else x > 0


def _leaky(name: str) -> Callable[[Any], torch.Tensor]:
    def factor(node: Any) -> torch.Tensor:
        x = saved_by(node, name)
        slopes: torch.Tensor = torch.where(x > 0, 1.0, saved_by(node, "negative_slope"))
        return slopes.to(x.dtype)

    return factor


def _between(low: str | None, high: str | None, *, closed: bool) -> Callable[[Any], torch.Tensor]:
    def factor(node: Any) -> torch.Tensor:
        x, inside = saved_by(node, "self"), None
        for name, at_least, above in ((low, torch.ge, torch.gt), (high, torch.le, torch.lt)):
            bound = None if name is None else saved_by(node, name)
            if bound is not None:
                side = (at_least if closed else above)(x, bound)
                inside = side if inside is None else inside & side
        return torch.ones_like(x) if inside is None else _mask(inside, x)

    return factor


def _shrunk(node: Any) -> torch.Tensor:
    x = saved_by(node, "self")
    return _mask(x.abs() > saved_by(node, "lambd"), x)


def _hardsigmoid(node: Any) -> torch.Tensor:
    x: torch.Tensor = saved_by(node, "self")
    return (x.abs() < 3.0).to(x.dtype) / 6.0


def _larger(sign: int) -> Callable[[Any], torch.Tensor]:
    def share(node: Any) -> torch.Tensor:
        x: torch.Tensor = saved_by(node, "self")
        y: torch.Tensor = saved_by(node, "other")
        x, y = (x, y) if sign > 0 else (y, x)
        return ((x > y).to(x.dtype) + (x >= y).to(x.dtype)) / 2  # half where they are equal

    return share


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


# By the names of torch's nodes. What is smooth, if only once, needs no entry: smooth L1, Huber, CELU.
_KINDS: dict[str, _Kind] = {
    "ReluBackward0": _Kind(_relu),
    "ThresholdBackward0": _Kind(_between("threshold", None, closed=False)),
    "LeakyReluBackward0": _Kind(_leaky("self")),
    "LeakyReluBackward1": _Kind(_leaky("result")),
    "HardtanhBackward0": _Kind(_between("min_val", "max_val", closed=False)),
    "HardsigmoidBackward0": _Kind(_hardsigmoid),
    "ClampBackward1": _Kind(_between("min", "max", closed=True)),
    "ClampMinBackward0": _Kind(_between("min", None, closed=True)),
    "ClampMaxBackward0": _Kind(_between(None, "max", closed=True)),
    "AbsBackward0": _Kind(lambda node: saved_by(node, "self").sgn()),
    "SoftshrinkBackward0": _Kind(_shrunk),
    "PreluKernelBackward0": _Bent(_positive, _prelu_edge, "weight"),
    "EluBackward0": _Bent(_positive, _elu_edge, "alpha", "scale", "input_scale"),
    "HardswishBackward0": _Bent(_hardswish_side, _hardswish_edge),
    "MaxPool2DWithIndicesBackward0": _Pool(2),
    "MaxPool3DWithIndicesBackward0": _Pool(3),
    "AdaptiveMaxPool2DBackward0": _Pool(2),
    "AdaptiveMaxPool3DBackward0": _Pool(3),
    **dict.fromkeys(
        (
            f"{name}Backward{i}"
            for name, i in (("Max", 0), ("Min", 0), ("Topk", 0), ("Sort", 0), ("Sort", 1), ("Median", 1))
        ),
        _Selection(),
    ),
    **dict.fromkeys(("KthvalueBackward0", "CummaxBackward0", "CumminBackward0", "NanmedianBackward1"), _Selection()),
    **dict.fromkeys(("AmaxBackward0", "AminBackward0", "MaxBackward1", "MinBackward1"), _Extremes()),
    "MaximumBackward0": _OfTwo(_larger(1)),
    "MinimumBackward0": _OfTwo(_larger(-1)),
    "WhereBackward0": _OfTwo(lambda node: saved_by(node, "condition")),
}
# Nodes behind which pieces may be that cannot be seen.
_HIDDEN = {"CompiledFunctionBackward", "CheckpointFunctionBackward"}
_TF32 = {"ConvolutionBackward0", "CudnnConvolutionBackward0", "CudnnRnnBackward0"}  # rounded to it by default
_CAST = "ToCopyBackward0"
_HARMLESS = {"BackwardHookFunctionBackward", "_DDPSinkBackward"}  # hand gradients on as they are


def _rounds_products() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set per backend
        return True


def _rounds_convolutions() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set per operation
        return True
