"""What a node of an autograd graph does where its function is made of pieces: which one it is on, and to stay there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    shape: tuple[int, ...] = ()


class Kind(ABC):
    """How one kind of node is seen and held."""

    def stand(self, node: Any) -> Piece | None:
        """The piece that the node is on; None where it cannot be held."""
        found = self.found(node)
        return None if found is None else Piece(type(node).__name__, *found, shape=shape_of(node))

    def fits(self, node: Any, piece: Piece) -> bool:
        """Whether another node of the kind can be held on the piece."""
        return shape_of(node) == piece.shape

    @abstractmethod
    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]] | None:
        """What is to be held, and settings."""

    @abstractmethod
    def hook(self, node: Any, piece: Piece) -> Hook | None:
        """What makes of the gradients that another node of the kind hands back those on this piece."""


class Masked(Kind):
    """Of functions that let gradients through, or do not.

    Args:
        mask: of a node, where it does.
    """

    def __init__(self, mask: Callable[[Any], torch.Tensor]) -> None:
        self._mask = mask

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        return (self._mask(node),), ()

    def hook(self, node: Any, piece: Piece) -> Hook:  # noqa: ARG002
        (mask,) = piece.held
        return lambda _, given: (None if given[0] is None else _passed(given[0], mask),)


class Sloped(Kind):
    """Of functions that are linear on every piece.

    Args:
        slope: of a node, the derivative of what it computes.
    """

    def __init__(self, slope: Callable[[Any], torch.Tensor | None]) -> None:
        self._slope = slope

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        slope = self._slope(node)
        return (() if slope is None else (slope,)), ()

    def hook(self, node: Any, piece: Piece) -> Hook | None:  # noqa: ARG002
        if not piece.held:
            return None
        (slope,) = piece.held
        return lambda _, given: (None if given[0] is None else given[0] * slope,)


class Shared(Kind):
    """Of values that are taken from one of several inputs.

    Args:
        shares: of a node, that of each input, per element: from where it is, or how much of it.
    """

    def __init__(self, shares: Callable[[Any], Shares | None]) -> None:
        self._shares = shares

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
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


class Bent(Kind):
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

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
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


class Pool(Kind):
    """Of a pool over the last dimensions, whose indices count through all of them.

    Args:
        dims: how many.
    """

    def __init__(self, dims: int) -> None:
        self._dims = dims

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
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


class Selection(Kind):
    """Of values that are taken along one dimension, which may be gone."""

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
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


class Reduction(Kind):
    """Of one number for all elements along some dimensions.

    Args:
        slope: of a node, of what it reduced and of the result, the derivative of each element; None where it is smooth.
    """

    def __init__(self, slope: Callable[[Any, torch.Tensor, torch.Tensor, list[int]], torch.Tensor | None]) -> None:
        self._slope = slope

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]] | None:
        x, result = saved_by(node, "self"), saved_by(node, "result")
        dims, kept = saved_by(node, "dim") or (), saved_by(node, "keepdim", False)
        dims = sorted((d if d < 2**63 else d - 2**64) % max(x.dim(), 1) for d in dims) or list(range(x.dim()))
        shape = result.shape if kept else [1 if d in dims else n for d, n in enumerate(x.shape)]
        slope = self._slope(node, x, result.view(shape), dims)
        return ((), ()) if slope is None else ((slope,), tuple(shape))

    def hook(self, node: Any, piece: Piece) -> Hook | None:  # noqa: ARG002
        if not piece.held:
            return None
        (slope,), shape = piece.held, [int(n) for n in piece.numbers]
        return lambda _, given: (None if given[0] is None else slope * given[0].view(shape),)


class Same(Kind):
    """Of what takes or puts elements by indices, which must be the same again: a jump is no piece.

    Args:
        name: of the indices.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def found(self, node: Any) -> tuple[Shares, tuple[float, ...]]:
        found = saved_by(node, self._name)
        return tuple(t for t in (found if isinstance(found, (tuple, list)) else (found,)) if t is not None), ()

    def fits(self, node: Any, piece: Piece) -> bool:
        # Where it is the same tensor nothing has to wait for the device.
        again = self.found(node)[0]
        return super().fits(node, piece) and (
            [t.data_ptr() for t in again] == [t.data_ptr() for t in piece.held] or _alike(again, piece.held)
        )

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
