"""Coarse to fine: each round looks closer around the best of the rounds before."""

from __future__ import annotations

from typing import Any

import numpy as np

from hypergrad.errors import ConfigurationError
from hypergrad.search.parameter import Constant, Float, Int, Parameter
from hypergrad.search.record import TrialRecord
from hypergrad.search.samplers.base import Proposal, Sampler
from hypergrad.search.samplers.from_optuna import require_feasible
from hypergrad.search.seeding import derived_seed
from hypergrad.search.spec import StudySpec
from hypergrad.search.storage import Storage
from hypergrad.search.unit import drawn, from_unit, to_unit


class Refine(Sampler):
    """Uniform draws from a box that is centred on the best complete trial of the earlier rounds and shrinks.

    In round r the box is `shrink ** r` of the space wide in every direction, on the log scale where a parameter has
    one, and moved inward where it would leave the space. A categorical keeps the best trial's choice but for a share
    `shrink ** r` of draws from all choices.

    Args:
        per_round: trials per round, at least 1.
        shrink: width of a round's box relative to the round before, in (0, 1).
    """

    def __init__(self, per_round: int = 10, shrink: float = 0.5) -> None:
        if isinstance(per_round, bool) or not isinstance(per_round, int) or per_round < 1:
            raise ConfigurationError(f"`per_round` must be an integer of at least 1, but got {per_round!r}.")
        if not isinstance(shrink, float) or not 0.0 < shrink < 1.0:
            raise ConfigurationError(f"`shrink` must lie in (0, 1), but got {shrink!r}.")
        self.per_round, self.shrink = per_round, shrink

    def check(self, spec: StudySpec) -> None:
        """Raise `ConfigurationError` with several objectives, where there is no best trial."""
        if len(spec.directions) > 1:
            raise ConfigurationError("refine has one objective: with several use sampler='genetic' or 'tpe'.")
        require_feasible(spec.space)

    def propose(self, storage: Storage, number: int) -> Proposal:
        """A feasible draw from the box of the round that `number` falls into."""
        spec = storage.spec
        generator = np.random.default_rng(derived_seed(spec.seed, number, 1))
        best = _best(storage, number // self.per_round * self.per_round)
        width = self.shrink ** (number // self.per_round) if best is not None else 1.0
        for _ in range(10_000):
            point: dict[str, Any] = {}
            for name, parameter in spec.space.items():
                if spec.space.is_active(name, point):
                    centre = best.params.get(name) if best is not None else None
                    point[name] = _draw(parameter, centre, width, generator)
            if spec.space.is_feasible(point):
                return Proposal(point)
            width = min(1.0, width * 1.001)  # a box without feasible points opens again
        raise ConfigurationError(f"No point that satisfies {[c.text for c in spec.space.constraints]} was found.")


def _best(storage: Storage, before: int) -> TrialRecord | None:
    sign = 1.0 if storage.spec.directions[0] == "minimize" else -1.0
    records = [r for r in storage.records() if r.number < before and r.state == "complete"]
    return min(records, key=lambda r: sign * r.value, default=None)  # type: ignore[operator]


def _draw(parameter: Parameter, centre: Any, width: float, generator: np.random.Generator) -> Any:
    if centre is None or isinstance(parameter, Constant):
        return drawn(parameter, generator)
    if isinstance(parameter, (Float, Int)):
        low = min(max(to_unit(parameter, centre) - width / 2, 0.0), 1.0 - width)
        return from_unit(parameter, low + width * generator.random())
    return drawn(parameter, generator) if generator.random() < width else centre
