"""Which parameters one number acts on: those of a param group, all of them, or a single tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup


class TensorGroup(dict[str, Any]):
    """A param group of one tensor, split off one of the user's: `origin` is the index of that.

    The step of a rule that treats tensors apart is the same for it; a plain dict to everything else.
    """

    origin: int


def split_groups(optimizer: torch.optim.Optimizer) -> list[ParamGroup]:
    """Give every tensor a param group of its own, with the settings of its present one; returns the present ones."""
    groups = list(optimizer.param_groups)
    parts: list[ParamGroup] = []
    for index, group in enumerate(groups):
        for p in group["params"]:
            part = TensorGroup(group)
            part["params"], part.origin = [p], index
            parts.append(part)
    optimizer.param_groups[:] = parts
    return groups


def rejoin_groups(optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], learned: Collection[str]) -> None:
    """Put the groups back that `split_groups` returned.

    What the step itself wrote into the settings (a counter) stays, but for the `learned` keys.
    """
    for part in optimizer.param_groups:
        if isinstance(part, TensorGroup):
            group = groups[part.origin]
            group.update({k: v for k, v in part.items() if k != "params" and k not in learned})
    optimizer.param_groups[:] = groups


@contextmanager
def split_where_asked(
    optimizer: torch.optim.Optimizer, hyperparameters: Iterable[OptimizerHyperparameter]
) -> Iterator[None]:
    """Inside the block every tensor has a param group of its own, if one of these is learned per tensor."""
    own = list(hyperparameters)
    if not any(h.per == "tensor" for h in own):
        yield
        return
    groups = split_groups(optimizer)
    try:
        yield
    finally:
        rejoin_groups(optimizer, groups, {h.key for h in own})


def units(hyperparameter: OptimizerHyperparameter, groups: Sequence[ParamGroup]) -> list[list[int]]:
    """The indices of the param groups that each number of a hyperparameter acts on."""
    if hyperparameter.per == "shared":
        return [list(range(len(groups)))]
    if hyperparameter.per == "tensor":
        return [[i] for i in range(len(groups))]
    by_origin: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        by_origin.setdefault(group.origin if isinstance(group, TensorGroup) else i, []).append(i)
    return list(by_origin.values())


def reference(hyperparameter: OptimizerHyperparameter, groups: Sequence[ParamGroup], unit: Sequence[int]) -> int:
    """The group whose value a number stands for: the first that can move in its coordinate, or the first at all."""
    return next((i for i in unit if hyperparameter.coordinate.slope(hyperparameter.read(groups[i])) > 0.0), unit[0])


def weights(hyperparameter: OptimizerHyperparameter, groups: Sequence[ParamGroup]) -> torch.Tensor | None:
    """d(value in a group)/d(number): shape `(units, groups)`, float64, on the CPU; None where each group is a unit.

    Groups under one number move together in the coordinate u: dx_i/dx_0 = (dx_i/du) / (dx_0/du).
    """
    rows = units(hyperparameter, groups)
    if all(len(unit) == 1 for unit in rows):
        return None
    matrix = torch.zeros(len(rows), len(groups), dtype=torch.float64)
    for row, unit in zip(matrix, rows, strict=True):
        values = {i: hyperparameter.read(groups[i]) for i in unit}
        first = values[reference(hyperparameter, groups, unit)]
        slope = hyperparameter.coordinate.slope(first)
        for i, value in values.items():
            # Values of 0 do not move in a logarithm; if all are, they move together in natural units.
            row[i] = hyperparameter.coordinate.slope(value) / slope if slope > 0.0 else float(value == first)
    return matrix


def write(
    hyperparameter: OptimizerHyperparameter, groups: Sequence[ParamGroup], unit: Sequence[int], value: float
) -> None:
    """Give the number of a unit a value: its groups move together in the coordinate."""
    coordinate = hyperparameter.coordinate
    present = {i: hyperparameter.read(groups[i]) for i in unit}
    first = present[reference(hyperparameter, groups, unit)]
    for i, old in present.items():
        if old == first:
            hyperparameter.write(groups[i], value)
        elif coordinate.slope(old) > 0.0:
            moved = coordinate.inverse(coordinate.forward(old) + coordinate.forward(value) - coordinate.forward(first))
            hyperparameter.write(groups[i], moved)
