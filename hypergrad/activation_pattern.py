"""Which piece of every ReLU, pool and clamp a loss was evaluated on, held while it is differentiated close by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch

from hypergrad.autodiff import nodes
from hypergrad.node_kinds import KINDS
from hypergrad.piecewise import Piece
from hypergrad.smooth_nodes import is_smooth, rounding_of, rounds_products
from hypergrad.torch_internals import is_packed


class ActivationPattern:
    """The pieces that the piecewise smooth functions in a loss are on (Hanin & Rolnick 2019, "activation patterns").

    Gradients of a network of ReLUs at two points near each other differ by what bends the loss between them, and by
    every unit that switches between them: these are fewer the closer the points are, but so is what there is to find.
    With the pattern of one point held at the other, the difference is the Hessian's alone, as autograd has it.

    Args:
        loss: with a graph that has not been differentiated yet.
    """

    def __init__(self, loss: torch.Tensor) -> None:
        self._pieces: list[Piece | None] = []
        self._rounding = math.inf if rounds_products() else 0.0
        with torch.no_grad():
            for node in nodes([loss]):
                name = type(node).__name__
                if name in KINDS:
                    self._pieces.append(_stand(node, name))
                elif not is_smooth(name):  # as nearly all of them are
                    self._rounding = max(self._rounding, rounding_of(node, name, on_cuda=loss.is_cuda))
        if None in self._pieces:
            self._rounding = math.inf

    @property
    def rounding(self) -> float:
        """The largest rounding error of what the loss was cast to; infinite where not all of the pieces were seen.

        They were not in compiled modules, functions in Python, reentrant checkpoints and in operations that are not
        known here to be smooth, nor where somebody packs saved tensors (activation checkpoints, offloading). Under TF32
        nothing is known of rounding.
        """
        return self._rounding

    def hold(self, loss: torch.Tensor) -> bool:
        """Let the gradient of another evaluation of the same loss flow through the pieces of this one.

        Its value is its own: a unit that has switched is near the point where the pieces meet.

        Returns:
            whether the graph is alike, indices too; if not, nothing is done.
        """
        found = [node for node in nodes([loss]) if type(node).__name__ in KINDS]
        if len(found) != len(self._pieces):
            return False
        pairs = [(node, piece) for node, piece in zip(found, self._pieces, strict=True) if piece is not None]
        if any(type(node).__name__ != piece.kind for node, piece in pairs):
            return False
        pairs = [(node, piece) for node, piece in pairs if piece.held]
        if any(is_packed(node) for node, _ in pairs):
            return False
        with torch.no_grad():
            if not all(KINDS[piece.kind].fits(node, piece) for node, piece in pairs):
                return False
            for node, piece in pairs:
                hook = KINDS[piece.kind].hook(node, piece)
                if hook is not None:
                    node.register_hook(hook)
        return True

    def shrink(self) -> None:
        """Take less memory, where it is to be kept for a while: a byte per element of what only switches."""
        self._pieces = [p if p is None else replace(p, held=tuple(map(_shrunken, p.held))) for p in self._pieces]

    def state_dict(self) -> dict[str, Any]:
        """All of it in plain containers."""
        self.shrink()
        pieces = [None if p is None else [p.kind, list(p.held), list(p.numbers), list(p.shape)] for p in self._pieces]
        return {"pieces": pieces, "rounding": self._rounding}

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> ActivationPattern:
        """The pattern whose `state_dict` this is."""
        pattern = cls(torch.zeros(()))
        pattern._rounding = state["rounding"]
        pattern._pieces = [
            None if p is None else Piece(p[0], tuple(t.to(device) for t in p[1]), tuple(p[2]), tuple(p[3]))
            for p in state["pieces"]
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
    def rounding(self) -> float:
        """Of the pattern, see `ActivationPattern.rounding`; infinite where it is not known."""

    @abstractmethod
    def held(self) -> tuple[torch.Tensor, bool]:
        """The loss where the parameters stand, whose gradient flows through the pieces of the step; whether it does."""

    @abstractmethod
    def shrink(self) -> None:
        """Take less memory for them: they are to be kept for a while."""


def _shrunken(held: torch.Tensor) -> torch.Tensor:
    if not held.is_floating_point():
        return held.clone()  # indices may be the user's tensors
    switches = held.bool()
    return switches if torch.equal(switches.to(held.dtype), held) else held


def _stand(node: Any, name: str) -> Piece | None:
    if is_packed(node):
        return None
    try:
        return KINDS[name].stand(node)
    except Exception:  # changed in place, or moved in another version of torch: to look must not end a training
        return None
