"""Constraints between parameters as expressions: they can be printed, stored and compared, which functions cannot."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypergrad.search.errors import SpaceError

_ALLOWED = (
    *(ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List),
    *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot),
)


@dataclass(frozen=True)
class Constraint:
    """A condition on a point of the space.

    Args:
        text: a Python expression of parameter names, constants, arithmetic, comparisons, `and`, `or`, `not` and `in`.

    Raises:
        SpaceError: if it does not parse, or has calls, attributes or anything else in it.

    >>> Constraint("heads * 8 <= width").holds({"heads": 4, "width": 64})
    True
    """

    text: str
    names: frozenset[str] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        try:
            tree = ast.parse(self.text, mode="eval")
        except SyntaxError as error:
            raise SpaceError(f"The constraint {self.text!r} is no Python expression: {error.msg}.") from None
        for node in ast.walk(tree):
            if not isinstance(node, _ALLOWED):
                raise SpaceError(
                    f"The constraint {self.text!r} contains {ast.unparse(node)!r}: only names, constants, arithmetic, "
                    "comparisons, and, or, not, in are possible."
                )
        names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        if not names:
            raise SpaceError(f"The constraint {self.text!r} names no parameter.")
        object.__setattr__(self, "names", names)

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether the condition is met; True where it names a parameter that `params` lacks.

        Raises:
            SpaceError: if the values cannot be compared or combined so.
        """
        if not self.names <= params.keys():
            return True
        try:
            # Only the nodes above can be in it: no calls, no attributes.
            return bool(eval(compile(self.text, "<constraint>", "eval"), {"__builtins__": {}}, dict(params)))
        except (TypeError, ArithmeticError) as error:
            used = {name: params[name] for name in sorted(self.names)}
            raise SpaceError(f"The constraint {self.text!r} cannot be evaluated at {used}: {error}.") from None
