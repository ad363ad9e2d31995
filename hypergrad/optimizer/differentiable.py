"""Makes an optimizer's step, written for plain tensors, differentiable in either mode, or refuse to lose a part."""

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
from hypergrad.torch_internals import grad_mode_switch

_SCALED_ADD = {torch.Tensor.add, torch.Tensor.add_, torch.add}
_SCALED_SUB = {torch.Tensor.sub, torch.Tensor.sub_, torch.sub}
_ADDCMUL = {torch.Tensor.addcmul, torch.Tensor.addcmul_, torch.addcmul}
_ADDCDIV = {torch.Tensor.addcdiv, torch.Tensor.addcdiv_, torch.addcdiv}
_IN_PLACE = {torch.Tensor.sqrt_, torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.addcmul_, torch.Tensor.addcdiv_}
_DETACH = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_TIMES = {torch.Tensor.mul: False, torch.mul: False, torch.Tensor.mul_: True}
_OVER = {torch.Tensor.div: False, torch.div: False, torch.Tensor.div_: True}
_SQRT = {torch.Tensor.sqrt, torch.sqrt, torch.Tensor.sqrt_}
_SIGN = {torch.Tensor.sgn: False, torch.sgn: False, torch.Tensor.sgn_: True}
_SET_GRAD_ENABLED = grad_mode_switch()
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


def carries(tensor: torch.Tensor) -> bool:
    """Whether a tensor depends on what is differentiated with respect to, in forward or in reverse mode."""
    return tensor.requires_grad or tangent(tensor) is not None


class DifferentiableMode(TorchFunctionMode):
    """Inside this mode an optimizer's step keeps every dependence, or raises where it would silently drop one.

    - `alpha=` and `value=` that depend on something become a multiplication: as keyword they are read as numbers.
    - `detach()`, `.data` and `torch.no_grad()` do nothing: in a step they mean "no graph", not "constant".
    - `item()` of a tensor that depends on something stays a 0-dimensional tensor, which computes as its number would.
    - `sqrt()` of 0 has derivative 0 and not 0/0: a second moment stays 0 where no gradient has ever arrived (rows of an
      embedding, dead units).
    - A 0-dimensional result that requires a gradient is handed out as a stand-in that does not: only so does torch let
      it through as `alpha=` or `value=`. `inside` gives the tensor that it stands for.
    - `float()`, `int()`, `tolist()` and `numpy()` of one cannot, and raise `UnsupportedOptimizerError`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inner: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id of the stand-in, which is kept alive
        self._stand_ins: dict[int, torch.Tensor] = {}  # by id of what it stands for

    def inside(self, value: Any) -> Any:
        """The tensor that a stand-in stands for; anything else as it is."""
        if isinstance(value, torch.Tensor):
            entry = self._inner.get(id(value))
            return value if entry is None else entry[1]
        if type(value) in (list, tuple):
            return type(value)(self.inside(item) for item in value)
        return value

    def _outside(self, value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.dim() == 0 and value.requires_grad):
            return value
        if id(value) not in self._stand_ins:
            stand_in = torch.zeros((), dtype=value.dtype, device=value.device)
            self._inner[id(stand_in)] = (stand_in, value)
            self._stand_ins[id(value)] = stand_in
        return self._stand_ins[id(value)]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._inner:
            args = self.inside(args)
            kwargs = {key: self.inside(value) for key, value in (kwargs or {}).items()}
        return self._outside(self._call(func, args, kwargs or {}))

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _DETACH:
            return args[0]
        if func is _SET_GRAD_ENABLED:
            return None
        if func is torch.Tensor.item and carries(args[0]):
            return args[0].reshape(())
        if func in _TO_NUMBER and carries(args[0]):
            raise UnsupportedOptimizerError(
                f"the step reads a value that depends on the hyperparameter as a Python number "
                f"({getattr(func, '__name__', func)}), which loses its derivative"
            )
        if func in _SQRT and carries(args[0]):
            return _sqrt(func, args[0])
        if func in _SIGN and args[0].requires_grad and not args[0].is_complex():
            # Piecewise constant. torch's own derivative is a tensor without memory, and the kernels that meet it while
            # saved tensors may be written to end the process (seen with torch 2.13).
            sign = args[0].detach().sgn()
            return args[0].copy_(sign) if _SIGN[func] else sign
        if (func in _TIMES or func in _OVER) and len(args) == 2 and type(args[1]) in (int, float) and not kwargs:
            direction = tangent(args[0])
            if direction is not None:
                return _multiplied(func, args[0], direction, args[1])
        scale = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(scale, torch.Tensor):
            return _scaled(func, args, scale)
        return func(*args, **kwargs)


def _sqrt(func: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    zero = x == 0.0
    result = torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())
    return x.copy_(result) if func in _IN_PLACE else result


def _multiplied(func: Callable[..., Any], x: torch.Tensor, direction: torch.Tensor, number: float) -> torch.Tensor:
    # By hand: torch gives the number a tangent of zeros, and finds out in Python what becomes of that.
    times = func in _TIMES
    primal = fwAD.unpack_dual(x).primal  # type: ignore[no-untyped-call]
    result = dual(primal * number, direction * number) if times else dual(primal / number, direction / number)
    return x.copy_(result) if (_TIMES if times else _OVER)[func] else result


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
