"""Makes code that was written for plain tensors carry forward-AD tangents, or refuse to lose them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch.overrides import TorchFunctionMode

from hypergrad.errors import UnsupportedOptimizerError

_SCALED_ADD = {torch.Tensor.add, torch.Tensor.add_, torch.add}
_SCALED_SUB = {torch.Tensor.sub, torch.Tensor.sub_, torch.sub}
_ADDCMUL = {torch.Tensor.addcmul, torch.Tensor.addcmul_, torch.addcmul}
_ADDCDIV = {torch.Tensor.addcdiv, torch.Tensor.addcdiv_, torch.addcdiv}
_IN_PLACE = {torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.addcmul_, torch.Tensor.addcdiv_}
_DETACH = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_TO_NUMBER = {torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.numpy}


@lru_cache(maxsize=1)
def _load_forward_ad() -> None:
    # The first dual tensor of a process compiles torch's decompositions with torch.jit, which warns that it is
    # deprecated: torch's own affair, and fatal to users who turn warnings into errors.
    with warnings.catch_warnings(), fwAD.dual_level():
        warnings.simplefilter("ignore")
        fwAD.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


@contextmanager
def dual_level() -> Iterator[None]:
    """The scope in which dual tensors keep their tangents. Does not nest."""
    _load_forward_ad()
    with fwAD.dual_level():
        yield


def dual(primal: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """A tensor that carries a tangent."""
    result: torch.Tensor = fwAD.make_dual(primal, direction)  # type: ignore[no-untyped-call]
    return result


def tangent(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tangent of a dual tensor, or None where nothing depends on the direction of differentiation."""
    result: torch.Tensor | None = fwAD.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return result


class TangentMode(TorchFunctionMode):
    """Inside this mode an optimizer's step keeps every tangent, or raises where it would silently drop one.

    - `alpha=` and `value=` that carry a tangent become a multiplication: as keyword they are read as numbers.
    - `detach()` and `.data` return the tensor itself: in a step they mean "no graph", not "constant".
    - `item()` of a tensor with a tangent stays a 0-dimensional tensor, which computes as its number would.
    - `float()`, `int()`, `tolist()` and `numpy()` of one cannot, and raise `UnsupportedOptimizerError`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DETACH:
            return args[0]
        if func is torch.Tensor.item and tangent(args[0]) is not None:
            return args[0].reshape(())
        if func in _TO_NUMBER and tangent(args[0]) is not None:
            raise UnsupportedOptimizerError(
                f"the step reads a value that depends on the hyperparameter as a Python number "
                f"({getattr(func, '__name__', func)}), which loses its derivative"
            )
        scale = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(scale, torch.Tensor):
            return _scaled(func, args, scale)
        return func(*args, **kwargs)


def _scaled(func: Callable[..., Any], args: tuple[Any, ...], scale: torch.Tensor) -> torch.Tensor:
    """`func(*args, alpha=scale)` or `func(*args, value=scale)`, written with ordinary arithmetic."""
    base, *operands = args
    if func in _SCALED_ADD:
        term = _widened(operands[0], base) * scale
    elif func in _SCALED_SUB:
        term = -(_widened(operands[0], base) * scale)
    elif func in _ADDCMUL:
        term = operands[0] * operands[1] * scale
    elif func in _ADDCDIV:
        term = operands[0] / operands[1] * scale
    else:
        raise UnsupportedOptimizerError(
            f"the step passes a hyperparameter as alpha= or value= to {getattr(func, '__name__', func)}"
        )
    result: torch.Tensor = base.add_(term) if func in _IN_PLACE else base.add(term)
    return result


def _widened(operand: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    # base.add_(operand, alpha=a) multiplies in base's precision, also where the operand is bfloat16 (Muon).
    return operand.to(torch.promote_types(operand.dtype, base.dtype))
