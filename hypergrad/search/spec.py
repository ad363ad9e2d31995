"""What a study is: everything that must stay the same when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hypergrad.errors import ConfigurationError
from hypergrad.search.errors import StorageError
from hypergrad.search.space import Space

Direction = Literal["minimize", "maximize"]
VERSION = 1


@dataclass(frozen=True)
class StudySpec:
    """The settings of a study, as they are stored with it. See `Study` for what they mean."""

    space: Space
    sampler: str
    pruner: str
    directions: tuple[Direction, ...]
    monitors: tuple[str, ...]
    prune_on: str
    seed: int

    @property
    def pruning_direction(self) -> Direction:
        """Which way the metric that is pruned on gets better."""
        return self.directions[self.monitors.index(self.prune_on)]

    def to_json(self) -> dict[str, Any]:
        """Plain containers with the version of their format."""
        return {
            "version": VERSION,
            "space": self.space.to_json(),
            "sampler": self.sampler,
            "pruner": self.pruner,
            "directions": list(self.directions),
            "monitors": list(self.monitors),
            "prune_on": self.prune_on,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudySpec:
        """The settings that `to_json` described.

        Raises:
            StorageError: if a newer version of hypergrad wrote them.
        """
        if data["version"] > VERSION:
            raise StorageError(
                f"The study was written in format {data['version']}, and this version of hypergrad reads up to "
                f"{VERSION}: install a newer one (pip install -U hypergrad-lightning)."
            )
        return cls(
            space=Space.from_json(data["space"]),
            sampler=data["sampler"],
            pruner=data["pruner"],
            directions=tuple(data["directions"]),
            monitors=tuple(data["monitors"]),
            prune_on=data["prune_on"],
            seed=data["seed"],
        )

    def differences(self, other: StudySpec) -> list[str]:
        """What `other` has differently, in words."""
        found = self.space.differences(other.space)
        for name in ("sampler", "pruner", "directions", "monitors", "prune_on", "seed"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name}: {mine!r} became {theirs!r}")
        return found


def as_directions(direction: Any, count: int) -> tuple[Direction, ...]:
    """One direction per objective.

    Raises:
        ConfigurationError: for anything but "minimize" and "maximize", or another number than `count`.
    """
    directions = (direction,) if isinstance(direction, str) else tuple(direction)
    if not directions or any(d not in ("minimize", "maximize") for d in directions):
        raise ConfigurationError(f"`direction` must be 'minimize' or 'maximize', or a list of them, got {direction!r}.")
    if len(directions) != count:
        raise ConfigurationError(
            f"There must be one direction per monitored objective, but got {len(directions)} of them for {count}: "
            "Study(..., monitor=['val_loss', 'val_f1'], direction=['minimize', 'maximize'])."
        )
    return directions


def as_monitors(monitor: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the objectives.

    Raises:
        ConfigurationError: for names that are no strings or not different.
    """
    monitors = (monitor,) if isinstance(monitor, str) else tuple(monitor)
    if not monitors or not all(isinstance(m, str) and m for m in monitors) or len(set(monitors)) < len(monitors):
        raise ConfigurationError(f"`monitor` must be the name of a metric, or different names, but got {monitor!r}.")
    return monitors
